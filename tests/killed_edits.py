"""Runs `sapt-fast edit` on the demo's model: once, once killed by SIGKILL in a save, and resumed.

Run by tests in a process of its own: killed_edits.py FOLDER. Every run is a forked child. The last
line is a JSON object of the exit codes.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch

from sapt_fast import cli
from sapt_fast.commands import edit as _imported  # noqa: F401  # once, before the forks
from sapt_fast.files import directories


def write_edits(path):
    rows = [{"prompt": f"COPY:{a}bc", "target": f"{a}x"} for a in "klm"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def die_in_a_save(calls):
    """Kills this process between the two renames of a save."""
    own, left = os.rename, calls

    def rename(source, target):
        nonlocal left
        left -= 1
        own(source, target)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    directories.os.rename = rename


def in_child(root, name, kill=0):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        if kill:
            die_in_a_save(kill)
        sys.argv = [
            "sapt-fast", "edit", "--model", "demo", "--edits", str(root / "edits.jsonl"),
            "--output", str(root / name), "--every", "3", "--save-every", "1",
            "--answer-tokens", "4", "--device", "cpu", "--no-progress",
        ]  # fmt: skip
        cli.main()
    except SystemExit as ended:
        os._exit(int(ended.code or 0))
    finally:
        os._exit(1)


def main(root):
    torch.set_num_threads(1)
    write_edits(root / "edits.jsonl")
    gc.freeze()
    codes = {
        "whole": in_child(root, "whole"),
        # The first save renames once, each later one three times: the third one's first.
        "killed": in_child(root, "killed", kill=5),
        "resumed": in_child(root, "killed"),
    }
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
