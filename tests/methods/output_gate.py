"""A method in one file, the example of the checklist: a gate that scales a layer's output.

y' = (1 + g) y,  g [O], zero at first, so that the model computes what it did
"""

from dataclasses import dataclass

import torch
from torch import nn

from sapt_fast.methods.config import MethodConfig
from sapt_fast.methods.output import OutputHandle
from sapt_fast.sites.output import AtOutput


@dataclass
class OutputGateConfig(MethodConfig["OutputGateHandle"]):
    width: int
    target_modules: tuple[str, ...] | list[str] = ("o",)

    @property
    def method(self) -> str:
        return "output_gate"


class Gate(AtOutput):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(width), requires_grad=False)

    def at_output(self, output, args):
        return output * (1 + self.gate)


class OutputGateHandle(OutputHandle):
    Config = OutputGateConfig
    method = attribute = "output_gate"

    def make(self, path):
        return Gate(self.config.width)

    def gates(self):
        return {path: module.gate for path, module in self.modules_at().items()}

    def grow(self, name, optimizer=None):
        self.tasks.append(name)
        for gate in self.gates().values():
            gate.requires_grad_(True)

    def stored(self):
        return {path: gate.data for path, gate in self.gates().items()}, {"tasks": self.tasks}

    def restore(self, tensors, values):
        own, got = ({n: t.shape for n, t in x.items()} for x in (self.gates(), tensors))
        if got != own:
            raise ValueError(f"tensors: got {got}, expected {own}")
        for path, gate in self.gates().items():
            gate.data.copy_(tensors[path])
        for name in values["tasks"]:
            self.grow(name)
