"""Data set formats: each is found, said, and turned into the same turns; each bad row is named with its field."""

from __future__ import annotations

from typing import Any

import pytest

from headstart.data.formats import Formatted, Named, format_rows
from headstart.data.read import Row, Where
from headstart.errors import DataError

ASKED = ("user", "Hi?", False)
ANSWERED = ("assistant", "Hello.", True)
SYSTEM = ("system", "Be kind.", False)


def form(*rows: dict[str, Any], **how: Any) -> Formatted:
    named = Named(**{key: how.pop(key) for key in list(how) if key in Named.__dataclass_fields__})
    return format_rows([Row(Where("f", n), row) for n, row in enumerate(rows, 1)], named=named, **how)


def turns(formatted: Formatted, index: int = 0) -> list[tuple[str, str, bool]]:
    return [(m.role, m.content, m.trained) for m in formatted.examples[index].messages]


MESSAGES = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    ("row", "name", "certainty"),
    [
        ({"messages": MESSAGES}, "messages", "certain"),
        (
            {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
            "sharegpt",
            "certain",
        ),
        ({"instruction": "Hi?", "input": "", "output": "Hello."}, "alpaca", "certain"),
        ({"instruction": "Hi?", "output": "Hello."}, "alpaca", "certain"),
        ({"prompt": "Hi?", "completion": "Hello."}, "prompt_completion", "certain"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "prompt_completion", "certain"),
        ({"question": "Hi?", "answer": "Hello."}, "prompt_completion", "likely"),
        ({"input": "Hi?", "output": "Hello."}, "prompt_completion", "likely"),
    ],
)
def test_formats_are_found(row: dict[str, Any], name: str, certainty: str) -> None:
    formatted = form(row, row)
    assert (formatted.detection.format, formatted.detection.certainty) == (name, certainty)
    assert "2 of 2 rows" in str(formatted.detection)
    assert turns(formatted) == [ASKED, ANSWERED]
    assert not formatted.problems


def test_an_input_follows_its_instruction_and_a_system_prompt_leads() -> None:
    formatted = form({"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be kind."})
    assert turns(formatted) == [SYSTEM, ("user", "Add.\n\n1 2", False), ("assistant", "3", True)]
    formatted = form(
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}], "system": "Be kind."}
    )
    assert turns(formatted) == [SYSTEM, ASKED, ANSWERED]
    assert "role `human` read as `user` in 1 turns" in formatted.notes


def test_columns_named_by_the_user_and_templates_over_them() -> None:
    rows = [{"ID": 3, "head": "GENHX", "talk": "a {brace}", "note": "b"}]
    formatted = form(*rows, prompt="As '{head}', {{keep}}:\n{talk}", completion="note")
    assert turns(formatted) == [("user", "As 'GENHX', {keep}:\na {brace}", False), ("assistant", "b", True)]
    assert formatted.notes == ["columns not used: ID"]
    assert str(formatted.detection).startswith("columns (given): 1 of 1 rows have `head` and `talk` and `note`")


def test_weights_choose_which_answers_are_trained() -> None:
    row = [*MESSAGES, {"role": "user", "content": "More?"}, {"role": "assistant", "content": "No.", "weight": 0}]
    assert [trained for _, _, trained in turns(form({"messages": row}))] == [False, True, False, False]


def test_text_parts_are_joined_and_turns_after_the_last_answer_are_told() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i?"}]
    row = [{"role": "user", "content": parts}, MESSAGES[1], {"role": "user", "content": "Bye."}]
    formatted = form({"messages": row})
    assert turns(formatted) == [ASKED, ANSWERED]
    assert "1 rows end with turns after the last answer; those turns are not used" in formatted.notes


def test_tool_calls_are_parsed() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, 2.50]}'}}
    row = [
        MESSAGES[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "ok"},
        MESSAGES[1],
    ]
    formatted = form({"messages": row, "tools": [{"type": "function", "function": {"name": "f"}}]})
    assert formatted.examples[0].messages[1].tool_calls[0]["function"]["arguments"] == {"x": [1, 2.5]}
    assert formatted.examples[0].messages[2].tool_call_id == "c"
    assert formatted.examples[0].tools == ({"type": "function", "function": {"name": "f"}},)


GOOD = {"messages": MESSAGES}


def with_turn(**turn: Any) -> dict[str, Any]:
    return {"messages": [turn, *MESSAGES]}


