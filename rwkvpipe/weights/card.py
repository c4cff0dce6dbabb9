"""What stands beside the weights in a hub's folder: settings that programs read, and a page for people."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.tokenizer.load import Tokenizer
from rwkvpipe.weights.tensors import Tensors

WORLD_FILE = "rwkv_vocab_v20230424.txt"  # also what rwkv7-hf calls any vocabulary
VERSIONS = {"rwkv5": "x052", "rwkv6": "x060", "rwkv7": "x070"}  # RWKV-LM's names
# rwkvpipe.tokenizer.chat as a template; the comment is how llama.cpp knows the form
TEMPLATE = """{#- rwkv-world -#}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ 'Assistant: ' + message['content'] + '\\n\\n' }}
{%- else -%}
{%- set lines = message['content'].replace('\\r\\n', '\\n').split('\\n') | select -%}
{%- set words = (lines | join('\\n')).strip() -%}
{%- set found = 'Function output:' -%}
{%- set words = found + '\\n' + words if message['role'] == 'tool' and not words.startswith(found) else words -%}
{{ ('System: ' if message['role'] == 'system' else 'User: ') + words + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""

# rwkv7-hf's classes under the names that config.json gives them
CODE = {
    "configuration_rwkv7.py": "from rwkv7_hf.configuration_rwkv7 import RWKV7Config\n",
    "modeling_rwkv7.py": "from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM, RWKV7Model\n",
    "tokenization_rwkv7.py": "from rwkv7_hf.tokenization_rwkv7 import RWKV7Tokenizer\n",
}
AUTO = {
    "AutoConfig": "configuration_rwkv7.RWKV7Config",
    "AutoModel": "modeling_rwkv7.RWKV7Model",
    "AutoModelForCausalLM": "modeling_rwkv7.RWKV7ForCausalLM",
}


def turn_end(tokenizer: Tokenizer | None) -> int | None:
    """The one id that ends a turn of talk, if there is one."""
    if tokenizer is None or not isinstance(getattr(tokenizer, "entries", None), dict):
        return None
    found = tokenizer.encode("\n\n") if b"\n" in tokenizer.entries.values() else []
    return found[0] if len(found) == 1 else None


def main_dtype(like: dict[str, Tensor]) -> str:
    """The dtype of most of the numbers."""
    sums: dict[torch.dtype, int] = {}
    for value in like.values():
        sums[value.dtype] = sums.get(value.dtype, 0) + value.numel()
    return str(max(sums, key=sums.__getitem__)).removeprefix("torch.")


def hub_config(config: RwkvConfig, *, ctx_len: int, eos: int | None, dtype: str) -> dict[str, Any]:
    """config.json as RWKVTune reads it; read back here too."""
    version = VERSIONS[config.family]
    described = {
        "model_type": config.family,
        "architectures": [f"RWKV{config.family[-1]}Model"],
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "vocab_size": config.vocab_size,
        "head_size_a": config.head_size,
        "head_size_divisor": 8,
        "ctx_len": ctx_len,
        "dim_att": config.n_embd,
        "dim_ffn": config.dim_ffn,
        "my_testing": version,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": 0,
        "use_cache": True,
        "tie_word_embeddings": False,
    }
    if config.family == "rwkv7":
        described |= {"dim_att_lora": config.d_decay, "dim_gate_lora": config.d_gate, "dim_mv_lora": config.d_mv}
    return described


def hf_config(config: RwkvConfig, *, eos: int | None, dtype: str) -> dict[str, Any]:
    """config.json as flash-linear-attention and rwkv7-hf read it."""
    heads = config.n_embd // config.head_size
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "auto_map": AUTO,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        **{"head_dim": config.head_size, "num_heads": heads},
        **{"intermediate_size": config.dim_ffn, "hidden_ratio": config.dim_ffn / config.n_embd},
        **{"decay_low_rank_dim": config.d_decay, "a_low_rank_dim": config.d_aaa},
        **{"v_low_rank_dim": config.d_mv or 32, "gate_low_rank_dim": config.d_gate},
        "value_dim": [config.n_embd] * config.n_layer,
        **{"hidden_act": "sqrelu", "attn_mode": "chunk", "norm_first": config.ln0, "norm_bias": True, "norm_eps": 1e-5},
        **{"bos_token_id": None, "eos_token_id": eos, "pad_token_id": 0},
        **{"use_cache": True, "tie_word_embeddings": False},
    }


def generation_config(eos: int | None, length: int) -> dict[str, Any]:
    """generation_config.json: how released models are sampled."""
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.85, "top_k": 0, "repetition_penalty": 1.0}
    return {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": 0, **sampling, "max_length": length}


def tokenizer_config(tokenizer: Tokenizer | None, *, ctx_len: int, hf: bool, rows: int) -> dict[str, Any]:
    """tokenizer_config.json of a vocabulary of byte strings: RWKVTune's, or with `hf` rwkv7-hf's."""
    if hf:
        named = {"tokenizer_class": "RWKV7Tokenizer", "model_vocab_size": rows, "errors": "replace"}
        named["auto_map"] = {"AutoTokenizer": ["tokenization_rwkv7.RWKV7Tokenizer", None]}
        named |= {"pad_token": "<|padding|>", "eos_token": "<|endoftext|>"}
    else:
        ends = turn_end(tokenizer) is not None
        named = {"tokenizer_class": "RWKV_TOKENIZER", "pad_token": None, "eos_token": "\n\n" if ends else None}
        named |= {"add_bos_token": False, "add_eos_token": False}
    named |= {"bos_token": None, "unk_token": None, "model_max_length": ctx_len, "clean_up_tokenization_spaces": False}
    return named | {"chat_template": TEMPLATE}


def _number(value: float) -> str:
    return f"{value:,.4f}".rstrip("0").rstrip(".")


def page(name: str, config: RwkvConfig, tensors: Tensors, *, format: str, about: str, scores: Sequence[dict]) -> str:
    """README.md: what the model is, what it scored, how it is used."""
    count = sum(value.numel() for value in tensors.like.values())
    version = config.family[-1].replace("5", "5.2")
    lines = ["---", "tags:", "- rwkv", f"- {config.family}", "pipeline_tag: text-generation", "---", ""]
    lines += [f"# {name}", ""]
    lines += [about, ""] if about else []
    lines += [f"An RWKV-{version} language model of {count:,} parameters.", ""]
    lines += ["| layers | width | head size | channel mix | vocabulary | numbers |", f"|{' --- |' * 6}"]
    sizes = (config.n_layer, config.n_embd, config.head_size, config.dim_ffn, config.vocab_size)
    lines += [f"| {' | '.join(map(str, sizes))} | {main_dtype(tensors.like)} |", ""]
    if scores:
        lines += ["## Scores", "", "| benchmark | score | 95 % interval | questions | better |"]
        lines += [f"|{' --- |' * 5}"]
        for row in scores:
            ends = f"{_number(row['low'])} to {_number(row['high'])}"
            lines.append(f"| {row['benchmark']} | {_number(row['score'])} | {ends} | {row['n']:,} | {row['better']} |")
        lines.append("")
    lines += ["## Use", "", *_use(name, format), ""]
    return "\n".join(lines)


def _use(name: str, format: str) -> list[str]:
    if format == "hf":
        return [
            "With the package `rwkv7-hf`:",
            "",
            "    from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'    model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)',
            f'    tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)',
        ]
    return ["With rwkvpipe:", "", f'    python -m rwkvpipe.generate --model {name} --tokenizer {name} --prompt "..."']
