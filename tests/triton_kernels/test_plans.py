"""Plans repeat the launches of an ordinary call; see `plan_cases` for what is compared."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from uninterpreted import printed

pytest.importorskip("triton")

from sapt_fast.triton_kernels.blocks import launchers


def test_a_plan_launches_what_an_ordinary_call_launches() -> None:
    lines = printed(str(Path(__file__).with_name("plan_cases.py"))).splitlines()
    assert len(lines) >= 36
    assert all(line.endswith(" ok") for line in lines)


class Launcher:
    """Hands the kernel's arguments on one by one, as Triton's launchers before 3.9 do."""

    global_scratch_size = profile_scratch_size = 0

    def __call__(self, gridX, gridY, gridZ, stream, function, *args):  # noqa: N803 - as Triton's
        scratch = self.global_scratch_size or None
        self.launch(gridX, gridY, gridZ, stream, function, False, scratch, *args)


@pytest.mark.parametrize("scratch", [0, 64])
def test_a_launch_hands_on_what_the_launcher_does(scratch):
    seen = []
    launcher = Launcher()
    launcher.launch = lambda *given: seen.append(given)
    launcher.global_scratch_size = scratch
    kernel = SimpleNamespace(run=launcher, function=7, packed_metadata=(1, 2))
    launch = launchers.prepared(kernel, (4, 2, 1), 3)
    assert not seen
    launch.on(99)((10, 11, 12))
    launcher(4, 2, 1, 99, 7, (1, 2), None, None, None, 10, 11, 12)
    assert seen[0] == seen[1]
    assert (launch.function is launcher) == bool(scratch)


def test_a_launcher_that_is_not_known_is_left_alone():
    other = SimpleNamespace(run=lambda *args: None, function=7, packed_metadata=())
    assert launchers.prepared(other, (1, 1, 1), 0) is None
    assert launchers.prepared(SimpleNamespace(), (1, 1, 1), 0) is None
