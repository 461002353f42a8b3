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
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2.functional import pil_to_tensor

from data import SUFFIXES, DataError, ImageStore, decode, default_cache, prepare, split
from model import CheckpointError, build, load, replacing
from train import (
    DEFAULTS,
    Parser,
    World,
    choose_precision,
    data_folder,
    device_name,
    evaluate,
    join_world,
    number,
    run_cli,
    score,
)

Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments; what was not given is None."""
    parser = Parser(prog="test.py", description=__doc__)
    parser.argument_default = None
    add = parser.add_argument
    add("--ckpt", default=DEFAULTS["ckpt"], help="checkpoint to test (default: %(default)s)")
    add("--split", choices=["test", "valid", "train"], default="test", help="(default: %(default)s)")
    add("--data", type=data_folder, help="as for train.py (default: where it was trained)")
    add("--cache", help="folder for the decoded images (default: the training's)")
    add(
        "--json", nargs="?", const="-", metavar="FILE", help="write the figures to FILE (without: print them)"
    )
    add("--predictions", metavar="FILE", help="write a CSV row for each image")
    add("--flip", action="store_true", help="also report the mean over each picture and its mirror image")
    add("--versus", metavar="FILE", help="compare with another checkpoint on the same images")
    add(
        "--images",
        nargs="+",
        metavar="PATH",
        help="name these pictures, or those in these folders; no data set",
    )
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="(default: the training's)")
    add("--logdir", help="write events under this folder (default: where the run's are)")
    add(
        "--seed",
        type=number(int, 0, 2**32),
        default=0,
        help="for a bare state_dict: the split's seed (default: 0)",
    )
    add(
        "--stride",
        type=int,
        choices=[2, 4],
        default=2,
        help="for a bare state_dict: the network's (default: 2)",
    )
    args = parser.parse_args(argv)
    if args.images and (args.versus or args.predictions or args.flip or args.data):
        parser.error("--images needs no data set: it goes with --ckpt, --json, --device and --precision only")
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
    images = torch.bincount(labels, minlength=len(classes))
    right = torch.bincount(labels[hits], minlength=len(classes))
    each = [100 * r / n if n else None for r, n in zip(right.tolist(), images.tolist(), strict=True)]
    present = [value for value in each if value is not None]
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
        "classes": [
            {"name": name, "images": n, "accuracy": value}
            for name, n, value in zip(classes, images.tolist(), each, strict=True)
        ],
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


# ---------------------------------------------------------------------------------------- pictures


def table(header: list[str], rows: list[list]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def confusion_picture(matrix: torch.Tensor, classes: list[str]) -> torch.Tensor:
    """Draw a confusion matrix (true, predicted) of counts, its rows normalised, as uint8 (3, H, W)."""
    cell = 10 if len(classes) > 40 else 24
    font = ImageFont.load_default(cell)
    margin = 12 + max(int(font.getlength(name)) for name in classes)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    ink = (255 * (1 - shares.sqrt())).byte()  # the root makes a single mistake visible
    cells = torch.stack([ink, ink, torch.full_like(ink, 255)], 2)  # white to blue
    cells = cells.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    side = cell * len(classes)
    picture = Image.new("RGB", (margin + side, side + margin), "white")
    picture.paste(Image.fromarray(cells.numpy()), (margin, 0))
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
    draw.text((6, side + 6), "rows: true\ncolumns: predicted", "black", font)
    return pil_to_tensor(picture)


def captioned_grid(images: torch.Tensor, captions: list[str], columns: int = 8) -> torch.Tensor:
    """Lay pictures, uint8 (N, 3, S, S), out in a grid, each over its caption, as uint8 (3, H, W)."""
    size, text = images.shape[-1], 58
    rows = -(-len(images) // columns)
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


def log_analysis(
    writer: SummaryWriter, result: dict, logits, labels, paths: list[str], images, step: int
) -> None:
    """Log figures, tables and pictures of a test.

    Args:
        result: as `figures` returns it.
        logits, labels, paths: of the images tested, in one order.
        images: returns the pictures, uint8 (n, 3, S, S), at given places in that order.
        step: the checkpoint's epoch.
    """
    classes = [entry["name"] for entry in result["classes"]]
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    for name in ("loss", "accuracy", "top5_accuracy", "mean_class_accuracy", "calibration_error"):
        writer.add_scalar(name, result[name], step)
    matrix = torch.zeros(len(classes), len(classes), dtype=torch.long)
    matrix.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    writer.add_image("confusion_matrix", confusion_picture(matrix, classes), step)
    writer.add_image(
        "reliability", reliability_picture(calibration(confidence, predicted == labels)[1]), step
    )

    losses = F.cross_entropy(logits, labels, reduction="none")
    wrong = [i for i in losses.argsort(descending=True).tolist() if predicted[i] != labels[i]][:32]
    captions = [
        f"{Path(paths[i]).name}\ntrue: {classes[labels[i]]}\n{classes[predicted[i]]}, {confidence[i]:.0%} sure"
        for i in wrong
    ]
    if wrong:
        writer.add_image("worst_mistakes", captioned_grid(images(wrong), captions), step)
    confused = matrix.clone().fill_diagonal_(0).flatten().topk(min(20, matrix.numel()))
    pairs = [
        [classes[place // len(classes)], classes[place % len(classes)], count]
        for count, place in zip(*map(torch.Tensor.tolist, confused), strict=True)
        if count
    ]
    writer.add_text("most_confused", table(["true", "predicted", "images"], pairs), step)
    ranked = sorted((e for e in result["classes"] if e["images"]), key=lambda entry: entry["accuracy"])
    rows = [[entry["name"], entry["images"], f"{entry['accuracy']:.1f}"] for entry in ranked]
    writer.add_text("classes", table(["class, worst first", "images", "accuracy, %"], rows), step)
    for entry in ranked[:5]:
        label = classes.index(entry["name"])
        writer.add_pr_curve(
            f"precision_recall/{entry['name']}", labels == label, probabilities[:, label], step
        )


# ------------------------------------------------------------------------------------------ commands


def predict(args: argparse.Namespace, checkpoint: dict, network: torch.nn.Module, world: World) -> bool:
    """Print the five likeliest classes of each of `--images`; return whether all could be read."""
    count = network.classifier[-1].out_features
    classes = checkpoint.get("classes", [f"class {index}" for index in range(count)])
    files = []
    for path in map(Path, args.images):
        inside = (
            sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        )
        files += inside
    answers = []
    dtype = choose_precision(world.device, args.precision)
    for path in files:
        try:
            image = decode(path).permute(2, 0, 1)[None].to(world.device)
        except Exception as error:  # Pillow raises almost anything on a damaged file
            reason = error if isinstance(error, FileNotFoundError) else "can't be read as a picture"
            print(f"test.py: {path}: {reason}", file=sys.stderr)
            answers.append({"path": str(path), "error": str(reason)})
            continue
        with torch.inference_mode(), torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
            logits = network(prepare(image))[0].float()
        likely = logits.softmax(0).cpu().topk(min(5, count))
        named = [
            {"class": classes[i], "probability": p}
            for p, i in zip(*map(torch.Tensor.tolist, likely), strict=True)
        ]
        answers.append({"path": str(path), "predictions": named})
        if args.json != "-":
            print(path)
            for entry in named:
                print(f"  {100 * entry['probability']:5.1f} %  {entry['class']}")
    write_json(args.json, answers)
    return bool(answers) and not any("error" in answer for answer in answers)


def write_json(target: str | None, value: object) -> None:
    """Write `value` to the file `target`, to standard output where that is `-`, nowhere for None."""
    if target == "-":
        print(json.dumps(value, indent=2))
    elif target:
        with replacing(target, "w") as file:
            json.dump(value, file, indent=2)


def open_network(path: str, stride: int, world: World) -> tuple[dict, torch.nn.Module]:
    """Return a checkpoint and its network, on the device."""
    checkpoint = load(path)
    try:
        network = build(checkpoint, stride)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return checkpoint, network.to(world.device, memory_format=torch.channels_last)


def main(argv: list[str] | None = None) -> None:
    """Test or predict as `argv` says (default: the command line)."""
    args = parse(argv)
    world = join_world(args.device)
    say = print if world.rank == 0 and args.json != "-" else lambda *_: None
    checkpoint, network = open_network(args.ckpt, args.stride, world)
    trained = checkpoint.get("args", {})
    args.precision = args.precision or trained.get("precision", "auto")
    if args.images:
        sys.exit(0 if predict(args, checkpoint, network, world) else 1)

    dtype = choose_precision(world.device, args.precision)
    cache = args.cache or trained.get("cache", "")
    with world.first_on_machine():
        store = ImageStore(
            args.data or trained.get("data", data_folder(DEFAULTS["data"])),
            cache if args.cache or (Path(cache).is_dir() and cache) else default_cache(),
            skip_bad_images=True,  # the manifest says which pictures are needed
        )
    store.move_to(world.device)
    bare = "split" not in checkpoint
    classes = checkpoint.get("classes", store.classes)
    if classes != store.classes or len(classes) != network.classifier[-1].out_features:
        raise DataError(
            f"{store.root}: its {len(store.classes)} classes are not the {network.classifier[-1].out_features} "
            f"of {args.ckpt}; give the folder it was trained on with --data"
        )
    manifest = split(store.paths, args.seed) if bare else checkpoint["split"]
    paths = manifest[args.split]
    rows = store.rows(paths)
    labels = store.labels[rows.to(store.labels.device)].cpu()
    if bare:
        say(
            f"{args.ckpt} holds no split: drawn from --seed {args.seed}; nothing shows that training left it alone"
        )
    else:
        say(f"{args.ckpt}: epoch {checkpoint['epoch']}, valid accuracy {checkpoint['valid_accuracy']:.2f} %")

    logits = evaluate(network, store, rows, world, dtype)
    hits = logits.argmax(1) == labels
    result = {"split": args.split, **figures(logits, labels, classes)}
    say(
        f"{args.split}: loss {result['loss']:.4f}  accuracy {result['accuracy']:.2f} % ({int(hits.sum())} of "
        f"{len(hits)}; 95 % interval {result['accuracy_low']:.1f} to {result['accuracy_high']:.1f})"
    )
    say(
        f"top-5 accuracy {result['top5_accuracy']:.2f} %  mean per-class accuracy "
        f"{result['mean_class_accuracy']:.2f} %  calibration error {result['calibration_error']:.2f} %"
    )
    if args.flip:
        mirrored = evaluate(network, store, rows, world, dtype, flip=True)
        both = logits.softmax(1) + mirrored.softmax(1)
        result["flip_accuracy"] = 100 * (both.argmax(1) == labels).float().mean().item()
        say(f"with the mirror image: accuracy {result['flip_accuracy']:.2f} %")
    if args.versus:
        other, other_network = open_network(args.versus, args.stride, world)
        if sorted(other.get("split", {}).get(args.split, [])) != sorted(paths):
            raise DataError(
                f"{args.versus}: its {args.split} split is not that of {args.ckpt}; nothing to compare"
            )
        other_hits = evaluate(other_network, store, rows, world, dtype).argmax(1) == labels
        accuracy, p = 100 * other_hits.float().mean().item(), mcnemar(hits, other_hits)
        result["versus"] = {"accuracy": accuracy, "difference": result["accuracy"] - accuracy, "p_value": p}
        say(
            f"versus {args.versus}: {accuracy:.2f} %, difference {result['accuracy'] - accuracy:+.2f}, p = {p:.3g}"
        )

    if world.rank == 0:
        write_json(args.json, result)
        if args.predictions:
            confidence, predicted = logits.softmax(1).max(1)
            losses = F.cross_entropy(logits, labels, reduction="none")
            with replacing(args.predictions, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["path", "true_class", "predicted_class", "confidence", "loss"])
                for path, t, p, c, loss in zip(paths, labels, predicted, confidence, losses, strict=True):
                    writer.writerow([path, classes[t], classes[p], c.item(), loss.item()])
        if args.split == "test":
            run = Path(checkpoint.get("run", Path("runs") / Path(args.ckpt).stem))
            if args.logdir or not run.is_dir():
                run = Path(args.logdir or "runs") / run.name
            step = checkpoint.get("epoch", 0)
            with SummaryWriter(run / "test", purge_step=step) as writer:
                log_analysis(
                    writer,
                    result,
                    logits,
                    labels,
                    paths,
                    lambda places: store.batch(rows[places], torch.device("cpu"))[0].cpu(),
                    step,
                )
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
