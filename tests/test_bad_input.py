"""What a user may get wrong ends as one line and an exit status, and leaves no files behind."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, one_line, run, shell, thorough

import model


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
        ("--cutmix 2", 2, "--cutmix"),
        ("--repeats 0", 2, "--repeats"),
        ("--logit-adjustment -1", 2, "--logit-adjustment"),
        ("--init nowhere", 2, "nowhere"),
        ("--init file.txt", 1, "file.txt"),
        ("--epoch 3", 2, "did you mean --epochs?"),
        ("--batchsize=3", 2, "did you mean --batch-size?"),
        ("--warmup-epochs 5 --epochs 5", 2, "--warmup-epochs 5"),
        ("--name a/b", 2, "--name"),
        ("--name ..", 2, "--name"),
        ("--device tpu", 2, "--device"),
        ("--device cuda:1000", 2, "--device"),
        ("--device cuda:01", 2, "--device"),
        ("--augment wrong", 2, "--augment"),
        ("--train-size 1000", 2, "--train-size"),
        ("--train-size 80-", 2, "--train-size"),
        ("--train-size 50", 2, "--train-size"),
        ("--test-size 50", 2, "--test-size"),
        ("--data missing", 1, "missing: no such folder"),
        ("--data file.txt", 1, "file.txt"),
        ("--data empty", 1, "no class folders"),
        ("--data one_class", 1, "at least two class folders"),
        ("--data few", 1, "too few"),
        ("--ckpt empty", 1, "is a folder"),
        ("--ckpt .", 2, "--ckpt"),
        ("--ckpt=", 2, "--ckpt"),
        ("--ckpt new/", 2, "--ckpt"),
        ("--data=", 2, "--data"),
        ("--cache=", 2, "--cache"),
        ("--logdir=", 2, "--logdir"),
        ("--logdir gone", 1, "gone"),
        ("--cache c\udcff", 2, "--cache"),
        ("--name n\udcff", 2, "--name"),
        ("--ckpt file.txt/alexnet.pth", 1, "file.txt"),
        ("--resume", 1, "alexnet.last.pth"),
    ],
)
def test_a_bad_argument_is_refused(flags, photos, tmp_path, argument, status, words):
    (tmp_path / "file.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone").symlink_to("a drive that is not there")
    images = sorted(photos.rglob("*.jpg"))
    for folder, count in (("one_class/a", 12), ("few/a", 2), ("few/b", 2)):
        (tmp_path / folder).mkdir(parents=True)
        for image in images[:count]:
            shutil.copy(image, tmp_path / folder / f"{image.parent.name}_{image.name}")
    assert words in refuse("train", *flags, *argument.split(), folder=tmp_path, status=status)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
@pytest.mark.parametrize("program", ["train", "test"])
def test_a_device_that_is_not_there_is_refused(flags, trained, tmp_path, program):
    argv = flags if program == "train" else ["--ckpt", trained / "alexnet.pth"]
    assert "try --device cpu" in refuse(program, *argv, "--device", "cuda", folder=tmp_path)


def test_help_shows_defaults_even_zero_and_those_with_a_percent_sign(tmp_path):
    helped = shell(
        ROOT / "train.py",
        "--help",
        folder=tmp_path,
        TORCH_HOME="/100%/cache",
    )
    assert helped.returncode == 0
    assert "/100%/cache" in helped.stdout
    shown = " ".join(helped.stdout.split())
    assert "over 80 % of the epochs (default: 224)" in shown
    assert "0: no averaging (default: 0.0)" in shown


@pytest.mark.parametrize("flag", ["--data x", "--cache x", "--split valid", "--flip", "--versus x"])
def test_a_flag_of_the_data_set_contradicts_images(trained, tmp_path, flag):
    argv = ["--ckpt", trained / "alexnet.pth", "--images", "a.jpg", *flag.split()]
    assert flag.split()[0] in refuse("test", *argv, folder=tmp_path, status=2)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("--json new/a", "--json new/a: is a folder, or its folder does not exist"),
        ("--predictions .", "--predictions .: is a folder"),
        ("--json ./a --predictions a", "are both ./a"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_the_test(trained, tmp_path, files, words):
    argv = ["--ckpt", trained / "alexnet.pth", *files.split()]
    assert words in refuse("test", *argv, folder=tmp_path, status=2)


# -------------------------------------------------------------------------------------- checkpoints


class Hostile:
    """Creates a file when it is unpickled by a reader that runs what a pickle says."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("hostile", "could run code"),
        ("other classes", "classes"),
    ],
)
def test_a_bad_checkpoint_is_refused(trained, tmp_path, kind, words):
    """More kinds are in test_model.py."""
    path, victim = tmp_path / "bad.pth", tmp_path / "victim"
    checkpoint = model.load(trained / "alexnet.pth")
    extra = {
        "hostile": {"extra": Hostile(victim)},
        "other classes": {"classes": [f"class {place}" for place in range(10)]},
    }
    torch.save(checkpoint | extra[kind], path)
    error = refuse("test", "--ckpt", path, folder=tmp_path)
    assert words in error
    assert "bad.pth" in error
    assert not victim.exists()


