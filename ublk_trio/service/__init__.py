"""What an operator's process holds: named backends, a target, its disks."""

from __future__ import annotations
