"""The tables in the docs are those of the runs kept beside them."""

import json

from benchmarks import equal, tables


def test_the_tables_are_made_of_the_runs_beside_them():
    page = (tables.DOCS / "kernels.md").read_text(encoding="utf-8")
    assert tables.runs() and tables.filled(page) == page


def test_the_table_of_precision_is_made_of_the_run_beside_it():
    page = (tables.DOCS / "memory.md").read_text(encoding="utf-8")
    assert "<!-- precision 2x64 -->" in page and tables.rounded(page) == page


def test_the_tables_of_inference_are_made_of_the_runs_beside_them():
    page = (tables.DOCS / "inference.md").read_text(encoding="utf-8")
    assert page.count("<!-- end -->") == len(tables.INFERENCE) and tables.inferred(page) == page


def test_the_tables_of_training_are_made_of_the_run_beside_them():
    page, found = (equal.DOCS / "training.md").read_text(), json.loads((equal.DOCS / "training.jsonl").read_text())
    assert page.count("<!-- end -->") == 2 and equal.filled(page, found) == page
    assert all(each["loss"] < 1e-5 and each["gradient"] < 1e-4 for each in found["equal"])
    for family in equal.FAMILIES:
        long = [each for each in found["long"] if each.get("family", "rwkv7") == family]
        held = [each["megabytes"] for each in long if each["bptt"] == "truncated"]
        assert not held or max(held) < 1.1 * min(held), family
