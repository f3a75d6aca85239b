"""Loads damaged and hostile checkpoints and settings; every one must be refused in words.

    python benchmarks/hostile.py [--files 150] [--seed 0] [--only official|saved|run|config]

Each file is made from the seed and loaded in a forked child. A failure is: an error of another kind
than ValueError, OSError, TypeError or RuntimeError, or one that does not name the file; a file that
is read as something else than it was; anything executed; more memory than four times the file and
1 GB; more than 20 seconds. The last line is one JSON object; the exit status is 1 after a failure.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import forked
import hostile_files
import parity
import torch

import sapt_fast
from sapt_fast.commands import evaluate, train
from sapt_fast.commands.config_file import read_config
from sapt_fast.commands.demo import demo_settings
from sapt_fast.continual.data.sources import DEMO, Source
from sapt_fast.demo.backbone import load_backbone

SECONDS = 20.0
MEMORY = 1 << 30
ROOT = Path(__file__).resolve().parents[1]
NAMED = {"ValueError", "OSError", "TypeError", "RuntimeError"}
# These are of the kinds above by their class alone; no caller expects them.
UNNAMED = {"RecursionError", "NotImplementedError", "UnicodeError", "JSONDecodeError"}


@dataclass(frozen=True)
class Target:
    """Something that is loaded from files.

    Attributes:
        whole: the undamaged folder.
        files: what may be spoiled, relative to it.
        load: gives what was loaded, as far as files decide it.
    """

    whole: Path
    files: tuple[str, ...]
    load: Callable[[Path], Any]


def targets(work: Path) -> dict[str, Target]:
    """Makes the undamaged folders."""
    official = work / "official"
    shutil.copytree(ROOT / "tests" / "data" / "oracle" / "t5" / "task0", official / "task0")
    recording = parity.Recording(ROOT / "tests" / "data" / "oracle" / "t5")
    released = ("trans_input", "lora_weights_A", "lora_weights_B", "prompts_keys_till_now")

    def load_official(folder: Path) -> Any:
        model = sapt_fast.load_official(recording.base_model(), [folder / "task0/saved_weights"])
        return _weights(model)

    saved = work / "saved"
    model = sapt_fast.patch(load_backbone())
    for name in ("first", "second"):
        model.sapt.add_task(name)
    model.sapt.save_pretrained(saved)

    run = work / "run"
    source = Source(DEMO, DEMO, tasks="last_first")
    settings = demo_settings("sapt").but(steps=1, save_steps=1, learning_rate=1e-3)
    train.train(source, settings, run)
    config = work / "config"
    config.mkdir()
    (config / "options.yaml").write_text("max_train: 4\nlearning_rate: 0.5\ntasks: a,b\n")
    known = ("max_train", "learning_rate", "tasks")
    tensors = [f"{n}/adapter_model.safetensors" for n in ("first", "second")]
    return {
        "official": Target(
            official,
            (
                *(f"task0/saved_weights/{name}.pt" for name in released),
                "task0/saved_weights/attention_weights.pkl",
            ),
            load_official,
        ),
        "saved": Target(
            saved,
            ("sapt_config.json", "router.safetensors", "first/adapter_config.json", *tensors),
            lambda folder: _weights(sapt_fast.load_pretrained(load_backbone(), folder)),
        ),
        "run": Target(
            run,
            ("run.json", "results.json", "state.json"),
            lambda folder: evaluate.evaluate(folder, progress=False)[0].scores,
        ),
        "config": Target(
            config,
            ("options.yaml",),
            lambda folder: read_config(folder / "options.yaml", known),
        ),
    }


def _weights(model: Any) -> dict[str, list]:
    """By what they are: names and digests would hide how much differs."""
    values = {name: tensor for name, tensor in model.state_dict().items() if "sapt" in name}
    values |= {f"target {name}": tensor for name, tensor in model.sapt.targets.items()}
    assert values
    return {name: tensor.float().flatten().tolist() for name, tensor in values.items()}


@dataclass(frozen=True)
class Case:
    """A way to spoil a file of a target."""

    target: str
    file: str
    spoiler: hostile_files.Spoiler

    @property
    def name(self) -> str:
        return f"{self.target}: {self.spoiler.name} in {self.file}"


def draw(made: dict[str, Target], count: int, generator: random.Random) -> list[Case]:
    """Every way first on one file each, then any on any."""
    every = [
        Case(target, file, spoiler)
        for target, what in made.items()
        for file in what.files
        for spoiler in hostile_files.spoilers(Path(file).suffix)
    ]
    generator.shuffle(every)
    firsts: dict[tuple[str, str], Case] = {}
    for case in every:
        firsts.setdefault((Path(case.file).suffix, case.spoiler.name), case)
    chosen = list(firsts.values())
    others = [case for case in every if case not in chosen]
    damage = [case for case in every if case.spoiler.random]
    while len(chosen) < count:  # random damage is another one each time
        chosen.append(others.pop() if others else generator.choice(damage))
    return chosen[:count]


def judge(case: Case, target: Target, expected: Any, folder: Path, seed: int) -> list[str]:
    """Spoils a copy, loads it, and tells what is wrong; nothing if all is right."""
    shutil.copytree(target.whole, folder)
    path, canary = folder / case.file, folder.with_suffix(".canary")
    case.spoiler.write(path, canary, random.Random(seed))
    size = sum(_bytes(entry) for entry in folder.rglob("*"))
    allowed = 4 * size + MEMORY
    ended = forked.run(partial(target.load, folder), timeout=SECONDS, memory=2 * allowed)
    wrong = []
    if canary.exists():
        wrong.append("executed")
        canary.unlink()
    if ended.late or ended.signal:
        wrong.append(ended.problem)
    elif ended.error is not None:
        names, message = ended.error
        if not set(names) & NAMED or set(names) & UNNAMED:
            wrong.append(f"raised {ended.problem[:300]}")
        elif path.name not in message and not _is_named(case, message):
            wrong.append(f"does not name {path.name}: {ended.problem[:300]}")
    elif not case.spoiler.harmless and ended.value != expected:
        wrong.append("loaded, as something else than was saved")
    if ended.peak > allowed:
        wrong.append(f"took {ended.peak / 1e9:.2f} GB for {size / 1e6:.2f} MB of files")
    shutil.rmtree(folder)
    return wrong


def _is_named(case: Case, message: str) -> bool:
    """The folder names the file where a whole file is one value of several."""
    return str(Path(case.file).parent) in message and case.target == "official"


def _bytes(path: Path) -> int:
    return path.lstat().st_size if path.is_file() and not path.is_symlink() else 0


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=150, help="[default: 150]")
    parser.add_argument("--seed", type=int, default=0, help="[default: 0]")
    parser.add_argument("--only", choices=["official", "saved", "run", "config"])
    options = parser.parse_args(given)
    if options.files < 1:
        parser.error(f"--files: got {options.files}, expected at least 1")
    torch.set_num_threads(1)
    started = time.monotonic()
    failed: list[dict[str, Any]] = []
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        made = targets(Path(folder))
        if options.only:
            made = {options.only: made[options.only]}
        expected = {name: _loaded(name, target) for name, target in made.items()}
        cases = draw(made, options.files, random.Random(options.seed))
        for number, case in enumerate(cases):
            seed = options.seed * 1_000_003 + number
            target = made[case.target]
            place = Path(folder) / f"case{number}"
            wrong = judge(case, target, expected[case.target], place, seed)
            counts[case.target] += 1
            if wrong:
                failed.append({"case": case.name, "seed": seed, "wrong": wrong})
                print(f"{case.name} (seed {seed}): {'; '.join(wrong)}", file=sys.stderr)
            spent = time.monotonic() - started
            left = spent / (number + 1) * (len(cases) - number - 1)
            if (number + 1) % 25 == 0:
                print(f"{number + 1}/{len(cases)}, {left:.0f} s left", file=sys.stderr)
    summary = {
        "tool": "hostile",
        "files": len(cases),
        "by_kind": dict(counts),
        "failed": failed,
        "seed": options.seed,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(summary))
    return 1 if failed else 0


def _loaded(name: str, target: Target) -> Any:
    """What the undamaged folder gives."""
    ended = forked.run(partial(target.load, target.whole), timeout=10 * SECONDS)
    if ended.problem:
        raise RuntimeError(f"{name}: the undamaged folder does not load: {ended.problem}")
    return ended.value


if __name__ == "__main__":
    sys.exit(main())
