"""The kinds of adapters: what each adds to a frozen matrix W, as a layer and as a formula.

lora: W + s B A (Hu et al. 2021, arXiv 2106.09685). pissa: the same from W's largest singular values on, W + s (B A -
B0 A0) (Meng et al. 2024, arXiv 2404.02948). dora: the rows of W + s B A, each of a length of its own (Liu et al. 2024,
arXiv 2402.09353). disha: W + rows that repeat along the input, also called Bone and MiSS (Kang 2024, arXiv 2409.15371).
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpipe.base.config import LoraConfig
from rwkvpipe.kernel.product import linear, one_thread
from rwkvpipe.weights.rounded import Rounded, product, rounded

OVER = 8  # directions more than asked for, which make those asked for of a randomized SVD exact
TINY = 1e-12


def scaling(config: LoraConfig) -> float:
    """What B A is multiplied by: alpha / rank, or alpha / sqrt(rank) with rslora.

    alpha left out is twice the rank; for pissa, as its authors have it, the rank.
    """
    usual = config.rank if config.kind == "pissa" else 2 * config.rank
    alpha = usual if config.alpha is None else config.alpha
    return alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


class Adapted(nn.Module):
    """A frozen matrix with an adapter; the matrix keeps its name, so that official names stay valid.

    `weight` (out, in) is frozen and never changed; the parts of the adapter are fp32. With `quantise` there is none:
    `rounded` is what is computed with, and the adapter begins as it would without.
    """

    trained: ClassVar[tuple[str, ...]]
    """Names of the parts that are trained."""
    kept: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that belong to the adapter and stay as they began."""

    def __init__(self, base: nn.Linear, config: LoraConfig, generator: torch.Generator, number: int):
        super().__init__()
        self.weight: nn.Parameter | None = base.weight
        self.rounded: Rounded | None = None
        self.scaling, self.dropout, self.number = scaling(config), config.dropout, number
        self.active = True
        self.first_row: int | None = None
        with torch.no_grad():
            begin = self.begin(base.weight.float(), config, generator)
        # laid out as files have them: the fused AdamW takes a weight and its moments, read back, place by place
        begin = {name: value.to(base.weight.device).contiguous() for name, value in begin.items()}
        for name in self.trained:
            setattr(self, name, nn.Parameter(begin[name]))
        for name in self.kept:
            self.register_buffer(name, begin[name])
        if config.quantise is not None:
            self.weight, self.rounded = None, rounded(base.weight.detach().float(), config.quantise)

    def _apply(self, fn, recurse=True):
        if self.rounded is not None:
            self.rounded = self.rounded.moved(fn)
        return super()._apply(fn, recurse)

    def matrix(self) -> Tensor:
        """The frozen matrix, as it is computed with."""
        return self.weight.detach() if self.rounded is None else self.rounded.open()

    def plain(self, x: Tensor) -> Tensor:
        """W x."""
        return linear(x, self.weight.mT) if self.weight is not None else product(x, self.rounded)

    @staticmethod
    def shapes(out: int, inside: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of all parts beside a matrix (out, inside)."""
        return {"lora_A": (rank, inside), "lora_B": (out, rank)}

    @staticmethod
    def begin(weight: Tensor, config: LoraConfig, generator: torch.Generator) -> dict[str, Tensor]:
        """The first values of all parts: A drawn from U(-1/sqrt(in), 1/sqrt(in)), B zero."""
        first = torch.empty(config.rank, weight.shape[1])
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
        return {"lora_A": first, "lora_B": torch.zeros(len(weight), config.rank)}

    @staticmethod
    def whole(weight: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
        """The one matrix that matrix and adapter come to, in the dtype of `weight`, which the parts have too."""
        return weight + scale * linear(parts["lora_B"], parts["lora_A"])

    def parts(self) -> dict[str, Tensor]:
        """All tensors of the adapter by name."""
        return {name: getattr(self, name).detach() for name in (*self.trained, *self.kept)}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if not self.active:
            return self.plain(x)
        return self.adapted(x, x * self._kept_inputs(x) if self.training and self.dropout else x)

    def adapted(self, x: Tensor, dropped: Tensor) -> Tensor:
        """The matrix and its adapter, which reads `dropped`."""
        return self.plain(x) + self.product(dropped)

    def product(self, x: Tensor) -> Tensor:
        """s B A x."""
        return linear(linear(x, self.lora_A.mT), self.lora_B.mT) * self.scaling

    def _kept_inputs(self, x: Tensor) -> Tensor:
        """Mask of the inputs that stay, already divided by their share: a function of step, matrix and row alone.

        Each row of the step draws from a stream of its own, or the micro batch would decide the result.
        """
        masks = []
        for row in range(len(x)):
            key = (torch.initial_seed(), self.number, (self.first_row or 0) + row)
            stream = torch.Generator().manual_seed(hash(key) % 2**63)
            masks.append(torch.rand(x.shape[1:], generator=stream) >= self.dropout)
        return torch.stack(masks).to(x.device) / (1 - self.dropout)


class LoraLinear(Adapted):
    """y = W x + s B A x."""

    trained = ("lora_A", "lora_B")


@one_thread()
def largest(weight: Tensor, config: LoraConfig, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values (rank,) of a matrix (out, in) between their vectors (out, rank), (rank, in).

    With `svd` rounds, those of what the matrix is in a subspace found from random directions (Halko et al. 2011). The
    same bits at any number of threads.
    """
    rank = config.rank
    if config.svd is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    drawn = torch.randn(weight.shape[1], min(rank + OVER, *weight.shape), generator=generator).to(weight)
    frame = torch.linalg.qr(weight @ drawn).Q
    for _ in range(config.svd):
        frame = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ frame).Q).Q
    left, values, right = torch.linalg.svd(frame.T @ weight, full_matrices=False)
    return (frame @ left)[:, :rank], values[:rank], right[:rank]


