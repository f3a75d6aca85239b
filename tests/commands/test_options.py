"""Every option of every command: a bad value is named before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sapt_fast import cli
from sapt_fast.commands.demo import run_demo
from sapt_fast.continual.data.sources import Source
from sapt_fast.continual.settings import ContinualSettings, GeneratorSettings

HUGE = "9" * 400
NOT_NUMBERS = ("nan", "inf", "-inf", "1e400")
NOT_COUNTS = ("0", "-1", HUGE)

POSITIVE = ("learning-rate", "key-learning-rate", "query-learning-rate", "epochs", "save-steps")
POSITIVE += ("label-temperature", "lora-alpha", "temperature")
FROM_ZERO = ("weight-decay", "max-grad-norm", "own-key-loss", "kl-ratio", "lora-dropout")
COUNTS = ("steps", "batch-size", "accumulation", "max-source-length", "max-target-length")
COUNTS += ("eval-batch-size", "prompt-length", "r", "replay-batch-size", "max-train", "max-eval")
CHOICES = ("strategy", "preset", "kind", "device", "dtype", "attention", "metric", "scored")
CHOICES += ("adapter", "pooling", "key-init", "benchmark", "dev")
SHORT = {"lora-alpha": "alpha", "lora-dropout": "dropout"}


ErrorOf = Callable[..., str]


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> ErrorOf:
    """Runs a command for its error, which must be a single line of ours."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sapt-fast", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        text = capsys.readouterr().err
        assert ended.value.code in (1, 2)  # 2 is the parser's
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        return text

    return run


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded, no task read, nothing timed."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("something ran")

    monkeypatch.setattr("sapt_fast.demo.backbone.load_backbone", forbidden)
    monkeypatch.setattr(Source, "load_tasks", forbidden)
    monkeypatch.setattr("sapt_fast.commands.bench._seconds", forbidden)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", forbidden)


TRAIN = (
    *((name, value) for name in POSITIVE for value in (*NOT_NUMBERS, "0", "-1", "1e300")),
    *((name, value) for name in FROM_ZERO for value in (*NOT_NUMBERS, "-0.1", "1e300")),
    *((name, value) for name in COUNTS for value in (*NOT_COUNTS, "nan", "0.5")),
    *((name, value) for name in CHOICES for value in ("zz", "", "\x1b")),
    *(("seed", value) for value in ("-1", HUGE, "nan", str(2**32))),
    *(("instruction-tokens", value) for value in ("-1", HUGE)),
    *(("replay-share", value) for value in ("0", "1.5", "-1", "nan")),
    *(("replay", value) for value in ("",)),
    *(("strategy-option", value) for value in ("zz", "=1", "zz=1")),
)


@pytest.mark.parametrize("name", sorted({name for name, _ in TRAIN}))
def test_train(name: str, error_of: ErrorOf, tmp_path: Path) -> None:
    given = {"model": "demo", "benchmark": "demo", "output": str(tmp_path / "run")}
    if name == "dev":  # the demo has none to choose
        given |= {"benchmark": "superni", "data": str(tmp_path)}
    option = f"--{SHORT.get(name, name)}"
    for value in [value for other, value in TRAIN if other == name]:
        arguments = [x for n, v in given.items() if n != name for x in (f"--{n}", v)]
        text = error_of("train", *arguments, f"{option}={value}")
        words = (name, name.replace("-", "_"), option)
        assert any(word in text for word in words), text
        assert "got" in text or "has no 'zz'" in text, text
    assert not (tmp_path / "run").exists()


