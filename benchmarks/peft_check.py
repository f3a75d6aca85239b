"""A patched PeftModel beside PEFT itself: equal numbers, time of a layer and of a mixed batch."""

import sys
from collections.abc import Callable
from typing import Any

import checks
import measure
import torch
from checks import FLOOR, target
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sapt_fast

RANK = 8


def peft_model(adapters: int, width: int, device: str, dtype: torch.dtype) -> Any:
    """A one-layer LLaMA whose adapters are all active and all do something."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=width // 64,
        )
    ).to(device, dtype)
    config = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config, adapter_name="a0", autocast_adapter_dtype=False)
    for k in range(1, adapters):
        model.add_adapter(f"a{k}", config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.base_model.set_adapter([f"a{k}" for k in range(adapters)])
    return model


def main() -> int:
    options = checks.arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    width, tokens, repeats = (128, 16, 3) if options.quick else (1024, 512, 10)
    trained = _compare(8, width, (8, tokens), dtype, device, repeats, training=True)
    mixed = [
        _compare(16, width, (16, length), dtype, device, 20 * repeats, training=False)
        for length in (1, 16)
    ]
    result = {
        "kind": "peft_check",
        "quick": options.quick,
        "environment": measure.environment(device),
        "correctness": {
            "ours": {"ok": all(row["ok"] for row in (trained, *mixed)), "cases": []},
        },
        "rows": [trained, *mixed],
        "targets": [
            target(
                "8 adapters, layer forward+backward: PEFT / ours",
                trained["ratio"],
                2.5 if device == "cpu" else 4,
                at_least=True,
            ),
            *(
                target(f"{row['what']}: PEFT / ours", row["ratio"], 4, at_least=True)
                for row in mixed
            ),
        ],
    }
    return checks.finish(result, options.out)


def _compare(
    adapters: int,
    width: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    repeats: int,
    *,
    training: bool,
) -> dict[str, Any]:
    models = {name: peft_model(adapters, width, device, dtype) for name in ("peft", "ours")}
    models["ours"] = sapt_fast.patch(models["ours"])
    runs: dict[str, Callable[[], Tensor]] = {}
    results = {}
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(*shape, width, generator=generator).to(device, dtype) for _ in range(2))
    names = [f"a{k % adapters}" for k in range(shape[0])]
    for name, model in models.items():
        layer = model.train(training).base_model.model.model.layers[0].self_attn.q_proj
        leaf = x.clone().requires_grad_(training)
        runs[name] = _step(layer, leaf, grad) if training else _mixed_batch(layer, leaf, names)
        results[name] = runs[name]()
    error = (results["ours"] - results["peft"]).double().norm() / results["peft"].double().norm()
    ok = error.item() <= 2 * FLOOR[dtype]
    times = measure.interleaved_ms(runs, device, repeats=repeats) if ok else {}
    what = "8 adapters" if training else f"mixed batch of {shape[0]}, {adapters} adapters"
    return {
        "what": f"{what}, {shape[1]} tokens",
        "error": error.item(),
        "ok": ok,
        "ms": times,
        "ratio": checks.ratio(times, "peft", "ours"),
    }


def _step(layer: Any, x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """Forward and backward; gives the gradient of x, which depends on both."""

    def run() -> Tensor:
        layer(x).square().backward(grad)
        gradient, x.grad = x.grad, None
        layer.zero_grad()
        assert gradient is not None
        return gradient

    return run


def _mixed_batch(layer: Any, x: Tensor, names: list[str]) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        return layer(x, adapter_names=names)

    return run


if __name__ == "__main__":
    sys.exit(main())
