"""The same ruler before and after: a model on frozen rows -> what it scored and what it answered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from headstart.data.encode import Encoder
from headstart.data.feed import content_hash
from headstart.data.images import Look
from headstart.data.labels import OUTSIDE, Labels
from headstart.data.mixing import MIXABLE
from headstart.data.records import Conversation, Document, Preference, Record, Related, Tagged
from headstart.data.render import Renderer
from headstart.data.segments import Example
from headstart.engine.forward import (
    EmbeddingReader,
    PreferenceReader,
    Reader,
    RewardReader,
    RowReader,
    TokenReader,
)
from headstart.evaluate.choices import last_answer, weigh_choices
from headstart.evaluate.compare import Metric
from headstart.evaluate.entities import entities, has_entities
from headstart.evaluate.generate import Answer, generate
from headstart.evaluate.metrics import as_text, grade_metrics, task_metrics, tell
from headstart.evaluate.score import (
    Floats,
    Neighbours,
    RowScores,
    compare_rows,
    output_rows,
    score_answers,
    score_compared,
    score_outputs,
    score_rows,
    score_tokens,
    tag_rows,
)
from headstart.evaluate.surprise import word_losses
from headstart.models.load import model_length

# What a verdict rests on: the first of these that was measured.
PRIMARY = {
    "chat": ("accuracy", "nll"),
    "causal": ("bits_per_byte",),
    "masked": ("bits_per_byte",),
    "classification": ("accuracy",),
    "multilabel": ("micro_f1",),
    "regression": ("r2", "mae", "mae_1"),
    "tagging": ("entity_f1", "tag_accuracy"),
    "embedding": ("spearman", "recall_at_1"),
    "images": ("accuracy",),
    "preference": ("preference_accuracy", "likelier", "wanted_auroc"),
    "reward": ("reward_accuracy", "reward_auroc"),
}
PER_TOKEN = ("nll", "perplexity")
LABELS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "weighted_f1": "weighted F1",
    "mcc": "Matthews correlation",
    "auroc": "AUROC",
    "calibration": "calibration error",
    "cross_entropy": "loss per row",
    "all_right": "rows with every class right",
    "r2": "R²",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "spearman": "Spearman",
    "entity_f1": "entity F1",
    "entity_precision": "entity precision",
    "entity_recall": "entity recall",
    "tag_accuracy": "tags right",
    "recall_at_1": "found first (recall@1)",
    "recall_at_10": "found in ten (recall@10)",
    "mrr": "mean reciprocal rank",
    "preference_accuracy": "preference accuracy",
    "likelier": "chosen is likelier, per token",
    "wanted_auroc": "wanted likelier than not (AUROC)",
    "margin": "chosen over rejected, nats",
    "reward_accuracy": "the better answer has the higher reward",
    "reward_auroc": "wanted have higher rewards than not (AUROC)",
    "reward_margin": "reward of the better less the worse",
    "chosen_logprob": "log-probability of chosen",
    "rejected_logprob": "log-probability of rejected",
    "nll": "loss per predicted token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "exact_match": "answers exactly right",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "stop_rate": "stops by itself",
}
LIMIT_OVER_REFERENCE = 1.5
LIMIT_EXTRA = 16
GROUP_MAX = 40
WORD_TOKENS = 50_000  # of documents whose words are kept
EXCERPT = 1_000  # characters of a document that the report may show

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RowResult:
    """One row: its summed nll over `targets` tokens and, if it was answered, the answer beside its reference.

    Of a document, `bytes` are those of the text that was predicted. Of a labelled row `truth` and `found` are what is
    right and what was told (classes, numbers, tags; of related texts the score and cosine, or the rank), `answer` and
    `reference` the same as text, and `probability` that of the answer. Of preferences `truth` are the scores of the
    answers and `found` of each its log-probability, its tokens, and what the reference gave it (None: not known), or its
    reward, 1 and 0; the other fields are those of the best. `part` names the data set that was mixed in, or the part of the guard
    (`guard`) that it is of, or the way in which it is written otherwise: `varied` is then the number of the own row that it is, -1 of
    text from outside the job. Rows of one `group` stand or fall together. `words` are those of a document with what each lost in
    nats, where that was asked.
    `grades` are the scores that graders gave the answer, bools where it can only pass or fail, None where `ungraded` says why there
    is none.
    """

    where: str
    nll: float
    targets: float
    asked: str = ""
    reference: str = ""
    answer: str | None = None
    stopped: bool = False
    bytes: int = 0
    probability: float | None = None
    truth: Sequence[Any] = ()
    found: Sequence[Any] = ()
    part: str = ""
    grades: Mapping[str, float | None] = field(default_factory=dict)
    ungraded: Mapping[str, str] = field(default_factory=dict)
    guard: bool = False
    varied: int | None = None
    words: Sequence[tuple[str, float]] = ()
    group: str = ""


@dataclass(frozen=True)
class Measured:
    """What a model did on the frozen rows of a task."""

    rows: Sequence[RowResult]
    task: str

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as plain values."""
        return [asdict(row) for row in self.rows]

    @staticmethod
    def from_json(rows: Sequence[dict[str, Any]], task: str) -> Measured:
        """Read what `to_json` gave."""
        return Measured([RowResult(**row) for row in rows], task)

    def metrics(self) -> dict[str, Metric]:
        """Return the metrics over rows; those of answers over the rows that were answered."""
        mixed = {f"{name} of {part}": metric for part, (name, metric) in self.parts().items()}
        return {**task_metrics(self.task, self.own), **grade_metrics(self.own), **mixed}

    def parts(self) -> dict[str, tuple[str, Metric]]:
        """Return what was mixed in, each part with the name of its metric and the metric."""
        return self._parts([row for row in self.rows if row.part and not row.guard and row.varied is None])

    def guard(self) -> dict[str, tuple[str, Metric]]:
        """Return the parts of the guard, each with the name of its metric and the metric."""
        return self._parts([row for row in self.rows if row.guard])

    def variants(self) -> dict[str, Measured]:
        """Return the run's own rows as they would be written otherwise, by the name of the way."""
        found: dict[str, list[RowResult]] = {}
        for row in self.rows:
            if row.varied is not None:
                found.setdefault(row.part, []).append(replace(row, part=""))
        return {name: Measured(rows, self.task) for name, rows in found.items()}

    def _parts(self, among: Sequence[RowResult]) -> dict[str, tuple[str, Metric]]:
        found = {}
        for part in dict.fromkeys(row.part for row in among):
            rows = [row for row in among if row.part == part]
            task = "causal" if rows[0].bytes else "chat"
            if not rows[0].guard and self.task not in MIXABLE:  # what is mixed in are old rows, of the same task
                task = self.task
            metrics = task_metrics(task, rows)
            # Votes that are all of one sort, say, have none.
            if (name := next((name for name in PRIMARY[task] if name in metrics), None)) is not None:
                found[part] = name, metrics[name]
        return found

    @property
    def own(self) -> list[RowResult]:
        """The rows of the run's own data, without those that were mixed in, those of the guard and those written otherwise."""
        return [row for row in self.rows if not row.part]


