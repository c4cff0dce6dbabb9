"""What the engine writes and weighs is what the whole forward says, whatever goes beside it."""

import numpy as np
import pytest
import torch

from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.base.errors import ConfigError, DataError, WeightsError
from rwkvpipe.infer import progress
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.row import Job, Row
from rwkvpipe.infer.words import Words
from rwkvpipe.model.family import build, detect
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.trie import TrieTokenizer
from rwkvpipe.train.policy import Rollout, completion_logprobs

PROMPTS = ["User: 1+1\n\nA:", "a", "The quick brown fox jumps", "x" * 40, "ab", "hello there", "2*3=", "zz", "y"]


def model(size: int = 257, seed: int = 0, **more) -> torch.nn.Module:
    found = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=size, **more))
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        found.initialise(seed)
        for value in found.parameters():
            value.add_(torch.randn(value.shape, generator=stream) * 0.1)
    return found.eval()


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return model()


def engine(network, rows=4, tokenizer=None) -> Engine:
    return Engine(network, tokenizer or ByteTokenizer(1), rows)


def completions(network, sampling, rows, prompts=PROMPTS, samples=1, **more):
    found = engine(network, rows).generate(prompts, sampling, samples, **more)
    return {(c.prompt, c.sample): c for c in found}


def whole(network, ids: list[int]) -> torch.Tensor:
    """Log-probability of each token but the first, from one forward."""
    with torch.no_grad():
        logits = network(torch.tensor([ids]))[0][0].double()
    return logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize(
    "sizes", [{"family": "rwkv5"}, {"family": "rwkv6", "time_state": True}, {"family": "rwkv7", "time_state": True}]
)
def test_every_family_writes_what_its_whole_forward_says(sizes):
    network = model(**sizes)
    found = completions(network, SamplingConfig(temperature=0.0, max_tokens=5, stop=()), 4, PROMPTS[:5])
    for n, prompt in enumerate(PROMPTS[:5]):
        ids = ByteTokenizer(1).encode(prompt)
        sums = whole(network, ids + found[n, 0].ids)[len(ids) - 1 :]
        assert found[n, 0].logprobs == pytest.approx(sums.tolist(), abs=1e-5)
    pairs = [(prompt, "end") for prompt in PROMPTS[:5]]
    for (context, end), total in zip(pairs, engine(network).loglikelihood(pairs), strict=True):
        ids = ByteTokenizer(1).encode(context)
        sums = whole(network, ids + ByteTokenizer(1).encode(end))[len(ids) - 1 :]
        assert total == pytest.approx(float(sums.sum()), abs=1e-4)


def test_rows_beside_a_row_change_nothing(network):
    sampling = SamplingConfig(temperature=0.8, max_tokens=12, seed=3, stop=("e",), repetition_penalty=1.2, presence=0.1)
    alone = completions(network, sampling, 1, samples=2)
    together = completions(network, sampling, 7, samples=2)
    assert alone.keys() == together.keys() == {(n, s) for n in range(len(PROMPTS)) for s in range(2)}
    for key, one in alone.items():
        many = together[key]
        assert (one.ids, one.text, one.finish) == (many.ids, many.text, many.finish)
        assert one.logprobs == pytest.approx(many.logprobs, abs=1e-5)
    assert len({tuple(one.ids) for one in alone.values()}) > len(PROMPTS)  # samples differ


def test_order_of_prompts_changes_nothing_when_numbers_stay(network):
    sampling = SamplingConfig(max_tokens=6, seed=1)
    forward = completions(network, sampling, 3)
    numbers = list(reversed(range(len(PROMPTS))))
    back = completions(network, sampling, 3, prompts=PROMPTS[::-1], numbers=numbers)
    assert {key: one.ids for key, one in forward.items()} == {key: one.ids for key, one in back.items()}


def test_a_longer_limit_goes_on_where_the_shorter_ends(network):
    short = completions(network, SamplingConfig(max_tokens=4, stop=()), 3)
    long = completions(network, SamplingConfig(max_tokens=9, stop=()), 3)
    assert all(one.ids == long[key].ids[: len(one.ids)] for key, one in short.items())


def test_the_likeliest_tokens_are_those_of_the_whole_forward(network):
    for one in completions(network, SamplingConfig(temperature=0.0, max_tokens=5, stop=()), 4).values():
        ids = ByteTokenizer(1).encode(PROMPTS[one.prompt])
        for found in one.ids:
            with torch.no_grad():
                assert network(torch.tensor([ids]))[0][0, -1].argmax() == found
            ids.append(found)


