"""Direct preference optimisation: of two answers, make the chosen one likelier (Rafailov et al. 2023).

    python dpo.py --make_pairs                   # runs/sft answers, a rule chooses: runs/pairs (rejection.py)
    python dpo.py                                # runs/sft + runs/pairs -> runs/dpo
    python dpo.py --data pairs.jsonl --kind ipo  # any preferences (preferences.py), any of KINDS
    python dpo.py --rounds 3                     # sample, SFT on the best, DPO on pairs, and again

The loop is pretraining's (train.py). Unlike SFT:
1. a term of the loss is a pair, (prompt, chosen, rejected), and what counts of an answer is the
   log-probability of all of it: a sum over its tokens, never a mean (but for the kinds PER_TOKEN);
2. a reference, the model as it was, says what each answer was worth before: the reward that is learnt is
   implicit, beta log pi(y|x) / pi_ref(y|x) (Eq. 5), and only the difference of two rewards is in the loss;
3. no reward model, no sampling, no reinforcement: the loss is logistic regression on that difference (Eq. 7).
"""
import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import rejection
import sft
from adapters import CONFIG, Adapter, add_adapter, open_model
from attention import Mask
from batches import IGNORE, SPLITS, Batches
from bpe import Tokenizer
from chat import TEMPLATES
from config import UserError, open_whole, parse, refuse, require, run
from lora import adapter_off, base_of
from model import Transformer
from objectives import token_logps
from parallel import Compute, Env, inside, parallelize
from plot import line_chart
from preferences import Pair, encode_pairs, read_preferences
from quantize import load_base
from rejection import Sampling, check_tokenizer, make_pairs
from survive import alone, in_run_folder
from tensor_files import read_header, read_tensors, write_tensors
from train import Loop, evaluate, guarded, micro_batch, steps_of, train
from watch import read_log, spent, write_results
from work import fingerprint

# ------------------------------------------------------------------------------------------------------------
# 1. The losses

KINDS = ("sigmoid", "hinge", "ipo", "ipo_norm", "robust", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair",
         "sppo_hard", "apo_zero", "apo_down", "dpop", "simpo", "orpo")
