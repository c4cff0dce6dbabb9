"""Documents come out of files as they are, and what cannot be read is named by line."""

import json

import numpy as np
import pytest

from rwkvpipe.base.config import CorpusConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.data.corpus import documents, questions, texts


def spec(**changes):
    asked = {"path": "x", "tokenizer": "t"} | changes
    if asked.get("format") == "question":
        asked.pop("tokenizer")
    return CorpusConfig(**asked)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_rows_of_json_are_documents(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": "tw\\no", "n": 1}\n')
    found = list(documents(path, spec()))
    assert [(d.text, str(d.origin)) for d in found] == [("one", f"{path}:1"), ("tw\no", f"{path}:3")]
    path = write(tmp_path / "b.jsonl", '{"body": "one"}')
    assert [d.text for d in documents(path, spec(field="body"))] == ["one"]


def test_documents_are_read_one_by_one(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text"')
    found = documents(path, spec())
    assert next(found).text == "one"
    with pytest.raises(DataError, match="a.jsonl:2: not JSON"):
        next(found)


def test_a_json_list_is_documents_too(tmp_path):
    path = write(tmp_path / "a.json", b'\xef\xbb\xbf [{"text": "one"}, {"text": "two"}]')
    path = write(tmp_path / "a.json", '[{"text": "one"}, {"text": "two"}]')
    assert [(d.text, str(d.origin)) for d in documents(path, spec())][1] == ("two", f"{path}: item 2")
    path = write(tmp_path / "b.json", '{"text": "one"}\n{"text": "two"}')
    assert len(list(documents(path, spec()))) == 2


def test_a_text_file_is_one_document_as_it_stands(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\ntw\xc3\xb6\n")
    assert [d.text for d in documents(path, spec())] == ["one\r\n\r\ntwö\n"]


@pytest.mark.parametrize(
    "name, content, changes, problem",
    [
        ("a.jsonl", '{"text": "x"}\n{"text": 5}\n', {}, "a.jsonl:2: `text` is int 5"),
        ("a.jsonl", '{"text": "x"}\n\n{"txt": "y"}\n', {}, "a.jsonl:3: no `text`; the row has txt"),
        ("a.jsonl", '{"text": "x"}\n{"text": NaN}\n', {}, "a.jsonl:2: `text` is float nan"),
        ("a.jsonl", '{"text": "x"}\n{"text": null}\n', {}, "a.jsonl:2: `text` is null"),
        ("a.jsonl", '{"text": "x"}\n{"text": "y"\n', {}, "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": "x"}\n["y"]\n', {}, "a.jsonl:2: a JSON object is needed"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', {}, "a.jsonl:2: not UTF-8"),
        ("a.jsonl", '{"text": "\\ud800"}\n', {}, "a.jsonl:1: `text` has half a surrogate"),
        pytest.param("a.jsonl", '{"n": ' + "9" * 5000, {}, "a.jsonl:1: a number with too many digits", id="digits"),
        pytest.param("a.jsonl", '\n{"n": ' + "[" * 10**5, {}, "a.jsonl:2: brackets too deep", id="brackets"),
        pytest.param("a.json", "[" * 10**5, {}, "a.json: brackets too deep", id="brackets of a list"),
        ("a.json", '[{"text": "x"}, 5]', {}, "a.json: item 2: a JSON object"),
        ("a.jsonl", "\n", {}, "a.jsonl: no documents in it"),
        ("a.txt", b"one\ntwo\xff\n", {}, "a.txt:2: not UTF-8 at byte 7"),
        ("a.jsonl", '{"messages": []}', {"format": "chat"}, "a.jsonl:1: `messages` must be a list"),
        ("a.jsonl", '{"answer": "?"}', {"format": "question"}, "a.jsonl:1: no `question`"),
        ("a.txt", "x", {"format": "chat"}, "rows of JSON are needed"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, changes, problem):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        list(documents(path, spec(**changes)))
    assert problem in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_an_absent_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(documents(tmp_path / "x.txt", spec()))
    with pytest.raises(DataError, match="a folder without files; name a corpus file"):
        list(documents(tmp_path, spec()))


def test_columns_may_have_other_names(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"q": "1+1?", "a": 2}))
    columns = {"question": "q", "answer": "a"}
    assert [d.row() for d in questions(path, spec(format="question", columns=columns))] == [
        {"question": "1+1?", "answer": "2"}
    ]
    found = next(documents(path, spec(format="chat", columns=columns)))
    assert [turn["content"] for turn in found.messages] == ["1+1?", "2"]
    with pytest.raises(ValueError, match="columns.anser: no such name; did you mean answer"):
        spec(format="question", columns={"anser": "a"})


def array(path, value, **options):
    np.save(path, value, **options)
    return path


def test_rows_of_an_array_are_documents(tmp_path):
    path = array(tmp_path / "a.npy", np.arange(6, dtype=np.uint8).reshape(2, 3))
    found = list(documents(path, spec(format="array")))
    assert [list(d.ids) for d in found] == [[0, 1, 2], [3, 4, 5]]
    assert str(found[1].origin) == f"{path}: row 2"


def test_a_long_array_is_cut(tmp_path, caplog):
    caplog.set_level("INFO")
    path = array(tmp_path / "a.npy", np.arange(8))
    assert [list(d.ids) for d in documents(path, spec(format="array", cut=3))] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert "the last, of 2, is kept" in caplog.text
    path = array(tmp_path / "b.npy", np.arange(7))
    assert [list(d.ids) for d in documents(path, spec(format="array", cut=3))] == [[0, 1, 2], [3, 4, 5]]
    assert "the last, of 1, is left out" in caplog.text
    assert [len(d.ids) for d in documents(path, spec(format="array"))] == [7]


@pytest.mark.parametrize(
    "value, problem",
    [
        (np.array([[1.0, 2.0]]), "row 1: the array is of float64, whole numbers are needed; save array.astype"),
        (np.array([[1, 2], [3, -4]]), "row 2: holds -4"),
        (np.array([[True]]), "of bool"),
        (np.zeros((2, 2, 2), int), r"shape \(2, 2, 2\)"),
        (np.zeros((0, 2), int), r"shape \(0, 2\)"),
        (np.array(5), r"shape \(\)"),
    ],
)
def test_an_array_that_does_not_do_is_named(tmp_path, value, problem):
    with pytest.raises(DataError, match=f"a.npy: .*{problem}"):
        list(documents(array(tmp_path / "a.npy", value), spec(format="array")))


def test_damaged_and_foreign_arrays_are_named(tmp_path):
    with pytest.raises(DataError, match="Python objects"):
        list(documents(array(tmp_path / "a.npy", np.array([{}]), allow_pickle=True), spec(format="array")))
    with pytest.raises(DataError, match="no .npy file, or damaged"):
        list(documents(write(tmp_path / "b.npy", "x"), spec(format="array")))
    with pytest.raises(DataError, match="no .npy file, or damaged"):
        list(documents(write(tmp_path / "c.npy", ""), spec(format="array")))
    whole = array(tmp_path / "d.npy", np.arange(100)).read_bytes()
    with pytest.raises(DataError, match="cut short or damaged"):
        list(documents(write(tmp_path / "d.npy", whole[:-8]), spec(format="array")))
    with pytest.raises(DataError, match="cut short or damaged"):
        list(documents(write(tmp_path / "g.npy", whole[:9]), spec(format="array")))
    with pytest.raises(DataError, match="cut short or damaged"):
        list(documents(write(tmp_path / "h.npy", whole[:30]), spec(format="array")))
    with pytest.raises(DataError, match="cut short or damaged"):
        list(documents(write(tmp_path / "i.npy", whole.replace(b"}", b"{")), spec(format="array")))
    with pytest.raises(DataError, match="an archive that is cut short"):
        list(documents(write(tmp_path / "j.npy", b"PK\3\4"), spec(format="array")))
    np.savez(tmp_path / "e.npz", a=np.arange(3), b=np.arange(3))
    (tmp_path / "e.npz").rename(tmp_path / "e.npy")
    with pytest.raises(DataError, match="an archive of arrays called a, b"):
        list(documents(tmp_path / "e.npy", spec(format="array")))
    with pytest.raises(DataError, match="remove cut"):
        list(documents(array(tmp_path / "f.npy", np.ones((2, 2), int)), spec(format="array", cut=2)))
    with pytest.raises(ConfigError, match="cut belongs to one long array"):
        list(documents(write(tmp_path / "x.jsonl", '{"text": [1]}'), spec(format="array", cut=2)))
    with pytest.raises(DataError, match="are needed for format chat, not numbers"):
        list(documents(tmp_path / "f.npy", spec(format="chat")))


def test_all_texts_of_a_file_are_found_whatever_they_are_called(tmp_path):
    row = {"a": "x", "b": [{"role": "user", "content": "y"}], "n": 12, "z": None, "e": ""}
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    assert list(texts(path)) == ["x", "user", "y", "12"]
    assert list(texts(write(tmp_path / "a.txt", "abc"))) == ["abc"]


def test_rows_of_several_lengths_come_from_an_archive_without_pickled_objects(tmp_path):
    rows = [[1, 2, 3], [], [4]]
    flat = np.concatenate([np.array(row, int) for row in rows])
    np.savez(tmp_path / "a.npz", values=flat, lengths=[3, 0, 1])
    np.savez_compressed(tmp_path / "b.npz", values=flat, offsets=[0, 3, 3, 4])
    for name in ("a.npz", "b.npz"):
        assert [list(d.ids) for d in documents(tmp_path / name, spec(format="array"))] == rows
    np.savez(tmp_path / "c.npz", values=flat, lengths=[3, 0, 2])
    with pytest.raises(DataError, match="c.npz: its rows do not fit its 4 values"):
        list(documents(tmp_path / "c.npz", spec(format="array")))


def test_lists_of_whole_numbers_are_numbers_and_mixtures_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": [1, 2]}\n{"text": []}')
    assert [list(d.ids) for d in documents(path, spec())] == [[1, 2], []]
    for value, shown in (('"b"', "'b'"), ("-1", "-1"), ("2.5", "2.5"), ("true", "True"), ("null", "null")):
        write(path, '{"text": [1]}\n{"text": [1, ' + value + "]}")
        with pytest.raises(DataError, match=rf"a.jsonl:2: `text\[1\]` is {shown}; a list is taken for whole numbers"):
            list(documents(path, spec()))


def test_a_folder_and_a_glob_are_read_file_by_file_in_the_order_of_names(tmp_path):
    for name in ("b.txt", "a.txt", ".hidden", "deep/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, name)
    assert [d.text for d in documents(tmp_path, spec())] == ["a.txt", "b.txt", "deep/c.txt"]
    assert [d.text for d in documents(tmp_path / "*.txt", spec())] == ["a.txt", "b.txt"]
    assert [d.text for d in documents(tmp_path / "**/*.txt", spec())] == ["a.txt", "b.txt", "deep/c.txt"]
    write(tmp_path / "z.jsonl", '{"text": "x"}')
    with pytest.raises(
        DataError, match="a.txt and .*z.jsonl are not of one kind .text, tables.; name those that count"
    ):
        list(documents(tmp_path, spec()))


def test_a_limit_ends_the_corpus(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\nnot read')
    assert [d.text for d in documents(path, spec(limit=2))] == ["one", "two"]


def test_bad_rows_are_told_and_left_out_where_that_is_asked_for(tmp_path):
    bad = [
        '{"text"',
        '{"text": null}',
        '{"txt": ""}',
        '{"text": {"a": 1}}',
        '{"text": "\\ud800"}',
        "[1]",
        '{"text": [1.5]}',
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(['{"text": "one"}', *bad, '{"text": "tw\\u0000o"}', ""]))
    path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n{"text": ""}')
    errors = []
    found = [d.text for d in documents(path, spec(), lambda error: errors.append(str(error)))]
    assert found == ["one", "tw\0o", ""]  # NUL is text, an empty document is the packer's to leave out
    assert [error.split(": ")[0] for error in errors] == [f"{path}:{n}" for n in (2, 3, 4, 5, 6, 7, 8, 10)]


SQUAD = {"data": [{"title": "T", "paragraphs": [
    {"context": "{c1}", "qas": [{"question": "q1", "answers": [{"text": "a1"}, {"text": "x"}]},
                                {"question": "q2", "answers": [{"text": "a2"}]}]},
    {"context": "c2", "qas": [{"question": "q3", "answers": []}]}]}]}  # fmt: skip
FAN = "data[*].paragraphs[*]"
ASK = {
    "question": f"{FAN}.qas[*].question",
    "context": f"{FAN}.context",
    "answer": f"{FAN}.qas[*].answers[0].text",
}


@pytest.mark.parametrize("indent", [None, 1])
def test_nested_questions_need_a_few_lines_of_config_and_no_code(tmp_path, indent):
    path = write(tmp_path / "squad.json", json.dumps(SQUAD, indent=indent))
    asked = spec(format="question", columns=ASK, templates={"question": "{context}: {question}"})
    errors = []
    found = [(d.question, d.answer) for d in questions(path, asked, lambda error: errors.append(str(error)))]
    assert found == [("{c1}: q1", "a1"), ("{c1}: q2", "a2")]
    assert len(errors) == 1 and errors[0].startswith(f"{path}:{3 if indent else 1}: record 3: no `{ASK['answer']}`")
    texts = spec(columns={"q": ASK["question"], "c": ASK["context"]}, templates={"text": "{c} {q}"})
    assert [d.text for d in documents(path, texts)] == ["{c1} q1", "{c1} q2", "c2 q3"]


def test_lists_with_aliases_are_read_as_triviaqa_has_them(tmp_path):
    rows = [
        {"Question": "Who?", "Answer": {"Value": "Ann", "Aliases": ["A"]}},
        {"Question": "When?", "Answer": {"Value": 7}},
    ]
    path = write(tmp_path / "t.json", json.dumps({"Data": rows, "Version": 1.0}, indent=2))
    asked = spec(format="question", columns={"question": "Data[*].Question", "answer": "Data[*].Answer.Value"})
    assert [(d.question, d.answer) for d in questions(path, asked)] == [("Who?", "Ann"), ("When?", "7")]
