"""Op `route`: sizes, traffic and launches; its case begins with the pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from op_case import Draw, Inputs, NewTensor, OpCase, Timed
from passes import Pass, Passes, Row
from torch import Tensor

from cases.pool_tokens import Pool, pool_forward
from sapt_fast import dispatch
from sapt_fast.ops import QueryProjection, TaskProjections, pool_tokens, route


@dataclass(frozen=True)
class RouterCase(OpCase):
    """Token ids to weights. No two tokens of the table are equal in any column: which of several
    largest ones gets the gradient of a maximum is not specified."""

    batch: int
    tokens: int
    width: int
    adapters: int
    hidden: int = 100
    op: str = "route"
    trains: tuple[str, ...] = ("table", "keys", "down", "up", "norm_weight", "norm_bias")
    vocabulary: int = 256

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        draw, width = Draw(dtype, device), self.width
        return {
            "ids": draw.integers(self.vocabulary, self.batch, self.tokens),
            "table": draw.table(self.vocabulary, width),
            "keys": draw(self.adapters, width),
            "down": draw(self.hidden, width, scale=width**-0.5),
            "up": draw(width, self.hidden, scale=self.hidden**-0.5),
            "norm_weight": draw(width),
            "norm_bias": draw(width),
        }

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        ids, table, keys, *projection = inputs.values()
        pooling = "triton" if backend == "cuda" else backend  # CUDA has none of its own
        pooled = pool_tokens(ids, table, backend=pooling)
        weights = route(pooled, keys, QueryProjection(*projection), backend=backend)
        return {"weights": weights}

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        return {"torch": lambda: self.run(inputs, "reference")}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        parameters = self.width * (self.adapters + 2 * self.hidden + 2)
        return self.batch * self.tokens * (8 + self.width * dtype.itemsize) + (
            parameters * dtype.itemsize
        )


CHECKED = (RouterCase(8, 512, 1024, 15), RouterCase(3, 77, 100, 7, hidden=13))
CHECKED_QUICK = (RouterCase(2, 9, 48, 5, hidden=16),)
TIMED = (Timed(CHECKED[0], CHECKED_QUICK[0], "router", graph_milliseconds=0.012),)


# --- traffic -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """Sizes from pooled embeddings [B, D] to weights [B, K].

    Attributes:
        itemsize: of every parameter.
        tile: rows of the bottleneck that are multiplied at a time.
    """

    b: int
    d: int
    hidden: int = 100
    keys: int = 15
    itemsize: int = 2
    tile: int = 128


def head_forward(c: Head, ranked: bool = False) -> Passes:
    """From the pooled embedding to the weights: 2 B (2 H D + K D) FLOPs over the parameters.

    hidden, query and scores of a sample leave a program's registers to be read by its other
    threads: B (H + D + K) float32, and with top-k the weights once more. Each sample reads all
    parameters.
    """
    scratch = {"hidden": 4 * c.b * c.hidden, "query": 4 * c.b * c.d, "scores": 4 * c.b * c.keys}
    weights = {"weights": 4 * c.b * c.keys}
    reads = {
        "pooled": c.b * c.d * c.itemsize,
        **_head_parameters(c),
        **scratch,
        **(weights if ranked else {}),
    }
    flops = 2 * c.b * c.d * (2 * c.hidden + c.keys)
    again = {name: (c.b - 1) * size for name, size in _head_parameters(c).items()}
    again["pooled"] = (-(-c.hidden // c.tile) - 1) * reads["pooled"]
    return [Pass("head", reads, scratch | weights, flops, rereads=again)]


def head_backward(c: Head) -> Passes:
    """Torch's: the query again, then twice its products, and 4 B K D FLOPs for keys and query."""
    parameters = _head_parameters(c)
    weights = 4 * c.b * c.keys
    pooled = c.b * c.d * c.itemsize
    reads = {"pooled": pooled, **parameters, "weights": weights, "d_weights": weights}
    writes = {"d_pooled": pooled, **{f"d_{name}": size for name, size in parameters.items()}}
    flops = 4 * c.b * c.d * (3 * c.hidden + c.keys)
    return [Pass("head grad", reads, writes, flops, library=True)]


def _head_parameters(c: Head) -> dict[str, int]:
    d = c.d * c.itemsize
    return {
        "down": c.hidden * d, "up": c.hidden * d, "norm_weight": d, "norm_bias": d,
        "keys": c.keys * d,
    }  # fmt: skip


