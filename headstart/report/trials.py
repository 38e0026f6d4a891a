"""Several runs on one question as one page: a table of them all, and their curves over the same watched rows."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.display import in_time
from headstart.evaluate.versus import Pair
from headstart.report.charts import Series, ends, line_chart
from headstart.report.frame import document, section
from headstart.report.reasons import NOT_MEASURED, curve_words, scratch_words, seeds_words
from headstart.report.tables import cell, table
from headstart.report.versus import pair_section
from headstart.report.words import VERDICTS, bounds, named, score_words, shift

STYLES = {"better": "good", "worse": "bad"}
PRETRAINED, RANDOM = "with the head start", "from random weights"
JOULES_PER_KWH = 3.6e6


def sweep_page(found: Mapping[str, Any]) -> str:
    """Return the page of a sweep. Everything that comes from data is escaped; nothing is loaded from anywhere."""
    winner, over = found["winner"], found["over"]
    title = f"{len(found['rungs'][0]['trials'])} trials over {', '.join(over)}"
    chosen = ", ".join(f"{key} = {winner['settings'][key]}" for key in over)
    lead = (
        f"Chosen by the loss on the watched rows; {found['full_runs']:.1f} full runs of training in all. "
        f"{_proven(winner)}, on rows that no trial was scored on."
    )
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="verdict flat">{html.escape(chosen)}</p><p class="lead">{html.escape(lead)}</p>',
        _links([("report of the winner", Path(winner["run"]) / "report.html")], found["sweep"]),
        section("Trials", _sweep_table(found)),
        section("Loss on the watched rows", _rung_curves(found)),
    ]
    return document(title, "".join(body))


def _proven(outcome: Mapping[str, Any]) -> str:
    result = outcome["result"]
    verdict = VERDICTS[result["verdict"]]
    return f"{verdict[:1].upper()}{verdict[1:]}: {score_words(result, result['difference']['metric'])}"


def _sweep_table(found: Mapping[str, Any]) -> str:
    """Return a row a trial, the best first: its values, its loss on each rung, what it took."""
    over, rungs = list(found["over"]), found["rungs"]
    by_number: dict[str, list[Mapping[str, Any]]] = {}
    for rung in rungs:
        for trial in rung["trials"]:
            by_number.setdefault(Path(trial["run"]).name, []).append(trial)

    def place(trials: list[Mapping[str, Any]]) -> tuple[int, bool, float]:
        loss = trials[-1]["loss"]
        return -len(trials), loss is None, loss or 0.0

    lines = []
    for trials in sorted(by_number.values(), key=place):
        values = [str(trials[0]["settings"][key]) for key in over]
        style = "good" if trials[-1]["run"] == found["winner"]["run"] else ""
        losses = [cell(_loss(trial), style) for trial in trials]
        losses += [cell("")] * (len(rungs) - len(losses))
        taken = cell(f"{sum(t['tokens'] for t in trials):,}"), cell(in_time(sum(t["train_s"] for t in trials)))
        lines.append([*(cell(value, style) for value in values), *losses, *taken])
    head = [*over, *(f"loss at {rung['share']:.0%}" for rung in rungs), "tokens", "training"]
    note = (
        "<p>Each column is a rung: what its trials were trained on, as a part of a full run, each to the end of its own schedule. "
        "The best third of a rung went on to the next one. Losses are in nats a target, the lowest of a trial.</p>"
    )
    return table(head, lines) + note


def _loss(outcome: Mapping[str, Any]) -> str:
    return f"{outcome['loss']:.4f}" if outcome["loss"] is not None else f"failed: {outcome['failed']}"


def _rung_curves(found: Mapping[str, Any]) -> str:
    winner = found["winner"]["run"]
    others = [trial for rung in found["rungs"] for trial in rung["trials"] if trial["run"] != winner]
    lines = [Series("" if number else "other trials", _points(t), "train") for number, t in enumerate(others)]
    lines.append(Series("the winner", _points(found["winner"]), "watch", dots=True))
    return line_chart("Loss on the watched rows by tokens", lines, "tokens of training")


def scratch_page(found: Mapping[str, Any], pair: Pair | None) -> str:
    """Return the page of a run beside random weights. Everything that comes from data is escaped."""
    title = f"{found['run']} beside the same network from random weights"
    saved = f"{found['saved']:.1f} times fewer tokens" if found["saved"] is not None else "The head start saved nothing"
    saved = "There before any training" if found.get("at_once") else saved
    words = scratch_words(found)
    chart = line_chart(
        "Loss on the watched rows by tokens",
        [
            Series(RANDOM, _points(found["random"]), "train", dots=True),
            Series(PRETRAINED, _points(found["tuned"]), "watch", dots=True),
        ],
        "tokens of training",
    )
    note = (
        "<p>The same rows in the same order, as many of them. From random weights all weights train, at a rate chosen for that, and "
        "nothing ends it early.</p>"
    )
    links = [("report of the run", found["run"]), ("report from random weights", found["random"]["run"])]
    folder = str(Path(found["page"]).parent)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="verdict {"good" if found.get("at_once") or (found["saved"] or 0) > 1 else "flat"}">{html.escape(saved)}</p>',
        f'<p class="lead">{html.escape(words[:1].upper() + words[1:])}.</p>',
        _links([(name, Path(run) / "report.html") for name, run in links], folder),
        section("Loss on the watched rows", chart + note),
        section("When a loss was reached", _reached_table(found)),
        section("What training took", _cost_table(found)),
        pair_section(pair) if pair else section("On rows of the proof", "<p>Not measured: the rows differ.</p>"),
    ]
    return document(title, "".join(body))


def _reached_table(found: Mapping[str, Any]) -> str:
    def told(point: Mapping[str, Any] | None) -> list[str]:
        return [cell(f"{point['tokens']:,}"), cell(in_time(point["train_s"]))] if point else [cell("not reached")] * 2

    rows = [
        [cell(f"{item['loss']:.4f}"), cell(item["whose"]), *told(item["tuned"]), *told(item["random"])]
        for item in found["reached"]
    ]
    head = ["loss", "", f"tokens {PRETRAINED}", "training", f"tokens {RANDOM}", "training"]
    return (
        table(head, rows)
        + "<p>As far as it was looked: at each evaluation of the watched rows; before the first step by the loss of the untouched model on the rows of the proof.</p>"
    )


def _cost_table(found: Mapping[str, Any]) -> str:
    sides = [(found[key], found["costs"][key]) for key in ("tuned", "random")]
    price = f"cost at {found['price']:g} an hour" if found["price"] is not None else "cost"
    facts = [
        ("tokens", [f"{outcome['tokens']:,}" for outcome, _ in sides]),
        ("training", [in_time(cost["train_s"]) for _, cost in sides]),
        (price, [f"{cost['cost']:.4g}" if cost["cost"] is not None else "no price (--price)" for _, cost in sides]),
        ("energy of the processor", [energy_words(cost["energy_j"]) for _, cost in sides]),
    ]
    return table(["", PRETRAINED, RANDOM], [[cell(name), *map(cell, values)] for name, values in facts])


def curve_page(found: Mapping[str, Any]) -> str:
    """Return the page of a learning curve. Everything that comes from data is escaped."""
    metric, counts = found["metric"], found["rows"]
    title = f"{named(metric)} by the rows trained on"
    words = curve_words(found) or f"From {counts[0]:,} to {counts[-1]:,} rows, each a run of its own"
    ways = [(RANDOM, found["random"], "train"), (PRETRAINED, found["tuned"], "watch")]
    lines = []
    for name, outcomes, style in ways:
        scored = [(n, o["result"]["after"][metric]) for n, o in zip(counts, outcomes, strict=False) if o["result"]]
        points = [(n, score["value"]) for n, score in scored]
        spans = [ends(score) for _, score in scored]
        lines.append(Series(name, points, style, dots=True, bounds=spans))
    note = (
        "<p>All runs were scored on the same rows, which none of them was trained on; with bars the 95% interval over these. The rows of "
        "a smaller run are among those of a larger one.</p>"
    )
    last = Path(found["tuned"][-1]["run"]) / "report.html"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{html.escape(words[:1].upper() + words[1:])}.</p>',
        _links([("report of the run on most rows", last)], found["curve"]),
        section(title, line_chart(title, lines, "rows trained on", 280, marks=counts) + note),
        section("Runs", _curve_table(found, ways[::-1])),
    ]
    return document(title, "".join(body))


def _curve_table(found: Mapping[str, Any], ways: Sequence[tuple[str, Sequence[Mapping[str, Any]], str]]) -> str:
    rows = []
    for name, outcomes, _ in ways:
        for count, outcome in zip(found["rows"], outcomes, strict=False):
            taken = [cell(f"{outcome['tokens']:,}"), cell(in_time(outcome["train_s"]))]
            rows.append([cell(f"{count:,}"), cell(name), *_scored(outcome, found["metric"]), *taken])
    return table(["rows", "", "before", "after", "difference", "", "tokens", "training"], rows)


def seeds_page(found: Mapping[str, Any]) -> str:
    """Return the page of runs that differ in their seed. Everything that comes from data is escaped."""
    words = seeds_words(found)
    title = f"The same run with {len(found['seeds'])} seeds"
    rows = [
        [cell(str(outcome["settings"]["seed"])), *_scored(outcome, found["metric"]), cell(in_time(outcome["train_s"]))]
        for outcome in found["seeds"]
    ]
    note = (
        "<p>A run's own interval says how far other rows would have given another difference, the spread over seeds how far other luck in "
        "training would. All runs were scored on the same rows, so the best of them is no better model by that: the first is as "
        "good as any.</p>"
    )
    head = ["seed", "before", "after", "difference", "", "training"]
    links = [(f"seed {o['settings']['seed']}", Path(o["run"]) / "report.html") for o in found["seeds"] if o["result"]]
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{html.escape(words[:1].upper() + words[1:])}.</p>',
        section(named(found["metric"]), table(head, rows) + note),
        _links(links, found["runs"]),
    ]
    return document(title, "".join(body))


def _scored(outcome: Mapping[str, Any], metric: str) -> list[str]:
    """Return the cells of a run's score before and after, and of what changed."""
    result = outcome["result"]
    if result is None:
        return [cell(""), cell(f"failed: {outcome['failed']}", "bad"), cell(""), cell("")]
    before, after, gap = (result[key][metric] for key in ("before", "after", "differences"))
    verdict = result["verdict"]
    return [
        cell(f"{before['value']:.3f}"),
        cell(f"{after['value']:.3f} [{bounds(after)}]"),
        cell(shift(gap)),
        cell(VERDICTS[verdict], STYLES.get(verdict, "flat")),
    ]


def energy_words(joules: float | None) -> str:
    """Return energy in the unit that is paid for."""
    return f"{joules / JOULES_PER_KWH:.3g} kWh" if joules is not None else NOT_MEASURED


def _points(outcome: Mapping[str, Any]) -> list[tuple[float, float]]:
    return [(point["tokens"], point["loss"]) for point in outcome["points"]]


def _links(links: Sequence[tuple[str, Path]], folder: str) -> str:
    """Return links to pages that lie in a study's folder or beside it."""
    shown = (
        f'<a href="{html.escape(Path(os.path.relpath(path, folder)).as_posix())}">{html.escape(name)}</a>'
        for name, path in links
    )
    return f"<p>{', '.join(shown)}</p>"
