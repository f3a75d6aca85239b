"""Continual runs with prompts in place of LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_tasks import make_model, make_settings, make_tasks

from sapt_fast import SaptConfig
from sapt_fast.cli import app
from sapt_fast.continual.run.loop import evaluate_run, run_continual
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.demo.tasks import CharTokenizer

CONFIG = SaptConfig(adapter="prompt", prompt_length=4)


@pytest.mark.parametrize("kind", ["t5", pytest.param("llama", marks=pytest.mark.thorough)])
def test_a_run_learns_scores_and_is_evaluated_again(kind: str, tmp_path: Path) -> None:
    model, tasks, settings = make_model(kind), make_tasks(), make_settings(sapt=CONFIG)
    results = run_continual(model, CharTokenizer(), tasks, tmp_path, settings)
    assert model.sapt.tasks == [task.name for task in tasks]
    assert len(model.sapt.prompts) == 3
    assert not np.isnan(np.tril(results.scores)).any()
    for matrix in (results.training_attention, results.testing_attention):
        assert matrix is not None
        np.testing.assert_allclose(np.nansum(matrix, axis=1), 1, atol=1e-5)
    folder = tmp_path / "checkpoints" / f"3-{tasks[2].name}"
    stored = json.loads((folder / tasks[0].name / "adapter_config.json").read_text())
    assert stored["peft_type"] == "PROMPT_TUNING"
    again = evaluate_run(make_model(kind), CharTokenizer(), tasks, tmp_path, settings)
    np.testing.assert_array_equal(again.scores, results.scores)
    np.testing.assert_allclose(again.testing_attention, results.testing_attention, atol=1e-6)


def test_training_moves_the_new_prompt_alone(tmp_path: Path) -> None:
    tasks = make_tasks(2)
    settings = make_settings(sapt=CONFIG, steps=12, learning_rate=0.1)
    model = make_model("t5")
    run_continual(model, CharTokenizer(), tasks, tmp_path, settings)
    first = tmp_path / "checkpoints" / f"1-{tasks[0].name}"
    before = _prompt(first, tasks[0].name)
    assert torch.equal(model.sapt.prompts.prompt(0), before)
    trained = model.sapt.prompts.prompt(1)
    table = model.get_input_embeddings().weight
    assert not (trained[:, None] == table).all(-1).any()  # no row is that of a token any more


def _prompt(folder: Path, name: str) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / name / "adapter_model.safetensors")["prompt_embeddings"]


def test_one_prompt_for_all_tasks(tmp_path: Path) -> None:
    model, settings = make_model("t5"), make_settings(sapt=CONFIG, strategy="seqlora")
    run_continual(model, CharTokenizer(), make_tasks(2), tmp_path, settings)
    assert len(model.sapt.prompts) == 1


@pytest.mark.parametrize("strategy", ["olora", "epi"])
def test_what_takes_no_prompts_says_so(strategy: str) -> None:
    with pytest.raises(ValueError, match="adapter: got 'prompt', expected 'lora'"):
        make_settings(sapt=CONFIG, strategy=strategy)


def test_by_name_and_from_the_command_line() -> None:
    from typer.testing import CliRunner

    settings = ContinualSettings.of("t5-superni", adapter="prompt", prompt_length=7)
    assert (settings.sapt.adapter, settings.sapt.prompt_length) == ("prompt", 7)
    assert ContinualSettings.from_dict(settings.to_dict()) == settings
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    assert "--adapter" in shown
    assert "--prompt-length" in shown
