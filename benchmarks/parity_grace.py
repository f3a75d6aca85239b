"""Replays recorded runs of the released GRACE and prints how far this library is from them.

A recording is a safetensors file. Its metadata has `config` (the model's), `editor` (the settings),
`layer` (the edited weight) and `log` (of each edit the number of keys and the chosen key). Its
tensors are `base.*` (the model before editing), `edit<e>.input_ids` and `.labels` (one row each),
after each edit `.keys`, `.epsilons`, `.values` and `.probe_logits` (of each row of
`probe_input_ids` with `probe_labels`, given alone).

Prints one JSON object: the largest deviations of `keys`, `epsilons`, `values` and `probe_logits`,
relative to the largest recorded number, and how many `decisions` (numbers of keys, chosen keys)
differ. Exits 0 only if no decision differs and every deviation is at most 1e-4.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import sapt_fast
from sapt_fast.methods.grace import GraceConfig

TOLERANCE = 1e-4
DEVIATIONS = ("keys", "epsilons", "values", "probe_logits")


class Recording:
    """One recorded run.

    Args:
        path: the file described above.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.config, self.editor, self.log = (
            json.loads(metadata[name]) for name in ("config", "editor", "log")
        )
        layer = re.sub(r"\[(\d+)\]", r".\1", metadata["layer"])
        self.layer = layer.removesuffix(".weight")

    def model(self) -> Any:
        """Returns the model before editing."""
        values = dict(self.config)
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        kinds = transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM
        model = kinds[not config.is_encoder_decoder].from_config(config)
        weights = {n.removeprefix("base."): t for n, t in self.tensors.items() if "base." in n}
        found = model.load_state_dict(weights, strict=False)
        if found.unexpected_keys:
            raise ValueError(f"base: got weights {found.unexpected_keys}, which the model lacks")
        model.tie_weights()
        return model.eval()

    def settings(self) -> GraceConfig:
        """Returns the released settings as a config.

        Raises:
            ValueError: if the run used settings that cannot be replayed.
        """
        editor = self.editor
        fixed = {"dist_fn": "euc", "num_pert": 1, "val_init": "warm", "val_train": "sgd"}
        got = {name: editor.get(name, value) for name, value in fixed.items()}
        if got != fixed:
            raise ValueError(f"editor: got {got}, expected {fixed}")
        return GraceConfig.released(
            (self.layer,),
            rule=editor["eps_expand"],
            replacement=editor["replacement"],
            radius=editor["eps"],
            steps=editor["n_iter"],
            learning_rate=editor["edit_lr"],
        )


def replay(recording: Recording) -> dict[str, float]:
    """Makes the recorded edits, and returns the deviations and the differing decisions."""
    model = sapt_fast.patch(recording.model(), recording.settings())
    grace, largest = model.grace, dict.fromkeys((*DEVIATIONS, "decisions"), 0.0)
    for number, decided in enumerate(recording.log):
        start = f"edit{number}."
        ids, labels = (recording.tensors[start + name][0] for name in ("input_ids", "labels"))
        if not model.config.is_encoder_decoder:
            ids = ids[labels == -100]
        grace.edit(ids, labels[labels != -100])
        book = next(iter(grace.layers.values())).codebook
        last = recording.tensors["probe_input_ids"][-1]  # `chosen` is of the forward run last
        chosen = int(book.find(grace.key_of(last)).row)
        largest["decisions"] += len(book) != decided["keys_after"] or chosen != decided["chosen"]
        got = {"keys": book.keys, "epsilons": book.radii, "values": book.values}
        got["probe_logits"] = _probes(model, recording.tensors)
        for name, value in got.items():
            largest[name] = max(largest[name], _deviation(value, recording.tensors[start + name]))
    return largest


@torch.no_grad()
def _probes(model: Any, tensors: dict[str, Tensor]) -> Tensor:
    rows = zip(tensors["probe_input_ids"], tensors["probe_labels"], strict=True)
    return torch.cat([model(input_ids=i[None], labels=t[None]).logits for i, t in rows])


def _deviation(got: Tensor, recorded: Tensor) -> float:
    if got.shape != recorded.shape:
        return float("inf")
    found = float((got - recorded).abs().max() / recorded.abs().max().clamp(min=1e-6))
    return found if math.isfinite(found) else float("inf")  # no comparison holds for NaN


def main() -> int:
    """Replays each file; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recordings", nargs="+", type=Path, metavar="FILE")
    largest = dict.fromkeys((*DEVIATIONS, "decisions"), 0.0)
    for path in parser.parse_args().recordings:
        found = replay(Recording(path))
        print(f"{path.name}: {found}", file=sys.stderr)
        for name, value in found.items():
            largest[name] = (
                max(largest[name], value) if name != "decisions" else (largest[name] + value)
            )
    print(json.dumps({**largest, "decisions": int(largest["decisions"])}))
    within = all(largest[name] <= TOLERANCE for name in DEVIATIONS)
    return 0 if within and largest["decisions"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
