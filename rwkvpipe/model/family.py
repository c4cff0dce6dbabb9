"""Which architecture is which. A family is a file beside this one and a line in `FAMILIES` of base/sizes.py."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.base.sizes import FAMILIES as NAMES
from rwkvpipe.base.sizes import PRESETS, claimed, title

TRACKED_FILES = ["*.py"]  # families are imported by name


@dataclass(frozen=True)
class Family:
    """An architecture: its module, and the class in it that computes."""

    module: ModuleType
    model: type[nn.Module]


def _family(name: str) -> Family:
    module = import_module(f"rwkvpipe.model.{name}")
    return Family(module, getattr(module, name.capitalize()))


FAMILIES: dict[str, Family] = {name: _family(name) for name in NAMES}

# what tells the others, so that a message can name them (first match counts)
OTHERS = (
    (".att.r_k", "a part of an RWKV-7 checkpoint"),
    (".att.time_maa_rkvw", "an experimental RWKV-6 checkpoint (x060b or x060c)"),
    (".att.time_maa", "a part of an RWKV-6 checkpoint"),
    (".att.gate.weight", "an RWKV-5.1 checkpoint"),
    (".att.ln_x.weight", "an RWKV-5.0 checkpoint"),
    (".att.time_decay", "an RWKV-4 checkpoint"),
    (".lora_A", "an adapter, not a model; merge it first"),
    (".self_attn.", "a transformer"),
    (".att.time_state", "initial states without their model; merge them into it"),
)


def build(config: RwkvConfig) -> nn.Module:
    """A model of these sizes; its weights are those the modules start with (see `initialise`)."""
    return FAMILIES[config.family].model(config)


def complete(config: RwkvConfig) -> RwkvConfig:
    """The same with every size that was left out filled in."""
    return FAMILIES[config.family].module.complete(config)


def released(config: RwkvConfig) -> str | None:
    """The preset that has exactly these sizes; None if no released model has them."""
    plain = complete(config.model_copy(update={"time_state": False}))
    return next((name for name in PRESETS if complete(RwkvConfig(preset=name)) == plain), None)


def contradiction(path: str | Path, config: RwkvConfig) -> str | None:
    """What is odd about a checkpoint whose name, or whose folder's, speaks of another released model; else None."""
    path = Path(path)
    preset = claimed(path.name) or claimed(path.parent.name)
    if preset is None or preset == (sizes := released(config)):
        return None
    return f"its name speaks of {preset}, its sizes are {sizes or 'of no released model'}"


def detect(tensors: dict[str, Tensor]) -> RwkvConfig:
    """Family and sizes of a checkpoint, from names and shapes alone. Raises WeightsError for any other."""
    for family in FAMILIES.values():
        try:
            found = family.module.detect(tensors)
        except (KeyError, IndexError, ValueError) as error:  # names like a member's, shapes or tensors not
            # of several lines, the second and third name the size and what is wrong with it
            lines = [line.strip() for line in str(error).splitlines()]
            why = (": ".join(lines[1:3]) or str(error)).partition(" [type=")[0]
            whole = f"not a whole {title(family.model.__name__.lower())} checkpoint"
            raise WeightsError(f"{whole} ({why}); fetch it again") from None
        if found is not None:
            return found
    if "emb.weight" not in tensors and any(name.endswith(".att.key.weight") for name in tensors):
        raise WeightsError("emb.weight is missing; not a whole checkpoint")
    kind = next((text for part, text in OTHERS if any(part in name for name in tensors)), "no RWKV checkpoint")
    raise WeightsError(f"this is {kind}; give a model of a family known here: {', '.join(FAMILIES)}")
