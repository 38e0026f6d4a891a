"""The report: one HTML file that says in its first screen whether the model got better, and then why to believe it."""

from __future__ import annotations

import html
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from headstart.config import Config, known_keys, setting
from headstart.display import in_bytes, in_time
from headstart.evaluate.graders.rows import ungraded_lines
from headstart.evaluate.measure import Measured, RowResult
from headstart.report.charts import Change, Series, change_chart, line_chart
from headstart.report.frame import document, marked
from headstart.report.frame import excerpt as _text
from headstart.report.frame import section as _section
from headstart.report.tables import cell, table
from headstart.report.told import told_sections
from headstart.report.watched import watched_section
from headstart.report.words import (
    VERDICTS,
    cures,
    data_facts,
    flips_words,
    guard_lines,
    is_predicted,
    lineage_facts,
    named,
    old_lines,
    outside_words,
    over,
    robust_lines,
    score_table,
    sentence,
    speed_facts,
    surprise_lines,
    trouble_facts,
    unit,
    wins_words,
)

FILES = 3  # named in the title
SAMPLES = {
    "instruction": "Answers before and after",
    "unsupervised": "Texts before and after",
    "supervised": "Rows before and after",
    "preference": "Answers before and after",
}
STYLES = {"better": "good", "worse": "bad"}
# Of texts that are written otherwise.
PREDICTED = (
    " Here the text itself is what is predicted, and written otherwise it is another one, dearer or cheaper by itself: so it "
    "is the difference to the untouched model that tells."
)
GUARD_STYLES = {"kept": "good", "lost": "bad"}


def report_page(
    result: Mapping[str, Any],
    before: Measured,
    after: Measured,
    metrics: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    config: Config,
) -> str:
    """Return the page. Everything that comes from data is escaped; nothing is loaded from anywhere."""
    begun = " from random weights" if result["weights"] == "random" else ""
    name = f"{result['model']['name']}{begun} on {_file_names(data)}"
    trouble = trouble_facts(result, metrics, data)
    watched = watched_section(result["watch"], metrics)
    comes_from = lineage_facts(result.get("lineage"))
    words = _words(result.get("words"))
    body = [
        _first_screen(name, result),
        _section("Seven reasons", _reasons(result)),
        _section("Scores", _scores(result)),
        _section(SAMPLES[result["kind"]], _samples(before, after)),
        *([_section("Words", words)] if words else []),
        *(_section(title, part) for title, part in told_sections(before, after)),
        _section("Training", _curves(metrics)),
        *([_section("What became of the answers", watched)] if watched else []),
        *([_section("What went otherwise than planned", _facts(trouble))] if trouble else []),
        _section("Where the time went", _facts(speed_facts(result))),
        *([_section("Lineage", _facts(comes_from))] if comes_from else []),
        _section("Data", _facts(data_facts(data)) + _dropped(data)),
        _section("Plan and what happened", _plan_and_actual(result)),
        _section("Settings", _settings(config)),
        _section("Environment", _facts(_environment(result))),
    ]
    return document(f"{name}: {VERDICTS[result['verdict']]}", "".join(body))


def _capital(text: str) -> str:
    """Return a text with a first letter that begins a sentence; names within stay as they are written."""
    return text[:1].upper() + text[1:]


def _file_names(data: Mapping[str, Any]) -> str:
    names = [PurePath(file["name"]).name for file in data["files"]]
    more = f" and {len(names) - FILES:,} more" if len(names) > FILES else ""
    return ", ".join(names[:FILES]) + more


def _first_screen(name: str, result: Mapping[str, Any]) -> str:
    verdict = VERDICTS[result["verdict"]]
    lead = sentence(result).removeprefix(f"{verdict}: ")
    speed, memory = result["speed"], result["memory"]
    flips = result["flips"]
    better, worse = ("fixed", "broken") if flips["metric"] == "right" else ("with less loss", "with more")
    cards = [
        (f"{flips['fixed']:,} / {flips['broken']:,}", f"rows {better} / {worse}"),
        (f"{min(result['rows']['train'], result['tokens']['rows_seen']):,}", "rows trained on"),
        (in_time(speed["train_s"]), "of training"),
        _rate(result),
        (in_bytes(memory["peak_bytes"]), "of memory at most"),
    ]
    shown = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>" for value, what in cards)
    changes = [
        Change(
            named(key),
            result["before"][key],
            result["after"][key],
            {"better": True, "worse": False}.get(clear),
        )
        for key, (*_, clear, _) in zip(result["differences"], score_table(result), strict=True)
    ]
    mend = "".join(f"<p>To mend: {html.escape(cure)}.</p>" for cure in cures(result, "RUN"))
    return (
        f"<h1>{html.escape(name)}</h1>"
        f'<p class="verdict {STYLES.get(result["verdict"], "flat")}">{html.escape(verdict[0].upper() + verdict[1:])}</p>'
        f'<p class="lead">{html.escape(lead[0].upper() + lead[1:])}.</p>{mend}{change_chart(changes)}<div class="cards">{shown}</div>'
    )


