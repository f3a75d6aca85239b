"""Modules that train in full in addition to the adapters, such as a classification head.

PEFT calls them `modules_to_save`. A patched model trains them in place, shared by all tasks, or
gives each task a copy. Other trained parameters of the base model are found here too, so that every
checkpoint contains them.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sapt_fast.devices import is_offloaded
from sapt_fast.pools.own import Own, is_inside, own_paths
from sapt_fast.pools.sharding import is_sharded
from sapt_fast.routing.running import Running
from sapt_fast.sites.linear import Mixed


class TaskModules(nn.Module):
    """Each task's own copies of some modules; their outputs are mixed by the adapters' weights.

        output[b] = sum_k mixture[b, k] copy_k(inputs)[b]

    Without a copy, a module's output is unchanged. The module and its path stay.

    Args:
        model: the model that contains the modules; only `install` changes it.
        paths: paths of the modules, whose outputs are tensors [B, ...].

    Attributes:
        static: weights [K] while a mixture is merged into the base weights, else None.
    """

    _model: Any

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)
        self.paths = list(paths)
        self.static: Tensor | None = None
        self.copies = nn.ModuleList(nn.ModuleList() for _ in paths)
        self._hooks: list[Any] = []

    def install(self, routing: Running) -> None:
        """Replaces the modules' outputs by the mixture of the copies, until `remove`.

        Args:
            routing: the weights of the model's running forward.
        """
        for path, copies in zip(self.paths, self.copies, strict=True):
            hook = _Mixture(self, copies, path, routing)
            module = self._model.get_submodule(path)
            # First, so that other hooks of the module see the mixture.
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            self._hooks.append(handle)

    def realign(self) -> None:
        """Raises RuntimeError, before a forward, if a module with copies was replaced."""
        if torch.compiler.is_compiling():
            return
        for path in self.paths:
            hooks = self._model.get_submodule(path)._forward_hooks.values()
            if not any(isinstance(hook, _Mixture) for hook in hooks):
                raise RuntimeError(
                    f"{path}: was replaced after patch, so the tasks' copies of it would not be "
                    "used: restore the module, or replace it before sapt_fast.patch"
                )

    def remove(self) -> None:
        """Removes the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def add(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Adds a trainable copy of each module; the earlier copies freeze.

        Args:
            tensors: values of the copy, by their names in the base model; None for the base
                model's values.
        """
        self.require_fits(tensors)
        for path, copies in zip(self.paths, self._stacks(), strict=True):
            _freeze(copies)
            own = _copy_of(self._model.get_submodule(path)).requires_grad_(True)
            if tensors is not None:
                start = f"{path}."
                own.load_state_dict(
                    {n[len(start) :]: t for n, t in tensors.items() if n.startswith(start)}
                )
            copies.append(own)

    def select(self, order: Sequence[int], *, same: bool) -> None:
        """Keeps only the copies of the tasks `order`; the last trains, unless it is the `same`."""
        for copies in self._stacks():
            kept = [copies[k] for k in order]
            if not same:
                _freeze(copies)
                nn.ModuleList(kept[-1:]).requires_grad_(True)
            del copies[:]
            copies.extend(kept)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor of one task's copies, by its name in the base model."""
        return {n: tuple(t.shape) for n, t in module_tensors(self._model, self.paths).items()}

    def require_fits(self, tensors: Mapping[str, Tensor] | None) -> None:
        """Raises ValueError unless `tensors` has the shapes of one task's copies, or is None."""
        if tensors is None:
            return
        got, expected = {n: tuple(t.shape) for n, t in tensors.items()}, self.shapes()
        if got != expected:
            raise ValueError(f"modules: got shapes {got}, expected {expected}")

    def newest(self) -> Iterator[nn.Parameter]:
        """Yields the parameters of the newest task's copies."""
        for copies in self._stacks():
            if len(copies):
                yield from copies[-1].parameters()

    def tensors(
        self, task: int, state: Mapping[str, Tensor] | None = None, prefix: str = ""
    ) -> dict[str, Tensor]:
        """Returns parameters and buffers of one task's copies, by their names in the base model.

        Args:
            task: the task's index.
            state: the model's state_dict, whose values are used instead of the current ones.
            prefix: the prefix of the copies' names in it.
        """
        held = state or {}
        return {
            f"{path}.{name}": held.get(f"{prefix}copies.{place}.{task}.{name}", tensor)
            for place, (path, copies) in enumerate(zip(self.paths, self._stacks(), strict=True))
            for name, tensor in copies[task].state_dict(keep_vars=True).items()
        }

    @torch.no_grad()
    def mixed(self, weights: Tensor) -> dict[str, Tensor]:
        """Returns the tensors of modules that compute the static mixture of the copies.

        Args:
            weights: [K], in learning order.

        Raises:
            ValueError: if a module is not a plain linear layer, unless the weights are one 1 and
                zeros.
        """
        if not self.paths:
            return {}
        chosen = [k for k, weight in enumerate(weights.tolist()) if weight != 0]
        if len(chosen) == 1 and weights[chosen[0]] == 1:
            return self.tensors(chosen[0])
        for path in self.paths:
            kind = type(self._model.get_submodule(path))
            if kind not in (nn.Linear, Conv1D):
                raise ValueError(
                    f"weights: got {weights.tolist()}, expected one 1 and zeros: each task has a "
                    f"copy of {path}, and no single {kind.__name__} computes their mixture"
                )
        mixed = {name: torch.zeros_like(tensor) for name, tensor in self.tensors(0).items()}
        for k in chosen:
            for name, tensor in self.tensors(k).items():
                mixed[name] += weights[k].item() * tensor
        return mixed

    def _stacks(self) -> list[Any]:
        return list(self.copies)

    def extra_repr(self) -> str:
        return f"paths={self.paths}"


class _Mixture:
    """A forward hook that replaces a module's output by the mixture of its copies' outputs."""

    def __init__(self, owner: TaskModules, copies: Any, path: str, routing: Running) -> None:
        self.owner, self.copies, self.path, self.routing = owner, copies, path, routing

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        copies = self.copies
        if not len(copies):
            return None
        static = self.owner.static
        weights = self.routing.running if static is None else static
        if weights is None:
            raise RuntimeError(
                f"no mixture weights for {self.path}: call the patched model itself, or run its "
                "parts inside model.sapt.fixed(weights)"
            )
        weights = weights[None] if weights.dim() == 1 else weights
        self._require_fits(weights, output)
        mixed = None
        for k, own in enumerate(copies):
            weight = weights[..., k].to(output.device, output.dtype)
            # A weight of exactly zero removes a copy, even if its output is Inf or NaN.
            absent = weight == 0
            part = own(
                *(_without_gradient(value, absent) for value in args),
                **{name: _without_gradient(value, absent) for name, value in kwargs.items()},
            )
            part = torch.where(_as_wide(absent, part) & ~part.isfinite(), 0, part)
            part = _as_wide(weight, part) * part
            mixed = part if mixed is None else mixed + part
        return mixed

    def _require_fits(self, weights: Tensor, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise RuntimeError(
                f"{self.path}: got an output of type {type(output).__name__}, expected a tensor to "
                "mix; use modules_to_save with modules_per_task=False"
            )
        samples = tuple(weights.shape[:-1])
        leading = tuple(output.shape[:-1])[: len(samples)]  # the last dimension is of features
        if samples != (1,) and leading != samples:
            raise RuntimeError(
                f"{self.path}: got an output of shape {tuple(output.shape)} for weights of shape "
                f"{tuple(weights.shape)}, expected {[*samples, '...']}"
            )


def _freeze(module: nn.Module) -> None:
    """Freezes parameters, so that an optimizer that still contains them does not change them."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def _as_wide(weight: Tensor, tensor: Tensor) -> Tensor:
    """Reshapes a value per sample or token to as many dimensions as the tensor has."""
    return weight.reshape(*weight.shape, *[1] * (tensor.dim() - weight.dim()))


def _without_gradient(value: Any, absent: Tensor) -> Any:
    """Returns an input without gradient (which might be NaN) for samples without weight."""
    if not isinstance(value, Tensor) or not value.requires_grad or value.dim() < absent.dim():
        return value
    if absent.shape != (1,) and value.shape[: absent.dim()] != absent.shape:
        return value
    return torch.where(_as_wide(absent, value), value.detach(), value)


def find_modules(model: nn.Module, names: Sequence[str], patched: Sequence[str]) -> list[str]:
    """Returns the paths of the modules that `modules_to_save` names, without nested ones.

    Args:
        model: the model.
        names: last parts of paths, or whole paths.
        patched: paths of the layers that get adapters.

    Raises:
        ValueError: if a name matches no module with parameters.
        ValueError: if it matches a module that has adapters.
        ValueError: if it matches a module that cannot train, because its parameters are quantised
            or offloaded.
    """
    paths, own = [], own_paths(model)
    for name in names:
        found = [
            path
            for path, module in model.named_modules()
            if (path == name or path.endswith("." + name))
            and not is_inside(path, own)
            and _has_parameters(module)
        ]
        if not found:
            raise ValueError(
                f"modules_to_save: {name!r} matches no module with parameters in "
                f"{type(model).__name__}; its heads are named {heads(model)}"
            )
        paths += found
    for path in paths:
        if reason := _untrainable(model.get_submodule(path)):
            raise ValueError(f"modules_to_save: {path} cannot train: {reason}")
        inside = [other for other in patched if f"{other}.".startswith(f"{path}.")]
        if inside:
            raise ValueError(
                f"modules_to_save: {path} would train in full, but contains {inside[0]}, which has "
                "adapters; remove it from modules_to_save or target_modules"
            )
    return outermost(paths)


def outermost(paths: Iterable[str]) -> list[str]:
    """Returns distinct paths, without those inside another one."""
    distinct = dict.fromkeys(paths)
    return [
        path for path in distinct if not any(path.startswith(f"{other}.") for other in distinct)
    ]


def _untrainable(module: nn.Module) -> str | None:
    if any(is_offloaded(part) for part in module.modules()):
        return "accelerate offloads it, so its parameters are not in memory; give it a device"
    odd = next((n for n, p in module.named_parameters() if not p.is_floating_point()), None)
    return None if odd is None else f"{odd} is quantised"


def heads(model: Any) -> list[str]:
    """Returns the paths of heads that do not predict tokens, such as classification heads."""
    if model.base_model is model or model.get_output_embeddings() is not None:
        return []
    return [
        name
        for name, module in model.named_children()
        if module is not model.base_model
        and not isinstance(module, Own)
        and _has_parameters(module)
    ]


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers of the base model, by name, without those of methods."""
    own = own_paths(model)
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and not is_inside(name, own)
    }


def whole_modules(names: Iterable[str], adapted: Collection[str]) -> tuple[list[str], list[str]]:
    """Returns the modules that contain these tensors, for PEFT's `modules_to_save`.

    Args:
        names: names of tensors of the base model.
        adapted: paths of the layers that have adapters.

    Returns:
        The modules' paths, and the names of the tensors that PEFT cannot store with a LoRA: those
        of an adapted layer or of the model itself.
    """
    paths, others = [], []
    for name in names:
        path = name.rpartition(".")[0]
        if not path or any(f"{layer}.".startswith(f"{path}.") for layer in adapted):
            others.append(name)
        else:
            paths.append(path)
    return outermost(paths), others


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names have the prefix, by their names without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def module_tensors(model: nn.Module, paths: Iterable[str]) -> dict[str, Tensor]:
    """Returns parameters and buffers of these modules, by their names in the model."""
    return {
        f"{path}.{name}": tensor
        for path in paths
        for name, tensor in model.get_submodule(path).state_dict(keep_vars=True).items()
    }


class Changes:
    """Detects which tensors of a base model changed, to find those that were trained.

    - torch counts writes to a tensor, such as those of most optimizers, `nn.init` and `copy_`.
    - It does not count fused optimizers and writes to `p.data`. So some values of each tensor, and
      all values of heads, are compared too.
    - With several processes, only the values are compared.
    - While the model is sharded, no change is detected.
    """

    def __init__(self, model: nn.Module) -> None:
        self._changed: set[str] = set()
        self._heads = tuple(f"{path}." for path in heads(model))
        self._seen = self._look(model)

    def changed(self, model: nn.Module) -> set[str]:
        """Returns the names of the parameters and buffers that have changed."""
        now, seen = self._look(model), self._seen
        return self._changed | {n for n in now.keys() & seen.keys() if _differs(seen[n], now[n])}

    @contextmanager
    def ignoring(self, model: nn.Module) -> Iterator[None]:
        """Returns a context whose changes do not count, for merging and unmerging."""
        self.settle(model)
        try:
            yield
        finally:
            self.restart(model)

    def settle(self, model: nn.Module) -> None:
        """Stores the names of the tensors that have changed so far."""
        self._changed = self.changed(model)

    def restart(self, model: nn.Module) -> None:
        """Forgets what changed since `settle`, except in the heads.

        A head loaded from a state_dict counts as trained; a base model loaded after `patch` does
        not.
        """
        now = self._look(model)
        for name in now.keys() & self._seen.keys():
            if name.startswith(self._heads):
                now[name] = now[name][0], self._seen[name][1]
        self._seen = now

    def _look(self, model: nn.Module) -> dict[str, tuple[int, Tensor]]:
        """Returns, by name, the count of writes and some or all values."""
        if is_sharded(model):
            return {}
        return {
            name: (t._version, _values(t, None if name.startswith(self._heads) else _SAMPLES))
            for name, t in base_tensors(model).items()
            if not t.is_inference()
        }


def trained_tensors(model: nn.Module, paths: Sequence[str], changes: Changes) -> dict[str, Tensor]:
    """Returns the base model's tensors that a checkpoint must contain.

    Args:
        model: the model.
        paths: paths of modules that train in full.
        changes: the changes since the model was patched.

    Returns:
        By name, the parameters that train or have changed, and all parameters and buffers of the
        modules in `paths`.
    """
    changed = changes.changed(model)
    return {
        name: tensor
        for name, tensor in base_tensors(model).items()
        if tensor.requires_grad
        or name in changed
        or any(name.startswith(f"{path}.") for path in paths)
    }


def require_present(source: str, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises ValueError unless the model has all these tensors, in these shapes."""
    own = base_tensors(model)
    for name, tensor in tensors.items():
        here = own.get(name)
        if here is None or here.shape != tensor.shape:
            found = "none" if here is None else f"shape {tuple(here.shape)}"
            raise ValueError(
                f"{source}: {name}: got shape {tuple(tensor.shape)}, expected {found}, as in the "
                "model: it belongs to another base model"
            )


_SAMPLES = 64


def _values(tensor: Tensor, most: int | None) -> Tensor:
    """Returns values of a tensor, at most `most`; none if the tensor is not in memory."""
    if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
        return torch.empty(0)
    flat = tensor.detach().reshape(-1)
    step = 1 if most is None else max(1, len(flat) // most)
    return flat[::step].to("cpu", torch.float32, copy=True)


def _differs(before: tuple[int, Tensor], now: tuple[int, Tensor]) -> bool:
    """Returns whether a tensor was written to, or has values other than by a change of dtype."""
    # When several processes start, they write rank 0's values into every parameter.
    alone = not (dist.is_available() and dist.is_initialized())
    if now[0] > before[0] and alone:
        return True
    old, new = before[1], now[1]
    if not len(old) or not len(new):  # offloaded now or before
        return False
    roundings = (old, old.half().float(), old.bfloat16().float())
    return old.shape != new.shape or not any(
        torch.allclose(rounded, new, rtol=0, atol=0, equal_nan=True) for rounded in roundings
    )


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None and not isinstance(module, Mixed)


def _copy_of(module: nn.Module) -> nn.Module:
    """Returns a copy of a module without its hooks, which run once, on the mixture."""
    hooks = [getattr(module, name) for name in _HOOKS]
    return copy.deepcopy(module, {id(own): type(own)() for own in hooks})


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)
