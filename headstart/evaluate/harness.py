"""Public benchmarks, as lm-evaluation-harness asks them, answered in packs: what prompts begin with alike is computed once.

The harness (the extra `benchmarks`) holds the tasks and counts what is right; here are the log-probabilities and answers
that it asks for, and intervals over its documents.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headstart.data.read import Where
from headstart.data.segments import Example, Segment
from headstart.engine.forward import PackReader
from headstart.errors import Problem, UsageError
from headstart.evaluate.compare import Metric, Ratio, whole
from headstart.evaluate.generate import generate

ASKED_AT_ONCE = 1024
ANSWER_TOKENS = 256  # where a task doesn't say, as the harness has it
OnProgress = Callable[[str, int, int], None]

# Metrics whose documents hold a log-likelihood and how much text it is of.
PER_TEXT: Mapping[str, Callable[[Any], Any]] = {
    "word_perplexity": np.exp,
    "byte_perplexity": np.exp,
    "bits_per_byte": lambda nats: nats / math.log(2),
}


def score_continuations(
    reader: PackReader, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], tokens_per_pack: int
) -> list[tuple[float, bool]]:
    """Return for each (context, continuation), in token ids, its log-probability in nats, and whether it is the likeliest.

    The likeliest is what the model would say by itself, token for token. A context holds at least a token.
    """
    examples = [_example(number, *pair) for number, pair in enumerate(pairs)]
    logprobs, likeliest = np.zeros(len(pairs)), np.ones(len(pairs), bool)
    asked = [example for example in examples if example.target_count]
    numbers = np.array([example.where.line for example in asked])
    reader.model.eval()
    for pack in reader.build_packs(asked, tokens_per_pack) if asked else []:
        with torch.no_grad(), reader.precision():
            sources, ids = reader.tensors(pack.target_sources, pack.target_ids)
            hidden = reader.hidden(pack, pack.sources)
            found = [_tell(reader, *chunk) for chunk in reader.head.chunks(hidden, sources, ids)]
        rows = numbers[pack.target_rows]
        np.add.at(logprobs, rows, torch.cat([logprob for logprob, _ in found]).double().cpu().numpy())
        np.logical_and.at(likeliest, rows, torch.cat([highest for _, highest in found]).cpu().numpy())
    return list(zip(logprobs.tolist(), likeliest.tolist(), strict=True))


def _example(number: int, context: Sequence[int], continuation: Sequence[int]) -> Example:
    ids = np.array([*context, *continuation], np.int32)
    weights = np.zeros(len(ids), np.float32)
    weights[len(context) :] = 1
    return Example(Where("benchmark", number), (Segment(ids, weights),))


def _tell(reader: PackReader, hidden: Any, sources: Any, ids: Any) -> tuple[Any, Any]:
    logits = reader.head.logits(hidden)
    return logits[sources, ids] - logits.logsumexp(-1)[sources], logits.argmax(-1)[sources] == ids


def cut_at(text: str, ends: Sequence[str]) -> str:
    """Return a text up to the first of the texts that end it."""
    return text[: min((place for end in ends if end and (place := text.find(end)) >= 0), default=len(text))]


@dataclass
class Asked:
    """A causal model as the harness asks it: its reader, tokenizer, stop tokens and the most tokens it can place.

    `cut` counts the prompts that were too long and lost their beginning.
    """

    reader: PackReader
    tokenizer: Any
    stop_ids: Sequence[int]
    length: int
    tokens_per_pack: int
    on_progress: OnProgress | None = None
    cut: int = 0

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with none put around it: a prompt spells its control tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], on_block: Callable[[int, Any], None] | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations in blocks; `on_block(start, found)` is called behind each."""
        found: list[tuple[float, bool]] = []
        for start in range(0, len(pairs), ASKED_AT_ONCE):
            block = [self._fitting(*pair) for pair in pairs[start : start + ASKED_AT_ONCE]]
            scored = score_continuations(self.reader, block, self.tokens_per_pack)
            found += scored
            if on_block:
                on_block(start, scored)
            if self.on_progress:
                self.on_progress("scoring", len(found), len(pairs))
        return found

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        over = len(context) + len(continuation) - self.length
        if over <= 0:
            return context, continuation
        self.cut += 1
        keep = max(1, len(context) - over)
        return context[-keep:], continuation[-(self.length - keep) :]

    def answer(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Answer prompts, each with the harness's own settings: `until`, `max_gen_toks`.

        Raises UsageError where a task wants answers that are drawn by chance.
        """
        limits = [int(how.get("max_gen_toks", ANSWER_TOKENS)) for _, how in asked]
        for _, how in asked:
            if how.get("do_sample") and how.get("temperature", 1.0) > 0:
                what = "the task wants answers drawn by chance, and headstart takes the likeliest token each time"
                raise UsageError(Problem("benchmark.task", what, "--tasks", "leave that task out"))
        prompts = []
        for (text, _), limit in zip(asked, limits, strict=True):
            ids = self.encode(text)
            room = max(1, self.length - limit, self.length // 2)
            self.cut += len(ids) > room
            prompts.append(ids[-room:])
        report = self.on_progress
        on_batch = (lambda done, total: report("answering", done, total)) if report else None
        head = self.reader.answer_head
        found = generate(self.reader.model, prompts, self.stop_ids, limits, self.length, on_batch, head=head)
        texts = [self.tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in found]
        ends = [[how["until"]] if isinstance(how.get("until"), str) else how.get("until") or [] for _, how in asked]
        return [cut_at(text, end) for text, end in zip(texts, ends, strict=True)]


def as_harness_model(asked: Asked, name: str) -> Any:
    """Return a model as an `LM` of lm-evaluation-harness. What was asked is remembered by its `cache_hook`."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    class Packed(TemplateLM):  # type: ignore[misc]
        """The harness's face of `Asked`."""

        @property
        def eot_token_id(self) -> int:
            return int(asked.stop_ids[0])

        @property
        def prefix_token_id(self) -> int:
            begin = asked.tokenizer.bos_token_id
            return self.eot_token_id if begin is None else int(begin)

        @property
        def tokenizer_name(self) -> str:
            return name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:  # noqa: ARG002
            return asked.encode(string)

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            text: str = asked.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text

        def _loglikelihood_tokens(self, requests: Any, **more: Any) -> list[tuple[float, bool]]:  # noqa: ARG002
            def remember(start: int, found: Any) -> None:
                for (texts, _, _), one in zip(requests[start:], found, strict=False):
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, one)

            return asked.score([(context, text) for _, context, text in requests], remember)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
            found = []
            for (text,) in (request.args for request in requests):
                windows = utils.get_rolling_token_windows(
                    asked.encode(text), self.prefix_token_id, max_seq_len=asked.length - 1, context_len=1
                )
                pairs = [utils.make_disjoint_window(window) for window in windows]
                found.append(sum(logprob for logprob, _ in asked.score(pairs)))
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
            texts = asked.answer([request.args for request in requests])
            for request, text in zip(requests, texts, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            return texts

    return Packed()


def run_tasks(model: Any, tasks: Sequence[str], **options: Any) -> Mapping[str, Any]:
    """Have the harness ask a model (`as_harness_model`); return its results. `options` are those of `simple_evaluate`."""
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _quiet_errors():
        found: Mapping[str, Any] = simple_evaluate(model=model, tasks=list(tasks), bootstrap_iters=0, **options)
    return found


@contextlib.contextmanager
def _quiet_errors() -> Iterator[None]:
    """Leave out what the harness, and git which it calls, write beside our lines: bars and asides; errors are raised."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@dataclass(frozen=True)
class TaskScores:
    """A task of a benchmark: for each metric what the harness gives, and the same over documents where it is a mean of them."""

    task: str
    values: Mapping[str, float]
    metrics: Mapping[str, Metric]
    documents: int


def read_scores(found: Mapping[str, Any]) -> list[TaskScores]:
    """Return the scores of each task. A metric whose documents don't give the harness's own value gets no interval."""
    scores = []
    for task, results in found["results"].items():
        samples = found["samples"].get(task, [])
        values = {
            name: float(value)
            for key, value in results.items()
            for name in [_named(key)]
            if isinstance(value, (int, float)) and "," in key and "_stderr" not in key
        }
        higher = (found.get("higher_is_better") or {}).get(task) or {}
        metrics: dict[str, Metric] = {}
        for name, value in values.items():
            metric = _over_documents(name, samples, higher.get(name.partition(" ")[0], True) is False)
            if metric is not None and math.isclose(whole(metric), value, rel_tol=1e-9, abs_tol=1e-12):
                metrics[name] = metric
        scores.append(TaskScores(task, values, metrics, len({sample["doc_id"] for sample in samples})))
    return scores


def _named(key: str) -> str:
    """Return the name of a metric: `acc` of `acc,none`, `exact_match (strict)` of `exact_match,strict`."""
    name, _, how = key.partition(",")
    return name if how in ("", "none") else f"{name} ({how})"


def _over_documents(name: str, samples: Sequence[Mapping[str, Any]], lower_is_better: bool) -> Metric | None:
    short, _, how = name.partition(" ")
    how = how.strip("()") or "none"
    chosen = [sample for sample in samples if sample["filter"] == how and short in sample]
    chosen.sort(key=lambda sample: int(sample["doc_id"]))
    values = [sample[short] for sample in chosen]
    if not values:
        return None
    if short in PER_TEXT and all(isinstance(value, (tuple, list)) and len(value) == 2 for value in values):
        nats, lengths = np.array(values, np.float64).T
        return Ratio(-nats, lengths, lower_is_better=True, transform=PER_TEXT[short])
    if not all(isinstance(value, (bool, int, float)) for value in values):
        return None
    numbers = np.array(values, np.float64)
    right = bool(np.isin(numbers, (0, 1)).all())
    return Ratio(numbers, np.ones(len(numbers)), lower_is_better=lower_is_better, right=right)
