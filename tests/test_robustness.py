"""Runs that are interrupted, killed, starved of disk or memory, or resumed in another place."""

import csv
import filecmp
import itertools
import os
import random
import resource
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from commands import Command, one_line, run, thorough

import data
import model
import train

STRONG = ["--recipe", "strong", "--warmup-epochs", "1", "--train-size", "64-96"]
TIMINGS = ("images_per_second", "seconds")
KILLS = 10 if "THOROUGH" in os.environ else 5  # for each recipe
is_root = hasattr(os, "geteuid") and os.geteuid() == 0

# ------------------------------------------------- what happens inside a command: passed as `before`


def after_step(number: int, action, *args) -> None:
    step, count = train.Run.train_step, itertools.count(1)

    def eventful(self, *arguments):
        step(self, *arguments)
        if next(count) == number:
            action(*args)

    train.Run.train_step = eventful


def poison_after_step(number: int) -> None:
    step, count = train.Run.train_step, itertools.count(1)

    def eventful(self, *arguments):
        step(self, *arguments)
        if next(count) == number:
            torch.nn.utils.vector_to_parameters(
                torch.full((sum(p.numel() for p in self.network.parameters()),), torch.inf),
                self.network.parameters(),
            )

    train.Run.train_step = eventful


def without_compiler(cache: str) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    torch._inductor.config.cpp.cxx = (None, "missing")


def at_validation(action, *args) -> None:
    evaluate = train.evaluate

    def eventful(*arguments, **options):
        action(*args)
        return evaluate(*arguments, **options)

    train.evaluate = eventful


def at_picture(number: int, action, *args, pause: float = 0.0) -> None:
    decode, count = data.decode, itertools.count(1)

    def eventful(path):
        time.sleep(pause)
        if next(count) == number:
            action(*args)
        return decode(path)

    data.decode = eventful


def at_event(number: int, action) -> None:
    """Call `action` at one of the moments between which the state of the run, or of its files, changes."""
    count = itertools.count(1)

    def tick(function):
        def eventful(*arguments, **options):
            if next(count) == number:
                action()
            return function(*arguments, **options)

        return eventful

    train.Run.train_step, train.evaluate = tick(train.Run.train_step), tick(train.evaluate)
    os.fsync, os.replace, torch.save = tick(os.fsync), tick(os.replace), tick(torch.save)


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def kill_in(seconds: float) -> None:
    threading.Timer(seconds, send, [signal.SIGKILL]).start()


def interrupt_twice() -> None:
    send(signal.SIGINT)
    send(signal.SIGINT)


def limit_files(size: int) -> None:
    """Let every write beyond `size` bytes of a file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fill_disk_and_stop() -> None:
    limit_files(1_000_000)
    send(signal.SIGTERM)


def close_output() -> None:
    """Let nobody read what the process prints from now on, as `| head -1` does."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd more lines.")


# ----------------------------------------------------------------------------------- comparing runs


