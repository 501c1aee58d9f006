"""What is learnt: three objectives of pretraining, and one loss for all of them.

    python train.py                                         # next token: -log p(token | all before it)
    python train.py --objective prefix                      # prefix LM: the same, of the second part only
    python train.py --objective fim --out runs/fim          # fill in the middle: the same, of rearranged text
    python objectives.py --model runs/fim                   # how well does a model fill in what is hidden?

A loss is `loss_fn(model, batch) -> (loss_sum, count)`, and `next_token_loss` is the only one here. An
objective is what the batches are: `PrefixLM` and `FillInTheMiddle` stand around other batches and change who
sees whom, what carries a loss (targets of -100 do not), and in which order the text comes. So the loop, the
evaluation, and all that makes them fast and parallel are written once.
"""
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import bpe
from attention import Mask
from batches import IGNORE, Wrapped
from bpe import Tokenizer
from checkpoint import load_model
from config import UserError, parse, require, run, show
from data import end_of_text_id
from documents import stored_documents
from lora import effective_weight
from model import Transformer, generate
from parallel import choose_device


def next_token_loss(model: Transformer, batch: tuple[Tensor, ...], chunked: bool = True,
                    sparse: bool = False) -> tuple[Tensor, Tensor]:
    """The sum of -log p(target | all before it) in nats over the targets that are not -100, and their number.

    batch: inputs (B, T) and targets (B, T), the inputs shifted by one; and, where who sees whom is not simply
    causal, a Mask.
    chunked: never hold the logits of all tokens; the plain form is for comparison.
    sparse: many targets are -100; the head passes over them, for which a GPU must be waited for once.
    """
    inputs, targets, mask = (*batch, None)[:3]
    hidden, targets = model.model(inputs, mask=mask).flatten(0, 1), targets.flatten()  # (B, T, C) -> (B T, C)
    valid = targets != IGNORE
    if sparse:
        hidden, targets = hidden[valid], targets[valid]
    if chunked:
        assert type(model.lm_head) is nn.Linear, "this loss reads the head's weight, not what wraps it"
        loss_sum = linear_cross_entropy(hidden, effective_weight(model.lm_head), targets)
    else:
        logits = model.lm_head(hidden).float()  # (B T, V)
        loss_sum = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return loss_sum, valid.sum()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """F.cross_entropy(hidden @ weight.T, targets, reduction="sum") without ever holding all logits.

    hidden (N, C), weight (V, C), targets (N,), -100 for none -> the sum in nats, float32 or better. A weight
    that tensor parallelism has cut into rows of the vocabulary stays so: each process has its own logits.
    """
    return LinearCrossEntropy.apply(hidden, *own_rows(weight), targets, torch.is_grad_enabled())


def own_rows(weight: Tensor) -> tuple[Tensor, dist.ProcessGroup | None, int]:
    """(the rows of the vocabulary that this process has, the group that shares the others, the first one)."""
    if not isinstance(weight, DTensor):
        return weight, None, 0
    group, place = weight.device_mesh.get_group(), weight.device_mesh.get_local_rank()
    first = place * math.ceil(weight.size(0) / weight.device_mesh.size())  # as torch.chunk cuts
    return weight.to_local(), group, first


