"""Generate text from any model folder, ours or a downloaded one of the Llama or Qwen3 kind.

    python sample.py --prompt "def read("                     # from runs/base, to the terminal as it comes
    python sample.py --model runs/base --num_samples 3 --temperature 0

The same seed gives the same text. A character whose bytes are not complete yet is held back, so nothing
broken is printed.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from checkpoint import load_model, read_json
from config import UserError, parse, require, run
from model import Transformer, check_sampling, generate_stream
from parallel import choose_device


@dataclass
class Settings:
    model: str = "runs/base"  # model folder
    prompt: str = ""  # text to continue; empty: the beginning of a document
    prompt_file: str | None = None  # a UTF-8 file with the text to continue
    num_samples: int = 1  # one after the other
    max_new_tokens: int = 200  # a sample ends here, at the end-of-text token, or where the context ends
    temperature: float = 0.8  # 0: always the likeliest token; 1: the model as it is
    top_k: int | None = None  # draw among the k likeliest tokens only
    top_p: float | None = 0.95  # draw among the fewest tokens that hold this probability
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    def __post_init__(self):
        require(self, num_samples=(1, None), max_new_tokens=(1, None), seed=(0, 2 ** 63 - 1))
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.prompt and self.prompt_file:
            raise UserError("--prompt and --prompt_file are both given; choose one")


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


def new_ids(model: Transformer, prompt: list[int], stops: set[int], settings: Settings,
            generator: torch.Generator) -> Iterator[int]:
    """The ids of one continuation, each as soon as it is drawn, without the one that ends it."""
    length = min(settings.max_new_tokens, model.config.max_seq_len - len(prompt))
    for token, _ in generate_stream(model, [prompt], length, settings.temperature, settings.top_k,
                                    settings.top_p, generator):
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
    model, tokenizer = load_model(settings.model, device)
    if tokenizer is None:
        raise UserError(f"{settings.model} has no tokenizer.json, so its tokens cannot be read; "
                        f"copy it into the folder")
    text = read_text(settings.prompt_file) if settings.prompt_file else settings.prompt
    stops = stop_ids(settings.model, model.config.vocab_size)
    prompt = tokenizer.encode(text)
    if not prompt:
        if not stops:
            raise UserError(f"{settings.model} names no end-of-text token to begin a document with; "
                            f"pass --prompt")
        prompt = [min(stops)]
    if len(prompt) >= model.config.max_seq_len:
        raise UserError(f"the prompt has {len(prompt)} tokens, but this model reads at most "
                        f"{model.config.max_seq_len} with the new ones; shorten it")
    generator = torch.Generator(device).manual_seed(settings.seed)
    for number in range(settings.num_samples):
        if settings.num_samples > 1:
            print(f"--- sample {number + 1}")
        print(text, end="", flush=True)
        for piece in tokenizer.decode_stream(new_ids(model, prompt, stops, settings, generator)):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    run(main)
