"""Several processes under torchrun: two on the CPU, which exchange gradients over the loopback device."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import torch
from commands import thorough

import model
import train

NARROW = Path(__file__).with_name("narrow.py")
WORDS = "train.py: "  # every message of the program begins so; torchrun's own lines do not


def torchrun(
    program, *argv, folder, options=(), status=0, **environment
) -> subprocess.CompletedProcess:
    """Run a command line in two processes, and check torchrun's exit status and that no worker hangs."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *options,
    ]
    process = subprocess.Popen(
        [*command, NARROW, program, *map(str, argv)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for this process group
    )
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun ends its workers, by force after a while
        process.communicate()
        raise
    assert process.returncode == status, err
    assert "[rank" not in err, err  # the head of a worker's traceback
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def messages(result) -> list[str]:
    """Return what the program itself, not torchrun, wrote to standard error."""
    return [line for line in result.stderr.splitlines() if line.startswith(WORDS)]


def checkpoint(folder: Path, name: str = "alexnet.last.pth") -> dict:
    return torch.load(folder / name, weights_only=True)


def difference(first: dict, second: dict) -> float:
    """Return the largest difference of two checkpoints' weights."""
    pairs = zip(first["state_dict"].values(), second["state_dict"].values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.fixture(scope="session")
def odd_photos(photos, tmp_path_factory) -> Path:
    """81 pictures, 65 of them for training: with 8 in a batch, one is left for the last."""
    folder = shutil.copytree(photos, tmp_path_factory.mktemp("odd") / "photos")
    star = folder / "101_ObjectCategories" / "star"
    shutil.copy(star / "image_0001.jpg", star / "image_0009.jpg")
    return folder


@pytest.fixture(scope="session")
def odd_flags(odd_photos, cache) -> list[str]:
    """Flags for two epochs of nine steps, with dropout."""
    return (
        f"--data {odd_photos} --cache {cache} --batch-size 8 --stride 4 --train-size 64 --test-size 96 --lr 1e-4 "
        "--augment crop,flip,color --precision fp32 --epochs 2 --name run"
    ).split()


@pytest.fixture(scope="session")
def unbroken(odd_flags, tmp_path_factory) -> Path:
    """A folder in which two processes have trained two epochs; they decoded the pictures."""
    folder = tmp_path_factory.mktemp("unbroken")
    torchrun("train", *odd_flags, folder=folder, DECODED=str(folder / "decoded"))
    return folder


def test_the_pictures_are_decoded_once_per_machine(unbroken):
    assert len((unbroken / "decoded").read_bytes()) == 81


def test_two_processes_train_as_one_does(odd_flags, tmp_path):
    # Adam divides a gradient by its size: where that is near zero, rounding is all that is left of it. At 64
    # pixels, 0.5 % of the weights have such gradients, and differ by up to 4e-4; at 96 none has
    flags = [
        *odd_flags,
        "--dropout",
        0,
        "--epochs",
        1,
        "--init",
        "he",
        "--augment",
        "none",
        "--train-size",
        96,
    ]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    commands.run("train", *flags, folder=tmp_path / "one")
    torchrun("train", *flags, folder=tmp_path / "two")
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    assert difference(one, two) < 1e-5
    for figure in ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy"):
        assert two["history"][0][figure] == pytest.approx(one["history"][0][figure], rel=1e-4), (
            figure
        )


@thorough
def test_two_processes_test_as_one_does(unbroken, tmp_path):
    ckpt, figures = unbroken / "alexnet.pth", {}
    commands.run("test", "--ckpt", ckpt, "--logdir", "one", "--json", "one.json", folder=tmp_path)
    result = torchrun("test", "--ckpt", ckpt, "--logdir", "two", "--json", folder=tmp_path)
    figures = [
        json.loads((tmp_path / "one.json").read_text()),
        json.loads(result.stdout),
    ]  # written once
    losses = [each.pop("loss") for each in figures]
    errors = [each.pop("calibration_error") for each in figures]
    assert figures[0] == figures[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert len(list((tmp_path / "two").rglob("events.*"))) == 1


@thorough
def test_killed_workers_are_restarted_and_the_run_ends_as_an_unbroken_one(
    odd_flags, unbroken, tmp_path
):
    older = checkpoint(
        unbroken
    )  # of a run with the same arguments: not what a restart goes on with
    older["state_dict"] = {name: torch.zeros_like(t) for name, t in older["state_dict"].items()}
    torch.save(older, tmp_path / "alexnet.last.pth")
    result = torchrun(
        "train", *odd_flags, folder=tmp_path, options=["--max-restarts=3"], EVENT="kill 1 5,13"
    )  # in the first epoch, then in the second
    assert difference(checkpoint(tmp_path), checkpoint(unbroken)) == 0
    assert result.stdout.count("epoch 1/2") == result.stdout.count("epoch 2/2") == 1


def test_a_restart_that_cannot_know_its_run_does_not_begin_it_anew(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(train.UsageError, match="--resume"):
        train.parse([])


@thorough
def test_a_worker_that_dies_takes_the_others_down(odd_flags, tmp_path):
    result = torchrun("train", *odd_flags, folder=tmp_path, status=1, EVENT="kill 1 5")
    (message,) = messages(result)
    assert "another process was lost" in message


@thorough
def test_interrupted_runs_save_once_and_go_on_as_if_unbroken(odd_flags, unbroken, tmp_path):
    result = torchrun("train", *odd_flags, folder=tmp_path, status=1, EVENT="terminate 0 5")
    assert messages(result) == ["train.py: interrupted; go on with: python train.py --resume"]
    first = checkpoint(tmp_path)
    assert first["epoch"] == 0
    assert 5 <= first["step"] < 9

    one = shutil.copytree(
        tmp_path, tmp_path / "one"
    )  # two processes' checkpoint serves a single one
    commands.run("train", "--resume", folder=one)
    commands.run("test", folder=one)
    assert difference(checkpoint(one), checkpoint(unbroken)) > 0  # other dropout
    assert checkpoint(one)["epoch"] == 2

    result = torchrun(
        "train", "--resume", folder=tmp_path, status=1, EVENT=f"interrupt 0 {12 - first['step']}"
    )
    assert messages(result) == ["train.py: interrupted; go on with: python train.py --resume"]
    second = checkpoint(tmp_path)
    assert second["epoch"] == 1
    assert 3 <= second["step"] < 9

    torchrun("train", "--resume", folder=tmp_path)
    assert difference(checkpoint(tmp_path), checkpoint(unbroken)) == 0
    assert not list(tmp_path.glob("*.tmp"))


@thorough
def test_a_batch_that_the_processes_cannot_share_evenly_is_one_line(odd_flags, tmp_path):
    result = torchrun("train", *odd_flags, "--batch-size", 7, folder=tmp_path, status=1)
    (message,) = messages(result)
    assert "--batch-size 7" in message


@thorough
def test_a_mistyped_flag_is_one_line_even_if_the_first_process_is_late(tmp_path):
    result = torchrun("train", "--epoch", 2, folder=tmp_path, status=1, LATE="0")
    (message,) = messages(result)
    assert "did you mean --epochs?" in message


@thorough
def test_a_data_error_is_reported_once_and_ends_all_processes(odd_photos, odd_flags, tmp_path):
    folder = shutil.copytree(odd_photos, tmp_path / "photos")
    (folder / "101_ObjectCategories" / "bar" / "image_0001.jpg").write_bytes(b"no picture")
    result = torchrun("train", *odd_flags, "--data", folder, folder=tmp_path, status=1)
    assert [line for line in messages(result) if "image_0001.jpg" in line] == messages(result)[:1]


def test_a_new_run_replaces_whatever_lies_where_it_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "job", lambda: "new")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alexnet.last.pth").write_bytes(b"damaged")
    assert train.parse([])[1] is None
    with pytest.raises(model.CheckpointError):
        train.parse(["--resume"])
