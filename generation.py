"""Generation: one token at a time, drawn from what the model says of the next.

    >>> generate(model, [[1, 2, 3], [4]], max_new_tokens=20, temperature=0.8, top_p=0.95).ids  # (2, 20)

The prompt is read in one pass (prefill), which leaves keys and values of every layer in a cache; each new
token then costs a pass over that token alone. Such a pass does two operations with each weight that it reads,
so it takes as long as reading the weights does. Hence two ways of being faster, which leave what is drawn as
it is:

* guesses (Leviathan et al. 2023, Chen et al. 2023): something cheap, a smaller model or a look at what
  followed the same tokens before, guesses the next few; one pass checks them all. See `verify`.
* weights in the order in which such passes read them: see `Packed`.
"""
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import make_cache
from config import UserError

if TYPE_CHECKING:  # model.py stands above this file
    from model import ModelConfig, Transformer


@dataclass
class Generation:
    ids: Tensor  # (B, R) the new tokens only; after a row's stop token: that stop token again
    lengths: Tensor  # (B,) how many of them count, the stop token included
    logps: Tensor  # (B, R) log-probability in nats, in the distribution drawn from; 0 after the stop


# ---- the distribution, and a draw from it ------------------------------------------------------------------


def next_token_logps(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                     top_p: float | None = None, min_p: float | None = None, repetition_penalty: float = 1.0,
                     seen: Tensor | None = None) -> Tensor:
    """The log-probabilities (B, V) to sample from, in float32. Temperature 0: all on the likeliest token.

    The settings are those of `generate`, in the order in which transformers applies them: repetition penalty,
    temperature, top_k, top_p, min_p. seen: (B, V) bool, the tokens to which the penalty applies.
    Raises UserError where a row of logits has no finite maximum.
    """
    logits = logits.float()
    if not logits.amax(dim=-1).isfinite().all():  # where a row holds a NaN, so does its maximum
        raise UserError("the model's logits are not finite numbers; its weights are damaged, or, where it is "
                        "not fp32, their precision has too small a range")
    if seen is not None and repetition_penalty != 1:  # Keskar et al. 2019, section 4.1, but for negative ones
        penalized = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if temperature < 1e-6:  # 0, or so close that dividing by it would overflow
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        best = logits.topk(top_k, dim=-1)  # by index, not by value: equal logits must not let in more
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    if top_p is not None and top_p < 1:
        logits = nucleus(logits, top_p)
    if min_p:  # at least this share of the likeliest token's probability (Nguyen et al. 2024)
        least = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits.log_softmax(dim=-1)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """logits (B, V), -inf but on the fewest tokens whose mass reaches top_p (Holtzman et al. 2020)."""
    V, probs = logits.size(-1), logits.softmax(dim=-1)
    for count in (64, 1024, V):  # to sort all of V takes as long as several layers of a small model
        best, order = probs.topk(min(count, V), dim=-1)
        if (best.sum(dim=-1) >= top_p).all():
            break
    inside = best.cumsum(dim=-1) - best < top_p  # the mass before this token is not enough yet
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, inside)
    return logits.masked_fill(~kept, -math.inf)


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """A token (B,) for each row of probs (B, V), which need not add up to one.

    It is the first at which the sum of probabilities reaches a random share of the whole: one random number a
    row, where torch.multinomial takes V of them. The share is in (0, 1], so that a token of probability 0 is
    never drawn; the sums are in float64, so that no small one is lost in rounding.
    """
    wide = torch.float32 if probs.device.type == "mps" else torch.float64  # (which MPS has not)
    sums = probs.cumsum(dim=-1, dtype=wide)
    share = 1 - torch.rand(len(probs), 1, dtype=wide, device=probs.device, generator=generator)
    return torch.searchsorted(sums, share * sums[:, -1:])[:, 0]


# ---- token by token ----------------------------------------------------------------------------------------


