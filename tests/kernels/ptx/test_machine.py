"""The machine itself, on kernels of a few lines."""

import numpy as np
import pytest

from tests.kernels.ptx.launch import launch, pack
from tests.kernels.ptx.memory import GlobalMemory, KernelError
from tests.kernels.ptx.parse import Kernel, parse

THREADS = 64
HEADER = """
.visible .entry few_lines(
	.param .u64 .ptr .global .align 1 few_lines_param_0,
	.param .u64 .ptr .global .align 1 few_lines_param_1
)
.reqntid 64
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<19>;
	.reg .b64 %rd<19>;
	ld.param.b64 %rd1, [few_lines_param_0];
	ld.param.b64 %rd2, [few_lines_param_1];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mad.lo.s32 %r3, %r2, 64, %r1;
	mad.wide.s32 %rd3, %r3, 4, %rd1;
	mad.wide.s32 %rd4, %r1, 4, %rd2;
	shl.b32 %r4, %r1, 2;
	xor.b32 %r5, %r4, 4;
	setp.lt.s32 %p1, %r1, 10;
"""
"""The first pointer leads to the outputs, the second to the inputs; a thread has a word of each and of shared memory.

%r1 is the thread, %r2 the block, %r4 the thread's byte in shared memory, %r5 its neighbour's, %p1 holds for the first
ten threads, %rd3 and %rd4 are the addresses of the thread's words.
"""


def kernel(lines: str) -> Kernel:
    return parse(HEADER + lines.replace(";", ";\n").replace(":", ":\n") + "\nret;\n}\n")


def run(lines: str, blocks: int = 1, inputs: np.ndarray | None = None, shared_bytes: int = 256) -> np.ndarray:
    """What the lines leave in the outputs, [blocks, threads]."""
    inputs = np.arange(THREADS, dtype=np.int32) * 3 if inputs is None else inputs
    outputs = np.full((blocks, THREADS), -1, np.int32)
    memory = GlobalMemory()
    addresses = memory.add("outputs", outputs, written=False), memory.add("inputs", inputs)
    few_lines = kernel(lines)
    launch(few_lines, memory, pack(few_lines, addresses), (blocks, 1, 1), shared_bytes)
    return outputs


STORE = "st.global.b32 [%rd3], %r9;"
THREAD = np.arange(THREADS)


# Control.


def test_lanes_part_and_meet() -> None:
    lines = "mov.b32 %r9, 1; @!%p1 bra $other; mov.b32 %r9, 7; bra.uni $both; $other: add.s32 %r9, %r9, 1; $both:"
    assert run(lines + STORE).tolist() == [[7] * 10 + [2] * 54]


def test_lanes_of_blocks_go_round_as_often_as_they_like() -> None:
    lines = """mov.b32 %r9, 0; add.s32 %r10, %r1, %r2;
        $again: add.s32 %r9, %r9, 2; add.s32 %r10, %r10, -1; setp.ge.s32 %p2, %r10, 0; @%p2 bra $again;"""
    assert np.array_equal(run(lines + STORE, blocks=3), 2 * (1 + THREAD + np.arange(3)[:, None]))


def test_a_lane_that_has_left_does_nothing_more() -> None:
    assert run("mov.b32 %r9, 5; @%p1 ret;" + STORE).tolist() == [[-1] * 10 + [5] * 54]


def test_what_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kernels.ptx.machine._MAX_STEPS", 100)
    with pytest.raises(KernelError, match="few_lines does not end"):
        run("$again: bra.uni $again;")


@pytest.mark.parametrize(
    "lines",
    [
        "@%p1 bra $past; bar.sync 0; $past:",
        "@%p1 ret; bar.sync 0;",
        "@%p1 bra $other; bar.sync 0; bra.uni $both; $other: bar.sync 0; $both:",
        "@%p1 bar.sync 0;",
    ],
    ids=["passed by", "left", "two barriers", "guarded"],
)
def test_a_thread_that_is_missing_at_a_barrier_is_seen(lines: str) -> None:
    with pytest.raises(KernelError, match="a thread is missing at the barrier"):
        run(lines)


def test_threads_may_come_to_a_barrier_by_different_ways() -> None:
    lines = "@%p1 bra $late; mov.b32 %r9, 1; bra.uni $here; $late: mov.b32 %r9, 2; $here: bar.sync 0;"
    assert run(lines + STORE).tolist() == [[2] * 10 + [1] * 54]


