"""A path means the same files, in the same order, wherever it is asked."""

import json

import pytest

from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.sources import files_of, pair_files


def names(folder, path):
    return [file.removeprefix(f"{folder}/") for file in files_of(path)]


def put(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_files_folders_and_globs(tmp_path):
    put(tmp_path, "b.txt", "a.txt", "c/d.txt", ".git/e.txt", "[x].txt")
    assert names(tmp_path, tmp_path / "b.txt") == ["b.txt"]
    assert names(tmp_path, tmp_path / "[x].txt") == ["[x].txt"]
    assert names(tmp_path, tmp_path / "?.txt") == ["a.txt", "b.txt"]
    assert names(tmp_path, tmp_path) == ["[x].txt", "a.txt", "b.txt", "c/d.txt"]
    assert names(tmp_path, tmp_path / "*") == ["[x].txt", "a.txt", "b.txt", "c/d.txt"]
    assert names(tmp_path, tmp_path / "none*") == ["none*"]


def test_a_saved_data_set_is_read_in_its_own_order(tmp_path):
    put(tmp_path, "data-1.arrow", "data-0.arrow", "dataset_info.json")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": f"data-{n}.arrow"} for n in (1, 0)]}))
    assert names(tmp_path, tmp_path) == ["data-1.arrow", "data-0.arrow"]
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="no list of data files"):
        files_of(tmp_path)


def test_of_a_saved_data_set_of_parts_one_is_named(tmp_path):
    put(tmp_path, "dataset_dict.json", "train/x", "test/x")
    with pytest.raises(ConfigError, match=r"a data set of the parts test, train; name one: .*/test"):
        files_of(tmp_path)


def test_a_pair_has_a_mask_where_there_is_one(tmp_path):
    assert pair_files(tmp_path / "a.v1.bin") == [f"{tmp_path}/a.v1.bin", f"{tmp_path}/a.v1.idx"]
    put(tmp_path, "a.v1.mask")
    assert len(pair_files(tmp_path / "a.v1")) == 3
