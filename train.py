"""Train AlexNet from scratch on Caltech101, or on any folder of class folders.

    python train.py --epochs 30 --lr 1e-4       # the report's experiment: 67 to 70 % on test images
    python train.py --recipe strong             # the same network, trained better: 84 to 86 %
    python train.py --data DIR --name mine      # your own images, a folder for each class
    python train.py --resume                    # continue where a run was interrupted
    torchrun --standalone --nproc-per-node=4 train.py --epochs 30 --lr 1e-4

Random numbers depend only on the seed and the place in the run, so a run that is resumed at any
step sees the same ones as an unbroken run. Any number of processes see the same augmented images;
dropout, and the partners in CutMix, are each process's own.
"""

import argparse
import contextlib
import copy
import csv
import difflib
import gc
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages; read at torch's first tensor
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid
from tqdm import tqdm

import data
from data import DataError, ImageStore, generator, memory_format, seed_of, split, to_inputs
from model import AlexNet, CheckpointError, init_he, load, save, transfer, whiten

# these warnings come with CUDA graphs: results are right, but one stream waits for another
warnings.filterwarnings("ignore", "Attempting to run cuBLAS|The AccumulateGrad node")

# --------------------------------------------------------------------------- recipes and flags

RECIPES = {  # defaults of flags, for 30 epochs; `adapt` fits them to others
    "report": dict(
        lr=1e-4, schedule="constant", warmup_epochs=0, weight_decay=0.0, label_smoothing=0.0,
        logit_adjustment=0.0, augment="none", cutmix=0.0, repeats=1, train_size="224", ema=0.0,
        dropout=0.5, init="default",
    ),
    "strong": dict(
        lr=3e-4, schedule="constant", warmup_epochs=2, weight_decay=1.0, label_smoothing=0.1,
        logit_adjustment=1.0, augment="crop,color,gray,trivial", cutmix=0.5, repeats=2,
        train_size="80-128", ema=0.998, dropout=0.3, init="whiten",
    ),
}  # fmt: skip
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
INITS = ("default", "he", "whiten")  # or a file
MAY_CHANGE = {"epochs", "data", "cache", "device", "logdir"}  # on --resume
EVAL_BATCH = 128  # images in a batch without gradients
VERSIONS = {  # what a result depends on besides the arguments
    "program": 2,  # 1 is commit 99acc2f and before; "command" and "seen" are not in its checkpoints
    "python": platform.python_version(),
    "torch": str(torch.__version__),
    "torchvision": torchvision.__version__,
}


class TrainingError(Exception):
    """Training or testing cannot continue; the message says what to change."""


def process_rank() -> int:
    """Return RANK, or 0 without one; `set_up` reports one that is not a number."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def let_process_0_speak() -> None:
    """Let process 0 report an error first; the launcher then ends the others."""
    if process_rank():
        time.sleep(5)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Show the module's docstring as it is, and each default but None and False."""

    def _get_help_string(self, action):
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest flag for a misspelt one."""

    def __init__(self, prog: str, description: str, **options):
        options |= {"formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(prog, f"{prog} [flags]", description, **options)

    def error(self, message: str):
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        let_process_0_speak()
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def number(kind: type, low: float, high: float):
    """Return a parser of numbers from `low` to `high`, for argparse's `type`."""

    def parse_number(text: str):
        value = kind(text)
        if not low <= value <= high:  # NaN is outside too
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    parse_number.__name__ = kind.__name__  # argparse names it in an error
    return parse_number


def matching(pattern: str, meaning: str):
    """Return a check that a text matches `pattern`, for argparse's `type`."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
        return text

    return check


def train_sizes(text: str) -> str:
    """Check --train-size, for argparse's `type`."""
    sizes = [int(size) for size in text.split("-")] if re.fullmatch(r"\d+(-\d+)?", text) else [0]
    if not 64 <= sizes[0] <= sizes[-1] <= data.SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size from 64 to {data.SIZE}, or A-B")
    return text


DEVICE = matching(r"auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?", "one of auto, cpu, mps, cuda, cuda:N")
FOLDER = matching(r"(?s).+", "a folder")
PATH = matching(r"(?s)[^\ud800-\udfff]+", "a path in UTF-8")  # TensorBoard stores no others


def get_parser(**options) -> Parser:
    """Return the parser of train.py's flags. A recipe sets the defaults that are missing."""
    parser = Parser("train.py", __doc__, **options)
    names = "|".join(data.AUGMENTATIONS)
    augment = matching(f"none|({names})(,({names}))*", f"none or some of {names}")
    name = matching(r"(?!\.\.?$)[^/\\\ud800-\udfff]+", "a name, in UTF-8, without folders")

    add = parser.add_argument_group("experiment").add_argument
    add("--recipe", choices=list(RECIPES), default="report", help="sets defaults of other flags")
    add("--epochs", type=number(int, 1, 100_000), default=30, help="to train in all")
    add("--batch-size", type=number(int, 1, 65_536), default=64, help="images in a step, in total")
    add("--lr", type=number(float, 1e-12, 100), help="highest learning rate of Adam")
    add("--schedule", choices=["constant", "cosine"], help="learning rate after the warm-up")
    add("--warmup-epochs", type=number(float, 0, 10_000), help="while the learning rate rises")
    add("--weight-decay", type=number(float, 0, 100), help="decoupled, as in AdamW")
    add("--label-smoothing", type=number(float, 0, 0.99), help="as in PyTorch's CrossEntropyLoss")
    add("--logit-adjustment", type=number(float, 0, 10), help="helps rare classes; 0: off")
    add("--augment", type=augment, help="random changes of training images: none, or some of "
        f"{','.join(data.AUGMENTATIONS)}; flip mirrors, trivial is TrivialAugment")  # fmt: skip
    add("--cutmix", type=number(float, 0, 1), help="share of the batches that CutMix mixes")
    add("--repeats", type=number(int, 1, 16), help="passes over the images in an epoch")
    add("--train-size", type=train_sizes, help="pixels a side; A-B grows over 80 %% of the epochs")
    add("--test-size", type=number(int, 64, data.SIZE), help="pixels a side in validation and "
        "test; default: the largest --train-size, up to an eighth more with crops")  # fmt: skip
    add("--ema", type=number(float, 0, 0.99999), help="decay of averaged weights; 0: no averaging")
    add("--init", type=PATH, help="initial weights: default (PyTorch's), he (He's), whiten (he, "
        "and whitening filters in the first layer), or FILE with weights of AlexNet")  # fmt: skip
    add("--stride", type=int, choices=[2, 4], default=2, help="of the first layer; torchvision: 4")
    add("--dropout", type=number(float, 0, 0.99), help="of the inputs of two linear layers")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of the split and all else random")

    add = parser.add_argument_group("data and machine").add_argument
    add("--data", type=FOLDER, default=data.DEFAULT_DATA, help="folder of class folders, or of "
        "train, val and test with such; 'sample': generated images; without --data: Caltech101, "
        "downloaded")  # fmt: skip
    add("--cache", type=PATH, default=data.DEFAULT_CACHE, help="folder for decoded images")
    add("--skip-bad-images", action="store_true", help="leave out images that cannot be read")
    add("--device", type=DEVICE, default="auto", help="cpu, mps, cuda, cuda:N; auto: the best")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: what is fast on the device; "
        "fp32 is TF32 on NVIDIA GPUs")  # fmt: skip
    add("--deterministic", action="store_true", help="repeatable on CUDA, as far as PyTorch can")

    add = parser.add_argument_group("output").add_argument
    add("--name", type=name, help="of the log folder (else date and time) and of NAME.pth")
    add("--ckpt", help="file of the best weights; default: NAME.pth, or alexnet.pth without --name")
    add("--resume", action="store_true", help="continue the run of --name or --ckpt")
    add("--logdir", type=PATH, default="runs", help="folder of the runs, for TensorBoard")
    return parser


