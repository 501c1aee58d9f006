"""Tokenizer files of the field: `tokenizer.json`, GPT-2's two files, `.tiktoken`; what they say, in and out.

    tokenizer.json             Hugging Face tokenizers: vocabulary, merges, pattern, added tokens, all in one
    vocab.json, merges.txt     GPT-2's: ids and merges; the pattern is GPT-2's own
    *.tiktoken                 tokens by rank, which is their id; merges, pattern and special tokens left out

Here files become the arguments of bpe.Tokenizer and back, and nothing is encoded. What would give other ids
there than here is refused by name. All but .tiktoken write bytes in GPT-2's alphabet of visible characters,
in which Ġ is the space.
"""
import base64
import contextlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import regex

from config import UserError, open_whole

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2's: digits are taken out one by one first, so spaces before one stand at the end of their text
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of added tokens, as bpe.Tokenizer says


class Unsupported(UserError):
    """A tokenizer file that is in order, but of a kind that cannot be read here."""


@contextlib.contextmanager
def reading(path, kind):
    """Turn what a broken file leads to into one line that names it."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not {kind}: {type(error).__name__}: {error}") from None


def most_frequent(items):
    return Counter(items).most_common(1)[0][0]


# ------------------------------------------------------------------------------------------------------------
# Bytes in characters that can be seen


def visible_alphabet() -> dict[int, str]:
    """byte -> its character: that of Latin-1 where it can be seen, else the next of those from U+0100 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [value for value in range(256) if value not in seen]
    return {value: chr(value if value in seen else 256 + hidden.index(value)) for value in range(256)}


VISIBLE = visible_alphabet()
HIDDEN = {character: value for value, character in VISIBLE.items()}


def to_alphabet(token: bytes) -> str:
    return "".join([VISIBLE[value] for value in token])


def from_alphabet(text: str) -> bytes | None:
    """The bytes that a text in the alphabet stands for; None if it is not in the alphabet."""
    return bytes([HIDDEN[character] for character in text]) if HIDDEN.keys() >= set(text) else None


def from_visible(ids: dict[str, int], merges, special_tokens: dict[str, int]) -> dict:
    """The arguments of Tokenizer from tokens and merges in the alphabet."""
    vocab = {}
    for text, id in ids.items():
        if text not in special_tokens:
            if id in vocab:
                raise UserError(f"the id {id} stands twice, at {to_alphabet(vocab[id])!r} and {text!r}")
            vocab[id] = from_alphabet(text)
            if vocab[id] is None:
                raise UserError(f"the token {text!r} is not in the alphabet of byte-level BPE")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]  # older files: "a b"
    merges = [(from_alphabet(left), from_alphabet(right)) for left, right in pairs]
    for pair, merge in zip(pairs, merges):
        if None in merge:
            raise UserError(f"the merge {' '.join(pair)!r} is not in the alphabet of byte-level BPE")
    return {"merges": merges, "special_tokens": special_tokens, "vocab": vocab}


def to_visible(tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary without special tokens, merges) in the alphabet."""
    vocab = {to_alphabet(token): id for id, token in tokenizer.ordinary_vocab().items()}
    return vocab, [(to_alphabet(left), to_alphabet(right)) for left, right in tokenizer.merges]


# ------------------------------------------------------------------------------------------------------------
# tokenizer.json


def read_tokenizer_json(path) -> dict:
    """The content of a tokenizer.json. Raises Unsupported, by name, for tokenizers' files of other kinds."""
    data = Path(path).read_bytes()
    if data[:1] == b"\n" and b"<unk>" in data[:64]:  # protobuf: field 1, the first piece
        raise Unsupported("this is a model of SentencePiece; save it as tokenizer.json with transformers")
    lines = data[:1 << 16].split()
    if b"[UNK]" in lines and data[:1] != b"{":
        raise Unsupported("this is a vocabulary of WordPiece (BERT's); only byte-level BPE can be read")
    if len(lines) > 1 and lines[:2] == [base64.b64encode(b"!"), b"0"]:  # as all of OpenAI's begin
        raise Unsupported("this is a .tiktoken file; read it with Tokenizer.from_tiktoken")
    content = json.loads(data.decode("utf-8"), object_pairs_hook=without_twins)
    if isinstance(content, dict) and "model" not in content and content.get("!") == 0:
        raise Unsupported("this is GPT-2's vocab.json; read it with Tokenizer.from_gpt2, and its merges.txt")
    return content


