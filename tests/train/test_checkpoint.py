"""Resume points are found again, verified, and never taken from another run."""

import json
import logging

import pytest
import torch

from rwkvpipe.base.files import write_json
from rwkvpipe.train import checkpoint
from rwkvpipe.train.checkpoint import clear, fingerprint, latest, prune, write_part


def point(step):
    return {"a": torch.full((3,), float(step)), "count": torch.tensor(step)}


def save(folder, step, tensors, mark, notes=None):
    checkpoint.save(folder, step, [write_part(folder, step, tensors)], mark, notes=notes)


def save_cut(folder, step, count=2):
    """A point of several processes, each of which has some rows of `rows` and the first one `count`, too."""
    rows, parts = torch.arange(10.0).view(5, 2) + step, []
    for index, own in enumerate(rows.split(-(-5 // count))):
        tensors = {"rows": own} | ({"count": torch.tensor(step)} if index == 0 else {})
        end = f".part-{index + 1}-of-{count}"
        parts.append(write_part(folder, step, tensors, cut={"rows": 5}, end=end))
    checkpoint.save(folder, step, parts, "m", notes={"step": step})
    return rows


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_are_put_together_again(tmp_path, count):
    rows = save_cut(tmp_path, 5, count)
    found = latest(tmp_path, "m")
    assert torch.equal(found.tensors["rows"], rows) and found.tensors["count"].item() == 5
    assert found.tensors.like["rows"].shape == (5, 2)


@pytest.mark.parametrize("damage", ["flip", "gone", "empty"])
def test_a_point_with_one_damaged_part_is_none_and_all_of_it_goes(tmp_path, caplog, damage):
    save_cut(tmp_path, 5)
    save_cut(tmp_path, 10)
    data = tmp_path / "step-000000010.part-2-of-2.safetensors"
    raw = bytearray(data.read_bytes())
    raw[-1] ^= 1
    if damage == "gone":
        data.unlink()
    else:
        data.write_bytes(raw if damage == "flip" else b"")
    with caplog.at_level(logging.INFO, logger="rwkvpipe"):
        assert latest(tmp_path, "m").step == 5
    assert "step-000000010.part-2-of-2.safetensors" in caplog.text and "going back to the one before" in caplog.text
    assert not list(tmp_path.glob("step-000000010*"))


def test_parts_without_their_card_and_those_that_are_old_go(tmp_path):
    for step in (1, 2, 3):
        save_cut(tmp_path, step)
    write_part(tmp_path, 4, point(4), cut={}, end=".part-1-of-2")
    prune(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        f"step-00000000{n}.{kind}"
        for n in (2, 3)
        for kind in ("json", "part-1-of-2.safetensors", "part-2-of-2.safetensors")
    ]


def test_a_point_of_an_older_form_is_read(tmp_path):
    save(tmp_path, 5, point(5), "m")
    card = json.loads((tmp_path / "step-000000005.json").read_text())
    del card["check"]
    card["sha256"] = card.pop("parts")[0]["sha256"]
    write_json(tmp_path / "step-000000005.json", card | {"check": fingerprint(card)})
    assert latest(tmp_path, "m").tensors["count"].item() == 5


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
