import html
from html.parser import HTMLParser

import pytest

from rwkvpipe.show.markup import Html, brief, duration, el, escape, facts, rough

HOSTILE = [
    "<script>alert(1)</script>",
    '" onload="x',
    "'><img src=x>",
    "&lt;",
    "</style>",
    "]]>",
    "<!--",
    "\x00\x1b[31m",
    "\ud800",
]


class Text(HTMLParser):
    """The text and the tags of a page, as a browser would take it."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.values = [], "", []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.values += attributes

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_a_tag_or_an_attribute(text):
    page = Text()
    page.feed(el("p", text, title=text))
    assert page.tags == ["p"] and [name for name, _ in page.values] == ["title"]
    assert page.text == page.values[0][1] == html.unescape(escape(text))


def test_control_characters_and_half_surrogates_can_be_written_and_seen():
    assert escape("a\x00b\x1b\x85\ud800\n\tc") == "a\u2400b\u241b\ufffd?\n\tc"
    escape("\ud800").encode("utf-8")


def test_markup_is_not_escaped_twice():
    assert el("p", Html("<b>1</b>"), 2) == "<p><b>1</b>2</p>"


def test_facts_that_are_none_are_left_out():
    assert facts({"a": None}) == ""
    assert "<dt>b</dt><dd>0</dd>" in facts({"a": None, "b": 0})


def test_times_are_told_as_people_tell_them():
    assert [duration(s) for s in (0.04, 9.94, 9.96, 59.6, 125, 7260)] == [
        "0.0 s", "9.9 s", "10 s", "1 min 00 s", "2 min 05 s", "2 h 01 min",
    ]  # fmt: skip
    assert [brief(s) for s in (0.4, 12, 59.6, 185, 7920)] == ["0.4 s", "12 s", "1.0 min", "3.1 min", "2.2 h"]


def test_trillions_are_words_too():
    assert [rough(n) for n in (1.2e12, 999.6e9, 3e15)] == ["1.2 trillion", "1 trillion", "3,000 trillion"]


def test_numbers_are_rounded_to_words():
    assert [rough(n) for n in (950, 12345, 1_240_000, 999_900_000, 3e9)] == [
        "950",
        "12,345",
        "1.24 million",
        "1 billion",
        "3 billion",
    ]
