"""Several machines: two real launchers, and forked processes (which need not import torch) that simulate two nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import matplotlib
import pytest

from bkd_hf import load_processor
from bkd_hf.commands.run import main
from tests.conftest import REPOSITORY, WORKER_ENVIRONMENT, free_port
from tests.faults import Run, in_two_processes, refused_in_one_line, same_outcome, start_two, weights
from tests.test_stopping import SHORT, wait_for
from tests.tiny_models import tiny_vit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> tuple:
    """Options of a run that trains a teacher; its models have dropout, so that generators count."""
    folder = tmp_path_factory.mktemp("vit")
    tiny_vit(0, num_labels=10, image_size=16, hidden_dropout_prob=0.1).save_pretrained(folder)
    load_processor("cifar-resnet-8", image_size=16).save_pretrained(folder)
    return (
        *("--model_name_or_path", folder, "--method", "bkd", "--force_distillation", "--image_size", 16, *SHORT),
        *("--per_device_train_batch_size", 16, "--load_best_model_at_end", "true", "--eval_strategy", "steps"),
        *("--eval_steps", 8, "--save_steps", 8, "--teacher_cache_views", 2, "--ddp_timeout", 60),
        *("--num_threads", 1),  # sums over threads may be rounded in another order
    )


def ends(runs: list[Run], *codes: int) -> list[str]:
    assert [process.wait() for process in runs] == [*codes], [process.output for process in runs]
    return [process.output for process in runs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vit) -> Path:
    """A run of two processes on one machine, that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ends(start_two(*vit, "--teacher_cache", folder.parent / "cache", "--output_dir", folder), 0, 0)
    return folder


def test_two_machines_with_disks_of_their_own_do_the_same_run(tmp_path, vit, whole):
    nodes = [("--output_dir", tmp_path / name / "run", "--teacher_cache", tmp_path / name / "cache") for name in "ab"]
    here, there = (Path(options[1]) for options in nodes)
    runs = start_two(*vit, "--ddp_timeout", 20, nodes=nodes)
    wait_for(here / "checkpoint-8" / "complete.json")
    runs[1].kill(signal.SIGSTOP)
    code = runs[0].wait()  # and does not wait for ever
    assert "Another process of this run has ended, or has been silent" in refused_in_one_line(code, runs[0].output)
    runs[1].kill()
    runs[1].wait()
    assert not any(there.glob("checkpoint-*"))
    said = ends(start_two(*vit, nodes=nodes), 0, 0)
    assert "Continuing from checkpoint-8" in said[0]
    for part in (".", "teacher"):
        same_outcome(here / part, whole / part)
    assert weights(there / "teacher") == weights(here / "teacher")
    assert not (there / "results.json").exists()
    said = ends(start_two(*vit, nodes=nodes), 0, 0)
    assert "This run is finished" in said[0]


def test_two_launchers_with_homes_of_their_own_do_the_same_run(tmp_path, vit, whole):
    words = ["torchrun", "--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    words += [REPOSITORY / "scripts/run_bkd.py", *vit, "--method", "ce"]
    launched, folders = [], [tmp_path / name / "run" for name in "ab"]
    for folder in folders:
        own = {name: str(folder.parent / name.lower()) for name in ("HOME", "HF_HOME", "TMPDIR")}
        own["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # or each would look for all fonts
        Path(own["TMPDIR"]).mkdir(parents=True)
        argv, environment = [*map(str, words), "--output_dir", str(folder)], WORKER_ENVIRONMENT | own
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        launched.append(subprocess.Popen(argv, env=environment, **pipes))
    said = [process.communicate()[0] for process in launched]
    assert [process.returncode for process in launched] == [0, 0], said
    (main,) = (folder for folder in folders if (folder / "results.json").exists())
    same_outcome(main, whole / "teacher")
    (other,) = {*folders} - {main}
    assert [path.name for path in other.iterdir()] == ["checkpoint-24"]  # the best one, which it had to load


def test_machines_that_are_told_different_things_are_refused(tmp_path, vit):
    nodes = [("--output_dir", tmp_path / "run", "--learning_rate", rate) for rate in (0.1, 0.2)]
    for said in ends(start_two(*vit, "--method", "ce", nodes=nodes), 2, 2):
        error = refused_in_one_line(2, said)
        assert "told different things: --learning_rate is 0.1 for the first, 0.2 for another" in error


def _worker(argv: list[str], folder: Path) -> None:
    (folder / f"{os.environ['TORCHELASTIC_RESTART_COUNT']}-{os.environ['RANK']}").write_text(str(os.getpid()))
    if code := main(argv):
        os._exit(code)


def test_torchrun_continues_after_a_worker_was_killed(tmp_path, vit, whole):
    argv = [*map(str, vit), "--method", "ce", "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]

    def kill() -> None:
        wait_for(tmp_path / "run" / "checkpoint-8" / "complete.json")
        os.kill(int((tmp_path / "0-1").read_text()), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    in_two_processes(_worker, argv, tmp_path, max_restarts=3)
    assert (tmp_path / "1-0").exists()
    same_outcome(tmp_path / "run", whole / "teacher")
