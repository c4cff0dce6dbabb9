"""No setting of a training stage is dead: each, flipped, changes weights, metrics or made files, or is refused."""

import json
from importlib.util import find_spec
from typing import get_args, get_origin

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError

from rwkvpipe import dpo, grpo, init, pretrain, sft
from rwkvpipe.base import config as settings
from rwkvpipe.base.errors import PipeError
from rwkvpipe.base.files import digest, read_jsonl, write_json, write_jsonl
from rwkvpipe.data.binidx import BinidxWriter
from rwkvpipe.model.family import build
from rwkvpipe.weights import store

MODEL = settings.RwkvConfig(family="rwkv7", n_layer=2, n_embd=32, head_size=16, vocab_size=256)
KINDS = ("pretrain", "sft", "dpo", "grpo")
CORPUS, JUDGED = ("pretrain", "sft"), ("dpo", "grpo")
MEASURED = {"seconds", "tokens_per_second", "memory_mb"}  # no two runs have these alike
MAINS = {"pretrain": pretrain.main, "sft": sft.main, "dpo": dpo.main, "grpo": grpo.main}

TRAIN = {"steps": 4, "ctx_len": 12, "batch": 4, "lr": 0.01, "warmup": 1, "log_every": 1, "weight_decay": 0.01}
ROLLOUT = {
    "samples": 4,
    "reward": "judge.py:even",
    "iterations": 2,
    "sampling": {"max_tokens": 4, "temperature": 1.1, "stop": ["a"]},
}
BASE = {
    "pretrain": {"train": TRAIN},
    "sft": {"train": TRAIN},
    "dpo": {"train": TRAIN},
    "grpo": {"train": TRAIN | {"ctx_len": 40, "lr": 0.05}, "rollout": ROLLOUT},
}

