"""No kernel touches memory beyond its tensors."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sapt_fast import dispatch

OPS = [op for op in dispatch.ops() if "cuda" in dispatch.backends(op)]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="protects pages by mprotect")


@pytest.fixture(scope="module")
def done(emulated_module) -> subprocess.CompletedProcess[str]:
    """One process imports torch for all ops."""
    script = Path(__file__).with_name("bounds_run.py")
    command = [sys.executable, str(script), emulated_module.__file__, ",".join([*OPS, "beyond"])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def statuses(done) -> dict[str, int]:
    """How each op ended."""
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("op", OPS)
def test_every_access_is_within_bounds(done, statuses, op):
    assert statuses[op] == 0, done.stderr


def test_an_access_beyond_is_noticed(statuses):
    assert statuses["beyond"] == -signal.SIGSEGV
