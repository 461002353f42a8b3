"""Test a checkpoint on the images that it was never trained on, or classify your own.

    python test.py --ckpt alexnet.pth
    python test.py --ckpt alexnet.pth --split valid --versus other.pth
    python test.py --ckpt alexnet.pth --images cat.jpg folder/

The split is the one in the checkpoint, whatever the seed or the order of the folder. Results on the
test split go to the log folder of the run that the checkpoint is from.
"""

import argparse
import csv
import functools
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid

import data
import train
from data import DEFAULT_CACHE, DataError, ImageStore, memory_format
from model import AlexNet, CheckpointError, build, load

Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
COLUMNS = ["path", "true_class", "predicted_class", "confidence", "loss"]  # of --predictions


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = train.Parser("test.py", __doc__)
    add = parser.add_argument
    path = os.path.expanduser
    add("--ckpt", type=path, default="alexnet.pth", help="checkpoint to test")
    add("--split", choices=["test", "valid", "train"], default="test", help="images to test on")
    add("--data", type=path, help="as for train.py; default: where it was trained")
    add("--cache", type=path, help="folder for the decoded images; default: the training's")
    add("--json", type=path, nargs="?", const="-", help="print the results, or write this file")
    add("--predictions", type=path, help="write a CSV file, a row for each image")
    add("--flip", action="store_true", help="also test the mean over each image and its mirror")
    add("--versus", type=path, help="compare with another checkpoint on the same images")
    add("--images", type=path, nargs="+", help="classify images, or those in folders")
    add("--device", type=train.DEVICE, default="auto", help="as for train.py")
    add("--precision", choices=train.PRECISIONS, help="default: the training's")
    add("--logdir", type=path, help="write events under this folder; default: the run's")
    seed = train.number(int, 0, 2**32)
    add("--seed", type=seed, default=0, help="of the split, if the checkpoint has none")
    add("--stride", type=int, choices=[2, 4], default=2, help="if the checkpoint does not hold it")
    args = parser.parse_args(argv)
    for name in ("data", "cache", "split", "flip", "versus", "logdir"):
        if args.images and getattr(args, name) != parser.get_default(name):
            parser.error(f"--images needs no data set; --{name} does: give one of the two")
    for name in ("json", "predictions"):
        file = getattr(args, name)
        if file and (os.path.isdir(file) or not os.path.isdir(os.path.dirname(file) or ".")):
            parser.error(f"--{name} {file}: is a folder, or its folder does not exist")
    if args.json and args.predictions:
        if os.path.realpath(args.json) == os.path.realpath(args.predictions):
            parser.error(f"--json and --predictions are both {args.json}: give two files")
    return args


# ------------------------------------------------------------------------------------ metrics


def wilson(hits: int, images: int) -> tuple[float, float]:
    """Return the 95 % interval of hits / images in percent (Wilson 1927, JASA 22, 209)."""
    p, z2 = hits / images, Z95**2 / images
    middle, half = p + z2 / 2, Z95 * math.sqrt(p * (1 - p) / images + z2 / (4 * images))
    return 100 * (middle - half) / (1 + z2), 100 * (middle + half) / (1 + z2)


