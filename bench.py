"""How fast this is, as ratios: each figure beside that of a named peer, measured in the same run, in turns.

    python bench.py                       # training, loss, sharding, decoding; six minutes on two cores
    python bench.py training loss         # some of these, or (as --only, too):
    python bench.py decoding              # tokens a second of generate; three minutes
    python bench.py bpe                   # tokenizers trained and texts encoded; some minutes
    python bench.py lora                  # adapters beside peft's; peaks of full, LoRA and QLoRA training
    python bench.py dpo                   # a step on preferences beside TRL's, its memory; three minutes
    python bench.py distill               # a step of distillation beside TRL's GKD, its memory; two minutes
    python bench.py rollouts              # replies drawn for reinforcement, beside transformers'; two minutes
    python bench.py dedup                 # near-duplicates beside datasketch, repeated passages; a minute
    python bench.py scale                 # near-duplicates among a million documents; some minutes
    python bench.py memory                # estimated and measured peaks of a training step; three minutes
    python bench.py gpu                   # MFU at 124 M and 1 B parameters, beside transformers' on that GPU

Peers are test dependencies (requirements-dev.txt); a measure whose peer is not installed is passed over, by
name. Every figure is a median over alternating rounds, beside it the least and the most; --json FILE takes
all. A machine that does other work at the same time spoils it. What was measured, and on what: LOG.md.
"""
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import bench_bpe
import distill
import dpo
import train
from bench_bpe import resident_peak
from bpe import Tokenizer
from checkpoint import load_model, save_model
from config import UserError, open_whole, parse, require, run
from dedup import curve_line, near_duplicates
from divergence import TopK, kd_loss
from generation import Packed
from lora import add_lora, merge_lora, quantize_model, remove_lora
from model import ModelConfig, Transformer, count_parameters, estimate_flops, estimate_memory, generate
from objectives import linear_cross_entropy, next_token_loss
from parallel import Compute, Env, choose_precision, measure_peak, parallelize, setup
from preferences import Pair
from shingles import words_of
from suffixes import duplicate_spans
from survive import local_part


@dataclass
class Settings:
    only: tuple[Literal["training", "loss", "sharding", "decoding", "bpe", "lora", "dpo", "distill",
                        "rollouts", "dedup", "scale", "memory", "gpu", "held"], ...] = (
        "training", "loss", "sharding", "decoding")  # what to measure
    rounds: int = 7  # alternations of which the median is taken
    threads: int | None = None  # of torch; none: one a core
    json: str | None = None  # also write all figures into this file

    def __post_init__(self):
        require(self, rounds=(1, None), threads=(1, None))


class MissingPeer(UserError):
    """What is to be compared with is not installed."""


class Seconds(float):
    """A median of seconds, with all of which it is one: Seconds(values).runs."""

    def __new__(cls, runs: list[float]):
        self = super().__new__(cls, statistics.median(runs))
        self.runs = runs
        return self


ALTERNATIONS: list[dict] = []  # all that this program has timed, for --json


def main():
    words = sys.argv[1:]
    settings = parse(Settings, ["--only", *words] if words and not words[0].startswith("-") else words)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    measures = {"training": training, "loss": loss, "sharding": sharding, "decoding": decoding,
                "bpe": bench_bpe.report, "lora": adapters, "dpo": preferences, "distill": distillation,
                "rollouts": rollouts, "dedup": dedup, "scale": scale, "memory": memory, "gpu": gpu,
                "held": held_bytes}
    figures = {}
    for name in settings.only:
        ALTERNATIONS.clear()
        try:
            figures[name] = measures[name](settings.rounds) or list(ALTERNATIONS)
        except MissingPeer as error:
            print(f"{name} is passed over: {error}")
    if settings.json:
        with open_whole(settings.json, "w") as file:
            json.dump(figures, file, indent=1)


def alternate(rounds: int, **sides) -> dict[str, Seconds]:
    """{name: median seconds of a call}, the sides taking turns, so that a busy moment strikes both alike."""
    seconds = {name: [] for name in sides}
    for function in sides.values():
        function()  # warm: memory taken, kernels chosen
    for _ in tqdm(range(rounds), desc=" / ".join(sides), leave=False):
        for name, function in sides.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: Seconds(values) for name, values in seconds.items()}
    ALTERNATIONS.extend({"side": name, "seconds": float(value), "least": min(value.runs),
                         "most": max(value.runs), "runs": value.runs} for name, value in medians.items())
    for name, value in medians.items():
        print(f"    {name}: {value:.4f} s ({min(value.runs):.4f} to {max(value.runs):.4f})")
    return medians


# ---- a training step, beside transformers' -----------------------------------------------------------------