def same(first, second) -> bool:
    """Tell whether two checkpoints, or parts of them, are equal in every bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def outcome(folder: Path) -> dict:
    """Return all that a run has left that does not depend on the time it took or on its arguments."""
    last, best = (model.load(folder / name) for name in ("alexnet.last.pth", "alexnet.pth"))
    for row in last["history"]:
        assert all(row.pop(name) > 0 for name in TIMINGS)
    with open(max(folder.glob("runs/*/history.csv"), key=os.path.getmtime)) as file:
        table = [{name: row[name] for name in row if name not in TIMINGS} for row in csv.DictReader(file)]
    volatile = ("args", "run", "seconds", "versions")
    return {
        "table": table,
        "last": {name: value for name, value in last.items() if name not in volatile},
        "best": {name: value for name, value in best.items() if name not in volatile},
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.glob("*.pth"))}


def leftovers(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*.tmp")]


@pytest.fixture(scope="module")
def trained_strong(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained_strong")
    run("train", *flags, *STRONG, "--epochs", 3, "--name", "run", folder=folder)
    return folder


@pytest.fixture(params=["report", "strong"])
def recipe(request, flags, trained, trained_strong) -> tuple[list[str], dict]:
    """The flags of a run of three epochs, and what it leaves when nothing breaks it."""
    strong = request.param == "strong"
    return (
        [*flags, *(STRONG if strong else []), "--epochs", "3", "--name", "run"],
        outcome(trained_strong if strong else trained),
    )


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A folder in which a run of three epochs has ended, to spoil."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture
def one_epoch(flags, tmp_path) -> Path:
    """A folder in which a run of one epoch has ended."""
    run("train", *flags, "--epochs", 1, "--name", "run", folder=tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------ twice the same


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=thorough)])
def test_the_same_seed_gives_the_same_bits_in_every_precision(flags, tmp_path, precision):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        run("train", *flags, *STRONG, "--epochs", 2, "--precision", precision, folder=tmp_path / folder)
    assert same(outcome(tmp_path / "first"), outcome(tmp_path / "second"))


# -------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize(
    ("before", "status"),
    [
        pytest.param(partial(after_step, 11, send, signal.SIGTERM), 143, id="SIGTERM in the second epoch"),
        pytest.param(partial(after_step, 1, send, signal.SIGINT), 130, id="SIGINT at the first step"),
        pytest.param(partial(after_step, 24, send, signal.SIGTERM), 143, id="SIGTERM at the last step"),
        pytest.param(partial(at_validation, send, signal.SIGINT), 130, id="SIGINT during validation"),
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(recipe, before, status, tmp_path):
    flags, unbroken = recipe
    stopped = run("train", *flags, folder=tmp_path, before=before, status=status)
    assert "go on with: python train.py --resume" in one_line(stopped)
    assert model.load(tmp_path / "alexnet.last.pth")["epoch"] < 3
    run("train", "--resume", folder=tmp_path)
    assert same(outcome(tmp_path), unbroken)
    assert not leftovers(tmp_path)


def test_the_advice_of_an_interrupted_run_names_its_checkpoint(flags, tmp_path):
    argv = [*flags, "--epochs", 1, "--ckpt", "sub/net.pth"]
    stopped = run("train", *argv, folder=tmp_path, before=partial(after_step, 1, send, signal.SIGINT), status=130)
    assert one_line(stopped).endswith("--resume --ckpt sub/net.pth\n")
    run("train", "--resume", "--ckpt", "sub/net.pth", folder=tmp_path)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_while_pictures_are_decoded_leaves_nothing(flags, tmp_path, signum, status):
    before = partial(at_picture, 10, send, signum)
    stopped = run("train", *flags, "--cache", tmp_path / "cache", folder=tmp_path, before=before, status=status)
    assert "no training was lost" in one_line(stopped)
    assert not list((tmp_path / "cache").iterdir())
    assert not list(tmp_path.glob("*.pth"))
    assert not (tmp_path / "runs").exists()


def test_an_interruption_before_a_resumed_run_trains_keeps_its_checkpoint(copy):
    before, kept = partial(at_picture, 10, send, signal.SIGINT), contents(copy)
    stopped = run("train", "--resume", "--cache", copy / "cache", folder=copy, before=before, status=130)
    assert "no training was lost" in one_line(stopped)
    assert contents(copy) == kept


def test_an_earlier_runs_checkpoints_outlive_less_than_an_epoch(copy, flags):
    kept, before = contents(copy), partial(after_step, 3, send, signal.SIGINT)
    stopped = run("train", *flags, "--seed", 1, "--epochs", 3, folder=copy, before=before, status=130)
    assert "alexnet.pth and alexnet.last.pth: an earlier run's" in stopped.stdout
    assert "not yet replaced" in one_line(stopped)
    assert contents(copy) == kept
    run("train", "--resume", folder=copy)


def test_a_second_ctrl_c_ends_the_program_at_once(flags, tmp_path):
    run("train", *flags, folder=tmp_path, before=partial(after_step, 3, interrupt_twice), status=130)
    assert not list(tmp_path.glob("*.pth"))


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(recipe, tmp_path):
    flags, unbroken = recipe
    last, rng, kills, halfway = tmp_path / "alexnet.last.pth", random.Random(len(flags)), 0, 0
    while kills < KILLS or (kills < 50 and not halfway):
        action = rng.choice([partial(send, signal.SIGKILL), partial(kill_in, rng.random() / 20)])
        before = partial(at_event, rng.randint(1, 20), action)
        command = Command("train", *(["--resume"] if last.exists() else flags), folder=tmp_path, before=before)
        status = command.wait()
        assert status in (0, 137), command.stderr
        kills += status == 137
        halfway += bool(leftovers(tmp_path))
        if status == 0:
            assert same(outcome(tmp_path), unbroken)
            last.unlink()
        if not last.exists():
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    run("train", *(["--resume"] if last.exists() else flags), folder=tmp_path)
    assert same(outcome(tmp_path), unbroken)
    assert halfway, "no file was being written at any of the kills: the test shows too little"
    assert not leftovers(tmp_path)


# ------------------------------------------------------------------------------------------ resumed


def test_more_epochs_later_are_as_good_as_more_epochs_at_once(one_epoch, trained):
    run("train", "--resume", "--epochs", 3, folder=one_epoch)
    assert same(outcome(one_epoch), outcome(trained))


def test_resuming_a_finished_run_changes_nothing(copy):
    files = {path: path.read_bytes() for path in copy.rglob("*") if path.suffix in (".pth", ".csv")}
    run("train", "--resume", folder=copy)
    assert len(files) == 3
    assert all(path.read_bytes() == content for path, content in files.items())


@pytest.mark.parametrize(
    "argument",
    ["--batch-size 4", "--lr 0.1", "--seed 1", "--recipe strong", "--name other", "--train-size 96", "--epochs 2"],
)
def test_an_argument_that_contradicts_the_run_is_refused_by_name(trained, argument):
    refused = run("train", "--resume", *argument.split(), folder=trained, status=2)
    assert argument in one_line(refused)


@pytest.mark.parametrize("resume", ["net.last", "net"])
def test_a_checkpoint_may_lack_a_suffix(copy, resume):
    (copy / "alexnet.pth").rename(copy / "net")
    (copy / "alexnet.last.pth").rename(copy / "net.last")
    resumed = run("train", "--resume", resume, "--ckpt", copy / "net", folder=copy)
    assert f"saved in {copy / 'net'}" in resumed.stdout


@pytest.mark.parametrize("state", ["lost", "another run's"])
def test_a_best_checkpoint_that_is_not_the_runs_is_not_called_so(copy, flags, state):
    (copy / "alexnet.pth").unlink()
    if state != "lost":
        run("train", *flags, "--seed", 1, "--epochs", 1, "--ckpt", "other.pth", folder=copy)
        (copy / "other.pth").rename(copy / "alexnet.pth")
    resumed = run("train", "--resume", folder=copy)
    assert "not the best of epochs 1 to 3" in resumed.stdout
    assert "no longer in alexnet.pth" in resumed.stdout
    assert "next: tensorboard" in resumed.stdout


def test_repeated_arguments_are_accepted(copy, flags):
    run("train", *flags, "--epochs", 3, "--name", "run", "--resume", folder=copy)


def test_a_run_goes_on_in_another_place(copy, photos, tmp_path):
    moved = shutil.copytree(photos, tmp_path / "moved")
    argv = ["--data", moved, "--cache", tmp_path / "cache", "--logdir", "elsewhere", "--device", "cpu"]
    run("train", "--resume", "--epochs", 4, *argv, folder=copy)
    with open(copy / "elsewhere" / "run" / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("change", ["removed", "replaced", "added"])
def test_images_that_changed_since_are_noticed(copy, photos, tmp_path, change):
    moved = shutil.copytree(photos, tmp_path / "moved")
    first, second, *_ = sorted(moved.rglob("*.jpg"))
    kept = contents(copy)
    if change == "removed":
        first.unlink()
    elif change == "added":
        shutil.copy(first, first.with_name("new.jpg"))
    else:
        assert first.stat().st_size != second.stat().st_size
        shutil.copy(second, first)
    argv = ["--data", moved, "--cache", tmp_path / "cache", "--epochs", 4]
    assert "images" in one_line(run("train", "--resume", *argv, folder=copy, status=1))
    assert contents(copy) == kept


# ------------------------------------------------------------------------------ damaged checkpoints


@pytest.fixture(scope="module")
def checkpoint(trained) -> dict:
    return model.load(trained / "alexnet.pth")


def is_refused_or_unharmed(path: Path, checkpoint: dict) -> bool:
    try:
        return same(model.load(path), checkpoint)
    except model.CheckpointError as error:
        return str(path) in str(error)


def test_a_truncated_checkpoint_is_refused(copy, checkpoint):
    path, rng = copy / "alexnet.pth", random.Random(0)
    size = path.stat().st_size
    for offset in sorted([size - 1, 1, 0, *(rng.randrange(size) for _ in range(47))], reverse=True):
        os.truncate(path, offset)
        with pytest.raises(model.CheckpointError):
            model.load(path)


def test_a_flipped_bit_is_noticed_or_harmless(copy, checkpoint):
    path, rng = copy / "alexnet.pth", random.Random(0)
    size = path.stat().st_size
    places = [rng.randrange(size) for _ in range(20)]
    places += [rng.randrange(5_000) for _ in range(10)]  # the pickle
    places += [size - 1 - rng.randrange(5_000) for _ in range(20)]  # the directory of the archive
    with open(path, "r+b", buffering=0) as file:
        for place in places:
            file.seek(place)
            byte = file.read(1)[0]
            for value in (byte ^ 1 << rng.randrange(8), byte):
                file.seek(place)
                file.write(bytes([value]))
                if value != byte:
                    assert is_refused_or_unharmed(path, checkpoint), place
    assert same(model.load(path), checkpoint)


# ----------------------------------------------------------------------------------- disk and memory


@pytest.mark.parametrize("size", [5_000_000, 20_000_000], ids=["for the best", "for the last"])
def test_too_little_room_for_a_checkpoint_is_noticed_before_training(flags, photos, tmp_path, size):
    failed = run("train", *flags, "--epochs", 1, folder=tmp_path, before=partial(limit_files, size), status=1)
    assert "make room or give another --ckpt" in one_line(failed)
    assert "epoch" not in failed.stdout
    assert not list(tmp_path.glob("*.pth*"))


@pytest.mark.parametrize("size", [10_000, 1_000_000], ids=["for the log", "for a checkpoint"])
def test_a_disk_that_fills_up_spoils_nothing(one_epoch, trained, size):
    kept, before = contents(one_epoch), partial(after_step, 3, limit_files, size)
    failed = run("train", "--resume", "--epochs", 3, folder=one_epoch, before=before, status=1)
    assert str(one_epoch / "runs") in one_line(failed) or "alexnet" in failed.stderr
    assert contents(one_epoch) == kept
    assert not leftovers(one_epoch)
    run("train", "--resume", "--epochs", 3, folder=one_epoch)
    assert same(outcome(one_epoch), outcome(trained))


def test_a_full_disk_at_an_interruption_spoils_nothing(one_epoch):
    kept, before = contents(one_epoch), partial(after_step, 3, fill_disk_and_stop)
    failed = run("train", "--resume", "--epochs", 3, folder=one_epoch, before=before, status=1)
    assert "alexnet.last.pth" in one_line(failed)
    assert contents(one_epoch) == kept
    assert not leftovers(one_epoch)


def test_a_checkpoint_folder_that_vanishes_is_one_line(flags, tmp_path):
    before = partial(after_step, 3, shutil.rmtree, "sub")
    argv = [*flags, "--epochs", 1, "--ckpt", "sub/net.pth"]
    assert "sub/net.pth" in one_line(run("train", *argv, folder=tmp_path, before=before, status=1))


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(partial(after_step, 3, shutil.rmtree, "runs"), id="vanishes"),
        pytest.param(partial(after_step, 3, os.makedirs, "runs/run/history.csv/x"), id="takes no history.csv"),
    ],
)
def test_a_log_folder_that_fails_is_one_line(flags, tmp_path, before):
    argv = [*flags, "--epochs", 1, "--name", "run"]
    failed = run("train", *argv, folder=tmp_path, before=before, status=1)
    assert "the log can't be written" in one_line(failed)
    assert not leftovers(tmp_path)


def test_output_that_nobody_reads_is_not_blamed_on_the_log(flags, tmp_path):
    before = partial(after_step, 3, close_output)
    assert "output: Broken pipe" in one_line(run("train", *flags, folder=tmp_path, before=before, status=1))


def test_a_log_folder_that_is_a_file_is_one_line(flags, tmp_path):
    (tmp_path / "runs").write_text("mine")
    assert str(tmp_path / "runs") in one_line(run("train", *flags, folder=tmp_path, status=1))
    assert (tmp_path / "runs").read_text() == "mine"


@pytest.mark.skipif(is_root, reason="no folder is read-only to root")
@pytest.mark.parametrize("flag", ["--ckpt", "--logdir", "--cache"])
def test_a_read_only_folder_is_one_line(flags, tmp_path, flag):
    (tmp_path / "locked").mkdir(mode=0o500)
    failed = run("train", *flags, flag, "locked/alexnet.pth", folder=tmp_path, status=1)
    assert "locked" in one_line(failed)


# ---------------------------------------------------------------------------------- numbers, memory


def test_a_loss_that_is_not_finite_names_epoch_step_and_rate(one_epoch):
    kept, before = contents(one_epoch), partial(poison_after_step, 2)
    failed = run("train", "--resume", "--epochs", 2, folder=one_epoch, before=before, status=1)
    error = one_line(failed)
    assert "epoch 2, step 3" in error
    assert "0.001" in error
    assert "the best checkpoint is kept" in error
    assert contents(one_epoch) == kept


def test_a_loss_that_is_not_finite_in_the_first_epoch_promises_no_checkpoint(flags, tmp_path):
    failed = run("train", *flags, folder=tmp_path, before=partial(poison_after_step, 2), status=1)
    assert "epoch 1, step 3" in one_line(failed)
    assert "kept" not in failed.stderr
    assert not contents(tmp_path)


def test_weights_that_break_in_the_last_step_are_not_called_a_result(one_epoch):
    kept, before = contents(one_epoch), partial(poison_after_step, 8)
    failed = run("train", "--resume", "--epochs", 2, folder=one_epoch, before=before, status=1)
    assert "not finite" in one_line(failed)
    assert contents(one_epoch) == kept


def test_too_little_memory_names_the_batch_size(flags, tmp_path):
    before = partial(after_step, 2, run_out_of_memory)
    assert "--batch-size" in one_line(run("train", *flags, folder=tmp_path, before=before, status=1))


def test_compile_without_a_compiler_says_to_leave_it_out(flags, tmp_path):
    before = partial(without_compiler, str(tmp_path))
    failed = run("train", *flags, "--compile", folder=tmp_path, before=before, status=1)
    assert failed.stderr.endswith("; leave it out\n")
    assert "Traceback" not in failed.stderr


@thorough
def test_a_compiled_run_can_be_tested(flags, tmp_path):
    run("train", *flags, "--compile", "--epochs", 1, folder=tmp_path)
    run("test", folder=tmp_path)


# ------------------------------------------------------------------------------------ decoding, once


def decoded(folder: Path) -> Path:
    """Return the one file in a cache."""
    (file,) = folder.iterdir()
    assert file.suffix == ".uint8"
    return file


def assert_equal_in(file: Path, cache: Path) -> None:
    """Check a decoded file against that of the session's cache, which has the same name."""
    assert filecmp.cmp(file, cache / file.name, shallow=False)


