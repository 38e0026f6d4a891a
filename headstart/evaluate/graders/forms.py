"""Grader files -> graders: the forms of OpenAI's graders, and four of our own (json_schema, exact_match, numeric, reward_model).

A file holds one grader or a list of them, as JSON. Strings are templates (`fill.py`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from headstart.data.strict import parse_json
from headstart.errors import Problem, UsageError
from headstart.evaluate.graders.fill import check_template
from headstart.evaluate.graders.formula import Formula

PASS = 0.5  # from which a score counts as passed, where a grader says nothing else
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_ .-]{0,63}")


Template = Annotated[str, Field(min_length=1)]


class Grader(BaseModel):
    """What all graders have: a name, by which the score goes, and the score from which a row has passed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
    name: str
    pass_threshold: float = PASS

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("a name has letters, digits, '_', '-', '.' and spaces, at most 64")
        return name

    @property
    def least(self) -> float:
        """The score from which a row has passed."""
        return self.pass_threshold

    @property
    def templates(self) -> list[str]:
        """The strings in which places are filled."""
        return [text for text in (getattr(self, "input", ""), getattr(self, "reference", "")) if isinstance(text, str)]

    @model_validator(mode="after")
    def _known_places(self) -> Grader:
        for text in self.templates:
            check_template(text)
        return self


class StringCheck(Grader):
    """1 where the input equals the reference (eq), doesn't (ne), holds it (like), or does in any case (ilike)."""

    type: Literal["string_check"]
    input: Template
    reference: Template
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarity(Grader):
    """How alike input and reference are, 0 to 1; `model` is what embeds for `cosine`."""

    type: Literal["text_similarity"]
    input: Template
    reference: Template
    evaluation_metric: Literal[
        "fuzzy_match",
        "bleu",
        "gleu",
        "meteor",
        "cosine",
        "rouge_1",
        "rouge_2",
        "rouge_3",
        "rouge_4",
        "rouge_5",
        "rouge_l",
    ]
    model: str = "minilm"


class ExactMatch(Grader):
    """1 where input and reference are the same once `ignore` is taken out of both."""

    type: Literal["exact_match"]
    input: Template
    reference: Template
    ignore: tuple[Literal["case", "space", "punctuation", "articles"], ...] = ("case", "space", "punctuation")


class Numeric(Grader):
    """1 where the last number of the input is that of the reference, within one of the tolerances."""

    type: Literal["numeric"]
    input: Template
    reference: Template
    tolerance: float = Field(0.0, ge=0, description="How far it may be off.")
    relative_tolerance: float = Field(1e-9, ge=0, description="The same as a part of the reference.")


class JsonSchema(Grader):
    """1 where the input is JSON that fits the schema (draft 2020-12, or the one that it names)."""

    type: Literal["json_schema"]
    input: Template
    json_schema: dict[str, Any] = Field(alias="schema")


