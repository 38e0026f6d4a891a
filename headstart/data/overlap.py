"""Texts that stand in others, word for word: what was learned by heart can't show what is known.

A text counts as learned where `SHARE` of its runs of `WORDS` words stand in what is trained on, as PaLM's authors judged it
(Chowdhery et al., 2022, section 8); one of fewer words where all of it does. Case and punctuation don't count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headstart.data.near import WORD

WORDS = 8
SHARE = 0.7

Run = tuple[str, ...]


def find_learned(texts: Sequence[str], trained: Iterable[str]) -> set[int]:
    """Return the numbers of those of `texts` that stand in what is trained on."""
    wanted = [_runs(_words_of(text)) for text in texts]
    sought = {run for runs in wanted for run in runs}
    lengths: dict[str, set[int]] = {}
    for run in sought:
        lengths.setdefault(run[0], set()).add(len(run))
    met: set[Run] = set()
    for text in trained:
        words = _words_of(text)
        for place, word in enumerate(words):
            for length in lengths.get(word, ()):
                run = tuple(words[place : place + length])
                if run in sought:
                    met.add(run)
    return {number for number, runs in enumerate(wanted) if runs and len(runs & met) >= SHARE * len(runs)}


def _runs(words: Sequence[str]) -> set[Run]:
    """Return the runs of words of a text; of a short one, itself."""
    length = min(WORDS, len(words))
    return {tuple(words[place : place + length]) for place in range(len(words) - length + 1)} if length else set()


def _words_of(text: str) -> list[str]:
    return WORD.findall(text.casefold())
