"""Several projections of one input in one call of `mixed_lora`, on every backend."""

import importlib

import pytest
import torch

from sapt_fast import dispatch
from sapt_fast.ops.projection import PooledProjection, Projection
from sapt_fast.ops.rank_table import rank_table

op = importlib.import_module("sapt_fast.ops.mixed_lora")

GPU = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets on the CPU
SAMPLES, ROWS, INPUTS = 3, 5, 24
# Of each projection: out features, the rank of each adapter, the rows that train.
GROUPS = {
    "pair": [(16, (4, 4, 4), [8, 12]), (16, (4, 4, 4), [8, 12])],
    "unequal": [(40, (4, 0, 7), [4, 11]), (8, (1, 3, 0), []), (24, (9, 9, 9), [0, 9, 18, 27])],
    "five": [(8 * n, (n, 2, n), [n, n + 2]) for n in range(1, 6)],
    "one_without_ranks": [(16, (0, 0, 0), []), (16, (2, 2, 2), [4, 6])],
}
FLOOR = {torch.float32: 1e-6, torch.float16: 2e-3}


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    reason = dispatch.unavailable("mixed_lora", request.param, device(request.param).type)
    assert reason is None, reason
    return request.param


def device(backend):
    return torch.device(GPU if backend == "triton" else "cpu")


def leaves(group, dtype, *, with_weight=True, rows=ROWS, where="cpu"):
    generator = torch.Generator().manual_seed(0)

    def draw(*size, scale=1.0, of=dtype):
        values = torch.randn(*size, generator=generator, dtype=torch.float64) * scale
        return values.to(of).to(where).requires_grad_()

    single = torch.float32 if dtype == torch.float16 else dtype
    tensors = {"x": draw(SAMPLES * rows, INPUTS), "mixture": draw(SAMPLES, 3, of=single)}
    for i, (out, ranks, _) in enumerate(GROUPS[group]):
        if with_weight:
            tensors[f"weight{i}"] = draw(out, INPUTS, scale=INPUTS**-0.5)
            tensors[f"bias{i}"] = draw(out)
        tensors[f"a{i}"] = draw(sum(ranks), INPUTS, scale=INPUTS**-0.5)
        tensors[f"b{i}"] = draw(sum(ranks), out)
    return tensors


def pooled(group, t):
    result = []
    for i, (_, ranks, rows) in enumerate(GROUPS[group]):
        a, b = t[f"a{i}"], t[f"b{i}"]
        table = rank_table(ranks, [0.5, 1.0, 2.0], a.device, t["mixture"].dtype)
        given = Projection(t.get(f"weight{i}"), t.get(f"bias{i}"), a.detach(), b.detach(), *table)
        spans = list(zip(rows[::2], rows[1::2], strict=True))
        result.append(
            PooledProjection(given, [a[i:j] for i, j in spans], [b[i:j] for i, j in spans], rows)
        )
    return result


def incoming(ys):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=generator).to(y) for y in ys]


def together(group, t, backend, used=None, through=True):
    ys = op.mix(t["x"], t["mixture"], pooled(group, t), through, backend)
    return finish(t, ys, used)


def one_by_one(group, t, used=None, through=True):
    ys = [
        op.mix(t["x"], t["mixture"], [given], through, "reference")[0] for given in pooled(group, t)
    ]
    return finish(t, ys, used)


def finish(t, ys, used):
    pairs = list(zip(ys, incoming(ys), strict=True))
    chosen = pairs if used is None else [pairs[i] for i in used]
    torch.autograd.backward([y for y, _ in chosen], [dy for _, dy in chosen])
    return [y.detach() for y in ys], {n: leaf.grad for n, leaf in t.items()}


def error(got, exact):
    exact = exact.double().cpu()
    difference = (got.double().cpu() - exact).pow(2).mean().sqrt()
    return (difference / exact.pow(2).mean().sqrt().clamp(min=1e-30)).item()


