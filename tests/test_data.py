"""Folders, splits, the store and augmentation."""

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import tarfile
import threading
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data


@pytest.fixture(scope="module")
def images():
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 224, 224), dtype=torch.uint8, generator=rng)


def uniforms(*names, count=6, value=None) -> dict:
    """Return random numbers of those augmentations, or `value` for each."""
    if value is None:
        return data.draw_uniforms(names, count, seed=0, epoch=0)
    return {name: torch.full((count, data.AUGMENTATIONS[name]), value) for name in names}


def listed(paths: list[str]) -> SimpleNamespace:
    """Return what `split` needs of a store of these paths."""
    classes = sorted({path.split("/")[0] for path in paths})
    labels = torch.tensor([classes.index(path.split("/")[0]) for path in paths])
    place = {path: row for row, path in enumerate(paths)}
    rows = lambda some: torch.tensor([place[path] for path in some])  # noqa: E731
    return SimpleNamespace(paths=paths, parts={}, labels=labels, rows=rows)


def test_split_is_8_1_1_and_depends_on_paths_and_seed_alone():
    store = listed([f"class/{index}.jpg" for index in range(8677)])
    manifest = data.split(store, seed=0)
    counts = {name: len(part) for name, part in manifest.items()}
    assert counts == {"train": 6942, "valid": 868, "test": 867}
    assert sorted(path for part in manifest.values() for path in part) == sorted(store.paths)
    assert manifest == data.split(store, seed=0)
    assert manifest != data.split(store, seed=1)


@pytest.mark.parametrize("seed", range(5))
def test_the_only_image_of_a_class_is_trained_on(seed):
    alone = [f"alone {index}/0.jpg" for index in range(8)]
    store = listed(sorted([*alone, *(f"many/{index}.jpg" for index in range(22))]))
    manifest = data.split(store, seed)
    assert set(alone) <= set(manifest["train"])
    assert [len(part) for part in manifest.values()] == [24, 3, 3]
    assert sorted(path for part in manifest.values() for path in part) == store.paths


class Backwards(contextlib.ExitStack):
    """A folder's entries in reversed order."""

    def __init__(self, entries):
        super().__init__()
        self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.entries)


def test_a_copy_or_another_order_of_listing_changes_no_split(photos, cache, tmp_path, monkeypatch):
    copy = shutil.copytree(photos, tmp_path / "copy")
    first, scandir = data.ImageStore(str(photos), cache), os.scandir
    monkeypatch.setattr(os, "scandir", lambda *path: Backwards(scandir(*path)))
    second = data.ImageStore(str(copy), tmp_path / "cache")
    for name in ("paths", "classes", "fingerprint", "checksums"):
        assert getattr(first, name) == getattr(second, name)
    assert torch.equal(first.pixels, second.pixels)
    assert data.split(first, 0) == data.split(second, 0)


@pytest.mark.parametrize("name", ["caltech101", "caltech-101"])
def test_data_may_name_the_folder_or_those_above(photos, tmp_path, name):
    shutil.copytree(photos, tmp_path / name)
    shutil.copytree(photos / "101_ObjectCategories" / "star", tmp_path / "other" / "star")
    classes = tmp_path / name / "101_ObjectCategories"
    for place in (classes, tmp_path / name, tmp_path):
        assert data.locate(str(place), "").samefile(classes)


def test_store_holds_what_decode_returns(photos, cache, tmp_path):
    Image.new("L", (50, 80), 77).save(tmp_path / "gray.jpg")
    gray = data.decode(tmp_path / "gray.jpg")
    assert gray.shape == (224, 224, 3)
    assert gray.unique().tolist() == [77]
    store = data.ImageStore(str(photos), cache)
    rows = store.rows(store.paths[7:9])
    pixels, labels = store.batch(rows, torch.device("cpu"))
    assert torch.equal(pixels[1].permute(1, 2, 0), data.decode(store.root / store.paths[8]))
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    names = [store.classes[label] for label in labels]
    assert names == [path.split("/")[0] for path in store.paths[7:9]] == ["arrow", "bar"]


