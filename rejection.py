"""Rejection sampling: ask a model several times; a rule that can be checked says which answers are best.

    python dpo.py --make_pairs --init_from runs/sft       # runs/pairs: pairs for DPO, and the best for SFT
    python rejection.py --models runs/sft runs/dpo        # what models are worth by the same rule

For each prompt k samples at temperature 1 are scored by `quality`. Best against worst, where they lie apart
by a margin, makes a preference; the best alone makes a conversation for SFT (best-of-k; Touvron et al. 2023,
https://arxiv.org/abs/2307.09288, section 3.2.3; Llama Team 2024, https://arxiv.org/abs/2407.21783, section
4.2.2). No person and no reward model has a say: what the rule does not see, it does not teach.
answers.py asks a teacher in the same way.

A folder of pairs: train.jsonl and val.jsonl (preferences), best/ (conversations, the same split),
questions.jsonl (all held-out prompts, with the author's answers), samples.jsonl (all samples and scores) and
made.json. Killed, it goes on after the last whole batch of samples; several processes share the batches.
"""
import contextlib
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

import stdlib_chat
from adapters import open_model
from batches import SPLITS
from bpe import Tokenizer
from chat import TEMPLATES, read_conversations, render
from checkpoint import read_json
from config import UserError, file_checksum, open_whole, parse, require, run
from documents import stored_documents, write_documents
from generation import Packed
from model import Transformer, generate
from parallel import Env
from sft import MEASURES, f1, reply_to, score, spoken, spread
from survive import alone
from work import Work, fingerprint

# ------------------------------------------------------------------------------------------------------------
# 1. Which answer is better


def quality(conversation: dict, reply: str, ended: bool) -> float:
    """How good a reply is, from 0 to 1, by what a program can check; conversation: with the author's answer.

    Of the task "write" (a function's body) the mean of three: it compiles, it ends by itself, and the share
    of the function's arguments that it uses. Of all else the F1 of words with the author's answer, and 0 for
    an answer that does not end.
    """
    if stdlib_chat.asks_for_body(conversation):
        used = stdlib_chat.used_arguments(conversation["code"], reply)  # None: it does not compile
        return (ended + (used is not None) + (used or 0.0)) / 3
    return f1(reply, conversation["messages"][-1]["content"]) if ended else 0.0


def preference(conversation: dict, samples: Sequence[dict], margin: float,
               chosen: str = "best") -> dict | None:
    """The pair that samples of one prompt make: best against worst. None if less than `margin` apart.

    samples: {"text", "ended", "score"} each. Of equal scores the first counts. chosen: "author" takes the
    conversation's own answer (score 1) in the best sample's place.
    """
    best = max(samples, key=lambda sample: sample["score"])
    worst = min(samples, key=lambda sample: sample["score"])
    if chosen == "author":
        best = {"text": conversation["messages"][-1]["content"], "score": 1.0}
    if best["score"] - worst["score"] < margin or best["text"] == worst["text"] or not worst["text"].strip():
        return None
    *prompt, _ = conversation["messages"]
    return {"prompt": prompt, "chosen": best["text"], "rejected": worst["text"],
            "scores": [best["score"], worst["score"]]}


def best_answer(conversation: dict, samples: Sequence[dict]) -> dict | None:
    """The conversation with the best of the samples as its answer; None where all are worth nothing."""
    best = max(samples, key=lambda sample: sample["score"])
    if not best["score"] or not best["text"].strip() or not best["ended"]:
        return None
    return with_answer(conversation, best["text"])


def with_answer(conversation: dict, text: str) -> dict:
    """The conversation with a model's answer in the author's place."""
    answer = {"role": "assistant", "content": text}
    return {**conversation, "messages": [*conversation["messages"][:-1], answer]}


# ------------------------------------------------------------------------------------------------------------
# 2. Samples


def sample_replies(model: Transformer, prompts: Sequence[list[int]], tokenizer: Tokenizer, stop_id: int,
                   samples: int, max_new_tokens: int, temperature: float = 1.0,
                   generator: torch.Generator | None = None) -> list[list[dict]]:
    """{"text", "ended", "logp", "ids"} of `samples` replies to each prompt, drawn together.

    logp: of the reply's ids, its end token included, summed, in nats, at this temperature. prompts: each
    leaves the model room for at least a token; replies are no longer than the longest prompt leaves room for.
    """
    room = min(max_new_tokens, model.config.max_seq_len - max(map(len, prompts)))
    rows = [prompt for prompt in prompts for _ in range(samples)]
    drawn = generate(model, rows, room, temperature=temperature, stop_ids=[stop_id], generator=generator)
    replies = []
    for ids, length, logps in zip(drawn.ids.tolist(), drawn.lengths.tolist(), drawn.logps):
        ended = ids[length - 1] == stop_id
        replies.append({"text": spoken(ids[:length - ended], tokenizer), "ended": ended,
                        "logp": logps[:length].sum().item(), "ids": ids[:length]})
    return [replies[i:i + samples] for i in range(0, len(replies), samples)]


@dataclass
class Sampling:
    """How pairs are made: settings that dpo.py inherits."""
    prompts_data: str = "runs/chat"  # whose prompts are asked: a folder with train.jsonl and val.jsonl
    prompts: int = 2000  # so many of them, evenly from all; and all that are held out
    samples: int = 8  # answers to each prompt
    temperature: float = 1.0  # of the answers
    max_new_tokens: int = 100  # of an answer
    margin: float = 0.2  # best and worst make a pair if their scores, 0 to 1, lie so far apart
    chosen: Literal["best", "author"] = "best"  # chosen is the best sample, or the author's own answer
    prompts_at_once: int = 32  # prompts whose answers are drawn together

    def check_sampling(self):
        require(self, prompts=(1, None), samples=(2, None), temperature=(1e-3, 100), max_new_tokens=(1, None),
                margin=(1e-6, 1), prompts_at_once=(1, None))


RULE = ("margin", "chosen")  # what of this concerns the choice among samples, not the samples


# ------------------------------------------------------------------------------------------------------------
# 3. A folder made of a model's answers


class Asked(NamedTuple):
    """A prompt that is asked."""
    conversation: dict  # as its file has it, with the author's answer
    split: str
    ids: list[int]  # of the prompt
    number: int  # its place among all that are asked


Row = tuple[Asked, list[dict]]  # a prompt, and what is kept of each answer to it


class Kind(NamedTuple):
    """What sets a kind of folder apart: pairs here, a teacher's answers in answers.py."""
    what: str  # it holds, in words
    files: tuple[str, ...]  # patterns of those that `finish` and its readers write into it
    known: dict  # {name: what the folder depends on}; "rule": what of that does not concern the samples
    splits: tuple[str, ...]  # whose prompts are asked
    told: Callable[[dict, dict], dict]  # (conversation, one of sample_replies) -> what is kept of that sample
    finish: Callable[[Path, list[Row], list[dict], Tokenizer], dict]  # (folder, rows, what `draw` returned,
    # tokenizer): write the files; returns what made.json says beside `known`, among that "counts"


def make_pairs(settings, init_from: str | Path, out: str | Path, env: Env, overwrite: bool = False):
    """Write the folder of pairs that the model in init_from gives; a finished one of the same settings stays.

    settings: a Sampling with seed, template, on_bad_line. Raises UserError where `out` holds anything else.
    """
    files = ("train.jsonl", "val.jsonl", "best/train.jsonl", "best/val.jsonl", "questions.jsonl",
             "samples.jsonl", "reference-*.safetensors")  # the last are dpo.py's
    make_folder(Kind("pairs", files, identity(settings, init_from), SPLITS, scored,
                     functools.partial(finish, settings)), settings, init_from, out, env, overwrite)


