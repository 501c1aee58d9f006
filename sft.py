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
import functools
import hashlib
import math
import re
import sys
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import stdlib_chat
from adapters import Adapter, add_adapter, open_model
from attention import Mask
from batches import IGNORE, SPLITS, Batches
from bpe import Tokenizer
from chat import TEMPLATES, Template, jinja, read_conversations, render, with_chat_tokens
from checkpoint import read_json
from config import UserError, parse, require, run
from lora import base_of
from metaspace import load_tokenizer
from mixture import Replay
from model import ModelConfig, Transformer, extend_embedding, generate
from objectives import next_token_loss
from parallel import Env
from positions import extended
from quantize import load_base
from survive import in_run_folder
from train import Loop, evaluate, guarded, micro_batch, steps_of, train
from watch import spent, write_results

Example = tuple[list[int], list[bool]]  # ids of a conversation and its mask, as `render` gives them

# ------------------------------------------------------------------------------------------------------------
# 1. Packing


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which examples share a window of `room` tokens: longest first, each into the fullest that has room.

    Best-fit decreasing (Johnson 1973; for language models Ding et al. 2024, section 3): all but a few per
    cent of the windows' tokens are used, and no example is cut. Takes lengths of at most `room` each. Returns
    lists of indices into lengths, one a window.
    """
    windows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, window), ascending
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, (lengths[example],))  # the least that is enough
        if at == len(rooms):
            rooms.append((room, len(windows)))
            windows.append([])
        left, window = rooms.pop(at)
        windows[window].append(example)
        insort(rooms, (left - lengths[example], window))
    return windows


class Packed(Batches):
    """Windows of T = seq_len tokens with whole conversations: as Batches, but `rows` are of three tensors.

    inputs, targets, documents: (B, T) int64 each. A conversation of n + 1 tokens takes n places: its last
    token is a target alone. targets: the ids one further on, -100 where those carry no loss. documents: 1, 2,
    … in a window, 0 on what is left over, which is filled with the id 0 and has no targets.
    padding: the share of that. tokens: those that carry loss.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seq_len: int, seed: int = 0,
                 rank: int = 0, world_size: int = 1):
        """examples: of 2 to seq_len + 1 tokens each, at least one."""
        self.examples = [(np.array(ids), np.array(mask)) for ids, mask in examples]
        self.packs = best_fit([len(ids) - 1 for ids, _ in examples], seq_len)
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.rank, self.world_size = rank, world_size
        self.windows = len(self.packs)
        self.steps = -(-self.windows // (batch_size * world_size))
        self.tokens = sum(int(mask[1:].sum()) for _, mask in self.examples)
        self.padding = 1 - sum(len(ids) - 1 for ids, _ in examples) / (self.windows * seq_len)
        self._epoch, self._order = None, None

    def stack(self, windows: Sequence[int]):
        inputs = np.zeros((len(windows), self.seq_len), dtype=np.int64)  # (B, T)
        targets, documents = np.full_like(inputs, IGNORE), np.zeros_like(inputs)
        for row, window in enumerate(windows):
            start = 0
            for number, example in enumerate(self.packs[window] if window < self.windows else (), start=1):
                ids, mask = self.examples[example]
                end = start + len(ids) - 1
                inputs[row, start:end] = ids[:-1]
                targets[row, start:end] = np.where(mask[1:], ids[1:], IGNORE)  # a mask is aligned to its ids
                documents[row, start:end] = number
                start = end
        return tuple(map(torch.from_numpy, (inputs, targets, documents)))


class PlainText(Batches):
    """Batches whose windows are one document each: what stands beside Packed in a batch."""

    def stack(self, windows: Sequence[int]):
        inputs, targets = super().stack(windows)
        return inputs, targets, torch.zeros_like(inputs)


def reply_loss(model: Transformer, batch: tuple[Tensor, Tensor, Tensor],
               chunked: bool = True) -> tuple[Tensor, Tensor]:
    """next_token_loss in which no document sees another: (sum in nats, how many targets).

    batch: inputs, targets, documents, (B, T) each. Positions start anew in each document (Mask sees to it).
    """
    inputs, targets, documents = batch
    return next_token_loss(model, (inputs, targets, Mask(documents=documents)), chunked, sparse=True)


# ------------------------------------------------------------------------------------------------------------
# 2. What is learnt, and by which weights


def examples_of(conversations: Sequence[dict], tokenizer: Tokenizer, template: Template, seq_len: int,
                loss_on_prompts: bool = False,
                say: Callable = print) -> tuple[list[dict], list[Example]]:
    """(the conversations that fit into a window of seq_len tokens, their ids and masks).

    loss_on_prompts: learn all that is said, by whomever. Says how many do not fit; UserError where none does.
    """
    kept, examples = [], []
    for conversation in tqdm(conversations, desc="render", unit="conversation", leave=False, disable=None):
        ids, mask = render(conversation["messages"], tokenizer, template=template)
        if len(ids) <= seq_len + 1:
            kept.append(conversation)
            examples.append((ids, [True] * len(ids) if loss_on_prompts else mask))
    dropped = len(conversations) - len(kept)
    if not kept:
        raise UserError(f"none of the {dropped:,} conversations fits into --seq_len {seq_len} tokens; pass a "
                        f"larger one")
    if dropped:
        say(f"dropped: {dropped:,} of {len(conversations):,} conversations, longer than {seq_len} tokens; a "
            f"longer --seq_len keeps more")
    return kept, examples


def show_masks(examples: Sequence[Example], tokenizer: Tokenizer) -> None:
    """Print conversations, what is learnt in green (between » and « where the output is no terminal)."""
    begin, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("»", "«")
    for ids, mask in examples:
        for learnt, pairs in groupby(zip(ids, mask), key=lambda pair: pair[1]):
            piece = tokenizer.decode([id for id, _ in pairs])
            print(f"{begin}{piece}{end}" if learnt else piece, end="")
        print(f"\n{'-' * 80}")


def choose_trained(model: Transformer, which: str) -> str:
    """Freeze all weights but those that `which` names; returns a line that says how many these are.

    which: "all", "norms", "embeddings" (the head too), or "lastN": the last N blocks, final norm and head
    (unless that is tied to the embedding). Where the embedding is frozen, new tokens stay alike in it.
    """
    n, number = model.config.n_layers, re.fullmatch(r"last([1-9]\d*)", which)
    trained = {"all": r"", "norms": r"norm\.", "embeddings": r"embed_tokens|lm_head"}.get(which)
    if number and int(number[1]) <= n:
        blocks = "|".join(rf"layers\.{i}\." for i in range(n - int(number[1]), n))
        trained = rf"{blocks}|^model\.norm|lm_head"
    if trained is None:
        raise UserError(f"--train_layers {which} is not all, norms, embeddings, or last1 to last{n}")
    for name, p in model.named_parameters():
        p.requires_grad = bool(re.search(trained, name))
    some = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"trained: {which}, {some:,} of {sum(p.numel() for p in model.parameters()):,} parameters"


def add_noise(model: Transformer, alpha: float) -> None:
    """Add uniform noise to the embeddings while the model trains (NEFTune, Jain et al. 2023, algorithm 1).

    Of up to alpha / sqrt(T C) either way; T: tokens of a window, there of a padded batch.
    """
    def noisy(module, ids, x: Tensor) -> Tensor:
        bound = alpha / math.sqrt(x.size(1) * x.size(2))  # x: (B, T, C)
        return x + torch.empty_like(x).uniform_(-bound, bound) if module.training else x
    model.model.embed_tokens.register_forward_hook(noisy)


# ------------------------------------------------------------------------------------------------------------
# 3. What has been learnt


def answers(model: Transformer, prompts: Sequence[list[int]], tokenizer: Tokenizer, stop_ids: Sequence[int],
            max_new_tokens: int = 200, repetition_penalty: float = 1.0,
            batch_size: int = 32) -> list[tuple[str, bool]]:
    """(reply, whether it ended by itself) to each prompt, greedily, of at most max_new_tokens.

    repetition_penalty: as of generate; what a small model finds likeliest is often one phrase for ever.
    Prompts of like length share a batch. One that leaves less room than that is answered alone, or its batch
    would have no more room than it.
    """
    limit = model.config.max_seq_len
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    roomy = sum(len(prompt) + max_new_tokens <= limit for prompt in prompts)  # so many come first
    starts = [*range(0, roomy, batch_size), *range(roomy, len(order)), len(order)]
    replies: list[tuple[str, bool]] = [("", False)] * len(prompts)
    for start, stop in tqdm(list(pairwise(starts)), desc="answer", unit="batch", leave=False, disable=None):
        batch = [prompts[i] for i in order[start:stop]]
        room = min(max_new_tokens, limit - len(batch[-1]))
        sample = generate(model, batch, room, temperature=0, stop_ids=stop_ids,
                          repetition_penalty=repetition_penalty)
        for i, ids, length in zip(order[start:stop], sample.ids.tolist(), sample.lengths.tolist()):
            stopped = ids[length - 1] in stop_ids
            replies[i] = spoken(ids[:length - stopped], tokenizer), stopped
    return replies


def spoken(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of ids that a model has drawn; a row of its head that no token has stands for nothing."""
    return tokenizer.decode([id for id in ids if id in tokenizer.vocab])


def words(text: str) -> list[str]:
    """The words of a text in lower case; where it has none, the text itself."""
    return re.findall(r"\w+", text.lower()) or [text]


def f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, each counted as often as it occurs.

    SQuAD's measure (Rajpurkar et al. 2016), but articles count like any word. By hand: "a b b" for "b c" has
    precision 1/3 and recall 1/2, so 2/5.
    """
    a, b = Counter(words(answer)), Counter(words(truth))
    return 2 * (a & b).total() / (a.total() + b.total())


MEASURES = {"f1": "replies, F1 of words", "exact_match": "replies, exact matches of words",
            "compiles": "bodies that compile()", "stops": "replies that end by themselves"}


def score(conversations: Sequence[dict], replies: Sequence[tuple[str, bool]]) -> dict[str, float]:
    """The MEASURES of replies to conversations, each the mean over those it has a meaning for, 0 to 1.

    What a function's body should be nobody knows, only whether Python takes it: a conversation of the task
    "write" has `compiles` in place of F1 and exact match.
    """
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    for conversation, (reply, stopped) in zip(conversations, replies, strict=True):
        truth = conversation["messages"][-1]["content"]
        values["stops"].append(stopped)
        if stdlib_chat.asks_for_body(conversation):
            whole = stdlib_chat.assemble(conversation["code"], reply)
            values["compiles"].append(bool(reply.strip()) and stdlib_chat.compiles(whole))
        else:
            values["f1"].append(f1(reply, truth))
            values["exact_match"].append(words(reply) == words(truth))
    return {name: sum(found) / len(found) for name, found in values.items() if found}


FEW_SHOT_FORMS = ("{question}\n# {answer}", "Code:\n{question}\nDescription: {answer}",
                  '{question}\n"""{answer}', "# What does this function do?\n{question}\n# Answer: {answer}")


def best_few_shot(model: Transformer, was: ModelConfig, tokenizer: Tokenizer, asked: Sequence[dict],
                  known: Sequence[dict], repetition_penalty: float = 1.0) -> str:
    """A line with the F1 of a base model, which can do no more than go on with a list of answered questions.

    Form, number of answered questions (of `known`) and config (as it `was`, or as it is) are those that are
    best on the very questions that are scored: if anything, too good. An answer is its first line.
    """
    def entry(form: str, conversation: dict, answer: str) -> str:
        question = conversation.get("code", conversation["messages"][-2]["content"])
        return form.replace("{question}", question).replace("{answer}", answer)
    asked = [conversation for conversation in asked if conversation.get("task") != "write"]
    known = sorted((conversation for conversation in known if conversation.get("task") != "write"),
                   key=lambda conversation: len(str(conversation["messages"])))[::50]  # short, not all alike
    best = (0.0, "any of them")
    configs = [was, model.config] if model.config != was else [was]
    for config, form, shots in product(configs, FEW_SHOT_FORMS if asked else (), (0, 1, 3)):
        shown = "".join(entry(form, one, one["messages"][-1]["content"]) + "\n\n\n" for one in known[:shots])
        prompts = [tokenizer.encode(shown + entry(form, one, "").rstrip(" ")) for one in asked]
        new = min(40, config.max_seq_len // 2)
        with configured(model, config):
            replies = answers(model, [ids[new - config.max_seq_len:] for ids in prompts], tokenizer, (), new,
                              repetition_penalty)
        first_lines = [(reply.strip().split("\n")[0], stopped) for reply, stopped in replies]
        how = f"{form!r}, {shots} answered before it, in {config.max_seq_len} tokens"
        best = max(best, (score(asked, first_lines)["f1"], how))
    return f"F1 of the model as it was, at the best of its few-shot prompts: {best[0]:.4f} ({best[1]})"


@contextlib.contextmanager
def configured(model: Transformer, config: ModelConfig):
    """The model with another config of the same weights (how far it reads), for a while."""
    own = model.config
    model.config = model.model.config = config
    try:
        yield
    finally:
        model.config = model.model.config = own


# ------------------------------------------------------------------------------------------------------------
# 4. The command


@dataclass
class Settings(Loop, Adapter):
    init_from: str = "runs/base"  # model folder to begin with, ours or a downloaded one
    data: str = "runs/chat"  # conversations: a file, or a folder with train.jsonl and val.jsonl; the default
                             # folder is made if missing
    out: str = "runs/sft"  # run folder; an unfinished run goes on
    overwrite: bool = False  # delete what is in `out` and start anew
    make_data: bool = False  # only write the default conversations, into `data`
    on_bad_line: Literal["stop", "skip"] = "stop"  # a line that is no conversation: stop, or skip and count
    val_share: float = 0.05  # of a single file of conversations, held out
    template: Literal["chatml", "llama3", "qwen", "qwen3"] = "chatml"  # how a conversation is written
    rope_scaling: Literal["linear", "ntk", "dynamic", "yarn", "llama3"] | None = "yarn"  # the rule by which a
        # model reads further than its max_seq_len, where seq_len is longer; none: it shall not
    epochs: float = 1.75  # how often each conversation is seen
    steps: int | None = None  # updates; none: as many as the epochs take
    seq_len: int = 256  # tokens a window; a longer conversation is dropped, and counted
    batch_size: int = 16  # windows a step
    lr: float = 0.015  # peak learning rate of the matrices in blocks
    adam_lr: float = 3e-3  # of embedding, head and norms
    replay: str | None = "runs/data"  # token shards of plain text, against forgetting; none: none
    replay_share: float = 0.15  # of the windows; 0: only watched
    train_layers: str = "all"  # all, norms, embeddings (head included), or lastN: the last N blocks and head
    neftune: float = 0.0  # noise on embeddings in training (5 to 15 are usual; Jain et al. 2023); 0: none
    loss_on_prompts: bool = False  # learn what the user says, too
    show_mask: int = 0  # first print so many conversations, with what is learnt of them in green
    questions: int = 200  # held-out questions to answer before and after; 0: none
    repetition_penalty: float = 1.15  # of all those answers (Keskar et al. 2019); 1: none
    few_shot: bool = False  # also score the model as it was, asked in its best few-shot form (minutes)

    free = {"val_share", "on_bad_line", "make_data", "show_mask", "questions", "repetition_penalty",
            "few_shot"}  # as train.FREE

    def __post_init__(self):
        require(self, epochs=(0.001, 1000), replay_share=(0, 0.99), neftune=(0, 1000), show_mask=(0, None),
                questions=(0, None), val_share=(0.001, 0.5), repetition_penalty=(1, 1000))
        self.check_loop()
        self.check_adapter()
        self.check_val_share()
        if self.lora_rank and self.train_layers != "all":
            raise UserError(f"--train_layers {self.train_layers} and --lora_rank {self.lora_rank}: beside "
                            f"adapters all layers are frozen; leave one of them out")


def main():
    settings = parse(Settings)
    if settings.make_data:
        make_data(settings)
    else:
        guarded(settings, fine_tune)


def fine_tune(settings: Settings, env: Env):
    """The stage on one process: refuse what is wrong, make what is missing, train, compare."""
    template = TEMPLATES[settings.template]
    model, known = base_model(settings)
    model, tokenizer = with_template(model, known, template, env)
    was = model.config  # how far it read
    prepare_data(settings, env)
    model.config = model.model.config = reading_further(was, settings, env)
    conversations, examples = read_splits(settings, env), {}
    for split in conversations:
        conversations[split], examples[split] = examples_of(
            conversations[split], tokenizer, template, settings.seq_len, settings.loss_on_prompts, env.say)
    batches, validation = pack(settings, examples, tokenizer, template, was.max_seq_len, env)
    settings.steps = steps_of(settings, batches.windows, env)
    new = sorted(id for token, id in tokenizer.special_tokens.items() if token not in known.special_tokens)
    env.say(add_adapter(model, settings, new) if settings.lora_rank else
            choose_trained(model, settings.train_layers))
    if settings.neftune:
        add_noise(model, settings.neftune)
    if env.rank == 0:
        show_masks(examples["train"][:settings.show_mask], tokenizer)
    asked, before = spread(conversations["val"], settings.questions), {}
    with in_run_folder(settings, env):  # last of all that can refuse: --overwrite deletes here
        model.to(env.device)
        loss_fn = functools.partial(reply_loss, chunked=settings.chunked_loss)
        before["loss"] = evaluate(model, validation[""], loss_fn, env)["loss"]
        if settings.replay:
            with configured(model, was):
                before["plain"] = evaluate(model, validation["plain_"], loss_fn, env)["bits_per_byte"]
        if settings.few_shot:
            env.first(lambda: print(best_few_shot(model, was, tokenizer, asked, conversations["train"],
                                                  settings.repetition_penalty)), patient=True)
        env.first(lambda: before.update(replies=reply_to(asked, model, tokenizer, settings)), patient=True)
        last = train(model, batches, loss_fn, settings, env, tokenizer, validation,
                     identity(settings, batches) | {"base": base_of(model).get("sha256")})
        env.first(lambda: compare(before, last, asked, settings, env), patient=True)


def prepare_data(settings: Settings, env: Env):
    """Make the default conversations if they are missing; do without the default plain text if that is."""
    if Path(settings.data) == Path(Settings.data):
        env.first(lambda: Path(settings.data).exists() or make_data(settings), patient=True)
    if settings.replay == Settings.replay and not Path(settings.replay).exists():
        env.say(f"there is no {settings.replay}: no plain text is replayed, and forgetting is not measured")
        settings.replay = None


def make_data(settings: Settings):
    """Write the default conversations; those of modules that were held out from the plain text are, too."""
    meta = Path(settings.replay or Settings.replay) / "meta.json"
    split = read_json(meta).get("settings", {}) if meta.is_file() else {}
    stdlib_chat.write_conversations(settings.data, settings.overwrite and settings.make_data,
                                    val_fraction=split.get("val_fraction", data.Settings.val_fraction))


def base_model(settings: Settings) -> tuple[Transformer, Tokenizer]:
    """The model of init_from and its tokenizer, without which no conversation can be written."""
    if settings.init_from == Settings.init_from and not Path(settings.init_from).exists():
        raise UserError(f"there is no {settings.init_from}, the model to begin with; make it with: python "
                        f"train.py, or name one with --init_from")
    model, tokenizer = load_base(settings.init_from, settings.quantize)
    if tokenizer is None:
        raise UserError(f"{settings.init_from} has no tokenizer.json that can be read, and conversations "
                        f"cannot be written without it; choose another --init_from")
    return model, tokenizer


def with_template(model: Transformer, tokenizer: Tokenizer, template: Template,
                  env: Env) -> tuple[Transformer, Tokenizer]:
    """(model, tokenizer), made to know the template's tokens if they do not: the embedding grows."""
    grown = with_chat_tokens(tokenizer, template)
    new = [token for token in grown.special_tokens if token not in tokenizer.special_tokens]
    if new:
        rows = model.config.vocab_size
        extend_embedding(model, grown.vocab_size)
        env.say(f"new tokens: {' '.join(new)}; the embedding has {model.config.vocab_size:,} rows, of which "
                f"{model.config.vocab_size - rows} are new")
    grown.chat_template, grown.eos_token = jinja(template), template.end  # go into the model's folder
    return model, grown


def reading_further(config: ModelConfig, settings: Settings, env: Env) -> ModelConfig:
    """The config, made to read windows of seq_len if it does not."""
    limit = config.max_seq_len
    if settings.seq_len <= limit:
        return config
    if settings.rope_scaling is None:
        raise UserError(f"seq_len {settings.seq_len} exceeds max_seq_len {limit} of {settings.init_from}; "
                        f"pass a shorter --seq_len, or a --rope_scaling")
    env.say(f"reads {settings.seq_len} tokens instead of {limit}, by the rule {settings.rope_scaling}")
    return extended(config, settings.rope_scaling, settings.seq_len / limit)


def read_splits(settings: Settings, env: Env) -> dict[str, list[dict]]:
    """{"train", "val"}: the conversations of --data; of a single file a share drawn by lot is held out."""
    place = Path(settings.data)
    files = [place / f"{split}.jsonl" for split in SPLITS] if place.is_dir() else [place]
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no {file}; --data is a file of conversations, or a folder with "
                            f"train.jsonl and val.jsonl")
    with contextlib.redirect_stdout(None) if env.rank else contextlib.nullcontext():
        read = [list(read_conversations(file, settings.on_bad_line)) for file in files]
    if len(read) == 1:
        read = held_out(read[0], settings.val_share, place)
    return dict(zip(SPLITS, read))


def held_out(items: list, share: float, place: Path) -> tuple[list, list]:
    """(the items to train on, a share of them held out), drawn by lot, always the same."""
    out = np.random.default_rng(0).permutation(len(items)) < share * len(items)
    if out.all():
        raise UserError(f"{place} has {len(items)} to learn from, too few to hold out a share of {share}; "
                        f"give more, or another --val_share")
    return tuple([item for item, is_out in zip(items, out) if is_out == wanted] for wanted in (False, True))


def pack(settings: Settings, examples: dict[str, list[Example]], tokenizer: Tokenizer, template: Template,
         reach: int, env: Env) -> tuple[Batches, dict[str, Batches]]:
    """(batches, {"": held-out conversations, "plain_": held-out plain text}).

    reach: tokens of a window of that plain text: as many as the base model read.
    """
    place = {"rank": env.data_rank, "world_size": env.data_world_size}
    size, verify = (micro_batch(settings, env), settings.seq_len), env.rank == 0
    packed = pack_splits(settings, examples, env)
    batches, validation = packed["train"], {"": packed["val"]}
    packed["val"].text_bytes = learnt_bytes(examples["val"], tokenizer)
    if settings.replay:
        old = PlainText(settings.replay, "train", *size, settings.seed, **place, verify=verify)
        check_tokenizer(settings, old, tokenizer, template)
        batches.meta = old.meta  # ids of plain text are the same
        batches = Replay(batches, old, settings.replay_share)
        validation["plain_"] = PlainText(settings.replay, "val", size[0], reach, **place, verify=verify)
    return batches, validation


def pack_splits(settings, examples: dict[str, list[Example]], env: Env) -> dict[str, Packed]:
    """Each split's examples in windows, of which this process has its part; says how full they are."""
    packed = {split: Packed(chosen, micro_batch(settings, env), settings.seq_len, settings.seed,
                            env.data_rank, env.data_world_size) for split, chosen in examples.items()}
    for split, batches in packed.items():
        env.say(f"{split}: {len(batches.examples):,} conversations in {batches.windows:,} windows of "
                f"{settings.seq_len} tokens, {batches.padding:.1%} padding")
    return packed


def learnt_bytes(examples: Sequence[Example], tokenizer: Tokenizer) -> int:
    """Bytes of UTF-8 of the text that carries loss, for bits per byte; a control token is no text."""
    control = set(tokenizer.special_tokens.values())
    learnt = ([id for id, bit in zip(ids, mask) if bit and id not in control] for ids, mask in examples)
    return sum(len(tokenizer.decode_bytes(ids)) for ids in learnt)


def check_tokenizer(settings: Settings, old: Batches, tokenizer: Tokenizer, template: Template):
    """Raise UserError unless the plain text's tokenizer is the model's, but for the template's tokens."""
    known = load_tokenizer(Path(settings.replay) / "tokenizer.json")
    same = with_chat_tokens(known, template).fingerprint == tokenizer.fingerprint
    if not same or known.fingerprint != old.meta["tokenizer"]:
        raise UserError(f"--replay {settings.replay} was made with another tokenizer than that of "
                        f"{settings.init_from}; make it anew: python data.py --tokenizer "
                        f"{settings.init_from}, or pass --replay none")


def identity(settings: Settings, batches: Batches) -> dict:
    """Of what a run is made beside its settings: an unfinished one goes on only where this is equal."""
    learnt = hashlib.sha256()
    for ids, mask in batches.examples:
        learnt.update(ids.astype("<i8").tobytes() + mask.tobytes())
    replayed = batches.old.meta["train"]["sha256"] if settings.replay else None
    return {"conversations": learnt.hexdigest(), "replay": replayed,
            "init_from": str(Path(settings.init_from).resolve())}


# ------------------------------------------------------------------------------------------------------------
# 5. Before and after


def spread(items: Sequence, number: int) -> list:
    """At most so many of the items, from first to last at equal distances."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(number, len(items)), dtype=int)]


def reply_to(asked: Sequence[dict], model: Transformer, tokenizer: Tokenizer,
             settings: Settings) -> list[tuple[str, bool]]:
    """The model's own last reply in each conversation, and whether it ended by itself."""
    template = TEMPLATES[settings.template]
    prompts = [render(conversation["messages"][:-1], tokenizer, True, template)[0] for conversation in asked]
    longest = min(200, model.config.max_seq_len // 2)  # most prompts leave room for that, and share batches
    return answers(model.eval(), prompts, tokenizer, [tokenizer.special_tokens[template.end]], longest,
                   settings.repetition_penalty)


def side_by_side(asked: Sequence[dict], before: Sequence[tuple[str, bool]],
                 after: Sequence[tuple[str, bool]]) -> list[dict]:
    """Five of the questions, with the answers before and after and the author's; prints them."""
    samples = []
    for conversation, old, new in spread(list(zip(asked, before, after)), 5):
        question, truth = (message["content"] for message in conversation["messages"][-2:])
        samples.append({"prompt": question, "before": old[0], "after": new[0], "author": truth})
        print(f"{'-' * 80}\n{question}\n>>> before: {old[0]!r:.200}\n>>> after:  {new[0]!r:.200}\n"
              f">>> author: {truth!r:.200}")
    return samples


def compare(before: dict, last: dict, asked: Sequence[dict], settings: Settings, env: Env):
    """Print and write the table of before and after, and a few replies. last: the log's last line."""
    model, tokenizer = open_model(settings.out, env.device)
    replies = reply_to(asked, model, tokenizer, settings)
    rows = [("loss on replies, nats a token", before["loss"], last["val_loss_nats_per_token"])]
    if "plain" in before:
        rows.append(("plain text, bits per byte", before["plain"], last["plain_val_bits_per_byte"]))
    scores = score(asked, before["replies"]), score(asked, replies)
    rows += [(MEASURES[name], scores[0][name], scores[1][name]) for name in scores[0]]
    print(f"{'held out':<40}{'before':>10}{'after':>10}")
    for label, old, new in rows:
        print(f"{label:<40}{old:>10.4f}{new:>10.4f}")
    write_results(settings.out, {label: {"before": old, "after": new, "note": ""} for label, old, new in rows}
                  | {"samples": side_by_side(asked, before["replies"], replies)})
    print(f"{'-' * 80}\n{spent(Path(settings.out), last)}\nmodel: {settings.out}")


if __name__ == "__main__":
    run(main)
