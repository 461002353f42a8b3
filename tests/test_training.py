"""What a run trains, prints, logs and saves."""

import csv
import re
from types import SimpleNamespace

import commands
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

import data
import model
import train


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return accumulator.Reload()


def logged(folder) -> dict:
    """All that the event files of a run hold, but for times: tag -> [(step, value), ...]."""
    found = {}
    for name in ("train", "valid"):
        source = events(folder / name)
        for tag in source.Tags()["scalars"]:
            if tag != "images_per_second":
                found[name, tag] = [(e.step, e.value) for e in source.Scalars(tag)]
        for tag in source.Tags()["images"]:
            found[name, tag] = [(e.step, e.encoded_image_string) for e in source.Images(tag)]
        for tag in source.Tags()["tensors"]:
            found[name, tag] = [e.step for e in source.Tensors(tag)]
    return found


def history(folder) -> list[dict]:
    with open(folder / "history.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(photos, cache, tmp_path, monkeypatch):
    """A function that returns a `Run` with narrow layers, given flags."""
    monkeypatch.setattr(model, "HIDDEN", 16)

    def make(*flags):
        args, _ = train.parse([*f"--data {photos} --cache {cache} --stride 4 --train-size 64".split(), *flags])
        store = data.ImageStore(args.data, args.cache)
        compute = train.Compute(torch.device("cpu"), torch.float32, 0, 1, 0)
        return train.Run(args, store, data.split(store.paths, args.seed), compute)

    return make


# ------------------------------------------------------------------------------- cases worked by hand


def test_schedule_rises_evenly_then_falls_as_half_a_cosine():
    args = SimpleNamespace(lr=0.1, schedule="cosine", warmup_epochs=2, epochs=10)
    rates = [train.learning_rate(args, progress) for progress in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.05, 0])
    args.schedule = "constant"
    assert train.learning_rate(args, 9.9) == 0.1


def test_train_size_grows_over_the_first_80_percent_of_the_epochs():
    args = SimpleNamespace(train_size="128-224", epochs=10)
    sizes = [train.train_size(args, epoch) for epoch in range(10)]
    assert (sizes[0], sizes[7:]) == (128, [224, 224, 224])
    assert sizes == sorted(sizes)
    args.train_size = "96"
    assert {train.train_size(args, epoch) for epoch in range(10)} == {96}


def test_averaged_weights_follow_the_recurrence(run):
    trained = run("--ema", "0.75")
    weight = trained.network.classifier[-1].bias
    expected = None
    rows, uniforms = trained.epoch_plan()
    for step in range(3):
        trained.train_step(*trained.inputs(rows[step : step + 8], uniforms), 8)
        now = weight.detach().clone()
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    torch.testing.assert_close(trained.evaluated.classifier[-1].bias.detach(), expected)
    assert not torch.equal(expected, now)


def test_initial_weights_are_those_that_the_flag_names(run):
    first = {name: run("--init", name).network.features[0] for name in ("default", "he", "whiten")}
    assert first["default"].weight.std() < first["he"].weight.std()
    assert first["default"].bias.any()
    trained = run("--init", "whiten", "--weight-decay", "0.5")
    rows, uniforms = trained.epoch_plan()
    inputs, _ = trained.inputs(rows, uniforms)
    outputs = first["whiten"](inputs).movedim(1, -1).flatten(0, -2)[:, :8]
    torch.testing.assert_close(outputs.T.cov(), torch.eye(8), rtol=0, atol=0.3)
    assert torch.equal(trained.network.features[0].weight, first["whiten"].weight)  # the seed decides


def test_label_smoothing_mixes_the_target_with_all_classes(run):
    trained = run("--label-smoothing", "0.2", "--dropout", "0")
    rows, uniforms = trained.epoch_plan()
    inputs, labels = trained.inputs(rows[:8], uniforms[:8])
    with torch.no_grad():
        log_p = F.log_softmax(trained.network(inputs), 1)
    target = 0.8 * F.one_hot(labels, 10) + 0.2 / 10
    trained.train_step(inputs, labels, 8)
    gradient = (log_p.exp() - target).mean(0)  # of the mean loss, by the last layer's bias
    torch.testing.assert_close(trained.network.classifier[-1].bias.grad, gradient, rtol=1e-3, atol=1e-5)
    # shown is the loss without smoothing, so that it can be compared with that of validation
    assert trained.sums[0].item() == pytest.approx(F.nll_loss(log_p, labels, reduction="sum").item(), rel=1e-4)