# path -> tries, each (value, what else is set in both runs, kinds in which it does something; elsewhere it is refused)
TRIES: dict[str, list[tuple]] = {
    "seed": [(8, {}, KINDS)],
    "state": [(True, {}, KINDS)],
    "data": [({"corpus": 1, "other": 1}, {}, CORPUS)],
    "prompt": [("{question}!", {}, ("grpo",))],
    "train.steps": [(5, {}, KINDS)],
    "train.epochs": [(3, {"train.steps": None}, KINDS)],
    "train.tokens": [(90, {"train.steps": None}, ("pretrain",))],
    "train.ctx_len": [(5, {}, KINDS)],
    "train.batch": [(3, {}, KINDS)],
    "train.lr": [(0.02, {}, KINDS)],
    "train.lr_final": [(0.003, {}, KINDS), (0.003, {"train.schedule": "constant"}, ())],
    "train.schedule": [(way, {}, KINDS) for way in ("linear", "constant", "wsd", "rwkv", "rwkv_exp", "rwkv_mean")],
    "train.exp_steps": [(9, {"train.schedule": way}, KINDS) for way in ("rwkv_exp", "rwkv_mean")] + [(9, {}, ())],
    "train.begun": [(1, {"train.schedule": "rwkv"}, CORPUS), (1, {}, ()), (9, {"train.schedule": "rwkv"}, ())],
    "train.warmup": [(2, {}, KINDS)],
    "train.decay": [(0.9, {"train.schedule": "wsd"}, KINDS), (0.9, {}, ())],
    "train.weight_decay": [(0.5, {}, KINDS)],
    "train.weight_decay_final": [(0.9, {"train.schedule": "rwkv"}, KINDS), (0.9, {}, ())],
    "train.betas": [((0.5, 0.9), {}, KINDS)],
    "train.optimizer": [("adamw8bit", {"train.eps": 1e-8}, KINDS if find_spec("bitsandbytes") else ())],
    "train.eps": [(0.1, {}, KINDS)],
    "train.clip": [(1e-3, {"train.eps": 0.1}, KINDS)],
    "train.l2_wrap": [(0.5, {}, CORPUS)],
    "train.chunk": [(4, {}, CORPUS), (12, {}, ())],
    "train.bptt": [
        ("truncated", {"train.chunk": 4, "train.bptt": "full"}, CORPUS),
        ("full", {"train.chunk": 4}, CORPUS),
    ],
    "train.order": [("sequential", {}, KINDS), ("magic", {"train.ctx_len": 9}, ("pretrain",))],
    "train.rows": [
        ("documents", {"train.rows": "packed"}, CORPUS),
        ("packed", {}, CORPUS),
        ("stream", {"train.rows": "documents"}, ("pretrain",)),
    ],
    "train.seed": [(8, {}, KINDS)],
    "train.precision": [("bf16", {}, KINDS), ("fp16", {}, ())],
    "train.log_every": [(2, {"train.steps": 5}, KINDS)],
    "train.valid_every": [(1, {}, CORPUS)],
    "train.watch.best": [(True, {"train.valid_every": 1}, CORPUS), (True, {}, ())],
    "train.watch.patience": [(1, {"train.valid_every": 1, "train.lr": 0.5, "train.steps": 6}, CORPUS), (1, {}, ())],
    "train.watch.spike": [(1.001, {"train.watch.bad": "skip", "train.lr": 0.5, "train.steps": 8}, KINDS)],
    "train.watch.bad": [
        ("stop", {"train.watch.bad": "skip", "train.watch.spike": 1.001, "train.lr": 0.5, "train.steps": 8}, ())
    ],  # it stops
    "lora.kind": [(kind, {"lora.rank": 4}, KINDS) for kind in ("pissa", "dora", "disha")],
    "lora.rank": [(8, {"lora.rank": 4}, KINDS)],
    "lora.alpha": [(3.0, {"lora.rank": 4}, KINDS)],
    "lora.svd": [(4, {"lora.rank": 4, "lora.kind": "pissa"}, KINDS), (4, {"lora.rank": 4}, ())],
    "lora.dropout": [(0.3, {"lora.rank": 4}, CORPUS)],
    "lora.rslora": [(True, {"lora.rank": 4}, KINDS), (True, {"lora.rank": 4, "lora.kind": "disha"}, ())],
    "lora.targets": [(("att.key",), {"lora.rank": 4}, KINDS)],
    "lora.quantise": [(kind, {"lora.rank": 4}, KINDS) for kind in ("bf16", "int8", "nf4")],
    "lora.full": [(("ln1",), {"lora.rank": 4}, KINDS)],
    "dpo.beta": [(0.5, {}, ("dpo",))],
    "dpo.loss": [("ipo", {}, ("dpo",))],
    "dpo.smoothing": [(0.3, {}, ("dpo",)), (0.3, {"dpo.loss": "ipo"}, ())],
    "rollout.samples": [(3, {}, ("grpo",))],
    "rollout.reward": [("judge.py:short", {}, ("grpo",)), ({"judge.py:even": 1, "judge.py:short": 0.5}, {}, ("grpo",))],
    "rollout.aggregate": [
        ("normalize_then_sum", {}, ("grpo",)),
        ("normalize_then_sum", {"rollout.scale": "none"}, ()),
    ],
    "rollout.long": [
        ("start", {"train.ctx_len": 12}, ("grpo",)),
        ("drop", {"train.ctx_len": 12}, ()),  # nothing would be left
        ("refuse", {"train.ctx_len": 12}, ()),
    ],
    "rollout.loss": [
        (loss, {"rollout.sampling.bias": {97: 5.0}}, ("grpo",))
        for loss in ("grpo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo")
    ]
    + [("luspo", {"rollout.level": "sequence"}, ("grpo",)), ("luspo", {}, ())],
    "rollout.soft": [((0.5, 3.0), {"rollout.loss": "sapo"}, ("grpo",)), ((0.5, 3.0), {}, ())],
    "rollout.gamma": [((1.0, 1.0, 1.0, 1.0), {"rollout.loss": "vespo"}, ("grpo",)), ((1.0, 1.0, 1.0, 1.0), {}, ())],
    "rollout.off_policy": [(1e-4, {}, ("grpo",))],
    "rollout.entropy": [(0.1, {}, ("grpo",))],
    "rollout.part": [(3, {"rollout.loss": "bnpo"}, ("grpo",)), (3, {}, ())],
    "rollout.level": [("sequence", {}, ("grpo",))],
    "rollout.epsilon": [(1e-3, {}, ("grpo",)), (1e-3, {"rollout.loss": "sapo"}, ())],
    "rollout.epsilon_high": [(1e-3, {}, ("grpo",))],
    "rollout.delta": [(1.01, {}, ("grpo",)), (1.01, {"rollout.loss": "cispo"}, ())],
    "rollout.beta": [(0.5, {}, ("grpo",))],
    "rollout.kl": [(kind, {"rollout.beta": 0.5}, ("grpo",)) for kind in ("k1", "k2")] + [("k1", {}, ())],
    "rollout.kl_ratio": [(True, {"rollout.beta": 0.5}, ("grpo",)), (True, {}, ())],
    "rollout.kl_equal": [
        (False, {"rollout.beta": 0.5, "rollout.reward": "judge.py:some"}, ("grpo",)),
        (False, {}, ()),
    ],
    "rollout.top_entropy": [(0.5, {}, ("grpo",))],
    "rollout.scale": [(scale, {}, ("grpo",)) for scale in ("batch", "none")],
    "rollout.advantage_clip": [(0.3, {}, ("grpo",))],
    "rollout.low_reward": [(99.0, {}, ("grpo",))],
    "rollout.low_reward_scale": [(0.5, {"rollout.low_reward": 99.0}, ("grpo",)), (0.5, {}, ())],
    "rollout.sync": [(2, {"rollout.beta": 0.5}, ("grpo",)), (2, {}, ())],
    "rollout.mixup": [(0.9, {"rollout.beta": 0.5, "rollout.sync": 2}, ("grpo",)), (0.9, {}, ())],
    "rollout.iterations": [(1, {}, ("grpo",))],
    "rollout.slices": [(2, {}, ("grpo",)), (5, {}, ()), (2, {"rollout.loss": "bnpo", "rollout.part": 2}, ())],
    "rollout.postprocess": [("judge.py:halve", {}, ("grpo",))],
    "rollout.loss_mask": [("judge.py:last", {}, ("grpo",))],
    "rollout.kept": [(0, {}, ("grpo",))],
    "rollout.mask_truncated": [(True, {}, ("grpo",))],
    "rollout.sampling.temperature": [(0.7, {}, ("grpo",)), (0.0, {}, ())],
    "rollout.sampling.top_k": [(2, {}, ("grpo",))],
    "rollout.sampling.top_p": [(0.1, {}, ("grpo",))],
    "rollout.sampling.repetition_penalty": [(9.0, {}, ("grpo",))],
    "rollout.sampling.presence": [(9.0, {"rollout.sampling.top_k": 2}, ("grpo",))],
    "rollout.sampling.frequency": [(9.0, {"rollout.sampling.top_k": 2}, ("grpo",))],
    "rollout.sampling.decay": [(0.0, {"rollout.sampling.top_k": 2, "rollout.sampling.frequency": 9.0}, ("grpo",))],
    "rollout.sampling.spare": [(tuple(range(256)), {"rollout.sampling.presence": 9.0}, ("grpo",))],
    "rollout.sampling.order": [("rwkv", {"rollout.sampling.top_p": 0.5}, ("grpo",))],
    "rollout.sampling.bias": [({66: 9.0}, {}, ("grpo",))],
    "rollout.sampling.ban": [(tuple(range(128)), {}, ("grpo",))],
    "rollout.sampling.max_tokens": [(6, {}, ("grpo",))],
    "rollout.sampling.stop": [(tuple("bcdefghijk"), {"rollout.sampling.bias": {98: 9.0}}, ("grpo",))],
    "rollout.sampling.stop_ids": [((98,), {"rollout.sampling.bias": {98: 9.0}}, ("grpo",))],
    "rollout.sampling.choices": [(("yes", "no"), {}, ("grpo",))],
    "rollout.sampling.regex": [("[xy]{2}", {}, ("grpo",))],
    "rollout.sampling.json_schema": [({"enum": ["x", "y"]}, {}, ("grpo",))],
    "rollout.sampling.seed": [(8, {}, ("grpo",))],
    "model.preset": [("rwkv7-0.1b", {"model.n_layer": 2, "model.n_embd": 64}, ("init",))],
    "model.family": [(name, {}, ("init",)) for name in ("rwkv6", "rwkv5")],
    "model.n_layer": [(3, {}, ("init",))],
    "model.n_embd": [(64, {}, ("init",))],
    "model.head_size": [(32, {}, ("init",))],
    "model.vocab_size": [(300, {}, ("init",)), (100, {}, ())],
    "model.dim_ffn": [(96, {}, ("init",))],
    "model.d_decay": [(8, {}, ("init",)), (8, {"model.family": "rwkv5"}, ())],
    "model.d_aaa": [(8, {}, ("init",))],
    "model.d_mv": [(8, {}, ("init",))],
    "model.d_gate": [(8, {}, ("init",))],
    "model.d_mix": [(8, {"model.family": "rwkv6"}, ("init",)), (8, {}, ())],
    "model.ln0": [(False, {}, ("init",))],
    "model.time_state": [(True, {}, ("init",))],
}
NOT_FLIPPED = {
    "kind",
    "mix",
    "model",
    "lora",
    "dpo",
    "rollout",
    "rollout.sampling",
    "train",
    "train.watch",
}  # parts of these are


