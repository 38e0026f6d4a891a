"""`python -m bench [WORK ...]`: run works or studies side by side, keep what came out, draw the page."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from bench.page import write_page
from bench.results import describe_run, keep_outcomes, keep_study
from bench.runner import ROOT, Bench
from bench.studies import STUDIES, run_study
from bench.works import LINES, SIZES


def main() -> None:
    """Run what is named, or all of it."""
    works = list(dict.fromkeys(line.work for line in LINES))
    options = _options(works)
    size = SIZES[options.size]
    if options.repeats:
        size = size.__class__(**{**vars(size), "repeats": options.repeats})
    with tempfile.TemporaryDirectory(prefix="headstart-bench-") as scratch:
        work = Path(options.work) if options.work else Path(scratch)
        bench = Bench(options.data.resolve(), work.resolve(), size, options.threads)
        for name in options.names or [*works, *STUDIES]:
            print(name, flush=True)
            if name in STUDIES:
                keep_study(
                    options.out, name, run_study(bench, STUDIES[name], options.size), describe_run(bench, options.size)
                )
            else:
                outcomes = [bench.judge(line) for line in LINES if line.work == name]
                for outcome in outcomes:
                    value = f"{outcome.value.median:.3g}" if outcome.value else "-"
                    print(f"  {outcome.line.text}: {value}  {outcome.verdict}", flush=True)
                keep_outcomes(options.out, name, outcomes, bench.rounds(), describe_run(bench, options.size))
            write_page(options.out, options.docs)


def _options(works: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="headstart beside its peers, on this machine.")
    parser.add_argument(
        "names", nargs="*", metavar="WORK", help=f"{', '.join([*works, *STUDIES])}; all where none is named"
    )
    sizes = parser.add_mutually_exclusive_group()
    for name in ("quick", "full"):
        sizes.add_argument(f"--{name}", dest="size", action="store_const", const=name, default="usual")
    parser.add_argument("--repeats", type=int, help="rounds of each contender")
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads of each contender"
    )
    parser.add_argument(
        "--data", type=Path, default=ROOT / ".." / "shared" / "data", help="folder of mts_dialog, clinc150"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="where results are kept")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page is written")
    parser.add_argument("--work", help="keep rows, specs and logs of all runs in this folder")
    options = parser.parse_args()
    unknown = set(options.names) - {*works, *STUDIES}
    if unknown:
        parser.error(f"no work is called {', '.join(sorted(unknown))}; there are {', '.join([*works, *STUDIES])}")
    return options


if __name__ == "__main__":
    main()
