"""`bkd-hf` and the package installed by pip work without a checkout."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

import bkd_hf
from bkd_hf.__main__ import main
from bkd_hf.cells import plan_cells
from bkd_hf.machine import launcher_accumulation
from bkd_hf.program import PROGRAM, SCRIPTS, program, script_of, without_checkout
from tests.conftest import REPOSITORY

ELSEWHERE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_commands_are_listed(capsys):
    assert [main(words) for words in ([], ["--help"], ["-h"])] == [0, 0, 0]
    printed = capsys.readouterr().out
    assert re.findall(r"^  (\w+)  ", printed[: len(printed) // 3], re.M) == list(SCRIPTS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bkd_hf {bkd_hf.__version__}\n"


@pytest.mark.parametrize(("word", "hint"), [("comprae", " Did you mean compare?"), ("--seed", "")])
def test_unknown_commands_are_one_line(capsys, word, hint):
    assert main([word]) == 2
    assert capsys.readouterr().err == f"error: bkd-hf {word}: no such command; run, compare, split, publish.{hint}\n"


def test_listing_them_imports_no_library():
    code = "import sys; from bkd_hf.__main__ import main; main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_commands_are_told_as_they_were_called(monkeypatch, tmp_path):
    launcher = ["accelerate", "launch"]
    assert program("split") == ["python", "scripts/make_long_tailed.py"]
    assert program("run", launcher) == [*launcher, "scripts/run_bkd.py"]
    monkeypatch.setattr(sys, "argv", [f"{PROGRAM} split"])
    assert program("split") == ["bkd-hf", "split"]
    assert program("run", launcher) == [*launcher, "-m", "bkd_hf", "run"]
    (cell,) = plan_cells(["ce"], [0], tmp_path, script_of("run"))
    assert cell.command(launcher).startswith("accelerate launch -m bkd_hf run --method ce --seed 0 ")


@pytest.mark.parametrize(
    ("told", "called"),
    [
        (
            "accelerate launch --num_processes 2 scripts/run_bkd.py --config scripts/recipes/text.yaml --seed 1",
            "accelerate launch --num_processes 2 -m bkd_hf run --config text --seed 1",
        ),
        ("accelerate launch scripts/run_bkd.py", "accelerate launch -m bkd_hf run"),
        ("python scripts/compare.py --seeds 0", "python -m bkd_hf compare --seeds 0"),
        ("bkd-hf run --output_dir scripts/run_bkd.py", "bkd-hf run --output_dir scripts/run_bkd.py"),
    ],
)
def test_others_need_no_checkout(told, called):
    assert without_checkout(told) == called


def test_launchers_are_read_up_to_the_module_too(monkeypatch):
    words = "python accelerate launch --gradient_accumulation_steps 4 -m bkd_hf run --gradient_accumulation_steps 2"
    monkeypatch.setattr("psutil.Process", lambda _: SimpleNamespace(cmdline=words.split))
    assert launcher_accumulation() == "4"


# ---- What tools read


def test_metadata_says_the_same_everywhere():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.+?)\]", changes, re.M)[1] == bkd_hf.__version__
    script = (REPOSITORY / "scripts" / "run_bkd.py").read_text(encoding="utf-8")
    lines = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", script, re.M)[1].splitlines()
    inline = tomllib.loads("\n".join(line[2:] for line in lines))
    assert inline["requires-python"] == setup["options"]["python_requires"]
    assert inline["dependencies"] == [setup["metadata"]["name"]]  # which brings the rest, in the ranges of setup.cfg
    source = inline["tool"]["uv"]["sources"]["bkd_hf"]
    assert source == {"path": "..", "editable": True}
    assert (REPOSITORY / "scripts" / source["path"] / "setup.cfg").samefile(REPOSITORY / "setup.cfg")


# ---- A wheel, installed


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Programs of a fresh environment with a wheel made from a source distribution, far from the checkout."""
    if not (find_spec("build") and find_spec("setuptools") and find_spec("pip")):
        pytest.skip("needs build, setuptools and pip: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    source, dist = folder / "source", folder / "dist"
    shutil.copytree(REPOSITORY / "bkd_hf", source / "bkd_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, source)
    python = folder / "environment" / "bin" / "python"
    venv.create(folder / "environment", symlinks=True)

    def call(*words: object) -> str:
        process = subprocess.run([*map(str, words)], cwd=folder, env=ELSEWHERE, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout.strip()

    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source)
    (wheel,) = dist.glob("*.whl")
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    packages = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    # What it needs is here. The files *.pth there, one of which may lead to the checkout, are not read.
    (packages / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    found = call(python, "-c", "import bkd_hf; print(bkd_hf.__file__)")
    assert found == str(packages / "bkd_hf" / "__init__.py")
    return python.parent


def test_wheel_has_all_files_of_the_package(installed):
    (wheel,) = (installed.parent / "lib").glob("*/site-packages/bkd_hf")

    def files(folder: Path) -> set[str]:
        found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return {name for name in found if "__pycache__" not in name}

    assert files(wheel) == files(REPOSITORY / "bkd_hf")


@pytest.mark.slow
def test_wheel_runs(installed, tmp_path):
    def call(*words: object) -> str:
        process = subprocess.run(
            [installed / PROGRAM, *map(str, words)], cwd=tmp_path, env=ELSEWHERE, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    short = (
        "--config", "digits", "--max_train_samples", 40, "--eval_strategy", "no", "--save_strategy", "no",
        "--num_threads", 1, "--disable_tqdm", "true",
    )  # fmt: skip
    call("run", *short, "--method", "ce", "--max_steps", 2, "--output_dir", "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["student"]["training"]["steps"] == 2
    assert results["command"].startswith("accelerate launch -m bkd_hf run --config digits --max_train_samples 40 ")
    assert (tmp_path / "out" / "modeling_cifar_resnet.py").exists()

    options = ("--output_dir", "compared", *short, "--num_train_epochs", 1)
    call("compare", "--methods", "ce", "--seeds", 0, *options)
    assert "Made by `bkd-hf compare --methods ce " in (tmp_path / "compared" / "comparison.md").read_text()
