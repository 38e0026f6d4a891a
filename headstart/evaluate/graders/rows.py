"""The rows of an evaluation and their grades: each answer graded once, and two sides made comparable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from headstart.config import DataSettings
from headstart.data.private import redact
from headstart.data.read import Row, find_files, read
from headstart.data.records import Conversation, Document, Labelled, Record
from headstart.errors import DataError, Problem, UsageError
from headstart.evaluate.graders.fill import Case
from headstart.evaluate.graders.forms import Grader, RewardModel, read_graders
from headstart.evaluate.graders.grade import Grade, check_graders, grade
from headstart.evaluate.measure import LABELS, Measured, RowResult, split_last
from headstart.evaluate.metrics import as_text

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Grading:
    """Graders, and the columns of the rows that they grade by where these stand; without graders it does nothing."""

    graders: Sequence[Grader] = ()
    items: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def grade(self, measured: Measured, tell: Callable[[str], None], on_progress: OnProgress | None = None) -> Measured:
        """Return what was measured with the grades of the rows that were answered."""
        answered = [row for row in measured.rows if row.answer is not None and not row.part]
        if not self.graders or not answered:
            return measured
        cases = [self._case(row) for row in answered]
        grades: dict[str, list[Grade]] = {}
        for number, grader in enumerate(self.graders, 1):
            grades[grader.name] = grade(grader, cases, tell)
            if on_progress:
                on_progress("grading", number, len(self.graders))
        graded = {id(row): _with_grades(row, grades, number) for number, row in enumerate(answered)}
        return replace(measured, rows=[graded.get(id(row), row) for row in measured.rows])

    def to_json(self) -> list[dict[str, Any]]:
        """The graders as plain values, by which a run that goes on knows them."""
        return [grader.model_dump(mode="json", by_alias=True, serialize_as_any=True) for grader in self.graders]

    def _case(self, row: RowResult) -> Case:
        return Case(row.where, self.items.get(row.where, {}), row.asked, row.reference, row.answer or "")


def _with_grades(row: RowResult, grades: Mapping[str, Sequence[Grade]], number: int) -> RowResult:
    scores = {name: given[number].score for name, given in grades.items()}
    whys = {name: given[number].why for name, given in grades.items() if given[number].score is None}
    return replace(row, grades=scores, ungraded=whys)


def build_grading(
    files: Sequence[str], names: Sequence[str], settings: DataSettings, records: Sequence[Record]
) -> Grading:
    """Read graders and the columns of `records`, which stand in the data `names`, and see that the two fit.

    Raises UsageError for graders that can't be used, and DataError for rows that lack what one names.
    """
    if not files:
        return Grading()
    graders = read_graders(files)
    if taken := [grader.name for grader in graders if grader.name in LABELS]:
        what = f"{', '.join(taken)} is measured anyway"
        raise UsageError(Problem("grader.form", what, "name", "give the grader another name"))
    if any(isinstance(record, Document) for record in records):
        what = "rows of text to continue have no answer to grade"
        raise UsageError(Problem("grader.form", what, ", ".join(files), "leave the graders out"))
    items = read_items(names, settings, [str(record.where) for record in records])
    blank = [Case(where, item, answer="") for where, item in items.items()]
    check_graders(graders, blank)
    return Grading(graders, items)


def read_items(names: Sequence[str], settings: DataSettings, wheres: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Return the columns of rows by where they stand, redacted where what is learned is.

    Raises DataError where two rows that are graded stand at one place, so that it isn't known which is which.
    """
    wanted, found, twice = set(wheres), {}, []
    for row in read(find_files(names, settings.encoding)):
        if not isinstance(row, Row) or (where := str(row.where)) not in wanted:
            continue
        if where in found:
            twice.append(Problem("grader.field", "two rows stand in this line", where, "give each row its own line"))
        found[where] = redact(row.fields, {}) if settings.redact else row.fields
    if twice:
        raise DataError(twice)
    return found


def find_unfit(
    grading: Grading, records: Sequence[Record], least: float | None, tell: Callable[[str], None]
) -> set[str]:
    """Return where the rows stand whose own answer a grader scores below `least`, or below what it takes as passed.

    So are rows that can't be graded, which is told. Raises UsageError where it isn't known from where on a score is good.
    """
    for grader in grading.graders if least is None else ():
        if isinstance(grader, RewardModel) and not grader.has_bound:
            what = f"{grader.name} gives rewards, which have no zero: from where on is one good?"
            raise UsageError(Problem("usage.flag", what, "--min", "--min X, or a pass_threshold in the grader"))
    rows = [RowResult(str(r.where), 0.0, 1.0, *own, answer=own[1]) for r in records for own in [own_answer(r)]]
    graded = grading.grade(Measured(rows, "chat"), tell)
    for line in ungraded_lines(ungraded({"": graded})):
        tell(line)
    bounds = {g.name: g.least if least is None else least for g in grading.graders}
    return {
        row.where
        for row in graded.rows
        if any(score is None or score < bounds[name] for name, score in row.grades.items())
    }


def own_answer(record: Record) -> tuple[str, str]:
    """Return what a row asks and the answer in it. Raises UsageError where it has none that is a text."""
    if isinstance(record, Conversation):
        asked, _, answer = split_last(record)
        return asked[-1].content if asked else "", answer
    if isinstance(record, Labelled):
        return "\n".join(record.texts), as_text(
            list(record.label) if isinstance(record.label, tuple) else [record.label]
        )
    raise UsageError(
        Problem("grader.form", "the row has no answer to grade", str(record.where), "leave the graders out")
    )


def pair_grades(sides: Sequence[Measured]) -> list[Measured]:
    """Return sides on the same rows in which a row has a grade only where it has one on every side."""
    whole = []
    for rows in zip(*(side.rows for side in sides), strict=True):
        names = [name for name in rows[0].grades if all(row.grades.get(name) is not None for row in rows)]
        whole.append(names)
    return [
        replace(side, rows=[_only(row, names) for row, names in zip(side.rows, whole, strict=True)]) for side in sides
    ]


def _only(row: RowResult, names: Sequence[str]) -> RowResult:
    return replace(row, grades={name: row.grades[name] for name in names}) if row.grades else row


def ungraded(sides: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Return for each grader that could not grade every row: how many on each side, and the first with its why."""
    told: dict[str, dict[str, Any]] = {}
    for side, measured in sides.items():
        for row in measured.rows:
            for name, why in row.ungraded.items():
                entry = told.setdefault(name, {**dict.fromkeys(sides, 0), "first": f"{row.where}: {why}"})
                entry[side] += 1
    return told


def ungraded_lines(told: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what `ungraded` found, a line a grader."""
    lines = []
    for name, entry in told.items():
        counts = ", ".join(f"{count:,} {side}".strip() for side, count in entry.items() if side != "first" and count)
        lines.append(f"{name} could not grade every answer ({counts}), and these don't count; first {entry['first']}")
    return lines
