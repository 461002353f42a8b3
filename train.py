"""Train AlexNet from scratch on Caltech101, or on any folder of class folders.

    python train.py --epochs 30 --lr 1e-4       # the report's experiment
    python train.py --recipe strong             # the same network, trained better
    python train.py --resume                    # go on where a run was interrupted
    torchrun --standalone --nproc-per-node=4 train.py --epochs 30 --lr 1e-4

Random numbers are looked up, never carried: the order and the augmentation of an epoch depend on
the seed and the epoch, dropout on the step and the process as well. So a run that goes on from any
step sees the very numbers that an unbroken one does, and any number of processes the same pictures.
"""

import argparse
import contextlib
import csv
import difflib
import itertools
import math
import os
import platform
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once: huge pages spare page faults
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid
from tqdm import tqdm

import data
from data import UNIFORMS, DataError, ImageStore, denormalize, generator, layout, prepare, seed_of, split
from model import FORMAT, AlexNet, CheckpointError, check_writable, init_he, load, replacing, save, whiten

RECIPES = {  # a recipe is a set of defaults for ordinary flags
    "report": dict(
        lr=1e-4, schedule="constant", warmup_epochs=0, weight_decay=0.0, label_smoothing=0.0,
        augment="none", train_size="224", test_size=224, ema=0.0, dropout=0.5, init="default",
    ),
    "strong": dict(
        lr=3e-4, schedule="cosine", warmup_epochs=2, weight_decay=1.0, label_smoothing=0.1,
        augment="crop,color,trivial", train_size="80-128", test_size=128, ema=0.998, dropout=0.3, init="whiten",
    ),
}  # fmt: skip
MAY_CHANGE = {"epochs", "data", "cache", "device", "ckpt", "logdir", "resume"}  # when a run goes on
EVAL_BATCH = 128  # images in a batch without gradients
VERSIONS = {  # that a result depends on, and that of the checkpoint's format
    "format": FORMAT, "python": platform.python_version(),
    "torch": str(torch.__version__), "torchvision": torchvision.__version__,
}  # fmt: skip


class UsageError(Exception):
    """The command line makes no sense; the message says what does."""


class TrainingError(Exception):
    """Training or testing can't go on; the message says what to change."""


# ---------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest flag for a misspelt one."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{message} (see --help)")


def number(kind: type, low: float, high: float):
    """Return a parser of numbers from `low` to `high`, for argparse's `type`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if not low <= value <= high:  # NaN is outside too
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    return parse


def matching(pattern: str, meaning: str):
    """Return a check that a text is what `pattern` describes, for argparse's `type`."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
        return text

    return parse


def file_name(text: str) -> str:
    """Return `text` if it can be the name of a checkpoint, for argparse's `type`."""
    if text.endswith(("/", os.sep)) or not Path(text).stem.removesuffix(".last").strip("."):
        raise argparse.ArgumentTypeError(f"{text!r} names no file")
    return text