@pytest.mark.parametrize("through", [True, False], ids=["through_frozen", "stop_at_frozen"])
@pytest.mark.parametrize("used", [None, [0], [1]], ids=["all", "first", "second"])
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_together_as_one_by_one(backend, group, dtype, used, through):
    where = device(backend)
    exact_t = {k: v.detach().double() for k, v in leaves(group, dtype).items()}
    exact_t = {k: v.requires_grad_() for k, v in exact_t.items()}
    exact, exact_grads = one_by_one(group, exact_t, used, through)
    plain, plain_grads = one_by_one(group, leaves(group, dtype), used, through)
    got, grads = together(group, leaves(group, dtype, where=where), backend, used, through)
    for y, torch_y, want in zip(got, plain, exact, strict=True):
        assert error(y, want) <= max(2 * error(torch_y, want), FLOOR[dtype])
    for name, want in exact_grads.items():
        assert (grads[name] is None) == (want is None), name
        if want is not None and want.numel():
            allowed = max(2 * error(plain_grads[name], want), FLOOR[dtype])
            assert error(grads[name], want) <= allowed, name


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("with_weight", [True, False])
def test_few_rows_and_no_base(backend, rows, with_weight):
    where = device(backend)
    t = leaves("unequal", torch.float32, with_weight=with_weight, rows=rows, where=where)
    got, grads = together("unequal", t, backend)
    t = leaves("unequal", torch.float32, with_weight=with_weight, rows=rows)
    want, want_grads = one_by_one("unequal", t)
    for y, expected in zip(got, want, strict=True):
        torch.testing.assert_close(y.cpu(), expected)
    for name, expected in want_grads.items():
        if expected is None:  # nothing in this pool trains
            assert grads[name] is None, name
        else:
            torch.testing.assert_close(grads[name].cpu(), expected, rtol=1e-5, atol=1e-5)


def test_without_a_graph(backend):
    t = leaves("unequal", torch.float32, where=device(backend))
    with torch.no_grad():
        got = op.mix(t["x"], t["mixture"], pooled("unequal", t), True, backend)
    want, _ = one_by_one("unequal", leaves("unequal", torch.float32))
    for y, expected in zip(got, want, strict=True):
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_gradcheck(name):
    t = leaves("pair", torch.float64)
    names = list(t)

    def function(*values):
        given = dict(zip(names, values, strict=True))
        return tuple(op.mix(given["x"], given["mixture"], pooled("pair", given), True, name))

    # Only the last four rows of each stack train, the others would be reported as wrong.
    frozen = [n for n in names if n[0] in "ab" and n[1:].isdigit()]
    values = [t[n].detach() if n in frozen else t[n] for n in names]
    assert torch.autograd.gradcheck(function, values)


def test_fullgraph_compile(backend):
    def layers(*values):
        given = dict(zip(names, values, strict=True))
        return sum(y.square().sum() for y in op.mix(
            given["x"], given["mixture"], pooled("pair", given), True, backend
        ))  # fmt: skip

    eager = leaves("pair", torch.float32, where=device(backend))
    compiled = leaves("pair", torch.float32, where=device(backend))
    names = list(eager)
    torch._dynamo.reset()
    layers(*eager.values()).backward()
    torch.compile(layers, fullgraph=True, backend="aot_eager")(*compiled.values()).backward()
    for name in names:
        torch.testing.assert_close(compiled[name].grad, eager[name].grad)


def with_rows_to_add(backend, dtype, rows=ROWS):
    """Leaves without weights whose biases have rows."""
    where = device(backend)
    t = leaves("pair", dtype, with_weight=False, rows=rows, where=where)
    for i in range(2):
        generator = torch.Generator().manual_seed(i + 2)
        values = torch.randn(SAMPLES * rows, 16, generator=generator)
        t[f"bias{i}"] = values.to(where, dtype).requires_grad_()
    return t


@pytest.mark.parametrize("rows", [ROWS, 45])
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_rows_to_add(backend, dtype, rows):
    t = with_rows_to_add(backend, dtype, rows)
    got, grads = together("pair", t, backend)
    plain = with_rows_to_add(backend, dtype, rows)
    biases = [plain.pop(f"bias{i}") for i in range(2)]
    assert all(torch.equal(t[f"bias{i}"], bias) for i, bias in enumerate(biases))  # not written to
    ys = op.mix(plain["x"], plain["mixture"], pooled("pair", plain), True, backend)
    ys = [y + bias for y, bias in zip(ys, biases, strict=True)]
    plain |= {f"bias{i}": bias for i, bias in enumerate(biases)}
    want, want_grads = finish(plain, ys, None)
    for y, expected in zip(got, want, strict=True):
        assert error(y, expected) <= FLOOR[dtype]
    for name, expected in want_grads.items():
        assert error(grads[name], expected) <= FLOOR[dtype], name


def test_rows_to_add_are_compiled(backend):
    def layer(t):
        return op.mix(t["x"], t["mixture"], pooled("pair", t), True, backend)

    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        t = with_rows_to_add(backend, torch.float32)
        results.append(finish(t, call(t), None))
    (got, grads), (want, want_grads) = results
    assert all(torch.equal(y, expected) for y, expected in zip(got, want, strict=True))
    assert all(torch.equal(grads[name], expected) for name, expected in want_grads.items())


def test_too_few_rows_to_add_are_refused(backend):
    t = with_rows_to_add(backend, torch.float32)
    t["bias1"] = t["bias1"][1:]
    with pytest.raises(ValueError, match="bias: got shape"):
        op.mix(t["x"], t["mixture"], pooled("pair", t), True, backend)
