"""The GPU's kernels, from the same source built for the host: values, gradients, and the way there from Python."""

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.kernel import build, gpu
from rwkvpipe.kernel.wkv6 import wkv6
from rwkvpipe.kernel.wkv7 import wkv7
from rwkvpipe.model.family import build as build_model
from tests.kernel.operators import (
    CASES,
    EXTREMES,
    NAMES,
    OPERATORS,
    check_exact,
    check_reference,
    error,
    exact,
    in_pieces,
    made,
    reference,
    results,
    with_gaps,
)

LARGE = pytest.mark.large  # too much for a sanitizer, too
hosted = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("which, case", CASES)
def test_values_and_gradients_are_the_reference_numbers(on_host, goldens, which, case):
    check_reference(goldens, which, case, OPERATORS[which][0], torch.float32, 1e-5)


@pytest.mark.parametrize("which", OPERATORS)
@hosted
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 100), st.integers(1, 2), st.integers(1, 70)),
    w=st.one_of(st.none(), st.lists(st.sampled_from(EXTREMES), min_size=1, max_size=4)),
    seed=st.integers(0, 99),
)
def test_any_sizes_and_decays_are_exact_beside_what_fp32_costs(on_host, which, sizes, w, seed):
    inputs = made(which, *sizes, seed, w)
    wanted, plain = exact(which, inputs), results(OPERATORS[which][1], inputs)
    for found, real, other in zip(results(OPERATORS[which][0], inputs), wanted, plain, strict=True):
        assert error(found, real, 1.0) < 1e-6 + 4 * error(other.nan_to_num(0.0), real, 1.0)


@pytest.mark.parametrize("which, N", [("wkv7", 128), ("wkv6", 100), ("wkv7", 16), ("wkv5", 32)])
def test_heads_of_all_our_sizes_are_exact(on_host, which, N):
    check_exact(which, made(which, 1, 19, 1, N), 2e-6)


@pytest.mark.parametrize("which", OPERATORS)
def test_bf16_is_read_and_rounded_once(on_host, which):
    inputs = [x.bfloat16() for x in made(which, 2, 35, 2, 20)[:-1]]
    state = made(which, 2, 35, 2, 20)[-1]
    found = results(OPERATORS[which][0], [*inputs, state])
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, *[torch.bfloat16] * len(inputs), torch.float32]
    wide = results(OPERATORS[which][0], [*(x.float() for x in inputs), state.float()])
    assert torch.equal(found[0], wide[0].bfloat16())  # the gradients' pulls were rounded, so those are only near
    for one, other in zip(found, exact(which, [*inputs, state]), strict=True):
        assert error(one, other) < 1e-2


@pytest.mark.parametrize("which", OPERATORS)
def test_kinds_may_differ_from_tensor_to_tensor(on_host, which):
    inputs = made(which, 1, 10, 2, 8)
    inputs[0], inputs[3] = inputs[0].bfloat16(), inputs[3].bfloat16()
    found = results(OPERATORS[which][0], inputs)
    for x, grad in zip(inputs, found[2:], strict=True):
        assert grad.dtype == x.dtype
    wide = results(OPERATORS[which][0], [x.float() for x in inputs])
    assert found[0].dtype == torch.bfloat16 and torch.equal(found[0], wide[0].bfloat16())
    assert torch.equal(found[1], wide[1])


