"""Resume points are found again, verified, and never taken from another run."""

import logging

import pytest
import torch

from rwkvpipe.train.checkpoint import clear, fingerprint, latest, prune, save


def point(step):
    return {"a": torch.full((3,), float(step)), "count": torch.tensor(step)}


def test_the_newest_comes_back_with_its_notes(tmp_path):
    save(tmp_path, 5, point(5), "m", notes={"seconds": 1.5})
    save(tmp_path, 10, point(10), "m", notes={"seconds": 3.0})
    found = latest(tmp_path, "m")
    assert (found.step, found.notes, found.tensors["count"].item()) == (10, {"seconds": 3.0}, 10)
    assert torch.equal(found.tensors["a"], point(10)["a"])


def test_an_empty_or_absent_folder_holds_none(tmp_path):
    assert latest(tmp_path, "m") is None
    assert latest(tmp_path / "absent", "m") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "card"])
def test_a_damaged_one_is_said_and_the_one_before_is_taken(tmp_path, caplog, damage):
    save(tmp_path, 5, point(5), "m")
    save(tmp_path, 10, point(10), "m")
    data = tmp_path / "step-000000010.safetensors"
    raw = bytearray(data.read_bytes())
    if damage == "flip":
        raw[-1] ^= 1
        data.write_bytes(raw)
    elif damage == "cut":
        data.write_bytes(raw[: len(raw) // 2])
    elif damage == "gone":
        data.unlink()
    else:
        data.with_suffix(".json").write_text('{"step": 10')
    with caplog.at_level(logging.INFO, logger="rwkvpipe"):
        assert latest(tmp_path, "m").step == 5
    assert "step-000000010" in caplog.text


def test_points_of_another_mark_are_removed_and_said(tmp_path, caplog):
    save(tmp_path, 5, point(5), "old")
    with caplog.at_level(logging.INFO, logger="rwkvpipe"):
        assert latest(tmp_path, "new") is None
    assert "starts again" in caplog.text
    assert not list(tmp_path.glob("step-*"))


def test_two_are_kept_and_data_without_a_card_goes(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, point(step), "m")
    (tmp_path / "step-000000004.safetensors").write_bytes(b"half")
    (tmp_path / ".step-000000005.safetensors.abc").write_bytes(b"killed")
    prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-00000000{n}.{kind}" for n in (2, 3) for kind in ("json", "safetensors")
    ]
    clear(tmp_path)
    assert not tmp_path.exists()


def test_a_fingerprint_moves_with_every_part():
    assert fingerprint({"a": 1, "b": 2}, "x") == fingerprint({"b": 2, "a": 1}, "x")
    assert len({fingerprint(1, 2), fingerprint(12), fingerprint("1", 2), fingerprint([1], 2)}) == 4
