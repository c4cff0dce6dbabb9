"""RWKV-7, with the names, initial values and arithmetic of RWKV-LM's x070."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.kernel.wkv7 import wkv7
from rwkvpipe.model.layers import ChannelMix, HeadNorm, State, token_shift

HEAD_EPS = 64e-5  # group norm's, whatever the head size


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
        self.ln_x = HeadNorm(D, D // N, HEAD_EPS)

    def forward(
        self, x: Tensor, v_first: Tensor | None, last: Tensor, memory: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, D); v_first: layer 0's values (None in layer 0); last (B, D) and memory (B, H, N, N): the state.

        Returns what is added to the stream, v_first, and the state after the last token.
        """
        dx, last = token_shift(x, last, lengths)
        xr, xw, xk, xv, xa, xg = (
            torch.addcmul(x, dx, mix) for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # the soft clamp: w <= -0.5, so that no decay is below 0.545
        w = F.logsigmoid(self.w0 + torch.tanh(xw @ self.w1) @ self.w2) - 0.5
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2).to(v.dtype))
        r, w, v, a, kk = (self._heads(y) for y in (r, w, v, a, k * self.k_k))
        kk = F.normalize(kk, dim=-1)
        k = self._heads(k) * (1 + (a - 1) * self._heads(self.k_a))
        b = kk * a
        if lengths is not None:
            w, k, b = _forgotten(w, k, b, lengths)
        y, memory = wkv7(r, w, k, v, -kk, b, memory)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        y = self.ln_x(y) + bonus.flatten(-2)
        return self.output(y * g), v_first, last, memory

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size))


def _forgotten(w: Tensor, k: Tensor, b: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w, k and b (B, T, H, N) such that tokens beyond a row's length leave its memory as it is."""
    beyond = torch.arange(w.shape[1], device=w.device)[None, :] >= lengths.to(w.device)[:, None]
    beyond = beyond[:, :, None, None]
    return w.masked_fill(beyond, -torch.inf), k.masked_fill(beyond, 0), b.masked_fill(beyond, 0)


class Block(nn.Module):
    """Time mix, then channel mix, each on the normalised stream and added to it."""

    def __init__(self, config: RwkvConfig, layer: int):
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.n_embd)
        self.ln1 = nn.LayerNorm(config.n_embd)
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config.n_embd, config.dim_ffn)


class Rwkv7(nn.Module):
    """A language model: ids and a state in, logits and the state after them out."""

    def __init__(self, config: RwkvConfig):
        super().__init__()
        self.config = config = complete(config)
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size: how many ids there are is not known; name it or give a tokenizer")
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self, ids: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits (B, T, vocab_size), fp32, for ids (B, T), and the state after them.

        With `lengths` (B,) rows are padded on the right: each row's state is that after its own last token, and what
        comes out beyond it means nothing.
        """
        features, state = self.features(ids, state, lengths)
        return self.logits(features), state

    def features(
        self, ids: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The stream (B, T, n_embd) before the head, and the state after the ids."""
        if state is None:
            state = State.zeros(self.config, len(ids), ids.device, self.ln_out.weight.dtype)
        x, v_first = self.blocks[0].ln0(self.emb(ids)), None
        after = State([], [], [])
        for layer, block in enumerate(self.blocks):
            y, v_first, last, memory = block.att(
                block.ln1(x), v_first, state.att_x[layer], state.wkv[layer], lengths
            )
            x = x + y
            after.att_x.append(last)
            after.wkv.append(memory)
            y, last = block.ffn(block.ln2(x), state.ffn_x[layer], lengths)
            x = x + y
            after.ffn_x.append(last)
        return x, after

    def logits(self, features: Tensor) -> Tensor:
        """Logits of a stream (..., n_embd), fp32 (fp64 for fp64 models)."""
        found = self.head(self.ln_out(features))
        return found if found.dtype == torch.float64 else found.float()

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """RWKV-LM's initial values for models trained from nothing. Raises ConfigError for a single layer."""
        config = self.config
        if config.n_layer < 2:
            raise ConfigError("model.n_layer: initial values are defined for 2 layers or more")
        stream = torch.Generator().manual_seed(seed)
        self.emb.weight.uniform_(-1e-4, 1e-4, generator=stream)
        V, D = config.vocab_size, config.n_embd
        _orthogonal(self.head.weight, 0.5 * math.sqrt(V / D) if V > D else 0.5, stream)
        for layer, block in enumerate(self.blocks):
            _initial_norms(block, (1 + layer) / config.n_layer)
            _initial_rows(block, config, layer)
            _initial_matrices(block, stream)
        self.ln_out.reset_parameters()


