"""Steps that are recorded for a card: without one, the record is done again by the processor."""

from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.infer import graph, reading, slots
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.graph import Chunks, Graphs, enough, graphs
from rwkvpipe.infer.packed import LOW, keep
from rwkvpipe.infer.reading import Reader
from rwkvpipe.kernel import gpu
from rwkvpipe.model.family import build
from rwkvpipe.model.layers import State
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.weights.rounded import rounded

PROMPTS = ["User: 1+1\n\nA:", "a", "The quick brown fox jumps", "x" * 40, "ab", "hello there", "2*3="]


def model(family="rwkv7", **more):
    sizes = {"n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": 257} | more
    found = build(RwkvConfig(family=family, **sizes))
    found.initialise(0)
    with torch.no_grad():
        for n, value in enumerate(found.parameters()):
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(n)))
    return found.eval()


@pytest.fixture
def made(monkeypatch):
    """Sizes for which a step was recorded: what was is done a few times, and again whenever it is asked for."""
    sizes = []

    def recorded(work, device, pool):
        for _ in range(graph.WARM + 1):
            work()
        sizes.append(work)
        return work

    monkeypatch.setattr(graph, "recorded", recorded)
    return sizes


@pytest.fixture
def recording(made, monkeypatch):
    """Slots take recorded steps on this processor, too."""
    monkeypatch.setattr(slots, "decoder", lambda model: None)
    monkeypatch.setattr(slots, "graphs", Graphs)
    return made


def plainly(network, ids):
    """Logits after each token of rows (B, T), and the last state."""
    state, found = network.start(len(ids)), []
    for t in range(ids.shape[1]):
        logits, state = network(ids[:, t : t + 1], state)
        found.append(logits[:, -1])
    return torch.stack(found, 1), state


@pytest.mark.parametrize("rows, room", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12), (320, 384), (0, 1)])
def test_steps_are_recorded_for_few_numbers_of_rows(rows, room):
    assert enough(rows) == room


@pytest.mark.parametrize("family", ["rwkv7", "rwkv6", "rwkv5"])
@torch.inference_mode()
def test_recorded_steps_give_the_model_s_logits_and_states(made, family):
    network, ids = model(family), torch.arange(5 * 9).view(5, 9) % 257
    wanted, after = plainly(network, ids)
    steps, state, found = Graphs(network), network.start(5), []
    for t in range(9):
        found.append(steps.step(ids[:, t], state).clone())
    same((torch.stack(found, 1), state), (wanted, after))
    assert len(made) == 1 and steps.ids.shape == (6, 1)


@torch.inference_mode()
def test_rows_may_come_and_go_between_steps_and_what_was_copied_stays(made):
    network = model()
    ids = torch.arange(7 * 6).view(7, 6) % 257
    wanted, _ = plainly(network, ids)
    steps, state = Graphs(network), network.start(3)
    for t in range(2):
        found = steps.step(ids[:3, t], state)
    kept = state.take([2])
    more = plainly(network, ids[3:7, :2])[1]
    state = State(*(list(map(torch.cat, zip(one, other, strict=True))) for one, other in (
        (state.att_x, more.att_x), (state.wkv, more.wkv), (state.ffn_x, more.ffn_x))))  # fmt: skip
    found = steps.step(ids[:, 2], state)
    torch.testing.assert_close(found, wanted[:, 2], atol=1e-5, rtol=1e-5)
    state.put([1], kept)  # in place, where the next step reads
    again = torch.cat((ids[:1, 3], ids[2:3, 2], ids[2:, 3]))
    found = steps.step(again, state)
    torch.testing.assert_close(found[1], wanted[2, 2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2:], wanted[2:, 3], atol=1e-5, rtol=1e-5)
    state = state.take([0, 3])
    found = steps.step(ids[[0, 3], 4], state)
    torch.testing.assert_close(found, wanted[[0, 3], 4], atol=1e-5, rtol=1e-5)
    assert sorted(steps.works) == [2, 8]  # what was recorded for less room is gone


@pytest.mark.parametrize("rows", [1, 5])
def test_the_engine_writes_the_same_with_recorded_steps(made, monkeypatch, rows):
    network = model()
    settings = SamplingConfig(temperature=0.8, max_tokens=8, seed=3, stop=("e",), repetition_penalty=1.2)

    def written():
        engine = Engine(network, ByteTokenizer(1), rows)
        return {(c.prompt, c.sample): (c.ids, c.finish) for c in engine.generate(PROMPTS, settings)}

    wanted = written()
    monkeypatch.setattr(slots, "decoder", lambda model: None)
    monkeypatch.setattr(slots, "graphs", Graphs)
    assert written() == wanted and made


def test_a_step_that_cannot_be_recorded_is_computed_and_a_line_says_so(recording, monkeypatch, caplog):
    def refused(*given):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graph, "recorded", refused)
    engine = Engine(model(), ByteTokenizer(1), 2)
    with caplog.at_level("WARNING", logger="rwkvpipe"):
        (found,) = engine.generate(["ab"], SamplingConfig(temperature=0.0, max_tokens=4, stop=()))
    assert len(found.ids) == 4
    assert caplog.text.count("is not recorded: operation not permitted when stream is capturing and more") == 1


