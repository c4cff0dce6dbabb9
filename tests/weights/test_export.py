"""Whatever a model is exported to is read back as the same model."""

import json

import numpy as np
import pytest
import torch

from rwkvpipe.base.config import ExportConfig, RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.model.family import build
from rwkvpipe.tokenizer import chat
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.integer import IntegerTokenizer
from rwkvpipe.tokenizer.load import load_tokenizer, save_tokenizer
from rwkvpipe.tokenizer.template import ChatTemplate, load_template
from rwkvpipe.tokenizer.trie import TrieTokenizer
from rwkvpipe.weights import store
from rwkvpipe.weights.card import TEMPLATE
from rwkvpipe.weights.export import export

OUT = {"safetensors": "a/model.safetensors", "pth": "a/m.pth", "gguf": "a/m.gguf", "hub": "hub", "hf": "hf"}
FORMATS = {"rwkv5": ("safetensors", "pth", "hub"), "rwkv6": ("safetensors", "pth", "hub", "gguf"), "rwkv7": tuple(OUT)}
EACH = [(family, format, {}) for family, formats in FORMATS.items() for format in formats]
EACH += [(family, format, {"time_state": True}) for family in ("rwkv6", "rwkv7") for format in FORMATS["rwkv5"]]


def some(family, dtype=torch.float32, **sizes):
    config = build(RwkvConfig(**({"n_layer": 2, "n_embd": 64, "vocab_size": 300, "family": family} | sizes))).config
    stream = torch.Generator().manual_seed(5)
    model = build(config)
    tensors = {name: torch.randn(value.shape, generator=stream) for name, value in model.state_dict().items()}
    return config, {name: value.to(dtype) for name, value in tensors.items()}


