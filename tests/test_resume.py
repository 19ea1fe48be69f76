"""A run that was killed and resumed ends with the same weights as one that was not."""

from __future__ import annotations

import json
import multiprocessing
import signal
from pathlib import Path

import pytest
import torch

from tests.resume_worker import STEPS_PER_EPOCH, train

KILLED_AT = 10 + 3  # in the middle of the third epoch; the last checkpoint, at 12, is within it too


def run(
    kind: str, workers: tuple[int, ...], output_dir: Path, kill_at: int | None = None, resume: bool = False
) -> int:
    """Train in a process of its own; return its exit code."""
    process = multiprocessing.get_context("fork").Process(
        target=lambda: [train(kind, number, output_dir / str(number), kill_at, resume) for number in workers]
    )
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("kind", ["resnet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("vit", "ema"))])
def test_bitwise_after_a_kill(tmp_path, kind):
    assert run(kind, (0, 2), tmp_path / "whole") == 0
    for workers in (0, 2):
        assert run(kind, (workers,), tmp_path / "killed", kill_at=KILLED_AT) == -signal.SIGKILL
        state = json.loads((tmp_path / "killed" / str(workers) / "checkpoint-12/trainer_state.json").read_text())
        assert state["global_step"] % STEPS_PER_EPOCH  # in the middle of an epoch
    # Half a checkpoint, as a kill while saving leaves it, is not taken for one.
    (tmp_path / "killed" / "0" / "checkpoint-16").mkdir()
    assert run(kind, (0, 2), tmp_path / "killed", resume=True) == 0

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
