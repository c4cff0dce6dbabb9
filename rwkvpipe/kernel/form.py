"""Which form of a recurrence computes: a card's kernels, the native one, or one of PyTorch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rwkvpipe.kernel import build, gpu


def start(r: Tensor, state: Tensor | None) -> Tensor:
    """The state to begin with: the given one, or zeros. Raises ValueError for one of another shape."""
    B, _, H, N = r.shape
    if state is None:
        return torch.zeros(B, H, N, N, device=r.device)
    if state.shape != (B, H, N, N):
        raise ValueError(f"state is {tuple(state.shape)}, the inputs need {(B, H, N, N)}")
    return state


def tracked(*inputs: Tensor) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def computed(
    operator: str, forms: Sequence[Callable], inputs: Sequence[Tensor], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y in the dtype of v, the fourth input, and the last state, by the best form there is.

    forms: a card's and the native one, which are told first whether a backward may follow; the one by chunks; the one
    of a single token that none follows.
    """
    card, native, chunks, step = forms
    r, v = inputs[0], inputs[3]
    wide = torch.float64 if r.dtype == torch.float64 else torch.float32
    S = start(r, state).to(wide)
    if r.numel() == 0:
        return torch.zeros_like(v), S
    learning = tracked(*inputs, S)
    if gpu.computes(operator, *inputs, S):
        return card(learning, *inputs, S)
    given = (*(x.to(wide) for x in inputs), S)
    natively = build.native(*given) is not None
    if r.device.type == "cpu":
        build.announce(f"{operator} and what surrounds it", r.device.type, natively=natively)
    if natively:
        y, S = native(learning, *given)
    else:
        with torch.autocast(r.device.type, enabled=False):
            y, S = (step if r.shape[1] == 1 and not learning else chunks)(*given)
    return y.to(v.dtype), S
