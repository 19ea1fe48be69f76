"""Images of all kinds become RGB; caches of decoded images are shared by processes and runs, and never partial."""

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

from bkd_hf import ImageDataset, InputError, decoding
from bkd_hf.decoding import decode_image, decode_part, shared_images
from bkd_hf.machine import memory_limit
from tests.test_images import labelled, photos, pixels_of, stored, vit_processor

FORK = multiprocessing.get_context("fork")


# ---- Decoding


def test_modes_and_orientation():
    upright = Image.new("RGB", (6, 4), (10, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode_image(stored(upright, "JPEG", exif=exif)).size == (4, 6)
    for mode in ("L", "RGBA", "P", "CMYK", "1", "LA"):
        image = decode_image(stored(upright.convert(mode), "TIFF" if mode == "CMYK" else "PNG"))
        assert (image.mode, image.size) == ("RGB", (6, 4))
    deep = Image.fromarray(np.full((4, 6), 200 * 256, dtype=np.uint16))
    assert decode_image(stored(deep)).getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.parametrize(
    ("dtype", "values", "seen"),
    [
        (np.uint16, [0, 200], [0, 0]),  # dark, as 65535 is white
        (np.uint16, [0, 65535], [0, 255]),
        (np.int32, [0, 198], [0, 198]),
        (np.int32, [0, 198 * 256], [0, 198]),
        (np.float32, [0, 0.5], [0, 128]),
        (np.float32, [0, 1], [0, 255]),
        (np.float32, [0, 198.4], [0, 198]),
        (np.int32, [-1, 5], None),
        (np.int32, [0, 65536], None),
        (np.float32, [-0.5, 0.5], None),
        (np.float32, [0, 300], None),
        (np.float32, [0, np.nan], None),
    ],
)
def test_depths(dtype, values, seen):
    image = stored(Image.fromarray(np.array([values], dtype=dtype)), "TIFF")
    if seen is None:
        with pytest.raises(InputError, match=r"Image 1 cannot be decoded: its values run from .* is understood"):
            ImageDataset(labelled([stored(Image.new("L", (2, 1))), image]), vit_processor())
    else:
        assert np.asarray(decode_image(image)).tolist() == [[[value] * 3 for value in seen]]


def test_nearly_black_images_are_told(caplog):
    logger = decoding.logger
    logger.warning_once.cache_clear()  # of one warning in a process
    decode_image(stored(Image.fromarray(np.array([[0, 65535]], np.uint16)), "TIFF"))
    assert "16-bit" not in caplog.text
    decode_image(stored(Image.fromarray(np.array([[0, 4000]], np.uint16)), "TIFF"))
    assert "only values below 4096, and becomes nearly black" in caplog.text


@pytest.mark.parametrize(
    ("box", "size", "factor"),
    [
        ((0, 0, 640, 480), (80, 60), 8),
        ((0, 0, 640, 480), (81, 60), 4),
        ((0, 0, 640, 480), (80, 61), 4),
        ((3, 5, 323, 245), (100, 100), 2),
        ((3, 5, 203, 204), (100, 100), 1),
        ((10, 10, 20, 20), (224, 224), 1),
    ],
)
def test_jpegs_are_decoded_as_large_as_the_crop_needs(box, size, factor):
    photo = stored(Image.new("RGB", (640, 480)), "JPEG")
    image, part, mirrored = decode_part(photo, lambda width, height: (box, True), [(8, 8), size])
    assert image.size == (640 // factor, 480 // factor)
    assert part == tuple(edge / factor for edge in box)
    assert mirrored
    assert decode_part(photo, lambda width, height: (box, True), None)[0].size == (640, 480)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_crops_are_chosen_in_the_upright_image(format, orientation):
    generator = np.random.default_rng(0)
    scene = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((335, 201), 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = stored(scene, format, exif=exif)
    upright, seen = decode_image(photo), []

    def lower_left_corner(width: int, height: int) -> tuple[tuple[int, int, int, int], bool]:
        seen.append((width, height))
        return (0, height // 2, width // 2, height), False

    image, part, _ = decode_part(photo, lower_left_corner, [(16, 16)])
    assert seen == [upright.size]
    assert max(image.size) == (84 if format == "JPEG" else 335)
    shown = np.asarray(image.resize((16, 16), box=part), dtype=float)
    expected = np.asarray(upright.resize((16, 16), box=lower_left_corner(*upright.size)[0]), dtype=float)
    assert np.abs(shown - expected).mean() < 1


# ---- Decoded images that processes share


def ragged(number: int = 5) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (2 + i, 7 - i, 3), dtype=np.uint8) for i in range(number)]


def open_images(path: Path, decode=ragged):
    return shared_images(path, 5, decode, lambda: 1000)


def not_again() -> Iterator:
    raise AssertionError("decoded again")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_images_of_any_sizes_come_back(tmp_path):
    path = tmp_path / "new" / "entry"
    open_images(path)
    for images in (open_images(path, not_again), pickle.loads(pickle.dumps(open_images(path)))):
        for i, image in enumerate(ragged()):
            assert np.array_equal(images[i], image)
        with pytest.raises(ValueError, match="read-only"):
            images[0][:] = 0
    same = shared_images(path.with_name("same"), 4, lambda: ragged()[:1] * 4, lambda: 1000)
    assert np.array_equal(same.rows[:, 3:9], np.stack([ragged()[0].ravel()[3:9]] * 4))
    assert names_in(tmp_path / "new") == {"entry", "same"}


def _open_and_report(path: Path, barrier, reports) -> None:
    def decode() -> Iterator[np.ndarray]:
        reports.put("decodes")
        time.sleep(0.1)  # long enough for the other to come
        yield from ragged()

    barrier.wait(30)
    images = open_images(path, decode)
    reports.put([images[i].tobytes() for i in range(5)])


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


def _write_half(path: Path, half_written) -> None:
    def decode() -> Iterator[np.ndarray]:
        yield from ragged(3)
        half_written.set()
        time.sleep(60)

    open_images(path, decode)


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path):
    begun = {name: FORK.Event() for name in ("entry", "another", "alive")}
    writers = [FORK.Process(target=_write_half, args=(tmp_path / name, event)) for name, event in begun.items()]
    for writer in writers:
        writer.start()
    assert all(event.wait(30) for event in begun.values())
    for writer in writers[:2]:
        writer.kill()
        writer.join(30)
    assert names_in(tmp_path) == {"entry.partial", "another.partial", "alive.partial"}
    assert np.array_equal(open_images(tmp_path / "entry")[4], ragged()[4])
    assert names_in(tmp_path) == {"entry", "alive.partial"}
    writers[2].kill()
    writers[2].join(30)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:50],
        lambda content: content[:-1],
        lambda content: bytes(len(content)),
        lambda content: bytes([content[0] ^ 1]) + content[1:],
    ],
    ids=["empty", "short", "cut", "zeros", "flipped"],
)
def test_damaged_files_are_written_anew(tmp_path, damage, caplog):
    path = tmp_path / "entry"
    open_images(path)
    path.write_bytes(damage(path.read_bytes()))
    assert np.array_equal(open_images(path)[4], ragged()[4])
    assert "cannot be read, and are decoded anew" in caplog.text
    assert np.array_equal(open_images(path, not_again)[4], ragged()[4])


