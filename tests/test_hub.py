"""Publishing: real runs and real clients against a Hub on the loopback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from bkd_hf import load_image_dataset, load_processor, make_long_tailed
from bkd_hf.hub import prepare
from bkd_hf.modeling_cifar_resnet import CifarResNetForImageClassification
from tests.conftest import REPOSITORY, launch_two_processes
from tests.hub_server import Hub

pytestmark = pytest.mark.slow

PLANTED_USER = "maxine-planted"
SCRIPT = str(REPOSITORY / "scripts" / "run_bkd.py")
PUSHED = {
    ".gitattributes", "README.md", "config.json", "figures/class_accuracy.png", "figures/confusion_student.png",
    "figures/confusion_teacher.png", "figures/training_curves.png", "model.safetensors", "modeling_cifar_resnet.py",
    "preprocessor_config.json", "results.json",
}  # fmt: skip

OF_TEACHER = {name.replace("_student", "") for name in PUSHED - {"figures/confusion_teacher.png"}}


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home") / PLANTED_USER


@pytest.fixture(scope="module")
def environment(hub, home) -> dict[str, str]:
    """A user whose name, home and token can be told from everything else."""
    return hub.environment(HOME=str(home), USER=PLANTED_USER, LOGNAME=PLANTED_USER, OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def output_dir(hub, home, environment) -> Path:
    """A run that was trained and pushed by two processes, with things around it that are not for others."""
    folder = home / "runs" / "digits"
    folder.mkdir(parents=True)
    (home / "recipe.yaml").write_text((REPOSITORY / "scripts" / "recipes" / "digits.yaml").read_text())
    command = [
        *launch_two_processes(), SCRIPT, "--config", str(home / "recipe.yaml"), "--output_dir", str(folder),
        "--num_train_epochs", "2", "--lr_step_epochs", "1", "--lr_step_factors", "0.1", "--disable_tqdm", "true",
        "--hub_token", environment["HF_TOKEN"], "--cache_dir", str(home / "cache"), "--num_threads", "1",
        "--push_to_hub", "--hub_model_id", "user/digits", "--hub_private_repo", "true", "--hub_license", "apache-2.0",
        "--push_teacher",
    ]  # fmt: skip
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("Published: ") == 2  # student and teacher, by the main process alone
    (folder / ".env").write_text(f"HF_TOKEN={environment['HF_TOKEN']}")
    for name in ("notes.txt", "model-old.safetensors", "vocab.bak", "tokenizer_old.json", "figures/me.png"):
        (folder / name).write_text("mine")
    (folder / "figures" / "training_curves.png").unlink()  # drawn again
    return folder


@pytest.fixture(scope="module")
def outcome(hub, output_dir, environment, tmp_path_factory) -> dict:
    """What the worker did, after the run."""
    assert hub.commits("user/digits") == ["Publish with bkd_hf"]
    scratch = tmp_path_factory.mktemp("scratch")
    process = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests" / "hub_worker.py"), str(output_dir), str(scratch)],
        env=environment, capture_output=True, text=True, timeout=290,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads((scratch / "outcome.json").read_text())


# ---- What is pushed


def test_only_what_others_need_is_pushed(hub, output_dir):
    assert (output_dir / "training_args.bin").exists()
    assert set(hub.files("user/digits")) == PUSHED
    assert set(hub.files("user/digits-teacher")) == OF_TEACHER
    assert hub.is_private("user/digits")
    assert hub.is_private("user/digits-teacher")


def test_nothing_private_is_in_any_file(hub, home, environment, outcome):
    secrets = [environment["HF_TOKEN"], str(home), PLANTED_USER, str(REPOSITORY)]
    for repository in ("user/digits", "user/digits-teacher", "user/python"):
        for name, content in hub.files(repository).items():
            for secret in secrets:
                assert secret.encode() not in content, (repository, name, secret)


def test_token_is_in_no_file_of_the_run(output_dir, environment):
    token = environment["HF_TOKEN"].encode()
    files = [path for path in output_dir.rglob("*") if path.is_file() and path.name != ".env"]
    assert any(path.name == "training_args.bin" and "checkpoint" in str(path) for path in files)
    assert [path for path in files if token in path.read_bytes()] == []


def test_pushed_student_loads_without_bkd_hf_and_answers_the_same(hub, output_dir, environment, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    card = hub.files("user/digits")["README.md"].decode()
    snippet = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    code = f"""
