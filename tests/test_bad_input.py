"""Bad input costs one line: what is wrong, where, what to do; exit status 2, nothing written.

Each row of the table is a good command (see `COMMANDS`) with one thing broken. `says` are parts of the line, in order:
the place first (file and line, or key), the way out last.
"""

import bz2
import io
import json
import logging
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import rwkvpipe
from rwkvpipe.base.config import LoraConfig, RwkvConfig
from rwkvpipe.base.errors import BAD_INPUT, ConfigError, DataError, outcome
from rwkvpipe.base.files import digest
from rwkvpipe.model.family import build
from rwkvpipe.tokenizer.trie import read_vocab
from rwkvpipe.train.stage import write_adapter
from rwkvpipe.weights import lora, store

ROOT = Path(__file__).resolve().parents[1]
MODEL = RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=256)
BEGUN = ("out", "out/checkpoints", "out/checkpoints/log.jsonl")
TRAIN = {"steps": 2, "ctx_len": 32, "batch": 2, "warmup": 0, "log_every": 1}
EXAM = {"task": "answer", "path": "exam.jsonl", "sampling": {"temperature": 0, "max_tokens": 2}}
PICK = {"task": "choice", "path": "pick.jsonl"}
TALKS = {"path": "talks.jsonl", "tokenizer": "t", "format": "chat"}
ARRAY = {"path": "rows.npy", "tokenizer": "t", "format": "array"}
GRPO = {"samples": 2, "sampling": {"max_tokens": 2}}
CONFIG = """\
run: demo
tokenizers:
  plain: {kind: bytes}
  other: {kind: bytes, offset: 0}
  digits: {kind: integer, size: 10}
corpora:
  sums: {path: docs.txt, tokenizer: plain}
  talks: {path: talks.jsonl, tokenizer: plain, format: chat}
  tasks: {path: exam.jsonl, format: question}
benchmarks:
  exact: {task: answer, path: exam.jsonl}
stages:
  - name: base
    kind: pretrain
    data: sums
    model: {n_layer: 2, n_embd: 64}
    train: {steps: 10, lr: 1e-3}
    bench: [exact]
  - name: chat
    kind: sft
    data: talks
    start: base
    train: {steps: 10}
  - name: reason
    kind: grpo
    data: tasks
    start: chat
    rollout: {samples: 4}
    train: {steps: 10}
"""
COMMANDS = {
    "plan": "--check config.yaml",
    "settings": "--spec settings.spec --out out/settings.json",
    "vocab": "docs.txt --spec vocab.spec --out out/words",
    "questions": "exam.jsonl --spec exam.spec --out out/q.jsonl",
    "pack": "docs.txt --spec docs.spec --tokenizer bytes --out out/corpus",
    "init": "pretrain.json --tokenizer bytes --out out/init.safetensors",
    "pretrain": "pretrain.json --model m.safetensors --data docs --out out/model.safetensors",
    "sft": "sft.json --model m.safetensors --data talks --out out/model.safetensors",
    "grpo": "grpo.json --model m.safetensors --tokenizer bytes --data exam.jsonl --out out/model.safetensors",
    "merge": "--model m.safetensors --adapter adapter.safetensors --out out/model.safetensors",
    "convert": "m.safetensors --out out/model.safetensors",
    "inspect": "m.safetensors",
    "bench": "--spec exam.spec --model m.safetensors --tokenizer bytes --questions exam.jsonl --out out/a.jsonl",
    "score": "answers.jsonl --spec exam.spec --questions exam.jsonl --out out/a.json",
    "generate": "--model m.safetensors --tokenizer bytes --spec samples.spec --out out/samples.jsonl",
    "plot": "metrics.jsonl --out out/plots",
    "report": "--spec report.spec --out out/report.html",
    "download": "docs.txt --out out/docs.txt",
    "launch": "0 convert m.safetensors --out out/model.safetensors",
}
SPECS = {
    "settings": {"kind": "pretrain", "seed": 1, "model": {"n_layer": 2}, "train": {"steps": 3}},
    "vocab": {"kind": "trie", "corpora": ["sums"]},
    "exam": EXAM,
    "docs": {"path": "docs.txt", "tokenizer": "t"},
    "samples": {"prompts": ["a"], "sampling": {"max_tokens": 2}},
    "report": {"run": "demo", "config": {"run": "demo"}, "subjects": []},
}
# no part of `python -m`: the others write plain files, or start another process
UNTRIED = {"plan", "launch"}


class Touch:
    """A pickle that makes a file when it is loaded: what an attacker would put in its place."""

    def __reduce__(self):
        return Path.touch, (Path("hurt"),)


@dataclass(frozen=True)
class Case:
    """A good command, what is changed in its words and files, and what must be said."""

    sort: str
    verb: str
    says: tuple[str, ...]
    words: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    leaves: tuple[str, ...] = ()


CASES: dict[str, Case] = {}


def case(name: str, sort: str, verb: str, *says: str, **more) -> None:
    """Put a row into the table. `words` are options with new values (None takes one away), or first words by place;
    `files` are bytes, text, None for a file that is not there, or what is done to the path; `leaves` is what stays
    of a training that had begun: no result, only what it would go on from.
    """
    assert name not in CASES, name
    CASES[name] = Case(sort, verb, says, **more)


def config(name: str, sort: str, old: str, new: str, *says: str, where: str = "config.yaml") -> None:
    """A row whose config.yaml has one part replaced."""
    assert old in CONFIG, old
    case(name, sort, "plan", where, *says, files={"config.yaml": CONFIG.replace(old, new, 1)})


def spec(**values) -> dict:
    return {"--spec": json.dumps(values)}


def cut(path: Path, size: int = -7) -> None:
    path.write_bytes(path.read_bytes()[:size])


