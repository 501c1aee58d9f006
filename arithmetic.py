"""Problems with an exact answer, for reinforcement: sums, with the steps written out or without.

    python arithmetic.py                              # runs/arithmetic: problems, a small model
    python arithmetic.py --no-think --out runs/direct # the same problems, answered without steps
    python arithmetic.py --measure runs/arithmetic-sft    # its exact answers to those held out

    47+5+8  ->  <think>47+5=52 52+8=60</think><answer>60</answer>            or   <answer>60</answer>

A folder of them: sft/ (conversations to learn the form from), problems/ (others, to be asked by ppo.py, with
the answer of each), start/ (a model with random weights, and a tokenizer for these texts). Both parts have
the same val.jsonl, of held-out problems. A sum is there once, in whatever order its numbers stand: so none
that is held out has been seen. The tags are ordinary text to the tokenizer, but a token each; and so is each
digit, for a model that sees "175" as a token has to learn a thousand of them by heart.
"""
import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import data
from adapters import open_model
from bpe import Tokenizer
from chat import TEMPLATES, read_conversations, render
from checkpoint import save_model
from config import UserError, parse, require, run
from model import ModelConfig, Transformer
from rewards import Rewards
from rollouts import answered

# ------------------------------------------------------------------------------------------------------------
# 1. Problems


def problem(numbers: Sequence[int], think: bool = True) -> dict:
    """The conversation of one sum, with the author's answer.

    By hand: the thoughts about (17, 58, 23) are 17+58=75 75+23=98.
    """
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total}+{number}={total + number}")
        total += number
    reply = f"<think>{' '.join(steps)}</think>" * think + f"<answer>{total}</answer>"
    return {"messages": [{"role": "user", "content": "+".join(map(str, numbers))},
                         {"role": "assistant", "content": reply}], "task": "add", "answer": str(total)}