import sys
sys.modules["bkd_hf"] = None  # an import of it would fail
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from PIL import Image
model = AutoModelForImageClassification.from_pretrained("user/digits", trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained("user/digits")
with torch.no_grad():
    logits = model(**processor(Image.open("image.png"), return_tensors="pt")).logits
torch.save(logits, "logits.pt")
{snippet}
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 0, process.stderr
    student = CifarResNetForImageClassification.from_pretrained(output_dir).eval()
    inputs = load_processor(str(output_dir))(Image.fromarray(pixels), return_tensors="pt")
    with torch.no_grad():
        expected = student(**inputs).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    answer = student.config.id2label[int(expected.argmax())]
    assert f"'label': '{answer}'" in process.stdout.splitlines()[-1]


def test_dry_run_lists_files_and_writes_the_card(outcome, output_dir):
    dry_run = outcome["dry_run"]
    assert (dry_run["code"], dry_run["requests"]) == (0, 0)
    listed = dict(
        re.findall(r"^ +([\d,]+)  (\S+)$", dry_run["out"].partition("user/dry-teacher")[0], flags=re.M)[::-1]
    )
    sizes = {name: int(size.replace(",", "")) for size, name in listed.items()}
    assert set(sizes) == PUSHED - {".gitattributes"}
    assert sizes["model.safetensors"] == (output_dir / "model.safetensors").stat().st_size
    assert sizes["README.md"] == len(dry_run["card"].encode())
    assert '"user/dry"' in dry_run["card"]
    assert "license: mit" in dry_run["card"]


def test_a_hub_with_the_routes_that_are_needed_is_enough(outcome):
    plain = outcome["plain"]
    assert plain["first"]["code"] == 0, plain["first"]
    needed = (
        "POST /api/repos/create|POST /api/validate-yaml|GET /api/models/user/plain|PUT /__storage__/.*"
        "|POST /api/models/user/plain/(preupload|commit)/main|POST /user/plain.git/info/lfs/objects/batch"
        "|GET /api/models/user/plain/tree/main.*"
    )
    others = [request for request in plain["requests"] if not re.fullmatch(needed, request)]
    assert others == ["GET /api/models/user/plain/auth-check/write"]  # which this Hub does not know


def test_a_card_keeps_what_was_chosen_for_it(outcome):
    plain = outcome["plain"]
    assert (plain["again"]["code"], plain["commits"]) == (0, ["Publish with bkd_hf"])
    metadata = yaml.safe_load(plain["card"].split("---")[1])
    assert (metadata["license"], metadata["datasets"]) == ("mit", ["user/digits"])
    assert 'pipeline("image-classification", "user/plain"' in plain["card"]  # pushed to "plain"


def test_published_again(outcome):
    twice = outcome["twice"]
    assert twice["codes"] == [0, 0, 0]
    assert (twice["gone"], twice["new"]) == (["vocab.txt"], [])
    for card, repo_id in ((twice["card"], "user/edited"), (twice["of_dry_run"], "user/else")):
        assert "license_name: beer" in card
        assert card.rstrip().endswith("Thanks!")
        assert f'pipeline("image-classification", "{repo_id}"' in card
    assert "README.md was edited, so it stays as it is, without license. Delete it" in twice["told"]


def test_only_files_of_an_earlier_publication_are_deleted(output_dir):
    publication, there = prepare(output_dir, "user/x"), ["README.md", "vocab.txt", "notes.md"]
    assert publication.outdated(there) == []
    assert publication.outdated([*there, "results.json"]) == ["vocab.txt"]


def test_the_command_that_goes_on_is_whole(outcome, output_dir):
    error = outcome["plain"]["with teacher"]["err"]
    assert f"publish.py {output_dir} --repo_id user/plain --push_teacher --license afl-3.0` tries again" in error


def test_a_user_without_name_and_home_can_publish(output_dir, monkeypatch):
    def unknown(*_):
        raise KeyError("getpwuid(): uid not found: 54321")

    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("getpass.getuser", unknown)
    monkeypatch.setattr(Path, "home", homeless)
    assert "model.safetensors" in prepare(output_dir, "user/x").files


# ---- When it does not work


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("malformed", "'user/a/b' cannot be the id of a repository"),
        ("no folder", "There is no folder"),
        ("unfinished", "no finished run"),
        ("schema", "schema version 99"),
        ("card of its own", "has a card of its own"),
        ("leak", "config.json holds a path of your machine"),
        ("leak, dry", "config.json holds a path of your machine"),
        ("other path", "config.json holds a path of your machine"),
        ("dataset", "'my digits' cannot be the id of a repository"),
        ("license", "the Hub refuses its card"),
        ("no token", "There is no token for the Hub"),
        ("wrong token", "the Hub does not accept the token"),
        ("cannot write", "(403"),
        ("read-only token", "(403"),
        ("other's namespace", "(403"),
        ("public already", "is there already, and public"),
    ],
)
def test_refusals(outcome, case, reason):
    error = outcome["refusals"][case]
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert reason in error
    assert outcome["refusals"]["silent"]  # what is wrong here needs no Hub


