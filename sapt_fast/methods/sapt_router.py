"""The router of SAPT: a query projection, and attention over one key per task."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sapt_fast.devices import Resident, ResidentLinear, ResidentNorm, is_offloaded
from sapt_fast.ops._common import without_autocast
from sapt_fast.ops.route import (
    QueryProjection,
    pool_embeds,
    pool_tokens,
    route,
    route_scores,
)
from sapt_fast.pools.rows import RowStack
from sapt_fast.pools.sharding import is_partitioned

__all__ = ["SaptRouter", "only_looks_up", "router_shapes"]


class RouterConfig(Protocol):
    """The fields of a config that the router reads."""

    query_hidden_dim: int
    query_init: str
    temperature: float | None
    pooling: str
    standardize_query: bool
    top_k: int | None
    threshold: float | None
    reserve_tasks: int


class SaptRouter(Resident):
    """The query projection, shared by all tasks, and one key per task.

    Args:
        width: D, the width of the input embeddings.
        config: pooling, projection and keys.
        initializer_range: deviation of `query_init="normal"`.
    """

    query_mean: Tensor
    query_std: Tensor

    def __init__(
        self,
        width: int,
        config: RouterConfig,
        *,
        initializer_range: float = 0.02,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        hidden = config.query_hidden_dim
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.down = ResidentLinear(width, hidden, bias=False, **place)
        self.up = ResidentLinear(hidden, width, bias=False, **place)
        self.norm = ResidentNorm(width, **place)
        device = self.norm.weight.device
        self.keys = RowStack(width, config.reserve_tasks, device=device, dtype=dtype)
        if config.query_init == "normal":
            nn.init.normal_(self.down.weight, std=initializer_range)
            nn.init.normal_(self.up.weight, std=initializer_range)
        if config.standardize_query:
            self.register_buffer("query_mean", torch.zeros(width, **place))
            self.register_buffer("query_std", torch.ones(width, **place))

    def add_key(self, key: Tensor | None = None) -> None:
        """A new trainable key, `key` [D] or uniform in (-1, 1); earlier keys freeze.

        Raises:
            ValueError: key has another shape; nothing has changed.
        """
        width = self.keys.width
        if key is not None and tuple(key.shape) != (width,):
            raise ValueError(f"key: got shape {tuple(key.shape)}, expected [{width}]")
        self.keys.append(1, lambda rows: rows.uniform_(-1, 1) if key is None else rows.copy_(key))

    def pool(
        self,
        embedding: nn.Module,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """The pooled input embeddings [B, D] of token ids or of given embeddings."""
        pooling = self.config.pooling
        device = self.norm.weight.device  # hooks may move the model's inputs there only later
        input_ids, inputs_embeds, mask = (
            t if t is None or t.device == device else t.to(device)
            for t in (input_ids, inputs_embeds, mask)
        )
        if inputs_embeds is not None:
            pooled = pool_embeds(inputs_embeds, mask=mask, pooling=pooling)
        elif input_ids is None:
            raise ValueError("input_ids: got None and no inputs_embeds, expected one of them")
        elif isinstance(embedding, nn.Embedding) and only_looks_up(embedding):
            pooled = pool_tokens(input_ids, embedding.weight, mask=mask, pooling=pooling)
        else:
            pooled = pool_embeds(embedding(input_ids), mask=mask, pooling=pooling)
        if self.config.standardize_query:
            pooled = (pooled - self.query_mean) / self.query_std
        return pooled

    def scores(self, pooled: Tensor) -> Tensor:
        """Attention scores [B, K] of pooled embeddings; the projection and the newest key train."""
        with without_autocast(pooled.device):
            return route_scores(
                pooled, self._all_keys(), self.projection, temperature=self.config.temperature
            )

    def weights(self, pooled: Tensor) -> Tensor:
        """The mixture [B, K] of pooled embeddings."""
        config = self.config
        with without_autocast(pooled.device):
            return route(
                pooled,
                self._all_keys(),
                self.projection,
                temperature=config.temperature,
                top_k=config.top_k,
                threshold=config.threshold,
            )

    def _all_keys(self) -> Tensor:
        frozen, newest = self.keys.frozen, self.keys.trainable
        return torch.cat([frozen, newest]) if frozen.shape[0] else newest

    @property
    def projection(self) -> QueryProjection:
        """The parameters of the query projection."""
        norm = self.norm
        return QueryProjection(self.down.weight, self.up.weight, norm.weight, norm.bias, norm.eps)

    @torch.no_grad()
    def standardize(self, embedding: nn.Module, vocabulary: int) -> None:
        """Sets the statistics of `standardize_query` from pooled random token sequences.

        Their lengths run from 4 to 256, since a maximum grows with the length it is taken over.
        """
        generator = torch.Generator().manual_seed(0)
        count, longest = 256, 256
        ids = torch.randint(vocabulary, (count, longest), generator=generator)
        lengths = 2 ** (2 + 6 * torch.rand(count, 1, generator=generator))
        mask = (torch.arange(longest) < lengths).long()
        device = self.query_mean.device
        self.query_mean.zero_()
        self.query_std.fill_(1)
        # A few at a time, in case that the embedding has to be called.
        parts = zip(ids.to(device).split(32), mask.to(device).split(32), strict=True)
        pooled = torch.cat([self.pool(embedding, few, None, m) for few, m in parts])
        self.query_mean.copy_(pooled.mean(0))
        self.query_std.copy_(pooled.std(0).clamp(min=1e-6))


def only_looks_up(embedding: nn.Embedding) -> bool:
    """Whether its output is its table's rows, which are there without a call.

    They are not with ZeRO-3, nor where accelerate offloads them. FSDP2's subclass adds nothing but
    sharding.
    """
    if is_offloaded(embedding):
        return False
    own = [kind for kind in type(embedding).__mro__ if "forward" in vars(kind)]
    return own[0] is nn.Embedding and not any(map(is_partitioned, embedding.parameters()))


def router_shapes(width: int, config: RouterConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a router's state_dict, without its keys."""
    empty = SaptRouter(width, config, device=torch.device("meta"))
    return {n: tuple(t.shape) for n, t in empty.state_dict().items() if not n.startswith("keys.")}
