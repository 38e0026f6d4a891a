"""docs/benchmarks.md and its plots, drawn from the kept results alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.judge import LOSS_TOLERANCE, Spread
from bench.plots import bars, curve
from bench.results import read_results
from bench.studies import DRAWN, STUDIES
from bench.works import CONTENDERS, LINES

HEAD = f"""# Benchmarks

headstart beside its peers: the same rows in the same order, the same tokens and targets, steps, rows a step, learning
rates, adapter, precision (float32) and threads, each round in a process of its own, contenders in turns. Run it:

```sh
make bench                                       # everything at the usual size, well over an hour on two cores
bench/.venv/bin/python -m bench sft-lora --quick # one work, a few minutes
```

`make bench` sets up `bench/.venv` by `bench/constraints.txt`. `make bench-peers` adds peers that need an environment of their
own. `--data FOLDER` names a folder with `mts_dialog/` and `clinc150/` (as published, CSV); without one, rows are made up, and the table
says so. This page and its plots are drawn from `bench/results/*.json`, which hold every step of every round.

How to read it:

- Speed is real tokens a second (padding is never counted; what rows share counts in each) from the end of the first step to
  the end of the last, so nobody pays for the first touch of memory. A ratio is the median over rounds of ours by theirs, each
  pair run one after the other; behind it stand the least and the most.
- Memory is the most resident memory of the process by the end of the last step, model loading and, for headstart, its
  scoring of one row and its rehearsal included.
- Losses of all steps must agree within {LOSS_TOLERANCE:.0%} with the peer's, or the line says `losses differ` and no bar is met. Where they
  can't be alike, the table says why. Of models with dropout, a further pair of runs without it is compared.
