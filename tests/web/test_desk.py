"""Many clients share one engine: each gets what it would get alone, who leaves makes room, who is too many waits."""

import threading

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.base.errors import ConfigError, WeightsError
from rwkvpipe.infer import reading
from rwkvpipe.infer.engine import Engine
from rwkvpipe.model.family import build
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.web.desk import Closed, Desk, Event, Full, Order

LONG = 60  # seconds after which a test has failed


class Client:
    """One who asks, and waits for all of it."""

    def __init__(self, desk: Desk, prompts: list[str], sampling: SamplingConfig, samples: int = 1):
        self.texts: dict[int, bytes] = {}
        self.ends: dict[int, str | None] = {}
        self.error, self.first, self.done = None, threading.Event(), threading.Event()
        ids = [desk.engine.begin(prompt) for prompt in prompts]
        self.order = Order(ids, sampling, samples, None, self.hear)
        desk.submit(self.order)

    def hear(self, event: Event) -> None:
        self.texts[event.index] = self.texts.get(event.index, b"") + event.data
        self.first.set()
        if event.finish:
            self.ends[event.index] = event.finish
        self.error = event.error
        if event.error or len(self.ends) == len(self.order.prompts) * self.order.samples:
            self.done.set()


def engine(rows: int) -> Engine:
    network = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=257))
    network.initialise(0)
    return Engine(network.eval(), ByteTokenizer(1), rows)


class Gate:
    """Lets the engine write only when it is open."""

    def __init__(self, desk: Desk):
        self.open, self.plain = threading.Event(), desk.slots.step
        desk.slots.step = self.step

    def step(self):
        assert self.open.wait(LONG)
        return self.plain()


@pytest.fixture
def desk():
    found = Desk(engine(3), 5)
    found.gate = Gate(found)
    thread = threading.Thread(target=found.run)
    thread.start()
    yield found
    found.gate.open.set()
    found.close()
    thread.join(LONG)
    assert not thread.is_alive()


SETTINGS = [
    SamplingConfig(temperature=0.8, max_tokens=20, stop=("e",), seed=3),
    SamplingConfig(temperature=0.0, max_tokens=9, stop=()),
    SamplingConfig(choices=("yes", "no"), seed=1),
]


def test_each_client_gets_what_it_would_get_alone(desk):
    clients = [Client(desk, [f"prompt {n}"], SETTINGS[n % 3], 1 + n % 2) for n in range(5)]
    desk.gate.open.set()
    for n, client in enumerate(clients):
        assert client.done.wait(LONG)
        for one in engine(1).generate([f"prompt {n}"], SETTINGS[n % 3], 1 + n % 2):
            assert client.texts[one.sample].decode("utf-8", "replace") == one.text
            assert client.ends[one.sample] == one.finish


def test_several_prompts_and_samples_have_their_places(desk):
    client = Client(desk, ["a", "bb"], SETTINGS[0], 3)
    desk.gate.open.set()
    assert client.done.wait(LONG)
    wanted = {3 * c.prompt + c.sample: c.text for c in engine(2).generate(["a", "bb"], SETTINGS[0], 3)}
    assert {n: text.decode("utf-8", "replace") for n, text in client.texts.items()} == wanted


def test_more_than_may_wait_are_told_to_come_again(desk):
    endless = SamplingConfig(max_tokens=50, stop=(), ban=(0,))
    first = Client(desk, ["a"], endless, 8)  # three are written, five wait
    with pytest.raises(Full, match="try again later"):
        Client(desk, ["b"], endless)
    desk.gate.open.set()
    assert first.done.wait(LONG)
    assert Client(desk, ["b"], endless).done.wait(LONG)


def test_more_than_ever_fit_are_refused(desk):
    with pytest.raises(ConfigError, match="9 texts are asked for at once; this server takes 8"):
        Client(desk, ["a"], SETTINGS[0], 9)


