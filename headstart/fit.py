"""How a run fits the machine: packs and checkpointing that its memory holds, and the time that it will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headstart import machine
from headstart.begin import WRITES
from headstart.choose import EVALS_PER_RUN
from headstart.config import Config, Settings
from headstart.data.render import Renderer
from headstart.data.segments import Example
from headstart.dataset import Data, build_feed
from headstart.engine.engine import Engine
from headstart.engine.forward import PreferenceReader, Reader
from headstart.engine.plan import (
    MEMORY_SHARE,
    STATES_PER_WEIGHT,
    Estimate,
    Layout,
    Memory,
    Scoring,
    lay_out,
    lay_out_scoring,
    measure_memory,
    rehearse,
)
from headstart.engine.work import RATE_ROWS, Shape, best_rate
from headstart.errors import ModelError, Problem, ResourceError
from headstart.evaluate.measure import answer_limit, best_only, choose_answered
from headstart.evaluate.rehearse import answering_bytes, measure_pace
from headstart.evaluate.watch import Watch, build_watch
from headstart.files import seconds_per_byte
from headstart.objectives.preference import REFERENCE_FREE

LEAST_PACK = 256  # smaller packs cost more than they save
LEAST_LENGTH = 16


@dataclass(frozen=True)
class Fitted:
    """A way to run that was looked at: its settings, how rows fall into packs there, and what it fills."""

    config: Config
    layout: Layout
    scoring: Scoring | None
    memory: Memory


@machine.settled()
def fit_memory(config: Config, data: Data, engine: Engine) -> Fitted:
    """Find packs that fit into the memory, the fastest way first: as chosen, in smaller packs, with activations recomputed.

    Packs a half or a quarter as large cost little; activations made anew cost a third of the time. Raises ResourceError
    where nothing fits, or where what would fit was ruled out by the user, with the setting that would do.
    """
    device = engine.reader.device.type
    machine.trim_memory()
    total = machine.device_used_bytes(device) + machine.device_free_bytes(device)
    limit = total * MEMORY_SHARE
    ways = sorted(_ways(config, data.prepared.longest), key=lambda way: not _allowed(config, *way))
    least: Fitted | None = None
    recomputing = False
    for mode, tokens in ways:
        if mode == "on":
            recomputing = recomputing or _recompute(engine, wanted=config.settings.engine.checkpointing == "on")
        if recomputing != (mode == "on"):
            continue
        found = _look(config, data, engine, mode, tokens)
        allowed, fits = _allowed(config, mode, tokens), found.memory.peak() <= limit
        if fits and allowed:
            return found
        if fits:
            raise _too_large(least or found, total, _cure_of(config, mode, tokens))
        least = found if least is None or found.memory.peak() < least.memory.peak() else least
    if least is None:
        raise TypeError("a way that is allowed is always looked at")
    raise _too_large(least, total, _cure(config, least, data, limit))


def _ways(config: Config, longest: int) -> list[tuple[str, int]]:
    """Return what can be tried, as (checkpointing, tokens_per_pack), the fastest first."""
    first = config.settings.engine.tokens_per_pack or 1
    sizes = [size for size in (first, first // 2, first // 4) if size >= max(longest, LEAST_PACK)] or [first]
    sizes += [longest] * (longest < sizes[-1])
    return [(mode, size) for mode in ("off", "on") for size in sizes]


def _allowed(config: Config, mode: str, tokens: int) -> bool:
    """Tell whether the user left this open."""
    engine = config.settings.engine
    own = not config.given("engine.tokens_per_pack") or tokens == engine.tokens_per_pack
    return own and engine.checkpointing in ("auto", mode)


def _look(config: Config, data: Data, engine: Engine, mode: str, tokens: int) -> Fitted:
    """Lay the run out and measure what it would fill."""
    prepared, settings = data.prepared, config.settings
    layout = lay_out(engine.reader, prepared.train.examples, build_feed(config, prepared), tokens)
    parts = [data.proof(settings.eval.rows).examples, prepared.watch.examples]
    parts += [part.examples for part in data.beside]
    scored = [lay_out_scoring(engine.reader, part, tokens) for part in parts]
    larger = [one for one in scored if one and not one.within(layout.worst)]
    scoring = max(larger, key=lambda one: len(one.worst), default=None)
    others = {"saving": _saving_bytes(engine, settings)}
    if settings.eval.generate and settings.eval.choices != "on":
        others["answering"] = answering_bytes(engine.reader, *_answering(data, settings))
    memory = measure_memory(engine, layout, scoring, others)
    decided: dict[str, tuple[Any, str]] = {}
    if settings.engine.checkpointing == "auto":
        why = "it fits into the memory" if mode == "off" else "needed to fit into the memory"
        decided["engine.checkpointing"] = (mode, why)
    if tokens != settings.engine.tokens_per_pack:
        decided["engine.tokens_per_pack"] = (tokens, "what fits into the memory")
    return Fitted(config.decide(decided), layout, scoring, memory)


def _saving_bytes(engine: Engine, settings: Settings) -> int:
    """Return what writing the result fills for a while: an adapter that is merged, a second model."""
    if settings.method != "lora" or settings.task in WRITES:
        return 0
    parameters = list(engine.reader.model.parameters())
    largest = max(p.numel() * p.element_size() for p in parameters)
    return int(sum(p.numel() * p.element_size() for p in parameters) + 2 * largest)


def _cure_of(config: Config, mode: str, tokens: int) -> str:
    """Return the settings that lead to a way that the user ruled out."""
    parts = []
    if config.settings.engine.checkpointing not in ("auto", mode):
        parts.append(f"-s engine.checkpointing={mode}")
    if config.given("engine.tokens_per_pack") and tokens != config.settings.engine.tokens_per_pack:
        parts.append(f"-s engine.tokens_per_pack={tokens}")
    return " ".join(parts)


def _cure(config: Config, found: Fitted, data: Data, limit: float) -> str:
    """Return the settings with which the run would fit, by the same measure; where there are none, say so."""
    longest = data.prepared.longest
    mode = found.config.settings.engine.checkpointing
    for part in (0.5, 0.25, 0.125, 0.0625):
        length = int(longest * part)
        if length >= LEAST_LENGTH and found.memory.peak(round(len(found.layout.worst) * part)) <= limit:
            return f"{_cure_of(config, mode, length)} -s data.max_length={length}".strip()
    without = found.memory.peak() - found.memory.fixed_bytes
    if found.config.settings.method == "full" and without <= limit:
        return "--method lora"
    return "a smaller model, or a machine with more memory"


def _too_large(found: Fitted, total: int, cure: str) -> ResourceError:
    needed = found.memory.peak()
    what = f"{needed / machine.GIB:.1f} GiB are needed and {total / machine.GIB:.1f} GiB are there"
    return ResourceError(Problem("memory.plan", what, "", cure))


def _recompute(engine: Engine, *, wanted: bool) -> bool:
    """Have activations recomputed; return whether the architecture can. Raises ModelError where the user wants it."""
    try:
        engine.reader.recompute_activations()
    except ValueError as error:
        if wanted:
            problem = Problem("config.no_effect", str(error), "engine.checkpointing", "leave it out")
            raise ModelError(problem) from None
        return False
    return True


def estimate_run(
    data: Data, engine: Engine, fitted: Fitted, shape: Shape | None, *, guard_known: bool = False
) -> Estimate:
    """Rehearse the worst step and return what the run will take: memory, time, disk; `shape` is what a step computes.

    With `guard_known` the guard isn't scored before training.
    """
    settings, layout = fitted.config.settings, fitted.layout
    device = engine.reader.device.type
    free = machine.device_free_bytes(device)
    pace = rehearse(engine, layout, fitted.scoring)
    weights = sum(p.numel() * p.element_size() for p in engine.trainable.values())
    every = settings.save.every
    saves = -(-layout.steps // every) if every else 1
    state = weights + (STATES_PER_WEIGHT - 1) * _moment_bytes(engine, layout)
    written = state * saves + weights * (min(saves, EVALS_PER_RUN) + 1)
    dtype = torch.bfloat16 if settings.engine.precision == "bfloat16" else torch.float32
    rows = min(settings.engine.tokens_per_pack or 512, RATE_ROWS)
    return Estimate(
        memory_bytes=fitted.memory.planned(pace.peak_bytes),
        memory_free_bytes=free,
        train_s=pace.train_s * layout.tokens + (pace.step_s + layout.data_s) * layout.steps,
        eval_s=pace.forward_s * _scored_tokens(data, settings, layout, engine.reader, guard_known=guard_known)
        + _answering_s(data, engine, settings, layout, pace.forward_s),
        save_s=written * seconds_per_byte(Path(settings.out or ".")),
        disk_bytes=(settings.save.keep + 1) * state + 2 * weights,
        phases_bytes=fitted.memory.phases(),
        rehearsed_bytes=pace.peak_bytes,
        product_rate=best_rate(shape, rows, dtype, device, fast=settings.engine.fast == "on") if shape else 0.0,
    )


def _moment_bytes(engine: Engine, layout: Layout) -> int:
    """Return what one moment of all that trains will fill."""
    whole = [p.numel() * p.element_size() for name, p in engine.trainable.items() if name not in engine.rows]
    return sum(whole) + sum(rows.bytes_of(layout.words) for rows in engine.rows.values())


def _scored_tokens(data: Data, settings: Settings, layout: Layout, reader: Reader, *, guard_known: bool) -> int:
    """Return how many tokens go forward to score: the proof twice, what is watched as often as it is."""
    prepared, budget = data.prepared, settings.engine.tokens_per_pack or 1
    scored = data.proof(settings.eval.rows).examples

    def tokens_of(part: Sequence[Example]) -> int:
        found = lay_out_scoring(reader, part, budget)
        return found.tokens if found else 0

    proof, watch = tokens_of(scored), tokens_of(prepared.watch.examples)
    beside = 2 * sum(tokens_of(part.examples) for part in data.beside)
    beside -= sum(tokens_of(part.rows.examples) for part in data.guard) if guard_known else 0
    watches = -(-layout.steps // settings.eval.every) if settings.eval.every else 0
    twice = 2 if settings.task == "tagging" else 1  # losses, and then the tags
    if settings.eval.choices == "on":
        chosen = [
            *scored[: settings.eval.generate or 0],
            *(row for part in data.variants for row in part.rows.examples),
        ]
        aims = sum(example.target_count for example in chosen)
        prompts = _tokens(chosen) - aims
        count = len(prepared.choices)
        proof += (prompts if reader.packing == "forest" else prompts * count) + aims * count
    referred = 0
    if needs_reference(settings):
        rows = len(prepared.train.examples)  # once, however often they are trained on
        referred = watch + round(layout.tokens * rows / (layout.steps * (settings.batch_size or 1)))
    return twice * (2 * proof + beside) + watches * watch + referred


def needs_reference(settings: Settings) -> bool:
    """Tell whether answers are held against what the untouched model gives them."""
    return settings.task == "preference" and settings.preference.objective not in REFERENCE_FREE


def plan_watch(data: Data, settings: Settings, reader: Reader, layout: Layout) -> Watch | None:
    """Return what is watched of preferences on the way; None where nothing is."""
    rows, every, renderer = data.prepared.watch, settings.eval.every, data.renderer
    if not (isinstance(reader, PreferenceReader) and isinstance(renderer, Renderer) and rows.examples and every):
        return None
    evaluations = -(-layout.steps // every)
    return build_watch(
        reader, renderer, rows, settings.eval.generate or 0, settings.seed, evaluations, layout.row_tokens
    )


def _answered(data: Data, settings: Settings) -> Sequence[Example]:
    """Return the rows whose answers are written out; of preferences each with its best answer alone."""
    rows = data.proof(settings.eval.rows)
    if settings.task != "preference":
        return list(rows.examples[: settings.eval.generate or 0])
    chosen = choose_answered(rows.kept, settings.eval.generate or 0)
    return [best_only(rows.examples[n], rows.kept[n]) for n in chosen]


def _answering(data: Data, settings: Settings) -> tuple[list[int], list[int]]:
    """Return how many tokens the prompts have that are answered, and how many their answers may have."""
    rows = _answered(data, settings)
    return [row.token_count - row.target_count for row in rows], [answer_limit(row) for row in rows]


def _answering_s(data: Data, engine: Engine, settings: Settings, layout: Layout, forward_s: float) -> float:
    """Return the seconds that answering takes, before and after, and of preferences on the way."""
    if not settings.eval.generate or settings.eval.choices == "on":
        return 0.0
    prompts, limits = _answering(data, settings)
    wanted = [row.target_count for row in _answered(data, settings)]
    # Untouched, a model mostly goes on to the limit; tuned, it ends where the references do.
    pace = measure_pace(engine.reader)
    watch = plan_watch(data, settings, engine.reader, layout)
    looks = watch.times * pace.answering_s(list(map(len, watch.prompts)), watch.limits, forward_s) if watch else 0.0
    return looks + sum(pace.answering_s(prompts, ends, forward_s) for ends in (limits, wanted))


def _tokens(examples: list[Example]) -> int:
    return sum(example.token_count for example in examples)
