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

__all__ = [
    "SaptRouter",
    "only_looks_up",
    "padding_mask",
    "pool_inputs",
    "router_shapes",
    "tokens_of_prompt",
]


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
        config: the settings of pooling, projection and keys.
        initializer_range: standard deviation of the weights with `query_init="normal"`.
        device: of the parameters; None for torch's default.
        dtype: of the parameters.
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
        """Adds a trainable key; earlier keys freeze.

        Args:
            key: [D]; None for values uniform in (-1, 1).

        Raises:
            ValueError: if key has another shape; nothing has changed then.
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
        """Returns pooled input embeddings [B, D].

        Args:
            embedding: the model's input embedding.
            input_ids: [B, T]; or None.
            inputs_embeds: [B, T, D], used if not None.
            mask: [B, T], 1 for the tokens to pool; None for all.

        Raises:
            ValueError: if both inputs are None.
        """
        device = self.norm.weight.device  # hooks may move the model's inputs only later
        input_ids, inputs_embeds, mask = (
            t if t is None or t.device == device else t.to(device)
            for t in (input_ids, inputs_embeds, mask)
        )
        pooled = pool_inputs(embedding, input_ids, inputs_embeds, mask, self.config.pooling)
        if self.config.standardize_query:
            pooled = (pooled - self.query_mean) / self.query_std
        return pooled

    def scores(self, pooled: Tensor) -> Tensor:
        """Returns attention scores [B, K] of pooled embeddings [B, D].

        The projection and the newest key receive gradients.
        """
        with without_autocast(pooled.device):
            return route_scores(
                pooled, self._all_keys(), self.projection, temperature=self.config.temperature
            )

    def weights(self, pooled: Tensor) -> Tensor:
        """Returns the mixture weights [B, K] of pooled embeddings [B, D]."""
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

        Lengths vary from 4 to 256, because the maximum over a sequence grows with its length.

        Args:
            embedding: the model's input embedding.
            vocabulary: the number of token ids to sample from.
        """
        generator = torch.Generator().manual_seed(0)
        count, longest = 256, 256
        ids = torch.randint(vocabulary, (count, longest), generator=generator)
        lengths = 2 ** (2 + 6 * torch.rand(count, 1, generator=generator))
        mask = (torch.arange(longest) < lengths).long()
        device = self.query_mean.device
        self.query_mean.zero_()
        self.query_std.fill_(1)
        # In small batches, to limit memory when the embedding has to be called.
        parts = zip(ids.to(device).split(32), mask.to(device).split(32), strict=True)
        pooled = torch.cat([self.pool(embedding, few, None, m) for few, m in parts])
        self.query_mean.copy_(pooled.mean(0))
        self.query_std.copy_(pooled.std(0).clamp(min=1e-6))


def pool_inputs(
    embedding: nn.Module,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    mask: Tensor | None,
    pooling: str,
) -> Tensor:
    """Returns pooled input embeddings [B, D]; arguments and errors as `SaptRouter.pool`."""
    if inputs_embeds is not None:
        return pool_embeds(inputs_embeds, mask=mask, pooling=pooling)
    if input_ids is None:
        raise ValueError("input_ids: got None and no inputs_embeds, expected one of them")
    if isinstance(embedding, nn.Embedding) and only_looks_up(embedding):
        return pool_tokens(input_ids, embedding.weight, mask=mask, pooling=pooling)
    return pool_embeds(embedding(input_ids), mask=mask, pooling=pooling)


def padding_mask(attention_mask: Any) -> Tensor | None:
    """Returns a mask [B, T] of tokens; None for none.

    Raises:
        ValueError: if it has another shape.
    """
    if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
        return attention_mask
    is_tensor = isinstance(attention_mask, Tensor)
    got = tuple(attention_mask.shape) if is_tensor else type(attention_mask).__name__
    raise ValueError(
        f"attention_mask: got {got}, expected [B, T]: the router reads the padding from it; or run "
        "inside model.sapt.fixed(model.sapt.route(input_ids, padding_mask))"
    )


def only_looks_up(embedding: nn.Embedding) -> bool:
    """Returns whether reading the embedding's table is equivalent to calling it.

    It is not with ZeRO-3, nor if accelerate offloads the table. FSDP2's subclass adds only
    sharding.
    """
    if is_offloaded(embedding):
        return False
    own = [kind for kind in type(embedding).__mro__ if "forward" in vars(kind)]
    return own[0] is nn.Embedding and not any(map(is_partitioned, embedding.parameters()))


def router_shapes(width: int, config: RouterConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a router's state_dict, without its keys."""
    empty = SaptRouter(width, config, device=torch.device("meta"))
    return {n: tuple(t.shape) for n, t in empty.state_dict().items() if not n.startswith("keys.")}


def tokens_of_prompt(
    model: Any, attention_mask: Tensor | None, labels: Tensor | None
) -> Tensor | None:
    """Returns whether each token is part of the prompt, [B, T]; None if labels do not say.

    Args:
        model: labels say it for a decoder-only model.
        attention_mask, labels: [B, T], as the model is given them.
    """
    if labels is None or model.config.is_encoder_decoder or not model.can_generate():
        return None
    prompt = labels == -100
    real = torch.ones_like(prompt)
    if isinstance(attention_mask, Tensor) and attention_mask.shape == labels.shape:
        real = attention_mask.to(torch.bool)
    # Padding and the first token, which is never predicted, do not count: their labels are -100
    # anyway. A row without any other prompt token (language modelling) is pooled whole.
    later = real & (real.cumsum(1) > 1)
    return prompt | ~(prompt & later).any(1, keepdim=True)
