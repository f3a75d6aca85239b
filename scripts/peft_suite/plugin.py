"""Pytest plugin: patches every PEFT model that a test makes, and writes each test's outcome down.

PEFT_SUITE_PATCH=1 patches; PEFT_SUITE_REPORT names the file of the outcomes, one JSON line for each
phase of a test; PEFT_SUITE_ONLY names a file with the ids to run.
"""

import collections
import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest

import sapt_fast

CONFIGS = {name for name in vars(peft) if name.endswith("Config")}
REFUSALS = (ValueError, TypeError, NotImplementedError)


class Patcher:
    """Patches the models that PEFT makes, when the outermost call that makes one returns."""

    def __init__(self) -> None:
        self.depth = 0
        self.patched = 0
        self.refused: collections.Counter[str] = collections.Counter()

    def install(self) -> None:
        makers = [peft.PeftModel]
        for kind in makers:
            makers += [sub for sub in kind.__subclasses__() if sub not in makers]
            if "__init__" in vars(kind):
                kind.__init__ = self.wrap(kind.__init__, lambda args, made: args[0])
        from_pretrained = self.wrap(peft.PeftModel.from_pretrained.__func__, lambda _, made: made)
        peft.PeftModel.from_pretrained = classmethod(from_pretrained)
        made_by_name = self.wrap(peft.get_peft_model, lambda _, made: made)
        for module in (peft, peft.mapping_func):
            module.get_peft_model = made_by_name

    def wrap(self, make: Callable, model_of: Callable) -> Callable:
        @functools.wraps(make)
        def made_and_patched(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            try:
                made = make(*args, **kwargs)
            finally:
                self.depth -= 1
            if self.depth == 0:
                self.patch(model_of(args, made))
            return made

        return made_and_patched

    def patch(self, model: Any) -> None:
        """Any error but a refusal is the test's own failure."""
        if not isinstance(model, peft.PeftModel) or getattr(model, "sapt", None) is not None:
            return
        try:
            sapt_fast.patch(model)
        except REFUSALS as error:
            kinds = sorted({str(c.peft_type).split(".")[-1] for c in model.peft_config.values()})
            reason = re.sub(r"[:;]? *[{\[].*| got \w+,| this \w+", "", str(error).splitlines()[0])
            self.refused[f"{'+'.join(kinds)}: {reason[:80]}"] += 1
        else:
            self.patched += 1

    def counts(self) -> dict:
        counts = {"patched": self.patched, "refused": dict(self.refused)}
        self.patched = 0
        self.refused.clear()
        return counts


patcher = Patcher()


def pytest_configure(config: pytest.Config) -> None:
    import tests.testing_utils as utils

    # the suite's own version goes online for every model that it has not seen yet
    utils.hub_online_once = lambda model_id: contextlib.nullcontext()
    if os.environ.get("PEFT_SUITE_PATCH") == "1":
        patcher.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of other methods than LoRA, by the config in their name."""
    only = os.environ.get("PEFT_SUITE_ONLY")
    chosen = set(Path(only).read_text().splitlines()) if only else None
    wanted, others = [], []
    for item in items:
        words = set(item.name.replace("[", "-").replace("]", "-").split("-"))
        named = words & CONFIGS
        of_lora = "LoraConfig" in named or not named
        keep = of_lora if chosen is None else item.nodeid in chosen
        (wanted if keep else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = wanted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if report.when == "teardown":
        report.user_properties = [*report.user_properties, ("sapt_fast", patcher.counts())]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With several processes only the first, which hears of all tests, has the file."""
    path = os.environ.get("PEFT_SUITE_REPORT")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    reason = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = crash.message if crash is not None else str(report.longrepr)
    line = {
        "test": report.nodeid,
        "when": report.when,
        "outcome": report.outcome,
        "reason": reason[:500],
        "counts": dict(report.user_properties).get("sapt_fast"),
    }
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