def leaves(model: type[BaseModel], head: str = "") -> dict[str, object]:
    """Every path below a pydantic model, with its annotation."""
    found = {}
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        found |= {head + name: field.annotation} if inner is None else leaves(inner, f"{head}{name}.")
    return found


def options(annotation: object) -> set:
    """The words that a field knows, if it knows certain words only."""
    if get_origin(annotation) is None:
        return set()
    inner = [options(each) for each in get_args(annotation) if not isinstance(each, str)]
    return {each for each in get_args(annotation) if isinstance(each, str)} | set().union(*inner)


def put(spec: dict, path: str, value: object) -> dict:
    """The same with one value changed."""
    head, _, rest = path.partition(".")
    return spec | {head: put(spec.get(head) or {}, rest, value) if rest else value}


def test_every_setting_has_a_try():
    known = leaves(settings.Settings)
    assert set(TRIES) - {"data"} == set(known) - NOT_FLIPPED, "a new setting needs a try here; a gone one needs none"


def test_what_of_a_stage_is_no_setting_of_its_training_is_known():
    others = {"name", "start", "data", "bench", "export", "measure", "samples.path", "samples.prompts"}
    others |= {f"samples.sampling.{name}" for name in settings.SamplingConfig.model_fields}
    assert set(leaves(settings.StageConfig)) - set(leaves(settings.Settings)) == others