def test_changes_count_new_missing_and_changed_images_with_a_name(photos, cache):
    store = data.ImageStore(str(photos), cache)
    a, b, c, *_ = store.paths
    earlier = {path: sum for path, sum in store.checksums.items() if path != a}
    earlier |= {b: 1, c: 2, "gone.jpg": 3}
    assert store.differences(store.checksums) == ""
    words = f"1 new (such as {a!r}), 1 missing (such as 'gone.jpg'), 2 changed (such as {b!r})"
    assert store.differences(earlier) == words


def test_sample_is_the_same_everywhere_and_ordinary_class_folders(tmp_path):
    roots = [data.draw_sample(tmp_path / name, 2) for name in "ab"]
    files = [sorted(path.relative_to(root) for path in root.rglob("*.jpg")) for root in roots]
    assert len(files[0]) == 20
    assert files[0] == files[1]
    assert all(
        (roots[0] / file).read_bytes() == (roots[1] / file).read_bytes() for file in files[0]
    )
    assert Image.open(roots[0] / "star" / "image_0001.jpg").size == (139, 181)


# -------------------------------------------------------------------------------- download


@pytest.fixture
def archive(photos, tmp_path, monkeypatch) -> Path:
    """An archive built as Caltech101's is, which is served in its place, and requests counted."""
    site = tmp_path / "site"
    site.mkdir()
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as tar:
        tar.add(photos / "101_ObjectCategories", "101_ObjectCategories")
        star = photos / "101_ObjectCategories" / "star"
        tar.add(star, "101_ObjectCategories/BACKGROUND_Google")
    with zipfile.ZipFile(site / "caltech-101.zip", "w") as file:
        file.write(tmp_path / "images.tar.gz", "caltech-101/101_ObjectCategories.tar.gz")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    archive = site / "caltech-101.zip"
    monkeypatch.setattr(
        data, "CALTECH101_URL", f"http://127.0.0.1:{server.server_port}/{archive.name}"
    )
    monkeypatch.setattr(data, "CALTECH101_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(data, "CALTECH101_IMAGES", 80)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield archive
    server.shutdown()
    server.server_close()


def count() -> int:
    """Return the number of images that the default data set has, downloaded if need be."""
    return len(data.find_images(data.locate("data", ""))[0])


def test_missing_default_folder_is_downloaded_once(archive, tmp_path, capsys):
    assert count() == 80
    printed = capsys.readouterr()
    assert "CC BY 4.0" in printed.err
    assert not printed.out  # it may be the JSON of test.py
    archive.unlink()
    assert count() == 80
    root = data.locate("data", "")
    assert root.resolve() == tmp_path / "data" / "caltech101" / "101_ObjectCategories"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["caltech101"]


@pytest.mark.parametrize("name", ["caltech101", "caltech-101", "other"])
def test_a_folder_without_images_is_not_taken_for_the_data_set(archive, tmp_path, name):
    (tmp_path / "data" / name / "empty").mkdir(parents=True)
    assert count() == 80


def test_a_folder_that_is_in_the_way_of_the_download_is_named(archive, tmp_path):
    (tmp_path / "data" / "caltech101" / "101_ObjectCategories" / "empty").mkdir(parents=True)
    with pytest.raises(data.DataError, match=r"cannot be downloaded .*101_ObjectCategories"):
        count()


def test_a_damaged_download_is_refused_and_the_next_try_succeeds(archive):
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(data.DataError, match="cannot be downloaded"):
        count()
    archive.write_bytes(content)
    assert count() == 80


@pytest.mark.parametrize("place", [".x/101_ObjectCategories/star", "caltech101/.x/caltech-101/x"])
def test_half_an_extraction_is_never_taken_for_the_data_set(archive, tmp_path, place):
    half = tmp_path / "data" / place / "image_9999.jpg"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"")
    assert count() == 80


