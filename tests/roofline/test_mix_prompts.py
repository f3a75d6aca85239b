"""The bytes of `cases.mix_prompts` are those that the kernels move, tensor by tensor."""

import pytest
import torch
from cases.mix_prompts import Prompts, prompts_backward, prompts_forward
from kernel_traffic import check, check_rereads

from sapt_fast.triton_kernels.mix_prompts import mix_prompts_bwd, mix_prompts_fwd


@pytest.mark.parametrize("from_ids", [False, True], ids=["embeds", "ids"])
def test_mix_prompts(from_ids):
    b, t, d, count, length = 6, 7, 37, 5, 3
    prompts, mixture = torch.randn(count, length, d), torch.rand(b, count)
    ids = torch.randint(0, 20, (b, t)) if from_ids else None
    source = torch.randn(20, d).half() if from_ids else torch.randn(b, t, d).half()
    rows = ids.unique().numel() if from_ids else None
    c = Prompts(b, t, d, count, length, rows, tile=4, prompt_itemsize=4)
    name = "table" if from_ids else "embeds"
    inputs = {"prompts": prompts, "mixture": mixture, name: source}
    if from_ids:
        inputs["ids"] = ids

    def forward():
        return {"y": mix_prompts_fwd(prompts, mixture, source, ids)}

    passes = prompts_forward(c)
    check_rereads(check(forward, inputs, passes, {}), passes)

    dy = torch.randn(b, length + t, d).half()

    def backward():
        grads = mix_prompts_bwd(dy, prompts, mixture, True, True)
        return dict(zip(("d_prompts", "d_mixture"), grads, strict=True))

    passes, inputs = prompts_backward(c), {"dy": dy, "prompts": prompts, "mixture": mixture}
    check_rereads(check(backward, inputs, passes, {}), passes)
