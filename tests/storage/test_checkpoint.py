"""Saved folders: they come back equal, load in PEFT, and survive whatever stops a save."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import patched, settings, tiny, token_ids

import sapt_fast

FAMILIES = ("t5", "llama", "gpt2", "bert")


def logits(model):
    ids = token_ids()
    inputs = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits.float()


def with_targets(model):
    for index, name in enumerate(model.sapt.tasks):
        model.sapt.targets[name] = torch.softmax(torch.arange(index + 1.0), 0)
    return model


def add_mixed_ranks(model, name="mixed", seed=3):
    """A task with another rank and scaling in every layer, none at all in the first."""
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for index, (path, pool) in enumerate(model.sapt.pools.items()):
        a, b = (torch.randn(index, s.width, generator=generator) * 0.3 for s in (pool.a, pool.b))
        adapters[path] = (a, b, 0.5 + index)
    with torch.no_grad():
        model.sapt.restore_task(name, adapters, torch.randn(pool.a.width, generator=generator))
    return model


@pytest.fixture
def saved(tmp_path):
    """(a patched T5 with three tasks, where it is saved)."""
    model = with_targets(patched("t5"))
    model.sapt.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


class TestRoundTrip:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_everything_comes_back(self, family, tmp_path):
        model = with_targets(add_mixed_ranks(patched(family, tasks=2)))
        model.sapt.save_pretrained(tmp_path / "saved")
        again = sapt_fast.load_pretrained(tiny(family), tmp_path / "saved")
        assert again.sapt.tasks == ["task0", "task1", "mixed"]
        assert again.sapt.config == model.sapt.config
        assert again.sapt.targets.keys() == model.sapt.targets.keys()
        for name, target in model.sapt.targets.items():
            assert torch.equal(again.sapt.targets[name], target)
        for path, pool in model.sapt.pools.items():
            assert again.sapt.pools[path].ranks == pool.ranks
            assert again.sapt.pools[path].scaling == pool.scaling
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        assert torch.equal(logits(again), logits(model))

    def test_last_task_trains_as_after_training_it(self, saved):
        model, folder = saved
        again = sapt_fast.load_pretrained(tiny("t5"), folder)
        flags = {name: p.requires_grad for name, p in again.named_parameters()}
        assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
        again.sapt.add_task("next")
        assert again.sapt.tasks[-1] == "next"

    def test_bfloat16_and_a_base_of_another_dtype(self, tmp_path):
        model = patched("llama").to(torch.bfloat16)
        model.sapt.save_pretrained(tmp_path)
        half = sapt_fast.load_pretrained(tiny("llama").to(torch.bfloat16), tmp_path)
        assert torch.equal(logits(half), logits(model))
        full = sapt_fast.load_pretrained(tiny("llama"), tmp_path)
        a, _ = full.sapt.pools[full.sapt.report.patched[0]].adapter(1)
        b, _ = model.sapt.pools[full.sapt.report.patched[0]].adapter(1)
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())

    def test_patched_model_without_tasks(self, saved):
        model, folder = saved
        again = sapt_fast.patch(tiny("t5"), deepcopy(model.sapt.config))
        handle = again.sapt
        assert sapt_fast.load_pretrained(again, folder).sapt is handle
        assert torch.equal(logits(again), logits(model))

    def test_standardized_query_and_layers_by_tuple(self, tmp_path):
        changed = {"standardize_query": True, "target_modules": ("q", "o"), "top_k": 2}
        model = patched("t5", **changed)
        model.sapt.save_pretrained(tmp_path)
        again = sapt_fast.load_pretrained(tiny("t5"), tmp_path)
        assert torch.equal(logits(again), logits(model))
        third = sapt_fast.patch(tiny("t5"), settings(**changed))
        assert torch.equal(logits(sapt_fast.load_pretrained(third, tmp_path)), logits(model))

    def test_saving_twice_gives_the_same_bytes(self, saved):
        model, folder = saved
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        model.sapt.save_pretrained(folder)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


class TestPeft:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_each_task_loads_as_it_is(self, family, tmp_path):
        model = add_mixed_ranks(patched(family, tasks=2))
        model.sapt.save_pretrained(tmp_path)
        for index, name in enumerate(model.sapt.tasks):
            alone = PeftModel.from_pretrained(tiny(family), tmp_path / name)
            with model.sapt.fixed(torch.eye(3)[index]):
                expected = logits(model)
            torch.testing.assert_close(logits(alone), expected, rtol=1e-5, atol=2e-5)

    def test_bfloat16(self, tmp_path):
        model = patched("t5").to(torch.bfloat16)
        model.sapt.save_pretrained(tmp_path)
        alone = PeftModel.from_pretrained(tiny("t5").to(torch.bfloat16), tmp_path / "task1")
        with model.sapt.fixed(torch.eye(3)[1]):
            expected = logits(model)
        deviation = (logits(alone) - expected).norm() / expected.norm()
        assert deviation < 0.02

    def test_layout(self, saved):
        _, folder = saved
        assert sorted(os.listdir(folder)) == [
            "README.md", "router.safetensors", "sapt_config.json", "task0", "task1", "task2",
        ]  # fmt: skip
        tensors = load_file(folder / "task0" / "adapter_model.safetensors")
        stem = "base_model.model.encoder.block.0.layer.0.SelfAttention.q"
        assert tensors[f"{stem}.lora_A.weight"].shape == (4, 32)
        assert tensors[f"{stem}.lora_B.weight"].shape == (32, 4)
        config = json.loads((folder / "task0" / "adapter_config.json").read_text())
        assert config["target_modules"] == ["q", "v"]
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 8, {})
        assert config["task_type"] == "SEQ_2_SEQ_LM"

    def test_layers_that_share_their_last_name_with_others_are_named_in_full(self, tmp_path):
        model = patched("llama", target_modules=r"model\.layers\.1\.self_attn\.q_proj")
        model.sapt.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "task0" / "adapter_config.json").read_text())
        assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]


class TestExport:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_static_mixture_in_peft(self, family, tmp_path):
        model = add_mixed_ranks(patched(family, tasks=2))
        weights = torch.tensor([0.2, -0.5, 1.1])
        model.sapt.export_adapter(weights, tmp_path / "mix")
        static = PeftModel.from_pretrained(tiny(family), tmp_path / "mix")
        # In float64, but T5 keeps its norms and softmax in float32.
        with model.double().sapt.fixed(weights.double()):
            expected = logits(model)
        torch.testing.assert_close(logits(static.double()), expected, rtol=1e-5, atol=1e-4)

    def test_replaces_its_own_and_nothing_else(self, saved, tmp_path):
        model, folder = saved
        target = tmp_path / "mix"
        model.sapt.export_adapter([0.5, 0.5, 0.0], target)
        (target / "notes.txt").write_text("mine")
        model.sapt.export_adapter([0.0, 0.5, 0.5], target)
        assert (target / "notes.txt").read_text() == "mine"
        before = (folder / "task0" / "adapter_model.safetensors").read_bytes()
        with pytest.raises(FileExistsError, match="adapter_"):
            model.sapt.export_adapter([0.0, 0.5, 0.5], folder / "task0")
        assert (folder / "task0" / "adapter_model.safetensors").read_bytes() == before

    @pytest.mark.parametrize(
        "weights",
        [
            torch.tensor([0.5, 0.5]),
            torch.tensor([0.5, float("nan"), 0.5]),
            torch.tensor([0.5, float("inf"), 0.5]),
            torch.ones(1, 3),
            torch.tensor([0, 1, 0]),
        ],
        ids=["short", "nan", "inf", "batch", "integer"],
    )
    def test_bad_weights(self, weights, saved, tmp_path):
        with pytest.raises(ValueError, match="weights: got"):
            saved[0].sapt.export_adapter(weights, tmp_path / "mix")
        assert not (tmp_path / "mix").exists()


class TestFilesOfOthers:
    def test_they_stay(self, saved):
        model, folder = saved
        (folder / "README.md").write_text("card")
        (folder / "task0" / "README.md").write_text("card 0")
        (folder / "checkpoint-1" / "empty").mkdir(parents=True)
        (folder / "checkpoint-1" / "optimizer.pt").write_bytes(b"x")
        (folder / "link").symlink_to("task0")
        model.sapt.add_task("task3")
        model.sapt.save_pretrained(folder)
        assert (folder / "README.md").read_text() == "card"
        assert (folder / "task0" / "README.md").read_text() == "card 0"
        assert (folder / "checkpoint-1" / "optimizer.pt").read_bytes() == b"x"
        assert (folder / "checkpoint-1" / "empty").is_dir()
        assert (folder / "link").is_symlink()
        assert len(sapt_fast.load_pretrained(tiny("t5"), folder).sapt.tasks) == 4

    def test_folders_of_tasks_that_are_gone_go(self, saved):
        _, folder = saved
        fewer = patched("t5", tasks=1)
        fewer.sapt.save_pretrained(folder)
        assert sorted(os.listdir(folder)) == [
            "README.md", "router.safetensors", "sapt_config.json", "task0",
        ]  # fmt: skip

    def test_one_in_the_way(self, tmp_path):
        adapter = tmp_path / "run" / "task0" / "adapter_model.safetensors"
        adapter.parent.mkdir(parents=True)
        adapter.write_bytes(b"mine")
        with pytest.raises(FileExistsError, match="adapter_model"):
            patched("t5").sapt.save_pretrained(tmp_path / "run")
        assert sorted(p.name for p in tmp_path.rglob("*")) == [
            "adapter_model.safetensors",
            "run",
            "task0",
        ]
        assert adapter.read_bytes() == b"mine"

    def test_folders_that_cannot_be_replaced(self, tmp_path, monkeypatch):
        model = patched("t5")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        for folder in (".", "..", "/"):
            with pytest.raises(ValueError, match="cannot be replaced"):
                model.sapt.save_pretrained(folder)
        (tmp_path / "file").write_text("")
        with pytest.raises(NotADirectoryError):
            model.sapt.save_pretrained(tmp_path / "file")

    def test_symbolic_link_is_followed(self, saved, tmp_path):
        model, folder = saved
        (tmp_path / "latest").symlink_to(folder)
        model.sapt.add_task("task3")
        model.sapt.save_pretrained(tmp_path / "latest")
        assert (tmp_path / "latest").is_symlink()
        assert (folder / "task3").is_dir()


class TestInterrupted:
    @pytest.mark.parametrize("call", [1, 2])
    def test_failing_rename_leaves_the_old_folder(self, call, saved, monkeypatch):
        model, folder = saved
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        model.sapt.add_task("task3")
        rename, calls = os.rename, []

        def failing(*paths):
            calls.append(paths)
            if len(calls) == call:
                raise OSError("no")
            rename(*paths)

        monkeypatch.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="no"):
            model.sapt.save_pretrained(folder)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        assert os.listdir(folder.parent) == ["saved"]

    def test_folder_made_anew_before_the_next_save(self, saved):
        """Killed between the renames; then another program creates the folder."""
        model, folder = saved
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "optimizer.pt").write_bytes(b"x")
        folder.rename(folder.with_name(".saved.previous"))
        folder.mkdir()
        (folder / "log.txt").write_text("new")
        assert len(sapt_fast.load_pretrained(tiny("t5"), folder).sapt.tasks) == 3
        model.sapt.save_pretrained(folder)
        assert (folder / "checkpoint-1" / "optimizer.pt").read_bytes() == b"x"
        assert (folder / "log.txt").read_text() == "new"
        assert os.listdir(folder.parent) == ["saved"]

    def test_killed_anywhere(self, tmp_path):
        """SIGKILL before each file system call of a save; a second one afterwards succeeds."""
        run = subprocess.run(
            [sys.executable, str(Path(__file__).parents[1] / "killed_save.py"), str(tmp_path)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        report = json.loads(run.stdout)
        assert report["killed"] >= 15
        assert report["old"] >= 10
        assert report["new"] >= 1
        assert report["previous"] == 1  # between the renames
