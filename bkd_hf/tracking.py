"""Sends the figure of accuracies per class to trackers at each evaluation, beside the metrics sent by `Trainer`."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from transformers import TrainerCallback

from .models import label_names
from .plots import plot_class_accuracy
from .results import describe_classes, described_task
from .tasks import task_of_model


class ClassFigures(TrainerCallback):
    """Sends the figure of accuracies per class to the trackers in `report_to` that accept images.

    Args:
        trainer: A `BKDTrainer`.

    Attributes:
        known: Sections of results for the figure: `data`, if more is known than the class counts, and `teacher`, if it
            has been measured.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.known: dict[str, Any] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the run by its folder; Trackio would invent a new name at each start and for the final evaluation."""
        args.run_name = args.run_name or args.output_dir.strip("./")  # also a place below its folder

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Draw and send the figure of the last evaluation."""
        trackers = {type(c).__name__: c for c in self.trainer.callback_handler.callbacks}
        shown, measured = trackers.keys() & {"TensorBoardCallback", "TrackioCallback"}, self.trainer.last_measured
        if not (shown and state.is_world_process_zero and measured is not None and measured.num_images):
            return
        counts, step = measured.class_counts.astype(int).tolist(), state.global_step
        names = label_names(getattr(self.trainer.model, "config", None)) or [
            str(number) for number in range(len(counts))
        ]
        results = {
            "data": describe_classes(names, counts, measured.labelled.tolist(), *measured.thresholds)
            | described_task(task_of_model(self.trainer.model)),
            **self.known,
            "student": {"model": f"after step {step:,}", "metrics": measured.compute()["metrics"]},
        }
        canvas = FigureCanvasAgg(plot_class_accuracy(results))
        canvas.draw()
        picture = np.asarray(canvas.buffer_rgba())[..., :3]
        name = next(name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime")) + "/class_accuracy"
        if "TensorBoardCallback" in shown:
            trackers["TensorBoardCallback"].tb_writer.add_image(name, picture, step, dataformats="HWC")
        if "TrackioCallback" in shown:
            import trackio

            trackio.log({name: trackio.Image(picture, f"after step {step:,}"), "train/global_step": step})