TEXT = matching("[^\ud800-\udfff]*", "text that UTF-8 can hold")  # which torch and TensorBoard need
NAMES, PIXELS = "|".join(data.AUGMENTATIONS), r"(6[4-9]|[7-9]\d|[1-4]\d\d)"
FLAGS = {  # by group: the type or the choices, the default unless recipes give it, the help
    "experiment": {
        "recipe": (list(RECIPES), "report", "defaults for the flags that name one for each"),
        "epochs": (number(int, 1, 100_000), 30, "passes over the training images"),
        "batch_size": (number(int, 1, 65_536), 64, "images in a step, over all processes"),
        "lr": (number(float, 1e-12, 100), ..., "peak learning rate of Adam"),
        "schedule": (["constant", "cosine"], ..., "of the learning rate, after the warm-up"),
        "warmup_epochs": (number(int, 0, 10_000), ..., "in which the rate rises from 0"),
        "weight_decay": (number(float, 0, 100), ..., "decoupled, as in AdamW"),
        "label_smoothing": (number(float, 0, 0.99), ..., "share of the target that all classes get evenly"),
        "augment": (matching(f"none|({NAMES})(,({NAMES}))*", f"none or some of {NAMES.replace('|', ',')}"), ...,
                    f"none, or some of {NAMES.replace('|', ',')}"),
        "train_size": (matching(f"{PIXELS}(-{PIXELS})?", "a size from 64 to 499 or two of them, as 128-224"), ...,
                       "pixels a side; A-B grows from A to B over the first 80 %% of the epochs"),
        "test_size": (number(int, 64, 499), ..., "pixels a side in validation and test"),
        "ema": (number(float, 0, 0.99999), ...,
                "decay a step of averaged weights, then those tested and saved; 0: none"),
        "init": (["default", "he", "whiten"], ...,
                 "initial weights: PyTorch's; He's; or those after a first layer that whitens patches"),
        "seed": (number(int, 0, 2**32), 0, "decides split, weights, order, augmentation and dropout"),
    },
    "network": {
        "stride": ([2, 4], 2, "of the first convolution: 2 is the report's, 4 torchvision's"),
        "dropout": (number(float, 0, 0.99), ..., "probability"),
    },
    "data": {
        "data": (str, data.DEFAULT_DATA, "folder that holds 101_ObjectCategories, or any folder of "
                 "class folders, or 'sample' to have a small one drawn; the default is downloaded if missing"),
        "cache": (TEXT, data.default_cache(), "folder for the decoded images"),
        "skip_bad_images": (bool, False, "go on without the images that can't be read"),
    },
    "machine": {
        "device": (matching(r"auto|cpu|cuda(:[0-9]{1,2})?|mps", "one of auto, cpu, cuda, cuda:N, mps"), "auto",
                   "auto, cpu, cuda, cuda:N or mps"),
        "precision": (["auto", "fp32", "bf16", "fp16"], "auto", "auto: 16 bits where the device is built for it"),
        "compile": (bool, False, "torch.compile the network"),
        "deterministic": (bool, False, "the same figures each time on CUDA too, more slowly"),
        "bf16_gradients": (bool, False, "halve what several processes exchange"),
    },
    "output": {
        "ckpt": (file_name, "alexnet.pth", "best checkpoint; NAME.last.pth beside it holds what --resume needs"),
        "resume": (file_name, False, "go on with --ckpt's run or that of the given NAME.last.pth, with its arguments; "
                   "of these, --epochs, --data, --cache, --device and --logdir may be changed"),
        "logdir": (TEXT, "runs", "folder of the runs that TensorBoard shows"),
        "name": (TEXT, None, "of the run (default: date and time)"),
    },
}  # fmt: skip
DEFAULTS = {name: default for flags in FLAGS.values() for name, (_, default, _) in flags.items()}


def add_flag(group, name: str) -> None:
    """Add one of FLAGS to a parser or a group of one, with its default in the help."""
    kind, default, text = next(flags[name] for flags in FLAGS.values() if name in flags)
    if default is ...:
        text += f" ({', '.join(f'{recipe}: {defaults[name]}' for recipe, defaults in RECIPES.items())})"
    elif default is not None and default is not False:  # which 0 equals
        text += f" (default: {default})".replace("%", "%%")
    options = {"type": kind, "metavar": name.split("_")[-1].upper()}
    if kind is bool:
        options = {"action": "store_true"}
    elif isinstance(kind, list):
        options = {"type": type(kind[0]), "choices": kind}
    elif name == "resume":
        options |= {"nargs": "?", "const": True, "metavar": "FILE"}
    group.add_argument("--" + name.replace("_", "-"), help=text, **options)


