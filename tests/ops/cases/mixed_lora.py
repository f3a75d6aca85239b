"""Op `mixed_lora`."""

import importlib
from collections.abc import Iterator

import torch
from ops.cases import D64, SAME_OR_FLOAT32, Bad, Case, Pair, Sample, device, draw, floats

from sapt_fast import dispatch
from sapt_fast.ops import mixed_lora, mixed_lora_linear
from sapt_fast.ops._dropout import UNIT, mask
from sapt_fast.ops.rank_table import rank_table

op = importlib.import_module("sapt_fast.ops._mixed_lora_ops")

X, A, B, M = draw(2, 3, 4), draw(3, 4), draw(3, 5), draw(2, 3).abs()
MIXED = {"ranks": [2, 0, 1], "scaling": torch.tensor([0.5, 2.0, 3.0], dtype=D64)}
SEED = torch.tensor([5])


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


def dropped(x, rate=0.25):
    """x after dropout, as torch would scale it."""
    keeps = mask(SEED.to(x.device), int(rate * UNIT), x.shape[:-1].numel(), x.shape[-1])
    return x * keeps.view(x.shape) / (1 - rate)


def frozen_mixed(x, a, b, mixture):
    """Adapter 2 alone trains, and x hears of it alone."""
    a_old, b_old = a.detach(), b.detach()
    old = plain_mixed(x.detach(), a_old, b_old, mixture * x.new_tensor([1.0, 1.0, 0.0]))
    new = plain_mixed(x, a, b, mixture * x.new_tensor([0.0, 0.0, 1.0]))
    return old + new


FORMULAS = {
    "mixed_lora": Case(lambda *t, **k: mixed_lora(*t, **MIXED, **k), plain_mixed, (X, A, B, M)),
    "mixed_lora_per_token": Case(
        lambda *t, **k: mixed_lora(*t, **MIXED, **k),
        plain_mixed,
        (X, A, B, draw(2, 3, 3)),
    ),
    "mixed_lora_with_a_weight_of_zero": Case(
        lambda *t, **k: mixed_lora(*t, **MIXED, **k),
        plain_mixed,
        (X, A, B, torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.0]], dtype=D64)),
    ),
    "mixed_lora_of_frozen_adapters": Case(
        lambda *t, **k: mixed_lora(*t, **MIXED, trainable=[2], grad_through_frozen=False, **k),
        frozen_mixed,
        (X, A, B, M),
    ),
    "mixed_lora_with_dropout": Case(
        lambda x, a, b, m, w, **k: mixed_lora_linear(
            x, w, None, a, b, m, **MIXED, dropout_p=0.25, seed=SEED, **k
        ),
        lambda x, a, b, m, w: x @ w.t() + plain_mixed(dropped(x), a, b, m),
        (X, A, B, M, draw(5, 4)),
    ),
    "mixed_lora_linear": Case(
        lambda x, a, b, m, w, c, **k: mixed_lora_linear(x, w, c, a, b, m, **MIXED, **k),
        lambda x, a, b, m, w, c: plain_mixed(x, a, b, m, weight=w, bias=c),
        (X, A, B, M, draw(5, 4), draw(5)),
    ),
}


def _linear(x, weight, bias, lora_a, lora_b, mixture, backend):
    return mixed_lora_linear(
        x, weight, bias, lora_a, lora_b, mixture, ranks=(4, 0, 3), scaling=0.5, backend=backend
    )


def _dropped(x, weight, bias, lora_a, lora_b, mixture, backend):
    return mixed_lora_linear(
        x, weight, bias, lora_a, lora_b, mixture, ranks=(4, 0, 3), scaling=0.5, backend=backend,
        trainable=[0], grad_through_frozen=False, dropout_p=0.4, seed=SEED.to(x.device),
    )  # fmt: skip


def _alone(x, lora_a, lora_b, mixture, backend):
    return mixed_lora(x, lora_a, lora_b, mixture, ranks=4, backend=backend)


def _inputs(lead, width=16, out=8, ranks=8, adapters=2, samples=None):
    given = floats(
        x=(*lead, width),
        weight=(out, width),
        bias=(out,),
        lora_a=(ranks, width),
        lora_b=(ranks, out),
        mixture=(samples or lead[0], adapters),
    )
    return {n: t / width**0.5 if n in ("weight", "lora_a") else t for n, t in given.items()}


def _without_base(inputs):
    return {n: t for n, t in inputs.items() if n not in ("weight", "bias")}


ODD = _inputs((3, 7), 33, 17, 7, 3)
SAMPLES = {
    "linear": Sample(_linear, ODD, wide=("mixture",)),
    "per token": Sample(_linear, {**ODD, "mixture": draw(3, 7, 3).float()}, wide=("mixture",)),
    "dropout": Sample(_dropped, ODD, wide=("mixture",)),
    "alone": Sample(_alone, _without_base(_inputs((2, 20), 32, 24, 12, 3)), wide=("mixture",)),
}


def _empty(*lead):
    return Sample(
        lambda backend, **given: mixed_lora_linear(**given, ranks=4, backend=backend),
        _inputs(lead),
    )


EMPTY = {"no samples": _empty(0, 4), "no tokens": _empty(2, 0), "no rows": _empty(0)}


