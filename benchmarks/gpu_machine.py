"""Whether a machine can run gpu_check: versions, imports, the CUDA module and its sources."""

import argparse
import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError, version

import measure

_NAMES = ("torch", "triton", "transformers", "peft", "accelerate", "pytest", "rich", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", action="store_true", help="the CUDA module alone")
    problems = _build() if parser.parse_args().build else _versions() + _imports()
    for problem in problems:
        print(f"PROBLEM: {problem}")
    return 1 if problems else 0


def _versions() -> list[str]:
    problems = []
    text = (measure.ROOT / "pyproject.toml").read_text()
    for name in _NAMES:
        [bound] = {*re.findall(rf'"{name}>=([0-9.]+)', text)}
        try:
            found = version(name)
        except PackageNotFoundError:
            problems.append(f"{name}: not installed, expected >= {bound}: carry it")
            continue
        print(f"{name} {found} (>= {bound})")
        if _numbers(found) < _numbers(bound):
            problems.append(f"{name}: got {found}, expected >= {bound}: carry it")
    return problems


def _numbers(text: str) -> list[int]:
    release = re.match(r"[0-9.]+", text)
    return [int(part) for part in release[0].strip(".").split(".")] if release else []


def _imports() -> list[str]:
    try:
        import gpu_check  # with all that it imports
    except ImportError as error:
        return [f"gpu_check cannot be imported: {error}"]
    print(measure.environment("cpu" if not gpu_check.torch.cuda.is_available() else "cuda"))
    return []


def _build() -> list[str]:
    """The module must be made of this tree's sources, and run on every GPU that is seen."""
    import torch

    from sapt_fast.cuda_kernels import common

    try:
        built = common.native().cuda_runtime()
    except ImportError as error:
        return [str(error)]
    spec = importlib.util.spec_from_file_location("setup_of_the_tree", measure.ROOT / "setup.py")
    problems = []
    try:
        setup = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(setup)
        sources = dict(entry.split("=") for entry in setup._digests().split())
    except ImportError as error:  # no setuptools: only a build here needs it
        print(f"sources are not compared: {error}")
    else:
        changed = [op for op in sources if built["sources"].get(op) != sources[op]]
        if changed:
            problems.append(f"the module is made of other sources of {', '.join(changed)}: rebuild")
    for index in range(torch.cuda.device_count()):
        if reason := common.unavailable(index):
            problems.append(reason)
    print(f"CUDA module for {', '.join(built['architectures'])}, sources {built['sources']}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