def test_weight_decay_is_decoupled(run):
    trained = run("--weight-decay", "0.5", "--lr", "0.1")
    parameter = trained.network.features[0].bias
    before = parameter.detach().clone()
    for each in trained.network.parameters():
        each.grad = torch.zeros_like(each)
    trained.optimizer.param_groups[0]["lr"] = 0.1
    trained.optimizer.step()
    torch.testing.assert_close(parameter.detach(), before * (1 - 0.1 * 0.5))


def test_moments_are_laid_out_as_the_parameters_wherever_they_were_saved(run, tmp_path):
    first, second = (run("--ckpt", str(tmp_path / "net.pth"), "--dropout", "0", "--lr", "0.01") for _ in range(2))
    rows, uniforms = first.epoch_plan()
    batch = first.inputs(rows[:8], uniforms[:8])
    first.train_step(*batch, 8)
    first.save_last()
    checkpoint = model.load(tmp_path / "net.last.pth")
    for moments in checkpoint["optimizer"]["state"].values():
        moments |= {name: tensor.contiguous() for name, tensor in moments.items()}  # as MPS has them
    second.restore(checkpoint)
    for trained in (first, second):
        trained.train_step(*batch, 8)
    weights = [torch.cat([p.detach().flatten() for p in each.network.parameters()]) for each in (first, second)]
    assert torch.equal(*weights)


def test_an_epoch_visits_every_training_image_once_in_an_order_of_its_own(run):
    trained = run()
    first, _ = trained.epoch_plan()
    trained.epoch = 1
    second, _ = trained.epoch_plan()
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(trained.rows["train"].tolist())
    assert first.tolist() != second.tolist()


def test_random_numbers_belong_to_the_image_not_to_its_place(run):
    trained = run()
    rows, uniforms = trained.epoch_plan()
    table = torch.rand(64, data.UNIFORMS, generator=data.generator("augmentation", 0, 0))
    by_row = dict(zip(trained.rows["train"].tolist(), table, strict=True))
    assert all(torch.equal(by_row[row], u) for row, u in zip(rows.tolist(), uniforms, strict=True))


def test_evaluation_gives_each_row_its_own_logits(run, monkeypatch):
    trained = run()
    rows = trained.rows["train"]
    whole = train.evaluate(trained.network, trained.store, rows, 64, trained.compute)
    monkeypatch.setattr(train, "EVAL_BATCH", 7)
    torch.testing.assert_close(train.evaluate(trained.network, trained.store, rows, 64, trained.compute), whole)
    mirrored = train.evaluate(trained.network, trained.store, rows, 64, trained.compute, flip=True)
    assert not torch.allclose(mirrored, whole)


# ------------------------------------------------------------------------------------ the command line


def test_checkpoint_is_plain_and_holds_what_testing_needs(trained):
    checkpoint = torch.load(trained / "alexnet.pth", weights_only=True)
    assert checkpoint.keys() == {
        *("state_dict", "classes", "stride", "seed", "epoch", "valid_accuracy", "args", "versions", "run", "split"),
        "fingerprint",
    }
    assert checkpoint["classes"] == sorted(data.SHAPES)
    assert {tensor.dtype for tensor in checkpoint["state_dict"].values()} == {torch.float32}
    assert {name: len(paths) for name, paths in checkpoint["split"].items()} == {"train": 64, "valid": 8, "test": 8}
    assert checkpoint["run"] == str(trained / "runs" / "run")
    best = max(history(trained / "runs" / "run"), key=lambda row: float(row["valid_accuracy"]))
    assert (checkpoint["epoch"], checkpoint["valid_accuracy"]) == (int(best["epoch"]), float(best["valid_accuracy"]))


def test_the_best_weights_are_saved_not_the_last(flags, tmp_path):
    commands.run("train", *flags, "--epochs", 3, folder=tmp_path, before=worsen)
    checkpoint = torch.load(tmp_path / "alexnet.pth", weights_only=True)
    last = torch.load(tmp_path / "alexnet.last.pth", weights_only=True)
    assert (checkpoint["epoch"], last["epoch"]) == (1, 3)
    assert not torch.equal(checkpoint["state_dict"]["features.0.bias"], last["state_dict"]["features.0.bias"])


def worsen():
    accuracies = iter([50.0, 40.0, 50.0])
    train.score = lambda logits, labels: (1.0, next(accuracies))


