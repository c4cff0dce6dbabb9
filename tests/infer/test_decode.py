"""The native step of a whole model against its forward."""

import numpy as np
import pytest
import torch

from rwkvpipe.base.config import LoraConfig, RwkvConfig
from rwkvpipe.infer.decode import Decoder, decoder
from rwkvpipe.kernel import build
from rwkvpipe.kernel.panels import KINDS, pack, unpack
from rwkvpipe.model.family import build as model_of
from rwkvpipe.model.family import detect
from rwkvpipe.model.layers import State
from rwkvpipe.weights.lora import inject

pytestmark = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")
ODD = {"d_decay": 33, "d_aaa": 5, "d_mv": 17, "d_gate": 40, "dim_ffn": 70}
OLD = {
    "rwkv5": {"family": "rwkv5", "dim_ffn": 70},
    "rwkv6": {"family": "rwkv6", "d_mix": 5, "d_decay": 33, "dim_ffn": 21},
}
WIDE = {"n_embd": 128, "head_size": 64, "vocab_size": 300}


def made(seed=0, **sizes):
    """A model with weights of which none is 0."""
    sizes = {"n_layer": 3, "n_embd": 40, "head_size": 20, "vocab_size": 53} | sizes
    model = model_of(RwkvConfig(**sizes))
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            drawn = torch.randn(tensor.shape, generator=stream)
            tensor.copy_(drawn * (tensor.shape[-1] ** -0.5 if tensor.squeeze().dim() > 1 else 0.3) + ("ln" in name))
    return model.eval()


def apart(state: State) -> State:
    return state.repeat(1)


def reference(model, ids):
    """Logits after each token of rows (B, T), and the last state, by the model's forward, a token at a time."""
    state, found = model.start(len(ids)), []
    with torch.inference_mode():
        for t in range(ids.shape[1]):
            logits, state = model(ids[:, t : t + 1], state)
            found.append(logits[:, -1])
    return torch.stack(found, 1), state


def native(model, ids, kind=None):
    step, state, found = Decoder(model, kind), apart(model.start(len(ids))), []
    for t in range(ids.shape[1]):
        found.append(step.step(ids[:, t], state))
    return torch.stack(found, 1), state


def drawn(rows, tokens, seed=1, vocabulary=53):
    return torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "sizes",
    [{}, ODD, {**WIDE, **ODD}, {"ln0": False}, *OLD.values(), *({**WIDE, "family": name} for name in OLD)],
    ids=["rwkv7", "odd", "wide", "no ln0", *OLD, *(f"wide {name}" for name in OLD)],
)
@pytest.mark.parametrize("rows", [1, 2, 7, 15])
@pytest.mark.parametrize("kind", [None, "fp32"])
def test_logits_and_states_are_those_of_the_models_forward(sizes, rows, kind):
    model = made(**sizes)
    ids = drawn(rows, 12)
    (found, state), (wanted, after) = native(model, ids, kind), reference(model, ids)
    assert float((found - wanted).abs().max()) < 2e-5 * max(1.0, float(wanted.abs().max()))
    for mine, its in ((state.att_x, after.att_x), (state.wkv, after.wkv), (state.ffn_x, after.ffn_x)):
        for one, other in zip(mine, its, strict=True):
            assert float((one - other).abs().max()) < 2e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("sizes", [ODD, *OLD.values()], ids=["rwkv7", *OLD])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_row_has_the_same_bits_whatever_rows_and_threads_there_are(kind, sizes):
    model, ids, threads = made(**sizes), drawn(27, 3), torch.get_num_threads()
    alone = torch.cat([native(model, ids[n : n + 1], kind)[0] for n in range(27)])
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(native(model, ids, kind)[0], alone)
            assert torch.equal(native(model, ids[:6], kind)[0], alone[:6])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", [None, "fp32", "int8"])
def test_a_large_matrix_has_the_same_bits_however_many_threads_share_it(kind):
    model, ids, threads, found = made(n_layer=1, vocab_size=9000, n_embd=80), drawn(2, 1), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(native(model, ids, kind)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("sizes", [ODD, *OLD.values()], ids=["rwkv7", *OLD])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_fewer_bits_are_those_of_the_rounded_matrices(kind, sizes):
    model, ids = made(**sizes), drawn(5, 6)
    found = native(model, ids, kind)[0]
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            end = name.rpartition(".")[2]
            low = end in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2", "time_decay_w1", "time_decay_w2")
            if low or (tensor.dim() == 2 and end == "weight" and name != "emb.weight"):
                rounded = unpack(pack(tensor.mT if low else tensor, kind))
                tensor.copy_(rounded.mT if low else rounded)
    wanted = reference(model, ids)[0]
    within = 5e-4 if kind == "int8" else 2e-5  # with int8 what matrices read is rounded, too
    assert float((found - wanted).abs().max()) < within * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("sizes", [{}, *OLD.values()], ids=["rwkv7", *OLD])
def test_adapters_are_in_it(sizes):
    model, ids = made(**sizes), drawn(2, 5)
    inject(model, LoraConfig(rank=4))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    model.eval()
    found, wanted = native(model, ids)[0], reference(model, ids)[0]
    assert float((found - wanted).abs().max()) < 2e-5 * max(1.0, float(wanted.abs().max()))


def test_what_it_cannot_compute_is_left_to_the_model():
    assert decoder(made().train()) is None
    assert decoder(made().double()) is None
    assert all(decoder(made(**sizes)) is not None for sizes in ({}, *OLD.values()))


def test_a_tuned_initial_state_is_begun_with():
    model, ids = made(**OLD["rwkv6"], time_state=True), drawn(2, 4)
    (found, _), (wanted, _) = native(model, ids), reference(model, ids)
    assert float((found - wanted).abs().max()) < 2e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_logits_and_states_are_the_reference_numbers(goldens, version):
    golden = np.load(goldens / "rwkv" / f"model_{version}_b.npz")
    tensors = {name[2:]: torch.tensor(golden[name]) for name in golden.files if name.startswith("w/")}
    model, ids = model_of(detect(tensors)).eval(), torch.tensor(golden["train_x"])
    model.load_state_dict({name: tensors[name].reshape(x.shape).float() for name, x in model.state_dict().items()})

    def memory(name):
        values = torch.tensor(golden[name]).double()
        return values.mT if name.endswith("wkv") and version != "x070" else values

    state, layers = model.start(len(ids)), range(model.config.n_layer)
    for layer in layers:
        for part in ("att_x", "wkv", "ffn_x"):
            getattr(state, part)[layer] = memory(f"state0/{layer}/{part}").float().contiguous()
    step = Decoder(model)
    found = torch.stack([step.step(ids[:, t], state) for t in range(ids.shape[1])], 1)
    assert float((found - torch.tensor(golden["logits"])).abs().max()) < 5e-5
    for layer in layers:
        for part in ("att_x", "wkv", "ffn_x"):
            wanted = memory(f"stateT/{layer}/{part}")
            assert float((getattr(state, part)[layer] - wanted).abs().max()) < 1e-5 * max(1, float(wanted.abs().max()))


def test_an_id_that_the_model_lacks_is_refused():
    model = made()
    with pytest.raises(IndexError, match="does not have"):
        Decoder(model).step(torch.tensor([53]), apart(model.start(1)))
