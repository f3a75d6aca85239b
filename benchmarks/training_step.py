"""A whole SAPT training step: ours, the released loop and PEFT with a single LoRA.

Run as a script it measures the peak memory of one provider in a process of its own.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import peak_bytes
from released import released_mixture
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import sapt_fast
from sapt_fast.pools.lora import AdapterPool

PROVIDERS = ("ours", "released", "peft_one_lora")


@dataclass(frozen=True)
class Step:
    """One training step: model shape and batch.

    Attributes:
        kind: "t5" or "llama". width, hidden, layers, heads: of the model (layers in the encoder
            and again in the decoder for T5). source, target: tokens. adapters: K, rank r each.
    """

    kind: str
    width: int
    hidden: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    source: int
    target: int
    adapters: int
    rank: int = 4
    dtype: str = "float32"
    device: str = "cpu"

    def __str__(self) -> str:
        shape = f"{self.kind} d{self.width} layers {self.layers} heads {self.heads}"
        return f"{shape} B{self.batch} T{self.source}/{self.target} K{self.adapters} {self.dtype}"


def base_model(step: Step) -> PreTrainedModel:
    """A randomly initialised model of the step's shape."""
    torch.manual_seed(0)
    model: PreTrainedModel
    with torch.device(step.device):  # a GPU draws a billion parameters at once, a CPU in a minute
        if step.kind == "t5":
            config = T5Config(
                vocab_size=step.vocabulary, d_model=step.width, d_kv=step.width // step.heads,
                d_ff=step.hidden, num_layers=step.layers, num_heads=step.heads, dropout_rate=0.0,
                decoder_start_token_id=0,
            )  # fmt: skip
            model = T5ForConditionalGeneration(config)
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=step.vocabulary,
                    hidden_size=step.width,
                    intermediate_size=step.hidden,
                    num_hidden_layers=step.layers,
                    num_attention_heads=step.heads,
                )
            )
    return model.to(device=step.device, dtype=getattr(torch, step.dtype)).train()


def provider(name: str, step: Step) -> Callable[[], None]:
    """A function that runs one step (forward, backward, AdamW) of the named provider."""
    model: Any = base_model(step)
    if name == "peft_one_lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q", "v"] if step.kind == "t5" else ["q_proj", "v_proj"]
        config = LoraConfig(r=step.rank, lora_alpha=32, target_modules=targets)
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    else:
        config = sapt_fast.SaptConfig(
            r=step.rank, reserve_tasks=step.adapters, grad_through_frozen=name == "ours"
        )
        sapt_fast.patch(model, config)
        for k in range(step.adapters):
            model.sapt.add_task(str(k))
            for pool in model.sapt.pools.values():
                torch.nn.init.normal_(pool.b.trainable, std=0.02)
        if name == "released":
            for layer in model.sapt.layers.values():
                layer.sapt_group = None  # every layer on its own
                layer.sapt_pool.forward = ReleasedLoop(layer.sapt_pool)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    inputs = _inputs(step)

    def run() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


class ReleasedLoop:
    """The published aggregation in place of a pool's forward: one adapter after the other."""

    def __init__(self, pool: AdapterPool) -> None:
        last = len(pool) - 1
        self.earlier = [pool.adapter(k) for k in range(last)]
        self.newest = pool.a.trainable, pool.b.trainable
        self.scaling = pool.scaling[last]

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, mixture: Tensor, **_: Any
    ) -> Tensor:
        delta = released_mixture(x, self.earlier, self.newest, mixture, self.scaling)
        return F.linear(x, weight, bias) + delta


def _inputs(step: Step) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> Tensor:
        ids = torch.randint(3, step.vocabulary, (step.batch, length), generator=generator)
        return ids.to(step.device)

    if step.kind == "t5":
        return {"input_ids": tokens(step.source), "labels": tokens(step.target)}
    ids = tokens(step.source + step.target)
    labels = ids.clone()
    labels[:, : step.source] = -100
    return {"input_ids": ids, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("step", help="the fields of Step as JSON")
    options = parser.parse_args()
    step = Step(**json.loads(options.step))
    run = provider(options.provider, step)
    print(json.dumps({"peak_bytes": peak_bytes(run, step.device), **asdict(step)}))


if __name__ == "__main__":
    main()
