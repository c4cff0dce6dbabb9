"""The parts of a block of RWKV-7, each as one operation that keeps little for its backward, natively.

What element-wise passes make of what is kept (mixes, keys, gates, squares) is computed again in the backward: they cost
little time, and would be most of the memory that a step of training holds. Functions give None where the parts cannot
be computed so (no native code, adapters); kernel/blend.py has the passes one by one.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkvpipe.kernel import build, product
from rwkvpipe.kernel.blend import apart, mix_gradients, sums_of
from rwkvpipe.kernel.form import tracked
from rwkvpipe.kernel.passes import without_gaps
from rwkvpipe.kernel.product import exactly

ROOM = 1 << 24  # numbers of what no result is that a thread keeps room for, from call to call
_rooms = threading.local()


def fits(layers: Sequence[nn.Module], *inputs: Tensor) -> bool:
    """Whether plain layers and tensors can be computed as here."""
    if not inputs[0].numel() or build.native(*inputs) is None:
        return False
    return all(type(layer) is nn.Linear and build.native(layer.weight) for layer in layers)


def project(x: Tensor, last: Tensor, shares: Sequence[Tensor], matrices: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """Products of matrices (D, out) with `blend.mix(x, last, shares)`, each with the mix of its number.

    x (B, T, D), last (B, D), shares (1, 1, D); each product is (B, T, out).
    """
    which = tuple(number for number, _ in matrices)
    return list(_Project.apply(product.asked(), which, x, last, *shares, *(matrix for _, matrix in matrices)))


def recall(
    token: Sequence[Tensor], rows: Sequence[Tensor], norm: Sequence[Tensor], memory: Tensor, *, eps: float,
    lean: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence with what is before and after it: `blend.lean`, `prepare`, `wkv7` and `finish` in one.

    token: r, k, v and what low ranks say of decay, rate and gate, (B, T, D); rows: w0, a0, k_k, k_a; norm: r_k (H, N),
    weight and bias (D); lean: layer 0's values, how far to go there, and v0, or nothing. Returns (B, T, D) and the
    memory (B, H, N, N) after the last token.
    """
    build.announce("wkv7 and what surrounds it", "cpu", natively=True)
    inputs = (*token, *rows, *norm, memory, *lean)
    return _Recall.apply(tracked(*inputs), eps, *inputs)


