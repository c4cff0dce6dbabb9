"""The fingerprint changes with the code that runs, and with nothing else."""

from pathlib import Path

import pytest

from rwkvpipe.base import fingerprint as f

ROOT = Path(__file__).resolve().parents[2] / "rwkvpipe"


class Package:
    """A small package on disk; each call sees it with fresh eyes."""

    def __init__(self, root: Path):
        self.root = root
        self.write("__init__.py", "VERSION = 1\n")
        self.write("train.py", "from pack.low import loop\n\n\ndef main():\n    '''Train.'''\n    return loop.go(1)\n")
        self.write("score.py", "import pack.low.grade as grade\n\nRIGHT = grade.ONE\n")
        self.write("low/__init__.py", "")
        self.write("low/loop.py", "from . import state\n\n\ndef go(n: int):\n    return state.ZERO + n\n")
        self.write("low/state.py", "ZERO = 0\n")
        self.write("low/grade.py", "ONE = 1\n")

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def __call__(self, verb: str = "train") -> str:
        f._scan.cache_clear()
        f.modules.cache_clear()
        return f.fingerprint(verb, self.root)


@pytest.fixture
def package(tmp_path):
    yield Package(tmp_path / "pack")
    f._scan.cache_clear()
    f.modules.cache_clear()


def test_it_names_the_verb_and_stays_the_same(package):
    assert package().startswith("train@") and package() == package()


def test_comments_docstrings_and_layout_do_not_count(package):
    before = package()
    imports = "from pack.low import (\n    loop,\n)  # why\n"
    package.write("train.py", f"'''Docs.'''\n{imports}\ndef main():\n    return loop.go( 1 )\n")
    package.write("low/state.py", "# zero\n\nZERO = 0\n'''What ZERO is.'''\n")
    assert package() == before


@pytest.mark.parametrize("text", ["ZERO = 1", "ZERO = 0.0", "ZERO = '0'", "ONE = 0"])
def test_code_of_an_imported_module_counts(package, text):
    before = package()
    package.write("low/state.py", text)
    assert package() != before


def test_default_arguments_and_annotations_count(package):
    before = package()
    package.write("low/loop.py", "from . import state\n\n\ndef go(n: int = 3):\n    return state.ZERO + n\n")
    assert package() != before


def test_code_of_other_verbs_does_not_count(package):
    train, score = package(), package("score")
    package.write("low/grade.py", "ONE = 2\n")
    assert package() == train and package("score") != score


def test_an_import_inside_a_function_counts(package):
    package.write("train.py", "def main():\n    from pack.low.grade import ONE\n    return ONE\n")
    before = package()
    package.write("low/grade.py", "ONE = 2\n")
    assert package() != before


def test_the_init_of_a_folder_counts_and_that_of_the_package_does_not(package):
    before = package()
    package.write("__init__.py", "VERSION = 2\n")
    assert package() == before
    package.write("low/__init__.py", "FLAG = 1\n")
    assert package() != before


def test_tracked_files_count_by_content(package):
    package.write("low/state.py", "TRACKED_FILES = ['../../native/*.cu']\nZERO = 0\n")
    with pytest.raises(LookupError, match=r"state.py:1: TRACKED_FILES names .*no such file"):
        package()
    (package.root.parent / "native").mkdir()
    source = package.root.parent / "native/op.cu"
    source.write_text("// one")
    before = package()
    source.write_text("// two")
    assert package() != before


def test_tracked_python_counts_as_imported(package):
    package.write("low/plugin.py", "from pack.low import deep\n")
    package.write("low/deep.py", "NUMBER = 1\n")
    package.write("low/state.py", "TRACKED_FILES = ['plug*.py']\nZERO = 0\n")
    before = package()
    package.write("low/plugin.py", "# a comment\nfrom pack.low import deep\n")
    assert package() == before
    package.write("low/deep.py", "NUMBER = 2\n")
    assert package() != before


def test_an_unknown_verb_is_an_error(package):
    with pytest.raises(LookupError, match="there is no verb sing"):
        package("sing")


def test_other_code_than_planned_is_seen(package):
    planned = package()
    assert f.still(planned, package.root)
    package.write("low/state.py", "ZERO = 9\n")
    assert package() != planned
    assert not f.still(planned, package.root)


def test_training_code_counts_for_training_verbs_only():
    verbs = ("settings", "init", "pretrain", "sft", "grpo")
    assert {verb for verb in verbs if "rwkvpipe.train.loop" in f.modules(verb)} == {"pretrain", "sft", "grpo"}
    assert "rwkvpipe.base.config" in f.modules("settings")
