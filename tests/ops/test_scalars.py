"""Numbers of numpy and torch among the arguments, and what is no number there."""

import numpy as np
import pytest
import torch

from sapt_fast.ops import mix_experts, mixed_lora, pool_tokens, reflection_loss, route, topk_keys
from sapt_fast.ops.own_lora import Adapter, own_lora

X, A, B = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(4, 6)
MIXTURE = torch.tensor([[0.5, 1.0], [2.0, 0.25]])


@pytest.mark.parametrize(
    "ranks",
    [
        np.int64(2), np.int32(2), np.array(2), np.array([2, 2]), [np.int64(2), 2],
        torch.tensor(2), torch.tensor([2, 2]), (2, 2), range(2, 3),
    ],
    ids=repr,
)  # fmt: skip
def test_ranks(ranks):
    if isinstance(ranks, range):
        ranks = [*ranks, *ranks]
    assert torch.equal(
        mixed_lora(X, A, B, MIXTURE, ranks=ranks), mixed_lora(X, A, B, MIXTURE, ranks=2)
    )


@pytest.mark.parametrize(
    "ranks", [2.0, np.float32(2), True, np.bool_(1), "2", "22", [2, True], [2, 2.0], None, 2j]
)
def test_ranks_that_are_none(ranks):
    with pytest.raises(TypeError, match="ranks: got"):
        mixed_lora(X, A, B, MIXTURE, ranks=ranks)


@pytest.mark.parametrize(
    "scaling",
    [
        np.float32(1.5), np.float64(1.5), np.float16(1.5), np.array(1.5), torch.tensor(1.5),
        np.array([1.5, 1.5]), torch.tensor([1.5, 1.5], dtype=torch.float64),
    ],
    ids=repr,
)  # fmt: skip
def test_scaling(scaling):
    want = mixed_lora(X, A, B, MIXTURE, ranks=2, scaling=1.5)
    assert torch.equal(mixed_lora(X, A, B, MIXTURE, ranks=2, scaling=scaling), want)


@pytest.mark.parametrize("scaling", [2, np.int64(2), torch.tensor(2), torch.tensor([2, 2])])
def test_integers_scale(scaling):
    want = mixed_lora(X, A, B, MIXTURE, ranks=2, scaling=2.0)
    assert torch.equal(mixed_lora(X, A, B, MIXTURE, ranks=2, scaling=scaling), want)


NO_NUMBERS = [
    True, np.bool_(1), 1j, np.complex64(1), "1", None, torch.tensor(True), torch.tensor(1j),
    [1.0, 1.0],
]  # fmt: skip


@pytest.mark.parametrize(
    "scaling", [*NO_NUMBERS, torch.ones(2, dtype=torch.bool), torch.ones(2) + 1j, np.array([1j, 1])]
)
def test_scaling_that_is_no_number(scaling):
    with pytest.raises(TypeError, match="scaling: got"):
        mixed_lora(X, A, B, MIXTURE, ranks=2, scaling=scaling)


@pytest.mark.parametrize("scaling", [float("inf"), float("nan"), np.float32("nan")])
def test_scalings_that_are_not_finite(scaling):
    y = mixed_lora(X, A, B, MIXTURE, ranks=2, scaling=scaling)
    assert not y.isfinite().any()


def _experts(scaling):
    index = torch.tensor([[0, 1], [2, -1]])
    return mix_experts(
        X[:, 0], A.view(4, 1, 8), B.view(4, 1, 6), index, torch.ones(2, 2), scaling=scaling
    )


