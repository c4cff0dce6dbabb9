"""A checkpoint written for other programs: RWKV-LM and the package rwkv, hub folders, Hugging Face, llama.cpp."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkvpipe.base.config import ADAPTERS, ExportConfig, RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.base.files import read_json, write_bytes, write_json, write_text
from rwkvpipe.tokenizer.bpe import BpeTokenizer
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.load import Tokenizer, load_tokenizer, save_tokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer, write_vocab
from rwkvpipe.tokenizer.world import WorldTokenizer
from rwkvpipe.weights import card, gguf, store
from rwkvpipe.weights.layouts import DEAD, hf7
from rwkvpipe.weights.peft import write_peft
from rwkvpipe.weights.pth import write_pth
from rwkvpipe.weights.tensors import Piece, Tensors, write_sharded

log = logging.getLogger("rwkvpipe")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CTX_LEN = 4096  # where nobody knows the length that a model was trained at


def export(
    model: str | Path, out: str | Path, spec: ExportConfig, *, tokenizer: str | None = None, scores: Sequence[str] = ()
) -> None:
    """Write a checkpoint in the format of `spec`: to the file `out`, or for hub and hf into the folder `out`.

    Raises WeightsError where a format has no place for something, ConfigError or DataError for the rest.
    """
    if spec.format in ADAPTERS:
        write_peft(model, Path(out), spec)
        return
    found, out = store.open_model(model), Path(out)
    words = load_tokenizer(tokenizer) if tokenizer is not None else None
    if words is not None and words.size > found.config.vocab_size:
        sizes = f"has {words.size} ids, {model} has {found.config.vocab_size}"
        raise WeightsError(f"{tokenizer}: {sizes}; give the vocabulary that it was trained with")
    tensors = cast(found.tensors, spec.dtype, str(model))
    if spec.format == "safetensors":
        store.write(out, found.config, tensors)
    elif spec.format == "pth":
        write_pth(out, rwkv_lm(found.config, tensors, out))
        if found.config.time_state and found.config.family == "rwkv7":
            log.warning("%s: has time_state, which of RWKV-7 the package rwkv passes over and RWKV-LM refuses", out)
    elif spec.format == "gguf":
        plain = _plain(tensors, found.unread)
        _refuse_states(out, plain)
        gguf.write_gguf(out, found.config, plain, name=_name(spec, out), vocabulary=_for_llama(words, found.config))
    else:
        graded = [read_json(path) for path in scores]
        _folder(out, found.config, _plain(tensors, found.unread), spec, words, graded)
    log.info("%s: %s, %d tensors", out, spec.format, len(tensors))


def cast(tensors: Tensors, dtype: str | None, name: str) -> Tensors:
    """The same with numbers of another dtype (None: as they are). Raises WeightsError where fp16 is too narrow."""
    if dtype is None:
        return tensors
    wanted = DTYPES[dtype]

    def changed(key: str) -> Callable[[Tensor], Tensor]:
        def change(value: Tensor) -> Tensor:
            new = value.to(wanted)
            if not value.is_meta and not torch.isfinite(new).all() and torch.isfinite(value).all():
                raise WeightsError(f"{name}: {key} has numbers that {dtype} has no room for; export as bf16 or fp32")
            return new

        return change

    return tensors.made({key: Piece((key,), changed(key)) for key in tensors})


def rwkv_lm(config: RwkvConfig, tensors: Tensors, path: Path) -> Tensors:
    """What RWKV-LM loads strictly: layer 0's value residual too, though nothing reads it."""
    if not config.ln0:
        raise WeightsError(f"{path}: RWKV-LM needs ln0, which is folded into emb here; use safetensors or hf")
    plan = {name: Piece((name,)) for name in tensors}
    if config.family == "rwkv7":
        D, R, dtype = config.n_embd, config.d_mv or 32, tensors.like["emb.weight"].dtype
        for name, shape in zip(DEAD, ((1, 1, D), (D, R), (R, D)), strict=True):
            if name not in plan:
                plan[name] = Piece((), lambda shape=shape: torch.zeros(shape, dtype=dtype))
    return tensors.made(plan)