def test_printed_lines_history_and_events_agree_to_the_printed_digit(flags, tmp_path):
    output = commands.run("train", *flags, "--epochs", 2, "--name", "run", folder=tmp_path).stdout
    rows, folder = history(tmp_path / "runs" / "run"), tmp_path / "runs" / "run"
    columns = "epoch,learning_rate,train_loss,train_accuracy,valid_loss,valid_accuracy,images_per_second,seconds"
    assert list(rows[0]) == columns.split(",")
    lines = re.findall(r"epoch \d/\d .*", output)
    for row, line in zip(rows, lines, strict=True):
        for name in ("train", "valid"):
            for tag, digits in (("loss", 4), ("accuracy", 2)):
                value = f"{float(row[f'{name}_{tag}']):.{digits}f}"
                (event,) = [e for e in events(folder / name).Scalars(tag) if e.step == int(row["epoch"])]
                assert value == f"{event.value:.{digits}f}"
                assert value in line
        (event,) = [e for e in events(folder / "train").Scalars("images_per_second") if e.step == int(row["epoch"])]
        assert f"{event.value:.1f}" == f"{float(row['images_per_second']):.1f}"
        assert f"{event.value:.1f} images/s" in line
    assert "python test.py --ckpt alexnet.pth" in output
    assert "tensorboard --logdir runs" in output


def test_runs_in_tensorboard_are_train_and_valid_alone_with_shared_tags(flags, tmp_path):
    commands.run("train", *flags, "--epochs", 3, "--name", "run", folder=tmp_path)
    found = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs")).Reload()
    assert found.Runs().keys() == {"run/train", "run/valid"}
    for name in ("train", "valid"):
        tags = found.Runs()[f"run/{name}"]
        assert {"loss", "accuracy"} <= set(tags["scalars"])
        assert [event.step for event in found.Scalars(f"run/{name}", "loss")] == [1, 2, 3]
    assert found.Runs()["run/train"]["graph"]
    assert {"first_batch", "filters"} == set(found.Runs()["run/train"]["images"])
    hparams = found.SummaryMetadata("run/valid", "_hparams_/session_start_info")
    assert hparams.plugin_data.plugin_name == "hparams"


def test_a_run_resumed_twice_logs_what_an_unbroken_one_does(flags, trained, tmp_path):
    commands.run("train", *flags, "--epochs", 3, "--name", "run", folder=tmp_path, before=stop_in_step_4, status=143)
    commands.run("train", "--resume", folder=tmp_path, before=stop_in_step_9, status=143)
    commands.run("train", "--resume", folder=tmp_path)
    unbroken, broken = logged(trained / "runs" / "run"), logged(tmp_path / "runs" / "run")
    assert unbroken.keys() == broken.keys()
    for tag in unbroken:
        assert unbroken[tag] == broken[tag], tag


def stop_in_step(number: int) -> None:
    import os
    import signal

    step, left = train.Run.train_step, iter(range(number - 1, -1, -1))

    def train_step(*args):
        step(*args)
        if next(left, None) == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    train.Run.train_step = train_step


def stop_in_step_4():
    stop_in_step(4)


def stop_in_step_9():
    stop_in_step(9)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(flags, trained, tmp_path):
    for seed in (0, 1):
        commands.run("train", *flags, "--epochs", 3, "--seed", seed, "--ckpt", f"{seed}.pth", folder=tmp_path)
    same, other = (torch.load(tmp_path / f"{seed}.last.pth", weights_only=True) for seed in (0, 1))
    first = torch.load(trained / "alexnet.last.pth", weights_only=True)
    assert all(torch.equal(first["state_dict"][name], same["state_dict"][name]) for name in first["state_dict"])
    assert first["split"] == same["split"]
    assert first["split"] != other["split"]


def test_a_second_run_of_one_name_gets_a_folder_of_its_own(flags, tmp_path):
    for _ in range(2):
        commands.run("train", *flags, "--epochs", 1, "--name", "same", folder=tmp_path)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["same", "same-2"]


@pytest.mark.parametrize(
    ("flags_given", "expected"),
    [
        ([], {"lr": 1e-4, "augment": "none", "ema": 0.0, "schedule": "constant", "train_size": "224"}),
        (["--recipe", "strong"], train.RECIPES["strong"]),
        (["--recipe", "strong", "--lr", "0.5"], {**train.RECIPES["strong"], "lr": 0.5}),
    ],
)
def test_a_recipe_is_a_set_of_defaults_and_a_given_flag_wins(flags_given, expected):
    args = vars(train.parse(flags_given)[0])
    assert {name: args[name] for name in expected} == expected
    assert (args["epochs"], args["batch_size"], args["seed"]) == (30, 64, 0)


@pytest.mark.parametrize(
    ("capabilities", "choice", "expected"),
    [
        ({"avx512_bf16": True}, "auto", torch.bfloat16),
        ({"amx_bf16": True}, "auto", torch.bfloat16),
        ({"avx512_f": True}, "auto", torch.float32),
        ({"avx512_bf16": True}, "fp32", torch.float32),
    ],
)
def test_precision_follows_the_hardware(capabilities, choice, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert train.choose_precision(torch.device("cpu"), choice) == expected
