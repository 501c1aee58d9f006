"""BPE as SentencePiece has it, of Llama 1 and 2, TinyLlama and the first Mistrals: the space is a letter, ▁.

    "Low lower" -> "▁Low▁lower" -> characters -> merged, as the merges were learned -> ids

Unlike bpe.py: merging begins with characters (Kudo & Richardson 2018, https://arxiv.org/abs/1808.06226). One
that the vocabulary lacks becomes the tokens of its UTF-8 bytes, <0x00> to <0xFF>. A ▁ is put before the text,
so that its first word is spelled as every other; decode takes it away again. A ▁ in the text itself comes
back as a space. Such a tokenizer is read from a tokenizer.json and written back, not learned here.
"""
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
import regex

import config
from bpe import LONG, PieceCache, Tokenizer, checked_text, merge_ids, merge_long, split, split_stream
from config import UserError
from tokenizer_files import (Unsupported, added_tokens, find_added, flags_of, from_hugging_face, kind_of,
                             number_added_tokens, read_tokenizer_json, reading)

SPACE = "▁"
PREPEND = {"type": "Prepend", "prepend": SPACE}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def load_tokenizer(path) -> Tokenizer:
    """The tokenizer in a tokenizer.json of either kind. Raises what Tokenizer.load does."""
    with reading(path, "a tokenizer.json"):
        content = read_tokenizer_json(path)
        if content["model"].get("byte_fallback") and kind_of(content["model"]) == "BPE":
            return MetaspaceTokenizer(content)
        return Tokenizer(**from_hugging_face(content))


