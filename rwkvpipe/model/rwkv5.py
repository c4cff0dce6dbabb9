"""RWKV-5.2, with the names, initial values and arithmetic of RWKV-LM's x052."""

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.kernel.blend import mix
from rwkvpipe.kernel.gate import gate
from rwkvpipe.kernel.product import through
from rwkvpipe.kernel.wkv5 import wkv5
from rwkvpipe.kernel.wkv6 import wkv6
from rwkvpipe.model.language import LanguageModel, outline
from rwkvpipe.model.layers import (
    HEAD_EPS,
    Borders,
    GatedChannelMix,
    HeadNorm,
    beyond,
    by_document,
    channels,
    decays,
    ending,
)


def complete(config: RwkvConfig) -> RwkvConfig:
    """The same with every size that was left out filled in (RWKV-LM's rule)."""
    return config.model_copy(update={"dim_ffn": config.dim_ffn or max(32, int(3.5 * config.n_embd) // 32 * 32)})


class TimeMix(nn.Module):
    """The part of a block that remembers."""

    def __init__(self, config: RwkvConfig, layer: int):
        super().__init__()
        D, N = config.n_embd, config.head_size
        self.head_size = N
        for name in "kvrg":
            setattr(self, f"time_mix_{name}", nn.Parameter(torch.zeros(1, 1, D)))
        self.time_decay, self.time_faaaa = (nn.Parameter(torch.zeros(D // N, N)) for _ in range(2))
        self.receptance, self.key, self.value, self.output, self.gate = (nn.Linear(D, D, bias=False) for _ in range(5))
        self.ln_x = HeadNorm(D)

    def forward(
        self,
        x: Tensor,
        first: None,
        last: Tensor,
        memory: Tensor,
        lengths: Tensor | None = None,
        borders: Borders | None = None,
    ) -> tuple[Tensor, None, Tensor, Tensor]:
        """x (B, T, D); first: nothing, here; last (B, D) and memory (B, H, N, N): the state.

        Returns what is added to the stream, nothing, and the state after the last token.
        """
        shares = [1 - getattr(self, f"time_mix_{name}") for name in "kvrg"]
        xk, xv, xr, xg = mix(x, last, shares, borders and borders.first)
        last = ending(x, last, lengths)
        r, k, v = through(self.receptance, xr), through(self.key, xk), through(self.value, xv)
        r, k, v = (y.unflatten(-1, (-1, self.head_size)) for y in (r, k, v))
        if borders is not None:  # and then decays differ by token
            y, memory = by_document((r, self.time_decay.expand(k.shape), k, v, self.time_faaaa), memory, borders)
        elif lengths is None:
            y, memory = wkv5(r, self.time_decay, k, v, self.time_faaaa, memory)
        else:  # padding leaves the memory as it is: for once, decays differ by token
            padding = beyond(lengths, k)
            w = self.time_decay.expand(k.shape).masked_fill(padding, -torch.inf)
            y, memory = wkv6(r, w, k.masked_fill(padding, 0), v, self.time_faaaa, memory)
        y = gate(y, through(self.gate, xg), self.ln_x.weight, self.ln_x.bias, HEAD_EPS)
        return through(self.output, y), first, last, memory

    def initialise(self, layer: int, n_layer: int, stream: torch.Generator) -> None:
        """RWKV-LM's values: all but the norm and the matrices."""
        D = self.receptance.in_features
        rho0, rho1 = layer / (n_layer - 1), 1 - layer / n_layer
        share = (channels(D) / D).view(1, 1, D)
        self.time_mix_k.copy_(share**rho1)
        self.time_mix_v.copy_(share**rho1 + 0.3 * rho0)
        self.time_mix_r.copy_(share ** (0.5 * rho1))
        self.time_mix_g.copy_(share ** (0.5 * rho1))
        decays(self.time_decay, self.time_faaaa, rho0)


class ChannelMix(GatedChannelMix):
    """With the token shift of RWKV-5."""

    def __init__(self, config: RwkvConfig):
        super().__init__(config)
        self.time_mix_k, self.time_mix_r = (nn.Parameter(torch.zeros(1, 1, config.n_embd)) for _ in range(2))

    def shares(self) -> tuple[Tensor, Tensor]:
        """How much of the token before key and receptance read."""
        return 1 - self.time_mix_k, 1 - self.time_mix_r

    def initialise(self, layer: int, n_layer: int, stream: torch.Generator) -> None:
        """RWKV-LM's values: all but the matrices."""
        D = self.key.in_features
        for share in (self.time_mix_k, self.time_mix_r):
            share.copy_(((channels(D) / D) ** (1 - layer / n_layer)).view(1, 1, D))


class Rwkv5(LanguageModel):
    """RWKV-5.2 (x052)."""

    TimeMix, ChannelMix = TimeMix, ChannelMix

    def __init__(self, config: RwkvConfig):
        super().__init__(complete(config))


def detect(tensors: dict[str, Tensor]) -> RwkvConfig | None:
    """The sizes of an RWKV-5.2 checkpoint, from its tensors' shapes; None if it is none (RWKV-5.0 and 5.1 are not)."""
    decay = tensors.get("blocks.0.att.time_decay")
    if decay is None or decay.dim() != 2 or decay.shape[1] < 2 or "emb.weight" not in tensors:
        return None
    if "blocks.0.att.gate.weight" not in tensors:
        return None
    return RwkvConfig(family="rwkv5", head_size=decay.shape[1], **outline(tensors))
