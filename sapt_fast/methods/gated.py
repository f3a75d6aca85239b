"""Mixtures of LoRA experts that a router in each layer weighs for each token, trained from scratch.

MixLoRA (Li et al., arXiv 2404.15159), LoRAMoE (Dou et al., arXiv 2312.09979) and HydraLoRA (Tian
et al., arXiv 2404.19245) differ in the gate and in whether the experts share A.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sapt_fast.devices import execution_device
from sapt_fast.methods.base import Handle
from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.task_config import FIELDS, list_names, require, require_fields
from sapt_fast.ops.gates import Gate
from sapt_fast.pools.gated import Experts, GatedPool
from sapt_fast.routing.gates import Gates
from sapt_fast.sites.attach import put_pool, reads_encoder, restore, weight_dtype
from sapt_fast.sites.find import layer_features, layers_to_patch
from sapt_fast.sites.linear import Mixed
from sapt_fast.sites.modules import require_present, with_prefix
from sapt_fast.sites.report import PatchReport
from sapt_fast.sites.trained import Trained, saved_modules
from sapt_fast.sites.warm import run_on_zeros

__all__ = ["GatedConfig", "GatedHandle"]

_GATES = ("softmax", "sigmoid", "relu")
_STARTS = ("normal", "linear")
_NORMAL = 0.02  # the standard deviation in MixLoRA's code
_BALANCE = 0.001  # the coefficient in MixLoRA's code
_SHARED = ("lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
_FLAG = FIELDS["autocast_adapter_dtype"]
_CHECKS = {
    **{name: FIELDS[name] for name in ("r", *_SHARED, "top_k")},
    "num_experts": FIELDS["r"],
    "gate": (lambda v: v in _GATES, f"one of {_GATES}"),
    "shared_a": _FLAG,
    "renormalize": (lambda v: v is None or isinstance(v, bool), "True, False or None"),
    "balance": (lambda v: v is None or FIELDS["kl_ratio"][0](v), "a number, at least 0, or None"),
    "balance_in_loss": _FLAG,
    "jitter": (lambda v: FIELDS["lora_dropout"][0](v), "[0, 1)"),
    "router_init": (lambda v: v in _STARTS, f"one of {_STARTS}"),
    "autocast_adapter_dtype": _FLAG,
}


@dataclass
class GatedConfig(MethodConfig["GatedHandle"]):
    """Shape, placement and gate of the experts; the fields of PEFT's LoraConfig have its names.

    Example:
        >>> from sapt_fast import GatedConfig
        >>> GatedConfig(num_experts=4, target_modules=["q_proj", "v_proj"]).top_k
        2
        >>> GatedConfig(num_experts=4, top_k=8)
        Traceback (most recent call last):
        ValueError: top_k: got 8, expected at most 4 (num_experts)
    """

    r: int = field(default=8, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(
        default=16, metadata={"help": "Experts are scaled by lora_alpha / r."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout rate on the experts' input while training."}
    )
    target_modules: Sequence[str] | str | None = field(
        default=None,
        metadata={
            "help": "Linear layers to adapt: names (last parts of the path), one regular "
            "expression for the whole path, or 'all-linear' for all but the output head; None "
            "for query and value, as in PEFT."
        },
    )
    modules_to_save: Sequence[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to train in full and save with the experts, such as a "
            "classification head: names (last parts of the path); None for no module."
        },
    )
    num_experts: int = field(default=8, metadata={"help": "K, experts of each layer."})
    top_k: int | None = field(
        default=2, metadata={"help": "Experts that each token uses; None for all (dense)."}
    )
    gate: str = field(
        default="softmax",
        metadata={
            "help": "How the router's scores become weights: 'softmax', or 'sigmoid' and 'relu' "
            "for weights that do not depend on each other."
        },
    )
    shared_a: bool = field(
        default=False, metadata={"help": "Give all experts of a layer one A, as HydraLoRA does."}
    )
    renormalize: bool | None = field(
        default=None,
        metadata={
            "help": "Scale the weights that each token keeps to sum to 1; None for True with "
            "'softmax' and False with the other gates."
        },
    )
    balance: float | None = field(
        default=None,
        metadata={
            "help": "Coefficient of the balance loss; None for 0.001 (as in MixLoRA's code) with "
            "top_k, else 0."
        },
    )
    balance_in_loss: bool = field(
        default=True,
        metadata={
            "help": "Add the balance loss to the loss of the model's output in training; otherwise "
            "only model.gated.balance_loss() returns it."
        },
    )
    jitter: float = field(
        default=0.0,
        metadata={
            "help": "In training, the router's input is multiplied by random factors between "
            "1 - jitter and 1 + jitter."
        },
    )
    router_init: str = field(
        default="normal",
        metadata={
            "help": "Start values of the routers: 'normal' (standard deviation 0.02) or 'linear' "
            "(nn.Linear's default)."
        },
    )
    autocast_adapter_dtype: bool = field(
        default=True,
        metadata={
            "help": "Keep experts in float32 if the model's weights are float16 or bfloat16, as in "
            "PEFT; otherwise they have the weights' dtype. Routers always are in float32."
        },
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range; converts names to lists, as in JSON."""
        require_fields(self, _CHECKS)
        most = self.num_experts
        require(
            self.top_k is None or self.top_k <= most, "top_k", self.top_k,
            f"at most {most} (num_experts)",
        )  # fmt: skip
        constant = self.top_k in (None, most) and self.gate != "relu"
        require(
            not (self.balance and constant), "balance", self.balance,
            "0, because each token uses all experts, which makes the balance loss constant",
        )  # fmt: skip
        list_names(self)

    @property
    def method(self) -> str:
        """The name of the method."""
        return "gated"

    @classmethod
    def mixlora(cls, **changed: Any) -> GatedConfig:
        """Returns the gate and sizes of MixLoRA's code (TUDB-Labs/MoE-PEFT, mixlora.json).

        8 experts of rank 16, alpha 32, dropout 0.05; softmax over all, the 2 largest weights
        scaled to sum to 1; routers start from N(0, 0.02^2); balance 0.001; no jitter.

        Two things differ from that code. It has one router for each feed-forward block, and applies
        the block's activation to each expert's own sum; here each linear layer has its router. It
        adds a plain LoRA to the attention layers; here only the feed-forward layers of LLaMA-like
        models are adapted.

        Args:
            **changed: fields with other values.
        """
        given: dict[str, Any] = {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "target_modules": _FEED_FORWARD,
        }
        return cls(**{**given, **changed})

    @classmethod
    def loramoe(cls, **changed: Any) -> GatedConfig:
        """Returns the settings of LoRAMoE's code (Ablustrund/LoRAMoE, run_loramoe.sh).

        8 experts of rank 4, alpha 32, dropout 0.05, in the feed-forward layers of LLaMA-like
        models; softmax over all experts; routers start as `nn.Linear` does. Its loss between groups
        of experts and kinds of tasks, whose weight is 0 there, is not part of this. Its experts
        draw a dropout mask each; here they share one.

        Args:
            **changed: fields with other values.
        """
        return cls(**{**_dense(8), **changed})

    @classmethod
    def hydralora(cls, **changed: Any) -> GatedConfig:
        """Returns the settings of HydraLoRA's code (Clin0212/HydraLoRA, fine-tuning.sh).

        One A and 4 B of rank 4, alpha 32, dropout 0.05, in the feed-forward layers of LLaMA-like
        models; softmax over all experts; routers start as `nn.Linear` does.

        Args:
            **changed: fields with other values.
        """
        return cls(**{**_dense(4), "shared_a": True, **changed})

    def coefficient(self) -> float:
        """Returns the coefficient of the balance loss."""
        if self.balance is not None:
            return self.balance
        return 0.0 if self.top_k in (None, self.num_experts) else _BALANCE

    def experts(self) -> Experts:
        """Returns the shape and gate of each layer's experts."""
        normalized = self.gate == "softmax" if self.renormalize is None else self.renormalize
        gate = Gate(self.gate, self.top_k, None, normalized)
        deviation = _NORMAL if self.router_init == "normal" else None
        scaling = self.lora_alpha / self.r
        return Experts(
            self.num_experts, self.r, scaling, self.shared_a, gate, self.jitter, deviation
        )

    def adapter_dtype(self, base: torch.dtype) -> torch.dtype:
        """Returns the dtype of experts for base weights of dtype `base`."""
        return torch.promote_types(base, torch.float32) if self.autocast_adapter_dtype else base