def test_off_a_card_nothing_is_recorded():
    assert graphs(model()) is None and graph.chunks(model(), 256) is None


def same(found, wanted):
    """Of logits and states."""
    for one, other in zip((found[0], *parts(found[1])), (wanted[0], *parts(wanted[1])), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def parts(state):
    return (*state.att_x, *state.wkv, *state.ffn_x)


@pytest.fixture
def readers(made, monkeypatch):
    """Makes a reader in chunks of 24 as it is, and one that has them recorded."""
    monkeypatch.setattr(reading, "CHUNK", 24)

    def readers(network):
        plain, recorded = Reader(network, 8), Reader(network, 8)
        recorded.recorded = Chunks(network, 24)
        return plain, recorded

    return readers


@pytest.mark.parametrize("family", ["rwkv7", "rwkv6", "rwkv5"])
def test_texts_read_in_recorded_chunks_leave_the_logits_and_states_of_the_model(readers, made, family):
    plain, recorded = readers(model(family, time_state=family != "rwkv5"))
    for lengths in ((60, 3, 30), (17,), (5, 24, 1, 9), (1, 1), (8,) * 5):
        rows = [[(7 * n + t * t) % 257 for t in range(length)] for n, length in enumerate(lengths)]
        state = plain.model.start(len(rows))
        for x in parts(state):
            x.normal_(generator=torch.Generator().manual_seed(len(rows)))
        same(recorded.read(rows, state), plain.read(rows, state))
        same(recorded.read(rows), plain.read(rows))
    assert recorded.recorded.seen == {(3, 24), (3, 16), (1, 24), (4, 24), (2, 16), (6, 16)}
    assert set(recorded.recorded.works) == {(6, 16)} and len(made) > 3  # what was recorded for less room is gone


def test_texts_that_are_read_in_turns_do_not_move_one_another(readers):
    plain, recorded = readers(model())
    texts = [[[3 * t % 257 for t in range(70)]], [[5 * t % 257 for t in range(55)]]]
    for _ in range(2):
        going, found = [recorded.chunks(text) for text in texts], {}
        while len(found) < 2:
            for n in {0, 1} - set(found):
                try:
                    next(going[n])
                except StopIteration as done:
                    found[n] = done.value
        for n, text in enumerate(texts):
            same(found[n], plain.read(text))


def test_texts_weigh_the_same_in_recorded_chunks(readers, made):
    network = model()
    pairs = [("ab", "cd" * 20), ("ab", "e"), ("", "x" * 30), ("hello", " there"), ("abc", "")]
    wanted = (engine := Engine(network, ByteTokenizer(1), 4)).loglikelihood(pairs)
    engine.reader = readers(network)[1]
    for _ in range(2):
        assert engine.loglikelihood(pairs) == pytest.approx(wanted, rel=1e-5)
    assert made


@pytest.mark.parametrize(
    "kind, way", [("bf16", "wkv7_chunks"), ("int8", "wkv7_chunks"), ("fp32", "wkv7"), (None, "wkv7")]
)
def test_what_is_kept_in_fewer_bits_is_read_on_tensor_cores(monkeypatch, kind, way):
    network, seen = model(), []
    features = network.features

    def told(*given):
        seen.append(gpu.way("wkv7", torch.zeros(1, 16, 1, 64))[0])
        return features(*given)

    monkeypatch.setattr(network, "features", told)
    network.kind = kind
    Reader(network, 1).read([[1, 2, 3]])
    assert seen == [way]


@pytest.mark.parametrize("rows, width, why", [
    (33, 3, "rows"), (32, 100, "tokens"), (2, 200, "width"), (2, 5, "learning"), (0, 3, "none"),
])  # fmt: skip
def test_what_is_large_and_what_learns_is_not_recorded(made, rows, width, why):
    network = model().train(why == "learning")
    chunks, ids = Chunks(network, 128), torch.zeros(rows, width, dtype=torch.long)
    for _ in range(2):
        assert chunks.features(ids, None, torch.full((rows,), width)) is None
    assert not made and not chunks.seen


def test_reading_that_cannot_be_recorded_is_done_as_it_is_and_a_line_says_so(readers, monkeypatch, caplog):
    def refused(*given):
        raise RuntimeError("operation not permitted")

    plain, recorded = readers(model())
    monkeypatch.setattr(graph, "recorded", refused)
    for _ in range(3):
        same(recorded.read([[1, 2, 3]]), plain.read([[1, 2, 3]]))
    assert caplog.text.count("reading 1 rows of 16 tokens is not recorded: operation not permitted") == 1


class Streams:
    """In the place of torch.cuda: the current stream, and a recording that ends as after an error."""

    def __init__(self):
        self.current = "the first"

    def current_stream(self, device):
        return mock.Mock(wait_stream=lambda other: None)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, "the first" if stream is not self.side else "the side"
        try:
            yield
        finally:
            self.current = before

    def Stream(self, device):
        self.side = mock.Mock(wait_stream=lambda other: None)
        return self.side

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.current = "the side"
        yield
        raise RuntimeError("operation failed due to a previous error during capture")  # and the stream stays


def test_what_cannot_be_recorded_leaves_no_other_stream_behind(monkeypatch):
    streams = Streams()
    for name in ("current_stream", "stream", "Stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pytest.raises(RuntimeError, match="previous error during capture"):
        graph.recorded(lambda: None, torch.device("cuda", 0), None)
    assert streams.current == "the first"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("family", ["rwkv7", "rwkv6", "rwkv5"])
@torch.inference_mode()
def test_a_card_s_graphs_give_what_its_kernels_give_one_by_one(family, caplog):
    network = model(family).cuda()
    for rows in (1, 5, 3):
        ids = (torch.arange(rows * 9).view(rows, 9) % 257).cuda()
        state, found = network.start(rows, ids.device), []
        plain, wanted = network.start(rows, ids.device), []
        steps = graphs(network)
        for t in range(9):
            found.append(steps.step(ids[:, t], state).clone())
            logits, plain = network(ids[:, t : t + 1], plain)
            wanted.append(logits[:, -1])
        torch.testing.assert_close(torch.stack(found), torch.stack(wanted), atol=1e-4, rtol=1e-4)
    assert "is not recorded" not in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows, sizes", [  # a block for each group of outputs; more than one takes
    *((rows, (192, 768, 257)) for rows in (1, 2, 3, 5, 9)), (2, (1088, 8260, 4200)), (4, (1088, 8260, 4200))
])  # fmt: skip
@torch.inference_mode()
def test_a_card_writes_by_kernels_for_it(kind, rows, sizes, caplog):
    D, F, V = sizes
    network, plain = (model(n_embd=D, dim_ffn=F, vocab_size=V, head_size=64).cuda() for _ in range(2))
    keep(network, kind)
    for name, value in plain.named_parameters():
        if kind != "fp32" and value.dim() == 2 and not name.endswith(("emb.weight", "r_k")):
            low = LOW.fullmatch(name)
            found = rounded(value.mT if low else value, kind).open()
            value.copy_(found.mT if low else found)
    steps, ids = graphs(network), (torch.arange(rows * 9).view(rows, 9) % 257).cuda()
    assert steps.decoder is not None
    state, after, roughly = network.start(rows, ids.device), plain.start(rows, ids.device), kind == "bf16" and rows > 8
    for t in range(9):
        found = steps.step(ids[:, t], state)
        logits, after = plain(ids[:, t : t + 1], after)
        assert float((found - logits[:, -1]).norm() / logits.norm()) < (0.1 if roughly else 1e-4)
    for one, other in zip(parts(state), parts(after), strict=True):
        assert float((one - other).norm() / other.norm()) < (0.1 if roughly else 1e-4)
    assert "is not recorded" not in caplog.text and "are not used" not in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("family", ["rwkv7", "rwkv6", "rwkv5"])