def without_twins(pairs: list[tuple]) -> dict:
    """A JSON object as a dict. Of a name that stands twice, and so has two values, a dict would keep one."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise UserError(f"{most_frequent(name for name, _ in pairs)!r:.100} stands twice in one object")
    return content


def from_hugging_face(content: dict) -> dict:
    """The arguments of Tokenizer. Raises Unsupported for all that would give other ids here, by its name."""
    model = content["model"]
    if kind_of(model) != "BPE":
        raise Unsupported(f"its model is {kind_of(model)}; only byte-level BPE can be read")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise Unsupported(f"its model has {name} {model[name]}, which is not supported")
    normalizer = content.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":
        raise Unsupported(f"its normalizer {normalizer['type']} is not supported; it changes text")
    pattern = split_pattern(content["pre_tokenizer"])
    added = added_tokens(content)
    special_tokens = number_added_tokens(added, model["vocab"])
    return {**from_visible(model["vocab"], model["merges"], special_tokens), "pattern": pattern,
            "nfc": bool(normalizer), "ignore_merges": bool(model.get("ignore_merges")),
            "shown": [text for text, token in added.items() if not token.get("special", True)],
            "flags": flags_of(added)}


def kind_of(model: dict) -> str:
    """The model's type; older files do not name it, but have parts that no other has."""
    signs = {"max_input_chars_per_word": "WordPiece", "unk_id": "Unigram"}
    return model.get("type") or next((kind for sign, kind in signs.items() if sign in model), "BPE")


def added_tokens(content: dict) -> dict[str, dict]:
    """{text: the entry} of the added tokens, in their order."""
    entries = content.get("added_tokens") or []
    added = {token["content"]: token for token in entries}
    if len(added) < len(entries):
        raise UserError(f"its added token {most_frequent(token['content'] for token in entries)!r} stands "
                        f"twice")
    if "" in added:
        raise UserError("one of its added tokens is empty")
    return added


def flags_of(added: dict[str, dict]) -> dict[str, tuple[str, ...]]:
    """{text: its flags} of those that have any."""
    flags = {text: tuple(name for name in FLAGS if token.get(name)) for text, token in added.items()}
    return {text: names for text, names in flags.items() if names}


def number_added_tokens(texts: Iterable[str], ids: dict[str, int]) -> dict[str, int]:
    """{text: id} of added tokens as `tokenizers` numbers them, whatever ids their file gives them: those that
    the vocabulary knows, as it does, and each other one behind all before it.
    """
    added, free = {}, len(ids)
    for text in texts:
        added[text] = ids.get(text, free)
        free = max(free, added[text] + 1)
    return added


