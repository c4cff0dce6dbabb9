"""The GPU's kernels compile for every kind of card, and what the compiler says of them is what the page says."""

import json

import pytest

from benchmarks import counts, registers, tables
from rwkvpipe.base import compiler
from rwkvpipe.kernel import gpu

REPORT = json.loads(registers.REPORT.read_text())
COUNTS = json.loads(counts.REPORT.read_text())
needs_nvcc = pytest.mark.skipif(compiler.nvcc() is None, reason="there is no nvcc here")


def checked(file, target):
    """What nvcc says now; where it is the one of the report it must say the same."""
    found = registers.report(gpu.SOURCES / file, target)
    if compiler.version(compiler.nvcc()) == REPORT["nvcc"]:
        assert found == [line for line in REPORT["kernels"] if (line["file"], line["target"]) == (file, target)]
    return found


def within_limits(lines):
    for line in lines:
        assert line["registers"] <= 255
        assert line["spilled"] <= 512, line  # bytes of a thread; those that a card computes with lie in registers


def test_the_report_is_of_the_sources_as_they_are_and_the_page_shows_it():
    assert REPORT["sources"] == gpu.name(), "run `python -m benchmarks registers`"
    page = (tables.DOCS / "gpu.md").read_text(encoding="utf-8")
    assert tables.reported(page) == page
    assert {line["target"] for line in REPORT["kernels"]} >= {"sm_80", "sm_90a"}
    assert {line["file"] for line in REPORT["kernels"]} == {file.name for file in gpu.sources()}
    within_limits(REPORT["kernels"])


def test_the_counts_are_of_the_sources_as_they_are():
    assert COUNTS["sources"] == gpu.name(), "run `python -m benchmarks counts`"
    assert len(COUNTS["lines"]) == 8 + 2 * len(counts.AROUND) + 3
    assert "<!-- counts -->" in (tables.DOCS / "gpu.md").read_text(encoding="utf-8")


@needs_nvcc
def test_the_smallest_kernels_compile_with_as_many_registers_as_reported():
    assert checked("blend.cu", "sm_90a")


@needs_nvcc
@pytest.mark.large
def test_all_kernels_compile_for_all_kinds_of_card():
    for file in gpu.sources():
        for target in registers.targets():
            within_limits(checked(file.name, target))


@needs_nvcc
@pytest.mark.large
def test_all_kernels_compile_for_the_oldest_kind_of_card_that_the_compiler_knows():
    for file in gpu.sources():
        assert registers.report(file, registers.known()[0])


@needs_nvcc
def test_a_card_that_the_compiler_no_longer_knows_is_told_in_a_line(monkeypatch, tmp_path):
    monkeypatch.setenv("RWKVPIPE_KERNELS", str(tmp_path))
    with pytest.raises(OSError, match="Unsupported gpu architecture") as told:
        gpu.compiled("sm_20")
    assert "\n" not in compiler.reason(told.value)


def test_a_report_is_read_as_the_compiler_writes_it():
    said = "ptxas info    : Compiling entry function '_Z3runIN1_8BackwardI5ShapeILi64EEEEEvT_' for 'sm_80'\n"
    said += "    80 bytes stack frame, 200 bytes spill stores, 140 bytes spill loads\n"
    said += "ptxas info    : Used 128 registers, used 1 barriers\n"
    wanted = {"file": "x.cu", "kernel": "Backward", "width": 64, "target": "sm_80"}
    assert registers.parsed("x.cu", said) == [wanted | {"registers": 128, "spilled": 200, "reloaded": 140}]
    ways = {"n1ELi1": "any kinds", "0ELi4": "fp32", "3ELi4": "bf16", "263ELi4": "bf16, decays fp32"}
    for way, kinds in ways.items():
        (found,) = registers.parsed("x.cu", said.replace("8BackwardI5ShapeILi64", f"6SquareI3WayILl{way}"))
        assert (found["kernel"], found["width"]) == (f"Square, {kinds}", 0)
    ways = {"2ELi8": ("matrices in bf16", 8), "2ELb0": ("matrices in bf16", 0), "4ELb0": ("all in fp32", 0)}
    ways |= {"1ELi8": ("matrices in int8", 8), "2ELb1": ("all in bf16", 0)}
    for way, (kinds, rows) in ways.items():
        (found,) = registers.parsed("x.cu", said.replace("8BackwardI5ShapeILi64", f"3FewILi{way}"))
        assert (found["kernel"], found["width"]) == (f"Few, {kinds}", rows)
    (found,) = registers.parsed("x.cu", said.replace("8BackwardI5ShapeILi64", "14ChunksBackwardILi4ELb1"))
    assert (found["kernel"], found["width"]) == ("ChunksBackward", 4)
