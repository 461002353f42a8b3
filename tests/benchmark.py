"""Measure what makes this program fast, against the loop that a person would otherwise write.

    python tests/benchmark.py                                  # on the drawn sample, on the CPU
    python tests/benchmark.py --data DIR --device cuda --runs  # also both recipes, start to test

Each variant is a process of its own that trains real steps, data loading included. They take turns,
so that whatever else the machine does falls on all of them; medians over the turns are printed.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: I001  before torch, for it chooses how memory is allocated
import torch
from torch.profiler import ProfilerActivity, profile
from torchvision import datasets, transforms

import data
from model import AlexNet

BATCH = 64


def timed(function, seconds: dict, part: str):
    """Return `function`; the time of each call is added to seconds[part]."""

    def call(*args, **options):
        started = time.perf_counter()
        result = function(*args, **options)
        seconds[part] = seconds.get(part, 0) + time.perf_counter() - started
        return result

    return call


class Turns:
    """Stands where train.py looks for signals after a step, and waits there for its turn.

    A line of standard input is a turn, a number of steps. It prints their seconds, those of waiting
    for data, and GB of GPU memory. On a GPU, other steps first use up what loaders have prepared.
    """

    def __init__(self, device: str, workers: int = 0):
        self.cuda, self.steps, self.parts = device == "cuda", 0, {}
        self.left, self.extra = (20, 2 * workers + 4) if self.cuda else (1, 0)

    def check(self) -> None:
        self.left -= 1
        if not self.left:
            if self.steps:
                seconds, memory = self.now() - self.started, torch.cuda.max_memory_reserved()
                print(seconds, self.parts["waiting"], memory / 1e9, flush=True)
            self.steps = int(sys.stdin.readline() or sys.exit())
            self.left = self.extra + self.steps
        if self.left == self.steps:
            self.started, self.parts["waiting"] = self.now(), 0.0

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()  # until all steps are done
        return time.perf_counter()


def plain_loop(args: argparse.Namespace, workers: int) -> None:
    """Train the report's loop: images decoded every epoch, fp32, .item() in each step."""
    turns = Turns(args.device, workers)
    transform = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    folder = datasets.ImageFolder(args.store.root, transform)
    network = AlexNet(len(folder.classes), args.stride).to(args.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    loader = torch.utils.data.DataLoader(folder, BATCH, True, num_workers=workers, drop_last=True)
    while True:
        fetch = timed(iter(loader).__next__, turns.parts, "waiting")
        for _ in range(len(loader)):
            images, labels = (tensor.to(args.device) for tensor in fetch())
            optimizer.zero_grad()
            logits = network(images)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            loss.item(), (logits.argmax(1) == labels).sum().item()
            turns.check()


def build(args: argparse.Namespace, precision: str = "auto") -> tuple[train.Trainer, dict]:
    """Return train.py's trainer, whose epoch has whole batches alone, and the split."""
    train.print0 = lambda *_: None  # standard output is for the turns
    options, _ = train.parse([*args.flags, "--recipe", args.recipe, "--precision", precision])
    compute = train.set_up(options.device, options.precision)
    trainer, about = train.build_trainer(options, None, compute)
    trainer.rows = trainer.rows[: len(trainer.rows) // BATCH * BATCH]
    trainer.steps_per_epoch = len(trainer.rows) * options.repeats // BATCH
    return trainer, about["split"]


def train_epoch(trainer: train.Trainer, stop) -> None:
    """Train the first epoch, as train.py does; it can be trained again."""
    train.train_epoch(trainer, stop)
    trainer.step, trainer.seconds = 0, 0.0
    trainer.sums.zero_()


def train_in_turns(args: argparse.Namespace, program: str, choice: str) -> None:
    """Train as the plain loop does with `choice` workers, or train.py in that precision."""
    if program == "plain":
        return plain_loop(args, int(choice))
    (trainer, _), turns = build(args, choice), Turns(args.device)
    trainer.inputs = timed(trainer.inputs, turns.parts, "waiting")
    while True:
        train_epoch(trainer, turns)


def take_turn(child: subprocess.Popen, steps: int) -> list[float]:
    """Let a process take a turn; return what it prints, and its peak of memory in GB."""
    print(steps, file=child.stdin, flush=True)
    status, peak = Path(f"/proc/{child.pid}/status"), 0.0  # anonymous memory, on Linux
    while not select.select([child.stdout], [], [], 0.02)[0]:
        lines = status.read_text().splitlines() if status.exists() else []
        peak = max([peak, *(int(line.split()[1]) / 1e6 for line in lines if "RssAnon" in line)])
    seconds, waited, gpu = map(float, child.stdout.readline().split())
    return [seconds, waited, gpu or peak]


def show(title: str, value: float, unit: str, digits: int = 1) -> None:
    """Print a line of the table."""
    print(f"{title:60} {value:9.{digits}f} {unit}", flush=True)


def python(folder: str, *argv) -> float:
    """Run Python on `argv` in `folder`; return the seconds that it takes."""
    command, paths = [sys.executable, *map(str, argv)], {**os.environ, "PYTHONPATH": sys.path[0]}
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=paths, check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - started


def measure_steps(args: argparse.Namespace) -> None:
    """Print the rate of each variant, its share of waiting and its memory."""
    variants = {f"plain {n}": f"plain loop, fp32, {n} loader workers" for n in args.workers}
    variants |= {"train fp32": "train.py --precision fp32", "train auto": "train.py as it comes"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    children = {name: subprocess.Popen([*command, name], **pipes) for name in variants}
    turns = {name: [] for name in variants}
    for _ in range(args.turns):
        for name, child in children.items():
            turns[name].append(take_turn(child, args.steps))
    for child in children.values():
        child.communicate()
    for letter, (name, title) in zip("abcde", variants.items(), strict=False):
        seconds, waited, memory = zip(*turns[name], strict=True)
        ratio = median(a[0] / s for a, s in zip(turns["plain 0"], seconds, strict=True))
        share = 100 * median(w / s for w, s in zip(waited, seconds, strict=True))
        more = f"{ratio:6.2f} x (a), {share:5.1f} % waits for data, {max(memory):.2f} GB"
        show(f"({letter}) {title}", args.steps * BATCH / median(seconds), f"images/s {more}")


def measure_rest(args: argparse.Namespace) -> None:
    """Print rates of evaluation and decoding, seconds to the first step, and how busy a GPU is."""
    trainer, manifest = build(args)
    store, compute, parts = trainer.store, trainer.compute, {}
    rows, size = store.rows(manifest["valid"]), trainer.args.test_size

    def evaluate(part: str):
        timed(train.evaluate, parts, part)(trainer.evaluated, store, rows, size, compute)

    def epoch():
        train_epoch(trainer, train.StopSignal(compute))
        evaluate("validation")  # it ends with a copy to the CPU

    for part in ("warm-up", "evaluation"):
        evaluate(part)
    show("evaluation", len(rows) / parts["evaluation"], "images/s")
    stop = "import os, train; train.Trainer.train_step = lambda *_: os._exit(0); train.main()"
    with tempfile.TemporaryDirectory() as folder:
        some = store.paths[:2000]
        timed(data.build_cache, parts, "decoding")(store.root, some, Path(folder, "0-0"))
        show("building the cache", len(some) / parts["decoding"], "images/s", 0)
        starts = [python(folder, "-c", stop, *args.flags) for _ in range(3)]
        show("process start to first step, images decoded before", median(starts), "s", 2)
        if args.device == "cuda":
            for part in ("warm-up", "epoch"):
                timed(epoch, parts, part)()
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                epoch()  # slower by the profiler, so only the times of the kernels are used
            profiled.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
            work = [e["dur"] for e in events if e.get("cat", "").startswith(("kernel", "gpu_mem"))]
            share = 100 * sum(work) / 1e6 / parts["epoch"]
            show(f"GPU at work, of {parts['epoch']:.3f} s of epoch and validation", share, "%")


def measure_run(args: argparse.Namespace, recipe: str) -> None:
    """Print the seconds from the start of a process, nothing decoded, to a tested checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        more = f"--recipe {recipe} --epochs {args.epochs} --cache cache".split()
        training = python(folder, __file__, "--timed", *args.flags, *more)
        more = [*args.flags[-2:], "--json", "test.json"]  # the device
        testing = python(folder, f"{sys.path[0]}/test.py", *more)
        parts = json.loads(Path(folder, "parts.json").read_text())
        accuracy = json.loads(Path(folder, "test.json").read_text())["accuracy"]
    parts |= {"starting and the rest": training - sum(parts.values()), "test.py": testing}
    done = f"{accuracy:.2f} % of the test images"
    show(f"{recipe}, {args.epochs} epochs: start to {done}", training + testing, "s")
    for name, seconds in parts.items():
        show(f"  {name}", seconds, "s")


def train_timed(argv: list[str]) -> None:
    """Do what `train.py ARGV` does; write the seconds of its parts to parts.json."""
    parts, timings = {}, {data: ["build_cache"], train: ["train_epoch", "evaluate", "save"]}
    for owner, names in (timings | {train.Log: ["start", "epoch"]}).items():
        for name in names:
            setattr(owner, name, timed(getattr(owner, name), parts, f"{owner.__name__}.{name}"))
    sys.argv = ["train.py", *argv]
    train.run_command(train.main)
    Path("parts.json").write_text(json.dumps(parts))


def main() -> None:
    """Measure as the command line says."""
    if sys.argv[1:2] == ["--timed"]:
        return train_timed(sys.argv[2:])
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", default="sample", help="as for train.py")
    add("--recipe", choices=list(train.RECIPES), default="report", help="to train in turns")
    add("--stride", type=int, choices=[2, 4], default=2, help="as for train.py")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="to train on")
    add("--turns", type=int, default=5, help="of each variant")
    add("--steps", type=int, help="in a turn; None: 2 on the CPU, 60 on a GPU")
    add("--runs", action="store_true", help="also time whole runs of both recipes")
    add("--epochs", type=int, default=30, help="of --runs")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    where = args.data if args.data == "sample" else os.path.abspath(args.data)
    args.flags = ["--data", where, "--stride", str(args.stride), "--device", args.device]
    args.steps = args.steps or (60 if args.device == "cuda" else 2)
    args.workers = [0, 4, 8] if args.device == "cuda" else [0, 2]
    args.store = data.ImageStore(where, data.DEFAULT_CACHE)  # decoded here, once
    if args.child:
        return train_in_turns(args, *args.child.split())
    device = f"{train.device_name(torch.device(args.device))}, torch {torch.__version__}"
    show(f"{args.recipe}, stride {args.stride}, on {device}", len(args.store.paths), "images", 0)
    measure_steps(args)
    measure_rest(args)
    for recipe in train.RECIPES if args.runs else ():
        measure_run(args, recipe)


if __name__ == "__main__":
    main()
