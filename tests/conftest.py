"""What several tests share: where reference numbers and real data lie, and tiny models."""

import json
import math
import os
import random
from pathlib import Path

import hypothesis
import pytest
import yaml

from rwkvpipe.base.agree import parse
from rwkvpipe.plan import Plan

# set before torch is imported: the models are tiny, and tests start programs that would fight over the cores
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"
os.environ.setdefault("RWKVPIPE_PRODUCTS", "torch")  # no result of a test may depend on what is faster here
# the same examples everywhere: a run that passes here passes there; HYPOTHESIS_PROFILE=default looks further
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser):
    """What is tested in more than one way."""
    parser.addoption("--paper", action="store_true", help="the GPU's kernels as nvcc makes them, run here: ten minutes")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of reference numbers made by independent programs."""
    folder = SHARED / "goldens"
    if not folder.is_dir():
        pytest.skip("the reference numbers (shared/goldens beside the checkout) are not here")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of third-party text and weights that the project does not ship."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the third-party data (shared/data beside the checkout) is not here")
    return folder


@pytest.fixture
def at_any_thread_count():
    """Checks that what a function returns, tensors, has the same bits with any number of threads."""

    import torch  # not before OMP_NUM_THREADS is set

    def check(results) -> None:
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3, 5, 7):
                torch.set_num_threads(count)
                found.append(results())
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))

    return check


RUN = """
run: demo
seed: 7
tokenizers:
  letters: {kind: trie, corpora: [sums]}
corpora:
  sums: {synthetic: counting.documents, count: 60000, valid: 0.01, tokenizer: letters}
  talks: {synthetic: counting.chats, count: 20000, tokenizer: letters, format: chat}
  asked: {synthetic: counting.questions, count: 4000, format: question}
benchmarks:
  exact: {task: answer, synthetic: counting.exam, limit: 1200}
  pick: {task: choice, synthetic: counting.exam, limit: 1200}
stages:
  - name: base
    kind: pretrain
    data: sums
    model: {n_layer: 3, n_embd: 128}
    train: {steps: 1200, ctx_len: 128, batch: 32, lr: 2e-3, valid_every: 100}
    bench: [exact, pick]
    samples: &ask {prompts: ["12 + 30 =", "User: What is 7 times 8?"]}
  - name: chat
    kind: sft
    data: talks
    start: base
    lora: {rank: 16}
    train: {steps: 400, ctx_len: 96, batch: 32, lr: 1e-3}
    bench: [exact, pick]
    samples: *ask
  - name: reason
    kind: grpo
    data: asked
    start: chat
    lora: {rank: 16}
    train: {steps: 150, ctx_len: 96, batch: 16, lr: 2e-4, log_every: 1}
    bench: [exact, pick]
    samples: *ask
