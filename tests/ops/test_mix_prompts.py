"""Every backend of `mix_prompts` against the formula in float64: forward and every gradient."""

import importlib

import pytest
import torch

from sapt_fast import dispatch
from sapt_fast.ops import mix_prompts, mix_prompts_with_tokens

op = importlib.import_module("sapt_fast.ops.mix_prompts")

BACKENDS = ["reference", "triton"]
GPU = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# name: (B, K, P, T, D)
CASES = {
    "odd": (3, 5, 7, 9, 33),
    "one_of_everything": (1, 1, 1, 1, 1),
    "one_prompt_token": (2, 3, 1, 5, 16),
    "no_tokens": (2, 3, 4, 0, 20),
    "rows_and_columns_beyond_a_tile": (2, 6, 9, 5, 72),
    "samples_in_parts": (19, 2, 1, 1, 8),
}
VOCABULARY = 11


def _device(backend):
    return GPU if backend == "triton" else "cpu"


def _inputs(case, dtype=torch.float32, seed=0):
    batch, count, length, tokens, width = case
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    mixture = torch.rand(batch, count, generator=generator, dtype=torch.float64)
    return {
        "prompts": draw(count, length, width),
        "mixture": mixture.to(torch.promote_types(dtype, torch.float32)),
        "embeds": draw(batch, tokens, width),
    }


def _leaves(inputs, backend):
    return {n: t.to(_device(backend), copy=True).requires_grad_() for n, t in inputs.items()}


def _incoming(y):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)


def _run(leaves, function):
    y = function(*leaves.values())
    y.backward(_incoming(y))
    return y.detach().cpu(), {n: t.grad.cpu() for n, t in leaves.items()}


def _exact(inputs):
    """The formula in float64 with the incoming gradient of the inputs' dtype."""
    leaves = {n: t.double().requires_grad_() for n, t in inputs.items()}
    prompts, mixture, embeds = leaves.values()
    y = torch.cat([torch.einsum("bk,kpd->bpd", mixture, prompts), embeds], 1)
    y.backward(_incoming(y.to(inputs["embeds"].dtype)).double())
    return y.detach(), {n: t.grad for n, t in leaves.items()}


def _assert_close(result, exact, dtype, name):
    assert result.shape == exact.shape, name
    tolerance = TOLERANCE[dtype] * max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
    torch.testing.assert_close(
        result.double(), exact, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}"
    )


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = dispatch.unavailable("mix_prompts", request.param, _device(request.param))
    assert reason is None, reason
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient(backend, case, dtype):
    inputs = _inputs(CASES[case], dtype)
    exact, exact_grads = _exact(inputs)
    y, grads = _run(_leaves(inputs, backend), lambda *t: mix_prompts(*t, backend=backend))
    assert y.dtype == dtype
    assert y.is_contiguous()
    _assert_close(y, exact, dtype, "y")
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        _assert_close(grad, exact_grads[name], dtype, name)
    assert torch.equal(y[:, CASES[case][2] :], inputs["embeds"])


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
def test_gathering_tokens_equals_mixing_their_embeddings(backend, dtype, id_dtype):
    inputs = _inputs((3, 4, 5, 9, 24), dtype)
    ids = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
    table = torch.randn(VOCABULARY, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    leaves = _leaves({**inputs, "embeds": table}, backend)
    given = ids.to(leaves["embeds"].device, id_dtype)
    results = _run(leaves, lambda p, m, t: mix_prompts_with_tokens(p, m, given, t, backend=backend))
    exact, exact_grads = _exact({**inputs, "embeds": table[ids]})
    exact_table = torch.zeros(VOCABULARY, 24, dtype=torch.float64)
    exact_table.index_add_(0, ids.flatten(), exact_grads["embeds"].flatten(0, 1))
    _assert_close(results[0], exact, dtype, "y")
    for name, grad in {**exact_grads, "embeds": exact_table}.items():
        _assert_close(results[1][name], grad, dtype, name)


@pytest.mark.parametrize("wanted", ["prompts", "mixture", "embeds"])
def test_only_what_is_wanted_gets_a_gradient(backend, wanted):
    inputs = _inputs((3, 5, 7, 9, 33))
    leaves = {n: t.detach() for n, t in _leaves(inputs, backend).items()}
    leaves[wanted].requires_grad_()
    y = mix_prompts(*leaves.values(), backend=backend)
    y.backward(_incoming(y))
    _assert_close(leaves[wanted].grad.cpu(), _exact(inputs)[1][wanted], torch.float32, wanted)


@pytest.mark.parametrize("width", [64, 50], ids=["aligned", "unaligned"])
def test_the_tiles_of_a_large_gpu(monkeypatch, width):
    """Interpreted kernels have small tiles of their own; here they run those of an H200."""
    common = pytest.importorskip("sapt_fast.triton_kernels.blocks.common")
    traits = common.DeviceTraits(capability=90, num_sms=132)
    monkeypatch.setattr(common, "device_traits", lambda device: traits)
    inputs = _inputs((17, 18, 11, 35, width))
    exact, exact_grads = _exact(inputs)
    y, grads = _run(_leaves(inputs, "triton"), lambda *t: mix_prompts(*t, backend="triton"))
    _assert_close(y, exact, torch.float32, "y")
    for name, grad in grads.items():
        _assert_close(grad, exact_grads[name], torch.float32, name)


def test_float32_prompts_before_bfloat16_embeddings(backend):
    inputs = _inputs((2, 3, 4, 5, 16), torch.bfloat16)
    inputs["prompts"] = inputs["prompts"].float()
    y, grads = _run(_leaves(inputs, backend), lambda *t: mix_prompts(*t, backend=backend))
    exact, exact_grads = _exact(inputs)
    _assert_close(y, exact, torch.bfloat16, "y")
    assert grads["prompts"].dtype == torch.float32
    _assert_close(grads["prompts"], exact_grads["prompts"], torch.float32, "prompts")


def test_autocast_leaves_the_sums_in_float32(backend):
    inputs = _inputs((2, 3, 4, 5, 16))
    with torch.autocast(_device(backend), torch.bfloat16):
        y, grads = _run(_leaves(inputs, backend), lambda *t: mix_prompts(*t, backend=backend))
    exact, exact_grads = _exact(inputs)
    _assert_close(y, exact, torch.float32, "y")
    for name, grad in grads.items():
        _assert_close(grad, exact_grads[name], torch.float32, name)


def test_the_triton_kernel_gives_nan_for_unknown_ids():
    inputs = _inputs((1, 2, 2, 3, 8))
    ids = torch.tensor([[0, VOCABULARY, -1]])
    arguments = inputs["prompts"], inputs["mixture"], torch.randn(VOCABULARY, 8), ids
    # The op itself refuses such ids where it can read them without waiting for a device.
    kernel = dispatch.kernels("mix_prompts", "triton").mix_prompts_fwd
    y = kernel(*(t.to(GPU) for t in arguments))
    assert y[0].isnan().any(-1).tolist() == [False, False, False, True, True]


def test_no_activation_is_saved(backend):
    leaves = _leaves(_inputs((2, 3, 4, 5, 16)), backend)
    own = {t.data_ptr() for t in leaves.values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mix_prompts(*leaves.values(), backend=backend)
    assert all(t.data_ptr() in own for t in saved)
