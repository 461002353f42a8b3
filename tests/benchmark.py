"""Measure what makes this program fast, against the loop that a person would otherwise write.

    python tests/benchmark.py                          # on the drawn sample
    python tests/benchmark.py --data DIR --stride 2    # on other pictures

Each variant is a process of its own that trains real steps, data loading included. They take turns,
so that whatever else the machine does falls on all of them; the medians over the turns are printed.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BATCH = 64
VARIANTS = {
    "plain": "(a) plain loop: ImageFolder, decoded every epoch, fp32, .item() each step",
    "workers": "(b) the same with 2 loader workers",
    "fp32": "(c) train.py --precision fp32",
    "default": "(d) train.py as it comes",
}


def plain_steps(root: str, stride: int, workers: int):
    """Yield after each step of the report's loop."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    from model import AlexNet

    transform = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    folder = datasets.ImageFolder(root, transform)
    network = AlexNet(len(folder.classes), stride)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    criterion = torch.nn.CrossEntropyLoss()
    loader = DataLoader(folder, batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True)
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            logits = network(images)
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            loss.item(), (logits.argmax(1) == labels).sum().item()
            yield 0.0


def program_steps(data: str, stride: int, precision: str):
    """Yield, after each step of train.py, the seconds that it waited for data."""
    import train  # before torch, for it chooses how memory is allocated
    from data import ImageStore, split

    args, _ = train.parse(["--data", data, "--stride", str(stride), "--precision", precision])
    store = ImageStore(args.data, args.cache)
    compute = train.set_up("cpu", args.precision)
    run = train.Run(args, store, split(store.paths, args.seed), compute)
    waited, fetch = [], store.batch

    def batch(*arguments):
        started = time.perf_counter()
        result = fetch(*arguments)
        waited.append(time.perf_counter() - started)
        return result

    store.batch = batch
    run.replica.train()
    while True:
        rows, uniforms = run.epoch_plan()
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            share = slice(start, start + BATCH)
            run.train_step(*run.inputs(rows[share], uniforms[share]), BATCH)
            run.means(run.sums)
            yield waited.pop()
        run.epoch += 1


def work(variant: str, data: str, root: str, stride: int) -> None:
    """Take a turn for each line of standard input: train as many steps as it says."""
    if variant in ("plain", "workers"):
        steps = plain_steps(root, stride, 2 if variant == "workers" else 0)
    else:
        steps = program_steps(data, stride, "auto" if variant == "default" else variant)
    next(steps)
    for line in sys.stdin:
        started, waited = time.perf_counter(), 0.0
        for _ in range(int(line)):
            waited += next(steps)
        print(time.perf_counter() - started, waited, flush=True)


@contextlib.contextmanager
def peak_memory(pid: int):
    """Yield a list; its last item is the process's peak of anonymous memory in GB, on Linux."""
    peak, stop = [0.0], threading.Event()

    def sample():
        while not stop.wait(0.02):
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                line = next(line for line in lines if line.startswith("RssAnon"))
                peak.append(max(peak[-1], int(line.split()[1]) / 1e6))

    thread = threading.Thread(target=sample)
    thread.start()
    yield peak
    stop.set()
    thread.join()


def seconds_to_first_step(data: str, stride: int) -> float:
    """Return the time from the start of train.py's process to the end of its first step's set-up."""
    stop = "import os, train; train.Run.train_step = lambda *_: os._exit(0); train.main()"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", stop, "--data", data, "--stride", str(stride), "--device", "cpu"]
        started = time.perf_counter()
        subprocess.run(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True
        )
        return time.perf_counter() - started


def seconds_to_import() -> float:
    """Return the time that a process takes which only imports torch and torchvision."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch, torchvision"], check=True)
    return time.perf_counter() - started


def ceiling(dtype) -> float:
    """Return the TFLOP/s of a plain product of two matrices, 4096 x 4096."""
    import torch

    matrix, seconds = torch.randn(4096, 4096).to(dtype), []
    for _ in range(4):
        started = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - started)
    return 2 * 4096**3 / statistics.median(seconds[1:]) / 1e12


def arithmetic(network) -> float:
    """Return the TFLOP of training on one picture, forward and backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as flops:
        network(torch.zeros(1, 3, 224, 224)).sum().backward()
    return flops.get_total_flops() / 1e12


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sample", help="as for train.py (default: %(default)s)")
    parser.add_argument("--stride", type=int, choices=[2, 4], default=2, help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="of each variant (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="in a turn (default: %(default)s)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return work(args.child[0], args.data, args.child[1], args.stride)

    import torch

    import train
    from data import SIZE, ImageStore, decode_once, split

    data = args.data if args.data == "sample" else os.path.abspath(args.data)
    store = ImageStore(data, train.DEFAULTS["cache"])
    command = [sys.executable, __file__, "--data", data, "--stride", str(args.stride), "--child"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    children = {name: subprocess.Popen([*command, name, str(store.root)], **pipes) for name in VARIANTS}
    results = {name: [] for name in VARIANTS}
    with peak_memory(children["default"].pid) as memory:
        for _ in range(args.turns):
            for name, child in children.items():
                print(args.steps, file=child.stdin, flush=True)
                results[name].append([float(number) for number in child.stdout.readline().split()])
    for child in children.values():
        child.kill()
        child.wait()

    device = train.device_title(torch.device("cpu"))
    print(f"{len(store.paths)} images, stride {args.stride}, batch {BATCH}; {device}; torch {torch.__version__}")
    rates = {n: [args.steps * BATCH / seconds for seconds, _ in turns] for n, turns in results.items()}
    for name, title in VARIANTS.items():
        ratio = statistics.median(mine / plain for mine, plain in zip(rates[name], rates["plain"], strict=True))
        print(f"{title:75} {statistics.median(rates[name]):7.1f} images/s {ratio:6.2f} x (a)")
    share = 100 * statistics.median(waited / seconds for seconds, waited in results["default"])
    print(f"{'share of (d) that waits for data':75} {share:7.2f} %")
    print(f"{'peak anonymous memory of (d)':75} {memory[-1]:7.2f} GB")

    compute = train.set_up("cpu", "auto")
    network = train.AlexNet(len(store.classes), args.stride).to(memory_format=torch.channels_last)
    work_per_image = arithmetic(network)
    for name, dtype in (("fp32", torch.float32), ("default", compute.dtype)):
        reached, limit = statistics.median(rates[name]) * work_per_image, ceiling(dtype)
        title = f"arithmetic of {VARIANTS[name][:3]}, of the {limit:.2f} TFLOP/s of a matrix product in {dtype}"
        print(f"{title:75} {reached:7.3f} TFLOP/s")
    rows, seconds = store.rows(split(store.paths, 0)["valid"])[: 2 * train.EVAL_BATCH], []
    for _ in range(3):
        started = time.perf_counter()
        train.evaluate(network, store, rows, SIZE, compute)
        seconds.append(time.perf_counter() - started)
    print(f"{'evaluation':75} {len(rows) / statistics.median(seconds):7.1f} images/s")
    with tempfile.TemporaryDirectory() as folder:
        started, some = time.perf_counter(), store.paths[:2000]
        decode_once(store.root, some, Path(folder, "0-0.uint8"))
        print(f"{'building the cache':75} {len(some) / (time.perf_counter() - started):7.0f} images/s")
    pairs = [(seconds_to_first_step(data, args.stride), seconds_to_import()) for _ in range(3)]
    start, imports = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{'process start to first step, warm cache':75} {start:7.2f} s")
    print(f"{'  of which importing torch and torchvision takes by itself':75} {imports:7.2f} s")


if __name__ == "__main__":
    main()
