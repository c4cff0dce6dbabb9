"""The operators on NVIDIA cards: `cuda/*.cu`, compiled by nvcc at first use for the card at hand, and kept.

Any card that nvcc still compiles for will do, from Volta on. On others (AMD's, Apple's), without nvcc, in fp64, and
for heads of more than WIDEST channels the form by chunks in PyTorch computes, and a line of the log says why.
"""

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpipe.base import compiler

log = logging.getLogger("rwkvpipe")

SOURCES = Path(__file__).resolve().parents[1] / "cuda"
TRACKED_FILES = ["../cuda/*.cu", "../cuda/*.cuh"]
FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC")
OLDEST = (7, 0)
WIDEST = 128
TENSOR_CORES = (8, 0)  # since when cards multiply matrices of eleven bits
CHUNK, TILED = 16, 64  # tokens that go through them together; channels of a head that goes through them
SHARED = 110_000  # bytes of shared memory that a head in one part takes at most; in two parts it takes 80,000
KINDS = (torch.float32, torch.bfloat16)
DIVIDED = (0, 1, 2, 4, 5)  # gradients of r w k a b come from each part of a head
_said: set[str] = set()


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
    for operator in ("wkv7", "wkv7_chunks", "wkv6"):
        for floats in ("kept", "room"):
            getattr(library, f"{operator}_{floats}").restype = ctypes.c_int64
    for sums in ("mix_sums", "lean_sums", "heads_sums"):
        getattr(library, sums).restype = ctypes.c_int64
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
    return torch.empty(getattr(at_hand(like.device)[0], function)(_array(sizes)), device=like.device)


Given = Tensor | Sequence[Tensor] | float | None


def _word(x: Given) -> ctypes.c_void_p | ctypes.Array | ctypes.c_float | None:
    if isinstance(x, float):
        return ctypes.c_float(x)
    if isinstance(x, Sequence):
        assert all(each.is_contiguous() for each in x)
        return (ctypes.c_void_p * len(x))(*(each.data_ptr() for each in x))
    assert x is None or x.is_contiguous()
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def _started(library: ctypes.CDLL, function: str, sizes: Sequence[int], *given: Given) -> int:
    """Start a kernel behind all that was started before; returns 0, or the card's error."""
    like, words = given[0], [_word(x) for x in given]
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    with torch.cuda.device_of(like):
        return getattr(library, function)(_array(sizes), ctypes.c_int64(stream), *words)


def tried(library: ctypes.CDLL, device: torch.device) -> int:
    """What comes of a first, small kernel: 0, or the card's error."""
    x, S = torch.zeros(1, 1, 1, 8, device=device), torch.zeros(1, 1, 8, 8, device=device)
    return _started(library, "wkv7_forward", _sizes([x] * 6), *[x] * 6, S, torch.empty_like(x), S.clone(), None)


def call(function: str, sizes: Sequence[int], *given: Given) -> None:
    """Start a kernel on tensors without gaps, lists of them, numbers. Raises RuntimeError where the card refuses."""
    if status := _started(at_hand(given[0].device)[0], function, sizes, *given):
        raise RuntimeError(f"{function}: CUDA error {status}")


def by_chunks(v: Tensor) -> bool:
    """Whether RWKV-7 goes to tensor cores: where factors of eleven bits will do, and there is enough to do for them."""
    rough = v.dtype == torch.bfloat16 or torch.get_float32_matmul_precision() != "highest"
    modern = not v.is_cuda or torch.cuda.get_device_capability(v.device) >= TENSOR_CORES
    return rough and modern and v.shape[1] >= CHUNK and v.shape[-1] == TILED


def _parts(v: Tensor) -> int:
    """Into how many parts a head is divided, so that few heads keep all of a card busy."""
    if not v.is_cuda:
        return 1
    card = torch.cuda.get_device_properties(v.device)
    least = 1 if getattr(card, "shared_memory_per_block_optin", 0) >= SHARED else 2
    heads = v.shape[0] * v.shape[2]
    return next((parts for parts in (1, 2) if parts >= least and heads * parts >= card.multi_processor_count), 4)


class Wkv7(torch.autograd.Function):
    """`cuda/wkv7_chunks.cu` where `by_chunks`, else `cuda/wkv7.cu`; a state in 64 is kept for the backward."""

    @staticmethod
    def forward(ctx, tracked, *inputs):
        inputs = [x.contiguous() for x in inputs]
        v, S = inputs[3], inputs[-1]
        ctx.operator, ctx.sizes = "wkv7", _sizes(inputs[:-1])
        if by_chunks(v):
            ctx.operator, ctx.sizes = "wkv7_chunks", _sizes(inputs[:-1], _parts(v))
        y, after, kept = torch.empty_like(v), torch.empty_like(S), None
        if tracked:
            kept = floats(f"{ctx.operator}_kept", ctx.sizes, v)
            ctx.save_for_backward(*inputs[:-1], kept)
        call(f"{ctx.operator}_forward", ctx.sizes, *inputs, y, after, kept)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        dS, inputs = dS.contiguous(), ctx.saved_tensors[:6]
        room = floats(f"{ctx.operator}_room", ctx.sizes, dS)
        parts = ctx.sizes[5] if ctx.operator == "wkv7_chunks" else 1
        found = [torch.empty_like(x) for x in (*inputs, dS)]
        if parts > 1:
            found = [
                torch.empty((parts, *x.shape), device=x.device) if n in DIVIDED else x for n, x in enumerate(found)
            ]
        call(f"{ctx.operator}_backward", ctx.sizes, *ctx.saved_tensors, dy.contiguous(), dS, *found, room)
        if parts > 1:
            found = [x.sum(0).to(inputs[n].dtype) if n in DIVIDED else x for n, x in enumerate(found)]
        return None, *found


class Wkv6(torch.autograd.Function):
    """`cuda/wkv6.cu`, for RWKV-6 and, with a w of two dimensions, RWKV-5.2."""

    @staticmethod
    def forward(ctx, tracked, *inputs):
        inputs = [x.contiguous() for x in inputs]
        w, v, S = inputs[1], inputs[3], inputs[-1]
        ctx.sizes = _sizes(inputs[:-1], int(w.dim() == 2))
        y, after, kept = torch.empty_like(v), torch.empty_like(S), None
        if tracked:
            kept = floats("wkv6_kept", ctx.sizes, v)
            ctx.save_for_backward(*inputs[:-1], kept)
        call("wkv6_forward", ctx.sizes, *inputs, y, after, kept)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        r, w, k, v, u, _ = ctx.saved_tensors
        B, _, H, N, _, one_w = ctx.sizes
        dr, dk, dv, dstart = (torch.empty_like(x) for x in (r, k, v, dS))
        du = torch.empty(B, H, N, device=r.device)
        dw = torch.empty_like(du if one_w else w)
        room = floats("wkv6_room", ctx.sizes, dS)
        found = (dr, dw, dk, dv, du, dstart)
        call("wkv6_backward", ctx.sizes, *ctx.saved_tensors, dy.contiguous(), dS.contiguous(), *found, room)
        if one_w:
            dw = dw.sum(0).to(w.dtype)
        return None, dr, dw, dk, dv, du.sum(0).to(u.dtype), dstart
