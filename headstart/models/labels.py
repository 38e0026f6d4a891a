"""The head of a classifier on the hidden states of a pack: whose token it reads is found out on the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headstart.models.attention import can_pack, run_decoder, use_attention

PROBE_TOLERANCE = 1e-3


def label_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits [S, C] that a `...ForSequenceClassification` gives for rows whose token has `hidden` [S, D].

    The model's own head runs, on rows of one token each: for that moment its body gives back what it is told to.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

    base = model.base_model
    states = hidden[:, None]
    pooler = getattr(base, "pooler", None)
    output = BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=states, pooler_output=pooler(states) if pooler is not None else None
    )
    ids = torch.full((len(hidden), 1), 1 if model.config.pad_token_id == 0 else 0, device=hidden.device)
    base.forward = lambda *_, **__: output
    try:
        logits: Tensor = model(input_ids=ids).logits
    finally:
        del base.forward
    return logits


def row_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits [1, C] of one row of ids [T], by the model as it is."""
    use_attention(model, packed=False)
    logits: Tensor = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits
    return logits


def find_packing(model: Any) -> tuple[str, str]:
    """Return how a classifier can read packs, and which token of a row its head reads (`first` or `last`).

    (`forest`, `last`) for causal models, (`roots`, `first`) for most encoders, (`none`, ``) where rows must go alone.
    """
    packing = "forest" if can_pack(model) else "roots" if can_pack(model, share=False) else "none"
    if packing == "none":
        return packing, ""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ids = (torch.arange(7, device=model.device) * 5 + 3) % model.config.get_text_config().vocab_size
            theirs = row_logits(model, ids)
            hidden = run_decoder(model, ids, torch.arange(len(ids), device=model.device), None)
            for place, index in (("last", -1), ("first", 0)):
                error = (label_logits(model, hidden[[index]]) - theirs).abs().max() / theirs.abs().max().clamp_min(1e-9)
                if float(error) < PROBE_TOLERANCE:
                    return packing, place
    except (ValueError, TypeError, RuntimeError, AttributeError):
        pass
    finally:
        model.train(training)
    return "none", ""
