"""headstart as users drive it: `headstart.tune` on files of rows; what is reported is what its run folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import headstart
from bench.contenders.common import now, peak_bytes, read_rows, read_spec, report
from bench.rows import headstart_settings
from headstart.display import Display
from headstart.evaluate import reference


class Clock(Display):
    """A display that notes when each step of training ended, and the peak of memory by then."""

    def __init__(self) -> None:
        super().__init__(live=False)
        self.ends_s: list[float] = []
        self.peak = 0

    def progress(self, label: str, done: int, total: int, detail: str = "") -> None:
        """Note the time, then show as ever."""
        if label == "training":
            self.ends_s.append(now())
            self.peak = peak_bytes()
        super().progress(label, done, total, detail)


def main() -> None:
    """Train and report."""
    spec = read_spec()
    clock = Clock()
    vars(reference)["home"] = lambda: Path(spec["out"] + "-home")  # else a round finds the references of the one before
    called_s = now()
    run = headstart.tune(
        spec["train"],
        eval_data=spec["held_out"],
        out=spec["out"],
        settings=headstart_settings(spec),
        display=clock,
    )
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    begin_s = clock.ends_s[0] - steps[0]["step_s"]
    report(
        losses=[step["loss"] for step in steps],
        tokens=[step["row_tokens"] for step in steps],
        begin_s=begin_s,
        ends_s=clock.ends_s,
        peak=clock.peak,
        packages=("transformers", "peft"),
        computed=[step["tokens"] for step in steps],
        targets=[step["targets"] for step in steps],
        start_s=begin_s - called_s,
        reference_s=run.result["speed"]["reference_s"],
        rewards=[[spec["beta"] * step[f"{side}_gain"] for side in ("chosen", "rejected")] for step in steps]
        if spec["task"] == "preference"
        else [],
        size=_size(spec),
        **_plan(run.result),
        **({"eval_loss": _score(spec, run.path)} if spec.get("score") else {}),
    )


def _plan(result: dict[str, Any]) -> dict[str, Any]:
    """Return what was planned and what it was."""
    speed, plan = result["speed"], result["plan"]
    return {
        "planned_bytes": plan["memory_bytes"],
        "run_peak_bytes": result["memory"]["peak_bytes"],
        "planned_s": plan["total_s"],
        "taken_s": sum(speed[f"{part}_s"] for part in ("train", "reference", "eval", "save")),  # as the plan has it
    }


def _size(spec: dict[str, Any]) -> dict[str, int]:
    """Return how many weights the products of a token and of a target have, from the model's shape alone."""
    import torch
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        body = AutoModel.from_config(AutoConfig.from_pretrained(spec["model_path"]))
    linear = [module for module in body.modules() if isinstance(module, torch.nn.Linear)]
    return {
        "linear": sum(module.weight.numel() for module in linear),
        "adapter": sum(spec["rank"] * (module.in_features + module.out_features) for module in linear),
        "head": body.get_input_embeddings().weight.numel(),
    }


def _score(spec: dict[str, Any], path: Path) -> float:
    """Return the loss of the saved result on the held-out rows, by transformers and peft alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from bench.contenders.plain import score

    model = AutoModelForCausalLM.from_pretrained(spec["model_path"], dtype=torch.float32)
    return score(PeftModel.from_pretrained(model, path / "model"), read_rows(spec["held_out_tokens"]))


if __name__ == "__main__":
    main()
