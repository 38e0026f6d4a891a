"""What the contenders on transformers share: a clock for its Trainer, counts of real tokens, and a plain score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from bench.contenders.common import Row, now, peak_bytes, report


class Clock(TrainerCallback):
    """Note when the first step begins and each ends, its loss, and the peak of memory."""

    def __init__(self) -> None:
        self.begin_s = 0.0
        self.ends_s: list[float] = []
        self.losses: list[float] = []
        self.peak = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Note the first step's begin."""
        self.begin_s = self.begin_s or now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note a step's end."""
        self.ends_s.append(now())
        self.peak = peak_bytes()

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        """Note a step's loss."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def counting(collate: Callable[[list[Any]], Any], counts: list[int]) -> Callable[[list[Any]], Any]:
    """Return a collator that notes the real tokens of each micro-batch."""

    def collated(rows: list[Any]) -> Any:
        counts.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    return collated


def per_step(counts: Sequence[int], micro: int, steps: int) -> list[int]:
    """Return the tokens of each step, given those of each micro-batch."""
    return [sum(counts[step * micro : (step + 1) * micro]) for step in range(steps)]


def score(model: Any, rows: Sequence[Row]) -> float:
    """Return the mean loss per target over rows, each run by itself through transformers."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["ids"]])).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum")
            total += float(losses)
            count += sum(label != -100 for label in row["labels"][1:])
    return total / count


def causal_model(spec: dict[str, Any]) -> Any:
    """Return the model that is tuned, in float32, with the adapter that headstart begins with where one is asked for."""
    model = AutoModelForCausalLM.from_pretrained(spec["model_path"], dtype=torch.float32)
    if spec["method"] != "lora":
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(spec["seed"])
    config = LoraConfig(
        r=spec["rank"],
        lora_alpha=spec["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def arguments(spec: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the arguments of a Trainer for what the spec asks, the same for all contenders that have one."""
    return {
        "output_dir": spec["out"],
        "num_train_epochs": 1,
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": spec["seed"],
        **more,
    }


def report_clock(clock: Clock, counts: Sequence[int], micro: int, packages: Sequence[str], **extra: Any) -> None:
    """Print what a Trainer's clock noted."""
    report(
        losses=clock.losses,
        tokens=per_step(counts, micro, len(clock.ends_s)),
        begin_s=clock.begin_s,
        ends_s=clock.ends_s,
        peak=clock.peak,
        packages=("transformers", "peft", *packages),
        **extra,
    )
