"""Matrices in bytes: what native decoding reads, and what adapters are trained beside."""

import torch
from torch import Tensor


def to_int8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) in int8, and the scale (out,) of each row, whose largest number becomes 127."""
    scale = matrix.abs().amax(1).clamp(min=1e-30) / 127
    return (matrix / scale[:, None]).round().to(torch.int8), scale


def from_int8(data: Tensor, scale: Tensor) -> Tensor:
    """The rounded matrix, in fp32."""
    return data.float().mul_(scale[:, None])
