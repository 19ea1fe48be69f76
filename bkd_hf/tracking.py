"""The figure of accuracies per class in a tracker, at each evaluation, beside the numbers that `Trainer` sends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import TrainerCallback

from .models import label_names
from .plots import plot_class_accuracy
from .results import describe_classes


def _to_tensorboard(callback: Any, name: str, figure: Figure, step: int) -> None:
    callback.tb_writer.add_figure(name, figure, step)


def _to_trackio(callback: Any, name: str, figure: Figure, step: int) -> None:
    import trackio

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = trackio.Image(np.asarray(canvas.buffer_rgba())[..., :3], caption=f"after step {step:,}")
    trackio.log({name: image, "train/global_step": step})


#: How a figure is sent to the tracker of `report_to`, by the class of its callback.
_SEND: dict[str, Callable[[Any, str, Figure, int], None]] = {
    "TensorBoardCallback": _to_tensorboard,
    "TrackioCallback": _to_trackio,
}


class ClassFigures(TrainerCallback):
    """Sends the figure of accuracies per class to the trackers of `report_to` that take pictures.

    Args:
        trainer: A `BKDTrainer`.

    Attributes:
        known: Sections of results for the figure: `data`, where more of it is known than the counts of its classes,
            and the `teacher`, where it is measured already.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.known: dict[str, Any] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the run by its folder: Trackio would make a name up, another one when it goes on or is measured."""
        args.run_name = args.run_name or args.output_dir.strip("./")  # also a place below its folder

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Draw the evaluation that is just over, and send it."""
        callbacks = self.trainer.callback_handler.callbacks
        trackers = [(send, c) for c in callbacks if (send := _SEND.get(type(c).__name__))]
        measured = self.trainer.last_measured
        if not (trackers and state.is_world_process_zero and measured is not None and measured.num_images):
            return
        counts, tested = measured.class_counts.astype(int).tolist(), measured.labelled.tolist()
        names = label_names(self.trainer.model.config) or [str(number) for number in range(len(counts))]
        results = {
            "data": describe_classes(names, counts, tested, *measured.thresholds),
            **self.known,
            "student": {"model": f"after step {state.global_step:,}", "metrics": measured.compute()["metrics"]},
        }
        prefix = next(name.removesuffix("_runtime") for name in metrics if name.endswith("_runtime"))
        for send, callback in trackers:
            send(callback, f"{prefix}/class_accuracy", plot_class_accuracy(results), state.global_step)