def training(rounds: int):
    """Tokens a second of the main job's training step, beside transformers' eager Llama with fused AdamW."""
    settings, device = train.Settings(), torch.device("cpu")
    config = train.planned_config(settings, 4096)
    fastest = choose_precision("auto", device)[0]
    sides = {"transformers": peer_step(config, settings, Env(device))}
    for precision, compiled in dict.fromkeys([("fp32", False), (fastest, False), (fastest, True)]):
        env = Env(device, precision=precision, compile=compiled)
        if precision != "fp32" and not compiled:
            sides[f"transformers {precision}"] = peer_step(config, settings, env)
        for optimizer in ("muon", "adamw"):
            name = f"{optimizer} {precision}{' compiled' * compiled}"
            sides[name] = our_step(config, train.Settings(optimizer=optimizer), env)
    seconds = alternate(rounds, **sides)
    tokens = settings.batch_size * settings.seq_len
    flops = estimate_flops(config, settings.seq_len) * tokens
    peaks = {precision: measure_peak(Env(device, precision=precision)) for precision in {"fp32", fastest}}
    print(f"training step, {count_parameters(config):,} parameters, {tokens:,} tokens, "
          f"{torch.get_num_threads()} threads; matrix products: "
          + ", ".join(f"{precision} {peak / 1e9:,.0f} GFLOP/s" for precision, peak in peaks.items()))
    for name, value in seconds.items():
        peak = peaks[fastest if fastest in name else "fp32"]
        print(f"  {name:<20}{tokens / value:>10,.0f} tokens/s{seconds['transformers'] / value:>7.2f} x "
              f"transformers{flops / value / peak:>8.0%} of the peak")


def our_step(config, settings, env):
    torch.manual_seed(0)
    model = parallelize(Transformer(config).train(), env)
    optimizer = train.make_optimizer(model, settings, None, env.products)
    batch = random_batch(config, settings, env)
    return lambda: train.update(model, optimizer, [batch], next_token_loss, settings, env, 1e-3)


