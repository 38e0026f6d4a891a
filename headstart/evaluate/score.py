"""Score rows: the negative log-likelihood of each row's answer, and of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from headstart.data.segments import Example
from headstart.engine.forward import Comparing, EmbeddingReader, Reader, RowReader, TokenReader
from headstart.faults import reach
from headstart.objectives.embeddings import SCALE

ROWS_SHARED = 1024

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RowScores:
    """For each row the summed nll of its targets (nats) and how many there are, both [N]."""

    nll: Floats
    targets: Floats

    def __add__(self, other: RowScores) -> RowScores:
        return RowScores(np.concatenate([self.nll, other.nll]), np.concatenate([self.targets, other.targets]))

    @property
    def mean(self) -> float:
        """Return the nll per target over all rows."""
        return float(self.nll.sum() / self.targets.sum())


def score_rows(
    reader: Reader,
    examples: Sequence[Example],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None = None,
) -> RowScores:
    """Score `examples`, packed as in training; `on_pack(done, total)`, in rows, is called after each pack."""
    if isinstance(reader, EmbeddingReader):
        losses = compare_rows(reader, examples, tokens_per_pack, on_pack).losses
        return RowScores(losses, np.ones(len(losses)))
    if isinstance(reader, Comparing):
        return _score_preferences(reader, examples, tokens_per_pack, on_pack)
    return score_tokens(reader, examples, tokens_per_pack, on_pack)[0]


def score_tokens(
    reader: Reader,
    examples: Sequence[Example],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None = None,
    first: int = 0,
) -> tuple[RowScores, list[Floats]]:
    """Score `examples` as `score_rows` does, and return of the `first` of them the loss of each target in nats, in order, too."""
    scores = RowScores(np.zeros(len(examples)), np.zeros(len(examples)))
    found: list[list[tuple[int, int, float]]] = [[] for _ in examples[:first]]
    # In blocks, since finding what rows share takes longer the more of them there are.
    for start in range(0, len(examples), ROWS_SHARED):
        block = examples[start : start + ROWS_SHARED]
        packs = reader.build_packs(block, tokens_per_pack)
        for done, pack in enumerate(packs, 1):
            reach("evaluation.pack")
            losses, weights, rows = reader.row_losses(pack)
            rows = start + rows
            np.add.at(scores.nll, rows, losses * weights)
            np.add.at(scores.targets, rows, weights)
            if start < first:
                places, pieces = pack.positions[pack.sources[pack.target_sources]], pack.target_segments
                for n in np.flatnonzero(rows < first):
                    place = int(pack.segment_numbers[pieces[n]]), int(places[n])
                    found[rows[n]].append((*place, float(losses[n])))
            if on_pack:
                on_pack(start + len(block) * done // len(packs), len(examples))
    return scores, [np.array([loss for *_, loss in sorted(tokens)]) for tokens in found]


def score_answers(
    reader: Comparing,
    examples: Sequence[Example],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None = None,
) -> list[Floats]:
    """Return for each row the log-probability of each of its answers (its segments), or its reward."""
    found = [np.zeros(len(example.segments)) for example in examples]
    for start in range(0, len(examples), ROWS_SHARED):
        block = examples[start : start + ROWS_SHARED]
        packs = reader.build_packs(block, tokens_per_pack)
        for done, pack in enumerate(packs, 1):
            reach("evaluation.pack")
            values = reader.forward(pack).double().numpy()
            for row, number, value in zip(pack.segment_rows, pack.segment_numbers, values, strict=True):
                found[start + row][number] = value
            if on_pack:
                on_pack(start + len(block) * done // len(packs), len(examples))
    return found


def _score_preferences(
    reader: Comparing,
    examples: Sequence[Example],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None,
) -> RowScores:
    """Score rows whose references are known by the objective, over all of them at once."""
    return score_compared(reader, examples, score_answers(reader, examples, tokens_per_pack, on_pack))


def score_compared(reader: Comparing, examples: Sequence[Example], compared: Sequence[Floats]) -> RowScores:
    """Score rows by the objective, given what `score_answers` gave for each."""
    outputs = np.concatenate(compared)
    losses, weights = reader.losses(torch.from_numpy(outputs), torch.from_numpy(known_of(examples)))
    return RowScores(losses.numpy(), weights.numpy())


def known_of(examples: Sequence[Example]) -> Floats:
    """Return for each answer of all rows its row, score, reference and tokens, [S, 4] (`objectives/preference.py`)."""
    return np.array(
        [
            (row, *label, segment.weights.sum())
            for row, example in enumerate(examples)
            for segment, label in zip(example.segments, np.asarray(example.label), strict=True)
        ],
        np.float64,
    )


def output_rows(
    reader: RowReader,
    examples: Sequence[Example],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None = None,
) -> Floats:
    """Return what the model gives for each row, [N, C]: logits, or numbers."""
    found: list[Floats | None] = [None] * len(examples)
    packs = reader.build_packs(examples, tokens_per_pack)
    for done, pack in enumerate(packs, 1):
        reach("evaluation.pack")
        for row, values in zip(pack.segment_rows, reader.forward(pack).double().numpy(), strict=True):
            found[row] = values
        if on_pack:
            on_pack(done, len(packs))
    return np.array(found)


def score_outputs(reader: RowReader, examples: Sequence[Example], outputs: Floats) -> RowScores:
    """Score rows whose outputs are known."""
    losses, weights = reader.losses(torch.from_numpy(outputs), torch.from_numpy(np.array([e.label for e in examples])))
    return RowScores(losses.double().numpy(), weights.double().numpy())


def softmax(logits: Floats) -> Floats:
    """Return the probability of each class, [N, C]."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    found: Floats = powers / powers.sum(-1, keepdims=True)
    return found


def sigmoid(logits: Floats) -> Floats:
    """Return the probability of each class by itself, [N, C]."""
    found: Floats = 1 / (1 + np.exp(-logits))
    return found


def classify_rows(
    reader: RowReader,
    examples: Sequence[Example],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None = None,
) -> Floats:
    """Return the probability of each class for each row, [N, C]."""
    return softmax(output_rows(reader, examples, tokens_per_pack, on_pack))


def tag_rows(
    reader: TokenReader,
    examples: Sequence[Example],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None = None,
) -> list[tuple[Ints, Floats]]:
    """Return for each row the likeliest tag of each word that was read, and its probability."""
    found: list[tuple[Ints, Floats]] = [(np.zeros(0, np.int64), np.zeros(0))] * len(examples)
    packs = reader.build_packs([_at_every_word(example) for example in examples], tokens_per_pack)
    for done, pack in enumerate(packs, 1):
        reach("evaluation.pack")
        probabilities = softmax(reader.forward_logits(pack).double().numpy())[pack.target_sources]
        best = probabilities.argmax(-1)
        for row in np.unique(pack.target_rows):
            mine = pack.target_rows == row
            found[row] = best[mine], probabilities[mine].max(-1)
        if on_pack:
            on_pack(done, len(packs))
    return found


def _at_every_word(example: Example) -> Example:
    """Return a row that asks for the tag of every word, of those with unknown tags too."""
    return replace(
        example, segments=tuple(replace(s, weights=s.weights if s.asked is None else s.asked) for s in example.segments)
    )


def embed_rows(
    reader: EmbeddingReader,
    examples: Sequence[Example],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None = None,
) -> Floats:
    """Return the embedding of each segment of all rows, one after the other, [sum of segments, D]."""
    begins = np.concatenate([[0], np.cumsum([len(example.segments) for example in examples])])
    packs = reader.build_packs(examples, tokens_per_pack)
    found: Floats | None = None
    for done, pack in enumerate(packs, 1):
        reach("evaluation.pack")
        values = reader.forward(pack).double().numpy()
        found = np.zeros((begins[-1], values.shape[1])) if found is None else found
        found[begins[pack.segment_rows] + pack.segment_numbers] = values
        if on_pack:
            on_pack(done, len(packs))
    return found if found is not None else np.zeros((0, 0))


@dataclass(frozen=True)
class Neighbours:
    """For each row: its loss, the rank (from 1) of what fits its anchor among what fits any, and their cosine, each [N]."""

    losses: Floats
    ranks: Ints
    cosines: Floats


def compare_rows(
    reader: EmbeddingReader,
    examples: Sequence[Example],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None = None,
) -> Neighbours:
    """Embed rows and tell how well each anchor finds what fits it among all rows."""
    embedded = embed_rows(reader, examples, tokens_per_pack, on_pack)
    begins = np.concatenate([[0], np.cumsum([len(example.segments) for example in examples])])[:-1]
    anchors, fitting = embedded[begins], embedded[begins + 1]
    cosines: Floats = (anchors * fitting).sum(1)
    ranks = np.zeros(len(anchors), np.int64)
    losses = np.zeros(len(anchors))
    scores = np.array([float(np.ravel(example.label)[0]) for example in examples])
    for start in range(0, len(anchors), 1024):
        part = slice(start, start + 1024)
        table = anchors[part] @ fitting.T
        own = cosines[part]
        ranks[part] = (table > own[:, None] + 1e-9).sum(1) + 1
        logits = SCALE * table
        highest = logits.max(1)
        losses[part] = highest + np.log(np.exp(logits - highest[:, None]).sum(1)) - SCALE * own
    if not np.isnan(scores).any():
        losses = (cosines - scores) ** 2
    return Neighbours(losses, ranks, cosines)
