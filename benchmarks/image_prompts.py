"""Speed and memory of prompt pools in front of image tokens, against plain torch, on a CPU.

    python benchmarks/image_prompts.py [--quick] [--repeats 15] [--threads 1]

Two kinds of pool, before the 197 tokens of a ViT at 224 pixels, in float32:

- selected (L2P): each image takes the 5 nearest of M prompts of 5 rows by cosine, and the cosines
  are part of the loss. Ours is `topk_keys`, then the rows are gathered and put in front. Plain
  torch normalises, multiplies, calls `topk`, gathers and concatenates.
- mixed (CODA-Prompt, SAPT-Prompt): each image takes a weighted sum of M prompts of 8 rows. Ours is
  `mix_prompts`. Plain torch is one matrix product of weights and prompts, and `torch.cat`, which is
  faster than weighting every prompt of every image (also measured, as "weighted sum", where its
  products take at most half a GiB).

All forms take turns in this process. "compiled" is the plain form through `torch.compile`. A time
is only taken once outputs and gradients agree with float64. Every row is printed and recorded,
those in which ours is slower too. The result goes to `benchmarks/results/<machine>`, but that of
`--quick` is only printed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import RESULTS, environment, interleaved_ms, peak_bytes, save
from torch import Tensor

from sapt_fast.ops import mix_prompts, topk_keys

TOP, SELECTED_ROWS, MIXED_ROWS = 5, 5, 8
_MOST_BYTES = 2**29
_TOLERANCE = 2.0  # times the error that the plain form makes in float32
Form = Callable[..., tuple[Tensor, ...]]  # what the loss reads: rows, and cosines


@dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        kind: "selected" or "mixed".
        prompts: M.
        batch: B.
        width: D.
        tokens: T.
    """

    kind: str
    prompts: int
    batch: int
    width: int
    tokens: int = 197

    def inputs(self) -> list[Tensor]:
        """Returns prompts [M, P, D], queries [B, D] and keys [M, D], or weights [B, M], and
        embeddings [B, T, D]."""
        draws = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draws)

        rows = SELECTED_ROWS if self.kind == "selected" else MIXED_ROWS
        prompts = draw(self.prompts, rows, self.width)
        embeds = draw(self.batch, self.tokens, self.width)
        if self.kind == "mixed":
            return [prompts, draw(self.batch, self.prompts), embeds]
        return [prompts, draw(self.batch, self.width), draw(self.prompts, self.width), embeds]


def _ours_selected(
    prompts: Tensor, query: Tensor, keys: Tensor, embeds: Tensor
) -> tuple[Tensor, ...]:
    cosines, index = topk_keys(query, keys, TOP, metric="cosine")
    return torch.cat([prompts[index].flatten(1, 2), embeds], 1), cosines


def _plain_selected(
    prompts: Tensor, query: Tensor, keys: Tensor, embeds: Tensor
) -> tuple[Tensor, ...]:
    cosines, index = (F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T).topk(TOP, dim=1)
    return torch.cat([prompts[index].flatten(1, 2), embeds], 1), cosines


def _ours_mixed(prompts: Tensor, weights: Tensor, embeds: Tensor) -> tuple[Tensor, ...]:
    return (mix_prompts(prompts, weights, embeds),)


def _plain_mixed(prompts: Tensor, weights: Tensor, embeds: Tensor) -> tuple[Tensor, ...]:
    mixed = (weights @ prompts.flatten(1)).view(-1, *prompts.shape[1:])
    return (torch.cat([mixed, embeds], 1),)


def _weighted_sum(prompts: Tensor, weights: Tensor, embeds: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat([(weights[:, :, None, None] * prompts).sum(1), embeds], 1),)


FORMS: dict[str, dict[str, Form]] = {
    "selected": {"ours": _ours_selected, "plain": _plain_selected},
    "mixed": {"ours": _ours_mixed, "plain": _plain_mixed, "weighted sum": _weighted_sum},
}


def forms_of(case: Case, compiled: bool) -> dict[str, Form]:
    """Returns the forms by name, with the compiled one.

    The weighted sum is left out where its products [B, M, P, D] take more than half a GiB.
    """
    found = dict(FORMS[case.kind])
    if case.batch * case.prompts * MIXED_ROWS * case.width * 4 > _MOST_BYTES:
        found.pop("weighted sum", None)
    if compiled:
        found["compiled"] = torch.compile(found["plain"], dynamic=False)
    return found


