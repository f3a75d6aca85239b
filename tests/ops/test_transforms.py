"""Every op under torch.func, forward-mode AD and second derivatives, against plain torch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from sapt_fast import dispatch
from sapt_fast.ops import (
    QueryProjection,
    mix_experts,
    mix_prompts,
    mix_prompts_with_tokens,
    mixed_lora,
    mixed_lora_linear,
    nearest_key,
    pool_tokens,
    reflection_loss,
    route,
    topk_keys,
)
from sapt_fast.ops.own_lora import Adapter, add_own_lora_, own_lora
from sapt_fast.ops.route import pool_embeds, route_scores

D64 = torch.float64
IDS = torch.tensor([[1, 4, 4], [0, 2, 5]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
CHOSEN = torch.tensor([[0, 3], [2, -1], [1, 1]])


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=D64)


class Case(NamedTuple):
    """One way to call an op: `run(*inputs, backend=...)` and the same in plain torch."""

    op: str
    run: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def plain_mixed(x, a, b, mixture, ranks=(2, 0, 1), scaling=(0.5, 2.0, 3.0), weight=None, bias=None):
    y = x.new_zeros(*x.shape[:-1], b.shape[1]) if weight is None else x @ weight.t()
    y = y if bias is None else y + bias
    start = 0
    for k, rank in enumerate(ranks):
        share = mixture[..., k]
        share = share[..., None, None] if x.dim() == mixture.dim() + 1 else share[..., None]
        y = y + share * scaling[k] * (x @ a[start : start + rank].t() @ b[start : start + rank])
        start += rank
    return y


SCALING = torch.tensor([0.5, 2.0, 3.0], dtype=D64)
MIXED = {"ranks": [2, 0, 1], "scaling": SCALING}


def frozen_mixed(x, a, b, mixture):
    """Adapter 2 alone trains, and x hears of it alone."""
    a_old, b_old = a.detach(), b.detach()
    old = plain_mixed(x.detach(), a_old, b_old, mixture * x.new_tensor([1.0, 1.0, 0.0]))
    new = plain_mixed(x, a, b, mixture * x.new_tensor([0.0, 0.0, 1.0]))
    return old + new


def plain_projection(e, keys, down, up, weight, bias):
    z = e @ down.t() @ up.t()
    active = z * torch.sigmoid(z)
    centred = active - active.mean(-1, keepdim=True)
    q = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    return q @ keys.t() / keys.shape[1] ** 0.5


def plain_pool(table, mask, pooling):
    rows = []
    for ids, kept in zip(IDS, mask, strict=True):
        e = table[ids[kept != 0]]
        rows.append(e.amax(0) if pooling == "max" else e.mean(0))
    return torch.stack(rows)


def plain_experts(x, a, b, weights):
    rows = []
    for m in range(3):
        y = x.new_zeros(b.shape[2])
        for j in range(2):
            n = int(CHOSEN[m, j])
            if n >= 0:
                y = y + 0.7 * weights[m, j] * (x[m] @ a[n].t() @ b[n])
        rows.append(y)
    return torch.stack(rows)


def plain_kl(scores, target):
    logs = torch.log_softmax(scores, -1)
    return ((target * target.log()).sum() - (target * logs[:, :2]).sum()) / scores.shape[0]


def plain_topk(metric):
    def run(query, keys):
        s = query @ keys.t()
        if metric == "l2":
            s = 2 * s - query.square().sum(1)[:, None] - keys.square().sum(1)
        if metric == "cosine":
            s = s / query.norm(dim=1)[:, None] / keys.norm(dim=1)[None]
        return s.sort(dim=1, descending=True).values[:, :2]

    return run


POOL = (draw(2, 4), draw(3, 4), draw(2, 4, seed=3), draw(4, 2), draw(4), draw(4, seed=5))
X, A, B, M = draw(2, 3, 4), draw(3, 4), draw(3, 5), draw(2, 3).abs()
TARGET = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=D64)


def _projected(e, keys, *parts, backend=None, **kwargs):
    return route(e, keys, QueryProjection(*parts), backend=backend, **kwargs)


CASES = {
    "mixed_lora": Case(
        "mixed_lora", lambda *t, **k: mixed_lora(*t, **MIXED, **k), plain_mixed, (X, A, B, M)
    ),
    "mixed_lora_per_token": Case(
        "mixed_lora",
        lambda *t, **k: mixed_lora(*t, **MIXED, **k),
        plain_mixed,
        (X, A, B, draw(2, 3, 3)),
    ),
    "mixed_lora_with_a_weight_of_zero": Case(
        "mixed_lora",
        lambda *t, **k: mixed_lora(*t, **MIXED, **k),
        plain_mixed,
        (X, A, B, torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.0]], dtype=D64)),
    ),
    "mixed_lora_of_frozen_adapters": Case(
        "mixed_lora",
        lambda *t, **k: mixed_lora(*t, **MIXED, trainable=[2], grad_through_frozen=False, **k),
        frozen_mixed,
        (X, A, B, M),
    ),
    "mixed_lora_linear": Case(
        "mixed_lora",
        lambda x, a, b, m, w, c, **k: mixed_lora_linear(x, w, c, a, b, m, **MIXED, **k),
        lambda x, a, b, m, w, c: plain_mixed(x, a, b, m, weight=w, bias=c),
        (X, A, B, M, draw(5, 4), draw(5)),
    ),
    "mix_prompts": Case(
        "mix_prompts",
        mix_prompts,
        lambda p, m, e: torch.cat([torch.einsum("bk,kpd->bpd", m, p), e], 1),
        (draw(3, 2, 4), M, X),
    ),
    "mix_prompts_with_tokens": Case(
        "mix_prompts",
        lambda p, m, t, **k: mix_prompts_with_tokens(p, m, IDS, t, **k),
        lambda p, m, t: torch.cat([torch.einsum("bk,kpd->bpd", m, p), t[IDS]], 1),
        (draw(3, 2, 4), M, draw(6, 4)),
    ),
    **{
        f"pool_tokens_{pooling}": Case(
            "pool_tokens",
            lambda t, pooling=pooling, **k: pool_tokens(IDS, t, mask=MASK, pooling=pooling, **k),
            lambda t, pooling=pooling: plain_pool(t, MASK, pooling),
            (draw(6, 4),),
        )
        for pooling in ("max", "mean")
    },
    "pool_tokens_unmasked": Case(
        "pool_tokens",
        lambda t, **k: pool_tokens(IDS, t, **k),
        lambda t: plain_pool(t, torch.ones(2, 3), "max"),
        (draw(6, 4),),
    ),
    "pool_embeds": Case(
        "pool_tokens",
        lambda e, backend=None: pool_embeds(e, mask=MASK),
        lambda e: torch.stack([e[0, :2].amax(0), e[1].amax(0)]),
        (X,),
    ),
    "route": Case("route", _projected, lambda *t: torch.softmax(plain_projection(*t), -1), POOL),
    "route_top_k": Case(
        "route",
        lambda *t, **k: _projected(*t, top_k=2, **k),
        lambda *t: (
            (w := torch.softmax(plain_projection(*t), -1))
            * (kept := (w > w.amin(-1, keepdim=True)).to(w))
            / (w * kept).sum(-1, keepdim=True)
        ),
        POOL,
    ),
    "route_scores": Case(
        "route",
        lambda *t, **k: route_scores(*t[:2], QueryProjection(*t[2:]), **k),
        plain_projection,
        POOL,
    ),
    "reflection_loss": Case(
        "route",
        lambda s, t, backend=None: reflection_loss(s, t),
        plain_kl,
        (draw(2, 3), TARGET),
    ),
    "nearest_key": Case(
        "nearest_key",
        lambda q, k, **b: nearest_key(q, k, torch.ones(5), **b)[1],
        lambda q, k: (q[:, None] - k[None]).square().sum(-1).sqrt().amin(1),
        (draw(3, 4), draw(5, 4)),
    ),
    **{
        f"topk_keys_{metric}": Case(
            "topk_keys",
            lambda q, k, metric=metric, **b: topk_keys(q, k, 2, metric=metric, **b)[0],
            plain_topk(metric),
            (draw(3, 4), draw(5, 4)),
        )
        for metric in ("dot", "cosine", "l2")
    },
    "mix_experts": Case(
        "mix_experts",
        lambda x, a, b, w, **k: mix_experts(x, a, b, CHOSEN, w, scaling=0.7, **k),
        plain_experts,
        (draw(3, 4), draw(4, 2, 4), draw(4, 2, 3), draw(3, 2)),
    ),
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
    assert {case.op for case in CASES.values()} | NOT_DIFFERENTIABLE == set(dispatch.ops())


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
