"""Saved folders that are spoiled or do not fit: each is refused, and the model stays as it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import patched, settings, tiny

import sapt_fast


@pytest.fixture
def saved(tmp_path):
    """(a patched T5 with three tasks, where it is saved)."""
    model = patched("t5")
    model.sapt.targets["task1"] = torch.tensor([0.25, 0.75])
    model.sapt.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def state(model):
    """A copy of everything of a model that could change."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    tasks = list(model.sapt.tasks) if hasattr(model, "sapt") else None
    return tensors, flags, kinds, tasks


def assert_unchanged(model, before):
    after = state(model)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())


def edit_json(folder, change):
    description = json.loads((folder / "sapt_config.json").read_text())
    change(description)
    (folder / "sapt_config.json").write_text(json.dumps(description))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path)


def truncate(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def first_entry(tensors):
    return next(iter(sorted(tensors)))


ADAPTER = "task1/adapter_model.safetensors"
SPOILED = {
    "no folder": (shutil.rmtree, FileNotFoundError, "saved is missing"),
    "no config": (
        lambda d: (d / "sapt_config.json").unlink(), FileNotFoundError, "sapt_config.json is"
    ),
    "no router": (
        lambda d: (d / "router.safetensors").unlink(), FileNotFoundError, "router.safetensors is"
    ),
    "no task folder": (lambda d: shutil.rmtree(d / "task1"), FileNotFoundError, "task1"),
    "no adapter weights": (lambda d: (d / ADAPTER).unlink(), FileNotFoundError, "adapter_model"),
    "no adapter config": (
        lambda d: (d / "task1/adapter_config.json").unlink(), FileNotFoundError, "adapter_config"
    ),
    "truncated adapter": (lambda d: truncate(d / ADAPTER), ValueError, "truncated"),
    "truncated header": (lambda d: truncate(d / ADAPTER, 0.001), ValueError, "truncated"),
    "truncated router": (lambda d: truncate(d / "router.safetensors"), ValueError, "truncated"),
    "truncated config": (lambda d: truncate(d / "sapt_config.json"), ValueError, "truncated"),
    "config is a list": (
        lambda d: (d / "sapt_config.json").write_text("[]"), ValueError, "format_version: got None"
    ),
    "newer format": (
        lambda d: edit_json(d, lambda x: x.update(format_version=2)), ValueError, "version: got 2"
    ),
    "unknown field": (lambda d: edit_json(d, lambda x: x.update(extra=1)), ValueError, "extra"),
    "unknown setting": (
        lambda d: edit_json(d, lambda x: x["config"].update(rank=1)), ValueError, "unknown fields"
    ),
    "setting of a wrong type": (
        lambda d: edit_json(d, lambda x: x["config"].update(r="four")), ValueError, "config: "
    ),
    "setting out of range": (
        lambda d: edit_json(d, lambda x: x["config"].update(pooling="sum")), ValueError, "pooling"
    ),
    "other layers": (
        lambda d: edit_json(d, lambda x: x["config"].update(target_modules=["q"])),
        ValueError, "another base model",
    ),
    "no tasks": (lambda d: edit_json(d, lambda x: x.update(tasks=[])), ValueError, "got none"),
    "a task too few": (
        lambda d: edit_json(d, lambda x: x["tasks"].pop()),
        ValueError, r"router\.safetensors, router: keys: got",
    ),
    "a task twice": (
        lambda d: edit_json(d, lambda x: x["tasks"].append(x["tasks"][0])), ValueError, "twice"
    ),
    "task outside the folder": (
        lambda d: edit_json(d, lambda x: x["tasks"][0].update(name="../x")), ValueError, "a folder"
    ),
    "task renamed": (
        lambda d: edit_json(d, lambda x: x["tasks"][1].update(name="task9")),
        FileNotFoundError, "task9",
    ),
    "wrong rank": (
        lambda d: edit_json(d, lambda x: x["tasks"][1].update(rank=8)), ValueError, "shape"
    ),
    "rank of a wrong type": (
        lambda d: edit_json(d, lambda x: x["tasks"][1].update(rank=-1)), ValueError, "rank: got -1"
    ),
    "scaling of a wrong type": (
        lambda d: edit_json(d, lambda x: x["tasks"][1].update(scaling="big")), ValueError, "scaling"
    ),
    "scaling for other layers": (
        lambda d: edit_json(d, lambda x: x["tasks"][1].update(scaling={"x": 1.0})),
        ValueError, "scaling",
    ),
    "adapter that is no name": (
        lambda d: edit_json(d, lambda x: x["config"].update(adapter=[])),
        ValueError, r"config.json: config: adapter: got \[\]",
    ),
    "half a character": (
        lambda d: edit_json(d, lambda x: x["base_model"].update({"class": "\ud800"})),
        ValueError, "config.json: not JSON .*surrogates not allowed",
    ),
    "no base model": (
        lambda d: edit_json(d, lambda x: x.update(base_model={})), ValueError, "base_model"
    ),
    "base model without weights": (
        lambda d: edit_json(d, lambda x: x["base_model"].pop("weights")), ValueError, "incomplete"
    ),
    "adapter entry missing": (
        lambda d: edit_tensors(d / ADAPTER, lambda t: t.pop(first_entry(t))), ValueError, "missing"
    ),
    "adapter entry unknown": (
        lambda d: edit_tensors(d / ADAPTER, lambda t: t.update(other=torch.ones(2))),
        ValueError, "other not expected",
    ),
    "adapter entry of a wrong shape": (
        lambda d: edit_tensors(d / ADAPTER, lambda t: t.update({first_entry(t): torch.ones(5, 5)})),
        ValueError, "expected floats of shape",
    ),
    "adapter of integers": (
        lambda d: edit_tensors(
            d / ADAPTER, lambda t: t.update({first_entry(t): t[first_entry(t)].int()})
        ),
        ValueError, "torch.int32",
    ),
    "router entry missing": (
        lambda d: edit_tensors(d / "router.safetensors", lambda t: t.pop("up.weight")),
        ValueError, r"router\.safetensors, router: up.weight missing",
    ),
    "keys missing": (
        lambda d: edit_tensors(d / "router.safetensors", lambda t: t.pop("keys")),
        ValueError, r"router\.safetensors, router: keys: got",
    ),
    "target of a wrong length": (
        lambda d: edit_tensors(
            d / "router.safetensors", lambda t: t.update({"targets.task1": torch.ones(3)})
        ),
        ValueError, r"router\.safetensors, targets: 'task1'",
    ),
    "target of an unknown task": (
        lambda d: edit_tensors(
            d / "router.safetensors", lambda t: t.update({"targets.task7": torch.ones(3)})
        ),
        ValueError, "task7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("is_patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_folder(name, is_patched, saved):
    spoil, error, message = SPOILED[name]
    spoil(saved[1])
    model = tiny("t5")
    if is_patched:
        sapt_fast.patch(model, settings())
        if "setting" in name or name == "other layers":
            error, message = ValueError, None
    before = state(model)
    with pytest.raises(error, match=message):
        sapt_fast.load_pretrained(model, saved[1])
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny("llama"), "model type is llama"),
        (lambda: tiny("t5", seed=1), "same shape but other values"),
        (lambda: tiny("t5", d_model=40), "features of layer"),
        (lambda: tiny("t5", num_layers=3), "features of layer"),
        (lambda: tiny("t5", vocab_size=98), "shape of input embedding: got"),
    ],
    ids=["type", "values", "width", "depth", "vocabulary"],
)
def test_another_base_model(model, message, saved):
    model = model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        sapt_fast.load_pretrained(model, saved[1])
    assert_unchanged(model, before)