def test_faults_that_pass_are_waited_for(outcome):
    passing = {name: fault for name, fault in outcome["faults"].items() if name.endswith("1")}
    assert len(passing) == 9
    for name, fault in passing.items():
        assert fault["code"] == 0, (name, fault)
        assert fault["commits"] == ["Publish with bkd_hf"], name  # and pushing again changes nothing


def test_faults_that_stay_end_in_one_message_and_lose_nothing(outcome, output_dir):
    staying = {name: fault for name, fault in outcome["faults"].items() if name.endswith("ever")}
    assert len(staying) == 11
    for name, fault in staying.items():
        assert fault["code"] == 1, (name, fault)
        error = [line for line in fault["err"].splitlines() if line.startswith("error: ")]
        assert len(error) == 1, fault
        assert "Traceback" not in fault["err"]
        status = name.split()[1]
        assert ("cannot be reached" if status in ("cut", "silent") else f"({status}") in error[0]
        assert f"python scripts/publish.py {output_dir} --repo_id user/" in error[0]
        assert fault["on_disk"]
        assert fault["again"] == 0
        assert fault["commits"] == ["Publish with bkd_hf"], name


# ---- From Python, data sets, the metric


def test_trainer_pushes_once_with_a_card(outcome):
    pushed = outcome["python"]
    assert pushed["while_training"] == []
    assert {"model.safetensors", "README.md", "results.json", "figures/class_accuracy.png"} <= set(pushed["files"])
    assert not [name for name in pushed["files"] if "checkpoint" in name or name.endswith(".bin")]
    metadata = yaml.safe_load(pushed["card"].split("---")[1])
    assert metadata["license"] == "mit"
    assert "tiny" in metadata["tags"]
    assert "| teacher | student | difference |" in pushed["card"]
    assert "classes of\n[Digits (mine)](https://huggingface.co/datasets/user/digits)" in pushed["card"]
    assert metadata["datasets"] == ["user/digits"]
    assert not {"base_model", "teacher_model"} & set(metadata)  # they are from nowhere on the Hub
    assert "run_bkd.py" not in pushed["card"]
    assert "`None`" not in pushed["card"]
    assert pushed["steps"] == [2, 3]  # measured again after it was trained again


def test_split_can_be_pushed_and_loaded(outcome):
    split = outcome["split"]
    assert split["pushed"]["code"] == 0, split["pushed"]
    assert (split["again"], len(split["commits"])) == (0, 1)
    assert split["names"] == [str(digit) for digit in range(10)]
    expected = make_long_tailed(load_image_dataset("digits")["train"], imbalance_ratio=10, split_seed=3)
    assert split["labels"] == expected["label"][:]
    assert split["splits"] == {"train": len(expected), "test": 400}
    assert split["streamed"] == {"train": sorted(expected["label"]), "eval": sorted([*range(10)] * 40)}
    assert 'load_dataset("user/digits-lt")' in split["card"]
    assert "--dataset_name user/digits-lt\n" in split["card"]


def test_metric_can_be_pushed_as_a_space(outcome):
    split = outcome["split"]
    assert split["space"]["code"] == 0, split["space"]
    assert {"README.md", "app.py", "long_tail.py", "metrics.py", "requirements.txt"} <= set(split["space_files"])
    assert 'evaluate.load("user/long_tail")' in split["space_card"]
    assert split["metric"]["many_shot_accuracy"] == 1.0
    assert split["metric"]["few_shot_accuracy"] == 0.0


def test_app_of_a_run_can_be_pushed_as_a_space(outcome):
    split = outcome["split"]
    assert (split["app"]["code"], split["app_is_private"]) == (0, True), split["app"]
    assert split["app"]["out"].splitlines()[-1].endswith("/spaces/user/app")
    model = {"config.json", "model.safetensors", "modeling_cifar_resnet.py", "preprocessor_config.json"}
    others = {".gitattributes", "README.md", "app.py", "classes.json", "requirements.txt"}
    assert set(split["app_files"]) == others | {f"model/{name}" for name in model}
    metadata = yaml.safe_load(split["app_card"].split("---")[1])
    assert (metadata["sdk"], metadata["app_file"], metadata["models"]) == ("gradio", "app.py", ["user/digits"])
    assert (metadata["title"], metadata["license"]) == ("What is it? digits", "mit")  # as its card
