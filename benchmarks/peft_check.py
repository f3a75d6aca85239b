"""A patched PeftModel beside PEFT itself: equal numbers, and the time of

a layer whose adapters are added up, a batch whose samples each take their own adapter, and X-LoRA
generation.
"""

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import checks
import measure
import torch
from checks import FLOOR, target
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sapt_fast

RANK = 8


def llama(width: int, layers: int, device: str, dtype: torch.dtype) -> Any:
    """An untrained LLaMA, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(device, dtype)


def peft_model(adapters: int, width: int, device: str, dtype: torch.dtype) -> Any:
    """A one-layer LLaMA whose adapters are all active and all do something."""
    base = llama(width, 1, device, dtype)
    config = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config, adapter_name="a0", autocast_adapter_dtype=False)
    for k in range(1, adapters):
        model.add_adapter(f"a{k}", config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.base_model.set_adapter([f"a{k}" for k in range(adapters)])
    return model


def xlora_model(experts: int, width: int, layers: int, device: str, dtype: torch.dtype) -> Any:
    """A LLaMA with X-LoRA experts on every query and value layer."""
    adapters = {}
    with tempfile.TemporaryDirectory() as folder:
        for k in range(experts):
            config = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"])
            expert = get_peft_model(llama(width, layers, "cpu", dtype), config)
            for name, parameter in expert.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)
            adapters[str(k)] = f"{folder}/{k}"
            expert.save_pretrained(adapters[str(k)])
        config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=width, adapters=adapters)
        base = llama(width, layers, device, dtype)
        return get_peft_model(base, config, autocast_adapter_dtype=False).eval()


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
    sizes = (4, 128, 2, 16, 4) if options.quick else (8, 512, 8, 128, 64)
    generated = _generation(*sizes, dtype, device, 2 if options.quick else 3)
    rows = (trained, *mixed, generated)
    result = {
        "kind": "peft_check",
        "only": "peft",
        "quick": options.quick,
        "environment": measure.environment(device),
        "correctness": {
            "ours": {"ok": all(row["ok"] for row in rows), "cases": []},
        },
        "rows": rows,
        "targets": [
            target(
                "8 adapters, layer forward+backward: PEFT / ours",
                trained["ratio"],
                2.5 if device == "cpu" else 4,
                at_least=True,
            ),
            *(
                target(f"{row['what']}: PEFT / {name}", row[key], 4, at_least=True)
                for row in mixed
                for name, key in (
                    ("ours", "ratio"),
                    ("the base layer alone", "bound"),
                    ("the base layer alone, as ours computes it", "fastest_bound"),
                )
            ),
            target(
                f"{generated['what']}, per token: PEFT / ours",
                generated["ratio"],
                2.5,
                at_least=True,
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
    error = _relative(results["ours"], results["peft"])
    ok = error <= 2 * FLOOR[dtype]
    if not training:
        runs["base"] = _mixed_batch(layer.base_layer, x, None)
        runs["base_fastest"] = _fastest_base(layer.base_layer, x)
    times = measure.interleaved_ms(runs, device, repeats=repeats) if ok else {}
    what = "8 adapters" if training else f"mixed batch of {shape[0]}, {adapters} adapters"
    return {
        "what": f"{what}, {shape[1]} tokens",
        "error": error,
        "ok": ok,
        "ms": times,
        "ratio": checks.ratio(times, "peft", "ours"),
        # what no one can exceed who computes the base layer as torch does, or as we do
        "bound": checks.ratio(times, "peft", "base"),
        "fastest_bound": checks.ratio(times, "peft", "base_fastest"),
    }


def _generation(
    experts: int,
    width: int,
    layers: int,
    prompt: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    repeats: int,
) -> dict[str, Any]:
    models = {name: xlora_model(experts, width, layers, device, dtype) for name in ("peft", "ours")}
    classifier = models["peft"].base_model.internal_xlora_classifier.state_dict()
    models["ours"].base_model.internal_xlora_classifier.load_state_dict(classifier)
    models["ours"] = sapt_fast.patch(models["ours"])
    ids = torch.randint(3, 1000, (1, prompt), generator=torch.Generator().manual_seed(1)).to(device)
    runs = {name: _greedy(model, ids, tokens) for name, model in models.items()}
    chosen = {name: run() for name, run in runs.items()}
    # After a near tie the texts may part; up to there the logits must agree.
    equal = (chosen["peft"].sequences == chosen["ours"].sequences)[0, prompt:].int()
    steps = min(tokens, int(equal.cumprod(0).sum()) + 1)
    logits = {name: torch.cat(output.logits[:steps]) for name, output in chosen.items()}
    error = _relative(logits["ours"], logits["peft"])
    ok = error <= 2 * layers * FLOOR[dtype]
    times = measure.interleaved_ms(runs, device, repeats=repeats, warmup=1) if ok else {}
    per_token = {
        name: {q: ms / tokens for q, ms in quantiles.items()} for name, quantiles in times.items()
    }
    return {
        "what": f"X-LoRA generation, {experts} experts, prompt {prompt}, {tokens} new tokens",
        "error": error,
        "steps_with_equal_texts": steps,
        "ok": ok,
        "ms": per_token,
        "ratio": checks.ratio(per_token, "peft", "ours"),
    }


def _greedy(model: Any, ids: Tensor, tokens: int) -> Callable[[], Any]:
    def run() -> Any:
        return model.generate(
            input_ids=ids,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    return run


def _relative(result: Tensor, expected: Tensor) -> float:
    difference = (result - expected).double().norm()
    return (difference / expected.double().norm()).item()


def _step(layer: Any, x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """Forward and backward; gives the gradient of x, which depends on both."""

    def run() -> Tensor:
        layer(x).square().backward(grad)
        gradient, x.grad = x.grad, None
        layer.zero_grad()
        assert gradient is not None
        return gradient

    return run


def _mixed_batch(layer: Any, x: Tensor, names: list[str] | None) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        return layer(x) if names is None else layer(x, adapter_names=names)

    return run


def _fastest_base(base: Any, x: Tensor) -> Callable[[], Tensor]:
    """The base layer alone, by the product that ours takes on a CPU."""
    if x.device.type != "cpu":
        return _mixed_batch(base, x, None)
    from sapt_fast.ops.own_lora import own_lora

    @torch.no_grad()
    def run() -> Tensor:
        return own_lora(x, base.weight, base.bias, [], [-1] * x.shape[0])

    return run


if __name__ == "__main__":
    sys.exit(main())
