"""The kernels as nvcc compiles them, and the compiled module on a machine without a GPU."""

import re
import subprocess

import pytest
import torch
from setup_script import ROOT, setup_script

KERNELS = sorted(p for p in (ROOT / "csrc/cuda").glob("*.cu") if p.stem != "runtime")
FIRST, *FURTHER = "90a", "80", "100"


@pytest.fixture(scope="module")
def build():
    return setup_script()


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets", [[FIRST], pytest.param(FURTHER, marks=pytest.mark.thorough)], ids=";".join
)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_no_spills(build, kernel, targets, tmp_path):
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found")
    architectures = build.cuda_gencode(";".join(targets))
    command = [nvcc, "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", *architectures]
    command += ["--threads", "0", "-Xptxas", "-v", "-c", str(kernel), "-o", str(tmp_path / "o.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    log = done.stdout + done.stderr
    for target in targets:
        assert f"for 'sm_{target}'" in log
    compiled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log)
    functions = re.findall(r"Function properties for (\S+)", log)
    assert len(compiled) == len(functions) > 0
    bad = {
        name: sizes for name, sizes in zip(functions, compiled, strict=True) if any(map(int, sizes))
    }
    assert not bad


def test_a_launch_without_a_device():
    """An error that says what is wrong; the process goes on."""
    native = pytest.importorskip("sapt_fast._C", reason="built without native kernels")
    report = native.cuda_runtime()
    if not report["compiled"]:
        pytest.skip("built without CUDA")
    if not report["error"]:
        pytest.skip("there is a device")
    one, adapter = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    projection = (one, None, None, one, one, adapter, one, 1, 1, True)
    arguments = (0, 0, one, one, [projection], torch.ones(9), 1, 1, 1, 1, (0, 0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=re.escape(report["error"])):
            native.cuda_mixed_lora_decode(*arguments)


def test_sources_of_the_build(build):
    """A changed kernel has another digest, so that an old run on a GPU does not count for it."""
    digests = dict(entry.split("=") for entry in build._digests().split())
    assert list(digests) == [path.stem for path in KERNELS]
    assert all(re.fullmatch(r"[0-9a-f]{16}", digest) for digest in digests.values())
