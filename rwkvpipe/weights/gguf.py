"""GGUF files as llama.cpp reads RWKV-6 and RWKV-7, written and read; the numbers are kept, nothing is quantised.

llama.cpp wants vectors, norms and the small matrices of the token shift in fp32 (bf16 and fp16 become it exactly), the
low-rank matrices turned, the mixes of a layer as one tensor, and something in layer 0's value residual, which it never
reads.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, LlamaFileType, TokenType
from torch import Tensor

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.base.files import atomic
from rwkvpipe.weights.head import read_head
from rwkvpipe.weights.tensors import Piece, Tensors, from_bytes, piece_of, said, to_bytes

logging.getLogger("gguf").setLevel(logging.WARNING)  # its events are no events of ours

FAMILIES = {"rwkv6": "rwkv6", "rwkv7": "rwkv7"}  # ours to llama.cpp's
DTYPES = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16, Kind.F64: torch.float64}
KINDS = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
FILES = {torch.float32: LlamaFileType.ALL_F32, torch.float16: LlamaFileType.MOSTLY_F16}
FILES[torch.bfloat16] = LlamaFileType.MOSTLY_BF16
STORED = "rwkvpipe.dtype"  # our own key: the dtype that the tensors had
CONTEXT = 1 << 20  # a bound that llama.cpp asks for; the state has none

ENDS = {"emb": "token_embd", "blocks.0.ln0": "token_embd_norm", "ln_out": "output_norm", "head": "output"}
PARTS = {"ln1": "attn_norm", "ln2": "attn_norm_2", "att.ln_x": "time_mix_ln"}
PARTS |= {f"att.{name}": f"time_mix_{name}" for name in ("receptance", "key", "value", "output", "gate")}
PARTS |= {f"ffn.{name}": f"channel_mix_{name}" for name in ("receptance", "key", "value")}
ROWS = {  # tensors without `.weight` at the end of their official names
    "rwkv7": {
        **{f"att.{letter}{number}": f"time_mix_{letter}{number}" for letter in "wav" for number in "012"},
        **{"att.g1": "time_mix_g1", "att.g2": "time_mix_g2", "ffn.x_k": "channel_mix_lerp_k"},
        **{f"att.{name}": f"time_mix_{name}" for name in ("k_k", "k_a", "r_k")},
    },
    "rwkv6": {
        **{"att.time_maa_x": "time_mix_lerp_x", "att.time_maa_w1": "time_mix_w1", "att.time_maa_w2": "time_mix_w2"},
        **{"att.time_decay": "time_mix_decay", "att.time_faaaa": "time_mix_first"},
        **{f"att.time_decay_w{number}": f"time_mix_decay_w{number}" for number in "12"},
        **{f"ffn.time_maa_{letter}": f"channel_mix_lerp_{letter}" for letter in "kr"},
    },
}
FUSED = {"rwkv7": ("att.x_", "rwkvag"), "rwkv6": ("att.time_maa_", "wkvrg")}
TURNED = re.compile(r"att\.([wavg][12]|time_maa_w1|time_decay_w[12])$")
EXACT = re.compile(r"_norm(_2)?\.|time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused)\.")  # always fp32


@dataclass(frozen=True)
class Words:
    """A vocabulary as the file has it, without entries for ids alone; `turn` and `end` are ids that end those."""

    texts: list[bytes] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    turn: int | None = None
    end: int | None = None
    template: str | None = None


def words(entries: dict[int, bytes], rows: int, *, end: int | None, turn: int | None, template: str) -> Words:
    """A vocabulary of byte strings for so many rows; ids without an entry are marked as unused."""
    found = []
    for number in range(rows):
        if number in entries:  # escaped as in a Python literal, as llama.cpp reads it
            found.append((repr(entries[number])[2:-1].encode(), TokenType.NORMAL))
        elif number == end:
            found.append((b"<s>", TokenType.CONTROL))
        else:
            found.append((f"[PAD{number}]".encode(), TokenType.UNUSED))
    return Words([text for text, _ in found], [kind for _, kind in found], turn, end, template)


def _layers(names: Iterable[str]) -> int:
    return 1 + max(int(found[1]) for name in names if (found := re.match(r"(?:blocks|blk)\.(\d+)\.", name)))


def plan(family: str, names: Iterable[str]) -> dict[str, Piece]:
    """How llama.cpp's tensors are made of the official ones of these names."""
    names, made = list(names), {}
    for name in names:
        head, _, last = name.rpartition(".")
        if head in ENDS:
            made[f"{ENDS[head]}.{last}"] = Piece((name,))
            continue
        _, layer, rest = name.split(".", 2)
        part, _, last = rest.rpartition(".")
        if part in PARTS:
            made[f"blk.{layer}.{PARTS[part]}.{last}"] = Piece((name,))
        elif layer == "0" and rest in ("att.v0", "att.v1", "att.v2") and family == "rwkv7":
            continue
        elif rest in ROWS[family]:
            made[f"blk.{layer}.{ROWS[family][rest]}.weight"] = Piece((name,), _there(rest))
    prefix, letters = FUSED[family]
    for layer in range(_layers(names)):
        mixes = tuple(f"blocks.{layer}.{prefix}{letter}" for letter in letters)
        made[f"blk.{layer}.time_mix_lerp_fused.weight"] = Piece(mixes, _fused)
    if family == "rwkv7":  # something of the right shape, never read
        made |= {f"blk.0.time_mix_v{n}.weight": made[f"blk.0.time_mix_a{n}.weight"] for n in "012"}
    return made


