"""Kills a save before each of its file system calls; run by test_checkpoint in its own process.

Every kill happens in a forked child, with SIGKILL. The parent then loads what is on disk: it must
be the old model or the new one, user's files included, and saving again must put all in order.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from tiny_models import patched, shallow

import sapt_fast

WATCHED = ((os, "mkdir"), (os, "open"), (os, "fsync"), (os, "link"), (os, "rename"), (os, "unlink"))


def save_and_die(model, folder, call):
    """In a child: dies before the `call`-th watched call; True if there were that many."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    left = call

    def watch(function):
        def watched(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return watched

    for module, name in WATCHED:
        setattr(module, name, watch(getattr(module, name)))
    model.sapt.save_pretrained(folder)
    os._exit(0)


def main(root):
    torch.set_num_threads(1)
    old, new = (patched(shallow("t5"), tasks=count) for count in (1, 2))
    report = {"killed": 0, "old": 0, "new": 0, "previous": 0}
    folder = root / "saved"
    while True:
        shutil.rmtree(root)
        root.mkdir()
        old.sapt.save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")
        if not save_and_die(new, folder, report["killed"] + 1):
            break
        report["killed"] += 1
        found = folder if folder.exists() else root / ".saved.previous"
        report["previous"] += found != folder
        assert (found / "notes.txt").read_text() == "mine"
        loaded = sapt_fast.load_pretrained(shallow("t5"), folder)
        version = "old" if loaded.sapt.tasks == ["task0"] else "new"
        report[version] += 1
        expected = (old if version == "old" else new).state_dict()
        assert all(torch.equal(expected[name], x) for name, x in loaded.state_dict().items())
        names = {"README.md", "notes.txt", "router.safetensors", "sapt_config.json"}
        assert set(os.listdir(found)) == {*names, *loaded.sapt.tasks}

        new.sapt.save_pretrained(folder)
        assert sapt_fast.load_pretrained(shallow("t5"), folder).sapt.tasks == ["task0", "task1"]
        assert (folder / "notes.txt").read_text() == "mine"
        assert os.listdir(root) == ["saved"]
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
