"""Generation: one token at a time, drawn from what the model says of the next.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import KVCache
from config import UserError

if TYPE_CHECKING:  # model.py stands above this file
    from model import Transformer


@dataclass
class Generation:
    ids: Tensor  # (B, R) the new tokens only; after a row's stop token: that stop token again
    lengths: Tensor  # (B,) how many of them count, the stop token included
    logps: Tensor  # (B, R) log-probability in nats, in the distribution drawn from; 0 after the stop


def next_token_logps(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The log-probabilities (B, V) to sample from, in float32. Temperature 0: all on the likeliest token."""
    logits = logits.float()
    if temperature < 1e-6:  # 0, or so close that dividing by it would overflow
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        best = logits.topk(top_k, dim=-1)  # by index, not by value: equal logits must not let in more
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    if top_p is not None and top_p < 1:  # the fewest tokens whose mass reaches p (Holtzman et al. 2020)
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        outside = probs.cumsum(dim=-1) - probs >= top_p  # the mass before this token is enough already
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -math.inf)
    return logits.log_softmax(dim=-1)


@torch.no_grad()
def generate_stream(model: "Transformer", ids: Tensor | Sequence[Sequence[int]], max_new_tokens: int,
                    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                    generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, for each new position, the tokens (B,) and their log-probabilities (B,); see `generate`."""
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens} is out of range; it must be at least 1")
    device = next(model.parameters()).device
    prompts = [torch.as_tensor(prompt, dtype=torch.long) for prompt in ids]
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise UserError("an empty prompt gives nothing to continue; begin with the end-of-text token")
    B, T = len(prompts), max(len(prompt) for prompt in prompts)
    if T + max_new_tokens > model.config.max_seq_len:
        raise UserError(f"{T} prompt tokens and {max_new_tokens} new ones exceed max_seq_len "
                        f"{model.config.max_seq_len} of this model; shorten the prompt or ask for fewer")
    ids, mask = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.bool)
    for row, prompt in enumerate(prompts):  # padded on the left: every row's next token is the last column
        ids[row, T - len(prompt):], mask[row, T - len(prompt):] = prompt, True
    ids, mask = ids.to(device), None if bool(mask.all()) else mask.to(device)
    cache = KVCache(model.config, B, T + max_new_tokens, next(model.parameters()).dtype, device)
    for _ in range(max_new_tokens):
        hidden = model.model(ids, mask=mask, cache=cache)[:, -1]  # (B, T, C) -> (B, C): the last alone counts
        logps = next_token_logps(model.lm_head(hidden), temperature, top_k, top_p)
        token = torch.multinomial(logps.exp(), 1, generator=generator)  # (B, 1)
        yield token[:, 0], logps.gather(1, token)[:, 0]
        ids = token
        if mask is not None:
            mask = F.pad(mask, (0, 1), value=True)


def generate(model: "Transformer", ids: Tensor | Sequence[Sequence[int]], max_new_tokens: int,
             temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
             stop_ids: Sequence[int] = (),
             generator: torch.Generator | None = None) -> Generation:
    """Continue each prompt by up to max_new_tokens.

    ids: (B, T), or a list of B prompts of unequal lengths (the model sees no padding). temperature: 0 is
    greedy.
    top_k, top_p: keep the k likeliest tokens; then the fewest that hold mass p. stop_ids: a row ends when it
    draws one.
    generator: where randomness comes from, on the model's device; the same seed gives the same sample.
    Returns a Generation. Raises UserError where prompt and new tokens exceed the model's max_seq_len.
    """
    tokens, logps = [], []
    stopped = lengths = None
    for token, logp in generate_stream(model, ids, max_new_tokens, temperature, top_k, top_p, generator):
        if stopped is None:
            stopped, lengths = torch.zeros_like(token, dtype=torch.bool), torch.zeros_like(token)
            stops = torch.tensor(list(stop_ids), dtype=torch.long, device=token.device)
        elif stopped.any():
            token, logp = torch.where(stopped, tokens[-1], token), torch.where(stopped, 0.0, logp)
        tokens.append(token)
        logps.append(logp)
        lengths += ~stopped
        stopped = stopped | torch.isin(token, stops)
        if stopped.all():
            break
    return Generation(torch.stack(tokens, dim=1), lengths, torch.stack(logps, dim=1))


def check_sampling(temperature: float, top_k: int | None, top_p: float | None):
    """Raise UserError where a sampling setting is out of its range."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature {temperature} is out of range; 0 is greedy, 1 the model as it is")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k} is out of range; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p} is out of range; it must be above 0 and at most 1")
