"""Comparisons: what is run and what is not run again, the table, the plots, bad input."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tasks import make_model, make_settings, make_tasks

from sapt_fast.continual.compare import compare as module
from sapt_fast.continual.compare.cells import Cell, Comparison
from sapt_fast.continual.compare.compare import compare, settings_of_rows
from sapt_fast.continual.compare.report import (
    comparison_table,
    forgetting_curves,
    summary,
    write_comparison,
)
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.trainer import SaptTrainer
from sapt_fast.demo.tasks import CharTokenizer

NAMES = [task.name for task in make_tasks(2)]
ORDERS = [",".join(NAMES), ",".join(reversed(NAMES))]
BASE = make_settings(steps=2, save_steps=1, accumulation=1)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    """A source of tiny tasks and a tiny model, in the order asked for."""
    tasks = {task.name: task for task in make_tasks(2, train=8, held_out=2)}

    def load_tasks(self: Source) -> Any:
        return [tasks[name] for name in (self.tasks or ORDERS[0]).split(",")]

    monkeypatch.setattr(Source, "load_tasks", load_tasks)
    monkeypatch.setattr(Source, "load_model", lambda self: (make_model("t5"), CharTokenizer()))
    return Source(model="demo", benchmark="demo")


def rows_of(*names: str, **values: Any) -> dict[str, ContinualSettings]:
    return settings_of_rows(BASE, names, values)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the runs that `compare` starts or goes on with."""
    started: list[str] = []
    run = module.run_continual

    def watched(*arguments: Any, **options: Any) -> Any:
        folder = Path(arguments[3])
        started.append(f"{folder.parent.name}/{folder.name}")
        return run(*arguments, **options)

    monkeypatch.setattr(module, "run_continual", watched)
    return started


