"""The same model is trained, no matter how an optimizer step is split into micro-batches and processes."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import pytest
import torch

from bkd_hf import BKDConfig, BKDTrainer
from tests.equivalence_worker import CASES, CUTS, FEW_CASES, NUM_EVAL_EXAMPLES, has_teacher, train_all
from tests.faults import in_two_processes
from tests.tiny_models import tiny_vit


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("equivalence")
    chosen = [item for item in request.session.items if item.module is request.module]
    cases = CASES if any(item.get_closest_marker("slow") for item in chosen) else FEW_CASES
    alone = multiprocessing.get_context("fork").Process(target=train_all, args=(cases, 1, folder / "1.pt"))
    alone.start()
    in_two_processes(train_all, cases, 2, folder / "2.pt")
    alone.join()
    assert alone.exitcode == 0
    return torch.load(folder / "1.pt", weights_only=False) | torch.load(folder / "2.pt", weights_only=False)


ALL_CUTS = [cut for cuts in CUTS.values() for cut in cuts]
ALL_CASES = [pytest.param(case, id=str(case), marks=() if case in FEW_CASES else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", ALL_CASES)
@pytest.mark.parametrize("cut", ALL_CUTS[1:], ids=["8 x 4 accumulated", "2 processes x 16", "2 x (8 x 2 accumulated)"])
def test_same_weights(outcomes, case, cut):
    whole, parts = outcomes[(*case, ALL_CUTS[0])]["weights"], outcomes[(*case, cut)]["weights"]
    assert (parts - whole).norm() / whole.norm() < 1e-6
    # The comparison would notice: training moved the weights by far more than that.
    other = outcomes[(case[0], "ce" if case[1] != "ce" else "bkd", 76, ALL_CUTS[0])]["weights"]
    assert (whole - other).norm() / whole.norm() > 1e-3


@pytest.mark.parametrize("case", ALL_CASES)
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


# ---- What a user may bring


class Pairs(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(pairs(NUM_EVAL_EXAMPLES, seed=1))


def pairs(number: int, seed: int = 0) -> list[tuple[torch.Tensor, int]]:
    pixels = torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [(image, index % 5) for index, image in enumerate(pixels)]


def with_labels(batch: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    images, labels = zip(*batch, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def train_on_pairs(folder: str, batch_size: int, **options: Any) -> tuple[np.ndarray, float, float]:
    """Train on 33 pairs of image and label, after an evaluation; return weights, loss before, and after."""
    args = BKDConfig(
        folder, method="ce", max_steps=6, per_device_train_batch_size=batch_size, optim="sgd", learning_rate=0.1,
        per_device_eval_batch_size=8, save_strategy="no", use_cpu=True, disable_tqdm=True, report_to=[], **options,
    )  # fmt: skip
    trainer = BKDTrainer(
        tiny_vit(0, 5), None, args, with_labels, pairs(33), Pairs(), class_counts=[7, 7, 7, 6, 6]
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return weights.numpy(), before, trainer.evaluate()["eval_loss"]


def train_compiled_on_pairs(folder: str) -> tuple[np.ndarray, float, float]:
    options = {"torch_compile_backend": "eager", "accelerator_config": {"dispatch_batches": False}}
    return train_on_pairs(folder, 8, torch_compile=True, **options)


@pytest.mark.slow
def test_two_compiled_processes_train_after_an_evaluation_as_one(tmp_path):
    """The last step of each epoch has one example, so that the other process computes an ignored copy."""
    weights, *losses = train_on_pairs(str(tmp_path), 16)
    found = in_two_processes(train_compiled_on_pairs, str(tmp_path))
    for of_rank, *losses_of_rank in found.values():
        assert np.linalg.norm(of_rank - weights) / np.linalg.norm(weights) < 1e-5
        assert losses_of_rank == pytest.approx(losses, rel=1e-4)
