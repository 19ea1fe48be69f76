"""How fast training is, and where its time goes: what `scripts/benchmark.py` measures.

Every contestant is a training in processes of its own. It stops after each window (a number of optimizer steps) until
it is asked for the next one; in between its data workers are frozen, in whatever they are doing. So one contestant has
the machine at a time, each goes on as if it had never stopped, and windows of all take turns: a machine that drifts
hits all alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from .arguments import parse_arguments
from .config import BKDConfig
from .data import (
    IMAGE_COLUMN,
    LABEL_COLUMN,
    class_counts,
    load_image_dataset,
    long_tailed_counts,
    make_long_tailed,
    stored_images,
)
from .errors import InputError
from .inputs import choose_workers
from .losses import bkd_loss
from .machine import keep_freed_memory, set_num_threads
from .metrics import long_tail_metrics
from .models import cifar_resnet_depth, load_classifier, load_processor, prefer_channels_last
from .precision import default_precision
from .results import describe_hardware, describe_versions
from .teacher import load_teacher
from .teacher_cache import DEFAULT_VIEWS, TeacherCache
from .trainer import BKDTrainer
from .transforms import ImageDataset, collate_images, default_augmentation, random_resized_crop_box
from .weights import class_balanced_weights

SCHEMA_VERSION = 1
#: What a step's time is made of; the first is what no other accounts for.
PARTS = ("overhead", "data", "teacher", "student", "backward", "optimizer")
#: Letter and meaning of each contestant.
CONTESTANTS = {
    "limit": ("a", "bare loop over resident batches"),
    "trainer": ("b", "BKDTrainer, end to end"),
    "stock": ("c", "stock Trainer subclass: with_transform, PIL for each image, fp32"),
    "ce": ("d", "BKDTrainer without a teacher: cross-entropy"),
    "cache": ("e", "BKDTrainer with the teacher cache, filled"),
    "processes": ("f", "BKDTrainer in several processes"),
}
#: What can be measured.
MEASUREMENTS = ("training", "pipeline", "start_up", "imports", "scale")

_NUM_CLASSES = 100
_CIFAR_LT_IMAGES = 10_847  # CIFAR-100-LT at imbalance ratio 100
_JPEG_SIZE = (500, 375)  # the usual photograph of ImageNet
_NUM_RESIDENT_BATCHES = 8
_WARM_UP_STEPS = 3
_MIN_STEPS = 3
_RATE, _MOMENTUM, _DECAY = 0.01, 0.9, 2e-4
_ENDLESS = 1_000_000  # epochs


@dataclass(frozen=True)
class Setting:
    """What is trained on what.

    Attributes:
        student: A name that `_fresh_model` knows.
        teacher: Likewise.
        image_size: Height and width in pixels.
        batch_size: Images in an optimizer step on a CPU.
        gpu_batch_size: The same on a GPU.
        from_files: Whether images are JPEG files that are decoded when they are seen, and not PNG in parquet that fit
            into memory.
    """

    student: str
    teacher: str
    image_size: int = 224
    batch_size: int = 32
    gpu_batch_size: int = 128
    from_files: bool = True


SETTINGS = {
    "cifar": Setting("cifar-resnet-32", "cifar-resnet-32", 32, 128, 128, from_files=False),
    "resnet18": Setting("resnet-18", "resnet-18"),
    "vit-tiny": Setting("vit-tiny", "vit-tiny"),
    "large-teacher": Setting("resnet-18", "vit-base"),
}
_TINY = Setting("cifar-resnet-8", "cifar-resnet-8", 32, 4, 4)


@dataclass(frozen=True)
class PublishedSet:
    """A long-tailed training set of the literature.

    Attributes:
        name: As it is called.
        num_images: Of training.
        num_classes: How many.
        pixels: Of a usual image.
        setting: Which measured rates stand for training on it.
        epochs: How long it is trained, as is usual.
    """

    name: str
    num_images: int
    num_classes: int
    pixels: int
    setting: str = "resnet18"
    epochs: int = 90


PUBLISHED_SETS = (
    PublishedSet("CIFAR-100-LT", _CIFAR_LT_IMAGES, 100, 32 * 32, "cifar", 200),
    PublishedSet("ImageNet-LT", 115_846, 1_000, 500 * 375),
    PublishedSet("Places-LT", 62_500, 365, 256 * 256),
    PublishedSet("iNaturalist 2018", 437_513, 8_142, 800 * 600),
)


@dataclass
class BenchmarkOptions:
    """Options of a benchmark; each is described by its help text.

    Raises:
        InputError: If one is out of its range.
    """

    output_dir: Path = field(default=Path("outputs/benchmark"), metadata={"help": "Where table, JSON and figure go."})
    measure: list[str] = field(
        default_factory=lambda: list(MEASUREMENTS), metadata={"help": f"Any of {', '.join(MEASUREMENTS)}."}
    )
    settings: list[str] = field(
        default_factory=lambda: list(SETTINGS), metadata={"help": f"Of training: any of {', '.join(SETTINGS)}."}
    )
    contestants: list[str] = field(
        default_factory=lambda: list(CONTESTANTS), metadata={"help": f"Of training: any of {', '.join(CONTESTANTS)}."}
    )
    windows: int = field(default=6, metadata={"help": "Windows of each contestant, after its warm-up."})
    window_seconds: float = field(
        default=10.0, metadata={"help": f"How long a window should take; it has at least {_MIN_STEPS} steps."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Real data for the setting cifar; synthetic images of its kind if not given."}
    )
    label_column_name: str | None = field(default=None, metadata={"help": "Label column of --dataset_name."})
    imbalance_ratio: float | None = field(
        default=None, metadata={"help": "Cut a long tail out of --dataset_name; CIFAR-100-LT is 100."}
    )
    num_images: int = field(default=2000, metadata={"help": "Synthetic JPEG files."})
    data_dir: Path | None = field(
        default=None, metadata={"help": "Where synthetic images are kept; OUTPUT_DIR/data if not given."}
    )
    teacher_cache_views: int = field(default=1, metadata={"help": "Views of each image in the teacher cache."})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads; all cores if not given."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is a GPU."})
    torch_compile: bool = field(
        default=False, metadata={"help": "Compile the models, in the bare loop and in BKDTrainer alike."}
    )
    quick: bool = field(
        default=False,
        metadata={"help": "Tiny models, few images, short windows: shows that all works, not how fast it is."},
    )

    def __post_init__(self) -> None:
        self.output_dir = Path(self.output_dir)
        self.data_dir = self.output_dir / "data" if self.data_dir is None else Path(self.data_dir)
        choices = {"measure": MEASUREMENTS, "settings": tuple(SETTINGS), "contestants": tuple(CONTESTANTS)}
        for name, known in choices.items():
            chosen = getattr(self, name)
            unknown = [choice for choice in chosen if choice not in known]
            if unknown or not chosen:
                raise InputError(f"--{name} takes any of {', '.join(known)}, got {', '.join(unknown) or 'nothing'}.")
            setattr(self, name, [choice for choice in known if choice in chosen])
        if self.quick:
            self.windows, self.window_seconds, self.num_images = 2, 0.0, 24
        self._require(self.windows >= 2, "windows", "at least 2")
        self._require(0 <= self.window_seconds < math.inf, "window_seconds", "a finite number ≥ 0")
        self._require(self.num_images >= 2 * self.num_classes, "num_images", f"at least {2 * self.num_classes}")
        self._require(self.teacher_cache_views >= 1, "teacher_cache_views", "at least 1")
        self._require(self.num_threads is None or self.num_threads >= 1, "num_threads", "at least 1")
        for name in ("label_column_name", "imbalance_ratio"):
            if getattr(self, name) is not None and self.dataset_name is None:
                raise InputError(f"--{name} is about --dataset_name, which is not given.")

    @property
    def device(self) -> str:
        """`"cuda"` or `"cpu"`."""
        return "cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu"

    @property
    def num_classes(self) -> int:
        """Of the synthetic images."""
        return 10 if self.quick else _NUM_CLASSES

    def setting(self, name: str) -> Setting:
        """Return a setting, as it is run with these options."""
        setting = SETTINGS[name]
        return dataclasses.replace(_TINY, from_files=setting.from_files) if self.quick else setting

    def _require(self, holds: bool, name: str, condition: str) -> None:
        if not holds:
            raise InputError(f"--{name} must be {condition}, got {getattr(self, name)}.")


def run(options: BenchmarkOptions, script: Path, command: str, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure what was asked for.

    Args:
        options: The options.
        script: Path of `run_bkd.py`, whose start is measured.
        command: The command line, to be recorded.
        say: Called with lines that tell how far it came.

    Returns:
        The content of `benchmark.json`: `ratios` (see `_ratios`), `settings` (of training), `projections` (see
        [`project`]), `pipeline`, `start_up`, `imports`, `scale`, `versions`, `hardware`, `command` and `options`.
        Rates are medians over windows, with the smallest and the largest; times are in seconds if their names say
        nothing else.

    Raises:
        InputError: If the data cannot be loaded.
        RuntimeError: If a contestant fails; the message holds the end of its log.
    """
    threads = set_num_threads(options.num_threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "logs").mkdir(exist_ok=True)
    results: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "settings": {}}
    if "training" in options.measure:
        for name in options.settings:
            results["settings"][name] = measure_training(name, options, threads, say)
    if "pipeline" in options.measure:
        results["pipeline"] = measure_pipeline(options, threads, say)
    if "start_up" in options.measure:
        results["start_up"] = measure_start_up(options, script, threads, say)
    if "imports" in options.measure:
        results["imports"] = measure_imports(1 if options.quick else 5, say)
    if "scale" in options.measure:
        say("scale: counting classes, and metrics")
        results["scale"] = _in_child(options, measure_scale, *((1000, 50, 500, 40) if options.quick else _SCALE))
    with tempfile.TemporaryDirectory() as folder:
        hardware = describe_hardware(_training_arguments(Path(folder), options, ()))
    told = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if not f.name.endswith("_dir")}
    told["dataset_name"] = options.dataset_name and Path(options.dataset_name).name
    return {
        **results,
        "ratios": _ratios(results, options.device),
        "projections": project(results["settings"]),
        "command": command,
        "options": told,
        "versions": describe_versions(),
        "hardware": hardware,
    }