class Python(Grader):
    """What `grade(sample, item)` of the source returns, run in a process of its own with limits (`jail.py`)."""

    type: Literal["python"]
    source: str
    image_tag: str | None = None  # OpenAI's; here the packages of this environment are at hand
    time_limit_s: float = Field(10.0, gt=0, le=600, description="Seconds for a row.")
    memory_limit_mib: int = Field(1024, ge=64)

    @field_validator("source")
    @classmethod
    def _compiles(cls, source: str) -> str:
        try:
            compile(source, "grader", "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"it isn't Python: {error}") from None
        if not re.search(r"^(async )?def grade\(|^grade\s*=", source, re.MULTILINE):
            raise ValueError("it has no function grade(sample, item)")
        return source


class Part(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["input_text", "output_text", "text"]
    text: str


class Turn(BaseModel):
    """A message to the model that grades."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Part | tuple[Part, ...]
    type: Literal["message"] = "message"

    @property
    def text(self) -> str:
        """The content as one text."""
        parts = self.content if isinstance(self.content, tuple) else (self.content,)
        return "\n".join(part if isinstance(part, str) else part.text for part in parts)


class Sampling(BaseModel):
    """How the model that grades is sampled; as OpenAI has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    max_completions_tokens: int | None = Field(None, ge=1)
    reasoning_effort: str | None = None


class ModelGrader(Grader):
    """A grader that asks a model: at `endpoint`, OpenAI-compatible (`https://host/v1`), or without one a local model.

    The key is in the environment, under the name `api_key_env`; it is sent nowhere else and written nowhere.
    """

    model: str
    input: tuple[Turn, ...] = Field(min_length=1)
    endpoint: str | None = None
    api_key_env: str | None = None
    sampling_params: Sampling = Sampling()

    @property
    def templates(self) -> list[str]:
        """The texts of the messages."""
        return [turn.text for turn in self.input]

    @model_validator(mode="after")
    def _has_an_effect(self) -> ModelGrader:
        if self.endpoint is None and self.api_key_env:
            raise ValueError("`api_key_env` has no effect: no `endpoint` is named")
        if self.endpoint is not None and not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", self.endpoint):
            raise ValueError("`endpoint` is an address such as https://host/v1, without a key in it")
        given = self.sampling_params.model_fields_set - {"temperature", "max_completions_tokens"}
        if self.endpoint is None and (given or self.sampling_params.temperature):
            raise ValueError("a local model takes the likeliest token each time: leave out `sampling_params`")
        return self


class ScoreModel(ModelGrader):
    """The number that a model gives, within `range`."""

    type: Literal["score_model"]
    range: tuple[float, float] = (0.0, 1.0)

    @property
    def least(self) -> float:
        """The score from which a row has passed: the middle of the range, where none is given."""
        return self.pass_threshold if "pass_threshold" in self.model_fields_set else sum(self.range) / 2

    @field_validator("range")
    @classmethod
    def _rises(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if bounds[0] >= bounds[1]:
            raise ValueError("the first number is the lower one")
        return bounds


class LabelModel(ModelGrader):
    """1 where the label that a model gives is one of those that pass."""

    type: Literal["label_model"]
    labels: tuple[str, ...] = Field(min_length=2)
    passing_labels: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _labels_known(self) -> LabelModel:
        if other := set(self.passing_labels) - set(self.labels):
            raise ValueError(f"`passing_labels` has {sorted(other)}, and `labels` doesn't")
        return self


class RewardModel(Grader):
    """The reward that a reward model on this machine gives the answer: higher is better, without zero or unit.

    With `against`, how likely it is to be preferred to that answer, 0 to 1 (Bradley and Terry, 1952). `input` are the turns
    that are read, of which the last is the answer.
    """

    type: Literal["reward_model"]
    model: str
    input: tuple[Turn, ...] = (
        Turn(role="user", content="{{row.asked}}"),
        Turn(role="assistant", content="{{sample.output_text}}"),
    )
    against: Template | None = None

    @property
    def least(self) -> float:
        """The score from which a row has passed: against another answer an even chance, else 0, where none is given."""
        return self.pass_threshold if self.has_bound else 0.0

    @property
    def has_bound(self) -> bool:
        """Tell whether it is known from where on a score is a good one."""
        return self.against is not None or "pass_threshold" in self.model_fields_set

    @property
    def templates(self) -> list[str]:
        """The texts of the turns, and of the answer that it is held against."""
        return [*(turn.text for turn in self.input), *([] if self.against is None else [self.against])]

    @model_validator(mode="after")
    def _ends_with_an_answer(self) -> RewardModel:
        if len(self.input) < 2 or self.input[-1].role != "assistant":
            raise ValueError(
                "`input` ends with the answer, a turn of the assistant, and what it answers stands before it"
            )
        return self


class Multi(Grader):
    """A formula over the scores of other graders, by the names that `graders` gives them."""

    type: Literal["multi"]
    graders: dict[str, Any]
    calculate_output: str

    @property
    def formula(self) -> Formula:
        """The formula."""
        return Formula(self.calculate_output)

    @field_validator("graders")
    @classmethod
    def _parts(cls, parts: Mapping[str, Any]) -> dict[str, Grader]:
        if not parts:
            raise ValueError("there is no grader in it")
        built = {}
        for key, value in parts.items():
            if isinstance(value, dict) and value.get("type") == "multi":
                raise ValueError(f"`{key}` is a multi itself")
            try:
                built[key] = build_grader({"name": key, **value} if isinstance(value, dict) else value)
            except ValidationError as error:
                raise ValueError(
                    "; ".join(f"{problem.where}: {problem.what}" for problem in _explain(error, value, key))
                ) from None
        return built

    @model_validator(mode="after")
    def _formula_fits(self) -> Multi:
        self.formula.check(self.graders)
        return self


TYPES: Mapping[str, type[Grader]] = {
    "string_check": StringCheck,
    "text_similarity": TextSimilarity,
    "exact_match": ExactMatch,
    "numeric": Numeric,
    "json_schema": JsonSchema,
    "python": Python,
    "score_model": ScoreModel,
    "label_model": LabelModel,
    "reward_model": RewardModel,
    "multi": Multi,
}


def read_graders(files: Iterable[str | Path]) -> list[Grader]:
    """Read grader files. Raises UsageError with all that is wrong in any of them; two graders of one name are wrong."""
    found: list[Grader] = []
    problems: list[Problem] = []
    for file in map(Path, files):
        for place, value in _read(file, problems):
            try:
                found.append(build_grader(value))
            except ValidationError as error:
                problems += _explain(error, value, place)
            except ValueError as error:
                problems.append(Problem("grader.form", str(error), place, "docs/graders.md shows each form"))
    names = [grader.name for grader in found]
    problems += [
        Problem("grader.form", f"two graders have the name {name!r}", "", "give each a name of its own")
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if problems:
        raise UsageError(problems)
    return found


def build_grader(value: Any) -> Grader:
    """Return the grader that plain values describe. Raises ValueError, as pydantic's where fields are wrong."""
    if not isinstance(value, dict):
        raise ValueError(f"a grader is a JSON object with a `type`, and this is {value!r:.60}")
    kind = value.get("type")
    if kind not in TYPES:
        near = difflib.get_close_matches(str(kind), TYPES, n=1, cutoff=0.5)
        known = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TYPES)}"
        raise ValueError(f"there is no grader of type {kind!r}: {known}")
    return TYPES[str(kind)].model_validate(value)


def _read(file: Path, problems: list[Problem]) -> Sequence[tuple[str, Any]]:
    """Return the graders of a file as plain values, each with its place."""
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        said = error.strerror or error if isinstance(error, OSError) else error
        cure = "name a JSON file: --grader grader.json"
        problems.append(Problem("grader.unreadable", f"the grader can't be read: {said}", str(file), cure))
        return []
    if isinstance(value, list):
        return [(f"{file}:[{number}]", item) for number, item in enumerate(value)]
    return [(str(file), value)]


def _explain(error: ValidationError, value: Mapping[str, Any], place: str) -> list[Problem]:
    """Return what pydantic found, a problem a field; an unknown field names the nearest one."""
    fields = [field.alias or name for name, field in TYPES[str(value["type"])].model_fields.items()]
    problems = []
    for detail in error.errors():
        path = ".".join(map(str, detail["loc"]))
        cure = f"a {value['type']} has {', '.join(fields)}"
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path, fields, n=1)
            what = f"there is no field `{path}`"
            cure = f"did you mean `{near[0]}`?" if near else cure
        elif detail["type"] == "missing":
            what = f"`{path}` is missing"
        else:
            what = detail["msg"].replace("Input should be", "it should be").removeprefix("Value error, ")
        problems.append(Problem("grader.form", what, f"{place}:{path}" if path else place, cure))
    return problems