def test_a_thread_that_is_missing_in_its_warp_is_seen() -> None:
    with pytest.raises(KernelError, match="a thread of a warp is missing"):
        run("@%p1 shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;")
    run("setp.lt.s32 %p2, %r1, 32; @%p2 shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;")


# Shared memory.


OWN = "st.shared.b32 [%r4], %r1;"
NEIGHBOUR = "ld.shared.b32 %r9, [%r5];"
BARRIER = "bar.sync 0;"


def test_a_barrier_makes_what_others_wrote_readable() -> None:
    assert np.array_equal(run(OWN + BARRIER + NEIGHBOUR + STORE, blocks=2), [THREAD ^ 1] * 2)


@pytest.mark.parametrize(
    "lines",
    [
        OWN + NEIGHBOUR,
        "st.shared.b32 [%r5], %r1;" + BARRIER + NEIGHBOUR + OWN,
        OWN + "st.shared.b32 [%r5], %r1;",
        "st.shared.b32 [global_smem], %r1;",
        OWN + BARRIER + "ld.shared.b32 %r9, [global_smem];" + OWN,
        OWN + BARRIER + "@%p1 bra $past; bar.sync 0; $past:" + NEIGHBOUR + OWN,
    ],
    ids=["read", "write after a read", "write", "one write", "read of all", "no barrier for some"],
)
def test_a_race_is_seen(lines: str) -> None:
    with pytest.raises(KernelError, match=r"race: .*shared memory|a thread is missing"):
        run(lines)


def test_what_is_no_race_passes() -> None:
    own = OWN + "ld.shared.b32 %r9, [%r4];" + OWN
    assert np.array_equal(run(own + BARRIER + NEIGHBOUR + BARRIER + OWN + STORE), [THREAD ^ 1])
    assert run("st.shared.b32 [global_smem], 9;" + BARRIER + "ld.shared.b32 %r9, [global_smem];" + STORE).max() == 9


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (NEIGHBOUR, "shared memory is read before it is written"),
        ("st.shared.b32 [%r4+4], %r1;", "out of bounds: shared memory has 256 bytes, not 260"),
        ("st.shared.b32 [%r4+2], %r1;", "misaligned: 4 bytes of shared memory at 0x2"),
        ("ld.shared.v2.b32 {%r9, %r10}, [%r4];", "misaligned: 8 bytes of shared memory at 0x4"),
    ],
)
def test_an_access_that_is_wrong_is_seen(lines: str, error: str) -> None:
    with pytest.raises(KernelError, match=error):
        run(lines)


COPY = "cp.async.ca.shared.global [%r4], [%rd4], 4;"
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"
NOT_WAITED, RACE = "a copy into it that nobody waited for", "race: shared memory is read"


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (COPY + "ld.shared.b32 %r9, [%r4];", NOT_WAITED),
        (COPY + COMMIT + BARRIER + NEIGHBOUR, NOT_WAITED),
        (COPY + WAIT + "ld.shared.b32 %r9, [%r4];", NOT_WAITED),
        (COPY + COMMIT + "cp.async.wait_group 1;" + BARRIER + NEIGHBOUR, NOT_WAITED),
        (COPY + COMMIT + OWN, NOT_WAITED),
        (COPY + COMMIT + COPY, NOT_WAITED),
        (COPY + COMMIT + WAIT + NEIGHBOUR, RACE),
        (COPY + COMMIT + BARRIER + WAIT + NEIGHBOUR, RACE),
        (OWN + BARRIER + NEIGHBOUR + COPY, "race: shared memory is written"),
    ],
)
def test_a_copy_that_is_not_there_yet_is_seen(lines: str, error: str) -> None:
    with pytest.raises(KernelError, match=error):
        run(lines)


def test_a_copy_is_there_after_its_wait() -> None:
    own = "ld.shared.b32 %r9, [%r4];"
    assert np.array_equal(run(COPY + COMMIT + WAIT + own + STORE), [THREAD * 3])
    assert np.array_equal(run(COPY + COMMIT + WAIT + BARRIER + NEIGHBOUR + STORE), [(THREAD ^ 1) * 3])
    another = COMMIT + "cp.async.ca.shared.global [%r4+256], [%rd4], 4;" + COMMIT + "cp.async.wait_group 1;"
    assert np.array_equal(run(COPY + another + own + STORE, shared_bytes=512), [THREAD * 3])
    nothing = "selp.b32 %r10, 4, 0, %p1; cp.async.ca.shared.global [%r4], [%rd4], 4, %r10;"
    assert np.array_equal(run(nothing + COMMIT + WAIT + own + STORE), [np.where(THREAD < 10, THREAD * 3, 0)])


