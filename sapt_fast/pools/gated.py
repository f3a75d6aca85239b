"""The experts of one linear layer and the gate that weighs them for each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sapt_fast.ops import transforms
from sapt_fast.ops._common import compute_dtype
from sapt_fast.ops.gates import Gate, balance_loss, gate_fwd
from sapt_fast.ops.mix_experts import mix_experts
from sapt_fast.ops.mixed_lora import mix
from sapt_fast.ops.projection import PooledProjection, Projection
from sapt_fast.ops.rank_table import rank_table
from sapt_fast.ops.route import route, route_scores
from sapt_fast.pools.lora import AdapterPool

__all__ = ["Experts", "GatedPool"]

# On a CPU, the chosen experts alone are computed if there are so many for each chosen one: measured
# by benchmarks/gated.py. With fewer rows than this, the mixture of all skips what has no weight.
_SPARSE_RATIO = 6
_SPARSE_ROWS = 65


@dataclass(frozen=True)
class Experts:
    """Shape of a layer's experts and how they are weighed.

    Attributes:
        count: K.
        rank: r of each expert.
        scaling: alpha / r.
        shared_a: whether all experts have one A.
        gate: how scores become weights.
        jitter: width of the noise on the router's input in training: a factor in 1 +- jitter.
        init_deviation: standard deviation of the router's start values; None for those of
            `nn.Linear`.
    """

    count: int
    rank: int
    scaling: float
    shared_a: bool
    gate: Gate
    jitter: float = 0.0
    init_deviation: float | None = None


class GatedPool(AdapterPool):
    """K experts, all of which train, and a router that weighs them for each token.

        w = gate(x R^T)    delta = scaling sum_k w_k (x A_k^T) B_k

    Args:
        in_features, out_features: I and O of the layer.
        experts: their shape, and the gate.
        reads_encoder: whether the layer's input are the encoder's tokens.
        device, dtype: of A and B.

    Attributes:
        a: the stacked A, [K r, I]; a shared A is [r, I].
        b: the stacked B, transposed, [K r, O].
        router: R, [K, I], in float32 (float64 after `model.double()`).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        experts: Experts,
        *,
        reads_encoder: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        rows = experts.count * experts.rank
        rows_a = experts.rank if experts.shared_a else rows
        super().__init__(in_features, out_features, reserve=rows_a, device=device, dtype=dtype)
        self.experts = experts
        self.reads_encoder = reads_encoder
        self.a.append(rows_a, lambda fresh: nn.init.kaiming_uniform_(fresh, a=5**0.5))
        self.b.append(rows, nn.init.zeros_)
        self.ranks = (experts.rank,) * experts.count
        self.scaling = (experts.scaling,) * experts.count
        like = self.a.trainable
        wide = torch.promote_types(like.dtype, torch.float32)
        self.router = nn.Parameter(like.new_empty(experts.count, in_features, dtype=wide))
        if experts.init_deviation is None:
            nn.init.kaiming_uniform_(self.router, a=5**0.5)
        else:
            nn.init.normal_(self.router, std=experts.init_deviation)

    # --- the gate ---

    def weights(
        self, x: Tensor, balanced: bool = False, counted: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the weights of a layer's input, one row for each token.

        Args:
            x: [..., I], M tokens.
            balanced: whether to compute the balance loss.
            counted: [M], zero for tokens that it leaves out; None for none.

        Returns:
            weights [M, K] in float32 or wider, and the balance loss, a scalar, or None.
        """
        rows = x.reshape(-1, x.shape[-1])
        gate, jitter = self.experts.gate, self.experts.jitter
        if jitter and self.training:
            noise = torch.empty_like(rows, dtype=self.router.dtype)
            rows = rows * noise.uniform_(1 - jitter, 1 + jitter)
        if not balanced:
            weights = route(
                rows, self.router, None, pooling="none", temperature=1.0, gate=gate.kind,
                top_k=gate.top_k, renormalize=gate.renormalize,
            )  # fmt: skip
            return weights, None
        scores = route_scores(rows, self.router, None, pooling="none", temperature=1.0)
        weights = gate_fwd(scores, gate)
        shares = gate_fwd(scores, Gate(gate.kind))  # as if all were chosen; they sum to 1
        return weights, balance_loss(shares, weights, mask=counted)

    # --- the experts ---

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mixture: Tensor,
        *,
        grad_through_frozen: bool = True,
        dropout_p: float = 0.0,
        backend: str | None = None,
    ) -> Tensor:
        """Computes the layer with its experts; arguments as in `AdapterPool.forward`."""
        sparse = backend is None and self.computes_chosen(x)
        if not sparse and not self.experts.shared_a:
            return super().forward(
                x, weight, bias, mixture, grad_through_frozen=grad_through_frozen,
                dropout_p=dropout_p, backend=backend,
            )  # fmt: skip
        x = x.to(compute_dtype(x))
        adapted = x.reshape(-1, x.shape[-1])
        rows = bias if weight is None else _base(adapted, weight, bias)
        if dropout_p:
            adapted = F.dropout(adapted, dropout_p)
        if sparse:
            delta = self._of_chosen(adapted, mixture)
            y = delta if rows is None else delta.add_(rows)  # no new [M, O]
        else:
            y = self._of_shared_a(adapted, rows, mixture, backend)
        return y.view(*x.shape[:-1], self.b.width)

    def computes_chosen(self, x: Tensor) -> bool:
        """Returns whether only the chosen experts are computed for an input x [..., I].

        Otherwise all are, in one pass. This depends on sizes alone.
        """
        count, shared, top_k = self.experts.count, self.experts.shared_a, self.experts.gate.top_k
        many = top_k is not None and count >= _SPARSE_RATIO * top_k
        on_cpu = x.device.type == "cpu" and x.shape[:-1].numel() >= _SPARSE_ROWS
        return many and on_cpu and not shared

    def _of_chosen(self, x: Tensor, mixture: Tensor) -> Tensor:
        """Computes [M, O], each row's mixture of the experts that it chose."""
        experts = self.experts
        weights, index = mixture.topk(experts.gate.top_k or experts.count, -1)
        a, b = (rows.reshape(experts.count, experts.rank, -1) for rows in self._trained())
        return mix_experts(x, a, b, index, weights, scaling=experts.scaling)

    def _of_shared_a(
        self, x: Tensor, rows: Tensor | None, mixture: Tensor, backend: str | None
    ) -> Tensor:
        """Computes rows [M, O] plus sum_k w_k (x A^T) B_k, with one product x A^T [M, r]."""
        experts = self.experts
        a, b = self._trained()
        reduced = F.linear(x, a.to(x.dtype))
        # The op multiplies x A^T by K identities in place of A, r x r each.
        identities = _identities(experts.rank, experts.count, b)
        table = self._table(x.device, torch.promote_types(x.dtype, torch.float32))
        projection = Projection(None, rows, identities, self.b.rows(), *table)
        trains = b.requires_grad or transforms.active()
        parts = ([identities], [b], [0, len(identities)]) if trains else ([], [], [])
        return mix(reduced, mixture, [PooledProjection(projection, *parts)], backend=backend)[0]

    def _trained(self) -> tuple[Tensor, Tensor]:
        """Returns A and B, all of whose rows train."""
        return self.a.trainable, self.b.trainable

    def adapter(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns A [r, in_features] and B [r, out_features] of one expert, views of the pool."""
        rank = self.experts.rank
        rows = slice(index * rank, (index + 1) * rank)
        return self.a.rows()[slice(None) if self.experts.shared_a else rows], self.b.rows()[rows]

    def tensors(self) -> dict[str, Tensor]:
        """Returns the parameters by the names that they have in saved folders."""
        return {"lora_A": self.a.trainable, "lora_B": self.b.trainable, "router": self.router}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedPool:
        """Applies fn, but keeps the router in float32 where the rest becomes narrower."""
        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(_keeping_wide(fn), recurse=False)
        return self

    def extra_repr(self) -> str:
        experts = self.experts
        return f"experts={experts.count}, rank={experts.rank}, gate={experts.gate.kind!r}"


def _keeping_wide(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns the `fn` of an `nn.Module._apply`, which makes nothing narrower than float32."""

    def moved(tensor: Tensor) -> Tensor:
        found = fn(tensor)
        if found.is_floating_point() and found.itemsize < 4:
            return tensor.to(found.device, torch.float32)
        return found

    return moved


def _base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x [M, I] . weight^T + bias; on a CPU by the op's product, which is faster."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    outputs, inputs = weight.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    table = rank_table((0,), (1.0,), x.device, wide)
    a, b = weight.new_empty(0, inputs), weight.new_empty(0, outputs)
    projection = Projection(weight, bias, a, b, *table)  # one adapter of rank 0
    return mix(x, x.new_ones(1, 1, dtype=wide), [PooledProjection(projection, [], [], [])])[0]


def _identities(rank: int, count: int, like: Tensor) -> Tensor:
    """Returns `count` identity matrices, stacked: [count * rank, rank]."""
    if torch.compiler.is_compiling() or type(like) not in transforms.PLAIN or transforms.active():
        return _new_identities(rank, count, like.device, like.dtype)
    return _kept_identities(rank, count, like.device, like.dtype)


def _new_identities(rank: int, count: int, device: torch.device, dtype: torch.dtype) -> Any:
    return torch.eye(rank, device=device, dtype=dtype).repeat(count, 1)


@lru_cache(maxsize=64)
def _kept_identities(rank: int, count: int, device: torch.device, dtype: torch.dtype) -> Any:
    with torch.inference_mode(False):  # kept for later calls
        return _new_identities(rank, count, device, dtype)