def test_log_probabilities_are_those_the_trainer_computes(network):
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, max_tokens=8, stop=("a",), frequency=0.2)
    for one in completions(network, sampling, 4).values():
        ids = ByteTokenizer(1).encode(PROMPTS[one.prompt])
        width = torch.ones(1, len(one.ids))
        rollout = Rollout(torch.tensor([ids + one.ids]), torch.tensor([len(ids)]), width, width[:, 0], width)
        with torch.no_grad():
            assert one.logprobs == pytest.approx(completion_logprobs(network, rollout, 0.7)[0].tolist(), abs=1e-5)


class Ids:
    """Ids written as text."""

    size, eos = 2, None
    encode = staticmethod(lambda text: [int(word) for word in text.split()])
    owns = staticmethod(lambda number: True)


def test_reference_log_probabilities_of_ragged_rows(goldens):
    weights = np.load(goldens / "tune" / "tiny_rwkv7.npz", allow_pickle=False)
    tensors = {name: torch.tensor(weights[name]) for name in weights.files if name != "__meta__"}
    network = build(detect(tensors))
    network.load_state_dict({name: tensors[name].reshape(like.shape) for name, like in network.state_dict().items()})
    file = np.load(goldens / "tune" / "model_ragged_logps.npz", allow_pickle=False)
    rows = zip(*(file[name] for name in ("prompts", "prompt_len", "completions", "completion_len")), strict=True)
    pairs = [(" ".join(map(str, p[:a])), " ".join(map(str, c[:b]))) for p, a, c, b in rows]
    for width in (1, 3, 64):
        found = Engine(network.eval(), Ids(), width).loglikelihood(pairs)
        assert found == pytest.approx(file["logp_T1.0"].sum(1).tolist(), abs=2e-4)


def test_ids_hold_what_ended_them_and_text_does_not(network):
    found = completions(network, SamplingConfig(max_tokens=200, stop=("e", "\n"), bias={102: 3.0}, seed=5), 4)
    assert {one.finish for one in found.values()} == {"stop"}
    for one in found.values():
        tokenizer = ByteTokenizer(1)
        written = tokenizer.decode_bytes(one.ids)
        if one.ids[-1] != tokenizer.eos:
            assert written[-1:] in (b"e", b"\n")
            written = written[:-1]
        assert one.text == written.decode("utf-8", "replace")
        assert len(one.logprobs) == len(one.ids)


def test_a_stop_text_inside_a_longer_token_or_over_several_is_found():
    words = {n + 1: bytes([n]) for n in range(256)} | {257: b".\n\nUser", 258: b"ab"}
    tokenizer, network = TrieTokenizer(words), model(259)
    with torch.no_grad():
        network.head.weight.zero_()
    for bias, text, ids in (
        ({257: 50.0}, ".", [257]),
        ({ord("\n") + 1: 50.0}, "", [11, 11]),
    ):
        sampling = SamplingConfig(temperature=0.0, bias=bias, max_tokens=9)
        (one,) = Engine(network, tokenizer, 2).generate(["q"], sampling)
        assert (one.text, one.ids, one.finish) == (text, ids, "stop")


@pytest.mark.parametrize("ids", [[258], [byte + 1 for byte in b"xabcdy"]])
def test_of_several_stop_texts_the_one_that_is_whole_first_ends_the_text_whatever_the_tokens_are(ids):
    class Tokens(ByteTokenizer):
        def decode_bytes(self, ids):
            return b"".join(b"xabcdy" if n == 258 else bytes([n - 1]) for n in ids)

    row = Row(Job(0, 0, [1], SamplingConfig(stop=("abcd", "bc", "c")), None, None, 0), Words(Tokens(0), 259))
    assert any(row.add(n, -1.0) for n in ids)
    assert row.completion().text == "xa"


class Lossy:
    """A tokenizer whose ids are bytes and whose decode, all that there is, has U+FFFD for half a character."""

    size, eos = 257, 0
    encode = staticmethod(lambda text: [byte + 1 for byte in text.encode()])
    decode = staticmethod(lambda ids: bytes(n - 1 for n in ids if n).decode("utf-8", "replace"))
    decode_bytes = classmethod(lambda kind, ids: kind.decode(ids).encode())
    owns = staticmethod(lambda number: number > 0)


