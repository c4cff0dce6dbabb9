"""The sizes of an RWKV language model: which family has which, and those of the released models."""

import difflib
import re
from typing import Any, Literal

from pydantic import model_validator

from rwkvpipe.base.strict import Count, Strict

# A family is the class Rwkv7 (say) of model/rwkv7.py, and a line here that names what only some families have.
FAMILIES: dict[str, tuple[str, ...]] = {
    "rwkv5": (),
    "rwkv6": ("d_mix", "d_decay", "time_state"),
    "rwkv7": ("d_decay", "d_aaa", "d_mv", "d_gate", "time_state"),
}


def _preset(family: str, n_layer: int, n_embd: int, **others: int) -> dict[str, Any]:
    return {"family": family, "n_layer": n_layer, "n_embd": n_embd, "head_size": 64, "vocab_size": 65536, **others}


def _preset7(n_layer: int, n_embd: int, d_decay: int, d_mv: int, d_gate: int) -> dict[str, Any]:
    ranks = {"d_decay": d_decay, "d_aaa": d_decay, "d_mv": d_mv, "d_gate": d_gate}
    return _preset("rwkv7", n_layer, n_embd, **ranks)


PRESETS: dict[str, dict[str, Any]] = {
    "rwkv5-0.1b": _preset("rwkv5", 12, 768),
    "rwkv5-0.4b": _preset("rwkv5", 24, 1024),
    "rwkv5-1.5b": _preset("rwkv5", 24, 2048),
    "rwkv5-3b": _preset("rwkv5", 32, 2560),
    "rwkv5-7b": _preset("rwkv5", 32, 4096),
    "rwkv6-1.6b": _preset("rwkv6", 24, 2048, d_mix=32, d_decay=64),
    "rwkv6-3b": _preset("rwkv6", 32, 2560, d_mix=32, d_decay=64),
    "rwkv6-7b": _preset("rwkv6", 32, 4096, d_mix=64, d_decay=128),
    "rwkv6-14b": _preset("rwkv6", 61, 4096, d_mix=64, d_decay=128),
    "rwkv7-0.1b": _preset7(12, 768, 64, 32, 128),
    "rwkv7-0.4b": _preset7(24, 1024, 64, 32, 128),
    "rwkv7-1.5b": _preset7(24, 2048, 96, 64, 256),
    "rwkv7-2.9b": _preset7(32, 2560, 96, 64, 320),
    "rwkv7-7.2b": _preset7(32, 4096, 128, 96, 480),
    "rwkv7-13.3b": _preset7(61, 4096, 192, 128, 384),
}
# as in RWKV-x060-World-1B6-v2.1-20240328-ctx4096, rwkv7-g1-0.1b-20250307-ctx4096, RWKV-5-World-3B-v2, rwkv7-0.1b,
# RWKV7-Goose-World2.8-0.1B-HF, RWKV-v5-Eagle-World-7B-v2, v6-Finch-14B-HF
_RELEASE = re.compile(
    r"(?:rwkv-?(?:x0|v)?|(?<![a-z0-9])v)([567])(?:[0-9]{1,2})?-(?:[a-z][a-z0-9.]*-){0,3}(\d+)(?:\.(\d)b|b(\d?))"
    r"(?![a-z0-9])",
    re.IGNORECASE,
)


class RwkvConfig(Strict):
    """The sizes of an RWKV language model."""

    preset: str | None = None
    """A released model whose sizes hold where none is given: rwkv7-0.1b to rwkv7-13.3b, rwkv6-1.6b to rwkv6-14b,
    rwkv5-0.1b to rwkv5-7b; beside family, the size alone (0.1b). `vocab_size: null` takes the tokenizer's."""
    family: Literal[tuple(FAMILIES)] = "rwkv7"
    """Architecture."""
    n_layer: Count = 12
    """Layers (2 at least to start from nothing: initial values divide by n_layer - 1)."""
    n_embd: Count = 768
    """Width; a multiple of head_size."""
    head_size: Count = 64
    """Width of a head."""
    vocab_size: Count | None = None
    """Rows of the embedding; left out, the tokenizer's size."""
    dim_ffn: Count | None = None
    """Width of the channel mix; left out, 4 n_embd (rwkv5, rwkv6: 3.5 n_embd, in 32s)."""
    d_mix: Count | None = None
    """rwkv6: rank of the low-rank matrices of the token shift; left out, that of the released models of this width
    (so for all ranks of rwkv6)."""
    d_decay: Count | None = None
    """rwkv6, rwkv7: rank of the decay's; rwkv7: left out, RWKV-LM's rule (so for the next three)."""
    d_aaa: Count | None = None
    """rwkv7: rank of the in-context learning rate's."""
    d_mv: Count | None = None
    """rwkv7: rank of the value residual's."""
    d_gate: Count | None = None
    """rwkv7: rank of the gate's."""
    time_state: bool = False
    """rwkv6, rwkv7: whether the model has states of its own that every text starts from; else those are zero."""
    ln0: bool = True
    """Whether the embedding is normalised; checkpoints that have that folded into it go without."""

    @model_validator(mode="before")
    @classmethod
    def _start(cls, value: Any) -> Any:
        """Sizes of the preset where none are given; the name has served and is not kept."""
        if not isinstance(value, dict) or not isinstance(value.get("preset"), str):
            return value
        given = {name: size for name, size in value.items() if name != "preset"}
        asked, family = value["preset"].lower(), given.get("family")
        name = asked if asked in PRESETS else f"{family or 'rwkv7'}-{asked}"
        if name not in PRESETS:
            near = difflib.get_close_matches(asked, PRESETS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PRESETS)}"
            raise ValueError(f"there is no preset {value['preset']}; {hint}")
        if family not in (None, PRESETS[name]["family"]):
            raise ValueError(f"preset {name} is no model of family {family}; leave one of the two out")
        return PRESETS[name] | given

    @model_validator(mode="after")
    def _fits(self):
        if self.n_embd % self.head_size:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of head_size {self.head_size}")
        own = FAMILIES[self.family]
        for name in {name for names in FAMILIES.values() for name in names}.difference(own):
            if getattr(self, name):
                has = f"of its own it has {', '.join(own)}" if own else "it has none of its own"
                raise ValueError(f"{name} does not belong to family {self.family}; {has}")
        return self


def title(family: str) -> str:
    """A family as people write it."""
    return f"RWKV-{family.removeprefix('rwkv')}" if family.startswith("rwkv") else family


def claimed(name: str) -> str | None:
    """The preset that a file's or a repository's name speaks of, None if it speaks of none."""
    found = _RELEASE.search(name)
    if found is None:
        return None
    family, whole, part = found[1], found[2], found[3] or found[4]
    preset = f"rwkv{family}-{whole}{f'.{part}' if part else ''}b"
    return preset if preset in PRESETS else None