def last_path(ckpt: str) -> Path:
    """Return where the checkpoint for --resume lies: alexnet.pth -> alexnet.last.pth."""
    path = Path(ckpt)
    return path.with_name(f"{path.stem}.last{path.suffix}")


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """Return the arguments and, when a run is resumed, its checkpoint.

    The checkpoint wins over the recipe. The command line may change what MAY_CHANGE lists.
    """
    first, _ = get_parser(add_help=False).parse_known_args(argv)
    parser = get_parser()
    default = f"{first.name or 'alexnet'}.pth"
    ckpt = os.path.expanduser(default if first.ckpt is None else first.ckpt)
    if os.path.basename(ckpt) in ("", ".", ".."):
        parser.error(f"--ckpt {ckpt!r}: is not the name of a file")
    if Path(ckpt).stem.endswith(".last"):
        parser.error(f"--ckpt {ckpt}: NAME.last.pth lies beside NAME.pth; give NAME.pth")
    checkpoint = find_checkpoint(last_path(ckpt), first.resume)
    known = vars(first).keys() - {"ckpt", "resume"}  # version 1 has others
    stored = {n: v for n, v in checkpoint["args"].items() if n in known} if checkpoint else {}
    parser.set_defaults(**adapt(RECIPES[first.recipe], first.epochs) | stored)  # the latter wins
    args = parser.parse_args(argv)
    keywords = {"data": ("sample",), "cache": (), "logdir": (), "init": INITS}  # not paths
    for name, words in keywords.items():  # absolute paths are found from any folder
        if (value := getattr(args, name)) not in words:
            setattr(args, name, os.path.abspath(os.path.expanduser(value)))
    for name, value in stored.items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            parser.error(
                f"--{name.replace('_', '-')} {getattr(args, name)}: the run in {last_path(ckpt)} "
                f"has {value}, which cannot change; start another run, perhaps with --init {ckpt} "
                "--name NEW"
            )
    if checkpoint and args.epochs < checkpoint["epoch"]:
        parser.error(f"--epochs {args.epochs}: the run has trained {checkpoint['epoch']} already")
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} leaves nothing of {args.epochs} epochs")
    if args.init not in INITS and not checkpoint and not os.path.isfile(args.init):
        parser.error(f"--init {args.init}: no such file, nor one of {', '.join(INITS)}")
    args.ckpt = ckpt
    args.test_size = args.test_size or test_size(args)
    return args, checkpoint


def adapt(recipe: dict, epochs: int) -> dict:
    """Return a recipe for another number of epochs than 30.

    The warm-up is in proportion. A short run overfits less, so it needs less mixing, and it sees
    each image once an epoch.
    """
    share = epochs / 30
    return recipe | {
        "warmup_epochs": recipe["warmup_epochs"] * share,
        "cutmix": recipe["cutmix"] * min(1, share),
        "repeats": recipe["repeats"] if share >= 0.5 else 1,
    }


def find_checkpoint(last: Path, resume: bool) -> dict | None:
    """Return the checkpoint to continue with: on --resume, or if torchrun has restarted us.

    Raises:
        CheckpointError: there is none, or it is unknown which launch of torchrun wrote it.
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not resume and not (restarted and last.exists()):
        return None
    if not last.exists():
        raise CheckpointError(f"{last}: nothing to resume; give the run's --name or --ckpt")
    checkpoint = load(last)
    if "optimizer" not in checkpoint:
        raise CheckpointError(f"{last}: is not for --resume; train.py names those NAME.last.pth")
    if resume:
        return checkpoint
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's restarts share it
    if launch == "none":
        raise CheckpointError(f"{last}: give torchrun --standalone or --rdzv-id, or use --resume")
    return checkpoint if checkpoint.get("job") == launch else None  # None: an earlier run's


# ------------------------------------------------------------------------- device and processes


@dataclass(frozen=True)
class Compute:
    """The device and precision of this process, and its place among all processes."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return a context in which convolutions and matrix products compute in `dtype`."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        # a cache of cast weights gains nothing where each is used once, and CUDA graphs forbid it
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of `tensor` over all processes."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """Return the largest `value` of all processes. It stays on the CPU, so no GPU waits."""
        if self.world_size > 1:
            flag = torch.tensor(value)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            value = int(flag)
        return value

    @contextlib.contextmanager
    def first_on_machine(self):
        """Local rank 0 runs the block first, then the others do."""
        if self.local_rank:
            self.max(0)  # a barrier
        yield
        if not self.local_rank:
            self.max(0)


def set_up(device: str, precision: str, deterministic: bool = False) -> Compute:
    """Choose device and precision, and join the other processes of torchrun or of a cluster.

    Raises:
        TrainingError: the device or a variable is missing.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID"):
        if (value := os.environ.get(name)) and not value.isdecimal():
            raise TrainingError(f"{name} is {value!r}, but must be a number")
    rank, world_size = process_rank(), int(os.environ.get("WORLD_SIZE") or 1)
    local_rank = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    if world_size == 1:  # tasks of SLURM that train alone may see one GPU each, or share all
        local_rank %= max(1, torch.cuda.device_count())
    if rank >= world_size:
        raise TrainingError(f"RANK is {rank}, but must be below WORLD_SIZE, which is {world_size}")
    if device == "auto":
        mps = world_size == 1 and torch.backends.mps.is_available()  # gloo and NCCL have no MPS
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if world_size > 1 and device not in ("cpu", "cuda"):
        raise TrainingError(f"--device {device} for {world_size} processes; give cpu or cuda")
    chosen = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise TrainingError("--device mps: no such device here; try --device cpu")
    if chosen.type == "cuda":
        if chosen.index >= (n := torch.cuda.device_count()):
            raise TrainingError(f"--device {device}: PyTorch sees {n} CUDA GPUs; try --device cpu")
        torch.cuda.set_device(chosen)
    torch.set_float32_matmul_precision("high")  # on NVIDIA GPUs, fp32 is TF32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if world_size > 1:
        join_group(chosen, rank, world_size)
    return Compute(chosen, choose_precision(chosen, precision), rank, world_size, local_rank)


