"""The launch that routes many tokens, against the reference in float64."""

import importlib

import pytest
import torch

from sapt_fast.ops import QueryProjection, route
from sapt_fast.ops.gates import GATES, Gate, gate_fwd
from sapt_fast.ops.queries import route_scores_fwd
from sapt_fast.triton_kernels.blocks import route_tokens as kernels

op = importlib.import_module("sapt_fast.ops.route")
GPU = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("tokens", "width", "count", "similarity", "top_k", "threshold", "renormalize"),
    [
        (65, 33, 1, "dot", None, None, True),
        (70, 64, 16, "cosine", 2, None, True),
        (65, 40, 17, "dot", 20, 0.02, False),
        (66, 7, 128, "cosine", 3, 0.01, True),
    ],
)
def test_scores_and_weights(tokens, width, count, similarity, top_k, threshold, renormalize, gate):
    dtypes = {"softmax": (torch.bfloat16,) * 2, "relu": (torch.float16, torch.float32)}
    x_dtype, key_dtype = dtypes.get(gate, (torch.float32,) * 2)
    x, keys = _draw(tokens, width).to(x_dtype), _draw(count, width, seed=1).to(key_dtype)
    divisor = width**0.5 if similarity == "dot" else 0.3
    kind = Gate(gate, top_k, threshold, renormalize)
    given = x.to(GPU), keys.to(GPU), divisor, similarity == "cosine"
    scores, none = kernels.route_tokens(*given, None)
    exact = route_scores_fwd(x.double(), keys.double(), None, divisor, similarity)
    torch.testing.assert_close(scores.double().cpu(), exact, rtol=2e-6, atol=3e-6)
    assert none is None
    # From the scores as they are, so that rounding moves no adapter over a limit.
    [_, weights] = kernels.route_tokens(*given, kind)
    want = gate_fwd(scores.double(), kind)
    torch.testing.assert_close(weights.double(), want, rtol=2e-6, atol=1e-7)
    assert torch.equal(weights != 0, want != 0)


def test_of_equal_weights_those_of_the_lower_index_stay():
    x, keys = _draw(70, 8).to(GPU), _draw(3, 8, seed=1).repeat(4, 1).to(GPU)
    [_, weights] = kernels.route_tokens(x, keys, 1.0, False, Gate("sigmoid", 5, None, True))
    for column in weights.view(70, 4, 3).movedim(-1, 0).reshape(-1, 4):
        kept = column != 0
        assert torch.equal(kept, kept.sort(descending=True, stable=True).values)
    assert ((weights != 0).sum(-1) == 5).all()
    zeros = kernels.route_tokens(-x.abs(), keys.abs(), 1.0, False, Gate("relu", 2, None, True))[1]
    assert torch.equal(zeros, torch.zeros_like(weights))
    assert not torch.signbit(zeros).any()


def test_tokens_and_keys_that_no_launch_is_made_for(monkeypatch):
    assert kernels.MOST_KEYS >= op._TOKEN_KEYS
    assert kernels._FEW_TOKENS == op._FEW_TOKENS
    called = []
    monkeypatch.setattr(kernels, "route_tokens", lambda *_: called.append(1))
    monkeypatch.setattr(op, "_route_op", lambda *_: called.append(1))
    x = _draw(2, 40, 12).to(GPU)
    projection = QueryProjection(_draw(4, 12), _draw(12, 4), torch.ones(12), torch.zeros(12))
    projection = QueryProjection(*(t.to(GPU) for t in projection[:4]))
    for keys, given in ((_draw(129, 12), None), (_draw(3, 12), projection)):
        keys = keys.to(GPU)
        options = {"pooling": "none", "gate": "sigmoid"}
        weights = route(x, keys, given, backend="triton", **options)
        want = route(x.cpu(), keys.cpu(), given, backend="reference", **options)
        torch.testing.assert_close(weights.cpu(), want)
    assert not called


@pytest.mark.parametrize(("tokens", "count"), [(200, 16), (70, 40)])
def test_the_tiles_of_a_gpu(monkeypatch, tokens, count):
    common = kernels.common
    traits = common.DeviceTraits(capability=90, num_sms=3 if tokens == 200 else 132)
    monkeypatch.setattr(common, "device_traits", lambda device: traits)
    x, keys = _draw(tokens, 130).to(GPU), _draw(count, 130, seed=1).to(GPU)
    kind = Gate("abs_sigmoid", 2, None, True)
    [_, weights] = kernels.route_tokens(x, keys, 0.3, True, kind)
    scores = route_scores_fwd(x.double(), keys.double(), None, 0.3, "cosine")
    torch.testing.assert_close(weights.double(), gate_fwd(scores, kind), rtol=1e-5, atol=1e-6)
