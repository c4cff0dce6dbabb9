"""Every kind of stage and every verb works for every family; a new family is one file and one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rwkvpipe
from rwkvpipe import bench, convert, generate, grpo, init, inspect, merge, pretrain, sft
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.files import read_jsonl, write_json, write_jsonl
from rwkvpipe.base.sizes import FAMILIES
from rwkvpipe.data.binidx import BinidxWriter
from rwkvpipe.model.family import build
from rwkvpipe.model.layers import State
from rwkvpipe.weights import store

SIZES = {"n_layer": 2, "n_embd": 32, "head_size": 16}
TRAIN = {"steps": 6, "ctx_len": 16, "batch": 4, "lr": 0.01, "warmup": 1, "log_every": 1}
LONG = TRAIN | {"steps": 30}
MODELS = {
    **{family: {"family": family, **SIZES} for family in FAMILIES},
    **{f"{name} with states": {"family": name, "time_state": True, **SIZES} for name in ("rwkv6", "rwkv7")},
}


def write_corpus(folder):
    """Counting texts of bytes, their second halves marked as answers."""
    folder.mkdir()
    stream = np.random.default_rng(0)
    for part, count in (("train", 40), ("valid", 4)):
        with BinidxWriter(folder / part, np.uint16) as writer:
            for _ in range(count):
                start = int(stream.integers(97, 110))
                writer.add([*range(start, start + 12), 10], [0] * 6 + [1] * 7)
    write_json(folder / "corpus.json", {"vocab_size": 256})


class Home:
    """A folder in which verbs are run one after the other, as the rules would."""

    def __init__(self, folder):
        self.folder = folder
        write_corpus(folder / "corpus")
        rows = [{"question": f"{n}+{n}", "answer": str(2 * n), "options": ["2", str(2 * n)]} for n in range(2, 5)]
        write_jsonl(folder / "q.jsonl", rows)
        write_jsonl(folder / "texts.jsonl", [{"text": "abcdef"}, {"text": "klmno"}])

    def path(self, name):
        return str(self.folder / name)

    def train(self, verb, start, out, **asked):
        """Run a stage; its rows of metrics."""
        asked = {"kind": verb.__name__.rpartition(".")[2], "seed": 1, "train": TRAIN} | asked
        settings = self.path(f"{Path(out).parent}/settings.json")
        Path(settings).parent.mkdir(parents=True, exist_ok=True)
        write_json(settings, asked)
        source = ["--data", self.path("corpus")]
        if verb is grpo:
            source = ["--data", self.path("q.jsonl"), "--tokenizer", "bytes"]
        words = [settings, "--model", self.path(start), *source, "--micro-batch", "3", "--out", self.path(out)]
        verb.main(words)
        return list(read_jsonl(Path(settings).with_name("metrics.jsonl")))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    return Home(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_every_verb_takes_it_further(home, name, capsys):
    model = MODELS[name]
    write_json(home.path("settings.json"), {"kind": "pretrain", "seed": 1, "model": model, "train": TRAIN})
    init.main([home.path("settings.json"), "--tokenizer", "bytes", "--out", home.path("init.safetensors")])
    rows = home.train(pretrain, "init.safetensors", "base/model.safetensors")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1

    config, tensors = store.read(home.path("base"))
    assert config.model_dump().items() >= model.items()
    if "time_state" in model:  # learned with the rest
        assert all(tensors[f"blocks.{n}.att.time_state"].any() for n in (0, 1))
    torch.save({k: v.bfloat16() for k, v in tensors.items()}, home.path("wild.pth"))
    convert.main([home.path("wild.pth"), "--out", home.path("half.safetensors")])
    assert store.sizes(home.path("half.safetensors")) == config

    lora = {"rank": 2, "full": ["ln_x"]}
    rows = home.train(sft, "half.safetensors", "chat/adapter.safetensors", lora=lora, train=LONG)
    assert rows[-1]["loss"] < rows[0]["loss"]
    adapter = store.read_tensors(home.path("chat/adapter.safetensors"))[0]
    matrices = {n.removesuffix(".weight") for n, v in tensors.items() if n.endswith(".weight") and v.dim() == 2}
    matrices -= {"emb", "head"}
    assert {f"{n}.lora_{x}" for n in matrices for x in "AB"} == {n for n in adapter if ".lora_" in n}
    words = ["--model", home.path("half.safetensors"), "--adapter", home.path("chat/adapter.safetensors")]
    merge.main([*words, "--out", home.path("chat/model.safetensors")])

    asked = {"samples": 2, "sampling": {"max_tokens": 2}, "beta": 0.1}
    train = TRAIN | {"steps": 2, "ctx_len": 64, "batch": 2}
    lora = {"rank": 2, "kind": "disha"}
    for out, more in (("reason/model.safetensors", {}), ("reason2/adapter.safetensors", {"lora": lora})):
        rows = home.train(grpo, "chat/model.safetensors", out, rollout=asked, train=train, prompt="{question}=", **more)
        assert [row["step"] for row in rows] == [1, 2]

    speaker = ["--model", home.path("reason/model.safetensors"), "--tokenizer", "bytes"]
    for task in ("answer", "choice"):
        spec = {"task": task, "path": "q", "prompt": "{question}=", "sampling": {"max_tokens": 3}}
        words = ["--spec", json.dumps(spec), "--questions", home.path("q.jsonl"), "--rows", "2"]
        bench.main([*speaker, *words, "--out", home.path(f"{task}.answers.jsonl")])
        assert len(list(read_jsonl(home.path(f"{task}.answers.jsonl")))) == 3
    generate.main([*speaker, "--prompt", "abc", "--max-tokens", "3"])
    capsys.readouterr()
    inspect.main([home.path("reason/model.safetensors"), "--json"])
    assert json.loads(capsys.readouterr().out).items() >= (model | {"vocabulary": 256}).items()


def every_mode(home, start, folder):
    """What each verb's first numbers are for the weights `start`."""
    found = {}
    once = TRAIN | {"steps": 1}
    for name, verb, asked in (("pretrain", pretrain, {}), ("chunks", pretrain, {"chunk": 5}), ("sft", sft, {})):
        rows = home.train(verb, start, f"{folder}/{name}/model.safetensors", train=once | asked)
        found[name] = rows[0]["loss"]
    rollout = {"samples": 2, "sampling": {"max_tokens": 8}}
    train = once | {"ctx_len": 64, "batch": 2}
    home.train(grpo, start, f"{folder}/grpo/model.safetensors", train=train, rollout=rollout, prompt="{question}=")
    found["grpo"] = Path(home.path(f"{folder}/grpo/rollouts.jsonl")).read_text()
    for task in ("answer", "choice", "bits"):
        spec = {"task": task, "path": "q", "prompt": "{question}=", "sampling": {"max_tokens": 3}}
        words = ["--model", home.path(start), "--tokenizer", "bytes", "--spec", json.dumps(spec), "--rows", "2"]
        out = home.path(f"{folder}/{task}.answers.jsonl")
        bench.main([*words, "--questions", home.path("texts.jsonl" if task == "bits" else "q.jsonl"), "--out", out])
        found[task] = Path(out).read_text()
    spec = json.dumps({"prompts": ["abc", "x"], "sampling": {"max_tokens": 8}})
    words = ["--model", home.path(start), "--tokenizer", "bytes", "--spec", spec]
    generate.main([*words, "--out", home.path(f"{folder}/samples.jsonl")])
    found["generate"] = Path(home.path(f"{folder}/samples.jsonl")).read_text()
    return found