def make_folder(kind: Kind, settings, model_folder: str | Path, out: str | Path, env: Env, overwrite: bool):
    """Write a folder of this kind of what a model answers; a finished one of the same identity stays.

    settings: prompts_data, prompts, samples, temperature, max_new_tokens, prompts_at_once, seed, template,
    on_bad_line. Raises UserError where `out` holds anything else.
    """
    out = Path(out)
    with contextlib.ExitStack() as stack:
        env.first(lambda: stack.enter_context(begun(out, kind, overwrite)), patient=True)
        if not overwrite and (out / "made.json").exists():
            env.say(f"{out} is there already: {in_line(read_json(out / 'made.json').get('counts', {}))}")
            return
        model, tokenizer = open_model(model_folder, env.device)
        check_tokenizer(tokenizer, model_folder, settings.template)
        with contextlib.redirect_stdout(None) if env.rank else contextlib.nullcontext():
            groups = grouped(settings, model, tokenizer, kind.splits)
        # last of all that can refuse: --overwrite deletes here
        env.first(lambda: begin_work(out, kind, overwrite))
        work = Work(out / "work", fingerprint(of_samples(kind.known)), env.rank, env.world_size)
        answer = functools.partial(draw, settings, model, tokenizer, groups, work, kind.told)
        with Packed(model.eval()):
            units = work.each("samples", len(groups), answer)
        env.first(lambda: write_made(out, kind, rows_of(groups, work), units, tokenizer), patient=True)
        # apart: by now no process waits for a mark in there any more
        env.first(lambda: shutil.rmtree(out / "work", ignore_errors=True))


def identity(settings, init_from: str | Path) -> dict[str, str]:
    """{"samples", "rule"}: what the samples, and what the choice among them depend on, in a word each."""
    files = [file_checksum(path) for path in prompt_files(settings).values()]
    names = {*Sampling.__dataclass_fields__, "seed", "template"} - {*RULE}
    values = {name: getattr(settings, name) for name in names}
    return {"samples": fingerprint(values, weights_of(init_from), files),
            "rule": fingerprint([getattr(settings, name) for name in RULE])}


def of_samples(known: dict) -> dict:
    """What of an identity the samples depend on."""
    return {name: value for name, value in known.items() if name != "rule"}


def weights_of(folder: str | Path) -> str:
    """Stands for the weights in a model folder, or for those of an adapter in it."""
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("adapter/*.safetensors")]
    if not files:
        raise UserError(f"there is no model folder {folder}" if not Path(folder).is_dir() else
                        f"{folder} holds no weights: it has no .safetensors file")
    return fingerprint([file_checksum(path) for path in sorted(files)])


def prompt_files(settings) -> dict[str, Path]:
    files = {split: Path(settings.prompts_data) / f"{split}.jsonl" for split in SPLITS}
    for path in files.values():
        if not path.is_file():
            raise UserError(f"there is no {path}; --prompts_data is a folder of conversations with "
                            f"train.jsonl and val.jsonl (the default one: python sft.py --make_data)")
    return files


def check_tokenizer(tokenizer: Tokenizer | None, folder: str | Path, template: str):
    """Raise UserError unless the tokenizer of the model in a folder can write conversations."""
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer.json that can be read, and conversations cannot be "
                        f"written without it; choose another model")
    missing = [token for token in TEMPLATES[template].special if token not in tokenizer.special_tokens]
    if missing:
        raise UserError(f"{folder} does not know {' '.join(missing)} of the template {template}; first: "
                        f"python sft.py, or choose another --template")


@contextlib.contextmanager
def begun(out: Path, kind: Kind, overwrite: bool):
    """Hold the folder alone, made or refused.

    Samples that were drawn, but of which nothing is made yet, serve any rule. Kinds are told apart by the
    names in their identity.
    """
    marks = [path for path in (out / "made.json", out / "work" / "key.json") if path.is_file()]
    found = read_json(marks[0]) if marks else {}
    ours = found.keys() >= of_samples(kind.known).keys()
    strangers = out.exists() and (not out.is_dir() or any(path.suffix != ".tmp" for path in out.iterdir()))
    if strangers and not ours:
        raise UserError(f"{out} exists and is no folder of {kind.what}; choose another place for them")
    out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        known = kind.known if (out / "made.json").is_file() else of_samples(kind.known)
        if ours and not overwrite and any(found[name] != value for name, value in known.items()):
            raise UserError(f"{out} holds {kind.what} of another model or of other settings; pass "
                            f"--overwrite to make them anew, or choose another place")
        yield


