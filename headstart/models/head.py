"""Hidden states -> log-probabilities of the targets, and of nothing else: [T, V] logits are never kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headstart.models.attention import apart, use_attention
from headstart.models.labels import own_logits
from headstart.models.linear import add_gradient
from headstart.models.native import plain_product, product

LOGITS_AT_ONCE = 1 << 24
COLUMNS_AT_ONCE = 4096  # of the vocabulary, on a CPU: their logits and weights stay in its caches


@dataclass(frozen=True)
class Head:
    """The last step of a causal language model: a module [*, D] -> [*, V], a scale and a soft cap on its logits.

    `bounds` are where the targets of each chunk begin and end, where that is known (`for_targets`). A `fast` one leaves products
    to the kernels where they are quicker.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    bounds: tuple[int, ...] | None = None
    fast: bool = False

    @property
    def multiply(self) -> Callable[..., Tensor]:
        """What makes its products."""
        return product if self.fast else plain_product

    def for_targets(self, sources: int, target_sources: NDArray[np.int64]) -> Head:
        """Return this head for the targets of one pack, so that it needn't ask a GPU how they fall into chunks."""
        edges = np.arange(0, sources + self.rows_at_once, self.rows_at_once)
        return replace(self, bounds=tuple(np.searchsorted(target_sources, edges).tolist()))

    @property
    def vocabulary(self) -> int:
        """How many logits a hidden state has."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return int(weight.shape[0])

    @property
    def rows_at_once(self) -> int:
        """How many hidden states go through at once."""
        return max(1, LOGITS_AT_ONCE // self.vocabulary)

    def columns(self) -> list[tuple[int, int]]:
        """Return the blocks of the vocabulary that go through one behind the other: all of it at once but on a CPU."""
        on_cpu = self.module.weight.device.type == "cpu"
        edges = [*range(0, self.vocabulary, COLUMNS_AT_ONCE if on_cpu else self.vocabulary), self.vocabulary]
        return list(zip(edges, edges[1:], strict=False))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states [P, D] -> [P, V], in float32 or wider."""
        logits: Tensor = self.module(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return self.shape(logits)

    def shape(self, logits: Tensor) -> Tensor:
        """Apply the scale and the soft cap to what the module gave."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logprobs(self, hidden: Tensor, target_sources: Tensor, target_ids: Tensor) -> Tensor:
        """Return the log-probability of each target.

        `hidden` [P, D]; `target_sources` [L], which hidden state predicts a target, ascending; `target_ids` [L]. The
        result is [L], in float32 or wider. Hidden states go through in chunks, whose logits are made anew in the
        backward pass.
        """
        if type(self.module) is nn.Linear and not torch.is_autocast_enabled(hidden.device.type):
            module = self.module
            return _TargetLogprobs.apply(hidden, module.weight, module.bias, target_sources, target_ids, self)  # type: ignore[no-any-return, no-untyped-call]
        parts = [
            checkpoint(self._chunk, *chunk, use_reentrant=False) if torch.is_grad_enabled() else self._chunk(*chunk)
            for chunk in self.chunks(hidden, target_sources, target_ids)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0)

    def chunks(self, hidden: Tensor, target_sources: Tensor, target_ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Cut hidden states and their targets into chunks of `rows_at_once`; sources count from each chunk's start."""
        rows = self.rows_at_once
        bounds: Sequence[int] | None = self.bounds
        if bounds is None:
            edges = torch.arange(0, len(hidden) + rows, rows, device=hidden.device)
            bounds = torch.searchsorted(target_sources.contiguous(), edges).tolist()
        return [
            (hidden[n * rows : (n + 1) * rows], target_sources[low:high] - n * rows, target_ids[low:high])
            for n, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False))
        ]

    def _chunk(self, hidden: Tensor, target_sources: Tensor, target_ids: Tensor) -> Tensor:
        logits = self.logits(hidden)
        return logits[target_sources, target_ids] - logits.logsumexp(-1)[target_sources]


