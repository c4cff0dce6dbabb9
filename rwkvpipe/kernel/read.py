"""Texts through all layers of a model whose matrices lie in panels, in one native call (`cuda/read.h`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvpipe.kernel import build
from rwkvpipe.kernel.panels import Panels, lies


@dataclass(frozen=True)
class Form:
    """What a family's native function reads, in its order; matrices that a layer lacks are null."""

    function: str
    matrices: tuple[str, ...]
    sizes: tuple[str, ...]
    """Settings behind the number of heads; one without a name is 0."""


def read(
    function: str,
    sizes: Sequence[int],
    x: Tensor,
    weights: tuple[Sequence[Sequence[Tensor | None]], Sequence[Sequence[Panels | None]]],
    state: Sequence[Sequence[Tensor]],
    lengths: Tensor | None,
) -> None:
    """The stream x (B, T, D) and the state (inputs of time mixes, memories, inputs of channel mixes; of each layer)
    become those after all layers.

    sizes: those of the native function behind the number of heads. weights: of each layer vectors and matrices, in its
    order; what there is not is None. Of each row `lengths` (B,) tokens are read; None is all. Raises ValueError for
    more of them than there are, or less than none.
    """
    vectors, matrices = weights
    (B, T, D), H, L = x.shape, state[1][0].shape[1], len(vectors)
    if lengths is not None:
        lengths = lengths.to("cpu", torch.int64).contiguous()
        if lengths.shape != (B,) or lengths.lt(0).any() or lengths.gt(T).any():
            raise ValueError(f"lengths: {lengths.tolist()} of {B} rows of {T} tokens")
    rows = [None if row is None else row.contiguous() for layer in vectors for row in layer]
    data, scales = ([None if p is None else p[n] for layer in matrices for p in layer] for n in (0, 1))
    kinds = torch.tensor([0 if p is None else lies(p.kind) for layer in matrices for p in layer])
    build.announce("reading", "cpu", natively=True)
    words = [build.words(each) for each in (rows, data, scales)]
    build.call(function, (B, T, L, D, H, *sizes), lengths, *words, kinds, *state, x)
