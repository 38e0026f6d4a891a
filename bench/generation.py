"""Generation side by side: ours, and transformers' `generate` left-padded in batches of like length.

    python bench/generation.py DIALOGUES.csv [--rows 64] [--how ours,16,32] [--sets mixed,shared] [--json FILE]

Each way answers the same prompts greedily under the same limit a row; tokens beyond a row's own limit or stop are not
counted. `agree` is the share of rows whose answer is the same as ours, token for token: float32 has near ties.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import torch

from headstart.evaluate.generate import Answer, cut_at_stop, generate
from headstart.machine import describe, memory_peak_bytes
from headstart.models.attention import register, use_attention
from headstart.models.load import load_model, load_tokenizer, stop_ids
from headstart.models.source import find_model

MOST_NEW = 200
SYSTEM_EXAMPLES = 2


def read_rows(path: Path, count: int) -> list[dict[str, str]]:
    """Return `count` dialogues, spread evenly over the file."""
    with path.open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    return [rows[index * len(rows) // count] for index in range(count)]


def build_prompts(rows: list[dict[str, str]], tokenizer: Any, system: str) -> tuple[list[list[int]], list[int]]:
    prompts, limits = [], []
    for row in rows:
        asked = f"Summarize this doctor-patient conversation as the '{row['section_header']}' section of a clinical note.\n\n{row['dialogue']}"
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": asked})
        prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        limits.append(min(MOST_NEW, 2 * len(tokenizer(row["section_text"]).input_ids)))
    return prompts, limits


def system_prompt(path: Path) -> str:
    """Return a long instruction: rules and worked examples, as one gives a model that is not tuned."""
    shown = read_rows(path, 97)[1 :: 97 // SYSTEM_EXAMPLES][:SYSTEM_EXAMPLES]
    parts = [f"Conversation:\n{r['dialogue']}\n\n{r['section_header']}:\n{r['section_text']}" for r in shown]
    return "You write sections of clinical notes. Keep to what was said. Examples follow.\n\n" + "\n\n".join(parts)


def generate_padded(
    model: Any, prompts: list[list[int]], stops: tuple[int, ...], limits: list[int], size: int
) -> list[Answer]:
    """Answer with transformers' own generate, `size` prompts at a time, the longest together."""
    from transformers import GenerationConfig

    use_attention(model, packed=False)
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), limits[index]), reverse=True)
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        width = max(len(prompts[i]) for i in batch)
        ids = torch.tensor([[stops[0]] * (width - len(prompts[i])) + prompts[i] for i in batch])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        config = GenerationConfig(
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=max(limits[i] for i in batch),
            eos_token_id=list(stops),
            pad_token_id=stops[0],
        )
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        answers.update((i, cut_at_stop(new[: limits[i]], stops)) for i, new in zip(batch, out, strict=True))
    return [answers[index] for index in range(len(prompts))]


def run(how: str, model: Any, prompts: list[list[int]], stops: tuple[int, ...], limits: list[int]) -> dict[str, Any]:
    start = time.perf_counter()
    if how == "ours":
        answers = generate(model, prompts, stops, limits, 8192)
    else:
        answers = generate_padded(model, prompts, stops, limits, int(how))
    seconds = time.perf_counter() - start
    new = sum(len(answer.ids) + answer.stopped for answer in answers)
    return {
        "how": how,
        "seconds": seconds,
        "new_tokens": new,
        "new_tokens_per_s": new / seconds,
        "peak_gib": memory_peak_bytes() / 2**30,
        "answers": [answer.ids for answer in answers],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--how", default="ours,1,4,8,16,32,64")
    parser.add_argument("--sets", default="mixed,shared")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    register()
    source = find_model(args.model)
    tokenizer = load_tokenizer(source)
    model = load_model(source, device="cpu").model
    stops = stop_ids(source, tokenizer)
    found: dict[str, Any] = {"machine": describe(), "sets": {}}
    for name in args.sets.split(","):
        system = system_prompt(args.csv) if name == "shared" else ""
        prompts, limits = build_prompts(read_rows(args.csv, args.rows), tokenizer, system)
        read = sum(map(len, prompts))
        print(
            f"{name}: {len(prompts)} prompts, {read:,} tokens, longest {max(map(len, prompts)):,}; limits {sum(limits):,}"
        )
        runs: list[dict[str, Any]] = []
        for how in args.how.split(","):
            runs.append(run(how, model, prompts, stops, limits))
            last, first = runs[-1], runs[0]
            agree = sum(a == b for a, b in zip(last["answers"], first["answers"], strict=True)) / len(prompts)
            last["agree"] = agree
            print(
                f"  {how:>5}  {last['seconds']:7.1f} s  {last['new_tokens']:6,} new  {last['new_tokens_per_s']:7.1f} new/s"
                f"  agree {agree:4.0%}  peak {last['peak_gib']:.2f} GiB",
                flush=True,
            )
        for each in runs:
            each.pop("answers")
        found["sets"][name] = {"prompts": len(prompts), "prompt_tokens": read, "runs": runs}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
