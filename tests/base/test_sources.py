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


def save(folder, name, batches, **state):
    """A data set as save_to_disk leaves it: streams of Arrow, state.json, dataset_info.json."""
    import pyarrow as pa

    place, files = folder / name, []
    place.mkdir(parents=True)
    for number, texts in enumerate(batches):
        table = pa.table({"text": texts, "id": list(range(len(texts)))})
        files.append({"filename": f"data-{number:05}-of-{len(batches):05}.arrow"})
        with pa.ipc.new_stream(str(place / files[-1]["filename"]), table.schema) as sink:
            sink.write_table(table, max_chunksize=2)
    described = {"_data_files": files, "_fingerprint": "x", "_format_type": None, "_split": "train"} | state
    (place / "state.json").write_text(json.dumps(described))
    (place / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string", "_type": "Value"}}}))
    return place


def test_what_save_to_disk_leaves_is_read(tmp_path):
    from rwkvpipe.base.config import CorpusConfig
    from rwkvpipe.data.corpus import documents

    spec = CorpusConfig(path="x", tokenizer="t")
    saved = save(tmp_path, "train", [["a", "b", "c"], ["d"]])
    assert [found.text for found in documents(str(saved), spec)] == list("abcd")
    save(tmp_path, "other/test", [["e"]])
    assert [found.text for found in documents(str(tmp_path), spec)] == list("eabcd")  # as a hub's folders come
    (saved / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="data-00001-of-00002.arrow: no such file, which state.json lists"):
        files_of(saved)


def test_a_saved_choice_of_rows_and_names_that_lead_elsewhere_are_refused(tmp_path):
    chosen = save(tmp_path, "a", [["a"]], _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="its rows are a choice of those in its files"):
        files_of(chosen)
    odd = save(tmp_path, "b", [["a"]], _data_files=[{"filename": "../a/data-00000-of-00001.arrow"}])
    with pytest.raises(DataError, match="no list of data files"):
        files_of(odd)