def _pair(x, other, backend):
    return mixed_lora_linear(
        *(draw(2, 3, 8).to(x), draw(6, 8).to(x), None, draw(4, 8).to(other)),
        *(draw(4, 6).to(other), draw(2, 2).abs().to(other)),
        ranks=2,
        backend=backend,
    )


PAIRS = Pair(_pair, SAME_OR_FLOAT32, "lora_a", keeps_dtype=True)


def _bad(
    error, message, ranks=4, scaling=1.0, trainable=None, backend=None, dropout=(0.0, None),
    **changes,
):  # fmt: skip
    given = {**_inputs((2, 5)), **changes}
    options = {"scaling": scaling, "trainable": trainable, "backend": backend}
    options |= dict(zip(("dropout_p", "seed"), dropout, strict=True))
    return Bad(lambda: mixed_lora_linear(**given, ranks=ranks, **options), error, message)


BAD = {
    "x": _bad(ValueError, "x: got shape", x=torch.zeros(2, 2, 2, 16)),
    "x dtype": _bad(TypeError, "x: got dtype", x=torch.zeros(2, 5, 16, dtype=torch.int64)),
    "weight": _bad(ValueError, r"weight: .*expected \[O, 16\]", weight=torch.zeros(8, 15)),
    "weight dtype": _bad(TypeError, "weight: got dtype", weight=torch.zeros(8, 16).half()),
    "bias": _bad(ValueError, r"bias: .*expected \[8\]", bias=torch.zeros(7)),
    "lora_a": _bad(ValueError, "lora_a: got shape", lora_a=torch.zeros(8, 15)),
    "lora_b": _bad(ValueError, "lora_b: got shape", lora_b=torch.zeros(7, 8)),
    "lora_b dtype": _bad(TypeError, "lora_b: got dtype", lora_b=torch.zeros(8, 8).double()),
    "mixture": _bad(ValueError, "mixture: got shape", mixture=torch.ones(3, 2)),
    "mixture dtype": _bad(TypeError, "mixture: got dtype", mixture=torch.ones(2, 2).long()),
    "device": _bad(ValueError, "mixture: got device", mixture=torch.ones(2, 2, device="meta")),
    "rank sum": _bad(ValueError, r"ranks: .*sum 8", ranks=(4, 5)),
    "rank count": _bad(ValueError, r"ranks: got 3 ranks, expected 2", ranks=(4, 2, 2)),
    "trainable": _bad(ValueError, "trainable: got", trainable=[2]),
    "scaling": _bad(ValueError, "scaling: got tensor", scaling=torch.ones(3)),
    "scaling list": _bad(TypeError, "scaling: got", scaling=[1.0, 2.0]),
    "no adapter": _bad(ValueError, "mixture: got shape", mixture=torch.ones(2, 0)),
    "ranks of floats": _bad(TypeError, "ranks: got", ranks=(4.0, 4.0)),
    "a mask for indices": _bad(TypeError, "trainable: got", trainable=[False, True]),
    "a scalar x": _bad(ValueError, "x: got shape", x=torch.tensor(1.0)),
    "dropout": _bad(ValueError, "dropout_p: got 1.5", dropout=(1.5, None)),
    "no rate": _bad(ValueError, "dropout_p: got nan", dropout=(float("nan"), SEED)),
    "two seeds": _bad(ValueError, "seed: got .*2", dropout=(0.5, torch.zeros(2).long())),
    "a float as seed": _bad(ValueError, "seed: got dtype", dropout=(0.5, torch.zeros(1))),
    "a number as seed": _bad(TypeError, "seed: got int", dropout=(0.5, 3)),
    "backend": _bad(ValueError, "rocket", backend="rocket"),
    "no such kernel": _bad(dispatch.BackendError, "cuda", backend="cuda"),
}


def registered(backend: str) -> Iterator[tuple[object, tuple]]:
    given = _inputs((6,), 12, 8, 5, 3)
    x, weight, bias, a, b, mixture = (t.to(device(backend)) for t in given.values())
    table = rank_table((2, 0, 3), [1.0, 2.0, 3.0], x.device)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, mixture)]
    for trained in ([0, 5], [2, 5]):
        rows = slice(*trained)
        stacks = [a, a.clone()], [b, b.clone()]
        trains = ([t[rows].detach().requires_grad_() for t in stack] for stack in stacks)
        yield op._forward_op, (
            leaves[0], leaves[3], [leaves[1]] * 2, [leaves[2]] * 2, *stacks,
            *([t, t] for t in table), *trains, [0, *trained, 1, *trained], True, [], 0, backend,
        )  # fmt: skip
    stacks = [a, a * 2], [b, b * 2], *([t, t] for t in table)
    seeds = [torch.tensor([seed], device=x.device) for seed in (3, 4)]
    for through, drops in ((True, ([], 0)), (False, (seeds, 1 << 15))):
        _, _, *hs = op._forward_op(
            *(x, mixture, [weight] * 2, [bias] * 2, *stacks),
            *([], [], [0, 2, 5], through, *drops, backend),
        )
        dys = [torch.randn(6, 8, device=x.device) for _ in hs]
        yield op._backward_op, (
            *(dys, x, mixture, [weight] * 2, *stacks, hs, [0, 2, 5], True, True, through),
            *(*drops, backend),
        )  # fmt: skip
