"""A method in one file, the example of the checklist: a gate that scales a layer's output.

y' = (1 + g) y,  g [O], zero at first, so that the model computes what it did
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sapt_fast.methods.base import Handle
from sapt_fast.methods.config import MethodConfig
from sapt_fast.sites.output import (
    AtOutput,
    attach_output,
    detach_output,
    find_outputs,
    require_output,
)


@dataclass
class OutputGateConfig(MethodConfig["OutputGateHandle"]):
    width: int
    target_modules: list[str] = field(default_factory=lambda: ["o"])

    @property
    def method(self) -> str:
        return "output_gate"


class Gate(AtOutput):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(width), requires_grad=False)

    def at_output(self, output, args):
        return output * (1 + self.gate)


class OutputGateHandle(Handle):
    Config = OutputGateConfig
    method = attribute = "output_gate"
    site = "output"

    @classmethod
    def sites(cls, model, config):
        return find_outputs(model, config.target_modules)

    def attach(self, path: str) -> None:
        attach_output(self._model, path, self.slot, Gate(self.config.width))

    def detach(self, path: str) -> None:
        detach_output(self._model, path, self.slot)

    def require_own(self) -> None:
        for path in self.report.patched:
            require_output(self._model, path, self.slot)

    def gates(self) -> dict[str, nn.Parameter]:
        layers = {path: self._model.get_submodule(path) for path in self.report.patched}
        return {path: getattr(layer, self.slot).gate for path, layer in layers.items()}

    def grow(self, name: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.tasks.append(name)
        for gate in self.gates().values():
            gate.requires_grad_(True)

    def stored(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {path: gate.data for path, gate in self.gates().items()}, {"tasks": self.tasks}

    def restore(self, tensors, values) -> None:
        if {n: t.shape for n, t in tensors.items()} != {
            n: g.shape for n, g in self.gates().items()
        }:
            raise ValueError(f"tensors: got {sorted(tensors)}, expected gates of these layers")
        for path, gate in self.gates().items():
            gate.data.copy_(tensors[path])
        for name in values["tasks"]:
            self.grow(name)
