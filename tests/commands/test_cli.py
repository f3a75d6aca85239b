"""The command line: help, doctor, bench, errors, and a run from raw files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_tasks import save_byte_model
from typer.testing import CliRunner

from sapt_fast import cli
from sapt_fast.commands.output import show
from sapt_fast.continual.settings import ContinualSettings
from sapt_fast.continual.strategies import STRATEGIES
from sapt_fast.methods.sapt import SaptConfig
from sapt_fast.version import __version__

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "CL_Benchmark"
TASKS = (
    "task1572_samsum_summary",
    "task363_sst2_polarity_classification",
    "task748_glucose_reverse_cause_event_detection",
)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fails(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["sapt-fast", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "command",
    ["train", "compare", "edit", "eval", "answer", "train-router", "demo", "bench", "doctor"],
)
def test_every_command_has_help(command: str) -> None:
    assert command in invoke("--help")
    assert "Usage" in invoke(command, "--help")


def test_the_version() -> None:
    assert invoke("--version") == f"sapt-fast {__version__}\n"


def test_train_offers_every_setting() -> None:
    parameters = {p.name for p in cli.typer.main.get_command(cli.app).commands["train"].params}
    # Released settings come with a preset; the rest is for Python.
    python_only = {
        "kl_per_micro_batch", "adapter", "query_hidden_dim", "query_init", "mask_padding",
        "grad_through_frozen", "top_k", "threshold", "reserve_tasks", "modules_to_save",
        "modules_per_task",
    }  # fmt: skip
    assert set(ContinualSettings.names()) - parameters <= python_only


def test_options_have_the_names_defaults_and_texts_of_their_fields() -> None:
    train = cli.typer.main.get_command(cli.app).commands["train"]
    options = {p.name: p for p in train.params}
    for kind in (ContinualSettings, SaptConfig):
        for field in fields(kind):
            option = options.get(field.name)
            if option is None or field.name in ("strategy_options", "generator", "target_modules"):
                continue
            assert option.default == field.default, field.name
            assert option.help == field.metadata["help"], field.name
    assert "--lr" in options["learning_rate"].opts
    assert all(name in options["strategy"].help for name in STRATEGIES)


def test_of_several_processes_the_first_one_prints(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for world, rank, printed in (("2", "0", "text\n"), ("2", "1", ""), ("1", "1", "text\n")):
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.setenv("RANK", rank)
        show("text")
        assert capsys.readouterr().out == printed


def test_start_up_imports_nothing_heavy() -> None:
    """Neither the help of the program nor that of `bench`; `train` needs no transformers."""
    code = """
import sys
from typer.testing import CliRunner
from sapt_fast.cli import app
for arguments in (["--help"], ["bench", "--help"], ["train", "--help"]):
    assert "Usage" in CliRunner().invoke(app, arguments, catch_exceptions=False).output
    print("torch" in sys.modules, "transformers" in sys.modules)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    lines = output.stdout.splitlines()
    assert lines[:2] == ["False False"] * 2, output.stderr
    assert lines[2].endswith(" False")


def test_doctor_names_backends_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("SAPT_FAST_BACKEND", raising=False)
    output = invoke("doctor")
    for text in (
        "torch",
        "transformers",
        "mixed_lora",
        "route",
        "reference",
        "has no cuda kernel",
    ):
        assert text in output
    monkeypatch.setenv("SAPT_FAST_BACKEND", "cuda")
    assert "backend 'cuda' cannot run op 'mixed_lora'" in invoke("doctor")


def test_bench_times_the_layer() -> None:
    sizes = ("--batch", "2", "--tokens", "3", "--inputs", "16", "--outputs", "24", "--tasks", "2")
    output = invoke("bench", *sizes, "--seconds", "0.01")
    assert output.count("base linear") == output.count("reference") == 2


