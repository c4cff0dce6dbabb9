"""A token of every row by kernels for it on an NVIDIA card (`cuda/step7.cu`), for RWKV-7 with heads of 64 channels.

The model's own step is hundreds of kernels, most of which a card is done with before the next one has begun. For a few
rows there are five a layer (seven where rows are long), which read each weight once for all of them: that is what such
a token costs. For more, a head's low ranks, memory and norm are one kernel, and the matrices are PyTorch's to multiply;
those in int8, which PyTorch would have to open, are read again for each few rows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpipe.infer.decode import FIXED, FORMS, vector
from rwkvpipe.infer.packed import Bytes, Narrow
from rwkvpipe.kernel import gpu, panels, passes
from rwkvpipe.model.layers import State

MOST = 8  # rows that are few
BY_EIGHTS = 64  # rows for which matrices in int8 are read once for each few; for more they are better opened once
N = 64  # channels of a head
WHOLE = 16  # bytes that are read at once
FORM = FORMS["rwkv7"]
SHARES, HEADS = slice(4, 10), slice(10, 18)  # of a layer's vectors: what is mixed, what heads take
LOW = "wavg"


class CardDecoder:
    """The weights of a model as they are now, laid out for `step`."""

    @torch.no_grad()
    def __init__(self, model: nn.Module):
        config, parameters = model.config, dict(model.named_parameters())
        layers = range(config.n_layer)
        self.kind = model.head.data.dtype if isinstance(model.head, Narrow | Bytes) else torch.float32
        self.ranks = tuple(getattr(config, name) for name in FORM.ranks)
        self.sizes = (config.n_layer, config.n_embd, config.n_embd // N, config.dim_ffn, config.vocab_size)
        self.fixed = _lying([parameters.get(name) for name in FIXED])
        self.vectors = _lying([vector(parameters, n, name) for n in layers for name in FORM.vectors])
        found = [_matrix(model, name) for name in (*_names(model), "head")]
        self.matrices = _lying([x if x is None else x.to(self.kind) for x, _ in found], self.kind)
        self.scales = _lying([scale for _, scale in found]) if self.kind == torch.int8 else []

    def takes(self, rows: int) -> bool:
        """Whether a step is of so many rows; that of more is the model's own."""
        return self.kind != torch.int8 or rows <= BY_EIGHTS

    def step(self, ids: Tensor, state: State, logits: Tensor) -> None:
        """Write logits (rows, V) after an id for each row, (rows,), and over the state that after it.

        Rows that are few are computed in fp32, also beside matrices in fewer bits. Of more, matrices in bf16 meet rows
        that are rounded as well, and those in int8 are read again for each few.
        """
        if len(ids) > MOST and self.kind != torch.int8:
            self.many(ids, state, logits)
            return
        for first in range(0, len(ids), MOST):
            part = slice(first, first + MOST)
            own = State(*([x[part] for x in each] for each in (state.att_x, state.wkv, state.ffn_x)))
            self.few(ids[part], own, logits[part])

    def few(self, ids: Tensor, state: State, logits: Tensor) -> None:
        """The same for a few rows, in fp32 but for the matrices. Raises RuntimeError for more than MOST."""
        sizes = (len(ids), *self.sizes, *self.ranks)
        given = (ids, logits, state.att_x, state.wkv, state.ffn_x, self.fixed, self.vectors, self.matrices)
        room = gpu.floats("step7_room", sizes, logits)
        if self.kind == torch.int8:
            gpu.call("step7_bytes", sizes, *given, self.scales, room)
        else:
            gpu.call("step7", (*sizes, gpu.halves(self.matrices[-1])), *given, room)

    def many(self, ids: Tensor, state: State, logits: Tensor) -> None:
        """The same for any number of rows, in what the matrices are in but for the stream and the state."""
        emb, *first_norm = self.fixed[:3]
        x, first = F.embedding(ids, emb), None
        if first_norm[0].numel():
            x = F.layer_norm(x, x.shape[-1:], *first_norm)
        for n in range(self.sizes[0]):
            rows = self.vectors[n * len(FORM.vectors) :][: len(FORM.vectors)]
            at = dict(zip(FORM.matrices, self.matrices[n * len(FORM.matrices) :], strict=False))
            r, w, k, v, a, g = self._mixes(x, rows[:2], state.att_x[n], rows[SHARES])
            w, a, g = F.linear(w, at["att.w1"]).tanh_(), F.linear(a, at["att.a1"]), F.linear(g, at["att.g1"]).sigmoid_()
            xs = [w, a, F.linear(v, at["att.v1"]) if n else v[:0], g]
            r, k, v = F.linear(r, at["att.receptance"]), F.linear(k, at["att.key"]), F.linear(v, at["att.value"])
            first, out = v if first is None else first, torch.empty_like(v)
            seconds = [at[f"att.{name}2"] for name in LOW]
            kinds = gpu.halves(r, k, v, first, out, xs[0], seconds[0])
            sizes = (len(ids), self.sizes[2], *self.ranks, kinds)
            gpu.call("recall7", sizes, r, k, v, first, xs, seconds, rows[HEADS], state.wkv[n], out)
            x = x + F.linear(out, at["att.output"])
            (k,) = self._mixes(x, rows[2:4], state.ffn_x[n], rows[-1:])
            x = x + F.linear(passes.Square.apply(F.linear(k, at["ffn.key"])), at["ffn.value"])
        x = F.layer_norm(x, x.shape[-1:], *self.fixed[3:])
        logits.copy_(F.linear(x.to(self.kind), self.matrices[-1]))

    def _mixes(self, x: Tensor, norm: Sequence[Tensor], last: Tensor, shares: Sequence[Tensor]) -> list[Tensor]:
        """The stream normalised and mixed with `last`, which it becomes, as products take it."""
        x = F.layer_norm(x, x.shape[-1:], *norm)
        found = passes.Mix.apply(self.kind, x[:, None], last, *shares)
        last.copy_(x)
        return [y[:, 0] for y in found]