def _plain(tensors: Tensors, unread: Sequence[str]) -> Tensors:
    return tensors.made({name: Piece((name,)) for name in tensors if name not in unread})


def _refuse_states(path: Path, tensors: Tensors) -> None:
    if any(name.endswith("time_state") for name in tensors):
        raise WeightsError(f"{path}: has no place for time_state; use safetensors, pth or hub")


def _name(spec: ExportConfig, out: Path) -> str:
    return spec.name or (out.stem if spec.format not in ("hub", "hf") else out.name)


def _entries(tokenizer: Tokenizer | None) -> dict[int, bytes] | None:
    """A vocabulary of byte strings by id, if it is one."""
    if isinstance(tokenizer, ByteTokenizer):
        return {byte + tokenizer.offset: bytes([byte]) for byte in range(256)}
    return tokenizer.entries if isinstance(tokenizer, TrieTokenizer) else None


def _for_llama(tokenizer: Tokenizer | None, config: RwkvConfig) -> gguf.Words:
    entries = _entries(tokenizer)
    if entries is None:
        return gguf.Words()  # llama.cpp then takes and gives ids
    turn = card.turn_end(tokenizer)
    return gguf.words(entries, config.vocab_size, end=tokenizer.eos, turn=turn, template=card.TEMPLATE)


def _folder(
    out: Path, config: RwkvConfig, tensors: Tensors, spec: ExportConfig, tokenizer: Tokenizer | None, scores: list[dict]
) -> None:
    """A folder of a hub; README.md comes last, so that one with it is whole."""
    hf, dtype = spec.format == "hf", card.main_dtype(tensors.like)
    ctx_len, entries = spec.ctx_len or CTX_LEN, _entries(tokenizer)
    turn = card.turn_end(tokenizer)
    eos = turn if turn is not None else getattr(tokenizer, "eos", 0)
    if hf:
        _fits_hf(out, config, tensors)
        tensors = tensors.made(hf7(tensors))
        described = card.hf_config(config, eos=eos, dtype=dtype)
        for file, code in card.CODE.items():
            write_text(out / file, code)
    else:
        described = card.hub_config(config, ctx_len=ctx_len, eos=eos, dtype=dtype)
    write_sharded(out, tensors, spec.shard_bytes)
    write_json(out / "config.json", described)
    write_json(out / "generation_config.json", card.generation_config(eos, ctx_len))
    if entries is not None and 0 not in entries:
        write_vocab(out / (card.WORLD_FILE if hf or isinstance(tokenizer, WorldTokenizer) else "vocab.txt"), entries)
        settings = card.tokenizer_config(tokenizer, ctx_len=ctx_len, hf=hf, rows=config.vocab_size)
        write_json(out / "tokenizer_config.json", settings)
    elif isinstance(tokenizer, BpeTokenizer):
        tokenizer.write(out / "tokenizer.json")
        write_json(
            out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.end}
        )
    elif tokenizer is not None:
        save_tokenizer(out, tokenizer)
    name = _name(spec, out)
    text = card.page(name, config, tensors, format=spec.format, about=spec.about, scores=scores)
    write_bytes(out / "README.md", text.encode())


def _fits_hf(out: Path, config: RwkvConfig, tensors: Tensors) -> None:
    """Raise WeightsError for what Hugging Face's programs would compute otherwise."""
    if config.family != "rwkv7":
        raise WeightsError(f"{out}: format hf is that of RWKV-7, this is {config.family}; use pth or hub")
    if config.head_size != 64:
        raise WeightsError(
            f"{out}: Hugging Face's programs norm heads of {config.head_size} numbers with another epsilon than"
            " RWKV-LM; use pth, hub or gguf"
        )
    _refuse_states(out, tensors)
