"""`train.py` or `test.py` with narrow linear layers, for torchrun to start: narrow.py train ARGUMENTS.

The environment variable EVENT, such as `kill 1 5`, names something to happen to the process of that
rank when it begins that training step, the first time that torchrun starts it.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model
import test
import train

EVENTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getppid(), signal.SIGTERM),  # torchrun
    "interrupt": lambda: os.killpg(os.getpgid(os.getppid()), signal.SIGINT),  # what Ctrl-C does
}


def happen(event: str, rank: str, step: str) -> None:
    """Let `event` happen at `step`, counted from 1; make the steps after it slow enough to be met by it."""
    forward, steps = model.AlexNet.forward, 0

    def eventful(self, images):
        nonlocal steps
        steps += self.training
        if steps == int(step) and self.training and os.environ["RANK"] == rank:
            EVENTS[event]()
        if steps >= int(step):
            time.sleep(0.1)
        return forward(self, images)

    model.AlexNet.forward = eventful


if __name__ == "__main__":
    model.HIDDEN = 64
    program = sys.argv.pop(1)
    sys.argv[0] = f"{program}.py"
    if "EVENT" in os.environ and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        happen(*os.environ["EVENT"].split())
    train.run_cli({"train": train, "test": test}[program].main)