def test_two_processes_may_fill_one_cache_at_once(flags, trained, cache, tmp_path):
    folders, argv = [tmp_path / "1", tmp_path / "2"], [*flags, "--epochs", 1, "--cache", tmp_path / "cache"]
    for folder in folders:
        folder.mkdir()
    slow = partial(at_picture, 0, send, 0, pause=0.005)
    commands = [Command("train", *argv, folder=folder, before=slow) for folder in folders]
    assert [command.wait() for command in commands] == [0, 0], [command.stderr for command in commands]
    assert same(*map(outcome, folders))
    assert_equal_in(decoded(tmp_path / "cache"), cache)


def test_a_process_may_be_interrupted_while_another_fills_the_same_cache(flags, trained, cache, tmp_path):
    argv = [*flags, "--epochs", 1, "--cache", tmp_path / "cache"]
    slow = partial(at_picture, 0, send, 0, pause=0.02)
    other = Command("train", *argv, folder=tmp_path, before=slow)
    other.wait_for(lambda: list((tmp_path / "cache").glob("*.tmp")))
    run("train", *argv, folder=tmp_path, before=partial(at_picture, 5, send, signal.SIGINT), status=130)
    assert other.wait() == 0, other.stderr
    assert_equal_in(decoded(tmp_path / "cache"), cache)


def test_a_killed_decoding_leaves_no_wrong_pictures(flags, trained, cache, tmp_path):
    argv, fresh = [*flags, "--epochs", 1, "--cache", tmp_path / "cache"], tmp_path / "cache"
    run("train", *argv, folder=tmp_path, before=partial(at_picture, 70, send, signal.SIGKILL), status=137)
    assert not list(fresh.glob("*.uint8"))
    run("train", *argv, folder=tmp_path)
    assert_equal_in(decoded(fresh), cache)
