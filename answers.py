"""A teacher's answers as data for a student: what passes rewards that can be checked is kept, for sft.py.

    python answers.py --teacher runs/sft --out runs/answers              # draw, check, keep the best
    python sft.py --init_from runs/student --data runs/answers           # the student learns them
    torchrun --nproc-per-node 2 answers.py --rewards exact --no-thoughts # shared; what thoughts led to, alone

Black-box distillation: of the teacher its text alone is needed, no weights and no logits, so that the student
may be of any size and have another tokenizer. Kim & Rush 2016 (https://arxiv.org/abs/1606.07947, section 3.2)
train on the teacher's likeliest answer (here --temperature 0 --samples 1). Where answers can be checked,
several are drawn and the right ones kept, with the thoughts that led to them: STaR (Zelikman et al. 2022,
https://arxiv.org/abs/2203.14465), and the students of DeepSeek-R1 (2025, https://arxiv.org/abs/2501.12948,
section 2.4). Answers from elsewhere need none of this: sft.py --data reads any file of prompts and responses.

The folder: train.jsonl (a prompt's conversation with the teacher's answer, and its "reward"), val.jsonl (the
held-out conversations as they were, so that students from any data are measured on the same) and made.json.
Killed, it goes on after the last whole batch; one process or several write the same two files.
"""
import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from tqdm import tqdm

from bpe import Tokenizer
from config import UserError, file_checksum, open_whole, parse, require, run, show
from documents import write_documents
from dpo import prepare_prompts
from parallel import Compute, Env
from rejection import Kind, Row, make_folder, prompt_files, weights_of, with_answer
from rewards import REWARDS, Reply, Rewards, inside, parse_spec, tags
from sft import spread
from train import guarded

# ------------------------------------------------------------------------------------------------------------
# 1. What is kept


def without_thoughts(text: str) -> str:
    """The <answer> part of a reply that begins with a <think> part; all that follows that, if it has no such.

    By hand: <think>1+1=2</think><answer>2</answer> -> <answer>2</answer>. A reply without thoughts is as it
    was. Of one whose thoughts cannot be told from the rest (a tag too many, or too few) nothing is left.
    """
    if not tags(text, "think"):
        return text
    if inside(text, "think") is None or not text.lstrip().startswith("<think>"):
        return ""
    rest = text.partition("</think>")[2].lstrip("\n")  # not spaces: a function's body begins with some
    answer = inside(rest, "answer")
    return rest if answer is None else f"<answer>{answer}</answer>"


def passed(samples: Sequence[dict], rewards: Tensor, settings) -> list[tuple[str, float]]:
    """(answer, reward) of what is kept of the samples of one prompt.

    Never kept: an answer that did not end by itself, or in which nothing stands. rewards: (S,) float32, of
    whole replies, thoughts included. Of equal rewards, and of equal answers, the first counts.
    """
    enough = (rewards >= settings.at_least).tolist()  # in float32 both: 0.7 there is less than Python's 0.7
    answers = [(answer_of(sample, settings), plain(reward))
               for sample, reward, is_enough in zip(samples, rewards, enough, strict=True) if is_enough]
    answers = [(answer, reward) for answer, reward in answers if answer]
    if settings.keep == "best":
        return [max(answers, key=lambda pair: pair[1])] if answers else []
    different: dict[str, float] = {}
    for answer, reward in answers:
        different.setdefault(answer, reward)
    return list(different.items())


def answer_of(sample: dict, settings) -> str:
    """What a student would learn of a sample; "" if there is nothing to be learnt."""
    text = sample["text"] if settings.thoughts else without_thoughts(sample["text"])
    return text if sample["ended"] and text.strip() else ""


def plain(reward: Tensor) -> float:
    """A float32 number as the shortest text that stands for it: 0.7, not 0.699999988079071."""
    return float(str(np.float32(reward.item())))


# ------------------------------------------------------------------------------------------------------------
# 2. The folder


@dataclass
class Settings(Compute):
    teacher: str = "runs/sft"  # model folder that answers
    prompts_data: str = "runs/chat"  # whose prompts are asked: a folder with train.jsonl and val.jsonl
    out: str = "runs/answers"  # folder to write; an unfinished one goes on
    overwrite: bool = False  # make `out` anew
    prompts: int = 2000  # so many of train, evenly from all; 0: all
    samples: int = 4  # answers to each prompt
    temperature: float = 1.0  # of the answers; 0: the likeliest tokens, and then --samples 1
    max_new_tokens: int = 100  # of an answer; one that has not ended by then is never kept
    rewards: tuple[str, ...] = ("quality",)  # names of rewards.py, with weights: exact format=0.2
    at_least: float = 0.5  # an answer is kept whose weighted sum of rewards reaches this
    keep: Literal["best", "all"] = "best"  # of what reaches it, to each prompt: the best, or all that differ
    thoughts: bool = True  # keep a reply's <think> part; --no-thoughts: its <answer> part alone
    prompts_at_once: int = 32  # prompts whose answers are drawn together; fewer take less memory
    template: Literal["chatml", "llama3", "qwen", "qwen3"] = "chatml"  # how the teacher reads a conversation
    seed: int = 0  # of the answers
    on_bad_line: Literal["stop", "skip"] = "stop"  # of train.jsonl's prompts: stop, or count it and go on

    def __post_init__(self):
        require(self, prompts=(0, None), samples=(1, None), temperature=(0, 100), max_new_tokens=(1, None),
                prompts_at_once=(1, None), seed=(0, 2 ** 63 - 1))
        if self.temperature < 1e-6 and self.samples > 1:
            raise UserError(f"--samples {self.samples} at --temperature {self.temperature:g} would be one "
                            f"answer so many times; pass --samples 1, or a temperature of 1")
        if "model" in parse_spec(self.rewards):
            raise UserError(f"--rewards model is a reward model's score, and answers are kept for what a "
                            f"program can check; choose among {', '.join(REWARDS)}")
        if Path(self.out).resolve() == Path(self.prompts_data).resolve():
            raise UserError(f"--out {self.out} is --prompts_data itself; choose another place for answers")
        self.refuse_layouts()

    def refuse_layouts(self):
        """Raise UserError for what concerns training alone: each process draws with the whole model."""
        for field in fields(Compute):
            value = getattr(self, field.name)
            if field.name not in ("device", "timeout_minutes") and value != field.default:
                raise UserError(f"--{field.name} {value} is for training; answers are drawn in fp32, by each "
                                f"process with the whole teacher; leave it out")
        self.compile, self.precision = False, "fp32"


