"""No kernel touches memory beyond its tensors."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sapt_fast import dispatch

SCRIPT = Path(__file__).with_name("bounds_run.py")


def _run(module, op: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), module.__file__, op]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by mprotect")
@pytest.mark.parametrize("op", [op for op in dispatch.ops() if "cuda" in dispatch.backends(op)])
def test_every_access_is_within_bounds(emulated_module, op):
    done = _run(emulated_module, op)
    assert done.stdout.strip() == "within bounds", f"{done.returncode}\n{done.stderr}"


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by mprotect")
def test_an_access_beyond_is_noticed(emulated_module):
    assert _run(emulated_module, "beyond").returncode == -signal.SIGSEGV