def _rate(result: Mapping[str, Any]) -> tuple[str, str]:
    if result["task"] != "images":
        return f"{result['speed']['real_tokens_per_s']:,.0f}", "real tokens a second"
    return f"{result['tokens']['rows_seen'] / max(1e-9, result['speed']['train_s']):,.1f}", "images a second"


def _scores(result: Mapping[str, Any]) -> str:
    rows = [
        [*map(cell, values), cell(clear, STYLES.get(clear, "flat")), cell(counted)]
        for *values, clear, counted in score_table(result)
    ]
    answered = f"; of the answers, over the {result['answered']:,} rows that were answered"
    primary = result["differences"][result["difference"]["metric"]]
    grouped = f" Rows of one group are drawn and swapped together: it is decided over {over(primary)}."
    note = (
        f"<p>Over {result['rows']['proof']:,} rows that were never trained on and chose nothing during training"
        f"{answered if result['task'] == 'chat' else ''}. In brackets the 95% interval of "
        f"the paired difference (bootstrap over {unit(primary)}; of what is right or wrong, from the counts). It is called better or worse "
        "where the interval is clear of zero and chance (swaps of before and after, or McNemar's exact test) makes such a "
        f"difference in less than 5 of 100 cases.{grouped * primary.get('grouped', False)} {html.escape(_capital(flips_words(result['flips'])))}.</p>"
    )
    if result["task"] == "preference":
        note += (
            "<p>Preference accuracy is how often the chosen answer gained more likelihood than the rejected one (a tie counts "
            "half, so the untouched model has 0.5). Log-probabilities are of whole answers; neither side's own decides the verdict.</p>"
        )
    if result["task"] == "reward":
        begun = (
            "a new head, which begins at zero, so that each pair is a tie"
            if result["new_head"]
            else "the reward model as it was"
        )
        note += f"<p>Before is {begun}. A tie counts half. Rewards have no zero and no unit: only their differences tell.</p>"
    wins = [] if isinstance(result["wins"], str) else result["wins"]
    note += "".join(f"<p>{html.escape(_capital(wins_words(item)))}.</p>" for item in wins)
    missed = "".join(f"<p>{html.escape(line)}.</p>" for line in ungraded_lines(result.get("ungraded", {})))
    return (
        table(["", "before", "after", "difference", "", "over"], rows)
        + note
        + missed
        + _old(result)
        + _guard(result)
        + _robust(result)
    )


def _old(result: Mapping[str, Any]) -> str:
    """Return what became of the rows that were held out of the runs that the model comes from."""
    old = result.get("old")
    if not old:
        return ""
    if isinstance(old, str):
        return "<h3>What it learned before</h3><p>Not measured, so that it can't be called better.</p>"
    rows = [[*map(cell, values), cell(kept, GUARD_STYLES.get(kept, "flat"))] for *values, kept in old_lines(old)]
    note = (
        "<p>Rows that were held out of the runs that it comes from, and never trained on. Lost: by its interval a metric fell by more "
        f"than {old['bound']:.0%} of what that run had gained on these rows (the bound); kept: by no more.</p>"
    )
    head = ["", "", "over", "before", "after", "difference", "bound", ""]
    return "<h3>What it learned before</h3>" + table(head, rows) + note


