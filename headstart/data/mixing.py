"""Other data mixed into the rows to train on, each with a weight: general text beside instructions, or what a run learned from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

from headstart.config import DataSettings
from headstart.data.encode import Encoder
from headstart.data.feed import choose_held_out, content_hash, split_rows
from headstart.data.images import Look
from headstart.data.prepare import Coding, Formed, Prepared, form_rows, segment
from headstart.data.replay import Known, Old
from headstart.data.segments import Segmented
from headstart.errors import DataError, Problem, UsageError

MIXABLE = ("chat", "causal")


class Part(NamedTuple):
    """What is mixed in, files or a run, and how many of its rows stand beside each hundred of the run's own, by a hundred."""

    name: str
    weight: float

    @property
    def is_run(self) -> bool:
        """Tell whether it is a run, whose rows to train on are mixed in, and whose held-out rows are scored."""
        return (Path(self.name) / "config.yaml").is_file()


@dataclass
class Mixed:
    """A data set that is mixed in: its rows to train on (some twice, where it has too few), and those it is scored on.

    Of a run that the model comes from, `old` is what is known of it, and `watch` are further rows to watch.
    """

    name: str
    task: str
    train: Segmented
    proof: Segmented
    watch: Segmented = field(default_factory=Segmented)
    formed: Sequence[Formed] = ()
    old: Old | None = None


def read_mix(entries: Sequence[str]) -> list[Part]:
    """Read `PATH=WEIGHT`, several times. Raises UsageError where one can't be read."""
    parts = []
    for entry in entries:
        name, _, weight = entry.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        least = 0 if Part(name, number).is_run and weight.strip() in ("0", "0.0") else 1e-9
        if not name or not least <= number < 1000:
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
    for part in (part for part in read_mix(settings.mix) if not part.is_run):
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
        found.append(Mixed(name, other, made[0], made[1], formed=[formed]))
    return found


def replay(
    prepared: Prepared, known: Known, settings: DataSettings, renderer: Encoder | Look, limit: int
) -> list[Mixed]:
    """Return what is learned again of the runs that the model comes from, and their held-out rows, which are scored.

    A row that is too long now, or that can't be encoded, was none that they used. Of what they watched, as many rows are
    watched again as there are new ones.
    """
    coding = prepared.coding
    if coding is None:
        return []
    found = []
    for old, rows in zip(known.olds, prepared.replayed, strict=True):
        watched = list(old.watch)[: len(prepared.watch.examples)]
        parts = ((rows, False), (old.proof, True), (watched, True))
        train, proof, watch = (segment(some, settings, renderer, limit, coding, whole=whole) for some, whole in parts)
        note = f"{len(train.examples):,} of the {len(old.train):,} rows that it learned are learned again"
        old.formed[0].notes.append(f"{old.name}: {note}; {len(proof.examples):,} others to score on")
        found.append(Mixed(old.name, coding.task, train, proof, watch, old.formed, old))
    return found
