"""RWKV-6, with the names, initial values and arithmetic of RWKV-LM's x060."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.kernel.blend import Places, mix
from rwkvpipe.kernel.gate import drift
from rwkvpipe.kernel.product import linear
from rwkvpipe.kernel.read import Form
from rwkvpipe.model.language import outline
from rwkvpipe.model.layers import GATED, GatedChannelMix, GatedTimeMix, channels, decays
from rwkvpipe.model.panelled import Panelled

SLOTS = "wkvrg"  # the order of what is mixed in time_maa_w1 and time_maa_w2
# of a block, in the order of cuda/read6_cpu.cpp
VECTORS = attrgetter(
    *("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"),
    *(f"att.time_maa_{name}" for name in "x" + SLOTS),
    *("att.time_decay", "att.time_faaaa", "att.ln_x.weight", "att.ln_x.bias", "ffn.time_maa_k", "ffn.time_maa_r"),
    *("att.time_maa_w1", "att.time_maa_w2"),
)
FORM = Form("read6", (*GATED, "att.time_decay_w1", "att.time_decay_w2"), ("dim_ffn", "d_mix", "d_decay"))


def complete(config: RwkvConfig) -> RwkvConfig:
    """The same with every size that was left out filled in, as the released models of this width have it."""
    wide = config.n_embd >= 4096
    rules = {
        "dim_ffn": max(32, int(3.5 * config.n_embd) // 32 * 32),
        "d_mix": 64 if wide else 32,
        "d_decay": 128 if wide else 64,
    }
    return config.model_copy(update={name: size for name, size in rules.items() if getattr(config, name) is None})


class TimeMix(GatedTimeMix):
    """With the token shift and the decays of RWKV-6."""

    def __init__(self, config: RwkvConfig, layer: int):
        super().__init__(config)
        D, N = config.n_embd, config.head_size
        self.time_maa_x = nn.Parameter(torch.zeros(1, 1, D))
        for name in SLOTS:
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.zeros(1, 1, D)))
        self.time_maa_w1 = nn.Parameter(torch.zeros(D, len(SLOTS) * config.d_mix))
        self.time_maa_w2 = nn.Parameter(torch.zeros(len(SLOTS), config.d_mix, D))
        self.time_decay = nn.Parameter(torch.zeros(1, 1, D))
        self.time_decay_w1 = nn.Parameter(torch.zeros(D, config.d_decay))
        self.time_decay_w2 = nn.Parameter(torch.zeros(config.d_decay, D))
        self.time_faaaa = nn.Parameter(torch.zeros(D // N, N))

    def read(self, x: Tensor, last: Tensor, places: Places | None) -> Sequence[Tensor]:
        """What receptance, key, value and gate read, (B, T, D), and the decays of each token."""
        (xx,) = mix(x, last, [self.time_maa_x], places)
        low = torch.tanh(linear(xx, self.time_maa_w1)).unflatten(-1, (len(SLOTS), -1))
        shifts = [linear(low[..., n, :], self.time_maa_w2[n]) for n in range(len(SLOTS))]
        xw, xk, xv, xr, xg = drift(x, last, shifts, [getattr(self, f"time_maa_{name}") for name in SLOTS], places)
        w = self.time_decay + linear(torch.tanh(linear(xw, self.time_decay_w1)), self.time_decay_w2)
        return xr, xk, xv, xg, w.unflatten(-1, (-1, self.head_size))

    def initialise(self, layer: int, n_layer: int, stream: torch.Generator) -> None:
        """RWKV-LM's values: all but the norm and the matrices."""
        D = self.receptance.in_features
        rho0, rho1 = layer / (n_layer - 1), 1 - layer / n_layer
        share = (channels(D) / D).view(1, 1, D)
        for name in "xwk":
            getattr(self, f"time_maa_{name}").copy_(1 - share**rho1)
        self.time_maa_v.copy_(1 - (share**rho1 + 0.3 * rho0))
        self.time_maa_r.copy_(1 - share ** (0.5 * rho1))
        self.time_maa_g.copy_(1 - share ** (0.5 * rho1))
        decays(self.time_decay, self.time_faaaa, rho0)
        for name in ("time_maa", "time_decay"):
            getattr(self, f"{name}_w1").zero_()
            getattr(self, f"{name}_w2").uniform_(-0.01, 0.01, generator=stream)


class ChannelMix(GatedChannelMix):
    """With the token shift of RWKV-6."""

    def __init__(self, config: RwkvConfig):
        super().__init__(config)
        self.time_maa_k, self.time_maa_r = (nn.Parameter(torch.zeros(1, 1, config.n_embd)) for _ in range(2))

    def shares(self) -> tuple[Tensor, Tensor]:
        """How much of the token before key and receptance read."""
        return self.time_maa_k, self.time_maa_r

    def initialise(self, layer: int, n_layer: int, stream: torch.Generator) -> None:
        """RWKV-LM's values: all but the matrices."""
        D = self.key.in_features
        for share in (self.time_maa_k, self.time_maa_r):
            share.copy_((1 - (channels(D) / D) ** ((1 - layer / n_layer) ** 3)).view(1, 1, D))


class Rwkv6(Panelled):
    """RWKV-6 (x060)."""

    TimeMix, ChannelMix, FORM = TimeMix, ChannelMix, FORM

    def __init__(self, config: RwkvConfig):
        super().__init__(complete(config))

    def vectors(self, block: nn.Module) -> list[Tensor | None]:
        """Those of a block, in the order of cuda/read6_cpu.cpp."""
        return list(VECTORS(block))


def detect(tensors: dict[str, Tensor]) -> RwkvConfig | None:
    """The sizes of an RWKV-6 checkpoint, from its tensors' shapes; None if it is none."""
    if "blocks.0.att.time_maa_w1" not in tensors or "emb.weight" not in tensors:
        return None
    return RwkvConfig(
        family="rwkv6",
        head_size=tensors["blocks.0.att.time_faaaa"].shape[-1],
        d_mix=tensors["blocks.0.att.time_maa_w2"].shape[1],
        d_decay=tensors["blocks.0.att.time_decay_w1"].shape[-1],
        time_state="blocks.0.att.time_state" in tensors,
        **outline(tensors),
    )
