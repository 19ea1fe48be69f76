"""Does the work for test_hub.py, in one process that talks to the loopback Hub: `… OUTPUT_DIR SCRATCH`.

It prints one JSON object. It is a separate process, as the client reads HF_ENDPOINT when it is imported.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import evaluate
import numpy as np
import torch

from bkd_hf import BKDConfig, BKDTrainer, ImageDataset, load_classifier, load_image_dataset, load_processor
from bkd_hf import hub as bkd_hub
from bkd_hf.streams import count_labels, load_stream
from tests.conftest import REPOSITORY
from tests.faults import main_of
from tests.hub_server import READ_TOKEN, Hub

torch.set_num_threads(1)
hub = Hub(os.environ["HF_ENDPOINT"])


def call(main: Any, *argv: str) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*argv])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def faults(folder: Path) -> dict[str, Any]:
    """Each fault, first passing, then for ever."""
    publish, found = main_of("publish.py"), {}
    bkd_hub.SILENCE = 0.2
    time.sleep = lambda seconds: None  # neither we nor the client wait in earnest
    cases = [
        ("create", "503", 1), ("preupload", "500", 1), ("lfs", "429", 1), ("put", "cut", 1), ("commit", "cut", 1),
        ("commit", "409", 1), ("commit", "lost", 1), ("validate", "503", 1), ("commit", "silent", 1),
        ("create", "401", None), ("create", "403", None), ("create", "500", None), ("create", "cut", None),
        ("commit", "403", None), ("commit", "409", None), ("commit", "429", None), ("commit", "503", None),
        ("commit", "cut", None), ("put", "403", None), ("preupload", "silent", None),
    ]  # fmt: skip
    for route, fault, times in cases:
        repo_id = f"user/{route}-{fault}-{times or 'ever'}"
        hub.fail(route, fault, times)
        outcome = call(publish, str(folder), "--repo_id", repo_id)
        hub.fail(route, fault, 0)
        again = call(publish, str(folder), "--repo_id", repo_id)
        found[f"{route} {fault} {times or 'ever'}"] = {
            **outcome,
            "on_disk": (folder / "model.safetensors").exists(),
            "again": again["code"],
            "commits": hub.commits(repo_id),
        }
    return found


def plain_hub(folder: Path) -> dict[str, Any]:
    """A Hub that knows no more than publishing needs; names without a user; what was chosen for a card before."""
    publish, found = main_of("publish.py"), {}
    hub.fail("auth", "404", None)
    before = len(hub.requests())
    found["first"] = call(
        publish, str(folder), "--repo_id", "plain", "--license", "mit", "--dataset_id", "user/digits", "--private"
    )
    found["requests"] = hub.requests()[before:]
    found["again"] = call(publish, str(folder), "--repo_id", "user/plain", "--private")
    hub.fail("auth", "404", 0)
    found["commits"] = hub.commits("user/plain")
    found["card"] = hub.files("user/plain")["README.md"].decode()
    hub.fail("commit", "500", None)
    found["with teacher"] = call(
        publish, str(folder), "--repo_id", "user/plain", "--license", "afl-3.0", "--push_teacher"
    )
    hub.fail("commit", "500", 0)
    return found


def published_twice(folder: Path, scratch: Path) -> dict[str, Any]:
    """A card that was edited by hand, and a file that is gone the second time; another that is not ours."""
    copy, publish = scratch / "edited", main_of("publish.py")
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoint-*", "teacher"))
    (copy / "vocab.txt").write_text("a\nb\n")
    first = call(publish, str(copy), "--repo_id", "user/edited", "--license", "mit")
    card = (copy / "README.md").read_text()
    (copy / "README.md").write_text(card.replace("license: mit", "license: other\nlicense_name: beer") + "\nThanks!\n")
    (copy / "vocab.txt").unlink()
    before = hub.files("user/edited")
    dry = call(publish, str(copy), "--repo_id", "user/else", "--dry_run")
    written = (copy / "README.md").read_text()
    again = call(publish, str(copy), "--repo_id", "user/edited", "--license", "apache-2.0")
    after = hub.files("user/edited")
    return {
        "codes": [first["code"], dry["code"], again["code"]], "gone": sorted({*before} - {*after}),
        "new": sorted({*after} - {*before}), "told": again["err"], "of_dry_run": written,
        "card": after["README.md"].decode(),
    }  # fmt: skip


def refusals(folder: Path, scratch: Path) -> dict[str, str]:
    publish = main_of("publish.py")
    unfinished, old = scratch / "unfinished", scratch / "old"
    for copy in (unfinished, old):
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoint-*", "teacher"))
    (unfinished / "results.json").unlink()
    results = json.loads((old / "results.json").read_text())
    (old / "results.json").write_text(json.dumps({**results, "schema_version": 99}))
    leaking = scratch / "leaking"
    shutil.copytree(folder, leaking, ignore=shutil.ignore_patterns("checkpoint-*", "teacher"))
    config = json.loads((leaking / "config.json").read_text())
    (leaking / "config.json").write_text(json.dumps({**config, "from": f"{Path.home()}/models"}))
    elsewhere = scratch / "elsewhere" / "models"
    elsewhere.mkdir(parents=True)
    hub.add("user/public")
    before = len(hub.requests())
    calls = {
        "malformed": call(publish, str(folder), "--repo_id", "user/a/b"),
        "no folder": call(publish, str(scratch / "nowhere"), "--repo_id", "user/x"),
        "unfinished": call(publish, str(unfinished), "--repo_id", "user/x"),
        "schema": call(publish, str(old), "--repo_id", "user/x"),
        "card of its own": call(
            publish, str(REPOSITORY / "bkd_hf" / "long_tail"), "--repo_id", "user/x", "--license", "mit"
        ),
        "leak": call(publish, str(leaking), "--repo_id", "user/x"),
        "leak, dry": call(publish, str(leaking), "--repo_id", "user/x", "--dry_run"),
        "dataset": call(publish, str(folder), "--repo_id", "user/x", "--dataset_id", "my digits"),
    }
    (leaking / "config.json").write_text(json.dumps({**config, "from": f"{elsewhere}/vit"}))
    calls["other path"] = call(publish, str(leaking), "--repo_id", "user/x")
    silent = len(hub.requests()) == before
    hub.add("user/readable")
    for case, token, repo_id in (
        ("no token", "", "user/x"),
        ("wrong token", "hf_unknown", "user/x"),
        ("cannot write", READ_TOKEN, "user/readable"),
    ):
        options = ["--push_to_hub", "--hub_model_id", repo_id, "--output_dir", str(scratch / "no")]
        with mock.patch.dict(os.environ, {"HF_TOKEN": token}):
            calls[case] = call(main_of("run_bkd.py"), *options)
    assert not (scratch / "no").exists()  # noticed before any work
    calls["license"] = call(publish, str(folder), "--repo_id", "user/x", "--license", "beer")
    calls["read-only token"] = call(publish, str(folder), "--repo_id", "user/x", "--token", READ_TOKEN)
    calls["other's namespace"] = call(publish, str(folder), "--repo_id", "somebody/x")
    calls["public already"] = call(publish, str(folder), "--repo_id", "user/public", "--private")
    assert all(outcome["code"] in (1, 2) for outcome in calls.values()), calls
    return {"silent": silent, **{name: outcome["err"] for name, outcome in calls.items()}}


def dry_run(folder: Path) -> dict[str, Any]:
    before = len(hub.requests())
    outcome = call(
        main_of("publish.py"), str(folder), "--repo_id", "user/dry", "--license", "mit", "--dry_run",
        "--push_teacher",
    )  # fmt: skip
    return {**outcome, "requests": len(hub.requests()) - before, "card": (folder / "README.md").read_text()}


def from_python(scratch: Path) -> dict[str, Any]:
    """`trainer.push_to_hub()`, of a student and a teacher that takes other pixels."""
    data = load_image_dataset("digits")
    data = {name: split.select(range(64)) for name, split in data.items()}
    names = data["train"].features["label"].names
    processors = [load_processor("cifar-resnet-8", 16), load_processor("cifar-resnet-8", 8)]
    images = {
        name: ImageDataset(split, processors[0], teacher_processor=processors[1]) for name, split in data.items()
    }
    args = BKDConfig(
        output_dir=str(scratch / "python"), max_steps=2, use_cpu=True, disable_tqdm=True, push_to_hub=True,
        hub_model_id="user/python", save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer = BKDTrainer(
        load_classifier("cifar-resnet-8", names, 16), load_classifier("cifar-resnet-8", names, 8), args,
        train_dataset=images["train"], eval_dataset=images["eval"], processing_class=processors[0],
        class_counts=np.bincount(data["train"]["label"], minlength=10) + 1,
    )  # fmt: skip
    trainer.train()
    pushed_while_training = hub.commits("user/python")
    url = trainer.push_to_hub(license="mit", dataset="Digits (mine)", dataset_tags=["user/digits"], tags="tiny")
    card = hub.files("user/python")["README.md"].decode()
    files = sorted(hub.files("user/python"))
    trainer.create_model_card("en", "mit")
    same = json.loads((scratch / "python" / "results.json").read_text())["student"]["training"]["steps"]
    args.max_steps = 3
    trainer.train()
    trainer.create_model_card(license="mit", dataset=["Digits", "more"])
    new = json.loads((scratch / "python" / "results.json").read_text())["student"]["training"]["steps"]
    return {
        "url": url, "while_training": pushed_while_training, "files": files, "card": card, "steps": [same, new],
    }  # fmt: skip


def split_and_spaces(output_dir: Path, scratch: Path) -> dict[str, Any]:
    pushed = call(
        main_of("make_long_tailed.py"), "--dataset_name", "digits", "--imbalance_ratio", "10", "--seed", "3",
        "--output_dir", str(scratch / "split"), "--push_to_hub", "user/digits-lt",
    )  # fmt: skip
    again = call(main_of("publish.py"), str(scratch / "split"), "--repo_id", "user/digits-lt")
    loaded = datasets.load_dataset("user/digits-lt")
    reloaded = load_image_dataset("user/digits-lt")
    counts = scratch / "counts.json"
    counts.write_text(json.dumps(count_labels("user/digits-lt")))
    stream = load_stream("user/digits-lt", str(counts))
    space = call(main_of("publish.py"), str(REPOSITORY / "bkd_hf" / "long_tail"), "--repo_id", "user/long_tail")
    metric = evaluate.load("user/long_tail")
    app = call(main_of("publish.py"), str(output_dir), "--repo_id", "user/digits", "--space", "user/app", "--private")
    value = metric.compute(predictions=[[2.0, 0.0], [1.0, 0.0]], references=[0, 1], class_counts=[500, 5])
    return {
        "pushed": pushed, "again": again["code"], "commits": hub.commits("user/digits-lt", "dataset"),
        "splits": {name: len(split) for name, split in loaded.items()},
        "names": loaded["train"].features["label"].names,
        "labels": reloaded["train"]["label"][:],
        "streamed": {"train": sorted(stream["train"].sample["label"]), "eval": sorted(stream["eval"]["label"])},
        "app": app, "app_files": sorted(hub.files("user/app", "space")),
        "app_is_private": hub.is_private("user/app", "space"),
        "app_card": hub.files("user/app", "space")["README.md"].decode(),
        "space": space, "space_files": sorted(hub.files("user/long_tail", "space")), "metric": value,
        "space_card": hub.files("user/long_tail", "space")["README.md"].decode(),
        "card": hub.files("user/digits-lt", "dataset")["README.md"].decode(),
    }  # fmt: skip


if __name__ == "__main__":
    output_dir, scratch = map(Path, sys.argv[1:])
    outcome = {
        "dry_run": dry_run(output_dir),
        "plain": plain_hub(output_dir),
        "refusals": refusals(output_dir, scratch),
        "faults": faults(output_dir),
        "python": from_python(scratch),
        "split": split_and_spaces(output_dir, scratch),
        "twice": published_twice(output_dir, scratch),
    }
    (scratch / "outcome.json").write_text(json.dumps(outcome))
