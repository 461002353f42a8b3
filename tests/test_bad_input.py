"""What a user may get wrong ends as one line and an exit status, and leaves nothing half-written."""

import pickle
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from commands import ROOT, one_line, run, shell
from PIL import Image

import data
import model
import test
import train


def listing(folder: Path) -> dict[str, int]:
    """Return what lies in a folder, without the output of the commands that ran there."""
    return {
        str(path): path.lstat().st_size
        for path in folder.rglob("*")
        if not path.name.startswith(("stdout.", "stderr."))
    }


def refuse(program: str, *argv, folder: Path, status: int = 1) -> str:
    """Run a command that must fail and leave its folder as it was; return its one line."""
    before = listing(folder)
    error = one_line(run(program, *argv, folder=folder, status=status))
    assert error.startswith(f"{program}.py: error: ")
    assert listing(folder) == before
    return error


# ---------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("argument", "status", "words"),
    [
        ("--epochs 0", 2, "--epochs"),
        ("--epochs -1", 2, "--epochs"),
        ("--epochs 1.5", 2, "--epochs"),
        ("--epochs x", 2, "--epochs"),
        (f"--epochs {10**30}", 2, "--epochs"),
        ("--lr -1", 2, "--lr"),
        ("--lr nan", 2, "--lr"),
        ("--lr inf", 2, "--lr"),
        ("--lr 0", 2, "--lr"),
        ("--lr abc", 2, "--lr"),
        ("--batch-size 0", 2, "--batch-size"),
        ("--stride 3", 2, "--stride"),
        ("--seed -1", 2, "--seed"),
        ("--dropout 1", 2, "--dropout: must be from 0 to 0.99"),
        ("--ema 1", 2, "--ema"),
        ("--label-smoothing 1", 2, "--label-smoothing"),
        ("--epoch 3", 2, "did you mean --epochs?"),
        ("--batchsize=3", 2, "did you mean --batch-size?"),
        ("--warmup-epochs 5 --epochs 5", 2, "--warmup-epochs 5"),
        ("--name a/b", 2, "--name"),
        ("--name ..", 2, "--name"),
        ("--device tpu", 2, "--device"),
        ("--device cuda:1000", 2, "--device"),
        ("--augment wrong", 2, "--augment"),
        ("--train-size 1000", 2, "--train-size"),
        ("--train-size 50", 2, "--train-size"),
        ("--test-size 50", 2, "--test-size"),
        ("--data missing", 1, "missing: no such folder"),
        ("--data file.txt", 1, "file.txt"),
        ("--data empty", 1, "no class folders"),
        ("--data one_class", 1, "at least two class folders"),
        ("--data few", 1, "too few"),
        ("--ckpt empty", 1, "it is a folder"),
        ("--ckpt .", 2, "--ckpt"),
        ("--ckpt=", 2, "--ckpt"),
        ("--ckpt new/", 2, "--ckpt"),
        ("--cache c\udcff", 2, "--cache"),
        ("--name n\udcff", 2, "--name"),
        ("--ckpt file.txt/alexnet.pth", 1, "file.txt"),
        ("--resume", 1, "alexnet.last.pth"),
        ("--resume=", 2, "--resume"),
        ("--resume nowhere.last.pth", 1, "nowhere.last.pth"),
        ("--resume nowhere.last.pth --ckpt other.pth", 2, "other.pth"),
        ("--resume nowhere.last.pth --ckpt ./nowhere.pth", 1, "nowhere.last.pth"),
        ("--resume .last", 2, "--resume"),
    ],
)
def test_a_bad_argument_is_refused(flags, photos, tmp_path, argument, status, words):
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    pictures = sorted(photos.rglob("*.jpg"))
    for folder, count in (("one_class/a", 12), ("few/a", 2), ("few/b", 2)):
        (tmp_path / folder).mkdir(parents=True)
        for picture in pictures[:count]:
            shutil.copy(picture, tmp_path / folder / f"{picture.parent.name}_{picture.name}")
    assert words in refuse("train", *flags, *argument.split(), folder=tmp_path, status=status)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--json folder", "--json folder"),
        ("--predictions none/x.csv", "none/x.csv"),
        ("--predictions -", "--predictions -"),
        ("--logdir l\udcff", "--logdir"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    trained, tmp_path, argument, words
):
    (tmp_path / "folder").mkdir()
    refused = refuse(
        "test", "--ckpt", trained / "alexnet.pth", *argument.split(), folder=tmp_path, status=2
    )
    assert words in refused


