"""The native kernels are compiled once, by one process, for one compiler; without them PyTorch computes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvpipe.base import compiler
from rwkvpipe.kernel import build
from rwkvpipe.kernel.wkv7 import wkv7

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty folder to keep kernels in, and a process that has loaded none."""
    monkeypatch.setenv("RWKVPIPE_KERNELS", str(tmp_path / "kernels"))
    build._loaded.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    build._loaded.cache_clear()


@pytest.fixture
def library(monkeypatch):
    """The file of this processor's kernels, as any run here compiles it."""
    monkeypatch.delenv("RWKVPIPE_KERNELS", raising=False)
    if compiler.command() is None:
        pytest.skip("there is no C++ compiler here")
    return build.compiled(build.level())[0]


def stand_in(folder: Path, library: Path, *, does: str = "") -> str:
    """A compiler that takes its time, writes a line for each start, and then writes `library`."""
    script = folder / "stand-in"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo stand-in 1.0; exit; fi\necho "$*" >> {folder}/starts\n{does}\n'
        f'sleep 0.1\nwhile [ "$1" != -o ]; do shift; done\ncp {library} "$2"\n'
    )
    script.chmod(0o755)
    return str(script)


def computes(natively: bool, caplog) -> None:
    build._said.clear()
    with caplog.at_level("INFO", logger="rwkvpipe"):
        x = torch.rand(1, 3, 1, 8)
        y, _ = wkv7(x, x, x, x, x, x)
    assert y.isfinite().all()
    assert ("wkv7 and what surrounds it native on cpu" if natively else "surrounds it in PyTorch") in caplog.text


def test_processes_that_start_at_once_compile_once(library, fresh, monkeypatch):
    monkeypatch.setenv("CXX", stand_in(fresh, library))
    program = "import sys; from rwkvpipe.kernel import build; sys.exit(build.extension() is None)"
    started = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) for _ in range(2)]
    assert [each.wait() for each in started] == [0, 0]
    starts = [line for line in (fresh / "starts").read_text().splitlines() if "-x c++ -" not in line]
    sources = [re.search(r"-c \S+/(\S+)\.cpp", line) for line in starts]
    assert sorted(found[1] for found in sources if found) == sorted(x.stem for x in build._sources())
    assert sources.index(None) == len(starts) - 1  # then all of them are joined, once


def test_without_a_compiler_pytorch_computes_and_says_why(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    computes(False, caplog)
    assert "there is no C++ compiler: install g++" in caplog.text


def test_without_a_compiler_what_was_compiled_ahead_is_used(library, fresh, monkeypatch, caplog):
    (fresh / "kernels").mkdir()
    shutil.copy(library, fresh / "kernels")
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    computes(True, caplog)
    assert "compiled elsewhere" in caplog.text


@pytest.mark.parametrize("old", ["compiler", "assembler"])
def test_what_is_too_old_for_this_processor_makes_what_is_less(old, library, fresh, monkeypatch, caplog):
    best, *less = build._had()
    if not less or (old == "assembler" and best not in build.NEWEST):
        pytest.skip("this processor has no more than others")
    flags = build.levels()
    unknown = next(flag for flag in flags[best] if flag not in flags[less[0]])
    refuses = f'case "$*" in *{unknown}*) echo error: no such option >&2; exit 1; esac'
    if old == "assembler":
        instruction = build.NEWEST[best].split()[0]
        refuses = f'case "$*" in *"-x c++ -"*) if grep -q {instruction}; then exit 1; fi; esac'
    monkeypatch.setenv("CXX", stand_in(fresh, build.compiled(less[0])[0], does=refuses))
    assert build.level() == less[0]
    computes(True, caplog)
    assert f"{less[0]} (no compiler here that knows {best}), " in caplog.text
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX")
    build._loaded.cache_clear()
    assert build.level() == less[0]  # and where it was compiled ahead by such a one
    computes(True, caplog)
    assert "compiled elsewhere" in caplog.text


def test_a_compiler_that_fails_leaves_nothing_and_pytorch_computes(library, fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", stand_in(fresh, library, does="echo 'x.cpp:1: error: no such thing' >&2; exit 1"))
    computes(False, caplog)
    assert "no such thing" in caplog.text
    assert not list((fresh / "kernels").glob("*.so*"))


def test_sources_that_change_while_they_are_compiled_make_no_library(library, fresh, monkeypatch, caplog):
    sources = fresh / "sources"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("CXX", stand_in(fresh, library, does=f"echo // >> {sources}/vector.h"))
    computes(False, caplog)
    assert ".so: the sources changed while they were compiled: start again)" in caplog.text
    assert "Errno" not in caplog.text
    assert not list((fresh / "kernels").glob("*.so*"))


def test_what_else_changes_beside_the_sources_does_not_matter(library, fresh, monkeypatch, caplog):
    sources = fresh / "sources"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("CXX", stand_in(fresh, library, does=f"echo // >> {sources}/.vector.h.swp"))
    computes(True, caplog)


def test_a_folder_that_cannot_be_written_does_not_stop_a_run(fresh, monkeypatch, caplog):
    (fresh / "file").write_text("")
    monkeypatch.setenv("RWKVPIPE_KERNELS", str(fresh / "file" / "kernels"))
    computes(False, caplog)


def test_kernels_can_be_turned_off(fresh, monkeypatch, caplog):
    monkeypatch.setenv("RWKVPIPE_KERNELS", "torch")
    computes(False, caplog)
    assert "RWKVPIPE_KERNELS turns them off" in caplog.text


def test_another_compiler_source_or_level_is_another_file(library, fresh, monkeypatch):
    monkeypatch.setenv("CXX", stand_in(fresh, library))
    first, _ = build.compiled(build.level())
    script = Path(compiler.command()[0])
    script.write_text(script.read_text().replace("1.0", "1.1"))
    newer, _ = build.compiled(build.level())
    sources = fresh / "sources"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.compiled(build.level())[0] == newer
    (sources / "vector.h").write_text((sources / "vector.h").read_text() + "\n")
    changed, _ = build.compiled(build.level())
    assert len({first, newer, changed, *(build.name(level) for level in build.levels())}) == 3 + len(build.levels())


def test_the_line_of_the_native_kernels_names_vectors_threads_and_compiler(library, monkeypatch, caplog):
    build._loaded.cache_clear()
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores + 3)
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores + 3))
    computes(True, caplog)
    assert f"{build.level()}, {cores + 3} threads, as OMP_NUM_THREADS says (" in caplog.text
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert compiler.why_threads(cores) == "one a core"
    assert compiler.why_threads(cores + 3) == f"as torch was told, of {cores} cores"
