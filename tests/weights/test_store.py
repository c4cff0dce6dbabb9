"""Weights come back bit for bit, in any naming, and what is not whole is refused in one line."""

import errno
import json
import pickle

import numpy as np
import pytest
import torch

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.model.family import build
from rwkvpipe.weights import store
from rwkvpipe.weights import tensors as tensors_on_disk

CONFIG = RwkvConfig(n_layer=2, n_embd=64, head_size=32, vocab_size=11)
DEAD = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")


@pytest.fixture(scope="module")
def tensors():
    model = build(CONFIG)
    model.initialise(3)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_keeps_every_bit_and_the_sizes(tmp_path, tensors, dtype):
    whole = {name: value.to(dtype) for name, value in tensors.items()}
    config, _ = store.read(saved(tmp_path / "a.pth", whole))
    path = tmp_path / "m" / "model.safetensors"
    store.write(path, config, whole)
    again, found = store.read(path)
    same(found, whole)
    assert again == config
    assert json.loads(path.with_name("config.json").read_text())["n_embd"] == 64
    same(store.read(path.parent)[1], whole)


def saved(path, tensors):
    torch.save(tensors, path)
    return path


@pytest.mark.parametrize("prefix", ["model.", "_forward_module.", "_forward_module.model."])
def test_prefixes_of_other_trainers_go(tmp_path, tensors, prefix):
    path = saved(tmp_path / "a.pth", {prefix + name: value for name, value in tensors.items()})
    same(store.read(path)[1], tensors)