def _there(rest: str):
    if TURNED.search(rest):
        return lambda value: value.T.contiguous()
    if rest == "att.time_maa_w2":
        return lambda value: value.transpose(1, 2).contiguous()
    if rest == "att.time_faaaa":
        return lambda value: value
    return lambda value: value.reshape(-1)


def _fused(*mixes: Tensor) -> Tensor:
    return torch.stack([mix.reshape(1, 1, -1) for mix in mixes])


def back(family: str, names: Iterable[str], head_size: int) -> dict[str, Piece]:
    """How the official tensors are made of llama.cpp's of these names. Raises KeyError for an unknown name."""
    ends = {theirs: ours for ours, theirs in ENDS.items()}
    parts = {theirs: ours for ours, theirs in PARTS.items()}
    rows = {theirs: ours for ours, theirs in ROWS[family].items()}
    prefix, letters = FUSED[family]
    made: dict[str, Piece] = {}
    for name in names:
        head, _, last = name.rpartition(".")
        if head in ends:
            made[f"{ends[head]}.{last}"] = Piece((name,))
            continue
        _, layer, rest = head.split(".", 2) if head.count(".") >= 2 else ("", "", "")
        if rest in parts:
            made[f"blocks.{layer}.{parts[rest]}.{last}"] = Piece((name,))
        elif rest == "time_mix_lerp_fused":
            for place, letter in enumerate(letters):
                made[f"blocks.{layer}.{prefix}{letter}"] = Piece((name,), _cut(place, len(letters)))
        elif rest.startswith("time_mix_lerp_") and rest not in rows:
            made[f"blocks.{layer}.{prefix}{rest[-1]}"] = Piece((name,), lambda value: value.reshape(1, 1, -1))
        elif rest not in rows:
            raise KeyError(name)
        elif not (layer == "0" and re.fullmatch("time_mix_v[012]", rest)):
            made[f"blocks.{layer}.{rows[rest]}"] = Piece((name,), _home(rows[rest], head_size))
    return made


def _cut(place: int, count: int):
    return lambda value: value.reshape(count, 1, 1, -1)[place].clone()


def _home(rest: str, head_size: int):
    if rest == "att.r_k":
        return lambda value: value.reshape(-1, head_size)
    if TURNED.search(rest) or rest == "att.time_maa_w2" or rest == "att.time_faaaa":
        return _there(rest)
    return lambda value: value.reshape(1, 1, -1)