def test_errors_are_one_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = ("train", "--model", "demo", "--output", str(tmp_path / "run"))
    real = (*train, "--data", str(DATA))
    for arguments, message in (
        (train, "data: benchmark 'superni' needs the folder"),
        ((*real, "--order", "1", "--tasks", "a"), "order: give --order or --tasks"),
        ((*real, "--preset", "t5"), "preset: got 't5', expected one of t5-superni"),
        ((*real, "--strategy", "magic"), "strategy: got 'magic'"),
        (
            (*real, "--strategy", "ewc", "--strategy-option", "lamda=1"),
            "got 'lamda', which 'ewc' does not have, expected among",
        ),
        (
            (*real, "--strategy", "ewc", "--strategy-option", "rows=x"),
            "ewc.rows: got 'x', expected a",
        ),
        (
            (*real, "--strategy", "lwf", "--strategy-option", "temperature=0"),
            "lwf.temperature: got",
        ),
        ((*real, "--strategy", "lfpt5"), "expected pseudo-samples for strategy 'lfpt5'"),
        (
            (*real, "--strategy", "olora", "--adapter", "prompt"),
            "adapter: got 'prompt', expected 'lora'",
        ),
        (
            (*real, "--strategy", "l2p", "--strategy-option", "top=11"),
            "l2p.top: got 11, expected 1 to 10",
        ),
        ((*real, "--tasks", "task363_sst2"), "no task 'task363_sst2'"),
        ((*real, "--tasks", f"{TASKS[0]},{TASKS[0]}"), f"got '{TASKS[0]}' more than once"),
        ((*real, "--r", "0"), "r: got 0, expected an integer, at least 1"),
        ((*real, "--dtype", "int8"), "dtype: got 'int8'"),
        ((*train, "--benchmark", "demo", "--tasks", "x"), "the demo has no ['x']"),
        (("eval", str(tmp_path)), "holds no finished run"),
        (("bench", "--rank", "0"), "rank: got 0"),
    ):
        assert message in fails(capsys, monkeypatch, *arguments)
    assert not (tmp_path / "run").exists()


def test_demo_model_on_demo_tasks_from_the_command_line(tmp_path: Path) -> None:
    common = (
        "train", "--model", "demo", "--benchmark", "demo", "--tasks", "last_first,max_min",
        "--steps", "2", "--max-target-length", "4", "--device", "cpu", "--no-progress",
        "--eval-batch-size", "128",
    )  # fmt: skip
    output = invoke(*common, "--output", str(tmp_path / "alone"), "--strategy", "single")
    assert "last_first: " in output
    alone = str(tmp_path / "alone" / "alone.json")
    invoke(*common, "--output", str(tmp_path / "run"), "--alone", alone, "--strategy", "seqlora")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["FWT"] is not None
    assert "largest deviation from results.json: 0" in invoke("eval", str(tmp_path / "run"))


def test_compare_from_the_command_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    common = (
        "compare", "--model", "demo", "--benchmark", "demo", "--order", "last_first,max_min",
        "--no-progress", "--output", str(tmp_path),
    )  # fmt: skip
    options = ("--strategies", "epi,far=ewc", "--set", "steps=2", "--set", "far.strength=7")
    output = invoke(*common, *options, "--no-fwt")
    assert "far" in output
    stored = json.loads((tmp_path / "compare.json").read_text())
    assert {c["row"]: c["settings"]["strategy_options"] for c in stored["cells"]} == {
        "epi": {"shrinkage": 0.1}, "far": {"strength": 7.0, "rows": 64},
    }  # fmt: skip
    assert {c["settings"]["steps"] for c in stored["cells"]} == {2}
    for arguments, message in (
        (("--strategies", "epi,magic"), "strategies: got 'magic', expected some of sapt"),
        (("--strategies", "epi", "--set", "steps"), "set: got 'steps', expected NAME=VALUE"),
        (("--seeds", "0,x"), "seeds: got '0,x'"),
        (("--order", "max_min,max_min"), "order: got 'max_min' more than once"),
        (("--strategies", "epi", "--set", "steps=3"), "different settings: steps was 2, now 3"),
    ):
        assert message in fails(capsys, monkeypatch, *common, *arguments)


