"""Run a script under a launcher; once, the last process is killed in the middle of a step.

python tests/train/dying_worker.py STEP SCRIPT WORDS: step STEP of the first start; 0: never.
"""

import os
import runpy
import signal
import sys

import torch

step, script, *words = sys.argv[1:]
sys.argv = [script, *words]
adamw_step, steps = torch.optim.AdamW.step, [0]


def counted(*args, **kwargs):
    steps[0] += 1
    if steps[0] == int(step):
        os.kill(os.getpid(), signal.SIGKILL)
    return adamw_step(*args, **kwargs)


if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
    torch.optim.AdamW.step = counted
sys.path[0] = os.path.dirname(os.path.abspath(script))
runpy.run_path(script, run_name="__main__")