def write_gguf(path: str | Path, config: RwkvConfig, tensors: Tensors, *, name: str, vocabulary: Words) -> None:
    """Write a model for llama.cpp, tensor by tensor, whole or not at all. Raises WeightsError for other families."""
    if config.family not in FAMILIES:
        raise WeightsError(f"{path}: llama.cpp knows RWKV-6 and RWKV-7, this is {config.family}; use another format")
    if not config.ln0:
        raise WeightsError(f"{path}: llama.cpp needs ln0, which is folded into emb here; use format hf")
    dtypes = {value.dtype for value in tensors.like.values()}
    if not dtypes <= set(KINDS):
        raise WeightsError(f"{path}: numbers of {dtypes - set(KINDS)}; give dtype: one of fp32, bf16 and fp16")
    made = tensors.made(plan(config.family, tensors))
    with atomic(path, ".gguf") as part:
        writer = GGUFWriter(part, FAMILIES[config.family])
        writer.add_name(name)
        main = tensors.like["emb.weight"].dtype
        writer.add_file_type(FILES[main])
        if len(dtypes) == 1:
            writer.add_string(STORED, str(main).removeprefix("torch."))
        _describe(writer, config, tensors)
        _vocabulary(writer, config, vocabulary)
        exact = {name for name, like in made.like.items() if like.dim() < 2 or EXACT.search(name)}
        for name, like in made.like.items():
            dtype = torch.float32 if name in exact else like.dtype
            size = like.numel() * dtype.itemsize
            writer.add_tensor_info(name, tuple(like.shape), np.dtype(np.float32), size, raw_dtype=KINDS[dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in made:
            value = made[name].float() if name in exact else made[name]
            writer.write_tensor_data(np.frombuffer(to_bytes(value), dtype=np.uint8))
        writer.close()


def _describe(writer: GGUFWriter, config: RwkvConfig, tensors: Tensors) -> None:
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(config.head_size)
    writer.add_feed_forward_length(tensors.like["blocks.0.ffn.key.weight"].shape[0])
    writer.add_head_count(0)  # asked for and never used
    if config.family == "rwkv7":
        writer.add_decay_lora_rank(config.d_decay)
        writer.add_iclr_lora_rank(config.d_aaa)
        writer.add_value_residual_mix_lora_rank(config.d_mv or config.d_aaa)
        writer.add_gate_lora_rank(config.d_gate)
    else:
        writer.add_rescale_every_n_layers(0)
        writer.add_time_mix_extra_dim(tensors.like["blocks.0.att.time_maa_w2"].shape[1])
        writer.add_time_decay_extra_dim(tensors.like["blocks.0.att.time_decay_w1"].shape[1])


def _vocabulary(writer: GGUFWriter, config: RwkvConfig, given: Words) -> None:
    if not given.texts:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config.vocab_size)
        return
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(given.texts)
    writer.add_token_types(given.kinds)
    if given.end is not None:
        writer.add_bos_token_id(given.end)
        writer.add_eos_token_id(given.end)
        writer.add_pad_token_id(given.end)
    if given.turn is not None:
        writer.add_eot_token_id(given.turn)
    if given.template is not None:
        writer.add_chat_template(given.template)


def open_gguf(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a GGUF file under official names, their data unread, and its metadata that are short texts.

    Raises WeightsError for what is damaged, quantised, or no RWKV-6 or 7.
    """
    head = read_head(path)
    facts, arch = head.facts, head.facts.get("general.architecture")
    family = next((ours for ours, theirs in FAMILIES.items() if theirs == arch), None)
    if family is None:
        raise WeightsError(f"{path}: a GGUF file of a {arch}; give one of RWKV-6 or RWKV-7")
    like, size = {}, path.stat().st_size
    for name, place in head.places.items():
        if place.kind not in DTYPES:
            kind = Kind(place.kind).name if place.kind in set(Kind) else f"type {place.kind}"
            raise WeightsError(f"{path}: {name} is quantised ({kind}); give the weights it was made from")
        like[name] = torch.empty(place.shape, dtype=DTYPES[place.kind], device="meta")
        if head.start + place.start + like[name].nbytes > size:
            raise WeightsError(f"{path}: damaged or cut short ({name} ends behind its end); fetch it again")

    def load(name: str) -> Tensor:
        data = piece_of(path, head.start + head.places[name].start, like[name].nbytes)
        return from_bytes(data, like[name].dtype, tuple(like[name].shape))

    try:
        if (key := f"{arch}.wkv.head_size") not in facts:
            raise ValueError(f"{key} is missing")
        made = back(family, like, int(facts[key]))
        stored, rescaled = facts.get(STORED), int(facts.get(f"{arch}.rescale_every_n_layers", 0))
        dtype = next((dtype for dtype in KINDS if str(dtype) == f"torch.{stored}"), None)
        made = {name: _as_it_was(name, piece, dtype, rescaled) for name, piece in made.items()}
        tensors = Tensors(like, load).made(made)
    except KeyError as error:
        raise WeightsError(f"{path}: {error.args[0]} is unknown in an {family} model; leave it out") from None
    except (ValueError, TypeError, RuntimeError) as error:  # names or shapes that are none of the family's
        raise WeightsError(f"{path}: not a whole {family} model ({said(error)}); fetch it again") from None
    return tensors, {key: value for key, value in facts.items() if isinstance(value, str) and len(value) < 1000}


def _as_it_was(name: str, piece: Piece, dtype: torch.dtype | None, rescaled: int) -> Piece:
    """With the dtype that the tensor had before, and without what makes fp16 last through many layers."""
    factor = 1
    if rescaled and re.search(r"att\.output\.weight|ffn\.value\.weight", name):
        factor = 2 ** (int(name.split(".")[1]) // rescaled)

    def change(*values: Tensor) -> Tensor:
        value = piece.change(*values)
        value = value * factor if factor > 1 else value
        return value if dtype is None else value.to(dtype)

    return Piece(piece.sources, change)
