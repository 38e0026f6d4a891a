"""Graders and rows -> scores. A row that can't be graded has no score, and says why: it counts neither as good nor as bad."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headstart.data.strict import parse_json
from headstart.errors import DataError, Problem, UsageError
from headstart.evaluate.graders.ask import ask, check_endpoint, check_reward_model, cosines, give_rewards
from headstart.evaluate.graders.fill import Case, fill, missing
from headstart.evaluate.graders.forms import (
    ExactMatch,
    Grader,
    JsonSchema,
    LabelModel,
    ModelGrader,
    Multi,
    Numeric,
    Python,
    RewardModel,
    ScoreModel,
    StringCheck,
    TextSimilarity,
)
from headstart.evaluate.graders.sandbox import grade_in_sandbox
from headstart.evaluate.graders.texts import CHECKS, SIMILARITIES, last_number, need, normalise
from headstart.evaluate.score import sigmoid

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)
SHOWN = 80  # characters of what a model said that are shown


@dataclass(frozen=True)
class Grade:
    """What a grader gave a row: a score, or why there is none. The score is a bool where a row can only pass or fail."""

    score: float | None
    why: str = ""


Tell = Callable[[str], None]


def grade(grader: Grader, cases: Sequence[Case], tell: Tell = lambda _: None) -> list[Grade]:
    """Return the grade of each case. Raises UsageError or ModelError where a grader can grade none at all."""
    return _GRADE[type(grader)](grader, cases, tell)


def check_graders(graders: Sequence[Grader], cases: Sequence[Case]) -> None:
    """See that graders can do their work on these rows, before anything is answered.

    Raises DataError with each row that lacks what a grader names, UsageError where a package isn't there, and ModelError
    where an endpoint may not be asked.
    """
    problems = []
    for grader in (part for whole in graders for part in parts_of(whole)):
        if isinstance(grader, ModelGrader) and grader.endpoint:
            check_endpoint(grader)
        if isinstance(grader, RewardModel):
            check_reward_model(grader)
        if isinstance(grader, JsonSchema):
            _validator(grader)
        for case in cases:
            for path in dict.fromkeys(path for text in grader.templates for path in missing(text, case)):
                what = f"the row has no {path}, which the grader {grader.name} names"
                cure = f"name one of {sorted(case.item)}" if case.item else "row.reference is what headstart read"
                problems.append(Problem("grader.field", what, case.where, cure))
    if problems:
        raise DataError(problems)


def parts_of(grader: Grader) -> list[Grader]:
    """Return a grader with those that it is made of."""
    return [grader, *(grader.graders.values() if isinstance(grader, Multi) else ())]


def _each(check: Callable[[Any, Case], bool]) -> Callable[[Any, Sequence[Case], Tell], list[Grade]]:
    """Return a function that lets rows pass or fail; ValueError says why a row can't be graded."""

    def one(grader: Any, case: Case) -> Grade:
        try:
            return Grade(check(grader, case))
        except ValueError as error:
            return Grade(None, str(error))

    return lambda grader, cases, _: [one(grader, case) for case in cases]


def _pair(grader: Any, case: Case) -> tuple[str, str]:
    return fill(grader.input, case), fill(grader.reference, case)


def _check_string(grader: StringCheck, case: Case) -> bool:
    return CHECKS[grader.operation](*_pair(grader, case))


def _match(grader: ExactMatch, case: Case) -> bool:
    text, reference = (normalise(text, grader.ignore) for text in _pair(grader, case))
    return text == reference


def _compare_numbers(grader: Numeric, case: Case) -> bool:
    text, reference = map(last_number, _pair(grader, case))
    if reference is None:
        raise ValueError("the reference has no number")
    room = max(grader.tolerance, grader.relative_tolerance * abs(reference))
    return text is not None and abs(text - reference) <= room


def _fit_schema(grader: JsonSchema, case: Case) -> bool:
    try:
        value = parse_json(fill(grader.input, case))
    except ValueError:
        return False
    try:
        return bool(_validator(grader).is_valid(value))
    except RecursionError:
        raise ValueError("the schema refers to itself without end, or the answer is nested too deeply") from None


