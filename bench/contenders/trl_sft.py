"""TRL's SFTTrainer: LoRA or full, `micro` rows at a time, or packed. Rows come as tokens, in headstart's order."""

from __future__ import annotations

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bench.contenders.common import read_rows, read_spec
from bench.contenders.plain import Clock, arguments, causal_model, counting, report_clock, score


def main() -> None:
    """Train and report."""
    spec = read_spec()
    packing = spec.get("packing", 0)
    per_batch = 1 if packing else spec["micro"]
    # A pack of 1,024 tokens holds about as much as a step of four rows.
    accumulated = 1 if packing else spec["batch_size"] // per_batch
    rows = [{"input_ids": row["ids"], "labels": row["labels"]} for row in read_rows(spec["tokens"])]
    config = SFTConfig(
        **arguments(
            spec,
            per_device_train_batch_size=per_batch,
            gradient_accumulation_steps=accumulated,
            train_sampling_strategy="sequential",
            max_length=packing or None,
            packing=bool(packing),
        )
    )
    clock = Clock()
    trainer = SFTTrainer(
        causal_model(spec),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(spec["model_path"]),
        callbacks=[clock],
    )
    counts: list[int] = []
    trainer.data_collator = counting(trainer.data_collator, counts)
    trainer.train()
    extra = {"eval_loss": score(trainer.model, read_rows(spec["held_out_tokens"]))} if spec.get("score") else {}
    report_clock(clock, counts, accumulated, ("trl", "accelerate", "datasets"), **extra)


if __name__ == "__main__":
    main()
