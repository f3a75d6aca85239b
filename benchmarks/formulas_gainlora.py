"""Records a run of GainLoRA with InfLoRA's adapters, computed from its formulas in plain torch.

    python benchmarks/formulas_gainlora.py tests/data/formulas/gainlora.safetensors

The recorded file was made by this script, from the equations that the authors' code
(github.com/liangyanshuo/gainlora) implements; it was not made by running that code. Of that code,
the scaling of rows after each projection is left out. All rows have one length, so that padding
plays no part. Nothing of sapt_fast is used: the projections are full matrices, every adapter is
computed on its own, and the singular value decompositions are numpy's.

The file contains, for T tasks on a tiny LLaMA:

- base.<name>: the model's weights; rows [T, N, L] token ids, of which the first `prompt` are the
  prompt.
- start.down [H, D], start.up [D, H]: the first gate; start.keys [T, D]: the keys as drawn.
- losses [T, S]; weights.<t> [T N, t + 1]: of all rows after task t, by the gates in learning order.
- delta.<t>.<layer>: B_t A_t of the layer; down.<t>, up.<t>, key.<t>: the gate of task t, whose key
  has an arbitrary sign.
- sizes.<t>.<memory>: the dimension of a memory after task t.

The metadata contains the settings and how the file was made.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SETTINGS: dict[str, Any] = {
    "r": 2, "lora_alpha": 4, "hidden": 6, "threshold": 0.99, "gate_threshold": 0.95,
    "expected_tasks": 15, "learning_rate": 0.03, "steps": 6, "batch": 4, "prompt": 4, "tasks": 3,
    "rows": 8, "length": 7,
}  # fmt: skip
MODEL = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
MADE_FROM = "the formulas, by benchmarks/formulas_gainlora.py; not by running the authors' code"


class Run:
    """The tasks in sequence, as the equations say it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        torch.manual_seed(7)
        self.model = LlamaForCausalLM(LlamaConfig(**MODEL)).float().double().eval()
        self.model.requires_grad_(False)
        s, width = SETTINGS, MODEL["hidden_size"]
        shape = s["tasks"], s["rows"], s["length"]
        low = torch.arange(s["tasks"])[:, None, None] * 7 + 1  # each task has its own tokens
        self.rows = torch.randint(7, shape, generator=generator) + low
        draw = lambda *size: torch.rand(*size, generator=generator).double() * 2 - 1  # noqa: E731
        self.start_down = draw(s["hidden"], width)
        self.start_up = draw(width, s["hidden"])
        self.start_keys = draw(s["tasks"], width)
        self.layers = {
            name: module
            for name, module in self.model.named_modules()
            if name.endswith(("q_proj", "v_proj"))
        }
        self.adapters: list[dict[str, tuple[Tensor, Tensor]]] = []
        self.gates: list[tuple[Tensor, Tensor, Tensor]] = []
        self.memory: dict[str, np.ndarray] = {}

    def weights(self, ids: Tensor) -> Tensor:
        """Returns w [B, K] of rows [B, L], whose prompt decides."""
        e = self.model.get_input_embeddings()(ids[:, : SETTINGS["prompt"]]).mean(1)
        columns = []
        for down, up, key in self.gates:
            g = F.silu(F.silu(e @ down.T) @ up.T)
            cosine = (g @ key) / (g.norm(dim=1) * key.norm())
            columns.append((2 * torch.sigmoid(4 * cosine) - 1).abs())
        return torch.stack(columns, 1)

    def logits(self, ids: Tensor, watch: Callable[[str, Tensor], None] | None = None) -> Tensor:
        """Returns the logits, with every adapter times its weight."""
        weights = self.weights(ids)
        scale = SETTINGS["lora_alpha"] / SETTINGS["r"]

        def adapted(name: str) -> Callable[..., Tensor]:
            def hook(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
                if watch is not None:
                    watch(name, args[0])
                for k, adapter in enumerate(self.adapters):
                    a, b = adapter[name]
                    output = output + weights[:, k, None, None] * scale * (args[0] @ a.T @ b.T)
                return output

            return hook

        hooks = [m.register_forward_hook(adapted(name)) for name, m in self.layers.items()]
        try:
            found: Tensor = self.model(input_ids=ids).logits
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def loss(self, ids: Tensor) -> Tensor:
        start = SETTINGS["prompt"]
        logits = self.logits(ids)[:, start - 1 : -1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, start:].flatten())

    @torch.no_grad()
    def moments(self, ids: Tensor) -> dict[str, np.ndarray]:
        """Returns the mean of x x^T for the layers' inputs and the newest gate's vectors."""
        seen: dict[str, list[Tensor]] = {}
        for row in ids:
            self.logits(row[None], lambda name, x: seen.setdefault(name, []).append(x[0]))
        e = self.model.get_input_embeddings()(ids[:, : SETTINGS["prompt"]]).mean(1)
        down, up, _ = self.gates[-1]
        hidden = F.silu(e @ down.T)
        vectors = {name: torch.cat(parts) for name, parts in seen.items()}
        vectors |= {"down": e, "up": hidden, "key": F.silu(hidden @ up.T)}
        return {name: (x.T @ x / len(x)).numpy() for name, x in vectors.items()}

    def projector(self, name: str) -> np.ndarray:
        basis = self.memory[name]
        return basis @ basis.T

    def off(self, name: str, moment: np.ndarray) -> np.ndarray:
        return moment if name not in self.memory else moment - self.projector(name) @ moment

    def begin(self, task: int) -> list[Tensor]:
        """Adds the adapter and the gate of a task; returns what trains."""
        s, adapter = SETTINGS, {}
        for name, layer in self.layers.items():
            a = torch.zeros(s["r"], layer.in_features).double()
            adapter[name] = a, torch.zeros(layer.out_features, s["r"]).double()
        self.adapters.append(adapter)
        down, up = self.gates[-1][:2] if self.gates else (self.start_down, self.start_up)
        self.gates.append((down.detach().clone(), up.detach().clone(), self.start_keys[task]))
        moments = self.moments(self.rows[task])
        for name in self.layers:
            vectors, _, _ = np.linalg.svd(self.off(name, moments[name]))
            a = torch.tensor(vectors[:, : s["r"]].T.copy()) / math.sqrt(3)
            adapter[name] = a, adapter[name][1]
        vectors, _, _ = np.linalg.svd(self.off("key", moments["key"]))
        key = torch.tensor(vectors[:, 0].copy()) * self.start_keys[task].norm()
        self.gates[-1] = (*self.gates[-1][:2], key)
        trained = [*self.gates[-1], *(b for _, b in adapter.values())]
        return [part.requires_grad_(True) for part in trained]

    @torch.no_grad()
    def project(self, before: list[Tensor]) -> None:
        """Takes from the gate's last update its part inside of the memories."""
        for name, part, old in zip(("down", "up", "key"), self.gates[-1], before, strict=True):
            if name in self.memory:
                part -= (part - old) @ torch.tensor(self.projector(name))

    def end(self, task: int) -> None:
        s = SETTINGS
        for name, moment in self.moments(self.rows[task]).items():
            threshold = s["threshold"] if name in self.layers else s["gate_threshold"]
            threshold += (1 - threshold) * task / s["expected_tasks"]
            total = (np.linalg.svd(moment)[1] ** 2).sum()
            vectors, values, _ = np.linalg.svd(self.off(name, moment))
            shares = values**2 / total
            if name not in self.memory:
                count = max(1, int((np.cumsum(shares) < threshold).sum()))
                self.memory[name] = vectors[:, :count]
                continue
            count, share = 0, (total - (values**2).sum()) / total
            while share < threshold:
                share += shares[count]
                count += 1
            self.memory[name] = np.hstack([self.memory[name], vectors[:, :count]])

    def learn(self, task: int) -> list[float]:
        trained, losses = self.begin(task), []
        optimizer = torch.optim.AdamW(trained, lr=SETTINGS["learning_rate"], weight_decay=0.0)
        for step in range(SETTINGS["steps"]):
            chosen = torch.arange(SETTINGS["batch"]) + step * SETTINGS["batch"]
            loss = self.loss(self.rows[task][chosen % SETTINGS["rows"]])
            optimizer.zero_grad()
            loss.backward()
            before = [part.detach().clone() for part in self.gates[-1]]
            optimizer.step()
            self.project(before)
            losses.append(loss.item())
        for part in trained:
            part.requires_grad_(False)
        self.end(task)
        return losses


def record() -> dict[str, Tensor]:
    """Runs all tasks; returns the content of the file."""
    run = Run()
    found = {f"base.{n}": t for n, t in run.model.state_dict().items()}
    found |= {"start.down": run.start_down, "start.up": run.start_up, "start.keys": run.start_keys}
    losses = []
    for task in range(SETTINGS["tasks"]):
        losses.append(run.learn(task))
        found[f"weights.{task}"] = run.weights(run.rows.flatten(0, 1))
        for name, (a, b) in run.adapters[-1].items():
            found[f"delta.{task}.{name}"] = b @ a
        for name, part in zip(("down", "up", "key"), run.gates[-1], strict=True):
            found[f"{name}.{task}"] = part
        for name, basis in run.memory.items():
            found[f"sizes.{task}.{name}"] = torch.tensor(basis.shape[1])
    found["losses"] = torch.tensor(losses)
    found = {name: t.detach().clone().contiguous() for name, t in found.items()}
    found = {n: t.float() if t.is_floating_point() else t for n, t in found.items()}
    return {**found, "rows": run.rows}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"made_from": MADE_FROM, "settings": SETTINGS, "model": MODEL}
    save_file(record(), path, {n: json.dumps(value) for n, value in metadata.items()})
