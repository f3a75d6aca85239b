"""Saved prompts: they come back equal, load in PEFT, and refuse to be anything else."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import WIDTH, token_ids
from tiny_prompts import LENGTH, bare, prompt_settings, prompted

import sapt_fast
from sapt_fast.storage import prompt

FAMILIES = ("t5", "bart", "llama", "gpt2")


@torch.no_grad()
def logits(model, **given):
    ids = token_ids()
    inputs = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, **given).logits


def peft_logits(family, folder):
    """Of the bare model with the folder's prompt, at the positions of the tokens."""
    model = PeftModel.from_pretrained(bare(family), folder).eval()
    found = logits(model)
    return found if model.config.is_encoder_decoder else found[:, LENGTH:]


@pytest.fixture
def saved(request, tmp_path):
    family = getattr(request, "param", "llama")
    model = prompted(family)
    model.sapt.targets["task1"] = torch.tensor([0.25, 0.75])
    model.sapt.save_pretrained(tmp_path / "saved")
    return family, model, tmp_path / "saved"


@pytest.mark.parametrize("saved", FAMILIES, indirect=True)
def test_everything_comes_back(saved):
    family, model, folder = saved
    again = sapt_fast.load_pretrained(bare(family), folder)
    assert again.sapt.tasks == model.sapt.tasks
    assert again.sapt.config == model.sapt.config
    assert again.sapt.targets["task1"].tolist() == [0.25, 0.75]
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    flags = {name: p.requires_grad for name, p in again.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(logits(again), logits(model))
    again.sapt.add_task("next")
    assert len(again.sapt.prompts) == 4


@pytest.mark.parametrize("saved", FAMILIES, indirect=True)
def test_peft_loads_every_task(saved):
    family, model, folder = saved
    for index, name in enumerate(model.sapt.tasks):
        expected = logits(model, mixture=torch.eye(3)[index])
        torch.testing.assert_close(
            peft_logits(family, folder / name), expected, atol=1e-5, rtol=1e-4
        )
        assert load_file(folder / name / "adapter_model.safetensors").keys() == {
            "prompt_embeddings"
        }


@pytest.mark.parametrize("saved", FAMILIES, indirect=True)
def test_an_exported_mixture_in_peft(saved):
    family, model, folder = saved
    weights = torch.tensor([0.5, -0.25, 0.75])
    model.sapt.export_adapter(weights, folder.parent / "mixture")
    expected = logits(model, mixture=weights)
    got = peft_logits(family, folder.parent / "mixture")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="weights: got"):
        model.sapt.export_adapter(weights[:2], folder.parent / "mixture")


def test_an_inner_model_without_a_head(tmp_path):
    model = prompted(bare("llama").model)
    model.sapt.save_pretrained(tmp_path)
    again = sapt_fast.load_pretrained(bare("llama").model, tmp_path)
    ids = token_ids()
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


def test_into_a_patched_model_without_tasks_and_another_dtype(saved):
    family, model, folder = saved
    again = sapt_fast.patch(bare(family).to(torch.bfloat16), prompt_settings())
    handle = again.sapt
    assert sapt_fast.load_pretrained(again, folder).sapt is handle
    rows = handle.prompts.rows.rows()
    assert torch.equal(rows, model.sapt.prompts.rows.rows().to(torch.bfloat16))


def test_saving_again_replaces_the_whole(saved):
    family, model, folder = saved
    (folder / "notes.txt").write_text("mine")
    model.sapt.add_task("task3")
    model.sapt.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *(f"task{k}" for k in range(4)), "router.safetensors", "sapt_config.json", "README.md",
        "notes.txt",
    }  # fmt: skip
    assert torch.equal(logits(sapt_fast.load_pretrained(bare(family), folder)), logits(model))


def test_a_save_that_fails_leaves_the_old(saved, monkeypatch):
    family, model, folder = saved
    before, own, written = logits(model), prompt.write_prompt, []

    def fails(path, *args):
        if written:
            raise OSError("disk full")
        written.append(path)
        own(path, *args)

    monkeypatch.setattr(prompt, "write_prompt", fails)
    with torch.no_grad():
        model.sapt.prompts.rows.rows().zero_()
    with pytest.raises(OSError, match="disk full"):
        model.sapt.save_pretrained(folder)
    assert torch.equal(logits(sapt_fast.load_pretrained(bare(family), folder)), before)


def _shorten(folder):
    path = folder / "task1" / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.zeros(LENGTH - 1, WIDTH)}, path)


def _edit(folder, change):
    path = folder / "sapt_config.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


DAMAGES = {
    "shape": (_shorten, ValueError, "prompt_embeddings: got torch.float32 of shape"),
    "length": (
        lambda f: _edit(f, lambda d: d["config"].update(prompt_length=7)),
        ValueError,
        "prompt_embeddings: got torch.float32 of shape",
    ),
    "rank": (
        lambda f: _edit(f, lambda d: d["tasks"][0].update(rank=3)),
        ValueError,
        "tasks: expected a list of objects with",
    ),
    "missing": (
        lambda f: (f / "task2" / "adapter_model.safetensors").unlink(),
        FileNotFoundError,
        "adapter_model.safetensors is missing",
    ),
    "config": (
        lambda f: (f / "task2" / "adapter_config.json").unlink(),
        FileNotFoundError,
        "adapter_config.json is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_change_nothing(saved, damage):
    family, _, folder = saved
    do, kind, message = DAMAGES[damage]
    do(folder)
    model = bare(family)
    with pytest.raises(kind, match=message):
        sapt_fast.load_pretrained(model, folder)
    assert not hasattr(model, "sapt")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("other", ["weights", "type", "lora"])
def test_another_base_or_another_kind_of_adapter_is_refused(saved, other):
    _, _, folder = saved
    if other == "lora":
        model = sapt_fast.patch(bare("llama"), sapt_fast.SaptConfig())
        message = "another config than .* adapter"
    else:
        model = bare("llama", seed=1) if other == "weights" else bare("qwen2")
        message = "another base model"
    with pytest.raises(ValueError, match=message):
        sapt_fast.load_pretrained(model, folder)
    assert not getattr(getattr(model, "sapt", None), "tasks", [])


def test_released_checkpoints_have_no_prompts():
    run = "tests/data/oracle/t5/task0/saved_weights"
    with pytest.raises(ValueError, match="config: got adapter='prompt'"):
        sapt_fast.load_official(bare("t5"), [run], prompt_settings())