# ---- Images -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where a contestant's images come from, in words that travel between processes."""

    name: str
    cache_dir: str
    label_column: str | None = None
    imbalance_ratio: float | None = None

    def load(self) -> datasets.Dataset:
        images = load_image_dataset(self.name, label_column=self.label_column, cache_dir=self.cache_dir)["train"]
        return images if self.imbalance_ratio is None else make_long_tailed(images, LABEL_COLUMN, self.imbalance_ratio)

    def script_options(self) -> list[str]:
        told = {
            "--dataset_name": self.name,
            "--cache_dir": self.cache_dir,
            "--label_column_name": self.label_column,
            "--imbalance_ratio": self.imbalance_ratio,
        }
        return [str(text) for option, value in told.items() if value is not None for text in (option, value)]


def _provide_images(options: BenchmarkOptions, from_files: bool, say: Callable[[str], None]) -> _Source:
    """Make images, unless they are there from an earlier run."""
    assert options.data_dir is not None
    cache_dir = str(options.data_dir / "cache")
    if not from_files and options.dataset_name is not None:
        return _Source(options.dataset_name, cache_dir, options.label_column_name, options.imbalance_ratio)
    number = options.num_images if from_files or options.quick else _CIFAR_LT_IMAGES
    folder = options.data_dir / f"{'jpeg' if from_files else 'png'}-{number}"
    if not folder.exists():
        say(f"making {number:,} synthetic {'JPEG files' if from_files else 'PNG images in parquet'}")
        unfinished = folder.with_suffix(".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (_write_jpegs if from_files else _write_parquet)(unfinished, number, options.num_classes)
        unfinished.rename(folder)
    return _Source(str(folder), cache_dir)


def _write_jpegs(folder: Path, num_images: int, num_classes: int) -> None:
    for split, labels in _labels(num_images, num_classes).items():
        generator = np.random.default_rng(0)
        for number, label in enumerate(labels.tolist()):
            path = folder / split / f"class_{label:03}" / f"{number:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            synthetic_image(generator, *_JPEG_SIZE).save(path, quality=90)


def _write_parquet(folder: Path, num_images: int, num_classes: int) -> None:
    names = [f"class_{number:03}" for number in range(num_classes)]
    features = datasets.Features({IMAGE_COLUMN: datasets.Image(), LABEL_COLUMN: datasets.ClassLabel(names=names)})
    for split, labels in _labels(num_images, num_classes).items():
        generator = np.random.default_rng(0)
        images = []
        for _ in labels:
            file = io.BytesIO()
            synthetic_image(generator, 32, 32).save(file, format="PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        data = {IMAGE_COLUMN: images, LABEL_COLUMN: labels}
        datasets.Dataset.from_dict(data, features=features).to_parquet(folder / f"{split}.parquet")


def _labels(num_images: int, num_classes: int) -> dict[str, np.ndarray]:
    """A long tail to train on, with an image of each class at least, and one image of each class beside it."""
    shares = np.array(long_tailed_counts(10_000, num_classes, 100))
    each = np.arange(num_classes)
    drawn = np.random.default_rng(0).choice(num_classes, num_images - num_classes, p=shares / shares.sum())
    return {"train": np.concatenate([each, drawn]), "test": each}


def synthetic_image(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw a picture that is as hard to decode as a photograph: smooth fields, sharp edges, and noise.

    32×32 pixels take 2.2 kB as PNG, as CIFAR's images; 500×375 take about 100 kB as JPEG of quality 90.
    """
    fields = Image.fromarray(generator.integers(40, 216, (4, 5, 3), dtype=np.uint8))
    image = fields.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        corners = generator.integers(0, (width, height), (2, 2))
        low, high = corners.min(axis=0), corners.max(axis=0)
        fill = tuple(generator.integers(0, 256, 3).tolist())
        draw.ellipse((*low.tolist(), *high.tolist()), fill=fill)
    pixels = np.asarray(image, dtype=np.float32)
    grey, colour = (3.0, 1.5) if width <= 64 else (17.0, 8.0)
    noise = grey * generator.standard_normal((height, width, 1), dtype=np.float32)
    noise = noise + colour * generator.standard_normal((height, width, 3), dtype=np.float32)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


# ---- One window after the other ------------------------------------------------------------------------------------


class Stopwatch:
    """Divides time among the parts of a step: a part's own time, without that of the parts within it.

    Args:
        synchronize: Waits for the device, before every look at the clock.
    """

    def __init__(self, synchronize: Callable[[], None]):
        self._synchronize = synchronize
        self._undo: list[Callable[[], None]] = []
        self.start()

    def start(self) -> None:
        """Begin anew."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inside = [PARTS[0]]
        self._since = self._now()

    def stop(self) -> dict[str, float]:
        """Put back what was instrumented; return the seconds of each part."""
        self._charge()
        for undo in reversed(self._undo):
            undo()
        return self.seconds

    def instrument(self, owner: Any, name: str, part: str) -> None:
        """Charge the time of a method to a part."""
        method, own = getattr(owner, name), name in vars(owner)

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._inside.append(part)
            try:
                return method(*args, **kwargs)
            finally:
                self._charge()
                self._inside.pop()

        setattr(owner, name, timed)
        self._undo.append(lambda: setattr(owner, name, method) if own else delattr(owner, name))

    def _charge(self) -> None:
        now = self._now()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()


class Gate:
    """Where a training stops after each window, until it is asked for the next one.

    In several processes all stop after the same step: the first process hears what is wanted, and tells the others.

    Args:
        connection: To who asks; `None` in all processes but the first.
        synchronize: Waits for the device.
        timed_methods: What a profile looks at: owners, names and parts. Called when a profile is asked for.
    """

    def __init__(
        self,
        connection: Connection | None,
        synchronize: Callable[[], None],
        timed_methods: Callable[[], list[tuple[Any, str, str]]],
    ):
        self._connection = connection
        self._synchronize = synchronize
        self._timed_methods = timed_methods
        self._left = 1  # the first window is the first step, which prepares much
        self._watch: Stopwatch | None = None
        # Over gloo processes wait idly; over NCCL they would keep their GPUs busy.
        self._group = torch.distributed.new_group(backend="gloo") if torch.distributed.is_initialized() else None
        self._since = time.perf_counter()

    def step_ended(self, epoch: float = 0.0) -> bool:
        """Note the end of an optimizer step; wait, if it was the last of a window. Returns whether all is done."""
        self._left -= 1
        if self._left:
            return False
        self._synchronize()
        seconds = time.perf_counter() - self._since
        parts = self._watch.stop() if self._watch else None
        self._watch = None
        if self._connection is not None:
            report = {"seconds": seconds, "epoch": epoch, "parts": parts, "peak_memory": _peak_memory()}
            self._connection.send(report)
        command = self._next_command()
        if command is None:
            return True
        self._left, profile = command
        self._synchronize()
        self._since = time.perf_counter()
        if profile:
            self._watch = Stopwatch(self._synchronize)
            for owner, name, part in self._timed_methods():
                self._watch.instrument(owner, name, part)
            self._watch.start()
        return False

    def _next_command(self) -> tuple[int, bool] | None:
        try:
            box = [self._connection.recv() if self._connection is not None else None]
            if self._group is not None:
                torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        except BaseException:
            os.killpg(0, signal.SIGCONT)  # the data workers, whom nobody will wake any more
            raise
        return box[0]


class GateCallback(TrainerCallback):
    """Leads a `Trainer` to a gate after each optimizer step."""

    def __init__(self, gate: Gate):
        self.gate = gate

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        control.should_training_stop = self.gate.step_ended(state.epoch)


def _peak_memory() -> int:
    """Bytes, on the GPU if there is one; else of this process, without its workers."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in kilobytes


class Contestant:
    """A training in processes of its own, from outside.

    Args:
        job: What it does.
        context: How its processes are started.

    Raises:
        RuntimeError: If it fails, at any time; the message holds the end of its log.
    """

    def __init__(self, job: Job, context: Any):
        self.job = job
        self.steps = 1
        self._connection, theirs = context.Pipe()
        self._processes = [
            context.Process(target=_take_part, args=(job, rank, theirs if rank == 0 else None), daemon=False)
            for rank in range(job.num_processes)
        ]
        for process in self._processes:
            process.start()
        theirs.close()  # or its end would not be noticed
        try:
            self._listen()
        except BaseException:
            self.kill()
            raise

    def advance(self, steps: int, profile: bool = False) -> dict[str, Any]:
        """Go on for some steps; return `seconds`, `steps`, `epoch`, `parts` (of a profile) and `peak_memory`."""
        self._freeze(False)
        self._connection.send((steps, profile))
        self.steps += steps
        return {**self._listen(), "steps": steps}

    def finish(self) -> None:
        """End the training in the ordinary way, and check that it took the steps it was asked for."""
        self._freeze(False)
        self._connection.send(None)
        taken = self._listen(freeze=False)
        self._join()
        if taken != self.steps:
            raise RuntimeError(f"{self.job.name} took {taken} steps where {self.steps} were asked for.")

    def kill(self) -> None:
        """End all its processes, whatever they are doing."""
        for process in [*self._workers(), *self._processes]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._join()

    def _join(self) -> None:
        for process in self._processes:
            process.join()
        self._connection.close()

    def _listen(self, freeze: bool = True) -> Any:
        try:
            report = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            for process in self._processes:
                process.join(timeout=10)
            codes = ", ".join(str(process.exitcode) for process in self._processes)
            log = Path(self.job.log).read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
            raise RuntimeError(
                f"{self.job.name} failed (exit code {codes}); its log ends with:\n{log[-3000:]}"
            ) from error
        if freeze:
            self._freeze(True)
        return report

    def _freeze(self, frozen: bool) -> None:
        workers = self._workers()
        for process in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend() if frozen else process.resume()
        for process in workers if frozen else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    time.sleep(0.001)  # a process stops a little after it is told to

    def _workers(self) -> list[psutil.Process]:
        workers = []
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                workers += psutil.Process(process.pid).children(recursive=True)
        return workers


@dataclass(frozen=True)
class Job:
    """What a contestant does, in words that travel between processes.

    Attributes:
        name: For messages.
        contestant: A key of `CONTESTANTS`, or `"loader"` or `"decoder"` (see [`measure_pipeline`]).
        setting: What is trained.
        source: Where the images are.
        folder: For the contestant's own files.
        log: File for what it prints.
        device: `"cuda"` or `"cpu"`.
        threads: CPU threads of each process, and data workers where images are decoded when they are seen.
        num_processes: How many.
        port: By which several processes find each other.
        torch_compile: Whether models are compiled.
        teacher_cache_views: Views of each image in the teacher cache.
        start_method: How data workers are started: as by a script, not as contestants are.
    """

    name: str
    contestant: str
    setting: Setting
    source: _Source
    folder: str
    log: str
    device: str
    threads: int
    num_processes: int = 1
    port: int = 0
    torch_compile: bool = False
    teacher_cache_views: int = 1
    start_method: str = field(default_factory=multiprocessing.get_start_method)

    @property
    def global_batch_size(self) -> int:
        """Images in an optimizer step."""
        return self.batch_size * self.num_processes

    @property
    def batch_size(self) -> int:
        """Images in an optimizer step of one process: on a CPU they share a batch, GPUs have one each."""
        if self.device == "cpu":
            return self.setting.batch_size // self.num_processes
        return self.setting.gpu_batch_size


def _take_part(job: Job, rank: int, connection: Connection | None) -> None:
    """What the processes of a contestant do."""
    os.setpgid(0, 0)  # a group of their own for it and its workers
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    multiprocessing.set_start_method(job.start_method, force=True)
    if job.num_processes > 1:
        # What a launcher says.
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job.port))
        os.environ.update(WORLD_SIZE=str(job.num_processes), LOCAL_WORLD_SIZE=str(job.num_processes))
    if job.contestant == "stock":
        torch.set_num_threads(job.threads)
    else:  # what `run_bkd.py` does to its process
        set_num_threads(job.threads)
        keep_freed_memory()
    runners: dict[str, Callable[[Job], Any]] = {"limit": _BareLoop, "decoder": _Decoder, "loader": _Loader}
    runner = runners.get(job.contestant, _Training)(job)
    synchronize = torch.cuda.synchronize if job.device == "cuda" else lambda: None
    gate = Gate(connection, synchronize, runner.timed_methods)
    steps = runner.train(gate)
    if connection is not None:
        connection.send(steps)


# ---- What the contestants do ---------------------------------------------------------------------------------------


def _fresh_model(name: str, class_names: list[str], image_size: int) -> PreTrainedModel:
    if cifar_resnet_depth(name) is not None:
        return load_classifier(name, class_names, image_size)
    common = {"num_labels": len(class_names)}
    if name == "resnet-18":
        sizes, depths = [64, 128, 256, 512], [2, 2, 2, 2]
        return ResNetForImageClassification(
            ResNetConfig(embedding_size=64, hidden_sizes=sizes, depths=depths, layer_type="basic", **common)
        )
    small = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768} if name == "vit-tiny" else {}
    return ViTForImageClassification(ViTConfig(image_size=image_size, **small, **common))


def _models(job: Job, class_names: list[str]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher, the same ones for every contestant."""
    torch.manual_seed(0)
    names = job.setting.student, job.setting.teacher
    student, teacher = (_fresh_model(name, class_names, job.setting.image_size) for name in names)
    return student, teacher


def _image_dataset(job: Job, images: datasets.Dataset) -> ImageDataset:
    # Any fixed size will do; the name stands for a processor that resizes and normalises.
    processor = load_processor("cifar-resnet-32", job.setting.image_size)
    return ImageDataset(
        images,
        processor,
        augmentation=default_augmentation(processor),
        # A benchmark's few files would fit into memory; those of a real data set of this kind do not.
        cache_images="none" if job.setting.from_files else "auto",
        as_bytes=True,  # as `run_bkd.py`
    )


def _training_arguments(
    folder: Path, options: BenchmarkOptions | Job, given: Sequence[str], batch_size: int = 1
) -> BKDConfig:
    """Options as `run_bkd.py` makes them of its command line."""
    command_line = {
        "output_dir": folder, "num_train_epochs": _ENDLESS, "per_device_train_batch_size": batch_size,
        "optim": "sgd", "learning_rate": _RATE, "momentum": _MOMENTUM, "weight_decay": _DECAY,
        "decay_all_parameters": "true", "max_grad_norm": 0, "save_strategy": "no",
        "lr_warmup_epochs": 5, "use_cpu": options.device == "cpu", "torch_compile": options.torch_compile,
    }  # fmt: skip
    words = [word for name, value in command_line.items() for word in (f"--{name}", str(value))]
    schedule = ["--lr_step_epochs", "160", "180", "--lr_step_factors", "0.01", "0.0001"]
    return parse_arguments(["--dataset_name", "digits", *words, *schedule, *given]).training


class _BareLoop:
    """The limit: nothing but the mathematics of a step, on batches that are where they are needed."""

    def __init__(self, job: Job):
        images = job.source.load()
        names = images.features[LABEL_COLUMN].names
        self.student, teacher = (model.to(job.device) for model in _models(job, names))
        self.teacher = load_teacher(teacher)
        for model in (self.student, self.teacher):
            prefer_channels_last(model)
        # What is called; compiling leaves the models as they are.
        self.forward: Callable[..., Any] = torch.compile(self.student) if job.torch_compile else self.student
        self.ask: Callable[..., Any] = torch.compile(self.teacher) if job.torch_compile else self.teacher
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=_RATE, momentum=_MOMENTUM, weight_decay=_DECAY)
        self.class_weights = class_balanced_weights(class_counts(images)).to(job.device, torch.float32)
        self.batches = _resident_batches(job, images)
        self.device, self.in_bf16 = job.device, default_precision(job.device == "cpu") == "bf16"
        self.student.train()

    def train(self, gate: Gate) -> int:
        """Train until the gate says that it is enough; return the number of steps."""
        steps, done = 0, False
        while not done:
            inputs, labels = self.next_batch(steps)
            self.backward(self.loss(inputs, labels))
            self.update()
            steps += 1
            done = gate.step_ended()
        return steps

    def timed_methods(self) -> list[tuple[Any, str, str]]:
        """What a profile looks at."""
        return [
            (self, "next_batch", "data"),
            (self, "ask", "teacher"),
            (self, "loss", "student"),
            (self, "backward", "backward"),
            (self, "update", "optimizer"),
        ]

    def next_batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batches[step % len(self.batches)]

    def loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.in_bf16):
            logits = self.forward(pixel_values=inputs).logits
            teacher_logits = self.ask(pixel_values=inputs)
        return bkd_loss(logits, teacher_logits, labels, self.class_weights)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def _resident_batches(job: Job, images: datasets.Dataset) -> list[tuple[torch.Tensor, torch.Tensor]]:
    size = job.batch_size
    number = min(_NUM_RESIDENT_BATCHES, len(images) // size)
    examples = _image_dataset(job, images.select(range(number * size)))
    batches = []
    for start in range(0, number * size, size):
        batch = collate_images(examples.__getitems__(list(range(start, start + size))))
        batches.append((batch["pixel_values"].to(job.device), batch["labels"].to(job.device)))
    return batches


class _Training:
    """A real `Trainer`, which is led to the gate after each step."""

    def __init__(self, job: Job):
        images = job.source.load()
        student, teacher = _models(job, images.features[LABEL_COLUMN].names)
        self.trainer: BKDTrainer | _StockTrainer
        if job.contestant == "stock":
            self.trainer = _stock_trainer(job, images, student, teacher)
        else:
            self.trainer = _bkd_trainer(job, images, student, None if job.contestant == "ce" else teacher)

    def train(self, gate: Gate) -> int:
        """Train until the gate says that it is enough; return the number of steps."""
        self.trainer.add_callback(GateCallback(gate))
        self.trainer.train()
        return self.trainer.state.global_step

    def timed_methods(self) -> list[tuple[Any, str, str]]:
        """What a profile looks at."""
        trainer = self.trainer
        methods = [
            (trainer, "get_batch_samples", "data"),
            (trainer, "compute_loss", "student"),
            (trainer.accelerator, "backward", "backward"),
            (trainer.optimizer, "step", "optimizer"),
            (trainer.model_wrapped, "zero_grad", "optimizer"),
        ]
        if isinstance(trainer, BKDTrainer):
            return [*methods, (trainer, "_teacher_logits", "teacher")]  # computed or read
        return [*methods, (trainer.teacher_model, "forward", "teacher")]


def _bkd_trainer(
    job: Job, images: datasets.Dataset, student: PreTrainedModel, teacher: PreTrainedModel | None
) -> BKDTrainer:
    given = ["--method", "bkd" if teacher else "ce"]
    if job.contestant == "cache":
        given += ["--teacher_cache", f"{job.folder}/teacher_cache"]
        given += ["--teacher_cache_views", str(job.teacher_cache_views)]
    train_dataset = _image_dataset(job, images)
    args = _training_arguments(Path(job.folder), job, given, job.batch_size)
    choose_workers(args, train_dataset, job.threads)
    for model in filter(None, (student, teacher)):
        prefer_channels_last(model)
    return BKDTrainer(model=student, teacher_model=teacher, args=args, train_dataset=train_dataset)


class _StockTrainer(Trainer):
    """What is written today to distil: a `compute_loss`, and a teacher that one hopes is in evaluation mode."""

    def __init__(self, *args: Any, teacher_model: nn.Module, class_weights: torch.Tensor, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher_model = teacher_model.eval().requires_grad_(False).to(self.args.device)
        self.class_weights = class_weights.to(self.args.device, torch.float32)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher_model(**inputs).logits
        loss = bkd_loss(outputs.logits, teacher_logits, labels, self.class_weights)
        return (loss, outputs) if return_outputs else loss


def _stock_trainer(
    job: Job, images: datasets.Dataset, student: PreTrainedModel, teacher: PreTrainedModel
) -> _StockTrainer:
    arguments = TrainingArguments(
        output_dir=job.folder,
        num_train_epochs=_ENDLESS,
        per_device_train_batch_size=job.batch_size,
        optim="sgd",
        optim_args=f"momentum={_MOMENTUM}",
        learning_rate=_RATE,
        weight_decay=_DECAY,
        remove_unused_columns=False,  # or the images would be gone before they are transformed
        save_strategy="no",
        use_cpu=job.device == "cpu",
    )
    view = functools.partial(_pil_view, job.setting.image_size, np.random.default_rng(0))

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [view(image) for image in batch[IMAGE_COLUMN]], "labels": batch[LABEL_COLUMN]}

    return _StockTrainer(
        model=student,
        args=arguments,
        train_dataset=images.with_transform(transform),
        teacher_model=teacher,
        class_weights=class_balanced_weights(class_counts(images)),
    )


def _pil_view(size: int, generator: np.random.Generator, image: Image.Image) -> torch.Tensor:
    """The usual augmentation of one image: crop, flip, normalise."""
    image = image.convert("RGB")
    if image.size == (size, size):
        left, top = generator.integers(0, size // 4 + 1, 2).tolist()
        image = ImageOps.expand(image, border=size // 8).crop((left, top, left + size, top + size))
    else:
        box = random_resized_crop_box(*image.size, generator.random(40))
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if generator.random() < 0.5:
        image = ImageOps.mirror(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return (pixels.float() / 255 - 0.5) / 0.5


class _Loader:
    """BKDTrainer's training data, without the training."""

    def __init__(self, job: Job):
        images = job.source.load()
        # The start of an epoch takes long for few images: with each of them many times, it is in few windows.
        many = images.select(np.tile(np.arange(len(images)), math.ceil(100_000 * job.threads / len(images))))
        self.trainer = _bkd_trainer(job, many, *_models(job, images.features[LABEL_COLUMN].names))
        self.trainer.args.dataloader_num_workers = job.threads  # as many as the decoder's

    def train(self, gate: Gate) -> int:
        """Load batches until the gate says that it is enough; return their number."""
        return _drain(self.trainer.get_train_dataloader(), gate)

    def timed_methods(self) -> list[tuple[Any, str, str]]:
        """What a profile looks at: nothing."""
        return []


class _Decoder(_Loader):
    """The limit of loading: files to RGB, by as many processes."""

    def __init__(self, job: Job):
        images = _Paths([image["path"] for image in stored_images(job.source.load())])
        endless = RandomSampler(images, replacement=True, num_samples=1_000_000_000)
        self.loader = DataLoader(images, job.batch_size, sampler=endless, num_workers=job.threads, collate_fn=len)

    def train(self, gate: Gate) -> int:
        """Decode batches until the gate says that it is enough; return their number."""
        return _drain(self.loader, gate)


class _Paths(Dataset):
    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> int:
        with Image.open(self.paths[index]) as image:
            return image.convert("RGB").width


def _drain(loader: DataLoader, gate: Gate) -> int:
    for steps, _ in enumerate(itertools.chain.from_iterable(itertools.repeat(loader)), start=1):
        if gate.step_ended():
            return steps
    raise AssertionError  # it has no end


# ---- Measuring -----------------------------------------------------------------------------------------------------


def measure_training(name: str, options: BenchmarkOptions, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the contestants in a setting, in turns.

    Returns:
        What the setting is; for each contestant its `windows` (seconds, steps, epoch), `images_per_second` and
        `seconds_per_step` (median, min, max), `peak_memory` (bytes of a process) and `parts` (seconds per step while
        instrumented); why others are `skipped`.
    """
    setting = options.setting(name)
    source = _provide_images(options, setting.from_files, say)
    num_images = len(source.load())
    jobs, skipped = {}, {}
    for contestant in options.contestants:
        job = _job(f"{name}: {contestant}", contestant, setting, source, options, threads)
        reason = _why_not(job)
        if reason is None:
            jobs[contestant] = job
        else:
            skipped[contestant] = reason
    return {
        "setting": dataclasses.asdict(setting),
        "num_images": num_images,
        "contestants": _measure_in_turns(jobs, options, say, profile=True),
        "skipped": skipped,
    }


def measure_pipeline(options: BenchmarkOptions, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the training data of a `BKDTrainer` alone, and the bare decoding of the same files by as many processes.

    Returns:
        As `contestants` of [`measure_training`]: `"decoder"` and `"loader"`.
    """
    setting = dataclasses.replace(options.setting("resnet18"), student="cifar-resnet-8", teacher="cifar-resnet-8")
    source = _provide_images(options, True, say)
    jobs = {
        contestant: _job(f"input pipeline: {contestant}", contestant, setting, source, options, threads)
        for contestant in ("decoder", "loader")
    }
    return _measure_in_turns(jobs, options, say, profile=False)


def _job(
    name: str, contestant: str, setting: Setting, source: _Source, options: BenchmarkOptions, threads: int
) -> Job:
    num_processes = 1
    if contestant == "processes":
        num_processes = 2 if options.device == "cpu" else torch.cuda.device_count()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    return Job(
        name=name,
        contestant=contestant,
        setting=setting,
        source=source,
        folder="",
        log=str(options.output_dir / "logs" / f"{name.replace(': ', '-').replace(' ', '_')}.log"),
        device=options.device,
        threads=max(1, threads // num_processes),
        num_processes=num_processes,
        port=port,
        torch_compile=options.torch_compile,
        teacher_cache_views=options.teacher_cache_views,
    )


def _why_not(job: Job) -> str | None:
    if job.contestant == "processes" and job.num_processes < 2:
        return "there is one GPU"
    return None


def _measure_in_turns(
    jobs: dict[str, Job], options: BenchmarkOptions, say: Callable[[str], None], profile: bool
) -> dict[str, dict[str, Any]]:
    context = _process_context(options.device)
    windows: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    profiles: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        contestants, steps = {}, {}
        for name, job in jobs.items():
            say(f"{job.name}: warming up")
            Path(job.log).unlink(missing_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            contestants[name] = Contestant(dataclasses.replace(job, folder=folder), context)
            stack.callback(contestants[name].kill)
            steps[name] = _warm_up(contestants[name], options)
        for turn in range(options.windows):
            say(f"{next(iter(jobs.values())).name.partition(':')[0]}: window {turn + 1} of {options.windows}")
            names = list(jobs)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # no one always follows the same
                windows[name].append(contestants[name].advance(steps[name]))
        for name, contestant in contestants.items():
            if profile:
                profiles[name] = contestant.advance(max(_MIN_STEPS, steps[name] // 3), profile=True)
            contestant.finish()
    return {name: _summary(job, windows[name], profiles.get(name)) for name, job in jobs.items()}


def _warm_up(contestant: Contestant, options: BenchmarkOptions) -> int:
    """Take steps until nothing is special about the next one; return how many make a window."""
    contestant.advance(_WARM_UP_STEPS)
    report = contestant.advance(_WARM_UP_STEPS)
    if contestant.job.contestant == "cache":
        while report["epoch"] <= contestant.job.teacher_cache_views:
            report = contestant.advance(_WARM_UP_STEPS)
    return max(_MIN_STEPS, round(options.window_seconds / report["seconds"] * report["steps"]))


def _summary(job: Job, windows: list[dict[str, Any]], profile: dict[str, Any] | None) -> dict[str, Any]:
    rates = [job.global_batch_size / seconds for seconds in _step_seconds(windows)]
    summary = {
        "num_processes": job.num_processes,
        "threads": job.threads,
        "global_batch_size": job.global_batch_size,
        "windows": [{key: window[key] for key in ("seconds", "steps", "epoch")} for window in windows],
        "images_per_second": _spread(rates),
        "seconds_per_step": _spread(_step_seconds(windows)),
        "peak_memory": windows[-1]["peak_memory"],
    }
    if profile is not None:
        summary["parts"] = {part: seconds / profile["steps"] for part, seconds in profile["parts"].items()}
    return summary


def _step_seconds(windows: Sequence[dict[str, Any]]) -> list[float]:
    """Of each window."""
    return [window["seconds"] / window["steps"] for window in windows]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _process_context(device: str) -> Any:
    """How processes are started: copies of one that has imported all; anew where CUDA, which forbids that, is used."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _in_child(options: BenchmarkOptions, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own, whose peak memory is the function's."""
    ours, theirs = _process_context(options.device).Pipe()
    process = _process_context(options.device).Process(target=_answer, args=(theirs, function, args))
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    return answer


def _answer(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    connection.send(function(*args))


def measure_start_up(
    options: BenchmarkOptions, script: Path, threads: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the seconds from calling `run_bkd.py` until it tells the loss of its first step.

    That is starting Python, importing, reading options, loading the data (which `datasets` has in its cache), decoding
    the images into memory, making the model, and one step, on the data of the setting cifar.
    """
    setting = options.setting("cifar")
    source = _provide_images(options, False, say)
    source.load()  # into the cache of `datasets`
    repetitions = 1 if options.quick else 3
    seconds = []
    for number in range(repetitions):
        say(f"start-up: {number + 1} of {repetitions}")
        with tempfile.TemporaryDirectory() as folder:
            words = [
                *("--method", "ce", "--model_name_or_path", setting.student, "--output_dir", f"{folder}/run"),
                *("--max_steps", "1", "--logging_strategy", "steps", "--logging_steps", "1", "--disable_tqdm", "true"),
                *("--per_device_train_batch_size", str(setting.batch_size), "--num_threads", str(threads)),
                *("--save_strategy", "no", "--use_cpu", str(options.device == "cpu")),
            ]
            command = [sys.executable, str(script), *source.script_options(), *words]
            seconds.append(seconds_until(command, "'loss':"))
    return {"seconds": _spread(seconds)}


def seconds_until(command: Sequence[str], text: str) -> float:
    """Seconds from the start of a command until it prints a line with a text; it is ended then.

    Raises:
        RuntimeError: If it ends without; the message holds what it printed.
    """
    printed = []
    started = time.perf_counter()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if text in line:
                seconds = time.perf_counter() - started
                process.kill()
                return seconds
            printed.append(line)
    raise RuntimeError(f"{' '.join(command)} ended without printing {text!r}:\n{''.join(printed)[-3000:]}")


def measure_imports(repetitions: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure what importing bkd_hf adds to the libraries that it needs, in processes of their own, by turns.

    Returns:
        Medians of the seconds of each process, and `beyond` and `trainer_beyond`: medians of the differences.
    """
    statements = {
        "libraries": "import torch, transformers",
        "bkd_hf": "import torch, transformers, bkd_hf",
        "library_trainer": "import torch, datasets; from transformers import Trainer",
        "bkd_hf_trainer": "import torch, datasets; from bkd_hf import BKDTrainer, ImageDataset",
    }
    seconds: dict[str, list[float]] = {name: [] for name in statements}
    for number in range(repetitions):
        say(f"imports: {number + 1} of {repetitions}")
        for name, statement in statements.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            seconds[name].append(time.perf_counter() - started)

    def beyond(more: str, less: str) -> float:
        return statistics.median(a - b for a, b in zip(seconds[more], seconds[less], strict=True))

    return {
        "seconds": {name: _spread(values) for name, values in seconds.items()},
        "beyond": beyond("bkd_hf", "libraries"),
        "trainer_beyond": beyond("bkd_hf_trainer", "library_trainer"),
    }


#: Training images and classes that are counted; test images and classes that metrics are of.
_SCALE = (1_000_000, 10_000, 1_000_000, 10_000)


def measure_scale(num_images: int, num_classes: int, num_tested: int, num_tested_classes: int) -> dict[str, Any]:
    """Measure counting classes, in a data set and in a shuffled selection of it, and the metrics of a test set."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, num_classes, num_images)
    feature = datasets.ClassLabel(names=[str(number) for number in range(num_classes)])
    images = datasets.Dataset.from_dict({LABEL_COLUMN: labels}, features=datasets.Features({LABEL_COLUMN: feature}))
    shuffled = images.select(generator.permutation(num_images))
    measured: dict[str, Any] = {"num_images": num_images, "num_classes": num_classes}
    for name, dataset in {"counting": images, "counting_shuffled": shuffled}.items():
        measured[f"{name}_seconds"] = _seconds(class_counts, dataset)
    # Repeated from a few: as float32 they would take 40 GB, which the metrics need not hold at once.
    logits = _Repeated(
        generator.standard_normal((min(num_tested, 2000), num_tested_classes), dtype=np.float32), num_tested
    )
    counts = np.full(num_tested_classes, 10)
    before = _peak_memory()
    seconds = _seconds(long_tail_metrics, logits, generator.integers(0, num_tested_classes, num_tested), counts)
    return measured | {
        "num_tested": num_tested,
        "num_tested_classes": num_tested_classes,
        "metrics_seconds": seconds,
        "metrics_peak_memory": _peak_memory() - before,
    }


class _Repeated:
    """Rows that come again and again, as if they were `num_rows`."""

    def __init__(self, rows: np.ndarray, num_rows: int):
        self.rows, self.shape = rows, (num_rows, rows.shape[1])

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.rows[np.arange(*part.indices(self.shape[0])) % len(self.rows)]


def _seconds(function: Callable[..., Any], *args: Any) -> float:
    started = time.perf_counter()
    function(*args)
    return time.perf_counter() - started


# ---- Ratios --------------------------------------------------------------------------------------------------------


def _ratios(results: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Return what there are targets for, and what else is best said in one number.

    Each has `name`, `setting`, `meaning`, `value`, `low` and `high` (median, smallest and largest over windows, each
    compared with the one of the same turn, or over repetitions), `unit`, `target`, `at_least` (or at most) and
    `reached`; of b/a there is also the `overhead_seconds_per_step`.
    """
    on_gpu = device == "cuda"
    ratios = []
    for setting, measured in results["settings"].items():
        contestants, is_cifar = measured["contestants"], setting == "cifar"
        for name, over, under, key, target, at_least in (
            ("b/a", "trainer", "limit", "images_per_second", 0.85 if on_gpu else 0.95, True),
            ("b/c", "trainer", "stock", "images_per_second", (3.0 if on_gpu else 2.0) if is_cifar else None, True),
            ("e/d", "cache", "ce", "seconds_per_step", 1.05, False),
            ("f/b", "processes", "trainer", "images_per_second", None, True),
        ):
            if over in contestants and under in contestants:
                entry = _quotient(contestants[over], contestants[under], key)
                what = "images per second" if key == "images_per_second" else "time of a step"
                meaning = f"{what}, {over} / {under}"
                ratios.append(_judged(name, setting, meaning, entry, "", target, at_least))
                if name == "b/a":
                    steps = zip(*(_step_seconds(contestants[who]["windows"]) for who in (over, under)), strict=True)
                    ratios[-1]["overhead_seconds_per_step"] = statistics.median(ours - bare for ours, bare in steps)
    if "pipeline" in results:
        entry = _quotient(results["pipeline"]["loader"], results["pipeline"]["decoder"], "images_per_second")
        meaning = "images per second, the training data of BKDTrainer / decoding its JPEG files, on the same cores"
        ratios.append(_judged("pipeline/decode", "224 px", meaning, entry, "", 0.9, True))
    if "start_up" in results:
        spread = results["start_up"]["seconds"]
        entry = {"value": spread["median"], "low": spread["min"], "high": spread["max"]}
        meaning = "run_bkd.py: from the command to the end of the first step"
        ratios.append(_judged("start-up", "cifar", meaning, entry, "s", 15.0, False))
    if "imports" in results:
        for name, key, target in (("import", "beyond", 0.2), ("import trainer", "trainer_beyond", None)):
            entry = dict.fromkeys(("value", "low", "high"), results["imports"][key])
            meaning = {
                "import": "import bkd_hf, beyond torch and transformers",
                "import trainer": "import BKDTrainer and ImageDataset, beyond transformers' Trainer and datasets",
            }[name]
            ratios.append(_judged(name, "", meaning, entry, "s", target, False))
    return ratios


def _quotient(over: dict[str, Any], under: dict[str, Any], key: str) -> dict[str, float]:
    """Median, smallest and largest quotient of a turn.

    Windows of the same turn are compared: a machine that drifts is then the same for both.
    """
    quotients = []
    for ours, theirs in zip(_step_seconds(over["windows"]), _step_seconds(under["windows"]), strict=True):
        if key == "images_per_second":
            quotients.append(over["global_batch_size"] / ours / (under["global_batch_size"] / theirs))
        else:
            quotients.append(ours / theirs)
    spread = _spread(quotients)
    return {"value": spread["median"], "low": spread["min"], "high": spread["max"]}


def _judged(
    name: str, setting: str, meaning: str, entry: dict[str, float], unit: str, target: float | None, at_least: bool
) -> dict[str, Any]:
    value = entry["value"]
    reached = None if target is None else (value >= target if at_least else value <= target)
    told = {"name": name, "setting": setting, "meaning": meaning, **entry, "unit": unit}
    return {**told, "target": target, "at_least": at_least, "reached": reached}


# ---- On paper ------------------------------------------------------------------------------------------------------


def project(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Tell how long published sets would take at the measured rates, and how much room they need.

    Args:
        settings: What was measured, by setting.

    Returns:
        For each of `PUBLISHED_SETS` whose setting was measured: its attributes; `hours` and `cached_hours` of a
        student with its teacher, online and with the teacher cache (K = 16 views, filled on the way; where it was
        measured), on 1 and on 8 devices: eightfold, or as several processes were measured on devices of their own;
        `cache_size` of float16 logits and `decoded_size` of all images, in bytes.
    """
    projections = []
    for published in PUBLISHED_SETS:
        measured = settings.get(published.setting, {}).get("contestants", {})
        if "trainer" not in measured:
            continue
        speed_of_8 = 8 * _share_of_speed_beside_others(measured)
        online = published.num_images / measured["trainer"]["images_per_second"]["median"] / 3600
        hours = published.epochs * online
        told = {**dataclasses.asdict(published), "hours": {"1": hours, "8": hours / speed_of_8}}
        if "cache" in measured:
            cached = published.num_images / measured["cache"]["images_per_second"]["median"] / 3600
            hours = DEFAULT_VIEWS * online + (published.epochs - DEFAULT_VIEWS) * cached
            told["cached_hours"] = {"1": hours, "8": hours / speed_of_8}
        told["cache_size"] = TeacherCache.size_in_bytes(DEFAULT_VIEWS, published.num_images, published.num_classes)
        told["decoded_size"] = 3 * published.pixels * published.num_images
        projections.append(told)
    return projections


def _share_of_speed_beside_others(measured: dict[str, Any]) -> float:
    """How much of its speed a device keeps beside others; 1 where several processes shared one machine's cores."""
    several, alone = measured.get("processes"), measured["trainer"]
    if several is None or several["global_batch_size"] == alone["global_batch_size"]:
        return 1.0
    rates = [contestant["images_per_second"]["median"] for contestant in (several, alone)]
    return rates[0] / rates[1] / several["num_processes"]
