"""Tiny random twins of real architectures: the same code as the large ones, made in a moment."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB = 97
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
}
_NO_GROUPS = {"num_key_value_heads": 4}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_SMALL),
    "mistral": lambda: transformers.MistralConfig(**_SMALL, sliding_window=6),
    "qwen2": lambda: transformers.Qwen2Config(**_SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**_SMALL),
    "gemma2": lambda: transformers.Gemma2Config(
        **_SMALL, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SMALL, sliding_window=6, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
    "phi3": lambda: transformers.Phi3Config(**_SMALL),
    "olmo2": lambda: transformers.Olmo2Config(**_SMALL),
    "smollm3": lambda: transformers.SmolLM3Config(**_SMALL, no_rope_layers=[1, 0]),
    "granite": lambda: transformers.GraniteConfig(
        **_SMALL, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.2
    ),
    "cohere": lambda: transformers.CohereConfig(**_SMALL, logit_scale=0.25),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**{**_SMALL, **_NO_GROUPS}),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    ),
}
PACKED = [name for name in CONFIGS if name != "falcon"]


def twin(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Return a tiny causal language model with random weights, wide enough apart that every part matters."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)
