"""The formulas of reinforcement on replies: distances, advantages, losses. The loop is in ppo.py.

    advantages, returns = gae(rewards, values, mask)              # a critic says what was to be expected
    advantages = group_advantages(rewards, group_size=8)          # or the other replies to the same prompt do
    loss = policy_loss(logps, old_logps, advantages, mask)        # PPO's clipped surrogate

A grid (B, R) is of B replies and R tokens; a mask of that shape is True on the tokens, from the first to the
last of a reply, and what stands beside them, even nan, changes nothing.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from config import UserError

# ------------------------------------------------------------------------------------------------------------
# 1. The distance from the reference


def kl_estimate(logps: Tensor, reference_logps: Tensor, kind: str = "k1") -> Tensor:
    """KL(policy | reference) in nats, estimated at each token drawn from the policy (Schulman 2020).

    k1 = logp - ref: unbiased, but of either sign. k2 = k1^2 / 2: biased, of low variance. k3 = exp(-k1) - 1
    + k1: unbiased and never negative. As a value added to a reward any of them will do; as a loss their
    gradients differ: on average that of k1 is zero, that of k2 is KL(policy | reference)'s, and that of k3 is
    that of KL(reference | policy) (so GRPO's penalty, which is k3, is not the divergence it is named after).
    """
    k1 = logps - reference_logps
    if kind == "k1":
        return k1
    if kind == "k2":
        return k1.square() / 2
    if kind == "k3":
        return torch.expm1(-k1) + k1
    raise UserError(f"kl kind {kind!r} is none of k1, k2, k3")


def next_coefficient(coefficient: float, kl: float, target: float, horizon: int, replies: int) -> float:
    """The KL's coefficient after a step of so many replies, moved so that the KL is `target` nats a reply.

    By at most 20 % of replies / horizon a step, in proportion to the error (Ziegler et al. 2019, section
    2.2).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * replies / horizon)


# ------------------------------------------------------------------------------------------------------------
# 2. How much better than expected


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0,
        lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of each token, (B, R), 0 outside the mask (Schulman et al. 2016, Eq. 11 to 16).

    rewards (B, R): of each token; values (B, R): what the critic expected before it; mask (B, R): True from
    the first to the last token of a reply, behind which nothing is worth anything.

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; returns = A + V. With lam = 1 and
    gamma = 1, A_t is the sum of rewards from t on, less V_t; with lam = 0 it is delta_t.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages, later, next_value = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = torch.where(mask[:, t], delta + gamma * lam * later, 0.0)
        advantages[:, t], next_value = later, values[:, t]
    return advantages, torch.where(mask, advantages + values, 0.0)


def group_advantages(rewards: Tensor, group_size: int, kind: str = "mean",
                     divide_by_std: bool = True) -> Tensor:
    """How much better each reply is than others of its prompt: (B,), groups of group_size side by side.

    kind "mean": less the group's mean, by its (unbiased) standard deviation + 1e-4 (GRPO; Shao et al. 2024,
    section 4.1.2), or without that (Dr. GRPO; Liu et al. 2025: dividing weighs questions by how even their
    answers are). kind "rloo": less the mean of the others (RLOO; Kool et al. 2019; Ahmadian et al. 2024, Eq.
    6), which is G / (G - 1) times the former, and unbiased. A group of equal rewards teaches nothing: zeros.
    """
    if group_size < 2:
        raise UserError(f"a group of {group_size} has nothing to be compared with; pass --samples 8")
    assert len(rewards) % group_size == 0, (len(rewards), group_size)
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if kind == "rloo":
        centred = centred * group_size / (group_size - 1)
    elif divide_by_std:
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-4)
    return centred.reshape(-1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True,
           over_all: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """values with mean 0 and variance 1 over the tokens, and 0 elsewhere.

    shift_mean=False leaves the mean where it is. The variance is the unbiased one, as TRL's. over_all: adds
    up sums over processes, so that each whitens by the mean and deviation of all.
    """
    kept = torch.where(mask, values, 0.0)
    number, total = over_all(torch.stack([mask.sum().to(values.dtype), kept.sum()]))
    mean = total / number.clamp(min=1)
    squares = over_all(torch.where(mask, values - mean, 0.0).square().sum())
    scale = (squares / (number - 1).clamp(min=1) + 1e-8).rsqrt()
    return torch.where(mask, (values - mean) * scale + (0.0 if shift_mean else mean), 0.0)


# ------------------------------------------------------------------------------------------------------------
# 3. Losses


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens; 0 where there is none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def policy_terms(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float = 0.2,
                 clip_high: float | None = None) -> Tensor:
    """The clipped surrogate of each token, as a loss, (B, R) (Schulman et al. 2017, Eq. 7).

    -min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A) with ratio = pi / pi_old: nothing is gained by going
    further than the clip, but what went too far the wrong way is still pulled back. clip_high: default clip;
    above it, unlikely tokens have more room to grow (DAPO; Yu et al. 2025, Eq. 10).
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return -torch.minimum(ratio * advantages, clipped * advantages)


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2,
                clip_high: float | None = None) -> Tensor:
    """The mean of policy_terms over the tokens: a scalar."""
    return masked_mean(policy_terms(logps, old_logps, advantages, clip, clip_high), mask)


def value_terms(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = 0.2) -> Tensor:
    """Half the squared error of each value, or of it held within `clip` of the old one if that is worse.

    As in OpenAI's baselines [P9]; clip None: the squared error alone.
    """
    errors = (values - returns).square()
    if clip is not None:
        held = old_values + (values - old_values).clamp(-clip, clip)
        errors = torch.maximum(errors, (held - returns).square())
    return errors / 2


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor,
               clip: float | None = 0.2) -> Tensor:
    """The mean of value_terms over the tokens: a scalar."""
    return masked_mean(value_terms(values, old_values, returns, clip), mask)


def summed(terms: Tensor, mask: Tensor, over: str, most: int) -> tuple[Tensor, Tensor]:
    """(sum, count) of a loss's terms (B, R): what over how many is to be averaged.

    over "token": all tokens alike, so that a long reply weighs more (DAPO). "sequence": each reply's mean, so
    that in a long one a token weighs less (GRPO). "constant": replies' sums over `most`, the most tokens that
    one may have: every token alike, whatever else was drawn (Dr. GRPO).
    """
    terms, rows = torch.where(mask, terms, 0.0), torch.tensor(len(mask))
    if over == "token":
        return terms.sum(), mask.sum()
    if over == "sequence":
        return (terms.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum(), rows
    return terms.sum(), rows * most
