"""Templates: `{{item.answer}}` -> what stands there in a row.

`item` are the columns of the row as they stand in the file, `sample` what the model answered (`output_text`, and
`output_json` where that is JSON), `row` what headstart read: `asked` and `reference`, whatever the columns are called.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PLACE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
STEP = re.compile(r"""\.?([^.\[\]"']+)|\[(\d+)\]|\[(?:"([^"]*)"|'([^']*)')\]""")
SPACES = ("item", "sample", "row")
SAMPLE = ("output_text", "output_json")
ROW = ("asked", "reference")


@dataclass(frozen=True)
class Case:
    """A row to grade: where it stands, its columns, what it asks, the right answer, and what was answered."""

    where: str
    item: Mapping[str, Any] = field(default_factory=dict)
    asked: str = ""
    reference: str = ""
    answer: str = ""

    @property
    def sample(self) -> dict[str, Any]:
        """What was answered, as OpenAI's graders name it; text that isn't JSON has no `output_json`."""
        try:
            parsed = json.loads(self.answer)
        except (ValueError, RecursionError):
            parsed = None
        return {"output_text": self.answer, "output_json": parsed}

    @property
    def spaces(self) -> dict[str, Any]:
        """All that a template can name."""
        row = {"asked": self.asked, "reference": self.reference}
        return {"item": self.item, "sample": self.sample, "row": row}


def fill(template: str, case: Case) -> str:
    """Return a template with its places filled, once: what is filled in is text, whatever it spells.

    Texts are filled in as they are, other values as JSON, and nothing for a part of `output_json` that isn't there.
    Raises KeyError, with the place, for a part of the row that isn't.
    """
    spaces = case.spaces if PLACE.search(template) else {}

    def value(match: re.Match[str]) -> str:
        found = _look_up(match[1].strip(), spaces)
        return found if isinstance(found, str) else "" if found is None else json.dumps(found, ensure_ascii=False)

    return PLACE.sub(value, template)


def missing(template: str, case: Case) -> list[str]:
    """Return the places of a template that a row doesn't have; what is answered isn't known before."""
    absent = []
    for path in places(template):
        try:
            _look_up(path, case.spaces)
        except KeyError:
            absent.append(path)
    return absent


def places(template: str) -> Iterator[str]:
    """Yield what stands between the braces of a template."""
    return (match[1].strip() for match in PLACE.finditer(template))


def check_template(template: str) -> None:
    """Raise ValueError where a template names something that no row can have."""
    for path in places(template):
        head, *rest = _steps(path)
        known: tuple[str, ...] = SPACES
        if head in SPACES:
            known = {"item": (), "sample": SAMPLE, "row": ROW}[str(head)]
            if not rest:
                raise ValueError(
                    f"{{{{{path}}}}} is no place: name what of it, as {{{{{head}.{(*known, 'answer')[0]}}}}}"
                )
            head = rest[0]
            if not known:
                continue
        if head not in known:
            near = difflib.get_close_matches(str(head), known, n=1, cutoff=0.4)
            raise ValueError(
                f"{{{{{path}}}}} isn't known: {f'did you mean {near[0]!r}?' if near else f'there are {known}'}"
            )


def _steps(path: str) -> list[str | int]:
    """Return the steps of a path, `item.turns[0].text` or `item["a name"]`. Raises ValueError."""
    steps: list[str | int] = []
    at = 0
    while at < len(path):
        match = STEP.match(path, at)
        if match is None:
            raise ValueError(
                f'{{{{{path}}}}} can\'t be read: places are as item.answer, item.turns[0] or item["a name"]'
            )
        name, number, *quoted = match.groups()
        steps.append(int(number) if number is not None else next(part for part in (name, *quoted) if part is not None))
        at = match.end()
    if not steps:
        raise ValueError("{{}} is empty")
    return steps


def _look_up(path: str, spaces: Mapping[str, Any]) -> Any:
    steps = _steps(path)
    value: Any = spaces
    for step in steps:
        try:
            value = value[int(step)] if isinstance(value, list | tuple) else value[step]
        except (KeyError, IndexError, TypeError, ValueError):
            if steps[:2] == ["sample", "output_json"]:
                return None
            raise KeyError(path) from None
    return value
