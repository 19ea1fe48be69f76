"""The app of a run: its data, and its page in a real browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bkd_hf import InputError, load_classifier, load_image_dataset, load_processor, load_results, wilson_interval
from bkd_hf.results import save_json
from bkd_hf.spaces import build_space, class_facts
from tests.conftest import REPOSITORY
from tests.faults import main_of

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium")
#: The browser does nothing of its own.
QUIET = (
    "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "use-fake-ui-for-media-stream", "use-fake-device-for-media-stream",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What is left of a run on the digits, with weights that are trained no further."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(REPOSITORY / "model_cards" / "digits", folder, dirs_exist_ok=True)
    results = load_results(folder)
    results["versions"]["commit"] = None  # as where bkd_hf is no checkout
    save_json(results, folder / "results.json")
    torch.manual_seed(0)
    model = load_classifier("cifar-resnet-8", results["data"]["class_names"], image_size=16)
    model.save_pretrained(folder)
    load_processor("cifar-resnet-8", image_size=16).save_pretrained(folder)
    (folder / "bkd_run.json").write_text(json.dumps({"data": {"dataset_name": "digits"}}))
    return folder


def test_facts_are_those_of_the_results(run):
    results = load_results(run)
    results["data"]["eval_class_counts"][8], results["student"]["metrics"]["per_class_accuracy"][8] = 0, None
    facts = class_facts(results)["classes"]
    assert [known["training_images"] for known in facts] == results["data"]["class_counts"]
    assert (facts[8]["name"], facts[8]["accuracy"]) == ("8", None)
    assert facts[9]["accuracy"] == results["student"]["metrics"]["per_class_accuracy"][9]
    assert facts[9]["interval"] == pytest.approx(wilson_interval(round(facts[9]["accuracy"] * 40), 40), abs=1e-4)


def test_examples_go_from_common_to_rare(run):
    examples = build_space(run, "user/app", examples=3) / "examples"
    evaluation = load_image_dataset("digits")["eval"]
    firsts = [np.asarray(evaluation[evaluation["label"].index(label)]["image"]) for label in (0, 4, 9)]
    assert np.array_equal([np.asarray(Image.open(path))[..., 0] for path in sorted(examples.iterdir())], firsts)
    build_space(run, "user/app")
    assert not list(examples.iterdir())  # off by default


@pytest.mark.parametrize(
    ("options", "without", "says"),
    [
        (["--space", "user/a/b"], None, "'user/a/b' cannot be the id of a repository"),
        (["--space", "user/app"], "results.json", "is no finished run"),
        (["--space", "user/app"], "model.safetensors", "but no model"),
        (["--space", "user/app"], "preprocessor_config.json", "--space: "),
        (["--space", "user/app", "--space_examples", "2"], "bkd_run.json", "--space_examples: "),
        (["--space", "user/app", "--space_examples", "-2"], None, "--space_examples must be 0 or more, got -2"),
        (["--repo_id", "user/model", "--space_examples", "2"], None, "--space_examples is for --space"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_an_app_is_one_line(run, tmp_path, capsys, options, without, says):
    folder = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("space", without or "")))
    assert main_of("publish.py")([str(folder), *options, "--dry_run"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert says in error[0]
    assert not (folder / "space").exists()


def test_texts_have_no_app(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("space")))
    results = json.loads((folder / "results.json").read_text())
    results["data"]["task"] = "text"
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match="--space is for --task image, and this is --task text: leave it out"):
        build_space(folder, "user/app")


@pytest.mark.parametrize("library", ["gradio", "onnxruntime"])
def test_missing_libraries_are_one_line(run, tmp_path, library):
    space = shutil.copytree(build_space(run, "user/app"), tmp_path / "app")
    if library == "onnxruntime":
        (space / "model" / "model.onnx").touch()
    code = f"import runpy, sys; sys.modules |= {{'gradio': sys, '{library}': None}}; runpy.run_path('{space}/app.py')"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    command = f"pip install gradio -r {space}/requirements.txt"
    assert (process.returncode, process.stderr) == (1, f"error: {library} is not installed: {command}\n")


# ---- In a browser


@pytest.fixture(scope="module")
def address(run):
    """Of the app, running by itself: bkd_hf is not to be imported."""
    if not (find_spec("gradio") and find_spec("playwright") and CHROMIUM):
        pytest.skip("needs a browser and its driver: apt-get install chromium && pip install gradio playwright")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    space = shutil.copytree(build_space(run, "user/app", examples=2), run.parent / "app")
    (space / "bkd_hf.py").write_text("raise ImportError('the app stands alone')")
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_PORT": str(port)}
    with subprocess.Popen([sys.executable, str(space / "app.py")], env=environment) as process:
        for _ in range(900):  # at most 3 minutes, of a machine that does much else
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
        process.terminate()


def test_the_page_answers_and_says_how_far_to_trust_it(run, address, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    (tmp_path / "broken.png").write_text("no picture")
    model, data = load_classifier(str(run), load_results(run)["data"]["class_names"]).eval(), load_results(run)["data"]
    with torch.no_grad():
        logits = model(**load_processor(str(run))(picture, return_tensors="pt")).logits[0]
    expected = logits.softmax(dim=0).sort(descending=True)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{name}" for name in QUIET])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(60_000)  # of a machine that does much else
        expect.set_options(timeout=60_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        hint, answers = page.get_by_text("Choose a picture, or take one"), page.locator("#answers li")
        expect(hint).to_be_visible()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
        expect(page.get_by_role("alert")).to_have_text("This file is no picture that can be read: try a JPEG or PNG.")
        page.get_by_label("Remove Image").click()
        expect(hint).to_be_visible()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "picture.png")
        expect(answers).to_have_count(5)
        for shown, probability, index in zip(answers.all_inner_texts(), *expected, strict=False):
            count, badge = data["class_counts"][index], r"\s+rare class: trust less"
            line = rf"{data['class_names'][index]}{badge if count < 20 else ''}\s+{probability:.1%}\s+"
            known = rf"{count} training images · test accuracy \d+% \(\d+% to \d+%; 40 images\)"
            assert re.fullmatch(line + known, shown.strip())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing to scroll sideways
        page.get_by_label("Remove Image").click()
        expect(answers).to_have_count(0)
        page.locator(".gallery-item").first.click()  # an example
        expect(answers).to_have_count(5)
        page.get_by_label("Remove Image").click()
        page.get_by_label("Capture from camera").click()
        page.get_by_text("Access Webcam").click()
        page.wait_for_function("[...document.querySelectorAll('video')].some(video => video.currentTime > 0)")
        page.get_by_label("capture photo").click()
        expect(answers).to_have_count(5)
        browser.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
