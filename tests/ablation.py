"""Take each ingredient of the strong recipe out, and print what validation says.

    python tests/ablation.py --data DIR --out FOLDER            # one run after the other
    python tests/ablation.py --data DIR --out FOLDER --jobs 4   # four runs at once

A run is in a folder of its own. The script can be interrupted at any time: the next start skips the
runs that are complete, and resumes the others.
"""

import argparse
import functools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

PROGRAM = Path(__file__).resolve().parent.parent
TAKEN_OUT = {
    "nothing": "",
    "TrivialAugment": "--augment crop,color,gray",
    "colour changes": "--augment crop,gray,trivial",
    "grey images": "--augment crop,color,trivial",
    "crops": "--augment color,gray,trivial",
    "CutMix": "--cutmix 0",
    "two passes over each image": "--repeats 1",
    "logit adjustment": "--logit-adjustment 0",
    "label smoothing": "--label-smoothing 0",
    "weight decay": "--weight-decay 0",
    "dropout of 0.3 instead of the report's 0.5": "--dropout 0.5",
    "averaged weights": "--ema 0",
    "growing images": "--train-size 128",
    "warm-up": "--warmup-epochs 0",
    "learning rate of 3e-4 instead of the report's 1e-4": "--lr 1e-4",
    "whitening filters": "--init he",
    "whitening filters and He's weights": "--init default",
}


def run(args: argparse.Namespace, setting: tuple[str, int]) -> tuple[float, float]:
    """Return accuracy and mean per-class accuracy on validation of (name, seed), in percent."""
    name, seed = setting
    folder = args.out.resolve() / f"{TAKEN_OUT[name] or 'nothing'}-{seed}".strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "valid.json"
    flags = f"--recipe strong --epochs {args.epochs} --seed {seed} {TAKEN_OUT[name]}".split()
    if (folder / "alexnet.last.pth").exists():
        flags = ["--resume"]
    commands = [
        ["train.py", "--data", args.data.resolve(), *flags],
        ["test.py", "--split", "valid", "--json", result],
    ]
    for program, *argv in [] if result.exists() else commands:
        with open(folder / "output.txt", "a") as output:
            command = [sys.executable, PROGRAM / program, *map(str, argv)]
            subprocess.run(command, cwd=folder, stdout=output, stderr=output, check=True)
    for checkpoint in folder.glob("*.pth"):  # over a gigabyte
        checkpoint.unlink()
    found = json.loads(result.read_text())
    print(f"{name}, seed {seed}: {found['accuracy']:.2f} %", file=sys.stderr, flush=True)
    return found["accuracy"], found["mean_class_accuracy"]


def main() -> None:
    """Run what is missing; print the table."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **options)
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11], help="of each setting")
    parser.add_argument("--epochs", type=int, default=30, help="of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    args = parser.parse_args()
    settings = [(name, seed) for name in TAKEN_OUT for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        figures = dict(zip(settings, pool.map(functools.partial(run, args), settings), strict=True))
    print("| taken out | validation, seeds in turn | difference | per class |\n|---|---|---|---|")
    for name, flag in TAKEN_OUT.items():
        rows = [figures[name, seed] for seed in args.seeds]
        change = mean(figures[name, s][0] - figures["nothing", s][0] for s in args.seeds)
        accuracies, each = (", ".join(f"{v:.2f}" for v in c) for c in zip(*rows, strict=True))
        print(f"| {name}{f': `{flag}`' if flag else ''} | {accuracies} | {change:+.2f} | {each} |")


if __name__ == "__main__":
    main()
