"""Generate text from any model folder, ours or a downloaded one of the Llama, Mistral, Qwen2 or Qwen3 kind.

    python sample.py --prompt "def read("                     # from runs/base, to the terminal as it comes
    python sample.py --chat runs/sft                          # a conversation; /help lists its commands
    python sample.py --model runs/base --num_samples 3 --temperature 0
    python sample.py --window 256 --max_new_tokens 20000      # beyond the context, in constant memory
    python sample.py --speculate 4 --draft runs/small         # a smaller model guesses, this one checks

The same seed gives the same text. A character whose bytes are not complete yet is held back, so nothing
broken is printed; where a sample ends within a character, U+FFFD stands for its part, as in
tokenizer.decode(ids). Text goes to stdout, what the program chose to stderr.
"""
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from adapters import open_model
from bpe import Tokenizer
from chat import TEMPLATES, Template, check_tokens, render
from config import UserError, parse, require, run
from documents import write_documents
from generation import Packed, check_speculation, room_of
from model import Transformer, check_sampling, generate_stream
from parallel import choose_device, choose_precision


@dataclass
class Settings:
    model: str = "runs/base"  # model folder
    chat: str | None = None  # folder of a model that was fine-tuned on conversations: talk with it instead
    template: Literal["chatml", "llama3", "qwen", "qwen3"] | None = None  # with --chat: how conversations are
        # written; none: recognised by the tokenizer's special tokens and the folder's chat template
    prompt: str = ""  # text to continue; empty: the beginning of a document
    prompt_file: str | None = None  # a UTF-8 file with the text to continue
    num_samples: int = 1  # one after the other
    max_new_tokens: int = 200  # a sample ends here, at the end-of-text token, or where the context ends; with
        # --chat a reply, for which so much of the context (at most half) is kept free
    window: int | None = None  # each token sees so many before it, so that a text may outgrow the context
    sinks: int = 4  # with --window: and the text's first so many (Xiao et al. 2023); without them it breaks
    temperature: float = 0.8  # 0: always the likeliest token; 1: the model as it is
    top_k: int | None = None  # draw among the k likeliest tokens only
    top_p: float | None = 0.95  # draw among the fewest tokens that hold this probability
    min_p: float | None = None  # draw among the tokens with this share of the likeliest's probability
    repetition_penalty: float = 1.0  # above 1: what stands in the text already becomes less likely
    speculate: int = 0  # guess so many tokens, check them in one pass: the same distribution, maybe sooner
    draft: str | None = None  # folder of a smaller model that guesses; none: what followed the same before
    seed: int = 0  # of what is drawn; the same seed gives the same text
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the first there is of cuda, mps, cpu
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of weights and products; auto: bf16 where fast

    def __post_init__(self):
        require(self, num_samples=(1, None), max_new_tokens=(1, None), seed=(0, 2 ** 63 - 1),
                window=(1, None), sinks=(0, None), speculate=(0, None))
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        clash = [name for name in ("model", "prompt", "prompt_file", "num_samples", "speculate", "draft")
                 if getattr(self, name) != getattr(Settings, name)]
        if self.chat is not None and clash:
            raise UserError(f"--chat is a conversation with the model of its own folder, one token at a "
                            f"time, so --{clash[0]} has no place in it; leave it out")
        if self.template is not None and self.chat is None:
            raise UserError("--template says how a conversation is written, but there is none; pass --chat")
        if self.prompt and self.prompt_file:
            raise UserError("--prompt and --prompt_file are both given; choose one")
        if self.draft and not self.speculate:
            raise UserError("--draft is to guess, but --speculate is 0; pass --speculate 4")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """As train.py chooses, but never float16, in which a model trained in bfloat16 may overflow."""
    chosen, why = choose_precision(precision, device)
    if precision == "auto":
        chosen, why = (chosen, why) if chosen == "bf16" else ("fp32", "bf16 does not pay here")
        print(f"{device.type}, {chosen}: {why}", file=sys.stderr)
    return torch.bfloat16 if chosen == "bf16" else torch.float32


def read_prompt(text: str, tokenizer: Tokenizer, settings: Settings, stops: set[int],
                room: float) -> list[int]:
    """The ids to continue: those of the text, behind the folder's first token where it has one."""
    prompt, first = tokenizer.encode(text), tokenizer.bos_token
    if first is not None:
        print(f"{first} stands before the prompt, as {settings.model} has it", file=sys.stderr)
        prompt = [tokenizer.special_tokens[first], *prompt]
    if not prompt:
        if not stops:
            raise UserError(f"{settings.model} names no end-of-text token to begin a document with; "
                            f"pass --prompt")
        prompt = [min(stops)]
    if len(prompt) >= room:
        raise UserError(f"the prompt has {len(prompt)} tokens, but this model reads at most {room} with the "
                        f"new ones; shorten it, or pass --window")
    return prompt


def new_length(model: Transformer, prompt: list[int], settings: Settings) -> int:
    return min(settings.max_new_tokens, room_of(model.config) - len(prompt))


