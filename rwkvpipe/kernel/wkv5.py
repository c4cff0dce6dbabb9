"""The recurrence of RWKV-5.2: that of RWKV-6 with decays that are the same for all tokens and rows.

    d = exp(-exp(w));  y_t = S_{t-1} r_t + (r_t . u . k_t) v_t;  S_t = S_{t-1} diag(d) + v_t k_t^T

r k v are (B, T, H, N): batch, time, heads, width of a head; w and u are (H, N). The state S is (B, H, N, N),
[value, key].
"""

import torch
from torch import Tensor

from rwkvpipe.kernel.form import computed, start
from rwkvpipe.kernel.wkv6 import FORMS


def wkv5_reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, in the arithmetic of its inputs; returns y (B, T, H, N) and the last state."""
    S = start(r, state).to(r.dtype)
    d = torch.exp(-torch.exp(w))
    y = []
    for t in range(r.shape[1]):
        own = (r[:, t] * u * k[:, t]).sum(-1, keepdim=True) * v[:, t]
        y.append((S @ r[:, t, :, :, None])[..., 0] + own)
        S = S * d[:, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
    return torch.stack(y, 1) if y else torch.zeros_like(r), S


def wkv5(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same, natively or by chunks, for any length, decay and state; returns y in the dtype of v, and the state.

    Computed in fp32 (fp64 for fp64 inputs), as the state has to be.
    """
    return computed("wkv5", FORMS, (r, w, k, v, u), state)