def test_a_prefix_in_the_middle_is_part_of_the_name(tmp_path, tensors):
    path = saved(tmp_path / "a.pth", tensors | {"blocks.0.model.emb.weight": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"blocks\.0\.model\.emb\.weight is unknown"):
        store.read(path)


def test_squeezed_shapes_are_put_right(tmp_path, tensors):
    path = saved(tmp_path / "a.pth", {n: v.squeeze() if v.dim() == 3 else v for n, v in tensors.items()})
    same(store.read(path)[1], tensors)


def test_a_flat_bonus_is_cut_into_heads_of_the_size_beside_it(tmp_path, tensors):
    path = saved(tmp_path / "a.pth", {n: v.flatten() if n.endswith("r_k") else v for n, v in tensors.items()})
    assert store.read(path)[0].head_size == 64  # nothing says otherwise
    (tmp_path / "config.json").write_text('{"head_size": 32, "foreign": [1]}')
    same(store.read(path)[1], tensors)


def test_a_folded_embedding_gives_the_same_logits(tmp_path, tensors):
    whole = build(CONFIG)
    whole.load_state_dict(tensors)
    ids = torch.arange(11)[None]
    folded = {name: value for name, value in tensors.items() if "ln0" not in name}
    with torch.no_grad():
        folded["emb.weight"] = whole.blocks[0].ln0(tensors["emb.weight"])
        model = store.load_model(saved(tmp_path / "a.pth", folded))
        assert torch.equal(model(ids)[0], whole(ids)[0])
    assert not model.config.ln0
    store.write(tmp_path / "model.safetensors", model.config, model.state_dict())
    same(store.read(tmp_path / "model.safetensors")[1], folded)


def test_half_an_embedding_norm_is_refused(tmp_path, tensors):
    half = {name: value for name, value in tensors.items() if name != "blocks.0.ln0.bias"}
    with pytest.raises(WeightsError, match=r"blocks\.0\.ln0\.bias is missing"):
        store.read(saved(tmp_path / "a.pth", half))


def test_the_dead_tensors_of_layer_0_may_be_there_or_not(tmp_path, tensors):
    without = {name: value for name, value in tensors.items() if name not in DEAD}
    rank = tensors["blocks.1.att.v1"].shape[1]
    dead = (torch.ones(1, 1, 64), torch.ones(64, rank), torch.ones(rank, 64))
    with_them = without | dict(zip(DEAD, dead, strict=True))
    for kind in (without, with_them):
        found = store.read(saved(tmp_path / "a.pth", kind))[1]
        assert found.keys() == tensors.keys()
        build(CONFIG).load_state_dict(found)
    store.write_tensors(tmp_path / "b.safetensors", store.open_model(tmp_path / "a.pth").tensors)
    same(dict(store.open_model(tmp_path / "b.safetensors").tensors), with_them)


def test_a_missing_and_a_left_over_tensor_are_named(tmp_path, tensors):
    less = {name: value for name, value in tensors.items() if name != "blocks.1.att.key.weight"}
    with pytest.raises(WeightsError, match=r"a\.pth: blocks\.1\.att\.key\.weight is missing"):
        store.read(saved(tmp_path / "a.pth", less))
    for name in ("ffn.extra", "blocks.0.att.key.base_layer.weight"):
        with pytest.raises(WeightsError, match=f"{name} is unknown"):
            store.read(saved(tmp_path / "a.pth", tensors | {name: torch.ones(2)}))


def test_a_tensor_of_another_size_is_named(tmp_path, tensors):
    with pytest.raises(WeightsError, match=r"blocks\.1\.ffn\.key\.weight is \(8, 64\)"):
        store.read(saved(tmp_path / "a.pth", tensors | {"blocks.1.ffn.key.weight": torch.ones(8, 64)}))


class Runs:
    """Something whose unpickling would call a function."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, tensors, capsys):
    path = saved(tmp_path / "a.pth", {"emb.weight": tensors["emb.weight"], "x": Runs()})
    with pytest.raises(WeightsError, match="Python objects") as error:
        store.read(path)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(WeightsError):
        store.read(tmp_path / "b.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_cut_short_is_refused_in_one_line(tmp_path, tensors, kind, share):
    path = tmp_path / f"a.{kind}"
    if kind == "pth":
        torch.save(tensors, path)
    else:
        store.write_tensors(path, tensors)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(WeightsError, match=f"a.{kind}: ") as error:
        store.read(path)
    assert "\n" not in str(error.value)


NOT_FLAT = [{}, {"state": {"emb.weight": torch.ones(1)}}, [torch.ones(1)], {"step": 3}, {1: torch.ones(1)}]


@pytest.mark.parametrize("content", NOT_FLAT)
def test_what_holds_no_flat_tensors_is_refused(tmp_path, content):
    with pytest.raises(WeightsError, match=r"a\.pth"):
        store.read(saved(tmp_path / "a.pth", content))


def test_what_is_no_rwkv_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"a\.pth"):
        store.read(saved(tmp_path / "a.pth", {"layer.weight": torch.ones(3, 3)}))


def test_an_absent_file_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        store.read(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="holds 0 checkpoints"):
        store.read(tmp_path)


def test_equal_weights_are_equal_files(tmp_path, tensors):
    written = set()
    for number in range(8):
        store.write_tensors(tmp_path / f"{number}", tensors, {"a": '"1"', "b": "\u00e9", "c": "3", "d": "4"})
        written.add((tmp_path / f"{number}").read_bytes())
    assert len(written) == 1
    assert store.read_tensors(tmp_path / "0")[1] == {"a": '"1"', "b": "\u00e9", "c": "3", "d": "4", "format": "pt"}


def test_a_failed_write_leaves_the_old_file(tmp_path, tensors, monkeypatch):
    path = tmp_path / "model.safetensors"
    store.write(path, CONFIG, tensors)
    before = path.read_bytes()

    def fails(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match=r"No space left.*model\.safetensors"):
        store.write(path, CONFIG, tensors)
    with pytest.raises(WeightsError, match="complex"):
        store.write(path, CONFIG, tensors | {"more": torch.zeros(2, dtype=torch.complex64)})
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_sizes_and_dtypes_are_told_without_data(tmp_path, tensors):
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pth"):
        whole = {name: value.bfloat16() for name, value in tensors.items()}
        if path.suffix == ".pth":
            torch.save(whole, path)
        else:
            store.write_tensors(path, whole)
        found, _ = store.describe(path)
        assert {value.dtype for value in found.values()} == {torch.bfloat16}
        assert all(value.is_meta for value in found.values())
        assert store.sizes(path) == store.read(path)[0]


def test_a_loaded_model_computes_in_fp32(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    store.write_tensors(path, {name: value.bfloat16() for name, value in tensors.items()})
    model = store.load_model(path)
    assert not model.training
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, tensors["head.weight"].bfloat16().float())


def test_a_model_is_read_once_and_draws_no_numbers(tmp_path, tensors, monkeypatch):
    path = saved(tmp_path / "a.safetensors", tensors)
    read, random = [], torch.get_rng_state()
    piece_of = tensors_on_disk.piece_of
    monkeypatch.setattr(tensors_on_disk, "piece_of", lambda *given: read.append(given[1]) or piece_of(*given))
    model = store.load_model(path)
    assert len(read) == len(set(read)) and torch.equal(torch.get_rng_state(), random)
    pointers = [value.data_ptr() for value in model.state_dict().values()]
    assert not any(place % 64 for place in pointers) and len(set(pointers)) == len(pointers)
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("size", [3e38, torch.inf, -torch.inf, torch.nan])
def test_only_what_is_no_number_is_refused(tmp_path, tensors, size):
    tensors["emb.weight"][3:5, :2] = size  # the sum of the largest numbers is none
    path = saved(tmp_path / "a.safetensors", tensors)
    if size == 3e38:
        assert store.load_model(path).emb.weight[3, 0] == size
        return
    with pytest.raises(WeightsError, match="emb.weight holds NaN or infinity"):
        store.load_model(path)


def test_a_trained_checkpoint_gives_the_given_logits(shared_data):
    folder = shared_data / "tiny-rwkv7"
    if not folder.is_dir():
        pytest.skip("tiny-rwkv7 is not here")
    model = store.load_model(folder / "tiny-x070.pth")
    data = np.load(folder / "tiny-x070.npz", allow_pickle=False)
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(data["tokens"])[None])
    np.testing.assert_allclose(logits[0], data["logits"], atol=2e-5)


@pytest.mark.parametrize("size", ["0", "-4", "1e400"])
def test_a_head_size_that_none_has_is_named(tmp_path, tensors, size):
    flat = {name: value.reshape(-1) if name.endswith("r_k") else value for name, value in tensors.items()}
    store.write_tensors(tmp_path / "m.safetensors", flat, {"config": f'{{"head_size": {size}}}'})
    with pytest.raises(WeightsError, match="head_size"):
        store.read(tmp_path / "m.safetensors")


def test_whole_numbers_are_no_weights(tmp_path, tensors):
    store.write_tensors(tmp_path / "m.safetensors", tensors | {"emb.weight": tensors["emb.weight"].long()})
    with pytest.raises(WeightsError, match=r"emb\.weight has numbers of int64"):
        store.read(tmp_path / "m.safetensors")
