"""Every family against reference numbers (outputs, states, gradients, initial values) and against itself in pieces."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.model.family import build, detect
from rwkvpipe.model.layers import State

PARTS = ("att_x", "wkv", "ffn_x")
FAMILIES = {"rwkv5": "x052", "rwkv6": "x060", "rwkv7": "x070"}
each_family = pytest.mark.parametrize("family", FAMILIES)


def small(family, **changes):
    """Sizes of a tiny model."""
    return RwkvConfig(**{"family": family, "n_layer": 2, "n_embd": 32, "head_size": 16, "vocab_size": 19} | changes)


def golden_model(golden, prefix="w/", dtype=torch.float64):
    """The model whose weights lie in a file of reference numbers."""
    tensors = {name[len(prefix) :]: torch.tensor(golden[name]) for name in golden.files if name.startswith(prefix)}
    model = build(detect(tensors)).to(dtype)
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    model.load_state_dict({name: tensors[name].reshape(shape).to(dtype) for name, shape in shapes.items()})
    return model


def memory(golden, name):
    """An array of the reference numbers, states as [value, key]."""
    found = golden[name]
    return found.swapaxes(-1, -2) if name.endswith("wkv") and "x070" not in str(golden["meta"]) else found


def random_model(config, seed=0):
    """A model with weights large enough to tell tokens apart."""
    model = build(config).double().eval()
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=stream, dtype=torch.float64) * 0.4)
    return model


def difference(found, wanted):
    return float((found.detach().double() - torch.as_tensor(wanted).double()).abs().max())


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())


def with_memories(family, seed=0):
    """A random model whose texts start from states of their own, where the family has them."""
    return random_model(small(family, time_state=family != "rwkv5"), seed)


@each_family
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-5), (torch.float64, 1e-9)])
def test_logits_and_states_are_the_reference_numbers(goldens, family, dtype, tolerance):
    golden = np.load(goldens / "rwkv" / f"model_{FAMILIES[family]}_a.npz")
    model = golden_model(golden, dtype=dtype)
    logits, state = model(torch.tensor(golden["tokens"])[None])
    assert difference(logits[0], golden["logits"]) < tolerance
    for layer in range(model.config.n_layer):
        for part in PARTS:
            wanted = memory(golden, f"state/{layer}/{part}")
            assert difference(getattr(state, part)[layer][0], wanted) < 1e-5 * max(1, abs(wanted).max())


@each_family
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_loss_and_gradients_from_an_empty_state_are_the_reference_numbers(goldens, family, dtype, tolerance):
    golden = np.load(goldens / "rwkv" / f"model_{FAMILIES[family]}_a.npz")
    model = golden_model(golden, dtype=dtype)
    loss = cross_entropy(model(torch.tensor(golden["train_x"]))[0], golden["train_y"])
    loss.backward()
    assert difference(loss, golden["loss"]) < 1e-5
    for name, parameter in model.named_parameters():
        wanted = golden[f"grad/{name}"].reshape(parameter.shape)
        assert difference(parameter.grad, wanted) < tolerance * abs(wanted).max(), name


@each_family
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-8)])
def test_gradients_reach_the_state_that_a_row_starts_from(goldens, family, dtype, tolerance):
    golden = np.load(goldens / "rwkv" / f"model_{FAMILIES[family]}_b.npz")
    model = golden_model(golden, dtype=dtype)
    state = State.zeros(model.config, len(golden["train_x"]), dtype=dtype)
    for layer in range(model.config.n_layer):
        for part in PARTS:
            given = torch.tensor(memory(golden, f"state0/{layer}/{part}")).to(dtype)
            getattr(state, part)[layer] = given.requires_grad_()
    logits, after = model(torch.tensor(golden["train_x"]), state)
    assert difference(logits, golden["logits"]) < max(tolerance, 5e-5 if dtype == torch.float32 else 0)
    cross_entropy(logits, golden["train_y"]).backward()
    for name, parameter in model.named_parameters():
        wanted = golden[f"grad/{name}"].reshape(parameter.shape)
        assert difference(parameter.grad, wanted) < tolerance * abs(wanted).max(), name
    for layer in range(model.config.n_layer):
        for part in PARTS:
            wanted = memory(golden, f"grad_state0/{layer}/{part}")
            assert difference(getattr(state, part)[layer].grad, wanted) < tolerance * abs(wanted).max()
            last = memory(golden, f"stateT/{layer}/{part}")
            assert difference(getattr(after, part)[layer], last) < 1e-5 * max(1, abs(last).max())


@pytest.mark.parametrize("family", ["rwkv6", "rwkv7"])
def test_initial_states_of_the_weights_are_where_rows_start_and_are_learned(goldens, family):
    golden = np.load(goldens / "rwkv" / f"model_{FAMILIES[family]}_b.npz")
    plain = golden_model(golden)
    tensors, row = plain.state_dict(), torch.tensor(golden["train_x"])[1:]
    state = State.zeros(plain.config, 1, dtype=torch.float64)
    for layer in range(plain.config.n_layer):
        given = torch.tensor(memory(golden, f"state0/{layer}/wkv")[1]).double()
        tensors[f"blocks.{layer}.att.time_state"] = given
        state.wkv[layer] = given[None].clone().requires_grad_()
    tuned = build(detect(tensors)).double()
    tuned.load_state_dict(tensors)
    assert tuned.config.time_state
    logits, wanted = tuned(row)[0], plain(row, state)[0]
    assert torch.equal(logits, wanted)
    logits.square().sum().backward()
    wanted.square().sum().backward()
    for block, memories in zip(tuned.blocks, state.wkv, strict=True):
        assert torch.equal(block.att.time_state.grad, memories.grad[0])


@each_family
def test_initial_values_are_the_references(goldens, family):
    golden = np.load(goldens / "rwkv" / f"init_{FAMILIES[family]}.npz")
    for tag in sorted({name.split("/")[0] for name in golden.files} - {"meta"}):
        L, D, N, V = (int(part[1:]) for part in tag.split("_"))
        model = build(RwkvConfig(family=family, n_layer=L, n_embd=D, head_size=N, vocab_size=V))
        model.initialise(1)
        for name, parameter in model.state_dict().items():
            if f"{tag}/shape/{name}" in golden.files:
                assert tuple(golden[f"{tag}/shape/{name}"]) == tuple(parameter.shape), name
            if f"{tag}/{name}" in golden.files:
                wanted = torch.tensor(golden[f"{tag}/{name}"]).flatten()
                assert difference(parameter.flatten(), wanted) < 2e-6, name


@each_family
def test_random_initial_values_have_the_references_singular_values(family):
    model = build(small(family, n_embd=64, head_size=32, vocab_size=256))
    model.initialise(3)
    gains = {
        "head.weight": 0.5 * 2.0,
        "blocks.0.att.receptance.weight": 1.0,
        "blocks.1.att.key.weight": 0.1,
        "blocks.1.att.value.weight": 1.0,
        "blocks.0.ffn.key.weight": 1.0,
        **({"blocks.1.att.w2": 0.1} if family == "rwkv7" else {"blocks.1.att.gate.weight": 0.1}),
    }
    tensors = model.state_dict()
    for name, gain in gains.items():
        found = torch.linalg.svdvals(tensors[name])
        assert difference(found, torch.full_like(found, gain)) < 1e-5, name
    assert 0.9e-4 < tensors["emb.weight"].abs().max() <= 1e-4
    for name in ("att.output", "ffn.value", "ffn.receptance"):
        assert not tensors.get(f"blocks.0.{name}.weight", torch.zeros(1)).any()


def test_the_low_ranks_of_rwkv6_start_as_the_references():
    model = build(small("rwkv6", n_embd=64))
    model.initialise(3)
    for name in ("time_maa", "time_decay"):
        assert not getattr(model.blocks[0].att, f"{name}_w1").any()
        second = getattr(model.blocks[1].att, f"{name}_w2")
        assert 0.009 < second.abs().max() <= 0.01 and second.mean().abs() < 1e-3


@each_family
def test_the_seed_decides_the_initial_values(family):
    first, same, other = (build(small(family)) for _ in range(3))
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        model.initialise(seed)
    for name, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(first.head.weight, other.head.weight)


@each_family
def test_every_value_is_initialised(family):
    model = build(small(family))
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(torch.nan)
    model.initialise(1)
    assert all(value.isfinite().all() for value in model.parameters())


def test_one_layer_has_no_initial_values():
    with pytest.raises(ConfigError, match="n_layer"):
        build(small("rwkv7", n_layer=1)).initialise(0)


@each_family
@pytest.mark.parametrize("T", [1, 15, 16, 17, 131])
def test_whole_in_pieces_and_token_by_token_are_the_same(family, T):
    model = with_memories(family)
    ids = torch.randint(0, 19, (2, T), generator=torch.Generator().manual_seed(T))
    with torch.no_grad():
        whole, last = model(ids)
        for piece in (1, 7):
            state, parts = None, []
            for first in range(0, T, piece):
                logits, state = model(ids[:, first : first + piece], state)
                parts.append(logits)
            assert difference(torch.cat(parts, 1), whole) < 1e-9
            assert difference(state.wkv[1], last.wkv[1]) < 1e-9
            assert difference(state.ffn_x[0], last.ffn_x[0]) < 1e-9


@each_family
def test_padded_rows_are_what_they_are_alone(family):
    model = with_memories(family)
    rows = [torch.arange(n) % 19 for n in (5, 23, 1, 17)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad():
        logits, state = model(ids, lengths=torch.tensor([len(row) for row in rows]))
        for place, row in enumerate(rows):
            alone, last = model(row[None])
            assert difference(logits[place, : len(row)], alone[0]) < 1e-9
            for part in PARTS:
                assert difference(getattr(state, part)[1][place], getattr(last, part)[1][0]) < 1e-9


@each_family
def test_gradients_of_padded_rows_are_what_they_are_alone(family):
    model = with_memories(family)
    rows = [torch.arange(n) % 19 for n in (5, 23)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    alone = []
    for row in rows:
        model(row[None])[1].wkv[1].square().sum().backward()
    alone = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    model(ids, lengths=torch.tensor([5, 23]))[1].wkv[1].square().sum().backward()
    for name, wanted in alone.items():
        assert difference(model.get_parameter(name).grad, wanted) < 1e-9 * max(1.0, float(wanted.abs().max())), name


@each_family
def test_a_row_of_length_nought_keeps_its_state(family):
    model = random_model(small(family))
    with torch.no_grad():
        _, before = model(torch.tensor([[1, 2], [3, 4]]))
        _, after = model(torch.tensor([[5, 6], [7, 8]]), before, torch.tensor([0, 2]))
    for part in PARTS:
        assert torch.equal(getattr(after, part)[0][0], getattr(before, part)[0][0])


@each_family
def test_bf16_arithmetic_stays_near_and_keeps_the_state_wide(family):
    model = with_memories(family).float()
    ids = torch.arange(17)[None]
    with torch.no_grad():
        wanted, _ = model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            logits, state = model(ids)
    assert logits.dtype == torch.float32 and {x.dtype for x in state.wkv} == {torch.float32}
    assert difference(logits, wanted) < 0.1 * float(wanted.abs().max())


@each_family
def test_rows_of_a_state_are_taken_put_and_repeated(family):
    model = with_memories(family)
    with torch.no_grad():
        _, state = model(torch.tensor([[1, 2], [3, 4], [5, 6]]))
    taken = state.take([2, 0])
    assert torch.equal(taken.wkv[1][0], state.wkv[1][2])
    blank = State.zeros(model.config, 3, dtype=torch.float64)
    blank.put([1], state.take([2]))
    assert torch.equal(blank.att_x[0][1], state.att_x[0][2]) and not blank.att_x[0][0].any()
    assert torch.equal(state.repeat(2).ffn_x[0][3], state.ffn_x[0][1])


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="vocab_size"):
        build(small("rwkv7", vocab_size=None))
