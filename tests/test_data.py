"""Folders, splits, the store and augmentation."""

import hashlib
import http.server
import os
import shutil
import tarfile
import threading
import zipfile
from functools import partial

import pytest
import torch
from PIL import Image
from torchvision.datasets import caltech

import data


@pytest.fixture(scope="module")
def images():
    return torch.randint(
        0, 256, (6, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture(scope="module")
def uniforms():
    return torch.rand(6, data.UNIFORMS, generator=data.generator("test"))


def test_split_is_8_1_1_and_depends_on_paths_and_seed_alone():
    paths = [f"class/{index}.jpg" for index in range(8677)]
    manifest = data.split(paths, seed=0)
    assert {name: len(part) for name, part in manifest.items()} == {
        "train": 6942,
        "valid": 868,
        "test": 867,
    }
    assert sorted(path for part in manifest.values() for path in part) == sorted(paths)
    assert manifest == data.split(list(paths), seed=0)
    assert manifest != data.split(paths, seed=1)


def test_a_copy_or_another_order_of_listing_changes_no_split(photos, cache, tmp_path, monkeypatch):
    copy = shutil.copytree(photos, tmp_path / "copy")
    first = data.ImageStore(str(photos), cache)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Reversed(scandir(path)))
    second = data.ImageStore(str(copy), tmp_path / "cache")
    assert (first.paths, first.classes, first.fingerprint) == (
        second.paths,
        second.classes,
        second.fingerprint,
    )
    assert torch.equal(first.pixels, second.pixels)


class Reversed:
    """A directory listing in reversed order."""

    def __init__(self, entries):
        self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.entries)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    close = __exit__


@pytest.mark.parametrize("place", [".", "101_ObjectCategories"])
def test_data_may_name_the_folder_or_the_one_above(photos, place):
    assert data.locate(str(photos / place), "").resolve() == photos / "101_ObjectCategories"


@pytest.mark.parametrize("name", ["caltech101", "caltech-101"])
def test_data_may_name_the_folder_two_above(photos, tmp_path, name):
    (tmp_path / name).symlink_to(photos)
    assert data.locate(str(tmp_path), "").samefile(photos / "101_ObjectCategories")


def test_background_and_files_that_are_no_images_are_left_out(photos, tmp_path, cache):
    root = shutil.copytree(photos / "101_ObjectCategories", tmp_path / "root")
    shutil.copytree(root / "star", root / "BACKGROUND_Google")
    (root / "star" / "tmp").write_text("no image")
    store = data.ImageStore(str(root), tmp_path / "cache")
    assert (len(store.classes), len(store.paths)) == (10, 80)
    assert [store.classes[label] for label in store.labels] == [
        path.split("/")[0] for path in store.paths
    ]


def test_store_holds_what_decode_returns_and_greyscale_becomes_rgb(photos, cache, tmp_path):
    Image.new("L", (50, 80), 77).save(tmp_path / "grey.jpg")
    grey = data.decode(tmp_path / "grey.jpg")
    assert grey.shape == (224, 224, 3)
    assert grey.unique().tolist() == [77]
    store = data.ImageStore(str(photos), cache)
    rows = store.rows(store.paths[3:5])
    pixels, labels = store.batch(rows, torch.device("cpu"))
    assert torch.equal(pixels[1].permute(1, 2, 0), data.decode(store.root / store.paths[4]))
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == store.labels[3:5].tolist()


def test_store_is_made_anew_when_an_image_changes_and_the_old_file_goes(photos, tmp_path):
    root, cache = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "cache"
    first = data.ImageStore(str(root), cache)
    (file,) = cache.iterdir()
    again = data.ImageStore(str(root), cache)
    assert list(cache.iterdir()) == [file]
    assert first.fingerprint == again.fingerprint
    Image.new("RGB", (9, 9), "red").save(root / "101_ObjectCategories" / first.paths[0])
    changed = data.ImageStore(str(root), cache)
    assert changed.fingerprint != first.fingerprint
    assert changed.pixels[0, 112, 112].tolist() == pytest.approx([254, 0, 0], abs=2)
    assert len(list(cache.iterdir())) == 1
    assert file not in cache.iterdir()


