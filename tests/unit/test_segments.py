"""Lengths: rows over the limit are dropped whole and counted, cut where the user says so, never cut in silence."""

from __future__ import annotations

import pytest

from headstart.data.check import show_tokens
from headstart.data.render import Renderer
from headstart.data.segments import segment_rows
from headstart.errors import DataError
from tests.conftest import conversation
from tests.tokens import make_tokenizer


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    tokenizer = make_tokenizer("chatml")
    return Renderer(tokenizer, (tokenizer.eos_token_id,))


ROWS = [conversation("short?", "Yes.", line=1), conversation("long " * 50 + "?", "The plan.", line=2)]


def test_rows_over_the_length_are_dropped_whole_and_counted(renderer: Renderer) -> None:
    result = segment_rows(ROWS, renderer, max_length=60)
    assert [example.where.line for example in result.examples] == [1]
    assert [(where.line, length > 60) for where, length in result.dropped] == [(2, True)]
    assert [row.where.line for row in result.kept] == [1]


def test_rows_over_the_length_are_an_error_where_the_user_says_so(renderer: Renderer) -> None:
    with pytest.raises(DataError, match=r"rows:2: .* tokens, over 60"):
        segment_rows(ROWS, renderer, max_length=60, over_length="error")


def test_a_cut_takes_context_and_keeps_the_answer_whole(renderer: Renderer) -> None:
    whole = segment_rows(ROWS, renderer, max_length=10_000).examples[1]
    result = segment_rows(ROWS, renderer, max_length=60, over_length="cut")
    cut = result.examples[1]
    assert 55 <= cut.token_count <= 60
    assert cut.target_count == whole.target_count
    stretches = show_tokens(cut, renderer)
    assert [s.kind for s in stretches] == ["context", "trained", "cut"]
    assert stretches[1].text == "The plan.<|im_end|>"
    kept = stretches[0].text.removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
    assert kept + stretches[2].text == ROWS[1].messages[0].content
    assert result.cut == 1


def test_a_row_whose_answer_alone_is_over_the_length_is_dropped(renderer: Renderer) -> None:
    result = segment_rows([conversation("q", "long " * 50)], renderer, max_length=60, over_length="cut")
    assert not result.examples
    assert len(result.dropped) == 1


def test_the_first_token_is_never_a_target(renderer: Renderer) -> None:
    for example in segment_rows(ROWS, renderer, max_length=10_000).examples:
        assert example.segments[0].weights[0] == 0
