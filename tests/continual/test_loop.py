"""The continual loop: strategies, what is written, resuming after SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_tasks import make_model, make_settings, make_tasks

import sapt_fast
from sapt_fast import SaptConfig
from sapt_fast.continual.data.rows import TaskData
from sapt_fast.continual.run import loop
from sapt_fast.continual.run.evaluate import answers, mean_attention
from sapt_fast.continual.run.loop import evaluate_run, run_alone, run_continual
from sapt_fast.continual.run.state import last_checkpoint
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.workbench import Workbench
from sapt_fast.demo.tasks import CharTokenizer

KINDS = ("t5", "llama")


@pytest.mark.parametrize("kind", ["llama", pytest.param("t5", marks=pytest.mark.thorough)])
def test_sapt_learns_scores_and_reports(kind: str, tmp_path: Path) -> None:
    model, tasks = make_model(kind), make_tasks()
    results = run_continual(model, CharTokenizer(), tasks, tmp_path, make_settings())
    assert model.sapt.tasks == [task.name for task in tasks]
    assert not np.isnan(np.tril(results.scores)).any()
    assert np.isnan(results.scores[np.triu_indices(3, 1)]).all()
    for matrix in (results.training_attention, results.testing_attention):
        assert matrix is not None
        np.testing.assert_allclose(np.nansum(matrix, axis=1), 1, atol=1e-5)
    for index, task in enumerate(tasks):
        assert (tmp_path / "checkpoints" / f"{index + 1}-{task.name}/sapt_config.json").is_file()
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        "run.json", "state.json", "checkpoints", "results.json", "results.md", "attention.png",
    }  # fmt: skip
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["metrics"]["AP"] == results.metrics.ap
    assert model.config.use_cache

    again = evaluate_run(make_model(kind), CharTokenizer(), tasks, tmp_path, make_settings())
    np.testing.assert_array_equal(again.scores, results.scores)
    np.testing.assert_allclose(again.training_attention, results.training_attention, atol=1e-6)
    np.testing.assert_allclose(again.testing_attention, results.testing_attention, atol=1e-6)


def test_target_is_the_mean_attention_whatever_the_batches(tmp_path: Path) -> None:
    tasks, tokenizer = make_tasks(2), CharTokenizer()
    model = make_model("t5")
    run_continual(model, tokenizer, tasks, tmp_path, make_settings())
    target = model.sapt.targets[tasks[1].name]
    assert target.shape == (2,)
    # Five rows in batches of four: the last batch has one row.
    for size in (1, 4, 5):
        rows = tasks[1].dev
        mean = mean_attention(model, tokenizer, rows, make_settings(eval_batch_size=size))
        torch.testing.assert_close(mean, target)


def test_seqlora_trains_one_adapter(tmp_path: Path) -> None:
    model = make_model("t5")
    tasks = make_tasks()
    results = run_continual(
        model, CharTokenizer(), tasks, tmp_path, make_settings(strategy="seqlora")
    )
    assert model.sapt.tasks == ["shared"]
    assert results.training_attention is None
    checkpoints = [
        tmp_path / "checkpoints" / f"{index + 1}-{task.name}" for index, task in enumerate(tasks)
    ]
    files = [(p / "shared" / "adapter_model.safetensors").read_bytes() for p in checkpoints]
    assert len(set(files)) == 3
    ids = torch.tensor([[5, 6, 1]])
    assert model.sapt.route(ids).tolist() == [[1.0]]


def test_tasks_alone_start_from_the_base(tmp_path: Path) -> None:
    tasks, tokenizer = make_tasks(2), CharTokenizer()
    model = make_model("t5")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    alone = run_alone(model, tokenizer, tasks, tmp_path / "alone", make_settings())
    assert list(alone) == [task.name for task in tasks]
    assert json.loads((tmp_path / "alone" / "alone.json").read_text()) == alone
    assert {n: t for n, t in model.state_dict().items() if not torch.equal(t, before[n])} == {}
    results = run_continual(model, tokenizer, tasks, tmp_path, make_settings(), alone=alone)
    diagonal = results.scores.diagonal()
    assert results.metrics.fwt == pytest.approx((diagonal - list(alone.values())).mean())
    # The first task has nothing before it, so learning it alone is the same.
    assert results.scores[0, 0] == alone[tasks[0].name]


@pytest.mark.parametrize("scored", ["dev", "test"])
def test_dev_rows_are_scored_where_asked(
    scored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, seen = make_tasks(2, train=4, held_out=2), []
    own = Workbench.score

    def watched(bench: Any, rows: Any, *rest: Any) -> float:
        seen.append(rows)
        return own(bench, rows, *rest)

    monkeypatch.setattr(Workbench, "score", watched)
    settings = make_settings(scored=scored, steps=1)
    run_continual(make_model("t5"), CharTokenizer(), tasks, tmp_path, settings)
    first, second = (getattr(task, scored) for task in tasks)
    assert seen == [first, first, second]


def test_mean_query_key_and_best_checkpoint(tmp_path: Path) -> None:
    config = SaptConfig(r=2, lora_alpha=4, key_init="mean_query", own_key_loss=0.1)
    options = make_settings(sapt=config, load_best=True, gradient_checkpointing=True)
    model = make_model("t5")
    run_continual(model, CharTokenizer(), make_tasks(2), tmp_path, options)
    assert not (tmp_path / "training").exists()


def test_bf16_trains_every_task_under_autocast_and_leaves_the_model_as_it_was(
    tmp_path: Path,
) -> None:
    model, seen = make_model("t5"), []
    before = dict(vars(model))
    model.lm_head.register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_autocast_enabled("cpu")))
    )
    tasks = make_tasks(3)
    settings = make_settings(bf16=True, steps=2, accumulation=1)
    run_continual(model, CharTokenizer(), tasks, tmp_path, settings)
    trained = [autocast for training, autocast in seen if training]
    assert trained == [True] * 6
    sapt_fast.unpatch(model)
    assert set(vars(model)) == set(before)
    assert model.forward.__func__ is type(model).forward


def test_replay_inputs_are_a_share_or_pseudo_samples(tmp_path: Path) -> None:
    tasks = make_tasks(2, train=24)

    def replayed(**options: Any) -> list[list[int]]:
        run = loop._Run(make_model("t5"), CharTokenizer(), tasks, make_settings(**options))
        return [run.bench.inputs(run.bench.kept(task)) for task in tasks[:1]]

    (inputs,) = replayed(replay_share=0.25)
    bench = loop._Run(make_model("t5"), CharTokenizer(), tasks, make_settings()).bench
    own = bench.inputs(tasks[0].train)
    assert len(inputs) == 6
    assert all(row in own for row in inputs)
    assert replayed(replay_share=0.25) == [inputs]
    assert [len(rows) for rows in replayed(replay_share=0.001)] == [1]
    assert replayed(replay="none") == [[]]
    name, benchmark = tasks[0].name, "SuperNI"
    folder = tmp_path / benchmark / name
    folder.mkdir(parents=True)
    content = {"Definition": ["Say"], "Instances": [{"input": "ab", "output": ""}] * 3}
    (folder / "train.json").write_text(json.dumps(content))
    tasks = [replace(task, benchmark=benchmark) for task in tasks]
    assert [len(rows) for rows in replayed(replay=str(tmp_path))] == [3]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_keep_the_order_of_the_rows(
    kind: str,
) -> None:
    import sapt_fast

    model, rows = make_model(kind), make_tasks(1, held_out=5)[0].test
    sapt_fast.patch(model).sapt.add_task("only")
    together = answers(model, CharTokenizer(), rows, make_settings(eval_batch_size=5))
    alone = answers(model, CharTokenizer(), rows, make_settings(eval_batch_size=1))
    assert together == alone


# --- killed and resumed ---


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        ("t5", ("step", "checkpoint")),
        pytest.param("t5", ("trained", "saved"), marks=pytest.mark.thorough),
        pytest.param("llama", ("step",), marks=pytest.mark.thorough),
    ],
)
def test_resuming_after_sigkill_gives_the_same_weights(
    kind: str, places: tuple[str, ...], tmp_path: Path
) -> None:
    tests = Path(__file__).parents[1]
    process = subprocess.run(
        [sys.executable, str(tests / "killed_run.py"), str(tmp_path), f"{kind}-sapt", *places],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), *sys.path])},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])[f"{kind}-sapt"]
    tmp_path = tmp_path / f"{kind}-sapt"
    assert report.pop("uninterrupted") == 0, process.stderr
    expected = load_file(tmp_path / "uninterrupted" / "weights.safetensors")
    expected_state = json.loads((tmp_path / "uninterrupted" / "state.json").read_text())
    left = {
        "step": ["checkpoint-2"],
        "checkpoint": ["checkpoint-2", "checkpoint-4"],
        "trained": ["checkpoint-5"],
        "saved": ["checkpoint-5"],
    }
    for place in places:
        assert report[place] == [-signal.SIGKILL, left[place], 0], process.stderr
        found = load_file(tmp_path / place / "weights.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (place, name)
        state = json.loads((tmp_path / place / "state.json").read_text())
        for name in ("scores", "attention"):
            assert state[name] == expected_state[name]


def test_half_written_checkpoints_are_not_used(tmp_path: Path) -> None:
    for step, text in ((2, "{}"), (10, "{}"), (12, '{"glo')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-14").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert last_checkpoint(tmp_path / "nothing") is None


# --- bad input ---


def test_bad_tasks_are_named(tmp_path: Path) -> None:
    model, tokenizer, tasks = make_model("t5"), CharTokenizer(), make_tasks(2)
    run = lambda given: run_continual(model, tokenizer, given, tmp_path, make_settings())  # noqa: E731
    with pytest.raises(ValueError, match="tasks: got none"):
        run([])
    with pytest.raises(ValueError, match="tasks: got last_first more than once"):
        run([tasks[0], tasks[1], tasks[0]])
    with pytest.raises(ValueError, match="got 'last_first' without dev rows"):
        run([replace(tasks[0], dev=())])
    with pytest.raises(ValueError, match="strategy: 'single' has no sequence"):
        run_continual(model, tokenizer, tasks, tmp_path, make_settings(strategy="single"))
    with pytest.raises(ValueError, match="alone: got no score for reverse_drop_first"):
        run_continual(model, tokenizer, tasks, tmp_path, make_settings(), alone={"last_first": 1.0})


def test_a_prompt_without_tokens_is_named(tmp_path: Path) -> None:
    """A decoder-only model without a start token has nothing to continue, nor EPI a feature."""
    first, second = make_tasks(2, train=4, held_out=2)
    tasks = [first, replace(second, dev=(replace(second.dev[0], prompt=""), second.dev[1]))]
    settings, message = make_settings(strategy="epi"), f"'{second.name}' has a dev example"
    with pytest.raises(ValueError, match=f"tasks: {message} whose prompt has no tokens, expected"):
        run_continual(make_model("llama"), CharTokenizer(), tasks, tmp_path, settings)
    assert not list(tmp_path.iterdir())
    loop._Run(make_model("t5"), CharTokenizer(), tasks, settings)  # its tokenizers end every text


def test_a_pseudo_sample_without_tokens_is_named(tmp_path: Path) -> None:
    tasks = make_tasks(2, train=4, held_out=1)
    folder = tmp_path / tasks[0].benchmark / tasks[0].name
    folder.mkdir(parents=True)
    rows = [{"input": text, "output": ""} for text in ("ab", "")]
    (folder / "train.json").write_text(json.dumps({"Definition": [], "Instances": rows}))
    settings = make_settings(replay=str(tmp_path))
    with pytest.raises(ValueError, match=f"pseudo-samples: '{tasks[0].name}' has an example whose"):
        loop._Run(make_model("llama"), CharTokenizer(), tasks, settings)
    loop._Run(make_model("t5"), CharTokenizer(), tasks, settings)


def test_evaluating_other_tasks_or_models_is_refused(tmp_path: Path) -> None:
    tasks, tokenizer = make_tasks(1, train=4, held_out=1), CharTokenizer()
    options = make_settings(steps=1)
    run_continual(make_model("t5"), tokenizer, tasks, tmp_path, options)
    other = [replace(tasks[0], test=tasks[0].dev)]
    with pytest.raises(ValueError, match=r"tasks: not the tasks of the run.*last_first\.content"):
        evaluate_run(make_model("t5"), tokenizer, other, tmp_path, options)
    # Labels are no rows, but an encoder answers with them.
    labelled = [replace(tasks[0], labels=("a", "b"))]
    with pytest.raises(ValueError, match=r"last_first\.digest was '"):
        evaluate_run(make_model("t5"), tokenizer, labelled, tmp_path, options)
    stored = json.loads((tmp_path / "run.json").read_text())
    del stored["tasks"]["last_first"]["digest"]  # which earlier versions did not write
    (tmp_path / "run.json").write_text(json.dumps(stored))
    evaluate_run(make_model("t5"), tokenizer, labelled, tmp_path, options)
    with pytest.raises(ValueError, match=r"model: not the model of the run.*T5For.*LlamaFor"):
        evaluate_run(make_model("llama"), tokenizer, tasks, tmp_path, options)


def test_a_run_of_other_settings_is_named(tmp_path: Path) -> None:
    tasks, tokenizer = make_tasks(1, train=4, held_out=1), CharTokenizer()

    def run(given: list[TaskData] = tasks, resume: bool = True, **options: Any) -> None:
        options = {"steps": 1, **options}
        model = make_model("t5")
        run_continual(model, tokenizer, given, tmp_path, make_settings(**options), resume=resume)

    run()
    run(progress=True)
    description = json.loads((tmp_path / "run.json").read_text())
    del description["settings"]["sapt"]["autocast_adapter_dtype"]
    (tmp_path / "run.json").write_text(json.dumps(description))
    run()  # a run from before there was that field
    with pytest.raises(ValueError, match="different settings: eval_batch_size was 16, now 3"):
        run(eval_batch_size=3)  # the padding of a batch may be pooled
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01, now 0\.5\. Use another folder"):
        run(learning_rate=0.5)
    with pytest.raises(ValueError, match=r"settings: kl_ratio was 0\.5, now 0\.7"):
        run(sapt=SaptConfig(r=2, lora_alpha=4, kl_ratio=0.7))
    with pytest.raises(ValueError, match=r"tasks\.last_first\.train was 4, now 3"):
        run([replace(tasks[0], train=tasks[0].train[:3])])
    with pytest.raises(FileExistsError, match="holds a run"):
        run(resume=False)
    (tmp_path / "run.json").unlink()
    (tmp_path / ".run.json.0a1b2c.tmp").write_text("")
    with pytest.raises(FileExistsError, match=r"no run\.json but contains attention\.png"):
        run()


@pytest.mark.parametrize(
    ("name", "value"),
    [("strategy", "magic"), ("batch_size", 0), ("replay_share", 0.0), ("learning_rate", -1.0),
     ("metric", "bleu"), ("device", "tpu"), ("steps", 0), ("batch_size", 2.5), ("replay", ""),
     ("scored", "train"), ("key_learning_rate", -1.0), ("weight_decay", -1.0),
     ("learning_rate", float("inf"))],
)  # fmt: skip
def test_bad_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: got {value!r}"):
        ContinualSettings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "alone", "message"),
    [
        ({"replay": "reall"}, None, "replay: got 'reall'"),
        ({}, {"last_first": 1.0, "reverse_drop_first": None}, "alone: got None"),
        ({}, {"last_first": 1.0}, "alone: got no score for reverse_drop_first"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], alone: Any, message: str
) -> None:
    tasks, settings = make_tasks(2, train=4, held_out=1), make_settings(steps=1, **options)
    with pytest.raises(ValueError, match=message):
        run_continual(
            make_model("t5"), CharTokenizer(), tasks, tmp_path / "run", settings, alone=alone
        )
    assert not (tmp_path / "run").exists()


def test_a_task_name_is_a_folder_name(tmp_path: Path) -> None:
    tasks = [replace(task, name=name) for task, name in zip(make_tasks(2), "a/", strict=True)]
    with pytest.raises(ValueError, match="got the name '/'"):
        run_continual(make_model("t5"), CharTokenizer(), tasks, tmp_path / "run", make_settings())
    assert not (tmp_path / "run").exists()


def test_official_settings_and_their_dict() -> None:
    official = ContinualSettings.official("t5", "superni")
    assert (official.sapt.r, official.sapt.kl_ratio, official.epochs) == (4, 0.5, 100)
    assert official.save_steps == pytest.approx(0.05)
    assert ContinualSettings.from_dict(json.loads(json.dumps(official.to_dict()))) == official
    with pytest.raises(ValueError, match="official"):
        ContinualSettings.official("gpt", "superni")