class PissaLinear(Adapted):
    """y = W x + s (B A - B0 A0) x, where s B0 A0 is W's part of rank r and A, B begin as A0, B0.

    What is frozen is in effect W - s B0 A0. It is not formed, so W keeps its bits and the start is W exactly.
    """

    trained = ("lora_A", "lora_B")
    kept = ("lora_A0", "lora_B0")

    @staticmethod
    def shapes(out: int, inside: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of all parts beside a matrix (out, inside)."""
        pair = Adapted.shapes(out, inside, rank)
        return pair | {f"{name}0": shape for name, shape in pair.items()}

    @staticmethod
    def begin(weight: Tensor, config: LoraConfig, generator: torch.Generator) -> dict[str, Tensor]:
        """Both factors from the largest singular values, which they share evenly."""
        left, values, right = largest(weight, config, generator)
        root = (values / scaling(config)).sqrt()
        pair = {"lora_A": root[:, None] * right, "lora_B": left * root}
        return pair | {f"{name}0": value.clone() for name, value in pair.items()}

    @staticmethod
    def whole(weight: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
        """W + s (B A - B0 A0)."""
        moved = linear(parts["lora_B"], parts["lora_A"]) - linear(parts["lora_B0"], parts["lora_A0"])
        return weight + scale * moved

    def adapted(self, x: Tensor, dropped: Tensor) -> Tensor:
        """What is frozen reads `x`, what is trained `dropped`."""
        frozen = linear(linear(x, self.lora_A0.mT), self.lora_B0.mT) * self.scaling
        return self.plain(x) + (self.product(dropped) - frozen)


class DoraLinear(Adapted):
    """y = m / |W + s B A| (W x + s B A x): each row of the matrix has a length m that is trained by itself.

    The length it is divided by counts as a constant in the gradient (section 4.3 of the paper). A row that began as
    zeros has no direction that a length could be of; it is that of lora.
    """

    trained = ("lora_A", "lora_B", "lora_m")

    @staticmethod
    def shapes(out: int, inside: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of all parts beside a matrix (out, inside)."""
        return Adapted.shapes(out, inside, rank) | {"lora_m": (out,)}

    @staticmethod
    def begin(weight: Tensor, config: LoraConfig, generator: torch.Generator) -> dict[str, Tensor]:
        """As lora, and the lengths of W's rows."""
        return Adapted.begin(weight, config, generator) | {"lora_m": torch.linalg.vector_norm(weight, dim=1)}

    @staticmethod
    def whole(weight: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
        """Rows of W + s B A, brought to the lengths m."""
        rows = Adapted.whole(weight, parts, scale)
        return rows * DoraLinear.stretched(parts["lora_m"], rows)[:, None]

    @staticmethod
    def stretched(wanted: Tensor, rows: Tensor) -> Tensor:
        """What rows (out, in) are multiplied by to be of the lengths (out,) that are wanted."""
        lengths = torch.linalg.vector_norm(rows.detach(), dim=1).clamp(min=TINY)
        return torch.where(wanted == 0, 1.0, wanted / lengths)

    def adapted(self, x: Tensor, dropped: Tensor) -> Tensor:
        """Both parts times m over the length that the row has."""
        with torch.no_grad():
            rows = Adapted.whole(self.matrix(), self.parts(), self.scaling)
        return super().adapted(x, dropped) * self.stretched(self.lora_m, rows)


class DishaLinear(Adapted):
    """y = W x + D^T (x_1 + x_2 + ...), x cut into pieces of `rank` numbers, the last filled up with zeros."""

    trained = ("disha",)

    @staticmethod
    def shapes(out: int, inside: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of all parts beside a matrix (out, inside)."""
        return {"disha": (rank, out)}

    @staticmethod
    def begin(weight: Tensor, config: LoraConfig, generator: torch.Generator) -> dict[str, Tensor]:
        """Zeros."""
        return {"disha": torch.zeros(config.rank, len(weight))}

    @staticmethod
    def whole(weight: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
        """W with row i mod rank of D added to its column i."""
        rows = parts["disha"]
        places = torch.arange(weight.shape[1], device=weight.device) % len(rows)
        return weight + rows[places].T

    def product(self, x: Tensor) -> Tensor:
        """D^T times the sum of the pieces."""
        rank = len(self.disha)
        x = F.pad(x, (0, -x.shape[-1] % rank))
        return linear(x.unflatten(-1, (-1, rank)).sum(-2), self.disha)


KINDS: dict[str, type[Adapted]] = {
    "lora": LoraLinear,
    "pissa": PissaLinear,
    "dora": DoraLinear,
    "disha": DishaLinear,
}
PARTS = {name for kind in KINDS.values() for name in (*kind.trained, *kind.kept)}
