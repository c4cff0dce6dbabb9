"""RWKV-7 against the numbers of a model of another program, and of a trained one."""

import numpy as np
import torch

from rwkvpipe.model.family import build, detect
from rwkvpipe.weights import store


def difference(found, wanted):
    return float((found.detach().double() - torch.as_tensor(wanted).double()).abs().max())


def test_logits_of_the_tuning_reference_model(goldens):
    weights, golden = (np.load(goldens / "tune" / f"{name}.npz") for name in ("tiny_rwkv7", "model_forward"))
    plain = {name: weights[name] for name in weights.files if not name.startswith("__")}
    tensors = {name: torch.tensor(x) for name, x in plain.items()}
    model = build(detect(tensors))
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    model.load_state_dict({name: tensors[name].reshape(shape) for name, shape in shapes.items()})
    ids = torch.tensor(golden["ids"])
    logits, state = model(ids)
    assert difference(logits[:, 0], golden["logits_first"]) < 2e-5
    assert difference(logits[:, -1], golden["logits_last"]) < 2e-5
    logprobs = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert difference(logprobs, golden["logp_next"]) < 2e-5
    assert difference(state.wkv[0], golden["state_wkv_l0"]) < 2e-5
    assert difference(state.att_x[0], golden["state_shift_att_l0"]) < 2e-5


def test_a_real_checkpoint_gives_the_published_logits(shared_data):
    golden = np.load(shared_data / "tiny-rwkv7" / "tiny-x070.npz")
    model = store.load_model(shared_data / "tiny-rwkv7" / "tiny-x070.pth")
    with torch.no_grad():
        logits, _ = model(torch.tensor(golden["tokens"].astype("int64"))[None])
    assert difference(logits[0], golden["logits"]) < 2e-5
