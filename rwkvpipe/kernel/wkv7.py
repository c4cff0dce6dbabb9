"""The recurrence of RWKV-7: a plain loop that says what it is, a native form, and one by chunks in PyTorch.

    d_t = exp(-exp(w_t));  u_t = S_{t-1} a_t;  S_t = S_{t-1} diag(d_t) + u_t b_t^T + v_t k_t^T;  y_t = S_t r_t

All of r w k v a b are (B, T, H, N): batch, time, heads, width of a head. The state S is (B, H, N, N), [value, key].

Inside a chunk the recurrence is a few matrix products (the WY form). With c_t the sum of the log decays up to t, token
s reaches token t with the factor exp(c_t - c_s), which is split at the middle m of the chunk into exp(c_t - c_m) and
exp(c_m - c_s). Neither half can overflow, because the chunk is made the shorter the faster the state decays.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpipe.kernel import build, gpu
from rwkvpipe.kernel.form import computed, start

LONGEST = 16  # tokens in a chunk; measured, 32 saves a tenth on long rows and wastes more on short ones
STEEPEST = 36.0  # a log decay below its negative counts as this: exp(-36) is 2e-16 of the state
WIDEST = 40.0  # largest exponent of a half factor


def wkv7_reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, in the arithmetic of its inputs; returns y (B, T, H, N) and the last state."""
    S = start(r, state).to(r.dtype)
    d = torch.exp(-torch.exp(w))
    y = []
    for t in range(r.shape[1]):
        u = S @ a[:, t, :, :, None]
        S = S * d[:, t, :, None, :] + u * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        y.append((S @ r[:, t, :, :, None])[..., 0])
    return torch.stack(y, 1) if y else torch.zeros_like(r), S


def wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same, natively or by chunks, for any length, decay and state; returns y in the dtype of v, and the state.

    Computed in fp32 (fp64 for fp64 inputs), as the state has to be. A token with w = -inf and k = b = 0 leaves the
    state as it is.
    """
    return computed("wkv7", FORMS, (r, w, k, v, a, b), state)


class _Native(torch.autograd.Function):
    """`cuda/wkv7_cpu.cpp`: with a state in 32 and every u kept for the backward, which takes four tokens at a time."""

    @staticmethod
    def forward(ctx, tracked, *inputs):
        inputs = [x.contiguous() for x in inputs]
        ctx.sizes, y, S, kept = inputs[0].shape, torch.empty_like(inputs[0]), torch.empty_like(inputs[-1]), (None, None)
        if tracked:
            kept = y.new_empty(build.extension().wkv7_kept(*map(build.whole, ctx.sizes))), torch.empty_like(y)
            ctx.save_for_backward(*inputs[:-1], *kept)
        build.call("wkv7_forward", ctx.sizes, *inputs, y, S, *kept)
        return y, S

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        dS, kept = dS.contiguous(), ctx.saved_tensors  # asked for once: they may be computed again for it
        found = [torch.empty_like(x) for x in (*kept[:6], dS)]
        build.call("wkv7_backward", ctx.sizes, *kept, dy.contiguous(), dS, *found)
        return None, *found


def _step(r, w, k, v, a, b, S):
    """One token."""
    r, w, k, v, a, b = (x[:, 0] for x in (r, w, k, v, a, b))
    u = S @ a[..., None]
    S = torch.addcmul(S * torch.exp(-torch.exp(w))[..., None, :], u, b[..., None, :])
    S = S.addcmul_(v[..., None], k[..., None, :])
    return (S @ r[..., None])[..., 0][:, None], S


def _length(w: Tensor) -> int:
    """Tokens in a chunk: a power of two, short enough for the half factors of these decays, no longer than needed."""
    steepest = float(w.max().exp().clamp(max=STEEPEST))
    size = LONGEST
    while size > 2 and size / 2 * steepest > WIDEST:
        size //= 2
    while size > 2 and size // 2 >= w.shape[1]:
        size //= 2
    return size


def _fill(x: Tensor, size: int, value: float = 0.0) -> Tensor:
    """(B, T, H, N) as (B, chunks, size, H, N), the last chunk filled up."""
    if x.shape[1] % size:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, size - x.shape[1] % size), value=value)
    return x.unflatten(1, (-1, size))


def _chunked(like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """An empty (chunks, B H, rows, N), chunk after chunk, and its view as (B, chunks, rows, H, N)."""
    B, chunks, _, H, N = like.shape
    x = like.new_empty(chunks, B * H, rows, N)
    return x, x.view(chunks, B, H, rows, N).permute(1, 0, 3, 2, 4)


def _unchunked(x: Tensor, B: int) -> Tensor:
    """(chunks, B H, size, N) seen as (B, chunks, size, H, N)."""
    return x.unflatten(1, (B, -1)).permute(1, 0, 3, 2, 4)


def _half_factors(w: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """near = exp(c_t - c_m) (B, chunks, size, H, N); first = exp(c_m), (B, chunks, H, N); and the log decays."""
    log_decay = _fill(w, size, -torch.inf).exp().clamp_(max=STEEPEST).neg_()
    c = log_decay.cumsum(2)
    middle = c[:, :, size // 2 - 1].clone()
    return c.sub_(middle[:, :, None]).exp_(), middle.exp_(), log_decay


def _by_before(x: Tensor, near: Tensor, first: Tensor, out: Tensor) -> None:
    """x_t exp(c_{t-1} - c_m): the factor of the token before, which for the first one is 1 / first."""
    torch.mul(x[:, :, 1:], near[:, :, :-1], out=out[:, :, 1:])
    torch.div(x[:, :, 0], first, out=out[:, :, 0])


def _columns(x: Tensor) -> Tensor:
    """(B, chunks, H, N) as factors of the rows of transposed states, (chunks, B H, N, 1)."""
    return x.permute(1, 0, 2, 3).reshape(x.shape[1], -1, x.shape[3], 1)


def _causal(size: int, like: Tensor) -> Tensor:
    """(2C, 2C) of 0 and 1: a sees what came before it (the state before its token), r what came until it."""
    lower = torch.ones(size, size, dtype=like.dtype, device=like.device).tril_()
    return torch.cat((lower.tril(-1).repeat(1, 2), lower.repeat(1, 2)))


def _unit_inverse(A: Tensor) -> Tensor:
    """(I - A)^-1 for strictly lower triangular A (..., C, C), C a power of two: of halves, then of their joins."""
    C = A.shape[-1]
    M = torch.eye(C, dtype=A.dtype, device=A.device).expand_as(A).clone()
    half = 1
    while half < C:
        blocks = A.unflatten(-1, (-1, 2 * half)).unflatten(-3, (-1, 2 * half)).diagonal(0, -4, -2).movedim(-1, -3)
        done = M.unflatten(-1, (-1, 2 * half)).unflatten(-3, (-1, 2 * half)).diagonal(0, -4, -2).movedim(-1, -3)
        lower = done[..., half:, half:] @ blocks[..., half:, :half] @ done[..., :half, :half]
        done[..., half:, :half] = lower
        half *= 2
    return M


class _Chunked(torch.autograd.Function):
    """Matrices are (chunks, B H, ., .). States are kept transposed, [key, value]: then hardly a product needs its
    second factor transposed, which libraries do at half speed.

    With ~ for "times its half factor" and f_i = last_i first_{i+1}, chunk i takes the state P_i to
    P_{i+1} = f_i (P_i + b~^T U_i + k~^T V_i), where U_i = M (a~ P_i + A_ak V_i) holds the u of its tokens.
    """

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, S):
        B, T, H, N = r.shape
        size = _length(w)
        near, first, log_decay = _half_factors(w, size)
        ar, at = _chunked(near, 2 * size)
        _by_before(_fill(a, size), near, first, at[:, :, :size])
        torch.mul(_fill(r, size), near, out=at[:, :, size:])
        bk, at = _chunked(near, 2 * size)
        torch.div(_fill(b, size), near, out=at[:, :, :size])
        torch.div(_fill(k, size), near, out=at[:, :, size:])
        V, at = _chunked(near, size)
        at.copy_(_fill(v, size))
        A = (ar @ bk.mT).mul_(_causal(size, ar))
        M = _unit_inverse(A[..., :size, :size])
        W = M @ ar[..., :size, :]
        U = M @ (A[..., :size, size:] @ V)
        passed = _columns(torch.cat((first[:, 1:], torch.ones_like(first[:, :1])), 1).mul_(near[:, :, -1]))
        states = torch.empty(len(U) + 1, B * H, N, N, dtype=r.dtype, device=r.device)
        torch.mul(S.reshape(B * H, N, N).mT, _columns(first[:, :1])[0], out=states[0])
        written = bk[..., size:, :].mT @ V
        for i in range(len(U)):
            U[i].baddbmm_(W[i], states[i])
            written[i].baddbmm_(bk[i, :, :size].mT, U[i]).add_(states[i])
            torch.mul(written[i], passed[i], out=states[i + 1])
        UV = torch.cat((U, V), -2)
        Y = A[..., size:, :] @ UV
        Y += ar[..., size:, :] @ states[:-1]
        ctx.save_for_backward(r, k, a, b, near, first, log_decay, ar, bk, A, M, W, UV, states, passed)
        return _unchunked(Y, B).flatten(1, 2)[:, :T], states[-1].mT.reshape(B, H, N, N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        with torch.autocast(dy.device.type, enabled=False):
            return _Chunked._gradients(ctx, dy, dS)

    @staticmethod
    def _gradients(ctx, dy, dS):
        r, k, a, b, near, first, log_decay, ar, bk, A, M, W, UV, states, passed = ctx.saved_tensors
        B, _, size, H, N = near.shape
        dY, at = _chunked(near, size)
        at.copy_(_fill(dy, size))
        dU = A[..., size:, :size].mT @ dY
        grads = ar[..., size:, :].mT @ dY  # of each P_i, from y; below, of P_{i+1}, times f_i
        G = dS.reshape(B * H, N, N).mT
        for i in reversed(range(len(dU))):
            leaving = G * passed[i]
            dU[i].baddbmm_(bk[i, :, :size], leaving)
            G = torch.baddbmm(grads[i], W[i].mT, dU[i]).add_(leaving)
            grads[i] = leaving
        Z = M.mT @ dU
        ZdY = torch.cat((Z, dY), -2)
        dV = A[..., size:].mT @ ZdY
        dV += bk[..., size:, :] @ grads
        dA = (ZdY @ UV.mT).mul_(_causal(size, ar))
        d_ar = dA @ bk
        d_ar += ZdY @ states[:-1].mT
        d_bk = UV @ grads.mT
        at_end = (bk * d_bk).sum(-2).add_((states[:-1] * grads).sum(-1))
        d_bk += dA.mT @ ar
        a, r, b, k = (_fill(x, size) for x in (a, r, b, k))
        da, dr, db, dk = (torch.empty_like(near) for _ in range(4))
        d_ar, d_bk = _unchunked(d_ar, B), _unchunked(d_bk, B)
        _by_before(d_ar[:, :, :size], near, first, da)
        torch.mul(d_ar[:, :, size:], near, out=dr)
        torch.div(d_bk[:, :, :size], near, out=db)
        torch.div(d_bk[:, :, size:], near, out=dk)
        # what c_t moves: r_t, a_{t+1}, b_t, k_t and, for the last t, the state that leaves the chunk
        moved = (dr * r).addcmul_(db, b, value=-1).addcmul_(dk, k, value=-1)
        moved[:, :, :-1].addcmul_(da[:, :, 1:], a[:, :, 1:])
        moved[:, :, -1] += at_end.unflatten(1, (B, H)).transpose(0, 1)
        dw = moved.flip(2).cumsum(2).flip(2).mul_(log_decay)
        found = (x.flatten(1, 2)[:, : dy.shape[1]] for x in (dr, dw, dk, _unchunked(dV, B), da, db))
        return *found, (G * _columns(first[:, :1])[0]).mT.reshape(B, H, N, N)


FORMS = (gpu.Wkv7.apply, _Native.apply, _Chunked.apply, _step)
