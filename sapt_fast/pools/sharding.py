"""Supports sharded parameters: FSDP2's DTensors and DeepSpeed ZeRO-3's partitions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def is_partitioned(parameter: Tensor) -> bool:
    """Returns whether ZeRO-3 manages a parameter, which is then empty unless it is in use."""
    return hasattr(parameter, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Returns whether FSDP2 or ZeRO-3 shards parameters of a model, even if gathered now."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        is_partitioned(parameter) for parameter in model.parameters()
    )


def unsharded_class(model: nn.Module) -> type:
    """Returns the class of a model before `fully_shard` replaced it by a subclass."""
    kind = type(model)
    is_fsdp = kind.__module__.startswith("torch.") and kind.__name__.startswith("FSDP")
    return kind.__bases__[-1] if is_fsdp else kind


def whole(parameter: Tensor) -> Tensor:
    """Returns a parameter's values without gradient, gathered if it is sharded.

    Every process has to call this for a sharded parameter.
    """
    if _is_released(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    detached: Any = parameter.detach()
    return detached.full_tensor() if hasattr(detached, "full_tensor") else detached


@contextmanager
def gathered(
    model: nn.Module, router: nn.Module, embedding: nn.Module, *, keep: bool
) -> Iterator[None]:
    """Returns a context that gathers the router and the embedding, to read them without a call.

    Every process has to enter it. It does nothing if nothing is sharded. ZeRO-3 gathers an
    embedding itself when it is called.

    Args:
        model: the model that contains both.
        router: the router.
        embedding: the input embedding.
        keep: whether FSDP2's parameters stay gathered after the context; the running forward
            shards them again.

    Raises:
        RuntimeError: if parameters train that FSDP2 shards now; their gradients would be lost.
    """
    if any(map(is_partitioned, router.parameters())):
        with _copies_in_place(router):
            yield
        return
    owners: dict[Any, None] = {}
    for module in (router, embedding):
        sharded = [p for p in module.parameters() if hasattr(p, "full_tensor")]
        if torch.is_grad_enabled() and any(p.requires_grad for p in sharded):
            raise RuntimeError(
                "the router's parameters are sharded, so their gradients would be lost: call this "
                "after the model's forward and before the backward of the sum of the losses. In "
                "between, FSDP2 keeps the outermost module gathered (unless it has "
                "reshard_after_forward=True)"
            )
        if sharded:
            owners[_owner(model, module)] = None
    for owner in owners:
        owner.unshard()
    try:
        yield
    finally:
        for owner in owners:
            if not keep:
                owner.reshard()


def require_reduced(module: nn.Module) -> None:
    """Raises RuntimeError if DDP would not reduce the gradient of a parameter that trains."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None or not torch.is_grad_enabled():
        return
    known = set(map(id, ddp._module_parameters))
    if any(p.requires_grad and id(p) not in known for p in module.parameters()):
        raise RuntimeError(
            "DistributedDataParallel wrapped the model before the last add_task, so it would not "
            "reduce the new adapter's gradients: wrap the model again after add_task"
        )


@contextmanager
def _copies_in_place(module: nn.Module) -> Iterator[None]:
    """Replaces ZeRO-3's parameters by gathered copies, which pass gradients on to them."""
    places = [
        (part._parameters, name, parameter)
        for part in module.modules()
        # Reading the attribute by name would make ZeRO-3 gather it for the running module.
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]
    import deepspeed

    own = [parameter for *_, parameter in places]
    with deepspeed.zero.GatheredParameters([p for p in own if _is_released(p)]):
        copies = _Copies.apply(*own)
    for (parameters, name, _), copy in zip(places, copies, strict=True):
        parameters[name] = copy
    try:
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


class _Copies(torch.autograd.Function):
    """Copies ZeRO-3's parameters, and gathers them again when their gradients arrive."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.parameters = parameters
        return tuple(parameter.clone() for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        released = [p for p in ctx.parameters if p.requires_grad and _is_released(p)]
        if released:
            released[0].all_gather(released)  # until the optimizer's step
        return gradients


def _is_released(parameter: Any) -> bool:
    return is_partitioned(parameter) and parameter.ds_status.name != "AVAILABLE"


def _owner(model: nn.Module, module: nn.Module) -> Any:
    """Returns the FSDP2 module that shards a module's parameters."""
    from torch.distributed.fsdp import FSDPModule

    path = next(name for name, found in model.named_modules() if found is module)
    while True:
        found = model.get_submodule(path)
        if isinstance(found, FSDPModule) or not path:
            return found
        path = path.rpartition(".")[0]
