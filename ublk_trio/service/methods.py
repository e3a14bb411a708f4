"""Every method of the service, as one table."""

from __future__ import annotations

from typing import Any, Final

from ublk_trio.rpc import Method
from ublk_trio.service.methods_bdev import BDEV_METHODS
from ublk_trio.service.methods_config import CONFIG_METHODS
from ublk_trio.service.methods_plain import PLAIN_METHODS
from ublk_trio.service.methods_raid import RAID_METHODS
from ublk_trio.service.methods_rbd import RBD_METHODS
from ublk_trio.service.methods_setup import SETUP_METHODS
from ublk_trio.service.methods_stacked import STACKED_METHODS
from ublk_trio.service.methods_ublk import UBLK_METHODS
from ublk_trio.service.service import Service

METHODS: Final[tuple[Method[Service, Any], ...]] = (
    *BDEV_METHODS,
    *PLAIN_METHODS,
    *STACKED_METHODS,
    *RAID_METHODS,
    *RBD_METHODS,
    *UBLK_METHODS,
    *CONFIG_METHODS,
    *SETUP_METHODS,
)
