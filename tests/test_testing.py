"""What `test.py` reports, draws and predicts."""

import csv
import json
import random
import re
import shutil
from types import SimpleNamespace

import commands
import pytest
import torch
import torchvision
from commands import ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
import model
import test
import train


def test_wilson_interval_of_the_reports_result():
    assert test.wilson(442, 867) == pytest.approx((47.7, 54.3), abs=0.05)
    assert test.wilson(0, 10)[0] == pytest.approx(0)
    assert test.wilson(10, 10)[1] == pytest.approx(100)


def test_mcnemar_is_the_two_sided_binomial_test_of_the_disagreements():
    first = torch.tensor([True] * 8 + [False] * 2 + [True] * 5)
    second = torch.tensor([False] * 8 + [True] * 2 + [True] * 5)
    assert test.mcnemar(first, second) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert test.mcnemar(first, first) == 1


def test_metrics_of_a_case_worked_by_hand():
    logits = torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 9, 0], [9, 0, 0]])
    result = test.metrics(logits, torch.tensor([0, 0, 1, 1]), ["a", "b", "c"])
    assert result["images"] == 4
    assert result["accuracy"] == 75
    assert result["top5_accuracy"] == 100
    assert result["mean_class_accuracy"] == pytest.approx((100 + 50) / 2)
    assert [entry["accuracy"] for entry in result["classes"]] == [100, 50, None]
    right, wrong = (-torch.log_softmax(torch.tensor([9.0, 0, 0]), 0)[:2]).tolist()
    assert result["loss"] == pytest.approx((3 * right + wrong) / 4, rel=1e-5)
    logits = torch.arange(6.0).expand(6, 6)  # class 0 is the last of six
    result = test.metrics(logits, torch.arange(6), list("abcdef"))
    assert result["top5_accuracy"] == pytest.approx(500 / 6)


def test_calibration_error_of_a_case_worked_by_hand():
    confidence = torch.tensor([0.95, 0.95, 0.55, 1.0])
    error = test.calibration_error(confidence, torch.tensor([True, False, True, True]))
    assert error == pytest.approx(100 * (0.75 * abs(2.9 / 3 - 2 / 3) + 0.25 * 0.45))


@pytest.fixture(scope="module")
def tested(flags, tmp_path_factory):
    """What a test prints and writes, and the folder that it ran in, where more may be put."""
    folder = tmp_path_factory.mktemp("tested")
    more = ["--epochs", 3, "--name", "run", "--ckpt", "alexnet.pth", "--precision", "fp32"]
    commands.run("train", *flags, *more, folder=folder)
    argv = ["--json", "test.json", "--predictions", "test.csv", "--flip"]
    output = commands.run("test", *argv, folder=folder).stdout
    return output, json.loads((folder / "test.json").read_text()), folder


