"""The recurrence of RWKV-5.2: that of RWKV-6 with decays that are the same for all tokens and rows.

    d = exp(-exp(w));  y_t = S_{t-1} r_t + (r_t . u . k_t) v_t;  S_t = S_{t-1} diag(d) + v_t k_t^T

r k v are (B, T, H, N): batch, time, heads, width of a head; w and u are (H, N). The state S is (B, H, N, N),
[value, key].
"""

from torch import Tensor

from rwkvpipe.kernel.form import computed
from rwkvpipe.kernel.wkv6 import FORMS, wkv6_reference


def wkv5_reference(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, in the arithmetic of its inputs; returns y (B, T, H, N) and the last state."""
    return wkv6_reference(r, w.expand_as(r), k, v, u, state)


def wkv5(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same, natively or by chunks, for any length, decay and state; returns y in the dtype of v, and the state.

    Computed in fp32 (fp64 for fp64 inputs), as the state has to be.
    """
    return computed("wkv5", FORMS, (r, w, k, v, u), state)