def sums(terms: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Yield different sums, without end: a number of two digits, and terms - 1 of one. See how_many.

    None is another's permutation.
    """
    seen = set()
    while True:
        first, *others = rng.randint(10, 99), *(rng.randint(1, 9) for _ in range(terms - 1))
        if (first, *sorted(others)) not in seen:
            seen.add((first, *sorted(others)))
            yield first, *others


def how_many(terms: int) -> int:
    """So many different sums there are: 90 first numbers, and multisets of the nine digits."""
    return 90 * math.comb(9 + terms - 2, terms - 1)


# ------------------------------------------------------------------------------------------------------------
# 2. A tokenizer and a model for them

PATTERN = r"</?\w+>|\p{N}|\p{L}+|[^\p{N}\p{L}<]|<"  # a tag, a digit, a word, a sign
WORDS = ("<think>", "</think>", "<answer>", "</answer>", "user", "assistant", "system")  # a token each


def tokenizer_for_sums() -> Tokenizer:
    """256 bytes, the merges that make WORDS tokens, and <|endoftext|>."""
    merges = dict.fromkeys((word[:i].encode(), word[i:i + 1].encode()) for word in WORDS
                           for i in range(1, len(word)))
    return Tokenizer(list(merges), ["<|endoftext|>"], PATTERN)


def model_for_sums(vocab_size: int, dim: int, layers: int, seed: int) -> Transformer:
    """A model with random weights, that reads 128 tokens."""
    config = ModelConfig(vocab_size=vocab_size, dim=dim, n_layers=layers, n_heads=4, max_seq_len=128)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


# ------------------------------------------------------------------------------------------------------------
# 3. The folder


@dataclass
class Settings:
    out: str = "runs/arithmetic"  # folder to write, or whose held-out problems are measured
    overwrite: bool = False  # replace what is in `out`
    think: bool = True  # replies write the steps out, before the answer
    terms: int = 4  # numbers of a sum: the first has two digits, the others one
    learn: int = 4000  # problems to learn the form from, with sft.py
    problems: int = 6000  # others, for ppo.py to ask
    val: int = 500  # others still, held out from both
    dim: int = 64  # width of the model
    layers: int = 3  # of the model
    seed: int = 0  # of problems and weights
    measure: tuple[str, ...] | None = None  # write nothing; ask these model folders the held-out problems
    samples: int = 4  # replies to each at temperature 1, beside the greedy one
    max_new_tokens: int = 64  # of such a reply
    template: Literal["chatml", "llama3", "qwen", "qwen3"] = "chatml"  # how a conversation is written

    def __post_init__(self):
        require(self, terms=(2, 8), learn=(1, None), problems=(1, None), val=(1, None),
                dim=(8, None), layers=(1, None), seed=(0, 2 ** 63 - 1), samples=(1, None),
                max_new_tokens=(1, None))
        if self.measure == ():
            raise UserError("--measure names no model folder; name one, or several")
        wanted, there = self.learn + self.problems + self.val, how_many(self.terms)
        if not self.measure and wanted > 0.8 * there:  # the last ones would be drawn for ever
            raise UserError(f"{wanted:,} problems are wanted, and of the {there:,} sums of {self.terms} "
                            f"numbers at most 80 % are drawn; pass fewer --learn or --problems, or more "
                            f"--terms")


def main():
    settings = parse(Settings)
    if settings.measure:
        for folder in settings.measure:
            print(f"{folder}: {in_words(measure(folder, held_out(settings), settings))}")
    else:
        write(settings)


def write(settings: Settings):
    """Write sft/, problems/ and start/ into `out`. Raises UserError where one is there, without overwrite."""
    out = Path(settings.out)
    for place in (out / "sft", out / "problems", out / "start"):
        if place.exists() and not settings.overwrite:
            raise UserError(f"{place} exists; pass --overwrite to replace it, or another --out")
    drawn = sums(settings.terms, random.Random(settings.seed))
    val, learn, problems = ([problem(next(drawn), settings.think) for _ in range(number)]
                            for number in (settings.val, settings.learn, settings.problems))
    tokenizer = tokenizer_for_sums()
    model = model_for_sums(tokenizer.vocab_size, settings.dim, settings.layers, settings.seed)
    with contextlib.ExitStack() as stack:
        for name, train in (("sft", learn), ("problems", problems)):
            fresh = stack.enter_context(data.whole_folder(out / name, settings.overwrite))
            data.write_documents(fresh / "train.jsonl", train)
            data.write_documents(fresh / "val.jsonl", val)
        save_model(model, tokenizer, out / "start")
    print(f"{out}/sft: {len(learn):,} sums with their {'steps' if settings.think else 'answers'}, such as "
          f"{learn[0]['messages'][0]['content']} {learn[0]['messages'][1]['content']}\n"
          f"{out}/problems: {len(problems):,} others; in both, {len(val):,} held out\n"
          f"{out}/start: {sum(p.numel() for p in model.parameters()):,} parameters, random; "
          f"{tokenizer.vocab_size} tokens")


# ------------------------------------------------------------------------------------------------------------
# 4. What a model has learnt


def held_out(settings: Settings) -> list[dict]:
    path = Path(settings.out) / "problems" / "val.jsonl"
    if not path.is_file():
        raise UserError(f"there is no {path}, whose problems are asked; make it with: python arithmetic.py "
                        f"--out {settings.out}")
    with contextlib.redirect_stdout(None):
        return list(read_conversations(path))


def measure(folder: str, asked: Sequence[dict], settings: Settings) -> dict[str, list[float]]:
    """{"exact, greedy", …: a figure for each of the problems}; sampled: the mean of `samples` replies."""
    model, tokenizer = open_model(folder)
    template = TEMPLATES[settings.template]
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer.json that can be read")
    prompts = [render(one["messages"][:-1], tokenizer, True, template)[0] for one in asked]
    found, _ = answered(model, prompts, asked, Rewards(("exact", "format")), tokenizer,
                        tokenizer.special_tokens[template.end], settings.samples, settings.max_new_tokens,
                        seed=settings.seed, at_once=64)
    return {f"{name}, {how}": found[f"{how}: {name}"] for name in ("exact", "format")
            for how in ("greedy", "sampled")}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error) of figures, one a problem, whose samples are not independent."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def in_words(found: dict[str, list[float]]) -> str:
    figures = ((name, *mean_and_error(values)) for name, values in found.items())
    return "; ".join(f"{name} {mean:.1%} ± {error:.1%}" for name, mean, error in figures)


if __name__ == "__main__":
    run(main)
