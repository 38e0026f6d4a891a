"""Kernels in C for a CPU (`native.c`): compiled on Linux where a C compiler is found, once for each machine, and kept.

What they compute, functions of torch compute too; these take its place where there is no compiler, and for what isn't
float32 on a CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headstart import machine
from headstart.models.blocks import Ints, Table

SOURCE = Path(__file__).with_name("native.c")
TORCH = Path(torch.__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
COMPILE_S = 60
FEW_ROWS = 64  # with fewer, laying out the other matrix takes longer than it saves
MANY_NUMBERS = 3 << 20  # of a matrix, from which on a BLAS is as fast or faster
EVEN = 8  # times as many panels of columns as threads, so that each has about the same to do
PARTS = 8  # at most, of the blocks whose gradients of keys are added up apart
PARTS_A_THREAD = 4  # that many for each thread, of which each group of heads is one, so that none waits long at the end


class _Attention(ctypes.Structure):
    """`struct attention` of the kernels."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_step", "k_step", "heads", "groups", "width", "count", "threads")),
        *((name, ctypes.c_void_p) for name in ("blocks", "runs", "kept", "places")),
        *((name, ctypes.c_float) for name in ("scale", "share")),
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
        self._library = library
        library.headstart_attend_room.restype = library.headstart_attend_width.restype = ctypes.c_int64
        self._columns = library.headstart_multiply_columns()

    def multiplies(self, a: Tensor, b: Tensor) -> bool:
        """Tell whether `multiply` takes these, [m, k] and [k, n], and is faster: where a cache holds much of b."""
        alike = b.dtype == a.dtype and b.device == a.device and a.shape[1] == b.shape[0] and 1 in b.stride()
        if not alike or not self._columns or len(a) < FEW_ROWS or not 0 < b.numel() <= MANY_NUMBERS:
            return False
        panels, left = divmod(b.shape[1], self._columns)
        threads = torch.get_num_threads()
        even = panels >= threads * EVEN or panels % threads == 0
        return not left and not b.shape[0] % self._columns and even

    def multiply(self, a: Tensor, b: Tensor, base: Tensor | None, output: Tensor) -> None:
        """Write a b, [m, k] and [k, n], into `output`, plus `base`, [m, n], which may be the same, or [n]."""
        turned = b.stride(1) != 1
        added = ctypes.c_void_p(None if base is None else base.data_ptr())
        step = 0 if base is None or base.dim() == 1 else base.stride(0)
        pointers = *_at(a), _pointer(b), ctypes.c_int64(b.stride(1 if turned else 0)), ctypes.c_int(turned)
        sizes = map(ctypes.c_int64, (len(a), b.shape[1], len(b)))
        self._library.headstart_multiply(*pointers, added, ctypes.c_int64(step), *_at(output), *sizes, _threads())

    def attend(self, inputs: Inputs, output: Tensor) -> None:
        """Write what queries see of values into `output` [P, H, d]."""
        called = _attention(inputs)
        room = self._room(called)  # which lives until the kernel has returned
        self._library.headstart_attend(ctypes.byref(called), *_at(output), _pointer(room))

    def attend_back(self, inputs: Inputs, gradient: Tensor, gradients: tuple[Tensor, ...]) -> None:
        """Write the gradients of q, k and v into `gradients`, given that of what `attend` wrote."""
        table = inputs.table
        tokens, groups, _ = inputs.k.shape
        parts = max(1, min(PARTS, PARTS_A_THREAD * torch.get_num_threads() // groups, len(table.fields)))
        called = _attention(inputs)
        width = self._library.headstart_attend_width(ctypes.byref(called))
        sums, room = inputs.k.new_empty(parts, groups, 2, tokens, width), self._room(called)
        steps, edges = np.array([part.stride(0) for part in gradients[:2]], np.int64), table.edges(parts)
        self._library.headstart_attend_back(
            *(ctypes.byref(called), *_at(gradient), *map(_pointer, gradients), _array(steps), ctypes.c_int64(tokens)),
            *(ctypes.c_int64(parts), _array(edges), _pointer(sums), _pointer(room)),
        )

    def _room(self, called: _Attention) -> Tensor:
        """Return what the threads of a call work in."""
        each = self._library.headstart_attend_room(ctypes.byref(called))
        return torch.empty(called.threads, each, dtype=torch.float32, device="cpu")

    def turn(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Turn heads [T, n, d] by their positions, in place: the first r with the next r; cos, sin [T, r]."""
        tokens, n, width = heads.shape
        sizes = map(ctypes.c_int64, (tokens, n, width))
        self._library.headstart_turn(
            *_at(heads), *sizes, *_at(cos), *_at(sin), ctypes.c_int64(cos.shape[1]), _threads()
        )

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up, [T, F]."""
        output = gate.new_empty(gate.shape)
        self._library.headstart_gate(
            _pointer(gate), _pointer(up), ctypes.c_int64(up.stride(0)), _pointer(output), *_sizes(gate)
        )
        return output

    def gate_back(self, gate: Tensor, up: Tensor, gradient: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
        """Write the gradients of gate and up, given that of silu(gate) * up, in whose place this product is written."""
        pointers = _pointer(gate), _pointer(up), ctypes.c_int64(up.stride(0)), _pointer(gradient)
        places = _pointer(d_gate), _pointer(d_up), ctypes.c_int64(d_up.stride(0))
        self._library.headstart_gate_back(*pointers, *places, *_sizes(gate))

    def norm(self, x: Tensor, scale: Tensor, eps: float, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x [T, D] / rms(x) * scale, and 1 / rms(x), [T, 1], which is made where it isn't known."""
        output, known = x.new_empty(x.shape), inverse is not None
        inverse = x.new_empty(len(x), 1) if inverse is None else inverse
        places = _pointer(inverse), _pointer(output)
        self._library.headstart_norm(
            *_at(x), _pointer(scale), ctypes.c_float(eps), ctypes.c_int(known), *places, *_sizes(x)
        )
        return output, inverse

    def norm_back(self, x: Tensor, scale: Tensor, inverse: Tensor, gradient: Tensor, add: Tensor | None) -> None:
        """Write the gradient of x [T, D], plus `add`, in the place of that of the normed rows."""
        more = (ctypes.c_void_p(None), ctypes.c_int64(0)) if add is None else _at(add)
        pointers = _pointer(scale), _pointer(inverse), _pointer(gradient)
        self._library.headstart_norm_back(*_at(x), *pointers, *more, *_sizes(x))


def _attention(inputs: Inputs) -> _Attention:
    q, k, v, table, scale, kept, share = inputs
    if any(part.stride(1) != k.shape[2] for part in (q, k, v) if part.shape[1] > 1) or k.stride(0) != v.stride(0):
        raise ValueError("heads don't lie side by side, or values not as keys do")
    pointers = (part.data_ptr() for part in (q, k, v))
    sizes = q.stride(0), k.stride(0), q.shape[1], k.shape[1], k.shape[2], len(table.fields), torch.get_num_threads()
    place = None if kept is None else kept.data_ptr()
    arrays = table.fields.ctypes.data, table.runs.ctypes.data, place, table.places.ctypes.data
    return _Attention(*pointers, *sizes, *arrays, scale, share)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _at(tensor: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    """Return where a tensor lies, and how far its rows are apart."""
    return _pointer(tensor), ctypes.c_int64(tensor.stride(0))


def _array(values: Ints) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)


def _sizes(rows: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]:
    return ctypes.c_int64(rows.shape[0]), ctypes.c_int64(rows.shape[1]), _threads()


def _threads() -> ctypes.c_int64:
    return ctypes.c_int64(torch.get_num_threads())


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
    fits = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)
    return find() if fits else None


def product(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """Return a b, [m, k] and [k, n], plus `base`, [m, n] or [n]. Autograd doesn't see what kernels do."""
    native = suits(a) if base is None else suits(a, base)
    fits = base is None or base.shape in ((b.shape[1],), (len(a), b.shape[1]))
    if native is None or not fits or not native.multiplies(a, b) or torch.is_autocast_enabled("cpu"):
        return torch.mm(a, b) if base is None else torch.addmm(base, a, b)
    output = a.new_empty(len(a), b.shape[1])
    native.multiply(a, b, base, output)
    return output
