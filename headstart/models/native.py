"""Kernels in C for a CPU (`native.c`): compiled on Linux where a C compiler is found, once for each machine, and kept.

What they compute, functions of torch compute too; these take its place where there is no compiler, and for what isn't
float32 on a CPU.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart import machine
from headstart.models.blocks import Ints, Table

COMPILER = "C compiler"  # as versions name it
SOURCE = Path(__file__).with_name("native.c")
TORCH = Path(torch.__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
COMPILE_S = 60
FEW_ROWS = 64  # with fewer, laying out the other matrix takes longer than it saves
FEW_ROWS_NARROW = 16  # where registers hold eight numbers, and a BLAS is slower
MANY_NUMBERS = 3 << 20  # of a matrix, from which on a BLAS is as fast or faster where registers hold sixteen
EVEN = 8  # times as many panels of columns as threads, so that each has about the same to do
LANES = 16  # numbers of the widest registers there are
PARTS = 8  # at most, of the blocks whose gradients of keys are added up apart
PARTS_A_THREAD = 4  # that many for each thread, of which each group of heads is one, so that none waits long at the end


# What the kernels are called with: places, whole numbers of 64 bits, floats and flags.
TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
KERNELS = {
    "multiply": "pnnpnipnpnnnnn",
    "adapt_room": "p",
    "adapt": "ppnpnfpnpn",
    "adapt_back": "ppnppnnpn",
    "adapt_sum": "ppnpnppnpn",
    "attend_room": "p",
    "attend_width": "p",
    "attend": "ppnp",
    "attend_back": "ppnpppnnnnppp",
    "turn": "pnnnnpnpnnfn",
    "layer_floats": "pip",
    "layer": "pppppp",
    "layer_back": "ppppppp",
    "gate": "ppnpnnn",
    "gate_back": "ppnpppnnnn",
    "norm": "pnpfippnnn",
    "norm_back": "pnppppnnnn",
}


class Attention(ctypes.Structure):
    """`struct attention` of the kernels."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_step", "k_step", "heads", "groups", "width", "count", "threads")),
        *((name, ctypes.c_void_p) for name in ("blocks", "runs", "kept", "places")),
        *((name, ctypes.c_float) for name in ("scale", "share")),
    )

    def read(self, table: Table, scale: float) -> None:
        """Take over which queries see which keys, and what scores are multiplied by."""
        self.count, self.threads, self.scale = len(table.fields), torch.get_num_threads(), scale
        self.blocks, self.runs = table.fields.ctypes.data, table.runs.ctypes.data
        self.places = table.places.ctypes.data


class _Adapter(ctypes.Structure):
    """`struct adapter` of the kernels."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "d_a", "d_b")),
        *((name, ctypes.c_int64) for name in ("column", "width", "first", "rank")),
        *((name, ctypes.c_int) for name in ("fresh_a", "fresh_b")),
        ("scale", ctypes.c_float),
    )


class _Adapters(ctypes.Structure):
    """`struct adapters` of the kernels."""

    _fields_ = (
        ("all", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "depth", "ranks", "widest")),
    )


class Adapters:
    """Adapters of linear layers that read the same input, as kernels read them: A [R, D] and B [N, R], where its
    columns of the outputs begin, its scale.
    """

    def __init__(self, adapters: Sequence[tuple[Tensor, Tensor, int, float]]) -> None:
        self._adapters = adapters
        self._table = (_Adapter * len(adapters))()
        first = widest = 0
        for told, (a, b, column, scale) in zip(self._table, adapters, strict=True):
            told.a, told.b, told.scale = a.data_ptr(), b.data_ptr(), scale
            told.column, told.width, told.first, told.rank = column, len(b), first, len(a)
            first, widest = first + len(a), max(widest, len(b))
        sizes = len(adapters), adapters[0][0].shape[1], first, widest
        self.told = _Adapters(ctypes.addressof(self._table), *sizes)
        self.ranks = first
        self.places = [p.data_ptr() for a, b, *_ in adapters for p in (a, b)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapters:
        return Adapters(copy.deepcopy(self._adapters, memo))  # the copy's lie elsewhere

    def make_gradients(self) -> None:
        """Say where gradients are added up; parameters that train and have none get one."""
        for told, (a, b, *_) in zip(self._table, self._adapters, strict=True):
            told.d_a, told.fresh_a = _gradient(a)
            told.d_b, told.fresh_b = _gradient(b)


def _gradient(parameter: Tensor) -> tuple[int | None, bool]:
    """Return where a parameter's gradient is added up, if it trains, and whether there was none yet."""
    if not parameter.requires_grad:
        return None, False
    gradient, fresh = parameter.grad, parameter.grad is None
    if gradient is None:
        gradient = parameter.grad = torch.empty_like(parameter)
    if not gradient.is_contiguous():
        raise ValueError("a gradient has gaps")
    return gradient.data_ptr(), fresh