def generate(model: "Transformer", ids: Tensor | Sequence[Sequence[int]], max_new_tokens: int,
             temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
             stop_ids: Sequence[int] = (), generator: torch.Generator | None = None, *,
             min_p: float | None = None, repetition_penalty: float = 1.0, speculate: int = 0,
             draft: "Transformer | None" = None) -> Generation:
    """Continue each prompt by up to max_new_tokens.

    ids: (B, T), or a list of B prompts of unequal lengths (the model sees no padding).
    temperature: what the logits are divided by; 0 is greedy.
    top_k, top_p, min_p: keep the k likeliest tokens; then the fewest that hold mass p; then those that have
    min_p times the probability of the likeliest.
    stop_ids: a row ends when it draws one.
    generator: where randomness comes from, on the model's device; the same seed gives the same sample.
    repetition_penalty: divides the logit of each token that the row holds already, and multiplies a negative
    one.
    speculate: guess so many tokens and check them in one pass, from the same distribution (greedy: the same
    ids); for one prompt only. draft: a smaller model of the same vocabulary, which guesses; without one, the
    guess is what followed the last tokens before.

    Returns a Generation. Raises UserError where a setting or an id is out of range, and where prompt and new
    tokens exceed the model's max_seq_len and it has no sliding window within it.
    On a CPU the weights are in memory twice meanwhile: see `Packed`.
    """
    tokens, logps = [], []
    stopped = lengths = None
    for token, logp in generate_stream(model, ids, max_new_tokens, temperature, top_k, top_p, generator,
                                       min_p=min_p, repetition_penalty=repetition_penalty,
                                       speculate=speculate, draft=draft):
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