class OwnHead(Head):
    """The head of a model that has one of its own for tokens, as `own_logits` runs it: of masked tokens, of tags."""

    @property
    def vocabulary(self) -> int:
        """How many logits a hidden state has."""
        model: Any = self.module
        embeddings = model.get_output_embeddings()
        return int(model.config.num_labels if embeddings is None else embeddings.weight.shape[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states [P, D] -> [P, V], in float32 or wider."""
        logits = own_logits(self.module, hidden)
        return logits if logits.dtype == torch.float64 else logits.float()


class _TargetLogprobs(torch.autograd.Function):
    """Log-probabilities of targets under a linear head, and their gradient: softmax minus one-hot.

    The vocabulary goes through in blocks that fit into a cache, with the softmax put together block by block (Milakov and
    Gimelshein, 2018). Where the head is frozen, what its rows are on average under the softmax says all that the backward
    pass needs: d logprob(i) / d hidden = W[i] - sum_v p_v W[v]. It is made while the logits are at hand, which are then
    never made again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, sources: Tensor, ids: Tensor, head: Head
    ) -> Tensor:
        frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]) and head.softcap is None
        mean = torch.zeros_like(hidden) if frozen and ctx.needs_input_grad[0] else None
        parts = torch.split(hidden, head.rows_at_once)
        means = [None] * len(parts) if mean is None else torch.split(mean, head.rows_at_once)
        normalizers = [_normalize(head, part, weight, bias, place) for part, place in zip(parts, means, strict=True)]
        normalizer = torch.cat(normalizers) if normalizers else hidden.new_zeros(0)
        raw = torch.linalg.vecdot(hidden[sources], weight[ids])
        picked = head.shape(raw if bias is None else raw + bias[ids])
        ctx.head, ctx.weight, ctx.bias = head, weight, bias
        ctx.save_for_backward(hidden, sources, ids, normalizer, mean)
        return picked - normalizer[sources]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, sources, ids, normalizer, mean = ctx.saved_tensors
        head, weight, bias = ctx.head, ctx.weight, ctx.bias
        nothing = (None,) * 5
        if mean is not None:
            per_source = torch.zeros_like(normalizer).index_add_(0, sources, gradient)
            d_hidden = mean.mul_(per_source[:, None].neg_())
            d_hidden.index_add_(0, sources, weight[ids].mul_(gradient[:, None]))
            return d_hidden.mul_(head.scale) if head.scale != 1.0 else d_hidden, *nothing
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        new = ctx.needs_input_grad[1] and weight.grad is None
        if new:
            weight.grad = torch.empty_like(weight)
        d_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        row = target = 0
        for chunk, chunk_sources, chunk_ids in head.chunks(hidden, sources, ids):
            rows, targets = slice(row, row + len(chunk)), slice(target, target + len(chunk_ids))
            for low, high in head.columns():
                raw = head.multiply(chunk, weight[low:high].t(), None if bias is None else bias[low:high])
                inside = chunk_sources, chunk_ids - low, gradient[targets]
                d_logits = _logits_gradient(head, raw, normalizer[rows], *inside)
                if d_hidden is not None:
                    head.multiply(d_logits, weight[low:high], d_hidden[rows], d_hidden[rows])
                if ctx.needs_input_grad[1]:
                    place = weight.grad[low:high]
                    head.multiply(d_logits.t(), chunk, None if new and row == 0 else place, place)
                if d_bias is not None:
                    d_bias[low:high] += d_logits.sum(0)
            row, target = rows.stop, targets.stop
        if d_bias is not None:
            add_gradient(bias, d_bias)
        return d_hidden, *nothing


def _normalize(head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None) -> Tensor:
    """Return log sum exp of the logits of hidden states [P, D], [P]; write into `mean` [P, D], zeros, sum_v p_v W[v]."""
    highest = hidden.new_full((len(hidden), 1), -math.inf)
    total = hidden.new_zeros(len(hidden))
    for low, high in head.columns():
        logits = head.shape(head.multiply(hidden, weight[low:high].t(), None if bias is None else bias[low:high]))
        new = torch.maximum(highest, logits.amax(-1, keepdim=True))
        shrink = highest.sub_(new).exp_()
        logits.sub_(new).exp_()
        total.mul_(shrink[:, 0]).add_(logits.sum(-1))
        if mean is not None:
            head.multiply(logits, weight[low:high], mean.mul_(shrink), mean)
        highest = new
    if mean is not None:
        mean.div_(total[:, None])
    return total.log_().add_(highest[:, 0])


def _logits_gradient(
    head: Head, raw: Tensor, normalizers: Tensor, sources: Tensor, ids: Tensor, gradient: Tensor
) -> Tensor:
    """Return the gradient of what the head's module gave for some columns, [P, V'], given that of the log-probabilities [L].

    `ids` count from the first of the columns; those outside of them are another block's.
    """
    per_source = torch.zeros_like(normalizers).index_add_(0, sources, gradient)
    if head.softcap is None:
        probabilities = raw.mul_(head.scale) if head.scale != 1.0 else raw
        slope = None
    else:
        bent = torch.tanh(raw * (head.scale / head.softcap))
        probabilities, slope = bent * head.softcap, 1 - bent.square()
    probabilities.sub_(normalizers[:, None]).exp_().mul_(-per_source[:, None])
    if raw.shape[1] < head.vocabulary:
        inside = (ids >= 0) & (ids < raw.shape[1])
        sources, ids, gradient = sources[inside], ids[inside], gradient[inside]
    probabilities.index_put_((sources, ids), gradient, accumulate=True)
    if slope is not None:
        probabilities.mul_(slope)
    return probabilities.mul_(head.scale) if head.scale != 1.0 else probabilities


def read_head(model: Any) -> Head:
    """Return the head of a causal language model, checked against the model's own logits.

    Raises ValueError where they differ: then the architecture does something to its logits that isn't known here.
    """
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):
        scale /= float(divisor)
    head = Head(model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))
    use_attention(model, packed=False)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.arange(3, 7, device=model.device)[None] % config.vocab_size
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            theirs = model(input_ids=ids, use_cache=False).logits[0].float()
            ours = head.logits(hidden[0]).float()
    finally:
        model.train(training)
    if ours.shape != theirs.shape or not apart(ours, theirs) < 1e-2:
        raise ValueError(f"{type(model).__name__} changes its logits in a way that isn't known")
    return head
