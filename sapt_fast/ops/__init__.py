"""The ops: for each a contract, a plain-torch reference and an autograd formula."""

from sapt_fast.ops.gates import balance_loss, sparsify
from sapt_fast.ops.mix_experts import mix_experts
from sapt_fast.ops.mix_prompts import mix_prompts, mix_prompts_with_tokens
from sapt_fast.ops.mixed_lora import mixed_lora, mixed_lora_linear
from sapt_fast.ops.nearest_key import nearest_key
from sapt_fast.ops.route import (
    QueryProjection,
    TaskProjections,
    pool_tokens,
    reflection_loss,
    route,
)
from sapt_fast.ops.topk_keys import topk_keys

__all__ = [
    "QueryProjection",
    "TaskProjections",
    "balance_loss",
    "mix_experts",
    "mix_prompts",
    "mix_prompts_with_tokens",
    "mixed_lora",
    "mixed_lora_linear",
    "nearest_key",
    "pool_tokens",
    "reflection_loss",
    "route",
    "sparsify",
    "topk_keys",
]
