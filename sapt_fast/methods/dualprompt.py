"""DualPrompt: general prefixes for all tasks, and one prefix per task chosen by its key.

Wang et al., "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning", ECCV 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sapt_fast.methods.base import Handle
from sapt_fast.methods.images import ImageHandle
from sapt_fast.methods.l2p_choice import fill_prompts
from sapt_fast.methods.prefix import PrefixConfig, PrefixHandle
from sapt_fast.methods.task_config import require
from sapt_fast.methods.texts import TextHandle
from sapt_fast.ops import topk_keys
from sapt_fast.pools.prefixes import chosen_prefixes
from sapt_fast.pools.rows import RowStack
from sapt_fast.routing.images import ImageRouting
from sapt_fast.routing.queries import QueryRouting
from sapt_fast.routing.running import Running
from sapt_fast.sites.embeddings import checked_places
from sapt_fast.sites.image_embeddings import reads_images
from sapt_fast.sites.prefix import AtAttention, find_attention, prefix_size, running_prefix_weights
from sapt_fast.sites.report import PatchReport

__all__ = ["DualPromptConfig", "DualPromptHandle"]

_STARTS = ("uniform", "normal")


@dataclass
class DualPromptConfig(PrefixConfig["DualPromptHandle"]):
    """The prefixes and where they go. The defaults are the paper's.

    Example:
        >>> import sapt_fast
        >>> sapt_fast.DualPromptConfig().e_layers
        [2, 3, 4]
    """

    g_length: int = field(
        default=5,
        metadata={"help": "Rows of a G-prompt before the keys, and as many before the values."},
    )
    e_length: int = field(
        default=20,
        metadata={"help": "Rows of an E-prompt before the keys, and as many before the values."},
    )
    g_layers: Sequence[int] = field(
        default=(0, 1),
        metadata={
            "help": "Indices of the layers with G-prompts, from 0; of the encoder, if there is one."
        },
    )
    e_layers: Sequence[int] = field(
        default=(2, 3, 4),
        metadata={
            "help": "Indices of the layers with E-prompts, from 0; of the encoder, if there is one."
        },
    )
    strength: float = field(
        default=1.0,
        metadata={"help": "lambda, weight of the loss that moves the task's key to its queries."},
    )
    copy_previous: bool = field(
        default=True,
        metadata={"help": "Start a task's E-prompts as copies of the previous task's."},
    )

    prompt_start: str = field(
        default="uniform",
        metadata={
            "help": "Initialisation of the prompts: 'uniform' in (-1, 1), as in the PyTorch port, "
            "or 'normal' with standard deviation 0.02."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_counts("g_length", "e_length")
        self.require_flags("copy_previous")
        start = self.prompt_start
        require(start in _STARTS, "prompt_start", start, f"one of {_STARTS}")
        self.require_layers("g_layers")
        self.require_layers("e_layers")
        shared = sorted({*self.g_layers} & {*self.e_layers})
        require(not shared, "e_layers", shared, "layers without G-prompts")
        self.require_weight("strength")

    @property
    def method(self) -> str:
        """The name of the method."""
        return "dualprompt"


class GPrompt(AtAttention):
    """The prefix of one layer that all inputs and tasks share.

    Attributes:
        rows: [2, P, D].
    """

    def __init__(
        self, layer: Any, config: DualPromptConfig, routing: Running, dtype: torch.dtype
    ) -> None:
        super().__init__()
        width, device = prefix_size(layer)
        rows = torch.empty(2, config.g_length, width, device=device, dtype=dtype)
        fill_prompts(rows, config.prompt_start)
        self.rows = nn.Parameter(rows, requires_grad=False)
        self.routing = routing

    def prefix(self, like: Tensor) -> Tensor | None:
        """Returns the rows [1, 2, P, D] of all inputs."""
        return None if running_prefix_weights(self.routing, like) is None else self.rows[None]


class EPrompts(AtAttention):
    """The prefixes of one layer, of which each input gets one.

    Attributes:
        rows: K prefixes, each flattened from [2, P, D].
    """

    def __init__(self, layer: Any, length: int, routing: Running, dtype: torch.dtype) -> None:
        super().__init__()
        width, device = prefix_size(layer)
        self.rows = RowStack(2 * length * width, 16, device=device, dtype=dtype)
        self.routing = routing

    def prefix(self, like: Tensor) -> Tensor | None:
        """Returns the chosen rows [B, 2, P, D]."""
        index = running_prefix_weights(self.routing, like)
        return None if index is None else chosen_prefixes(self.rows, index, like)


class _Places(QueryRouting):
    """`QueryRouting` by the place of a prefix instead of weights."""

    def checked(self, weights: Tensor) -> Tensor:
        """Returns places that a caller gives, as [1, 1] or [B, 1].

        Raises:
            ValueError: if they have another shape or dtype or, on a CPU, there is no such prefix.
        """
        return checked_places(weights, 1, self.count())


class _ImagePlaces(_Places, ImageRouting):
    """`_Places` of images."""


class DualPromptHandle(PrefixHandle):
    """`model.dualprompt`: G-prompts that all tasks train, and an E-prompt and a key for each task.

        L = CE(y | G, E_t) - lambda (1 / B) sum_b cos(q(x_b), k_t)

    While the model is in training mode, all inputs get the newest task's E-prompt; its key moves
    towards their queries. In eval mode, each input gets the E-prompt of the key nearest to its
    query q(x), which the frozen model computes without prefixes; the query of a text is its pooled
    input embedding (`TextHandle`). A prompt has as many rows before
    the keys as before the values. Keys start uniform in (-1, 1).

    `attention` contains the places [B, 1] of the tasks whose E-prompts were used.

    Example:
        >>> import sapt_fast, torch, transformers
        >>> config = transformers.ViTConfig(
        ...     image_size=16, patch_size=8, hidden_size=16, intermediate_size=16,
        ...     num_hidden_layers=2, num_attention_heads=2)
        >>> model = transformers.ViTForImageClassification(config)
        >>> options = {"g_layers": [0], "e_layers": [1]}
        >>> model = sapt_fast.patch(model, sapt_fast.DualPromptConfig(**options))
        >>> model.dualprompt.grow("first")
        >>> images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
        >>> loss = model(images, labels=labels).loss + model.dualprompt.key_loss()
        >>> model.dualprompt.attention.shape
        torch.Size([4, 1])
    """

    Config = DualPromptConfig
    method = "dualprompt"
    attribute = "dualprompt"
    Routing = _Places

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        self.new_keys(self._queries.width)

    @classmethod
    def of_model(cls, model: Any) -> type[Handle]:
        """Returns the class of the handle for a model of images, or of texts."""
        return DualPromptImageHandle if reads_images(model) else DualPromptTextHandle

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Returns the attention layers that get prefixes: those of G-prompts first."""
        report = find_attention(model, config.g_layers, "g_layers")
        report.patched += find_attention(model, config.e_layers, "e_layers").patched
        return report

    def make(self, path: str) -> AtAttention:
        """Returns the G-prompt or the E-prompts of the attention layer at `path`."""
        layer, config = self._model.get_submodule(path), self.config
        dtype = config.adapter_dtype(self._model.dtype)
        if self.report.patched.index(path) < len(config.g_layers):
            return GPrompt(layer, config, self.routing, dtype)
        return EPrompts(layer, config.e_length, self.routing, dtype)

    def _by_layer(self, kind: type[AtAttention]) -> dict[str, Any]:
        layers = [*self.config.g_layers, *self.config.e_layers]
        named = zip(layers, self.sources().values(), strict=True)
        return {f"{i}.rows": source.rows for i, source in named if isinstance(source, kind)}

    def stacks(self) -> dict[str, RowStack]:
        """Returns the keys [K, D], and the E-prompts by the layer's index."""
        return {"keys": self.keys, **self._by_layer(EPrompts)}

    def new_keys(self, width: int) -> None:
        """Replaces the keys by none, for queries [B, width]; there is no task yet."""
        dtype = self.config.adapter_dtype(self._model.dtype)
        self.keys = RowStack(width, 16, device=self._device, dtype=dtype)

    def kept(self) -> dict[str, nn.Parameter]:
        """Returns the G-prompts by the layer's index."""
        return self._by_layer(GPrompt)

    def signal(self, **inputs: Any) -> Tensor:
        """Returns the places [B, 1] int64 of the tasks' prefixes; [1, 1] while training.

        Args:
            **inputs: as for `query`.
        """
        return self._places(self.query(**inputs))

    def _route(self, **inputs: Any) -> Tensor:
        """As `signal`; notes the cosines that `key_loss` reads."""
        query = self.query(**inputs)
        if self._model.training:
            self.routing.cosines = self._cosines(query)
        return self._places(query)

    def _places(self, query: Tensor) -> Tensor:
        if self._model.training:
            return torch.full((1, 1), len(self.tasks) - 1, device=self._device)
        with torch.no_grad():
            keys = self.keys.rows()
            return topk_keys(query.to(keys), keys, 1, metric="cosine")[1]

    def key_loss(self, *inputs: Any, **named: Any) -> Tensor:
        """Returns the loss's second term, which moves the newest task's key to the queries.

        Args:
            *inputs, **named: as for `query`. Inside `queries`, no query is computed. None or
                nothing: those of this thread's last forward, whose queries are used.

        Raises:
            RuntimeError: if there was no such forward, it was given its prompts, it ran in eval
                mode, or it ran without gradients and they are enabled now.
        """
        weight = self.config.strength
        if not weight or not self.tasks:
            return torch.zeros((), device=self._device)
        if all(given is None for given in (*inputs, *named.values())):
            cosines = self.last_cosines(self.keys.trainable.requires_grad)
        else:
            cosines = self._cosines(self.query(*inputs, **named))
        return -weight * cosines.sum() / max(len(cosines), 1)

    def _cosines(self, query: Tensor) -> Tensor:
        """Returns the cosines [B, 1] of queries and the newest task's key."""
        key = self.keys.trainable
        return topk_keys(query.to(key), key, 1, metric="cosine")[0]

    def _task_added(self, name: str) -> None:
        super()._task_added(name)
        self.routing.cosines = None

    def _add(self) -> None:
        for name, stack in self.stacks().items():
            copies = name != "keys" and self.config.copy_previous and len(stack)
            previous = stack.rows()[-1:].clone() if copies else None
            start = "uniform" if name == "keys" else self.config.prompt_start
            stack.append(1, partial(_fill, previous=previous, start=start))

    def _count(self) -> int:
        return len(self.tasks)


class DualPromptImageHandle(ImageHandle, DualPromptHandle):
    """`DualPromptHandle` of a model of images."""

    Routing = _ImagePlaces


class DualPromptTextHandle(TextHandle, DualPromptHandle):
    """`DualPromptHandle` of a model of texts."""


def _fill(fresh: Tensor, previous: Tensor | None, start: str) -> None:
    if previous is None:
        fill_prompts(fresh, start)
    else:
        fresh.copy_(previous)
