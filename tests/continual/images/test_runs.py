"""Image benchmarks in the loop: every strategy runs, resumes, and is evaluated again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from tiny_images import image_model, image_settings, image_tasks, write_images
from typer.testing import CliRunner

from sapt_fast import SaptConfig, cli, unpatch
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.image_bench import ImageBench, ImageRows, effective_number
from sapt_fast.continual.run.loop import evaluate_run, run_continual
from sapt_fast.continual.strategies import STRATEGIES
from sapt_fast.continual.trainer import SaptTrainer
from sapt_fast.demo.images import DEMO_CLASSES

OF_IMAGES = [name for name, kind in STRATEGIES.items() if "images" in kind.data and not kind.alone]
ROUTED = ("sapt", "lda_experts")
# For a model with two layers.
OPTIONS: dict[str, Any] = {
    "l2p": {"prompts": 4, "top": 2, "length": 1, "choice": "random", "prompt_start": "patches"},
    "dualprompt": {"g_layers": [0], "e_layers": [1], "g_length": 1, "e_length": 2},
    "coda": {"pool": 4, "layers": [0, 1], "length": 2},
}


def run(folder: Path, tasks: Any = None, **options: Any) -> Any:
    tasks = image_tasks(2) if tasks is None else tasks
    model, transform = image_model(tasks)
    return run_continual(model, transform, tasks, folder, image_settings(**options)), model


@pytest.mark.parametrize("strategy", OF_IMAGES)
def test_runs_and_is_evaluated_again(strategy: str, tmp_path: Path) -> None:
    head = "lda" if strategy in ROUTED else "own"
    options = {"strategy": strategy, "strategy_options": OPTIONS.get(strategy, {}), "head": head}
    results, model = run(tmp_path, **options)
    assert np.isfinite(results.scores[np.tril_indices(2)]).all()
    assert (results.trained_parameters > 0) == STRATEGIES[strategy].trains
    if (matrix := results.testing_attention) is not None:
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)
    tasks = image_tasks(2)
    fresh, transform = image_model(tasks)
    settings = image_settings(**options)
    again = evaluate_run(fresh, transform, tasks, tmp_path, settings)
    assert again.deviation(json.loads((tmp_path / "results.json").read_text())) == 0
    moved = model.classifier.weight.abs().sum() > 0
    assert moved == STRATEGIES[strategy].trains


class KilledError(Exception):
    """The process ends here."""


@pytest.mark.parametrize(
    ("strategy", "place"),
    [
        ("sapt", "training"),
        *(
            pytest.param(strategy, place, marks=pytest.mark.thorough)
            for strategy in ("l2p", "coda", "dualprompt", "lda_experts", "sapt")
            for place in ("training", "scoring")
            if (strategy, place) != ("sapt", "training")
        ),
    ],
)
def test_resuming_gives_the_same_weights(
    strategy: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"strategy": strategy, "augmentation": "flip", "head": "ridge", "steps": 4}
    options |= {"replay_batch_size": 2, "strategy_options": OPTIONS.get(strategy, {})}
    whole, expected = run(tmp_path / "whole", **options)
    owner, name, call = {
        "training": (SaptTrainer, "training_step", 7),
        "scoring": (ImageBench, "score", 2),
    }[place]
    own, calls = getattr(owner, name), 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KilledError
        return own(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, watched)
        with pytest.raises(KilledError):
            run(tmp_path / "killed", **options)
    torch.manual_seed(99)  # what is drawn does not depend on what came before
    resumed, model = run(tmp_path / "killed", **options)
    assert resumed.resumed
    np.testing.assert_array_equal(resumed.scores, whole.scores)
    found, weights = model.state_dict(), expected.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    stored = [p / "checkpoints/2-classes2/strategy.safetensors" for p in tmp_path.iterdir()]
    assert len({file.read_bytes() for file in stored}) == 1


def test_masked_training_leaves_the_rows_of_earlier_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = torch.zeros(2, 32)

    def keep(self: Any, task: Any, mixture: Any) -> None:
        if task.name == "classes1":
            trained.copy_(self.model.classifier.weight[:2])

    monkeypatch.setattr(ImageBench, "end_task", keep)
    _, masked = run(tmp_path / "masked", strategy="head", steps=1)
    assert trained.abs().sum() > 0
    assert torch.equal(masked.classifier.weight[:2], trained)
    _, free = run(tmp_path / "free", strategy="head", steps=1, mask_classes=False)
    assert not torch.equal(free.classifier.weight[:2], trained)


def test_diverged_models_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"not written: training has diverged.*got NaN"):
        run(tmp_path / "weights", strategy="seqlora", learning_rate=2e9)
    own = SaptTrainer._token_loss
    monkeypatch.setattr(SaptTrainer, "_token_loss", lambda *given: own(*given) + torch.inf)
    with pytest.raises(ValueError, match=r"got NaN or Inf as a loss.*smaller learning_rate"):
        run(tmp_path / "loss", strategy="seqlora")
    assert not [*(tmp_path / "loss").glob("*/sapt_config.json")]


def test_a_head_that_a_run_lacks_is_named(tmp_path: Path) -> None:
    run(tmp_path, strategy="seqlora")
    tasks = image_tasks(2)
    model, transform = image_model(tasks)
    settings = image_settings(strategy="seqlora", head="lda")
    with pytest.raises(ValueError, match=f"head: got 'lda', but {tmp_path}.* has no statistics"):
        evaluate_run(model, transform, tasks, tmp_path, settings)


def test_several_processes_draw_anew_in_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # accelerate then sets the epoch of the sampler alone.
    monkeypatch.setattr(DataLoaderShard, "set_epoch", lambda self, epoch: None)
    epochs, own = set(), ImageRows.__getitem__
    monkeypatch.setattr(
        ImageRows, "__getitem__", lambda rows, i: epochs.add(rows.epoch) or own(rows, i)
    )
    run(tmp_path, image_tasks(1), strategy="head", augmentation="flip", steps=4)
    assert epochs == {0, 1}


def test_names_of_classes_are_compared_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(row: Any) -> Any:
        name = {"checks": "+", "columns": "-"}[row.output]
        return replace(row, output=name, outputs=(name,))

    (task,) = image_tasks(1)
    rows = {split: tuple(map(named, getattr(task, split))) for split in ("train", "dev", "test")}
    labels = tuple(dict.fromkeys(row.output for row in rows["train"]))
    monkeypatch.setattr(ImageBench, "answers", lambda self, rows, mixture: ["+"] * len(rows))
    results, _ = run(tmp_path, [replace(task, labels=labels, **rows)], strategy="ncm")
    assert results.scores.tolist() == [[50.0]]


def test_a_run_does_not_start_from_the_head_of_the_last_one(tmp_path: Path) -> None:
    _, model = run(tmp_path / "first", strategy="head", steps=1)
    trained = model.classifier.weight.detach().clone()
    unpatch(model)
    tasks = image_tasks(2)
    settings = image_settings(strategy="head", steps=1)
    run_continual(model, image_model(tasks)[1], tasks, tmp_path / "second", settings)
    assert torch.equal(model.classifier.weight, trained)


def test_frozen_heads_do_not_depend_on_the_order(tmp_path: Path) -> None:
    tasks = image_tasks(3)
    final = []
    for order in (tasks, tasks[::-1]):
        results, _ = run(tmp_path / order[0].name, order, strategy="lda")
        final.append(dict(zip(results.tasks, results.scores[-1], strict=True)))
    assert final[0] == final[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "ewc"}, "strategy: got 'ewc', which does not support images"),
        ({"metric": "rouge_l"}, "metric: got 'rouge_l'"),
        ({"strategy": "ncm", "head": "lda"}, "head: got 'lda', expected 'ncm'"),
        ({"replay": "samples"}, "replay: got 'samples', expected 'real' or 'none'"),
        ({"sapt": SaptConfig(adapter="prompt")}, "adapter: got 'prompt'"),
        ({"sapt": SaptConfig(standardize_query=True)}, "standardize_query: got True"),
        ({"sapt": SaptConfig(query_layer=3)}, r"layer: got 3, expected 1 to 2"),
    ],
)
def test_bad_settings_are_named(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


def test_bad_tasks_and_models_are_named(tmp_path: Path) -> None:
    tasks = image_tasks(2)
    one = [replace(t, labels=t.labels[:1]) for t in tasks]
    one = [
        replace(t, **{s: tuple(r for r in getattr(t, s) if r.output in t.labels)
                      for s in ("train", "dev", "test")})
        for t in one
    ]  # fmt: skip
    with pytest.raises(ValueError, match="mask_classes: got a task with one class, 'checks'"):
        run(tmp_path, one)
    model, transform = image_model(tasks[:1])
    with pytest.raises(ValueError, match="model: got a head of 2 classes, expected 4"):
        run_continual(model, transform, tasks, tmp_path, image_settings())
    with pytest.raises(ValueError, match="pixel_values: got images of 8 x 8"):
        run_continual(model, replace(transform, size=(8, 8), resize=(8, 8)), tasks[:1], tmp_path)
    again = [tasks[0], replace(tasks[0], name="again")]
    with pytest.raises(ValueError, match="expected tasks without common classes"):
        run(tmp_path, again, strategy="lda_experts")
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path) -> None:
    command = [
        "--model", "demo", "--benchmark", "demo-images", "--output", str(tmp_path / "run"),
        "--strategy", "seqlora", "--head", "ncm", "--steps", "1", "--max-train", "8",
        "--max-eval", "4", "--no-progress",
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, ["train", *command], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(cli.app, ["eval", str(tmp_path / "run"), "--no-progress"])
    assert "largest deviation from results.json: 0" in result.output
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["source"]
    assert stored["split"] == "classes"
    assert "split" not in Source("demo", "demo").to_dict()
    with pytest.raises(ValueError, match="classes_per_task: got 2"):
        Source("demo", "demo", classes_per_task=2)


def test_compare(tmp_path: Path) -> None:
    command = [
        "compare", "--model", "demo", "--benchmark", "demo-images", "--max-train", "8",
        "--max-eval", "4", "--no-fwt", "--no-progress", "--output",
    ]  # fmt: skip
    refused = CliRunner().invoke(
        cli.app, [*command, str(tmp_path / "bad"), "--strategies", "ncm,ewc"]
    )
    assert refused.exit_code != 0
    assert "'ewc', which does not support images" in str(refused.exception or refused.output)
    assert not (tmp_path / "bad" / "ncm").exists()
    result = CliRunner().invoke(
        cli.app, [*command, str(tmp_path / "run"), "--strategies", "ncm,lda"]
    )
    assert result.exit_code == 0, result.output
    cells = json.loads((tmp_path / "run" / "compare.json").read_text())["cells"]
    assert [cell["trained_parameters"] for cell in cells] == [0] * 2


def test_choice_of_prompts_is_reported(tmp_path: Path) -> None:
    options = {"prompts": 4, "top": 1, "length": 1, "choice": "fixed"}
    run(tmp_path, strategy="l2p", strategy_options=options)
    prompts = json.loads((tmp_path / "results.json").read_text())["prompts"]
    assert prompts == {
        "testing": [[4, 0, 0, 0]] * 2,
        "training": [[8, 0, 0, 0]] * 2,
        "effective_number": 1.0,
        "overlap": [1.0, 1.0],
    }
    assert effective_number(torch.tensor([3, 3, 0, 3])) == pytest.approx(3)


@pytest.mark.parametrize(
    "name",
    ["l2p-5datasets", *(pytest.param(n, marks=pytest.mark.thorough) for n in (
        "l2p-cifar100", "l2p-cifar100-jax"
    ))],
)  # fmt: skip
def test_recipes_run_on_tiny_images(name: str, tmp_path: Path) -> None:
    config = Path(__file__).parents[3] / "recipes" / "images" / f"{name}.yaml"
    options = ["--classes-per-task", "2"]
    if name == "l2p-5datasets":
        options = ["--tasks", "b,a"]
        for folder, classes in (("a", DEMO_CLASSES[:2]), ("b", DEMO_CLASSES[2:4])):
            write_images(tmp_path / "data" / folder / "train", classes, 4, size=20)
            write_images(tmp_path / "data" / folder / "test", classes, 2, size=20)
    else:
        write_images(tmp_path / "data", DEMO_CLASSES[:4], 5, size=20)
    command = [
        "train", "--config", str(config), "--model", "demo", "--data", str(tmp_path / "data"),
        "--output", str(tmp_path / "run"), "--steps", "1", "--no-progress", *options,
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(stored["prompts"]["testing"]) == 2
