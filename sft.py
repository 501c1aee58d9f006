"""Supervised fine-tuning: a model that continues texts learns to answer (Ouyang et al. 2022, section 3.1).

    python sft.py                                  # runs/base -> runs/sft, on questions about functions
    python sft.py --data gsm8k.jsonl --show_mask 2 # any conversations (chat.py); first see what is learnt
    python sample.py --chat runs/sft

The loop, the loss and all layouts are pretraining's (train.py). Unlike pretraining:
1. a text is a conversation, written with the control tokens of a template (chat.py), which are new to the
   model: its embedding grows by their rows;
2. loss is taken on what the assistant says, its end token included, and on nothing else;
3. windows are packed with whole conversations, and none sees another: attention is masked by document, and
   positions start anew. No example is cut. A window holds the same text as so many padded rows, and the loss
   is the same sum;
4. some windows are plain text, as in pretraining: against forgetting.
"""
import contextlib
import hashlib
import math
import re
import sys
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import stdlib_chat
from attention import Mask
from bpe import Tokenizer
from chat import TEMPLATES, Template, jinja, read_conversations, render, with_chat_tokens
from checkpoint import load_model
from config import UserError, parse, require, run, show
from data import IGNORE, Batches, Replay
from model import Transformer, extend_embedding, generate
from objectives import next_token_loss
from parallel import Env
from positions import extended
from survive import open_run_folder
from train import Loop, evaluate, guarded, micro_batch, train

