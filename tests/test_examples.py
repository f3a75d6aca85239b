"""The example scripts run, and come to the same with and without sapt_fast's two lines."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gloo_processes import free_port
from safetensors.torch import load_file
from tiny_tasks import save_byte_model

import sapt_fast

FOLDER = Path(__file__).parents[1] / "examples"
MARK = "  # sapt_fast"
SCRIPTS = {"seq2seq_trainer": "t5", "causal_sft": "llama", "accelerate_loop": "bert"}
ADAPTERS = {
    "seq2seq_trainer": ["new"],
    "causal_sft": ["attention", "everywhere"],
    "accelerate_loop": ["lora0", "lora1", "lora2"],
}


def source(name: str, version: str) -> str:
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    return "\n".join(line for line in lines if version == "after" or not line.endswith(MARK))


def load(name: str, version: str) -> dict:
    script = {"__name__": name, "__file__": str(FOLDER / f"{name}.py")}
    exec(compile(source(name, version), f"{name}, {version}", "exec"), script)
    return script


@pytest.fixture
def patched(monkeypatch):
    """The models that `sapt_fast.patch` was called on."""
    models = []
    patch = sapt_fast.patch

    def noted(model):
        models.append(patch(model))
        return models[-1]

    monkeypatch.setattr(sapt_fast, "patch", noted)
    return models


@pytest.fixture
def run(tmp_path, capsys, patched):
    """Runs one version of a script on a tiny model; gives what it prints, in lines."""
    model = tmp_path / "model"

    def run(name, version, *arguments):
        if not model.exists():
            labels = {"num_labels": 2} if SCRIPTS[name] == "bert" else {}
            save_byte_model(model, SCRIPTS[name], torch.float64, **labels)
        patched.clear()
        script = load(name, version)
        options = ["--model", model, "--output", tmp_path / version, *arguments]
        script["main"]([str(option) for option in options])
        assert [len(m.sapt.report.patched) > 0 for m in patched] == [True] * (version == "after")
        return capsys.readouterr().out.splitlines()

    return run


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_marked_lines_are_all_that_sapt_fast_takes(name):
    before, after = (source(name, version).splitlines() for version in ("before", "after"))
    marked = [line.strip() for line in after if line.endswith(MARK)]
    assert marked == [f"import sapt_fast{MARK}", f"model = sapt_fast.patch(model){MARK}"]
    code = "\n".join(before).split('"""', 2)[2]
    assert "sapt_fast" not in code


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_versions_train_the_same_adapters(name, run, tmp_path):
    printed = [run(name, version, "--epochs", 2) for version in ("before", "after")]
    for names in ADAPTERS[name]:
        first, second = (adapter(tmp_path / version / names) for version in ("before", "after"))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert tensor.any(), f"{key} has not been trained"
            torch.testing.assert_close(second[key], tensor, rtol=1e-6, atol=1e-9)
    last = [[line for line in lines if "held-out rows" in line] for lines in printed]
    assert last[0] == last[1] != []


def test_an_earlier_adapter_stays_as_it_is_and_counts(run, tmp_path):
    common = ("--epochs", 1, "--learning-rate", 0.05)
    for version in ("before", "after"):
        first = tmp_path / version / "first"
        run("seq2seq_trainer", version, "--name", "first", *common)
        kept = adapter(first)
        run("seq2seq_trainer", version, "--name", "alone", *common)
        run("seq2seq_trainer", version, "--name", "second", "--earlier", first, *common)
        assert all(torch.equal(tensor, kept[key]) for key, tensor in adapter(first).items())
    second = [adapter(tmp_path / version / "second") for version in ("before", "after")]
    alone = adapter(tmp_path / "after" / "alone")
    for key, tensor in second[0].items():
        torch.testing.assert_close(second[1][key], tensor, rtol=1e-6, atol=1e-9)
        assert not torch.allclose(tensor, alone[key], rtol=1e-3)


def accelerate_launch(config: str, *options: str) -> list:
    """To be followed by a port and the script."""
    return [
        "accelerate.commands.launch", "--config_file", FOLDER / "configs" / config, *options,
        "--mixed_precision", "no", "--num_processes", 2, "--main_process_port",
    ]  # fmt: skip


LAUNCHERS = {
    "accelerate": accelerate_launch("ddp.yaml"),
    # Of itself accelerate takes BERT's embeddings too, which it then shards once more.
    "fsdp2": accelerate_launch("fsdp2.yaml", "--fsdp_transformer_layer_cls_to_wrap", "BertLayer"),
    "zero2": accelerate_launch("zero2.yaml"),
    "zero3": accelerate_launch("zero3.yaml"),
    "torchrun": ["torch.distributed.run", "--nproc_per_node", 2, "--master_port"],
}


@pytest.mark.parametrize(
    "launcher",
    [
        # Both of these start DDP, which tests/distributed runs.
        pytest.param(name, marks=[pytest.mark.thorough] * (name in ("accelerate", "torchrun")))
        for name in LAUNCHERS
    ],
)
def test_two_processes_train_what_one_does(launcher, run, tmp_path):
    """Each takes half of all rows in every step; the guide's ways to start them on a CPU.

    There accelerate shards nothing by itself: cpu_accelerate.py has it take the CPU for a GPU.
    """
    if launcher.startswith("zero"):
        pytest.importorskip("deepspeed")
    common = ("--epochs", 3)
    run("accelerate_loop", "after", *common, "--batch-size", 32)
    shards = launcher in ("fsdp2", "zero2", "zero3")
    script = [Path(__file__).parent / "cpu_accelerate.py"] * shards + [
        FOLDER / "accelerate_loop.py"
    ]
    command = [
        sys.executable, "-m", *LAUNCHERS[launcher], free_port(), *script,
        "--model", tmp_path / "model", "--output", tmp_path / "two", *common, "--batch-size", 16,
    ]  # fmt: skip
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": str(not shards).lower(), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), *sys.path]),
    }  # fmt: skip
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr
    assert done.stdout.count("held-out rows") == 1
    for name in ADAPTERS["accelerate_loop"]:
        one, two = (adapter(tmp_path / folder / name) for folder in ("after", "two"))
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_option(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        load(name, "after")["parse"](["--help"])
    text = capsys.readouterr().out
    options = re.findall(r'"(--[a-z-]+)"', source(name, "after"))
    assert len(options) > 5
    assert all(option in text for option in options)