# Global memory.


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ("ld.global.b32 %r9, [%rd4+4];", "out of bounds: inputs has 256 bytes, not 260"),
        ("st.global.b32 [%rd3+4], %r1;", "out of bounds: outputs has 256 bytes, not 260"),
        ("ld.global.b32 %r9, [%rd4+-4];", "out of bounds"),
        ("mov.b64 %rd5, 16; ld.global.b32 %r9, [%rd5];", "out of bounds: 0x10 is in no buffer"),
        ("ld.global.b32 %r9, [%rd4+2];", "misaligned: 4 bytes of inputs"),
        ("ld.global.b32 %r9, [%rd3];", "outputs: byte 0 is read before it is written"),
        ("@%p1 st.global.b32 [%rd3], %r1; ld.global.b32 %r9, [%rd3];", "outputs: byte 40 is read before it is written"),
        ("st.global.b32 [%rd1], %r1;", "race: two threads write different values to outputs at once"),
        ("add.s32 %r9, %r18, 1;", "register %r18 is read before it is written"),
    ],
)
def test_what_a_lane_may_not_do_is_seen(lines: str, error: str) -> None:
    with pytest.raises(KernelError, match=error):
        run(lines)


@pytest.mark.parametrize("blocks", [2, 40])
def test_blocks_may_not_rely_on_each_other(blocks: int) -> None:
    with pytest.raises(KernelError, match=r"race: (two threads write|outputs is written)"):
        run("mad.wide.s32 %rd5, %r1, 4, %rd1; st.global.b32 [%rd5], %r3;", blocks=blocks)
    with pytest.raises(KernelError, match="race: outputs is read"):
        run(STORE.replace("%r9", "%r1") + "ld.global.b32 %r9, [%rd1];", blocks=blocks)
    assert run(STORE.replace("%r9", "%r1") + "ld.global.b32 %r9, [%rd3];", blocks=blocks).shape == (blocks, THREADS)


def test_what_a_lane_does_not_load_is_no_number() -> None:
    assert np.isnan(run("@%p1 ld.global.b32 %r9, [%rd4];" + STORE)[0, 10:].view(np.float32)).all()


# Arithmetic, by examples of the PTX manual's rules.

NAN, INF, ONE, ONE_THIRD = "0f7FC00000", "0f7F800000", "0f3F800000", "0f3EAAAAAB"


def bits(value: float) -> int:
    return int(np.float32(value).view(np.int32))


