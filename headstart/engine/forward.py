"""The verb forward: models that read packs, and what comes out at the places that an objective needs."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart.data.forest import Pack, build_packs
from headstart.data.images import Look, load_pixels
from headstart.data.segments import Example
from headstart.models.attention import Forest, OnHost, can_pack, run_decoder, use_attention
from headstart.models.attention_gpu import kernels_agree
from headstart.models.fast import Sped, speed_up
from headstart.models.head import Head, OwnHead, read_head
from headstart.models.labels import body_packing, find_packing, own_logits, row_logits
from headstart.models.load import POOLING
from headstart.objectives.labels import RowLosses, class_losses

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Reader(ABC):
    """A model of transformers that takes packs.

    `packing` tells how rows may lie in one (tried, not looked up): in a `forest`, as `roots` that share nothing, or
    `none`: then each pack must hold one row. `bfloat16` runs the model in mixed precision.
    """

    def __init__(self, model: Any, packing: str, *, bfloat16: bool = False) -> None:
        self.model = model
        self.packing = packing
        self.kernel = "blocks"
        self._bfloat16 = bfloat16
        model.eval()  # all of its modules, so that from now on the model says what each of them does

    @property
    def packs(self) -> bool:
        """Tell whether several rows go through at once."""
        return self.packing != "none"

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        device: torch.device = self.model.device
        return device

    @property
    def answer_head(self) -> Head | None:
        """The head with which answers are made in packs; None where they can't be."""
        return None

    def build_packs(self, examples: Sequence[Example], tokens_per_pack: int) -> list[Pack]:
        """Lay out rows as this model can read them."""
        return build_packs(examples, tokens_per_pack, share=self.packing == "forest", one_row=self.packing == "none")

    def recompute_activations(self) -> None:
        """Keep only the inputs of each layer and make the rest anew in the backward pass.

        Raises ValueError where the architecture can't do that.
        """
        # What it is called since, and what it was called before; the old name warns where the new one is there.
        name = "activation_checkpointing_enable"
        enable = getattr(self.model, name if hasattr(self.model, name) else "gradient_checkpointing_enable")
        enable({"use_reentrant": False})

    def try_kernels(self) -> bool:
        """Have whole packs attended to in one kernel, if that gives what blocks of queries give; tell whether."""
        agree = kernels_agree(self.model, share=self.packing == "forest", precision=self.precision)
        self.kernel = "auto" if agree else "blocks"
        return agree

    def speed_up(self) -> Sped:
        """Run known layers as fused functions from now on; what comes out stays the same."""
        return speed_up(self.model) if self.packs else Sped()

    def train(self) -> None:
        """Make the model ready to learn."""
        if not self.model.training:  # to tell every module takes a hundredth of a step
            self.model.train()

    def _rest(self) -> None:
        """Make the model ready to be asked."""
        if self.model.training:
            self.model.eval()

    def forward(self, pack: Pack) -> Tensor:
        """Return `outputs` on the CPU, without gradients or dropout."""
        self._rest()
        with torch.no_grad():
            return self.outputs(pack).cpu()

    @abstractmethod
    def outputs(self, pack: Pack) -> Tensor:
        """Return what the objective is about, as part of the graph that gradients go through."""

    @abstractmethod
    def targets(self, pack: Pack) -> Tensor:
        """Return what the objective holds the outputs against."""

    @abstractmethod
    def row_losses(self, pack: Pack) -> tuple[Floats, Floats, Ints]:
        """Return the loss of each target, its weight, and the number of its row, without gradients."""

    def hidden(self, pack: Pack, places: Ints | None = None) -> Tensor:
        """Return the hidden states of a pack, [T, D], or those of the tokens at `places` [P], ascending, alone."""
        ids, positions = self.tensors(pack.ids, pack.positions)
        chosen = None if places is None else self.tensors(places)[0]
        if not self.packs:
            hidden = run_decoder(self.model, ids, positions, None, self.types(pack))
            return hidden if chosen is None else hidden[chosen]
        on_host = OnHost(pack.positions, places)
        forest = Forest(pack.length.tolist(), pack.parent.tolist(), positions, chosen, self.kernel, on_host=on_host)
        return run_decoder(self.model, ids, positions, forest, self.types(pack))

    def types(self, pack: Pack) -> Tensor | None:
        """Return which text of a pair each token is of, [T]; None where there are no pairs."""
        return self.tensors(pack.types)[0] if pack.types.any() else None

    def tensors(self, *arrays: Any) -> list[Tensor]:
        """Return arrays as tensors where the model lies; a GPU copies them while the host goes on."""
        aside = self.device.type == "cuda"
        return [torch.from_numpy(array).to(self.device, non_blocking=aside) for array in arrays]

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the precision that the model runs in."""
        if self._bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()


class PackReader(Reader):
    """A causal language model: outputs are the log-probabilities of a pack's targets, [L]; targets their weights."""

    def __init__(self, model: Any, *, bfloat16: bool = False) -> None:
        self.head = read_head(model)
        super().__init__(model, "forest" if can_pack(model) else "none", bfloat16=bfloat16)

    @property
    def answer_head(self) -> Head | None:
        """The head with which answers are made in packs; None where they can't be."""
        return self.head if self.packing == "forest" else None

    def speed_up(self) -> Sped:
        """Run known layers as fused functions from now on, and the head's products as kernels; what comes out stays the same."""
        self.head = replace(self.head, fast=self.packs)
        return super().speed_up()

    def outputs(self, pack: Pack) -> Tensor:
        """Return the log-probability of each target."""
        target_sources, target_ids = self.tensors(pack.target_sources, pack.target_ids)
        with self.precision():
            head = self.head.for_targets(len(pack.sources), pack.target_sources)
            return head.logprobs(self.hidden(pack, pack.sources), target_sources, target_ids)

    def targets(self, pack: Pack) -> Tensor:
        """Return the weight of each target."""
        (weights,) = self.tensors(pack.weights)
        return weights

    def row_losses(self, pack: Pack) -> tuple[Floats, Floats, Ints]:
        """Return the negative log-probability of each target, its weight and its row."""
        return -self.forward(pack).double().numpy(), pack.weights.astype(np.float64), pack.target_rows


