"""Triton backend of op `route`: see `ops.route` for what is computed.

From the pooled embedding to the weights it is one launch with one program per sample: its vectors
stay in the caches while the program streams the projection and the keys, everything in float32.
Projections per task take a program per sample and task, and one more launch for the weights. Many
tokens are tiles of a matrix product: see `blocks.route_tokens`.
"""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from sapt_fast.ops.gates import Gate
from sapt_fast.ops.queries import AnyProjection, QueryProjection, TaskProjections
from sapt_fast.triton_kernels.blocks import common
from sapt_fast.triton_kernels.blocks import route_tokens as tokens
from sapt_fast.triton_kernels.blocks.gates import activated, cosines, gate_options, scaled
from sapt_fast.triton_kernels.blocks.plans import Results, launch, planned


@triton.jit
def _products(
    matrix_ptr,
    vector_ptr,
    rows,
    ROWS,
    COLS,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    COSINE: tl.constexpr = False,
):
    """matrix[rows, COLS] @ vector[COLS] in float32; zero for rows beyond ROWS.

    With COSINE divided by the norms of row and vector.
    """
    row_ptrs = matrix_ptr + rows.to(tl.int64)[:, None] * COLS
    in_rows = (rows < ROWS)[:, None]
    # [BLOCK_ROWS, BLOCK_COLS], summed over its columns at the end
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    if COSINE:
        row_squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        squares = tl.zeros((BLOCK_COLS,), tl.float32)
    for c in range(0, COLS, BLOCK_COLS):
        cols = c + tl.arange(0, BLOCK_COLS)
        in_cols = cols < COLS
        # matrix [BLOCK_ROWS, BLOCK_COLS], vector [BLOCK_COLS]
        matrix = tl.load(row_ptrs + cols[None, :], mask=in_rows & in_cols[None, :], other=0.0)
        vector = tl.load(vector_ptr + cols, mask=in_cols, other=0.0)
        acc += matrix.to(tl.float32) * vector.to(tl.float32)[None, :]
        if COSINE:
            row_squares += matrix.to(tl.float32) * matrix.to(tl.float32)
            squares += vector.to(tl.float32) * vector.to(tl.float32)
    products = tl.sum(acc, axis=1)
    if COSINE:
        products = cosines(products, tl.sum(row_squares, axis=1), tl.sum(squares, axis=0))
    return products


