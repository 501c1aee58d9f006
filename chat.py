"""Conversations: from the files in which people keep them, to tokens, and what of these is to be learnt.

    [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]     becomes, in ChatML,
    <|im_start|>user\\n1 + 1?<|im_end|>\\n<|im_start|>assistant\\n2<|im_end|>\\n
                                                             ^^^^^^^^^^^ learnt: mask is True

A conversation is {"messages": [{"role": "system", "user" or "assistant", "content": "…"}, …]}: a system
message or none, then user and assistant in turn. A Template says what stands around each message; `render`
writes a conversation as tokens, `jinja` tells transformers how to. `read_conversations` reads the files.

The model is to learn what it says and where it stops, and nothing of what it is told: the mask is True on
content and end token of every reply, and nowhere else. Whatever a content spells, it stays text: control
tokens come from the template alone.
"""
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import data
from bpe import Tokenizer
from config import UserError
from data import Rejected

ROLES = ("system", "user", "assistant")


# ---- 1. Templates: what stands around the messages ---------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """The form in which conversations are written; values alone, no template has code of its own."""
    name: str
    special: tuple[str, ...]  # the special tokens among what follows
    header: str  # before each message; {role} stands for its role
    end: str  # behind each message; that of a reply is learnt, so that the model stops
    after: str = ""  # behind that, never learnt
    begin: str = ""  # before all of it
    system: str = ""  # what the system says in conversations where it says nothing
    strip: bool = False  # contents lose the white space at their ends
    thought: str = ""  # learnt before replies without a <think> part
    spoken: tuple[str, ...] = ()  # tokens that a reply may spell, if the tokenizer has them