def begin_work(out: Path, kind: Kind, overwrite: bool):
    """Make way for the samples; of a finished folder delete what was written here alone.

    In this order: killed in between, the folder is still known as ours, and never taken for whole.
    """
    work = out / "work"
    work.mkdir(exist_ok=True)
    with open_whole(work / "key.json", "w") as file:
        json.dump(kind.known, file)
    (out / "made.json").unlink(missing_ok=True)
    old = [path for path in work.iterdir() if path.name != "key.json"] if overwrite else []
    for path in [*old, *(path for pattern in kind.files for path in out.glob(pattern))]:
        path.unlink()


def grouped(settings, model: Transformer, tokenizer: Tokenizer,
            splits: Sequence[str] = SPLITS) -> list[list[Asked]]:
    """The prompts that are asked, in groups of like length that fit into one batch.

    One that leaves no room for an answer is left out. settings.prompts: of train; 0: all of them.
    """
    template, chosen, asked = TEMPLATES[settings.template], [], 0
    for split in splits:
        conversations = list(read_conversations(prompt_files(settings)[split], settings.on_bad_line))
        number = settings.prompts or len(conversations)
        for one in spread(conversations, number) if split == "train" else conversations:
            ids, _ = render(one["messages"][:-1], tokenizer, True, template)
            if len(ids) + settings.max_new_tokens <= model.config.max_seq_len:
                chosen.append(Asked(one, split, ids, asked))
            asked += 1
    if not chosen:
        raise UserError(f"no prompt of {settings.prompts_data} leaves {settings.max_new_tokens} of the "
                        f"model's {model.config.max_seq_len} tokens to an answer; pass fewer "
                        f"--max_new_tokens")
    if len(chosen) < asked:
        print(f"left out: {asked - len(chosen):,} of {asked:,} prompts, which leave no "
              f"{settings.max_new_tokens} of the model's {model.config.max_seq_len} tokens to an answer")
    chosen.sort(key=lambda one: len(one.ids))
    size = settings.prompts_at_once
    return [chosen[i:i + size] for i in range(0, len(chosen), size)]


def draw(settings, model: Transformer, tokenizer: Tokenizer, groups: list[list[Asked]], work: Work,
         told: Callable[[dict, dict], dict], unit: int) -> dict:
    """Write what is kept of the answers to one group, a function of (seed, unit) alone.

    Returns how many tokens were drawn, in how many seconds.
    """
    group, stop = groups[unit], tokenizer.special_tokens[TEMPLATES[settings.template].end]
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed((settings.seed * 1_000_003 + unit) % 2 ** 63)
    began = time.perf_counter()
    replies = sample_replies(model, [one.ids for one in group], tokenizer, stop, settings.samples,
                             settings.max_new_tokens, settings.temperature, generator)
    seconds = time.perf_counter() - began
    rows = [{"samples": [told(one.conversation, sample) for sample in samples]}
            for one, samples in zip(group, replies)]
    write_documents(work.path("samples", unit, "jsonl"), rows)
    return {"tokens": sum(len(sample["ids"]) for samples in replies for sample in samples),
            "seconds": seconds}


def rows_of(groups: list[list[Asked]], work: Work) -> list[Row]:
    """All that was drawn, with its prompts."""
    stored = stored_documents(*(work.path("samples", unit, "jsonl") for unit in range(len(groups))))
    return [(one, row["samples"]) for one, row in zip(chain.from_iterable(groups), stored, strict=True)]


def write_made(out: Path, kind: Kind, rows: list[Row], units: list[dict], tokenizer: Tokenizer):
    """Write what the folder is for from all samples; made.json comes last."""
    made = kind.finish(out, rows, units, tokenizer)
    with open_whole(out / "made.json", "w") as file:
        json.dump({**kind.known, **made}, file)
    print(f"{out}: {in_line(made['counts'])}")


