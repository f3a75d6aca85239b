"""X-LoRA models: all experts of a layer in one pass, with weights per token.

X-LoRA (Buehler and Buehler, 2024) classifies every token and scales each layer's LoRA experts by
the result. PEFT's loop stores a scaled copy of x and an output for every expert. Here one product
over the stacked experts computes the same numbers. If the scaling pass scales by zero, the experts
are skipped. PEFT still computes the classifier, top-k and softmax. Generation uses a key-value
cache if `xlora_generation` supports the model.
"""

from dataclasses import dataclass
from typing import Any

from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.xlora.layer import XLoraLinearLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from sapt_fast.methods.base import Handle
from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.peft.layers import mixed
from sapt_fast.methods.peft.parts import drop_rate, why_not_plain
from sapt_fast.methods.peft.switched import switched_parts, why_switched
from sapt_fast.methods.peft.xlora_generation import CachedGeneration
from sapt_fast.sites.report import PatchReport


@dataclass
class XLoraConfig(MethodConfig["XLoraHandle"]):
    """The config of a patched X-LoRA model; it has no fields, PEFT keeps its own config."""

    @property
    def method(self) -> str:
        """The name of the method."""
        return "xlora"


class XLoraHandle(Handle):
    """`model.sapt` of an X-LoRA model.

    Attributes:
        report: the layers that compute their experts in one pass, those that run through PEFT, and
            the reason if generation runs as in PEFT.
        generation: the replacement of `model.generate`.
    """

    Config = XLoraConfig
    method = "xlora"
    attribute = "sapt"
    site = "linear"
    freezes = False

    def __init__(self, model: Any, config: Any, report: PatchReport) -> None:
        super().__init__(model, config, report)
        self.generation = CachedGeneration(model, all_pooled=not report.skipped)
        if self.generation.obstacle is not None:
            note = f"generation without a cache, as in PEFT: {self.generation.obstacle}"
            report.notes.append(note)  # `patch` logs the notes
            self.generation.logged.add(self.generation.obstacle)

    @classmethod
    def sites(cls, model: Any, config: Any) -> PatchReport:
        """Returns the linear layers whose experts are computed in one pass.

        Raises:
            ValueError: if X-LoRA has no linear layer in the model.
        """
        report = PatchReport()
        for path, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            if type(layer) is lora.Linear and _loop_of(layer) is not None:
                report.patched.append(path)
            else:
                kind = repr(layer).partition("(")[0]
                report.skipped[path] = f"experts of {kind} run through PEFT"
        report.notes += [
            f"{path}: {why_switched(part)}; PEFT uses the active adapter's, whatever the scalings"
            for path, part in switched_parts(model)
            if isinstance(part, AuxiliaryTrainingWrapper)
        ]
        if not report.patched:
            raise ValueError(f"model: got no linear layer with X-LoRA, expected one. {report}")
        return report

    def attach(self, path: str) -> None:
        """Replaces the forward that X-LoRA set on a layer."""
        layer: Any = self._model.get_submodule(path)
        layer.forward = PooledExperts(layer.forward.__self__, self.generation).forward

    def detach(self, path: str) -> None:
        """Restores the forward that X-LoRA set on the layer."""
        layer: Any = self._model.get_submodule(path)
        layer.forward = layer.forward.__self__.loop.forward

    def install(self) -> None:
        """Replaces PEFT's generation."""
        self.generation.install()

    def remove(self) -> None:
        """Restores PEFT's generation."""
        self.generation.remove()


class PooledExperts:
    """Replaces the forward of PEFT's `XLoraLinearLayer`, and keeps that layer.

    Args:
        loop: PEFT's layer.
        generation: the model's generation, which has the scalings while it uses a cache.
    """

    def __init__(self, loop: XLoraLinearLayer, generation: CachedGeneration) -> None:
        self.loop = loop
        self.generation = generation
        self.layer: Any = loop.target

    def forward(
        self, x: Tensor, *args: Any, scalings: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Computes the base output plus the scaled experts, as `XLoraLinearLayer.forward`.

        Args:
            x: [B, T, in_features].
            args, kwargs: further arguments of the base layer.
            scalings: [B, T, layers, K].
        """
        loop, layer, running = self.loop, self.layer, self.generation.running
        if scalings is None:
            scalings = running.scalings
        if running.base_only or (layer.disable_adapters and self._scales_by_zero()):
            return layer.base_layer(x, *args, **kwargs)
        drops = any(drop_rate(dropout) for dropout in layer.lora_dropout.values())
        off = loop.adapters_disabled or layer.merged or drops
        others = args or kwargs or x.dim() != 3
        if scalings is None or others or off or why_not_plain(layer) is not None:
            return loop.forward(x, *args, scalings=scalings, **kwargs)
        weights = loop.get_maybe_topk_scalings(scalings) * loop.config.global_scaling_weight
        adapters = tuple(layer.active_adapters)
        mixture = weights.expand(*x.shape[:-1], -1).reshape(-1, len(adapters))
        return mixed(layer, x, adapters, mixture)

    def _scales_by_zero(self) -> bool:
        """Returns whether PEFT's scaling pass, which disables the layer, adds no expert."""
        classifier: Any = self.loop.model.internal_xlora_classifier
        return bool(classifier.override_scaling_pass_value == 0)


def _loop_of(layer: nn.Module) -> XLoraLinearLayer | None:
    owner = getattr(vars(layer).get("forward"), "__self__", None)
    return owner if isinstance(owner, XLoraLinearLayer) else None
