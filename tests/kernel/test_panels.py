"""Products with matrices in panels against fp64, natively and in PyTorch."""

from types import SimpleNamespace

import pytest
import torch

from rwkvpipe.kernel import build, panels
from rwkvpipe.kernel.panels import KINDS, Shelf, in_twelve, pack, times, unpack

needs_native = pytest.mark.skipif(build.extension() is None, reason=f"no native kernels here: {build.why_not()}")
SHAPES = [(1, 1), (15, 7), (16, 16), (33, 50), (130, 401), (257, 800)]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_packed_comes_back_rounded(shape, kind):
    matrix = drawn(*shape)
    kept = pack(matrix, kind)
    error = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.51 / 127}[kind]
    assert bool(((unpack(kept) - matrix).abs() <= error * matrix.abs().amax(1, keepdim=True)).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_fills_up_panels_is_zero(shape, kind, monkeypatch):
    monkeypatch.setattr(build, "extension", lambda: None)  # so that bf16 lies as it is
    kept, each = pack(drawn(*shape), kind), 2 if kind == "int8" else 1
    assert kept.kind == kind and kept.data.shape == (-(-shape[0] // 16), -(-shape[1] // each), 16, each)
    assert int(kept.data[-1, :, (shape[0] - 1) % 16 + 1 :].count_nonzero()) == 0
    assert shape[1] % each == 0 or int(kept.data[:, -1, :, -1].count_nonzero()) == 0


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_fp64(shape, kind, native, monkeypatch):
    if not native:
        monkeypatch.setattr(build, "native", lambda *_: None)
        monkeypatch.setattr(panels, "PART", 16 * shape[1] + 1)
    kept = pack(drawn(*shape), kind)
    for rows in ((3,), (2, 1), (5, 9), (0, 4)):
        x = drawn(*rows, shape[1], seed=1)
        wanted = x.double() @ unpack(kept).double().mT
        assert times(x, kept).shape == wanted.shape
        most = x.double().abs() @ unpack(kept).double().abs().mT
        if native and kind == "int8" and x.numel():  # x is rounded: its largest numbers are 32767
            most = most + 0.26 / 32767 / 1e-6 * x.abs().amax(-1, keepdim=True) * unpack(kept).abs().sum(1)
        assert bool(((times(x, kept) - wanted).abs() <= 2e-6 * most).all())


@needs_native
def test_rounding_x_for_int8_costs_nothing_beside_rounding_the_matrix():
    matrix, x = drawn(257, 1800), drawn(40, 1800, seed=1) * torch.logspace(-3, 3, 40)[:, None]
    kept = pack(matrix, "int8")
    exact, rounded = x.double() @ matrix.double().mT, x.double() @ unpack(kept).double().mT
    for rows in (40, 7):
        error = (times(x[:rows], kept) - rounded[:rows]).norm(dim=1)
        assert bool((error <= 0.01 * (rounded - exact)[:rows].norm(dim=1)).all())


@needs_native
def test_whole_numbers_are_multiplied_exactly_and_what_is_not_finite_stays_in_its_row():
    draw = torch.Generator().manual_seed(3)
    matrix = torch.randint(-127, 128, (20, 700), generator=draw).float()
    matrix[:, 0] = 127
    x = torch.randint(-32767, 32768, (30, 700), generator=draw).float()
    x[:, 0] = x[:, -1] = 32767
    kept = pack(matrix, "int8")
    parts = [x[:, n].double() @ matrix[:, n].double().mT for n in (slice(512), slice(512, None))]
    assert torch.equal(times(x, kept), parts[0].float() + parts[1].float())
    wanted = times(x, kept)
    x[3, 4], x[28, 600], x[29, 600], x[7] = torch.inf, torch.nan, -torch.inf, 1e-39
    for rows in (30, 5):
        found = times(x[:rows], kept)
        bad = found.isnan().all(1)
        assert bad.nonzero().flatten().tolist() == [n for n in (3, 28, 29) if n < rows]
        good = ~bad & (torch.arange(rows) != 7)
        assert torch.equal(found[good], wanted[:rows][good])
    assert bool((times(x, kept)[7].abs() < 1e-30).all())


@needs_native
def test_the_largest_sums_of_whole_numbers_do_not_overflow():
    kept = pack(torch.full((16, 1024), 3.0), "int8")
    for rows in (1, 40):
        assert torch.allclose(times(torch.full((rows, 1024), -5.0), kept), torch.tensor(-15.0 * 1024), rtol=1e-6)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_product(kind):
    kept, x, threads = pack(drawn(53, 800), kind), drawn(61, 800, seed=1), torch.get_num_threads()
    alone = torch.cat([times(row[None], kept) for row in x])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (2, 5, 11, 16, 18, 22, 24, 31, 40, 61):  # tiles of every height
                assert torch.equal(times(x[:rows], kept), alone[:rows])
    finally:
        torch.set_num_threads(threads)


def test_in_pytorch_a_large_matrix_is_in_fp32_a_part_at_a_time(monkeypatch):
    kept, seen = pack(drawn(50, 8), "int8"), []
    monkeypatch.setattr(build, "native", lambda *_: None)
    monkeypatch.setattr(panels, "PART", 200)
    monkeypatch.setattr(panels, "unpack", lambda part: seen.append(part.out * 8) or unpack(part))
    assert times(drawn(2, 3, 8), kept).shape == (2, 3, 50) and max(seen) <= 200 and sum(seen) == 400


needs_twelve = pytest.mark.skipif(
    build.extension() is None or not build.extension().twelve_there(), reason="no products with twelve bits here"
)


def weights(*shape, seed=0):
    """Numbers of bf16, some of them of exponents that few have, zeros of both signs and a row of zeros."""
    found = drawn(*shape, seed=seed)
    odd = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.002
    found[odd] *= torch.logspace(-30, 1, int(odd.sum()))
    found[0, 0], found[-1], found[0, -1] = -0.0, 0.0, 3e-41
    return found.bfloat16().float()


def same_bits(one, other):
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@needs_twelve
@pytest.mark.parametrize("shape", SHAPES)
def test_twelve_bits_lose_nothing(shape):
    matrix = weights(*shape)
    kept = in_twelve(matrix)
    assert kept.kind == "twelve" and same_bits(unpack(kept), matrix)
    for kind in ("fp32", "bf16"):
        assert pack(matrix, kind).kind == "twelve" and same_bits(unpack(pack(matrix, kind)), matrix)


@needs_twelve
def test_numbers_without_a_code_stand_beside_whatever_they_are(monkeypatch):
    monkeypatch.setattr(panels, "OTHERS", 1.0)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    for matrix in (every.view(256, 256), every.view(-1, 16), drawn(40, 70), every.view(8, -1)):
        assert same_bits(unpack(in_twelve(matrix)), matrix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2**20, 1), (2**18, 9)])
def test_a_shelf_has_room_for_what_narrow_matrices_take(shape, kind):
    matrix = drawn(*shape).bfloat16().float()
    assert torch.equal(unpack(pack(matrix, kind, Shelf([shape], kind))), unpack(pack(matrix, kind)))


@needs_twelve
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_too_many_of_them_and_the_matrix_lies_as_it_is(kind):
    matrix = weights(64, 256)
    matrix[:, :3] = (torch.arange(192).view(64, 3) % 100 - 90.0).exp2()
    kept = pack(matrix, kind)
    assert kept.kind == "bf16" and same_bits(unpack(kept), matrix)
    assert pack(drawn(64, 256), "fp32").kind == "fp32"


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
def test_released_weights_in_fp32_are_kept_in_what_they_need(native, monkeypatch):
    if not native:
        monkeypatch.setattr(build, "extension", lambda: None)
    matrix = weights(100, 90)
    assert pack(matrix, "fp32").kind in (("twelve", "bf16") if native else ("bf16",))
    matrix[70, 3] = 1 + 2**-20
    assert pack(matrix, "fp32").kind == "fp32"


def test_where_no_products_with_twelve_bits_are_bf16_lies_as_it_is(monkeypatch):
    monkeypatch.setattr(build, "extension", lambda: SimpleNamespace(twelve_there=lambda: 0))
    for kind in ("fp32", "bf16"):
        assert pack(weights(50, 33), kind).kind == "bf16"


@needs_twelve
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_with_twelve_bits_is_that_with_the_matrix(shape):
    matrix = weights(*shape, seed=3)
    kept, x = in_twelve(matrix), drawn(61, shape[1], seed=1)
    alone = torch.cat([times(row[None], kept) for row in x])
    most = x.double().abs() @ matrix.double().abs().mT
    assert bool(((alone - x.double() @ matrix.double().mT).abs() <= 2e-6 * most).all())
    for rows in (2, 3, 4, 7, 8, 11, 12, 15, 16, 40, 61):
        assert torch.equal(times(x[:rows], kept), alone[:rows])


@needs_twelve
def test_what_stands_beside_a_row_does_not_come_into_it():
    kept, x = in_twelve(weights(50, 13)), drawn(20, 13, seed=1)
    wanted, x[1::2] = times(x, kept), torch.nan
    assert torch.equal(times(x, kept)[::2], wanted[::2]) and times(x, kept)[1::2].isnan().all()
    whole = torch.full((13 + 16,), torch.nan)
    whole[:13] = x[0]
    assert torch.equal(times(whole[:13], kept), wanted[0])
