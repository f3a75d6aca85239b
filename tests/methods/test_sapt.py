"""SaptConfig's checks and the router on its own."""

import dataclasses
import json
import math

import pytest
import torch

from sapt_fast import SaptConfig
from sapt_fast.methods.sapt import SaptRouter
from sapt_fast.methods.task_config import FIELDS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 4.5), ("r", 0), ("r", True), ("r", "4"),
        ("lora_alpha", math.nan), ("lora_alpha", 0), ("lora_alpha", "32"),
        ("lora_dropout", 1.0), ("lora_dropout", -0.1),
        ("target_modules", []), ("target_modules", ""), ("target_modules", ["q", ""]),
        ("target_modules", [1]), ("target_modules", 1),
        ("adapter", "other"),
        ("query_hidden_dim", 1.5),
        ("query_init", "zero"),
        ("temperature", math.inf), ("temperature", 0),
        ("pooling", "sum"),
        ("key_init", None),
        ("own_key_loss", -1), ("kl_ratio", -1), ("kl_ratio", math.nan),
        ("mask_padding", "no"), ("standardize_query", 1), ("grad_through_frozen", None),
        ("autocast_adapter_dtype", "float32"),
        ("top_k", 0), ("top_k", 1.5),
        ("threshold", 3), ("threshold", -0.5),
        ("reserve_tasks", 0),
    ],
)  # fmt: skip
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"{name}: got .*, expected "):
        SaptConfig(**{name: value})


def test_every_field_is_checked():
    assert set(FIELDS) == {field.name for field in dataclasses.fields(SaptConfig)}


@pytest.mark.parametrize("targets", [None, "q|v", ["q", "v"], ("q", "v")], ids=str)
def test_the_same_config_from_json(targets):
    config = SaptConfig(target_modules=targets, top_k=2, threshold=0, lora_alpha=1.5)
    assert SaptConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_kind_of_sequence_makes_no_other_config():
    assert SaptConfig(target_modules=("q", "v")) == SaptConfig(target_modules=["q", "v"])


def router(dtype=torch.float32):
    torch.manual_seed(0)
    made = SaptRouter(16, SaptConfig(temperature=1.0), dtype=dtype)
    for _ in range(3):
        made.add_key()
    return made


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_autocast_leaves_the_scores_alone(dtype, autocast):
    made, pooled = router(dtype), torch.randn(4, 16, dtype=dtype)
    expected = made.scores(pooled)
    with torch.autocast("cpu", autocast):
        got = made.scores(pooled)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(1, 16), (1,), (), (15,)], ids=str)
def test_a_key_of_another_shape_changes_nothing(shape):
    made = router()
    with pytest.raises(ValueError, match=r"key: got shape .* expected \[16\]"):
        made.add_key(torch.randn(shape))
    assert len(made.keys) == 3
