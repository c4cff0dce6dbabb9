"""Adapters in a model: put beside its matrices, taken out, merged, switched off and folded in."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import LoraConfig
from rwkvpipe.base.errors import ConfigError, WeightsError
from rwkvpipe.base.strict import check_json
from rwkvpipe.kernel.product import one_thread
from rwkvpipe.weights.kinds import KINDS, PARTS, Adapted, scaling
from rwkvpipe.weights.tensors import read_tensors


def _layers(model: nn.Module) -> list[Adapted]:
    return [module for module in model.modules() if isinstance(module, Adapted)]


def _ends(path: str, target: str) -> bool:
    """Whether the last parts of a path are the target."""
    return path == target or path.endswith(f".{target}")


def _known(paths: list[str]) -> str:
    """The distinct endings of paths, block numbers left out, for an error message."""
    return ", ".join(sorted({path.split(".", 2)[2] if path.startswith("blocks.") else path for path in paths}))


def _choose(model: nn.Module, config: LoraConfig) -> tuple[dict[str, nn.Linear], list[str]]:
    """The matrices that get an adapter, by path, and the names of the tensors trained whole."""
    matrices = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    if config.targets is None:
        chosen = {path: matrices[path] for path in matrices if path.startswith("blocks.")}
    else:
        chosen = {path: matrices[path] for path in matrices if any(_ends(path, target) for target in config.targets)}
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
    for path, matrix in chosen.items():
        least = {"pissa": min(matrix.weight.shape), "disha": matrix.in_features}.get(config.kind, config.rank)
        if config.rank > least:
            raise ConfigError(f"lora.rank: {config.rank} is too much for {path}, which has {least}; lower it")
    return chosen, list(dict.fromkeys(whole))


def inject(model: nn.Module, config: LoraConfig, seed: int = 0) -> None:
    """Freeze a model and put adapters beside the matrices named by `config.targets`; `config.full` stays trainable.

    A target fits a matrix whose path ends in it, part by part (`att.key`, `key`, never `ke`); without targets all
    matrices of the blocks have one. Raises ConfigError for a target or a full tensor that fits nothing, or for one
    that is both.
    """
    chosen, whole = _choose(model, config)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for number, (path, matrix) in enumerate(chosen.items()):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, KINDS[config.kind](matrix, config, generator, number))
    train_whole(model, whole)


def train_whole(model: nn.Module, names: list[str]) -> None:
    """Let these tensors of a frozen model be trained; what they are now is what `disabled` goes back to."""
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    model.base_tensors = {name: model.get_parameter(name).detach().clone() for name in names}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter consists of: what is trained, and what its matrices began with where that counts."""
    found = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return found | {name: value for name, value in model.named_buffers() if name.rpartition(".")[2] in PARTS}


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """What was trained: `<matrix>.lora_A` and so on, and the full tensors under their own names, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in trained(model).items()}


def load_adapter(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put a stored adapter into a model prepared by `inject`. Raises WeightsError unless it fits exactly."""
    wanted = trained(model)
    _check(tensors, {name: tuple(value.shape) for name, value in wanted.items()})
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(tensors[name])


def check_fits(model: nn.Module, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    """Raise WeightsError unless a stored adapter has exactly the tensors that `config` means in this plain model."""
    chosen, whole = _choose(model, config)
    wanted = {name: tuple(model.get_parameter(name).shape) for name in whole}
    for path, matrix in chosen.items():
        shapes = KINDS[config.kind].shapes(matrix.out_features, matrix.in_features, config.rank)
        wanted |= {f"{path}.{part}": shape for part, shape in shapes.items()}
    _check(tensors, wanted)


def _check(tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        place = "missing" if odd[0] in wanted else "unknown"
        raise WeightsError(f"adapter: {odd[0]} is {place}; it was made with other targets, or for another model")
    for name, shape in wanted.items():
        if shape != tuple(tensors[name].shape):
            raise WeightsError(f"adapter: {name} is {tuple(tensors[name].shape)}, needed is {shape}")


def read_adapter(path: str | Path) -> tuple[dict, LoraConfig]:
    """Tensors and settings of an adapter file. Raises WeightsError if it is none."""
    tensors, metadata = read_tensors(path)
    if "lora" not in metadata:
        raise WeightsError(f"{path}: no adapter (its metadata has no `lora`); give the file that sft or grpo wrote")
    return tensors, check_json(LoraConfig, metadata["lora"], path)


@one_thread()
def merged(tensors: dict[str, Tensor], adapter: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Base tensors with the adapter in them, computed in fp64 and rounded once to the dtype of the matrix.

    The same bits at any number of threads. Full tensors replace theirs; everything else is the same tensor. Raises
    WeightsError for an adapter that does not belong to these tensors.
    """
    result, groups, kind = dict(tensors), {}, KINDS[config.kind]
    for name, value in adapter.items():
        path, _, part = name.rpartition(".")
        if part in PARTS:
            groups.setdefault(path, {})[part] = value
        elif name not in tensors:
            raise WeightsError(f"adapter: {name} fits no tensor of the model")
        elif value.numel() != tensors[name].numel():
            raise WeightsError(f"adapter: {name} is {tuple(value.shape)}, the model's is {tuple(tensors[name].shape)}")
        else:
            result[name] = value.reshape(tensors[name].shape).to(tensors[name].dtype)
    for path, parts in groups.items():
        base = f"{path}.weight"
        if base not in tensors:
            raise WeightsError(f"adapter: {path} fits no matrix of the model")
        shapes = kind.shapes(*tensors[base].shape, config.rank)
        if odd := sorted(shapes.keys() ^ parts.keys()):
            raise WeightsError(f"adapter: {path}.{odd[0]} is {'missing' if odd[0] in shapes else 'unknown'}")
        for part, value in parts.items():
            if tuple(value.shape) != shapes[part]:
                raise WeightsError(f"adapter: {path}.{part} is {tuple(value.shape)}, needed is {shapes[part]}")
        exact = {part: value.double() for part, value in parts.items()}
        result[base] = kind.whole(tensors[base].double(), exact, scaling(config)).to(tensors[base].dtype)
    return result


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model as it was before training: adapters off, full tensors back at their first values.

    Modes are left alone, and the trained values come back whatever happens inside. Meant for use without gradient.
    """
    layers = _layers(model)
    trained = {name: model.get_parameter(name).detach().clone() for name in model.base_tensors}

    def put(values: dict[str, Tensor], active: bool) -> None:
        for layer in layers:
            layer.active = active
        with torch.no_grad():
            for name, value in values.items():
                model.get_parameter(name).copy_(value)

    try:
        put(model.base_tensors, False)
        yield
    finally:
        try:
            put(trained, True)
        except KeyboardInterrupt:  # what is saved now must be the trained values; no second stop comes
            put(trained, True)
            raise


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Matrices hold what they and their adapters come to while inside, so that sampling does
    one product, not three; they come back exactly."""
    layers = _layers(model)
    kept = [layer.weight for layer in layers]
    try:
        for layer in layers:
            whole = layer.whole(layer.matrix(), layer.parts(), layer.scaling)
            layer.weight, layer.active = nn.Parameter(whole, requires_grad=False), False
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight, layer.active = weight, True


@contextmanager
def _rows_from(layers: list[Adapted], first: int) -> Iterator[None]:
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
