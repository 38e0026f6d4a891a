"""What rows were told and what is right -> the metrics of each task; and scores of an answer against its reference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from headstart.data.labels import Labels
from headstart.evaluate.compare import Calibration, ClassMetric, Metric, Rank, Ratio, SeveralF1, cluster
from headstart.evaluate.entities import count_entities, has_entities
from headstart.evaluate.score import Floats, sigmoid, softmax

WORD = re.compile(r"\w+")


class Scored(Protocol):
    """What metrics need of a row (`RowResult` of measure.py)."""

    nll: float
    targets: float
    answer: str | None
    reference: str
    stopped: bool
    bytes: int
    probability: float | None
    truth: Sequence[Any]
    found: Sequence[Any]
    group: str


def by_group(metrics: Mapping[str, Metric], rows: Sequence[Scored]) -> dict[str, Metric]:
    """Return metrics over rows such that those of one group stand or fall together."""
    groups = [row.group for row in rows]
    return {name: cluster(metric, groups) for name, metric in metrics.items()}


def task_metrics(task: str, rows: Sequence[Any]) -> dict[str, Metric]:  # noqa: PLR0911 (a line for each task)
    """Return the metrics of a task over rows, the more telling ones first."""
    if task in ("classification", "images"):
        return {**class_metrics(rows), **_loss("cross_entropy", rows)}
    if task == "multilabel":
        return {**_several_metrics(rows), **_loss("cross_entropy", rows)}
    if task == "regression":
        return _number_metrics(rows)
    if task == "tagging":
        return {**_tag_metrics(rows), **_loss("nll", rows)}
    if task == "embedding":
        return _related_metrics(rows)
    if task == "preference":
        return _preference_metrics(rows)
    if task == "reward":
        return _reward_metrics(rows)
    return _text_metrics(rows)


def class_metrics(rows: Sequence[Scored]) -> dict[str, Metric]:
    """Return the metrics of rows that have one class each."""
    truth, found = [row.reference for row in rows], [row.answer or "" for row in rows]
    right = np.array([float(t == f) for t, f in zip(truth, found, strict=True)])
    metrics: dict[str, Metric] = {"accuracy": _rate(right)}
    metrics |= {name: ClassMetric.of(truth, found, name) for name in ("macro_f1", "weighted_f1", "mcc")}
    sure = np.array([row.probability or 0.0 for row in rows])
    names = sorted({*truth, *found})
    if len(set(truth)) == len(names) == 2:
        # What isn't told has what is left of the probability.
        second = np.array([p if f == names[1] else 1 - p for p, f in zip(sure, found, strict=True)])
        metrics["auroc"] = Rank(np.array([float(t == names[1]) for t in truth]), second, "auroc")
    metrics["calibration"] = Calibration(sure, right)
    return by_group(metrics, rows)


def _several_metrics(rows: Sequence[Scored]) -> dict[str, Metric]:
    names = sorted({name for row in rows for name in (*row.truth, *row.found)})
    truth = np.array([[name in row.truth for name in names] for row in rows])
    found = np.array([[name in row.found for name in names] for row in rows])
    both = truth.sum(1) + found.sum(1)
    metrics: dict[str, Metric] = {
        "micro_f1": Ratio(2.0 * (truth & found).sum(1), both.astype(np.float64)),
        "macro_f1": SeveralF1(truth, found, names),
        "all_right": _rate((truth == found).all(1).astype(np.float64)),
    }
    return by_group(metrics, rows)


def _number_metrics(rows: Sequence[Scored]) -> dict[str, Metric]:
    truth, found = np.array([row.truth for row in rows], float), np.array([row.found for row in rows], float)
    around = (truth - truth.mean(0)) ** 2
    spread = np.where(around.mean(0) > 0, around.mean(0), 1.0)
    errors = (truth - found) ** 2
    one = np.ones(len(rows))
    metrics: dict[str, Metric] = {}
    if around.any():
        metrics["r2"] = Ratio((errors / spread).sum(1), (around / spread).sum(1), transform=lambda share: 1 - share)
    for column in range(truth.shape[1]):
        more = f"_{column + 1}" if truth.shape[1] > 1 else ""
        metrics[f"mae{more}"] = Ratio(np.abs(truth - found)[:, column], one, lower_is_better=True)
        metrics[f"rmse{more}"] = Ratio(errors[:, column], one, lower_is_better=True, transform=np.sqrt)
        metrics[f"spearman{more}"] = Rank(truth[:, column], found[:, column])
    return by_group(metrics, rows)


def _tag_metrics(rows: Sequence[Scored]) -> dict[str, Metric]:
    right = np.array([float(sum(t == f for t, f in zip(row.truth, row.found, strict=True))) for row in rows])
    words = np.array([float(len(row.truth)) for row in rows])
    metrics: dict[str, Metric] = {}
    if any(has_entities(row.truth) for row in rows):
        hits, told, there = np.array([count_entities(row.truth, row.found) for row in rows]).T
        metrics["entity_f1"] = Ratio(2 * hits, told + there)
        metrics["entity_precision"] = Ratio(hits, told)
        metrics["entity_recall"] = Ratio(hits, there)
    metrics["tag_accuracy"] = Ratio(right, words)
    return by_group(metrics, rows)


def _related_metrics(rows: Sequence[Scored]) -> dict[str, Metric]:
    found = np.array([float(row.found[0]) for row in rows])
    if rows[0].truth:
        truth = np.array([float(row.truth[0]) for row in rows])
        return {**by_group({"spearman": Rank(truth, found)}, rows), **_loss("cross_entropy", rows)}
    metrics: dict[str, Metric] = {
        "recall_at_1": _rate((found <= 1).astype(np.float64)),
        "recall_at_10": _rate((found <= 10).astype(np.float64)),
        "mrr": _mean(1 / found),
    }
    return {**by_group(metrics, rows), **_loss("cross_entropy", rows)}


def _preference_metrics(rows: Sequence[Scored]) -> dict[str, Metric]:
    """Return how answers fare that are preferred: `truth` are their scores, `found` of each (logprob, tokens, reference or None).

    Of a lone answer the score says whether it is wanted. Neither side's own likelihood decides a verdict: to make answers
    less likely that are worse is the task, and chosen ones may follow.
    """
    found = [np.array([(p, n, np.nan if r is None else r) for p, n, r in row.found], float) for row in rows]
    scores = [np.array(row.truth, float) for row in rows]
    pairs = [np.argwhere(s[:, None] > s[None]) for s in scores]
    lone = np.array([len(s) == 1 for s in scores])
    gains = [f[:, 0] - f[:, 2] for f in found]
    metrics: dict[str, Metric] = {}
    if all(np.isfinite(gain).all() for gain in gains):
        kept = np.array([_won(g, p, s) for g, p, s in zip(gains, pairs, scores, strict=True)])
        metrics |= by_group({"preference_accuracy": _right_or_mean(kept)}, rows)
    rates = [f[:, 0] / f[:, 1] for f in found]
    several, votes = np.flatnonzero(~lone).tolist(), np.flatnonzero(lone).tolist()
    if len(several):
        likelier = _right_or_mean(np.array([_won(rates[n], pairs[n], scores[n]) for n in several]))
        margins = [found[n][pairs[n][:, 0], 0] - found[n][pairs[n][:, 1], 0] for n in several]
        margin = _mean(np.array([margin.mean() for margin in margins]))
        metrics |= by_group({"likelier": likelier, "margin": margin}, [rows[n] for n in several])
    if len({scores[n][0] > 0.5 for n in votes}) == 2:
        wanted = np.array([float(scores[n][0] > 0.5) for n in votes])
        told = Rank(wanted, np.array([rates[n][0] for n in votes]), "auroc")
        metrics |= by_group({"wanted_auroc": told}, [rows[n] for n in votes])
    best = [s >= (0.5 if len(s) == 1 else s.max()) for s in scores]
    for name, chosen in (("chosen_logprob", best), ("rejected_logprob", [~b for b in best])):
        counts = np.array([float(c.sum()) for c in chosen])
        means = np.array([f[c, 0].mean() if c.any() else 0.0 for f, c in zip(found, chosen, strict=True)])
        if counts.any():
            # Over the rows that have such an answer: of votes a draw might else hold none, and tell nothing.
            some = means[counts > 0]
            worse = name == "rejected_logprob"
            ratio = Ratio(some, np.ones(len(some)), lower_is_better=worse, decides=False)
            metrics |= by_group({name: ratio}, [row for row, count in zip(rows, counts, strict=True) if count])
    answered = [row for row in rows if row.answer is not None]
    return {**metrics, **(_answer_metrics(answered) if answered else {})}


def _reward_metrics(rows: Sequence[Scored]) -> dict[str, Metric]:
    """Return how rewards put answers in order, whose scores are `truth`: `found` begins with the reward of each."""
    scores = [np.array(row.truth, float) for row in rows]
    rewards = [np.array([reward for reward, *_ in row.found]) for row in rows]
    metrics: dict[str, Metric] = {}
    several = [(r, s, np.argwhere(s[:, None] > s[None])) for r, s in zip(rewards, scores, strict=True) if len(s) > 1]
    if several:
        accuracy = _right_or_mean(np.array([_won(r, p, s) for r, s, p in several]))
        leads = np.array([(r[p[:, 0]] - r[p[:, 1]]).mean() for r, _, p in several])
        margin = Ratio(leads, np.ones(len(leads)), decides=False)  # rewards have no unit
        some = [row for row in rows if len(row.truth) > 1]
        metrics |= {
            **by_group({"reward_accuracy": accuracy, "reward_margin": margin}, some),
            **_loss("cross_entropy", some),
        }
    votes = [(s[0] > 0.5, r[0]) for r, s in zip(rewards, scores, strict=True) if len(s) == 1]
    if len({wanted for wanted, _ in votes}) == 2:
        wanted, found = np.array(votes, float).T
        metrics |= by_group(
            {"reward_auroc": Rank(wanted, found, "auroc")}, [row for row in rows if len(row.truth) == 1]
        )
    return metrics


def won(truth: Sequence[float], found: Sequence[Any]) -> float:
    """Return the part of a row's pairs in which the better answer gained more than the worse, a tie counting half.

    `truth` are the scores of its answers, `found` of each its log-probability, its tokens, and what the reference gave it.
    """
    scores = np.array(truth, float)
    gains = np.array([logprob - reference for logprob, _, reference in found])
    return _won(gains, np.argwhere(scores[:, None] > scores[None]), scores)


def _won(values: Floats, pairs: Any, scores: Floats) -> float:
    """Return the part of pairs in which the better answer has the higher value, a tie counting half; of a lone answer, if its
    value is above 0 as its score is, or below.
    """
    leads = (
        values[pairs[:, 0]] - values[pairs[:, 1]] if len(scores) > 1 else values * (1.0 if scores[0] > 0.5 else -1.0)
    )
    return float(((leads > 0) + 0.5 * (leads == 0)).mean())


def _text_metrics(rows: Sequence[Scored]) -> dict[str, Metric]:
    nll, targets = np.array([row.nll for row in rows]), np.array([row.targets for row in rows])
    metrics = _loss("nll", rows)
    if all(row.bytes for row in rows):
        perplexity = Ratio(nll, targets, lower_is_better=True, transform=np.exp)
        sizes = np.array([float(row.bytes) for row in rows])
        bits = Ratio(nll / np.log(2), sizes, lower_is_better=True)
        metrics |= by_group({"perplexity": perplexity, "bits_per_byte": bits}, rows)
    answered = [row for row in rows if row.answer is not None]
    if answered and all(row.probability is not None for row in answered):  # out of a known set
        return {**class_metrics(answered), **metrics}
    return {**metrics, **(_answer_metrics(answered) if answered else {})}


def _answer_metrics(answered: Sequence[Scored]) -> dict[str, Metric]:
    """Return how near answers come to their references, and how often they end by themselves."""
    metrics: dict[str, Metric] = {}
    for name, score, of in (("exact_match", exact_match, _rate), ("rouge_l", rouge_l, _mean), ("chrf", chrf, _mean)):
        metrics[name] = of(np.array([score(row.answer or "", row.reference) for row in answered]))
    metrics["stop_rate"] = _rate(np.array([float(row.stopped) for row in answered]))
    return by_group(metrics, answered)


def grade_metrics(rows: Sequence[Any]) -> dict[str, Metric]:
    """Return the mean score of each grader over the rows that it could grade.

    It is a rate where the scores say that a row can only pass or fail; on any other scale a score may be 0 or 1 by chance.
    """
    names = dict.fromkeys(name for row in rows for name in row.grades)
    graded = {name: [row for row in rows if row.grades.get(name) is not None] for name in names}
    metrics: dict[str, Metric] = {}
    for name, some in graded.items():
        if some:
            scores = [row.grades[name] for row in some]
            of = _rate if all(isinstance(score, bool) for score in scores) else _mean
            metrics |= by_group({name: of(np.array(scores, float))}, some)
    return metrics


def _right_or_mean(values: Floats) -> Ratio:
    """Return the mean of parts that are right, each from 0 to 1; as a rate where all are 1 or 0, as of pairs without a tie."""
    return _rate(values) if np.isin(values, (0, 1)).all() else _mean(values)


def _loss(name: str, rows: Sequence[Scored]) -> dict[str, Metric]:
    """Return the loss; of no rows that have one, nothing."""
    targets = np.array([row.targets for row in rows])
    nll = np.array([row.nll for row in rows])
    return by_group({name: Ratio(nll, targets, lower_is_better=True)}, rows) if targets.all() else {}


def _mean(values: Floats) -> Ratio:
    return Ratio(values, np.ones(len(values)))


def _rate(right: Floats) -> Ratio:
    """Return how many rows are right, each 1 or 0."""
    return Ratio(right, np.ones(len(right)), right=True)


class Told(NamedTuple):
    """What a model tells of a row: a class, classes or numbers, and the probability of the class where there is one."""

    found: list[Any]
    probability: float | None
    probabilities: list[float]


def tell(outputs: Floats, labels: Labels) -> list[Told]:
    """Return what outputs [N, C] say, in the words and units of the labels."""
    if labels.task == "regression":
        values = outputs * np.array(labels.spread) + np.array(labels.mean)
        return [Told([float(value) for value in row], None, []) for row in values]
    probabilities = sigmoid(outputs) if labels.task == "multilabel" else softmax(outputs)
    told = []
    for row in probabilities:
        if labels.task == "multilabel":
            found = [name for name, value in zip(labels.names, row, strict=True) if value >= labels.threshold]
            told.append(Told(found, None, row.tolist()))
        else:
            best = int(row.argmax())
            told.append(Told([labels.names[best]], float(row[best]), row.tolist()))
    return told


def best_threshold(outputs: Floats, truth: Floats) -> float:
    """Return the probability from which classes are told such that their micro F1 is highest; `truth` 0 or 1, both [N, C]."""
    if not truth.any():
        return 0.5  # nothing to choose by
    probabilities = sigmoid(outputs).ravel()
    order = np.argsort(-probabilities, kind="stable")
    hits = np.cumsum(truth.ravel()[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + truth.sum())
    f1[:-1][np.diff(probabilities[order]) == 0] = 0.0  # no threshold parts equal ones
    best = int(f1.argmax())
    lower = probabilities[order[best + 1]] if best + 1 < len(order) else 0.0
    return float((probabilities[order[best]] + lower) / 2)


def as_text(values: Sequence[Any]) -> str:
    """Return what was told as text."""
    return ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)


def exact_match(answer: str, reference: str) -> float:
    """Return 1 where the two are equal up to white space."""
    return float(answer.split() == reference.split())


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L F1 over lower-case words (Lin, 2004): the longest common subsequence against both lengths."""
    a, b = words(answer), words(reference)
    common = common_subsequence(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def chrf(answer: str, reference: str) -> float:
    """Return sentence chrF, 0 to 100, as sacrebleu computes it (Popović, 2015)."""
    import sacrebleu

    return float(sacrebleu.sentence_chrf(answer, [reference]).score)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return WORD.findall(text.lower())


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, a row of the table a number (Hyyrö, 2004)."""
    where: dict[str, int] = {}
    for place, item in enumerate(a):
        where[item] = where.get(item, 0) | 1 << place
    whole = (1 << len(a)) - 1
    row = whole
    for item in b:
        met = row & where.get(item, 0)
        row = (row + met | row - met) & whole
    return len(a) - row.bit_count()