def join_group(device: torch.device, rank: int, world_size: int) -> None:
    """Wait for all processes. They find each other by MASTER_ADDR and MASTER_PORT (`env://`).

    Raises:
        TrainingError: a variable is missing.
    """
    nccl = device.type == "cuda" and dist.is_nccl_available()  # Windows has none
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    try:
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun's store outlives a restart; a prefix hides the addresses of ended processes
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    except ValueError as error:
        raise TrainingError(f"WORLD_SIZE is {world_size}, but {error}") from error


def choose_precision(device: torch.device, choice: str) -> torch.dtype:
    """Return the dtype to compute in; `auto` is what the device computes natively.

    A CPU without bf16 instructions is tens of times slower in bf16 than in fp32.
    """
    if choice == "auto" and device.type == "cuda":
        choice = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif choice == "auto" and device.type == "cpu":
        features, cpuinfo = set(), Path("/proc/cpuinfo")
        if hasattr(torch.cpu, "get_capabilities"):  # older versions do not have it
            features = {name for name, able in torch.cpu.get_capabilities().items() if able}
        elif cpuinfo.exists():
            features = set(cpuinfo.read_text().split())
        choice = "bf16" if features & {"avx512_bf16", "amx_bf16"} else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choice, torch.float32)


def device_name(device: torch.device) -> str:
    """Return a name of the device for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return cpu if device.type == "cpu" else device.type


def print0(*values) -> None:
    """Print in process 0 alone."""
    if process_rank() == 0:
        print(*values, flush=True)


class Interrupted(Exception):
    """A signal asks the program to end; the arguments are its number and what to do."""


class StopSignal:
    """Remembers SIGINT, SIGTERM or SIGHUP until the step is done; a second Ctrl-C ends at once."""

    def __init__(self, compute: Compute):
        self.compute, self.received, self.handlers = compute, 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others cannot handle signals
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                signum = getattr(signal, name, None)  # Windows has no SIGHUP
                if signum and signal.getsignal(signum) != signal.SIG_IGN:  # as nohup sets it
                    self.handlers[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def handle(self, signum: int, frame) -> None:
        if self.received and signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.received = signum

    def check(self) -> None:
        """Raise Interrupted in all processes if one has received a signal."""
        if signum := self.compute.max(self.received):
            raise Interrupted(signum)


# -------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(
    network: torch.nn.Module,
    store: ImageStore,
    rows: torch.Tensor,
    size: int,
    compute: Compute,
    flip: bool = False,
    stop: StopSignal | None = None,
) -> torch.Tensor:
    """Return the logits of those rows of `store`, float32 (len(rows), classes), on the CPU.

    Each image is computed exactly once, with any number of processes; all get all logits.

    Args:
        size: pixels, height and width, of the network's inputs.
        flip: evaluate the mirror images instead.
        stop: checked after each batch.
    """
    network.eval()
    rows = rows.to(store.pixels.device)
    logits = torch.zeros(len(rows), len(store.classes), device=compute.device)
    step = EVAL_BATCH * compute.world_size
    for start in range(0, len(rows), step):
        share = slice(start + compute.rank, start + step, compute.world_size)
        if len(rows[share]):
            images, _ = store.batch(rows[share], compute.device)
            with compute.autocast():
                output = network(to_inputs(images.flip(-1) if flip else images, size))
            logits[share] = output.float()
        if stop:
            stop.check()
    return compute.sum(logits).cpu()


def score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy in percent, both rounded to float32."""
    accuracy = 100 * (logits.argmax(1) == labels).sum() / len(labels)
    return F.cross_entropy(logits, labels).item(), accuracy.item()


# --------------------------------------------------------------------------------- schedules