def split_pattern(pre_tokenizer) -> str:
    """The pattern of Split before ByteLevel, or GPT-2's, which ByteLevel alone, or behind Digits, implies."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return DIGITS_PATTERN
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            # what the pattern leaves out becomes pieces, or, as in files made from tiktoken's, is dropped
            if behavior == "Isolated" or (behavior, invert) == ("Removed", True) and leaves_nothing(pattern):
                return read_alike(pattern)
    kinds = " + ".join(step["type"] for step in steps) or "that is missing"
    raise Unsupported(f"its pre_tokenizer {kinds} is not supported in this form; wanted is ByteLevel, alone, "
                      f"after individual Digits, or after an Isolated Split by a regular expression; without "
                      f"add_prefix_space")


def leaves_nothing(pattern: str) -> bool:
    """Whether the pattern matches a character of each kind, so that it can go on at every place of a text."""
    return all(regex.fullmatch(pattern, character) for character in
               "aAß字ʰǅ1²Ⅷ\u0301\u0903!$+^_(\"- \n\r\t\x00\x85\u00a0\u2028\u200d\u3000\ue000\U0001f600")


def read_alike(pattern: str) -> str:
    """The pattern, if the engines that may meet it agree on what it says; Unsupported if not."""
    if found := regex.search(r"\{[\d,]+\}\+", pattern):
        raise Unsupported(f"the split pattern has {found.group()}, which tiktoken reads as greedy for good "
                          f"and tokenizers as repeated; leave out the + behind")
    return pattern


def to_hugging_face(tokenizer) -> dict:
    """The content of tokenizer.json."""
    cut = {"type": "Split", "pattern": {"Regex": read_alike(tokenizer.pattern)}, "behavior": "Isolated",
           "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special_tokens = tokenizer.special_tokens
    added = [{"id": id, "content": text, **{name: name in tokenizer.flags.get(text, ()) for name in FLAGS},
              "special": text not in tokenizer.shown} for text, id in special_tokens.items()]
    vocab, merges = to_visible(tokenizer)
    if number_added_tokens(special_tokens, vocab) != special_tokens:
        vocab |= special_tokens
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if tokenizer.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, byte_level]},
        "post_processor": begin_with(tokenizer.bos_token, special_tokens), "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": tokenizer.ignore_merges, "vocab": vocab, "merges": merges},
    }


def begin_with(token: str | None, special_tokens: dict[str, int]) -> dict | None:
    """What makes Hugging Face tokenizers put a special token before every text, and before each of a pair."""
    if token is None:
        return None
    first, a, b = {"SpecialToken": {"id": token, "type_id": 0}}, *(
        {"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {"type": "TemplateProcessing", "single": [first, a],
            "pair": [first, a, {"SpecialToken": {"id": token, "type_id": 1}}, b],
            "special_tokens": {token: {"id": token, "ids": [special_tokens[token]], "tokens": [token]}}}


def find_added(special_tokens: dict[str, int], flags: dict, nfc: bool) -> list[tuple]:
    """[(pattern with the group "token", {text: id}, in NFC)]: what is found first, then in what is left."""
    passes = []
    for normalized in (False, True):
        ids = {text: id for text, id in special_tokens.items()
               if ("normalized" in flags.get(text, ())) == normalized}
        nfc_too = nfc and normalized
        if ids:
            forms = {unicodedata.normalize("NFC", text) if nfc_too else text: text for text in ids}
            longest_first = sorted(forms, key=len, reverse=True)
            found = "|".join(with_flags(form, flags.get(forms[form], ())) for form in longest_first)
            passes.append((regex.compile(found), {form: ids[forms[form]] for form in forms}, nfc_too))
    return passes


def with_flags(text: str, flags) -> str:
    """The pattern of a special token and what it takes with it; ++: a run of spaces is looked at once."""
    found = f"(?P<token>{regex.escape(text)})"
    if "single_word" in flags:
        found = rf"(?<!\w){found}(?!\w)"
    return r"(?:(?<!\s)\s++)?+" * ("lstrip" in flags) + found + r"\s*+" * ("rstrip" in flags)


# ------------------------------------------------------------------------------------------------------------
# GPT-2's vocab.json and merges.txt


def read_gpt2(vocab_json, merges_txt) -> dict:
    """The arguments of Tokenizer. Tokens that no merge gives, <|endoftext|> for one, are special."""
    with reading(merges_txt, "GPT-2's merges.txt"):
        first, *lines = Path(merges_txt).read_text(encoding="utf-8").split("\n")
        lines = lines if first.startswith("#version") else [first, *lines]
        merges = [line.split(" ") for line in lines if line]
        for number, merge in enumerate(merges, 1):
            if len(merge) != 2:
                raise UserError(f"merge {number}, {' '.join(merge)!r:.60}, is not two tokens and a space")
    with reading(vocab_json, "GPT-2's vocab.json"):
        ids = json.loads(Path(vocab_json).read_text(encoding="utf-8"), object_pairs_hook=without_twins)
        ordinary = {*VISIBLE.values(), *map("".join, merges)}
        special_tokens = {text: id for text, id in ids.items() if text not in ordinary}
        return from_visible(ids, merges, special_tokens) | {"pattern": GPT2_PATTERN}


def write_gpt2(tokenizer, vocab_json, merges_txt):
    if tokenizer.pattern != GPT2_PATTERN or tokenizer.nfc or tokenizer.ignore_merges or tokenizer.flags:
        raise UserError("GPT-2's two files hold tokenizers with GPT-2's pattern, without NFC, ignore_merges "
                        "or flags of special tokens; save this one as tokenizer.json")
    vocab, merges = to_visible(tokenizer)
    with open_whole(vocab_json, "w") as ids, open_whole(merges_txt, "w") as lines:
        json.dump(vocab | tokenizer.special_tokens, ids, ensure_ascii=False)
        lines.write("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))


# ------------------------------------------------------------------------------------------------------------
# .tiktoken


def read_ranks(path) -> dict[int, bytes]:
    """{rank: token} of a .tiktoken file, whose lines hold a token's bytes in base64 and its rank."""
    lines = [line.split() for line in Path(path).read_bytes().splitlines() if line]
    vocab = {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}
    if len(vocab) < len(lines):
        raise UserError(f"the rank {most_frequent(int(rank) for _, rank in lines)} stands twice")
    if len(set(vocab.values())) < len(vocab):
        raise UserError(f"the token {most_frequent(vocab.values())!r} stands twice")
    return vocab


def write_ranks(vocab: dict[int, bytes], path):
    with open_whole(path) as file:
        file.writelines(base64.b64encode(token) + b" %d\n" % id for id, token in sorted(vocab.items()))
