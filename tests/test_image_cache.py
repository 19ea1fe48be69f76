"""Decoded images on the disk: shared by processes, found by later runs, whole or not there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from bkd_hf import ImageDataset, InputError
from bkd_hf.image_cache import MappedImages, shared_images
from tests.test_transforms import labelled, photos, pixels_of, stored, vit_processor

FORK = multiprocessing.get_context("fork")


def ragged(number: int = 5) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (2 + i, 7 - i, 3), dtype=np.uint8) for i in range(number)]


def open_images(folder: Path, decode=lambda: ({"a": image, "b": image[:1, :1]} for image in ragged())):
    return shared_images(folder, ["a", "b"], decode, lambda: 1000)


def not_again() -> Iterator:
    raise AssertionError("decoded again")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_images_of_any_sizes_come_back(tmp_path):
    open_images(tmp_path / "new" / "entry")
    for images in (
        open_images(tmp_path / "new" / "entry", not_again),
        pickle.loads(pickle.dumps(open_images(tmp_path / "new" / "entry"))),
    ):
        assert len(images["a"]) == 5
        for i, image in enumerate(ragged()):
            assert np.array_equal(images["a"][i], image)
        assert np.array_equal(images["b"][np.array([3, 0])], np.stack([ragged()[3][:1, :1], ragged()[0][:1, :1]]))
        with pytest.raises(ValueError, match="read-only"):
            images["a"][0][:] = 0
    assert names_in(tmp_path / "new") == {"entry"}


def _open_and_report(folder: Path, barrier, reports) -> None:
    def decode() -> Iterator[dict[str, np.ndarray]]:
        reports.put("decodes")
        for image in ragged():
            time.sleep(0.02)  # long enough for the other to come
            yield {"a": image, "b": image[:1, :1]}

    barrier.wait(30)
    images = open_images(folder, decode)
    reports.put([images["a"][i].tobytes() for i in range(5)])


def test_of_two_processes_one_writes_and_both_read(tmp_path):
    barrier, reports = FORK.Barrier(2), FORK.Queue()
    processes = [FORK.Process(target=_open_and_report, args=(tmp_path / "entry", barrier, reports)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [reports.get(timeout=30) for _ in range(3)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert found.count("decodes") == 1
    assert [report for report in found if report != "decodes"] == [[image.tobytes() for image in ragged()]] * 2


def _write_half(folder: Path, half_written) -> None:
    def decode() -> Iterator[dict[str, np.ndarray]]:
        for image in ragged(3):
            yield {"a": image, "b": image[:1, :1]}
        half_written.set()
        time.sleep(60)

    open_images(folder, decode)


def test_what_killed_writers_left_is_removed(tmp_path):
    begun = {name: FORK.Event() for name in ("entry", "another")}
    writers = [FORK.Process(target=_write_half, args=(tmp_path / name, event)) for name, event in begun.items()]
    for writer in writers:
        writer.start()
    assert all(event.wait(30) for event in begun.values())
    for writer in writers:
        writer.kill()
        writer.join(30)
    assert names_in(tmp_path) == {"entry.partial", "another.partial"}
    assert np.array_equal(open_images(tmp_path / "entry")["a"][4], ragged()[4])
    assert names_in(tmp_path) == {"entry"}


def test_what_others_are_writing_is_left_alone(tmp_path):
    half_written = FORK.Event()
    writer = FORK.Process(target=_write_half, args=(tmp_path / "another", half_written))
    writer.start()
    assert half_written.wait(30)
    open_images(tmp_path / "entry")
    assert names_in(tmp_path) == {"entry", "another.partial"}
    writer.kill()
    writer.join(30)


@pytest.mark.parametrize("damage", ["cut off", "size lost", "empty"])
def test_damaged_entries_are_written_anew(tmp_path, damage):
    open_images(tmp_path / "entry")
    if damage == "size lost":
        (tmp_path / "entry" / "b.sizes.npy").unlink()
    else:
        with open(tmp_path / "entry" / "a.pixels", "r+b") as file:
            file.truncate(0 if damage == "empty" else 50)
    assert np.array_equal(open_images(tmp_path / "entry")["a"][4], ragged()[4])


def test_nothing_is_left_of_an_entry_that_failed(tmp_path):
    def broken() -> Iterator[dict[str, np.ndarray]]:
        yield {"a": ragged()[0], "b": ragged()[0]}
        raise InputError("a broken image")

    with pytest.raises(InputError, match="a broken image"):
        open_images(tmp_path / "entry", broken)
    assert names_in(tmp_path) == set()


# ---- As ImageDataset uses it


def made(folder: Path, data=None, augmentation="pad_crop", processor=None, **kwargs) -> ImageDataset:
    data, processor = data or photos(), processor or vit_processor()
    return ImageDataset(data, processor, augmentation, **{"cache_images": "disk", "cache_dir": folder, **kwargs})


@pytest.mark.parametrize("augmentation", ["none", "pad_crop", "random_resized_crop"])
def test_second_run_decodes_nothing(tmp_path, monkeypatch, augmentation):
    kwargs = {"augmentation": augmentation, "teacher_processor": vit_processor(24)}
    first = made(tmp_path, **kwargs).__getitems__(list(range(12)))
    monkeypatch.setattr(Image, "open", not_again)
    dataset = made(tmp_path, **kwargs)
    assert dataset.in_memory
    for ours, theirs in zip(dataset.__getitems__(list(range(12))), first, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ("pixel_values", "teacher_pixel_values"))


def test_entries_are_named_by_what_is_in_them(tmp_path):
    same = [made(tmp_path), made(tmp_path, data_seed=1, horizontal_flip=False), made(tmp_path, augmentation="none")]
    assert len(same) == 3
    assert len(names_in(tmp_path)) == 1
    made(tmp_path, photos(seed=1))
    made(tmp_path, photos().select(range(11, -1, -1)))
    made(tmp_path, processor=vit_processor(24))
    made(tmp_path, processor=vit_processor(resample=3))
    made(tmp_path, teacher_processor=vit_processor(24))
    made(tmp_path, augmentation="random_resized_crop")
    assert len(names_in(tmp_path)) == 7


def test_files_that_changed_are_decoded_anew(tmp_path):
    path = tmp_path / "image.bmp"
    for colour in (10, 200):
        Image.new("RGB", (16, 16), (colour,) * 3).save(path)
        os.utime(path, ns=(colour, colour))  # whatever the clock's resolution is
        data = labelled([{"bytes": None, "path": str(path)}] * 2)
        assert made(tmp_path / "cache", data, "none")[0]["pixel_values"][1, 0, 0].item() == pytest.approx(
            (colour / 255 - 0.5) / 0.25, abs=1e-5
        )


def test_workers_get_the_place_and_not_the_pixels(tmp_path):
    data = labelled([stored(Image.new("RGB", (300, 300), (i, i, i))) for i in range(20)])
    for augmentation in ("none", "random_resized_crop"):
        dataset = made(tmp_path, data, augmentation, processor=vit_processor(64))
        pixels = pixels_of(dataset, range(20))
        assert len(pickle.dumps(dataset)) < 100_000  # in which the 20 encoded images are
        assert torch.equal(pixels_of(pickle.loads(pickle.dumps(dataset)), range(20)), pixels)
        loader = DataLoader(dataset, batch_size=20, num_workers=1)
        assert torch.equal(next(iter(loader))["pixel_values"], pixels)


def test_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(
        InputError, match=r"GB are needed there, .*cache_dir.*HF_DATASETS_CACHE.*\"memory\" or \"none\""
    ):
        made(tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    dataset = made(tmp_path, cache_images="auto")
    assert dataset.in_memory
    assert names_in(tmp_path) == set()
    assert torch.equal(pixels_of(dataset, range(12)), pixels_of(made(tmp_path, cache_images="memory"), range(12)))


def test_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be kept in"):
        made(tmp_path / "file" / "folder")


@pytest.mark.parametrize(("processes", "entries"), [("1", 0), ("4", 1)])
def test_auto_shares_the_images_of_several_processes(tmp_path, monkeypatch, processes, entries):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    (tmp_path / "cache").mkdir()
    assert made(tmp_path / "cache", cache_images="auto").in_memory
    assert len(names_in(tmp_path / "cache")) == entries


def test_mapped_images_know_their_place(tmp_path):
    open_images(tmp_path / "entry")
    assert len(MappedImages(tmp_path / "entry", "b")) == 5
    with pytest.raises(FileNotFoundError):
        MappedImages(tmp_path / "nothing", "b")
