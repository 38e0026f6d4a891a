"""Any bytes, under any ending, and any values in rows: rows and problems come of them, or an error that says why; no more."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headstart.config import DataSettings
from headstart.data.formats import CHAT_KEYS, TURN_KEYS, format_rows, named_columns
from headstart.data.prepare import Formed, Sides, prepare
from headstart.data.read import Row, Where
from headstart.data.render import Renderer
from headstart.errors import DataError
from tests.fuzz.seeds import ROWS, seeds, try_to_read
from tests.tokens import make_tokenizer

SEEDS = seeds()
BOUNDED = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def changed(draw: st.DrawFn, ending: str) -> bytes:
    """A file of an ending of which some stretches are other bytes; or any bytes."""
    content = bytearray(draw(st.sampled_from([*SEEDS[ending], b""])))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        gone = draw(st.integers(0, 8))
        content[place : place + gone] = draw(
            st.binary(max_size=12) | st.sampled_from([b"\0", b"\n", b'"', b"\xff\xfe", b"[" * 99])
        )
    return bytes(content)


@pytest.mark.parametrize("ending", list(SEEDS))
def test_any_bytes_give_rows_or_problems(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"

    @BOUNDED
    @given(changed(ending))
    def hold(content: bytes) -> None:
        path.write_bytes(content)
        try_to_read(path)

    hold()


ODD = st.sampled_from(
    [None, True, 0, -1, 10**400, float("nan"), float("inf"), "", " ", "\ud800", "user", "[", [], {}, [[]], [{}]]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
COLUMNS = sorted({name for row in ROWS for name in row} | set(CHAT_KEYS) | TURN_KEYS)
VALUES = ODD | st.recursive(
    SCALARS | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(COLUMNS), inner, max_size=4),
    max_leaves=8,
)


def numbered(row: dict[str, Any], n: int) -> Any:
    """Return a copy of a row with a number of its own."""
    text = re.sub('"([qtx])"', rf'"\g<1>{n % 7}"', json.dumps(row))
    return json.loads(text.replace("1.5", f"{n}.5"))


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of one known format, of which some have any other value somewhere."""
    whole = draw(st.sampled_from(ROWS))
    found = []
    for n in range(draw(st.integers(1, 2))):
        row = place = numbered(whole, n)
        while True:
            key = draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
            if draw(st.booleans()) or not isinstance(place[key], dict | list) or not place[key]:
                break
            place = place[key]
        other = isinstance(place, dict) and draw(st.integers(0, 4)) == 0
        place[draw(st.sampled_from(COLUMNS)) if other else key] = draw(VALUES)
        found.append(row)
    return [*found, *(numbered(whole, n) for n in range(10, 20))]


@cache
def renderer() -> Renderer:
    tokenizer = make_tokenizer("tools")
    return Renderer(tokenizer, (tokenizer.eos_token_id,))


@settings(BOUNDED, max_examples=400)
@given(rows(), st.sampled_from(["all", "last"]), st.sampled_from(["keep", "untrained"]))
def test_any_values_give_records_or_problems(found: list[dict[str, Any]], train_on: str, reasoning: str) -> None:
    plan = DataSettings(train_on=train_on, reasoning=reasoning, held_out=1)  # type: ignore[arg-type]
    placed = [Row(Where("f", n), row) for n, row in enumerate(found, 1)]
    try:
        formatted = format_rows(placed, named=named_columns(plan), train_on=train_on, reasoning=reasoning)
        sides = Sides(Formed([], len(placed), formatted), None)
        task = formatted.detection.task
        if task not in ("tagging", "images"):
            problems = prepare(sides, plan, renderer(), 200, task=task).problems
            assert all(problem.why and problem.where.startswith("f:") for problem in problems)
    except DataError as error:
        error.describe()
