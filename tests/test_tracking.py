"""What a tracker shows during a training, read from the files that the real packages write."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from bkd_hf import BKDConfig, BKDTrainer
from tests.test_trainer import images, vit

METRICS = {"accuracy": 0.9, "medium_shot_accuracy": 0.9, "few_shot_accuracy": 0.9, "per_class_accuracy": [0.9] * 5}
SHOWN = {"eval/accuracy", "eval/medium_shot_accuracy", "eval/few_shot_accuracy", "eval/worst_class_accuracy"}


class Plain(nn.Module):
    """No model of transformers: it has no configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.model = vit()

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.model(pixel_values=pixel_values)


def train(tracker: str, folder: Path, monkeypatch) -> list[float]:
    """Two epochs of two steps; returns what their evaluations measured."""
    monkeypatch.setenv("TRACKIO_DIR", str(folder / "trackio"))  # read when it is imported
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "runs"))
    pytest.importorskip(tracker, reason=f"{tracker} (extra `trackers`) is not installed")
    args = BKDConfig(
        str(folder / "student"), method="ce", num_train_epochs=2, per_device_train_batch_size=20, report_to=tracker,
        eval_strategy="epoch", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = BKDTrainer(Plain(), args=args, train_dataset=images(), eval_dataset=images())
    trainer.class_figures.known = {"teacher": {"model": "a teacher", "metrics": METRICS}}
    trainer.train()
    trainer.measure(images())
    return [entry["eval_few_shot_accuracy"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_tensorboard_shows_metrics_and_the_figure_at_each_evaluation(tmp_path, monkeypatch):
    measured = train("tensorboard", tmp_path, monkeypatch)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert set(events.Tags()["scalars"]) >= SHOWN
    assert [event.value for event in events.Scalars("eval/few_shot_accuracy")] == pytest.approx(measured)
    first, second = events.Images("eval/class_accuracy")
    assert (first.step, second.step) == (2, 4)
    assert first.encoded_image_string != second.encoded_image_string
    assert Image.open(io.BytesIO(first.encoded_image_string)).size[0] >= 900


def test_trackio_shows_them_in_one_run(tmp_path, monkeypatch):
    measured = train("trackio", tmp_path, monkeypatch)
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    trackio.finish()
    (run,) = trackio.Api().runs("huggingface")
    assert run.name == str(tmp_path / "student").strip("/")  # below its folder, wherever that is
    logs = SQLiteStorage.get_logs("huggingface", run.name)
    assert {name for log in logs for name in log} >= SHOWN
    assert [log["eval/few_shot_accuracy"] for log in logs if "eval/few_shot_accuracy" in log][:2] == measured
    pictures = [log["eval/class_accuracy"]["caption"] for log in logs if "eval/class_accuracy" in log]
    assert pictures == ["after step 2", "after step 4"]
    first, second = (path.read_bytes() for path in (tmp_path / "trackio" / "media").rglob("*.png"))
    assert first != second
