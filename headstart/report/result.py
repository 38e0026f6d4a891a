"""A finished run -> `result.json`: what the report, the card and every other reader draw from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headstart import machine
from headstart.engine.clock import PHASES
from headstart.engine.loop import Progress
from headstart.evaluate.compare import compare_all, to_json, verdict
from headstart.evaluate.flips import count_flips
from headstart.evaluate.graders.rows import pair_grades, ungraded
from headstart.evaluate.guard import BOUND, FEW, KEPT, LOST, compare_guard, guard_result
from headstart.evaluate.measure import PRIMARY, Measured, grouped_like
from headstart.evaluate.old import compare_old, old_result
from headstart.evaluate.robust import robust_result
from headstart.evaluate.surprise import find_surprises
from headstart.evaluate.wins import find_wins
from headstart.report.reasons import NOT_MEASURED, find_reasons
from headstart.report.watched import stop_words


def build_result(
    *,
    facts: dict[str, Any],
    plan: dict[str, Any],
    progress: Progress,
    before: Measured,
    after: Measured,
    device: str,
    guard_bound: float = BOUND,
    old: Mapping[str, Mapping[str, float]] | None = None,
    watch: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare what was measured before and after, and put it together with what the run was and cost.

    `facts` (kind, model, method, rows) and `plan` come from the job; `watch` is what was watched of preferences on the way. `old`
    names the runs whose rows were to be kept, each with the difference that it had made in each metric; it is None where
    none were.
    """
    before = grouped_like(before, after)
    first, second = pair_grades([before, after])
    compared = compare_all(first.metrics(), second.metrics())
    measured = {item.name: item for item in compared}
    name = next(name for name in PRIMARY[facts["task"]] if name in measured)
    primary = measured[name]
    kept = compare_guard(before.guard(), after.guard())
    guard = guard_result(kept, guard_bound) if kept else None
    aged = compare_old(before, after, old or {})
    parts = {f"{part.compared.name} of {part.name}" for part in aged}  # which have a bound of their own
    decided = verdict([item for item in compared if item.name not in parts], name)
    kept_old = None if old is None else old_result(aged) if aged else NOT_MEASURED
    result = {
        **facts,
        "verdict": _decide(decided, guard, kept_old),
        "rows_needed": primary.rows_needed,
        "groups": primary.rows if primary.grouped else None,
        "flips": count_flips(before, after),
        **to_json(compared),
        "difference": {"metric": name, **primary.difference.to_json()},
        "wins": [item.to_json() for item in find_wins(first, second)] or NOT_MEASURED,
        "answered": sum(row.answer is not None for row in after.own),
        "ungraded": ungraded({"before": before, "after": after}),
        "guard": guard or NOT_MEASURED,
        "robust": robust_result(before, after) or NOT_MEASURED,
        "words": find_surprises(before, after) or NOT_MEASURED,
        "watch": watch or NOT_MEASURED,
        "old": kept_old,
        **_far(progress, plan),
        "speed": build_speed(progress, plan),
        "memory": {
            "peak_bytes": machine.device_peak_bytes(device),
            "run_bytes": machine.peak_since(device),
            "planned_bytes": plan["memory_bytes"],
            "out_of_memory_steps": progress.smaller_at,
            "tokens_per_pack": progress.tokens_per_pack or plan["tokens_per_pack"],
        },
        "plan": plan,
        "environment": machine.describe(),
    }
    return {**result, "reasons": find_reasons(result)}


def _far(progress: Progress, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return how far the run came: its steps and its tokens."""
    return {
        "steps": {
            "taken": progress.step,
            "planned": plan["steps"],
            "best": progress.best_step,
            "end": progress.end,
            "left_out": progress.bad_steps,
            "spikes": progress.spikes,
        },
        "tokens": {
            "rows": progress.row_tokens_seen,
            "computed": progress.tokens_seen,
            "targets": round(progress.targets_seen),
            "shared_frac": 1 - progress.tokens_seen / max(1, progress.row_tokens_seen),
            "rows_seen": progress.seen,
        },
    }


def watch_result(progress: Progress, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what was watched of preferences on the way: before the first step and last, and every sign; None where nothing was."""
    seen = [{k: v for k, v in line.items() if k.startswith(("watch_", "sample_"))} for line in metrics]
    if not progress.untouched:
        return None
    return {
        "prompts": int(progress.untouched["prompts"]),
        "times": sum("sample_tokens" in line for line in seen),
        "seconds": progress.watch_s,
        "before": progress.untouched,
        "last": {name: value for line in seen for name, value in line.items()},
        "signs": progress.signs,
        "stopped": stop_words(progress.signs) if progress.end == "wrong" else "",
    }


def _decide(decided: str, guard: Mapping[str, Any] | None, old: Mapping[str, Any] | str | None) -> str:
    """Return the verdict of all that was scored: of the job's new rows, of what was known before and of the old rows.

    What is lost makes it worse. Where it can't be told at all whether old rows are kept, better can't be said.
    """
    aged = old["verdict"] if isinstance(old, Mapping) else KEPT if old is None else NOT_MEASURED
    if decided != "not_measured" and LOST in ((guard or {}).get("verdict"), aged):
        return "worse"
    return "not_measured" if decided == "better" and aged in (NOT_MEASURED, FEW) else decided


def build_speed(progress: Progress, plan: dict[str, Any]) -> dict[str, Any]:
    """Return where the time went: rates, seconds by phase, and the share of the machine's best product rate in training.

    There is no padding, by construction; what rows share is computed once, and `shared_tokens` are those that were saved.
    """
    train_s = max(progress.train_s, 1e-9)
    return {
        "real_tokens_per_s": progress.row_tokens_seen / train_s,
        "computed_tokens_per_s": progress.tokens_seen / train_s,
        "padding_tokens": 0,
        "shared_tokens": progress.row_tokens_seen - progress.tokens_seen,
        "train_s": progress.train_s,
        **{f"{phase}_s": getattr(progress, f"{phase}_s") for phase in PHASES},
        "reference_s": progress.reference_s,
        "eval_s": progress.eval_s,
        "save_s": progress.save_s,
        "energy_j": progress.energy_j if progress.energy_j is not None else NOT_MEASURED,
        "operations": progress.operations,
        "product_rate": plan["product_rate"],
        "product_rate_frac": rate_share(progress.operations, train_s, plan["product_rate"]),
    }


def rate_share(operations: float, seconds: float, best: float) -> float | None:
    """Return which part of the machine's best product rate was reached; None where it isn't known."""
    return operations / seconds / best if best and operations else None
