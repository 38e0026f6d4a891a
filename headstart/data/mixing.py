"""Other data sets mixed into the rows to train on, each with a weight: general text beside instructions, say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import NamedTuple

from headstart.config import DataSettings
from headstart.data.encode import Encoder
from headstart.data.feed import choose_held_out, content_hash, split_rows
from headstart.data.prepare import Coding, Formed, form_rows, segment
from headstart.data.segments import Segmented
from headstart.errors import DataError, Problem, UsageError

MIXABLE = ("chat", "causal")


class Part(NamedTuple):
    """What is mixed in: files, and how many of their rows stand beside each hundred of the run's own, by a hundred."""

    name: str
    weight: float


@dataclass
class Mixed:
    """A data set that is mixed in: its rows to train on (some twice, where it has too few), and those it is scored on."""

    name: str
    task: str
    formed: Formed
    train: Segmented
    proof: Segmented
    notes: list[str] = field(default_factory=list)


def read_mix(entries: Sequence[str]) -> list[Part]:
    """Read `PATH=WEIGHT`, several times. Raises UsageError where one can't be read."""
    parts = []
    for entry in entries:
        name, _, weight = entry.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not name or not 0 < number < 1000:
            cure = "data.mix=PATH=0.2: 20 rows of it beside each 100 of the data's own"
            raise UsageError(Problem("config.bad_value", f"no path with a weight: {entry!r}", "data.mix", cure))
        parts.append(Part(name, number))
    return parts


def mix(
    settings: DataSettings,
    own: int,
    held: Collection[str],
    task: str,
    renderers: Callable[[str], Encoder],
    lengths: Callable[[str], int],
) -> list[Mixed]:
    """Read what is mixed in beside `own` rows to train on, none of which may be held out (`held` are hashes); empty without `data.mix`.

    `renderers` gives what turns rows of a task into tokens, `lengths` the most of them. Raises DataError where rows are of a task that can't stand
    beside `task`: both must be text to continue or to answer.
    """
    found: list[Mixed] = []
    seen = set(held)
    plain = settings.model_copy(
        update={"format": "auto", "label": (), "group_by": None}
        | dict.fromkeys(("prompt", "completion", "rejected", "text"))
    )
    for part in read_mix(settings.mix):
        formed = form_rows([part.name], plain)
        other = formed.detection.task
        if task not in MIXABLE or other not in MIXABLE:
            what = f"{other} rows can't be mixed into {task} rows: text to continue and answers can"
            raise DataError(Problem("format.kind", what, part.name, f"give rows of {' or '.join(MIXABLE)}"))
        if formed.formatted.problems:
            raise DataError(formed.formatted.problems)
        pool, proof = split_rows(formed.formatted.examples, choose_held_out(len(formed.formatted.examples)))
        pool = [record for record in pool if content_hash(record) not in seen]
        if not pool:
            raise DataError(Problem("data.empty", "every row is one to score on", part.name, "give other rows"))
        wanted = max(1, round(part.weight * own))
        ordered = sorted(pool, key=content_hash)
        chosen = [ordered[number % len(ordered)] for number in range(wanted)]
        renderer = renderers(other)
        over_length = settings.over_length if other == task else "auto"
        how = plain.model_copy(update={"over_length": over_length})
        made = [
            segment(rows, how, renderer, lengths(other), Coding(other), whole=whole)
            for rows, whole in ((chosen, False), (proof, True))
        ]
        if problems := [problem for side in made for problem in side.problems]:
            raise DataError(problems)
        note = f"{wanted:,} rows mixed in" + f", of {len(ordered):,} rows, some again" * (wanted > len(ordered))
        formed.notes.append(f"{note}; {len(made[1].examples):,} others to score on")
        name = PurePath(part.name).name
        name = part.name if any(name == mixed.name for mixed in found) else name
        found.append(Mixed(name, other, formed, made[0], made[1]))
    return found
