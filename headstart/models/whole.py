"""A layer of Llama's form as one call of the kernels each way, where only adapters train.

What fused functions do one behind the other, without Python between them: after each large product Python is out of the caches, which
takes longer than what it does. From `native.FEW_ROWS` tokens on, below which these leave products to torch, either gives the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import mmap
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from headstart.models.attend import one_by_one
from headstart.models.blocks import Blocks
from headstart.models.fused import GatedMlp, Heads, Norm
from headstart.models.linear import Product
from headstart.models.native import Attention, Layer, Linear, Native, cut_parts, suits

SIZES = 4  # of spare memory between one power of two and the next
_afresh = [0]  # how deep in `afresh`


@contextlib.contextmanager
def afresh() -> Iterator[None]:
    """Have layers ask for all memory anew, so that it is seen what they fill."""
    _afresh[0] += 1
    try:
        yield
    finally:
        _afresh[0] -= 1


class Spare:
    """Memory in which the layers of a model keep what they need on the way back: used anew by pack after pack.

    An allocator puts something smaller into it in between, and asks the system for more at the next pack that is a little
    larger, which has to be touched for the first time in the middle of training. So it is the system's own, outside of the heap.
    """

    def __init__(self) -> None:
        self._free: list[tuple[mmap.mmap, int]] = []  # with where each lies

    def take(self, floats: int, like: Tensor) -> Tensor:
        """Return room for so many numbers, float32 [floats]. It is given back when nothing holds it any more, be that after a
        way back or not. Raises MemoryError.
        """
        if _afresh[0]:
            return like.new_empty(floats)
        # The one that was given back last, so that a lone forward pass stays in one.
        last = range(len(self._free) - 1, -1, -1)
        found = next((n for n in last if len(self._free[n][0]) >= 4 * floats), None)
        if found is None:
            self.let_go()  # none of them is of use for a pack of this size
            block = _pages(max(floats, int(2 ** (math.ceil(math.log2(floats) * SIZES) / SIZES))))
        else:
            block = self._free.pop(found)
        place = (ctypes.c_float * floats).from_address(block[1])
        weakref.finalize(place, self._free.append, block).atexit = False
        return torch.frombuffer(place, dtype=torch.float32)  # whose storage holds `place`

    def let_go(self) -> None:
        """Give back to the system what no layer holds."""
        self._free.clear()


def _pages(floats: int) -> tuple[mmap.mmap, int]:
    """Return memory of the system's, in large pages where it has them, and where it lies. Raises MemoryError."""
    try:
        # Shared memory, which is the default, has large pages on few systems.
        private = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
        pages = mmap.mmap(-1, 4 * floats, **private)
    except OSError as error:  # it has none left; a step is then begun anew in smaller packs
        raise MemoryError(f"{4 * floats:,} bytes: {error.strerror}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages, ctypes.addressof(ctypes.c_char.from_buffer(pages))


class Whole:
    """A layer as the kernels are told of it: products, norms and heads. It is told anew once these have changed.

    What is told of a pack is told before each call, so only one thread may run it at a time.
    """

    def __init__(
        self, columns: Product, out: Product, mlp: GatedMlp, before: Norm, mlp_norm: Norm, heads: Heads
    ) -> None:
        self._parts = columns, out, mlp, before, mlp_norm, heads
        self.products = columns, out, mlp.wide, mlp.down
        self._norms = before, mlp_norm
        self.heads = heads
        self.layer = Layer(eps=before.eps, mlp_eps=mlp_norm.eps)
        self._attention = Attention(heads=heads.queries, groups=heads.groups, width=heads.width, share=1.0)
        self.layer.attention = ctypes.addressof(self._attention)
        self.spare = Spare()
        self._keys: list[Any] = []
        self._told: list[Linear] = []  # which hold what the kernels read
        self._fits = False  # as of these keys

    def __deepcopy__(self, memo: dict[int, Any]) -> Whole:
        return Whole(*copy.deepcopy(self._parts, memo))  # what the copy is made of lies elsewhere

    def forget(self) -> None:
        """Let go of what the kernels were told, until the layer runs again."""
        self._keys, self._told, self._fits = [], [], False

    def fits(self, native: Native) -> bool:
        """Tell whether the kernels compute all of it; take over what has changed."""
        keys: list[Any] = []
        for product in self.products:
            product.refresh()
            keys.append(product.key)
        keys += [(norm.weight.data_ptr(), norm.weight.requires_grad) for norm in self._norms]
        if keys != self._keys:
            self._keys = keys
            found = [product.tell(native) for product in self.products]
            told = [linear for linear in found if linear is not None]
            self._fits = len(told) == len(found) and self._read(*told)
        return self._fits

    def _read(self, columns: Linear, out: Linear, wide: Linear, down: Linear) -> bool:
        """Take over layers and norms, if they are put together as the kernels do it; tell whether they are."""
        heads, told = self.heads, [columns, out, wide, down]
        for norm in self._norms:
            if not suits(norm.weight) or norm.offset or norm.weight.requires_grad or norm.weight.shape != (out.n,):
                return False
        inside = out.k == heads.queries * heads.width and columns.n == out.k + 2 * heads.groups * heads.width
        around = columns.k == out.n == wide.k == down.n and wide.n == 2 * down.k
        places = [place for linear in told if linear.own is not None for place in linear.own.places]
        if not inside or not around or out.bias or down.bias or len(set(places)) < len(places):
            return False
        self._told = told
        self.layer.columns, self.layer.out, self.layer.wide, self.layer.down = told
        self.layer.scale, self.layer.mlp_scale = (norm.weight.data_ptr() for norm in self._norms)
        return True

    def make_gradients(self) -> None:
        """Have the kernels add to the gradients of adapters that train."""
        for linear in self._told:
            if linear.own is not None:
                linear.own.make_gradients()

    @property
    def trigger(self) -> Tensor | None:
        """A parameter that trains, for autograd to know that a gradient is wanted; None where nothing trains."""
        return next((found for product in self.products if (found := product.trigger) is not None), None)

    def tell(self, tokens: int, cos: Tensor, sin: Tensor, blocks: Blocks, scale: float) -> None:
        """Take over which pack it is about; the parts are for the way back."""
        with one_by_one():
            table = blocks.table
        layer, attention = self.layer, self._attention
        attention.read(table, scale)
        layer.parts, edges = cut_parts(table, self.heads.groups)
        layer.edges, layer.threads = edges.ctypes.data, attention.threads
        layer.tokens, layer.r = tokens, cos.shape[1]
        layer.cos, layer.sin = cos.data_ptr(), sin.data_ptr()
        layer.cos_step, layer.sin_step = cos.stride(0), sin.stride(0)


class _RunWhole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        trigger: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        whole: Whole,
        native: Native,
        blocks: Blocks,
        scale: float,
    ) -> Tensor:
        whole.tell(x.shape[0], cos, sin, blocks, scale)
        kept_floats, *floats = native.layer_floats(whole.layer, back=False)
        works = _room(floats, x)
        kept = whole.spare.take(kept_floats, x)
        output = torch.empty_like(x)
        native.layer(whole.layer, x, output, kept, *works)
        ctx.whole, ctx.native, ctx.blocks, ctx.scale = whole, native, blocks, scale
        ctx.save_for_backward(x, cos, sin, kept)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, kept = ctx.saved_tensors
        whole: Whole = ctx.whole
        whole.tell(x.shape[0], cos, sin, ctx.blocks, ctx.scale)
        works = _room(ctx.native.layer_floats(whole.layer, back=True)[1:], x)
        d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        gradient = gradient.contiguous()
        whole.make_gradients()  # last, since until they are written nobody may see them
        ctx.native.layer_back(whole.layer, x, gradient, d_x, kept, *works)
        return d_x, *(None,) * 7


def _room(floats: Sequence[int], x: Tensor) -> list[Tensor]:
    """Return memory for what a layer works in, and its attention; that depends on blocks and threads."""
    works = x.new_empty(floats[0])
    with one_by_one():
        return [works, x.new_empty(floats[1])]


def run_whole(
    x: Tensor, turn: tuple[Tensor, Tensor], whole: Whole, native: Native, blocks: Blocks, scale: float
) -> Tensor:
    """Run a layer that `fits` on a pack, [T, D]: `turn` is cos and sin [T, r] of the rotary positions, `scale` that of scores."""
    return _RunWhole.apply(x.contiguous(), whole.trigger, *turn, whole, native, blocks, scale)  # type: ignore[no-any-return, no-untyped-call]
