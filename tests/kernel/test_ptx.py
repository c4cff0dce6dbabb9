"""PTX run here: what its instructions give, and that faults of a kernel are seen which a card would hide."""

import numpy as np
import pytest

from benchmarks.ptx import operations
from benchmarks.ptx.fault import Fault
from benchmarks.ptx.machine import Machine
from benchmarks.ptx.memory import Memory, sectors, wavefronts
from benchmarks.ptx.program import kernels

HEAD = """
.visible .entry made(
    .param .align 8 .b8 made_param_0[8]
)
{
    .reg .pred %p<4>;
    .reg .f32 %f<12>;
    .reg .b16 %rs<4>;
    .reg .b32 %r<12>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [made_param_0];
    cvta.to.global.u64 %rd2, %rd1;
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    mov.u32 %r3, shared;
    add.s32 %r4, %r3, %r2;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd2, %rd3;
"""


def run(body, threads=64, numbers=256, shared=1024):
    """The numbers of 32 bits that a kernel leaves where its parameter points to, and the machine."""
    memory, to = Memory(), np.arange(numbers, dtype=np.uint32)
    memory.allow(to.ctypes.data, to.nbytes)
    kernel = kernels(HEAD + body + "\nret;\n}")["made"]
    machine = Machine(kernel, threads, memory, np.array([to.ctypes.data], np.uint64).tobytes())
    machine.run(0, shared)
    return to, machine


MEET = "bar.sync 0;\n"
SOME = "setp.lt.u32 %p1, %r1, 40;\n"
EARLY = SOME + "@%p1 bra $L__A;\nret;\n$L__A:\n"  # the second warp is no whole one from here on
SUMS = "{%f0, %f1, %f2, %f3}"
PRODUCT = f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {SUMS}, {SUMS}, {{%f0, %f1}}, {SUMS};"
WRITE = "st.shared.u32 [%r4], %r1;\n"
ASK = """
shl.b32 %r5, %r1, 4;
add.s32 %r6, %r3, %r5;
mul.wide.u32 %rd5, %r1, 16;
add.s64 %rd5, %rd2, %rd5;
mov.u32 %r7, 16;
cp.async.cg.shared.global [%r6], [%rd5], 16, %r7;
"""
ARRIVED = "cp.async.wait_all;\n"


@pytest.mark.parametrize(
    "body, said",
    [
        ("ld.shared.u32 %r5, [%r4];", "never written"),
        (WRITE + "xor.b32 %r5, %r4, 128;\nld.shared.u32 %r6, [%r5];", "a race"),
        (WRITE + "st.shared.u32 [shared], %r1;", "a race"),
        (WRITE + MEET + "xor.b32 %r5, %r4, 128;\nld.shared.u32 %r6, [%r5];\nst.shared.u32 [%r4], %r1;", "a race"),
        ("st.shared.u32 [%r4+1000], %r1;", "of shared memory"),
        ("st.shared.u32 [%r4+2], %r1;", "aligned"),
        ("st.global.u32 [%rd4+1024], %r1;", "no tensor"),
        ("ld.global.u32 %r5, [%rd4+-4];", "no tensor"),
        ("ld.global.v2.u32 {%r5, %r6}, [%rd4];", "not aligned"),
        (SOME + "@%p1 bra $L__A;\nbar.warp.sync -1;\n$L__A:\n" + MEET, "some lanes"),
        (
            EARLY + f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {SUMS}, {SUMS}, {{%f0, %f1}}, {SUMS};",
            "some lanes",
        ),
        ("setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $L__A;\nret;\n$L__A:\n" + MEET, "ended"),
        ("setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $L__A;\n" + MEET + "ret;\n$L__A:\n" + MEET, "different barriers"),
        ("trap;", "a trap"),
        (ASK + "ld.shared.u32 %r8, [%r6];", "not arrived"),
        (ASK + MEET + "ld.shared.u32 %r8, [%r6];", "not arrived"),
        (ASK + ARRIVED + "xor.b32 %r8, %r6, 512;\nld.shared.u32 %r9, [%r8];", "a race"),  # of the other warp, at once
        (WRITE + "ld.shared.u32 %r8, [%r4];\n" + ASK, "a race"),
        (ASK.replace("[%rd5]", "[%rd5+8]"), "not aligned"),
        (ASK.replace("mov.u32 %r7, 16", "mov.u32 %r7, 4"), "a part"),
    ],
)
def test_what_a_kernel_must_not_do_is_seen(body, said):
    with pytest.raises(Fault, match=said):
        run(body)


