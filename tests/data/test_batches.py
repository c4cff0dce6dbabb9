"""What a step sees is a function of the step, and RWKV-LM's order is RWKV-LM's."""

import json
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch

from rwkvpipe.base.config import TrainConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.data.batches import Mix, magic_prime, masked_batches, place, token_batches
from rwkvpipe.data.binidx import Binidx, BinidxWriter


@dataclass
class Share:
    index: int = 0
    count: int = 1


def corpus(folder, count, dtype=np.uint16):
    """Tokens that say where they stand."""
    with BinidxWriter(folder / "data", dtype) as writer:
        writer.add(np.arange(count))
    return Binidx(folder / "data")


def config(**changes):
    return TrainConfig(**({"steps": 1, "ctx_len": 8, "batch": 4, "seed": 3} | changes))


def take(batches, count):
    return list(islice(batches, count))


def starts(batches):
    return [int(start) for batch in batches for start in batch.ids[:, 0]]


def test_primes_are_the_reference_s(goldens):
    for length, ctx_len, prime in json.loads((goldens / "rwkv/magic_primes.json").read_text())["rows"]:
        assert magic_prime(length // ctx_len) == prime


def test_too_few_chunks_have_no_prime():
    assert [magic_prime(chunks) for chunks in range(7)] == [None, None, None, 2, 2, 2, 5]


def test_places_are_the_reference_s(goldens):
    known = json.loads((goldens / "rwkv/sampling.json").read_text())
    for prime, ctx_len, visit, _, offset in known["formula_rows"]:
        assert place(0, visit - 1, prime) * ctx_len == offset
    for world, micro, epoch, rank, index, offset in known["rows"]:
        batch = world * micro
        step, row = epoch * (40320 // batch) + index // micro, (index % micro) * world + rank
        if 40320 % batch == 0:
            assert place(step, row, known["magic_prime"], batch) * known["ctx_len"] == offset


def test_rows_of_the_magic_order_are_the_reference_s(tmp_path, goldens):
    known = json.loads((goldens / "rwkv/sampling.json").read_text())
    data, seen = corpus(tmp_path, known["n_tokens"]), 0
    for world, micro, epoch, rank, index, offset in known["rows"]:
        batch = world * micro
        if 40320 % batch:
            continue
        settings = config(ctx_len=known["ctx_len"], batch=batch, order="magic")
        step = epoch * (40320 // batch) + index // micro
        got = next(token_batches(data, settings, Share(rank, world), step))
        assert int(got.ids[index % micro, 0]) == offset
        seen += 1
    assert seen > 10


def test_the_magic_order_visits_every_chunk_once():
    prime = magic_prime(100)
    assert sorted(place(0, row, prime) for row in range(prime)) == list(range(prime))


@pytest.mark.parametrize("order", ["magic", "shuffled", "sequential"])
def test_targets_are_the_next_tokens(tmp_path, order):
    for batch in take(token_batches(corpus(tmp_path, 8 * 90), config(order=order), Share(), 0), 3):
        assert batch.ids.shape == batch.targets.shape == (4, 8)
        assert batch.ids.dtype == batch.targets.dtype == torch.int64
        assert torch.equal(batch.ids + 1, batch.targets) and batch.mask is None
        assert (batch.ids[:, 0] % 8 == 0).all()


@pytest.mark.parametrize("order", ["magic", "shuffled", "sequential"])
def test_resuming_repeats_no_batch(tmp_path, order):
    data, settings = corpus(tmp_path, 8 * 90), config(order=order, batch=7)
    whole = starts(take(token_batches(data, settings, Share(), 0), 40))
    resumed = starts(take(token_batches(data, settings, Share(), 25), 15))
    assert whole[25 * 7 :] == resumed


@pytest.mark.parametrize("order", ["magic", "shuffled", "sequential"])
def test_processes_share_a_step_without_overlap(tmp_path, order):
    data, settings = corpus(tmp_path, 8 * 90), config(order=order, batch=6)
    alone = take(token_batches(data, settings, Share(), 0), 5)
    shares = [take(token_batches(data, settings, Share(index, 3), 0), 5) for index in range(3)]
    for step, whole in enumerate(alone):
        parts = [share[step] for share in shares]
        assert torch.equal(whole.ids, torch.stack([part.ids for part in parts], 1).flatten(0, 1))


def test_a_shuffled_pass_sees_every_chunk_once_and_the_next_in_another_order(tmp_path):
    data = corpus(tmp_path, 8 * 20 + 1)
    found = starts(take(token_batches(data, config(), Share(), 0), 10))
    assert sorted(found[:20]) == sorted(found[20:]) == list(range(0, 160, 8))
    assert found[:20] != found[20:]
    other = starts(take(token_batches(data, config(seed=4), Share(), 0), 5))
    assert other != found[:20]


def test_sequential_rows_stand_as_the_corpus_does(tmp_path):
    found = starts(take(token_batches(corpus(tmp_path, 60), config(order="sequential"), Share(), 0), 2))
    assert found == [0, 8, 16, 24, 32, 40, 48, 0]


def test_one_chunk_is_enough_but_for_the_magic_order(tmp_path):
    data = corpus(tmp_path, 9)
    for order in ("shuffled", "sequential"):
        assert starts(take(token_batches(data, config(order=order, batch=1), Share(), 0), 2)) == [0, 0]
        with pytest.raises(DataError, match=r"1 rows of 8 tokens are fewer than the 4 .* \(train.batch\)"):
            token_batches(data, config(order=order), Share(), 0)
    with pytest.raises(DataError, match="9 tokens are 1 chunks of 8"):
        token_batches(data, config(order="magic"), Share(), 0)


def test_a_corpus_shorter_than_a_row_is_refused_with_its_numbers(tmp_path):
    with pytest.raises(DataError, match="the corpus has 8 tokens, one row takes 9"):
        token_batches(corpus(tmp_path, 8), config(), Share(), 0)


def test_a_prime_that_leaves_out_too_much_is_refused(tmp_path):
    with pytest.raises(DataError, match="0.9"):
        token_batches(corpus(tmp_path, 32), config(order="magic"), Share(), 0)


def test_more_processes_than_rows_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="train.batch: 4 rows a step for 5 devices"):
        token_batches(corpus(tmp_path, 90), config(), Share(0, 5), 0)


TALKS = [([1, 2, 3, 4], [0, 0, 1, 1]), ([5, 6], [0, 1]), ([7, 8, 9], [0, 0, 0]), ([10, 11, 12], [1, 0, 0])]


def talks(folder, documents=TALKS):
    with BinidxWriter(folder / "talks", np.uint16, masked=True) as writer:
        for ids, mask in documents:
            writer.add(ids, mask)
    return Binidx(folder / "talks")


def test_only_marked_targets_are_learned(tmp_path, caplog):
    caplog.set_level("INFO")
    settings = config(batch=2, order="sequential")
    batch = next(masked_batches(talks(tmp_path), settings, Share(), 0))
    assert batch.ids.tolist() == [[1, 2, 3], [5, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 4], [6, -1, -1]]
    assert batch.mask.tolist() == [[0, 1, 1], [1, 0, 0]]
    assert batch.mask.dtype == torch.float32 and batch.ids.dtype == torch.int64
    # the first token of a document is no target, so of the last nothing can be learned
    assert "4 documents; 0 cut at train.ctx_len 8, 2 left out" in caplog.text


def test_long_documents_are_cut_and_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    data = talks(tmp_path, [(list(range(1, 12)), [0, 1] + [0] * 8 + [1]), (list(range(1, 12)), [0] * 10 + [1])])
    batch = next(masked_batches(data, config(ctx_len=4, batch=1), Share(), 0))
    assert batch.ids.shape == (1, 4) and batch.mask.sum() == 1
    assert "2 documents; 1 cut at train.ctx_len 4, 1 left out" in caplog.text
    assert len(caplog.records) == 1


def test_talks_resume_and_are_shared_like_tokens(tmp_path):
    documents = [([number, number + 1, number], [0, 1, 1]) for number in range(1, 12)]
    data, settings = talks(tmp_path, documents), config(batch=4)
    whole = take(masked_batches(data, settings, Share(), 0), 9)
    for later, batch in enumerate(take(masked_batches(data, settings, Share(), 5), 4)):
        assert torch.equal(batch.ids, whole[5 + later].ids)
    for index in range(2):
        part = next(masked_batches(data, settings, Share(index, 2), 3))
        assert torch.equal(part.ids, whole[3].ids[index::2])
    assert sorted(starts(whole)[:11]) == list(range(1, 12))


def test_nothing_to_learn_is_refused(tmp_path):
    with pytest.raises(DataError, match="none of 1 documents has a token to learn within train.ctx_len 8"):
        masked_batches(talks(tmp_path, TALKS[2:3]), config(), Share(), 0)
    with pytest.raises(ConfigError, match="magic"):
        masked_batches(talks(tmp_path), config(order="magic"), Share(), 0)


def offset(folder, name, count, first):
    """A corpus of documents of 5 to 9 tokens, which count on from `first`."""
    stream, documents = np.random.default_rng(first), []
    while count > 0:
        documents.append(np.arange(first, first + (size := int(stream.integers(5, 10)))))
        first, count = first + size, count - size
    with BinidxWriter(folder / name, np.int32, masked=True) as writer:
        for ids in documents:
            writer.add(ids, [0, *[1] * (len(ids) - 1)])
    return Binidx(folder / name)


def mixed(folder):
    return Mix((offset(folder, "a", 900, 0), offset(folder, "b", 400, 10_000)), (3.0, 1.0))


KINDS = [
    (token_batches, {"order": "shuffled"}),
    (token_batches, {"order": "magic"}),
    (token_batches, {"order": "sequential", "rows": "documents"}),
    (token_batches, {"order": "shuffled", "rows": "documents"}),
    (masked_batches, {"order": "shuffled"}),
]


@pytest.mark.parametrize(("batches", "order"), KINDS)
def test_corpora_are_mixed_by_weight_whatever_a_row_is(tmp_path, batches, order):
    settings = config(batch=8, **order)
    found = take(batches(mixed(tmp_path), settings, Share(), 0), 25)
    own = sum(int((batch.ids[:, 0] < 10_000).sum()) for batch in found)
    assert abs(own - 150) <= 2
    for later, batch in enumerate(take(batches(mixed(tmp_path), settings, Share(), 11), 3)):
        assert torch.equal(batch.ids, found[11 + later].ids)
    shares = [next(batches(mixed(tmp_path), settings, Share(index, 2), 4)).ids for index in range(2)]
    width = min(part.shape[1] for part in shares)
    whole = found[4].ids[:, :width]
    assert torch.equal(torch.stack([part[:, :width] for part in shares], 1).flatten(0, 1), whole)


@pytest.mark.parametrize(("batches", "order"), KINDS[:1] + KINDS[3:])
def test_in_a_mix_each_corpus_keeps_its_own_order(tmp_path, batches, order):
    settings, mix = config(batch=8, **order), mixed(tmp_path)
    both = starts(take(batches(mix, settings, Share(), 0), 30))
    parts = [row for row in both if row < 10_000], [row for row in both if row >= 10_000]
    for corpus, own in zip(mix.corpora, parts, strict=True):
        assert starts(take(batches(corpus, settings, Share(), 0), 25))[: len(own)] == own


def test_a_document_is_a_row_and_a_long_one_several(tmp_path, caplog):
    caplog.set_level("INFO")
    with BinidxWriter(tmp_path / "data", np.uint16) as writer:
        for ids in ([1, 2, 3], [4], list(range(10, 21)), [30, 31]):
            writer.add(ids)
    settings = config(batch=5, order="sequential", rows="documents", ctx_len=4)
    batch = next(token_batches(Binidx(tmp_path / "data"), settings, Share(), 0))
    assert batch.ids.tolist() == [[1, 2, 0, 0], [10, 11, 12, 13], [14, 15, 16, 17], [18, 19, 0, 0], [30, 0, 0, 0]]
    assert batch.targets.tolist() == [
        [2, 3, -1, -1], [11, 12, 13, 14], [15, 16, 17, 18], [19, 20, -1, -1], [31, -1, -1, -1]
    ]  # fmt: skip
    assert batch.mask is None
    assert "4 documents are 5 rows; 1 are longer than train.ctx_len 4, 1 too short" in caplog.text
    with pytest.raises(DataError, match="5 rows of documents are fewer than the 6"):
        token_batches(Binidx(tmp_path / "data"), config(batch=6, rows="documents", ctx_len=4), Share(), 0)


def test_what_is_learned_is_found_in_every_block_of_documents(tmp_path, monkeypatch):
    from rwkvpipe.data import batches

    stream = np.random.default_rng(3)
    documents = [(stream.integers(1, 99, n := int(stream.integers(0, 9))), stream.integers(0, 2, n)) for _ in range(60)]
    data = talks(tmp_path, documents)
    wanted = [
        (start, min(end - start, 5))
        for (start, end), (_, mask) in zip(data.documents.tolist(), documents, strict=True)
        if any(mask[1:5])
    ]
    for block in (1, 7, 1000):
        monkeypatch.setattr(batches, "BLOCK", block)
        batches._learned.cache_clear()
        found = list(zip(*batches._learned(data, 4), strict=True))
        assert found == wanted
