"""A corpus that goes through in a stream gives the rows that it gives in memory, is encoded once, and is read from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headstart.config import DataSettings
from headstart.data import corpus
from headstart.data.check import find
from headstart.data.corpus import is_large, peek, prepare_corpus
from headstart.data.encode import Encoder
from headstart.data.prepare import Prepared, form_sides, prepare
from headstart.data.read import find_files
from headstart.data.render import Renderer
from headstart.data.segments import Example
from headstart.data.store import StoredRows
from headstart.errors import DataError
from tests.tokens import make_tokenizer


@pytest.fixture
def renderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Renderer:
    monkeypatch.setenv("HEADSTART_HOME", str(tmp_path / "home"))
    tokenizer = make_tokenizer("chatml")
    return Renderer(tokenizer, [tokenizer.eos_token_id], "plain")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"text": f"The patient {n} has a sore throat. " * (1 + n % 40), "group": n % 90} for n in range(900)]
    rows[7] = rows[6]
    rows[8]["text"] = f"Ask jo@example.org. {rows[8]['text']}"
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stream(renderer: Encoder, settings: DataSettings, task: str = "causal", length: int = 64) -> Prepared:
    return prepare_corpus(find_files(settings.train), settings, renderer, length, task=task)


def tokens(examples: Any) -> list[tuple[str, list[int], list[float], int]]:
    """Return rows in an order of their own."""
    found = [(str(e.where), s.ids.tolist(), s.weights.tolist(), s.first) for e in examples for (s,) in [e.segments]]
    return sorted(found)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"positions": "continue"},
        {"over_length": "cut"},
        {"group_by": "group"},
        {"text": "{text}!"},
        {"fix": ("redact",)},
    ],
)
def test_a_stream_gives_the_rows_that_memory_gives(renderer: Renderer, file: Path, how: dict[str, Any]) -> None:
    settings = DataSettings(train=(str(file),), held_out=0.1, **how)
    streamed = stream(renderer, settings)
    held = prepare(form_sides(settings), settings, renderer, 64, task="causal")
    store = streamed.train.examples
    assert isinstance(store, StoredRows)
    assert tokens(store) == tokens(held.train.examples)
    assert tokens(store[3:5]) == tokens([store[3], store[4]])
    assert sorted(map(str, streamed.parts.proof)) == sorted(map(str, held.parts.proof))
    assert sorted(map(str, streamed.parts.watch)) == sorted(map(str, held.parts.watch))
    for name in ("lengths", "target_count", "dropped"):
        ours, theirs = getattr(streamed.train, name), getattr(held.train, name)
        assert np.sum(ours) == np.sum(theirs), name
    assert streamed.longest == held.longest
    assert store.highest_id == max(int(s.ids.max()) for e in held.train.examples for s in e.segments)
    assert (streamed.parts.duplicates, streamed.formed[0].rows) == (held.parts.duplicates, held.formed[0].rows)
    quality = find(streamed, renderer).quality
    assert quality == find(held, renderer).quality
    kinds = {finding.kind for finding in quality}
    assert ("duplicate" in kinds, "email" in kinds) == (True, not settings.redact)
    replaced = "private data replaced: 1 x [EMAIL]"
    assert all((replaced in prepared.formed[0].notes) == settings.redact for prepared in (streamed, held))
    assert str(streamed.formed[0].detection) == str(held.formed[0].detection)


def test_what_is_named_to_score_on_is_never_trained_on(renderer: Renderer, file: Path, tmp_path: Path) -> None:
    other = tmp_path / "held.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    other.write_text("\n".join([*lines[20:40], '{"text": "something else", "group": 1}']), encoding="utf-8")
    found = stream(renderer, DataSettings(train=(str(file),), eval=(str(other),)))
    assert (found.parts.leaked, len(found.parts.proof) + len(found.parts.watch), found.parts.held_out) == (20, 21, None)
    trained = {str(example.where) for example in found.train.examples}
    assert not trained & {f"{find_files([str(file)])[0].name}:{n}" for n in range(21, 41)}


def test_a_corpus_is_encoded_once(renderer: Renderer, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = 0
    original = corpus._encode

    def counted(*arguments: Any) -> dict[str, Any]:
        nonlocal times
        times += 1
        return original(*arguments)

    monkeypatch.setattr(corpus, "_encode", counted)
    settings = DataSettings(train=(str(file),))
    first, again = stream(renderer, settings), stream(renderer, settings)
    assert (times, tokens(first.train.examples)) == (1, tokens(again.train.examples))
    stream(renderer, settings, length=32)
    stream(renderer, settings.model_copy(update={"held_out": 0.3}))
    file.write_text(file.read_text(encoding="utf-8") + '{"text": "one more", "group": 1}\n', encoding="utf-8")
    stream(renderer, settings)
    assert times == 4


def test_masked_rows_and_rows_in_memory_stand_in_a_store(
    encoder: Encoder, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_HOME", str(tmp_path / "home"))
    found = stream(encoder, DataSettings(train=(str(file),)), "masked", 30)
    store: Any = found.train.examples
    assert (found.train.target_count, found.masking is not None) == (0, True)
    assert found.masking is not None
    assert found.masking.vary(store[0], 0).target_count > 0
    count, length = len(store), int(found.train.lengths.sum())
    more = [Example(store[0].where, store[0].segments)]
    store += more
    assert (len(store), store[count].where, int(store.lengths.sum())) == (
        count + 1,
        store[0].where,
        length + len(store[0].segments[0]),
    )


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Encoder:
    from transformers import AutoTokenizer

    return Encoder(AutoTokenizer.from_pretrained(tiny_encoder))


def test_bad_rows_of_a_stream_are_named(renderer: Renderer, file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[700] = '{"text": ""}'
    lines[701] = "no json"
    file.write_text("\n".join(lines), encoding="utf-8")
    found = stream(renderer, DataSettings(train=(str(file),)))
    assert [problem.where.rpartition(":")[2] for problem in found.problems] == ["702", "701"]
    with pytest.raises(DataError, match="over 20"):
        stream(renderer, DataSettings(train=(str(file),), over_length="error"), length=20)


def test_control_tokens_in_a_stream_can_be_refused(renderer: Renderer, file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join([*lines[:4], lines[4].replace("sore", "<|im_end|>"), *lines[5:]]), encoding="utf-8")
    as_text = stream(renderer, DataSettings(train=(str(file),)))
    assert not as_text.problems
    refused = stream(renderer, DataSettings(train=(str(file),), control_tokens="refuse"))
    assert [(problem.code, problem.where) for problem in refused.problems] == [("row.control", f"{file}:5")]


def test_what_is_large_and_text_goes_through_in_a_stream(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_files([str(file)])
    assert not is_large(files)
    monkeypatch.setattr(corpus, "STREAM_BYTES", 1000)
    assert is_large(files)
    found = peek(files, DataSettings(), "auto")
    assert found is not None
    assert (found.format, found.task) == ("text", "causal")
    labels = tmp_path / "labels.csv"
    labels.write_text("text,label\na,b\n")
    found = peek(find_files([str(labels)]), DataSettings(), "auto")
    assert found is not None
    assert found.format == "labels"


def test_rows_of_another_format_in_a_stream_are_refused(renderer: Renderer, file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()[:512]
    other = ['{"prompt": "a", "completion": "b"}'] * 512
    file.write_text("\n".join([*lines, *other]), encoding="utf-8")
    with pytest.raises(DataError, match="no row has a column 'text'"):
        stream(renderer, DataSettings(train=(str(file),)))
