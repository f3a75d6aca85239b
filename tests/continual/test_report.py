import io
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sapt_fast.continual.scores.heat_map import attention_heat_map, write_attention_heat_map
from sapt_fast.continual.scores.run_report import write_report
from sapt_fast.continual.scores.tables import results_markdown, results_table
from sapt_fast.files.directories import atomic_write_bytes, atomic_write_text
from sapt_fast.files.writing import write_json

NAN = math.nan
TASKS = ["sst2", "copa|x", "[qqp]"]
SCORES = [[80.0, NAN, NAN], [75.0, 65.0, NAN], [60.0, 50.0, 90.0]]
ALONE = [78.0, 70.0, 84.0]
TRAINING = [[1.0, NAN, NAN], [0.25, 0.75, NAN], [0.1, 0.2, 0.7]]
TESTING = [[0.9, 0.05, 0.05], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]]


class TestAtomicWrite:
    def test_content_and_missing_folders(self, tmp_path):
        path = tmp_path / "a" / "b.txt"
        assert atomic_write_text(path, "grün\r\n") == path
        assert path.read_bytes() == "grün\r\n".encode()
        atomic_write_bytes(str(path), b"new")
        assert path.read_bytes() == b"new"
        assert os.listdir(path.parent) == ["b.txt"]

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_failure_leaves_the_old_file(self, tmp_path, monkeypatch, step):
        path = atomic_write_text(tmp_path / "a.txt", "old")

        def fail(*args):
            raise OSError("no space left")

        monkeypatch.setattr(os, step, fail)
        with pytest.raises(OSError, match="no space left"):
            atomic_write_text(path, "new")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.txt"]

    def test_target_is_never_opened_for_writing(self, tmp_path, monkeypatch):
        path = atomic_write_text(tmp_path / "a.txt", "old")
        seen = []
        real = os.replace

        def replace(source, target):
            seen.append((path.read_text(), Path(source).read_text(), Path(source).parent))
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        atomic_write_text(path, "new")
        assert seen == [("old", "new", tmp_path)]

    def test_permissions_follow_the_umask(self, tmp_path):
        path = atomic_write_text(tmp_path / "a.txt", "x")
        plain = tmp_path / "b.txt"
        plain.write_text("x")
        assert path.stat().st_mode == plain.stat().st_mode

    def test_types(self, tmp_path):
        with pytest.raises(TypeError, match="text: got bytes, expected a string"):
            atomic_write_text(tmp_path / "a", b"x")
        with pytest.raises(TypeError, match="data: got str, expected bytes"):
            atomic_write_bytes(tmp_path / "a", "x")
        assert not (tmp_path / "a").exists()


class TestHeatMap:
    def test_panels_show_the_matrices(self):
        figure = attention_heat_map(TASKS, training=TRAINING, testing=TESTING)
        first, second = figure.axes[:2]
        assert first.get_title() == "training"
        assert second.get_title() == "test, after the last task"
        shown = first.images[0].get_array()
        np.testing.assert_array_equal(shown.mask, np.isnan(TRAINING))
        np.testing.assert_array_equal(shown.compressed(), np.tril(TRAINING)[np.tril_indices(3)])
        np.testing.assert_array_equal(second.images[0].get_array(), TESTING)
        assert [tick.get_text() for tick in first.get_xticklabels()] == TASKS
        numbers = [text.get_text() for text in first.texts]
        assert numbers == ["1.00", "0.25", "0.75", "0.10", "0.20", "0.70"]
        assert {axis.images[0].get_clim() for axis in (first, second)} == {(0.0, 1.0)}

    def test_one_panel(self):
        figure = attention_heat_map(TASKS, testing=TESTING)
        assert [axis.get_title() for axis in figure.axes if axis.images] == [
            "test, after the last task"
        ]

    def test_many_tasks_carry_no_numbers(self):
        names = [f"a_task_with_a_very_long_name_{index}" for index in range(20)]
        figure = attention_heat_map(names, testing=np.eye(20))
        assert not figure.axes[0].texts
        assert all(len(tick.get_text()) <= 22 for tick in figure.axes[0].get_xticklabels())

    def test_png(self, tmp_path):
        from matplotlib.image import imread

        path = write_attention_heat_map(tmp_path / "x" / "map.png", TASKS, testing=TESTING)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        image = imread(path)[..., :3]
        assert image.shape[0] > 100
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20

    def test_pyplot_stays_out(self, tmp_path, monkeypatch):
        monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
        write_attention_heat_map(tmp_path / "map.png", TASKS, testing=TESTING)
        assert "matplotlib.pyplot" not in sys.modules

    @pytest.mark.parametrize(
        ("matrix", "message"),
        [
            ([[1.0]], r"testing: got shape \[1, 1\], expected \[3, 3\]"),
            ([["a"] * 3] * 3, "testing: expected a matrix of numbers"),
            ([[0.5, 0.5, 0.0], [0.5, 1.5, 0.0], [0.0] * 3], r"testing\[1\]\[1\]: got 1.5"),
            ([[0.5, math.inf, 0.0], [0.0] * 3, [0.0] * 3], r"testing\[0\]\[1\]: got inf"),
        ],
    )
    def test_bad_matrix(self, matrix, message):
        with pytest.raises(ValueError, match=message):
            attention_heat_map(TASKS, testing=matrix)

    def test_nothing_to_draw(self):
        with pytest.raises(ValueError, match="expected at least one matrix"):
            attention_heat_map(TASKS)


