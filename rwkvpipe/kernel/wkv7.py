"""The recurrence of RWKV-7: a plain loop that says what it is, and a form by chunks, with its own backward.

    d_t = exp(-exp(w_t));  u_t = S_{t-1} a_t;  S_t = S_{t-1} diag(d_t) + u_t b_t^T + v_t k_t^T;  y_t = S_t r_t

All of r w k v a b are (B, T, H, N): batch, time, heads, width of a head. The state S is (B, H, N, N), [value, key].

Inside a chunk the recurrence is a few matrix products (the WY form). With c_t the sum of the log decays up to t, token
s reaches token t with the factor exp(c_t - c_s), which is split at the middle m of the chunk into exp(c_t - c_m) and
exp(c_m - c_s). Neither half can overflow, because the chunk is made the shorter the faster the state decays.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvpipe.kernel import build

LONGEST = 16  # tokens in a chunk; measured, 32 saves a tenth on long rows and wastes more on short ones
STEEPEST = 36.0  # a log decay below its negative counts as this: exp(-36) is 2e-16 of the state
WIDEST = 40.0  # largest exponent of a half factor


def wkv7_reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, in the arithmetic of its inputs; returns y (B, T, H, N) and the last state."""
    S = _start(r, state).to(r.dtype)
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
    """The same by chunks, for any length, decay and state; returns y in the dtype of v, and the state.

    Computed in fp32 (fp64 for fp64 inputs), as the state has to be. A token with w = -inf and k = b = 0 leaves the
    state as it is.
    """
    wide = torch.float64 if r.dtype == torch.float64 else torch.float32
    S = _start(r, state).to(wide)
    if r.shape[1] == 0:
        return torch.zeros_like(v), S
    build.announce("wkv7", r.device.type)
    inputs = [x.to(wide) for x in (r, w, k, v, a, b)]
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, S))
    with torch.autocast(r.device.type, enabled=False):
        y, S = _step(*inputs, S) if r.shape[1] == 1 and not tracked else _Chunked.apply(*inputs, S)
    return y.to(v.dtype), S


def _start(r: Tensor, state: Tensor | None) -> Tensor:
    B, _, H, N = r.shape
    if state is None:
        return torch.zeros(B, H, N, N, device=r.device)
    if state.shape != (B, H, N, N):
        raise ValueError(f"state is {tuple(state.shape)}, the inputs need {(B, H, N, N)}")
    return state


def _step(r, w, k, v, a, b, S):
    """One token."""
    r, w, k, v, a, b = (x[:, 0] for x in (r, w, k, v, a, b))
    u = S @ a[..., None]
    S = torch.addcmul(S * torch.exp(-torch.exp(w))[..., None, :], u, b[..., None, :])
    S = S.addcmul_(v[..., None], k[..., None, :])
    return (S @ r[..., None])[..., 0][:, None], S


@dataclass
class _Chunks:
    """What forward and backward share. Every tensor is (chunks, B H, ., .)."""

    ar: Tensor
    """a, then r (2C rows), times their half factors."""
    bk: Tensor
    """b, then k (2C rows), times theirs."""
    near: Tensor
    """exp(c_t - c_m), what r was multiplied by."""
    before: Tensor
    """exp(c_{t-1} - c_m), a's."""
    far: Tensor
    """exp(c_m - c_t), k's and b's."""
    log_decay: Tensor
    first: Tensor
    """exp(c_m): what the state entering a chunk is multiplied by to meet them (1 row)."""
    last: Tensor
    """exp(c_C - c_m): what the state is multiplied by to leave it (1 row)."""


def _length(w: Tensor) -> int:
    """Tokens in a chunk: a power of two, short enough for the half factors of these decays, no longer than needed."""
    steepest = float(w.max().exp().clamp(max=STEEPEST))
    size = LONGEST
    while size > 2 and size / 2 * steepest > WIDEST:
        size //= 2
    while size > 2 and size // 2 >= w.shape[1]:
        size //= 2
    return size


def _cut(x: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """(B, T, H, N) as (chunks, B H, size, N), the last chunk filled up."""
    B, T, H, N = x.shape
    if T % size:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, size - T % size), value=fill)
    return x.reshape(B, -1, size, H, N).permute(1, 0, 3, 2, 4).reshape(-1, B * H, size, N)


