"""The examples in the docstrings run."""

import doctest
import importlib
from pathlib import Path

import pytest

import sapt_fast

PACKAGE = Path(sapt_fast.__file__).parent
EXAMPLES = [
    ".".join(("sapt_fast", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples(module):
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed


def test_there_are_examples():
    assert {"sapt_fast.patching", "sapt_fast.ops.mixed_lora"} <= set(EXAMPLES)
