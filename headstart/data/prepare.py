"""Files -> the three parts of a run: rows to train on, rows to watch, and rows for the proof."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from headstart.config import TASKS, DataSettings
from headstart.data.documents import Fit, measure_fit, segment_documents
from headstart.data.encode import Encoder
from headstart.data.feed import Keys, choose_held_out, hashes_of, split_sides, split_watch
from headstart.data.formats import Detection, Formatted, format_rows, named_columns
from headstart.data.images import Look, segment_pictures
from headstart.data.labels import (
    REWARD,
    Labels,
    find_choices,
    find_labels,
    label_notes,
    segment_labelled,
    segment_tagged,
)
from headstart.data.masking import Masking, find_masking, segment_masked
from headstart.data.near import Distinct, find_near_leaks, once_each, shingle
from headstart.data.preferences import parted, preference_notes, segment_preferences
from headstart.data.private import redacted_notes
from headstart.data.read import Note, Row, SourceFile, Where, find_files, read
from headstart.data.records import Conversation, Document, Labelled, Picture, Preference, Record, Related, Tagged
from headstart.data.related import as_related, scale_scores, segment_related
from headstart.data.render import Renderer
from headstart.data.replay import UNKNOWN, Known
from headstart.data.segments import Segmented, segment_rows
from headstart.errors import DataError, Problem, UsageError

LABELLED = ("classification", "multilabel", "regression", "tagging", "images")
# Which tasks the rows of a format can be used for.
FITTING = {
    "text": ("causal", "masked", "embedding"),
    "labels": ("classification", "multilabel", "regression", "embedding"),
    "tags": ("tagging",),
    "related": ("embedding",),
    "images": ("images",),
    "preference": ("preference", "reward"),
    **dict.fromkeys(("messages", "sharegpt", "alpaca", "prompt_completion", "columns"), ("chat",)),
}
FEW_ROWS = 10
NEAR_FRAC = (
    0.2  # as many rows may be left out since they nearly say what is held out; where more do, rows are like that
)
DROPPED_FRAC = 0.05  # as many rows may be left out as too long where the user said nothing of them
R = TypeVar("R")


@dataclass
class Formed:
    """The rows of some files as records, before any tokenizer. Where they aren't kept in memory, `reread` gives them."""

    files: list[SourceFile]
    rows: int
    formatted: Formatted
    notes: list[str] = field(default_factory=list)
    reread: Callable[[], Iterable[Record]] | None = None

    @property
    def detection(self) -> Detection:
        """Which format the rows have."""
        return self.formatted.detection

    @property
    def records(self) -> Iterable[Record]:
        """All rows that could be read, whatever they are for."""
        return self.formatted.examples if self.reread is None else self.reread()


class NearLeak(NamedTuple):
    """A row that isn't trained on, the held-out row that says nearly the same, and the part in which they agree."""

    where: Where
    like: Where
    share: float


@dataclass
class Parts:
    """Records by what they are for. `proof` rows are used for nothing before the verdict."""

    train: Sequence[Record]
    watch: Sequence[Record]
    proof: Sequence[Record]
    held_out: float | None
    duplicates: int = 0
    leaked: int = 0
    near: Sequence[NearLeak] = ()
    alike: int = 0  # rows that nearly say what is held out, and stay, since so many do
    held_before: int = 0  # rows that were held out of what the model learned before: they aren't trained on
    trained_before: int = 0  # rows that it learned before: they aren't held out


@dataclass
class Prepared:
    """The parts as examples, ready for the engine, and everything that was found on the way."""

    formed: list[Formed]
    parts: Parts
    train: Segmented
    watch: Segmented
    proof: Segmented
    problems: list[Problem]
    fit: Fit | None = None
    labels: Labels | None = None
    masking: Masking | None = None
    choices: tuple[str, ...] = ()
    mixed: list[Any] = field(default_factory=list)  # of `mixing.Mixed`, which stands on this
    coding: Coding | None = None
    replayed: Sequence[Sequence[Record]] = ()  # of each run that the model comes from, the rows that are learned again

    @property
    def longest(self) -> int:
        """The tokens of the longest segment of any part."""
        return max(part.longest for part in (self.train, self.watch, self.proof))


