"""What holds for every op on every backend: see `ops.cases` for the calls that it is tried on."""

from pathlib import Path

import pytest
import torch
from ops import cases
from torch import Tensor

from sapt_fast import dispatch

SAMPLES, EMPTY, BAD = (cases.named(what) for what in ("SAMPLES", "EMPTY", "BAD"))
FIRST = {op: (op, sample) for op, sample in reversed(SAMPLES.values())}  # one of each op
# Error relative to the root mean square; the interpreter truncates where bfloat16 is stored.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


def _ways(op: str) -> list[str]:
    """The backends of an op, and further ways of them; CUDA's have an emulator of their own."""
    further = getattr(cases.modules()[op], "WAYS", {})
    return [*(b for b in reversed(dispatch.backends(op)) if b != "cuda"), *further]


def _each(entries: dict, leave_out: str = "") -> pytest.MarkDecorator:
    """Every entry on every backend of its op, but for one to leave out."""
    pairs = [(n, way) for n, (op, _) in entries.items() for way in _ways(op) if way != leave_out]
    return pytest.mark.parametrize(("name", "way"), pairs, ids=[f"{n}, {w}" for n, w in pairs])


@pytest.fixture
def backend(name: str, way: str, monkeypatch) -> str:
    """The backend of a way, which must be able to run."""
    return _backend(name.split()[0], way, monkeypatch)


def _backend(op: str, way: str, monkeypatch) -> str:
    module = cases.modules()[op]
    backend = getattr(module, "WAYS", {}).get(way, way)
    reason = dispatch.unavailable(op, backend, cases.device(backend))
    assert reason is None, reason
    if hasattr(module, "choose"):
        module.choose(way, monkeypatch)
    return backend


