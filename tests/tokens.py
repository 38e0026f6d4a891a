"""Small tokenizers of the kinds that there are, with chat templates that differ, all made in code."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The patient has a sore throat for three days. What should the doctor write?",
    "Write the report: patient, reason, findings, diagnosis and plan. The answer is short.",
    "A question and an answer, a prompt and a completion; yes and no, one two three 4 5 6.",
] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '</turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
# Like Qwen3: an answer is preceded by an empty block of thoughts while it is the last, and by none later.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for c in m.get('tool_calls') or [] %}{{ '<tool_call>' + (c['function'] | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_IM = ["<|im_start|>", "<|im_end|>"]
KINDS: dict[str, tuple[str, str, list[str], list[str], str]] = {
    # name: template, kind of tokenizer, special tokens, added tokens that are not flagged special, end of text
    "chatml": (CHATML, "bytes", [*_IM, "<|endoftext|>"], [], "<|im_end|>"),
    "llama3": (LLAMA3, "bytes", ["<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"], [], "<|eot|>"),
    "inst": (INST, "metaspace", ["<s>", "</s>"], [], "</s>"),
    "gemma": (GEMMA, "metaspace_never", ["<bos>", "<eos>", "<turn>", "</turn>"], ["\n\n"], "<eos>"),
    "phi3": (PHI3, "metaspace", ["<s>", "<|end|>"], ["<|user|>", "<|assistant|>", "<|system|>"], "<|end|>"),
    "zephyr": (ZEPHYR, "bytes", ["<s>", "</s>"], [], "</s>"),
    "thinking": (THINKING, "bytes", _IM, ["<think>", "</think>"], "<|im_end|>"),
    "tools": (TOOLS, "bytes", _IM, ["<tool_call>", "</tool_call>"], "<|im_end|>"),
}


def make_tokenizer(name: str) -> Any:
    """Return a tokenizer with the chat template of one of `KINDS`."""
    template, kind, special, added, end = KINDS[name]
    tokenizer = _bytes() if kind == "bytes" else _metaspace("never" if kind.endswith("never") else "first")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": special})
    # As in Phi-3, the white space behind a role's token belongs to it.
    fast.add_tokens([AddedToken(t, special=False, normalized=False, rstrip=t.startswith("<|")) for t in added])
    fast.bos_token = special[0]
    fast.eos_token = end
    fast.pad_token = end
    fast.chat_template = template
    return fast


def _bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _metaspace(prepend: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<0x00>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend, split=False), decoders.Fuse()]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=fallback, show_progress=False, initial_alphabet=list("▁\n")
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The trainer makes the bytes special tokens; a real one has them as plain pieces.
    import json

    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(plain))
