"""Talks are laid out as the model's folder says, or in the form of released models."""

import json

import pytest
import torch

from rwkvpipe import generate
from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.base.errors import ConfigError, DataError
from rwkvpipe.base.files import read_jsonl
from rwkvpipe.infer.engine import Engine
from rwkvpipe.infer.layout import Layout, carried, find_layout
from rwkvpipe.model.family import build
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.load import save_tokenizer
from rwkvpipe.weights import store
from rwkvpipe.weights.card import TEMPLATE

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n\nyou"}]
WRITTEN = "<|end|>"
WRITTEN += "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n\nyou<|im_end|>\n<|im_start|>assistant\n"


def folder(home, template=CHATML, **more):
    (home / "hub").mkdir()
    words = {"bos_token": "<|end|>", "added_tokens_decoder": {"0": {"content": "<|end|>"}, "9999": {"content": "x"}}}
    (home / "hub/tokenizer_config.json").write_text(json.dumps(words | {"chat_template": template} | more))
    return home / "hub"


def model(home, place):
    network = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=257))
    network.initialise(0)
    with torch.no_grad():
        network.head.weight.mul_(0.3)
    store.write(place, network.config, network.state_dict())
    save_tokenizer(home / "t", ByteTokenizer(1))
    return network.eval()


def test_a_template_beside_weights_or_words_lays_talks_out(tmp_path):
    hub = folder(tmp_path)
    for places in ([hub / "model.safetensors", "bytes"], [tmp_path / "m.pth", hub], [hub, hub]):
        (hub / "model.safetensors").touch(), (tmp_path / "m.pth").touch()
        layout = find_layout("plain", None, *map(str, places))
        assert layout.text(TALK) == WRITTEN and layout.stops() == ("<|im_end|>",)
    assert find_layout("plain", str(hub), "bytes").text(TALK) == WRITTEN


def test_without_a_template_or_on_request_it_is_the_form_of_released_models(tmp_path, monkeypatch):
    hub = folder(tmp_path)
    monkeypatch.chdir(hub)  # `bytes` is the name of a vocabulary, not a file that lies here
    assert find_layout("plain", None, "bytes", str(tmp_path / "none.pth")).template is None
    for layout in (find_layout("plain", "rwkv", str(hub)), find_layout("think", None, str(hub))):
        assert layout.text(TALK).startswith("System: Be brief.\n\nUser: Hi\nyou\n\nAssistant:")
        assert layout.stops() == ("\n\n",) and layout.special() == {}
    assert carried(tmp_path) is None
    with pytest.raises(ConfigError, match="--mode think.*--template rwkv"):
        find_layout("think", str(hub), str(hub))


def test_the_template_of_our_own_exports_is_that_form(tmp_path):
    own = find_layout("plain", None, str(folder(tmp_path, TEMPLATE, bos_token=None)))
    assert own.template is not None and own.text(TALK) == Layout().text(TALK) and own.stops() == Layout().stops()


@pytest.mark.parametrize("broken", ["{% for", "{{ raise_exception('no') }}", "{{ messages[7].content.x.y }}"])
def test_a_broken_template_is_one_line(tmp_path, broken):
    with pytest.raises(DataError):
        find_layout("plain", None, str(folder(tmp_path, broken))).stops()


def test_special_words_are_one_id_each_and_others_are_letters(tmp_path):
    layout = find_layout("plain", None, str(folder(tmp_path)))
    engine = Engine(model(tmp_path, tmp_path / "m.safetensors"), ByteTokenizer(1), 1, special=layout.special())
    assert engine.begin("<|end|>ab<|end|>x") == [0, 98, 99, 0, 121]
    assert Engine(engine.model, engine.tokenizer, 1).begin("<|end|>") == [n + 1 for n in b"<|end|>"]


def test_talks_are_answered_by_the_template_and_end_where_it_ends_a_turn(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RWKVPIPE_DEVICE", "cpu")
    hub = folder(tmp_path)
    network = model(tmp_path, hub / "model.safetensors")
    (tmp_path / "q.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    words = ["--model", str(hub / "model.safetensors"), "--tokenizer", str(tmp_path / "t"), "--max-tokens", "9"]
    generate.main([*words, "--prompts", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "s.jsonl")])
    (row,) = read_jsonl(tmp_path / "s.jsonl")
    assert row["prompt"] == WRITTEN
    asked = SamplingConfig(max_tokens=9)
    wanted = Engine(network, ByteTokenizer(1), 1, special={"<|end|>": 0}).generate([WRITTEN], asked)
    assert row["text"] == next(wanted).text


def test_the_server_lays_talks_out_by_the_template(tmp_path):
    pytest.importorskip("starlette")
    from rwkvpipe.web.asked import House, Refused

    layout = find_layout("plain", None, str(folder(tmp_path)))
    engine = Engine(model(tmp_path, tmp_path / "m.safetensors"), ByteTokenizer(1), 1, special=layout.special())
    house = House(engine, "m", SamplingConfig(stop=layout.stops()), layout)
    asked = house.read("chat", {"model": "m", "messages": TALK, "stop": ["!"]})
    assert asked.prompts == [[0, *(n + 1 for n in WRITTEN.removeprefix("<|end|>").encode())]]
    assert asked.sampling.stop == ("!", "<|im_end|>")
    refusing = House(engine, "m", SamplingConfig(), Layout(template=carried(_refusing(tmp_path))))
    with pytest.raises(Refused, match="cannot lay out the talk: no system here"):
        refusing.read("chat", {"model": "m", "messages": TALK})


def _refusing(home):
    (home / "other").mkdir()
    words = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
    (home / "other/chat_template.jinja").write_text(words)
    return home / "other"
