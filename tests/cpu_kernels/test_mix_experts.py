"""The cpu backend of mix_experts against a loop in float64, on every instruction set."""

import pytest
import torch

_C = pytest.importorskip("sapt_fast._C", reason="built without native kernels")
from sapt_fast.cpu_kernels.mix_experts import mix_experts_bwd, mix_experts_fwd  # noqa: E402
from sapt_fast.ops.mix_experts import pair_groups, pair_order  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float64: 1e-14}
SCALING = 0.5
# (M, N, r, I, O, k)
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (5, 7, 3, 19, 21, 3),
    (1, 50, 4, 64, 128, 9),
    (3, 4, 21, 270, 600, 2),
    (40, 2, 5, 33, 17, 2),
]


def make(shape, dtype=torch.float32, bank_dtype=None):
    m, n, r, i, o, k = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size, of):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(of)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        draw(m, i, of=dtype),
        draw(n, r, i, of=bank_dtype or dtype),
        draw(n, r, o, of=bank_dtype or dtype),
        torch.randint(-1 if n > 1 else 0, n, (m, k), generator=generator),
        draw(m, k, of=wide),
    )


def loop(x, bank_a, bank_b, index, weights, dy):
    """delta and the gradients of x, bank_a, bank_b, weights, pair by pair in float64."""
    leaves = [t.double().requires_grad_() for t in (x, bank_a, bank_b, weights)]
    x, bank_a, bank_b, weights = leaves
    rows = []
    for m in range(len(x)):
        row = x.new_zeros(bank_b.shape[2])
        for j, n in enumerate(index[m].tolist()):
            if 0 <= n < len(bank_a):
                row = row + SCALING * weights[m, j] * ((x[m] @ bank_a[n].t()) @ bank_b[n])
        rows.append(row)
    delta = torch.stack(rows)
    grads = torch.autograd.grad(delta, leaves, dy.double(), materialize_grads=True)
    return delta.detach(), *grads


def assert_close(got, want, dtype):
    assert got.shape == want.shape
    assert got.is_contiguous()
    assert not got.isnan().any(), "an output was left unwritten"
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
    assert error <= TOLERANCE[dtype]


def run(inputs, dy, compact=False):
    x, bank_a, bank_b, index, weights = inputs
    delta, h = mix_experts_fwd(*inputs, SCALING)
    before = dy.clone()
    order = pair_order(index, weights, len(bank_a))
    groups = pair_groups(index, weights, len(bank_a), order, compact)
    grads = mix_experts_bwd(dy, x, bank_a, bank_b, index, weights, h, SCALING, groups, True, True)
    assert torch.equal(dy, before), "the incoming gradient was overwritten"
    return delta, h, groups, grads


def check(inputs, dy=None):
    x, bank_a, bank_b, _, weights = inputs
    dtype = x.dtype
    if dy is None:
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(len(x), bank_b.shape[2], generator=generator).to(dtype)
    want, want_x, want_a, want_b, want_weights = loop(*inputs, dy)
    delta, h, _, (dx, d_weights, d_a, d_b) = run(inputs, dy)
    assert delta.dtype == dx.dtype == dtype
    assert h.dtype == d_weights.dtype == weights.dtype
    assert d_a.dtype == d_b.dtype == bank_a.dtype
    pairs = zip(
        (delta, dx, d_weights, d_a, d_b), (want, want_x, want_weights, want_a, want_b), strict=True
    )
    for got, exact in pairs:
        assert_close(got, exact, dtype)
    # Gradients over the chosen experts only hold the same numbers.
    _, _, groups, (_, _, few_a, few_b) = run(inputs, dy, compact=True)
    assert torch.equal(few_a, d_a[groups.ids])
    assert torch.equal(few_b, d_b[groups.ids])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("capability")
