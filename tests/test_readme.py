"""README is correct: its code runs, CI runs its commands, its options and files exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from PIL import Image

import bkd_hf
from bkd_hf import load_results
from bkd_hf.arguments import _build_parser
from bkd_hf.card import build
from bkd_hf.plots import figure_names
from tests.conftest import REPOSITORY
from tests.readme_table import to_markdown

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def block_after(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, flags=re.DOTALL)
    assert found, marker
    return found[1]


@pytest.mark.slow
def test_its_python_runs(tmp_path):
    code = "\n".join(block_after(f"test: {name}") for name in ("quick start", "own loss"))
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert process.returncode == 0, process.stderr
    assert re.search(r"^{'label': '\d'", process.stdout, re.M)


def test_two_commands_do_all_the_set_up():
    assert block_after("ci: main-job").startswith("pip install -e . && accelerate launch scripts/run_bkd.py")
    assert block_after("ci: tests").startswith('pip install -e ".[test]" && ')


def test_every_option_in_it_exists():
    scripts = [path.read_text() for path in (REPOSITORY / "bkd_hf" / "commands").glob("*.py")]
    of_scripts = {option for script in scripts for option in re.findall(r'add_argument\(\s*"(--\w+)"', script)}
    known = set(_build_parser()._option_string_actions) | of_scripts | {"--num_processes"}
    of_others = {"--index-url", "--index", "--dist", "--flavor", "--secrets", "--with", "--gpus"}
    named = set(re.findall(r"(?<![\w-])--[a-z_]+(?:_[a-z]+)*\b", README)) - of_others
    assert named
    teacher_options = {f"--teacher_{option.removeprefix('--')}" for option in known}
    assert named - known - teacher_options == set()


WHEEL = f"/dist/bkd_hf-{bkd_hf.__version__}-py3-none-any.whl"


def test_the_hub_would_take_its_job(tmp_path):
    (command,) = re.findall(r"`hf (jobs uv run .*?) …`", README)
    (tmp_path / "dist").mkdir()
    hf = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()"]
    words = shlex.split(command.replace("uv run", "uv run --dry-run"))
    process = subprocess.run([*hf, *words], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    told = dict(re.findall(r"^ +(\w+) +(.+)$", process.stdout, re.M))
    assert (told["script"], told["args"], told["volumes"]) == ("bkd-hf", "run --push_to_hub", "./dist:/dist")
    assert told["with"] == WHEEL


def test_its_container_has_the_wheel():
    manual, *lines = (REPOSITORY / "scripts" / "Dockerfile").read_text().splitlines()
    assert f"`{manual.removeprefix('# python -m build && ')}`" in README
    install = r"RUN --mount=source=dist,target=/dist pip install --no-cache-dir (\S+)"
    minor, wheels = re.fullmatch(rf"FROM python:3\.(\d+)-slim\n{install}", "\n".join(lines)).groups()
    assert int(minor) >= 11
    assert fnmatch(WHEEL, wheels)


def test_every_file_in_it_exists():
    files = set(re.findall(r"(?:scripts|bkd_hf|tests|model_cards)/[\w./-]*\w", README))
    assert files
    assert [file for file in files if not (REPOSITORY / file).exists()] == []


def test_its_table_is_that_of_the_committed_results():
    assert to_markdown() in README


@pytest.mark.parametrize("folder", sorted(path.parent for path in (REPOSITORY / "model_cards").glob("*/results.json")))
def test_measured_runs_are_real_results(folder: Path):
    results = load_results(folder)
    assert results["student"]["metrics"]["accuracy"] > results["teacher"]["metrics"]["accuracy"]
    for figure in (folder / "figures").glob("*.png"):
        assert Image.open(figure).size[0] >= 900


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("digits", {"repo_id": "user/digits-bkd"}),
        ("cifar100_lt_40_epochs/bkd/seed0", {"repo_id": "user/cifar100-lt-bkd", "dataset_id": "uoft-cs/cifar100"}),
    ],
)
def test_cards_are_those_of_their_results(folder, options):
    folder = REPOSITORY / "model_cards" / folder
    assert (folder / "README.md").read_text() == str(build(folder, license="apache-2.0", **options))
    assert {path.name for path in (folder / "figures").glob("*.png")} == set(figure_names(load_results(folder)))
