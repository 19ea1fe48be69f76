"""What a tracker shows while a training goes on, read from the stores that the real packages write."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from bkd_hf import BKDConfig, BKDTrainer
from tests.test_trainer import images, vit


@pytest.fixture
def trained(tmp_path, monkeypatch):
    def train(tracker: str) -> BKDTrainer:
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
        pytest.importorskip(tracker, reason=f"{tracker} (extra `trackers`) is not installed")
        args = BKDConfig(
            str(tmp_path / "student"), method="ce", num_train_epochs=2, eval_strategy="epoch", save_strategy="no",
            report_to=tracker, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = BKDTrainer(vit(), args=args, train_dataset=images(), eval_dataset=images())
        trainer.class_figures.known = {"teacher": {"model": "a teacher", "metrics": METRICS}}
        trainer.train()
        trainer.measure(images())
        return trainer

    return train


METRICS = {"accuracy": 0.9, "medium_shot_accuracy": 0.9, "few_shot_accuracy": 0.9, "per_class_accuracy": [0.9] * 5}
SHOWN = {"eval/accuracy", "eval/medium_shot_accuracy", "eval/few_shot_accuracy", "eval/worst_class_accuracy"}


def measured(trainer: BKDTrainer) -> list[float]:
    return [entry["eval_few_shot_accuracy"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_tensorboard_shows_metrics_and_the_figure_at_each_evaluation(trained, tmp_path):
    trainer = trained("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert set(events.Tags()["scalars"]) >= SHOWN
    logged = [event.value for event in events.Scalars("eval/few_shot_accuracy")]
    assert logged == pytest.approx(measured(trainer))
    figures = events.Images("eval/class_accuracy")
    assert [figure.step for figure in figures] == [event.step for event in events.Scalars("eval/accuracy")]
    assert len({figure.encoded_image_string for figure in figures}) == len(figures) == 2
    assert Image.open(io.BytesIO(figures[0].encoded_image_string)).size[0] >= 900


def test_trackio_shows_them_in_one_run(trained, tmp_path):
    trainer = trained("trackio")
    import trackio

    trackio.finish()
    (run,) = trackio.Api().runs("huggingface")
    assert run.name == str(tmp_path / "student").strip("/")  # below its folder, wherever that is
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("huggingface", run.name)
    assert [log["eval/few_shot_accuracy"] for log in logs if "eval/few_shot_accuracy" in log][:2] == measured(trainer)
    assert {name for log in logs for name in log} >= SHOWN
    pictures = [log["eval/class_accuracy"] for log in logs if "eval/class_accuracy" in log]
    assert [picture["caption"] for picture in pictures] == ["after step 5", "after step 10"]
    (first, second) = sorted((tmp_path / "trackio" / "media").rglob("*.png"))
    assert first.read_bytes() != second.read_bytes()
