"""Merging puts an adapter into its own weights, and into no others."""

import json

import pytest
import torch

from rwkvpipe import merge
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.weights import store


def test_merging_changes_what_the_adapter_names_and_nothing_else(tmp_path, pair):
    base, adapter, model = pair
    out = tmp_path / "merged" / "model.safetensors"
    merge.main(["--model", str(base), "--adapter", str(adapter), "--out", str(out)])
    before, after = store.read(base)[1], store.read(out)[1]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value", "att.ln_x")
    assert changed == {n for n in before if n.removeprefix("blocks.")[2:].rpartition(".")[0] in matrices}
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert json.loads((out.parent / "config.json").read_text())["n_embd"] == 32
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(store.load_model(out)(ids)[0], model(ids)[0], atol=0.05, rtol=0.05)


def test_an_adapter_goes_with_its_own_weights_only(tmp_path, pair):
    base, adapter, _ = pair
    other = tmp_path / "other.safetensors"
    store.write_tensors(other, {name: value + 1 for name, value in store.read(base)[1].items()})
    with pytest.raises(WeightsError, match="beside other weights"):
        merge.main(["--model", str(other), "--adapter", str(adapter), "--out", str(tmp_path / "m.safetensors")])
    with pytest.raises(WeightsError, match="no adapter"):
        merge.main(["--model", str(base), "--adapter", str(base), "--out", str(tmp_path / "m.safetensors")])
    assert not (tmp_path / "m.safetensors").exists()
