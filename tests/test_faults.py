"""Runs survive kills, full disks, damaged files and second processes: nothing is lost or silently wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from bkd_hf import BKDConfig, BKDTrainer, ImageDataset, InputError, load_classifier, load_image_dataset, load_processor
from bkd_hf.arguments import parse_arguments
from bkd_hf.files import holder_of, is_open_in_a_run, lock, replacing, unlock, write_text
from bkd_hf.hub import prepare
from bkd_hf.results import load_results
from bkd_hf.run_folder import claim_output_dir, last_complete_checkpoint, mark_complete, record_run, run_state
from tests import faults
from tests.faults import CHEAP, DAMAGES, RECIPE, Run, damage, interrupt, paint, refused_in_one_line, run, same_outcome


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("faults") / "run"
    os.umask(umask := os.umask(0o027))
    os.umask(0o027)
    code, said = run(*CHEAP, "--output_dir", folder)
    os.umask(umask)
    assert code == 0, said
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(autouse=True)
def _let_go():
    yield
    unlock()


def told(folder: Path, *options: str):
    return parse_arguments([*CHEAP, "--output_dir", str(folder), *options], digits_recipe=RECIPE)


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- Kills


@pytest.mark.slow
def test_a_killed_run_goes_on_and_nobody_holds_its_folder(whole, tmp_path):
    folder = tmp_path / "run"
    first = Run(*CHEAP, "--output_dir", folder)
    wait_for(lambda: (folder / "checkpoint-8").exists())
    holder = holder_of(folder)
    assert holder is not None
    assert holder.startswith(f"process {first.process.pid} on ")
    second = refused_in_one_line(*run(*CHEAP, "--output_dir", folder))
    assert f"{folder} is in use, by process {first.process.pid} on " in second
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert holder_of(folder) is None
    code, said = run(*CHEAP, "--output_dir", folder)
    assert code == 0, said
    assert "Continuing from checkpoint-" in said
    same_outcome(folder, whole)


def test_permissions_are_those_that_the_user_chose(whole):
    modes = {path.relative_to(whole).as_posix(): path.stat().st_mode & 0o777 for path in whole.rglob("*")}
    assert {name for name, mode in modes.items() if mode not in (0o640, 0o750)} == set()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with suppress(RuntimeError), replacing(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- Full disks


@pytest.mark.slow
def test_files_that_find_no_room(whole, tmp_path):
    folder = tmp_path / "run"
    for size in (30, 100_000):  # for the run's own record, for weights
        refused_in_one_line(*run(*CHEAP, "--output_dir", folder, file_size=size))
    code, said = run(*CHEAP, "--output_dir", folder)
    assert code == 0, said
    same_outcome(folder, whole)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.slow
def test_full_disk(whole, tmp_path):
    try:
        with faults.small_disk(tmp_path / "disk", 1500) as enlarge:
            folder = tmp_path / "disk" / "run"
            error = refused_in_one_line(*run(*CHEAP, "--output_dir", folder))
            assert "the same command continues from the last checkpoint" in error
            enlarge()
            code, said = run(*CHEAP, "--output_dir", folder)
            assert code == 0, said
            same_outcome(folder, whole)
    except OSError as error:
        pytest.skip(f"this machine does not mount: {error}")


@pytest.mark.parametrize("place", ["link", "file/below", "long" * 100, "/proc/nowhere"])
def test_folders_that_cannot_be(tmp_path, place):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^--output_dir .*(link to|cannot be used)"):
        claim_output_dir(told(tmp_path / place))


# ---- Checkpoints


def test_a_checkpoint_counts_if_all_of_it_is_as_it_was_written(copy, tmp_path):
    interrupt(copy, last=20)
    newest, spare = copy / "checkpoint-20", tmp_path / "spare"
    shutil.copytree(newest, spare)
    assert last_complete_checkpoint(copy) == str(newest)
    for path in spare.iterdir():
        for how in DAMAGES:
            damage(newest / path.name, how)
            with pytest.warns(UserWarning, match=r"checkpoint-20 is not used: it"):
                assert last_complete_checkpoint(copy) == str(copy / "checkpoint-16"), (path.name, how)
            shutil.copy(path, newest)
    assert last_complete_checkpoint(copy) == str(newest)


def test_the_last_checkpoint_knows_all_of_the_last_epoch(copy, whole):
    interrupt(copy, last=22)
    code, said = run(*CHEAP, "--output_dir", copy)
    assert code == 0, said
    assert "Continuing from checkpoint-22" in said
    same_outcome(copy, whole)


def test_the_one_before_a_damaged_checkpoint_is_used(copy, whole):
    interrupt(copy, last=20)
    damage(copy / "checkpoint-20" / "optimizer.pt", "flipped")
    code, said = run(*CHEAP, "--output_dir", copy)
    assert code == 0, said
    assert "checkpoint-20 is not used: its optimizer.pt is damaged" in said
    assert "Continuing from checkpoint-16" in said
    same_outcome(copy, whole)  # the loss of the resumed epoch too: 16 is in the middle of it
    assert {path.name for path in copy.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (16, 20, 22)}


def small_trainer(output_dir: Path, callbacks=(), **options) -> BKDTrainer:
    images = ImageDataset(load_image_dataset("digits")["train"].select(range(64)), load_processor("cifar-resnet-8"))
    args = BKDConfig(
        str(output_dir), per_device_train_batch_size=16, use_cpu=True, disable_tqdm=True, method="ce", **options
    )
    model = load_classifier("cifar-resnet-8", images.class_names)
    return BKDTrainer(
        model, args=args, train_dataset=images, eval_dataset=images, class_counts=[7] * 10, callbacks=list(callbacks)
    )


def test_checkpoints_are_deleted_by_step_whatever_the_clock_says(tmp_path):
    for name in ("checkpoint-2", "checkpoint-9", "checkpoint-notes"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (4e9, 4e9))
    small_trainer(tmp_path, max_steps=4, save_steps=2, save_total_limit=2).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        "checkpoint-2", "checkpoint-4", "checkpoint-notes"
    }  # fmt: skip


def test_times_survive_a_clock_that_is_set_back(tmp_path, monkeypatch):
    now, offset = time.time, 0.0

    def set_back() -> float:
        nonlocal offset
        offset -= 7.0  # at each look
        return now() + offset

    trainer = small_trainer(tmp_path, max_steps=2, save_strategy="no", eval_strategy="epoch")
    monkeypatch.setattr(time, "time", set_back)
    metrics = trainer.train().metrics
    measured = [metrics["train_runtime"], trainer.evaluate()["eval_runtime"], *(
        value for entry in trainer.state.log_history for name, value in entry.items() if name.endswith("_runtime")
    )]  # fmt: skip
    assert all(-30 < seconds < 60 for seconds in measured)


# ---- What a run is of


def test_other_images_and_weights_are_another_run(copy):
    record = json.loads((copy / "bkd_run.json").read_text())
    names = ("fingerprint", "eval_fingerprint", "class_names")
    identity = {name: record[name] for name in names}
    assert run_state(told(copy), identity) == "finished"
    for name in (*names, "model_weights", "teacher_weights"):
        (copy / "bkd_run.json").write_text(json.dumps({**record, "model_weights": "a", "teacher_weights": "b"}))
        with pytest.raises(InputError, match=f"{name} is .* there, other here"):
            run_state(told(copy), {**identity, name: "other"})


def test_other_evaluation_images_are_named_before_a_finished_run_is_reported(tmp_path):
    argv = (
        *CHEAP, "--dataset_name", tmp_path / "data", "--imbalance_ratio", 2, "--max_class_count", 12,
        "--config", RECIPE, "--output_dir", tmp_path / "run",
    )  # fmt: skip
    paint(tmp_path / "data", "bmp", seed=0)
    code, said = run(*argv)
    assert code == 0, said
    Image.new("RGB", (16, 16)).save(tmp_path / "data/val/cat/0.bmp")
    os.utime(tmp_path / "data/val/cat/0.bmp", (1e9, 1e9))
    assert "eval_fingerprint is " in refused_in_one_line(*run(*argv))
    shutil.rmtree(tmp_path / "data")
    code, said = run(*argv)
    assert (code, "Nobody knows whether the examples of this run are still the same" in said) == (0, True)


@pytest.mark.parametrize("name", ["results.json", "model.safetensors", "config.json"])
def test_a_finished_run_that_is_damaged_is_made_whole(copy, name):
    damage(copy / name, "truncated")
    with pytest.warns(UserWarning, match=f"was finished, but {name} is damaged"):
        assert run_state(told(copy)) == "interrupted"
    damage(copy / "bkd_run.json", "truncated")
    with pytest.raises(InputError, match=r"bkd_run.json is damaged, .*--overwrite"):
        run_state(told(copy))


def test_reports_that_are_missing_are_made_again(copy, whole):
    results = (copy / "results.json").read_bytes()
    (copy / "README.md").unlink()
    (copy / "figures" / "class_accuracy.png").write_bytes(b"")
    (copy / "figures" / "training_curves.png").unlink()
    code, said = run(*CHEAP, "--output_dir", copy)
    assert (code, "This run is finished" in said) == (0, True)
    for name in ("README.md", "figures/class_accuracy.png", "figures/training_curves.png"):
        assert (copy / name).stat().st_size == (whole / name).stat().st_size
    assert (copy / "results.json").read_bytes() == results


# ---- Deleting


def test_what_is_ours_is_deleted_and_the_mark_last(copy, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").write_text("somebody's")
    (copy / "teacher").symlink_to(elsewhere)
    for name in ("results.json.tmp", ".tmpAb12cd", "notes.txt", "checkpoint-notes", "mine.tmp"):
        (copy / name).write_text("")

    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            record_run(told(copy, "--overwrite"), {})
    assert (copy / "bkd_run.json").exists()
    assert not (copy / "results.json").exists()
    record_run(told(copy, "--overwrite"), {})
    assert {path.name for path in copy.iterdir()} == {
        "bkd_run.json", "bkd_run.lock", "notes.txt", "checkpoint-notes", "mine.tmp"
    }  # fmt: skip
    assert (elsewhere / "model.safetensors").exists()


@pytest.mark.parametrize(
    "mistake",
    [("--dataset_name", "./nowhere"), ("--model_name_or_path", "./nowhere"), ("--student_init", "teacher")],
    ids=lambda mistake: mistake[0],
)
def test_a_mistake_deletes_nothing(copy, mistake):
    distil = ("--method", "bkd", "--teacher_model_name_or_path", "cifar-resnet-14") if "init" in mistake[0] else ()
    refused_in_one_line(*run(*CHEAP, *mistake, *distil, "--output_dir", copy, "--overwrite"))
    assert "is finished" in run(*CHEAP, "--output_dir", copy)[1]


@pytest.mark.slow
def test_a_run_that_starts_anew_keeps_its_own_teacher(tmp_path):
    argv = (*CHEAP, "--method", "bkd", "--force_distillation", "--num_train_epochs", "1", "--output_dir", tmp_path)
    for _ in range(2):
        code, said = run(*argv, "--overwrite")
        assert code == 0, said
        assert load_results(tmp_path / "teacher")["student"]["metrics"]


def test_a_folder_in_which_the_first_write_failed_is_ours(tmp_path):
    for name in ("bkd_run.json.tmp", "bkd_run.lock"):
        (tmp_path / name).write_text("{")
    assert run_state(told(tmp_path)) == "new"


# ---- Publishing


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("model.safetensors", "truncated", "model.safetensors does not load"),
        ("model.safetensors", "zeroed", "model.safetensors does not load"),
        ("config.json", "truncated", "config.json does not load"),
        ("config.json", "zeroed", "config.json does not load"),
        ("preprocessor_config.json", "truncated", "preprocessor_config.json does not load"),
        ("results.json", "truncated", "results.json cannot be read"),
        ("modeling_cifar_resnet.py", "zeroed", "modeling_cifar_resnet.py does not load"),
    ],
)
def test_files_that_do_not_load_are_not_published(copy, name, how, message):
    damage(copy / name, how)
    with pytest.raises(InputError, match=message):
        prepare(copy, "user/name")


def test_links_out_of_the_folder_are_not_published(copy, tmp_path):
    (copy / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (copy / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors is a link out of"):
        prepare(copy, "user/name")


def test_empty_figures_are_drawn_again_before_they_are_published(copy):
    (copy / "figures" / "class_accuracy.png").write_bytes(b"")
    assert prepare(copy, "user/name").sizes()["figures/class_accuracy.png"] > 1000


# ---- Comparisons


def test_cells_end_with_the_comparison_and_those_that_outlive_it_are_noticed(tmp_path):
    argv = ("--methods", "ce", "--seeds", "0", "--output_dir", tmp_path / "out", *CHEAP[2:])
    launcher = ("--launcher", "sh -c 'sleep 100 & wait'")  # with a child of its own, as accelerate has

    def cells_of(comparison: Run) -> list[psutil.Process]:
        return psutil.Process(comparison.process.pid).children(recursive=True)

    first = Run(*argv, *launcher, script="compare.py")
    wait_for(lambda: len(cells_of(first)) == 2)
    cells = cells_of(first)
    first.kill(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    assert not any(cell.is_running() and cell.status() != psutil.STATUS_ZOMBIE for cell in cells)

    second = Run(*argv, *launcher, script="compare.py")
    wait_for(lambda: len(cells_of(second)) == 2)
    cells = cells_of(second)
    assert "in use, by process" in refused_in_one_line(*run(*argv, *launcher, script="compare.py"))
    second.kill()
    assert second.wait() == -signal.SIGKILL
    error = refused_in_one_line(*run(*argv, *launcher, script="compare.py"))
    assert "ce seed 0 still runs (a process that has just begun): wait for it, or end it" in error
    for cell in cells:
        cell.kill()


def test_a_checkpoint_without_an_end_is_none(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    with pytest.warns(UserWarning, match="written to its end|its training begins anew"):
        assert last_complete_checkpoint(tmp_path) is None
    mark_complete(tmp_path / "checkpoint-4")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_disk_without_locks_takes_a_run(tmp_path, monkeypatch):
    """As some cluster file systems are mounted; there nothing tells of a second process."""

    def fails_with(number: int) -> None:
        def refuse(*args) -> None:
            raise OSError(number, os.strerror(number))

        for name in ("lockf", "flock"):
            monkeypatch.setattr(f"fcntl.{name}", refuse)

    fails_with(errno.ENOLCK)
    lock(tmp_path)
    unlock()
    assert holder_of(tmp_path) is None
    with (tmp_path / "log").open("w") as log:
        assert not is_open_in_a_run(log)
    fails_with(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        lock(tmp_path)