ALONE = {"scores": '{"first": 1e400}', "nan": '{"first": NaN}', "list": "[1]"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "/missing"), "model: got '/missing', which does not exist"),
        (("--model", "./missing"), "model: got 'missing', which does not exist"),
        (("--model", "~/missing/model"), "which does not exist; expected a folder that contains"),
        (("--model", "{file}"), "file', which is a file"),
        (("--model", "{folder}"), "which contains no config.json"),
        (("--model", ""), "model: got '', expected a folder"),
        (("--data", "/missing"), "data: got '/missing', but the demo's tasks are generated"),
        (("--benchmark", "superni", "--data", "/missing"), "data: got '/missing', which does"),
        (("--benchmark", "superni", "--data", "{file}"), "which is a file"),
        (("--output", "{file}"), "output_dir: got"),
        (("--output", "{file}/run"), "is not a folder"),
        (("--alone", "/missing"), "alone: got '/missing', which is no file"),
        (("--alone", "{scores}"), "first: got inf, expected a number of at least 0"),
        (("--alone", "{nan}"), "nan: not JSON (NaN is not a JSON number)"),
        (("--alone", "{list}"), "list holds list, expected scores by task"),
        (("--alone", "{scores}", "--fwt"), "alone: give --alone or --fwt, not both"),
        (("--strategy", "single", "--fwt"), "fwt: got --fwt, but strategy 'single'"),
        (("--strategy", "single", "--alone", "{scores}"), "alone: got --alone, but"),
        (("--steps", "3", "--epochs", "2"), "steps: give --steps or --epochs, not both"),
        (("--order", "1", "--tasks", "a"), "order: give --order or --tasks, not both"),
        (("--generator", "steps=3"), "expected --replay generated with it"),
        (("--replay", "generated", "--generator", "steps=nan"), "generator.steps: got 'nan'"),
        (("--replay", "generated", "--generator", "share=2"), "generator.share: got 2"),
        (("--device", "cuda"), "device: got 'cuda', but torch sees no GPU"),
        (("--kind", "causal"), "kind: got 'causal', but the demo's model is seq2seq"),
        (("--dev", "released"), "dev: got 'released', but the demo's tasks"),
        (("--config", "/missing"), "/missing"),
    ],
)
def test_train_paths_and_contradictions(
    arguments: tuple[str, ...],
    message: str,
    error_of: ErrorOf,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    places = {name: tmp_path / name for name in ("file", "folder", *ALONE)}
    places["file"].write_text("")
    places["folder"].mkdir()
    for name, text in ALONE.items():
        places[name].write_text(text)
    filled = [text.format(**places) for text in arguments]
    defaults = ("--model", "demo", "--benchmark", "demo", "--output", str(tmp_path / "run"))
    assert message in error_of("train", *defaults, *filled)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "nan"), "seeds: got 'nan'"),
        (("--seeds", "-1"), "seeds: got -1"),
        (("--seeds", HUGE), "seeds: got"),
        (("--seeds", "0,0"), "seeds: got [0, 0]"),
        (("--seeds", ""), "seeds: got ''"),
        (("--strategies", "zz"), "strategies: got 'zz'"),
        (("--strategies", ""), "strategies: got"),
        (("--set", "learning_rate=NaN"), "learning_rate: got nan"),
        (("--set", "learning_rate=abc"), "learning_rate: got 'abc'"),
        (("--set", "learning_rate=true"), "learning_rate: got True"),
        (("--set", "steps=1.5"), "steps: got 1.5"),
        (("--set", "bf16=1"), "bf16: got 1"),
        (("--set", "replay=3"), "replay: got 3"),
        (("--set", "steps=1" + "0" * 200), "steps: got a number of"),
        (("--set", "sapt.zz=1"), "zz"),
        (("--attention", "zz"), "attention: got 'zz'"),
        (("--max-train", "0"), "max_train: got 0"),
        (("--model", "/missing"), "model: got '/missing'"),
        (("--output", "/dev/null"), "output_dir: got '/dev/null'"),
    ],
)
def test_compare(
    arguments: tuple[str, ...], message: str, error_of: ErrorOf, tmp_path: Path
) -> None:
    defaults = ("--model", "demo", "--benchmark", "demo", "--output", str(tmp_path / "all"))
    assert message in error_of("compare", *defaults, *arguments)
    assert not (tmp_path / "all").exists()


BENCH = (
    *(("seconds", value) for value in (*NOT_NUMBERS, "0", "-1", "1e9")),
    *(
        (name, value)
        for name in ("batch", "tokens", "inputs", "outputs", "tasks", "rank")
        for value in (*NOT_COUNTS, "nan", "2147483647")
    ),
    *((name, value) for name in ("device", "dtype") for value in ("zz", "", "cuda:99")),
)


@pytest.mark.parametrize("name", sorted({name for name, _ in BENCH}))
def test_bench(name: str, error_of: ErrorOf) -> None:
    for value in [value for other, value in BENCH if other == name]:
        text = error_of("bench", f"--{name}={value}")
        assert name in text, text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "--widths", "nan"), "widths: got 'nan'"),
        (("tune", "--widths", "1x2x3"), "widths: got '1x2x3'"),
        (("tune", "--widths", "x"), "widths: got ''"),
        (("tune", "--ranks", HUGE), "ranks: got"),
        (("tune", "--rows", "0"), "rows: got '0'"),
        (("tune", "--rows", ""), "rows: got ''"),
        (("tune", "--dtypes", "int8"), "dtypes: got 'int8'"),
        (("tune", "--output", "/"), "output: got '/', which is a folder"),
        (("tune", "--output", "/dev/null/x"), "is not a folder"),
        (("--seconds", "1", "tune"), "seconds: `bench tune` does not take it"),
    ],
)
def test_bench_tune(arguments: tuple[str, ...], message: str, error_of: ErrorOf) -> None:
    assert message in error_of("bench", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "-1"), "seed: got -1"),
        (("--seed", HUGE), "seed: got a number of"),
        (("--output", "/dev/null"), "output: got '/dev/null'"),
    ],
)
def test_demo(arguments: tuple[str, ...], message: str, error_of: ErrorOf) -> None:
    assert message in error_of("demo", *arguments)


def test_demo_from_python(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed: got True, expected a whole number"):
        run_demo(tmp_path / "demo", seed=True)
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("value", [float("nan"), "3", None, True, 10**400, [1]])
@pytest.mark.parametrize("name", ["learning_rate", "batch_size", "weight_decay", "replay_share"])
def test_settings_of_other_types(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: got .*, expected a"):
        ContinualSettings(**{name: value})


@pytest.mark.parametrize("value", ["0.1", None, float("inf"), -1, True])
@pytest.mark.parametrize("name", ["learning_rate", "lora_dropout", "share"])
def test_generator_settings_of_other_types(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"generator\.{name}: got .*, expected a number"):
        GeneratorSettings(**{name: value})
