"""LitGPT's LoRA model under the inner loop of its `finetune_lora`, a row at a time, four to a step.

Its own commands take text and shuffle; what is kept of them is what costs time: model, loss, backward, AdamW.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.utils import chunked_cross_entropy, load_checkpoint

from bench.contenders.common import now, peak_bytes, read_rows, read_spec, report

MODEL = "SmolLM2-135M-Instruct"
PARTS = ("query", "key", "value", "projection", "mlp")
CONVERT = """
import sys
from pathlib import Path
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
convert_hf_checkpoint(Path(sys.argv[1]), model_name=sys.argv[2], dtype="float32")
"""


def main() -> None:
    """Train and report."""
    spec = read_spec()
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="32-true")
    fabric.seed_everything(spec["seed"], verbose=False)
    model, optimizer = _set_up(fabric, spec)
    rows = read_rows(spec["tokens"])
    steps = len(rows) // spec["batch_size"]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    model.max_seq_length = max(len(row["ids"]) for row in rows)
    losses, tokens, ends_s = [], [], []
    begin_s = now()
    for step in range(steps):
        chosen = rows[step * spec["batch_size"] : (step + 1) * spec["batch_size"]]
        losses.append(sum(_forward_backward(fabric, model, row, len(chosen)) for row in chosen) / len(chosen))
        fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        ends_s.append(now())
        tokens.append(sum(len(row["ids"]) for row in chosen))
    report(
        losses=losses,
        tokens=tokens,
        begin_s=begin_s,
        ends_s=ends_s,
        peak=peak_bytes(),
        packages=("litgpt", "lightning"),
    )


def _set_up(fabric: Any, spec: dict[str, Any]) -> tuple[Any, Any]:
    folder = Path(spec["out"]) / MODEL
    shutil.copytree(spec["model_path"], folder)
    # In a process of its own, so that its memory isn't counted; LitGPT's command needs packages that this function doesn't.
    subprocess.run([sys.executable, "-c", CONVERT, str(folder), MODEL], check=True, stdout=sys.stderr)
    adapters = {f"lora_{name}": True for name in PARTS}
    config = Config.from_name(MODEL, lora_r=spec["rank"], lora_alpha=spec["alpha"], lora_dropout=0.0, **adapters)
    with fabric.init_module():
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=spec["lr"], weight_decay=0.0))
    load_checkpoint(fabric, model, folder / "lit_model.pth", strict=False)
    return model, optimizer


def _forward_backward(fabric: Any, model: Any, row: dict[str, Any], parts: int) -> float:
    ids, labels = torch.tensor([row["ids"]]), torch.tensor([row["labels"]])
    logits = model(ids, lm_head_chunk_size=128)
    logits[-1] = logits[-1][..., :-1, :]
    loss = chunked_cross_entropy(logits, labels[..., 1:], ignore_index=-100)
    fabric.backward(loss / parts)
    return float(loss.detach())


if __name__ == "__main__":
    main()
