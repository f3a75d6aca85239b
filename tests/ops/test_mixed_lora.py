"""Every backend of `mixed_lora` against the float64 reference: forward and every gradient."""

import importlib

import pytest
import torch

from sapt_fast import dispatch
from sapt_fast.ops import mixed_lora, mixed_lora_linear

eager = importlib.import_module("sapt_fast.ops._mixed_lora_eager")

BACKENDS = ["reference", "cpu", "triton"]
GPU = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# What one rounding of the result costs in a dtype: an error this small is not worth a ratio.
FLOOR = {torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# name: (x shape, O, ranks)
CASES = {
    "odd": ((3, 5, 33), 17, (4, 4, 4)),
    "one_sample_one_adapter": ((1, 7, 16), 8, (4,)),
    "one_row": ((1, 1, 24), 40, (4, 8)),
    "mixed_ranks_and_none": ((2, 9, 40), 24, (3, 0, 5, 1)),
    "sixty": ((4, 16, 64), 48, (4,) * 15),
    "two_dimensional": ((6, 20), 12, (2, 2)),
    "rows_beyond_a_tile": ((2, 70, 32), 72, (16, 4)),
}


def _inputs(shape, out, ranks, dtype, *, per_token=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    total, width = sum(ranks), shape[-1]
    lead = shape[:-1] if per_token else shape[:1]
    mixture = torch.rand(*lead, len(ranks), generator=generator, dtype=torch.float64)
    accumulate = torch.promote_types(dtype, torch.float32)
    return {
        "x": draw(*shape),
        "weight": draw(out, width) / width**0.5,
        "bias": draw(out),
        "lora_a": draw(total, width) / width**0.5,
        "lora_b": draw(total, out),
        "mixture": mixture.to(accumulate),
    }


def _device(backend):
    return GPU if backend == "triton" else "cpu"


def _leaves(inputs, backend):
    return {
        n: t.detach().to(_device(backend), copy=True).requires_grad_() for n, t in inputs.items()
    }


def _incoming(y):
    """A fixed random gradient, the same for every provider."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)


def _run(inputs, *, backend, **options):
    """(output, gradients by name) on the CPU."""
    leaves = _leaves(inputs, backend)
    y = mixed_lora_linear(*leaves.values(), backend=backend, **options)
    y.backward(_incoming(y))
    grads = {n: None if t.grad is None else t.grad.cpu() for n, t in leaves.items()}
    return y.detach().cpu(), grads


def _error(result, exact):
    result, exact = result.double().cpu(), exact.double().cpu()
    scale = exact.pow(2).mean().sqrt().clamp(min=1e-30)
    return ((result - exact).pow(2).mean().sqrt() / scale).item()


def _assert_as_good_as_torch(result, plain, exact, dtype, name):
    assert result.shape == exact.shape, name
    assert torch.isfinite(result).all(), name
    allowed = max(2 * _error(plain, exact), FLOOR[dtype])
    assert _error(result, exact) <= allowed, f"{name}: {_error(result, exact):.1e} > {allowed:.1e}"


def _plain_torch(inputs, ranks, scaling, grad_through_frozen=True, trainable=None):
    """The formula adapter by adapter with autograd, in the inputs' dtype: the published loop."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    x, weight, bias, lora_a, lora_b, mixture = leaves.values()
    y = torch.nn.functional.linear(x, weight, bias)
    start = 0
    for k, rank in enumerate(ranks):
        a, b = lora_a[start : start + rank], lora_b[start : start + rank]
        start += rank
        source = x
        if trainable is not None and k not in trainable:
            a, b = a.detach(), b.detach()
            source = x if grad_through_frozen else x.detach()
        weights = mixture[..., k].to(x.dtype)
        weights = weights.reshape(*weights.shape, *[1] * (x.dim() - weights.dim()))
        y = y + weights * scaling[k] * ((source @ a.t()) @ b)
    y.backward(_incoming(y))
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = dispatch.unavailable("mixed_lora", request.param, _device(request.param))
    assert reason is None, reason
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient(backend, case, dtype):
    shape, out, ranks = CASES[case]
    scaling = torch.linspace(0.5, 2, len(ranks))
    inputs = _inputs(shape, out, ranks, dtype)
    exact = _plain_torch({k: v.double() for k, v in inputs.items()}, ranks, scaling.double())
    plain = _plain_torch(inputs, ranks, scaling.to(dtype))
    y, grads = _run(inputs, ranks=ranks, scaling=scaling, backend=backend)
    _assert_as_good_as_torch(y, plain[0], exact[0], dtype, "y")
    for name, grad in grads.items():
        _assert_as_good_as_torch(grad, plain[1][name], exact[1][name], dtype, name)


@pytest.mark.parametrize("per_token", [False, True], ids=["per_sample", "per_token"])
@pytest.mark.parametrize("trainable", [[2], [0, 2], [], [1]])
@pytest.mark.parametrize("through", [True, False], ids=["through_frozen", "stop_at_frozen"])
def test_trainable_rows_and_gradient_modes(backend, through, trainable, per_token):
    ranks, scaling = (4, 2, 3), torch.tensor([0.5, 1.0, 2.0])
    inputs = _inputs((3, 6, 20), 12, ranks, torch.float32, per_token=per_token)
    options = {"grad_through_frozen": through, "trainable": trainable}
    exact = _plain_torch(
        {k: v.double() for k, v in inputs.items()}, ranks, scaling.double(), **options
    )
    y, grads = _run(inputs, ranks=ranks, scaling=scaling, backend=backend, **options)
    assert _error(y, exact[0]) <= 1e-6
    for name, grad in grads.items():
        if exact[1][name] is None:
            assert grad is None or not grad.any(), name
        else:
            assert _error(grad, exact[1][name]) <= 2e-6, name
    frozen = [k for k in range(3) if k not in trainable]
    for k in frozen:
        rows = slice(sum(ranks[:k]), sum(ranks[: k + 1]))
        assert grads["lora_a"] is None or not grads["lora_a"][rows].any()


def test_the_two_gradient_modes_differ(backend):
    inputs = _inputs((2, 4, 16), 8, (4, 4), torch.float32)
    exact, official = (
        _run(inputs, ranks=4, trainable=[1], grad_through_frozen=mode, backend=backend)[1]
        for mode in (True, False)
    )
    assert not torch.allclose(exact["x"], official["x"])
    assert torch.equal(exact["mixture"], official["mixture"])


@pytest.mark.parametrize("through", [True, False])
def test_when_only_the_input_wants_a_gradient(backend, through):
    ranks = (3, 5)
    inputs = _inputs((2, 6, 24), 10, ranks, torch.float32)
    exact = _run(
        {k: v.double() for k, v in inputs.items()},
        backend="reference",
        ranks=ranks,
        trainable=[],
        grad_through_frozen=through,
    )
    leaves = {k: v.detach() for k, v in _leaves(inputs, backend).items()}
    x = leaves["x"].requires_grad_()
    y = mixed_lora_linear(
        *leaves.values(), ranks=ranks, trainable=[], grad_through_frozen=through, backend=backend
    )
    y.backward(_incoming(y))
    assert _error(x.grad, exact[1]["x"]) <= 1e-6


def test_without_the_base(backend):
    ranks = (3, 5)
    inputs = _inputs((2, 6, 24), 10, ranks, torch.float32)
    names = ("x", "lora_a", "lora_b", "mixture")
    zero = {**inputs, "weight": torch.zeros(10, 24), "bias": torch.zeros(10)}
    exact = _plain_torch({k: v.double() for k, v in zero.items()}, ranks, torch.ones(2).double())
    leaves = _leaves({n: inputs[n] for n in names}, backend)
    y = mixed_lora(*leaves.values(), ranks=ranks, backend=backend)
    y.backward(_incoming(y))
    assert _error(y.detach(), exact[0]) <= 1e-6
    for name in names:
        assert _error(leaves[name].grad, exact[1][name]) <= 2e-6, name


@pytest.mark.parametrize("train", [True, False])
def test_float32_adapters_on_a_bfloat16_layer(backend, train):
    ranks = (4, 4)
    inputs = _inputs((2, 6, 32), 16, ranks, torch.bfloat16)
    for name in ("lora_a", "lora_b"):
        inputs[name] = inputs[name].float()
    with torch.set_grad_enabled(train):
        y = mixed_lora_linear(*_leaves(inputs, backend).values(), ranks=ranks, backend=backend)
    assert y.dtype == torch.bfloat16
    exact = _run({k: v.double() for k, v in inputs.items()}, ranks=ranks, backend="reference")[0]
    assert _error(y, exact) <= 1e-2
    if train:
        _, grads = _run(inputs, ranks=ranks, backend=backend)
        assert grads["lora_a"].dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    scaling = torch.tensor([0.5, 2.0, 3.0])
    for per_token in (False, True):
        inputs = _inputs((2, 3, 5), 4, (2, 0, 3), torch.float64, per_token=per_token)
        leaves = [t.requires_grad_() for t in inputs.values()]
        assert torch.autograd.gradcheck(
            lambda *a: mixed_lora_linear(*a, ranks=(2, 0, 3), scaling=scaling, backend=backend),
            leaves,
        )


def test_only_rank_space_is_saved_for_the_backward(backend):
    inputs = _inputs((4, 16, 64), 48, (4,) * 15, torch.float32)
    leaves = _leaves(inputs, backend)
    own = {t.data_ptr() for t in leaves.values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mixed_lora_linear(*leaves.values(), ranks=4, backend=backend)
    extra = sum(t.numel() for t in saved if t.data_ptr() not in own and t.is_floating_point())
    assert extra <= 4 * 16 * 64 + 60  # M x R, R padded to 64, and the scale of each row


def test_autocast_computes_in_its_dtype(backend):
    inputs = _inputs((2, 5, 16), 8, (4, 4), torch.float32)
    with torch.autocast(_device(backend), torch.bfloat16):
        y, grads = _run(inputs, ranks=4, backend=backend)
    assert y.dtype == torch.bfloat16
    exact, _ = _run({k: v.double() for k, v in inputs.items()}, ranks=4, backend="reference")
    assert _error(y, exact) <= 2e-2
    assert all(grads[k].dtype == torch.float32 for k in grads)


def test_backward_under_autocast_of_a_forward_outside_it(backend):
    inputs = _inputs((3, 40, 32), 24, (4, 4), torch.float32)
    expected = _run(inputs, ranks=4, backend=backend)[1]
    leaves = _leaves(inputs, backend)
    y = mixed_lora_linear(*leaves.values(), ranks=4, backend=backend)
    with torch.autocast(_device(backend), torch.bfloat16):
        y.backward(_incoming(y))
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad.cpu(), expected[name]), name


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_leaves_float64_alone(backend):
    inputs = _inputs((2, 5, 16), 8, (4, 4), torch.float64)
    expected = _run(inputs, ranks=4, backend=backend)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = _run(inputs, ranks=4, backend=backend)[0]
    assert y.dtype == torch.float64
    assert torch.equal(y, expected)


@pytest.mark.parametrize("tokens", [5, 100])
def test_a_bfloat16_layer_under_float16_autocast(tokens):
    inputs = _inputs((2, tokens, 16), 8, (4, 4), torch.bfloat16)
    for backend in ("reference", "cpu"):
        with torch.autocast("cpu", torch.float16):
            y, grads = _run(inputs, ranks=4, backend=backend)
        assert y.dtype == torch.float16
        assert all(grads[k].dtype == inputs[k].dtype for k in grads)


def test_adapters_changed_between_forward_and_backward_raise(backend):
    leaves = _leaves(_inputs((2, 5, 16), 8, (4, 4), torch.float32), backend)
    y = mixed_lora_linear(*leaves.values(), ranks=4, backend=backend)
    with torch.no_grad():
        leaves["lora_a"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_fake_run_leaves_nothing_behind(backend):
    inputs = _inputs((2, 5, 16), 8, (3, 9), torch.float32)  # ranks no other test has
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in _leaves(inputs, backend).values()]
        mixed_lora_linear(*fake, ranks=(3, 9), backend=backend)
    y, _ = _run(inputs, ranks=(3, 9), backend=backend)
    assert type(y) is torch.Tensor


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_adapters_of_rank_zero_only(backend):
    inputs = _inputs((2, 5, 16), 8, (0, 0), torch.float32)
    y, grads = _run(inputs, ranks=0, backend=backend)
    expected = torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"])
    torch.testing.assert_close(y, expected)
    assert not grads["mixture"].any()


def test_the_environment_names_a_backend_for_ops_that_have_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv(dispatch.ENV_VARIABLE, "cpu")
    assert dispatch.resolve("mixed_lora", cpu) == "cpu"
    assert dispatch.resolve("route", cpu) == "reference"
    with pytest.raises(dispatch.BackendError):
        dispatch.resolve("route", cpu, "cpu")
    monkeypatch.setenv(dispatch.ENV_VARIABLE, "rocket")
    with pytest.raises(ValueError, match="rocket"):
        dispatch.resolve("route", cpu)


def test_float64_has_no_triton_kernel():
    chosen = dispatch.resolve("mixed_lora", torch.device("cuda"), dtype=torch.float64)
    assert chosen == "reference"
    with pytest.raises(dispatch.BackendError, match="float64"):
        dispatch.resolve("mixed_lora", torch.device("cuda"), "triton", torch.float64)


def test_training_after_the_first_call_ran_in_inference_mode(backend):
    inputs = _inputs((2, 5, 16), 8, (4, 7), torch.float32)  # ranks no other test has
    with torch.inference_mode():
        mixed_lora_linear(*_leaves(inputs, backend).values(), ranks=(4, 7), backend=backend)
    _run(inputs, ranks=(4, 7), backend=backend)


def test_eager_calls_and_the_registered_op_agree(backend):
    """Only a mode sees the registered op: it is called through layers that cost time."""
    inputs = _inputs((2, 5, 16), 8, (3, 5), torch.float32)
    seen = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **kwargs or {})

    plain = _run(inputs, ranks=(3, 5), backend=backend)
    assert eager.is_eager(*inputs.values())
    with Watching():
        assert not eager.is_eager(*inputs.values())
        watched = _run(inputs, ranks=(3, 5), backend=backend)
    names = {func._schema.name for func in seen}
    assert {"sapt_fast::mixed_lora_fwd", "sapt_fast::mixed_lora_bwd"} <= names
    torch.testing.assert_close(plain, watched, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_a", "lora_b", "mixture"])
def test_one_input_alone_gets_the_gradient_that_it_gets_among_all(name, backend):
    inputs = _inputs((2, 5, 16), 8, (3, 5), torch.float32)
    _, grads = _run(inputs, ranks=(3, 5), backend=backend)
    leaves = _leaves(inputs, backend)
    for other, leaf in leaves.items():
        leaf.requires_grad_(other == name)
    y = mixed_lora_linear(*leaves.values(), ranks=(3, 5), backend=backend)
    y.backward(_incoming(y))
    torch.testing.assert_close(leaves[name].grad.cpu(), grads[name], rtol=1e-6, atol=1e-6)
    asked = _leaves(inputs, backend)
    y = mixed_lora_linear(*asked.values(), ranks=(3, 5), backend=backend)
    (found,) = torch.autograd.grad(y, [asked[name]], _incoming(y))
    torch.testing.assert_close(found.cpu(), grads[name], rtol=1e-6, atol=1e-6)