def measure(  # noqa: PLR0911 (a line for each task)
    reader: Reader,
    renderer: Encoder | Look,
    records: Sequence[Record],
    examples: Sequence[Example],
    *,
    task: str,
    tokens_per_pack: int,
    answers: int = 0,
    chosen: Sequence[int] | None = None,
    labels: Labels | None = None,
    choices: Sequence[str] = (),
    references: Sequence[Sequence[float]] = (),
    words: int = 0,
    on_progress: OnProgress | None = None,
    tokens_at_once: int | None = None,
) -> Measured:
    """Score every row and answer those conversations that are `chosen`, by number, else `answers` of them.

    With `choices` the likeliest of these is the answer; else it is generated, with at most `tokens_at_once` kept.
    `labels` are what a classifier tells, `references` what another model gave each answer of preferences; of the first `words`
    documents to continue it is kept what their words lost. `records` and `examples` are the same rows. The answer that is
    compared is that of a row's last trained turn.
    """

    def told(what: str) -> Callable[[int, int], None] | None:
        return (lambda done, total: on_progress(what, done, total)) if on_progress else None

    if task in ("classification", "images", "multilabel", "regression") and isinstance(reader, RowReader) and labels:
        outputs = output_rows(reader, examples, tokens_per_pack, told("scoring"))
        losses = score_outputs(reader, examples, outputs)
        return Measured(_of_labels(records, losses, outputs, labels), task)
    if task == "tagging" and isinstance(reader, TokenReader) and labels:
        scores = score_rows(reader, examples, tokens_per_pack)
        tags = tag_rows(reader, examples, tokens_per_pack, told("scoring"))
        return Measured(_of_tags(records, scores, tags, labels), task)
    if task == "embedding" and isinstance(reader, EmbeddingReader):
        near = compare_rows(reader, examples, tokens_per_pack, told("scoring"))
        return Measured(_of_related(records, near), task)
    if task == "preference" and isinstance(reader, PreferenceReader) and isinstance(renderer, Renderer):
        rows = [record for record in records if isinstance(record, Preference)]
        compared = score_answers(reader, examples, tokens_per_pack, told("scoring"))
        chosen = choose_answered(rows, answers) if chosen is None else chosen
        pairs = [(rows[n].conversations[rows[n].best], best_only(examples[n], rows[n])) for n in chosen]
        answered = _answer(reader, renderer, pairs, told("answering"), tokens_at_once)
        new = dict(zip(chosen, answered, strict=True))
        return Measured(_of_preferences(rows, examples, compared, references, new, renderer), task)
    if task == "reward" and isinstance(reader, RewardReader):
        rows = [record for record in records if isinstance(record, Preference)]
        rewards = score_answers(reader, examples, tokens_per_pack, told("scoring"))
        return Measured(_of_rewards(rows, rewards, score_compared(reader, examples, rewards)), task)
    documents = [record for record in records if isinstance(record, Document)]
    if documents and isinstance(renderer, Encoder):
        first = first_of(examples, words) if task == "causal" else 0
        scores, lost = score_tokens(reader, examples, tokens_per_pack, told("scoring"), first)
        return Measured(_of_documents(documents, examples, scores, renderer, lost), task)
    scores = score_rows(reader, examples, tokens_per_pack, told("scoring"))
    if not isinstance(renderer, Renderer):
        raise TypeError("conversations are rendered by a Renderer")
    conversations = [record for record in records if isinstance(record, Conversation)]
    chosen = choose_answered(conversations, answers) if chosen is None else chosen
    if choices:
        picked = [conversations[i] for i in chosen]
        few = [examples[i] for i in chosen]
        weighed = weigh_choices(reader, renderer, picked, few, choices, tokens_per_pack, told("weighing answers"))
        return Measured(_of_choices(conversations, scores, dict(zip(chosen, weighed, strict=True)), choices), task)
    pairs = [(conversations[i], examples[i]) for i in chosen]
    answered = _answer(reader, renderer, pairs, told("answering"), tokens_at_once)
    new = dict(zip(chosen, answered, strict=True))
    return Measured(_of_answers(conversations, examples, scores, new, renderer), task)


