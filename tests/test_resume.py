"""A run that was killed and resumed ends with the very weights of one that was not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch

from tests.conftest import TESTS, WORKER_ENVIRONMENT
from tests.resume_worker import STEPS_PER_EPOCH

KILLED_AT = 10 + 3  # in the middle of the third epoch; the last checkpoint, at 12, is within it too


def run(*options: object) -> int:
    return subprocess.run(
        [sys.executable, str(TESTS / "resume_worker.py"), *map(str, options)], env=WORKER_ENVIRONMENT
    ).returncode


@pytest.mark.parametrize("kind", ["resnet", "vit", "ema"])
def test_bitwise_after_a_kill(tmp_path, kind):
    assert run("--kind", kind, "--workers", 0, 2, "--output_dir", tmp_path / "whole") == 0
    for workers in (0, 2):
        options = ("--kind", kind, "--workers", workers, "--output_dir", tmp_path / "killed", "--kill_at", KILLED_AT)
        assert run(*options) == -signal.SIGKILL
        state = json.loads((tmp_path / "killed" / str(workers) / "checkpoint-12/trainer_state.json").read_text())
        assert state["global_step"] % STEPS_PER_EPOCH  # in the middle of an epoch
    # Half a checkpoint, as a kill while saving leaves it, is not taken for one.
    (tmp_path / "killed" / "0" / "checkpoint-16").mkdir()
    assert run("--kind", kind, "--workers", 0, 2, "--output_dir", tmp_path / "killed", "--resume") == 0

    weights = [
        torch.load(tmp_path / folder / str(workers) / "weights.pt")
        for folder in ("whole", "killed")
        for workers in (0, 2)
    ]
    for other in weights[1:]:
        assert weights[0].keys() == other.keys()
        assert all(torch.equal(weights[0][name], other[name]) for name in other)
    rates = [
        {
            entry["step"]: entry["learning_rate"]
            for entry in json.loads(path.read_text())["log_history"]
            if "loss" in entry
        }
        for path in (tmp_path / "whole/0/trainer_state.json", tmp_path / "killed/0/trainer_state.json")
    ]
    assert rates[0] == rates[1]