"""
SCORES = {"base": (0.412, 0.63), "chat": (0.788, 0.846), "reason": (0.943, 0.957)}


@pytest.fixture
def pair(tmp_path):
    """A model in bf16, an adapter trained beside it, and the model that has both."""
    import torch

    from rwkvpipe.base.config import LoraConfig, RwkvConfig
    from rwkvpipe.base.files import digest
    from rwkvpipe.model.family import build
    from rwkvpipe.train.stage import write_adapter
    from rwkvpipe.weights import store
    from rwkvpipe.weights.lora import inject

    start = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=257))
    start.initialise(4)
    path, adapter = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"
    asked = LoraConfig(rank=2, full=("ln_x",))
    store.write_tensors(path, {name: value.bfloat16() for name, value in start.state_dict().items()})
    model = store.load_model(path)
    inject(model, asked)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    write_adapter(adapter, model, asked, base=digest(path))
    return path, adapter, model


def _jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _metrics(kind: str, steps: int, every: int) -> list[dict]:
    """A training that goes as trainings go: steep, then flat, with noise from a seed."""
    lots, rows = random.Random(kind), []
    for step in sorted({1, *range(every, steps + 1, every)}):
        part = step / steps
        row = {"step": step, "tokens": 3000 * step, "loss": 0.6 + 2.4 * math.exp(-12 * part) + lots.gauss(0, 0.02)}
        row |= {"lr": 2e-3 * min(1, step / 20) * 0.5 * (1 + math.cos(math.pi * part)), "seconds": 0.14 * step}
        row |= {"grad_norm": 0.3 + 2 * math.exp(-14 * part) + abs(lots.gauss(0, 0.05))}
        row["tokens_per_second"] = 21400 + lots.gauss(0, 400)
        if kind == "pretrain" and step % (10 * every) == 0:
            row["valid_loss"] = row["loss"] + 0.03
        if kind == "grpo":
            row |= {
                "loss": lots.gauss(0, 0.01),
                "mean_reward": 0.7 + 0.24 * (1 - math.exp(-4 * part)) + lots.gauss(0, 0.02),
            }
            row |= {"reward_std": 0.3 * math.exp(-2 * part), "kl_div": 0.02 * part, "clip_ratio": 0.02 * lots.random()}
            row |= {"completions/mean_length": 5 + lots.random(), "completions/clipped_ratio": 0.02 * lots.random()}
        rows.append(row)
    return rows


def _graded(name: str, share: float) -> list[dict]:
    rows = []
    for n in range(12):
        right = n < round(12 * share)
        row = {"question": f"What is {n + 21} plus {3 * n + 5}?", "gold": str(4 * n + 26), "correct": float(right)}
        said = str(4 * n + (26 if right else 36))
        row["answer"] = f" The answer is {said}." if name == "exact" else said
        rows.append(row)
    return rows


@pytest.fixture
def finished_run(tmp_path, monkeypatch) -> dict:
    """The story of a run of three stages whose files lie under the working folder, numbers and all, but no model."""
    monkeypatch.chdir(tmp_path)
    return fabricate(Path("."))


def fabricate(folder: Path) -> dict:
    """Write what the steps of a run leave behind below the working folder; returns what the plan tells of it."""
    plan = Plan(parse(yaml.safe_load(RUN), "config"), "results")
    story, lots = plan.story(), random.Random(5)
    for subject in story["subjects"]:
        home, stage = folder / subject["folder"], plan.stages[subject["name"]]
        _jsonl(home / "settings.json", [plan.settings(subject["name"])])
        _jsonl(home / "metrics.jsonl", _metrics(subject["kind"], stage.train.steps, stage.train.log_every))
        texts = {"12 + 30 =": " 42\n", "User: What is 7 times 8?": "\n\nAssistant: 7 times 8 is 56."}
        _jsonl(home / "samples.jsonl", [{"prompt": prompt, "text": text} for prompt, text in texts.items()])
        for name, share in zip(subject["bench"], SCORES[subject["name"]], strict=True):
            wide = 1.96 * math.sqrt(share * (1 - share) / 1200)
            score = {"benchmark": name, "task": plan.config.benchmarks[name].task, "n": 1200, "score": share}
            score |= {"low": share - wide, "high": share + wide, "better": "higher"}
            _jsonl(home / f"bench/{name}.json", [score | ({"chance": 0.25} if name == "pick" else {})])
            _jsonl(home / f"bench/{name}.samples.jsonl", _graded(name, share))
        if subject["corpus"]:
            _jsonl(folder / subject["corpus"], [{"train": {"documents": 60000, "tokens": 1234567}}])
    for job in story["steps"]:
        if job["timing"]:
            seconds = {"pretrain": 168.2, "sft": 58.1, "grpo": 131.4, "bench": 9.3}.get(job["rule"], 1.2)
            _jsonl(folder / job["timing"], [{"s": seconds * lots.uniform(0.9, 1.1), "max_rss": 412.5}])
            said = "12:00:00 device: CPU\n12:00:01 device cpu, 2 threads, torch 2.9.0\n"
            said += f"12:00:02 {job['rule']}: {'41,472 of 773,376' if job['label'] != 'base' else '731,904 of 731,904'}"
            said += " numbers are trained, for 9 steps\n"
            (folder / job["timing"]).with_suffix(".log").write_text(said)
    return story
