"""Every example plans a run, and comes to its end on a small model and little data."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from rwkvpipe.base.agree import parse
from rwkvpipe.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(file.stem for file in (ROOT / "examples").glob("*.yaml"))
BRIEF = ("finetune", "sequences")  # of texts that lie here, or are made in a second
BESIDE = "../shared/data/"  # where one of them looks for files
SMALL = {"n_layer": 2, "n_embd": 32, "head_size": 16}
# what makes a recipe small enough to run here; the rest of it is run as it stands
SHRUNK = {"steps": 3, "batch": 4, "lr": 1e-3, "warmup": 1, "log_every": 1, "valid_every": 0, "precision": "fp32"}


def recipe(name: str) -> dict:
    return yaml.safe_load((ROOT / f"examples/{name}.yaml").read_text().replace(BESIDE, ""))


def furnish(folder: Path) -> None:
    """The files that recipes ask their reader for."""
    import torch

    from rwkvpipe.base.config import RwkvConfig
    from rwkvpipe.data.binidx import BinidxWriter
    from rwkvpipe.model.family import build

    model = build(RwkvConfig(**SMALL, vocab_size=256))
    model.initialise(0)
    (folder / "tiny-rwkv7").mkdir()
    torch.save(model.state_dict(), folder / "tiny-rwkv7/tiny-x070.pth")
    for part in ("train", "valid"):
        (folder / f"tinyshakespeare_{part}.txt").write_text("ROMEO:\nWhat light is this?\n\n" * 200)
    subprocess.run([sys.executable, ROOT / "examples/sequences.py"], cwd=folder, check=True)
    for name in ("texts", "books"):
        (folder / name).mkdir()
        for n in range(40):
            (folder / name / f"{n}.txt").write_text(f"Story {n} is about {n + 1} cats and their {n * n} mice.\n" * 12)
    talks = [[("user", f"How many cats in story {n}?"), ("assistant", f"{n + 1}.")] for n in range(40)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) for n in range(12)]
    for name in ("questions", "exam"):
        (folder / f"{name}.jsonl").write_text("\n".join(asked) + "\n")
    with BinidxWriter(folder / "minipile", np.uint16) as writer:
        for n in range(50):
            writer.add([*range(n + 1, n + 60), 0])


def shrunk(name: str) -> dict:
    """A recipe on a small model, three steps long."""
    found = recipe(name)
    for entry in found.get("weights", {}).values():
        entry["path"] = entry["path"] if name in BRIEF else "small.safetensors"
    for stage in found["stages"]:
        train = stage["train"]
        length = {"ctx_len": min(train["ctx_len"], 96)} | ({"chunk": 32} if "chunk" in train else {})
        stage["train"] = {k: v for k, v in train.items() if k not in ("epochs", "tokens")} | SHRUNK | length
        if "model" in stage:
            vocabulary = {"vocab_size": 65536} if "preset" in stage["model"] else {}
            stage["model"] = SMALL | vocabulary
        if "rollout" in stage:
            stage["rollout"] |= {"samples": 2, "sampling": {"max_tokens": 4}}
            stage["train"] |= {"batch": 2}
        if "lora" in stage:
            stage["lora"] |= {"rank": 2}
    for entry in found["corpora"].values():
        entry |= {"valid": 0.25} if entry.get("valid") else {}
    for entry in found.get("benchmarks", {}).values():
        entry["sampling"] = {"temperature": 0, "max_tokens": 4}
    for entry in found["tokenizers"].values():
        if entry["kind"] == "bpe":
            entry["vocab_size"] = 300
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_plans_every_file_down_to_its_report(tmp_path, monkeypatch, name):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    plan = Plan(parse(recipe(name), name))
    assert plan.absent() is None
    assert plan.steps[-1].rule == "report"
    made = {path for step in plan.steps for path in step.writes}
    assert set(plan.targets()) <= made
    for stage in plan.stages:
        assert plan.settings(stage)["train"]["ctx_len"] >= (128 if name in BRIEF else 512)


def test_the_pages_for_people_name_every_example():
    for page in ("README.md", "README.zh.md"):
        text = (ROOT / page).read_text()
        assert not [name for name in RECIPES if f"examples/{name}.yaml" not in text], page


def call(folder: Path, *words: str, **env: str) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture
def home(tmp_path):
    """A folder with the workflow, the files that recipes ask for, and small weights."""
    from rwkvpipe.base.config import RwkvConfig
    from rwkvpipe.model.family import build
    from rwkvpipe.weights.store import write_tensors

    for name in ("workflow", "profiles", "envs", "rwkvpipe"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", tmp_path)
    furnish(tmp_path)
    model = build(RwkvConfig(**SMALL, vocab_size=65536))
    model.initialise(0)
    write_tensors(tmp_path / "small.safetensors", model.state_dict())
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_a_dry_run_of_the_workflow(home, name):
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe(name)))
    words = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", "recipe.yaml", "--resources", "gpu=0"]
    said = call(home, *words, "-n", "-p")
    assert f"results/{name}/report.html" in said and "--save-every" in said and "--keep 2 " in said


@pytest.mark.large
@pytest.mark.parametrize("name", RECIPES)
def test_a_shrunk_recipe_comes_to_its_report(home, name):
    (home / "recipe.yaml").write_text(yaml.safe_dump(shrunk(name)))
    words = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", "recipe.yaml", "--resources", "gpu=0"]
    call(home, *words, "-n")
    if name == "nodes":
        lines = [line.removeprefix("#").strip() for line in (ROOT / "examples/nodes.yaml").read_text().splitlines()]
        lines = " ".join(line.removesuffix("\\") for line in lines if not line.startswith("run"))
        reads = re.search(r"nodes.yaml (results/shared\S+ +results/nodes/\S+)", lines)[1].split()
        call(home, *words[:5], *reads, *words[5:])
        verb = re.search(r"(-m rwkvpipe\.pretrain .*?model\.safetensors) On one", lines)[1].split()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29533", *verb]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "RWKVPIPE_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        other = subprocess.Popen(torchrun, cwd=home, env=env)
        call(home, *torchrun, RWKVPIPE_DEVICE="cpu", OMP_NUM_THREADS="1")
        assert other.wait(300) == 0
        assert "rule pretrain:" not in call(home, *words, "-n")
    call(home, *words)
    assert (home / f"results/{name}/report.html").is_file()
