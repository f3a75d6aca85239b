"""SAPT: shared attention over learned keys chooses each input's mixture of adapters.

Zhao et al., "SAPT: A Shared Attention Framework for Parameter-Efficient Continual Learning of
Large Language Models", ACL 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sapt_fast.devices import execution_device
from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.sapt_router import SaptRouter, only_looks_up, router_shapes
from sapt_fast.methods.task_config import TaskConfig
from sapt_fast.methods.tasks import TaskHandle
from sapt_fast.ops import transforms
from sapt_fast.ops.route import query, reflection_loss
from sapt_fast.pools.lora import AdapterPool
from sapt_fast.pools.sharding import gathered, require_reduced
from sapt_fast.routing.hooks import Routing
from sapt_fast.sites.attach import group_by_input, mix_adapters, restore
from sapt_fast.sites.find import chosen_names, find_layers, linear_names
from sapt_fast.sites.linear import Mixed
from sapt_fast.sites.merging import Addend, Merged, static_weights
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.towers import token_embedding
from sapt_fast.storage.lora import LoraFiles
from sapt_fast.storage.task_saving import stacked_rows
from sapt_fast.storage.tasks import AdapterFiles, Expected

__all__ = ["SaptConfig", "SaptHandle", "SaptRouter"]


@dataclass
class SaptConfig(TaskConfig["SaptHandle"]):
    """How a model's adapters are shaped, placed and routed.

    The defaults work across backbones; `official` gives the settings of the original SAPT code.

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
        """The name of the method: with `adapter="prompt"` the one whose tasks are prompts."""
        return "sapt_prompt" if self.adapter == "prompt" else "sapt"

    @classmethod
    def official(cls, model: str, benchmark: str) -> SaptConfig:
        """The released settings, quirks included: padding is pooled, no gradient reaches inputs
        through earlier adapters, plain max-pooling.

        Args:
            model: "t5" or "llama".
            benchmark: "superni" or "long_sequence".

        Raises:
            ValueError: there are no such settings.

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


class SaptHandle(TaskHandle):
    """The tasks, the router and the losses of a patched model.

    Attributes:
        router: any module with `add_key`, `pool`, `scores` and `weights`, as `SaptRouter`.
        targets: by task name, the mean attention [k] over that task's inputs once it was learned
            (k = 1 + its index; learning order): what the reflection loss holds it to. Filled by
            whoever trains; saved and loaded with the adapters.

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
    site = "linear"
    adapter_files: ClassVar[AdapterFiles] = LoraFiles()
    trains_router: ClassVar[bool] = True

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        embedding = token_embedding(model)
        copied = [model.get_submodule(path) for path in self.task_modules.paths]
        if not only_looks_up(embedding) and any(module is embedding for module in copied):
            raise ValueError(
                f"modules_to_save: the router calls the {type(embedding).__name__} that token ids "
                "go through, so tasks cannot have copies of it; use modules_per_task=False"
            )
        self.router = SaptRouter(
            embedding.weight.shape[1],
            config,
            initializer_range=getattr(model.config, "initializer_range", 0.02),
            device=execution_device(embedding),
            dtype=config.adapter_dtype(embedding.weight.dtype),
        )
        self.routing = Routing(model, self.signal, self._has_tasks, self._count)
        if config.standardize_query:
            self.router.standardize(embedding, embedding.weight.shape[0])

    # --- where the adapters are ---

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """The linear layers that the config chooses, and why others that match are skipped."""
        token_embedding(model)
        report = find_layers(model, config)
        if not report.patched:
            raise ValueError(
                f"target_modules: {chosen_names(model, config)!r} leaves no layer to patch in "
                f"{type(model).__name__}. {report}. Its linear layers are named: "
                f"{linear_names(model)}"
            )
        return report

    def attach(self, path: str) -> None:
        """Gives a layer its pool, and the class that mixes it."""
        layer: Any = self._model.get_submodule(path)
        dtype = token_embedding(self._model).weight.dtype
        mix_adapters(layer, self.routing, self.config, dtype)
        self.routing.pools.append(layer.sapt_pool)

    def detach(self, path: str) -> None:
        """Gives a layer its own class back."""
        restore(self._model.get_submodule(path))

    def install(self) -> None:
        """Adds the hooks; layers with one input are computed together from now on."""
        group_by_input(self._model, self.report.patched)
        super().install()

    def require_own(self) -> None:
        """Raises ValueError if another library has replaced a patched layer."""
        _ = self.layers

    def put_task(
        self,
        name: str,
        adapters: Any,
        key: Tensor,
        modules: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`restore_task` whatever the name, since earlier versions took some that it refuses."""
        pools = self.pools
        if adapters.keys() != pools.keys():
            missing, others = pools.keys() - adapters.keys(), adapters.keys() - pools.keys()
            raise ValueError(
                f"adapters: got none for {sorted(missing)} and some for {sorted(others)}, expected "
                "those of the patched layers"
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

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Every patched layer, by its path in the model.

        Raises:
            ValueError: another library has put something else in a layer's place.
        """
        layers = {}
        for path in self.report.patched:
            try:
                layers[path] = self._model.get_submodule(path)
            except AttributeError:
                raise ValueError(f"{path}: the model has no such layer any more") from None
            kind = type(layers[path])
            if not isinstance(layers[path], Mixed):
                raise ValueError(
                    f"{path}: got {kind.__module__}.{kind.__name__}, expected the layer that patch "
                    "put there; undo what another library did to the model since (for PEFT, "
                    "peft_model.unload())"
                )
        return layers

    @property
    def pools(self) -> dict[str, AdapterPool]:
        """The adapter pool of every patched layer, by its path in the model; raises as `layers`."""
        return {path: cast(Any, layer).sapt_pool for path, layer in self.layers.items()}

    def route(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The router's weights [B, K] for these inputs, with gradient.

        Args:
            input_ids: [B, T] (or [B, C, T], B * C samples); or inputs_embeds [B, T, D].
            attention_mask: [B, T], 1 where there is a token; any other shape raises ValueError
                (used, and looked at, when config.mask_padding).
            labels: [B, T] of a decoder-only model: only tokens whose label is -100 are pooled. A
                text's first token predicts nothing, so its label alone marks no prompt.
            position_ids: [B, T]; where they restart and there is no mask, a row is packed, and
                each of its texts is routed alone: the weights are those of each token, [B, T, K].

        Raises:
            RuntimeError: if there is no task yet, or it cannot be told from position_ids where
                texts end.
        """
        self._require_task()
        inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "labels": labels,
            "position_ids": position_ids,
        }
        return self.routing.routed(inputs)[0]

    def signal(self, **inputs: Tensor | None) -> Tensor:
        """The router's weights [B, K] for texts in rows of their own."""
        with self._in_one_piece():
            return self.router.weights(self._pooled(**inputs))

    def reflection_loss(
        self,
        input_ids: Tensor,
        target: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """KL(target || prediction) on inputs of an earlier task, the mean over the texts.

        Args:
            input_ids, attention_mask, labels, position_ids: as in `route`.
            target: [K'] or [B, K'] in learning order, of packed rows a row for each text; newer
                tasks count as zeros.

        Raises:
            RuntimeError: there is no task yet; or the router is sharded, as it is by FSDP2 except
                between the model's forward and its backward.
        """
        self._require_task()
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
            pooled = self.routing.of_texts(self._pooled, inputs)
            return reflection_loss(self.router.scores(pooled), target.to(pooled.device))

    @torch.no_grad()
    def init_key(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Sets the newest key to the mean query of these inputs (`key_init="mean_query"`)."""
        self._require_task()
        pooled = self._pooled(input_ids, None, attention_mask)
        queries = query(pooled, self.router.projection)
        self.router.keys.trainable.copy_(queries.mean(0, keepdim=True))

    # --- on disk ---

    @classmethod
    def expected(cls, model: Any, config: Any, report: PatchReport) -> Expected:
        """What a folder of this method with this config must hold."""
        router = router_shapes(token_embedding(model).weight.shape[1], config)
        return Expected(config, cls.adapter_files, report.patched, report.patched, router)

    def adapters(self, state: Mapping[str, Tensor] | None = None) -> list[Any]:
        """(A, B, scaling) of each task, by the path of each layer; gathers what is sharded."""
        pools = self.pools
        stacks = {
            path: tuple(
                stacked_rows(f"{path}.sapt_pool.{side}", getattr(pool, side), state)
                for side in "ab"
            )
            for path, pool in pools.items()
        }
        adapters = []
        for index in range(len(self.tasks)):
            own = {}
            for path, (a, b) in stacks.items():
                start = sum(pools[path].ranks[:index])
                end = start + pools[path].ranks[index]
                own[path] = a[start:end], b[start:end], pools[path].scaling[index]
            adapters.append(own)
        return adapters

    def set_adapter(self, index: int, adapter: Any) -> None:
        """Copies the values of a stored adapter into the task's own."""
        for path, pool in self.pools.items():
            for own, value in zip(pool.adapter(index), adapter[path][:2], strict=True):
                own.copy_(value)

    def mixed_adapter(self, weights: Tensor, shared: Mapping[str, Tensor]) -> Any:
        """One LoRA of rank R that computes the static mixture `weights` [K]."""
        return {path: (*pool.scaled(weights), 1.0) for path, pool in self.pools.items()}

    def merge(self, weights: Tensor | Sequence[float]) -> None:
        """Adds the static mixture `weights` [K] to the base weights, until `unmerge`.

        The model then computes what an ordinary one does, at its cost, and routes nothing; it must
        not be trained. The weights that were there are kept on the CPU.

        Raises:
            ValueError: the weights do not fit, or a layer's weight is quantised, sharded, not here
                or shared with another module; nothing has changed then.
            RuntimeError: there is no task yet, or a mixture is merged already.
        """
        self._require_task()
        self.routing.require_unmerged()
        weights = static_weights(weights, self.tasks)
        addends = {}
        for path, layer in self.layers.items():
            a, b = cast(Any, layer).sapt_pool.scaled(weights)
            addends[path] = Addend(layer, a, b, isinstance(layer, Conv1D))
        with self._changes.ignoring(self._model):
            self.routing.merged = Merged(addends, self._model)
        self.task_modules.static = weights

    def unmerge(self) -> None:
        """Gives the base weights the bits that they had before `merge`; without it, does nothing.

        Raises:
            ValueError: the model was converted to another dtype since; nothing has changed then.
        """
        with self._changes.ignoring(self._model):
            self.routing.unmerge()
        self.task_modules.static = None

    def _in_one_piece(self) -> AbstractContextManager[None]:
        """A context in which the router can run although FSDP2 or ZeRO-3 shards parameters."""
        if torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()):
            return nullcontext()
        require_reduced(self.router.keys)
        embedding = self._model.get_input_embeddings()
        return gathered(self._model, self.router, embedding, keep=self.routing.is_running)

    def _pooled(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
    ) -> Tensor:
        mask = attention_mask if self.config.mask_padding else None
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask: got {got}, expected [B, T], from which the router learns what is "
                "padding; or run inside model.sapt.fixed(model.sapt.route(input_ids, padding_mask))"
            )
        chosen = self._of_prompt(attention_mask, labels)
        if chosen is not None:
            mask = chosen.to(torch.int64) if mask is None else chosen * mask
        embedding = self._model.get_input_embeddings()
        return self.router.pool(embedding, input_ids, inputs_embeds, mask)

    def _of_prompt(self, attention_mask: Tensor | None, labels: Tensor | None) -> Tensor | None:
        """[B, T], whether a token is of the prompt; None where labels do not say."""
        causal = self._model.can_generate() and not self._model.config.is_encoder_decoder
        if labels is None or not causal:
            return None
        prompt = labels == -100
        real = torch.ones_like(prompt)
        if isinstance(attention_mask, Tensor) and attention_mask.shape == labels.shape:
            real = attention_mask.to(torch.bool)
        # By their labels alone, neither padding nor the first token, which nothing predicts, are a
        # prompt. A row without one (plain language modelling) is pooled whole.
        later = real & (real.cumsum(1) > 1)
        return prompt | ~(prompt & later).any(1, keepdim=True)

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

    def _add_adapters(self) -> None:
        for pool in self.pools.values():
            pool.add(self.config.r, self.config.lora_alpha / self.config.r)

    def _growing(self) -> Iterator[nn.Parameter]:
        """The parameters that `add_task` replaces by new ones."""
        for pool in self.pools.values():
            yield from (pool.a.trainable, pool.b.trainable)
        yield self.router.keys.trainable
        yield from self.task_modules.newest()

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}, layers={len(self.report.patched)}"