@torch.no_grad()
def generate_stream(model: "Transformer", ids: Tensor | Sequence[Sequence[int]], max_new_tokens: int,
                    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                    generator: torch.Generator | None = None, *, min_p: float | None = None,
                    repetition_penalty: float = 1.0, speculate: int = 0,
                    draft: "Transformer | None" = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields, for each new position, the tokens (B,) and their log-probabilities (B,); see `generate`."""
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = [prompt.to(model.lm_head.weight.device) for prompt in check_prompts(model.config, ids)]
    check_length(model.config, max(map(len, prompts)), max_new_tokens)
    check_speculation(model.config, prompts, max_new_tokens, speculate, draft)
    logps_of = functools.partial(next_token_logps, temperature=temperature, top_k=top_k, top_p=top_p,
                                 min_p=min_p, repetition_penalty=repetition_penalty)
    different = list({tuple(prompt.tolist()): prompt for prompt in prompts}.values())
    forward = Forward(model, different, max_new_tokens)
    if speculate == 0:
        yield from one_by_one(forward, prompts, different, max_new_tokens, logps_of, generator)
        return
    propose = functools.partial(guess_again, model.config.vocab_size, {})
    if draft is not None:
        propose = functools.partial(guess_with, Forward(draft, prompts, max_new_tokens), logps_of)
    yield from by_guesses(forward, propose, prompts[0], max_new_tokens, speculate, logps_of, generator)


def one_by_one(forward: "Forward", prompts: list[Tensor], different: list[Tensor], max_new_tokens: int,
               logps_of: Callable, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
    """generate_stream without guesses. logps_of: next_token_logps with its settings.

    different: the prompts, each once. Where several samples of one are asked for, it is read once, and what
    has been read of it is copied.
    """
    B, T = len(different), max(map(len, different))
    ids = prompts[0].new_zeros(B, T)
    real = torch.ones(B, T + max_new_tokens, dtype=torch.bool, device=ids.device)
    for row, prompt in enumerate(different):  # padded on the left: every row's next token is the last column
        ids[row, T - len(prompt):], real[row, :T - len(prompt)] = prompt, False
    padded, seen = not real.all(), None
    for end in range(T, T + max_new_tokens):
        logits = forward(ids, real[:, :end] if padded else None)[:, -1]  # (B, V)
        if len(logits) < len(prompts):
            numbers = {tuple(prompt.tolist()): row for row, prompt in enumerate(different)}
            rows = torch.tensor([numbers[tuple(prompt.tolist())] for prompt in prompts], device=ids.device)
            logits, real = logits[rows], real[rows]
            forward.cache.select(rows)
        if logps_of.keywords["repetition_penalty"] != 1:
            seen = seen.scatter(1, ids, True) if seen is not None else seen_tokens(prompts, logits)
        logps = logps_of(logits, seen=seen)
        token = draw(logps.exp(), generator)
        yield token, logps.gather(1, token[:, None])[:, 0]
        ids = token[:, None]  # (B, 1)


def seen_tokens(texts: Sequence[Tensor], logits: Tensor) -> Tensor:
    """(B, V) bool: True on the tokens of each of the B texts."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, text in zip(seen, texts):
        row[text] = True
    return seen


# ---- guesses, checked in one pass --------------------------------------------------------------------------


def by_guesses(forward: "Forward", propose: Callable, prompt: Tensor, max_new_tokens: int, speculate: int,
               logps_of: Callable, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
    """What one_by_one draws for one prompt, several tokens a pass where guesses prove right.

    propose(text, count, generator) -> guesses (G,), G <= count, and the probabilities (G, V) that each was
    drawn from. Between passes the cache lacks the last token of the text, as it does in one_by_one.
    """
    text, end = prompt, len(prompt) + max_new_tokens
    while len(text) < end:
        guesses, q = propose(text, min(speculate, end - len(text) - 1), generator)
        guessed = torch.cat((text, guesses))
        logits = forward(guessed[None, forward.cache.length:], last=len(guesses) + 1)[0]  # (G + 1, V)
        seen = None
        if logps_of.keywords["repetition_penalty"] != 1:
            seen = seen_tokens([guessed[:i] for i in range(len(text), len(guessed) + 1)], logits)
        logps = logps_of(logits, seen=seen)
        tokens = verify(logps.exp(), q, guesses, generator)
        forward.cache.truncate(len(text) + len(tokens) - 1)
        text = torch.cat((text, tokens))
        yield from zip(tokens[:, None], logps.gather(1, tokens[:, None]))


def verify(p: Tensor, q: Tensor, guesses: Tensor, generator: torch.Generator | None) -> Tensor:
    """The first guesses, as many as hold, and one token more: each is distributed as p says, whatever q is.

    p: (G + 1, V) the model's probabilities of the next token before each guess and after the last; q: (G, V)
    those that guesses (G,) were drawn from. Guess x holds with probability min(1, p(x) / q(x)); for the first
    that does not, a token comes from what p has more than q, max(p - q, 0) (Leviathan et al. 2023, section
    2.3): x itself then comes out with probability min(q(x), p(x)), and the rest of p(x) in this second way.
    """
    share = torch.rand(len(guesses), device=p.device, generator=generator)  # in [0, 1)
    held = share * q.gather(1, guesses[:, None])[:, 0] < p[:-1].gather(1, guesses[:, None])[:, 0]
    number = int(held.long().cumprod(dim=0).sum())
    left = p[number]
    if number < len(guesses):
        more = (p[number] - q[number]).clamp(min=0)
        left = more if more.any() else p[number]  # p == q but for rounding: then p itself is right
    return torch.cat((guesses[:number], draw(left[None], generator)))


def guess_again(vocab_size: int, known: dict, text: Tensor, count: int, generator) -> tuple[Tensor, Tensor]:
    """What followed the last three tokens (else two, else one) where they stood last (Saxena 2023), certain.

    known: n-gram -> where it last ended; kept from call to call, so that a call reads the new tokens only.
    What is copied may run on into the guess itself, so that a loop goes on for as long as is asked.
    """
    tokens = text.tolist()
    for end in range(known.get((), 0) + 1, len(tokens)):  # () ends everywhere, so this is where reading ended
        for n in range(4):
            known[tuple(tokens[max(0, end - n):end])] = end
    for n in (3, 2, 1):
        if (follows := known.get(tuple(tokens[-n:]))) is not None:
            for i in range(count):
                tokens.append(tokens[follows + i])
            break
    guesses = text.new_tensor(tokens[len(text):])
    return guesses, F.one_hot(guesses, vocab_size).float()


def guess_with(forward: "Forward", logps_of: Callable, text: Tensor, count: int,
               generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """What a smaller model draws, with the same settings: the nearer its q to p, the more guesses hold."""
    forward.cache.truncate(min(forward.cache.length, len(text) - 1))  # it has read guesses that did not hold
    q = [torch.zeros(0, forward.model.config.vocab_size, device=text.device)]
    for _ in range(count):
        logits = forward(text[None, forward.cache.length:])[0]  # (1, V)
        q.append(logps_of(logits, seen=seen_tokens([text], logits)).exp())
        text = torch.cat((text, draw(q[-1], generator)))
    return text[len(text) - count:], torch.cat(q)


# ---- the pass itself ---------------------------------------------------------------------------------------


class Forward:
    """forward(ids) -> logits of what follows. ids extend forward.cache, which has room for all to come."""

    def __init__(self, model: "Transformer", prompts: list[Tensor], max_new_tokens: int):
        B, T = len(prompts), max(map(len, prompts))
        weight = model.lm_head.weight
        self.model = model
        self.cache = make_cache(model.config, B, T + max_new_tokens, weight.dtype, weight.device)
        # measured at 30 M parameters: packing takes as long as it saves in 8 steps, or in reading 256 tokens
        pays = max_new_tokens >= 8 or B * T >= 256
        self.packed = Packed(model) if pays else contextlib.nullcontext()

    def __call__(self, ids: Tensor, mask: Tensor | None = None, last: int = 1) -> Tensor:
        """ids (B, T) -> (B, last, V): after the last columns alone, as the head is a large layer."""
        with self.packed:
            return self.model.lm_head(self.model.model(ids, mask=mask, cache=self.cache)[:, -last:])


class Packed:
    """`with Packed(model):` its linear layers multiply by copies of their weights, laid out by oneDNN.

    F.linear hands oneDNN or MKL a matrix in rows, which these read at a fraction of the memory's bandwidth or
    rearrange each time. Arranged once in the order in which the kernel goes through it, the products of 1, 16
    and 512 rows took 0.4 of the time (on two cores with AVX-512; bench.py decoding). Layers with the same
    input become one product. Sums have another order, so results differ in the last bits. The price: the
    weights of these layers are in memory twice, until the object is gone; and packing takes as long as it
    saves in 8 steps. Around many calls of `generate`, a `with` of your own packs once.

    Only plain float32 and bfloat16 nn.Linear on a CPU are replaced, and of at most 4 GiB together; others,
    and all where this torch has no oneDNN, keep their own forward. The copies are of the weights as they are
    now: train, load or deepcopy a model outside. The operators are those that torch.compile uses; they are
    not public, so where they are missing or refuse, all is as without.
    """
    LIMIT = 2 ** 32  # bytes
    SAME_INPUT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")

    def __init__(self, model: nn.Module):
        self.forwards = {}
        layers = {module: None for module in model.modules() if can_be_packed(module)}  # an ordered set
        compiled = any(module._compiled_call_impl is not None for module in model.modules())
        if compiled or sum(layer.weight.nbytes for layer in layers) > self.LIMIT:
            return
        groups = [[getattr(module, name, None) for name in names] for module in model.modules()
                  for names in self.SAME_INPUT]
        groups = [group for group in groups if all(layer in layers for layer in group)]
        together = {layer for group in groups for layer in group}
        groups += [[layer] for layer in layers if layer not in together]
        with contextlib.suppress(RuntimeError, TypeError):
            self.forwards = {layer: forward for group in groups for layer, forward in packed_forwards(group)}

    def __enter__(self):
        for layer, forward in self.forwards.items():
            vars(layer)["forward"] = forward  # hides the class's; an assignment without nn.Module's checks

    def __exit__(self, *error):
        for layer in self.forwards:
            vars(layer).pop("forward", None)


def can_be_packed(module: nn.Module) -> bool:
    """Whether it is nn.Linear itself with a plain weight on a CPU, of a type for which oneDNN has kernels."""
    if type(module) is not nn.Linear or "forward" in vars(module) or type(module.weight) is not nn.Parameter:
        return False
    if module.weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    dtype = module.weight.dtype
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def packed_forwards(layers: list[nn.Linear]) -> list[tuple[nn.Linear, Callable[[Tensor], Tensor]]]:
    """(layer, its forward) for layers that are given one input: the first computes the outputs of all."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    product = torch.ops.mkldnn._linear_pointwise.default
    sizes, dtype = [layer.out_features for layer in layers], weight.dtype
    del weight  # the packed copy is enough
    last = None, {}  # the input, and the outputs that are not handed out yet

    def forward(number: int, x: Tensor) -> Tensor:
        nonlocal last
        if x.dtype != dtype or torch.is_grad_enabled():  # autocast's; the copies have no gradient
            return F.linear(x, layers[number].weight, layers[number].bias)
        if last[0] is not x or number not in last[1]:  # each output is handed out once: x may change in place
            last = x, dict(enumerate(product(x, packed, bias, "none", [], "").split(sizes, dim=-1)))
        out = last[1].pop(number)
        if not last[1]:
            last = None, {}  # keeps nothing alive
        return out
    return [(layer, functools.partial(forward, number)) for number, layer in enumerate(layers)]


# ---- what is asked for -------------------------------------------------------------------------------------


def check_sampling(temperature: float, top_k: int | None = None, top_p: float | None = None,
                   min_p: float | None = None, repetition_penalty: float = 1.0):
    """Raise UserError where a sampling setting is out of its range."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature {temperature} is out of range; 0 is greedy, 1 the model as it is")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k} is out of range; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p} is out of range; it must be above 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise UserError(f"min_p {min_p} is out of range; it must be 0 (all tokens) to 1 (the likeliest)")
    if not 1e-3 <= repetition_penalty <= 1e3:
        raise UserError(f"repetition_penalty {repetition_penalty} is out of range; it must be 0.001 to 1000, "
                        f"and 1 is none")


