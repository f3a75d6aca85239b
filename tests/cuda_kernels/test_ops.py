"""The public ops on the cuda backend: forward on the emulator, gradients by what it shares."""

import pytest
import torch
from torch import Tensor

from sapt_fast import dispatch, ops
from sapt_fast.ops.route import QueryProjection

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="gradients come from Triton, which takes CUDA tensors there"
)


@pytest.fixture
def on_cuda(cuda, monkeypatch):
    """Makes every op run its cuda kernels, whatever the device of its tensors."""
    for op in dispatch.ops():
        if "cuda" in dispatch.backends(op):
            cuda(op)
    monkeypatch.setattr(dispatch, "resolve", lambda op, *_, **__: "cuda")


def _leaves(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(*shape, generator=generator).requires_grad_()
        for name, shape in shapes.items()
    }


def _both(function, leaves: dict[str, Tensor], monkeypatch) -> None:
    """Values and gradients on the cuda backend and in the reference agree."""
    results = []
    for backend in ("cuda", "reference"):
        monkeypatch.setattr(dispatch, "resolve", lambda op, *_, name=backend, **__: name)
        y = function(**leaves)
        seed = torch.linspace(-1, 1, y.numel()).view(y.shape)
        results.append([y, *torch.autograd.grad((y * seed).sum(), list(leaves.values()))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_cuda")
class TestGradients:
    @pytest.mark.parametrize("zero", [False, True])
    def test_mixed_lora(self, monkeypatch, zero):
        leaves = _leaves(
            x=(2, 3, 24), weight=(20, 24), bias=(20,), a=(9, 24), b=(9, 20), mixture=(2, 3)
        )
        if zero:  # an adapter without weight has a gradient all the same
            leaves["mixture"].data[:, 1] = 0

        def layer(x, weight, bias, a, b, mixture):
            return ops.mixed_lora_linear(
                x, weight, bias, a, b, mixture, ranks=(4, 2, 3), scaling=0.5
            )

        _both(layer, leaves, monkeypatch)

    def test_mix_prompts(self, monkeypatch):
        leaves = _leaves(prompts=(3, 2, 8), mixture=(2, 3), embeds=(2, 4, 8))
        _both(ops.mix_prompts, leaves, monkeypatch)

    def test_route(self, monkeypatch):
        leaves = _leaves(
            embeds=(3, 16), keys=(5, 16), down=(4, 16), up=(16, 4), weight=(16,), bias=(16,)
        )

        def weights(embeds, keys, down, up, weight, bias):
            return ops.route(embeds, keys, QueryProjection(down, up, weight, bias), top_k=3)

        _both(weights, leaves, monkeypatch)

    def test_nearest_key(self, monkeypatch):
        leaves = _leaves(query=(3, 8), keys=(20, 8))
        _both(
            lambda query, keys: ops.nearest_key(query, keys, torch.ones(20))[1], leaves, monkeypatch
        )

    def test_topk_keys(self, monkeypatch):
        leaves = _leaves(query=(3, 8), keys=(20, 8))
        _both(lambda query, keys: ops.topk_keys(query, keys, 4)[0], leaves, monkeypatch)


@pytest.mark.usefixtures("on_cuda")
@torch.no_grad()
def test_inference_of_a_layer():
    leaves = _leaves(x=(2, 1, 24), weight=(20, 24), a=(8, 24), b=(8, 20), mixture=(2, 2))
    x, weight, a, b, mixture = leaves.values()
    y = ops.mixed_lora_linear(x, weight, None, a, b, mixture, ranks=4)
    want = x @ weight.t()
    for k in range(2):
        rows = slice(4 * k, 4 * k + 4)
        want += mixture[:, k, None, None] * (x @ a[rows].t() @ b[rows])
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_cuda")
def test_the_registered_op():
    """Fake and real outputs agree, so that compiled models can use the backend."""
    leaves = _leaves(x=(2, 24), weight=(20, 24), bias=(20,), a=(8, 24), b=(8, 20), mixture=(2, 2))
    x, weight, bias, a, b, mixture = (t.detach() for t in leaves.values())
    owners = torch.arange(2, dtype=torch.int32).repeat_interleave(4)
    torch.library.opcheck(
        torch.ops.sapt_fast.mixed_lora_fwd,
        (
            *(x, mixture, [weight], [bias], [a], [b], [owners], [torch.ones(8)]),
            *([], [], [], True, [], 0, ""),
        ),
        test_utils=("test_schema", "test_faketensor"),
    )