def test_an_archive_with_other_images_is_refused(archive, monkeypatch):
    monkeypatch.setattr(data, "CALTECH101_IMAGES", 81)
    with pytest.raises(data.DataError, match="80 images arrived instead of 81"):
        count()
    assert not os.listdir("data/caltech101")


# ------------------------------------------------------------------------------- the cache


def open_album(album: Path) -> data.ImageStore:
    """Return the store of the album, and check that nothing but its cache is in that folder."""
    store = data.ImageStore(str(album), album.parent / "cache")
    kinds = sorted(file.suffix for file in (album.parent / "cache").iterdir())
    assert kinds == [".json", ".uint8"]
    decoded = torch.stack([data.decode(album / path) for path in store.paths[::9]])
    assert torch.equal(store.pixels[::9], decoded)
    return store


def test_the_cache_is_used_until_an_image_changes_and_then_replaced(album):
    first = open_album(album)
    files = {file: file.stat().st_ino for file in (album.parent / "cache").iterdir()}
    assert open_album(album).fingerprint == first.fingerprint
    assert files == {file: file.stat().st_ino for file in (album.parent / "cache").iterdir()}
    Image.new("RGB", (9, 9), "red").save(album / first.paths[0])
    changed = open_album(album)
    assert changed.fingerprint != first.fingerprint
    assert changed.pixels[0, 112, 112].tolist() == pytest.approx([254, 0, 0], abs=2)
    assert not set(files) & set((album.parent / "cache").iterdir())


def test_files_of_one_size_and_time_that_change_places_are_noticed(album):
    a, b = album / "arrow" / "image_0001.jpg", album / "star" / "image_0001.jpg"
    for file in (a, b):
        file.write_bytes(file.read_bytes().ljust(100_000, b"\0"))
        os.utime(file, (1e9, 1e9))
    first = open_album(album)
    a.rename(album / "c")
    b.rename(a)
    (album / "c").rename(b)
    assert open_album(album).fingerprint != first.fingerprint


def test_a_touched_file_is_the_same_image_and_a_renamed_class_is_another(album):
    first = open_album(album)
    os.utime(album / first.paths[0])
    assert open_album(album).fingerprint == first.fingerprint
    (album / "star").rename(album / "asteroid")
    renamed = open_album(album)
    assert renamed.classes[1] == "asteroid"
    assert renamed.fingerprint != first.fingerprint


def test_a_damaged_cache_is_made_anew(album):
    first = open_album(album)
    description, pixels = sorted((album.parent / "cache").iterdir())
    pixels.write_bytes(pixels.read_bytes()[:-100])
    assert open_album(album).fingerprint == first.fingerprint
    for damage in (b"", b"{", b"{}", b"\xff", b'{"checksums": []}'):
        description.write_bytes(damage)
        assert open_album(album).fingerprint == first.fingerprint


def test_other_programs_files_in_the_cache_folder_are_kept(album):
    cache = album.parent / "cache"
    cache.mkdir()
    others = {"results.json": "[1, 2]", "gone.json": '{"root": "gone"}', "a.tmp": "", "b.uint8": ""}
    for name, text in others.items():
        (cache / name).write_text(text)
        os.utime(cache / name, (1e9, 1e9))
    data.ImageStore(str(album), cache)
    assert {path.name for path in cache.iterdir()} > set(others)


