"""A class of the user's is a tokenizer where it is named, and only there does its code run."""

import json
import sys

import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer.load import load_tokenizer, save_tokenizer
from rwkvpipe.tokenizer.own import OwnTokenizer

CODE = '''
class Letters:
    """a is 1, b is 2, ..."""
    def __init__(self, last="z"):
        self.eos, self.size = 0, ord(last) - 95
    def encode(self, text):
        return [ord(letter) - 96 for letter in text]
    def decode(self, ids):
        return "".join(chr(n + 96) for n in ids)

class Odd(Letters):
    size = "many"
    def __init__(self):
        pass

class Silent:
    pass

class Broken(Letters):
    """Does wrong what `how` names."""
    def __init__(self, how=""):
        if how == "init":
            raise KeyError("no\\nsuch")
        super().__init__()
        self.how, self.eos = how, 99 if how == "eos" else 0
    def encode(self, text):
        if self.how == "leave":
            raise SystemExit(0)
        odd = {"raises": lambda: 1 / 0, "none": lambda: None, "words": lambda: "12", "floats": lambda: [1.5]}
        return odd.get(self.how, lambda: [ord(c) - 96 for c in text])()
    def decode(self, ids):
        return None if self.how == "decode" else b"".join(ids) if self.how == "mixed" else "a"
    def decode_bytes(self, ids):
        return "a"
    def owns(self, number):
        return number / 0 if self.how == "owns" else True
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "letters_of_mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "letters_of_mine.py"
    sys.modules.pop("letters_of_mine", None)


def test_a_class_is_named_and_used(module, tmp_path):
    found = OwnTokenizer("letters_of_mine:Letters", {"last": "c"})
    assert (found.size, found.eos, found.encode("abc")) == (4, 0, [1, 2, 3])
    assert found.decode([1, 0, 2]) == "ab" and found.decode_bytes([3]) == b"c"
    assert list(found.stream([b"a", b"b"])) == [[1, 2]] and found.owns(3) and not found.owns(0) and not found.owns(4)
    save_tokenizer(tmp_path / "t", found)
    assert load_tokenizer(tmp_path / "t").encode("cab") == [3, 1, 2]


def test_ids_outside_its_size_are_refused(module):
    found = OwnTokenizer("letters_of_mine:Letters", {"last": "c"})
    with pytest.raises(DataError, match="encode gives id 4, size is 4"):
        found.encode("abd")
    with pytest.raises(DataError, match="id 9 stands for nothing"):
        found.decode([9])


def test_edited_code_is_noticed(module, tmp_path):
    save_tokenizer(tmp_path / "t", OwnTokenizer("letters_of_mine:Letters"))
    module.write_text(CODE + "# another word\n")
    with pytest.raises(DataError, match="the code of letters_of_mine:Letters has changed since"):
        load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize(
    "path, options, problem",
    [
        ("letters_of_mine", {}, "is not module:Class"),
        ("letters_of_mine:Letters()", {}, "is not module:Class"),
        ("no_such_module_here:Letters", {}, "there is no module no_such_module_here"),
        ("letters_of_mine:Missing", {}, "is no class with encode and decode"),
        ("letters_of_mine:Silent", {}, "is no class with encode and decode"),
        ("subprocess:Popen", {"args": ["true"]}, "is no class with encode and decode"),
        ("letters_of_mine:Letters", {"first": "a"}, "options: .* does not take them"),
        ("letters_of_mine:Odd", {}, "size must be a whole number from 1, it is 'many'"),
        ("letters_of_mine:Broken", {"how": "init"}, r"making one raises KeyError at .*letters_of_mine.py:\d+: 'no"),
        ("letters_of_mine:Broken", {"how": "eos"}, "eos must be a whole number from 0 to 26, it is 99"),
    ],
)
def test_what_is_no_tokenizer_is_named(module, path, options, problem):
    with pytest.raises(DataError, match=problem):
        OwnTokenizer(path, options)


def test_a_description_without_a_class_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "own"}))
    with pytest.raises(DataError, match="import_path is a text"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "how, use, problem",
    [
        (
            "raises",
            lambda own: own.encode("a"),
            r"encode raises ZeroDivisionError at .*letters_of_mine.py:\d+: division",
        ),
        ("leave", lambda own: own.encode("a"), "encode raises SystemExit"),
        ("none", lambda own: own.encode("a"), "encode raises TypeError"),
        ("words", lambda own: own.encode("a"), "encode gives '1', which is no whole number"),
        ("floats", lambda own: own.encode("a"), "encode gives 1.5, which is no whole number"),
        ("decode", lambda own: own.decode([1]), "decode gives NoneType, str is needed"),
        ("mixed", lambda own: own.decode([1]), "decode raises TypeError"),
        ("", lambda own: own.decode_bytes([1]), "decode_bytes gives str, bytes is needed"),
        ("owns", lambda own: own.owns(1), "owns raises ZeroDivisionError"),
    ],
)
def test_what_a_class_does_wrong_is_said_in_one_line(module, how, use, problem):
    own = OwnTokenizer("letters_of_mine:Broken", {"how": how})
    with pytest.raises(DataError, match=problem) as caught:
        use(own)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "code, problem",
    [
        ("class Letters:\n  def", r"its module raises SyntaxError at .*broken_of_mine.py:2"),
        ("import no_such_module_here", "its module raises ModuleNotFoundError at .*broken_of_mine.py:1: No module"),
        ("raise SystemExit(3)", "its module raises SystemExit at .*broken_of_mine.py:1"),
        ("Letters = 3", "is no class with encode and decode"),
    ],
)
def test_a_module_that_cannot_be_loaded_is_named(tmp_path, monkeypatch, code, problem):
    (tmp_path / "broken_of_mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_of_mine", raising=False)
    with pytest.raises(DataError, match=problem):
        OwnTokenizer("broken_of_mine:Letters")
    sys.modules.pop("broken_of_mine", None)


def test_bytes_that_are_a_text_come_as_text(module):
    assert OwnTokenizer("letters_of_mine:Letters").encode(b"abc") == [1, 2, 3]
