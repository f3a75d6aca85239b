"""Each check of the ahead-of-time report passes sound text and fails on its own fault."""

import aot_checks
import pytest
from aot_checks import Known

# A loop over tiles, within it the main loop, a rare path that is placed behind the end and jumps
# back, and the drain after the main loop.
PTX = """
\t@%p1 bra \t$L__BB0_9;
$L__BB0_2:                              // =>This Loop Header: Depth=1
\tmov.b32 %r1, 0;
$L__BB0_3:                              // Parent Loop BB0_2 Depth=1
\tcp.async.cg.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x10, %r4;
\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r5}, %rd6, %rd7, 1, 1, 1, 0, 0;
\twgmma.wait_group.sync.aligned 1;
\t@%p2 bra \t$L__BB0_3;
\twgmma.wait_group.sync.aligned 0;
\t@%p3 bra \t$L__BB0_7;
$L__BB0_5:
\t@%p4 bra \t$L__BB0_2;
\tbra.uni \t$L__BB0_9;
$L__BB0_7:
\tld.global.b16 { %rs1 }, [ %rd8 + 0 ];
\t@%p5 bra \t$L__BB0_7;
\tbra.uni \t$L__BB0_5;
$L__BB0_9:
\tret;
"""
TTIR = "%1 = tt.dot %a, %b, %c : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>"
FLOAT32 = TTIR.replace("bf16", "f32")
WAIT = "wgmma.wait_group.sync.aligned"
FMA = "\n".join(f"fma.rn.f32 %f{i}, %f1, %f2, %f3;" for i in range(40))


def test_loops_hold_what_is_their_own():
    [main] = aot_checks.main_loops(PTX)
    [outer] = [loop for loop in aot_checks.loops(PTX) if f"{WAIT} 0" in loop]
    [rare] = [loop for loop in aot_checks.loops(PTX) if loop not in (main, outer)]
    assert "mma_async" not in outer
    assert aot_checks.loaded(main) == {16: 1}
    assert aot_checks.loaded(rare) == {2: 1}


def test_a_jump_back_out_of_a_loop_makes_none():
    """$L__BB0_1 comes first in the text alone: not every way to the jump passes through it."""
    ptx = """
\t@%p1 bra \t$L__BB0_2;
$L__BB0_1:
\tret;
$L__BB0_2:
\t@%p2 bra \t$L__BB0_1;
\tld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
\tbra.uni \t$L__BB0_2;
"""
    [loop] = aot_checks.loops(ptx)
    assert "ret" not in loop


