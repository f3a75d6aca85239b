"""How a random call of each op is drawn: sizes, dtypes, layouts, values, and what would be bad."""

from collections.abc import Callable
from typing import Any

import fuzz_formulas as formulas
import fuzz_routing as routing
import numpy as np
import torch
from fuzz_bad import (
    BAD_BACKEND,
    MaybeBackend,
    all_finite,
    bad_float,
    bad_tensor,
    deepened,
    drawn_dtypes,
    lengthened,
    widened,
)
from fuzz_calls import Call, Draw
from fuzz_formulas import Array, Values
from torch import Tensor

from sapt_fast import ops
from sapt_fast.ops import own_lora as own_ops


def _mixed(draw: Draw, backend: MaybeBackend, wide: bool, with_base: bool) -> Call:
    dtype, adapters = drawn_dtypes(draw, backend, wide)
    per_token, flat = draw.chance(0.3), draw.chance(0.4)
    B, T, wide_in, wide_out = (
        draw.pick(0, 1, 1, 2, 3),
        draw.pick(1, 2, 3, 7, 0),
        draw.pick(1, 3, 8, 17, 0),
        draw.pick(1, 2, 5, 16),
    )
    T = 70 if draw.chance(0.05) else T  # past the kernels for few rows
    K = draw.pick(1, 1, 2, 3, 5)
    ranks, given = _drawn_ranks(draw, K)
    R = sum(ranks)
    lead = (B,) if flat else (B, T)
    share = lead if per_token else (B,)
    sizes_of = {
        "x": (*lead, wide_in),
        "lora_a": (R, wide_in),
        "lora_b": (R, wide_out),
        "weight": (wide_out, wide_in),
    }
    leaves = _mixed_leaves(draw, sizes_of, (*share, K), dtype, adapters, with_base)
    if draw.chance(0.1) and not wide:
        draw.poison(leaves, ("x", "lora_a", "lora_b", "mixture"))
    scaling, scales = _drawn_scaling(draw, K)
    trains = sorted({int(k) for k in draw.rng.integers(K, size=draw.pick(1, 2))})
    trainable = draw.pick(None, None, trains, [])
    through = draw.chance(0.7)
    trained = set(range(K)) if trainable is None else set(trainable)
    passes = [through or k in trained for k in range(K)]
    spans = enumerate(formulas._spans(ranks))
    frozen = [r for k, rows_of in spans if k not in trained for r in range(*rows_of.indices(R))]
    fixed = {
        "ranks": given,
        "scaling": scaling,
        "trainable": trainable,
        "grad_through_frozen": through,
        "backend": backend,
    }
    rows, samples = int(np.prod(lead)), int(np.prod(share))

    def split(v: Values) -> Values:
        w = np.repeat(v["mixture"].reshape(-1, K), rows // max(samples, 1), 0)
        if dtype != torch.float64:  # weights narrower than the sums
            w = w.astype(np.float32).astype(np.float64)
        return {**v, "x": v["x"].reshape(rows, wide_in), "w": w}

    def values(v: Values) -> list[Any]:
        v = split(v)
        shape = (*lead, wide_out)
        sizes = formulas.mixed(formulas.sized(v), ranks, scales)
        return [(formulas.mixed(v, ranks, scales).reshape(shape), sizes.reshape(shape))]

    def gradients(v: Values, cs: list[Array]) -> dict[str, Any]:
        c = cs[0].reshape(rows, wide_out)
        v = split(v)
        pairs = []
        for given, cotangent in ((v, c), (formulas.sized(v), np.abs(c))):
            found = formulas.mixed_gradients(given, cotangent, ranks, scales, samples, passes)
            for name in ("lora_a", "lora_b"):
                found[name][frozen] = 0.0
            found["x"] = found["x"].reshape(*lead, wide_in)
            found["mixture"] = found.pop("w").reshape(*share, K)
            pairs.append(found)
        return {n: (pairs[0][n], pairs[1][n]) for n in pairs[0]}

    function = ops.mixed_lora_linear if with_base else ops.mixed_lora
    extra = {"bias": None} if with_base and "bias" not in leaves else {}
    return Call(
        function.__name__,
        function,
        leaves,
        lambda t: {**t, **extra, **fixed},
        values,
        wide_in + R + wide_out + rows,
        gradients=gradients,
        spoiled=_bad_mixed(leaves, ranks, given is not ranks),
        twice=all(passes) and len(trained) == K,
        poisoned=not all_finite(leaves),
    )


def _drawn_ranks(draw: Draw, count: int) -> tuple[list[int], Any]:
    """The rank of each adapter, and what says so."""
    ranks = [draw.pick(0, 1, 2, 3, 4) for _ in range(count)]
    given: Any = ranks
    if draw.chance(0.3):
        ranks = [draw.pick(1, 2, 4)] * count
        given = ranks[0]
    return ranks, given


def _drawn_scaling(draw: Draw, count: int) -> tuple[Any, list[float]]:
    """What is given, and the scaling of each adapter."""
    scaling: Any = draw.pick(1.0, 0.5, 2)
    scales = [float(scaling)] * count
    if draw.chance(0.4):
        scales = [draw.pick(0.5, 2.0, 1.5, 0.0) for _ in range(count)]
        scaling = torch.tensor(scales)
    return scaling, scales


def _mixed_leaves(
    draw: Draw,
    sizes: dict[str, tuple[int, ...]],
    mixture: tuple[int, ...],
    dtype: torch.dtype,
    adapters: torch.dtype,
    with_base: bool,
) -> dict[str, torch.Tensor]:
    """The tensors of a mixed layer, drawn in a fixed order."""
    leaves = {
        "x": draw.tensor(draw.normal(*sizes["x"]), dtype),
        "lora_a": draw.tensor(draw.normal(*sizes["lora_a"]), adapters),
        "lora_b": draw.tensor(draw.normal(*sizes["lora_b"]), adapters),
        "mixture": draw.tensor(draw.weights(*mixture), draw.pick(torch.float32, dtype)),
    }
    if with_base:
        leaves["weight"] = draw.tensor(draw.normal(*sizes["weight"]), dtype)
        if draw.chance(0.5):
            leaves["bias"] = draw.tensor(draw.normal(sizes["weight"][0]), dtype)
    return leaves


def _bad_mixed(leaves: dict[str, torch.Tensor], ranks: list[int], one_rank: bool) -> list[Any]:
    """Arguments of a mixed layer that must be refused."""
    spoiled = [
        *bad_float("x", widened),
        *bad_float("lora_a", widened, lengthened),
        *bad_float("lora_b", lengthened),
        *bad_float("mixture", deepened if one_rank else widened, lengthened),
        ("ranks", "abc"),
        ("ranks", 2.5),
        ("ranks", [*ranks, 1]),
        ("ranks", [r + 1 for r in ranks]),
        ("ranks", None),
        ("scaling", "abc"),
        ("scaling", torch.ones(len(ranks) + 1)),
        ("scaling", None),
        ("trainable", [len(ranks)]),
        ("trainable", [-1]),
        ("trainable", 2.5),
        ("trainable", ["a"]),
        *BAD_BACKEND,
    ]
    if "weight" in leaves:
        spoiled += [*bad_float("weight", widened, lengthened), *bad_float("bias", widened)][
            : None if "bias" in leaves else 9
        ]
    return spoiled


def _mix_prompts(draw: Draw, backend: MaybeBackend, wide: bool, tokens: bool) -> Call:
    dtype, other = drawn_dtypes(draw, backend, wide)
    B, T, K, P, D = (
        draw.pick(0, 1, 2, 3),
        draw.pick(0, 1, 2, 5),
        draw.pick(1, 2, 3),
        draw.pick(0, 1, 2, 3),
        draw.pick(1, 2, 7, 8),
    )
    V = draw.pick(1, 4, 9)
    ids = torch.from_numpy(draw.rng.integers(V, size=(B, T))).to(
        draw.pick(torch.int64, torch.int32)
    )
    source = "table" if tokens else "embeds"
    leaves = {
        "prompts": draw.tensor(draw.normal(K, P, D), other),
        "mixture": draw.tensor(draw.weights(B, K), draw.pick(dtype, torch.float32)),
        source: draw.tensor(draw.normal(*((V,) if tokens else (B, T)), D), dtype),
    }
    if draw.chance(0.1) and not wide:
        draw.poison(leaves, ("prompts", "mixture", source))

    def full(v: Values) -> Values:
        v = {**v, "embeds": v["table"][ids.numpy()] if tokens else v["embeds"]}
        if dtype != torch.float64:
            v["mixture"] = v["mixture"].astype(np.float32).astype(np.float64)
        return v

    def values(v: Values) -> list[Any]:
        v = full(v)
        return [(formulas.prompts(v), formulas.prompts(formulas.sized(v)))]

    def gradients(v: Values, cs: list[Array]) -> dict[str, Any]:
        v = full(v)
        pairs = []
        for given, c in ((v, cs[0]), (formulas.sized(v), np.abs(cs[0]))):
            found = formulas.prompts_gradients(given, c)
            if tokens:
                found["table"] = formulas.gathered_gradients(found.pop("embeds"), ids.numpy(), V)
            pairs.append(found)
        return {n: (pairs[0][n], pairs[1][n]) for n in pairs[0]}

    spoiled = [
        *bad_float("prompts", widened, lengthened),
        *bad_float("mixture", widened, lengthened),
        *bad_float(source),
        *BAD_BACKEND,
    ]
    if tokens:
        spoiled += [
            *bad_tensor(
                "input_ids", lambda t: t.float(), lambda t: t + V, lambda t: t - V - 1, lengthened
            )
        ]
        if not ids.numel():  # no id is out of range
            spoiled = [pair for pair in spoiled if pair[0] != "input_ids"]
    function = ops.mix_prompts_with_tokens if tokens else ops.mix_prompts
    extra = {"input_ids": ids} if tokens else {}
    return Call(
        function.__name__,
        function,
        leaves,
        lambda t: {**t, **extra, "backend": backend},
        values,
        K + P * D + B * max(T, 1),
        gradients=gradients,
        spoiled=spoiled,
        poisoned=not all_finite(leaves),
    )


def _mix_experts(draw: Draw, backend: MaybeBackend, wide: bool) -> Call:
    dtype, other = drawn_dtypes(draw, backend, wide)
    M, wide_in, wide_out, N, r, k = (
        draw.pick(0, 1, 2, 5),
        draw.pick(1, 3, 8),
        draw.pick(1, 2, 7),
        draw.pick(1, 2, 6, 0),
        draw.pick(1, 2, 4, 0),
        draw.pick(1, 2, 3, 0),
    )
    index = torch.from_numpy(draw.rng.integers(-1, N, size=(M, k)))
    leaves = {
        "x": draw.tensor(draw.normal(M, wide_in), dtype),
        "bank_a": draw.tensor(draw.normal(N, r, wide_in), other),
        "bank_b": draw.tensor(draw.normal(N, r, wide_out), other),
        "weights": draw.tensor(draw.weights(M, k), draw.pick(dtype, torch.float32)),
    }
    if draw.chance(0.1) and not wide:
        draw.poison(leaves, tuple(leaves))
    scaling = draw.pick(1.0, 0.5, 2, 0)

    def full(v: Values) -> Values:
        if dtype == torch.float64:
            return v
        return {**v, "weights": v["weights"].astype(np.float32).astype(np.float64)}

    def values(v: Values) -> list[Any]:
        v = full(v)
        sizes = formulas.sized(v)
        return [tuple(formulas.experts(t, index.numpy(), scaling) for t in (v, sizes))]

    def gradients(v: Values, cs: list[Array]) -> dict[str, Any]:
        v = full(v)
        found = formulas.experts_gradients(v, cs[0], index.numpy(), scaling)
        sizes = formulas.sized(v)
        large = formulas.experts_gradients(sizes, np.abs(cs[0]), index.numpy(), scaling)
        return {n: (found[n], large[n]) for n in found}

    spoiled = [
        *bad_float("x", widened, lengthened),
        *bad_float("bank_a", widened, lengthened),
        *bad_float("bank_b", lengthened),
        *bad_float("weights", widened, lengthened),
        *bad_tensor("index", lambda t: t.int(), lambda t: t.double(), widened, lengthened),
        ("scaling", "abc"),
        ("scaling", None),
        *BAD_BACKEND,
    ]
    if index.numel():
        spoiled += [("index", lambda t: t + N + 1), ("index", lambda t: t - 2 - N)]
    return Call(
        "mix_experts",
        ops.mix_experts,
        leaves,
        lambda t: {**t, "index": index, "scaling": scaling, "backend": backend},
        values,
        wide_in + r * k + wide_out + M,
        gradients=gradients,
        spoiled=spoiled,
        poisoned=not all_finite(leaves),
    )


def _own_lora(draw: Draw, backend: MaybeBackend, wide: bool, in_place: bool) -> Call:
    dtype, other = drawn_dtypes(draw, backend, False)
    B, T, wide_in, wide_out, K = (
        draw.pick(0, 1, 2, 4),
        draw.pick(1, 2, 5, 40),
        draw.pick(1, 3, 8, 17),
        draw.pick(1, 2, 5, 16),
        draw.pick(0, 1, 2, 3),
    )
    ranks = [draw.pick(1, 2, 4, 0) for _ in range(K)]
    leaves = {"x": draw.tensor(draw.normal(B, T, wide_in), dtype)}
    for k, r in enumerate(ranks):
        leaves[f"a{k}"] = draw.tensor(draw.normal(r, wide_in), other)
        leaves[f"b{k}"] = draw.tensor(draw.normal(wide_out, r), other)
    if in_place:
        leaves["y"] = torch.from_numpy(draw.normal(B, T, wide_out)).to(dtype)
    else:
        leaves["weight"] = draw.tensor(draw.normal(wide_out, wide_in), dtype)
        leaves["bias"] = draw.tensor(draw.normal(wide_out), dtype)
    owner = [int(k) for k in draw.rng.integers(-1, K, size=B)]

    def adapters(t: dict[str, Any]) -> list[tuple[Any, Any, float]]:
        return [(t[f"a{k}"], t[f"b{k}"], 0.5 + k) for k in range(K)]

    def arguments(t: dict[str, Tensor]) -> dict[str, Any]:
        given = {n: t[n] for n in ("x", "weight", "bias") if n in t}
        if in_place:
            given["y"] = t["y"].clone()
        made = [own_ops.Adapter(*each) for each in adapters(t)]
        return {**given, "adapters": made, "owner": owner, "backend": backend}

    def values(v: Values) -> list[Any]:
        pairs = []
        for given in (v, formulas.sized(v)):
            base = given["y"] if in_place else given["x"] @ given["weight"].T + given["bias"]
            pairs.append(formulas.own(base, given["x"], adapters(given), owner))
        return [tuple(pairs)]

    spoiled = [
        *(
            pair
            for pair in bad_tensor("x", *([widened] if K else []), lambda t: t.long())
            if in_place or pair[1] is not deepened
        ),
        ("owner", [*owner, 0]),
        ("owner", [K] * B or [0]),
        ("owner", [-2] * B or [0]),
        ("owner", "abc"),
        ("owner", 3),
        ("owner", [0.5] * B or [0.5]),
        ("adapters", 3),
        ("adapters", "abc"),
        *BAD_BACKEND,
    ]
    if not in_place:
        spoiled += [*bad_float("weight", widened), *bad_float("bias", widened)]
    else:
        spoiled += bad_float("y", lengthened)
    function = own_ops.add_own_lora_ if in_place else own_ops.own_lora
    return Call(
        function.__name__,
        function,
        leaves,
        arguments,
        values,
        wide_in + wide_out + sum(ranks),
        differentiable=False,
        spoiled=spoiled,
    )


# Each function, the op that dispatch knows it by, and how a call is drawn.
Maker = Callable[[Draw, MaybeBackend, bool], Call]
MAKERS: dict[str, tuple[str, Maker]] = {
    "mixed_lora": ("mixed_lora", lambda d, b, w: _mixed(d, b, w, False)),
    "mixed_lora_linear": ("mixed_lora", lambda d, b, w: _mixed(d, b, w, True)),
    "mix_prompts": ("mix_prompts", lambda d, b, w: _mix_prompts(d, b, w, False)),
    "mix_prompts_with_tokens": ("mix_prompts", lambda d, b, w: _mix_prompts(d, b, w, True)),
    "mix_experts": ("mix_experts", _mix_experts),
    "pool_tokens": ("pool_tokens", lambda d, b, w: routing.pool(d, b, w, True)),
    "pool_embeds": ("pool_tokens", lambda d, b, w: routing.pool(d, b, w, False)),
    "route": ("route", lambda d, b, w: routing.scored(d, b, w, False)),
    "route_scores": ("route", lambda d, b, w: routing.scored(d, b, w, True)),
    "reflection_loss": ("route", routing.reflection),
    "nearest_key": ("nearest_key", routing.nearest),
    "topk_keys": ("topk_keys", routing.topk),
    "own_lora": ("own_lora", lambda d, b, w: _own_lora(d, b, w, False)),
    "add_own_lora_": ("own_lora", lambda d, b, w: _own_lora(d, b, w, True)),
}
