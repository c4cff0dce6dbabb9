"""Settings are checked before they are written."""

import json

import pytest

from rwkvpipe import settings
from rwkvpipe.base.errors import ConfigError


def test_settings_are_checked_and_filled_in(tmp_path):
    asked = {"kind": "pretrain", "seed": 4, "model": {"n_layer": 2}, "train": {"steps": 3}}
    settings.main(["--spec", json.dumps(asked), "--out", str(tmp_path / "settings.json")])
    assert json.loads((tmp_path / "settings.json").read_text())["train"]["ctx_len"] == 512
    unknown = '{"kind":"pretrain","seed":1,"train":{"steps":3,"warmupp":3}}'
    for spec, key in (("{", "--spec: not JSON"), (unknown, "did you mean warmup")):
        with pytest.raises(ConfigError, match=key):
            settings.main(["--spec", spec, "--out", str(tmp_path / "s.json")])
