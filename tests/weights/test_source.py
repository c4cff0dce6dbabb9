"""Every kind of checkpoint file is opened, and what is none is named in one line."""

import bz2
import gzip
import importlib
import io
import json
import lzma
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.model.family import build
from rwkvpipe.weights import store
from rwkvpipe.weights.source import open_source
from rwkvpipe.weights.tensors import write_tensors

CONFIG = RwkvConfig(n_layer=2, n_embd=64, head_size=32, vocab_size=11)


@pytest.fixture(scope="module")
def tensors():
    model = build(CONFIG)
    model.initialise(3)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def shards(folder, tensors, kind, count=3):
    """Written as transformers writes them: each file some tensors, an index beside them."""
    folder.mkdir(exist_ok=True)
    names, places = list(tensors), {}
    for number in range(count):
        stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
        file = f"{stem}-{number + 1:05}-of-{count:05}.{suffix}"
        part = {name: tensors[name] for name in names[number::count]}
        if kind == "safetensors":
            write_tensors(folder / file, part)
        else:
            torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("old", [True, False])
def test_torch_files_of_both_ages_are_read(tmp_path, tensors, dtype, old):
    whole = {name: value.to(dtype) for name, value in tensors.items()}
    for suffix in ("pth", "bin", "safetensors"):  # a suffix may lie
        path = tmp_path / f"a.{suffix}"
        torch.save(whole, path, _use_new_zipfile_serialization=not old)
        assert open_source(path).format == ("old pth" if old else "pth")
        same(store.read(path)[1], whole)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_by_their_index_or_folder(tmp_path, tensors, kind):
    index = shards(tmp_path / "m", tensors, kind)
    for given in (index, tmp_path / "m"):
        same(store.read(given)[1], tensors)
    assert open_source(index).format.endswith("in 3 shards")
    one = next(file for file in (tmp_path / "m").iterdir() if "00002" in file.name)
    with pytest.raises(WeightsError, match="one of several shards"):
        store.read(one)
    one.unlink()
    with pytest.raises(WeightsError, match=r"00002-of-00003\.\w+: is missing \(shard 2 of 3\)"):
        store.read(tmp_path / "m")


def test_every_shard_counts_for_what_a_checkpoint_is_told_by(tmp_path, tensors):
    shards(tmp_path / "a", tensors, "safetensors")
    shards(tmp_path / "b", tensors, "safetensors")
    assert store.mark(tmp_path / "a") == store.mark(tmp_path / "b")
    shards(tmp_path / "b", tensors | {"ln_out.bias": tensors["ln_out.bias"] + 1}, "safetensors")
    assert store.mark(tmp_path / "a") != store.mark(tmp_path / "b")


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": "../x.pth"}}'])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsError, match=r"index\.json") as error:
        store.read(tmp_path)
    assert "\n" not in str(error.value)


def test_an_index_that_promises_too_much_is_named(tmp_path, tensors):
    index = shards(tmp_path / "m", tensors, "safetensors")
    described = json.loads(index.read_text())
    described["weight_map"]["more.weight"] = described["weight_map"]["emb.weight"]
    index.write_text(json.dumps(described))
    with pytest.raises(WeightsError, match=r"more\.weight is missing"):
        store.read(index)


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "model"])
def test_weights_inside_a_trainer_s_own_checkpoint_are_found(tmp_path, tensors, wrapper):
    torch.save({"epoch": 3, wrapper: tensors, "optimizer": {"lr": 1}}, tmp_path / "a.ckpt")
    same(store.read(tmp_path / "a.ckpt")[1], tensors)


def test_parameters_and_turned_or_shared_storages_are_read_as_they_are(tmp_path, tensors):
    strange = dict(tensors)
    strange["head.weight"] = torch.nn.Parameter(tensors["head.weight"].T.contiguous().T)
    strange["emb.weight"] = torch.cat((tensors["emb.weight"], tensors["emb.weight"]))[11:]
    torch.save(strange, tmp_path / "a.pth")
    same(store.read(tmp_path / "a.pth")[1], tensors)


