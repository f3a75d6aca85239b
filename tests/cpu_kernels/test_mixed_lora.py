"""The cpu backend of mixed_lora against float64 loops over samples and adapters."""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_C = pytest.importorskip("sapt_fast._C", reason="built without native kernels")
from sapt_fast.cpu_kernels import gemm  # noqa: E402
from sapt_fast.cpu_kernels import mixed_lora as kernel  # noqa: E402
from sapt_fast.ops.projection import Projection  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
    torch.float64: 1e-13,
}


class Case(NamedTuple):
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    mixture: Tensor
    row_adapter: Tensor
    row_scale: Tensor

    @property
    def projection(self) -> Projection:
        return Projection(
            self.weight, self.bias, self.lora_a, self.lora_b, self.row_adapter, self.row_scale
        )


def forward(case: Case) -> tuple[Tensor, Tensor]:
    [result] = kernel.mixed_lora_fwd(case.x, case.mixture, [case.projection])
    return result


def backward(case: Case, dy: Tensor, h: Tensor, train_rows: list[int], *modes: bool):
    """dx, d_mixture, d_a, d_b; the modes are needs_x, needs_mixture, grad_through_frozen."""
    dx, d_mixture, [factors] = kernel.mixed_lora_bwd(
        [dy], case.x, case.mixture, [case.projection], [h], [train_rows], *modes
    )
    return dx, d_mixture, *factors


def make_case(
    samples: int = 3,
    rows: int = 5,
    inputs: int = 37,
    outputs: int = 53,
    ranks: tuple[int, ...] = (4, 4, 4),
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    total, count = sum(ranks), len(ranks)
    adapter = torch.repeat_interleave(torch.arange(count), torch.tensor(ranks)).to(torch.int32)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    scaling = 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)
    return Case(
        x=normal(samples * rows, inputs).to(dtype),
        weight=(normal(outputs, inputs) / inputs**0.5).to(dtype),
        bias=normal(outputs).to(dtype),
        lora_a=(normal(total, inputs) / inputs**0.5).to(lora_dtype or dtype),
        lora_b=normal(total, outputs).to(lora_dtype or dtype),
        mixture=torch.softmax(normal(samples, count), -1).to(compute),
        row_adapter=adapter,
        row_scale=scaling[adapter.long()].to(compute),
    )


def expected_forward(case: Case) -> tuple[Tensor, Tensor]:
    x, weight, bias, a, b, mixture, adapter, scale = (
        None if t is None else t.double() for t in case
    )
    y = x.new_zeros(x.shape[0], b.shape[1])
    if weight is not None:
        y += x @ weight.t()
    if bias is not None:
        y += bias
    for rows, weights in zip(y.chunk(len(mixture)), _samples(case), strict=True):
        for j, k in enumerate(adapter.long()):
            rows += weights.mixture[k] * scale[j] * torch.outer(weights.x @ a[j], b[j])
    return y, x @ a.t()


class _Sample(NamedTuple):
    x: Tensor
    mixture: Tensor


def _samples(case: Case) -> list[_Sample]:
    rows = case.x.double().chunk(len(case.mixture))
    return [_Sample(x, m) for x, m in zip(rows, case.mixture.double(), strict=True)]