CHATML = Template("chatml", ("<|im_start|>", "<|im_end|>"), "<|im_start|>{role}\n", "<|im_end|>", after="\n")
LLAMA3 = Template(
    "llama3", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", begin="<|begin_of_text|>", strip=True)
QWEN = Template(  # 2.5
    "qwen", CHATML.special, CHATML.header, CHATML.end, CHATML.after,
    system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
# Every reply thinks, if only for two line breaks, as in TRL's template for training; Qwen's own drops the
# thoughts of all replies but the last, which then would be trained in a form in which none is asked for.
QWEN3 = Template("qwen3", CHATML.special, CHATML.header, CHATML.end, CHATML.after,
                 thought="<think>\n\n</think>\n\n", spoken=("<think>", "</think>"))
TEMPLATES = {template.name: template for template in (CHATML, LLAMA3, QWEN, QWEN3)}


def render(messages: list[dict], tokenizer: Tokenizer, add_generation_prompt: bool = False,
           template: Template = CHATML) -> tuple[list[int], list[bool]]:
    """(ids, mask) of a conversation; mask True on what the assistant says, its end token included.

    add_generation_prompt: end with the header of a reply, for the model to go on. What a reply is trained
    after is what it is asked for with: render(messages[:-1], …, True) is an exact prefix of render(messages).

    The ids are those of transformers with jinja(template), but for two things. There, a content that spells
    a special token gets that token. And there, the beginning of a reply can change the tokens before it: a
    line break it begins with shares a token with the header's (with GPT-2's pattern, other white space too).
    Here header and reply are encoded apart, or a prompt would not be what the model was trained with.

    Raises UserError for messages that are no conversation (see check_messages), and for a tokenizer without
    the template's special tokens.
    """
    check_messages(messages, reply_follows=add_generation_prompt)
    check_tokens(tokenizer, template)
    ids, mask = [], []
    for learnt, run in groupby(pieces(messages, add_generation_prompt, template), key=lambda piece: piece[2]):
        new = encode(run, tokenizer)
        ids += new
        mask += [learnt] * len(new)
    return ids, mask


def pieces(messages: list[dict], add_generation_prompt: bool,
           template: Template) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """Yield the conversation in pieces: (text, the tokens that it may spell, whether it is learnt)."""
    own = template.special
    yield template.begin, own, False
    if template.system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": template.system}, *messages]
    for message in messages:
        role, content = message["role"], message["content"]
        content = content.strip() if template.strip else content
        is_reply = role == "assistant"
        spoken = template.spoken if is_reply else ()
        yield template.header.replace("{role}", role), own, False
        if is_reply and "</think>" not in content:
            yield template.thought, spoken, True
        yield content, spoken, is_reply
        yield template.end, own, is_reply
        yield template.after, own, False
    if add_generation_prompt:
        yield template.header.replace("{role}", "assistant"), own, False


def encode(run, tokenizer: Tokenizer) -> list[int]:
    """The ids of pieces in a row, their text encoded from special token to special token.

    So the line break of a header and those that a content begins with may be one token, as in transformers.
    """
    ids, text = [], ""
    for piece, tokens, _ in run:
        tokens = [token for token in tokens if token in tokenizer.special_tokens]
        for part in re.split(f"({'|'.join(map(re.escape, tokens))})", piece) if tokens else [piece]:
            if part in tokens:
                ids += [*tokenizer.encode(text), tokenizer.special_tokens[part]]
                text = ""
            else:
                text += part
    return ids + tokenizer.encode(text)


def check_messages(messages, reply_follows: bool = False) -> None:
    """Raise UserError unless this is a conversation; reply_follows: one to which a reply may be added."""
    if not isinstance(messages, list) or not messages:
        raise UserError("a conversation is a list of messages, at least one")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise UserError(f'message {number} is {kind(message)}; expected is {{"role": …, "content": …}}')
        if message.get("role") not in ROLES:
            raise UserError(f"message {number} has the role {message.get('role')!r}, not one of "
                            f"{', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"the content of message {number} is {kind(message.get('content'))}; a string is "
                            f"expected")
    has_system = messages[0]["role"] == "system"
    roles = [message["role"] for message in messages[has_system:]] + ["assistant"] * reply_follows
    for number, role in enumerate(roles):
        if role != ROLES[1 + number % 2]:
            expected = ROLES[1 + number % 2]
            raise UserError(f"message {number + 1 + has_system} is of the {role}, not of the {expected}: "
                            f"a system message or none comes first, then user and assistant in turn")


def kind(value) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def check_tokens(tokenizer: Tokenizer, template: Template) -> None:
    missing = [token for token in template.special if token not in tokenizer.special_tokens]
    if missing:
        raise UserError(f"the tokenizer lacks {' '.join(missing)}, which the template {template.name} needs; "
                        f"with_chat_tokens adds them, and the model's embedding grows by as many rows")


def with_chat_tokens(tokenizer: Tokenizer, template: Template = CHATML) -> Tokenizer:
    """The tokenizer with the template's special tokens at its end, if it lacks them: other ids stay."""
    return tokenizer.with_special_tokens(template.special)


def jinja(template: Template) -> str:
    """The template for transformers' apply_chat_template, marked for its return_assistant_tokens_mask.

    It belongs into tokenizer_config.json, as "chat_template". What differs from render: see there.
    """
    def say(text: str, role: str = "") -> str:
        return "{{- " + json.dumps(text, ensure_ascii=False).replace("{role}", role) + " }}" if text else ""

    content, thinks = "message['content']" + " | trim" * template.strip, template.thought
    system = template.header.replace("{role}", "system") + template.system + template.end + template.after
    lines = [
        say(template.begin),
        "{%- if messages[0]['role'] != 'system' %}" + say(system) + "{%- endif %}" if template.system else "",
        "{%- for message in messages %}",
        "{%- set content = " + content + " %}",
        say(template.header, role='" + message["role"] + "'),
        "{%- if message['role'] == 'assistant' %}",
        "{%- generation %}",
        "{%- if '</think>' not in content %}" + say(template.thought) + "{%- endif %}" if thinks else "",
        "{{- content }}", say(template.end),
        "{%- endgeneration %}",
        "{%- else %}",
        "{{- content }}", say(template.end),
        "{%- endif %}",
        say(template.after),
        "{%- endfor %}",
        "{%- if add_generation_prompt %}" + say(template.header, role="assistant") + "{%- endif %}",
    ]
    return "\n".join(filter(None, lines))


# ---- 2. Files of conversations -----------------------------------------------------------------------------

CALCULATOR = re.compile(r"<<[^<>\n]*>>")  # GSM8K's marks for a calculator: 48/2 = <<48/2=24>>24
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names; its other ones are ours


def string(record: dict, key: str, optional: bool = False) -> str:
    """The string at a key; an optional one may be missing or null."""
    value = record.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise UserError(f'"{key}" is {kind(value)}; a string is expected')
    return value


def turns(user: str, assistant: str) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def from_alpaca(record: dict) -> list[dict]:
    """An instruction and perhaps its input make one question, with an empty line in between."""
    parts = string(record, "instruction"), string(record, "input", optional=True)
    return turns("\n\n".join(filter(None, parts)), string(record, "output"))


def from_sharegpt(record: dict) -> list[dict]:
    said = record["conversations"]
    if not isinstance(said, list) or not all(isinstance(turn, dict) and isinstance(turn.get("from"), str)
                                             for turn in said):
        raise UserError('"conversations" is not a list of objects with "from" and "value"')
    return [{"role": SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value")} for turn in said]


def from_pair(user: str, assistant: str) -> Callable[[dict], list[dict]]:
    return lambda record: turns(string(record, user), string(record, assistant))


FORMS = {  # name: (the keys by which it is known, its messages); of two that fit, the first
    "messages": (("messages",), lambda record: record["messages"]),
    "ShareGPT": (("conversations",), from_sharegpt),
    "Alpaca": (("instruction", "output"), from_alpaca),
    "prompt and response": (("prompt", "response"), from_pair("prompt", "response")),
    "prompt and completion": (("prompt", "completion"), from_pair("prompt", "completion")),
    "question and answer": (("question", "answer"), from_pair("question", "answer")),
}


def read_conversations(path: str | Path, on_bad_line: str = "stop") -> Iterator[dict]:
    """Yield the conversations of a file: {"messages": [{"role", "content"}, …]}, the last one a reply.

    path: .jsonl, or .json (the same, or one list), each also .gz; in one of FORMS, as its first line tells.
    A "system" key of any form becomes the system message; in the form of messages other keys are kept.
    Cut and counted: what comes after the last reply, and GSM8K's marks for a calculator in answers.
    on_bad_line: "stop" raises UserError with file and line; "skip" goes on, and tells at the end of how many.

    Raises UserError also if the file has none of the forms, or no conversation at all.
    """
    path, counts = Path(path), Counter(conversations=0, replies=0)
    if path.is_dir() or data.content_suffix(path) not in (".jsonl", ".json"):
        raise UserError(f"{path}: conversations are read from files .jsonl and .json (also .gz)")
    records = data.read_files(data.find_files([path]), read_records)
    for conversation in data.accepted(conversations(records, path, counts), on_bad_line, {}):
        counts["conversations"] += 1
        counts["replies"] += sum(message["role"] == "assistant" for message in conversation["messages"])
        yield conversation
    if not counts["conversations"]:
        raise UserError(f"{path} holds no conversation")
    print(f"{path}: " + ", ".join(f"{number:,} {name}" for name, number in counts.items() if number))


def conversations(records, path: Path, counts: Counter) -> Iterator[dict | Rejected]:
    """Yield the conversations that the records of a file are, all by the form of the first."""
    form = None
    for item in records:
        if isinstance(item, Rejected):
            yield item
            continue
        if form is None:
            form = recognise(item["record"], item["where"])
            print(f"{path}: conversations in the form of {form} ({', '.join(FORMS[form][0])})")
        try:
            conversation = convert(item["record"], form, counts)
        except UserError as error:
            conversation = Rejected("conversation", f"{item['where']}: {error}", 0)
        yield conversation


def recognise(record, where: str) -> str:
    """The name of the form that has this record's keys. Raises UserError, with all forms, for none."""
    for name, (keys, _) in FORMS.items():
        if isinstance(record, dict) and record.keys() >= set(keys):
            return name
    is_object = isinstance(record, dict)
    found = f"the keys {', '.join(record) or 'none'}" if is_object else f"a value {kind(record)}"
    known = "; ".join(f"{name} ({', '.join(keys)})" for name, (keys, _) in FORMS.items())
    raise UserError(f"{where}: {found}: that is no form of conversations; known are {known}")


def convert(record, form: str, counts: Counter) -> dict:
    """The conversation that a record is in this form. Raises UserError, its message saying what is wrong."""
    keys, to_messages = FORMS[form]
    if not isinstance(record, dict) or not record.keys() >= set(keys):
        raise UserError(f"the file begins in the form of {form}, and this is not of it, for it lacks one of "
                        f"{', '.join(keys)}; split a file of mixed forms")
    messages, system = to_messages(record), string(record, "system", optional=True)
    check_messages(messages)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    if form == "question and answer":
        messages[-1]["content"], marks = CALCULATOR.subn("", messages[-1]["content"])
        counts["answers cleared of calculator marks"] += marks > 0
    replies = [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    if not replies:
        raise UserError("no message is of the assistant, so there is nothing to learn")
    for number in replies:
        if not messages[number - 1]["content"].strip():
            raise UserError(f"message {number}, a reply, is empty")
    counts["messages cut behind the last reply"] += len(messages) - replies[-1]
    kept = record if form == "messages" else {}
    return {**kept, "messages": messages[:replies[-1]]}


def read_records(file: io.BufferedIOBase, path: Path, source: str) -> Iterator[dict | Rejected]:
    """Yield {"where", "record"} for each line of JSON Lines, or for each item of a list that is the file."""
    is_first = True
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        is_list = is_first and line.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        content, is_first = line + file.read() if is_list else line, False
        try:
            value = data.parse_json(content)
        except (ValueError, RecursionError) as error:
            yield Rejected("json", f"{path}:{number}: {error}", len(content))
            continue
        if is_list:
            yield from ({"where": f"{path}: item {item}", "record": record}
                        for item, record in enumerate(value, start=1))
        else:
            yield {"where": f"{path}:{number}", "record": value}
