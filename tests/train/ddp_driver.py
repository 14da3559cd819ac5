"""Run train_lm_ddp.py (or, as a reference, train_lm.py) in float64 on blocks of 9, 1 and 9 counted tokens.

    torchrun --nproc_per_node=2 ddp_driver.py FOLDER PLAN     # PLAN: JSON, see test_ddp.py

Writes FOLDER/NAME.RANK.pt for each run of the plan: the parameters after training and the number of all-reduce sets.
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from configs.config import UserError
from data.corpus import Corpus
from runtime.console import rank
from train import common, train_lm, train_lm_ddp, updates
from train.common import load_start
from train.updates import make_optimizer

CORPUS = Corpus(
    "uneven", [{"text": "abcdefghi"}, {"text": "klmnopqrs"}, {"text": "a"}], [{"text": "hello"}], "text", "0"
)


class CountingDDP(torch.nn.parallel.DistributedDataParallel):
    """Counts the times that a whole set of gradients is reduced."""

    sets = 0

    def __init__(self, module):
        super().__init__(module)

        def hook(state, bucket):
            CountingDDP.sets += bucket.is_last()
            return allreduce_hook(state, bucket)

        self.register_comm_hook(None, hook)


def main(folder, plan):
    for job in plan:  # all runs of the plan share one connection
        script = train_lm if job["script"] == "plain" else train_lm_ddp
        parameters = []

        def optimizer(params, lr, weight_decay, job=job, parameters=parameters):
            parameters += [p for p in params if p.requires_grad]
            if job["optimizer"] == "sgd":
                return torch.optim.SGD(parameters, lr=lr)
            return make_optimizer(parameters, lr, weight_decay)

        def start(*given):
            model, tokenizer = load_start(*given)
            return model.double(), tokenizer

        def data(config, job=job):
            if rank() == job.get("error_on_rank"):
                raise UserError("only this rank sees it")
            return CORPUS

        updates.make_optimizer, common.load_start, common.load_data = optimizer, start, data
        train_lm_ddp.DistributedDataParallel, CountingDDP.sets = CountingDDP, 0
        shape = {"batch_size": 2, "micro_batch_size": 1, "max_length": 10, "epochs": 2, "warmup_steps": 0}
        more = {"model_name": "tiny-llama", "lr": job["lr"], "max_grad_norm": job["max_grad_norm"], "log_every": 1}
        out = str(folder / job["name"])
        try:
            script.train(script.Config(**shape, **more, out=out, **job.get("options", {})))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        found = {"parameters": [p.detach() for p in parameters], "sets": CountingDDP.sets}
        torch.save(found, folder / f"{job['name']}.{rank()}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