def last_path(ckpt: str) -> Path:
    """Return where the resume checkpoint of `ckpt` lies: alexnet.pth -> alexnet.last.pth."""
    path = Path(ckpt)
    return path.with_name(f"{path.stem}.last{path.suffix}")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """Return the arguments and, when a run goes on, its resume checkpoint."""
    parser = Parser(prog="train.py", description=__doc__, argument_default=argparse.SUPPRESS)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name in flags:
            add_flag(group, name)
    given = vars(parser.parse_args(argv))  # only what was given, so that it can be told from defaults
    args = DEFAULTS | RECIPES[given.get("recipe", DEFAULTS["recipe"])] | given
    resume, checkpoint = args["resume"], None
    if isinstance(resume, str):
        args["ckpt"] = re.sub(r"\.last(\.[^./\\]+)?$", r"\1", resume)  # which may be the best checkpoint's name as well
        if os.path.abspath(given.get("ckpt", args["ckpt"])) != os.path.abspath(args["ckpt"]):
            parser.error(f"--ckpt {given['ckpt']} contradicts --resume {resume}, which goes with {args['ckpt']}")
    last = last_path(args["ckpt"])
    if resume:
        checkpoint = load(last)
        if "optimizer" not in checkpoint:
            raise CheckpointError(f"{last}: is not a resume checkpoint; train.py writes one as NAME.last.pth")
    elif job() and last.exists():
        with contextlib.suppress(CheckpointError):  # a new run replaces whatever lies there
            found = load(last)
            checkpoint = found if found.get("job") == job() else None  # of this run, restarted by torchrun
    elif not job() and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # nothing says whose `last` is
        parser.error("torchrun restarts a run only with --rdzv-id or --standalone; go on with --resume")
    if checkpoint:
        stored = checkpoint["args"]
        wrong = [name for name in given if name not in MAY_CHANGE and stored.get(name) != given[name]]
        if wrong:
            flag = "--" + wrong[0].replace("_", "-")
            parser.error(
                f"{flag} {given[wrong[0]]} contradicts the run in {last}, which has {stored.get(wrong[0])}; "
                f"leave {flag} out, or start a new run without --resume"
            )
        args |= stored | {"ckpt": args["ckpt"]} | given
    for name in ("data", "cache", "logdir"):  # so that they are found again from any folder
        if (name, args[name]) != ("data", "sample"):
            args[name] = os.path.abspath(args[name])
    args = argparse.Namespace(**args)
    if checkpoint and args.epochs < checkpoint["epoch"]:
        parser.error(f"--epochs {args.epochs}: the run in {last} has already trained {checkpoint['epoch']}")
    if args.warmup_epochs and args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}")
    if args.name is not None and (Path(args.name).name != args.name or args.name in ("", "..")):
        parser.error(f"--name {args.name!r} must be a plain name, without folders")
    return args, checkpoint


def out_of_memory(error: Exception) -> bool:
    """Tell whether an error is that of a device, or the machine, without enough memory."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def run_cli(main) -> None:
    """Run `main()`: what a user can mend ends as one line on standard error and an exit status."""
    threading.excepthook = lambda _: None  # TensorBoard's writers raise again in this thread
    if sys.stdout:  # it may be closed
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)  # a file's name may be no text
    rank, status = os.environ.get("RANK", "0"), 1
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except KeyboardInterrupt as stop:  # that of Signals holds the signal and, mostly, some advice
        signum, *advice = stop.args or [signal.SIGINT]
        message, status = "; ".join(["interrupted", *advice]), 128 + signum
        if rank != "0":
            sys.exit(status)
    except UsageError as error:
        message, status = f"error: {error}", 2
    except (DataError, CheckpointError, TrainingError) as error:
        message = f"error: {error}"
    except OSError as error:
        message = f"error: {os.fsdecode(error.filename or 'output')}: {error.strerror or error}"
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            message = "error: out of memory; end other programs, or give --device cpu"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            message = "error: another process was lost; its own message, or torchrun's report, says why"
        else:
            raise
    if rank != "0":  # process 0 most likely says the same; torchrun then ends this one
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        time.sleep(5)
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


# ------------------------------------------------------------------------- device, processes, signals


@dataclass(frozen=True)
class Compute:
    """Where and in which precision this process computes, and its place among those of torchrun."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    size: int
    local_rank: int

    def autocast(self) -> torch.autocast:
        """Return a context in which convolutions and matrix products compute in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` added up over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor := tensor.clone())
        return tensor

    def max(self, value: int) -> int:
        """Return the largest `value` of all processes. It goes from CPU to CPU, so no GPU waits."""
        if self.size == 1:
            return value
        dist.all_reduce(flag := torch.tensor(value), dist.ReduceOp.MAX)
        return int(flag)

    @contextlib.contextmanager
    def first_on_machine(self):
        """Let one process of each machine through the block first, then the others."""
        if self.local_rank:
            self.max(0)  # a barrier
        yield
        if not self.local_rank:
            self.max(0)


def set_up(device: str, precision: str, deterministic: bool = False) -> Compute:
    """Choose device and precision, and meet the other processes if torchrun started this one.

    Raises:
        TrainingError: there is no such device here.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, size, local = (int(os.environ[name]) for name in names) if dist.is_torchelastic_launched() else (0, 1, 0)
    if device == "auto":
        mps = size == 1 and torch.backends.mps.is_available()  # gloo and NCCL know no MPS
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if size > 1 and (device == "mps" or device.startswith("cuda:")):
        raise TrainingError(f"--device {device} is one device for {size} processes; give --device cuda or cpu")
    chosen = torch.device(device, local) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        if chosen.index >= torch.cuda.device_count():
            raise TrainingError(f"--device {device}: {torch.cuda.device_count()} such devices here; try --device cpu")
        torch.cuda.set_device(chosen)
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise TrainingError("--device mps: no such device here; try --device cpu")
    torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        store, _, _ = next(rendezvous("env://"))
        if os.environ["GROUP_WORLD_SIZE"] == "1":  # torchrun keeps its store when it restarts the processes of
            # one machine, and with it the addresses of those that died
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return Compute(chosen, choose_precision(chosen, precision), rank, size, local)


