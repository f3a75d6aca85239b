"""Runs PEFT's own tests as they are and once more with every PEFT model patched; compares the two.

    python scripts/peft_suite [--processes 2] [--minutes 30] [FILE ...]

Downloads the source distribution of the installed PEFT with pip and runs its tests offline: models
that they would fetch from the Hugging Face hub are tiny ones with random weights, made here. A test
that passes plain and fails patched is a failure, unless it is one of the known differences. The
last line is one JSON object.
"""

import argparse
import collections
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import stand_ins
from known import KNOWN

HERE = Path(__file__).resolve().parent
NEEDED = ("datasets", "diffusers", "parameterized", "scipy", "xdist")
# Their models are transformers' and carry LoRA; those of test_custom_models.py are plain modules
FILES = [
    *("arrow", "auto", "bdlora", "config", "decoder_models", "encoder_decoder_models"),
    *("feature_extraction_models", "helpers", "initialization", "integrations"),
    *("lora_conversion", "lora_intruders", "lora_variants", "lorafa", "loraplus"),
    *("low_level_api", "mapping", "mixed", "other", "seq_classifier"),
    *("token_classification_qa", "trainable_tokens", "tuners_utils", "xlora"),
]
SETTINGS = """[pytest]
markers =
    single_gpu_tests
    multi_gpu_tests
    regression
    bitsandbytes
    skipf
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", default=FILES, metavar="FILE", help="such as xlora")
    parser.add_argument("--processes", type=int, default=2, help="pytest processes [default: 2]")
    parser.add_argument("--minutes", type=float, default=30, help="for all of it [default: 30]")
    parser.add_argument(
        "--work", type=Path, help="folder for the download and the models [default: a new one]"
    )
    options = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"PEFT's tests need packages that are not installed: {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(options.work or Path(folder), options.processes, options.minutes)
        return suite.compare([f"tests/test_{name}.py" for name in options.files])


class Suite:
    """PEFT's tests, unpacked in a folder."""

    def __init__(self, work: Path, processes: int, minutes: float) -> None:
        self.work = work.resolve()
        self.processes = processes
        self.started = time.monotonic()
        self.seconds = 60 * minutes
        self.source = unpack(work.resolve()).resolve()
        (work / "pytest.ini").write_text(SETTINGS)
        stand_ins.write(work / "models")

    def compare(self, files: list[str]) -> int:
        missing = [name for name in files if not (self.source / name).exists()]
        if missing:
            print(f"not in PEFT {version('peft')}: {', '.join(missing)}", file=sys.stderr)
        files = [name for name in files if name not in missing]
        try:
            plain = self.run(files, patched=False)
            passing = [test for test, result in plain.items() if result["passed"]]
            patched = self.run(files, passing, patched=True)
            failed = [test for test in passing if not patched.get(test, {}).get("passed")]
            # a test that fails now and then fails without us too
            again = self.run(files, failed, patched=True)
            failed = [test for test in failed if not again.get(test, {}).get("passed")]
            plain_again = self.run(files, failed, patched=False)
            failed = [test for test in failed if plain_again.get(test, {}).get("passed")]
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        known = {test: KNOWN[key] for test in failed if (key := test.split("[")[0]) in KNOWN}
        new = {test: again.get(test, {}).get("reason", "") for test in failed if test not in known}
        refused: collections.Counter[str] = collections.Counter()
        for result in patched.values():
            refused.update(result["refused"])
        models = sum(result["patched"] for result in patched.values())
        for test, reason in new.items():
            print(f"{test}\n    {reason}", file=sys.stderr)
        summary = {
            "tool": "peft_suite",
            "peft": version("peft"),
            "passed_plain": len(passing),
            "passed_patched": sum(result["passed"] for result in patched.values()),
            "newly_failing": new,
            "known_differences": known,
            "models_patched": models,
            "tests_with_a_patched_model": sum(bool(r["patched"]) for r in patched.values()),
            "models_refused": refused.total(),
            "refusals": dict(refused.most_common()),
            "seconds": round(time.monotonic() - self.started),
        }
        if not models:
            print("no model was patched: the run says nothing", file=sys.stderr)
        print(json.dumps(summary))
        return 1 if new or not models else 0

    def run(
        self, files: list[str], only: list[str] | None = None, *, patched: bool
    ) -> dict[str, dict]:
        """Outcome and counts of the files' tests, or of `only` those; without skipped ones."""
        if only is not None:
            if not only:
                return {}
            files = sorted({test.split("::")[0] for test in only})
        with tempfile.TemporaryDirectory() as folder:
            report, chosen = Path(folder) / "report", Path(folder) / "only"
            environment = self._environment(report, patched)
            if only is not None:
                chosen.write_text("\n".join(only))
                environment["PEFT_SUITE_ONLY"] = str(chosen)
            command = [sys.executable, "-m", "pytest", *files, "-c", self.work / "pytest.ini"]
            command += ["-p", "plugin", "-p", "no:cacheprovider", "-q", "--tb=no", "--no-header"]
            command += ["-W", "ignore", "--rootdir", self.source]
            command += ["--continue-on-collection-errors"]
            command += ["-n", str(self.processes), "--dist", "worksteal"]
            code = self._finish(command, environment)
            results = read(report)
        if code not in (0, 1) and not results:
            raise RuntimeError(f"pytest ended with {code} and ran no test")
        return results

    def _environment(self, report: Path, patched: bool) -> dict[str, str]:
        path = [str(HERE), str(HERE.parent.parent), str(self.source)]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]),
            "PEFT_SUITE_PATCH": str(int(patched)),
            "PEFT_SUITE_REPORT": str(report),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(self.work / "models"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }

    def _finish(self, command: list, environment: dict[str, str]) -> int:
        left = self.seconds - (time.monotonic() - self.started)
        process = subprocess.Popen(
            command, cwd=self.source, env=environment, stdout=sys.stderr, start_new_session=True
        )
        try:
            return process.wait(max(left, 1))
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done in {self.seconds / 60:g} minutes") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def unpack(work: Path) -> Path:
    """The folder of the source distribution of the PEFT that is installed."""
    name = f"peft-{version('peft')}"
    if not (work / name).exists():
        command = [sys.executable, "-m", "pip", "download", name.replace("-", "=="), "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "-q", "-d", str(work)]
        subprocess.run(command, check=True)
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    (work / name / "tests" / "__init__.py").touch()
    return work / name


def read(report: Path) -> dict[str, dict]:
    results: dict[str, dict] = {}
    for line in report.read_text().splitlines() if report.exists() else []:
        entry = json.loads(line)
        result = results.setdefault(
            entry["test"], {"passed": False, "reason": "", "patched": 0, "refused": {}}
        )
        if entry["when"] == "call":
            result["passed"] = entry["outcome"] == "passed"
        elif entry["outcome"] == "failed":
            result["passed"] = False
        result["reason"] = result["reason"] or entry["reason"]
        if entry["counts"]:
            result.update(entry["counts"])
    return results


if __name__ == "__main__":
    sys.exit(main())
