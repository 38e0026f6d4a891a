"""The same ruler before and after: a model on frozen rows -> what it scored and what it answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from headstart.data.encode import Encoder
from headstart.data.feed import content_hash
from headstart.data.records import Conversation, Document, Labelled, Record
from headstart.data.render import Renderer
from headstart.data.segments import Example
from headstart.engine.forward import LabelReader, Reader
from headstart.evaluate.compare import MacroF1, Metric
from headstart.evaluate.generate import generate
from headstart.evaluate.metrics import chrf, exact_match, rouge_l
from headstart.evaluate.score import Floats, RowScores, classify_rows, score_rows
from headstart.models.load import model_length

PRIMARY = {"instruction": "nll", "unsupervised": "bits_per_byte", "supervised": "accuracy"}
PER_TOKEN = ("nll", "perplexity")
LABELS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "cross_entropy": "loss per row",
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
EXCERPT = 1_000  # characters of a document that the report may show

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class RowResult:
    """One row: its summed nll over `targets` tokens and, if it was answered, the answer beside its reference.

    Of a document, `bytes` are those of the text that was predicted; of a labelled row, `answer` and `reference` are
    classes, and `probability` that of the answer.
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


@dataclass(frozen=True)
class Measured:
    """What a model did on the frozen rows."""

    rows: Sequence[RowResult]

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as plain values."""
        return [asdict(row) for row in self.rows]

    @staticmethod
    def from_json(rows: Sequence[dict[str, Any]]) -> Measured:
        """Read what `to_json` gave."""
        return Measured([RowResult(**row) for row in rows])

    def metrics(self) -> dict[str, Metric | MacroF1]:
        """Return the metrics over rows; those of answers over the rows that were answered."""
        nll = np.array([row.nll for row in self.rows])
        targets = np.array([row.targets for row in self.rows])
        found: dict[str, Metric | MacroF1] = {}
        if all(row.probability is not None for row in self.rows):
            found["accuracy"] = _mean([float(row.answer == row.reference) for row in self.rows])
            found["macro_f1"] = MacroF1.of(
                [row.reference for row in self.rows], [row.answer or "" for row in self.rows]
            )
            if targets.all():
                found["cross_entropy"] = Metric(nll, targets, lower_is_better=True)
            return found
        found["nll"] = Metric(nll, targets, lower_is_better=True)
        if all(row.bytes for row in self.rows):
            found["perplexity"] = Metric(nll, targets, lower_is_better=True, transform=np.exp)
            sizes = np.array([float(row.bytes) for row in self.rows])
            found["bits_per_byte"] = Metric(nll / np.log(2), sizes, lower_is_better=True)
        answered = [row for row in self.rows if row.answer is not None]
        if answered:
            for name, score in (("exact_match", exact_match), ("rouge_l", rouge_l), ("chrf", chrf)):
                found[name] = _mean([score(row.answer or "", row.reference) for row in answered])
            found["stop_rate"] = _mean([float(row.stopped) for row in answered])
        return found


def measure(
    reader: Reader,
    renderer: Encoder,
    records: Sequence[Record],
    examples: Sequence[Example],
    *,
    tokens_per_pack: int,
    answers: int,
    classes: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> Measured:
    """Score every row and answer `answers` of the conversations, chosen by a hash of their content.

    `classes` are those that a classifier tells apart. `records` and `examples` are the same rows. The answer that is
    compared is that of a row's last trained turn.
    """

    def told(what: str) -> Callable[[int, int], None] | None:
        return (lambda done, total: on_progress(what, done, total)) if on_progress else None

    labelled = [record for record in records if isinstance(record, Labelled)]
    if labelled and isinstance(reader, LabelReader):
        probabilities = classify_rows(reader, examples, tokens_per_pack, told("scoring"))
        return Measured(_of_labels(labelled, examples, probabilities, classes))
    scores = score_rows(reader, examples, tokens_per_pack, told("scoring"))
    documents = [record for record in records if isinstance(record, Document)]
    if documents:
        return Measured(_of_documents(documents, examples, scores, renderer))
    if not isinstance(renderer, Renderer):
        raise TypeError("conversations are rendered by a Renderer")
    conversations = [record for record in records if isinstance(record, Conversation)]
    by_hash = sorted(range(len(conversations)), key=lambda index: content_hash(conversations[index]))
    chosen = sorted(by_hash[:answers])
    prompts = [renderer.prompt(asked, tools) for asked, tools, _ in map(split_last, (conversations[i] for i in chosen))]
    limits = [answer_limit(examples[index]) for index in chosen]
    length = model_length(reader.model.config)
    answered = generate(reader.model, prompts, renderer.stop_ids, limits, length, told("answering"))
    new = dict(zip(chosen, answered, strict=True))
    results = []
    for index, conversation in enumerate(conversations):
        asked, _, reference = split_last(conversation)
        results.append(
            RowResult(
                where=str(conversation.where),
                nll=float(scores.nll[index]),
                targets=float(scores.targets[index]),
                asked=asked[-1].content if asked else "",
                reference=reference or renderer.decode(last_answer(examples[index])),
                answer=renderer.decode(new[index].ids) if index in new else None,
                stopped=index in new and new[index].stopped,
            )
        )
    return Measured(results)


def _of_labels(
    records: Sequence[Labelled], examples: Sequence[Example], probabilities: Floats, classes: Sequence[str]
) -> list[RowResult]:
    results = []
    for record, example, values in zip(records, examples, probabilities, strict=True):
        best = int(values.argmax())
        known = example.label >= 0
        results.append(
            RowResult(
                where=str(record.where),
                nll=-math.log(max(float(values[example.label]), 1e-300)) if known else 0.0,
                targets=float(known),
                asked=record.text[:EXCERPT],
                reference=record.label,
                answer=classes[best],
                stopped=True,
                probability=float(values[best]),
            )
        )
    return results


def _of_documents(
    documents: Sequence[Document], examples: Sequence[Example], scores: RowScores, renderer: Encoder
) -> list[RowResult]:
    results = []
    for document, example, nll, targets in zip(documents, examples, scores.nll, scores.targets, strict=True):
        first = example.segments[0].ids[:1]
        # A text that begins with a token of its own is predicted whole; else its first token is only read.
        unpredicted = len(renderer.decode(first.tolist()).encode())
        results.append(
            RowResult(
                where=str(document.where),
                nll=float(nll),
                targets=float(targets),
                asked=document.content[:EXCERPT],
                bytes=len(document.content.encode()) - unpredicted - len(example.cut.encode()),
            )
        )
    return results


def split_last(conversation: Conversation) -> tuple[Sequence[Any], Sequence[Any], str]:
    """Return what stands before the last trained answer, the tools, and that answer."""
    last = max(index for index, message in enumerate(conversation.messages) if message.trained)
    return conversation.messages[:last], conversation.tools, conversation.messages[last].content


def last_answer(example: Example) -> list[int]:
    """Return the ids of the last stretch of trained tokens: what a call of a tool looks like, say."""
    segment = example.segments[-1]
    trained = np.flatnonzero(segment.weights)
    begin = trained[np.flatnonzero(np.diff(trained, prepend=-2) > 1)[-1]]
    return [int(id_) for id_ in segment.ids[begin : trained[-1] + 1]]


def answer_limit(example: Example) -> int:
    """Return how many tokens an answer may have: half more than its reference, and some."""
    return int(example.target_count * LIMIT_OVER_REFERENCE) + LIMIT_EXTRA


def _mean(values: Sequence[float]) -> Metric:
    return Metric(np.array(values), np.ones(len(values)))
