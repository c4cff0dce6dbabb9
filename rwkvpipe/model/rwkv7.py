"""RWKV-7, with the names, initial values and arithmetic of RWKV-LM's x070."""

import math
from operator import attrgetter

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.kernel.blend import finish, lean, mix, prepare, squared_relu
from rwkvpipe.kernel.block7 import fits, project, recall, square_mix
from rwkvpipe.kernel.product import linear, through
from rwkvpipe.kernel.read import Form
from rwkvpipe.kernel.wkv7 import wkv7
from rwkvpipe.model.language import orthogonal, outline
from rwkvpipe.model.layers import FORGET, HEAD_EPS, Borders, HeadNorm, beyond, channels, ending
from rwkvpipe.model.panelled import Panelled

# of a block, in the order of cuda/read7_cpu.cpp
VECTORS = attrgetter(
    *("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"),
    *(f"att.{name}" for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "r_k")),
    *("att.ln_x.weight", "att.ln_x.bias", "ffn.x_k"),
)
FORM = Form(
    "read7",
    (
        *(f"att.{name}" for name in ("receptance", "key", "value", "output")),
        *(f"att.{name}{n}" for name in "wavg" for n in (1, 2)),
        *("ffn.key", "ffn.value"),
    ),
    ("dim_ffn", "d_decay", "d_aaa", "d_mv", "d_gate"),
)


def rank(size: float) -> int:
    """RWKV-LM's rounding of low ranks: to 32s, 32 at least."""
    return max(32, 32 * round(size / 32))


def complete(config: RwkvConfig) -> RwkvConfig:
    """The same with every size that was left out filled in (RWKV-LM's rules for D = n_embd)."""
    D = config.n_embd
    rules = {
        "dim_ffn": 4 * D,
        "d_decay": rank(1.8 * D**0.5),
        "d_aaa": rank(1.8 * D**0.5),
        "d_mv": rank(1.3 * D**0.5),
        "d_gate": rank(0.6 * D**0.8),
    }
    return config.model_copy(update={name: size for name, size in rules.items() if getattr(config, name) is None})


