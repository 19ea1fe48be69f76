from __future__ import annotations

import os

# Before any Hugging Face library is imported: the tests need no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import json
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent


@pytest.fixture(scope="session")
def golden() -> dict:
    """Numbers of the paper's reference implementation, in float64."""
    return json.loads((TESTS / "golden.json").read_text())