@pytest.mark.parametrize(
    ("row", "code", "place"),
    [
        ({"messages": []}, "row.field_type", "f:2:messages"),
        ({"messages": "text"}, "row.field_type", "f:2:messages"),
        ({"messages": ["text"]}, "row.field_type", "f:2:messages[0]"),
        (with_turn(role="robot", content="x"), "row.role", "f:2:turn[0].role"),
        (with_turn(role=None, content="x"), "row.role", "f:2:turn[0].role"),
        (with_turn(content="x"), "row.role", "f:2:turn[0].role"),
        (with_turn(role="user"), "row.field_missing", "f:2:turn[0].content"),
        (with_turn(role="user", content=3), "row.field_type", "f:2:turn[0].content"),
        (with_turn(role="user", content=[{"type": "image_url"}]), "row.media", "f:2:turn[0].content[0]"),
        (with_turn(role="user", content="\ud800"), "row.unencodable", "f:2:turn[0].content"),
        (with_turn(role="assistant", content="x", weight=2), "row.weight", "f:2:turn[0].weight"),
        (with_turn(role="assistant", content=" \n"), "row.empty_answer", "f:2:turn[0].content"),
        (with_turn(role="assistant", tool_calls=[{}]), "row.tool_call", "f:2:turn[0].tool_calls[0]"),
        (
            with_turn(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
            "row.tool_call",
            "f:2:turn[0].tool_calls[0].function.arguments",
        ),
        (with_turn(role="tool", content="x", tool_call_id="never"), "row.tool_call", "f:2:turn[0]"),
        ({"messages": MESSAGES[:1]}, "row.no_answer", "f:2"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}]}, "row.no_answer", "f:2"),
        ({"messages": MESSAGES, "tools": "{"}, "row.tool_call", "f:2:tools"),
        ({"messages": MESSAGES, "tools": {"a": 1}}, "row.field_type", "f:2:tools"),
    ],
)
def test_bad_rows_are_named_with_their_field(row: dict[str, Any], code: str, place: str) -> None:
    formatted = form(GOOD, row, GOOD)
    assert len(formatted.examples) == 2
    assert [(p.code, p.where) for p in formatted.problems] == [(code, place)]
    assert formatted.problems[0].cure


def test_every_fault_of_a_row_is_told_at_once() -> None:
    formatted = form(
        {"messages": [{"role": "x", "content": "a"}, {"role": "user"}, {"role": "assistant", "content": ""}]}
    )
    assert [p.code for p in formatted.problems] == ["row.role", "row.field_missing", "row.empty_answer"]


def test_values_that_are_missing_are_named() -> None:
    formatted = form({"a": "x", "b": None}, {"a": "x", "b": ["y"]}, {"a": "x", "b": 3}, prompt="a", completion="b")
    assert [(p.code, p.where) for p in formatted.problems] == [
        ("row.field_missing", "f:1:b"),
        ("row.field_type", "f:2:b"),
    ]
    assert turns(formatted)[1][1] == "3"


def test_no_known_format_shows_what_to_paste() -> None:
    with pytest.raises(DataError) as error:
        form({"dialogue": "x", "section_text": "y"})
    (problem,) = error.value.problems
    assert problem.code == "format.unknown"
    assert '-s data.prompt="{dialogue}" -s data.completion="{section_text}"' in problem.cure


def test_mixed_formats_are_refused_with_counts() -> None:
    with pytest.raises(DataError) as error:
        form(GOOD, GOOD, {"prompt": "a", "completion": "b"})
    assert "2 rows of messages, first at f:1; 1 rows of prompt_completion, first at f:3" in str(error.value)


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match="no row has a column 'c'"):
        form({"a": "x", "b": "y"}, prompt="{c}", completion="b")
    with pytest.raises(DataError, match="both sides"):
        form({"a": "x", "b": "y"}, prompt="a")
    with pytest.raises(DataError, match="no template"):
        form({"a": "x", "b": "y"}, prompt="{a", completion="b")
    with pytest.raises(DataError, match="no row has a column 'id'"):
        form({"prompt": "x", "completion": "y"}, group_by="id")


def test_answers_inside_of_a_prompt_are_not_trained() -> None:
    prompt = [*MESSAGES, {"role": "user", "content": "And?"}]
    formatted = form({"prompt": prompt, "completion": [{"role": "assistant", "content": "So."}]})
    assert [trained for _, _, trained in turns(formatted)] == [False, False, False, True]


def test_an_answer_that_nothing_asks_for_is_not_trained() -> None:
    formatted = form({"messages": [{"role": "assistant", "content": "Welcome."}, *MESSAGES]})
    assert [trained for _, _, trained in turns(formatted)] == [False, False, True]
    assert any("begin with an answer" in note for note in formatted.notes)


def test_the_older_form_of_a_call_is_read_and_unknown_keys_are_told() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": "{}"}}
    formatted = form({"messages": [MESSAGES[0], {**call, "mood": "hm"}]})
    assert formatted.examples[0].messages[1].tool_calls[0]["function"] == {"name": "look", "arguments": {}}
    assert "keys of turns that are not used: `mood` (1 turns)" in formatted.notes


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"instruction": "Add.", "input": 7, "output": "3"}, "row.field_type"),
        (
            {
                "messages": [
                    MESSAGES[0],
                    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]},
                ]
            },
            "row.unencodable",
        ),
        ({"messages": MESSAGES, "tools": [{"name": "\udfff"}]}, "row.unencodable"),
    ],
)
def test_what_would_be_lost_or_break_later_is_a_problem_of_its_row(row: dict[str, Any], code: str) -> None:
    assert form(row).problems[0].code == code


def test_a_row_without_turns_among_others_is_named() -> None:
    formatted = form({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"id": 1})
    assert [problem.where for problem in formatted.problems] == ["f:2:conversations"]


def test_only_the_last_answer_is_trained_where_that_is_asked() -> None:
    turns_of_two = [*MESSAGES, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]
    formatted = form({"messages": turns_of_two}, train_on="last")
    assert [trained for _, _, trained in turns(formatted)] == [False, False, False, True]
    # What follows the last answer that may be trained is of no use.
    turns_of_two[-1] = {**turns_of_two[-1], "weight": 0}
    formatted = form({"messages": turns_of_two}, train_on="last")
    assert turns(formatted) == [ASKED, ANSWERED]