# ------------------------------------------------------------------------------------------------------------
# Packing


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which examples share a window of `room` tokens: the longest first, each into the fullest that has room.

    Best-fit decreasing (Johnson 1973; for language models Ding et al. 2024): all but a few per cent of the
    tokens of the windows are used, and no example is cut. Returns lists of indices into lengths, each of
    which is at most `room`.
    """
    windows: list[list[int]] = []
    by_left: dict[int, list[int]] = {}  # windows by what room they have left
    lefts: list[int] = []  # the keys of by_left, ascending
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(lefts, lengths[example])
        if at == len(lefts):
            window, left = len(windows), room
            windows.append([])
        else:
            left = lefts[at]
            window = by_left[left].pop()
            if not by_left[left]:
                del by_left[left], lefts[at]
        windows[window].append(example)
        left -= lengths[example]
        if left not in by_left:
            insort(lefts, left)
        by_left.setdefault(left, []).append(window)
    return windows


class Packed(Batches):
    """Windows of T = seq_len tokens with whole conversations: as Batches, but `rows` are of three tensors.

    inputs, targets, documents: (B, T) each. A conversation of n + 1 tokens takes n places: its last token is
    a target alone. targets: -100 where the mask, which is aligned to the targets, is False. documents: 1, 2,
    ... in a window, 0 on what is left over, which is filled with `fill` and has no targets.
    """

    def __init__(self, examples: Sequence[tuple[list[int], list[bool]]], batch_size: int, seq_len: int,
                 seed: int = 0, rank: int = 0, world_size: int = 1, fill: int = 0, text_bytes: int = 0):
        """examples: (ids, mask) each, as `render` gives them, of 2 to seq_len + 1 tokens.

        text_bytes: UTF-8 of what carries loss, for bits per byte.
        """
        self.examples = [(np.array(ids), np.array(mask)) for ids, mask in examples]
        self.packs = best_fit([len(ids) - 1 for ids, _ in examples], seq_len)
        self.packs.sort()  # by their first example: nothing of the order of lengths is left in them
        self.batch_size, self.seq_len, self.seed, self.fill = batch_size, seq_len, seed, fill
        self.rank, self.world_size = rank, world_size
        self.windows = len(self.packs)
        self.steps = -(-self.windows // (batch_size * world_size))
        self.tokens = sum(int(mask[1:].sum()) for _, mask in self.examples)  # that carry loss
        self.text_bytes = text_bytes
        self.used = sum(len(ids) - 1 for ids, _ in examples) / (self.windows * seq_len)
        self._epoch, self._order = None, None

    def _stack(self, windows: Sequence[int]):
        inputs = np.full((len(windows), self.seq_len), self.fill)  # (B, T)
        targets, documents = np.full_like(inputs, IGNORE), np.zeros_like(inputs)
        for row, window in enumerate(windows):
            start = 0
            for number, example in enumerate(self.packs[window] if window < self.windows else (), start=1):
                ids, mask = self.examples[example]
                end = start + len(ids) - 1
                inputs[row, start:end] = ids[:-1]
                targets[row, start:end] = np.where(mask[1:], ids[1:], IGNORE)
                documents[row, start:end] = number
                start = end
        return tuple(map(torch.from_numpy, (inputs, targets, documents)))


class PlainText(Batches):
    """Batches whose windows are one document each: what stands beside Packed in a batch."""

    def _stack(self, windows: Sequence[int]):
        inputs, targets = super()._stack(windows)
        return inputs, targets, torch.zeros_like(inputs)


def reply_loss(model: Transformer, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """next_token_loss in which no document sees another. batch: inputs, targets, documents (B, T) each."""
    inputs, targets, documents = batch
    return next_token_loss(model, (inputs, targets, Mask(documents=documents)))


# ------------------------------------------------------------------------------------------------------------
# What is trained, and from what


def choose_trained(model: Transformer, which: str) -> str:
    """Freeze all weights but those that `which` names, and say how many that leaves.

    which: "all", "norms", "embeddings" (the head too), or "lastN": the last N blocks, norm and head.
    """
    n = model.config.n_layers
    last = int(which.removeprefix("last") or 0) if re.fullmatch(r"last\d+", which) else 0
    trained = {"all": r"", "norms": r"norm\.", "embeddings": r"embed_tokens|lm_head"}.get(which)
    if trained is None:
        if not 1 <= last <= n:
            raise UserError(f"--train_layers {which} is not all, norms, embeddings, or last1 to last{n}")
        blocks = "|".join(rf"layers\.{i}\." for i in range(n - last, n))
        trained = rf"{blocks}|^model\.norm|lm_head"
    for name, p in model.named_parameters():
        p.requires_grad = bool(re.search(trained, name))
    some = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"trained: {which}, {some:,} of {sum(p.numel() for p in model.parameters()):,} parameters"


def add_noise(model: Transformer, alpha: float) -> None:
    """NEFTune (Jain et al. 2023, algorithm 1): uniform noise on the embeddings, while the model trains."""
    def noisy(module, ids, x: Tensor) -> Tensor:
        bound = alpha / math.sqrt(x.size(1) * x.size(2))  # alpha / sqrt(T C)
        return x + torch.empty_like(x).uniform_(-bound, bound) if module.training else x
    model.model.embed_tokens.register_forward_hook(noisy)


def examples_of(conversations: Sequence[dict], tokenizer: Tokenizer, template: Template, settings,
                say: Callable) -> list[tuple[list[int], list[bool]]]:
    """(ids, mask) of the conversations that fit into a window; how many do not is said."""
    examples = []
    for conversation in tqdm(conversations, desc="render", unit="conversation", leave=False):
        ids, mask = render(conversation["messages"], tokenizer, template=template)
        if len(ids) <= settings.seq_len + 1:
            examples.append((ids, [True] * len(ids) if settings.loss_on_prompts else mask))
    dropped = len(conversations) - len(examples)
    if not examples:
        raise UserError(f"none of the {dropped:,} conversations fits into --seq_len {settings.seq_len} "
                        f"tokens; pass more")
    if dropped:
        say(f"dropped: {dropped:,} of {len(conversations):,} conversations, longer than {settings.seq_len} "
            f"tokens")
    return examples


def show_masks(examples, tokenizer: Tokenizer, number: int) -> None:
    """Print a few conversations, what is learnt in green (between » and « where no terminal is)."""
    begin, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("»", "«")
    for ids, mask in examples[:number]:
        text = ""
        for run_, is_learnt in runs(ids, mask):
            piece = tokenizer.decode(run_)
            text += f"{begin}{piece}{end}" if is_learnt else piece
        print(f"{text}\n{'-' * 80}")


def runs(ids: list[int], mask: list[bool]):
    """Yield (ids, learnt) for each run of equal mask."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or mask[i] != mask[start]:
            yield ids[start:i], mask[start]
            start = i


