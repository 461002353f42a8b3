"""What a run computes, prints, logs and saves."""

import copy
import csv
import itertools
import json
import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import ablation
import pytest
import torch
import torch.nn.functional as F
from commands import after_step, run, same, score_as, send
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

import data
import model
import train

NAMES = ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy")


def events(folder: Path) -> EventAccumulator:
    everything = {"images": 0, "scalars": 0, "tensors": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def logged(folder: Path) -> dict:
    """Return all that the event files of a run hold, except times: tag -> [(step, value), ...]."""
    found = {}
    for name in ("train", "valid"):
        source = events(folder / name)
        for tag in source.Tags()["scalars"]:
            found[name, tag] = [(e.step, e.value) for e in source.Scalars(tag)]
        for tag in source.Tags()["images"]:
            found[name, tag] = [(e.step, e.encoded_image_string) for e in source.Images(tag)]
        for tag in source.Tags()["tensors"]:
            found[name, tag] = [e.step for e in source.Tensors(tag)]
    del found["train", "images_per_second"]
    return found


def history(folder: Path) -> list[dict]:
    with open(folder / "history.csv") as file:
        return list(csv.DictReader(file))


def quality(row: dict) -> tuple[float, float]:
    """Return what makes an epoch the best: at equal accuracy, the lower loss."""
    return float(row["valid_accuracy"]), -float(row["valid_loss"])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture
def make(flags, monkeypatch):
    """A function that returns the trainer of those flags, with narrow layers, in fp32."""
    monkeypatch.setattr(model, "HIDDEN", 16)

    def make(*more) -> train.Trainer:
        args, _ = train.parse([*flags, *map(str, more)])
        return train.build_trainer(args, None, train.Compute(torch.device("cpu"), torch.float32))[0]

    return make


def batch(trainer: train.Trainer, images: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs and labels of the first images of the epoch."""
    rows, changes = trainer.epoch_plan()
    return trainer.inputs(rows[:images], {name: c[:images] for name, c in changes.items()})


def test_a_run_is_resumed_on_a_device_of_another_kind(flags, monkeypatch):
    monkeypatch.setattr(model, "HIDDEN", 16)
    args, _ = train.parse(flags)
    fp16 = train.Compute(torch.device("cpu"), torch.float16)
    first, second = (train.build_trainer(args, None, fp16)[0] for _ in range(2))
    first.train_step(*batch(first), 8)
    state = copy.deepcopy(first.state_dict())
    state["optimizer"]["param_groups"][0]["fused"] = False  # as on a device without such kernels
    for moments in state["optimizer"]["state"].values():
        moments |= {name: tensor.contiguous() for name, tensor in moments.items()}  # as MPS has it
    second.load_state_dict(state)
    for trainer in (first, second):
        trainer.train_step(*batch(trainer), 8)
    assert same(first.network.state_dict(), second.network.state_dict())
    with pytest.raises(train.TrainingError, match="--lr or --precision fp32"):
        second.check_finite(float("nan"))


def test_weights_that_the_last_step_broke_are_not_saved(make):
    trainer = make()
    trainer.train_step(*batch(trainer), 8)  # its loss is finite
    trainer.network.features[0].bias.data.fill_(torch.inf)
    with pytest.raises(train.TrainingError, match="not finite in epoch 1, step 1"):
        trainer.state_dict()


def test_a_task_of_slurm_that_trains_alone_takes_a_gpu_that_it_sees(monkeypatch):
    monkeypatch.setenv("SLURM_LOCALID", "3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for seen, number in ((1, 0), (2, 1), (4, 3)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        assert train.set_up("cuda", "fp32").device == torch.device("cuda", number)


# -------------------------------------------------------------------------- cases worked by hand


def test_schedule_rises_evenly_then_falls_as_half_a_cosine():
    args = SimpleNamespace(lr=0.1, schedule="cosine", warmup_epochs=2, epochs=10)
    rates = [train.learning_rate(args, progress) for progress in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.05, 0])
    args.schedule = "constant"
    assert train.learning_rate(args, 9.9) == 0.1


def test_train_size_grows_over_the_first_80_percent_of_the_epochs():
    args = SimpleNamespace(train_size="128-224", epochs=10)
    sizes = [train.train_size(args, epoch) for epoch in range(10)]
    assert sizes == [128, 128, 144, 160, 176, 192, 208, 224, 224, 224]
    args.train_size = "96"
    assert {train.train_size(args, epoch) for epoch in range(10)} == {96}
    args = SimpleNamespace(train_size="64-128", epochs=1)
    assert train.train_size(args, 0) == 128


@pytest.mark.parametrize(
    ("augment", "size", "expected"),
    [("none", "224", 224), ("flip", "80-128", 128), ("crop", "80-128", 144), ("crop", "224", 224)],
)
def test_test_size_makes_up_for_crops(augment, size, expected):
    args, _ = train.parse(["--augment", augment, "--train-size", size])
    assert args.test_size == expected


def test_averaged_weights_follow_the_recurrence_with_its_warm_up(make):
    trainer = make("--ema", 0.2, "--lr", 0.1)
    expected = trainer.network.classifier[-1].bias.detach().clone()
    for decay in (1 / 10, 2 / 11, 0.2, 0.2):  # (1 + t) / (10 + t), at most 0.2
        trainer.train_step(*batch(trainer), 8)
        expected = decay * expected + (1 - decay) * trainer.network.classifier[-1].bias.detach()
    torch.testing.assert_close(trainer.averaged.classifier[-1].bias.detach(), expected)
    assert trainer.evaluated is trainer.averaged


def test_initial_weights_are_those_that_the_flag_names(make):
    first = {name: make("--init", name).network.features[0] for name in train.INITS}
    assert first["default"].weight.std() < first["he"].weight.std()
    assert first["default"].bias.any()
    again = make("--init", "whiten", "--weight-decay", 0.5)
    assert torch.equal(again.network.features[0].weight, first["whiten"].weight)
    inputs, _ = batch(again, 64)
    outputs = first["whiten"](inputs).movedim(1, -1).flatten(0, -2)[:, :8]
    torch.testing.assert_close(outputs.T.cov(), torch.eye(8), rtol=0, atol=0.3)


def test_label_smoothing_and_logit_adjustment_change_the_gradient_not_the_shown_loss(make):
    trainer = make("--label-smoothing", 0.2, "--logit-adjustment", 2, "--dropout", 0)
    inputs, labels = batch(trainer)
    with torch.no_grad():
        logits = trainer.network(inputs)
    store = trainer.store
    prior = torch.bincount(store.labels[trainer.rows], minlength=10) / len(trainer.rows)
    target = 0.8 * F.one_hot(labels, 10) + 0.2 / 10
    expected = ((logits + 2 * prior.log()).softmax(1) - target).mean(0)  # of the last bias
    trainer.train_step(inputs, labels, 8)
    gradient = trainer.network.classifier[-1].bias.grad
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    hits = (logits.argmax(1) == labels).sum()
    shown = torch.stack([F.cross_entropy(logits, labels, reduction="sum"), hits, torch.tensor(8)])
    torch.testing.assert_close(trainer.sums, shown)


def test_cutmix_weighs_the_labels_by_the_area_of_each_image(make):
    trainer = make("--cutmix", 1, "--dropout", 0)
    inputs, labels = batch(trainer)
    rng = random.Random(data.seed_of("cutmix", 0, 0, 0))
    rng.random()  # has decided that this batch is mixed
    mixed, own = data.cutmix(inputs.clone(), rng)
    is_own, is_others = (mixed == inputs).all(1), (mixed == inputs.flip(0)).all(1)
    assert (is_own | is_others).all()
    assert is_own[0].float().mean() == pytest.approx(own, abs=0.01)
    assert 0.1 < own < 0.9
    labels_of_both = own * F.one_hot(labels, 10) + (1 - own) * F.one_hot(labels.flip(0), 10)
    with torch.no_grad():
        expected = (trainer.network(mixed).softmax(1) - labels_of_both).mean(0)  # of the last bias
    trainer.train_step(inputs, labels, 8)
    gradient = trainer.network.classifier[-1].bias.grad
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_weight_decay_is_decoupled(make):
    trainer = make("--weight-decay", 0.5)
    parameter = trainer.network.features[0].bias
    before = parameter.detach().clone()
    for each in trainer.network.parameters():
        each.grad = torch.zeros_like(each)
    trainer.optimizer.param_groups[0]["lr"] = 0.1
    trainer.optimizer.step()
    torch.testing.assert_close(parameter.detach(), before * (1 - 0.1 * 0.5))


def test_an_epoch_visits_each_image_as_often_as_repeats_says_in_an_order_of_its_own(make):
    trainer = make("--repeats", 2, "--augment", "flip,crop")
    rows, changes = trainer.epoch_plan()
    assert torch.equal(rows[::2], rows[1::2])  # in one batch
    assert sorted(rows[::2].tolist()) == sorted(trainer.rows.tolist())
    assert not torch.equal(changes["matrix"][::2], changes["matrix"][1::2])
    uniforms = data.draw_uniforms(["flip", "crop"], 128, 0, 0)
    table = data.find_changes(uniforms)["matrix"].view(64, 2, -1)
    by_row = dict(zip(trainer.rows.tolist(), table, strict=True))  # not by its place in the epoch
    found = changes["matrix"].view(64, 2, -1)
    assert all(
        torch.equal(by_row[row], u) for row, u in zip(rows[::2].tolist(), found, strict=True)
    )
    trainer.epoch = 1
    assert not torch.equal(trainer.epoch_plan()[0], rows)


@pytest.mark.parametrize("processes", [1, 6])  # of 6, two have no image in the last batch
def test_batches_augmented_together_are_those_augmented_alone(make, monkeypatch, processes):
    trainer = make("--augment", "crop,color,gray", "--batch-size", 12)
    alone = list(trainer.batches())
    assert [images for _, _, images in alone] == [12, 12, 12, 12, 12, 4]
    monkeypatch.setattr(train, "TOGETHER", {"cpu": 50})  # 4 batches
    inputs, read = trainer.inputs, []
    monkeypatch.setattr(trainer, "inputs", lambda *some: read.append(len(some[0])) or inputs(*some))
    for step, rank in itertools.product((0, 3, 4), range(processes)):
        trainer.step = step
        trainer.compute = replace(trainer.compute, rank=rank, world_size=processes)
        for one, other in zip(alone[step:], trainer.batches(), strict=True):
            assert torch.equal(one[0][rank::processes], other[0])
            assert torch.equal(one[1][rank::processes], other[1])
            assert one[2] == other[2]
    if processes == 1:  # the same groups, wherever the epoch is resumed
        assert read == [48, 16, 48, 16, 16]


def test_evaluation_gives_each_row_its_own_logits(make, monkeypatch):
    trainer = make()
    arguments = (trainer.network, trainer.store, trainer.rows, 64, trainer.compute)
    whole = train.evaluate(*arguments)
    monkeypatch.setattr(train, "EVAL_BATCH", 7)
    torch.testing.assert_close(train.evaluate(*arguments), whole)
    assert not torch.allclose(train.evaluate(*arguments, flip=True), whole)


def test_saving_takes_at_most_5_percent_of_the_time(make, monkeypatch, tmp_path):
    clock, saves = [0.0], []
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])

    def save_slowly(checkpoint, path):
        saves.append(Path(path).name)
        clock[0] += 8 if Path(path).stem == "net" else 30

    monkeypatch.setattr(train, "save", save_slowly)
    checkpoints = train.Checkpoints(make("--ckpt", tmp_path / "net.pth"), {}, None)
    estimate = checkpoints.seconds
    assert estimate == pytest.approx(
        4 * sum(p.nbytes for p in checkpoints.trainer.network.parameters()) / 1e8
    )
    for epoch in range(1, 301):
        clock[0] += 10
        row = {"epoch": epoch, "valid_accuracy": 60 - abs(200 - epoch) / 10, "valid_loss": 1.0}
        checkpoints.history.append(row)
        checkpoints.keep_best(row)
        checkpoints.save_if_due(last=False)
    spent = clock[0] - 3000
    assert 0.03 < spent / clock[0] < 0.05
    assert saves[:2] == ["net.pth", "net.last.pth"]  # in this order
    assert checkpoints.best["epoch"] == 200
    count = len(saves)
    checkpoints.save()
    assert saves[count:] == ["net.last.pth"]  # the best was on disk already


def test_of_epochs_with_equal_accuracy_the_lower_loss_is_the_best(make, tmp_path):
    checkpoints = train.Checkpoints(make("--ckpt", tmp_path / "net.pth"), {}, None)
    kept = []
    for epoch, (accuracy, loss) in enumerate([(40, 3), (40, 2), (40, 2), (30, 1), (50, 9)], 1):
        checkpoints.history.append({"epoch": epoch, "valid_accuracy": accuracy, "valid_loss": loss})
        kept.append(checkpoints.keep_best(checkpoints.history[-1]))
    assert kept == [True, True, False, False, True]
    saved = {"epoch": 9, "valid_accuracy": 50, "valid_loss": 1}  # by a process that was killed
    checkpoints.best = saved
    assert not checkpoints.keep_best({"epoch": 6, "valid_accuracy": 50, "valid_loss": 2})
    assert checkpoints.keep_best({"epoch": 9, "valid_accuracy": 50, "valid_loss": 1})


# ------------------------------------------------------------------------------- the command line


def test_checkpoints_are_plain_and_hold_what_testing_and_resuming_need(trained):
    best, last = (torch.load(trained / f"alexnet{n}.pth", weights_only=True) for n in ("", ".last"))
    about = (
        "classes stride seed size mean std args versions run command split fingerprint checksums "
        "seen"
    )
    assert best.keys() == {*about.split(), "epoch", "valid_accuracy", "valid_loss", "state_dict"}
    state = "averaged optimizer scaler step sums seconds history job"
    assert last.keys() == best.keys() | set(state.split())
    assert best["classes"] == sorted(data.SHAPES)
    assert (best["size"], best["mean"], best["std"]) == (96, data.MEAN, data.STD)
    assert best["command"].startswith("python train.py --data ")
    assert {tensor.dtype for tensor in best["state_dict"].values()} == {torch.float32}
    sizes = {name: len(paths) for name, paths in best["split"].items()}
    assert sizes == {"train": 64, "valid": 8, "test": 8}
    assert set().union(*best["split"].values()) == best["checksums"].keys()
    assert best["run"] == str(trained / "runs" / "run")
    top = max(history(trained / "runs" / "run"), key=quality)
    assert best["epoch"] == int(top["epoch"])
    assert best["valid_accuracy"] == last["valid_accuracy"] == float(top["valid_accuracy"])


def test_the_first_of_the_best_epochs_is_saved_and_logged_also_over_breaks(flags, tmp_path):
    argv, folder = ["--epochs", 2, "--name", "net"], tmp_path / "runs" / "net"

    def check(*best):
        checkpoint = model.load(tmp_path / "net.pth")
        assert (checkpoint["epoch"], checkpoint["valid_accuracy"]) == best
        for tag, value in (("accuracy", best[1]), ("loss", 1.0)):
            last = events(folder / "valid").Scalars(f"best_{tag}")[-1]  # what HPARAMS shows
            assert (last.step, last.value) == (best[0], value)
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["best_epoch"], summary["best_accuracy"]) == best

    run("train", *flags, *argv, folder=tmp_path, before=partial(score_as, [40.0, 50.0]))
    check(2, 50.0)
    for end, accuracies in ((4, [50.0, 45.0]), (6, [60.0, 60.0])):
        again = ["--name", "net", "--resume", "--epochs", end]
        before = partial(stop_and_score, 11, accuracies)
        run("train", *again, folder=tmp_path, before=before, status=143)
        run("train", *again, folder=tmp_path, before=partial(score_as, accuracies[1:]))
        check(*((2, 50.0) if end == 4 else (5, 60.0)))
    assert not same(weights(tmp_path / "net.pth"), weights(tmp_path / "net.last.pth"))


def stop_and_score(step: int, accuracies: list[float]) -> None:
    after_step(step, send, 15)
    score_as(accuracies)


def test_printed_lines_history_and_events_agree_to_the_printed_digit(trained):
    output, folder = next(trained.glob("stdout.*")).read_text(), trained / "runs" / "run"
    rows, lines = history(folder), re.findall(r"epoch \d/\d .*", output)
    columns = ["epoch", "learning_rate", *NAMES, "images_per_second", "seconds"]
    assert list(rows[0]) == columns
    for row, line in zip(rows, lines, strict=True):
        figures = {name: (*name.split("_"), 4 if "loss" in name else 2) for name in NAMES}
        figures["images_per_second"] = ("train", "images_per_second", 1)
        for name, (part, tag, digits) in figures.items():
            (event,) = [
                e for e in events(folder / part).Scalars(tag) if e.step == int(row["epoch"])
            ]
            assert f"{float(row[name]):.{digits}f}" == f"{event.value:.{digits}f}"
            assert f" {event.value:.{digits}f} " in line
        assert f"rate {float(row['learning_rate']):.3g} " in line
    best = max(range(3), key=lambda i: quality(rows[i]))
    assert lines[best].endswith("  best")
    assert (
        f"best: epoch {best + 1}, valid accuracy {float(rows[best]['valid_accuracy']):.2f} %"
        in output
    )
    assert "next: python test.py --ckpt alexnet.pth" in output
    assert "tensorboard --logdir runs" in output


def test_runs_in_tensorboard_are_train_and_valid_alone_with_shared_tags(trained):
    found = EventMultiplexer().AddRunsFromDirectory(str(trained / "runs")).Reload()
    assert found.Runs().keys() == {"run/train", "run/valid"}
    tags = {name: set(found.Runs()[f"run/{name}"]["scalars"]) for name in ("train", "valid")}
    assert tags["train"] == {"loss", "accuracy", "learning_rate", "images_per_second"}
    assert tags["valid"] == {"loss", "accuracy", "best_loss", "best_accuracy"}
    for name in ("train", "valid"):
        assert [event.step for event in found.Scalars(f"run/{name}", "loss")] == [1, 2, 3]
    assert found.Runs()["run/train"]["graph"]
    assert set(found.Runs()["run/train"]["images"]) == {"first_batch", "filters"}
    for tag in ("experiment", "session_start_info"):
        summary = found.SummaryMetadata("run/valid", f"_hparams_/{tag}")
        assert summary.plugin_data.plugin_name == "hparams"


def test_summary_says_what_the_run_is_and_found(trained):
    summary = json.loads((trained / "runs" / "run" / "summary.json").read_text())
    rows, best = history(trained / "runs" / "run"), model.load(trained / "alexnet.pth")
    assert summary["command"] == best["command"]
    assert summary["arguments"] == best["args"]
    assert summary["versions"] == train.VERSIONS
    assert summary["checkpoint"] == str(trained / "alexnet.pth")
    assert (summary["epochs"], summary["best_epoch"]) == (3, best["epoch"])
    assert summary["best_accuracy"] == best["valid_accuracy"]
    assert summary["seconds"] == pytest.approx(sum(float(row["seconds"]) for row in rows))


def test_a_run_resumed_twice_logs_what_an_unbroken_one_does(flags, trained, tmp_path):
    argv = ["--epochs", 3, "--name", "run"]
    stop = partial(after_step, 4, send, 15), partial(after_step, 9, send, 15)
    run("train", *flags, *argv, folder=tmp_path, before=stop[0], status=143)
    run("train", "--name", "run", "--resume", folder=tmp_path, before=stop[1], status=143)
    run("train", "--name", "run", "--resume", folder=tmp_path)
    unbroken, broken = logged(trained / "runs" / "run"), logged(tmp_path / "runs" / "run")
    assert unbroken.keys() == broken.keys()
    arguments = ("train", "run/text_summary")  # once more after each resumption
    assert (unbroken.pop(arguments)[0], broken.pop(arguments)) == (0, [0, 0, 1])
    for tag in unbroken:
        assert unbroken[tag] == broken[tag], tag


def tick(seconds_a_step: float, seconds_a_save: float) -> None:
    """Let the clock stand still except in training steps and in saves."""
    now, step, save = [0.0], train.Trainer.train_step, train.save

    def slow_step(*args):
        now[0] += seconds_a_step
        step(*args)

    def slow_save(*args):
        now[0] += seconds_a_save
        save(*args)

    train.Trainer.train_step, train.save = slow_step, slow_save
    train.time.perf_counter = lambda: now[0]


def test_a_file_gets_a_line_each_minute_and_an_epoch_the_time_of_saving(flags, tmp_path):
    argv = ["--epochs", 3, "--name", "run"]
    output = run("train", *flags, *argv, folder=tmp_path, before=partial(tick, 25, 30)).stdout
    lines = re.findall(r"epoch (\d)/3: (\d+) of 64 images, loss \d\.\d{4}, accuracy", output)
    assert lines == [(epoch, images) for epoch in "123" for images in ("24", "48")]
    # the first epoch is longer than 20 of the saves estimated, the others shorter than 20 real ones
    rows = history(tmp_path / "runs" / "run")
    assert [float(row["seconds"]) for row in rows] == [200, 260, 200]
    assert [float(row["images_per_second"]) for row in rows] == pytest.approx([64 / 200] * 3)
    assert "3 of 3 epochs trained, in 11:00;" in output


def test_the_seed_decides_the_run_and_a_second_run_gets_a_folder_of_its_own(
    flags, trained, tmp_path
):
    for seed, ckpt in ((0, "zero.pth"), (1, "one.pth")):
        argv = ["--epochs", 1, "--seed", seed, "--name", "same", "--ckpt", ckpt]
        run("train", *flags, *argv, folder=tmp_path)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"same", "same-2"}
    splits = [model.load(tmp_path / name)["split"] for name in ("zero.pth", "one.pth")]
    assert splits[0] == model.load(trained / "alexnet.pth")["split"] != splits[1]


def test_random_numbers_depend_on_the_seed_the_place_in_the_run_and_the_process(make, monkeypatch):
    first, second = make("--cutmix", 1), make("--cutmix", 1, "--seed", 1)
    initial = (trainer.network.features[0].weight for trainer in (first, second))
    assert not torch.equal(*initial)
    second.rows = first.rows  # whose split is another
    assert not torch.equal(first.epoch_plan()[0], second.epoch_plan()[0])

    keys = []
    monkeypatch.setattr(train, "seed_of", lambda *key: keys.append(key) or data.seed_of(*key))
    inputs, labels = batch(first)
    for trainer in (first, first, second):
        trainer.train_step(inputs.clone(), labels, 8)
    first.epoch, first.step = 1, 0
    first.train_step(inputs.clone(), labels, 8)
    assert {key[0] for key in keys} == {"cutmix", "dropout"}
    assert len(set(keys)) == 8
    first.step = 0  # the same step in another process: other dropout, but the same rectangle
    first.compute = replace(first.compute, rank=1)
    first.train_step(inputs.clone(), labels, 8)
    assert len(set(keys)) == 9


# --------------------------------------------------------------------------- recipes and precision


@pytest.mark.parametrize("more", [[], ["--lr", "0.5"], ["--epochs", "60"], ["--epochs", "1"]])
@pytest.mark.parametrize("recipe", train.RECIPES)
def test_a_recipe_is_a_set_of_defaults_and_a_given_flag_wins(recipe, more):
    args, expected = vars(train.parse(["--recipe", recipe, *more])[0]), dict(train.RECIPES[recipe])
    assert (args["batch_size"], args["seed"]) == (64, 0)
    expected["lr"] = 0.5 if "--lr" in more else expected["lr"]
    expected["warmup_epochs"] *= args["epochs"] / 30  # in proportion
    if args["epochs"] == 1:  # too short for what pays in the long run
        expected |= {"repeats": 1, "cutmix": expected["cutmix"] / 30}
    assert {name: args[name] for name in expected} == pytest.approx(expected)


def test_the_reports_experiment_is_the_default():
    args = vars(train.parse([])[0])
    expected = dict(epochs=30, lr=1e-4, schedule="constant", augment="none", ema=0, stride=2)
    expected |= dict(train_size="224", test_size=224, dropout=0.5, weight_decay=0, init="default")
    assert {name: args[name] for name in expected} == expected


def test_the_ablation_takes_out_each_ingredient_of_the_strong_recipe():
    strong = train.RECIPES["strong"]
    taken_out = set()
    for flags in ablation.TAKEN_OUT.values():
        args = vars(train.parse(["--recipe", "strong", *flags.split()])[0])
        changed = {name for name, value in strong.items() if args[name] != value}
        assert len(changed) == bool(flags)
        taken_out |= changed
    assert taken_out == {n for n, value in strong.items() if value != train.RECIPES["report"][n]}


def test_few_epochs_of_the_strong_recipe_learn(cache, tmp_path):
    """Averaged without a warm-up, the weights would still be near the initial ones, at chance."""
    folder = data.draw_sample(tmp_path / "photos", 40)
    flags = "--recipe strong --epochs 6 --name net --lr 1e-3 --batch-size 16 --stride 4 "
    flags += "--train-size 64 --augment none --cutmix 0 --dropout 0"
    run("train", "--data", folder, "--cache", cache, *flags.split(), folder=tmp_path)
    last = {name: float(value) for name, value in history(tmp_path / "runs" / "net")[-1].items()}
    assert last["train_accuracy"] > 30
    assert last["valid_accuracy"] > 0.6 * last["train_accuracy"]
    assert last["valid_loss"] < last["train_loss"] + 0.5


@pytest.mark.parametrize(
    ("features", "choice", "expected"),
    [
        ("avx512_bf16", "auto", torch.bfloat16),
        ("amx_bf16", "auto", torch.bfloat16),
        ("avx512_f", "auto", torch.float32),
        ("avx512_bf16", "fp32", torch.float32),
        ("avx512_f", "bf16", torch.bfloat16),
        ("avx512_f", "fp16", torch.float16),
    ],
)
@pytest.mark.parametrize("torch_tells", [True, False])
def test_precision_follows_the_hardware(features, choice, expected, torch_tells, monkeypatch):
    able = {"avx512_bf16": False, "amx_bf16": False, features: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    if not torch_tells:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
        monkeypatch.setattr(Path, "exists", lambda path: True)
        monkeypatch.setattr(Path, "read_text", lambda path: f"flags\t: fpu {features} sse\n")
    assert train.choose_precision(torch.device("cpu"), choice) == expected
