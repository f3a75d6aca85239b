"""Merges a static mixture into the base weights, and restores them bit for bit.

The original weights are kept on the CPU, because subtraction in floating point would not be exact.
They have as many bytes as the patched layers' weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sapt_fast.sites.linear import base_kind

# Layers to whose weight a mixture can be added.
_PLAIN = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Addend(NamedTuple):
    """The update of one layer's weight.

    Attributes:
        layer: the layer. Its `weight` is [O, I], or [I, O] if transposed; for a convolution
            [O, ...], where I is the product of the other sizes.
        a: [R, I].
        b: [R, O], times weight and scaling.
        transposed: whether the layer stores its weight as [I, O].
    """

    layer: nn.Module
    a: Tensor
    b: Tensor
    transposed: bool


class Merged:
    """Merges a mixture into the weights of layers, until `restore`.

    Args:
        addends: the updates, by the path of each layer.
        model: the whole model, in which shared weights are found.

    Raises:
        ValueError: if a weight is quantised, sharded or offloaded.
        ValueError: if a weight is shared with another module.
        ValueError: if a layer does more than multiply by its weight.

    Nothing has changed after an error.
    """

    def __init__(self, addends: Mapping[str, Addend], model: nn.Module) -> None:
        _require_whole(addends, model)
        self._before: list[tuple[Any, Tensor]] = []
        try:
            for addend in addends.values():
                self._merge(addend)
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def _merge(self, addend: Addend) -> None:
        layer: Any = addend.layer
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        a, b = (t.to(layer.weight.device, wide) for t in (addend.a, addend.b))
        delta = a.t() @ b if addend.transposed else b.t() @ a
        merged = (layer.weight.to(wide) + delta.view(layer.weight.shape)).to(layer.weight.dtype)
        self._before.append((layer, layer.weight.detach().to("cpu", copy=True)))
        layer.weight.copy_(merged)

    @torch.no_grad()
    def restore(self) -> None:
        """Restores every weight bit for bit.

        Raises:
            ValueError: if a weight has another dtype or shape now; nothing has changed then.
        """
        for layer, before in self._before:
            now = layer.weight
            if now.dtype != before.dtype or now.shape != before.shape:
                raise ValueError(
                    f"merged weight: got {now.dtype} {tuple(now.shape)}, expected "
                    f"{before.dtype} {tuple(before.shape)}: convert the model back before unmerge()"
                )
        while self._before:
            layer, before = self._before.pop()
            layer.weight.copy_(before)


def static_weights(weights: Tensor | Sequence[float], tasks: Sequence[str]) -> Tensor:
    """Converts weights to a tensor [K] on the CPU, without gradient.

    Args:
        weights: [K], one per task.
        tasks: names of the K tasks.

    Raises:
        ValueError: if weights are not floats [K].
        ValueError: if they are not finite.
    """
    weights = torch.as_tensor(weights).detach().to("cpu")
    if weights.shape != (len(tasks),) or not weights.is_floating_point():
        raise ValueError(
            f"weights: got {weights.dtype} of shape {tuple(weights.shape)}, expected floats of "
            f"shape [{len(tasks)}], one per task of {list(tasks)}"
        )
    if not weights.isfinite().all():
        raise ValueError(f"weights: got {weights.tolist()}, expected finite values")
    return weights


def _require_whole(addends: Mapping[str, Addend], model: nn.Module) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if type(parameter) is nn.Parameter:
            names.setdefault(parameter.data_ptr(), []).append(name)
    for path, (layer, a, b, transposed) in addends.items():
        weight: Any = getattr(layer, "weight", None)
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            kept = f", {weight.dtype}" if isinstance(weight, Tensor) else ""
            raise ValueError(
                f"{path}: a mixture cannot be merged, because the weight is quantised or sharded "
                f"({type(weight).__name__}{kept})"
            )
        inputs, outputs = a.shape[1], b.shape[1]
        expected = (inputs, outputs) if transposed else (outputs, inputs)
        if weight.is_meta or weight.dim() < 2 or tuple(weight.flatten(1).shape) != expected:
            raise ValueError(
                f"{path}: a mixture cannot be merged, because the weight is not completely in "
                f"memory (got {tuple(weight.shape)} on {weight.device}, expected {expected}): "
                "gather or load the model first"
            )
        kind = base_kind(layer)
        if kind not in _PLAIN and not _multiplies(layer, kind, transposed):
            raise ValueError(
                f"{path}: a mixture cannot be merged, because the forward of {kind.__name__} is "
                "not its input times its weight plus its bias"
            )
        if getattr(layer, "max_norm", None) is not None:
            raise ValueError(
                f"{path}: a mixture cannot be merged, because rows are scaled down to max_norm "
                "when they are read"
            )
        if len(tied := names.get(weight.data_ptr(), ())) > 1:
            raise ValueError(
                f"{path}: a mixture cannot be merged, because the weight is shared: {tied}; untie "
                "it first"
            )


@torch.no_grad()
def _multiplies(layer: Any, kind: Any, transposed: bool) -> bool:
    """Returns whether a layer of another class computes what a plain one would, on a few rows.

    An embedding may scale its rows, because PEFT scales those of its adapters too.
    """
    weight = layer.weight.t() if transposed else layer.weight
    generator = torch.Generator().manual_seed(0)
    plain_kind: Any = next((base for base in kind.__mro__ if base in _PLAIN), None)
    try:
        if plain_kind is nn.Embedding:
            x = torch.arange(min(4, weight.shape[1]), device=weight.device)
            plain = weight.t()[x] * getattr(layer, "embed_scale", 1.0)
        elif plain_kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            size = (2, layer.in_channels, *weight.shape[2:])
            x = torch.randn(size, generator=generator).to(weight)
            plain = plain_kind.forward(layer, x)
        else:
            x = torch.randn(2, weight.shape[1], generator=generator).to(weight)
            plain = nn.functional.linear(x, weight, layer.bias)
        y = kind.forward(layer, x)
    except Exception:  # it needs other arguments
        return False
    if not isinstance(y, Tensor) or y.shape != plain.shape:
        return False
    rounding = max(8 * torch.finfo(weight.dtype).eps, 1e-5)
    return bool((y - plain).norm() <= rounding * plain.norm())
