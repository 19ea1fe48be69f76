"""Scripts report errors in one line, and no failing print stops them."""

from __future__ import annotations

import select
import subprocess
import sys

import pytest
import torch

from bkd_hf import InputError
from bkd_hf.errors import run_script
from bkd_hf.run_folder import has_checkpoint
from tests.conftest import REPOSITORY
from tests.faults import run

WORK = """
import sys
from pathlib import Path
from bkd_hf.errors import InputError, run_script

def work():
    for number in range(5000):
        print("τ → \\ud800", number)
    Path(sys.argv[1]).write_text("computed")
    if len(sys.argv) > 2:
        raise InputError("τ \\x1b[31m is wrong")

sys.exit(run_script(work, "again"))
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_lines_are_read_at_once_from_an_unbuffered_interpreter(stream):
    """As containers start it (`python -u`, PYTHONUNBUFFERED)."""
    code = f"""
import sys
from bkd_hf.errors import keep_printing
keep_printing()
print("said", file=sys.{stream})
sys.stdin.read()
"""
    command = [sys.executable, "-u", "-c", code]
    pipes = {"stdin": subprocess.PIPE, stream: subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes) as process:
        reader = getattr(process, stream)
        is_said, _, _ = select.select([reader], [], [], 30)
        process.stdin.close()
        assert is_said


@pytest.mark.parametrize(
    ("shell", "environment"),
    [
        ("{} > {folder}/out", {"PYTHONIOENCODING": "ascii"}),
        ("{} > {folder}/out", {"PYTHONIOENCODING": "cp1252"}),
        ("{} > {folder}/out", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("{} | head -n 1", {}),
        ("{} > /dev/full", {}),
        ("{} >&-", {}),
        ("{} >&- 2>&-", {}),
        ("{} > /dev/full 2> /dev/full", {}),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_no_print_stops_the_work(tmp_path, shell, environment, fails):
    (tmp_path / "work.py").write_text(WORK, encoding="utf-8")
    words = f"{sys.executable} {tmp_path}/work.py {tmp_path}/result {'fails' if fails else ''}"
    command = f"set -o pipefail; {shell.format(words, folder=tmp_path)}"
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), **environment}
    process = subprocess.run(["bash", "-c", command], capture_output=True, env=variables, timeout=100)
    assert process.returncode == (2 if fails else 0), process.stderr
    assert (tmp_path / "result").read_text() == "computed"
    lines = process.stderr.decode("ascii", "replace").splitlines()
    assert [line.split(":")[0] for line in lines] in ([], ["error"], ["warning"], ["warning", "error"])
    assert not any("\x1b" in line for line in lines)


def test_an_interruption_tells_of_what_there_is(tmp_path, capsys):
    def work() -> None:
        raise KeyboardInterrupt

    assert run_script(work, lambda: f"checkpoint: {has_checkpoint(tmp_path)}") == 130
    (tmp_path / "teacher" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "teacher" / "checkpoint-3" / "complete.json").touch()
    assert run_script(work, lambda: f"checkpoint: {has_checkpoint(tmp_path)}") == 130
    said = capsys.readouterr().err
    assert said.splitlines() == ["interrupted: checkpoint: False", "interrupted: checkpoint: True"]


@pytest.mark.parametrize("script", ["publish.py", "make_long_tailed.py", "compare.py", "run_bkd.py"])
def test_help(script):
    code, said = run("--help", script=script)
    assert code == 0
    assert "--" in said


@pytest.mark.slow
def test_help_on_any_terminal():
    words = [sys.executable, str(REPOSITORY / "scripts" / "run_bkd.py"), "--help"]
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii", "HOME": "/tmp"}
    process = subprocess.run(words, capture_output=True, env=variables, timeout=200, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert "--" in process.stdout


UNREACHED = RuntimeError("Application timeout caused pair closure")  # gloo's, where a network is gone


@pytest.mark.parametrize(("error", "code"), [(InputError("no"), 2), (OSError(28, "No space left"), 1), (UNREACHED, 1)])
def test_exit_codes(capsys, error, code):
    def work() -> None:
        raise error

    assert run_script(work, "again") == code
    assert capsys.readouterr().err.startswith("error: ")


class Broken(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        try:
            raise ValueError("why")
        except ValueError as error:
            raise InputError("Image 0 is broken.") from error


def test_an_error_of_a_worker_is_as_short_as_in_this_process():
    with pytest.raises(InputError) as raised:
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    assert str(raised.value) == "Image 0 is broken."
