"""The guard: what ships is small and plain, a loss beyond the bound makes a run worse, and only one that is certain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headstart.config import Override, build_config
from headstart.dataset import build_data
from headstart.engine.loop import Progress
from headstart.errors import HeadstartError
from headstart.evaluate.guard import GENERAL, compare_guard, general_forms, guard_result
from headstart.evaluate.measure import Measured, RowResult
from headstart.report.result import build_result
from tests.unit.test_report import PLAN, SOURCE, rows


def guarded(grown: float, spread: float = 0.01, count: int = 40) -> Measured:
    """Return rows of a job that gained, beside a guard whose loss is so many times what it was."""
    chance = np.random.default_rng(3)
    each = 50 * chance.lognormal(0, 0.3, count) * grown * np.exp(chance.normal(0, spread, count))
    guard = [
        RowResult(f"g:{n}", float(nll), 50.0, bytes=200, part="general text", guard=True) for n, nll in enumerate(each)
    ]
    return Measured([*rows(0 if grown == 1 else 5.0).rows, *guard], "chat")


def verdicts(after: Measured, bound: float = 0.1) -> tuple[str, str]:
    facts: dict[str, Any] = {"kind": "instruction", "task": "chat", "model": SOURCE, "weights": "pretrained"}
    facts |= {"method": "lora", "dtype": "float32", "rows": {"train": 9, "watch": 9, "proof": 20}, "stop_ids": [2]}
    progress = Progress(step=5, train_s=1.0, end="finished")
    found = build_result(
        facts=facts,
        plan=PLAN,
        progress=progress,
        before=guarded(1.0, count=len(after.rows) - 20),
        after=after,
        device="cpu",
        guard_bound=bound,
    )
    return found["verdict"], found["guard"]["verdict"]


def test_a_loss_beyond_the_bound_makes_a_run_worse_and_only_where_it_is_certain() -> None:
    assert verdicts(guarded(1.05)) == ("better", "kept")
    assert verdicts(guarded(1.2)) == ("worse", "lost")
    assert verdicts(guarded(1.2), bound=0.3) == ("better", "kept")
    assert verdicts(guarded(1.12, spread=0.5)) == ("better", "unclear")
    assert verdicts(guarded(1.12, count=7)) == ("better", "too few rows")


def test_the_loss_is_a_part_of_what_it_was_and_the_worst_part_decides() -> None:
    kept = compare_guard(guarded(1.0, 0).guard(), guarded(1.2, 0).guard())
    assert kept[0].metric == "bits_per_byte"
    nll = np.array([row.nll for row in guarded(1.0, 0).rows if row.guard])
    assert kept[0].before.value == pytest.approx(nll.sum() / np.log(2) / (40 * 200))
    for value in (kept[0].loss.value, kept[0].loss.low, kept[0].loss.high):  # every row alike, so nothing is unsure
        assert value == pytest.approx(0.2)
    fine = compare_guard(guarded(1.0, 0).guard(), guarded(1.0, 0).guard())
    assert guard_result([*fine, *kept], 0.1)["verdict"] == "lost"
    assert guard_result(fine, 0.1)["verdict"] == "kept"


def test_what_ships_is_small_and_never_learned_from(tiny_home: Path, small_data: Path) -> None:
    data = build_data(build_config(None, [Override("data.train", [str(small_data)], "flag")]))
    assert data.guard[0].renderer is data.guard[1].renderer  # made once
    assert [part.name for part in data.guard] == list(GENERAL)
    texts, questions = (part.rows for part in data.guard)
    assert 30 <= len(texts.examples) <= 50
    assert 30 <= len(questions.examples) <= 50
    stops = set(data.stop_ids)
    for example in questions.examples:
        (segment,) = example.segments
        aimed = segment.ids[segment.weights > 0].tolist()
        assert aimed
        assert not stops & set(aimed)
    learned = {text for row in data.prepared.train.kept for text in row.texts}
    assert not learned & {text for part in data.guard for row in part.rows.kept for text in row.texts}


def test_what_of_it_is_trained_on_is_left_out_and_told(tiny_home: Path, small_data: Path) -> None:
    text = general_forms()[0].formatted.examples[2].texts[0]
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": f"Well: {text.upper()}"}]
    held_out = Path("held.jsonl")
    held_out.write_text(small_data.read_text().replace("?", "!"))
    small_data.write_text(small_data.read_text() + json.dumps({"messages": turns}) + "\n")
    named = {"data.train": [str(small_data)], "data.eval": [str(held_out)]}
    data = build_data(build_config(None, [Override(key, value, "flag") for key, value in named.items()]))
    kept = [row.texts[0] for row in data.guard[0].rows.kept]
    assert text not in kept
    assert len(kept) == len(data.guard[0].rows.examples) == len(general_forms()[0].formatted.examples) - 1
    (said,) = [note for note in data.prepared.formed[0].notes if "guard" in note]
    assert said.startswith("1 of 36 rows of the guard (general text) stand in the rows to train on")
    assert said.endswith("texts.jsonl:3")


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"text": "a", "label": "b"}] * 9, "format.kind"),
        ([{"text": "some words are here"}, {"text": ""}], "row.empty_text"),
        ([], "data.empty"),
    ],
)
def test_own_rows_that_cant_be_guarded_are_named(
    tiny_home: Path, small_data: Path, tmp_path: Path, rows: list[dict[str, Any]], named: str
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sets = {"data.train": [str(small_data)], "eval.guard": str(own)}
    with pytest.raises(HeadstartError) as found:
        build_data(build_config(None, [Override(key, value, "flag") for key, value in sets.items()]))
    assert found.value.problems[0].code == named


def test_own_files_of_one_name_are_parts_of_their_own(tiny_home: Path, small_data: Path, tmp_path: Path) -> None:
    files = [tmp_path / folder / "own.jsonl" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text('{"text": "some words are here"}\n' * 3, encoding="utf-8")

    def names(*guard: Path) -> list[str]:
        sets = {"data.train": [str(small_data)], "eval.guard": ",".join(map(str, guard))}
        overrides = [Override(key, value, "flag") for key, value in sets.items()]
        return [part.name for part in build_data(build_config(None, overrides)).guard]

    assert names(files[0]) == ["own.jsonl"]
    assert names(*files) == [str(file) for file in files]
    with pytest.raises(HeadstartError, match="twice"):
        names(files[0], files[0])