@pytest.mark.parametrize(("stop", "text"), [("日", "x"), ("é", "x日本"), ("本é", "x日"), ("本日", "x日本éy")])
def test_characters_that_become_whole_are_streamed_whole_and_found_as_stop_texts(stop, text):
    row = Row(Job(0, 0, [1], SamplingConfig(stop=(stop,)), None, None, 0), Words(Lossy(), 257))
    told = b""
    for number in Lossy.encode("x日本éy"):
        over = row.add(number, -1.0)
        assert row.written().startswith(told)
        told = row.written()
        if over:
            break
    assert told.decode() == text == row.completion().text


def test_a_stream_of_broken_characters_is_the_text_that_is_generated(network):
    biased = SamplingConfig(max_tokens=40, stop=(), bias={byte + 1: 60.0 for byte in "日本é".encode()})
    for seed in range(3):
        sampling = biased.model_copy(update={"seed": seed})
        (whole,) = engine(network, tokenizer=Lossy()).generate(["q"], sampling)
        assert "".join(engine(network, tokenizer=Lossy()).stream("q", sampling)) == whole.text


def test_the_id_that_ends_documents_ends_at_once_and_writes_nothing(network):
    (one,) = engine(network).generate(["q"], SamplingConfig(temperature=0.0, bias={0: 1e4}, max_tokens=9))
    assert (one.text, one.ids, one.finish) == ("", [0], "stop")


def test_exactly_max_tokens_are_written(network):
    found = completions(network, SamplingConfig(max_tokens=1, ban=(0,), stop=()), 4)
    assert {(len(one.ids), one.finish) for one in found.values()} == {(1, "length")}


def test_a_prompt_may_be_given_as_ids(network):
    sampling = SamplingConfig(max_tokens=3)
    ids = [ByteTokenizer(1).encode(text) for text in PROMPTS[:3]]
    assert completions(network, sampling, 4, ids) == completions(network, sampling, 4, PROMPTS[:3])


def test_ids_as_a_prompt_are_the_models_and_none_begin_a_document(network):
    sampling = SamplingConfig(temperature=0.0, max_tokens=5, stop=())
    (empty,), (begun,) = (list(engine(network).generate([ids], sampling)) for ids in ([], [0]))
    assert empty == begun
    for odd in (257, -1):
        with pytest.raises(DataError, match=f"there is no id {odd}; the model has 0 to 256"):
            list(engine(network).generate([[5, odd]], sampling))


def test_ids_that_stand_for_nothing_never_come():
    network, tokenizer = model(300), TrieTokenizer({5: b"a", 9: b"b"})
    (one,) = Engine(network, tokenizer, 1).generate(["ab"], SamplingConfig(temperature=5.0, max_tokens=60, stop=()))
    assert set(one.ids) <= {0, 5, 9}


def test_numbers_are_written_too():
    network = model(12)
    found = list(Engine(network, IntegerTokenizer(11), 2).generate(["1 2 3", "10"], SamplingConfig(max_tokens=5)))
    assert all(all(word.isdigit() for word in one.text.split()) for one in found)


def test_an_empty_prompt_begins_a_document_or_is_refused(network):
    (one,) = engine(network).generate([""], SamplingConfig(temperature=0.0, max_tokens=1, stop=()))
    with torch.no_grad():
        assert network(torch.tensor([[0]]))[0][0, -1].argmax() == one.ids[0]
    with pytest.raises(DataError, match="empty prompt"):
        list(engine(network, tokenizer=ByteTokenizer(0)).generate([""], SamplingConfig()))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    with pytest.raises(ConfigError, match="the tokenizer has 257 ids, the model 100"):
        Engine(model(100), ByteTokenizer(1), 1)


def test_an_empty_stop_text_is_refused(network):
    with pytest.raises(ConfigError, match=r"sampling\.stop"):
        list(engine(network).generate(["a"], SamplingConfig(stop=("",))))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_no_numbers_are_refused(temperature):
    network = model()
    with torch.no_grad():
        network.head.weight.fill_(torch.nan)
    with pytest.raises(WeightsError, match="no numbers"):
        list(engine(network).generate(["a"], SamplingConfig(max_tokens=3, temperature=temperature)))


def test_no_prompts_give_no_completions(network):
    assert list(engine(network).generate([], SamplingConfig())) == []
    assert engine(network).loglikelihood([]) == []


