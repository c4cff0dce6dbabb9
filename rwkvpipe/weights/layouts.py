"""Names that other programs give the tensors of RWKV models, to RWKV-LM's names and back.

Hugging Face layouts: those of RWKV-7 in flash-linear-attention and in rwkv7-hf (one and the same), and those of RWKV-5
and 6 that transformers and llama.cpp know.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from rwkvpipe.base.errors import WeightsError
from rwkvpipe.weights.tensors import Piece, Tensors

PREFIXES = ("_forward_module.", "model.", "module.", "_orig_mod.")  # of DeepSpeed, RWKV-PEFT, torch's DDP and compile
HF7 = "Hugging Face (flash-linear-attention, rwkv7-hf)"
DEAD = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")  # layer 0 has no value residual; never read
MIXES = "rwkvag"  # the order in which old versions of flash-linear-attention stack x_r, x_w, ...
ENDS = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
PARTS = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}
PROJECTIONS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "g_norm"}
LOW_RANK = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}

# what tells checkpoints that cannot be used, the first match counts
FOREIGN = (
    (r"\.lora_[AB]\b|\.lora_(embedding|magnitude)|\.disha$|\.bone$", "an adapter, not a model; merge it first"),
    (r"\.(qweight|qzeros|weight_scale|SCB|quant_map)\b|\.weight\.(absmax|quant)", "quantised; give the original"),
    (r"^(blocks\.\d+\.)qkv\.", "RWKV-7b (with DeepEmbed attention), which is not supported"),
    (r"\.ffn\.s_emb", "RWKV-7a (with DeepEmbed), which is not supported"),
    (r"\.ffn\.enn\.", "a draft of RWKV-8, which is not supported"),
    (r"\.att\.gate_w1$", "RWKV-6a, an experiment, which is not supported"),
    (r"\.att\.time_maa_rkvw_w1$", "RWKV-6b or 6c, experiments, which are not supported"),
)
STRANGERS = (
    (r"self_attn|\.attention\.(query|q_proj)|\.attn\.(c_attn|qkv)", "a transformer"),
    (r"\.mixer\.(A_log|in_proj)|\.mamba\.", "a Mamba model"),
    (r"^(features|layer\d|conv\d|stem)\.|^model\.diffusion_model|\.conv\d?\.weight$", "a model of images or sound"),
)


def official(path: str, tensors: Tensors) -> tuple[Tensors, str]:
    """The tensors under RWKV-LM's names and as it turns them, and what the layout is called.

    Raises WeightsError for what is no RWKV of a kind that can be used, naming it.
    """
    tensors = _without_prefix(path, tensors)
    if any(name.startswith("layers.") and ".attn." in name for name in tensors):
        tensors, layout = _from_hf7(path, tensors), HF7
    elif any(name.startswith("rwkv.blocks.") for name in tensors):
        tensors, layout = _from_hf6(path, tensors), "Hugging Face (transformers)"
    else:
        layout = "RWKV-LM"
    if what := foreign(tensors):
        raise WeightsError(f"{path}: this is {what}")
    return tensors, layout


def _without_prefix(path: str, tensors: Tensors) -> Tensors:
    """Names without what trainers put in front of them (never in the middle)."""
    plan: dict[str, Piece] = {}
    for name in tensors:
        plain = name
        while (prefix := next((p for p in PREFIXES if plain.startswith(p)), None)) is not None:
            plain = plain.removeprefix(prefix)
        if plain in plan:
            raise WeightsError(f"{path}: {plain} stands twice, with and without a prefix")
        plan[plain] = Piece((name,))
    return tensors.made(plan)


def foreign(tensors: Mapping[str, Tensor]) -> str | None:
    """What a checkpoint is that cannot be used, told by names and shapes; None for an RWKV-5.2, 6 or 7."""
    for pattern, what in FOREIGN:
        if any(re.search(pattern, name) for name in tensors):
            return what
    like = tensors.like if isinstance(tensors, Tensors) else tensors
    decay = next((value for name, value in like.items() if name.endswith("att.time_decay")), None)
    if decay is not None and not any(".time_maa" in name or name.endswith("att.r_k") for name in like):
        if not any(name.endswith("att.ln_x.weight") for name in like):
            return "RWKV-4, which is not supported; versions 5.2, 6 and 7 are"
        if not any(name.endswith("att.gate.weight") for name in like):
            return "RWKV-5.0, which is not supported; versions 5.2, 6 and 7 are"
        if decay.dim() < 2 or decay.shape[-1] == 1:
            return "RWKV-5.1, which is not supported; versions 5.2, 6 and 7 are"
    if not any(re.match(r"blocks\.\d+\.att\.", name) for name in like):
        kind = next((text for part, text in STRANGERS if any(re.search(part, name) for name in like)), None)
        return f"{kind or f'no RWKV checkpoint (it holds {min(like)}, ...)'}; give an RWKV-5.2, 6 or 7"
    return None


def _from_hf7(path: str, tensors: Tensors) -> Tensors:
    """RWKV-7 in the layout of flash-linear-attention: low ranks as pairs of linear layers, no (1, 1, D) shapes."""
    ends = {theirs.removeprefix("model."): ours for ours, theirs in ENDS.items()}
    parts = {theirs: ours for ours, theirs in PARTS.items()}
    projections = {theirs: ours for ours, theirs in PROJECTIONS.items()}
    numbers = {theirs: number for number, theirs in LOW_RANK.items()}
    plan: dict[str, Piece] = {}
    for name in tensors:
        head, _, last = name.rpartition(".")
        if head in ends:
            plan[f"{ends[head]}.{last}"] = Piece((name,))
            continue
        found = re.fullmatch(r"layers\.(\d+)\.(\w+)\.(.+)", name)
        if not found:
            raise WeightsError(f"{path}: {name} is unknown in the layout of flash-linear-attention")
        block, part, rest = f"blocks.{found[1]}", found[2], found[3]
        if part in parts:
            plan[f"{block}.{parts[part]}.{rest}"] = Piece((name,))
        elif part != "attn":
            plan[f"{block}.{part}.{rest}"] = Piece((name,))
        elif (low := re.fullmatch(r"([wvag])_lora\.lora\.(.+)", rest)) and low[2] in numbers:
            change = _turned if numbers[low[2]] in "12" else _row
            plan[f"{block}.att.{low[1]}{numbers[low[2]]}"] = Piece((name,), change)
        elif rest == "x_x":
            for place, letter in enumerate(MIXES):
                plan[f"{block}.att.x_{letter}"] = Piece((name,), _nth(place))
        elif rest.partition(".")[0] in projections:
            first, _, last = rest.partition(".")
            plan[f"{block}.att.{projections[first]}.{last}"] = Piece((name,))
        else:
            plan[f"{block}.att.{rest}"] = Piece((name,))
    return tensors.made(plan)


def _from_hf6(path: str, tensors: Tensors) -> Tensors:
    """RWKV-5 and 6 as transformers has them: RWKV-LM's tensors, other names."""
    plan = {}
    for name in tensors:
        plain = re.sub(r"^rwkv\.", "", name)
        plain = re.sub(r"^embeddings\.", "emb.", plain).replace(".pre_ln.", ".ln0.")
        plain = plain.replace(".attention.", ".att.").replace(".feed_forward.", ".ffn.")
        plan[plain] = Piece((name,))
    return tensors.made(plan)


