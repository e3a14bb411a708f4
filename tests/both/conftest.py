"""One test body, two kernels: every test that takes `arm` runs on the simulator, and on the real driver where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.both.arms import Arm, RealArm, SimArm, has_real_kernel

ARMS: dict[str, type[SimArm | RealArm]] = {"sim": SimArm, "real": RealArm} if has_real_kernel() else {"sim": SimArm}


@pytest.fixture(params=list(ARMS))
def arm(request: pytest.FixtureRequest) -> Iterator[Arm]:
    """A kernel; at the end of the test nothing may be left on it."""
    arm: Arm = ARMS[request.param]()
    yield arm
    assert arm.leftovers() == []
