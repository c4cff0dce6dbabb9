"""Weights with what was trained beside them in them: an adapter of ours or of PEFT, or initial states."""

from pathlib import Path

import torch
from torch import Tensor

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import PipeError, WeightsError
from rwkvpipe.model.family import build
from rwkvpipe.weights import store
from rwkvpipe.weights.beside import Beside
from rwkvpipe.weights.lora import check_fits, merged
from rwkvpipe.weights.peft import is_peft, open_adapter
from rwkvpipe.weights.states import read_states, with_states


def with_adapter(model: str | Path, adapter: str | Path) -> tuple[RwkvConfig, dict[str, Tensor]]:
    """Sizes and tensors of a model with an adapter or states in them: computed in fp64, rounded once.

    Whatever the adapter was trained beside, rounded or not, it is merged into the weights as they are here. Raises
    WeightsError, naming the adapter, unless it fits exactly and belongs to these weights.
    """
    states = None if is_peft(adapter) else read_states(adapter)
    if states is None:
        tensors, settings = open_adapter(adapter)
    beside = Beside(model, adapter)
    config, weights = store.tensors_of(beside.found)
    beside.check()
    if states is not None:
        return with_states(config, weights, states, adapter)
    with torch.device("meta"):
        network = build(config)
    try:
        check_fits(network, tensors, settings)
    except PipeError as error:
        raise WeightsError(f"{adapter}: {error}") from None
    return config, merged(weights, tensors, settings)
