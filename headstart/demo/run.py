"""The demo: the main job on the built-in model and the data that headstart ships."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from rich.columns import Columns
from rich.panel import Panel
from rich.text import Text

from headstart.config import Override, build_config
from headstart.display import Display, safe
from headstart.evaluate.measure import RowResult
from headstart.run import Run, RunFolder, new_run_path
from headstart.tune import start

# Chosen so that two cores are done in under four minutes.
SETTINGS = {"steps": 32, "batch_size": 4, "optim.lr": 1.5e-3, "eval.rows": 32, "eval.generate": 10, "eval.every": 16}


def run_demo(display: Display, out: str | None = None) -> Run:
    """Tune the built-in model on the visit notes and show one report before and after."""
    folder = Path(str(resources.files("headstart.demo")))
    display.title("demo: hurried visit notes of a doctor's practice in, reports in its house style out")
    values = {
        **SETTINGS,
        "data.train": [str(folder / "visits.jsonl")],
        "data.eval": [str(folder / "visits_held_out.jsonl")],
        "out": out or str(new_run_path("demo", "smollm2-135m")),
    }
    config = build_config(None, [Override(key, value, "demo") for key, value in values.items()])
    run = start(config, display)
    _show_example(RunFolder(run.path), display)
    display.line()
    display.line(f"  now with your own data: headstart tune DATA    talk to the result: headstart chat {run.path}")
    return run


def _show_example(folder: RunFolder, display: Display) -> None:
    before = [RowResult(**row) for row in folder.read_evaluation("before") or []]
    after = [RowResult(**row) for row in folder.read_evaluation("after") or []]
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if a.answer is not None]
    if not pairs:
        return
    first, second = pairs[0]
    display.title("one visit note, and the report before and after")
    display.line(f"  {second.asked}")
    texts = (
        ("before", first.answer, "dim"),
        ("after", second.answer, "green"),
        ("as the practice writes it", second.reference, ""),
    )
    if display.console.is_terminal:
        width = max(24, (display.console.width - 6) // 3)
        display.console.print(
            Columns(
                [
                    Panel(Text(safe(text or "")), title=name, border_style=style, width=width)
                    for name, text, style in texts
                ]
            )
        )
        return
    for name, text, _ in texts:
        display.line(f"  {name}:")
        for line in (text or "").splitlines():
            display.line(f"    {line}")
