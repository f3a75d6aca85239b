"""Kills `memorise` as benchmarks/kill.py does, and once more where what is resumed is not exact.

The last line is one JSON object: by the name of each run, its exit status and its summary.
"""

import json

import kill
from kill_slices import ended

from sapt_fast.methods.memory.folder import FactFolder

LOAD = FactFolder.load


def rounded(self, number, banks):
    """As `FactFolder.load`, but the experts lose bits."""
    group = LOAD(self, number, banks)
    for bank in banks:
        bank.write(bank.touched, *(rows.bfloat16() for rows in bank.master_rows(bank.touched)))
    return group


def main():
    runs = {"exact": ended(kill.main, "--only", "memorise", "--kills", "9", "--seed", "1")}
    FactFolder.load = rounded
    runs["rounded"] = ended(kill.main, "--only", "memorise", "--kills", "9", "--seed", "1")
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
