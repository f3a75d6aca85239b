"""Every op under torch.func, forward-mode AD and second derivatives, against plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from ops import cases
from ops.cases import D64, draw
from ops.cases.mix_experts import CHOSEN, plain_experts
from ops.cases.mixed_lora import MIXED, A, B, M, X, plain_mixed
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from sapt_fast import dispatch
from sapt_fast.ops import (
    mix_experts,
    mix_prompts,
    mixed_lora,
    nearest_key,
    topk_keys,
)
from sapt_fast.ops.own_lora import Adapter, add_own_lora_, own_lora

CASES = {
    name: case for module in cases.modules().values() for name, case in module.FORMULAS.items()
}
NOT_DIFFERENTIABLE = {"own_lora"}
each_case = pytest.mark.parametrize("name", CASES)
each_backend = pytest.mark.parametrize("backend", ["reference", None])


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def both(name: str, backend: str | None = None) -> tuple[Callable, Callable, tuple[Tensor, ...]]:
    case = CASES[name]
    return lambda *t: case.run(*t, backend=backend), case.plain, case.inputs


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss in which every output counts, and not linearly."""
    return lambda *t: function(*t).sin().sum()


def test_every_op_has_a_case():
    having = {op for op, module in cases.modules().items() if module.FORMULAS}
    assert having | NOT_DIFFERENTIABLE == set(dispatch.ops())


@each_backend
@each_case
def test_values_agree(name, backend):
    run, plain, inputs = both(name, backend)
    close(run(*inputs), plain(*inputs))


@each_backend
@each_case
def test_jvp(name, backend):
    run, plain, inputs = both(name, backend)
    tangents = tuple(draw(*t.shape, seed=1) for t in inputs)
    close(jvp(run, inputs, tangents), jvp(plain, inputs, tangents))
    with fwAD.dual_level():
        duals = [fwAD.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
        got, want = (fwAD.unpack_dual(f(*duals)).tangent for f in (run, plain))
        close(got, want)
        one = [*inputs[:-1], duals[-1]]  # the others have no tangent
        close(*(fwAD.unpack_dual(f(*one)).tangent for f in (run, plain)))


@each_case
def test_jacobians_and_hessian(name):
    run, plain, inputs = both(name)
    every = tuple(range(len(inputs)))
    close(jacfwd(run, every)(*inputs), jacfwd(plain, every)(*inputs))
    close(jacrev(run, every)(*inputs), jacrev(plain, every)(*inputs))
    for argnum in every:
        close(hessian(scalar(run), argnum)(*inputs), hessian(scalar(plain), argnum)(*inputs))


@each_backend
@each_case
def test_grad_and_vjp(name, backend):
    run, plain, inputs = both(name, backend)
    every = tuple(range(len(inputs)))
    close(grad(scalar(run), every)(*inputs), grad(scalar(plain), every)(*inputs))
    y, pull = vjp(run, *inputs)
    close(pull(draw(*y.shape, seed=2)), vjp(plain, *inputs)[1](draw(*y.shape, seed=2)))


@each_case
def test_vmap_over_every_argument(name):
    run, plain, inputs = both(name)
    many = [torch.stack([t, t * 0.5 + 1, t - 0.25], -1) for t in inputs]
    for chosen in [*range(len(inputs)), None]:
        dims = tuple(-1 if chosen in (i, None) else None for i in range(len(inputs)))
        given = [
            many[i] if d == -1 else t for i, (d, t) in enumerate(zip(dims, inputs, strict=True))
        ]
        want = torch.stack(
            [
                plain(*(t[..., n] if d == -1 else t for d, t in zip(dims, given, strict=True)))
                for n in range(3)
            ],
            -1,
        )
        if name == "reflection_loss" and chosen != 0:
            continue  # a target is a distribution
        close(vmap(run, dims, -1)(*given), want)


@each_case
def test_gradients_of_each_sample(name):
    run, plain, inputs = both(name)
    many = torch.stack([inputs[0], inputs[0] * 2, inputs[0] - 1])
    dims = (0, *[None] * (len(inputs) - 1))
    every = tuple(range(len(inputs)))
    got = vmap(grad(scalar(run), every), dims)(many, *inputs[1:])
    want = [grad(scalar(plain), every)(t, *inputs[1:]) for t in many]
    close(got, tuple(torch.stack(g) for g in zip(*want, strict=True)))
    tangent = torch.ones_like(many)
    pushed = vmap(lambda t, d: jvp(lambda s: run(s, *inputs[1:]), (t,), (d,))[1])(many, tangent)
    close(pushed, jvp(lambda s: vmap(run, dims)(s, *inputs[1:]), (many,), (tangent,))[1])


@each_backend
@each_case
def test_double_backward(name, backend):
    run, plain, inputs = both(name, backend)
    results = []
    for function in (run, plain):
        leaves = [t.clone().requires_grad_() for t in inputs]
        # An input that depends on another one counts once.
        given = [leaves[0] * 1.5, *leaves[1:]]
        first = torch.autograd.grad(scalar(function)(*given), leaves, create_graph=True)
        penalty = sum((g * g).sum() for g in first)
        second = torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)
        results.append((first, second))
    close(*results)