def test_the_tested_images_are_the_manifests_and_no_training_images(tested):
    _, result, folder = tested
    split = torch.load(folder / "alexnet.pth", weights_only=True)["split"]
    with open(folder / "test.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == split["test"]
    assert not set(split["test"]) & (set(split["train"]) | set(split["valid"]))
    assert all(row["true_class"] == row["path"].split("/")[0] for row in rows)
    hits = sum(row["true_class"] == row["predicted_class"] for row in rows)
    assert result["accuracy"] == 100 * hits / len(rows)
    losses = [float(row["loss"]) for row in rows]
    assert result["loss"] == pytest.approx(sum(losses) / len(rows), rel=1e-4)
    assert {"split", "images", "loss", "accuracy", "accuracy_low", "accuracy_high"} <= result.keys()
    assert {"top5_accuracy", "mean_class_accuracy", "classes", "flip_accuracy"} <= result.keys()
    assert (result["split"], result["images"]) == ("test", 8)


def test_a_second_test_gives_the_same_and_no_second_events(tested):
    output, result, folder = tested
    again = commands.run("test", "--json", "again.json", "--flip", folder=folder)
    assert again.stdout == output
    assert json.loads((folder / "again.json").read_text()) == result
    events = EventAccumulator(str(folder / "runs" / "run" / "test")).Reload()
    assert len(events.Scalars("accuracy")) == 1


def test_valid_split_gives_exactly_the_accuracy_that_training_printed(tested):
    _, _, folder = tested
    commands.run("test", "--split", "valid", "--json", "valid.json", folder=folder)
    result = json.loads((folder / "valid.json").read_text())
    checkpoint = torch.load(folder / "alexnet.pth", weights_only=True)
    assert result["accuracy"] == checkpoint["valid_accuracy"]
    with open(folder / "runs" / "run" / "history.csv") as file:
        row = list(csv.DictReader(file))[checkpoint["epoch"] - 1]
    assert result["loss"] == pytest.approx(float(row["valid_loss"]), rel=1e-6)
    events = EventAccumulator(str(folder / "runs" / "run" / "test")).Reload()
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == [pytest.approx(tested[1]["loss"])]


def test_events_lie_beside_those_of_training_at_the_checkpoints_epoch(tested):
    _, result, folder = tested
    epoch = torch.load(folder / "alexnet.pth", weights_only=True)["epoch"]
    events = EventAccumulator(str(folder / "runs" / "run" / "test")).Reload()
    for tag in ("loss", "accuracy", "top5_accuracy", "mean_class_accuracy"):
        (event,) = events.Scalars(tag)
        assert event.step == epoch
        assert event.value == pytest.approx(result[tag], rel=1e-6)
    assert {"confusion_matrix", "worst_mistakes"} == set(events.Tags()["images"])
    (text,) = events.Tensors("classes/text_summary")[0].tensor_proto.string_val
    accuracies = [float(line.split("|")[3]) for line in text.decode().splitlines()[2:]]
    assert accuracies == sorted(accuracies)
    texts = {tag.split("/")[0] for tag in events.Tags()["tensors"]}
    assert {"most_confused", "classes", "precision_recall"} <= texts


def test_versus_compares_on_the_same_images(tested):
    _, result, folder = tested
    shutil.copy(folder / "alexnet.pth", folder / "copy.pth")
    output = commands.run("test", "--versus", "copy.pth", "--json", folder=folder).stdout
    same = {"accuracy": result["accuracy"], "difference": 0, "p_value": 1}
    assert json.loads(output)["versus"] == same


def answer(label: int, path) -> None:
    """Let the checkpoint in `path` say `label` for every image."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["classifier.6.weight"].zero_()
    checkpoint["state_dict"]["classifier.6.bias"].copy_(torch.eye(10)[label])
    torch.save(checkpoint, path)


def test_versus_is_positive_where_the_other_checkpoint_is_worse(tested, tmp_path):
    _, result, folder = tested
    tested_or_not = [bool(entry["images"]) for entry in result["classes"]]
    for name, images in (("better.pth", True), ("worse.pth", False)):
        shutil.copy(folder / "alexnet.pth", tmp_path / name)
        answer(tested_or_not.index(images), tmp_path / name)
    argv = ["--ckpt", "better.pth", "--versus", "worse.pth", "--json"]
    found = json.loads(commands.run("test", *argv, folder=tmp_path).stdout)
    assert found["versus"]["accuracy"] == 0
    assert found["versus"]["difference"] == found["accuracy"] > 0


def mistake_mirror_images():
    evaluate = train.evaluate

    def evaluate_wrongly(*args, flip=False):
        logits = evaluate(*args)
        if flip:  # every other mirror image is certainly a triangle, of the others nothing is known
            logits = torch.zeros_like(logits)
            logits[::2, 9] = 1000
        return logits

    train.evaluate = evaluate_wrongly


def test_flip_tests_the_mean_over_each_image_and_its_mirror(tested):
    _, result, folder = tested
    argv = ["--flip", "--json", "flip.json", "--logdir", "other"]
    commands.run("test", *argv, folder=folder, before=mistake_mirror_images)
    found = json.loads((folder / "flip.json").read_text())
    with open(folder / "test.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows[::2]:
        row["predicted_class"] = "triangle"
    hits = sum(row["predicted_class"] == row["true_class"] for row in rows)
    assert found["accuracy"] == result["accuracy"]
    assert found["flip_accuracy"] == 100 * hits / len(rows)


@pytest.mark.parametrize(
    ("split", "difference", "p", "words"),
    [
        ("test", 2.5, 0.01, "a.pth is 2.50 points better, p = 0.01 (McNemar, exact): more than"),
        ("valid", -2.5, 0.2, "a.pth is 2.50 points worse, p = 0.2 (McNemar, exact): chance alone"),
    ],
)
def test_versus_has_direction_unit_verdict_and_advice(tested, split, difference, p, words):
    versus = {"accuracy": 50.0, "difference": difference, "p_value": p}
    result = tested[1] | {"split": split, "versus": versus}
    lines = test.summary(result, SimpleNamespace(ckpt="a.pth", versus="b.pth", split=split))
    assert f"versus b.pth: accuracy 50.00 %; {words}" in lines
    assert ("compare on --split valid" in lines) == (split == "test")


def test_a_bare_state_dict_is_tested_with_a_warning_that_the_split_is_drawn(
    tested, photos, cache, tmp_path
):
    checkpoint = torch.load(tested[2] / "alexnet.pth", weights_only=True)
    torch.save(checkpoint["state_dict"], tmp_path / "bare.pth")
    checkpoint["args"]["test_size"] = 224  # what is taken where none is known
    torch.save(checkpoint, tmp_path / "alexnet.pth")
    bare = ["--ckpt", "bare.pth", "--data", photos, "--cache", cache, "--stride", 4]
    command = commands.run("test", *bare, "--precision", "fp32", "--json", folder=tmp_path)
    assert "has no split" in commands.one_line(command)
    whole = commands.run("test", "--json", folder=tmp_path)
    assert json.loads(command.stdout)["loss"] == json.loads(whole.stdout)["loss"]


def test_data_may_have_moved(tested, photos, tmp_path):
    _, result, folder = tested
    copy = shutil.copytree(photos, tmp_path / "elsewhere")
    argv = ["--data", copy, "--cache", tmp_path / "c", "--json", "moved.json"]
    assert "changed" not in commands.run("test", *argv, folder=folder).stderr
    assert json.loads((folder / "moved.json").read_text())["loss"] == result["loss"]


def test_images_that_changed_since_training_are_counted_with_a_name(tested, photos, tmp_path):
    _, _, folder = tested
    split = torch.load(folder / "alexnet.pth", weights_only=True)["split"]
    copy = shutil.copytree(photos, tmp_path / "changed") / "101_ObjectCategories"
    first, second, gone, *_ = (copy / path for path in split["train"])
    shutil.copy(second, first)
    shutil.copy(second, copy / "star" / "new.jpg")
    argv = ["--data", copy, "--cache", tmp_path / "cache", "--logdir", tmp_path]
    error = commands.one_line(commands.run("test", *argv, folder=folder))
    changed = first.relative_to(copy).as_posix()
    assert f"1 new (such as 'star/new.jpg'), 1 changed (such as '{changed}')" in error
    gone.unlink()
    assert "1 missing" in commands.run("test", *argv, folder=folder).stderr
    assert (
        gone.name in commands.run("test", *argv, "--split", "train", folder=folder, status=1).stderr
    )


def test_top_5_is_shown_for_more_than_five_classes_alone(tested):
    output, result, _ = tested
    assert f"top-5 accuracy {result['top5_accuracy']:.2f} %" in output
    logits = torch.rand(9, 5)
    shown = test.metrics(logits, torch.arange(9) % 5, list("abcde")) | {"split": "test"}
    assert "top-5" not in test.summary(shown, None)


# ------------------------------------------------------------------------------ prediction


def test_images_are_classified_with_the_preprocessing_of_testing_and_bad_ones_do_not_stop_it(
    tested, photos
):
    _, _, folder = tested
    with open(folder / "test.csv") as file:
        row = next(csv.DictReader(file))
    root = photos / "101_ObjectCategories"
    image = root / row["path"]
    (folder / "text.jpg").write_text("no image")
    images = ["--images", image, "text.jpg", "missing.jpg", root / "star"]
    answered = commands.run("test", *images, "--json", folder=folder, status=1)
    good, text, missing, *star = json.loads(answered.stdout)
    assert good["predictions"][0]["class"] == row["predicted_class"]
    probability = good["predictions"][0]["probability"]
    assert probability == pytest.approx(float(row["confidence"]), abs=1e-6)
    assert (len(good["predictions"]), len(star)) == (5, 8)
    assert (text["path"], missing["error"]) == ("text.jpg", "No such file or directory")
    assert "text.jpg: not an image of a known kind\n" in answered.stderr
    assert answered.stderr.count("\n") == 2
    printed = commands.run("test", "--images", image, folder=folder).stdout
    assert printed.splitlines()[0] == str(image)
    assert printed.splitlines()[1].split()[2] == row["predicted_class"]


def test_hidden_files_in_a_folder_of_images_are_passed_over(trained, photos, tmp_path):
    folder = shutil.copytree(photos / "101_ObjectCategories" / "star", tmp_path / "images")
    (folder / "._image_0001.jpg").write_text("of another system")
    (folder / "folder.jpg").mkdir()
    shutil.copytree(photos / "101_ObjectCategories" / "star", folder / ".thumbnails")
    argv = ["--ckpt", trained / "alexnet.pth", "--images", folder, "--json"]
    assert len(json.loads(commands.run("test", *argv, folder=tmp_path).stdout)) == 8


def test_images_need_no_data_set(trained, photos, tmp_path):
    shutil.copy(trained / "alexnet.pth", tmp_path)
    shutil.copy(photos / "101_ObjectCategories" / "star" / "image_0001.jpg", tmp_path)
    argv = ["--images", "image_0001.jpg", "--json", "a.json", "--predictions", "a.csv"]
    alone = commands.run("test", *argv, folder=tmp_path, before=forget_data)
    assert alone.stdout.startswith("image_0001.jpg\n")
    (answer,) = json.loads((tmp_path / "a.json").read_text())
    with open(tmp_path / "a.csv") as file:
        (row,) = csv.DictReader(file)
    assert "results written to a.json\n" in alone.stderr
    assert "predictions written to a.csv\n" in alone.stderr
    assert row["path"] == answer["path"] == "image_0001.jpg"
    assert row["predicted_class"] == answer["predictions"][0]["class"]
    assert float(row["confidence"]) == answer["predictions"][0]["probability"]


def test_the_readmes_script_prints_what_test_py_prints_first(tested, tmp_path, monkeypatch, capsys):
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    monkeypatch.setattr(torchvision.models, "alexnet", model.AlexNet)
    monkeypatch.setattr(model, "HIDDEN", 64)
    monkeypatch.chdir(tmp_path)
    shutil.copy(tested[2] / "alexnet.pth", tmp_path)
    turned, noise = Image.Exif(), Image.frombytes("RGB", (15, 9), random.Random(0).randbytes(405))
    turned[0x112] = 6
    noise.resize((1500, 900)).save("cat.jpg", exif=turned)
    exec(script, names := {})
    argv = ["--device", "cpu", "--precision", "fp32", "--images", "cat.jpg", "--json", "a.json"]
    printed = commands.run("test", *argv, folder=tmp_path).stdout.splitlines()
    assert capsys.readouterr().out.strip() == printed[1].strip()
    (answer,) = json.loads((tmp_path / "a.json").read_text())
    assert names["probability"].item() == pytest.approx(answer["predictions"][0]["probability"])


def forget_data():
    def refuse(*_):
        raise AssertionError("looked for a data set")

    data.locate = refuse


# --------------------------------------------------------------------------------- drawing


def test_a_bar_in_a_name_does_not_break_a_table():
    made = train.table(["class", "images"], [["a|b", 1]])
    assert made == "| class | images |\n| --- | --- |\n| a\\|b | 1 |"


@pytest.mark.parametrize("count", [3, 101])
def test_confusion_picture_shows_the_row_shares(count):
    matrix = torch.zeros(count, count, dtype=torch.long)
    matrix[0, 0], matrix[0, 1], matrix[1, 1] = 3, 1, 7
    picture = test.confusion_picture(matrix, [f"class {index}" for index in range(count)])
    cell = 10 if count > 40 else 24
    left = picture.shape[2] - count * cell

    def ink(true, predicted):
        return picture[:, true * cell + cell // 2, left + predicted * cell + cell // 2].tolist()

    assert ink(1, 1) == [0, 0, 255]
    assert ink(1, 0) == [255, 255, 255]
    assert ink(0, 1)[0] > ink(0, 0)[0] > 0
    assert picture.dtype == torch.uint8


def test_confusion_picture_of_many_classes_stays_below_5000_pixels():
    picture = test.confusion_picture(torch.eye(2000, dtype=torch.int64), ["name"] * 2000)
    assert max(picture.shape) < 5000


def test_the_result_is_printed_although_the_log_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").write_text("")
    argv = ["--ckpt", trained / "alexnet.pth", "--logdir", "file", "--predictions", "a.csv"]
    failed = commands.run("test", *argv, folder=tmp_path, status=1)
    assert "test: loss" in failed.stdout
    assert (tmp_path / "a.csv").exists()


def test_captioned_grid_holds_the_images():
    images = torch.randint(0, 256, (9, 3, 224, 224), dtype=torch.uint8)
    grid = test.captioned_grid(images, ["file\ntrue: a\nb, 90% sure"] * 9)
    assert torch.equal(grid[:, :224, :224], images[0])
    assert torch.equal(grid[:, 282 : 282 + 224, :224], images[8])
    assert grid[:, 224:282, :224].min() < 128


def test_report_script_weights_can_be_tested_by_the_real_command_line(photos, cache, tmp_path):
    """The real network, in a process of its own, from an untrained bare state_dict."""
    torch.manual_seed(0)
    torch.save(model.AlexNet(10, stride=4).state_dict(), tmp_path / "alexnet.pth")
    argv = ["--data", photos, "--cache", cache, "--stride", 4]
    done = commands.shell(ROOT / "test.py", *argv, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8 images" in done.stdout
    assert (tmp_path / "runs" / "alexnet" / "test").is_dir()