- Only ratios of one run count: absolute figures drift from machine to machine, and from hour to hour, by 20% and more.
"""


def write_page(results: Path, docs: Path) -> None:
    """Write the page and its plots."""
    kept = read_results(results)
    plots = docs / "benchmarks"
    plots.mkdir(parents=True, exist_ok=True)
    parts = [HEAD, _about(kept), _table(kept), _contenders(kept)]
    if drawn := _bars(kept):
        (plots / "bars.svg").write_text(drawn, encoding="utf-8")
        parts.insert(3, "![ratios against their bars](benchmarks/bars.svg)\n")
    parts += [_study(name, kept[name], plots) for name in STUDIES if name in kept]
    parts += _products(kept, plots)
    (docs / "benchmarks.md").write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _about(kept: Mapping[str, Any]) -> str:
    if not kept:
        return "Nothing is kept yet: `make bench` fills this in.\n"
    lines = ["## This run\n"]
    seen = {}
    for name, found in kept.items():
        about = found["about"]
        at = about["machine"]
        key = (about["date"], about["size"], about["repeats"], about["threads"], at["processor"], at["platform"])
        seen.setdefault(key, (about, []))[1].append(name)
    for about, names in seen.values():
        at, rows = about["machine"], "; ".join(f"{kind}: {source}" for kind, source in sorted(about["rows"].items()))
        size = "" if about["size"] == "usual" else f" --{about['size']}"
        lines.append(
            f"- `python -m bench {' '.join(names)}{size} --threads {about['threads']} --repeats {about['repeats']}`, {about['date']}, "
            f"{at['processor']}, {at['cores']} cores, {at['memory_bytes'] / 1e9:.0f} GB, Python {about['python']}; rows: {rows}"
        )
    versions = _versions(kept)
    lines.append(f"- versions: {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}\n")
    return "\n".join(lines)


def _versions(kept: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for result in kept.values():
        for one in result.get("rounds", ()):
            found |= one["extra"].get("versions", {})
    return found


def _table(kept: Mapping[str, Any]) -> str:
    lines = ["## Table\n", "| work | what | bar | reached | losses apart | |", "|---|---|---|---|---|---|"]
    for work in dict.fromkeys(line.work for line in LINES):
        for line in _lines(kept, work):
            apart = line["losses_differ"]
            value = _value(line)
            shown = "" if apart is None else "no end" if not math.isfinite(apart) else f"{apart:.2%}"
            said = line["verdict"] + (f" ({line['said']})" if line["value"] and line["said"] else "")
            lines.append(f"| {work} | {line['text']} | {line['bar'] or ''} | {value} | {shown} | {said.strip()} |")
    return "\n".join(lines) + "\n"


def _lines(kept: Mapping[str, Any], work: str) -> list[dict[str, Any]]:
    if work in kept:
        return list(kept[work]["lines"])
    empty = {"value": None, "losses_differ": None, "said": "", "verdict": "not run"}
    return [
        {**empty, "text": line.text, "bar": str(line.bar) if line.bar else None} for line in LINES if line.work == work
    ]


def _value(line: Mapping[str, Any]) -> str:
    if line["value"] is None:
        return ""
    found = Spread(**line["value"])
    if found.low == found.high:
        return f"**{found.median:.3f}**"
    return f"**{found.median:.3f}** [{found.low:.3f}, {found.high:.3f}]"


def _contenders(kept: Mapping[str, Any]) -> str:
    lines = [
        "## Contenders\n",
        "| work | contender | rounds | real tokens/s | with the first step | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for work, found in kept.items():
        for name in dict.fromkeys(one["contender"] for one in found.get("rounds", ()) if one["tokens"]):
            rounds = [one for one in found["rounds"] if one["contender"] == name and not one["changes"]]
            if rounds:
                cells = [_spread((one[key] for one in rounds), ",.0f") for key in ("rate", "whole_rate")]
                peak = _spread((one["peak_bytes"] / 1e9 for one in rounds), ".2f")
                lines.append(
                    f"| {work} | {CONTENDERS[name].title} | {len(rounds)} | {cells[0]} | {cells[1]} | {peak} GB |"
                )
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def _spread(values: Iterable[float], form: str) -> str:
    found = Spread.of(list(values))
    return f"{found.median:{form}}" + ("" if found.low == found.high else f" [{found.low:{form}}, {found.high:{form}}]")


def _bars(kept: Mapping[str, Any]) -> str:
    rows = []
    for found in kept.values():
        for line in found.get("lines", ()):
            if line["value"] is not None and line["measure"] in (
                "speed",
                "memory",
                "share_of_ideal",
                "share_of_products",
            ):
                style = {"met": "met", "missed": "missed", "losses differ": "missed"}.get(line["verdict"], "none")
                rows.append((line["text"], line["value"]["median"], line["limit"], style))
    return bars("reached, against the bar (the mark); memory: less is better", rows) if rows else ""


def _study(name: str, found: Mapping[str, Any], plots: Path) -> str:
    study = found["study"]
    drawn = STUDIES[name].draws
    lines = [f"## {study['text'][0].upper()}{study['text'][1:]}\n"]
    lines.append(f"| {study['x']} | {' | '.join(DRAWN[key][0] for key in drawn)} |")
    lines.append("|---" * (1 + len(drawn)) + "|")
    for point in study["points"]:
        lines.append(f"| {point['x']:,} | {' | '.join(f'{point[key]:,.4g}' for key in drawn)} |")
    lines += [f"\nNot run: {said}" for said in study["said"]]
    for key in drawn:
        if len(study["points"]) > 1:
            file = plots / f"{name}-{key}.svg"
            points = [(point["x"], point[key]) for point in study["points"]]
            file.write_text(curve(study["text"], study["x"], DRAWN[key][0], points), encoding="utf-8")
            lines.append(f"\n![{study['text']}](benchmarks/{file.name})")
    return "\n".join(lines) + "\n"


def _products(kept: Mapping[str, Any], plots: Path) -> list[str]:
    rounds = [one for one in kept.get("roofline", {}).get("rounds", ()) if one["contender"] == "products"]
    if not rounds:
        return []
    rates = {
        int(rows): max(one["extra"]["by_rows"][rows] for one in rounds) / 1e9 for rows in rounds[0]["extra"]["by_rows"]
    }
    text = "best rate of float32 products over the model's shapes"
    drawn = curve(text, "rows of the product", "GFLOP/s", sorted(rates.items()))
    (plots / "products.svg").write_text(drawn, encoding="utf-8")
    said = ", ".join(f"{rate:,.0f} at {rows:,} rows" for rows, rate in sorted(rates.items()))
    return [f"## This machine's products\n\nGFLOP/s: {said}.\n\n![{text}](benchmarks/products.svg)\n"]