def test_model_with_tasks(saved):
    model, folder = saved
    before = state(model)
    with pytest.raises(ValueError, match="got one with tasks"):
        sapt_fast.load_pretrained(model, folder)
    assert_unchanged(model, before)


def test_model_with_another_config(saved):
    model = sapt_fast.patch(tiny("t5"), settings(temperature=2.0))
    with pytest.raises(ValueError, match=r"temperature: got 2.0, expected 1.5"):
        sapt_fast.load_pretrained(model, saved[1])
    assert model.sapt.tasks == []


def test_no_transformers_model(saved):
    with pytest.raises(TypeError, match="expected a transformers PreTrainedModel"):
        sapt_fast.load_pretrained(torch.nn.Linear(2, 2), saved[1])


def test_a_failure_while_filling_leaves_the_model_unpatched(saved, monkeypatch):
    model = tiny("t5")
    before = state(model)
    monkeypatch.setattr("sapt_fast.methods.sapt.SaptRouter.add_key", lambda *a: 1 / 0, raising=True)
    with pytest.raises(ZeroDivisionError):
        sapt_fast.load_pretrained(model, saved[1])
    assert_unchanged(model, before)


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="got no task"):
        patched("t5", tasks=0).sapt.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_targets_that_do_not_fit(saved):
    model, folder = saved
    model.sapt.targets["task1"] = torch.ones(3)
    with pytest.raises(ValueError, match="targets: 'task1'"):
        model.sapt.save_pretrained(folder)


@pytest.mark.parametrize("name", ["router.safetensors", "sapt_config.json", "a/b", "..", ""])
def test_task_name_that_is_no_folder(name):
    model = patched("t5", tasks=1)
    with pytest.raises(ValueError, match="name: got"):
        model.sapt.add_task(name)