def _guard(result: Mapping[str, Any]) -> str:
    guard = result["guard"]
    if isinstance(guard, str):
        return "<h3>What it knew before</h3><p>Not measured.</p>"
    rows = [
        [
            cell(name),
            cell(named(guard["parts"][name]["metric"])),
            *map(cell, values),
            cell(kept, GUARD_STYLES.get(kept, "flat")),
        ]
        for name, *values, kept in guard_lines(guard)
    ]
    note = (
        "<p>General text and questions that have nothing to do with the job. Kept: by its interval the loss grew by no "
        f"more than {guard['bound']:.0%}; lost: by more. A tenth more loss is that of a model of less than a third of the size "
        "(Kaplan et al., 2020).</p>"
    )
    return "<h3>What it knew before</h3>" + table(["", "", "before", "after", "loss grew by", ""], rows) + note


def _robust(result: Mapping[str, Any]) -> str:
    robust = result.get("robust", "not measured")
    if isinstance(robust, str):
        return ""
    rows = [[*map(cell, values), cell(clear, STYLES.get(clear, "flat"))] for *values, clear in robust_lines(robust)]
    predicted = is_predicted(robust)
    gap = "difference to the untouched model" if predicted else "difference to that"
    head = ["", "over", "untouched model", "tuned model", "as they are", gap, ""]
    metric = next((part["metric"] for part in robust["varied"].values()), "")
    note = (
        f"<p>{html.escape(_capital(named(metric)))} on rows of the proof that are written otherwise, and of the tuned model on the "
        "same rows as they are. Only rows that a way changes count in it; each is judged for itself, and none decides the verdict."
        f"{PREDICTED if predicted else ''}</p>"
        if rows
        else ""
    )
    said = "" if isinstance(robust["outside_auroc"], str) else f"<p>{html.escape(_capital(outside_words(robust)))}.</p>"
    return "<h3>Inputs written otherwise</h3>" + (table(head, rows) if rows else "") + note + said


def _words(words: Mapping[str, Any] | str | None) -> str:
    """Return the words that the model was most surprised by."""
    if not words or isinstance(words, str):
        return ""
    titles = {"gained": "Learned most", "before": "Most surprising before", "after": "Most surprising after"}
    columns = "".join(
        f"<div><h4>{title}</h4>{table(['', 'times', 'bits before', 'bits after'], rows)}</div>"
        for side, title in titles.items()
        for rows in [[[*map(cell, line)] for line in surprise_lines(words[side])]]
    )
    note = (
        "<p>What a word of the first documents that were held out cost on the mean, in bits: 1 where the model gives it a chance of "
        "a half, 10 where of one in 1,024.</p>"
    )
    return f'<div class="samples">{columns}</div>{note}'


def _reasons(result: Mapping[str, Any]) -> str:
    """Return what is known of each reason to fine-tune, and how to measure what isn't."""
    rows = []
    for reason in result["reasons"].values():
        style = "" if reason["measured"] else ' class="open"'
        said = html.escape(_capital(reason["says"]))
        how = (
            f"<small>{'More' if reason['measured'] else 'How to'}: {html.escape(reason['how'])}</small>"
            if reason["how"]
            else ""
        )
        head = f"<dt>{html.escape(reason['title'])} <small>{html.escape(reason['asks'])}</small></dt>"
        rows.append(f"<div{style}>{head}<dd>{said}. {how}</dd></div>")
    return f'<dl class="reasons">{"".join(rows)}</dl>'


def _samples(before: Measured, after: Measured) -> str:
    pairs = [
        (b, a) for b, a in zip(before.own, after.own, strict=True) if a.answer is not None and b.answer is not None
    ]
    if not pairs and not after.own[0].bytes:
        return "<p>No rows were answered (eval.generate is 0).</p>"
    pairs = pairs or list(zip(before.own, after.own, strict=True))
    ordered = sorted(pairs, key=lambda pair: _gain(*pair))
    middle = ordered[1:-1]
    chosen = [("Gained most", ordered[-1])]
    chosen += [("Gained least", ordered[0])] if len(ordered) > 1 else []
    chosen += [("At random", pair) for pair in random.Random(0).sample(middle, min(3, len(middle)))]  # noqa: S311
    shown = "".join(_sample(title, *pair, is_open=number == 0) for number, (title, pair) in enumerate(chosen))
    note = "<p>Marked is what stands elsewhere or not at all in the reference, and in the reference what the tuned model left out.</p>"
    return shown + note * ("<mark>" in shown)


def _gain(before: RowResult, after: RowResult) -> float:
    return (before.nll - after.nll) / max(1.0, after.targets)


