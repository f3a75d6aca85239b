"""CODA-Prompt: a weighted sum of all prefixes of a pool, by attention of an input's query.

Smith et al., "CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free
Continual Learning", CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sapt_fast.methods.base import Handle
from sapt_fast.methods.images import ImageHandle
from sapt_fast.methods.prefix import PrefixConfig, PrefixHandle
from sapt_fast.methods.task_config import require
from sapt_fast.methods.texts import TextHandle
from sapt_fast.ops._common import without_autocast
from sapt_fast.pools.prefixes import mixed_prefixes, orthonormal_rows
from sapt_fast.pools.rows import RowStack
from sapt_fast.routing.images import ImageRouting
from sapt_fast.routing.running import Running
from sapt_fast.sites.image_embeddings import reads_images
from sapt_fast.sites.prefix import AtAttention, find_attention, prefix_size, running_prefix_weights
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.warm import run_backward

__all__ = ["CodaConfig", "CodaHandle", "coda_weights"]


@dataclass
class CodaConfig(PrefixConfig["CodaHandle"]):
    """The pool of prefixes, and where they go. The defaults are the paper's.

    The weight of the orthogonality penalty is 0 by default: the authors' code sets it to 0 since
    it starts new rows by Gram-Schmidt; the paper has 0.1.

    Example:
        >>> import sapt_fast
        >>> sapt_fast.CodaConfig(pool=20, n_tasks=5).length
        8
    """

    pool: int = field(
        default=100, metadata={"help": "Number of components of each layer's pool, for all tasks."}
    )
    n_tasks: int = field(
        default=10,
        metadata={"help": "Number of tasks; each trains pool / n_tasks new components."},
    )
    length: int = field(
        default=8,
        metadata={"help": "L_p, rows of a component: half go to the keys, half to the values."},
    )
    layers: Sequence[int] = field(
        default=(0, 1, 2, 3, 4),
        metadata={
            "help": "Indices of the layers with prefixes, from 0; of the encoder, if there is one."
        },
    )
    orthogonality: float = field(
        default=0.0,
        metadata={"help": "lambda, weight of the penalty on components that are not orthogonal."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts("pool", "n_tasks", "length")
        self.require_layers("layers")
        require(self.length % 2 == 0, "length", self.length, "an even number of rows")
        divides = self.pool % self.n_tasks == 0
        require(divides, "pool", self.pool, f"a multiple of n_tasks ({self.n_tasks})")
        self.require_weight("orthogonality")

    @property
    def method(self) -> str:
        """The name of the method."""
        return "coda"


class CodaPool(AtAttention):
    """The components of one attention layer: prefixes, and the keys that weight them.

    Args:
        layer: the attention layer.
        query_width: D of the queries.
        config: the method's config.
        index: the layer's place among those with prefixes.
        routing: the weights of the running forward.
        dtype: of all rows.

    Attributes:
        prompts: M prefixes, each flattened from [2, length / 2, width of the layer].
        keys, attention: K and A, [M, D].
    """

    def __init__(
        self,
        layer: Any,
        query_width: int,
        config: CodaConfig,
        index: int,
        routing: Running,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        width, device = prefix_size(layer)
        self.index, self.total, self.routing = index, len(config.layers), routing
        self.reserve = config.pool
        self.prompts = RowStack(config.length * width, self.reserve, device=device, dtype=dtype)
        self.new_keys(query_width)

    def new_keys(self, width: int) -> None:
        """Replaces the keys and attention vectors by none, for queries [B, width]."""
        like = self.prompts.frozen
        made = (
            RowStack(width, self.reserve, device=like.device, dtype=like.dtype) for _ in range(2)
        )
        self.keys, self.attention = made

    def stacks(self) -> dict[str, RowStack]:
        """Returns the rows by name."""
        return {"prompts": self.prompts, "keys": self.keys, "attention": self.attention}

    def prefix(self, like: Tensor) -> Tensor | None:
        """Returns sum_k w_k P_k of each sample, [B, 2, length / 2, D]."""
        weights = running_prefix_weights(self.routing, like)
        if weights is None:
            return None
        count = len(self.prompts)
        if weights.shape[1] != self.total * count:
            raise RuntimeError(
                f"coda: got {weights.shape[1]} weights for {self.total * count} components: they "
                "were computed before the last task was added; run a full forward again"
            )
        own = weights[:, self.index * count : (self.index + 1) * count]
        return mixed_prefixes(self.prompts, own, like)


class CodaHandle(PrefixHandle):
    """`model.coda`: pools of M components in the first layers, which are mixed for each input.

        p_l(x) = sum_k cos(q(x) * A_lk, K_lk) P_lk

    q(x) is the query of an image, computed by the frozen model without prefixes, or the pooled
    input embedding of a text (`TextHandle`). A, K and P train. The halves of p_l go before the keys
    and the values of layer l. There is no softmax and no selection: weights are between -1 and 1.

    The pool is split evenly among `n_tasks` tasks. A new task's rows of A, K and P start
    orthonormal to each other and orthogonal to all earlier rows (Gram-Schmidt). Rows of later tasks
    take no part, and rows of earlier tasks stay as they are. As in the authors' code, every layer
    has an A and a K of its own.

    `attention` contains the weights [B, layers * M] of the components so far, layer by layer.

    Example:
        >>> import sapt_fast, torch, transformers
        >>> config = transformers.ViTConfig(
        ...     image_size=16, patch_size=8, hidden_size=16, intermediate_size=16,
        ...     num_hidden_layers=2, num_attention_heads=2)
        >>> model = transformers.ViTForImageClassification(config)
        >>> options = {"pool": 6, "n_tasks": 3, "layers": [0, 1]}
        >>> model = sapt_fast.patch(model, sapt_fast.CodaConfig(**options))
        >>> model.coda.grow("first")
        >>> images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
        >>> loss = model(images, labels=labels).loss + model.coda.key_loss(images)
        >>> model.coda.attention.shape
        torch.Size([4, 4])
    """

    Config = CodaConfig
    method = "coda"
    attribute = "coda"

    @classmethod
    def of_model(cls, model: Any) -> type[Handle]:
        """Returns the class of the handle for a model of images, or of texts."""
        return CodaImageHandle if reads_images(model) else CodaTextHandle

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Returns the attention layers that get prefixes."""
        return find_attention(model, config.layers)

    def make(self, path: str) -> AtAttention:
        """Returns the pool of the attention layer at `path`."""
        layer, dtype = self._model.get_submodule(path), self._model.dtype
        index = self.report.patched.index(path)
        dtype = self.config.adapter_dtype(dtype)
        return CodaPool(layer, self._queries.width, self.config, index, self.routing, dtype)

    @property
    def share(self) -> int:
        """The number of components of a task."""
        share: int = self.config.pool // self.config.n_tasks
        return share

    def stacks(self) -> dict[str, RowStack]:
        """Returns P, K and A of each layer, by the layer's index and their names."""
        named = zip(self.config.layers, self.sources().values(), strict=True)
        return {f"{i}.{name}": s for i, pool in named for name, s in pool.stacks().items()}

    def new_keys(self, width: int) -> None:
        """Replaces the keys by none, for queries [B, width]; there is no task yet."""
        for pool in self.sources().values():
            pool.new_keys(width)

    def signal(self, **inputs: Any) -> Tensor:
        """Returns the weights [B, layers * M] of the components, for what `query` takes."""
        pools = self.sources().values()
        attention = torch.cat([pool.attention.joined() for pool in pools])
        keys = torch.cat([pool.keys.joined() for pool in pools])
        return coda_weights(self.query(**inputs), attention, keys)

    def key_loss(self, *inputs: Any, **named: Any) -> Tensor:
        """Returns the orthogonality penalty, a scalar; it does not depend on the inputs.

            lambda sum_l sum_{T in (P, K, A)} mean((T_l T_l^T - I)^2)

        The mean over the entries is the authors' code's; the paper has their sum. Gradients reach
        only the newest task's rows.
        """
        weight = self.config.orthogonality
        stacks = self.stacks().values()
        if not weight or not self.tasks:
            return torch.zeros((), device=self._device)
        with without_autocast(self._device):
            terms = [_penalty(stack.joined().float()).to(self._device) for stack in stacks]
        return weight * torch.stack(terms).sum()

    def run_layers(self, samples: int, tokens: int) -> None:
        """Mixes the pool of each layer for a batch, and its backward where gradients are enabled.

        Args:
            samples, tokens: B and T of the keys.
        """
        if not self.tasks:
            raise RuntimeError("the model has no task yet: call model.coda.grow(name) first")
        weights = torch.zeros(samples, self._count(), device=self._device, requires_grad=True)
        with self.routing.resume(weights):
            for path, pool in self.sources().items():
                width, device = prefix_size(self._model.get_submodule(path))
                keys = torch.zeros(
                    samples, 1, tokens, width, device=device, dtype=self._model.dtype
                )
                run_backward(lambda: [pool.prefix(keys)], [weights, pool.prompts.trainable])  # noqa: B023

    def _require_new(self, name: str) -> None:
        super()._require_new(name)
        most = self.config.n_tasks
        if len(self.tasks) == most:
            raise ValueError(
                f"name: got {name!r}, task number {most + 1}, expected at most {most} (n_tasks), "
                "among which the pool is split"
            )
        for key, stack in self.stacks().items():
            if len(stack) + self.share > stack.width:
                raise ValueError(
                    f"pool: got {len(stack) + self.share} components for {key} of width "
                    f"{stack.width}, expected at most {stack.width}, so that they can be orthogonal"
                )

    def _add(self) -> None:
        for stack in self.stacks().values():
            rows = orthonormal_rows(stack.rows(), self.share)
            stack.append(self.share, lambda fresh, rows=rows: fresh.copy_(rows))  # type: ignore

    def _count(self) -> int:
        return len(self.config.layers) * self.share * len(self.tasks)