# ------------------------------------------------------------------------------------------------------------
# What it has learnt


@torch.no_grad()
def answers(model: Transformer, prompts: Sequence[list[int]], tokenizer: Tokenizer, stop_ids: Sequence[int],
            max_new_tokens: int, batch_size: int = 32) -> list[tuple[str, bool]]:
    """(reply, whether it ended by itself) to each prompt, greedily; prompts of like length go together."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: list[tuple[str, bool]] = [("", False)] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), desc="answer", unit="batch", leave=False):
        batch = order[start:start + batch_size]
        room = model.config.max_seq_len - max(len(prompts[i]) for i in batch)
        sample = generate(model, [prompts[i] for i in batch], min(max_new_tokens, room), temperature=0,
                          stop_ids=stop_ids)
        for i, ids, length in zip(batch, sample.ids.tolist(), sample.lengths.tolist()):
            stopped = ids[length - 1] in stop_ids
            replies[i] = tokenizer.decode(ids[:length - stopped]), stopped
    return replies


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, as SQuAD counts them (without articles'
    special treatment): 2 common / (all of both)."""
    a, b = Counter(words(answer)), Counter(words(truth))
    total = sum(a.values()) + sum(b.values())
    return 2 * sum((a & b).values()) / total if total else float(answer == truth)


def score(conversations: Sequence[dict], replies: Sequence[tuple[str, bool]]) -> dict[str, float]:
    """Shares over the replies: F1 and exact match of described functions, bodies that compile, own ends."""
    scores: dict[str, list[float]] = {"f1": [], "exact_match": [], "compiles": [], "stops": []}
    for conversation, (reply, stopped) in zip(conversations, replies):
        truth = conversation["messages"][-1]["content"]
        scores["stops"].append(stopped)
        if conversation.get("task") == "write":
            whole = stdlib_chat.assemble(conversation["code"], reply)
            scores["compiles"].append(bool(reply.strip()) and stdlib_chat.compiles(whole))
        else:
            scores["f1"].append(f1(reply, truth))
            scores["exact_match"].append(words(reply) == words(truth))
    return {name: sum(values) / len(values) for name, values in scores.items() if values}


def few_shot(conversations: Sequence[dict], tokenizer: Tokenizer, shots: Sequence[dict], form: str,
             room: int) -> list[list[int]]:
    """Prompts that ask a base model the same: `shots` answered questions, then the question, in one `form`.

    A base model knows no template; what it can do is to go on with a list. Of a prompt of more than `room`
    tokens the end is kept.
    """
    def entry(conversation: dict, answer: str) -> str:
        return form.replace("{code}", conversation["code"]).replace("{answer}", answer)
    head = "".join(entry(shot, shot["messages"][-1]["content"]) + "\n\n\n" for shot in shots)
    asked = [entry(conversation, "").rstrip(" ") for conversation in conversations]
    return [tokenizer.encode(head + question)[-room:] for question in asked]


FEW_SHOT_FORMS = ("{code}\n# {answer}", 'Code:\n{code}\nDescription: {answer}', '{code}\n"""{answer}',
                  "# What does this function do?\n{code}\n# Answer: {answer}")


