"""Test a checkpoint on the pictures that it was never trained on, or ask it about your own.

    python test.py --ckpt alexnet.pth
    python test.py --ckpt alexnet.pth --flip --versus other.pth
    python test.py --ckpt alexnet.pth --images cat.jpg folder/

The split lies in the checkpoint, so it is the one that training left alone, whatever the seed or the
order of the folder. Figures go to the log folder of the run that the checkpoint came from.
"""

import argparse
import csv
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
from torchvision.transforms.v2.functional import pil_to_tensor

import train
from data import SUFFIXES, DataError, ImageStore, layout, prepare, split, try_decode
from model import CheckpointError, build, load, replacing
from train import DEFAULTS, RECIPES, Compute, Parser, add_flag, evaluate, number, printable, run_cli, score, set_up

Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = Parser(prog="test.py", description=__doc__)
    add = parser.add_argument
    add("--ckpt", default=DEFAULTS["ckpt"], help="checkpoint to test (default: %(default)s)")
    add("--split", choices=["test", "valid", "train"], default="test", help="(default: %(default)s)")
    add("--data", help="as for train.py (default: where it was trained)")
    add("--cache", type=train.TEXT, help="folder for the decoded images (default: the training's)")
    add("--json", nargs="?", const="-", metavar="FILE", help="write the figures to FILE (without: print them)")
    add("--predictions", metavar="FILE", help="write a CSV row for each image")
    add("--flip", action="store_true", help="also report the mean over each picture and its mirror image")
    add("--versus", metavar="FILE", help="compare with another checkpoint on the same images")
    add("--images", nargs="+", metavar="PATH", help="name these pictures, or those in these folders; no data set")
    add_flag(parser, "device")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="(default: the training's)")
    add("--logdir", type=train.TEXT, help="write events under this folder (default: where the run's are)")
    add("--seed", type=number(int, 0, 2**32), default=0, help="for a bare state_dict: the split's seed (default: 0)")
    add("--stride", type=int, choices=[2, 4], default=2, help="for a bare state_dict: the network's (default: 2)")
    args = parser.parse_args(argv)
    for name in ("data", "cache", "split", "flip", "versus", "predictions", "logdir"):
        if args.images and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} needs the data set, which --images leaves alone; give one of the two")
    for name in ("json", "predictions"):  # before the work
        target = Path(getattr(args, name) or "-")
        place = target.parent if target.is_file() or not target.exists() else target  # a folder, device or pipe
        if str(target) != "-" and (target.is_dir() or not os.access(place, os.W_OK)):
            parser.error(f"--{name} {target}: can't be written there; make the folder or give another file")
    if args.predictions == "-":
        parser.error("--predictions -: only --json goes to standard output; give a file")
    return args


# ----------------------------------------------------------------------------------------- figures