@each_case
def test_gradgradcheck(name):
    run, _, inputs = both(name)
    if "frozen" in name:
        pytest.skip("gradients that are stopped on purpose are not those of differences")
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(
        run, leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True
    )


@each_case
def test_batched_and_forward_over_reverse(name):
    run, plain, inputs = both(name)
    results = []
    for function in (run, plain):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = function(*leaves)
        dys = torch.stack([torch.ones_like(y), draw(*y.shape, seed=2)])
        batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
        if "route" in name:  # torch: silu's backward has no forward-mode derivative
            results.append(batched)
            continue
        with fwAD.dual_level():
            dy = fwAD.make_dual(dys[0], dys[1])
            pulled = torch.autograd.grad(y, leaves, dy)
            tangents = [fwAD.unpack_dual(g).tangent for g in pulled]
        results.append((batched, tangents))
    close(*results)


def test_indices_under_vmap():
    query, keys = draw(2, 3, 4), draw(2, 5, 4, seed=1)
    keys[:, 3] = keys[:, 1]  # equals: the lower index
    radius = torch.tensor([0.1, 9.0, 9.0, 9.0, 0.1])
    got = vmap(lambda q, k: nearest_key(q, k, radius))(query, keys)
    want = [
        nearest_key(q, k, radius, backend="reference") for q, k in zip(query, keys, strict=True)
    ]
    assert torch.equal(got[0], torch.stack([index for index, _ in want]))
    for metric in ("dot", "cosine", "l2"):
        _, got = vmap(lambda q, k, m=metric: topk_keys(q, k, 5, metric=m))(query, keys)
        for q, k, index in zip(query, keys, got, strict=True):
            score = plain_scores(q, k, metric)
            order = sorted(range(5), key=lambda n: n)
            want = [sorted(order, key=lambda n, row=row: -float(row[n])) for row in score]
            assert index.tolist() == want
    none = vmap(lambda q: nearest_key(q, keys[0, :0], radius[:0]))(query)
    assert none[0].eq(-1).all()
    assert none[1].isinf().all()


def plain_scores(q, k, metric):
    rows = []
    for a in q:
        if metric == "l2":
            rows.append([-(a - b).square().sum() for b in k])
        else:
            norm = [a.norm() * b.norm() if metric == "cosine" else 1.0 for b in k]
            rows.append([(a * b).sum() / n for b, n in zip(k, norm, strict=True)])
    return rows


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_of_zero_leaves_its_adapter_out(bad):
    a, b, mixture = A.clone(), B.clone(), M.clone()
    a[0, 1], b[1, 2], mixture[0, 0] = bad, bad, 0.0
    x, mixture = X[:1], mixture[:1]
    run = scalar(lambda *t: mixed_lora(*t, **MIXED))
    got = grad(run, (0, 1, 2, 3))(x, a, b, mixture)
    want = grad(scalar(plain_mixed), (0, 1, 2, 3))(x, A, B, mixture)
    want[3][0, 0] = 0.0
    close(got, want)
    prompts, broken = draw(3, 2, 4), draw(3, 2, 4)
    broken[0, 1, 1] = bad
    got = grad(scalar(lambda p, m: mix_prompts(p, m, x)), (0, 1))(broken, mixture)
    want = grad(scalar(lambda p, m: mix_prompts(p, m, x)), (0, 1))(prompts, mixture)
    want[1][0, 0] = 0.0
    close(got, want)
    x, bank_a, bank_b, weights = (t.clone() for t in CASES["mix_experts"].inputs)
    weights[0, 0], bank_a[0, 1, 1] = 0.0, bad
    run = scalar(lambda *t: mix_experts(*t[:3], CHOSEN, t[3], scaling=0.7))
    got = grad(run, (0, 1, 2, 3))(x, bank_a, bank_b, weights)
    bank_a[0] = 0.0
    want = grad(scalar(plain_experts), (0, 1, 2, 3))(x, bank_a, bank_b, weights)
    want[3][0, 0] = 0.0
    close(got, want)


def test_own_lora_refuses_to_be_differentiated():
    x, weight, a, b = draw(2, 4), draw(3, 4), draw(2, 4, seed=3), draw(3, 2)

    def run(x, weight, a, b):
        return own_lora(x, weight, None, [Adapter(a, b, 0.5)], [0, -1])

    inputs = (x, weight, a, b)
    for n in range(4):
        with pytest.raises(ValueError, match=r"own_lora: .*no derivative"):
            jvp(lambda t, n=n: run(*inputs[:n], t, *inputs[n + 1 :]), (inputs[n],), (inputs[n],))
        with pytest.raises(ValueError, match="own_lora"):
            grad(scalar(run), n)(*inputs)
        with fwAD.dual_level(), pytest.raises(ValueError, match=r"own_lora: .*no derivative"):
            run(*inputs[:n], fwAD.make_dual(inputs[n], inputs[n]), *inputs[n + 1 :])
    with fwAD.dual_level():
        y = run(*inputs)
    want = x @ weight.t()
    want[0] += 0.5 * x[0] @ a.t() @ b.t()
    close(y, want)


