"""What nvcc makes of the kernels for a card, run here: values and gradients, and no fault that a card would hide."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import counts
from benchmarks.ptx.fault import Fault
from benchmarks.ptx.program import Block
from rwkvpipe.base import compiler
from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.infer.decode_card import CardDecoder
from rwkvpipe.kernel import blend, gate, gpu
from rwkvpipe.kernel.blend import squared_relu
from rwkvpipe.kernel.loss import Wanted, head_loss
from rwkvpipe.model import layers, rwkv6, rwkv7
from rwkvpipe.model.family import build
from tests.kernel import test_step
from tests.kernel.operators import OPERATORS, error, exact, made, results
from tests.kernel.test_gpu import in_bf16, rms
from tests.kernel.test_passes import BY_HEAD, KINDS, case, in_torch, learnt, mixed, same

pytestmark = pytest.mark.slow
WAITS = ("griddepcontrol", "wait")


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 9, 2, 33), (1, 70, 1, 16), (1, 11, 1, 64), (1, 9, 1, 100)])
def test_token_by_token_values_and_gradients_are_exact(on_paper, which, sizes):
    inputs = made(which, *sizes)
    for found, wanted in zip(results(OPERATORS[which][0], inputs), exact(which, inputs), strict=True):
        assert error(found, wanted, 1.0) < 2e-6


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("parts, w", [(1, None), (2, None), (4, None), (1, [0.5, 1.0]), (2, [-30.0, 3.6, 20.0])])
def test_tensor_cores_err_by_a_thousandth_at_most(on_paper, monkeypatch, which, parts, w):
    monkeypatch.setattr(gpu, "_parts", lambda operator, v: parts)
    inputs = in_bf16(which, 1, 35, 1, 64, w=w)
    with gpu.roughly(True):
        found = results(OPERATORS[which][0], inputs)
    for one, wanted in zip(found, exact(which, inputs), strict=True):
        assert one.isfinite().all()
        assert rms(one, wanted) < 1.2e-3 or float((one - wanted).norm()) < 1e-3 * wanted.numel() ** 0.5


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("T, N", [(21, 20), (21, 64), (70, 64)])
def test_bf16_gives_what_the_host_build_gives_of_it(on_paper, host_library, monkeypatch, which, T, N):
    inputs = [x.bfloat16() for x in made(which, 1, T, 2, N)[:-1]] + [made(which, 1, T, 2, N)[-1]]
    found = results(OPERATORS[which][0], inputs)
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "at_hand", lambda device: (host_library, "built for the host"))
    for one, other in zip(found, results(OPERATORS[which][0], inputs), strict=True):
        assert one.dtype == other.dtype and rms(one.double(), other.double()) < 1e-3


@pytest.fixture
def as_on_a_card(on_paper, monkeypatch):
    """What products give goes on as it is, in bf16."""
    for module in (blend, gate):
        monkeypatch.setattr(module, "widened", lambda row, *inputs: list(inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 5, 3, 20), (1, 9, 2, 64), (2, 3, 1, 7)])
@pytest.mark.parametrize("made", BY_HEAD)
def test_what_is_done_head_by_head_is_pytorch_s(as_on_a_card, made, sizes, kind):
    function, inputs = case(made, sizes, kind)
    same(learnt(function, inputs), in_torch(function, inputs), KINDS[kind][1])


@pytest.mark.parametrize("kind, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
@pytest.mark.parametrize("B, T, D, count", [(1, 1, 3, 1), (2, 35, 40, 6), (2, 9, 7, 2)])
def test_mixes_and_squares_are_pytorch_s(on_paper, B, T, D, count, kind, tolerance):
    stream = torch.Generator().manual_seed(T)
    inputs = [torch.randn(shape, generator=stream).to(kind) for shape in ((B, T, D), (B, D), *[(1, 1, D)] * count)]
    same(learnt(mixed, inputs), in_torch(mixed, inputs), tolerance)

    def squared(x):
        return [squared_relu(x)]

    same(learnt(squared, inputs[:1]), in_torch(squared, inputs[:1]), 2 * tolerance)


@pytest.mark.parametrize("n, D, V", [(1, 3, 2), (7, 5, 31), (3, 4, 2500)])
def test_the_head_s_loss_is_pytorch_s(on_paper, drawn, n, D, V):
    x, weight, wanted = drawn(n, D, V, n)
    found = learnt(lambda x, weight: [head_loss(x, weight, wanted)], [x, weight])
    same(found, in_torch(lambda x, weight: [head_loss(x, weight, wanted)], [x, weight]), 4e-6)


@pytest.mark.parametrize("which", ["wkv7", "wkv6"])
@pytest.mark.parametrize("parts, most", [(1, None), (2, 99 * 1024), (4, 99 * 1024)])  # cards with little have that
def test_heads_are_divided_where_shared_memory_would_not_do(on_paper, monkeypatch, which, parts, most):
    monkeypatch.setattr(gpu, "_parts", lambda operator, v: parts)
    on_paper.shared.clear()
    with gpu.roughly(True):
        results(OPERATORS[which][0], in_bf16(which, 1, 16, 1, 64))
    assert 2**15 < max(on_paper.shared.values()) <= (most or gpu.SHARED[which])


@torch.inference_mode()
@pytest.mark.parametrize("kind, rows, F, V", [
    *((kind, rows, 36, 6) for kind in ("bf16", "int8") for rows in (1, 2, 3, 8)),
    ("bf16", 8, 1092, 1061), ("int8", 8, 1092, 2137),
])  # fmt: skip
def test_a_token_of_a_few_rows_takes_five_kernels_a_layer(on_paper, kind, rows, F, V):
    model = test_step.made(n_layer=2, dim_ffn=F, vocab_size=V, kind=kind, d_decay=3)
    ids, state, logits = torch.arange(rows) % 6, test_step.state_of(model, rows), torch.full((rows, V), torch.nan)
    wanted, after = test_step.exactly(model, ids, state)
    on_paper.blocks.clear(), on_paper.followed.clear()
    CardDecoder(test_step.narrowed(model, kind)).few(ids, state, logits)
    for one, other in zip((logits, *test_step.parts(state)), (wanted, *test_step.parts(after)), strict=True):
        assert error(one, other, 1.0) < 1e-5
    ran = {name: count for name, count in on_paper.blocks.items() if count}
    assert len(ran) == 3 and all("Few" in name or "Recall" in name or "Embed" in name for name in ran)
    followed = [on_paper.followed[next(name for name in ran if which in name)] for which in ("Embed", "Recall", "Few")]
    assert followed == [0, 2, 2 * 4 + 1]
    # a block for some outputs of a matrix: projections with low ranks, the way out, the channel mix, the head; no more
    outs, most = {"bf16": {1: 8, 2: 8}, "int8": {1: 16, 2: 16, 3: 8}}[kind].get(rows, 4), 264
    low = [getattr(model.config, f"d_{name}") for name in ("decay", "aaa", "gate", "mv")]
    kernels = [[64] * 3 + low[:3], [64] * 3 + low, *[[64], [F], [64]] * 2, [V]]
    groups = [[-(-size // outs) for size in sizes] for sizes in kernels]
    blocks = sum(-(-count // -(-sum(sizes) // most)) for sizes in groups for count in sizes)
    assert sorted(ran.values()) == sorted([rows, 2 * (rows + 96), blocks])


def stepped(on_paper, n_embd=64):
    """Logits and states after a token of a few rows; how many kernels followed others."""
    model = test_step.made(n_layer=1, n_embd=n_embd, dim_ffn=4, vocab_size=6, kind="int8")
    ids, state, logits = torch.arange(5), test_step.state_of(model, 5), torch.full((5, 6), torch.nan)
    on_paper.followed.clear()
    CardDecoder(test_step.narrowed(model, "int8")).few(ids, state, logits)
    return [logits, *test_step.parts(state)], on_paper.followed.total()


@torch.inference_mode()
def test_cards_that_cannot_have_kernels_follow_launch_them_all(on_paper, monkeypatch):
    following, many = stepped(on_paper)
    monkeypatch.setattr(on_paper, "capability", 8)
    launched, none = stepped(on_paper)
    assert many == 6 and none == 0
    assert all(torch.equal(one, other) for one, other in zip(following, launched, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("which, n_embd", [("Few", 64), ("Recall", 64), ("Making", 1088)])
def test_kernels_that_did_not_wait_for_others_would_be_seen(on_paper, monkeypatch, which, n_embd):
    hasty = {}
    for name, program in on_paper.programs.items():
        blocks = [Block([each for each in block.instructions if each.name != WAITS]) for block in program.blocks]
        hasty[name] = replace(program, blocks=blocks) if which in name else program
    monkeypatch.setattr(on_paper, "programs", hasty)
    with pytest.raises(Fault, match="before its turn"):
        stepped(on_paper, n_embd)


@torch.inference_mode()
def test_what_long_rows_are_multiplied_as_is_made_once(on_paper):
    model = test_step.made(n_layer=1, n_embd=1088, dim_ffn=4, vocab_size=6, kind="int8")
    ids, state, logits = torch.arange(5), test_step.state_of(model, 5), torch.full((5, 6), torch.nan)
    wanted, after = test_step.exactly(model, ids, state)
    on_paper.blocks.clear(), on_paper.followed.clear()
    CardDecoder(test_step.narrowed(model, "int8")).few(ids, state, logits)
    for one, other in zip((logits, *test_step.parts(state)), (wanted, *test_step.parts(after)), strict=True):
        assert error(one, other, 1.0) < 1e-5
    assert [count for name, count in on_paper.blocks.items() if "Making" in name] == [5 * (6 + 1 + 1)]
    assert on_paper.followed.total() == 6 + 3


@torch.inference_mode()
@pytest.mark.parametrize("kind, tolerance", [("fp32", 1e-5), ("bf16", 3e-2)])
def test_a_token_of_many_rows_takes_a_kernel_for_heads(on_paper, kind, tolerance):
    model, rows = test_step.made(n_layer=2, vocab_size=6, kind=kind), 2
    ids, state, logits = torch.tensor([1, 5]), test_step.state_of(model, rows), torch.full((rows, 6), torch.nan)
    wanted, after = test_step.exactly(model, ids, state)
    on_paper.blocks.clear()
    CardDecoder(test_step.narrowed(model, kind)).many(ids, state, logits)
    for one, other in zip((logits, *test_step.parts(state)), (wanted, *test_step.parts(after)), strict=True):
        assert float((one - other).norm() / other.norm()) < tolerance
    assert [count for name, count in on_paper.blocks.items() if "Recall" in name] == [2 * rows]


def test_counts_are_as_reported(card):
    if compiler.version(compiler.nvcc()) != json.loads(counts.REPORT.read_text())["nvcc"]:
        pytest.skip("the report is of another nvcc")
    assert counts.measure() == json.loads(counts.REPORT.read_text())


@pytest.mark.parametrize("family", ["rwkv7", "rwkv6"])
def test_training_in_bf16_takes_the_kernels_that_are_made_for_it(card, as_on_a_card, monkeypatch, family):
    monkeypatch.setattr("rwkvpipe.model.rwkv7.fits", lambda *inputs: False)  # what only the CPU has
    for module in (rwkv6, rwkv7, layers):  # products of a card give bf16
        monkeypatch.setattr(module, "through", lambda layer, x: layer(x), raising=False)
        monkeypatch.setattr(module, "linear", lambda x, matrix: x @ matrix, raising=False)
    model = build(RwkvConfig(family=family, n_layer=2, n_embd=64, head_size=64, vocab_size=32))
    model.initialise(0)
    card.blocks.clear()
    with torch.autocast("cpu", torch.bfloat16):
        x, _ = model.features(torch.arange(32)[None] * 7 % 30)
        logits = model.ln_out(x).flatten(0, 1)
        asked = Wanted(torch.arange(32) % 30, torch.ones(32), 1 / 32, 0.0, torch.bfloat16)
        head_loss(logits, model.head.weight, asked).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters() if x.requires_grad)
    ran = " ".join(card.blocks)
    wanted = {"ChunksForward", "ChunksBackward", "Finish", "Loss", *(("Mix", "Prepare") if family == "rwkv7" else ())}
    assert all(kernel in ran for kernel in wanted), ran
    assert "Any" not in ran and "WayILln1E" not in ran, ran