def _answer(
    reader: Reader,
    renderer: Renderer,
    rows: Sequence[tuple[Conversation, Example]],
    told: Callable[[int, int], None] | None,
    tokens_at_once: int | None,
) -> list[Answer]:
    """Have the last answer of each row written by the model."""
    prompts = [
        renderer.prompt(asked, tools) for asked, tools, _ in (split_last(conversation) for conversation, _ in rows)
    ]
    limits = [answer_limit(example) + _silent_tokens(conversation, renderer) for conversation, example in rows]
    return generate(
        reader.model,
        prompts,
        renderer.stop_ids,
        limits,
        model_length(reader.model.config),
        told,
        tokens_at_once=tokens_at_once,
        head=reader.answer_head,
    )


def short_group(record: Record) -> str:
    """Return the group of a row, "" where it has none; what is longer than a name (a whole prompt, say) as its hash."""
    group = record.group or ""
    return (
        group
        if len(group) <= GROUP_MAX
        else hashlib.sha256(group.encode(errors="surrogatepass")).hexdigest()[:GROUP_MAX]
    )


def grouped_like(measured: Measured, other: Measured) -> Measured:
    """Return what a model did on rows, in the groups that the same rows have in `other`: an older version wrote none down."""
    if [row.where for row in measured.own] != [row.where for row in other.own]:
        return measured
    groups = iter(row.group for row in other.own)
    return Measured([row if row.part else replace(row, group=next(groups)) for row in measured.rows], measured.task)


def first_of(examples: Sequence[Example], most: int, tokens: int = WORD_TOKENS) -> int:
    """Return how many of the first `most` documents have at most so many tokens between them."""
    ends = np.cumsum([example.token_count for example in examples[:most]])
    return int((ends <= tokens).sum())


def as_references(measured: Measured | None) -> list[list[float]]:
    """Return what a model gave each answer of preferences, such that another can be held against it; empty of other tasks, and of None."""
    return [[p for p, *_ in row.found] for row in measured.own] if measured and measured.task == "preference" else []


def own_reference(measured: Measured) -> Measured:
    """Return what the untouched model did on the run's own preferences, as they are and written otherwise: it is its own reference.

    Rows of other parts have none.
    """
    rows = [
        row if row.part and row.varied is None else replace(row, found=[(p, tokens, p) for p, tokens, _ in row.found])
        for row in measured.rows
    ]
    return Measured(rows, measured.task)


