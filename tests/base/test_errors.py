"""How a program says what it says."""

import os
import subprocess
import sys


def test_letters_that_a_terminal_lacks_are_no_reason_to_stop():
    program = "from rwkvpipe.base.errors import run; run(lambda: print('a é 日 b'))"
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONIOENCODING": "ascii"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, timeout=100)
    assert (found.returncode, found.stdout, found.stderr) == (0, b"a ? ? b\n", b"")