def put(place: int, data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[place : place + len(data)] = data
        path.write_bytes(raw)

    return change


def tensors(**changes) -> Callable[[Path], None]:
    """Change tensors of a checkpoint: None takes one away, a function gives another value. `__` is a dot."""

    def change(path: Path) -> None:
        found, metadata = store.read_tensors(path)
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del found[name]
            else:
                found[name] = value(found.get(name))
        store.write_tensors(path, found, metadata)

    return change


def saved(value) -> bytes:
    """What torch.save writes."""
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def array(value, **options) -> bytes:
    """What numpy.save writes."""
    data = io.BytesIO()
    np.save(data, np.asarray(value), **options)
    return data.getvalue()


def zipped(path: Path, *names: str) -> None:
    """An archive of files that say the same."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, '{"text": [1, 2]}\n')


def tarred(path: Path) -> None:
    """A file in an archive, packed, in its own place."""
    with tarfile.open(path.with_suffix(".new"), "w:gz") as archive:
        archive.add(path, path.name)
    path.with_suffix(".new").replace(path)


def settings(kind: str, **changes) -> str:
    """A settings.json; `train` and `rollout` are changed key by key."""
    value: dict = {"kind": kind, "seed": 1, "train": TRAIN | changes.pop("train", {})}
    if kind == "pretrain":
        value["model"] = {"n_layer": 2, "n_embd": 32, "head_size": 16}
    if kind == "grpo":
        value |= {"rollout": GRPO | changes.pop("rollout", {}), "prompt": "{question}="}
    return json.dumps(value | changes)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


# what the config says

config("a misspelt section", "unknown key", "stages:", "stage:", "stage: no such key", "did you mean stages?")
config("a misspelt key of a stage", "unknown key", "lr: 1e-3", "lrr: 1e-3", "stages.base.train.lrr", "mean lr?")
config("a foreign key", "unknown key", "samples: 4", "zzz: 4", "stages.reason.rollout.zzz", "known keys: samples,")
case(
    "a misspelt key of settings",
    "unknown key",
    "settings",
    "--spec: train.stepps",
    "did you mean steps?",
    words=spec(**SPECS["settings"] | {"train": {"stepps": 3}}),
)
config("a word for a number", "wrong type", "steps: 10, lr", "steps: ten, lr", "stages.base.train.steps", "'ten'")
config(
    "a list for a mapping",
    "wrong type",
    "{kind: bytes}",
    "[bytes]",
    "tokenizers.plain: a mapping of keys is needed, this is list",
)
config(
    "a word for the stages",
    "wrong type",
    CONFIG[CONFIG.index("stages:") :],
    "stages: all",
    "stages: a list is needed, this is str",
)
config("a part of a step", "wrong type", "steps: 10, lr", "steps: 1.5, lr", "stages.base.train.steps", "1.5")
config(
    "no step at all", "out of range", "steps: 10, lr", "steps: 0, lr", "stages.base.train.steps", "than or equal to 1"
)
config(
    "a rate that is no number", "out of range", "lr: 1e-3", "lr: .nan", "stages.base.train.lr", "greater than 0", "nan"
)
config(
    "a share above one", "out of range", "sums: {", "sums: {valid: 1.5, ", "corpora.sums.valid", "less than 1", "1.5"
)
config(
    "a bias beyond fp32", "impossible numbers", "samples: 4", "samples: 4, sampling: {bias: {3: 1e308}}", "bias.3", "1e"
)
config(
    "an empty path",
    "paths",
    "path: docs.txt",
    "path: ''",
    "corpora.sums.path",
    "at least 1 char",
)
config(
    "a vocabulary without room for bytes",
    "vocabularies that cannot be",
    "{kind: bytes}",
    "{kind: bpe, corpora: [sums], vocab_size: 256}",
    "tokenizers.plain.vocab_size: Input should be greater than or equal to 257 (got 256)",
)
config(
    "a class without its module",
    "vocabularies that cannot be",
    "{kind: bytes}",
    "{kind: own, import_path: Letters}",
    "tokenizers.plain: import_path: 'Letters' is not module:Class, such as my_tokenizers:Letters",
)
config("a seed below zero", "out of range", "run: demo", "run: demo\nseed: -1", "seed", "than or equal to 0", "-1")
config("a kind there is none of", "unknown value", "kind: sft", "kind: stf", "stages.chat.kind", "'sft'", "'stf'")
config(
    "a schedule there is none of", "unknown value", "lr: 1e-3", "schedule: cos", "train.schedule", "'cosine'", "'cos'"
)
config(
    "a reward there is none of",
    "unknown value",
    "samples: 4",
    "reward: anwser",
    "reward anwser",
    "mean answer?",
    where="",
)
config(
    "a made corpus there is none of",
    "unknown value",
    "path: docs.txt",
    "synthetic: counting.document, count: 9",
    "corpora.sums.synthetic",
    "did you mean counting.documents?",
    where="",
)
case("YAML without an end", "broken YAML", "plan", "config.yaml:2: not YAML", files={"config.yaml": "run: [demo\n"})
case("a tab in YAML", "broken YAML", "plan", "config.yaml:2: not YAML", files={"config.yaml": "run: demo\n\tseed: 1\n"})
config(
    "a key given twice", "broken YAML", "run: demo\n", "run: demo\nrun: x\n", ":2: the key run stands twice", "remove"
)
case(
    "a config that is not UTF-8",
    "invalid UTF-8",
    "plan",
    "config.yaml:1: not UTF-8 at byte 7",
    "save it as UTF-8",
    files={"config.yaml": b"run: d\xe4mo\n"},
)
case(
    "a config that is a list",
    "broken YAML",
    "plan",
    "config.yaml",
    "a mapping of keys is needed",
    "stages",
    files={"config.yaml": "- run: demo\n"},
)
config("a start that does not exist", "start", "start: base", "start: bass", "stages.chat.start", "did you mean base?")
config(
    "a start in a circle",
    "start",
    "    model: {n_layer: 2, n_embd: 64}\n",
    "    start: reason\n",
    "stages.base.start",
    "a circle: base <- reason <- chat <- base",
    "needs another start",
)
config("a start at itself", "start", "start: base", "start: chat", "stages.chat.start", "a circle: chat <- chat")
config("neither start nor model", "start", "    start: base\n", "", "stages.chat", "give one of start", "and model")
config("talks for pretrain", "kind that does not fit", "data: sums", "data: talks", "stages.base.data", "format text")
config("texts for sft", "kind that does not fit", "data: talks", "data: sums", "stages.chat.data", "format chat")
config(
    "grpo from nothing", "kind that does not fit", "    start: chat\n", "    model: {}\n", "stages.reason", "give start"
)
config(
    "rollouts of pretrain", "kind that does not fit", "    bench", "    rollout: {}\n    bench", "belong to kind grpo"
)
config("an adapter there is none of", "adapters", "start: base", "start: base\n    lora: {kind: dorra}", "lora.kind")
config("rounds of an SVD that is none", "adapters", "start: base", "start: base\n    lora: {svd: 4}", "svd")
config(
    "a scale of disha",
    "adapters",
    "start: base",
    "start: base\n    lora: {kind: disha, alpha: 4}",
    "alpha and rslora do nothing in kind disha",
)
config("an unknown corpus", "unknown name", "data: sums", "data: sum", "stages.base.data", "did you mean sums?")
config(
    "an unknown tokenizer",
    "unknown name",
    "docs.txt, tokenizer: plain",
    "docs.txt, tokenizer: palin",
    "corpora.sums.tokenizer",
    "did you mean plain?",
)
config("an unknown benchmark", "unknown name", "bench: [exact]", "bench: [exacte]", "stages.base.bench", "mean exact?")
config("two stages of one name", "names", "name: chat", "name: base", "stages.base.name", "rename one")
config("a run called shared", "names", "run: demo", "run: shared", "run: shared", "choose another name")
config("a stage called log", "names", "name: reason", "name: log", "stages.log", "choose another name")
config(
    "another vocabulary than the start's",
    "vocabulary",
    "talks.jsonl, tokenizer: plain",
    "talks.jsonl, tokenizer: other",
    "stages.chat.data",
    "tokenizer other",
    "base speaks plain",
    "keep the vocabulary",
)
config(
    "words for the integer tokenizer",
    "integer tokenizer",
    "talks.jsonl, tokenizer: plain",
    "talks.jsonl, tokenizer: digits",
    "corpora.talks.tokenizer",
    "numbers only",
    "letters",
)
config(
    "no room for a prompt", "lengths", "samples: 4", "sampling: {max_tokens: 512}", "max_tokens", "train.ctx_len 512"
)
case(
    "no config there", "missing file", "plan", "config.yaml: no such file", "--configfile", files={"config.yaml": None}
)

# what the command line says

case(
    "a misspelt option",
    "command line",
    "convert",
    "--outt: no such argument",
    "did you mean --out?",
    words={"--out": None, "--outt": "x", "": "--out y"},
)
case("a missing option", "command line", "merge", "required: --adapter", "--help", words={"--adapter": None})
case("a word for a number of rows", "command line", "bench", "--rows: invalid int", "--help", words={"--rows": "many"})
case(
    "no rows at a time", "command line", "grpo", "--micro-batch: 0 rows", "1 is the least", words={"--micro-batch": "0"}
)
case("a spec that is no JSON", "JSON words", "settings", "--spec: not JSON", "column 7", words={"--spec": '{"a": }'})
case("a spec that is a list", "JSON words", "pack", "--spec: a mapping of keys is needed", words={"--spec": "[]"})
case("a spec with a number too long", "JSON words", "score", "--spec", "too many digits", words={"--spec": "9" * 5000})
case("a spec that is too deep", "JSON words", "vocab", "--spec", "too deep", words={"--spec": "[" * 100000})
case(
    "settings of another kind",
    "settings of another kind",
    "sft",
    "pretrain.json: kind is pretrain",
    "rwkvpipe.pretrain",
    words={0: "pretrain.json"},
)
case(
    "a verb there is none of",
    "unknown verb",
    "launch",
    "there is no verb convet",
    "did you mean convert?",
    words={1: "convet"},
)
case("devices by the dozen", "unknown verb", "launch", "runs in one process", "Set gpu and ranks to 1", words={0: "12"})
case("prompts and a spec", "both of two", "generate", "one of --spec and --prompt", words={"--prompt": "a"})

# what lies where a file belongs

case("weights that are not there", "missing file", "convert", "n.safetensors: no such file", words={0: "n.safetensors"})
case("a corpus that is not there", "missing file", "pack", "none.txt: no such file", "name", words={0: "none.txt"})
case(
    "questions that are not there",
    "missing file",
    "bench",
    "none.jsonl: No such file",
    "mend the path",
    words={"--questions": "none.jsonl"},
)
case("a folder for a corpus", "folder", "pack", "docs.txt: a folder", "name a corpus file", files={"docs.txt": folder})
case("a folder for settings", "folder", "sft", "sft.json: Is a directory", "name a file", files={"sft.json": folder})
case(
    "a folder without weights",
    "folder",
    "inspect",
    "m.safetensors: holds 0 checkpoints",
    "name the file",
    files={"m.safetensors": folder},
)
case(
    "a file for a tokenizer's folder",
    "folder",
    "pack",
    "words.json: kind is None",
    "known: bytes",
    words={"--tokenizer": "words.json"},
    files={"words.json": "{}"},
)

case(
    "a folder for the result",
    "places to write",
    "pretrain",
    "--out: docs is a folder",
    "name the file to write",
    words={"--out": "docs"},
)
case("nothing for the result", "places to write", "score", "--out: nothing is a folder", "name", words={"--out": ""})
case(
    "a file for the folder of the result",
    "places to write",
    "init",
    "docs.txt",
    "a file stands where a folder is needed",
    words={"--out": "docs.txt/m.safetensors"},
)
case("an empty option", "both of two", "generate", "--tokenizer: is empty", "leave it out", words={"--tokenizer": ""})

# rows of data

case(
    "half a line of JSON",
    "broken JSONL",
    "pack",
    "talks.jsonl:2: not JSON",
    "column",
    words={0: "talks.jsonl", **spec(**TALKS)},
    files={"talks.jsonl": '{"question": "a", "answer": "b"}\n{"question": \n'},
)
case(
    "a line that is a list",
    "broken JSONL",
    "questions",
    "exam.jsonl:1: a JSON object is needed",
    "list",
    files={"exam.jsonl": "[1]\n"},
)
case("half an answer", "broken JSONL", "score", "answers.jsonl:1: not JSON", files={"answers.jsonl": '{"text": "1'})
case(
    "a word after a line",
    "broken JSONL",
    "grpo",
    "exam.jsonl:2: not JSON: Extra data",
    files={"exam.jsonl": '\n{"question": "1", "answer": "2"} x\n'},
)
case(
    "a text that is not UTF-8",
    "invalid UTF-8",
    "pack",
    "docs.txt:2",
    "byte 6",
    "save it as UTF-8",
    files={"docs.txt": b"lines\n\xff\xfe\n"},
)
case(
    "a row that is not UTF-8",
    "invalid UTF-8",
    "questions",
    "exam.jsonl:1",
    "not UTF-8",
    "save it as UTF-8",
    files={"exam.jsonl": b'{"question": "\xe4", "answer": "1"}\n'},
)
case(
    "a vocabulary that is not UTF-8",
    "invalid UTF-8",
    "vocab",
    "v.txt:1: not UTF-8",
    "is it a vocabulary file?",
    words={0: "v.txt", **spec(kind="trie", path="v.txt")},
    files={"v.txt": b"1 '\xff' 1\n"},
)
case(
    "an empty corpus",
    "nothing in it",
    "pack",
    "docs.txt: no documents to train on",
    "give some",
    files={"docs.txt": ""},
)
case("no rows", "nothing in it", "questions", "exam.jsonl: no documents", files={"exam.jsonl": "\n\n"})
case("no answers", "nothing in it", "score", "answers.jsonl: 0 answers to 2", "run bench", files={"answers.jsonl": ""})
case("no metrics", "nothing in it", "plot", "metrics.jsonl:1: the file is empty", "train", files={"metrics.jsonl": ""})
case(
    "a column that is not there",
    "columns",
    "questions",
    "exam.jsonl:2: no `answer`",
    "question",
    "columns",
    files={"exam.jsonl": '{"question": "1", "answer": "1"}\n{"question": "2"}\n'},
)
case(
    "a role there is none of",
    "columns",
    "pack",
    "talks.jsonl:1: turn 1: role is 'boss'",
    "known: ",
    "user",
    words={0: "talks.jsonl", **spec(**TALKS)},
    files={"talks.jsonl": '{"messages": [{"role": "boss", "content": "a"}]}\n'},
)
case(
    "a choice without options",
    "columns",
    "questions",
    "exam.jsonl:1: no options",
    "columns.options",
    words=spec(**PICK),
)
case(
    "null for a text",
    "columns",
    "pack",
    "r.jsonl:1: `text` is null",
    "text is needed",
    words={0: "r.jsonl"},
    files={"r.jsonl": '{"text": null}\n'},
)
case(
    "a label beyond the options",
    "grades",
    "bench",
    "exam.jsonl:1: `label` 7",
    "0 to 1",
    words=spec(**PICK),
    files={"exam.jsonl": '{"question": "a", "options": ["b", "c"], "label": 7}\n'},
)
case(
    "an answer to another question",
    "grades",
    "score",
    "answers.jsonl:1: an answer to another question",
    "run bench",
    files={"answers.jsonl": '{"row": 2, "text": "1"}\n{"row": 1, "text": "1"}\n'},
)
case(
    "an answer that is no text",
    "grades",
    "score",
    "answers.jsonl:1",
    "run bench",
    files={"answers.jsonl": '{"text": 1}\n{"text": "1"}\n'},
)
case(
    "a reward without a number", "grades", "grpo", "exam.jsonl:1", "answer", files={"exam.jsonl": '{"question": "1"}\n'}
)

# numbers

case(
    "a window that is none",
    "answers",
    "score",
    "answers.jsonl:1",
    "run bench again",
    words=spec(task="bits", path="t.jsonl") | {"--questions": "t.jsonl"},
    files={"t.jsonl": '{"text": "a"}\n', "answers.jsonl": '{"windows": [[1.5, 2]]}\n'},
)
case(
    "a probability that is none",
    "answers",
    "score",
    "answers.jsonl:1",
    "run bench again",
    words=spec(**PICK) | {"--questions": "p.jsonl"},
    files={
        "p.jsonl": '{"question": "a", "options": ["b", "c"], "label": 1}\n',
        "answers.jsonl": '{"logprobs": [NaN, -1], "tokens": [1, 1]}\n',
    },
)

case(
    "NaN in an array",
    "NaN",
    "pack",
    "rows.npy: row 1",
    "whole numbers",
    "save",
    words={0: "rows.npy", "--tokenizer": "numbers", **spec(**ARRAY)},
    files={"rows.npy": array([[0.5, np.nan]])},
)
case(
    "NaN in metrics",
    "NaN",
    "plot",
    "metrics.jsonl:1: loss is nan",
    "a finite number",
    files={
        "metrics.jsonl": '{"step": 1, "tokens": 1, "loss": NaN, "lr": 1, "grad_norm": 1, "tokens_per_second": 1, '
        '"seconds": 1}\n'
    },
)
case(
    "NaN in weights",
    "NaN",
    "bench",
    "m.safetensors: ln_out.weight holds NaN",
    "again",
    files={"m.safetensors": tensors(ln_out__weight=lambda value: value * torch.nan)},
)
case(
    "NaN in the loss",
    "NaN in training",
    "pretrain",
    "step 2: the loss is nan",
    "no weight was moved",
    "Lower train.lr",
    leaves=BEGUN,
    files={"pretrain.json": settings("pretrain", train={"lr": 1e30})},
)
case(
    "NaN in settings",
    "NaN",
    "settings",
    "--spec: train.lr",
    "greater than 0",
    "nan",
    words={"--spec": '{"kind": "sft", "seed": 1, "train": {"steps": 1, "lr": NaN}}'},
)
case(
    "text for the integer tokenizer",
    "integer tokenizer",
    "pack",
    "docs.txt:1: word 1 is 'The'",
    "whole numbers only",
    "a tokenizer of kind bytes or trie",
    words={"--tokenizer": "numbers"},
)
case(
    "a number above the range",
    "integer tokenizer",
    "pack",
    "docs.txt:1: word 3 is 10",
    "0 to 9",
    "larger size",
    words={"--tokenizer": "numbers"},
    files={"docs.txt": "1 2 10\n"},
)
case(
    "an array above the range",
    "integer tokenizer",
    "pack",
    "rows.npy: row 2: holds 12",
    "end at 9",
    "larger size",
    words={0: "rows.npy", "--tokenizer": "numbers", **spec(**ARRAY)},
    files={"rows.npy": array([[1, 2], [3, 12]])},
)
case(
    "an array below zero",
    "arrays",
    "pack",
    "rows.npy: row 1: holds -3",
    "add",
    files={"rows.npy": array([[1, -3]])},
    words={0: "rows.npy", "--tokenizer": "numbers", **spec(**ARRAY)},
)
case(
    "an array of three dimensions",
    "arrays",
    "pack",
    "rows.npy: an array of shape (1, 1, 1)",
    "is needed",
    words={0: "rows.npy", "--tokenizer": "numbers", **spec(**ARRAY)},
    files={"rows.npy": array([[[1]]])},
)
case(
    "an archive of arrays",
    "arrays",
    "pack",
    "rows.npy: an archive",
    "numpy.save(path, array)",
    words={0: "rows.npy", "--tokenizer": "numbers", **spec(**ARRAY)},
    files={"rows.npy": b"PK\x03\x04"},
)

# lengths

case(
    "a corpus shorter than the context",
    "lengths",
    "pretrain",
    "docs",
    "one row takes 4097",
    "train.ctx_len 4096",
    "more text or a smaller ctx_len",
    files={"pretrain.json": settings("pretrain", train={"ctx_len": 4096})},
)
case(
    "fewer rows than a batch",
    "fewer than a batch",
    "pretrain",
    "docs",
    "the 500",
    "train.batch",
    "smaller batch",
    files={"pretrain.json": settings("pretrain", train={"batch": 500})},
)
case(
    "fewer talks than a batch",
    "fewer than a batch",
    "sft",
    "talks",
    "the 9",
    "train.batch",
    "smaller batch",
    files={"sft.json": settings("sft", train={"batch": 9})},
)
case(
    "fewer questions than a batch",
    "fewer than a batch",
    "grpo",
    "exam.jsonl",
    "the 9",
    "train.batch",
    "smaller batch",
    files={"grpo.json": settings("grpo", train={"batch": 9})},
)
case(
    "a prompt longer than the context",
    "lengths",
    "grpo",
    "exam.jsonl:1: the prompt has 41 tokens",
    "train.ctx_len",
    files={
        "exam.jsonl": '{"question": "' + "1" * 40 + '", "answer": "1"}\n',
        "grpo.json": settings("grpo", rollout={"long": "refuse"}),
    },
)
case(
    "a share that leaves nothing",
    "lengths",
    "pack",
    "valid: a share of 0.01 of 1 documents leaves none",
    "more of them",
    words=spec(path="docs.txt", tokenizer="t", valid=0.01),
)

# packed corpora

case(
    "an index with a wrong magic",
    "binidx",
    "pretrain",
    "train.idx: no binidx index",
    "rwkvpipe.pack",
    files={"docs/train.idx": put(0, b"MMIDIDY")},
)
case("an index cut short", "binidx", "pretrain", "train.idx: cut short", "again", files={"docs/train.idx": cut})
case("tokens cut short", "binidx", "sft", "train.bin: has", "cut short", "again", files={"talks/train.bin": cut})
case(
    "tokens of another dtype",
    "binidx",
    "pretrain",
    "docs",
    "bytes",
    "again",
    files={"docs/train.idx": put(17, b"\x04")},
)
case("a mask cut short", "masks", "sft", "train.mask: has", "again", files={"talks/train.mask": cut})
case("no mask", "masks", "sft", "talks: no packed corpus for sft", "rwkvpipe.pack", files={"talks/train.mask": None})
case(
    "ids beyond the vocabulary",
    "vocabulary",
    "pretrain",
    "docs",
    "the id 999",
    "256 rows",
    "tokenizer",
    leaves=BEGUN,
    files={"docs/train.bin": lambda path: path.write_bytes(struct.pack("<H", 999) * (path.stat().st_size // 2))},
)
case(
    "a corpus of a larger vocabulary",
    "vocabulary",
    "pretrain",
    "docs: was packed with a vocabulary of 300",
    "the model's tokenizer",
    files={"docs/corpus.json": '{"vocab_size": 300}'},
)
case(
    "a tokenizer larger than the model",
    "vocabulary",
    "generate",
    "--tokenizer: words has 400 ids",
    "was trained with",
    words={"--tokenizer": "words"},
    files={"words": lambda path: path.mkdir(), "words/tokenizer.json": '{"kind": "integer", "size": 399}'},
)
case(
    "a corpus.json that is a list",
    "corpus.json",
    "pretrain",
    "docs/corpus.json",
    "rwkvpipe.pack",
    files={"docs/corpus.json": "[]"},
)
case("no corpus.json", "corpus.json", "pretrain", "docs/corpus.json", "rwkvpipe.pack", files={"docs/corpus.json": None})

# weights

case(
    "weights cut short",
    "damaged weights",
    "convert",
    "m.safetensors: damaged or cut short",
    "fetch it again",
    files={"m.safetensors": cut},
)
case(
    "no byte of weights", "damaged weights", "inspect", "m.safetensors: is empty", "fetch", files={"m.safetensors": b""}
)
case(
    "a .pth cut short",
    "damaged weights",
    "convert",
    "m.pth",
    "damaged or cut short",
    "fetch it again",
    words={0: "m.pth"},
    files={"m.pth": saved({"a": torch.zeros(99)})[:-90]},
)
case(
    "an archive of files for an archive of arrays",
    "archives",
    "pack",
    "rows.npz: an archive of files that are no arrays",
    "unpack it, or save arrays with numpy.savez(path, values=",
    words={0: "rows.npz", "--tokenizer": "numbers", **spec(**ARRAY | {"path": "rows.npz"})},
    files={"rows.npz": lambda path: zipped(path, "rows.jsonl")},
)
case(
    "other files where values and lengths should be",
    "archives",
    "pack",
    "rows.npz: an archive of files that are no arrays",
    "unpack it, or save arrays with numpy.savez(path, values=",
    words={0: "rows.npz", "--tokenizer": "numbers", **spec(**ARRAY | {"path": "rows.npz"})},
    files={"rows.npz": lambda path: zipped(path, "values", "lengths")},
)
case(
    "an archive of texts for a text",
    "archives",
    "pack",
    "docs.txt: an archive of files that are no arrays",
    "unpack it",
    files={"docs.txt": lambda path: zipped(path, "docs.txt")},
)
case(
    "a text packed with bzip2",
    "packed files",
    "pack",
    "docs.txt: packed with bzip2, which is not read",
    "unpack it, or pack it with gzip or zstd",
    files={"docs.txt": bz2.compress(b"a b c")},
)
case(
    "a tar archive, packed",
    "packed files",
    "pack",
    "docs.txt: a tar archive",
    "unpack it, and name its folder",
    files={"docs.txt": tarred},
)
case(
    "columns of numbers between commas",
    "archives",
    "pack",
    "docs.txt: rows of JSON are needed (a .jsonl file), or parquet, or numpy's arrays",
    "this is a text file",
    words={"--tokenizer": "numbers", **spec(**ARRAY | {"path": "docs.txt"})},
    files={"docs.txt": "a0,a1\n1,2\n"},
)
case(
    "a web page for weights",
    "damaged weights",
    "bench",
    "m.safetensors: no checkpoint: a web page",
    "fetch it again",
    files={"m.safetensors": "<!doctype html><html>404</html>"},
)
case(
    "a transformer",
    "foreign weights",
    "convert",
    "m.pth: this is a transformer; give an RWKV-5.2, 6 or 7",
    words={0: "m.pth"},
    files={
        "m.pth": saved(
            {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2), "blocks.0.ln0.weight": torch.zeros(2)}
        )
    },
)
case(
    "RWKV-6",
    "foreign weights",
    "convert",
    "m.pth: this is a part of an RWKV-6 checkpoint",
    "known here: rwkv5, rwkv6, rwkv7",
    words={0: "m.pth"},
    files={"m.pth": saved({"blocks.0.ln0.weight": torch.zeros(2), "blocks.0.att.time_maa_x": torch.zeros(2)})},
)
case(
    "an adapter for weights",
    "foreign weights",
    "convert",
    "adapter.safetensors: this is an adapter",
    "merge it first",
    words={0: "adapter.safetensors"},
)
case(
    "a training state for weights",
    "foreign weights",
    "convert",
    "m.pth: holds no tensors by name",
    words={0: "m.pth"},
    files={"m.pth": saved({"step": 1, "model": {}})},
)
case(
    "a tensor too few",
    "other sizes",
    "convert",
    "blocks.1.att.k_k is missing",
    "not a whole RWKV-7 model",
    files={"m.safetensors": tensors(blocks__1__att__k_k=None)},
)
case(
    "a tensor of another size",
    "other sizes",
    "convert",
    "m.safetensors: ln_out.weight is (3,)",
    "needed is (32,)",
    files={"m.safetensors": tensors(ln_out__weight=lambda value: value[:3].clone())},
)
case(
    "an adapter of other weights",
    "other sizes",
    "merge",
    "adapter.safetensors: was trained beside other weights",
    "give those",
    files={"m.safetensors": tensors(ln_out__bias=lambda value: value + 1)},
)
case(
    "weights for an adapter",
    "other sizes",
    "merge",
    "m.safetensors: no adapter",
    "give the file",
    words={"--adapter": "m.safetensors"},
)

# code and secrets

case(
    "a checkpoint with code in it",
    "code",
    "convert",
    "m.pth: holds Python objects",
    "not run",
    "tensors alone",
    words={0: "m.pth"},
    files={"m.pth": saved({"a": Touch()})},
)
case(
    "a bare pickle for a checkpoint",
    "code",
    "inspect",
    "m.pth: holds Python objects",
    "not run",
    words={0: "m.pth"},
    files={"m.pth": pickle.dumps({"a": Touch()}, protocol=2)},
)
case(
    "an array of objects",
    "code",
    "pack",
    "rows.npy: it holds Python objects",
    "save rows of several lengths with numpy.savez(path, values=",
    words={0: "rows.npy", "--tokenizer": "numbers", **spec(**ARRAY)},
    files={"rows.npy": array([Touch()])},
)
case(
    "a vocabulary with code in it",
    "code",
    "vocab",
    "v.txt:1",
    "no Python text",
    "write 'text'",
    words={0: "v.txt", **spec(kind="trie", path="v.txt")},
    files={"v.txt": "1 open('hurt','w').name 4\n"},
)
case(
    "a Python object in YAML",
    "templates",
    "plan",
    "config.yaml:1: not YAML: could not determine a constructor for the tag",
    files={"config.yaml": "run: !!python/object/apply:os.mknod [hurt]\n"},
)
case(
    "a template in YAML",
    "templates",
    "plan",
    "__use_yte__: no such key",
    files={"config.yaml": CONFIG + "__use_yte__: true\n__definitions__: open(0)\n"},
)
config("a run outside of results", "paths", "run: demo", "run: ../demo", "run: a name is made of letters", "../demo")
config(
    "a stage outside of its run",
    "paths",
    "name: base",
    "name: a/../../b",
    "stages.a/../../b.name: a name is made of letters",
)
case(
    "a digest of another file",
    "download",
    "download",
    "docs.txt: sha256 is",
    "mend sha256 or the source",
    words={"--sha256": "0" * 64},
)
case("a digest that is none", "download", "download", "sha256: 'abc' is no digest", "64", words={"--sha256": "abc"})
case(
    "a scheme there is none of",
    "download",
    "download",
    "ftp://h/f",
    "http://",
    words={0: "ftp://u:secret@h/f?token=secret"},
)
case("a secret in a wrong address", "download", "download", "https", "mend it", words={0: "https://u:secret@h:port/f"})

config(
    "a password in an address",
    "secrets",
    "path: docs.txt",
    "path: 'https://u:secret@h/f'",
    "corpora.sums.path: ",
    "a password or a token",
    "rwkvpipe.download",
)
config(
    "a token in an address",
    "secrets",
    "path: docs.txt",
    "path: 'https://h/f?access_token=secret'",
    "corpora.sums.path: ",
    "a password or a token",
    "rwkvpipe.download",
)
config(
    "an address that is none",
    "secrets",
    "path: docs.txt",
    "path: 'https://[u:secret@h/f'",
    "corpora.sums.path: ",
    "mend it",
)

# vocabularies

case(
    "an id given twice",
    "vocabulary file",
    "vocab",
    "v.txt:2: id 1 stands twice",
    "remove one",
    words={0: "v.txt", **spec(kind="trie", path="v.txt")},
    files={"v.txt": "1 'a' 1\n1 'b' 1\n"},
)
case(
    "a length that is wrong",
    "vocabulary file",
    "vocab",
    "v.txt:1: the entry has 1 bytes",
    "damaged",
    words={0: "v.txt", **spec(kind="trie", path="v.txt")},
    files={"v.txt": "1 'a' 2\n"},
)
case(
    "no vocabulary file at all",
    "vocabulary file",
    "bench",
    "docs.txt:1: not `id 'text' length`",
    "mend",
    words={"--tokenizer": "docs.txt"},
)
case(
    "a question that cannot be spelled",
    "unspelled",
    "bench",
    "exam.jsonl:1: the vocabulary has no 'U'",
    "kind bytes",
    words={"--tokenizer": "v.txt"},
    files={"v.txt": "1 'a' 1\n"},
    leaves=("out",),
)
case(
    "a reward that cannot be spelled",
    "unspelled",
    "grpo",
    "exam.jsonl:1: the vocabulary has no '1'",
    "kind bytes",
    words={"--tokenizer": "v.txt"},
    files={"v.txt": "1 'a' 1\n"},
)
case(
    "a talk that cannot be spelled",
    "unspelled",
    "pack",
    "docs.txt:1: the vocabulary has no 'T'",
    "learn",
    words={"--tokenizer": "v.txt"},
    files={"v.txt": "1 'a' 1\n"},
)
case(
    "half a letter in a spec",
    "half a surrogate pair",
    "generate",
    "--spec: prompts.0",
    "half a surrogate pair; remove it",
    words=spec(prompts=["a\ud800"]),
)
case(
    "half a letter in the form of questions",
    "half a surrogate pair",
    "bench",
    "--spec: prompt",
    "half a surrogate pair; remove it",
    words=spec(**EXAM | {"prompt": "\udfff{question}"}),
)
case(
    "half a letter of the command line",
    "half a surrogate pair",
    "generate",
    "the command line: prompts.0",
    "half a surrogate pair; remove it",
    words={"--spec": None, "--prompt": "a\udcff"},
)
case(
    "a prompt that cannot be spelled",
    "vocabulary file",
    "generate",
    "the vocabulary has no 'ß'",
    "kind bytes",
    words={"--tokenizer": "v.txt", **spec(prompts=["aß"])},
    files={"v.txt": "1 'a' 1\n"},
)


def command(verb: str, changes: dict) -> list[str]:
    """The words of a good command with changes."""
    words = []
    for word in COMMANDS[verb].split():
        words.append(json.dumps(SPECS[word.removesuffix(".spec")]) if word.endswith(".spec") else word)
    for name, value in changes.items():
        if isinstance(name, int):
            words[name] = value
        elif name in words:
            place = words.index(name)
            words[place : place + 2] = [] if value is None else [name, value]
        else:
            words += [*([name] if name else []), *(value.split() or [""])]
    return words


def break_files(home: Path, files: dict) -> None:
    for name, content in files.items():
        path = home / name
        if content is None:
            path.unlink()
        elif isinstance(content, bytes | str):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        else:
            content(path)


def tree(home: Path) -> dict[str, bytes | None]:
    """Every file and folder, with what it holds."""
    return {
        str(path.relative_to(home)): path.read_bytes() if path.is_file() else None for path in sorted(home.rglob("*"))
    }


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> Path:
    """Every file that the commands need, all of them good."""
    home = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("RWKVPIPE_DEVICE", "cpu")
        Path("config.yaml").write_text(CONFIG)
        Path("docs.txt").write_text("The first line.\n" + "12 and 30 are 42.\n" * 30)
        Path("talks.jsonl").write_text("".join(f'{{"question": "{n}?", "answer": "{n}!"}}\n' for n in range(4)))
        Path("exam.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "2+1", "answer": "3"}\n')
        Path("answers.jsonl").write_text('{"text": "2"}\n{"text": "4"}\n')
        Path("metrics.jsonl").write_text(
            "".join(
                json.dumps(
                    dict.fromkeys(("tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"), n)
                    | {"step": n}
                )
                + "\n"
                for n in (1, 2, 3)
            )
        )
        for kind in ("pretrain", "sft", "grpo"):
            Path(f"{kind}.json").write_text(settings(kind))
        model = build(MODEL)
        model.initialise(0)
        store.write_tensors("m.safetensors", model.state_dict())
        adapted = LoraConfig(rank=2)
        lora.inject(model, adapted, 0)
        write_adapter(Path("adapter.safetensors"), model, adapted, base=digest("m.safetensors"))
        for verb, words in (
            ("vocab", {0: "--spec", 1: '{"kind": "integer", "size": 10}', 2: "--out", 3: "numbers", 4: None}),
            ("pack", {"--out": "docs"}),
            ("pack", {0: "talks.jsonl", "--out": "talks", **spec(**TALKS)}),
        ):
            import_module(f"rwkvpipe.{verb}").main([word for word in command(verb, words) if word])
    return home


@pytest.fixture
def home(good, tmp_path, monkeypatch) -> Path:
    """A copy to break, and to work in."""
    shutil.copytree(good, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    return tmp_path / "home"


@pytest.mark.parametrize("verb", sorted(COMMANDS.keys() - UNTRIED))
def test_the_commands_are_good_before_they_are_broken(verb, home):
    """So that each row of the table fails for what is broken in it, and for nothing else."""
    import_module(f"rwkvpipe.{verb}").main(command(verb, {}))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_costs_one_line_and_writes_nothing(name, home, caplog):
    row = CASES[name]
    break_files(home, row.files)
    before = tree(home)
    caplog.set_level(logging.ERROR)
    assert outcome(lambda: import_module(f"rwkvpipe.{row.verb}").main(command(row.verb, row.words))) == BAD_INPUT
    (line,) = caplog.messages
    place = 0
    for part in row.says:
        assert part in line[place:], f"{line!r} lacks {part!r}"
        place = line.index(part, place) + len(part)
    assert line.startswith("error: ") and "secret" not in line and line.isprintable() and len(line) < 500
    assert {name: held for name, held in tree(home).items() if name not in row.leaves} == before


def test_the_table_is_wide():
    """Many sorts of faults rather than many faults of one sort."""
    assert len(CASES) >= 60
    assert max(Counter(row.sort for row in CASES.values()).values()) <= 4


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried"), RuntimeError("CPU: can't allocate memory")]
)
def test_too_little_memory_is_one_line(error, caplog):
    def main():
        raise error

    assert outcome(main) == BAD_INPUT
    (line,) = caplog.messages
    assert line.startswith("error: out of memory") and "--micro-batch" in line


def test_a_bug_is_not_taken_for_bad_input():
    def main():
        raise RuntimeError("sizes differ")

    with pytest.raises(RuntimeError, match="sizes differ"):
        outcome(main)


@pytest.mark.parametrize(
    "line", ["1 " + "[" * 9000 + " 1", "1 'a' " + "9" * 5000, "9" * 5000 + " 'a' 1", "1 'a" + "\\" * 99]
)
def test_vocabularies_that_overwhelm_python_are_named_by_line(line, tmp_path):
    (tmp_path / "v.txt").write_text(f"{line}\n")
    with pytest.raises(DataError, match="v.txt:1: "):
        read_vocab(tmp_path / "v.txt")


def call(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    given = {name: value for name, value in os.environ.items() if not name.startswith("SNAKEMAKE")}
    given |= {"PYTHONPATH": str(ROOT), "RWKVPIPE_GPUS": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=cwd, env=given, capture_output=True, text=True, timeout=300
    )


def files(home: Path) -> dict[str, bytes | None]:
    return {name: held for name, held in tree(home).items() if held is not None and not name.startswith(".snakemake")}


@pytest.mark.parametrize(
    "name",
    [
        "a misspelt key of settings",
        "a line that is a list",
        "weights cut short",
        "no metrics",
        "a verb there is none of",
    ],
)
def test_a_process_leaves_with_status_2_and_one_line(name, home):
    row = CASES[name]
    break_files(home, row.files)
    before = files(home)
    done = call(f"rwkvpipe.{row.verb}", *command(row.verb, row.words), cwd=home)
    assert done.returncode == BAD_INPUT and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and row.says[0] in line
    assert files(home) == before


def snakemake(home: Path, *words: str) -> tuple[int, list[str]]:
    """Status and lines, without the one about the profile."""
    done = call(
        "snakemake",
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--directory",
        str(home),
        "--nocolor",
        "--cores",
        "1",
        *words,
        cwd=home,
    )
    lines = (done.stdout + done.stderr).splitlines()
    return done.returncode, [line for line in lines if not line.startswith("Using workflow specific profile")]


@pytest.mark.parametrize(
    "name",
    [
        *("YAML without an end", "a key given twice", "a misspelt key of a stage", "a start in a circle"),
        "a config that is not UTF-8",
    ],
)
def test_snakemake_leaves_with_status_2_and_one_line(name, home):
    break_files(home, CASES[name].files)
    before = files(home)
    status, lines = snakemake(home)
    assert status == BAD_INPUT and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and all(part in lines[0] for part in CASES[name].says)
    assert files(home) == before


def test_a_source_that_is_not_there_stops_snakemake_before_any_job(home):
    (home / "docs.txt").unlink()
    assert snakemake(home) == (
        BAD_INPUT,
        ["error: corpora.sums.path: there is no file docs.txt; paths count from the folder of the call"],
    )


def test_a_failed_job_ends_snakemake_with_1_and_its_line(home, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (home / "talks.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    status, lines = snakemake(home, "results/shared/corpora/talks/corpus.json")
    assert status == 1
    assert sum("error: talks.jsonl:2: not JSON" in line for line in lines) == 1, lines
    assert not list((home / "results").rglob("corpus.json")) and not list((home / "results").rglob("*.bin"))
    written = [path for path in home.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert not written and not any("hf_secret" in line for line in lines)


def test_python_runs_no_template_in_a_config(home):
    code = "__use_yte__: true\n__definitions__:\n  - open('hurt', 'w')\n"
    (home / "config.yaml").write_text(CONFIG + code)
    with pytest.raises(ConfigError, match="__use_yte__: no such key"):
        rwkvpipe.run("config.yaml", directory=home)
    assert not (home / "hurt").exists()
