"""The guard: general text and general questions, scored before and after, to see whether a model kept what it knew."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import PurePath
from typing import Any

import numpy as np

from headstart.config import DataSettings
from headstart.data.mixing import MIXABLE
from headstart.data.overlap import find_learned
from headstart.data.prepare import Coding, Formed, form_rows, segment
from headstart.data.records import Record
from headstart.data.render import Renderer
from headstart.data.segments import Example, Segmented
from headstart.errors import DataError, Problem, UsageError
from headstart.evaluate.compare import MIN_ROWS, Interval, Metric, Ratio, compare

GENERAL = {"general text": "texts.jsonl", "general questions": "questions.jsonl"}
BOUND = 0.1  # the part by which the loss may grow: about that of a model of a third of the size (Kaplan et al., 2020)
KEPT, LOST, UNCLEAR, FEW = "kept", "lost", "unclear", "too few rows"


@dataclass(frozen=True)
class Guarded:
    """A part of the guard: rows of one task, with what turns them into tokens. `formed` where they are a user's own."""

    name: str
    task: str
    renderer: Renderer
    rows: Segmented
    formed: Formed | None = None


def load_guard(
    names: Sequence[str], renderers: Callable[[str], Renderer], lengths: Callable[[str], int]
) -> list[Guarded]:
    """Read what is guarded: `auto` is what ships with headstart, `off` nothing, else files of texts or of answers.

    `renderers` gives what turns rows of a task into tokens, `lengths` the most of them. Raises DataError where rows of a
    user's can't be used.
    """
    if tuple(names) == ("off",):
        return []
    if tuple(names) == ("auto",):
        forms = zip(GENERAL, general_forms(), strict=True)
        return [_load_general(name, formed, renderers("causal"), lengths("causal")) for name, formed in forms]
    if twice := {name for name in names if names.count(name) > 1}:
        cure = "name each file once"
        raise UsageError(Problem("config.bad_value", f"{min(twice)} is named twice", "eval.guard", cure))
    last = [PurePath(name).name for name in names]
    # Parts are told apart by their names, so files of one name by where they lie.
    known = [name if last.count(end) > 1 else end for name, end in zip(names, last, strict=True)]
    return [_load_own(name, shown, renderers, lengths) for name, shown in zip(names, known, strict=True)]


def without_learned(guard: Sequence[Guarded], trained: Sequence[Record]) -> tuple[list[Guarded], list[str]]:
    """Leave out what stands in the rows to train on, since what is learned by heart shows no knowledge; say what that was."""
    found, notes = [], []
    for part in guard:
        rows = part.rows
        texts = [" ".join(record.texts) for record in rows.kept]
        learned = find_learned(texts, (" ".join(record.texts) for record in trained))
        stay = [number for number in range(len(texts)) if number not in learned]
        if learned:
            first = rows.kept[min(learned)].where
            what = f"{len(learned):,} of {len(texts):,} rows of the guard ({part.name}) stand in the rows to train on"
            notes.append(f"{what}: they aren't scored; first {first}")
            rows = Segmented([rows.examples[number] for number in stay], [rows.kept[number] for number in stay])
        if stay:
            found.append(replace(part, rows=rows))
    return found, notes


def general_forms() -> list[Formed]:
    """Read the general texts and questions that ship."""
    folder = resources.files("headstart.evaluate").joinpath("general")
    return [form_rows([str(folder.joinpath(file))], DataSettings()) for file in GENERAL.values()]


def _load_general(name: str, formed: Formed, renderer: Renderer, length: int) -> Guarded:
    """Read a part of what ships, as plain text and without an end.

    How a model answers in a chat, and where it stops, is what is trained; the word that answers a plain question shows
    what it knows.
    """
    task = formed.detection.task
    rows = segment(formed.formatted.examples, DataSettings(), renderer, length, Coding(task), whole=True)
    if task == "chat":
        rows.examples = [_without_end(example) for example in rows.examples]
    return Guarded(name, task, renderer, rows)


def _without_end(example: Example) -> Example:
    """Return a row whose last target, the token that ends an answer, is no target."""
    weights = example.segments[-1].weights.copy()
    weights[np.flatnonzero(weights)[-1]] = 0.0
    return replace(example, segments=(*example.segments[:-1], replace(example.segments[-1], weights=weights)))


def _load_own(name: str, shown: str, renderers: Callable[[str], Renderer], lengths: Callable[[str], int]) -> Guarded:
    formed = form_rows([name], DataSettings())
    task = formed.detection.task
    if task not in MIXABLE:
        what = f"the rows are {formed.detection.format}, for {task}: text to continue and answers can be guarded"
        raise DataError(Problem("format.kind", what, name, "give rows of `text`, or questions with answers"))
    renderer = renderers(task)
    rows = segment(formed.formatted.examples, DataSettings(), renderer, lengths(task), Coding(task), whole=True)
    if problems := [*formed.formatted.problems, *rows.problems]:
        raise DataError(problems)
    if rows.dropped:
        where, length = rows.dropped[0]
        what = f"{length:,} tokens, over {lengths(task):,}"
        raise DataError(Problem("row.too_long", what, str(where), "shorten the row, or leave it out"))
    formed.notes.append(f"{len(rows.examples):,} rows of the guard: scored before and after, never trained on")
    return Guarded(shown, task, renderer, rows, formed)


@dataclass(frozen=True)
class Kept:
    """What became of a part of the guard: its loss before and after, and by which part of it that grew (`loss`)."""

    name: str
    metric: str
    before: Interval
    after: Interval
    difference: Interval
    loss: Interval
    rows: int

    def verdict(self, bound: float) -> str:
        """Return `lost` where it is certain that more than `bound` of it went, `kept` where it is certain that it didn't."""
        if self.rows < MIN_ROWS:
            return FEW
        return LOST if self.loss.low > bound else KEPT if self.loss.high <= bound else UNCLEAR

    def to_json(self, bound: float) -> dict[str, Any]:
        """Plain values."""
        return {
            "metric": self.metric,
            **{name: getattr(self, name).to_json() for name in ("before", "after", "difference", "loss")},
            "rows": self.rows,
            "verdict": self.verdict(bound),
        }


def compare_guard(before: Mapping[str, tuple[str, Metric]], after: Mapping[str, tuple[str, Metric]]) -> list[Kept]:
    """Compare the guard's parts, each a name with its metric, by their loss: how much greater it is after than before."""
    found = []
    for name, (metric, first) in before.items():
        second = after[name][1] if name in after else None
        if not isinstance(first, Ratio) or not isinstance(second, Ratio):
            continue
        plain = compare(metric, first, second)
        grown = compare(metric, replace(first, transform=_log), replace(second, transform=_log)).difference
        loss = Interval(*(math.expm1(value) for value in (grown.value, grown.low, grown.high)))
        found.append(Kept(name, metric, plain.before, plain.after, plain.difference, loss, plain.rows))
    return found


def _log(ratio: Any) -> Any:
    return np.log(np.maximum(ratio, 1e-9))


def guard_result(kept: Sequence[Kept], bound: float) -> dict[str, Any]:
    """Return the guard as the result holds it: its verdict is that of its worst part."""
    verdicts = [item.verdict(bound) for item in kept]
    worst = next(name for name in (LOST, UNCLEAR, FEW, KEPT) if name in verdicts)
    return {"verdict": worst, "bound": bound, "parts": {item.name: item.to_json(bound) for item in kept}}
