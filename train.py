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
processes at once, so neither changes what is learnt.

Stopped by Ctrl-C, SIGTERM or kill -9, the same command goes on from the last state and ends with the same
bytes: batches and randomness are functions of (seed, step) alone.
"""
import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

from bpe import Tokenizer
from checkpoint import load_state, save_model, save_state, states
from config import UserError, parse, require, run, show
from data import Batches
from model import ModelConfig, Transformer, count_parameters, estimate_flops, generate
from objectives import next_token_loss
from optim import learning_rate, make_optimizer
from parallel import Env, parallelize, reduce_gradients, setup
from watch import Log, describe, log_line

PRESETS = {  # sizes, and the settings that go with them; a flag of the same name goes before
    "tiny": dict(dim=64, n_layers=2, n_heads=2, seq_len=128, batch_size=8, steps=100, lr=0.02, adam_lr=3e-3),
    "small": dict(dim=128, n_layers=4, n_heads=2, seq_len=128, batch_size=16, steps=900, lr=0.02,
                  adam_lr=8e-3, bigram_steps=50),
    "124m": dict(dim=768, n_layers=12, n_heads=12, seq_len=1024, batch_size=512, steps=5000, lr=0.02,
                 adam_lr=1e-3),
    "1b": dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192, seq_len=2048, batch_size=512,
               steps=20000, lr=0.01, adam_lr=5e-4),
    "7b": dict(dim=4096, n_layers=32, n_heads=32, ffn_dim=11008, seq_len=2048, batch_size=2048, steps=250000,
               lr=0.01, adam_lr=3e-4),
}


@dataclass
class Settings:
    data: str = "runs/data"  # token shards, as data.py writes them; the default folder is made if missing
    out: str = "runs/base"  # run folder: model, settings.json, log.jsonl, state/; an unfinished run goes on
    overwrite: bool = False  # delete what is in `out` and start anew
    preset: Literal["tiny", "small", "124m", "1b", "7b"] = "small"  # a size and the settings that go with it

    dim: int | None = None  # width of the residual stream; none, here and below: the preset's
    n_layers: int | None = None  # blocks
    n_heads: int | None = None  # query heads
    n_kv_heads: int | None = None  # key/value heads; none: the preset's, else as many as query heads
    ffn_dim: int | None = None  # width inside the MLP; none: the preset's, else 8/3 of dim in steps of 64
    max_seq_len: int | None = None  # the model's limit; none: seq_len
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    qk_norm: bool = True  # normalise queries and keys (the folder is then a Qwen3's, else a Llama's)
    tie_embeddings: bool = False  # one matrix for embedding and head

    seq_len: int | None = None  # tokens a window
    batch_size: int | None = None  # windows a step, over all processes and micro-batches
    micro_batch_size: int | None = None  # windows a process holds at once; none: its whole share. Fewer take
                                         # less memory and give the same result
    steps: int | None = None  # updates
    optimizer: Literal["muon", "adamw"] = "muon"  # for the matrices inside blocks; the rest is always AdamW's
    lr: float | None = None  # peak learning rate of those matrices (Muon; about 3e-3 for AdamW)
    adam_lr: float | None = None  # peak learning rate of embedding, head and norms
    warmup_steps: int = 10  # the rate rises linearly over these
    decay_share: float = 1.0  # the rate falls linearly to zero over this last share of the steps
    weight_decay: float = 0.1  # on matrices only
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-8  # of AdamW
    clip: float = 1.0  # bound of the global gradient norm; 0: none
    bigram_steps: int | None = None  # steps that first fit embedding and head to the counted bigrams; 0: none
    seed: int = 0

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of matrix products; weights stay fp32
    compile: bool | None = None  # torch.compile; none: where a compiler is found and the run is long enough
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    eval_stride: int | None = None  # tokens between evaluated windows; none: half of seq_len, for context
    eval_every: int = 0  # steps between evaluations on the whole validation split; 0: at the end only
    save_every: int = 100  # steps between states; the last two are kept
    sample_prompts: tuple[str, ...] = ("def ", "import ", "class ")  # continued once training is done

    def __post_init__(self):
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        own = {"max_seq_len": self.seq_len, "bigram_steps": 0, "eval_stride": max(1, self.seq_len // 2)}
        for name, value in own.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len", "batch_size",
                 "micro_batch_size", "steps", "save_every")
        require(self, **{name: (1, None) for name in sizes}, seq_len=(2, None), eval_stride=(1, self.seq_len),
                warmup_steps=(0, None), decay_share=(0, 1), weight_decay=(0, 10), betas=(0, 0.999999),
                eps=(1e-15, 1), clip=(0, None), lr=(1e-12, 10), adam_lr=(0, 10), eval_every=(0, None),
                bigram_steps=(0, None), seed=(0, 2 ** 63 - 1))
        if "" in self.sample_prompts:
            raise UserError("--sample_prompts has an empty one; name at least a character to go on from")
        if self.seq_len > self.max_seq_len:
            raise UserError(f"seq_len {self.seq_len} exceeds max_seq_len {self.max_seq_len} of this model; "
                            f"pass a shorter --seq_len or a larger --max_seq_len")


# Settings that may differ between the parts of one run: they say where and how to compute, not what
FREE = {"data", "out", "overwrite", "preset", "micro_batch_size", "precision", "compile", "device",
        "eval_stride", "eval_every", "save_every", "sample_prompts"}


# ------------------------------------------------------------------------------------------------------------
# What is learnt


def update(model, optimizer, micro_batches, loss_fn, settings, env, lr: float, scaler=None) -> dict:
    """One step over all micro-batches of all processes: returns {"loss", "targets", "grad_norm", "skipped"}.

    Gradients of the sums are added up, over micro-batches and then over processes, and divided once by the
    count of all targets: the gradient of the mean, however the targets are spread. loss is in nats a target;
    grad_norm is the global norm before clipping. With a `scaler` (fp16) a step whose gradients overflow is
    skipped, on every process alike.

    Raises UserError where loss or gradient is not finite, before a weight is touched.
    """
    optimizer.zero_grad()
    loss_sum = torch.zeros((), dtype=torch.float64, device=env.scalar_device)
    count = torch.zeros_like(loss_sum)
    scale = scaler.scale if scaler else lambda loss: loss
    for batch in micro_batches:
        with env.autocast():
            micro_loss, micro_count = loss_fn(model, env.to_device(batch))
        scale(micro_loss).backward()
        loss_sum += micro_loss.detach().to(loss_sum.device)
        count += micro_count.to(count.device)
    loss_sum, count = env.all_reduce(torch.stack((loss_sum, count))).tolist()
    reduce_gradients(model, env)
    if scaler:
        scaler.unscale_(optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    torch._foreach_div_(gradients, max(count, 1))
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf))
    finite = math.isfinite(loss_sum) and math.isfinite(norm)
    if not finite and (scaler is None or scaler.get_scale() < 1):  # no smaller scale will help
        raise UserError(f"{'loss' if not math.isfinite(loss_sum) else 'gradient'} is not finite "
                        f"at lr {lr:.2e}; no weight was touched. "
                        f"A lower --lr or more --warmup_steps may help")
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    if finite:
        scaler.step(optimizer) if scaler else optimizer.step()
    if scaler:
        scaler.update(None if finite else scaler.get_scale() / 2)
    return {"loss": loss_sum / max(count, 1), "targets": int(count), "grad_norm": norm, "skipped": not finite}


@torch.no_grad()
def evaluate(model, batches: Batches, loss_fn, env) -> dict:
    """Loss over the whole split, each target once: {"loss" (nats a token), "bits_per_byte", "tokens"}.

    Equal on every process. Bits per byte: the total loss in bits over the bytes of the text, so that
    tokenizers can be compared. It charges the model for end-of-text tokens too. Windows overlap where
    `batches` has a stride.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=env.scalar_device)
    for step in tqdm(range(batches.steps), desc="evaluate", unit="batch", leave=False, disable=env.rank > 0):
        # eager: not worth compiling once more, without gradients
        with env.autocast(), torch.compiler.set_stance("force_eager"):
            loss_sum, count = loss_fn(model, env.to_device(batches.in_order(step)))
        totals += torch.stack([x.to(totals.device).double() for x in (loss_sum, count)])
    model.train(was_training)
    loss_sum, count = env.all_reduce(totals).tolist()
    return {"loss": loss_sum / count, "bits_per_byte": loss_sum / math.log(2) / batches.text_bytes,
            "tokens": int(count)}


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(model, batches, loss_fn, settings, env=None, tokenizer=None, validation=None,
          corpus=None) -> dict:
    """Train `model` in place for settings.steps updates, save it to settings.out; return the log's last line.

    batches: `.at(step)` gives a micro-batch; accumulation takes several.
    loss_fn: loss_fn(model, batch) -> (loss_sum, count).
    validation: batches for `evaluate`.
    corpus: what else must be equal for a state in settings.out to be continued, beside the settings that are
    not FREE; a state of another run is refused.
    """
    env = env or setup(settings)
    folder = Path(settings.out)
    model = parallelize(model.to(env.device).train(), env)
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(env.device.type, init_scale=2 ** 10) if env.precision == "fp16" else None
    accumulate = micro_batches_a_step(settings, env)
    identity = {name: value for name, value in asdict(settings).items() if name not in FREE} | (corpus or {})
    start = load(folder, model, optimizer, scaler, identity, env)
    log = Log()
    env.first(lambda: log.open(folder, start, settings))
    progress = tqdm(range(start, settings.steps), desc="train", initial=start, total=settings.steps,
                    unit="step", disable=env.rank > 0, dynamic_ncols=True, smoothing=0.05)
    with contextlib.closing(log), stop_signals() as stop:
        for step in progress:
            began = time.perf_counter()
            seed_step(settings.seed, step, env.rank)
            lr = learning_rate(step, settings)
            micro_batches = (batches.at(step * accumulate + i) for i in range(accumulate))
            report = update(model, optimizer, micro_batches, loss_fn, settings, env, lr, scaler)
            line = log_line(step, lr, report, batches, time.perf_counter() - began, model, settings, env)
            progress.set_postfix_str(describe(line))
            last, stopping = step + 1 == settings.steps, env.any(bool(stop))
            due = last or (settings.eval_every and (step + 1) % settings.eval_every == 0)
            if validation is not None and due:
                result = evaluate(model, validation, loss_fn, env)
                line |= {"val_loss_nats_per_token": result["loss"],
                         "val_bits_per_byte": result["bits_per_byte"]}
            log.write(line)
            if last or stopping or (step + 1) % settings.save_every == 0:
                env.first(lambda: save(folder, step + 1, model, optimizer, scaler, identity, log))
            if stopping and not last:
                same = "the same command" + " without --overwrite" * settings.overwrite
                where = f"step {step + 1} of {settings.steps}"
                stop.exit(f"stopped after {where}; {same} goes on from there", env)
    env.first(lambda: save_model(model, tokenizer, folder))
    return log.last