@pytest.mark.parametrize("family", ["rwkv6", "rwkv7"])
def test_every_mode_starts_from_the_states_of_the_weights(home, family, monkeypatch):
    stream = torch.Generator().manual_seed(3)
    model = build(RwkvConfig(family=family, time_state=True, vocab_size=256, **SIZES))
    tensors = {name: torch.randn(value.shape, generator=stream) * 0.3 for name, value in model.state_dict().items()}
    states = [tensors[f"blocks.{n}.att.time_state"].mul_(20) for n in (0, 1)]
    store.write(home.path("tuned.safetensors"), model.config, tensors)
    plain = {name: value for name, value in tensors.items() if not name.endswith("time_state")}
    store.write(home.path("plain.safetensors"), model.config.model_copy(update={"time_state": False}), plain)

    zeros = State.zeros

    def given_states(config, rows, *more):
        state = zeros(config, rows, *more)
        state.wkv = [value.repeat(rows, 1, 1, 1) for value in states]
        return state

    found, zero = every_mode(home, "tuned.safetensors", "a"), every_mode(home, "plain.safetensors", "b")
    monkeypatch.setattr(State, "zeros", given_states)
    given = every_mode(home, "plain.safetensors", "c")
    for mode, value in found.items():
        assert value == given[mode], mode
        assert value != zero[mode], mode