def test_a_store_of_the_wrong_size_is_made_anew(photos, tmp_path):
    first = data.ImageStore(str(photos), tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    assert data.ImageStore(str(photos), tmp_path).fingerprint == first.fingerprint
    assert file.read_bytes() == content


def test_sample_is_the_same_everywhere_and_ordinary_class_folders(tmp_path):
    roots = [data.draw_sample(tmp_path / name, 2) for name in "ab"]
    files = [sorted(path.relative_to(root) for path in root.rglob("*.jpg")) for root in roots]
    assert len(files[0]) == 20
    assert files[0] == files[1]
    assert all(
        (roots[0] / file).read_bytes() == (roots[1] / file).read_bytes() for file in files[0]
    )


# ------------------------------------------------------------------------------------------ download


@pytest.fixture
def server(photos, tmp_path, monkeypatch):
    """Serve an archive built as Caltech101's is, and let torchvision take it for the real one."""
    site = tmp_path / "site"
    (site / "caltech-101").mkdir(parents=True)
    with tarfile.open(site / "caltech-101" / "101_ObjectCategories.tar.gz", "w:gz") as tar:
        tar.add(photos / "101_ObjectCategories", "101_ObjectCategories")
        tar.add(photos / "101_ObjectCategories" / "star", "101_ObjectCategories/BACKGROUND_Google")
    archive = site / "caltech-101.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(
            site / "caltech-101" / "101_ObjectCategories.tar.gz",
            "caltech-101/101_ObjectCategories.tar.gz",
        )
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = None
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    fetch, address = (
        caltech.download_and_extract_archive,
        f"http://127.0.0.1:{http_server.server_port}",
    )
    served = {
        "md5": hashlib.md5(archive.read_bytes()).hexdigest(),
        "archive": archive,
        "fetched": 0,
    }

    def redirected(url, download_root, filename, md5):
        assert (filename, md5) == ("caltech-101.zip", "3138e1922a9193bfa496528edbbc45d0")
        served["fetched"] += 1
        fetch(f"{address}/{filename}", download_root, filename=filename, md5=served["md5"])

    monkeypatch.setattr(caltech, "download_and_extract_archive", redirected)
    monkeypatch.setattr(data, "CALTECH101_IMAGES", 80)
    monkeypatch.chdir(tmp_path)
    yield served
    http_server.shutdown()


def test_missing_default_folder_is_downloaded_once(server, tmp_path):
    root = data.locate("data", "")
    assert root.resolve() == tmp_path / "data" / "caltech101" / "101_ObjectCategories"
    assert len(data.scan(root)[0]) == 80
    assert data.locate("data", "") == root
    assert server["fetched"] == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["caltech101"]


@pytest.mark.parametrize("name", ["caltech101", "caltech-101", "other"])
def test_a_folder_without_pictures_is_not_taken_for_the_data_set(server, tmp_path, name):
    (tmp_path / "data" / name / "empty").mkdir(parents=True)
    assert len(data.scan(data.locate("data", ""))[0]) == 80