WITHOUT_REFERENCE = ("simpo", "orpo")
PER_TOKEN = ("ipo_norm", "sigmoid_norm", "simpo", "orpo")  # these divide an answer's sum by its length
WITH_SMOOTHING = ("sigmoid", "sigmoid_norm", "robust", "exo_pair")
WITH_GAMMA = ("simpo", "dpop")


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor | None = None,
             reference_rejected: Tensor | None = None, beta: float = 0.1, label_smoothing: float = 0.0,
             kind: str = "sigmoid", *, chosen_lengths: Tensor | None = None,
             rejected_lengths: Tensor | None = None,
             gamma: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, chosen rewards, rejected rewards) of pairs, (B,) each; the rewards without gradient.

    policy_…, reference_…: log-probabilities of whole answers in nats, summed over their tokens, (B,). Of the
    kinds WITHOUT_REFERENCE the reward is beta log pi. lengths: tokens of the answers, for those PER_TOKEN.
    label_smoothing: the share of pairs that are taken to be labelled the wrong way round, for the kinds
    WITH_SMOOTHING. gamma: of simpo the margin (default 0.5), of dpop lambda (default 50, as in the paper).

    All are functions of h = log-ratio of the chosen - log-ratio of the rejected, or of both ratios: sigmoid
    is -log sigma(beta h), hinge max(0, 1 - beta h), ipo (h - 1 / (2 beta))^2; the others stand in their
    lines. By hand: at the start, where the policy is the reference, h = 0 and the sigmoid's loss is ln 2. As
    TRL's, but for label smoothing, which TRL's "sigmoid" no longer has, and "ipo": TRL's is our ipo_norm.
    """
    if kind not in KINDS:
        raise UserError(f"--kind {kind} is not one of {', '.join(KINDS)}")
    if not beta > 0:  # nan too
        raise UserError(f"--beta {beta} is out of range; it must be above 0")
    if kind in WITHOUT_REFERENCE:
        reference_chosen = reference_rejected = torch.zeros_like(policy_chosen)
    assert reference_chosen is not None and reference_rejected is not None, f"{kind} needs a reference"
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected  # log-ratios
    if kind in PER_TOKEN:
        assert chosen_lengths is not None and rejected_lengths is not None, f"{kind} needs lengths of answers"
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    h, eps = chosen - rejected, label_smoothing
    if kind in ("sigmoid", "sigmoid_norm"):  # DPO, Eq. 7; with eps Mitchell 2023's conservative DPO, Eq. 3
        losses = -F.logsigmoid(beta * h) * (1 - eps) - F.logsigmoid(-beta * h) * eps
    elif kind == "robust":  # Chowdhury et al. 2024, Eq. 12: unbiased where labels are wrong with chance eps
        losses = (-F.logsigmoid(beta * h) * (1 - eps) + F.logsigmoid(-beta * h) * eps) / (1 - 2 * eps)
    elif kind == "hinge":  # SLiC-HF (Zhao et al. 2023), Eq. 4, on implicit rewards; as RSO, section 3.3
        losses = F.relu(1 - beta * h)
    elif kind in ("ipo", "ipo_norm"):  # Azar et al. 2023, Eq. 17: h shall be 1 / (2 beta), not infinite. Its
        losses = (h - 1 / (2 * beta)) ** 2  # sums are over all tokens; its authors' runs divide (ipo_norm)
    elif kind == "simpo":  # Meng et al. 2024, Eq. 6: mean log-probabilities, no reference, a margin
        losses = -F.logsigmoid(beta * h - (0.5 if gamma is None else gamma))
    elif kind == "orpo":  # Hong et al. 2024, Eq. 6 and 7: of odds p / (1 - p), p a token's geometric mean
        losses = -beta * F.logsigmoid(h - log1mexp(chosen) + log1mexp(rejected)) - chosen
    elif kind == "dpop":  # Pal et al. 2024, Eq. 3: the chosen one must not fall below the reference
        losses = -F.logsigmoid(beta * (h - (50.0 if gamma is None else gamma) * F.relu(-chosen)))
    elif kind == "exo_pair":  # Ji et al. 2024, Eq. 16: the reverse KL divergence from (1 - eps, eps)
        eps = max(eps, 1e-3)
        p, log_p, log_q = torch.sigmoid(beta * h), F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
        losses = p * (log_p - math.log1p(-eps)) + (1 - p) * (log_q - math.log(eps))
    else:
        losses = OF_BOTH_RATIOS[kind](chosen, rejected, beta)
    return losses, (beta * chosen).detach(), (beta * rejected).detach()


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends; x = 0 (a certain answer) counts as just below."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


OF_BOTH_RATIOS = {  # losses that do not look at the difference alone: c, r are the log-ratios
    # noise contrastive alignment (Chen et al. 2024), Eq. 11: the chosen one's likelihood itself
    "nca_pair": lambda c, r, beta: -F.logsigmoid(beta * c) - 0.5 * (F.logsigmoid(-beta * c)
                                                                    + F.logsigmoid(-beta * r)),
    # binary classifier (Jung et al. 2024), Eq. 9, with a shift of 0
    "bco_pair": lambda c, r, beta: -F.logsigmoid(beta * c) - F.logsigmoid(-beta * r),
    # self-play (Wu et al. 2024), Eq. 4.7, where the chosen one always wins
    "sppo_hard": lambda c, r, beta: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
    # anchored (D'Oosterlinck et al. 2024), Eq. 7: chosen up, rejected down; Eq. 8: both down, the latter more
    "apo_zero": lambda c, r, beta: 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r),
    "apo_down": lambda c, r, beta: torch.sigmoid(beta * c) + 1 - torch.sigmoid(beta * (c - r)),
}


# ------------------------------------------------------------------------------------------------------------
# 2. Log-probabilities of answers


def sequence_logps(model: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi(answer | prompt) of each row, summed over the tokens where mask is True, in nats: (B,) float32.

    ids (B, T), padded on the right with any ids; mask (B, T) bool, aligned to ids: True on the answer's
    tokens. Nothing behind an answer changes it, as attention is causal. Never are the logits of all tokens
    held.
    """
    targets = torch.where(mask, ids, IGNORE)[:, 1:]
    logps = token_logps(model, ids[:, :-1], targets)
    rows = (targets != IGNORE).nonzero()[:, 0]
    return summed(logps, rows, len(ids), ids.size(1))[0]


def summed(values: Tensor, owner: Tensor, number: int, most: int) -> tuple[Tensor, Tensor]:
    """(the sum of each owner's values, how many these are), (number,) each.

    values, owner: (N,); owner ascending, at most `most` times the same. Laid out in a matrix and summed by
    row: unlike index_add's, the order of the sum is the same each time, on a GPU too, so that runs repeat
    bitwise.
    """
    counts = torch.zeros(number, dtype=torch.long, device=owner.device)
    counts.index_add_(0, owner, torch.ones_like(owner))
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    return values.new_zeros(number, most).index_put((owner, place), values).sum(dim=1), counts