def best_few_shot(model: Transformer, tokenizer: Tokenizer, asked: Sequence[dict], known: Sequence[dict],
                  contexts: Sequence[int], max_new_tokens: int) -> tuple[float, str]:
    """(F1, which) of a base model at the form, number of shots and context that are best on these questions.

    Chosen on the very questions that it is scored on, so if anything too good. An answer is its first line.
    """
    best = (-1.0, "")
    for context in contexts:
        for form in FEW_SHOT_FORMS:
            for number in (0, 1, 3):
                shots = sorted(known, key=lambda c: len(c["code"]))[:number * 50:50] if number else []
                prompts = few_shot(asked, tokenizer, shots, form, context - max_new_tokens)
                replies = [reply.strip().split("\n")[0] for reply, _ in
                           answers(model, prompts, tokenizer, (), max_new_tokens)]
                value = sum(f1(reply, conversation["messages"][-1]["content"])
                            for reply, conversation in zip(replies, asked)) / len(asked)
                best = max(best, (value, f"{form!r}, {number} shots, {context} tokens"))
    return best


# ------------------------------------------------------------------------------------------------------------
# The command


@dataclass
class Settings(Loop):
    init_from: str = "runs/base"  # model folder to begin with
    data: str = "runs/chat"  # conversations: a file, or a folder with train.jsonl and val.jsonl; the default
                             # folder is made if missing
    out: str = "runs/sft"  # run folder; an unfinished run goes on
    overwrite: bool = False  # delete what is in `out` and start anew
    template: Literal["chatml", "llama3", "qwen", "qwen3"] = "chatml"  # how a conversation is written
    rope_scaling: Literal["linear", "ntk", "dynamic", "yarn", "llama3"] | None = "ntk"  # the rule by which a
        # model reads further than its max_seq_len, where seq_len is longer
    val_share: float = 0.05  # of a single file of conversations, held out
    epochs: float = 3.0  # how often each conversation is seen
    steps: int | None = None  # updates; none: as many as the epochs take
    seq_len: int = 512  # tokens a window; a longer conversation is dropped, and counted
    batch_size: int = 8  # windows a step
    lr: float = 0.01  # peak learning rate of the matrices in blocks
    adam_lr: float = 2e-3  # of embedding, head and norms
    replay: str | None = "runs/data"  # token shards of plain text, against forgetting; none: none
    replay_share: float = 0.2  # of the windows; 0: only watched
    train_layers: str = "all"  # all, norms, embeddings (head included), or lastN: the last N blocks and head
    neftune: float = 0.0  # noise on embeddings in training (5 to 15 are usual; Jain et al. 2023); 0: none
    loss_on_prompts: bool = False  # learn what the user says, too
    show_mask: int = 0  # print so many conversations with what is learnt of them, first
    questions: int = 200  # held-out questions to answer before and after; 0: none
    make_data: bool = False  # only write the default conversations

    free = {"val_share", "steps", "show_mask", "questions", "make_data", "rope_scaling"}

    def __post_init__(self):
        require(self, epochs=(0.001, 1000), replay_share=(0, 0.99), neftune=(0, 1000), show_mask=(0, None),
                questions=(0, None), val_share=(0.001, 0.5), lr=(1e-12, 10))
        self.check_loop()


def main():
    settings = parse(Settings)
    if settings.make_data:
        stdlib_chat.write_conversations(settings.data, settings.overwrite)
    else:
        guarded(settings, fine_tune)


def fine_tune(settings: Settings, env: Env):
    """The stage on one process: refuse what is wrong, make what is missing, train, compare."""
    env.first(lambda: prepare_data(settings, env), patient=True)
    template = TEMPLATES[settings.template]
    if settings.replay == Settings.replay and not Path(settings.replay).exists():
        env.say(f"there is no {settings.replay}: no plain text is replayed, and forgetting is not measured")
        settings.replay = None
    model, tokenizer, base = start(settings, template, env)
    conversations = read_splits(settings, env)
    batches, validation = pack(settings, conversations, tokenizer, template, base, env)
    if settings.steps is None:
        new = batches.windows * settings.epochs / (1 - (settings.replay_share if settings.replay else 0))
        settings.steps = math.ceil(new / settings.batch_size)
    env.say(choose_trained(model, settings.train_layers))
    if settings.neftune:
        add_noise(model, settings.neftune)
    if settings.show_mask and env.rank == 0:
        show_masks(batches.examples, tokenizer, settings.show_mask)
    with contextlib.ExitStack() as stack:
        # last of all that can refuse: --overwrite deletes here
        env.first(lambda: stack.enter_context(open_run_folder(settings)))
        if env.rank == 0:
            show(settings)
        asked = questions_of(conversations["val"], settings.questions)
        before = {name: evaluate(model, held_out, reply_loss, env) for name, held_out in validation.items()}
        replied = []
        env.first(lambda: replied.append(reply_to(asked, model, tokenizer, template, env)), patient=True)
        corpus = {"conversations": fingerprint(batches.examples),
                  "init_from": str(Path(settings.init_from).resolve())}
        last = train(model, batches, reply_loss, settings, env, tokenizer, validation, corpus)
        env.first(lambda: compare(before, replied[0], last, asked, settings, env), patient=True)


