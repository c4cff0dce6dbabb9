"""Which products of fp32 compute: found out once by time, or said; and a training keeps those that it began with."""

from unittest import mock

import pytest
import torch
from torch import nn

from rwkvpipe.base.config import RwkvConfig, TrainConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.data.batches import Batch
from rwkvpipe.kernel import build, choice, product
from rwkvpipe.model.family import build as model_of
from rwkvpipe.train import checkpoint
from rwkvpipe.train.loop import Run, fit
from rwkvpipe.train.loss import lm_losses

needs_native = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")
MODEL = nn.Linear(24, 64, bias=False)


@pytest.fixture(autouse=True)
def undecided(monkeypatch, tmp_path):
    """Nothing is chosen, said or kept; what compiled kernels there are stay loaded."""
    build.extension()
    monkeypatch.setattr(product, "_chosen", [])
    monkeypatch.delenv("RWKVPIPE_PRODUCTS", raising=False)
    monkeypatch.setenv("RWKVPIPE_KERNELS", str(tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    return tmp_path / "kept"


@pytest.fixture
def timed(monkeypatch):
    """What is found by time is as told here; how often it was asked for."""
    told = {"ratio": 2.0, "bf16": 1.0, "whole": 0.1, "asked": 0}

    def answer(sizes, ways, dtype):
        told["asked"] += 1
        return {"seconds": {way: 1 / (told | {"own": told["ratio"]}).get(way, 1.0) for way in ways}}

    monkeypatch.setattr(choice, "_timed", answer)
    return told


@needs_native
@pytest.mark.parametrize(("ratio", "name"), [(2.0, "own"), (1.01, "torch"), (0.5, "torch")])
def test_the_faster_is_chosen_once_for_a_machine_and_size_and_said(timed, caplog, ratio, name):
    timed["ratio"] = ratio
    with caplog.at_level("INFO", logger="rwkvpipe"):
        assert choice.settle(MODEL) == product.chosen() == name
    assert f"products of fp32: {name}, own ones are {ratio:.2f} times as fast" in caplog.text
    timed["ratio"] = 1 / ratio
    assert choice.settle(nn.Linear(64, 24)) == name and timed["asked"] == 1
    choice.settle(nn.Linear(48, 64))
    assert timed["asked"] == 2


@pytest.mark.parametrize(
    ("has", "ratio", "bf16", "name"),
    [
        (True, 1.2, 1.9, "bf16"),
        (True, 0.9, 0.5, "torch"),  # AVX-512 BF16 of some processors
        (True, 1.5, 1.2, "own"),
        (False, 1.5, 1.9, "own"),
    ],
)
@needs_native
def test_numbers_rounded_to_bf16_are_multiplied_by_what_is_fastest(timed, monkeypatch, caplog, has, ratio, bf16, name):
    monkeypatch.setattr(product, "has_bf16", lambda: has)
    timed |= {"ratio": ratio, "bf16": bf16, "bf16+own": 0.1}
    with caplog.at_level("INFO", logger="rwkvpipe"):
        assert choice.settle(MODEL, rounded=True) == product.chosen() == name
    assert ("the processor's of bf16" in caplog.text) == has
    how = product.Products.of(torch.bfloat16, torch.device("cpu"))
    assert (how.narrow, how.own) == (name == "bf16", name == "own")
    assert choice.settle(MODEL) == ("own" if ratio > 1 else "torch") and timed["asked"] == 2  # fp32 is another matter
    assert not product.Products.of(torch.bfloat16, torch.device("cpu")).narrow
    assert product.Products.of(torch.bfloat16, torch.device("cuda")).narrow


@needs_native
@pytest.mark.parametrize(
    ("bf16", "ours", "whole", "name"),
    [(3.0, 2.9, 3.0, "bf16+own"), (3.0, 2.8, 2.9, "whole+own"), (4.0, 2.9, 2.9, "bf16"), (2.0, 2.0, 2.2, "whole+own")],
)
def test_of_those_that_are_about_as_fast_the_same_bits_count(timed, monkeypatch, caplog, bf16, ours, whole, name):
    monkeypatch.setattr(product, "has_bf16", lambda: True)
    monkeypatch.setattr(build, "extension", lambda: mock.Mock(multiply_bf16=lambda: 1))
    timed |= {"ratio": 1.5, "bf16": bf16, "bf16+own": ours, "whole": whole}
    with caplog.at_level("INFO", logger="rwkvpipe"):
        assert choice.settle(MODEL, rounded=True) == product.chosen() == name
    assert ("products of numbers rounded to bf16: own in bf16, own ones are" in caplog.text) == (name == "bf16+own")
    how, exact = (product.Products.of(kind, torch.device("cpu")) for kind in (torch.bfloat16, None))
    assert (how.narrow, how.own, how.late) == ("bf16" in name, "own" in name, name != "bf16")
    assert (exact.own, exact.late) == ("own" in name, False)
    assert not product.Products.of(torch.bfloat16, torch.device("cuda")).late


@needs_native
def test_another_processor_torch_or_kernel_is_timed_anew(timed, monkeypatch):
    for owner, name, value in (
        (choice, "processor", lambda: "another"),
        (torch, "__version__", "9"),
        (build, "name", str),
    ):
        choice.settle(MODEL)
        monkeypatch.setattr(owner, name, value)
    choice.settle(MODEL)
    assert timed["asked"] == 4


@needs_native
@pytest.mark.parametrize(("ratio", "name"), [(1.1, "whole+own"), (1.02, "whole")])
def test_where_whole_numbers_are_fastest_they_are_multiplied_instead_of_bf16(timed, caplog, ratio, name):
    timed |= {"ratio": ratio, "whole": 1.6}
    with caplog.at_level("INFO", logger="rwkvpipe"):
        assert choice.settle(MODEL, rounded=True) == product.chosen() == name
    assert "products of bf16: whole numbers of 12 bits in their place" in caplog.text
    assert "1.60 times as fast" in caplog.text
    how, exact = (product.Products.of(kind, torch.device("cpu")) for kind in (torch.bfloat16, None))
    # what is to be fp32 stays so, and is multiplied by what is faster
    assert (how.whole, how.own, how.of_steps.own) == (True, ratio > 1.05, ratio > 1.05)
    assert (exact.whole, exact.own) == (product.asked().whole, product.asked().own) == (False, ratio > 1.05)
    assert not product.Products.of(torch.bfloat16, torch.device("cuda")).whole
    assert choice.settle(MODEL) == ("own" if ratio > 1.05 else "torch")  # fp32 is another matter


@needs_native
def test_where_nothing_can_be_kept_torchs_compute_lest_two_processes_differ(timed, undecided, caplog):
    undecided.rmdir()
    undecided.write_text("no folder")
    with caplog.at_level("INFO", logger="rwkvpipe"):
        assert choice.settle(MODEL) == "torch"
    assert "cannot be kept" in caplog.text and timed["asked"] == 0


@needs_native
def test_what_is_timed_are_a_product_and_those_of_its_gradients_in_both_ways(monkeypatch):
    asked, random = [], torch.get_rng_state()
    monkeypatch.setattr(choice, "ROUNDS", 1)
    monkeypatch.setattr(product.Products, "mm", lambda how, a, b: asked.append((how.own, *a.shape, b.shape[1])))
    found = choice._timed([256, 1024], ["torch", "own"], None)["seconds"]
    assert found.keys() == {"torch", "own"} and min(found.values()) > 0
    shapes = [(choice.ROWS, 256, 1024), (choice.ROWS, 1024, 256), (1024, choice.ROWS, 256)]
    assert asked == [(own, *shape) for own in (False, True) for shape in shapes]
    assert torch.equal(torch.get_rng_state(), random)  # what is drawn for it is no training's


@needs_native
@pytest.mark.parametrize("name", ["torch", "own"])
def test_what_the_user_says_is_chosen(timed, monkeypatch, name):
    monkeypatch.setenv("RWKVPIPE_PRODUCTS", name)
    assert choice.settle(MODEL) == product.chosen() == name and timed["asked"] == 0
    monkeypatch.setenv("RWKVPIPE_PRODUCTS", "mkl")
    with pytest.raises(ConfigError, match="neither torch nor own"):
        choice.settle(MODEL)


def test_what_cannot_be_native_is_torchs(timed):
    assert choice.settle(nn.Linear(24, 64).double()) == "torch" and choice.settle(nn.ReLU()) == "torch"
    assert timed["asked"] == 0


def test_own_products_that_are_asked_for_and_cannot_be_stop_a_run(timed, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_PRODUCTS", "own")
    monkeypatch.setattr(build, "extension", lambda: None)
    with pytest.raises(ConfigError, match="asks for own products, and there are none here: "):
        choice.settle(MODEL)
    assert choice.settle(nn.Linear(24, 64).double()) == "torch"  # of which there are none anywhere


@needs_native
@pytest.mark.parametrize("damage", ["", "[]", '{"seconds": {}}', '{"seconds": {"torch": 1, "own": 0}}', "\xff"])
def test_what_was_found_and_is_damaged_is_found_anew(timed, undecided, damage):
    assert choice.settle(MODEL) == "own"
    (kept,) = undecided.glob("products-*.json")
    kept.write_text(damage)
    assert choice.settle(MODEL) == "own" and timed["asked"] == 2


@needs_native
def test_own_products_of_bf16_are_chosen_only_where_there_are_some(timed, monkeypatch):
    timed |= {"ratio": 1.5, "bf16+own": 9.0}
    monkeypatch.setattr(build.extension(), "multiply_bf16", lambda: 0)
    assert choice.settle(MODEL, rounded=True) == "own"


def test_a_program_that_reads_chooses_once(timed, monkeypatch):
    product.choose("own")
    choice.begin(MODEL)
    assert product.chosen() == "own" and timed["asked"] == 0


def trained(folder, *, stop=None, save_every=100, precision="fp32"):
    """A short training; with `stop` it breaks off before that step, as a crash would. Its weights."""
    config = TrainConfig(steps=4, warmup=1, lr=0.01, log_every=1, precision=precision)
    model = model_of(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=20))
    model.initialise(1)

    def batches(first, carried):
        for step in range(first, config.steps):
            if step == stop:
                raise OSError("crash")
            ids = (torch.arange(4)[:, None] * 3 + torch.arange(14) * (step % 3 + 1)) % 20
            yield Batch(ids[:, :-1], ids[:, 1:], None)

    fit(model, batches, lm_losses(2, config), config=config, run=Run(folder, "mark", save_every, 7))
    return torch.cat([value.detach().flatten() for value in model.parameters()])


@needs_native
@pytest.mark.parametrize(("name", "other"), [("own", "torch"), ("torch", "own")])
def test_a_training_goes_on_with_the_products_it_began_with(tmp_path, monkeypatch, caplog, name, other):
    monkeypatch.setattr(product, "SPREAD", 0)
    monkeypatch.setenv("RWKVPIPE_PRODUCTS", name)
    whole = trained(tmp_path / "whole")
    with pytest.raises(OSError, match="crash"):
        trained(tmp_path / "cut", save_every=2, stop=3)
    monkeypatch.setenv("RWKVPIPE_PRODUCTS", other)
    assert not torch.equal(trained(tmp_path / "other"), whole)  # last digits differ, so there is something to keep
    again = trained(tmp_path / "cut")
    assert torch.equal(again, whole) and product.chosen() == name
    assert checkpoint.latest(tmp_path / "cut", "mark").notes["products"] == name
    assert f"asks for {other}; this training began with {name}" in caplog.text


@needs_native
@pytest.mark.parametrize("name", ["whole", "whole+own", "bf16+own"])
def test_a_training_in_rounded_numbers_goes_on_so_on_a_machine_where_others_are_faster(tmp_path, monkeypatch, name):
    monkeypatch.delenv("RWKVPIPE_PRODUCTS", raising=False)
    monkeypatch.setattr(product, "SPREAD", 8)  # products of low ranks are not rounded
    monkeypatch.setattr(choice, "_fastest", lambda *given: (name, "it is"))
    whole = trained(tmp_path / "whole", precision="bf16")
    with pytest.raises(OSError, match="crash"):
        trained(tmp_path / "cut", save_every=2, stop=3, precision="bf16")
    monkeypatch.setattr(choice, "_fastest", lambda *given: ("torch", "it is"))
    assert not torch.equal(trained(tmp_path / "other", precision="bf16"), whole)
    assert torch.equal(trained(tmp_path / "cut", precision="bf16"), whole) and product.chosen() == name


@needs_native
def test_a_resume_point_that_says_nothing_of_products_was_made_with_torchs(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKVPIPE_PRODUCTS", "torch")
    with pytest.raises(OSError, match="crash"):
        trained(tmp_path, save_every=2, stop=3)
    found = checkpoint.latest(tmp_path, "mark")
    notes = {name: value for name, value in found.notes.items() if name != "products"}
    part = checkpoint.write_part(tmp_path, found.step, dict(found.tensors.items()))
    checkpoint.save(tmp_path, found.step, [part], "mark", notes=notes)
    monkeypatch.setenv("RWKVPIPE_PRODUCTS", "own")
    trained(tmp_path)
    assert product.chosen() == "torch"