def learning_rate(args: argparse.Namespace, progress: float) -> float:
    """Return the learning rate after `progress` epochs: a linear warm-up, then the schedule."""
    if progress < args.warmup_epochs:
        return args.lr * progress / args.warmup_epochs
    if args.schedule == "constant":
        return args.lr
    done = (progress - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * (1 + math.cos(math.pi * done)) / 2


def train_size(args: argparse.Namespace, epoch: int) -> int:
    """Return the pixels a side in `epoch`, counted from 0: A-B grows in steps of 16."""
    first, _, last = args.train_size.partition("-")
    first, last, growing = int(first), int(last or first), 0.8 * args.epochs - 1
    if epoch >= growing:
        return last
    return first + int((last - first) * epoch / growing) // 16 * 16


def test_size(args: argparse.Namespace) -> int:
    """Return the default --test-size: with crops, training shows objects larger than they are.

    A larger image makes up for that (https://arxiv.org/abs/1906.06423). 9/8 is the best of 1, 9/8,
    5/4 and 3/2 on validation; it is rounded down to a multiple of 8.
    """
    largest = train_size(args, args.epochs)
    return min(data.SIZE, largest * 9 // 64 * 8) if "crop" in args.augment else largest


# ---------------------------------------------------------------------------------- training

# kind of device -> images to augment in one call. With few, a GPU waits for Python. With as many, a
# CPU is slower: 1.7 times as long for each image (Zen 4, 128 pixels), so it takes one batch
TOGETHER = {"cuda": 256}


def initial_network(args, store: ImageStore, rows: torch.Tensor, source: dict) -> AlexNet:
    """Return the network with the initial weights that `--init` names, on the CPU.

    Args:
        rows: those of the training images in `store`, in random order.
        source: the checkpoint to take weights from; empty unless `--init` names a file.
    """
    torch.manual_seed(args.seed)
    network = AlexNet(len(store.classes), args.stride, args.dropout)
    if args.init in ("he", "whiten"):
        init_he(network)
    if args.init == "whiten":
        images, _ = store.batch(rows[:256].to(store.pixels.device), torch.device("cpu"))
        whiten(network.features[0], to_inputs(images, train_size(args, 0)))
    if source:
        whole = transfer(network, source, store.classes, args.init)
        print0(f"initial weights from {args.init}{'' if whole else ', the last layer anew'}")
        if source.get("stride", 4) != args.stride:  # torchvision's do not hold it
            print0(f"{args.init} may need --stride {source.get('stride', 4)}")
    return network


def seen_images(source: dict) -> set[int]:
    """Return the checksums of the images that a checkpoint's weights were trained on.

    They are those of its training images, and of those that its own initial weights have seen.
    """
    checksums = source.get("checksums", {})
    train = {checksums.get(path) for path in source.get("split", {}).get("train", [])}
    return train.union(source.get("seen", [])) - {None}


class TrainingLoss(torch.nn.Module):
    """The network and its loss in one module, so that DDP and CUDA graphs take them as one."""

    def __init__(self, network: torch.nn.Module, adjustment: torch.Tensor, smoothing: float):
        super().__init__()
        self.network, self.adjustment = network, adjustment
        self.criterion = torch.nn.CrossEntropyLoss(reduction="sum", label_smoothing=smoothing)

    def forward(self, inputs, labels, own) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss of a batch, float32 (), and what it adds to `Trainer.sums`, (3,).

        Args:
            inputs, labels: as `Trainer.inputs` returns them.
            own: float32 (), the share of each image that is its own after CutMix; the rest of
                image i is from image B - 1 - i.
        """
        logits = self.network(inputs)
        adjusted = logits + self.adjustment
        others = self.criterion(adjusted, labels.flip(0))
        loss = own * self.criterion(adjusted, labels) + (1 - own) * others
        with torch.no_grad():
            plain_loss = F.cross_entropy(logits, labels, reduction="sum")  # as in validation
            hits = (logits.argmax(1) == labels).sum()
            sums = torch.stack([plain_loss, hits, torch.full_like(hits, len(labels))])
        return loss, sums


class Trainer:
    """What is trained, how far it has come, and the training step.

    Attributes:
        network: AlexNet on the device.
        training_loss: a TrainingLoss of it, in DDP where there are several processes.
        averaged: its averaged weights, an AlexNet too; None without --ema.
        evaluated: the one of the two that is validated and saved.
        epoch: the number of completed epochs.
        step: the number of completed steps in the current epoch.
        sums: float32 (3,) on the device: loss, hits and images of these steps, of this process.
        seconds: the time spent on these steps.
    """

    def __init__(self, args, store: ImageStore, rows: torch.Tensor, compute, network: AlexNet):
        self.args, self.store, self.rows, self.compute = args, store, rows, compute
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.sums = torch.zeros(3, device=compute.device)
        self.steps_per_epoch = math.ceil(len(rows) * args.repeats / args.batch_size)
        self.augment = [name for name in args.augment.split(",") if name != "none"]
        labels = store.labels.cpu()[rows]
        counts = torch.zeros(len(store.classes)).index_add_(0, labels, torch.ones(len(labels)))
        # added to the logits in training, so that those of rare classes must be larger
        # (https://arxiv.org/abs/2007.07314)
        adjustment = args.logit_adjustment * (counts.clamp(min=1) / len(rows)).log()
        adjustment = adjustment.to(compute.device)
        self.network = network.to(compute.device, memory_format=memory_format(compute.device))
        self.training_loss = TrainingLoss(self.network, adjustment, args.label_smoothing)
        if compute.world_size > 1:
            self.training_loss = DistributedDataParallel(
                self.training_loss, gradient_as_bucket_view=True
            )
        self.graphs = {}  # shape of inputs -> the loss, recorded for it
        cuda = compute.device.type == "cuda"  # torch.manual_seed seeds all kinds of devices, slowly
        self.manual_seed = torch.cuda.manual_seed if cuda else torch.manual_seed
        self.averaged = copy.deepcopy(self.network).eval() if args.ema else None
        self.evaluated = self.averaged or self.network
        self.optimizer = torch.optim.AdamW(  # without weight decay it is Adam
            self.network.parameters(),
            weight_decay=args.weight_decay,
            fused=compute.device.type in ("cpu", "cuda"),
        )
        fp16 = compute.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=fp16)  # else a no-op

    def epoch_plan(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return this epoch's rows of the store in order, and what augmentation does to each.

        The repeats of an image, augmented each in its own way, come one after another, so most
        are in one batch (https://arxiv.org/abs/1901.09335).
        """
        seed, images, repeats = self.args.seed, len(self.rows), self.args.repeats
        order = torch.randperm(images, generator=generator("order", seed, self.epoch))
        places = (order[:, None] * repeats + torch.arange(repeats)).flatten()
        uniforms = data.draw_uniforms(self.augment, images * repeats, seed, self.epoch)
        changes = {
            name: change[places].to(self.compute.device)
            for name, change in data.find_changes(uniforms).items()
        }
        return self.rows[places // repeats].to(self.store.pixels.device), changes

    def inputs(self, rows: torch.Tensor, changes: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the network's inputs for those rows in this epoch, and their labels."""
        images, labels = self.store.batch(rows, self.compute.device)
        return to_inputs(images, train_size(self.args, self.epoch), changes), labels

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Yield what `train_step` takes, from the current step to the end of the epoch.

        A GPU augments several batches in one call. These groups count from the start of the epoch,
        so a resumed epoch has the same ones: with another number of images, sums may round
        differently.
        """
        rows, changes = self.epoch_plan()
        size, rank, world_size = self.args.batch_size, self.compute.rank, self.compute.world_size
        together, begin = max(1, TOGETHER.get(self.compute.device.type, 0) // size), self.step
        per_process = size // world_size  # images of a batch
        for first in range(begin - begin % together, self.steps_per_epoch, together):
            share = slice(first * size + rank, (first + together) * size, world_size)
            inputs, labels = self.inputs(rows[share], {n: c[share] for n, c in changes.items()})
            for step in range(max(first, begin), min(first + together, self.steps_per_epoch)):
                place = slice((step - first) * per_process, (step - first + 1) * per_process)
                yield inputs[place], labels[place], min(size, len(rows) - step * size)

    def graphed(self, batch: tuple[torch.Tensor, ...]) -> torch.nn.Module:
        """Return `training_loss`; on an NVIDIA GPU, recorded as two CUDA graphs.

        Python starts a graph, the whole forward or backward pass, in one call. Without graphs, a
        fast GPU waits for Python at each kernel. A graph is for one shape of inputs and keeps its
        memory, so a smaller last batch has none. Several processes have none either.
        """
        shape = batch[0].shape
        # AMD's GPUs may fail to record
        nvidia = self.compute.device.type == "cuda" and not torch.version.hip
        if not nvidia or self.compute.world_size > 1 or shape[0] < self.args.batch_size:
            return self.training_loss
        if shape not in self.graphs:
            self.graphs.clear()
            gc.collect()  # a graph is in a reference cycle, so its memory is not free before
            # a shallow copy shares the parameters; recording replaces its `forward`
            loss = copy.copy(self.training_loss)
            # a graph keeps its inputs; a slice of a group would keep the whole group in memory
            kept = tuple(tensor.clone() for tensor in batch)
            # the search for the fastest convolutions takes a second: only for frequent shapes
            torch.backends.cudnn.benchmark = not self.args.deterministic
            with self.compute.autocast():
                self.graphs[shape] = torch.cuda.make_graphed_callables(loss, kept)
            torch.backends.cudnn.benchmark = False
        return self.graphs[shape]

    def train_step(self, inputs: torch.Tensor, labels: torch.Tensor, images: int) -> None:
        """Take a step on this process's share of a batch.

        The CPU waits for a GPU only when `graphed` records a graph.

        Args:
            images: the number of images in the whole batch, of all processes.
        """
        args, compute = self.args, self.compute
        progress = self.epoch + (self.step + 0.5) / self.steps_per_epoch
        self.optimizer.param_groups[0]["lr"] = learning_rate(args, progress)
        rng, own = random.Random(seed_of("cutmix", args.seed, self.epoch, self.step)), 1.0
        if rng.random() < args.cutmix:
            inputs, own = data.cutmix(inputs, rng)
        batch = inputs, labels, torch.full((), own, device=compute.device)
        self.optimizer.zero_grad()
        graphed = self.graphed(batch)
        self.manual_seed(seed_of("dropout", args.seed, self.epoch, self.step, compute.rank))
        with compute.autocast():
            loss, sums = graphed(*batch)
        # DDP averages over processes, so the gradient is that of the mean over the whole batch
        self.scaler.scale(loss * (compute.world_size / images)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged:
            taken = self.epoch * self.steps_per_epoch + self.step
            decay = min(args.ema, (1 + taken) / (10 + taken))  # small at first, as in TensorFlow
            ours, theirs = (list(n.parameters()) for n in (self.averaged, self.network))
            get_ema_multi_avg_fn(decay)(ours, theirs, None)
        self.sums += sums.detach()  # all outputs of a graph require a gradient
        self.step += 1

    def end_epoch(self, train: tuple, valid: tuple, seconds: float) -> dict:
        """Count the epoch as completed; return its row of the history.

        Args:
            train, valid: mean loss and accuracy in percent.
            seconds: the time since the last row.
        """
        names = ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy")
        names += ("images_per_second", "seconds")
        speed = len(self.rows) * self.args.repeats / self.seconds
        # float32, as in TensorBoard's event files: these numbers are the same in every output
        row = dict(zip(names, torch.tensor([*train, *valid, speed, seconds]).tolist(), strict=True))
        rate = self.optimizer.param_groups[0]["lr"]
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()
        return {"epoch": self.epoch, "learning_rate": rate, **row}

    def means(self, sums: torch.Tensor) -> tuple[float, float]:
        """Return the mean loss and the accuracy in percent from sums as in `self.sums`.

        Raises:
            TrainingError: the loss is not finite.
        """
        loss, hits, images = sums.tolist()
        self.check_finite(loss)
        return loss / max(images, 1), 100 * hits / max(images, 1)  # a share may be empty

    def check_finite(self, loss: float) -> None:
        """Raise TrainingError if `loss` is not finite."""
        if not math.isfinite(loss):
            rate = self.optimizer.param_groups[0]["lr"]
            fp32 = " or --precision fp32" if self.compute.dtype is torch.float16 else ""
            raise TrainingError(
                f"the loss is not finite in epoch {self.epoch + 1}, step {self.step}, at a "
                f"learning rate of {rate:g}; try a lower --lr{fp32}"
            )

    def state_dict(self) -> dict:
        """Return what continues training from here, for a checkpoint; every process calls it.

        Raises:
            TrainingError: the loss is not finite, and these weights must not replace good ones.
        """
        sums = self.compute.sum(self.sums)
        finite = all(weight.isfinite().all() for weight in self.network.parameters())
        self.check_finite(sums[0].item() if finite else math.nan)
        return {
            "state_dict": self.network.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "sums": sums,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Random numbers need no state."""
        self.network.load_state_dict(state["state_dict"])
        if self.averaged:
            averaged = {name.removeprefix("module."): t for name, t in state["averaged"].items()}
            averaged.pop("n_averaged", None)  # both are in checkpoints of version 1
            self.averaged.load_state_dict(averaged)
        fused = self.optimizer.param_groups[0]["fused"]  # the state may be from another device
        state["optimizer"]["param_groups"][0]["fused"] = fused
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # fused Adam needs the parameter's layout
                moments[name] = torch.empty_like(parameter).copy_(moments[name])
        if state["scaler"]:  # empty if the run was not in fp16 so far
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        if self.compute.rank == 0:
            self.sums.copy_(state["sums"])


def train_epoch(trainer: Trainer, stop: StopSignal) -> tuple[float, float]:
    """Train from where the epoch stands to its end; return its mean loss and accuracy in percent.

    Raises:
        Interrupted: a signal has arrived; the last step is complete.
        TrainingError: the loss is not finite.
    """
    args, compute = trainer.args, trainer.compute
    title, total = f"epoch {trainer.epoch + 1}/{args.epochs}", len(trainer.rows) * args.repeats
    done = trainer.step * args.batch_size
    read = printed = time.perf_counter()
    started = read - trainer.seconds  # as if the epoch had begun without a break
    trainer.training_loss.train()
    quiet = True if compute.rank else None  # None: quiet where the output is no terminal
    with tqdm(
        desc=title, total=total, initial=done, unit=" images", leave=False, disable=quiet
    ) as bar:
        for inputs, labels, images in trainer.batches():
            trainer.train_step(inputs, labels, images)
            done += images
            trainer.seconds = time.perf_counter() - started
            bar.update(images)
            # reading the sums makes the CPU wait for a GPU
            if compute.device.type == "cpu" or time.perf_counter() - read > 1:
                loss, accuracy = trainer.means(trainer.sums)
                read, status = time.perf_counter(), f"loss {loss:.4f}, accuracy {accuracy:.2f} %"
                bar.set_postfix_str(status, refresh=False)
                if bar.disable and read - printed > 60:  # a file, or a scheduler's log
                    print0(f"{title}: {done} of {total} images, {status}")
                    printed = read
            stop.check()
    means = trainer.means(compute.sum(trainer.sums))
    trainer.seconds = time.perf_counter() - started
    return means


# ----------------------------------------------------------------------- log and checkpoints


class Log:
    """What lies in a run's folder: events for TensorBoard, `history.csv` and `summary.json`."""

    def __init__(self, trainer: Trainer, about: dict):
        self.trainer, self.about = trainer, about
        resumed = bool(trainer.epoch or trainer.step)
        self.folder = new_run_folder(about["run"], resumed)
        begun = (self.folder / "train").exists()
        about["run"] = str(self.folder)  # the checkpoints hold it too
        for leftover in self.folder.glob("*.tmp"):  # of a process that was killed
            leftover.unlink()
        # drop what an earlier process has logged of epochs that come again
        purge = trainer.epoch + 1 if resumed else None
        self.train = SummaryWriter(self.folder / "train", purge_step=purge)
        self.valid = SummaryWriter(self.folder / "valid", purge_step=purge)
        if not begun:
            self.start()
        facts = {
            "command": f"`{about['command']}`",
            "images": ", ".join(f"{part} {len(paths)}" for part, paths in about["split"].items()),
            "classes": len(about["classes"]),
            "parameters": f"{sum(p.numel() for p in trainer.network.parameters()):,}",
            "computed on": f"{device_name(trainer.compute.device)}, {trainer.compute.dtype}",
        }
        facts |= VERSIONS | about["args"]
        self.train.add_text("run", table(["", ""], facts.items()), trainer.epoch)

    def start(self) -> None:
        """Log once the network, its first images, and the arguments for HPARAMS."""
        trainer, network = self.trainer, self.trainer.network.eval()
        rows, changes = trainer.epoch_plan()
        batch, _ = trainer.inputs(rows[:64], {name: c[:64] for name, c in changes.items()})
        self.train.add_image("first_batch", make_grid(data.to_pixels(batch), nrow=8), 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # add_graph uses torch.jit.trace, which is deprecated
            self.train.add_graph(network, batch[:1])
        names = ["recipe", "epochs", "batch_size", "seed", "stride", *RECIPES["report"]]
        chosen = {name: self.about["args"][name] for name in names}
        for event in hparams(chosen, {"best_accuracy": None, "best_loss": None}):
            self.valid.file_writer.add_summary(event)

    def epoch(self, history: list[dict], best: dict) -> None:
        """Log a completed epoch, the last row of `history`."""
        about, row, step = self.about, history[-1], history[-1]["epoch"]
        for name in ("learning_rate", "images_per_second"):
            self.train.add_scalar(name, row[name], step)
        weight = self.trainer.evaluated.features[0].weight
        filters = make_grid(weight, nrow=8, padding=1, normalize=True, scale_each=True)
        filters = filters.repeat_interleave(4, 1).repeat_interleave(4, 2)
        self.train.add_image("filters", filters, step)
        for tag in ("loss", "accuracy"):
            self.train.add_scalar(tag, row[f"train_{tag}"], step)
            self.valid.add_scalar(tag, row[f"valid_{tag}"], step)
            if step == best["epoch"]:
                self.valid.add_scalar(f"best_{tag}", row[f"valid_{tag}"], step)
        self.train.flush()
        self.valid.flush()
        with (
            contextlib.suppress(PermissionError),  # on Windows, Excel may have it open
            data.complete_file(self.folder / "history.csv", "w", newline="") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=row)
            writer.writeheader()
            writer.writerows(history)
        summary = {
            "command": about["command"],
            "arguments": about["args"],
            "versions": VERSIONS,
            "checkpoint": os.path.abspath(about["args"]["ckpt"]),
            "epochs": step,
            "best_epoch": best["epoch"],
            "best_accuracy": best["valid_accuracy"],
            "seconds": sum(row["seconds"] for row in history),
        }
        with data.complete_file(self.folder / "summary.json", "w") as file:
            json.dump(summary, file, indent=2)

    def close(self) -> None:
        self.train.close()
        self.valid.close()


def table(header: list[str], rows) -> str:
    """Return a Markdown table; bytes in the name of a file that are not text are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([printable(cell).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def printable(value: object) -> str:
    """Return `value` as text in UTF-8, whatever bytes the name of a file holds."""
    return str(value).encode(errors="backslashreplace").decode()


def new_run_folder(wanted: str, resumed: bool) -> Path:
    """Make the folder of a run and return it; a second run of one name gets `-2` behind it."""
    # not in the loop, which would try for ever where a broken link raises FileExistsError
    Path(wanted).parent.mkdir(parents=True, exist_ok=True)
    for attempt in itertools.count(1):
        folder = Path(wanted if attempt == 1 else f"{wanted}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(exist_ok=resumed)
            return folder


@contextlib.contextmanager
def hold(ckpt: str):
    """Lock `ckpt`, where the system can, so that no two runs write one checkpoint.

    Raises:
        TrainingError: another process holds it, or it is a folder or a device.
    """
    if os.path.exists(ckpt) and not os.path.isfile(ckpt):
        raise TrainingError(f"{ckpt}: is a folder or a device; --ckpt takes the name of a file")
    Path(ckpt).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{ckpt}.lock", "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"{ckpt}: another run writes it now; give another --name") from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows keeps an open file
                os.unlink(lock.name)


class Checkpoints:
    """The two files of a run: the best weights, for test.py, and the state, for --resume.

    Saving takes at most 5 % of the time: when it took t seconds, the next waits for 20 t. Until
    then the best weights stay in memory. They are written before the state. If the process is
    killed between the two, they may be of a later epoch; the resumed run takes them as its best.

    Args:
        about: what both files hold besides: classes, split, arguments and so on.
        checkpoint: the state to continue from, if there is one.

    Attributes:
        history: the rows of `history.csv`.
        best: epoch, accuracy and loss of the best weights; None before the first epoch, and if
            `--ckpt` holds another run's.
        earlier: whether there are files of an earlier run.

    Raises:
        CheckpointError: the disk has too little space.
    """

    def __init__(self, trainer: Trainer, about: dict, checkpoint: dict | None):
        self.trainer, self.about, self.weights = trainer, about, None
        ckpt = trainer.args.ckpt
        self.history = checkpoint["history"] if checkpoint else []
        self.best = saved_best(ckpt, checkpoint) if checkpoint else None
        size = sum(p.nbytes for p in trainer.network.parameters())
        state = size * (4 if trainer.averaged else 3)  # Adam has two moments
        self.seconds = (size + state) / 100e6  # a guess for the first save
        self.saved_at = time.perf_counter()
        files = [file for file in (Path(ckpt), last_path(ckpt)) if file.exists()]
        self.earlier = bool(files and not checkpoint)
        present = sum(file.stat().st_size for file in files)
        needed = max(size + 2 * state - present, state)  # a new state is beside the old
        folder = os.path.dirname(os.path.realpath(ckpt))
        if trainer.compute.rank == 0 and shutil.disk_usage(folder).free < needed:
            raise CheckpointError(
                f"{ckpt}: checkpoints need {needed / 1e6:.0f} MB there; free some space or give "
                "another --ckpt"
            )

    def keep_best(self, row: dict) -> bool:
        """Keep the present weights if they are the best so far: at equal accuracy, by the loss."""
        if self.best and row["epoch"] != self.best["epoch"]:  # equal: after a kill, it comes again
            new, old = ((each["valid_accuracy"], -each["valid_loss"]) for each in (row, self.best))
            if new <= old:
                return False
        self.best = {name: row[name] for name in ("epoch", "valid_accuracy", "valid_loss")}
        state = self.trainer.evaluated.state_dict()
        self.weights = {name: tensor.clone() for name, tensor in state.items()}
        return True

    def save_best(self) -> None:
        """Write the best weights if `--ckpt` does not hold them yet."""
        if self.weights and self.trainer.compute.rank == 0:
            weights = {name: tensor.cpu() for name, tensor in self.weights.items()}
            save(self.about | self.best | {"state_dict": weights}, self.trainer.args.ckpt)
        self.weights = None

    def save(self) -> None:
        """Write both files; every process calls it."""
        started = time.perf_counter()
        state = self.trainer.state_dict()
        self.save_best()
        if self.trainer.compute.rank == 0:
            best = self.best or {"valid_accuracy": None, "valid_loss": None}
            job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
            more = {"history": self.history, "job": job, **state}  # "epoch" is now the state's
            save(self.about | best | more, last_path(self.trainer.args.ckpt))
        self.saved_at = time.perf_counter()
        self.seconds = self.saved_at - started

    def save_if_due(self, last: bool) -> None:
        """Write both files; but for the last time, only if that takes at most 5 % of the time."""
        due = last or time.perf_counter() - self.saved_at >= 20 * self.seconds
        if self.trainer.compute.max(due and self.trainer.compute.rank == 0):  # process 0 decides
            self.save()


def saved_best(ckpt: str, checkpoint: dict) -> dict | None:
    """Return epoch, accuracy and loss of the weights in `ckpt` if they are this run's.

    They are of a later epoch than `checkpoint` if the process was killed after it had saved them
    and before it saved its state.
    """
    with contextlib.suppress(CheckpointError, KeyError):  # missing, or another program's
        found = load(ckpt)
        runs = {Path(each["run"]).name for each in (found, checkpoint)}
        best = {name: found[name] for name in ("epoch", "valid_accuracy")}
        later = best["epoch"] > checkpoint["epoch"]
        rows = [row for row in checkpoint["history"] if best.items() <= row.items()]
        if len(runs) == 1 and found["split"] == checkpoint["split"] and (later or rows):
            loss = rows[0]["valid_loss"] if rows else found["valid_loss"]
            return best | {"valid_loss": loss}
    return None


# -------------------------------------------------------------------------------------- main


def open_data(args, checkpoint: dict | None, compute: Compute) -> tuple[ImageStore, dict]:
    """Return the images, and the manifest of their split: `checkpoint`'s if there is one.

    Raises:
        DataError: the images cannot be used, or are not those of `checkpoint`.
    """
    with compute.first_on_machine():
        store = ImageStore(args.data, args.cache, args.skip_bad_images)
    if checkpoint and checkpoint["fingerprint"] != store.fingerprint:
        changes = store.differences(checkpoint.get("checksums", store.checksums)) or "some"
        raise DataError(
            f"{store.root}: its images have changed since the run began: {changes}; restore them, "
            "or start another run, perhaps with --init"
        )
    manifest = checkpoint["split"] if checkpoint else split(store, args.seed)
    trained = set(store.labels[store.rows(manifest["train"])].tolist())
    if rest := [name for label, name in enumerate(store.classes) if label not in trained]:
        store.notes.append(f"classes without training images: {data.shortened(rest)}")
    for note in store.notes:
        print0(note)
    store.move_to(compute.device)
    return store, manifest


def build_trainer(args, checkpoint: dict | None, compute: Compute) -> tuple[Trainer, dict]:
    """Return the trainer, where `checkpoint` left it, and what both files of the run share.

    Raises:
        DataError: see `open_data`.
        TrainingError: the processes cannot share a batch equally, or start at different steps.
    """
    if args.batch_size % compute.world_size:
        raise TrainingError(f"--batch-size must be a multiple of {compute.world_size} processes")
    store, manifest = open_data(args, checkpoint, compute)
    rows = store.rows(manifest["train"])
    source = {} if checkpoint or args.init in INITS else load(args.init)
    trainer = Trainer(args, store, rows, compute, initial_network(args, store, rows, source))
    if checkpoint:
        trainer.load_state_dict(checkpoint)
    done = trainer.epoch * trainer.steps_per_epoch + trainer.step
    # torchrun counts restarts for each machine, so that not all may have loaded a checkpoint
    if compute.max(done) > done:
        raise TrainingError(
            "other processes are further in this run; put --ckpt in a folder that all machines "
            "share, and --resume"
        )
    return trainer, about_run(args, store, manifest, checkpoint or {}, source)


def about_run(args, store: ImageStore, manifest: dict, checkpoint: dict, source: dict) -> dict:
    """Return what both files of a run hold besides weights and state.

    Args:
        checkpoint: the one that is resumed, or empty.
        source: the one of `--init`, or empty.
    """
    command = shlex.join(["python", *sys.argv])
    if "command" in checkpoint:  # version 1's do not hold it, nor "seen"
        command = f"{checkpoint['command']}; {command}"
    run = checkpoint.get("run") or args.name or time.strftime("%Y-%m-%d_%H-%M-%S")
    seen = seen_images(source).union(checkpoint.get("seen", []))
    others = [store.checksums[path] for path in manifest["valid"] + manifest["test"]]
    if source and (known := sum(checksum in seen for checksum in others)):
        print0(f"{args.init} was trained on {known} of {len(others)} validation and test images")
    return {
        "classes": store.classes,
        "stride": args.stride,
        "seed": args.seed,
        "size": args.test_size,  # with mean and std, what a script needs to use the weights
        "mean": data.MEAN,
        "std": data.STD,
        "args": vars(args),
        "versions": VERSIONS,
        "command": command,  # of a resumed run, all of them
        "run": str(Path(args.logdir, Path(run).name)),
        "split": manifest,
        "fingerprint": store.fingerprint,
        "checksums": store.checksums,
        "seen": sorted(seen),
    }


def print_opening(checkpoints: Checkpoints) -> None:
    """Print what is trained, on what, and where it goes."""
    trainer, about = checkpoints.trainer, checkpoints.about
    args, compute = trainer.args, trainer.compute
    train, valid, test = (len(about["split"][part]) for part in ("train", "valid", "test"))
    print0(
        f"recipe {args.recipe}: {args.epochs} epochs of {trainer.steps_per_epoch} steps, "
        f"batch {args.batch_size}, {args.train_size} pixels (tested at {args.test_size}), "
        f"{str(compute.dtype).removeprefix('torch.')} on {device_name(compute.device)}\n"
        f"{len(about['classes'])} classes, {train} training, {valid} validation and {test} test "
        f"images: one validation image is {100 / valid:.3g} points\n"
        f"classes: {data.shortened(about['classes'], 10)}\n"
        f"log in {shown(about['run'])}, best weights in {args.ckpt}"
    )
    if trainer.epoch or trainer.step:
        step = f"step {trainer.step} of {trainer.steps_per_epoch}"
        print0(f"continuing after epoch {trainer.epoch}, {step}")
        if checkpoints.history and not checkpoints.best:
            print0(
                f"{args.ckpt} does not hold this run's best weights; the best of the epochs from "
                "here on is saved instead"
            )
    if checkpoints.earlier:
        print0(f"{args.ckpt} is of an earlier run, which this one replaces when it saves")
    if trainer.steps_per_epoch == 1:
        print0(f"{train} images are one batch of {args.batch_size}: one step an epoch")


def main(argv: list[str] | None = None) -> None:
    """Train as `argv` says (default: the command line)."""
    args, checkpoint = parse(argv)
    compute = set_up(args.device, args.precision, args.deterministic)
    trainer, about = build_trainer(args, checkpoint, compute)
    store, rows = trainer.store, trainer.store.rows(about["split"]["valid"])
    labels = store.labels.cpu()[rows]
    lock = hold(args.ckpt) if compute.rank == 0 else contextlib.nullcontext()
    with lock, StopSignal(compute) as stop:
        checkpoints = Checkpoints(trainer, about, checkpoint)
        log = Log(trainer, about) if compute.rank == 0 else None
        print_opening(checkpoints)
        del checkpoint  # as large as the trainer
        history = checkpoints.history
        started = time.perf_counter() - trainer.seconds
        try:
            while trainer.epoch < args.epochs:
                train = train_epoch(trainer, stop)
                network, size = trainer.evaluated, args.test_size
                valid = score(evaluate(network, store, rows, size, compute, stop=stop), labels)
                trainer.check_finite(valid[0])  # the last step may have broken the weights
                now = time.perf_counter()
                history.append(trainer.end_epoch(train, valid, seconds=now - started))
                started = now  # so an epoch's seconds include the saving of the one before
                is_best = checkpoints.keep_best(history[-1])
                if log:
                    log.epoch(history, checkpoints.best)
                checkpoints.save_if_due(last=trainer.epoch == args.epochs)
                print_epoch(history, args.epochs, is_best)
        except BrokenPipeError:  # nobody reads the output; other processes cannot know that
            if compute.world_size == 1 and (trainer.epoch or not checkpoints.earlier):
                checkpoints.save()
            raise
        except Interrupted as interrupted:
            advice = "the earlier run's checkpoints are kept"
            if trainer.epoch or not compute.max(checkpoints.earlier):
                checkpoints.save()
                advice = f"continue with: {resume_command(args.ckpt)}"
            raise Interrupted(*interrupted.args, advice) from None
        finally:
            checkpoints.save_best()  # also when training breaks
        if log:
            log.close()
    print_end(args, history, checkpoints.best)


def shown(path: str) -> str:
    """Return an absolute path as short as it can be from here."""
    return path.removeprefix(os.path.join(os.getcwd(), ""))


def resume_command(ckpt: str) -> str:
    """Return the command that continues a run."""
    flag = "" if ckpt == "alexnet.pth" else f" --ckpt {shlex.quote(ckpt)}"
    return f"python train.py --resume{flag}"


def print_epoch(history: list[dict], epochs: int, is_best: bool) -> None:
    """Print the line of a completed epoch, the last row of `history`."""
    row = history[-1]
    left = (epochs - row["epoch"]) * sum(each["seconds"] for each in history) / len(history)
    print0(
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}"
        f"  train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:5.2f} %"
        f"  valid loss {row['valid_loss']:.4f} accuracy {row['valid_accuracy']:5.2f} %"
        f"  rate {row['learning_rate']:.3g}  {row['images_per_second']:.1f} images/s"
        f"  {row['seconds']:.1f} s, {tqdm.format_interval(left)} left"
        f"{'  best' if is_best else ''}"
    )


def print_end(args: argparse.Namespace, history: list[dict], best: dict | None) -> None:
    """Print the result of a finished run, and what to do next."""
    total = tqdm.format_interval(sum(row["seconds"] for row in history))
    ckpt = shlex.quote(args.ckpt)
    if best:
        accuracy = f"valid accuracy {best['valid_accuracy']:.2f} %"
        print0(f"best: epoch {best['epoch']}, {accuracy}, saved in {args.ckpt}")
        print0(f"next: python test.py --ckpt {ckpt}")
    print0(f"      tensorboard --logdir {shlex.quote(shown(args.logdir))}")
    more = f"{resume_command(args.ckpt)} --epochs {2 * len(history)}"
    print0(f"{len(history)} of {args.epochs} epochs trained, in {total}; to train longer: {more}")


def run_command(main) -> None:
    """Run `main()`. What a user can fix ends as one line on standard error and an exit status."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # the name of a file may not be text
    threading.excepthook = ignore_writer
    status = 1
    try:
        main()
        leave_group()
        return
    except (KeyboardInterrupt, Interrupted) as interrupted:
        signum, *advice = interrupted.args or [signal.SIGINT]
        message, status = "; ".join(["interrupted", *advice]), 128 + signum
        if isinstance(interrupted, Interrupted):
            leave_group()  # all processes are here
        if process_rank():
            sys.exit(status)
    except (DataError, CheckpointError, TrainingError) as error:
        message = f"error: {error}"
    except OSError as error:
        place = "output" if isinstance(error, BrokenPipeError) else "the log"
        place = os.fsdecode(error.filename or place)
        message = f"error: {place}: {error.strerror or error}"
    except (RuntimeError, MemoryError) as error:
        message = f"error: {explain(error)}"
    let_process_0_speak()
    leave_group(destroy=False)
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def leave_group(destroy: bool = True) -> None:
    """Leave the other processes, where there are any.

    gloo's threads need the GIL to free our tensors, and the group's destructor holds it while it
    waits for them: without the pause, the program may hang. No call tells when they are done.
    """
    if dist.is_available() and dist.is_initialized():
        time.sleep(0.5)
        if destroy:
            dist.destroy_process_group()


def explain(error: Exception) -> str:
    """Return what a user can do about an error of torch's; raise any other again."""
    memory = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    if isinstance(error, MemoryError) or any(words in str(error) for words in memory):
        return "out of memory; try half the --batch-size, a smaller --train-size or --device cpu"
    if dist.is_available() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        cause = str(error).partition("Exception raised from")[0]  # a stack of C++ follows
        return f"another process was lost, or is out of reach; its own message may say why: {cause}"
    if "no kernel image" in str(error):
        return "this PyTorch is not built for this GPU; install one that is, or give --device cpu"
    raise error


def ignore_writer(failure) -> None:
    """Hide an error in TensorBoard's writing thread: its next call raises it in the main one."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)


if __name__ == "__main__":
    run_command(main)
