"""Reading further than it was trained: what each rule of positions.py is worth, by position.

    python extend.py --model runs/base     # after train.py; some five minutes on two cores

A model trained on windows of L tokens reads windows of 4 L, and its loss is taken by how much text stands
before a token: once with its weights as they are, and once after 50 steps on windows of that length. More
context can only help a reader that can use it, so a good line falls to the right. One that rises beyond L
shows angles that the model has not met. Two lines to beat need no rule at all:

    plain     the same angles, further; after the steps: what training alone repairs
    window    each token sees the last L only (Mistral's mask): never a new angle, but nothing further back

The command for a single model, to keep, is train.py:

    python train.py --init_from runs/base --rope_scaling yarn --rope_factor 4 --seq_len 512 --out runs/long
"""
import contextlib
import io
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import train
from batches import Batches, open_shard
from checkpoint import load_model
from config import UserError, parse, require, run, show
from model import ModelConfig, Transformer
from objectives import next_token_loss
from parallel import Env, setup
from positions import extended


@dataclass
class Settings:
    model: str = "runs/base"  # a model folder; its max_seq_len counts as the length it was trained at
    data: str = "runs/data"  # token shards of its tokenizer: windows to train on, held-out text to measure on
    factor: float = 4.0  # read so many times as far
    bucket: int | None = None  # tokens a column; none: half the trained length
    passages: int = 12  # places in the held-out text, each of four windows
    steps: int = 50  # of training; 0: none
    seeds: int = 3  # each decides which windows the steps see; the table has their mean
    batch_size: int = 4  # windows a step
    lr: float = 3e-3  # peak learning rate of the matrices (Muon); low, as the main job has ended at 0
    adam_lr: float = 6e-4  # of embedding, head and norms; likewise
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the first there is of cuda, mps, cpu

    def __post_init__(self):
        require(self, factor=(1, 10000), bucket=(1, None), passages=(1, None), steps=(0, None),
                seeds=(1, 100), batch_size=(1, None), lr=(1e-12, 10), adam_lr=(0, 10))


# ------------------------------------------------------------------------------------------------------------
# The measure


@torch.no_grad()
def loss_by_position(model: Transformer, passages: Tensor, length: int, bucket: int) -> Tensor:
    """Nats a token by how many stand before it, `bucket` by `bucket`: (length / bucket,) float64, on the CPU.

    passages: (P, S) ids of running text, S at least 2 length - bucket + 1. Windows of `length` begin every
    `bucket` tokens, so that a run of `bucket` targets comes at each place of a window in turn. Only runs that
    have come at all places count: each figure is of the very same tokens, and differs by the context alone.

    A model with the rule `dynamic` takes a whole window in one pass, and thus has the angles of its length
    from the first token on.
    """
    places = length // bucket
    assert length == places * bucket and passages.size(1) >= 2 * length - bucket + 1
    windows = passages.unfold(1, length + 1, bucket)  # (P, N, length + 1)
    P, N, _ = windows.shape
    losses = []
    for batch in tqdm(windows.flatten(0, 1).split(8), desc="measure", unit="batch", leave=False):
        batch = batch.to(model.lm_head.weight.device)
        logits = model(batch[:, :-1]).float()  # (8, length, V)
        nats = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        losses.append(nats.view(-1, places, bucket).mean(dim=-1).double().cpu())  # (8, places)
    losses = torch.cat(losses).view(P, N, places)
    # run c of a passage stands in its window w at place c - w; c = places - 1 is the first that had all
    return torch.stack([losses[:, places - 1 - j:N - j, j].mean() for j in range(places)])


def held_out(folder: str, passages: int, size: int) -> Tensor:
    """(passages, size) ids, from places spread evenly over the validation split of these shards."""
    _, tokens = open_shard(Path(folder), "val", verify=True)
    if len(tokens) < passages * size:
        raise UserError(f"the held-out text of {folder} has {len(tokens):,} tokens; {passages} passages need "
                        f"{passages * size:,}; pass a smaller --passages or --factor")
    starts = np.linspace(0, len(tokens) - size, passages).astype(int)
    return torch.from_numpy(np.stack([tokens[start:start + size].astype(np.int64) for start in starts]))


# ------------------------------------------------------------------------------------------------------------
# The rules, without training and with some


def variants(config: ModelConfig, factor: float) -> dict[str, ModelConfig]:
    """{name: config} of the model that is to read further, by each rule and by none."""
    rules = {rule: extended(config, rule, factor) for rule in ("linear", "ntk", "dynamic", "yarn", "llama3")}
    length = rules["linear"].max_seq_len
    return {"plain": replace(config, max_seq_len=length), **rules,
            "window": replace(config, max_seq_len=length, sliding_window=config.max_seq_len)}


