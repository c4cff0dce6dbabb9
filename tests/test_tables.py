"""The tables in the docs are those of the runs kept beside them."""

from benchmarks import tables


def test_the_tables_are_made_of_the_runs_beside_them():
    page = (tables.DOCS / "kernels.md").read_text(encoding="utf-8")
    assert tables.runs() and tables.filled(page) == page


def test_the_tables_of_inference_are_made_of_the_runs_beside_them():
    page = (tables.DOCS / "inference.md").read_text(encoding="utf-8")
    assert page.count("<!-- end -->") == len(tables.INFERENCE) and tables.inferred(page) == page
