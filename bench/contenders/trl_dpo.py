"""TRL's DPOTrainer: LoRA, `micro` pairs at a time. Rows come as tokens, in headstart's order; the reference is in each step."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from bench.contenders.common import read_rows, read_spec
from bench.contenders.plain import Clock, arguments, report_clock


class Rewards(Clock):
    """A clock that notes the rewards of each step too."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[list[float]] = []

    def on_log(self, *given: Any, logs: Any = None, **more: Any) -> None:
        """Note a step's loss and rewards."""
        super().on_log(*given, logs=logs, **more)
        if logs and "rewards/chosen" in logs:
            self.rewards.append([float(logs[f"rewards/{side}"]) for side in ("chosen", "rejected")])


class OfTokens(DPOTrainer):
    """A trainer of rows that are tokens already."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def main() -> None:
    """Train and report."""
    spec = read_spec()
    rows = read_rows(spec["tokens"])
    accumulated = spec["batch_size"] // spec["micro"]
    config = DPOConfig(
        **arguments(
            spec,
            per_device_train_batch_size=spec["micro"],
            gradient_accumulation_steps=accumulated,
            train_sampling_strategy="sequential",
            max_length=None,
            beta=spec["beta"],
        )
    )
    clock = Rewards()
    adapter = LoraConfig(
        r=spec["rank"], lora_alpha=spec["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = OfTokens(
        AutoModelForCausalLM.from_pretrained(spec["model_path"], dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(spec["model_path"]),
        peft_config=adapter,
        callbacks=[clock],
    )
    trainer.train()
    counts = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    micro = [sum(counts[n : n + spec["micro"]]) for n in range(0, len(counts), spec["micro"])]
    report_clock(clock, micro, accumulated, ("trl", "accelerate", "datasets"), rewards=clock.rewards)


if __name__ == "__main__":
    main()
