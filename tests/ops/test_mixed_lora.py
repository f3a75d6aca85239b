"""Every backend of `mixed_lora` against the float64 reference: forward and every gradient."""

import importlib

import pytest
import torch

from sapt_fast import dispatch
from sapt_fast.ops import mixed_lora, mixed_lora_linear
from sapt_fast.ops.rank_table import rank_table

registered = importlib.import_module("sapt_fast.ops._mixed_lora_ops")

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


def test_non_contiguous_inputs_and_gradient(backend):
    inputs = _inputs((3, 6, 20), 12, (4, 4), torch.float32)
    exact = _run({k: v.double() for k, v in inputs.items()}, ranks=4, backend="reference")
    leaves = {
        k: _non_contiguous(v.to(_device(backend))).requires_grad_() for k, v in inputs.items()
    }
    assert not leaves["x"].is_contiguous()
    y = mixed_lora_linear(*leaves.values(), ranks=4, backend=backend)
    y.backward(_non_contiguous(_incoming(y)))
    assert y.is_contiguous()
    assert _error(y.detach(), exact[0]) <= 1e-6
    for name, leaf in leaves.items():
        assert _error(leaf.grad, exact[1][name]) <= 2e-6, name


def _non_contiguous(t):
    wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return wide[..., ::2]


def test_expanded_incoming_gradient_is_not_written_to(backend):
    inputs = _inputs((2, 5, 16), 8, (4, 4), torch.float32)
    leaves, again = _leaves(inputs, backend), _leaves(inputs, backend)
    y = mixed_lora_linear(*leaves.values(), ranks=4, backend=backend)
    y.sum().backward()
    grad = torch.ones_like(y)
    before = grad.clone()
    mixed_lora_linear(*again.values(), ranks=4, backend=backend).backward(grad)
    assert torch.equal(grad, before)
    for name in leaves:
        torch.testing.assert_close(leaves[name].grad, again[name].grad)


def test_inputs_are_left_alone(backend):
    leaves = _leaves(_inputs((2, 5, 16), 8, (4, 4), torch.float32), backend)
    before = {k: v.detach().clone() for k, v in leaves.items()}
    mixed_lora_linear(*leaves.values(), ranks=4, backend=backend).sum().backward()
    assert all(torch.equal(leaves[k], before[k]) for k in leaves)


@pytest.mark.parametrize("shape", [(0, 4, 16), (2, 0, 16), (0, 16)])
def test_empty_batch(backend, shape):
    inputs = _inputs(shape, 8, (4, 4), torch.float32)
    y, grads = _run(inputs, ranks=4, backend=backend)
    assert y.shape == (*shape[:-1], 8)
    assert all(torch.equal(grads[k], torch.zeros_like(inputs[k])) for k in inputs)


def test_unwritten_memory_never_shows(backend, monkeypatch):
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(make):
        def allocate(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return allocate

    inputs = _inputs((3, 7, 33), 17, (4, 0, 3), torch.float32)
    expected = _run(inputs, ranks=(4, 0, 3), backend=backend)
    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    y, grads = _run(inputs, ranks=(4, 0, 3), backend=backend)
    assert torch.equal(y, expected[0])
    assert all(torch.equal(grads[k], expected[1][k]) for k in grads)


def test_the_same_bits_every_time(backend):
    inputs = _inputs((3, 40, 64), 48, (4,) * 6, torch.float32)
    first, second = (_run(inputs, ranks=4, backend=backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][k], second[1][k]) for k in first[1])


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


def _op_arguments(backend, dtype=torch.float32):
    x, weight, bias, a, b, mixture = (
        *_leaves(_inputs((6, 12), 8, (2, 0, 3), dtype), backend).values(),
    )
    table = rank_table((2, 0, 3), [1.0, 2.0, 3.0], x.device)
    return x, weight, bias, a, b, mixture, table


@pytest.mark.parametrize("trained", [[0, 5], [2, 5]])
def test_opcheck_forward(backend, trained):
    x, weight, bias, a, b, mixture, table = _op_arguments(backend)
    rows = slice(*trained)
    second = [t.detach().clone() for t in (a, b)]
    train_a, train_b = (
        [t[rows].detach().requires_grad_() for t in pair]
        for pair in ((a, second[0]), (b, second[1]))
    )
    arguments = (
        x, mixture, [weight, weight], [bias, bias],
        [a.detach(), second[0]], [b.detach(), second[1]],
        *([t, t] for t in table), train_a, train_b, [0, *trained, 1, *trained], True, backend,
    )  # fmt: skip
    torch.library.opcheck(registered._forward_op, arguments)


