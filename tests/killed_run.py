"""Kills a continual run in its second task, at several places, and resumes it.

Run by test_loop in its own process. Every run is a forked child, the kills are SIGKILL. What the
runs came to lies in <folder>/<place>, next to weights.safetensors.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_tasks import make_model, make_settings, make_tasks

from sapt_fast.continual.loop import run_continual
from sapt_fast.continual.trainer import SaptTrainer
from sapt_fast.demo.tasks import CharTokenizer
from sapt_fast.handle import SaptHandle

# Class, method, which call in the second task, and whether the method still runs.
PLACES = {
    "step": (SaptTrainer, "training_step", 8, False),
    "checkpoint": (SaptTrainer, "_save_optimizer_and_scheduler", 2, False),
    "trained": (SaptHandle, "save_pretrained", 1, False),
    "saved": (SaptHandle, "save_pretrained", 1, True),
}


def run(kind, folder):
    model = make_model(kind, dropout=0.1)
    run_continual(model, CharTokenizer(), make_tasks(), folder, make_settings())
    weights = {n: t.clone() for n, t in model.state_dict().items() if "sapt" in n}
    save_file(weights, folder / "weights.safetensors")


def die_at(place, folder):
    owner, name, calls, runs = PLACES[place]
    own, left = getattr(owner, name), calls

    def watched(*args, **kwargs):
        nonlocal left
        state = folder / "state.json"
        if state.exists() and len(json.loads(state.read_text())["scores"]) == 1:
            left -= 1
            if left == 0:
                if runs:
                    own(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
        return own(*args, **kwargs)

    setattr(owner, name, watched)


def in_child(kind, folder, place=None):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    status = 1
    try:
        torch.manual_seed(os.getpid())  # what is drawn must not depend on what came before
        if place is not None:
            die_at(place, folder)
        run(kind, folder)
        status = 0
    finally:
        os._exit(status)


def main(root, kind, places):
    torch.set_num_threads(1)
    report = {"uninterrupted": in_child(kind, root / "uninterrupted")}
    for place in places:
        folder = root / place
        killed = in_child(kind, folder, place)
        left = sorted(path.name for path in (folder / "training").glob("*/*"))
        report[place] = [killed, left, in_child(kind, folder)]
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