def _join(x: Tensor, B: int, T: int) -> Tensor:
    """The way back."""
    chunks, BH, size, N = x.shape
    return x.view(chunks, B, BH // B, size, N).permute(1, 0, 3, 2, 4).reshape(B, chunks * size, BH // B, N)[:, :T]


def _scaled(r, w, k, a, b, size: int) -> _Chunks:
    r, k, a, b = (_cut(x, size) for x in (r, k, a, b))
    log_decay = -_cut(w, size, -torch.inf).exp().clamp_(max=STEEPEST)
    c = log_decay.cumsum(-2)
    middle = c[..., size // 2 - 1 : size // 2, :]
    from_middle = c - middle
    near, far = from_middle.exp(), from_middle.neg().exp_()
    before = (from_middle - log_decay).exp_()
    ar, bk = torch.cat((a * before, r * near), -2), torch.cat((b * far, k * far), -2)
    return _Chunks(ar, bk, near, before, far, log_decay, middle.exp(), near[..., -1:, :])


def _causal(size: int, device: torch.device) -> Tensor:
    """(2C, 2C): a sees what came before it (the state before its token), r what came until it."""
    lower = torch.ones(size, size, dtype=torch.bool, device=device).tril()
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
    @staticmethod
    def forward(ctx, r, w, k, v, a, b, S):
        B, T, H, N = r.shape
        size = _length(w)
        at = _scaled(r, w, k, a, b, size)
        A = torch.where(_causal(size, r.device), at.ar @ at.bk.mT, 0)
        M = _unit_inverse(A[..., :size, :size])
        V = _cut(v, size)
        W = M @ at.ar[..., :size, :]
        U0 = M @ (A[..., :size, size:] @ V)
        UV = torch.cat((U0, V), -2)
        states = torch.empty(len(UV), B * H, N, N, dtype=r.dtype, device=r.device)
        S = S.reshape(B * H, N, N)
        for i in range(len(UV)):
            torch.mul(S, at.first[i], out=states[i])
            UV[i, :, :size].baddbmm_(W[i], states[i].mT)
            S = torch.baddbmm(states[i], UV[i].mT, at.bk[i]).mul_(at.last[i])
        Y = at.ar[..., size:, :] @ states.mT + A[..., size:, :] @ UV
        ctx.save_for_backward(r, w, k, a, b, A, M, W, UV, states)
        ctx.size = size
        return _join(Y, B, T), S.view(B, H, N, N)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dS):
        with torch.autocast(dy.device.type, enabled=False):
            return _Chunked._gradients(ctx, dy, dS)

    @staticmethod
    def _gradients(ctx, dy, dS):
        r, w, k, a, b, A, M, W, UV, states = ctx.saved_tensors
        B, T, H, N = r.shape
        size = ctx.size
        at = _scaled(r, w, k, a, b, size)
        dY = _cut(dy, size)
        dUV = A[..., size:, :].mT @ dY
        grads = dY.mT @ at.ar[..., size:, :]  # of `states`, from y; below, of the states that leave the chunks
        G = dS.reshape(B * H, N, N)
        for i in reversed(range(len(UV))):
            leaving = G * at.last[i]
            dUV[i].baddbmm_(at.bk[i], leaving.mT)
            G = torch.baddbmm(grads[i], dUV[i, :, :size].mT, W[i]).add_(leaving).mul_(at.first[i])
            grads[i] = leaving
        Z = M.mT @ dUV[..., :size, :]
        dV = dUV[..., size:, :] + A[..., :size, size:].mT @ Z
        ZdY = torch.cat((Z, dY), -2)
        dA = torch.where(_causal(size, r.device), ZdY @ UV.mT, 0)
        d_ar = dA @ at.bk + ZdY @ states
        from_state = UV @ grads
        d_bk = dA.mT @ at.ar + from_state
        dw = _decay_gradient(at, d_ar, d_bk, (at.bk * from_state).sum(-2) + (states * grads).sum(-2))
        da, dr = d_ar[..., :size, :] * at.before, d_ar[..., size:, :] * at.near
        db, dk = d_bk[..., :size, :] * at.far, d_bk[..., size:, :] * at.far
        found = [_join(x, B, T) for x in (dr, dw, dk, dV, da, db)]
        return (*found, G.view(B, H, N, N))


def _decay_gradient(at: _Chunks, d_ar: Tensor, d_bk: Tensor, at_end: Tensor) -> Tensor:
    """dw from what c_t moves: r_t, a_{t+1}, b_t, k_t and, for the last t, the state that leaves the chunk."""
    size = at.near.shape[-2]
    a_part, r_part = (d_ar * at.ar).split(size, -2)
    b_part, k_part = (d_bk * at.bk).split(size, -2)
    moved = r_part - b_part - k_part
    moved[..., :-1, :] += a_part[..., 1:, :]
    moved[..., -1, :] += at_end
    return moved.flip(-2).cumsum(-2).flip(-2) * at.log_decay
