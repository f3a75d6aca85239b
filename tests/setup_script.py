"""setup.py as a module; it builds only when it is run as a script."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sapt_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
