"""Preferences: two answers to one prompt, of which one is chosen. Files of anybody's form -> ids.

    read_preferences("pairs.jsonl")     # {"prompt": messages, "chosen": messages, "rejected": messages}
    encode_pair(pair, tokenizer)        # ids of the prompt, once, and of both continuations

Three forms are read, by what a record holds:
1. `prompt` (text, or messages), `chosen`, `rejected`: answers as text, or as messages that go on from the
   prompt, or that repeat it first (UltraFeedback);
2. `chosen`, `rejected` alone, as message lists: the messages in which both agree are the prompt;
3. `chosen`, `rejected` alone, as dialogues in one text (hh-rlhf): "\\n\\nHuman: …\\n\\nAssistant: …".

Other keys are kept. Both sides of a pair get the very same ids of the prompt: it is encoded once.
"""
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from bpe import Tokenizer
from chat import CHATML, Template, check_messages, kind, read_records, render, string
from config import UserError
from documents import Rejected, accepted, content_suffix, find_files, read_files

SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # of hh-rlhf
TURN = re.compile(r"\n\n(Human|Assistant):")
FORMS = ('"prompt", "chosen" and "rejected"; or "chosen" and "rejected" as message lists, or as dialogues '
         'that begin with "\\n\\nHuman: "')


def read_preferences(path: str | Path, on_bad_line: str = "stop") -> Iterator[dict]:
    """Yield the pairs of a file: {"prompt", "chosen", "rejected": messages each, "where"} and its other keys.

    path: .jsonl, or .json (the same, or one list), each also .gz. Of chosen and rejected the messages that
    follow the prompt. on_bad_line: "stop" raises UserError with file and line; "skip" goes on, and tells at
    the end of how many. Pairs with equal or empty answers are left out, and counted.

    Raises UserError also if none is left.
    """
    path, counts = Path(path), Counter()
    if path.is_dir() or content_suffix(path) not in (".jsonl", ".json"):
        raise UserError(f"{path}: preferences are read from files .jsonl and .json (also .gz)")
    records = read_files(find_files([path]), read_records)
    for pair in accepted(map(to_pair, records), on_bad_line, {}):
        problem = ("equal answers" if pair["chosen"] == pair["rejected"] else
                   "an empty answer" if is_empty(pair["chosen"]) or is_empty(pair["rejected"]) else None)
        counts[problem] += 1
        if not problem:
            yield pair
    left_out = ", ".join(f"{number:,} with {problem}" for problem, number in counts.items() if problem)
    if not counts[None]:
        raise UserError(f"{path} holds no pair to learn from{f': {left_out}' if left_out else ''}")
    print(f"{path}: {counts[None]:,} pairs" + (f"; left out: {left_out}" if left_out else ""))


def to_pair(item: dict | Rejected) -> dict | Rejected:
    """The pair that a record is; a Rejected with its place where it is none."""
    if isinstance(item, Rejected):
        return item
    try:
        messages = convert(item["record"])
    except UserError as error:
        return Rejected("pair", f"{item['where']}: {error}", 0)
    return {**item["record"], **messages, "where": item["where"]}


def convert(record) -> dict:
    """{"prompt", "chosen", "rejected"} as messages. Raises UserError, which says what is wrong."""
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        found = ", ".join(record) if isinstance(record, dict) else f"a value {kind(record)}"
        raise UserError(f"{found or 'an empty object'}: that is no preference; expected are {FORMS}")
    sides = {side: record[side] for side in ("chosen", "rejected")}
    if "prompt" in record:
        prompt = with_system_of(sides, as_messages(record["prompt"], "prompt"))
        answers = {side: answer_to(prompt, value, side) for side, value in sides.items()}
    else:
        whole = {side: as_dialogue(value, side) for side, value in sides.items()}
        same = 0
        while same < min(map(len, whole.values())) and whole["chosen"][same] == whole["rejected"][same]:
            same += 1
        same = min(same, *(len(messages) - 1 for messages in whole.values()))  # of equal ones too: the answer
        prompt, answers = whole["chosen"][:same], {side: messages[same:] for side, messages in whole.items()}
    system = string(record, "system", optional=True)
    if system and prompt[:1] and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    if not any(message["role"] == "user" for message in prompt):
        raise UserError("chosen and rejected have no question in common, to which both are answers")
    check_messages(prompt, reply_follows=True)
    for side, answer in answers.items():
        if len(answer) % 2 == 0:
            raise UserError(f'"{side}" does not end with a message of the assistant')
        check_messages([*prompt, *answer])
    return {"prompt": prompt, **answers}


def is_empty(answer: list[dict]) -> bool:
    return not any(message["content"].strip() for message in answer if message["role"] == "assistant")


