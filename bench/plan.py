"""What a plan says beside what then happens: memory and time, over models, methods and lengths of rows.

    python bench/plan.py DATA            the whole grid, a process each; DATA holds mts_dialog, pubmed and clinc150
    python bench/plan.py DATA NAME ...   only cases whose name holds one of these
    python bench/plan.py DATA --table    print the table of what was measured so far

Results are kept in runs/bench-plan, one JSON file a case.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KEPT = Path("runs/bench-plan")
COMMON: dict[str, Any] = {"steps": 5, "batch_size": 4, "eval.every": 5, "save.every": 5}
SHORT = {"eval.rows": 12, "eval.generate": 6, "data.held_out": 28}
LONG = {"eval.rows": 3, "data.held_out": 19, "batch_size": 2, "steps": 3, "eval.every": 3}
MODELS = ("smollm2-135m", "llama-30m", "minilm")
CASES = [f"{model} {method} {rows}" for model in MODELS for method in ("lora", "full") for rows in ("short", "long")]


def make_rows(data: Path, folder: Path, model: str, rows: str) -> tuple[Path, dict[str, Any]]:
    """Write the rows of a case: chats of about 300 tokens, labelled rows of 15, or documents of about 2,000."""
    path = folder / "rows.jsonl"
    if rows == "long":
        with (data / "pubmed/train.jsonl").open() as file:
            texts = [json.loads(line)["text"] for line in file]
        found = [{"text": "\n".join(texts[n : n + 6])} for n in range(0, 300, 6)]
        return write(path, found), LONG
    if model == "minilm":
        with (data / "clinc150/train.csv").open() as file:
            found = [{"text": row["text"], "label": row["label"]} for row in list(csv.DictReader(file))[::25]]
        return write(path, found), {**SHORT, "steps": 20, "batch_size": 16, "eval.generate": None}
    with (data / "mts_dialog/validation.csv").open() as file:
        found = [{"prompt": r["dialogue"], "completion": r["section_text"]} for r in csv.DictReader(file)]
    return write(path, found), SHORT


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_llama(folder: Path) -> str:
    """Make a Llama of 30M parameters with random weights and the built-in model's tokenizer; return its folder."""
    import torch
    import transformers

    from headstart.models.source import find_model

    source = find_model("smollm2-135m").path
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    config = transformers.AutoConfig.from_pretrained(source)
    small = transformers.LlamaConfig(**{**config.to_dict(), **shape, "num_key_value_heads": 2, "head_dim": 64})
    torch.manual_seed(0)
    target = folder / "llama-30m"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "headstart.json"))
    transformers.LlamaForCausalLM(small).save_pretrained(target)
    return str(target)


def run_case(case: str, data: Path) -> dict[str, Any]:
    """Train as a user would, and return what was planned and what happened."""
    from headstart.display import Display
    from headstart.tune import tune

    model, method, rows = case.split()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, settings = make_rows(data, folder, model, rows)
        named = make_llama(folder) if model == "llama-30m" else model
        chosen = {key: value for key, value in {**COMMON, **settings}.items() if value is not None}
        run = tune(path, model=named, method=method, out=folder / "run", settings=chosen, display=Display(live=False))
        return run.result


def table() -> str:
    """Return what was measured so far as Markdown."""
    lines = [
        "| case | foreseen GiB | rehearsed | planned | reached | off | planned s | taken s | off | training | scoring | saving |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        file = KEPT / f"{case.replace(' ', '-')}.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text())
        plan, speed, memory = result["plan"], result["speed"], result["memory"]
        foreseen, reached = max(plan["phases_bytes"].values()), memory.get("run_bytes", memory["peak_bytes"])
        planned = [plan["train_s"], plan["eval_s"], plan["save_s"]]
        taken = [speed["train_s"], speed["eval_s"], speed["save_s"]]
        gib = [
            f"{value / 2**30:.2f}" for value in (foreseen, plan["rehearsed_bytes"], memory["planned_bytes"], reached)
        ]
        parts = " | ".join(f"{p:.1f} -> {t:.1f}" for p, t in zip(planned, taken, strict=True))
        lines.append(
            f"| {case} | {' | '.join(gib)} | {memory['planned_bytes'] / reached - 1:+.0%} "
            f"| {sum(planned):.1f} | {sum(taken):.1f} | {sum(planned) / sum(taken) - 1:+.0%} | {parts} |"
        )
    return "\n".join(lines)


def main(data: Path, names: list[str]) -> None:
    """Run cases, each in a process of its own since a process has one peak."""
    KEPT.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if names and not any(name in case for name in names):
            continue
        done = subprocess.run([sys.executable, __file__, str(data), "--case", case], check=False)
        if done.returncode:
            print(f"{case}: failed ({done.returncode})")
    print(table())


if __name__ == "__main__":
    folder, rest = Path(sys.argv[1]), sys.argv[2:]
    if rest[:1] == ["--case"]:
        file = KEPT / f"{rest[1].replace(' ', '-')}.json"
        file.write_text(json.dumps(run_case(rest[1], folder)), encoding="utf-8")
    elif rest == ["--table"]:
        print(table())
    else:
        main(folder, rest)
