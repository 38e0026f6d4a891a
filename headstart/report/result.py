"""A finished run -> `result.json`: what the report, the card and every other reader draw from."""

from __future__ import annotations

from typing import Any

from headstart import machine
from headstart.engine.loop import Progress
from headstart.evaluate.compare import compare_all, to_json, verdict
from headstart.evaluate.measure import PRIMARY, Measured

NOT_MEASURED = "not measured"


def build_result(
    *,
    facts: dict[str, Any],
    plan: dict[str, Any],
    progress: Progress,
    before: Measured,
    after: Measured,
    eval_s: float,
    device: str,
) -> dict[str, Any]:
    """Compare what was measured before and after, and put it together with what the run was and cost.

    `facts` (kind, model, method, rows) and `plan` come from the job.
    """
    compared = compare_all(before.metrics(), after.metrics())
    measured = {item.name: item for item in compared}
    name = next(name for name in PRIMARY[facts["task"]] if name in measured)
    primary = measured[name]
    train_s = max(progress.train_s, 1e-9)
    return {
        **facts,
        "verdict": verdict(compared, name),
        **to_json(compared),
        "difference": {"metric": name, **primary.difference.to_json()},
        "answered": sum(row.answer is not None for row in after.own),
        "guard": NOT_MEASURED,
        "steps": {"taken": progress.step, "planned": plan["steps"], "best": progress.best_step, "end": progress.end},
        "tokens": {
            "rows": progress.row_tokens_seen,
            "computed": progress.tokens_seen,
            "targets": round(progress.targets_seen),
            "shared_frac": 1 - progress.tokens_seen / max(1, progress.row_tokens_seen),
            "rows_seen": progress.seen,
        },
        "speed": {
            "real_tokens_per_s": progress.row_tokens_seen / train_s,
            "computed_tokens_per_s": progress.tokens_seen / train_s,
            "train_s": progress.train_s,
            "reference_s": 0.0,
            "eval_s": eval_s,
        },
        "memory": {"peak_bytes": machine.device_peak_bytes(device), "planned_bytes": plan["memory_bytes"]},
        "plan": plan,
        "environment": machine.describe(),
    }
