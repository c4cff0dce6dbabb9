"""The same seeds give the same bits at any number of threads: of a whole training, first weights included."""

import pytest
import torch

from rwkvpipe.base.config import LoraConfig, RwkvConfig, TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.kernel import build, choice, product
from rwkvpipe.model.family import build as model_of
from rwkvpipe.train.loop import Run, fit
from rwkvpipe.train.loss import lm_losses
from rwkvpipe.weights import lora
from rwkvpipe.weights.kinds import KINDS

pytestmark = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")


@pytest.fixture
def products(monkeypatch):
    """Has all products be of one kind, whatever is faster here; forgotten behind the test."""

    def are(name):
        monkeypatch.delenv("RWKVPIPE_PRODUCTS", raising=False)
        monkeypatch.setattr(product, "_chosen", [])
        monkeypatch.setattr(choice, "_fastest", lambda *given: (name, "it is"))

    return are


def trained(folder, family, precision, adapter=None):
    config = TrainConfig(steps=3, warmup=1, lr=0.01, precision=precision)
    model = model_of(RwkvConfig(family=family, n_layer=2, n_embd=128, head_size=32, vocab_size=65))
    model.initialise(1)
    if adapter:
        for name, value in model.named_parameters():  # some begin as zeros, and nothing is learned of what they turn
            if not value.any():
                value.data = 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        lora.inject(model, adapter, seed=2)

    def batches(first, carried):
        for step in range(first, config.steps):
            ids = torch.randint(65, (5, 72), generator=torch.Generator().manual_seed(step))
            yield Batch(ids[:, :-1], ids[:, 1:], None)

    fit(model, batches, lm_losses(3, config), config=config, run=Run(folder, "mark", 100, 7))
    if not adapter:
        return [value.detach() for value in model.parameters()]
    learned = lora.adapter(model)
    with lora.folded(model):
        written = [value.detach().clone() for value in model.parameters()]
    return [*learned.values(), *written, *lora.merged(before, learned, adapter).values()]


@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
@pytest.mark.parametrize("given", ["own in fp32", "own in bf16", "bf16+own in bf16", "whole+own in bf16"])
def test_a_training_has_the_same_bits(tmp_path, products, at_any_thread_count, family, given):
    name, _, precision = given.split()
    products(name)
    at_any_thread_count(lambda: trained(tmp_path / str(torch.get_num_threads()), family, precision))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["own in fp32", "bf16+own in bf16"])
def test_an_adapter_has_the_same_bits(tmp_path, products, at_any_thread_count, kind, given):
    name, _, precision = given.split()
    products(name)
    adapter = LoraConfig(kind=kind, rank=8, svd=2 if kind == "pissa" else None)
    at_any_thread_count(lambda: trained(tmp_path / str(torch.get_num_threads()), "rwkv7", precision, adapter))
