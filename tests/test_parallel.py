"""parallel.py: every layout of processes gives the losses of one, and each holds its share."""
import itertools
import math
import os
import queue as queues
import random
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from config import UserError
from model import ModelConfig, Transformer
from objectives import next_token_loss
from parallel import Compute, Env, mesh_sizes, parallelize

CPU = Env(torch.device("cpu"))
STEPS = 20

# (processes, flags): the layouts of the issue
LAYOUTS = {
    "ddp2": (2, dict(data_parallel="ddp")),
    "ddp4": (4, dict(data_parallel="ddp")),
    "fsdp2": (2, dict(data_parallel="fsdp")),
    "fsdp4": (4, dict(data_parallel="fsdp")),
    "fsdp4 zero2": (4, dict(data_parallel="fsdp", reshard=False)),
    "hsdp2x2": (4, dict(data_parallel="hsdp", shard_size=2)),
    "tp2": (2, dict(tensor_parallel=2)),
    "fsdp2 tp2": (4, dict(data_parallel="fsdp", tensor_parallel=2)),
    "ddp2 tp2": (4, dict(data_parallel="ddp", tensor_parallel=2)),
}
VARIANTS = {  # each beside what it is compared with in one process
    "plain": dict(),
    "checkpointed": dict(activation_checkpointing="full"),
    "every second": dict(activation_checkpointing="full", checkpoint_every=2),
    "selective": dict(activation_checkpointing="selective"),
    "accumulated": dict(micro_batch_size=1),
    "tied": dict(tie_embeddings=True),
    "all logits": dict(chunked_loss=False),
    "tied, accumulated, checkpointed": dict(tie_embeddings=True, micro_batch_size=1,
                                            activation_checkpointing="full"),
}
OPTIMIZERS = ("muon", "adamw", "adafactor")


def settings_for(**changes):
    return train.Settings(**{"preset": "tiny", "dim": 32, "n_heads": 4, "n_kv_heads": 2, "seq_len": 16,
                             "batch_size": 8, "steps": STEPS, "device": "cpu", "lr": 0.01, "adam_lr": 3e-3,
                             "timeout_minutes": 2.0, **changes})


def model_for(settings, seed=0):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab_size=51, dim=settings.dim, n_layers=2, n_heads=4, n_kv_heads=2,
                                    qk_norm=True, tie_embeddings=settings.tie_embeddings))  # 51: ragged shards
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    if not settings.tie_embeddings:
        torch.nn.init.normal_(model.lm_head.weight, std=0.1)  # a zero head would pass no gradient to the blocks
    return model


class Windows:
    """Made-up batches: as of data.Batches, and with unequal numbers of targets."""

    def __init__(self, size, rank=0, world_size=1):
        self.size, self.rank, self.world_size = size, rank, world_size

    def at(self, i):
        first = (i * self.world_size + self.rank) * self.size
        rows = [self.window(number) for number in range(first, first + self.size)]
        return tuple(torch.stack(column) for column in zip(*rows))

    def window(self, number):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(51, (17,), generator=generator)
        targets = ids[1:].clone()
        targets[torch.rand(16, generator=generator) < number % 8 / 8] = -100  # some have all targets, some few
        if number % 8 == 7:
            targets[:] = -100
        return ids[:-1], targets


def curve(settings, env, steps=STEPS):
    """[(loss, gradient norm)] of the first steps, in this process's layout; and the trained model."""
    model = parallelize(model_for(settings, seed=env.rank), env)  # process 0's weights must win
    optimizer = train.make_optimizer(model, settings)
    size = train.micro_batch(settings, env)
    batches, count = Windows(size, env.data_rank, env.data_world_size), 8 // size // env.data_world_size
    loss_fn = lambda model, batch: next_token_loss(model, batch, settings.chunked_loss)  # noqa: E731
    figures = []
    for step in range(steps):
        micro_batches = [batches.at(step * count + i) for i in range(count)]
        report = train.update(model, optimizer, micro_batches, loss_fn, settings, env,
                              train.learning_rate(step, settings))
        figures.append((report["loss"], report["grad_norm"]))
    return figures, model, optimizer


# ---- processes that work through a list of tasks -----------------------------------------------------------


def process(rank, world_size, port, tasks, queue):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    for name, function, arguments in tasks:
        try:
            result = function(*arguments)
        except BaseException:
            result = traceback.format_exc()
        queue.put((rank, name, result))
    dist.destroy_process_group()


def in_processes(world_size, tasks, timeout=400):
    """{name: [each process's function(*arguments)]} of tasks (name, function, arguments), made one by one."""
    context = torch.multiprocessing.get_context("spawn")
    queue, port = context.Queue(), random.randint(20000, 60000)
    processes = [context.Process(target=process, args=(rank, world_size, port, tasks, queue), daemon=True)
                 for rank in range(world_size)]
    for one in processes:
        one.start()
    results = {name: [None] * world_size for name, _, _ in tasks}
    try:
        for _ in range(world_size * len(tasks)):
            rank, name, result = queue.get(timeout=timeout)
            results[name][rank] = result
    except queues.Empty:
        pass  # a test that misses its figures will say so
    for one in processes:
        one.join(timeout=20)
        one.kill()
    return results


def task_curve(changes):
    settings = settings_for(**changes)
    return curve(settings, train.setup(settings))[0]