def wilson(hits: int, images: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion, in percent (Wilson 1927, J. Am. Stat. Assoc. 22, 209)."""
    p, z2 = hits / images, Z95**2 / images
    middle, half = p + z2 / 2, Z95 * math.sqrt(p * (1 - p) / images + z2 / (4 * images))
    return 100 * (middle - half) / (1 + z2), 100 * (middle + half) / (1 + z2)


def mcnemar(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the exact two-sided p-value of McNemar's test on two classifiers' hits, bool (N,)."""
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def figures(logits: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> dict:
    """Return what `--json` holds, from logits (N, classes) and labels (N,); accuracies in percent.

    The mean per-class accuracy is over the classes that have images.
    """
    loss, accuracy = score(logits, labels)
    hits = logits.argmax(1) == labels
    top5 = (logits.topk(min(5, len(classes))).indices == labels[:, None]).any(1)
    images, right = (torch.bincount(which, minlength=len(classes)).tolist() for which in (labels, labels[hits]))
    each = [
        {"name": name, "images": n, "accuracy": 100 * r / n if n else None}
        for name, n, r in zip(classes, images, right, strict=True)
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
        "calibration_error": calibration(logits.softmax(1).amax(1), hits)[0],
        "classes": each,
    }


def calibration(confidence: torch.Tensor, hits: torch.Tensor, bins: int = 10) -> tuple[float, torch.Tensor]:
    """Return the expected calibration error in percent (https://arxiv.org/abs/1706.04599) and its bins.

    The bins, evenly wide in confidence, are (bins, 3): share of the images, mean confidence, accuracy.
    """
    place = (confidence * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins)
    filled = count.clamp(min=1)
    mean = torch.bincount(place, confidence.double(), bins) / filled
    right = torch.bincount(place, hits.double(), bins) / filled
    share = count / len(hits)
    return 100 * (share * (mean - right).abs()).sum().item(), torch.stack([share, mean, right], 1)


def summary(result: dict, other: str | None) -> str:
    """Return what `--json` holds in lines for people; `other` is the file that was compared with."""
    images, accuracy = result["images"], result["accuracy"]
    lines = [
        f"{result['split']}: loss {result['loss']:.4f}  accuracy {accuracy:.2f} % ({accuracy * images / 100:.0f} of "
        f"{images} images; 95 % interval {result['accuracy_low']:.1f} to {result['accuracy_high']:.1f})",
        f"top-5 accuracy {result['top5_accuracy']:.2f} %  mean per-class accuracy "
        f"{result['mean_class_accuracy']:.2f} %  calibration error {result['calibration_error']:.2f} %",
    ]
    if "flip_accuracy" in result:
        lines.append(f"with the mirror image: accuracy {result['flip_accuracy']:.2f} %")
    if other:
        versus = result["versus"]
        lines.append(
            f"versus {other}: accuracy {versus['accuracy']:.2f} %, difference {versus['difference']:+.2f}, "
            f"p = {versus['p_value']:.3g} (McNemar, exact)"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- pictures


def confusion_picture(matrix: torch.Tensor, classes: list[str]) -> torch.Tensor:
    """Draw a confusion matrix (true, predicted) of counts, its rows normalised, as uint8 (3, H, W)."""
    cell = 10 if len(classes) > 40 else 24
    font = ImageFont.load_default(cell)
    margin = 12 + max(int(font.getlength(name)) for name in classes)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    ink = (255 * (1 - shares.sqrt())).byte()  # the root makes a single mistake visible
    cells = torch.stack([ink, ink, torch.full_like(ink, 255)], 2)  # white to blue
    side = cell * len(classes)
    picture = Image.new("RGB", (margin + side, side + margin), "white")
    picture.paste(Image.fromarray(cells.numpy()).resize((side, side), Image.Resampling.NEAREST), (margin, 0))
    names = Image.new("RGB", (margin, side), "white")
    draw = ImageDraw.Draw(names)
    for index, name in enumerate(classes):
        draw.text((margin - 6, (index + 0.5) * cell), name, "black", font, anchor="rm")
    picture.paste(names, (0, 0))
    picture.paste(names.transpose(Image.Transpose.ROTATE_90), (margin, side))
    draw = ImageDraw.Draw(picture)
    for index in range(0, len(classes) + 1, 5):
        draw.line([(0, index * cell), (margin + side, index * cell)], "#cccccc")
        draw.line([(margin + index * cell, 0), (margin + index * cell, side + margin)], "#cccccc")
    draw.text((6, side + 6), "rows: true\ncolumns:\npredicted", "black", font)
    return pil_to_tensor(picture)


def captioned_grid(images: torch.Tensor, captions: list[str], columns: int = 8) -> torch.Tensor:
    """Lay pictures, uint8 (N, 3, S, S), out in a grid, each over its caption, as uint8 (3, H, W)."""
    size, text = images.shape[-1], 58
    rows = math.ceil(len(images) / columns)
    picture = Image.new("RGB", (columns * (size + 6), rows * (size + text)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = index % columns * (size + 6), index // columns * (size + text)
        picture.paste(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), (x, y))
        draw.text((x + 2, y + size + 2), caption, "black", font)
    return pil_to_tensor(picture)


def reliability_picture(bins: torch.Tensor, size: int = 400) -> torch.Tensor:
    """Draw accuracy over confidence as bars, from `calibration`'s bins, as uint8 (3, size, size)."""
    picture = Image.new("RGB", (size, size), "white")
    draw, font, edge = ImageDraw.Draw(picture), ImageFont.load_default(14), 40
    span, wide = size - 2 * edge, (size - 2 * edge) / len(bins)
    for index, (share, _, accuracy) in enumerate(bins.tolist()):
        left, top = edge + index * wide, size - edge - accuracy * span
        draw.rectangle((left, top, left + wide, size - edge), "#4c72b0" if share else "white", "black")
    draw.line((edge, size - edge, size - edge, edge), "#c44e52", 2)
    draw.text((size / 2, size - edge / 2), "confidence, 0 to 100 %", "black", font, anchor="mm")
    draw.text((edge, edge / 2), "accuracy, 0 to 100 %; on the line: calibrated", "black", font, anchor="lm")
    return pil_to_tensor(picture)


def log_analysis(writer: SummaryWriter, result: dict, logits, labels, paths: list[str], store, rows, step: int) -> None:
    """Log figures, tables and pictures of a test.

    Args:
        result: as `figures` returns it.
        logits, labels, paths: of the images tested, in one order.
        store, rows: where their pictures are.
        step: the checkpoint's epoch.
    """
    classes = [printable(entry["name"]) for entry in result["classes"]]
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    for name in ("loss", "accuracy", "top5_accuracy", "mean_class_accuracy", "calibration_error"):
        writer.add_scalar(name, result[name], step)
    matrix = torch.bincount(labels * len(classes) + predicted, minlength=len(classes) ** 2).view(len(classes), -1)
    writer.add_image("confusion_matrix", confusion_picture(matrix, classes), step)
    writer.add_image("reliability", reliability_picture(calibration(confidence, predicted == labels)[1]), step)

    losses = F.cross_entropy(logits, labels, reduction="none")
    wrong = [i for i in losses.argsort(descending=True).tolist() if predicted[i] != labels[i]][:32]
    captions = [
        f"{printable(Path(paths[i]).name)}\n"
        f"true: {classes[labels[i]]}\n{classes[predicted[i]]}, {confidence[i]:.0%} sure"
        for i in wrong
    ]
    if wrong:
        pictures, _ = store.batch(rows[wrong], torch.device("cpu"))
        writer.add_image("worst_mistakes", captioned_grid(pictures, captions), step)
    confused = Counter(pair for pair in zip(labels.tolist(), predicted.tolist(), strict=True) if pair[0] != pair[1])
    pairs = [[classes[true], classes[guess], count] for (true, guess), count in confused.most_common(20)]
    writer.add_text("most_confused", train.table(["true", "predicted", "images"], pairs), step)
    ranked = sorted((entry["accuracy"], label) for label, entry in enumerate(result["classes"]) if entry["images"])
    lines = [[classes[label], result["classes"][label]["images"], f"{accuracy:.1f}"] for accuracy, label in ranked]
    writer.add_text("classes", train.table(["class, worst first", "images", "accuracy, %"], lines), step)
    for _, label in ranked[:5]:
        writer.add_pr_curve(f"precision_recall/{classes[label]}", labels == label, probabilities[:, label], step)


# ------------------------------------------------------------------------------------------ commands


def predict(args: argparse.Namespace, checkpoint: dict, network: torch.nn.Module, size: int, compute: Compute) -> bool:
    """Print the five likeliest classes of each of `--images`; return whether all could be read."""
    count = network.classifier[-1].out_features
    classes = checkpoint.get("classes", [f"class {label}" for label in range(count)])
    answers = []
    for path in map(Path, args.images):
        inside = [path]
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()]
            inside = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        answers += [name_picture(file, classes, network, size, compute) for file in inside]
        if not inside:
            answers.append({"path": str(path), "error": "no pictures in this folder"})
    for answer in answers:
        if "error" in answer:
            print(f"test.py: {answer['path']}: {answer['error']}", file=sys.stderr)
        elif args.json != "-":
            print(answer["path"])
            for guess in answer["predictions"]:
                print(f"  {100 * guess['probability']:5.1f} %  {guess['class']}")
    write_json(args.json, answers)
    return not any("error" in answer for answer in answers)


@torch.inference_mode()
def name_picture(path: Path, classes: list[str], network: torch.nn.Module, size: int, compute: Compute) -> dict:
    """Return a picture's path with its likeliest classes and their probabilities, or with an error."""
    image, checksum = try_decode(path)
    if not checksum:
        return {"path": str(path), "error": "can't be read as a picture" if path.is_file() else "no such file"}
    with compute.autocast():
        logits = network(prepare(image.permute(2, 0, 1)[None].to(compute.device), size))
    likely = logits[0].float().softmax(0).topk(min(5, len(classes)))
    guesses = zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
    return {"path": str(path), "predictions": [{"class": classes[i], "probability": p} for i, p in guesses]}


def write_json(target: str | None, value: object) -> None:
    """Write `value` to the file `target`, to standard output where that is `-`, nowhere for None."""
    if target == "-":
        print(json.dumps(value, indent=2))
    elif target:
        with replacing(target, "w") as file:
            json.dump(value, file, indent=2)


def write_predictions(target: str, logits: torch.Tensor, labels: torch.Tensor, classes: list[str], paths: list[str]):
    """Write a CSV file with a row for each image."""
    confidence, predicted = logits.softmax(1).max(1)
    losses = F.cross_entropy(logits, labels, reduction="none")
    columns = (paths, labels.tolist(), predicted.tolist(), confidence.tolist(), losses.tolist())
    with replacing(target, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "true_class", "predicted_class", "confidence", "loss"])
        for path, true, guess, *numbers in zip(*columns, strict=True):
            writer.writerow([path, classes[true], classes[guess], *numbers])


def trained_with(checkpoint: dict) -> dict:
    """Return the arguments of training; for a bare `state_dict`, those of the report."""
    return DEFAULTS | RECIPES["report"] | checkpoint.get("args", {})


def build_from(path: str, checkpoint: dict, stride: int, compute: Compute) -> torch.nn.Module:
    """Return the network of the checkpoint that was read from `path`, on the device."""
    try:
        if "optimizer" in checkpoint:
            raise CheckpointError("is there for --resume; test the best checkpoint, which lies beside it")
        return build(checkpoint, stride).to(compute.device, memory_format=layout(compute.device))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def open_store(args: argparse.Namespace, checkpoint: dict, count: int) -> ImageStore:
    """Open the data set that the checkpoint, a network of `count` classes, was trained on.

    Raises:
        DataError: its classes are others.
    """
    trained = trained_with(checkpoint)
    cache = args.cache or (trained["cache"] if Path(trained["cache"]).is_dir() else DEFAULTS["cache"])
    # the manifest says which pictures are needed: others may well be unreadable
    store = ImageStore(args.data or trained["data"], cache, skip_bad_images=True)
    if checkpoint.get("classes", store.classes) != store.classes or len(store.classes) != count:
        raise DataError(
            f"{store.root}: its {len(store.classes)} classes are not the {count} of {args.ckpt}; "
            "give the folder it was trained on with --data"
        )
    return store


def main(argv: list[str] | None = None) -> None:
    """Test or predict as `argv` says (default: the command line)."""
    args = parse(argv)
    checkpoint = load(args.ckpt)
    trained = trained_with(checkpoint)
    compute = set_up(args.device or "auto", args.precision or trained["precision"])
    network = build_from(args.ckpt, checkpoint, args.stride, compute)
    if args.images:
        sys.exit(0 if compute.rank or predict(args, checkpoint, network, trained["test_size"], compute) else 1)

    say = print if compute.rank == 0 and args.json != "-" else lambda _: None
    with compute.first_on_machine():
        store = open_store(args, checkpoint, network.classifier[-1].out_features)
    store.move_to(compute.device)
    if "split" in checkpoint:
        say(f"{args.ckpt}: epoch {checkpoint['epoch']}, valid accuracy {checkpoint['valid_accuracy']:.2f} %")
    elif compute.rank == 0:
        problem = f"holds no split: it is drawn from --seed {args.seed}, and can't be checked"
        print(f"test.py: {args.ckpt}: {problem}", file=sys.stderr)
    paths = (checkpoint["split"] if "split" in checkpoint else split(store.paths, args.seed))[args.split]
    rows = store.rows(paths)
    labels = store.labels.cpu()[rows]
    if compute.rank == 0 and checkpoint.get("fingerprint", store.fingerprint) != store.fingerprint:
        print(
            f"test.py: {store.root}: images have changed since the training, which may have seen these", file=sys.stderr
        )

    logits = evaluate(network, store, rows, trained["test_size"], compute)
    result = {"split": args.split, **figures(logits, labels, store.classes)}
    if args.flip:
        both = logits.softmax(1) + evaluate(network, store, rows, trained["test_size"], compute, flip=True).softmax(1)
        result["flip_accuracy"] = score(both, labels)[1]
    if args.versus:
        result["versus"] = compare(args, paths, logits.argmax(1) == labels, store, rows, compute)
    say(summary(result, args.versus))
    if compute.rank == 0:
        write_json(args.json, result)
        if args.predictions:
            write_predictions(args.predictions, logits, labels, store.classes, paths)
        if args.split == "test":
            run = Path(checkpoint.get("run", Path("runs", Path(args.ckpt).stem)))
            if args.logdir or not os.access(run, os.W_OK):  # moved, or trained elsewhere or by another user
                run = Path(args.logdir or "runs", run.name)
            step = checkpoint.get("epoch", 0)
            with SummaryWriter(run / "test", purge_step=step) as writer:
                log_analysis(writer, result, logits, labels, paths, store, rows, step)


def compare(args, paths: list[str], hits: torch.Tensor, store, rows: torch.Tensor, compute: Compute) -> dict:
    """Return `--versus`'s accuracy on the same images, the difference to ours, and its p-value.

    Raises:
        DataError: the other checkpoint's images or classes are others.
    """
    other = load(args.versus)
    if sorted(other.get("split", {}).get(args.split, [])) != sorted(paths):
        raise DataError(f"{args.versus}: its {args.split} split is not that of {args.ckpt}; nothing to compare")
    if other.get("classes") != store.classes:  # else its labels would mean other things
        raise DataError(f"{args.versus}: its classes are not those of {args.ckpt}; nothing to compare")
    network = build_from(args.versus, other, args.stride, compute)
    labels = store.labels.cpu()[rows]
    size = trained_with(other)["test_size"]
    other_hits = evaluate(network, store, rows, size, compute).argmax(1) == labels
    ours, theirs = (100 * h.float().mean().item() for h in (hits, other_hits))
    return {"accuracy": theirs, "difference": ours - theirs, "p_value": mcnemar(hits, other_hits)}


if __name__ == "__main__":
    run_cli(main)