def test_real_tasks_killed_resumed_and_evaluated(tmp_path: Path) -> None:
    save_byte_model(tmp_path / "model")

    def arguments(folder: str) -> list[str]:
        return [
            "train", "--model", str(tmp_path / "model"), "--data", str(DATA),
            "--tasks", ",".join(TASKS), "--output", str(tmp_path / folder),
            "--steps", "16", "--save-steps", "4", "--batch-size", "2", "--accumulation", "2",
            "--max-source-length", "48", "--max-target-length", "6", "--max-eval", "3",
            "--lr", "1e-3", "--replay-share", "0.2", "--device", "cpu", "--no-progress",
        ]  # fmt: skip

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-m", "sapt_fast.cli", *arguments("killed")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    training = tmp_path / "killed" / "training" / f"2-{TASKS[1]}"
    while process.poll() is None and not list(training.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error.decode()
    assert len(json.loads((tmp_path / "killed" / "state.json").read_text())["scores"]) == 1
    assert not (tmp_path / "killed" / "results.json").exists()

    output = invoke(*arguments("killed"))
    assert "AP" in output
    invoke(*arguments("whole"))
    for name in ("results.json", "results.md", "attention.png"):
        assert (tmp_path / "killed" / name).stat().st_size > 0
    last = Path("checkpoints", f"3-{TASKS[2]}")
    files = [
        path.relative_to(tmp_path / "whole")
        for path in (tmp_path / "whole" / last).rglob("*.safetensors")
    ]
    assert len(files) == 4
    for file in files:
        killed, whole = tmp_path / "killed" / file, tmp_path / "whole" / file
        assert killed.read_bytes() == whole.read_bytes(), file
    results = [
        json.loads((tmp_path / folder / "results.json").read_text())
        for folder in ("killed", "whole")
    ]
    for name in ("scores", "metrics", "training_attention", "testing_attention"):
        assert results[0][name] == results[1][name]
    assert results[0]["metric"] == ["rouge_l"]
    assert "largest deviation from results.json: 0" in invoke(
        "eval", str(tmp_path / "killed"), "--no-progress"
    )


def test_options_on_the_command_line_override_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sapt_fast.commands import train as runs

    seen = {}

    def train(source, settings, output, **options):
        seen.update(source=source, settings=settings, output=output)
        raise ValueError("seen")

    monkeypatch.setattr(runs, "train", train)
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "model: demo\nbenchmark: demo\norder: superni-1\nlearning-rate: 2e-3\nsteps: 7\n"
        "preset: t5-superni\ngenerator: {steps: 9, answers: true}\nbf16: false\n"
    )
    given = ("train", "--config", str(config), "--output", str(tmp_path / "run"))
    assert "seen" in fails(capsys, monkeypatch, *given, "--steps", "5", "--tasks", "max_min")
    settings = seen["settings"]
    assert (seen["source"].model, seen["source"].tasks) == ("demo", "max_min")
    assert (settings.steps, settings.learning_rate, settings.sapt.r) == (5, 2e-3, 4)
    assert (settings.generator.steps, settings.generator.answers) == (9, True)
    assert not settings.bf16
    assert "seen" in fails(capsys, monkeypatch, *given)
    assert seen["source"].tasks == "superni-1"
    for text, message in (
        ("stepz: 3\n", "has unknown options ['stepz']"),
        ("- 3\n", "holds list, expected options by name"),
        ("a: [\n", "is no YAML"),
    ):
        config.write_text(text)
        assert message in fails(capsys, monkeypatch, *given)
    config.unlink()
    assert "does not exist" in fails(capsys, monkeypatch, *given)
