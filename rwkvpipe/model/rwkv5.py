"""RWKV-5.2, with the names, initial values and arithmetic of RWKV-LM's x052."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.kernel.blend import Places, mix
from rwkvpipe.kernel.read import Form
from rwkvpipe.model.language import outline
from rwkvpipe.model.layers import GATED, GatedChannelMix, GatedTimeMix, channels, decays
from rwkvpipe.model.panelled import Panelled

FORM = Form("read6", (*GATED, "", ""), ("dim_ffn", "", ""))


def complete(config: RwkvConfig) -> RwkvConfig:
    """The same with every size that was left out filled in (RWKV-LM's rule)."""
    return config.model_copy(update={"dim_ffn": config.dim_ffn or max(32, int(3.5 * config.n_embd) // 32 * 32)})


class TimeMix(GatedTimeMix):
    """With the token shift and the decays of RWKV-5."""

    def __init__(self, config: RwkvConfig, layer: int):
        super().__init__(config)
        D, N = config.n_embd, config.head_size
        for name in "kvrg":
            setattr(self, f"time_mix_{name}", nn.Parameter(torch.zeros(1, 1, D)))
        self.time_decay, self.time_faaaa = (nn.Parameter(torch.zeros(D // N, N)) for _ in range(2))

    def read(self, x: Tensor, last: Tensor, places: Places | None) -> Sequence[Tensor]:
        """What receptance, key, value and gate read, (B, T, D), and the decays of all tokens."""
        xk, xv, xr, xg = mix(x, last, [1 - getattr(self, f"time_mix_{name}") for name in "kvrg"], places)
        return xr, xk, xv, xg, self.time_decay

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


class Rwkv5(Panelled):
    """RWKV-5.2 (x052)."""

    TimeMix, ChannelMix, FORM = TimeMix, ChannelMix, FORM

    def __init__(self, config: RwkvConfig):
        super().__init__(complete(config))

    def vectors(self, block: nn.Module) -> list[Tensor | None]:
        """Those of a block, in the order of cuda/read6_cpu.cpp; time_mix is what a token keeps of itself."""
        norms = [block.ln1.weight, block.ln1.bias, block.ln2.weight, block.ln2.bias]
        shares = [1 - getattr(block.att, f"time_mix_{name}") for name in "kvrg"]
        heads = [block.att.time_decay, block.att.time_faaaa, block.att.ln_x.weight, block.att.ln_x.bias]
        return [*norms, None, None, *shares, *heads, *block.ffn.shares(), None, None]


def detect(tensors: dict[str, Tensor]) -> RwkvConfig | None:
    """The sizes of an RWKV-5.2 checkpoint, from its tensors' shapes; None if it is none (RWKV-5.0 and 5.1 are not)."""
    decay = tensors.get("blocks.0.att.time_decay")
    if decay is None or decay.dim() != 2 or decay.shape[1] < 2 or "emb.weight" not in tensors:
        return None
    if "blocks.0.att.gate.weight" not in tensors:
        return None
    return RwkvConfig(family="rwkv5", head_size=decay.shape[1], **outline(tensors))