@pytest.mark.parametrize("which", OPERATORS)
def test_a_row_in_pieces_with_its_state_is_the_row_in_one(on_host, which):
    inputs = made(which, 2, 75, 2, 8)
    found, wanted = in_pieces(OPERATORS[which][0], inputs, (0, 1, 70, 70, 75)), OPERATORS[which][0](*inputs)
    assert all(error(one, other) < 1e-6 for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("T, N", [(70, 9), (9, 66)])
def test_the_order_in_which_threads_run_between_barriers_changes_nothing(on_host, which, T, N):
    inputs, found = made(which, 1, T, 2, N), []
    for way in (0, 1, 2):
        on_host.grid_order(way)
        found.append(results(OPERATORS[which][0], inputs))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("which", OPERATORS)
def test_all_results_and_nothing_beside_them_is_written(on_host, guards, which):
    found = results(OPERATORS[which][0], made(which, 2, 67, 2, 7))
    assert all(x.isfinite().all() for x in found)
    guards(9)


@pytest.mark.parametrize("which", OPERATORS)
def test_views_with_gaps_give_the_same(on_host, which):
    operator, parts = OPERATORS[which][0], with_gaps(made(which, 2, 19, 4, 12))
    for found, wanted in zip(results(operator, parts), results(operator, [x.contiguous() for x in parts]), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_views_that_begin_anywhere_give_the_same_bits(on_host, which, kind):
    whole = made(which, 2, 19, 2, 12)
    inputs = [*(x.to(kind) for x in whole[:-1]), whole[-1]]
    moved = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in inputs]
    assert all(x.data_ptr() % 16 for x in moved)
    for found, wanted in zip(results(OPERATORS[which][0], moved), results(OPERATORS[which][0], inputs), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("inputs, why", [
    (lambda: made("wkv7", 1, 3, 1, 129), "heads of up to 128 channels"),
    (lambda: [x.double() for x in made("wkv7", 1, 3, 1, 8)], "fp32 and bf16"),
])  # fmt: skip
def test_what_our_kernels_do_not_take_is_computed_by_chunks_and_a_line_says_so(on_host, inputs, why, caplog):
    gpu._said.clear()
    with caplog.at_level("INFO", logger="rwkvpipe"):
        found = results(wkv7, inputs())
        results(wkv7, inputs())
    for one, wanted in zip(found, exact("wkv7", inputs()), strict=True):
        assert error(one, wanted) < 1e-5
    assert caplog.text.count("(our kernels: they take") == 1 and why in caplog.text


def test_the_line_of_our_kernels_names_the_operator_and_the_compiler(on_host, caplog):
    gpu._said.clear()
    with caplog.at_level("INFO", logger="rwkvpipe"):
        results(wkv6, made("wkv6", 1, 3, 1, 8))
    assert "kernel: wkv6 by our kernels on cpu (" in caplog.text


@pytest.mark.parametrize("hip, capability, why", [
    ("6.4", (9, 4), "NVIDIA's cards"), (None, (6, 1), "since compute capability 7.0"),
])  # fmt: skip
def test_cards_without_our_kernels_say_why(monkeypatch, hip, capability, why):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("RWKVPIPE_KERNELS", raising=False)
    library, said = gpu.at_hand.__wrapped__(torch.device("cuda", 0))
    assert library is None and why in said
    assert gpu.at_hand.__wrapped__(torch.device("mps"))[0] is None


def test_without_nvcc_a_card_computes_by_chunks(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("RWKVPIPE_KERNELS", str(tmp_path))
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    library, said = gpu.at_hand.__wrapped__(torch.device("cuda", 0))
    assert library is None and "nvcc" in said
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.at_hand.__wrapped__(torch.device("cuda", 0)) == (None, "there is no nvcc")


class Refusing:
    """A library whose kernels a card does not take."""

    def __getattr__(self, function):
        return lambda *given: 0 if function.endswith(("kept", "room")) else 35


def test_what_a_card_refuses_is_an_error(monkeypatch):
    monkeypatch.setattr(gpu, "at_hand", lambda device: (Refusing(), "refusing"))
    with pytest.raises(RuntimeError, match="wkv7_forward: CUDA error 35"):
        wkv7(*made("wkv7", 1, 3, 1, 8))


def test_a_first_kernel_is_tried(on_host):
    assert gpu.tried(on_host, torch.device("cpu")) == 0


def test_a_card_that_refuses_the_first_kernel_computes_by_chunks(monkeypatch):
    status = gpu.tried(Refusing(), torch.device("cpu"))
    monkeypatch.delenv("RWKVPIPE_KERNELS", raising=False)
    monkeypatch.setattr(gpu, "target", lambda device: "sm_90")
    monkeypatch.setattr(gpu, "compiled", lambda target: ("path", "nvcc"))
    monkeypatch.setattr(gpu, "loaded", lambda path: Refusing())
    monkeypatch.setattr(gpu, "tried", lambda library, device: status)
    library, said = gpu.at_hand.__wrapped__(torch.device("cuda", 0))
    assert library is None and "CUDA error 35" in said


@pytest.mark.parametrize("family", ["rwkv7", "rwkv6", "rwkv5"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_learns_the_same_through_our_kernels(on_host, small_model, monkeypatch, family, packed):
    monkeypatch.setattr("rwkvpipe.model.rwkv7.fits", lambda *inputs: False)  # what only the CPU has
    gpu._said.clear()
    model = small_model(family)
    ids = torch.arange(2 * 40).view(2, 40) * 7 % 30
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, [0, 11, 12, 33]] = True

    def learnt():
        model.zero_grad()
        x, state = model.features(ids, starts=starts if packed else None)
        (model.logits(x).square().mean() + sum(S.square().mean() for S in state.wkv)).backward()
        return {name: x.grad.clone() for name, x in model.named_parameters()}

    found = learnt()
    assert any("by our kernels" in line for line in gpu._said)
    monkeypatch.setattr(gpu, "at_hand", lambda device: (None, "turned off"))
    for name, wanted in learnt().items():
        assert error(found[name], wanted.double(), 1e-3) < 1e-4, name


def test_a_prompt_of_rows_of_several_lengths_leaves_the_same_state_through_our_kernels(on_host, monkeypatch):
    model = build_model(RwkvConfig(n_layer=2, n_embd=64, head_size=64, vocab_size=30)).eval()
    model.initialise(0)
    monkeypatch.setattr("rwkvpipe.model.rwkv7.fits", lambda *inputs: False)
    ids, lengths = torch.arange(3 * 20).view(3, 20) % 30, torch.tensor([20, 3, 11])
    with torch.inference_mode():
        found = model(ids, lengths=lengths)[1]
        monkeypatch.setattr(gpu, "at_hand", lambda device: (None, "turned off"))
        wanted = model(ids, lengths=lengths)[1]
    for one, other in zip(found.wkv, wanted.wkv, strict=True):
        assert error(one, other.double(), 1e-3) < 1e-5


def rms(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.fixture
def tiled(on_host, monkeypatch):
    """fp32 goes to tensor cores too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield on_host
    torch.set_float32_matmul_precision(before)


def in_bf16(which, *sizes, seed=0, w=None):
    """Inputs that bf16 holds, as fp32."""
    return [x.bfloat16().float() for x in made(which, *sizes, seed, w)]


def on_tensor_cores(inputs):
    return gpu.against(inputs[3]) is None


def near(found, wanted, least):
    """Whether errors are a thousandth of all there is, or of so little for each number."""
    all_there_is = max(float(wanted.norm()), least * wanted.numel() ** 0.5)
    return float((found.double() - wanted).norm()) < 1e-3 * all_there_is


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("sizes, parts", [((1, 16, 1, 64), 1), ((2, 70, 2, 64), 4), ((1, 131, 1, 64), 2)])
def test_tensor_cores_err_by_a_thousandth_at_most_before_rounding(tiled, monkeypatch, which, sizes, parts):
    monkeypatch.setattr(gpu, "_parts", lambda operator, v: parts)
    inputs = in_bf16(which, *sizes)
    assert on_tensor_cores(inputs)
    for n, (found, wanted) in enumerate(zip(results(OPERATORS[which][0], inputs), exact(which, inputs), strict=True)):
        assert rms(found, wanted) < 1e-3, n


@pytest.mark.parametrize("which", OPERATORS)
def test_tensor_cores_give_the_reference_numbers_as_well_as_eleven_bits_can(tiled, goldens, which):
    names, inputs, pulls, wanted = reference(goldens, which, "t17n64")
    inputs = [x.float() for x in inputs]
    assert on_tensor_cores(inputs)
    for name, one, other in zip(names, results(OPERATORS[which][0], inputs, pulls=pulls), wanted, strict=True):
        assert rms(one, other) < 1.5e-3, name  # inputs are rounded, too


@pytest.mark.parametrize("operator, heads, places, room, parts", [
    ("wkv7", 64, 132, 232448, 4), ("wkv7", 100, 132, 232448, 2), ("wkv7", 512, 132, 232448, 1),
    ("wkv7", 512, 84, 101376, 2), ("wkv7", 20, 84, 101376, 4), ("wkv6", 512, 84, 101376, 1),
    ("wkv6", 60, 84, 101376, 2),
])  # fmt: skip
def test_few_heads_and_little_shared_memory_divide_heads(monkeypatch, operator, heads, places, room, parts):
    class Card:
        multi_processor_count, shared_memory_per_block_optin = places, room

    class Values:
        is_cuda, shape, device = True, (1, 4096, heads, 64), None

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    assert gpu._parts(operator, Values) == parts


@pytest.mark.parametrize("change, way, said", [
    ({}, ("wkv6_chunks", 1), "wkv6 on tensor cores"),
    ({"shape": (1, 15, 2, 64)}, ("wkv6", 1), None),
    ({"shape": (1, 16, 2, 32)}, ("wkv6", 1), "token by token: tensor cores take heads of 64 channels, not 32"),
    ({"dtype": torch.float32}, ("wkv6", 1), "token by token: fp32 is to be multiplied as it is"),
    ({"is_cuda": True}, ("wkv6", 1), "token by token: tensor cores of eleven bits came with compute capability 8.0"),
    ({"is_cuda": True, "device": "new"}, ("wkv6", 1), "token by token: CUDA error 98 at the first try"),
])  # fmt: skip
def test_which_kernel_computes_is_told_in_a_line(monkeypatch, caplog, change, way, said):
    class Values:
        is_cuda, shape, device, dtype = False, (1, 16, 2, 64), None, torch.bfloat16

    for name, value in change.items():
        setattr(Values, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device == "new" else (7, 5))
    monkeypatch.setattr(gpu, "tiles_refused", lambda device: 98)
    monkeypatch.setattr(gpu, "_said", set())
    with caplog.at_level("INFO", logger="rwkvpipe"):
        assert gpu.way("wkv6", Values) == gpu.way("wkv6", Values) == way
    assert caplog.text.count("kernel: ") == (said is not None) and (said or "") in caplog.text


def test_fp32_goes_to_tensor_cores_where_it_may_be_rough(on_host):
    v = torch.zeros(1, 16, 1, 64)
    with gpu.roughly(True), gpu.roughly(False):
        assert gpu.way("wkv7", v) == ("wkv7_chunks", 1)
    with gpu.roughly(False):
        assert gpu.way("wkv7", v) == ("wkv7", 1)
    assert gpu.against(v) is not None


def test_kernels_on_tensor_cores_are_tried_before_they_are_relied_upon(on_host, host_library, monkeypatch):
    cpu = torch.device("cpu")
    assert gpu.tiles_refused.__wrapped__(cpu) == 0
    monkeypatch.setattr(gpu, "at_hand", lambda device: (Refusing(), "refusing"))
    assert gpu.tiles_refused.__wrapped__(cpu) == 35


@pytest.mark.parametrize("which", OPERATORS)
def test_tensor_cores_err_by_hardly_more_than_rounding_to_bf16_does(on_host, which):
    inputs = [*(x.bfloat16() for x in made(which, 2, 70, 2, 64)[:-1]), made(which, 2, 70, 2, 64)[-1]]
    stream = torch.Generator().manual_seed(2)
    pulls = [torch.randn(2, 70, 2, 64, generator=stream).bfloat16().double()]
    pulls += [torch.randn(2, 2, 64, 64, generator=stream).double()]
    assert on_tensor_cores(inputs)
    wanted = results(OPERATORS[which][1], [x.double() for x in inputs], pulls=pulls)
    for n, (found, real) in enumerate(zip(results(OPERATORS[which][0], inputs, pulls=pulls), wanted, strict=True)):
        rounded = rms(real.bfloat16(), real) if found.dtype == torch.bfloat16 else 1e-3
        assert rms(found, real) < 1.2 * rounded, n


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("w", [[0.5, 1.0], [-30.0, 3.6, 20.0], [-math.inf, -0.5, 87.0, 1e30]])
def test_tensor_cores_are_right_at_any_decay(tiled, which, w):
    inputs = in_bf16(which, 1, 35, 1, 64, w=w)
    for n, (found, wanted) in enumerate(zip(results(OPERATORS[which][0], inputs), exact(which, inputs), strict=True)):
        assert found.isfinite().all()
        assert near(found, wanted, 1.0), n


@pytest.mark.parametrize("which", ["wkv6", "wkv5"])
@pytest.mark.parametrize("w", [[2.0, 3.0], [3.6, 4.6], [-math.inf, 20.0]])
def test_what_is_forgotten_has_no_gradient_on_tensor_cores_and_little_that_is_left_has_the_right_one(tiled, which, w):
    inputs = in_bf16(which, 1, 35, 1, 64, w=w)
    found, wanted = (x[3] for x in (results(OPERATORS[which][0], inputs), exact(which, inputs)))
    for rate in w:
        here = inputs[1] == torch.tensor(rate).bfloat16().float()
        assert float((found - wanted)[here].norm()) <= 1e-3 * float(wanted[here].norm()) + 1e-37, rate


def test_tensor_cores_begin_documents_anew_in_the_middle_of_a_row(tiled):
    inputs = in_bf16("wkv7", 1, 70, 1, 64)
    for first in (5, 6, 16, 31, 69):
        inputs[1][:, first], inputs[5][:, first] = 8.0, 0.0
    for n, (found, wanted) in enumerate(zip(results(wkv7, inputs), exact("wkv7", inputs), strict=True)):
        assert float((found.double() - wanted).norm()) < 1e-3 * float(wanted.norm().clamp(min=1e-6)), n


@pytest.mark.parametrize("which", OPERATORS)
def test_tensor_cores_leave_the_state_as_it_is_where_a_row_is_filled_up(tiled, which):
    inputs = in_bf16(which, 1, 40, 2, 64)
    short = [x[:, :21] if x.dim() == 4 and x.shape[1] == 40 else x for x in inputs]
    if which == "wkv5":  # its decay is everybody's
        inputs[1].fill_(-torch.inf)
    else:
        inputs[1][:, 21:] = -torch.inf
    inputs[2][:, 21:], inputs[5][:, 21:] = 0, 0 if which == "wkv7" else inputs[5][:, 21:]
    _, filled = OPERATORS[which][0](*inputs)
    _, wanted = OPERATORS[which][0](*short)
    assert rms(filled, wanted.double()) < 1e-6


@pytest.mark.parametrize("which", OPERATORS)
def test_rows_in_pieces_give_gradients_through_their_states_on_tensor_cores(tiled, which):
    def twice(*inputs):
        return in_pieces(OPERATORS[which][0], inputs, (0, 37, 70))

    inputs = in_bf16(which, 1, 70, 1, 64)
    for found, wanted in zip(results(twice, inputs), exact(which, inputs), strict=True):
        assert rms(found, wanted) < 1.2e-3


@pytest.mark.parametrize("which, w", [("wkv7", None), ("wkv7", [0.5, 2.0]), ("wkv6", None), ("wkv5", None)])
def test_the_order_in_which_warps_and_threads_run_between_barriers_changes_nothing_for_tensor_cores(tiled, which, w):
    inputs, found = in_bf16(which, 1, 37, 1, 64, w=w), []
    for way in (0, 1):
        tiled.grid_order(way)
        found.append(results(OPERATORS[which][0], inputs))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("parts, w", [(1, None), (1, [0.5, 2.0]), (2, [0.5, 2.0]), (4, None)])
def test_tensor_cores_give_the_same_bits_whether_bf16_is_read_two_at_a_time_or_not(tiled, monkeypatch, parts, w):
    def anywhere(*inputs):
        """Tensors that begin at no multiple of four bytes."""
        return wkv7(*(torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in inputs[:-1]), inputs[-1])

    monkeypatch.setattr(gpu, "_parts", lambda operator, v: parts)
    inputs, stream = in_bf16("wkv7", 1, 37, 2, 64, w=w), torch.Generator().manual_seed(3)
    pulls = [torch.randn(x.shape, generator=stream).bfloat16() for x in (inputs[3], inputs[-1])]
    wide = results(wkv7, inputs, pulls=pulls)
    half = [*(x.bfloat16() for x in inputs[:-1]), inputs[-1]]
    for operator in (wkv7, anywhere):
        for found, one in zip(results(operator, half, pulls=pulls), wide, strict=True):
            assert torch.equal(found, one.to(found.dtype))


@pytest.mark.parametrize("which, parts", [("wkv7", 1), ("wkv7", 4), ("wkv6", 2), ("wkv5", 4)])
def test_tensor_cores_write_all_results_and_nothing_beside_them(tiled, guards, monkeypatch, which, parts):
    monkeypatch.setattr(gpu, "_parts", lambda operator, v: parts)
    found = results(OPERATORS[which][0], in_bf16(which, 1, 67, 2, 64))
    assert all(x.isfinite().all() for x in found)
    guards(9)


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("N", [8, 64])
def test_what_is_no_number_comes_out_as_none(tiled, which, N):
    bits = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)  # as a card writes it
    names = NAMES[which]
    for place in (1, 3, len(names) - 1):
        inputs = made(which, 1, 16, 1, N)
        inputs[place].view(-1)[3] = bits[0]
        y, S = OPERATORS[which][0](*inputs)
        assert y.isnan().any() and S.isnan().any(), names[place]


@pytest.mark.parametrize("which", OPERATORS)
def test_what_is_kept_for_the_backward_is_asked_for_once_since_it_may_be_computed_again_for_it(on_host, which):
    kept, asked = [], []

    def keep(x):
        kept.append(x)
        return len(kept) - 1

    def ask(place):
        asked.append(place)
        return kept[place]

    with torch.autograd.graph.saved_tensors_hooks(keep, ask):
        y, S = OPERATORS[which][0](*(x.requires_grad_() for x in made(which, 1, 9, 1, 8)))
        (y.sum() + S.sum()).backward()
    assert sorted(asked) == list(range(len(kept))) and len(kept) >= 6


def on_card():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.skipif(not on_card(), reason="there is no GPU here")
@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("sizes", [(2, 1, 2, 64), (1, 131, 3, 64), (2, 67, 2, 20), (1, 70, 2, 128)])
@pytest.mark.parametrize("w", [None, EXTREMES])
def test_a_card_computes_what_the_reference_does_and_the_same_bits_again(which, sizes, w):
    inputs = made(which, *sizes, w=w)
    wanted, plain = exact(which, inputs), results(OPERATORS[which][1], inputs)
    given = [x.cuda() for x in inputs]
    library, said = gpu.at_hand(given[0].device)
    assert library is not None, said
    found, again = ([x.cpu() for x in results(OPERATORS[which][0], given)] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    for one, real, other in zip(found, wanted, plain, strict=True):
        assert error(one, real, 1.0) < 2e-6 + 4 * error(other.nan_to_num(0.0), real, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not on_card(), reason="there is no GPU here")
@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("sizes", [(1, 16, 1, 64), (2, 131, 3, 64), pytest.param((8, 70, 40, 64), marks=LARGE)])
@pytest.mark.parametrize("w", [None, [0.5, 1.0, 20.0]])
def test_a_card_s_tensor_cores_err_as_built_for_the_host_and_give_the_same_bits_again(which, sizes, w):
    inputs = [x.bfloat16() for x in made(which, *sizes, w=w)]
    given = [*(x.cuda() for x in inputs[:-1]), inputs[-1].float().cuda()]
    assert gpu.way(which.replace("5", "6"), given[3])[0].endswith("_chunks")
    stream = torch.Generator().manual_seed(2)  # what bf16 holds: only what comes out is rounded
    pulls = [torch.randn(x.shape, generator=stream).bfloat16().double() for x in (inputs[3], inputs[-1])]
    wanted = results(OPERATORS[which][1], [x.double() for x in inputs], pulls=pulls)
    found, again = ([x.cpu() for x in results(OPERATORS[which][0], given, pulls=pulls)] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    for n, (one, real) in enumerate(zip(found, wanted, strict=True)):
        rounded = float((real.to(one.dtype) - real).norm())
        assert float((one.double() - real).norm()) < rounded + 1e-3 * float(
            real.norm().clamp(min=real.numel() ** 0.5)
        ), n


@LARGE
@pytest.mark.gpu
@pytest.mark.skipif(not on_card(), reason="there is no GPU here")
def test_indices_reach_beyond_32_bits_on_a_card():
    B, T, H, N = 1, 2**31 // (64 * 64) + 3, 64, 64  # more than 2^31 numbers a tensor
    x = torch.zeros(B, T, H, N, dtype=torch.bfloat16, device="cuda")
    x[:, -1] = 1.0
    y, S = wkv7(x, x, x, x, x, x)
    assert torch.equal(y[0, -1], torch.full_like(y[0, -1], 64.0)) and torch.equal(S[0, 0], torch.ones_like(S[0, 0]))


def test_the_cpu_s_own_kernels_are_asked_where_there_is_no_card():
    x = torch.rand(1, 3, 1, 8)
    assert not gpu.computes("wkv7", x) and (build.extension() is None or build.native(x) is not None)
