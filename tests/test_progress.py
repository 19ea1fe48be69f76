"""What a run prints during training."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from bkd_hf import BKDConfig, BKDTrainer
from bkd_hf.progress import ProgressTable, show_progress
from tests.test_trainer import images, vit


@pytest.mark.parametrize(
    ("options", "titles", "lines"),
    [
        ({"eval_strategy": "epoch", "logging_strategy": "epoch"}, "loss test loss accuracy % medium few worst", 2),
        ({"eval_strategy": "epoch", "logging_strategy": "epoch", "log_level": "warning"}, None, 0),
        ({"logging_steps": 4}, "loss", 2),  # none follows
        ({"logging_strategy": "no"}, None, 0),
    ],
)
@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_line_for_each_evaluation_and_no_bar_without_a_terminal(
    tmp_path, capsys, options, titles, lines, disable_tqdm
):
    args = BKDConfig(
        str(tmp_path), method="ce", num_train_epochs=2, save_strategy="no", use_cpu=True, disable_tqdm=disable_tqdm,
        **options,
    )  # fmt: skip
    trainer = BKDTrainer(vit(), args=args, train_dataset=images(), eval_dataset=images())
    show_progress(trainer, print)
    trainer.train()
    out, err = capsys.readouterr()
    printed = out.splitlines()
    assert len(printed) == lines + bool(lines)
    assert "it/s" not in err
    if lines:
        assert " ".join(printed[0].split()) == f"epoch {titles}"
        assert all(len(line) <= 80 and re.match(r" +[\d.]+/2( +\d+\.\d+)+$", line) for line in printed[1:])
        assert len({len(line) for line in printed}) == 1  # columns stand below each other


def test_a_column_that_appears_later_has_its_title(capsys):
    table, told = ProgressTable(print), SimpleNamespace(num_train_epochs=3, log_level="passive", should_evaluate=False)
    for logs in ({"loss": 1.5}, {"eval_loss": 0.5, "eval_accuracy": 0.25}, {"loss": 0.7}, {"train_runtime": 1.0}):
        table.on_log(told, told, told, {**logs, "epoch": 1.0})
    first, _, second, full, last = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (first, second[-2:]) == (["epoch", "loss"], ["accuracy", "%"])
    assert (full, last) == (["1/3", "0.500", "25.0"], ["1/3", "0.700"])
