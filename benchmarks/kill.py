"""Kills saves and runs, lets writers race and fills disks; nothing may be lost or broken.

    python benchmarks/kill.py [--kills 200] [--races 50] [--seed 0]
                              [--only save|train|compare|memorise|race|disk ...]

save     `save_pretrained` is killed: the folder then loads, bit for bit the old or the new tasks.
train    `sapt-fast train` is killed, several times: every checkpoint loads, and when it has been
         resumed to the end, weights and results are those of a run that was left alone.
compare  likewise, `sapt-fast compare`.
memorise likewise, `model.mome.memorise` and the save behind it.
race     two processes save into one folder while a third reads it.
disk     a save that finds no room raises OSError and leaves the folder as it was.

All work is done in forked children on the CPU with one thread. Kills come at random moments and,
in turn, before each file system call. The last line is one JSON object; the exit status is 1 after
a failure.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import dying
import forked
import torch
from kill_memorise import Memory

import sapt_fast
from sapt_fast import cli
from sapt_fast.demo.backbone import load_backbone
from sapt_fast.files.directories import whole_directory

KINDS = ("save", "train", "compare", "memorise", "race", "disk")
SHARES = {"save": 0.5, "train": 0.25, "compare": 0.15, "memorise": 0.1}  # of the kills
PATIENCE = 120.0
NOT_THE_OUTCOME = {"peak_memory", "peaks", "resumed", "seconds", "output", "folder", "path"}
TINY = (
    "--model", "demo", "--benchmark", "demo", "--device", "cpu", "--no-progress",
)  # fmt: skip
TASKS = "last_first,max_min"


# --- what a folder holds ---


def digest(folder: Path) -> str:
    """Of the tasks that `load_pretrained` finds there."""
    model = sapt_fast.load_pretrained(load_backbone(), folder)
    found = hashlib.sha256(repr(model.sapt.tasks).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.float().numpy().tobytes())
    for name, target in sorted(model.sapt.targets.items()):
        found.update(name.encode() + target.float().numpy().tobytes())
    return found.hexdigest()


def version(number: int) -> Any:
    """A model with `number` tasks; no two have a weight in common."""
    torch.manual_seed(number)
    model = sapt_fast.patch(load_backbone())
    for index in range(number):
        model.sapt.add_task(f"task{index}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sapt" in name:
                parameter.normal_()
    return model


def in_words(error: tuple[tuple[str, ...], str], kinds: Sequence[str]) -> bool:
    """Whether it is one of these, and says more than the number of the system's error."""
    names, message = error
    return bool(set(names) & set(kinds)) and bool(message) and not message.startswith("[Errno")


class Saves:
    """Folders that models with one, two and three tasks are saved to.

    Attributes:
        digests: of each version.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.models = [version(number) for number in (1, 2, 3)]
        self.folders: list[Path] = []
        self.digests = []
        for number, model in enumerate(self.models):
            model.sapt.save_pretrained(work / f"version{number}")
            self.digests.append(digest(work / f"version{number}"))
        assert len(set(self.digests)) == len(self.digests)

    def save(self, number: int, folder: Path) -> None:
        self.models[number].sapt.save_pretrained(folder)

    def fresh(self, number: int) -> Path:
        """A folder of its own with that version and a file of the user's."""
        for old in self.folders:
            shutil.rmtree(old.parent)
        self.folders.clear()
        folder = Path(tempfile.mkdtemp(dir=self.work)) / "saved"
        shutil.copytree(self.work / f"version{number}", folder)
        (folder / "notes.txt").write_text("mine")
        self.folders.append(folder)
        return folder

    def found(self, folder: Path) -> tuple[int | None, str]:
        """Which version the folder holds, or what is wrong with it."""
        ended = forked.run(partial(digest, folder), timeout=PATIENCE)
        if ended.problem:
            return None, f"does not load: {ended.problem}"
        if ended.value not in self.digests:
            return None, "loads as something that was never saved"
        where = whole_directory(folder, "sapt_config.json")
        notes = where / "notes.txt"
        if not notes.is_file() or notes.read_text() != "mine":
            return None, "has lost a file of the user's"
        return self.digests.index(ended.value), ""

    def cleared(self, folder: Path, number: int) -> str:
        """What is wrong after one more save, which must leave nothing else behind."""
        ended = forked.run(partial(self.save, number, folder), timeout=PATIENCE)
        if ended.problem:
            return f"a later save fails: {ended.problem}"
        now, wrong = self.found(folder)
        if wrong or now != number:
            return wrong or "a later save changes nothing"
        left = sorted(set(os.listdir(folder.parent)) - {folder.name})
        return f"a later save leaves {left}" if left else ""