class Linear(ctypes.Structure):
    """`struct linear` of the kernels, which holds what it tells of: weight [n, k], bias [n], adapters."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        ("adapters", _Adapters),
        *((name, ctypes.c_int64) for name in ("n", "k")),
    )

    def __init__(self, weight: Tensor, bias: Tensor | None, own: Adapters | None) -> None:
        super().__init__(weight=weight.data_ptr(), n=weight.shape[0], k=weight.shape[1])
        self._held = weight, bias
        self.own = own
        if bias is not None:
            self.bias = bias.data_ptr()
        if own is not None:
            self.adapters = own.told


class Layer(ctypes.Structure):
    """`struct layer` of the kernels."""

    _fields_ = (
        *((name, Linear) for name in ("columns", "out", "wide", "down")),
        *((name, ctypes.c_void_p) for name in ("scale", "mlp_scale", "cos", "sin", "attention", "edges")),
        *((name, ctypes.c_int64) for name in ("parts", "tokens", "r", "cos_step", "sin_step", "threads")),
        *((name, ctypes.c_float) for name in ("eps", "mlp_eps")),
    )


class Inputs(NamedTuple):
    """What attention reads: queries [P, H, d], keys and values [T, K, d], and which see which.

    Scores are multiplied by `scale`. `kept`, uint8, is what dropout keeps of the weights, block by block, of which each is
    multiplied by `share`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    table: Table
    scale: float
    kept: Tensor | None
    share: float


