"""One random call of an op: how it is drawn, spoiled and judged. `fuzz_ops` knows the ops."""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from fuzz_formulas import Array, Values
from torch import Tensor

from sapt_fast.dispatch import BackendError

warnings.filterwarnings("ignore", message="There is a performance drop")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REFUSALS = (ValueError, TypeError, BackendError, RuntimeError)
# What else a message may name: arguments inside an argument, and the two settings of dispatch.
_ALSO_NAMED = ("projection", "adapters", "own_lora", "op ")
Terms = tuple[Array, Array]  # a value, and the sum of the absolute values that it was summed from


class WrongError(Exception):
    """The op's answer is not the right one; the message says how."""


@dataclass
class Call:
    """A call with good arguments.

    Attributes:
        op: the function's name. function: what is called, with keywords alone.
        leaves: the float inputs by name. arguments: keywords from leaves.
        outputs: the float outputs of a result, in the order of `values`.
        values: what they must be. judge: what else must hold of a result.
        gradients: of the sum of the outputs times cotangents, by leaf; None where they are taken
            from differences of `values`.
        terms: how many products one output is summed from.
        spoiled: bad arguments, (name, value); `value` may be a function of the good one.
        differentiable: whether there are derivatives. twice: whether the second is that of the
            first, which is not so where gradients are stopped on purpose.
        poisoned: whether an input is not finite. slack: factor of the tolerance.
    """

    op: str
    function: Callable[..., Any]
    leaves: dict[str, Tensor]
    arguments: Callable[[dict[str, Tensor]], dict[str, Any]]
    values: Callable[[Values], list[Terms]]
    terms: int
    outputs: Callable[[Any], list[Tensor]] = lambda result: [result]
    judge: Callable[[Any, Values], None] = lambda result, values: None
    gradients: Callable[[Values, list[Array]], dict[str, Terms]] | None = None
    spoiled: list[tuple[str, Any]] = field(default_factory=list)
    differentiable: bool = True
    twice: bool = True
    poisoned: bool = False
    slack: float = 1.0

    def run(self, leaves: dict[str, Tensor]) -> Any:
        return self.function(**self.arguments(leaves))