class TimeMix(nn.Module):
    """The part of a block that remembers."""

    def __init__(self, config: RwkvConfig, layer: int):
        super().__init__()
        D, N = config.n_embd, config.head_size
        self.head_size = N

        def row() -> nn.Parameter:
            return nn.Parameter(torch.zeros(1, 1, D))

        def low_rank(size: int) -> tuple[nn.Parameter, nn.Parameter]:
            return nn.Parameter(torch.zeros(D, size)), nn.Parameter(torch.zeros(size, D))

        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (row() for _ in range(6))
        self.w1, self.w2 = low_rank(config.d_decay)
        self.w0 = row()
        self.a1, self.a2 = low_rank(config.d_aaa)
        self.a0 = row()
        if layer > 0:
            self.v1, self.v2 = low_rank(config.d_mv)
            self.v0 = row()
        self.g1, self.g2 = low_rank(config.d_gate)
        self.k_k, self.k_a = row(), row()
        self.r_k = nn.Parameter(torch.zeros(D // N, N))
        self.receptance, self.key, self.value, self.output = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.ln_x = HeadNorm(D)

    def forward(
        self,
        x: Tensor,
        first: Tensor | None,
        last: Tensor,
        memory: Tensor,
        lengths: Tensor | None = None,
        borders: Borders | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, D); first: layer 0's values (None in layer 0); last (B, D) and memory (B, H, N, N): the state.

        Returns what is added to the stream, layer 0's values, and the state after the last token.
        """
        shares = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        layers = (self.receptance, self.key, self.value)
        if lengths is None and borders is None and fits(layers, x, last, memory, *shares):
            return self._whole(x, first, last, memory)
        xr, xw, xk, xv, xa, xg = mix(x, last, shares, borders and borders.first)
        last = ending(x, last, lengths)
        r, k, v = through(self.receptance, xr), through(self.key, xk), through(self.value, xv)
        decay, rate = linear(torch.tanh(linear(xw, self.w1)), self.w2), linear(linear(xa, self.a1), self.a2)
        gate = linear(torch.sigmoid(linear(xg, self.g1)), self.g2)
        if first is None:
            first = v
        else:
            v = lean(v, first, linear(linear(xv, self.v1), self.v2), self.v0)
        heads = self.r_k.shape[0]
        w, k, a, b = prepare(k, decay, rate, (self.w0, self.a0, self.k_k, self.k_a), heads)
        r, v = r.unflatten(-1, (heads, -1)), v.unflatten(-1, (heads, -1))
        if lengths is not None:  # what leaves the memory as it is
            padding = beyond(lengths, w)
            w, k, b = w.masked_fill(padding, -torch.inf), k.masked_fill(padding, 0), b.masked_fill(padding, 0)
        if borders is not None:  # what a document's first token finds is forgotten
            w, b = w.masked_fill(borders.begins, FORGET), b.masked_fill(borders.begins, 0)
        y, memory = wkv7(r, w, k, v, a, b, memory)
        y = finish(y, r, k, v, gate, (self.r_k, self.ln_x.weight, self.ln_x.bias), HEAD_EPS)
        return through(self.output, y), first, last, memory

    def _whole(
        self, x: Tensor, first: Tensor | None, last: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same in fewer, larger operations, which keep less for the backward."""
        shares = (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        layers = (self.receptance, self.key, self.value)
        matrices = [(n, layer.weight.mT) for n, layer in zip((0, 2, 3), layers, strict=True)]
        matrices += [(1, self.w1), (4, self.a1), (5, self.g1)]
        r, k, v, decay, rate, gate, *part = project(
            x, last, shares, matrices if first is None else [*matrices, (3, self.v1)]
        )
        decay, rate = linear(torch.tanh(decay), self.w2), linear(rate, self.a2)
        gate = linear(torch.sigmoid(gate), self.g2)
        lean_to = () if first is None else (first, linear(part[0], self.v2), self.v0)
        rows, norm = (self.w0, self.a0, self.k_k, self.k_a), (self.r_k, self.ln_x.weight, self.ln_x.bias)
        y, memory = recall((r, k, v, decay, rate, gate), rows, norm, memory, eps=HEAD_EPS, lean=lean_to)
        return through(self.output, y), v if first is None else first, ending(x, last), memory

    def initialise(self, layer: int, n_layer: int, stream: torch.Generator) -> None:
        """RWKV-LM's values: all but the norm and the matrices."""
        D = self.receptance.in_features
        channel = channels(D)
        share, linear = channel / D, channel / (D - 1) - 0.5
        N = self.head_size
        place = (channel % N - (N - 1) / 2) / ((N - 1) / 2) if N > 1 else torch.zeros(D)
        zigzag = place * place.abs()
        rho0, rho1 = layer / (n_layer - 1), 1 - layer / n_layer
        exponents = {"x_r": 0.2, "x_g": 0.2, "x_w": 0.9, "x_a": 0.9, "x_k": 0.7, "x_v": 0.7}
        rows = {name: 1 - share ** (exponent * rho1) for name, exponent in exponents.items()}
        rows["w0"] = -6 + 6 * (channel / (D - 1)) ** (1 + rho0**0.3) + 0.5 + 2.5 * zigzag
        rows["a0"] = -0.19 + 0.3 * zigzag + 0.4 * linear
        rows["v0"] = 0.73 - 0.4 * linear
        rows["k_k"] = 0.71 - 0.1 * linear
        for name, row in rows.items():
            if hasattr(self, name):
                getattr(self, name).copy_(row.view(1, 1, D))
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        for name in "wavg":
            if hasattr(self, f"{name}1"):
                getattr(self, f"{name}1").zero_()
                second = getattr(self, f"{name}2")
                orthogonal(second, 0.1 * math.sqrt(max(1.0, second.shape[0] / second.shape[1])), stream)


class ChannelMix(nn.Module):
    """The part of a block that works on one token and its predecessor alone."""

    def __init__(self, config: RwkvConfig):
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(1, 1, config.n_embd))
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(
        self, x: Tensor, last: Tensor, lengths: Tensor | None = None, borders: Borders | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and the input before it; returns what is added to the stream, and the last input."""
        if borders is None and fits((self.key, self.value), x, last, self.x_k):
            return square_mix(x, last, self.x_k, self.key.weight, self.value.weight), ending(x, last, lengths)
        (xk,) = mix(x, last, (self.x_k,), borders and borders.first)
        return through(self.value, squared_relu(through(self.key, xk))), ending(x, last, lengths)

    def initialise(self, layer: int, n_layer: int, stream: torch.Generator) -> None:
        """RWKV-LM's values: all but the matrices."""
        D = self.key.in_features
        self.x_k.copy_((1 - (channels(D) / D) ** ((1 - layer / n_layer) ** 4)).view(1, 1, D))


class Rwkv7(Panelled):
    """RWKV-7 (x070)."""

    TimeMix, ChannelMix, FORM = TimeMix, ChannelMix, FORM

    def __init__(self, config: RwkvConfig):
        super().__init__(complete(config))

    def vectors(self, block: nn.Module) -> list[Tensor | None]:
        """Those of a block, in the order of cuda/read7_cpu.cpp."""
        return [*VECTORS(block), getattr(block.att, "v0", None)]


def detect(tensors: dict[str, Tensor]) -> RwkvConfig | None:
    """The sizes of an RWKV-7 checkpoint, from its tensors' shapes; None if it is none."""
    if "blocks.0.att.r_k" not in tensors or "emb.weight" not in tensors:
        return None
    sizes = outline(tensors)

    def columns(name: str) -> int | None:
        found = [tensors.get(f"blocks.{layer}.att.{name}") for layer in range(sizes["n_layer"])]
        return next((x.shape[-1] for x in reversed(found) if x is not None), None)

    return RwkvConfig(
        family="rwkv7",
        head_size=tensors["blocks.0.att.r_k"].shape[-1],
        d_decay=columns("w1"),
        d_aaa=columns("a1"),
        d_mv=columns("v1"),
        d_gate=columns("g1"),
        time_state="blocks.0.att.time_state" in tensors,
        **sizes,
    )