@triton.jit
def _gated_row(
    scores_ptr, weights_ptr, K, top_k, threshold,
    KEYS: tl.constexpr, BLOCK_K: tl.constexpr, GATE: tl.constexpr, SPARSE: tl.constexpr,
    RANKED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """weights[K] of one program's scores[K], K <= KEYS.

    A weight's rank, the number of larger ones and of equal ones before it, tells whether it is
    among the top_k: K^2 comparisons in registers are fewer steps than a sort.
    """
    ks = tl.arange(0, KEYS)
    in_keys = ks < K
    # [KEYS]
    scores = tl.load(scores_ptr + ks, mask=in_keys, other=0.0)
    weights = activated(scores, in_keys, 0, GATE)
    if SPARSE:
        keep = weights >= tl.minimum(tl.max(weights, axis=0), threshold)
        if RANKED:
            # [KEYS]
            tl.store(weights_ptr + ks, weights, mask=in_keys)
            tl.debug_barrier()
            rank = tl.zeros((KEYS,), tl.int32)
            for k in range(0, K, BLOCK_K):
                others = k + tl.arange(0, BLOCK_K)
                # other [1, BLOCK_K], own [KEYS, 1]
                other = tl.load(weights_ptr + others, mask=others < K, other=-1.0)[None, :]
                own = weights[:, None]
                ahead = (other > own) | ((other == own) & (others[None, :] < ks[:, None]))
                rank += tl.sum(ahead.to(tl.int32), axis=1)
            keep = keep & (rank < top_k)
            tl.debug_barrier()
        weights *= keep.to(tl.float32)
    if SCALED:
        weights = scaled(weights, 0)
    tl.store(weights_ptr + ks, weights, mask=in_keys)


@triton.jit(do_not_specialize=["K", "top_k"])
def _route_kernel(
    pooled_ptr, down_ptr, up_ptr, norm_weight_ptr, norm_bias_ptr, keys_ptr, hidden_ptr,
    query_ptr, scores_ptr, weights_ptr,
    D, H, K, eps, divisor, top_k, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr, COSINE: tl.constexpr, GATE: tl.constexpr,
    SPARSE: tl.constexpr, RANKED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """scores[b] = LayerNorm(SiLU(up down pooled[b])) keys^T / divisor; without down: no query.

    With COSINE the products are divided by both norms.

    With weights_ptr also weights[b], from the scores. hidden [B, H] and query [B, D] are float32
    scratch of this program: what its threads write is read by others of them, hence the barriers.
    """
    b = tl.program_id(0).to(tl.int64)
    pooled_ptr += b * D
    if down_ptr is not None:
        hidden_ptr += b * H
        query_ptr += b * D
        for h in range(0, H, BLOCK_M):
            rows = h + tl.arange(0, BLOCK_M)
            # hidden [BLOCK_M] = down [BLOCK_M, D] pooled [D]
            hidden = _products(down_ptr, pooled_ptr, rows, H, D, BLOCK_M, BLOCK_N)
            tl.store(hidden_ptr + rows, hidden, mask=rows < H)
        tl.debug_barrier()

        total = tl.zeros((BLOCK_M,), tl.float32)
        for d in range(0, D, BLOCK_M):
            rows = d + tl.arange(0, BLOCK_M)
            # z [BLOCK_M] = up [BLOCK_M, H] hidden [H], then SiLU
            z = _products(up_ptr, hidden_ptr, rows, D, H, BLOCK_M, BLOCK_H)
            z = z / (1.0 + tl.exp(-z))
            total += z
            tl.store(query_ptr + rows, z, mask=rows < D)
        mean = tl.sum(total, axis=0) / D
        tl.debug_barrier()

        # LayerNorm in two passes: the mean first, then the squares about it
        squares = tl.zeros((BLOCK_D,), tl.float32)
        for d in range(0, D, BLOCK_D):
            cols = d + tl.arange(0, BLOCK_D)
            z = tl.load(query_ptr + cols, mask=cols < D, other=0.0)
            squares += tl.where(cols < D, (z - mean) * (z - mean), 0.0)
        deviation = tl.sqrt(tl.sum(squares, axis=0) / D + eps)
        for d in range(0, D, BLOCK_D):
            cols = d + tl.arange(0, BLOCK_D)
            in_cols = cols < D
            z = tl.load(query_ptr + cols, mask=in_cols, other=0.0)
            # weight, bias [BLOCK_D]
            weight = tl.load(norm_weight_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
            bias = tl.load(norm_bias_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
            tl.store(query_ptr + cols, (z - mean) / deviation * weight + bias, mask=in_cols)
        tl.debug_barrier()
    else:
        query_ptr = pooled_ptr

    for k in range(0, K, BLOCK_K):
        rows = k + tl.arange(0, BLOCK_K)
        # scores [BLOCK_K] = keys [BLOCK_K, D] query [D]
        scores = _products(keys_ptr, query_ptr, rows, K, D, BLOCK_K, BLOCK_D, COSINE)
        tl.store(scores_ptr + b * K + rows, scores / divisor, mask=rows < K)
    if weights_ptr is not None:
        tl.debug_barrier()
        _gated_row(
            scores_ptr + b * K, weights_ptr + b * K, K, top_k, threshold,
            KEYS, BLOCK_K, GATE, SPARSE, RANKED, SCALED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["K"])
def _task_scores_kernel(
    pooled_ptr, down_ptr, up_ptr, keys_ptr, hidden_ptr, scores_ptr,
    D, H, W, K, divisor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """scores[b, k] = keys[k] . SiLU(up[k] SiLU(down[k] pooled[b])) / divisor; one per program.

    W is the width of the keys. hidden [B, K, H] is float32 scratch of this program.
    """
    b = tl.program_id(0).to(tl.int64) // K
    k = tl.program_id(0).to(tl.int64) % K
    pooled_ptr += b * D
    down_ptr += k * H * D
    up_ptr += k * W * H
    keys_ptr += k * W
    hidden_ptr += (b * K + k) * H
    for h in range(0, H, BLOCK_M):
        rows = h + tl.arange(0, BLOCK_M)
        # hidden [BLOCK_M] = down [BLOCK_M, D] pooled [D], then SiLU
        hidden = _products(down_ptr, pooled_ptr, rows, H, D, BLOCK_M, BLOCK_N)
        tl.store(hidden_ptr + rows, hidden / (1.0 + tl.exp(-hidden)), mask=rows < H)
    tl.debug_barrier()

    # [BLOCK_M], summed over at the end
    products = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    key_squares = tl.zeros((BLOCK_M,), tl.float32)
    for w in range(0, W, BLOCK_M):
        rows = w + tl.arange(0, BLOCK_M)
        # query [BLOCK_M] = up [BLOCK_M, H] hidden [H], then SiLU; zero beyond W
        query = _products(up_ptr, hidden_ptr, rows, W, H, BLOCK_M, BLOCK_H)
        query = query / (1.0 + tl.exp(-query))
        key = tl.load(keys_ptr + rows, mask=rows < W, other=0.0).to(tl.float32)
        products += query * key
        squares += query * query
        key_squares += key * key
    score = tl.sum(products, axis=0)
    if COSINE:
        score = cosines(score, tl.sum(squares, axis=0), tl.sum(key_squares, axis=0))
    tl.store(scores_ptr + b * K + k, score / divisor)


@triton.jit(do_not_specialize=["K", "top_k"])
def _gate_kernel(
    scores_ptr, weights_ptr, K, top_k, threshold,
    KEYS: tl.constexpr, BLOCK_K: tl.constexpr, GATE: tl.constexpr, SPARSE: tl.constexpr,
    RANKED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """weights[b] from scores[b]."""
    b = tl.program_id(0).to(tl.int64)
    _gated_row(
        scores_ptr + b * K, weights_ptr + b * K, K, top_k, threshold,
        KEYS, BLOCK_K, GATE, SPARSE, RANKED, SCALED,
    )  # fmt: skip


def route_scores_fwd(
    rows: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    divisor: float,
    similarity: str = "dot",
) -> Tensor:
    """Scores of every key for each row.

    Args:
        rows: Pooled embeddings or tokens of shape `[N, D]`, float32, float16 or bfloat16.
        keys: Of shape `[K, D]`, with `TaskProjections` of any width; any of these dtypes.
        projection: The projection to queries in any of these dtypes and of any width; None for the
            identity.
        divisor: What the similarities are divided by.
        similarity: "dot" or "cosine".

    Returns:
        Of shape `[N, K]`, float32, computed in float32 throughout.

    Raises:
        ValueError: if the tensors are not on a CUDA device (unless the interpreter runs).
    """
    scores, _ = _planned(rows, keys, projection, divisor, similarity, None)
    return cast(Tensor, scores)


def route_fwd(
    rows: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    divisor: float,
    top_k: int | None,
    threshold: float | None,
    gate: str = "softmax",
    similarity: str = "dot",
    renormalize: bool = True,
) -> Tensor:
    """Weights of every adapter for each row, from its scores.

    Args:
        rows, keys, projection, divisor, similarity: As in `route_scores_fwd`.
        top_k: Weights that each row keeps; None for all.
        threshold: Weights below it are dropped, except the largest; None for 0.
        gate: As in `ops.route`.
        renormalize: Whether the kept weights are scaled to sum to 1.

    Returns:
        Of shape `[N, K]`, float32.

    Raises:
        ValueError: as in `route_scores_fwd`.
    """
    kind = Gate(gate, top_k, threshold, renormalize)
    _, weights = _planned(rows, keys, projection, divisor, similarity, kind)
    return cast(Tensor, weights)


def _planned(
    rows: Tensor,
    keys: Tensor,
    projection: AnyProjection,
    divisor: float,
    similarity: str,
    gate: Gate | None,
) -> Results:
    """Scores and, with a gate, weights; a plan gives the last of them alone."""

    def compute() -> Results:
        shape = rows.shape[0], keys.shape[0]
        if projection is None and tokens.serves(*shape):
            return tokens.route_tokens(rows, keys, divisor, similarity == "cosine", gate)
        scores = rows.new_empty(shape, dtype=torch.float32)
        weights = None if gate is None else torch.empty_like(scores)
        if scores.numel():
            given = divisor, similarity == "cosine", gate, scores, weights
            if isinstance(projection, TaskProjections):
                _launch_tasks(rows, keys, projection, *given)
            else:
                _launch(rows, keys, projection, *given)
        return [scores, weights]

    factors, eps = () if projection is None else projection[:4], getattr(projection, "eps", None)
    options = "route", type(projection), eps, divisor, similarity, gate
    return planned(options, [rows, keys, *factors], [gate is None, gate is not None], compute)


def _launch(
    rows: Tensor,
    keys: Tensor,
    projection: QueryProjection | None,
    divisor: float,
    cosine: bool,
    gate: Gate | None,
    scores: Tensor,
    weights: Tensor | None,
) -> None:
    """Fills `scores` [N, K], and `weights` [N, K] if there is a gate."""
    (N, D), K = rows.shape, keys.shape[0]
    factors: list[Tensor | None] = [None] * 4
    hidden = query = None
    H, eps = 1, 0.0
    if projection is not None:
        factors = [t.contiguous() for t in projection[:4]]
        H, eps = projection.down.shape[0], projection.eps
        hidden = scores.new_empty((N, H))
        query = scores.new_empty((N, D))
    # As much in flight as the registers hold: fewer elements if they are wide or load singly.
    itemsize = max(t.element_size() for t in (keys, *factors) if t is not None)
    block_m, block_d = (128, 512) if itemsize == 2 and D % 16 == 0 else (64, 128)
    block_n = 128
    if _is_interpreted(rows):
        block_m, block_n, block_d = 16, 16, 32
    with torch.cuda.device_of(rows):
        launch(
            _route_kernel,
            (N,),
            rows.contiguous(),
            *factors,
            keys.contiguous(),
            hidden,
            query,
            scores,
            weights,
            D,
            H,
            K,
            eps,
            divisor,
            *_kept(gate, K),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_H=min(block_n, triton.next_power_of_2(H)),
            BLOCK_D=min(block_d, triton.next_power_of_2(D)),
            COSINE=cosine,
            **_row_options(rows, gate, K),
        )


def _launch_tasks(
    rows: Tensor,
    keys: Tensor,
    projection: TaskProjections,
    divisor: float,
    cosine: bool,
    gate: Gate | None,
    scores: Tensor,
    weights: Tensor | None,
) -> None:
    """The same in a launch for the scores and one for the weights."""
    (N, D), (K, W), H = rows.shape, keys.shape, projection.down.shape[1]
    hidden = scores.new_empty((N, K, H))
    block_m, block_n = (16, 16) if _is_interpreted(rows) else (64, 128)
    with torch.cuda.device_of(rows):
        launch(
            _task_scores_kernel,
            (N * K,),
            rows.contiguous(),
            projection.down.contiguous(),
            projection.up.contiguous(),
            keys.contiguous(),
            hidden,
            scores,
            D,
            H,
            W,
            K,
            divisor,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_H=min(block_n, triton.next_power_of_2(H)),
            COSINE=cosine,
            num_warps=8,
        )
        if gate is not None:
            options = _row_options(rows, gate, K)
            launch(_gate_kernel, (N,), scores, weights, K, *_kept(gate, K), **options)


def _is_interpreted(rows: Tensor) -> bool:
    return common.device_traits(rows.device).capability == 0


def _kept(gate: Gate | None, count: int) -> tuple[int, float]:
    """The kernels' top_k and threshold."""
    if gate is None:
        return count, 0.0
    return min(gate.top_k or count, count), gate.threshold or 0.0


def _row_options(rows: Tensor, gate: Gate | None, count: int) -> dict[str, Any]:
    """The keyword arguments of a launch that ends with the weights of a row."""
    # Two sizes only: a pool that grows should not recompile.
    keys = 64 if count <= 64 else max(1024, triton.next_power_of_2(count))
    return {
        "KEYS": 1 if gate is None else keys,
        "BLOCK_K": 4 if _is_interpreted(rows) else 16,
        "num_warps": 16,
        "maxnreg": 128,  # all that 16 warps can have; left to itself ptxas takes 64 and spills
        **gate_options(gate or Gate(), count),
    }
