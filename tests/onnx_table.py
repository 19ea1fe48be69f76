"""The table of ONNX exports of all architectures, each briefly trained on digits: `python -m tests.onnx_table`."""

import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

from bkd_hf import BKDConfig, BKDTrainer, ImageDataset, InputError, load_image_dataset, load_processor
from bkd_hf.onnx_files import OPSET, describe, latencies, onnx_answers, quantize, to_onnx, torch_answers
from tests.architectures import ARCHITECTURES, IMAGE_SIZES, NAMES, tiny


def row(name: str, folder: Path) -> str:
    """The cells of an architecture: of a tiny model after 8 epochs, and its answers about 200 evaluation images."""
    size, paths = IMAGE_SIZES.get(name, 32), [folder / "fp32.onnx", folder / "int8.onnx"]
    processor, digits = load_processor("cifar-resnet-8", size), load_image_dataset("digits")
    few = [digits[split].filter(lambda label: label < 5, input_columns="label") for split in ("train", "eval")]
    train, test = (ImageDataset(split, processor) for split in few)
    args = BKDConfig(str(folder), method="ce", per_device_train_batch_size=16, num_train_epochs=8, learning_rate=5e-3,
                     save_strategy="no", use_cpu=True, disable_tqdm=True)  # fmt: skip
    trainer = BKDTrainer(tiny(name, 1), args=args, train_dataset=train, class_counts=[140] * 5)
    trainer.train()
    model, about = trainer.model.eval(), describe(processor, NAMES)
    seen, pixels = (np.stack([one["pixel_values"] for one in data.__getitems__(range(200))]) for data in (train, test))
    to_onnx(model, (size, size), paths[0], about)
    quantize(*paths, np.split(seen, 4), about)
    answers = {"torch": torch_answers(model)} | {path.stem: onnx_answers(path, threads=1) for path in paths}
    exact, fp32, int8 = (answer(pixels) for answer in answers.values())
    best, difference = exact.argmax(axis=1), np.abs(exact - fp32).max()
    agree, right = np.mean(best == int8.argmax(axis=1)), np.mean(best == few[1]["label"])
    sizes = " | ".join(f"{path.stat().st_size / 1e6:.3f}" for path in paths)
    seconds = latencies(answers, dict.fromkeys(answers, (size, size)))
    times = " | ".join(f"{1000 * found['1']:.2g}" for found in seconds.values())
    return f"{OPSET} | {right:.0%} | {np.abs(exact).max():.2g} | {difference:.1e} | {agree:.1%} | {sizes} | {times}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for architecture in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as place, redirect_stdout(sys.stderr):
            try:
                cells = row(architecture, Path(place))
            except (InputError, ImportError) as error:
                cells = f"not exported: {' '.join(str(error).split())}" + " |" * 9
        print(f"| {architecture} | {cells} |", flush=True)
