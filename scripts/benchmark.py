#!/usr/bin/env python
"""Measure how fast training is, beside the bare loop that is its limit and beside a stock Trainer.

    python scripts/benchmark.py --windows 5 --window_seconds 5
    python scripts/benchmark.py --contestants a b c --settings cifar --other_checkout ../before

Each contestant is a training in processes of its own. They take turns: one runs for a window, and the others, with
their data workers, are stopped (SIGSTOP) in whatever they are doing. So each goes on as if it had never been stopped,
and a machine that drifts hits all alike. A window's rate is that of the whole optimizer steps in it. A ratio is a
median over turns, each of two windows of the same turn. The table has the ratios first, then images/s and peak memory
(of the first process without its data workers; on a GPU what it allocated). It goes to OUTPUT_DIR/benchmark.md, and
with every window to benchmark.json. Images are synthetic, as are models.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import resource
import runpy
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
import transformers
from PIL import Image, ImageOps

import bkd_hf

CONTESTANTS = {
    "a": "bare loop over batches in memory, same models and precision",
    "b": "`BKDTrainer`, end to end (`run_bkd.py --method bkd`)",
    "c": "stock `Trainer` subclass, `with_transform`, PIL, fp32",
    "d": "`BKDTrainer`, cross-entropy, no teacher",
    "e": "`BKDTrainer` with the teacher cache, filled",
    "f": "`BKDTrainer`, two processes that share the cores (with --use_cpu, or without a GPU)",
    "o": "as b, of --other_checkout",
}
#: Name, and the contestants whose images/s are divided.
RATIOS = [("b/a", "b", "a"), ("b/c", "b", "c"), ("e/d (time)", "d", "e"), ("f/b", "f", "b"), ("b/o", "b", "o")]
REPOSITORY = Path(__file__).resolve().parents[1]
WARM_UP_STEPS, MIN_STEPS = 6, 3
RATE, MOMENTUM, DECAY, ENDLESS = 0.01, 0.9, 2e-4, 1_000_000  # ENDLESS: epochs


@dataclass(frozen=True)
class Setting:
    """Models and images of a benchmark."""

    student: str  # from MODELS, or a CIFAR ResNet
    teacher: str
    image_size: int = 224  # pixels
    batch_size: int = 32  # on a GPU: 128
    jpeg_size: tuple[int, int] | None = (500, 375)  # None: PNG of 32×32, decoded into memory
    most: int = 93  # images of the most frequent class; the rarest has a hundredth of that
    classes: int = 100


SETTINGS = {
    "cifar": Setting("cifar-resnet-32", "cifar-resnet-32", 32, 128, None, most=500),
    "resnet18": Setting("resnet-18", "resnet-18"),
    "vit-tiny": Setting("vit-tiny", "vit-tiny"),
    "large-teacher": Setting("resnet-18", "vit-base"),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet-18": ("resnet", {"hidden_sizes": [64, 128, 256, 512], "depths": [2] * 4, "layer_type": "basic"}),
    "vit-tiny": ("vit", {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}),
    "vit-base": ("vit", {}),
}


def make_images(folder: Path, setting: Setting) -> Path:
    """Return a folder with parquet files of long-tailed images; creates them unless an earlier run did."""
    kind, size = ("JPEG", setting.jpeg_size) if setting.jpeg_size else ("PNG", (32, 32))
    folder = folder / f"{kind}-{setting.most}"
    if (folder / "test.parquet").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    each, names = np.arange(setting.classes), [str(number) for number in range(setting.classes)]
    tail = np.repeat(each, np.maximum(bkd_hf.long_tailed_counts(setting.most, setting.classes, 100), 1))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, labels in {"train": np.random.default_rng(0).permutation(tail), "test": each}.items():
        print(f"making {len(labels):,} images ({split})", flush=True)
        generator, images = np.random.default_rng(0), []
        for _ in labels:
            # Smooth fields and noise: 2.1 kB as PNG, as much as CIFAR's images; 100 kB as JPEG.
            fields = Image.fromarray(generator.integers(40, 216, (4, 5, 3), dtype=np.uint8)).resize(size)
            noise = generator.standard_normal((*size[::-1], 1)) + generator.standard_normal((*size[::-1], 3)) / 2
            pixels = np.asarray(fields) + (20 if setting.jpeg_size else 5) * noise
            file = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, format=kind, quality=90)
            images.append({"bytes": file.getvalue(), "path": None})
        data = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        data.to_parquet(folder / f"{split}.parquet")
    return folder


def save_model(name: str, setting: Setting, folder: str) -> str:
    """Save a fresh model with an image processor; returns the folder."""
    names = [str(number) for number in range(setting.classes)]
    torch.manual_seed(0)
    if name in MODELS:
        config = transformers.AutoConfig.for_model(MODELS[name][0], **MODELS[name][1], id2label=dict(enumerate(names)))
        model = transformers.AutoModelForImageClassification.from_config(config)
    else:
        model = bkd_hf.load_classifier(name, names, setting.image_size)
    model.save_pretrained(folder)
    # Any processor that resizes to a fixed size and normalises.
    bkd_hf.load_processor("cifar-resnet-32", setting.image_size).save_pretrained(folder)
    return folder


class Marks(transformers.TrainerCallback):
    """Writes a line after each optimizer step: the time, epochs done, and peak memory in bytes."""

    def __init__(self, path: str):
        self.path, self.parent = Path(path + os.environ.get("RANK", "0")), os.getppid()

    def on_step_end(self, args: Any = None, state: Any = None, control: Any = None, **kwargs: Any) -> None:
        """See `TrainerCallback`; also ends the process if the benchmark has ended."""
        if os.getppid() != self.parent:
            os._exit(1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in kilobytes
        if torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated()
        with self.path.open("a") as file:
            file.write(f"{time.monotonic()} {state.epoch if state else 0} {peak}\n")


def load(job: dict[str, Any]) -> tuple[torch.nn.Module, torch.nn.Module, datasets.Dataset, torch.Tensor]:
    """Student and teacher on the device, training images, and class weights."""
    images = bkd_hf.load_image_dataset(job["data"], cache_dir=job["cache"])["train"]
    names = images.features["label"].names
    student, teacher = (bkd_hf.load_classifier(job[kind], names).to(job["device"]) for kind in ("student", "teacher"))
    weights = bkd_hf.class_balanced_weights(bkd_hf.class_counts(images))
    return student, teacher, images, weights.to(job["device"], torch.float32)


def bare_loop(job: dict[str, Any], marks: Marks) -> None:
    """Contestant a: only the mathematics of a step, on eight batches already on the device."""
    from bkd_hf import machine, models

    machine.set_num_threads(job["threads"])
    machine.keep_freed_memory()
    student, loaded, _, weights = load(job)
    teacher, device, size = bkd_hf.load_teacher(loaded), job["device"], job["image_size"]
    for model in (student, teacher):
        models.prefer_channels_last(model)
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    pixels = torch.randn(8 * job["batch_size"], 3, size, size, device=device).to(memory_format=torch.channels_last)
    answers = torch.randint(len(weights), (len(pixels),), device=device)
    in_bf16 = machine.default_precision(device == "cpu") == "bf16"
    student.train()
    for inputs, labels in itertools.cycle(zip(pixels.chunk(8), answers.chunk(8), strict=True)):
        with torch.autocast(device, torch.bfloat16, enabled=in_bf16):
            logits = student(pixel_values=inputs).logits
            teacher_logits = teacher(pixel_values=inputs)
        bkd_hf.bkd_loss(logits, teacher_logits, labels, weights).backward()
        optimizer.step()
        optimizer.zero_grad()
        marks.on_step_end()


def stock_trainer(job: dict[str, Any], marks: Marks) -> None:
    """Contestant c: a usual distillation script, which assumes that the teacher is in evaluation mode."""
    torch.set_num_threads(job["threads"])
    student, teacher, images, weights = load(job)
    teacher.eval().requires_grad_(False)
    generator, size = np.random.default_rng(0), job["image_size"]

    class StockTrainer(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            with torch.no_grad():
                teacher_logits = teacher(**inputs).logits
            return bkd_hf.bkd_loss(logits, teacher_logits, labels, weights)

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [view(size, generator, image) for image in batch["image"]], "labels": batch["label"]}

    args = transformers.TrainingArguments(
        output_dir=job["folder"], num_train_epochs=ENDLESS, per_device_train_batch_size=job["batch_size"],
        optim="sgd", optim_args=f"momentum={MOMENTUM}", learning_rate=RATE, weight_decay=DECAY, save_strategy="no",
        use_cpu=job["device"] == "cpu",
        remove_unused_columns=False,  # otherwise the images would be removed before they are transformed
    )  # fmt: skip
    data: Any = images.with_transform(transform)
    StockTrainer(model=student, args=args, train_dataset=data, callbacks=[marks]).train()


def view(size: int, generator: np.random.Generator, image: Image.Image) -> torch.Tensor:
    """The usual augmentation of one image: crop, flip, normalise."""
    image = image.convert("RGB")
    if image.size == (size, size):
        left, top = generator.integers(0, size // 4 + 1, 2).tolist()
        image = ImageOps.expand(image, border=size // 8).crop((left, top, left + size, top + size))
    else:  # 8 to 100 % of the image
        share = generator.uniform(0.08, 1) ** 0.5
        width, height = share * image.width, share * image.height
        left, top = generator.uniform(0, image.width - width), generator.uniform(0, image.height - height)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    if generator.random() < 0.5:
        image = ImageOps.mirror(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return (pixels.float() / 255 - 0.5) / 0.5


class Contestant:
    """A training that runs only in its windows; raises a `RuntimeError` with the end of its log if it ends."""

    def __init__(self, letter: str, job: dict[str, Any], checkout: Path):
        self.letter, self.folder, self.images_per_step = letter, Path(job["folder"]), job["global_batch_size"]
        self.folder.mkdir()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if letter == "f" else []
        command = [sys.executable, *launcher, __file__, "take_part", letter, json.dumps(job), f"{self.folder}/marks"]
        told = {**os.environ, "PYTHONPATH": str(checkout)}
        with (self.folder / "log").open("w") as log:
            self.process = psutil.Popen(command, stdout=log, stderr=log, env=told)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes and data workers."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*self.process.children(recursive=True), self.process]:
                process.send_signal(number)

    def run_until(self, enough: Callable[[list[list[float]]], bool]) -> list[list[float]]:
        """Run it until there are enough marks; returns them: time, epochs and peak memory of each step."""
        path = self.folder / "marks0"
        marks: list[list[float]] = []
        self.signal(signal.SIGCONT)
        while not enough(marks):
            time.sleep(0.1)
            if self.process.poll() is not None:
                log = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"{self.letter} ended; its log ends with:\n{log[-3000:]}")
            marks = [[float(word) for word in line.split()] for line in path.open()] if path.exists() else []
        self.signal(signal.SIGSTOP)
        return marks

    def warm_up(self) -> None:
        """Run some steps; for e after an epoch, when its cache is filled."""
        least = 1 if self.letter == "e" else -1
        self.run_until(lambda marks: sum(epoch > least for _, epoch, _ in marks) >= WARM_UP_STEPS)

    def window(self, seconds: float) -> dict[str, float]:
        """Measure a window, without its first step, during which it had been stopped."""
        since = time.monotonic()
        marks = self.run_until(
            lambda marks: time.monotonic() >= since + seconds and sum(mark[0] > since for mark in marks) > MIN_STEPS
        )
        times = [mark[0] for mark in marks if mark[0] > since]
        taken, steps = times[-1] - times[0], len(times) - 1
        rate = self.images_per_step * steps / taken
        return {"seconds": taken, "steps": steps, "images_per_second": rate, "peak_memory": marks[-1][2]}


def words(letter: str, job: dict[str, Any], setting: Setting) -> list[str]:
    """Options for `run_bkd.py`."""
    options = {
        "dataset_name": job["data"], "cache_dir": job["cache"], "model_name_or_path": job["student"],
        "method": "ce" if letter == "d" else "bkd", "output_dir": f"{job['folder']}/run",
        "cache_images": "none" if setting.jpeg_size else "memory", "num_threads": job["threads"],
        "num_train_epochs": ENDLESS, "per_device_train_batch_size": job["batch_size"], "optim": "sgd",
        "learning_rate": RATE, "momentum": MOMENTUM, "weight_decay": DECAY, "decay_all_parameters": True,
        "max_grad_norm": 0, "save_strategy": "no", "disable_tqdm": True, "use_cpu": job["device"] == "cpu",
    }  # fmt: skip
    if letter != "d":  # a teacher with random weights
        options |= {"teacher_model_name_or_path": job["teacher"], "force_teacher": True, "force_distillation": True}
    if letter == "e":
        options |= {"teacher_cache": f"{job['folder']}/teacher_cache", "teacher_cache_views": 1}
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a setting; returns its `title`, all `windows` by letter, and `rates`: of `RATIOS` and in images/s."""
    setting = SETTINGS[name]
    if options.quick:
        setting = Setting("cifar-resnet-8", "cifar-resnet-8", 32, 4, setting.jpeg_size, 10, 10)
    device = "cuda" if torch.cuda.is_available() and not options.use_cpu else "cpu"
    batch_size = 128 if device == "cuda" and not options.quick else setting.batch_size
    letters = [*options.contestants, *("o" if options.other_checkout else "")]
    windows: dict[str, list[dict[str, float]]] = {letter: [] for letter in letters}
    data = make_images(options.output_dir.resolve() / "data", setting)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        common: dict[str, Any] = {"data": str(data), "cache": f"{data.parent}/cache", "device": device}
        common |= {"image_size": setting.image_size, "global_batch_size": batch_size}
        for model, folder in ((setting.student, "student"), (setting.teacher, "teacher")):
            common[folder] = save_model(model, setting, f"{scratch}/{folder}")
        contestants: dict[str, Contestant] = {}
        for letter in letters:
            print(f"{name}: {letter} warms up", flush=True)
            processes = 2 if letter == "f" else 1
            checkout = options.other_checkout.resolve() if letter == "o" else REPOSITORY
            job = common | {"script": f"{checkout}/scripts/run_bkd.py", "folder": f"{scratch}/{letter}"}
            job |= {"batch_size": batch_size // processes, "threads": max(1, options.num_threads // processes)}
            contestants[letter] = Contestant(letter, job | {"words": words(letter, job, setting)}, checkout)
            stack.callback(contestants[letter].process.wait)  # runs after the next callback
            stack.callback(contestants[letter].signal, signal.SIGKILL)
            contestants[letter].warm_up()
        for turn in range(options.windows):
            print(f"{name}: window {turn + 1} of {options.windows}", flush=True)
            first = turn % len(letters)  # the order changes from turn to turn
            for letter in letters[first:] + letters[:first]:
                windows[letter].append(contestants[letter].window(options.window_seconds))
    rates = {letter: [window["images_per_second"] for window in windows[letter]] for letter in letters}
    for ratio, over, under in RATIOS:
        if over in rates and under in rates:
            rates[ratio] = [ours / theirs for ours, theirs in zip(rates[over], rates[under], strict=True)]
    spreads = {key: {"median": statistics.median(x), "low": min(x), "high": max(x)} for key, x in rates.items()}
    title = f"{setting.student} from {setting.teacher}, {setting.image_size} px, batch {batch_size}"
    return {"title": f"{name}: {title}", "rates": spreads, "windows": windows}


def to_markdown(results: dict[str, Any]) -> str:
    """Return the report: the ratios first, a column for each setting."""
    settings, hardware = list(results["settings"].values()), results["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [["", *(measured["title"] for measured in settings)], ["---"] * (1 + len(settings))]
    for key in (*(ratio for ratio, _, _ in RATIOS), *CONTESTANTS):
        cells = []
        for rate, windows in ((found["rates"].get(key), found["windows"].get(key)) for found in settings):
            cell = "{median:.3g} ({low:.3g}–{high:.3g})".format(**rate) if rate else ""
            cells.append(cell + (f", {windows[-1]['peak_memory'] / 1e9:.2f} GB" if windows else ""))
        if any(cells):
            lines.append([f"{key}: {CONTESTANTS[key]}" if key in CONTESTANTS else key, *cells])
    about = (
        f"{hardware['device']}, {hardware['cpu_threads']} CPU threads, {hardware['precision']} but for c; {versions}. "
        f"Made by `{results['command']}`. Ratios, then images/s and peak memory: medians over windows (range)."
    )
    return f"# Benchmark\n\n{about}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; exit code 1 if a contestant fails, 2 for bad input."""
    from bkd_hf import errors, machine, results

    errors.keep_printing()
    parser = argparse.ArgumentParser(None, None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark"), help="Where all files go.")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="What is trained.")
    known, meant = list("abcdef"), "; ".join(f"{letter}: {meaning}" for letter, meaning in CONTESTANTS.items())
    parser.add_argument("--contestants", nargs="+", choices=known, default=known, help=meant)
    parser.add_argument("--windows", type=int, default=6, help="Windows of each contestant.")
    parser.add_argument("--window_seconds", type=float, default=10.0, help=f"At least {MIN_STEPS} steps are taken.")
    parser.add_argument("--other_checkout", type=Path, help="Of this repository, say of the commit before a change.")
    parser.add_argument("--num_threads", type=int, help="CPU threads; all cores if not given.")
    parser.add_argument("--use_cpu", action="store_true", help="Use the CPU even if there is a GPU.")
    parser.add_argument("--quick", action="store_true", help="Tiny models, few images: shows that it works.")
    options = parser.parse_args(argv)
    for name, least in (("windows", 1), ("window_seconds", 0), ("num_threads", 1)):
        if getattr(options, name) is not None and not getattr(options, name) >= least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}.")
    if options.quick:
        options.windows, options.window_seconds = 2, 0.0
    if options.other_checkout and not (options.other_checkout / "scripts" / "run_bkd.py").is_file():
        parser.error(f"--other_checkout {options.other_checkout}: there is no scripts/run_bkd.py in it.")
    if "f" in options.contestants and torch.cuda.is_available() and not options.use_cpu:
        options.contestants.remove("f")  # a stopped process would keep the other's GPU busy
    options.num_threads = machine.set_num_threads(options.num_threads)
    try:
        found: dict[str, Any] = {"settings": {name: measure(name, options) for name in options.settings}}
    except (RuntimeError, KeyboardInterrupt) as error:
        print(f"error: {error}" if str(error) else "interrupted", file=sys.stderr)
        return 1 if str(error) else 130
    bf16 = machine.default_precision(options.use_cpu) == "bf16"
    args = bkd_hf.BKDConfig(str(options.output_dir), use_cpu=options.use_cpu, bf16=bf16)
    found["command"] = results.describe_command(argv or sys.argv[1:], called_by=["python", "scripts/benchmark.py"])
    found |= {"versions": results.describe_versions(), "hardware": results.describe_hardware(args)}
    (options.output_dir / "benchmark.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (options.output_dir / "benchmark.md").write_text(to_markdown(found), encoding="utf-8")
    print(to_markdown(found))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] != ["take_part"]:
        sys.exit(main())
    letter, job, marks = sys.argv[2], json.loads(sys.argv[3]), Marks(sys.argv[4])
    if letter in "ac":  # runs without end
        (bare_loop if letter == "a" else stock_trainer)(job, marks)
    transformers.trainer.DEFAULT_CALLBACKS.append(marks)
    sys.argv = [job["script"], *job["words"]]
    runpy.run_path(job["script"], run_name="__main__")
