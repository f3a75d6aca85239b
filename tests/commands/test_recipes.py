"""Recipes: complete, their estimates up to date, and runnable on tiny models."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tiny_tasks import save_byte_model
from typer.testing import CliRunner

from sapt_fast import cli
from sapt_fast.continual.data.orders import ORDERS
from sapt_fast.continual.settings import PRESETS

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
TASKS = {"superni": "task363_sst2_polarity_classification,task1572_samsum_summary",
         "long_sequence": "copa,qqp"}  # fmt: skip


def _estimate() -> Any:
    spec = importlib.util.spec_from_file_location("estimate", ROOT / "recipes" / "estimate.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["estimate"] = module
    spec.loader.exec_module(module)
    return module


estimate = _estimate()


def test_there_is_one_for_each_model_and_benchmark() -> None:
    models = ("t5-large", "t5-xl", "t5-xxl", "llama2-7b", "llama2-13b")
    assert set(RECIPES) == {f"{m}-{b}" for m in models for b in ("superni", "long_sequence")}


@pytest.mark.parametrize("name", RECIPES)
def test_the_file_fits_its_name_and_its_estimate(name: str) -> None:
    text = RECIPES[name].read_text()
    recipe = yaml.safe_load(text)
    family, benchmark = ("t5" if name.startswith("t5") else "llama"), recipe["benchmark"]
    assert name.endswith(benchmark)
    assert recipe["preset"] == f"{family}-{benchmark}"
    assert recipe["preset"] in PRESETS
    assert recipe["order"].startswith(benchmark)
    head = text.splitlines()[0]
    (other,) = {order for order in ORDERS if order.startswith(benchmark)} - {recipe["order"]}
    assert f"--order {other}." in head
    assert text.splitlines()[1] == estimate.line(recipe)


@pytest.mark.parametrize("model", estimate.SHAPES)
def test_estimated_weights_are_those_of_the_architecture(model: str) -> None:
    shape = estimate.SHAPES[model]
    with torch.device("meta"):
        if shape.decoder_layers:
            config = transformers.T5Config(
                vocab_size=shape.vocabulary, d_model=shape.width, d_kv=64, d_ff=shape.feed_forward,
                num_layers=shape.layers, num_heads=shape.heads, feed_forward_proj="gated-gelu",
            )  # fmt: skip
            built: Any = transformers.T5ForConditionalGeneration(config)
        else:
            config = transformers.LlamaConfig(
                vocab_size=shape.vocabulary, hidden_size=shape.width,
                intermediate_size=shape.feed_forward, num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
            )  # fmt: skip
            built = transformers.LlamaForCausalLM(config)
    # Input and output embeddings are apart in these checkpoints, whatever the class ties.
    embeddings = {id(m.weight) for m in (built.get_input_embeddings(), built.lm_head)}
    inner = sum(p.numel() for p in built.parameters() if id(p) not in embeddings)
    expected = inner + 2 * shape.vocabulary * shape.width
    assert shape.weights == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "t5-large-superni",
        "llama2-7b-long_sequence",
        pytest.param("t5-xl-long_sequence", marks=pytest.mark.thorough),
    ],
)
def test_a_dry_run(name: str, tmp_path: Path) -> None:
    family = "t5" if name.startswith("t5") else "llama"
    changed = {"feed_forward_proj": "gated-gelu"} if family == "t5" else {}
    save_byte_model(tmp_path / "model", family, **changed)
    command = [
        "train", "--config", str(RECIPES[name]), "--model", str(tmp_path / "model"),
        "--data", str(ROOT / "tests" / "data" / "CL_Benchmark"), "--output", str(tmp_path / "run"),
        "--tasks", TASKS[name.partition("-")[2].partition("-")[2]], "--device", "cpu",
        "--max-train", "8", "--max-eval", "2", "--steps", "1", "--max-source-length", "24",
        "--max-target-length", "4", "--generator", "steps=1", "--generator", "max_length=8",
        "--no-progress",
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "results.json").is_file()
    assert list((tmp_path / "run" / "pseudo_samples").rglob("train.json"))
