"""Fixtures: pictures drawn for the tests, and a small run on them."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import commands

import data

for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(variable, None)  # of a cluster that the tests run on
for signum in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):  # Windows has no SIGHUP
    if signal.getsignal(signum) is signal.SIG_IGN:  # behind a shell's & or nohup, and in children
        signal.signal(signum, lambda *_: None)  # children begin with the default again


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """A folder for decoded images."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of ten class folders with eight pictures each."""
    return data.draw_sample(tmp_path_factory.mktemp("photos") / "101_ObjectCategories", 8).parent


@pytest.fixture
def album(photos, tmp_path) -> Path:
    """A copy of the photos, to change."""
    return Path(shutil.copytree(photos / "101_ObjectCategories", tmp_path / "album"))


@pytest.fixture(scope="session")
def flags(photos, cache) -> list[str]:
    """Flags for a run that takes a second: 64 training images, 8 steps an epoch."""
    sizes = "--batch-size 8 --stride 4 --train-size 64 --test-size 96 --lr 1e-3"
    return ["--data", str(photos), "--cache", str(cache), *sizes.split()]


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory) -> Path:
    """A folder in which a run of three epochs has ended: alexnet.pth and runs/run."""
    folder = tmp_path_factory.mktemp("trained")
    argv = ["--epochs", "3", "--name", "run", "--ckpt", "alexnet.pth"]
    commands.run("train", *flags, *argv, folder=folder)
    return folder


@pytest.fixture(scope="session")
def caltech101() -> str:
    """The real data, where the environment variable CALTECH101 names them."""
    folder = os.environ.get("CALTECH101")
    if not folder:
        pytest.skip("CALTECH101 does not name the real data")
    return folder
