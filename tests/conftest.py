from __future__ import annotations

import os

# Before any Hugging Face library is imported: the tests need no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import json
from pathlib import Path

import pytest
import torch

# Tiny models: more threads only wait for each other.
torch.set_num_threads(1)

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent


@pytest.fixture(scope="session")
def golden() -> dict:
    """Numbers of the paper's reference implementation, in float64."""
    return json.loads((TESTS / "golden.json").read_text())


def free_port() -> int:
    """A port for the processes of a launcher to meet at."""
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
