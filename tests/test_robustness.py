"""Runs that are interrupted, killed, starved of disk or memory, or resumed in another place."""

import csv
import filecmp
import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import (
    Command,
    after_step,
    lose_privileges,
    one_line,
    run,
    same,
    save_each_epoch,
    score_as,
    send,
    thorough,
)

import data
import model
import train

resource = pytest.importorskip("resource", reason="full disks are imitated by limits of Unix")

STRONG = ["--recipe", "strong", "--epochs", "3", "--repeats", "2", "--train-size", "64-96"]
KILLS = 12 if "THOROUGH" in os.environ else 4  # for each recipe

# ------------------------------------------- what happens inside a command: passed as `before`


def at_validation(action, *args) -> None:
    evaluate = train.evaluate

    def eventful(*arguments, **options):
        action(*args)
        return evaluate(*arguments, **options)

    train.evaluate = eventful


def at_image(number: int, action, *args) -> None:
    decode, count = data.decode, itertools.count(1)

    def eventful(file):
        if next(count) == number:
            action(*args)
        return decode(file)

    data.decode = eventful


def kill_at_event(number: int) -> None:
    """Die between two changes of the run's state or of its files, which it saves each epoch."""
    save_each_epoch()
    count = itertools.count(1)

    def tick(function):
        def eventful(*arguments, **options):
            if next(count) == number:
                send(signal.SIGKILL)
            return function(*arguments, **options)

        return eventful

    train.Trainer.train_step, train.evaluate = map(tick, (train.Trainer.train_step, train.evaluate))
    os.fsync, os.replace, torch.save = map(tick, (os.fsync, os.replace, torch.save))


def read_by_another(name: str) -> None:
    """Let the first attempt to replace that file fail, as on Windows while a program reads it."""
    replace, count = os.replace, itertools.count(1)

    def eventful(source, target):
        if str(target).endswith(name) and next(count) == 1:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    os.replace = eventful


def kill_between_the_files(save: int, accuracies: list[float]) -> None:
    """Die in a save of that number, when the best file is written and the last file is not."""
    save_each_epoch()
    score_as(accuracies)
    replace, count = os.replace, itertools.count(1)

    def eventful(source, target):
        if str(target).endswith(".last.pth") and next(count) == save:
            send(signal.SIGKILL)
        replace(source, target)

    os.replace = eventful


def hurry(factor: float, step: int) -> None:
    """Let the clock run fast, and die in a step."""
    clock = time.perf_counter
    train.time.perf_counter = lambda: factor * clock()
    after_step(step, send, signal.SIGKILL)


def poison(step: int) -> None:
    """Let a step break the weights."""
    train_step, count = train.Trainer.train_step, itertools.count(1)

    def eventful(trainer, *batch):
        train_step(trainer, *batch)
        if next(count) == step:
            with torch.no_grad():
                trainer.network.features[0].weight.fill_(torch.inf)

    train.Trainer.train_step = eventful


def limit_files(size: int, then=(), *args) -> None:
    """Let every write beyond `size` bytes of a file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if then:
        then(*args)


def report_little_space() -> None:
    shutil.disk_usage = lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6)


def interrupt_twice() -> None:
    send(signal.SIGINT)
    send(signal.SIGINT)


def hang_up_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    after_step(3, send, signal.SIGHUP)


def close_output() -> None:
    """Let nobody read what the process prints from now on, as `| head -1` does."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd more.")


def wait_for_file(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.01)


# ------------------------------------------------------------------------------ comparing runs


def outcome(folder: Path) -> dict:
    """Return what a run leaves that depends neither on its time nor on its command."""
    best, last = (model.load(folder / f"alexnet{name}.pth") for name in ("", ".last"))
    with open(next(folder.glob("runs/*/history.csv"))) as file:
        table = list(csv.DictReader(file))
    for row in (*last["history"], *table):
        assert all(float(row.pop(name)) > 0 for name in ("images_per_second", "seconds"))
    for checkpoint in (best, last):
        for name in ("args", "run", "command", "versions"):
            del checkpoint[name]
    del last["seconds"]
    return {"best": best, "last": last, "table": table}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.glob("*.pth"))}