def card_decoder(model: nn.Module) -> CardDecoder | None:
    """The kernels' form of a model's step, or None where the model's own is to be used: a line says that they run."""
    config, device = model.config, next(model.parameters()).device
    if config.family != "rwkv7" or config.head_size != N or config.dim_ffn % 4 or gpu.at_hand(device)[0] is None:
        return None
    found = [_found(model, name) for name in (*_names(model), "head")]
    layers = [layer for layer in found if isinstance(layer, nn.Module)]
    ways = (_plain, lambda layer: isinstance(layer, Narrow), lambda layer: isinstance(layer, Bytes))
    if not any(all(map(way, layers)) for way in ways):  # adapters, panels
        return None
    steps = CardDecoder(model)
    gpu.announce("writing token by token" + (f", up to {BY_EIGHTS} rows," * (steps.kind == torch.int8)), device)
    return steps


def _names(model: nn.Module) -> list[str]:
    """Of all matrices of layers."""
    return [f"blocks.{n}.{name}" for n in range(model.config.n_layer) for name in FORM.matrices]


def _found(model: nn.Module, name: str) -> nn.Module | Tensor | None:
    """A layer of a matrix, or a matrix of low rank; None where there is none, as layer 0 has none of v."""
    whole, _, last = name.rpartition(".")
    return getattr(model.get_submodule(whole), last, None)


def _plain(layer: nn.Module) -> bool:
    """Whether it is a matrix as it is, or one into which its adapter was folded."""
    return type(layer) is nn.Linear or (not getattr(layer, "active", True) and layer.weight is not None)


def _matrix(model: nn.Module, name: str) -> tuple[Tensor | None, Tensor | None]:
    """A matrix (out, in), the second one of a low rank (rank, D); and of int8 the scale of each output."""
    found = _found(model, name)
    if isinstance(found, Tensor):
        second = name.endswith("2")
        if isinstance(model.head, Bytes):
            kept = panels.rows(model.packed[name])
            return kept.mT if second else kept, model.packed[name].scale
        return found if second else found.mT, None
    if isinstance(found, Narrow | Bytes):
        return found.data, getattr(found, "scale", None)
    return None if found is None else found.weight, None


def _lying(tensors: Sequence[Tensor | None], kind: torch.dtype = torch.float32) -> list[Tensor]:
    """The same numbers without gaps, from places on where some can be read at once; what is None is empty."""
    like = next(x for x in tensors if x is not None)
    found = [like.new_empty(0, dtype=kind) if x is None else x.detach().contiguous() for x in tensors]
    return [x.clone() if x.data_ptr() % WHOLE else x for x in found]