def test_caches_of_folders_that_are_gone_and_leftovers_are_removed(album):
    cache = album.parent / "cache"
    cache.mkdir()
    for name in (
        f"{0:016}-{1:016}.uint8",
        f"{0:016}-{1:016}.uint8.{2:032}.tmp",
    ):  # also older versions'
        (cache / name).write_bytes(b"")
        os.utime(cache / name, (1e9, 1e9))
    kept, gone, more = (shutil.copytree(album, album.parent / name) for name in ("a", "b", "c"))
    for folder in (kept, gone):
        data.ImageStore(str(folder), cache)
    shutil.rmtree(gone)
    for folder, expected in ((album, {kept, gone, album}), (more, {kept, album, more})):
        data.ImageStore(str(folder), cache)
        roots = {json.loads(file.read_bytes())["root"] for file in cache.glob("*.json")}
        assert roots == {str(root.resolve()) for root in expected}
        assert len(list(cache.iterdir())) == 6
        for file in cache.iterdir():  # for a month, another machine may have the images
            os.utime(file, (time.time() - 31 * 86_400,) * 2)


def test_a_new_version_of_the_decoding_makes_the_cache_anew(album, monkeypatch):
    open_album(album)
    before = set((album.parent / "cache").iterdir())
    monkeypatch.setattr(data, "DECODE_VERSION", data.DECODE_VERSION + 1)
    open_album(album)
    assert not before & set((album.parent / "cache").iterdir())


def test_pixels_are_mapped_not_read_so_that_they_may_be_larger_than_memory(album):
    store = open_album(album)
    (file,) = (album.parent / "cache").glob("*.uint8")
    byte = 255 - store.pixels[0, 0, 0, 0].item()
    with open(file, "r+b") as opened:
        opened.write(bytes([byte]))
    assert store.pixels[0, 0, 0, 0] == byte


# ---------------------------------------------------------------------------- augmentation


def augmented(images: torch.Tensor, size: int, drawn: dict) -> torch.Tensor:
    """Return the network's inputs for images with those random numbers."""
    return data.to_inputs(images, size, data.find_changes(drawn))


def test_without_augmentation_images_are_only_normalised(images):
    inputs = data.to_inputs(images)
    assert torch.allclose(data.to_pixels(inputs) * 255, images.float(), atol=1e-3)
    expected = (images[0, 0, 0, 0] / 255 - data.MEAN[0]) / data.STD[0]
    assert inputs[0, 0, 0, 0].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("name", data.AUGMENTATIONS)
def test_augmentation_is_per_image_and_keeps_its_range(name, images):
    drawn = uniforms(name)
    inputs = augmented(images, 224, drawn)
    other = {name: 1 - drawn[name]}
    assert not torch.equal(inputs, augmented(images, 224, other))
    for index in range(len(images)):  # an image's result does not depend on its batch
        one = slice(index, index + 1)
        alone = augmented(images[one], 224, {name: drawn[name][one]})
        torch.testing.assert_close(alone[0], inputs[index], rtol=0, atol=1e-5)
    mean, std = data.mean_std(inputs.device)
    pixels = inputs * std + mean
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5


def test_random_numbers_of_an_augmentation_do_not_depend_on_the_others():
    alone, both = uniforms("flip"), uniforms("crop", "flip", "color")
    assert torch.equal(alone["flip"], both["flip"])
    assert not torch.equal(both["flip"].flatten(), both["crop"].flatten()[:6])
    assert not torch.equal(alone["flip"], data.draw_uniforms(["flip"], 6, 0, 1)["flip"])
    assert not torch.equal(alone["flip"], data.draw_uniforms(["flip"], 6, 1, 0)["flip"])


def test_flip_mirrors_images_below_one_half(images):
    drawn = uniforms("flip", value=0.51)
    drawn["flip"][1::2] = 0.49
    inputs, plain = augmented(images, 224, drawn), data.to_inputs(images)
    torch.testing.assert_close(inputs[::2], plain[::2], rtol=0, atol=1e-3)
    torch.testing.assert_close(inputs[1::2], plain[1::2].flip(-1), rtol=0, atol=1e-3)