class PreferenceReader(PackReader):
    """A causal language model whose answers are compared: outputs are the log-probabilities of a pack's answers, [S].

    All answers of a row lie in one pack, so that they can be held against each other there; where the model can't read
    packs, each goes through alone. `losses` gives the loss of each row (`objectives/preference.py`).
    """

    def __init__(self, model: Any, losses: RowLosses, *, bfloat16: bool = False) -> None:
        super().__init__(model, bfloat16=bfloat16)
        self.losses = losses

    def build_packs(self, examples: Sequence[Example], tokens_per_pack: int) -> list[Pack]:
        """Lay out rows as this model can read them, each whole."""
        return _whole_rows(examples, tokens_per_pack, packs=self.packs)

    def outputs(self, pack: Pack) -> Tensor:
        """Return the log-probability of each answer."""
        logprobs = super().outputs(pack)
        weights, owners = self.tensors(pack.weights, pack.target_segments)
        return logprobs.new_zeros(len(pack.begins)).index_add(0, owners, logprobs * weights)

    def targets(self, pack: Pack) -> Tensor:
        """Return what is known of each answer, [S, 4], on the host: `objectives/preference.py`."""
        return _known_of_answers(pack)

    def row_losses(self, pack: Pack) -> tuple[Floats, Floats, Ints]:  # noqa: ARG002 (the others read it)
        """Not known of a pack: what an answer is held against may be the answers of all others."""
        raise TypeError("preferences are scored over all rows at once")

    @cached_property
    def beside(self) -> PackReader:
        """Return the same model as a reader of rows that have no answers to compare."""
        reader = PackReader(self.model, bfloat16=self._bfloat16)
        reader.kernel, reader.head = self.kernel, self.head
        return reader


def _whole_rows(examples: Sequence[Example], tokens_per_pack: int, *, packs: bool) -> list[Pack]:
    """Lay out rows, each in one pack; where the model can't read packs, each of their segments alone."""
    return build_packs(examples, tokens_per_pack, one_row=not packs, whole_rows=packs)


def _known_of_answers(pack: Pack) -> Tensor:
    """Return for each answer its row, score, reference and tokens, [S, 4]."""
    score, reference = np.asarray(pack.labels, np.float64).T
    tokens = np.bincount(pack.target_segments, pack.weights, len(pack.begins))
    return torch.from_numpy(np.stack([pack.segment_rows, score, reference, tokens], 1))