def in_line(counts: dict) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in counts.items())


# ---- pairs -------------------------------------------------------------------------------------------------


def scored(conversation: dict, sample: dict) -> dict:
    """What is kept of a sample."""
    return {"text": sample["text"], "ended": sample["ended"],
            "score": quality(conversation, sample["text"], sample["ended"])}


def finish(settings, out: Path, rows: list[Row], units: list[dict], tokenizer: Tokenizer) -> dict:
    """Write pairs, best answers, questions and samples; returns {"counts"}."""
    counts = {}
    (out / "best").mkdir(exist_ok=True)
    chosen = {split: choose(settings, [row for row in rows if row[0].split == split]) for split in SPLITS}
    for split, (pairs, best) in chosen.items():
        if not pairs:
            raise UserError(f"of the samples for {split} no two of one prompt lie --margin {settings.margin} "
                            f"apart; pass a smaller one, more --samples, or more prompts")
        if not best:
            raise UserError(f"none of the samples for {split} is worth anything: no answer ends by itself; "
                            f"pass more --max_new_tokens or --samples, or choose another --init_from")
        write_documents(out / f"{split}.jsonl", pairs)
        write_documents(out / "best" / f"{split}.jsonl", best)
        counts |= {f"{split} pairs": len(pairs), f"{split} best answers": len(best)}
    write_documents(out / "questions.jsonl", [one.conversation for one, _ in rows if one.split == "val"])
    write_documents(out / "samples.jsonl", [{**one.conversation, "split": one.split, "samples": samples}
                                            for one, samples in rows])
    scores = [[sample["score"] for sample in samples] for _, samples in rows]
    number = sum(map(len, scores))
    counts |= {"samples": number, "mean score": round(sum(map(sum, scores)) / number, 4),
               f"best of {settings.samples}": round(sum(map(max, scores)) / len(scores), 4)}
    return {"counts": counts}


def choose(settings, rows: list[Row]) -> tuple[list[dict], list[dict]]:
    """(pairs for DPO, conversations for SFT) of the samples of one split; all keep what else was known."""
    pairs, best = [], []
    for one, samples in rows:
        known = {name: value for name, value in one.conversation.items() if name != "messages"}
        pair = preference(one.conversation, samples, settings.margin, settings.chosen)
        pairs += [known | pair] if pair else []
        best += filter(None, [best_answer(one.conversation, samples)])
    return pairs, best


# ------------------------------------------------------------------------------------------------------------
# 4. What a model is worth by the same rule


def questions(settings) -> list[dict]:
    """Held-out prompts with the author's answers, where the folder of pairs has them."""
    path = Path(settings.data) / "questions.jsonl"
    if not settings.questions or not path.is_file():
        return []
    with contextlib.redirect_stdout(None):
        return spread(list(read_conversations(path)), settings.questions)


def question_ids(asked: Sequence[dict], model: Transformer, tokenizer: Tokenizer,
                 settings) -> list[list[int]]:
    """The ids of the prompts. Raises UserError where one leaves the model no room for an answer."""
    template, limit = TEMPLATES[settings.template], model.config.max_seq_len
    ids = [render(one["messages"][:-1], tokenizer, True, template)[0] for one in asked]
    longest = max(map(len, ids), default=0)
    if longest >= limit:
        raise UserError(f"a question in {settings.data} has {longest} tokens, and the model reads {limit}: "
                        f"there is no room for an answer; take it out of questions.jsonl")
    return ids


