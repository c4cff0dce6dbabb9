"""Other programs take back what was exported and compute the same, each in an environment of its own (make peers)."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.peers import CHECKOUT, python
from rwkvpipe.base.config import ExportConfig, LoraConfig, RwkvConfig
from rwkvpipe.model.family import build
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.load import save_tokenizer
from rwkvpipe.train.stage import write_adapter
from rwkvpipe.weights import store
from rwkvpipe.weights.export import export
from rwkvpipe.weights.lora import adapter, inject, merged

pytestmark = pytest.mark.peers

RWKV = """
import json, os, sys
path, family, ids = json.loads(sys.argv[1])
os.environ.update(RWKV_JIT_ON="0", RWKV_CUDA_ON="0", RWKV_V7_ON="1" if family == "rwkv7" else "0")
from rwkv.model import RWKV
logits, _ = RWKV(model=path.removesuffix(".pth"), strategy="cpu fp32").forward(ids, None, full_output=True)
print("\\n" + json.dumps(logits.tolist()))
"""
HUGGING = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, talk = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(text)["input_ids"]
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0]
prompt = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
print("\\n" + json.dumps([type(model).__module__, ids, tokenizer.decode(ids), prompt, logits.tolist()]))
"""
LLAMA = """
import json, sys
from llama_cpp import Llama
path, text, count = json.loads(sys.argv[1])
model = Llama(path, n_ctx=512, logits_all=True, verbose=False, n_threads=1)
ids = model.tokenize(text.encode(), add_bos=False)
model.eval(ids)
logits = model.scores[: len(ids)].tolist()
told = [model.token_eos()] if model.token_eos() >= 0 else []
model.reset()
found = []
for token in model.generate(ids, temp=0.0):
    found.append(int(token))
    if len(found) == count:
        break
print("\\n" + json.dumps([ids, logits, found, told]))
"""
# triton's interpreter stands for the GPU; it has nothing to tune
LINEAR = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "1"
from triton.runtime import autotuner
autotuner.Autotuner.run = lambda self, *given, **more: self.fn.run(*given, **more, **self.configs[0].all_kwargs())
import fla, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, ids = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
model.load_state_dict(load_file(folder + "/model.safetensors"), strict=True)
with torch.no_grad():
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]
print("\\n" + json.dumps([type(model).__module__, logits.tolist()]))
"""
# RWKV-LM's trainer without its kernels and without Lightning: neither is asked for
TRAINER = """
import argparse, json, os, sys, types
import torch
from torch.utils import cpp_extension
file, path, version, kind, sizes = json.loads(sys.argv[1])
os.environ.update(RWKV_JIT_ON="0", RWKV_MY_TESTING=version, RWKV_TRAIN_TYPE=kind, RWKV_HEAD_L2WRAP_CE_CHUNK="0")
os.environ.update(RWKV_HEAD_SIZE="64", RWKV_HEAD_SIZE_A="64", RWKV_CTXLEN="64", RWKV_FLOAT_MODE="bf16")
cpp_extension.load = torch.library.register_autograd = lambda *given, **more: None
torch.jit.script = lambda code: code
names = ("pytorch_lightning", "pytorch_lightning.strategies", "pytorch_lightning.utilities")
sys.modules |= {name: types.ModuleType(name) for name in names}
lightning, strategies, utilities = map(sys.modules.get, names)
lightning.LightningModule, strategies.DeepSpeedStrategy = torch.nn.Module, None
utilities.rank_zero_info = utilities.rank_zero_only = print
code = types.ModuleType("model")
exec(compile(open(file).read(), file, "exec"), code.__dict__)
others = dict(head_size=64, head_size_a=64, head_size_divisor=8, dropout=0, pre_ffn=0, head_qk=0, my_pos_emb=0)
others |= dict(tiny_att_dim=0, tiny_att_layer=0, my_testing=version, train_type=kind, ctx_len=64)
model = code.RWKV(argparse.Namespace(**sizes, **others))
print(json.dumps(str(model.load_state_dict(torch.load(path, weights_only=True), strict=True))))
"""
PEFT = """
import json, sys, torch
from peft import PeftModel
from safetensors.torch import load_file
base, folder, ids = json.loads(sys.argv[1])
if folder.endswith("peft_hf"):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        plain = model(torch.tensor([ids])).logits[0]
        found = PeftModel.from_pretrained(model, folder).eval()(torch.tensor([ids])).logits[0]
    print("\\n" + json.dumps([plain.tolist(), found.tolist()]))