class TokenReader(PackReader):
    """A model with a head for tokens (`...ForMaskedLM`, `...ForTokenClassification`): what is told of a token is a target."""

    def __init__(self, model: Any, *, bfloat16: bool = False) -> None:
        self.head = OwnHead(model)
        Reader.__init__(self, model, find_packing(model)[0], bfloat16=bfloat16)

    def outputs(self, pack: Pack) -> Tensor:
        """Return the log-probability of each target."""
        if self.packs:
            return super().outputs(pack)
        sources, ids = self.tensors(pack.target_sources, pack.target_ids)
        return self.logits(pack).log_softmax(-1)[sources, ids]

    def logits(self, pack: Pack) -> Tensor:
        """Return the logits of each source, [P, C]."""
        (sources,) = self.tensors(pack.sources)
        with self.precision():
            if self.packs:
                return self.head.logits(self.hidden(pack, pack.sources))
            logits = row_logits(self.model, self.tensors(pack.ids)[0])[0][sources]
            return logits if logits.dtype == torch.float64 else logits.float()

    def forward_logits(self, pack: Pack) -> Tensor:
        """Return `logits` on the CPU, without gradients or dropout."""
        self._rest()
        with torch.no_grad():
            return self.logits(pack).cpu()


class RowReader(Reader):
    """A model that tells something of a row as a whole: outputs are [S, C], targets what they are held against."""

    def __init__(self, model: Any, packing: str, losses: RowLosses = class_losses, *, bfloat16: bool = False) -> None:
        super().__init__(model, packing, bfloat16=bfloat16)
        self.losses = losses

    def targets(self, pack: Pack) -> Tensor:
        """Return the class of each row, [S], or its classes or numbers, [S, C]."""
        (labels,) = self.tensors(pack.labels)
        return labels

    def row_losses(self, pack: Pack) -> tuple[Floats, Floats, Ints]:
        """Return the loss of each row, what it weighs (a class that the model doesn't have: nothing), and its number."""
        outputs = self.forward(pack).double()
        losses, weights = self.losses(outputs, torch.from_numpy(pack.labels))
        return losses.numpy(), weights.double().numpy(), pack.segment_rows


class LabelReader(RowReader):
    """A classifier (`...ForSequenceClassification`): outputs are the logits of a pack's rows."""

    def __init__(self, model: Any, losses: RowLosses = class_losses, *, bfloat16: bool = False) -> None:
        packing, self._place = find_packing(model)
        super().__init__(model, packing, losses, bfloat16=bfloat16)

    def outputs(self, pack: Pack) -> Tensor:
        """Return the logits of each row, in float32 or wider."""
        with self.precision():
            if self.packs:
                places, order = np.unique(pack.begins if self._place == "first" else pack.ends, return_inverse=True)
                logits = own_logits(self.model, self.hidden(pack, places)[self.tensors(order)[0]])
            else:
                logits = row_logits(self.model, self.tensors(pack.ids)[0], self.types(pack))
        return logits if logits.dtype == torch.float64 else logits.float()


class RewardReader(LabelReader):
    """A reward model (`...ForSequenceClassification` with one label): outputs are the rewards of a pack's answers, [S].

    As in `PreferenceReader` all answers of a row lie in one pack, or go through alone. Raises ValueError where the model
    looks both ways: then a prompt is read otherwise with each answer.
    """

    def __init__(self, model: Any, losses: RowLosses, *, bfloat16: bool = False) -> None:
        super().__init__(model, losses, bfloat16=bfloat16)
        if self.packing == "roots":
            raise ValueError("a reward model stands on one that writes text, and this one looks both ways")

    def build_packs(self, examples: Sequence[Example], tokens_per_pack: int) -> list[Pack]:
        """Lay out rows as this model can read them, each whole."""
        return _whole_rows(examples, tokens_per_pack, packs=self.packs)

    def outputs(self, pack: Pack) -> Tensor:
        """Return the reward of each answer."""
        return super().outputs(pack)[:, 0]

    def targets(self, pack: Pack) -> Tensor:
        """Return what is known of each answer, [S, 4], on the host; in the reference's place stands the margin."""
        return _known_of_answers(pack)

    def row_losses(self, pack: Pack) -> tuple[Floats, Floats, Ints]:  # noqa: ARG002 (the others read it)
        """Not known of a pack, which may hold one answer of several."""
        raise TypeError("rewards are scored over all rows at once")


