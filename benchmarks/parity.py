"""Replays a recorded run of the released SAPT and prints how far this library is from it.

The folder holds `run.json` (model config, r, alpha, lr, kl_ratio and the history of losses),
`run.safetensors` (`base.*` frozen weights; `task<t>.init.*` start values of what task t trains;
`task<t>.step<s>.{input_ids,labels,replay<p>.input_ids}`; `task<t>.eval.{input_ids,attention,
generated}`) and the released checkpoints `task<t>/saved_weights`. Adapters and keys are stored
newest first there and oldest first here.

Prints one JSON object; exits 0 only if loss and kl agree to 1e-4 relative, attention to 1e-5 and
every generated token is equal.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
)

import sapt_fast
from sapt_fast.methods.sapt import SaptConfig

LOSS_TOLERANCE, ATTENTION_TOLERANCE = 1e-4, 1e-5
NEW_TOKENS = 6
_CONFIGS = {"t5": T5Config, "llama": LlamaConfig}


class Recording:
    """One recorded run.

    Args:
        folder: the folder described above.
        device: where the replay runs.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder = folder
        self.device = device
        self.run: dict[str, Any] = json.loads((folder / "run.json").read_text())
        self.tensors = load_file(folder / "run.safetensors", device=device)
        self.kind: str = self.run["config"]["model_type"]

    def base_model(self) -> PreTrainedModel:
        """The frozen model the run started from."""
        weights = {
            k.removeprefix("base."): v for k, v in self.tensors.items() if k.startswith("base.")
        }
        return build_model(self.run["config"], weights).to(self.device)

    def config(self) -> SaptConfig:
        config = SaptConfig.official(self.kind, "superni")
        config.r, config.lora_alpha = self.run["r"], self.run["lora_alpha"]
        config.kl_ratio, config.query_hidden_dim = (
            self.run["kl_ratio"],
            self.run["trans_hidden_dim"],
        )
        return config

    def task(self, task: int, name: str) -> Tensor:
        return self.tensors[f"task{task}.{name}"]

    def forward_inputs(self, task: int, step: int) -> dict[str, Tensor]:
        """What the model is called with: a causal one sees the prompt and the label."""
        ids, labels = (self.task(task, f"step{step}.{n}") for n in ("input_ids", "labels"))
        if self.kind != "llama":
            return {"input_ids": ids, "labels": labels}
        return {
            "input_ids": torch.cat([ids, labels], 1),
            "labels": torch.cat([torch.full_like(ids, -100), labels], 1),
        }


def build_model(config: dict[str, Any], weights: dict[str, Tensor]) -> PreTrainedModel:
    """A transformers model with the recorded configuration and base weights."""
    kind = config["model_type"]
    fields = {*_CONFIGS[kind]().to_dict(), "decoder_start_token_id"} - {"transformers_version"}
    known = {k: v for k, v in config.items() if k in fields}
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    built = _CONFIGS[kind](**known)
    built.tie_word_embeddings = config["tie_word_embeddings"]  # T5Config does not take it
    model = auto.from_config(built, attn_implementation="eager")
    own = model.state_dict()
    missing, _ = model.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False)
    if missing:
        raise ValueError(f"base weights: {missing} are not recorded")
    return model.float().eval()


def set_newest_task(model: Any, values: dict[str, Tensor]) -> None:
    """Writes recorded values of the trained weights, under the released names, into the model."""
    with torch.no_grad():
        for layer, pool in model.sapt.pools.items():
            parent, _, leaf = layer.rpartition(".")
            released = f"{parent}.lora_{leaf.removesuffix('_proj')}"
            pool.a.trainable.copy_(values[f"{released}.lora_A"])
            pool.b.trainable.copy_(values[f"{released}.lora_B"].t())
        router = model.sapt.router
        stem = "encoder" if model.config.is_encoder_decoder else "model"
        for parameter, name in (
            (router.down.weight, "trans_input.0.weight"),
            (router.up.weight, "trans_input.1.weight"),
            (router.norm.weight, "trans_input.3.weight"),
            (router.norm.bias, "trans_input.3.bias"),
            (router.keys.trainable, "prompt_key"),
        ):
            parameter.copy_(values[f"{stem}.{name}"])