@pytest.mark.parametrize(
    "body",
    [
        # a part of a warp goes a longer way, which lies behind, and is waited for
        f"{SOME}@%p1 bra $L__FAR;\n$L__BACK:\nbar.warp.sync -1;\nret;\n$L__FAR:\nbra.uni $L__BACK;",
        WRITE + MEET + "xor.b32 %r5, %r4, 128;\nld.shared.u32 %r6, [%r5];\n",  # a barrier between
        WRITE + "xor.b32 %r5, %r4, 4;\nld.shared.u32 %r6, [%r5];\n",  # the same warp
        "mov.u32 %r5, 7;\nst.shared.u32 [shared], %r5;\n",  # all write the same
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $L__A;\nret;\n$L__A:\nbar.warp.sync -1;\n",  # a whole warp
    ],
)
def test_what_a_kernel_may_do_is_no_fault(body):
    run(body)


def test_threads_that_went_apart_come_together_and_loops_end():
    """Each thread adds 3 for each even number below its own, 5 for each odd one."""
    to, _ = run(
        """
        mov.u32 %r5, 0;
        mov.u32 %r6, 0;
        $L__LOOP:
        setp.ge.u32 %p1, %r5, %r1;
        @%p1 bra $L__END;
        and.b32 %r7, %r5, 1;
        setp.eq.s32 %p2, %r7, 0;
        @%p2 bra $L__EVEN;
        add.s32 %r6, %r6, 5;
        bra.uni $L__NEXT;
        $L__EVEN:
        add.s32 %r6, %r6, 3;
        $L__NEXT:
        add.s32 %r5, %r5, 1;
        bra.uni $L__LOOP;
        $L__END:
        bar.warp.sync -1;
        st.global.u32 [%rd4], %r6;
        """
    )
    assert to[:64].tolist() == [sum(5 if n % 2 else 3 for n in range(thread)) for thread in range(64)]
    assert (to[64:] == np.arange(64, 256)).all()


def test_lanes_change_places_and_predicates_hold_threads_back():
    to, _ = run(
        """
        mov.u32 %r5, 8;
        shfl.sync.bfly.b32 %r6|%p1, %r1, %r5, 31, -1;
        setp.gt.u32 %p2, %r1, 3;
        @!%p2 add.s32 %r6, %r6, 1000;
        st.global.u32 [%rd4], %r6;
        """
    )
    assert to[:64].tolist() == [(n ^ 8) + 1000 * (n <= 3) for n in range(64)]


def test_matrices_come_by_rows_whose_places_lanes_give():
    """Words are their own numbers; each warp asks for its rows from the last to the first."""
    to, machine = run(
        """
        shl.b32 %r5, %r1, 4;
        add.s32 %r5, %r3, %r5;
        add.s32 %r6, %r2, 3;
        st.shared.v4.u32 [%r5], {%r2, %r2, %r2, %r6};
        bar.sync 0;
        xor.b32 %r7, %r1, 31;
        shl.b32 %r7, %r7, 4;
        add.s32 %r7, %r3, %r7;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r8, %r9, %r10, %r11}, [%r7];
        st.global.u32 [%rd4], %r9;
        """
    )
    for n in range(64):
        row = n // 32 * 32 + 31 - (8 + n % 32 // 4)
        assert to[n] == 4 * row + (3 if n % 4 == 3 else 0)
    assert machine.counts["wavefronts"] == 2 * 4 + 2 * 4


