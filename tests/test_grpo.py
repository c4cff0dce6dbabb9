"""GRPO resumes bit for bit, learns what is rewarded, and its rollouts are functions of seed and step."""

import hashlib
import json
import signal

import pytest
import torch

from rwkvpipe import grpo
from rwkvpipe.base.config import LoraConfig, RolloutConfig, RwkvConfig, SamplingConfig, Settings, TrainConfig
from rwkvpipe.base.errors import ConfigError, DataError, Stopped
from rwkvpipe.base.files import write_json, write_jsonl
from rwkvpipe.infer.engine import Completion
from rwkvpipe.model.family import build
from rwkvpipe.show.chart import curves
from rwkvpipe.show.metrics import read_metrics
from rwkvpipe.tokenizer.load import load_tokenizer
from rwkvpipe.train import loop, question, rollout
from rwkvpipe.train.question import Room
from rwkvpipe.train.record import MEASURED
from rwkvpipe.train.reference import Reference
from rwkvpipe.train.reward import Rewards
from rwkvpipe.train.stage import open_stage, stage_parser
from rwkvpipe.weights import store

MODEL = RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=256)


class PlainEngine:
    """Samples one token after another with the whole forward: slow and plain."""

    def __init__(self, model, tokenizer, rows):
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def generate(self, prompts, sampling, samples=1, *, numbers):
        for number, prompt in zip(numbers, prompts, strict=True):
            for sample in range(samples):
                key = f"{sampling.seed} {number} {sample}".encode()
                stream = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7]))
                ids, found, logprobs = list(prompt), [], []
                for _ in range(sampling.max_tokens):
                    logits, _ = self.model(torch.tensor([ids + found]))
                    chances = (logits[0, -1] / sampling.temperature).softmax(-1)
                    found.append(int(torch.multinomial(chances, 1, generator=stream)))
                    logprobs.append(float(chances[found[-1]].log()))
                    if found[-1] % 7 == 0:
                        break
                finish = "stop" if found[-1] % 7 == 0 else "length"
                yield Completion(number, sample, found, self.tokenizer.decode(found), logprobs, finish)


def even(row, text):
    return float(len(text.encode()) > 0 and text.encode()[0] % 2 == 0)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    monkeypatch.setattr(rollout, "Engine", PlainEngine)
    monkeypatch.setattr(rollout, "reward", lambda name: even)
    model = build(MODEL)
    model.initialise(0)
    with torch.no_grad():
        model.head.weight.mul_(0.3)
    store.write_tensors(tmp_path / "start.safetensors", model.state_dict())
    write_jsonl(tmp_path / "q.jsonl", ({"question": f"{n}+{n * n}", "answer": str(n + n * n)} for n in range(5)))
    return tmp_path


def settings(home, prompt="{question}=", **changes):
    train = {"steps": 4, "ctx_len": 64, "batch": 2, "lr": 0.003, "warmup": 0, "log_every": 1} | changes.pop("train", {})
    asked = {"samples": 4, "sampling": SamplingConfig(max_tokens=4)} | changes.pop("rollout", {})
    value = Settings(
        kind="grpo", seed=5, train=TrainConfig(**train), rollout=RolloutConfig(**asked), prompt=prompt, **changes
    )
    write_json(home / "settings.json", value.model_dump(mode="json"))


