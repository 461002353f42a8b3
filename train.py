"""Train AlexNet from scratch on Caltech101, or on any folder of class folders.

    python train.py --epochs 30 --lr 1e-4       # the report's experiment
    python train.py --recipe strong             # more accurate, in less time
    python train.py --resume                    # go on where a run was interrupted
    torchrun --standalone --nproc-per-node=4 train.py --epochs 30 --lr 1e-4

Random numbers are looked up, never carried: the order and the augmentation of an epoch depend on
the seed and the epoch, dropout on the step as well. So a run that goes on from any step, in any
number of processes, sees the very numbers that an unbroken one does.
"""

import argparse
import contextlib
import csv
import difflib
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid
from tqdm import tqdm

import data
from data import UNIFORMS, DataError, ImageStore, generator, prepare, seed_of, split
from model import FORMAT, AlexNet, CheckpointError, check_writable, init_he, load, replacing, save

RECIPES = {  # a recipe is a set of defaults for ordinary flags
    "report": {
        "lr": 1e-4,
        "schedule": "constant",
        "warmup_epochs": 0,
        "weight_decay": 0.0,
        "label_smoothing": 0.0,
        "augment": "none",
        "train_size": "224",
        "ema": 0.0,
        "init": "default",
    },
    "strong": {
        "lr": 3e-4,
        "schedule": "cosine",
        "warmup_epochs": 2,
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
        "augment": "crop,flip,color",
        "train_size": "128-224",
        "ema": 0.998,
        "init": "he",
    },
}
DEFAULTS = RECIPES["report"] | {
    "recipe": "report",
    "epochs": 30,
    "batch_size": 64,
    "seed": 0,
    "stride": 2,
    "dropout": 0.5,
    "data": os.path.abspath(data.DEFAULT_DATA),
    "cache": data.default_cache(),
    "skip_bad_images": False,
    "device": "auto",
    "precision": "auto",
    "compile": False,
    "deterministic": False,
    "bf16_gradients": False,
    "ckpt": "alexnet.pth",
    "resume": False,
    "logdir": "runs",
    "name": None,
}
MAY_CHANGE = {"epochs", "data", "cache", "device", "ckpt", "logdir", "resume"}  # when a run goes on
EVAL_BATCH = 128  # images in a batch without gradients


class TrainingError(Exception):
    """Training can't go on; the message says what to change."""


class Interrupted(Exception):
    """SIGINT or SIGTERM asked the program to stop."""

    def __init__(self, signum: int, advice: str = "nothing was trained yet"):
        super().__init__(f"interrupted; {advice}")
        self.signum = signum


# ---------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest flag for a misspelt one."""

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

    def error(self, message: str):
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        if os.environ.get("RANK", "0") != "0":
            sys.exit(2)
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def number(kind: type, low: float, high: float):
    """Return a parser of numbers from `low` to `high`, for argparse's `type`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not low <= value <= high:  # NaN is outside too
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, not {text}")
        return value

    return parse


def augmentations(text: str) -> str:
    """Check a comma-separated list of augmentations, for argparse's `type`."""
    if unknown := set(text.split(",")) - {*data.AUGMENTATIONS, "none"}:
        known = ",".join(data.AUGMENTATIONS)
        raise argparse.ArgumentTypeError(f"{sorted(unknown)[0]!r} is not one of {known} or none")
    return text


def size_range(text: str) -> str:
    """Check `S` or `S-T`, pixels, for argparse's `type`."""
    if not re.fullmatch(r"\d{2,3}(-\d{2,3})?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a size such as 224 nor a range such as 128-224"
        )
    for size in text.split("-"):
        number(int, 64, 448)(size)
    return text


def data_folder(text: str) -> str:
    """Make a data folder absolute, so that a checkpoint's is found from anywhere."""
    return text if text == "sample" else os.path.abspath(text)


