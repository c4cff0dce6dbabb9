"""Files are written whole, and only where a file may be."""

import os
import stat
from pathlib import Path

import pytest

from rwkvpipe import convert, generate
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import atomic, write_text


@pytest.fixture(params=["pipe", "link"])
def odd(tmp_path, request) -> Path:
    """What is there and is no file, though a file could be renamed into its place."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    return tmp_path / request.param


def test_no_file_takes_the_place_of_a_device_or_a_pipe(odd, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=f"{odd.name}: a device, a pipe or a socket; name a file"):
        write_text(odd, "a")
    assert stat.S_ISFIFO(odd.stat().st_mode) and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("place", ["/dev/null", "/dev/stdout", "/dev/fd/1"])
def test_nothing_is_written_beside_devices(place):
    with pytest.raises(DataError, match="a device"), atomic(place):
        raise AssertionError("it was begun")


@pytest.mark.parametrize("place", ["pipe", "/dev/null"])
def test_a_command_says_so_before_it_works(tmp_path, place):
    os.mkfifo(tmp_path / "pipe")
    words = ["--out", str(tmp_path / place)]
    for verb in (lambda: convert.main(["m.pth", *words]), lambda: generate.main(["--model", "m", *words])):
        with pytest.raises(ConfigError, match="--out: .* is a device, a pipe or a socket"):
            verb()
