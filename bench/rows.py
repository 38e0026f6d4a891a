"""The rows that all contenders train on: real ones where the data is at hand, else made up, and their tokens in order.

Peers get what headstart's own renderer makes of a row, in the order in which headstart will see it, so that each step of
each contender holds the same tokens and the same targets.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ANSWERS_PER_PROMPT = 8
PROMPT_TOKENS = range(350, 700)  # of the prompts that get several answers: long ones, as where answers are sampled
WORDS = [
    "patient",
    "doctor",
    "pain",
    "since",
    "days",
    "left",
    "right",
    "chest",
    "knee",
    "back",
    "night",
    "morning",
    "walks",
    "sleeps",
    "takes",
    "tablets",
    "twice",
    "daily",
    "no",
    "fever",
    "cough",
    "history",
    "blood",
    "pressure",
    "normal",
    "reports",
    "denies",
    "mild",
    "severe",
    "worse",
    "better",
    "after",
    "before",
    "food",
    "exercise",
]
Row = dict[str, Any]


@dataclass(frozen=True)
class Files:
    """Rows on disk: as headstart reads them, and as tokens for its peers; `source` says where they are from."""

    train: Path
    held_out: Path
    tokens: Path
    held_out_tokens: Path
    source: str


def spread(rows: Sequence[Any], wanted: int) -> list[Any]:
    """Return `wanted` of the rows, evenly over all of them; fewer where there are not as many."""
    if wanted >= len(rows):
        return list(rows)
    return [rows[number * len(rows) // wanted] for number in range(wanted)]


# --- instruction ---


def chat_rows(data: Path, name: str, wanted: int) -> tuple[list[Row], str]:
    """Return dialogues with the section of a clinical note that was written from each, or made ones like them."""
    file = data / "mts_dialog" / f"{name}.csv"
    if file.exists():
        return [_note_row(row) for row in spread(_csv(file), wanted)], "MTS-Dialog"
    chance = random.Random(f"{name} {wanted}")
    return [_made_row(chance) for _ in range(wanted)], "made up (no mts_dialog at hand)"


def _note_row(row: Mapping[str, str]) -> Row:
    ask = f"Summarize this doctor-patient conversation as the '{row['section_header']}' section of a clinical note."
    return _turns(f"{ask}\n\n{row['dialogue']}", row["section_text"])


def _made_row(chance: random.Random) -> Row:
    # As long as real ones: a few long rows among many short ones, about a quarter of each to be learned.
    words = round(min(900.0, chance.lognormvariate(4.9, 0.8)))
    return _turns(
        "Summarize this doctor-patient conversation as a section of a clinical note.\n\n" + _prose(chance, words),
        _prose(chance, max(5, words // 3)),
    )


def _prose(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(words))


def _turns(prompt: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def answer_rows(data: Path, name: str, wanted: int) -> tuple[list[Row], str]:
    """Return groups of eight rows with one long prompt and different answers."""
    rows, source = chat_rows(data, name, 10**9 if (data / "mts_dialog").exists() else 400)
    texts = [[message["content"] for message in row["messages"]] for row in rows]
    # About 1.4 tokens to a word.
    long = [prompt for prompt, _ in texts if len(prompt.split()) * 1.4 in _Between(PROMPT_TOKENS)]
    answers = list(dict.fromkeys(answer for _, answer in texts if 20 <= len(answer.split()) <= 60))
    groups = max(1, wanted // ANSWERS_PER_PROMPT)
    made = []
    for number, prompt in enumerate(spread(long, groups)):
        first = number * ANSWERS_PER_PROMPT % max(1, len(answers) - ANSWERS_PER_PROMPT)
        made += [_turns(prompt, answer) for answer in answers[first : first + ANSWERS_PER_PROMPT]]
    return made, source


class _Between:
    def __init__(self, bounds: range) -> None:
        self._bounds = bounds

    def __contains__(self, value: float) -> bool:
        return self._bounds.start <= value < self._bounds.stop


def long_rows(tokens: int, wanted: int) -> list[Row]:
    """Return made rows of about this many tokens each, a quarter of them to be learned."""
    chance = random.Random(tokens)
    words = max(
        8, round((tokens - 40) * 0.96)
    )  # a word of the list is a little more than a token; the template adds forty
    return [_turns(_prose(chance, words * 3 // 4), _prose(chance, words // 4)) for _ in range(wanted)]


# --- preferences ---


def pair_rows(data: Path, name: str, wanted: int) -> tuple[list[Row], str]:
    """Return dialogues with the note that was written from each, and as the worse answer a note on another dialogue."""
    rows, source = chat_rows(data, name, wanted)
    texts = [[message["content"] for message in row["messages"]] for row in rows]
    made = []
    for number, (prompt, note) in enumerate(texts):
        others = (texts[(number + apart) % len(texts)][1] for apart in range(1, len(texts)))
        made.append({"prompt": prompt, "chosen": note, "rejected": next(other for other in others if other != note)})
    return made, source


# --- labels ---


def label_rows(data: Path, name: str, wanted: int) -> tuple[list[Row], str]:
    """Return short requests with one of 150 intents, or made ones."""
    file = data / "clinc150" / f"{name}.csv"
    if file.exists():
        distinct = {row["text"]: row for row in _csv(file)}
        return spread(list(distinct.values()), wanted), "CLINC150"
    chance = random.Random(name)
    classes = 150 if wanted > 600 else 10
    made = {}
    while len(made) < wanted:
        label = len(made) % classes
        words = [chance.choice(WORDS) for _ in range(chance.randint(3, 16))]
        made[f"{WORDS[label % len(WORDS)]} {label} {' '.join(words)}"] = f"intent {label}"
    return [{"text": text, "label": label} for text, label in made.items()], "made up (no clinc150 at hand)"


def _csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        return list(csv.DictReader(opened))


# --- on disk ---

KINDS = {"chat": chat_rows, "labels": label_rows, "answers": answer_rows, "pairs": pair_rows}


def write_rows(folder: Path, kind: str, data: Path, wanted: int, held_out: int) -> Files:
    """Write rows to train on and rows to score on."""
    evaluation = "test" if kind == "labels" else "validation"
    train, source = KINDS[kind](data, "train", wanted)
    # All classes have to be known on both sides, so the held-out rows of a classifier are of classes that are trained.
    known = {row.get("label") for row in train}
    held = [row for row in KINDS[kind](data, evaluation, held_out)[0] if row.get("label") in known]
    return write_files(folder, train, held, source)


def write_files(folder: Path, train: Sequence[Row], held: Sequence[Row], source: str) -> Files:
    """Write rows as files; their tokens are written by `write_tokens`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("train.jsonl", "held_out.jsonl", "tokens.jsonl", "held_out_tokens.jsonl")
    files = Files(*(folder / name for name in names), source)
    _write(files.train, train)
    _write(files.held_out, held)
    return files


