"""Processes that save into one folder, and one that reads it; run by test_storage_races.

racing_saves.py FOLDER: forked children save a version each, again and again while the parent
loads. Every load must give one of the versions whole. Prints how often each was read, and whether
all children came to their end.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from tiny_models import fill, patched, tiny

import sapt_fast

WRITERS, SAVES = 3, 6


def write(model, folder):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for _ in range(SAVES):
            model.sapt.save_pretrained(folder)
        status = 0
    finally:
        os._exit(status)


def main(root):
    torch.set_num_threads(1)
    folder = root / "saved"
    versions = [fill(patched("llama", tasks=1 + n % 2), seed=n) for n in range(WRITERS)]
    (root / "saved").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    versions[0].sapt.save_pretrained(folder)
    children = [write(model, folder) for model in versions]
    states = [model.state_dict() for model in versions]
    read, ended = [0] * WRITERS, []
    while children or sum(read) < WRITERS:
        loaded = sapt_fast.load_pretrained(tiny("llama"), folder)
        found = [
            n
            for n, state in enumerate(states)
            if versions[n].sapt.tasks == loaded.sapt.tasks
            and all(torch.equal(state[name], x) for name, x in loaded.state_dict().items())
        ]
        assert found, "a mixture of versions"
        read[found[0]] += 1
        for child in list(children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                children.remove(child)
                ended.append(os.waitstatus_to_exitcode(status))
        time.sleep(0.001)
    assert (folder / "notes.txt").read_text() == "mine"
    print(json.dumps({"read": read, "ended": ended, "left": sorted(os.listdir(root))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
