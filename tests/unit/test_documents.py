"""Text to continue: found, cut without loss, and scored as a reference does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headstart.config import DataSettings
from headstart.data.documents import measure_fit, segment_documents, split_tokens
from headstart.data.encode import Encoder, Tokens
from headstart.data.forest import build_packs
from headstart.data.formats import Named, format_rows
from headstart.data.prepare import Coding, segment
from headstart.data.read import Row, Where, find_files, read
from headstart.data.records import Document
from headstart.data.render import Renderer
from headstart.engine.forward import PackReader
from headstart.errors import DataError
from headstart.evaluate.compare import compare_all
from headstart.evaluate.measure import measure
from headstart.models.attention import register, use_attention
from tests.tokens import make_tokenizer
from tests.twins import twin

TEXT = "The patient has a sore throat for three days. What should the doctor write?"


def renderer() -> Renderer:
    tokenizer = make_tokenizer("chatml")
    return Renderer(tokenizer, (tokenizer.eos_token_id,), "plain")


def documents(*texts: str) -> list[Document]:
    return [Document(Where("f", line), text) for line, text in enumerate(texts, 1)]


def form(*rows: dict[str, Any], **how: Any) -> Any:
    named = Named(**{key: how.pop(key) for key in list(how) if key in Named.__dataclass_fields__})
    return format_rows([Row(Where("f", n), row) for n, row in enumerate(rows, 1)], named=named, **how)


@pytest.mark.parametrize(
    ("row", "how", "certainty"),
    [
        ({"text": TEXT, "id": 3}, {}, "certain"),
        ({"text": TEXT, "pages": 3}, {}, "likely"),
        ({"body": TEXT, "id": 3}, {"text": "body"}, "given"),
        ({"body": TEXT[:4], "rest": TEXT[4:]}, {"text": "{body}{rest}"}, "given"),
    ],
)
def test_text_is_found_or_named(row: dict[str, Any], how: dict[str, str], certainty: str) -> None:
    formatted = form(row, **how)
    assert (formatted.detection.kind, formatted.detection.certainty) == ("unsupervised", certainty)
    assert [document.content for document in formatted.examples] == [TEXT]


def test_bad_documents_are_named() -> None:
    formatted = form({"text": "a"}, {"text": " \n"}, {"text": None}, {"text": "\ud800"}, {"text": ["a"]})
    assert [(problem.code, problem.where[:3]) for problem in formatted.problems] == [
        ("row.empty_text", "f:2"),
        ("row.field_missing", "f:3"),
        ("row.unencodable", "f:4"),
        ("row.field_type", "f:5"),
    ]


def test_text_files_are_documents_and_beside_tables_they_are_not_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "b.md").write_text("# three", encoding="utf-8")
    rows = list(read(find_files([str(tmp_path)])))
    assert [(row.where.line, row.fields["text"]) for row in rows if isinstance(row, Row)] == [
        (1, "one\n\ntwo\n"),
        (1, "# three"),
    ]
    (tmp_path / "c.jsonl").write_text('{"text": "four"}\n', encoding="utf-8")
    assert [file.path.name for file in find_files([str(tmp_path)])] == ["c.jsonl"]
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (problem,) = list(read(find_files([str(tmp_path / "bad.txt")])))
    assert (problem.code, problem.is_row) == ("data.encoding", True)


@pytest.mark.parametrize("length", range(1, 30))
@pytest.mark.parametrize("limit", [2, 3, 7, 29, 30])
def test_every_token_but_the_first_is_predicted_exactly_once(length: int, limit: int) -> None:
    tokens = Tokens(np.arange(length, dtype=np.int32), np.ones(length, np.bool_))
    for positions in ("restart", "continue"):
        pieces = split_tokens(tokens, limit, positions)
        predicted = np.concatenate([piece.ids[np.flatnonzero(piece.weights)] for piece in pieces])
        assert predicted.tolist() == list(range(1, length))
        assert all(len(piece) <= limit for piece in pieces)
        starts = [int(piece.ids[0]) if positions == "continue" else 0 for piece in pieces]
        assert [piece.first for piece in pieces] == starts


def test_positions_carry_on_through_a_pack_and_pieces_that_begin_elsewhere_share_nothing() -> None:
    ids = np.array([5] * 40, np.int32)
    pieces = split_tokens(Tokens(ids, np.ones(40, np.bool_)), 21, "continue")
    from headstart.data.segments import Example

    (pack,) = build_packs([Example(Where("f", 1), (piece,)) for piece in pieces], 100)
    assert pack.positions.tolist() == [*range(21), *range(20, 40)]
    assert pack.parent.tolist() == [-1, -1]


def test_long_documents_are_split_dropped_cut_or_refused() -> None:
    own = renderer()
    rows = documents(TEXT, "short")
    whole = own.encode([own.document(TEXT, end=True)])[0].ids
    limit = len(whole) // 3
    split = segment_documents(rows, own, max_length=limit)
    assert sum(example.target_count for example in split.examples) == len(whole) - 1 + split.examples[-1].target_count
    assert {str(example.where) for example in split.examples} == {"f:1", "f:2"}
    assert len(split.examples) == len(split.kept) > 3
    dropped = segment_documents(rows, own, max_length=limit, over_length="drop")
    assert [str(where) for where, _ in dropped.dropped] == ["f:1"]
    cut = segment_documents(rows, own, max_length=limit, over_length="cut")
    assert cut.examples[0].token_count == limit
    assert own.decode(cut.examples[0].segments[0].ids.tolist()) + cut.examples[0].cut == TEXT
    with pytest.raises(DataError, match="f:1"):
        segment_documents(rows, own, max_length=limit, over_length="error")


def test_the_end_of_a_text_is_trained_and_not_scored() -> None:
    own = renderer()
    end = own.stop_ids[0]
    trained = segment_documents(documents(TEXT), own, max_length=500).examples[0].segments[0]
    scored = segment_documents(documents(TEXT), own, max_length=500, whole=True).examples[0].segments[0]
    assert trained.ids[-1] == end
    assert trained.weights[-1] == 1
    assert trained.ids[:-1].tolist() == scored.ids.tolist()


def test_a_text_of_one_token_is_told_whatever_it_is_for() -> None:
    for whole in (True, False):
        found = segment_documents(documents("yes", TEXT), renderer(), max_length=500, whole=whole)
        assert [problem.where for problem in found.problems] == ["f:1"]
        assert len(found.examples) == 1


def test_bits_per_byte_and_perplexity_are_those_of_the_plain_model() -> None:
    register()
    own = renderer()
    texts = [TEXT, "A question and an answer, é.", "yes and no"]
    model = twin("llama", torch.float64)
    model.resize_token_embeddings(len(own.tokenizer), mean_resizing=False)
    rows = documents(*texts)
    prepared = segment_documents(rows, own, max_length=500, whole=True)
    measured = measure(PackReader(model), own, rows, prepared.examples, task="causal", tokens_per_pack=500)
    use_attention(model, packed=False)
    total = count = size = 0.0
    for text in texts:
        ids = torch.tensor([own.tokenizer(text)["input_ids"]])
        total += float(model(input_ids=ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
        size += len(text.encode()) - len(own.tokenizer.decode(ids[0, :1]).encode())
    found = {item.name: item.after.value for item in compare_all(measured.metrics(), measured.metrics())}
    assert found["nll"] == pytest.approx(total / count)
    assert found["perplexity"] == pytest.approx(math.exp(total / count))
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size)


def test_the_fit_counts_tokens_of_words_as_they_stand_in_a_text() -> None:
    own = renderer()
    fit = measure_fit(documents("patient zzzzzz patient"), own)
    lengths = [len(own.tokenizer(f" {word}")["input_ids"]) for word in ("patient", "zzzzzz")]
    assert fit.tokens_per_word == pytest.approx((2 * lengths[0] + lengths[1]) / 3)
    assert fit.split_frac == pytest.approx(1 / 3)


def test_conversations_are_never_split() -> None:
    row = Row(Where("f", 1), {"prompt": "a", "completion": "b"})
    records = format_rows([row]).examples
    with pytest.raises(DataError, match="only documents can be split"):
        segment(records, DataSettings(over_length="split"), renderer(), 10, Coding("chat"), whole=False)
    with pytest.raises(TypeError, match="rendered by a Renderer"):
        segment(records, DataSettings(), Encoder(renderer().tokenizer), 10, Coding("chat"), whole=False)
