"""`train.py` or `test.py` with narrow linear layers, for torchrun to start: narrow.py train ARGS.

The environment variable KILL, such as 5,13, names the training step after which the worker of rank
1 is killed, when it is started first, and when torchrun has restarted it. Such runs save each
epoch.
"""

import os
import signal
import sys

import commands

import model
import test
import train

if __name__ == "__main__":
    model.HIDDEN = 64
    commands.use_the_cpu()
    program = sys.argv.pop(1)
    sys.argv[0] = f"{program}.py"
    if "KILL" in os.environ:
        train.Checkpoints.save_if_due = lambda self, last: self.save()
        steps = dict(enumerate(map(int, os.environ["KILL"].split(","))))
        step = steps.get(int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
        if step and os.environ["RANK"] == "1":
            commands.after_step(step, commands.send, signal.SIGKILL)
    train.run_command({"train": train, "test": test}[program].main)