def device_name(text: str) -> str:
    """Check a device's name, for argparse's `type`."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda, cuda:N, mps")
    return text


FLAGS = {  # by group: the type, or the choices, and the help
    "experiment": {
        "recipe": (list(RECIPES), "defaults for the flags that name one for each"),
        "epochs": (number(int, 1, 100_000), "passes over the training images"),
        "batch_size": (number(int, 1, 65_536), "images in a step, over all processes"),
        "lr": (number(float, 1e-12, 100), "peak learning rate of Adam"),
        "schedule": (["constant", "cosine"], "of the learning rate, after the warm-up"),
        "warmup_epochs": (number(int, 0, 10_000), "in which the rate rises from 0"),
        "weight_decay": (number(float, 0, 100), "decoupled, as in AdamW"),
        "label_smoothing": (number(float, 0, 1), "share of the target that all classes get evenly"),
        "augment": (augmentations, f"none, or any of {','.join(data.AUGMENTATIONS)}"),
        "train_size": (size_range, "pixels a side; A-B grows from A to B over the first 80 %% of the epochs"),
        "ema": (number(float, 0, 1), "decay a step of the averaged weights, then validated and saved; 0: none"),
        "init": (["default", "he"], "initial weights: PyTorch's or He's"),
        "seed": (number(int, 0, 2**32), "decides split, weights, order, augmentation and dropout"),
    },
    "network": {
        "stride": ([2, 4], "of the first convolution: 2 is the report's, 4 torchvision's"),
        "dropout": (number(float, 0, 1), "probability"),
    },
    "data": {
        "data": (data_folder, "folder that holds 101_ObjectCategories, or any folder of class folders, or "
                 "'sample' to have a small one drawn; Caltech101 is downloaded to the default"),
        "cache": (str, "folder for the decoded images"),
        "skip_bad_images": (bool, "go on without the images that can't be read"),
    },
    "machine": {
        "device": (device_name, "auto, cpu, cuda, cuda:N or mps"),
        "precision": (["auto", "fp32", "bf16", "fp16"], "auto: half where the device is built for it"),
        "compile": (bool, "torch.compile the network"),
        "deterministic": (bool, "the same figures each time on CUDA too, more slowly"),
        "bf16_gradients": (bool, "halve what several processes exchange"),
    },
    "output": {
        "ckpt": (str, "best checkpoint; NAME.last.pth beside it holds what --resume needs"),
        "resume": (str, "go on with --ckpt's run or that of the given NAME.last.pth, with its arguments; of "
                   "these, --epochs, --data, --cache, --device and --logdir may be changed"),
        "logdir": (str, "folder of the runs that TensorBoard shows"),
        "name": (str, "of the run (default: date and time)"),
    },
}  # fmt: skip


def add_flag(group, name: str) -> None:
    """Add one of FLAGS to a parser or a group of it, with its default in the help."""
    kind, text = next(flags[name] for flags in FLAGS.values() if name in flags)
    if name in RECIPES["report"]:
        text += " (" + ", ".join(f"{recipe}: {flags[name]}" for recipe, flags in RECIPES.items()) + ")"
    elif DEFAULTS[name]:
        text += f" (default: {DEFAULTS[name]})"
    options = {"type": kind, "metavar": name.split("_")[-1].upper()}
    if kind is bool:
        options = {"action": "store_true"}
    elif isinstance(kind, list):
        options = {"type": type(kind[0]), "choices": kind}
    elif name == "resume":
        options = {"nargs": "?", "const": True, "metavar": "FILE"}
    group.add_argument("--" + name.replace("_", "-"), help=text, **options)


def last_path(ckpt: str) -> Path:
    """Return where the resume checkpoint of `ckpt` lies: alexnet.pth -> alexnet.last.pth."""
    path = Path(ckpt)
    return path.with_name(f"{path.stem}.last{path.suffix}")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """Return the arguments and, when a run goes on, its resume checkpoint."""
    parser = Parser(prog="train.py", description=__doc__)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name in flags:
            add_flag(group, name)
    given = vars(parser.parse_args(argv))  # only what was given, so that it can be told from defaults
    args = DEFAULTS | RECIPES[given.get("recipe", DEFAULTS["recipe"])] | given
    checkpoint = None
    resume = given.get("resume")
    if isinstance(resume, str):
        ckpt = Path(resume).with_name(Path(resume).name.replace(".last", ""))
        if Path(given.get("ckpt", ckpt)) != ckpt:
            parser.error(f"--ckpt {args['ckpt']} contradicts --resume {resume}, which goes with {ckpt}")
        args["ckpt"] = str(ckpt)
    last = last_path(args["ckpt"])
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and last.exists()
    if resume or restarted:
        checkpoint = load(last)
        if "optimizer" not in checkpoint:
            raise CheckpointError(f"{last}: is not a resume checkpoint; train.py writes one as NAME.last.pth")
        stored = checkpoint["args"]
        fixed = {name: value for name, value in given.items() if name not in MAY_CHANGE}
        wrong = [name for name, value in fixed.items() if stored.get(name) != value]
        if wrong and not resume:  # torchrun restarted a run that was too young to have saved anything
            checkpoint = None
        elif wrong:
            flag = "--" + wrong[0].replace("_", "-")
            parser.error(
                f"{flag} {given[wrong[0]]} contradicts the run in {last}, which has {stored.get(wrong[0])}; "
                f"leave {flag} out, or start a new run without --resume"
            )
        else:
            args = args | stored | {"ckpt": args["ckpt"]} | given
    args = argparse.Namespace(**args)
    if checkpoint and args.epochs < checkpoint["epoch"]:
        parser.error(f"--epochs {args.epochs}: the run in {last} has already trained {checkpoint['epoch']}")
    if args.warmup_epochs and args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}")
    if args.name and Path(args.name).name != args.name:
        parser.error(f"--name {args.name!r} must be a plain name, without folders")
    return args, checkpoint


def run_cli(main) -> None:
    """Run `main()`: what a user can mend ends as one line on standard error and an exit status."""
    try:
        main()
        return
    except Interrupted as stop:
        message, status = str(stop), 128 + stop.signum
    except KeyboardInterrupt:
        message, status = "interrupted", 128 + signal.SIGINT
    except (DataError, CheckpointError, TrainingError) as error:
        message, status = f"error: {error}", 1
    except OSError as error:
        message, status = f"error: {error.filename or ''}: {error.strerror or error}", 1
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            message = "error: out of memory; try a smaller --batch-size, a smaller --train-size or --stride 4"
        elif dist.is_initialized():
            message = f"error: another process was lost ({str(error).splitlines()[0]})"
        else:
            raise
        status = 1
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


# ------------------------------------------------------------------------- device, processes, signals


@dataclass(frozen=True)
class World:
    """The device of this process, and its place among those that torchrun started, if it did."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up `tensor`, in place, over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, value: int) -> int:
        """Return the largest `value` over all processes; costs the GPU no wait."""
        if self.size == 1:
            return value
        flag = torch.tensor(value)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)

    @contextlib.contextmanager
    def first_on_machine(self):
        """Let one process of each machine through the block first, the others after it."""
        if self.size > 1 and self.local_rank:
            dist.barrier()
        yield
        if self.size > 1 and not self.local_rank:
            dist.barrier()


