"""Training on a card learns what it learns on the processor."""

import pytest
import torch

from rwkvpipe.base.config import LoraConfig, RwkvConfig, TrainConfig
from rwkvpipe.data.batches import Batch
from rwkvpipe.model.family import build
from rwkvpipe.train.loss import lm_losses, mean_loss
from rwkvpipe.train.optim import adamw
from rwkvpipe.weights.lora import inject


def learnt(device, family, precision, how):
    """Losses and norms of gradients of a few steps, and the loss after them."""
    model = build(RwkvConfig(family=family, n_layer=2, n_embd=128, head_size=64, vocab_size=300))
    model.initialise(0)
    with torch.no_grad():
        for n, x in enumerate(model.parameters()):
            x.add_(0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(n)))
    if how == "adapters":
        inject(model, LoraConfig(rank=4))
    model = model.to(device).train()
    model.recompute = how == "again"
    config = TrainConfig(steps=100, lr=1e-4, ctx_len=40, batch=2, precision=precision)
    ids, starts = torch.arange(2 * 41).view(2, 41) ** 2 % 299, torch.zeros(2, 40, dtype=torch.bool)
    starts[:, [0, 7, 20]] = True
    batch = Batch(ids[:, :-1], ids[:, 1:], starts=starts if how == "packed" else None)
    optimizer, losses, found = adamw(model, config), lm_losses(1, config), []
    trained = [x for x in model.parameters() if x.requires_grad]
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        for part in losses(model, batch):
            part.backward()
            found.append(float(part.detach()))
        found.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
    return [*found, mean_loss(model, iter([batch]), 2, precision)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("family", ["rwkv7", "rwkv6", "rwkv5"])
@pytest.mark.parametrize("how", ["plain", "again", "packed", "adapters"])
def test_a_card_learns_what_the_processor_learns(family, how):
    wanted = learnt("cpu", family, "fp32", how)
    for precision, share in (("fp32", 1e-4), ("bf16", 4e-2), ("fp16", 4e-2)):
        assert learnt("cuda", family, precision, how) == pytest.approx(wanted, rel=share), precision
