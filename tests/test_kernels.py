"""Kernels compiled ahead are what jobs then load."""

import pytest

from rwkvpipe import kernels
from rwkvpipe.base import compiler as compilers
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.kernel import build


def test_every_level_of_this_machine_is_compiled_once(tmp_path, monkeypatch, caplog):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" ] && [ "$1" != -o ]; do shift; done\n[ -z "$2" ] || echo > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("RWKVPIPE_KERNELS", str(tmp_path / "kept"))
    with caplog.at_level("INFO", logger="rwkvpipe"):
        kernels.main([])
        made = set((tmp_path / "kept").glob("*.so"))
        kernels.main([])
    assert len(made) == len(build.levels()) + 1 and made == set((tmp_path / "kept").glob("*.so"))
    assert caplog.text.count("compiling") == len(made) and caplog.text.count("used here") == 2
    assert sum(path.name.startswith("trie-") for path in made) == 1  # the tokenizer's


def test_what_an_old_compiler_does_not_know_is_left_out(tmp_path, monkeypatch, caplog):
    best, *_, least = build.levels()
    if best == least:
        pytest.skip("there is one kind of processor here")
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *{build.levels()[best][-1]}*) exit 1; esac\n'
        'while [ "$1" ] && [ "$1" != -o ]; do shift; done\n[ -z "$2" ] || echo > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("RWKVPIPE_KERNELS", str(tmp_path / "kept"))
    with caplog.at_level("INFO", logger="rwkvpipe"):
        kernels.main([])
    assert f"{best}: the compiler does not know it; processors that have it use what is less" in caplog.text
    assert not compilers.kept(build.name(best)) and compilers.kept(build.name(least))


def test_without_a_compiler_it_fails_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("RWKVPIPE_KERNELS", str(tmp_path / "kept"))
    with pytest.raises(ConfigError, match="cannot be compiled"):
        kernels.main([])


def test_kernels_of_a_card_are_compiled_ahead_where_there_is_no_card(tmp_path, monkeypatch, caplog):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" != --version ] || echo "nvcc: NVIDIA\nCuda compilation tools, release 13.0, V13"\n'
        f'echo "$@" >> {tmp_path}/asked\nwhile [ "$1" ] && [ "$1" != -o ]; do shift; done\n[ -z "$2" ] || echo > "$2"\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CXX", str(nvcc))
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setenv("RWKVPIPE_KERNELS", str(tmp_path / "kept"))
    with caplog.at_level("INFO", logger="rwkvpipe"):
        kernels.main(["--card", "sm_80", "--card", "sm_90"])
    assert len(list((tmp_path / "kept").glob("cuda-sm_80-*.so"))) == 1
    assert len(list((tmp_path / "kept").glob("cuda-sm_90-*.so"))) == 1
    assert "-arch=sm_90" in (tmp_path / "asked").read_text()
    assert "(Cuda compilation tools, release 13.0, V13)" in caplog.text
