"""One decoding step of a q and v pair: both layers have the same input of one token per sample."""

import traceback
from collections.abc import Callable
from typing import Any

import checks
import measure
import torch
import torch.nn.functional as F
from op_checks import replayed
from providers import Layer, Providers
from torch import Tensor

from sapt_fast import dispatch
from sapt_fast.ops.mixed_lora import mix

Pair = Callable[[], list[Tensor]]


class DecodePair:
    """The pair's providers; only the first `carrying` adapters have any weight."""

    def __init__(self, layer: Layer, carrying: int | None = None) -> None:
        self.layer = layer
        self.layers = [Providers(layer, training=False, seed=seed) for seed in range(2)]
        self.x = self.layers[0].x
        self.mixture = self.layers[0].mixture
        if carrying is not None:
            self.mixture[:, carrying:] = 0

    def rivals(self) -> dict[str, Pair]:
        """The linear layers alone and with PEFT's loop over all adapters, of the layers' dtype."""
        return {
            "base": lambda: [F.linear(self.x, each.weight) for each in self.layers],
            "peft": lambda: [each.peft_layer(self.layer.dtype)(self.x) for each in self.layers],
        }

    def ours(self) -> dict[str, Pair]:
        """By backend, the interpreter of Triton left out."""
        kind = torch.device(self.layer.device).type
        backends = [
            name
            for name in ("cpu", "triton", "cuda")
            if dispatch.unavailable("mixed_lora", name, kind) is None
            and not (name == "triton" and kind == "cpu")
        ]
        return {f"ours_{name}": lambda name=name: self._ours(name) for name in backends}

    def _ours(self, backend: str) -> list[Tensor]:
        pooled = [each._pool.projection(self.x, each.weight, None, True) for each in self.layers]
        return mix(self.x, self.mixture, pooled, backend=backend)

    def errors(self, run: Pair) -> list[float]:
        """Relative root-mean-square error of each layer's output against float64."""
        with checks.without_tf32():
            return [
                checks._error(y, self._exact(each, self.x.double()))
                for each, y in zip(self.layers, run(), strict=True)
            ]

    def _exact(self, each: Providers, x: Tensor) -> Tensor:
        weights = self.mixture.double().repeat_interleave(self.layer.rank, 1) * each.scaling
        h = (x @ each.all_a.double().t()) * weights[:, None]
        return x @ each.weight.double().t() + h @ each.all_b.double()


@torch.no_grad()
def times(layer: Layer, carrying: int | None = None, *, repeats: int) -> dict[str, Any]:
    """Times of the pair as CUDA graphs; on the CPU as they are.

    Returns:
        "ms" by provider, without the backends whose "errors" are too large and without what
        "failed"; "wrong", the backends of ours among these; "ok", whether there are none.
    """
    pair = DecodePair(layer, carrying)
    failed: dict[str, str] = {}
    errors: dict[str, list[float]] = {}
    functions: dict[str, Callable[[], object]] = {}
    ours, rivals = pair.ours(), pair.rivals()
    for name, run in {**ours, **rivals}.items():  # a rival whose capture fails spoils none of ours
        try:
            if name in ours:
                errors[name] = pair.errors(run)
                if not max(errors[name]) <= checks.FLOOR[layer.dtype]:
                    continue
            else:
                run()
            functions[name] = replayed(run, layer.device)
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
    functions = {name: functions[name] for name in (*rivals, *ours) if name in functions}
    return {
        "layer": str(layer),
        "carrying": carrying,
        "pass": "decode of a pair, CUDA graph",
        "ms": measure.interleaved_ms(functions, layer.device, repeats=repeats),
        "errors": errors,
        "failed": failed,
        "wrong": [name for name in ours if name not in functions],
        "ok": all(name in functions for name in ours),
    }


def chosen(row: dict[str, Any]) -> str | None:
    """Which of ours the targets are about: the kernels made for few rows, or the only others."""
    return next((n for n in ("ours_cuda", "ours_triton", "ours_cpu") if n in row["ms"]), None)