def _step(form: Form, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Runs forward and backward; returns the outputs and the gradients that there are."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = form(*leaves)
    torch.autograd.backward(outputs, grads)
    found = [output.detach() for output in outputs]
    return [*found, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _grads(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns gradients of the outputs."""
    draws = torch.Generator().manual_seed(1)
    outputs = FORMS[case.kind]["plain"](*inputs)
    return [torch.randn(output.shape, generator=draws) for output in outputs]


def errors(case: Case, forms: dict[str, Form]) -> dict[str, float]:
    """Returns each form's largest relative error to float64, of output and gradients.

    Raises:
        RuntimeError: if a form has other gradients, or more than twice the error of plain torch.
    """
    inputs = case.inputs()
    grads = _grads(case, inputs)
    exact = _step(
        FORMS[case.kind]["plain"], [t.double() for t in inputs], [g.double() for g in grads]
    )
    found = {}
    for name, form in forms.items():
        values = _step(form, inputs, grads)
        if len(values) != len(exact):
            raise RuntimeError(f"{case}: {name} has other gradients")
        found[name] = max(
            float((value - right).norm() / right.norm())
            for value, right in zip(values, exact, strict=True)
        )
    for name, error in found.items():
        if not error <= _TOLERANCE * found["plain"] + 1e-7:
            raise RuntimeError(f"{case}: {name} has an error of {error:.2g}")
    return found


def measured(case: Case, repeats: int, compiled: bool) -> dict[str, Any]:
    """Returns the errors, the milliseconds and the bytes of every form of a case."""
    torch._dynamo.reset()
    forms = forms_of(case, compiled)
    row: dict[str, Any] = {**asdict(case), "errors": errors(case, forms)}
    inputs = case.inputs()
    with torch.no_grad():
        forward = {name: _bound(form, *inputs) for name, form in forms.items()}
        row["forward_ms"] = interleaved_ms(forward, "cpu", repeats=repeats)
        row["forward_bytes"] = {name: _peak(run) for name, run in forward.items()}
    grads = _grads(case, inputs)
    steps = {name: _bound(_step, form, inputs, grads) for name, form in forms.items()}
    row["step_ms"] = interleaved_ms(steps, "cpu", repeats=repeats)
    row["step_bytes"] = {name: _peak(run) for name, run in steps.items()}
    return row


def _peak(run: Callable[[], object]) -> int:
    """Returns the bytes of one call at its peak, after freed memory is given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return peak_bytes(run, "cpu")


def _bound(function: Callable[..., object], *given: Any) -> Callable[[], object]:
    return lambda: function(*given)


def line(row: dict[str, Any]) -> str:
    """Returns a row for the terminal: times of ours, and of the others as multiples of it."""
    text = f"{row['kind']:8} M {row['prompts']:4} B {row['batch']:2} D {row['width']:3}"
    for field in ("forward_ms", "step_ms"):
        times = {name: found["median"] for name, found in row[field].items()}
        others = [f"{n} {t / times['ours']:.2f}x" for n, t in times.items() if n != "ours"]
        text += f" | {field[:-3]} {times['ours']:.3f} ms, {', '.join(others)}"
    peaks = {name: f"{found / 2**20:.1f}" for name, found in row["step_bytes"].items()}
    return f"{text} | step MiB {peaks}"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is recorded")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(given)
    torch.set_num_threads(chosen.threads)
    sizes = [(m, b, d) for d in (384, 768) for b in (16, 64) for m in (10, 100, 1000)]
    if chosen.quick:
        sizes = [(10, 4, 64), (100, 4, 64)]
    rows = []
    for kind in FORMS:
        for prompts, batch, width in sizes:
            case = Case(kind, prompts, batch, width, 17 if chosen.quick else 197)
            rows.append(measured(case, chosen.repeats, not chosen.no_compile))
            print(line(rows[-1]), flush=True)
    if chosen.quick:
        print("not recorded")
        return
    command = " ".join(["python", "benchmarks/image_prompts.py", *(given or sys.argv[1:])])
    about = {"environment": environment("cpu"), "only": "image-prompts", "command": command}
    print(save({**about, "repeats": chosen.repeats, "rows": rows}, chosen.out))


if __name__ == "__main__":
    main()
