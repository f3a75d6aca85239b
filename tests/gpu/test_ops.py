"""On a GPU: every op against float64 in three dtypes at real sizes, and offsets beyond 2^31."""

from dataclasses import replace

import op_checks
import pytest
import torch
from checks import correctness
from providers import Layer

from sapt_fast.ops import mix_experts, mixed_lora_linear, topk_keys

plans = pytest.importorskip("sapt_fast.triton_kernels.blocks.plans", reason="needs Triton")

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in op_checks.DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", op_checks.checked(False, "triton"), ids=str)
def test_op_against_float64(case, dtype):
    report = op_checks.correctness(DEVICE, [case], dtypes=(DTYPES[dtype],))
    assert report[case.op]["ok"], report[case.op]["cases"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layer",
    [
        Layer(4, 512, 1024, 1024, 15, 4, torch.float32, DEVICE),
        Layer(2, 512, 4096, 4096, 60, 4, torch.float32, DEVICE),
        Layer(3, 77, 100, 90, 3, 5, torch.float32, DEVICE),
        Layer(4, 1, 4096, 4096, 15, 4, torch.float32, DEVICE),
    ],
    ids=str,
)
def test_mixed_lora_against_float64(layer, dtype):
    layer = replace(layer, dtype=DTYPES[dtype])
    report = correctness([layer], [layer])
    assert "ours_triton" in report
    for name, row in report.items():
        assert row["ok"], (name, row["cases"])


@pytest.mark.parametrize("rows", [1, 128, 2048])
def test_launch_plans_give_the_same_bits(rows):
    """The third call of a kind takes a plan; the first has ordinary launches."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE, generator=generator)

    x, weight = normal(4, rows, 512), normal(256, 512)
    lora_a, lora_b = normal(60, 512), normal(60, 256)
    leaves = [t.requires_grad_() for t in (x, lora_a, lora_b, torch.rand(4, 15, device=DEVICE))]
    dy = normal(4, rows, 256)
    plans.forget()
    results = []
    for _ in range(3):
        y = mixed_lora_linear(
            x, weight, None, *leaves[1:], ranks=4, trainable=[14], backend="triton"
        )
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    assert sum(plan is not None for plan in plans._plans.values()) == 2  # forward and backward
    for first, third in zip(results[0], results[2], strict=True):
        assert torch.equal(first, third)


@torch.no_grad()
def test_experts_beyond_two_to_the_31_elements():
    count, rank, width = 600_000, 4, 1024
    banks = [torch.empty(count, rank, width, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    assert banks[0].numel() > 2**31
    generator = torch.Generator(DEVICE).manual_seed(0)
    chosen = torch.tensor([[count - 1, count - 2]], device=DEVICE)
    for bank in banks:
        bank[-2:].normal_(generator=generator)
    x = torch.randn(1, width, dtype=torch.bfloat16, device=DEVICE, generator=generator)
    weights = torch.tensor([[0.5, 2.0]], device=DEVICE)
    y = mix_experts(x, *banks, chosen, weights)
    few = [bank[-2:].double() for bank in banks]
    exact = mix_experts(x.double(), *few, chosen - (count - 2), weights, backend="reference")
    assert (y - exact).norm() / exact.norm() < 1e-2


@torch.no_grad()
def test_keys_beyond_two_to_the_31_elements():
    count, width = 4_500_000, 512
    keys = torch.zeros(count, width, dtype=torch.bfloat16, device=DEVICE)
    assert keys.numel() > 2**31
    query = torch.ones(2, width, dtype=torch.bfloat16, device=DEVICE)
    keys[-1], keys[7], keys[count // 2] = 3.0, 2.0, 1.0
    scores, index = topk_keys(query, keys, 4)
    assert index.tolist() == [[count - 1, 7, count // 2, 0]] * 2
    assert scores.tolist() == [[3.0 * width, 2.0 * width, 1.0 * width, 0.0]] * 2
