#!/usr/bin/env python
"""A long-tailed text set, and what each method makes of it: `python text.py --epochs 5 --output text_5.json`.

Docstrings of installed Python packages, to be told apart by package: 480 of the first down to 14 of the last, 60 of
each for the test. A tiny BERT with fresh weights and a WordPiece vocabulary of the training texts; the teacher of a
seed is its `ce` run. Which docstrings there are depends on the versions of the packages, which are recorded.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForSequenceClassification, set_seed

from bkd_hf import BKDConfig, BKDTrainer, long_tail_metrics, long_tailed_counts, post_hoc_logit_adjustment
from bkd_hf.targets import describe_targets, why_collapsed

PACKAGES = (
    "transformers",
    "torch",
    "sklearn",
    "scipy",
    "matplotlib",
    "datasets",
    "pandas",
    "huggingface_hub",
    "accelerate",
)
NUM_TEST, MOST, MAX_TOKENS, VOCABULARY = 60, 2000, 64, 4000
METHODS = ("ce", "kd", "balanced-softmax", "bkd", "bkd-calibrated")


def docstrings(package: str) -> list[str]:
    """Return some docstrings of a package's functions and classes, each once, in the order of its files."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    found: dict[str, None] = {}
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        except SyntaxError:  # of a later Python
            continue
        if len(found) > MOST:
            break
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and len(text := ast.get_docstring(node) or "") >= 60:
                found[" ".join(text.split())[:400]] = None
    return list(found)


def load_texts() -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[int]]:
    """Return training and test texts with their labels, and the class counts."""
    generator, train, test = random.Random(0), [], []
    counts = long_tailed_counts(480, len(PACKAGES), 480 / 14)
    for label, (package, count) in enumerate(zip(PACKAGES, counts, strict=True)):
        texts = docstrings(package)
        generator.shuffle(texts)
        test += [(text, label) for text in texts[:NUM_TEST]]
        train += [(text, label) for text in texts[NUM_TEST : NUM_TEST + count]]
    return train, test, counts


class Texts(torch.utils.data.Dataset):
    """Tokenized texts."""

    def __init__(self, rows: list[tuple[str, int]], tokenizer: BertWordPieceTokenizer):
        encoded = tokenizer.encode_batch([text for text, _ in rows])
        self.input_ids = torch.tensor([each.ids for each in encoded])
        self.attention_mask = torch.tensor([each.attention_mask for each in encoded])
        self.labels = np.array([label for _, label in rows])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs = {"input_ids": self.input_ids[index], "attention_mask": self.attention_mask[index]}
        return {**inputs, "labels": int(self.labels[index])}


def tiny_bert(seed: int) -> BertForSequenceClassification:
    """Return a BERT of two layers."""
    set_seed(seed)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    limits = {"vocab_size": VOCABULARY, "max_position_embeddings": MAX_TOKENS, "num_labels": len(PACKAGES)}
    return BertForSequenceClassification(BertConfig(**size, **limits))


def measure(logits: np.ndarray, labels: np.ndarray, counts: list[int]) -> dict[str, float]:
    """Return accuracies, and how much more often than it occurs the class is answered that is answered most."""
    metrics = long_tail_metrics(logits, labels, counts)
    answers = np.bincount(logits.argmax(axis=1), minlength=len(counts)) / np.bincount(labels)
    names = ("accuracy", "many_shot_accuracy", "medium_shot_accuracy", "few_shot_accuracy", "worst_class_accuracy")
    return {**{name: round(metrics[name], 4) for name in names}, "most_answered": round(float(answers.max()), 2)}


def main() -> None:
    """Train each method with each seed, and write what comes of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    train, test, counts = load_texts()
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator([text for text, _ in train], vocab_size=VOCABULARY, show_progress=False)
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS)
    train_set, test_set = Texts(train, tokenizer), Texts(test, tokenizer)
    cells = []
    for seed in options.seeds:
        teacher = None
        for method in ("ce", *(name for name in options.methods if name != "ce")):
            args = BKDConfig(
                output_dir=tempfile.mkdtemp(), method=method, seed=seed, num_train_epochs=options.epochs,
                per_device_train_batch_size=16, learning_rate=1e-3, save_strategy="no", logging_strategy="epoch",
                use_cpu=True, disable_tqdm=True,
            )  # fmt: skip
            trainer = BKDTrainer(
                model=tiny_bert(seed),
                teacher_model=teacher if args.distillation_loss != "none" else None,
                args=args,
                train_dataset=train_set,
                eval_dataset=test_set,
            )
            statistics = trainer.look_at_targets()
            trainer.train()
            logits = trainer.predict(test_set).predictions
            if method == "ce":
                teacher = trainer.model
            cell = {"method": method, "seed": seed, **measure(logits, test_set.labels, counts)}
            cell["adjusted"] = measure(post_hoc_logit_adjustment(logits, counts), test_set.labels, counts)
            if statistics is not None:
                cell["targets"] = describe_targets(statistics, PACKAGES)
                cell["collapse"] = why_collapsed(statistics, PACKAGES)
            cells.append(cell)
            print(json.dumps(cell), flush=True)
    versions = {name: importlib.metadata.version(name.replace("sklearn", "scikit-learn")) for name in PACKAGES}
    content = {"epochs": options.epochs, "class_counts": counts, "versions": versions, "cells": cells}
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
