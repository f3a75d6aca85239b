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


@pytest.mark.parametrize("case", [(0, 3, 4, 5, 8), (2, 0, 4, 5, 8), (2, 3, 0, 5, 8)])
def test_empty_inputs(backend, case):
    inputs = _inputs(case)
    exact, exact_grads = _exact(inputs)
    y, grads = _run(_leaves(inputs, backend), lambda *t: mix_prompts(*t, backend=backend))
    assert torch.equal(y, exact.float())
    assert all(torch.equal(grads[n], exact_grads[n].float()) for n in grads)


def _non_contiguous(t):
    wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return wide[..., ::2]


@pytest.mark.parametrize("layout", ["strided", "sliced", "expanded"])
def test_non_contiguous_inputs_and_gradient(backend, layout):
    inputs = _inputs((3, 4, 5, 6, 20))
    views = {n: t.detach() for n, t in _leaves(inputs, backend).items()}
    if layout == "strided":
        views = {n: _non_contiguous(t) for n, t in views.items()}
    elif layout == "sliced":
        views["embeds"] = torch.cat([views["embeds"]] * 2, -1)[:, :, :20]
    else:
        inputs["embeds"] = inputs["embeds"][:, :1].expand(-1, 6, -1)
        views["embeds"] = views["embeds"][:, :1].expand(-1, 6, -1)
    leaves = {n: t.requires_grad_() for n, t in views.items()}
    y = mix_prompts(*leaves.values(), backend=backend)
    y.backward(_non_contiguous(_incoming(y)))
    exact, exact_grads = _exact(inputs)
    assert y.is_contiguous()
    _assert_close(y.detach().cpu(), exact, torch.float32, "y")
    for name in ("prompts", "mixture"):
        _assert_close(leaves[name].grad.cpu(), exact_grads[name], torch.float32, name)


def test_expanded_incoming_gradient_is_not_written_to(backend):
    inputs = _inputs((2, 3, 4, 5, 16))
    leaves, again = _leaves(inputs, backend), _leaves(inputs, backend)
    mix_prompts(*leaves.values(), backend=backend).sum().backward()
    y = mix_prompts(*again.values(), backend=backend)
    ones = torch.ones_like(y)
    y.backward(ones)
    assert torch.equal(ones, torch.ones_like(y))
    for name in leaves:
        torch.testing.assert_close(leaves[name].grad, again[name].grad)


def test_unwritten_memory_never_shows_and_bits_repeat(backend, monkeypatch):
    def poisoned(make):
        def allocate(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return allocate

    inputs = _inputs((19, 5, 3, 4, 33))
    expected = _run(_leaves(inputs, backend), lambda *t: mix_prompts(*t, backend=backend))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    y, grads = _run(_leaves(inputs, backend), lambda *t: mix_prompts(*t, backend=backend))
    assert torch.equal(y, expected[0])
    assert all(torch.equal(grads[n], expected[1][n]) for n in grads)


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


def test_gradcheck():
    leaves = [t.requires_grad_() for t in _inputs((2, 3, 2, 2, 3), torch.float64).values()]
    assert torch.autograd.gradcheck(mix_prompts, leaves)
    ids = torch.randint(0, 4, (2, 5))
    table = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda p, m, t: mix_prompts_with_tokens(p, m, ids, t), (*leaves[:2], table)
    )


@pytest.mark.parametrize("tokens", [False, True], ids=["embeds", "tokens"])
def test_opcheck(backend, tokens):
    prompts, mixture, source = _leaves(_inputs((2, 3, 4, 5, 8)), backend).values()
    ids = None
    if tokens:
        ids = torch.randint(0, 2, (2, 5), device=source.device)
        source = source.detach()[:, 0].clone().requires_grad_()
    torch.library.opcheck(op._forward_op, (prompts, mixture, source, ids, backend))
    dy = torch.randn(2, 9, 8, device=prompts.device)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            op._backward_op, (dy, prompts.detach(), mixture.detach(), *needs, backend)
        )


def test_fullgraph_compile_forward_and_backward(backend):
    def layer(prompts, mixture, embeds):
        return mix_prompts(prompts, torch.softmax(mixture, -1), embeds, backend=backend).relu()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        inputs = _inputs((batch, 3, 4, 5, 16), seed=batch)
        pair = [_leaves(inputs, backend) for _ in range(2)]
        for function, leaves in zip((layer, compiled), pair, strict=True):
            function(*leaves.values()).square().sum().backward()
        for name in inputs:
            torch.testing.assert_close(pair[0][name].grad, pair[1][name].grad)


def test_no_activation_is_saved(backend):
    leaves = _leaves(_inputs((2, 3, 4, 5, 16)), backend)
    own = {t.data_ptr() for t in leaves.values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mix_prompts(*leaves.values(), backend=backend)
    assert all(t.data_ptr() in own for t in saved)


BAD = {
    "embeds": ({"embeds": torch.zeros(5, 8)}, ValueError, r"embeds: .*expected \[B, T, D\]"),
    "embeds dtype": ({"embeds": torch.zeros(2, 5, 8).int()}, TypeError, "embeds: got dtype"),
    "prompts": ({"prompts": torch.zeros(3, 4, 7)}, ValueError, r"expected \[K, P, 8\]"),
    "prompts dtype": ({"prompts": torch.zeros(3, 4, 8).half()}, TypeError, "prompts: got dtype"),
    "mixture": ({"mixture": torch.zeros(2, 4)}, ValueError, r"mixture: .*expected \[2, 3\]"),
    "mixture dtype": ({"mixture": torch.zeros(2, 3).int()}, TypeError, "mixture: got dtype"),
    "device": ({"mixture": torch.zeros(2, 3, device="meta")}, ValueError, "mixture: got device"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        mix_prompts(*{**_inputs((2, 3, 4, 5, 8)), **changes}.values())


def test_bad_tokens_name_the_argument():
    prompts, mixture, _ = _inputs((2, 3, 4, 5, 8)).values()
    table = torch.zeros(VOCABULARY, 8)
    with pytest.raises(ValueError, match=r"input_ids: .*expected \[B, T\]"):
        mix_prompts_with_tokens(prompts, mixture, torch.zeros(5).long(), table)
    with pytest.raises(TypeError, match="input_ids: got dtype"):
        mix_prompts_with_tokens(prompts, mixture, torch.zeros(2, 5), table)
    with pytest.raises(ValueError, match=r"table: .*expected \[V, D\]"):
        mix_prompts_with_tokens(prompts, mixture, torch.zeros(2, 5).long(), table[0])
    with pytest.raises(ValueError, match=r"mixture: .*expected \[1, 3\]"):
        mix_prompts_with_tokens(prompts, mixture, torch.zeros(1, 5).long(), table)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_a_named_backend_that_cannot_run_raises(backend):
    dtype = torch.float64 if backend == "triton" else torch.float32
    with pytest.raises(dispatch.BackendError, match=backend):
        mix_prompts(*_inputs((2, 3, 4, 5, 8), dtype).values(), backend=backend)
