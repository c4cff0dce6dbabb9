"""Bytes as tokens."""

import pytest

from rwkvpipe.base.errors import DataError
from rwkvpipe.tokenizer.byte import ByteTokenizer


def test_with_offset_one_id_zero_ends_a_document():
    one = ByteTokenizer(1)
    assert (one.size, one.eos) == (257, 0)
    assert one.encode("aé") == [98, 0xC3 + 1, 0xA9 + 1]
    assert one.decode([98, 0, 0xC4, 0xAA]) == "aé"
    assert one.owns(256) and not one.owns(0) and not one.owns(257)


def test_with_offset_zero_the_id_is_the_byte():
    zero = ByteTokenizer(0)
    assert (zero.size, zero.eos) == (256, None)
    assert zero.encode(bytes(range(256))) == list(range(256))
    assert zero.decode_bytes(range(256)) == bytes(range(256))
    assert zero.owns(0) and not zero.owns(256)


def test_bytes_that_are_no_text_become_the_replacement_character():
    assert ByteTokenizer(0).decode([97, 0xFF]) == "a\ufffd"


def test_foreign_ids_and_half_characters_are_refused():
    with pytest.raises(DataError, match="id 300"):
        ByteTokenizer(1).decode([300])
    with pytest.raises(DataError, match="character 2 of the text"):
        ByteTokenizer(1).encode("a\ud800")