class TestTables:
    def test_rich(self):
        console = Console(width=200, file=io.StringIO(), color_system=None)
        console.print(results_table(TASKS, SCORES, ALONE, title="my [run]"))
        lines = console.file.getvalue().splitlines()
        assert "my [run]" in lines[0]
        header = next(line for line in lines if "after" in line)
        assert all(name in header for name in TASKS)
        (row,) = [line for line in lines if "75.00" in line]
        assert row.replace("│", " ").split() == ["copa|x", "75.00", "65.00", "-"]
        (last,) = [line for line in lines if "learned alone" in line]
        assert last.replace("│", " ").split()[2:] == ["78.00", "70.00", "84.00"]
        assert "AP 66.67  F.Ra 17.50  FWT 1.00  BWT -17.50" in console.file.getvalue()

    def test_markdown(self):
        text = results_markdown(TASKS, SCORES, title="Run")
        assert text.splitlines() == [
            "# Run",
            "",
            "| AP | F.Ra | FWT | BWT |",
            "| --- | --- | --- | --- |",
            "| 66.67 | 17.50 | - | -17.50 |",
            "",
            "Score on each task (column) after learning a task (row):",
            "",
            "| after | sst2 | copa\\|x | [qqp] |",
            "| --- | --- | --- | --- |",
            "| sst2 | 80.00 | - | - |",
            "| copa\\|x | 75.00 | 65.00 | - |",
            "| [qqp] | 60.00 | 50.00 | 90.00 |",
        ]

    @pytest.mark.parametrize("function", [results_table, results_markdown])
    @pytest.mark.parametrize("tasks", [["a"], "abc", []])
    def test_names_and_scores_do_not_fit(self, function, tasks):
        with pytest.raises(ValueError, match=r"tasks: got .*, expected 3 names"):
            function(tasks, SCORES)


class TestJson:
    def test_standard_json(self, tmp_path):
        data = {
            "a": [1, NAN, math.inf, None, True],
            "b": np.array([[1.5, NAN]]),
            "c": (np.int64(3), np.float32(0.5), tmp_path),
            "ü": {"d": "x"},
        }
        path = write_json(tmp_path / "x.json", data)
        assert json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == {
            "a": [1, None, None, None, True],
            "b": [[1.5, None]],
            "c": [3, 0.5, str(tmp_path)],
            "ü": {"d": "x"},
        }
        assert "ü" in path.read_text(encoding="utf-8")

    @pytest.mark.parametrize("data", [{1: 2}, {"a": object()}, {"a": {1, 2}}])
    def test_what_json_cannot_hold(self, tmp_path, data):
        with pytest.raises(TypeError):
            write_json(tmp_path / "x.json", data)
        assert not list(tmp_path.iterdir())


class TestReport:
    def test_whole_run(self, tmp_path):
        written = write_report(
            tmp_path / "run",
            TASKS,
            SCORES,
            ALONE,
            training_attention=TRAINING,
            testing_attention=TESTING,
            title="Run",
            extra={"seed": 3},
        )
        assert {kind: path.name for kind, path in written.items()} == {
            "attention": "attention.png",
            "markdown": "results.md",
            "json": "results.json",
        }
        content = json.loads(written["json"].read_text())
        assert content["scores"][0] == [80.0, None, None]
        assert content["metrics"]["F.Ra"] == 17.5
        assert content["metrics_released"]["FWT"] == pytest.approx(235 / 3 - 50.94)
        assert content["training_attention"][1] == [0.25, 0.75, None]
        assert (content["seed"], content["tasks"], content["alone"]) == (3, TASKS, ALONE)
        assert "(attention.png)" in written["markdown"].read_text()
        assert written["attention"].stat().st_size > 1000

    def test_without_attention(self, tmp_path):
        written = write_report(tmp_path, TASKS, SCORES)
        assert set(written) == {"markdown", "json"}
        assert "attention.png" not in written["markdown"].read_text()
        assert json.loads(written["json"].read_text())["metrics"]["FWT"] is None

    def test_bad_input_writes_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="extra: got scores, expected no keys of the report"):
            write_report(tmp_path, TASKS, SCORES, extra={"scores": 1})
        with pytest.raises(ValueError, match=r"tasks: got .*, expected 3 names"):
            write_report(tmp_path, ["a"], SCORES)
        with pytest.raises(ValueError, match="testing: got shape"):
            write_report(tmp_path, TASKS, SCORES, testing_attention=[[1.0]])
        assert not list(tmp_path.iterdir())
