"""Builds ``sapt_fast._C``: C++ always, CUDA where nvcc is found.

``SAPT_FAST_BUILD`` chooses what is built:

- ``auto`` (default): CUDA and C++; without nvcc only C++; without a C++ compiler pure Python.
  The reason for less than all is printed.
- ``none``: pure Python.
- ``cpu``: C++ only; raises when it cannot be built.
- ``cuda``: C++ and CUDA; raises when it cannot be built.

``SAPT_FAST_CUDA_ARCHS`` lists the GPU architectures, for instance ``"80;90a;100+PTX"``; ``all`` are
those of the released wheels.

A wheel with CUDA kernels has the toolkit in its name as the build tag, ``1cu130``. Installers take
it before the wheel of the same version without: it runs on machines without a GPU too.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")
DEFAULT_CUDA_ARCHS = "80;90a;100+PTX"
RELEASED_CUDA_ARCHS = "80;86;89;90a;100;120+PTX"
CXX_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror"),
]
AVX512_FLAGS = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
]
# Every file of kernels in csrc/cpu is compiled once per capability; the best one is chosen at run
# time. Bindings are compiled once.
CAPABILITY_FLAGS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
}


class BuildError(RuntimeError):
    """The extension cannot be built as asked."""


def build_mode(value: str | None) -> str:
    """The value of SAPT_FAST_BUILD, checked."""
    mode = (value or "auto").strip().lower()
    if mode not in MODES:
        raise ValueError(f"SAPT_FAST_BUILD is {value!r}, expected one of {', '.join(MODES)}")
    return mode


def cuda_gencode(value: str | None) -> list[str]:
    """nvcc flags for an architecture list such as ``"80;90a;100+PTX"``."""
    flags: list[str] = []
    names = RELEASED_CUDA_ARCHS if value == "all" else value or DEFAULT_CUDA_ARCHS
    for name in names.replace(",", ";").split(";"):
        name = name.strip().removeprefix("sm_")
        arch = name.removesuffix("+PTX")
        if not arch.rstrip("af").isdigit():
            raise ValueError(
                f"SAPT_FAST_CUDA_ARCHS holds {name!r}, expected entries such as 80, 90a or 100+PTX"
            )
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        if name != arch:
            flags += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    return flags


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of the PATH, or of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_release(nvcc: str) -> str:
    """The toolkit's release without the point, such as ``130``."""
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", printed)
    if found is None:
        raise BuildError(f"{nvcc} --version names no release: {printed!r}")
    return found[1] + found[2]


