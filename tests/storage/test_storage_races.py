"""Several writers, killed writers, and things of others under the names that saving uses."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_models import patched, tiny

import sapt_fast
from sapt_fast.continual.run.state import RunFolder
from sapt_fast.files import locks as _locks
from sapt_fast.files.directories import replace_directory, whole_directory
from sapt_fast.files.locks import FolderLock

MARK = "0123456789ab"


def names(folder):
    """What `replace_directory` replaces in these tests: the file "ours"."""
    return ["ours"] if (folder / "ours").is_file() else []


def save(folder, text):
    with replace_directory(folder, names) as fresh:
        (fresh / "ours").write_text(text)


def test_processes_that_save_into_one_folder_and_one_that_reads(tmp_path):
    run = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "racing_saves.py"), str(tmp_path / "x")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["ended"] == [0, 0, 0]
    assert report["left"] == ["saved"]
    assert sum(report["read"]) >= 3


def test_threads_that_save_into_one_folder(tmp_path):
    failures = []

    def work(number):
        try:
            for _ in range(10):
                save(tmp_path / "ck", str(number))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (tmp_path / "ck" / "ours").read_text() in "0123"
    assert os.listdir(tmp_path) == ["ck"]


def test_who_waits_too_long_is_told_who_holds_the_lock(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(_locks, "_PATIENCE", 0.3)
    monkeypatch.setattr(_locks, "_SILENT", 0.05)
    save(tmp_path / "ck", "old")
    lock = FolderLock(tmp_path)
    assert lock.acquire() is True
    try:
        with pytest.raises(TimeoutError, match=rf"process {os.getpid()} .*saving in"):
            save(tmp_path / "ck", "new")
    finally:
        lock.release()
    assert "waiting for process" in caplog.text
    assert (tmp_path / "ck" / "ours").read_text() == "old"
    save(tmp_path / "ck", "new")
    assert (tmp_path / "ck" / "ours").read_text() == "new"


def test_without_locks_saving_works(tmp_path, monkeypatch):
    monkeypatch.setattr(_locks, "fcntl", None)
    leftover = tmp_path / f".ck.saving.{MARK}"
    leftover.mkdir()
    save(tmp_path / "ck", "a")
    save(tmp_path / "ck", "b")
    assert whole_directory(tmp_path / "ck", "ours") == tmp_path / "ck"
    assert leftover.exists()  # its writer may be alive


class TestLeftovers:
    def test_a_killed_writers_are_deleted_and_a_living_ones_kept(self, tmp_path):
        dead, alive = tmp_path / f".ck.saving.{MARK}", tmp_path / ".ck.saving.ba9876543210"
        for folder in (dead, alive):
            (folder / "task0").mkdir(parents=True)
            (folder / "task0" / "adapter_model.safetensors").write_text("half")
        lock = FolderLock(alive)
        lock.acquire()
        save(tmp_path / "ck", "a")
        assert sorted(os.listdir(tmp_path)) == [alive.name, "ck"]
        lock.release()
        save(tmp_path / "ck", "b")
        assert os.listdir(tmp_path) == ["ck"]

    @pytest.mark.parametrize("mark", ["", f".{MARK}"])
    @pytest.mark.parametrize("there", [False, True])
    def test_the_previous_content_is_read_and_taken_back(self, mark, there, tmp_path):
        save(tmp_path / "ck", "old")
        (tmp_path / "ck" / "notes.txt").write_text("mine")
        (tmp_path / "ck").rename(tmp_path / f".ck.previous{mark}")
        if there:
            (tmp_path / "ck").mkdir()
            (tmp_path / "ck" / "log.txt").write_text("newer")
        found = whole_directory(tmp_path / "ck", "ours")
        assert (found / "ours").read_text() == "old"
        save(tmp_path / "ck", "new")
        assert (tmp_path / "ck" / "ours").read_text() == "new"
        assert (tmp_path / "ck" / "notes.txt").read_text() == "mine"
        assert (tmp_path / "ck" / "log.txt").exists() is there
        assert os.listdir(tmp_path) == ["ck"]

    def test_files_of_others_alone_are_taken_back_too(self, tmp_path, monkeypatch):
        """Killed between the renames of the first save into a folder of someone else's."""
        (tmp_path / "ck").mkdir()
        (tmp_path / "ck" / "notes.txt").write_text("mine")
        rename = os.rename

        def killed(source, target):
            if Path(target) == tmp_path / "ck":
                os._exit(9)
            rename(source, target)

        child = os.fork()
        if not child:
            os.rename = killed
            save(tmp_path / "ck", "a")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert not (tmp_path / "ck").exists()
        save(tmp_path / "ck", "b")
        assert (tmp_path / "ck" / "notes.txt").read_text() == "mine"
        assert os.listdir(tmp_path) == ["ck"]

    def test_an_earlier_versions_are_deleted(self, tmp_path):
        save(tmp_path / "ck", "a")
        (tmp_path / "ck" / "notes.txt").write_text("mine")
        old = tmp_path / ".ck.saving"
        (old / "task0").mkdir(parents=True)
        (old / "task0" / "adapter_model.safetensors").write_bytes(b"half")
        os.link(tmp_path / "ck" / "notes.txt", old / "notes.txt")
        save(tmp_path / "ck", "b")
        assert os.listdir(tmp_path) == ["ck"]
        assert (tmp_path / "ck" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in ("previous", "saving", f"previous.{MARK}", f"saving.{MARK}", "saving.x")
        for kind in ("file", "folder", "empty folder", "link", "pipe")
        # Only saving makes folders of such a name.
        if not (kind.endswith("folder") and MARK in name)
    ],
)
def test_what_is_someone_elses_neither_blocks_nor_goes(name, kind, tmp_path):
    stray = tmp_path / f".ck.{name}"
    if kind == "file":
        stray.write_text("mine")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "notes.txt").write_text("mine")
        stray.symlink_to("elsewhere")
    elif kind == "pipe":
        os.mkfifo(stray)
    else:
        stray.mkdir()
        if kind == "folder":
            (stray / "notes.txt").write_text("mine")
    for text in ("a", "b", "c"):
        save(tmp_path / "ck", text)
        assert (whole_directory(tmp_path / "ck", "ours") / "ours").read_text() == text
    assert os.path.lexists(stray)
    assert stray.is_symlink() is (kind == "link")
    if kind == "file":
        assert stray.read_text() == "mine"
    elif kind in ("folder", "link"):
        assert (stray / "notes.txt").read_text() == "mine"
    assert set(os.listdir(tmp_path)) <= {"ck", stray.name, "elsewhere"}


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    old, new = patched("llama", tasks=1), patched("llama", tasks=2, seed=3)
    old.sapt.save_pretrained(tmp_path / "ck")
    take, calls = sapt_fast.storage.tensors.StoredFiles.take, []

    def taken(self, name):
        calls.append(name)
        if len(calls) == 2:  # the config was read, the rest was not
            new.sapt.save_pretrained(tmp_path / "ck")
        take(self, name)

    monkeypatch.setattr(sapt_fast.storage.tensors.StoredFiles, "take", taken)
    base = tiny("llama")
    with pytest.raises(ValueError, match="another base model"):  # that of the new one
        sapt_fast.load_pretrained(base, tmp_path / "ck")
    loaded = sapt_fast.load_pretrained(tiny("llama", seed=3), tmp_path / "ck")
    assert loaded.sapt.tasks == ["task0", "task1"]
    assert all(torch.equal(new.state_dict()[n], t) for n, t in loaded.state_dict().items())


class TestRuns:
    def open(self, path):
        return RunFolder.open(path, ["a"], {"settings": {"r": 1}}, resume=True)

    def test_two_runs_in_one_folder(self, tmp_path):
        first = self.open(tmp_path / "run")
        with pytest.raises(ValueError, match=f"process {os.getpid()} .*runs in"):
            self.open(tmp_path / "run")
        first.close()
        self.open(tmp_path / "run").close()

    @pytest.mark.parametrize(
        "content", [b"{", b"[" * 100_000, b"[]", b"\xff", b'{"scores": NaN}', b"{}", b""]
    )
    def test_damaged_files(self, content, tmp_path):
        self.open(tmp_path).close()
        for name in ("state.json", "run.json"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"output_dir|{name}"):
                self.open(tmp_path)
            if name == "state.json":
                (tmp_path / name).unlink()