def join_world(device: str, deterministic: bool = False) -> World:
    """Choose the device, and meet the other processes if torchrun started this one.

    Raises:
        TrainingError: there is no such device here.
    """
    rank, size, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    distributed = "RANK" in os.environ
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator and accelerator.type in ("cuda", "mps") else "cpu"
    if device == "cuda" and distributed:
        device = f"cuda:{local}"
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise TrainingError(
            f"--device {device}: {torch.cuda.device_count()} CUDA devices here; try --device cpu"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise TrainingError("--device mps: no such device here; try --device cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if distributed:
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    return World(chosen, rank, size, local)


class Signals:
    """SIGINT and SIGTERM: before training they stop the program at once, then after the batch in hand."""

    def __init__(self, world: World):
        self.world = world
        self.received = 0
        self.at_once = True
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.handle)

    def handle(self, signum: int, frame) -> None:
        if self.at_once:
            raise Interrupted(signum)
        if self.received and signum == signal.SIGINT and self.world.size == 1:  # torchrun sends it twice
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.received = signum

    def watch(self, steps):
        """Yield `steps`, as long as no process has received a signal.

        Raises:
            Interrupted: one has; the step in hand is finished.
        """
        for step in steps:
            yield step
            if signum := self.world.any(self.received):
                raise Interrupted(signum)


def choose_precision(device: torch.device, choice: str) -> torch.dtype:
    """Return the type that convolutions and matrix products compute in.

    `auto` takes what the device computes natively. A CPU without bf16 instructions is tens of times
    slower in bf16 than in fp32.
    """
    if choice == "auto" and device.type == "cuda":
        choice = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif choice == "auto" and device.type == "cpu":
        able = torch.cpu.get_capabilities()
        choice = "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choice, torch.float32)


# -------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(
    network: torch.nn.Module,
    store: ImageStore,
    rows: torch.Tensor,
    world: World,
    dtype: torch.dtype,
    flip: bool = False,
    watch=iter,
) -> torch.Tensor:
    """Return the logits of those rows of `store`, float32 (len(rows), classes), on the CPU.

    Every picture is computed exactly once, whatever the number of processes; all get the result.

    Args:
        flip: look at the mirror images instead.
        watch: passes the batches on, or raises to stop.
    """
    network.eval()
    logits = torch.zeros(len(rows), len(store.classes), device=world.device)
    for positions in watch(torch.arange(len(rows)).split(EVAL_BATCH * world.size)):
        mine = positions[world.rank :: world.size]
        if len(mine):
            images, _ = store.batch(rows[mine], world.device)
            with torch.autocast(world.device.type, dtype, enabled=dtype is not torch.float32):
                output = network(prepare(images.flip(-1) if flip else images))
            logits[mine.to(world.device)] = output.float()
    return world.sum(logits).cpu()


