"""Small models with edits, shared by the tests of GRACE and MELO."""

import copy

import torch
from tiny_models import tiny

import sapt_fast
from sapt_fast.demo.backbone import load_backbone
from sapt_fast.methods.grace import GraceConfig
from sapt_fast.methods.melo import MeloConfig

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
TARGETS = [[20, 30, 1], [21, 31, 1], [22, 32, 33, 1]]
PAIRS = list(zip(PROMPTS, TARGETS, strict=True))
OTHER = [40, 41, 42, 43]
METHODS = ("grace", "melo")
_MADE = {}


def fresh(family="llama"):
    return load_backbone() if family == "t5" else tiny(family, initializer_range=0.3)


def patched(method="grace", family="llama", **fields):
    """A model without edits."""
    if method == "grace":
        config = GraceConfig(
            **{"radius": 1e-3, "replacement": "per_token", "margin": 1.0, **fields}
        )
    else:
        config = MeloConfig(**{"radius": 1e-2, "steps": 400, "margin": 1.0, **fields})
    return sapt_fast.patch(fresh(family), config)


def edited(method="grace", family="llama", pairs=PAIRS, **fields):
    """A copy of a model with edits, which are made once."""
    key = repr((method, family, pairs, fields))
    if key not in _MADE:
        _MADE[key] = patched(method, family, **fields)
        edits_of(_MADE[key]).edit(pairs, batch_size=2)
    return copy.deepcopy(_MADE[key])


def edits_of(model):
    return model.grace if hasattr(model, "grace") else model.melo


def answer(model, prompt, **options):
    """What the model generates behind a prompt, up to the end token."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 5, "do_sample": False, **options}
    row = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    row = row[1 if model.config.is_encoder_decoder else len(prompt) :]
    return row[: row.index(1) + 1] if 1 in row else row


def hooks(model):
    """How many hooks there are, and whether `generate` is replaced."""
    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return count, "generate" in vars(model)
