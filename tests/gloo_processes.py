"""Starts the cases of gloo_cases.py and gloo_bank_cases.py in several gloo processes.

Run as a script it imports everything once and then serves requests, one JSON line each on stdin:
it forks a process per rank, so that a case starts in milliseconds.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).parent


class Processes:
    """Runs cases in forked processes; a context manager."""

    def __enter__(self):
        paths = [str(TESTS.parent), str(TESTS), *sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        return self

    def __exit__(self, *error):
        self.server.stdin.close()
        self.server.wait(120)  # a busy machine takes its time

    def run(self, case, world, folder, timeout=60, **options):
        """Runs `<case>(folder, **options)` in `world` processes.

        Raises:
            AssertionError: one of them failed or took longer than `timeout` seconds.
        """
        request = {
            "case": case, "world": world, "folder": str(folder), "timeout": timeout,
            "options": options,
        }  # fmt: skip
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the processes' server has died"
        failures = json.loads(answer)
        assert not failures, "\n".join(failures)


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve():
    import torch

    torch.set_num_threads(1)
    import gloo_bank_cases
    import gloo_cases

    cases = {**vars(gloo_cases), **vars(gloo_bank_cases)}
    gc.freeze()  # what is imported is no child's garbage, and its memory stays shared
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        failures = _start(cases, **json.loads(line))
        os.write(answers, (json.dumps(failures) + "\n").encode())
    gc.unfreeze()  # nanobind reports what is left at the end


def _start(cases, case, world, folder, timeout, options):
    port, children = free_port(), {}
    for rank in range(world):
        child = os.fork()
        if not child:
            _work(cases, case, world, rank, port, Path(folder), options)
        children[child] = rank
    failures, end = [], time.monotonic() + timeout
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank = children.pop(child)
            if status:
                error = Path(folder, f"error-{rank}.txt")
                text = error.read_text() if error.exists() else f"status {status}"
                failures.append(f"{case} {options}, rank {rank} of {world}: {text}")
                end = min(end, time.monotonic() + 2)  # the others may wait for it
        elif time.monotonic() > end:
            failures.append(f"{case} {options}: stopped ranks {sorted(children.values())}")
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            children = {}
        else:
            time.sleep(0.01)
    return failures


def _work(cases, case, world, rank, port, folder, options):
    status = 1
    try:
        import torch.distributed as dist

        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        if world > 1:
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            dist.init_process_group("gloo", init_method="env://")
        cases[case](folder, **options)
        if world > 1:
            dist.destroy_process_group()
        status = 0
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
    finally:
        os._exit(status)


if __name__ == "__main__":
    serve()
