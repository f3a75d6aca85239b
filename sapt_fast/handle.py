"""model.sapt: what a user holds of a patched model."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sapt_fast.devices import execution_device
from sapt_fast.files.names import require_folder_name
from sapt_fast.methods.sapt import SaptConfig, SaptRouter, only_looks_up
from sapt_fast.ops import transforms
from sapt_fast.ops.route import query, reflection_loss
from sapt_fast.pools.sharding import gathered, require_reduced
from sapt_fast.routing.hooks import Routing
from sapt_fast.sites.linear import Mixed
from sapt_fast.sites.modules import (
    Changes,
    TaskModules,
    base_tensors,
    find_modules,
    require_present,
    trained_tensors,
)
from sapt_fast.sites.towers import token_embedding
from sapt_fast.storage.pretrained_files import PretrainedFiles

if TYPE_CHECKING:
    from sapt_fast.pools.lora import AdapterPool
    from sapt_fast.sites.report import PatchReport

Adapter = tuple[Tensor, Tensor, float]  # A [r, in_features], B [r, out_features], alpha / r


class SaptHandle(nn.Module):
    """The tasks, the router and the losses of a patched model.

    Attributes:
        config: the SaptConfig. report: what was patched.
        router: any module with `add_key`, `pool`, `scores` and `weights`, as `SaptRouter`.
        tasks: names in learning order, oldest first.
        targets: by task name, the mean attention [k] over that task's inputs once it was learned
            (k = 1 + its index; learning order): what the reflection loss holds it to. Filled by
            whoever trains; saved and loaded with the adapters.
        task_modules: each task's own copies of `config.modules_to_save`, with
            `config.modules_per_task`.
        strategy: the continual strategy that trains the tasks, None outside of a run; saved, so
            that a folder of one that does not predict by SAPT's router is not taken for SAPT's.
        routing: the running weights.

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

    tasks: list[str]
    targets: dict[str, Tensor]
    _model: Any

    def __init__(self, model: Any, config: SaptConfig, report: "PatchReport") -> None:
        super().__init__()
        embedding = token_embedding(model)
        width = embedding.weight.shape[1]
        self.config = config
        self.report = report
        self.tasks = []
        self.targets = {}
        self.strategy: str | None = None
        self.unfrozen_before: list[str] = []
        saved = find_modules(model, config.modules_to_save or (), report.patched)
        self.task_modules = TaskModules(model, saved if config.modules_per_task else ())
        copied = [model.get_submodule(path) for path in self.task_modules.paths]
        if not only_looks_up(embedding) and any(module is embedding for module in copied):
            raise ValueError(
                f"modules_to_save: the router calls the {type(embedding).__name__} that token ids "
                "go through, so tasks cannot have copies of it; use modules_per_task=False"
            )
        self._in_place = [] if config.modules_per_task else saved
        self._changes = Changes(model)
        self.router = SaptRouter(
            width,
            config,
            initializer_range=getattr(model.config, "initializer_range", 0.02),
            device=execution_device(embedding),
            dtype=config.adapter_dtype(embedding.weight.dtype),
        )
        # Not a submodule: the handle is one of the model's.
        object.__setattr__(self, "_model", model)
        self.routing = Routing(model, self._route, self._has_tasks, self._count)
        self.files = PretrainedFiles(self)
        if config.standardize_query:
            self.router.standardize(embedding, embedding.weight.shape[0])

    def add_task(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Adds an adapter to every patched layer and a key; they train, the earlier ones freeze.

        Args:
            name: unique; used as a folder name by `save_pretrained`.
            optimizer: if given, the new parameters take the place of those they follow in its
                parameter groups, with fresh state.

        Raises:
            ValueError: name is taken or cannot be a folder on every file system (it is empty, too
                long, differs from another in case alone, ...); the optimizer holds none of the
                parameters to follow; or a layer is no longer ours. Nothing has changed then.
        """
        self._require_new(name)
        before = list(self._growing())
        if optimizer is not None:
            _require_held(optimizer, before)
        self._add_adapters()
        self.router.add_key()
        self.task_modules.add()
        self._task_added(name)
        if optimizer is not None:
            _follow(optimizer, before, list(self._growing()))

    def restore_task(
        self,
        name: str,
        adapters: Any,
        key: Tensor,
        modules: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`add_task` with weights that exist already, as a checkpoint has them.

        Args:
            name: as in `add_task`.
            adapters: by the path of each patched layer, A [r, in_features], B [r, out_features]
                and the scaling; copied, ranks may differ. With `adapter="prompt"` the prompt
                [P, D].
            key: [D].
            modules: the task's copies of `modules_to_save`, by their names in the base model; None
                for the base model's own.

        Raises:
            ValueError: as `add_task`; adapters lacks a layer, names another, or holds a matrix of
                another shape; or key has another shape. Nothing has changed then.
        """
        self._require_new(name)
        self.put_task(name, adapters, key, modules)

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
    def pools(self) -> dict[str, "AdapterPool"]:
        """The adapter pool of every patched layer, by its path in the model; raises as `layers`."""
        return {path: cast(Any, layer).sapt_pool for path, layer in self.layers.items()}

    @property
    def attention(self) -> Tensor | None:
        """Weights [B, K] of this thread's last forward, detached; None before the first
        and after one inside a transform of torch.func.

        In generation with beams or several returned sequences B counts these, and where samples
        have C choices [B, C, T] it counts all B * C choices. Of packed rows, in which several texts
        follow each other, the weights are those of every token, [B, T, K].
        """
        weights = self.routing.weights
        return None if weights is None else weights.detach()

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
            RuntimeError: there is no task yet; or it cannot be told from position_ids where texts
                end.
            ValueError: a continual strategy trained the tasks whose predictions are not those of
                the router.
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

    def _route(self, **inputs: Tensor | None) -> Tensor:
        """[B, K] for texts in rows of their own."""
        if self.strategy is not None:
            from sapt_fast.storage.description import require_routed

            require_routed(self.strategy, "model")
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

    def fixed(self, weights: Tensor) -> AbstractContextManager[None]:
        """A context in which these weights stand in for the router's, in this thread.

        Args:
            weights: [K] or [1, K] for every input, [B, K] per sample or (of LoRAs) [B, T, K] per
                token. Where samples have choices [B, C, T], [B, K] is for all choices of a sample;
                of packed rows, [S, K] is for their S texts. A forward whose batch is another than
                B raises RuntimeError.

        Raises:
            ValueError: the shape does not fit, or weights are not finite.
        """
        weights = self.routing.checked(weights)
        known = transforms.values(weights)
        if known is not None and not torch.isfinite(known).all():
            raise ValueError("weights: got non-finite values, expected finite floats")
        return self.routing.pin(weights.to(self.router.norm.weight.device))

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What training a task updates.

        The newest adapter, its key, the query projection and `config.modules_to_save`.
        """
        return (p for p in self._model.parameters() if p.requires_grad)

    def trained_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold of the base model itself, by name.

        The modules that all tasks train, and whatever else of the base model requires a gradient or
        changed since `patch`.
        """
        return trained_tensors(self._model, self._in_place, self._changes)

    def restore_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies trained tensors into the base model, whose parameters among them train again.

        Args:
            tensors: as `trained_tensors` returned them.

        Raises:
            ValueError: if the model has no such tensor, or one of another shape; nothing has
                changed then.
        """
        require_present("tensors", tensors, self._model)
        own = base_tensors(self._model)
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        for name in tensors:
            if isinstance(own[name], nn.Parameter):
                own[name].requires_grad_(True)

    @torch.no_grad()
    def init_key(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Sets the newest key to the mean query of these inputs (`key_init="mean_query"`)."""
        self._require_task()
        pooled = self._pooled(input_ids, None, attention_mask)
        queries = query(pooled, self.router.projection)
        self.router.keys.trainable.copy_(queries.mean(0, keepdim=True))

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
        strategy_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """One PEFT adapter folder per task, router.safetensors and sapt_config.json; atomic.

        Arguments are those of `sapt_fast.storage.saving.save_pretrained`.
        """
        from sapt_fast.storage.saving import save_pretrained

        save_pretrained(
            self._model,
            directory,
            is_main_process=is_main_process,
            strategy_state=strategy_state,
        )

    def export_adapter(
        self,
        weights: Tensor,
        directory: str | os.PathLike[str],
        *,
        is_main_process: bool | None = None,
    ) -> None:
        """The static mixture `weights` [K] as one ordinary PEFT LoRA (or prompt); atomic.

        Arguments are those of `sapt_fast.storage.saving.export_adapter`.
        """
        from sapt_fast.storage.saving import export_adapter

        export_adapter(self._model, weights, directory, is_main_process=is_main_process)

    def merge(self, weights: Tensor | Sequence[float]) -> None:
        """Adds the static mixture `weights` [K] to the base weights, until `unmerge`.

        The model then computes what an ordinary one does, at its cost, and routes nothing; it must
        not be trained. The weights that were there are kept on the CPU.

        Raises:
            ValueError: the weights do not fit, or a layer's weight is quantised, sharded, not here
                or shared with another module; nothing has changed then.
            RuntimeError: there is no task yet, or a mixture is merged already.
        """
        from sapt_fast.sites.merging import Addend, Merged, static_weights

        self._require_task()
        self.routing.require_unmerged()
        weights = static_weights(weights, self.tasks)
        addends = {}
        for path, layer in self.layers.items():
            a, b = cast(Any, layer).sapt_pool.scaled(weights)
            addends[path] = Addend(layer, a, b, isinstance(layer, Conv1D))
        if not addends:
            raise ValueError("merge: prompts are inputs, which no base weight can hold")
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

    def install(self) -> None:
        """Adds the hooks and lets the shared `modules_to_save` train; called by `patch`."""
        self.routing.install()
        self.files.install()
        self.task_modules.install(self.routing)
        if self.task_modules.paths:
            self.routing.pools.append(self.task_modules)
        for path in self._in_place:
            self._model.get_submodule(path).requires_grad_(True)
        self._hooks = [
            self._model.register_load_state_dict_pre_hook(self._before_load),
            self._model.register_load_state_dict_post_hook(self._after_load),
        ]

    def remove(self) -> None:
        """Takes the hooks away; called by `unpatch`."""
        self.routing.remove()
        self.files.remove()
        self.task_modules.remove()
        for hook in self._hooks:
            hook.remove()

    # What a state_dict brings is as the base model was, not trained here.

    def _before_load(self, *args: Any) -> None:
        self._changes.settle(self._model)

    def _after_load(self, *args: Any) -> None:
        self._changes.restart(self._model)

    def _has_tasks(self) -> bool:
        return bool(self.tasks)

    def _count(self) -> int:
        return len(self.tasks)

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
        causal = self._model.can_generate() and not self._model.config.is_encoder_decoder
        if labels is not None and causal:
            prompt = labels == -100
            real = torch.ones_like(prompt)
            if isinstance(attention_mask, Tensor) and attention_mask.shape == labels.shape:
                real = attention_mask.to(torch.bool)
            # By their labels alone, neither padding nor the first token, which nothing predicts,
            # are a prompt. A row without one (plain language modelling) is pooled whole.
            later = real & (real.cumsum(1) > 1)
            chosen = prompt | ~(prompt & later).any(1, keepdim=True)
            mask = chosen.to(torch.int64) if mask is None else chosen * mask
        embedding = self._model.get_input_embeddings()
        return self.router.pool(embedding, input_ids, inputs_embeds, mask)

    def _require_task(self) -> None:
        if not self.tasks:
            raise RuntimeError("there is no task yet: call model.sapt.add_task(name) first")

    def _require_new(self, name: str) -> None:
        self.routing.require_unmerged()
        require_folder_name("name: got", name, self.tasks)

    def _task_added(self, name: str) -> None:
        if not self.tasks:
            for parameter in self.router.parameters():
                parameter.requires_grad_(parameter is not self.router.keys.frozen)
        self.tasks.append(name)
        self.routing.weights = None

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


def _require_held(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, parameters)):
        raise ValueError("optimizer: holds none of the parameters that the task before trained")


def _follow(
    optimizer: torch.optim.Optimizer, before: list[nn.Parameter], after: list[nn.Parameter]
) -> None:
    successor = {id(old): new for old, new in zip(before, after, strict=False)}
    for group in optimizer.param_groups:
        for old in group["params"]:
            if id(old) in successor:
                optimizer.state.pop(old, None)
        group["params"] = [successor.pop(id(p), p) for p in group["params"]]
    # The first task's copies of modules follow none.
    optimizer.param_groups[0]["params"] += after[len(before) :]