def mcnemar(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the exact two-sided p-value of McNemar's test on two classifiers' hits, bool (N,)."""
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def calibration_error(confidence: torch.Tensor, hits: torch.Tensor, bins: int = 10) -> float:
    """Return the expected calibration error in percent (https://arxiv.org/abs/1706.04599)."""
    place = (confidence * bins).long().clamp(max=bins - 1)  # bins of equal width in confidence
    gap = torch.bincount(place, confidence.double() - hits.double(), bins)
    return 100 * gap.abs().sum().item() / len(hits)


def metrics(logits: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> dict:
    """Return the metrics of logits (N, classes) and labels (N,); accuracies are in percent.

    The mean per-class accuracy is over the classes that have images.
    """
    loss, accuracy = train.score(logits, labels)
    hits = logits.argmax(1) == labels
    top5 = (logits.topk(min(5, len(classes))).indices == labels[:, None]).any(1)
    count = torch.bincount(labels, minlength=len(classes)).tolist()
    right = torch.bincount(labels[hits], minlength=len(classes)).tolist()
    each = [
        {"name": name, "images": n, "accuracy": 100 * r / n if n else None}
        for name, n, r in zip(classes, count, right, strict=True)
    ]
    present = [entry["accuracy"] for entry in each if entry["images"]]
    low, high = wilson(int(hits.sum()), len(labels))
    return {
        "images": len(labels),
        "loss": loss,
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "top5_accuracy": 100 * top5.float().mean().item(),
        "mean_class_accuracy": sum(present) / len(present),
        "calibration_error": calibration_error(logits.softmax(1).amax(1), hits),
        "classes": each,
    }


def summary(result: dict, args: argparse.Namespace) -> str:
    """Return the results, as `--json` holds them, in lines for people."""
    images, accuracy = result["images"], result["accuracy"]
    top5 = f"top-5 accuracy {result['top5_accuracy']:.2f} %  " if len(result["classes"]) > 5 else ""
    lines = [
        f"{result['split']}: loss {result['loss']:.4f}  accuracy {accuracy:.2f} % "
        f"({accuracy * images / 100:.0f} of {images} images; 95 % interval "
        f"{result['accuracy_low']:.1f} to {result['accuracy_high']:.1f})",
        f"{top5}mean per-class accuracy {result['mean_class_accuracy']:.2f} %  "
        f"calibration error {result['calibration_error']:.2f} %",
    ]
    if "flip_accuracy" in result:
        lines.append(f"with the mirror image: accuracy {result['flip_accuracy']:.2f} %")
    if "versus" in result:
        other, p = result["versus"], result["versus"]["p_value"]
        points = f"{abs(other['difference']):.2f} points "
        points += "better" if other["difference"] > 0 else "worse"
        verdict = "more than chance explains" if p < 0.05 else "chance alone may explain it"
        lines.append(
            f"versus {args.versus}: accuracy {other['accuracy']:.2f} %; {args.ckpt} is "
            f"{points if other['difference'] else 'equally good'}, "
            f"p = {p:.2g} (McNemar, exact): {verdict}"
        )
        if args.split == "test":
            lines.append("to choose between checkpoints, compare on --split valid")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------- pictures


def confusion_picture(matrix: torch.Tensor, classes: list[str]) -> torch.Tensor:
    """Draw a matrix of counts (true, predicted) as uint8 (3, H, W); rows are normalised."""
    cell = 24 if len(classes) <= 40 else max(1, min(10, 4000 // len(classes)))  # pixels
    font, side = ImageFont.load_default(cell), cell * len(classes)
    margin = 12 + max(int(font.getlength(name)) for name in classes)
    names = Image.new("RGB", (margin, side + margin), "white")
    draw = ImageDraw.Draw(names)
    for index, name in enumerate(classes):
        draw.text((margin - 6, (index + 0.5) * cell), name, "black", font, anchor="rm")
    draw.text((6, side + 6), "rows: true\ncolumns:\npredicted", "black", font)
    left = pil_to_tensor(names)
    below = left[:, :side].rot90(dims=(1, 2))  # the names again, read upwards
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    light = (255 * (1 - shares.sqrt())).byte()  # the root makes a single mistake visible
    cells = torch.stack([light, light, torch.full_like(light, 255)])  # white to blue
    cells = cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    picture = torch.cat([left, torch.cat([cells, below], 1)], 2)
    picture[:, : side + 1 : 5 * cell] = 204  # grey lines
    picture[:, :, margin :: 5 * cell] = 204
    return picture


def captioned_grid(images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Lay out images, uint8 (N, 3, S, S), over their captions, as uint8 (3, H, W)."""
    size, font = images.shape[-1], ImageFont.load_default(14)
    tiles = [to_pil_image(image) for image in F.pad(images, (0, 6, 0, 58), value=255)]
    for tile, caption in zip(tiles, captions, strict=True):
        ImageDraw.Draw(tile).text((2, size + 2), caption, "black", font)
    return make_grid([pil_to_tensor(tile) for tile in tiles], padding=0, pad_value=255)


def log_test(writer: SummaryWriter, step: int, result: dict, logits, store, paths, losses) -> None:
    """Log the metrics of a test, the confusion matrix, and which images and classes fail.

    Args:
        step: the checkpoint's epoch.
        result: as `metrics` returns it.
        logits, losses: (N, classes) and (N,), of the images `paths` of `store`.
    """
    classes, rows = [train.printable(name) for name in store.classes], store.rows(paths)
    labels, (confidence, predicted) = store.labels.cpu()[rows], logits.softmax(1).max(1)
    for tag in ("loss", "accuracy", "top5_accuracy", "mean_class_accuracy", "calibration_error"):
        writer.add_scalar(tag, result[tag], step)
    matrix = torch.bincount(labels * len(classes) + predicted, minlength=len(classes) ** 2)
    matrix = matrix.view(len(classes), -1)  # (true, predicted)
    writer.add_image("confusion_matrix", confusion_picture(matrix, classes), step)

    order, wrong = losses.argsort(descending=True), predicted != labels
    worst = order[wrong[order]][:32]
    if len(worst):
        images, _ = store.batch(rows[worst].to(store.pixels.device), torch.device("cpu"))
        captions = [
            f"{train.printable(Path(paths[i]).name)}\ntrue: {classes[labels[i]]}\n"
            f"{classes[predicted[i]]}, {confidence[i]:.0%} sure"
            for i in worst.tolist()
        ]
        writer.add_image("worst_mistakes", captioned_grid(images, captions), step)
    mistakes = sorted(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    confused = [[classes[t], classes[p], n] for (t, p), n in Counter(mistakes).most_common(20)]
    writer.add_text("most_confused", train.table(["true", "predicted", "images"], confused), step)
    found = enumerate(result["classes"])
    ranked = sorted((c["accuracy"], i, c["images"]) for i, c in found if c["images"])
    each = [[classes[i], images, f"{accuracy:.1f}"] for accuracy, i, images in ranked]
    header = ["class, worst first", "images", "accuracy, %"]
    writer.add_text("classes", train.table(header, each), step)
    for _, label, _ in ranked[:5]:
        tag = f"precision_recall/{classes[label]}"
        writer.add_pr_curve(tag, labels == label, logits.softmax(1)[:, label], step)


# ----------------------------------------------------------------------------------- commands


def write(args: argparse.Namespace, results: object, rows: list[list]) -> None:
    """Write what `--json` and `--predictions` ask for; `rows` have COLUMNS, one an image."""
    if args.json == "-":
        print(json.dumps(results, indent=2))
    elif args.json:
        with data.complete_file(Path(args.json), "w") as file:
            json.dump(results, file, indent=2)
        print(f"results written to {args.json}", file=sys.stderr)
    if args.predictions:
        options = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
        with data.complete_file(Path(args.predictions), "w", **options) as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        print(f"predictions written to {args.predictions}", file=sys.stderr)


def load_network(path: str, stride: int) -> tuple[AlexNet, dict]:
    """Return the network in a checkpoint, on the CPU, and the checkpoint.

    For weights of another script, its "args" are data, cache, test_size and precision alone.
    """
    checkpoint = load(path)
    if "optimizer" in checkpoint:
        raise CheckpointError(f"{path}: is for --resume; test the file beside it, without .last")
    network = build(checkpoint, path, stride)
    defaults = {"data": "data", "cache": DEFAULT_CACHE, "test_size": 224, "precision": "auto"}
    checkpoint["args"] = defaults | checkpoint.get("args", {})
    return network, checkpoint


@torch.inference_mode()
def predict(args, network: AlexNet, checkpoint: dict, compute: train.Compute) -> bool:
    """Print the five likeliest classes of each of `--images`; return whether all can be read."""
    count = network.classifier[-1].out_features
    classes = checkpoint.get("classes", [f"class {label}" for label in range(count)])
    files, answers, rows = [], [], []
    for path in map(Path, args.images):
        found = sorted(data.images_in(path)) if path.is_dir() else []
        files += found or [path]  # a folder without images is an error below
    for file in files:
        pixels, checksum = data.try_decode(file)
        if isinstance(checksum, str):  # the error instead
            error = "no images in this folder" if file.is_dir() else checksum
            print(f"test.py: {file}: {error}", file=sys.stderr)
            answers.append({"path": str(file), "error": error})
            continue
        images = pixels.permute(2, 0, 1)[None].to(compute.device)
        with compute.autocast():
            logits = network(data.to_inputs(images, checkpoint["args"]["test_size"]))
        probabilities, labels = logits[0].float().softmax(0).topk(min(5, count))
        guesses = [
            {"class": classes[label], "probability": probability}
            for probability, label in zip(probabilities.tolist(), labels.tolist(), strict=True)
        ]
        answers.append({"path": str(file), "predictions": guesses})
        rows.append([file, "", guesses[0]["class"], guesses[0]["probability"], ""])
        if args.json != "-":
            print(file)
            for guess in guesses:
                print(f"  {100 * guess['probability']:5.1f} %  {guess['class']}")
    write(args, answers, rows)
    return len(rows) == len(answers)


def open_store(args: argparse.Namespace, checkpoint: dict, count: int) -> ImageStore:
    """Return the images that a network of `count` classes was trained on.

    Raises:
        DataError: the classes are others.
    """
    trained = checkpoint["args"]
    cache = args.cache or (trained["cache"] if os.path.isdir(trained["cache"]) else DEFAULT_CACHE)
    # the split says which images are needed; others may be unreadable
    store = ImageStore(args.data or trained["data"], cache, skip_bad_images=True)
    if checkpoint.get("classes", store.classes) != store.classes or len(store.classes) != count:
        raise DataError(
            f"{store.root}: its {len(store.classes)} classes are not the {count} of {args.ckpt}; "
            "give the folder it was trained on with --data"
        )
    return store


def warn(args: argparse.Namespace, checkpoint: dict, store: ImageStore, manifest: dict) -> None:
    """Say on standard error what makes the result less than a test on unseen images."""
    note = functools.partial(print, "test.py:", file=sys.stderr)
    if "split" not in checkpoint:
        note(f"{args.ckpt}: has no split; --seed {args.seed} draws one, with images it may know")
    if checkpoint.get("fingerprint", store.fingerprint) != store.fingerprint:
        changes = store.differences(checkpoint.get("checksums", store.checksums)) or "some"
        note(f"{store.root}: images have changed since training: {changes}")
    if args.split != "train":
        seen = train.seen_images({"checksums": store.checksums, "split": manifest} | checkpoint)
        if known := [path for path in manifest[args.split] if store.checksums[path] in seen]:
            note(
                f"{len(known)} images, such as {known[0]!r}, were trained on: they are copies "
                "of training images, or the initial weights have seen them"
            )


def compare(args, paths: list[str], hits: torch.Tensor, store: ImageStore, rows, compute) -> dict:
    """Return the accuracy of `--versus` on the same images, how much better ours is, and p.

    Raises:
        DataError: its images or classes are others.
    """
    network, other = load_network(args.versus, args.stride)
    network = network.to(compute.device, memory_format=memory_format(compute.device))
    if sorted(other.get("split", {}).get(args.split, [])) != sorted(paths):
        raise DataError(
            f"{args.versus}: its {args.split} split is not that of {args.ckpt}: "
            f"{'another --seed, or other images' if 'split' in other else 'it has none'}"
        )
    if other.get("classes") != store.classes:  # labels mean other things
        raise DataError(f"{args.versus}: its classes are not those of {args.ckpt}")
    logits = train.evaluate(network, store, rows, other["args"]["test_size"], compute)
    other_hits = logits.argmax(1) == store.labels.cpu()[rows]
    ours, theirs = (100 * h.float().mean().item() for h in (hits, other_hits))
    return {
        "accuracy": theirs,
        "difference": ours - theirs,
        "p_value": mcnemar(hits, other_hits),
    }


def test_folder(args: argparse.Namespace, checkpoint: dict) -> Path:
    """Return the folder of the run that the checkpoint is from, or one of its name."""
    run = Path(checkpoint.get("run", Path("runs", Path(args.ckpt).stem)))
    if args.logdir or not os.access(run, os.W_OK):  # it was moved, or is another user's
        return Path(args.logdir or "runs", run.name)
    return run


def report(args, checkpoint: dict, store: ImageStore, paths: list[str], logits, result) -> None:
    """Print the result, write what was asked for, and log a test on the test split."""
    labels, names = store.labels.cpu()[store.rows(paths)], store.classes
    confidence, predicted = logits.softmax(1).max(1)
    losses = F.cross_entropy(logits, labels, reduction="none")
    columns = (paths, labels.tolist(), predicted.tolist(), confidence.tolist(), losses.tolist())
    rows = [[path, names[t], names[p], *more] for path, t, p, *more in zip(*columns, strict=True)]
    if args.json != "-":
        if "split" in checkpoint:
            accuracy = f"valid accuracy {checkpoint['valid_accuracy']:.2f} %"
            print(f"{args.ckpt}: epoch {checkpoint['epoch']}, {accuracy}")
        print(summary(result, args))
    write(args, result, rows)
    if args.split == "test":
        step = checkpoint.get("epoch", 0)
        with SummaryWriter(test_folder(args, checkpoint) / "test", purge_step=step) as writer:
            log_test(writer, step, result, logits, store, paths, losses)


def main(argv: list[str] | None = None) -> None:
    """Test or predict as `argv` says (default: the command line)."""
    args = parse(argv)
    network, checkpoint = load_network(args.ckpt, args.stride)
    compute = train.set_up(args.device, args.precision or checkpoint["args"]["precision"])
    network = network.to(compute.device, memory_format=memory_format(compute.device))
    if args.images:
        sys.exit(0 if compute.rank or predict(args, network, checkpoint, compute) else 1)

    with compute.first_on_machine():
        store = open_store(args, checkpoint, network.classifier[-1].out_features)
    manifest = checkpoint.get("split") or data.split(store, args.seed)
    paths, size = manifest[args.split], checkpoint["args"]["test_size"]
    rows = store.rows(paths)
    labels = store.labels[rows]
    store.move_to(compute.device)
    logits = train.evaluate(network, store, rows, size, compute)
    result = {"split": args.split, **metrics(logits, labels, store.classes)}
    if args.flip:
        mirrored = train.evaluate(network, store, rows, size, compute, flip=True)
        both = logits.softmax(1) + mirrored.softmax(1)
        result["flip_accuracy"] = train.score(both, labels)[1]
    if args.versus:
        result["versus"] = compare(args, paths, logits.argmax(1) == labels, store, rows, compute)
    if compute.rank == 0:
        warn(args, checkpoint, store, manifest)
        report(args, checkpoint, store, paths, logits, result)


if __name__ == "__main__":
    train.run_command(main)
