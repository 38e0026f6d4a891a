"""Chat templates within bounds: none runs or writes without end, none gets out of its sandbox, and all else is as it was."""

from __future__ import annotations

import datetime

import jinja2
import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from headstart.data import bounded
from headstart.data.bounded import BoundedTemplate
from headstart.data.render import Renderer
from headstart.errors import ModelError, Problem
from tests.conftest import conversation
from tests.tokens import CHATML, make_tokenizer

NESTED = "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}{% endfor %}{% endfor %}"


def render(text: str) -> str:
    return BoundedTemplate(_compile_jinja_template("").environment, text).render(messages=[{"role": "user"}])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (NESTED, "turn more than"),
        ("{% for a in range(90000) %}{% for b in range(90000) if false %}{% endfor %}{% endfor %}", "turn more than"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "turn more than",
        ),
        ("{% for a in range(90000) %}{{ 'x' * 10000 }}{% endfor %}", "writes more than"),
        ("{% set s %}x{% endset %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60, "writes more than"),
        (
            "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "puts together",
        ),
        (
            "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "puts together",
        ),
        ("{{ 'x' * 10000000000 }}", "puts together"),
        ("{{ 'x' | center(10000000000) }}", "puts together"),
        ("{{ [1] | slice(10000000000) | list }}", "puts together"),
        ("{{ 10 ** 1000000000 }}", "power"),
    ],
)
def test_what_a_template_may_take_is_bounded(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "TURNS_MAX", 20_000)
    monkeypatch.setattr(bounded, "LENGTH_MAX", 1 << 20)
    with pytest.raises(bounded.BoundsError, match=said):
        render(text)


def test_time_is_a_bound_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert render("{% for a in range(3) %}{{ a }}{% endfor %}") == "012"
    monkeypatch.setattr(bounded, "TIME_MAX_S", -1.0)
    with pytest.raises(bounded.BoundsError, match="longer than"):
        render("{% for a in range(3) %}{{ a }}{% endfor %}")


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ lipsum(9) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_stays_in_its_sandbox(text: str) -> None:
    with pytest.raises((jinja2.TemplateError, TypeError)):
        render(text)


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages if m.role != 'x' recursive %}{{ loop.index }}{{ m.role ~ '!' * 3 }}{% else %}none{% endfor %}",
        "{% macro f(a, b=2) -%} {{ a ** b }} {%- endmacro %}{{ f(3) }}{{ f(b=1, a=4) }}",
        "{% set x = namespace(a=none) %}{% set x.a = 1 %}{{ x.a }}{{ undefined }}{{ none }}{{ true }}",
        "{% set a, b = 'p', 'q' %}{{ a }}{{ b | upper | center(9) }}",
        "  {%- if messages %}\n  a\n{% endif +%}\n{{ messages | tojson(indent=2) }}{% generation %}g{% endgeneration %}",
        "{% filter upper %}a{{ 'b' }}{% endfilter %}{{ dict(a=1) }}{{ '%s-%d' % ('a', 2) }}{{ 'abc'[::-1] }}",
        "{% for a in [1, 2, 3] %}{% if a == 2 %}{% continue %}{% endif %}{{ a }}{% endfor %}",
    ],
)
def test_within_its_bounds_a_template_writes_what_it_writes_without(text: str) -> None:
    plain = _compile_jinja_template(text).render(messages=[{"role": "user"}])
    assert render(text) == plain


def test_a_template_that_goes_on_and_on_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "TURNS_MAX", 20_000)
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = CHATML + NESTED
    with pytest.raises(ModelError, match="its loops turn more than 20,000 times") as error:
        Renderer(tokenizer, (tokenizer.eos_token_id,))
    assert error.value.problems[0].code == "model.template"
    tokenizer.chat_template = CHATML.replace("%}", "%}{% if 'bomb' in m.content %}" + NESTED + "{% endif %}", 1)
    own = Renderer(tokenizer, (tokenizer.eos_token_id,))
    assert not isinstance(own.training(conversation("a", "b")), Problem)
    problem = own.training(conversation("bomb", "b", line=3))  # a mark stands for it, and then the text itself
    assert isinstance(problem, Problem)
    assert (problem.code, problem.where) == ("row.template", "rows:3")


@pytest.mark.parametrize(
    "fault", ["{{ 1 / 0 }}", "{{ messages[9]['x'].y }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ (" * 9]
)
def test_whatever_a_template_does_wrong_is_an_error(fault: str) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = CHATML + fault
    with pytest.raises(ModelError, match="the chat template fails"):
        Renderer(tokenizer, (tokenizer.eos_token_id,))


def test_a_template_that_writes_the_date_writes_that_of_the_run() -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = CHATML.replace("{% for m", "{{ strftime_now('%d %b %Y') }}{% for m", 1)
    own = Renderer(tokenizer, (tokenizer.eos_token_id,), today=datetime.date(2020, 1, 2))
    assert own.decode_raw(own.prompt(conversation("a").messages)).startswith("02 Jan 2020<|im_start|>")