def test_what_was_asked_for_is_there_once_it_was_waited_for():
    """Each thread reads what the other warp asked for; odd ones ask for zeros."""
    to, machine = run(
        "st.global.u32 [%rd4], 7;\nst.global.u32 [%rd4+256], 8;\nst.global.u32 [%rd4+512], 9;\nbar.sync 0;\n"
        + ASK.replace("mov.u32 %r7, 16;", "and.b32 %r7, %r1, 1;\nxor.b32 %r7, %r7, 1;\nshl.b32 %r7, %r7, 4;")
        + ARRIVED
        + MEET
        + "xor.b32 %r8, %r6, 512;\nld.shared.u32 %r9, [%r8];\nst.global.u32 [%rd4], %r9;"
    )
    asked = np.arange(64) ^ 32
    assert to[:64].tolist() == [0 if n % 2 else 7 + n // 16 if n < 48 else 3 * 64 + 4 * (n - 48) for n in asked]
    assert machine.counts["cp"] == 4 and machine.counts["wavefronts"] == 8 + 8


WAIT, PUT, READ = "griddepcontrol.wait;\n", "st.global.u32 [%rd4], %r1;\n", "ld.global.u32 %r5, [%rd4];\n"
BESIDE, NEXT = "st.global.u32 [%rd4+256], %r1;\n", "griddepcontrol.launch_dependents;\n"


def follow(*bodies, launched=(0,)):
    """Kernels that follow each other over the same numbers, but for those that are launched; what they leave."""
    memory, to = Memory(), np.arange(256, dtype=np.uint32)
    memory.allow(to.ctypes.data, to.nbytes)
    for n, body in enumerate(bodies):
        memory.turns.begin(n not in launched)
        kernel, given = kernels(HEAD + body + "\nret;\n}")["made"], np.array([to.ctypes.data], np.uint64).tobytes()
        Machine(kernel, 64, memory, given, n not in launched).run(0, 1024)
    return to


@pytest.mark.parametrize(
    "bodies, said",
    [
        ((PUT, READ + WAIT), "read before its turn"),
        ((PUT, ASK + ARRIVED + WAIT), "read before its turn"),
        ((PUT, NEXT + READ + WAIT), "read before its turn"),
        ((PUT, SOME + "@%p1 " + WAIT + READ + WAIT), "read before its turn"),  # some have waited
        ((PUT, WAIT, READ + WAIT), "read before its turn"),  # the one before has
        ((READ, PUT + WAIT), "written before its turn"),
        ((READ, SOME + "@!%p1 " + WAIT + PUT + WAIT), "written before its turn"),
        ((READ, READ + WAIT + PUT), "has read before its turn"),
        ((READ, READ + WAIT, WAIT + PUT), "has read before its turn"),
        ((PUT, ""), "had not taken its turn"),
        ((PUT, NEXT), "had not taken its turn"),
        ((PUT, EARLY + WAIT), "had not taken its turn"),
    ],
)
def test_what_a_kernel_must_not_do_before_its_turn_is_seen(bodies, said):
    with pytest.raises(Fault, match=said):
        follow(*bodies)


def test_the_first_kernel_follows_none():
    with pytest.raises(Fault, match="nobody knows"):
        follow(WAIT, launched=())


@pytest.mark.parametrize(
    "bodies",
    [
        (PUT, WAIT + NEXT + READ + PUT, WAIT + READ),
        (PUT, "prefetch.global.L2 [%rd4];\n" + WAIT + READ),
        (BESIDE, READ + WAIT + BESIDE, READ + WAIT + BESIDE),  # what nobody writes
        (BESIDE, EARLY.replace("ret", WAIT + "ret") + READ + WAIT),  # some end before others
    ],
)
def test_what_a_kernel_may_do_before_its_turn_is_no_fault(bodies):
    follow(*bodies)


def test_a_kernel_that_is_launched_comes_after_all_others():
    to = follow(PUT, WAIT, READ + BESIDE, READ + WAIT, launched=(0, 2))
    assert to[:128].tolist() == [*range(64)] * 2


@pytest.mark.parametrize("how, wanted", [("or", 1), ("and", 0)])
def test_what_holds_for_some_is_told_to_all_at_a_barrier(how, wanted):
    to, _ = run(
        f"""
        setp.eq.s32 %p3, %r1, 40;
        {{
        .reg .pred %p1;
        .reg .pred %p2;
        mov.pred %p1, %p3;
        bar.red.{how}.pred %p2, 0, %p1;
        selp.u32 %r5, 1, 0, %p2;
        }}
        st.global.u32 [%rd4], %r5;
        """
    )
    assert (to[:64] == wanted).all()


@pytest.mark.parametrize(
    "how, by, rest, wanted",
    [
        ("down", 3, 0x1F, lambda n: n + 3 if n + 3 < 32 else n),
        ("up", 3, 0, lambda n: n - 3 if n >= 3 else n),
        ("idx", 5, 0x1F, lambda n: 5),
        ("down", 2, 0x181F, lambda n: n + 2 if n % 8 < 6 else n),  # by eights
        ("bfly", 1, 0x1F, lambda n: n ^ 1),
    ],
)
def test_lanes_read_each_other(how, by, rest, wanted):
    to, _ = run(f"shfl.sync.{how}.b32 %r6, %r1, {by}, {rest}, -1;\nst.global.u32 [%rd4], %r6;")
    assert to[:64].tolist() == [wanted(n % 32) + n // 32 * 32 for n in range(64)]


def test_bf16_is_rounded_to_even_and_packed_with_the_second_below():
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, np.nan, -2.0], "f4")
    assert operations.converted(("cvt", "rn", "bf16", "f32"), x).tolist() == [0x3F80, 0x3F80, 0x3F82, 0x7FFF, 0xC000]
    two = operations.converted(("cvt", "rn", "bf16x2", "f32"), x[:1], x[4:])
    assert two.tolist() == [0x3F80C000]


