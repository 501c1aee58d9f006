"""Pretraining: token shards in, a model folder out. With no arguments, the whole main job:

    torchrun train.py                             # or: python train.py
    torchrun --nproc-per-node 2 train.py          # more processes

takes Python's own standard library as text (data.py), trains a small model from nothing and prints its bits
per byte on modules it has not seen, beside what xz and gzip need for the same bytes. README.md says what to
expect, and in what time.

The loop is plain functions that every later stage calls, in this order: `setup` the machine, `parallelize`
the model, `make_optimizer`, then `train`: for each step the `learning_rate`, an `update`, the log, now and
then `evaluate` and `save`. A stage differs by its batches and its loss, `loss_fn(model, batch) -> (loss_sum,
count)`: a sum over tokens (or pairs), and how many. The mean is taken over all micro-batches and all
processes at once, so neither changes what is learnt. A loss may return figures for the log as a third:
{name: (sum, count)}, of which the means are taken in the same way.

Stopped by Ctrl-C, SIGTERM or kill -9, the same command goes on from the last state and ends with the same
bytes: batches and randomness are functions of (seed, step) alone.
"""
import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from batches import Batches
from bpe import Tokenizer
from checkpoint import load_model, model_config, states
from config import UserError, parse, refuse, require, run
from families import to_hugging_face
from metaspace import load_tokenizer
from mixture import Replay, first_source, open_mixture, picture, warnings
from model import PRESETS as SIZES
from model import ModelConfig, Transformer, count_parameters, estimate_flops, generate
from objectives import FillInTheMiddle, PrefixLM, next_token_loss, with_fim_tokens
from optim import batch_windows, learning_rate, make_optimizer, windows_before
from parallel import Compute, Env, inside, parallelize, setup, whole_step
from positions import extended
from survive import BadStep, Run, in_run_folder, lost_process, save_whole, spike_limit, stop_signals
from watch import (Log, Profile, describe, dry_run, free_memory, log_line, out_of_memory, term,
                   write_results)


def widths(preset: str) -> dict:
    """What a size of model.py says of the blocks; vocabulary, context and the like are the run's own."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")
    return {name: value for name, value in SIZES[preset].items() if name in names}


PRESETS = {  # sizes, and the settings that go with them; a flag of the same name goes before
    "tiny": widths("tiny") | dict(seq_len=128, batch_size=8, steps=100, lr=0.02, adam_lr=3e-3),
    "small": widths("small") | dict(seq_len=128, batch_size=16, steps=900, lr=0.04, adam_lr=8e-3,
                                    bigram_steps=50),
    "124m": widths("124m") | dict(seq_len=1024, batch_size=512, steps=5000, lr=0.02, adam_lr=1e-3),
    "1b": widths("1b") | dict(seq_len=2048, batch_size=512, steps=20000, lr=0.01, adam_lr=5e-4),
    "7b": widths("7b") | dict(seq_len=2048, batch_size=2048, steps=250000, lr=0.01, adam_lr=3e-4),
}


@dataclass
class Loop(Compute):
    """How a model is trained: settings of the loop, that every stage's Settings inherit."""
    seq_len: int = 128  # tokens a window
    batch_size: int = 16  # windows a step, over all processes and micro-batches
    micro_batch_size: int | None = None  # windows a process holds at once; none: its whole share. Fewer take
                                         # less memory and give the same result
    batch_start: int | None = None  # windows of the first step, growing to batch_size; none: batch_size
    ramp_tokens: int = 0  # over so many tokens (GPT-3: 32 K tokens a step to 3.2 M over 12 billion)
    steps: int = 100  # updates
    optimizer: Literal["muon", "adamw", "adafactor"] = "muon"  # muon: for the matrices inside blocks; the
                                                               # rest is then AdamW's
    lr: float = 0.01  # peak learning rate of those matrices (Muon; about 3e-3 for the others)
    adam_lr: float = 2e-3  # peak learning rate of embedding, head and norms
    schedule: Literal["linear", "cosine", "inverse_sqrt", "wsd"] = "linear"  # of the rate, after the warm-up
    warmup_steps: int = 10  # the rate rises linearly over these
    decay_share: float = 0.2  # wsd (warm-up, stable, decay): the rate falls over this last share of the steps
    final_lr: float = 0.0  # the rate at the end, as a share of the peak
    weight_decay: float = 0.1  # on matrices only
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-8  # of AdamW
    clip: float = 1.0  # bound of the global gradient norm; 0: none
    spike: float = 20.0  # a loss so many deviations above the median of the last 100 steps' rolls the run
                         # back; 0: no loss does, unless it is not finite
    max_rollbacks: int = 5  # give up after so many
    seed: int = 0  # of the first weights, the order of the windows, and all else that is drawn
    chunked_loss: bool = True  # never hold the logits of all tokens; --no-chunked_loss is for comparison
    eval_every: int = 0  # steps between evaluations on the whole validation split; 0: at the end only
    save_every: int = 100  # steps between states; the last two are kept, and the best by held-out loss
    profile: bool = False  # record a few steps: a table of where the time goes, and trace.json for a browser

    free: ClassVar[frozenset] = frozenset()  # a stage's own settings that may differ between parts of a run

    def check_loop(self):
        """Raise UserError where one of these is out of range, or they do not go together."""
        self.check_compute()
        self.batch_start = self.batch_size if self.batch_start is None else self.batch_start
        sizes = ("batch_size", "micro_batch_size", "steps", "save_every")
        require(self, **{name: (1, None) for name in sizes}, seq_len=(2, None), warmup_steps=(0, None),
                decay_share=(0, 1), final_lr=(0, 1), weight_decay=(0, 10), betas=(0, 0.999999),
                eps=(1e-15, 1), clip=(0, None), lr=(1e-12, 10), adam_lr=(0, 10), eval_every=(0, None),
                spike=(0, None), max_rollbacks=(0, None), ramp_tokens=(0, None),
                batch_start=(1, self.batch_size), seed=(0, 2 ** 63 - 1))
        if self.batch_size % self.batch_start:
            raise UserError(f"batch_start {self.batch_start} does not divide batch_size {self.batch_size}; "
                            f"the batch grows in steps of it")
        if self.batch_start < self.batch_size and not self.ramp_tokens:
            raise UserError(f"batch_start {self.batch_start} needs --ramp_tokens: over how many it grows")
        if self.ramp_tokens and self.batch_start == self.batch_size:
            raise UserError(f"ramp_tokens {self.ramp_tokens} needs --batch_start: with how many to begin")
        if self.seq_len % self.tensor_parallel:
            raise UserError(f"--tensor_parallel {self.tensor_parallel} does not divide seq_len "
                            f"{self.seq_len}; between blocks each process has its own positions")

    def check_val_share(self):
        """Raise UserError where a share is to be held out of data that have a part for that."""
        if Path(self.data).is_dir() or self.data == type(self).data:
            refuse(self, f"is for a single file, and --data {self.data} is a folder", "val_share")