class Pairs(Batches):
    """Pairs by step, as Batches: `at` gives (inputs, targets, documents, sides, reference).

    All answers of a step, each behind its prompt, are packed into R windows of T = seq_len tokens
    (sft.best_fit), where none sees another: little padding is computed.

    inputs, targets, documents (R, T): targets are the tokens of answers, else -100; documents: 1, 2, …
    through all windows in a row, 0 on what is left over.
    sides (2 P,): which answer each document is: 2 i the chosen, 2 i + 1 the rejected one of pair i.
    reference (P, 2): log-probabilities of both under the reference, zeros unless `reference` (N, 2) is given.
    """
    term = "pair"

    def __init__(self, pairs: Sequence[Pair], batch_size: int, seq_len: int, seed: int = 0, rank: int = 0,
                 world_size: int = 1):
        """batch_size: pairs of a rank and step. pairs: of at most seq_len + 1 tokens a side."""
        self.pairs, self.reference = list(pairs), torch.zeros(len(pairs), 2)
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.rank, self.world_size = rank, world_size
        self.windows = len(self.pairs)  # what an epoch permutes
        self.steps = -(-self.windows // (batch_size * world_size))
        total = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in self.pairs)
        self.window_tokens = total / len(self.pairs)  # for the log: tokens of a pair
        self._epoch, self._order = None, None

    def stack(self, windows: Sequence[int]):
        numbers = [int(i) for i in windows if i < self.windows]  # past an evaluation's end there are none
        sides = [side for i in numbers for side in self.sides(i)]
        packs = sft.best_fit([len(ids) - 1 for ids, _ in sides], self.seq_len) or [[]]
        inputs = np.zeros((len(packs), self.seq_len), dtype=np.int64)  # (R, T)
        targets, documents, order = np.full_like(inputs, IGNORE), np.zeros_like(inputs), []
        for row, pack in enumerate(packs):
            start = 0
            for side in pack:
                ids, learnt = sides[side]
                end = start + len(ids) - 1
                order.append(side)
                inputs[row, start:end] = ids[:-1]
                targets[row, start:end] = np.where(learnt[1:], ids[1:], IGNORE)
                documents[row, start:end] = len(order)
                start = end
        arrays = inputs, targets, documents, np.array(order, dtype=np.int64)
        return *map(torch.from_numpy, arrays), self.reference[numbers]

    def sides(self, i: int) -> tuple:
        """(ids, mask) of the chosen and of the rejected side of pair i, the same prompt before both."""
        pair = self.pairs[i]
        return tuple((np.array(pair.prompt + ids), np.array([False] * len(pair.prompt) + mask))
                     for ids, mask in ((pair.chosen, pair.chosen_mask), (pair.rejected, pair.rejected_mask)))

    @property
    def fingerprint(self) -> str:
        """Stands for the ids of all pairs."""
        return hashlib.sha256(json.dumps(self.pairs).encode("ascii")).hexdigest()