class Native:
    """The kernels. All tensors are float32, on the CPU, and the last dimension of each lies without gaps.

    Heads lie side by side, and values as keys do, as they are columns of one tensor; a gradient that is used up or written
    lies without gaps, [T, N].
    """

    def __init__(self, library: ctypes.CDLL, compiler: str) -> None:
        self.compiler = compiler  # its version, since another one may round otherwise
        self._call = {name: getattr(library, f"headstart_{name}") for name in KERNELS}
        for name, kinds in KERNELS.items():
            self._call[name].argtypes = [TYPES[kind] for kind in kinds]
        for name in ("attend_room", "attend_width", "adapt_room"):
            self._call[name].restype = ctypes.c_int64
        self._columns = library.headstart_multiply_columns()
        self._lanes = self._columns // 2  # numbers that a register holds
        self._narrow = 0 < self._lanes < LANES  # for which a BLAS is slower with a matrix of any size
        self._few = FEW_ROWS_NARROW if self._narrow else FEW_ROWS

    def multiplies(self, a: Tensor, b: Tensor) -> bool:
        """Tell whether `multiply` takes these, [m, k] and [k, n], and is faster: where a cache holds much of b, say."""
        (rows, depth), (k, n) = a.shape, b.shape
        if not (b.dtype is a.dtype and b.is_cpu and depth == k and 1 in b.stride() and rows >= self._few):
            return False
        if a.stride(1) == 1:
            return self.suits_size(k, n)
        # As the gradients of outputs lie for those of weights.
        return self._narrow and a.stride(0) == b.stride(1) == 1 and k >= self._few and self._suits_columns(n)

    def suits_size(self, k: int, n: int) -> bool:
        """Tell whether `multiply` takes [k, n], and is faster for many rows."""
        fits = self._suits_columns(n) and k > 0 and not k % self._columns
        return fits and (self._narrow or k * n <= MANY_NUMBERS)

    def _suits_columns(self, n: int) -> bool:
        if not self._columns or n <= 0:
            return False
        panels, left = divmod(n, self._columns)
        threads = torch.get_num_threads()
        return not left and (panels >= threads * EVEN or panels % threads == 0)

    def multiply(self, a: Tensor, b: Tensor, base: Tensor | None, output: Tensor) -> None:
        """Write a b, [m, k] and [k, n], into `output`, plus `base`, [m, n], which may be the same, or [n]."""
        (row, column), (k, n) = b.stride(), b.shape
        turned = column != 1
        add = (None, 0) if base is None else (base.data_ptr(), base.stride(0) if base.dim() == 2 else 0)
        places = a.data_ptr(), *a.stride(), b.data_ptr(), column if turned else row, turned, *add, *_at(output)
        self._call["multiply"](*places, a.shape[0], n, k, torch.get_num_threads())

    def read_adapters(self, adapters: Sequence[tuple[Tensor, Tensor, int, float]]) -> Adapters | None:
        """Return adapters as `adapt` reads them; None where it doesn't: those whose sizes aren't of whole registers, say."""
        if not self._columns:
            return None
        known = all(
            t.is_contiguous() and not any(n % self._lanes for n in t.shape) for a, b, *_ in adapters for t in (a, b)
        )
        return Adapters(adapters) if known else None

    def adapt(self, adapters: Adapters, inputs: Tensor, output: Tensor, times: float) -> Tensor:
        """Add `times` what adapters make of inputs [T, D] to `output` [T, N]; return A x of all of them, [T, R]."""
        tokens = inputs.shape[0]
        narrow, room = inputs.new_empty(tokens, adapters.ranks), self._adapt_room(adapters)
        places = *_at(inputs), *_at(output), times, narrow.data_ptr(), tokens, room.data_ptr()
        self._call["adapt"](ctypes.byref(adapters.told), *places, torch.get_num_threads())
        return narrow

    def adapt_back(self, adapters: Adapters, gradient: Tensor, d_inputs: Tensor | None) -> Tensor:
        """Return the outputs' gradient [T, N] behind each B, scaled, [T, R]; add what it is behind A to `d_inputs` [T, D]."""
        tokens = gradient.shape[0]
        back, room = gradient.new_empty(tokens, adapters.ranks), self._adapt_room(adapters)
        place = (None, 0) if d_inputs is None else _at(d_inputs)
        places = *_at(gradient), back.data_ptr(), *place, tokens, room.data_ptr()
        self._call["adapt_back"](ctypes.byref(adapters.told), *places, torch.get_num_threads())
        return back

    def adapt_sum(self, adapters: Adapters, gradient: Tensor, inputs: Tensor, narrow: Tensor, back: Tensor) -> None:
        """Add to the gradients of adapters, given that of the outputs [T, N], the inputs, and what the two above returned."""
        room = self._adapt_room(adapters)
        adapters.make_gradients()  # last, since until they are written nobody may see them
        places = *_at(gradient), *_at(inputs), narrow.data_ptr(), back.data_ptr(), inputs.shape[0], room.data_ptr()
        self._call["adapt_sum"](ctypes.byref(adapters.told), *places, torch.get_num_threads())

    def _adapt_room(self, adapters: Adapters) -> Tensor:
        return torch.empty(self._call["adapt_room"](ctypes.byref(adapters.told)), dtype=torch.float32, device="cpu")

    def attend(self, inputs: Inputs, output: Tensor) -> None:
        """Write what queries see of values into `output` [P, H, d]."""
        called = _attention(inputs)
        room = self._room(called)  # which lives until the kernel has returned
        self._call["attend"](ctypes.byref(called), *_at(output), room.data_ptr())

    def attend_back(self, inputs: Inputs, gradient: Tensor, gradients: tuple[Tensor, ...]) -> None:
        """Write the gradients of q, k and v into `gradients`, given that of what `attend` wrote."""
        tokens, groups, _ = inputs.k.shape
        parts, edges = cut_parts(inputs.table, groups)
        called = _attention(inputs)
        width = self._call["attend_width"](ctypes.byref(called))
        sums, room = inputs.k.new_empty(parts, groups, 2, tokens, width), self._room(called)
        steps = gradients[0].stride(0), gradients[1].stride(0)
        places = *(part.data_ptr() for part in gradients), *steps, tokens, parts, edges.ctypes.data
        self._call["attend_back"](ctypes.byref(called), *_at(gradient), *places, sums.data_ptr(), room.data_ptr())

    def _room(self, called: Attention) -> Tensor:
        """Return what the threads of a call work in."""
        each = self._call["attend_room"](ctypes.byref(called))
        return torch.empty(called.threads, each, dtype=torch.float32, device="cpu")

    def layer_floats(self, layer: Layer, *, back: bool) -> list[int]:
        """Return how many numbers a layer keeps, works in, and its attention works in."""
        floats = (ctypes.c_int64 * 3)()
        self._call["layer_floats"](ctypes.byref(layer), back, floats)
        return list(floats)

    def layer(self, layer: Layer, *tensors: Tensor) -> None:
        """Run a layer, given x [T, D], and room for what comes out, [T, D], and for each of `layer_floats`."""
        self._call["layer"](ctypes.byref(layer), *(tensor.data_ptr() for tensor in tensors))

    def layer_back(self, layer: Layer, x: Tensor, gradient: Tensor, d_x: Tensor | None, *tensors: Tensor) -> None:
        """Carry a gradient [T, D] back through a layer, given what it kept, and room for the other two of `layer_floats`."""
        places = x.data_ptr(), gradient.data_ptr(), None if d_x is None else d_x.data_ptr()
        self._call["layer_back"](ctypes.byref(layer), *places, *(tensor.data_ptr() for tensor in tensors))

    def turn(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Turn heads [T, n, d] by their positions, in place: the first r with the next r; cos, sin [T, r]."""
        where = *_at(heads), *heads.shape, *_at(cos), *_at(sin)
        self._call["turn"](*where, cos.shape[1], 1.0, torch.get_num_threads())

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up, [T, F]."""
        output = gate.new_empty(gate.shape)
        self._call["gate"](gate.data_ptr(), up.data_ptr(), up.stride(0), output.data_ptr(), *_sizes(gate))
        return output

    def gate_back(self, gate: Tensor, up: Tensor, gradient: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
        """Write the gradients of gate and up, given that of silu(gate) * up, in whose place this product is written."""
        places = gate.data_ptr(), up.data_ptr(), up.stride(0), gradient.data_ptr()
        self._call["gate_back"](*places, d_gate.data_ptr(), d_up.data_ptr(), d_up.stride(0), *_sizes(gate))

    def norm(self, x: Tensor, scale: Tensor, eps: float, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x [T, D] / rms(x) * scale, and 1 / rms(x), [T, 1], which is made where it isn't known."""
        output, known = x.new_empty(x.shape), inverse is not None
        inverse = x.new_empty(x.shape[0], 1) if inverse is None else inverse
        places = inverse.data_ptr(), output.data_ptr()
        self._call["norm"](*_at(x), scale.data_ptr(), eps, known, *places, *_sizes(x))
        return output, inverse

    def norm_back(self, x: Tensor, scale: Tensor, inverse: Tensor, gradient: Tensor, add: Tensor | None) -> None:
        """Write the gradient of x [T, D], plus `add`, in the place of that of the normed rows."""
        more = (None, 0) if add is None else _at(add)
        places = scale.data_ptr(), inverse.data_ptr(), gradient.data_ptr()
        self._call["norm_back"](*_at(x), *places, *more, *_sizes(x))


def _attention(inputs: Inputs) -> Attention:
    q, k, v, table, scale, kept, share = inputs
    if any(part.stride(1) != k.shape[2] for part in (q, k, v) if part.shape[1] > 1) or k.stride(0) != v.stride(0):
        raise ValueError("heads don't lie side by side, or values not as keys do")
    pointers = (part.data_ptr() for part in (q, k, v))
    called = Attention(*pointers, q.stride(0), k.stride(0), q.shape[1], *k.shape[1:], share=share)
    if kept is not None:
        called.kept = kept.data_ptr()
    called.read(table, scale)
    return called


def cut_parts(table: Table, groups: int) -> tuple[int, Ints]:
    """Return in how many parts blocks go back, and where these begin and end."""
    parts = max(1, min(PARTS, PARTS_A_THREAD * torch.get_num_threads() // groups, len(table.fields)))
    return parts, table.edges(parts)


def _at(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor lies, and how far its rows are apart."""
    return tensor.data_ptr(), tensor.stride(0)


def _sizes(rows: Tensor) -> tuple[int, int, int]:
    return *rows.shape, torch.get_num_threads()


# --- where they come from ---


@functools.cache
def find() -> Native | None:
    """Return the kernels, compiled where they aren't yet; None where that isn't possible: without a C compiler, or not on Linux."""
    compiler, threads = find_compiler(), _threading()
    if compiler is None or threads is None:
        return None
    try:
        version = _run(compiler, "--version").partition("\n")[0]
        return Native(_load(compiler, version, threads), version)
    except (OSError, AttributeError, RuntimeError, UnicodeError, subprocess.SubprocessError):
        return None


def versions(*, fast: bool) -> dict[str, str]:
    """Return the versions of what computes; with fast layers also of what compiled their kernels, since it decides how they round."""
    native = find() if fast else None
    return {**machine.versions(), COMPILER: native.compiler if native else "not used"}


def find_compiler() -> str | None:
    """Return the C compiler: `CC`, else `cc` or `gcc`, whichever is there."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc")))), None)


def _threading() -> str | None:
    """Return the OpenMP library that torch has loaded: with another one beside it, two crowds of threads would wait in each other's way."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}
    own = sorted(path for path in loaded if TORCH in Path(path).parents)
    return next(iter(own or loaded), None) if own or len(loaded) == 1 else None


def folder() -> Path:
    """Return where kernels are kept."""
    return machine.home() / "native"


def _load(compiler: str, version: str, threads: str) -> ctypes.CDLL:
    """Load the library, compiled for this machine. Raises OSError and SubprocessError where that fails."""
    library = _compiled(compiler, version, threads)
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # it is damaged, as after a loss of power
        library.unlink()
        return ctypes.CDLL(str(_compiled(compiler, version, threads)))


def _compiled(compiler: str, version: str, threads: str) -> Path:
    tuned = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    told = [SOURCE.read_text(), _processor(), compiler, version, tuned, threads, *FLAGS]
    library = folder() / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as place:
            code, made = Path(place) / "native.o", Path(place) / library.name
            _run(compiler, *FLAGS, tuned, "-c", str(SOURCE), "-o", str(code))
            _run(compiler, "-shared", str(code), threads, "-lm", "-o", str(made))
            made.replace(library)
    return library


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_S).stdout


def _processor() -> str:
    """Return what tells processors apart that a compiler would write other code for."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()


def suits(*tensors: Tensor) -> Native | None:
    """Return the kernels where these tensors are for them; None where they aren't, or there are no kernels."""
    for t in tensors:  # a loop, since this is asked many times a layer
        if t.dtype is not torch.float32 or not t.is_cpu or t.stride(-1) != 1:
            return None
    return find()


def plain_product(a: Tensor, b: Tensor, base: Tensor | None = None, output: Tensor | None = None) -> Tensor:
    """Return a b, [m, k] and [k, n], plus `base`, [m, n] or [n], written into `output`, which may be `base`, if given; by torch."""
    return torch.mm(a, b, out=output) if base is None else torch.addmm(base, a, b, out=output)


def product(a: Tensor, b: Tensor, base: Tensor | None = None, output: Tensor | None = None) -> Tensor:
    """Return what `plain_product` does, made by the kernels where they are quicker. Autograd doesn't see what they do."""
    shape = a.shape[0], b.shape[1]
    native = suits(a if a.stride(1) == 1 else a.t(), *(t for t in (base, output) if t is not None))
    fits = base is None or base.shape in (shape[1:], shape)
    if native is None or not fits or not native.multiplies(a, b) or torch.is_autocast_enabled("cpu"):
        return plain_product(a, b, base, output)
    output = a.new_empty(shape) if output is None else output
    native.multiply(a, b, base, output)
    return output
