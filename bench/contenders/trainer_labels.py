"""transformers' Trainer on labelled rows: full fine-tuning, padded to the longest row of a batch, or grouped by length."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from bench.contenders.common import read_rows, read_spec
from bench.contenders.plain import Clock, arguments, counting, report_clock


def main() -> None:
    """Train and report."""
    spec = read_spec()
    rows = [{"input_ids": row["ids"], "label": row["label"]} for row in read_rows(spec["tokens"])]
    torch.manual_seed(spec["seed"])  # the head begins at random, as headstart's does
    model = AutoModelForSequenceClassification.from_pretrained(
        spec["model_path"], num_labels=spec["classes"], dtype=torch.float32
    )
    counts: list[int] = []
    clock = Clock()
    padded = DataCollatorWithPadding(AutoTokenizer.from_pretrained(spec["model_path"]))
    trainer = Trainer(
        model,
        args=TrainingArguments(
            **arguments(
                spec,
                per_device_train_batch_size=spec["batch_size"],
                train_sampling_strategy="group_by_length" if spec.get("grouped") else "sequential",
            )
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=counting(padded, counts),
        callbacks=[clock],
    )
    trainer.train()
    report_clock(clock, counts, 1, ("accelerate", "datasets"))


if __name__ == "__main__":
    main()
