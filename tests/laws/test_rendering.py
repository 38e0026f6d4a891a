"""What is trained is what is asked with: the laws of rendering, over chat templates and tokenizers that differ."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headstart.data.read import Where
from headstart.data.records import Conversation, Message
from headstart.data.render import Renderer
from headstart.errors import ModelError, Problem
from tests.conftest import conversation
from tests.tokens import KINDS, make_tokenizer

NAMES = list(KINDS)
_made: dict[str, Renderer] = {}


def renderer(name: str) -> Renderer:
    if name not in _made:
        tokenizer = make_tokenizer(name)
        _made[name] = Renderer(tokenizer, (tokenizer.eos_token_id,))
    return _made[name]


def sequences(name: str, row: Conversation) -> list[Any]:
    rendered = renderer(name).training(row)
    assert not isinstance(rendered, Problem), rendered
    return renderer(name).encode(rendered)


def official(name: str, row: Conversation, **how: Any) -> list[int]:
    turns = [{"role": m.role, "content": m.content} for m in row.messages]
    return list(renderer(name).tokenizer.apply_chat_template(turns, return_dict=False, **how))


CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "look", "arguments": {"where": 'a "<|im_end|>" b\n', "n": [1, "é"]}},
}
ROW = conversation("What is the plan?", "The plan is short.", "and\nthe reason?", "A sore throat for three days.")


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_a_prefix_of_the_training_tokens(name: str) -> None:
    found = sequences(name, ROW)
    for last in (1, 3):
        prompt = renderer(name).prompt(ROW.messages[:last])
        assert any(seq.ids[: len(prompt)].tolist() == prompt and seq.trained[len(prompt)] for seq in found)
        assert not any(seq.trained[len(prompt) - 1] for seq in found if seq.ids[: len(prompt)].tolist() == prompt)


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_that_of_the_tokenizer_itself(name: str) -> None:
    asked = Conversation(ROW.where, ROW.messages[:3])
    assert renderer(name).prompt(asked.messages) == official(name, asked, add_generation_prompt=True)


@pytest.mark.parametrize("name", NAMES)
def test_training_tokens_are_those_of_the_tokenizer_itself(name: str) -> None:
    ours = sequences(name, ROW)[-1].ids.tolist()
    assert official(name, ROW)[: len(ours)] == ours


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_trained_whole_and_ends_with_a_stop_token(name: str) -> None:
    for seq in sequences(name, ROW):
        ids, trained = seq.ids.tolist(), seq.trained.tolist()
        ends = [i for i in range(len(ids)) if trained[i] and (i + 1 == len(ids) or not trained[i + 1])]
        assert ends
        assert all(ids[end] in renderer(name).stop_ids for end in ends)
    answers = ["".join(renderer(name).decode(run) for run in _trained_runs(seq)) for seq in sequences(name, ROW)]
    told = "".join(answers).replace("\n", "").replace(" ", "")
    assert told == "The plan is short.A sore throat for three days.".replace(" ", "")


def _trained_runs(seq: Any) -> list[list[int]]:
    return [[i for i, t in zip(seq.ids.tolist(), seq.trained.tolist(), strict=True) if t]]


@pytest.mark.parametrize("name", NAMES)
def test_content_never_becomes_a_control_token(name: str) -> None:
    _, _, special, added, _ = KINDS[name]
    spelled = " ".join([*special, *(a for a in added if a.strip())])
    harmless = conversation("a", "b", "c", "d")
    hostile = conversation(f"a{spelled}", f"b {spelled} b", spelled + "c", f"d{spelled * 2}")
    control = {renderer(name).tokenizer.convert_tokens_to_ids(t) for t in [*special, *added] if t.strip()}

    def count(row: Conversation) -> list[list[int]]:
        return [[i for i in seq.ids.tolist() if i in control] for seq in sequences(name, row)]

    assert count(hostile) == count(harmless)
    assert renderer(name).spells_control(spelled)
    assert not renderer(name).spells_control("plain text")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1, max_size=40), answer=st.text(min_size=1, max_size=40))
@pytest.mark.parametrize("name", ["chatml", "zephyr", "tools"])
def test_content_comes_back_byte_for_byte(name: str, text: str, answer: str) -> None:
    row = conversation(text, answer)
    (seq,) = sequences(name, row)
    plain = renderer(name).tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in row.messages], tokenize=False
    )
    told = renderer(name).decode_raw(seq.ids.tolist())
    assert plain.startswith(told)
    prompt = renderer(name).prompt(row.messages[:1])
    assert seq.ids[: len(prompt)].tolist() == prompt
    assert renderer(name).decode(seq.ids[len(prompt) :].tolist()) == answer


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1, max_size=20), answer=st.text(min_size=1, max_size=20))
@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_a_template_that_strips_is_asked_with_what_it_was_trained_with(name: str, text: str, answer: str) -> None:
    row = conversation(f"{text}\n", answer)
    (seq,) = sequences(name, row)
    prompt = renderer(name).prompt(row.messages[:1])
    assert seq.ids[: len(prompt)].tolist() == prompt


def test_a_template_may_strip_some_roles_only() -> None:
    tokenizer = make_tokenizer("chatml")
    stripped = "(m['content'] if m['role'] == 'system' else m['content'] | trim)"
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", stripped)
    own = Renderer(tokenizer, (tokenizer.eos_token_id,))
    row = conversation(" asked ", " answered ", system=" brief ")
    rendered = own.training(row)
    assert not isinstance(rendered, Problem)
    (seq,) = own.encode(rendered)
    turns = [{"role": m.role, "content": m.content} for m in row.messages]
    assert seq.ids.tolist() == tokenizer.apply_chat_template(turns, return_dict=False)[: len(seq.ids)]
    assert own.prompt(row.messages[:2]) == seq.ids[: len(own.prompt(row.messages[:2]))].tolist()


@pytest.mark.parametrize(
    ("messages", "tools", "said"),
    [
        ([Message("user", "a"), Message("assistant", "", True, (CALL,))], (), "the tool call of turn[1]"),
        ([Message("user", "a"), Message("assistant", "b", True)], ({"name": "look"},), "the tools"),
        ([Message("system", "rhyme"), Message("user", "a"), Message("assistant", "b", True)], (), "turn[0] (system)"),
    ],
)
def test_a_row_of_which_the_template_leaves_something_out_is_refused(
    messages: list[Message], tools: tuple[Any, ...], said: str
) -> None:
    tokenizer = make_tokenizer("chatml")
    written = "{% if m['role'] != 'system' %}{{"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{", written, 1).replace("}}", "}}{% endif %}", 1)
    problem = Renderer(tokenizer, (tokenizer.eos_token_id,)).training(
        Conversation(Where("rows", 1), tuple(messages), tools)
    )
    assert isinstance(problem, Problem)
    assert said in problem.what


def test_what_no_token_spells_is_the_unknown_token() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, "a": 2, "\n": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    own = Renderer(tokenizer, (1,), "plain")
    assert own.prompt([Message("user", "a \U0001f600 a")]) == [2, 0, 2]


def test_a_template_that_strips_is_followed() -> None:
    (seq,) = sequences("llama3", conversation("  asked  ", "\n answered \n"))
    assert seq.ids.tolist() == official("llama3", conversation("  asked  ", "\n answered \n"))


def test_an_answer_that_the_template_rewrites_later_gets_a_sequence_of_its_own() -> None:
    assert len(sequences("thinking", ROW)) == 2
    assert len(sequences("chatml", ROW)) == 1


def test_only_answers_of_weight_one_are_trained() -> None:
    first, answer, *rest = ROW.messages
    row = Conversation(ROW.where, (first, Message("assistant", answer.content, trained=False), *rest))
    (seq,) = sequences("chatml", row)
    (whole,) = sequences("chatml", ROW)
    assert seq.ids.tolist() == whole.ids.tolist()
    assert 0 < seq.trained.sum() < whole.trained.sum()


def test_pad_equals_end_and_the_end_is_trained() -> None:
    tokenizer = renderer("chatml").tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (seq,) = sequences("chatml", ROW)
    assert seq.ids[-1] == tokenizer.eos_token_id
    assert seq.trained[-1]


def test_a_stop_token_is_added_where_the_template_writes_none() -> None:
    tokenizer = make_tokenizer("zephyr")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    own = Renderer(tokenizer, (tokenizer.eos_token_id,))
    rendered = own.training(ROW)
    assert not isinstance(rendered, Problem)
    assert len(rendered) == 2  # one an answer: in the middle of a conversation the template writes no end either
    for seq in own.encode(rendered):
        assert seq.ids[-1] == tokenizer.eos_token_id
        assert seq.trained[-1]


def test_the_stop_token_that_the_template_writes_is_found_where_the_model_names_another() -> None:
    tokenizer = make_tokenizer("chatml")
    other = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    own = Renderer(tokenizer, (other,))
    assert own.stop_ids == (other, tokenizer.convert_tokens_to_ids("<|im_end|>"))


def test_tool_calls_are_trained_and_their_texts_are_content() -> None:
    messages = (
        Message("user", "look it up"),
        Message("assistant", "", trained=True, tool_calls=(CALL,)),
        Message("tool", "found <tool_call>", tool_call_id="c1"),
        Message("assistant", "done", trained=True),
    )
    tool = {"type": "function", "function": {"name": "look", "description": "reads <|im_start|>", "parameters": {}}}
    row = Conversation(Where("rows", 1), messages, tools=(tool,))
    (seq,) = sequences("tools", row)
    own = renderer("tools")
    plain = own.tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "look it up"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "found <tool_call>"},
            {"role": "assistant", "content": "done"},
        ],
        tools=[tool],
        tokenize=False,
    )
    assert plain.startswith(own.decode_raw(seq.ids.tolist()))
    names = [own.tokenizer.convert_ids_to_tokens(int(i)) for i in seq.ids]
    # Five turns with the tools', and one call; what the data spells is text.
    assert [names.count(t) for t in ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")] == [5, 5, 1, 1]
    trained = [n for n, t in zip(names, seq.trained, strict=True) if t]
    assert trained[0] == "<tool_call>"
    assert trained.count("<|im_end|>") == 2


def test_a_row_that_the_template_refuses_is_a_problem_with_its_place() -> None:
    problem = renderer("gemma").training(conversation("a", "b", system="be brief", line=7))
    assert isinstance(problem, Problem)
    assert problem.code == "row.template"
    assert problem.where == "rows:7"
    assert "System role not supported" in problem.what


def test_a_template_that_rewrites_answers_is_refused() -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'].replace('b', 'c')")
    problem = Renderer(tokenizer, (tokenizer.eos_token_id,)).training(conversation("a", "b"))
    assert isinstance(problem, Problem)
    assert "rewrites" in problem.what


def test_no_template_is_an_error_and_plain_is_a_choice() -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template") as error:
        Renderer(tokenizer, (tokenizer.eos_token_id,))
    assert "data.template=plain" in error.value.problems[0].cure
    own = Renderer(tokenizer, (tokenizer.eos_token_id,), "plain")
    rendered = own.training(conversation("2 + 2 =", " 4"))
    assert not isinstance(rendered, Problem)
    (seq,) = own.encode(rendered)
    assert own.decode_raw(seq.ids.tolist()) == "2 + 2 = 4<|im_end|>"
    assert own.decode_raw(seq.ids[seq.trained].tolist()) == " 4<|im_end|>"
    assert isinstance(own.training(ROW), Problem)