def test_every_method_seed_and_order_is_run_once(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = counted(monkeypatch)
    options: Any = {"orders": ORDERS, "seeds": (0, 1), "alone": BASE, "progress": False}
    before = compare(source, rows_of("sapt"), tmp_path, **options)
    folders = [f"{o}-seed{s}" for o in ("order1", "order2") for s in (0, 1)]
    assert sorted(started) == sorted(f"sapt/{folder}" for folder in folders)

    # Again, with one method more: only that one runs.
    started.clear()
    comparison = compare(source, rows_of("sapt", "all=joint"), tmp_path, **options)
    assert sorted(started) == sorted(f"all/{folder}" for folder in folders)
    assert [c.results for c in comparison.of("sapt")] == [c.results for c in before.cells]
    assert [(c.row, c.order, c.seed) for c in comparison.cells] == [
        (row, order, seed)
        for row in ("sapt", "all") for order in ("order1", "order2") for seed in (0, 1)
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "alone").iterdir()) == ["seed0", "seed1"]
    for cell in comparison.cells:
        names = NAMES if cell.order == "order1" else NAMES[::-1]
        assert cell.results["tasks"] == names
        alone = json.loads((tmp_path / f"alone/seed{cell.seed}/alone.json").read_text())
        assert cell.results["alone"] == [alone[name] for name in names]
        metrics = cell.results["metrics"]
        assert metrics["FWT"] is not None
        assert (metrics["F.Ra"] is None) == (cell.row == "all")
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written == {
        "compare.json", "compare.md", "forgetting.png",
        "attention-sapt-order1.png", "attention-sapt-order2.png",
    }  # fmt: skip
    stored = json.loads((tmp_path / "compare.json").read_text())
    assert len(stored["cells"]) == 8
    values = [c.results["metrics"]["AP"] for c in comparison.of("sapt")]
    spread = stored["rows"]["sapt"]["metrics"]["AP"]
    assert spread["values"] == values
    assert spread["mean"] == pytest.approx(np.mean(values))
    assert spread["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert stored["rows"]["all"]["metrics"]["BWT"]["mean"] is None
    with pytest.raises(ValueError, match=r"different settings: steps was 2, now 3\. Use another"):
        compare(source, rows_of("sapt", steps=3), tmp_path, **options)


def test_an_interrupted_comparison_goes_on(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(source, rows_of("seqlora", "ewc"), tmp_path / "whole", progress=False)
    train, steps = SaptTrainer.training_step, 0

    def interrupted(self: Any, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 8:  # the last one of all
            raise KeyboardInterrupt
        return train(self, *arguments)

    monkeypatch.setattr(SaptTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(source, rows_of("seqlora", "ewc"), tmp_path / "cut", progress=False)
    assert (tmp_path / "cut/seqlora/order-seed0/results.json").exists()
    assert not (tmp_path / "cut/ewc/order-seed0/results.json").exists()
    started = counted(monkeypatch)
    cut = compare(source, rows_of("seqlora", "ewc"), tmp_path / "cut", progress=False)
    assert started == ["ewc/order-seed0"]
    assert steps == 9
    assert [c.results["resumed"] for c in cut.cells] == [False, True]
    for ours, theirs in zip(cut.cells, whole.cells, strict=True):
        np.testing.assert_array_equal(ours.scores, theirs.scores)
        last = f"checkpoints/2-{NAMES[1]}/shared/adapter_model.safetensors"
        assert (ours.folder / last).read_bytes() == (theirs.folder / last).read_bytes()


@pytest.mark.parametrize("finished", [True, False])
def test_runs_on_other_rows_are_refused_before_anything_runs(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    rows, options = rows_of("seqlora"), {"orders": ORDERS, "progress": False}
    compare(source, rows, tmp_path, **options)
    last = tmp_path / "seqlora" / "order2-seed0"
    if not finished:
        (last / "results.json").unlink()
    loads, load_tasks = [], Source.load_tasks

    def changed(self: Source) -> Any:
        loads.append(self.tasks)
        first, second = load_tasks(self)
        row = replace(first.train[0], outputs=("other",))  # as many rows, and the same prompts
        return [replace(first, train=(row, *first.train[1:])), second]

    with monkeypatch.context() as patched:
        patched.setattr(Source, "load_tasks", changed)
        started = counted(patched)
        message = rf"order1-seed0 holds a run on different data: tasks\.{NAMES[0]}\.digest was '"
        with pytest.raises(ValueError, match=message):
            compare(source, rows_of("ewc", "seqlora"), tmp_path, **options)
        assert started == []
        assert loads == ORDERS[:1]

        # A run of before there was a digest is taken at its word.
        for file in tmp_path.rglob("run.json"):
            run = json.loads(file.read_text())
            for task in run["tasks"].values():
                del task["digest"]
            file.write_text(json.dumps(run))
        compare(source, rows, tmp_path, **{**options, "orders": ORDERS[:1]})
        assert started == []

    for run_file in tmp_path.rglob("run.json"):  # but not one of other tasks
        run = json.loads(run_file.read_text())
        run["tasks"]["gone"] = run["tasks"].pop(NAMES[1])
        run_file.write_text(json.dumps(run))
    message = (
        rf"tasks\.gone\.benchmark was 'demo', now 'absent'.*{NAMES[1]}\.benchmark was 'absent'"
    )
    with pytest.raises(ValueError, match=message):
        compare(source, rows, tmp_path, **options)


def test_tasks_learned_alone_on_other_rows_are_refused(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(source, rows_of("seqlora"), tmp_path, alone=BASE, progress=False)
    load_tasks = Source.load_tasks

    def changed(self: Source) -> Any:
        return [replace(task, test=task.test[:1]) for task in load_tasks(self)]

    monkeypatch.setattr(Source, "load_tasks", changed)
    with pytest.raises(
        ValueError, match=r"alone/seed0 holds a run on different data: .*test was 2, now 1"
    ):
        compare(source, rows_of("ewc"), tmp_path, alone=BASE, progress=False)
    assert not (tmp_path / "ewc").exists()


def test_fwt_is_added_to_runs_that_are_finished(source: Source, tmp_path: Path) -> None:
    rows = rows_of("seqlora")
    without = compare(source, rows, tmp_path, progress=False)
    assert without.cells[0].results["metrics"]["FWT"] is None
    board = tmp_path / "tensorboard" / "seqlora" / "order-seed0"
    board.mkdir(parents=True)
    (board / "without").touch()
    added = compare(source, rows, tmp_path, alone=BASE, progress=False)
    assert not board.exists()  # it had no FWT
    results = added.cells[0].results
    diagonal = np.diag(added.cells[0].scores)
    expected = np.mean(diagonal - results["alone"])
    assert results["metrics"]["FWT"] == pytest.approx(expected)
    for field in ("scores", "seconds", "resumed"):  # nothing was trained again
        assert results[field] == without.cells[0].results[field]


# --- the report, by hand ---


def made(tmp_path: Path) -> Comparison:
    def cell(row: str, strategy: str, seed: int, scores: Any, metrics: Any, **other: Any) -> Cell:
        folder = tmp_path / row / f"order-seed{seed}"
        folder.mkdir(parents=True)
        source = {"model": "/models/tiny", "benchmark": "demo", "dtype": "float32"}
        run = {"settings": {"strategy": strategy, "scored": "test"}, "source": source}
        (folder / "run.json").write_text(json.dumps(run))
        results = {
            "tasks": ["a", "b", "c"], "scores": scores, "alone": None,
            "metrics": dict(zip(("AP", "F.Ra", "FWT", "BWT"), metrics, strict=True)),
            "training_attention": None, "testing_attention": None,
            "seconds": [1.0, 2.0, 3.5], "trained_parameters": 1234, "peak_memory": 2**30,
            "resumed": False, **other,
        }  # fmt: skip
        return Cell(row, "order", seed, folder, results)

    nan = None
    first = [[80.0, nan, nan], [60.0, 90.0, nan], [40.0, 70.0, 100.0]]
    second = [[90.0, nan, nan], [80.0, 80.0, nan], [70.0, 80.0, 90.0]]
    every = [[75.0, 75.0, 75.0]] * 3
    cells = (
        cell("one", "seqlora", 0, first, (70.0, 30.0, None, -30.0)),
        cell("one", "seqlora", 1, second, (80.0, 10.0, None, -10.0), resumed=True),
        cell("all", "joint", 0, every, (75.0, None, None, None), peak_memory=None),
    )
    return Comparison(("one", "all"), cells, tmp_path)


def test_means_and_deviations_by_hand(tmp_path: Path) -> None:
    comparison = made(tmp_path)
    found = summary(comparison.of("one"))
    assert found["metrics"]["AP"] == {
        "mean": 75.0, "deviation": pytest.approx(50**0.5), "values": [70.0, 80.0],
    }  # fmt: skip
    assert found["metrics"]["FWT"]["mean"] is None
    assert (found["seconds"], found["peak_memory"], found["resumed"]) == (6.5, 2**30, True)
    lines = write_comparison(comparison)["markdown"].read_text().splitlines()
    assert lines[2].startswith("Model `tiny`, benchmark demo, 3 tasks, test rows scored")
    assert lines[6] == (
        "| one | 2 | 75.0 ± 7.1 | 20.0 ± 14.1 | - | -20.0 ± 14.1 | 1,234 | 6 s* | 1,024 MiB |"
    )
    assert lines[7] == "| all | 1 | 75.0 | - | - | - | 1,234 | 6 s | - |"
    assert "| b | 70.00 | 85.00 | - |" in lines  # the mean over both seeds
    table = comparison_table(comparison)
    assert next(iter(table.columns[2].cells)).plain == "75.0 ± 7.1"


def test_forgetting_curves_by_hand(tmp_path: Path) -> None:
    scores, forgotten = forgetting_curves(made(tmp_path)).axes
    (one, every) = scores.lines
    assert one.get_ydata().tolist() == [85.0, 77.5, 75.0]
    assert list(every.get_ydata()) == [75.0, 75.0]
    # F.Ra after two tasks: 20 and 10; after three: (80 - 40 + 90 - 70) / 2 and (90 - 70) / 2.
    (curve,) = forgotten.lines
    assert curve.get_ydata()[1:].tolist() == [15.0, 20.0]
    assert np.isnan(curve.get_ydata()[0])


def test_scalars_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from sapt_fast.continual.compare.tensorboard import write_scalars

    for _ in range(2):
        write_scalars(tmp_path / "board", made_once(tmp_path).cells[0])
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("scores/a")] == [(1, 80), (2, 60), (3, 40)]
    assert [(e.step, e.value) for e in events.Scalars("scores/b")] == [(2, 90), (3, 70)]
    assert [e.value for e in events.Scalars("metrics/AP")] == [80, 75, 70]
    assert "metrics/FWT" not in events.Tags()["scalars"]

    # Joint training has no sequence: nothing to forget.
    write_scalars(tmp_path / "joint", made_once(tmp_path).cells[2])
    tags = EventAccumulator(str(tmp_path / "joint")).Reload().Tags()["scalars"]
    assert {tag for tag in tags if tag.startswith("metrics/")} == {"metrics/AP"}


def test_scalars_that_a_kill_cut_off_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from sapt_fast.continual.compare import tensorboard

    cell, metrics = made_once(tmp_path).cells[0], tensorboard.continual_metrics

    def dying(scores: Any, alone: Any) -> Any:
        if len(scores) == 2:
            raise KeyboardInterrupt
        return metrics(scores, alone)

    monkeypatch.setattr(tensorboard, "continual_metrics", dying)
    with pytest.raises(KeyboardInterrupt):
        tensorboard.write_scalars(tmp_path / "board", cell)
    monkeypatch.undo()
    tensorboard.write_scalars(tmp_path / "board", cell)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [e.step for e in events.Scalars("scores/a")] == [1, 2, 3]
    assert len(list((tmp_path / "board").iterdir())) == 1


def made_once(tmp_path: Path) -> Comparison:
    folder = tmp_path / f"made{len(list(tmp_path.iterdir()))}"
    return made(folder)


def test_without_tensorboard_it_is_said_before_anything_runs(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        compare(source, rows_of("seqlora"), tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


# --- settings and bad input ---


def test_settings_of_rows() -> None:
    base = replace(BASE, strategy="ewc", strategy_options={"strength": 7.0})
    rows = settings_of_rows(
        base,
        ["ewc", "strong=ewc", "seqlora"],
        {"steps": 9, "strong.strength": 50, "strong.learning_rate": 0.5, "r": 3, "seqlora.r": 1},
    )
    assert list(rows) == ["ewc", "strong", "seqlora"]
    assert [s.strategy for s in rows.values()] == ["ewc", "ewc", "seqlora"]
    assert [s.sapt.r for s in rows.values()] == [3, 3, 1]
    assert {s.steps for s in rows.values()} == {9}
    assert rows["ewc"].strategy_options == {"strength": 7.0, "rows": 64}
    assert rows["strong"].strategy_options == {"strength": 50.0, "rows": 64}
    assert rows["strong"].learning_rate == 0.5
    assert rows["ewc"].learning_rate == base.learning_rate

    # Defaults of a strategy come before all that is asked for.
    values = {"steps": 9, "slow.learning_rate": 0.01}
    defaults = {"ewc": {"learning_rate": 0.3, "steps": 4}}
    rows = settings_of_rows(base, ["ewc", "slow=ewc", "lwf"], values, defaults)
    assert [s.learning_rate for s in rows.values()] == [0.3, 0.01, base.learning_rate]
    assert {s.steps for s in rows.values()} == {9}


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        (["ewc", "magic"], {}, "strategies: got 'magic', expected some of sapt"),
        (["ewc", "ewc"], {}, "strategies: got 'ewc' twice"),
        (["ewc"], {"lwf.strength": 1}, "set: got 'lwf.strength', expected one of the rows"),
        (["ewc"], {"strenght": 1}, "ewc: strategy_options: got 'strenght'"),
        (["ewc"], {"ewc.rows": 0}, "ewc: strategy_options: ewc.rows: got 0, expected at least 1"),
        (["ewc"], {"ewc.rows": float("inf")}, "ewc.rows: got inf, expected a whole number"),
        (["ewc"], {"steps": 0}, "ewc: steps: got 0"),
        (["ewc"], {"strategy": "lwf"}, "set: got 'strategy', which is set by strategies"),
        (["ewc"], {"ewc.seed": 3}, "set: got 'ewc.seed', which is set by seeds"),
        (["lfpt5"], {}, "lfpt5: replay: got 'real'"),
        (["replay"], {"replay": "none"}, "replay: replay: got 'none'"),
    ],
)
def test_bad_rows_are_named(names: list[str], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of_rows(BASE, names, values)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({}, {}, "rows: got none"),
        ({"a/b": BASE}, {}, "rows: got 'a/b', expected a valid folder name"),
        ({"alone": BASE}, {}, "rows: got 'alone'"),
        ({"one": make_settings(strategy="single")}, {}, "rows: got 'single' for 'one'"),
        ({"sapt": BASE}, {"seeds": ()}, "seeds: got none"),
        ({"sapt": BASE}, {"seeds": (1, 1)}, "seeds: got [1, 1], expected distinct"),
        ({"sapt": BASE}, {"orders": []}, "orders: got none"),
        ({"sapt": BASE}, {"orders": ["a,b,a"]}, "order: got 'a' more than once"),
        ({"sapt": BASE}, {"orders": ["a", "a"]}, "orders: got 'a' twice"),
        (
            {"sapt": BASE},
            {"orders": ["a,b", "b,c"]},
            "orders: got 'b,c', expected the tasks of 'a,b'",
        ),
    ],
)
def test_bad_comparisons_are_named(
    source: Source, tmp_path: Path, rows: Any, options: Any, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        compare(source, rows, tmp_path / "run", **options)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()
