"""The operators on NVIDIA cards: `cuda/*.cu`, compiled by nvcc at first use for the card at hand, and kept.

Any card that nvcc still compiles for will do, from Volta on. On others (AMD's, Apple's), without nvcc, in fp64, and
for heads of more than WIDEST channels the form by chunks in PyTorch computes, and a line of the log says why.
"""

import ctypes
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpipe.base import compiler
from rwkvpipe.kernel import build, takes

log = logging.getLogger("rwkvpipe")

SOURCES = Path(__file__).resolve().parents[1] / "cuda"
TRACKED_FILES = ["../cuda/*.cu", "../cuda/*.cuh"]
FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC")
OLDEST = (7, 0)
WIDEST = 128
TENSOR_CORES = (8, 0)  # since when cards multiply matrices of eleven bits
CHUNK, TILED = 16, 64  # tokens that go through them together; channels of a head that goes through them
# bytes of shared memory that a head in one part takes at most there; RWKV-7's takes 86,000 in two parts
SHARED = {"wkv7": 110_000, "wkv6": 83_000}
KINDS = takes.EITHER
DIVIDED = (0, 1, 2, 4, 5)  # gradients of r w k a b come from each part of a head
_said: set[str] = set()
_rough: ContextVar[bool] = ContextVar("rough", default=False)
_over: ContextVar[bool] = ContextVar("over", default=False)


def sources() -> list[Path]:
    """What is compiled."""
    return sorted(SOURCES.glob("*.cu"))


def name(*flags: str) -> str:
    """What tells these sources and flags from others."""
    files = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")])
    return compiler.short_digest(*flags, *(part for file in files for part in (file.name, file.read_bytes())))


def compiled(target: str) -> tuple[Path, str]:
    """The library for cards of a target (sm_90), and the compiler's name; compiled now if need be.

    Raises one of `compiler.FAILURES`: no nvcc, or it fails, or nothing can be written.
    """
    flags = [*FLAGS, f"-arch={target}"]
    what = f"the kernels for {target}"
    return compiler.compiled(f"cuda-{target}-{name(*flags)}", flags, sources(), what, compiler.nvcc)


def target(device: torch.device) -> str:
    """What nvcc calls a card. Raises OSError for one that our kernels are not for."""
    if torch.version.hip:
        raise OSError("they are for NVIDIA's cards")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise OSError(f"they are for cards since compute capability {OLDEST[0]}.{OLDEST[1]}")
    return "sm_{}{}".format(*capability)


def loaded(path: Path) -> ctypes.CDLL:
    """A library of these kernels. Raises OSError."""
    library = ctypes.CDLL(str(path))
    for operator in ("wkv7", "wkv7_chunks", "wkv6", "wkv6_chunks"):
        for floats in ("kept", "room"):
            getattr(library, f"{operator}_{floats}").restype = ctypes.c_int64
    for floats in ("mix_sums", "lean_sums", "heads_sums", "step7_room"):
        getattr(library, floats).restype = ctypes.c_int64
    return library


@cache
def at_hand(device: torch.device) -> tuple[ctypes.CDLL | None, str]:
    """The kernels of a device, or None; and the compiler's name, or why there are none."""
    if device.type != "cuda":
        return None, "they are for NVIDIA's cards"
    if compiler.turned_off():
        return None, "RWKVPIPE_KERNELS turns them off"
    try:
        path, said = compiled(target(device))
        library = loaded(path)
        if status := tried(library, device):
            raise OSError(f"CUDA error {status} at the first try, as of a driver older than nvcc")
        return library, said
    except compiler.FAILURES as error:
        return None, compiler.reason(error)