@functools.lru_cache(maxsize=8)
def _validator_of(schema: str) -> Any:
    try:
        import jsonschema
        import referencing.exceptions
    except ImportError:
        raise need("jsonschema", "json_schema") from None
    parsed = json.loads(schema)
    kind = jsonschema.validators.validator_for(parsed, default=jsonschema.Draft202012Validator)
    try:
        _check_schema(kind, parsed)
    except jsonschema.SchemaError as error:
        what = f"the schema is none: {error.message}"
        raise UsageError(Problem("grader.form", what, "schema", "see json-schema.org")) from None
    except referencing.exceptions.Unresolvable as error:
        what = f"the schema refers to what it doesn't hold: {error.ref!r}"
        raise UsageError(Problem("grader.form", what, "schema", "put it under $defs; nothing is fetched")) from None
    return kind(parsed, registry=referencing.Registry())


def _check_schema(kind: Any, parsed: Any) -> None:
    """See that a schema, and all that it refers to, is one, and there. Nothing is fetched.

    Raises jsonschema.SchemaError, and referencing's Unresolvable.
    """
    import jsonschema
    from referencing.jsonschema import specification_with

    kind.check_schema(parsed)
    resource_of = specification_with(kind.META_SCHEMA["$schema"]).create_resource
    root = resource_of(parsed)
    registry = jsonschema.validators.SPECIFICATIONS
    left, seen = [(root, registry.resolver_with_root(root))], set()
    while left:
        schema, resolver = left.pop()
        if id(schema.contents) in seen:
            continue
        seen.add(id(schema.contents))
        refs = schema.contents if isinstance(schema.contents, dict) else {}
        for ref in (refs[name] for name in ("$ref", "$dynamicRef") if isinstance(refs.get(name), str)):
            met = resolver.lookup(ref)
            kind.check_schema(met.contents)
            left.append((resource_of(met.contents), met.resolver))
        left.extend((sub, resolver.in_subresource(sub)) for sub in schema.subresources())


def _validator(grader: JsonSchema) -> Any:
    return _validator_of(json.dumps(grader.json_schema))


def _measure_texts(grader: TextSimilarity, cases: Sequence[Case], _: Tell) -> list[Grade]:
    pairs = [_pair(grader, case) for case in cases]
    if grader.evaluation_metric == "cosine":
        return [Grade(float(value)) for value in cosines(grader.model, pairs)]
    score = SIMILARITIES[grader.evaluation_metric]
    return [Grade(score(*pair)) for pair in pairs]


def _run_python(grader: Python, cases: Sequence[Case], tell: Tell) -> list[Grade]:
    found = grade_in_sandbox(grader, cases, tell)
    return [Grade(None, value) if isinstance(value, str) else Grade(value) for value in found]


def _chats(grader: ModelGrader, cases: Sequence[Case], asked_for: str) -> list[list[Mapping[str, str]]]:
    """Return what the model is asked for each row; what it has to answer stands at the end of the last message."""
    chats = []
    for case in cases:
        chat: list[Mapping[str, str]] = [{"role": turn.role, "content": fill(turn.text, case)} for turn in grader.input]
        chats.append([*chat[:-1], {**chat[-1], "content": f"{chat[-1]['content']}\n\n{asked_for}"}])
    return chats


def _score_by_model(grader: ScoreModel, cases: Sequence[Case], _: Tell) -> list[Grade]:
    low, high = grader.range
    asked_for = f'Answer with JSON alone: {{"result": a number from {low:g} to {high:g}}}'
    said = ask(grader, _chats(grader, cases, asked_for), _schema({"type": "number"}))
    return [_read_score(text, low, high) for text in said]