def run(home, name, micro_batch=8, out="model.safetensors", save_every=2):
    path = home / name / out
    grpo.main([
        str(home / "settings.json"), "--model", str(home / "start.safetensors"), "--tokenizer", "bytes",
        "--data", str(home / "q.jsonl"), "--micro-batch", str(micro_batch), "--save-every", str(save_every),
        "--out", str(path),
    ])  # fmt: skip
    rows = [json.loads(line) for line in (home / name / "metrics.jsonl").read_text().splitlines()]
    kept = [json.loads(line) for line in (home / name / "rollouts.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
    return store.read_tensors(path)[0], rows, kept


LORA = LoraConfig(rank=2)
CASES = {
    "plain": {},
    "reference": {"rollout": {"beta": 0.1, "iterations": 3}},
    "adapter": {"lora": LORA, "rollout": {"beta": 0.1, "iterations": 2}},
    "slices": {"rollout": {"slices": 2}},
    "following": {"rollout": {"beta": 0.1, "sync": 3, "mixup": 0.5, "iterations": 2}},
    "taught": {"rollout": {"beta": 0.1, "top_entropy": 0.5, "kl_equal": False, "kl_ratio": True, "slices": 2}},
}


class Break:
    """Calls a function through until the n-th call, which is interrupted."""

    def __init__(self, function, at):
        self.function, self.left = function, at

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_in_rollout_or_update_ends_in_the_same_weights(home, monkeypatch, case):
    settings(home, **CASES[case])
    whole = run(home, "whole")
    for place in ("grade", 1, 3):
        with monkeypatch.context() as patch:
            if place == "grade":  # 8 grades a rollout
                patch.setattr(rollout, "reward", lambda name: Break(even, 11))
            else:  # one call a step
                patch.setattr("rwkvpipe.train.policy.completion_logprobs", Break(rollout.completion_logprobs, place))
            with pytest.raises(Stopped):
                run(home, f"cut{place}")
        again = run(home, f"cut{place}")
        assert whole[0].keys() == again[0].keys()
        for name, value in whole[0].items():
            assert torch.equal(value, again[0][name]), name
        assert whole[1:] == again[1:]
        assert [row["step"] for row in whole[1]] == [1, 2, 3, 4]
        assert [path.name for path in (home / f"cut{place}" / "checkpoints").iterdir()] == ["ended.json"]


def test_the_micro_batch_decides_no_result(home):
    settings(home, rollout={"beta": 0.05})
    one, other = run(home, "a", micro_batch=1), run(home, "b", micro_batch=5)
    for name, value in one[0].items():
        torch.testing.assert_close(value, other[0][name], atol=1e-5, rtol=1e-4)


def test_metrics_name_what_happened(home):
    settings(home, rollout={"beta": 0.1})
    _, rows, kept = run(home, "a")
    wanted = {"step", "tokens", "loss", "lr", "grad_norm", "mean_reward", "reward_std", "mean_advantage", "kl_div"}
    wanted |= {"entropy", "clip_ratio", "frac_reward_zero_std", "sampler_gap", "completions/clipped_ratio"}
    wanted |= {f"clip_ratio/{side}_mean" for side in ("region", "low", "high")}
    wanted |= {f"completions/{kind}_length" for kind in ("mean", "min", "max")}
    wanted |= {f"{name}/{kind}" for name in ("reward", "rewards/answer") for kind in ("mean", "std", "min", "max")}
    assert rows[0].keys() >= wanted | {"train_loss"}
    for row in rows:
        assert row["train_loss"] == pytest.approx(row["loss"], abs=1e-6) and len(rows) == 4
    assert rows[0]["kl_div"] == 0
    assert rows[-1]["kl_div"] > 0
    assert max(row["sampler_gap"] for row in rows) < 1e-4
    assert {row["step"] for row in kept} == {1, 2, 3, 4}
    assert kept[0].keys() == {
        "step", "question", "sample", "prompt", "text", "ids", "finish", "reward", "rewards", "advantage", "logprob",
        "reference_logprob", "length", "seed", "line",
    }  # fmt: skip
    assert all(row["prompt"].startswith(f"{row['line'] - 1}+") for row in kept)
    assert all(row["length"] == len(row["ids"]) for row in kept) and len({row["seed"] for row in kept}) == 4
    assert all(0 < row["entropy"] < 5.55 and row["sampler_gap"] <= row["sampler_gap_largest"] < 1e-3 for row in rows)


def test_what_was_not_computed_is_in_no_file(home):
    settings(home, train={"steps": 1})
    _, rows, kept = run(home, "a")
    assert {"mean_reward", "clip_ratio"} <= rows[0].keys() and "kl_div" not in rows[0]
    assert "logprob" in kept[0] and "reference_logprob" not in kept[0]
    assert "Divergence" not in curves(read_metrics(home / "a/metrics.jsonl"), "grpo")


@pytest.mark.slow
def test_what_is_rewarded_becomes_more_frequent(home):
    settings(home, train={"steps": 24, "lr": 0.01, "batch": 4}, rollout={"sampling": SamplingConfig(max_tokens=1)})
    _, rows, _ = run(home, "a")
    assert sum(row["mean_reward"] for row in rows[-3:]) > sum(row["mean_reward"] for row in rows[:3]) + 0.3


def test_every_question_is_asked_once_before_any_is_asked_again():
    config = TrainConfig(steps=1, batch=3)
    asked = [i for step in range(5) for i in question.drawn(5, config, step, 1)]
    assert sorted(asked[:5]) == sorted(asked[5:10]) == sorted(asked[10:]) == list(range(5))
    assert asked[:5] != asked[5:10] or asked[:5] != asked[10:]
    in_order = TrainConfig(steps=1, batch=3, order="sequential")
    assert question.drawn(5, in_order, 1, 1) == [3, 4, 0]


def test_the_order_of_a_pass_is_made_once(monkeypatch):
    made, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda count, **more: (made.append(count), real(count, **more))[1])
    config = TrainConfig(steps=1, batch=40)
    asked = [i for step in range(5) for i in question.drawn(107, config, step, 12345)]
    assert len(made) == 2 and sorted(asked[:107]) == list(range(107))


def test_a_prompt_that_leaves_no_room_is_cut_in_sampling_and_learning_alike(home, caplog):
    questions = ["12", "1234567", "98765"]
    for long, kept, text in (
        ("end", [q[-5:] for q in questions], "{question}="),
        ("start", ["12=", "123456", "98765="], "{question}"),
    ):
        made = []
        for asked, prompt in ((questions, "{question}="), (kept, text)):
            write_jsonl(home / "q.jsonl", [{"question": q, "answer": "1"} for q in asked])
            settings(home, train={"ctx_len": 10, "steps": 2}, rollout={"long": long, "beta": 0.1}, prompt=prompt)
            made.append(run(home, f"{long}{len(made)}"))
        (tensors, rows, told), (wanted, *others) = made
        assert [rows, told] == others and all(torch.equal(tensors[name], wanted[name]) for name in wanted)
        assert {line["prompt"] for line in told} <= {"12=", "34567=", "123456", "98765="}
        assert max(row["sampler_gap_largest"] for row in rows) < 1e-4
        assert f"more than 6 tokens leave no room: 1 are cut, their {long} is kept" in caplog.text


def test_states_are_tuned_by_prompts_of_which_the_end_alone_is_read(home):
    """The tuned state stands before what is left of a prompt, in sampling and learning alike."""
    stream, begun = torch.Generator().manual_seed(1), store.read_tensors(home / "start.safetensors")[0]
    moved = {name: value + 0.05 * torch.randn(value.shape, generator=stream) for name, value in begun.items()}
    store.write_tensors(home / "start.safetensors", moved)  # a new model's matrices of zeros hide its states
    questions, made = ["12", "1234567", "98765"], []
    for asked in (questions, [q[-5:] for q in questions]):
        write_jsonl(home / "q.jsonl", [{"question": q, "answer": "1"} for q in asked])
        train = {"ctx_len": 10, "steps": 4, "lr": 2.0, "batch": 3}
        settings(home, train=train, rollout={"beta": 0.1, "iterations": 2, "kept": 12}, state=True)
        made.append(run(home, f"{len(made)}", out="adapter.safetensors"))
    (tensors, rows, told), (wanted, *others) = made
    assert [rows, told] == others and all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert {line["prompt"] for line in told} == {"12=", "34567=", "98765="}
    assert tensors and all("time_state" in name and value.abs().max() > 0.1 for name, value in tensors.items())
    # the sampler began with the state that had moved, or else it would have drawn by other chances
    gaps = [row["sampler_gap_largest"] for row in rows]
    assert max(gaps) < 1e-5 and rows[-1]["kl_div"] > 1e-4
    assert all(line["reference_logprob"] == pytest.approx(line["logprob"]) for line in told if line["step"] == 1)
    assert any(abs(line["reference_logprob"] - line["logprob"]) > 1e-2 for line in told if line["step"] == 3)


def test_questions_that_are_too_long_are_left_out_or_refused_as_is_asked(home, caplog):
    write_jsonl(home / "q.jsonl", [{"question": q, "answer": "1"} for q in ("1", "1234567", "2")])

    def read(longest, long):
        tokenizer = load_tokenizer("bytes")
        return question.read_questions(home / "q.jsonl", lambda row: row["question"], tokenizer, Room(longest, long))

    assert [each.prompt for each in read(3, "drop")] == ["1", "2"]
    assert "more than 3 tokens leave no room: 1 are left out" in caplog.text
    with pytest.raises(DataError, match=r"q\.jsonl:2: the prompt has 7 tokens; 1 to 3"):
        read(3, "refuse")
    with pytest.raises(DataError, match=r"no questions in it but 3 that are too long"):
        read(0, "drop")


@pytest.mark.parametrize("rows", [[], [{"text": "x"}], [{"question": 3, "answer": "3"}], [{"question": "3"}]])
def test_a_file_without_questions_is_refused(home, rows):
    settings(home)
    write_jsonl(home / "q.jsonl", rows)
    with pytest.raises(DataError, match=r"q\.jsonl"):
        run(home, "a")


def test_settings_that_exclude_each_other_are_refused(home):
    for changes, key in (
        ({"train": {"ctx_len": 4}}, "train.ctx_len"),
        ({"rollout": {"sampling": SamplingConfig(temperature=0.0, max_tokens=4)}}, "temperature"),
        ({"lora": LoraConfig(rank=2, dropout=0.1)}, "lora.dropout"),
        ({"lora": LoraConfig(rank=2), "rollout": {"beta": 0.1, "sync": 2}}, "rollout.sync"),
    ):
        settings(home, **changes)
        with pytest.raises(ConfigError, match=key):
            run(home, "a")


def test_a_reference_moves_towards_the_policy_every_so_many_steps(home, monkeypatch):
    settings(home, rollout={"beta": 0.1, "sync": 2, "mixup": 1.0})
    found = [row["kl_div"] for row in run(home, "a")[1]]
    assert found[0] == found[2] == 0 < min(found[1], found[3])  # moved all the way, it is the policy itself
    settings(home, rollout={"beta": 0.1, "sync": 1, "mixup": 0.25})
    stage = open_stage(parsed(home), kind="grpo")
    reference = Reference(stage)
    with torch.no_grad():
        for value in stage.model.parameters():
            value += 1
    before = [value.clone() for value in reference.copy.parameters()]
    reference.follow(0)
    assert all(map(torch.equal, before, reference.copy.parameters()))
    with monkeypatch.context() as patch:  # a stop on the way waits for its end
        before_it = signal.signal(signal.SIGTERM, signal.default_int_handler)
        patch.setattr("rwkvpipe.train.reference.local", lambda value: signal.raise_signal(signal.SIGTERM) or value)
        with pytest.raises(KeyboardInterrupt):
            reference.follow(1)
        signal.signal(signal.SIGTERM, before_it)
    reference.follow(1)
    for old, new in zip(before, reference.copy.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)


def test_completions_cut_off_are_masked_when_asked(home):
    settings(home, rollout={"mask_truncated": True})
    stage = open_stage(parsed(home), kind="grpo")
    tokenizer = load_tokenizer("bytes")
    questions = question.read_questions(home / "q.jsonl", lambda row: row["question"], tokenizer, Room(60))
    found = [Completion(0, n, [7, 8, 9], "x", [0.0] * 3, end) for n, end in enumerate(("length", "stop"))]
    made = rollout.Sampler(stage, questions, tokenizer, 8).arrange(questions, found, torch.ones(2))
    assert made.mask.tolist() == [[0, 0, 0], [1, 1, 1]]  # the loss divides by what the mask holds
    _, rows, _ = run(home, "a")
    assert 0 < rows[0]["completions/clipped_ratio"] <= 1


def test_empty_completions_are_legal(home, monkeypatch):
    class Silent(PlainEngine):
        def generate(self, prompts, sampling, samples=1, *, numbers):
            for number in numbers:
                for sample in range(samples):
                    yield Completion(number, sample, [], "", [], "stop")

    monkeypatch.setattr(rollout, "Engine", Silent)
    settings(home, rollout={"beta": 0.1})
    _, rows, _ = run(home, "a")
    assert all(row["loss"] == 0 for row in rows)


def test_a_model_smaller_than_the_vocabulary_is_refused(home):
    assert load_tokenizer("bytes").size == MODEL.vocab_size
    small = build(MODEL.model_copy(update={"vocab_size": 100}))
    small.initialise(0)
    store.write_tensors(home / "start.safetensors", small.state_dict())
    settings(home)
    with pytest.raises(ConfigError, match="--tokenizer"):
        run(home, "a")


JUDGES = """
def short(completions, **columns):
    assert len(columns["question"]) == len(columns["completion_ids"]) == len(completions)
    return [-len(text) / 10 for text in completions]

def sometimes(prompts, completions, answer):
    return [None if prompt[0] in "02" else float(answer[n][-1] in text) for n, (prompt, text) in
            enumerate(zip(prompts, completions))]

def few(completions):
    return [1.0]

def words(completions):
    return ["good" for _ in completions]

def silent(completions):
    return [None] * len(completions)

async def later(completions):
    import asyncio
    return await asyncio.gather(*(asyncio.sleep(0, float(len(text))) for text in completions))

async def together(completions):
    import asyncio
    others = len(asyncio.all_tasks()) > 2
    await asyncio.sleep(0)
    return [float(others)] * len(completions)

async def likewise(completions):
    return await together(completions)

def breaks(completions):
    return completions[0] + 1

def quoted(completions):
    return ["1.5"] * len(completions)

def vast(completions):
    return [1e300 * n for n, _ in enumerate(completions)]

def vaster(completions):
    return [10**400] * len(completions)

def unknown(completions):
    return [0.0] + [float("nan")] * (len(completions) - 1)

def hinted(completions, hint):
    return [0.0 if each is None else 1.0 for each in hint]

def placed(completions, /):
    return [0.0] * len(completions)
"""


def test_rewards_are_weighed_and_come_from_files_too(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "judges.py").write_text(JUDGES)
    seen = []
    for weights in ({"answer": 1.0, "judges.py:short": 0.5}, {"answer": 1.0, "judges.py:short": 0.1}):
        settings(home, rollout={"reward": weights | {"judges.py:sometimes": 2.0}})
        tensors, rows, kept = run(home, f"{len(seen)}")
        seen.append(tensors["head.weight"])
        assert all(row["rewards"]["judges.py:short"] == -len(row["text"]) / 10 for row in kept)  # to the last digit
        for name in ("answer", "judges.py:short", "judges.py:sometimes"):
            assert {f"rewards/{name}/mean", f"rewards/{name}/std"} <= rows[0].keys()
        assert rows[0]["rewards/judges.py:short/mean"] < 0
        for name in ("reward/{}", "completions/{}_length"):
            low, mean, high = (rows[0][name.format(kind)] for kind in ("min", "mean", "max"))
            assert low <= mean <= high
    assert not torch.equal(*seen)


def test_a_reward_that_applies_to_nothing_is_in_no_number_and_an_async_one_is_waited_for(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "judges.py").write_text(JUDGES)
    settings(home, train={"steps": 1}, rollout={"reward": {"judges.py:silent": 1.0, "judges.py:later": 1.0}})
    _, (row,), kept = run(home, "a")
    assert not any("silent" in name for name in row) and kept[0]["rewards"]["judges.py:silent"] is None
    assert row["rewards/judges.py:later/max"] == row["reward/max"] > 0
    settings(home, train={"steps": 1}, rollout={"reward": "judges.py:silent"})
    _, (row,), _ = run(home, "b")
    assert "mean_reward" not in row and row["loss"] == row["grad_norm"] == row["mean_advantage"] == 0


def test_a_column_of_few_questions_is_there_in_each_rollout(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "judges.py").write_text(JUDGES)
    rows = [{"question": f"{n}+1", "answer": str(n + 1)} | ({"hint": "carry"} if n == 3 else {}) for n in range(8)]
    write_jsonl(home / "q.jsonl", rows)
    settings(home, train={"steps": 4, "batch": 2}, rollout={"reward": "judges.py:hinted", "kept": 100})
    _, rows, kept = run(home, "a")
    assert sorted(row["mean_reward"] for row in rows) == [0, 0, 0, 0.5]
    assert {row["line"] for row in kept if row["reward"] == 1} == {4}


@pytest.mark.parametrize(
    "name, error, said",
    [
        ("judges.py:none", ConfigError, "judges.py has no function none"),
        ("other.py:short", ConfigError, "there is no file other.py"),
        ("judges.py:few", DataError, "judges.py:few returns 1 for 8 completions"),
        ("judges.py:words", DataError, "judges.py:words returns 'good' at 0, no number"),
        ("judges.py:quoted", DataError, "judges.py:quoted returns '1.5' at 0, no number"),
        ("judges.py:vast", DataError, r"judges.py:vast returns 1e\+300 at 1; a reward is at most"),
        ("judges.py:vaster", DataError, r"judges.py:vaster returns 10{39} at 0; a reward is at most"),
        ({"judges.py:short": 1e40}, DataError, "rollout.reward: a weighted sum is over 1e.30"),
        ("judges.py:breaks", DataError, r"judges.py:breaks raises TypeError at .*judges.py:\d+"),
        ("broken.py:f", DataError, r"broken.py:f raises SyntaxError at .*broken.py:1"),
        ("judges.py:unknown", DataError, "judges.py:unknown returns nan at 1; None is for"),
        ("judges.py:hinted", DataError, "judges.py:hinted asks for `hint`; what it can be told .* question, answer,"),
        ("judges.py:placed", DataError, "judges.py:placed asks for `completions`; what it can be told"),
    ],
)
def test_rewards_that_cannot_be_used_are_told_in_one_line(home, monkeypatch, name, error, said):
    monkeypatch.chdir(home)
    (home / "judges.py").write_text(JUDGES)
    (home / "broken.py").write_text("def f(:\n")
    settings(home, rollout={"reward": name})
    with pytest.raises(error, match=said) as told:
        run(home, "a")
    assert "\n" not in str(told.value)


DRAWN = """
from __future__ import annotations
import pickle, random
from dataclasses import dataclass
import numpy as np, torch

made = []

@dataclass
class Grade:
    value: float

def by_lot(completions):
    assert pickle.loads(pickle.dumps(by_lot)) is by_lot
    made.append(len(completions))
    return np.array([Grade(random.random() + np.random.rand() + float(torch.rand(()))).value for _ in completions])

def counts(completions):
    return [float(len(made))] * len(completions)
"""


def test_what_functions_draw_by_lot_is_the_same_after_a_stop_and_a_file_is_one_module(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "lots.py").write_text(DRAWN)
    settings(home, rollout={"reward": {"lots.py:by_lot": 1.0, "lots.py:counts": 1.0}})
    _, rows, kept = run(home, "whole")
    again = [row["reward"] - row["rewards"]["lots.py:counts"] for row in kept]
    assert len(set(again)) == len(again)
    assert [row["rewards"]["lots.py:counts"] for row in kept][:: len(kept) // 4] == [1.0, 2.0, 3.0, 4.0]
    settings(home, rollout={"reward": "lots.py:by_lot"})
    whole = run(home, "alone")
    with monkeypatch.context() as patch:
        patch.setattr("rwkvpipe.train.loop._gradient", Break(loop._gradient, 2))
        with pytest.raises(Stopped):
            run(home, "cut")
    assert run(home, "cut")[1:] == whole[1:]


def test_bnpo_averages_parts_that_the_settings_name_and_no_others(home):
    seen = {}
    for part, loss in ((None, "bnpo"), (2, "bnpo"), (8, "bnpo"), (None, "dapo")):
        settings(home, train={"steps": 1}, rollout={"loss": loss, "part": part})
        seen[part, loss] = run(home, f"{part}{loss}")[0]["head.weight"]
    assert torch.allclose(seen[8, "bnpo"], seen[None, "dapo"], atol=1e-6)
    assert not torch.equal(seen[None, "bnpo"], seen[2, "bnpo"])
    assert not torch.equal(seen[None, "bnpo"], seen[8, "bnpo"])
    settings(home, train={"steps": 1}, rollout={"loss": "bnpo", "part": 2})
    torch.testing.assert_close(
        run(home, "again", micro_batch=3)[0]["head.weight"], seen[2, "bnpo"], atol=1e-5, rtol=1e-4
    )


def test_slices_are_learned_from_in_turn_and_hold_every_completion_once(home):
    settings(home, train={"steps": 4}, rollout={"slices": 4, "iterations": 1})
    stage = open_stage(parsed(home), kind="grpo")
    tokenizer = load_tokenizer("bytes")
    questions = question.read_questions(home / "q.jsonl", lambda row: row["question"], tokenizer, Room(60))
    stream = rollout.Sampler(stage, questions, tokenizer, 8).batches(0, {})
    parts = [next(stream) for _ in range(5)]
    pairs = [pair for part in parts[:4] for pair in zip(part.ids, part.first, strict=True)]
    rows = [tuple(row[: int(first)].tolist()) for row, first in pairs]
    assert [len(part.ids) for part in parts] == [2] * 5
    assert sorted(rows.count(row) for row in set(rows)) == [4, 4]
    assert abs(float(torch.cat([part.advantages for part in parts[:4]]).sum())) < 1e-5
    settings(home, rollout={"slices": 3})
    with pytest.raises(ConfigError, match="8 completions .* are not cut into 3 equal parts"):
        run(home, "a")


def parsed(home):
    words = ["--model", str(home / "start.safetensors"), "--out", str(home / "x.safetensors")]
    return stage_parser("grpo", "x").parse_args([str(home / "settings.json"), *words])


HOOKS = """
import torch

def keep(completions, completion_ids, masks, tokenizer, question):
    assert len(question) == len(completions) and completion_ids.shape == masks.shape
    return {"completions": completions, "completion_ids": completion_ids, "masks": masks}

def ones(prompts, completions, completion_ids, tokenizer):
    return torch.ones(completion_ids.shape)

def first(completion_ids):
    found = torch.zeros(completion_ids.shape)
    found[:, 0] = 0.5
    return found

def none(completion_ids):
    return torch.zeros(completion_ids.shape)

def negative(completion_ids):
    return -torch.ones(completion_ids.shape)

def narrow(completion_ids):
    return torch.ones(completion_ids.shape[0], 1)

def said(completions, completion_ids, masks):
    completion_ids[:, 0], masks[:, 1:] = 66, False
    return {"completions": ["B" for _ in completions], "completion_ids": completion_ids, "masks": masks}

def nothing():
    return None

def lacking(completions):
    return {"completions": completions}

def edited(completions, completion_ids, masks):
    return {"completions": [text + "!" for text in completions], "completion_ids": completion_ids, "masks": masks}

def gaps(completions, completion_ids, masks):
    masks[:] = True
    masks[0, 0] = False
    return {"completions": completions, "completion_ids": completion_ids, "masks": masks}

def outside(completions, completion_ids, masks):
    return {"completions": completions, "completion_ids": completion_ids + 999, "masks": masks}
"""


def test_rewards_that_are_waited_for_are_waited_for_at_the_same_time(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "judges.py").write_text(JUDGES)
    asked = RolloutConfig(reward={"judges.py:together": 1.0, "answer": 1.0, "judges.py:likewise": 2.0})
    found = [Completion(0, n, [7], "x", [0.0], "stop") for n in range(3)]
    rewards = Rewards(asked, lambda name: even)
    assert rewards([{"question": "q"}] * 3, ["q"] * 3, found) == [[even({}, "x"), 1.0, 1.0]] * 3
    assert list(rewards.weights) == ["answer", "judges.py:likewise", "judges.py:together"]


def test_hooks_that_change_nothing_change_nothing(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "hooks.py").write_text(HOOKS)
    settings(home, train={"steps": 2})
    plain = run(home, "plain")
    settings(home, train={"steps": 2}, rollout={"postprocess": "hooks.py:keep", "loss_mask": "hooks.py:ones"})
    hooked = run(home, "hooked")
    assert plain[1:] == hooked[1:] and torch.equal(plain[0]["head.weight"], hooked[0]["head.weight"])


def test_edited_completions_are_what_is_graded_and_learned(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "hooks.py").write_text(HOOKS)
    settings(home, train={"steps": 1}, rollout={"postprocess": "hooks.py:said"})
    _, rows, kept = run(home, "a")
    assert rows[0]["mean_reward"] == 1 and rows[0]["completions/mean_length"] == 1 and rows[0]["sampler_gap"] == 0
    assert kept[0]["text"] == "B" and kept[0]["ids"] == [66]


def test_a_loss_mask_says_how_much_tokens_count(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "hooks.py").write_text(HOOKS)
    seen = {}
    for name in ("ones", "first", "none"):
        settings(home, train={"steps": 1}, rollout={"loss_mask": f"hooks.py:{name}"})
        tensors, rows, _ = run(home, name)
        seen[name] = tensors["blocks.0.att.key.weight"], rows[0]["grad_norm"]
    assert seen["none"][1] == 0 < seen["first"][1] != seen["ones"][1]


@pytest.mark.parametrize(
    "key, name, said",
    [
        ("loss_mask", "negative", "counts less than nothing"),
        ("loss_mask", "narrow", r"is of shape \(8, 1\), \(8, 4\) went in"),
        ("loss_mask", "absent", "hooks.py has no function absent"),
        ("postprocess", "nothing", "NoneType returned; a dict of completions, completion_ids, masks"),
        ("postprocess", "lacking", "has no completion_ids"),
        ("postprocess", "edited", "another text and the same ids"),
        ("postprocess", "gaps", "completion 0 has a gap"),
        ("postprocess", "outside", "no id of the 256"),
    ],
)
def test_hooks_that_break_their_contract_are_told_in_one_line(home, monkeypatch, key, name, said):
    monkeypatch.chdir(home)
    (home / "hooks.py").write_text(HOOKS)
    settings(home, rollout={key: f"hooks.py:{name}"})
    with pytest.raises((ConfigError, DataError), match=f"rollout.{key}: .*{said}") as told:
        run(home, "a")
    assert "\n" not in str(told.value)
