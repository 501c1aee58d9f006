"""Reinforcement: draw replies, reward them, make the better ones likelier (PPO; Schulman et al. 2017).

    python ppo.py --train_reward_model           # runs/sft + runs/pairs -> runs/reward (reward_model.py)
    python ppo.py                                # runs/sft, rewarded by runs/reward -> runs/ppo
    python ppo.py --algorithm grpo --init_from runs/arithmetic-sft --prompts_data runs/arithmetic/problems \\
        --seq_len 128 --rewards exact=1 --out runs/grpo    # no critic, no reward model: right or wrong

Unlike DPO, what is learnt from is drawn by the model as it is now, so the loop is this file's own. A step:
1. roll out: each prompt is answered, at temperature 1;
2. score: rewards (rewards.py), log-probabilities under policy and reference, the critic's values;
3. advantages: how much better than expected each token was, by a critic (GAE), or by comparison with other
   replies to the same prompt (GRPO, RLOO), or with all (REINFORCE);
4. update: a few passes over the replies, in minibatches, of the clipped policy gradient; the critic's too.

PPO, GRPO, Dr. GRPO, DAPO, RLOO and REINFORCE are settings of this loop (ALGORITHMS). [G1] … [P10] mark the
details of "The N Implementation Details of RLHF with PPO" (Huang et al. 2023), general, reward and policy,
by its numbers: https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo
"""
import contextlib
import copy
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import dpo
import reward_model
import sft
from adapters import Adapter, add_adapter, open_model
from bpe import Tokenizer
from chat import TEMPLATES, read_conversations, render
from config import UserError, open_whole, parse, refuse, require, run
from lora import adapter_off, base_of
from model import Transformer
from optim import learning_rate, make_optimizer
from parallel import Env, inside, parallelize
from plot import line_chart
from policy_gradient import (gae, group_advantages, kl_estimate, next_coefficient, policy_loss,  # noqa: F401
                             policy_terms, summed, value_loss, value_terms, whiten)
from quantize import load_base
from rejection import check_tokenizer, in_words, prompt_files, weights_of
from reward_model import RewardModel, load_reward_model, reward_model_loss, scores_of  # noqa: F401
from rewards import Rewards
from rollouts import Rollout, answered, drawn_now, lay_out, read_replies, reply_values, whole_copy
from survive import BadStep, Run, in_run_folder, save_whole, stop_signals
from train import Loop, go_back, guarded, identity_of, is_multiple, stop_unless_done, update
from watch import Log, peak_memory, read_log, spent, write_results
from work import fingerprint

# ------------------------------------------------------------------------------------------------------------
# 1. One algorithm, many names

ALGORITHMS = {  # what a name stands for; a flag of the same name goes before
    "ppo": dict(baseline="critic", samples=1, kl_in="reward", whiten=True),
    "grpo": dict(baseline="group", samples=8, loss_over="sequence"),
    "dr_grpo": dict(baseline="group", samples=8, divide_by_std=False, loss_over="constant", kl_coef=0.0),
    "dapo": dict(baseline="group", samples=8, clip_high=0.28, kl_coef=0.0),
    "rloo": dict(baseline="rloo", samples=4, kl_in="reward"),
    "reinforce": dict(baseline="batch", samples=1, kl_in="reward", whiten=True)}
COMMON = dict(update_epochs=2, whiten=False, divide_by_std=True, loss_over="token", kl_in="loss",
              kl_coef=0.05)


