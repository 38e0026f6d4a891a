"""headstart's engine on groups of rows with one prompt: the prompt computed once, or for each row."""

from __future__ import annotations

import headstart
from bench.contenders.common import now, peak_bytes, read_spec, report
from bench.rows import headstart_settings
from headstart.data.forest import build_packs
from headstart.dataset import build_feed
from headstart.engine.optim import Schedule


def main() -> None:
    """Train and report."""
    spec = read_spec()
    settings = {**headstart_settings(spec), "data.eval": [spec["held_out"]]}
    job = headstart.plan(spec["train"], settings=settings)
    examples = sorted(job.data.prepared.train.examples, key=lambda example: example.where.line or 0)
    steps = build_feed(job.config, job.data.prepared).steps
    schedule = Schedule(spec["lr"], steps)
    per_pack = job.config.settings.engine.tokens_per_pack or 1
    losses, tokens, computed, ends_s = [], [], [], []
    begin_s = now()
    for step in range(steps):
        group = examples[step * spec["batch_size"] : (step + 1) * spec["batch_size"]]
        packs = build_packs(group, per_pack, share=spec["share"])
        sums = job.engine.forward_backward_all(packs)
        job.engine.optim_step(schedule.lr(step))
        ends_s.append(now())
        losses.append(sums.loss / sums.count)
        tokens.append(sums.row_tokens)
        computed.append(sums.tokens)
    report(
        losses=losses,
        tokens=tokens,
        begin_s=begin_s,
        ends_s=ends_s,
        peak=peak_bytes(),
        packages=("transformers", "peft"),
        computed=computed,
    )


if __name__ == "__main__":
    main()