def test_forward_and_every_gradient(shape, dtype):
    check(make(shape, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("capability")
def test_float32_banks(dtype):
    check(make(SHAPES[1], dtype, torch.float32))


def test_an_expert_named_twice_and_none_at_all():
    x, bank_a, bank_b, index, weights = make((4, 6, 2, 20, 24, 3))
    index[0], index[1], index[2] = 5, -1, torch.tensor([2, -1, 2])
    check((x, bank_a, bank_b, index, weights))


def test_indices_out_of_range_give_zeros():
    x, bank_a, bank_b, index, weights = make((4, 6, 2, 20, 24, 3))
    index[0, 1], index[3, 2] = 6, 2**40
    check((x, bank_a, bank_b, index, weights))


def test_non_contiguous():
    x, bank_a, bank_b, index, weights = make((4, 6, 3, 20, 24, 2))
    spread = torch.full((6, 2, 3, 20), float("nan"))
    spread[:, 0] = bank_a
    turned = bank_b.transpose(1, 2).contiguous().transpose(1, 2)
    given = x.t().contiguous().t(), spread[:, 0], turned, index.t().contiguous().t(), weights
    check(given, dy=torch.ones(()).expand(4, 24))


@pytest.mark.parametrize(
    "shape", [(0, 5, 2, 8, 8, 3), (3, 5, 2, 8, 8, 0), (3, 5, 0, 8, 8, 2)], ids=str
)
def test_nothing_to_mix(shape):
    inputs = make(shape)
    delta, _, _, grads = run(inputs, torch.ones(shape[0], 8))
    assert torch.equal(delta, torch.zeros(shape[0], 8))
    for gradient in grads:
        assert not gradient.any()


def test_an_empty_bank():
    x, bank_a, bank_b, _, weights = make((3, 1, 2, 8, 9, 2))
    inputs = x, bank_a[:0], bank_b[:0], torch.full((3, 2), -1), weights
    delta, _, _, (dx, d_weights, d_a, d_b) = run(inputs, torch.ones(3, 9))
    assert not delta.any()
    assert not dx.any()
    assert not d_weights.any()
    assert d_a.shape == (0, 2, 8)
    assert d_b.shape == (0, 2, 9)


def test_only_what_is_needed():
    inputs = make(SHAPES[1])
    _, h = mix_experts_fwd(*inputs, SCALING)
    dy = torch.ones(5, 21)
    got = mix_experts_bwd(dy, *inputs, h, SCALING, None, False, False)
    assert got == (None, None, None, None)


def test_the_number_of_threads_changes_nothing(with_threads):
    inputs = make((60, 5, 3, 520, 300, 4))
    dy = torch.randn(60, 300)
    first, *others = (with_threads(count, lambda: run(inputs, dy)) for count in (1, 2, 5))
    for other in others:
        assert torch.equal(other[0], first[0])
        for got, want in zip(other[3], first[3], strict=True):
            assert torch.equal(got, want)


def test_bad_arguments():
    index = torch.zeros(3, 2, dtype=torch.int64)
    common = {"dtype": _C.FLOAT32, "bank_dtype": _C.FLOAT32, "threads": 1, "rows": 3, "k": 2}
    chosen = {**common, "bank": torch.zeros(5, 2, 4), "index": index}
    dot = {**chosen, "out": torch.zeros(3, 2, 2), "values": torch.zeros(3, 4)}
    total = {**chosen, "out": torch.zeros(3, 4), "coefficients": torch.zeros(3, 2, 2)}
    grad = {
        **common, "out": torch.zeros(5, 2, 4), "coefficients": torch.zeros(3, 2, 2),
        "values": torch.zeros(3, 4), "order": index.flatten(), "target": index.flatten(),
        "pairs": 6, "out_rows": 5, "rank": 2, "width": 4,
    }  # fmt: skip
    wrong = torch.zeros(3, 5)
    for call, good, changes in (
        (_C.experts_dot, dot, {"values": wrong, "index": index[:2], "bank": dot["bank"][..., ::2]}),
        (_C.experts_sum, total, {"coefficients": wrong, "out": None, "bank": wrong, "rows": -1}),
        (_C.experts_grad, grad, {"order": index[0], "pairs": -1, "values": wrong, "target": None}),
    ):
        call(**good)
        for name, bad in {**changes, "bank_dtype": _C.FLOAT16, "threads": 0, "k": 3}.items():
            with pytest.raises(ValueError, match=":"):
                call(**{**good, name: bad})
