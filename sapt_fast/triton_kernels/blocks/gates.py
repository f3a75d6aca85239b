"""Weights from scores inside a kernel: see `ops.gates` for what is computed."""
# ruff: noqa: N803 - kernel arguments keep the letters of the formulas
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from sapt_fast.ops.gates import GATES, Gate
from sapt_fast.ops.queries import COSINE_EPS

# Their places in GATES.
_SOFTMAX: tl.constexpr = tl.constexpr(0)
_SIGMOID: tl.constexpr = tl.constexpr(1)
_ABS_SIGMOID: tl.constexpr = tl.constexpr(2)
_EPS: tl.constexpr = tl.constexpr(COSINE_EPS)


def gate_options(gate: Gate, count: int) -> dict[str, object]:
    """Returns the keyword arguments of a launch that gates `count` scores."""
    sparse = gate.is_sparse(count)
    return {
        "GATE": GATES.index(gate.kind),
        "SPARSE": sparse,
        "RANKED": gate.top_k is not None and gate.top_k < count,
        # A softmax sums to 1 already.
        "SCALED": gate.renormalize and (sparse or gate.kind != "softmax"),
    }


@triton.jit
def cosines(products, squares, other_squares):
    """Products divided by both norms, from their squares."""
    norms = tl.maximum(tl.sqrt(squares), _EPS, tl.PropagateNan.ALL)
    return products / norms / tl.maximum(tl.sqrt(other_squares), _EPS, tl.PropagateNan.ALL)


@triton.jit
def activated(scores, inside, AXIS: tl.constexpr, GATE: tl.constexpr):
    """The weights of scores along an axis, before any are dropped; zero outside."""
    if GATE == _SOFTMAX:
        # The largest is subtracted before exp.
        scores = tl.where(inside, scores, float("-inf"))
        weights = tl.exp(scores - tl.expand_dims(tl.max(scores, axis=AXIS), AXIS))
        weights = weights / tl.expand_dims(tl.sum(weights, axis=AXIS), AXIS)
    elif GATE == _SIGMOID:
        weights = 1.0 / (1.0 + tl.exp(-scores))
    elif GATE == _ABS_SIGMOID:
        weights = _tanh(tl.abs(scores) * 0.5)
    else:
        # Not tl.maximum alone, which may give -0.
        weights = tl.maximum(scores, 0.0, tl.PropagateNan.ALL) + 0.0
    return tl.where(inside, weights, 0.0)


@triton.jit
def _tanh(t):
    """tanh of t >= 0, to 2 units in the last place: near 0 a polynomial, which does not cancel."""
    s = t * t
    series = 1.57394409e-2 * s - 5.23025580e-2
    series = series * s + 1.33152470e-1
    series = series * s - 3.33327681e-1
    power = tl.exp(-2.0 * t)
    return tl.where(t < 0.55, series * s * t + t, 1.0 - 2.0 * power / (1.0 + power))


@triton.jit
def scaled(weights, AXIS: tl.constexpr):
    """Weights that sum to 1 along an axis, or are all zero."""
    total = tl.expand_dims(tl.sum(weights, axis=AXIS), AXIS)
    return weights / tl.where(total == 0.0, 1.0, total)
