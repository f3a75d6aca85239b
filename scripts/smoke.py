"""What an installed wheel holds runs: ops forward and backward, a patched model, the doctor.

Run it from any directory but the source tree's, with the interpreter of the environment that the
wheel was installed into.
"""

import argparse
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sapt_fast
from sapt_fast import dispatch, ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kernels",
        choices=["none", "cpu", "cuda"],
        default="cpu",
        help="what the wheel must hold; cuda are those of the CPU too",
    )
    parser.add_argument(
        "--architectures", nargs="*", default=[], help="that it must hold, such as sm_90a"
    )
    options = parser.parse_args()
    place = Path(sapt_fast.__file__).parent
    if not place.is_relative_to(sysconfig.get_path("platlib")):
        sys.exit(f"sapt_fast is imported from {place}, not from the installed wheel")
    torch.manual_seed(0)
    held = check_what_it_holds(options.kernels, options.architectures)
    backend = "reference" if options.kernels == "none" else "cpu"
    for name, run in OPS.items():
        check_op(name, run, backend)
    check_patch()
    doctor = Path(sysconfig.get_path("scripts")) / "sapt-fast"
    subprocess.run([doctor, "doctor"], check=True)
    print(f"right: {held}, {len(OPS)} ops on backend {backend}, a patched model, {doctor.name}")


def check_what_it_holds(kernels: str, architectures: list[str]) -> str:
    """Fails unless the compiled module is what it should be; returns what it is."""
    try:
        from sapt_fast import _C
    except ImportError as error:
        if kernels == "none":
            return "pure Python"
        sys.exit(f"the wheel holds no compiled module: {error}")
    report = _C.cuda_runtime()
    found = "cuda" if report["compiled"] else "cpu"
    if found != kernels:
        sys.exit(f"the wheel holds kernels for {found}, expected {kernels}")
    missing = set(architectures) - set(report["architectures"])
    if missing:
        sys.exit(f"the wheel holds {report['architectures']}, not {sorted(missing)}")
    return f"kernels for {found} {' '.join(report['architectures'])}".strip()


def _mixed_lora(backend: str, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return ops.mixed_lora_linear(x, weight, None, a, b, w.softmax(-1), ranks=4, backend=backend)


def _topk_keys(backend: str, query: Tensor, keys: Tensor) -> Tensor:
    return ops.topk_keys(query, keys, 5, metric="cosine", backend=backend)[0]


def _nearest_key(backend: str, query: Tensor, keys: Tensor) -> Tensor:
    return ops.nearest_key(query, keys, torch.full((len(keys),), 3.0), backend=backend)[1]


def _pool_tokens(backend: str, table: Tensor) -> Tensor:
    return ops.pool_tokens(torch.arange(12).view(3, 4), table, backend=backend)


def _mix_experts(backend: str, x: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    return ops.mix_experts(x, a, b, torch.arange(6).view(3, 2), weights, backend=backend)


OPS: dict[str, Callable[..., Tensor]] = {
    "mixed_lora": _mixed_lora,
    "topk_keys": _topk_keys,
    "nearest_key": _nearest_key,
    "pool_tokens": _pool_tokens,
    "mix_experts": _mix_experts,
}
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "mixed_lora": ((3, 5, 24), (20, 24), (8, 24), (8, 20), (3, 2)),
    "topk_keys": ((3, 24), (40, 24)),
    "nearest_key": ((3, 24), (40, 24)),
    "pool_tokens": ((12, 24),),
    "mix_experts": ((3, 24), (6, 4, 24), (6, 4, 24), (3, 2)),
}


def check_op(name: str, run: Callable[..., Tensor], backend: str) -> None:
    """Output and every gradient agree with the float64 reference."""
    if (reason := dispatch.unavailable(name, backend, "cpu")) is not None:
        sys.exit(f"{name} on backend {backend}: {reason}")
    drawn = [torch.randn(shape) for shape in SHAPES[name]]
    results = []
    for chosen, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in drawn]
        wide = [t.float() for t in inputs] if name == "nearest_key" else inputs
        y = run(chosen, *wide)
        seed = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        results.append([y, *torch.autograd.grad((y * seed).sum(), inputs)])
    for actual, exact in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), exact.double(), rtol=1e-4, atol=1e-4)


def check_patch() -> None:
    """A tiny model learns two tasks' adapters, and is itself again when it is unpatched."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    given = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(8).view(2, 4)}
    with torch.no_grad():
        before = model(**given).logits
    sapt_fast.patch(model)
    for task in ("first", "second"):
        model.sapt.add_task(task)
    model.train()
    model(**given).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained or any(p.grad is None or not p.grad.isfinite().all() for p in trained):
        sys.exit("a patched model's adapters got no gradient, or one that is not finite")
    if model.sapt.attention.shape != (2, 2):
        sys.exit(f"attention of shape {tuple(model.sapt.attention.shape)}, expected (2, 2)")
    sapt_fast.unpatch(model)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**given).logits, before, rtol=0, atol=0)


if __name__ == "__main__":
    main()
