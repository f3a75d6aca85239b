"""SAPT: attention over learned keys computes each input's mixture of adapters.

Zhao et al., "SAPT: A Shared Attention Framework for Parameter-Efficient Continual Learning of
Large Language Models", ACL 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sapt_fast.devices import execution_device
from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.lora_tasks import LoraHandle
from sapt_fast.methods.sapt_router import (
    SaptRouter,
    only_looks_up,
    padding_mask,
    router_shapes,
    tokens_of_prompt,
)
from sapt_fast.methods.task_config import TaskConfig
from sapt_fast.ops import transforms
from sapt_fast.ops.route import query, reflection_loss
from sapt_fast.pools.sharding import gathered, require_reduced
from sapt_fast.routing.hooks import Routing
from sapt_fast.routing.images import ImageRouting
from sapt_fast.sites.attach import group_by_input
from sapt_fast.sites.find import layers_to_patch
from sapt_fast.sites.image_embeddings import reads_images
from sapt_fast.sites.image_queries import ImageQueries
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.towers import input_layer, input_width, token_embedding
from sapt_fast.sites.warm import run_mixed
from sapt_fast.storage.tasks import Expected

__all__ = ["SaptConfig", "SaptHandle", "SaptRouter"]


@dataclass
class SaptConfig(TaskConfig["SaptHandle"]):
    """Shape, placement and routing of a model's adapters.

    The defaults work across backbones; `official` returns the settings of the original SAPT code.

    Example:
        >>> from sapt_fast import SaptConfig
        >>> SaptConfig(r=4, target_modules=["q_proj", "v_proj"]).pooling
        'mean'
        >>> SaptConfig(r=0)
        Traceback (most recent call last):
        ValueError: r: got 0, expected an integer, at least 1 and at most 65536
    """

    @property
    def method(self) -> str:
        """The name of the method: "sapt", or "sapt_prompt" with `adapter="prompt"`."""
        return "sapt_prompt" if self.adapter == "prompt" else "sapt"

    @classmethod
    def official(cls, model: str, benchmark: str) -> SaptConfig:
        """Returns the settings of the original SAPT code, with its deviations from the paper.

        It max-pools the embeddings, includes padding in the pooling, and passes no gradient to
        inputs through earlier adapters.

        Args:
            model: "t5" or "llama".
            benchmark: "superni" or "long_sequence".

        Raises:
            ValueError: if there are no settings for this model and benchmark.

        Example:
            >>> from sapt_fast import SaptConfig
            >>> config = SaptConfig.official("t5", "superni")
            >>> config.r, config.pooling, config.mask_padding, config.grad_through_frozen
            (4, 'max', False, False)
        """
        if (model, benchmark) not in _OFFICIAL:
            raise ValueError(
                f"official: got ({model!r}, {benchmark!r}), expected one of {sorted(_OFFICIAL)}"
            )
        r, alpha, kl_ratio = _OFFICIAL[model, benchmark]
        return cls(
            r=r,
            lora_alpha=alpha,
            kl_ratio=kl_ratio,
            query_init="normal" if model == "llama" else "linear",
            pooling="max",
            mask_padding=False,
            grad_through_frozen=False,
        )


_OFFICIAL = {
    ("t5", "superni"): (4, 32, 0.5),
    ("t5", "long_sequence"): (8, 32, 0.1),
    ("llama", "superni"): (4, 32, 1.0),
    ("llama", "long_sequence"): (4, 32, 2.0),
}


class SaptHandle(LoraHandle):
    """The tasks, the router and the losses of a patched model.

    Attributes:
        router: a module with `add_key`, `pool`, `scores` and `weights`, such as `SaptRouter`.
        targets: by task name, the target attention [k] of the reflection loss: the mean attention
            over the task's inputs when it had been learned (k = 1 + its index; learning order).
            The training code fills it; it is saved and loaded with the adapters.

    Example:
        >>> import sapt_fast, torch
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> model = sapt_fast.patch(load_backbone())
        >>> model.sapt.add_task("old")
        >>> old_inputs = torch.tensor([[4, 5, 6], [9, 8, 7]])
        >>> target = model.sapt.route(old_inputs).mean(0).detach()
        >>> model.sapt.add_task("new")  # the first adapter and its key freeze
        >>> loss = model.sapt.reflection_loss(old_inputs, target)
        >>> with model.sapt.fixed(torch.tensor([1.0, 0.0])):  # the first adapter alone
        ...     tokens = model.generate(old_inputs, max_new_tokens=3)
        >>> tokens = model.generate(old_inputs, max_new_tokens=3)  # routed by the inputs
        >>> model.sapt.attention.shape
        torch.Size([2, 2])
    """

    Config: ClassVar[type[MethodConfig[Any]]] = SaptConfig
    method = "sapt"
    attribute = "sapt"
    trains_router: ClassVar[bool] = True

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        embedding = input_layer(model)
        self._queries = _image_queries(model, config)
        copied = [model.get_submodule(path) for path in self.task_modules.paths]
        read = self._queries is None and not only_looks_up(embedding)
        if read and any(module is embedding for module in copied):
            raise ValueError(
                f"modules_to_save: tasks cannot have copies of the input embedding "
                f"({type(embedding).__name__}), because the router calls it; use "
                "modules_per_task=False"
            )
        self.router = SaptRouter(
            input_width(model),
            config,
            initializer_range=getattr(model.config, "initializer_range", 0.02),
            device=execution_device(embedding),
            dtype=config.adapter_dtype(embedding.weight.dtype),
        )
        kind = Routing if self._queries is None else ImageRouting
        self.routing = kind(model, self.signal, self._has_tasks, self._count)
        if config.standardize_query:
            self.router.standardize(embedding, embedding.weight.shape[0])

    # --- where the adapters are ---

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Returns the linear layers that the config selects, and why others are skipped.

        Raises:
            ValueError: if no layer can be patched, or the router cannot read the model's inputs.
        """
        if _image_queries(model, config) is None:
            token_embedding(model)
        return layers_to_patch(model, config)

    def install(self) -> None:
        """Adds the hooks, and groups the layers that share an input, to compute them together."""
        group_by_input(self._model, self.report.patched)
        super().install()

    def put_task(
        self,
        name: str,
        adapters: Any,
        key: Tensor,
        modules: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds a task as `restore_task` does, without checking the name.

        Earlier versions allowed some names that `restore_task` refuses.

        Args:
            name, adapters, key, modules: as in `restore_task`.

        Raises:
            ValueError: as `restore_task`, except for the name.
        """
        pools = self.pools
        if adapters.keys() != pools.keys():
            missing, others = pools.keys() - adapters.keys(), adapters.keys() - pools.keys()
            raise ValueError(
                f"adapters: got none for {sorted(missing)} and some for {sorted(others)}, expected "
                "one for each patched layer"
            )
        for path, pool in pools.items():
            a, b, scaling = adapters[path]
            try:
                pool.require_fits(a.shape[0], (a, b), scaling)
            except ValueError as error:
                raise ValueError(f"adapters: {path}: {error}") from None
        self.task_modules.require_fits(modules)
        self.router.add_key(key)
        for path, pool in pools.items():
            a, b, scaling = adapters[path]
            pool.add(a.shape[0], scaling, (a, b))
        self.task_modules.add(modules)
        self._task_added(name)

    def route(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """Returns the router's weights [B, K] for these inputs, with gradient.

        Args:
            input_ids: [B, T] (or [B, C, T], B * C samples).
            attention_mask: [B, T], 1 for tokens and 0 for padding. Ignored unless
                `config.mask_padding`.
            inputs_embeds: [B, T, D], instead of input_ids.
            labels: [B, T], for a decoder-only model: only tokens whose label is -100 are pooled.
                The first token of a text is never predicted, so its label alone marks no prompt.
            position_ids: [B, T]. If they restart within a row and there is no mask, the row is
                packed: each of its texts is routed alone, and the result is per token, [B, T, K].
            pixel_values: [B, C, H, W], for an image model, which takes nothing else. With one task
                and no gradient to compute, the weights are [1, 1].

        Raises:
            RuntimeError: if there is no task yet.
            RuntimeError: if the texts of packed rows cannot be found from position_ids.
            ValueError: if attention_mask is used and has another shape.
        """
        self._require_task()
        if self._queries is not None:
            return self.signal(pixel_values=pixel_values)
        inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "labels": labels,
            "position_ids": position_ids,
        }
        return self.routing.routed(inputs)[0]

    def signal(self, **inputs: Tensor | None) -> Tensor:
        """Returns the router's weights [B, K] for inputs with one text or image per row."""
        # One weight is 1. DDP waits for the gradients of a router that trains, even of zeros.
        if (
            self._queries is not None
            and len(self.tasks) == 1
            and not (torch.is_grad_enabled() and self.router.keys.trainable.requires_grad)
        ):
            return torch.ones(1, 1, device=self._device)
        with self._in_one_piece():
            return self.router.weights(self._pooled(**inputs))

    def run_layers(self, samples: int, tokens: int) -> None:
        """Runs the router, with and without a mask, and what mixes by its weights."""
        self._require_task()
        ids = torch.zeros(samples, tokens, dtype=torch.int64, device=self._device)
        if self._queries is not None:
            norm = self.router.norm.weight
            self._run_mixture(self.router.weights(norm.new_zeros(samples, len(norm))), ids)
            return
        for mask in (torch.ones_like(ids), None):
            weights = self.signal(input_ids=ids, inputs_embeds=None, attention_mask=mask)
        self._run_mixture(weights, ids)

    def _run_mixture(self, weights: Tensor, ids: Tensor) -> None:
        weights = weights.expand(len(ids), -1).detach().requires_grad_(weights.requires_grad)
        run_mixed(self.layers.values(), weights, ids.shape[1])

    def reflection_loss(
        self,
        input_ids: Tensor | None = None,
        target: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """Returns KL(target || prediction) on inputs of an earlier task, averaged over the texts.

        Args:
            input_ids, attention_mask, labels, position_ids, pixel_values: as in `route`.
            target: [K'] or [B, K'] in learning order; [S, K'] for the S texts of packed rows.
                Missing newer tasks count as zeros.

        Raises:
            RuntimeError: if there is no task yet, or the method does not use the router.
            RuntimeError: if the router is sharded. FSDP2 shards it, except between the model's
                forward and its backward.
            ValueError: if target is None, or has negative or non-finite values.
        """
        self._require_routing("reflection_loss")
        if target is None:
            raise ValueError("target: got None, expected weights [K'] or [B, K']")
        known = transforms.values(target)
        if known is not None and (not torch.isfinite(known).all() or (known < 0).any()):
            raise ValueError("target: got negative or non-finite values, expected weights")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "position_ids": position_ids,
        }
        with self._in_one_piece():
            if self._queries is not None:
                pooled = self._pooled(pixel_values=pixel_values)
            else:
                pooled = self.routing.of_texts(self._pooled, inputs)
            return reflection_loss(self.router.scores(pooled), target.to(pooled.device))

    @torch.no_grad()
    def init_key(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
    ) -> None:
        """Sets the newest key to the mean query of these inputs (`key_init="mean_query"`).

        Args:
            input_ids, attention_mask: [B, T].
            pixel_values: [B, C, H, W], for an image model.

        Raises:
            RuntimeError: if there is no task yet, or the method does not use the router.
        """
        self._require_routing("init_key")
        pooled = self._pooled(input_ids, None, attention_mask, pixel_values=pixel_values)
        queries = query(pooled, self.router.projection)
        self.router.keys.trainable.copy_(queries.mean(0, keepdim=True))

    def _require_routing(self, name: str) -> None:
        """Raises RuntimeError if there is no task, or the method does not weigh by the router."""
        if not self.trains_router:
            raise RuntimeError(
                f"{name}: not available for {self.method!r}, whose weights are not those of SAPT's "
                "router"
            )
        self._require_task()

    # --- on disk ---

    @classmethod
    def expected(cls, model: Any, config: Any, report: PatchReport) -> Expected:
        """Returns what a saved folder of this method with this config must contain."""
        router = router_shapes(input_width(model), config)
        return Expected(config, cls.adapter_files, report.patched, report.patched, router)

    def _in_one_piece(self, module: nn.Module | None = None) -> AbstractContextManager[None]:
        """Returns a context that gathers what the router reads, for FSDP2 and ZeRO-3.

        Args:
            module: part of this handle; None for the router.
        """
        if torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()):
            return nullcontext()
        require_reduced(self.router.keys)
        embedding = input_layer(self._model)
        module = self.router if module is None else module
        return gathered(self._model, module, embedding, keep=self.routing.is_running)

    def _pooled(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: Any = None,
    ) -> Tensor:
        if self._queries is not None:
            if pixel_values is None:
                raise ValueError(
                    "pixel_values: got None, expected images [B, C, H, W], which the router reads; "
                    "or run inside model.sapt.fixed(weights)"
                )
            queries = self._queries(pixel_values, bool(interpolate_pos_encoding))
            return queries.to(self.router.norm.weight.dtype)
        mask = padding_mask(attention_mask) if self.config.mask_padding else None
        chosen = tokens_of_prompt(self._model, attention_mask, labels)
        if chosen is not None:
            mask = chosen.to(torch.int64) if mask is None else chosen * mask
        embedding = self._model.get_input_embeddings()
        return self.router.pool(embedding, input_ids, inputs_embeds, mask)

    def _add_key(self) -> None:
        self.router.add_key()

    def _task_added(self, name: str) -> None:
        if not self.tasks:
            for parameter in self.router.parameters():
                parameter.requires_grad_(parameter is not self.router.keys.frozen)
        if not self.trains_router:
            self.router.requires_grad_(False)
        super()._task_added(name)

    @property
    def _device(self) -> torch.device:
        return self.router.norm.weight.device

    def _growing(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that `add_task` replaces by new ones."""
        for pool in self.pools.values():
            yield from (pool.a.trainable, pool.b.trainable)
        yield self.router.keys.trainable
        yield from self.task_modules.newest()

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}, layers={len(self.report.patched)}"


def _image_queries(model: Any, config: Any) -> ImageQueries | None:
    """Returns the queries of an image model; None for a model that reads tokens.

    Raises:
        ValueError: if the image model is not supported, or not with this config.
    """
    # Of a model that also reads texts (CLIPModel), texts would be mixed by the weights of images.
    if getattr(model, "main_input_name", "") != "pixel_values" or not reads_images(model):
        return None
    if config.standardize_query:
        raise ValueError(
            "standardize_query: got True for an image model, expected False: there are no random "
            "tokens to standardise by"
        )
    return ImageQueries(model, config.query_layer, config.query_pooling)
