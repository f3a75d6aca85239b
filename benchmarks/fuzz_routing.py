"""How calls of pooling, routing and the searches are drawn."""

from typing import Any

import fuzz_formulas as formulas
import numpy as np
import torch
from fuzz_bad import (
    BAD_BACKEND,
    MaybeBackend,
    bad_float,
    bad_tensor,
    distinct,
    drawn_dtypes,
    lengthened,
    on_meta,
    widened,
)
from fuzz_calls import Call, Draw, WrongError, numbers
from fuzz_formulas import Array, Values
from torch import Tensor

from sapt_fast import ops
from sapt_fast.ops.pool_tokens import pool_embeds
from sapt_fast.ops.route import route_scores


def pool(draw: Draw, backend: MaybeBackend, wide: bool, tokens: bool) -> Call:
    dtype, _ = drawn_dtypes(draw, backend, wide)
    B, T, D, V = (
        draw.pick(0, 1, 2, 4),
        draw.pick(1, 2, 3, 9, 0),
        draw.pick(1, 3, 8, 17),
        draw.pick(1, 5, 12),
    )
    pooling = draw.pick("max", "mean")
    rows = V if tokens else B * T
    order = draw.rng.random((rows, D)).argsort(0)
    ties = draw.chance(0.3)
    if ties:  # else no two rows are equal in a column
        order //= 3
    plain = (order - rows // 2) / 4.0
    ids = draw.rng.integers(V, size=(B, T))
    given_ids = torch.from_numpy(ids).to(draw.pick(torch.int64, torch.int32))
    name = "table" if tokens else "embeds"
    values64 = plain if tokens else plain.reshape(B, T, D)
    leaf = torch.from_numpy(np.ascontiguousarray(values64)).to(dtype)
    if draw.chance(0.3):
        leaf = leaf.transpose(0, -1).contiguous().transpose(0, -1)
    leaves = {name: leaf}
    poisoned = draw.chance(0.1) and not wide
    if poisoned:
        draw.poison(leaves, (name,))
    mask = None
    if draw.chance(0.6):
        mask = torch.from_numpy(draw.rng.random((B, T)) < draw.pick(0.3, 0.8)).to(
            draw.pick(torch.int64, torch.bool, torch.float32)
        )
    keep = np.ones((B, T), dtype=bool) if mask is None else (mask != 0).numpy()
    # A maximum of minus infinity has no neighbours that a derivative could be of.
    least = pooling == "max" and bool(torch.isneginf(leaves[name]).any())

    def embeds(v: Values) -> Array:
        return v["table"][ids] if tokens else v["embeds"]

    def values(v: Values) -> list[Any]:
        e = embeds(v)
        return [(formulas.pooled(e, keep, pooling), formulas.pooled(np.abs(e), keep, "mean") * 4)]

    def gradients(v: Values, cs: list[Array]) -> dict[str, Any]:
        found = []
        for c in (cs[0], np.abs(cs[0])):
            d = formulas.pooled_gradients(embeds(v), keep, pooling, c)
            found.append(formulas.gathered_gradients(d, ids, V) if tokens else d)
        return {name: (found[0], found[1])}

    fixed: dict[str, Any] = {"mask": mask, "pooling": pooling}
    if tokens:
        fixed |= {"input_ids": given_ids, "backend": backend}
    function = ops.pool_tokens if tokens else pool_embeds
    return Call(
        function.__name__,
        function,
        leaves,
        lambda t: {**t, **fixed},
        values,
        T + B + 1,
        gradients=gradients,
        differentiable=not least,
        twice=not ties,
        poisoned=poisoned,
        spoiled=_bad_pool(name, tokens, ids, keep, V),
    )


def _bad_pool(name: str, tokens: bool, ids: Array, keep: Array, rows: int) -> list[Any]:
    """Arguments of a pooling that must be refused."""
    B, T = ids.shape
    spoiled = [
        *(pair for pair in bad_float(name) if tokens or pair[1] is not on_meta),
        ("pooling", "sum"),
        ("pooling", None),
        *[
            ("mask", bad)
            for bad in (
                "abc",
                3,
                torch.ones(B + 1, T),
                torch.ones(B, T + 1),
                torch.ones(B, T, 1),
                torch.ones(B, T, device="meta"),
            )
        ],
    ]
    if tokens:
        spoiled += BAD_BACKEND
        spoiled += [*bad_tensor("input_ids", lambda t: t.float(), lambda t: t != 0)]
        if ids.size and keep.all():  # ids that take no part may be anything
            spoiled += [("input_ids", lambda t: t + rows), ("input_ids", lambda t: t - rows - 1)]
    return spoiled


_PARTS = ("down", "up", "norm_weight", "norm_bias")


def scored(draw: Draw, backend: MaybeBackend, wide: bool, scores_only: bool) -> Call:
    dtype, _ = drawn_dtypes(draw, backend, wide)
    B, K, D, H = (
        draw.pick(0, 1, 2, 3),
        draw.pick(1, 2, 3, 7),
        draw.pick(2, 3, 8, 16),
        draw.pick(1, 4, 5),
    )
    leaves = {
        "embeds": draw.tensor(draw.normal(B, D), dtype),
        "keys": draw.tensor(draw.normal(K, D), dtype),
    }
    projected = draw.chance(0.6)
    if projected:
        for name, shape in zip(_PARTS, ((H, D), (D, H), (D,), (D,)), strict=True):
            plain = torch.from_numpy(draw.normal(*shape)).to(dtype)
            leaves[name] = plain
    divisor = draw.pick(None, 1.0, 2.5)
    fixed: dict[str, Any] = {"temperature": divisor, "backend": backend}
    if not scores_only and not wide:
        fixed |= {"top_k": draw.pick(None, 1, 2, K, K + 3), "threshold": draw.pick(None, 0.0, 0.2)}

    def arguments(t: dict[str, Tensor]) -> dict[str, Any]:
        projection = ops.QueryProjection(*(t[n] for n in _PARTS), eps=1e-3) if projected else None
        return {"embeds": t["embeds"], "keys": t["keys"], "projection": projection, **fixed}

    given = {n: numbers(t) for n, t in leaves.items()}
    with np.errstate(all="ignore"):
        drawn = formulas.softmax(formulas.scores(given, divisor or D**0.5, 1e-3))
    if _near_a_jump(drawn, fixed):
        fixed |= {"top_k": None, "threshold": None}

    def values(v: Values) -> list[Any]:
        s = formulas.scores(v, divisor or D**0.5, 1e-3)
        size = np.full_like(s, 1 + np.abs(s).max(initial=0))
        if scores_only:
            return [(s, size)]
        w = formulas.softmax(s)
        w = w * formulas.kept(w, fixed.get("top_k"), fixed.get("threshold"))
        return [(w / w.sum(-1, keepdims=True), size)]

    function = route_scores if scores_only else ops.route
    return Call(
        function.__name__,
        function,
        leaves,
        arguments,
        values,
        D + H + K,
        spoiled=_bad_scored(scores_only, arguments(leaves)["projection"]),
        slack=64.0 if projected else 8.0,
    )


def _bad_scored(scores_only: bool, good: ops.QueryProjection | None) -> list[Any]:
    """Arguments of a routing that must be refused."""
    spoiled = [
        *bad_float("keys", widened),
        *bad_tensor("embeds", widened),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", "abc"),
        ("projection", "abc"),
        ("projection", 3),
        *BAD_BACKEND,
    ]
    if not scores_only:
        spoiled += [
            ("top_k", 0),
            ("top_k", -1),
            ("top_k", 1.5),
            ("top_k", "abc"),
            ("threshold", 1.5),
            ("threshold", -0.1),
            ("threshold", "abc"),
        ]
    if good is not None:
        for n in _PARTS:
            spoiled += [
                ("projection", good._replace(**{n: lengthened(getattr(good, n))})),
                ("projection", good._replace(**{n: 3})),
                ("projection", good._replace(**{n: getattr(good, n).to("meta")})),
            ]
    return spoiled


def _near_a_jump(w: Array, fixed: dict[str, Any]) -> bool:
    """Whether rounding may decide which weights stay."""
    top_k, threshold = fixed.get("top_k"), fixed.get("threshold")
    ordered = np.sort(w, -1)
    jumps = False
    for row in w if threshold else ():
        near = np.abs(row - min(threshold, row.max())) < 0.02
        jumps |= bool(near.sum() > (row.max() <= threshold))  # the largest always stays
    if top_k is not None and top_k < w.shape[-1]:
        jumps |= bool((ordered[:, -top_k] - ordered[:, -top_k - 1] < 0.02).any())
    return jumps


def reflection(draw: Draw, backend: MaybeBackend, wide: bool) -> Call:
    dtype, _ = drawn_dtypes(draw, backend, wide)
    B, K = draw.pick(1, 2, 4), draw.pick(1, 2, 5)
    earlier = draw.pick(1, K)
    shape = (B, earlier) if draw.chance(0.5) else (earlier,)
    target = draw.rng.random(shape) + 1e-2
    target /= target.sum(-1, keepdims=True)
    leaves = {"scores": draw.tensor(draw.normal(B, K), dtype)}
    given = torch.from_numpy(target)

    def values(v: Values) -> list[Any]:
        full = np.broadcast_to(
            numbers(given.to(torch.promote_types(dtype, torch.float32))), (B, earlier)
        )
        loss = formulas.kl(v["scores"], full)
        return [(loss, np.array(4 + np.abs(v["scores"]).max(initial=0)))]

    spoiled = [
        *bad_float("scores"),
        *bad_float("target"),
        ("target", torch.ones(K + 1)),
        ("target", torch.ones(B + 1, K)),
        ("target", torch.ones(())),
    ]
    return Call(
        "reflection_loss",
        ops.reflection_loss,
        leaves,
        lambda t: {**t, "target": given},
        values,
        B * K,
        spoiled=spoiled,
        slack=4.0,
    )


def _search(
    draw: Draw, backend: MaybeBackend, wide: bool, least: int
) -> tuple[dict[str, Tensor], bool, int, int, int]:
    """Query and keys, whether they are poisoned, and M, N and D."""
    dtype, _ = drawn_dtypes(draw, backend, wide)
    M, N, D = draw.pick(0, 1, 2, 5), draw.pick(least, 1, 2, 6, 13), draw.pick(1, 3, 8, 16)
    keys = draw.normal(N, D)
    if N > 2 and draw.chance(0.4):
        keys[N - 1] = keys[0]  # equals
    if N > 1 and draw.chance(0.1):
        keys[1] = 0.0
    leaves = {"query": draw.tensor(draw.normal(M, D), dtype), "keys": draw.tensor(keys, dtype)}
    poisoned = draw.chance(0.1) and not wide
    if poisoned:
        draw.poison(leaves, tuple(leaves))
    return leaves, poisoned, M, N, D


def _apart(scores: Array, k: int) -> bool:
    """Whether a small step changes neither the k best scores of a row nor their order."""
    ordered = -np.sort(-scores, 1)
    return bool((ordered[:, :-1] - ordered[:, 1:] > 0.05)[:, :k].all())


def nearest(draw: Draw, backend: MaybeBackend, wide: bool) -> Call:
    leaves, poisoned, M, N, D = _search(draw, backend, wide, 0)
    radius = torch.from_numpy(np.abs(draw.normal(N)) * 2).to(torch.float32)
    if N and draw.chance(0.2):
        radius[0] = draw.pick(float("nan"), float("inf"), -1.0, 0.0)

    def all_pairs(v: Values) -> Array:
        d = formulas.distances(v["query"], v["keys"])
        return np.where(np.isnan(d), np.inf, d)

    def values(v: Values) -> list[Any]:
        least = all_pairs(v).min(1) if N else np.full(M, np.inf)
        return [(least, least + 1e-3)]

    def judge(result: Any, v: Values) -> None:
        index = result[0].numpy()
        for m, (row, at) in enumerate(zip(all_pairs(v), index, strict=True)):
            best = row.min(initial=np.inf)
            edge = 1e-3 * (1 + best) if np.isfinite(best) else 0.0
            first = np.flatnonzero(row <= best)[0] if np.isfinite(best) else -1
            rivals = {int(n) for n in np.flatnonzero(row <= best + edge) if row[n] > best}
            for n in {int(first), *rivals}:
                inside = n >= 0 and row[n] <= float(radius[n])
                unsure = n >= 0 and abs(row[n] - float(radius[n])) <= edge
                if at == (n if inside else -1) or (unsure and at in (n, -1)):
                    break
            else:
                raise WrongError(f"index[{m}]: got {at}, expected {first} or -1, by its radius")

    spoiled = [
        *bad_float("query", widened),
        *bad_float("keys", widened, lengthened),
        *bad_float("radius", widened),
        *BAD_BACKEND,
    ]
    smooth = not poisoned and N > 0 and distinct(leaves["keys"])
    if smooth:
        smooth = _apart(-all_pairs({n: numbers(t) for n, t in leaves.items()}), 1)
    return Call(
        "nearest_key",
        ops.nearest_key,
        leaves,
        lambda t: {**t, "radius": radius, "backend": backend},
        values,
        D + N,
        outputs=lambda result: [result[1]],
        judge=judge,
        spoiled=spoiled,
        differentiable=smooth,
        slack=4.0,
    )


def topk(draw: Draw, backend: MaybeBackend, wide: bool) -> Call:
    leaves, poisoned, M, N, D = _search(draw, backend, wide, 1)
    k, metric = int(draw.rng.integers(1, N + 1)), draw.pick("dot", "cosine", "l2")

    def ranked(v: Values) -> tuple[Array, Any]:
        s = formulas.key_scores(v["query"], v["keys"], metric)
        order = [
            sorted(
                range(N),
                key=lambda n, row=row: (
                    bool(np.isnan(row[n])),
                    -row[n] if not np.isnan(row[n]) else 0.0,
                    n,
                ),
            )
            for row in s
        ]
        return s, np.array(order, dtype=np.int64).reshape(M, N)[:, :k]

    def values(v: Values) -> list[Any]:
        s, order = ranked(v)
        best = np.take_along_axis(s, order, 1)
        size = np.abs(v["query"]).sum(1)[:, None] * np.abs(v["keys"]).max(initial=0) + 1e-3
        if metric == "l2":
            size = size + (
                (np.abs(v["query"]) ** 2).sum(1)[:, None]
                + (np.abs(v["keys"]) ** 2).sum(1).max(initial=0)
            )
        if metric == "cosine":
            size = np.ones_like(size)
        return [(best, np.broadcast_to(np.where(np.isfinite(size), size, 1e3), best.shape))]

    def judge(result: Any, v: Values) -> None:
        s, order = ranked(v)
        index = result[1].numpy()
        for m in range(M):
            if len(set(index[m])) != k or not ((index[m] >= 0) & (index[m] < N)).all():
                raise WrongError(f"index[{m}]: got {index[m].tolist()}, expected {k} keys")
            for j, (at, want) in enumerate(zip(index[m], order[m], strict=True)):
                twins = [n for n in range(at) if np.array_equal(v["keys"][n], v["keys"][at])]
                if not set(twins) <= set(index[m, :j]):
                    raise WrongError(f"index[{m}, {j}]: got {at} before its equals {twins}")
                a, b = s[m, at], s[m, want]
                equal = a == b or (np.isnan(a) and np.isnan(b))
                if at != want and (
                    (equal and not np.isfinite(a))
                    or not abs(a - b) <= 1e-3 * (1 + abs(b)) * (1 + D)
                ):
                    raise WrongError(f"index[{m}, {j}]: got {at}, expected {want}")

    smooth = not poisoned and distinct(leaves["keys"]) and distinct(leaves["query"][:1])
    if smooth:
        smooth = _apart(ranked({n: numbers(t) for n, t in leaves.items()})[0], k)
    return Call(
        "topk_keys",
        ops.topk_keys,
        leaves,
        lambda t: {**t, "k": k, "metric": metric, "backend": backend},
        values,
        D + N,
        outputs=lambda result: [result[0]],
        judge=judge,
        spoiled=_bad_topk(N),
        differentiable=smooth,
        slack=4.0,
    )


def _bad_topk(count: int) -> list[Any]:
    """Arguments of a search that must be refused."""
    return [
        *bad_float("query", widened),
        *bad_float("keys", widened),
        ("k", 0),
        ("k", count + 1),
        ("k", -1),
        ("k", 1.5),
        ("k", "abc"),
        ("k", None),
        ("metric", "abc"),
        ("metric", None),
        *BAD_BACKEND,
    ]