def load_draft(settings: Settings, tokenizer: Tokenizer, device: torch.device,
               dtype: torch.dtype) -> Transformer | None:
    if settings.draft is None:
        return None
    draft, its_tokenizer = open_model(settings.draft, device, dtype)
    if its_tokenizer is None or its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{settings.draft} has another tokenizer than {settings.model}, so it cannot guess "
                        f"its tokens; train it on the same shards")
    return draft


def new_ids(model: Transformer, draft: Transformer | None, prompt: list[int], stops: set[int],
            settings: Settings, generator: torch.Generator) -> Iterator[int]:
    """The ids of one continuation, each as soon as it is drawn, without the one that ends it."""
    length = new_length(model, prompt, settings)
    for token, _ in generate_stream(model, [prompt], length, settings.temperature, settings.top_k,
                                    settings.top_p, generator, min_p=settings.min_p,
                                    repetition_penalty=settings.repetition_penalty,
                                    speculate=settings.speculate, draft=draft):
        if int(token) in stops:
            return
        yield int(token)


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # -sig: Windows' editors put a mark in front
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None


def write_samples(model: Transformer, tokenizer: Tokenizer, stops: set[int], settings: Settings,
                  generator: torch.Generator):
    text = read_text(settings.prompt_file) if settings.prompt_file else settings.prompt
    draft = load_draft(settings, tokenizer, generator.device, model.lm_head.weight.dtype)
    prompt = read_prompt(text, tokenizer, settings, stops, room_of(model.config))
    check_speculation(model.config, [prompt], new_length(model, prompt, settings), settings.speculate, draft)
    with Packed(model):  # once for all samples
        for number in range(settings.num_samples):
            if settings.num_samples > 1:
                print(f"--- sample {number + 1}")
            print(text, end="", flush=True)
            for piece in tokenizer.decode_stream(new_ids(model, draft, prompt, stops, settings, generator)):
                print(piece, end="", flush=True)
            print()


# ------------------------------------------------------------------------------------------------------------
# Conversations


@dataclass
class Talk:
    """What was said."""
    system: str = ""  # empty: nothing, or what the template has there
    turns: list[dict] = field(default_factory=list)  # messages of user and assistant, one after the other
    first: int = 0  # the model sees the turns from this one on; its context has no room for those before

    def messages(self) -> list[dict]:
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns


def converse(model: Transformer, tokenizer: Tokenizer, stops: set[int], settings: Settings,
             generator: torch.Generator):
    """Reply to what comes from stdin, until it ends. The cache is built anew for each reply."""
    template = choose_template(tokenizer, settings)
    stops = stops | {tokenizer.special_tokens[template.end]}
    context, talk = room_of(model.config), Talk()
    room = context - int(min(settings.max_new_tokens, context / 2))
    with contextlib.suppress(KeyboardInterrupt), Packed(model):  # at the prompt; that in a reply stops there
        for text in messages_of_user(talk, settings):
            prompt = ask(text, talk, tokenizer, template, room)
            if prompt is None:
                continue
            said = reply(model, tokenizer, prompt, stops, settings, generator)
            if said.strip():
                talk.turns.append({"role": "assistant", "content": said})
            else:  # the model was trained on no conversation with an empty reply
                talk.turns.pop()
                tell("nothing was said; your message is taken back")
    if sys.stdin.isatty():
        print()  # where Ctrl-C or Ctrl-D left the cursor behind the prompt


def choose_template(tokenizer: Tokenizer, settings: Settings) -> Template:
    """The template of --template, or else the one that the folder is made for; which, is said.

    It is the one whose marks stand in the folder's chat template (special tokens, <think>, what the system
    says), the most of them where several do; without such a one, the first whose special tokens there are.
    """
    if settings.template is not None:
        check_tokens(tokenizer, TEMPLATES[settings.template])
        tell(f"template {settings.template}; /help lists the commands")
        return TEMPLATES[settings.template]
    possible = [template for template in TEMPLATES.values()
                if tokenizer.special_tokens.keys() >= set(template.special)]
    if not possible:
        needed = "; ".join(f"{name}: {' '.join(template.special)}" for name, template in TEMPLATES.items())
        raise UserError(f"the tokenizer of {settings.chat} has the special tokens of no template ({needed}); "
                        f"python sft.py --init_from {settings.chat} adds them and teaches their use")

    def likeness(template: Template) -> int:
        marks = {*template.special, *template.spoken, template.system} - {""}
        return len(marks) * all(mark in (tokenizer.chat_template or "") for mark in marks)
    chosen = max(possible, key=likeness)
    why = "chat template" if likeness(chosen) else "special tokens"
    tell(f"template {chosen.name}, by the {why} of {settings.chat}; /help lists the commands")
    return chosen


def ask(text: str, talk: Talk, tokenizer: Tokenizer, template: Template, room: float) -> list[int] | None:
    """The ids to continue with a reply to this text, at most `room`; None, said, if it is too long.

    From then on the model sees no more of the oldest turns than there is room for, which is said.
    """
    asked = Talk(talk.system, [*talk.turns, {"role": "user", "content": text}])
    for first in range(talk.first, len(asked.turns), 2):
        prompt, _ = render(Talk(talk.system, asked.turns[first:]).messages(), tokenizer, True, template)
        if len(prompt) <= room:
            break
    else:
        tell(f"too long: with the system message these are {len(prompt)} tokens, and {room} leave room for a "
             f"reply; shorten it")
        return None
    if first > talk.first:
        tell(f"the context is full: the model no longer sees the first {first // 2} of your "
             f"{len(asked.turns) // 2 + 1} messages and their replies")
    talk.turns, talk.first = asked.turns, first
    return prompt