def kill_saves(saves: Saves, kills: int, generator: random.Random) -> Iterator[str]:
    """Yields, for each kill, what is wrong ("" for nothing)."""
    now, folder = 0, saves.fresh(0)
    ways = dying.Ways(partial(saves.save, 1, folder))
    folder = saves.fresh(0)
    killed = 0
    while killed < kills:
        new = generator.choice([n for n in range(3) if n != now])
        ended, where = ways.kill(partial(saves.save, new, folder), generator)
        if not ended.signal:
            if ended.problem:
                yield f"{where}: {ended.problem}"
                killed += 1
                now, folder = 0, saves.fresh(0)
            else:
                now = new
            continue
        killed += 1
        found, wrong = saves.found(folder)
        if not wrong and found not in (now, new):
            wrong = f"holds version {found}, which is neither the old {now} nor the new {new}"
        # Half of the time the next kill meets what this one left.
        if not wrong and generator.random() < 0.5:
            wrong = saves.cleared(folder, new)
            found = new
        if wrong:
            found, folder = 0, saves.fresh(0)
        now = found or 0
        yield f"{where}: {wrong}" if wrong else ""


# --- runs ---


class Run:
    """A command that writes a run's folder, and what it comes to when it is left alone.

    Args:
        arguments: of `sapt-fast`, but for --output.
    """

    def __init__(self, work: Path, arguments: Sequence[str]) -> None:
        self.work, self.arguments = work, arguments
        self._numbers = itertools.count()
        # measured twice: the first one also warms the caches that are on disk
        self.ways = dying.Ways(self._measured)
        self.whole = self.folder()
        ended = forked.run(partial(self.run, self.whole), timeout=PATIENCE)
        if ended.problem:
            raise RuntimeError(f"fails without being killed: {ended.problem}")
        self.expected = outcome(self.whole)
        self.checkpoints = {
            path.parent.relative_to(self.whole): digest(path.parent)
            for path in self.whole.rglob("checkpoints/*/sapt_config.json")
        }
        assert self.expected
        assert self.checkpoints

    def folder(self) -> Path:
        return self.work / f"run{next(self._numbers)}"

    def _measured(self) -> None:
        self.run(self.work / f"measured{os.getpid()}")

    def run(self, folder: Path) -> None:
        cli.app([*self.arguments, "--output", str(folder)], standalone_mode=False)

    def broken_checkpoint(self, folder: Path) -> str:
        """What is wrong with one of the checkpoints that a run has come to."""
        for path, expected in self.checkpoints.items():
            try:
                whole_directory(folder / path, "sapt_config.json")
            except FileNotFoundError:
                continue
            ended = forked.run(partial(digest, folder / path), timeout=PATIENCE)
            if ended.problem:
                return f"{path} does not load: {ended.problem}"
            if ended.value != expected:
                return f"{path} is not that of a run that was left alone"
        return ""

    def finished(self, folder: Path) -> str:
        """Resumes a run to its end; what is wrong with what it came to."""
        ended = forked.run(partial(self.run, folder), timeout=PATIENCE)
        if ended.problem:
            return f"cannot be resumed: {ended.problem}"
        found = outcome(folder)
        odd = sorted(
            name
            for name in {**found, **self.expected}
            if found.get(name) != self.expected.get(name)
        )
        return f"comes to another outcome in {', '.join(odd[:3])}" if odd else ""


def outcome(folder: Path) -> dict[str, Any]:
    """Results and weights by file; without times and paths."""
    found: dict[str, Any] = {}
    for name in ("results.json", "compare.json"):
        for path in folder.rglob(name):
            found[str(path.relative_to(folder))] = _without_costs(json.loads(path.read_text()))
    for path in folder.rglob("checkpoints/*/**/*.safetensors"):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = content
    return found


def _without_costs(node: Any) -> Any:
    if isinstance(node, dict):
        return {n: _without_costs(item) for n, item in node.items() if n not in NOT_THE_OUTCOME}
    return [_without_costs(item) for item in node] if isinstance(node, list) else node


