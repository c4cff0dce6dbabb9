"""A token of a few rows by kernels that read each weight once, on an NVIDIA card (`cuda/step7.cu`): five a layer.

The model's own step is hundreds of kernels, most of which a card is done with before the next one has begun. What this
one takes is what such a token costs: all matrices, read from memory. It computes in fp32, also beside matrices in bf16.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rwkvpipe.infer.decode import FORMS, vector
from rwkvpipe.infer.packed import Narrow
from rwkvpipe.kernel import gpu
from rwkvpipe.model.layers import State

MOST = 8  # rows; of more a card has enough to do
N = 64  # channels of a head
WHOLE = 16  # bytes that are read at once


class Few:
    """The weights of a model as they are now, laid out for `step`."""

    @torch.no_grad()
    def __init__(self, model: nn.Module):
        config, parameters, form = model.config, dict(model.named_parameters()), FORMS["rwkv7"]
        layers = range(config.n_layer)
        self.kind = model.head.data.dtype if isinstance(model.head, Narrow) else torch.float32
        ranks = (getattr(config, name) for name in form.ranks)
        sizes = (config.n_layer, config.n_embd, config.n_embd // N, config.dim_ffn, config.vocab_size)
        self.sizes = (*sizes, *ranks, int(self.kind == torch.bfloat16))
        names = ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias", "ln_out.weight", "ln_out.bias")
        self.fixed = _lying([parameters.get(name) for name in names])
        self.vectors = _lying([vector(parameters, n, name) for n in layers for name in form.vectors])
        found = [_matrix(model, name) for name in (*_names(model), "head")]
        self.matrices = _lying([x if x is None else x.to(self.kind) for x in found], self.kind)

    def step(self, ids: Tensor, state: State, logits: Tensor) -> None:
        """Logits (rows, V) after an id for each row, (rows,), go where they are to be; the state becomes that after it.

        Raises RuntimeError for more rows than MOST.
        """
        sizes = (len(ids), *self.sizes)
        weights = (self.fixed, self.vectors, self.matrices)
        room = gpu.floats("step7_room", sizes, logits)
        gpu.call("step7", sizes, ids, logits, state.att_x, state.wkv, state.ffn_x, *weights, room)


def few(model: nn.Module) -> Few | None:
    """The kernels' form of a model's step, or None where the model's own is to be used: a line says that they run."""
    config, device = model.config, next(model.parameters()).device
    if config.family != "rwkv7" or config.head_size != N or config.dim_ffn % 4 or gpu.at_hand(device)[0] is None:
        return None
    names = [*_names(model), "head"]
    kinds = {type(_found(model, name)) for name in names} - {nn.Parameter, type(None)}
    if kinds not in ({nn.Linear}, {Narrow}):  # adapters, or fewer bits
        return None
    gpu.announce(f"writing up to {MOST} rows", device)
    return Few(model)


def _names(model: nn.Module) -> list[str]:
    """Of all matrices of layers."""
    return [f"blocks.{n}.{name}" for n in range(model.config.n_layer) for name in FORMS["rwkv7"].matrices]


def _found(model: nn.Module, name: str) -> nn.Module | Tensor | None:
    """A layer of a matrix, or a matrix of low rank; None where there is none, as layer 0 has none of v."""
    whole, _, last = name.rpartition(".")
    return getattr(model.get_submodule(whole), last, None)


def _matrix(model: nn.Module, name: str) -> Tensor | None:
    """A matrix (out, in), the second one of a low rank (rank, D)."""
    found = _found(model, name)
    if isinstance(found, Tensor):
        return found if name.endswith("2") else found.mT
    return found.data if isinstance(found, Narrow) else found and found.weight


def _lying(tensors: Sequence[Tensor | None], kind: torch.dtype = torch.float32) -> list[Tensor]:
    """The same numbers without gaps, from places on where some can be read at once; what is None is empty."""
    like = next(x for x in tensors if x is not None)
    found = [like.new_empty(0, dtype=kind) if x is None else x.detach().contiguous() for x in tensors]
    return [x.clone() if x.data_ptr() % WHOLE else x for x in found]
