"""Each architecture as student and as teacher: trains, saves, reloads elsewhere, predicts names, resumes exactly."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTImageProcessorPil

import bkd_hf.teacher
from bkd_hf import BKDConfig, BKDTrainer
from tests.architectures import ARCHITECTURES, EVERY, IMAGE_SIZES, NAMES, tiny, why_not
from tests.conftest import WORKER_ENVIRONMENT


def size_of(name: str) -> int:
    return IMAGE_SIZES.get(name, 32)


def examples(name: str) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, 3, size_of(name), size_of(name), generator=generator)
    return [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(pixels)]


def trainer_for(name: str, folder: Path, student: int = 1) -> BKDTrainer:
    """Two steps, with a checkpoint after the first; the teacher is of the same architecture."""
    args = BKDConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        save_steps=1,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    processor = ViTImageProcessorPil(size={"height": size_of(name), "width": size_of(name)})
    return BKDTrainer(
        model=tiny(name, student),
        teacher_model=tiny(name, 2),
        args=args,
        train_dataset=examples(name),
        processing_class=processor,
    )


def weights_of(trainer: BKDTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, tuple[Path, BKDTrainer]]:
    """Each architecture, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("architectures")

    class Trained(dict):
        def __missing__(self, name: str):
            trainer = trainer_for(name, folder / name.replace(" ", "_"))
            trainer.train()
            trainer.save_model()
            self[name] = (Path(trainer.args.output_dir), trainer)
            return self[name]

    return Trained()


@pytest.mark.parametrize("name", EVERY)
def test_trains_from_a_teacher_of_its_kind(name, trained):
    _, trainer = trained[name]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    assert all(np.isfinite(entry[key]) for entry in logs for key in ("loss", "ce_loss", "kd_loss"))
    assert logs[0]["loss"] == pytest.approx(logs[0]["ce_loss"] + logs[0]["kd_loss"], rel=1e-4)
    before = tiny(name, 1).state_dict()
    after = weights_of(trainer)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    teacher = trainer.teacher_model.model.state_dict()
    assert all(torch.equal(value, teacher[key]) for key, value in tiny(name, 2).state_dict().items())


@pytest.mark.parametrize("name", EVERY)
def test_resumes_with_exactly_the_same_weights(name, trained):
    folder, trainer = trained[name]
    resumed = trainer_for(name, folder, student=3)  # other weights than those that it began with
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    whole, again = weights_of(trainer), weights_of(resumed)
    assert whole.keys() == again.keys()
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []


RELOAD = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
answers = {}
for folder in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).double().eval()
    with torch.no_grad():
        logits = model(pixel_values=torch.load(folder + "/pixels.pt").double()).logits
    classify = pipeline("image-classification", folder, trust_remote_code=True, device="cpu")
    labels = sorted(answer["label"] for answer in classify(Image.new("RGB", (40, 50), (200, 30, 90)), top_k=5))
    answers[folder] = {"logits": logits.tolist(), "labels": labels}
json.dump(answers, open("answers.json", "w"))
"""


@pytest.mark.slow
def test_reloads_in_a_new_process_with_the_same_answers(trained, tmp_path):
    names = [name for name in ARCHITECTURES if why_not(name) is None]
    expected = {}
    for name in names:
        folder, trainer = trained[name]
        pixels = torch.stack([example["pixel_values"] for example in examples(name)])
        torch.save(pixels, folder / "pixels.pt")
        with torch.no_grad():
            expected[str(folder)] = copy.deepcopy(trainer.model).double().eval()(pixel_values=pixels.double()).logits
    # One process for all of them, as starting one takes longer than the predictions.
    subprocess.run([sys.executable, "-c", RELOAD, *expected], check=True, cwd=tmp_path, env=WORKER_ENVIRONMENT)
    answers = json.loads((tmp_path / "answers.json").read_text())
    for name, (folder, logits) in zip(names, expected.items(), strict=True):
        # In float64: the memory layout of tensors changes the last bits of a sum, and BatchNorm may amplify that after
        # two steps with tiny batches.
        answer = torch.tensor(answers[folder]["logits"], dtype=torch.float64)
        torch.testing.assert_close(answer, logits, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        assert answers[folder]["labels"] == NAMES, name


def test_what_is_covered_is_listed():
    rows = (bkd_hf.teacher.__doc__ or "").split("Tested as student and as teacher")[1].splitlines()
    listed = {name.strip() for row in rows for name in re.split(r"[:,]", row)}
    assert [name for name in ARCHITECTURES if name not in listed] == []
