"""Documents for models that look both ways: pieces in the model's frame, of which some tokens are hidden.

To train on, 15% of the tokens are chosen anew each time that a row is seen; of them 80% are hidden behind the mask, 10%
are another token and 10% stay as they are (BERT, Devlin et al., 2019). To score, each token is hidden exactly once: a
document stands there in several copies that hide different tokens, so its score needs no luck (the pseudo-likelihood of
Salazar et al., 2020, several tokens at a time).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from headstart.data.encode import Encoder
from headstart.data.labels import no_tokens
from headstart.data.records import Document
from headstart.data.segments import ROWS_AT_ONCE, Example, Segment, Segmented
from headstart.errors import ModelError, Problem

MASKED, HIDDEN, REPLACED = 0.15, 0.8, 0.1
COPIES = 7  # a copy to score hides about as many tokens as training does

Chance = np.random.Generator


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden. `starts` bool [V] are tokens that begin a word, if whole words are hidden."""

    mask_id: int
    vocabulary: int
    special: frozenset[int]
    seed: int = 0
    starts: NDArray[np.bool_] | None = None

    def vary(self, example: Example, place: int) -> Example:
        """Return a row with other tokens hidden; which, follows from the seed and the row's place in the run."""
        chance = np.random.default_rng((self.seed, place))
        return replace(example, segments=tuple(self._mask(segment, chance) for segment in example.segments))

    def _mask(self, segment: Segment, chance: Chance) -> Segment:
        words = self._words(segment.ids)
        count = int(words.max(initial=-1)) + 1
        wanted = max(1, round(MASKED * count))
        chosen = np.isin(words, chance.choice(count, min(wanted, count), replace=False)) if count else words >= 0
        fate = chance.random(len(words))
        ids = segment.ids.copy()
        ids[chosen & (fate < HIDDEN)] = self.mask_id
        other = chosen & (fate >= HIDDEN) & (fate < HIDDEN + REPLACED)
        ids[other] = chance.integers(0, self.vocabulary, int(other.sum()))
        return replace(segment, ids=ids, targets=segment.ids, weights=chosen.astype(np.float32))

    def hide_each_once(self, segment: Segment) -> list[Segment]:
        """Return copies of a segment in which each token of the text is hidden once."""
        words = self._words(segment.ids)
        count = int(words.max(initial=-1)) + 1
        order = np.random.default_rng(self.seed).permutation(count)
        copies = []
        for number in range(min(COPIES, count)):
            chosen = np.isin(words, np.flatnonzero(order % COPIES == number))
            ids = np.where(chosen, np.int32(self.mask_id), segment.ids)
            copies.append(replace(segment, ids=ids, targets=segment.ids, weights=chosen.astype(np.float32)))
        return copies

    def _words(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """Number the units that are hidden together, [n]: tokens or whole words; -1 for what the model puts around."""
        text = ~np.isin(ids, list(self.special))
        begins = text if self.starts is None else text & (self.starts[ids] | ~np.concatenate([[False], text[:-1]]))
        return np.where(text, np.cumsum(begins) - 1, -1)


def find_masking(encoder: Encoder, seed: int, *, whole_words: bool) -> Masking:
    """Return how this tokenizer hides tokens. Raises ModelError where it has no mask."""
    tokenizer = encoder.tokenizer
    if tokenizer.mask_token_id is None:
        cure = "tune an encoder with a mask token, or a model that continues text (task=causal)"
        raise ModelError(Problem("model.mask", "the tokenizer has no mask token", "", cure))
    # What no token spells is text all the same.
    special = frozenset(int(id_) for id_ in tokenizer.all_special_ids if id_ != tokenizer.unk_token_id)
    starts = None
    if whole_words:
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        pieces = any(token and token.startswith("##") for token in tokens)
        marks = (
            "\u0120",
            "\u2581",
            "\u010a",
        )  # how byte-level BPE and SentencePiece write a space or a line before a word
        starts = np.array([not token.startswith("##") if pieces else token.startswith(marks) for token in tokens])
    return Masking(int(tokenizer.mask_token_id), len(tokenizer), special, seed, starts)


def segment_masked(
    documents: Sequence[Document],
    encoder: Encoder,
    masking: Masking,
    *,
    max_length: int,
    over_length: str = "split",
    whole: bool = False,
) -> Segmented:
    """Encode documents in the model's frame; those over `max_length` tokens are split, dropped, cut or an error.

    To train on, each piece is an example without targets, which `Masking.vary` gives. With `whole` a document is one
    example: all copies of all its pieces.
    """
    result = Segmented()
    before, behind = encoder.frame
    room = max_length - len(before) - len(behind)
    for start in range(0, len(documents), ROWS_AT_ONCE):
        part = documents[start : start + ROWS_AT_ONCE]
        for document, tokens in zip(part, encoder.encode_texts([d.content for d in part]), strict=True):
            if not tokens:
                result.problems.append(no_tokens(document))
                continue
            if len(tokens) > room and over_length in ("drop", "error"):
                result.dropped.append((document.where, len(tokens) + max_length - room))
                continue
            cut = encoder.decode(tokens[room:]) if over_length == "cut" else ""
            inner = tokens[:room] if over_length == "cut" else tokens
            pieces = [inner[at : at + room] for at in range(0, len(inner), room)]
            segments = [_plain(np.array([*before, *piece, *behind], np.int32)) for piece in pieces]
            if whole:
                copies = [copy for segment in segments for copy in masking.hide_each_once(segment)]
                result.examples.append(Example(document.where, tuple(copies), cut))
                result.kept.append(document)
                continue
            result.examples += [Example(document.where, (segment,), cut) for segment in segments]
            result.kept += [document] * len(segments)
    if over_length == "error":
        result.reject_dropped(max_length, "split, drop or cut")
    return result


def _plain(ids: NDArray[np.int32]) -> Segment:
    return Segment(ids, np.zeros(len(ids), np.float32))
