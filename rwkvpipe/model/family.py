"""Which architecture is which. A family is a module with `complete` and `detect`, and a line in `FAMILIES`."""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.model import rwkv7


@dataclass(frozen=True)
class Family:
    """An architecture: its module, and the class in it that computes."""

    module: ModuleType
    model: type[nn.Module]


FAMILIES: dict[str, Family] = {"rwkv7": Family(rwkv7, rwkv7.Rwkv7)}

# what tells the others, so that a message can name them (first match counts)
OTHERS = (
    (".att.time_maa", "an RWKV-6 checkpoint"),
    (".att.gate.weight", "an RWKV-5 checkpoint"),
    (".att.time_decay", "an RWKV-4 or RWKV-5 checkpoint"),
    (".lora_A", "an adapter, not a model; merge it first"),
    (".self_attn.", "a transformer"),
)


def build(config: RwkvConfig) -> nn.Module:
    """A model of these sizes; its weights are those the modules start with (see `initialise`)."""
    model = FAMILIES[config.family].model(config)
    if not config.ln0:
        model.blocks[0].ln0 = nn.Identity()
    return model


def complete(config: RwkvConfig) -> RwkvConfig:
    """The same with every size that was left out filled in."""
    return FAMILIES[config.family].module.complete(config)


def detect(tensors: dict[str, Tensor]) -> RwkvConfig:
    """Family and sizes of a checkpoint, from names and shapes alone. Raises WeightsError for any other."""
    for family in FAMILIES.values():
        try:
            found = family.module.detect(tensors)
        except (KeyError, IndexError, ValueError) as error:  # names like a member's, shapes or tensors not
            raise WeightsError(f"not a whole {family.model.__name__} checkpoint ({error}); fetch it again") from None
        if found is not None:
            return found
    kind = next((text for part, text in OTHERS if any(part in name for name in tensors)), "no RWKV checkpoint")
    raise WeightsError(f"this is {kind}; give a model of a family known here: {', '.join(FAMILIES)}")
