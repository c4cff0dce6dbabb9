"""The recurrence of RWKV-6: a plain loop that says what it is, a native form, and one by chunks in PyTorch.

    d_t = exp(-exp(w_t));  y_t = S_{t-1} r_t + (r_t . u . k_t) v_t;  S_t = S_{t-1} diag(d_t) + v_t k_t^T

r w k v are (B, T, H, N): batch, time, heads, width of a head; u, the bonus of a token for itself, is (H, N). The state
S is (B, H, N, N), [value, key], as in RWKV-7 and in `time_state`; RWKV-LM's kernels for 5 and 6 hold its transpose.

Decays may be anything down to 0, so token s reaches token t with a factor that is never split into a large and a
small half. A chunk is a tree of halves: what the second half of a node hears of its first half passes the border
between them, with the decays before t in the second half times those after s in the first. Both are exponentials of
sums of negative numbers: at most 1, and exactly 0 where all is forgotten. So are their gradients.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpipe.kernel import build, gpu
from rwkvpipe.kernel.form import computed, start

LONGEST = 32  # tokens in a chunk, a power of two; measured beside 16 and 64
STEEPEST = 1e4  # a log decay below its negative counts as this: nothing is left of the state in either case
LOOPED = 2  # halves up to this size are multiplied out: libraries take longer to start a product of so few


def wkv6_reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, in the arithmetic of its inputs; returns y (B, T, H, N) and the last state."""
    S = start(r, state).to(r.dtype)
    d = torch.exp(-torch.exp(w))
    y = []
    for t in range(r.shape[1]):
        own = (r[:, t] * u * k[:, t]).sum(-1, keepdim=True) * v[:, t]
        y.append((S @ r[:, t, :, :, None])[..., 0] + own)
        S = S * d[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
    return torch.stack(y, 1) if y else torch.zeros_like(r), S


def wkv6(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same, natively or by chunks, for any length, decay and state; returns y in the dtype of v, and the state.

    Computed in fp32 (fp64 for fp64 inputs), as the state has to be. A token with w = -inf and k = 0 leaves the state
    as it is.
    """
    return computed("wkv6", FORMS, (r, w, k, v, u), state)


class _Native(torch.autograd.Function):
    """`cuda/wkv6_cpu.cpp`: token by token, with a state in 32 kept for the backward."""

    @staticmethod
    def forward(ctx, tracked, *inputs):
        inputs = [x.contiguous() for x in inputs]
        r, w, S = inputs[0], inputs[1], inputs[-1]
        ctx.sizes, y, after, kept = (*r.shape, int(w.dim() == 2)), torch.empty_like(r), torch.empty_like(S), None
        if tracked:
            kept = y.new_empty(build.extension().wkv6_kept(*map(build.whole, r.shape)))
            ctx.save_for_backward(*inputs[:-1], kept)
        build.call("wkv6_forward", ctx.sizes, *inputs, y, after, kept)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        dS, kept = dS.contiguous(), ctx.saved_tensors  # asked for once: they may be computed again for it
        found = [torch.empty_like(x) for x in (*kept[:5], dS)]
        B, _, H, N, _ = ctx.sizes
        room = dy.new_empty(2 * B * H * N)
        build.call("wkv6_backward", ctx.sizes, *kept, dy.contiguous(), dS, *found, room)
        return None, *found


def _step(r, w, k, v, u, S):
    """One token."""
    r, w, k, v = (x[:, 0] if x.dim() == 4 else x for x in (r, w, k, v))
    y = (S @ r[..., None])[..., 0].addcmul((r * u * k).sum(-1, keepdim=True), v)
    return y[:, None], torch.addcmul(S * torch.exp(-torch.exp(w))[..., None, :], v[..., None], k[..., None, :])


def _length(T: int) -> int:
    """Tokens in a chunk: a power of two, no longer than needed."""
    size = LONGEST
    while size > 1 and size // 2 >= T:
        size //= 2
    return size


def _chunks(x: Tensor, size: int, value: float = 0.0) -> Tensor:
    """(B, T, H, N) as (chunks, B, H, size, N), the last chunk filled up; contiguous."""
    if x.shape[1] % size:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, size - x.shape[1] % size), value=value)
    return x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4).contiguous()


def _rows(x: Tensor, T: int) -> Tensor:
    """(chunks, B, H, size, N) as (B, T, H, N)."""
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """First and second halves of the tree's nodes: views (chunks, B, H, nodes, half, N) of (chunks, B, H, size, N)."""
    return x.unflatten(-2, (-1, 2, half)).unbind(-3)


def _corners(A: Tensor, half: int) -> Tensor:
    """What second halves hear of first ones: a view (chunks, B, H, nodes, half, half) of (chunks, B, H, size, size)."""
    nodes = A.unflatten(-1, (-1, 2 * half)).unflatten(-3, (-1, 2 * half))
    return nodes.diagonal(0, -4, -2).movedim(-1, -3)[..., half:, :half]


def _outer(R: Tensor, K: Tensor) -> Tensor:
    """R K^T of many small matrices (..., half, N)."""
    if R.shape[-2] <= LOOPED:
        return (R[..., :, None, :] * K[..., None, :, :]).sum(-1)
    return R @ K.mT


def _inner(A: Tensor, K: Tensor) -> Tensor:
    """A K of many small matrices (..., half, half) and (..., half, N)."""
    if K.shape[-2] <= LOOPED:
        return (A[..., None] * K[..., None, :, :]).sum(-2)
    return A @ K


def _tree(log_decay: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor, Tensor]:
    """Factors of log decays (chunks, B, H, size, N).

    For halves of 1, 2, 4, ...: of each first half what is left at its end, of each second half what came to it (both
    (chunks, B, H, nodes, half, N)); for the whole chunk before: what came to a token, after: what is left of it,
    over: what is left of the state.
    """
    before, after, over = torch.zeros_like(log_decay), torch.zeros_like(log_decay), log_decay
    factors = []
    half, size = 1, log_decay.shape[-2]
    while half < size:
        (_, second_before), (first_after, _) = _halves(before, half), _halves(after, half)
        factors.append((first_after.exp(), second_before.exp()))
        first, second = (x.unsqueeze(-2) for x in over.unflatten(-2, (-1, 2)).unbind(-2))
        second_before += first
        first_after += second
        over = (first + second).squeeze(-2)
        half *= 2
    return factors, before.exp_(), after.exp_(), over.squeeze(-2).exp()


class _Chunked(torch.autograd.Function):
    """Tensors are (chunks, B, H, size, .). States are kept transposed, [key, value]: products then need no transpose
    of their second factor, which libraries do at half speed.
    """

    @staticmethod
    def forward(ctx, r, w, k, v, u, S):
        T = r.shape[1]
        size = _length(T)
        r, k, v = (_chunks(x, size) for x in (r, k, v))
        log_decay = _chunks(w, size, -torch.inf).exp().clamp_(max=STEEPEST).neg_()
        factors, before, after, over = _tree(log_decay)
        u = u[:, None]  # (H, 1, N)
        A = r.new_zeros(*r.shape[:-1], size)
        A.diagonal(0, -2, -1).copy_((r * u * k).sum(-1))
        for level, (left, came) in enumerate(factors):
            k1, r2 = _halves(k, 2**level)[0], _halves(r, 2**level)[1]
            _corners(A, 2**level).copy_(_outer(r2 * came, k1 * left))
        states = r.new_empty(len(r) + 1, *S.shape)
        states[0] = S.mT
        written = (k * after).mT @ v
        for i in range(len(r)):
            torch.addcmul(written[i], states[i], over[i, ..., None], out=states[i + 1])
        y = A @ v
        y += (r * before) @ states[:-1]
        ctx.save_for_backward(r, k, v, u, log_decay, before, after, over, A, states, *(f for p in factors for f in p))
        ctx.length = T
        return _rows(y, T), states[-1].mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        with torch.autocast(dy.device.type, enabled=False):
            return _Chunked._gradients(ctx, dy, dS)

    @staticmethod
    def _gradients(ctx, dy, dS):
        r, k, v, u, log_decay, before, after, over, A, states, *factors = ctx.saved_tensors
        dY = _chunks(dy, r.shape[-2])
        reads = (r * before).mT @ dY  # of each state, from y; below, of the state after each chunk
        G = dS.mT
        for i in reversed(range(len(r))):
            G, reads[i] = torch.addcmul(reads[i], G, over[i, ..., None]), G
        at_end = (states[:-1] * reads).sum(-1).mul_(over)
        dA = dY @ v.mT
        dv = A.mT @ dY
        dv += (k * after) @ reads
        dr = (dY @ states[:-1].mT).mul_(before)
        dk = (v @ reads.mT).mul_(after)
        d_log = _tree_gradients(log_decay, factors, (r, k, dA), (dr, dk), at_end)
        own = dA.diagonal(0, -2, -1).unsqueeze(-1)
        du = (own * r * k).sum((0, 1, 3))
        dr.addcmul_(own, u * k)
        dk.addcmul_(own, u * r)
        T = ctx.length
        return _rows(dr, T), _rows(d_log.mul_(log_decay), T), _rows(dk, T), _rows(dv, T), du, G.mT


def _like(x: Tensor, log_decay: Tensor) -> Tensor:
    """Summed over the rows where all decay alike."""
    return x if x.shape[1] == log_decay.shape[1] else x.sum(1, keepdim=True)


def _tree_gradients(
    log_decay: Tensor, factors: list[Tensor], inputs: tuple, grads: tuple[Tensor, Tensor], at_end: Tensor
) -> Tensor:
    """Gradient of the log decays, from the top of the tree down; r and k get theirs from its nodes on the way.

    inputs: r, k and the gradient of A; grads: those of r and k, so far from the states alone; at_end: that of `over`.
    """
    (r, k, dA), (dr, dk) = inputs, grads
    d_before, d_after = _like(dr * r, log_decay), _like(dk * k, log_decay)
    d_over = _like(at_end, log_decay).unsqueeze(-2)  # (chunks, B, H, nodes, N)
    for level in reversed(range(len(factors) // 2)):
        half, (left, came) = 2**level, factors[2 * level : 2 * level + 2]
        (k1, _), (_, r2), d_corner = _halves(k, half), _halves(r, half), _corners(dA, half)
        (dk1, _), (_, dr2) = _halves(dk, half), _halves(dr, half)
        (d_after1, _), (_, d_before2) = _halves(d_after, half), _halves(d_before, half)
        d_over = torch.stack((d_over + d_before2.sum(-2), d_over + d_after1.sum(-2)), -2).flatten(-3, -2)
        gk = _inner(d_corner.mT, r2 * came).mul_(left)
        gr = _inner(d_corner, k1 * left).mul_(came)
        dk1 += gk
        dr2 += gr
        if level:
            d_after1 += _like(gk * k1, log_decay)
            d_before2 += _like(gr * r2, log_decay)
    return d_over


def _chunked(r, w, k, v, u, S):
    """For w (H, N), too, which costs next to nothing."""
    return _Chunked.apply(r, w if w.dim() == 4 else w.expand(1, r.shape[1], *w.shape), k, v, u, S)


FORMS = (gpu.Wkv6.apply, _Native.apply, _chunked, _step)
