"""The documentation says what the code does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["tag.md", "simulator.md", "faults.md", "coverage.md"])
def test_generated_page_is_fresh(name: str) -> None:
    """A page drawn from the code is what `make docs` would write now."""
    assert (ROOT / "docs" / name).read_text() == load_generator().PAGES[name]()
