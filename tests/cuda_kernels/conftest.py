"""Builds the CUDA kernels for the emulator of this directory and puts them in the GPU's place."""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
EMULATION = Path(__file__).resolve().parent / "emulation"


@pytest.fixture(scope="session")
def emulated_module(request, tmp_path_factory) -> ModuleType:
    """The CUDA bindings of ``sapt_fast._C`` and the unchanged kernels, compiled for the CPU."""
    cache = request.config.cache.mkdir("emulated_cuda")
    return _emulated(cache, ROOT / "csrc", tmp_path_factory.mktemp("emulated_cuda"))


_OF_HALF = " if (!FAULT || threadIdx.x % 2)"
# What a fault leaves out, by file, or in any file of kernels: barriers, waits of half the threads,
# and bounds. `FAULT` is replaced by whether the fault is wanted now.
_FAULTS = {
    "": {
        " __syncthreads();": " if (!FAULT) __syncthreads();",
        " wait_for_previous_kernel();": _OF_HALF + " wait_for_previous_kernel();",
    },
    "vec.h": {"if (i < count) elements": "if (FAULT || i < count) elements"},
    "decode_reduce.h": {
        "m < factors.rows": "(FAULT || m < factors.rows)",
        ">= columns * ROWS ||": ">= columns * ROWS + FAULT * ROWS ||",
    },
}


@pytest.fixture(scope="session")
def faulty_module(request, tmp_path_factory) -> tuple[ModuleType, list[str]]:
    """The same with faults that `set_fault` chooses by their number; and what they are."""
    folder = tmp_path_factory.mktemp("faulty_cuda")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    faults: list[str] = []
    for path in sorted((folder / "csrc/cuda").iterdir()):
        lines = path.read_text().splitlines(keepends=True)
        for i, line in enumerate(lines):
            for right, wrong in (_FAULTS[""] | _FAULTS.get(path.name, {})).items():
                if right in line and "inline void" not in line:
                    faults.append(f"{path.name}:{i + 1}: {line.strip()}")
                    fault = f"emulation::has_fault({len(faults)})"
                    lines[i] = line.replace(right, wrong.replace("FAULT", fault))
        path.write_text("".join(lines))
    cache = request.config.cache.mkdir("faulty_cuda")
    return _emulated(cache, folder / "csrc", folder), faults


def _emulated(cache: Path, csrc: Path, folder: Path) -> ModuleType:
    """The module of a folder of sources, kept in pytest's cache until one of them changes.

    It has the cache's name: pybind11 makes one module of a name.
    """
    name = cache.name
    pybind11 = pytest.importorskip("pybind11")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]
    # A fibre is left and entered again by longjmp, which compilers warn of; "#pragma unroll" is
    # nvcc's.
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered"]
    flags += [f"-DMODULE_NAME={name}"]
    for path in (sysconfig.get_path("include"), pybind11.get_include()):
        flags += ["-isystem", path]
    kernels = [path for path in sorted((csrc / "cuda").glob("*.cu")) if path.stem != "runtime"]
    sources = [*kernels, csrc / "cuda/bindings.cpp", *sorted(EMULATION.glob("*.c*"))]

    key = hashlib.sha256(repr((compiler, flags)).encode())
    for path in sorted({*sources, *EMULATION.rglob("*.h"), *csrc.rglob("*.h")}):
        key.update(path.read_bytes())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    kept = cache / f"{key.hexdigest()[:16]}{suffix}"
    if not kept.exists():
        includes = [f"-I{EMULATION}", f"-I{csrc}"]
        _build([*compiler, *flags, *includes], sources, kept, folder)
    spec = importlib.util.spec_from_file_location(name, kept)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(compiler: list[str], sources: list[Path], target: Path, folder: Path) -> None:
    objects = [folder / f"{source.parent.name}_{source.stem}.o" for source in sources]

    def compile_one(source: Path, out: Path) -> None:
        _call([*compiler, "-x", "c++", "-c", str(source), "-o", str(out)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    library = target.with_suffix(f".{os.getpid()}")
    _call([*compiler, "-shared", "-o", str(library), *map(str, objects)])
    for other in target.parent.iterdir():
        if other != library:
            other.unlink()
    library.rename(target)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}"


class Synchronised:
    """The emulated module as the launchers see it: kernels end before memory can be freed."""

    def __init__(self, module: ModuleType):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if not callable(value):
            return value

        def finished(*arguments: Any) -> Any:
            result = value(*arguments)
            self._module.synchronize()
            return result

        return finished


@pytest.fixture
def cuda(emulated_module, monkeypatch) -> Callable[[str], ModuleType]:
    """Loads a module of ``sapt_fast.cuda_kernels`` that launches on the emulator."""

    def load(op: str) -> ModuleType:
        from sapt_fast.cuda_kernels import common

        module = importlib.import_module(f"sapt_fast.cuda_kernels.{op}")
        monkeypatch.setattr(common, "native", lambda: Synchronised(emulated_module))
        monkeypatch.setattr(common, "place", lambda device: (0, 0))
        return module

    return load


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """torch fills what it allocates with NaN; not on a GPU, where cuBLAS refuses this mode."""
    if request.node.get_closest_marker("gpu") is not None:
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
