"""What each word of a text cost a model: the right tokens, the right words, the right means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headstart.data.documents import segment_documents
from headstart.data.read import Where
from headstart.data.records import Document
from headstart.data.render import Renderer
from headstart.engine.forward import PackReader
from headstart.evaluate.measure import Measured, RowResult, measure
from headstart.evaluate.score import score_rows, score_tokens
from headstart.evaluate.surprise import SHOWN, find_surprises, word_losses
from headstart.models.load import load_tokenizer, stop_ids
from headstart.models.source import find_model

TEXTS = ["The patient has a sore throat. " * 6, "The patient has a plan.", "A report of three days, and an answer."]


@pytest.fixture
def renderer(tiny_model: Path) -> Renderer:
    source = find_model(str(tiny_model))
    tokenizer = load_tokenizer(source)
    return Renderer(tokenizer, stop_ids(source, tokenizer), "plain")


def test_tokens_of_packed_documents_lose_what_they_lose_alone(tiny_model: Path, renderer: Renderer) -> None:
    documents = [Document(Where("f", n), text) for n, text in enumerate(TEXTS)]
    rows = segment_documents(documents, renderer, max_length=12, whole=True)
    assert len(rows.examples[0].segments) > 2
    reader = PackReader(AutoModelForCausalLM.from_pretrained(tiny_model))
    scores, lost = score_tokens(reader, rows.examples, 40, first=2)
    assert len(lost) == 2  # of the third it wasn't asked
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for example, losses in zip(rows.examples[:2], lost, strict=True):
        wanted: list[float] = []
        for piece in example.segments:
            ids = torch.from_numpy(piece.ids.astype(np.int64))[None]
            with torch.no_grad():
                logits = plain(ids).logits[0]
            wanted += torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist()
        assert losses == pytest.approx(wanted, rel=1e-4)
    whole = score_rows(reader, rows.examples, 40)
    assert (scores.nll == whole.nll).all()
    assert scores.nll[:2] == pytest.approx([losses.sum() for losses in lost])


@pytest.mark.parametrize("predicted", [0, 1])
def test_a_word_costs_what_its_tokens_cost(tiny_model: Path, renderer: Renderer, predicted: int) -> None:
    text = "Pain, since 3 days;\n\n(Throat) is  sore. x1w 61 -"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    pieces = [tokenizer.decode([id_]) for id_ in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == text
    # Each token costs another power of two, so a sum tells which tokens are in it.
    costs = 2.0 ** np.arange(len(pieces))
    wanted, place = [], 0
    for word in text.split():
        begin = text.index(word, place)
        ends = np.cumsum([len(piece) for piece in pieces])
        of = [
            n
            for n, (end, piece) in enumerate(zip(ends, pieces, strict=True))
            if end > begin and end - len(piece) < begin + len(word)
        ]
        wanted.append((word, sum(costs[of]), of[0]))
        place = begin + len(word)
    names = {
        "Pain,": "pain",
        "since": "since",
        "days;": "days",
        "(Throat)": "throat",
        "is": "is",
        "sore.": "sore",
        "x1w": "x1w",
    }
    expected = [(names[word], cost) for word, cost, first in wanted if word in names and first >= 1 - predicted]
    assert word_losses(text, costs[1 - predicted :], renderer) == expected


def test_what_is_no_word_of_a_language_is_left_out(renderer: Renderer) -> None:
    text = "see " + "x" * 41 + " now"
    losses = np.ones(len(renderer.spans(text)))
    assert [word for word, _ in word_losses(text, losses, renderer)] == ["see", "now"]


def test_documents_that_were_cut_tell_no_words(tiny_model: Path, renderer: Renderer) -> None:
    documents = [Document(Where("f", n), text) for n, text in enumerate(TEXTS)]
    rows = segment_documents(documents, renderer, max_length=12, over_length="cut", whole=True)
    assert [bool(example.cut) for example in rows.examples] == [True, False, True]
    reader = PackReader(AutoModelForCausalLM.from_pretrained(tiny_model))
    found = measure(reader, renderer, documents, rows.examples, task="causal", tokens_per_pack=40, words=3)
    assert [bool(row.words) for row in found.rows] == [False, True, False]


def test_the_most_surprising_words_are_those_of_the_largest_means() -> None:
    def measured(*words: tuple[str, float]) -> Measured:
        guard = RowResult("g:1", 1.0, 1.0, bytes=9, part="general text", guard=True, words=[("general", 99.0)])
        return Measured(
            [
                RowResult("f:1", 1.0, 1.0, bytes=9, words=words[:3]),
                RowResult("f:2", 1.0, 1.0, bytes=9, words=words[3:]),
                guard,
            ],
            "causal",
        )

    found = find_surprises(
        measured(("a", 1.0), ("b", 4.0), ("a", 3.0), ("c", 3.0)),
        measured(("a", 1.0), ("b", 0.6), ("a", 0.0), ("c", 2.0)),
    )
    assert found is not None
    assert [item["word"] for item in found["before"]] == ["b", "c", "a"]
    assert [item["word"] for item in found["after"]] == ["c", "b", "a"]
    assert [item["word"] for item in found["gained"]] == ["b", "a", "c"]  # 3.4, twice 1.5, 1
    assert found["before"][2] == {"word": "a", "times": 2, "before": 2.0, "after": 0.5}
    # Where enough words stand often, one that stands once is none.
    often = [(f"w{n}", 1.0) for n in range(SHOWN)] * 3
    many = find_surprises(measured(*often, ("once", 50.0)), measured(*often, ("once", 50.0)))
    assert many is not None
    assert "once" not in {item["word"] for item in many["before"]}
    assert find_surprises(measured(), measured()) is None
