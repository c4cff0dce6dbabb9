"""Documents packed into rows are learned as each would be alone, in loss and gradients, for every family."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpipe.base.config import RwkvConfig, TrainConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.data.batches import Batch, masked_batches, read_of, rows_of, token_batches
from rwkvpipe.data.binidx import Binidx, BinidxWriter
from rwkvpipe.model.family import build
from rwkvpipe.train.infctx import chunked_lm_losses
from rwkvpipe.train.loss import lm_losses

each_family = pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
ALONE = SimpleNamespace(index=0, count=1)


def model_of(family: str, dtype=torch.float32, **changes) -> torch.nn.Module:
    model = build(RwkvConfig(family=family, n_layer=2, n_embd=32, head_size=16, vocab_size=20, **changes))
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=stream))
    return model.to(dtype)


def gradients(model, losses, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    total = 0.0
    for loss in losses(model, batch):
        loss.backward()
        total += loss.item()
    return total, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def documents(lengths, seed=0, weighed=False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    stream = torch.Generator().manual_seed(seed)
    found = [torch.randint(1, 20, (n + 1,), generator=stream) for n in lengths]
    marked = [(torch.rand(len(ids) - 1, generator=stream) < 0.6).float() for ids in found]
    weights = torch.tensor([0.25, 1.0, 7.5])[torch.randint(3, (len(found),), generator=stream)]
    return [(ids, marks * w if weighed else marks) for ids, marks, w in zip(found, marked, weights, strict=True)]


def batch_of(rows, packed: bool) -> Batch:
    """Rows of documents, one after the other, padded on the right."""
    width = max(sum(len(ids) - 1 for ids, _ in row) for row in rows)
    ids, targets = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -1)
    mask, starts = torch.zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        first = 0
        for tokens, marks in row:
            part = slice(first, first + len(tokens) - 1)
            ids[number, part], targets[number, part], mask[number, part] = tokens[:-1], tokens[1:], marks
            starts[number, first], first = True, part.stop
    return Batch(ids, targets, mask, starts if packed else None)


def same(model, packed, alone, config, tolerance=1e-5) -> None:
    chunked = lm_losses if config.chunk is None else chunked_lm_losses
    loss, wanted = gradients(model, lm_losses(3, config), alone)
    found, grads = gradients(model, chunked(2, config), packed)
    assert found == pytest.approx(loss, abs=tolerance)
    assert grads.keys() == wanted.keys()
    for name, value in wanted.items():
        difference = float((grads[name] - value).abs().max())
        assert difference <= tolerance * max(1.0, float(value.abs().max())), (name, difference)


ROWS = ([9, 1, 6], [16], [1, 1, 3, 2, 7], [5, 4])


@each_family
@pytest.mark.parametrize(
    "dtype, tolerance, chunk, weighed",
    [(torch.float32, 1e-5, None, False), (torch.float32, 1e-5, 4, True), (torch.float64, 1e-9, 4, False)],
)
def test_packed_rows_are_learned_as_their_documents_alone(family, dtype, tolerance, chunk, weighed):
    model = model_of(family, dtype)
    rows = [documents(row, seed, weighed) for seed, row in enumerate(ROWS)]
    config = TrainConfig(steps=1, chunk=chunk, bptt="full" if chunk else None, l2_wrap=1e-2)
    same(model, batch_of(rows, True), batch_of([[one] for row in rows for one in row], False), config, tolerance)


@each_family
def test_rows_that_are_not_told_apart_are_not_the_same(family):
    model, rows = model_of(family), [documents([5, 4])]
    config = TrainConfig(steps=1)
    apart = gradients(model, lm_losses(1, config), batch_of(rows, True))[0]
    assert abs(gradients(model, lm_losses(1, config), batch_of(rows, False))[0] - apart) > 1e-4


@settings(max_examples=6)
@given(
    st.sampled_from(["rwkv5", "rwkv6", "rwkv7"]),
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=3),
    st.booleans(),
)
def test_any_documents_in_any_rows_are_learned_as_alone(family, lengths, weighed):
    rows = [documents(row, seed, weighed) for seed, row in enumerate(lengths)]
    alone = batch_of([[one] for row in rows for one in row], False)
    same(model_of(family), batch_of(rows, True), alone, TrainConfig(steps=1))


@each_family
def test_nothing_of_a_document_reaches_the_next_however_large_it_is(family):
    model = model_of(family)
    with torch.no_grad():
        model.emb.weight[1] *= 1e3
    first = torch.tensor([[1, 1, 1, 5, 6, 7], [2, 3, 4, 5, 6, 7]])
    starts = torch.tensor([[True, False, False, True, False, False]]).expand(2, -1)
    with torch.no_grad():
        found = model.features(first, starts=starts)[0]
    assert torch.equal(found[0, 3:], found[1, 3:])


def corpus(folder, masked: bool, lengths) -> Binidx:
    """Documents of so many tokens, each of which counts up from a number of its own."""
    with BinidxWriter(folder / "data", np.uint16) as writer:
        for number, length in enumerate(lengths):
            ids = np.arange(length) + 100 * (number + 1)
            writer.add(ids, *([np.arange(length) % 2] if masked else []))
    return Binidx(folder / "data")


LENGTHS = (7, 3, 1, 12, 5, 30, 2, 9, 4, 6, 11, 2)


@pytest.mark.parametrize("masked", [False, True])
def test_a_pass_over_packed_rows_has_every_target_once(tmp_path, masked):
    data = corpus(tmp_path, masked, LENGTHS)
    config = TrainConfig(steps=1, ctx_len=12, batch=1, rows="packed", seed=3)
    batches = masked_batches if masked else token_batches
    count = rows_of(data, config, masked=masked)
    stream = batches(data, config, ALONE, 0)
    found = [next(stream) for _ in range(count)]
    assert all(batch.ids.shape[1] <= 12 for batch in found)
    targets = sorted(int(t) for batch in found for t in batch.targets[batch.targets >= 0])
    kept = [min(n, 13) if masked else n for n in LENGTHS]
    assert targets == [100 * (n + 1) + t for n, length in enumerate(kept) for t in range(1, length)]
    for batch in found:  # a start wherever the count begins, or goes on where a row was full
        assert bool(batch.starts[0, 0])
        jumps = batch.ids[0, 1:] != batch.ids[0, :-1] + 1
        assert torch.equal(batch.starts[0, 1:] | ~jumps, torch.ones_like(jumps))
        if masked:
            assert torch.equal(batch.mask, (batch.targets % 100 % 2).float())
    again = batches(data, config, ALONE, 2)
    assert torch.equal(next(again).ids, found[2].ids)
    assert rows_of(data, config, masked=masked) < rows_of(
        data, config.model_copy(update={"rows": "documents"}), masked=masked
    )


def test_what_is_cut_and_what_is_left_out_is_counted(tmp_path):
    data = corpus(tmp_path, True, LENGTHS)
    assert read_of(data, 12, masked=True) == {"documents": 12, "cut": 1, "left_out": 1}
    assert read_of(data, 5, masked=False) == {"documents": 12, "cut": 5, "left_out": 1}


def test_fewer_packed_rows_than_a_batch_are_refused(tmp_path):
    data = corpus(tmp_path, True, [4, 4])
    with pytest.raises(DataError, match="1 rows of documents, packed up to 12 tokens, are fewer than the 2"):
        masked_batches(data, TrainConfig(steps=1, ctx_len=12, batch=2, rows="packed"), ALONE, 0)


def test_a_model_with_states_of_its_own_is_refused():
    model = model_of("rwkv7", time_state=True)
    with pytest.raises(ConfigError, match="time_state"):
        model.features(torch.ones(1, 3, dtype=torch.long), starts=torch.ones(1, 3, dtype=torch.bool))
