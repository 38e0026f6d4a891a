"""Public benchmarks on any model that loads, each against the first: `headstart benchmark MODEL [MODEL ...] --tasks ...`."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from headstart import machine
from headstart.display import Display
from headstart.engine.forward import PackReader
from headstart.errors import DataError, ModelError, Problem, ResourceError, UsageError
from headstart.evaluate.compare import Compared, compare_all, interval
from headstart.evaluate.harness import Asked, OnProgress, TaskScores, as_harness_model, read_scores, run_tasks
from headstart.files import new_file, write_json
from headstart.models.load import find_base, is_encoder, load_tokenizer, model_length, stop_ids
from headstart.models.source import find_model, weights_hash
from headstart.report.words import bounds, clearness, shift
from headstart.verbs import PACK_TOKENS, load_here


@dataclass(frozen=True)
class Asking:
    """What is asked: tasks by the harness's names, `include` a folder with own ones, and how.

    `limit` documents of each task at most, `shots` examples in front of each prompt (None: as the task has it), `chat`
    puts prompts into the model's chat template.
    """

    tasks: Sequence[str]
    include: Path | None = None
    limit: int | None = None
    shots: int | None = None
    chat: bool = False


@dataclass(frozen=True)
class Benchmarked:
    """What a model scored on each task; `cut` prompts lost their beginning, since they were too long for it."""

    model: str
    tasks: Sequence[TaskScores]
    cut: int = 0

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values, each metric with its interval where it has one."""
        tasks = {}
        for task in self.tasks:
            bounds = {name: interval(metric).to_json() for name, metric in task.metrics.items()}
            metrics = {name: bounds.get(name, {"value": value}) for name, value in task.values.items()}
            tasks[task.task] = {"documents": task.documents, "metrics": metrics}
        return {"model": self.model, "tasks": tasks, "cut": self.cut}


def benchmark(
    models: Sequence[str], asking: Asking, out: Path | None = None, on_progress: OnProgress | None = None
) -> list[Benchmarked]:
    """Have lm-evaluation-harness ask each of the models, and return what they scored.

    With `out` what was asked is remembered in that folder, so that it goes on where it was cut, and all predictions are
    written there. Raises UsageError where the harness or a task is missing, ModelError for a model that gives no text.
    """
    if importlib.util.find_spec("lm_eval") is None:
        cure = 'pip install "headstart[benchmarks]"'
        raise UsageError(Problem("benchmark.package", "lm-evaluation-harness isn't installed", "lm_eval", cure))
    manager = _find_tasks(asking)
    found = []
    for name in models:
        asked = _load(name, on_progress)
        options: dict[str, Any] = {
            "task_manager": manager,
            "limit": asking.limit,
            "num_fewshot": asking.shots,
            "apply_chat_template": asking.chat,
        }
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            source = find_model(name)
            whole = [source, *([find_base(source)] if source.is_adapter else [])]
            options["use_cache"] = str(out / "-".join(weights_hash(part)[:16] for part in whole))
        try:
            results = run_tasks(as_harness_model(asked, name), asking.tasks, **options)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:  # what tasks raise
            if said := machine.out_of_memory(error):
                cure = "fewer --shots, or a smaller model"
                raise ResourceError(Problem("memory.exhausted", said, name, cure)) from None
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                Problem("benchmark.task", lines[0], ", ".join(asking.tasks), "see --tasks, --include")
            ) from error
        found.append(Benchmarked(name, read_scores(results), asked.cut))
        if out is not None:
            _keep(out, len(found), name, results["samples"])
    if out is not None:
        write_json(out / "result.json", to_json(found))
    return found


def _find_tasks(asking: Asking) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(asking.include) if asking.include else None)
    for task in asking.tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            cure = (
                f"did you mean {near[0]}?" if near else "`lm_eval ls tasks` lists them; --include FOLDER adds own ones"
            )
            raise UsageError(Problem("benchmark.task", f"there is no task {task!r}", "--tasks", cure))
    return manager


def _load(name: str, on_progress: OnProgress | None) -> Asked:
    source = find_model(name)
    if is_encoder(source):
        what = "it is an encoder, and benchmarks ask for text"
        raise ModelError(Problem("model.kind", what, name, "name a model that continues text"))
    torch.set_num_threads(machine.cpu_count())
    tokenizer = load_tokenizer(source)
    model = load_here(source, "causal").model
    reader = PackReader(model, bfloat16=model.device.type == "cuda")
    if reader.device.type == "cpu":
        reader.speed_up()
    stops = stop_ids(source, tokenizer)
    return Asked(reader, tokenizer, stops, model_length(model.config), PACK_TOKENS, on_progress)


def _keep(out: Path, number: int, name: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write what a model gave to each document, with what was asked."""
    known = ("doc_id", "doc", "target", "filter", "filtered_resps")
    columns: dict[str, list[Any]] = {key: [] for key in ("task", *known, "metrics")}
    for task, rows in samples.items():
        for row in rows:
            columns["task"].append(task)
            columns["doc_id"].append(int(row["doc_id"]))
            columns["filter"].append(str(row["filter"]))
            for key in ("doc", "target", "filtered_resps"):
                columns[key].append(json.dumps(row[key], default=str, ensure_ascii=False))
            columns["metrics"].append(json.dumps({key: row[key] for key in row["metrics"]}, default=str))
    table = pa.table(columns).replace_schema_metadata({"model": name})
    with new_file(out / f"predictions-{number}.parquet") as file:
        pq.write_table(table, file)


def compared(found: Sequence[Benchmarked]) -> list[tuple[Benchmarked, Mapping[str, Sequence[Compared]]]]:
    """Return each further model with its differences from the first, task by task, on the same documents."""
    first = {task.task: task.metrics for task in found[0].tasks}
    return [
        (other, {task.task: compare_all(first[task.task], task.metrics) for task in other.tasks}) for other in found[1:]
    ]


def to_json(found: Sequence[Benchmarked]) -> dict[str, Any]:
    """Return scores and differences as plain values."""
    pairs = [
        {
            "a": found[0].model,
            "b": other.model,
            "tasks": {
                task: {one.name: {**one.difference.to_json(), "direction": one.direction} for one in each}
                for task, each in tasks.items()
            },
        }
        for other, tasks in compared(found)
    ]
    return {"models": [one.to_json() for one in found], "pairs": pairs}


def say_benchmarks(display: Display, found: Sequence[Benchmarked]) -> None:
    """Say what each model scored, and how the others differ from the first."""
    display.end_progress()
    for one in found:
        display.title(one.model)
        for task, told in one.to_json()["tasks"].items():
            for name, value in told["metrics"].items():
                sure = f"[{bounds(value)}]" if "low" in value else "no interval"
                display.line(
                    f"  {task:<28} {name:<16} {value['value']:>9.3f}  {sure:<20} {told['documents']:,} documents"
                )
        if one.cut:
            display.warn(f"{one.cut:,} prompts were too long for the model and lost their beginning")
    for other, tasks in compared(found):
        display.title(f"{found[0].model} -> {other.model}, on the same documents")
        for task, each in tasks.items():
            for item in each:
                gap = item.to_json()
                display.line(f"  {task:<28} {item.name:<16} {shift(gap):<26} {clearness(gap)}")