def write_tokens(files: Files, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Write the tokens of all steps in the order in which headstart will see them, and those that are scored.

    Returns what the tokens say of the run: rows, tokens, targets, the longest row.
    """
    from headstart.config import Override, build_config
    from headstart.dataset import build_data, build_feed

    settings = {"data.train": [str(files.train)], "data.eval": [str(files.held_out)], **headstart_settings(spec)}
    config = build_config(None, [Override(key, value, "bench") for key, value in settings.items()])
    data = build_data(config)
    feed = build_feed(data.config, data.prepared)
    examples = data.prepared.train.examples
    ordered = [examples[row] for _ in range(feed.steps) for row in feed.next_rows()]
    tokens = {"classification": _labelled_tokens, "preference": _pair_tokens}.get(spec.get("task", ""), _answer_tokens)
    _write(files.tokens, [tokens(example) for example in ordered])
    _write(files.held_out_tokens, [tokens(example) for example in data.prepared.proof.examples])
    lengths = [example.token_count for example in ordered]
    labels = data.prepared.labels
    return {
        "rows": len(ordered),
        "distinct_rows": len(examples),
        "tokens": sum(lengths),
        "targets": sum(example.target_count for example in ordered),
        "longest": max(lengths),
        "classes": len(labels.names) if labels else 0,
    }


def headstart_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of headstart that a spec stands for; all but what is learned from."""
    settings = {
        "model": spec["model_path"],
        "method": spec["method"],
        "seed": spec["seed"],
        "steps": spec["steps"],
        "batch_size": spec["batch_size"],
        "data.max_length": spec["max_length"],
        "data.leaks": "exact",  # others train on every row that they are given
        "optim.lr": spec["lr"],
        "optim.warmup": 0,
        "engine.threads": spec["threads"],
    }
    if spec["method"] == "lora":
        settings |= {"lora.rank": spec["rank"], "lora.alpha": spec["alpha"]}
    if spec.get("task"):
        settings["task"] = spec["task"]
    if spec.get("task") == "preference":
        # What the plainest objective computes, so that others compute the same.
        settings |= {"preference.objective": "dpo", "preference.beta": spec["beta"], "preference.likelihood": 0}
    if spec.get("tokens_per_pack"):
        settings["engine.tokens_per_pack"] = spec["tokens_per_pack"]
    if not spec.get("plain"):
        # Nothing but training is timed, so as little as can be is scored.
        settings |= {"eval.every": 0, "eval.rows": 1, "save.every": 0}
        settings |= {"eval.generate": 0} if spec.get("task") != "classification" else {}
        settings |= {"eval.choices": "off"} if spec.get("task") in (None, "chat") else {}
    return settings


def _answer_tokens(example: Any) -> Row:
    (segment,) = example.segments
    ids = segment.ids.tolist()
    return {"ids": ids, "labels": [t if w else -100 for t, w in zip(ids, segment.weights.tolist(), strict=True)]}


def _pair_tokens(example: Any) -> Row:
    prompt = int(np.flatnonzero(example.segments[0].weights)[0])
    chosen, rejected = (segment.ids.tolist() for segment in example.segments)
    return {"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]}


def _labelled_tokens(example: Any) -> Row:
    (segment,) = example.segments
    return {"ids": segment.ids.tolist(), "label": int(example.label)}


def _write(file: Path, rows: Sequence[Row]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def without_dropout(model: Path, folder: Path) -> Path:
    """Return a copy of a model that drops nothing out, so that two ways to train it can be compared step by step."""
    if not folder.exists():
        shutil.copytree(model, folder)
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config |= {key: 0.0 for key in config if "dropout" in key and config[key] is not None}
        file.write_text(json.dumps(config), encoding="utf-8")
    return folder