def check_prompts(config: "ModelConfig", ids: Tensor | Sequence[Sequence[int]]) -> list[Tensor]:
    """The prompts, each (T,) int64. Raises UserError where one is empty, or holds what is no token's id."""
    prompts = [torch.as_tensor(prompt) for prompt in ids]
    if not prompts or min(prompt.numel() for prompt in prompts) == 0:
        raise UserError("an empty prompt gives nothing to continue; begin with the end-of-text token")
    for row, prompt in enumerate(prompts):
        if prompt.dim() != 1 or prompt.is_floating_point() or prompt.is_complex():
            raise UserError(f"prompt {row} is no list of ids; pass ids of shape (B, T), or B lists")
        prompts[row] = prompt = prompt.long()  # shards and encode_batch have unsigned ids
        least, most = int(prompt.min()), int(prompt.max())
        if least < 0 or most >= config.vocab_size:
            raise UserError(f"prompt {row} holds id {least if least < 0 else most}, but this model's ids are "
                            f"0 to {config.vocab_size - 1}; encode it with the model's own tokenizer")
    return prompts


def room_of(config: "ModelConfig") -> float:
    """How many tokens a text may have; with a window that the model knows, any number."""
    if config.sliding_window is None or config.sliding_window + config.attention_sinks > config.max_seq_len:
        return config.max_seq_len
    return math.inf


