"""The report: small, whole in itself, and data in it is text, whatever it spells."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from headstart.config import build_config
from headstart.display import Display, in_bytes, in_time, safe
from headstart.engine.loop import Progress
from headstart.errors import Problem
from headstart.evaluate.compare import Ratio, compare, tell_metric
from headstart.evaluate.measure import Measured, RowResult
from headstart.evaluate.versus import Evaluated, build_versus
from headstart.files import json_text, read_json, write_json
from headstart.report.card import model_card
from headstart.report.charts import POINTS_MAX, Series, line_chart, nice_ticks, thin_out
from headstart.report.frame import marked
from headstart.report.page import report_page
from headstart.report.result import build_result
from headstart.report.told import told_sections
from headstart.report.versus import versus_page
from headstart.report.words import clearness, cures, old_lines, old_words, score_table, sentence
from headstart.show import say_evaluated, say_versus

PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre><svg onload=alert(1)>",
    "javascript:alert(1)",
    "a\x1b[31mb",
]


def rows(gain: float) -> Measured:
    chance = np.random.default_rng(0)
    return Measured(
        [
            RowResult(
                f"f.jsonl:{n}",
                float(10 - gain + chance.random()),
                5.0,
                PAYLOADS[n % 5],
                PAYLOADS[(n + 1) % 5],
                PAYLOADS[(n + 2) % 5] if n < 12 else None,
                n % 2 == 0,
            )
            for n in range(20)
        ],
        "chat",
    )


PLAN: dict[str, Any] = {
    "steps": 500,
    "row_tokens": 1000,
    "tokens": 900,
    "parameters": 135_000_000,
    "trainable": 5_000_000,
    "train_s": 10.0,
    "eval_s": 5.0,
    "save_s": 1.0,
    "product_rate": 1e9,
    "tokens_per_pack": 512,
    "memory_bytes": 2 << 30,
    "start": "",
}
SOURCE = {"name": PAYLOADS[0], "kind": "hub", "revision": "abc", "sha256": "", "path": "/x", "license": "MIT"}


def result(gain: float = 5.0, before: Measured | None = None, after: Measured | None = None) -> dict[str, Any]:
    return build_result(
        facts={
            "kind": "instruction",
            "task": "chat",
            "model": SOURCE,
            "base": None,
            "lineage": None,
            "new_head": False,
            "method": "lora",
            "weights": "pretrained",
            "dtype": "float32",
            "rows": {"train": 100, "watch": 10, "proof": 20},
            "stop_ids": [2],
        },
        plan=PLAN,
        progress=Progress(
            step=500,
            seen=100,
            tokens_seen=900,
            row_tokens_seen=1000,
            train_s=9.0,
            eval_s=4.0,
            best_step=400,
            end="finished",
        ),
        before=before or rows(0),
        after=after or rows(gain),
        device="cpu",
    )


DATA: dict[str, Any] = {
    "files": [{"name": PAYLOADS[1], "bytes": 10, "sha256": "0" * 64, "revision": ""}],
    "formats": [{"format": "messages", "certainty": "certain", "reads": PAYLOADS[2]}],
    "rows": {"train": 100, "watch": 10, "proof": 20},
    "tokens": {"train": 1000, "watch": 100, "proof": 200},
    "targets": {"train": 500, "watch": 50, "proof": 100},
    "duplicates": 2,
    "dropped": {
        "too_long": [{"where": "f:1", "tokens": 9000}],
        "in_both": 1,
        "bad": [{"where": "f:2", "what": PAYLOADS[0]}],
    },
    "notes": [PAYLOADS[3]],
}


@pytest.fixture(scope="module")
def page() -> str:
    metrics: list[dict[str, Any]] = [{"step": n, "loss": 3 - n / 300, "lr": 1e-3} for n in range(1, 501)]
    metrics += [{"step": n, "watch_loss": 2.5 - n / 400} for n in range(50, 501, 50)]
    return report_page(result(), rows(0), rows(5.0), metrics, DATA, build_config())


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag


def test_the_page_is_small_and_loads_nothing(page: str) -> None:
    assert len(page.encode()) < 300_000
    assert not re.search(r"https?://|url\(|@import|<link|<script|<iframe", page)


def test_data_in_the_page_is_text(page: str) -> None:
    parser = _Tags()
    parser.feed(page)
    assert parser.open == []
    assert not {"script", "img", "iframe", "object"} & set(parser.tags)
    assert not [name for name, _ in parser.attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(1)" in page


def test_what_was_lost_is_said_with_what_can_be_done() -> None:
    assert cures(result(), "runs/a") == []
    part = {"loss": {"value": 0.3, "low": 0.2, "high": 0.4}, "metric": "loss", "verdict": "lost"}
    guard = {"verdict": "lost", "bound": 0.1, "parts": {"general text": part}}
    lost = {**result(), "guard": guard, "old": {"verdict": "lost", "parts": {}}}
    dial, mixed, replayed = cures(lost, "runs/a")
    assert dial.startswith("headstart strength runs/a: ")
    assert mixed.startswith("-s data.mix=")
    assert "--replay" in replayed
    whole = cures({**lost, "method": "full", "task": "classification", "old": None}, "runs/a")
    assert whole == []  # neither can be had there


def test_names_of_classes_and_models_are_text_in_page_and_card() -> None:
    classes = Measured(
        [
            RowResult(p, 1.0, 1.0, "asked", p, PAYLOADS[(n + 1) % len(PAYLOADS)], True, probability=0.5)
            for n, p in enumerate(PAYLOADS)
        ],
        "classification",
    )
    hostile = {
        **result(),
        "scale": None,
        "model": {
            **SOURCE,
            "name": "a\n# b `c` [d](javascript:e) | <img src=x onerror=f>",
            "license": "x: <script>\ny",
        },
    }
    cards = [
        model_card(Path("runs/<script>alert(1)") / name, {**hostile, "method": method, "task": task}, "model")
        for name in ("```<img onerror=x>", '"); import os; ("', "[x](javascript:y)")
        for method in ("lora", "full")
        for task in ("chat", "classification", "regression", "embedding", "images")
    ]
    parser = _Tags()
    parser.feed("".join(body for _, body in told_sections(classes, classes)))
    assert not {"script", "img", "svg onload"} & set(parser.tags)
    assert not [name for name, _ in parser.attributes if name.startswith("on")]
    for card in cards:
        assert not re.search(r"<(script|img|svg)", card)
        prose = re.sub(r"```.*?```", "", card.split("---\n", 2)[2], flags=re.DOTALL)
        assert not re.search(r"(?<!\\)\]\(javascript:|^# b|(?<!\\)`", prose, re.MULTILINE)
        assert card.count("```") % 2 == 0
        for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
            names = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
            assert "os" not in names
        assert len(yaml.safe_load(card.split("---\n")[1])) >= 4


def test_the_page_says_what_was_and_what_was_not_measured(page: str) -> None:
    for said in (
        "Better",
        "95% interval",
        "Seven reasons",
        "Not measured",
        "planned",
        "actual",
        "Settings",
        "Environment",
        "1 rows to score on were taken out",
        "9,000 tokens, too long",
    ):
        assert said in page, said


def test_a_result_says_what_others_build_on() -> None:
    found = result()
    wanted = {
        "kind",
        "model",
        "method",
        "verdict",
        "before",
        "after",
        "difference",
        "guard",
        "tokens",
        "speed",
        "memory",
        "environment",
    }
    assert wanted <= set(found)
    assert found["guard"] == "not measured"
    assert found["verdict"] == "better"
    assert found["difference"]["value"] == pytest.approx(-1.0)
    assert found["speed"]["real_tokens_per_s"] == pytest.approx(1000 / 9)
    assert sentence(found).startswith("better: loss per predicted token")
    assert result(0.0)["verdict"] == "no_gain"
    assert result(-5.0)["verdict"] == "worse"


def test_the_card_has_the_hubs_metadata_and_the_lines_that_load_it() -> None:
    card = model_card(Path("runs/x"), {**result(), "model": {**SOURCE, "name": "me/base@v1"}}, "model")
    assert card.startswith("---\n")
    assert "base_model: me/base\n" in card
    assert "license: mit\n" in card
    assert 'from_pretrained("me/base", revision="abc", dtype="float32")' in card
    assert "eos_token_id=[2]" in card
    assert 'tokenizer("...", return_tensors="pt")' in model_card(
        Path("runs/x"), {**result(), "method": "full"}, "plain"
    )


def test_ticks_are_round_and_cover_the_values() -> None:
    for low, high in [(0.0, 1.0), (0.031, 0.98), (-3.2, 7.1), (5.0, 5.0), (0.0, 0.0), (1e-5, 9e-4)]:
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 7


def test_long_curves_are_thinned_and_odd_values_left_out() -> None:
    thinned = thin_out([(float(n), 1.0) for n in range(10_000)])
    assert len(thinned) <= POINTS_MAX
    assert all(y == 1.0 for _, y in thinned)
    assert line_chart("x", [], "step") == ""
    assert "nan" not in line_chart("x", [Series("a", [(1, 2.0), (2, float("nan")), (3, 4.0)], "train")], "step")


def test_nothing_in_data_steers_a_terminal() -> None:
    assert safe("a\x1b[31mb\x07\x9b") == "a\\x1b[31mb\\x07\\x9b"
    assert safe("tab\tand\nline") == "tab\tand\nline"


def test_names_that_steer_a_terminal_are_spelled_out_wherever_they_are_printed(tmp_path: Path) -> None:
    hostile = "a\x1b]0;title\x07\x9b2J\udcff.jsonl"
    for live in (True, False):
        file = io.StringIO()
        display = Display(file, live=live)
        display.console = Console(file=file, force_terminal=live, highlight=False, soft_wrap=True)
        display.log_to(tmp_path / "log.txt")
        display.line(hostile)
        display.fact("file", hostile)
        display.warn(str(Problem("data.empty", hostile, hostile, hostile)))
        display.stream(hostile)
        display.progress(f"[bold]{hostile}", 0, 2, hostile)
        display.progress(f"[bold]{hostile}", 2, 2, hostile)
        said = file.getvalue() + (tmp_path / "log.txt").read_text(encoding="utf-8")
        assert not re.search("\x1b\\]|\x07|\x9b|\udcff", said)
        assert "\\x1b]0;title\\x07\\x9b2J\\udcff.jsonl" in said
    told = json_text({"file": hostile})
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", told)
    assert json.loads(told) == {"file": hostile}
    write_json(tmp_path / "data.json", {"file": hostile})
    assert read_json(tmp_path / "data.json") == {"file": hostile}


def test_sizes_and_times_in_their_units() -> None:
    assert [in_bytes(n) for n in (5 << 20, 3 << 30)] == ["5 MiB", "3.0 GiB"]
    assert [in_time(s) for s in (5, 300, 7200)] == ["5 s", "5.0 min", "2.0 h"]


def test_names_keep_their_letters_where_they_begin_no_sentence() -> None:
    found = result()
    found["flips"] = {"metric": "right", "fixed": 3, "broken": 1, "rows": 20, "p": 0.625}
    shown = report_page(found, rows(0), rows(5.0), [], DATA, build_config())
    assert "3 rows fixed and 1 broken of 20 (McNemar&#x27;s exact p 0.625)." in shown


def test_an_interval_without_zero_that_rests_on_few_rows_may_be_chance() -> None:
    # Five of eight rows fixed and none broken: McNemar's exact p is 2 * 0.5**5 = 0.0625.
    before, after = (
        Ratio(np.array([*values, 1.0, 1.0, 1.0]), np.ones(8), right=True) for values in ([0.0] * 5, [1.0] * 5)
    )
    found = compare("accuracy", before, after)
    assert found.p == 0.0625
    assert clearness(found.to_json()) == "may be chance"
    wide = {"low": -1.0, "high": 1.0, "rows": 8}
    assert [clearness({**wide, "direction": d}) for d in (1, 0, -1)] == ["better", "unclear", "worse"]


def grouped(measured: Measured, group: Callable[[int], str]) -> Measured:
    return Measured([replace(row, group=group(n)) for n, row in enumerate(measured.rows)], measured.task)


def test_what_is_decided_over_groups_says_so_wherever_it_is_told() -> None:
    """Twenty rows in ten groups, of which twelve rows, in six groups, were answered."""
    sides = [grouped(rows(gain), lambda n: f"g{n // 2}") for gain in (0.0, 5.0)]
    found = result(5.0, *sides)
    over = {name: (gap["rows"], gap["grouped"]) for name, gap in found["differences"].items()}
    assert (over["nll"], over["rouge_l"], found["groups"]) == ((10, True), (6, True), 10)
    assert " on 10 groups that it never saw " in sentence(found)
    assert {(line[0], *line[4:]) for line in score_table(found)} >= {
        ("loss per predicted token", "better", "10 groups"),
        ("ROUGE-L", "needs 8 groups", "6 groups"),
    }
    page = report_page(found, *sides, [], DATA, build_config())
    assert "it is decided over 10 groups." in page
    assert "(bootstrap over groups;" in page
    assert "<td>6 groups</td>" in page
    assert "| 10 groups |" in model_card(Path("runs/x"), found, "plain")
    assert "decided over" not in report_page(result(), rows(0), rows(5.0), [], DATA, build_config())


def test_groups_that_decide_are_those_of_the_metric_itself() -> None:
    """Picked answers stand for twelve of twenty rows, in three groups, so that more groups are needed than there are."""
    sides = [
        Measured([replace(row, probability=None if row.answer is None else 0.5) for row in side.rows], "chat")
        for side in (grouped(rows(gain), lambda n: f"g{n // 4}") for gain in (0.0, 5.0))
    ]
    found = result(5.0, *sides)
    assert (found["difference"]["metric"], found["groups"]) == ("accuracy", 3)
    assert "it is decided over 3 groups." in report_page(found, *sides, [], DATA, build_config())
    assert sentence(found).endswith("too small to decide: at least 8 groups are needed")


def test_models_side_by_side_say_over_how_many_groups_they_differ() -> None:
    sides = [grouped(rows(gain), lambda n: f"g{n // 2}") for gain in (0.0, 5.0)]
    models = [
        Evaluated(name, side, {key: tell_metric(metric) for key, metric in side.metrics().items()})
        for name, side in zip("ab", sides, strict=True)
    ]
    found = build_versus(models, {})
    assert "a, b on 20 rows" in versus_page(found)
    assert "<td>10 groups</td></tr>" in versus_page(found)
    for say in (lambda display: say_versus(display, found), lambda display: say_evaluated(display, models[0])):
        file = io.StringIO()
        say(Display(file, live=False))
        (line,) = [line for line in file.getvalue().splitlines() if line.startswith("  loss per predicted token ")]
        assert line.endswith(" 10 groups")
    assert json.loads(json_text(found.to_json()))["pairs"][0]["differences"]["nll"]["grouped"]


def test_a_single_group_is_told_without_bounds() -> None:
    sides = [grouped(rows(gain), lambda _: "all") for gain in (0.0, 5.0)]
    found = json.loads(json_text(result(5.0, *sides), allow_nan=False))
    gap = found["differences"]["nll"]
    assert gap.pop("value") == pytest.approx(-1.0)
    assert gap == {"low": None, "high": None, "rows": 1, "grouped": True, "direction": 0, "p": 1.0}
    gap["value"] = -1.0
    assert found["verdict"] == "not_measured"
    (line,) = [line for line in score_table(found) if line[0] == "loss per predicted token"]
    assert line[3:] == ("-1.000 [not known]", "needs 8 groups", "1 group")
    page = report_page(found, *sides, [], DATA, build_config())
    assert "95% interval not known" in page
    assert "decided over 1 group." in page


def test_old_rows_in_groups_are_counted_as_groups() -> None:
    old = {"metric": "nll", "rows": 3, "grouped": True, "verdict": "too few rows", "bound": 0.1}
    sides = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in ("before", "after", "difference")}
    told = {"verdict": "too few rows", "bound": 0.05, "parts": {"first": {**old, **sides}}}
    assert old_words(told) == (
        "too few groups of old rows to tell whether what it learned before is kept: "
        "loss per predicted token 0.500 -> 0.500 on 3 groups of first"
    )
    assert old_lines(told)[0][2::5] == ("3 groups", "too few groups")
    kept = {"first": {**old, **sides, "verdict": "kept", "rows": 1, "grouped": False}}
    assert old_words({**told, "verdict": "kept", "parts": kept}).endswith("on 1 row of first")


def test_what_differs_from_the_reference_is_marked_and_nothing_else() -> None:
    reference = "Plan: more fluids;\nstop amlodipine"
    assert marked("Plan: more  fluids; stop amlodipine", reference) == "Plan: more  fluids; stop amlodipine"
    wanted = "Plan: <mark>less</mark> fluids; <mark>&lt;b&gt;stop</mark> amlodipine"
    assert marked("Plan: less fluids; <b>stop amlodipine", reference) == wanted
    assert marked(reference, "Plan: more fluids;") == "Plan: more fluids;\n<mark>stop amlodipine</mark>"
    assert (
        marked("The plan: drink fluids; that is all", reference) == "The plan: drink fluids; that is all"
    )  # most of it
    assert marked("", reference) == ""
    # What goes round in circles against a table would take minutes to find: it isn't looked at.
    table = "".join(f"| {n} " for n in range(300))
    assert marked("| " * 600, table) == ("| " * 600)
    long = marked("same " * 2_000, "same " * 2_000)
    assert long.endswith("[6,000 more characters]")
    assert "<mark>" not in long


def test_classes_are_counted_over_the_runs_own_rows_as_they_are() -> None:
    own = [RowResult(f"f:{n}", 1.0, 1.0, "asked", "ab"[n % 2], "a", True, probability=0.9) for n in range(20)]
    beside = [
        replace(row, where=f"{row.where}!", reference="a", **part)
        for part in ({"part": "typing errors", "varied": True}, {"part": "an earlier run"})
        for row in own
    ]
    alone, both = Measured(own, "classification"), Measured([*own, *beside], "classification")
    assert told_sections(both, both) == told_sections(alone, alone)


def test_large_numbers_of_an_axis_are_written_out() -> None:
    drawn = line_chart("Loss by token", [Series("loss", [(0, 3.0), (333_140, 0.5)], "train")], "tokens")
    assert ">100,000<" in drawn
    assert "tokens 333,140" in drawn
    assert "e+05" not in drawn
    marked_at = line_chart(
        "By rows", [Series("accuracy", [(300, 0.5), (3000, 0.9)], "watch")], "rows", marks=(300, 3000)
    )
    assert re.search(r'text-anchor="middle">300<', marked_at)
    assert re.search(r'text-anchor="end">3000<', marked_at)  # else the page's edge cuts it