Comparing = PreferenceReader | RewardReader  # readers of answers that are held against each other


class ImageReader(RowReader):
    """A classifier of images (`...ForImageClassification`): outputs are the logits of a pack's images.

    Batch norms keep their statistics, so that what an image gives doesn't depend on those beside it.
    """

    def __init__(self, model: Any, losses: RowLosses = class_losses, *, look: Look, bfloat16: bool = False) -> None:
        super().__init__(model, "roots", losses, bfloat16=bfloat16)
        self._look = look

    def speed_up(self) -> Sped:
        """Nothing: no layer of images is known."""
        return Sped()

    def train(self) -> None:
        """Make the model ready to learn, but for the statistics of batch norms."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()

    def settle_norms(self, examples: Sequence[Example], count: int = 64) -> None:
        """Set the statistics of batch norms from some rows, for a network whose weights are random."""
        norms = [m for m in self.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        momentum = [norm.momentum for norm in norms]
        self.model.train()
        for norm in norms:
            norm.momentum = None  # a plain mean over all that is seen
        with torch.no_grad():
            for start in range(0, min(count, len(examples)), 16):
                (pack,) = build_packs(examples[start : start + 16], 1 << 30, share=False)
                self.outputs(pack)
        for norm, before in zip(norms, momentum, strict=True):
            norm.momentum = before

    def outputs(self, pack: Pack) -> Tensor:
        """Return the logits of each image, in float32 or wider."""
        with self.precision():
            logits: Tensor = self.model(pixel_values=self.pixels(pack)).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def pixels(self, pack: Pack) -> Tensor:
        """Return the images of a pack as the model wants them, [S, 3, H, W]."""
        pixels = np.stack([load_pixels(image, self._look) for image in pack.images if image])
        return self.tensors(pixels)[0].to(self.model.dtype)


class EmbeddingReader(Reader):
    """An encoder of texts: outputs are the embeddings of a pack's segments, [S, D], of length 1.

    An embedding is the mean over the states of a text's tokens, or the state of its last for models that look back only;
    for a model of sentence-transformers what that says.
    """

    def __init__(self, model: Any, *, bfloat16: bool = False) -> None:
        packing = body_packing(model)
        self.pooling = getattr(model, POOLING, None) or ("mean" if packing != "forest" else "lasttoken")
        super().__init__(model, packing, bfloat16=bfloat16)

    def build_packs(self, examples: Sequence[Example], tokens_per_pack: int) -> list[Pack]:
        """Lay out rows as this model can read them; texts that are alike share nothing, since dropout tells them apart."""
        return build_packs(examples, tokens_per_pack, share=False, one_row=not self.packs)

    def outputs(self, pack: Pack) -> Tensor:
        """Return the embedding of each segment, in float32 or wider."""
        with self.precision():
            if self.packs:
                hidden = self.hidden(pack)
            else:
                use_attention(self.model, packed=False)
                (ids,) = self.tensors(pack.ids)
                output = self.model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])
                hidden = output.last_hidden_state[0]
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        begins, ends = self.tensors(pack.begins, pack.ends)
        if self.pooling != "mean":
            pooled = hidden[ends if self.pooling == "lasttoken" else begins]
        else:
            lengths = ends - begins + 1
            # Segments are roots of their own, so their tokens stand together in the order of their places.
            order = begins.argsort()
            owners = torch.repeat_interleave(order, lengths[order], output_size=len(pack))
            summed = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, owners, hidden)
            pooled = summed / lengths[:, None]
        return torch.nn.functional.normalize(pooled, dim=-1)

    def targets(self, pack: Pack) -> Tensor:
        """Return for each segment its row, its number in the row, and the row's score (NaN where it has none), [S, 3]."""
        scores = np.asarray(pack.labels, np.float32).reshape(len(pack.begins), -1)[:, 0]
        (found,) = self.tensors(np.stack([pack.segment_rows, pack.segment_numbers, scores], 1).astype(np.float32))
        return found

    def row_losses(self, pack: Pack) -> tuple[Floats, Floats, Ints]:  # noqa: ARG002 (the others read it)
        """Not known of a pack: a text is told apart from all others, so rows are scored together."""
        raise TypeError("embeddings are scored over all rows at once")
