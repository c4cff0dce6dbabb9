"""The program puts a file where it is asked to, or says in one line why not."""

import hashlib
import subprocess
import sys

import pytest

from rwkvpipe import download
from rwkvpipe.base.errors import HubError


def test_a_file_is_fetched_and_checked(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    download.main([(tmp_path / "a").as_uri(), "--sha256", digest, "--out", str(tmp_path / "b")])
    assert (tmp_path / "b").read_bytes() == b"abc"
    with pytest.raises(HubError, match="sha256 is"):
        download.main([str(tmp_path / "a"), "--sha256", "0" * 64, "--out", str(tmp_path / "c")])
    assert not (tmp_path / "c").exists()


def test_an_error_is_one_line_and_torch_is_not_loaded(tmp_path):
    program = (
        "import sys\nfrom rwkvpipe import download\nfrom rwkvpipe.base.errors import run\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\nrun(download.main)\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "gone"), "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "gone: no such file; mend the path" in done.stderr and not (tmp_path / "out").exists()