def random_batch(config, settings, env, rows: int | None = None):
    shape = (rows or settings.batch_size, settings.seq_len + 1)
    ids = torch.randint(config.vocab_size, shape, device=env.device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def peer_step(config, settings, env, rows: int | None = None, attention: str = "eager"):
    """The same step by transformers: its Llama, cross-entropy, torch's clipping and fused AdamW."""
    torch.manual_seed(0)
    model = peer_model(config, attention).to(env.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    inputs, targets = random_batch(config, settings, env, rows)

    def step():
        optimizer.zero_grad()
        with env.autocast():
            logits = model(inputs).logits
            F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def peer_model(config: ModelConfig, attention: str):
    """transformers' Llama of the same sizes."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingPeer("transformers is not installed (pip install -r requirements-dev.txt)") from None
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings, eos_token_id=None,
        attn_implementation=attention))


# ---- the loss that holds no logits -------------------------------------------------------------------------

LOSS_SIZES = {"V": 32768, "N": 8192}  # vocabulary, tokens (T x B)


def loss(rounds: int):
    """Time and memory of linear_cross_entropy, forward and backward, beside the plain form."""
    for width in (128, 512):
        seconds = alternate(max(3, rounds // 2), plain=functools.partial(loss_step, "plain", width),
                            chunked=functools.partial(loss_step, "chunked", width))
        peaks = {kind: peak_of(kind, width) for kind in ("plain", "chunked")}
        print(f"cross-entropy of {LOSS_SIZES['N']:,} tokens, V = {LOSS_SIZES['V']:,}, C = {width}: "
              f"plain {seconds['plain']:.2f} s, {peaks['plain']:,.0f} MiB; "
              f"chunked {seconds['chunked']:.2f} s, {peaks['chunked']:,.0f} MiB: "
              f"{seconds['chunked'] / seconds['plain']:.2f} x the time, "
              f"{peaks['chunked'] / peaks['plain']:.3f} x the memory")


@functools.cache
def loss_inputs(width: int):
    torch.manual_seed(0)
    return (torch.randn(LOSS_SIZES["N"], width, requires_grad=True),
            torch.randn(LOSS_SIZES["V"], width, requires_grad=True),
            torch.randint(LOSS_SIZES["V"], (LOSS_SIZES["N"],)))


def loss_step(kind: str, width: int):
    hidden, weight, targets = loss_inputs(width)
    hidden.grad = weight.grad = None
    if kind == "plain":
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    else:
        linear_cross_entropy(hidden, weight, targets).backward()


def peak_of(kind: str, width: int) -> float:
    """MiB of memory that one step takes at its peak beyond its inputs, in a fresh process."""
    return in_a_fresh_process(f"bench.loss_inputs({width})\n"
                              f"before = bench.resident_peak(); bench.loss_step({kind!r}, {width})\n"
                              f"print(bench.resident_peak() - before)") / 2 ** 20


def in_a_fresh_process(code: str, **environment) -> int:
    """The number that the code prints."""
    return int(printed_by_a_fresh_process(code, **environment))


def printed_by_a_fresh_process(code: str, **environment) -> str:
    code = f"import bench\nbench.torch.set_num_threads({torch.get_num_threads()})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=os.path.dirname(os.path.abspath(__file__)), env={**os.environ, **environment})
    return done.stdout


# ---- peak memory, estimated and measured ------------------------------------------------------------------

MEMORY_SIZES = {  # what takes most: the model, and (windows, tokens a window)
    "weights": (dict(vocab_size=8192, dim=512, n_layers=8, n_heads=8), (1, 128)),
    "logits": (dict(vocab_size=16384, dim=384, n_layers=2, n_heads=6), (4, 256)),
    "activations": (dict(vocab_size=2048, dim=384, n_layers=8, n_heads=6, qk_norm=True), (4, 256)),
    "mixed": (dict(vocab_size=8192, dim=384, n_layers=6, n_heads=6, n_kv_heads=2, tie_embeddings=True),
              (4, 256)),
}


def memory(rounds: int):
    """Peak memory of training, in MiB, beside costs.estimate_memory: what tensors hold at most at once.

    glibc keeps freed pieces of up to 32 MiB for later, and cuts them small: for models of this size that adds
    up to a half. So it is told to give back what a tensor held; "by default" is the peak without that.
    Tensors beyond 32 MiB are given back anyway.
    """
    print(f"peak of a training step, MiB: AdamW, fp32, {torch.get_num_threads()} threads")
    for size, (shape, (rows, length)) in MEMORY_SIZES.items():
        config = ModelConfig(**shape)
        for kind in ("none", "full"):
            for chunked in (True, False):
                code = f"print(bench.training_peak({size!r}, {kind!r}, {chunked}))"
                estimate = estimate_memory(config, rows, length, activation_checkpointing=kind,
                                           chunked_loss=chunked)["total"]
                peak = in_a_fresh_process(code, MALLOC_MMAP_THRESHOLD_="65536")
                default = in_a_fresh_process(code) if (kind, chunked) == ("none", True) else None
                print(f"  {count_parameters(config):>10,} parameters, {size:<13}recomputed {kind:<6}"
                      f"{'chunked' if chunked else 'plain':<7} loss{estimate / 2 ** 20:>10,.0f} estimated"
                      f"{peak / 2 ** 20:>6,.0f} measured, ratio {estimate / peak:.2f}"
                      + (f"; by default {default / 2 ** 20:,.0f}" if default else ""), flush=True)


def training_peak(size: str, kind: str, chunked: bool, rank: int = 0, quantize: str | None = None) -> int:
    """Bytes beyond what stood before the model, at the peak of two steps, the second of two micro-batches.

    The first takes the optimizer's moments, and a first micro-batch has no gradients beside it yet. A tiny
    model goes before, as a library's pages and buffers are taken when they are first used. rank: of adapters,
    beside a base that is quantised as its weights are drawn, matrix by matrix; 0: all weights are trained.
    """
    shape, (rows, length) = MEMORY_SIZES[size]
    settings = train.Settings(optimizer="adamw", lr=1e-3, device="cpu", seq_len=length)
    env = Env(torch.device("cpu"), compute=Compute(activation_checkpointing=kind))
    loss_fn = functools.partial(next_token_loss, chunked=chunked)
    for config in (ModelConfig(vocab_size=64, dim=64, n_layers=2, n_heads=2), ModelConfig(**shape)):
        before = resident_peak()
        model = Transformer(config) if not quantize else quantized_transformer(config, quantize)
        model = parallelize((add_lora(model, rank) if rank else model).train(), env)
        optimizer = train.make_optimizer(model, settings)
        batch = random_batch(config, settings, env, rows)
        for micro_batches in (1, 2):
            train.update(model, optimizer, [batch] * micro_batches, loss_fn, settings, env, 1e-3)
    return resident_peak() - before


def quantized_transformer(config: ModelConfig, kind: str) -> Transformer:
    """A model of random weights that never were in memory all at once, as load_base reads one."""
    with torch.device("meta"):
        model = Transformer(config)
    norms = [module for module in model.modules() if hasattr(module, "eps")]
    for module in (model.model.embed_tokens, model.lm_head, *norms):
        module.to_empty(device="cpu")
        torch.nn.init.normal_(module.weight, std=0.02)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for linear in (m for m in part.children() if isinstance(m, torch.nn.Linear)):
                linear.to_empty(device="cpu")
                torch.nn.init.normal_(linear.weight, std=0.02)
            quantize_model(part, kind)
    return model


# ---- adapters, beside peft's -------------------------------------------------------------------------------


def adapters(rounds: int):
    """Time of a LoRA step beside peft's layers in the same model; what merging saves; peaks of memory."""
    config = train.planned_config(train.Settings(), 4096)
    sides = {"ours": lora_step(config), "peft in our model": lora_step(config, peft=True),
             "peft in transformers": lora_peer_step(config), "all weights": our_step(
                 config, train.Settings(optimizer="adamw"), Env(torch.device("cpu")))}
    for kind in ("nf4", "int8"):
        sides[f"ours on {kind}"] = lora_step(config, quantize=kind)
    seconds = alternate(rounds, **sides)
    print(f"a LoRA step, rank 8, {count_parameters(config):,} parameters, fp32, {torch.get_num_threads()} "
          f"threads")
    for name, value in seconds.items():
        print(f"  {name:<22}{value * 1e3:>8.1f} ms{seconds['peft in our model'] / value:>7.2f} x the speed "
              f"of peft in our model")
    merged_costs_nothing(rounds)
    lora_memory()


def lora_step(config, peft: bool = False, quantize: str | None = None):
    settings, env = train.Settings(optimizer="adamw"), Env(torch.device("cpu"))
    torch.manual_seed(0)
    model = Transformer(config).train()
    if quantize:
        quantize_model(model, quantize)
    model = with_pefts(model) if peft else add_lora(model, 8, 16)
    optimizer = train.make_optimizer(model, settings)
    batch = random_batch(config, settings, env)
    return lambda: train.update(model, optimizer, [batch], next_token_loss, settings, env, 1e-3)


def with_pefts(model):
    """The model with peft's LoRA layers on all linear layers in its blocks."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingPeer("peft is not installed (pip install -r requirements-dev.txt)") from None
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=names), model)


def lora_peer_step(config):
    """As peer_step, of transformers' Llama (sdpa) with peft's adapters."""
    settings, env = train.Settings(), Env(torch.device("cpu"))
    torch.manual_seed(0)
    model = with_pefts(peer_model(config, "sdpa")).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    inputs, targets = random_batch(config, settings, env)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return step


def merged_costs_nothing(rounds: int):
    """Greedy tokens of the base, the adapted and the merged model, in turns."""
    base = Transformer(DECODER).eval()
    adapted = add_lora(Transformer(DECODER).eval(), 8, 16)
    merged = remove_lora(merge_lora(add_lora(Transformer(DECODER).eval(), 8, 16)))
    ids = torch.randint(DECODER.vocab_size, (1, 16))
    models = {"base": base, "adapted": adapted, "merged": merged}
    seconds = alternate(max(3, rounds // 2), **{
        name: functools.partial(generate, model, ids, 32, temperature=0) for name, model in models.items()})
    print("  generation: " + ", ".join(f"{name} {value / seconds['base']:.2f} x the base's time"
                                       for name, value in seconds.items()))


def lora_memory():
    """Peaks of a training step (AdamW, fp32) of all weights, of adapters, and on a quantised base."""
    for size in ("weights", "mixed"):
        shape, (rows, length) = MEMORY_SIZES[size]
        config = ModelConfig(**shape)
        kinds = (("full", 0, None), ("LoRA", 8, None), ("int8", 8, "int8"), ("nf4", 8, "nf4"))
        for name, rank, kind in kinds:
            code = f"print(bench.training_peak({size!r}, 'none', True, {rank}, {kind!r}))"
            held = estimate_memory(config, rows, length, lora_rank=rank, quantize=kind)
            peak = in_a_fresh_process(code, MALLOC_MMAP_THRESHOLD_="65536")
            trained = held["gradients"] + held["moments"]
            print(f"  {count_parameters(config):>10,} parameters, {rows} x {length} tokens, {name:<5}"
                  f"{held['total'] / 2 ** 20:>6,.0f} MiB estimated{peak / 2 ** 20:>6,.0f} measured, ratio "
                  f"{held['total'] / peak:.2f}; weights {held['weights'] / 2 ** 20:,.1f}, gradients and "
                  f"moments {trained / 2 ** 20:,.1f}", flush=True)


# ---- a step on preferences, beside TRL's -------------------------------------------------------------------

DPO_PAIRS = 32


def preferences(rounds: int):
    """Time and memory of a DPO step, beside TRL's trainer on the same pairs; fp32 and AdamW in both."""
    for size in ("small", "wide"):
        config = ModelConfig(**DPO_SIZES[size])
        sides = {f"{who} {reference}": dpo_step(who, reference, size)
                 for who in ("TRL", "ours") for reference in ("live", "stored")}
        seconds = alternate(rounds, **sides)
        print(f"a DPO step, {count_parameters(config):,} parameters, {DPO_PAIRS} pairs of "
              f"{synthetic_lengths()}, fp32, {torch.get_num_threads()} threads")
        for name, value in seconds.items():
            peak = peak_of_step(f"dpo_step(*{name.split()!r}, {size!r})")
            speed = seconds[f"TRL {name.split()[1]}"] / value
            print(f"  {name:<14}{value * 1e3:>9.1f} ms{speed:>7.2f} x TRL's speed, {peak / 2 ** 20:,.0f} MiB "
                  f"above the start", flush=True)


DPO_SIZES = {"small": dict(vocab_size=4096, dim=128, n_layers=4, n_heads=4, ffn_dim=384, max_seq_len=256),
             "wide": dict(vocab_size=16384, dim=256, n_layers=4, n_heads=8, ffn_dim=704, max_seq_len=256)}


def synthetic_pairs(vocab_size: int) -> list[Pair]:
    """Pairs with lengths as in the default ones: prompts of 20 to 140 tokens, answers of 4 to 100."""
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(vocab_size, size=rng.integers(low, high)).tolist()
    sides = ((ids(20, 140), ids(4, 100), ids(4, 100)) for _ in range(DPO_PAIRS))
    return [Pair(prompt, one, other, [True] * len(one), [True] * len(other)) for prompt, one, other in sides]


def synthetic_lengths() -> str:
    total = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in synthetic_pairs(100))
    return f"{total / DPO_PAIRS:.0f} tokens"


def dpo_step(who: str, reference: str, size: str):
    """A function that makes one step; reference: "live" (a second model each time) or "stored"."""
    config = ModelConfig(**DPO_SIZES[size])
    pairs = synthetic_pairs(config.vocab_size)
    if who == "TRL":
        return dpo_peer_step(config, pairs, reference == "live")
    torch.manual_seed(0)
    settings = dpo.Settings(optimizer="adamw", batch_size=DPO_PAIRS,
                            reference="model" if reference == "live" else "stored")
    env, batch = Env(torch.device("cpu")), dpo.Pairs(pairs, DPO_PAIRS, 256).in_order(0)
    model = Transformer(config).train()
    second = Transformer(config).requires_grad_(False).eval() if reference == "live" else None
    optimizer = train.make_optimizer(model, settings)
    loss = functools.partial(dpo.preference_loss, settings=settings, reference=second)
    return lambda: train.update(model, optimizer, [batch], loss, settings, env, 1e-4)


def dpo_peer_step(config: ModelConfig, pairs: list, live: bool):
    """TRL's trainer on its own batch (chosen sides, then rejected ones, padded); torch's clip and AdamW."""
    try:
        import transformers
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
    except ImportError:
        raise MissingPeer("trl is not installed (pip install -r requirements-dev.txt)") from None
    transformers.utils.logging.disable_progress_bar()
    tokenizer = Tokenizer([], ["<|endoftext|>"])
    torch.manual_seed(0)
    model = peer_model(config, "sdpa").train()
    second = peer_model(config, "sdpa").requires_grad_(False).eval()
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with tempfile.TemporaryDirectory() as folder:
        save_model(Transformer(replace(config, vocab_size=tokenizer.vocab_size)), tokenizer, Path(folder))
        known = transformers.AutoTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")
        settings = DPOConfig(output_dir=folder, use_cpu=True, bf16=False, report_to=[], max_length=None,
                             gradient_checkpointing=False, disable_tqdm=True)
        trainer = DPOTrainer(model, second, args=settings, train_dataset=rows, processing_class=known)
    trainer.precompute_ref_logps = not live
    batch = padded_pairs(pairs)
    if not live:
        batch |= {"ref_chosen_logps": torch.zeros(len(pairs)), "ref_rejected_logps": torch.zeros(len(pairs))}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        trainer.compute_loss(model, dict(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def padded_pairs(pairs: list) -> dict[str, torch.Tensor]:
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    batch = {name: torch.zeros(len(rows), width, dtype=torch.long)
             for name in ("input_ids", "attention_mask", "completion_mask")}
    for row, (prompt, answer) in enumerate(rows):
        whole = prompt + answer
        batch["input_ids"][row, :len(whole)] = torch.tensor(whole)
        batch["attention_mask"][row, :len(whole)] = 1
        batch["completion_mask"][row, len(prompt):len(whole)] = 1
    return batch


def peak_of_step(code: str) -> int:
    """The most bytes that a second step takes above what stood before it: not weights and moments.

    code: makes the step, of this file's functions. In a fresh process, which gives back what it frees.
    """
    return in_a_fresh_process(f"step = bench.{code}\nstep()\nbench.gc.collect()\n"
                              f"before = bench.resident_peak('VmRSS')\nstep()\n"
                              f"print(bench.resident_peak() - before)", MALLOC_MMAP_THRESHOLD_="65536")


# ---- a step of distillation, beside TRL's -----------------------------------------------------------------

KD_TOKENS = (16, 128)  # windows, tokens a window
KD_SIZES = {  # of student and teacher
    "small": (dict(vocab_size=4096, dim=64, n_layers=4, n_heads=2, tie_embeddings=True),
              dict(vocab_size=4096, dim=128, n_layers=4, n_heads=2)),
    "wide": (dict(vocab_size=32768, dim=128, n_layers=4, n_heads=4, tie_embeddings=True),
             dict(vocab_size=32768, dim=256, n_layers=4, n_heads=4))}


def distillation(rounds: int):
    """Time and memory of a step on a teacher's logits, beside TRL's GKD trainer: same shapes, fp32, AdamW."""
    for size, (student, teacher) in KD_SIZES.items():
        sides = {f"{who} {kind}": kd_step(who, kind, size)
                 for kind in ("forward", "jsd") for who in ("TRL", "plain", "ours")}
        sides |= {f"ours {kind}": kd_step("ours", kind, size) for kind in ("alone", "top-64")}
        seconds = alternate(rounds, **sides)
        own, whole = (count_parameters(ModelConfig(**shape)) for shape in (student, teacher))
        print(f"a step of distillation, {own:,} parameters from {whole:,}, {KD_TOKENS[0]} x {KD_TOKENS[1]} "
              f"tokens, V = {student['vocab_size']:,}, fp32, {torch.get_num_threads()} threads")
        for name, value in seconds.items():
            peak = peak_of_step(f"kd_step(*{name.split()!r}, {size!r})")
            beside = seconds.get(f"TRL {name.split()[1]}")
            speed = f"{beside / value:>7.2f} x TRL's speed" if beside else " " * 21
            print(f"  {name:<14}{value * 1e3:>9.1f} ms{speed}, {peak / 2 ** 20:,.0f} MiB above the start",
                  flush=True)


def kd_step(who: str, kind: str, size: str):
    """A function that makes one step. who: ours, ours with all logits at once (plain), or TRL; kind: forward,
    jsd, from stored top-64, or the student alone, without a teacher."""
    student, teacher = (ModelConfig(**shape, max_seq_len=KD_TOKENS[1]) for shape in KD_SIZES[size])
    torch.manual_seed(0)
    ids = torch.randint(student.vocab_size, (KD_TOKENS[0], KD_TOKENS[1] + 1))
    if who == "TRL":
        return kd_peer_step(student, teacher, ids, kind)
    weight = 0.0 if kind == "alone" else 1.0
    settings = distill.Settings(optimizer="adamw", data="runs/data", kd_weight=weight,
                                kind="jsd" if kind == "jsd" else "forward")
    model, knows = Transformer(student).train(), Transformer(teacher).requires_grad_(False).eval()
    lesson = distill.Lesson(ids[:, :-1], ids[:, 1:])
    if kind == "top-64":
        lesson.top, knows = random_top(lesson.targets.numel(), teacher.vocab_size), None
    loss = functools.partial(distill.lesson_loss, teacher=knows if weight else None, settings=settings)
    if who == "plain":
        loss = functools.partial(plain_kd_loss, teacher=knows, settings=settings)
    optimizer, env = train.make_optimizer(model, settings), Env(torch.device("cpu"))
    return lambda: train.update(model, optimizer, [(lesson,)], loss, settings, env, 1e-4)


def plain_kd_loss(model: Transformer, batch: tuple, teacher: Transformer, settings) -> tuple:
    """The same loss with all logits at once, the student's and the teacher's."""
    lesson, = batch
    with torch.no_grad():
        logits = teacher(lesson.inputs)
    return kd_loss(model(lesson.inputs), logits, lesson.targets, settings.temperature, settings.kind,
                   kd_weight=settings.kd_weight)


def random_top(tokens: int, vocab_size: int) -> TopK:
    logps = torch.randn(tokens, 65).log_softmax(dim=-1)
    return TopK(torch.rand(tokens, vocab_size).topk(64).indices, logps)


def kd_peer_step(student: ModelConfig, teacher: ModelConfig, ids: torch.Tensor, kind: str):
    """The loss of TRL's GKDTrainer on transformers' models; torch's clip and AdamW."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        raise MissingPeer("trl is not installed (pip install -r requirements-dev.txt)") from None
    trainer = GKDTrainer.__new__(GKDTrainer)  # its loss asks for no more than these
    trainer.teacher_model = peer_model(teacher, "sdpa").requires_grad_(False).eval()
    trainer.beta = 0.5 if kind == "jsd" else 0
    model = peer_model(student, "sdpa").train()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        trainer.compute_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


# ---- generation, beside transformers' ----------------------------------------------------------------------

DECODER = ModelConfig(vocab_size=8192, dim=512, n_layers=8, n_heads=8, ffn_dim=1408, tie_embeddings=True)


def decoding(rounds: int):
    """Tokens a second of generate, greedy, beside transformers' with equal weights; and where time goes."""
    rounds = max(3, rounds // 2)
    ours = Transformer(DECODER).eval()
    for parameter in ours.parameters():  # else what begins at zero would give each token alike
        torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.05)
    theirs = peer_model(DECODER, "sdpa").eval()
    theirs.load_state_dict(ours.state_dict())
    print(f"generation, {count_parameters(DECODER):,} parameters, {torch.get_num_threads()} threads")
    for precision in dict.fromkeys(("fp32", choose_precision("auto", torch.device("cpu"))[0])):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        packing = alternate(rounds, pack=lambda: Packed(ours))["pack"]
        print(f"  {precision}: packing the weights takes {packing * 1e3:.0f} ms, once, as in sample.py")
        with Packed(ours):
            for batch, prompt, new in ((1, 64, 128), (16, 64, 128), (1, 512, 1), (4, 512, 1)):
                beside_peer(rounds, ours, theirs, batch, prompt, new)
            guessing(rounds, ours)
    if os.path.isdir("runs/base"):
        model, tokenizer = load_model("runs/base")
        with Packed(model):
            guessing(rounds, model, tokenizer.encode("def read(self, size=-1):\n    "))


def beside_peer(rounds: int, ours, theirs, batch: int, prompt: int, new: int):
    """Greedy generation by both, in turns; of one new token, the rate is that of reading the prompt."""
    ids = torch.randint(DECODER.vocab_size, (batch, prompt))
    given = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
    seconds = alternate(rounds, ours=lambda: generate(ours, ids, new, temperature=0),
                        transformers=lambda: theirs.generate(ids, max_new_tokens=new, **given))
    tokens = batch * (new if new > 1 else prompt)
    print(f"    batch {batch:>2}, {prompt} tokens read, {new:>3} written: "
          f"{tokens / seconds['ours']:>7,.0f} tokens/s, transformers "
          f"{tokens / seconds['transformers']:>7,.0f}: {seconds['transformers'] / seconds['ours']:.2f} x")
    if batch == 1 and new > 1:
        where_time_goes(ours, seconds["ours"] / new)


def where_time_goes(model: Transformer, seconds: float):
    """Reading each weight once is the least that a token can take."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if not model.config.tie_embeddings:
        weights -= model.model.embed_tokens.weight.nbytes  # a row is read, no more
    block = torch.ones(2 ** 26)  # 256 MiB: more than a cache holds
    bandwidth = block.nbytes / alternate(5, sum=block.sum)["sum"]
    print(f"    a token reads {weights / 1e6:.0f} MB of weights; at the {bandwidth / 1e9:.0f} GB/s at which "
          f"this machine sums a large tensor that takes {weights / bandwidth * 1e3:.1f} ms of its "
          f"{seconds * 1e3:.1f}, {weights / bandwidth / seconds:.0%}; the rest: attention, norms, calls, and "
          f"the prompt")


def guessing(rounds: int, model: Transformer, prompt: list[int] | None = None):
    """Tokens a second with and without guesses of four tokens, copied from the text so far."""
    ids = [prompt] if prompt else torch.randint(model.config.vocab_size, (1, 32)).repeat(1, 4).tolist()
    new, passes = min(128, model.config.max_seq_len - len(ids[0])), []
    hook = model.model.register_forward_hook(lambda *_: passes.append(1))
    generate(model, ids, new, temperature=0, speculate=4)
    hook.remove()
    seconds = alternate(rounds, plain=lambda: generate(model, ids, new, temperature=0),
                        guessed=lambda: generate(model, ids, new, temperature=0, speculate=4))
    text = "a Python function by runs/base" if prompt else "what random weights say, a loop"
    print(f"    with guesses, {text}: {new / len(passes):.2f} tokens a pass, "
          f"{seconds['plain'] / seconds['guessed']:.2f} x the speed without")


def rollouts(rounds: int):
    """Tokens a second of 32 replies at temperature 1: 8 to each of 4 prompts, and 1 to each of 32."""
    small = replace(DECODER, vocab_size=4096, dim=128, n_layers=4, n_heads=2, n_kv_heads=2, ffn_dim=384,
                    tie_embeddings=False)
    for config in (small, DECODER):
        ours, theirs = Transformer(config).eval(), peer_model(config, "sdpa").eval()
        for parameter in ours.parameters():
            torch.nn.init.normal_(parameter.data, mean=float(parameter.dim() == 1), std=0.05)
        theirs.load_state_dict(ours.state_dict())
        print(f"rollouts, {count_parameters(config):,} parameters, {torch.get_num_threads()} threads")
        for prompts in (4, 32):
            ids = torch.randint(config.vocab_size, (prompts, 64)).repeat_interleave(32 // prompts, dim=0)
            given = dict(attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0,
                         max_new_tokens=64, min_new_tokens=64)
            seconds = alternate(max(3, rounds // 2), ours=lambda: generate(ours, ids, 64),
                                transformers=lambda: theirs.generate(ids, **given))
            print(f"    32 replies to {prompts} prompts of 64 tokens, 64 tokens each: "
                  f"{32 * 64 / seconds['ours']:,.0f} tokens/s, transformers "
                  f"{32 * 64 / seconds['transformers']:,.0f}: "
                  f"{seconds['transformers'] / seconds['ours']:.2f} x")


# ---- what a process holds under FSDP -----------------------------------------------------------------------


def sharding(rounds: int):
    """Bytes of parameters and moments that a process holds under FSDP, as a share of the whole."""
    whole = held(1)
    for count in (2, 4):
        share = held(count) / whole
        print(f"FSDP over {count} processes: each holds {share:.4f} of the {whole / 2 ** 20:.1f} MiB of "
              f"parameters and moments; 1/{count} is {1 / count:.4f}, the difference "
              f"{share * count - 1:+.1%}")


def held(processes: int) -> int:
    """The bytes that the fullest process holds; measured in processes of their own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    code = os.path.abspath(__file__)
    done = subprocess.run([sys.executable, *(launcher if processes > 1 else []), code, "--only", "held"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return max(int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("held"))


def held_bytes(rounds: int):
    """Print what this process holds after one step of AdamW under FSDP."""
    settings = train.Settings(optimizer="adamw", lr=1e-3, device="cpu", data_parallel="fsdp", batch_size=16)
    env = setup(settings)
    model = parallelize(Transformer(train.planned_config(settings, 4096)), env)
    optimizer = train.make_optimizer(model, settings, None, env.products)
    batch = random_batch(model.config, settings, env, rows=2)
    train.update(model, optimizer, [batch], next_token_loss, settings, env, 1e-3)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    print("held", sum(local_part(tensor).nbytes for tensor in [*model.parameters(), *moments]))


# ---- what stands twice -------------------------------------------------------------------------------------


class Synthetic:
    """`number` texts of `size` bytes, made when asked for; every tenth an earlier one with a word changed."""

    def __init__(self, number: int, size: int):
        self.number = number
        letters = np.random.Generator(np.random.PCG64(0)).integers(97, 123, (50_000, 6), dtype=np.uint8)
        self.words, self.length = [bytes(row).decode() for row in letters], size // 7

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < self.number:
            raise IndexError(i)  # the end, for who iterates
        generator = np.random.Generator(np.random.PCG64(i))
        if i % 10 == 9:
            copied = self[int(generator.integers(i)) // 10 * 10].split(" ")
            copied[int(generator.integers(self.length))] = "another"
            return " ".join(copied)
        chosen = generator.integers(len(self.words), size=self.length)
        return " ".join([self.words[j] for j in chosen.tolist()])


def dedup(rounds: int):
    """Near-duplicates among 2,000 documents of 4 kB on one core, beside datasketch's; passages in 10 MB."""
    texts = list(Synthetic(2000, 4000))
    found = {}
    seconds = alternate(rounds, ours=lambda: found.update(ours=near_duplicates(texts)),
                        datasketch=lambda: found.update(datasketch=peer_duplicates(texts)))
    dropped = {name: int((kept != np.arange(len(texts))).sum()) for name, kept in found.items()}
    print(f"near-duplicates of {len(texts):,} documents of 4 kB, one core; {curve_line()}\n"
          f"  ours {seconds['ours']:.2f} s, {dropped['ours']} dropped, each compared exactly; datasketch "
          f"{seconds['datasketch']:.2f} s, {dropped['datasketch']} found; "
          f"{seconds['datasketch'] / seconds['ours']:.1f} x")
    taken, peak = map(float, printed_by_a_fresh_process("bench.passages()").split())
    print(f"passages of 50 tokens in 10 MB of source, a byte a token: {taken:.1f} s of one core, "
          f"{peak:.1f} bytes a token beside the text")


def peer_duplicates(texts: list[str]) -> np.ndarray:
    """The first document that datasketch's LSH finds for each: same n-grams and bands, not verified."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise MissingPeer("datasketch is not installed (pip install -r requirements-dev.txt)") from None
    index, kept = MinHashLSH(num_perm=112, params=(14, 8)), []
    for i, text in enumerate(texts):
        words, sketch = words_of(text), MinHash(num_perm=112)
        sketch.update_batch([" ".join(words[j:j + 5]).encode() for j in range(len(words) - 4)])
        kept.append(min([i, *index.query(sketch)]))
        index.insert(i, sketch)
    return np.array(kept)


def passages():
    """Print seconds of processor time, and bytes a token at the peak, of duplicate_spans."""
    tokens, filled = np.empty(10_000_000, np.uint8), 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        content = np.frombuffer(path.read_bytes(), np.uint8)[:len(tokens) - filled]
        tokens[filled:filled + len(content)] = content
        filled += len(content)
    before, began = resident_peak("VmRSS"), time.process_time()
    duplicate_spans(tokens, 50)
    print(time.process_time() - began, (resident_peak() - before) / len(tokens))


def scale(rounds: int):
    """Processor time and memory of near_duplicates by the number of documents, and the fit's exponent."""
    numbers, taken = (10_000, 100_000, 1_000_000), []
    for number in numbers:
        printed = printed_by_a_fresh_process(f"bench.near_among({number})").split()
        seconds, peak, beside, dropped = map(float, printed)
        taken.append(seconds)
        print(f"{number:>9,} documents of 1 kB: {seconds:>7.1f} s of one core, {dropped:,.0f} dropped; peak "
              f"{peak / 2 ** 20:,.0f} MiB, {beside / number:,.0f} bytes a document", flush=True)
    exponent = np.polyfit(np.log(numbers), np.log(taken), 1)[0]
    print(f"time grows as N^{exponent:.2f}")


def near_among(number: int):
    """Print seconds of processor time, the process's peak, what of it came on top, and how many are dropped.

    Making the texts, twice for candidates, is in the time.
    """
    texts = Synthetic(number, 1000)
    near_duplicates(Synthetic(100, 1000))  # warm
    before, began = resident_peak("VmRSS"), time.process_time()
    kept = near_duplicates(texts)
    seconds, peak = time.process_time() - began, resident_peak()
    print(seconds, peak, peak - before, int((kept != np.arange(number)).sum()))


# ---- on a GPU ----------------------------------------------------------------------------------------------


def gpu(rounds: int):
    """MFU at 124 M and 1 B parameters: ours, compiled, in bf16; under FSDP; transformers'."""
    if not torch.cuda.is_available():
        raise UserError("--only gpu needs an NVIDIA GPU, and there is none that torch can use here")
    for preset, rows in (("124m", 16), ("1b", 4)):
        settings = train.Settings(preset=preset, device="cuda", compile=True)
        env = setup(settings)
        config = train.planned_config(settings, 50304)
        flops = estimate_flops(config, settings.seq_len) * rows * settings.seq_len
        print(f"{preset}: {count_parameters(config):,} parameters, {rows} x {settings.seq_len} tokens, "
              f"{torch.cuda.get_device_name()}; matrix products: {env.peak_flops / 1e12:,.0f} TFLOP/s "
              "measured")
        under_fsdp = functools.partial(gpu_step, data_parallel="fsdp")
        for name, make in (("ours", gpu_step), ("FSDP", under_fsdp), ("transformers", gpu_peer)):
            seconds = alternate(rounds, **{name: make(preset, config, rows)})[name]
            print(f"  {name:<14}{rows * settings.seq_len / seconds:>10,.0f} tokens/s, "
                  f"MFU {flops / seconds / env.peak_flops:.1%}, "
                  f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def gpu_step(preset: str, config, rows: int, data_parallel: str = "ddp"):
    settings = train.Settings(preset=preset, device="cuda", compile=True, data_parallel=data_parallel)
    env = setup(settings)
    model = parallelize(Transformer(config).train(), env)
    optimizer = train.make_optimizer(model, settings, None, env.products)
    batch = random_batch(config, settings, env, rows)
    return lambda: train.update(model, optimizer, [batch], next_token_loss, settings, env, 1e-3)


def gpu_peer(preset: str, config, rows: int):
    settings = train.Settings(preset=preset, device="cuda")
    step = peer_step(config, settings, setup(settings), rows, attention="sdpa")

    def waited():
        step()
        torch.cuda.synchronize()
    return waited


if __name__ == "__main__":
    run(main)
