"""Replays recordings of L2P's prompt pool (its PyTorch port) and prints how far this library is.

A recording is a safetensors file with cases `<pooling>.<choice>`: the query is the mean, the max,
both (mean_max) or the given cls; the choice is per_sample or batchwise. Each case has `prompt`
[M, L, D], `key` [M, D], `x` [B, T, D], `w`, with cls pooling `cls` [B, D], and what was recorded:
`idx` [B, N], `similarity` [B, M], `reduce_sim`, `out` = [prompts; x], and `grad.*` of
`(out * w).sum() - 0.5 * reduce_sim`. All sizes are read from the file.

Queries are pooled, prompts chosen and put before x by what `model.l2p` uses. Prints one JSON
object: how many `idx` differ, and the largest deviations of `similarity`, `reduce_sim`, `out` and
`gradients`, relative to the largest recorded number (for cosines, to at least 1). Exits 0 only if
no idx differs and every deviation is at most 1e-5; 1 if not; 2 if a file cannot be replayed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sapt_fast.methods.l2p_choice import PromptChoice, similarities
from sapt_fast.methods.l2p_config import L2PConfig
from sapt_fast.ops import pool_tokens
from sapt_fast.pools.prompts import ConcatenatedPrompts
from sapt_fast.pools.rows import RowStack

TOLERANCE = 1e-5
DEVIATIONS = ("similarity", "reduce_sim", "out", "gradients")
GRADIENTS = ("prompt", "key", "x")
CHOICES = {"per_sample": "sample", "batchwise": "batch"}
POOLINGS = ("mean", "max", "mean_max", "cls")
_RECORDED = ("prompt", "key", "x", "w", "idx", "similarity", "reduce_sim", "out")
_NAME = re.compile(
    r"^(.+?)\.(grad\.(?:prompt|key|x)|prompt|key|x|cls|w|idx|similarity|reduce_sim|out)$"
)


class Pool(PromptChoice, nn.Module):
    """The keys and prompts of one case, chosen and concatenated as `model.l2p` does.

    Args:
        prompt: [M, L, D].
        key: [M, D].
        top: N.
        choice: of `L2PConfig`.
    """

    attribute = "l2p"

    def __init__(self, prompt: Tensor, key: Tensor, top: int, choice: str) -> None:
        super().__init__()
        count, length, width = prompt.shape
        self.config = L2PConfig(
            prompts=count, top=top, length=length, choice=choice, strength=1.0, diversified=False
        )
        self.init_choice(width, prompt.device, key.dtype)
        self.prompt_keys = nn.Parameter(key.clone())
        self.stack = RowStack(width, count * length, device=prompt.device, dtype=prompt.dtype)
        self.stack.append(count * length, lambda rows: rows.copy_(prompt.flatten(0, 1)))
        self.pool = ConcatenatedPrompts(self.stack, length, lambda: top)


def cases(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of each case by their names.

    Raises:
        ValueError: if there is no case, or one lacks a tensor.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.match(name)
        if match is not None:  # others are not compared
            found.setdefault(match[1], {})[match[2]] = tensor
    if not found:
        raise ValueError("got no case, expected tensors named <pooling>.<choice>.<name>")
    for case, own in found.items():
        pooling, _ = kind_of(case)
        wanted = [*_RECORDED, *(f"grad.{name}" for name in GRADIENTS)]
        missing = [n for n in [*wanted, *(["cls"] * (pooling == "cls"))] if n not in own]
        if missing:
            raise ValueError(f"{case}.{missing[0]}: got no such tensor, expected one for each case")
    return found


def kind_of(case: str) -> tuple[str, str]:
    """Returns the pooling and the choice of a case's name.

    Raises:
        ValueError: if it does not tell.
    """
    parts = case.split(".")
    poolings = [part for part in parts if part in POOLINGS]
    choices = [part for part in parts if part in CHOICES]
    if len(poolings) != 1 or len(choices) != 1:
        raise ValueError(
            f"{case}: got an unknown case, expected a pooling of {POOLINGS} and a choice of "
            f"{tuple(CHOICES)}"
        )
    return poolings[0], choices[0]


def query_of(pooling: str, x: Tensor, cls: Tensor | None) -> Tensor:
    """Returns the queries [B, D] of x [B, T, D], with gradient to x unless they are `cls`."""
    if pooling == "cls":
        assert cls is not None
        return cls
    rows = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2])
    table = x.flatten(0, 1)
    if pooling == "mean_max":
        return pool_tokens(rows, table, pooling="max") + 2 * pool_tokens(
            rows, table, pooling="mean"
        )
    return pool_tokens(rows, table, pooling=pooling)


def replay(case: str, recorded: dict[str, Tensor]) -> dict[str, float]:
    """Returns the differing indices and the deviations of one case.

    Raises:
        ValueError: if shapes do not fit each other.
    """
    pooling, choice = kind_of(case)
    prompt, key, x = (recorded[name] for name in GRADIENTS)
    sizes = {"prompt": (3, prompt), "key": (2, key), "x": (3, x), "idx": (2, recorded["idx"])}
    for name, (dims, tensor) in sizes.items():
        if tensor.dim() != dims:
            raise ValueError(
                f"{case}.{name}: got shape {tuple(tensor.shape)}, expected {dims} dims"
            )
    rows = (len(x), recorded["idx"].shape[1] * prompt.shape[1] + x.shape[1], x.shape[2])
    shapes = {"out": rows, "w": rows, "similarity": (len(x), len(key))}
    for name, expected in shapes.items():
        if tuple(recorded[name].shape) != expected:
            got = tuple(recorded[name].shape)
            raise ValueError(f"{case}.{name}: got shape {got}, expected {expected}")
    if recorded["reduce_sim"].numel() != 1:
        raise ValueError(f"{case}.reduce_sim: got {recorded['reduce_sim'].numel()} numbers, not 1")
    pool = Pool(prompt, key, recorded["idx"].shape[1], CHOICES[choice])
    x = x.clone().requires_grad_()
    query = query_of(pooling, x, recorded.get("cls"))
    cosines, index = pool.pick(query, training=False)
    reduced = -pool.pull(cosines)
    out = pool.pool(index, nn.Identity(), None, x)
    ((out * recorded["w"]).sum() - 0.5 * reduced).backward()
    grads = {"prompt": pool.stack.trainable.grad, "key": pool.prompt_keys.grad, "x": x.grad}
    values = {
        "similarity": similarities(query.detach(), pool.prompt_keys.detach()),
        "reduce_sim": reduced.detach().view(-1),
        "out": out.detach(),
    }
    least = {"similarity": 1.0, "reduce_sim": 1.0, "out": 1e-6}  # sums of cosines may cancel
    found = {
        name: deviation(value, recorded[name].view(value.shape), least[name])
        for name, value in values.items()
    }
    found["gradients"] = max(
        deviation(_grad(grads[name], recorded[name]), recorded[f"grad.{name}"])
        for name in GRADIENTS
    )
    found["idx"] = float((index != recorded["idx"]).sum())
    return found


def _grad(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.view(like.shape)


def deviation(got: Tensor, recorded: Tensor, least: float = 1e-6) -> float:
    """Returns the largest difference, relative to the largest recorded number, or to `least`."""
    if got.shape != recorded.shape:
        return math.inf
    if not got.numel():
        return 0.0
    gap = (got - recorded).double().abs().max() / recorded.double().abs().max().clamp(min=least)
    return float(gap) if math.isfinite(gap) else math.inf  # no comparison holds for NaN


def main() -> int:
    """Replays each file; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recordings", nargs="+", type=Path, metavar="FILE")
    largest = dict.fromkeys(("idx", *DEVIATIONS), 0.0)
    for path in parser.parse_args().recordings:
        try:
            for case, recorded in cases(load_file(path)).items():
                found = replay(case, recorded)
                print(f"{path.name}: {case}: {found}", file=sys.stderr)
                for name, value in found.items():
                    total = largest[name] + value if name == "idx" else max(largest[name], value)
                    largest[name] = total
        except (OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
    print(json.dumps({**largest, "idx": int(largest["idx"])}))
    within = all(largest[name] <= TOLERANCE for name in DEVIATIONS)
    return 0 if within and largest["idx"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
