"""Tables of every kind give the same rows, told by what is in them, whole or unit by unit."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpipe.base import pace
from rwkvpipe.base.errors import DataError
from rwkvpipe.data import items, lines, table
from rwkvpipe.data.kind import kind_of
from rwkvpipe.data.table import raw_rows, row_of, table_units
from rwkvpipe.data.unit import Unit

ROWS = [{"text": f"döc {n}" * (n % 7), "n": n, "deep": {"list": [n, 1]}} for n in range(50)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
NEEDED = {"text"}


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def arrow(path, stream):
    content = pa.Table.from_pylist(ROWS)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), content.schema) as sink:
        sink.write_table(content, max_chunksize=7)


MAKE = {
    "lines": lambda path: path.write_bytes(LINES),
    "gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "zst": lambda path: path.write_bytes(zstd(LINES) + zstd(b'{"text": "more"}')),
    "list": lambda path: path.write_text(json.dumps(ROWS)),
    "tall list": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7),
    "arrow": lambda path: arrow(path, False),
    "stream": lambda path: arrow(path, True),
}
SUFFIX = {"lines": "jsonl", "gz": "jsonl.gz", "zst": "jsonl.zst", "list": "json", "tall list": "json"}


def read(path, needed=NEEDED):
    units = table_units(str(path), *kind_of(path), needed)
    return [(str(place), row_of(raw, place)) for unit in units for place, raw in raw_rows(unit, needed)]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("right", [True, False], ids=["right name", "wrong name"])
def test_each_kind_is_told_by_its_content(tmp_path, name, right, monkeypatch):
    monkeypatch.setattr(table, "UNIT", 200)
    monkeypatch.setattr(table, "BATCH", 100)
    monkeypatch.setattr(items, "READ", 64)
    monkeypatch.setattr(lines, "BLOCK", 64)
    path = tmp_path / f"rows.{SUFFIX.get(name, name) if right else 'dat'}"
    MAKE[name](path)
    found = [row["text"] for _, row in read(path)]
    assert found == [row["text"] for row in ROWS] + (["more"] if name == "zst" else [])


@pytest.mark.parametrize("name", ["lines", "parquet", "arrow"])
def test_units_know_their_lines_and_rows(tmp_path, name, monkeypatch):
    monkeypatch.setattr(table, "UNIT", 150)
    path = tmp_path / "rows"
    MAKE[name](path)
    assert len(table_units(str(path), *kind_of(path), NEEDED)) > 3
    word = ":" if name == "lines" else ": row "
    assert [where for where, _ in read(path)] == [f"{path}{word}{n}" for n in range(1, 51)]


def test_only_needed_columns_are_read(tmp_path):
    for name in ("parquet", "arrow", "stream"):
        MAKE[name](tmp_path / name)
        assert set(read(tmp_path / name)[0][1]) == {"text"}
        assert set(read(tmp_path / name, {"n", "deep", "x"})[0][1]) == {"n", "deep"}
        with pytest.raises(DataError, match=rf"{name}: none of the columns body; it has text, n, deep"):
            read(tmp_path / name, {"body"})


LINE = st.sampled_from([b"", b" ", b"{}", b'{"a": 1}', b'{"a": "' + b"x" * 40 + b'"}', b"\r"])


@settings(max_examples=150, deadline=None)
@given(st.lists(LINE), st.integers(1, 50), st.sampled_from([b"", b"\n", b"\xef\xbb\xbf"]), st.integers(4, 20))
def test_every_line_lies_in_one_unit_wherever_files_are_cut(tmp_path_factory, found, unit, start, chunk):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes(start + b"\n".join(found))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "UNIT", 1 << 30)
        whole = read(path)
        patch.setattr(table, "UNIT", unit)
        patch.setattr(lines, "READ", chunk)
        patch.setattr(lines, "BLOCK", chunk)
        assert read(path) == whole


def two(kind, path):
    content = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1])], names=["text", "text", "n"])
    if kind == "parquet":
        pq.write_table(content, path)
    else:
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(str(path), content.schema) as sink:
            sink.write_table(content)


@pytest.mark.parametrize("name", ["parquet", "arrow", "stream"])
def test_two_columns_of_one_name_are_refused_where_that_is_needed(tmp_path, name):
    two(name, tmp_path / name)
    for needed in (NEEDED, None):
        with pytest.raises(DataError, match=rf"{name}: has two columns called text; rename or remove one"):
            read(tmp_path / name, needed)
    assert read(tmp_path / name, {"n"})[0][1] == {"n": 1}


def test_a_value_that_python_has_none_for_is_a_bad_row(tmp_path):
    twice = pa.StructArray.from_arrays([pa.array(["a", "b"]), pa.array(["c", "d"])], names=["x", "x"])
    for column, bad in ((twice, (0, 1)), (pa.array([0, 10**18], pa.timestamp("s")), (1,))):
        with pa.ipc.new_file(str(tmp_path / "a"), pa.schema([("text", column.type)])) as sink:
            sink.write_table(pa.Table.from_arrays([column], names=["text"]))
        units = table_units(str(tmp_path / "a"), "arrow", "", NEEDED)
        found = [raw for unit in units for _, raw in raw_rows(unit, NEEDED)]
        for number, raw in enumerate(found):
            assert (f"a: row {number + 1}: a value that cannot be read (" in str(raw)) == (number in bad)


def test_damage_is_named(tmp_path):
    lots = random.Random(3)
    for name in ("gz", "zst", "parquet", "arrow", "stream"):
        path = tmp_path / name
        MAKE[name](path)
        whole = path.read_bytes()
        for end in (5, len(whole) // 2, len(whole) - 9, *(lots.randrange(4, len(whole)) for _ in range(5))):
            path.write_bytes(whole[:end])
            try:
                read(path)
            except DataError as error:
                assert str(error).startswith(f"{tmp_path}/{name}") and "\n" not in str(error)
            else:
                assert name in ("zst", "stream")  # which end between two frames, or two messages


@pytest.mark.parametrize(
    "content, problem",
    [
        ('[{"a": 1}\n{"a": 2}]', "a.json:2: not JSON: a comma"),
        ('[{"a": 1},\n\n{"a": 2]', "a.json:3: not JSON: Expecting ',' delimiter"),
        ('[{"a": 1}, {"a": "2', "a.json:1: not JSON: Unterminated string"),
        ('[{"a": 1},', "a.json:1: not JSON: it has no end"),
        ('[{"a": 1}] x', "a.json:1: not JSON: more after the end"),
        ('[{"a": 1}, ]', "a.json:1: not JSON: Expecting value"),
        (b'[{"a": 1},\n{"a": "\xff"}]', "a.json:2: not UTF-8"),
        ('[{"a": 1}, 7, {"a": 2}]', "a.json: item 2: a JSON object is needed, this is a int"),
    ],
)
def test_a_broken_list_is_named_by_line(tmp_path, content, problem, monkeypatch):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for size in (1, 5, 1 << 18):
        monkeypatch.setattr(items, "READ", size)
        with pytest.raises(DataError) as caught:
            read(path)
        assert problem in str(caught.value)


def test_a_list_of_long_items_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(items, "READ", 1000)
    rows = [{"text": "ä" * 30_000}, {"text": ""}, {"text": '\\"]},' * 999}]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False))
    assert [row for _, row in read(tmp_path / "a.json")] == rows


def test_a_row_group_that_cannot_fit_is_refused_by_its_number(tmp_path, monkeypatch):
    MAKE["parquet"](tmp_path / "a")
    monkeypatch.setattr(table, "GROUP", 20)
    with pytest.raises(DataError, match="a: row group 1 of 8 has 0 MB in the columns to read"):
        read(tmp_path / "a")


def test_texts_that_begin_with_a_bracket_are_texts(tmp_path):
    for text in ("[link](x)\n", "{macro}\n", "{\n", '{"a": }\n', "[1, 2]\n", ""):
        (tmp_path / "a.txt").write_text(text)
        assert kind_of(tmp_path / "a.txt") == ("text", "")
    (tmp_path / "a.txt").write_text('{"text": "x"}\n{')
    assert kind_of(tmp_path / "a.txt") == ("lines", "")


def test_a_table_whose_texts_are_no_utf8_names_the_row(tmp_path):
    values = pa.array([b"ok", b"\xff", b"end"], pa.binary()).view(pa.binary())
    texts = pa.StringArray.from_buffers(3, *values.buffers()[1:])
    with pa.ipc.new_file(str(tmp_path / "a"), pa.schema([("text", pa.string())])) as sink:
        sink.write_batch(pa.record_batch([texts], names=["text"]))
    units = table_units(str(tmp_path / "a"), "arrow", "", NEEDED)
    found = [raw for unit in units for _, raw in raw_rows(unit, NEEDED)]
    assert found[0] == {"text": "ok"} and found[2] == {"text": "end"}
    assert f"{tmp_path}/a: row 2: not UTF-8" in str(found[1])


@pytest.mark.parametrize("name", ["gz", "zst", "list", "stream", "lines"])
def test_what_is_one_piece_of_work_says_how_far_it_is(tmp_path, name, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(pace, "EVERY", -1.0)
    MAKE[name](tmp_path / name)
    assert len(read(tmp_path / name)) >= 50
    assert (f"{tmp_path}/{name}: read: 0 of 0 MB, " in caplog.text) == (name != "lines")  # which is several


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("size", [1, 9, 1 << 18])
def test_the_list_of_an_object_is_read_item_by_item(tmp_path, indent, size, monkeypatch):
    monkeypatch.setattr(items, "READ", size)
    rows = [{"a": n, "b": ["x", {"data": "}]"}]} for n in range(20)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"v": 1.5e3, "data": rows, "w": {"u": None}}, indent=indent))
    unit = Unit(str(path), "object")
    found = list(raw_rows(unit, {"data", "w"}, "data"))
    assert [row for _, row in found] == [{"w": {"u": None}, "data": [row]} for row in rows]
    assert str(found[1][0]) == f"{path}:{1 if indent is None else 13}"
    assert [row for _, row in raw_rows(unit, {"data"}, "data")] == [{"data": [row]} for row in rows]
    assert [row for _, row in raw_rows(unit, {"w"}, "none")] == [{"w": {"u": None}}]
    path.write_text('{"data": 5}')
    assert [row for _, row in raw_rows(unit, {"data"}, "data")] == [{"data": 5}]
    end = '"data": [1]'
    for broken in ('{"data": [1, 2', "{" + end, "{" + end + "} x", '{"data" [1]}', "{data: [1]}", "{" + end + " 2}"):
        path.write_text(broken)
        with pytest.raises(DataError, match="a.json:1: not JSON: "):
            list(raw_rows(unit, {"data"}, "data"))


def test_one_long_line_is_an_object_and_several_are_lines(tmp_path):
    row = json.dumps({"text": "x" * 200_000})
    for content, kind in ((row, "object"), (row + "\n \n", "object"), (row + "\n" + row, "lines")):
        (tmp_path / "a.json").write_text(content)
        assert kind_of(tmp_path / "a.json") == (kind, "")
    (tmp_path / "a.dat").write_text('{\n  "text": "x",\n  "b": 1\n}')
    assert kind_of(tmp_path / "a.dat") == ("object", "") and read(tmp_path / "a.dat")[0][1]["text"] == "x"
