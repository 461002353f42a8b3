"""On the real Caltech101, where the environment variable CALTECH101 names it."""

import commands
import pytest
import torch

import data

pytestmark = pytest.mark.usefixtures("caltech101")


@pytest.fixture(scope="module")
def listing(caltech101):
    return data.scan(data.locate(caltech101, ""))


def test_101_classes_and_8677_images_without_the_background(listing):
    images, classes = listing
    assert len(classes) == 101
    assert len(images) == data.CALTECH101_IMAGES
    assert "BACKGROUND_Google" not in classes


def test_split_has_6942_868_and_867_images(listing):
    manifest = data.split([path for path, _, _ in listing[0]], seed=0)
    assert [len(manifest[name]) for name in ("train", "valid", "test")] == [6942, 868, 867]
    assert not set(manifest["train"]) & set(manifest["test"])


def test_every_seventh_image_decodes(caltech101, listing):
    root = data.locate(caltech101, "")
    assert all(data.try_decode(root / path)[1] for path, _, _ in listing[0][::7])


def test_a_subset_of_real_photographs_is_learned(caltech101, tmp_path):
    subset = tmp_path / "photos"
    subset.mkdir()
    for name in ("Faces_easy", "Motorbikes", "airplanes", "watch"):
        (subset / name).mkdir()
        for path in sorted((data.locate(caltech101, "") / name).iterdir())[:60]:
            (subset / name / path.name).symlink_to(path)
    flags = (
        f"--data {subset} --cache {tmp_path}/cache --stride 4 --batch-size 16 --epochs 6".split()
    )
    commands.run("train", *flags, "--lr", "3e-4", folder=tmp_path)
    assert torch.load(tmp_path / "alexnet.pth", weights_only=True)["valid_accuracy"] > 75
