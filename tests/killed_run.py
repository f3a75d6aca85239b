"""Kills continual runs in their second task, at several places, and resumes them.

Run by tests in a process of its own: killed_run.py FOLDER RUN,... PLACE..., where a run is a kind
of model and a strategy ("t5-sapt"), with "-generated" if it generates pseudo-samples. Every run is
a forked child, the kills are SIGKILL. What the runs came to lies in <folder>/<run>/<place>, next to
weights.safetensors.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tiny_tasks import make_model, make_settings, make_tasks, with_pseudo_samples

from sapt_fast.continual.run.loop import run_continual
from sapt_fast.continual.run.pseudo_samples import _Generator
from sapt_fast.continual.settings import GeneratorSettings
from sapt_fast.continual.trainer import SaptTrainer
from sapt_fast.demo.tasks import CharTokenizer
from sapt_fast.methods.sapt import SaptHandle

# Class, method, which call in the second task, and whether the method still runs.
PLACES = {
    "step": (SaptTrainer, "training_step", 8, False),
    "checkpoint": (SaptTrainer, "_save_optimizer_and_scheduler", 2, False),
    "trained": (SaptHandle, "save_pretrained", 1, False),
    "saved": (SaptHandle, "save_pretrained", 1, True),
    "generator": (transformers.Trainer, "training_step", 13, False),
    "sample": (_Generator, "_draw", 2, False),
}
GENERATOR = GeneratorSettings(
    steps=40, batch_size=4, learning_rate=1e-2, lora_dropout=0.1, top_k=2, repetition_penalty=1.0,
    max_length=24, share=0.5,
)  # fmt: skip


def run(name, folder):
    kind, strategy, *generated = name.split("-")
    model, tasks, options = make_model(kind, dropout=0.1), make_tasks(), {}
    if generated:
        tasks, options = tasks[:2], {"replay": "generated", "generator": GENERATOR}
    elif strategy in ("generative_replay", "lfpt5"):
        tasks = with_pseudo_samples(folder.parent / "pseudo", tasks)
        options = {"replay": str(folder.parent / "pseudo"), "metric": "exact_match"}
    run_continual(
        model, CharTokenizer(), tasks, folder, make_settings(strategy=strategy, **options)
    )
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


def in_child(name, folder, place=None):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    status = 1
    try:
        torch.manual_seed(os.getpid())  # what is drawn must not depend on what came before
        if place is not None:
            die_at(place, folder)
        run(name, folder)
        status = 0
    finally:
        os._exit(status)


def main(root, names, places):
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is no child's garbage
    report = {}
    for name in names:
        came = {"uninterrupted": in_child(name, root / name / "uninterrupted")}
        for place in places:
            folder = root / name / place
            killed = in_child(name, folder, place)
            left = sorted(path.name for path in (folder / "training").glob("*/*"))
            came[place] = [killed, left, in_child(name, folder)]
        report[name] = came
    gc.unfreeze()
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
