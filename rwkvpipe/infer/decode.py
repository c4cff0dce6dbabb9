"""A token of every row in one native call for all layers (`cuda/decode_cpu.cpp`), for RWKV-7 on the CPU.

The model's forward is the reference, and what computes where there is no native code, or another family. The matrices
may be kept in panels and fewer bits (see `packed`): then the weights are read in half or a quarter of the time, which
is what a token costs.
"""

import torch
from torch import Tensor, nn

from rwkvpipe.infer.packed import kind_of, matrix
from rwkvpipe.kernel import build
from rwkvpipe.kernel.panels import lies, pack
from rwkvpipe.model.layers import State

ROWS = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "att.x_r", "att.x_w", "att.x_k", "att.x_v", "att.x_a",
        "att.x_g", "att.w0", "att.a0", "att.v0", "att.k_k", "att.k_a", "att.r_k", "att.ln_x.weight", "att.ln_x.bias",
        "ffn.x_k")  # fmt: skip
MATRICES = ("att.receptance", "att.key", "att.value", "att.output", "att.w1", "att.w2", "att.a1", "att.a2", "att.v1",
            "att.v2", "att.g1", "att.g2", "ffn.key", "ffn.value")  # fmt: skip


class Decoder:
    """The weights of a model as they are now, laid out for `step`.

    `kind` says what matrices are in: panels of a kind, or, None, read where the model has them.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, kind: str | None = None):
        config, parameters = model.config, dict(model.named_parameters())
        self.vocab_size, self.kind = config.vocab_size, kind
        self.kept: list[Tensor] = []  # what native code reads must not go
        ranks = (config.d_decay, config.d_aaa, config.d_mv, config.d_gate)
        heads = config.n_embd // config.head_size
        self.sizes = (config.n_layer, config.n_embd, heads, config.dim_ffn, config.vocab_size, *ranks)
        names = ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias", "ln_out.weight", "ln_out.bias")
        self.fixed = self._words([parameters.get(name) for name in names])
        layers = range(config.n_layer)
        self.vectors = self._words([parameters.get(f"blocks.{n}.{name}") for n in layers for name in ROWS])
        names = [*(f"blocks.{n}.{name}" for n in layers for name in MATRICES), "head"]
        packed = [_packed(model, parameters, name, kind) for name in names]
        self.matrices = self._words([data for data, _ in packed])
        self.scales = self._words([scale for _, scale in packed])

    def _words(self, tensors: list[Tensor | None]):
        tensors = [None if x is None else x.detach().contiguous() for x in tensors]
        self.kept += [x for x in tensors if x is not None]
        return build.words(tensors)

    def step(self, ids: Tensor, state: State) -> Tensor:
        """Logits (rows, V) after one id for each row, (rows,); the state, of its own, becomes the one after it."""
        ids, logits = ids.contiguous(), torch.empty(len(ids), self.vocab_size)
        if len(ids) and not bool(((ids >= 0) & (ids < self.vocab_size)).all()):
            raise IndexError("an id that the model does not have")
        sizes = (len(ids), *self.sizes, lies(self.kind))
        weights = (self.fixed, self.vectors, self.matrices, self.scales)
        build.call("decode7", sizes, *weights, state.att_x, state.wkv, state.ffn_x, ids, logits)
        return logits


def decoder(model: nn.Module) -> Decoder | None:
    """The native form of a model's step, or None where the model's own is to be used."""
    if model.config.family != "rwkv7" or any(module.training for module in model.modules()):
        return None
    if build.native(*model.parameters()) is None:
        return None
    build.announce("writing token by token", "cpu", natively=True)
    return Decoder(model, kind_of(model))


def _packed(
    model: nn.Module, parameters: dict[str, Tensor], name: str, kind: str | None
) -> tuple[Tensor | None, Tensor | None]:
    """A matrix (out, in) and its scale: of a low rank, which is stored the other way round, a layer's, or kept so."""
    if name in (kept := getattr(model, "packed", {})):
        return kept[name][:2]
    if name in parameters:
        found = parameters[name].mT
    elif not hasattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]):
        return None, None  # layer 0 has no v
    else:
        found = matrix(model.get_submodule(name))
    return (found, None) if kind is None else pack(found, kind)[:2]
