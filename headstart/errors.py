"""Every error that a user can meet.

    HeadstartError
    ├── UsageError       exit 2     a flag, a setting or a config file
    ├── DataError        exit 3     a file or rows of it
    ├── ModelError       exit 1     a model, its tokenizer or its template
    ├── RunError         exit 1     a run folder or a checkpoint; DamagedError: a file of theirs
    ├── ResourceError    exit 4     memory or disk
    ├── DivergedError    exit 5     numbers that are no longer finite
    ├── StoppedError     exit 75    stopped after saving; `headstart resume` goes on
    └── InterruptedRun   exit 130   stopped at once

An error is made of problems. A problem has a code from `CODES`, says what is wrong, where, and how to mend it; why it
matters stands beside the code, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

CODES: dict[str, str] = {
    # usage
    "usage.flag": "A flag that can't be read as meant would change the run without saying so.",
    "config.unknown_key": "A setting that nothing reads would be ignored in silence.",
    "config.bad_value": "A setting outside its range would fail hours later, or not at all.",
    "config.unreadable": "Settings must be read exactly as written.",
    "config.no_effect": "A setting without effect is most often a mistake about another one.",
    # files
    "data.missing": "There is nothing to learn from.",
    "data.not_a_file": "Only regular files and folders of them are read.",
    "data.unknown_type": "The reader is chosen by the file's name and checked against its first bytes.",
    "data.wrong_type": "The file's own bytes say that it isn't what it is said to be.",
    "data.encoding": "Text is read as UTF-8 and never guessed, since a wrong guess corrupts it in silence.",
    "data.truncated": "A file that ends in the middle of a row has most likely lost more than that.",
    "data.unreadable": "What stands behind the fault can't be read any more, so rows would be lost uncounted.",
    "data.too_large": "Data of this size would exhaust the memory before anything could be checked.",
    "data.empty": "There is nothing to learn from.",
    "data.changed": "A run can only go on with the very rows that it began with.",
    "data.hub": "The data set can't be read from the hub.",
    # rows
    "row.not_json": "A row that can't be read would be lost.",
    "row.not_object": "A row is a JSON object: names with values.",
    "row.duplicate_key": "Of two values under one name, one would be lost in silence.",
    "row.csv": "A row with too few or too many columns has shifted values.",
    "row.field_missing": "The row lacks what this format needs.",
    "row.field_type": "The value isn't of the type that this format needs.",
    "row.role": "Who speaks decides which tokens are trained.",
    "row.empty_answer": "An empty answer teaches the model to say nothing.",
    "row.empty_text": "An empty document teaches nothing.",
    "row.label": "A class is a name or a whole number; a number to learn is finite; all rows have labels of one sort.",
    "row.tags": "Each word has one tag; else tags belong to other words.",
    "row.image": "An image that can't be read teaches nothing, and a huge one exhausts the memory.",
    "row.no_answer": "Without an answer there is nothing to train on.",
    "row.pair": "Of answers to one prompt the better is learned; without two that differ, what is learned is something else.",
    "row.weight": "A turn is trained (1) or not (0).",
    "row.media": "This model reads text only.",
    "row.tool_call": "A tool call that can't be parsed would teach the model broken calls.",
    "row.unencodable": "The text holds characters that no tokenizer can encode.",
    "row.template": "What the model is trained on must be what it is asked with later.",
    "row.control": "Most often such a token was left in by mistake, or put in to be obeyed.",
    "row.too_long": "A row that is cut loses its answer or its question.",
    "format.unknown": "The columns don't tell which part is asked and which is answered.",
    "format.mixed": "Rows of several formats in one file are most often a mistake in making it.",
    "format.column": "A column that is named must be there.",
    "format.kind": "Rows of one kind can't be learned from as if they were of another.",
    "labels.one": "With one class there is nothing to tell apart.",
    "split.too_small": "Without rows that it never saw, nothing can be said about the model.",
    # models
    "model.not_found": "There is nothing to tune.",
    "model.pickle": "A pickle can run any code when it is opened; only safetensors are read.",
    "model.remote_code": "Code that comes with a model is never run.",
    "model.checksum": "What was fetched isn't what was pinned, by damage or by intent.",
    "model.download": "The model can't be fetched.",
    "model.offline": "HEADSTART_OFFLINE=1 forbids the network.",
    "model.kind": "What is learned needs a model that can do it.",
    "model.mask": "Tokens are hidden behind the model's own mask.",
    "model.tokenizer": "Rows are turned into tokens by the model's own tokenizer.",
    "model.template": "A chat template says how turns are told apart; a guessed one gives a model that answers badly.",
    "model.vocabulary": "A token id outside of the embedding can't be looked up.",
    "model.lora_targets": "An adapter that touches nothing would train nothing.",
    # graders
    "grader.unreadable": "A grader that can't be read would grade nothing.",
    "grader.form": "A grader that isn't read as meant gives scores that mean something else.",
    "grader.field": "A row without what a grader looks at can't be graded.",
    "grader.package": "The score is computed by a package that isn't installed.",
    "track.package": "A run that was to be followed by a tracker shouldn't begin without it.",
    "benchmark.package": "The tasks and their scores are those of lm-evaluation-harness, an extra.",
    "benchmark.task": "A benchmark that isn't asked as it is meant gives a number that means nothing.",
    "grader.sandbox": "Foreign code is run only within limits, and only where it can be run at all.",
    "grader.endpoint": "Without the model's answers there are no grades.",
    # runs
    "run.exists": "A run folder is written once; another run in it would destroy what it proves.",
    "run.not_found": "There is no such run.",
    "run.locked": "Two processes that write one run would destroy it.",
    "run.changed": "A run goes on bit for bit only with the settings and versions that it began with.",
    "run.incomplete": "The run has not got that far yet.",
    "run.damaged": "Nothing is gone on with that isn't whole.",
    "checkpoint.none": "There is nothing to resume from.",
    "checkpoint.damaged": "A checkpoint is used only if every byte of it is as it was written.",
    # resources
    "memory.plan": "The run would run out of memory after time has been spent on it.",
    "memory.exhausted": "The machine has no more memory.",
    "disk.full": "The result could not be kept.",
    "disk.failed": "What can't be read or written is lost to what needs it.",
    # training
    "numbers.not_finite": "One update with such a number destroys the model.",
    # ends
    "run.stopped": "The run was asked to stop.",
    "run.interrupted": "The run was asked twice to stop.",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `code` from `CODES`, `what`, `where` (`path:line:field`, or empty) and `cure`."""

    code: str
    what: str
    where: str = ""
    cure: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        cure = f"\n    to mend: {self.cure}" if self.cure else ""
        return f"{place}{self.what}{cure}"

    @property
    def is_row(self) -> bool:
        """Tell whether it is about one row: the others can be used without it."""
        return self.code.startswith("row.") or self.code == "data.encoding"

    @property
    def why(self) -> str:
        """Why it matters."""
        return CODES[self.code]

    def to_json(self) -> dict[str, str]:
        """The problem as plain values, `why` included."""
        return {**asdict(self), "why": self.why}


