import re
import sys

from rwkvpipe.show import machine


def test_versions_are_those_that_run():
    assert machine.software()["python"] == ".".join(map(str, sys.version_info[:3]))
    assert re.match(r"\d+\.\d+", machine.software()["torch"]) and re.match(r"\d+\.\d+", machine.software()["rwkvpipe"])


def test_what_the_system_does_not_tell_is_left_out_or_unknown():
    found = machine.hardware()
    assert {"Processor", "Cores", "Graphics", "System"} <= set(found) and all(found.values())


def test_the_commit_is_found_loose_packed_and_detached(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() is None
    (tmp_path / ".git/refs/heads").mkdir(parents=True)
    (tmp_path / ".git/HEAD").write_text("ref: refs/heads/main\n")
    assert machine.commit() is None
    (tmp_path / ".git/packed-refs").write_text(f"# pack-refs\n{'b' * 40} refs/heads/main\n")
    assert machine.commit() == "b" * 40
    (tmp_path / ".git/refs/heads/main").write_text("a" * 40 + "\n")
    assert machine.commit() == "a" * 40
    (tmp_path / ".git/HEAD").write_text("c" * 40 + "\n")
    assert machine.commit() == "c" * 40
