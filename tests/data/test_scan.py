"""What is found in lines of JSON in C++ is what Python finds in them; where they might differ, Python is asked."""

import json
import random

import numpy as np
import pytest

from rwkvpipe.data import scan

pytestmark = pytest.mark.skipif(not scan.available(), reason="there is no C++ compiler here")


def found(lines):
    """The text of each line that is not blank; None where Python is to look."""
    data = np.frombuffer(bytearray(b"\n".join(lines)), dtype=np.uint8)
    rows = scan.scan(data, b"text")
    return {int(n): None if start < 0 else data[start:end].tobytes() for n, start, end, _, _ in rows}


def wanted(line):
    """The text of a line as Python reads it; None where it is none."""
    try:
        row = json.loads(str(line, "utf-8"))
        return row["text"].encode() if isinstance(row, dict) and isinstance(row.get("text"), str) else None
    except (ValueError, RecursionError):
        return None


def test_texts_are_found_and_their_escapes_undone():
    texts = [
        "",
        "a",
        'q"\\/\b\f\n\r\t\0',
        "é天😀",
        "x" * 99,
        "\x7f\u2028",
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    ]
    for ascii_only in (True, False):
        lines = [
            json.dumps({"id": 1, "text": text, "n": [None, 1.5e-3, {"a": []}]}, ensure_ascii=ascii_only)
            for text in texts
        ]
        assert list(found([line.encode() for line in lines]).values()) == [text.encode() for text in texts]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a"} x', '{"text": "a",}', '{"text": 5}', '{"text": null}', '{"txt": "a"}', '{"text": "\\ud800"}',
        '{"text": "\\udc00"}', '{"text": "\\ud800\\u0041"}', '{"text": "\\x"}', '{"text": "\\u12g4"}', '["text"]', "{}",
        '{"text": "a", "text": 1}', '{"text": "a\tb"}',
        '{"text": "a"', '{"n": 01, "text": "a"}', '{"n": NaN, "text": "a"}',
        '{"n": ' + "[" * 300 + "]" * 300 + ', "text": "a"}', '{"te\\u0078t": "a"}',
        '{"n": 1., "text": "a"}', "\0", "\f",
    ],
)  # fmt: skip
def test_what_is_not_sound_for_sure_is_left_to_python_as_it_is(line):
    lines = [b'{"text": "before"}', line.encode(), b"", b" \t\r", b'{"text": "after"}']
    data = np.frombuffer(bytearray(b"\n".join(lines)), dtype=np.uint8)
    rows = scan.scan(data, b"text")
    assert rows[:, 0].tolist() == [1, 2, 5] and rows[1, 1] == rows[1, 2] == -1
    assert data[rows[1, 3] : rows[1, 4]].tobytes() == line.encode()


def test_lines_that_are_no_utf8_are_left_to_python():
    for wrong in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe5\xa4", b"\xf0\x80\x80\x80"):
        for line in (b'{"text": "a' + wrong + b'"}', b'{"a' + wrong + b'": 1, "text": "a"}', wrong + b'{"text": "a"}'):
            assert found([line]) == {1: None}


def test_a_key_given_twice_counts_the_last_time():
    assert found([b'{"text": "a", "text": "b"}', b'{"text": 1, "text": "b\\n"}']) == {1: b"b", 2: b"b\n"}


def test_damaged_lines_are_never_taken_for_other_texts():
    lots = random.Random(4)
    row = {"id": 7, "text": 'a "quote", é天😀\n\\u', "n": [1, -2.5e8, None, True, {"text": "inner"}], "text2": ""}
    good = [json.dumps(row, ensure_ascii=plain, indent=None).encode() for plain in (True, False)]
    for _ in range(4000):
        line = bytearray(lots.choice(good))
        for _ in range(lots.randrange(1, 4)):
            place = lots.randrange(len(line))
            kind = lots.randrange(4)
            if kind == 0:
                line[place] = lots.choice(b'"\\{}[]:,u0 eE.-+\x00\x1f\x7f\x80\xff')
            elif kind == 1:
                del line[place : place + lots.randrange(1, 4)]
            elif kind == 2:
                line[place:place] = lots.choice(
                    [b'\\"', b"\\ud83d", b"\\ude00", b"\\n", b"\\", b'"', b",", b"\xe5\xa4\xa9"]
                )
            else:
                line += line[place:]
        line = bytes(line).replace(b"\n", b" ")
        if line.strip():
            text = found([line])[1]
            assert text is None or text == wanted(line), line