def test_gray_takes_the_colour_of_one_image_in_ten(images):
    drawn = {"gray": torch.tensor([0, 0.05, 0.09, 0.11, 0.2, 0.9])[:, None]}
    inputs = data.to_pixels(augmented(images, 224, drawn))
    gray = (inputs - inputs.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
    assert gray.tolist() == [True, True, True, False, False, False]


def test_crop_of_the_whole_image_is_the_image_and_a_corner_is_that_corner(images):
    middle = torch.tensor([[1 - 1e-7, 0.5, 0.5, 0.5]])  # area, ratio, x, y
    whole = augmented(images, 224, {"crop": middle.expand(6, 4)})
    torch.testing.assert_close(whole, data.to_inputs(images), rtol=0, atol=1e-3)
    ramp = torch.arange(224, dtype=torch.uint8).expand(1, 3, 224, 224)
    corner = {"crop": torch.tensor([[0, 0.5, 0, 0.5]])}
    cut = data.to_pixels(augmented(ramp, 224, corner)) * 255
    side = data.CROP_SCALE[0] ** 0.5 * 224
    assert cut[0, 0, 100, 0].item() == pytest.approx(0, abs=1)
    assert cut[0, 0, 100, 223].item() == pytest.approx(side - 0.5, abs=1.5)


def trivial(name: str | None, strength: float, count: int = 1) -> dict:
    """Return random numbers that choose an operation of "trivial"; None: none."""
    names = list(data.OPERATIONS)
    place = 0.75 if name is None else (names.index(name) + 0.5) / (2 * len(names))
    return {"trivial": torch.tensor([[place, strength]]).expand(count, 2)}


def test_trivial_does_one_operation_to_every_other_image(images):
    plain = data.to_inputs(images)
    unchanged = augmented(images, 224, trivial(None, 1, 6))
    torch.testing.assert_close(unchanged, plain, rtol=0, atol=1e-3)
    shifted = augmented(images, 224, trivial("x", 1, 6))  # by 224 / 2 * 0.25 = 28
    torch.testing.assert_close(shifted[..., :-28], plain[..., 28:], rtol=0, atol=1e-3)
    darker = data.to_pixels(augmented(images, 224, trivial("brightness", 0, 6)))
    torch.testing.assert_close(darker, data.to_pixels(plain) * 0.4, rtol=0, atol=1e-3)
    square = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    square[:, :, 110:114, 180:184] = 255  # 70 pixels to the right of the centre
    turned = data.to_pixels(augmented(square, 224, trivial("rotation", 1)))[0, 0]
    y, x = divmod(turned.argmax().item(), 224)
    assert (x, y) == pytest.approx((111.5 + 70 * 3**0.5 / 2, 111.5 - 70 / 2), abs=2)


def test_without_contrast_an_image_is_flat_and_without_saturation_it_is_grey():
    pixels = torch.rand(2, 3, 8, 8)
    gray = pixels.mean(1, keepdim=True).expand_as(pixels)
    level = gray.mean((1, 2, 3), keepdim=True).expand_as(pixels)
    for factors, expected in ([1, 0, 1], level), ([1, 1, 0], gray), ([1, 1, 1], pixels):
        changed = data.jitter(pixels, torch.tensor([factors, factors]))
        torch.testing.assert_close(changed, expected)


def test_sizes_other_than_the_stored_one_are_resampled(images):
    for names in ((), ("crop", "flip")):
        assert augmented(images, 96, uniforms(*names)).shape == (6, 3, 96, 96)
    flat = torch.full((1, 3, 224, 224), 99, dtype=torch.uint8)
    small = data.to_pixels(data.to_inputs(flat, 96)) * 255
    assert torch.allclose(small, torch.tensor(99.0), atol=1e-2)


def test_what_is_warped_to_a_smaller_size_is_smoothed_first():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(112).expand(1, 3, 224, 224)
    for names in ((), ("flip",)):
        drawn = uniforms(*names, count=1, value=0.0)
        small = data.to_pixels(augmented(stripes, 80, drawn))
        assert (small - 0.5).abs().max() < 0.1  # without it: 0.5
