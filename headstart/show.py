"""What the verbs found, as lines of a terminal; and what lies on this disk, listed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from headstart.data.encode import Encoder
from headstart.data.records import Labelled, Picture, Preference
from headstart.display import Display, safe
from headstart.evaluate.flips import Flips
from headstart.evaluate.measure import LABELS
from headstart.evaluate.metrics import as_text
from headstart.evaluate.versus import Evaluated, Versus
from headstart.files import read_json
from headstart.lineage import find_parents
from headstart.machine import home
from headstart.models.source import BUILT_IN, RECORD, cached
from headstart.report.strength import strength_lines, strength_words
from headstart.report.versus import flip_line
from headstart.report.words import VERDICTS, bounds, clearness, data_lines, over, plan_facts, shift, wins_words
from headstart.run import RunFolder, find_runs

if TYPE_CHECKING:
    from headstart.data.check import Findings
    from headstart.data.mend import Mended
    from headstart.data.segments import Example
    from headstart.dataset import Data
    from headstart.evaluate.compare import Compared
    from headstart.evaluate.robust import Robust

SHOWN = 20
FIRST = 3  # rows that are named of a finding; the others are in --json
ANSWER = 60  # characters of an answer that flipped
STYLES = {"trained": ("green", "⟦", "⟧"), "context": ("dim", "", ""), "cut": ("red strike", "⟦cut: ", "⟧")}


def say_findings(display: Display, findings: Findings, data: Data) -> None:
    """Say what the check found."""
    display.title("data")
    for line in data_lines(data.prepared):
        display.line(f"  {line}")
    display.title("findings")
    display.fact(
        "rows",
        f"{findings.rows:,} read, {findings.usable:,} usable: {findings.train:,} to train on, {findings.held_out:,} held out",
    )
    lengths = (
        f"median {findings.length_median:,}, 95% under {findings.length_p95:,}, longest {findings.length_longest:,}"
    )
    predicted = f", {findings.targets:,} of them predicted" * bool(findings.targets)
    display.fact("tokens", f"{findings.tokens:,}{predicted}; a row: {lengths}")
    heavy = f"{sum(row.frac for row in findings.longest):.1%} of all tokens are in {len(findings.longest)} rows"
    display.fact("longest", f"{heavy}: {_some([f'{row.where} ({row.tokens:,})' for row in findings.longest])}")
    for finding in findings.quality:
        display.warn(f"{len(finding.rows):,} {finding.what}: {_some(finding.rows)}")
    if findings.control_rows:
        spelled = f"{len(findings.control_rows):,} rows spell control tokens in their text"
        display.warn(f"{spelled} ({_some(findings.control_rows)}); they are read as text")
    for problem in findings.problems[:SHOWN]:
        display.warn(str(problem))
    if len(findings.problems) > SHOWN:
        display.warn(f"and {len(findings.problems) - SHOWN:,} more (all of them: --json)")
    if not findings.problems:
        display.line("  every row can be used", "green")


def _some(rows: Sequence[Any]) -> str:
    return ", ".join(map(str, rows[:FIRST])) + ", ..." * (len(rows) > FIRST)


def say_mended(display: Display, mended: Mended) -> None:
    """Say what was written, and what was done to the rows."""
    display.title("mended")
    display.fact("written", f"{mended.rows:,} rows: {mended.out}")
    dropped = (
        ("bad", mended.bad),
        ("duplicates", mended.duplicates),
        ("near duplicates", mended.near_duplicates),
        ("by graders", mended.unfit),
    )
    display.fact("dropped", ", ".join(f"{count:,} {name}" for name, count in dropped if count or name != "by graders"))
    if mended.redacted:
        counts = sorted(mended.redacted.items())
        display.fact("redacted", ", ".join(f"{count:,} x [{kind.upper()}]" for kind, count in counts))


def say_rows(display: Display, data: Data, count: int) -> None:
    """Print the first rows with their tokens marked as trained, context or cut."""
    from headstart.data.check import show_tokens

    if not count:
        return
    display.title("rows")
    display.markup("  " + "  ".join(_marked(name, name, display) for name in STYLES))
    prepared = data.prepared
    for example in prepared.train.examples[:count]:
        display.line()
        display.line(
            f"{example.where}: {example.token_count:,} tokens, {_aim(example, data)}",
            "bold",
        )
        if isinstance(data.renderer, Encoder):
            display.markup("".join(_marked(s.text, s.kind, display) for s in show_tokens(example, data.renderer)))
    for where, length in prepared.train.dropped[:count]:
        display.line(f"{where}: dropped whole, {length:,} tokens", "red")


def _aim(example: Example, data: Data) -> str:
    record = next((r for r in data.prepared.train.kept if r.where == example.where), None)
    if isinstance(record, Labelled | Picture):
        return f"label {as_text(record.label if isinstance(record.label, tuple) else [record.label])}"
    if isinstance(record, Preference) and not example.target_count:
        return f"{len(record.answers)} answers to score"
    return f"{example.target_count:,} trained"


def _marked(text: str, kind: str, display: Display) -> str:
    style, left, right = STYLES[kind]
    if display.console.is_terminal:
        left = right = ""
    return f"[{style}]{escape(left + safe(text) + right)}[/]"


def say_plan(display: Display, plan: Mapping[str, Any]) -> None:
    """Say what a run would take."""
    display.title("plan")
    for name, value in plan_facts(plan):
        display.fact(name, value)


def say_evaluated(display: Display, found: Evaluated) -> None:
    """Say how a model scored."""
    display.title(f"{found.model} on {len(found.measured.rows):,} rows")
    for note in found.notes:
        display.line(f"  {note}")
    for name, values in found.metrics.items():
        sure = f"95% interval {bounds(values, between=' to ')}"
        display.line(f"  {LABELS.get(name, name):<24} {values['value']:8.3f}   {sure}   {over(values)}")
    if found.robust:
        _say_robust(display, found.robust)


def _say_robust(display: Display, found: Robust) -> None:
    metric = (
        f": {LABELS[found.varied[0].compared.name]} of rows as they are -> written otherwise" if found.varied else ""
    )
    display.title(f"where inputs vary{metric}")
    for item in found.varied:
        _say_compared(display, item.name, item.compared)
    if found.outside:
        auroc = f"{found.outside.value:.3f} [{bounds(found.outside.to_json())}]"
        display.line(f"  text from outside the job is told by confidence: AUROC {auroc} (0.5 is chance)")


def _say_compared(display: Display, name: str, item: Compared) -> None:
    values = f"{item.before.value:8.3f} -> {item.after.value:8.3f}"
    told = item.to_json()
    display.line(f"  {name:<24} {values}   {shift(told):<26} {clearness(told):<14} {over(told)}")


def say_versus(display: Display, found: Versus) -> None:
    """Say how models compare, each with the first."""
    for note in dict.fromkeys(note for model in found.models for note in model.notes):
        display.line(f"  {note}")
    for pair in found.pairs:
        display.title(f"{pair.a} -> {pair.b}, on {found.rows:,} rows")
        for item in pair.compared:
            _say_compared(display, LABELS.get(item.name, item.name), item)
        for wins in pair.wins:
            display.line(f"  {wins_words(wins.to_json(), f'answers of {pair.b}', f'those of {pair.a}')}")
        if pair.flips:
            _say_flips(display, pair.flips)
    if found.settings:
        display.title("settings of the runs that differ")
        for key, each in found.settings.items():
            display.fact(key, "  |  ".join("" if value is None else str(value) for value in each))


def _say_flips(display: Display, flips: Flips) -> None:
    display.line(f"  {flip_line(flips)}")
    for title, some in (("fixed", flips.fixed), ("broken", flips.broken)):
        for flip in some[:FIRST]:
            answers = [" ".join((text or "").split()) for text in (flip.first.answer, flip.second.answer)]
            was, now = (answer if len(answer) <= ANSWER else f"{answer[:ANSWER]}..." for answer in answers)
            display.line(f"    {title} {flip.second.where}: {was!r} -> {now!r}")


def say_strengths(display: Display, found: Mapping[str, Any]) -> None:
    """Say what each strength of a run gives."""
    display.end_progress()
    display.title(
        f"{found['run']} on {over(found)} {'that it never saw' if found['own'] else 'of the data that was named'}"
    )
    metric = LABELS.get(found["metric"], found["metric"])
    display.line(f"  {'strength':<10}{metric:>24}   {'against strength 0':<26} {'':<8} the guard")
    for strength, value, gap, clear, grown, kept in strength_lines(found):
        display.line(f"  {strength:<10}{value:>24}   {gap:<26} {clear:<8} {kept}{': ' if grown else ''}{grown}")
    display.line()
    display.line(f"  {strength_words(found)}", "bold")


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the runs in a folder: where each lies, when it began, how it ended, and from which run it comes."""
    paths = find_runs(folder)
    parents = find_parents(paths)
    found = []
    for path in paths:
        files = RunFolder(path)
        row: dict[str, Any] = {"run": str(path), "verdict": None, "difference": None}
        row["date"] = read_json(files.data_file)["date"] if files.data_file.exists() else None
        row["parent"] = parents.get(path)
        if files.result_file.exists():
            content = read_json(files.result_file)
            row |= {"verdict": content["verdict"], "difference": content["difference"]}
        found.append(row)
    return found


