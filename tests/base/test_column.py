"""Paths reach what they say, templates put in what they name, and what cannot be is refused before data are read."""

import pytest

from rwkvpipe.base.column import EACH, Columns, fill, steps, written
from rwkvpipe.base.errors import ConfigError, DataError


@pytest.mark.parametrize(
    "path, wanted",
    [
        ("text", ("text",)),
        ("a.b.c", ("a", "b", "c")),
        ("a[0][1].b", ("a", 0, 1, "b")),
        ("a[-1]", ("a", -1)),
        ("a[*].b[*]", ("a", EACH, "b", EACH)),
        ('"an odd.name[0]"', ("an odd.name[0]",)),
        (r'a."say \"x\""[0]', ("a", 'say "x"', 0)),
        ("my column-1.größe", ("my column-1", "größe")),
    ],
)
def test_paths_are_taken_apart(path, wanted):
    assert steps(path) == wanted
    if '"' not in path:
        assert written(wanted) == path


@pytest.mark.parametrize("path", ["", ".", "a.", ".a", "a..b", "[0]", "a[", "a[x]", "a[0]b", 'a."b', "a]", "a.[0]"])
def test_what_is_no_path_is_refused_with_the_character(path):
    with pytest.raises(ConfigError, match=f"no path at character {'1' if path in ('', '.', '.a', '[0]') else '[2-5]'}"):
        steps(path)


def records(columns, row):
    return [record for _, record in Columns(columns, {}).records(row, "f:1")]


def test_a_plain_row_is_its_own_record():
    row = {"q": 1}
    assert records({"question": "q"}, row)[0] is row


def test_what_is_missing_is_left_out():
    row = {"a": {"b": None}, "l": [1]}
    assert records({"question": "a.b", "answer": "a.c", "label": "l[1]", "text": "l.x"}, row) == [row | {"a.b": None}]


def test_items_of_nested_lists_become_records_that_share_what_is_above_them():
    row = {"p": [{"c": 1, "q": [{"x": 2}, {"x": 3}]}, {"c": 4, "q": []}, {"c": 5, "q": [{"x": 6}]}], "t": {"u": 0}}
    found = records({"question": "p[*].q[*].x", "answer": "p[*].c", "text": "t.u"}, row)
    assert [(r["p[*].q[*].x"], r["p[*].c"], r["t.u"]) for r in found] == [(2, 1, 0), (3, 1, 0), (6, 5, 0)]


def test_records_are_numbered_and_a_list_that_is_none_is_named():
    places = [str(where) for where, _ in Columns({"text": "a[*]"}).records({"a": [1, 2]}, "f:1")]
    assert places == ["f:1: record 1", "f:1: record 2"]
    for row, shown in (({}, "missing"), ({"a": "x"}, "a str"), ({"a": None}, "null")):
        with pytest.raises(DataError, match=rf"f:1: `a\[\*\]` needs a list, which is {shown}"):
            records({"text": "a[*].b"}, row)


def test_two_lists_side_by_side_are_refused():
    with pytest.raises(ConfigError, match="two lists are fanned out"):
        Columns({"question": "a[*]", "answer": "b[*]"})


def test_names_that_nothing_knows_are_refused():
    with pytest.raises(ConfigError, match="columns.contxt: no such name; did you mean context"):
        Columns({"contxt": "a"}, {"question": "{context}"})
    with pytest.raises(ConfigError, match="templates.t: no such name; .*, or say where it stands: columns: {t: t}"):
        Columns({}, {"text": "{t} {label}"})
    with pytest.raises(ConfigError, match="templates.ansr: no such name; did you mean answer"):
        Columns({}, {"ansr": "x"})
    assert Columns({"c": "x.y"}, {"question": "{c} {question}"}).tops == {"x", "question"}


def test_braces_in_values_and_other_braces_are_text():
    assert fill("{a} {} {1 b} {{a}}", {"a": "{b}"}) == "{b} {} {1 b} {{b}}"
