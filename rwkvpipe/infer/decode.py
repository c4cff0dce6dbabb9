"""A token of every row in one native call for all layers (`cuda/decode_cpu.cpp`, `decode6_cpu.cpp`), on the CPU.

The model's forward is the reference, and what computes where there is no native code. The matrices may be kept in
panels and fewer bits (see `packed`): then the weights are read in half or a quarter of the time, which is what a token
costs.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rwkvpipe.infer.packed import kind_of, matrix
from rwkvpipe.kernel import build
from rwkvpipe.kernel.panels import lies, pack
from rwkvpipe.model.layers import State


@dataclass(frozen=True)
class Form:
    """What a native step reads of each layer, in its order; what a layer or family lacks is null."""

    function: str
    vectors: tuple[str, ...]
    matrices: tuple[str, ...]
    ranks: tuple[str, ...]


FIXED = ("emb.weight", "blocks.0.ln0.weight", "blocks.0.ln0.bias", "ln_out.weight", "ln_out.bias")  # of no layer
NORMS = ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias")
SHARES = ("att.time_maa_x", "att.time_maa_w", "att.time_maa_k", "att.time_maa_v", "att.time_maa_r", "att.time_maa_g")
HEADS = ("att.time_decay", "att.time_faaaa", "att.ln_x.weight", "att.ln_x.bias")
SQUARES = ("att.receptance", "att.key", "att.value", "att.gate", "att.output", "ffn.key", "ffn.value", "ffn.receptance")
MIXED = ("att.time_maa_w1", *(f"att.time_maa_w2.{n}" for n in range(5)))  # these stay in fp32
FORMS = {
    "rwkv7": Form(
        "decode7",
        (*NORMS, "att.x_r", "att.x_w", "att.x_k", "att.x_v", "att.x_a", "att.x_g", "att.w0", "att.a0", "att.v0",
         "att.k_k", "att.k_a", "att.r_k", "att.ln_x.weight", "att.ln_x.bias", "ffn.x_k"),
        ("att.receptance", "att.key", "att.value", "att.output", "att.w1", "att.w2", "att.a1", "att.a2", "att.v1",
         "att.v2", "att.g1", "att.g2", "ffn.key", "ffn.value"),
        ("d_decay", "d_aaa", "d_mv", "d_gate"),
    ),
    "rwkv6": Form(
        "decode6",
        (*NORMS, *SHARES, *HEADS, "ffn.time_maa_k", "ffn.time_maa_r"),
        (*SQUARES, "att.time_decay_w1", "att.time_decay_w2", *MIXED),
        ("d_mix", "d_decay"),
    ),
    "rwkv5": Form(  # time_mix is what a token keeps of itself
        "decode6",
        (*NORMS, "", "", *(f"1 - att.time_mix_{name}" for name in "kvrg"), *HEADS,
         "1 - ffn.time_mix_k", "1 - ffn.time_mix_r"),
        (*SQUARES, *[""] * (2 + len(MIXED))),
        (),
    ),
}  # fmt: skip


class Decoder:
    """The weights of a model as they are now, laid out for `step`.

    `kind` says what matrices are in: panels of a kind, or, None, read where the model has them.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, kind: str | None = None):
        config, parameters = model.config, dict(model.named_parameters())
        self.vocab_size = config.vocab_size
        self.kept: list[Tensor] = []  # what native code reads must not go
        form = self.form = FORMS[config.family]
        ranks = [getattr(config, name) for name in form.ranks] or [0, 0]
        heads = config.n_embd // config.head_size
        self.sizes = (config.n_layer, config.n_embd, heads, config.dim_ffn, config.vocab_size, *ranks)
        self.fixed = self._words([parameters.get(name) for name in FIXED])
        layers = range(config.n_layer)
        self.vectors = self._words([vector(parameters, n, name) for n in layers for name in form.vectors])
        names = [name and f"blocks.{n}.{name}" for n in layers for name in form.matrices]
        packed = [_packed(model, parameters, name, kind) for name in (*names, "head")]
        self.matrices = self._words([data for data, *_ in packed])
        self.scales = self._words([scale for _, scale, _ in packed])
        self.lies = torch.tensor([lies(kind) for *_, kind in packed])

    def _words(self, tensors: list[Tensor | None]):
        tensors = [None if x is None else x.detach().contiguous() for x in tensors]
        self.kept += [x for x in tensors if x is not None]
        return build.words(tensors)

    def step(self, ids: Tensor, state: State) -> Tensor:
        """Logits (rows, V) after one id for each row, (rows,); the state, of its own, becomes the one after it."""
        ids, logits = ids.contiguous(), torch.empty(len(ids), self.vocab_size)
        if len(ids) and not bool(((ids >= 0) & (ids < self.vocab_size)).all()):
            raise IndexError("an id that the model does not have")
        sizes = (len(ids), *self.sizes)
        weights = (self.fixed, self.vectors, self.matrices, self.scales, self.lies)
        build.call(self.form.function, sizes, *weights, state.att_x, state.wkv, state.ffn_x, ids, logits)
        return logits


def decoder(model: nn.Module) -> Decoder | None:
    """The native form of a model's step, or None where the model's own is to be used."""
    if model.config.family not in FORMS or any(module.training for module in model.modules()):
        return None
    if build.native(*model.parameters()) is None:
        return None
    build.announce(f"writing token by token{_kept_in(model)}", "cpu", natively=True)
    return Decoder(model, kind_of(model))


def _kept_in(model: nn.Module) -> str:
    """What the matrices lie in, for a line that says it; nothing where none was asked for."""
    counts = Counter(panels.kind for panels in getattr(model, "packed", {}).values())
    names = {"twelve": "bf16 in twelve bits a number"}
    found = [names.get(kind, kind) + f" ({count})" * (len(counts) > 1) for kind, count in counts.most_common()]
    return f", matrices in {' and '.join(found)}," if found else ""


def vector(parameters: dict[str, Tensor], layer: int, name: str) -> Tensor | None:
    """A layer's vector; layer 0 has no v0."""
    found = parameters.get(f"blocks.{layer}.{name.removeprefix('1 - ')}")
    return 1 - found if name.startswith("1 - ") else found


def _packed(
    model: nn.Module, parameters: dict[str, Tensor], name: str, kind: str | None
) -> tuple[Tensor | None, Tensor | None, str | None]:
    """A matrix (out, in), its scale and what it is kept in: of a low rank, which is stored the other way round, a
    layer's, or kept so."""
    if name in (kept := getattr(model, "packed", {})):
        return *kept[name][:2], kept[name].kind
    whole, _, last = name.rpartition(".")
    if name.endswith(MIXED):
        return (parameters[name] if name in parameters else parameters[whole][int(last)]).mT, None, None
    if name in parameters:
        found = parameters[name].mT
    elif not name or not hasattr(model.get_submodule(whole), last):
        return None, None, None  # layer 0 has no v
    else:
        found = matrix(model.get_submodule(name))
    if kind is None:
        return found, None, None
    panels = pack(found, kind)
    return *panels[:2], panels.kind