def test_who_leaves_makes_room(desk):
    endless = SamplingConfig(max_tokens=2**20, stop=(), ban=(0,))
    leavers = [Client(desk, [f"{n}"], endless) for n in range(8)]
    assert leavers[0].first.wait(LONG)
    for client in leavers:
        desk.give_up(client.order)
    stayer = Client(desk, ["x"], SETTINGS[1])
    desk.gate.open.set()
    assert stayer.done.wait(LONG)
    assert desk.slots.free >= 2
    assert not any(client.ends for client in leavers)


def test_settings_that_cannot_be_are_refused_when_asked(desk):
    with pytest.raises(ConfigError, match="empty text"):
        Client(desk, ["a"], SamplingConfig(choices=("",)))


def test_a_text_that_cannot_go_on_ends_alone(desk):
    """`yes` may begin, and then the ban leaves nothing: once that was the end of the server."""
    stuck, beside = SamplingConfig(choices=("yes",), ban=(ord("e") + 1,)), Client(desk, ["b"], SETTINGS[0])
    clients = [Client(desk, ["a"], stuck, 2), Client(desk, ["a"], stuck.model_copy(update={"ban": (ord("y") + 1,)}))]
    desk.gate.open.set()
    for client in clients:
        assert client.done.wait(LONG)
        assert isinstance(client.error, ConfigError) and "no token of the vocabulary" in str(client.error)
        assert client.order not in desk.orders
    assert beside.done.wait(LONG)
    assert not beside.error
    assert Client(desk, ["c"], SETTINGS[1]).done.wait(LONG)


def test_a_desk_that_closes_tells_those_who_wait(desk):
    client = Client(desk, ["a"], SamplingConfig(max_tokens=2**20, stop=(), ban=(0,)), 8)
    assert client.first.wait(LONG)
    desk.close()
    desk.gate.open.set()
    assert client.done.wait(LONG)
    assert isinstance(client.error, Closed)
    with pytest.raises(Closed):
        Client(desk, ["a"], SETTINGS[1])


def test_an_engine_that_fails_tells_those_who_wait():
    desk = Desk(engine(2), 5)
    with torch.no_grad():
        desk.engine.model.head.weight.fill_(torch.nan)
    client = Client(desk, ["a"], SETTINGS[1])
    with pytest.raises(WeightsError):
        desk.run()
    assert isinstance(client.error, WeightsError)
    with pytest.raises(Closed):
        Client(desk, ["a"], SETTINGS[1])


def test_a_header_that_clients_share_is_read_twice_at_most():
    """The second to come shows how far it goes, from then on only what follows is read; the texts stay the same."""
    desk, read = Desk(engine(3), 5), []
    prompts = ["Be kind, and say what you know of it. " * 8 + f"Question {n}: why?" for n in (3, 14, 15, 92)]
    wanted = {c.prompt: c.text for c in engine(1).generate(prompts, SETTINGS[1])}
    plain = desk.engine.model.features

    def features(ids, state=None, lengths=None):
        read.append(ids.numel() if lengths is None else int(lengths.sum()))
        return plain(ids, state, lengths)

    desk.engine.model.features = features
    for n, prompt in enumerate(prompts):
        read.clear()
        client = Client(desk, [prompt], SETTINGS[1])
        while not client.done.is_set():
            desk._turn()
        assert client.texts[0].decode("utf-8", "replace") == wanted[n]
        assert sum(read) == len(prompt) if n < 2 else sum(read) < 30
    read.clear()
    client = Client(desk, prompts[:3], SETTINGS[1])  # one of them known whole, but for a token
    while not client.done.is_set():
        desk._turn()
    assert [client.texts[n].decode("utf-8", "replace") for n in range(3)] == [wanted[n] for n in range(3)]
    assert sum(read) < 60


def test_a_long_prompt_does_not_hold_up_short_ones(monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 4)
    desk = Desk(engine(3), 5)
    long = Client(desk, ["x" * 4000], SETTINGS[1])
    short = Client(desk, ["a"], SETTINGS[1])
    for _ in range(40):
        desk._turn()
    assert short.done.is_set() and not long.first.is_set()
    desk.give_up(long.order)
    desk._turn()
    assert not desk.readings and not desk.slots.busy