else:  # matrices and norms in a tree of plain modules
    tensors, root = load_file(base), torch.nn.Module()
    for name, value in tensors.items():
        path, _, last = name.rpartition(".")
        norm = path.rpartition(".")[2].startswith("ln")
        if last != "weight" or not (norm or value.dim() == 2):
            continue
        here = root
        *above, leaf = path.split(".")
        for part in above:
            if part not in here._modules:
                here.add_module(part, torch.nn.Module())
            here = here._modules[part]
        module = torch.nn.LayerNorm(len(value)) if norm else torch.nn.Linear(*value.shape[::-1], bias=False)
        module.weight.data = value.float()
        here.add_module(leaf, module)
    root.prepare_inputs_for_generation = None
    model = PeftModel.from_pretrained(root, folder).merge_and_unload()
    print("\\n" + json.dumps({name: value.tolist() for name, value in model.state_dict().items()}))
"""
TEXT = "First Citizen:\nBefore wé proceed\n\n"


def ask(name, code, *given):
    """What a peer says, in its own words: the last line that it writes, as JSON."""
    if python(name) is None:
        pytest.skip(f"the peer {name} is not set up (python -m benchmarks.peers {name})")
    return told(python(name), code, *given)


def told(interpreter, code, *given):
    ended = subprocess.run([interpreter, "-c", code, json.dumps(given)], capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def some(folder, family, **sizes):
    """A model whose every tensor is drawn by lot, small enough that logits stay near 1, in bf16."""
    model = build(RwkvConfig(**({"n_layer": 3, "n_embd": 128, "vocab_size": 257, "family": family} | sizes)))
    stream = torch.Generator().manual_seed(7)
    tensors = {}
    for name, value in model.state_dict().items():
        drawn = torch.randn(value.shape, generator=stream) / (value.shape[-1] ** 0.5 if value.dim() == 2 else 2)
        norm = "ln" in name and name.endswith("weight")
        tensors[name] = (drawn * 0.3 + 1 if norm else drawn).bfloat16()
    store.write(folder / "model.safetensors", model.config, tensors)
    return folder / "model.safetensors"


def ours(path, ids):
    with torch.no_grad():
        return store.load_model(path)(torch.tensor([ids]))[0][0].numpy()


@pytest.mark.parametrize("version", ["x052", "x060", "x070"])
def test_the_package_rwkv_computes_the_same_logits(tmp_path, goldens, version):
    data = np.load(goldens / f"rwkv/model_{version}_a.npz", allow_pickle=False)
    weights = {name[2:]: torch.from_numpy(data[name]) for name in data.files if name.startswith("w/")}
    torch.save(weights, tmp_path / "given.pth")
    export(tmp_path / "given.pth", tmp_path / "m.pth", ExportConfig(format="pth"))
    family = {"x052": "rwkv5", "x060": "rwkv6", "x070": "rwkv7"}[version]
    ids = data["tokens"].tolist()
    found = np.array(ask("rwkv", RWKV, str(tmp_path / "m.pth"), family, ids))
    np.testing.assert_allclose(found, data["logits"], atol=5e-5)
    np.testing.assert_allclose(found, ours(tmp_path / "m.pth", ids), atol=5e-5)


def test_transformers_with_rwkv7_hf_computes_the_same_logits_and_ids(tmp_path):
    path = some(tmp_path, "rwkv7")
    save_tokenizer(tmp_path / "bytes", ByteTokenizer(1))
    export(path, tmp_path / "hf", ExportConfig(format="hf"), tokenizer=str(tmp_path / "bytes"))
    talk = [{"role": "user", "content": " hello\n\nyou"}]
    module, ids, text, prompt, logits = ask("rwkv7-hf", HUGGING, str(tmp_path / "hf"), TEXT, talk)
    assert module.startswith("rwkv7_hf")
    assert ids == ByteTokenizer(1).encode(TEXT) and text == TEXT
    assert prompt == "User: hello\nyou\n\nAssistant:"
    np.testing.assert_allclose(np.array(logits), ours(path, ids), atol=5e-5)


def test_the_package_rwkv_starts_rwkv_6_from_the_same_states(tmp_path):
    path, ids = some(tmp_path, "rwkv6", time_state=True), list(range(60, 80))
    # the package rounds the normed embedding to the numbers of the file
    export(path, tmp_path / "m.pth", ExportConfig(format="pth", dtype="fp32"))
    found = np.array(ask("rwkv", RWKV, str(tmp_path / "m.pth"), "rwkv6", ids))
    np.testing.assert_allclose(found, ours(path, ids), atol=5e-5)


def test_flash_linear_attention_loads_every_tensor_and_computes_the_same_logits(tmp_path):
    path, ids = some(tmp_path, "rwkv7", n_layer=2, d_decay=24, d_aaa=20, d_mv=12, d_gate=40), list(range(60, 68))
    export(path, tmp_path / "hf", ExportConfig(format="hf"))
    module, logits = ask("fla", LINEAR, str(tmp_path / "hf"), ids)
    assert module.startswith("fla.models.rwkv7")
    np.testing.assert_allclose(np.array(logits), ours(path, ids), atol=5e-5)


LOADS = [("rwkv5", "x052", "", "RWKV-v5"), ("rwkv6", "x060", "", "RWKV-v5"), ("rwkv6", "x060", "states", "RWKV-v5")]
LOADS += [("rwkv7", "x070", "", "RWKV-v5"), ("rwkv7", "x070", "", "RWKV-v7/train_temp")]


@pytest.mark.parametrize(("family", "version", "kind", "folder"), LOADS)
def test_the_trainer_of_rwkv_lm_loads_a_pth_file_strictly(tmp_path, family, version, kind, folder):
    file = CHECKOUT / folder / "src/model.py"
    if not file.is_file():
        pytest.skip(f"RWKV-LM is not here; clone it into {CHECKOUT}")
    # a width at which all its rules for low ranks agree
    path = some(tmp_path, family, n_embd=64, **({"time_state": True} if kind else {}))
    export(path, tmp_path / "m.pth", ExportConfig(format="pth"))
    sizes = {"n_layer": 3, "n_embd": 64, "vocab_size": 257, "dim_att": 64, "dim_ffn": store.sizes(path).dim_ffn}
    found = told(sys.executable, TRAINER, str(file), str(tmp_path / "m.pth"), version, kind, sizes)
    assert found == "<All keys matched successfully>"


@pytest.mark.parametrize("family", ["rwkv6", "rwkv7"])
def test_llama_cpp_computes_the_same_logits_ids_and_greedy_text(tmp_path, family):
    path = some(tmp_path, family)
    save_tokenizer(tmp_path / "bytes", ByteTokenizer(1))
    spec = ExportConfig(format="gguf", dtype="fp32")
    export(path, tmp_path / "m.gguf", spec, tokenizer=str(tmp_path / "bytes"))
    ids, logits, found, told = ask("llama-cpp", LLAMA, str(tmp_path / "m.gguf"), TEXT, 30)
    assert ids == ByteTokenizer(1).encode(TEXT) and told == [0]
    np.testing.assert_allclose(np.array(logits), ours(path, ids), atol=2e-4)
    wanted = list(ids)
    for _ in found:
        wanted.append(int(ours(path, wanted)[-1].argmax()))
    assert found == wanted[len(ids) :]


@pytest.mark.parametrize("kind", ["lora", "pissa", "dora", "disha"])
@pytest.mark.parametrize("format", ["peft", "peft_hf"])
def test_peft_computes_the_same_with_an_adapter(tmp_path, kind, format):
    path = some(tmp_path, "rwkv7")
    model = store.load_model(path)
    asked = LoraConfig(kind=kind, rank=3, full=("ln1",), **({} if kind == "disha" else {"alpha": 5.0}))
    inject(model, asked)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(5)) * 0.05)
    write_adapter(tmp_path / "adapter.safetensors", model, asked, base="")
    export(tmp_path / "adapter.safetensors", tmp_path / format, ExportConfig(format=format))
    tensors = {name: value.float() for name, value in store.read(path)[1].items()}
    wanted = merged(tensors, adapter(model), asked)
    store.write(tmp_path / "base.safetensors", model.config, tensors)
    ids = list(range(3, 40))
    if format == "peft":
        found = ask("peft", PEFT, str(tmp_path / "base.safetensors"), str(tmp_path / format), ids)
        for name in [name for name in found if name.endswith("weight")]:
            np.testing.assert_allclose(np.array(found[name]), wanted[name].numpy(), atol=2e-6, err_msg=name)
        assert any(not torch.equal(wanted[name], tensors[name]) for name in found)
        return
    export(tmp_path / "base.safetensors", tmp_path / "hf", ExportConfig(format="hf"))
    plain, found = ask("peft", PEFT, str(tmp_path / "hf"), str(tmp_path / format), ids)
    store.write(tmp_path / "merged.safetensors", model.config, wanted)
    np.testing.assert_allclose(np.array(plain), ours(tmp_path / "base.safetensors", ids), atol=5e-5)
    np.testing.assert_allclose(np.array(found), ours(tmp_path / "merged.safetensors", ids), atol=5e-5)
    assert np.abs(np.array(found) - np.array(plain)).max() > 0.01
