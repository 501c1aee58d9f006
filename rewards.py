"""Rewards that a program can check: functions of (question, reply) -> float in a table, and sums of them.

    python ppo.py --rewards exact format=0.2      # names of the table, with weights; 1 if none is given

Adding one's own is a function and a line:

    def brief(question, reply):
        return float(reply.length <= 20)

    REWARDS["brief"] = Reward(brief, 0.0, "1 for at most 20 tokens")

A policy finds whatever a reward forgets to forbid: two <answer> parts, one right; a body that is a comment,
and compiles; the same word over and over. What each function here refuses, and what it does not see, stands
in its docstring. Code is compiled, never run.
"""
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import rejection
import sft
import stdlib_chat
from config import UserError

MAX_CHARS = 4_000  # of a body that is compiled: lambdas in each other take compile() quadratic time


class Reply(NamedTuple):
    """What a model said to a question."""
    text: str  # without its end token
    ended: bool  # by itself, with an end token
    length: int  # tokens, the end token included


# ------------------------------------------------------------------------------------------------------------
# 1. The functions. question: a conversation {"messages": [..., the author's answer], and what else is known}


def compiles(question: dict, reply: Reply) -> float:
    """1 if the function's body compiles, else 0; 0 too where no body is asked for (stdlib_chat's "write").

    A body without a statement (nothing, or comments alone) is none, though the docstring before it compiles.
    Not seen: what the body does. `pass` is worth 1, which is why `quality` asks for the arguments.
    """
    return float(used_arguments(question, reply) is not None)


def used_arguments(question: dict, reply: Reply) -> float | None:
    """stdlib_chat.used_arguments; None too of comments alone, of too long a body, or of none asked for."""
    if not stdlib_chat.asks_for_body(question) or not is_body(reply.text):
        return None
    return stdlib_chat.used_arguments(question["code"], reply.text)


def is_body(text: str) -> bool:
    """Whether a text is short enough to be compiled, and has a line that is neither empty nor a comment."""
    lines = text.split("\n") if len(text) <= MAX_CHARS else ()
    return any(line.strip() and not line.lstrip().startswith("#") for line in lines)


def f1(question: dict, reply: Reply) -> float:
    """The F1 of words with the author's answer (sft.f1), 0 to 1. Not seen: their order, and the end."""
    return sft.f1(reply.text, author(question))


def quality(question: dict, reply: Reply) -> float:
    """rejection.quality, 0 to 1: of a body, that it compiles, ends, uses its arguments; else the F1."""
    if stdlib_chat.asks_for_body(question) and not is_body(reply.text):
        return reply.ended / 3  # it ends, and that is all
    return rejection.quality(question, reply.text, reply.ended)


def length(question: dict, reply: Reply) -> float:
    """Hundreds of tokens, the end token included. A negative weight makes replies shorter: length=-0.1."""
    return reply.length / 100


def ends(question: dict, reply: Reply) -> float:
    """1 for a reply that ends by itself, else 0."""
    return float(reply.ended)


def exact(question: dict, reply: Reply) -> float:
    """1 if the answer is the true one, as text without the white space around it; else 0.

    True is question["answer"], text or a whole number, or else what the author's answer has in <answer> …
    </answer>, or else all of it. The reply's answer is what stands in its one <answer> part; with two it has
    none. A reply without tags is its own answer if it ended, and only where the author's has no tags either.
    Not seen: what stands around the tags, thoughts that lead elsewhere among it.
    """
    truth, said = question.get("answer"), author(question)
    tagged = inside(said, "answer")
    if truth is None:
        truth = said if tagged is None else tagged
    if isinstance(truth, bool) or not isinstance(truth, (str, int)):
        raise ValueError(f'"answer" is of type {type(truth).__name__}; text or a whole number is expected')
    found = inside(reply.text, "answer")
    if found is None and tagged is None and reply.ended and not tags(reply.text, "answer"):
        found = reply.text
    return float(found is not None and found.strip() == str(truth).strip() != "")


def form(question: dict, reply: Reply) -> float:
    """1 for <think>…</think><answer>…</answer>, each tag once, nothing else around, neither empty; else 0.

    Where the author's answer is of <answer>…</answer> alone, so is the reply to be. White space may stand
    between and around them. A reply that did not end is not whole. Not seen: what is thought and answered.
    """
    said, text = author(question), reply.text.strip()
    parts = ("answer",) if tags(said, "answer") and not tags(said, "think") else ("think", "answer")
    if not reply.ended or tags(text, "think") + tags(text, "answer") != 2 * len(parts):
        return 0.0
    for part in parts:
        content = inside(text, part)
        if not text.startswith(f"<{part}>") or not content or not content.strip():
            return 0.0
        text = text.partition(f"</{part}>")[2].strip()
    return float(not text)


def author(question: dict) -> str:
    return question["messages"][-1]["content"]


def tags(text: str, name: str) -> int:
    """How many tags of this name a text has, those that open and those that close."""
    return text.count(f"<{name}>") + text.count(f"</{name}>")


