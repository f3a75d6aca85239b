"""The cpu backend of own_lora against float64, on every instruction set."""

import pytest
import torch
from ops.cases.own_lora import (
    TOLERANCE,
    assert_right,
    expected,
    expected_whole,
    make,
    make_base,
)

_C = pytest.importorskip("sapt_fast._C", reason="built without native kernels")
from sapt_fast.cpu_kernels import gemm  # noqa: E402
from sapt_fast.ops.own_lora import add_own_lora_, own_lora  # noqa: E402

# (shape of x, ranks, outputs, owner)
CASES = [
    ((1, 1), (1,), 1, [0]),
    ((3, 2, 0), (2, 1), 5, [1, -1, 0]),
    ((3, 2, 5), (2, 1), 0, [1, -1, 0]),
    ((3, 1, 19), (3, 1), 21, [1, 0, 1]),
    ((6, 1, 64), (8, 8, 4), 128, [0, 0, 2, -1, 2, 2]),
    ((2, 7, 270), (21, 0), 33, [0, 1]),
    ((9, 5, 33), (16, 2), 70, [0, 0, 0, 1, 1, 0, -1, 1, 1]),
    # ranks and rows beyond those of the kernel
    ((2, 2, 40), (300,), 50, [0, -1]),
    ((2, 40, 40), (4, 5), 50, [1, 0]),
]


@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_instruction_set(capability, dtype, lora_dtype, poisoned_memory):
    for shape, ranks, outputs, owner in CASES:
        y, x, adapters = make(shape, ranks, dtype, lora_dtype, outputs)
        want = expected(y, x, adapters, owner)
        assert_right(add_own_lora_(y, x, adapters, owner, backend="cpu"), want, dtype)


@pytest.mark.parametrize("product", ["ours", "oneDNN", "BLAS"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_with_the_base_product(dtype, product, poisoned_memory, monkeypatch):
    few = dict.fromkeys(TOLERANCE, 99 if product == "ours" else 0)
    monkeypatch.setattr(gemm, "_FEW_ROWS", few)
    monkeypatch.setattr(gemm, "_ONEDNN_WORK", 1 if product == "oneDNN" else 1 << 60)
    for shape, ranks, outputs, owner in CASES:
        _, x, adapters = make(shape, ranks, dtype, None, outputs)
        for transposed in (False, True):
            weight, bias = make_base(x, outputs, transposed)
            for given in (bias, None):
                want = expected_whole(x, weight, given, adapters, owner)
                got = own_lora(x, weight, given, adapters, owner, backend="cpu")
                assert_right(got, want, dtype)


def test_any_number_of_threads_gives_the_same(with_threads):
    def run():
        y, x, adapters = make((16, 1, 512), (8,) * 16, outputs=512)
        return add_own_lora_(y, x, adapters, list(range(16)))

    results = [with_threads(count, run) for count in (1, 2, 3)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_blocks_of_rows_do_not_change_the_result(with_threads):
    def run():
        y, x, adapters = make((3, 27, 64), (8, 3), outputs=40)
        return add_own_lora_(y, x, adapters, [1, 0, 1])

    # 3 threads share one read of an adapter among 16 rows, 9 among 4
    assert torch.equal(with_threads(3, run), with_threads(9, run))


def test_layouts_of_x_and_of_the_adapters():
    y, x, adapters = make((4, 2, 24), (3, 5), outputs=40)
    want = expected(y, x, adapters, [1, 0, 0, 1])
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    strided = [
        type(k)(k.a.t().contiguous().t(), k.b.t().contiguous().t(), k.scaling) for k in adapters
    ]
    assert_right(add_own_lora_(y, x, strided, [1, 0, 0, 1], backend="cpu"), want, torch.float32)


def test_the_binding_checks_what_would_read_out_of_bounds():
    one = torch.ones(1)

    def call(ranks=(1,), owner=(0,), a=(one,), rows=1, lora=_C.FLOAT32, inputs=1):
        _C.own_lora(
            *(_C.FLOAT32, lora, one.clone(), one, list(a), [one], list(ranks), [1.0]),
            *(list(owner), rows, inputs, 1, 1),
        )

    call()

    for bad in (
        {"ranks": (_C.MOST_OWN_RANKS + 1,)},
        {"ranks": (-1,)},
        {"owner": (1,)},
        {"owner": (-2,)},
        {"owner": (0, 0)},
        {"owner": ()},
        {"a": (None,)},
        {"inputs": 4_000_000},
        {"rows": 2, "owner": (0, 0)},
        {"a": ()},
        {"rows": -1},
        {"lora": _C.BFLOAT16},
    ):
        with pytest.raises(ValueError, match=":"):
            call(**bad)
