"""What native code reads is what its sources say it reads: nothing else gets through the door."""

import ast
import re

import pytest
import torch

from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.infer.decode import Decoder
from rwkvpipe.infer.draw import Asked, choose
from rwkvpipe.kernel import blend, build, gate, panels, takes
from rwkvpipe.kernel.loss import Wanted, head_loss
from rwkvpipe.kernel.wkv5 import wkv5
from rwkvpipe.kernel.wkv6 import wkv6
from rwkvpipe.kernel.wkv7 import wkv7
from rwkvpipe.model.family import build as model_of
from rwkvpipe.model.layers import State

PACKAGE = takes.SOURCES.resolve().parent / "rwkvpipe"
FUNCTIONS = {(where, name): told for where in (takes.CPU, takes.CARD) for name, told in takes.functions(where).items()}
needs_native = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")


def called(through):
    """Names of native functions that the package calls through `build.call`, `gpu.call` or a `Pass`."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == through:
                yield node.args[0].value if isinstance(node.args[0], ast.Constant) else ast.unparse(node.args[0])


def fit(where, function):
    """Sizes, and what a function takes of them; all in fp32 that may be."""
    names, places = FUNCTIONS[where, function]
    sizes = tuple(0 if name.startswith("/") else n for n, name in enumerate(names, 2))
    counts = [each[2:] for each in takes._wanted(function, sizes, where)]
    given = []
    for place, (many, count) in zip(places, counts, strict=True):
        each = torch.zeros(5 if count is None else count, dtype=place.dtype or torch.float32)
        told = many is not None and count is None and where == takes.CPU  # where they lie
        listed = build.words([each] * many) if told else [each] * (many or 0)
        given.append(0.5 if not place.pointer else each if many is None else listed)
    return sizes, places, given


def wrong(x, place):
    """Tensors beside `x` that a function must not read."""
    other = torch.float32 if x.dtype != torch.float32 else torch.float64
    yield x.to(other), TypeError
    yield x.to("meta"), TypeError
    yield x.tolist(), TypeError
    if not place.null:
        yield None, TypeError
    if place.count is not None:
        yield x[:-1], ValueError
        yield torch.cat((x, x[:1])), ValueError
        yield x.repeat_interleave(2)[::2], ValueError


def test_every_native_function_that_is_called_says_what_it_takes():
    names = set(called("build.call"))
    meant = {"self.form.function": {"decode6", "decode7"}, "function": {"read6", "read7"}}
    for end in ("_forward", "_backward"):
        meant[f"f'{{way.name}}{end}'"] = {name + end for name in called("Pass")}
    assert names >= set(meant)
    assert names.union(*meant.values()) - set(meant) == set(takes.functions())
    texts = "".join(file.read_text().partition('extern "C"')[2] for file in takes.SOURCES.glob("*_cpu.cpp"))
    assert set(re.findall(r"^void (\w+)\(const int64_t \*", texts, re.MULTILINE)) == set(takes.functions())


def test_every_kernel_of_a_card_says_what_it_takes():
    known = set(takes.functions(takes.CARD))
    assert set(called("gpu.call")) == {name for name in known if not name.startswith("wkv")}
    texts = "".join(file.read_text().partition('extern "C"')[2] for file in takes.SOURCES.glob("*.cu"))
    assert set(re.findall(r"^ ?int (\w+)\(const int64_t \*", texts, re.MULTILINE)) == known


@pytest.mark.parametrize("where, function", FUNCTIONS)
def test_what_fits_goes_in_and_nothing_else(where, function):
    sizes, places, given = fit(where, function)

    def check(sizes, given):
        takes.check(function, sizes, given, where)

    check(sizes, given)
    for bad in (given[:-1], [*given, given[-1]]):
        with pytest.raises(TypeError, match=f"{function} takes {len(places)} inputs"):
            check(sizes, bad)
    for bad in (sizes[:-1], (*sizes, 1), (-1, *sizes[1:])):
        with pytest.raises(ValueError, match=f"{function}: sizes are"):
            check(bad, given)
    for n, (place, x) in enumerate(zip(places, given, strict=True)):
        cases = [(None, (TypeError, ValueError)), (3, (TypeError, ValueError))]
        if isinstance(x, torch.Tensor):
            cases = list(wrong(x, place))
        elif isinstance(x, list):
            cases += [(x[:-1], ValueError), *(([*x[:-1], bad], kind) for bad, kind in wrong(x[-1], place))]
        elif not isinstance(x, float):
            cases += [(build.words([torch.zeros(1)] * (len(x) + 1)), ValueError)]
        for bad, kind in cases:
            with pytest.raises(kind, match=f"^{function}: {place.name} "):
                check(sizes, [*given[:n], bad, *given[n + 1 :]])
        if place.null:
            check(sizes, [*given[:n], None, *given[n + 1 :]])


@pytest.mark.parametrize("function", takes.functions(takes.CARD))
def test_each_bit_of_the_sizes_is_that_of_its_tensor(function):
    sizes, places, given = fit(takes.CARD, function)
    names = [place.name for place in places]
    for n, said in enumerate(takes.functions(takes.CARD)[function][0]):
        for bit, name in enumerate(said.split("/")[1:]):
            at = names.index(name)
            narrow = [x.bfloat16() for x in given[at]] if isinstance(given[at], list) else given[at].bfloat16()
            other = [*given[:at], narrow, *given[at + 1 :]]
            right = [*sizes[:n], 1 << bit, *sizes[n + 1 :]]
            takes.check(function, right, other, takes.CARD)
            for sizes_, given_ in ((sizes, other), (right, given)):
                with pytest.raises(TypeError, match=f"^{function}: {name} is torch.*, which its sizes deny"):
                    takes.check(function, sizes_, given_, takes.CARD)


@pytest.mark.parametrize("operator", [wkv5, wkv6, wkv7])
def test_recurrences_on_a_card_refuse_inputs_of_other_sizes(on_host, operator):
    refuses(operator)


@needs_native
@pytest.mark.parametrize("operator", [wkv5, wkv6, wkv7])
def test_recurrences_refuse_inputs_of_other_sizes(operator):
    refuses(operator)


def refuses(operator):
    x, small, narrow = torch.rand(2, 5, 2, 8), torch.rand(2, 4, 2, 8), torch.rand(2, 8)
    inputs = {wkv7: [x] * 6, wkv6: [x, x, x, x, narrow], wkv5: [x, narrow, x, x, narrow]}[operator]
    assert all(y.isfinite().all() for y in operator(*inputs))
    for n in range(1, len(inputs)):
        bad = small if inputs[n] is x else narrow[:, :4]
        with pytest.raises(ValueError, match="reads"):
            operator(*inputs[:n], bad, *inputs[n + 1 :])


@needs_native
def test_passes_refuse_inputs_of_other_sizes():
    x, last, row, heads = torch.rand(2, 5, 16), torch.rand(2, 16), torch.rand(1, 1, 16), torch.rand(2, 5, 2, 8)
    rows, norm = (row,) * 4, (torch.rand(2, 8), torch.rand(16), torch.rand(16))
    for bad in (
        lambda: blend.mix(x, last[:1], [row]),
        lambda: blend.mix(x, last, [row[..., :8]]),
        lambda: blend.prepare(x, x, x[:, :4], rows, 2),
        lambda: blend.lean(x, x[:, :4], x, row),
        lambda: blend.finish(heads, heads, heads[:, :4], heads, x, norm, 0.1),
        lambda: gate.drift(x, last, [x] * 4, [row] * 4),
        lambda: gate.gate(heads, x[:, :4], *norm[1:], 0.1),
        lambda: gate.sift(x, x[:1]),
        lambda: panels.times(x, panels.pack(torch.rand(4, 12), "fp32")),
    ):
        with pytest.raises(ValueError):
            bad()


@pytest.mark.parametrize("count", range(8))
def test_any_number_of_mixes_is_made(count):
    x, last, shares = torch.rand(2, 5, 16), torch.rand(2, 16), list(torch.rand(count, 1, 1, 16))
    wanted = blend.mix(x.double(), last.double(), [share.double() for share in shares])
    for one, other in zip(blend.mix(x, last, shares), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", [30, 1 << 40])
def test_a_target_that_no_logit_is_of_is_refused(dtype, chosen):
    x, weight = torch.rand(3, 8, dtype=dtype), torch.rand(30, 8, dtype=dtype)
    targets, real = torch.tensor([29, -100, chosen]), torch.ones(3, dtype=torch.bool)
    with pytest.raises(IndexError, match=f"{chosen}"):
        head_loss(x, weight, Wanted(targets, real, 1.0))
    assert head_loss(x, weight, Wanted(targets.clamp(max=29), real, 1.0)).isfinite()


@pytest.mark.parametrize("barred", [-1, 9, 1 << 40])
def test_barred_ids_that_no_logit_is_of_are_refused(barred):
    logits = torch.rand(2, 9)
    with pytest.raises((IndexError, RuntimeError)):
        choose(Asked(logits, logits, torch.tensor([3, barred])), SamplingConfig(temperature=0.0))


@needs_native
@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
def test_writing_refuses_states_of_other_rows_and_ids_of_other_types(family):
    model = model_of(RwkvConfig(family=family, n_layer=2, n_embd=32, head_size=16, vocab_size=30))
    model.initialise(0)
    step, config = Decoder(model), model.config
    assert step.step(torch.tensor([1, 29]), State.zeros(config, 2)).isfinite().all()
    with pytest.raises(ValueError, match="att_x"):
        step.step(torch.tensor([1, 2]), State.zeros(config, 1))
    with pytest.raises(TypeError, match="ids"):
        step.step(torch.tensor([1, 2], dtype=torch.int32), State.zeros(config, 2))
    with pytest.raises(TypeError, match="att_x"):
        step.step(torch.tensor([1, 2]), State.zeros(config, 2, dtype=torch.float64))
    with pytest.raises(IndexError):
        step.step(torch.tensor([1, 30]), State.zeros(config, 2))