@dataclass
class Settings(Loop, Adapter):
    init_from: str = "runs/sft"  # model folder to begin with, which knows conversations: sft.py makes such
    prompts_data: str = "runs/chat"  # whose prompts are answered: a folder with train.jsonl and val.jsonl
    out: str = "runs/ppo"  # run folder; an unfinished run goes on
    overwrite: bool = False  # delete what is in `out` and start anew
    rewards: tuple[str, ...] = ("model=1", "quality=0", "f1=0")  # what is rewarded, and with which weight; of
        # weight 0 it is only followed. The names are those of the table in rewards.py
    reward_model: str = "runs/reward"  # folder of the reward called model; --train_reward_model makes it
    template: Literal["chatml", "llama3", "qwen", "qwen3"] = "chatml"  # how a conversation is written

    algorithm: Literal[tuple(ALGORITHMS)] = "ppo"  # a name for some of the settings that have none below
    baseline: Literal["critic", "group", "rloo", "batch"] | None = None  # what a reply is compared with: a
        # learnt value of each token; its group's mean; the mean of the others in it; that of all in the batch
    samples: int | None = None  # replies to each prompt
    divide_by_std: bool | None = None  # group: divide by its standard deviation
    whiten: bool | None = None  # advantages get mean 0 and variance 1 over the batch
    loss_over: Literal["token", "sequence", "constant"] | None = None  # what the loss is a mean over
    clip_policy: float = 0.2  # how far a token's ratio may move to be rewarded for it
    clip_high: float | None = None  # the same, upwards; none: as downwards
    update_epochs: int | None = None  # passes over the replies of a step
    minibatch_size: int = 32  # replies an update, over all processes
    stop_kl: float = 0.0  # no more updates in a step once KL(old | new) is so many nats a token; 0: never

    kl_in: Literal["reward", "loss"] | None = None  # where the distance from the reference is paid for
    kl_kind: Literal["k1", "k2", "k3"] | None = None  # how it is estimated (kl_estimate); none: k1 in the
        # reward, k3 in the loss
    kl_coef: float | None = None  # its price, of a nat
    kl_target: float | None = None  # nats a reply that kl_coef is moved to keep; none: kl_coef stays
    kl_horizon: int = 2000  # over so many replies (next_coefficient)
    entropy_coef: float = 0.0  # reward for entropy, of a nat a token
    unended_reward: float | None = None  # of replies that do not end, in place of all other rewards

    critic: Literal["own", "shared"] = "own"  # the critic's trunk: its own, or the policy's
    critic_from: str | None = None  # model folder its own trunk begins as; none: the reward model, if there
                                    # is one of the policy's shape, else the policy
    critic_lr: float = 1e-3  # peak learning rate of its matrices in blocks
    critic_adam_lr: float = 1e-3  # of its embedding, head and norms
    value_coef: float = 0.1  # shared: weight of the value loss
    clip_value: float = 0.2  # how far a value may move in a step; 0: any
    gamma: float = 1.0  # discount a token [P5]
    lam: float = 0.95  # of the generalised advantage estimate

    steps: int = 30  # times that replies are drawn
    batch_size: int = 64  # replies a step, over all processes
    seq_len: int = 256  # tokens of a window into which replies are packed
    temperature: float = 1.0  # of the replies, and of all log-probabilities [P1]
    max_new_tokens: int = 100  # of a reply
    prompts_at_once: int = 64  # prompts whose replies are drawn together
    optimizer: Literal["muon", "adamw", "adafactor"] = "adamw"  # Muon's steps are as long in all
        # directions, and most of a policy gradient's are noise
    lr: float = 4e-4  # peak learning rate of the matrices in blocks, annealed [G5]
    adam_lr: float = 4e-4  # of embedding, head and norms
    lora_lr: float = 1e-3  # adapters' peak learning rate, in place of --lr
    warmup_steps: int = 3  # the rate rises linearly over these
    weight_decay: float = 0.0  # on matrices only; 0: the reference is what holds the weights
    save_every: int = 10  # steps between states
    eval_every: int = 10  # steps between answers to held-out prompts; 0: at the end only
    questions: int = 200  # held-out prompts; 0: none
    samples_every: int = 10  # steps between five samples in the log; 0: none
    bad_rewards: int = 20  # give up after so many rewards that fail or are no numbers
    micro_batch_size: int | None = None  # replies a process holds at once; none: its share of minibatch_size
    spike: float = 0.0  # none: a policy's loss says nothing of how well it does

    free = {"questions", "samples_every", "prompts_at_once", "bad_rewards"}  # as train.FREE

    def __post_init__(self):
        for name, value in {**COMMON, **ALGORITHMS[self.algorithm]}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.kl_kind = self.kl_kind or ("k1" if self.kl_in == "reward" else "k3")
        require(self, samples=(1, None), update_epochs=(1, 1000), minibatch_size=(1, None), stop_kl=(0, None),
                clip_policy=(1e-6, 0.999), clip_high=(1e-6, 1e6), kl_coef=(0, 1e6), kl_target=(1e-6, 1e6),
                kl_horizon=(1, None), entropy_coef=(0, 1e3), clip_value=(0, None), value_coef=(0, 1e3),
                gamma=(0, 1), lam=(0, 1), temperature=(1e-3, 100), max_new_tokens=(1, None),
                questions=(0, None), prompts_at_once=(1, None), samples_every=(0, None),
                bad_rewards=(1, None), critic_lr=(1e-12, 10), critic_adam_lr=(0, 10))
        self.check_loop()
        self.check_adapter()
        self.check_sizes()
        self.check_useless()

    def check_sizes(self):
        """Raise UserError where groups, batch, minibatches and horizon do not fit into each other."""
        if self.baseline in ("group", "rloo") and self.samples < 2:
            raise UserError(f"--samples {self.samples}: a reply alone has no group to be compared with; pass "
                            f"--samples 8, or --baseline critic")
        if self.batch_size % self.samples:
            raise UserError(f"--samples {self.samples} does not divide --batch_size {self.batch_size}: a "
                            f"group is not cut; choose a multiple")
        if self.kl_target and self.batch_size > self.kl_horizon:
            raise UserError(f"--kl_horizon {self.kl_horizon} is fewer replies than a step has, --batch_size "
                            f"{self.batch_size}: --kl_coef would leap, even below 0; pass a longer one")
        if self.batch_size % self.minibatch_size:
            raise UserError(f"--minibatch_size {self.minibatch_size} does not divide --batch_size "
                            f"{self.batch_size}; choose a divisor")

    def check_useless(self):
        """Raise UserError where something is asked for that would do nothing."""
        if self.batch_start != self.batch_size:
            raise UserError(f"--batch_start {self.batch_start}: here no batch grows; leave it out")
        refuse(self, "is nothing that reinforcement knows", "ramp_tokens", "spike", "profile", "chunked_loss",
               "lora_dropout")
        if self.tensor_parallel > 1:
            raise UserError(f"--tensor_parallel {self.tensor_parallel}: replies are drawn by whole models; "
                            f"pass --data_parallel fsdp")
        if self.baseline != "critic":
            refuse(self, f"is for a critic, and --baseline {self.baseline} has none", "critic", "critic_from",
                   "critic_lr", "critic_adam_lr", "value_coef", "clip_value", "gamma", "lam")
        elif self.critic == "shared":
            refuse(self, "is for --critic own", "critic_from", "critic_lr", "critic_adam_lr")
            if self.lora_rank:
                raise UserError("--critic shared: beside adapters the policy's trunk stays as it is; pass "
                                "--critic own")
        if (self.kl_in, self.kl_kind) == ("loss", "k1") and self.kl_coef:
            raise UserError("--kl_kind k1 in the loss has no gradient on average; pass k2 or k3, or --kl_in "
                            "reward")
        if self.kl_target and not self.kl_coef:
            raise UserError(f"--kl_target {self.kl_target} moves --kl_coef, which is 0; pass one above it")