def pair_logps(model: Transformer, inputs: Tensor, targets: Tensor, documents: Tensor,
               sides: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities in nats, numbers of tokens) of both answers of the pairs of a batch, (P, 2) each."""
    logps = token_logps(model, inputs, targets, Mask(documents=documents))
    owner = documents[targets != IGNORE] - 1
    sums, lengths = summed(logps, owner, len(sides), inputs.size(1))
    by_side = sides.argsort()  # documents lie as they were packed
    return sums[by_side].view(-1, 2), lengths[by_side].view(-1, 2)


# ------------------------------------------------------------------------------------------------------------
# 3. The loss of a batch, and what is watched


def preference_loss(model: Transformer, batch: tuple[Tensor, ...], settings,
                    reference: Transformer | None = None) -> tuple[Tensor, Tensor, dict]:
    """(sum of the pairs' losses, how many they are, figures for the log); batch: of Pairs.

    Where the reference comes from, settings.reference says: "stored" (in the batch), "adapter" (the model
    without its adapter), or "model" (`reference`). nll_weight adds the chosen answer's negative
    log-likelihood a token (Pang et al. 2024, Eq. 2; Llama 3.1: 0.2).
    """
    *packed, stored = batch
    policy, lengths = pair_logps(model, *packed)  # (P, 2)
    with torch.no_grad():
        if settings.reference == "adapter":
            with adapter_off(model):
                stored, _ = pair_logps(model, *packed)
        elif settings.reference == "model":
            stored, _ = inside(reference, pair_logps, *packed)
    losses, *rewards = dpo_loss(*policy.unbind(1), *stored.unbind(1), settings.beta, settings.label_smoothing,
                                settings.kind, chosen_lengths=lengths[:, 0].clamp(min=1),
                                rejected_lengths=lengths[:, 1].clamp(min=1), gamma=settings.gamma)
    if settings.nll_weight:
        losses = losses - settings.nll_weight * policy[:, 0] / lengths[:, 0].clamp(min=1)
    known = None if settings.reference is None else stored
    return losses.sum(), torch.tensor(len(stored)), figures(policy.detach(), known, lengths, *rewards)


def figures(policy: Tensor, reference: Tensor | None, lengths: Tensor, chosen: Tensor,
            rejected: Tensor) -> dict:
    """{name: (sum, count)} for the log; the last two of a pair need a reference.

    accuracy: share of pairs whose chosen reward is the higher one. log_gradient_ratio: with x = pi / pi_ref
    of an answer, the loss's gradient by x_chosen is x_rejected / x_chosen times that by x_rejected (Feng et
    al. 2024, https://arxiv.org/abs/2404.04626, section 3): its logarithm, 0 at the start. The further it
    falls, the more is learnt by making the rejected one unlikely, and the less by making the chosen one
    likely.
    """
    pairs = torch.tensor(len(policy))
    values = {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected,
              "accuracy": (chosen > rejected).float()}
    if reference is not None:
        ratios = policy - reference
        values |= {"log_gradient_ratio": ratios[:, 1] - ratios[:, 0],
                   "chosen_below_reference": (ratios[:, 0] < 0).float()}
    by_token = {f"{side}_logp_nats_per_token": (policy[:, i].sum(), lengths[:, i].sum())
                for i, side in enumerate(("chosen", "rejected"))}
    return {name: (value.sum(), pairs) for name, value in values.items()} | by_token


# ------------------------------------------------------------------------------------------------------------
# 4. The reference


def frozen(model: Transformer, env: Env) -> Transformer:
    """A second model, only to be read: cut over the processes where the first one is, else whole on each."""
    model.requires_grad_(False).eval()
    compute = env.compute
    if env.mesh is None or compute.data_parallel == "ddp" and compute.tensor_parallel == 1:
        return model.to(env.device)
    return parallelize(model, env)


@torch.no_grad()
def reference_logps(model: Transformer, batches: Pairs, env: Env) -> Tensor:
    """(N, 2): the log-probabilities of all answers of `batches` under the model, equal on every process."""
    found = torch.zeros(len(batches.pairs), 2, dtype=torch.float64)
    for step in tqdm(range(batches.steps), desc="reference", unit="batch", leave=False, disable=env.rank > 0):
        *packed, _ = env.to_device(batches.in_order(step))
        with env.autocast(), torch.compiler.set_stance("force_eager"):
            logps, _ = inside(model, pair_logps, *packed)
        first = batches.numbers(step).start
        found[first:first + len(logps)] = logps.double().cpu()
    if env.world_size > 1:
        dist.all_reduce(found, group=env.patient)
    return (found / env.compute.tensor_parallel).float()


def stored_reference(model: Callable[[], Transformer], splits: dict[str, Pairs], path: Path, identity: dict,
                     env: Env):
    """Give each split its reference: read from `path`, or computed once by model() and written there.

    identity: {"model", "pairs", …}: what the values belong to. Raises UserError where the file belongs to
    other pairs, or to other weights.
    """
    if env.any(path.exists(), patient=True):
        values = read_reference(path, splits, identity)
    else:
        reference = model()
        values = {split: reference_logps(reference, batches, env) for split, batches in splits.items()}
        env.first(lambda: write_reference(path, values, identity), patient=True)
        env.say(f"the reference's log-probabilities: {path}")
    for split, batches in splits.items():
        batches.reference = values[split]


def read_reference(path: Path, splits: dict[str, Pairs], identity: dict) -> dict[str, Tensor]:
    anew = "delete it, and the same command makes them anew"
    try:
        known, values = read_header(path)[1], read_tensors(path)
    except UserError as error:
        raise UserError(f"{error}: the reference's log-probabilities; {anew}") from None
    for what, wanted in identity.items():
        if not isinstance(known, dict) or known.get(what) != wanted:
            raise UserError(f"{path} holds the reference's log-probabilities with other {what} than these; "
                            f"{anew}")
    for split, batches in splits.items():
        found = values.get(split, torch.empty(0))
        if found.shape != batches.reference.shape or found.dtype != torch.float32 \
                or not found.isfinite().all():
            raise UserError(f"{path} is damaged: no two log-probabilities for each pair of {split}; {anew}")
    return values


def write_reference(path: Path, values: dict[str, Tensor], identity: dict):
    """Write it whole, even where several runs on the same pairs begin at once: each by a name of its own."""
    own = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write_tensors(own, values, identity)
    os.replace(own, path)


# ------------------------------------------------------------------------------------------------------------
# 5. Before and after


@torch.no_grad()
def divergence(policy_samples: Sequence[Sequence[dict]], reference: Transformer,
               device) -> tuple[float, float]:
    """(KL(policy | reference) in nats an answer, its standard error), from the policy's own samples: k1."""
    flat = [sample for samples in policy_samples for sample in samples]
    differences = []
    for start in tqdm(range(0, len(flat), 64), desc="KL", unit="batch", leave=False, disable=None):
        rows = flat[start:start + 64]
        width = max(len(row["prompt"]) + len(row["ids"]) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            whole = row["prompt"] + row["ids"]
            ids[i, :len(whole)], mask[i, len(row["prompt"]):len(whole)] = torch.tensor(whole), True
        logps = sequence_logps(reference, ids.to(device), mask.to(device)).tolist()
        differences += [row["logp"] - logp for row, logp in zip(rows, logps)]
    return float(np.mean(differences)), float(np.std(differences) / len(differences) ** 0.5)


HELD_OUT = {"loss_nats_per_pair": "loss, nats a pair", "accuracy": "pairs whose chosen reward is higher",
            "margin": "margin of the rewards", "chosen_reward": "reward of the chosen",
            "rejected_reward": "reward of the rejected",
            "chosen_logp_nats_per_token": "log-probability of the chosen, a token",
            "rejected_logp_nats_per_token": "log-probability of the rejected, a token",
            "chosen_below_reference": "chosen that became less likely",
            "log_gradient_ratio": "log of the gradients' ratio, chosen : rejected"}


def compare(before: dict, last: dict, asked: Sequence[dict], settings, env: Env):
    """Print the table of before and after and a few answers; write results.json and rewards.svg."""
    out = Path(settings.out)
    model, tokenizer = open_model(out, env.device)
    after = rejection.measure(model, tokenizer, asked, settings)
    before["loss_nats_per_pair"] = before["loss"]
    rows = {label: (before[name], last[f"val_{name}"], "") for name, label in HELD_OUT.items()
            if None not in (before.get(name), last.get(f"val_{name}"))}
    old, new = rejection.qualities(asked, before), rejection.qualities(asked, after)
    for name in old:
        rows[name] = (np.mean(old[name]), np.mean(new[name]), rejection.in_words(old[name], new[name]))
    if after["sampled"]:
        start, _ = open_model(settings.init_from, env.device)
        kl, error = divergence(after["sampled"], start, env.device)
        rows["KL from the start, nats an answer"] = (0.0, kl, f"+- {error:.2f}")
    print(f"{'held out':<48}{'before':>10}{'after':>10}")
    for label, (one, other, note) in rows.items():
        print(f"{label:<48}{one:>10.4f}{other:>10.4f}  {note}".rstrip())
    results = {label: {"before": float(one), "after": float(other), "note": note}
               for label, (one, other, note) in rows.items()}
    results["each question"] = {name: {"before": old[name], "after": new[name]} for name in old}
    write_results(out, results | {"samples": sft.side_by_side(asked, before["greedy"], after["greedy"])})
    lines = read_log(out)
    curves = {label: [(line["step"], line[name]) for line in lines if line[name] is not None] for name, label
              in {"margin": "margin", "chosen_reward": "chosen", "rejected_reward": "rejected"}.items()}
    with open_whole(out / "rewards.svg", "w") as file:
        file.write(line_chart("Rewards in training: what is learnt is their difference", "step",
                              "nats x beta", curves))
    print(f"{'-' * 80}\n{spent(out, last)}\nmodel: {out}; curves: {out / 'rewards.svg'}")


# ------------------------------------------------------------------------------------------------------------
# 6. The command


@dataclass
class Settings(Loop, Adapter, Sampling):
    init_from: str = "runs/sft"  # model folder to begin with, which knows conversations: sft.py makes such
    data: str = "runs/pairs"  # preferences: a file, or a folder with train.jsonl and val.jsonl; the default
                              # folder is made if missing
    out: str = "runs/dpo"  # run folder; an unfinished run goes on
    overwrite: bool = False  # delete what is in `out` (with --make_pairs: in `data`) and start anew
    make_pairs: bool = False  # only make the pairs, into `data`
    rounds: int = 0  # so many times: sample, SFT on the best, DPO on pairs; each in a folder below `out`
    sft_lr: float = 0.002  # peak rates of the SFT in rounds: of the matrices in blocks
    sft_adam_lr: float = 4e-4  # … and of the others
    on_bad_line: Literal["stop", "skip"] = "stop"  # a line that is no pair: stop, or skip and count
    val_share: float = 0.05  # of a single file of pairs, held out
    template: Literal["chatml", "llama3", "qwen", "qwen3"] = "chatml"  # how a conversation is written

    kind: Literal[KINDS] = "sigmoid"  # the loss; the equations stand in dpo_loss
    beta: float = 0.1  # how dearly moving away from the reference is paid for (simpo: 2 to 10)
    label_smoothing: float = 0.0  # share of the pairs taken to be the wrong way round
    gamma: float | None = None  # simpo: the margin, 0.5; dpop: lambda, 50
    nll_weight: float = 0.0  # of the chosen answer's negative log-likelihood a token, beside the loss
    reference: Literal["stored", "adapter", "model"] | None = None  # computed once and stored beside the
        # data; the model without its adapter; a second model. none: as fits (adapter, where there is one;
        # simpo and orpo have no reference)
    reference_model: str | None = None  # its folder; none: init_from

    epochs: float = 1.0  # how often each pair is seen
    steps: int | None = None  # updates; none: as many as the epochs take
    seq_len: int = 256  # tokens of a window; a longer prompt loses its beginning
    batch_size: int = 32  # pairs a step
    lr: float = 2e-3  # peak learning rate of the matrices in blocks; small, the weights are already good
    adam_lr: float = 4e-4  # of embedding, head and norms
    lora_lr: float = 3e-4  # adapters' peak learning rate, in place of --lr
    questions: int = 200  # held-out questions to answer before and after; 0: none
    repetition_penalty: float = 1.15  # of those answers, as in sft.py
    samples_of_questions: int = 4  # answers at temperature 1 to each, beside the greedy one

    free = {"val_share", "on_bad_line", "make_pairs", "questions", "repetition_penalty",
            "samples_of_questions", "rounds", "sft_lr", "sft_adam_lr",
            *Sampling.__dataclass_fields__}  # as train.FREE

    def __post_init__(self):
        require(self, epochs=(0.001, 1000), beta=(1e-6, 1e6), label_smoothing=(0, 0.499), nll_weight=(0, 1e3),
                gamma=(0, 1e6), questions=(0, None), val_share=(0.001, 0.5), repetition_penalty=(1, 1000),
                rounds=(0, 1000), samples_of_questions=(0, None), sft_lr=(0, 10), sft_adam_lr=(0, 10))
        self.check_sampling()
        self.check_loop()
        self.check_adapter()
        self.check_val_share()
        self.check_loss()
        self.check_reference()
        if self.rounds:
            self.check_rounds()

    def check_loss(self):
        """Raise UserError where something is asked for that would do nothing."""
        if self.label_smoothing and self.kind not in WITH_SMOOTHING:
            raise UserError(f"--label_smoothing {self.label_smoothing} is for --kind "
                            f"{', '.join(WITH_SMOOTHING)}, not for {self.kind}; leave it out")
        if self.gamma is not None and self.kind not in WITH_GAMMA:
            raise UserError(f"--gamma {self.gamma} is for --kind {', '.join(WITH_GAMMA)}, not for "
                            f"{self.kind}; leave it out")
        if self.nll_weight and self.kind == "orpo":
            raise UserError(f"--nll_weight {self.nll_weight}: --kind orpo has the chosen answer's likelihood "
                            f"in itself; leave it out")
        refuse(self, "is not possible here: logits of all tokens are never held", "chunked_loss")

    def check_reference(self):
        """Choose where the reference comes from, if that is not said; UserError where it cannot."""
        if self.reference == "adapter" and not self.lora_rank:
            raise UserError("--reference adapter is the model without its adapter, and there is none; pass "
                            "--lora_rank 8, or --reference stored")
        if self.reference_model and self.reference == "adapter":
            raise UserError(f"--reference adapter is the model itself, not --reference_model "
                            f"{self.reference_model}; leave one of them out")
        needless = self.kind in WITHOUT_REFERENCE
        if needless and (self.reference or self.reference_model):
            name = "reference" if self.reference else "reference_model"
            raise UserError(f"--kind {self.kind} has no reference; leave --{name} out")
        own = "adapter" if self.lora_rank and not self.reference_model else "stored"
        self.reference = None if needless else self.reference or own

    def check_rounds(self):
        """Raise UserError where rounds go together with what would do nothing in them, or stop them."""
        if self.make_pairs:
            raise UserError(f"--rounds {self.rounds} makes its pairs itself; leave --make_pairs out")
        if self.data != type(self).data:
            raise UserError(f"--rounds {self.rounds} makes pairs for each round, and would not look at "
                            f"--data {self.data}; leave one of them out")
        if not self.lora_merge:
            raise UserError("--no-lora_merge: a round begins at the merged model of the last; leave it out")


def main():
    settings = parse(Settings)
    guarded(settings, make_only if settings.make_pairs else in_rounds if settings.rounds else prefer)


def in_rounds(settings: Settings, env: Env):
    """Sample, select, SFT on the best, DPO on the pairs, and again from there (Llama Team 2024, section 4.1).

    Each round's folder below --out stays: pairs, sft, dpo. What is done is passed over, what is begun goes
    on.
    """
    require_model(settings)
    require_weights(settings)
    prepare_prompts(settings, env)
    model, out = settings.init_from, Path(settings.out)
    with contextlib.ExitStack() as stack:
        out.mkdir(parents=True, exist_ok=True)
        env.first(lambda: stack.enter_context(alone(out)))  # all the while, not only while a part is at work
        for number in range(1, settings.rounds + 1):
            place = out / f"round_{number}"
            env.say(f"round {number} of {settings.rounds}, from {model}: {place}")
            this = replace(settings, rounds=0, seed=(settings.seed + number - 1) % 2 ** 63,
                           data=str(place / "pairs"), init_from=str(place / "sft"), out=str(place / "dpo"))
            make_pairs(this, model, place / "pairs", env, settings.overwrite)
            sft.fine_tune(settings_of_sft(this, str(model), place), env)
            prefer(this, env)
            model = this.out


def settings_of_sft(settings: Settings, model: str, place: Path) -> sft.Settings:
    """Of the SFT on the best answers in a round's place, beginning at the model."""
    inherited = fields(Compute) + (fields(Adapter) if settings.lora_rank else ())
    rates = {} if settings.lora_rank else {"lr": settings.sft_lr}
    return sft.Settings(
        init_from=model, data=str(place / "pairs" / "best"), out=str(place / "sft"), seed=settings.seed,
        template=settings.template, seq_len=settings.seq_len, adam_lr=settings.sft_adam_lr, epochs=1.0,
        questions=0, overwrite=settings.overwrite, **rates,
        **{field.name: getattr(settings, field.name) for field in inherited})


def make_only(settings: Settings, env: Env):
    """The folder of pairs of --data, from the model to begin with."""
    require_model(settings)
    prepare_prompts(settings, env)
    make_pairs(settings, settings.init_from, settings.data, env, settings.overwrite and settings.make_pairs)


def require_weights(settings: Settings):
    """Raise UserError where the model to train is an adapter alone, whose base lies elsewhere."""
    whole = Path(settings.init_from)
    adapter = next((place for place in (whole, whole / "adapter") if (place / CONFIG).is_file()), None)
    if adapter and not list(whole.glob("model*.safetensors")):
        raise UserError(f"{whole} holds an adapter alone, without the model; merge it first: python lora.py "
                        f"merge --base F --adapter {adapter.as_posix()} --out F")


def require_model(settings: Settings):
    if settings.init_from == Settings.init_from and not Path(settings.init_from).exists():
        raise UserError(f"there is no {settings.init_from}, the model to begin with; make it with: python "
                        f"sft.py, or name one with --init_from")


def prepare_prompts(settings: Settings, env: Env):
    """Make the default conversations if they are missing."""
    chat = sft.Settings.data
    if settings.prompts_data == chat:
        env.first(lambda: Path(chat).exists() or sft.make_data(sft.Settings()), patient=True)


def prefer(settings: Settings, env: Env) -> None:
    """The stage on one process: refuse what is wrong, make what is missing, train, compare."""
    require_model(settings)
    require_weights(settings)
    if settings.data == Settings.data and not Path(settings.data, "made.json").exists():
        make_only(settings, env)
    model, tokenizer = load_base(settings.init_from, settings.quantize)
    check_tokenizer(tokenizer, settings.init_from, settings.template)
    check_length(settings, model, settings.init_from)
    splits = pack(settings, read_splits(settings, tokenizer, env), env)
    settings.steps = steps_of(settings, splits["train"].windows, env)
    asked = rejection.questions(settings)
    rejection.question_ids(asked, model, tokenizer, settings)  # one without room for an answer is told of now
    env.say(add_adapter(model, settings))
    with in_run_folder(settings, env):  # last of all that can refuse: --overwrite deletes here
        model.to(env.device)
        reference = prepare_reference(settings, model, tokenizer, splits, env)
        loss_fn = functools.partial(preference_loss, settings=settings, reference=reference)
        before = evaluate(model, splits["val"], loss_fn, env)
        env.first(lambda: before.update(rejection.measure(model, tokenizer, asked, settings)), patient=True)
        last = train(model, splits["train"], loss_fn, settings, env, tokenizer, splits["val"],
                     identity(settings, splits) | {"base": base_of(model).get("sha256")})
        env.first(lambda: compare(before, last, asked, settings, env), patient=True)


def check_length(settings, model, name: str, tokens: int | None = None):
    """Raise UserError where the model, which `name` stands for, reads less than a window, or so many tokens.
    """
    if (tokens or settings.seq_len) > model.config.max_seq_len:
        raise UserError(f"seq_len {settings.seq_len} exceeds max_seq_len {model.config.max_seq_len} of "
                        f"{name}; pass a shorter --seq_len")


def read_splits(settings, tokenizer: Tokenizer, env: Env,
                seq_len: int | None = None) -> dict[str, list[tuple[dict, Pair]]]:
    """{"train", "val"}: the pairs of --data as they are and as ids; of a single file a share drawn by lot is
    held out. seq_len: of the windows, default settings.seq_len.
    """
    place = Path(settings.data)
    files = [place / f"{split}.jsonl" for split in SPLITS] if place.is_dir() else [place]
    encoded = []
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no {file}; --data is a file of preferences, or a folder with "
                            f"train.jsonl and val.jsonl (python dpo.py --make_pairs)")
        with contextlib.redirect_stdout(None) if env.rank else contextlib.nullcontext():
            pairs = list(read_preferences(file, settings.on_bad_line))
            encoded.append(list(zip(*encode_pairs(pairs, tokenizer, TEMPLATES[settings.template],
                                                  seq_len or settings.seq_len, settings.on_bad_line))))
    if len(encoded) == 1:
        encoded = sft.held_out(encoded[0], settings.val_share, place)
    return dict(zip(SPLITS, encoded))


def pack(settings, pairs: dict[str, list[tuple[dict, Pair]]], env: Env) -> dict[str, Pairs]:
    place = {"rank": env.data_rank, "world_size": env.data_world_size}
    splits = {split: Pairs([ids for _, ids in some], micro_batch(settings, env), settings.seq_len,
                           settings.seed, **place) for split, some in pairs.items()}
    for split, batches in splits.items():
        env.say(f"{split}: {batches.windows:,} pairs of {batches.window_tokens:.0f} tokens")
    return splits


def prepare_reference(settings: Settings, model: Transformer, tokenizer: Tokenizer, splits: dict[str, Pairs],
                      env: Env) -> Transformer | None:
    """Have the splits' reference stored, or return the second model where it is to be one."""
    if settings.reference in (None, "adapter"):
        return None
    folder = settings.reference_model or settings.init_from

    def second() -> Transformer:
        other, own = open_model(folder, env.device)
        if own is None or own.fingerprint != tokenizer.fingerprint:
            raise UserError(f"the reference {folder} has another tokenizer than {settings.init_from}: their "
                            f"log-probabilities are of other tokens; choose another --reference_model")
        check_length(settings, other, f"the reference {folder}")
        return frozen(other, env)
    if settings.reference == "model":
        return second()
    weights = rejection.weights_of(folder)
    place = Path(settings.data)
    name = f"reference-{weights[:8]}.safetensors"
    path = place / name if place.is_dir() else place.with_name(f"{place.name}.{name}")
    known = {"model": weights, "precision": env.precision, "quantize": str(settings.quantize),
             "pairs": fingerprint([splits[split].fingerprint for split in SPLITS])}
    # before its first step the policy is its own reference: no second model is read
    stored_reference(second if settings.reference_model else model.eval, splits, path, known, env)
    return None


def identity(settings: Settings, splits: dict[str, Pairs]) -> dict:
    """Of what a run is made beside its settings: an unfinished one goes on only where this is equal."""
    return {"pairs": splits["train"].fingerprint, "init_from": str(Path(settings.init_from).resolve())}


if __name__ == "__main__":
    run(main)
