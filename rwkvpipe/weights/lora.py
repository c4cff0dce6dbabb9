"""Low-rank adapters beside frozen matrices: y = x W^T + s ((drop(x) A^T) B^T) (Hu et al. 2021, arXiv 2106.09685)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkvpipe.base.config import LoraConfig
from rwkvpipe.base.errors import ConfigError, WeightsError


def scaling(config: LoraConfig) -> float:
    """What B A is multiplied by: alpha / rank, or alpha / sqrt(rank) with rslora; alpha left out is twice the rank."""
    alpha = 2 * config.rank if config.alpha is None else config.alpha
    return alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


class LoraLinear(nn.Module):
    """A frozen matrix with an adapter; the matrix keeps its name, so that official names stay valid.

    `weight` (out, in) frozen; `lora_A` (rank, in), `lora_B` (out, rank) in fp32.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig, generator: torch.Generator, number: int):
        super().__init__()
        self.weight = base.weight
        outside, inside = base.weight.shape
        first = torch.empty(config.rank, inside)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)  # U(-1/sqrt(in), 1/sqrt(in))
        self.lora_A = nn.Parameter(first.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(outside, config.rank, device=base.weight.device))
        self.scaling, self.dropout, self.number = scaling(config), config.dropout, number
        self.active = True
        self.first_row: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y = F.linear(x, self.weight)
        if not self.active:
            return y
        if self.training and self.dropout:
            x = x * self._kept(x)
        return y + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling

    def _kept(self, x: Tensor) -> Tensor:
        """Mask of the inputs that stay, already divided by their share: a function of step, matrix and row alone.

        Each row of the step draws from a stream of its own, or the micro batch would decide the result.
        """
        masks = []
        for row in range(len(x)):
            key = (torch.initial_seed(), self.number, (self.first_row or 0) + row)
            stream = torch.Generator().manual_seed(hash(key) % 2**63)
            masks.append(torch.rand(x.shape[1:], generator=stream) >= self.dropout)
        return torch.stack(masks).to(x.device) / (1 - self.dropout)


def _layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def _ends(path: str, target: str) -> bool:
    """Whether the last parts of a path are the target."""
    return path == target or path.endswith(f".{target}")


def _known(paths: list[str]) -> str:
    """The distinct endings of paths, block numbers left out, for an error message."""
    return ", ".join(sorted({path.split(".", 2)[2] if path.startswith("blocks.") else path for path in paths}))


def inject(model: nn.Module, config: LoraConfig, seed: int = 0) -> None:
    """Freeze a model and put adapters beside the matrices named by `config.targets`; `config.full` stays trainable.

    A target fits a matrix whose path ends in it, part by part (`att.key`, `key`, never `ke`); without targets all
    matrices of the blocks have one. Raises ConfigError for a target or a full tensor that fits nothing, or for one
    that is both.
    """
    matrices = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if config.targets is None:
        chosen = [path for path in matrices if path.startswith("blocks.")]
    else:
        chosen = [path for path in matrices if any(_ends(path, target) for target in config.targets)]
    for target in config.targets or ():
        if not any(_ends(path, target) for path in matrices):
            raise ConfigError(f"lora.targets: {target} fits no matrix; known: {_known(list(matrices))}")
    names = [name for name, _ in model.named_parameters()]
    whole = []
    for target in config.full:
        fits = [name for name in names if _ends(name, target) or _ends(name.rpartition(".")[0], target)]
        if not fits:
            raise ConfigError(f"lora.full: {target} fits no tensor; known: {_known(names)}")
        both = [name for name in fits if name.removesuffix(".weight") in chosen]
        if both:
            raise ConfigError(f"lora.full: {target} names {both[0]}, which has an adapter; take it from one of the two")
        whole += fits
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for number, path in enumerate(chosen):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LoraLinear(matrices[path], config, generator, number))
    for name in whole:
        model.get_parameter(name).requires_grad_(True)
    # what `disabled` goes back to
    model.base_tensors = {name: model.get_parameter(name).detach().clone() for name in dict.fromkeys(whole)}


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """What was trained: `<matrix>.lora_A`, `<matrix>.lora_B` and the full tensors under their own names, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.named_parameters() if value.requires_grad}


def load_adapter(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put a stored adapter into a model prepared by `inject`. Raises WeightsError unless it fits exactly."""
    wanted = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        place = "missing" if odd[0] in wanted else "unknown"
        raise WeightsError(f"adapter: {odd[0]} is {place}; it was made with other targets")
    with torch.no_grad():
        for name, value in wanted.items():
            if value.shape != tensors[name].shape:
                raise WeightsError(f"adapter: {name} is {tuple(tensors[name].shape)}, needed is {tuple(value.shape)}")
            value.copy_(tensors[name])