def grow_tree(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return runs below those that they come from (`children`); one whose parent isn't among them stands at the top."""
    nodes = {row["run"]: {**row, "children": []} for row in runs}
    for node in nodes.values():
        if node["parent"] in nodes:
            nodes[node["parent"]]["children"].append(node)
    return [node for node in nodes.values() if node["parent"] not in nodes]


def say_runs(display: Display, found: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Say which runs there are; those that come from others below them where they have `children`."""
    if not found:
        display.line(f"no runs in {folder}")
    _say_branch(display, found, "")


def _say_branch(display: Display, runs: Sequence[Mapping[str, Any]], before: str) -> None:
    for number, row in enumerate(runs):
        last = number == len(runs) - 1
        mark = before and before[:-3] + ("└─ " if last else "├─ ")
        name = f"{mark}{row['run']}"
        if row["verdict"] is None:
            display.line(f"  {name:<44} not finished: headstart resume {row['run']}")
        else:
            gap = row["difference"]
            shown = f"{LABELS.get(gap['metric'], gap['metric'])} {gap['value']:+.3f}"
            display.line(f"  {name:<44} {VERDICTS[row['verdict']]:<16} {shown:<36} {row['date']}")
        below = before[:-3] + ("   " if last else "│  ") if before else ""
        _say_branch(display, row.get("children", ()), f"{below}   ")


def list_models() -> list[dict[str, Any]]:
    """Return the built-in models, and the others that are cached, with where each lies."""
    return [*_built_in_models(), *_cached_models()]


def _cached_models() -> list[dict[str, Any]]:
    """Return the converted GGUF files and what the hub's own cache holds."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    records = sorted((home() / "models").glob(f"gguf-*/{RECORD}"))
    found = [(read_json(record)["name"], "converted from GGUF", str(record.parent)) for record in records]
    with contextlib.suppress(CacheNotFound):
        repos = sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id)
        found += [(repo.repo_id, "from the hub", str(repo.repo_path)) for repo in repos if repo.repo_type == "model"]
    return [{"name": name, "what": what, "parameters": None, "license": "", "path": path} for name, what, path in found]


def _built_in_models() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "what": model.what,
            "parameters": model.parameters,
            "license": model.license,
            "path": str(cached(name) or ""),
        }
        for name, model in BUILT_IN.items()
    ]


def say_models(display: Display, found: Iterable[Mapping[str, Any]]) -> None:
    """Say which models are built in or cached."""
    for model in found:
        size = f"{model['parameters'] / 1e6:,.0f}M" if model["parameters"] else ""
        where = model["path"] or f"not fetched yet: headstart models pull {model['name']}"
        about = ", ".join(filter(None, (model["what"], model["license"])))
        display.line(f"  {model['name']:<14} {size:>5}  {about}")
        display.line(f"  {'':<21} {where}")