def _turned(value: Tensor) -> Tensor:
    return value.T.contiguous()


def _row(value: Tensor) -> Tensor:
    return value.reshape(1, 1, -1)


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1)


def _nth(place: int):
    return lambda value: value.reshape(len(MIXES), 1, 1, -1)[place].clone()


def hf7(names: Iterable[str]) -> dict[str, Piece]:
    """How the layout of flash-linear-attention and rwkv7-hf is made of RWKV-7's official tensors."""
    plan: dict[str, Piece] = {}
    for name in names:
        if name in DEAD:
            continue
        first, *rest = name.split(".")
        if first in ENDS:
            plan[".".join((ENDS[first], *rest))] = Piece((name,))
            continue
        layer, part, *rest = rest
        block = f"model.layers.{layer}"
        if part in PARTS:
            plan[".".join((block, PARTS[part], *rest))] = Piece((name,))
        elif part == "ffn":
            plan[".".join((block, part, *rest))] = Piece((name,), _flat if rest == ["x_k"] else _same)
        elif re.fullmatch(r"[wvag][012]", rest[0]):
            letter, number = rest[0]
            change = _turned if number in "12" else _flat
            plan[f"{block}.attn.{letter}_lora.lora.{LOW_RANK[number]}"] = Piece((name,), change)
        elif rest[0] in PROJECTIONS:
            plan[".".join((block, "attn", PROJECTIONS[rest[0]], *rest[1:]))] = Piece((name,))
        else:
            plan[f"{block}.attn.{rest[0]}"] = Piece((name,), _flat if rest[0] in ("k_k", "k_a") else _same)
    return plan


def _same(value: Tensor) -> Tensor:
    return value