def test_continuations_weigh_what_the_whole_forward_says(network):
    pairs = [(c, e) for c in ("The", "The quick brown", "") for e in (" fox", "", " a much longer end", "x")]
    tokenizer = ByteTokenizer(1)
    for rows in (1, 5):
        for (context, end), found in zip(pairs, engine(network, rows).loglikelihood(pairs), strict=True):
            ids = (tokenizer.encode(context) or [0]) + tokenizer.encode(end)
            wanted = whole(network, ids)[len(ids) - 1 - len(end) :].sum().item()
            assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("offset", [0, 1])
def test_windows_carry_the_state_so_their_length_changes_nothing(network, offset):
    text = "It was the best of times, it was the worst of times. " * 12
    tokenizer = ByteTokenizer(offset)
    ids = tokenizer.encode(text)
    wanted = -whole(network, ids if offset == 0 else [0, *ids]).sum().item()
    for ctx_len in (7, 100, 5000):
        nats, tokens = engine(network, 2, tokenizer).rolling(text, ctx_len)
        assert tokens == len(ids) - (offset == 0)  # the first has nothing before it, where nothing ends a document
        assert nats == pytest.approx(wanted, abs=2e-3)


def test_windows_of_texts_of_any_length_cover_each_text_once(network):
    tokenizer = ByteTokenizer(1)
    texts = [tokenizer.encode(text) for text in ("", "a", "abcdefgh", "hello world, this is longer", "q" * 300)]
    for rows in (1, 3):
        found = engine(network, rows).windows(texts, 8)
        for ids, windows in zip(texts, found, strict=True):
            assert [i for _, covered in windows for i in covered] == ids
            assert [len(covered) for _, covered in windows] == [min(8, len(ids) - n) for n in range(0, len(ids), 8)]
            assert sum(nats for nats, _ in windows) == pytest.approx(-whole(network, [0, *ids]).sum().item(), abs=1e-3)


def test_a_caller_between_completions_may_still_train(network):
    for _ in engine(network).generate(["a", "b"], SamplingConfig(max_tokens=2)):
        assert not torch.is_inference_mode_enabled()
        assert network(torch.tensor([[1]]))[0].requires_grad


def test_progress_tells_of_whole_bursts(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress("answered", 40)
    with caplog.at_level("INFO"):
        for burst in range(1, 4):
            now[0] = 15.0 * burst
            for _ in range(10):
                bar.add(1)
    assert caplog.messages == ["answered: 10 of 40, 0.7/s, 30 s left", "answered: 20 of 40, 0.7/s, 15 s left"]


def test_stop_ids_end_a_text_and_write_nothing(network):
    found = completions(network, SamplingConfig(max_tokens=200, stop=(), stop_ids=(102, 0), bias={102: 3.0}, seed=5), 4)
    for one in found.values():
        assert one.finish == "stop"
        assert one.ids[-1] in (102, 0)
        assert one.text == ByteTokenizer(1).decode(one.ids[:-1])


def test_penalties_of_earlier_times_fade():
    network = model()
    with torch.no_grad():
        network.head.weight.zero_()
    sampling = SamplingConfig(temperature=0.0, frequency=1.0, bias={98: 3.5, 99: 3.0}, ban=(0,), max_tokens=60, stop=())
    (plain,) = engine(network).generate(["q"], sampling)
    (fading,) = engine(network).generate(["q"], sampling.model_copy(update={"decay": 0.5}))
    assert len(set(plain.ids)) > 2  # every count stays, so others have their turn
    assert set(fading.ids) == {98, 99}
    times = {98: 0.0, 99: 0.0}
    for number in fading.ids:
        assert number == max(times, key=lambda n: {98: 3.5, 99: 3.0}[n] - times[n])
        times = {n: 0.5 * value + (n == number) for n, value in times.items()}


@pytest.mark.parametrize("decay", [0.0, 1e-9, 0.25])
def test_presence_stays_when_the_times_have_faded_to_nothing(decay):
    network = model()
    with torch.no_grad():
        network.head.weight.zero_()
    places = {n: 250.0 - n for n in range(1, 250)}  # each comes once, the likeliest first
    sampling = SamplingConfig(
        temperature=0.0, presence=500.0, decay=decay, bias=places, ban=(0,), max_tokens=240, stop=()
    )
    (found,) = engine(network).generate(["q"], sampling)
    assert found.ids == list(range(1, 241))


def test_half_a_surrogate_pair_in_a_stop_text_is_refused(network):
    with pytest.raises(DataError, match="half a surrogate pair"):
        list(engine(network).generate(["a"], SamplingConfig(stop=("\ud800",))))
