"""A classifier as an ONNX file: export, 8-bit quantization, comparison with torch, and latency."""

from __future__ import annotations

import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from . import __version__
from .data import choose_per_class
from .errors import InputError, first_line
from .metrics import LongTailEvaluation
from .schema import GroupAccuracies
from .text import one_line
from .views import output_size

#: Version of the ONNX operators: the default of `torch.onnx`, supported by onnxruntime since 1.14.
OPSET = 18
#: Largest difference of a logit from torch's, relative to the largest logit, or to 1 if that is larger.
TOLERANCE = 1e-3
#: Approximate number of training images for the range of activations, balanced over the classes as far as possible.
CALIBRATION_IMAGES = 512
#: Batch sizes for measuring latency.
BATCH_SIZES = (1, 32)
#: Number of time windows of a measurement, and their minimal length.
WINDOWS, WINDOW_SECONDS = 5, 0.05

_MAX_CALIBRATION_IMAGES = 2048  # where there are more classes than CALIBRATION_IMAGES
_QUANTIZED = ("Conv", "Gemm", "MatMul")  # nearly all of the time; other operations keep their precision

Answer = Callable[[np.ndarray], np.ndarray]


def import_onnx() -> None:
    """Import the libraries for an export; raises an `InputError` if they are not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f'The library {error.name}, which --export onnx needs, is not installed: pip install "bkd_hf[export]".'
        ) from error


# ---- Files --------------------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    """A classifier of transformers that returns only B×C logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


def describe(processor: BaseImageProcessor, class_names: list[str]) -> dict[str, str]:
    """Return the metadata of an ONNX file: its classes, in order, and the processing of images."""
    settings = json.loads(processor.to_json_string())
    normalisation = {name: settings.get(name) for name in ("image_mean", "image_std", "rescale_factor")}
    told = {"class_names": class_names, "image_size": output_size(processor), **normalisation, "processor": settings}
    return {"bkd_hf": __version__, **{name: json.dumps(value, ensure_ascii=False) for name, value in told.items()}}


def to_onnx(model: nn.Module, size: tuple[int, int], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a classifier as ONNX, from `pixel_values` (B×3×H×W float32) to `logits` (B×C), for any B.

    Args:
        model: In evaluation mode.
        size: H, W.
        path: Path of the file.
        metadata: Metadata of the file.

    Raises:
        InputError: If it cannot be exported.
        OSError: If the file cannot be written.
    """
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                _Logits(model),
                (torch.zeros(2, 3, *size),),
                dynamo=True,
                opset_version=OPSET,
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
            program.save(path, external_data=False)
            _finish(path, metadata)
    except OSError:  # a disk error, not one of the model
        raise
    except Exception as error:  # the exporter may raise any exception
        why = one_line(first_line(error.__cause__ or error), 300)
        raise InputError(
            f"--export onnx: {type(model).__name__} is not exportable, because {why}. The run itself is whole: use "
            "its student with torch."
        ) from error


def quantize(path: Path, to: Path, batches: Iterable[np.ndarray], metadata: Mapping[str, str]) -> None:
    """Quantize an ONNX file: weights and activations of its heavy layers in 8 bits (static, QDQ).

    Weights use a scale per output channel and 7 bits, so that outputs are the same on every processor. The range of an
    activation is determined on the given images.

    Args:
        path: The file.
        to: The new file.
        batches: B×3×H×W float32, for calibration.
        metadata: Metadata of the new file.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    inputs = ({"pixel_values": pixels} for pixels in batches)

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(inputs, None)

    prepared = path.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            to,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,  # x86 without VNNI adds two products in 16 bits, which overflows with 8-bit weights
            op_types_to_quantize=list(_QUANTIZED),
            extra_options={"MatMulConstBOnly": True},  # products with weights, not in attention
        )
        _finish(to, metadata)


def _finish(path: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata to a file, and remove local paths."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and logs of libraries."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ---- What they are worth ------------------------------------------------------------------------------------------


def torch_answers(model: nn.Module) -> Answer:
    """Return a torch model as a function of B×3×H×W numbers."""

    def answer(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(pixel_values=torch.from_numpy(pixels)).logits.numpy()

    return answer


def onnx_answers(path: Path, threads: int) -> Answer:
    """Return an ONNX file as a function of B×3×H×W numbers, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # spinning would slow the other models
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixel_values": pixels})[0]


def compare(
    answers: Mapping[str, Answer], batches: Iterable[tuple[np.ndarray, np.ndarray]], evaluation: LongTailEvaluation
) -> tuple[dict[str, dict[str, float]], float, float]:
    """Measure the student in torch, as ONNX and in int8 on the same images.

    Args:
        answers: The models by name: `student`, `onnx`, `int8`.
        batches: Evaluation batches: B×3×H×W float32, and B labels.
        evaluation: The metrics.

    Returns:
        Accuracies by name, the largest difference of a logit between ONNX and torch, and its limit.

    Raises:
        InputError: If the difference exceeds the limit.
    """
    meters = {name: evaluation.accumulator() for name in answers}
    differences, sizes = [], [1.0]
    for pixels, labels in batches:
        logits = {name: answer(pixels) for name, answer in answers.items()}
        differences.append(np.abs(logits["onnx"] - logits["student"]).max())
        sizes.append(np.abs(logits["student"]).max())
        for name, meter in meters.items():
            meter.update(logits[name], labels)
    difference, tolerance = float(np.max(differences)), float(TOLERANCE * np.max(sizes))
    if not difference <= tolerance:  # also for NaN
        raise InputError(
            f"--export onnx: the file's logits differ from torch's by up to {difference:.2g} on the evaluation "
            f"images, more than {tolerance:.2g}, so it was not kept. The run itself is whole: use its student with "
            "torch."
        )
    told = GroupAccuracies.__annotations__
    metrics = {
        name: {key: float(value) for key, value in meter.scalars().items() if key in told}
        for name, meter in meters.items()
    }
    return metrics, difference, tolerance


def latencies(answers: Mapping[str, Answer], sizes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, float]]:
    """Return the seconds of each model for 1 and for 32 images: the median of windows, in which they take turns.

    Args:
        answers: The models by name.
        sizes: H, W of their images.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in answers}
    for batch in BATCH_SIZES:
        generator = np.random.default_rng(0)
        pixels = {name: generator.standard_normal((batch, 3, *sizes[name]), dtype=np.float32) for name in answers}
        windows: dict[str, list[float]] = {name: [] for name in answers}
        for _ in range(WINDOWS):
            for name, answer in answers.items():
                answer(pixels[name])  # warm-up: the caches hold another model's data
                begin, calls = time.perf_counter(), 0
                while (elapsed := time.perf_counter() - begin) < WINDOW_SECONDS or not calls:
                    answer(pixels[name])
                    calls += 1
                windows[name].append(elapsed / calls)
        for name, times in windows.items():
            found[name][str(batch)] = statistics.median(times)
    return found


def choose_calibration_images(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return the indices of about `CALIBRATION_IMAGES` training images, equally many per class, or all it has.

    Args:
        labels: N class numbers.
        seed: Seed of the draw.
    """
    num_classes = labels.max(initial=0) + 1
    most = max(1, CALIBRATION_IMAGES // max(1, len(np.unique(labels))))
    chosen = choose_per_class(labels, np.full(num_classes, most), seed)
    number = min(len(chosen), _MAX_CALIBRATION_IMAGES)
    return chosen[np.linspace(0, len(chosen) - 1, number, dtype=int)]