def test_every_word_that_a_setting_knows_is_tried():
    fields = leaves(settings.Settings)
    for path, annotation in fields.items():
        words = options(annotation) if path in TRIES else set()
        tried = {value for value, *_ in TRIES.get(path, ()) if isinstance(value, str)}
        default = {
            "train.schedule": "cosine",
            "train.order": "shuffled",
            "train.optimizer": "adamw",
            "train.precision": "fp32",
            "lora.kind": "lora",
        }
        default |= {"train.watch.bad": "skip"}
        default |= {"dpo.loss": "sigmoid", "rollout.loss": "dapo", "rollout.level": "token", "rollout.kl": "k3"}
        default |= {"rollout.aggregate": "sum_then_normalize", "rollout.long": "end"}
        default |= {"rollout.scale": "group", "rollout.sampling.order": "hf", "model.family": "rwkv7"}
        if words and path not in ("model.preset", "rollout.reward"):
            assert words <= tried | {default.get(path)}, (path, words - tried)


class Bench:
    """Runs stages on tiny inputs, each once."""

    def __init__(self, folder):
        self.folder, self.known = folder, {}
        model = build(MODEL)
        model.initialise(0)
        stream = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in model.parameters():
                value += 0.1 * torch.randn(value.shape, generator=stream)
        store.write(folder / "start.safetensors", model.config, model.state_dict())
        lots = np.random.default_rng(0)
        for name in ("corpus", "other"):
            (folder / name).mkdir()
            for part, count in (("train", 24), ("valid", 4)):
                with BinidxWriter(folder / name / part, np.uint16) as writer:
                    for length in lots.integers(3, 11, count):
                        writer.add(lots.integers(1, 256, length), np.arange(length) % 3 != 1)
            write_json(folder / name / "corpus.json", {"vocab_size": 256})
        write_jsonl(folder / "q.jsonl", ({"question": f"{n}+{n}", "answer": str(2 * n)} for n in range(6)))
        pairs = ({"prompt": f"{n}?", "chosen": f" a{n}cd", "rejected": f" b{n}"} for n in range(8))
        write_jsonl(folder / "pairs.jsonl", pairs)
        (folder / "judge.py").write_text(
            "def even(completions):\n    return [sum(c.encode()) % 7 for c in completions]\n\n\n"
            "def some(completions, question):\n"
            "    return [sum(c.encode()) % 7 * (int(q[0]) % 2) for c, q in zip(completions, question)]\n\n\n"
            "def short(completions):\n    return [-float(len(c.encode())) for c in completions]\n\n\n"
            "def halve(completions, completion_ids, masks):\n    masks[:, 2:] = False\n"
            "    return {'completions': completions, 'completion_ids': completion_ids * masks, 'masks': masks}\n\n\n"
            "def last(completion_ids):\n    return [[0, 1, 1, 1][: len(row)] for row in completion_ids]\n"
        )

    def __call__(self, kind: str, spec: dict) -> str:
        """What a stage makes, as one digest; `refused: ` and why where it is not accepted."""
        key = json.dumps([kind, spec], sort_keys=True)
        if key not in self.known:
            try:
                self.known[key] = self.made(kind, spec)
            except (ValidationError, PipeError) as error:
                self.known[key] = f"refused: {error}"
        return self.known[key]

    def made(self, kind: str, spec: dict) -> str:
        """Run a stage in a folder of its own."""
        origin = {"model": spec.get("model")} if kind == "init" else {"start": "w"}
        spec = {name: value for name, value in spec.items() if name != "model"} | origin
        stage = settings.StageConfig.model_validate(
            {"name": "s", "kind": "pretrain" if kind == "init" else kind, "data": "corpus"}
            | {name: value for name, value in spec.items() if name != "seed"}
        )
        shares = stage.shares
        words = {name: getattr(stage, name) for name in ("model", "lora", "state", "dpo", "rollout", "prompt", "train")}
        asked = settings.Settings(
            kind=stage.kind, seed=spec.get("seed", 5), mix=tuple(shares.values()) if len(shares) > 1 else (), **words
        )
        home = self.folder / f"run{len(self.known)}"
        home.mkdir()
        write_json(home / "settings.json", asked.model_dump(mode="json"))
        if kind == "init":
            init.main([str(home / "settings.json"), "--tokenizer", "bytes", "--out", str(home / "model.safetensors")])
            return digest(home / "model.safetensors")
        out = home / ("adapter.safetensors" if stage.apart else "model.safetensors")
        data = {"dpo": ["pairs.jsonl"], "grpo": ["q.jsonl"]}.get(kind, list(shares))
        call = [str(home / "settings.json"), "--model", str(self.folder / "start.safetensors")]
        call += ["--micro-batch", "8", "--out", str(out), "--data", *(str(self.folder / name) for name in data)]
        MAINS[kind]([*call, *(["--tokenizer", "bytes"] if kind in JUDGED else [])])
        rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in read_jsonl(home / "metrics.jsonl")]
        tensors = {name: digest_of(value) for name, value in store.read_tensors(out)[0].items()}
        told = home / "rollouts.jsonl"
        files = sorted(path.name for path in home.iterdir() if path.is_file())
        return json.dumps([tensors, rows, digest(told) if told.exists() else "", files], sort_keys=True)


