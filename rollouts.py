"""Rollouts: the replies that a policy draws to prompts, laid out so that they can be scored and learnt.

    rollout = roll_out(policy, prompts, tokenizer, stop_id, samples=8, max_new_tokens=64)
    packed = lay_out(rollout, rows, seq_len)     # some of its rows, prompt and reply, in few windows
    logps, _, _ = read_replies(policy, *packed)  # (B, R): of each reply's tokens, 0 behind its end

What stands beside each token of a reply (log-probability, value, reward, advantage) lies in a grid (B, R):
row b is reply b, column t its token t. That token's log-probability and value come from position
prompt_len - 1 + t, where the model has read all before it and not yet itself.
"""
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from attention import Mask
from batches import IGNORE
from bpe import Tokenizer
from lora import effective_weight
from model import Transformer
from objectives import logps_of_hidden
from parallel import Env
from rejection import sample_replies
from rewards import Reply, Rewards
from sft import best_fit


@dataclass
class Rollout:
    prompts: list[list[int]]  # B lists of ids, each prompt as often as it is answered
    replies: list[list[int]]  # B lists of ids, the end token included
    texts: list[str]  # the replies without it
    ended: Tensor  # (B,) bool: whether it was drawn, or the reply was cut off

    def __len__(self) -> int:
        return len(self.replies)

    @property
    def said(self) -> list[Reply]:
        """The replies as rewards read them."""
        return [Reply(text, bool(ended), len(reply))
                for text, ended, reply in zip(self.texts, self.ended, self.replies)]

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens of each reply."""
        return torch.tensor([len(reply) for reply in self.replies])

    @property
    def mask(self) -> Tensor:
        """(B, R) bool: True on the tokens of replies; R: of the longest."""
        return torch.arange(int(self.lengths.max())) < self.lengths[:, None]


def roll_out(policy: Transformer, prompts: Sequence[list[int]], tokenizer: Tokenizer, stop_id: int,
             samples: int, max_new_tokens: int, temperature: float = 1.0,
             generator: torch.Generator | None = None, at_once: int = 32, progress: bool = False) -> Rollout:
    """`samples` replies to each prompt, those of one prompt side by side. at_once: prompts read together.

    Drawn from the whole distribution at this temperature: with top-k or top-p what is scored later would not
    be what was drawn from, and the KL divergence could come out negative.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like with like: less padding
    found: list[list[dict]] = [[]] * len(prompts)
    for start in tqdm(range(0, len(order), at_once), "roll out", unit="batch", leave=False,
                      disable=not progress or None):
        some = order[start:start + at_once]
        replies = sample_replies(policy, [prompts[i] for i in some], tokenizer, stop_id, samples,
                                 max_new_tokens, temperature, generator)
        for i, replies_of_one in zip(some, replies):
            found[i] = replies_of_one
    flat = [reply for replies in found for reply in replies]
    return Rollout([prompt for prompt in prompts for _ in range(samples)], [reply["ids"] for reply in flat],
                   [reply["text"] for reply in flat], torch.tensor([reply["ended"] for reply in flat]))


def answered(model: Transformer, prompts: Sequence[list[int]], questions: Sequence[dict], rewards: Rewards,
             tokenizer: Tokenizer, stop_id: int, samples: int, max_new_tokens: int, temperature: float = 1.0,
             seed: int = 0, at_once: int = 32) -> tuple[dict[str, list[float]], list[tuple[str, bool]]]:
    """({"sampled: …", "greedy: …": a figure for each question}, the greedy replies and whether they ended).

    Of the `samples` replies to a question it is their mean. …: reward, each part of it, ended, length.
    """
    found = {}
    for how, number, heat in (("sampled", samples, temperature), ("greedy", 1, 0.0)):
        generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
        rollout = roll_out(model.eval(), prompts, tokenizer, stop_id, number, max_new_tokens, heat, generator,
                           at_once, progress=True)
        repeated = [question for question in questions for _ in range(number)]
        totals, parts = rewards(repeated, rollout.said, (rollout.prompts, rollout.replies))
        figures = {"reward": totals, **parts, "ended": rollout.ended.float(),
                   "length": rollout.lengths.float()}
        found |= {f"{how}: {name}": value.view(-1, number).mean(dim=1).tolist()
                  for name, value in figures.items()}
    return found, list(zip(rollout.texts, rollout.ended.tolist()))  # the last rollout is the greedy one


# ---- who draws ---------------------------------------------------------------------------------------------


def whole_copy(model: Transformer, env: Env) -> Transformer:
    """What will draw replies: the model, or, made before it is cut, a whole copy on this process."""
    if env.compute.data_parallel == "ddp":
        return model
    return copy.deepcopy(model).to(env.device).requires_grad_(False)


