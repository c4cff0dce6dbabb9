"""The pool of threads under the thread sanitizer: every turn is taken once, and nobody reads what another writes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from rwkvpipe.kernel.build import SOURCES

PROGRAM = """
#include "threads.h"
#include <atomic>
#include <cstdio>

int main() {
    std::atomic<int64_t> sum{0};
    for (int64_t round = 0; round < 3000; round++)
        share(1 + round % 7, 4, [&](int64_t i) { sum += i + 1; });
    int64_t wanted = 0;
    for (int64_t round = 0; round < 3000; round++) wanted += (1 + round % 7) * (2 + round % 7) / 2;
    std::printf("%s\\n", sum == wanted ? "all" : "not all");
}
"""


def test_every_turn_is_taken_once_and_no_thread_reads_what_another_writes(tmp_path: Path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(PROGRAM)
    command = [compiler, "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{SOURCES}"]
    parts = [str(source), str(SOURCES / "threads.cpp")]
    made = subprocess.run([*command, *parts, "-o", str(program)], capture_output=True)
    if made.returncode:
        pytest.skip("this compiler has no thread sanitizer")
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120)
    if "FATAL: ThreadSanitizer" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this system")
    assert "data race" not in done.stderr, done.stderr[:3000]
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr[:3000]