def reply(model: Transformer, tokenizer: Tokenizer, prompt: list[int], stops: set[int], settings: Settings,
          generator: torch.Generator) -> str:
    """What the model says, printed as it comes. Ctrl-C ends it there; a reply that is cut is marked."""
    said, number, cut = "", 0, ""

    def counted() -> Iterator[int]:
        nonlocal number
        for number, token in enumerate(new_ids(model, None, prompt, stops, settings, generator), start=1):
            yield token
    try:
        for piece in tokenizer.decode_stream(counted()):
            said += piece
            print(piece, end="", flush=True)
        if number == new_length(model, prompt, settings):
            cut = f"cut after {number} tokens, where --max_new_tokens or the context ends"
    except KeyboardInterrupt:
        cut = "stopped"
    print(flush=True)
    if cut:
        tell(cut)
    return said


HELP = """\
/reset          forget what was said; the system message stays
/system TEXT    what the system says from now on; without TEXT: nothing
/temperature X  0: always the likeliest token; 1: the model as it is
/paste          the lines from here to one with /end are one message
/save FILE      write the conversation as JSON Lines, which sft.py reads
/exit           end; so does Ctrl-D, and Ctrl-C at the prompt, while during a reply it stops the reply
//text          say /text; only a line that begins with a single / is a command"""


def messages_of_user(talk: Talk, settings: Settings) -> Iterator[str]:
    """Yield what stdin has for the model. Commands are carried out; a line of white space is nothing."""
    lines = read_lines()
    for line in lines:
        if line.startswith("/") and not line.startswith("//"):
            command, *rest = line.split(maxsplit=1)
            if command == "/exit":
                return
            if command != "/paste":
                obey(command, "".join(rest).rstrip(), talk, settings)
                continue
            text = "\n".join([*rest, *itertools.takewhile(lambda line: line.rstrip() != "/end", lines)])
        else:
            text = line.removeprefix("/")
        if text.strip():
            yield text


def read_lines() -> Iterator[str]:
    """Yield the lines of stdin to its end, without their ends. What is no terminal speaks UTF-8."""
    at_terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(encoding=None if at_terminal else "utf-8-sig", errors="strict")
    if not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")
    if at_terminal:
        with contextlib.suppress(ImportError):  # Windows has its own
            import readline  # noqa: F401 - input() then lets one edit, and takes lines of any length
    while True:
        try:
            line = input("> " if at_terminal else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"the input is not {error.encoding} ({error.reason}); convert it") from None
        yield line


def obey(command: str, argument: str, talk: Talk, settings: Settings):
    """Carry out a command of HELP and tell so, or what is wrong with it, in one line."""
    try:
        if command == "/reset":
            talk.turns, talk.first = [], 0
            tell("what was said is forgotten")
        elif command == "/system":
            talk.system = argument
            tell("a new system message" if argument else "no system message")
        elif command == "/temperature":
            settings.temperature = temperature(argument)
            tell(f"temperature {settings.temperature}")
        elif command == "/save":
            save(talk, argument)
            tell(f"saved: {argument}")
        elif command == "/help":
            print(HELP, file=sys.stderr)
        else:
            raise UserError(f"there is no command {command:.60}; /help lists them, and a second / in front "
                            f"says this as a text")
    except UserError as error:
        tell(error)


def temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"/temperature needs a number, not {text!r:.60}") from None
    check_sampling(value)
    return value


def save(talk: Talk, name: str):
    """Write all that was said, also what the model no longer sees. UserError where that cannot be."""
    path = Path(os.path.expanduser(name))
    if not name:
        raise UserError("/save needs the name of a file")
    if not talk.turns:
        raise UserError("nothing was said yet that could be saved")
    if path.exists():
        raise UserError(f"{name} exists already; choose another name")
    try:
        write_documents(path, [{"messages": talk.messages()}])
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UserError(f"{name!r} cannot be written: {getattr(error, 'strerror', error)}") from None


def tell(what):
    """Say something that is not the model's."""
    print(f"({what})", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# The command


def main():
    settings = parse(Settings)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.precision, device)
    folder = settings.model if settings.chat is None else settings.chat
    model, tokenizer = open_model(folder, device, dtype)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer.json, so its tokens cannot be read; "
                        f"copy it into the folder")
    if settings.window is not None:
        model.config = model.model.config = replace(model.config, sliding_window=settings.window,
                                                    attention_sinks=settings.sinks)
    stops = set(tokenizer.stop_ids)
    generator = torch.Generator(device).manual_seed(settings.seed)
    if settings.chat is None:
        write_samples(model, tokenizer, stops, settings, generator)
    else:
        converse(model, tokenizer, stops, settings, generator)


if __name__ == "__main__":
    run(main)