def job() -> str | None:
    """Return torchrun's id of this run: the same after a restart, another after a new start; None without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name


def choose_precision(device: torch.device, choice: str) -> torch.dtype:
    """Return the type to compute in; `auto` takes what the device computes natively.

    A CPU without bf16 instructions is tens of times slower in bf16 than in fp32.
    """
    if choice == "auto" and device.type == "cuda":
        choice = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif choice == "auto" and device.type == "cpu":
        able = torch.cpu.get_capabilities()
        choice = "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choice, torch.float32)


def device_title(device: torch.device) -> str:
    """Return a name of the device for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


class Signals:
    """SIGINT and SIGTERM: before training they end the program at once, then after the batch in hand."""

    def __init__(self, compute: Compute):
        self.compute, self.received, self.at_once = compute, 0, True
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self.handle)

    def handle(self, signum: int, frame) -> None:
        if self.at_once:
            raise KeyboardInterrupt(signum, "no training was lost")
        if self.received and signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self.received = signum

    def watch(self, steps):
        """Yield `steps`, as long as no process has received a signal.

        Raises:
            KeyboardInterrupt: one has; the step in hand is finished.
        """
        for step in steps:
            yield step
            if signum := self.compute.max(self.received):
                raise KeyboardInterrupt(signum)


# -------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(
    network: torch.nn.Module, store: ImageStore, rows: torch.Tensor, size: int, compute: Compute, flip=False, watch=iter
) -> torch.Tensor:
    """Return the logits of those rows of `store`, float32 (len(rows), classes), on the CPU.

    Every picture is computed exactly once, whatever the number of processes; all get the result.

    Args:
        size: pixels, both sides, at which the network sees them.
        flip: look at the mirror images instead.
        watch: passes the batches on, or raises to stop.
    """
    network.eval()
    logits = torch.zeros(len(rows), len(store.classes), device=compute.device)
    for positions in watch(torch.arange(len(rows)).split(EVAL_BATCH * compute.size)):
        mine = positions[compute.rank :: compute.size]
        if len(mine):
            images, _ = store.batch(rows[mine], compute.device)
            with compute.autocast():
                output = network(prepare(images.flip(-1) if flip else images, size))
            logits[mine.to(compute.device)] = output.float()
    return compute.sum(logits).cpu()


