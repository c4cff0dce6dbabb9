"""The native code, each function once: under sanitizers it keeps inside its tensors; for ARM it computes the same."""

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rwkvpipe.kernel.build import SOURCES, level, levels

PROGRAM = Path(__file__).with_name("program.cpp")


@pytest.mark.slow
@pytest.mark.parametrize("level", dict.fromkeys([list(levels())[-1], level()]))
def test_native_code_keeps_inside_its_tensors(tmp_path: Path, level):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    program = tmp_path / "main"
    command = [
        compiler,
        *levels()[level],
        "-std=c++17",
        "-O0",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-pthread",
    ]
    parts = [str(PROGRAM), *map(str, sorted(SOURCES.glob("*.cpp")))]
    made = subprocess.run([*command, "-Wno-psabi", f"-I{SOURCES}", *parts, "-o", str(program)], capture_output=True)
    if made.returncode and b"sanitize" in made.stderr or b"asan" in made.stderr:
        pytest.skip("this compiler has no address sanitizer")
    assert made.returncode == 0, made.stderr.decode()[:3000]
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr[:3000]


def numbers(words: list[str], runner: list[str], program: Path) -> np.ndarray:
    """What the program computes, built by a compiler and run."""
    command = [*words, "-std=c++17", "-O2", "-Wno-psabi", "-static", "-pthread", f"-I{SOURCES}", str(PROGRAM)]
    subprocess.run([*command, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(program)], check=True)
    done = subprocess.run([*runner, str(program), "numbers"], capture_output=True, check=True, timeout=600)
    return np.frombuffer(done.stdout, dtype=np.float32)


@pytest.mark.slow
def test_an_arm_processor_computes_the_same_numbers(tmp_path: Path):
    """Emulated: NEON's vectors have the width of SSE2's, so that all that is kept lies at the same places."""
    names = ("aarch64-linux-gnu-g++", "qemu-aarch64", "g++")
    found = [shutil.which(name) for name in names]
    if not all(found) or platform.machine() != "x86_64":
        pytest.skip(f"needs {', '.join(names)} on x86-64")
    arm = numbers([found[0]], [found[1]], tmp_path / "arm")
    here = numbers([found[2], "-march=x86-64"], [], tmp_path / "here")
    assert len(arm) == len(here) > 100_000 and np.isfinite(here).all()
    np.testing.assert_allclose(arm, here, rtol=3e-4, atol=2e-5)
