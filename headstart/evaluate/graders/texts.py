"""Two texts -> how alike they are, 0 to 1; the last number of a text. Words are lower-case runs of letters, digits and underscores."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from headstart.errors import Problem, UsageError
from headstart.evaluate.metrics import common_subsequence, rouge_l, words

ORDERS = 4  # n-grams up to these count for GLEU
ARTICLES = re.compile(r"\b(a|an|the)\b")
NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?!\.?\d)", re.IGNORECASE
)


def fuzzy_match(text: str, reference: str) -> float:
    """Return the normalised indel similarity, as rapidfuzz's `ratio` is: twice what is common against both lengths."""
    total = len(text) + len(reference)
    return 2 * common_subsequence(text, reference) / total if total else 1.0


def bleu(text: str, reference: str) -> float:
    """Return sentence BLEU as sacrebleu computes it (Papineni et al., 2002), as a part of 1."""
    import sacrebleu

    return float(sacrebleu.sentence_bleu(text, [reference]).score) / 100


def gleu(text: str, reference: str) -> float:
    """Return sentence GLEU (Wu et al., 2016): n-grams of 1 to 4 words in common, against those of the longer side."""
    counts = [(ngrams(words(text), order), ngrams(words(reference), order)) for order in range(1, ORDERS + 1)]
    common = sum((a & b).total() for a, b in counts)
    most = max(sum(a.total() for a, _ in counts), sum(b.total() for _, b in counts))
    return common / most if most else 0.0


def meteor(text: str, reference: str) -> float:
    """Return METEOR (Banerjee & Lavie, 2005) by equal words and equal Porter stems, as nltk computes it.

    Synonyms don't count: whether WordNet lies on a machine would change the score. Raises UsageError without nltk.
    """
    try:
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError:
        raise need("nltk", "meteor") from None
    return float(single_meteor_score(words(reference), words(text), wordnet=_NoSynonyms()))


class _NoSynonyms:
    """A WordNet in which no word has a synonym."""

    def synsets(self, _: str) -> list[object]:
        return []


def rouge_n(text: str, reference: str, order: int) -> float:
    """Return ROUGE-N F1 (Lin, 2004): n-grams of `order` words in common against those of both."""
    a, b = ngrams(words(text), order), ngrams(words(reference), order)
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 0.0


def ngrams(of: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """Count the runs of `order` words."""
    return Counter(tuple(of[place : place + order]) for place in range(len(of) - order + 1))


SIMILARITIES: Mapping[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    "meteor": meteor,
    "rouge_l": rouge_l,
    **{f"rouge_{order}": functools.partial(rouge_n, order=order) for order in range(1, 6)},
}
CHECKS: Mapping[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}


def normalise(text: str, ignore: Collection[str]) -> str:
    """Return a text without what doesn't count, in the order of SQuAD's script (Rajpurkar et al., 2016)."""
    text = text.casefold() if "case" in ignore else text
    text = text.translate(str.maketrans("", "", string.punctuation)) if "punctuation" in ignore else text
    text = ARTICLES.sub(" ", text) if "articles" in ignore else text
    return " ".join(text.split()) if "space" in ignore else text


def last_number(text: str) -> float | None:
    """Return the last number of a text; None where there is none.

    A unit may follow at once (5kg), and a letter or a point may not go before. A comma belongs to a number only between
    thousands (1,234,567), else it parts two. What has several points (1.2.3) is no number.
    """
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def need(package: str, what: str) -> UsageError:
    """Return the error of a grader whose package isn't installed."""
    cure = 'pip install "headstart[graders]"'
    return UsageError(Problem("grader.package", f"{what} needs {package}, which isn't installed", package, cure))
