"""Texts read in one native call: as the layers say it, and the same bits however it is asked for."""

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.infer.decode import decoder
from rwkvpipe.infer.packed import keep
from rwkvpipe.kernel import build as native
from rwkvpipe.model import panelled
from rwkvpipe.model.family import build
from rwkvpipe.model.language import LanguageModel

pytestmark = pytest.mark.skipif(native.extension() is None, reason="there is no native code")
WITHIN = {"fp32": 2e-5, "bf16": 2e-5, "int8": 5e-4}  # of low ranks native code rounds what they read, too
ODD = {"n_embd": 45, "head_size": 9, "dim_ffn": 77}
RANKS = {
    "rwkv7": {"d_decay": 33, "d_aaa": 7, "d_mv": 3, "d_gate": 18},
    "rwkv6": {"d_decay": 33, "d_mix": 7},
    "rwkv5": {},
}  # odd as well
SIZES = {"even": {}, "odd": ODD, "bare": {"ln0": False}, "begun": {"time_state": True}, "single": {"n_layer": 1}}
families = pytest.mark.parametrize("family", RANKS)


def made(kind="fp32", family="rwkv7", **sizes):
    sizes = {"n_layer": 3, "n_embd": 64, "head_size": 32, "vocab_size": 257} | sizes
    model, stream = build(RwkvConfig(family=family, **sizes)), torch.Generator().manual_seed(2)
    with torch.no_grad():
        if model.config.n_layer > 1:  # for a single layer there are no initial values
            model.initialise(1)
        for value in model.parameters():
            begun = value if model.config.n_layer > 1 else 0.0
            value.copy_(begun + torch.randn(value.shape, generator=stream) * 0.1)
        if not model.config.ln0:  # then embeddings are normed already
            model.emb.weight.copy_(torch.nn.functional.layer_norm(model.emb.weight, (model.config.n_embd,)))
    keep(model.eval(), kind)
    return model


def ids_of(*shape):
    return torch.randint(257, shape, generator=torch.Generator().manual_seed(5))


def begun(model, rows):
    state, stream = model.start(rows), torch.Generator().manual_seed(7)
    return state._map(lambda x: torch.randn(x.shape, generator=stream))


def parts(state):
    return [*state.att_x, *state.wkv, *state.ffn_x]


def alike(found, wanted):
    return torch.equal(found[0], wanted[0]) and all(map(torch.equal, parts(found[1]), parts(wanted[1])))


@families
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", WITHIN)
@pytest.mark.parametrize("started", [False, True])
@torch.inference_mode()
def test_it_is_what_the_layers_say(kind, family, sizes, started, monkeypatch):
    if (family, sizes) == ("rwkv5", "begun"):
        pytest.skip("RWKV-5 has no states of its own to begin with")
    ranks = RANKS[family] if sizes == "odd" else {}
    model, ids = made(kind, family, **SIZES[sizes], **ranks), ids_of(3, 40)
    state = begun(model, 3) if started else None
    wanted, after = LanguageModel.features(model, ids, state)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.blocks[0].att), "forward", None)
        found, state = model.features(ids, state)
    for a, b in zip([found, *parts(state)], [wanted, *parts(after)], strict=True):
        assert torch.allclose(a, b, atol=WITHIN[kind] * float(b.abs().max()), rtol=0)


@families
@pytest.mark.parametrize("kind", WITHIN)
@torch.inference_mode()
def test_a_row_has_the_same_bits_however_it_is_padded_and_whatever_rows_are_beside_it(kind, family):
    model, ids, lengths = made(kind, family, **ODD, **RANKS[family]), ids_of(4, 37), torch.tensor([37, 0, 20, 1])
    state = begun(model, 4)
    before = state.copy()
    found, after = model.features(ids, state, lengths)
    assert all(map(torch.equal, parts(state), parts(before)))
    for row, length in enumerate(lengths.tolist()):
        if not length:
            assert all(map(torch.equal, parts(after.take([row])), parts(state.take([row]))))
            continue
        one = model.features(ids[row : row + 1, :length], state.take([row]))
        assert alike((found[row : row + 1, :length], after.take([row])), one)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [[38, 1], [-1, 1], [1, 1, 1]])
