"""What a study found about a run, put into the run's result, its reasons and its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.errors import Problem, RunError
from headstart.evaluate.measure import Measured
from headstart.files import read_json, write_atomic, write_json
from headstart.report.page import report_page
from headstart.report.reasons import find_reasons
from headstart.run import RunFolder


def retell(run: Path, study: str, found: Mapping[str, Any]) -> None:
    """Add what `study` found to a run's `result.json` and draw its report anew; nothing that was measured changes.

    The run is held meanwhile. Raises RunError where it isn't finished, or another process writes it.
    """
    folder = RunFolder.open(run)
    with folder.locked():
        result = read_json(folder.result_file)
        result["studies"] = {**result.get("studies", {}), study: dict(found)}
        result["reasons"] = find_reasons(result)
        before, after = (read_measured(run, side) for side in ("before", "after"))
        data, config = read_json(folder.data_file), folder.read_config()
        page = report_page(result, before, after, folder.read_metrics(), data, config)
        write_atomic(folder.report_file, page)
        write_json(folder.result_file, result)


def read_measured(run: Path, side: str) -> Measured:
    """Return what a finished run's model did on the proof rows, `before` or `after`. Raises RunError."""
    folder = RunFolder(run)
    rows = folder.read_evaluation(side)
    if rows is None or not folder.result_file.exists():
        cure = f"headstart resume {run}"
        raise RunError(Problem("run.incomplete", "the run has no result yet", str(run), cure))
    return Measured.from_json(rows, read_json(folder.result_file)["task"])
