"""Runs one of two workers that train every case with DistributedDataParallel.

The first worker writes the weights.

Usage: torchrun --nproc-per-node 2 torch_workers.py FILE
"""

import os
import sys

import torch
import training
from torch.nn.parallel import DistributedDataParallel

torch.distributed.init_process_group("gloo")
worker, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
assert workers == 2
SHARE = training.BATCH // workers


def train(case):
    model = training.make_model()
    optimizer = training.make_optimizer(*case)
    parallel = DistributedDataParallel(model)
    for x, y in training.batches():
        rows = slice(worker * SHARE, (worker + 1) * SHARE)
        model.zero_grad()
        error = parallel(torch.tensor(x[rows])) - torch.tensor(y[rows])
        error.square().mean().backward()
        variables = model.trainable_variables
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in variables], variables)
    return training.outcome(model, optimizer)


outcomes = {case: train(case) for case in training.CASES}
if worker == 0:
    training.save(sys.argv[1], outcomes)
torch.distributed.barrier()
os._exit(0)  # Gloo may hang while the interpreter shuts down.