@pytest.mark.parametrize("program", ["train", "test"])
def test_a_device_that_is_not_there_is_refused(flags, trained, tmp_path, program):
    argv = flags if program == "train" else ["--ckpt", trained / "alexnet.pth"]
    assert "try --device cpu" in refuse(program, *argv, "--device", "cuda", folder=tmp_path)


def test_help_shows_defaults_even_zero_and_those_with_a_percent_sign(tmp_path):
    helped = shell(
        ROOT / "train.py",
        "--help",
        folder=tmp_path,
        XDG_CACHE_HOME="/100%/cache",
        LOCALAPPDATA="/100%/cache",
    )
    assert helped.returncode == 0
    assert "/100%/cache" in helped.stdout
    assert "dropout (default: 0)" in " ".join(helped.stdout.split())


def test_pictures_from_another_program_need_no_data_set(trained, tmp_path):
    argv = ["--ckpt", trained / "alexnet.pth", "--images", "a.jpg", "--data", "test"]
    assert "--data" in refuse("test", *argv, folder=tmp_path, status=2)


# -------------------------------------------------------------------------------------- checkpoints


class Hostile:
    """Creates a file when it is unpickled by a reader that runs what a pickle says."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def spoil(kind: str, path: Path, victim: Path) -> None:
    """Make a good checkpoint a bad one."""
    checkpoint = model.load(path)
    weights = checkpoint["state_dict"]
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no checkpoint\n" * 100)
    elif kind == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "no checkpoint")
    elif kind == "hostile":
        torch.save(checkpoint | {"extra": Hostile(victim)}, path)
    elif kind == "hostile pickle":
        path.write_bytes(pickle.dumps(Hostile(victim)))
    elif kind == "wrong shapes":
        torch.save({name: tensor[:1] for name, tensor in weights.items()}, path)
    elif kind == "other weights":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "an empty dict":
        torch.save({}, path)
    elif kind == "newer":
        checkpoint["versions"]["format"] += 1
        torch.save(checkpoint, path)
    elif kind == "of an odd version":
        checkpoint["versions"]["format"] = "x"
        torch.save(checkpoint, path)
    elif kind == "other classes":
        torch.save(checkpoint | {"classes": [f"class {place}" for place in range(10)]}, path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "can't be read"),
        ("truncated", "damaged"),
        ("empty", "damaged"),
        ("text", "damaged"),
        ("another zip", "damaged"),
        ("hostile", "could run code"),
        ("hostile pickle", "bad.pth"),
        ("wrong shapes", "no AlexNet's"),
        ("other weights", "no AlexNet's"),
        ("a list", "holds a list"),
        ("an empty dict", "no checkpoint"),
        ("newer", "newer version"),
        ("of an odd version", "bad.pth"),
        ("other classes", "classes"),
    ],
)
def test_a_bad_checkpoint_is_refused(trained, tmp_path, kind, words):
    path, victim = tmp_path / "bad.pth", tmp_path / "victim"
    shutil.copy(trained / "alexnet.pth", path)
    spoil(kind, path, victim)
    error = refuse("test", "--ckpt", path, folder=tmp_path)
    assert words in error
    assert "bad.pth" in error
    assert not victim.exists()


def test_a_best_checkpoint_is_not_resumed(trained, tmp_path):
    shutil.copy(trained / "alexnet.pth", tmp_path / "alexnet.last.pth")
    assert "resume" in refuse("train", "--resume", folder=tmp_path)


def test_checkpoints_of_different_splits_are_not_compared(trained, tmp_path):
    checkpoint = model.load(trained / "alexnet.pth")
    split = checkpoint["split"]
    torch.save(
        checkpoint | {"split": split | {"test": split["valid"], "valid": split["test"]}},
        tmp_path / "other.pth",
    )
    error = refuse(
        "test", "--ckpt", trained / "alexnet.pth", "--versus", "other.pth", folder=tmp_path
    )
    assert "other.pth" in error
    assert "split" in error


def test_checkpoints_of_different_classes_are_not_compared(trained, tmp_path):
    checkpoint = model.load(trained / "alexnet.pth")
    torch.save(checkpoint | {"classes": checkpoint["classes"][::-1]}, tmp_path / "other.pth")
    error = refuse(
        "test", "--ckpt", trained / "alexnet.pth", "--versus", "other.pth", folder=tmp_path
    )
    assert "other.pth" in error
    assert "classes" in error


def test_only_a_file_that_is_asked_for_needs_a_folder_to_write_in(monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    assert test.parse(["--images", "cat.jpg", "--json"]).json == "-"
    with pytest.raises(train.UsageError, match="can't be written there"):
        test.parse(["--json", "figures.json"])


def test_a_tested_image_that_is_gone_is_named(trained, photos, tmp_path):
    moved, gone = (
        shutil.copytree(photos, tmp_path / "moved"),
        model.load(trained / "alexnet.pth")["split"]["test"][0],
    )
    (moved / "101_ObjectCategories" / gone).unlink()
    argv = ["--ckpt", trained / "alexnet.pth", "--data", moved, "--cache"]
    (tmp_path / "here").mkdir()
    assert gone in refuse("test", *argv, tmp_path / "cache", folder=tmp_path / "here")


# ----------------------------------------------------------------------------------------- pictures


@pytest.fixture
def album(photos, tmp_path) -> Path:
    """A copy of the photos, to add to."""
    return Path(shutil.copytree(photos / "101_ObjectCategories", tmp_path / "album"))


@pytest.fixture
def argv(flags, album, tmp_path) -> list:
    """Flags for an epoch on the album; the working folder is to be another."""
    return [*flags, "--data", album, "--cache", tmp_path / "cache", "--epochs", "1"]


@pytest.fixture
def here(tmp_path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def bomb() -> bytes:
    """Return a PNG of 100 000 x 100 000 pixels in some hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def bad_pictures(album) -> list[str]:
    """Pictures in the album that can't be read, relative to it."""
    jpeg = next(album.rglob("*.jpg")).read_bytes()
    bad = {
        "arrow/truncated.jpg": jpeg[: len(jpeg) // 2],
        "arrow/empty.jpg": b"",
        "bar/text.jpg": b"no picture",
        "bar/html.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "circle/bomb.png": bomb(),
    }
    for name, content in bad.items():
        (album / name).write_bytes(content)
    (album / "circle" / "broken link.jpg").symlink_to("nowhere.jpg")
    return [*bad, "circle/broken link.jpg"]


def test_all_bad_pictures_are_named_at_once_before_training(argv, here, bad_pictures):
    error = refuse("train", *argv, folder=here)
    assert f"{len(bad_pictures)} of 86 images" in error
    assert all(name in error for name in bad_pictures)


def test_bad_pictures_may_be_skipped(argv, here, bad_pictures):
    trained = run("train", *argv, "--skip-bad-images", folder=here)
    assert f"{len(bad_pictures)} images" in trained.stdout
    split = model.load(here / "alexnet.pth")["split"]
    used = {name for names in split.values() for name in names}
    assert len(used) == 80
    assert not used & set(bad_pictures)


def draw_all_kinds(folder: Path) -> list[str]:
    """Write pictures of many kinds; return their names."""
    colour = Image.effect_noise((60, 40), 80).convert("RGB")
    grey16 = Image.fromarray(numpy.full((30, 30), 32768, dtype=numpy.uint16))
    pictures = {
        "a.png": colour,
        "a.gif": colour,
        "a.bmp": colour,
        "a.webp": colour,
        "a.tif": colour,
        "UPPER.JPG": colour,
        "cmyk.jpg": colour.convert("CMYK"),
        "grey.jpg": colour.convert("L"),
        "rgba.png": colour.convert("RGBA"),
        "grey_alpha.png": colour.convert("LA"),
        "bits.png": colour.convert("1"),
        "grey16.png": grey16,
        "pixel.png": colour.resize((1, 1)),
        "wide.jpg": colour.resize((20_000, 3)),
        "tall.png": colour.resize((1, 5_000)),
    }
    for name, picture in pictures.items():
        picture.save(folder / name)
    colour.convert("P").save(folder / "palette.png", transparency=bytes(range(256)))
    return [*pictures, "palette.png"]


def test_pictures_of_many_kinds_train(argv, album, here):
    names = {f"star/{name}" for name in draw_all_kinds(album / "star")}
    trained = run("train", *argv, folder=here)
    assert not trained.stderr
    split = model.load(here / "alexnet.pth")["split"]
    assert names < {name for part in split.values() for name in part}


@pytest.mark.parametrize(("name", "order"), [("grey.png", "<"), ("grey.tif", ">")])
def test_sixteen_bits_do_not_saturate(tmp_path, name, order):
    levels = numpy.array([0, 16384, 32768, 65535]).repeat(40) * numpy.ones((160, 1))
    Image.fromarray(levels.astype(f"{order}u2")).save(tmp_path / name)
    middle = data.decode(tmp_path / name)[112, 28::56, 0]
    assert middle.tolist() == [0, 64, 128, 255]


def test_a_floating_point_picture_is_refused_rather_than_black(tmp_path):
    Image.fromarray(numpy.full((8, 8), 0.5, "f4")).save(tmp_path / "f.tif")
    assert data.try_decode(tmp_path / "f.tif")[1] == 0


def test_exif_turns_a_picture_upright(tmp_path):
    picture, exif = Image.new("RGB", (80, 40), "black"), Image.Exif()
    picture.paste("white", (0, 0, 40, 40))  # left; on top once turned a quarter clockwise
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    upright = data.decode(tmp_path / "turned.jpg").float().mean(2)
    assert upright[:100].min() > 200
    assert upright[124:].max() < 50


# ------------------------------------------------------------------------------------------ folders


def used(folder: Path) -> set[str]:
    """Return the pictures that the run in a folder used."""
    return {name for part in model.load(folder / "alexnet.pth")["split"].values() for name in part}


@pytest.mark.parametrize(
    "name", ["with space", "Ünï 图片", "new\nline", "quote'\"", "%s {0}", "-dash", "b\udcff"]
)
def test_odd_names_are_fine(argv, album, here, name):
    (album / "star").rename(album / name)
    (next((album / name).iterdir())).rename(album / name / f"{name}.jpg")
    moved = album.rename(album.with_name(name))
    run("train", *argv, "--data", moved, folder=here)
    assert f"{name}/{name}.jpg" in used(here)
    tested = run("test", folder=here)
    assert not tested.stderr


def test_folders_in_class_folders_belong_to_the_class(argv, album, here):
    (album / "star" / "deep" / "deeper").mkdir(parents=True)
    shutil.copy(next(album.rglob("*.jpg")), album / "star" / "deep" / "deeper" / "a.jpg")
    run("train", *argv, folder=here)
    assert "star/deep/deeper/a.jpg" in used(here)
    assert len(model.load(here / "alexnet.pth")["classes"]) == 10


def test_links_in_a_loop_end(argv, album, here):
    (album / "star" / "loop").symlink_to(album / "star", target_is_directory=True)
    (album / "star" / "itself").symlink_to(album / "star" / "itself")
    run("train", *argv, folder=here)
    assert len(used(here)) == 80


def test_a_class_folder_that_links_to_itself_is_ignored(argv, album, here):
    (album / "itself").symlink_to(album / "itself")
    run("train", *argv, folder=here)
    assert len(used(here)) == 80


def test_what_is_no_picture_is_ignored(argv, album, here):
    for name in ("star/.hidden.jpg", "star/notes.txt", "star/Thumbs.db", "readme.jpg"):
        (album / name).write_text("no picture")
    for name in (".hidden", "empty", "BACKGROUND_Google"):
        (album / name).mkdir()
    (album / "star" / ".thumbnails").mkdir()
    for name in (".hidden", "BACKGROUND_Google", "star/.thumbnails"):
        shutil.copy(next((album / "star").glob("image*.jpg")), album / name)
    run("train", *argv, folder=here)
    assert len(used(here)) == 80
    assert len(model.load(here / "alexnet.pth")["classes"]) == 10


def test_a_class_may_have_one_image(argv, album, here):
    (album / "lonely").mkdir()
    shutil.copy(next(album.rglob("*.jpg")), album / "lonely")
    run("train", *argv, folder=here)
    run("test", folder=here)
    assert "lonely" in model.load(here / "alexnet.pth")["classes"]
