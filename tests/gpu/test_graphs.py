"""On a GPU: patched models inside CUDA graphs and without synchronisation, and compiled ops."""

from contextlib import contextmanager

import pytest
import torch
from cases.mix_experts import ExpertsCase
from cases.mix_prompts import PromptCase
from tiny_models import patched, tiny, token_ids
from torch import nn

from sapt_fast.ops import mixed_lora_linear

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


class DecodeStep(nn.Module):
    """One token per sample through a patched model: a causal one, or T5's decoder."""

    def __init__(self, family, dtype):
        super().__init__()
        self.model = patched(tiny(family).to(DEVICE, dtype)).requires_grad_(False)
        self.inputs = {"use_cache": False}
        tokens = token_ids(3, 1).to(DEVICE)
        # Given a finished mask, transformers does not look into it, which would wait.
        mask = torch.zeros(3, 1, 1, 1, device=DEVICE, dtype=dtype)
        if family == "t5":
            encoder = self.model.get_encoder()
            weights = torch.full((3, 3), 1 / 3, device=DEVICE)
            with torch.no_grad(), self.model.sapt.fixed(weights):
                self.inputs["encoder_outputs"] = encoder(token_ids(3, 5).to(DEVICE))
            self.inputs |= {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
        else:
            self.inputs |= {"input_ids": tokens, "attention_mask": mask}

    def forward(self):
        return self.model(**self.inputs).logits


def _mixture(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, 3, generator=generator).softmax(-1).to(DEVICE)


@contextmanager
def _no_waiting():
    """An error where the CPU waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "t5"])
@torch.no_grad()
def test_a_captured_decode_step_replays_with_new_weights(family, dtype):
    step, mixture = DecodeStep(family, dtype), _mixture(0)
    with step.model.sapt.fixed(mixture):
        for _ in range(3):
            first = step().clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
        mixture.copy_(_mixture(1))
        graph.replay()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == held
        torch.testing.assert_close(logits, step())
    assert not torch.equal(logits, first)


@pytest.mark.parametrize("family", ["llama", "t5"])
@torch.no_grad()
def test_a_step_waits_for_nothing(family):
    step = DecodeStep(family, torch.bfloat16)
    with step.model.sapt.fixed(_mixture(0)):
        step()
        with _no_waiting():
            step()


def test_routing_and_training_wait_for_nothing():
    model = patched(tiny("llama").to(DEVICE))
    ids = token_ids(3, 5).to(DEVICE)
    mask = torch.full((3, 1, 5, 5), float("-inf"), device=DEVICE).triu(1)

    def step():
        model.sapt.route(ids).square().sum().backward()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits.square().mean().backward()

    with model.sapt.fixed(_mixture(0)):
        step()
        with _no_waiting():
            step()


def _same_compiled(function, leaves, tolerance):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    results = []
    for run in (function, compiled):
        given = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in leaves.items()}
        y = run(given)
        y.float().square().mean().backward()
        results.append([y, *(t.grad for t in given.values() if t.requires_grad)])
    assert len(results[0]) > 1
    for eager, fused in zip(*results, strict=True):
        # Relative to the whole tensor: gradients of a mean lie below assert_close's atol.
        norm = eager.float().norm()
        assert norm > 0
        assert (fused.float() - eager.float()).norm() <= tolerance * norm


def test_fullgraph_compile_of_a_mixed_layer():
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape):
        x = torch.randn(shape, generator=generator, device=DEVICE).mul_(shape[-1] ** -0.5)
        return x.bfloat16().requires_grad_()

    leaves = {
        "x": draw(4, 160, 256),
        "weight": draw(384, 256).detach(),
        "lora_a": draw(60, 256),
        "lora_b": draw(60, 384),
        "mixture": torch.rand(4, 15, generator=generator, device=DEVICE).requires_grad_(),
    }

    def layer(t):
        factors = t["lora_a"], t["lora_b"], t["mixture"]
        return mixed_lora_linear(t["x"], t["weight"], None, *factors, ranks=4, scaling=2.0).relu()

    _same_compiled(layer, leaves, 1e-2)


@pytest.mark.parametrize(
    "case",
    [
        PromptCase(4, 33, 256, 7, 5),
        ExpertsCase(64, 4, 500, 4, 256),
        ExpertsCase(512, 4, 64, 16, 256),
    ],
    ids=str,
)
def test_fullgraph_compile_of_an_op(case):
    inputs = case.inputs(torch.float32, DEVICE)
    leaves = {n: t.requires_grad_(n in case.trains) for n, t in inputs.items()}
    _same_compiled(lambda t: next(iter(case.run(t, "triton").values())), leaves, 1e-5)
