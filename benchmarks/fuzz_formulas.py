"""The ops in NumPy and float64, written from their definitions: adapter by adapter, row by row.

Every function takes values and numbers and gives values; `*_gradients` give the derivatives of the
sum of the outputs times `c`. What has a weight or a scaling of zero takes no part, whatever it
holds; any other zero times an infinity is NaN. All of them are sums of products, so the same
function over absolute values says how large the terms are that a result was summed from.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Values = dict[str, Array]


def finite_or_zero(values: Array) -> Array:
    return np.where(np.isfinite(values), values, 0.0)


def sized(values: Values) -> Values:
    """The magnitudes of values, which bound the error of their sums."""
    return {name: np.abs(value) for name, value in values.items()}


def gathered_gradients(d: Array, ids: NDArray[np.int64], rows: int) -> Array:
    """The gradient [rows, D] of a table from that of its rows `ids` [B, T], d [B, T, D]."""
    table = np.zeros((rows, d.shape[-1]))
    np.add.at(table, ids, d)
    return table


# --- mixed_lora --------------------------------------------------------------------------------


def _spans(ranks: Sequence[int]) -> list[slice]:
    ends = np.cumsum(ranks)
    return [slice(int(end) - rank, int(end)) for end, rank in zip(ends, ranks, strict=True)]


def mixed(v: Values, ranks: Sequence[int], scaling: Sequence[float]) -> Array:
    """x [M, I], a [R, I], b [R, O], w [M, K] -> [M, O]; weight [O, I] and bias [O] if given."""
    x, a, b, w = (v[name] for name in ("x", "lora_a", "lora_b", "w"))
    y = np.zeros((x.shape[0], b.shape[1]))
    if "weight" in v:
        y += x @ v["weight"].T
    if "bias" in v:
        y += v["bias"]
    for k, rows in enumerate(_spans(ranks)):
        on = (w[:, k] * scaling[k] != 0) & (ranks[k] > 0)
        y[on] += w[on, k, None] * scaling[k] * (x[on] @ a[rows].T @ b[rows])
    return y


def mixed_gradients(
    v: Values,
    c: Array,
    ranks: Sequence[int],
    scaling: Sequence[float],
    samples: int,
    passes: Sequence[bool],
) -> Values:
    """Of every tensor; that of w [M, K] is summed over the rows of each of `samples`.

    Args:
        passes: of each adapter, whether x gets a gradient through it.
    """
    x, a, b, w = (v[name] for name in ("x", "lora_a", "lora_b", "w"))
    dx, da, db = np.zeros_like(x), np.zeros_like(a), np.zeros_like(b)
    dw = np.zeros((samples, w.shape[1]))
    for k, rows in enumerate(_spans(ranks)):
        on = w[:, k] * scaling[k] != 0
        dz = w[on, k, None] * scaling[k] * c[on]
        g = dz @ b[rows].T
        da[rows], db[rows] = g.T @ x[on], (x[on] @ a[rows].T).T @ dz
        if passes[k]:
            dx[on] += g @ a[rows]
        share = (scaling[k] * c * (x @ a[rows].T @ b[rows])).sum(1)
        share = share.reshape(samples, -1).sum(1) if samples else np.zeros(0)
        off = ~on.reshape(samples, -1).any(1) if samples else np.zeros(0, dtype=bool)
        dw[:, k] = np.where(off, finite_or_zero(share), share)
    found = {"x": dx, "lora_a": da, "lora_b": db, "w": dw}
    if "weight" in v:
        found["x"] = dx + c @ v["weight"]
        found["weight"] = c.T @ x
    if "bias" in v:
        found["bias"] = c.sum(0)
    return found


# --- mix_prompts -------------------------------------------------------------------------------


def prompts(v: Values) -> Array:
    """prompts [K, P, D], mixture [B, K], embeds [B, T, D] -> [B, P + T, D]"""
    p, m, e = v["prompts"], v["mixture"], v["embeds"]
    y = np.zeros((e.shape[0], p.shape[1] + e.shape[1], e.shape[2]))
    for s in range(e.shape[0]):
        for k in range(p.shape[0]):
            if m[s, k] != 0:
                y[s, : p.shape[1]] += m[s, k] * p[k]
        y[s, p.shape[1] :] = e[s]
    return y


def prompts_gradients(v: Values, c: Array) -> Values:
    p, m = v["prompts"], v["mixture"]
    length = p.shape[1]
    dp, dm = np.zeros_like(p), np.zeros_like(m)
    for s in range(m.shape[0]):
        for k in range(p.shape[0]):
            share = (c[s, :length] * p[k]).sum()
            dm[s, k] = share if m[s, k] != 0 else finite_or_zero(share)
            if m[s, k] != 0:
                dp[k] += m[s, k] * c[s, :length]
    return {"prompts": dp, "mixture": dm, "embeds": c[:, length:]}


# --- mix_experts -------------------------------------------------------------------------------


def experts(v: Values, index: NDArray[np.int64], scaling: float) -> Array:
    """x [M, I], bank_a [N, r, I], bank_b [N, r, O], weights [M, k] -> [M, O]"""
    x, a, b, w = (v[name] for name in ("x", "bank_a", "bank_b", "weights"))
    y = np.zeros((x.shape[0], b.shape[2]))
    for (m, j), n in np.ndenumerate(index):
        if n >= 0 and w[m, j] * scaling != 0 and a.shape[1]:
            y[m] += scaling * w[m, j] * (a[n] @ x[m] @ b[n])
    return y


def experts_gradients(v: Values, c: Array, index: NDArray[np.int64], scaling: float) -> Values:
    x, a, b, w = (v[name] for name in ("x", "bank_a", "bank_b", "weights"))
    dx, da, db, dw = (np.zeros_like(t) for t in (x, a, b, w))
    for (m, j), n in np.ndenumerate(index):
        if n < 0 or not a.shape[1]:
            continue
        h, g = a[n] @ x[m], b[n] @ c[m]
        share = scaling * (h * g).sum()
        factor = scaling * w[m, j]
        dw[m, j] = share if factor != 0 else finite_or_zero(share)
        if factor != 0:
            dx[m] += factor * (g @ a[n])
            da[n] += factor * np.outer(g, x[m])
            db[n] += factor * np.outer(h, c[m])
    return {"x": dx, "bank_a": da, "bank_b": db, "weights": dw}


# --- pooling -----------------------------------------------------------------------------------


def pooled(embeds: Array, keep: NDArray[np.bool_], pooling: str) -> Array:
    """embeds [B, T, D], keep [B, T] -> [B, D]; zeros where nothing is kept."""
    y = np.zeros((embeds.shape[0], embeds.shape[2]))
    for s in range(embeds.shape[0]):
        rows = embeds[s][keep[s]]
        if len(rows):
            y[s] = rows.max(0) if pooling == "max" else rows.sum(0) / len(rows)
    return y


def pooled_gradients(embeds: Array, keep: NDArray[np.bool_], pooling: str, c: Array) -> Array:
    """[B, T, D]; the first of equal maxima gets it, of several NaN the first NaN."""
    d = np.zeros_like(embeds)
    for s in range(embeds.shape[0]):
        kept = np.flatnonzero(keep[s])
        if len(kept) and pooling == "mean":
            d[s][kept] = c[s] / len(kept)
        elif len(kept):
            d[s][kept[embeds[s][kept].argmax(0)], np.arange(embeds.shape[2])] = c[s]
    return d


# --- router ------------------------------------------------------------------------------------


def scores(v: Values, divisor: float, eps: float) -> Array:
    """embeds [B, D], keys [K, D] and the projection, if there is one -> [B, K]"""
    q = v["embeds"]
    if "down" in v:
        z = np.einsum("bd,hd,eh->be", q, v["down"], v["up"])
        active = z / (1 + np.exp(-z))
        q = active - active.mean(1, keepdims=True)
        q = q / np.sqrt((q**2).mean(1, keepdims=True) + eps) * v["norm_weight"] + v["norm_bias"]
    return np.einsum("bd,kd->bk", q, v["keys"]) / divisor


def softmax(s: Array) -> Array:
    e = np.exp(s - s.max(-1, keepdims=True)) if s.size else s
    return e / e.sum(-1, keepdims=True)


def kept(weights: Array, top_k: int | None, threshold: float | None) -> NDArray[np.bool_]:
    """Which weights stay; of equals those of the lower index."""
    keep = np.ones(weights.shape, dtype=bool)
    for s in range(weights.shape[0]):
        row = weights[s]
        if threshold:
            keep[s] &= row >= min(threshold, row.max())
        if top_k is not None:
            order = sorted(range(len(row)), key=lambda k, row=row: (-row[k], k))
            keep[s, order[top_k:]] = False
    return keep


def kl(s: Array, target: Array) -> Array:
    """scores [B, K], target [B, K'] -> KL(target || softmax), the mean over the batch."""
    logs = s - s.max(1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
    total = 0.0
    for (b, k), share in np.ndenumerate(target):
        if share > 0:
            total += share * (np.log(share) - logs[b, k])
    return np.array(total / s.shape[0])


# --- searches ----------------------------------------------------------------------------------


def distances(query: Array, keys: Array) -> Array:
    """[M, N], Euclidean."""
    return np.sqrt(((query[:, None] - keys[None]) ** 2).sum(-1))


def key_scores(query: Array, keys: Array, metric: str) -> Array:
    """[M, N] of query [M, D] and keys [N, D]."""
    if metric == "l2":
        return -((query[:, None] - keys[None]) ** 2).sum(-1)
    s = np.einsum("md,nd->mn", query, keys)
    if metric == "cosine":
        norms = np.sqrt((query**2).sum(1))[:, None] * np.sqrt((keys**2).sum(1))[None]
        s = np.where(norms == 0, 0.0, s / np.where(norms == 0, 1.0, norms))
    return s


# --- own_lora ----------------------------------------------------------------------------------


def own(
    base: Array, x: Array, adapters: Sequence[tuple[Array, Array, float]], owner: Sequence[int]
) -> Array:
    """base [B, T, O], x [B, T, I], adapters of a [r, I], b [O, r] -> [B, T, O]"""
    y = base.copy()
    for s, k in enumerate(owner):
        if k >= 0:
            a, b, scaling = adapters[k]
            y[s] += scaling * np.einsum("ti,ri,or->to", x[s], a, b)
    return y
