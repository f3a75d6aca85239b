"""The bytes of `cases.mix_prompts` are those that the kernels move, tensor by tensor."""

import pytest
import torch
from cases.mix_prompts import Prompts, prompts_backward, prompts_forward
from kernel_traffic import check, tiles

from sapt_fast.triton_kernels.mix_prompts import mix_prompts_bwd, mix_prompts_fwd


@pytest.mark.parametrize("from_ids", [False, True], ids=["embeds", "ids"])
def test_mix_prompts(from_ids):
    b, t, d, count, length = 6, 7, 37, 5, 3
    prompts, mixture = torch.randn(count, length, d), torch.rand(b, count)
    ids = torch.randint(0, 20, (b, t)) if from_ids else None
    source = torch.randn(20, d).half() if from_ids else torch.randn(b, t, d).half()
    rows = ids.unique().numel() if from_ids else None
    c = Prompts(b, t, d, count, length, rows, prompt_itemsize=4)
    name = "table" if from_ids else "embeds"
    inputs = {"prompts": prompts, "mixture": mixture, name: source}
    if from_ids:
        inputs["ids"] = ids
    check(
        lambda: {"y": mix_prompts_fwd(prompts, mixture, source, ids)},
        inputs,
        prompts_forward(c),
        {"prompts": b, name: b * t / rows if from_ids else 1},
    )
    dy = torch.randn(b, length + t, d).half()
    check(
        lambda: dict(
            zip(
                ("d_prompts", "d_mixture"),
                mix_prompts_bwd(dy, prompts, mixture, True, True),
                strict=True,
            )
        ),
        {"dy": dy, "prompts": prompts, "mixture": mixture},
        prompts_backward(c),
        # 4 prompts share a read of dy, in either pass; dy's samples each read the prompts.
        {"dy": tiles(count, 4), "prompts": b * tiles(count, 4) * 4 / count},
    )