def _read_score(said: str, low: float, high: float) -> Grade:
    result = _result(said)
    if not isinstance(result, int | float) or isinstance(result, bool):
        found = NUMBER.findall(said) if result is None else NUMBER.findall(str(result))
        if len(found) != 1:
            return Grade(None, f"the model gave no number: {said!r:.{SHOWN}}")
        result = found[0]
    result = float(str(result))  # by its text: an int of hundreds of digits is infinite
    if not low <= result <= high:
        return Grade(None, f"the model gave {result:g}, which isn't from {low:g} to {high:g}")
    return Grade(result)


def _label_by_model(grader: LabelModel, cases: Sequence[Case], _: Tell) -> list[Grade]:
    asked_for = f'Answer with JSON alone: {{"result": one of {json.dumps(list(grader.labels), ensure_ascii=False)}}}'
    schema = _schema({"type": "string", "enum": list(grader.labels)})
    return [_read_label(text, grader) for text in ask(grader, _chats(grader, cases, asked_for), schema)]


def _read_label(said: str, grader: LabelModel) -> Grade:
    """Tell whether the label passes; it is the result, or the only one that is spelled."""
    result = str(_result(said) or said).strip().casefold()
    met = [label for label in grader.labels if label.casefold() == result]
    if not met:
        met = [label for label in grader.labels if re.search(rf"(?<!\w){re.escape(label.casefold())}(?!\w)", result)]
    if len(met) != 1:
        return Grade(None, f"the model gave no label, or several: {said!r:.{SHOWN}}")
    return Grade(met[0] in grader.passing_labels)


def _reward(grader: RewardModel, cases: Sequence[Case], _: Tell) -> list[Grade]:
    chats = [[{"role": turn.role, "content": fill(turn.text, case)} for turn in grader.input] for case in cases]
    found = give_rewards(grader, chats)
    if grader.against is None:
        return [Grade(None, given) if isinstance(given, str) else Grade(given) for given in found]
    against = grader.against
    others = [
        [*chat[:-1], {**chat[-1], "content": fill(against, case)}] for chat, case in zip(chats, cases, strict=True)
    ]
    return [_preferred(*pair) for pair in zip(found, give_rewards(grader, others), strict=True)]


def _preferred(own: float | str, other: float | str) -> Grade:
    """Return how likely an answer is to be preferred to another, given both rewards, or why one has none."""
    if isinstance(own, str):
        return Grade(None, own)
    if isinstance(other, str):
        return Grade(None, f"the answer that it is held against: {other}")
    return Grade(float(sigmoid(np.array(own - other))))


def _schema(result: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "object", "properties": {"result": result}, "required": ["result"], "additionalProperties": False}


def _result(said: str) -> Any:
    """Return the `result` of the JSON that an answer holds, in a fence or not; None where there is none."""
    begin, end = said.find("{"), said.rfind("}")
    try:
        value = json.loads(said[begin : end + 1])
    except (ValueError, RecursionError):
        return None
    return value.get("result") if isinstance(value, dict) else None


def _combine(grader: Multi, cases: Sequence[Case], tell: Tell) -> list[Grade]:
    parts = {name: grade(part, cases, tell) for name, part in grader.graders.items()}
    return [_combined(grader, {name: grades[number] for name, grades in parts.items()}) for number in range(len(cases))]


def _combined(grader: Multi, parts: Mapping[str, Grade]) -> Grade:
    for name, part in parts.items():
        if part.score is None:
            return Grade(None, f"{name}: {part.why}")
    try:
        return Grade(grader.formula.value({name: part.score or 0.0 for name, part in parts.items()}))
    except (ArithmeticError, ValueError) as error:
        return Grade(None, f"{grader.calculate_output}: {error}")


_GRADE: Mapping[type[Grader], Callable[[Any, Sequence[Case], Tell], list[Grade]]] = {
    StringCheck: _each(_check_string),
    TextSimilarity: _measure_texts,
    ExactMatch: _each(_match),
    Numeric: _each(_compare_numbers),
    JsonSchema: _each(_fit_schema),
    Python: _run_python,
    ScoreModel: _score_by_model,
    LabelModel: _label_by_model,
    RewardModel: _reward,
    Multi: _combine,
}