@pytest.mark.parametrize("through", [True, False])
def test_opcheck_backward(backend, through):
    x, weight, bias, a, b, mixture, table = (
        t.detach() if isinstance(t, torch.Tensor) else t for t in _op_arguments(backend)
    )
    stacks = [a, a * 2], [b, b * 2], *([t, t] for t in table)
    _, _, *hs = registered._forward_op(
        x, mixture, [weight, weight], [bias, bias], *stacks, [], [], [0, 2, 5], through, backend
    )
    dys = [torch.randn(6, 8, device=x.device) for _ in hs]
    arguments = (
        dys, x, mixture, [weight, weight], *stacks, hs, [0, 2, 5], True, True, through, backend,
    )  # fmt: skip
    torch.library.opcheck(registered._backward_op, arguments)


def test_fullgraph_compile_forward_and_backward(backend):
    def layer(x, weight, bias, a, b, mixture):
        return mixed_lora_linear(x, weight, bias, a, b, mixture, ranks=4, backend=backend).relu()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        inputs = _inputs((batch, 5, 16), 8, (4, 4), torch.float32, seed=batch)
        pair = [_leaves(inputs, backend) for _ in range(2)]
        for function, leaves in zip((layer, compiled), pair, strict=True):
            function(*leaves.values()).square().sum().backward()
        for name in inputs:
            torch.testing.assert_close(pair[0][name].grad, pair[1][name].grad)


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


BAD = {
    "x": ({"x": torch.zeros(2, 2, 2, 16)}, {}, ValueError, "x: got shape"),
    "x dtype": ({"x": torch.zeros(2, 5, 16, dtype=torch.int64)}, {}, TypeError, "x: got dtype"),
    "weight": ({"weight": torch.zeros(8, 15)}, {}, ValueError, r"weight: .*expected \[O, 16\]"),
    "weight dtype": ({"weight": torch.zeros(8, 16).half()}, {}, TypeError, "weight: got dtype"),
    "bias": ({"bias": torch.zeros(7)}, {}, ValueError, r"bias: .*expected \[8\]"),
    "lora_a": ({"lora_a": torch.zeros(8, 15)}, {}, ValueError, "lora_a: got shape"),
    "lora_b": ({"lora_b": torch.zeros(7, 8)}, {}, ValueError, "lora_b: got shape"),
    "lora_b dtype": ({"lora_b": torch.zeros(8, 8).double()}, {}, TypeError, "lora_b: got dtype"),
    "mixture": ({"mixture": torch.ones(3, 2)}, {}, ValueError, "mixture: got shape"),
    "mixture dtype": ({"mixture": torch.ones(2, 2).long()}, {}, TypeError, "mixture: got dtype"),
    "device": ({"mixture": torch.ones(2, 2, device="meta")}, {}, ValueError, "mixture: got device"),
    "rank sum": ({}, {"ranks": (4, 5)}, ValueError, r"ranks: .*sum 8"),
    "rank count": ({}, {"ranks": (4, 2, 2)}, ValueError, r"ranks: got 3 ranks, expected 2"),
    "trainable": ({}, {"trainable": [2]}, ValueError, "trainable: got"),
    "scaling": ({}, {"scaling": torch.ones(3)}, ValueError, "scaling: got tensor"),
    "scaling list": ({}, {"scaling": [1.0, 2.0]}, TypeError, "scaling: got"),
    "no adapter": ({"mixture": torch.ones(2, 0)}, {"ranks": 4}, ValueError, "mixture: got shape"),
    "ranks of floats": ({}, {"ranks": (4.0, 4.0)}, TypeError, "ranks: got"),
    "a mask for indices": ({}, {"trainable": [False, True]}, TypeError, "trainable: got"),
    "a scalar x": ({"x": torch.tensor(1.0)}, {}, ValueError, "x: got shape"),
    "backend": ({}, {"backend": "rocket"}, ValueError, "rocket"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    changes, options, error, message = BAD[name]
    inputs = {**_inputs((2, 5, 16), 8, (4, 4), torch.float32), **changes}
    with pytest.raises(error, match=message):
        mixed_lora_linear(*inputs.values(), **{"ranks": 4, **options})


def test_training_after_the_first_call_ran_in_inference_mode(backend):
    inputs = _inputs((2, 5, 16), 8, (4, 7), torch.float32)  # ranks no other test has
    with torch.inference_mode():
        mixed_lora_linear(*_leaves(inputs, backend).values(), ranks=(4, 7), backend=backend)
    _run(inputs, ranks=(4, 7), backend=backend)


def test_a_named_backend_that_cannot_run_raises():
    inputs = _inputs((2, 5, 16), 8, (4, 4), torch.float32)
    with pytest.raises(dispatch.BackendError, match="cuda"):
        mixed_lora_linear(*inputs.values(), ranks=4, backend="cuda")
