"""Why `FUSED_TF32X3` is not the default of float32: what three tf32 products make, in numpy.

Triton sums one step of the reduction on the matrix unit and adds it to the sum in float32. The
model of the unit is that of Fasi et al. 2021 (doi 10.7717/peerj-cs.330) for sm_80: exact products
of 4 columns, aligned to the largest with one bit more than float32 and cut there.
"""

from __future__ import annotations

import numpy as np
import pytest

F32 = np.float32


def _tf32(x: np.ndarray, half: int) -> np.ndarray:
    """10 bits of mantissa: `half` is 0x1000 to round as cvt.rna does, 0 to cut as the unit does."""
    bits = (x.astype(F32).view(np.uint32) + np.uint32(half)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), bits.view(F32), x).astype(F32)


def _toward_zero(value: np.ndarray) -> np.ndarray:
    nearest = value.astype(F32)
    return np.where(
        np.abs(nearest.astype(float)) > np.abs(value), np.nextafter(nearest, F32(0)), nearest
    )


def _matrix_unit(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """acc + a b, of a [M, K] and b [K, N]."""
    for k in range(0, a.shape[1], 4):
        products = a[:, k : k + 4, None].astype(float) * b[None, k : k + 4].astype(float)
        largest = np.maximum(np.abs(products).max(1), np.abs(acc))
        if np.isfinite(largest).all():
            unit = np.exp2(np.floor(np.log2(np.maximum(largest, 1e-40))) - 24)
            cut = np.trunc(products / unit[:, None]).sum(1) + np.trunc(acc / unit)
            acc = _toward_zero(cut * unit)
        else:
            acc = (products.sum(1) + acc).astype(F32)
    return acc.astype(F32)


def _tf32x3(a: np.ndarray, b: np.ndarray, step: int = 32) -> np.ndarray:
    total = np.zeros((a.shape[0], b.shape[1]), F32)
    with np.errstate(all="ignore"):
        (high_a, high_b) = (_tf32(x, 0x1000) for x in (a, b))
        low_a, low_b = _tf32(a - high_a, 0), _tf32(b - high_b, 0)
        for k in range(0, a.shape[1], step):
            s = slice(k, k + step)
            acc = _matrix_unit(low_a[:, s], high_b[s], np.zeros_like(total))
            acc = _matrix_unit(high_a[:, s], low_b[s], acc)
            total += _matrix_unit(high_a[:, s], high_b[s], np.where(np.isnan(acc), F32(0), acc))
    return total


def _float32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One multiplication and addition after the other, as a thread of a float32 product does."""
    total = np.zeros((a.shape[0], b.shape[1]), F32)
    for k in range(a.shape[1]):
        total = (a[:, k, None].astype(float) * b[k].astype(float) + total).astype(F32)
    return total


def _ratio(depth: int, mean: float) -> float:
    """Error of three tf32 products over that of float32."""
    rng = np.random.default_rng(depth)
    a = (rng.standard_normal((16, depth)) + mean).astype(F32)
    b = (rng.standard_normal((depth, 16)) + mean).astype(F32)
    exact = a.astype(float) @ b.astype(float)
    errors = [np.linalg.norm(product(a, b) - exact) for product in (_tf32x3, _float32)]
    return float(errors[0] / errors[1])


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("depth", [64, 100, 257, 1024])
def test_long_sums_are_as_good_as_float32(depth: int, mean: float) -> None:
    assert _ratio(depth, mean) < 2


@pytest.mark.parametrize(("depth", "mean"), [(1, 0.0), (1, 3.0), (33, 3.0)])
def test_short_sums_are_not(depth: int, mean: float) -> None:
    assert _ratio(depth, mean) > 2


def test_extreme_factors_do_not_all_come_through() -> None:
    def product(x: float, y: float) -> float:
        return float(_tf32x3(np.array([[x]], F32), np.array([[y]], F32))[0, 0])

    assert product(np.inf, 1.5) == np.inf
    assert product(-np.inf, 1 / 3) == -np.inf
    assert np.isnan(product(np.nan, 1.0))
    assert np.isnan(product(np.inf, 0.0))
    # float32 says 3.4e38, infinity and 1e-13
    assert product(float(np.finfo(F32).max), 1.0) == np.inf
    assert np.isnan(product(1e-43, np.inf))
    assert product(1e-43, 1e30) == 0