def fingerprint(examples) -> str:
    """A checksum of what is learnt from."""
    sha = hashlib.sha256()
    for ids, mask in examples:
        sha.update(ids.astype("<i8").tobytes() + mask.tobytes())
    return sha.hexdigest()


def prepare_data(settings: Settings, env: Env):
    """Make the default conversations if they are missing, by the command that a reader would type."""
    if Path(settings.data) == Path(Settings.data) and not Path(settings.data).exists():
        env.say(f"no conversations in {settings.data} yet: python sft.py --make_data")
        stdlib_chat.write_conversations(settings.data)


class Base(NamedTuple):
    """What the model was before."""
    max_seq_len: int
    tokenizer: Tokenizer


def start(settings: Settings, template: Template, env: Env) -> tuple[Transformer, Tokenizer, Base]:
    """The model of init_from with the template's tokens and room for seq_len tokens; and what it was."""
    model, tokenizer = load_model(settings.init_from)
    if tokenizer is None:
        raise UserError(f"{settings.init_from} has no tokenizer.json that can be read; conversations cannot "
                        f"be written for it")
    grown = with_chat_tokens(tokenizer, template)
    if grown.vocab_size > model.config.vocab_size:
        new = [token for token in grown.special_tokens if token not in tokenizer.special_tokens]
        env.say(f"new tokens: {' '.join(new)}; the embedding grows from {model.config.vocab_size:,} to "
                f"{grown.vocab_size:,} rows")
        extend_embedding(model, grown.vocab_size)
    limit = model.config.max_seq_len
    if settings.seq_len > limit:
        if settings.rope_scaling is None:
            raise UserError(f"seq_len {settings.seq_len} exceeds max_seq_len {limit} of "
                            f"{settings.init_from}; pass a shorter --seq_len, or a --rope_scaling")
        model.config = model.model.config = extended(model.config, settings.rope_scaling,
                                                     settings.seq_len / limit)
        env.say(f"reads {settings.seq_len} tokens instead of {limit}, by the rule {settings.rope_scaling}")
    grown.chat_template, grown.eos_token = jinja(template), template.end
    return model, grown, Base(limit, tokenizer)


def read_splits(settings: Settings, env: Env) -> dict[str, list[dict]]:
    """{"train", "val"}: the conversations of --data; of a single file every so manieth is held out."""
    place, read = Path(settings.data), []
    files = [place / "train.jsonl", place / "val.jsonl"] if place.is_dir() else [place]
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no {file}; --data is a file of conversations, or a folder with "
                            f"train.jsonl and val.jsonl")
    with contextlib.redirect_stdout(None) if env.rank else contextlib.nullcontext():
        read = [list(read_conversations(file)) for file in files]
    if len(read) == 2:
        return {"train": read[0], "val": read[1]}
    held_out = np.random.default_rng(0).permutation(len(read[0])) < settings.val_share * len(read[0])
    if held_out.all() or not held_out.any():
        raise UserError(f"{place} has {len(read[0])} conversations, too few to hold out a share of "
                        f"{settings.val_share}; give more, or another --val_share")
    return {"train": [c for c, out in zip(read[0], held_out) if not out],
            "val": [c for c, out in zip(read[0], held_out) if out]}