@pytest.mark.parametrize(
    ("lines", "result"),
    [
        ("add.s32 %r9, 0x7fffffff, 1;", -(2**31)),
        ("sub.s32 %r9, 3, 5;", -2),
        ("mul.lo.s32 %r9, 65537, 65537;", 131073),
        ("mul.hi.s32 %r9, -7, 1717986919;", -3),
        ("mul.hi.u32 %r9, 0xffffffff, 0xffffffff;", -2),
        ("mul.wide.s32 %rd5, -3, 5; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r9, %rd5;", -1),
        ("mul.wide.u32 %rd5, 0xffffffff, 2; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r9, %rd5;", 1),
        ("mov.b64 %rd5, 9; mad.wide.s32 %rd6, -3, 4, %rd5; cvt.u32.u64 %r9, %rd6;", -3),
        ("div.s32 %r9, -7, 2;", -3),
        ("shl.b32 %r9, 1, 31;", -(2**31)),
        ("shl.b32 %r9, 1, 32;", 0),
        ("shr.s32 %r9, -8, 1;", -4),
        ("shr.s32 %r9, -8, 40;", -1),
        ("shr.u32 %r9, -8, 40;", 0),
        ("bfe.u32 %r9, 0xabc, 4, 4;", 0xB),
        ("bfe.s32 %r9, 0xabc, 4, 4;", -5),
        ("popc.b32 %r9, 0xf0f1;", 9),
        ("neg.s32 %r9, 5;", -5),
        ("not.b32 %r9, 0;", -1),
        ("max.s32 %r9, -1, 0;", 0),
        ("mov.b16 %rs1, -1; cvt.u32.u16 %r9, %rs1;", 65535),
        ("mov.b32 %r10, 0x12345678; cvt.u16.u32 %rs1, %r10; cvt.u32.u16 %r9, %rs1;", 0x5678),
        ("mov.b32 %r10, -2; cvt.s64.s32 %rd5, %r10; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r9, %rd5;", -1),
        ("mov.b16 %rs1, 0x3c00; cvt.f32.f16 %r9, %rs1;", bits(1)),
        ("mov.b16 %rs1, 0x3f80; cvt.f32.bf16 %r9, %rs1;", bits(1)),
        ("mov.b16 %rs1, 2; mov.b16 %rs2, 1; mov.b32 %r9, {%rs1, %rs2};", 0x10002),
        ("mov.b32 %r10, 0x10002; mov.b32 {%rs1, %rs2}, %r10; cvt.u32.u16 %r9, %rs2;", 1),
        (f"max.f32 %r9, {NAN}, {ONE};", bits(1)),
        # 1/3 * 3 is 1 + 2^-25 before it is rounded, and 1 after.
        (f"neg.f32 %r10, {ONE}; fma.rn.f32 %r9, {ONE_THIRD}, 0f40400000, %r10;", bits(2**-25)),
        # A tie of TF32 goes away from zero.
        ("cvt.rna.tf32.f32 %r9, 0f3F801000;", 0x3F802000),
        ("cvt.rna.tf32.f32 %r9, 0f3F800FFF;", 0x3F800000),
        ("mul.f16x2 %r9, 0x3c004000, 0x42003c00;", 0x42004000),
        ("fma.rn.bf16x2 %r9, 0x3f804000, 0x3f803f80, -2147450880;", 0x3F804000),
        ("ex2.approx.f32 %r9, 0f40400000;", bits(8)),
        ("sqrt.rn.f32 %r9, 0f41100000;", bits(3)),
        ("mov.b32 %r10, 5; shfl.sync.up.b32 %r9, %r10, 1, 0, -1;", 5),
        ("mov.b32 %r10, -1; redux.sync.add.s32 %r9, %r10, -1;", -32),
    ],
)
def test_arithmetic(lines: str, result: int) -> None:
    assert np.unique(run(lines + STORE)).tolist() == [result]


@pytest.mark.parametrize(
    ("comparison", "of_numbers", "with_nan"),
    [
        *(("eq.f32", False, False), ("ne.f32", True, False), ("lt.f32", True, False), ("gt.f32", False, False)),
        *(("neu.f32", True, True), ("ltu.f32", True, True), ("num.f32", True, False), ("nan.f32", False, True)),
    ],
)
def test_comparisons_with_what_is_no_number(comparison: str, of_numbers: bool, with_nan: bool) -> None:  # noqa: FBT001
    for other, result in ((INF, of_numbers), (NAN, with_nan)):
        lines = f"setp.{comparison} %p2, {ONE}, {other}; selp.b32 %r9, 1, 0, %p2;"
        assert np.unique(run(lines + STORE)).tolist() == [result]


def test_lanes_of_a_warp_exchange() -> None:
    assert np.array_equal(run("shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;" + STORE), [THREAD ^ 5])
    up = np.where(THREAD % 32 < 8, THREAD, THREAD - 8)
    assert np.array_equal(run("shfl.sync.up.b32 %r9, %r1, 8, 0, -1;" + STORE), [up])
    assert np.array_equal(run("redux.sync.max.s32 %r9, %r1, -1;" + STORE), [THREAD | 31])


@pytest.mark.parametrize("line", ["frob.b32 %r9, %r1;", "shfl.sync.down.b32 %r9, %r1, 1, 31, -1;", "bar.sync 1;"])
def test_what_is_not_known_is_refused(line: str) -> None:
    with pytest.raises(KernelError, match="unknown"):
        run(line)


@pytest.mark.parametrize("text", ["", HEADER + "what is this\n}\n", HEADER + "ld.global.b32 %r9, [%rd1 - %r2];\n}\n"])
def test_what_cannot_be_parsed_is_refused(text: str) -> None:
    with pytest.raises(SyntaxError):
        parse(text)
