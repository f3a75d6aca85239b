"""setup.py's choices, and what the built module brings into the process."""

import ast
import subprocess
import sys
import tarfile

import pytest
from setup_script import ROOT, setup_script
from setuptools import Distribution

import sapt_fast


@pytest.fixture(scope="module")
def build():
    return setup_script()


@pytest.fixture
def command(build, tmp_path, monkeypatch):
    """Runs build_ext for a mode, with the compilations replaced by `plans`."""
    from setuptools import Extension

    def run(
        mode: str | None,
        plans: dict[str, Exception | None],
        nvcc: str | None = "nvcc",
        distribution: Distribution | None = None,
    ):
        ran = []

        class Plan:
            def __init__(self, folder, target, nvcc):
                self.kind = "cuda" if nvcc else "cpu"

            def run(self):
                if error := plans[self.kind]:
                    raise error
                ran.append(self.kind)

        monkeypatch.setattr(build, "Plan", Plan)
        monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
        monkeypatch.setattr(build, "cuda_release", lambda nvcc: "130")
        monkeypatch.delenv("SAPT_FAST_BUILD", raising=False)
        if mode is not None:
            monkeypatch.setenv("SAPT_FAST_BUILD", mode)
        extension = Extension("sapt_fast._C", sources=[])
        step = build.BuildNative(distribution or Distribution({"ext_modules": [extension]}))
        step.build_lib, step.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        step.ensure_finalized()
        step.build_extension(extension)
        return ran

    return run


@pytest.mark.parametrize("value", ["auto", "none", "cpu", "cuda", " CPU ", None, ""])
def test_build_mode(build, value):
    assert build.build_mode(value) == ((value or "auto").strip().lower())


def test_unknown_build_mode(build):
    with pytest.raises(ValueError, match=r"SAPT_FAST_BUILD is 'gpu', expected one of auto"):
        build.build_mode("gpu")


class TestDegrading:
    def test_everything_works(self, command):
        assert command(None, {"cuda": None, "cpu": None}) == ["cuda"]
        assert command("cuda", {"cuda": None}) == ["cuda"]
        assert command("cpu", {"cpu": None}) == ["cpu"]

    def test_auto_without_nvcc(self, command, capsys):
        assert command("auto", {"cpu": None}, nvcc=None) == ["cpu"]
        assert "without CUDA: nvcc was not found" in capsys.readouterr().err

    def test_auto_with_a_failing_nvcc(self, build, command, capsys):
        assert command("auto", {"cuda": build.BuildError("too old"), "cpu": None}) == ["cpu"]
        assert "without CUDA: too old" in capsys.readouterr().err

    def test_auto_without_compiler(self, build, command, capsys):
        error = build.BuildError("no g++")
        assert command("auto", {"cuda": error, "cpu": error}) == []
        printed = capsys.readouterr().err
        assert printed.strip() == "sapt-fast: installed as pure Python: no g++"

    def test_by_name_raises(self, build, command):
        with pytest.raises(build.BuildError, match="nvcc was not found"):
            command("cuda", {"cpu": None}, nvcc=None)
        with pytest.raises(build.BuildError, match="no g"):
            command("cpu", {"cpu": build.BuildError("no g++")})


@pytest.mark.parametrize(
    ("mode", "failure", "name"),
    [
        ("auto", None, "sapt_fast-0.1.0-1cu130"),
        ("cuda", None, "sapt_fast-0.1.0-1cu130"),
        ("auto", "too old", "sapt_fast-0.1.0"),
        ("cpu", None, "sapt_fast-0.1.0"),
    ],
)
def test_the_name_of_a_wheel_says_what_it_holds(build, command, mode, failure, name):
    distribution = Distribution({"name": "sapt-fast", "version": "0.1.0"})
    wheel = distribution.get_command_obj("bdist_wheel")
    failed = build.BuildError(failure) if failure else None
    command(mode, {"cuda": failed, "cpu": None}, distribution=distribution)
    assert wheel.wheel_dist_name == name


def test_cuda_release(build, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    assert build.cuda_release(str(nvcc)) == "130"
    nvcc.write_text("#!/bin/sh\necho none\n")
    with pytest.raises(build.BuildError, match="names no release"):
        build.cuda_release(str(nvcc))


def test_the_source_distribution_can_be_built_from(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path)]
    command += ["sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    sources = [p for kind in ("cpp", "h", "cu") for p in (ROOT / "csrc").rglob(f"*.{kind}")]
    for path in [*sources, ROOT / "setup.py", ROOT / "sapt_fast/cuda_kernels/recorded.json"]:
        assert str(path.relative_to(ROOT)) in held


def test_cuda_architectures(build):
    assert build.cuda_gencode("80; 90a+PTX") == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_90a,code=compute_90a"),
    ]
    codes = [flag.split("=")[-1] for flag in build.cuda_gencode(None)[1::2]]
    assert codes == ["sm_80", "sm_90a", "sm_100", "compute_100"]
    codes = [flag.split("=")[-1] for flag in build.cuda_gencode("all")[1::2]]
    assert codes == ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_120"]
    with pytest.raises(ValueError, match="SAPT_FAST_CUDA_ARCHS holds 'hopper'"):
        build.cuda_gencode("80;hopper")


def test_compiler_that_does_not_exist(build, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="'no-such-compiler' was not found"):
        build.Plan(tmp_path, tmp_path / "_C.so", None)


def test_version():
    from importlib.metadata import version

    assert version("sapt-fast") == sapt_fast.__version__


def test_imports_without_the_native_module():
    code = "import sys; sys.modules['sapt_fast._C'] = None; import sapt_fast"
    subprocess.run([sys.executable, "-c", code], check=True)


class TestNativeModule:
    @pytest.fixture(autouse=True)
    def native(self):
        return pytest.importorskip("sapt_fast._C", reason="built without native kernels")

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_shares_the_openmp_runtime_of_torch(self):
        code = (
            "import torch, sapt_fast.cpu_kernels.mixed_lora\n"
            "torch.ones(1 << 20).add_(1)\n"
            "print({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line})"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert len(ast.literal_eval(done.stdout)) == 1, done.stdout

    def test_cuda_report_without_driver(self, native):
        report = native.cuda_runtime()
        assert set(report) == {
            *("compiled", "architectures", "sources", "runtime_version", "driver_version"),
            *("error", "devices"),
        }
        assert bool(report["architectures"]) == report["compiled"]
        assert report["devices"] or report["error"]