def roofline() -> Iterable[Row]:
    """From pooled embeddings, and from token ids."""
    head, sizes = Head(8, 1024), "B 8, D 1024, H 100, K 15"
    yield Row("router head forward", sizes, head_forward(head))
    yield Row("router head backward", sizes, head_backward(head))
    whole = [*pool_forward(Pool(8, 512, 1024)), *head_forward(head)]
    yield Row("router, ids to weights", "B 8, T 512, D 1024, K 15", whole)


# --- launches ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Sizes of one batch of pooled embeddings."""

    name: str
    batch: int
    d: int
    hidden: int
    count: int
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """The scores and the weights, with and without a projection, and one further gate."""
        kernels, d = dispatch.kernels("route", "triton"), self.d
        pooled, keys = tensor(self.batch, d), tensor(self.count, d)
        projection = QueryProjection(
            tensor(self.hidden, d), tensor(d, self.hidden), tensor(d), tensor(d)
        )
        for query in (projection, None):
            kernels.route_scores_fwd(pooled, keys, query, 32.0)
            for top_k, threshold in ((None, None), (None, 0.1), (2, 0.1)):
                kernels.route_fwd(pooled, keys, query, 32.0, top_k, threshold)
        kernels.route_fwd(pooled, keys, projection, 1.0, 2, 0.1, "abs_sigmoid", "cosine", True)


@dataclass(frozen=True)
class TaskLaunch:
    """Sizes of one batch of pooled embeddings, with a projection per task."""

    name: str
    batch: int
    d: int
    hidden: int
    count: int
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """GainLoRA's weights, and the scores."""
        kernels, d, count = dispatch.kernels("route", "triton"), self.d, self.count
        projections = TaskProjections(tensor(count, self.hidden, d), tensor(count, d, self.hidden))
        given = tensor(self.batch, d), tensor(count, d), projections
        kernels.route_scores_fwd(*given, 32.0)
        kernels.route_fwd(*given, 0.25, None, None, "abs_sigmoid", "cosine", False)


@dataclass(frozen=True)
class TokenLaunch:
    """Sizes of a layer's router; its keys may have a dtype of their own."""

    name: str
    tokens: int
    d: int
    count: int
    dtype: torch.dtype = torch.bfloat16
    keys: torch.dtype | None = None
    quick: bool = False
    aligned: bool = True

    def launch(self, tensor: NewTensor) -> None:
        """The scores, MixLoRA's weights, and those of the other gates."""
        kernels = dispatch.kernels("route", "triton")
        x, keys = tensor(self.tokens, self.d), tensor(self.count, self.d)
        if self.keys is not None:
            keys = tensor(self.count, self.d, dtype=self.keys)
        kernels.route_scores_fwd(x, keys, None, 32.0)
        kernels.route_fwd(x, keys, None, 32.0, 2, None)
        kernels.route_fwd(x, keys, None, 1.0, 2, 0.1, "abs_sigmoid", "cosine", True)
        kernels.route_fwd(x, keys, None, 32.0, None, None, "relu", "dot", True)


LAUNCHES = (
    Launch("router", 8, 1024, 100, 15, quick=True),
    Launch("router, d4096", 8, 4096, 100, 15),
    Launch("router, short", 64, 1024, 100, 15),
    Launch("router, wide bottleneck", 8, 1024, 1024, 1000),
    Launch("router, float16", 8, 1024, 100, 15, dtype=torch.float16),
    Launch("router, float32", 8, 1024, 100, 15, dtype=torch.float32),
    Launch("router, odd width", 3, 100, 7, 5, aligned=False),
    TaskLaunch("router per task", 8, 1024, 100, 15, quick=True),
    TaskLaunch("router per task, float32", 8, 1024, 100, 15, dtype=torch.float32),
    TokenLaunch("token router", 16384, 1024, 8, quick=True),
    TokenLaunch("token router, few", 512, 4096, 8),
    TokenLaunch("token router, 100 keys", 16384, 4096, 100),
    TokenLaunch("token router, float32", 16384, 1024, 8, dtype=torch.float32),
    TokenLaunch("token router, float32, 100 keys", 16384, 1024, 100, dtype=torch.float32),
    TokenLaunch("token router, float32 keys", 16384, 1024, 64, keys=torch.float32),
    TokenLaunch("token router, odd width", 16384, 100, 5, aligned=False),
)