@dataclass
class Settings(Loop):
    data: str = "runs/data"  # token shards, as data.py writes them (the default folder is made if missing);
                             # or a mixture of several, as mixture.py writes it: mix.json
    out: str = "runs/base"  # run folder: model, settings.json, log.jsonl, state/; an unfinished run goes on
    overwrite: bool = False  # delete what is in `out` and start anew
    preset: Literal["tiny", "small", "124m", "1b", "7b"] = "small"  # a size and the settings that go with it

    dim: int | None = None  # width of the residual stream; none, here and below: the preset's
    n_layers: int | None = None  # blocks
    n_heads: int | None = None  # query heads
    n_kv_heads: int | None = None  # key/value heads; none: the preset's, else as many as query heads
    ffn_dim: int | None = None  # width inside the MLP; none: the preset's, else 8/3 of dim in steps of 64
    max_seq_len: int | None = None  # the model's limit; none: seq_len
    rope_theta: float | None = None  # base of the rotary wavelengths; none: 10,000
    rope_scaling: Literal["linear", "ntk", "dynamic", "yarn", "llama3"] | None = None  # the rule, of those in
        # positions.py, by which a model reads further than it was trained; none: as it is
    rope_factor: float | None = None  # so many times as far as the model of init_from; a model from nothing
                                      # goes by a trained length of max_seq_len / rope_factor
    qk_norm: bool | None = None  # normalise queries and keys (the folder is then a Qwen3's, else a Llama's);
                                 # none: true
    tie_embeddings: bool | None = None  # one matrix for embedding and head; none: false

    init_from: str | None = None  # go on from this model folder, on other data; the sizes are then its own
    replay: str | None = None  # token shards of the old text, against forgetting: a share of the windows
    replay_share: float = 0.05  # that share; 0: of the old text only the held-out loss is watched

    objective: Literal["next_token", "prefix", "fim"] = "next_token"  # predict the next token; only those
        # after a prefix that sees itself whole; the next token of text whose middle stands at its end
    fim_rate: float = 0.5  # fim: share of the documents so rearranged
    fim_spm_rate: float = 0.5  # fim: share of those in the order suffix, prefix, middle
    fim_cut: Literal["characters", "tokens"] = "characters"  # fim: where a document may be cut

    bigram_steps: int | None = None  # steps that first fit embedding and head to the counted bigrams; 0: none
    seq_len: int | None = None  # tokens a window
    batch_size: int | None = None  # windows a step, over all processes and micro-batches
    steps: int | None = None  # updates
    lr: float | None = None  # peak learning rate of those matrices (Muon; about 3e-3 for the others)
    adam_lr: float | None = None  # peak learning rate of embedding, head and norms

    eval_stride: int | None = None  # tokens between evaluated windows; none: half of seq_len, for context
    sample_prompts: tuple[str, ...] = ("def ", "import ", "class ")  # continued once training is done
    dry_run: bool = False  # only say what the run would take: parameters, FLOPs, memory; nothing is written

    def __post_init__(self):
        self.check_init_from()
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None and not (self.init_from and name in SHAPE):
                setattr(self, name, value)
        own = {"max_seq_len": self.seq_len, "rope_theta": 10000.0, "qk_norm": True, "tie_embeddings": False,
               "bigram_steps": 0, "eval_stride": max(1, self.seq_len // 2)}
        for name, value in own.items():
            if getattr(self, name) is None and not (self.init_from and name in SHAPE):
                setattr(self, name, value)
        self.check()
        self.check_rope()

    def check_init_from(self):
        """Raise UserError where what belongs to the model of --init_from is asked for otherwise."""
        given = [name for name in SHAPE if getattr(self, name) is not None]
        if self.init_from and given:
            raise UserError(f"--{given[0]} {getattr(self, given[0])} and --init_from {self.init_from}: the "
                            f"sizes are that model's; leave --{given[0]} out")
        if self.init_from and self.bigram_steps:
            raise UserError(f"--bigram_steps {self.bigram_steps} would write over the embedding of "
                            f"--init_from {self.init_from}; leave it out")
        if self.init_from:
            self.bigram_steps = 0
        if self.replay and self.data.endswith(".json"):
            raise UserError(f"--replay {self.replay} and --data {self.data}: a mixture names its old text "
                            f"itself; make it one of its sources")
        if self.replay and not self.init_from:
            raise UserError("--replay is of use with --init_from: it keeps a trained model from forgetting")

    def check_rope(self):
        """Raise UserError where rule and factor do not make an extension."""
        require(self, rope_factor=(1, 10000))
        if (self.rope_scaling is None) != (self.rope_factor is None):
            raise UserError(f"--rope_factor {self.rope_factor} needs --rope_scaling: by which rule the model "
                            f"shall read further" if self.rope_factor else
                            f"--rope_scaling {self.rope_scaling} needs --rope_factor: how many times as far "
                            f"the model shall read")
        if not self.init_from and not (self.max_seq_len / (self.rope_factor or 1)).is_integer():
            raise UserError(f"--rope_factor {self.rope_factor:g} does not divide max_seq_len "
                            f"{self.max_seq_len}; from nothing, the rule starts from one over the other")

    def check(self):
        self.check_loop()
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len")
        require(self, **{name: (1, None) for name in sizes}, eval_stride=(1, self.seq_len),
                bigram_steps=(0, None), fim_rate=(0, 1), fim_spm_rate=(0, 1), replay_share=(0, 0.99))
        if "" in self.sample_prompts:
            raise UserError("--sample_prompts has an empty one; name at least a character to go on from")
        if self.max_seq_len and self.seq_len > self.max_seq_len:
            raise UserError(f"seq_len {self.seq_len} exceeds max_seq_len {self.max_seq_len} of this model; "
                            f"pass a shorter --seq_len or a larger --max_seq_len")


# What belongs to the model, and comes with it from --init_from
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len", "rope_theta", "qk_norm",
         "tie_embeddings")

# Settings that may differ between the parts of one run: they say where and how to compute, not what. (Where
# a bad step rolls a run back, save_every and the stops show all the same: it goes back to the last state.)
FREE = {field.name for field in fields(Compute)} | {
    "data", "out", "overwrite", "preset", "micro_batch_size", "chunked_loss", "eval_stride", "eval_every",
    "save_every", "sample_prompts", "max_rollbacks", "profile", "dry_run", "init_from", "replay",
    "lora_merge"}


# ------------------------------------------------------------------------------------------------------------
# What is learnt


def update(model, optimizer, micro_batches, loss_fn, settings, env, lr: float, scaler=None,
           limit: float = math.inf) -> dict:
    """One step over all micro-batches of all processes.

    Returns {"loss", "targets", "grad_norm", "skipped", "figures"}.

    Gradients of the sums are added up, over micro-batches and then over processes, and divided once by the
    count of all targets: the gradient of the mean, however the targets are spread. loss is in nats a target;
    grad_norm is the global norm before clipping. With a `scaler` (a LossScale, for fp16) a step whose
    gradients overflow is skipped, on every process alike.

    Raises BadStep where loss or gradient is not finite, or the loss above `limit`, before a weight is
    touched.
    """
    optimizer.zero_grad()
    totals = Totals(env)
    for batch, last in marked(micro_batches):
        with whole_step(model, last), env.autocast():
            loss_sum, *rest = inside(model, loss_fn, env.to_device(batch))
            (loss_sum * scaler.scale if scaler else loss_sum).backward()
        totals.add(loss_sum, *rest)
    loss_sum, count, figures = totals.over_all()
    loss = loss_sum / max(count, 1)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # torch has averaged over the parts of the batch
    mean = env.data_world_size / max(count, 1) / (scaler.scale if scaler else 1)
    torch._foreach_mul_(gradients, mean)
    norm = clip(gradients, settings.clip)
    overflow = scaler is not None and math.isfinite(loss) and not math.isfinite(norm) and scaler.scale >= 1
    if not overflow:
        refuse_bad(loss, norm, limit, lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.step()
    if scaler:
        scaler.update(overflow)
    return {"loss": loss, "targets": int(count), "grad_norm": norm, "skipped": overflow, "figures": figures}


class Totals:
    """What losses return, added up over micro-batches and then over processes, in float64."""

    def __init__(self, env: Env):
        self.env, self.names, self.sums = env, (), 0.0

    def add(self, loss_sum: Tensor, count: Tensor, figures: dict[str, tuple[Tensor, Tensor]] | None = None):
        """figures: {name: (sum, count)}, the same names each time."""
        figures = figures or {}
        numbers = [x.detach() for pair in [(loss_sum, count), *figures.values()] for x in pair]
        kind = {"dtype": torch.float64, "device": self.env.scalar_device}
        self.names, self.sums = tuple(figures), self.sums + torch.stack([x.to(**kind) for x in numbers])

    def over_all(self) -> tuple[float, float, dict[str, float | None]]:
        """(sum of losses, their count, {name: mean}), equal on every process; a mean not finite is None."""
        loss_sum, count, *rest = self.env.sum_over_data(self.sums).tolist()
        parts = zip(self.names, rest[::2], rest[1::2])
        means = {name: total / max(number, 1) for name, total, number in parts}
        return loss_sum, count, {name: mean if math.isfinite(mean) else None for name, mean in means.items()}


def marked(items):
    """(item, whether it is the last) after item."""
    items = iter(items)
    item = next(items)
    for following in items:
        yield item, False
        item = following
    yield item, True


def clip(gradients: list, bound: float) -> float:
    """The global norm of the gradients, over all processes' parts; they are then scaled down to `bound`.

    bound: 0 for none.
    """
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if bound:
        torch._foreach_mul_(gradients, float((bound / (norm + 1e-6)).clamp(max=1.0)))
    return float(norm)


def refuse_bad(loss: float, norm: float, limit: float, lr: float):
    """Raise BadStep unless loss and gradient norm, equal on every process, are as they should be."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        what = "gradient" if math.isfinite(loss) else "loss"
        raise BadStep(f"{what} is not finite at lr {lr:.2e}; no weight was touched. "
                      f"A lower --lr or more --warmup_steps may help")
    if loss > limit:
        raise BadStep(f"loss {loss:.3f} is a spike, above {limit:.3f}, at lr {lr:.2e}; no weight was "
                      f"touched. A lower --lr, or a larger --spike if such losses are right, may help")


@torch.no_grad()
def evaluate(model, batches: Batches, loss_fn, env) -> dict:
    """Loss over the whole split, each target once: {"loss" (nats a token), "bits_per_byte", "tokens"}.

    And the loss's figures, if it has any. Equal on every process. Bits per byte: the total loss in bits over
    the bytes of the text, so that tokenizers can be compared; of batches without text_bytes there are none.
    It charges the model for end-of-text tokens too. Windows overlap where `batches` has a stride.
    """
    was_training = model.training
    model.eval()
    totals = Totals(env)
    for step in tqdm(range(batches.steps), desc="evaluate", unit="batch", leave=False, disable=env.rank > 0):
        # eager: not worth compiling once more, without gradients
        with env.autocast(), torch.compiler.set_stance("force_eager"):
            totals.add(*inside(model, loss_fn, env.to_device(batches.in_order(step))))
    model.train(was_training)
    loss_sum, count, figures = totals.over_all()
    if not math.isfinite(loss_sum):
        raise UserError(f"the held-out loss is {loss_sum}: the model is broken; go back to an earlier state")
    result = {"loss": loss_sum / count, "tokens": int(count), **figures}
    if hasattr(batches, "text_bytes"):
        result["bits_per_byte"] = loss_sum / math.log(2) / batches.text_bytes
    return result


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(model, batches, loss_fn, settings, env=None, tokenizer=None, validation=None, corpus=None,
          held_out_loss=None) -> dict:
    """Train `model` in place for settings.steps updates, save it to settings.out; return the log's last line.

    batches: `.at(i)` gives the i-th micro-batch of this process.
    loss_fn: loss_fn(model, batch) -> (loss_sum, count).
    validation: batches for `evaluate`, or several by name: {"": batches, "old_": others}.
    corpus: what else must be equal for a state in settings.out to be continued, beside the settings that are
    not FREE; a state of another run is refused.
    held_out_loss: that of validation, where it is another than loss_fn.
    """
    env = env or setup(settings)
    validation = {"": validation} if validation and not isinstance(validation, dict) else validation
    run, log = begin(model, settings, env, tokenizer, corpus or {})
    profiling = Profile(run.folder, settings.profile, env)
    with contextlib.closing(run), contextlib.closing(log), stop_signals() as stop, profiling as profile:
        with progress_bar(run.step, settings.steps, env) as progress:
            while run.step < settings.steps:
                try:
                    line = one_step(run, batches, loss_fn, settings, env)
                except BadStep as problem:
                    go_back(problem, run, settings, env, log)
                    progress.update(run.step - progress.n)
                    continue
                profile.step()
                last, stopping, asked = run.step == settings.steps, env.any(bool(stop)), env.any(stop.asked())
                due = validation and (last or asked or is_multiple(run.step, settings.eval_every))
                best = due and judge(line, run, validation, held_out_loss or loss_fn, env)
                log.write(line)
                progress.set_postfix_str(describe(line), refresh=False)
                progress.update()
                if last or stopping or best or is_multiple(run.step, settings.save_every):
                    run.save(log)
                if stopping:
                    break
        stop_unless_done(run, settings, stop, env)
    save_whole(run.model, tokenizer, run.folder, env)
    return log.last


def stop_unless_done(run: Run, settings, stop: stop_signals, env):
    """Wait for the last state to be on the disk; end the program where a signal came before the last step."""
    run.wait()
    if run.step < settings.steps:
        stop.exit(f"stopped after step {run.step} of {settings.steps}; the same command"
                  f"{' without --overwrite' * settings.overwrite} goes on from there", env)


def begin(model, settings, env, tokenizer, corpus: dict) -> tuple[Run, Log]:
    """The run of these settings, at the newest state in settings.out, else before step 1; and its log."""
    model = parallelize(model.train(), env)
    optimizer = make_optimizer(model, settings, env.say, env.products)
    run = Run(Path(settings.out), model, tokenizer, optimizer, env, identity_of(settings) | corpus)
    run.load()
    log = Log()
    env.first(lambda: log.open(run.folder, run.step, settings))
    if run.step == 0:
        run.save(log)  # so that there always is a state to go back to
    return run, log


def identity_of(settings) -> dict:
    """The settings that say what is learnt: a state is gone on from only where these are equal."""
    free = FREE | settings.free
    return {name: value for name, value in asdict(settings).items() if name not in free}


def one_step(run: Run, batches, loss_fn, settings, env) -> dict:
    """Make step number run.step, counted from 0, and return its line for the log. Raises BadStep."""
    step, began, waited = run.step, time.perf_counter(), [0.0]
    seed_step(settings.seed, step, env.data_rank)
    windows, size = batch_windows(step, settings), micro_batch(settings, env) * env.data_world_size
    first = (windows_before(step, settings) + run.skipped_windows) // size

    def fetch():
        for i in range(first, first + windows // size):
            asked = time.perf_counter()
            with torch.profiler.record_function("data"):
                batch = batches.at(i)
            waited[0] += time.perf_counter() - asked
            yield batch

    lr, limit = learning_rate(step, settings), spike_limit(run.losses, settings.spike)
    report = update(run.model, run.optimizer, fetch(), loss_fn, settings, env, lr, run.scaler, limit)
    run.step += 1
    run.losses = [*run.losses[-99:], report["loss"]]
    width = getattr(batches, "window_tokens", settings.seq_len)
    line = log_line(step, lr, report, batches, time.perf_counter() - began, run.model, settings, env,
                    tokens=round(windows_before(step + 1, settings) * width),
                    tokens_step=windows * width, data_wait=waited[0])
    return line | run.news()


def go_back(problem: BadStep, run: Run, settings, env, log):
    """Return to the last state, and pass over the batches since then; raise once it is too often."""
    step, skipped, rollbacks = run.step, run.skipped_windows, run.rollbacks + 1
    run.wait()
    if rollbacks > settings.max_rollbacks:
        raise UserError(f"step {step + 1}: {problem} (given up after {settings.max_rollbacks} rollbacks)")
    run.load()
    windows = windows_before(step + 1, settings) - windows_before(run.step, settings)
    run.skipped_windows, run.rollbacks = skipped + windows, rollbacks
    env.say(f"step {step + 1}: {problem}. Back to step {run.step}; the {windows} windows since then are "
            f"passed over (rollback {rollbacks} of {settings.max_rollbacks})")
    env.first(lambda: log.open(Path(settings.out), run.step, settings))


def judge(line: dict, run: Run, validation: dict, loss_fn, env) -> bool:
    """Evaluate, add the figures to the line of the log, and say whether the first is the best so far."""
    losses = []
    for name, batches in validation.items():
        result = evaluate(run.model, batches, loss_fn, env)
        losses.append(result.pop("loss"))
        result.pop("tokens", None)
        line[f"{name}val_loss_nats_per_{term(batches)}"] = losses[-1]
        line |= {f"{name}val_{figure}": value for figure, value in result.items()}
    loss = losses[0]
    best = run.best_loss is None or loss < run.best_loss
    if best:
        run.best_loss, run.best_step = loss, run.step
    return best


def progress_bar(done: int, steps: int, env) -> tqdm:
    return tqdm(desc="train", initial=done, total=steps, unit="step", dynamic_ncols=True, smoothing=0.05,
                disable=env.rank > 0)


def is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def micro_batch(settings, env) -> int:
    """How many windows a process holds at once; UserError where they do not divide the batch."""
    start = getattr(settings, "batch_start", settings.batch_size)
    if start % env.data_world_size:
        name = "batch_size" if start == settings.batch_size else "batch_start"
        raise UserError(f"{name} {start} is not divisible by the {env.data_world_size} parts that the "
                        f"{env.world_size} processes cut it into; choose a multiple of them")
    share = start // env.data_world_size
    micro = settings.micro_batch_size or share
    if share % micro:
        raise UserError(f"micro_batch_size {micro} does not divide the {share} windows that each process has "
                        f"of batch_size {start}; choose a divisor")
    return micro


def steps_of(settings, windows: int, env) -> int:
    """--steps, or so many updates that each window is seen `epochs` times, replayed ones in between."""
    if settings.steps is None:
        share = settings.replay_share if getattr(settings, "replay", None) else 0
        return math.ceil(windows * settings.epochs / (1 - share) / settings.batch_size)
    if settings.epochs != type(settings).epochs:
        env.say(f"--epochs {settings.epochs:g} does nothing beside --steps {settings.steps}")
    return settings.steps


def seed_step(seed: int, step: int, rank: int):
    """Randomness of a step (dropout, say) follows from (seed, step, rank): no generator need be saved."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + rank) % 2 ** 63)


# ------------------------------------------------------------------------------------------------------------
# The main job


def bigram_start(model: Transformer, tokens, steps: int, lr: float = 0.05):
    """Fit embedding and head to the counted bigrams of the whole corpus, before training.

    A new model's blocks are the identity, so that all it is is a table of bigrams, factorised:
    p(next | current) = softmax(head(norm(embedding(current)))). Training learns that table first, one token
    at a time. But the loss over a whole corpus depends on it only through how often b follows a:
    sum_ab count(a, b) log p(b | a). One step here sees all tokens at the price of V.

    tokens: 1-D array of ids. Takes 12 V^2 bytes of memory. Adam with a linear decay; head from zero.
    """
    V = model.config.vocab_size
    if V > 16384:
        raise UserError(f"bigrams of {V} tokens take {12 * V * V / 2 ** 30:.0f} GiB to count; "
                        f"pass --bigram_steps 0")
    counts = torch.zeros(V * V)
    for start in range(0, len(tokens) - 1, 2 ** 24):  # bounded memory
        chunk = torch.as_tensor(tokens[start:start + 2 ** 24 + 1].astype("int64"))
        counts += torch.bincount(chunk[:-1] * V + chunk[1:], minlength=V * V)
    counts = counts.view(V, V)
    embedding, head, norm = model.model.embed_tokens.weight, model.lm_head.weight, model.model.norm
    tables = list(dict.fromkeys((embedding, head)))  # one, where they are tied
    optimizer = torch.optim.Adam(tables, lr=lr, betas=(0.9, 0.95), fused=True)
    progress = tqdm(range(steps), desc="bigrams", unit="step", leave=False)
    for step in progress:
        total = 0.0
        for rows in torch.arange(V).split(512):  # never all V x V logits at once
            logits = norm(embedding[rows]) @ head.T  # (512, C) x (C, V) -> (512, V)
            nats = (counts[rows].sum(dim=1) @ logits.logsumexp(dim=1)
                    - counts[rows].flatten() @ logits.flatten())
            (nats / (len(tokens) - 1)).backward()
            total += nats.item() / (len(tokens) - 1)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        norm.weight.grad = None
        progress.set_postfix_str(f"loss {total:.3f}")


def main():
    guarded(parse(Settings), pretrain)


def guarded(settings, job):
    """job(settings, env) on the machine that the settings describe; what has a name ends in one line."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        settings.overwrite = False  # torchrun starts us again: this run is what is to go on
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the loop listens, it shall not end us
    try:
        job(settings, setup(settings))
    except (RuntimeError, MemoryError) as error:
        known = out_of_memory(error, settings) or lost_process(error, settings.timeout_minutes)
        if not known:
            raise
        raise known from None
    finally:
        if dist.is_initialized() and sys.exc_info()[0] is None:  # after an error: the others may never come
            dist.destroy_process_group()


def pretrain(settings: Settings, env: Env):
    """The main job on one process: refuse what is wrong, make what is missing, train, show."""
    tokens = windows_before(settings.steps, settings) * settings.seq_len
    if settings.dry_run:
        env.first(lambda: print(dry_run(planned_config(settings), settings, env, tokens)))
        return
    env.first(lambda: prepare_data(settings, env), patient=True)
    batches, validation = open_data(settings, env)
    model, tokenizer = build_model(settings, batches)
    to_hugging_face(model.config)  # a model that could not be saved is told of now
    with in_run_folder(settings, env):  # last of all that can refuse: --overwrite deletes here
        run_in_folder(settings, env, model, tokenizer, batches, validation)


def run_in_folder(settings: Settings, env: Env, model, tokenizer, batches, validation):
    """The main job, once all is found to be right."""
    tokens = windows_before(settings.steps, settings) * settings.seq_len
    env.say(f"model: {count_parameters(model.config):,} parameters; {tokens:,} tokens to see, "
            f"{tokens / batches.tokens:.2f} epochs, "
            f"{estimate_flops(model.config, settings.seq_len) * tokens:.2g} FLOP")
    if settings.bigram_steps and not states(Path(settings.out) / "state"):
        env.first(lambda: bigram_start(model, batches.data, settings.bigram_steps), patient=True)
    corpus = {"vocab_size": model.config.vocab_size, "train.bin": batches.meta["train"]["sha256"]}
    if settings.init_from:
        corpus["init_from"] = str(Path(settings.init_from).resolve())
    corpus |= getattr(batches, "identity", {})  # of a mixture
    loss_fn = functools.partial(next_token_loss, chunked=settings.chunked_loss)
    last = train(model, with_objective(batches, tokenizer, settings), loss_fn, settings, env, tokenizer,
                 validation, corpus)
    env.first(lambda: show_result(settings, last, batches.meta), patient=True)


def open_data(settings: Settings, env: Env) -> tuple:
    """(batches, {"": validation, "old_": that of the old text}) of the shards that the settings name.

    Of a mixture the first source's validation is "", by which the best state is chosen; the others are
    called by their names.
    """
    place = {"rank": env.data_rank, "world_size": env.data_world_size, "verify": env.rank == 0}
    size = (micro_batch(settings, env), settings.seq_len)
    folders = {"": settings.data} | ({"old_": settings.replay} if settings.replay else {})
    if settings.data.endswith(".json"):
        windows = windows_before(settings.steps, settings)
        batches = open_mixture(settings.data, *size, windows, seed=settings.seed, **place)
        env.say("\n".join([picture(batches, windows), *warnings(batches, windows)]))
        folders = {f"{name}_" * (i > 0): source.folder
                   for i, (name, source) in enumerate(zip(batches.names, batches.sources))}
    else:
        batches = Batches(settings.data, "train", *size, settings.seed, **place)
    if settings.replay:
        old = Batches(settings.replay, "train", *size, settings.seed, **place)
        batches = Replay(batches, old, settings.replay_share)
    validation = {name: Batches(folder, "val", *size, stride=settings.eval_stride, **place)
                  for name, folder in folders.items()}
    return batches, validation


def with_objective(batches, tokenizer: Tokenizer, settings: Settings):
    """The batches, rearranged as the objective has them."""
    if settings.objective == "prefix":
        return PrefixLM(batches, settings.seed)
    if settings.objective == "fim":
        return FillInTheMiddle(batches, tokenizer, settings.seed, settings.fim_rate, settings.fim_spm_rate,
                               settings.fim_cut)
    return batches


def build_model(settings: Settings, batches: Batches) -> tuple[Transformer, Tokenizer]:
    """The model that the settings describe, with weights drawn from settings.seed or those of init_from.

    Raises UserError where tokenizer, shards and model do not belong together.
    """
    tokenizer = load_tokenizer(batches.folder / "tokenizer.json")
    if tokenizer.fingerprint != batches.meta["tokenizer"]:
        raise UserError(f"{batches.folder}/tokenizer.json is not the tokenizer that made the shards beside "
                        f"it; run data.py again")
    known = (tokenizer.fingerprint, with_fim_tokens(tokenizer).fingerprint)
    if settings.objective == "fim":
        tokenizer = with_fim_tokens(tokenizer)
    if not settings.init_from:
        check_room(planned_config(settings, tokenizer.vocab_size))
        torch.manual_seed(settings.seed)
        return Transformer(planned_config(settings, tokenizer.vocab_size)), tokenizer
    model, own = load_model(settings.init_from)
    if own is None or own.fingerprint not in known:
        raise UserError(f"the shards in {settings.data} were made with another tokenizer than that of "
                        f"{settings.init_from}; make them anew: python data.py --tokenizer "
                        f"{settings.init_from} --out {settings.data} --overwrite, with the --input of then")
    if settings.objective == "fim" and own.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{settings.init_from} knows no tokens for infilling; train it with --objective fim "
                        f"from the start")
    model.config = model.model.config = with_rope(model.config, settings)  # other angles, the same weights
    if settings.seq_len > model.config.max_seq_len:
        remedy = "a larger --rope_factor" if settings.rope_scaling else "--rope_scaling and --rope_factor"
        raise UserError(f"seq_len {settings.seq_len} exceeds max_seq_len {model.config.max_seq_len} of "
                        f"{settings.init_from}; pass a shorter --seq_len, or {remedy}")
    return model, own


def with_rope(config: ModelConfig, settings: Settings) -> ModelConfig:
    """The config, made to read further as --rope_scaling and --rope_factor ask for."""
    return extended(config, settings.rope_scaling, settings.rope_factor) if settings.rope_scaling else config


def check_room(config: ModelConfig):
    """Raise UserError where not even the weights, which are made on the CPU, fit into its memory."""
    need, free = 4 * count_parameters(config), free_memory(torch.device("cpu"))
    if free is not None and need > free:
        raise UserError(f"the weights of this model take {need / 2 ** 30:,.1f} GiB, and "
                        f"{free / 2 ** 30:,.1f} GiB are free for this process; choose a smaller --dim or "
                        f"--n_layers, or fewer processes on this machine")


def planned_config(settings: Settings, vocab_size: int | None = None) -> ModelConfig:
    """The ModelConfig that the settings describe; vocab_size: default the shards', or 4096 without any."""
    if settings.init_from:
        return with_rope(model_config(Path(settings.init_from) / "config.json"), settings)
    if vocab_size is None:
        meta = first_source(settings.data) / "meta.json"
        vocab_size = json.loads(meta.read_text(encoding="utf-8"))["vocab_size"] if meta.exists() else 4096
    shape = {name: getattr(settings, name) for name in SHAPE}
    shape["max_seq_len"] = int(shape["max_seq_len"] / (settings.rope_factor or 1))
    config = with_rope(ModelConfig(vocab_size=vocab_size, **shape), settings)
    return replace(config, max_seq_len=settings.max_seq_len)  # whatever was rounded


def prepare_data(settings: Settings, env: Env):
    """Make the default shards if they are missing, by the command that a reader would type."""
    if Path(settings.data) != Path(Settings.data) or (Path(settings.data) / "meta.json").exists():
        return
    env.say(f"no tokens in {settings.data} yet: python data.py --out {settings.data}")
    command = [sys.executable, str(Path(__file__).with_name("data.py")), "--out", settings.data]
    result = subprocess.run(command)  # its own process: its workers start without torch
    if result.returncode:
        raise UserError(f"data.py ended with exit code {result.returncode}; see its message above")


def show_result(settings: Settings, last: dict, meta: dict):
    """Samples, then where the model is, and its held-out bits per byte beside those of the compressors."""
    model, tokenizer = load_model(settings.out)
    generator, samples = torch.Generator().manual_seed(settings.seed), []
    for prompt in settings.sample_prompts:
        ids = tokenizer.encode(prompt)[-model.config.max_seq_len // 2:]
        length = min(100, model.config.max_seq_len - len(ids))
        sample = generate(model, [ids], length, temperature=0.8, top_p=0.95, generator=generator)
        samples.append({"prompt": prompt, "after": tokenizer.decode(sample.ids[0].tolist())})
        print(f"--- {prompt!r} goes on:\n{prompt}{samples[-1]['after']}")
    write_results(settings.out, {"samples": samples})
    print(f"model: {settings.out}")
    xz, gzip = meta["compressors"]["xz"], meta["compressors"]["gzip"]
    print(f"xz -9e needs {xz:.4f} bits per byte for the same text, gzip -9 {gzip:.4f}")
    print(f"{last['val_bits_per_byte']:.4f} bits per byte on {meta['val']['documents']} held-out documents")


if __name__ == "__main__":
    run(main)
