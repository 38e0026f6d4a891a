"""Text -> token ids, such that a text is always text: whatever it spells, it never becomes a control token."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headstart.errors import ModelError, Problem

CONTROL_LIKE = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)


class Run(NamedTuple):
    """A stretch of one kind: a control token by id, tokens that are `known`, or text to be encoded as text."""

    text: str
    control_id: int | None = None
    trained: bool = False
    after_control: bool = True
    known: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """A rendered sequence: `ids` int32 [n] and which of them are `trained` (predicted with weight 1), bool [n]."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


class Encoder:
    """A model's tokenizer as a function from runs to tokens, and back.

    `tokenizer` is a transformers tokenizer with a fast backend. Raises ModelError where it has none.
    """

    stop_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._control = {t.content: (id_, t) for id_, t in added if _is_control(t, str(tokenizer.chat_template))}
        self._control_ids = {id_ for id_, _ in self._control.values()}
        self._unknown = (tokenizer.unk_token_id, tokenizer.unk_token)
        longest_first = sorted(self._control, key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._newline = self._raw(["\n"])[0]
        self._anchored = self._find_anchored()

    @property
    def identity(self) -> list[Any]:
        """All that the ids depend on: the tokenizer, its special tokens, the versions of what encodes."""
        tokens = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        versions = [metadata.version(name) for name in ("tokenizers", "transformers")]
        return [tokens, sorted(map(str, self.tokenizer.special_tokens_map.items())), list(self.stop_ids), versions]

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Encode words as they stand in the middle of a text."""
        return self._encode_texts([(f" {word}", False) for word in words])

    def encode(self, sequences: Iterable[Sequence[Run]]) -> list[Tokens]:
        """Encode sequences of runs, all at once."""
        sequences = list(sequences)
        texts = [
            (text, after)
            for runs in sequences
            for text, control_id, _, after, known in runs
            if control_id is None and known is None
        ]
        encoded = iter(self._encode_texts(texts))
        ids: list[int] = []
        flags, lengths, ends = [], [], [0]
        for runs in sequences:
            for _, control_id, trained, _, known in runs:
                if known is not None:
                    new: Sequence[int] = known
                else:
                    new = next(encoded) if control_id is None else (control_id,)
                ids += new
                flags.append(trained)
                lengths.append(len(new))
            ends.append(len(ids))
        all_ids, all_trained = np.array(ids, np.int32), np.repeat(np.array(flags, np.bool_), lengths)
        return [Tokens(all_ids[a:b], all_trained[a:b]) for a, b in zip(ends, ends[1:], strict=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without control tokens."""
        kept = [int(id_) for id_ in ids if id_ not in self._control_ids]
        return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def decode_raw(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, control tokens spelled out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def spells_control(self, text: str) -> bool:
        """Tell whether a text spells a control token (it is encoded as text all the same)."""
        return bool(self._control_text.search(text))

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode whole texts, without what a model puts around them."""
        return self._encode_texts([(text, True) for text in texts])

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return where each token of a whole text stands in it, begin and end in characters; empty where that can't be told."""
        lead = "\n" if self._anchored[True] else ""
        encoding = self._backend.encode(lead + text, add_special_tokens=False)
        (ids,) = self.encode_texts([text])
        known = len(encoding.ids) - len(ids)
        if known < 0 or encoding.ids[known:] != ids:
            return []
        return [(begin - len(lead), end - len(lead)) for begin, end in encoding.offsets[known:]]

    def encode_split(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Encode rows of words, each word by itself, as words of a text that are parted by spaces.

        A word of which a tokenizer keeps nothing (a lone joiner, say) becomes the unknown token, where there is one.
        """
        nothing = [] if self._unknown[0] is None else [int(self._unknown[0])]
        texts = [(f" {word}" if place else word, not place) for words in rows for place, word in enumerate(words)]
        encoded = iter(self._encode_texts(texts))
        return [[next(encoded) or nothing for _ in words] for words in rows]

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and behind a text."""
        (before, behind), _ = self._find_frame("a")
        return before, behind

    @cached_property
    def _pair_frame(self) -> tuple[list[list[int]], list[list[int]]]:
        """What the tokenizer puts before, between and behind two texts, and the types of these parts and of the texts."""
        (before, middle, behind), types = self._find_frame("a", "b")
        if not middle:  # a model of plain text, which knows no pairs: a new line parts them
            middle, types[2] = self._newline, [0] * len(self._newline)
        return [before, middle, behind], types

    def frame_length(self, texts: int) -> int:
        """Return how many tokens stand around one text, or around and between two."""
        return sum(map(len, self.frame if texts == 1 else self._pair_frame[0]))

    def frame_texts(self, texts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Return one or two encoded texts as the model reads them: token ids, and which text each token is of."""
        if len(texts) == 1:
            before, behind = self.frame
            ids = [*before, *texts[0], *behind]
            return ids, [0] * len(ids)
        (before, middle, behind), types = self._pair_frame
        ids = [*before, *texts[0], *middle, *texts[1], *behind]
        first, second = ([kind[0]] * len(text) for kind, text in zip((types[1], types[3]), texts, strict=True))
        return ids, [*types[0], *first, *types[2], *second, *types[4]]

    def _find_frame(self, *texts: str) -> tuple[list[list[int]], list[list[int]]]:
        """Return what stands around texts, and the types of all parts: around, text, around, ..."""
        encoded = self.tokenizer(*texts)
        whole = [int(id_) for id_ in encoded["input_ids"]]
        kinds = list(encoded.get("token_type_ids", [0] * len(whole)))
        around, types, place = [], [], 0
        for inner in self.encode_texts(texts):
            starts = range(place, len(whole) - len(inner) + 1)
            start = next((s for s in starts if whole[s : s + len(inner)] == inner), None)
            if start is None:
                problem = Problem("model.tokenizer", "it can't be seen what the tokenizer puts around a text")
                raise ModelError(problem)
            around.append(whole[place:start])
            types += [kinds[place:start], kinds[start : start + len(inner)]]
            place = start + len(inner)
        return [*around, whole[place:]], [*types, kinds[place:]]

    def begin(self) -> list[int]:
        """Return the token with which the tokenizer begins a text, if it does."""
        lead = self.tokenizer("")["input_ids"]
        return [int(id_) for id_ in lead if id_ == self.tokenizer.bos_token_id]

    def _encode_texts(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        prepared = [("\n" + text) if self._anchored[after] else text for text, after in texts]
        encoded = self._raw(prepared)
        result = []
        for (text, after), ids in zip(texts, encoded, strict=True):
            found = ids
            if self._anchored[after]:
                known = ids[: len(self._newline)] == self._newline
                found = ids[len(self._newline) :] if known else self._raw([text])[0]
            result.append(found if self._is_safe(text, found) else self._encode_spelled_out(text, after))
        return result

    def _is_safe(self, text: str, ids: Sequence[int]) -> bool:
        """Tell whether a text was encoded without control tokens; what no token spells may be the unknown token."""
        found = self._control_ids.intersection(ids)
        unknown_id, unknown = self._unknown
        return not found or len(text) == 1 or (found == {unknown_id} and unknown not in text)

    def _encode_spelled_out(self, text: str, after: bool) -> list[int]:
        """Encode text that spells a control token: cut behind its first character, so that it can't be matched."""
        parts: list[str] = [""]
        for part in split_keep(self._control_text, text):
            if part in self._control:
                parts[-1] += part[0]
                parts.append(part[1:])
            else:
                parts[-1] += part
        if len(parts) == 1:  # A normalizer made it: then only single characters are safe.
            parts = list(text)
        ids: list[int] = []
        for part in filter(None, parts):
            ids += self._encode_texts([(part, after if not ids else False)])[0]
        return ids

    def _raw(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _find_anchored(self) -> dict[bool, bool]:
        """Tell after what a text must be encoded behind a newline (which is then taken off again).

        SentencePiece tokenizers put a space before the first word of what they are given. In the middle of a text
        there must be none; behind a control token it depends on the tokenizer.
        """
        alone, behind = self._raw(["x", "\nx"])
        middle = behind[: len(self._newline)] != self._newline or behind[len(self._newline) :] != alone
        after_control = False
        if middle and self._control:
            mark, (id_, _) = next(iter(self._control.items()))
            real = self._raw([mark + "x"])[0]
            after_control = real != [id_, *alone]
        return {False: middle, True: after_control}


def split_keep(pattern: re.Pattern[str], text: str) -> list[str]:
    """Split `text` at the matches of `pattern` and keep them; without empty parts."""
    parts, position = [], 0
    for match in pattern.finditer(text):
        parts += [text[position : match.start()], match[0]]
        position = match.end()
    return [part for part in [*parts, text[position:]] if part]


def _is_control(token: Any, template: str) -> bool:
    """Tell whether an added token marks structure: flagged special, or written by the template, or spelled like one."""
    text = token.content
    if token.special:
        return True
    return bool(CONTROL_LIKE.fullmatch(text)) and (text in template or text.startswith("<|"))


def _backend(tokenizer: Any) -> Any:
    """Return a copy of the tokenizer's fast backend that neither cuts nor pads."""
    from tokenizers import Tokenizer

    if not getattr(tokenizer, "is_fast", False):
        cure = "use a model with a tokenizer.json"
        raise ModelError(Problem("model.tokenizer", f"{type(tokenizer).__name__} has no fast form", "", cure))
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend
