"""Generate text from any model folder, ours or a downloaded one of the Llama, Mistral, Qwen2 or Qwen3 kind.

    python sample.py --prompt "def read("                     # from runs/base, to the terminal as it comes
    python sample.py --model runs/base --num_samples 3 --temperature 0
    python sample.py --window 256 --max_new_tokens 20000      # beyond the context, in constant memory
    python sample.py --speculate 4 --draft runs/small         # a smaller model guesses, this one checks

The same seed gives the same text. A character whose bytes are not complete yet is held back, so nothing
broken is printed; where a sample ends within a character, U+FFFD stands for its part, as in
tokenizer.decode(ids). Text goes to stdout, what the program chose to stderr.
"""
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bpe import Tokenizer
from checkpoint import load_model, read_json
from config import UserError, parse, require, run
from generation import Packed, check_speculation
from model import ModelConfig, Transformer, check_sampling, generate_stream
from parallel import choose_device, choose_precision


@dataclass
class Settings:
    model: str = "runs/base"  # model folder
    prompt: str = ""  # text to continue; empty: the beginning of a document
    prompt_file: str | None = None  # a UTF-8 file with the text to continue
    num_samples: int = 1  # one after the other
    max_new_tokens: int = 200  # a sample ends here, at the end-of-text token, or where the context ends
    window: int | None = None  # each token sees so many before it, so that a text may outgrow the context
    sinks: int = 4  # with --window: and the text's first so many (Xiao et al. 2023); without them it breaks
    temperature: float = 0.8  # 0: always the likeliest token; 1: the model as it is
    top_k: int | None = None  # draw among the k likeliest tokens only
    top_p: float | None = 0.95  # draw among the fewest tokens that hold this probability
    min_p: float | None = None  # draw among the tokens with this share of the likeliest's probability
    repetition_penalty: float = 1.0  # above 1: what stands in the text already becomes less likely
    speculate: int = 0  # guess so many tokens, check them in one pass: the same distribution, maybe sooner
    draft: str | None = None  # folder of a smaller model that guesses; none: what followed the same before
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of weights and products; auto: bf16 where fast

    def __post_init__(self):
        require(self, num_samples=(1, None), max_new_tokens=(1, None), seed=(0, 2 ** 63 - 1),
                window=(1, None), sinks=(0, None), speculate=(0, None))
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
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


def stop_ids(folder: str, vocab_size: int) -> set[int]:
    """The ids that end a text, as generation_config.json or config.json has them: none, one or several."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        found = read_json(path).get("eos_token_id") if path.exists() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(id) is int and 0 <= id < vocab_size for id in ids):
                raise UserError(f"{path}: eos_token_id {found!r:.60} is not of this model's ids, "
                                f"0 to {vocab_size - 1}")
            return set(ids)
    return set()


def first_token(folder: str, tokenizer: Tokenizer) -> str | None:
    """The special token that this folder's tokenizer puts before every text (Llama's BOS), or None.

    tokenizer_config.json says so with add_bos_token; where it has no word, the template in tokenizer.json.
    """
    path = Path(folder) / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    if type(settings.get("add_bos_token")) is bool:
        token = settings.get("bos_token") if settings["add_bos_token"] else None
        token = token.get("content") if isinstance(token, dict) else token
    else:
        token = template_start(read_json(Path(folder) / "tokenizer.json").get("post_processor"))
    if token is not None and token not in tokenizer.special_tokens:
        raise UserError(f"{folder} puts {token!r:.60} before every text, but its tokenizer has no such "
                        f"special token; correct tokenizer_config.json")
    return token


def template_start(processor) -> str | None:
    """The token that a post-processor of Hugging Face tokenizers puts first, or None."""
    if not isinstance(processor, dict):
        return None
    for step in processor.get("processors", [processor]):  # a sequence of them, or one
        if step.get("type") == "TemplateProcessing":
            first = step.get("single", [{}])[0]
            return first.get("SpecialToken", {}).get("id")
    return None


def read_prompt(text: str, tokenizer: Tokenizer, settings: Settings, stops: set[int],
                room: float) -> list[int]:
    """The ids to continue: those of the text, behind the folder's first token where it has one."""
    prompt, first = tokenizer.encode(text), first_token(settings.model, tokenizer)
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


def room_of(config: ModelConfig) -> float:
    """How many tokens a text may have; with a window that the model knows, any number."""
    if config.sliding_window is None or config.sliding_window + config.attention_sinks > config.max_seq_len:
        return config.max_seq_len
    return math.inf


def new_length(model: Transformer, prompt: list[int], settings: Settings) -> int:
    return min(settings.max_new_tokens, room_of(model.config) - len(prompt))


def load_draft(settings: Settings, tokenizer: Tokenizer, device: torch.device,
               dtype: torch.dtype) -> Transformer | None:
    if settings.draft is None:
        return None
    draft, its_tokenizer = load_model(settings.draft, device, dtype)
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


def main():
    settings = parse(Settings)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.precision, device)
    model, tokenizer = load_model(settings.model, device, dtype)
    if tokenizer is None:
        raise UserError(f"{settings.model} has no tokenizer.json, so its tokens cannot be read; "
                        f"copy it into the folder")
    text = read_text(settings.prompt_file) if settings.prompt_file else settings.prompt
    if settings.window is not None:
        model.config.sliding_window, model.config.attention_sinks = settings.window, settings.sinks
    draft = load_draft(settings, tokenizer, device, dtype)
    stops = stop_ids(settings.model, model.config.vocab_size)
    prompt = read_prompt(text, tokenizer, settings, stops, room_of(model.config))
    check_speculation(model.config, [prompt], new_length(model, prompt, settings), settings.speculate, draft)
    generator = torch.Generator(device).manual_seed(settings.seed)
    with Packed(model):  # once for all samples
        for number in range(settings.num_samples):
            if settings.num_samples > 1:
                print(f"--- sample {number + 1}")
            print(text, end="", flush=True)
            for piece in tokenizer.decode_stream(new_ids(model, draft, prompt, stops, settings, generator)):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    run(main)
