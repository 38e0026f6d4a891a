"""How fast rows become tokens, and how soon a run begins: `python -m bench.data`; a table, and with --json a file.

For each number of rows, chats and documents are made up, and each line is measured in a process of its own:

- `library`: `Tokenizer.encode_batch_fast` alone on the texts of the rows, with all cores
- `memory`: reading, forming, splitting, rendering and encoding, nothing kept on disk
- `cold`, `warm`: the same by way of a store, when it has to be written and when it is there
- `start`: from the start of the process to the first step of a run, with a warm store

MB are those of the texts, without the JSON around them. Memory is the most that the process ever had.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "patient",
    "doctor",
    "report",
    "plan",
    "answer",
    "sore",
    "throat",
    "three",
    "days",
    "reason",
    "please",
    "explain",
    "how",
    "can",
    "I",
    "find",
    "better",
    "way",
    "to",
    "cook",
    "rice",
    "with",
    "garlic",
    "because",
    "it",
    "was",
    "raining",
    "in",
    "London",
    "yesterday",
    "and",
    "nobody",
    "knew",
    "what",
    "happened",
    "after",
    "the",
    "long",
    "meeting",
]
MEMORY_ROWS = 100_000  # the most that are held in memory
DOCUMENT_ROWS = 20  # a document has as many words as so many chats
MIB = 1 << 20


def make_chats(path: Path, rows: int) -> None:
    """Write short questions with short answers, no two alike."""
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            asked = f"{_words(draw, 6, 20)} {number}?"
            turns = [("user", asked), ("assistant", f"{_words(draw, 6, 24)}.")]
            row = {"messages": [{"role": role, "content": content} for role, content in turns]}
            file.write(json.dumps(row) + "\n")


def make_documents(path: Path, rows: int) -> None:
    """Write documents, no two alike."""
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            text = f"{number}. {_words(draw, 200, 800)}."
            file.write(json.dumps({"text": text}) + "\n")


MAKE = {"chats": make_chats, "documents": make_documents}


def _words(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def measure(way: str, file: Path, model: str) -> dict[str, Any]:
    """Do one thing with a file, in this process, and say what it took."""
    if way == "start":
        return _measure_start(file, model)
    from headstart import machine

    size = sum(len(text.encode()) for text in _texts(file)) / 1e6
    if way == "library":
        return _measure_library(list(_texts(file)), size, model)
    from headstart import job
    from headstart.config import Override, build_config
    from headstart.data import chats, corpus
    from headstart.models.load import load_tokenizer
    from headstart.models.source import find_model

    tokenizer = load_tokenizer(find_model(model))  # takes its time whatever the rows are
    job.load_tokenizer = lambda _: tokenizer
    chats.STORED_BYTES = corpus.STREAM_BYTES = 1 << 60 if way == "memory" else 0
    named = {"data.train": (str(file),), "model": model}
    config = build_config(None, [Override(key, value, "argument") for key, value in named.items()])
    before = machine.memory_used_bytes()
    begun = time.perf_counter()
    job.build_data(config)
    taken = time.perf_counter() - begun
    return {
        "s": taken,
        "mb_per_s": size / taken,
        "peak_mib": machine.memory_peak_bytes() / MIB,
        "idle_mib": before / MIB,
    }


def _texts(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            yield from [row["text"]] if "text" in row else [turn["content"] for turn in row["messages"]]


def _measure_library(texts: list[str], size: float, model: str) -> dict[str, Any]:
    from headstart.models.load import load_tokenizer
    from headstart.models.source import find_model

    backend = load_tokenizer(find_model(model)).backend_tokenizer
    backend.no_truncation()
    taken = []
    for _ in range(2):  # the first time also starts the threads
        begun = time.perf_counter()
        for start in range(0, len(texts), 10_000):
            backend.encode_batch_fast(texts[start : start + 10_000], add_special_tokens=False)
        taken.append(time.perf_counter() - begun)
    return {"s": min(taken), "mb_per_s": size / min(taken)}


def _measure_start(file: Path, model: str) -> dict[str, Any]:
    import psutil

    from headstart import machine
    from headstart.engine import loop

    tune = importlib.import_module("headstart.tune")  # the package's face has a function of this name

    found: dict[str, Any] = {}
    take_step = loop.take_step

    def first_step(*arguments: Any, **more: Any) -> Any:
        take_step(*arguments, **more)
        found["s"] = time.time() - psutil.Process().create_time()
        found["peak_mib"] = machine.memory_peak_bytes() / MIB
        raise SystemExit

    loop.take_step = first_step
    few = {"steps": 2, "eval.rows": 8, "eval.generate": 0, "eval.every": 0}
    with contextlib.suppress(SystemExit):
        tune.tune(str(file), model=model, out=str(file.with_suffix(".run")), settings=few)
    return found


def run(way: str, file: Path, model: str, home: Path) -> dict[str, Any]:
    """Measure one thing in a process of its own."""
    environment = {**os.environ, "HEADSTART_HOME": str(home), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-m", "bench.data", "--one", way, str(file), "--model", model]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_all(rows: Sequence[int], kinds: Sequence[str], model: str, work: Path) -> list[dict[str, Any]]:
    """Measure every way with every number of rows."""
    from headstart import machine

    found = []
    for kind in kinds:
        for count in rows:
            number = count if kind == "chats" else max(100, count // DOCUMENT_ROWS)
            file, home = work / f"{kind}-{number}.jsonl", work / f"home-{kind}-{number}"
            MAKE[kind](file, number)
            home.mkdir()
            (home / "models").symlink_to(machine.home() / "models")
            ways = ["library", *(["memory"] if count <= MEMORY_ROWS else []), "cold", "warm"]
            for way in [*ways, *(["start"] if kind == "chats" else [])]:
                line = {"kind": kind, "rows": number, "way": way, **run(way, file, model, home)}
                found.append(line)
                print(_row(line), flush=True)
            file.unlink()
    return found


def _row(line: dict[str, Any]) -> str:
    rate = f"{line['mb_per_s']:8.2f} MB/s" if "mb_per_s" in line else " " * 13
    memory = f"{line['peak_mib']:8,.0f} MiB" if "peak_mib" in line else ""
    return f"{line['kind']:<10} {line['rows']:>9,} rows  {line['way']:<8} {line['s']:8.2f} s {rate} {memory}"


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description="How fast rows become tokens, and how soon a run begins.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", choices=MAKE, default=list(MAKE))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], Path(given.one[1]), given.model)))
        return
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        found = run_all(given.rows, given.kinds, given.model, Path(work))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