def kill_runs(run: Run | Memory, kills: int, generator: random.Random) -> Iterator[str]:
    """Yields, for each kill, what is wrong; the last kill of a run answers for its outcome."""
    left = kills
    while left:
        folder, count, where, wrong = run.folder(), generator.randint(1, 4), "", ""
        story: list[str] = []
        for _ in range(min(count, left)):
            ended, where = run.ways.kill(partial(run.run, folder), generator)
            if not ended.signal:
                wrong = ended.problem
                break
            left -= 1
            story.append(where)
            wrong = run.broken_checkpoint(folder)
            if wrong:
                break
        if not story:  # it was done before
            if wrong:
                left -= 1
                yield wrong
            shutil.rmtree(folder, ignore_errors=True)
            continue
        wrong = wrong or run.finished(folder)
        shutil.rmtree(folder, ignore_errors=True)
        yield from [""] * (len(story) - 1)
        yield f"{', then '.join(story)}: {wrong}" if wrong else ""


# --- races and full disks ---


def race(saves: Saves, generator: random.Random) -> str:
    """Two writers and a reader; what is wrong."""
    folder = saves.fresh(0)
    done = folder.parent.parent / f"{folder.parent.name}.done"

    def write(number: int, delay: float) -> None:
        time.sleep(delay)
        saves.save(number, folder)

    def read() -> list[Any]:
        """All that was read, and the errors."""
        seen: list[Any] = []
        while not done.exists():
            try:
                seen.append(digest(folder))
            except Exception as error:
                seen.append((tuple(k.__name__ for k in type(error).__mro__), str(error)))
        return seen

    reader = forked.start(read)
    writers = [
        forked.start(partial(write, number, generator.choice((0.0, generator.uniform(0, 0.05)))))
        for number in (1, 2)
    ]
    ends = [writer.wait(PATIENCE) for writer in writers]
    done.touch()
    seen = reader.wait(PATIENCE)
    done.unlink()
    for ended in ends:
        if ended.signal or ended.late:
            return f"a writer was {ended.problem}"
        if ended.error and not in_words(ended.error, ("ValueError", "OSError", "RuntimeError")):
            return f"a writer is not told in words: {ended.problem}"
    if seen.problem:
        return f"the reader: {seen.problem}"
    for value in seen.value:
        if isinstance(value, str):
            if value not in saves.digests:
                return "the reader got something that was never saved"
        elif not in_words(value, ("ValueError", "OSError", "RuntimeError")):
            return f"the reader is not told in words: {value[0][0]}: {value[1]}"
    saved = {number for number, ended in zip((1, 2), ends, strict=True) if not ended.error}
    found, wrong = saves.found(folder)
    if not wrong and found not in (saved or {0}):
        wrong = f"holds version {found}, but the savers of {sorted(saved)} were told all is well"
    return wrong or saves.cleared(folder, generator.choice((0, 1, 2)))


def fill_disk(saves: Saves, generator: random.Random) -> str:
    """A save without room for all; what is wrong."""
    with _small_disk(saves, generator) as (folder, save):
        ended = forked.run(save, timeout=PATIENCE)
        if ended.error is None:
            return ended.problem or "saves although there is no room"
        if "OSError" not in ended.error[0]:
            return f"raises {ended.problem}, not OSError"
        found, wrong = saves.found(folder)
        if wrong or found != 0:
            return wrong or f"holds version {found}, not the old one"
        left = sorted(set(os.listdir(folder.parent)) - {folder.name, "lost+found"})
        return f"leaves {left}" if left else ""