def as_messages(value, name: str) -> list[dict]:
    """A text as the user's message; messages as they are, without other keys."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise UserError(f'"{name}" is {kind(value)}; a string or a list of messages is expected')
    for message in value:
        if not isinstance(message, dict):
            raise UserError(f'"{name}" holds a value {kind(message)}; messages are expected')
    return [{"role": message.get("role"), "content": message.get("content")} for message in value]


def with_system_of(sides: dict, prompt: list[dict]) -> list[dict]:
    """The prompt with the system message that both sides, which repeat it, put before it."""
    first, other = (as_messages(value[:1], side) if isinstance(value, list) else []
                    for side, value in sides.items())
    repeated = first == other and first and first[0]["role"] == "system"
    return first + prompt if repeated and prompt[:1] != first else prompt


def answer_to(prompt: list[dict], value, side: str) -> list[dict]:
    """The messages of one side that follow the prompt, whether or not it repeats that."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = as_messages(value, side)
    if messages[:len(prompt)] == prompt:
        return messages[len(prompt):]
    if messages[:1] and messages[0]["role"] == "assistant":
        return messages
    raise UserError(f'"{side}" neither begins with the messages of the prompt nor is an answer to it')


def as_dialogue(value, side: str) -> list[dict]:
    """The messages of a whole dialogue, that is a list of them or hh-rlhf's text."""
    if not isinstance(value, str):
        return as_messages(value, side)
    before, *turns = TURN.split(value)
    if before.strip() or not turns:
        raise UserError(f'"{side}" is a text without a prompt, and does not begin with "\\n\\nHuman: "; '
                        f'expected are {FORMS}')
    return [{"role": SPEAKERS[who], "content": text.strip()} for who, text in zip(turns[::2], turns[1::2])]


# ------------------------------------------------------------------------------------------------------------
# Ids


class Pair(NamedTuple):
    """The ids of a prompt and of what follows it on either side, with the mask of what the assistant says."""
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_mask: list[bool]
    rejected_mask: list[bool]


def encode_pair(pair: dict, tokenizer: Tokenizer, template: Template = CHATML) -> Pair:
    """The ids of a pair of read_preferences: those of the prompt stand before both sides.

    render makes the prompt an exact prefix of the whole, so that no token reaches from one into the other.
    What the template writes behind the last end token is cut: nothing follows it.
    """
    prompt, _ = render(pair["prompt"], tokenizer, True, template)
    sides = []
    for side in ("chosen", "rejected"):
        ids, mask = render([*pair["prompt"], *pair[side]], tokenizer, template=template)
        assert ids[:len(prompt)] == prompt, "a prompt is a prefix of the conversation"
        end = len(mask) - mask[::-1].index(True)
        sides.append((ids[len(prompt):end], mask[len(prompt):end]))
    (chosen, chosen_mask), (rejected, rejected_mask) = sides
    return Pair(prompt, chosen, rejected, chosen_mask, rejected_mask)


SHORTEST = 8  # tokens of a prompt: with fewer left, a pair that does not fit is left out


def fitted(pair: Pair, seq_len: int) -> Pair | None:
    """The pair in a window of seq_len tokens: the beginning of a long prompt is cut, on both sides alike.

    The last token of a side needs no place, it is a target alone. None where the longer answer leaves no more
    than a few tokens of the prompt: an answer is never cut, or it would be learnt without its end.
    """
    room = seq_len + 1 - max(len(pair.chosen), len(pair.rejected))
    if len(pair.prompt) <= room:
        return pair
    return None if room < SHORTEST else pair._replace(prompt=pair.prompt[-room:])


def encode_pairs(pairs, tokenizer: Tokenizer, template: Template, seq_len: int, on_bad_line: str = "stop",
                 say=print) -> tuple[list[dict], list[Pair]]:
    """(the pairs that fit into windows of seq_len tokens, their ids); says how many were cut or left out.

    Those whose answers have the same ids are left out, too. Raises UserError where a prompt alone fills the
    window (with on_bad_line "skip" it is left out), and where no pair is left.
    """
    kept, encoded, cut, too_long, equal = [], [], 0, 0, 0
    for pair in tqdm(pairs, desc="encode", unit="pair", leave=False, disable=None):
        whole = encode_pair(pair, tokenizer, template)
        if whole.chosen == whole.rejected:  # a template may strip what sets them apart
            equal += 1
            continue
        if len(whole.prompt) >= seq_len and on_bad_line == "stop":
            raise UserError(f"{pair.get('where', 'a pair')}: its prompt has {len(whole.prompt)} tokens, and "
                            f"the window --seq_len {seq_len}; pass a larger one, or --on_bad_line skip to do "
                            f"without")
        ids = None if len(whole.prompt) >= seq_len else fitted(whole, seq_len)
        too_long, cut = too_long + (ids is None), cut + (ids is not None and ids is not whole)
        if ids is not None:
            kept.append(pair)
            encoded.append(ids)
    if equal:
        say(f"left out: {equal:,} pairs with equal answers, as {template.name} writes them")
    if not encoded and not too_long:
        raise UserError(f"there is no pair to learn from: {equal:,} with equal answers")
    if not encoded:
        raise UserError(f"none of the {too_long:,} pairs fits into --seq_len {seq_len} tokens; pass a larger "
                        f"one")
    if cut or too_long:
        say(f"of {len(encoded) + too_long:,} pairs {cut:,} lost the beginning of their prompt, and "
            f"{too_long:,} were left out: longer than {seq_len} tokens")
    return kept, encoded
