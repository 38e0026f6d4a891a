"""A model's own head on the hidden states of a pack: whose token it reads is found out on the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headstart.models.attention import apart, can_pack, run_decoder, use_attention

PROBE_TOLERANCE = 1e-3


def own_logits(model: Any, hidden: Tensor) -> Tensor:
    """Return the logits [S, C] that a model with a head gives for tokens with the states `hidden` [S, D].

    Of a `...ForSequenceClassification` for rows, of a `...ForTokenClassification` or `...ForMaskedLM` for tokens. The
    model's own head runs, on rows of one token each: for that moment its body gives back what it is told to.
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
    return logits.reshape(len(hidden), -1)


def row_logits(model: Any, ids: Tensor, types: Tensor | None = None) -> Tensor:
    """Return the logits ([1, C] of a row, [1, T, C] of its tokens) of one row of ids [T], by the model as it is."""
    use_attention(model, packed=False)
    extra = {} if types is None else {"token_type_ids": types[None]}
    logits: Tensor = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **extra).logits
    return logits


def zero_head(model: Any) -> None:
    """Have a model's head begin at zero: then it tells nothing before it has learned something, where chance would tell anything."""
    body = {id(parameter) for parameter in model.base_model.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in body:
                parameter.zero_()


def body_packing(model: Any) -> str:
    """Return how the layers of a model can read packs: `forest`, `roots` or `none`."""
    return "forest" if can_pack(model) else "roots" if can_pack(model, share=False) else "none"


def find_packing(model: Any) -> tuple[str, str]:
    """Return how a model can read packs, and which token of a row its head reads (`first`, `last` or `each`).

    (`forest`, `last`) for causal models, (`roots`, `first`) for most encoders, (`none`, ``) where rows must go alone.
    """
    packing = body_packing(model)
    if packing == "none":
        return packing, ""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ids = (torch.arange(7, device=model.device) * 5 + 3) % model.config.get_text_config().vocab_size
            theirs = row_logits(model, ids)
            hidden = run_decoder(model, ids, torch.arange(len(ids), device=model.device), None)
            places = {"each": slice(None)} if theirs.ndim == 3 else {"last": slice(-1, None), "first": slice(0, 1)}
            for place, chosen in places.items():
                wanted = theirs.reshape(-1, theirs.shape[-1])
                if apart(own_logits(model, hidden[chosen]), wanted) < PROBE_TOLERANCE:
                    return packing, place
    except (ValueError, TypeError, RuntimeError, AttributeError):
        pass
    finally:
        model.train(training)
    return "none", ""
