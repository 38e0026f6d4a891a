"""Forest attention in one kernel for a whole pack, where blocks of queries would be many small ones: for GPUs.

Forests go to FlexAttention, with who sees whom as `sight` says it; those that share nothing to attention over rows of
varying length, where it is there. Each is used where it was tried on the model and gave what blocks give.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headstart.models.attend import in_one_type
from headstart.models.sight import BLOCK, Sight, build_sight, find_blocks, longest_row, row_ends, walk

if TYPE_CHECKING:
    from headstart.models.attention import Asked, Forest

LEAST_HEAD, WIDEST_HEAD = 16, 256  # widths of heads: the least of FlexAttention, the widest of flash attention
HALF = (torch.bfloat16, torch.float16)
MOST_VARIANTS = 32  # of one kernel: with and without a window, a gradient, a soft cap
AGREE = {torch.float32: 1e-3}
AGREE_HALF = 0.1

Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, bool, int], Tensor]


@dataclass(frozen=True)
class Call:
    """What decides which kernel computes the attention of a pack. `window` and `softcap` 0 for none."""

    device: str
    dtype: torch.dtype
    tokens: int
    roots: bool
    head_dim: int
    window: int = 0
    softcap: float = 0.0
    dropout: float = 0.0
    flex: bool = True
    varlen: bool = True


def choose_kernel(call: Call) -> str:
    """Return `blocks`, `flex` or `varlen`: what can compute the call, and of these what is meant for it."""
    if call.device != "cuda" or call.dropout:
        return "blocks"  # the others know no dropout
    fits = call.dtype in HALF and call.head_dim % 8 == 0 and call.head_dim <= WIDEST_HEAD
    if call.roots and call.varlen and fits and not call.softcap:
        return "varlen"
    fits = call.dtype in (torch.float32, *HALF) and call.head_dim >= LEAST_HEAD
    # What fits into one block has nothing to skip, and a length of 1 block would be compiled by itself.
    return "flex" if call.flex and fits and call.tokens > BLOCK else "blocks"


def build_block_mask(sight: Sight) -> Any:
    """Return a sight as FlexAttention takes it: for each block of queries the blocks of keys to compute."""
    from torch.nn.attention.flex_attention import BlockMask

    some, every = find_blocks(sight)
    tokens = len(sight.place)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda _batch, _head, query, key: sight.sees(query, key),
        seq_lengths=(tokens, tokens),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    counts = blocks.sum(-1, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], order[None, None]


TABLES = tuple(f"{side}_{what}" for side in ("kv", "full_kv", "q", "full_q") for what in ("num_blocks", "indices"))


@dataclass(frozen=True)
class Prepared:
    """What is made once a pack: its walk and the ends of its rows on the device, and a mask for each kind of layer.

    `longest` are the tokens from a root to the end of the deepest row.
    """

    walked: Tensor
    ends: Tensor
    roots: bool
    longest: int
    masks: dict[tuple[int, bool], tuple[Sight, tuple[Tensor, ...]]]


def prepare(forest: Forest) -> Prepared:
    """Return what the kernels need of a pack; made at its first layer, kept with the forest."""
    if forest.prepared is None:
        device = forest.positions.device
        lengths, parents = forest.nodes.length.tolist(), forest.nodes.parent.tolist()
        walked = _to(torch.from_numpy(walk(lengths, parents)), device)
        ends = _to(row_ends(lengths), device)
        forest.prepared = Prepared(walked, ends, max(parents) < 0, longest_row(lengths, parents), {})
    return forest.prepared


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def run_kernel(kernel: str, forest: Forest, query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Tensor:
    """Attend within a forest by `flex` or `varlen`; tensors of one type, [1, H, T, d], [1, K, T, d] -> [1, T, H, d].

    Raises RuntimeError where the kernel is not there.
    """
    prepared = prepare(forest)
    rule, window, causal, _ = asked
    if kernel == "varlen":
        run = find_varlen()
        if run is None:
            raise RuntimeError("attention over rows of varying length is not there")
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return run(q, k, v, prepared.ends, prepared.longest, rule.scale, causal, window)[None]
    if (window, causal) not in prepared.masks:
        sight = build_sight(prepared.walked, forest.positions, window, causal)
        mask = build_block_mask(sight)
        tables = tuple(getattr(mask, name) for name in TABLES)
        _mark_lengths(sight, tables)
        prepared.masks[window, causal] = sight, tables
    for tensor in (query, key, value):
        torch._dynamo.maybe_mark_dynamic(tensor, 2)
    sight, tables = prepared.masks[window, causal]
    with warnings.catch_warnings():  # the compiler looks at gradients of tensors that have none, and is warned of it
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        numbers = repr(rule.scale), repr(rule.softcap) if rule.softcap else ""
        attended = flex_kernel()(query, key, value, sight, tables, *numbers)
    return attended.transpose(1, 2).contiguous()


def _mark_lengths(sight: Sight, tables: Sequence[Tensor]) -> None:
    """Say which sizes differ from pack to pack, so that no pack is compiled for by itself."""
    for tensor in (sight.begin, sight.place, sight.end, sight.position, sight.earliest):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for table in tables:
        for side in range(2, table.ndim):
            torch._dynamo.maybe_mark_dynamic(table, side)


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sight: Sight,
    tables: Sequence[Tensor],
    scale: str,
    softcap: str,
) -> Tensor:
    """Run FlexAttention, [1, H, T, d]; to be compiled.

    The mask is put together in here, so that its length is that of the tokens and no number that a graph is compiled for.
    `scale` and `softcap` (empty for none) are texts: a number that differs from call to call becomes a variable of the
    graph, which FlexAttention can't take.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def sees(_batch: Tensor, _head: Tensor, query_place: Tensor, key_place: Tensor) -> Tensor:
        return sight.sees(query_place, key_place)

    def bend(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return float(softcap) * torch.tanh(score / float(softcap))

    listed: dict[str, Any] = dict(zip(TABLES, tables, strict=True))
    mask = BlockMask(
        seq_lengths=(query.shape[2], query.shape[2]),
        **listed,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
    )
    attended: Tensor = flex_attention(
        query,
        key,
        value,
        score_mod=bend if softcap else None,
        block_mask=mask,
        scale=float(scale),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended


@functools.cache
def flex_kernel() -> Callable[..., Tensor]:
    """Return `flex`, compiled once for all packs."""
    limit: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        limit["recompile_limit"] = MOST_VARIANTS
    # One graph or an error: run without being compiled it would fill T x T.
    compiled: Callable[..., Tensor] = torch.compile(flex, fullgraph=True, **limit)
    return compiled


@functools.cache
def has_flex() -> bool:
    """Tell whether FlexAttention can be compiled here."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.is_available()


@functools.cache
def find_varlen() -> Varlen | None:
    """Return attention over rows of varying length: torch's, else that of flash-attn, else None."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return None
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        from torch.nn.attention.varlen import varlen_attn

        if {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters):
            return _varlen_of_torch
    return _varlen_of_flash_attn if importlib.util.find_spec("flash_attn") is not None else None


def window_sides(window: int, causal: bool) -> tuple[int, int]:
    """Return how many keys before and behind itself a query sees beside its own, -1 for all.

    Raises ValueError for a window that looks both ways.
    """
    if window and not causal:
        raise ValueError("a window that looks both ways is not known here")
    return (window - 1 if window else -1, 0) if causal else (-1, -1)


def _varlen_of_torch(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float, causal: bool, window: int
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    sides = window_sides(window, causal)
    grouped = query.shape[1] != key.shape[1]
    attended = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scale, window_size=sides, enable_gqa=grouped
    )
    return attended if isinstance(attended, Tensor) else attended[0]


def _varlen_of_flash_attn(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float, causal: bool, window: int
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    sides = window_sides(window, causal)
    attended: Tensor = flash_attn_varlen_func(
        query, key, value, ends, ends, longest, longest, softmax_scale=scale, causal=causal, window_size=sides
    )
    return attended


def attend_whole(forest: Forest, query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Tensor | None:
    """Attend by the kernel that suits the pack, as `run_kernel` does; None where that is `blocks`."""
    prepared = prepare(forest)
    query, key, value = in_one_type(query, key, value)
    # A window that reaches over the longest row is none; so short packs have one kind of layer, and not two.
    if asked.window >= prepared.longest:
        asked = asked._replace(window=0)
    call = Call(
        device=query.device.type,
        dtype=value.dtype,
        tokens=query.shape[2],
        roots=prepared.roots,
        head_dim=query.shape[-1],
        window=asked.window,
        softcap=asked.rule.softcap or 0.0,
        dropout=asked.rule.dropout,
        flex=has_flex(),
        varlen=find_varlen() is not None,
    )
    kernel = choose_kernel(call) if forest.kernel == "auto" else forest.kernel
    return None if kernel == "blocks" else run_kernel(kernel, forest, query, key, value, asked)


def kernels_agree(model: Any, *, share: bool, precision: Callable[[], AbstractContextManager[Any]]) -> bool:
    """Tell whether the kernels for whole packs give a model's hidden states and gradients as blocks do: tried.

    Tried are roots alone and, with `share`, a forest. False too where a kernel can't be compiled here. `precision` gives
    the context that the model runs in. Windows that are wider than the rows of the trial are not tried.
    """
    training = model.training
    model.eval()
    try:
        with precision():
            (weight,) = in_one_type(model.get_input_embeddings().weight.detach()[:1])
        limit = AGREE.get(weight.dtype, AGREE_HALF)
        for shared in (False, True) if share else (False,):
            with torch.enable_grad():
                theirs, ours = (_try(model, kernel, shared, precision) for kernel in ("blocks", "auto"))
            # Not `>=`: what is no number agrees with nothing.
            if not all(_error(a, b) < limit for a, b in zip(ours, theirs, strict=True)):
                return False
        return True
    except Exception:  # compilers fail in ways of their own, and blocks are always there
        return False
    finally:
        model.train(training)


def _try(
    model: Any, kernel: str, share: bool, precision: Callable[[], AbstractContextManager[Any]]
) -> tuple[Tensor, Tensor]:
    """Return the hidden states of a small forest and a gradient that went through all of its layers."""
    from headstart.models.attention import Forest, run_decoder

    lengths, parents = ([70, 40, 33, 21, 90], [-1, 0, 0, 1, -1]) if share else ([70, 40, 33, 90], [-1] * 4)
    begins: list[int] = []
    for parent in parents:
        begins.append(begins[parent] + lengths[parent] if parent >= 0 else 0)
    depths = [begin + place for begin, length in zip(begins, lengths, strict=True) for place in range(length)]
    positions = torch.tensor(depths, device=model.device)
    ids = (torch.arange(len(depths), device=model.device) * 7 + 3) % model.config.get_text_config().vocab_size
    embedded: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: embedded.append(output.requires_grad_(True))
    )
    try:
        with precision():
            hidden = run_decoder(model, ids, positions, Forest(lengths, parents, positions, kernel=kernel))
    finally:
        hook.remove()
    # Any direction will do that no symmetry of the states hides.
    direction = torch.sin(torch.arange(hidden.numel(), device=hidden.device, dtype=torch.float32)).view_as(hidden)
    (gradient,) = torch.autograd.grad((hidden.float() * direction).sum(), embedded[0])
    return hidden.detach(), gradient


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).float().norm() / theirs.float().norm().clamp_min(1e-12))
