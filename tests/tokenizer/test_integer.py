"""Numbers as tokens."""

import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer.integer import IntegerTokenizer


def test_a_number_s_id_is_one_more():
    numbers = IntegerTokenizer(10)
    assert (numbers.size, numbers.eos) == (11, 0)
    assert numbers.encode("0 9\n 3") == [1, 10, 4] == numbers.encode(b"0 9 3")
    assert numbers.decode([1, 10, 0, 4]) == "0 9 3"
    assert numbers.decode_bytes([10]) == b"9"
    assert numbers.owns(10) and not numbers.owns(0) and not numbers.owns(11)


@pytest.mark.parametrize("text", ["hello", "1 +2", "1,2", "1 -2", "1 ٣", "1.0", "1 2_0", "1 x"])
def test_text_is_refused_with_a_remedy(text):
    with pytest.raises(DataError, match="knows whole numbers only; give numbers"):
        IntegerTokenizer(10).encode(text)


@pytest.mark.parametrize("text", ["1 10", "1 " + "9" * 5000])
def test_a_number_out_of_range_is_refused(text):
    with pytest.raises(DataError, match="word 2 is .* from 0 to 9; give the tokenizer a larger size"):
        IntegerTokenizer(10).encode(text)


def test_a_foreign_id_is_refused():
    with pytest.raises(DataError, match="id 11"):
        IntegerTokenizer(10).decode([11])