def score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return cross-entropy and accuracy in percent, means over the images, both float32, as event files hold them."""
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
    sizes = [int(size) for size in args.train_size.split("-")]
    progress = min(1.0, epoch / max(1, 0.8 * args.epochs - 1))
    return sizes[-1] if progress == 1 else sizes[0] + int((sizes[-1] - sizes[0]) * progress) // 16 * 16


class Run:
    """All that a run is: what is trained, how far it has come, and what it has seen of this epoch.

    Attributes:
        replica: the network, wrapped in DistributedDataParallel where there are several processes.
        evaluated: the network that is validated and saved: the averaged one with `--ema`.
        folder: of its log; set once it is clear that it can be saved.
        epoch: epochs completed.
        step: steps completed in the epoch after those.
        sums: float32 (3,) on the device: loss, hits and images of these steps, of this process.
        seconds: spent on these steps.
        history: a dict for each completed epoch, the rows of `history.csv`.
        best: the row with the highest validation accuracy, None before the first.
    """

    def __init__(self, args, store: ImageStore, manifest: dict, compute: Compute):
        self.args, self.store, self.manifest, self.compute = args, store, manifest, compute
        self.rows = {name: store.rows(manifest[name]) for name in ("train", "valid")}
        self.epoch, self.step, self.seconds, self.history, self.best = 0, 0, 0.0, [], None
        self.folder = Path(args.logdir)
        self.sums = torch.zeros(3, device=compute.device)

        torch.manual_seed(args.seed)
        network = AlexNet(len(store.classes), args.stride, args.dropout)
        if args.init != "default":
            init_he(network)
        if args.init == "whiten":
            images, _ = store.batch(self.rows["train"][:256], torch.device("cpu"))  # in random order already
            whiten(network.features[0], prepare(images, train_size(args, 0)))
        self.network = self.replica = network.to(compute.device, memory_format=layout(compute.device))
        if compute.size > 1:
            self.replica = DistributedDataParallel(self.network, gradient_as_bucket_view=True)
            if args.bf16_gradients:
                self.replica.register_comm_hook(None, bf16_compress_hook)
        self.averaged = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
        self.evaluated = self.averaged.module if self.averaged else self.network
        # without weight decay it is Adam
        self.optimizer = torch.optim.AdamW(self.network.parameters(), weight_decay=args.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.dtype is torch.float16)

    def train_step(self, inputs: torch.Tensor, labels: torch.Tensor, images: int) -> None:
        """Take one step on this process's share of a batch of `images`. Nothing waits for the device."""
        with self.compute.autocast():
            logits = self.replica(inputs)
            loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.args.label_smoothing)
            shown = F.cross_entropy(logits.detach(), labels, reduction="sum")  # not smoothed, as in validation
        self.optimizer.zero_grad()
        # DDP averages over processes: so the gradient is that of the mean over the whole batch
        self.scaler.scale(loss * (self.compute.size / images)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged:
            self.averaged.update_parameters(self.network)
        hits = (logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack([shown, hits, torch.full_like(hits, len(labels))])

    def epoch_plan(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this epoch's rows of the store in their order, and each picture's random numbers."""
        place, images = (self.args.seed, self.epoch), len(self.rows["train"])
        order = torch.randperm(images, generator=generator("order", *place))
        uniforms = torch.rand(images, UNIFORMS, generator=generator("augmentation", *place))
        return self.rows["train"][order].to(self.store.pixels.device), uniforms[order].to(self.compute.device)

    def inputs(self, rows: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return those pictures as the network sees them in this epoch, and their labels."""
        images, labels = self.store.batch(rows, self.compute.device)
        size = train_size(self.args, self.epoch)
        return prepare(images, size, self.args.augment.split(","), uniforms), labels

    def train_epoch(self, watch) -> tuple[float, float]:
        """Train from where the epoch stands to its end; return the loss and accuracy of all of it."""
        args, compute, (rows, uniforms) = self.args, self.compute, self.epoch_plan()
        starts = range(0, len(rows), args.batch_size)
        started = time.perf_counter() - self.seconds  # as if the epoch had begun without a break
        read = started  # when the sums were last fetched from the device
        self.replica.train()
        with tqdm(
            desc=f"epoch {self.epoch + 1}/{args.epochs}",
            total=len(rows),
            initial=self.step * args.batch_size,
            unit=" images",
            leave=False,
            disable=None if compute.rank == 0 else True,  # None: where the output is no terminal
        ) as bar:
            for start in watch(starts[self.step :]):
                stop = min(start + args.batch_size, len(rows))
                share = slice(start + compute.rank, stop, compute.size)
                self.optimizer.param_groups[0]["lr"] = learning_rate(args, self.epoch + (self.step + 0.5) / len(starts))
                torch.manual_seed(seed_of("dropout", args.seed, self.epoch, self.step, compute.rank))
                self.train_step(*self.inputs(rows[share], uniforms[share]), stop - start)
                self.step, self.seconds = self.step + 1, time.perf_counter() - started
                bar.update(stop - start)
                if compute.device.type == "cpu" or time.perf_counter() - read > 1:  # a GPU is waited for
                    loss, accuracy = self.means(self.sums)
                    bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f} %", refresh=False)
                    read = time.perf_counter()
        means = self.means(compute.sum(self.sums))
        self.seconds = time.perf_counter() - started
        return means

    def means(self, sums: torch.Tensor) -> tuple[float, float]:
        """Return the mean loss, which must be finite, and the accuracy in percent that `sums` amount to."""
        loss, hits, images = sums.tolist()
        self.check_finite(loss)
        return loss / max(images, 1), 100 * hits / max(images, 1)  # a process may not have had its first yet

    def check_finite(self, loss: float) -> None:
        """Raise TrainingError if `loss` is not finite."""
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is not finite in epoch {self.epoch + 1}, step {self.step}, at a learning rate of "
                f"{self.optimizer.param_groups[0]['lr']:g}; {'the best checkpoint is kept; ' if self.best else ''}"
                "try a lower --lr"
            )

    def run_epoch(self, watch) -> dict:
        """Train what is left of the epoch, validate, and return the new row of the history."""
        train_loss, train_accuracy = self.train_epoch(watch)
        started, rows = time.perf_counter(), self.rows["valid"]
        logits = evaluate(self.evaluated, self.store, rows, self.args.test_size, self.compute, watch=watch)
        valid_loss, valid_accuracy = score(logits, self.store.labels.cpu()[rows])
        self.check_finite(valid_loss)  # the last step may have broken the weights
        figures = {
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
            "images_per_second": len(self.rows["train"]) / self.seconds,
            "seconds": self.seconds + time.perf_counter() - started,
        }
        # as float32, which the event files hold: so that all outputs agree to the last digit
        figures = {name: torch.tensor(value).item() for name, value in figures.items()}
        rate = self.optimizer.param_groups[0]["lr"]
        self.history.append({"epoch": self.epoch + 1, "learning_rate": rate, **figures})
        self.best = max(self.history, key=lambda row: row["valid_accuracy"])  # the first such
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()
        return self.history[-1]

    def bytes_to_write(self) -> int:
        """Return by how much both checkpoints will grow, with a new one beside the old for a moment."""
        best = sum(p.numel() * p.element_size() for p in self.network.parameters())
        last = best * (4 if self.args.ema else 3)  # weights, Adam's two moments, averaged weights
        paths = (Path(self.args.ckpt), last_path(self.args.ckpt))
        return max(last, best + 2 * last - sum(path.stat().st_size for path in paths if path.is_file()))

    def save_best(self) -> None:
        """Write the present parameters, those with the best validation accuracy, to `--ckpt`."""
        weights = {name: tensor.cpu() for name, tensor in self.evaluated.state_dict().items()}
        self._save({"state_dict": weights}, self.args.ckpt)

    def best_is_saved(self) -> bool:
        """Tell whether `--ckpt` holds the best epoch: it may be lost, or another run's by now."""
        try:
            found = load(self.args.ckpt)
        except CheckpointError:
            return False
        best = (self.manifest, self.best["epoch"], self.best["valid_accuracy"])
        return tuple(found.get(name) for name in ("split", "epoch", "valid_accuracy")) == best

    def save_last(self) -> None:
        """Write all that continues this run beside `--ckpt`; every process calls it.

        Raises:
            TrainingError: the loss is not finite, and the weights are better not saved.
        """
        sums = self.compute.sum(self.sums)
        self.check_finite(sums[0].item())
        state = {
            "state_dict": self.network.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "sums": sums,
            "seconds": self.seconds,
            "history": self.history,
            "job": job(),
        }
        self._save(state, last_path(self.args.ckpt))

    def _save(self, state: dict, path: str | Path) -> None:
        if self.compute.rank == 0:
            about = {
                "classes": self.store.classes,
                "stride": self.args.stride,
                "seed": self.args.seed,
                "epoch": self.epoch,
                "valid_accuracy": self.best["valid_accuracy"] if self.best else None,
                "args": vars(self.args),
                "versions": VERSIONS,
                "fingerprint": self.store.fingerprint,
                "run": str(self.folder),
                "split": self.manifest,
            }
            save(about | state, path)

    def restore(self, checkpoint: dict) -> None:
        """Stand where `save_last` wrote `checkpoint`. Random numbers need no state: see above.

        Raises:
            DataError: the images are not those of `checkpoint`.
        """
        if (checkpoint["fingerprint"], checkpoint["classes"]) != (self.store.fingerprint, self.store.classes):
            raise DataError(f"{self.store.root}: its images have changed since the run began; bring those back")
        self.network.load_state_dict(checkpoint["state_dict"])
        if self.averaged:
            self.averaged.load_state_dict(checkpoint["averaged"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, moments in self.optimizer.state.items():  # fused Adam wants them laid out as the parameter
            moments |= {name: torch.empty_like(parameter).copy_(moments[name]) for name in ("exp_avg", "exp_avg_sq")}
        if checkpoint["scaler"]:  # empty where the run was not in fp16 so far
            self.scaler.load_state_dict(checkpoint["scaler"])
        for name in ("epoch", "step", "seconds", "history"):
            setattr(self, name, checkpoint[name])
        self.best = max(self.history, key=lambda row: row["valid_accuracy"], default=None)
        if self.compute.rank == 0:
            self.sums.copy_(checkpoint["sums"])


# -------------------------------------------------------------------------------------------- log


class Silent:
    """Takes every call and does nothing: the log of a process that must not write."""

    def __getattr__(self, name: str):
        return lambda *args, **options: None


class Log:
    """The event files of a run, for TensorBoard, and its `history.csv`.

    Args:
        run: whose folder they go to; what an earlier process logged of later epochs is superseded.
    """

    def __init__(self, run: Run):
        self.run = run
        purge = run.epoch + 1 if run.epoch or run.step else None
        self.train, self.valid = (SummaryWriter(run.folder / name, purge_step=purge) for name in ("train", "valid"))

    def start(self, command: str) -> None:
        """Log once what the run is: the network, its first batch, and a card that sums it up."""
        run, network = self.run, self.run.network.eval()
        rows, uniforms = run.epoch_plan()
        batch, _ = run.inputs(rows[:64], uniforms[:64])
        self.train.add_image("first_batch", make_grid(denormalize(batch), nrow=8), 0)
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            network(batch[:1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer that TensorBoard uses is called deprecated
            self.train.add_graph(network, batch[:1])
        facts = {
            "command": f"`{command}`",
            "images": ", ".join(f"{name} {len(paths)}" for name, paths in run.manifest.items()),
            "classes": len(run.store.classes),
            "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
            "arithmetic": f"{flops.get_total_flops() / 1e9:.2f} GFLOP an image at {batch.shape[-1]} pixels, forward",
            "computed on": f"{device_title(run.compute.device)}, {str(run.compute.dtype).removeprefix('torch.')}",
            **VERSIONS,
            **vars(run.args),
        }
        self.train.add_text("run", table(["", ""], facts.items()), 0)

    def epoch(self, row: dict) -> None:
        """Log a completed epoch, and see to it that the files hold it before a checkpoint does."""
        step = row["epoch"]
        for name in ("learning_rate", "images_per_second"):
            self.train.add_scalar(name, row[name], step)
        filters = make_grid(self.run.evaluated.features[0].weight, nrow=8, padding=1, normalize=True, scale_each=True)
        self.train.add_image("filters", filters.repeat_interleave(4, 1).repeat_interleave(4, 2), step)
        for writer, name in ((self.train, "train"), (self.valid, "valid")):
            writer.add_scalar("loss", row[f"{name}_loss"], step)
            writer.add_scalar("accuracy", row[f"{name}_accuracy"], step)
            writer.flush()
        with replacing(self.run.folder / "history.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerows(self.run.history)

    def end(self) -> None:
        """Log the arguments beside the last epoch's figures, for the HPARAMS tab."""
        names = ["recipe", "epochs", "batch_size", "seed", "stride", *RECIPES["report"]]
        chosen = {name: getattr(self.run.args, name) for name in names}
        for summary in hparams(chosen, {"accuracy": None, "loss": None}):  # curves that `valid` has
            self.valid.file_writer.add_summary(summary)
        self.train.close()
        self.valid.close()


def table(header: list[str], rows: Iterable[Iterable]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([printable(cell).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def printable(value: object) -> str:
    """Return `value` as text that can be encoded, whatever the names of files hold."""
    return str(value).encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def explained(run: Run):
    """Turn what can go wrong in training, for want of room or of a compiler, into errors that say what to do."""
    try:
        yield
    except BrokenPipeError:  # standard output's
        raise
    except OSError as error:
        raise TrainingError(
            f"{run.folder}: the log can't be written ({error.strerror or error}); make room or mend the folder; "
            "what was saved before can go on with --resume"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            problem = f"out of memory at --batch-size {run.args.batch_size}; try half, or a smaller --train-size"
        elif run.args.compile and type(error).__module__.startswith("torch._"):  # most likely there is no compiler
            problem = f"--compile fails here ({str(error).splitlines()[0]}); leave it out"
        else:
            raise
        raise TrainingError(problem) from error


def new_folder(logdir: str, name: str | None, resumed: bool) -> Path:
    """Create and return the folder of a run; a second run of one name gets `-2` behind it."""
    name = name or time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in itertools.count(1):
        folder = Path(logdir).resolve() / (name if attempt == 1 else f"{name}-{attempt}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True, exist_ok=resumed)
            return folder


# ------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    """Train as `argv` says (default: the command line)."""
    args, checkpoint = parse(argv)
    compute = set_up(args.device, args.precision, args.deterministic)
    signals = Signals(compute)
    say = print if compute.rank == 0 else Silent().say
    if args.batch_size % compute.size:
        raise TrainingError(f"--batch-size {args.batch_size} is not a multiple of the {compute.size} processes")
    with compute.first_on_machine():
        store = ImageStore(args.data, args.cache, args.skip_bad_images)
    if store.skipped:
        say(f"{store.skipped} images can't be read and are skipped")
    manifest = checkpoint["split"] if checkpoint else split(store.paths, args.seed)
    store.move_to(compute.device)
    run = Run(args, store, manifest, compute)
    if compute.rank == 0:
        check_writable(args.ckpt, run.bytes_to_write())
        name = Path(checkpoint["run"]).name if checkpoint else args.name
        run.folder = new_folder(args.logdir, name, bool(checkpoint))
    earlier = []
    if checkpoint:
        run.restore(checkpoint)
        del checkpoint  # as large as the run itself
        if run.best and compute.rank == 0 and not run.best_is_saved():
            say(f"{args.ckpt}: not the best of epochs 1 to {run.epoch}, which only a better epoch will replace")
    elif earlier := [str(path) for path in (Path(args.ckpt), last_path(args.ckpt)) if path.exists()]:
        advice = "--resume goes on with it, another --ckpt spares it"
        say(f"{' and '.join(earlier)}: an earlier run's, replaced after an epoch; {advice}")
    say(f"{len(run.rows['train'])} training images, {len(store.classes)} classes, {device_title(compute.device)}")
    with explained(run):
        log = Log(run) if compute.rank == 0 else Silent()
        if not run.epoch and not run.step:
            log.start(shlex.join(["python", *sys.argv]))
        if args.compile:  # in place; not before the graph is traced
            run.network.compile()
        fit(run, log, signals, say, earlier)


def fit(run: Run, log: Log, signals: Signals, say, earlier: list[str]) -> None:
    """Train and validate `run` up to its last epoch, saving after each and when interrupted.

    Args:
        earlier: the checkpoints of an earlier run, which an epoch is worth replacing but less is not.
    """
    args, signals.at_once = run.args, False
    ckpt = "" if args.ckpt == DEFAULTS["ckpt"] else f" --ckpt {shlex.quote(args.ckpt)}"
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
                f"  {row['seconds']:.1f} s{'  best' if row is run.best else ''}"
            )
    except KeyboardInterrupt as stop:
        if run.compute.max(len(earlier)) and not run.epoch:
            raise KeyboardInterrupt(*stop.args, f"{' and '.join(earlier)} not yet replaced") from None
        run.save_last()
        raise KeyboardInterrupt(*stop.args, f"go on with: python train.py --resume{ckpt}") from None
    log.end()
    best, commands = run.best, [f"tensorboard --logdir {shlex.quote(os.path.relpath(args.logdir))}"]
    if saved := run.compute.rank == 0 and run.best_is_saved():
        commands.insert(0, f"python test.py --ckpt {shlex.quote(args.ckpt)}")
    where = f"{'saved' if saved else 'no longer'} in {args.ckpt}"
    say(f"best: epoch {best['epoch']}, valid accuracy {best['valid_accuracy']:.2f} %, {where}")
    say("next: " + "\n      ".join(commands))


if __name__ == "__main__":
    run_cli(main)
