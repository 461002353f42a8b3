"""Two processes on the CPU, which exchange gradients over the loopback device.

Most are started without a launcher, as PyTorch's `env://` variables allow; some by torchrun.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import Command, after_step, one_line, run, save_each_epoch, send, thorough

import data
import model
import train

NARROW = Path(__file__).with_name("narrow.py")


def join(variables: dict[str, str], before) -> None:
    """Be one of several processes."""
    os.environ |= variables
    if before:
        before()


def pair(program, *argv, folder, before=(None, None), status=(0, 0), **variables) -> list[Command]:
    """Run a command line in two processes to their ends, and check the exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    commands = []
    for rank in (0, 1):
        own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        joined = partial(join, own, before[rank])
        commands.append(Command(program, *argv, folder=folder, before=joined))
    found = tuple(command.wait() for command in commands)
    assert found == status, [command.stderr for command in commands]
    return commands


def torchrun(*argv, folder, options=(), status=0, **variables) -> tuple[str, list[str]]:
    """Run train.py under torchrun; return its output and its error messages."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, *options, NARROW, *map(str, argv)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == status, result.stderr
    assert "[rank" not in result.stderr, result.stderr  # the head of a worker's traceback
    messages = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
    return result.stdout, messages  # without torchrun's own


def count_decoded() -> None:
    """Write a byte for each image that is decoded."""
    file, decode = os.open("decoded", os.O_WRONLY | os.O_CREAT | os.O_APPEND), data.decode

    def counted(image):
        os.write(file, b".")
        return decode(image)

    data.decode = counted


def save_and_die(step: int) -> None:
    """Save each epoch, and die after a step."""
    save_each_epoch()
    after_step(step, send, signal.SIGKILL)


def difference(first: Path, second: Path, name: str = "alexnet.last.pth") -> float:
    """Return the largest difference of the weights in two folders."""
    states = [model.load(folder / name)["state_dict"].values() for folder in (first, second)]
    return max((a - b).abs().max().item() for a, b in zip(*states, strict=True))


@pytest.fixture(scope="module")
def odd_flags(photos, tmp_path_factory) -> list[str]:
    """Flags for two epochs of nine steps: of 65 training images, one is left for the last."""
    folder = shutil.copytree(photos, tmp_path_factory.mktemp("odd") / "photos")
    star = folder / "101_ObjectCategories" / "star"
    shutil.copy(star / "image_0001.jpg", star / "image_0009.jpg")
    more = "--batch-size 8 --stride 4 --train-size 64 --test-size 96 --lr 1e-4 --epochs 2 "
    more += "--augment crop,flip,color --precision fp32"
    return ["--data", str(folder), "--cache", str(folder / "cache"), *more.split()]


@pytest.fixture(scope="module")
def unbroken(odd_flags, tmp_path_factory) -> Path:
    """A folder in which two processes have trained two epochs."""
    folder = tmp_path_factory.mktemp("unbroken")
    pair("train", *odd_flags, folder=folder, before=(count_decoded, count_decoded))
    return folder


def test_the_images_are_decoded_once_and_one_process_speaks_and_saves(unbroken):
    assert (unbroken / "decoded").read_bytes() == b"." * 81
    first, second = sorted(len(path.read_text()) for path in unbroken.glob("stdout.*"))
    assert (first, bool(second)) == (0, True)
    assert len([*unbroken.glob("runs/*/train/events*")]) == 1
    assert {path.name for path in unbroken.glob("*.pth*")} == {"alexnet.pth", "alexnet.last.pth"}


def test_two_processes_train_as_one_does(odd_flags, tmp_path):
    # Adam divides a gradient by its size: where that is near zero, rounding is all that is left.
    # At 64 pixels 0.5 % of the weights have such gradients, and differ by up to 4e-4; at 96 none.
    flags = [*odd_flags, "--dropout", 0, "--epochs", 1, "--init", "he", "--augment", "none"]
    flags += ["--train-size", 96, "--ema", 0.9]
    for name, start in (("one", run), ("two", pair)):
        (tmp_path / name).mkdir()
        start("train", *flags, folder=tmp_path / name)
    for name in ("alexnet.pth", "alexnet.last.pth"):
        assert difference(tmp_path / "one", tmp_path / "two", name) < 1e-5
    one, two = (model.load(tmp_path / name / "alexnet.last.pth") for name in ("one", "two"))
    for figure in ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy"):
        assert two["history"][0][figure] == pytest.approx(one["history"][0][figure], rel=1e-4)


@thorough
def test_two_processes_test_as_one_does(unbroken, tmp_path):
    argv = ["--ckpt", unbroken / "alexnet.pth", "--logdir", "runs", "--json"]
    one = json.loads(run("test", *argv, folder=tmp_path).stdout)
    shutil.rmtree(tmp_path / "runs")
    first, second = pair("test", *argv, folder=tmp_path)
    assert second.stdout == ""
    two = json.loads(first.stdout)
    for figure, tolerance in (("loss", 1e-5), ("calibration_error", 1e-3)):
        assert one.pop(figure) == pytest.approx(two.pop(figure), rel=tolerance)
    assert one == two
    assert len(list((tmp_path / "runs").rglob("events.*"))) == 1


# ------------------------------------------------------------------------- interrupted and killed


@pytest.mark.parametrize("rank", [pytest.param(0, marks=thorough), 1])
def test_a_signal_to_one_process_saves_once_and_the_run_goes_on(
    odd_flags, unbroken, tmp_path, rank
):
    before = [None, None]
    before[rank] = partial(after_step, 12, send, signal.SIGTERM)
    first, second = pair("train", *odd_flags, folder=tmp_path, before=before, status=(143, 143))
    assert "interrupted; continue with: python train.py --resume" in one_line(first)
    assert second.stderr == ""
    last = model.load(tmp_path / "alexnet.last.pth")
    assert (last["epoch"], last["step"]) == (1, 3)
    one = shutil.copytree(tmp_path, tmp_path / "one")
    pair("train", "--resume", folder=tmp_path)
    assert difference(tmp_path, unbroken) == difference(tmp_path, unbroken, "alexnet.pth") == 0
    run("train", "--resume", folder=one)  # a single process can continue, with other dropout
    assert model.load(one / "alexnet.last.pth")["history"][0] == last["history"][0]
    assert difference(one, unbroken) > 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(("step", "epoch"), [pytest.param(5, 0, marks=thorough), (13, 1)])
def test_restarted_workers_go_on_from_the_last_save_of_this_launch(
    odd_flags, unbroken, tmp_path, step, epoch
):
    earlier = model.load(unbroken / "alexnet.last.pth")  # as if of a run with the same arguments
    earlier["state_dict"] = {name: 0 * tensor for name, tensor in earlier["state_dict"].items()}
    model.save({**earlier, "job": "an earlier launch"}, tmp_path / "alexnet.last.pth")
    launch = {"folder": tmp_path, "TORCHELASTIC_RUN_ID": "this launch"}
    before = (save_each_epoch, partial(save_and_die, step))
    first, _ = pair("train", *odd_flags, before=before, status=(1, 137), **launch)
    assert "another process was lost" in one_line(first)
    first, _ = pair("train", *odd_flags, TORCHELASTIC_RESTART_COUNT="1", **launch)
    assert ("continuing after epoch 1, step 0 of 9" in first.stdout) == bool(epoch)
    assert difference(tmp_path, unbroken) == difference(tmp_path, unbroken, "alexnet.pth") == 0


@thorough
def test_torchrun_restarts_killed_workers_and_the_run_ends_as_an_unbroken_one(
    odd_flags, unbroken, tmp_path
):
    shutil.copy(unbroken / "alexnet.last.pth", tmp_path)
    options = ["--max-restarts=3"]
    # killed in the first epoch, then in the second
    output, _ = torchrun(*odd_flags, folder=tmp_path, options=options, KILL="5,13")
    assert difference(tmp_path, unbroken) == 0
    assert output.count("epoch 1/2") == output.count("epoch 2/2") == 1


def test_a_restart_that_cannot_know_its_launch_does_not_begin_anew(trained, monkeypatch):
    monkeypatch.chdir(trained)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's own default
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(model.CheckpointError, match="or use --resume"):
        train.parse(["--ckpt", "alexnet.pth"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert train.parse(["--ckpt", "alexnet.pth"])[1] is None


def test_processes_at_different_steps_do_not_train_together(odd_flags, unbroken, tmp_path):
    launch = {"folder": tmp_path, "TORCHELASTIC_RUN_ID": "this launch"}
    earlier = model.load(unbroken / "alexnet.last.pth")
    model.save({**earlier, "job": "this launch"}, tmp_path / "alexnet.last.pth")
    restarted = partial(join, {"TORCHELASTIC_RESTART_COUNT": "1"}, None)  # on one machine alone
    argv = [*odd_flags, "--epochs", 3]
    _, second = pair("train", *argv, before=(restarted, None), status=(1, 1), **launch)
    assert "other processes are further in this run" in one_line(second)
    assert model.load(tmp_path / "alexnet.last.pth")["epoch"] == earlier["epoch"]


# ------------------------------------------------------------------------------------------ errors


def test_pytorch_may_be_built_without_distributed(monkeypatch):
    monkeypatch.setattr(train.dist, "is_available", lambda: False)
    for name in ("is_initialized", "DistError"):
        monkeypatch.delattr(train.dist, name)
    train.leave_group()
    with pytest.raises(RuntimeError, match="about gloo"):
        train.explain(RuntimeError("about gloo"))
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60, dtype=torch.uint8)
    assert "out of memory" in train.explain(failed.value)
    assert "not built for this GPU" in train.explain(RuntimeError("CUDA error: no kernel image"))


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--batch-size", 7], 1, "--batch-size must be a multiple of 2 processes"),
        pytest.param(["--device", "cuda:1"], 1, "cuda:1 for 2 processes", marks=thorough),
    ],
)
def test_what_two_processes_cannot_do_is_one_line(
    odd_flags, unbroken, argv, status, words, tmp_path
):
    first, _ = pair("train", *odd_flags, *argv, folder=tmp_path, status=(status, status))
    assert words in one_line(first)


def test_a_missing_variable_is_one_line(odd_flags, tmp_path):
    before = partial(join, {"RANK": "0", "WORLD_SIZE": "2"}, None)
    failed = run("train", *odd_flags, folder=tmp_path, before=before, status=1)
    assert "WORLD_SIZE is 2, but" in one_line(failed)
    assert "MASTER_ADDR" in failed.stderr


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("RANK", "1", "RANK is 1, but must be below WORLD_SIZE, which is 1"),
        ("RANK", "one", "RANK is 'one', but must be a number"),
        ("WORLD_SIZE", "-2", "WORLD_SIZE is '-2', but must be a number"),
    ],
)
def test_a_wrong_variable_is_one_line(odd_flags, tmp_path, variable, value, words):
    before = partial(join, {variable: value}, None)
    failed = run("train", *odd_flags, folder=tmp_path, before=before, status=1)
    assert words in one_line(failed)


@thorough
@pytest.mark.parametrize("argv", [["--epoch", 2], ["--data", "damaged"], ["--batch-size", 7]])
def test_torchrun_ends_all_processes_after_one_message(odd_flags, photos, tmp_path, argv):
    damaged = shutil.copytree(photos, tmp_path / "damaged") / "101_ObjectCategories" / "bar"
    (damaged / "image_0001.jpg").write_bytes(b"no image")
    _, messages = torchrun(*odd_flags, *argv, folder=tmp_path, status=1)
    (message,) = messages
    assert any(words in message for words in ("--epochs?", "image_0001.jpg", "multiple of 2"))