class HeadstartError(Exception):
    """The root of the tree: one or more problems and the exit code that they lead to."""

    exit_code: ClassVar[int] = 1
    shown: ClassVar[int] = 20

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: Sequence[Problem] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.describe())

    def describe(self) -> str:
        """The problems as text, the first `shown` of them whole and the rest counted by code."""
        lines = [str(p) for p in self.problems[: self.shown]]
        rest = self.problems[self.shown :]
        if rest:
            counts: dict[str, int] = {}
            for problem in rest:
                counts[problem.code] = counts.get(problem.code, 0) + 1
            named = ", ".join(f"{count} x {code}" for code, count in sorted(counts.items()))
            lines.append(f"and {len(rest)} more: {named}")
        whys = dict.fromkeys(p.why for p in self.problems)
        return "\n".join([*lines, *(f"    why: {why}" for why in whys)])

    def to_json(self) -> dict[str, object]:
        """The error as plain values."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "problems": [p.to_json() for p in self.problems],
        }


class UsageError(HeadstartError):
    """A flag, a setting or a config file that can't be taken as meant."""

    exit_code = 2


class DataError(HeadstartError):
    """A data file, or rows of it, that can't be trained on."""

    exit_code = 3


class ModelError(HeadstartError):
    """A model, a tokenizer or a chat template that can't be used."""


class RunError(HeadstartError):
    """A run folder or a checkpoint that can't be used."""


class DamagedError(RunError, ValueError):
    """A file that headstart wrote, and that can't be read any more."""


class ResourceError(HeadstartError):
    """Memory or disk that isn't there."""

    exit_code = 4


class DivergedError(HeadstartError):
    """Training whose numbers are no longer finite."""

    exit_code = 5


class StoppedError(HeadstartError):
    """A run that was asked to stop, saved itself and can be resumed."""

    exit_code = 75


class InterruptedRun(HeadstartError):  # noqa: N818 (its name is what happened, not a fault)
    """A run that was asked twice to stop and did so at once."""

    exit_code = 130