# ------------------------------------------------------------------------------------------------------------
# 2. Who takes part


@dataclass
class Cast:
    """All that a step needs beside the run (which holds the policy, its optimizer and the critic's)."""
    tokenizer: Tokenizer
    stop_id: int
    rewards: Rewards
    sampler: Transformer  # what draws: the policy, or, where that lies in parts, a whole copy on each process
    reference: Transformer | None  # the model as it was; None: the policy without its adapter
    critic: nn.Module | None = None  # own trunk; a shared one is the policy's, with its head as policy.score
    head: nn.Module | None = None


class Prompts:
    """The prompts of a folder's split: .at(step) gives those of this process, an epoch without repeating."""

    def __init__(self, settings, split: str, model: Transformer, tokenizer: Tokenizer, env: Env):
        path = prompt_files(settings)[split]
        with contextlib.redirect_stdout(None) if env.rank else contextlib.nullcontext():
            conversations = list(read_conversations(path))
        template, room = TEMPLATES[settings.template], min(model.config.max_seq_len, settings.seq_len + 1)
        encoded = [render(one["messages"][:-1], tokenizer, True, template)[0] for one in conversations]
        fits = [len(ids) + settings.max_new_tokens <= room for ids in encoded]
        self.questions = [one for one, fit in zip(conversations, fits) if fit]
        self.ids = [ids for ids, fit in zip(encoded, fits) if fit]
        if not self.ids:
            raise UserError(f"no prompt of {path} leaves --max_new_tokens {settings.max_new_tokens} of "
                            f"{room} tokens to a reply: the shortest has {min(map(len, encoded))}; pass "
                            f"fewer, or a longer --seq_len (the model reads {model.config.max_seq_len})")
        env.say(f"{split}: {len(self.ids):,} prompts" + f"; left out, as too long: {fits.count(False):,}"
                * (not all(fits)))
        self.seed, self.number = settings.seed, settings.batch_size // settings.samples
        self.rank, self.world_size = env.data_rank, env.data_world_size
        self.epoch, self.order = None, None

    def at(self, step: int) -> list[int]:
        """The numbers of this process's prompts in a step: a function of (seed, step)."""
        first = step * self.number + self.rank * (self.number // self.world_size)
        return [self.nth(i) for i in range(first, first + self.number // self.world_size)]

    def nth(self, i: int) -> int:
        epoch, place = divmod(i, len(self.ids))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.ids))
        return int(self.order[place])


def normalised_scores(model: RewardModel, prompts: Sequence[list[int]], replies: Sequence[list[int]],
                      env: Env) -> Tensor:
    """(B,) the reward model's scores, in which held-out answers have mean 0 and variance 1 [R3]."""
    with env.autocast():
        scores = scores_of(model, [prompt + reply for prompt, reply in zip(prompts, replies)])  # [R1]
    return (scores.float().cpu() - model.mean) / model.std


# ------------------------------------------------------------------------------------------------------------
# 3. The step


def reinforce(run: Run, cast: Cast, prompts: Prompts, settings: Settings, env: Env) -> dict:
    """One step in four stages; returns its line for the log. Raises BadStep where a figure is not finite."""
    batch = run.step + run.skipped_windows // settings.batch_size  # after a rollback others than before
    generator = torch.Generator(env.device).manual_seed(
        ((settings.seed * 1_000_003 + batch) * 1_009 + env.data_rank) % 2 ** 63)  # [G6]

    # 1. Roll out: the policy as it is answers each prompt.
    numbers, began = prompts.at(batch), time.perf_counter()
    rollout = draw(run.model, cast, [prompts.ids[i] for i in numbers], settings, env, generator)
    drawn = time.perf_counter() - began

    # 2. Score: what the replies are worth; how likely they were; what the critic expected.
    questions = [prompts.questions[i] for i in numbers for _ in range(settings.samples)]
    scores, parts = rewarded(cast, questions, rollout, settings, env)
    minibatches = cut(rollout, settings, env, np.random.default_rng([settings.seed, batch, env.data_rank]))
    old_logps, reference, old_values = read_all(run.model, cast, rollout, minibatches, settings, env)

    # 3. Advantages: how much better than expected each token was.
    mask, distance = rollout.mask, kl_estimate(old_logps, reference, settings.kl_kind)
    rewards = token_rewards(scores, distance, mask, run.kl_coef if settings.kl_in == "reward" else 0.0)
    advantages, returns = advantages_of(rewards, old_values, mask, settings, env)
    line = outcome(rollout, scores, parts, old_logps, reference, old_values, returns, settings, env)
    refuse_broken(line)

    # 4. Update: some passes over the replies.
    grids = old_logps, reference, advantages, old_values, returns
    line |= update_all(run, cast, minibatches, grids, settings, env)
    line |= {"kl_coef": run.kl_coef, "roll_out_seconds": round(drawn, 4)}
    if settings.kl_target:  # [P10]
        run.kl_coef = next_coefficient(run.kl_coef, line["kl_nats_per_reply"], settings.kl_target,
                                       settings.kl_horizon, settings.batch_size)
    if settings.samples_every and run.step % settings.samples_every == 0:
        line["samples"] = some_samples(questions, rollout, scores)
    run.step += 1
    return line


def draw(policy: Transformer, cast: Cast, prompts: list[list[int]], settings: Settings, env: Env,
         generator: torch.Generator) -> Rollout:
    """Replies of the policy as it is now."""
    return drawn_now(policy, cast.sampler, env, prompts, cast.tokenizer, cast.stop_id, settings.samples,
                     settings.max_new_tokens, settings.temperature, generator,
                     max(1, settings.prompts_at_once // settings.samples), progress=env.rank == 0)


def rewarded(cast: Cast, questions: Sequence[dict], rollout: Rollout, settings: Settings,
             env: Env) -> tuple[Tensor, dict[str, Tensor]]:
    """((B,) rewards, {name: (B,) parts}); a reply that was cut off gets unended_reward, if given [P4]."""
    found = []
    env.each(lambda: found.extend(cast.rewards(questions, rollout.said, (rollout.prompts, rollout.replies))))
    scores, parts = found
    if settings.unended_reward is not None:
        scores = torch.where(rollout.ended, scores, settings.unended_reward)
    return scores, parts


def cut(rollout: Rollout, settings: Settings, env: Env, rng: np.random.Generator) -> list[list]:
    """Minibatches of this process, in a random order: lists of micro-batches (rows, what lay_out makes)."""
    share = settings.minibatch_size // env.data_world_size
    micro = settings.micro_batch_size or share
    order = rng.permutation(len(rollout)).tolist()
    pieces = [order[start:start + micro] for start in range(0, len(order), micro)]
    laid_out = [(rows, lay_out(rollout, rows, settings.seq_len)) for rows in pieces]
    number = share // micro
    return [laid_out[i:i + number] for i in range(0, len(laid_out), number)]


@torch.no_grad()
def read_all(policy: Transformer, cast: Cast, rollout: Rollout, minibatches: list, settings: Settings,
             env: Env) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities under the policy, and under the reference, values), (B, R) each.

    In the very micro-batches that are learnt from later: their first ratios are then 1 to the last bit.
    """
    grids = tuple(torch.zeros(rollout.mask.shape) for _ in range(3))
    for rows, packed in (piece for minibatch in minibatches for piece in minibatch):
        packed = env.to_device(packed)
        with env.autocast(), torch.compiler.set_stance("force_eager"):
            logps, _, values = inside(policy, read_replies, *packed, settings.temperature, False, cast.head)
            with adapter_off(policy) if cast.reference is None else contextlib.nullcontext():
                reference, _, _ = inside(cast.reference or policy, read_replies, *packed,
                                         settings.temperature)
            if cast.critic is not None:
                values = inside(cast.critic, reply_values, *packed)
        for grid, found in zip(grids, (logps, reference, values)):
            if found is not None:
                grid[rows] = found.float().cpu()
    return grids


def token_rewards(scores: Tensor, distance: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """(B, R): what each token pays for its distance from the reference [P7]; at the last, the score too.

    scores (B,): of the replies. distance (B, R): kl_estimate's, in nats.
    """
    rewards = torch.where(mask, -kl_coef * distance, 0.0)
    rewards[torch.arange(len(mask)), mask.sum(dim=1) - 1] += scores
    return rewards


def advantages_of(rewards: Tensor, values: Tensor, mask: Tensor, settings: Settings,
                  env: Env) -> tuple[Tensor, Tensor]:
    """(advantages, returns), (B, R): by the critic's values, or by comparison with other replies."""
    over_all = functools.partial(sums_over_data, env)
    if settings.baseline == "critic":
        advantages, returns = gae(rewards, values, mask, settings.gamma, settings.lam)
    else:
        totals = rewards.sum(dim=1)  # (B,); the whole reply is one action
        if settings.baseline == "batch":
            number, total = over_all(torch.stack([torch.tensor(float(len(totals))), totals.sum()]))
            better = totals - total / number
        else:
            kind = "rloo" if settings.baseline == "rloo" else "mean"
            better = group_advantages(totals, settings.samples, kind, settings.divide_by_std)
        advantages = torch.where(mask, better[:, None], 0.0)
        returns = torch.where(mask, totals[:, None], 0.0)
    if settings.whiten:  # [P8]: the returns, computed before, stay as they are
        advantages = whiten(advantages, mask, over_all=over_all)
    return advantages, returns


def sums_over_data(env: Env, sums: Tensor) -> Tensor:
    return env.sum_over_data(sums.to(env.scalar_device, torch.float64)).to("cpu", sums.dtype)


def update_all(run: Run, cast: Cast, minibatches: list, grids: tuple, settings: Settings, env: Env) -> dict:
    """Learn from all minibatches, update_epochs times; returns the mean of their figures."""
    lr, figures = learning_rate(run.step, settings), []
    policy_step = functools.partial(ppo_loss, settings=settings, kl_coef=run.kl_coef, head=cast.head)
    rng, number = np.random.default_rng([settings.seed, run.step]), len(minibatches)
    passes = [range(number), *(rng.permutation(number) for _ in range(1, settings.update_epochs))]
    for i in itertools.chain(*passes):
        batches = [(*packed, *(grid[rows] for grid in grids)) for rows, packed in minibatches[i]]
        report = update(run.model, run.optimizer, batches, policy_step, settings, env, lr, run.scaler)
        found = report["figures"] | {"loss": report["loss"], "grad_norm": report["grad_norm"]}
        if cast.critic is not None:
            found |= update_critic(run, cast, batches, settings, env)
        figures.append(found)
        far = found["update_kl_nats_per_token"]  # None: not finite
        if settings.stop_kl and (far is None or far > settings.stop_kl):
            break
    seen = {name: [one[name] for one in figures if one[name] is not None] for name in figures[0]}
    means = {name: float(np.mean(some)) if some else None for name, some in seen.items()}
    return means | {"lr": lr, "updates": len(figures), "first_ratio": figures[0]["ratio"]}


def ppo_loss(model: Transformer, batch: tuple[Tensor, ...], settings: Settings, kl_coef: float = 0.0,
             head: nn.Module | None = None) -> tuple[Tensor, Tensor, dict]:
    """(sum, count, figures) of the policy's loss, for train.update; batch: of lay_out, and the grids."""
    *packed, old_logps, reference, advantages, old_values, returns = batch
    mask = packed[-1]
    logps, entropies, values = read_replies(model, *packed, settings.temperature, bool(settings.entropy_coef),
                                            head)
    terms = policy_terms(logps, old_logps, advantages, settings.clip_policy, settings.clip_high)
    if settings.kl_in == "loss" and kl_coef:
        terms = terms + kl_coef * kl_estimate(logps, reference, settings.kl_kind)
    if entropies is not None:
        terms = terms - settings.entropy_coef * entropies
    if values is not None:
        errors = value_terms(values, old_values, returns, settings.clip_value or None)
        terms = terms + settings.value_coef * errors
    ratio = (logps.detach() - old_logps).exp()
    outside = (ratio < 1 - settings.clip_policy) | \
        (ratio > 1 + (settings.clip_policy if settings.clip_high is None else settings.clip_high))
    # KL(old | new): drawn from the old one, so that its logps come first
    seen = {"ratio": ratio, "clip_share": outside.float(),
            "update_kl_nats_per_token": kl_estimate(old_logps, logps.detach(), "k3")}
    if values is not None:
        seen["value_loss"] = value_terms(values.detach(), old_values, returns, None)
    figures = {name: (torch.where(mask, value, 0.0).sum(), mask.sum()) for name, value in seen.items()}
    return *summed(terms, mask, settings.loss_over, settings.max_new_tokens), figures


def update_critic(run: Run, cast: Cast, batches: list, settings: Settings, env: Env) -> dict:
    """One step of the critic on its own trunk towards the returns; returns its figures."""
    rates = critic_settings(settings)
    loss_fn = functools.partial(critic_loss, settings=settings)
    report = update(cast.critic, run.critic_optimizer, batches, loss_fn, rates, env,
                    learning_rate(run.step, rates), run.scaler)
    return {"value_loss": report["figures"]["value_loss"], "critic_grad_norm": report["grad_norm"]}


def critic_loss(critic: nn.Module, batch: tuple[Tensor, ...],
                settings: Settings) -> tuple[Tensor, Tensor, dict]:
    *packed, _, _, _, old_values, returns = batch
    values, mask = reply_values(critic, *packed), packed[-1]
    terms = torch.where(mask, value_terms(values, old_values, returns, settings.clip_value or None), 0.0)
    errors = torch.where(mask, value_terms(values.detach(), old_values, returns, None), 0.0)
    return terms.sum(), mask.sum(), {"value_loss": (errors.sum(), mask.sum())}


def critic_settings(settings: Settings) -> SimpleNamespace:
    return SimpleNamespace(**vars(settings) | {"lr": settings.critic_lr, "adam_lr": settings.critic_adam_lr})


# ---- what is watched ---------------------------------------------------------------------------------------


def outcome(rollout: Rollout, scores: Tensor, parts: dict[str, Tensor], logps: Tensor, reference: Tensor,
            values: Tensor, returns: Tensor, settings: Settings, env: Env) -> dict:
    """What a step's replies are like, for the log: means over the replies, or tokens, of all processes."""
    mask, lengths = rollout.mask, rollout.lengths.float()
    k1, k3 = (kl_estimate(logps, reference, kind) for kind in ("k1", "k3"))
    rewards = {"reward": scores, **{f"reward_{name}": part for name, part in parts.items()}}
    by_reply = {**rewards, **{f"{name}_squared": value.square() for name, value in rewards.items()},
                "length": lengths, "ended": rollout.ended.float(),
                "kl_nats_per_reply": torch.where(mask, k1, 0.0).sum(dim=1),
                "kl_k3_nats_per_reply": torch.where(mask, k3, 0.0).sum(dim=1),
                "distinct": torch.full_like(lengths, len(set(rollout.texts)) / len(rollout))}
    errors = returns - values
    by_token = {"entropy_nats_per_token": -logps,  # of what was drawn: on average the entropy
                "return": returns, "return_squared": returns.square(), "error": errors,
                "error_squared": errors.square()}
    sums = [torch.stack([value.double().sum(), torch.tensor(float(len(value)), dtype=torch.float64)])
            for value in by_reply.values()]
    sums += [torch.stack([torch.where(mask, value, 0.0).double().sum(), mask.sum().double()])
             for value in by_token.values()]
    totals = sums_over_data(env, torch.stack(sums))
    means = dict(zip([*by_reply, *by_token], (totals[:, 0] / totals[:, 1]).tolist()))
    means["replies"] = int(totals[0, 1])
    for name in rewards:
        means[f"{name}_std"] = max(means.pop(f"{name}_squared") - means[name] ** 2, 0.0) ** 0.5
    spread, left = (means.pop(f"{name}_squared") - means.pop(name) ** 2 for name in ("return", "error"))
    if settings.baseline == "critic":
        means["explained_variance"] = 1 - left / spread if spread > 1e-12 else 0.0
    return means


def refuse_broken(line: dict):
    """Raise BadStep unless all figures, equal on every process, are finite."""
    for name in ("reward", "kl_nats_per_reply", "kl_k3_nats_per_reply"):
        if not math.isfinite(line[name]):
            raise BadStep(f"{name} is {line[name]}; no weight was touched. A lower --lr, a larger --kl_coef "
                          f"or --stop_kl may help")


def collapsed(line: dict, processes: int = 1) -> str | None:
    """What is wrong with replies that are all but one, in words."""
    if line["entropy_nats_per_token"] < 0.01:
        return f"the entropy is {line['entropy_nats_per_token']:.4f} nats a token"
    # round: a share such as 1/12 is kept in float32
    if round(line["distinct"] * line["replies"]) <= processes < line["replies"]:
        return "all replies of a process are equal"
    return None


def some_samples(questions: Sequence[dict], rollout: Rollout, scores: Tensor) -> list[dict]:
    chosen = sft.spread(range(len(rollout)), 5)
    return [{"prompt": questions[i]["messages"][-2]["content"], "reply": rollout.texts[i],
             "ended": bool(rollout.ended[i]), "reward": round(float(scores[i]), 4)} for i in chosen]


def held_out(policy: Transformer, cast: Cast, prompts: Prompts, numbers: Sequence[int], settings: Settings,
             env: Env) -> dict[str, float]:
    """Means over one reply, drawn at the same temperature, to each of these held-out prompts."""
    share = len(numbers) // env.data_world_size
    mine = list(numbers)[env.data_rank * share:(env.data_rank + 1) * share]
    alone = SimpleNamespace(**vars(settings) | {"samples": 1, "baseline": "batch", "unended_reward": None})
    generator = torch.Generator(env.device).manual_seed((settings.seed * 1_009 + env.data_rank) % 2 ** 63)
    rollout = draw(policy, cast, [prompts.ids[i] for i in mine], alone, env, generator)
    questions = [prompts.questions[i] for i in mine]
    scores, parts = rewarded(cast, questions, rollout, settings, env)
    rows = [list(range(i, min(i + 32, share))) for i in range(0, share, 32)]
    pieces = [[(some, lay_out(rollout, some, settings.seq_len)) for some in rows]]
    without = replace(cast, critic=None, head=None)  # nobody asks for values
    logps, reference, _ = read_all(policy, without, rollout, pieces, settings, env)
    nothing = torch.zeros_like(logps)
    line = outcome(rollout, scores, parts, logps, reference, nothing, nothing, alone, env)
    return {f"val_{name}": value for name, value in line.items() if name != "distinct"}


# ------------------------------------------------------------------------------------------------------------
# 4. The loop


class PolicyRun(Run):
    """A run whose states hold the critic, too, and the price of a nat."""
    NUMBERS = (*Run.NUMBERS, "kl_coef")

    def __init__(self, settings: Settings, policy: Transformer, cast: Cast, env: Env, identity: dict):
        optimizer = make_optimizer(policy, settings, env.say, env.products)
        super().__init__(Path(settings.out), policy, cast.tokenizer, optimizer, env, identity)
        self.kl_coef = settings.kl_coef
        if cast.critic is not None:
            env.say("the critic's:")
            self.critic_optimizer = make_optimizer(cast.critic, critic_settings(settings), env.say,
                                                   env.products)
            self.others["critic"] = cast.critic, self.critic_optimizer

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """As of Run; a shared critic's head in a file of its own: a state's folder is a language model's."""
        found = super().tensors()
        if "score.weight" in found.get("model", ()):
            found["critic_head"] = {"score.weight": found["model"].pop("score.weight")}
        return found

    def put_back(self, found: dict[str, dict[str, Tensor]]):
        if "critic_head" in found:
            found = found | {"model": found["model"] | found["critic_head"]}
        super().put_back(found)


def learn(run: PolicyRun, cast: Cast, prompts: Prompts, asked: Prompts, settings: Settings, env: Env) -> dict:
    """Make all steps, from the newest state on, and save the model; returns the log's last line."""
    run.load()
    log, numbers = Log(), sft.spread(range(len(asked.ids)), settings.questions)
    env.first(lambda: log.open(run.folder, run.step, settings))
    if run.step == 0:
        run.save(log)
    with contextlib.closing(run), contextlib.closing(log), stop_signals() as stop:
        with tqdm(desc="reinforce", initial=run.step, total=settings.steps, unit="step", dynamic_ncols=True,
                  disable=env.rank > 0) as progress:
            while run.step < settings.steps:
                try:
                    line = timed(lambda: reinforce(run, cast, prompts, settings, env), run, env)
                except BadStep as problem:
                    go_back(problem, run, settings, env, log)
                    progress.update(run.step - progress.n)
                    continue
                last, stopping = run.step == settings.steps, env.any(bool(stop))
                if numbers and (last or is_multiple(run.step, settings.eval_every)):
                    line |= held_out(run.model, cast, asked, numbers, settings, env)
                log.write(line)
                progress.set_postfix_str(in_short(line), refresh=False)
                progress.update()
                if last or stopping or is_multiple(run.step, settings.save_every):
                    run.save(log)
                if stopping:
                    break
        stop_unless_done(run, settings, stop, env)
    if cast.head is not None:
        del run.model.score  # what is saved is a language model
    save_whole(run.model, cast.tokenizer, run.folder, env)
    return log.last


def timed(step: Callable[[], dict], run: PolicyRun, env: Env) -> dict:
    """The step's line, with its time, and a word where the replies have become all but one."""
    began = time.perf_counter()
    figures = step()
    seconds, tokens = time.perf_counter() - began, figures["length"] * figures["replies"]
    line = {"step": run.step, **figures, "tokens": round(tokens),
            "tokens_per_second": round(tokens / seconds), "seconds": round(seconds, 4)} | run.news()
    peak = peak_memory(env.device)
    if peak is not None:
        line["memory_gib"] = round(peak / 2 ** 30, 4)
    problem = collapsed(line, env.data_world_size)
    if problem:
        line["collapsed"] = problem
        env.say(f"step {run.step}: the policy has collapsed: {problem}; a larger --kl_coef or "
                f"--entropy_coef, or a lower --lr, may help")
    return line


def in_short(line: dict) -> str:
    return (f"reward {line['reward']:.3f}, KL {line['kl_nats_per_reply']:.2f}, length {line['length']:.0f}, "
            f"entropy {line['entropy_nats_per_token']:.2f}, clipped {line['clip_share']:.1%}, "
            f"{line['tokens_per_second']:,} tok/s")


# ------------------------------------------------------------------------------------------------------------
# 5. The command


def main():
    words = [word for word in sys.argv[1:] if word != "--train_reward_model"]
    if len(words) < len(sys.argv[1:]):
        reward_model.main(words)
    else:
        guarded(parse(Settings), improve)


def improve(settings: Settings, env: Env):
    """The stage on one process: refuse what is wrong, gather all that takes part, learn, compare."""
    dpo.require_model(settings)
    dpo.require_weights(settings)
    dpo.prepare_prompts(settings, env)
    check_divisible(settings, env)
    model, tokenizer = load_base(settings.init_from, settings.quantize)
    check_tokenizer(tokenizer, settings.init_from, settings.template)
    dpo.check_length(settings, model, settings.init_from)
    prompts, asked = (Prompts(settings, split, model, tokenizer, env) for split in ("train", "val"))
    if settings.questions and len(asked.ids) < env.data_world_size:
        raise UserError(f"{len(asked.ids)} held-out prompts are fewer than the {env.data_world_size} "
                        f"processes; pass --questions 0, or start fewer")
    judge, rewards = rewards_of(settings, tokenizer, env)
    if judge is not None:  # it reads the last token, too
        dpo.check_length(settings, judge, f"the reward model {settings.reward_model}",
                         min(settings.seq_len + 1, model.config.max_seq_len))
    trunk = critic_trunk(model, tokenizer, judge, settings, env)
    reference = None if settings.lora_rank else dpo.frozen(copy.deepcopy(model), env)
    env.say(add_adapter(model, settings))
    with in_run_folder(settings, env):  # last of all that can refuse: --overwrite deletes here
        cast = Cast(tokenizer, tokenizer.special_tokens[TEMPLATES[settings.template].end], rewards,
                    whole_copy(model.to(env.device), env), reference)
        numbers = sft.spread(range(len(asked.ids)), settings.questions)
        identity = identity_of(settings) | {
            "init_from": str(Path(settings.init_from).resolve()), "base": base_of(model).get("sha256"),
            "reference": weights_of(settings.init_from),  # unlike in SFT, it is looked at in every step
            "judge": weights_of(settings.reward_model) if judge else None,
            "prompts": fingerprint(prompts.ids, prompts.questions)}
        add_critic(cast, model, trunk, settings, env)
        del trunk  # the critic is a copy of it
        policy = parallelize(model.train(False), env)
        start = held_out(policy, cast, asked, numbers, settings, env) if numbers else {}
        run_ = PolicyRun(settings, policy, cast, env, identity)
        last = learn(run_, cast, prompts, asked, settings, env)
        if numbers and "val_reward" not in last:  # a finished run, which then was asked no questions
            last = last | held_out(policy, cast, asked, numbers, settings, env)
        env.first(lambda: compare(start, last, asked, numbers, rewards, settings, env), patient=True)


def check_divisible(settings: Settings, env: Env):
    """Raise UserError where the processes cannot share a step's prompts, minibatches or questions evenly."""
    n = env.data_world_size
    share = settings.minibatch_size // n
    if settings.minibatch_size % n or settings.batch_size // settings.samples % n:
        raise UserError(f"{settings.batch_size // settings.samples} prompts a step and --minibatch_size "
                        f"{settings.minibatch_size} are not divisible by the {n} processes; choose multiples")
    if settings.micro_batch_size and share % settings.micro_batch_size:
        raise UserError(f"micro_batch_size {settings.micro_batch_size} does not divide the {share} replies "
                        f"that each process has of --minibatch_size {settings.minibatch_size}; choose a "
                        f"divisor")
    if 0 < settings.questions < n:
        raise UserError(f"--questions {settings.questions} are fewer than the {n} processes; pass more, or 0")


def rewards_of(settings: Settings, tokenizer: Tokenizer, env: Env) -> tuple[RewardModel | None, Rewards]:
    """(the reward model, if its reward is asked for; the weighted sum of all rewards)."""
    judge = None
    if any(word.partition("=")[0] == "model" for word in settings.rewards):
        if settings.reward_model == Settings.reward_model and not Path(settings.reward_model).exists():
            raise UserError(f"there is no {settings.reward_model}, the reward called model; make it with: "
                            f"python ppo.py --train_reward_model, or name one with --reward_model")
        judge, own = load_reward_model(settings.reward_model, env.device)
        check_same_tokenizer(own, tokenizer, f"the reward model {settings.reward_model}", settings)
        judge.requires_grad_(False).eval()
    scorer = None if judge is None else \
        lambda prompts, replies: normalised_scores(judge, prompts, replies, env)
    return judge, Rewards(settings.rewards, scorer, settings.bad_rewards)


def check_same_tokenizer(own: Tokenizer | None, tokenizer: Tokenizer, what: str, settings: Settings):
    if own is None or own.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{what} has another tokenizer than {settings.init_from}: it would read other tokens "
                        f"than were drawn; choose one made from the same model")


def critic_trunk(policy: Transformer, tokenizer: Tokenizer, judge: RewardModel | None, settings: Settings,
                 env: Env) -> Transformer | RewardModel | None:
    """The model that a critic of its own begins as, if there is one."""
    if settings.baseline != "critic" or settings.critic == "shared":
        return None
    alike = judge is not None and judge.config == replace(policy.config, tie_embeddings=False)
    if alike and not settings.critic_from:
        trunk, name = judge, f"the reward model {settings.reward_model}"
    else:
        name = settings.critic_from or settings.init_from
        trunk, own = open_model(name, env.device)
        check_same_tokenizer(own, tokenizer, f"the critic {name}", settings)
        dpo.check_length(settings, trunk, f"the critic {name}")
    env.say(f"critic: a trunk of its own, that of {name}")
    return trunk


def add_critic(cast: Cast, policy: Transformer, trunk: Transformer | RewardModel | None, settings: Settings,
               env: Env):
    """Give the cast its critic, whose head starts at zero [P2]; nothing where the baseline is another."""
    if settings.baseline != "critic":
        return
    if settings.critic == "shared":
        policy.score = nn.Linear(policy.config.dim, 1, bias=False, device=env.device)
        nn.init.zeros_(policy.score.weight)
        cast.head = policy.score
        return
    critic = RewardModel.of(trunk)
    nn.init.zeros_(critic.score.weight)
    cast.critic = parallelize(critic.train(False).to(env.device), env)


def compare(start: dict, last: dict, asked: Prompts, numbers: Sequence[int], rewards: Rewards,
            settings: Settings, env: Env):
    """Print how held-out prompts are answered before and after; write results.json and the pictures."""
    out = Path(settings.out)
    lines = read_log(out)
    results = {}
    if numbers:
        (before, old), (after, new) = (answers_of(folder, asked, numbers, rewards, settings, env)
                                       for folder in (settings.init_from, out))
        print(f"{'held out':<40}{'before':>10}{'after':>10}")
        for name in before:
            note = in_words(before[name], after[name])
            results[name] = {"before": float(np.mean(before[name])), "after": float(np.mean(after[name])),
                             "note": note, "each question": [before[name], after[name]]}
            print(f"{name:<40}{results[name]['before']:>10.4f}{results[name]['after']:>10.4f}  {note}")
        kl = last["val_kl_nats_per_reply"]
        results["KL from the start, nats a reply"] = {"before": 0.0, "after": kl, "note": ""}
        print(f"{'KL from the start, nats a reply':<40}{0:>10.4f}{kl:>10.4f}")
        with open_whole(out / "kl.svg", "w") as file:
            file.write(against_kl(start, lines, rewards))
        results["samples"] = sft.side_by_side([asked.questions[i] for i in numbers], old, new)
    write_results(out, results)
    with open_whole(out / "rewards.svg", "w") as file:
        names = {"reward": "reward", **{f"reward_{name}": name for name in rewards.weights}}
        file.write(line_chart("Rewards of the replies that are learnt from", "step", "mean", {
            label: [(line["step"], line[name]) for line in lines] for name, label in names.items()}))
    print(f"{spent(out, last)}\nmodel: {out}; pictures: {out / 'rewards.svg'}"
          + f", {out / 'kl.svg'}" * bool(numbers))


def against_kl(start: dict, lines: list[dict], rewards: Rewards) -> str:
    """The picture of over-optimisation (Gao et al. 2022): rewards over the distance from the start.

    Each in units of how it scattered at the start. Where what is rewarded still grows and what is only
    followed falls, the former is being exploited.
    """
    points = [start, *(line for line in lines if "val_reward" in line)]
    curves = {}
    for name in rewards.weights:
        key = f"val_reward_{name}"
        unit = start[f"{key}_std"] or 1.0
        curves[name] = [(p["val_kl_nats_per_reply"], (p[key] - start[key]) / unit) for p in points]
    return line_chart("Held-out rewards and the distance from the start", "KL, nats a reply",
                      "standard deviations", curves)


def answers_of(folder, asked: Prompts, numbers: Sequence[int], rewards: Rewards, settings: Settings,
               env: Env) -> tuple[dict[str, list[float]], list[tuple[str, bool]]]:
    """rollouts.answered of the model in a folder, with four replies to each of these held-out prompts."""
    model, tokenizer = open_model(folder, env.device)
    stop = tokenizer.special_tokens[TEMPLATES[settings.template].end]
    return answered(model, [asked.ids[i] for i in numbers], [asked.questions[i] for i in numbers], rewards,
                    tokenizer, stop, 4, settings.max_new_tokens, settings.temperature, settings.seed)


if __name__ == "__main__":
    run(main)