def given(tmp_path, *of, **sizes):
    config, tensors = some(*of, **sizes)
    store.write(tmp_path / "given" / "model.safetensors", config, tensors)
    return tmp_path / "given" / "model.safetensors", config, tensors


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize(("family", "format", "sizes"), EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format_comes_back_bit_for_bit(tmp_path, family, format, sizes, dtype):
    path, config, tensors = given(tmp_path, family, dtype, **sizes)
    export(path, tmp_path / OUT[format], ExportConfig(format=format))
    found, read = store.read(tmp_path / OUT[format])
    assert found == config
    same(read, tensors)


WAYS: list[tuple] = [(None, {})]  # as it was given
WAYS += [(format, {}) for format in OUT]
WAYS += [(format, {"shard_bytes": 200_000}) for format in ("hub", "hf")]


@pytest.mark.parametrize(("format", "more"), WAYS)
def test_a_trained_model_gives_the_given_logits_from_every_format(tmp_path, shared_data, format, more):
    folder = shared_data / "tiny-rwkv7"
    if not folder.is_dir():
        pytest.skip("tiny-rwkv7 is not here")
    data = np.load(folder / "tiny-x070.npz", allow_pickle=False)
    path = folder / "tiny-x070.pth"
    if format is not None:
        export(path, tmp_path / OUT[format], ExportConfig(format=format, **more), tokenizer="bytes")
        path = tmp_path / OUT[format]
    with torch.no_grad():
        logits, _ = store.load_model(path)(torch.from_numpy(data["tokens"])[None])
    np.testing.assert_allclose(logits[0], data["logits"], rtol=0, atol=2e-5)


def test_a_pth_file_has_all_that_rwkv_lm_loads_strictly(tmp_path):
    path, _, tensors = given(tmp_path, "rwkv7", torch.bfloat16)
    export(path, tmp_path / "m.pth", ExportConfig(format="pth"))
    found = torch.load(tmp_path / "m.pth", weights_only=True)
    rank = tensors["blocks.1.att.v1"].shape[1]
    dead = {"blocks.0.att.v0": (1, 1, 64), "blocks.0.att.v1": (64, rank), "blocks.0.att.v2": (rank, 64)}
    assert {name: tuple(found[name].shape) for name in found.keys() - tensors.keys()} == dead
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert {tuple(found[f"blocks.1.att.{name}"].shape) for name in ("x_r", "w0", "k_k")} == {(1, 1, 64)}


def test_layer_0_s_unread_tensors_survive_from_pth_to_safetensors_and_back(tmp_path):
    _, tensors = some("rwkv7")
    rank = tensors["blocks.1.att.v1"].shape[1]
    tensors["blocks.0.att.v0"], tensors["blocks.0.att.v1"] = torch.rand(1, 1, 64), torch.rand(64, rank)
    tensors["blocks.0.att.v2"] = torch.rand(rank, 64)
    torch.save(tensors, tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "b.safetensors", ExportConfig(format="safetensors"))
    export(tmp_path / "b.safetensors", tmp_path / "c.pth", ExportConfig(format="pth"))
    same(torch.load(tmp_path / "c.pth", weights_only=True), tensors)


def test_other_numbers_are_rounded_once_and_never_become_infinite(tmp_path):
    path, _, tensors = given(tmp_path, "rwkv7")
    export(path, tmp_path / "b.pth", ExportConfig(format="pth", dtype="bf16"))
    same(store.read(tmp_path / "b.pth")[1], {name: value.bfloat16() for name, value in tensors.items()})
    tensors["head.weight"][0, 0] = 1e5
    torch.save(tensors, tmp_path / "large.pth")
    with pytest.raises(WeightsError, match=r"head\.weight has numbers that fp16 has no room for"):
        export(tmp_path / "large.pth", tmp_path / "c.pth", ExportConfig(format="pth", dtype="fp16"))


REFUSED = [
    ("hf", {"family": "rwkv6"}, "format hf is that of RWKV-7"),
    ("hf", {"family": "rwkv7", "head_size": 32}, "another epsilon"),
    ("pth", {"family": "rwkv7", "ln0": False}, "needs ln0"),
    ("gguf", {"family": "rwkv5"}, "llama.cpp knows"),
    ("gguf", {"family": "rwkv6", "time_state": True}, "has no place for time_state; use safetensors, pth or hub"),
    ("gguf", {"family": "rwkv7", "time_state": True}, "time_state"),
    ("hf", {"family": "rwkv7", "time_state": True}, "time_state"),
]


@pytest.mark.parametrize(("format", "sizes", "said"), REFUSED)
def test_what_a_format_has_no_place_for_is_refused(tmp_path, format, sizes, said):
    path, _, _ = given(tmp_path, **sizes)
    with pytest.raises(WeightsError, match=said):
        export(path, tmp_path / OUT[format], ExportConfig(format=format))
    assert not (tmp_path / OUT[format]).exists()


def test_programs_that_pass_states_over_are_named(tmp_path, caplog):
    path, _, _ = given(tmp_path, "rwkv7", time_state=True)
    export(path, tmp_path / "m.pth", ExportConfig(format="pth"))
    assert [row.getMessage() for row in caplog.records if row.levelname == "WARNING"] == [
        f"{tmp_path}/m.pth: has time_state, which of RWKV-7 the package rwkv passes over and RWKV-LM refuses"
    ]


def test_a_folded_embedding_has_its_place_in_hugging_face_s_layout(tmp_path):
    path, config, tensors = given(tmp_path, "rwkv7", ln0=False)
    export(path, tmp_path / "hf", ExportConfig(format="hf"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["norm_first"] is False
    same(store.read(tmp_path / "hf")[1], tensors)


@pytest.mark.parametrize("format", ["hub", "hf"])
def test_large_weights_are_written_in_shards_with_their_index(tmp_path, format):
    path, config, tensors = given(tmp_path, "rwkv7", torch.bfloat16)
    limit = max(value.nbytes for value in tensors.values())
    for bytes_of_a_shard in (None, limit, limit // 2, 10**9, limit):  # what another form left is gone each time
        export(path, tmp_path / "m", ExportConfig(format=format, shard_bytes=bytes_of_a_shard))
        found, read = store.read(tmp_path / "m")
        assert found == config
        same(read, tensors)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    files = {file.name for file in (tmp_path / "m").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 2
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    for file in files:
        assert sum(value.nbytes for value in store.read_tensors(tmp_path / "m" / file)[0].values()) <= limit


WORDS = TrieTokenizer({1: b"a", 2: b"\n", 3: b"\n\n", 4: "é".encode(), 5: b"\xff", 6: b" a"})


@pytest.mark.parametrize("tokenizer", [WORDS, ByteTokenizer(1), ByteTokenizer(0), IntegerTokenizer(40)])
@pytest.mark.parametrize("format", ["hub", "hf"])
def test_a_folder_brings_its_vocabulary(tmp_path, tokenizer, format):
    path, _, _ = given(tmp_path, "rwkv7")
    save_tokenizer(tmp_path / "words", tokenizer)
    export(path, tmp_path / "m", ExportConfig(format=format), tokenizer=str(tmp_path / "words"))
    found = load_tokenizer(tmp_path / "m")
    text = "1 2 39" if isinstance(tokenizer, IntegerTokenizer) else "a aé\n\n"
    assert found.encode(text) == tokenizer.encode(text)
    ends = {id(WORDS): 3}.get(id(tokenizer), tokenizer.eos)
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "m" / file).read_text())["eos_token_id"] == ends


def test_a_vocabulary_larger_than_the_model_s_is_refused(tmp_path):
    path, _, _ = given(tmp_path, "rwkv7", vocab_size=30)
    with pytest.raises(WeightsError, match=r"bytes: has 256 ids, .* has 30"):
        export(path, tmp_path / "hub", ExportConfig(format="hub"), tokenizer="bytes")


def test_the_hub_s_settings_tell_the_true_sizes(tmp_path):
    path, config, _ = given(tmp_path, "rwkv7", d_decay=24, d_aaa=24, d_mv=12, d_gate=40)
    save_tokenizer(tmp_path / "words", WORDS)
    spec = ExportConfig(format="hub", ctx_len=512)
    export(path, tmp_path / "m", spec, tokenizer=str(tmp_path / "words"))
    described = json.loads((tmp_path / "m" / "config.json").read_text())
    sizes = {"n_layer": 2, "n_embd": 64, "vocab_size": 300, "head_size_a": 64, "dim_ffn": 256, "ctx_len": 512}
    ranks = {"dim_att_lora": 24, "dim_mv_lora": 12, "dim_gate_lora": 40, "my_testing": "x070", "model_type": "rwkv7"}
    assert described.items() >= (sizes | ranks).items()
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "RWKV_TOKENIZER" and settings["model_max_length"] == 512
    talk = [{"role": "user", "content": "a"}]
    assert load_template(tmp_path / "m").text(talk, prompt=True) == "User: a\n\nAssistant:"


TALKS = [
    [{"role": "user", "content": " hello\n\n\nthere\r\n\r\nyou "}],
    [{"role": "system", "content": "Be\n\nkind."}, {"role": "user", "content": "{{ 1 }}"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n\nc "}, {"role": "user", "content": "\n"}],
    [{"role": "tool", "content": "42"}, {"role": "tool", "content": "Function output:\n7"}],
]


@pytest.mark.parametrize("talk", TALKS)
def test_the_template_lays_talks_out_as_they_were_learned(talk):
    template = ChatTemplate(TEMPLATE)
    assert template.text(talk) == chat.text(talk)
    assert template.text(talk, prompt=True) == chat.prompt(talk)


def test_the_page_tells_sizes_scores_and_what_was_said_about_the_model(tmp_path):
    path, _, tensors = given(tmp_path, "rwkv7", torch.bfloat16)
    score = {"benchmark": "exam", "task": "answer", "n": 1500, "score": 0.91234, "low": 0.9, "high": 0.925}
    (tmp_path / "exam.json").write_text(json.dumps(score | {"better": "higher"}))
    spec = ExportConfig(format="hub", name="sums", about="It adds.")
    export(path, tmp_path / "m", spec, scores=[str(tmp_path / "exam.json")])
    page = (tmp_path / "m" / "README.md").read_text()
    assert "# sums\n" in page and "It adds." in page and "bfloat16" in page
    assert f"{sum(value.numel() for value in tensors.values()):,} parameters" in page
    assert "| exam | 0.9123 | 0.9 to 0.925 | 1,500 | higher |" in page
