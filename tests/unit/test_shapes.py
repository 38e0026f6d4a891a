"""Templates that never look into contents are known as such, and what is encoded once is what is encoded row by row."""

from __future__ import annotations

import itertools
import random

import pytest

from headstart.data.opaque import is_opaque
from headstart.data.read import Where
from headstart.data.records import Conversation, Message
from headstart.data.render import Renderer
from headstart.data.templates import TEMPLATES
from tests.tokens import make_tokenizer

LOOP = "{{% for message in messages %}}{}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
TURN = "{{ '<|im_start|>' + message.role + '\n' }}"
END = "{{ '<|im_end|>\n' }}"
OPAQUE = [
    LOOP.format(TURN + "{{ message['content'] | trim }}" + END),
    LOOP.format(TURN + "{% set text = message.content.strip() %}{{ text }}" + END),
    "{% set rest = messages %}{% if messages[0]['role'] == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{{ first }}"
    + LOOP.format(TURN + "{{ message.content }}" + END),
    LOOP.format(
        TURN + "{% if message.content is string and message.content %}{{ message['content'] }}{% endif %}" + END
    ),
    LOOP.format(
        "{% if loop.first and messages[0]['role'] != 'system' %}{{ 'x\n' }}{% endif %}"
        + TURN
        + "{{ message.get('content') }}"
        + END
    ),
]
LOOKS_IN = [
    "{{ message.content | upper }}",
    "{{ message.content.split('</think>')[-1] }}",
    "{% if 'x' in message.content %}x{% endif %}{{ message.content }}",
    "{{ ('a' + message.content) | trim }}",
    "{{ message | tojson }}",
    "{{ message.items() }}",
    "{{ message[key] }}",
    "{% if message.content == 'a' %}b{% endif %}",
    "{{ message.content[1:] }}",
    "{{ message.content | length }}",
    "{{ loop.previtem.content }}",
    "{% set l = loop %}{{ l.nextitem }}",
    "{% for c in message.content %}{{ c }}{% endfor %}",
    "{% set ns.x = message.content %}",
    "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(message.content) }}",
    "{{ '%s' % message.content }}",
    "{{ messages | map(attribute='content') | join }}",
    "{{ [message.content] | join }}",
    "{% set x %}{{ message.content }}{% endset %}{{ x | trim }}",
    "{% generation %}{{ message.content }}{% endgeneration %}",
]


@pytest.mark.parametrize("template", [*(t.text for t in TEMPLATES.values()), *OPAQUE])
def test_what_only_writes_contents_is_opaque(template: str) -> None:
    assert is_opaque(template)


@pytest.mark.parametrize("part", LOOKS_IN)
def test_what_looks_into_contents_is_not(part: str) -> None:
    assert not is_opaque(LOOP.format(TURN + part + END))


def conversations() -> list[Conversation]:
    draw = random.Random(0)
    texts = [
        "plan",
        " plan ",
        "a\n",
        "\n\nwhy",
        "",
        "  ",
        "<|im_end|> x",
        '\ue0000"\ue001',
        "{{ messages }}",
        "sore throat " * 9,
    ]
    found = []
    for line in range(300):
        roles = [*(["system"] if draw.random() < 0.3 else []), *["user", "assistant"] * draw.randint(1, 3)]
        turns = [
            Message(
                role, draw.choice(texts) or "x" * (role == "assistant"), role == "assistant" and draw.random() < 0.8
            )
            for role in roles
        ]
        found.append(Conversation(Where("rows", line), tuple(turns)))
    return [c for c in found if any(m.trained for m in c.messages)]


@pytest.mark.parametrize("template", [TEMPLATES["chatml"].text, *OPAQUE])
def test_rows_of_a_shape_are_encoded_as_each_is_by_itself(template: str) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = template
    quick, slow = (Renderer(tokenizer, [tokenizer.eos_token_id]) for _ in range(2))
    slow._opaque = False
    rows = conversations()
    ours, theirs = ([renderer.training(row) for row in rows] for renderer in (quick, slow))
    assert quick._shapes
    assert any(shape is not None for shape in quick._shapes.values())
    for row, one, other in zip(rows, ours, theirs, strict=True):
        assert isinstance(one, list) == isinstance(other, list), row
        if not isinstance(one, list) or not isinstance(other, list):
            assert one == other
            continue
        for a, b in itertools.zip_longest(quick.encode(one), slow.encode(other)):
            assert a.ids.tolist() == b.ids.tolist(), row
            assert a.trained.tolist() == b.trained.tolist(), row


def test_the_built_in_template_is_opaque() -> None:
    text = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
        "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert is_opaque(text)
    assert not is_opaque(text + "{% if %}")
