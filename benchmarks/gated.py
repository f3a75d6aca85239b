"""Gated experts in one linear layer, on a CPU: time and memory beside one LoRA and loops.

Forward and backward with a frozen base weight: N rows, width d, K experts of rank r, the router.
The kinds are:

- gated: `GatedPool`, which computes all experts in one pass or, of many, the chosen ones;
- all, chosen: the same by one of these two ways;
- shared, own: experts that all get weights (dense), with one A and with an A each;
- lora: one LoRA of rank K r in plain torch, no router;
- loop: plain torch, which gathers each expert's tokens (the way of MixLoRA's code; the base product
  is shared);
- loop_all: plain torch, every expert for all tokens (the way of LoRAMoE's and HydraLoRA's code).

Kinds that end in `_alone` leave out the base product, and those that end in `_pool` the router too:
they get the weights, and compute their gradient. Each pair is timed, and each peak of memory
taken, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import checks
import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from sapt_fast.ops.gates import Gate
from sapt_fast.pools.gated import Experts, GatedPool

SCALING = 2.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer and its input.

    Attributes:
        rows: N.
        width: of input and output.
        experts, rank: K and r.
        top_k: experts of each token; None for all.
    """

    rows: int = 512
    width: int = 1024
    experts: int = 8
    rank: int = 8
    top_k: int | None = 2


