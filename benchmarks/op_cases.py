"""The ops beside `mixed_lora` at one size each: inputs, our op, plain torch, and bytes moved."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sapt_fast.ops import (
    QueryProjection,
    mix_experts,
    mix_prompts,
    mix_prompts_with_tokens,
    nearest_key,
    pool_tokens,
    route,
    topk_keys,
)

Inputs = dict[str, Tensor]


class OpCase(Protocol):
    """One op at one size.

    `run` returns what is compared with float64; gradients are compared for the inputs in `trains`.
    """

    op: str
    trains: tuple[str, ...]

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        """Fresh inputs, the same for the same arguments."""

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        """The op's outputs; indices are checked by what they point to."""

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        """The op in plain torch."""

    def moved_bytes(self, dtype: torch.dtype) -> int:
        """The least that a forward reads and writes."""


class _Draw:
    """Normal numbers in one dtype on one device, from a fixed seed."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.options: dict[str, Any] = {"device": device, "generator": self.generator}
        self.dtype = dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, **self.options).mul_(scale).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, **self.options)

    def weights(self, *shape: int) -> Tensor:
        return torch.rand(shape, **self.options)


@dataclass(frozen=True)
class RouterCase:
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
        draw, width = _Draw(dtype, device), self.width
        order = draw.weights(self.vocabulary, width).argsort(0)
        return {
            "ids": draw.integers(self.vocabulary, self.batch, self.tokens),
            "table": ((order - self.vocabulary // 2) / 64).to(dtype),
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


@dataclass(frozen=True)
class PromptCase:
    """A mixture of prompts in front of embeddings, or of tokens."""

    batch: int
    tokens: int
    width: int
    adapters: int
    length: int
    from_ids: bool = False
    op: str = "mix_prompts"
    trains: tuple[str, ...] = ("prompts", "mixture", "source")

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        draw = _Draw(dtype, device)
        source = (32128,) if self.from_ids else (self.batch, self.tokens)
        given = {
            "prompts": draw(self.adapters, self.length, self.width),
            "mixture": draw.weights(self.batch, self.adapters),
            "source": draw(*source, self.width),
        }
        if self.from_ids:
            given["ids"] = draw.integers(32128, self.batch, self.tokens)
        return given

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        prompts, mixture, source = (inputs[n] for n in self.trains)
        if self.from_ids:
            y = mix_prompts_with_tokens(prompts, mixture, inputs["ids"], source, backend=backend)
        else:
            y = mix_prompts(prompts, mixture, source, backend=backend)
        return {"y": y}

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        prompts, mixture, source = (inputs[n] for n in self.trains)

        def plain() -> Tensor:
            rows = source[inputs["ids"]] if self.from_ids else source
            mixed = mixture.to(prompts.dtype) @ prompts.flatten(1)
            return torch.cat([mixed.view(-1, *prompts.shape[1:]), rows], 1)

        return {"torch": plain}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        rows = self.adapters * self.length + self.batch * (self.length + 2 * self.tokens)
        return rows * self.width * dtype.itemsize + 8 * self.batch * self.tokens * self.from_ids


@dataclass(frozen=True)
class TopKeysCase:
    """The k best keys."""

    queries: int
    keys: int
    width: int
    k: int
    metric: str = "dot"
    op: str = "topk_keys"
    trains: tuple[str, ...] = ("query", "keys")

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        draw = _Draw(dtype, device)
        return {"query": draw(self.queries, self.width), "keys": draw(self.keys, self.width)}

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        """The scores, and those of the keys that the index names."""
        query, keys = inputs.values()
        scores, index = topk_keys(query, keys, self.k, metric=self.metric, backend=backend)
        with torch.no_grad():
            q, chosen = query.double().unsqueeze(1), keys[index].double()
            if self.metric == "l2":
                named = -(q - chosen).square().sum(-1)
            else:
                named = (q * chosen).sum(-1)
                if self.metric == "cosine":
                    named /= q.norm(dim=-1) * chosen.norm(dim=-1)
            # A key that is named twice is no answer.
            ordered = index.sort(-1).values
            twice = (ordered[:, 1:] == ordered[:, :-1]).any()
        return {"scores": scores, "scores of index": named.where(~twice, float("nan"))}

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        query, keys = inputs.values()
        return {"torch": lambda: (query @ keys.t()).topk(self.k)} if self.metric == "dot" else {}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        return (self.keys + self.queries) * self.width * dtype.itemsize + self.queries * self.k * 12


@dataclass(frozen=True)
class NearestKeyCase:
    """The nearest key; half of the queries lie inside the radius of theirs."""

    queries: int
    keys: int
    width: int
    op: str = "nearest_key"
    trains: tuple[str, ...] = ("query", "keys")

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        draw = _Draw(dtype, device)
        keys, noise = draw(self.keys, self.width), draw(self.queries, self.width, scale=0.1)
        noise[: self.queries // 2] *= 2
        near = keys[draw.integers(self.keys, self.queries)]
        radius = torch.full((self.keys,), 0.15 * self.width**0.5, device=device)
        return {"query": near + noise, "keys": keys, "radius": radius}

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        index, distance = nearest_key(*inputs.values(), backend=backend)
        return {"distance": distance, "index": index}

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        query, keys, radius = inputs.values()

        def plain() -> Tensor:
            distance, index = torch.cdist(query.float(), keys.float()).min(1)
            return torch.where(distance <= radius[index], index, -1)

        return {"torch": plain}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        return (self.keys + self.queries) * self.width * dtype.itemsize + self.queries * 12


@dataclass(frozen=True)
class ExpertsCase:
    """A mixture of experts: scattered over a large bank, or crowded on a small one."""

    rows: int
    k: int
    experts: int
    rank: int
    width: int
    op: str = "mix_experts"
    trains: tuple[str, ...] = ("x", "bank_a", "bank_b", "weights")

    def inputs(self, dtype: torch.dtype, device: str) -> Inputs:
        draw, shape = _Draw(dtype, device), (self.experts, self.rank, self.width)
        return {
            "x": draw(self.rows, self.width),
            "bank_a": draw(*shape, scale=self.width**-0.5),
            "bank_b": draw(*shape),
            "index": draw.integers(self.experts, self.rows, self.k),
            "weights": draw.weights(self.rows, self.k),
        }

    def run(self, inputs: Inputs, backend: str) -> dict[str, Tensor]:
        return {"y": mix_experts(*inputs.values(), backend=backend)}

    def rivals(self, inputs: Inputs) -> dict[str, Callable[[], object]]:
        x, bank_a, bank_b, index, weights = inputs.values()

        def plain() -> Tensor:
            h = torch.bmm(bank_a[index].flatten(1, 2), x.unsqueeze(2)).view(*index.shape, -1)
            h = (h * weights.unsqueeze(2)).to(x.dtype).flatten(1)
            return torch.bmm(h.unsqueeze(1), bank_b[index].flatten(1, 2)).squeeze(1)

        return {"torch": plain}

    def moved_bytes(self, dtype: torch.dtype) -> int:
        chosen = min(self.experts, self.rows * self.k)
        elements = 2 * self.width * (chosen * self.rank + self.rows)
        return elements * dtype.itemsize + self.rows * self.k * 12
