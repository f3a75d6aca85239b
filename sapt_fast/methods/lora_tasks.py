"""The base class of methods whose tasks each add a LoRA to linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sapt_fast.methods.tasks import TaskHandle
from sapt_fast.pools.lora import AdapterPool
from sapt_fast.pools.rows import RowStack
from sapt_fast.sites.attach import mix_adapters, restore
from sapt_fast.sites.linear import Mixed
from sapt_fast.sites.merging import Addend, Merged, static_weights
from sapt_fast.sites.towers import input_layer
from sapt_fast.storage.lora import LoraFiles
from sapt_fast.storage.task_saving import stacked_rows
from sapt_fast.storage.tasks import AdapterFiles

__all__ = ["LoraHandle"]


class LoraHandle(TaskHandle):
    """The adapters of a model with one pool of LoRAs in each patched linear layer."""

    site = "linear"
    adapter_files: ClassVar[AdapterFiles] = LoraFiles()

    def attach(self, path: str) -> None:
        """Adds a pool to a layer, and swaps the layer's class for one that mixes the pool."""
        layer: Any = self._model.get_submodule(path)
        dtype = input_layer(self._model).weight.dtype
        mix_adapters(layer, self.routing, self.config, dtype)
        self.routing.pools.append(layer.sapt_pool)

    def detach(self, path: str) -> None:
        """Restores a layer's class and deletes its pool."""
        restore(self._model.get_submodule(path))

    def require_own(self) -> None:
        """Raises ValueError if another library has replaced a patched layer."""
        _ = self.layers

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Every patched layer, by its path in the model.

        Raises:
            ValueError: if another library has replaced a layer.
        """
        layers = {}
        for path in self.report.patched:
            try:
                layers[path] = self._model.get_submodule(path)
            except AttributeError:
                raise ValueError(f"{path}: the model no longer has this layer") from None
            kind = type(layers[path])
            if not isinstance(layers[path], Mixed):
                raise ValueError(
                    f"{path}: got {kind.__module__}.{kind.__name__}, expected the layer that patch "
                    "created; first undo what another library changed after patch (for PEFT, "
                    "call peft_model.unload())"
                )
        return layers

    @property
    def pools(self) -> dict[str, AdapterPool]:
        """The adapter pool of every patched layer, by its path in the model.

        Raises:
            ValueError: if another library has replaced a layer.
        """
        return {path: cast(Any, layer).sapt_pool for path, layer in self.layers.items()}

    def adapters(self, state: Mapping[str, Tensor] | None = None) -> list[Any]:
        """Returns each task's {layer path: (A [r, in], B [r, out], scaling)}.

        Sharded tensors are gathered.

        Args:
            state: the model's state_dict, whose values are used instead of the current ones.
        """
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
        """Copies the values of a stored adapter into that of task `index`."""
        for path, pool in self.pools.items():
            for own, value in zip(pool.adapter(index), adapter[path][:2], strict=True):
                own.copy_(value)

    def mixed_adapter(self, weights: Tensor, shared: Mapping[str, Tensor]) -> Any:
        """Returns one LoRA of rank R that computes the static mixture `weights` [K]."""
        return {path: (*pool.scaled(weights), 1.0) for path, pool in self.pools.items()}

    def merge(self, weights: Tensor | Sequence[float]) -> None:
        """Adds a static mixture to the base weights, until `unmerge`.

        The merged model routes nothing and runs at the cost of the base model. It must not be
        trained. The original base weights are kept on the CPU.

        Args:
            weights: [K], finite; in learning order.

        Raises:
            ValueError: if the weights do not fit.
            ValueError: if a layer's base weight is quantised, sharded, not in memory, or shared
                with another module; nothing has changed then.
            RuntimeError: if there is no task yet.
            RuntimeError: if a mixture is merged already.
        """
        self._require_task()
        self.routing.require_unmerged()
        weights = static_weights(weights, self.tasks)
        addends = {}
        for path, layer in self.layers.items():
            a, b = cast(Any, layer).sapt_pool.scaled(weights)
            addends[path] = Addend(layer, a, b, isinstance(layer, Conv1D))
        with self._trained.changes.ignoring(self._model):
            self.routing.merged = Merged(addends, self._model)
        self.task_modules.static = weights

    def unmerge(self) -> None:
        """Restores the base weights of before `merge` bit for bit; does nothing if not merged.

        Raises:
            ValueError: if the model was converted to another dtype after `merge`; nothing has
                changed then.
        """
        with self._trained.changes.ignoring(self._model):
            self.routing.unmerge()
        self.task_modules.static = None

    def _add_adapters(self) -> None:
        for pool in self.pools.values():
            pool.add(self.config.r, self.config.lora_alpha / self.config.r)

    def _rows(self) -> Iterator[tuple[RowStack, Sequence[int]]]:
        for pool in self.pools.values():
            yield from ((pool.a, pool.ranks), (pool.b, pool.ranks))
        yield from super()._rows()

    def _selected(self, order: Sequence[int], *, same: bool) -> None:
        super()._selected(order, same=same)
        for pool in self.pools.values():
            pool.reorder(order)