def replay(recording: Recording) -> dict[str, Any]:
    """Trains all tasks as recorded; returns the largest deviations from the recording."""
    model = sapt_fast.patch(recording.base_model(), recording.config())
    targets: list[Tensor] = []
    deviations: dict[str, float] = {"loss": 0.0, "kl": 0.0, "attention": 0.0}
    mismatches = 0
    for task in range(recording.run["tasks"]):
        model.sapt.add_task(f"task{task}")
        prefix = f"task{task}.init."
        init = {
            k.removeprefix(prefix): v for k, v in recording.tensors.items() if k.startswith(prefix)
        }
        set_newest_task(model, init)
        losses, kls = _train(model, recording, task, targets)
        history = recording.run["history"][task]
        deviations["loss"] = max(deviations["loss"], _relative(losses, history["loss"]))
        deviations["kl"] = max(deviations["kl"], _relative(kls, history["kl"]))
        ids = recording.task(task, "eval.input_ids")
        with torch.no_grad():
            attention = model.sapt.route(input_ids=ids)
            generated = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
            )
        deviations["attention"] = max(
            deviations["attention"], _attention_error(recording, task, attention)
        )
        mismatches += int((generated != recording.task(task, "eval.generated")).sum())
        targets.append(attention.mean(0))
    return {**deviations, "generated_mismatches": mismatches}


def checkpoint_attention(recording: Recording) -> float:
    """The largest deviation of the attention after loading the released checkpoints."""
    folders = [
        recording.folder / f"task{t}" / "saved_weights" for t in range(recording.run["tasks"])
    ]
    worst = 0.0
    for task in range(len(folders)):
        model = recording.base_model()
        sapt_fast.load_official(model, folders[: task + 1], recording.config())
        with torch.no_grad():
            attention = model.sapt.route(input_ids=recording.task(task, "eval.input_ids"))
        worst = max(worst, _attention_error(recording, task, attention))
    return worst


def _train(
    model: Any, recording: Recording, task: int, targets: list[Tensor]
) -> tuple[list[float], list[list[float]]]:
    model.train()
    optimizer = torch.optim.AdamW(
        model.sapt.trainable_parameters(), lr=recording.run["lr"], weight_decay=0.0
    )
    losses, kls = [], []
    for step in range(recording.run["steps"]):
        loss = model(**recording.forward_inputs(task, step)).loss
        loss.backward()
        losses.append(loss.item())
        kls.append([])
        for past, target in enumerate(targets):
            ids = recording.task(task, f"step{step}.replay{past}.input_ids")
            kl = recording.run["kl_ratio"] * model.sapt.reflection_loss(ids, target)
            kl.backward()
            kls[-1].append(kl.item())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses, kls


def _attention_error(recording: Recording, task: int, attention: Tensor) -> float:
    difference = attention.flip(-1) - recording.task(task, "eval.attention")
    return _finite(difference.abs().max().item())


def _relative(ours: list[Any], recorded: list[Any]) -> float:
    a = torch.tensor(ours, dtype=torch.float64)
    b = torch.tensor(recorded, dtype=torch.float64)
    if a.shape != b.shape:
        raise ValueError(f"history: got shape {tuple(b.shape)}, expected {tuple(a.shape)}")
    return _finite(((a - b).abs() / b.abs().clamp(min=1e-12)).max().item()) if a.numel() else 0.0


def _finite(deviation: float) -> float:
    """Infinity for NaN, which would pass unseen through a maximum."""
    return deviation if math.isfinite(deviation) else math.inf


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a recorded run, such as tests/data/oracle/t5")
    parser.add_argument("--device", default="cpu", help="where to replay (default: cpu)")
    options = parser.parse_args()
    recording = Recording(options.folder, options.device)
    result = replay(recording)
    result["checkpoint_attention"] = checkpoint_attention(recording)
    print(json.dumps(result))
    agrees = (
        max(result["loss"], result["kl"]) <= LOSS_TOLERANCE
        and max(result["attention"], result["checkpoint_attention"]) <= ATTENTION_TOLERANCE
        and result["generated_mismatches"] == 0
    )
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