@torch.no_grad()
def bring_up_to_date(sampler: Transformer, policy: Transformer):
    """Gather the policy's weights from all processes into the sampler, a tensor at a time."""
    if sampler is policy:
        return
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    for name, p in sampler.named_parameters():
        if name in trained:
            whole = trained[name]
            p.copy_(whole.full_tensor() if isinstance(whole, DTensor) else whole)


def drawn_now(policy: Transformer, sampler: Transformer, env: Env, *arguments, **options) -> Rollout:
    """roll_out of the policy as it is now, by the sampler, without dropout, which is then as it was.

    arguments, options: those of roll_out behind the model.
    """
    bring_up_to_date(sampler, policy)
    training = sampler.training
    sampler.eval()
    with env.autocast(), torch.compiler.set_stance("force_eager"):
        rollout = roll_out(sampler, *arguments, **options)
    sampler.train(training)
    return rollout


# ---- in windows, for one pass ------------------------------------------------------------------------------


def lay_out(rollout: Rollout, rows: Sequence[int], seq_len: int) -> tuple[Tensor, ...]:
    """(inputs, targets, documents, place, mask) of some rows of a rollout: what `read_replies` reads.

    Prompt and reply of each row are packed with others into W windows of at most seq_len tokens
    (sft.best_fit), where none sees another: little padding is computed, and what stands in it reaches nobody.

    inputs, targets, documents: (W, T) as of sft.Packed. place (N,): for each target, in the order in which
    they stand, where its figures go in the grid of these rows, b R + t. mask (len(rows), R): of that grid.
    """
    texts = [rollout.prompts[row] + rollout.replies[row] for row in rows]
    packs = best_fit([len(ids) - 1 for ids in texts], seq_len)
    width = max(sum(len(texts[i]) - 1 for i in pack) for pack in packs)
    mask, inputs = rollout.mask[list(rows)], np.zeros((len(packs), width), dtype=np.int64)
    targets, documents, place = np.full_like(inputs, IGNORE), np.zeros_like(inputs), []
    for window, pack in enumerate(packs):
        start = 0
        for number, i in enumerate(pack, start=1):
            ids, reply = texts[i], rollout.replies[rows[i]]
            end = start + len(ids) - 1
            inputs[window, start:end] = ids[:-1]
            targets[window, end - len(reply):end] = reply
            documents[window, start:end] = number
            place.extend(range(i * mask.size(1), i * mask.size(1) + len(reply)))
            start = end
    return *map(torch.from_numpy, (inputs, targets, documents)), torch.tensor(place), mask


def in_grid(values: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """values (N,) at their places in a grid of the mask's shape (B, R), zeros elsewhere."""
    return values.new_zeros(mask.numel()).index_put((place,), values).view(mask.shape)


def read_replies(model: Transformer, inputs: Tensor, targets: Tensor, documents: Tensor, place: Tensor,
                 mask: Tensor, temperature: float = 1.0, entropy: bool = False,
                 head: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor | None, ...]:
    """(log-probabilities, entropies, values) of the replies' tokens, (B, R) each, in one pass; nats.

    temperature: that at which they were drawn. entropy: of the distribution each token was drawn from; else
    None. head: (N, C) -> (N, 1), where policy and critic share their trunk; else None.
    """
    valid = targets != IGNORE
    hidden = model.model(inputs, mask=Mask(documents=documents))[valid]  # (W, T, C) -> (N, C)
    logps = in_grid(logps_of_hidden(model, hidden / temperature, targets[valid]), place, mask)
    entropies = in_grid(entropies_of(model, hidden / temperature), place, mask) if entropy else None
    return logps, entropies, None if head is None else in_grid(head(hidden)[:, 0].float(), place, mask)


def entropies_of(model: Transformer, hidden: Tensor, rows: int = 512) -> Tensor:
    """Entropy in nats of the next token's distribution after each row of hidden (N, C): (N,).

    A few rows' logits at a time; the backward pass computes them once more.
    """
    def of_rows(part: Tensor, weight: Tensor) -> Tensor:
        logps = F.linear(part, weight).float().log_softmax(dim=-1)
        return -(logps.exp() * logps).sum(dim=-1)
    weight = effective_weight(model.lm_head)
    return torch.cat([checkpoint(of_rows, part, weight, use_reentrant=False) for part in hidden.split(rows)])


def reply_values(critic: torch.nn.Module, inputs: Tensor, targets: Tensor, documents: Tensor, place: Tensor,
                 mask: Tensor) -> Tensor:
    """(B, R) values before each token of the replies, by a critic that gives (W, T)."""
    return in_grid(critic(inputs, mask=Mask(documents=documents))[targets != IGNORE].float(), place, mask)