def tar(data):
    """An archive with one file."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        entry = tarfile.TarInfo("model.pth")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return whole.getvalue()


FILES = {
    "an empty file": (b"", "is empty"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "a web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    "gzip": (gzip.compress(b"weights"), "gzip"),
    "an array": (b"\x93NUMPY\x01\x00", "numpy array"),
    "rwkv.cpp": (b"fmgg\x65\x00\x00\x00", r"rwkv\.cpp"),
    "bzip2": (bz2.compress(b"weights"), "bzip2"),
    "xz": (lzma.compress(b"weights"), "with xz"),
    "a tar archive": (tar(b"weights"), "tar archive"),
    "text": (b"hello, I am no checkpoint at all", "no checkpoint: a text"),
    "zeros": (bytes(3000), "begins with zeros"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(60), "no checkpoint; give|damaged or cut short"),
    "a pickle": (pickle.dumps({"a": 1}, protocol=2), "not a checkpoint, or damaged|damaged or cut short"),
    "a newer pickle": (pickle.dumps({"a": 1}, protocol=4), r"not a checkpoint, or damaged \(nothing in it was run\)"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path, name, suffix):
    data, said = FILES[name]
    (tmp_path / f"a.{suffix}").write_bytes(data)
    with pytest.raises(WeightsError, match=said) as error:
        store.read(tmp_path / f"a.{suffix}")
    assert "\n" not in str(error.value)
    assert str(tmp_path / f"a.{suffix}") in str(error.value)


def test_zip_files_that_torch_did_not_write_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    with pytest.raises(WeightsError, match="archive of numpy arrays"):
        store.read(tmp_path / "a.npz")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text").write_text("hello")
    shutil.make_archive(str(tmp_path / "b"), "zip", tmp_path / "in")
    with pytest.raises(WeightsError, match="an ordinary zip file"):
        store.read(tmp_path / "b.zip")


def test_the_code_in_a_pickle_is_named(tmp_path):
    class Runs:
        def __reduce__(self):
            return (print, ("unpickled",))

    torch.save({"x": Runs()}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"Python objects \([\w.]*print\), which are not run"):
        store.read(tmp_path / "a.pth")


def rewritten(source, target, change, packed=zipfile.ZIP_STORED):
    """The same archive with some of its records changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", packed) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_record_that_is_too_short_is_not_filled_with_its_neighbour_s_numbers(tmp_path, tensors, suffix):
    torch.save(tensors, tmp_path / "a.pth")
    path = tmp_path / f"b.{suffix}"
    rewritten(tmp_path / "a.pth", path, lambda name, data: data[:16] if name.endswith("/data/3") else data)
    with pytest.raises(WeightsError, match=f"b.{suffix}: damaged or cut short"):
        open_source(path)


def test_what_was_packed_anew_is_never_unpacked_into_memory(tmp_path, tensors, monkeypatch):
    torch.save(tensors, tmp_path / "a.pth")
    bomb, more = tmp_path / "b.pth", bytes(30 << 20)  # behind the names, which torch reads whole
    rewritten(tmp_path / "a.pth", bomb, lambda name, data: data + more * ("data.pkl" in name), zipfile.ZIP_DEFLATED)
    with monkeypatch.context() as patch, pytest.raises(WeightsError, match=r"packed anew .*, or unpack it and use zip"):
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpacked"))
        open_source(bomb)
    rewritten(bomb, tmp_path / "c.pth", lambda _, data: data.removesuffix(more))
    same(store.read(tmp_path / "c.pth")[1], tensors)


def test_several_checkpoints_in_a_folder_are_listed(tmp_path, tensors):
    for number in range(4):
        torch.save(tensors, tmp_path / f"rwkv-{number}.pth")
    with pytest.raises(WeightsError, match=r"holds 4 checkpoints \(rwkv-0\.pth, rwkv-1\.pth, rwkv-2\.pth, \.\.\.\)"):
        store.read(tmp_path)


def test_shards_without_their_index_are_told(tmp_path, tensors):
    store.write_tensors(tmp_path / "model-00001-of-00002.safetensors", tensors)
    with pytest.raises(WeightsError, match=r"holds shards \(model-00001-of-00002\.safetensors, \.\.\.\) and no index"):
        store.read(tmp_path)


@pytest.mark.filterwarnings("error")
def test_names_that_are_numbers_and_pickles_of_another_protocol_are_told_without_a_warning(tmp_path, tensors):
    torch.save({1: torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="holds no tensors by name, but by int"):
        store.read(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"a": [1]}, protocol=4))
    with pytest.raises(WeightsError, match="not a checkpoint, or damaged"):
        store.read(tmp_path / "b.pth")


@pytest.mark.parametrize("call", [("posix", "system"), ("builtins", "eval"), ("subprocess", "Popen")])
@pytest.mark.parametrize("old", [True, False])
def test_any_code_is_named_and_not_run(tmp_path, call, old):
    found = getattr(importlib.import_module(call[0]), call[1])

    class Code:
        def __reduce__(self):
            return found, (f"touch {tmp_path}/run",)

    torch.save({"emb.weight": Code()}, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(WeightsError, match=rf"holds Python objects \((\w+\.)?{call[1]}\), which are not run"):
        store.read(tmp_path / "a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


MEASURE = """
import resource, sys
from rwkvpipe.weights import store
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{work}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_looking_at_a_file_reads_no_data_and_converting_it_one_tensor_at_a_time(tmp_path, kind):
    config = RwkvConfig(n_layer=12, n_embd=512, vocab_size=4096)
    with torch.device("meta"):
        empty = build(config).state_dict()
    whole = {name: torch.full(value.shape, 0.5) for name, value in empty.items()}
    path = tmp_path / f"a.{kind}"
    if kind == "pth":
        torch.save(whole, path)
    else:
        write_tensors(path, whole)
    kilobytes, largest = path.stat().st_size // 1024, max(value.nbytes for value in whole.values()) // 1024
    del whole
    given, out = str(path), str(tmp_path / "out" / "model.safetensors")
    look = f"store.sizes({given!r})"
    copy = f"found = store.open_model({given!r}); store.write({out!r}, found.config, found.tensors)"
    for work, most in ((look, kilobytes // 10), (copy, 3 * largest + kilobytes // 10)):
        ended = subprocess.run([sys.executable, "-c", MEASURE.format(work=work)], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert int(ended.stdout) < most, f"{int(ended.stdout)} kB more for a file of {kilobytes} kB"
    same(store.read(out)[1], store.read(path)[1])