DRAWN = ("prompts", "samples", "temperature", "max_new_tokens", "prompts_at_once", "template", "seed")
RULE = ("rewards", "at_least", "keep", "thoughts")  # what concerns the choice among answers that were drawn


def identity(settings: Settings) -> dict:
    """What the folder depends on, as made.json has it; what was drawn serves any rule."""
    drawn, rule = ({name: getattr(settings, name) for name in names} for names in (DRAWN, RULE))
    return {"teacher": weights_of(settings.teacher),
            "prompts": {split: file_checksum(path) for split, path in prompt_files(settings).items()},
            "drawn": drawn, "rule": rule | {"rewards": list(settings.rewards)}}


def drawn_only(conversation: dict, sample: dict) -> dict:
    """What is kept of a sample while others are drawn: it is rewarded at the end, by any rule."""
    return {"text": sample["text"], "ended": sample["ended"], "length": len(sample["ids"])}


def finish(settings: Settings, out: Path, rows: list[Row], units: list[dict], tokenizer: Tokenizer) -> dict:
    """Write both files, show what was kept; returns counts and speed. UserError where nothing is kept."""
    rewards, kept, best = Rewards(settings.rewards, say=tqdm.write), [], []
    rows = sorted(rows, key=lambda row: row[0].number)  # as their file has them, not by length
    for one, samples in tqdm(rows, "reward", unit="prompt", leave=False, disable=None):
        replies = [Reply(*(sample[name] for name in ("text", "ended", "length"))) for sample in samples]
        totals, _ = rewards([one.conversation] * len(replies), replies)
        best += [plain(total) for total, sample in zip(totals, samples) if answer_of(sample, settings)]
        kept.append([{**with_answer(one.conversation, answer), "reward": reward}
                     for answer, reward in passed(samples, totals, settings)])
    conversations = [conversation for some in kept for conversation in some]
    drawn = [sample for _, samples in rows for sample in samples]
    if not conversations:
        raise nothing_kept(settings, len(drawn), best)
    write_documents(out / "train.jsonl", conversations)
    with open(prompt_files(settings)["val"], "rb") as old, open_whole(out / "val.jsonl") as new:
        shutil.copyfileobj(old, new)
    show_some(conversations)
    tokens = sum(len(tokenizer.encode(one["messages"][-1]["content"])) + 1 for one in conversations)
    counts = {"prompts asked": len(rows), "answers drawn": len(drawn),
              "ended": sum(sample["ended"] for sample in drawn), "kept": len(conversations),
              "prompts with an answer kept": sum(map(bool, kept)), "tokens of kept answers": tokens}
    print(f"kept: {len(conversations) / len(drawn):.1%} of the answers drawn, one at least to "
          f"{sum(map(bool, kept)) / len(rows):.1%} of the prompts")
    speed = sum(unit["tokens"] for unit in units) / sum(unit["seconds"] for unit in units)
    return {"counts": counts, "tokens a second and process": round(speed, 1)}


def nothing_kept(settings: Settings, drawn: int, best: Sequence[float]) -> UserError:
    """best: the rewards of the answers that ended, with something in them."""
    if not best:
        return UserError(f"of the {drawn:,} answers drawn none ends by itself with something in it to learn; "
                         f"pass more --max_new_tokens, or choose another --teacher")
    return UserError(f"of the {drawn:,} answers drawn none is kept: the best reward of those that end is "
                     f"{max(best):g}, below --at_least {settings.at_least:g}; pass a lower one, or other "
                     f"--rewards (the answers stay, and are not drawn again)")


def show_some(conversations: Sequence[dict]):
    """Print a few of the answers that are kept, with their rewards."""
    for one in spread(conversations, 3):
        question, answer = (message["content"] for message in one["messages"][-2:])
        print(f"{'-' * 80}\n{question:.400}\n>>> reward {one['reward']:g}: {answer!r:.400}")
    print("-" * 80)


def main():
    guarded(parse(Settings), distil)


def distil(settings: Settings, env: Env):
    """The command on one process: refuse what is wrong, make what is missing, draw, check, write."""
    if not Path(settings.teacher).is_dir():
        raise UserError(f"there is no model folder {settings.teacher}, the teacher; python sft.py makes "
                        f"{Settings.teacher}, and --teacher names another")
    prepare_prompts(settings, env)
    if env.rank == 0:
        show(settings)
    kind = Kind("answers", ("train.jsonl", "val.jsonl"), identity(settings), ("train",), drawn_only,
                functools.partial(finish, settings))
    make_folder(kind, settings, settings.teacher, settings.out, env, settings.overwrite)


if __name__ == "__main__":
    run(main)