def _orthogonal(matrix: Tensor, gain: float, stream: torch.Generator) -> None:
    """All singular values `gain`."""
    if matrix.device.type != "meta":
        nn.init.orthogonal_(matrix, gain, generator=stream)


def _initial_norms(block: Block, depth: float) -> None:
    for norm in block.children():
        if isinstance(norm, nn.LayerNorm):
            norm.reset_parameters()
    block.att.ln_x.weight.fill_(depth**0.7)
    block.att.ln_x.bias.zero_()


def _initial_matrices(block: Block, stream: torch.Generator) -> None:
    att, ffn = block.att, block.ffn
    for name in "wavg":
        if hasattr(att, f"{name}1"):
            getattr(att, f"{name}1").zero_()
            second = getattr(att, f"{name}2")
            rows, columns = second.shape
            _orthogonal(second, 0.1 * math.sqrt(max(1.0, rows / columns)), stream)
    _orthogonal(att.receptance.weight, 1.0, stream)
    _orthogonal(att.key.weight, 0.1, stream)
    _orthogonal(att.value.weight, 1.0, stream)
    _orthogonal(ffn.key.weight, 1.0, stream)
    att.output.weight.zero_()
    ffn.value.weight.zero_()


def _initial_rows(block: Block, config: RwkvConfig, layer: int) -> None:
    """Everything that is a formula of the channel and the layer."""
    att, D, N, L = block.att, config.n_embd, config.head_size, config.n_layer
    channel = torch.arange(D, dtype=torch.float32)
    share, linear = channel / D, channel / (D - 1) - 0.5
    place = (channel % N - (N - 1) / 2) / ((N - 1) / 2) if N > 1 else torch.zeros(D)
    zigzag = place * place.abs()
    rho0, rho1 = layer / (L - 1), 1 - layer / L
    exponents = {"x_r": 0.2, "x_g": 0.2, "x_w": 0.9, "x_a": 0.9, "x_k": 0.7, "x_v": 0.7}
    rows = {name: 1 - share ** (exponent * rho1) for name, exponent in exponents.items()}
    rows["w0"] = -6 + 6 * (channel / (D - 1)) ** (1 + rho0**0.3) + 0.5 + 2.5 * zigzag
    rows["a0"] = -0.19 + 0.3 * zigzag + 0.4 * linear
    rows["v0"] = 0.73 - 0.4 * linear
    rows["k_k"] = 0.71 - 0.1 * linear
    for name, row in rows.items():
        if hasattr(att, name):
            getattr(att, name).copy_(row.view(1, 1, D))
    att.k_a.fill_(1.02)
    att.r_k.fill_(-0.04)
    block.ffn.x_k.copy_((1 - share ** (rho1**4)).view(1, 1, D))


def detect(tensors: dict[str, Tensor]) -> RwkvConfig | None:
    """The sizes of an RWKV-7 checkpoint, from its tensors' shapes; None if it is none."""
    if "blocks.0.att.r_k" not in tensors or "emb.weight" not in tensors:
        return None
    V, D = tensors["emb.weight"].shape
    n_layer = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))

    def columns(name: str) -> int | None:
        found = [x for layer in range(n_layer) if (x := tensors.get(f"blocks.{layer}.att.{name}")) is not None]
        return found[-1].shape[-1] if found else None

    return RwkvConfig(
        family="rwkv7",
        n_layer=n_layer,
        n_embd=D,
        head_size=tensors["blocks.0.att.r_k"].shape[-1],
        vocab_size=V,
        dim_ffn=tensors["blocks.0.ffn.key.weight"].shape[0],
        d_decay=columns("w1"),
        d_aaa=columns("a1"),
        d_mv=columns("v1"),
        d_gate=columns("g1"),
    )
