"""The gradient of the maximum: sums over samples that share a winner."""

import pytest
import torch
from kernel_traffic import counted

pytest.importorskip("triton")

from sapt_fast.triton_kernels.pool_tokens import pool_tokens_bwd

VOCABULARY = 3


def backward(dy, winner):
    ids = torch.zeros(len(dy), 2).long()
    return pool_tokens_bwd(dy, ids, None, winner, VOCABULARY, "max")


def test_shared_winners_are_summed():
    # From -1, no token, to V, out of the table; one column has a single winner, one has none.
    winner = torch.randint(-1, VOCABULARY + 1, (9, 17), dtype=torch.int32)
    winner[:, 3], winner[:, 4] = 2, -1
    dy = torch.randn(9, 17)
    dy[winner < 0] = torch.nan
    d_table = backward(dy, winner)
    for v in range(VOCABULARY):
        expected = dy.double().masked_fill(winner != v, 0.0).sum(0)
        torch.testing.assert_close(d_table[v].double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(d_table, backward(dy, winner))


def test_bytes_grow_with_the_samples():
    """Not with their square, whether samples share a winner or not."""
    for winner in (torch.zeros(1, 16).int(), torch.arange(16)[None].int() % VOCABULARY):
        totals = []
        for samples in (8, 16):
            with counted() as recorder:
                backward(torch.randn(samples, 16), winner.repeat(samples, 1))
            totals.append(sum(b.total for b in recorder.traffic({}).reads.values()))
        assert totals[1] <= 2.1 * totals[0]