def leftovers(folder: Path) -> list[Path]:
    return [*folder.rglob("*.tmp"), *folder.rglob("*.lock")]


@pytest.fixture(scope="module")
def trained_strong(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained_strong")
    run("train", *flags, *STRONG, folder=folder)
    return folder


@pytest.fixture(params=[pytest.param("report", marks=thorough), "strong"])
def recipe(request, flags, trained, trained_strong) -> tuple[list[str], dict]:
    """The flags of a run of three epochs, and what it leaves when nothing breaks it."""
    if request.param == "strong":
        return [*flags, *STRONG], outcome(trained_strong)
    return [*flags, "--epochs", "3"], outcome(trained)


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A folder in which a run of three epochs has ended, to spoil."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture(scope="session")
def first_epoch(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first_epoch")
    run("train", *flags, "--epochs", 1, folder=folder)
    return folder


@pytest.fixture
def one_epoch(first_epoch, tmp_path) -> Path:
    """A folder in which a run of one epoch has ended, to continue."""
    return shutil.copytree(first_epoch, tmp_path / "one")


# -------------------------------------------------------------------------- twice the same bits


@thorough
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_same_seed_gives_the_same_bits_in_every_precision(flags, tmp_path, precision):
    argv = [*flags, "--epochs", 1] if precision == "fp16" else [*flags, *STRONG]  # slow on CPUs
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        run("train", *argv, "--precision", precision, folder=tmp_path / name)
    assert same(outcome(tmp_path / "first"), outcome(tmp_path / "second"))


# ---------------------------------------------------------------------------------- interrupted


def test_a_run_interrupted_at_any_step_goes_on_bit_for_bit(recipe, tmp_path):
    flags, unbroken = recipe
    steps = 8 if "strong" not in flags else 16
    for before, status, place in (
        (partial(after_step, 1, send, signal.SIGTERM), 143, (0, 1)),
        (partial(after_step, steps - 1, send, signal.SIGINT), 130, (0, steps)),
        (partial(at_validation, send, signal.SIGTERM), 143, (0, steps)),
        (partial(after_step, steps // 2, send, signal.SIGINT), 130, (1, steps // 2)),
        (partial(after_step, steps + steps // 2, send, signal.SIGHUP), 129, (2, steps)),
    ):
        stopped = run("train", *flags, folder=tmp_path, before=before, status=status)
        assert one_line(stopped).endswith("interrupted; continue with: python train.py --resume\n")
        last = model.load(tmp_path / "alexnet.last.pth")
        assert (last["epoch"], last["step"]) == place
        assert not leftovers(tmp_path)
        flags = ["--resume"]
    run("train", *flags, folder=tmp_path)
    assert same(outcome(tmp_path), unbroken)


def test_a_name_is_that_of_the_checkpoint_and_the_advice_names_it(flags, tmp_path):
    argv, stop = ["--epochs", 2, "--name", "net"], partial(after_step, 9, send, signal.SIGINT)
    stopped = run("train", *flags, *argv, folder=tmp_path, before=stop, status=130)
    assert one_line(stopped).endswith("--resume --ckpt net.pth\n")
    assert {path.name for path in tmp_path.glob("*.pth")} == {"net.pth", "net.last.pth"}
    run("train", "--name", "net", "--resume", folder=tmp_path)
    assert model.load(tmp_path / "net.last.pth")["epoch"] == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["net"]


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=thorough)])
def test_an_interruption_while_images_are_decoded_leaves_nothing(flags, tmp_path, signum):
    argv, before = [*flags, "--cache", tmp_path / "cache"], partial(at_image, 10, send, signum)
    stopped = Command("train", *argv, folder=tmp_path, before=before)
    assert stopped.wait() == 128 + signum
    if signum == signal.SIGINT:
        assert one_line(stopped) == "train.py: interrupted\n"
        assert not list((tmp_path / "cache").iterdir())
    assert not list(tmp_path.glob("*.pth"))
    assert not (tmp_path / "runs").exists()


def test_an_earlier_runs_checkpoints_outlive_less_than_an_epoch(copy, flags):
    kept, stop = contents(copy), partial(after_step, 3, send, signal.SIGINT)
    argv = [*flags, "--seed", 1, "--epochs", 2]
    stopped = run("train", *argv, folder=copy, before=stop, status=130)
    assert "alexnet.pth is of an earlier run, which this one replaces" in stopped.stdout
    assert "the earlier run's checkpoints are kept" in one_line(stopped)
    assert contents(copy) == kept
    stop = partial(after_step, 9, send, signal.SIGINT)
    run("train", *argv, folder=copy, before=stop, status=130)
    assert {model.load(copy / f"alexnet{name}.pth")["seed"] for name in ("", ".last")} == {1}


def test_a_second_ctrl_c_ends_the_program_at_once(flags, tmp_path):
    run(
        "train", *flags, folder=tmp_path, before=partial(after_step, 3, interrupt_twice), status=130
    )
    assert not list(tmp_path.glob("*.pth"))


def test_a_closed_terminal_does_not_end_a_run_under_nohup(flags, tmp_path):
    run("train", *flags, "--epochs", 1, folder=tmp_path, before=hang_up_under_nohup)
    assert model.load(tmp_path / "alexnet.last.pth")["epoch"] == 1


# --------------------------------------------------------------------------------------- killed


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(recipe, tmp_path):
    flags, unbroken = recipe
    last, rng, kills, written = tmp_path / "alexnet.last.pth", random.Random(0), 0, 0
    while kills < KILLS or not written:
        before = partial(kill_at_event, rng.randint(2, 20 if "strong" not in flags else 28))
        argv = ["--resume"] if last.exists() else flags
        command = Command("train", *argv, folder=tmp_path, before=before)
        assert command.wait() in (0, 137), command.stderr
        kills += command.process.exitcode != 0
        written += last.exists()
        if last.exists():  # the best of its epochs is always on disk
            assert train.saved_best(str(tmp_path / "alexnet.pth"), model.load(last))
        if command.process.exitcode == 0:
            assert same(outcome(tmp_path), unbroken)
            last.unlink()
        if not last.exists():
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    run("train", *(["--resume"] if last.exists() else flags), folder=tmp_path)
    assert same(outcome(tmp_path), unbroken)
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob("*.lock"))


def test_a_run_killed_long_after_its_last_save_goes_on_bit_for_bit(flags, trained, tmp_path):
    argv = [*flags, "--epochs", 3]
    run("train", *argv, folder=tmp_path, before=partial(hurry, 100, 22), status=137)
    assert model.load(tmp_path / "alexnet.last.pth")["epoch"] in (1, 2)  # saving follows its rule
    run("train", "--resume", folder=tmp_path)
    assert same(outcome(tmp_path), outcome(trained))


def test_a_run_killed_between_its_two_files_keeps_the_best(flags, tmp_path):
    argv, before = [*flags, "--epochs", 3], partial(kill_between_the_files, 2, [30.0, 50.0])
    run("train", *argv, folder=tmp_path, before=before, status=137)
    best, last = (model.load(tmp_path / f"alexnet{name}.pth") for name in ("", ".last"))
    assert (best["epoch"], best["valid_accuracy"]) == (2, 50.0)
    assert (last["epoch"], last["valid_accuracy"]) == (1, 30.0)
    found = train.saved_best(str(tmp_path / "alexnet.pth"), last)  # what --resume takes as best
    assert (found["epoch"], found["valid_accuracy"]) == (2, 50.0)
    assert "epoch 2, valid accuracy 50.00 %" in run("test", folder=tmp_path).stdout
    resumed = run("train", "--resume", folder=tmp_path, before=partial(score_as, [50.0, 40.0]))
    assert "best: epoch 2, valid accuracy 50.00 %" in resumed.stdout
    assert "does not hold" not in resumed.stdout
    again = model.load(tmp_path / "alexnet.pth")
    assert same(again["state_dict"], best["state_dict"])
    assert again["epoch"] == 2
    summary = json.loads(next(tmp_path.glob("runs/*/summary.json")).read_text())
    assert (summary["epochs"], summary["best_epoch"], summary["best_accuracy"]) == (3, 2, 50.0)


# -------------------------------------------------------------------------------------- resumed


def test_more_epochs_later_are_as_good_as_more_epochs_at_once(flags, trained, tmp_path):
    run("train", *flags, "--epochs", 1, folder=tmp_path)
    run("train", "--resume", "--epochs", 3, folder=tmp_path)
    assert same(outcome(tmp_path), outcome(trained))


def test_resuming_a_finished_run_changes_nothing(copy, flags):
    kept = {path: path.read_bytes() for path in copy.rglob("*") if path.suffix in (".pth", ".csv")}
    argv = [*flags, "--epochs", 3, "--name", "run", "--ckpt", "alexnet.pth"]  # as it was begun
    assert "best: epoch" in run("train", *argv, "--resume", folder=copy).stdout
    assert len(kept) == 3
    assert all(path.read_bytes() == content for path, content in kept.items())


CONTRADICTIONS = """--batch-size 4/--lr 0.1/--seed 1/--recipe strong/--name other/--train-size 96
--epochs 2/--stride 2/--precision fp16/--ema 0.9/--init he/--test-size 64""".replace("\n", "/")


@pytest.mark.parametrize("argument", CONTRADICTIONS.split("/"))
def test_an_argument_that_contradicts_the_run_is_refused_by_name(
    trained, argument, monkeypatch, capsys
):
    monkeypatch.chdir(trained)
    argv = ["--resume", "--ckpt", "alexnet.pth"]
    assert train.parse(argv)[1]
    with pytest.raises(SystemExit):
        train.parse([*argv, *argument.split()])
    assert argument in capsys.readouterr().err


def test_a_run_goes_on_in_another_place(copy, photos, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "moved")
    argv = ["--data", moved, "--cache", tmp_path / "cache", "--logdir", "there", "--device", "cpu"]
    run("train", "--resume", "--epochs", 4, *argv, folder=copy)
    with open(copy / "there" / "run" / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]
    events = [file.read_bytes() for file in (copy / "there" / "run").glob("*/events*")]
    assert all(any(tag in content for content in events) for tag in (b"hparams", b"first_batch"))
    assert model.load(copy / "alexnet.last.pth")["args"]["data"] == str(moved)


@pytest.mark.parametrize("state", ["lost", "another split's", "another run's"])
def test_a_best_checkpoint_that_is_not_the_runs_is_not_called_so(copy, one_epoch, state):
    (copy / "alexnet.pth").unlink()
    if state != "lost":
        other = model.load(one_epoch / "alexnet.pth")
        changed = {"split": {}} if state == "another split's" else {"run": "runs/other"}
        best = {"epoch": 9, "valid_accuracy": 99.0, **changed}
        model.save(other | best, copy / "alexnet.pth")
    resumed = run("train", "--resume", "--logdir", "runs", folder=copy)
    assert "does not hold this run's best weights" in resumed.stdout
    assert "best: epoch" not in resumed.stdout
    assert "next: python test.py" not in resumed.stdout


def test_images_that_changed_since_are_named(copy, photos, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "moved")
    first, second, *_ = sorted(moved.rglob("*.jpg"))
    shutil.copy(second, first)
    argv = ["--ckpt", copy / "alexnet.pth", "--data", moved, "--cache", tmp_path / "cache"]
    failed = run("train", "--resume", *argv, folder=tmp_path, status=1)
    name = first.relative_to(moved / "101_ObjectCategories").as_posix()
    assert f"changed since the run began: 1 changed (such as '{name}')" in one_line(failed)


def as_version_1(folder: Path) -> None:
    """Turn the checkpoints in `folder` into those that the program wrote before version 2."""
    for path in folder.glob("*.pth"):
        checkpoint = model.load(path)
        for name in ("size", "mean", "std", "command", "checksums", "valid_loss"):
            del checkpoint[name]
        checkpoint["versions"] = {"format": 1, "python": "3.11.7", "torch": "2.14.1"}
        checkpoint["args"] |= {"resume": None, "compile": False, "bf16_gradients": False}
        if averaged := checkpoint.get("averaged"):
            averaged = {f"module.{name}": tensor for name, tensor in averaged.items()}
            checkpoint["averaged"] = {"n_averaged": torch.tensor(48), **averaged}
        torch.save(checkpoint, path)


@pytest.mark.parametrize("recipe", [pytest.param([], marks=thorough), STRONG])
def test_checkpoints_of_version_1_are_tested_and_resumed(flags, recipe, tmp_path):
    argv, stop = [*flags, *recipe, "--epochs", 2], partial(after_step, 12, send, signal.SIGTERM)
    run("train", *argv, folder=tmp_path, before=stop, status=143)
    new = shutil.copytree(tmp_path, tmp_path / "new")
    as_version_1(tmp_path)
    for folder in (tmp_path, new):
        run("train", "--resume", "--logdir", "runs", folder=folder)
    assert same(outcome(tmp_path), outcome(new))
    as_version_1(tmp_path)
    run("test", folder=tmp_path)


def test_training_begins_with_the_weights_of_a_file(trained, flags, tmp_path):
    source = model.load(trained / "alexnet.pth")["state_dict"]
    torch.save({f"module.{name}": tensor for name, tensor in source.items()}, tmp_path / "a.pth")
    argv = [*flags, "--epochs", 1, "--lr", 1e-12]
    assert "initial weights from" in run("train", *argv, "--init", "a.pth", folder=tmp_path).stdout
    found = model.load(tmp_path / "alexnet.pth")["state_dict"]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, source[name], rtol=0, atol=1e-9)
    run("train", "--resume", "--epochs", 2, folder=tmp_path)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    refused = run("train", *argv, "--init", "a.pth", folder=tmp_path, status=1)
    assert "a.pth: refused" in one_line(refused)


def test_images_that_the_initial_weights_have_seen_are_counted(trained, flags, tmp_path):
    source = model.load(trained / "alexnet.pth")
    argv = [*flags, "--epochs", 1, "--seed", 1, "--init", trained / "alexnet.pth"]
    begun = run("train", *argv, folder=tmp_path).stdout
    split = model.load(tmp_path / "alexnet.pth")["split"]
    known = [p for p in split["valid"] + split["test"] if p in source["split"]["train"]]
    assert f"was trained on {len(known)} of 16 validation and test images" in begun
    run("train", "--resume", "--epochs", 2, folder=tmp_path)
    known = [path for path in split["test"] if path in source["split"]["train"]]
    found = run("test", folder=tmp_path).stderr
    assert f"{len(known)} images, such as {known[0]!r}, were trained on" in found
    same_seed = run("train", *argv, "--seed", 0, "--name", "b", folder=tmp_path)
    assert "was trained on" not in same_seed.stdout


# --------------------------------------------------------------------------- damaged checkpoints


def test_a_truncated_checkpoint_is_refused(copy):
    path, rng = copy / "alexnet.pth", random.Random(0)
    size = path.stat().st_size
    for offset in sorted([size - 1, 1, 0, *(rng.randrange(size) for _ in range(47))], reverse=True):
        os.truncate(path, offset)
        with pytest.raises(model.CheckpointError):
            model.load(path)


def test_a_flipped_bit_is_noticed_or_harmless(copy):
    path, rng = copy / "alexnet.pth", random.Random(0)
    size, checkpoint, noticed = path.stat().st_size, model.load(path), 0
    places = [rng.randrange(size) for _ in range(20)]
    places += [rng.randrange(5_000) for _ in range(10)]  # the pickle
    places += [size - 1 - rng.randrange(5_000) for _ in range(20)]  # the directory of the archive
    content = bytearray(path.read_bytes())
    for place in places:
        bit = 1 << rng.randrange(8)
        content[place] ^= bit
        path.write_bytes(content)
        try:
            unharmed = same(model.load(path), checkpoint)
        except model.CheckpointError as error:
            unharmed = str(path) in str(error)
            noticed += 1
        assert unharmed, place
        content[place] ^= bit
    assert noticed > 20


# ---------------------------------------------------------------------------- disks and folders


@pytest.mark.parametrize(
    ("before", "words"),
    [
        pytest.param(partial(limit_files, 1_000_000), r"alexnet\..*pth", id="at a save"),
        pytest.param(partial(limit_files, 1000), "cannot be written|the log: ", id="at the log"),
        pytest.param(
            partial(limit_files, 1_000_000, send, signal.SIGTERM), "last.pth", id="at a signal"
        ),
    ],
)
def test_a_full_disk_is_one_line_and_keeps_the_old_files(one_epoch, before, words):
    kept = contents(one_epoch)
    argv, before = ["--epochs", 3, "--logdir", "runs"], partial(after_step, 3, before)
    failed = run("train", "--resume", *argv, folder=one_epoch, before=before, status=1)
    assert re.search(words, one_line(failed))
    assert contents(one_epoch) == kept
    assert not leftovers(one_epoch)


def test_too_little_space_is_noticed_before_training(flags, tmp_path):
    failed = run("train", *flags, folder=tmp_path, before=report_little_space, status=1)
    assert re.search(r"alexnet.pth: checkpoints need 8\d MB there; free some", one_line(failed))
    assert "epoch 1" not in failed.stdout
    assert not list(tmp_path.glob("*.pth*"))


@pytest.mark.parametrize(
    ("action", "words"),
    [
        pytest.param(partial(shutil.rmtree, "sub"), "sub/net.pth: cannot be written", id="ckpt"),
        pytest.param(partial(shutil.rmtree, "runs"), "runs/run", id="log", marks=thorough),
        pytest.param(partial(os.makedirs, "runs/run/history.csv/x"), "history.csv", id="csv"),
        pytest.param(close_output, "output: Broken pipe", id="output"),
    ],
)
def test_a_folder_that_fails_while_training_is_one_line(flags, tmp_path, action, words):
    argv = [*flags, "--epochs", 1, "--name", "run", "--ckpt", "sub/net.pth"]
    before = partial(after_step, 3, action)
    failed = run("train", *argv, folder=tmp_path, before=before, status=1)
    assert re.search(words, one_line(failed))
    assert not leftovers(tmp_path)
    if words == "history.csv":
        assert model.load(tmp_path / "sub" / "net.pth")["epoch"] == 1  # the best weights are safe


@pytest.mark.parametrize(
    "flag", ["--ckpt", *(pytest.param(flag, marks=thorough) for flag in ("--logdir", "--cache"))]
)
def test_a_read_only_folder_is_one_line(flags, tmp_path, flag):
    (tmp_path / "locked").mkdir(mode=0o500)
    argv = [*flags, flag, "locked/net.pth"]
    failed = run("train", *argv, folder=tmp_path, before=lose_privileges, status=1)
    assert re.search(r"locked/net.pth.*Permission denied", one_line(failed))


def test_a_second_run_on_a_checkpoint_is_refused_and_harms_nothing(flags, trained, tmp_path):
    argv = [*flags, "--epochs", 3]
    before = partial(after_step, 3, wait_for_file, "go")
    first = Command("train", *argv, folder=tmp_path, before=before)
    first.wait_for((tmp_path / "alexnet.pth.lock").exists)
    second = run("train", *argv, "--seed", 1, folder=tmp_path, status=1)
    assert "alexnet.pth: another run writes it now; give another --name" in one_line(second)
    assert (tmp_path / "alexnet.pth.lock").exists()
    (tmp_path / "go").touch()
    assert first.wait() == 0, first.stderr
    assert same(outcome(tmp_path), outcome(trained))
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert not leftovers(tmp_path)


# ------------------------------------------------------------------------------ numbers, memory


@pytest.mark.parametrize("step", [2, 8])
def test_a_loss_that_is_not_finite_keeps_the_best_weights(flags, tmp_path, step):
    argv = [*flags, "--epochs", 3]
    failed = run("train", *argv, folder=tmp_path, before=partial(poison, 8 + step), status=1)
    place = f"epoch 2, step {min(8, step + 1)}, at a learning rate of 0.001"  # of the next loss
    assert place in one_line(failed)
    best = model.load(tmp_path / "alexnet.pth")
    assert best["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in best["state_dict"].values())
    assert not (tmp_path / "alexnet.last.pth").exists()


@thorough
def test_a_loss_that_is_not_finite_in_the_first_epoch_saves_nothing(flags, tmp_path):
    failed = run("train", *flags, folder=tmp_path, before=partial(poison, 2), status=1)
    assert "epoch 1, step 3" in one_line(failed)
    assert not contents(tmp_path)


def test_too_little_memory_is_one_line_and_keeps_the_best_weights(flags, tmp_path):
    before = partial(after_step, 10, run_out_of_memory)
    failed = run("train", *flags, "--epochs", 3, folder=tmp_path, before=before, status=1)
    assert "out of memory; try half the --batch-size" in one_line(failed)
    assert model.load(tmp_path / "alexnet.pth")["epoch"] == 1


# ------------------------------------------------------------------------------- decoding, once


def assert_decoded(cache: Path, reference: Path) -> None:
    """Check that `cache` holds the images decoded once, as the session's cache does."""
    (pixels,), (about,) = cache.glob("*.uint8"), cache.glob("*.json")
    assert len([*cache.iterdir()]) == 2
    assert filecmp.cmp(pixels, reference / pixels.name, shallow=False)
    assert about.read_bytes() == (reference / about.name).read_bytes()


def test_two_processes_may_fill_one_cache_and_one_of_them_be_interrupted(
    flags, trained, cache, tmp_path
):
    argv, fresh = [*flags, "--epochs", 1, "--cache", tmp_path / "cache"], tmp_path / "cache"
    slow = partial(at_image, 70, wait_for_file, "go")
    others = [Command("train", *argv, "--name", n, folder=tmp_path, before=slow) for n in "ab"]
    others[0].wait_for(lambda: list(fresh.glob("*.tmp")))
    run("train", *argv, folder=tmp_path, before=partial(at_image, 5, send, 2), status=130)
    (tmp_path / "go").touch()
    assert [other.wait() for other in others] == [0, 0], [other.stderr for other in others]
    assert_decoded(fresh, cache)
    best = [model.load(tmp_path / f"{name}.pth")["state_dict"] for name in "ab"]
    assert same(*best)


@thorough
def test_a_killed_decoding_leaves_no_wrong_images(flags, trained, cache, tmp_path):
    argv, fresh = [*flags, "--epochs", 1, "--cache", tmp_path / "cache"], tmp_path / "cache"
    run("train", *argv, folder=tmp_path, before=partial(at_image, 70, send, 9), status=137)
    assert not list(fresh.glob("*.json"))
    run("train", *argv, folder=tmp_path)
    (pixels,) = fresh.glob("*.uint8")
    assert filecmp.cmp(pixels, cache / pixels.name, shallow=False)


@pytest.mark.parametrize("name", ["alexnet.pth", "history.csv"])
def test_a_file_that_another_program_reads_ends_no_run(flags, tmp_path, name):
    run("train", *flags, "--epochs", 2, folder=tmp_path, before=partial(read_by_another, name))
    assert model.load(tmp_path / "alexnet.last.pth")["epoch"] == 2
    assert model.load(tmp_path / "alexnet.pth")["epoch"] in (1, 2)
    (table,) = tmp_path.glob("runs/*/history.csv")
    assert len(table.read_text().splitlines()) == 3
    assert not leftovers(tmp_path)
