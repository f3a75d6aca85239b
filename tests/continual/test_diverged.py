"""A model that has diverged gets no score: argmax of NaN would still be an answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sapt_fast
from sapt_fast.continual.data.encoder import LabelSpace
from sapt_fast.continual.data.rows import Example
from sapt_fast.continual.run.evaluate import answers
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.demo.backbone import CharTokenizer, load_backbone

ROWS = [Example("task", text, text, "b", ("b",)) for text in ("abc", "de")]


@pytest.mark.parametrize("encodes", [False, True])
def test_nan_is_no_answer(encodes: bool) -> None:
    model: Any = load_backbone()
    model = model.get_encoder() if encodes else model
    sapt_fast.patch(model, sapt_fast.SaptConfig(r=2)).sapt.add_task("task")
    space = LabelSpace(("a", "b"), torch.eye(2, model.config.d_model), 1.0) if encodes else None
    settings = ContinualSettings(max_target_length=2, progress=False)

    def asked() -> list[str]:
        return answers(model, CharTokenizer(), ROWS, settings, space=space)

    assert len(asked()) == 2
    with torch.no_grad():
        next(iter(model.sapt.pools.values())).b.trainable.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"got NaN or Inf as logits.*smaller learning_rate"):
        asked()
