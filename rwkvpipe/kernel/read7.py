"""Texts through all layers of an RWKV-7 whose matrices lie in panels, in one native call (`cuda/read7_cpu.cpp`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkvpipe.kernel import build
from rwkvpipe.kernel.panels import Panels, lies


def read7(
    x: Tensor,
    vectors: Sequence[Sequence[Tensor | None]],
    matrices: Sequence[Sequence[Panels | None]],
    state: Sequence[Sequence[Tensor]],
    lengths: Tensor | None,
) -> None:
    """The stream x (B, T, D) and the state (inputs of time mixes, memories, inputs of channel mixes; of each layer)
    become those after all layers, whose vectors and matrices are in the order of read7_cpu.cpp.

    Of each row `lengths` (B,) tokens are read; None is all. What layer 0 lacks is None.
    """
    (B, T, D), H, L = x.shape, state[1][0].shape[1], len(vectors)
    ranks = [matrices[-1][n].out for n in (4, 6, 8, 10)]
    sizes = (B, T, L, D, H, matrices[0][12].out, *ranks)
    rows = [None if row is None else row.contiguous() for layer in vectors for row in layer]
    data, scales = ([None if p is None else p[n] for layer in matrices for p in layer] for n in (0, 1))
    kinds = torch.tensor([0 if p is None else lies(p.kind) for layer in matrices for p in layer])
    build.announce("reading", "cpu", natively=True)
    build.call("read7", sizes, lengths, build.words(rows), build.words(data), build.words(scales), kinds, *state, x)