def test_a_card_s_graphs_read_what_its_kernels_read_one_by_one(family, caplog):
    reader, plain = (Reader(model(family).cuda(), 8) for _ in range(2))
    plain.recorded = None
    for lengths in ((300, 3, 30), (300, 3, 30), (5,), (17,), (5, 24, 1, 9)):
        rows = [[(7 * n + t * t) % 257 for t in range(length)] for n, length in enumerate(lengths)]
        for (one, state), (other, wanted) in [(reader.read(rows), plain.read(rows)) for _ in range(3)]:
            for x, y in zip((one, *parts(state)), (other, *parts(wanted)), strict=True):
                torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    assert reader.recorded.works and "is not recorded" not in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most here")
def test_a_card_that_is_not_the_current_one_computes_and_records_too(caplog):
    there = model().to("cuda:1")
    reader, steps, rows = Reader(there, 2), graphs(there), [[1, 2, 3, 4, 5]]
    wanted = Reader(model(), 2).read(rows)
    for _ in range(3):
        logits, state = reader.read(rows)
        torch.testing.assert_close(logits.cpu(), wanted[0], atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        found = steps.step(torch.tensor([7], device="cuda:1"), state)
        torch.testing.assert_close(found.cpu(), model()(torch.tensor([[7]]), wanted[1])[0][:, -1], atol=1e-4, rtol=1e-4)
    assert "is not recorded" not in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("sizes", [{}, {"n_embd": 64, "head_size": 64}])
def test_a_card_s_engine_writes_what_the_processor_writes(sizes):
    settings = SamplingConfig(temperature=0.0, max_tokens=14, stop=())

    def written(network):
        return {c.prompt: c.ids for c in Engine(network, ByteTokenizer(1), 3).generate(PROMPTS, settings)}

    assert written(model(**sizes).cuda()) == written(model(**sizes))