class LinearCrossEntropy(torch.autograd.Function):
    """The work of linear_cross_entropy.

    At V = 4,096 the logits of a batch are far larger than all else, and writing and reading them back takes
    longer than computing them. Here a few rows' logits are turned into their loss and their gradient, which
    is softmax - onehot, while they lie in the cache; what is kept for the backward pass is the gradient of
    the inputs. Equal to the plain form but for rounding. In fp16 the products of the gradient are float32's:
    small probabilities would be lost, as the loss scale comes with the backward pass only.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, group, first: int, targets: Tensor,
                with_gradient: bool) -> Tensor:
        """weight: the rows `first` … of the vocabulary, whose other rows are with the others of `group`."""
        def of_rows(logits: Tensor, some: slice) -> tuple[Tensor, Tensor]:
            losses, grad = rows_loss(logits, targets[some], group, first)
            return losses.sum(), grad
        loss_sum, hidden_grad, weight_grad = in_chunks(hidden, weight, of_rows, with_gradient,
                                                       ctx.needs_input_grad[1])
        if with_gradient:
            if group is not None:
                dist.all_reduce(hidden_grad, group=group)
            ctx.save_for_backward(hidden_grad, weight_grad)
        return loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor):
        hidden_grad, weight_grad = ctx.saved_tensors
        weight_grad = None if weight_grad is None else weight_grad * scale
        return hidden_grad * scale, weight_grad, None, None, None, None


def in_chunks(hidden: Tensor, weight: Tensor, of_rows: Callable, with_gradient: bool, weight_asks: bool,
              shape: tuple = ()) -> tuple[Tensor, Tensor, Tensor | None]:
    """(the sums of what of_rows gives, gradients by hidden (N, C) and weight (V, C)), a few rows at a time.

    of_rows: (logits (rows, V), which rows) -> (values of this shape, the loss's gradient by the logits or
    None). weight_asks: for its gradient; of a frozen head nobody does. Without gradients these mean nothing.
    """
    device = hidden.device.type
    product, exact = product_dtypes(device, weight)
    weight, exact_weight = weight.to(product), weight.to(exact)  # once, not for each few rows
    sums = hidden.new_zeros(shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    hidden_grad, weight_grad, rows = torch.empty_like(hidden), None, rows_at_once(hidden, weight)
    if with_gradient and weight_asks:
        weight_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    with torch.autocast(device, enabled=False):
        for start in range(0, len(hidden), rows):
            some = slice(start, start + rows)
            part = hidden[some]
            values, grad = of_rows(part.to(product) @ weight.T, some)
            sums += values
            if with_gradient:
                grad = grad.to(exact)  # (rows, V)
                hidden_grad[some] = grad @ exact_weight
                if weight_grad is not None:
                    weight_grad += grad.T @ part.to(exact)
            del grad  # before the next rows' logits take as much again
    return sums, hidden_grad, weight_grad


def product_dtypes(device: str, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(of the logits' product, of the gradient's): fp16 would lose small probabilities in the second."""
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return product, torch.float32 if product == torch.float16 else product


