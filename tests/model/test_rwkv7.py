"""RWKV-7 against reference numbers: outputs, states, gradients, initial values; and against itself in pieces."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.model.family import build, detect
from rwkvpipe.model.layers import State
from rwkvpipe.weights import store

PARTS = ("att_x", "wkv", "ffn_x")
SMALL = RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=19)


def golden_model(golden, prefix="w/", dtype=torch.float64):
    """The model whose weights lie in a file of reference numbers."""
    tensors = {name[len(prefix) :]: torch.tensor(golden[name]) for name in golden.files if name.startswith(prefix)}
    model = build(detect(tensors)).to(dtype)
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    model.load_state_dict({name: tensors[name].reshape(shape).to(dtype) for name, shape in shapes.items()})
    return model


def random_model(config=SMALL, seed=0):
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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-5), (torch.float64, 1e-9)])
def test_logits_and_states_are_the_reference_numbers(goldens, dtype, tolerance):
    golden = np.load(goldens / "rwkv" / "model_x070_a.npz")
    model = golden_model(golden, dtype=dtype)
    logits, state = model(torch.tensor(golden["tokens"])[None])
    assert difference(logits[0], golden["logits"]) < tolerance
    for layer in range(model.config.n_layer):
        for part in PARTS:
            wanted = golden[f"state/{layer}/{part}"]
            assert difference(getattr(state, part)[layer][0], wanted) < 1e-5 * max(1, abs(wanted).max())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_loss_and_gradients_from_an_empty_state_are_the_reference_numbers(goldens, dtype, tolerance):
    golden = np.load(goldens / "rwkv" / "model_x070_a.npz")
    model = golden_model(golden, dtype=dtype)
    loss = cross_entropy(model(torch.tensor(golden["train_x"]))[0], golden["train_y"])
    loss.backward()
    assert difference(loss, golden["loss"]) < 1e-5
    for name, parameter in model.named_parameters():
        wanted = golden[f"grad/{name}"].reshape(parameter.shape)
        assert difference(parameter.grad, wanted) < tolerance * abs(wanted).max(), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-8)])
def test_gradients_reach_the_state_that_a_row_starts_from(goldens, dtype, tolerance):
    golden = np.load(goldens / "rwkv" / "model_x070_b.npz")
    model = golden_model(golden, dtype=dtype)
    state = State.zeros(model.config, len(golden["train_x"]), dtype=dtype)
    for layer in range(model.config.n_layer):
        for part in PARTS:
            given = torch.tensor(golden[f"state0/{layer}/{part}"]).to(dtype)
            getattr(state, part)[layer] = given.requires_grad_()
    logits, after = model(torch.tensor(golden["train_x"]), state)
    assert difference(logits, golden["logits"]) < max(tolerance, 5e-5 if dtype == torch.float32 else 0)
    cross_entropy(logits, golden["train_y"]).backward()
    for name, parameter in model.named_parameters():
        wanted = golden[f"grad/{name}"].reshape(parameter.shape)
        assert difference(parameter.grad, wanted) < tolerance * abs(wanted).max(), name
    for layer in range(model.config.n_layer):
        for part in PARTS:
            wanted = golden[f"grad_state0/{layer}/{part}"]
            assert difference(getattr(state, part)[layer].grad, wanted) < tolerance * abs(wanted).max()
            last = golden[f"stateT/{layer}/{part}"]
            assert difference(getattr(after, part)[layer], last) < 1e-5 * max(1, abs(last).max())


def test_logits_of_the_tuning_reference_model(goldens):
    weights, golden = (np.load(goldens / "tune" / f"{name}.npz") for name in ("tiny_rwkv7", "model_forward"))
    plain = {name: weights[name] for name in weights.files if not name.startswith("__")}
    tensors = {name: torch.tensor(x) for name, x in plain.items()}
    model = build(detect(tensors))
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    model.load_state_dict({name: tensors[name].reshape(shape) for name, shape in shapes.items()})
    ids = torch.tensor(golden["ids"])
    logits, state = model(ids)
    assert difference(logits[:, 0], golden["logits_first"]) < 2e-5
    assert difference(logits[:, -1], golden["logits_last"]) < 2e-5
    logprobs = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert difference(logprobs, golden["logp_next"]) < 2e-5
    assert difference(state.wkv[0], golden["state_wkv_l0"]) < 2e-5
    assert difference(state.att_x[0], golden["state_shift_att_l0"]) < 2e-5


def test_a_real_checkpoint_gives_the_published_logits(shared_data):
    golden = np.load(shared_data / "tiny-rwkv7" / "tiny-x070.npz")
    model = store.load_model(shared_data / "tiny-rwkv7" / "tiny-x070.pth")
    with torch.no_grad():
        logits, _ = model(torch.tensor(golden["tokens"].astype("int64"))[None])
    assert difference(logits[0], golden["logits"]) < 2e-5


def test_initial_values_are_the_references(goldens):
    golden = np.load(goldens / "rwkv" / "init_x070.npz")
    for tag in sorted({name.split("/")[0] for name in golden.files} - {"meta"}):
        L, D, N, V = (int(part[1:]) for part in tag.split("_"))
        model = build(RwkvConfig(n_layer=L, n_embd=D, head_size=N, vocab_size=V))
        model.initialise(1)
        for name, parameter in model.state_dict().items():
            if f"{tag}/shape/{name}" in golden.files:
                assert tuple(golden[f"{tag}/shape/{name}"]) == tuple(parameter.shape), name
            if f"{tag}/{name}" in golden.files:
                wanted = torch.tensor(golden[f"{tag}/{name}"]).flatten()
                assert difference(parameter.flatten(), wanted) < 2e-6, name


def test_random_initial_values_have_the_references_singular_values():
    model = build(RwkvConfig(n_layer=2, n_embd=64, head_size=32, vocab_size=256))
    model.initialise(3)
    gains = {
        "head.weight": 0.5 * 2.0,
        "blocks.0.att.receptance.weight": 1.0,
        "blocks.1.att.key.weight": 0.1,
        "blocks.1.att.value.weight": 1.0,
        "blocks.0.ffn.key.weight": 1.0,
        "blocks.1.att.w2": 0.1,
    }
    tensors = model.state_dict()
    for name, gain in gains.items():
        found = torch.linalg.svdvals(tensors[name])
        assert difference(found, torch.full_like(found, gain)) < 1e-5, name
    assert 0.9e-4 < tensors["emb.weight"].abs().max() <= 1e-4
    assert not tensors["blocks.0.att.output.weight"].any()


def test_the_seed_decides_the_initial_values():
    first, same, other = (build(SMALL) for _ in range(3))
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        model.initialise(seed)
    assert torch.equal(first.head.weight, same.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_one_layer_has_no_initial_values():
    with pytest.raises(ConfigError, match="n_layer"):
        build(SMALL.model_copy(update={"n_layer": 1})).initialise(0)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 131])
def test_whole_in_pieces_and_token_by_token_are_the_same(T):
    model = random_model()
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


def test_padded_rows_are_what_they_are_alone():
    model = random_model()
    rows = [torch.arange(n) % 19 for n in (5, 23, 1, 17)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad():
        logits, state = model(ids, lengths=torch.tensor([len(row) for row in rows]))
        for place, row in enumerate(rows):
            alone, last = model(row[None])
            assert difference(logits[place, : len(row)], alone[0]) < 1e-9
            for part in PARTS:
                assert difference(getattr(state, part)[1][place], getattr(last, part)[1][0]) < 1e-9


def test_a_row_of_length_nought_keeps_its_state():
    model = random_model()
    with torch.no_grad():
        _, before = model(torch.tensor([[1, 2], [3, 4]]))
        _, after = model(torch.tensor([[5, 6], [7, 8]]), before, torch.tensor([0, 2]))
    for part in PARTS:
        assert torch.equal(getattr(after, part)[0][0], getattr(before, part)[0][0])


def test_rows_of_a_state_are_taken_put_and_repeated():
    model = random_model()
    with torch.no_grad():
        _, state = model(torch.tensor([[1, 2], [3, 4], [5, 6]]))
    taken = state.take([2, 0])
    assert torch.equal(taken.wkv[1][0], state.wkv[1][2])
    blank = State.zeros(SMALL, 3, dtype=torch.float64)
    blank.put([1], state.take([2]))
    assert torch.equal(blank.att_x[0][1], state.att_x[0][2]) and not blank.att_x[0][0].any()
    assert torch.equal(state.repeat(2).ffn_x[0][3], state.ffn_x[0][1])


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="vocab_size"):
        build(SMALL.model_copy(update={"vocab_size": None}))
