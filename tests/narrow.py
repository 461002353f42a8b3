"""`train.py` with narrow linear layers, for torchrun to start: narrow.py ARGS.

The environment variable KILL, such as 5,13, names the training step after which the worker of rank
1 is killed, when it is started first, and when torchrun has restarted it. Such runs save each
epoch.
"""

import os
import signal
import sys

import commands

import model
import train

if __name__ == "__main__":
    model.HIDDEN = 64
    commands.use_the_cpu()
    sys.argv[0] = "train.py"
    if "KILL" in os.environ:
        commands.save_each_epoch()
        steps = dict(enumerate(map(int, os.environ["KILL"].split(","))))
        step = steps.get(int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
        if step and os.environ["RANK"] == "1":
            commands.after_step(step, commands.send, signal.SIGKILL)
    train.run_command(train.main)
