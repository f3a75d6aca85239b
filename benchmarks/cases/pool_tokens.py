"""Op `pool_tokens`: sizes, traffic and launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from op_case import Draw, Inputs, NewTensor, OpCase
from passes import INT64, Pass, Passes, Row
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops import pool_tokens


@dataclass(frozen=True)
class PoolCase(OpCase):
    """The maximum over the embeddings of token ids; no two tokens are equal in any column."""

    batch: int
    tokens: int
    width: int
    vocabulary: int
    op: str = "pool_tokens"
    trains: tuple[str, ...] = ("table",)

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        draw = Draw(dtype, device)
        ids = draw.integers(self.vocabulary, self.batch, self.tokens)
        return {"ids": ids, "table": draw.table(self.vocabulary, self.width)}

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        return {"pooled": pool_tokens(inputs["ids"], inputs["table"], backend=backend)}

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        ids, table = inputs.values()
        return {"torch": lambda: table[ids].amax(1)}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        return self.batch * self.tokens * (8 + self.width * dtype.itemsize)


CHECKED = (PoolCase(8, 512, 1024, 256), PoolCase(3, 77, 100, 250))
CHECKED_QUICK = (PoolCase(2, 9, 48, 90),)
CPU_CHECKED = (PoolCase(3, 77, 100, 250), PoolCase(8, 128, 1024, 250))
CPU_TIMED = (
    (PoolCase(8, 512, 1024, 32128), torch.float32),
    (PoolCase(8, 512, 1024, 32128), torch.bfloat16),
)
CPU_TIMED_QUICK = ((CHECKED_QUICK[0], torch.float32),)


# --- traffic -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Sizes of one pooling of token ids [B, T] of a table [V, D].

    Attributes:
        distinct: different ids among those that take part; None for all different.
        kept: tokens that take part; None for all.
        splits: ranges into which the tokens of a sample are cut.
        itemsize: of the table.
    """

    b: int
    t: int
    d: int
    vocabulary: int = 32128
    distinct: int | None = None
    kept: int | None = None
    masked: bool = False
    splits: int = 1
    itemsize: int = 2

    @property
    def tokens(self) -> int:
        """Tokens that take part."""
        return self.b * self.t if self.kept is None else self.kept

    @property
    def rows(self) -> int:
        """Rows of the table that are read."""
        return min(self.tokens, self.vocabulary) if self.distinct is None else self.distinct


def pool_forward(c: Pool, winner: bool = False) -> Passes:
    """Reads an id per token and each row of the table once; B T D is not stored.

    A row whose id several tokens have is read for each of them.
    With several splits their float32 results go through memory to a second pass. One comparison
    or addition per element of B T D.
    """
    part = c.splits > 1
    lines = c.b * c.splits * c.d
    reads = {
        "ids": INT64 * c.tokens,
        "table": c.rows * c.d * c.itemsize,
        **({"mask": INT64 * c.b * c.t} if c.masked else {}),
    }
    result = {"pooled": c.b * c.d * c.itemsize, **({"winner": 4 * c.b * c.d} if winner else {})}
    again = {"table": (c.tokens - c.rows) * c.d * c.itemsize}
    if not part:
        return [Pass("pool", reads, result, c.tokens * c.d, rereads=again)]
    parts = {"part": 4 * lines, "count": 4 * c.b * c.splits}
    if winner:
        parts["part_winner"] = 4 * lines
    return [
        Pass("pool", reads, parts, c.tokens * c.d, rereads=again),
        Pass("merge", parts, result, lines),
    ]


def pool_backward(c: Pool, pooling: str, elements: int | None = None) -> Passes:
    """A zero table, and the sums of dy over it.

    "max" sorts the winners of each column and adds B D elements of dy in their order, one sum per
    distinct winner: at most B D, `elements`, different places. A place of the order reads the
    winners at the one before and, where a sum begins, of up to 16 places from there on.
    "mean" sorts the ids and adds B T rows of dy in their order, one sum per distinct id.
    """
    dy = {"dy": c.b * c.d * c.itemsize}
    zero = Pass("zero", {}, {"d_table": c.vocabulary * c.d * c.itemsize}, library=True)
    if pooling == "max":
        places = c.b * c.d if elements is None else elements
        winner, order = {"winner": 4 * c.b * c.d}, {"order": INT64 * c.b * c.d}
        ordered = {"sorted": 4 * c.b * c.d}
        again = {"dy": 0, "sorted": 4 * ((c.b - 1) * c.d + min(c.b, 16) * places)}
        return [
            zero,
            Pass("sort", winner, {**ordered, **order}, library=True),
            Pass(
                "max grad",
                {**dy, **ordered, **order},
                {"d_table": places * c.itemsize},
                c.b * c.d,
                rereads=again,
            ),
        ]
    ids = INT64 * c.b * c.t
    return [
        zero,
        Pass("sort", {"ids": ids}, {"sorted": ids, "order": ids, "end": ids}, library=True),
        Pass(
            "mean grad",
            {**dy, "sorted": ids, "order": INT64 * c.tokens, "end": ids, "share": 4 * c.b},
            {"d_table": c.rows * c.d * c.itemsize},
            2 * c.tokens * c.d,
            rereads={"dy": (c.tokens - c.b) * c.d * c.itemsize},
        ),
    ]


def roofline() -> Iterable[Row]:
    """Both poolings."""
    pool, sizes = Pool(8, 512, 1024), "B 8, T 512, D 1024"
    yield Row("pool_tokens forward", sizes, pool_forward(pool))
    for pooling in ("max", "mean"):
        yield Row(f"pool_tokens backward, {pooling}", sizes, pool_backward(pool, pooling))


# --- launches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Sizes of one batch of token ids."""

    name: str
    batch: int
    tokens: int
    d: int
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """Both poolings with and without a mask, and their backward."""
        kernels = dispatch.kernels("pool_tokens", "triton")
        ids, mask = (tensor(self.batch, self.tokens, dtype=torch.int64) for _ in range(2))
        table = tensor(32128, self.d)
        for given in (None, mask):
            for pooling in ("max", "mean"):
                kernels.pool_tokens_fwd(ids, table, given, pooling)
            pooled, winner = kernels.pool_tokens_fwd(ids, table, given, "max", keep_winner=True)
        for pooling in ("max", "mean"):
            kernels.pool_tokens_bwd(pooled, ids, mask, winner, 32128, pooling)


LAUNCHES = (
    Launch("router", 8, 512, 1024, quick=True),
    Launch("router, d4096", 8, 1024, 4096),
    Launch("router, short", 64, 16, 1024),
    Launch("router, wide bottleneck", 8, 512, 1024),
    Launch("router, float16", 8, 512, 1024, dtype=torch.float16),
    Launch("router, float32", 8, 512, 1024, dtype=torch.float32),
    Launch("router, odd width", 3, 50, 100, aligned=False),
)