_FEED_FORWARD = ["gate_proj", "down_proj", "up_proj"]


def _dense(experts: int) -> dict[str, Any]:
    """Returns the fields in which LoRAMoE's and HydraLoRA's scripts agree."""
    return {
        "num_experts": experts,
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": _FEED_FORWARD,
        "top_k": None,
        "router_init": "linear",
    }


class GatedHandle(Handle):
    """`model.gated`: K experts in each adapted linear layer, weighed by its router for each token.

        y = W x + (alpha / r) sum_k w_k(x) B_k A_k x,    w(x) = gate(R x)

    All experts and routers exist after `patch` and train, as an adapter of PEFT does after
    `get_peft_model`; the base model is frozen. B starts from zeros, so that the model computes what
    it did. Weights depend on a token alone, so cached decoding, beams and padding change nothing.

    In training, a loss that balances the experts is added to the loss of the model's output, so
    that Trainer and TRL need no change: the mean of `ops.balance_loss` over the layers, without
    padding, times `config.balance`.

    Attributes:
        routing: None: no weights travel with the forward.

    Example:
        >>> import sapt_fast, torch
        >>> from sapt_fast.demo.backbone import load_backbone
        >>> config = sapt_fast.GatedConfig(num_experts=4, target_modules=["q", "v"])
        >>> model = sapt_fast.patch(load_backbone(), config).train()
        >>> optimizer = torch.optim.AdamW(model.gated.trainable_parameters(), lr=1e-3)
        >>> ids = torch.tensor([[4, 5, 6], [9, 8, 7]])
        >>> loss = model(input_ids=ids, labels=ids).loss  # with the balance loss
        >>> loss.backward()
        >>> optimizer.step()
    """

    Config = GatedConfig
    method = "gated"
    attribute = "gated"
    site = "linear"
    grows = False

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        self._tasks = [f"expert{k}" for k in range(config.num_experts)]
        self.gates = Gates(model, config.coefficient(), config.balance_in_loss)
        saved = saved_modules(model, config, report, "the experts")
        self._trained = Trained(model, saved)

    # --- where the experts are ---

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Returns the linear layers that the config selects, and why others are skipped.

        Raises:
            ValueError: if no layer can be patched.
        """
        return layers_to_patch(model, config)

    def attach(self, path: str) -> None:
        """Adds experts to a layer, and swaps the layer's class for one that mixes them."""
        layer: Any = self._model.get_submodule(path)
        pool = GatedPool(
            *layer_features(layer),
            self.config.experts(),
            reads_encoder=reads_encoder(self._model, path),
            device=execution_device(layer),
            dtype=self.config.adapter_dtype(weight_dtype(layer, self._model.dtype)),
        )
        put_pool(layer, pool, self.gates, self.config.lora_dropout)
        pool.train(layer.training)
        self.gates.pools.append(pool)

    def detach(self, path: str) -> None:
        """Restores a layer's class and deletes its experts."""
        restore(self._model.get_submodule(path))

    @property
    def slot(self) -> str:
        """The attribute name of a layer's experts."""
        return "sapt_pool"

    @property
    def layers(self) -> dict[str, Any]:
        """Every patched layer, by its path in the model.

        Raises:
            ValueError: if another library has replaced a layer.
        """
        layers: dict[str, Any] = {}
        for path in self.report.patched:
            layers[path] = layer = self._model.get_submodule(path)
            if not isinstance(layer, Mixed):
                raise ValueError(
                    f"{path}: got {type(layer).__module__}.{type(layer).__name__}, expected the "
                    "layer that patch created; first undo what another library changed after patch"
                )
        return layers

    @property
    def pools(self) -> dict[str, GatedPool]:
        """The experts and router of every patched layer, by the layer's path in the model."""
        return {path: layer.sapt_pool for path, layer in self.layers.items()}

    def require_own(self) -> None:
        """Raises ValueError if another library has replaced a patched layer."""
        _ = self.layers

    def require_removable(self) -> None:
        """Raises ValueError if another library has replaced a method that `install` put there."""
        self.gates.require_removable()

    def install(self) -> None:
        """Adds the hooks and unfreezes `modules_to_save`; called by `patch`."""
        self.gates.install()
        super().install()
        self._trained.install()

    def remove(self) -> None:
        """Removes the hooks; called by `unpatch`."""
        self.gates.remove()
        super().remove()
        self._trained.remove()

    def run_layers(self, samples: int, tokens: int) -> None:
        """Runs each layer with its router, and the backward where gradients are enabled."""
        for layer in self.layers.values():
            pool = layer.sapt_pool
            rows, size = pool.a.trainable, (tokens, pool.a.width)
            weights = rows.new_zeros(samples, 1)
            run_on_zeros([layer], self.gates, weights, size, [getattr(layer, "weight", None), rows])

    # --- training ---

    def grow(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Raises TypeError: `patch` makes all experts."""
        raise TypeError(f"grow({name!r}): all experts exist; set num_experts in GatedConfig")

    def balance_loss(self) -> Tensor:
        """Returns the balance loss of this thread's last forward, times `config.balance`.

        For loops that compute their own loss. If the forward got labels, it is part of the output's
        loss already (unless `config.balance_in_loss` is False) and has no gradient.

        Raises:
            RuntimeError: if `config.balance` is 0, or the last forward did not train.
        """
        found = self.gates.balance_loss
        if found is None:
            raise RuntimeError(
                "balance_loss: got no loss, because "
                + (
                    "the last forward was not one of model.train() with gradients"
                    if self.gates.coefficient
                    else "its coefficient is 0; set balance in GatedConfig"
                )
            )
        return found

    # --- saving ---

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the experts, the routers, and what was trained of the base model."""
        trained = {f"trained.{name}": t for name, t in self._trained.tensors().items()}
        return {**self._own(), **trained}, {}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Copies what `stored` returned into the experts and routers.

        Raises:
            ValueError: if something is missing or has another shape; nothing has changed then.
        """
        own = self._own()
        given = {n: tuple(t.shape) for n, t in tensors.items() if not n.startswith("trained.")}
        expected = {n: tuple(t.shape) for n, t in own.items()}
        if given != expected:
            raise ValueError(f"tensors: got shapes {given}, expected {expected}")
        trained = with_prefix(tensors, "trained.")
        require_present("tensors", trained, self._model)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
            self._trained.restore(trained)

    def restore_values(self, directory: str | os.PathLike[str]) -> None:
        """Sets experts, routers and trained modules to the values in a saved folder.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if the folder contains something else, or has another config.
        """
        stored = self._read(directory)
        self.restore(stored.tensors, stored.values)

    def _own(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}": tensor
            for path, pool in self.pools.items()
            for name, tensor in pool.tensors().items()
        }

    def extra_repr(self) -> str:
        return f"experts={self.config.num_experts}, layers={len(self.report.patched)}"
