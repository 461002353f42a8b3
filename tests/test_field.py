"""What people bring: data sets as archives unpack, images of all kinds, odd terminals."""

import io
import itertools
import os
import random
import shutil
import struct
import sys
import threading
from pathlib import Path

import numpy
import pytest
import torch
from commands import lose_privileges, one_line, run, thorough
from PIL import Image, ImageCms, PngImagePlugin

import data
import model

TINY = ["--stride", "4", "--train-size", "64", "--batch-size", "8", "--epochs", "1"]


def draw(folder: Path, counts: dict[str, int]) -> str:
    """Write so many images, no two alike, into each folder of `folder`; return its name."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            noise = random.Random(f"{name} {index}").randbytes(48)
            Image.frombytes("RGB", (4, 4), noise).save(folder / name / f"{index}.png")
    return str(folder)


def parts(*counts: str, classes=("cat", "dog")) -> dict[str, int]:
    """Return the folders of parts such as "train 9", of so many images in each class."""
    split = (part.rsplit(" ", 1) for part in counts)
    return {f"{part}/{name}": int(count) for part, count in split for name in classes}


def opened(folder, cache) -> tuple[data.ImageStore, list[int]]:
    """Return the store of a folder, and how many images are in train, valid and test."""
    store = data.ImageStore(str(folder), str(cache))
    return store, [len(paths) for paths in data.split(store, 0).values()]


# ------------------------------------------------------------------ the layout of a folder

TRAIN_TEST = [16, 2, 8]  # of 9 + 9 images in train, two are drawn for validation
LAYOUTS = {
    "all": (parts("train 9", "val 3", "test 4"), [18, 6, 8]),
    "capitals": (parts("Train 9", "VALIDATION 3", "Test 4"), [18, 6, 8]),
    "sets": (parts("training_set 9", "test_set 4"), TRAIN_TEST),
    "camels": (parts("TrainingSet 9", "TestSet 4"), TRAIN_TEST),
    "years": (parts("train2017 9", "val2017 4"), [16, 8, 2]),
    "dev": (parts("train 9", "dev 3", "eval 4"), [18, 6, 8]),
    "no validation": (parts("train 9", "test 4"), TRAIN_TEST),
    "no test": (parts("train 9", "val 4"), [16, 8, 2]),
    "train alone": (parts("train 10"), [16, 2, 2]),
    "VOC": (parts("trainval 9", "test 4"), TRAIN_TEST),
    "Intel": (parts("seg_train/seg_train 9", "seg_test/seg_test 4") | {"seg_pred/seg_pred": 5},
        TRAIN_TEST),
    "an archive in an archive": (parts("a/a/train 9", "a/a/test 4"), TRAIN_TEST),
    "with a copy inside": (parts("x/train 9", "x/test 4", "x/x/train 9", "x/x/test 4"), TRAIN_TEST),
    "Tiny ImageNet": ({"train/cat/images": 10, "train/dog/images": 10, "val/images": 9,
        "test/images": 9}, [16, 2, 2]),
    "ImageNet": (parts("D/C/train 10") | {"D/C/val": 9, "D/C/test": 9}, [16, 2, 2]),
    "unlabelled test": (parts("train 9", "val 4") | {"test": 7}, [16, 8, 2]),
    "unlabelled folder in test": (parts("train 9", "val 4") | {"test/unknown": 7}, [16, 8, 2]),
    "a folder to predict": (parts("train 9", "test 4") | {"to predict/new": 7}, TRAIN_TEST),
    "a stray image": (parts("train 9", "test 4") | {"train": 1}, TRAIN_TEST),
    "a class missing in val": (parts("train 9", "test 4") | {"val/dog": 3}, [18, 3, 8]),
    "two parts of train": (parts("train_a 4", "train_b 5", "test 4"), TRAIN_TEST),
    "other words": (parts("traindata 9", "validate 3", "tests 4"), [18, 6, 8]),
    "in each class": (parts("cat 9", "dog 9", classes=["train"])
        | parts("cat 4", "dog 4", classes=["test"]), TRAIN_TEST),
    "beside other folders": (parts("D/train 9", "D/test 4") | {"runs": 0, "labels": 0}, TRAIN_TEST),
    "parts of train alone": (parts("train_a 5", "train_b 5"), [16, 2, 2]),
    "names with test in them": (parts("my_test_train 9", "my_test_test 4"), TRAIN_TEST),
    "test alone in each class": (parts("cat 10", "dog 10", classes=["test"]), [16, 2, 2]),
    "a stray image in a class": (parts("cat 9", "dog 9", classes=["train"])
        | parts("cat 4", "dog 4", classes=["test"]) | {"cat": 1}, TRAIN_TEST),
    "names in another case": (parts("train 10") | {"val/Cat": 3, "val/Dog": 3}, [16, 2, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_ready_made_parts_are_the_split(cache, tmp_path, name):
    tree, counts = LAYOUTS[name]
    store, found = opened(draw(tmp_path / "data", tree), cache)
    assert store.classes == ["cat", "dog"]
    assert found == counts
    words = {"train": "train", "valid": "va dev", "test": "test eval"}
    for part, paths in data.split(store, 0).items():
        given = [path for path in paths if store.parts.get(path) == part]
        assert given in ([], paths)  # a part is ready-made or drawn
        for path in given:
            folder = path.rpartition("/")[0].lower()
            assert any(word in folder for word in words[part].split())


def test_a_ready_made_split_trains_and_says_what_is_passed_over(cache, tmp_path):
    tree = parts("train 9", "val 3", "test 4") | {"test/zebra": 2, "images": 2, "train/gnu": 0}
    folder = draw(tmp_path / "data", tree)
    output = run("train", "--data", folder, "--cache", cache, *TINY, folder=tmp_path).stdout
    assert "folders without images: train/gnu\n" in output
    assert "images: 2 images in no class folder" in output
    assert "classes without training images: zebra\n" in output
    assert "3 classes, 18 training, 6 validation and 10 test images" in output
    split = model.load(tmp_path / "alexnet.pth")["split"]
    assert {part: {path.split("/")[0] for path in paths} for part, paths in split.items()} == {
        "train": {"train"},
        "valid": {"val"},
        "test": {"test"},
    }
    tested = run("test", "--split", "valid", folder=tmp_path)
    assert not tested.stderr
    assert "6 images" in tested.stdout


@pytest.mark.parametrize("tree", [{"train": 9, "test": 9}, parts("val 9", "test 9")])
def test_parts_that_nothing_can_be_learned_from_are_no_classes(cache, tmp_path, tree):
    argv = ["--data", draw(tmp_path / "data", tree), "--cache", cache, *TINY]
    assert "train" in one_line(run("train", *argv, folder=tmp_path, status=1))


@pytest.mark.parametrize(
    "tree",
    [
        {"train": 9, "bus": 9, "test tube": 9},
        parts("train 9", "val 4", classes=["train", "bus", "car"]),
        parts("train 9", "bus 9", classes=["a", "b"]),
    ],
)
def test_train_may_be_the_name_of_a_class(cache, tmp_path, tree):
    store, _ = opened(draw(tmp_path / "data", tree), cache)
    assert {"bus", "train"} <= set(store.classes)
    assert sum(len(p) for p in data.split(store, 0).values()) == sum(tree.values())


def test_words_of_parts_may_be_in_the_names_of_classes(cache, tmp_path):
    store, _ = opened(draw(tmp_path / "data", {"positive test": 9, "negative test": 9}), cache)
    assert store.classes == ["negative test", "positive test"]


def test_system_folders_are_passed_over(cache, tmp_path):
    names = ["#recycle", "__MACOSX/cat", "lost+found", ".Trash-1000", "cat/@eaDir/0.png", "@tmp"]
    names += ["$RECYCLE.BIN", "System Volume Information", "cat/.ipynb_checkpoints"]
    folder = tmp_path / "data"
    draw(folder, {"cat": 5, "dog": 5} | {name + "/a": 2 for name in names})
    store, _ = opened(folder, cache)
    assert (store.classes, len(store.paths), store.notes) == (["cat", "dog"], 10, [])


def test_a_class_folder_that_links_to_nothing_is_named(cache, tmp_path):
    folder = tmp_path / "data"
    draw(folder, {"cat": 5, "dog": 5})
    (folder / "zebra").symlink_to(tmp_path / "drive that is not there")
    (folder / "gnu").symlink_to(folder / "gnu")
    output = run("train", "--data", folder, "--cache", cache, *TINY, folder=tmp_path).stdout
    assert "folders without images: gnu, zebra\n" in output


def test_links_between_folders_neither_repeat_images_nor_go_on_for_ever(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    draw(folder, {"cat/2023": 3, **{f"dog/{name}": 1 for name in "abcdefgh"}, "yak": 0, "gnu": 0})
    (folder / "cat" / "latest").symlink_to(folder / "cat" / "2023")
    (folder / "gnu" / "up").symlink_to(folder)
    (folder / "yak" / "Thumbs.db").write_text("of another system")
    (folder / "cat" / "notes.txt").symlink_to("nowhere")
    for one, other in itertools.permutations("abcdefgh", 2):
        (folder / "dog" / one / f"to {other}").symlink_to(folder / "dog" / other)
    images, notes = data.find_images(folder)
    assert len(images) == len({os.path.realpath(folder / path) for path in images}) == 11
    assert "folders without images: gnu, yak" in notes[0]
    assert notes[1:] == ["files that are not images by their names: 1 .txt"]
    monkeypatch.chdir(folder / "dog")
    found = {path.parts[1] for path in data.images_in(Path(".."))}
    assert found == {"cat", "dog"}


def test_links_to_class_folders_are_followed(cache, tmp_path):
    draw(tmp_path / "away", {"cat": 5, "dog": 5})
    draw(tmp_path / "data", {"gnu": 5})
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "away" / name)
    (tmp_path / "data" / "gnu" / "up").symlink_to(tmp_path / "data")
    store, _ = opened(tmp_path / "data", cache)
    assert (len(store.paths), store.classes) == (15, ["cat", "dog", "gnu"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_a_folder_that_cannot_be_listed_is_named_unless_it_is_the_systems(cache, tmp_path):
    draw(tmp_path / "data", {"cat": 5, "dog": 5, "lost+found": 0})
    argv = ["--data", "data", "--cache", cache, *TINY]
    (tmp_path / "data" / "lost+found").chmod(0)
    run("train", *argv, folder=tmp_path, before=lose_privileges)
    (tmp_path / "data" / "dog").chmod(0)
    refused = run("train", *argv, folder=tmp_path, before=lose_privileges, status=1)
    (tmp_path / "data" / "dog").chmod(0o700)
    assert "dog: cannot be listed (Permission denied)" in one_line(refused)


def test_copies_of_training_images_are_counted(flags, photos, tmp_path):
    album = shutil.copytree(photos / "101_ObjectCategories", tmp_path / "album")
    for path in list(album.glob("*/*")):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    argv = [*flags, "--data", album, "--cache", tmp_path / "cache", "--epochs", 1]
    run("train", *argv, folder=tmp_path)
    split = model.load(tmp_path / "alexnet.pth")["split"]
    contents = {(album / path).read_bytes() for path in split["train"]}
    copies = [path for path in split["test"] if (album / path).read_bytes() in contents]
    error = one_line(run("test", folder=tmp_path))
    assert f"{len(copies)} images, such as {copies[0]!r}, were trained on: they are copies" in error
    assert not run("test", "--split", "train", folder=tmp_path).stderr


NAMES = ["x" * 255, "é", "e\u0301", "a\\b", "~", "$HOME", "*", "  ", "😀", "star.", "a.jpg", "-x"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep such names apart")
def test_odd_names_of_classes_stay_apart(cache, tmp_path):
    store, _ = opened(draw(tmp_path / "data", dict.fromkeys(NAMES, 2)), cache)
    assert store.classes == sorted(NAMES)
    assert len(store.checksums) == 24


# ---------------------------------------------------------------------------------- images


def image_of(**options) -> Image.Image:
    """Return an image of two colours, red above blue."""
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (0, 20, 60, 40))
    return image


def cut_out(mode: str) -> Image.Image:
    """Return a red square on transparent black."""
    image = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (20, 20, 40, 40))
    return image.convert(mode)


def levels(kind: str, scale: float = 257) -> Image.Image:
    """Return a dark and a light half, in numbers of that kind."""
    return Image.fromarray((numpy.array([[64, 192]]).repeat(30, 1) * scale).astype(kind))


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(image_of(), ImageCms.buildTransform(*profiles, "RGB", "LAB"))


def with_text() -> PngImagePlugin.PngInfo:
    """Return as much text as image editors write into a PNG."""
    info = PngImagePlugin.PngInfo()
    info.add_text("history", "x" * 3_000_000, zip=True)
    return info


def exif(*more: bytes) -> bytes:
    """Return EXIF data that turns by a quarter, with more entries."""
    entries = [struct.pack("<HHII", 0x112, 3, 1, 6), *more]
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries)


RED_OVER_BLUE = ([255, 0, 0], [0, 0, 255])  # at the top and at the bottom of the middle
CUT_OUT = ([255, 255, 255], [255, 255, 255])
DARK = ([128, 128, 128],) * 2
MORE = {"save_all": True, "append_images": [Image.new("RGB", (60, 40), "green")]}
SOUND = {
    "a.jfif": (image_of(), RED_OVER_BLUE, {"format": "JPEG"}),
    "a.jpe": (image_of(), RED_OVER_BLUE, {"format": "JPEG"}),
    "a.JPG": (image_of(), RED_OVER_BLUE, {"format": "JPEG"}),
    "progressive.jpg": (image_of(), RED_OVER_BLUE, {"progressive": True}),
    "a.webp": (image_of(), RED_OVER_BLUE, {"lossless": True}),
    "a.bmp": (image_of(), RED_OVER_BLUE, {}),
    "a.ppm": (image_of(), RED_OVER_BLUE, {}),
    "a.ico": (image_of().resize((64, 64)), RED_OVER_BLUE, {}),
    "wrong suffix.jpg": (image_of(), RED_OVER_BLUE, {"format": "PNG"}),
    "wrong suffix.png": (image_of(), RED_OVER_BLUE, {"format": "GIF"}),
    "cmyk.jpg": (image_of().convert("CMYK"), RED_OVER_BLUE, {}),
    "ycbcr.tif": (image_of().convert("YCbCr"), RED_OVER_BLUE, {}),
    "lab.tif": (lab(), RED_OVER_BLUE, {}),
    "rgbx.tif": (image_of().convert("RGBX"), RED_OVER_BLUE, {}),
    "palette.png": (image_of().quantize(), RED_OVER_BLUE, {}),
    "animated.gif": (image_of(), RED_OVER_BLUE, MORE),
    "animated.webp": (image_of(), RED_OVER_BLUE, MORE | {"lossless": True}),
    "animated.png": (image_of(), RED_OVER_BLUE, MORE),
    "pages.tif": (image_of(), RED_OVER_BLUE, MORE),
    "text.png": (image_of(), RED_OVER_BLUE, {"pnginfo": with_text()}),
    "profile.png": (image_of(), RED_OVER_BLUE, {"icc_profile": b"damaged"}),
    "cut out.png": (cut_out("RGBA"), CUT_OUT, {}),
    "cut out.webp": (cut_out("RGBA"), CUT_OUT, {"lossless": True}),
    "cut out.gif": (cut_out("RGBA"), CUT_OUT, {}),
    "gray cut out.png": (cut_out("LA"), CUT_OUT, {}),
    "palette cut out.png": (cut_out("RGBA").quantize(), CUT_OUT, {}),
    "a white key.png": (Image.new("P", (9, 9)), CUT_OUT, {"transparency": 0}),
    "a pixel.png": (Image.new("1", (1, 1), 1), CUT_OUT, {}),
    "large.png": (Image.new("1", (14_000, 14_000), 1), CUT_OUT, {}),
    "long.png": (image_of().resize((1, 20_000)), RED_OVER_BLUE, {}),
    "gray16.png": (levels("u2"), DARK, {}),
    "gray16.tif": (levels(">u2"), DARK, {}),
    "gray32.tif": (levels("i4"), DARK, {}),
    "gray16 cut out.png": (Image.new("I;16", (9, 9), 3000), CUT_OUT, {"transparency": 3000}),
}  # fmt: skip
PILLOW = int(Image.__version__.split(".")[0])
if PILLOW < 13:  # they write this kind truncated
    del SOUND["ycbcr.tif"]
DAMAGED = [b"Exif\0\0", b"Exif\0\0Exif\0\0II*\0", exif(b"\xff" * 12), exif()[:20], b"no EXIF"]
for number, damaged in enumerate(DAMAGED):  # data of which Pillow warns without the file's name
    SOUND[f"exif {number}.jpg"] = (image_of(), None, {"exif": damaged})
for kind in ("avif", "qoi", "jp2", "tga"):
    if f".{kind}" in data.SUFFIXES and data.Image.registered_extensions()[f".{kind}"] in Image.SAVE:
        SOUND[f"b.{kind}"] = (image_of(), RED_OVER_BLUE, {})


def test_any_sound_image_trains_and_looks_as_to_a_person(cache, tmp_path):
    folder = tmp_path / "data"
    draw(folder, {"cat": 5, "dog": 5, "kinds": 0})
    for name, (image, _, options) in SOUND.items():
        image.save(folder / "kinds" / name, **options)
    command = run("train", "--data", folder, "--cache", cache, *TINY, folder=tmp_path)
    assert not command.stderr
    store, _ = opened(folder, cache)
    for name, (_, expected, _) in SOUND.items():
        if not expected:  # what such data says of the orientation is the decoder's to find out
            continue
        pixels = store.pixels[store.rows([f"kinds/{name}"])][0, [60, 164], 112].tolist()
        for found, wanted in zip(pixels, expected, strict=True):
            assert found == pytest.approx(wanted, abs=25), name
    light = store.pixels[store.rows(["kinds/gray16.png"])][0, 112]
    assert (light[9, 0], light[-9, 0]) == (64, 192)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_an_image_upright(tmp_path, suffix, orientation):
    upright = Image.new("RGB", (240, 160), "black")
    upright.paste("white", (0, 0, 120, 80))
    undo = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]  # Pillow's numbers of what lays it so
    lying, tag = upright if undo is None else upright.transpose(undo), Image.Exif()
    tag[0x112] = orientation
    lying.save(tmp_path / f"a{suffix}", exif=tag)
    corner = data.decode(tmp_path / f"a{suffix}")[[30, 30, 190, 190], [30, 190, 30, 190], 0]
    assert corner.tolist() == pytest.approx([255, 0, 0, 0], abs=9)


@pytest.mark.skipif(PILLOW < 13, reason="older versions of Pillow do not know this kind")
def test_gray_with_associated_alpha_is_cut_out(tmp_path):
    content = io.BytesIO()
    cut_out("LA").save(content, "TIFF")
    alone, associated = (struct.pack("<HHIH", 338, 3, 1, kind) for kind in (2, 1))  # ExtraSamples
    (tmp_path / "a.tif").write_bytes(content.getvalue().replace(alone, associated))
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode == "La"
    assert data.decode(tmp_path / "a.tif")[[60, 164], 112].min() > 230


def test_an_image_is_turned_although_another_exif_entry_is_damaged(tmp_path):
    image = Image.new("RGB", (80, 40), "black")
    image.paste("white", (0, 0, 40, 40))  # left; on top once turned
    entry = struct.pack("<HHII", 0x11A, 1, 1, 100_000)  # a number where a fraction belongs
    image.save(tmp_path / "a.jpg", exif=exif(entry) + bytes(60))
    upright = data.decode(tmp_path / "a.jpg").float().mean(2)
    assert upright[:100].min() > 200
    assert upright[124:].max() < 50


def test_each_unreadable_image_is_named_with_its_reason(cache, tmp_path):
    folder = tmp_path / "data"
    draw(folder, {"cat": 5, "dog": 5})
    image = io.BytesIO()
    image_of().resize((600, 400)).save(image, "JPEG")
    (folder / "cat" / "half.jpg").write_bytes(image.getvalue()[:2000])
    (folder / "cat" / "none.jpg").write_bytes(b"")
    (folder / "cat" / "page.jpg").write_text("<html>404</html>")
    levels("f4").save(folder / "cat" / "float.tif")
    levels("i4", 100_000).save(folder / "cat" / "wide.tif")
    levels("i4", 1).save(folder / "cat" / "narrow.tif")
    Image.new("1", (16_100, 16_100)).save(folder / "cat" / "huge.png")
    argv = ["--data", folder, "--cache", cache, *TINY]
    error = one_line(run("train", *argv, folder=tmp_path, status=1))
    assert "7 of 17 images cannot be read" in error
    for name, reason in {
        "half.jpg": "image file is truncated",
        "none.jpg": "not an image of a known kind",
        "page.jpg": "not an image of a known kind",
        "float.tif": "floating point",
        "wide.tif": "32-bit integers",
        "narrow.tif": "32-bit integers",
        "huge.png": "Image size (259210000 pixels) exceeds limit of 256000000",
    }.items():
        assert f"'cat/{name}' ({reason}" in error


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "tif", "webp", "jp2"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_image_with_damaged_pixels_is_refused(kind):
    """Of files that are damaged in the middle, those are refused that Pillow refuses."""
    if f".{kind}" not in data.SUFFIXES:
        pytest.skip("this Pillow has no such decoder")
    noise = Image.frombytes("RGB", (99, 99), random.Random(0).randbytes(29_403))
    sound, options = io.BytesIO(), {"compression": "tiff_lzw"} if kind == "tif" else {}
    noise.save(sound, Image.registered_extensions()[f".{kind}"], **options)
    refused = 0
    for seed in range(20):
        content, rng = bytearray(sound.getvalue()), random.Random(seed)
        place = rng.randrange(len(content) // 3, len(content) - 200)
        content[place : place + 100] = rng.randbytes(100)
        if seed % 2:
            del content[place:]
        try:
            Image.open(io.BytesIO(content)).convert("RGB")
        except Exception:
            refused += 1
            with pytest.raises(Exception, match=r".+"):
                data.decode(io.BytesIO(content))
    assert refused > 5


def test_an_image_that_could_not_be_read_is_tried_again(cache, tmp_path, monkeypatch):
    folder = draw(tmp_path / "data", {"cat": 5, "dog": 5})
    decode = data.decode
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode", lambda file: decode(io.BytesIO(b"")))
        with pytest.raises(data.DataError, match="10 of 10 images cannot be read"):
            opened(folder, cache)
    assert not data.ImageStore(folder, str(cache), skip_bad_images=True).paths  # as a run has it
    store, _ = opened(folder, cache)
    assert len(store.paths) == 10
    assert torch.equal(store.pixels[0], decode(Path(folder, store.paths[0])))


# ------------------------------------------------------------- where and how it is started


def test_a_run_in_the_folder_of_the_images_can_be_resumed_and_tested(cache, tmp_path):
    draw(tmp_path / "flowers", {"rose": 9, "tulip": 9})
    begun = run("train", "--data", ".", "--cache", cache, *TINY, folder=tmp_path)
    assert f"images are read from {tmp_path / 'flowers'}" in begun.stdout
    run("train", "--resume", "--epochs", 2, folder=tmp_path)
    run("test", folder=tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes")
@pytest.mark.parametrize("flag", ["--json", "--predictions"])
def test_what_is_no_file_is_written_to_and_not_replaced(trained, flags, tmp_path, flag):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    contents = []
    pipe = tmp_path / "pipe"
    reader = threading.Thread(target=lambda: contents.append(pipe.read_text()), daemon=True)
    reader.start()
    argv = ["--ckpt", trained / "alexnet.pth", "--logdir", "log"]
    run("test", *argv, flag, "link", folder=tmp_path)
    reader.join(60)
    assert contents[0].startswith(("{", "path,"))
    assert (tmp_path / "pipe").is_fifo()
    refused = run("train", *flags, "--ckpt", "pipe", folder=tmp_path, status=1)
    assert "pipe: is a folder or a device" in one_line(refused)


def notebook() -> None:
    """Write to something that is no file, as notebooks do."""
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()


def service() -> None:
    """Have no terminal, as programs that a service or pythonw starts."""
    sys.stdout = sys.stderr = None


@pytest.mark.parametrize("before", [notebook, service])
@pytest.mark.parametrize("argv", [["--help"], TINY])
def test_standard_output_need_not_be_a_file(photos, cache, tmp_path, argv, before):
    run("train", "--data", photos, "--cache", cache, *argv, folder=tmp_path, before=before)
    assert (tmp_path / "alexnet.pth").exists() == ("--help" not in argv)


def move_home() -> None:
    os.environ["HOME"] = os.environ["USERPROFILE"] = os.path.abspath("home")


def test_a_tilde_that_the_shell_leaves_is_expanded(photos, cache, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "photos").symlink_to(photos)
    argv = ["--data=~/photos", "--logdir=~/r", "--ckpt=~/m.pth", f"--cache={cache}", "--name=n"]
    run("train", *argv, *TINY, folder=tmp_path, before=move_home)
    argv = ["--ckpt=~/m.pth", "--data=~/photos", "--json=~/j", "--predictions=~/p", "--logdir=~/t"]
    run("test", *argv, folder=tmp_path, before=move_home)
    assert not (tmp_path / "~").exists()
    made = {path.name for path in (tmp_path / "home").iterdir()}
    assert made == {"photos", "r", "t", "m.pth", "m.last.pth", "j", "p"}


SIZES = [(10, 2, 3), (10, 2, 10), (12, 6, 1), (12, 2, 10), (100, 2, 1), (100, 10, 3)]
SIZES += [(100, 10, 10), (1000, 1000, 1), (1000, 10, 3), (1000, 10, 10)]


@pytest.mark.parametrize("recipe", ["report", "strong"])
@pytest.mark.parametrize(
    ("images", "classes", "epochs"),
    [(10, 2, 1), *(pytest.param(*size, marks=thorough) for size in SIZES)],
)
def test_data_sets_of_any_size_train(cache, tmp_path, recipe, images, classes, epochs):
    counts = {f"class {c}": len(range(c, images, classes)) for c in range(classes)}
    argv = ["--data", draw(tmp_path / "data", counts), "--cache", cache, "--stride", 4]
    size = "64" if recipe == "report" else "64-80"
    argv += ["--recipe", recipe, "--epochs", epochs, "--train-size", size]
    command = run("train", *argv, folder=tmp_path)
    assert not command.stderr
    assert f"epoch {epochs}/{epochs}" in " ".join(
        command.stdout.replace("epoch  ", "epoch ").split()
    )
    tested = run("test", "--flip", folder=tmp_path)
    assert not tested.stderr


def test_a_tilde_before_images_is_expanded(trained, photos, tmp_path):
    (tmp_path / "home").symlink_to(photos)
    argv = ["--ckpt", trained / "alexnet.pth", "--images=~/101_ObjectCategories/star"]
    run("test", *argv, folder=tmp_path, before=move_home)


def test_fewer_than_ten_images_are_refused_without_a_librarys_warning(cache, tmp_path):
    argv = ["--data", draw(tmp_path / "data", {"cat": 5, "dog": 4}), "--cache", cache, *TINY]
    assert "at least 10 are needed" in one_line(run("train", *argv, folder=tmp_path, status=1))


@thorough
def test_validation_does_not_trail_in_short_runs_of_the_strong_recipe(cache, tmp_path):
    flags = "--data sample --recipe strong --epochs 12 --stride 4 --name a"
    run("train", *flags.split(), "--cache", cache, folder=tmp_path)
    rows = (tmp_path / "runs" / "a" / "history.csv").read_text().split()
    last = dict(zip(rows[0].split(","), map(float, rows[-1].split(",")), strict=True))
    assert last["valid_accuracy"] > last["train_accuracy"] - 20
    assert last["valid_accuracy"] > 30
