"""Model cards, and folders on the Hugging Face Hub: a fake of its functions, no network."""

import inspect
import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError
from tiny_models import patched, tiny
from tiny_vision import vision_model

import sapt_fast
from sapt_fast.methods.grace import GraceConfig
from sapt_fast.storage.model_card import is_own_card

SNAPSHOT_DOWNLOAD = huggingface_hub.snapshot_download


def files(folder):
    return {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}


class TestCard:
    def test_it_describes_what_was_saved(self, tmp_path):
        model = patched("llama", tasks=2)
        model.config._name_or_path = "me/base"
        model.sapt.targets["task1"] = torch.tensor([0.25, 0.75])
        model.sapt.save_pretrained(tmp_path / "x")
        card = huggingface_hub.ModelCard.load(tmp_path / "x" / "README.md")
        assert card.data.base_model == "me/base"
        assert "1. `task0`\n2. `task1`" in card.text
        assert "| `task1` | 0.250 | 0.750 |" in card.text
        assert 'LlamaForCausalLM.from_pretrained("me/base")' in card.text
        assert '"target_modules"' in card.text
        model.save_pretrained(tmp_path / "both")
        model.save_pretrained(tmp_path / "both")
        text = (tmp_path / "both" / "README.md").read_text()
        assert 'LlamaForCausalLM.from_pretrained("this/folder")' in text
        model.config._name_or_path = str(tmp_path)  # a place on this machine stays here
        model.sapt.save_pretrained(tmp_path / "x")
        assert str(tmp_path) not in (tmp_path / "x" / "README.md").read_text()

    def test_a_card_of_the_user_stays(self, tmp_path):
        model, card = patched("llama", tasks=1), tmp_path / "README.md"
        card.write_text("mine")
        model.sapt.save_pretrained(tmp_path)
        assert card.read_text() == "mine"
        card.unlink()
        model.sapt.save_pretrained(tmp_path)
        model.sapt.add_task("second")
        model.sapt.save_pretrained(tmp_path)
        assert "second" in card.read_text()
        edited = card.read_text().replace("learning order", "my order")
        card.write_text(edited)
        model.sapt.delete_task("second")
        model.sapt.save_pretrained(tmp_path)
        assert card.read_text() == edited
        assert sapt_fast.load_pretrained(tiny("llama"), tmp_path).sapt.tasks == ["task0"]

    def test_other_methods_have_one(self, tmp_path):
        model = sapt_fast.patch(
            vision_model("vit"), sapt_fast.DualPromptConfig(g_layers=[0], e_layers=[1])
        )
        model.dualprompt.add_task("birds")
        for _ in range(2):
            model.dualprompt.save_pretrained(tmp_path)
        assert is_own_card(tmp_path / "README.md")
        assert "1. `birds`" in (tmp_path / "README.md").read_text()

    def test_two_methods_share_one(self, tmp_path):
        model = sapt_fast.patch(patched("llama", tasks=1), GraceConfig())
        for save in (
            model.sapt.save_pretrained,
            model.grace.save_pretrained,
            model.save_pretrained,
        ):
            save(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert "## grace" in text
        assert "1. `task0`" in text


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one repository in a folder; calls must fit the real functions' signatures."""
    store, calls = tmp_path / "hub", []
    real = huggingface_hub.HfApi

    class Api:
        def __init__(self, token=None):
            calls.append(("token", {"token": token}))

        def __getattr__(self, name):
            def call(*args, **kwargs):
                bound = inspect.signature(getattr(real, name)).bind(None, *args, **kwargs)
                calls.append((name, bound.arguments))
                return globals()[f"_{name}"](store, **bound.arguments)

            return call

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return SimpleNamespace(folder=store, calls=calls)


def _create_repo(store, self, repo_id, private=None, exist_ok=False):
    store.mkdir(exist_ok=exist_ok)
    return SimpleNamespace(repo_id=repo_id)


def _create_branch(store, self, repo_id, branch, exist_ok=False):
    assert exist_ok


def _hf_hub_download(store, self, repo_id, filename, revision=None):
    if not (store / filename).is_file():
        raise EntryNotFoundError(filename)
    return str(store / filename)


def _upload_folder(store, self, folder_path, delete_patterns, ignore_patterns, **kwargs):
    for name in delete_patterns or ():
        (store / name).unlink(missing_ok=True)
    for name in files(folder_path) - set(ignore_patterns or ()):
        (store / name).parent.mkdir(exist_ok=True, parents=True)
        (store / name).write_bytes((Path(folder_path) / name).read_bytes())
    return SimpleNamespace(commit_url="https://hub/commit", pr_url="https://hub/pr")


def test_push_and_load_again(hub, tmp_path, monkeypatch):
    model = patched("llama", tasks=2)
    url = model.sapt.push_to_hub("me/tasks", private=True, token="secret", revision="draft")
    assert url == "https://hub/commit"
    made = dict(hub.calls)
    assert made["token"] == {"token": "secret"}
    assert made["create_repo"]["private"] is True
    assert made["upload_folder"]["revision"] == "draft"
    assert 'load_pretrained(model, "me/tasks")' in (hub.folder / "README.md").read_text()

    asked, signature = {}, inspect.signature(SNAPSHOT_DOWNLOAD)

    def download(*args, **kwargs):
        asked.update(signature.bind(*args, **kwargs).arguments)
        return str(hub.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    again = sapt_fast.load_pretrained(tiny("llama"), "me/tasks", revision="draft", token="secret")
    assert asked["repo_id"] == "me/tasks"
    assert (asked["revision"], asked["token"]) == ("draft", "secret")
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())

    (hub.folder / "README.md").write_text("mine")
    (hub.folder / "notes.txt").write_text("mine")
    model.sapt.delete_task("task0")
    assert model.sapt.push_to_hub("me/tasks", create_pr=True) == "https://hub/pr"
    assert (hub.folder / "README.md").read_text() == "mine"
    assert not any(name.startswith("task0/") for name in files(hub.folder))
    assert "notes.txt" in files(hub.folder)
    assert sapt_fast.load_pretrained(tiny("llama"), hub.folder).sapt.tasks == ["task1"]


def test_the_cache_serves_without_a_connection(tmp_path):
    """The real `snapshot_download` on a cache as it lays one out, with links into `blobs`."""
    saved, commit = tmp_path / "saved", "0" * 40
    patched("llama", tasks=1).sapt.save_pretrained(saved)
    repository = tmp_path / "cache" / "models--me--tasks"
    snapshot = repository / "snapshots" / commit
    for number, name in enumerate(sorted(files(saved))):
        blob, link = repository / "blobs" / str(number), snapshot / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        (saved / name).rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    model = sapt_fast.load_pretrained(tiny("llama"), "me/tasks", **options)
    assert model.sapt.tasks == ["task0"]
    with pytest.raises(FileNotFoundError, match=r"'me/others': no such folder, and not found on"):
        sapt_fast.load_pretrained(tiny("llama"), "me/others", **options)
    with pytest.raises(FileNotFoundError, match=r"'me/tasks': .* at revision 'v9'"):
        sapt_fast.load_pretrained(tiny("llama"), "me/tasks", revision="v9", **options)
    with pytest.raises(ValueError, match="revision: got 'v9', expected None"):
        sapt_fast.load_pretrained(tiny("llama"), saved, revision="v9")


def test_saptrainer_uploads_the_tasks(tmp_path):
    """A Trainer's `push_to_hub` makes this call, then uploads the folder."""
    args = transformers.Seq2SeqTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = sapt_fast.SaptTrainer(patched("llama", tasks=1), args, train_dataset=[])
    trainer.save_model(_internal_call=True)
    assert {"sapt_config.json", "router.safetensors", "README.md"} <= files(tmp_path)
    assert sapt_fast.load_pretrained(tiny("llama"), tmp_path).sapt.tasks == ["task0"]
