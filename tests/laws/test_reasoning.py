"""What is thought before an answer: learned, left out, or read and not learned; as the template writes it, if it does."""

from __future__ import annotations

from typing import Any

import pytest

from headstart.data.formats import format_rows
from headstart.data.read import Row, Where
from headstart.data.render import Renderer
from headstart.data.segments import segment_rows
from tests.tokens import make_tokenizer

# As Qwen3 writes it: the reasoning of the last answer alone, between tokens of its own.
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.get('reasoning_content') or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASKED = {"role": "user", "content": "why?"}


def renderer(knows: bool) -> Renderer:
    tokenizer = make_tokenizer("thinking" if knows else "chatml")
    if knows:
        tokenizer.chat_template = QWEN
    return Renderer(tokenizer, (tokenizer.eos_token_id,))


def parts(own: Renderer, turns: list[dict[str, Any]], reasoning: str) -> list[tuple[str, str]]:
    """Return for each sequence of a row what is read only, and what is learned."""
    formatted = format_rows([Row(Where("f", 1), {"messages": turns})], reasoning=reasoning)
    assert not formatted.problems
    (example,) = segment_rows(formatted.examples, own, max_length=10_000).examples  # type: ignore[arg-type]
    return [
        (own.decode_raw(s.ids[s.weights == 0].tolist()), own.decode_raw(s.ids[s.weights > 0].tolist()))
        for s in example.segments
    ]


@pytest.mark.parametrize(
    "answer",
    [
        {"role": "assistant", "content": "So it is.", "reasoning_content": "three days\n"},
        {"role": "assistant", "content": "So it is.", "thinking": "three days"},
        {"role": "assistant", "content": "<think>\nthree days\n</think>\n\nSo it is."},
    ],
)
@pytest.mark.parametrize("knows", [True, False])
def test_reasoning_is_kept_dropped_or_untrained(answer: dict[str, Any], knows: bool) -> None:
    own = renderer(knows)
    thought = "<think>\nthree days\n</think>\n\n"
    head = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    empty = "<think>\n\n</think>\n\n" if knows else ""
    assert parts(own, [ASKED, answer], "keep") == [(head, f"{thought}So it is.<|im_end|>")]
    assert parts(own, [ASKED, answer], "untrained") == [(head + thought, "So it is.<|im_end|>")]
    assert parts(own, [ASKED, answer], "drop") == [(head, f"{empty}So it is.<|im_end|>")]


def test_marks_of_reasoning_are_tokens_where_the_template_writes_them() -> None:
    own = renderer(True)
    formatted = format_rows(
        [Row(Where("f", 1), {"messages": [ASKED, {**ASKED, "role": "assistant", "thinking": "</think>"}]})]
    )
    (example,) = segment_rows(formatted.examples, own, max_length=10_000).examples  # type: ignore[arg-type]
    end = own.tokenizer.convert_tokens_to_ids("</think>")
    # One is the template's; the other is what was thought, and stays text.
    assert example.segments[0].ids.tolist().count(end) == 1
    ids = example.segments[0].ids[example.segments[0].weights > 0].tolist()
    assert own.answer_text(ids[:-1]) == "why?"
    assert own.answer_text(own.tokenizer("plain")["input_ids"]) == "plain"


def test_reasoning_that_a_template_leaves_out_later_is_learned_where_it_stands() -> None:
    turns = [
        ASKED,
        {"role": "assistant", "content": "one", "thinking": "first"},
        ASKED,
        {"role": "assistant", "content": "two", "thinking": "second"},
    ]
    first, last = parts(renderer(True), turns, "keep")
    assert first[1] == "<think>\nfirst\n</think>\n\none<|im_end|>"
    assert last[1] == "<think>\nsecond\n</think>\n\ntwo<|im_end|>"
    assert "first" not in last[0]
    (both,) = parts(renderer(False), turns, "keep")
    assert "<think>\nfirst\n</think>\n\none<|im_end|>" in both[1]


def test_reasoning_is_told_and_what_is_no_text_is_refused() -> None:
    rows = [Row(Where("f", 1), {"messages": [ASKED, {"role": "assistant", "content": "x", "reasoning": "y"}]})]
    assert format_rows(rows).notes == ["1 answers come with reasoning, which is learned (data.reasoning)"]
    assert "left out" in format_rows(rows, reasoning="drop").notes[0]
    bad = [Row(Where("f", 1), {"messages": [ASKED, {"role": "assistant", "content": "x", "reasoning": ["y"]}]})]
    (problem,) = format_rows(bad).problems
    assert (problem.code, problem.where) == ("row.field_type", "f:1:turn[1].reasoning")
