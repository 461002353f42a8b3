"""`train.py` or `test.py` with narrow linear layers, for torchrun to start: narrow.py train ARGUMENTS.

Environment variables:
    EVENT: `kill 1 5,13` lets a worker be killed, the one of rank 1, when it begins its 5th training
        step, and when torchrun has restarted it, its 13th from there.
    LATE: the rank of a worker that begins two seconds after the others.
    DECODED: a file that gets a byte for each picture decoded.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import model
import test
import train

TORCHRUN = os.getppid()
EVENTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(TORCHRUN, signal.SIGTERM),
    "interrupt": lambda: os.killpg(os.getpgid(TORCHRUN), signal.SIGINT),  # what Ctrl-C does
}


def let_happen(event: str, rank: str, steps: str) -> None:
    """Let `event` happen at its step; the steps from there on are slow enough for it to meet one."""
    start, forward, count = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), model.AlexNet.forward, 0
    when = [*map(int, steps.split(",")), *[1e9] * start][start]

    def eventful(self, images):
        nonlocal count
        count += self.training
        if count == when and self.training and os.environ["RANK"] == rank:
            EVENTS[event]()
        time.sleep(0.1 if count >= when else 0)
        return forward(self, images)

    model.AlexNet.forward = eventful


def count_decoded(path: str) -> None:
    """Write a byte to the file `path` for each picture that is decoded."""
    file, decode = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), data.decode

    def counted(*args):
        os.write(file, b".")
        return decode(*args)

    data.decode = counted


if __name__ == "__main__":
    model.HIDDEN = 64
    program = sys.argv.pop(1)
    sys.argv[0] = f"{program}.py"
    if "EVENT" in os.environ:
        let_happen(*os.environ["EVENT"].split())
    if "DECODED" in os.environ:
        count_decoded(os.environ["DECODED"])
    if os.environ.get("LATE") == os.environ["RANK"]:
        time.sleep(2)
    train.run_command({"train": train, "test": test}[program].main)