class MetaspaceTokenizer(Tokenizer):
    """A Tokenizer, as bpe.py describes it, from the content of a tokenizer.json.

    Unlike there, decode(encode(text)) is the text but for every ▁, now a space; and `decode_bytes` and
    `decode_stream`, by which a text is gone on with, keep the space before a first word.
    """
    nfc, ignore_merges, shown, flags = False, False, (), {}  # what a Tokenizer has; here the content says all

    def __init__(self, content: dict):
        model = content["model"]
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
            if model.get(name):
                raise Unsupported(f"its model has {name} {model[name]}, which is not supported")
        added, ids = added_tokens(content), model["vocab"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        self._content, self._ids_of = content, ids
        self._scheme, self.pattern = scheme_of(content, [left + right for left, right in pairs])
        self.merges = [(left.encode(), right.encode()) for left, right in pairs]
        self.special_tokens = number_added_tokens(added, ids)
        bytes_of = {f"<0x{value:02X}>": bytes([value]) for value in range(256)}
        if missing := bytes_of.keys() - ids.keys():
            raise Unsupported(f"its vocabulary lacks {len(missing)} of the 256 bytes, {min(missing)} first")
        vocab = {id: bytes_of.get(text) or text.replace(SPACE, " ").encode() for text, id in ids.items()}
        vocab |= {id: text.encode() for text, id in self.special_tokens.items()}
        if len(vocab) < len(ids.keys() | self.special_tokens) or not all(type(id) is int for id in vocab):
            raise UserError("an id of its vocabulary stands twice, or is no whole number")
        self.vocab = dict(sorted(vocab.items()))
        self.vocab_size = max(self.vocab) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self._byte_ids = [ids[text] for text in bytes_of]
        self._ranks = {(ids[left], ids[right]): rank for rank, (left, right) in enumerate(pairs)}
        self._results = [ids[left + right] for left, right in pairs]
        flags = {text: set(names) - {"normalized"} for text, names in flags_of(added).items()}
        self._added = find_added(self.special_tokens, flags, False)  # in the text as it is, all
        self._cache = PieceCache(self._encode_piece)

    def encode(self, text: str, allow_special=False) -> list[int]:
        text, ids, end = checked_text(text), [], 0
        for match in self._added[0][0].finditer(text) if allow_special and self._added else ():
            ids += self._encode_part(text[end:match.start()], end == 0)
            ids.append(self.special_tokens[match["token"]])
            end = match.end()
        return ids + self._encode_part(text[end:], end == 0)

    def _encode_part(self, text: str, at_start: bool) -> list[int]:
        return list(chain.from_iterable(map(self._ids, split(self._spelled(text, at_start), self.pattern))))

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[int]:
        def spelled():
            at_start = True
            for chunk in filter(None, map(checked_text, chunks)):
                yield self._spelled(chunk, True) if at_start else chunk.replace(" ", SPACE)
                at_start = False
        for pieces in split_stream(spelled(), self.pattern):
            yield from self._ids(pieces)

    def _spelled(self, text: str, at_start: bool) -> str:
        """The text with ▁ for each space, and before it as the file's scheme has it."""
        text = text.replace(" ", SPACE)
        bare = text and not text.startswith(SPACE)
        wanted = {"each": text, "always": bare, "first": bare and at_start, "never": False}[self._scheme]
        return SPACE + text if wanted else text

    def _encode_piece(self, piece: str) -> list[int]:
        ids = []
        for character in piece:
            known = self._ids_of.get(character)
            ids += [self._byte_ids[value] for value in character.encode()] if known is None else [known]
        return (merge_ids if len(ids) < LONG else merge_long)(ids, self._ranks, self._results)

    def decode(self, ids) -> str:
        """The text that the ids stand for, without the space before its first word."""
        return super().decode(ids).removeprefix("" if self._scheme == "never" else " ")

    @functools.cached_property
    def fingerprint(self) -> str:
        parts = [self._scheme, self.pattern, self._content["model"], self.special_tokens]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def extend(self, texts, new_tokens, workers=None):
        raise Unsupported("SentencePiece's BPE cannot be extended here, only byte-level BPE")

    def to_gpt2(self, vocab_json, merges_txt):
        raise Unsupported("SentencePiece's BPE cannot be written to GPT-2's files; save it as tokenizer.json")

    def to_tiktoken(self, path):
        raise Unsupported("SentencePiece's BPE cannot be written to .tiktoken; save it as tokenizer.json")

    def with_special_tokens(self, texts) -> "MetaspaceTokenizer":
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        missing = [text for text in texts if text not in self.special_tokens]
        if not missing:
            return self
        added = [{"id": id, "content": text, **flags} for id, text in enumerate(missing, self.vocab_size)]
        added = [*self._content["added_tokens"], *added]
        return MetaspaceTokenizer({**self._content, "added_tokens": added}).beside(self)

    def __reduce__(self):
        return MetaspaceTokenizer, (self._content,)

    def save(self, path):
        """Write the tokenizer.json that this was read from, whole or not at all."""
        with config.open_whole(path, "w") as file:
            json.dump(self._content, file, ensure_ascii=False, indent=1)


def scheme_of(content: dict, tokens: list[str]) -> tuple[str, str]:
    """(where a ▁ is put: before each part between special tokens, always | first | never where there is none
    yet; the pattern of what is merged by itself). Raises Unsupported.

    Where nothing cuts the text, the whole of it is merged at once. It may be cut before each run of ▁ all the
    same, and be as fast as elsewhere, if no token goes on across such a place.
    """
    runs = r"(?s:.)+" if any(regex.search(f"[^{SPACE}]{SPACE}", token) for token in tokens) \
        else f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"
    match content.get("normalizer"), content.get("pre_tokenizer"):
        case {"type": "Sequence", "normalizers": steps}, None if steps == [PREPEND, REPLACE]:
            return "each", runs
        case None, {"type": "Metaspace", "replacement": "▁", **rest}:
            scheme = rest.get("prepend_scheme", "always")
            if scheme in ("always", "first", "never"):
                return scheme, f"{SPACE}[^{SPACE}]*|[^{SPACE}]+" if rest.get("split", True) else runs
    raise Unsupported("its normalizer and pre_tokenizer are not SentencePiece's: Prepend and Replace by ▁, "
                      "or Metaspace")
