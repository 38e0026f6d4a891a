"""Transformer layers as fused functions: what is common to all, and the forms that are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from headstart.models.attention import Asked, Forest, Reading
from headstart.models.blocks import Blocks
from headstart.models.fused import (
    GatedMlp,
    Heads,
    LayerNorm,
    Norm,
    activated,
    add_norm,
    add_product,
    attend_columns,
    gated_mlp,
    project,
    rms_norm,
    rotate_,
)
from headstart.models.linear import Product
from headstart.models.native import suits
from headstart.models.whole import Whole, run_whole


@dataclass(frozen=True, kw_only=True)
class FusedLayer:
    """A layer that runs fused where it is called with a forest, and as it was (`plain`) everywhere else.

    `columns` gives the queries, keys and values of a token, `out` is behind the attention. `turns`: rotary positions;
    `last`: only the chosen tokens of a forest are computed behind the attention; `asked` is what the attention asks for.
    """

    plain: Callable[..., Any]
    adapters: tuple[Any, ...]
    columns: Product
    out: Product
    heads: Heads
    turns: bool = True
    last: bool = False
    asked: Asked | None = None

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, [1, T, D] -> [1, T, D]."""
        forest: Forest | Reading | None = kwargs.get("forest")
        cached = kwargs.get("past_key_values") is not None
        if forest is None or cached or self.asked is None or any(is_off(module) for module in self.adapters):
            return self.plain(hidden_states, *args, **kwargs)
        given = hidden_states.squeeze(0), forest, kwargs.get("position_embeddings")
        again = self._recompute()
        return (self.run(*given) if again is None else again(self.run, *given))[None]

    def _recompute(self) -> Callable[..., Tensor] | None:
        """Return what computes the layer anew on the way back, where that is wanted and its own class would do it in `forward`.

        In older versions of transformers that is done in `__call__`, around this.
        """
        layer: Any = getattr(self.plain, "__self__", None)
        inside = isinstance(layer, nn.Module) and type(layer).__call__ is nn.Module.__call__
        wanted = inside and layer.training and getattr(layer, "gradient_checkpointing", False)
        return layer._gradient_checkpointing_func if wanted and torch.is_grad_enabled() else None

    def run(self, x: Tensor, forest: Forest | Reading, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Run the layer on a pack, [T, D]; the last one gives the chosen tokens alone, [P, D]."""
        raise NotImplementedError

    def dropout_of_weights(self) -> float:
        """Return the share of attention weights that is dropped out now."""
        return 0.0

    def attend(
        self, columns: Tensor, forest: Forest | Reading, turn: tuple[Tensor, Tensor] | None, chosen: Tensor | None
    ) -> Tensor:
        """[T, N] -> [T, H d], or [P, H d] of chosen tokens; `columns` are used up."""
        if self.asked is None:
            raise RuntimeError("a layer runs before it was seen what its attention asks for")
        half = _half(turn) if self.turns else None
        rule, window, causal, _ = self.asked
        if isinstance(forest, Forest):
            forest.asked[id(self)] = self.asked
            native = suits(columns) if rule.softcap is None else None
            rule = replace(rule, dropout=self.dropout_of_weights(), native=native)
            blocks = forest.blocks(window, causal, chosen=chosen is not None, tiles=native is None)
            return attend_columns(columns, half, self.heads, blocks, rule, chosen)
        if half is not None:
            rotate_(self.heads.turned(columns), *half)
        # Keys and values are kept, and queries need not be kept with them.
        q, k, v = (heads.transpose(0, 1).contiguous()[None] for heads in self.heads.split(columns))
        return forest.attend(q, k, v, rule.scale, window, rule.softcap)[0].flatten(1)

    def chosen(self, forest: Forest | Reading) -> Tensor | None:
        """Return the tokens [P] that are computed behind the attention; None where all are."""
        return forest.chosen if self.last and isinstance(forest, Forest) else None


def _half(turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    if turn is None:
        return None
    cos, sin = (part[0, :, : part.shape[-1] // 2] for part in turn)
    return cos, sin


def is_off(module: Any) -> bool:
    """Tell whether an adapter adds nothing now, or is in the weights already."""
    return bool(module._disable_adapters or module.merged_adapters)


@dataclass(frozen=True, kw_only=True)
class GatedLayer(FusedLayer):
    """Attention and a gated feed-forward, each behind an RMS norm, before one, or both, and a residual, as in Llama.

    `scale`: what both branches are multiplied by; `dropout`: of attention weights, in training.
    """

    mlp: GatedMlp
    before: Norm | None
    after: Norm | None
    mlp_after: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    scale: float = 1.0
    dropout: float = 0.0
    training: Callable[[], bool] = field(default=lambda: False)
    whole: Whole | None = None

    def dropout_of_weights(self) -> float:
        """Return the share of attention weights that is dropped out now."""
        return self.dropout if self.training() else 0.0

    def run(self, x: Tensor, forest: Forest | Reading, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Run the layer on a pack, [T, D]; the last one gives the chosen tokens alone, [P, D]."""
        chosen = self.chosen(forest)
        if chosen is None and (found := self._run_whole(x, forest, turn)) is not None:
            return found
        columns = self._normed_heads(project(x, self.before, self.columns))
        attended = self.attend(columns, forest, turn, chosen)
        x = x if chosen is None else x[chosen]
        if self.after is None:
            x = add_product(x, attended, self.out, self.scale)
        else:
            x = torch.add(x, rms_norm(project(attended, None, self.out), self.after), alpha=self.scale)
        if self.mlp_after is None:
            return gated_mlp(x, self.mlp, residual=True)
        return torch.add(x, rms_norm(gated_mlp(x, self.mlp, residual=False), self.mlp_after), alpha=self.scale)

    def _run_whole(self, x: Tensor, forest: Forest | Reading, turn: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """Run the layer as a whole; None where the kernels don't."""
        half = _half(turn) if self.turns else None
        if self.whole is None or half is None or self.asked is None or not isinstance(forest, Forest):
            return None
        rule, window, causal, _ = self.asked
        fits = rule.softcap is None and not self.dropout_of_weights() and 2 * half[0].shape[1] <= self.heads.width
        native = suits(x, *half) if fits else None
        if (
            native is None
            or torch.is_autocast_enabled("cpu")
            or not self.whole.fits(native)
            or x.shape[1] != self.whole.layer.out.n
        ):
            return None
        forest.asked[id(self)] = self.asked
        blocks = forest.blocks(window, causal, tiles=False)
        return run_whole(x, half, self.whole, native, blocks, rule.scale) if isinstance(blocks, Blocks) else None

    def _normed_heads(self, columns: Tensor) -> Tensor:
        if self.query_norm is None or self.key_norm is None:
            return columns
        q, k, v = self.heads.split(columns)
        normed = [_norm_heads(q, self.query_norm), _norm_heads(k, self.key_norm), v]
        return torch.cat([heads.flatten(1) for heads in normed], 1)


def _norm_heads(heads: Tensor, norm: Norm) -> Tensor:
    """Norm [T, n, d]: each head by itself, or all of a token as one, as the norm's width says."""
    whole = norm.weight.shape[0] != heads.shape[-1]
    return rms_norm(heads.flatten(1), norm).view(heads.shape) if whole else rms_norm(heads, norm)


@dataclass(frozen=True, kw_only=True)
class PostNormLayer(FusedLayer):
    """Attention and a feed-forward, the residual of each added and then normed, as in BERT.

    Three modules say what is dropped out, if anything: of attention weights, behind the attention, behind the feed-forward.
    """

    norm: LayerNorm
    wide: Product
    down: Product
    activation: str
    mlp_norm: LayerNorm
    drop_weights: nn.Dropout | None = None
    drop: nn.Dropout | None = None
    mlp_drop: nn.Dropout | None = None

    def dropout_of_weights(self) -> float:
        """Return the share of attention weights that is dropped out now."""
        return _now(self.drop_weights)

    def run(self, x: Tensor, forest: Forest | Reading, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Run the layer on a pack, [T, D]; the last one gives the chosen tokens alone, [P, D]."""
        chosen = self.chosen(forest)
        attended = self.attend(project(x, None, self.columns), forest, turn, chosen)
        x = add_norm(x if chosen is None else x[chosen], attended, self.out, self.norm, _now(self.drop))
        return add_norm(x, activated(x, self.wide, self.activation), self.down, self.mlp_norm, _now(self.mlp_drop))


def _now(module: nn.Dropout | None) -> float:
    return module.p if module is not None and module.training else 0.0
