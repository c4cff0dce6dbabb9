"""An adapter as the library PEFT keeps one: a folder with its settings and its tensors under PEFT's names.

Of the kinds of adapters it has lora, dora (a setting of lora) and disha (which it calls MiSS). What pissa has learned
is a lora of twice the rank: B A - B0 A0 is one product of [B, -B0] and [A; A0].
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvpipe.base.config import ExportConfig, LoraConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.base.files import write_json, write_text
from rwkvpipe.weights.kinds import PARTS, scaling
from rwkvpipe.weights.layouts import hf7
from rwkvpipe.weights.lora import read_adapter
from rwkvpipe.weights.tensors import read_tensors, write_tensors

log = logging.getLogger("rwkvpipe")

NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_m": "lora_magnitude_vector", "disha": "miss_block"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}


def write_peft(adapter: str | Path, out: Path, spec: ExportConfig) -> None:
    """Write an adapter into the folder `out`; README.md comes last, so that a folder with it is whole.

    Raises WeightsError for what PEFT has no place for.
    """
    tensors, config, _ = read_adapter(adapter)
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
