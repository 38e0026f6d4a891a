"""Chat templates by name, for base models that have none, and the tokens that each of them writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headstart.errors import ModelError, Problem

_BEGIN = "{{ bos_token if bos_token else '' }}"


@dataclass(frozen=True)
class Template:
    """A chat template (Jinja) and the control tokens that it writes; `{{ eos_token }}` is the model's own."""

    text: str
    tokens: tuple[str, ...] = ()


TEMPLATES = {
    "chatml": Template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": Template(
        _BEGIN + "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] "
        "+ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "gemma": Template(
        _BEGIN
        + "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
        "+ m['content'] + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "mistral": Template(
        _BEGIN + "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "alpaca": Template(
        _BEGIN
        + "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '### Response:\n' + m['content'] + eos_token + '\n\n' }}"
        "{% elif m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
        "{% else %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
}


def give_template(tokenizer: Any, name: str) -> None:
    """Give a tokenizer a template by name, and the tokens that it writes where they are missing.

    Raises ModelError where the template ends an answer with the model's own token and the model has none.
    """
    template = TEMPLATES[name]
    if not template.tokens and tokenizer.eos_token is None:
        cure = "chatml brings a token of its own: -s data.template=chatml"
        raise ModelError(Problem("model.template", "the model has no token that ends an answer", name, cure))
    tokenizer.chat_template = template.text
    missing = [token for token in template.tokens if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)


def template_ids(tokenizer: Any, name: str) -> list[int]:
    """Return the ids of the tokens that a template by name writes: a base model has yet to learn them."""
    template = TEMPLATES.get(name)
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in template.tokens] if template else []
