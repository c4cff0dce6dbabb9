"""Pretraining learns, resumes bit for bit, and refuses what does not fit, in one line."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from rwkvpipe import merge, pretrain
from rwkvpipe.base.config import LoraConfig, RwkvConfig, Settings, TrainConfig
from rwkvpipe.base.errors import ConfigError, DataError, PipeError, Stopped
from rwkvpipe.base.files import write_json
from rwkvpipe.data.batches import rows_of, token_batches
from rwkvpipe.data.binidx import Binidx, BinidxWriter
from rwkvpipe.model.family import build
from rwkvpipe.train import corpus, loop
from rwkvpipe.train.dist import Rank
from rwkvpipe.train.optim import lr_at, whole_length
from rwkvpipe.train.record import MEASURED
from rwkvpipe.weights import store

MODEL = RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=24)


def write_corpus(folder, documents=40, size=24):
    """Counting documents: each number is followed by the next, so that there is something to learn."""
    stream = np.random.default_rng(0)
    for part, count in (("train", documents), ("valid", 4)):
        with BinidxWriter(folder / part, np.uint16) as writer:
            for _ in range(count):
                start, length = stream.integers(1, size), stream.integers(5, 30)
                writer.add([int(1 + (start + n) % (size - 1)) for n in range(length)] + [0])
    write_json(folder / "corpus.json", {"vocab_size": size})


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    model = build(MODEL)
    model.initialise(0)
    store.write_tensors(tmp_path / "start.safetensors", model.state_dict())
    return tmp_path


def settings(home, lora=None, kind="pretrain", mix=(), state=False, **train):
    asked = {"steps": 12, "ctx_len": 16, "batch": 4, "lr": 0.01, "warmup": 1, "log_every": 4} | train
    value = Settings(kind=kind, seed=5, train=TrainConfig(**asked), lora=lora, mix=mix, state=state)
    write_json(home / "settings.json", value.model_dump(mode="json"))


def run(home, name, micro_batch=4, out="model.safetensors", data=("corpus",)):
    path = home / name / out
    pretrain.main([
        str(home / "settings.json"), "--model", str(home / "start.safetensors"),
        "--data", *(str(home / each) for each in data),
        "--micro-batch", str(micro_batch), "--save-every", "5", "--out", str(path),
    ])  # fmt: skip
    rows = [json.loads(line) for line in (home / name / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
    return store.read_tensors(path)[0], rows


def stop_at(patch, at):
    """Have a stop signal come before a step."""
    real = loop.lr_at

    def interrupted(config, step):
        if step == at:
            raise KeyboardInterrupt
        return real(config, step)

    patch.setattr(loop, "lr_at", interrupted)


def test_it_learns_and_writes_what_the_rules_promise(home):
    settings(home, steps=40, valid_every=20)
    _, rows = run(home, "a")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert [row["step"] for row in rows if "valid_loss" in row] == [20, 40]
    assert rows[-1]["valid_loss"] < rows[0]["loss"]
    assert rows[-1]["tokens"] == 40 * 4 * 16
    found = [str(path.relative_to(home / "a")) for path in sorted((home / "a").rglob("*.*"))]
    assert found == ["checkpoints/ended.json", "config.json", "metrics.jsonl", "model.safetensors"]


def test_in_chunks_the_full_gradient_trains_as_whole_rows_do_and_the_truncated_one_does_not(home):
    found = {}
    for name, train in {"whole": {}, "full": {"chunk": 5, "bptt": "full"}, "cut": {"chunk": 5}}.items():
        settings(home, **train, l2_wrap=0, eps=1e-8, lr=1e-3)
        found[name] = run(home, name)
    (weights, rows), (full, full_rows), (cut, cut_rows) = found.values()
    assert full_rows[-1]["loss"] == pytest.approx(rows[-1]["loss"], abs=1e-4)
    assert full_rows[-1]["valid_loss"] == pytest.approx(rows[-1]["valid_loss"], abs=1e-4)
    assert full_rows[-1]["grad_norm"] == pytest.approx(rows[-1]["grad_norm"], rel=1e-3)
    assert cut_rows[0]["loss"] == pytest.approx(rows[0]["loss"], abs=1e-5)
    assert cut_rows[-1]["grad_norm"] != pytest.approx(rows[-1]["grad_norm"], rel=1e-3)
    name = "blocks.0.att.value.weight"
    assert (full[name] - weights[name]).abs().max() < 0.1 * (cut[name] - weights[name]).abs().max()


@pytest.mark.parametrize(
    "lora", [None, LoraConfig(rank=2, dropout=0.2, full=("ln1",)), LoraConfig(kind="pissa", rank=2)]
)
@pytest.mark.parametrize("at", [2, 7])
def test_a_stopped_run_ends_in_the_same_weights(home, monkeypatch, lora, at):
    stream, tensors = torch.Generator().manual_seed(1), store.read_tensors(home / "start.safetensors")[0]
    moved = {name: value + 0.05 * torch.randn(value.shape, generator=stream) for name, value in tensors.items()}
    store.write_tensors(home / "start.safetensors", moved)  # a new model's matrices of zeros hide whole adapters
    settings(home, lora)
    whole = run(home, "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, at)
        with pytest.raises(Stopped):
            run(home, "cut")
    assert (home / "cut" / "checkpoints").is_dir()
    assert not (home / "cut" / "metrics.jsonl").exists()
    again = run(home, "cut")
    assert whole[1] == again[1]
    assert all(torch.equal(value, again[0][name]) for name, value in whole[0].items())


def test_a_training_of_rwkv_lm_goes_on_behind_what_it_has_read_and_warms_up_again(home, monkeypatch):
    asked = {"schedule": "rwkv_mean", "order": "magic", "ctx_len": 7, "warmup": 2, "log_every": 1, "steps": 9}
    settings(home, **asked, begun=4)
    found = run(home, "whole")
    whole = whole_length(TrainConfig(**asked, batch=4, lr=0.01, begun=4), 0)
    assert [row["lr"] for row in found[1]] == [lr_at(whole, n) for n in range(5)]
    plain = [lr_at(TrainConfig(**asked, batch=4, lr=0.01), n) for n in range(9)]
    rates = [row["lr"] for row in found[1]]
    assert rates[2:] == plain[6:] and rates[:2] == [0.01 * plain[4], (0.01 + 0.99 / 2) * plain[5]]
    read = []
    monkeypatch.setattr(corpus, "fit", lambda model, batches, *rest, **more: read.append(batches(0, {})) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(home, "read")
    config = TrainConfig(**asked, batch=4, seed=5)
    wanted = token_batches(Binidx(home / "corpus/train"), config, Rank(0, 1, torch.device("cpu")), 4)
    assert torch.equal(next(read[0]).ids, next(wanted).ids)
    monkeypatch.undo()
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    stop_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        run(home, "cut")
    monkeypatch.undo()
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    again = run(home, "cut")
    assert again[1] == found[1]
    assert all(torch.equal(value, again[0][name]) for name, value in found[0].items())


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, dropout=0.2)])
def test_the_micro_batch_decides_no_result(home, lora):
    settings(home, lora, steps=6, eps=1e-4)
    one, other = run(home, "a", micro_batch=1), run(home, "b", micro_batch=3)
    for name, value in one[0].items():
        torch.testing.assert_close(value, other[0][name], atol=1e-4, rtol=1e-3)


def test_an_adapter_leaves_its_base_alone_and_merges_to_the_trained_model(home):
    settings(home, LoraConfig(rank=2, full=("ln_out",)))
    run(home, "a", out="adapter.safetensors")
    base, adapter = home / "start.safetensors", home / "a" / "adapter.safetensors"
    merge.main(["--model", str(base), "--adapter", str(adapter), "--out", str(home / "a" / "model.safetensors")])
    before, after = store.read(base)[1], store.read(home / "a" / "model.safetensors")[1]
    assert torch.equal(before["emb.weight"], after["emb.weight"])
    assert not torch.equal(before["ln_out.weight"], after["ln_out.weight"])
    assert not torch.equal(before["blocks.1.ffn.key.weight"], after["blocks.1.ffn.key.weight"])


def test_settings_of_another_kind_are_refused(home):
    settings(home, kind="sft")
    with pytest.raises(ConfigError, match="kind is sft"):
        run(home, "a")


def test_a_corpus_of_another_vocabulary_is_refused(home):
    settings(home)
    write_corpus(home / "corpus", size=30)
    with pytest.raises(DataError, match="vocabulary of 30"):
        run(home, "a")


def test_an_absent_corpus_is_named(home):
    settings(home)
    (home / "corpus" / "train.idx").unlink()
    with pytest.raises(DataError, match="corpus: no packed corpus"):
        run(home, "a")


def test_hardware_numbers_below_one_are_refused(home):
    settings(home)
    with pytest.raises(ConfigError, match="--micro-batch"):
        run(home, "a", micro_batch=0)


def test_other_weights_start_again(home, monkeypatch):
    settings(home)
    whole = run(home, "whole")
    monkeypatch.setattr(loop.checkpoint, "prune", lambda folder, keep, stem: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        run(home, "cut")
    monkeypatch.undo()
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    model = build(MODEL)
    model.initialise(1)
    store.write_tensors(home / "start.safetensors", model.state_dict())
    other = run(home, "cut")
    assert [row["step"] for row in other[1]] == [row["step"] for row in whole[1]]
    assert other[1] != whole[1]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"chunk": 5}, {"rows": "documents"}, {"order": "magic", "ctx_len": 9}])
def test_a_mix_of_corpora_stopped_anywhere_ends_in_the_same_weights(home, monkeypatch, more):
    (home / "other").mkdir()
    write_corpus(home / "other", documents=29, size=12)
    settings(home, mix=(1, 2), **more)
    both = {"data": ("corpus", "other")}
    whole = run(home, "whole", **both)
    real = loop.lr_at

    def interrupted(config, step):
        if step == 7:
            raise KeyboardInterrupt
        return real(config, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "lr_at", interrupted)
        with pytest.raises(Stopped):
            run(home, "cut", **both)
    cut = run(home, "cut", **both)
    assert all(torch.equal(cut[0][name], value) for name, value in whole[0].items()) and cut[1] == whole[1]
    assert "valid_loss" in whole[1][-1]
    settings(home, mix=(2, 1), **more)
    other = run(home, "other weights", **both)[0]
    assert not torch.equal(other["emb.weight"], whole[0]["emb.weight"])


def test_as_many_weights_as_corpora_are_needed(home):
    settings(home, mix=(1, 2))
    with pytest.raises(ConfigError, match="--data: 1 corpora, the settings have 2 weights"):
        run(home, "a")


@pytest.mark.parametrize("order", [{}, {"order": "magic"}, {"rows": "documents"}])
def test_a_training_is_as_long_as_steps_epochs_or_tokens_say(home, order):
    train = {"warmup": 0, "ctx_len": 8, **order}
    data = Binidx(home / "corpus/train", 24)
    rows = rows_of(data, TrainConfig(steps=1, **train), masked=False)
    settings(home, steps=None, epochs=0.5, **train)
    tensors, found = run(home, "epochs")
    steps = -(-rows // 8)  # half of them, 4 a step
    assert found[-1]["step"] == steps
    settings(home, steps=steps, **train)
    wanted = run(home, "steps")
    assert wanted[1] == found and all(torch.equal(value, wanted[0][name]) for name, value in tensors.items())
    if "rows" not in order:
        settings(home, steps=None, tokens=steps * 4 * 8 - 5, **train)
        assert run(home, "tokens")[1] == found


def test_an_epoch_reads_each_row_once(home):
    config = TrainConfig(epochs=2.0, ctx_len=8, batch=4)
    data = Binidx(home / "corpus/train", 24)
    rows = rows_of(data, config, masked=False)
    steps = whole_length(config, rows).steps
    stream = token_batches(data, config.model_copy(update={"seed": 1}), loop.ALONE, 0)
    seen = Counter(tuple(row) for _, batch in zip(range(steps), stream, strict=False) for row in batch.ids.tolist())
    assert 2 * rows <= sum(seen.values()) < 2 * rows + 4 and min(seen.values()) >= 2
    assert whole_length(TrainConfig(epochs=0.1, batch=1), 30).steps == 3  # 0.1 is no fraction of two's powers
    assert whole_length(TrainConfig(epochs=2, batch=4), 6, repeats=3).steps == 9


@pytest.mark.parametrize("apart", [{}, {"lora": LoraConfig(rank=2)}, {"state": True}], ids=["whole", "lora", "state"])
def test_the_best_weights_lie_beside_the_last_ones(home, monkeypatch, apart):
    def measured(*given, **named):
        losses = iter([3.0, 1.0, 2.0, 2.0, 1.5])
        return lambda model: next(losses)

    monkeypatch.setattr("rwkvpipe.train.corpus.held_out_loss", measured)
    stream, tensors = torch.Generator().manual_seed(1), store.read_tensors(home / "start.safetensors")[0]
    moved = {name: value + 0.2 * torch.randn(value.shape, generator=stream) for name, value in tensors.items()}
    store.write_tensors(home / "start.safetensors", moved)
    asked = apart | {"schedule": "constant", "valid_every": 2}
    out, kept = ("adapter.safetensors", "best_adapter.safetensors") if apart else ("model.safetensors",) * 2
    settings(home, steps=9, watch={"best": True}, **asked)
    last, _ = run(home, "a", out=out)
    found = store.read_tensors(home / "a" / (kept if apart else "best.safetensors"))[0]
    settings(home, steps=4, **asked)
    wanted = run(home, "b", out=out)[0]
    assert found.keys() == last.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert any(not torch.equal(found[name], last[name]) for name in found)


@pytest.mark.parametrize("length", ["tokens", "epochs"])
def test_raising_the_length_of_a_finished_stage_goes_on_from_its_end(home, caplog, length):
    rows = rows_of(Binidx(home / "corpus/train", 24), TrainConfig(steps=1, ctx_len=16), masked=False)
    short, long = {
        "tokens": (5 * 4 * 16, 9 * 4 * 16),
        "epochs": (int(20e6 / rows) / 1e6, int(36e6 / rows) / 1e6),
    }[length]
    asked = {"steps": None, "schedule": "constant", "valid_every": 2}
    settings(home, **asked, **{length: long})
    whole = run(home, "whole")
    settings(home, **asked, **{length: short})
    run(home, "cut")
    settings(home, **asked, **{length: long})
    with caplog.at_level("INFO", logger="rwkvpipe"):
        found = run(home, "cut")
    assert "going on after step 5 of 9" in caplog.text and whole[1] == found[1]
    assert all(torch.equal(value, found[0][name]) for name, value in whole[0].items())


def test_a_finished_stage_of_cosine_says_why_more_steps_begin_anew(home, caplog):
    settings(home, steps=4, schedule="cosine")
    run(home, "a")
    settings(home, steps=6, schedule="cosine")
    with caplog.at_level("INFO", logger="rwkvpipe"):
        run(home, "a")
    said = [line for line in caplog.text.splitlines() if "starts again" in line]
    assert len(said) == 1 and "trained for 4 steps, and 6 have other rates" in said[0] and "cosine" in said[0]
    assert "going on" not in caplog.text


def test_a_bad_step_is_told_with_the_documents_it_read(home):
    settings(home, steps=9, lr=3.0, watch={"spike": 1.0001})
    with pytest.raises(PipeError, match=r"step \d: the norm of .*\(it read documents [\d, ]+ of .*corpus"):
        run(home, "a")


def test_a_held_out_loss_of_nothing_is_refused(home):
    for file in (home / "corpus").glob("valid.*"):
        file.unlink()
    settings(home)
    assert "valid_loss" not in run(home, "a")[1][-1]
    settings(home, valid_every=4)
    with pytest.raises(DataError, match="has no held-out part, whose loss train.valid_every asks for"):
        run(home, "b")