class Draw:
    """Random choices and tensors of one call."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def pick(self, *options: Any) -> Any:
        return options[self.rng.integers(len(options))]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def normal(self, *shape: int) -> Array:
        values = self.rng.standard_normal(shape)
        return np.asarray(np.clip(values, -3, 3))

    def weights(self, *shape: int) -> Array:
        """Some of them exactly zero, a few negative."""
        values = self.rng.random(shape) * self.pick(1.0, 1.0, -1.0)
        return np.where(self.rng.random(shape) < self.pick(0.0, 0.3, 0.8), 0.0, values)

    def tensor(self, values: Array, dtype: torch.dtype) -> Tensor:
        """The values in a random memory layout, strides of zero included."""
        kind = self.rng.integers(8) if values.ndim else 0
        plain = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
        if kind == 4:  # columns first
            order = list(self.rng.permutation(values.ndim))
            return (
                plain.permute(order)
                .contiguous()
                .permute([order.index(d) for d in range(values.ndim)])
            )
        if kind == 5:  # every other element of a larger tensor
            larger = plain.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), 7.0)
            view = larger[..., 1::2]
            return view.copy_(plain)
        if kind == 6 and values.size:  # a stride of zero
            dim = int(self.rng.integers(values.ndim))
            return plain.narrow(dim, 0, 1).expand(values.shape)
        if kind == 7:  # an odd offset
            larger = plain.new_zeros(plain.numel() + 1)
            return larger[1:].view(plain.shape).copy_(plain)
        return plain

    def poison(self, leaves: dict[str, Tensor], names: Sequence[str]) -> None:
        """NaN or an infinity somewhere in one of the leaves, and at times zeros in another."""
        name = self.pick(*names)
        zeroed = self.pick(*names)
        if self.chance(0.5) and zeroed != name and leaves[zeroed].numel():
            changed = leaves[zeroed].clone()
            changed[int(self.rng.integers(len(changed)))] = 0
            leaves[zeroed] = changed
        if leaves[name].numel():
            changed = leaves[name].clone()
            at = tuple(int(self.rng.integers(size)) for size in changed.shape)
            changed[at] = self.pick(float("nan"), float("inf"), -float("inf"))
            leaves[name] = changed


def numbers(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def close(
    got: Tensor,
    want: Array,
    magnitude: Array,
    terms: int,
    dtype: torch.dtype,
    what: str,
    slack: float = 1.0,
) -> None:
    """Raises WrongError unless the error is one that plain torch's sums may have, twice over.

    Sums run in float32 or wider; what is stored in between is rounded to `dtype` a few times.
    """
    if tuple(got.shape) != want.shape:
        raise WrongError(f"{what}: got shape {tuple(got.shape)}, expected {want.shape}")
    values = numbers(got)
    accumulate = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    unit = torch.finfo(dtype)
    bound = slack * (magnitude * ((terms + 4) * accumulate + 4 * unit.eps) + 8 * terms * unit.tiny)
    if dtype == torch.float16:
        bound = bound + slack * 6e-8 * (terms + 8) * 4  # below its normal numbers
    finite = np.isfinite(want)
    bad = np.where(finite, ~(np.abs(values - want) <= bound), np.isfinite(values))
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise WrongError(f"{what}{list(at)}: got {values[at]}, expected {want[at]}")


def judge(call: Call, draw: Draw, mode: str) -> None:
    """Runs a good call in one of the modes; raises WrongError (or whatever the op raised)."""
    values = {name: numbers(leaf) for name, leaf in call.leaves.items()}
    with np.errstate(all="ignore"):
        _MODES[mode](call, draw, values)


def spoil(call: Call, draw: Draw, parameters: Sequence[str]) -> str:
    """Runs the call with one bad argument; raises WrongError unless that is refused by name."""
    name, value = call.spoiled[int(draw.rng.integers(len(call.spoiled)))]
    arguments = call.arguments(call.leaves)
    arguments[name] = value(arguments.get(name)) if callable(value) else value
    shown = _shown(arguments[name])
    try:
        with torch.set_grad_enabled(draw.chance(0.5)):
            call.function(**arguments)
    except REFUSALS as error:
        message = str(error)
        if any(re.search(rf"\b{n}\b", message) for n in parameters) or any(
            n in message for n in _ALSO_NAMED
        ):
            return name
        raise WrongError(
            f"bad {name} ({shown}): {type(error).__name__} names no argument: {message}"
        ) from None
    except Exception as error:
        raise WrongError(f"bad {name} ({shown}): raised {type(error).__name__}: {error}") from None
    raise WrongError(f"bad {name} ({shown}): accepted")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    return repr(value)[:60]


def _check_values(call: Call, result: Any, values: Values, what: str = "output") -> None:
    for n, (got, (want, magnitude)) in enumerate(
        zip(call.outputs(result), call.values(values), strict=True)
    ):
        close(got, want, magnitude, call.terms, _rounding(call), f"{what} {n}", call.slack)


def _rounding(call: Call) -> torch.dtype:
    """The coarsest dtype that intermediate results may be rounded to."""
    return max((leaf.dtype for leaf in call.leaves.values()), key=lambda d: torch.finfo(d).eps)


def _forward(call: Call, draw: Draw, values: Values) -> None:
    with torch.set_grad_enabled(draw.chance(0.3)):
        result = call.run(call.leaves)
    _check_values(call, result, values)
    call.judge(result, values)


def _cotangents(call: Call, draw: Draw, outputs: Sequence[Tensor]) -> list[Array]:
    return [numbers(torch.from_numpy(draw.normal(*y.shape)).to(y.dtype)) for y in outputs]


def _times(outputs: Sequence[Tensor], cs: Sequence[Array]) -> Tensor:
    """The sum of outputs times cotangents, in float64."""
    return torch.stack(
        [(y.double() * torch.from_numpy(c)).sum() for y, c in zip(outputs, cs, strict=True)]
    ).sum()


def _required(call: Call, draw: Draw) -> dict[str, Tensor]:
    chosen = [name for name in call.leaves if draw.chance(0.7)] or list(call.leaves)[:1]
    return {
        name: leaf.detach().requires_grad_() if name in chosen else leaf
        for name, leaf in call.leaves.items()
    }


def _backward(call: Call, draw: Draw, values: Values) -> None:
    leaves = _required(call, draw)
    result = call.run(leaves)
    _check_values(call, result, values)
    call.judge(result, values)
    outputs = call.outputs(result)
    cs = _cotangents(call, draw, outputs)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    pairs = [(y, c) for y, c in zip(outputs, cs, strict=True) if y.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs:
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            list(wanted.values()),
            [_like(c, y) for y, c in pairs],
            allow_unused=True,
        )
    _check_gradients(call, draw, values, cs, dict(zip(wanted, found, strict=True)))


def _like(c: Array, y: Tensor) -> Tensor:
    return torch.from_numpy(c).to(y.dtype)


def _check_gradients(
    call: Call, draw: Draw, values: Values, cs: list[Array], found: dict[str, Tensor | None]
) -> None:
    if call.gradients is None:
        for name, grad in found.items():
            direction = {name: draw.normal(*values[name].shape)}
            want = _slope(call, values, cs, direction)
            got = 0.0 if grad is None else float((numbers(grad) * direction[name]).sum())
            size = _size(call, values, cs, direction)
            if grad is not None:
                size += float(np.abs(numbers(grad) * direction[name]).sum())
            _near(call, got, want, size, f"gradient of {name}")
        return
    wants = call.gradients(values, cs)
    for name, grad in found.items():
        want, magnitude = wants[name]
        got = torch.zeros(want.shape) if grad is None else grad
        if grad is not None and grad.dtype != call.leaves[name].dtype:
            raise WrongError(f"gradient of {name}: got {grad.dtype}")
        close(
            got,
            want,
            magnitude,
            4 * call.terms,
            _rounding(call),
            f"gradient of {name}",
            2 * call.slack,
        )


def _near(call: Call, got: float, want: float, size: float, what: str) -> None:
    eps = torch.finfo(_rounding(call)).eps
    bound = call.slack * (size + abs(want) + 1e-3) * (1e-6 + 16 * call.terms * eps)
    if not abs(got - want) <= bound:
        raise WrongError(f"{what}: got {got}, expected {want} (to {bound:.1g})")


def _total(call: Call, values: Values, cs: Sequence[Array]) -> float:
    return float(sum((v * c).sum() for (v, _), c in zip(call.values(values), cs, strict=True)))


def _moved(values: Values, direction: Values, step: float) -> Values:
    return {n: v + step * direction[n] if n in direction else v for n, v in values.items()}


def _slope(call: Call, values: Values, cs: list[Array], direction: Values) -> float:
    """The derivative of the total along `direction`."""
    if call.gradients is not None:
        found = call.gradients(values, cs)
        return float(sum((found[n][0] * d).sum() for n, d in direction.items()))
    step = 1e-5
    ahead, behind = (_total(call, _moved(values, direction, s), cs) for s in (step, -step))
    return (ahead - behind) / (2 * step)


def _directions(call: Call, draw: Draw) -> Values:
    chosen = [name for name in call.leaves if draw.chance(0.7)] or list(call.leaves)[:1]
    return {
        n: numbers(torch.from_numpy(draw.normal(*call.leaves[n].shape)).to(call.leaves[n].dtype))
        for n in chosen
    }


def _tangent(call: Call, name: str, direction: Array) -> Tensor:
    return torch.from_numpy(direction).to(call.leaves[name].dtype)


def _size(call: Call, values: Values, cs: list[Array], direction: Values) -> float:
    if call.gradients is None:
        return float(sum(np.abs(c).sum() for c in cs)) * call.terms
    found = call.gradients(values, cs)
    return float(sum((found[n][1] * np.abs(d)).sum() for n, d in direction.items()))


def _pushed(call: Call, draw: Draw, values: Values) -> None:
    """jvp, by torch.func or by dual tensors."""
    direction = _directions(call, draw)
    moving = {n: _tangent(call, n, d) for n, d in direction.items()}
    for name in moving:  # a dual tensor has no stride of zero
        call.leaves[name] = call.leaves[name].clone(memory_format=torch.contiguous_format)
    if draw.chance(0.5):
        primals = {n: call.leaves[n] for n in moving}
        ys, tangents = torch.func.jvp(
            lambda chosen: tuple(call.outputs(call.run({**call.leaves, **chosen}))),
            (primals,),
            (moving,),
        )
    else:
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(call.leaves[n], t) for n, t in moving.items()}
            result = call.run({**call.leaves, **duals})
            unpacked = [forward_ad.unpack_dual(y) for y in call.outputs(result)]
        ys = tuple(u.primal for u in unpacked)
        tangents = tuple(
            torch.zeros_like(u.primal) if u.tangent is None else u.tangent for u in unpacked
        )
    cs = _cotangents(call, draw, ys)
    got = sum(float((numbers(t) * c).sum()) for t, c in zip(tangents, cs, strict=True))
    want = _slope(call, values, cs, direction)
    _near(call, got, want, _size(call, values, cs, direction), f"jvp in {list(direction)}")


def _func_grad(call: Call, draw: Draw, values: Values) -> None:
    names = list(_directions(call, draw))
    shapes = call.outputs(call.run(call.leaves))
    cs = _cotangents(call, draw, shapes)

    def total(chosen: dict[str, Tensor]) -> Tensor:
        return _times(call.outputs(call.run({**call.leaves, **chosen})), cs)

    found = torch.func.grad(total)({n: call.leaves[n] for n in names})
    _check_gradients(call, draw, values, cs, found)


def _mapped(call: Call, draw: Draw, values: Values) -> None:
    """vmap over one leaf, and of its gradient."""
    name = draw.pick(*call.leaves)
    leaf, dim = call.leaves[name], int(draw.rng.integers(call.leaves[name].ndim + 1))
    many = torch.stack([leaf, 2 * leaf], dim)
    each = [values, {**values, name: 2 * values[name]}]
    ys = torch.func.vmap(lambda t: tuple(call.outputs(call.run({**call.leaves, name: t}))), dim)(
        many
    )
    for n, of in enumerate(each):
        for y, (want, magnitude) in zip(ys, call.values(of), strict=True):
            close(
                y[n], want, magnitude, call.terms, _rounding(call), f"vmap over {name}", call.slack
            )
    cs = _cotangents(call, draw, [y[0] for y in ys])

    def total(t: Tensor) -> Tensor:
        return _times(call.outputs(call.run({**call.leaves, name: t})), cs)

    found = torch.func.vmap(torch.func.grad(total), dim)(many)
    for n, of in enumerate(each):
        _check_gradients(call, draw, of, cs, {name: found[n]})


def _twice(call: Call, draw: Draw, values: Values) -> None:
    """The derivative of a backward, against differences of its formula."""
    leaves = {n: leaf.detach().requires_grad_() for n, leaf in call.leaves.items()}
    outputs = call.outputs(call.run(leaves))
    cs = _cotangents(call, draw, outputs)
    first, second = ({n: draw.normal(*v.shape) for n, v in values.items()} for _ in range(2))
    total = _times(outputs, cs)
    if not total.requires_grad:
        return
    grads = torch.autograd.grad(
        total, list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    along = torch.stack(
        [
            (g.double() * torch.from_numpy(first[n])).sum()
            for n, g in zip(leaves, grads, strict=True)
        ]
    ).sum()
    got, size = 0.0, 1.0
    if along.requires_grad:
        found = torch.autograd.grad(along, list(leaves.values()), allow_unused=True)
        for n, g in zip(leaves, found, strict=True):
            got += 0.0 if g is None else float((numbers(g) * second[n]).sum())
            size += 0.0 if g is None else float(np.abs(numbers(g) * second[n]).sum())
    step = 1e-4 if call.gradients is not None else 1e-3
    ahead, behind = (_slope(call, _moved(values, second, s), cs, first) for s in (step, -step))
    want = (ahead - behind) / (2 * step)
    bound = (size + abs(want)) * (1e-4 + 64 * call.terms * torch.finfo(_rounding(call)).eps)
    if not abs(got - want) <= bound * call.slack:
        raise WrongError(f"second derivative: got {got}, expected {want} (to {bound:.1g})")


_MODES: dict[str, Callable[[Call, Draw, Values], None]] = {
    "forward": _forward,
    "backward": _backward,
    "jvp": _pushed,
    "grad": _func_grad,
    "vmap": _mapped,
    "double backward": _twice,
}
TRANSFORMS = ("jvp", "grad", "vmap", "double backward")