def test_lengths_that_no_row_has_are_refused(lengths):
    with pytest.raises(ValueError, match=r"lengths: \[.*\] of 2 rows of 37 tokens"):
        made().features(ids_of(2, 37), None, torch.tensor(lengths))


@torch.inference_mode()
def test_lengths_may_be_any_integers():
    model, ids = made(), ids_of(2, 37)
    found, wanted = (
        model.features(ids, None, torch.tensor([3, 30], dtype=kind)) for kind in (torch.int32, torch.int64)
    )
    assert alike(found, wanted)


@families
@pytest.mark.parametrize("kind", WITHIN)
@torch.inference_mode()
def test_long_texts_and_many_rows_go_in_pieces(kind, family):
    model = made(kind, family, n_embd=32, vocab_size=257)
    for rows, T, cuts in ((2, 1100, (512, 1024)), (70, 20, ())):
        ids = ids_of(rows, T)
        whole, state, found = model.features(ids), None, []
        for part in ids.tensor_split(cuts, 1):
            features, state = model.features(part, state)
            found.append(features)
        assert alike((torch.cat(found, 1), state), whole)
        one = model.features(ids[-1:])
        assert alike((whole[0][-1:], whole[1].take([rows - 1])), one)


@families
@pytest.mark.parametrize("kind", WITHIN)
def test_any_number_of_threads_gives_the_same_bits(kind, family, at_any_thread_count):
    model, ids = made(kind, family, n_embd=256), ids_of(2, 70)

    @torch.inference_mode()
    def read():
        features, state = model.features(ids, None, torch.tensor([70, 41]))
        return [features[0], features[1, :41], *parts(state)]

    at_any_thread_count(read)


@families
@torch.inference_mode()
def test_ids_and_states_that_do_not_fit_are_refused(family):
    model, ids = made(family=family), ids_of(2, 5)
    with pytest.raises(IndexError):
        model.features(ids + 257)
    with pytest.raises(ValueError, match="read[67]: att_x"):
        model.features(ids, model.start(3))


@torch.inference_mode()
def test_states_may_lie_in_any_order():
    model, ids, state = made(), ids_of(3, 9), begun(made(), 3)
    turned = state._map(lambda x: x.mT.contiguous().mT)
    assert alike(model.features(ids, turned), model.features(ids, state))


@pytest.mark.parametrize("kind", WITHIN)
def test_gradients_documents_and_no_ids_are_for_the_layers(kind, monkeypatch):
    monkeypatch.setattr(panelled, "read", None)
    model, ids = made(kind), ids_of(2, 9)
    found = [model.features(ids)[0]]
    with torch.inference_mode():
        found += [model.features(ids, starts=torch.zeros(2, 9, dtype=torch.bool))[0], model.features(ids[:, :0])[0]]
        with pytest.raises(TypeError):
            model.features(ids)
    assert [x.shape for x in found] == [(2, 9, 64), (2, 9, 64), (2, 0, 64)]


@pytest.mark.skipif(native.extension() is None or not native.extension().twelve_there(), reason="no twelve bits here")
@pytest.mark.parametrize("kind, said", [("bf16", True), ("fp32", False), ("int8", False)])
def test_it_is_said_whether_matrices_lie_in_twelve_bits(kind, said, caplog, monkeypatch):
    monkeypatch.setattr(native, "_said", set())
    caplog.set_level("INFO", "rwkvpipe")
    decoder(made(kind))
    assert "writing token by token" in caplog.text
    assert ("matrices in bf16 in twelve bits a number, native" in caplog.text) == said