def test_own_lora_under_vmap():
    x, weight, a, b = draw(3, 2, 4), draw(3, 4), draw(3, 2, 4, seed=3), draw(3, 2)

    def run(x, a):
        return own_lora(x, weight, None, [Adapter(a, b, 0.5)], [0, -1])

    close(vmap(run)(x, a), torch.stack([run(*pair) for pair in zip(x, a, strict=True)]))
    close(vmap(run, (None, 0))(x[0], a), torch.stack([run(x[0], t) for t in a]))

    def add(y, x):
        return add_own_lora_(y.clone(), x, [Adapter(a[0], b, 0.5)], [0, -1])

    y = draw(3, 2, 3, seed=9)
    close(vmap(add)(y, x), torch.stack([add(*pair) for pair in zip(y, x, strict=True)]))


@each_case
def test_a_backend_that_cannot_run_is_still_refused(name):
    run, _, inputs = both(name, "none such")
    if name in ("pool_embeds", "reflection_loss"):
        pytest.skip("takes no backend")
    with pytest.raises(ValueError, match="backend"):
        jvp(run, inputs, inputs)


def test_bad_input_is_refused_under_transforms():
    x, a, b, w = CASES["mix_experts"].inputs
    many = torch.stack([CHOSEN, CHOSEN.where(CHOSEN != 3, 4)])
    with pytest.raises(ValueError, match="index: got values from -1 to 4"):
        vmap(lambda i: mix_experts(x, a, b, i, w))(many)
    with pytest.raises(ValueError, match="sparse_grad"):
        grad(lambda t: mix_experts(x, t, b, CHOSEN, w, sparse_grad=True).sum())(a)
    leaf = a.clone().requires_grad_()
    y = mix_experts(x, leaf, b, CHOSEN, w, sparse_grad=True)
    with pytest.raises(RuntimeError, match="sparse_grad"):
        torch.autograd.grad(y.sum(), leaf, create_graph=True)


def test_nothing_of_a_transform_is_kept():
    """Tables that are cached across calls are not those of a transform that has ended."""
    x = X + 0
    ranks = {"ranks": [1, 2, 0], "scaling": 0.125}
    grad(lambda t: mixed_lora(t, A, B, M, **ranks).sum())(x)
    vmap(lambda t: mixed_lora(t, A, B, M, **ranks))(torch.stack([x, x]))
    want = plain_mixed(x, A, B, M, (1, 2, 0), (0.125,) * 3)
    close(mixed_lora(x, A, B, M, **ranks), want)
    with torch.no_grad():
        close(mixed_lora(x, A, B, M, **ranks), want)


@pytest.mark.parametrize("name", ["mixed_lora_linear", "route_top_k", "mix_experts"])
def test_compiled_transforms(name):
    run, plain, inputs = both(name)

    def per_sample(first, *others):
        dims = (0, *[None] * len(others))
        return vmap(grad(scalar(run)), dims)(torch.stack([first, 2 * first]), *others)

    torch._dynamo.reset()
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    want = [grad(scalar(plain))(t, *inputs[1:]) for t in (inputs[0], 2 * inputs[0])]
    close(compiled(*inputs), torch.stack(want))


def test_a_graph_compiled_before_never_loses_a_tangent():
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: mixed_lora(t, A, B, M, **MIXED), backend="aot_eager")
    close(compiled(X), plain_mixed(X, A, B, M))
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        compiled(fwAD.make_dual(X, X))
    got = jvp(compiled, (X,), (X,))
    close(got, (plain_mixed(X, A, B, M), plain_mixed(X, A, B, M)))


def test_functional_call_of_a_pool():
    from sapt_fast.pools.lora import AdapterPool

    pool = AdapterPool(4, 5, dtype=D64)
    pool.add(2, 0.5, (draw(2, 4), draw(2, 5)))
    pool.add(1, 3.0, (draw(1, 4), draw(1, 5)))
    values = {name: p.detach() for name, p in pool.named_parameters()}
    mixture = M[:, :2]

    def run(values):
        return functional_call(pool, values, (X, None, None, mixture)).sin().sum()

    def plain(values):
        a = torch.cat([values["a.frozen"], values["a.trainable"]])
        b = torch.cat([values["b.frozen"], values["b.trainable"]])
        return plain_mixed(X, a, b, mixture, (2, 1), (0.5, 3.0)).sin().sum()

    close(grad(run)(values), grad(plain)(values))
    ones = {name: torch.ones_like(t) for name, t in values.items()}
    close(jvp(run, (values,), (ones,)), jvp(plain, (values,), (ones,)))