def best_only(example: Example, row: Preference) -> Example:
    """Return a row with its best answer alone."""
    return replace(example, segments=(example.segments[row.best],), label=-1)


def _of_preferences(
    rows: Sequence[Preference],
    examples: Sequence[Example],
    compared: Sequence[Floats],
    references: Sequence[Sequence[float]],
    new: Mapping[int, Answer],
    renderer: Renderer,
) -> list[RowResult]:
    best = [best_only(example, row) for example, row in zip(examples, rows, strict=True)]
    own = np.array([logprobs[row.best] for row, logprobs in zip(rows, compared, strict=True)])
    scores = RowScores(-own, np.array([float(example.target_count) for example in best]))
    answered = _of_answers([row.conversations[row.best] for row in rows], best, scores, new, renderer)
    results = []
    for number, (result, row, example) in enumerate(zip(answered, rows, examples, strict=True)):
        known = references[number] if references else [None] * len(row.answers)
        tokens = [segment.target_count for segment in example.segments]
        # Behind a row's own answers there may be one to another prompt (kto), which is none of its own.
        found = [[float(compared[number][k]), tokens[k], known[k]] for k in range(len(row.answers))]
        results.append(replace(result, truth=list(row.scores), found=found))
    return results


def _of_rewards(rows: Sequence[Preference], rewards: Sequence[Floats], losses: RowScores) -> list[RowResult]:
    results = []
    for row, found, loss in zip(rows, rewards, losses.nll, strict=True):
        ranked = sorted(range(len(found)), key=lambda n, row=row: -row.scores[n])  # type: ignore[misc]
        results.append(
            RowResult(
                where=str(row.where),
                group=row.group or "",
                nll=float(loss),
                targets=float(len(found) > 1),  # an answer that stands alone has no loss
                asked=row.asked.messages[-1].content[:EXCERPT],
                reference=row.answers[row.best].content[:EXCERPT],
                answer="rewards, of the better answer first: " + ", ".join(f"{found[n]:+.3f}" for n in ranked),
                stopped=True,
                truth=list(row.scores),
                found=[[float(reward), 1, 0.0] for reward in found],
            )
        )
    return results


def choose_answered(records: Sequence[Record], answers: int) -> list[int]:
    """Return the numbers of `answers` rows that say what a good answer is, those of the least hashes, in order."""
    able = [n for n, row in enumerate(records) if not isinstance(row, Preference) or row.wanted[row.best]]
    return sorted(sorted(able, key=lambda number: content_hash(records[number]))[:answers])


def _of_answers(
    conversations: Sequence[Conversation],
    examples: Sequence[Example],
    scores: RowScores,
    new: Mapping[int, Answer],
    renderer: Renderer,
) -> list[RowResult]:
    results = []
    for index, conversation in enumerate(conversations):
        asked, _, reference = split_last(conversation)
        results.append(
            RowResult(
                where=str(conversation.where),
                group=short_group(conversation),
                nll=float(scores.nll[index]),
                targets=float(scores.targets[index]),
                asked=asked[-1].content if asked else "",
                reference=reference or renderer.decode(_answer_ids(examples[index])),
                answer=renderer.answer_text(new[index].ids) if index in new else None,
                stopped=index in new and new[index].stopped,
            )
        )
    return results


def _of_choices(
    conversations: Sequence[Conversation], scores: RowScores, weighed: dict[int, Floats], choices: Sequence[str]
) -> list[RowResult]:
    results = []
    for index, conversation in enumerate(conversations):
        asked, _, reference = split_last(conversation)
        values = weighed.get(index)
        results.append(
            RowResult(
                where=str(conversation.where),
                group=short_group(conversation),
                nll=float(scores.nll[index]),
                targets=float(scores.targets[index]),
                asked=asked[-1].content if asked else "",
                reference=reference.strip(),
                answer=None if values is None else choices[int(values.argmax())].strip(),
                stopped=True,
                probability=None if values is None else float(values.max()),
            )
        )
    return results


def _of_labels(records: Sequence[Record], losses: RowScores, outputs: Floats, labels: Labels) -> list[RowResult]:
    results = []
    told = tell(outputs, labels)
    for number, (record, answer) in enumerate(zip(records, told, strict=True)):
        truth: list[Any] = list(record.label) if isinstance(getattr(record, "label", ""), tuple) else [record.label]  # type: ignore[union-attr]
        results.append(
            RowResult(
                where=str(record.where),
                group=short_group(record),
                nll=float(losses.nll[number]),
                targets=float(losses.targets[number]),
                asked="\n".join(record.texts)[:EXCERPT],
                reference=as_text(truth),
                answer=as_text(answer.found),
                stopped=True,
                probability=answer.probability,
                truth=truth,
                found=answer.found,
            )
        )
    return results


