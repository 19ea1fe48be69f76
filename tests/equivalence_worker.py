"""Trains the same models in several ways and saves the results; for test_equivalence.py, in 1 or 2 processes."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.nn.functional import cross_entropy
from transformers import ConvNextConfig, ConvNextForImageClassification

from bkd_hf import BKDConfig, BKDTrainer, load_classifier
from bkd_hf.machine import leave_process_group
from tests.tiny_models import tiny_vit

NUM_CLASSES = 5
NUM_EVAL_EXAMPLES = 37
#: (batch size, accumulation steps) that make global batches of 32, by number of processes.
CUTS = {1: [(32, 1), (8, 4)], 2: [(16, 1), (8, 2)]}
#: Options of methods that weigh examples in different ways.
METHODS = {
    "bkd": {"method": "bkd", "deferred_reweighting_start": 0.4},
    "ce": {"method": "ce"},
    "ldam-drw": {"method": "ldam-drw", "class_weighting_start": 0.4},
    "cb-focal": {"method": "focal", "class_weighting": "reweight"},
    "cb-resample": {"method": "resample", "class_weighting": "reweight"},
    "dive": {"method": "dive"},
    "ema": {"method": "ce", "ema_decay": 0.5},
    "lora": {"method": "ce", "adapter": "lora", "head_learning_rate": 0.02},
    "dkd": {"method": "dkd", "dkd_warmup_epochs": 2, "class_weighting": "reweight", "sampler": "class_balanced"},
}
#: Model, method, training examples: the last step has 12 examples, or 1.
FEW_CASES = [("vit", "bkd", 76), ("vit", "ce", 76)]
CASES = [
    *FEW_CASES,
    ("convnext", "bkd", 76),
    ("convnext", "ce", 76),
    ("convnext", "bkd", 65),
    ("convnext", "ldam-drw", 65),
    ("vit", "cb-focal", 76),
    ("vit", "cb-resample", 65),
    ("vit", "dive", 76),
    ("convnext", "dkd", 76),
    ("vit", "ema", 76),
    ("vit", "lora", 76),
]


def has_teacher(method: str) -> bool:
    return method in ("bkd", "dive", "dkd")


def tiny_model(kind: str, seed: int) -> torch.nn.Module:
    """A model without BatchNorm, which sees micro-batches whatever the trainer does; `resnet` has it."""
    if kind == "vit":
        return tiny_vit(seed, NUM_CLASSES)
    torch.manual_seed(seed)
    if kind == "resnet":
        return load_classifier("cifar-resnet-8", [str(n) for n in range(NUM_CLASSES)], image_size=8)
    # Takes **kwargs and drops num_items_in_batch.
    return ConvNextForImageClassification(
        ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2, image_size=8, num_labels=NUM_CLASSES
        )
    )


def examples(number: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(number, 3, 8, 8, generator=generator)
    return [{"pixel_values": image, "labels": i % 7 % NUM_CLASSES} for i, image in enumerate(images)]


def train(kind: str, method: str, num_examples: int, cut: tuple[int, int], evaluate_first: bool) -> dict:
    batch_size, accumulation = cut
    args = BKDConfig(
        output_dir="unused",
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        **METHODS[method],
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    data = examples(num_examples)
    trainer = BKDTrainer(
        model=tiny_model(kind, seed=1),
        teacher_model=tiny_model(kind, seed=2) if has_teacher(method) else None,
        args=args,
        train_dataset=data,
        eval_dataset=data[:NUM_EVAL_EXAMPLES],
        class_counts=[30, 20, 10, 5, 2],
    )
    if evaluate_first:
        trainer.evaluate()
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    # Every process ends with the same weights.
    gathered = trainer.accelerator.gather(weights[None])
    assert torch.equal(gathered, weights.expand_as(gathered))
    return {
        "weights": weights,
        "metrics": trainer.evaluate(),
        "num_predictions": len(trainer.predict(data[:NUM_EVAL_EXAMPLES]).predictions),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def check_average_of_processes(folder: Path) -> None:
    """Every process ends with the same average, statistics of BatchNorm too, also after a resumption."""

    def average(resume_from: Path | None) -> torch.Tensor:
        args = BKDConfig(
            str(folder), method="ce", ema_decay=0.9, per_device_train_batch_size=8, num_train_epochs=2, save_steps=3,
            eval_strategy="epoch", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        data = examples(76)
        model = tiny_model("resnet", seed=3 if resume_from else 1)
        trainer = BKDTrainer(model, args=args, train_dataset=data, eval_dataset=data[:NUM_EVAL_EXAMPLES],
                             class_counts=[30, 20, 10, 5, 2])  # fmt: skip
        trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert abs(trainer.evaluate()["eval_loss"] - losses[-1]) < 1e-6
        state = torch.cat([value.double().flatten() for value in trainer.model.state_dict().values()])
        gathered = trainer.accelerator.gather(state[None])
        assert torch.equal(gathered, state.expand_as(gathered))
        return state

    assert torch.equal(average(None), average(folder / "checkpoint-3"))


def check_evaluated_statistics() -> None:
    """What is evaluated is what is saved: the main process's statistics of BatchNorm, which differ after a step."""
    data = examples(76)
    evaluated = data[:NUM_EVAL_EXAMPLES]
    args = BKDConfig("unused", method="ce", per_device_train_batch_size=8, max_steps=4, save_strategy="no",
                     use_cpu=True, disable_tqdm=True)  # fmt: skip
    trainer = BKDTrainer(tiny_model("resnet", seed=1), args=args, train_dataset=data, eval_dataset=evaluated,
                         class_counts=[30, 20, 10, 5, 2])  # fmt: skip
    trainer.train()
    of_main = broadcast_object_list([trainer.model.state_dict()])[0]
    saved = tiny_model("resnet", seed=2).eval()
    saved.load_state_dict(of_main)
    with torch.no_grad():
        logits = saved(torch.stack([example["pixel_values"] for example in evaluated])).logits
    expected = cross_entropy(logits, torch.tensor([example["labels"] for example in evaluated])).item()
    assert abs(trainer.evaluate()["eval_loss"] - expected) < 1e-5


def train_all(cases: list[tuple[str, str, int]], num_processes: int, output: Path) -> None:
    """Train these cases, with each cut for so many processes, in one of them."""
    torch.set_num_threads(1)  # a forked process has no others
    assert BKDConfig(output_dir="unused", use_cpu=True).world_size == num_processes
    outcomes = {
        (*case, cut): train(*case, cut, evaluate_first=cut == (8, 2)) for case in cases for cut in CUTS[num_processes]
    }
    if num_processes > 1:
        check_average_of_processes(output.with_suffix(".run"))
        check_evaluated_statistics()
    if BKDConfig(output_dir="unused", use_cpu=True).process_index == 0:
        torch.save(outcomes, output)
    leave_process_group()
    # One that runs on could abort the interpreter on its way out.
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads
