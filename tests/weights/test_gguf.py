"""GGUF files hold what llama.cpp asks for, and come back bit for bit."""

import random

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import WeightsError
from rwkvpipe.model.family import build
from rwkvpipe.weights import store
from rwkvpipe.weights.gguf import Words, words, write_gguf
from rwkvpipe.weights.tensors import Tensors, held

SIZES = {"n_layer": 2, "n_embd": 64, "head_size": 32, "vocab_size": 12}
# (rows, columns) as numpy has them; llama.cpp counts from the other end
SEVEN = {
    "token_embd.weight": (12, 64),
    "token_embd_norm.bias": (64,),
    "output_norm.weight": (64,),
    "output.weight": (12, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.1.attn_norm_2.bias": (64,),
    "blk.0.time_mix_w0.weight": (64,),
    "blk.0.time_mix_w1.weight": (24, 64),
    "blk.0.time_mix_w2.weight": (64, 24),
    "blk.0.time_mix_v1.weight": (20, 64),  # of the rank of a, as nobody reads it
    "blk.1.time_mix_v1.weight": (12, 64),
    "blk.1.time_mix_g2.weight": (64, 40),
    "blk.1.time_mix_lerp_fused.weight": (6, 1, 1, 64),
    "blk.1.time_mix_k_a.weight": (64,),
    "blk.1.time_mix_r_k.weight": (64,),
    "blk.1.time_mix_receptance.weight": (64, 64),
    "blk.1.time_mix_ln.bias": (64,),
    "blk.1.channel_mix_lerp_k.weight": (64,),
    "blk.1.channel_mix_key.weight": (256, 64),
    "blk.1.channel_mix_value.weight": (64, 256),
}
SIX = {
    "blk.0.time_mix_w1.weight": (5 * 16, 64),
    "blk.0.time_mix_w2.weight": (5, 64, 16),
    "blk.0.time_mix_decay.weight": (64,),
    "blk.0.time_mix_decay_w1.weight": (24, 64),
    "blk.0.time_mix_decay_w2.weight": (64, 24),
    "blk.0.time_mix_first.weight": (2, 32),
    "blk.0.time_mix_lerp_x.weight": (64,),
    "blk.0.time_mix_lerp_fused.weight": (5, 1, 1, 64),
    "blk.1.time_mix_gate.weight": (64, 64),
    "blk.1.channel_mix_lerp_r.weight": (64,),
    "blk.1.channel_mix_receptance.weight": (64, 64),
}
FAMILIES = {
    "rwkv7": (RwkvConfig(**SIZES, d_decay=24, d_aaa=20, d_mv=12, d_gate=40), SEVEN, 2 * 28 + 6),
    "rwkv6": (RwkvConfig(**SIZES, family="rwkv6", d_mix=16, d_decay=24), SIX, 2 * 24 + 6),
}


def some(config, dtype) -> Tensors:
    stream = torch.Generator().manual_seed(3)
    model = build(config)
    return held({n: torch.randn(v.shape, generator=stream).to(dtype) for n, v in model.state_dict().items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_bit_for_bit(tmp_path, family, dtype):
    tensors = some(FAMILIES[family][0], dtype)
    path = tmp_path / "m.gguf"
    write_gguf(path, build(FAMILIES[family][0]).config, tensors, name="m", vocabulary=Words())
    config, found = store.read(path)
    assert config == build(FAMILIES[family][0]).config
    assert found.keys() == tensors.keys()
    for name, value in found.items():
        assert value.dtype == dtype and value.shape == tensors[name].shape and torch.equal(value, tensors[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_numbers_are_those_that_llama_cpp_asks_for(tmp_path, family):
    config, wanted, count = FAMILIES[family]
    write_gguf(tmp_path / "m.gguf", build(config).config, some(config, torch.bfloat16), name="m", vocabulary=Words())
    reader = GGUFReader(tmp_path / "m.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert {name: tuple(reversed(found[name].shape.tolist())) for name in wanted} == wanted
    assert len(found) == count
    exact = {name for name, tensor in found.items() if tensor.tensor_type.name == "F32"}
    assert {tensor.tensor_type.name for tensor in found.values()} == {"F32", "BF16"}
    assert {"blk.1.time_mix_w1.weight", "blk.1.time_mix_lerp_fused.weight", "output_norm.weight"} <= exact
    assert not {"blk.1.time_mix_key.weight", "token_embd.weight", "output.weight"} & exact
    facts = {key: value.contents() for key, value in reader.fields.items()}
    assert facts["general.architecture"] == family and facts[f"{family}.block_count"] == 2
    assert facts[f"{family}.wkv.head_size"] == 32 and facts[f"{family}.embedding_length"] == 64
    assert facts["tokenizer.ggml.model"] == "no_vocab"


def test_a_vocabulary_is_written_byte_for_byte(tmp_path):
    entries = {1: b"\n", 2: b"a'b", 3: b'c"d', 4: b"\xff\\", 5: "é ".encode(), 7: b"'\"", 8: b"\n\n"}
    vocabulary = words(entries, 12, end=0, turn=8, template="{{ messages }}")
    config = FAMILIES["rwkv7"][0]
    write_gguf(tmp_path / "m.gguf", config, some(config, torch.float32), name="m", vocabulary=vocabulary)
    facts = {key: value.contents() for key, value in GGUFReader(tmp_path / "m.gguf").fields.items()}
    texts = facts["tokenizer.ggml.tokens"]
    for number, word in entries.items():  # as llama.cpp unescapes it: \xNN, \t, \n, \r, and any other letter itself
        assert texts[number].encode().decode("unicode_escape").encode("latin-1") == word
    assert texts[0] == "<s>" and texts[6] == "[PAD6]" and len(texts) == 12
    assert facts["tokenizer.ggml.token_type"] == [3, 1, 1, 1, 1, 1, 5, 1, 1, 5, 5, 5]
    assert facts["tokenizer.ggml.eos_token_id"] == 0 and facts["tokenizer.ggml.eot_token_id"] == 8
    assert facts["tokenizer.chat_template"] == "{{ messages }}"


def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path):
    five = build(RwkvConfig(**SIZES, family="rwkv5"))
    with pytest.raises(WeightsError, match="llama.cpp knows RWKV-6 and RWKV-7, this is rwkv5"):
        write_gguf(tmp_path / "m.gguf", five.config, held(five.state_dict()), name="m", vocabulary=Words())
    folded = build(RwkvConfig(**SIZES, ln0=False))
    with pytest.raises(WeightsError, match="needs ln0"):
        write_gguf(tmp_path / "m.gguf", folded.config, held(folded.state_dict()), name="m", vocabulary=Words())
    wide = some(FAMILIES["rwkv7"][0], torch.float64)
    with pytest.raises(WeightsError, match="float64"):
        write_gguf(tmp_path / "m.gguf", FAMILIES["rwkv7"][0], wide, name="m", vocabulary=Words())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.99])
def test_half_a_file_is_refused_in_one_line(tmp_path, share):
    config = FAMILIES["rwkv7"][0]
    path = tmp_path / "m.gguf"
    write_gguf(path, config, some(config, torch.float32), name="m", vocabulary=Words())
    data = path.read_bytes()
    path.write_bytes(data[: max(5, int(len(data) * share))])
    with pytest.raises(WeightsError, match=r"m\.gguf: damaged or cut short") as error:
        store.read(path)
    assert "\n" not in str(error.value)


def test_a_quantised_file_and_one_of_another_kind_of_model_are_named(tmp_path):
    for arch, kind, said in (("llama", "F32", "a GGUF file of a llama"), ("rwkv7", "Q8_0", r"quantised \(Q8_0\)")):
        writer = GGUFWriter(tmp_path / "m.gguf", arch)
        data = np.zeros((4, 32), np.float32) if kind == "F32" else np.zeros((4, 34), np.uint8)
        writer.add_tensor("output.weight", data, raw_dtype=GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(WeightsError, match=said):
            store.read(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["foo.weight", "blk.1.more.weight", "rope_freqs.weight"])
def test_a_tensor_that_no_model_has_is_named(tmp_path, name):
    writer = GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.add_wkv_head_size(64)
    writer.add_tensor(name, np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightsError, match=rf"m\.gguf: {name} is unknown in an rwkv7 model"):
        store.read(tmp_path / "m.gguf")


def test_any_damage_to_the_head_is_refused_in_one_line_or_harmless(tmp_path):
    config = FAMILIES["rwkv7"][0]
    path = tmp_path / "m.gguf"
    vocabulary = words({1: b"a", 2: b"bc"}, 12, end=0, turn=None, template="")
    write_gguf(path, config, some(config, torch.float16), name="m", vocabulary=vocabulary)
    data, lots = path.read_bytes(), random.Random(4)
    for _ in range(150):
        changed = bytearray(data)
        changed[lots.randrange(5000)] = lots.choice((0, 255, lots.randrange(256)))
        path.write_bytes(changed)
        try:
            store.sizes(path)
        except WeightsError as error:
            assert "\n" not in str(error) and str(path) in str(error)