TOY = '''"""Decaying means of what was read, gated: nothing of another family."""

import torch
from torch import nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.model.language import LanguageModel, outline
from rwkvpipe.model.layers import ending


def complete(config):
    return config if config.dim_ffn else config.model_copy(update={"dim_ffn": 2 * config.n_embd})


def detect(tensors):
    if "blocks.0.att.fade" not in tensors:
        return None
    return RwkvConfig(family="toy", head_size=tensors["blocks.0.att.fade"].shape[1], **outline(tensors))


class TimeMix(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        D, N = config.n_embd, config.head_size
        self.fade = nn.Parameter(torch.zeros(D // N, N))
        self.value, self.gate, self.output = (nn.Linear(D, D, bias=False) for _ in range(3))

    def forward(self, x, first, last, memory, lengths=None):
        v, d, means = self.value(x).unflatten(-1, self.fade.shape), torch.sigmoid(self.fade), [memory[..., 0]]
        for t in range(x.shape[1]):
            mean = means[-1] * d + v[:, t] * (1 - d)
            means.append(mean if lengths is None else torch.where((t < lengths)[:, None, None], mean, means[-1]))
        y = torch.stack(means[1:], 1).flatten(2) * torch.sigmoid(self.gate(x))
        return self.output(y), first, ending(x, last, lengths), means[-1][..., None].expand_as(memory)

    def initialise(self, layer, n_layer, stream):
        self.fade.uniform_(0, 3, generator=stream)


class ChannelMix(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(self, x, last, lengths=None):
        before = torch.cat([last[:, None], x[:, :-1]], 1)
        return self.value(self.key((x + before) / 2).relu().square()), ending(x, last, lengths)

    def initialise(self, layer, n_layer, stream):
        pass


class Toy(LanguageModel):
    TimeMix, ChannelMix = TimeMix, ChannelMix

    def __init__(self, config):
        super().__init__(complete(config))
'''


def test_a_family_is_added_by_one_file_and_one_line(tmp_path):
    package = tmp_path / "rwkvpipe"
    shutil.copytree(Path(rwkvpipe.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "model/toy.py").write_text(TOY)
    sizes = package / "base/sizes.py"
    line = '    "toy": (),\n'
    begin = "FAMILIES: dict[str, tuple[str, ...]] = {\n"
    assert begin in sizes.read_text()
    sizes.write_text(sizes.read_text().replace(begin, begin + line))
    asked = {"kind": "pretrain", "seed": 1, "model": {"family": "toy", **SIZES}, "train": TRAIN}
    write_json(tmp_path / "s.json", asked)
    asked = {"kind": "sft", "seed": 1, "lora": {"rank": 2}, "train": TRAIN | {"chunk": 5}}
    write_json(tmp_path / "t.json", asked)
    write_json(tmp_path / "p.json", {"kind": "sft", "seed": 1, "train": TRAIN | {"rows": "packed"}})
    write_corpus(tmp_path / "corpus")
    program = """
from rwkvpipe.base.errors import ConfigError
from rwkvpipe import generate, init, inspect, merge, pretrain, sft
init.main("s.json --tokenizer bytes --out init.safetensors".split())
pretrain.main("s.json --model init.safetensors --data corpus --micro-batch 4 --out base/model.safetensors".split())
sft.main("t.json --model base/model.safetensors --data corpus --micro-batch 3 --out chat/adapter.safetensors".split())
merge.main("--model base --adapter chat/adapter.safetensors --out chat/model.safetensors".split())
generate.main("--model chat --tokenizer bytes --prompt abc --max-tokens 3".split())
try:
    sft.main("p.json --model base/model.safetensors --data corpus --micro-batch 3 --out p/model.safetensors".split())
except ConfigError as error:
    print(error)
inspect.main(["base", "--json"])
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "RWKVPIPE_DEVICE": "cpu"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert "train.rows: packed: models of toy do not begin documents anew" in found.stdout
    assert json.loads(found.stdout[found.stdout.index("\n{") :])["family"] == "toy"