def _of_tags(
    records: Sequence[Record], scores: RowScores, tags: Sequence[tuple[Any, Any]], labels: Labels
) -> list[RowResult]:
    results = []
    for record, nll, targets, (numbers, sure) in zip(records, scores.nll, scores.targets, tags, strict=True):
        if not isinstance(record, Tagged):
            raise TypeError(f"{record.where} has no tags")
        found = spread_tags([labels.names[n] for n in numbers], len(record.words))
        results.append(
            RowResult(
                where=str(record.where),
                group=short_group(record),
                nll=float(nll),
                targets=float(targets),
                asked=" ".join(record.words)[:EXCERPT],
                reference=show_tags(record.words, record.tags),
                answer=show_tags(record.words, found),
                stopped=True,
                probability=float(sure.min()) if len(sure) else 0.0,
                truth=list(record.tags),
                found=found,
            )
        )
    return results


def spread_tags(found: Sequence[str], words: int) -> list[str]:
    """Return a tag for every word; those that were cut away are outside of any entity."""
    return [*found, *[OUTSIDE] * (words - len(found))]


def show_tags(words: Sequence[str], tags: Sequence[str]) -> str:
    """Return what is tagged in a row as text: its entities, or words with plain tags."""
    if not has_entities(tags):
        named = [f"{word}/{tag}" for word, tag in zip(words, tags, strict=True) if tag != OUTSIDE]
        return "  ".join(named)
    return "; ".join(f"{' '.join(words[e.begin : e.end])}: {e.type}" for e in entities(tags))


def _of_related(records: Sequence[Record], near: Neighbours) -> list[RowResult]:
    results = []
    for record, loss, rank, cosine in zip(records, near.losses, near.ranks, near.cosines, strict=True):
        score = record.score if isinstance(record, Related) else None
        texts = record.texts if isinstance(record, Related) else (record.content,)
        results.append(
            RowResult(
                where=str(record.where),
                group=short_group(record),
                nll=float(loss),
                targets=1.0,
                asked="\n".join(texts)[:EXCERPT],
                reference="rank 1" if score is None else f"{score:.3g}",
                answer=f"rank {rank:,}" if score is None else f"cosine {cosine:.3f}",
                stopped=True,
                truth=[] if score is None else [score],
                found=[int(rank)] if score is None else [float(cosine)],
            )
        )
    return results


def _of_documents(
    documents: Sequence[Document],
    examples: Sequence[Example],
    scores: RowScores,
    renderer: Encoder,
    lost: Sequence[Floats],
) -> list[RowResult]:
    """Return what became of documents; `lost` is what each target of the first of them lost."""
    results = []
    for number, (document, example) in enumerate(zip(documents, examples, strict=True)):
        first = example.segments[0].ids[:1]
        # A text that begins with a token of its own is predicted whole; else its first token is only read.
        unpredicted = len(renderer.decode(first.tolist()).encode())
        results.append(
            RowResult(
                where=str(document.where),
                group=short_group(document),
                nll=float(scores.nll[number]),
                targets=float(scores.targets[number]),
                asked=document.content[:EXCERPT],
                bytes=len(document.content.encode()) - unpredicted - len(example.cut.encode()),
                words=word_losses(document.content, lost[number], renderer)
                if number < len(lost) and not example.cut
                else (),
            )
        )
    return results


def split_last(conversation: Conversation) -> tuple[Sequence[Any], Sequence[Any], str]:
    """Return what stands before the last trained answer, the tools, and that answer."""
    last = max(index for index, message in enumerate(conversation.messages) if message.trained)
    return conversation.messages[:last], conversation.tools, conversation.messages[last].content


def _silent_tokens(conversation: Conversation, renderer: Renderer) -> int:
    """Return how many tokens of reasoning come before the last answer that are read and not learned."""
    message = next(message for message in reversed(conversation.messages) if message.trained)
    return len(renderer.encode_texts([message.reasoning])[0]) if message.silent and message.reasoning else 0


def _answer_ids(example: Example) -> list[int]:
    """Return the ids of the last answer: what a call of a tool looks like, say."""
    segment = example.segments[-1]
    begin, end = last_answer(segment)
    return [int(id_) for id_ in segment.ids[begin:end]]


def answer_limit(example: Example) -> int:
    """Return how many tokens an answer may have: half more than its reference, and some."""
    return int(example.target_count * LIMIT_OVER_REFERENCE) + LIMIT_EXTRA
