"""An adapter as the library PEFT keeps one, written and read: a folder with settings, and tensors under PEFT's names.

Of the kinds of adapters it has lora, dora (a setting of lora) and disha (which it calls MiSS). What pissa has learned
is a lora of twice the rank: B A - B0 A0 is one product of [B, -B0] and [A; A0].
"""

import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvpipe.base.config import ExportConfig, LoraConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.base.files import read_json, write_json, write_text
from rwkvpipe.base.strict import check
from rwkvpipe.weights.kinds import PARTS, scaling
from rwkvpipe.weights.layouts import PROJECTIONS, hf7
from rwkvpipe.weights.lora import read_adapter
from rwkvpipe.weights.source import open_source
from rwkvpipe.weights.tensors import read_tensors, write_tensors

log = logging.getLogger("rwkvpipe")

NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_m": "lora_magnitude_vector", "disha": "miss_block"}
FILES = ("adapter_model.safetensors", "adapter_model.bin")
OURS = {theirs: ours for ours, theirs in NAMES.items()}
# settings of PEFT that another value than these would make another adapter of
PLAIN = {"bias": ("none",), "fan_in_fan_out": (False,), "lora_bias": (False,), "layers_to_transform": (None,)}
PLAIN |= {"rank_pattern": ({}, None), "alpha_pattern": ({}, None), "layer_replication": (None,)}
PLAIN |= {"trainable_token_indices": (None,), "use_qalora": (False,), "exclude_modules": (None,)}
PLAIN |= {"alora_invocation_tokens": (None,), "arrow_config": (None,)}
# others (pissa, olora, corda, loftq) take from the base what the adapter begins with, and PEFT does so again to load it
PLAIN |= {"init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}


def write_peft(adapter: str | Path, out: Path, spec: ExportConfig) -> None:
    """Write an adapter into the folder `out`; README.md comes last, so that a folder with it is whole.

    Raises WeightsError for what PEFT has no place for.
    """
    tensors, config = read_adapter(adapter)
    family = read_tensors(adapter)[1].get("family")
    if spec.format == "peft_hf" and family != "rwkv7":
        raise WeightsError(f"{adapter}: format peft_hf is that of RWKV-7, this is {family or 'not told'}; use peft")
    named = _hf if spec.format == "peft_hf" else str
    pairs, whole = _grouped(tensors)
    if config.kind == "pissa":
        pairs = {path: _doubled(parts) for path, parts in pairs.items()}
    found = {}
    for path, parts in pairs.items():
        if "lora_m" in parts and not parts["lora_m"].all():
            raise WeightsError(f"{adapter}: {path} has rows of zeros, whose length PEFT divides by; export the model")
        found |= {f"base_model.model.{named(path)}.{NAMES[part]}": value for part, value in parts.items()}
    modules = _modules(adapter, whole)
    for name, value in whole.items():
        path, _, last = name.rpartition(".")
        found[f"base_model.model.{named(path)}.{last}"] = value
    settings = _settings(config) | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "target_modules": _targets(map(named, pairs), config),
        "modules_to_save": sorted(map(named, modules)) or None,
    }
    dtype = DTYPES[spec.dtype]
    tensors = {name: value.to(dtype).contiguous() for name, value in found.items()}
    write_tensors(out / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(out / "adapter_config.json", settings)
    write_text(out / "README.md", _page(spec, out, config))
    log.info("%s: %s, %d tensors", out, spec.format, len(found))


def is_peft(path: str | Path) -> bool:
    """Whether a path is a folder of PEFT's."""
    return (Path(path) / "adapter_config.json").is_file()


def open_adapter(path: str | Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """Tensors and settings of an adapter: a file of ours, a folder of PEFT's.

    Raises WeightsError for what it would have to guess at. A folder's tensors come in fp32 under RWKV-LM's names.
    """
    if not Path(path).is_dir():
        return read_adapter(path)
    asked = read_json(Path(path) / "adapter_config.json")
    if not isinstance(asked, dict):
        raise WeightsError(f"{path}: adapter_config.json holds no settings")
    for key, plain in PLAIN.items():
        if key in asked and asked[key] not in plain:
            raise WeightsError(f"{path}: {key} is {asked[key]!r}, which is not supported; merge it with PEFT")
    found = {}
    held = next((f for f in FILES if (Path(path) / f).is_file()), FILES[0])
    for name, value in open_source(Path(path) / held).tensors.items():
        ours = _ours(name)
        if ours in found:
            raise WeightsError(f"{path}: {ours} stands twice")
        found[ours] = value.float()
    whole = [name for name in found if name.rpartition(".")[2] not in PARTS]
    return found, _asked(asked, path, _meant(asked, path), whole)


def _ours(name: str) -> str:
    """A tensor's name in a folder of PEFT's as ours."""
    plain = name.removeprefix("base_model.model.").replace(".modules_to_save.", ".")
    plain = re.sub(r"\.default(?=\.weight$|$)", "", plain)
    for theirs, ours in OURS.items():
        if plain.endswith(f".{theirs}"):
            return f"{_place(plain.removesuffix(f'.{theirs}'))}.{ours}"
    module, _, part = plain.rpartition(".")
    return f"{_place(module)}.{part}"


def _place(module: str) -> str:
    """A module's path, or the last parts of one, under RWKV-LM's names."""
    for theirs, ours in _pairs().items():
        if module == theirs or module.endswith(f".{theirs}"):
            head = module.removesuffix(theirs).removeprefix("model.")
            return re.sub(r"^layers\.", "blocks.", head) + ours
    return module


@cache
def _pairs() -> dict[str, str]:
    """Hugging Face's last parts of modules to ours."""
    inside = [f"att.{part}" for part in PROJECTIONS] + ["ln0", "ln1", "ln2", "ffn.key", "ffn.value"]
    found = {_hf(f"blocks.0.{part}").removeprefix("model.layers.0."): part for part in inside}
    return found | {_hf(part).removeprefix("model."): part for part in ("emb", "head", "ln_out")}


def _meant(asked: dict, path: str | Path) -> list[str]:
    """The targets that the settings name, as ours."""
    targets = asked.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise WeightsError(f"{path}: target_modules is {targets!r}; needed is a list of modules")
    short = {theirs.rpartition(".")[2]: ours for theirs, ours in _pairs().items() if theirs != ours}  # k_proj alone
    return [short.get(target, _place(target)) for target in targets]


def _asked(asked: dict, path: str | Path, targets: list[str], whole: list[str]) -> LoraConfig:
    """The settings of an adapter of PEFT's as ours."""
    value: dict[str, Any] = {"rank": asked.get("r"), "targets": targets, "full": whole}
    if asked.get("peft_type") == "LORA":
        value |= {"kind": "dora" if asked.get("use_dora") else "lora", "alpha": asked.get("lora_alpha")}
        value |= {"rslora": bool(asked.get("use_rslora")), "dropout": asked.get("lora_dropout", 0.0)}
    elif asked.get("peft_type") == "MISS" and asked.get("init_weights", True) is True:
        value |= {"kind": "disha", "dropout": asked.get("miss_dropout", 0.0)}
    else:
        raise WeightsError(f"{path}: peft_type {asked.get('peft_type')} is not supported; LORA and plain MISS are")
    if value.get("alpha", 1) is None:
        raise WeightsError(f"{path}: adapter_config.json names no lora_alpha")
    return check(LoraConfig, value, f"{path}/adapter_config.json")


def _hf(path: str) -> str:
    """A module's path in the layout of flash-linear-attention and rwkv7-hf."""
    return next(iter(hf7([f"{path}.weight"]))).removesuffix(".weight")


def _grouped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Parts of adapters by the path of their matrix, and the tensors that were trained whole."""
    pairs: dict[str, dict[str, Tensor]] = {}
    whole = {}
    for name, value in tensors.items():
        path, _, part = name.rpartition(".")
        if part in PARTS:
            pairs.setdefault(path, {})[part] = value
        else:
            whole[name] = value
    return pairs, whole


def _doubled(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        "lora_A": torch.cat([parts["lora_A"], parts["lora_A0"]]),
        "lora_B": torch.cat([parts["lora_B"], -parts["lora_B0"]], 1),
    }


def _settings(config: LoraConfig) -> dict[str, Any]:
    """What PEFT computes by."""
    if config.kind == "disha":
        return {"peft_type": "MISS", "r": config.rank, "miss_dropout": config.dropout, "init_weights": True}
    rank = 2 * config.rank if config.kind == "pissa" else config.rank
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scaling(config) * rank,
        "lora_dropout": config.dropout,
        "use_rslora": False,  # lora_alpha says it all
        "use_dora": config.kind == "dora",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _targets(paths: Iterable[str], config: LoraConfig) -> list[str]:
    """The matrices by the last parts of their paths, or, where single layers were named, by whole paths."""
    if any("blocks." in target for target in config.targets or ()):
        return sorted(paths)
    return sorted({path.split("layers.")[-1].split("blocks.")[-1].lstrip("0123456789").lstrip(".") for path in paths})


def _modules(adapter: str | Path, whole: Mapping[str, Tensor]) -> set[str]:
    """The modules that were trained whole. Raises WeightsError for tensors that are none, or not all of one."""
    modules = {name.rpartition(".")[0] for name in whole}
    for name in whole:
        path, _, last = name.rpartition(".")
        norm = path.rpartition(".")[2].startswith("ln")
        if last not in ("weight", "bias") or (norm and not {f"{path}.weight", f"{path}.bias"} <= whole.keys()):
            raise WeightsError(f"{adapter}: {name} is no whole module, and PEFT keeps no other; export the model")
    return modules


def _page(spec: ExportConfig, out: Path, config: LoraConfig) -> str:
    about = f"{spec.about}\n\n" if spec.about else ""
    names = "Hugging Face's names" if spec.format == "peft_hf" else "RWKV-LM's names"
    return (
        f"---\nlibrary_name: peft\n---\n# {spec.name or out.name}\n\n{about}"
        f"An adapter ({config.kind}, rank {config.rank}) for PEFT, under {names}:\n"
        "`PeftModel.from_pretrained(model, folder)`.\n"
    )
