"""On the real Caltech101, where the environment variable CALTECH101 names it."""

import commands
import pytest
import torch

import data

pytestmark = pytest.mark.usefixtures("caltech101")


@pytest.fixture(scope="module")
def store(caltech101, tmp_path_factory):
    return data.ImageStore(caltech101, tmp_path_factory.mktemp("cache"))


def test_101_classes_and_8677_readable_images_without_the_background(store):
    assert len(store.classes) == 101
    assert len(store.paths) == len(store.checksums) == data.CALTECH101_IMAGES
    assert "BACKGROUND_Google" not in store.classes
    assert not store.parts


def test_split_has_6942_868_and_867_images(store):
    manifest = data.split(store, seed=0)
    assert [len(manifest[name]) for name in ("train", "valid", "test")] == [6942, 868, 867]
    assert not set(manifest["train"]) & set(manifest["test"])


def test_a_subset_of_real_photographs_is_learned(caltech101, tmp_path):
    subset = tmp_path / "photos"
    for name in ("Faces_easy", "Motorbikes", "airplanes", "watch"):
        (subset / name).mkdir(parents=True)
        for path in sorted((data.locate(caltech101, "") / name).iterdir())[:60]:
            (subset / name / path.name).symlink_to(path)
    argv = ["--data", subset, "--cache", tmp_path / "cache", "--stride", 4, "--batch-size", 16]
    commands.run("train", *argv, "--epochs", 6, "--lr", 3e-4, folder=tmp_path)
    assert torch.load(tmp_path / "alexnet.pth", weights_only=True)["valid_accuracy"] > 75