def test_nothing_is_left_of_a_file_that_failed(tmp_path):
    def broken() -> Iterator[np.ndarray]:
        yield ragged()[0]
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
        os.utime(path, ns=(1, 1))  # of the same size and time: its content is another
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


def test_auto_keeps_to_the_memory_of_a_container(tmp_path, monkeypatch):
    assert memory_limit() > 0
    monkeypatch.setattr("bkd_hf.images.memory_limit", lambda: 1000.0)
    assert not made(tmp_path, cache_images="auto").in_memory


@pytest.mark.parametrize(("processes", "entries"), [("1", 0), ("4", 1)])
def test_auto_shares_the_images_of_several_processes(tmp_path, monkeypatch, processes, entries):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    (tmp_path / "cache").mkdir()
    assert made(tmp_path / "cache", cache_images="auto").in_memory
    assert len(names_in(tmp_path / "cache")) == entries


def test_one_broken_image_alone_is_named_alone():
    images = [stored(Image.new("L", (2, 1))) for _ in range(2)]
    images[1]["bytes"] = images[1]["bytes"][:10]
    with pytest.raises(
        InputError,
        match=r"^Image 1 cannot be decoded: it is no image of a known format\. Repair what is broken, or remove it",
    ):
        ImageDataset(labelled(images), vit_processor())


def test_the_search_for_broken_images_ends(monkeypatch):
    monkeypatch.setattr(decoding, "_SEARCH_SECONDS", 0)
    images = [stored(Image.new("L", (2, 1))) for _ in range(2)]
    images[1]["bytes"] = images[1]["bytes"][:10]
    with pytest.raises(InputError, match=r"\. Only 1 of 2 were looked at\. Repair"):
        ImageDataset(labelled(images), vit_processor())