def test_a_warp_counts_once_however_few_of_its_threads_go_on():
    _, machine = run(
        "setp.lt.u32 %p1, %r1, 33;\n@%p1 bra $L__A;\nret;\n$L__A:\nprefetch.global.L2 [%rd2];\n", threads=96
    )
    assert machine.counts["prefetch"] == 2


def test_matrices_are_multiplied_with_the_bits_that_tensor_cores_see():
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(2, 16, 8)).astype("f4"), draw.normal(size=(2, 8, 8)).astype("f4")
    sums = draw.normal(size=(2, 16, 8)).astype("f4")
    lane = np.arange(64) % 32
    warp, g, t = np.arange(64) // 32, lane // 4, lane % 4
    a = [first[warp, g + 8 * (n % 2), t + 4 * (n // 2)] for n in range(4)]
    b = [second[warp, t + 4 * n, g] for n in range(2)]
    c = [sums[warp, g + 8 * (n // 2), 2 * t + n % 2] for n in range(4)]
    found = operations.matrices(a, b, c)
    for x in (first, second):
        x.view(np.uint32)[:] &= np.uint32(0xFFFFE000)
    wanted = first.astype("f8") @ second.astype("f8") + sums
    for n in range(4):
        assert np.allclose(found[n], wanted[warp, g + 8 * (n // 2), 2 * t + n % 2], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name, words, wanted",
    [
        ("div.s32", [-7, 2], -3),
        ("rem.s32", [-7, 2], -1),
        ("shr.s32", [-8, 1], -4),
        ("shr.u32", [8, 40], 0),
        ("shl.b32", [1, 31], -(1 << 31)),
        ("mul.hi.s32", [1 << 30, 8], 2),
        ("bfi.b32", [0xFF, 0, 4, 4], 0xF0),
        ("prmt.b32", [0x03020100, 0x07060504, 0x0426], 0x00040206),
        ("popc.b32", [0xF0F], 8),
        ("min.s32", [-1, 1], -1),
        ("min.u32", [-1, 1], 1),
    ],
)
def test_whole_numbers_are_as_the_isa_has_them(name, words, wanted):
    function, takes, gives = operations.plain(tuple(name.split(".")))
    found = function(*[np.array([word & 0xFFFFFFFF], np.uint32).view(takes) for word in words])
    assert int(np.asarray(found).astype(gives).view(np.int32)[0]) == wanted


def test_floats_are_rounded_as_they_are_told():
    third = [np.array([x], "f4") for x in (1, 3)]
    near, down, up = (operations.plain(("div", how, "f32"))[0](*third)[0] for how in ("rn", "rm", "rp"))
    assert down <= near <= up and up == np.nextafter(down, np.float32(1))
    nan = np.array([np.nan], "f4")
    assert operations.converted(("cvt", "sat", "f32", "f32"), nan)[0] == 0
    assert operations.plain(("max", "f32"))[0](nan, third[0])[0] == 1
    assert operations.compare(("setp", "leu", "f32"), nan, nan)[0]
    assert not operations.compare(("setp", "le", "f32"), nan, nan)[0]
    assert operations.compare(("setp", "nan", "f32"), nan, third[0])[0]
    assert np.isnan(operations.tf32(nan).view("f4")[0])


def test_what_memory_costs_is_counted_by_banks_and_sectors():
    lanes = np.arange(32)
    assert wavefronts(lanes * 4, 4, lanes) == 1
    assert wavefronts(lanes * 0, 4, lanes) == 1  # all read one word
    assert wavefronts(lanes * 8, 4, lanes) == 2
    assert wavefronts(lanes * 128, 4, lanes) == 32
    assert wavefronts(lanes * 8, 8, lanes) == 2
    assert wavefronts(lanes * 16, 16, lanes) == 4
    assert wavefronts(np.arange(64) * 4, 4, np.arange(64)) == 2  # two warps
    assert sectors(lanes * 4, 4, lanes) == 4
    assert sectors(lanes * 2, 2, lanes) == 2
    assert sectors(lanes * 64, 4, lanes) == 32


def test_ptx_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="not known"):
        run("brev.b32 %r5, %r1;")