@pytest.mark.parametrize(
    ("load", "width"),
    [
        ("ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 2),
        ("@%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];", 8),
        ("ld.global.nc.L1::no_allocate.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 16),
        ("ld.global.L1::evict_last.b64 { %rd2 }, [ %rd1 + 0 ];", 8),
        ("ld.global.nc.v8.f32 {%f1}, [%rd1];", 32),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;", 4),
        ("cp.async.cg.shared.global [%r1], [%rd1], 16;", 16),
    ],
)
def test_widths_of_loads(load, width):
    assert aot_checks.loaded(load) == {width: 1}


def test_other_memory_is_not_loaded():
    assert not aot_checks.loaded("ld.shared.b32 %r1, [%r2];\nst.global.b32 [%rd1], %r1;")


def test_spills_and_serialised_products():
    log = "    0 bytes stack frame, {} bytes spill stores, 0 bytes spill loads"
    assert aot_checks.spills(log.format(0)) == []
    assert aot_checks.spills(log.format(24)) == ["spills 24 bytes"]
    warning = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    assert aot_checks.serialised(log) == []
    assert aot_checks.serialised(log + warning) != []


def test_a_main_loop_that_drains():
    assert aot_checks.drained(PTX) == []
    [problem] = aot_checks.drained(PTX.replace(f"{WAIT} 1", f"{WAIT} 0"))
    assert problem == "wgmma.wait_group 0 in 1 main loops"


def test_products_off_the_matrix_unit():
    check = aot_checks.off_the_matrix_unit
    assert check(TTIR, PTX, 90) == []
    assert check(TTIR, PTX.replace("wgmma.mma_async", "mma.sync"), 90) == ["no wgmma.mma_async"]
    assert check(TTIR, PTX, 86) == ["no mma.sync"]
    beside = PTX.replace("ld.global.b16", f"{FMA}\nld.global.b16")
    assert check(TTIR, beside, 90) == ["FFMA in place of matrix instructions in 1 loops"]
    for wait in (f"{WAIT} 1", f"{WAIT} 0"):  # arithmetic beside the products and after them
        assert check(TTIR, PTX.replace(wait, FMA), 90) == []
    # float32 is not meant for it, unless it may be rounded.
    assert check(FLOAT32, FMA, 90) == []
    for precision in ("tf32", "tf32x3"):
        rounded = FLOAT32.replace(" :", f", inputPrecision = {precision} :", 1)
        assert check(rounded, FMA, 90) == ["no wgmma.mma_async"]


def test_narrow_loads_in_a_main_loop():
    assert aot_checks.narrow(PTX) == []  # those of the rare path do not count
    copy = "cp.async.cg.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x10, %r4;"
    narrow = copy.replace("0x10", "0x8")
    assert aot_checks.narrow(PTX.replace(copy, narrow)) == []  # all that a thread loads
    problems = aot_checks.narrow(PTX.replace(copy, f"{narrow}\n{narrow}"))
    assert problems == ["narrow loads in a main loop: 2 x 8 B"]
    load = "ld.global.b16 { %rs1 }, [ %rd1 + 0 ];\n"
    assert aot_checks.narrow(PTX.replace(copy, f"{copy}\n{7 * load}")) == []
    assert aot_checks.narrow(PTX.replace(copy, f"{copy}\n{8 * load}")) != []


def test_narrow_loads_of_a_kernel_that_streams():
    row = "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];\n"
    ids = "ld.global.b64 { %rd2 }, [ %rd3 + 0 ];\n"
    loop = "$L__BB0_1:\n{}@%p1 bra $L__BB0_1;\nret;\n"
    assert aot_checks.narrow(loop.format(row + 6 * ids), streams=True) == []
    assert aot_checks.narrow(loop.format(row + 7 * ids), streams=True) != []
    assert aot_checks.narrow(row, streams=True) == []
    assert aot_checks.narrow(ids, streams=True) == ["narrow loads where it streams: 1 x 8 B"]


def test_synchronous_loads_in_a_main_loop():
    assert aot_checks.synchronous(PTX) == []
    load = "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];"
    copy = "cp.async.cg.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], 0x10, %r4;"
    assert aot_checks.synchronous(PTX.replace(copy, load)) != []
    tma = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1];"
    assert aot_checks.synchronous(PTX.replace(copy, tma)) == []


@pytest.mark.parametrize(
    ("capability", "most"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)]
)
def test_shared_memory(capability, most):
    assert aot_checks.too_much_shared(most * 1024, capability) == []
    assert aot_checks.too_much_shared(most * 1024 + 1, capability) != []


def _row(kernel, case, capability, *problems):
    return {
        "kernel": kernel, "case": case, "capability": capability, "problems": list(problems),
    }  # fmt: skip


def test_a_known_problem_is_told_apart_and_a_stale_one_is_found():
    known = Known("spills", "gemm_*", "*float32*", "why", (90,))
    other = Known("spills", "elsewhere", "*", "not among the rows")
    rows = [
        _row("gemm_kernel", "float32", 90, "spills 8 bytes", "no mma.sync"),
        _row("gemm_kernel", "float32", 86, "spills 8 bytes"),
        _row("shrink_kernel", "float32", 90, "spills 8 bytes"),
    ]
    judged, stale = aot_checks.judge(rows, (known, other))
    assert [row["problems"] for row in judged] == [
        ["no mma.sync"], ["spills 8 bytes"], ["spills 8 bytes"],
    ]  # fmt: skip
    assert [row["known"] for row in judged] == [{"spills 8 bytes": "why"}, {}, {}]
    assert stale == []
    judged, stale = aot_checks.judge([_row("gemm_kernel", "float32", 90)], (known, other))
    assert stale == [known]
