"""The examples in the docstrings run."""

import doctest
import importlib
from pathlib import Path

import pytest

import sapt_fast
from sapt_fast import ops
from sapt_fast.methods.peft.pool import PeftHandle
from sapt_fast.methods.sapt import SaptHandle

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


PUBLIC = {
    **{name: getattr(sapt_fast, name) for name in sapt_fast.__all__ if name != "__version__"},
    **{f"ops.{name}": getattr(ops, name) for name in ops.__all__},
    "model.sapt": SaptHandle,
    "model.sapt of a PeftModel": PeftHandle,
}


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_has_an_example(name):
    assert ">>> " in PUBLIC[name].__doc__
    assert PUBLIC[name].__module__ in EXAMPLES
