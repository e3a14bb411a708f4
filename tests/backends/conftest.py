"""Lets the suite run as a user who can't write to the checkout: Hypothesis keeps its examples elsewhere then."""

from __future__ import annotations

import os
import tempfile

_examples = ".hypothesis" if os.path.isdir(".hypothesis") else "."
if not all(os.access(place, os.W_OK) for place in (_examples, ".")):
    # Read by Hypothesis when it first needs a place; without one it warns, and our warnings are errors.
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", tempfile.mkdtemp(prefix="ublk_trio-hypothesis-"))
