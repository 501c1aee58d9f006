"""More tokens for a trained model: merges learned on new text, and rows that begin with sense.

    python bpe.py extend --model runs/base --text poems.jsonl --new_tokens 2000 --out runs/grown
    python data.py --input poems.jsonl --tokenizer runs/grown --out runs/poems
    python train.py --init_from runs/grown --data runs/poems --steps 200 --out runs/poet

A tokenizer of code spells Chinese byte by byte: three tokens a character, and a window full of little. The
first command goes on with its merges on the new text (Tokenizer.extend), gives the model a row of embedding
and head for each new token, and tells what that does to the text that it holds out, the same as data.py's.

A new token has not been seen in training, but its pieces have. Where its row begins as the mean of theirs
(Sachidananda et al. 2021, "Efficient Domain Adaptation of Language Models via Adaptive Tokenization"), it
stands among what it is made of; where all begin alike, at the mean of all rows, training has to tell them
apart first.
"""
import contextlib
import copy
import io
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import config
from bpe import Tokenizer
from config import UserError
from metaspace import load_tokenizer


@dataclass
class Settings:
    text: tuple[str, ...]  # documents like those to come: files and folders, as data.py reads them
    new_tokens: int = 2000  # how many more
    model: str | None = None  # a model folder; its embedding and head grow with its tokenizer
    tokenizer: str | None = None  # without a model: the tokenizer.json that grows, or its folder
    out: str = "runs/grown"  # the model folder to write; without a model, the tokenizer.json
    rows: Literal["pieces", "all"] = "pieces"  # of what a new token's row is the mean: the rows of the tokens
                                               # that it is made of, or all rows
    val_fraction: float = 0.03  # share of the documents held out, by the hash of their content
    workers: int | None = None  # processes that cut and count; none: one a core
    overwrite: bool = False  # replace `out` if it is there

    def __post_init__(self):
        config.require(self, new_tokens=(1, None), val_fraction=(1e-6, 0.5), workers=(1, None))
        if (self.model is None) == (self.tokenizer is None):
            raise UserError("--model or --tokenizer, one of them: what shall be extended?")
        if Path(self.out).exists() and not self.overwrite:
            raise UserError(f"{self.out} exists; pass --overwrite to replace it, or another --out")


# ---- 1. Rows for new tokens --------------------------------------------------------------------------------


def pieces_of_new(old: Tokenizer, new: Tokenizer) -> dict[int, list[int]]:
    """{id of a token that only `new` has: the ids, in `old`, that it is made of}.

    Raises UserError unless new is old with more tokens: every old id must mean what it meant.
    """
    changed = [id for id, token in old.vocab.items() if new.vocab.get(id) != token]
    if changed or new.merges[:len(old.merges)] != old.merges:
        what = f"id {changed[0]} stands for another token" if changed else "its merges are others"
        raise UserError(f"the new tokenizer is not the old one extended: {what}")
    pieces = {token: [id] for id, token in old.ordinary_vocab().items()}
    for left, right in new.merges[len(old.merges):]:
        pieces.setdefault(left + right, pieces[left] + pieces[right])
    pieces |= {text.encode(): old.encode(text) for text in new.special_tokens}
    return {id: pieces[token] for id, token in new.vocab.items() if id not in old.vocab}


def extend_embeddings(model, old_tokenizer: Tokenizer, new_tokenizer: Tokenizer, rows: str = "pieces"):
    """Give the model, in place, a row of embedding and head for each token that only new_tokenizer has: the
    mean of the rows of its old pieces (rows="pieces"), or of all rows ("all"). What it knew stays as it was.

    Raises UserError unless new_tokenizer is old_tokenizer extended.
    """
    from model import extend_embedding  # here: torch is not needed where only the tokenizer grows
    pieces = pieces_of_new(old_tokenizer, new_tokenizer)
    if rows == "all":
        everything = list(range(model.config.vocab_size))
        pieces = {id: everything for id in pieces if id < model.config.vocab_size}  # what rows to spare hold
    extend_embedding(model, new_tokenizer.vocab_size, pieces)


# ---- 2. What it does to text that was held out -------------------------------------------------------------


def split_texts(settings: Settings) -> tuple[list[str], list[str]]:
    """(texts to learn from, texts held out), as data.py splits them."""
    import data
    documents = data.progress(data.read_documents(settings.text), "read")
    bound, parts = int(settings.val_fraction * 2 ** 128), ([], [])
    for document in data.kept_documents(documents):
        parts[data.content_hash(document["text"]) < bound].append(document["text"])
    if not all(parts):
        raise UserError(f"--text has {sum(map(len, parts))} documents: too few to hold out "
                        f"{settings.val_fraction:g} of them; give more, or a larger --val_fraction")
    return parts


def bytes_a_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in texts) / sum(len(tokenizer.encode(text)) for text in texts)


def bits_per_byte(model, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """The loss on the texts, one after the other, as train.py measures it: windows overlap by half."""
    import data
    import train
    from objectives import next_token_loss
    length = model.config.max_seq_len
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, \
            contextlib.redirect_stdout(io.StringIO()):
        data.write_documents(Path(folder, "val.jsonl"), ({"text": text} for text in texts))
        meta = {"dtype": tokenizer.dtype.name, "end_of_text": data.end_of_text_id(tokenizer),
                "val": data.write_shard(Path(folder), "val", tokenizer, 1)}
        Path(folder, "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        batches = data.Batches(folder, "val", 16, length, stride=max(1, length // 2))
        env = train.setup(train.Compute(compile=False))
        return train.evaluate(model.to(env.device), batches, next_token_loss, env)["bits_per_byte"]


# ---- 3. The command ----------------------------------------------------------------------------------------


def grow(settings: Settings):
    """Extend, tell what it did, and write the model folder or the tokenizer.json."""
    began = time.perf_counter()
    if settings.model:
        from checkpoint import load_model, save_model
        model, old = load_model(settings.model)
        if old is None:
            raise UserError(f"{settings.model} has no tokenizer that can be read, so none to extend")
    else:
        path = Path(settings.tokenizer)
        old = load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    learned, held_out = split_texts(settings)
    new = old.extend(learned, settings.new_tokens, settings.workers)
    print(f"{settings.new_tokens:,} tokens learned from {len(learned):,} documents behind the "
          f"{old.vocab_size:,} there were, in {time.perf_counter() - began:.0f} s\n"
          f"bytes a token of {len(held_out):,} held-out documents: {bytes_a_token(old, held_out):.3f} "
          f"before, {bytes_a_token(new, held_out):.3f} after")
    if settings.model is None:
        new.save(settings.out)
    else:
        print(f"bits per byte of them: {bits_per_byte(model, old, held_out):.3f} before")
        grown = {rows: copy.deepcopy(model) for rows in ("pieces", "all")}
        for rows, other in grown.items():
            extend_embeddings(other, old, new, rows)
            print(f"after, untrained, new rows the mean of {'their ' * (rows == 'pieces')}{rows}: "
                  f"{bits_per_byte(other, new, held_out):.3f}")
        save_model(grown[settings.rows].cpu(), new, settings.out)
    print(f"written to {settings.out}")


def main(argv=None):
    settings = config.parse(Settings, argv)
    config.show(settings)
    grow(settings)


if __name__ == "__main__":
    config.run(main)