def inside(text: str, name: str) -> str | None:
    """What stands in the one part <name>…</name> of a text; None if there is none, or a tag too many."""
    before, opens, rest = text.partition(f"<{name}>")
    content, closes, _ = rest.partition(f"</{name}>")
    return content if opens and closes and tags(text, name) == 2 else None


class Reward(NamedTuple):
    function: Callable[[dict, Reply], float]
    floor: float  # what a reply counts whose reward cannot be told: the least that the function gives
    words: str


REWARDS = {
    "exact": Reward(exact, 0.0, "1 for the true answer"),
    "format": Reward(form, 0.0, "1 for <think>…</think><answer>…</answer>, or the latter alone"),
    "compiles": Reward(compiles, 0.0, "1 for a body that compiles"),
    "f1": Reward(f1, 0.0, "F1 of words with the author's answer"),
    "quality": Reward(quality, 0.0, "a body compiles, ends, uses its arguments; else F1 if it ends"),
    "length": Reward(length, 0.0, "hundreds of tokens"),
    "ends": Reward(ends, 0.0, "1 for a reply that ends"),
}


# ------------------------------------------------------------------------------------------------------------
# 2. A sum of them


class Rewards:
    """A weighted sum of rewards of the table, with each part by itself.

    spec: "name=weight" each, or a name alone, of weight 1; a weight of 0 only follows a reward, beside what
    is learnt from. model: the reward model, "model" in the spec: a function (prompts, replies), lists of ids
    both, -> scores (B,). A function that raises, or gives what is no finite number, has failed: the reply
    counts as that reward's floor, is shown (the first of each kind of failure), and counted in `failures`.
    Raises UserError for a spec that is none; in a call, after more than `bound` failures.
    """

    def __init__(self, spec: Sequence[str], model: Callable | None = None, bound: int = 20,
                 say: Callable = print):
        self.weights = parse_spec(spec)
        if "model" in self.weights and model is None:
            raise UserError("the reward \"model\" is a reward model's score, and there is none; name its "
                            "folder, or leave \"model\" out")
        self.model, self.bound, self.say = model, bound, say
        self.failures, self.shown = 0, set()

    def __call__(self, questions: Sequence[dict], replies: Sequence[Reply],
                 ids: tuple[list, list] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(totals (B,), {name: (B,), before weights}), float32. ids: (prompts, replies), for the model."""
        parts = {}
        for name in self.weights:
            if name == "model":
                parts[name] = self.model_scores(questions, replies, ids)
            else:
                values = [self.checked(name, *pair) for pair in zip(questions, replies, strict=True)]
                parts[name] = torch.tensor(values, dtype=torch.float32)
        totals = sum(weight * parts[name] for name, weight in self.weights.items())
        return totals, parts

    def checked(self, name: str, question: dict, reply: Reply) -> float:
        """What a function of the table says, or its floor."""
        reward = REWARDS[name]
        try:
            value = float(reward.function(question, reply))
        except Exception as error:  # whatever a function of the user's raises
            self.failed(name, f"{type(error).__name__}: {error}", type(error).__name__, question, reply)
            return reward.floor
        if not math.isfinite(value):
            self.failed(name, f"gives {value}", "not finite", question, reply)
            return reward.floor
        return value

    def model_scores(self, questions, replies, ids) -> Tensor:
        """The reward model's scores; the least of them that is finite, or 0, where one is not."""
        assert ids is not None, "a reward model reads ids"
        scores = self.model(*ids).detach().float().cpu()
        finite = scores.isfinite()
        for row in (~finite).nonzero().flatten().tolist():
            self.failed("model", f"gives {scores[row].item()}", "not finite", questions[row], replies[row])
        floor = scores[finite].min().item() if finite.any() else 0.0
        return scores.where(finite, torch.tensor(floor))

    def failed(self, name: str, what: str, kind: str, question: dict, reply: Reply):
        self.failures += 1
        if (name, kind) not in self.shown:
            self.shown.add((name, kind))
            self.say(f"the reward {name} {what:.200}, on the reply {reply.text[:200]!r} to "
                     f"{question['messages'][-2]['content'][:200]!r}; it counts as its floor")
        if self.failures > self.bound:
            raise UserError(f"the reward {name} {what:.200}: that is failure {self.failures} of rewards, and "
                            f"{self.bound} are passed over; mend the function or the data")


def parse_spec(spec: Sequence[str]) -> dict[str, float]:
    """{name: weight} of a spec; UserError for what is none."""
    weights = {}
    for part in spec:
        name, equals, weight = part.partition("=")
        if name != "model" and name not in REWARDS:
            known = ", ".join(["model", *REWARDS])
            raise UserError(f"unknown reward {name!r}; there are {known}")
        if name in weights:
            raise UserError(f"the reward {name} is given twice; give it once, with the sum of the weights")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise UserError(f"the reward {part!r} has a weight that is no finite number; write {name}=0.5")
    if not any(weights.values()):
        raise UserError("no reward has a weight; name at least one: " + ", ".join(["model", *REWARDS]))
    return weights