@pytest.mark.parametrize("scaling", [np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_scaling_of_experts(scaling):
    assert torch.equal(_experts(scaling), _experts(0.5))


@pytest.mark.parametrize("scaling", [*NO_NUMBERS, torch.ones(2)])
def test_scaling_of_experts_that_is_no_number(scaling):
    with pytest.raises(TypeError, match="scaling: got"):
        _experts(scaling)


def test_trainable():
    a = A.clone().requires_grad_()
    for trainable in ([np.int64(1)], np.array([1]), torch.tensor([1])):
        a.grad = None
        mixed_lora(X, a, B, MIXTURE, ranks=2, trainable=trainable).sum().backward()
        assert not a.grad[:2].any()
        assert a.grad[2:].any()
    for trainable in ([1.0], [True], [np.bool_(1)], ["1"]):
        with pytest.raises(TypeError, match="trainable: got"):
            mixed_lora(X, a, B, MIXTURE, ranks=2, trainable=trainable)


def test_own_adapters():
    a, b = A[:2], B[:2].t()
    want = own_lora(X, torch.ones(6, 8), None, [Adapter(a, b, 0.5)], [0, -1])
    for scaling in (np.float32(0.5), torch.tensor(0.5)):
        got = own_lora(X, torch.ones(6, 8), None, [Adapter(a, b, scaling)], np.array([0, -1]))
        assert torch.equal(got, want)
    with pytest.raises(TypeError, match=r"adapters\[0\].scaling: got 1j"):
        own_lora(X, torch.ones(6, 8), None, [Adapter(a, b, 1j)], [0, -1])
    for owner in ([0.0, -1], [False, -1]):
        with pytest.raises(TypeError, match="owner: got"):
            own_lora(X, torch.ones(6, 8), None, [Adapter(a, b, 1.0)], owner)


@pytest.mark.parametrize("k", [np.int64(2), np.array(2), torch.tensor(2)])
def test_k(k):
    query, keys = torch.randn(3, 5), torch.randn(4, 5)
    want = topk_keys(query, keys, 2)
    assert all(torch.equal(g, w) for g, w in zip(topk_keys(query, keys, k), want, strict=True))


@pytest.mark.parametrize("k", [2.0, np.float32(2), True, np.bool_(1), "2", None])
def test_k_that_is_none(k):
    with pytest.raises(TypeError, match="k: got"):
        topk_keys(torch.randn(3, 5), torch.randn(4, 5), k)


EMBEDS, KEYS = torch.randn(2, 3, 8), torch.randn(4, 8)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_route(backend):
    def call(**named):
        return route(EMBEDS, KEYS, None, backend=backend, **named)

    want = call(temperature=0.5, top_k=2, threshold=0.25)
    for one, k in ((np.float32, np.int64), (np.array, np.array), (torch.tensor, torch.tensor)):
        got = call(temperature=one(0.5), top_k=k(2), threshold=one(0.25))
        assert torch.equal(got, want)
    for name in ("temperature", "threshold"):
        for value in (True, 1j, "1", torch.tensor(True)):
            with pytest.raises(TypeError, match=f"{name}: got"):
                call(**{name: value})
    for value in (True, 2.0, "2"):
        with pytest.raises(TypeError, match="top_k: got"):
            call(top_k=value)
    for value in (float("nan"), 0.0, -1.0):
        with pytest.raises(ValueError, match="temperature: got"):
            call(temperature=value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8], ids=str)
def test_tensors_that_are_not_floating(dtype):
    keys, embeds, ids = KEYS.to(dtype), EMBEDS.to(dtype), torch.tensor([[0, 1]])
    with pytest.raises(TypeError, match="keys: got dtype"):
        route(EMBEDS, keys, None)
    with pytest.raises(TypeError, match="embeds: got dtype"):
        route(embeds, KEYS, None)
    for pooling in ("max", "mean"):
        with pytest.raises(TypeError, match="table: got dtype"):
            pool_tokens(ids, keys, pooling=pooling)
    with pytest.raises(TypeError, match="keys: got dtype"):
        topk_keys(KEYS, keys, 1)
    with pytest.raises(TypeError, match="mixture: got dtype"):
        mixed_lora(X, A, B, MIXTURE.to(dtype), ranks=2)
    with pytest.raises(TypeError, match="x: got dtype"):
        mixed_lora(X.to(dtype), A, B, MIXTURE, ranks=2)
    with pytest.raises(TypeError, match="scores: got dtype"):
        reflection_loss(MIXTURE.to(dtype), torch.ones(2))
    with pytest.raises(ValueError, match="scores: got shape"):
        reflection_loss(torch.ones(2), torch.ones(2))
