"""A pytest plugin with the fixture `sim_kernel`; load it with ``pytest_plugins = ["ublk_trio.testing.plugin"]``.

Not an entry point: pytest would import it, and with it Trio and the engine, in every project that has ublk_trio installed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ublk_trio.kernel_sim import SimKernel


@pytest.fixture
def sim_kernel(request: pytest.FixtureRequest) -> Iterator[SimKernel]:
    """A simulated kernel, calm; at the end of the test its server must have kept the contract and left nothing.

    With ``@pytest.mark.parametrize("sim_kernel", [{"version": (6, 12)}, …], indirect=True)`` the arguments of `SimKernel`.
    """
    kernel = SimKernel(**getattr(request, "param", {}))
    yield kernel
    kernel.check()
    assert not kernel.leftovers(), kernel.leftovers()