def measure(model: Transformer, tokenizer: Tokenizer, asked: Sequence[dict], settings) -> dict:
    """What the model answers to the questions: {"greedy": (reply, ended) each, "sampled": replies each}."""
    if not asked:
        return {"greedy": [], "sampled": []}
    template, sampled = TEMPLATES[settings.template], []
    ids = question_ids(asked, model, tokenizer, settings)
    greedy = reply_to(asked, model, tokenizer, settings)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(settings.seed)
    starts = range(0, len(asked) if settings.samples_of_questions else 0, 32)
    for start in tqdm(starts, desc="sample", unit="batch", leave=False, disable=None):
        sampled += sample_replies(model, ids[start:start + 32], tokenizer,
                                  tokenizer.special_tokens[template.end], settings.samples_of_questions,
                                  settings.max_new_tokens, generator=generator)
    for one, prompt in zip(sampled, ids):
        for reply in one:
            reply["prompt"] = prompt
    return {"greedy": greedy, "sampled": sampled}


def qualities(asked: Sequence[dict], answers: dict) -> dict[str, list[float]]:
    """{name: a figure for each question it has a meaning for}, 0 to 1, the same order for every model."""
    found: dict[str, list[float]] = {}
    for number, (question, (reply, ended)) in enumerate(zip(asked, answers["greedy"])):
        task = question.get("task", "answer")
        one = score([question], [(reply, ended)])
        for name, value in one.items():
            found.setdefault(f"greedy: {MEASURES[name]}", []).append(value)
        if answers["sampled"]:
            scores = [quality(question, sample["text"], sample["ended"])
                      for sample in answers["sampled"][number]]
            found.setdefault(f"sampled: quality of {task}", []).append(sum(scores) / len(scores))
    return found


def sign_test(before: Sequence[float], after: Sequence[float]) -> tuple[int, int, float]:
    """(how many are higher after, how many lower, two-sided p of so uneven a split by chance).

    Ties are left out. By hand: 5 higher and none lower, p = 2 / 2^5.
    """
    higher = sum(new > old for old, new in zip(before, after, strict=True))
    lower = sum(new < old for old, new in zip(before, after, strict=True))
    n, tail = higher + lower, range(min(higher, lower) + 1)
    return higher, lower, min(1.0, 2 * sum(math.comb(n, i) for i in tail) / 2 ** n)


def in_words(before: Sequence[float], after: Sequence[float]) -> str:
    higher, lower, p = sign_test(before, after)
    return f"{higher} better, {lower} worse, p {p:.2g}"


@dataclass
class Settings:
    models: tuple[str, ...] = ("runs/sft", "runs/dpo")  # model folders; each is compared with the first
    data: str = "runs/pairs"  # folder of pairs, whose questions.jsonl is asked
    questions: int = 200  # of these
    samples_of_questions: int = 4  # answers at temperature 1 to each, beside the greedy one
    max_new_tokens: int = 100  # of such an answer
    repetition_penalty: float = 1.15  # of the greedy answers, as in sft.py
    template: Literal["chatml", "llama3", "qwen", "qwen3"] = "chatml"  # how a conversation is written
    seed: int = 0  # of the samples
    json: str | None = None  # also write the figures of each question into this file

    def __post_init__(self):
        if not self.models:
            raise UserError("--models names no model folder; name one, or several to compare")
        require(self, questions=(1, None), samples_of_questions=(0, None), max_new_tokens=(1, None),
                repetition_penalty=(1, 1000), seed=(0, 2 ** 63 - 1))


def main():
    """python rejection.py --models A B C: their answers to held-out questions, side by side."""
    settings = parse(Settings)
    asked, found = questions(settings), {}
    if not asked:
        raise UserError(f"there is no {settings.data}/questions.jsonl; make it with: python dpo.py "
                        f"--make_pairs")
    for folder in settings.models:
        model, tokenizer = open_model(folder)
        if tokenizer is None:
            raise UserError(f"{folder} has no tokenizer.json that can be read")
        found[folder] = qualities(asked, measure(model, tokenizer, asked, settings))
    first = found[settings.models[0]]
    for name in first:
        print(name)
        for folder, figures in found.items():
            note = "" if figures is first else in_words(first[name], figures[name])
            print(f"  {folder:<40}{sum(figures[name]) / len(figures[name]):>8.4f}  {note}".rstrip())
    if settings.json:
        with open_whole(settings.json, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    run(main)
