"""Files for torch written tensor by tensor: torch reads them as its own, bit for bit."""

import zipfile

import pytest
import torch

from rwkvpipe.base.errors import WeightsError
from rwkvpipe.weights import pth
from rwkvpipe.weights.pth import write_pth
from rwkvpipe.weights.tensors import held

TENSORS = {
    "a.weight": torch.arange(35.0).reshape(5, 7),
    "b": torch.tensor([[[1.5, float("nan"), -0.0]]], dtype=torch.bfloat16),
    "c": torch.tensor([1e-7, 65504.0], dtype=torch.float16),
    "d": torch.tensor(7),
    "e": torch.zeros(0, 3),
    "f": torch.tensor([True, False]),
    "g": torch.arange(3, dtype=torch.float64),
}


def same(found, wanted):
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_what_was_written(tmp_path, mapped):
    write_pth(tmp_path / "a.pth", held(TENSORS))
    found = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mapped)
    same(found, TENSORS)
    assert {value.data_ptr() % 64 for value in found.values() if mapped and value.numel()} <= {0}


def test_any_program_can_check_and_unpack_it(tmp_path, monkeypatch):
    for large in (pth.LARGE, 16):
        monkeypatch.setattr(pth, "LARGE", large)
        write_pth(tmp_path / "a.pth", held(TENSORS))
        with zipfile.ZipFile(tmp_path / "a.pth") as file:
            assert file.testzip() is None
            assert {entry.compress_type for entry in file.infolist()} == {zipfile.ZIP_STORED}
        same(torch.load(tmp_path / "a.pth", weights_only=True), TENSORS)


def test_equal_tensors_are_equal_files(tmp_path):
    for name in ("a.pth", "b.pth"):
        write_pth(tmp_path / name, held(TENSORS))
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_what_has_no_place_in_such_a_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"a\.pth: x has numbers of torch.float8_e4m3fn"):
        write_pth(tmp_path / "a.pth", held({"x": torch.zeros(2, dtype=torch.float8_e4m3fn)}))
    assert not list(tmp_path.iterdir())