def _leaves(sample: cases.Sample, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    moved = {n: t.detach().to(cases.device(backend)) for n, t in inputs.items()}
    for n, t in moved.items():
        t.requires_grad_(t.is_floating_point() and n not in sample.frozen)
    return moved


def _incoming(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)


def _results(sample: cases.Sample, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs and gradients by name, on the CPU."""
    leaves = _leaves(sample, {n: t.clone() for n, t in inputs.items()}, backend)
    return _backward(sample, leaves, backend)


def _backward(sample, leaves: dict[str, Tensor], backend: str, incoming=_incoming) -> dict:
    outputs = sample.outputs(leaves, backend)
    results = {f"output {i}": y.detach().cpu() for i, y in enumerate(outputs)}
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    if wanted:
        grads = torch.autograd.grad(outputs[0], wanted.values(), incoming(outputs[0]))
        results |= {f"d_{n}": grad.cpu() for n, grad in zip(wanted, grads, strict=True)}
    return results


def _assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert got[name].shape == exact.shape, name
        if not exact.is_floating_point():
            assert torch.equal(got[name], exact), name
            continue
        difference = (got[name].double() - exact.double()).norm()
        assert difference <= tolerance * exact.double().norm().clamp(min=1e-30), name


def _assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert torch.equal(got[name], exact), name


def test_every_op_has_its_files():
    root = Path(__file__).resolve().parents[2]
    for folder in ("tests/ops/cases", "benchmarks/cases"):
        files = {p.stem for p in (root / folder).glob("*.py") if not p.stem.startswith("_")}
        assert files == set(dispatch.ops()), folder
    assert {op for op, _ in SAMPLES.values()} == set(dispatch.ops())
    assert {op for op, _ in EMPTY.values()} == set(dispatch.ops())
    assert {op for op, _ in BAD.values()} == set(dispatch.ops())


def test_the_guide_lists_the_backends_of_every_op():
    guide = Path(__file__).resolve().parents[2] / "docs/reference/kernels.md"
    rows = [line.split("|")[1:-1] for line in guide.read_text().splitlines() if line[:3] == "| `"]
    table = {row[0].strip(" `"): row[1:5] for row in rows if len(row) == 6}
    listed = {
        op: {b for b, cell in zip(dispatch.BACKENDS, cells, strict=True) if cell.strip()}
        for op, cells in table.items()
    }
    assert listed == {op: set(dispatch.backends(op)) for op in dispatch.ops()}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@_each(SAMPLES)
def test_values_and_every_gradient(name, backend, dtype):
    sample = SAMPLES[name][1]
    inputs = {
        n: t.to(dtype) if t.is_floating_point() and n not in sample.wide else t
        for n, t in sample.inputs.items()
    }
    got = _results(sample, inputs, backend)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}

    # The gradient that comes in has the rounding of the output's dtype.
    def incoming(y: Tensor) -> Tensor:
        return _incoming(y.to(got["output 0"].dtype)).double()

    want = _backward(sample, _leaves(sample, wide, "reference"), "reference", incoming)
    _assert_close(got, want, TOLERANCE[dtype])
    for n, t in inputs.items():
        assert f"d_{n}" not in got or got[f"d_{n}"].dtype == t.dtype, n
    assert all(t.is_contiguous() for n, t in got.items() if n.startswith("output"))


def _strided(t: Tensor) -> Tensor:
    """Every second element of a tensor; NaN lies between where it can."""
    wide = t.new_full((*t.shape, 2), float("nan") if t.is_floating_point() else 0)
    wide[..., 0] = t
    return wide[..., 0]


def _permuted(t: Tensor) -> Tensor:
    """The first axis is innermost."""
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def _sliced(t: Tensor) -> Tensor:
    """Rows lie further apart than they are long."""
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def _expanded(t: Tensor) -> Tensor:
    """All like the first."""
    return t[:1].expand_as(t)


def _laid_out(inputs: dict[str, Tensor], layout) -> dict[str, Tensor]:
    """Every input in a layout; of several like the first one only one, or keys would be equal."""
    given = list(inputs)[:1] if layout is _expanded else inputs
    return {n: layout(t) if n in given else t for n, t in inputs.items()}


@_each(SAMPLES, leave_out="reference")  # torch's own backwards need the layout that they saved
def test_saved_tensors_may_come_back_with_other_strides(name, backend):
    sample = SAMPLES[name][1]
    want = _results(sample, sample.inputs, backend)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, _strided):
        got = _results(sample, sample.inputs, backend)
    _assert_close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("layout", [_strided, _permuted, _sliced, _expanded])
@_each(FIRST)
def test_any_layout_of_inputs_and_gradient(name, backend, layout):
    sample = FIRST[name][1]
    dense = {n: t.to(cases.device(backend)) for n, t in sample.inputs.items()}
    views = _laid_out(dense, layout)
    want = _results(sample, {n: t.contiguous() for n, t in views.items()}, backend)
    leaves = _leaves(sample, views, backend)
    assert any(not t.is_contiguous() for t in leaves.values())
    _assert_close(_backward(sample, leaves, backend, lambda y: _strided(_incoming(y))), want, 2e-6)


@_each(FIRST)
def test_what_it_is_given_is_left_alone(name, backend):
    """The inputs, and a gradient whose elements share their memory."""
    sample = FIRST[name][1]
    leaves = _leaves(sample, {n: t.clone() for n, t in sample.inputs.items()}, backend)
    before = {n: t.detach().clone() for n, t in leaves.items()}
    one = torch.ones((), device=cases.device(backend))
    got = _backward(sample, leaves, backend, lambda y: one.to(y.dtype).expand_as(y))
    assert one == 1
    _assert_equal(leaves, before)
    again = _leaves(sample, {n: t.clone() for n, t in sample.inputs.items()}, backend)
    _assert_close(got, _backward(sample, again, backend, torch.ones_like), 2e-6)


def _poisoned(make):
    def allocate(*given, **named):
        t = make(*given, **named)
        return t.fill_(float("nan") if t.is_floating_point() else 100)

    return allocate


@_each(SAMPLES)
def test_unwritten_memory_never_shows_and_bits_repeat(name, backend, monkeypatch):
    sample = SAMPLES[name][1]
    want = _results(sample, sample.inputs, backend)
    for owner, function in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, function, _poisoned(getattr(owner, function)))
    _assert_equal(_results(sample, sample.inputs, backend), want)


@_each(FIRST)
def test_without_gradients_the_same(name, backend):
    sample = FIRST[name][1]
    want = _results(sample, sample.inputs, backend)
    with torch.no_grad():
        outputs = sample.outputs(_leaves(sample, sample.inputs, backend), backend)
    got = {f"output {i}": y.cpu() for i, y in enumerate(outputs)}
    _assert_close(got, {n: want[n] for n in got}, 2e-6)


@_each(EMPTY)
def test_without_elements(name, backend):
    sample = EMPTY[name][1]
    got = _results(sample, sample.inputs, backend)
    want = _results(sample, sample.inputs, "reference")
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in want.items()}
    _assert_close(got, want, 5e-6)
    assert all(t.isfinite().all() for t in got.values())
    if not got["output 0"].any():
        assert not any(t.any() for n, t in got.items() if n.startswith("d_"))


_COMPILED = {n: e for n, e in FIRST.items() if getattr(cases.modules()[n], "COMPILES", True)}


@_each(_COMPILED)
def test_fullgraph_compile_forward_and_backward(name, backend):
    sample = FIRST[name][1]

    def layer(**leaves):
        first, *others = sample.outputs(leaves, backend)
        return first.relu(), *others

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    results = []
    for function in (layer, compiled):
        leaves = _leaves(sample, {n: t.clone() for n, t in sample.inputs.items()}, backend)
        outputs = function(**leaves)
        if outputs[0].requires_grad:
            outputs[0].square().sum().backward()
        grads = {n: t.grad for n, t in leaves.items() if t.grad is not None}
        results.append(({i: y.detach() for i, y in enumerate(outputs)}, grads))
    torch.testing.assert_close(*results)


@_each(FIRST)
def test_opcheck(name, backend):
    """The schemas, fake kernels and autograd formulas that torch is told."""
    for op, arguments in cases.modules()[name].registered(backend):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name):
    bad = BAD[name][1]
    with pytest.raises(bad.error, match=bad.message):
        bad.run()