def test_damaged_download_is_refused_and_the_next_try_mends_it(server, tmp_path):
    archive = server["archive"].read_bytes()
    server["archive"].write_bytes(archive[: len(archive) // 2])
    with pytest.raises(data.DataError, match="could not be downloaded"):
        data.locate("data", "")
    server["archive"].write_bytes(archive)
    assert len(data.scan(data.locate("data", ""))[0]) == 80


def test_half_an_extraction_is_never_taken_for_the_data_set(server, tmp_path):
    half = tmp_path / "data" / ".partial" / "caltech101" / "101_ObjectCategories" / "star"
    half.mkdir(parents=True)
    (half / "image_0001.jpg").write_bytes(b"")
    assert len(data.scan(data.locate("data", ""))[0]) == 80


def test_an_archive_with_other_images_is_refused(server, monkeypatch):
    monkeypatch.setattr(data, "CALTECH101_IMAGES", 81)
    with pytest.raises(data.DataError, match="80 images arrived instead of 81"):
        data.locate("data", "")
    assert not os.path.exists("data/caltech101")


# -------------------------------------------------------------------------------------- augmentation


def test_without_augmentation_pictures_are_only_normalised(images):
    inputs = data.prepare(images)
    assert torch.allclose(data.denormalize(inputs) * 255, images.float(), atol=1e-3)
    assert torch.equal(inputs, data.prepare(images, 224, ("none",), torch.rand(6, data.UNIFORMS)))
    expected = (images[0, 0, 0, 0] / 255 - data.MEAN[0]) / data.STD[0]
    assert inputs[0, 0, 0, 0].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("name", data.AUGMENTATIONS)
def test_augmentation_is_per_image_seeded_and_keeps_its_range(name, images, uniforms):
    inputs = data.prepare(images, 224, (name,), uniforms)
    assert torch.equal(inputs, data.prepare(images, 224, (name,), uniforms))
    assert not torch.equal(inputs, data.prepare(images, 224, (name,), 1 - uniforms))
    for index in range(len(images)):  # a picture's result does not depend on its batch
        alone = data.prepare(images[index : index + 1], 224, (name,), uniforms[index : index + 1])
        torch.testing.assert_close(alone[0], inputs[index], rtol=0, atol=1e-5)
    mean, std = data.statistics(inputs.device)
    pixels = inputs * std + mean
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5


def test_flip_mirrors_half_of_the_pictures(images):
    uniforms = torch.zeros(6, data.UNIFORMS)
    uniforms[::2, data.COLUMNS.index("flip")] = 0.9
    inputs = data.prepare(images, 224, ("flip",), uniforms)
    plain = data.prepare(images)
    torch.testing.assert_close(inputs[::2], plain[::2], rtol=0, atol=1e-3)
    torch.testing.assert_close(inputs[1::2], plain[1::2].flip(-1), rtol=0, atol=1e-3)


def test_crop_of_the_whole_picture_is_the_picture_and_a_corner_is_that_corner(images):
    middle = torch.full((6, data.UNIFORMS), 0.5)
    middle[:, data.COLUMNS.index("area")] = 1 - 1e-7
    whole = data.prepare(images, 224, ("crop",), middle)
    torch.testing.assert_close(whole, data.prepare(images), rtol=0, atol=1e-3)
    ramp = torch.arange(224, dtype=torch.uint8).expand(1, 3, 224, 224)
    corner = torch.full((1, data.UNIFORMS), 0.5)
    corner[:, [data.COLUMNS.index("area"), data.COLUMNS.index("x")]] = 0.0
    cut = data.denormalize(data.prepare(ramp, 224, ("crop",), corner)) * 255
    side = data.CROP_SCALE[0] ** 0.5 * 224
    assert cut[0, 0, 100, 0].item() == pytest.approx(0, abs=1)
    assert cut[0, 0, 100, 223].item() == pytest.approx(side - 0.5, abs=1.5)


def test_trivial_does_one_operation_to_every_other_picture(images):
    plain, names = data.prepare(images), list(data.OPERATIONS)

    def changed(place, strength):
        uniforms = torch.full((6, data.UNIFORMS), 0.5)
        uniforms[:, -2], uniforms[:, -1] = place, strength
        return data.prepare(images, 224, ("trivial",), uniforms)

    for place in (0.5, 0.75, 1 - 1e-7):
        torch.testing.assert_close(changed(place, 1.0), plain, rtol=0, atol=1e-3)
    shifted = changed((names.index("x") + 0.5) / (2 * len(names)), 1.0)
    torch.testing.assert_close(
        shifted[..., :-28], plain[..., 28:], rtol=0, atol=1e-3
    )  # 224 / 2 * 0.25 = 28
    darker = data.denormalize(changed((names.index("brightness") + 0.5) / (2 * len(names)), 0.0))
    torch.testing.assert_close(darker, data.denormalize(plain) * 0.4, rtol=0, atol=1e-3)
    square = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    square[:, :, 110:114, 180:184] = 255  # 70 pixels to the right of the centre
    uniforms = torch.full((1, data.UNIFORMS), 0.5)
    uniforms[:, -2:] = torch.tensor([0.5 / (2 * len(names)), 1.0])
    turned = data.denormalize(data.prepare(square, 224, ("trivial",), uniforms))[0, 0]
    y, x = divmod(turned.argmax().item(), 224)
    assert (x, y) == pytest.approx((111.5 + 70 * 3**0.5 / 2, 111.5 - 70 / 2), abs=2)


def test_sizes_other_than_the_stored_one_are_resampled(images):
    for augment in ((), ("crop", "flip")):
        assert data.prepare(images, 96, augment, torch.rand(6, data.UNIFORMS)).shape == (
            6,
            3,
            96,
            96,
        )
    flat = torch.full((1, 3, 224, 224), 99, dtype=torch.uint8)
    assert torch.allclose(
        data.denormalize(data.prepare(flat, 96)) * 255, torch.tensor(99.0), atol=1e-2
    )


def test_what_is_warped_to_a_smaller_size_is_smoothed_first():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(112).expand(1, 3, 224, 224)
    for augment in ((), ("flip",)):
        small = data.denormalize(data.prepare(stripes, 80, augment, torch.zeros(1, data.UNIFORMS)))
        assert (small - 0.5).abs().max() < 0.1  # without it: 0.5