def with_config(model: Transformer, config: ModelConfig) -> Transformer:
    """A new model of the same weights."""
    other = Transformer(config)
    other.load_state_dict(model.state_dict())
    return other.to(model.lm_head.weight.device).eval()


def trained_further(model: Transformer, settings: Settings, seed: int, env: Env) -> Transformer:
    """The model after settings.steps updates on windows of its max_seq_len, as train.py makes them."""
    length = model.config.max_seq_len
    batches = Batches(settings.data, "train", settings.batch_size, length, seed, verify=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, \
            contextlib.redirect_stdout(io.StringIO()):
        train.train(model, batches, next_token_loss, train.Settings(
            data=settings.data, out=folder, init_from=settings.model, seq_len=length, steps=settings.steps,
            batch_size=settings.batch_size, lr=settings.lr, adam_lr=settings.adam_lr, seed=seed,
            save_every=settings.steps), env)
    return model.eval()


def prepare(settings: Settings) -> tuple[Transformer, Env, Tensor, int]:
    """(the model as trained, env, held-out passages, tokens a column); UserError where they do not fit."""
    base, tokenizer = load_model(settings.model)
    trained = base.config.max_seq_len
    length = extended(base.config, "linear", settings.factor).max_seq_len
    bucket = settings.bucket or (trained if trained % 2 else trained // 2)
    if length == trained:
        raise UserError(f"--factor {settings.factor:g} reads no further than the {trained} tokens that "
                        f"{settings.model} was trained at; pass a larger one")
    if trained % bucket or length % bucket:
        raise UserError(f"columns of {bucket} tokens do not divide the {trained} that {settings.model} was "
                        f"trained at and the {length} it shall read; choose another --bucket or --factor")
    meta, _ = open_shard(Path(settings.data), "train", verify=False)
    if tokenizer is None or tokenizer.fingerprint != meta["tokenizer"]:
        raise UserError(f"the shards in {settings.data} are not of the tokenizer of {settings.model}; make "
                        f"others: python data.py --tokenizer {settings.model}, and a new --out")
    env = setup(train.Settings(device=settings.device, init_from=settings.model, compile=False))
    return base.to(env.device), env, held_out(settings.data, settings.passages, 4 * length + 1), bucket


def compare(settings: Settings):
    """Measure and print: a line a rule, without training, then with."""
    base, env, passages, bucket = prepare(settings)
    configs, trained = variants(base.config, settings.factor), base.config.max_seq_len
    length = configs["plain"].max_seq_len

    def losses(model):
        with env.autocast():
            return loss_by_position(model, passages, length, bucket)
    ends = [f"{end:6}" for end in range(bucket, length + 1, bucket)]
    ends.insert(trained // bucket, "|")
    print(f"nats a token by its place in a text of {length}; trained at {trained}; a bar's step is 1/8 nat\n"
          f"up to   {' '.join(ends)}{'beyond':>{length // bucket + 10}}\nas trained")
    at_home = math.inf
    for name, config in configs.items():
        values = losses(with_config(base, config))[None]
        at_home = min(at_home, values[0, :trained // bucket].min().item())  # plain comes first
        print(row(name, values, trained // bucket, at_home), flush=True)
    if settings.steps:
        print(f"after {settings.steps} steps of {settings.batch_size} x {length} tokens; mean of "
              f"{settings.seeds} seeds")
        for name, config in configs.items():
            values = [losses(trained_further(with_config(base, config), settings, seed, env))
                      for seed in range(settings.seeds)]
            print(row(name, torch.stack(values), trained // bucket, at_home), flush=True)


def row(name: str, losses: Tensor, inside: int, at_home: float) -> str:
    """A rule's line: the mean over seeds in each column, in figures and as bars, then that of the columns
    beyond the trained length, with half the range between the seeds.

    losses: (seeds, columns); the first `inside` columns lie within the trained length. at_home: the loss that
    the lowest bar stands for, the model's own within its trained length.
    """
    if not losses.isfinite().all():
        raise UserError(f"the held-out loss of {name} is not finite: the model is broken")
    means, beyond = losses.mean(dim=0).tolist(), losses[:, inside:].mean(dim=1).tolist()
    figures = [f"{x:6.3f}" for x in means]
    figures.insert(inside, "|")
    bars = "".join("▁▂▃▄▅▆▇█"[max(0, min(7, int((x - at_home) * 8)))] for x in means)
    spread = f" ± {(max(beyond) - min(beyond)) / 2:.3f}" if len(beyond) > 1 else ""
    bars = bars[:inside] + "|" + bars[inside:]
    return f"{name:8}{' '.join(figures)}  {bars}  {statistics.mean(beyond):.3f}{spread}"


def main():
    settings, began = parse(Settings), time.perf_counter()
    show(settings)
    compare(settings)
    print(f"{time.perf_counter() - began:.0f} seconds")


if __name__ == "__main__":
    run(main)
