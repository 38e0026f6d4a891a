"""Run a job: score the untouched model, train, score again, compare, and write what proves it."""

from __future__ import annotations

import contextlib
import datetime
import errno
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from headstart import machine
from headstart.begin import WRITES
from headstart.config import AUTO, Config, Override, as_names, build_config
from headstart.data.labels import Labels
from headstart.data.segments import Example, lengths_of
from headstart.dataset import build_data
from headstart.display import Display, in_bytes, in_time
from headstart.energy import EnergyMeter
from headstart.engine.checkpoint import Checkpoints
from headstart.engine.forward import PreferenceReader, RowReader
from headstart.engine.loop import LoopPlan, Progress, StepRecord, Watched, train
from headstart.engine.optim import Schedule
from headstart.errors import DataError, DivergedError, Problem, ResourceError, RunError, StoppedError
from headstart.evaluate.generate import tokens_kept
from headstart.evaluate.graders.rows import build_grading, ungraded, ungraded_lines
from headstart.evaluate.measure import Measured, as_references, measure, own_reference
from headstart.evaluate.metrics import best_threshold
from headstart.evaluate.reference import decided_by, find_references, reference_key, with_references
from headstart.evaluate.score import output_rows, score_answers, score_rows
from headstart.evaluate.surprise import WORD_ROWS
from headstart.evaluate.watch import Look, Watch, find_signs
from headstart.faults import reach
from headstart.files import TEMPORARY_PREFIX, read_json, take_room, write_atomic, write_json
from headstart.job import Job, beside, build_job
from headstart.models.fast import let_go, slow_down
from headstart.models.save import save_result, saved_scale
from headstart.origin import (
    check_allowed,
    describe,
    find_changes,
    find_other_sources,
    identity,
    pins,
    refuse,
)
from headstart.rate import choose_rate
from headstart.report.card import model_card
from headstart.report.page import report_page
from headstart.report.result import build_result, rate_share, watch_result
from headstart.report.watched import look_words, sign_words, stop_words, told_words
from headstart.report.words import (
    cures,
    data_lines,
    fallen,
    guard_lines,
    plan_facts,
    robust_words,
    score_table,
    sentence,
    wins_words,
)
from headstart.run import Run, RunFolder, new_run_path
from headstart.stall import StallWatch
from headstart.stop import StopRequest
from headstart.track import check_trackers, tracked

T = TypeVar("T")


def tune(
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    model: str | None = None,
    kind: str | None = None,
    method: str | None = None,
    out: str | Path | None = None,
    epochs: float | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    display: Display | None = None,
    track: str | Sequence[str] = (),
) -> Run:
    """Fine-tune a model on `data` and prove what it gained; return the run.

    `settings` are dotted keys with values, as `-s` takes them: `{"optim.lr": 1e-4}`. What is left out is decided from
    the model, the data and the machine. `track` names trackers that follow the run: tensorboard, wandb, mlflow, trackio.

    Raises a HeadstartError: UsageError, DataError, ModelError, ResourceError, DivergedError, or StoppedError where the
    run was asked to stop and can be resumed.
    """
    named = {
        "data.train": None if data is None else as_names(data),
        "model": model,
        "kind": kind,
        "method": method,
        "out": None if out is None else str(out),
        "epochs": epochs,
        "data.eval": None if eval_data is None else as_names(eval_data),
        **(settings or {}),
    }
    overrides = [Override(key, value, "argument") for key, value in named.items() if value is not None]
    return start(build_config(Path(config) if config else None, overrides), display or Display(), as_names(track))