def check_length(config: "ModelConfig", longest: int, max_new_tokens: int):
    """Raise UserError where the model cannot read so far."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens} is out of range; it must be at least 1")
    if longest + max_new_tokens > room_of(config):
        raise UserError(f"{longest} prompt tokens and {max_new_tokens} new ones exceed max_seq_len "
                        f"{config.max_seq_len} of this model; shorten the prompt or ask for fewer")


def check_speculation(config: "ModelConfig", prompts: list[Tensor], max_new_tokens: int, speculate: int,
                      draft: "Transformer | None"):
    """Raise UserError where guesses cannot be made, or not be taken back."""
    if speculate < 0 or (draft is not None and speculate == 0):
        raise UserError(f"speculate {speculate} is out of range; with a draft model it must be at least 1, "
                        f"without one 0 is one token at a time")
    if speculate == 0:
        return
    if len(prompts) > 1:
        raise UserError(f"speculate works on one prompt at a time, and there are {len(prompts)}; pass 0")
    for each in [config] if draft is None else [config, draft.config]:
        kept = math.inf if each.sliding_window is None else each.sliding_window + each.attention_sinks
        if len(prompts[0]) + max_new_tokens > kept:
            raise UserError(f"a guess cannot be taken back from a window of {kept} tokens, whose cache "
                            f"overwrites the oldest; pass speculate 0")
        scaling = each.rope_scaling or {"rope_type": None}
        if scaling["rope_type"] == "dynamic" and \
                len(prompts[0]) + max_new_tokens > scaling["original_max_position_embeddings"]:
            raise UserError("a rope_scaling of type dynamic gives other angles where several tokens are read "
                            "in one pass, so guesses would change what is drawn; pass speculate 0")
    if draft is not None:
        if draft.config.vocab_size != config.vocab_size:
            raise UserError(f"the draft model has {draft.config.vocab_size} ids and the model "
                            f"{config.vocab_size}; both need the same tokenizer")
        check_length(draft.config, len(prompts[0]), max_new_tokens)