def merged(tensors: dict[str, Tensor], adapter: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Base tensors with the adapter in them: W + s B A, computed in fp64 and rounded once to the dtype of W.

    Full tensors replace theirs; everything else is the same tensor. Raises WeightsError for an adapter that does not
    belong to these tensors.
    """
    result = dict(tensors)
    for name, value in adapter.items():
        path, _, kind = name.rpartition(".")
        if kind == "lora_B" and f"{path}.lora_A" in adapter:
            continue
        base = f"{path}.weight" if kind in ("lora_A", "lora_B") else name
        if base not in tensors or (kind == "lora_A" and f"{path}.lora_B" not in adapter) or kind == "lora_B":
            raise WeightsError(f"adapter: {name} fits no tensor of the model, or misses its other half")
        old = tensors[base]
        if kind == "lora_A":
            other = adapter[f"{path}.lora_B"]
            if (other.shape[0], value.shape[1]) != tuple(old.shape) or other.shape[1] != value.shape[0]:
                raise WeightsError(
                    f"adapter: {path} is of another size than {base} {tuple(old.shape)}; give the weights it belongs to"
                )
            result[base] = (old.double() + scaling(config) * (other.double() @ value.double())).to(old.dtype)
        else:
            if value.numel() != old.numel():
                raise WeightsError(f"adapter: {name} is {tuple(value.shape)}, the model's is {tuple(old.shape)}")
            result[base] = value.reshape(old.shape).to(old.dtype)
    return result


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model as it was before training: adapters off, full tensors back at their first values.

    Modes are left alone, and the trained values come back whatever happens inside. Meant for use without gradient.
    """
    layers = _layers(model)
    trained = {name: model.get_parameter(name).detach().clone() for name in model.base_tensors}
    try:
        for layer in layers:
            layer.active = False
        with torch.no_grad():
            for name, value in model.base_tensors.items():
                model.get_parameter(name).copy_(value)
        yield
    finally:
        for layer in layers:
            layer.active = True
        with torch.no_grad():
            for name, value in trained.items():
                model.get_parameter(name).copy_(value)


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Matrices hold W + s B A while inside, so that sampling does one product, not three; W comes back exactly."""
    layers = _layers(model)
    kept = [layer.weight.data for layer in layers]
    try:
        for layer in layers:
            product = layer.lora_B.detach() @ layer.lora_A.detach()
            layer.weight.data = (layer.weight.data + product * layer.scaling).to(layer.weight.dtype)
            layer.active = False
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight.data = weight
            layer.active = True


@contextmanager
def _rows_from(layers: list[LoraLinear], first: int) -> Iterator[None]:
    try:
        for layer in layers:
            layer.first_row = first
        yield
    finally:
        for layer in layers:
            layer.first_row = None


def row_dropout(model: nn.Module, first: int):
    """Context in which the adapters' dropout takes the first row of its input as row `first` of the step."""
    layers = [layer for layer in _layers(model) if layer.dropout] if hasattr(model, "base_tensors") else []
    return _rows_from(layers, first) if layers else nullcontext()