def computes(operator: str, *inputs: Tensor) -> bool:
    """Whether our kernels take these; the first time, a line says so, or what computes instead and why."""
    device, width = inputs[0].device, inputs[0].shape[-1]
    if device.type == "cpu" and at_hand(device)[0] is None:
        return False
    library, said = at_hand(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if library is not None and any(x.device != device or x.dtype not in KINDS for x in inputs):
        library, said = None, "they take fp32 and bf16"
    elif library is not None and width > WIDEST:
        library, said = None, f"they take heads of up to {WIDEST} channels"
    if library is None:
        _say(f"kernel: {operator} in PyTorch, by chunks, on {where} (our kernels: {said})")
    else:
        announce(operator, device)
    return library is not None


def announce(operator: str, device: torch.device) -> None:
    """Say once that our kernels compute something on a device."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    _say(f"kernel: {operator} by our kernels on {where} ({at_hand(device)[1]})")


def _say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        log.info("%s", line)


def halves(*tensors: Tensor | None) -> int:
    """A bit for each that is in bf16."""
    return sum((x is not None and x.dtype == torch.bfloat16) << n for n, x in enumerate(tensors))


def _sizes(inputs: Sequence[Tensor], *more: int) -> list[int]:
    """B T H N of the first, a bit for each that is in bf16, and what else a kernel asks for."""
    return [*inputs[0].shape, halves(*inputs), *more]


def _array(sizes: Sequence[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(sizes))(*sizes)


def floats(function: str, sizes: Sequence[int], like: Tensor) -> Tensor:
    """As much fp32 memory as a kernel asks for."""
    count = getattr(at_hand(like.device)[0], function)(_array(sizes))
    return torch.empty(count, device=like.device, dtype=torch.float32)


def _started(library: ctypes.CDLL, function: str, sizes: Sequence[int], *given: takes.Given) -> int:
    """Start a kernel behind all that was started before; returns 0, or the card's error."""
    like, words = given[0], [build.word(x) for x in given]
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    with torch.cuda.device_of(like):
        return getattr(library, function)(_array(sizes), ctypes.c_int64(stream), *words)


def tried(library: ctypes.CDLL, device: torch.device) -> int:
    """What comes of a first, small kernel: 0, or the card's error."""
    x, S = torch.zeros(1, 1, 1, 8, device=device), torch.zeros(1, 1, 8, 8, device=device)
    return _started(library, "wkv7_forward", _sizes([x] * 6), *[x] * 6, S, torch.empty_like(x), S.clone(), None)


def call(function: str, sizes: Sequence[int], *given: takes.Given) -> None:
    """Start a kernel on tensors without gaps, lists of them, numbers. Raises RuntimeError where the card refuses, and
    TypeError or ValueError where they are not what it `takes`."""
    takes.check(function, sizes, given, takes.CARD, given[0].device)
    if status := _started(at_hand(given[0].device)[0], function, sizes, *given):
        raise RuntimeError(f"{function}: CUDA error {status}")


def way(operator: str, v: Tensor) -> tuple[str, int]:
    """Which kernel computes a recurrence (wkv7, wkv6) with these values, and into how many parts it divides a head.

    Tensor cores take 16 tokens at a time, to eleven bits; where they cannot, or need not, it goes token by token. A
    line of the log says which, the first time.
    """
    reason = against(v)
    if reason is None and v.is_cuda and (status := tiles_refused(v.device)):
        reason = f"CUDA error {status} at the first try of tensor cores"
    if v.shape[1] >= CHUNK:
        _say(f"kernel: {operator} " + (f"token by token: {reason}" if reason else "on tensor cores"))
    return (operator, 1) if reason else (f"{operator}_chunks", _parts(operator, v))


@contextmanager
def roughly(rough: bool) -> Iterator[None]:
    """Inside, fp32 may be multiplied to eleven bits: it is of matrices that have fewer anyway."""
    before = _rough.set(rough or _rough.get())
    try:
        yield
    finally:
        _rough.reset(before)


@contextmanager
def over_states() -> Iterator[None]:
    """Inside, what reads few tokens may write the state after them over the one before, where nothing is learnt."""
    before = _over.set(True)
    try:
        yield
    finally:
        _over.reset(before)


def against(v: Tensor) -> str | None:
    """Why values do not go to tensor cores, or None where they do."""
    if v.shape[-1] != TILED:
        return f"tensor cores take heads of {TILED} channels, not {v.shape[-1]}"
    if v.is_cuda and torch.cuda.get_device_capability(v.device) < TENSOR_CORES:
        return f"tensor cores of eleven bits came with compute capability {TENSOR_CORES[0]}.{TENSOR_CORES[1]}"
    rough = v.dtype == torch.bfloat16 or _rough.get()
    if not rough and torch.get_float32_matmul_precision() == "highest":
        return "fp32 is to be multiplied as it is (torch.set_float32_matmul_precision)"
    return f"rows of fewer than {CHUNK} tokens" if v.shape[1] < CHUNK else None


@cache
def tiles_refused(device: torch.device) -> int:
    """What comes of first, small kernels on tensor cores: 0, or the card's error."""
    library = at_hand(device)[0]
    x, S = torch.zeros(1, CHUNK, 1, TILED, device=device), torch.zeros(1, 1, TILED, TILED, device=device)
    for operator, inputs, more in (("wkv7_chunks", [x] * 6, ()), ("wkv6_chunks", [*[x] * 4, x[0, 0]], (0,))):
        sizes = [*x.shape, 0, *more, _parts(operator.removesuffix("_chunks"), x)]
        kept, room = (floats(f"{operator}_{name}", sizes, x) for name in ("kept", "room"))
        found = [x.new_empty(sizes[-1], *each.shape) for each in (*inputs, S)]
        given = (*inputs, S, torch.empty_like(x), torch.empty_like(S), kept)
        status = _started(library, f"{operator}_forward", sizes, *given)
        status = status or _started(library, f"{operator}_backward", sizes, *inputs, kept, x, S, *found, room)
        if status:
            return status
    return 0


def _parts(operator: str, v: Tensor) -> int:
    """Into how many parts a head is divided, so that few heads keep all of a card busy."""
    if not v.is_cuda:
        return 1
    card = torch.cuda.get_device_properties(v.device)
    least = 1 if getattr(card, "shared_memory_per_block_optin", 0) >= SHARED[operator] else 2
    heads = v.shape[0] * v.shape[2]
    return next((parts for parts in (1, 2) if parts >= least and heads * parts >= card.multi_processor_count), 4)


def _gradient(x: Tensor, parts: int) -> Tensor:
    """Room for a gradient; where heads are divided, in fp32 for that of each part."""
    return torch.empty_like(x) if parts == 1 else torch.empty((parts, *x.shape), device=x.device, dtype=torch.float32)


def _added(found: Tensor, x: Tensor, parts: int) -> Tensor:
    """A gradient out of those of all parts."""
    return found if parts == 1 else found.sum(0).to(x.dtype)


def _forward(ctx, name: str, tracked: bool, inputs: Sequence[Tensor], *more: int) -> tuple[Tensor, Tensor]:
    """y and the state after the last token; `ctx` gets what a backward needs, `more` are the operator's own sizes."""
    inputs = [x.contiguous() for x in inputs]
    v, S = inputs[3], inputs[-1]
    ctx.operator, ctx.parts = way(name, v)
    ctx.sizes = _sizes(inputs[:-1], *more, ctx.parts)
    over = _over.get() and not tracked and ctx.operator == name  # token by token a thread writes what it has read
    y, after, kept = torch.empty_like(v), S if over else torch.empty_like(S), None
    if tracked:
        kept = floats(f"{ctx.operator}_kept", ctx.sizes, v)
        ctx.save_for_backward(*inputs[:-1], kept)
    call(f"{ctx.operator}_forward", ctx.sizes, *inputs, y, after, kept)
    return y, after


class Wkv7(torch.autograd.Function):
    """`cuda/wkv7_chunks.cu` or `cuda/wkv7.cu`, as `way` says; a state in 64 is kept for the backward."""

    @staticmethod
    def forward(ctx, tracked, *inputs):
        return _forward(ctx, "wkv7", tracked, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        dS, kept = dS.contiguous(), ctx.saved_tensors  # asked for once: they may be computed again for it
        room, inputs = floats(f"{ctx.operator}_room", ctx.sizes, dS), (*kept[:6], dS)
        parts = [ctx.parts if n in DIVIDED else 1 for n in range(len(inputs))]
        found = [_gradient(x, count) for x, count in zip(inputs, parts, strict=True)]
        call(f"{ctx.operator}_backward", ctx.sizes, *kept, dy.contiguous(), dS, *found, room)
        return None, *map(_added, found, inputs, parts)


class Wkv6(torch.autograd.Function):
    """`cuda/wkv6_chunks.cu` or `cuda/wkv6.cu`, for RWKV-6 and, with a w of two dimensions, RWKV-5.2."""

    @staticmethod
    def forward(ctx, tracked, *inputs):
        return _forward(ctx, "wkv6", tracked, inputs, int(inputs[1].dim() == 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        kept = ctx.saved_tensors  # asked for once: they may be computed again for it
        r, w, k, v, u, _ = kept
        B, _, H, N, _, one_w, parts = ctx.sizes
        dr, dk = _gradient(r, parts), _gradient(k, parts)
        dv, dstart = torch.empty_like(v), torch.empty_like(dS)
        du = torch.empty((parts * B, H, N), device=r.device, dtype=torch.float32)  # of each row, and so is dw of one w
        dw = torch.empty_like(du) if one_w else _gradient(w, parts)
        room = floats(f"{ctx.operator}_room", ctx.sizes, dS)
        found = (dr, dw, dk, dv, du, dstart)
        call(f"{ctx.operator}_backward", ctx.sizes, *kept, dy.contiguous(), dS.contiguous(), *found, room)
        dw = dw.sum(0).to(w.dtype) if one_w else _added(dw, w, parts)
        return None, _added(dr, r, parts), dw, _added(dk, k, parts), dv, du.sum(0).to(u.dtype), dstart
