"""Optimizers of an `ExpertBank`, with state only for the experts that have been trained.

Each expert counts its own steps. An expert's numbers and moments are those that the optimizer of
`torch.optim` would give it as a parameter of its own, which gets a gradient in just these steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sapt_fast.checks import require_number
from sapt_fast.pools.experts import ExpertBank
from sapt_fast.pools.row_table import RowTable, require_ids

__all__ = ["ROW_OPTIMIZERS", "RowAdam", "RowAdamW", "RowOptimizer", "RowSGD"]

_SIDES = ("down", "up")


class RowOptimizer:
    """The base class: keeps the state of trained experts, and writes their new rows to the bank.

    The state lies where the bank stores its rows, and updates are computed there, in float32.

    Args:
        bank: the bank.
        lr: learning rate; the attribute `lr` may be changed between steps.

    Attributes:
        name: in saved files.
        slots: names of the moments.
    """

    name: ClassVar[str]
    slots: tuple[str, ...]
    _option_names: ClassVar[tuple[str, ...]]

    def __init__(self, bank: ExpertBank, lr: float) -> None:
        require_number("lr", lr)
        self.bank, self.lr = bank, lr
        self._state = self._new_state()

    @torch.no_grad()
    def step(self, ids: Tensor, grads: tuple[Tensor, Tensor]) -> None:
        """Updates experts by one step, and drops the bank's rows in training.

        Args:
            ids: [U] int64, distinct.
            grads: of A [U, r, I] and of B [U, r, O], any floating-point dtype.

        Raises:
            TypeError, ValueError: if ids are not int64, out of range or not distinct.
            ValueError: if a shape does not fit, or a gradient is NaN or infinite.
            ValueError: if the updated rows or moments would be NaN or infinite. After any error the
                bank and the state are unchanged.
        """
        bank = self.bank
        require_ids("ids", ids, bank.num_experts)
        if len(ids) == 0:
            return
        if self._state.device != bank.home:
            self._state.apply(lambda tensor: tensor.to(bank.home))
        rows = dict(zip(_SIDES, bank.current_rows(ids), strict=True))
        given = dict(zip(_SIDES, grads, strict=True))
        for side, grad in given.items():
            if not isinstance(grad, Tensor) or grad.shape != rows[side].shape:
                shape = tuple(grad.shape) if isinstance(grad, Tensor) else None
                raise ValueError(
                    f"grads: got shape {shape} for {side}, expected {tuple(rows[side].shape)}"
                )
            _require_finite("grads", ids, grad)
        ids = ids.to(bank.home)
        at = self._state.find(ids)
        state = self._state.read(at.clamp(min=0)) if len(self._state) else self._zeros(len(ids))
        for value in state.values():
            value[at < 0] = 0
        state["steps"] += 1
        for side in _SIDES:
            rows[side] = rows[side].to(bank.home)
            moments = {slot: state[f"{slot}_{side}"] for slot in self.slots}
            self._update(rows[side], given[side].to(rows[side]), state["steps"], moments)
            _require_finite("lr: too large, the updated rows", ids, rows[side])
            for moment in moments.values():
                _require_finite("grads: too large, their moments", ids, moment)
        self._state.make_room(ids)  # may raise for want of memory
        bank.write(ids, rows["down"], rows["up"])
        self._state.write(self._state.add(ids), state)

    def _update(self, p: Tensor, g: Tensor, steps: Tensor, moments: dict[str, Tensor]) -> None:
        """Updates rows p [U, r, D] and their moments in place by gradients g.

        Args:
            steps: [U] int32, the number of this step of each row, from 1 on.
            moments: of the rows; zeros in the first step.
        """
        raise NotImplementedError

    @torch.no_grad()
    def reset_rows(self, ids: Tensor) -> None:
        """Takes the state of experts [U] away, as before their first step."""
        require_ids("ids", ids, self.bank.num_experts)
        self._state.remove(ids.to(self._state.device))

    @property
    def touched(self) -> Tensor:
        """The experts that have a state, [T] int64, in the order of their first steps."""
        return self._state.used_ids()

    @property
    def stored_rows(self) -> RowTable:
        """What stores steps and moments of the trained experts."""
        return self._state

    @property
    def state_bytes(self) -> int:
        """Bytes of the state, with what finds it (see `IdMap`) and spare rows."""
        return self._state.nbytes

    def options(self) -> dict[str, Any]:
        """Returns the values of the options that can be changed, for saving."""
        names = ("lr", *self._option_names)
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Returns name, options and the state of the trained experts, sharing its memory.

        Returns:
            name: str.
            options: dict.
            ids: [T] int64.
            tensors: by name, [T, ...]: steps, and the moments of A and of B.
        """
        tensors = {name: self._state.used(name) for name in self._state.shapes}
        return {
            "name": self.name,
            "options": self.options(),
            "ids": self._state.used_ids(),
            "tensors": tensors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces options and state by those of `state_dict`, also of a bank of another N.

        Raises:
            KeyError: if a part is missing.
            ValueError, TypeError: if it is another optimizer's, or does not fit the bank; nothing
                has changed then.
        """
        if state["name"] != self.name:
            raise ValueError(f"name: got {state['name']!r}, expected {self.name!r}")
        ids, tensors, options = state["ids"], state["tensors"], state["options"]
        require_ids("ids", ids, self.bank.num_experts)
        if set(options) != set(self.options()):
            raise ValueError(f"options: got {sorted(options)}, expected {sorted(self.options())}")
        loaded = type(self)(self.bank, **options)
        for name, (shape, dtype) in loaded._state.shapes.items():
            given = tensors[name]
            if tuple(given.shape) != (len(ids), *shape) or given.dtype != dtype:
                raise ValueError(
                    f"{name}: got {given.dtype} of shape {tuple(given.shape)}, expected {dtype} of "
                    f"shape {[len(ids), *shape]}"
                )
            _require_finite(name, ids, given)
        rows = loaded._state
        rows.reserve(len(ids))
        rows.write(rows.add(ids.to(rows.device)), {name: tensors[name] for name in rows.shapes})
        vars(self).update(vars(loaded))

    def _new_state(self) -> RowTable:
        bank = self.bank
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"steps": ((), torch.int32)}
        for side, width in zip(_SIDES, (bank.in_features, bank.out_features), strict=True):
            for slot in self.slots:
                shapes[f"{slot}_{side}"] = (bank.r, width), torch.float32
        return RowTable(bank.num_experts, shapes, bank.home)

    def _zeros(self, rows: int) -> dict[str, Tensor]:
        return {
            name: torch.zeros(rows, *shape, dtype=dtype, device=self._state.device)
            for name, (shape, dtype) in self._state.shapes.items()
        }


class RowAdam(RowOptimizer):
    """Adam (arXiv 1412.6980), as `torch.optim.Adam`.

    Args:
        bank: the bank.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: added to the gradient, times the row.
    """

    name = "adam"
    slots = ("exp_avg", "exp_avg_sq")
    _option_names = ("betas", "eps", "weight_decay")

    def __init__(
        self,
        bank: ExpertBank,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for beta in betas:
            require_number("betas", beta, most=1 - 2**-24)
        require_number("eps", eps)
        require_number("weight_decay", weight_decay)
        super().__init__(bank, lr)
        self.betas = betas[0], betas[1]
        self.eps, self.weight_decay = eps, weight_decay

    def _update(self, p: Tensor, g: Tensor, steps: Tensor, moments: dict[str, Tensor]) -> None:
        g = self._decayed(p, g)
        beta1, beta2 = self.betas
        mean, square = (moments[slot] for slot in self.slots)
        mean.lerp_(g, 1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        # In float64, as torch.optim computes them; [U, 1, 1].
        count = steps.double().view(-1, 1, 1)
        size = (self.lr / (1 - beta1**count)).to(p)
        root = (1 - beta2**count).sqrt().to(p)
        p.sub_(size * mean / (square.sqrt() / root).add_(self.eps))

    def _decayed(self, p: Tensor, g: Tensor) -> Tensor:
        return g.add(p, alpha=self.weight_decay) if self.weight_decay else g


class RowAdamW(RowAdam):
    """Adam with decoupled weight decay (arXiv 1711.05101), as `torch.optim.AdamW`.

    An expert decays only in the steps in which it gets a gradient.

    Args:
        bank: the bank.
        lr: learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: the share of the row, times lr, that a step takes away.
    """

    name = "adamw"

    def __init__(
        self,
        bank: ExpertBank,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(bank, lr, betas, eps, weight_decay)

    def _decayed(self, p: Tensor, g: Tensor) -> Tensor:
        p.mul_(1 - self.lr * self.weight_decay)
        return g


class RowSGD(RowOptimizer):
    """SGD, as `torch.optim.SGD`; with momentum it keeps one moment per number.

    Args:
        bank: the bank.
        lr: learning rate.
        momentum: decay of the moment; 0 for none.
        weight_decay: added to the gradient, times the row.
        nesterov: whether to use Nesterov's momentum.
    """

    name = "sgd"
    _option_names = ("momentum", "weight_decay", "nesterov")

    def __init__(
        self,
        bank: ExpertBank,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        require_number("momentum", momentum)
        require_number("weight_decay", weight_decay)
        if nesterov and not momentum:
            raise ValueError("nesterov: got True with momentum 0, expected a momentum above 0")
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov
        self.slots = ("momentum",) if momentum else ()
        super().__init__(bank, lr)

    def _update(self, p: Tensor, g: Tensor, steps: Tensor, moments: dict[str, Tensor]) -> None:
        if self.weight_decay:
            g = g.add(p, alpha=self.weight_decay)
        if self.momentum:
            moment = moments["momentum"]
            moment.mul_(self.momentum).add_(g)  # zero before the first step: equal to g after it
            g = g.add(moment, alpha=self.momentum) if self.nesterov else moment
        p.add_(g, alpha=-self.lr)


ROW_OPTIMIZERS: dict[str, type[RowOptimizer]] = {
    kind.name: kind for kind in (RowAdam, RowAdamW, RowSGD)
}


def _require_finite(name: str, ids: Tensor, values: Tensor) -> None:
    """Raises ValueError that names experts whose values [U, ...] are NaN or infinite."""
    finite = torch.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        bad = ids.to(finite.device)[~finite]
        raise ValueError(
            f"{name}: got NaN or infinite values for {len(bad)} experts ({bad[:8].tolist()}), "
            "expected finite ones"
        )
