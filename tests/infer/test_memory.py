"""Rows that memory does not hold are refused before anything is allocated."""

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.infer import memory
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.prefix import KEPT
from rwkvpipe.model.family import build, complete
from rwkvpipe.model.layers import State
from rwkvpipe.tokenizer.byte import ByteTokenizer


@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
@pytest.mark.parametrize("sizes", [(2, 32, 16), (3, 128, 64)])
def test_a_state_takes_what_is_computed(family, sizes):
    layers, width, head = sizes
    config = complete(RwkvConfig(family=family, n_layer=layers, n_embd=width, head_size=head, vocab_size=257))
    assert State.zeros(config, 5).nbytes == 5 * memory.state_bytes(config)


def test_released_models_have_the_states_of_their_description():
    config = RwkvConfig(n_layer=12, n_embd=768, vocab_size=65536)
    assert memory.state_bytes(config) == 4 * 608_256


def test_too_many_rows_are_refused_and_enough_are_named(monkeypatch):
    network = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=257))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 << 20)
    with pytest.raises(
        ConfigError, match=r"rows: 900 texts at a time take about .* GB are free; (\d+) would do"
    ) as found:
        Engine(network, ByteTokenizer(1), 900)
    most = int(str(found.value).split("free; ")[1].split()[0])
    Engine(network, ByteTokenizer(1), most // 2)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10)
    with pytest.raises(ConfigError, match="not even one would do"):
        Engine(network, ByteTokenizer(1), 1)


def test_states_that_are_kept_get_what_the_rows_leave(monkeypatch):
    network = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=257))
    for free, least, most in ((100 << 20, 1, 99 << 20), (None, KEPT, KEPT), (1 << 40, KEPT, KEPT)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        engine = Engine(network, ByteTokenizer(1), 3)
        assert least <= engine.states().limit <= most
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10)  # by now others have taken it
    kept = engine.states()
    kept.add([1, 2], engine.reader.read([[1, 2]])[1])
    assert not list(kept) and kept.size == 0


def test_on_a_card_graphs_have_states_of_their_own(monkeypatch):
    config = complete(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=257))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 << 20)
    more = memory.RECORDED * memory.state_bytes(config)
    most = {"cpu": (10 << 20) // memory.row_bytes(config, 8)}
    most["cuda"] = (10 << 20) // (memory.row_bytes(config, 8) + more)
    assert most["cuda"] < most["cpu"]
    for device, rows in most.items():
        memory.check_rows(config, rows, torch.device(device), chunk=8, logits=0)
        with pytest.raises(ConfigError, match=f"{rows} would do"):
            memory.check_rows(config, rows + 1, torch.device(device), chunk=8, logits=0)


def test_the_system_says_what_is_free():
    assert memory.free_bytes(torch.device("cpu")) > 1 << 20