def expected_backward(
    case: Case, dy: Tensor, train_rows: list[int], through_frozen: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by autograd through the loop above."""
    x = case.x.double().requires_grad_()
    a, b = case.lora_a.double().requires_grad_(), case.lora_b.double().requires_grad_()
    mixture = case.mixture.double().requires_grad_()
    trained = torch.zeros(len(a), dtype=torch.bool)
    for start, stop in zip(train_rows[::2], train_rows[1::2], strict=True):
        trained[start:stop] = True
    per_sample = x.shape[0] // len(mixture)
    weights = mixture[:, case.row_adapter.long()] * case.row_scale.double()
    weights = weights.repeat_interleave(per_sample, 0)
    # The frozen ranks see a detached x where they must not pass a gradient on.
    h = x @ a.t()
    if not through_frozen:
        h = torch.where(trained, h, x.detach() @ a.t())
    y = (h * weights) @ b
    if case.weight is not None:
        y = y + x @ case.weight.double().t()
    grads = torch.autograd.grad(y, (x, mixture, a, b), dy.double())
    return grads[0], grads[1], grads[2][trained], grads[3][trained]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    assert not actual.isnan().any(), "an output was left unwritten"
    if expected.numel():
        error = (actual.double() - expected).pow(2).mean().sqrt()
        tolerance = max(TOLERANCE[dtype], TOLERANCE[actual.dtype])
        assert error <= tolerance * (expected.pow(2).mean().sqrt() + 1e-30)


def check(case: Case, train_rows: list[int], through_frozen: bool = True, dy: Tensor | None = None):
    y, h = forward(case)
    want_y, want_h = expected_forward(case)
    dtype = case.x.dtype
    assert y.dtype == h.dtype == dtype
    assert_close(y, want_y, dtype)
    assert_close(h, want_h, dtype)
    if dy is None:
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
    before = dy.clone()
    got = backward(case, dy, h, train_rows, True, True, through_frozen)
    assert torch.equal(dy, before), "the incoming gradient was overwritten"
    want = expected_backward(case, dy, train_rows, through_frozen)
    assert got[1] is not None
    assert got[1].dtype == case.mixture.dtype
    for actual, expected in zip(got[:2], want[:2], strict=True):
        assert_close(actual, expected, dtype)
    for actual, expected in zip(got[2:], want[2:], strict=True):
        if train_rows:
            assert actual.dtype == case.lora_a.dtype
            assert_close(actual, expected, dtype)
        else:
            assert actual is None
    return got


@pytest.fixture(params=["gemms", "accumulate", "whole"])
def route(request, monkeypatch):
    """The three ways of the forward, whatever the number of rows."""
    decode, whole = {"gemms": (-1, -1), "accumulate": (999, -1), "whole": (999, 999)}[request.param]
    monkeypatch.setattr(kernel, "_DECODE_ROWS", dict.fromkeys(DTYPES, decode))
    monkeypatch.setattr(gemm, "_FEW_ROWS", dict.fromkeys(DTYPES, whole))
    monkeypatch.setattr(gemm, "_FEW_WIDENED_ROWS", whole)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("capability", "route")
class TestEveryInstructionSetAndRoute:
    def test_per_sample(self, dtype):
        check(make_case(dtype=dtype), [8, 12])

    def test_odd_sizes(self, dtype):
        check(make_case(2, 3, 63, 131, (5, 1, 7), dtype), [0, 5])

    def test_per_token(self, dtype):
        check(make_case(7, 1, dtype=dtype), [4, 8])

    def test_one_row(self, dtype):
        check(make_case(1, 1, 64, 128, (60,), dtype), [])

    def test_float32_adapters(self, dtype):
        check(make_case(dtype=dtype, lora_dtype=torch.float32), [8, 12])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 9])
def test_every_row_block_of_the_decode(rows, monkeypatch):
    monkeypatch.setitem(gemm._FEW_ROWS, torch.float32, 99)
    check(make_case(1, rows, 40, 77, (3, 2)), [3, 5])


@pytest.mark.parametrize("rows", [9, 13, 16, 17, 31])
def test_rows_in_the_lanes_and_beyond(rows, capability, monkeypatch):
    """More inputs than one sum takes, and an odd number of outputs."""
    monkeypatch.setitem(gemm._FEW_ROWS, torch.float32, 99)
    check(make_case(1, rows, 600, 77, (3, 2)), [3, 5])


@pytest.mark.parametrize("rows", [3, 12, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 5), (5, 0)])
def test_layers_without_width(inputs, outputs, rows):
    check(make_case(1, rows, inputs, outputs, (3, 2)), [3, 5])


@pytest.mark.usefixtures("route")
class TestShapes:
    @pytest.mark.parametrize("ranks", [(0, 4, 0, 2), (4,), (0, 0), (1,) * 9])
    def test_ranks(self, ranks):
        case = make_case(ranks=ranks)
        got = check(case, [0, sum(ranks)] if sum(ranks) else [])
        for k, r in enumerate(ranks):
            assert r > 0 or not got[1][:, k].any()

    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize("with_weight", [False, True])
    def test_without_base_or_bias(self, with_weight, with_bias):
        case = make_case()
        case = case._replace(
            weight=case.weight if with_weight else None, bias=case.bias if with_bias else None
        )
        if with_weight or not with_bias:
            check(case, [0, 4])

    def test_no_rows(self):
        case = make_case(samples=0)._replace(mixture=torch.zeros(2, 3))
        y, h = forward(case)
        assert y.shape == (0, 53)
        assert h.shape == (0, 12)
        dy = torch.zeros(0, 53)
        dx, d_mixture, d_a, d_b = backward(case, dy, h, [0, 4], True, True, True)
        assert dx.shape == (0, 37)
        for gradient, shape in ((d_mixture, (2, 3)), (d_a, (4, 37)), (d_b, (4, 53))):
            assert torch.equal(gradient, torch.zeros(shape))

    def test_non_contiguous(self):
        case = make_case(inputs=24, outputs=40)
        case = case._replace(
            x=case.x.repeat_interleave(2, 1)[:, ::2],
            weight=case.weight.t().contiguous().t(),
            bias=case.bias.repeat_interleave(2)[::2],
            mixture=case.mixture.t().contiguous().t(),
        )
        check(case, [4, 8], dy=torch.ones(()).expand(case.x.shape[0], 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("through_frozen", [True, False])
@pytest.mark.parametrize("train_rows", [[], [0, 12], [8, 12], [0, 4, 8, 12], [1, 3, 4, 5, 11, 12]])
def test_trained_rows(dtype, train_rows, through_frozen):
    check(make_case(dtype=dtype), train_rows, through_frozen)


@pytest.mark.parametrize("through_frozen", [True, False])
def test_only_what_is_needed(through_frozen):
    case = make_case()
    _, h = forward(case)
    got = backward(case, torch.ones(15, 53), h, [], False, False, through_frozen)
    assert got == (None, None, None, None)


@pytest.mark.usefixtures("capability")
def test_many_ranks_and_long_samples():
    """More ranks than one block of weights holds, more rows than one partial sum takes."""
    check(make_case(2, 300, 9, 11, (600, 3, 0, 101)), [598, 650])


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("trained", [1, 7])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_factor_gradients_over_several_blocks(dtype, trained, threads):
    """More columns than a block and more rows, and an odd number of both."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(make_case(3, 51, 1100, 523, (8,), dtype), [0, trained])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("weight", ["plain", "transposed", "none"])
def test_sizes_that_use_onednn(weight, monkeypatch):
    monkeypatch.setattr(gemm, "_ONEDNN_WORK", 1)
    case = make_case(2, 70, 48, 80, (4,) * 5)
    case = case._replace(bias=case.bias.repeat_interleave(2)[::2])
    if weight == "transposed":
        case = case._replace(weight=case.weight.t().contiguous().t())
    elif weight == "none":
        case = case._replace(weight=None, bias=None)
    check(case, [16, 20])
    check(case, [0, 4, 16, 20], through_frozen=False)


class _Products(TorchDispatchMode):
    """Notes the dtype of every matrix product of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name.split("::")[1] in _PRODUCTS:
            self.dtypes.update(given.dtype for given in args if isinstance(given, Tensor))
        return func(*args, **(kwargs or {}))


_PRODUCTS = ("mm", "addmm", "addmm_", "linear", "_linear_pointwise", "bmm", "matmul")


@pytest.fixture(params=["default", "avx2", "avx512"])
def without_bfloat16(request):
    """A CPU that has no instructions for 16-bit products."""
    if request.param not in _C.cpu_capabilities() or "avx2" not in _C.cpu_capabilities():
        pytest.skip(f"this CPU has no {request.param}, or is not known to be slow")
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield
    _C.set_cpu_capability(before)


@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
class TestProductsWidened:
    """16-bit products in float32, in several blocks of rows and of columns."""

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        monkeypatch.setattr(gemm, "_WIDENED", 1)

    @pytest.mark.parametrize("through_frozen", [True, False])
    @pytest.mark.parametrize("weight", ["plain", "transposed", "none"])
    def test_every_gradient(self, dtype, lora_dtype, weight, through_frozen):
        case = make_case(2, 75, 133, 71, (16, 4, 20), dtype, lora_dtype)
        if weight == "transposed":
            case = case._replace(weight=case.weight.t().contiguous().t())
        elif weight == "none":
            case = case._replace(weight=None, bias=None)
        with _Products() as products:
            check(case, [0, 16, 20, 40], through_frozen)
        assert products.dtypes <= {torch.float32, torch.float64}

    def test_onto_the_gradient_of_another_projection(self, dtype, lora_dtype):
        case = make_case(2, 75, 133, 71, (4, 4), dtype, lora_dtype)
        [(y, h)] = kernel.mixed_lora_fwd(case.x, case.mixture, [case.projection])
        one, two = (
            kernel.mixed_lora_bwd(
                [y] * n, case.x, case.mixture, [case.projection] * n, [h] * n, [[]] * n,
                True, True, True,
            )[:2]
            for n in (1, 2)
        )  # fmt: skip
        for single, double in zip(one, two, strict=True):
            assert_close(double, 2 * single.double(), dtype)


@pytest.mark.usefixtures("without_bfloat16")
@pytest.mark.parametrize("rows", [5, 20, 150])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widened_products_are_rounded_once(dtype, rows):
    """Sums of integers are exact in float32; rounded between, they would be off by more."""
    generator = torch.Generator().manual_seed(0)
    x, weight, ranks, lora_b = (
        torch.randint(-9, 10, size, generator=generator).to(dtype)
        for size in ((rows, 70), (90, 70), (rows, 6), (6, 90))
    )
    product = x.double() @ weight.double().t()
    assert torch.equal(gemm.linear(x, weight), product.to(dtype))
    exact = product + ranks.double() @ lora_b.double()
    assert torch.equal(gemm.two_products(x, weight.t(), None, ranks, lora_b), exact.to(dtype))
    onto = gemm.two_products(x, weight.t(), None, ranks, lora_b, x.new_full((rows, 90), 0.5))
    assert torch.equal(onto, (exact + 0.5).to(dtype))


def test_a_bias_without_a_weight():
    for rows in (5, 45):  # by the decode, by products
        case = make_case(rows=rows)._replace(weight=None)
        assert_close(forward(case)[0], expected_forward(case)[0], torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_mixture_gradient_does_not_depend_on_threads(threads):
    case = make_case(2, 1000, 8, 8)
    _, h = forward(case)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(backward(case, case.x.clone(), h, [], False, True, True)[1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("factor", [1.0, 1.0 + 2**-9, 2.0**-12, 2.0**13])
@pytest.mark.parametrize("columns", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_match_torch(dtype, columns, factor):
    """Every 16-bit value times a float: rounding, subnormals, overflow, infinities and NaN."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty_like(every)
    one, adapter = torch.ones(1), torch.zeros(columns, dtype=torch.int32)
    scale = torch.full((columns,), factor)
    _C.weight_ranks(
        kernel.CODES[dtype],
        out,
        every,
        one,
        adapter,
        scale,
        len(every) // columns,
        1,
        1,
        columns,
        1,
    )
    assert torch.equal(out.isnan(), every.isnan())
    want = (every.float() * factor).to(dtype)
    assert torch.equal(out[~every.isnan()], want[~every.isnan()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 9}, "dtype"),
        ({"samples": 4}, "samples"),
        ({"threads": 0}, "threads"),
        ({"mixture": None}, "mixture: got no memory"),
        ({"rows": -1}, "rows"),
    ],
)
def test_bad_arguments(change, message):
    good = make_case()
    h = torch.ones(15, 12)
    arguments = {
        "dtype": _C.FLOAT32, "out": h, "h": h, "mixture": good.mixture,
        "row_adapter": good.row_adapter, "row_scale": good.row_scale, "rows": 15, "samples": 3,
        "adapters": 3, "ranks": 12, "threads": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _C.weight_ranks(**{**arguments, **change})


@pytest.mark.parametrize("name", ["default", "avx2", "avx512", "avx512_bf16"])
def test_capability_by_environment(name):
    if name not in _C.cpu_capabilities():
        pytest.skip(f"this CPU has no {name}")
    assert _run_with_capability(name).stdout.strip() == name


def test_unknown_capability():
    done = _run_with_capability("avx1024")
    assert done.returncode != 0
    assert "avx1024" in done.stderr
    with pytest.raises(ValueError, match="avx1024"):
        _C.set_cpu_capability("avx1024")


def _run_with_capability(name: str) -> subprocess.CompletedProcess[str]:
    code = "import sapt_fast._C as c; print(c.cpu_capability())"
    environment = {**os.environ, "SAPT_FAST_CPU_CAPABILITY": name}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
