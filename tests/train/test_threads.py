"""The same seeds give the same bits at any number of threads: of a whole training, first weights included."""

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig, TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.kernel import build, choice, product
from rwkvpipe.model.family import build as model_of
from rwkvpipe.train.loop import Run, fit
from rwkvpipe.train.loss import lm_losses

pytestmark = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")


def trained(folder, family, precision):
    config = TrainConfig(steps=3, warmup=1, lr=0.01, precision=precision)
    model = model_of(RwkvConfig(family=family, n_layer=2, n_embd=128, head_size=32, vocab_size=65))
    model.initialise(1)

    def batches(first, carried):
        for step in range(first, config.steps):
            ids = torch.randint(65, (5, 72), generator=torch.Generator().manual_seed(step))
            yield Batch(ids[:, :-1], ids[:, 1:], None)

    fit(model, batches, lm_losses(3, config), config=config, run=Run(folder, "mark", 100, 7))
    return [value.detach() for value in model.parameters()]


@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
@pytest.mark.parametrize(("name", "precision"), [("own", "fp32"), ("own", "bf16"), ("whole+own", "bf16")])
def test_a_training_has_the_same_bits(tmp_path, monkeypatch, at_any_thread_count, family, name, precision):
    monkeypatch.delenv("RWKVPIPE_PRODUCTS", raising=False)
    monkeypatch.setattr(product, "_chosen", [])  # so that what is chosen here is forgotten
    monkeypatch.setattr(choice, "_fastest", lambda *given: (name, "it is"))
    at_any_thread_count(lambda: trained(tmp_path / str(torch.get_num_threads()), family, precision))