def start(config: Config, display: Display, track: Sequence[str] = (), *, prove: bool = True) -> Run:
    """Begin a run with these settings and carry it to its end, followed by trackers.

    Without `prove` it ends when it is trained: no row of the proof is scored until `resume` carries it on.
    """
    track = check_trackers(track)
    if not config.settings.data.train:
        raise DataError(Problem("data.missing", "no data was named", "data.train", "headstart tune FILE"))
    today = datetime.date.today()
    with machine.resources(), _stoppable(display) as stop:
        out = config.settings.out
        if out:
            RunFolder.check_free(Path(out))
        job = _set_up(config, today, display, prove=prove)
        if config.settings.optim.lr == AUTO:
            choose_rate(job, display)
        path = Path(out) if out else new_run_path(config.settings.data.train[0], job.config.settings.model)
        folder = RunFolder.create(path)
        with _disk_faults_told(folder), folder.locked():
            job.config = job.config if out else job.config.decide({"out": (str(path), "the first free name")})
            job.config = job.config.pin(pins(job.data))
            write_json(folder.data_file, describe(job.data, job.config, today))
            folder.write_config(job.config)  # last: with it the run has begun
            with tracked(folder, track, display):
                return _Session(job, folder, display, stop).carry_out(prove=prove)


def resume(
    path: Path, display: Display, allow: Collection[str] = (), track: Sequence[str] = (), *, prove: bool = True
) -> Run:
    """Go on with a run that was stopped or killed, from its newest whole checkpoint; without `prove` until it is trained.

    The trackers that followed it do so again, and those in `track`.

    What isn't as it was when the run began is refused, unless `allow` names its kind: data, model, settings, versions.
    It is then recorded, and told in the report. Raises RunError where there is no such run, or where its settings or
    versions changed, and DataError where its data or model did.
    """
    check_allowed(allow)
    track = check_trackers(track)
    folder = RunFolder.open(path)
    if folder.result_file.exists():
        display.line(f"{path} is finished: {sentence(Run(path).result)}")
        return Run(path)
    with machine.resources(), _disk_faults_told(folder), _stoppable(display) as stop, folder.locked():
        record = read_json(folder.data_file)
        config = folder.read_config()
        changes = find_changes(record, config)
        refuse(changes, allow)
        job = _set_up(config.fixed(), datetime.date.fromisoformat(record["date"]), display, prove=prove)
        changes += find_other_sources(record, job.data)
        refuse(changes, allow)
        _check_graders(folder, job)
        if changes:
            _check_proof(folder, job)
            told = [change.told for change in changes]
            once = {"date": datetime.date.today().isoformat(), "changes": told}
            write_json(folder.data_file, {**record, "allowed": [*record.get("allowed", []), once]})
            for line in told:
                display.warn(f"{line}: allowed, so it goes on, and not bit for bit")
        with tracked(folder, track, display):
            return _Session(job, folder, display, stop).carry_out(prove=prove)


def _check_graders(folder: RunFolder, job: Job) -> None:
    """Raise RunError where graders aren't those that scored before: nothing could be told from what they give."""
    known = folder.read_evaluation("graders")
    if known is not None and known != job.grading.to_json():
        what = "the graders aren't those that scored before"
        cure = "give them back as they were, or begin a new run"
        raise RunError(Problem("run.changed", what, str(folder.path), cure))


def _set_up(config: Config, today: datetime.date, display: Display, *, prove: bool) -> Job:
    display.title("data")
    data = build_data(config, today)
    for line in data_lines(data.prepared):
        display.line(f"  {line}")
    data.reject_bad_rows()
    given = config.settings
    held = data.proof(given.eval.rows).kept
    grading = build_grading(given.eval.graders, (*given.data.train, *given.data.eval), given.data, held)
    job = build_job(data, display.warn, prove=prove)
    job.grading = grading
    display.title("plan")
    for name, value in plan_facts(job.plan()):
        display.fact(name, value)
    _check_disk(job)
    return job


