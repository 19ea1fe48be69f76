"""However an optimizer step is cut into micro-batches and processes, the same model is trained."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.conftest import TESTS, WORKER_ENVIRONMENT, launch_two_processes
from tests.equivalence_worker import CASES, CUTS, NUM_EVAL_EXAMPLES, has_teacher


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("equivalence")
    found = {}
    launchers = {
        1: [sys.executable],
        2: launch_two_processes(),
    }
    for num_processes, launcher in launchers.items():
        output = folder / f"{num_processes}.pt"
        worker = [str(TESTS / "equivalence_worker.py"), "--expected_processes", str(num_processes)]
        subprocess.run([*launcher, *worker, "--output", str(output)], check=True, cwd=folder, env=WORKER_ENVIRONMENT)
        found.update(torch.load(output, weights_only=False))
    return found


ALL_CUTS = [cut for cuts in CUTS.values() for cut in cuts]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cut", ALL_CUTS[1:], ids=["8 x 4 accumulated", "2 processes x 16", "2 x (8 x 2 accumulated)"])
def test_same_weights(outcomes, case, cut):
    whole, parts = outcomes[(*case, ALL_CUTS[0])]["weights"], outcomes[(*case, cut)]["weights"]
    assert (parts - whole).norm() / whole.norm() < 1e-6
    # The comparison would notice: training moved the weights by far more than that.
    other = outcomes[(case[0], "ce" if case[1] != "ce" else "bkd", 76, ALL_CUTS[0])]["weights"]
    assert (whole - other).norm() / whole.norm() > 1e-3


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cut", ALL_CUTS, ids=str)
def test_metrics_and_logs_count_each_example_once(outcomes, case, cut):
    whole, parts = outcomes[(*case, ALL_CUTS[0])], outcomes[(*case, cut)]
    assert parts["num_predictions"] == NUM_EVAL_EXAMPLES
    for name, value in whole["metrics"].items():
        if not name.endswith(("runtime", "second", "time")):
            assert parts["metrics"][name] == pytest.approx(value, abs=1e-5), name
    assert len(parts["logs"]) == len(whole["logs"]) == 3
    for log, other in zip(whole["logs"], parts["logs"], strict=True):
        for name in {"loss", "ce_loss", "kd_loss"} & set(log):
            assert other[name] == pytest.approx(log[name], rel=1e-5), name
        assert ("kd_loss" in log) == has_teacher(case[1])


def test_parts_of_the_loss_add_up(outcomes):
    # Logged over two full steps; α is 1.
    log = outcomes[("vit", "bkd", 76, ALL_CUTS[0])]["logs"][0]
    assert log["loss"] == pytest.approx(log["ce_loss"] + log["kd_loss"], rel=1e-5)
    assert np.isfinite(log["kd_loss"])