def digest_of(tensor: torch.Tensor) -> str:
    return str(hash(tensor.numpy().tobytes())) + str(tuple(tensor.shape))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """One for all tests: what was made once is not made again."""
    folder = tmp_path_factory.mktemp("knobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RWKVPIPE_DEVICE", "cpu")
        patch.chdir(folder)
        yield Bench(folder)


def flipped(bench: Bench, path: str, kind: str) -> None:
    for value, given, kinds in TRIES[path]:
        base = BASE.get(kind, {"model": MODEL.model_dump(exclude_none=True), "train": TRAIN})
        if path.split(".")[0] in ("lora",):
            base = put(base, "lora.rank", 4)
        for name, other in given.items():
            base = put(base, name, other)
        changed = put(base, path, value)
        if path in ("train.epochs", "train.tokens"):
            base = put(base, "train.steps", 4)
        before, after = bench(kind, base), bench(kind, changed)
        if kind in kinds:
            assert not before.startswith("refused"), (path, given, before)
            assert not after.startswith("refused"), (path, value, after)
            assert before != after, f"{path}: {value} changes nothing in {kind}"
        else:
            assert after.startswith("refused"), f"{path}: {value} is accepted in {kind}"


@pytest.mark.parametrize("path", [path for path in TRIES if not path.startswith("model.")])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.large) for kind in KINDS])
def test_a_flipped_setting_changes_what_is_made_or_is_refused(bench, kind, path):
    flipped(bench, path, kind)


@pytest.mark.parametrize("path", [path for path in TRIES if path.startswith("model.")])
def test_a_flipped_size_changes_the_model_that_is_begun_or_is_refused(bench, path):
    flipped(bench, path, "init")