class Plan:
    """The commands that make one shared object: compilations, then a link."""

    def __init__(self, folder: Path, target: Path, nvcc: str | None) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise BuildError("pybind11 is not installed") from error
        self.folder = folder
        self.target = target
        self.compilations: list[tuple[list[str], Path, Path]] = []
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        if shutil.which(cxx[0]) is None:
            raise BuildError(f"the C++ compiler {cxx[0]!r} was not found")
        includes = [f"-I{ROOT / 'csrc'}"]
        system = [sysconfig.get_path("include"), pybind11.get_include()]
        includes += [flag for path in system for flag in ("-isystem", path)]
        common = [*cxx, *CXX_FLAGS, *includes]
        defines = ["-DSAPT_FAST_WITH_CUDA"] if nvcc else []
        bindings = sorted((ROOT / "csrc/cpu").glob("*bindings.cpp"))
        for source in [*sorted((ROOT / "csrc").glob("*.cpp")), *bindings]:
            self._compile([*common, *defines], source, source.stem)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for capability, flags in CAPABILITY_FLAGS.items():
            if capability != "default" and not x86:
                continue
            namespace = "default_" if capability == "default" else capability
            kernels = set((ROOT / "csrc/cpu").glob("*.cpp")) - set(bindings)
            for source in sorted(kernels):
                define = f"-DSAPT_FAST_CAPABILITY={namespace}"
                self._compile([*common, *flags, define], source, f"cpu_{source.stem}_{capability}")
        linker = [*cxx, "-fopenmp"]
        if nvcc:
            for source in sorted((ROOT / "csrc/cuda").glob("*.cpp")):
                self._compile(common, source, f"cuda_{source.stem}")
            self._add_cuda_sources(nvcc, cxx[0])
            # nvcc knows where its libraries are. The static runtime lets the module import on a
            # machine with neither driver nor toolkit.
            linker = [nvcc, "-ccbin", cxx[0], "-cudart", "static", "-Xcompiler", "-fopenmp"]
        objects = [str(out) for _, _, out in self.compilations]
        self.link = [*linker, "-shared", "-o", str(target), *objects]

    def _compile(self, command: list[str], source: Path, stem: str) -> None:
        self.compilations.append((command, source, self.folder / f"{stem}.o"))

    def _add_cuda_sources(self, nvcc: str, cxx: str) -> None:
        gencode = cuda_gencode(os.environ.get("SAPT_FAST_CUDA_ARCHS"))
        names = " ".join(flag.split("code=")[1] for flag in gencode if "code=" in flag)
        command = [nvcc, "-ccbin", cxx, "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", *gencode]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror"]
        command += ["-Werror", "all-warnings"]
        report = [f'-DSAPT_FAST_CUDA_ARCHS="{names}"', f'-DSAPT_FAST_CUDA_SOURCES="{_digests()}"']
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            defines = report if source.stem == "runtime" else []
            self._compile([*command, *defines], source, f"cuda_{source.stem}")

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        ninja = _find_ninja()
        if ninja:
            self._write_ninja()
            _call([ninja, "-C", str(self.folder), "-f", str(self.folder / "build.ninja")])
            return
        commands = [[*cmd, "-c", str(src), "-o", str(out)] for cmd, src, out in self.compilations]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_call, commands))
        _call(self.link)

    def _write_ninja(self) -> None:
        def escaped(path: Path) -> str:
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        def text(command: list[str]) -> str:
            return shlex.join(command).replace("$", "$$")

        lines = ["rule compile", "  command = $run -MMD -MF $out.d -c $source -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", "rule link", "  command = $run"]
        for command, source, out in self.compilations:
            lines += [f"build {escaped(out)}: compile {escaped(source)}"]
            lines += [f"  run = {text(command)}", f"  source = {shlex.quote(str(source))}"]
        objects = " ".join(escaped(out) for _, _, out in self.compilations)
        lines += [f"build {escaped(self.target)}: link {objects}", f"  run = {text(self.link)}", ""]
        (self.folder / "build.ninja").write_text("\n".join(lines))


def _digests() -> str:
    """Each file of CUDA kernels with a digest of its sources: ``"mixed_lora=0a1b2c..."``."""
    entries = []
    for kernel in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        if kernel.stem != "runtime":
            text = b"".join(path.read_bytes() for path in sorted(_with_includes(kernel)))
            entries.append(f"{kernel.stem}={hashlib.sha256(text).hexdigest()[:16]}")
    return " ".join(entries)


def _with_includes(source: Path) -> set[Path]:
    included = re.findall(r'^#include "(.+)"', source.read_text(), re.MULTILINE)
    return {source}.union(*(_with_includes(ROOT / "csrc" / name) for name in included))


def _find_ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    bundled = Path(ninja.BIN_DIR) / "ninja"
    return str(bundled) if bundled.exists() else shutil.which("ninja")


def _call(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stdout}")


class BuildNative(build_ext):
    """build_ext that compiles with the flags above and degrades as SAPT_FAST_BUILD says."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "sapt_fast_c"
        mode = build_mode(os.environ.get("SAPT_FAST_BUILD"))
        target.unlink(missing_ok=True)  # one of an earlier build must not pass for this one's
        reason = ""
        if mode in ("auto", "cuda"):
            nvcc = find_nvcc()
            try:
                if nvcc is None:
                    raise BuildError("nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda)")
                Plan(folder / "cuda", target, nvcc).run()
                return self._name_wheel(f"1cu{cuda_release(nvcc)}")
            except BuildError as error:
                if mode == "cuda":
                    raise
                reason = f"built without CUDA: {error}"
        try:
            Plan(folder / "cpu", target, None).run()
        except BuildError as error:
            if mode == "cpu":
                raise
            reason = f"installed as pure Python: {error}"
        if reason:
            print(f"sapt-fast: {reason}", file=sys.stderr)

    def _name_wheel(self, build_tag: str) -> None:
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None:
            wheel.build_number = build_tag


def main() -> None:
    mode = build_mode(os.environ.get("SAPT_FAST_BUILD"))
    extension = Extension("sapt_fast._C", sources=[], optional=mode == "auto")
    setup(
        ext_modules=[] if mode == "none" else [extension],
        cmdclass={"build_ext": BuildNative},
    )


if __name__ == "__main__":
    main()