class Layer:
    """A layer of one kind with its input; the same values for every kind.

    Args:
        kind: one of those above.
        sizes: of the layer.
        dtype: of all tensors.
    """

    def __init__(self, kind: str, sizes: Sizes, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
            return values.to(dtype)

        self.kind = kind.removesuffix("_alone").removesuffix("_pool")
        self.sizes = sizes
        count, rank, width = sizes.experts, sizes.rank, sizes.width
        self.x = draw(sizes.rows, width).requires_grad_()
        self.grad = draw(sizes.rows, width)
        weight = draw(width, width, scale=width**-0.5)
        self.weight = weight if kind == self.kind else None
        a = draw(rank if kind.startswith("shared") else count * rank, width, scale=width**-0.5)
        b, router = draw(count * rank, width, scale=0.1), draw(count, width, scale=width**-0.5)
        self.own: dict[str, Tensor] = {
            "a": a.requires_grad_(),
            "b": b.requires_grad_(),
            "router": router.requires_grad_(),
        }
        if self.kind == "lora":
            del self.own["router"]
        elif not self.kind.startswith("loop"):
            self.pool = self._pool(dtype)
            self.own = dict(zip(self.own, self.pool.tensors().values(), strict=True))
            if kind.endswith("_pool"):
                del self.own["router"]
                self.own["weights"] = self.pool.weights(self.x)[0].detach().requires_grad_()

    def _pool(self, dtype: torch.dtype) -> GatedPool:
        sizes, shared = self.sizes, self.kind == "shared"
        gate = Gate("softmax", sizes.top_k)
        experts = Experts(sizes.experts, sizes.rank, SCALING, shared, gate, 0.0, 0.02)
        pool = GatedPool(sizes.width, sizes.width, experts, dtype=dtype)
        with torch.no_grad():
            for own, given in zip(pool.tensors().values(), self.own.values(), strict=True):
                own.copy_(given)
        if self.kind in ("all", "chosen"):
            pool.computes_chosen = lambda x: self.kind == "chosen"  # type: ignore[method-assign]
        return pool

    def output(self) -> Tensor:
        """Computes y [N, O]."""
        x, weight = self.x, self.weight
        if not self.kind.startswith("lo"):
            given = self.own.get("weights")
            return self.pool(x, weight, None, self.pool.weights(x)[0] if given is None else given)
        base = 0.0 if weight is None else F.linear(x, weight)
        a, b = self.own["a"], self.own["b"]
        if self.kind == "lora":
            return base + F.linear(F.linear(x, a), b.t()) * SCALING
        full = torch.softmax(F.linear(x.to(b.dtype), self.own["router"]), -1)
        return base + (self._gathered(full) if self.kind == "loop" else self._of_all(full))

    def _gathered(self, full: Tensor) -> Tensor:
        weights, index = full.topk(self.sizes.top_k or self.sizes.experts, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(self.x)
        for k in range(self.sizes.experts):
            token, slot = torch.where(index == k)
            y = y.index_add(0, token, self._expert(self.x[token], k) * weights[token, slot, None])
        return y

    def _of_all(self, full: Tensor) -> Tensor:
        if self.sizes.top_k is not None:
            least = full.topk(self.sizes.top_k, -1).values[:, -1:]
            full = torch.where(full >= least, full, 0.0)
            full = full / full.sum(-1, keepdim=True)
        return sum(  # type: ignore[return-value]
            full[:, k, None] * self._expert(self.x, k) for k in range(self.sizes.experts)
        )

    def _expert(self, x: Tensor, k: int) -> Tensor:
        rows = slice(k * self.sizes.rank, (k + 1) * self.sizes.rank)
        a = self.own["a"]
        own = a if len(a) == self.sizes.rank else a[rows]
        return F.linear(F.linear(x, own), self.own["b"][rows].t()) * SCALING

    def step(self) -> dict[str, Tensor]:
        """Runs forward and backward; returns y and all gradients."""
        leaves = {"x": self.x, **self.own}
        for leaf in leaves.values():
            leaf.grad = None
        y = self.output()
        y.backward(self.grad)
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}  # type: ignore


def correctness(every: list[tuple[str, Sizes]]) -> dict[str, dict[str, Any]]:
    """Compares kinds of ours with a loop over all experts in float64.

    An error up to twice that of the loop in float32 is allowed.
    """
    report = {}
    for kind, sizes in every:
        loop = "loop_all"
        reference = _like(loop, kind, sizes, torch.float64).step()
        plain = _like(loop, kind, sizes, torch.float32).step()
        found = Layer(kind, sizes).step()
        errors = {n: checks._error(found[n], reference[n]) for n in reference}
        floor = checks.FLOOR[torch.float32]
        bounds = {n: max(2 * checks._error(plain[n], reference[n]), floor) for n in reference}
        ok = all(errors[n] <= bounds[n] for n in errors)
        report[f"{kind}, {sizes}"] = {"ok": ok, "errors": errors}
    return report


def _like(loop: str, kind: str, sizes: Sizes, dtype: torch.dtype) -> Layer:
    """A loop over the experts of a kind, which may share A."""
    layer = Layer(loop, sizes, dtype)
    source = Layer(kind, sizes, torch.float64)
    layer.own = {n: t.detach().to(dtype).requires_grad_() for n, t in source.own.items()}
    return layer


def pair(first: str, second: str, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Times of two kinds that take turns, in a new process."""
    return _in_a_process(["pair", first, second, str(repeats)], sizes)


def peak(kind: str, sizes: Sizes) -> int:
    """Bytes at the peak of a step beyond what is held before, in a new process."""
    found: int = _in_a_process(["peak", kind, kind, "1"], sizes)
    return found


def _in_a_process(words: list[str], sizes: Sizes) -> Any:
    command = [sys.executable, __file__, *words, json.dumps(asdict(sizes))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def _measured(options: argparse.Namespace) -> Any:
    sizes = Sizes(**json.loads(options.sizes))
    if options.what == "peak":
        layer = Layer(options.first, sizes)
        Layer(options.first, replace(sizes, rows=66, width=64)).step()  # loads the code
        return measure.peak_bytes(layer.step, "cpu")
    functions: dict[str, Callable[[], object]] = {
        name: Layer(name, sizes).step for name in (options.first, options.second)
    }
    return measure.interleaved_ms(functions, "cpu", repeats=options.repeats)


def main() -> int:
    options = checks.arguments(__doc__)
    sizes, repeats = Sizes(), 40
    if options.quick:
        sizes, repeats = Sizes(rows=70, width=64), 3
    dense, many = replace(sizes, top_k=None), replace(sizes, experts=64)
    odd = Sizes(rows=67, width=48, experts=5, rank=3)
    kinds = [("gated", s) for s in (sizes, many, odd, dense)]
    kinds += [("all", many), ("shared", dense), ("shared", odd), ("own", dense)]
    gate = correctness(kinds)
    pairs = {
        "one LoRA": ("gated", "lora", sizes),
        "loop": ("gated", "loop", sizes),
        "loop, experts alone": ("gated_alone", "loop_alone", sizes),
        "loop over all, experts alone": ("gated_alone", "loop_all_alone", sizes),
        "shared A, given weights": ("shared_pool", "own_pool", dense),
        "shared A, experts alone": ("shared_alone", "own_alone", dense),
        "shared A": ("shared", "own", dense),
        "64 experts": ("chosen", "all", many),
    }
    ok = all(row["ok"] for row in gate.values())
    times = {n: pair(a, b, s, repeats) for n, (a, b, s) in pairs.items()} if ok else {}
    peaks = {kind: peak(kind, sizes) for kind in ("gated", "lora")}

    def under(name: str) -> float | None:
        first, second, _ = pairs[name]
        return checks.ratio(times.get(name, {}), first, second)

    def over(name: str) -> float | None:
        value = under(name)
        return None if value is None else 1 / value

    rows = [
        checks.target("8 experts, top 2 / one LoRA of rank 64", under("one LoRA"), 1.35),
        checks.target(
            "loop that gathers / ours, experts alone", over("loop, experts alone"), 3, at_least=True
        ),
        checks.target(
            "loop over all / ours, experts alone",
            over("loop over all, experts alone"),
            3,
            at_least=True,
        ),
        checks.target("peak memory: ours / one LoRA", peaks["gated"] / peaks["lora"], 1.2),
        checks.target(
            "one shared A / own A's, given weights", under("shared A, given weights"), 0.75
        ),
        checks.target("64 experts, top 2: all / chosen", over("64 experts"), 1, at_least=True),
    ]
    result = {
        "kind": "gated",
        "only": "gated",
        "quick": options.quick,
        "environment": measure.environment("cpu"),
        "correctness": gate,
        "targets": rows,
        "sizes": {name: asdict(s) for name, (_, _, s) in pairs.items()},
        "ms": times,
        "peak_bytes": peaks,
    }
    return checks.finish(result, options.out)


def _child() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["pair", "peak"])
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("repeats", type=int)
    parser.add_argument("sizes")
    print(json.dumps(_measured(parser.parse_args())))


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("pair", "peak"):
        _child()
    else:
        sys.exit(main())
