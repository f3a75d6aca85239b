"""Microbenchmarks: `pytest benchmarks/test_speed.py --benchmark-enable`."""

import pytest
import torch
from providers import Layer, Providers

from sapt_fast.ops import QueryProjection, pool_tokens, route

LAYERS = {
    "train": Layer(8, 128, 1024, 1024, 15, 4, torch.float32),
    "train_bf16": Layer(8, 128, 1024, 1024, 15, 4, torch.bfloat16),
    "decode": Layer(1, 1, 1024, 1024, 15, 4, torch.float32),
}
NAMES = ["base", "stacked", "released", "peft", "ours_cpu"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_mixed_lora(benchmark, layer, name):
    training = layer != "decode"
    providers = Providers(LAYERS[layer], training=training)
    function = providers.forward()[name]
    benchmark.group = f"mixed_lora {layer}"
    with torch.set_grad_enabled(training):
        benchmark(providers.step(function) if training else function)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_route(benchmark, pooling):
    table, ids = torch.randn(32128, 1024), torch.randint(0, 32128, (8, 512))
    norm = torch.ones(1024), torch.zeros(1024)
    projection = QueryProjection(torch.randn(100, 1024), torch.randn(1024, 100), *norm)
    keys = torch.rand(15, 1024)
    with torch.no_grad():
        benchmark(lambda: route(pool_tokens(ids, table, pooling=pooling), keys, projection))
