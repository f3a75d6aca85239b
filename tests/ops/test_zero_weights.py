"""A weight of exactly 0 means "not there": nothing that is not finite passes it, either way."""

import importlib

import pytest
import torch
from torch import Tensor

from sapt_fast.ops import mix_experts, mix_prompts, mixed_lora, mixed_lora_linear

pytest.importorskip("triton")
grouped_experts = importlib.import_module("sapt_fast.triton_kernels.blocks.grouped_experts")

INF, NAN = float("inf"), float("nan")
BACKENDS = ["reference", "cpu", "triton"]
RANKS = (2, 1, 3)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 6e-3, torch.float64: 1e-10}
# Adapter 1 has weight for sample 1 alone, adapter 0 none for sample 2; -0.0 is 0.
MIXTURE = [[0.5, 0.0, 0.25], [0.25, 0.5, 0.75], [0.0, -0.0, 1.0]]


def _device(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def _inputs(rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(3, rows, 20), "weight": normal(24, 20) / 4, "a": normal(6, 20) / 4,
        "b": normal(6, 24) / 2, "mixture": torch.tensor(MIXTURE), "dy": normal(3, rows, 24),
    }  # fmt: skip


def _expected(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sample by sample and adapter by adapter, in float64; what has no weight is left out."""
    t = {n: v.double().requires_grad_(n not in ("dy", "weight")) for n, v in given.items()}
    ys = []
    for s in range(3):
        y, start = t["x"][s] @ t["weight"].t(), 0
        for k, rank in enumerate(RANKS):
            rows = slice(start, start + rank)
            start += rank
            if given["mixture"][s, k] != 0:
                w = t["mixture"][s, k]
                y = y + w * (t["x"][s] @ t["a"][rows].t()) @ t["b"][rows]
        ys.append(y)
    y = torch.stack(ys)
    y.backward(t["dy"])
    return {"y": y.detach(), **{n: t[n].grad for n in ("x", "a", "b")}}


def _run(given: dict[str, Tensor], backend: str, frozen: bool = False) -> dict[str, Tensor]:
    t = {n: v.to(_device(backend)).clone() for n, v in given.items()}
    for name in ("x", "a", "b", "mixture"):
        t[name].requires_grad_()
    trainable, through = ([2], False) if frozen else (None, True)
    y = mixed_lora_linear(
        *(t["x"], t["weight"], None, t["a"], t["b"], t["mixture"]), ranks=RANKS, backend=backend,
        trainable=trainable, grad_through_frozen=through,
    )  # fmt: skip
    y.backward(t["dy"])
    with torch.no_grad():
        again = mixed_lora_linear(
            *(t["x"], t["weight"], None, t["a"], t["b"], t["mixture"]),
            ranks=RANKS,
            backend=backend,
        )
    grads = {n: t[n].grad.cpu() for n in ("x", "a", "b", "mixture")}
    return {"y": y.detach().cpu(), "again": again.cpu(), **grads}


def _same(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Equal where the expected value is finite, and not finite elsewhere."""
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(got[finite].double(), want[finite], rtol=limit, atol=limit)


@pytest.mark.parametrize("value", [-INF, NAN])
@pytest.mark.parametrize("where", ["a", "b"])
@pytest.mark.parametrize("rows", [1, 40])  # in one call, and by matrix products
@pytest.mark.parametrize("backend", BACKENDS)
class TestMixedLora:
    def test_an_adapter_that_is_not_finite(self, backend, rows, where, value):
        given = _inputs(rows)
        given[where][2, 3] = value  # of adapter 1
        got, want = _run(given, backend), _expected(given)
        for name in ("y", "x", "a", "b"):
            _same(got[name], want[name], torch.float32)
        _same(got["again"], want["y"], torch.float32)
        assert got["y"][[0, 2]].isfinite().all()
        assert not got["y"][1].isfinite().all()
        assert torch.equal(got["mixture"][[0, 2], 1], torch.zeros(2))
        assert got["mixture"][:, [0, 2]].isfinite().all()

    def test_frozen_adapters_pass_nothing_on(self, backend, rows, where, value):
        given = _inputs(rows)
        given["mixture"][:, 1] = 0
        given[where][2, 3] = value
        plain = {**given, where: given[where].nan_to_num(0, 0, 0)}
        got, want = _run(given, backend, frozen=True), _run(plain, backend, frozen=True)
        for name in ("y", "again", "x", "a", "b"):
            torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("name", ["x", "dy"])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_that_is_not_finite(backend, rows, name):
    """It reaches no gradient of an adapter that it has no weight for."""
    given = _inputs(rows)
    given[name][2, 0, 5] = INF
    got, want = _run(given, backend), _expected(given)
    assert want["a"][:3].isfinite().all()
    for key in ("a", "b"):
        torch.testing.assert_close(got[key][:3].double(), want[key][:3], rtol=1e-4, atol=1e-4)
    for key in ("y", "x"):
        torch.testing.assert_close(got[key][:2].double(), want[key][:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in BACKENDS for d in (torch.bfloat16, torch.float16, torch.float64)
     if not (b == "triton" and d == torch.float64)],
    ids=str,
)  # fmt: skip
def test_every_dtype(backend, dtype, rows):
    given = _inputs(rows, dtype)
    given["a"][2, 3], given["b"][2, 4] = INF, NAN
    got, want = _run(given, backend), _expected(given)
    _same(got["y"][[0, 2]], want["y"][[0, 2]], dtype)
    _same(got["x"][[0, 2]], want["x"][[0, 2]], dtype)
    assert not got["y"][1].isfinite().any()


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_weights_and_infinite_scalings(backend, rows):
    given = _inputs(rows)
    given["mixture"][0, 0] = NAN
    y = _run(given, backend)["y"]
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()
    t = {n: v.to(_device(backend)) for n, v in _inputs(rows).items()}
    scaling = torch.tensor([1.0, INF, 1.0], device=t["x"].device)
    y = mixed_lora(
        t["x"], t["a"], t["b"], t["mixture"], ranks=RANKS, scaling=scaling, backend=backend
    )
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_gradient_of_a_weight_of_zero_is_the_derivative(backend, rows):
    t = {n: v.double() for n, v in _inputs(rows).items()}
    t["mixture"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m: mixed_lora(t["x"], t["a"], t["b"], m, ranks=RANKS, backend=backend),
        (t["mixture"],),
    )


@pytest.mark.parametrize("way", [*BACKENDS, "grouped"])
@pytest.mark.parametrize("where", ["bank_a", "bank_b"])
@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("sparse", [False, True])
def test_experts_without_weight(way, where, value, sparse, monkeypatch):
    if way == "grouped":
        monkeypatch.setattr(
            importlib.import_module("sapt_fast.triton_kernels.mix_experts"),
            "grouping_pays",
            lambda *_: True,
        )
    backend = "triton" if way == "grouped" else way
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (4, 9), "bank_a": (5, 4, 9), "bank_b": (5, 4, 7), "weights": (4, 2)}
    given = {n: torch.randn(*s, generator=generator) for n, s in shapes.items()}
    given["weights"].abs_()
    index = torch.tensor([[0, 3], [3, 1], [3, -1], [2, 0]])
    given["weights"][0, 1] = given["weights"][2, 0] = 0  # expert 3, which row 1 has weight for
    given[where][3, 1, 2] = value
    given[where][0, 0, 0] = 1.0
    wide = {n: v.double().requires_grad_() for n, v in given.items()}
    rows = []
    for m in range(4):
        y = torch.zeros(7, dtype=torch.float64)
        for j in range(2):
            n = index[m, j]
            if n >= 0 and given["weights"][m, j] != 0:
                h = wide["bank_a"][n] @ wide["x"][m]
                y = y + wide["weights"][m, j] * h @ wide["bank_b"][n]
        rows.append(y)
    want, dy = torch.stack(rows), torch.randn(4, 7, generator=generator)
    want.backward(dy.double())

    device = _device(backend)
    t = {n: v.to(device).requires_grad_() for n, v in given.items()}
    delta = mix_experts(
        *(t["x"], t["bank_a"], t["bank_b"], index.to(device), t["weights"]),
        backend=backend,
        sparse_grad=sparse,
    )
    delta.backward(dy.to(device))
    _same(delta.detach().cpu(), want.detach(), torch.float32)
    assert delta[[0, 2, 3]].isfinite().all()
    for name in ("x", "bank_a", "bank_b"):
        grad = t[name].grad
        grad = grad.to_dense() if grad.is_sparse else grad
        _same(grad.cpu(), wide[name].grad, torch.float32)
    d_weights = t["weights"].grad.cpu()
    assert d_weights[0, 1] == 0
    assert d_weights[2, 0] == 0
    assert d_weights[0, 0] == pytest.approx(wide["weights"].grad[0, 0].item(), rel=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_experts_of_which_none_is_chosen_are_not_read(backend):
    """The first expert stands in for none while experts are gathered."""
    x, bank_a, bank_b = torch.ones(2, 3), torch.full((2, 1, 3), NAN), torch.full((2, 1, 4), INF)
    bank_a[1], bank_b[1] = 1.0, 1.0
    for tensor in (x, bank_a, bank_b):
        tensor.requires_grad_()
    index = torch.tensor([[1, -1], [-1, -1]])
    delta = mix_experts(x, bank_a, bank_b, index, torch.ones(2, 2), backend=backend)
    delta.sum().backward()
    assert delta.tolist() == [[3.0] * 4, [0.0] * 4]
    assert x.grad.tolist() == [[4.0] * 3, [0.0] * 3]
    assert torch.equal(bank_a.grad[0], torch.zeros(1, 3))


@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_prompts_without_weight(backend, value):
    device = _device(backend)
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randn(3, 2, 8, generator=generator).to(device)
    prompts[1, 0, 3] = value
    mixture = torch.tensor(MIXTURE, device=device)
    embeds = torch.randn(3, 4, 8, generator=generator).to(device)
    dy = torch.randn(3, 6, 8, generator=generator).to(device)
    dy[2, 1, 2] = value  # sample 2 has weight for prompt 2 alone
    for tensor in (prompts, mixture):
        tensor.requires_grad_()
    y = mix_prompts(prompts, mixture, embeds, backend=backend)
    y.backward(dy)
    weighted = mixture.detach()[:, :, None, None].double() * prompts.detach().double()
    want = torch.where((mixture == 0)[:, :, None, None], 0.0, weighted).sum(1)
    _same(y.detach()[:, :2].cpu(), want.cpu(), torch.float32)
    assert y[[0, 2]].isfinite().all()
    assert prompts.grad[:2].isfinite().all()
    per_sample = mixture.detach()[:, 0, None, None] * dy[:, :2]
    torch.testing.assert_close(prompts.grad[0], per_sample[0] + per_sample[1])
    assert mixture.grad[0, 1] == 0
    assert mixture.grad[2, 1] == 0
    assert mixture.grad[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("route", "dtype", "weight"),
    [
        ("fused", torch.bfloat16, True), ("fused_pointers", torch.bfloat16, True),
        ("expand_first", torch.bfloat16, True), ("fused", torch.float16, False),
    ],
    ids=str,
)  # fmt: skip
def test_every_route_of_the_products(route, dtype, weight):
    """Forward, and the gradient of x of two projections, the second added to the first's."""
    from sapt_fast.ops.projection import Projection
    from sapt_fast.triton_kernels.blocks import gemm_variants as routes
    from sapt_fast.triton_kernels.mixed_lora import mixed_lora_bwd, mixed_lora_fwd

    device = _device("triton")
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    x, mixture = normal(96, 32), torch.tensor(MIXTURE, device=device)
    owners = torch.tensor([0] * 8 + [1] * 8 + [2] * 4, dtype=torch.int32, device=device)
    scale = torch.ones(20, device=device)
    clean, broken = [], []
    for _ in range(2):
        parts = normal(64, 32) / 4 if weight else None, None, normal(20, 32) / 4, normal(20, 64) / 4
        clean.append(Projection(*parts, owners, scale))
        a, b = parts[2].clone(), parts[3].clone()
        a[9, 3], b[10, 40] = INF, NAN
        broken.append(Projection(*parts[:2], a, b, owners, scale))
    dys = [normal(96, 64), normal(96, 64)]
    results = []
    with routes.forced(route):
        for projections in (clean, broken):
            made = mixed_lora_fwd(x, mixture, projections)
            dx, _, factors = mixed_lora_bwd(
                dys, x, mixture, projections, [h for _, h in made], [[0, 20], [16, 20]],
                True, True, True,
            )  # fmt: skip
            results.append((*(y for y, _ in made), dx, factors))
    others = [*range(32), *range(64, 96)]  # not the rows of sample 1
    limit = TOLERANCE[dtype] * 3
    for got, want in zip(results[1][:3], results[0][:3], strict=True):
        assert not got[32:64].isfinite().all()
        torch.testing.assert_close(got[others], want[others], rtol=limit, atol=limit)
    for got, want in zip(results[1][3], results[0][3], strict=True):
        for factor, exact in zip(got, want, strict=True):
            trained = [*range(8), *range(16, 20)] if len(exact) == 20 else [*range(4)]
            torch.testing.assert_close(factor[trained], exact[trained], rtol=limit, atol=limit)
