"""Zeros that mean "not there", zeros that are numbers, and tensors without elements."""

import pytest
import torch
from torch import Tensor

from sapt_fast.ops import (
    mix_experts,
    mixed_lora,
    mixed_lora_linear,
    nearest_key,
    pool_tokens,
    reflection_loss,
    topk_keys,
)
from sapt_fast.ops.own_lora import Adapter, add_own_lora_, own_lora
from sapt_fast.ops.pool_tokens import pool_embeds

pytest.importorskip("triton")

INF, NAN = float("inf"), float("nan")
BACKENDS = ["reference", "cpu", "triton"]


def _device(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def _pool(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [1, rows, 4], A [2, 4] and B [2, 5] of two adapters, all ones but for x's second row."""
    x = torch.ones(1, rows, 4)
    x[:, 1] = 0
    return x, torch.ones(2, 4), torch.ones(2, 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [2, 80])
@pytest.mark.parametrize("other", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_a_zero_that_is_no_weight_times_an_infinity_is_nan(backend, rows, other, training):
    """Whether another adapter has a weight does not matter."""
    x, a, b = (t.to(_device(backend)) for t in _pool(rows))
    b[0, 3] = INF
    mixture = torch.tensor([[0.5, other]], device=x.device)
    a.requires_grad_(training)
    y = mixed_lora(x, a, b, mixture, ranks=1, backend=backend).detach().cpu()[0]
    assert y[1].isnan().tolist() == [False, False, False, True, False]
    assert y[0, 3] == INF
    assert torch.equal(y[0, :3], torch.full((3,), 2 + 4 * other))
    assert torch.equal(y[1, :3], torch.zeros(3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [2, 80])
def test_a_gradient_of_zero_times_an_infinity_is_nan(backend, rows):
    x, a, b = (t.to(_device(backend)) for t in _pool(rows))
    a[0, 2] = INF
    x.requires_grad_()
    mixture = torch.tensor([[0.5, 0.0]], device=x.device)
    y = mixed_lora(x, a, b, mixture, ranks=1, backend=backend)
    dy = torch.ones_like(y)
    dy[0, 1] = 0
    [dx] = torch.autograd.grad(y, x, dy)
    dx = dx.cpu()[0]
    assert dx[1].isnan().tolist() == [False, False, True, False]
    assert dx[0].tolist() == [2.5, 2.5, INF, 2.5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [2, 80])
@pytest.mark.parametrize(("where", "value"), [("a", INF), ("b", NAN)])
def test_a_scaling_of_zero_means_not_there(backend, rows, where, value):
    x, a, b = (t.to(_device(backend)) for t in _pool(rows))
    {"a": a, "b": b}[where][0] = value
    leaves = x, a, b, torch.tensor([[0.5, 0.25]], device=x.device)
    for leaf in leaves:
        leaf.requires_grad_()
    arguments = {"ranks": 1, "scaling": torch.tensor([0.0, 2.0]), "backend": backend}
    y = mixed_lora(*leaves, **arguments)
    want = torch.full((5,), 2.0)
    assert torch.equal(y.detach().cpu()[0, 0], want)
    with torch.no_grad():
        assert torch.equal(mixed_lora(*leaves, **arguments).cpu()[0, 0], want)
    grads = [g.cpu() for g in torch.autograd.grad(y.sum(), leaves)]
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[0][0, 0], torch.full((4,), 2.5))
    assert not grads[1][0].any()
    assert not grads[2][0].any()
    assert grads[3][0, 0] == 0
    primal, tangent = torch.func.jvp(
        lambda t: mixed_lora(t, *leaves[1:], **arguments), (x,), (torch.ones_like(x),)
    )
    assert torch.equal(primal.detach().cpu()[0, 0], want)
    assert torch.equal(tangent.detach().cpu()[0, 0], want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [INF, NAN])
def test_experts_with_a_scaling_of_zero_are_not_there(backend, value):
    device = _device(backend)
    x, a, b = torch.ones(2, 4), torch.ones(3, 1, 4), torch.ones(3, 1, 5)
    a[1], b[2] = value, value
    index = torch.tensor([[1, 2], [0, 1]], device=device)
    leaves = [t.to(device).requires_grad_() for t in (x, a, b, torch.ones(2, 2))]
    delta = mix_experts(*leaves[:3], index, leaves[3], scaling=0, backend=backend)
    assert not delta.detach().any()
    assert all(not g.any() for g in torch.autograd.grad(delta.sum(), leaves))


def _empty(*shape: int) -> Tensor:
    """A tensor without elements whose last stride is not 1."""
    return torch.empty(0).as_strided(shape, (0,) * len(shape))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_tensors_without_elements_may_have_any_strides(backend):
    keys = torch.randn(3, 4)
    index, distance = nearest_key(_empty(0, 4), keys, torch.ones(3), backend=backend)
    assert index.shape == distance.shape == (0,)
    index, distance = nearest_key(keys, _empty(0, 4), torch.ones(0), backend=backend)
    assert index.tolist() == [-1] * 3
    assert distance.tolist() == [INF] * 3
    scores, _ = topk_keys(_empty(0, 4), keys, 2, backend=backend)
    assert scores.shape == (0, 2)
    none = torch.full((3, 2), -1)
    for bank_a, bank_b in ((_empty(0, 2, 4), _empty(0, 2, 5)), (_empty(2, 0, 4), _empty(2, 0, 5))):
        delta = mix_experts(keys, bank_a, bank_b, none, torch.ones(3, 2), backend=backend)
        assert torch.equal(delta, torch.zeros(3, 5))


def test_native_calls_take_tensors_with_gaps():
    """Views of every argument give the bits of their copies."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 8), "weight": (6, 8), "bias": (6,), "a": (3, 8), "b": (3, 6), "w": (2, 3)}
    dense = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    views = {n: torch.stack([t, t], -1)[..., 0] for n, t in dense.items()}
    with torch.no_grad():
        want = mixed_lora_linear(*dense.values(), ranks=1, backend="cpu")
        for name in shapes:
            given = {**dense, name: views[name]}
            got = mixed_lora_linear(*given.values(), ranks=1, backend="cpu")
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("value", [NAN, -INF])
def test_the_first_of_several_nan_or_least_values_gets_the_gradient(backend, tokens, value):
    table = torch.full((9, 6), value, device=_device(backend)).requires_grad_()
    ids = torch.arange(tokens, device=table.device).remainder(8)[None] + 1
    pooled = pool_tokens(ids, table, backend=backend)
    [grad] = torch.autograd.grad(pooled, table, torch.ones_like(pooled))
    want = torch.zeros(9, 6)
    want[1] = 1
    assert torch.equal(grad.cpu(), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("count", [13, 70])
def test_equal_keys_keep_their_order_in_any_layout(backend, metric, count):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(count, 16, generator=generator)
    keys[-1], keys[-2] = keys[0], keys[1]
    query = torch.cat([keys[:2], torch.randn(5, 16, generator=generator)])
    for q, table in ((query, keys), (query.t().contiguous().t(), keys.t().contiguous().t())):
        given = q.to(_device(backend)), table.to(_device(backend))
        scores, index = topk_keys(*given, count, metric=metric, backend=backend)
        _, under_vmap = torch.func.vmap(
            lambda one, t=given[1]: topk_keys(one, t, count, metric=metric)
        )(given[0][None])
        for order in (index.cpu().tolist(), under_vmap[0].cpu().tolist()):
            for row in order:
                assert row.index(0) + 1 == row.index(count - 1)
                assert row.index(1) + 1 == row.index(count - 2)
        at = [row.index(0) for row in index.cpu().tolist()]
        for row, j in zip(scores.cpu(), at, strict=True):
            assert row[j] == row[j + 1]


@pytest.mark.parametrize("value", [2.0, NAN])
@pytest.mark.parametrize("mask", [None, torch.tensor([[0, 1, 1, 1]])])
def test_the_first_of_equal_embeddings_gets_the_gradient(value, mask):
    embeds = torch.zeros(1, 4, 3)
    embeds[0, 1:] = value
    embeds.requires_grad_()
    pool_embeds(embeds, mask=mask).sum().backward()
    assert embeds.grad[0].tolist() == [[0.0] * 3, [1.0] * 3, [0.0] * 3, [0.0] * 3]


def test_what_is_no_share_or_no_sequence_is_refused_by_name():
    with pytest.raises(TypeError, match=r"target: got dtype torch\.bool"):
        reflection_loss(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"target: got dtype torch\.int64"):
        reflection_loss(torch.zeros(1, 2), torch.ones(2, dtype=torch.int64))
    adapters = [Adapter(torch.ones(1, 3), torch.ones(3, 1), 1.0)]
    x = torch.ones(1, 3)
    for owner in (3, "0", b"0", torch.tensor(0), None):
        with pytest.raises(TypeError, match="owner: got"):
            own_lora(x, torch.ones(3, 3), None, adapters, owner)
        with pytest.raises(TypeError, match="owner: got"):
            add_own_lora_(torch.ones(1, 3), x, adapters, owner)
    y = own_lora(x, torch.ones(3, 3), None, adapters, torch.tensor([0]))
    assert torch.equal(y, torch.full((1, 3), 6.0))