class _small_disk:  # noqa: N801
    """A folder with version 0, and a save of version 2 for which there is no room.

    On a small tmpfs where this process may mount one, and else with a limit on the files' size.
    """

    def __init__(self, saves: Saves, generator: random.Random) -> None:
        self.saves, self.generator = saves, generator
        self.mounted: Path | None = None

    def __enter__(self) -> tuple[Path, Callable[[], Any]]:
        folder = self.saves.fresh(0)
        sizes = [p.stat().st_size for p in (self.saves.work / "version2").rglob("*")]
        save = partial(self.saves.save, 2, folder)
        if self.generator.random() < 0.5 and self._mount(folder, sum(sizes)):
            return folder, save
        limit = self.generator.randrange(max(sizes))
        return folder, partial(dying.with_file_limit, save, limit)

    def _mount(self, folder: Path, needed: int) -> bool:
        content = folder.with_name("content")
        folder.rename(content)
        used = sum(p.stat().st_size for p in content.rglob("*"))
        pages = 4096 * 40  # of folders and rounding
        room = used + pages + self.generator.randrange(needed // 2)
        place = folder.parent / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(place)]
        mounted = shutil.which("mount") is not None and not subprocess.call(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if mounted:
            subprocess.check_call(["umount", str(place)])
        place.rmdir()
        if not mounted:
            content.rename(folder)
            return False
        subprocess.check_call([*command[:-1], str(folder.parent)])
        self.mounted = folder.parent
        shutil.copytree(self.saves.work / "version0", folder)
        (folder / "notes.txt").write_text("mine")
        return True

    def __exit__(self, *_: object) -> None:
        if self.mounted is not None:
            subprocess.check_call(["umount", str(self.mounted)])


# --- all of it ---


def planned(kills: int, races: int, only: Sequence[str] | None) -> dict[str, int]:
    """How many of each kind; `kills` of each that is asked for by name."""
    if only:
        return {kind: races if kind == "race" else kills for kind in only}
    counts = {kind: round(share * kills) for kind, share in SHARES.items()}
    counts["save"] += kills - sum(counts.values())
    return {**counts, "race": races, "disk": max(1, kills // 20)}


def attempts(kind: str, count: int, work: Path, seed: int) -> Iterator[str]:
    """Yields what is wrong with each of `count` attempts."""
    generator = random.Random(f"{seed} {kind}")
    if kind in ("train", "compare"):
        small = ("steps", "batch_size", "accumulation"), (4, 4, 1)
        if kind == "train":
            names = (f"--{name.replace('_', '-')}" for name in small[0])
            values = [x for pair in zip(names, map(str, small[1]), strict=True) for x in pair]
            arguments = ["train", *TINY, "--tasks", TASKS, "--save-steps", "2", *values]
            arguments += ["--max-target-length", "4", "--eval-batch-size", "128"]
        else:
            pairs = (*zip(*small, strict=True), ("save_steps", 2), ("max_target_length", 4))
            values = [x for name, value in pairs for x in ("--set", f"{name}={value}")]
            arguments = ["compare", *TINY, "--order", TASKS, "--strategies", "sapt,seqlora"]
            arguments += ["--no-fwt", *values]
        yield from kill_runs(Run(work, arguments), count, generator)
        return
    if kind == "memorise":
        yield from kill_runs(Memory(work), count, generator)
        return
    saves = Saves(work)
    if kind == "save":
        yield from kill_saves(saves, count, generator)
    else:
        attempt = race if kind == "race" else fill_disk
        for _ in range(count):
            yield attempt(saves, generator)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="[default: 200]")
    parser.add_argument("--races", type=int, default=50, help="[default: 50]")
    parser.add_argument("--seed", type=int, default=0, help="[default: 0]")
    parser.add_argument("--only", choices=KINDS, nargs="+")
    options = parser.parse_args(given)
    for name in ("kills", "races"):
        if getattr(options, name) < 0:
            parser.error(f"--{name}: got {getattr(options, name)}, expected at least 0")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    counts = planned(options.kills, options.races, options.only)
    print(f"seed {options.seed}: {counts}", file=sys.stderr)
    started = time.monotonic()
    failed: list[dict[str, Any]] = []
    done: collections.Counter[str] = collections.Counter()
    for kind, count in counts.items():
        if not count:
            continue
        begun = shown = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for wrong in attempts(kind, count, Path(folder), options.seed):
                done[kind] += 1
                if wrong:
                    failed.append({"kind": kind, "number": done[kind], "wrong": wrong})
                    print(f"{kind} {done[kind]}: {wrong}", file=sys.stderr)
                now = time.monotonic()
                if now - shown > 5:
                    left = (now - begun) / done[kind] * (count - done[kind])
                    print(f"{kind}: {done[kind]}/{count}, {left:.0f} s left", file=sys.stderr)
                    shown = now
    summary = {
        "tool": "kill",
        "kills": sum(done[kind] for kind in SHARES),
        "by_kind": dict(done),
        "failed": failed,
        "seed": options.seed,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(summary))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
