"""Initial states kept apart from their model, as state tuning writes them: a file with nothing but `time_state`."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError, WeightsError
from rwkvpipe.base.sizes import FAMILIES, title
from rwkvpipe.weights.layouts import official
from rwkvpipe.weights.lora import train_whole
from rwkvpipe.weights.source import Source, open_source
from rwkvpipe.weights.tensors import Tensors

NAME = "att.time_state"


def read_states(path: str | Path) -> Mapping[str, Tensor] | None:
    """The states in a file, (heads, value, key) for each layer; None for a file that holds anything else."""
    found = states_of(open_source(path))
    return None if found is None else official(str(path), found)[0]


def states_of(source: Source) -> Tensors | None:
    """The same of a file that is open, under its own names."""
    return source.tensors if all(name.endswith(NAME) for name in source.tensors) else None


def with_states(
    config: RwkvConfig, tensors: Mapping[str, Tensor], states: Mapping[str, Tensor], path: str | Path
) -> tuple[RwkvConfig, dict[str, Tensor]]:
    """A model that starts every text from these states. Raises WeightsError, naming `path`, unless they fit it."""
    if "time_state" not in FAMILIES[config.family]:
        raise WeightsError(f"{path}: holds initial states, which {title(config.family)} has none of")
    N = config.head_size
    shape = (config.n_embd // N, N, N)
    names = [f"blocks.{layer}.{NAME}" for layer in range(config.n_layer)]
    if odd := sorted(set(names) ^ set(states)):
        kind = "missing" if odd[0] in names else "unknown"
        raise WeightsError(f"{path}: {odd[0]} is {kind}; the states are of another model")
    found = {name: states[name] for name in names}
    for name, value in found.items():
        if tuple(value.shape) != shape:
            raise WeightsError(f"{path}: {name} is {tuple(value.shape)}, needed is {shape}; it is of another model")
    return config.model_copy(update={"time_state": True}), {**tensors, **found}


def tune_states(model: nn.Module) -> None:
    """Freeze a model but for the states that its texts start from; without such yet, they begin as zeros.

    Raises ConfigError for a family that has none.
    """
    config = model.config
    if "time_state" not in FAMILIES[config.family]:
        raise ConfigError(f"state: {title(config.family)} has no initial states; tune it with lora")
    model.requires_grad_(False)
    if not config.time_state:
        heads, N = config.n_embd // config.head_size, config.head_size
        for block in model.blocks:
            zeros = torch.zeros(heads, N, N, device=model.ln_out.weight.device)
            block.att.time_state = nn.Parameter(zeros, requires_grad=False)
        model.config = config.model_copy(update={"time_state": True})
    train_whole(model, [f"blocks.{layer}.{NAME}" for layer in range(config.n_layer)])
