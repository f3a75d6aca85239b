"""The bytes of `cases.pool_tokens` are those that the kernels move, tensor by tensor."""

import pytest
import torch
from cases.pool_tokens import Pool, pool_backward, pool_forward
from kernel_traffic import check, check_rereads

from sapt_fast.triton_kernels.pool_tokens import pool_tokens_bwd, pool_tokens_fwd


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_pool_tokens(pooling, masked):
    b, t, d, vocabulary = 5, 13, 37, 23
    ids, table = torch.randint(0, vocabulary, (b, t)), torch.randn(vocabulary, d).half()
    mask = (torch.rand(b, t) > 0.3).long() if masked else None
    taken = ids if mask is None else ids[mask != 0]
    c = Pool(
        b, t, d, vocabulary=vocabulary, distinct=taken.unique().numel(), kept=taken.numel(),
        masked=masked,
    )  # fmt: skip
    inputs = {"ids": ids, "table": table, **({"mask": mask} if masked else {})}
    keep = pooling == "max"

    def forward():
        return dict(
            zip(("pooled", "winner"), pool_tokens_fwd(ids, table, mask, pooling, keep), strict=True)
        )

    # The winners' ids are read once more, for a column each.
    passes = pool_forward(c, keep)
    check_rereads(check(forward, inputs, passes, {}), passes)

    dy, winner = torch.randn(b, d).half(), forward()["winner"]
    inputs = {"dy": dy, **({"winner": winner} if keep else {})}
    places = None
    if keep:
        places = (winner.long() * d + torch.arange(d)).unique().numel()
    passes = pool_backward(c, pooling, places)

    def backward():
        return {"d_table": pool_tokens_bwd(dy, ids, mask, winner, vocabulary, pooling)}

    check_rereads(check(backward, inputs, passes, {}), passes)


def test_pool_tokens_in_splits(four_multiprocessors):
    ids, table = torch.randint(0, 9, (2, 29)), torch.randn(9, 12).half()
    c = Pool(2, 29, 12, distinct=ids.unique().numel(), splits=4)
    for pooling, keep in (("mean", False), ("max", True)):

        def forward(pooling=pooling, keep=keep):
            pooled, winner = pool_tokens_fwd(ids, table, None, pooling, keep)
            return {"pooled": pooled, "winner": winner}

        passes = pool_forward(c, keep)
        traffic = check(forward, {"ids": ids, "table": table}, passes, {})
        check_rereads(traffic, passes)


def test_an_unread_byte_is_seen():
    """Of a table one row too many in the formula."""
    ids, table = torch.tensor([[0, 2, 2], [1, 0, 0]]), torch.randn(5, 8).half()
    for rows, fits in ((3, True), (4, False)):
        c = Pool(2, 3, 8, distinct=rows)

        def call():
            return {"pooled": pool_tokens_fwd(ids, table, None, "max")[0]}

        if fits:
            check(call, {"ids": ids, "table": table}, pool_forward(c), {})
        else:
            with pytest.raises(AssertionError, match="table"):
                check(call, {"ids": ids, "table": table}, pool_forward(c), {})