def pack(settings: Settings, conversations: dict[str, list[dict]], tokenizer: Tokenizer, template: Template,
         base: Base, env: Env) -> tuple[Batches, dict[str, Batches]]:
    """(batches, {"": held-out conversations, "plain_": held-out plain text, in windows as the base read})."""
    place = {"rank": env.data_rank, "world_size": env.data_world_size}
    size = (micro_batch(settings, env), settings.seq_len)
    packed = {}
    for split, chosen in conversations.items():
        examples = examples_of(chosen, tokenizer, template, settings, env.say)
        learnt = sum(len(tokenizer.decode_bytes([id for id, m in zip(ids, mask) if m]))
                     for ids, mask in examples)
        packed[split] = Packed(examples, *size, settings.seed, **place, text_bytes=learnt)
        env.say(f"{split}: {len(examples):,} conversations in {packed[split].windows:,} windows of "
                f"{settings.seq_len} tokens, {1 - packed[split].used:.1%} padding")
    batches, validation = packed["train"], {"": packed["val"]}
    if settings.replay:
        old = PlainText(settings.replay, "train", *size, settings.seed, **place, verify=env.rank == 0)
        batches.meta = {"tokenizer": base.tokenizer.fingerprint}  # ids of plain text are as they were
        batches = Replay(batches, old, settings.replay_share)
        validation["plain_"] = PlainText(settings.replay, "val", size[0], base.max_seq_len,
                                         stride=max(1, base.max_seq_len // 2), **place, verify=env.rank == 0)
    return batches, validation


# ------------------------------------------------------------------------------------------------------------
# Before and after


def questions_of(conversations: Sequence[dict], number: int) -> list[dict]:
    """So many of the conversations, spread over all of them."""
    return [conversations[i] for i in np.linspace(0, len(conversations) - 1, min(number, len(conversations)),
                                                  dtype=int)] if number else []


def reply_to(asked: Sequence[dict], model: Transformer, tokenizer: Tokenizer, template: Template,
             env: Env) -> list[tuple[str, bool]]:
    """The model's own last reply in each conversation, and whether it ended by itself."""
    model.to(env.device).eval()
    prompts = [render(conversation["messages"][:-1], tokenizer, True, template)[0] for conversation in asked]
    return answers(model, prompts, tokenizer, [tokenizer.special_tokens[template.end]], max_new_tokens=200)


def compare(before: dict, replied: list, last: dict, asked: Sequence[dict], settings: Settings, env: Env):
    """Print the table of before and after, and a few replies side by side."""
    model, tokenizer = load_model(settings.out)
    now = reply_to(asked, model, tokenizer, TEMPLATES[settings.template], env)
    rows = [("loss on replies, nats a token", before[""]["loss"], last["val_loss_nats_per_token"])]
    if "plain_" in before:
        rows.append(("plain text, bits per byte", before["plain_"]["bits_per_byte"],
                     last["plain_val_bits_per_byte"]))
    scores = score(asked, replied), score(asked, now)
    rows += [(LABELS[name], scores[0][name], scores[1][name]) for name in scores[0]]
    print(f"{'held out':<40}{'before':>10}{'after':>10}")
    for label, old, new in rows:
        print(f"{label:<40}{old:>10.4f}{new:>10.4f}")
    for i in np.linspace(0, len(asked) - 1, min(5, len(asked)), dtype=int):
        question, truth = asked[i]["messages"][-2]["content"], asked[i]["messages"][-1]["content"]
        print(f"{'-' * 80}\n{question}\n>>> before: {replied[i][0]!r:.200}\n>>> after:  {now[i][0]!r}\n"
              f">>> author: {truth!r}")
    print(f"model: {settings.out}")


LABELS = {"f1": "descriptions, F1 of words", "exact_match": "descriptions, exact matches",
          "compiles": "bodies that compile()", "stops": "replies that end by themselves"}


if __name__ == "__main__":
    run(main)