def rows_at_once(hidden: Tensor, weight: Tensor) -> int:
    """How many rows' logits are made at a time.

    2^21 float32 are 8 MB: what a CPU's cache holds. But the weight's gradient, (V, C), is read and written
    for each chunk: no fewer rows than 2 C, or that costs more than the products.
    """
    return max(2 * hidden.size(1), (2 ** 27 if hidden.is_cuda else 2 ** 21) // max(1, len(weight)))


def token_logps(model: Transformer, inputs: Tensor, targets: Tensor, mask: Mask | Tensor | None = None
                ) -> Tensor:
    """log p(target | all before it) in nats of each target that is not -100, in their order: (N,) float32.

    inputs, targets: (B, T) as of next_token_loss, whose parts these are; here each has a gradient of its own,
    as preferences and rewards need it. Never are the logits of all tokens held.
    """
    hidden, valid = model.model(inputs, mask=mask), targets != IGNORE  # (B, T, C)
    return logps_of_hidden(model, hidden[valid], targets[valid])


def logps_of_hidden(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """token_logps of what the decoder has made already: hidden (N, C), targets (N,) -> (N,)."""
    assert type(model.lm_head) is nn.Linear, "this reads the head's weight, not what wraps it"
    return LinearLogps.apply(hidden, *own_rows(effective_weight(model.lm_head)), targets)


class LinearLogps(torch.autograd.Function):
    """The work of token_logps: (N, C) -> (N,), a few rows' logits at a time.

    LinearCrossEntropy turns logits into the gradient of the sum while it has them. Here what each row's
    log-probability is worth is known only later, when all of a reply are added up and compared with another
    reply's: so the backward pass computes the logits once more, which is one product instead of holding N V.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, group, first: int, targets: Tensor) -> Tensor:
        device = hidden.device.type
        ctx.save_for_backward(hidden, weight, targets)
        ctx.place, ctx.dtypes = (group, first), product_dtypes(device, weight)
        logps = torch.empty(len(hidden), device=hidden.device,
                            dtype=torch.promote_types(hidden.dtype, torch.float32))
        weight, rows = weight.to(ctx.dtypes[0]), rows_at_once(hidden, weight)
        with torch.autocast(device, enabled=False):
            for part, part_logps, target in zip(hidden.split(rows), logps.split(rows), targets.split(rows)):
                part_logps.copy_(-rows_loss(part.to(weight.dtype) @ weight.T, target, group, first)[0])
        return logps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scales: Tensor):
        (hidden, weight, targets), (group, first), (product, exact) = ctx.saved_tensors, ctx.place, ctx.dtypes
        hidden_grad, weight_grad = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        rough, exact_weight, rows = weight.to(product), weight.to(exact), rows_at_once(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            for part, part_grad, target, scale in zip(hidden.split(rows), hidden_grad.split(rows),
                                                      targets.split(rows), scales.split(rows)):
                grad = rows_loss(part.to(product) @ rough.T, target, group, first)[1]  # of the loss, -logp
                grad = grad.mul_(-scale[:, None]).to(exact)  # (rows, V)
                part_grad.copy_(grad @ exact_weight)
                if weight_grad is not None:
                    weight_grad += grad.T @ part.to(exact)
        if group is not None:
            dist.all_reduce(hidden_grad, group=group)
        return hidden_grad, weight_grad, None, None, None


def rows_loss(logits: Tensor, targets: Tensor, group=None, first: int = 0) -> tuple[Tensor, Tensor]:
    """(losses (rows,), their gradients softmax - onehot (rows, V)) of a few rows' logits, in their memory.

    logits (rows, V), or the columns `first` … of them, the others being with the others of `group`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = (targets != IGNORE)[:, None]  # (rows, 1)
    target = (targets[:, None] - first).clamp(0, logits.size(1) - 1)
    here = valid if group is None else valid & (target + first == targets[:, None])
    top = logits.amax(dim=1, keepdim=True)
    of_target = logits.gather(1, target) * here
    if group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        dist.all_reduce(of_target, group=group)
    total = logits.sub_(top).exp_().sum(dim=1, keepdim=True)
    if group is not None:
        dist.all_reduce(total, group=group)
    losses = ((top + total.log() - of_target) * valid)[:, 0]
    scale = torch.where(valid, 1 / total, 0.0)
    return losses, logits.mul_(scale).scatter_add_(1, target, -here.to(logits.dtype))


# ------------------------------------------------------------------------------------------------------------
# Prefix LM: read the beginning both ways, write the rest


class PrefixLM(Wrapped):
    """Batches whose rows begin with a prefix that is read both ways and carries no loss.

    L = -log p(suffix | prefix): Eq. 15.2 of Zhao et al., "A Survey of Large Language Models", the Chinese
    edition; Raffel et al. 2020, https://arxiv.org/abs/1910.10683, Fig. 3. Of the T + 1 tokens of a row the
    first 1 to T are the prefix: how many is drawn from (seed, the row's number) alone, uniformly.

    .at(step): inputs (B, T); targets (B, T), -100 within the prefix; a Mask of the prefixes' lengths. All
    else is that of the batches. Unlike with next tokens, about half of the targets go, and attention cannot
    take the faster kernel that knows causal masks only.
    """

    def __init__(self, batches, seed: int):
        super().__init__(batches)
        self.seed = seed

    def at(self, step: int) -> tuple[Tensor, Tensor, Mask]:
        inputs, targets = self.batches.at(step)
        real = (targets != IGNORE).sum(dim=1).tolist()  # T, but where the end of the data is filled up
        lengths = torch.tensor([row_generator(self.seed, number).integers(1, most + 1)
                                for number, most in zip(self.numbers(step), real)])  # (B,)
        within = torch.arange(inputs.size(1)) < lengths[:, None] - 1  # the prefix's last predicts the suffix
        return inputs, targets.masked_fill(within, IGNORE), Mask(prefix=lengths)


def row_generator(seed: int, number: int) -> np.random.Generator:
    """Randomness of one window, by its number (see Batches.numbers): whichever process has it."""
    return np.random.default_rng([seed, number, 1])  # 1: another stream than the order of the windows


# ------------------------------------------------------------------------------------------------------------
# Fill in the middle: the same loss on rearranged text


FIM_TOKENS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")  # as Qwen spells them
STRAY = "".join(map(chr, range(0xDC80, 0xDD00)))  # what "surrogateescape" makes of bytes that are not UTF-8


def with_fim_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the three FIM_TOKENS at its end: other ids stay, and with them token shards."""
    return tokenizer.with_special_tokens(FIM_TOKENS)


def arrange(prefix: list[int], middle: list[int], suffix: list[int], spm: bool, tokenizer) -> list[int]:
    """<PRE> prefix <SUF> suffix <MID> middle; or, spm, <PRE> <SUF> suffix <MID> prefix middle.

    Bavarian et al. 2022, section 3: PSM, and of SPM the variant that shares the three tokens with it, so that
    the two help each other. With an empty middle it is the prompt that asks for one.
    """
    pre, mid, suf = (tokenizer.special_tokens[text] for text in FIM_TOKENS)
    return [pre, suf, *suffix, mid, *prefix, *middle] if spm else [pre, *prefix, suf, *suffix, mid, *middle]


class FillInTheMiddle(Wrapped):
    """Batches in which pieces of text are rearranged: the middle comes last, predicted from both its sides.

    Bavarian et al. 2022, https://arxiv.org/abs/2207.14255, at the level of contexts; Eq. 15.3 of Zhao et al.
    A window of T + 1 ids is cut at end-of-text into pieces of documents. With probability `rate` a piece is
    cut at two random places into prefix, middle and suffix, which `arrange` puts in order, as SPM with
    probability `spm_rate`; end-of-text follows, so that the model learns where a middle ends. The loss is on
    all of it, as in the paper: it is the next-token loss on other text.

    cut: "characters": the parts are tokenised anew, so that a cut may fall inside a token, as a cursor does.
    A character of which the window's edge has left some bytes is not cut, its bytes are kept.
    "tokens": between ids.

    Windows keep their size, and a piece grows by 4 ids and the tokens that are cut in two. What no longer
    fits is lost at the end of the text (first of the suffix), not of the arrangement: its end-of-text stays.
    On the default corpus that is 2.3 % of the bytes at T = 128 and rate 0.5, and 0.3 % at T = 1,024. A window
    that becomes too short is filled up with end-of-text, without targets. Whatever is drawn follows from
    (seed, the window's number) alone.
    """

    def __init__(self, batches, tokenizer: Tokenizer, seed: int, rate: float = 0.5, spm_rate: float = 0.5,
                 cut: str = "characters"):
        assert 0 <= rate <= 1 and 0 <= spm_rate <= 1 and cut in ("characters", "tokens")
        super().__init__(batches)
        self.tokenizer, self.seed, self.rate, self.spm_rate, self.cut = tokenizer, seed, rate, spm_rate, cut
        self.end = batches.meta["end_of_text"]
        self.stray_ids = {chr(0xDC00 + token[0]): id for id, token in tokenizer.ordinary_vocab().items()
                          if len(token) == 1}

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets), int64 (B, T) each."""
        old_inputs, old_targets = self.batches.at(step)
        inputs, targets = torch.full_like(old_inputs, self.end), torch.full_like(old_targets, IGNORE)
        for row, number in enumerate(self.numbers(step)):
            real = int((old_targets[row] != IGNORE).sum())  # T, but where the end of the data is filled up
            ids = [*old_inputs[row, :real].tolist(), int(old_targets[row, real - 1])]
            ids = torch.tensor(self.rearranged(ids, inputs.size(1) + 1, row_generator(self.seed, number)))
            inputs[row, :len(ids) - 1], targets[row, :len(ids) - 1] = ids[:-1], ids[1:]
        return inputs, targets

    def rearranged(self, ids: list[int], size: int, generator: np.random.Generator) -> list[int]:
        """The ids of a window, piece by piece rearranged or as they are: `size` at most."""
        result = []
        for piece in pieces(ids, self.end):
            text = piece[:-1] if piece[-1] == self.end else piece
            room = size - len(result) - 4  # three sentinels and end-of-text
            if text and room > 0 and generator.random() < self.rate:
                parts = shortened(self.parts(text, generator), room)
                piece = [*arrange(*parts, generator.random() < self.spm_rate, self.tokenizer), self.end]
            result += piece
        return result[:size]

    def parts(self, ids: list[int], generator: np.random.Generator) -> list[list[int]]:
        """The ids of prefix, middle and suffix: cut at two places, each as likely as any other."""
        if self.cut == "tokens":
            i, j = sorted(generator.integers(len(ids) + 1, size=2).tolist())
            return [ids[:i], ids[i:j], ids[j:]]
        text = self.tokenizer.decode_bytes(ids).decode("utf-8", errors="surrogateescape")
        first = len(text) - len(text.lstrip(STRAY))  # no cut within what is left of a character
        i, j = sorted(first + generator.integers(len(text.strip(STRAY)) + 1, size=2))
        return [self.encode(text[:i]), self.encode(text[i:j]), self.encode(text[j:])]

    def encode(self, text: str) -> list[int]:
        """The ids of a text in which surrogates stand for single bytes."""
        ids = []
        for part in re.split(f"([{STRAY}])", text):
            ids += [self.stray_ids[part]] if part in self.stray_ids else self.tokenizer.encode(part)
        return ids


def pieces(ids: list[int], end: int) -> Iterator[list[int]]:
    """The ids, cut behind every end-of-text."""
    start = 0
    for stop, id in enumerate(ids, start=1):
        if id == end or stop == len(ids):
            yield ids[start:stop]
            start = stop


def shortened(parts: list[list[int]], room: int) -> list[list[int]]:
    """The parts without the last ids of their text, so that `room` ids are left at most."""
    kept = []
    for part in parts:
        kept.append(part[:room])
        room -= len(kept[-1])
    return kept


# ------------------------------------------------------------------------------------------------------------
# Measuring: what is hidden in a line of held-out text?


@dataclass
class Settings:
    model: str = "runs/fim"  # model folder
    data: str = "runs/data"  # data folder; its val.jsonl lends the text
    n: int = 500  # middles to hide, each in another line
    span: int = 16  # bytes of the longest middle
    cut: Literal["words", "characters"] = "words"  # hide whole words, numbers and signs, so that no token is
    # cut, which left-to-right models never see; or any characters of a line, as a cursor falls
    seed: int = 0  # of the choice of middles
    batch_size: int = 100  # prompts at a time
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the first there is of cuda, mps, cpu

    def __post_init__(self):
        require(self, n=(1, None), span=(1, None), batch_size=(1, None), seed=(0, 2 ** 63 - 1))


def measure_infilling(model: Transformer, tokenizer: Tokenizer, data_folder, n: int = 500, span: int = 16,
                      cut: str = "words", seed: int = 0, batch_size: int = 100) -> dict[str, dict]:
    """{"left to right" | "PSM" | "SPM": {"bits_per_byte", "begins", "exact", "middles"}}: n hidden middles.

    Every order has the same middles and as many tokens of context: all of them before the middle, or up to
    half of them behind it. One rule for all: bits_per_byte is -log2 p(middle) over the bytes of all middles,
    end-of-text not counted; begins is the share of greedy continuations that begin with the middle. exact,
    for infilling alone, is the share that ends there, too. Without FIM_TOKENS: left to right only.

    Raises UserError where the model's context is too short, or the folder has no held-out text.
    """
    context = model.config.max_seq_len - len(FIM_TOKENS) - (span + 1)  # + 1: end-of-text
    if context < 2:
        raise UserError(f"a middle of {span} bytes and {context} tokens of context do not fit this model's "
                        f"max_seq_len {model.config.max_seq_len}; pass a smaller --span")
    prompts, middles = {"left to right": []}, []
    if set(FIM_TOKENS) <= tokenizer.special_tokens.keys():
        prompts |= {"PSM": [], "SPM": []}
    texts = hidden_middles(data_folder, n, span, cut, tokenizer.pattern, 8 * context, seed)
    for before, middle, after in texts:
        before, after = tokenizer.encode(before)[-context:], tokenizer.encode(after)[:context // 2]
        middles.append(middle)
        for order in prompts:
            prompts[order].append(before if order == "left to right" else arrange(
                before[len(after) - context:], [], after, order == "SPM", tokenizer))
    return {order: scores(model, tokenizer, prompts[order], middles, span, batch_size) for order in prompts}


@torch.no_grad()
def scores(model, tokenizer, prompts: list[list[int]], middles: list[str], span: int,
           batch_size: int) -> dict:
    """What measure_infilling says of one order."""
    end, device = end_of_text_id(tokenizer), next(model.parameters()).device
    nats, begins, exact, targets = 0.0, 0, 0, [tokenizer.encode(middle) for middle in middles]
    for start in tqdm(range(0, len(prompts), batch_size), desc="infill", leave=False, disable=None):
        rows = slice(start, start + batch_size)
        batch = continuations(prompts[rows], targets[rows], end)
        nats += float(next_token_loss(model, tuple(tensor.to(device) for tensor in batch))[0])
        answers = generate(model, prompts[rows], span + 1, temperature=0, stop_ids=[end])
        for ids, length, middle in zip(answers.ids.tolist(), answers.lengths.tolist(), middles[rows]):
            ended = ids[length - 1] == end
            text = tokenizer.decode_bytes(ids[:length - ended])
            begins += text.startswith(middle.encode())
            exact += ended and text == middle.encode()
    num_bytes = sum(len(middle.encode()) for middle in middles)
    return {"bits_per_byte": nats / math.log(2) / num_bytes, "begins": begins / len(middles),
            "exact": exact / len(middles), "middles": len(middles)}


def continuations(prompts: list[list[int]], targets: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets) (B, T), the loss on the targets alone; filled up behind, where nobody looks."""
    T = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets)) - 1
    ids, expected = torch.full((len(prompts), T), fill), torch.full((len(prompts), T), IGNORE)
    for row, (prompt, target) in enumerate(zip(prompts, targets)):
        stop = len(prompt) + len(target) - 1
        ids[row, :stop] = torch.tensor((prompt + target)[:-1])
        expected[row, len(prompt) - 1:stop] = torch.tensor(target)
    return ids, expected


def hidden_middles(folder, n: int, span: int, cut: str, pattern: str, context: int,
                   seed: int) -> list[tuple[str, str, str]]:
    """Up to n (before, middle, after), each from another line of the held-out documents, all as likely.

    before and after: up to `context` characters of the document. Memory: n of these (reservoir sampling,
    Vitter 1985, algorithm R).
    """
    path, generator = Path(folder) / "val.jsonl", np.random.default_rng(seed)
    if not path.is_file():
        raise UserError(f"there is no {path} with held-out text; make it with: python data.py --out {folder}")
    kept, seen = [], 0
    for document in stored_documents(path):
        text, start = document["text"], 0
        for line in text.split("\n"):
            i, j = (start + at for at in random_run(line, span, cut, pattern, generator))
            start += len(line) + 1
            if i > 0 and text[i:j].strip():  # something to go by, and something to guess
                place = seen if seen < n else int(generator.integers(seen + 1))
                if place < n:
                    kept[place:place + 1] = [(text[max(0, i - context):i], text[i:j], text[j:j + context])]
                seen += 1
    if not kept:
        raise UserError(f"{path} has no line in which to hide a middle of {span} bytes; pass a larger --span")
    return kept


def random_run(line: str, span: int, cut: str, pattern: str, generator) -> tuple[int, int]:
    """Where a run of the line's words, or characters, begins and ends: `span` bytes at most, or none at all.

    Each may be the first; then each number of them that `span` has room for is as likely.
    """
    units = list(line) if cut == "characters" else list(chain.from_iterable(bpe.split(line, pattern)))
    if not units:
        return 0, 0
    first = int(generator.integers(len(units)))
    sizes = np.cumsum([len(unit.encode()) for unit in units[first:first + span]])
    most = int(np.searchsorted(sizes, span, side="right"))
    last = first + (1 + int(generator.integers(most)) if most else 0)
    begin = len("".join(units[:first]))
    return begin, begin + len("".join(units[first:last]))


def main():
    settings = parse(Settings)
    device = choose_device(settings.device)
    model, tokenizer = load_model(settings.model, device)
    if tokenizer is None:
        raise UserError(f"{settings.model} has no tokenizer.json, so it cannot read text; copy it there")
    show(settings)
    results = measure_infilling(model, tokenizer, settings.data, settings.n, settings.span, settings.cut,
                                settings.seed, settings.batch_size)
    number = results["left to right"]["middles"]
    print(f"{number} hidden middles; two standard errors of a share: {1 / math.sqrt(number):.1%} at most")
    if len(results) == 1:
        print(f"{settings.model} lacks the tokens {' '.join(FIM_TOKENS)}: only left to right is measured")
    print(f"{'':<15}{'bits per byte':>14}{'begins with the middle':>24}{'and ends there':>16}")
    for order, result in results.items():
        exact = "" if order == "left to right" else f"{result['exact']:>16.1%}"
        print(f"{order:<15}{result['bits_per_byte']:>14.3f}{result['begins']:>24.1%}{exact}")


if __name__ == "__main__":
    run(main)