@dataclass
class _Session:
    """A job on its way: what the loop calls back, and the times of the phases."""

    job: Job
    folder: RunFolder
    display: Display
    stop: StopRequest
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        run = identity(read_json(self.folder.data_file))
        self.checkpoints = Checkpoints(self.folder.checkpoints, self.job.config.settings.save.keep, run)
        self.feed = self.job.new_feed()
        self.display.log_to(self.folder.log_file)
        self.meter = EnergyMeter()
        self._watch: Watch | None = None

    def carry_out(self, *, prove: bool) -> Run:
        """Take the run from where it stands to its end; without `prove` to that of training."""
        machine.begin_peak(self.job.engine.reader.device.type)  # of what was planned, without the planning itself
        self._rehearse_save()
        before = self._evaluate("before") if prove else None
        self._refer()
        with self._last_good_told():
            self._train()
        if before is None:
            return Run(self.folder.path)
        self._use_best()
        after = self._evaluate("after", before)
        slow_down(self.job.adapted.model)  # what is copied to be merged is then of plain layers
        with self._timed_save():
            self._save(self.folder.model)
        self._conclude(before, after)
        return Run(self.folder.path)

    # --- what the loop calls ---

    def on_step(self, record: StepRecord) -> None:
        """Write the step down and show it."""
        if (used := self.meter.take()) is not None:
            self.progress.energy_j = (self.progress.energy_j or 0.0) + used
        rate = self.progress.row_tokens_seen / self.progress.train_s
        peak = machine.device_peak_bytes(self.job.engine.reader.device.type)
        values = {key: value for key, value in asdict(record).items() if key not in ("rows", "told")}
        values |= record.told
        share = rate_share(record.operations, record.step_s, self.job.estimate.product_rate)
        self._record({**values, "real_tokens_per_s": rate, "peak_bytes": peak, "product_rate_frac": share})
        if record.spike:
            what = f"step {record.step}: the loss is {record.loss:.3f}, far above the steps before it"
            self.display.warn(f"{what}; its rows: {self._places(record.rows)}")
        left = (self.job.layout.steps - record.step) * self.progress.train_s / record.step
        detail = (
            f"loss {record.loss:.3f}  lr {record.lr:.1e}  {rate:,.0f} tokens/s  {in_bytes(peak)}  {in_time(left)} left"
        )
        if record.told:
            detail = f"{told_words(record.told)}  {detail}"
        self.display.progress("training", record.step, self.job.layout.steps, detail)

    def use_smaller_packs(self, tokens_per_pack: int, said: str) -> None:
        """Say that memory ran out, and go on, now and after a stop, with packs that fill less."""
        at = f"step {self.progress.step + 1}"
        self.display.warn(f"{at}: out of memory ({said}); it is taken anew with {tokens_per_pack:,} tokens a pack")
        self._record({"step": self.progress.step + 1, "out_of_memory": True, "tokens_per_pack": tokens_per_pack})
        self.job.config = self.job.config.decide(
            {"engine.tokens_per_pack": (tokens_per_pack, f"the memory ran out at {at}")}
        )
        self.folder.write_config(self.job.config)

    def on_bad_step(self, step: int, error: DivergedError) -> None:
        """Say that a step was left out, and why."""
        said = "; ".join(problem.what for problem in error.problems)
        self._record({"step": step, "not_finite": said})
        self.display.warn(f"{said}: it is left out; its rows: {error.problems[0].where}")

    def roll_back(self) -> int | None:
        """Set weights and moments to those of the last checkpoint, and return its step; None where there is none."""
        if self.checkpoints.newest is None:
            return None
        found, _ = self.checkpoints.load_newest()
        self.job.engine.load_trained(found.tensors)
        self.display.warn(f"the weights are those of step {found.step} again")
        return found.step

    def watch(self) -> Watched | None:
        """Return the loss on the watched rows, and of preferences whether it surely goes wrong; None where it was to stop."""
        begun = time.perf_counter()
        reader, rows = self.job.engine.reader, self.job.data.prepared.watch.examples
        look = None
        try:
            if self._watch is None:
                scores = self._within_memory(rows, lambda tokens, _: score_rows(reader, rows, tokens, self._heed))
                loss = scores.mean
            else:
                look = self._look(self._watch)
                loss = look.loss
        except StoppedError:
            return None
        finally:
            self.progress.eval_s += time.perf_counter() - begun
        self.meter.take()
        if not math.isfinite(loss):
            return Watched(loss)  # the loop refuses it
        best = self.progress.best_value
        mark = "  the best so far" if best is None or loss < best else ""
        self._record({"step": self.progress.step, "watch_loss": loss, **(look.values if look else {})})
        self.display.line(f"  step {self.progress.step}: loss {loss:.4f} on the watched rows{mark}")
        return Watched(loss, self._tell_signs(look) if look else None)

    def _look(self, watch: Watch) -> Look:
        """Look at what becomes of the model: the watched rows, and now and then what it answers."""
        loss, told = self._within_memory(watch.examples, lambda tokens, _: watch.score(tokens, self._heed))
        number = self.progress.step / (self.job.config.settings.eval.every or 1)
        last = self.progress.step == self.job.layout.steps
        if not watch.prompts or (number % watch.every and not last):
            return Look(loss, told, {})
        begun = time.perf_counter()
        model, untouched = self.job.engine.reader.model, self.job.untouched
        answers: dict[str, float] = {}
        try:
            answers = self._within_memory(
                watch.examples,
                lambda tokens, part: watch.answer(
                    untouched, tokens, tokens_kept(model) // part if part > 1 else None, self._heed
                ),
            )
        except (MemoryError, RuntimeError) as error:  # to look is no reason to end
            if (said := machine.out_of_memory(error)) is None:
                raise
            self.display.warn(f"step {self.progress.step}: no answers are looked at: out of memory ({said})")
        self.progress.watch_s += time.perf_counter() - begun
        return Look(loss, told, answers)

    def _tell_signs(self, look: Look) -> str | None:
        """Say what is a sign that it goes wrong, each once and once more where it is sure; return why that is so."""
        step, signs = self.progress.step, find_signs(self.progress.untouched, look.values)
        self.display.line(f"    {look_words(look.values)}")
        for sign in signs:
            if (sign.name, sign.sure) not in {(told["name"], told["sure"]) for told in self.progress.signs}:
                self.progress.signs.append(sign.to_json(step))
                self.display.warn(f"step {step}: {sign_words(sign.name, sign.said, sure=sign.sure)}")
        sure = "; ".join(sign.said for sign in signs if sign.sure)
        never = "sample_tokens" not in self.progress.untouched  # then what is seen is all there is to see
        return sure or ("" if look.answers or never else None)

    def keep_best(self, progress: Progress) -> bool:
        """Keep the weights as they are; return whether that could be done."""
        self._check_there()
        try:
            with self._timed_save():
                self.checkpoints.save_best(progress.step, self.job.engine.trainable)
        except OSError as error:
            self._go_on_without("the best weights so far", error)
            return False
        return True

    def save(self, progress: Progress) -> None:
        """Commit a checkpoint. Where the disk refuses, the run goes on to the next one, if there is to be one.

        Raises OSError where there isn't: the run is at its end or was asked to stop, or its folder is gone.
        """
        self._check_there()
        try:
            with self._timed_save():
                tensors, numbers = self.job.engine.state()
                self.folder.sync_metrics()
                values = {**numbers, "progress": progress.to_json()}
                self.checkpoints.save(progress.step, tensors, values, progress.best_step)
        except OSError as error:
            if progress.end or self.stop.asked:
                raise
            self._go_on_without("the checkpoint", error)

    def should_stop(self) -> bool:
        """Tell whether the run was asked to stop."""
        return self.stop.asked

    def _check_there(self) -> None:
        """Raise FileNotFoundError where the run's folder is gone: what were written there then would be no run."""
        if not self.folder.config_file.exists():
            raise FileNotFoundError(errno.ENOENT, "the run's folder is gone", str(self.folder.path))

    def _record(self, values: dict[str, Any]) -> None:
        """Add a line to the metrics; where the disk refuses, it is written with the next, and that is told once."""
        waited = self.folder.metrics.waits
        try:
            self.folder.add_metrics(values)
        except OSError as error:
            if not waited:
                self._go_on_without("its line of the metrics", error, "lines are written as soon as they can be")

    def _go_on_without(self, what: str, error: OSError, then: str = "") -> None:
        newest = self.checkpoints.newest
        last = "there is no checkpoint yet" if newest is None else f"the last good checkpoint is that of step {newest}"
        said = f"step {self.progress.step}: {what} can't be written ({error.strerror or error})"
        self.display.warn(f"{said}; {then or f'{last}; the next one is tried'}")

    def _places(self, rows: Sequence[int]) -> str:
        examples = self.job.data.prepared.train.examples
        return ", ".join(str(examples[row].where) for row in rows)

    @contextlib.contextmanager
    def _last_good_told(self) -> Iterator[None]:
        """Say from where a run can go on whose numbers are no longer finite."""
        try:
            yield
        except DivergedError as error:
            newest = self.checkpoints.newest
            if newest is None:
                raise
            more = f"the last good checkpoint is that of step {newest}: lower optim.lr in config.yaml, then"
            cure = f"{more} headstart resume {self.folder.path} --allow settings"
            raise DivergedError(replace(problem, cure=cure) for problem in error.problems) from None

    # --- phases ---

    def _refer(self) -> None:
        """Give every answer to learn from what the untouched model gives it: the one that is in memory now, trained or not yet."""
        if not self.job.needs_reference or not isinstance(self.job.engine.reader, PreferenceReader):
            return
        begun = time.perf_counter()
        reader, prepared = self.job.engine.reader, self.job.data.prepared
        parts = [part for part in (prepared.train, prepared.watch) if part.examples]
        rows = [example for part in parts for example in part.examples]

        def compute() -> list[list[float]]:
            self.display.title("what the untouched model gives each answer")
            on_pack = partial(self._on_eval, "reference")
            scored = self._within_memory(rows, lambda tokens, _: score_answers(reader, rows, tokens, on_pack))
            return [logprobs.tolist() for logprobs in scored]

        settings = self.job.config.settings
        key = reference_key(rows, decided_by(read_json(self.folder.data_file), settings, reader.device.type))
        found = iter(
            with_references(
                rows, find_references(key, self.folder.reference_file, compute, settings.engine.tokens_per_pack or 0)
            )
        )
        for part in parts:
            part.examples = [next(found) for _ in part.examples]
        self.progress.reference_s += time.perf_counter() - begun

    def _evaluate(self, name: str, before: Measured | None = None) -> Measured:
        kept = self.folder.read_evaluation(name)
        if kept is not None:
            return Measured.from_json(kept, self.job.config.settings.task)
        self.display.title(f"scoring {'the untouched' if name == 'before' else 'the tuned'} model")
        begun = time.perf_counter()
        settings = self.job.config.settings
        proof = self.job.proof
        labels, model = self._labels(), self.job.engine.reader.model
        measured = self._within_memory(
            proof.examples,
            lambda tokens, part: measure(
                self.job.engine.reader,
                self.job.data.renderer,
                proof.kept,
                proof.examples,
                task=settings.task,
                tokens_per_pack=tokens,
                answers=settings.eval.generate or 0,
                labels=labels,
                choices=self.job.choices,
                references=as_references(before),
                words=WORD_ROWS,
                on_progress=self._on_eval,
                tokens_at_once=tokens_kept(model) // part if part > 1 and settings.task in WRITES else None,
            ),
        )
        measured = self._measure_beside(self._grade(name, measured), labels, before)
        if settings.task == "preference" and before is None:
            measured = own_reference(measured)
        reach("evaluation.scored", name)
        self.progress.eval_s += time.perf_counter() - begun
        self.folder.write_evaluation(name, measured.to_json())
        return measured

    def _measure_beside(self, measured: Measured, labels: Labels | None, before: Measured | None) -> Measured:
        rows = [example for part in self.job.data.beside for example in part.examples]
        if not rows:
            return measured
        return self._within_memory(rows, lambda tokens, _: self.job.measure_beside(measured, tokens, labels, before))

    def _grade(self, name: str, measured: Measured) -> Measured:
        """Let graders score the answers."""
        grading = self.job.grading
        if not grading.graders:
            return measured
        if name == "before":
            self.folder.write_evaluation("graders", grading.to_json())
        graded = grading.grade(measured, self.display.warn, self._on_eval)
        for line in ungraded_lines(ungraded({name: graded})):
            self.display.warn(line)
        return graded

    def _within_memory(self, rows: Sequence[Example], work: Callable[[int, int], T]) -> T:
        """Do `work(tokens_per_pack, part)` on rows; where the memory runs out, anew with half of it at once, and so on.

        What is measured doesn't follow from how much is done at once. Raises what the system says where one row is too much.
        """
        tokens, part = self.job.config.settings.engine.tokens_per_pack or 1, 1
        longest = int(lengths_of(rows).max())
        while True:
            try:
                return work(tokens, part)
            except (MemoryError, RuntimeError) as error:
                said = machine.out_of_memory(error)
                if said is None or tokens <= longest:
                    raise
            let_go(self.job.engine.reader.model)
            machine.trim_memory()
            tokens, part = max(longest, tokens // 2), 2 * part
            self.display.warn(f"out of memory while scoring ({said}): it begins anew with {tokens:,} tokens a pack")

    def _labels(self) -> Labels | None:
        """Return the labels; where a row has several, with the threshold that is best on the watched rows as things stand."""
        labels, watched = self.job.data.prepared.labels, self.job.data.prepared.watch.examples
        reader = self.job.engine.reader
        if labels is None or labels.task != "multilabel" or not watched or not isinstance(reader, RowReader):
            return labels
        outputs = output_rows(reader, watched, self.job.config.settings.engine.tokens_per_pack or 1)
        return replace(labels, threshold=best_threshold(outputs, np.array([example.label for example in watched])))

    def _rehearse_save(self) -> None:
        """Show that the result can be written, before anything is learned.

        An adapter is written as it is now and taken away again; of a larger result the room is taken and given back.
        """
        if self.folder.read_evaluation("before") is not None:
            return
        if self.job.adapted.saved is not self.job.adapted.model and self.job.config.settings.task in WRITES:
            trial = self.folder.path / f"{TEMPORARY_PREFIX}model"
            self._save(trial)
            shutil.rmtree(trial)
        else:
            take_room(self.folder.path, sum(p.numel() * p.element_size() for p in self.job.adapted.model.parameters()))

    def _save(self, path: Path) -> None:
        data, adapted = self.job.data, self.job.adapted
        save_result(
            adapted.saved,
            data.tokenizer,
            data.stop_ids,
            path,
            data.base or data.source,
            labels=self._labels(),
            beside=beside(data.source, data.renderer, self.job.engine.reader),
        )

    @contextlib.contextmanager
    def _timed_save(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.progress.save_s += time.perf_counter() - begun
        self.meter.take()  # nor is this training's

    def _on_eval(self, label: str, done: int, total: int) -> None:
        self.display.progress(label, done, total)
        self._heed()

    def _heed(self, *_: int) -> None:
        """Raise StoppedError where the run was asked to stop."""
        if self.stop.asked:
            raise self._stopped()

    def _train(self) -> None:
        settings = self.job.config.settings
        torch.manual_seed(settings.seed)
        self._load_checkpoint()
        if self.progress.end:
            return
        self.display.title("training")
        self.meter.take()  # what was used before is not training's
        steps = self.job.layout.steps
        warmup = settings.optim.warmup or 0.0
        schedule = Schedule(
            float(settings.optim.lr or 0.0),
            steps,
            round(warmup * steps) if warmup < 1 else int(warmup),
            settings.optim.schedule,
        )
        self._begin_watch()
        plan = LoopPlan(
            schedule,
            settings.engine.tokens_per_pack or 1,
            eval_every=(settings.eval.every or 0) if self.job.data.prepared.watch.examples else 0,
            save_every=settings.save.every or 0,
            patience=settings.eval.patience,
            shape=self.job.shape,
            not_finite=settings.optim.not_finite,
        )
        end = train(self.job.engine, self.feed, self.job.data.prepared.train.examples, plan, self.progress, self)
        self.display.end_progress()
        if end == "stopped":
            raise self._stopped()
        if end == "patience":
            self.display.line(f"  stopped early: no better in {settings.eval.patience} evaluations")
        if end == "wrong":
            self.display.warn(f"stopped early: {stop_words(self.progress.signs)}")
        if self.progress.watch_s:
            self.display.line(f"  looking at answers on the way took {in_time(self.progress.watch_s)}")

    def _begin_watch(self) -> None:
        """Get ready to look at what becomes of preferences, and at what the untouched model does before the first step."""
        watch = self.job.build_watch()
        if watch is None:
            return
        if not self.progress.step:
            begun = time.perf_counter()
            look = self._look(watch)
            self.progress.eval_s += time.perf_counter() - begun
            more = {"chosen_tokens": watch.chosen_tokens, "prompts": float(len(watch.prompts))}
            self.progress.untouched = {**look.values, **more}
            self._record({"step": 0, **look.values})
            self.display.line(f"  untouched: {look_words(look.values)}")
        self._watch = watch

    def _load_checkpoint(self) -> None:
        if self.checkpoints.newest is None:
            self.folder.forget_after(-1)  # what the untouched model gives is looked at anew
            return
        found, damaged = self.checkpoints.load_newest()
        for problem in damaged:
            self.display.warn(str(problem))
        self.job.engine.load_state(found.tensors, found.values)
        spent = self.progress  # in this session, before what it goes on with was read
        self.progress = Progress(**found.values["progress"])
        self.progress.eval_s += spent.eval_s
        self.progress.reference_s += spent.reference_s
        self.feed.seen = self.progress.seen
        self.folder.forget_after(found.step, due=self.progress.due)
        self.display.line(f"  going on from step {found.step}")

    def _use_best(self) -> None:
        best = self.progress.best_step
        if best is not None and best != self.progress.step:
            try:
                weights = self.checkpoints.load_best(best)
            except RunError as error:
                self.display.warn(f"the best model was that of step {best}, but: {error.problems[0].what}")
                self.display.warn(f"the model of the last step, {self.progress.step}, is kept instead")
                self.progress.best_step = None
                return
            self.job.engine.load_weights(weights)
            self.display.line(f"  the best model was that of step {best}; it is kept")

    def _conclude(self, before: Measured, after: Measured) -> None:
        plan, settings = self.job.plan(), self.job.config.settings
        facts = {
            "kind": settings.kind,
            "task": settings.task,
            "model": self.job.data.source.to_json(),
            "base": base.to_json() if (base := self.job.data.base) else None,
            "lineage": self.job.data.lineage,
            "method": settings.method,
            "weights": settings.weights,
            "new_head": self.job.new_head,
            "rows": {name: plan[f"{name}_rows"] for name in ("train", "watch", "proof")},
            "stop_ids": list(self.job.data.stop_ids),
            "labels": list(labels.names if (labels := self.job.data.prepared.labels) else self.job.choices),
            "scale": saved_scale(self.job.adapted.model, labels),
            "dtype": str(self.job.adapted.model.dtype).removeprefix("torch."),
        }
        result = build_result(
            facts=facts,
            plan=plan,
            progress=self.progress,
            before=before,
            after=after,
            device=self.job.engine.reader.device.type,
            watch=watch_result(self.progress, self.folder.read_metrics()),
            old=self.job.old_gains,
        )
        template = "plain" if settings.task == "causal" else settings.data.template
        write_atomic(self.folder.card_file, model_card(self.folder.path, result, template))
        data = read_json(self.folder.data_file)
        page = report_page(result, before, after, self.folder.read_metrics(), data, self.folder.read_config())
        write_atomic(self.folder.report_file, page)
        # Last, since a run with a result is a finished one.
        write_json(self.folder.result_file, result)
        self.display.title("before and after")
        for name, first, second, difference, clear, counted in score_table(result):
            self.display.line(f"  {name:<24} {first:>8} -> {second:>8}   {difference:<26} {clear:<14} {counted}")
        for name, first, second, difference, clear in guard_lines(result["guard"]):
            self.display.line(f"  {name:<24} {first:>8} -> {second:>8}   {difference:<26} {clear}")
        for wins in [] if isinstance(result["wins"], str) else result["wins"]:
            self.display.line(f"  {wins_words(wins)}")
        if varied := robust_words(result["robust"]):
            self.display.line(f"  inputs written otherwise: {varied}")
        for told in fallen(result):
            self.display.warn(f"the chosen answers: {told}")
        self.display.line()
        self.display.line(f"  {sentence(result)}", "bold green" if result["verdict"] == "better" else "bold yellow")
        for cure in cures(result, str(self.folder.path)):
            self.display.line(f"    to mend: {cure}")
        self.display.fact("model", str(self.folder.model))
        self.display.fact("report", str(self.folder.report_file))

    def _stopped(self) -> StoppedError:
        self.display.end_progress()
        at = f"after step {self.progress.step}" if self.progress.step else "before the first step"
        cure = f"headstart resume {self.folder.path}"
        return StoppedError(Problem("run.stopped", f"stopped {at}; nothing is lost", str(self.folder.path), cure))


# --- what surrounds a run ---


@contextlib.contextmanager
def _disk_faults_told(folder: RunFolder) -> Iterator[None]:
    """Turn what the system says of a disk that fails into an error that says how to go on."""
    try:
        yield
    except OSError as error:
        newest = Checkpoints(folder.checkpoints).newest
        kept = "" if newest is None else f" (its last good checkpoint is that of step {newest})"
        then = f", then: headstart resume {folder.path}{kept}"
        if not folder.config_file.exists():
            then = ", and begin the run anew there or elsewhere: -o FOLDER"
        raise machine.disk_error(error, then, str(folder.path)) from None


def _check_proof(folder: RunFolder, job: Job) -> None:
    """Raise DataError where the rows that were scored before would not be those that are scored after."""
    before = folder.read_evaluation("before")
    if before is None:
        return
    was, now = ([row["where"] for row in before if not row["part"]], [str(row.where) for row in job.proof.kept])
    if was != now:
        what = f"other rows are held out than were scored before ({len(was):,} then, {len(now):,} now)"
        raise DataError(Problem("data.changed", what, str(folder.path), "begin a new run"))


@contextlib.contextmanager
def _stoppable(display: Display) -> Iterator[StopRequest]:
    def told() -> None:
        display.warn("stopping as soon as this step is saved; Ctrl-C again stops now")

    with StopRequest(told) as stop, display, StallWatch(display):
        yield stop


def _check_disk(job: Job) -> None:
    free = machine.disk_free_bytes(Path(job.config.settings.out or "."))
    needed = job.estimate.disk_bytes
    if needed > free:
        what = f"the run needs {in_bytes(needed)} and {in_bytes(free)} are free"
        raise ResourceError(
            Problem(
                "disk.full", what, job.config.settings.out or ".", "free some space, or choose another place with -o"
            )
        )
