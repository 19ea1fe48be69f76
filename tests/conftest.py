from __future__ import annotations

import os

# Before any Hugging Face library is imported: the tests need no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Before torch is imported: waiting threads should not keep shared cores busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import gc
import importlib.util
import json
import socket
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from transformers import set_seed

# For tiny models, more threads only wait for each other.
torch.set_num_threads(1)

# The same examples in every run, so that results are reproducible.
settings.register_profile("deterministic", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("deterministic")

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
#: For scripts in this folder, which import from it.
WORKER_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


#: Longest first, so that no process runs one of them alone at the end.
_LONGEST = (
    "compare",
    "cli",
    "teachers",
    "stopping",
    "nodes",
    "sharding",
    "equivalence",
    "resume",
    "teacher_logits",
    "onnx_export",
    "hub",
    "faults",
    "benchmark",
    "program",
    "trainer",
)


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist distribute the files in our order, not by their numbers of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    order = {f"test_{name}": number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """Spare the collections, several in each training, a look at all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _environment_of_its_own():
    """Restore environment variables and the number of threads after each test; set the same seed before it.

    `TrainingArguments(fsdp=…)` sets environment variables for accelerate. A process forked after its parent has used
    several threads does not have them, and would wait for them.
    """
    before = {**os.environ}
    torch.set_num_threads(1)
    set_seed(0)  # independent of earlier tests
    yield
    for name in {*os.environ, *before} - {"PYTEST_CURRENT_TEST"}:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture(scope="session")
def golden() -> dict:
    """Numbers of the paper's reference implementation, in float64."""
    return json.loads((TESTS / "golden.json").read_text())


def load_script(name: str) -> ModuleType:
    """A script in `scripts/` as a module, without a process for it."""
    specification = importlib.util.spec_from_file_location(f"script {name}", REPOSITORY / "scripts" / name)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # needed by its dataclasses
    specification.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch_two_processes() -> tuple[str, ...]:
    """A launcher of two processes on the CPU (`accelerate launch --cpu --num_processes 2` would start one)."""
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    return ("accelerate", "launch", *options.split(), "--main_process_port", str(free_port()))