def square_mix(x: Tensor, last: Tensor, share: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """value max(key mix, 0)^2 of the mix of x (B, T, D) with the token before; key (F, D), value (D, F)."""
    return _SquareMix.apply(product.asked(), x, last, share, key, value)


def _room(*shapes: torch.Size) -> list[Tensor]:
    """Tensors of these shapes that last until this thread's next call: without results among them, what is kept for a
    backward lies side by side, and when it goes leaves memory whole."""
    sizes = [shape.numel() for shape in shapes]
    kept = getattr(_rooms, "kept", None)
    if kept is None or kept.numel() < sum(sizes):
        with torch.inference_mode(False):
            kept = torch.empty(sum(sizes))
        if len(kept) <= ROOM:
            _rooms.kept = kept
    return [part.view(shape) for part, shape in zip(kept[: sum(sizes)].split(sizes), shapes, strict=True)]


def _mixes(x: Tensor, last: Tensor, shares: Sequence[Tensor]) -> list[Tensor]:
    """In the room."""
    out = _room(*[x.shape] * len(shares))
    build.call("mix_forward", (*x.shape, len(shares)), x, last, shares, out)
    return out


class _Project(torch.autograd.Function):
    @staticmethod
    @exactly
    def forward(ctx, how, which, x, last, *others):
        count = len(others) - len(which)
        matrices = others[count:]
        x, last, *shares = without_gaps((x, last, *others[:count]))
        ctx.save_for_backward(x, last, *shares, *matrices)
        ctx.how, ctx.which = how, which
        mixes = [how.take(mix) for mix in _mixes(x, last, shares)]
        return tuple(how.mm(mixes[number], how.take(matrix)) for number, matrix in zip(which, matrices, strict=True))

    @staticmethod
    @once_differentiable
    @exactly
    def backward(ctx, *grads):
        x, last, *others = ctx.saved_tensors
        how, count = ctx.how, len(others) - len(ctx.which)
        shares, matrices = others[:count], others[count:]
        mixes, found = _mixes(x, last, shares), []
        taken = [how.take(mix).flatten(0, 1) for mix in mixes]
        grads = [how.take(grad.flatten(0, 1)) for grad in grads]
        for number, grad in zip(ctx.which, grads, strict=True):
            wanted = ctx.needs_input_grad[4 + count + len(found)]
            found.append(how.mm(grad.mT, taken[number]).mT if wanted else None)
        begun: set[int] = set()
        for number, grad, matrix in zip(ctx.which, grads, matrices, strict=True):  # a mix makes room for its gradient
            how.put(mixes[number].flatten(0, 1), grad, how.take(matrix).mT, add=number in begun)
            begun.add(number)
        for number in set(range(count)) - begun:  # a mix that nothing reads
            mixes[number].zero_()
        return None, None, *mix_gradients(x, last, shares, mixes), *found


class _SquareMix(torch.autograd.Function):
    @staticmethod
    @exactly
    def forward(ctx, how, *inputs):
        x, last, share, key, value = without_gaps(inputs)
        z = how.mm(how.take(_mixes(x, last, [share])[0]), how.take(key).mT)
        ctx.how = how
        ctx.save_for_backward(x, last, share, key, value, z)
        return how.mm(how.take(_squares(z, *_room(z.shape))), how.take(value).mT)

    @staticmethod
    @once_differentiable
    @exactly
    def backward(ctx, grad):
        x, last, share, key, value, z = ctx.saved_tensors
        how, wanted = ctx.how, ctx.needs_input_grad[4:]
        squares, mix = _room(z.shape, x.shape)
        grad = how.take(grad.flatten(0, 1))
        dvalue = how.mm(grad.mT, how.take(_squares(z, squares).flatten(0, 1))) if wanted[1] else None
        dz = squares.flatten(0, 1)  # its place, now that it has been used
        how.put(dz, grad, how.take(value))
        build.call("square_backward", (z.numel(),), z, dz, dz)
        build.call("mix_forward", (*x.shape, 1), x, last, [share], [mix])
        dz, flat = how.take(dz), mix.flatten(0, 1)
        dkey = how.mm(dz.mT, how.take(flat)) if wanted[0] else None
        how.put(flat, dz, how.take(key))
        return None, *mix_gradients(x, last, [share], [mix]), dkey, dvalue


def _squares(z: Tensor, out: Tensor) -> Tensor:
    build.call("square_forward", (z.numel(),), z, out)
    return out


class _Recall(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tracked, eps, *inputs):
        inputs = without_gaps(inputs)
        r, k, v, decay, rate, gate, *rows = inputs[:10]
        norm, memory, lean = inputs[10:13], inputs[13], inputs[14:]
        (B, T, _), (H, N) = r.shape, norm[0].shape
        ctx.sizes, ctx.eps = (B, T, H, N), eps
        values, w, key, a, b = room = _room(*[r.shape] * 5)
        values = _leaned(v, lean, values)
        _prepare(ctx.sizes, (k, decay, rate, *rows), room[1:])
        y, S, kept = torch.empty_like(r), torch.empty_like(memory), (None, None)
        if tracked:
            kept = y.new_empty(build.extension().wkv7_kept(*map(build.whole, ctx.sizes))), torch.empty_like(y)
            ctx.save_for_backward(*inputs[:13], *lean, y, *kept)
        build.call("wkv7_forward", ctx.sizes, r, w, key, values, a, b, memory, y, S, *kept)
        out = torch.empty_like(r)
        build.call("finish_forward", (B * T, H, N), y, r, key, values, gate, *norm, eps, out)
        return out, S

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, dS):
        r, k, v, decay, rate, gate, *rest = ctx.saved_tensors
        rows, norm, lean, (y, *kept) = rest[:4], rest[4:7], rest[7:-3], rest[-3:]
        tokens = (ctx.sizes[0] * ctx.sizes[1], *ctx.sizes[2:])
        values, w, key, a, b, dy, dkey, dr2, dw, dkey2, dv2, da, db = room = _room(*[r.shape] * 13)
        values = _leaned(v, lean, values)
        _prepare(ctx.sizes, (k, decay, rate, *rows), room[1:5])
        dr, dv, dgate = (torch.empty_like(r) for _ in range(3))
        dnorm, drows, dstart = sums_of(tokens[0], *norm), sums_of(tokens[0], *rows), torch.empty_like(dS)
        given = (y, r, key, values, gate, *norm, ctx.eps, grad.contiguous())
        build.call("finish_backward", tokens, *given, dy, dr, dkey, dv, dgate, *dnorm)
        given = (r, w, key, values, a, b, *kept, dy, dS.contiguous())
        build.call("wkv7_backward", ctx.sizes, *given, dr2, dw, dkey2, dv2, da, db, dstart)
        dr.add_(dr2), dkey.add_(dkey2), dv.add_(dv2)
        dk, ddecay, drate = (torch.empty_like(r) for _ in range(3))
        build.call("prepare_backward", tokens, k, decay, rate, *rows, dw, dkey, da, db, dk, ddecay, drate, *drows)
        dv, dlean = _unleaned(v, lean, dv)
        found = (dr, dk, dv, ddecay, drate, dgate, *apart(drows[1], rows), *apart(dnorm[1], norm), dstart, *dlean)
        return None, None, *found


def _prepare(sizes: Sequence[int], inputs: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """w, k, a and b of the recurrence, (B, T, D)."""
    build.call("prepare_forward", (sizes[0] * sizes[1], *sizes[2:]), *inputs, *out)


def _leaned(v: Tensor, lean: Sequence[Tensor], out: Tensor) -> Tensor:
    if not lean:
        return v
    build.call("lean_forward", (v.shape[0] * v.shape[1], v.shape[2]), v, *lean, out)
    return out


def _unleaned(v: Tensor, lean: Sequence[Tensor], dv: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the values and of what they lean to."""
    if not lean:
        return dv, []
    found, sums = [torch.empty_like(v) for _ in range(3)], sums_of(v.shape[0] * v.shape[1], lean[2])
    build.call("lean_backward", (v.shape[0] * v.shape[1], v.shape[2]), v, *lean, dv, *found, *sums)
    return found[0], [*found[1:], *apart(sums[1], lean[2:])]