def micro_batches_a_step(settings: Settings, env) -> int:
    """How many micro-batches of each process make up settings.batch_size windows."""
    if settings.batch_size % env.world_size:
        raise UserError(f"batch_size {settings.batch_size} is not divisible by the {env.world_size} "
                        f"processes; choose a multiple of them")
    share = settings.batch_size // env.world_size
    micro = settings.micro_batch_size or share
    if share % micro:
        raise UserError(f"micro_batch_size {micro} does not divide the {share} windows that each process has "
                        f"of batch_size {settings.batch_size}; choose a divisor")
    return share // micro


def seed_step(seed: int, step: int, rank: int):
    """Randomness of a step (dropout, say) follows from (seed, step, rank): no generator need be saved."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + rank) % 2 ** 63)


def save(folder: Path, step: int, model, optimizer, scaler, identity: dict, log):
    """Write state/step_<n>: weights, moments, and what `load` must know. Process 0 does it."""
    log.sync()  # first: a state must never know of a step that the log has lost
    names = {p: name for name, p in model.named_parameters()}  # a tied head has one name, and is written once
    weights = {name: p.detach() for p, name in names.items()}
    moments = {f"{names[p]}.{key}": value
               for p, state in optimizer.state.items() for key, value in state.items()}
    extra = {"identity": identity, "scaler": scaler.state_dict() if scaler else None}
    save_state(folder / "state", step, {"model": weights, "optimizer": moments}, extra)


@torch.no_grad()
def load(folder: Path, model, optimizer, scaler, identity: dict, env) -> int:
    """Put the newest whole state in `folder` into model and optimizer; return the steps done, 0 if none."""
    state = load_state(folder / "state", say=env.say)
    if env.any(state is None):
        if env.any(state is not None):
            raise UserError(f"the processes see different states in {folder}; "
                            f"--out must be on a disk they share")
        return 0
    step, tensors, extra = state
    check_identity(folder, extra["identity"], identity)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.copy_(tensors["model"][name])
    for name, value in tensors["optimizer"].items():
        name, _, key = name.rpartition(".")
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
    if scaler and extra["scaler"]:
        scaler.load_state_dict(extra["scaler"])
    return step


def check_identity(folder: Path, found: dict, wanted: dict):
    """Raise UserError where the run in `folder` was begun with other settings than those wanted now."""
    wanted = json.loads(json.dumps(wanted))  # tuples become lists, as in the file
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise UserError(f"{folder} holds a run with {name} {found.get(name)}, not {wanted.get(name)}; "
                            f"continue it with its own settings, choose another --out, or pass --overwrite "
                            f"to delete it")


# ------------------------------------------------------------------------------------------------------------
# What is seen of it


class stop_signals:
    """Within this context Ctrl-C and SIGTERM only raise a flag, so that the step is finished and saved.

    One more, a second or later, stops at once. (A launcher may pass on the Ctrl-C that the terminal has sent
    to all, so two within a second are one.)
    """

    def __enter__(self):
        self.signal, self.when, self.old = 0, 0.0, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.old[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if not self.signal:
            self.signal, self.when = number, time.monotonic()
        elif time.monotonic() - self.when > 1:
            raise KeyboardInterrupt

    def __bool__(self):
        return self.signal != 0

    def exit(self, message: str, env: Env):
        env.say(message)
        # what a shell reports for a program ended by this signal
        raise SystemExit(128 + (self.signal or signal.SIGTERM))


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


def prepare_data(settings: Settings, env: Env):
    """Make the default shards if they are missing, by the command that a reader would type."""
    if Path(settings.data) != Path(Settings.data) or (Path(settings.data) / "meta.json").exists():
        return
    env.say(f"no tokens in {settings.data} yet: python data.py --out {settings.data}")
    command = [sys.executable, str(Path(__file__).with_name("data.py")), "--out", settings.data]
    result = subprocess.run(command)  # its own process: its workers start without torch
    if result.returncode:
        raise UserError(f"data.py ended with exit code {result.returncode}; see its message above")


MODEL_FILES = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
               "tokenizer_config.json")


def open_run_folder(settings):
    """Make settings.out, or refuse it. Only --overwrite deletes, and only what a run writes."""
    folder = Path(settings.out)
    if settings.overwrite and is_run(folder):
        shutil.rmtree(folder / "state", ignore_errors=True)
        for name in (*MODEL_FILES, "log.jsonl"):  # settings.json stays: after a kill here it is still a run
            (folder / name).unlink(missing_ok=True)
    elif folder.exists() and not is_run(folder):
        if not folder.is_dir() or any(path.suffix != ".tmp" for path in folder.iterdir()):
            raise UserError(f"{folder} exists and is not a run folder; choose another --out")
    if any((folder / name).exists() for name in MODEL_FILES) and not states(folder / "state"):
        raise UserError(f"{folder} holds a model but no state to go on from; choose another --out, "
                        f"or pass --overwrite")
    folder.mkdir(parents=True, exist_ok=True)


def is_run(folder: Path) -> bool:
    """Whether a run of ours stands there: other programs have a settings.json too."""
    try:
        content = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"preset", "steps", "data", "out"} <= content.keys()


def build_model(settings: Settings, vocab_size: int) -> Transformer:
    """The model that the settings describe, with weights drawn from settings.seed."""
    shape = {f.name: getattr(settings, f.name) for f in fields(ModelConfig) if hasattr(settings, f.name)}
    torch.manual_seed(settings.seed)
    return Transformer(ModelConfig(vocab_size=vocab_size, **shape))


def main():
    settings = parse(Settings)
    env = setup(settings)
    try:
        pretrain(settings, env)
    finally:
        if env.world_size > 1:
            dist.destroy_process_group()


def pretrain(settings: Settings, env: Env):
    """The main job on one process: refuse what is wrong, make what is missing, train, show."""
    env.first(lambda: prepare_data(settings, env))
    micro = settings.batch_size // env.world_size // micro_batches_a_step(settings, env)
    place = {"rank": env.rank, "world_size": env.world_size, "verify": env.rank == 0}
    batches = Batches(settings.data, "train", micro, settings.seq_len, settings.seed, **place)
    validation = Batches(settings.data, "val", micro, settings.seq_len, stride=settings.eval_stride, **place)
    tokenizer = Tokenizer.load(Path(settings.data) / "tokenizer.json")
    if tokenizer.fingerprint != batches.meta["tokenizer"]:
        raise UserError(f"{settings.data}/tokenizer.json is not the tokenizer that made the shards beside "
                        f"it; run data.py again")
    model = build_model(settings, tokenizer.vocab_size)
    env.first(lambda: open_run_folder(settings))  # last of all that can refuse: --overwrite deletes here
    if env.rank == 0:
        show(settings)
    tokens = settings.steps * settings.batch_size * settings.seq_len
    env.say(f"model: {count_parameters(model.config):,} parameters; {tokens:,} tokens to see, "
            f"{tokens / batches.tokens:.2f} epochs, "
            f"{estimate_flops(model.config, settings.seq_len) * tokens:.2g} FLOP")
    if settings.bigram_steps and not states(Path(settings.out) / "state"):
        env.first(lambda: bigram_start(model, batches.data, settings.bigram_steps))
    corpus = {"vocab_size": tokenizer.vocab_size, "train.bin": batches.meta["train"]["sha256"]}
    last = train(model, batches, next_token_loss, settings, env, tokenizer, validation, corpus)
    if env.rank == 0:
        show_result(model, tokenizer, settings, last, batches.meta)


def show_result(model: Transformer, tokenizer: Tokenizer, settings: Settings, last: dict, meta: dict):
    """Samples, then where the model is, and its held-out bits per byte beside those of the compressors."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(settings.seed)
    for prompt in settings.sample_prompts:
        ids = tokenizer.encode(prompt)[-settings.max_seq_len // 2:]
        length = min(100, settings.max_seq_len - len(ids))
        with torch.compiler.set_stance("force_eager"):
            sample = generate(model, [ids], length, temperature=0.8, top_p=0.95, generator=generator)
        print(f"--- {prompt!r} goes on:\n{prompt}{tokenizer.decode(sample.ids[0].tolist())}")
    print(f"model: {settings.out}")
    xz, gzip = meta["compressors"]["xz"], meta["compressors"]["gzip"]
    print(f"xz -9e needs {xz:.4f} bits per byte for the same text, gzip -9 {gzip:.4f}")
    print(f"{last['val_bits_per_byte']:.4f} bits per byte on {meta['val']['documents']} held-out documents")


if __name__ == "__main__":
    run(main)
