"""Models ready to write, with what was trained beside them put in its place and merged into nothing."""

from pathlib import Path

import torch
from torch import nn

from rwkvpipe.base.errors import PipeError, WeightsError
from rwkvpipe.model.family import build
from rwkvpipe.weights import lora, store
from rwkvpipe.weights.beside import Beside
from rwkvpipe.weights.peft import is_peft, open_adapter
from rwkvpipe.weights.states import read_states, with_states


def load_speaker(model: str | Path, adapter: str | Path | None, device: str | torch.device = "cpu") -> nn.Module:
    """A model ready to write, an adapter beside its matrices or initial states in it where a file of them is given.

    Raises WeightsError for an adapter that belongs to other weights.
    """
    if adapter is None:
        return store.load_model(model, device)
    states = None if is_peft(adapter) else read_states(adapter)
    beside = Beside(model, adapter)
    if states is not None:
        found = store.tensors_of(beside.found)
        beside.check()
        config, tensors = with_states(*found, states, adapter)
        network = build(config)
        network.load_state_dict(tensors)
        return network.to(device).eval()
    tensors, settings = open_adapter(adapter)
    network = store.model_of(beside.found)
    beside.check()
    try:
        lora.check_fits(network, tensors, settings)
    except PipeError as error:
        raise WeightsError(f"{adapter}: {error}") from None
    lora.inject(network, settings.model_copy(update={"quantise": None}))  # as merging has it
    lora.load_adapter(network, tensors)
    return network.to(device).eval()