@dataclass
class Sides:
    """What a run was given: rows to train on and, if they were named, rows to score on."""

    train: Formed
    evaluation: Formed | None

    @property
    def formed(self) -> list[Formed]:
        """Both, or the one."""
        return [self.train] if self.evaluation is None else [self.train, self.evaluation]

    @property
    def kind(self) -> str:
        """The kind of fine-tuning that the rows are for."""
        return self.train.detection.kind

    @property
    def task(self) -> str:
        """What the rows are to be used for; of documents, `causal` where the user didn't say."""
        return self.train.detection.task


def form_sides(settings: DataSettings, kind: str = "auto", task: str = "auto") -> Sides:
    """Read all files of a run. Raises DataError where the two sides are of different kinds, or not of the one asked."""
    train = form_rows(settings.train, settings, kind, task)
    found = train.detection
    return Sides(train, form_rows(settings.eval, settings, found.kind, found.task) if settings.eval else None)


def form_rows(names: Sequence[str], settings: DataSettings, kind: str = "auto", task: str = "auto") -> Formed:
    """Read files and turn rows into records, for a kind and a task if they are known.

    Raises DataError where nothing can be read at all; a bad row among others is a problem of the result.
    """
    files = find_files(names, settings.encoding)
    rows: list[Row] = []
    problems: list[Problem] = []
    notes: list[str] = []
    for item in read(files):
        if isinstance(item, Row):
            rows.append(item)
        elif isinstance(item, Note):
            notes.append(f"{item.where}: {item.text}")
        else:
            problems.append(item)
    if not rows:
        raise DataError(problems or [Problem("data.empty", "no rows", ", ".join(names), "give a file with rows")])
    try:
        formatted = format_rows(
            rows,
            format=settings.format,
            named=named_columns(settings),
            kind=kind,
            task=task,
            train_on=settings.train_on,
            reasoning=settings.reasoning,
            group_by=settings.group_by,
            redact=settings.redact,
            merge="merge_turns" in settings.fix,
            fold="fold_system" in settings.fix,
        )
    except DataError as error:
        raise DataError([*problems, *error.problems]) from None
    formatted.problems[:0] = problems
    found = formatted.detection
    if kind not in ("auto", found.kind) or (task != "auto" and task not in FITTING[found.format]):
        raise DataError(_other_kind(found, kind if kind not in ("auto", found.kind) else task, rows[0]))
    return Formed(
        files, len(rows) + len(problems), formatted, [*notes, *formatted.notes, *redacted_notes(formatted.redacted)]
    )


def _other_kind(found: Detection, asked: str, first: Row) -> Problem:
    what = f"the rows are {found.format}, which is for {found.kind} fine-tuning ({found.task}), not {asked}"
    columns = ", ".join(first.fields)
    kind = TASKS.get(asked, asked)
    named = {
        "unsupervised": '-s data.text="{column}"',
        "supervised": '-s data.text="{column}" -s data.label=COLUMN',
        "instruction": '-s data.prompt="{a}" -s data.completion="{b}"',
        "preference": '-s data.prompt="{a}" -s data.completion="{b}" -s data.rejected="{c}"',
    }[kind]
    return Problem("format.kind", what, str(first.where), f"name what is read: {named}; the columns are {columns}")


def reject_bad_rows(problems: Sequence[Problem], allowed: int) -> None:
    """Raise DataError where more rows are bad than `allowed`, or a file could not be read to its end."""
    if len(problems) > allowed or not all(problem.is_row for problem in problems):
        raise DataError(problems)


def reject_dropped(parts: Sequence[Segmented], max_length: int) -> None:
    """Raise DataError where more rows than a few are dropped since they are too long."""
    dropped = [place for part in parts for place in part.dropped]
    rows = len(dropped) + sum(len(part.examples) for part in parts)
    if len(dropped) > DROPPED_FRAC * rows:
        where, length = max(dropped, key=lambda place: place[1])
        share = f"{len(dropped):,} of {rows:,} rows ({len(dropped) / rows:.0%}) are over {max_length:,} tokens"
        cure = "raise data.max_length; or say what becomes of them: -s data.over_length=drop or cut"
        raise DataError(Problem("row.too_long", f"{share}, the longest has {length:,}", str(where), cure))


def reject_spelled(parts: Sequence[Segmented], spells: Callable[[str], bool]) -> None:
    """Raise DataError with every row of which a text `spells` a control token."""
    if problems := [spelled_problem(where) for part in parts for where in part.where_spelled(spells)]:
        raise DataError(problems)


def spelled_problem(where: str) -> Problem:
    """Return what is wrong with a row that spells a control token, where that is refused."""
    cure = "delete it, or read it as text: -s data.control_tokens=text"
    return Problem("row.control", "it spells a control token of the model", where, cure)


@dataclass(frozen=True)
class Split:
    """Which rows are for what, by their numbers: `watch` and `proof` among the rows to score on, where these were named."""

    train: NDArray[np.int64]
    watch: NDArray[np.int64]
    proof: NDArray[np.int64]
    held_out: float | None
    duplicates: int
    leaked: int
    near: Sequence[NearLeak] = ()
    alike: int = 0  # rows that nearly say what is held out, and stay, since so many do
    held_before: int = 0
    trained_before: int = 0


def split(train: Keys, evaluation: Keys | None, settings: DataSettings, known: Known, *, watch: bool) -> Split:
    """Decide which rows are trained on, watched and kept for the proof.

    Rows to score on that also stand in the training data (in another group, say) are taken out of the training data; so are
    those that were held out of what the model learned before (`known`), and what it learned then is not held out.
    Raises DataError where a side would be empty.
    """
    held_out: float | None = None
    others = train if evaluation is None else evaluation
    held_before, trained_before = (
        [np.isin(side.digests, digests) for side in (train, others)]
        for digests in (known.held_digests, known.trained_digests)
    )
    new = np.flatnonzero(~(held_before[1] | trained_before[1]))
    if not len(new):
        what = f"all {len(others):,} rows were learned or held out before"
        raise DataError(Problem("split.too_small", what, "", "give rows that are new"))
    own = np.zeros(len(train), np.bool_)
    if evaluation is None:
        held_out = settings.held_out if settings.held_out is not None else choose_held_out(len(new))
        own[new] = split_sides(train.sides[new], held_out)
        held, digests = np.flatnonzero(own), train.digests
    else:
        held, digests = new, evaluation.digests
    leaked = np.isin(train.digests, digests[held]) & ~own
    aside = own | leaked | held_before[0]
    if aside.all() or not len(held):
        what = f"{len(train) - int(aside.sum())} rows to train on and {len(held)} to score on"
        raise DataError(Problem("split.too_small", what, "", "give rows for both, and none in both"))
    watched = _watched(digests[held], watch=watch)
    return Split(
        train=np.flatnonzero(~aside),
        watch=held[watched],
        proof=held[~watched],
        held_out=held_out,
        duplicates=len(train) - len(once_each(train.digests)),
        leaked=int(leaked.sum()),
        held_before=int(held_before[0].sum()),
        trained_before=int(trained_before[1].sum()),
    )


def without_near_leaks(
    found: Split, rows: Sequence[Record], evaluation: Sequence[Record] | None, within: float = 1.0
) -> Split:
    """Take rows out of the training data that say nearly what a held-out row says. Raises DataError where none is left.

    Where they are more than a part `within` of it, that is how these rows are, and all of them stay.
    """
    records = rows if evaluation is None else [*rows, *evaluation]
    before = len(records) - len(rows if evaluation is None else evaluation)
    held = np.zeros(len(records), np.bool_)
    held[[*(before + found.watch), *(before + found.proof)]] = True
    digests = np.array([int(digest, 16) for digest in hashes_of(records)], np.uint64)
    distinct = Distinct.of(digests)
    shingles = shingle("\n".join(record.texts) for record in records).finish(distinct.rows)
    like = find_near_leaks(shingles, distinct, held)
    near = like.other[found.train] >= 0
    if near.mean() > within:
        return replace(found, alike=int(near.sum()))
    if near.all():
        what = f"all {len(near):,} rows to train on say nearly what a held-out row says"
        cure = "group rows that belong together (data.group_by), or take them: -s data.leaks=exact"
        raise DataError(Problem("split.too_small", what, "", cure))
    leaks = [
        NearLeak(records[row].where, records[like.other[row]].where, round(float(like.share[row]), 3))
        for row in found.train[near].tolist()
    ]
    return replace(found, train=found.train[~near], near=leaks)


def _watched(digests: NDArray[np.uint64], *, watch: bool) -> NDArray[np.bool_]:
    """Tell which held-out rows are watched: those of the least hashes."""
    count = split_watch(len(digests)) if watch else 0
    watched = np.zeros(len(digests), np.bool_)
    watched[np.argsort(digests, kind="stable")[:count]] = True
    return watched


def split_parts(
    train: Formed, evaluation: Formed | None, settings: DataSettings, known: Known = UNKNOWN, *, watch: bool
) -> Parts:
    """Split records as `split` says."""
    rows = train.formatted.examples
    others = rows if evaluation is None else evaluation.formatted.examples
    found = split(Keys.of(rows), None if evaluation is None else Keys.of(others), settings, known, watch=watch)
    if settings.leaks != "exact":
        within = 1.0 if settings.leaks == "near" else NEAR_FRAC
        found = without_near_leaks(found, rows, None if evaluation is None else others, within)
        if before := known.held:
            # What was held out before is as good as named to be scored on.
            named = replace(found, watch=np.arange(0), proof=np.arange(len(before)), near=(), alike=0)
            again = without_near_leaks(named, rows, before, within)
            found = replace(found, train=again.train, near=[*found.near, *again.near], alike=found.alike + again.alike)
    return Parts(
        [rows[row] for row in found.train],
        [others[row] for row in found.watch],
        [others[row] for row in found.proof],
        found.held_out,
        found.duplicates,
        found.leaked,
        found.near,
        found.alike,
        found.held_before,
        found.trained_before,
    )


def first_rows(train: NDArray[np.int64], digests: NDArray[np.uint64], rows: int | None) -> NDArray[np.int64]:
    """Return `rows` of the rows to train on, by number: those of the least hashes, so that fewer are always part of more.

    Raises UsageError where there are fewer.
    """
    if rows is None:
        return train
    if rows > len(train):
        what = f"`data.rows` is {rows:,}, and there are {len(train):,} rows to train on"
        raise UsageError(Problem("config.bad_value", what, "data.rows", f"-s data.rows={len(train)}, or leave it out"))
    return train[np.sort(np.argsort(digests[train], kind="stable")[:rows])]


def first_records(records: Sequence[Record], rows: int | None) -> Sequence[Record]:
    """Return the records that `first_rows` takes. Raises UsageError where there are fewer."""
    if rows is None:
        return records
    digests = Keys.of(records).digests
    return [records[row] for row in first_rows(np.arange(len(records)), digests, rows).tolist()]


def split_held(held: Sequence[Record], *, watch: bool) -> tuple[list[Record], list[Record]]:
    """Split held-out rows into those that are watched and those for the proof."""
    watched = _watched(Keys.of(held).digests, watch=watch)
    return (
        [record for record, seen in zip(held, watched, strict=True) if seen],
        [record for record, seen in zip(held, watched, strict=True) if not seen],
    )


def prepare(
    sides: Sides,
    settings: DataSettings,
    renderer: Encoder | Look,
    max_length: int,
    *,
    task: str,
    seed: int = 0,
    watch: bool = True,
    unpaired: bool = False,
    known: Known = UNKNOWN,
) -> Prepared:
    """Split, render and encode all data of a run for a task; of preferences, with `unpaired` answers stand for themselves.

    `known` is what the model learned before. Raises DataError where there is nothing to train or to score on; problems of single rows are in the result.
    """
    train, evaluation = sides.train, sides.evaluation
    problems = [problem for part in sides.formed for problem in part.formatted.problems]
    if not train.formatted.examples or (evaluation and not evaluation.formatted.examples):
        raise DataError(problems)
    compared = task in ("preference", "reward")
    if compared and settings.group_by is None:
        _part(train, evaluation)
    try:
        parts = split_parts(train, evaluation, settings, known, watch=watch)
    except DataError as error:  # most likely for want of the rows that can't be used
        raise DataError([*problems, *error.problems]) from None
    every = parts.train  # what the classes are, and which answers stand again and again, doesn't follow from data.rows
    parts.train = first_records(every, settings.rows)
    if len(parts.train) < FEW_ROWS:
        few = f"{len(parts.train)} rows to train on are few: most likely they are learned by heart"
        train.notes.append(few)
    replayed = known.replayed(len(parts.train), (parts.watch, parts.proof), seed)
    learned = [*parts.train, *(record for rows in replayed for record in rows)]
    labels = None
    if task in LABELLED:
        told = [*every, *(record for rows in replayed for record in rows)]
        labels = find_labels(told, task, settings.label, known.labels)
        train.notes += label_notes(parts.train, [*parts.watch, *parts.proof], labels)
    masking = None
    if task == "masked" and isinstance(renderer, Encoder):
        masking = find_masking(renderer, seed, whole_words=settings.whole_words)
    if task == "reward":
        labels = REWARD
    if compared:
        train.notes += preference_notes(_of(Preference, parts.train), unpaired=unpaired)
    coding = Coding(task, labels, masking, learned, unpaired)
    to_train, to_watch, to_prove = (
        segment(part, settings, renderer, max_length, coding, whole=whole)
        for part, whole in ((parts.train, False), (parts.watch, True), (parts.proof, True))
    )
    segmented = (to_train, to_watch, to_prove)
    problems += [problem for part in segmented for problem in part.problems]
    need_rows(segmented, problems, max_length)
    documents = [record for record in parts.train if isinstance(record, Document)]
    fit = measure_fit(documents, renderer) if documents and isinstance(renderer, Encoder) else None
    choices = find_choices([*every, *known.trained]) if task == "chat" else ()
    return Prepared(
        sides.formed,
        parts,
        *segmented,
        problems,
        fit,
        labels,
        masking,
        choices,
        coding=coding,
        replayed=replayed,
    )


def need_rows(parts: tuple[Segmented, Segmented, Segmented], problems: Sequence[Problem], max_length: int) -> None:
    """Raise DataError where no row is left to train on, or none to prove with."""
    to_train, _, to_prove = parts
    if not len(to_train.examples) or not len(to_prove.examples):
        dropped = sum(len(part.dropped) for part in parts)
        what = f"no rows are left: {dropped} are over {max_length:,} tokens, {len(problems)} can't be used"
        raise DataError(
            [Problem("data.empty", what, "", "raise data.max_length, or choose data.over_length=cut"), *problems]
        )


@dataclass(frozen=True)
class Coding:
    """How rows of a task become numbers: the labels that are told, how tokens are hidden, the rows to train on, and if
    each answer stands for itself.
    """

    task: str
    labels: Labels | None = None
    masking: Masking | None = None
    train: Sequence[Record] = ()
    unpaired: bool = False


def _part(*sides: Formed | None) -> None:
    for side in filter(None, sides):
        side.formatted.examples = list(parted(_of(Preference, side.formatted.examples)))


def segment(  # noqa: PLR0911 (a line for each task)
    records: Sequence[Record],
    settings: DataSettings,
    renderer: Encoder | Look,
    max_length: int,
    coding: Coding,
    *,
    whole: bool,
) -> Segmented:
    """Encode records of one task, which `renderer` is for. Of documents to score on, all pieces stay together (`whole`)."""
    if not records:
        return Segmented()
    task, labels = coding.task, coding.labels
    split = task in ("causal", "masked")
    over_length = settings.over_length
    if over_length == "auto":
        over_length = "split" if split else "drop"
    if over_length == "split" and not split:
        cure = "-s data.over_length=drop or cut"
        raise DataError(Problem("format.kind", "only documents can be split", "data.over_length", cure))
    limits: dict[str, Any] = {"max_length": max_length, "over_length": over_length}
    if isinstance(renderer, Look):
        return segment_pictures(_of(Picture, records), labels, renderer)
    if task == "tagging" and labels:
        return segment_tagged(_of(Tagged, records), renderer, labels, **limits)
    if task == "embedding":
        related = [as_related(r, halves=whole) if isinstance(r, Document) else r for r in records]
        known = [record for record in coding.train if isinstance(record, Related)]
        return segment_related(scale_scores(_of(Related, related), known), renderer, **limits)
    if task in LABELLED:
        return segment_labelled(_of(Labelled, records), renderer, labels, **limits)
    if task == "masked" and coding.masking:
        return segment_masked(_of(Document, records), renderer, coding.masking, whole=whole, **limits)
    if not isinstance(renderer, Renderer):
        raise TypeError("conversations and documents to continue are rendered by a Renderer")
    if task == "causal":
        return segment_documents(_of(Document, records), renderer, positions=settings.positions, whole=whole, **limits)
    if task in ("preference", "reward"):
        return segment_preferences(_of(Preference, records), renderer, unpaired=coding.unpaired, **limits)
    return segment_rows(_of(Conversation, records), renderer, **limits)


def _of(kind: type[R], records: Sequence[Record]) -> list[R]:
    """Return records, all of one kind. Raises TypeError where one isn't."""
    for record in records:
        if not isinstance(record, kind):
            raise TypeError(f"{record.where} is a {type(record).__name__} and not a {kind.__name__}")
    return list(records)  # type: ignore[arg-type]