def score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return cross-entropy and accuracy in percent, means over the images, each exact in float32."""
    accuracy = 100 * (logits.argmax(1) == labels).sum() / len(labels)
    return F.cross_entropy(logits, labels).item(), accuracy.item()


# ---------------------------------------------------------------------------------------- training


def learning_rate(args: argparse.Namespace, progress: float) -> float:
    """Return the rate after `progress` epochs: a linear warm-up, then constant or half a cosine to 0."""
    if progress < args.warmup_epochs:
        return args.lr * progress / args.warmup_epochs
    if args.schedule == "constant":
        return args.lr
    done = (progress - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * (1 + math.cos(math.pi * done)) / 2


def train_size(args: argparse.Namespace, epoch: int) -> int:
    """Return the pixels a side in `epoch`, counted from 0: `--train-size`, grown in steps of 16."""
    first, *rest = map(int, args.train_size.split("-"))
    last = rest[0] if rest else first
    progress = min(1.0, epoch / max(1, 0.8 * args.epochs - 1))
    return last if progress == 1 else first + int((last - first) * progress) // 16 * 16


class Run:
    """All that a run is: what is trained, how far it has come, and what it has seen of this epoch.

    Attributes:
        epoch: epochs completed.
        step: steps completed in the epoch after those.
        sums: float32 (3,) on the device: loss, hits and images of these steps, of this process.
        seconds: spent on these steps.
        history: a row, a dict, for each completed epoch.
        best: the row of `history` with the highest validation accuracy, None before the first.
    """

    def __init__(
        self, args: argparse.Namespace, store: ImageStore, manifest: dict, world: World, folder: Path
    ):
        self.args, self.store, self.manifest, self.world, self.folder = args, store, manifest, world, folder
        self.rows = {name: store.rows(manifest[name]) for name in ("train", "valid")}
        self.epoch = self.step = 0
        self.sums = torch.zeros(3, device=world.device)
        self.seconds = 0.0
        self.history, self.best = [], None

        torch.manual_seed(args.seed)
        network = AlexNet(len(store.classes), args.stride, args.dropout)
        if args.init == "he":
            init_he(network)
        layout = torch.preserve_format if world.device.type == "mps" else torch.channels_last
        self.network = network.to(world.device, memory_format=layout)
        if args.compile:
            self.network.compile()
        self.replica = self.network
        if world.size > 1:
            self.replica = DistributedDataParallel(self.network, gradient_as_bucket_view=True)
            if args.bf16_gradients:
                self.replica.register_comm_hook(None, bf16_compress_hook)
        self.averaged = None
        if args.ema:
            self.averaged = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
        self.optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=args.lr,
            weight_decay=args.weight_decay,
            decoupled_weight_decay=True,  # no difference without weight decay
            fused=True,
        )
        self.dtype = choose_precision(world.device, args.precision)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.dtype is torch.float16)

    @property
    def result(self) -> AlexNet:
        """The network to validate and save: the averaged one, where there is one."""
        return self.averaged.module if self.averaged else self.network

    def train_step(self, inputs: torch.Tensor, labels: torch.Tensor, images: int) -> None:
        """Take one step on this process's share of a batch of `images`. Nothing waits for the device."""
        with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            logits = self.replica(inputs)
            loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.args.label_smoothing)
        self.optimizer.zero_grad()
        # DDP averages over processes: this makes the gradient that of the mean over the whole batch
        self.scaler.scale(loss * (self.world.size / images)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged:
            self.averaged.update_parameters(self.network)
        hits = (logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack([loss.detach(), hits, torch.full_like(hits, len(labels))])

    def epoch_plan(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an epoch's rows of the store in their order, and each picture's random numbers."""
        order = torch.randperm(len(self.rows["train"]), generator=generator("order", self.args.seed, epoch))
        uniforms = torch.rand(len(order), UNIFORMS, generator=generator("augment", self.args.seed, epoch))
        rows = self.rows["train"][order]
        return rows.to(self.store.pixels.device), uniforms[order].to(self.world.device)

    def inputs(self, rows: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those pictures as the network sees them in this epoch, and their labels."""
        images, labels = self.store.batch(rows, self.world.device)
        size = train_size(self.args, self.epoch)
        return prepare(images, size, self.args.augment.split(","), uniforms), labels

    def train_epoch(self, watch=iter) -> tuple[float, float]:
        """Train from where the epoch stands to its end; return the loss and accuracy of all of it."""
        args, world = self.args, self.world
        rows, uniforms = self.epoch_plan(self.epoch)
        steps = math.ceil(len(rows) / args.batch_size)
        read = started = time.perf_counter() - self.seconds
        self.replica.train()
        with progress_bar(self, len(rows)) as bar:
            for step in watch(range(self.step, steps)):
                batch = slice(step * args.batch_size, min((step + 1) * args.batch_size, len(rows)))
                share = slice(batch.start + world.rank, batch.stop, world.size)
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(args, self.epoch + (step + 0.5) / steps)
                torch.manual_seed(seed_of("dropout", args.seed, self.epoch, step, world.rank))
                self.train_step(*self.inputs(rows[share], uniforms[share]), batch.stop - batch.start)
                self.step, self.seconds = step + 1, time.perf_counter() - started
                bar.update(batch.stop - batch.start)
                if world.device.type == "cpu" or time.perf_counter() - read > 1:  # a GPU is waited for
                    loss, accuracy = self.means(self.sums)
                    bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f} %", refresh=False)
                    read = time.perf_counter()
        means = self.means(world.sum(self.sums.clone()))
        self.seconds = time.perf_counter() - started
        return means

    def means(self, sums: torch.Tensor) -> tuple[float, float]:
        """Return the mean loss and the accuracy in percent that `sums` amount to.

        Raises:
            TrainingError: the loss is not finite.
        """
        loss, hits, images = sums.tolist()
        if not math.isfinite(loss):
            rate = self.optimizer.param_groups[0]["lr"]
            raise TrainingError(
                f"the loss is not finite in epoch {self.epoch + 1}, step {self.step}, at a learning rate of "
                f"{rate:g}; the best checkpoint so far is kept; try a lower --lr"
            )
        return loss / images, 100 * hits / images

    def run_epoch(self, watch=iter) -> dict:
        """Train what is left of the epoch, validate, and return the new row of the history."""
        train_loss, train_accuracy = self.train_epoch(watch)
        started = time.perf_counter()
        logits = evaluate(self.result, self.store, self.rows["valid"], self.world, self.dtype, watch=watch)
        valid_loss, valid_accuracy = score(logits, self.store.labels[self.rows["valid"]].cpu())
        images = len(self.rows["train"])
        row = {
            "epoch": self.epoch + 1,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
            "images_per_second": images / self.seconds,
            "seconds": self.seconds + time.perf_counter() - started,
        }
        # numbers that float32, as the event files hold them, keeps exactly: all outputs agree
        row |= {name: torch.tensor(value).item() for name, value in row.items() if name != "learning_rate"}
        self.history.append(row)
        if self.best is None or row["valid_accuracy"] > self.best["valid_accuracy"]:
            self.best = row
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()
        return row

    def description(self) -> dict:
        """Return what both checkpoints hold beside their tensors."""
        return {
            "classes": self.store.classes,
            "stride": self.args.stride,
            "seed": self.args.seed,
            "epoch": self.epoch,
            "valid_accuracy": self.best["valid_accuracy"] if self.best else None,
            "args": vars(self.args),
            "versions": versions(),
            "run": str(self.folder),
            "split": self.manifest,
        }

    def save_best(self) -> None:
        """Write the parameters with the best validation accuracy, the present ones, to `--ckpt`."""
        if self.world.rank == 0:
            weights = {name: t.detach().float().cpu().clone() for name, t in self.result.state_dict().items()}
            save({**self.description(), "state_dict": weights}, self.args.ckpt)

    def save_last(self) -> None:
        """Write all that continues this run to the resume checkpoint; all processes call it."""
        sums = self.world.sum(self.sums.clone())
        if self.world.rank == 0:
            state = {
                "state_dict": self.network.state_dict(),
                "averaged": self.averaged.state_dict() if self.averaged else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "sums": sums,
                "seconds": self.seconds,
                "history": self.history,
                "fingerprint": self.store.fingerprint,
            }
            save({**self.description(), **state}, last_path(self.args.ckpt))

    def restore(self, checkpoint: dict) -> None:
        """Stand where `save_last` wrote `checkpoint`."""
        self.network.load_state_dict(checkpoint["state_dict"])
        if self.averaged:
            self.averaged.load_state_dict(checkpoint["averaged"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.step, self.seconds = (checkpoint[name] for name in ("epoch", "step", "seconds"))
        self.history = checkpoint["history"]
        self.best = max(self.history, key=lambda row: row["valid_accuracy"], default=None)  # the first such
        if self.world.rank == 0:
            self.sums.copy_(checkpoint["sums"])


def versions() -> dict[str, object]:
    """Return the versions that a result depends on, and that of the checkpoint's format."""
    return {
        "format": FORMAT,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }


def progress_bar(run: Run, images: int) -> tqdm:
    """Return a bar over an epoch's images, hidden where the output is no terminal."""
    return tqdm(
        desc=f"epoch {run.epoch + 1}/{run.args.epochs}",
        total=images,
        initial=run.step * run.args.batch_size,
        unit=" images",
        leave=False,
        disable=None if run.world.rank == 0 else True,
    )


class Silent:
    """Takes every call and does nothing: the log of a process that must not write."""

    def __getattr__(self, name: str):
        return lambda *args, **options: None


class Log:
    """The event files of a run, for TensorBoard, and its `history.csv`.

    Args:
        run: whose folder they go to; what an earlier process wrote of later epochs is superseded.
    """

    def __init__(self, run: Run):
        self.run = run
        purge = {"purge_step": run.epoch + 1} if run.epoch or run.step else {}
        self.train, self.valid = (SummaryWriter(run.folder / name, **purge) for name in ("train", "valid"))

    def start(self, command: str) -> None:
        """Log once what the run is: the network, its first batch, and a card that sums it up."""
        run, network = self.run, self.run.result.eval()
        rows, uniforms = run.epoch_plan(0)
        batch, _ = run.inputs(rows[:64], uniforms[:64])
        self.train.add_image("first_batch", make_grid(data.restore(batch), nrow=8), 0)
        one = batch[:1]
        with warnings.catch_warnings(), torch.no_grad(), FlopCounterMode(display=False) as flops:
            warnings.simplefilter("ignore")  # the tracer that TensorBoard uses is called deprecated
            network(one)
            self.train.add_graph(network, one)
        parameters = sum(p.numel() for p in network.parameters())
        facts = {
            "command": f"`{command}`",
            "images": ", ".join(f"{name} {len(paths)}" for name, paths in run.manifest.items()),
            "classes": len(run.store.classes),
            "parameters": f"{parameters:,}",
            "operations": f"{flops.get_total_flops() / 1e9:.2f} GFLOP an image, forward, at {one.shape[-1]} pixels",
            "device": f"{device_title(run.world.device)}, {str(run.dtype).removeprefix('torch.')}",
            **versions(),
            **vars(run.args),
        }
        lines = [f"| {name} | {value} |" for name, value in facts.items()]
        self.train.add_text("card", "\n".join(["| | |", "|---|---|", *lines]), 0)

    def epoch(self, row: dict) -> None:
        """Log a completed epoch, and see to it that the files hold it before a checkpoint does."""
        step = row["epoch"]
        for name in ("learning_rate", "images_per_second"):
            self.train.add_scalar(name, row[name], step)
        for writer, name in ((self.train, "train"), (self.valid, "valid")):
            writer.add_scalar("loss", row[f"{name}_loss"], step)
            writer.add_scalar("accuracy", row[f"{name}_accuracy"], step)
        self.train.add_image("filters", filter_grid(self.run.result.features[0].weight), step)
        self.train.flush()
        self.valid.flush()
        with replacing(self.run.folder / "history.csv", "w", newline="") as file:
            table = csv.DictWriter(file, row)
            table.writeheader()
            table.writerows(self.run.history)

    def end(self) -> None:
        """Log the arguments beside the best epoch's figures, for the HPARAMS tab."""
        names = [*RECIPES["report"], "recipe", "epochs", "batch_size", "seed", "stride", "dropout"]
        chosen = {name: getattr(self.run.args, name) for name in names}
        for summary in hparams(chosen, {"accuracy": None, "loss": None}):  # curves that `valid` has
            self.valid.file_writer.add_summary(summary)
        self.train.close()
        self.valid.close()


def filter_grid(weight: torch.Tensor) -> torch.Tensor:
    """Return the first layer's filters (64, 3, 11, 11), each over its full range, as one RGB picture."""
    grid = make_grid(weight.detach().float(), nrow=8, padding=1, normalize=True, scale_each=True)
    return grid.repeat_interleave(4, 1).repeat_interleave(4, 2)


def device_title(device: torch.device) -> str:
    """Return a name of the device for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
        if device.type == "cpu"
        else device.type
    )


def new_folder(logdir: str, name: str | None) -> Path:
    """Create and return the folder of a new run; a second run of one name gets `-2` behind it."""
    name = name or time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 10_000):
        folder = Path(logdir).resolve() / (name if attempt == 1 else f"{name}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise TrainingError(f"{logdir}: too many runs named {name}; give another --name")


def main(argv: list[str] | None = None) -> None:
    """Train as `argv` says (default: the command line)."""
    args, checkpoint = parse(argv)
    world = join_world(args.device, args.deterministic)
    signals = Signals(world)
    say = print if world.rank == 0 else Silent().print
    if args.batch_size % world.size:
        raise TrainingError(f"--batch-size {args.batch_size} is not a multiple of the {world.size} processes")
    with world.first_on_machine():
        store = ImageStore(args.data, args.cache, args.skip_bad_images)
    if store.skipped:
        say(f"skipped {store.skipped} images that can't be read")
    if checkpoint:
        manifest, folder = checkpoint["split"], Path(args.logdir).resolve() / Path(checkpoint["run"]).name
        if checkpoint["fingerprint"] != store.fingerprint or checkpoint["classes"] != store.classes:
            raise DataError(
                f"{store.root}: its images are not those that the run was trained on; bring them back"
            )
    else:
        manifest = split(store.paths, args.seed)
        folder = new_folder(args.logdir, args.name) if world.rank == 0 else Path(args.logdir)
    store.move_to(world.device)
    run = Run(args, store, manifest, world, folder)
    if checkpoint:
        run.restore(checkpoint)
        del checkpoint
    if world.rank == 0:
        size = sum(p.numel() * p.element_size() for p in run.network.parameters())
        check_writable(args.ckpt, size)
        check_writable(last_path(args.ckpt), size * (4 if args.ema else 3))
    log = Log(run) if world.rank == 0 else Silent()
    if not (run.epoch or run.step):
        log.start(" ".join(["python", *sys.argv]))
    say(
        f"{len(run.rows['train'])} training images, {len(store.classes)} classes, {device_title(world.device)}; {folder}"
    )
    fit(run, log, signals, say)
    if world.size > 1:
        dist.destroy_process_group()


def fit(run: Run, log: Log, signals: Signals, say) -> None:
    """Train and validate `run` up to its last epoch, saving after each and when interrupted."""
    args = run.args
    signals.at_once = False
    try:
        while run.epoch < args.epochs:
            row = run.run_epoch(signals.watch)
            log.epoch(row)
            if row is run.best:
                run.save_best()
            run.save_last()
            say(
                f"epoch {row['epoch']:{len(str(args.epochs))}}/{args.epochs}"
                f"  train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:5.2f} %"
                f"  valid loss {row['valid_loss']:.4f} accuracy {row['valid_accuracy']:5.2f} %"
                f"  rate {row['learning_rate']:.3g}  {row['images_per_second']:.1f} images/s"
                f"  {row['seconds']:.1f} s{'  best' if row is run.best else ''}",
                flush=True,
            )
    except Interrupted as stop:
        run.save_last()
        where = "" if args.ckpt == DEFAULTS["ckpt"] else f" --ckpt {args.ckpt}"
        raise Interrupted(stop.signum, f"go on with: python train.py --resume{where}") from None
    log.end()
    say(
        f"best: epoch {run.best['epoch']}, valid accuracy {run.best['valid_accuracy']:.2f} %, saved in {args.ckpt}"
    )
    say(f"next: python test.py --ckpt {args.ckpt}\n      tensorboard --logdir {args.logdir}")


if __name__ == "__main__":
    run_cli(main)