def test_a_best_checkpoint_is_not_resumed(trained, tmp_path):
    shutil.copy(trained / "alexnet.pth", tmp_path / "alexnet.last.pth")
    assert "resume" in refuse("train", "--resume", folder=tmp_path)


@pytest.mark.parametrize("what", ["split", "classes"])
def test_checkpoints_of_different_splits_or_classes_are_not_compared(trained, tmp_path, what):
    checkpoint = model.load(trained / "alexnet.pth")
    parts = checkpoint["split"]
    other = {
        "split": parts | {"test": parts["valid"], "valid": parts["test"]},
        "classes": checkpoint["classes"][::-1],
    }
    torch.save(checkpoint | {what: other[what]}, tmp_path / "other.pth")
    argv = ["--ckpt", trained / "alexnet.pth", "--versus", "other.pth"]
    error = refuse("test", *argv, folder=tmp_path)
    assert "other.pth" in error
    assert what in error


def test_a_tested_image_that_is_gone_is_named(trained, photos, tmp_path):
    moved, gone = (
        shutil.copytree(photos, tmp_path / "moved"),
        model.load(trained / "alexnet.pth")["split"]["test"][0],
    )
    (moved / "101_ObjectCategories" / gone).unlink()
    argv = ["--ckpt", trained / "alexnet.pth", "--data", moved, "--cache"]
    (tmp_path / "here").mkdir()
    assert gone in refuse("test", *argv, tmp_path / "cache", folder=tmp_path / "here")


# ----------------------------------------------------------------------------------------- images


@pytest.fixture
def argv(flags, album, tmp_path) -> list:
    """Flags for an epoch on the album; the working folder is to be another."""
    return [*flags, "--data", album, "--cache", tmp_path / "cache", "--epochs", "1"]


@pytest.fixture
def here(tmp_path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def bad_images(album) -> list[str]:
    """Images in the album that cannot be read, relative to it."""
    jpeg = next(album.rglob("*.jpg")).read_bytes()
    bad = {
        "arrow/truncated.jpg": jpeg[: len(jpeg) // 2],
        "arrow/empty.jpg": b"",
        "bar/text.jpg": b"no image",
        "bar/html.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
    }
    for name, content in bad.items():
        (album / name).write_bytes(content)
    (album / "circle" / "broken link.jpg").symlink_to("nowhere.jpg")
    return [*bad, "circle/broken link.jpg"]


def test_all_bad_images_are_named_at_once_before_training(argv, here, bad_images):
    error = refuse("train", *argv, folder=here)
    assert f"{len(bad_images)} of 85 images" in error
    assert all(name in error for name in bad_images)


def test_bad_images_may_be_skipped(argv, here, bad_images):
    trained = run("train", *argv, "--skip-bad-images", folder=here)
    assert f"{len(bad_images)} images" in trained.stdout
    split = model.load(here / "alexnet.pth")["split"]
    used = {name for names in split.values() for name in names}
    assert len(used) == 80
    assert not used & set(bad_images)
    assert not run("test", folder=here).stderr
    run("train", "--resume", "--epochs", 2, folder=here)


# ------------------------------------------------------------------------------------------ folders


def used(folder: Path) -> set[str]:
    """Return the images that the run in a folder used."""
    return {name for part in model.load(folder / "alexnet.pth")["split"].values() for name in part}


linux = pytest.mark.skipif(sys.platform != "linux", reason="names are text on other systems")


@pytest.mark.parametrize(
    "name",
    [
        "Ünï 图片",
        "new\nline",
        pytest.param("b\udcff", marks=linux),
        *(
            pytest.param(name, marks=thorough)
            for name in ("with space", "quote'\"", "%s {0}", "-dash")
        ),
    ],
)
def test_odd_names_are_fine(argv, album, here, name):
    (album / "star").rename(album / name)
    (next((album / name).iterdir())).rename(album / name / f"{name}.jpg")
    moved = album.rename(album.with_name(name))
    run("train", *argv, "--data", moved, folder=here)
    assert f"{name}/{name}.jpg" in used(here)
    tested = run("test", folder=here)
    assert not tested.stderr


def test_odd_content_of_folders(argv, album, here):
    star, image = album / "star", (album / "star" / "image_0001.jpg").read_bytes()
    for name in (".hidden.jpg", "notes.txt", "more.txt", "Thumbs.db", "../readme.jpg"):
        (star / name).write_text("no image")
    for name in (".hidden/a", "BACKGROUND_Google/a", "star/.thumbnails/a", "star/deep/deeper/a"):
        (album / name).mkdir(parents=True)
        (album / name / "a.jpg").write_bytes(image)
    (star / "a folder.jpg").mkdir()
    (star / "loop").symlink_to(star, target_is_directory=True)
    (star / "itself").symlink_to(star / "itself")
    (album / "lonely").mkdir()
    (album / "lonely" / "a.jpg").write_bytes(image)
    output = run("train", *argv, folder=here).stdout
    assert used(here) - {path.relative_to(album).as_posix() for path in album.glob("*/image*")} == {
        "star/deep/deeper/a/a.jpg",
        "lonely/a.jpg",
    }
    assert "folders without images: star/a folder.jpg, star/itself\n" in output
    assert "files that are not images by their names: 2 .txt, 1 without suffix\n" in output
    assert "lonely/a.jpg" in model.load(here / "alexnet.pth")["split"]["train"]