def _sample(title: str, before: RowResult, after: RowResult, *, is_open: bool) -> str:
    loss = f"loss {before.nll / max(1, before.targets):.3f} to {after.nll / max(1, after.targets):.3f}"
    grades = "".join(
        f", {name} {_grade(before.grades.get(name))} to {_grade(score)}" for name, score in after.grades.items()
    )
    said = html.escape(f"{title}: {after.where}, {loss}{grades}")
    head = f"<details{' open' if is_open else ''}><summary>{said}</summary>"
    if after.answer is None:
        return f'{head}<pre class="asked">{_text(after.asked)}</pre></details>'
    texts = (("before", "before", before), ("after", "after", after))
    columns = "".join(
        f'<div class="{style}"><h4>{name}{"" if row.stopped else " (cut at the limit)"}</h4><pre>{marked(row.answer or "", after.reference)}</pre></div>'
        for name, style, row in texts
    )
    columns += f"<div><h4>reference</h4><pre>{marked(after.reference, after.answer)}</pre></div>"
    return f'{head}<pre class="asked">{_text(after.asked)}</pre><div class="samples">{columns}</div></details>'


def _grade(score: float | None) -> str:
    return "not graded" if score is None else f"{score:.3g}"


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    steps = [record for record in metrics if "loss" in record]
    train = Series("loss of each step", [(r["step"], r["loss"]) for r in steps], "train")
    watched = [(r["step"], r["watch_loss"]) for r in metrics if "watch_loss" in r]
    watch = Series("loss on the watched rows", watched, "watch", dots=True)
    rates = Series("learning rate", [(r["step"], r["lr"]) for r in steps], "lr")
    return line_chart("Loss by step", [train, watch], "step") + line_chart(
        "Learning rate by step", [rates], "step", 120
    )


def _plan_and_actual(result: Mapping[str, Any]) -> str:
    plan, speed = result["plan"], result["speed"]
    rows = [
        ("time training", in_time(plan["train_s"]), in_time(speed["train_s"])),
        ("time scoring", in_time(plan["eval_s"]), in_time(speed["eval_s"])),
        ("time saving", in_time(plan["save_s"]), in_time(speed["save_s"])),
        ("memory", in_bytes(plan["memory_bytes"]), in_bytes(result["memory"]["peak_bytes"])),
        (
            "steps",
            f"{plan['steps']:,}",
            f"{result['steps']['taken']:,} ({result['steps']['end']}; best {result['steps']['best']})",
        ),
        ("tokens of rows", f"{plan['row_tokens']:,}", f"{result['tokens']['rows']:,}"),
        ("tokens computed", f"{plan['tokens']:,}", f"{result['tokens']['computed']:,}"),
    ]
    return table(["", "planned", "actual"], [[cell(text) for text in row] for row in rows])


def _settings(config: Config) -> str:
    rows = [[cell(key), cell(str(setting(config.settings, key))), cell(config.source(key))] for key in known_keys()]
    return table(["setting", "value", "from"], rows)


def _dropped(data: Mapping[str, Any]) -> str:
    dropped = data["dropped"]
    rows = [[cell(item["where"]), cell(f"{item['tokens']:,} tokens, too long")] for item in dropped["too_long"]]
    rows += [[cell(item["where"]), cell(item["what"])] for item in dropped["bad"]]
    if not rows:
        return "<p>No row was dropped.</p>"
    shown = table(["row", "why it was left out"], rows[:100])
    more = f"<p>and {len(rows) - 100:,} more, in data.json.</p>" if len(rows) > 100 else ""
    return f"<details><summary>{len(rows):,} rows were left out</summary>{shown}{more}</details>"


def _environment(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    environment = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    model = result["model"]
    pin = model["revision"] or model["sha256"]
    return [
        ("model", f"{model['name']} ({model['kind']}{', ' + pin if pin else ''})"),
        *([("begun with", result["plan"]["start"])] if result["plan"]["start"] else []),
        ("processor", f"{environment['processor']}, {environment['cores']} cores, {environment['device']}"),
        ("memory", in_bytes(environment["memory_bytes"])),
        ("platform", environment["platform"]),
        ("versions", versions),
    ]


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return table([], [[cell(name), cell(value)] for name, value in facts])