class CodaImageHandle(ImageHandle, CodaHandle):
    """`CodaHandle` of a model of images."""

    Routing = ImageRouting


class CodaTextHandle(TextHandle, CodaHandle):
    """`CodaHandle` of a model of texts."""


def coda_weights(query: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
    """Computes cos(q * A_k, K_k) for all queries and components, with two matrix products.

    cos(q * A_k, K_k) = q . (A_k * K_k) / (|q * A_k| |K_k|), and |q * A_k|^2 = q^2 . A_k^2, so no
    [B, M, D] numbers are stored. If a vector is zero, the weight and its gradients are 0.

    Args:
        query: [B, D] float32 or float64, without gradient.
        attention, keys: A and K, [M, D], any floating-point dtype; differentiable.

    Returns:
        [B, M] in query's dtype.
    """
    with without_autocast(query.device):
        # A cosine does not depend on scales; these cannot make squares overflow or vanish.
        query, attention, keys = (_scaled(x.to(query)) for x in (query, attention, keys))
        squares = (query.square() @ attention.square().t()) * keys.square().sum(1)
        zero = squares <= torch.finfo(query.dtype).tiny
        norms = torch.where(zero, 1.0, squares).sqrt()
        return torch.where(zero, 0.0, query @ (attention * keys).t() / norms)


def _scaled(rows: Tensor) -> Tensor:
    """Divides rows by constants, their largest magnitudes; rows of zeros stay."""
    largest = rows.detach().abs().amax(1, keepdim=True)
    return rows / largest.clamp_min(torch.finfo(rows.dtype).tiny)


def _penalty(rows: Tensor) -> Tensor:
    """Returns mean((T T^T - I)^2) of rows T [M, D]."""
    products = rows @ rows.t()
    return (products - torch.eye(len(rows), device=rows.device)).square().mean()
