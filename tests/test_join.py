"""Pairs are joined from the command line."""

import pytest

from rwkvpipe import join
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.data.binidx import Binidx, BinidxWriter


def write(prefix, ids):
    with BinidxWriter(prefix, "uint16") as writer:
        writer.add(ids)
    return str(prefix)


def test_pairs_become_one_and_one_grows(tmp_path, caplog):
    caplog.set_level("INFO")
    one, two = write(tmp_path / "one", [1, 2]), write(tmp_path / "two.v1", [3])
    join.main([f"{one}.bin", f"{two}.idx", "--out", str(tmp_path / "all")])
    assert Binidx(tmp_path / "all").tokens(0, 3).tolist() == [1, 2, 3]
    assert "all: 2 documents, 3 tokens" in caplog.text
    join.main([one, two, "--move", "--out", one])
    assert Binidx(one).tokens(0, 3).tolist() == [1, 2, 3] and not (tmp_path / "two.v1.bin").exists()
    with pytest.raises(ConfigError, match="is a folder"):
        join.main([one, "--out", str(tmp_path)])
