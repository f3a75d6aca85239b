"""Clusters of edited prompts, each of which names a block of LoRA.

(MELO, AAAI 2024: "neuron-indexed dynamic LoRA".)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sapt_fast.ops import nearest_key
from sapt_fast.pools.codebook import Exact, Found, differences, resize, rows_of, without

__all__ = ["Clusters"]


class Clusters(Exact):
    """The points of the edits, and balls around them.

    In the order of the edits, a point joins the cluster with the nearest centre if it is inside its
    ball, and else begins one. The centre is the mean of the points. The ball's radius is the
    distance to the farthest of them, and at least `radius`.

    Args:
        width: D.
        any_width: whether points of another width can be loaded.
        radius: the smallest radius of a ball.
        device: of the buffers.

    Attributes:
        points: [P, D] float32.
        edits: [P] int64, ascending, the edit of each point.
        blocks: [P] int64, the block that acts near the point.
        replaced_by: [P] int64, a later edit of the same prompt, whose point counts; -1: none.
        hits: [P] int64, how many prompts the point has acted on.
    """

    points: Tensor
    edits: Tensor
    blocks: Tensor
    replaced_by: Tensor
    hits: Tensor

    def __init__(self, width: int, any_width: bool, radius: float, device: torch.device) -> None:
        super().__init__()
        self.any_width = any_width
        self.radius = radius
        empty: Any = partial(torch.empty, device=device)
        self.register_buffer("points", empty(0, width, dtype=torch.float32))
        for name in ("edits", "blocks", "replaced_by", "hits"):
            self.register_buffer(name, empty(0, dtype=torch.int64))
        self._balls: tuple[Tensor, Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self.edits.shape[0]

    @torch.no_grad()
    def find(self, query: Tensor) -> Found:
        """Finds the nearest cluster of each query [M, D], and in it the nearest point."""
        query = query.float()
        centres, radii, member = self.balls()
        cluster, _ = nearest_key(query, centres, radii)
        inside = member[None] == cluster.clamp(min=0)[:, None]  # [M, P]
        if len(self) == 0:
            none = torch.full_like(cluster, -1)
            return Found(none, query.new_full(none.shape, float("inf")), none >= 0)
        pairs = differences(query, self.points)
        distance, row = torch.where(inside, pairs, float("inf")).min(1)
        return Found(row, distance, cluster >= 0)

    def blocks_of(self, edits: Tensor) -> Tensor:
        """Returns the blocks [M] of edits [M]; -1 for -1 and for edits that are gone."""
        rows = rows_of(self.edits, edits)
        return rows if len(self) == 0 else torch.where(rows >= 0, self.blocks[rows], -1)

    def balls(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns centres [C, D] and radii [C] of the clusters, and the cluster [P] of each point.

        The cluster of a point that does not count is -1.
        """
        if self._balls is None:
            points = self.points
            self._balls = self._joined((points[:0], points.new_empty(0), self.edits[:0]))
        return self._balls

    def strays(self) -> list[int]:
        """Returns edits whose points are now nearer to the centre of another cluster."""
        centres, radii, member = self.balls()
        nearest, _ = nearest_key(self.points, centres, torch.full_like(radii, math.inf))
        strays: list[int] = self.edits[(member >= 0) & (nearest != member)].tolist()
        return strays

    def _joined(self, before: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the balls, given those of the first points."""
        centres, radii, member = before
        points, first = self.points, member.shape[0]
        member = torch.cat([member, torch.full_like(self.edits[first:], -1)])
        radii, centres = radii.clone(), centres.clone()
        for row in (self.replaced_by[first:] < 0).nonzero().flatten().tolist():
            row += first
            found, _ = nearest_key(points[row : row + 1], centres, radii)
            cluster = int(found)
            if cluster < 0:
                cluster = centres.shape[0]
                centres = torch.cat([centres, points[row : row + 1]])
                radii = torch.cat([radii, radii.new_full((1,), self.radius)])
            member[row] = cluster
            its = points[member == cluster]
            centres[cluster] = its.mean(0)
            radii[cluster] = (its - centres[cluster]).norm(dim=1).max().clamp(min=self.radius)
        return centres, radii, member

    def add(self, points: Tensor, edits: Tensor, block: int) -> None:
        """Adds points [M, D] of edits [M] near which a block acts."""
        none, before = torch.full_like(edits, -1), self._balls
        self._set(
            points=torch.cat([self.points, points.to(self.points)]),
            edits=torch.cat([self.edits, edits]),
            blocks=torch.cat([self.blocks, torch.full_like(edits, block)]),
            replaced_by=torch.cat([self.replaced_by, none]),
            hits=torch.cat([self.hits, torch.zeros_like(edits)]),
        )
        self._balls = None if before is None else self._joined(before)

    def replace(self, old: int, new: int) -> None:
        """Lets the point of edit `new` count instead of that of edit `old`."""
        self._set(replaced_by=torch.where(self.edits == old, new, self.replaced_by))

    def remove(self, edit: int) -> None:
        """Removes the point of an edit; that which it replaced counts, unless a later one does."""
        kept = self.edits != edit
        replaced_by = without(self.replaced_by, self.edits, edit)
        self._set(
            points=self.points[kept],
            edits=self.edits[kept],
            blocks=self.blocks[kept],
            replaced_by=replaced_by[kept],
            hits=self.hits[kept],
        )

    def _set(self, **buffers: Tensor) -> None:
        for name, value in buffers.items():
            setattr(self, name, value)
        self._balls = None

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        resize(self, state_dict, prefix, {"points"} if self.any_width else set())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._balls = None
