"""``features``: what this kernel's driver offers."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from ublk_trio.cli.exit_codes import ExitCode
from ublk_trio.cli.output import print_json, print_rows
from ublk_trio.control import open_control
from ublk_trio.errors import KernelUnavailableError
from ublk_trio.real import RealKernel
from ublk_trio.uapi import FEATURE_RELEASE, Feature


async def features(*, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Show what this kernel's ublk driver offers, by name, and the Linux release that each feature came with.

    Parameters
    ----------
    json
        Print a JSON object of names and booleans instead.
    """
    async with open_control(RealKernel()) as control:
        offered = control.features
    if offered is None:
        raise KernelUnavailableError("this kernel's driver cannot be asked for its features: that needs Linux 6.5")
    if json:
        print_json({feature.name: feature in offered for feature in Feature})
        return ExitCode.OK
    print_rows(
        [
            {
                "feature": feature.name,
                "offered": "yes" if feature in offered else "no",
                "since": "Linux {}.{}".format(*FEATURE_RELEASE[feature]),
            }
            for feature in Feature
        ],
        ("feature", "offered", "since"),
    )
    return ExitCode.OK
