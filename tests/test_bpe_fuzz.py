"""bpe.py, tokenizers and tiktoken on fuzzed strings: equal ids, exact text, and streams cut anywhere."""
import functools
import random
import sys
import unicodedata
from itertools import chain

import pytest
import regex

from bpe import PATTERNS, Tokenizer, normalize_stream, split_stream

SPECIAL = ["<|endoftext|>", "<|user turn|>", "<|a|>"]
PROSE = """The tokenizer can't know which words you'll write; it's trained on 12345 others, LOWER or Lowest.
    def lowest(words, number=10):    # four spaces, then eight
        return sorted(words)[:number]/2
每个词都由字节组成。こんにちは 안녕하세요 Здравствуйте naïve café\n"""
SPACES = [*filter(str.isspace, map(chr, range(sys.maxunicode + 1))), "\u200b", "\u2060", "\ufeff"]
EMOJI = ["👩‍👩‍👧‍👦", "👍🏽", "🇩🇪", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "❤️‍🔥", "\u200d", "\ufe0f", "🙂"]
MARKS = ["\u0301", "\u0308", "\u0323", "\u20dd", "\u0903", "\u3099", "\u05b0", "\u1161", "e\u0301", "ﬁ", "가"]
CONTROLS = [chr(code) for code in (*range(32), 127, *range(128, 160), 0xAD, 0x202E, 0xFFF9)]
WORDS = [*PROSE.split(), "'s", "'LL", "'ſ", "we'll", "HTTPServer", "snake_case", "3.14159", "²³", "٣٤٥٦", "ⅷ",
         *"‒‿“”(]€^≠ǅⅨʰ", "//\n", "!?...", "\r\n\r\n", "  \n  ", "    ", "\t\t", *SPECIAL,
         *(token[:-1] for token in SPECIAL)]


@functools.cache
def disputed() -> frozenset:
    """Characters that `regex` and tiktoken put into other classes: their tables of Unicode differ in age."""
    import tiktoken
    everything = "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    found = set()
    for kind in (r"\p{L}", r"\p{N}", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"):
        single = tiktoken.Encoding(kind, pat_str=kind, special_tokens={},
                                   mergeable_ranks={bytes([value]): value for value in range(256)})
        found |= set(regex.findall(kind, everything)) ^ set(single.decode(single.encode_ordinary(everything)))
    return frozenset(found)


def fuzzed(number: int, seed: int, any_character: bool = False):
    """Strings of one to eight bits of all kinds. any_character: unassigned too, but none that is disputed."""
    rng = random.Random(seed)

    def character():
        while True:
            found = chr(rng.randrange(rng.choice((0x250, 0x3000, 0x10000, 0x20000, sys.maxunicode + 1))))
            if 0xD800 <= ord(found) < 0xE000:
                continue
            if found not in disputed() if any_character else unicodedata.category(found) != "Cn":
                return found

    kinds = [character, *(functools.partial(rng.choice, kind) for kind in
                          (SPACES, EMOJI, MARKS, CONTROLS, WORDS, WORDS, " \nabcAB1.'"))]
    for _ in range(number):
        yield "".join(rng.choice(kinds)() for _ in range(rng.randint(1, 8)))


@pytest.fixture(scope="module", params=PATTERNS)
def peers(request, tmp_path_factory):
    """(ours, in `tokenizers` through its file, in tiktoken through its ranks), for one of the patterns."""
    import tiktoken
    import tokenizers
    ours = Tokenizer.train([PROSE], 440, SPECIAL, request.param, workers=1)
    path = tmp_path_factory.mktemp("fuzz") / "tokenizer.json"
    ours.save(path)
    ranks = {token: id for id, token in ours.ordinary_vocab().items()}
    return ours, tokenizers.Tokenizer.from_file(str(path)), tiktoken.Encoding(
        request.param, pat_str=ours.pattern, mergeable_ranks=ranks, special_tokens=ours.special_tokens)


def check(peers, whole: str):
    ours, hugging_face, openai = peers
    ids = ours.encode(whole)
    assert ids == openai.encode_ordinary(whole), f"tiktoken gives other ids for {whole!r}"
    with_special = ours.encode(whole, allow_special=True)
    assert with_special == openai.encode(whole, allowed_special="all"), f"tiktoken: {whole!r}"
    assert with_special == hugging_face.encode(whole).ids, f"tokenizers gives other ids for {whole!r}"
    assert ours.decode(ids) == ours.decode(with_special) == whole
    assert ours.decode_bytes(ids) == whole.encode()
    pieces = list(ours.decode_stream(ids))
    assert "".join(pieces) == whole
    assert "\ufffd" in whole or "\ufffd" not in "".join(pieces), f"half a character of {whole!r}"


def check_stream(tokenizer: Tokenizer, whole: str, ids: list[int]):
    """window=1: nothing waits but what must, and text is cut anew with every chunk."""
    for cut in range(len(whole) + 1):
        chunks = [whole[:cut], whole[cut:]]
        pieces = split_stream(normalize_stream(chunks) if tokenizer.nfc else chunks, tokenizer.pattern, 1)
        assert list(chain.from_iterable(map(tokenizer._ids, pieces))) == ids, (chunks, "give other ids")


def test_fuzzed_strings_have_the_ids_of_tokenizers_and_tiktoken_and_come_back(peers):
    for whole in fuzzed(1000, seed=0):
        check(peers, whole)


def test_a_long_text_of_fuzzed_strings_has_the_ids_of_tiktoken_and_comes_back(peers):
    """All strings in a row: long texts may take another way than short ones, to the same ids."""
    ours, _, openai = peers
    whole = "".join(fuzzed(10_000, seed=4))
    ids = ours.encode(whole)
    assert ids == openai.encode_ordinary(whole) and ours.decode(ids) == whole
    assert list(ours.encode_stream(whole[i:i + 1000] for i in range(0, len(whole), 1000))) == ids
    assert ours.encode_batch([whole], workers=1)[0].tolist() == ids


def test_a_stream_of_a_fuzzed_string_has_its_ids_wherever_it_is_cut(peers):
    for whole in fuzzed(200, seed=1):
        check_stream(peers[0], whole, peers[0].encode(whole))


def test_a_normalised_stream_has_the_ids_of_the_normalised_text_wherever_it_is_cut():
    tokenizer = Tokenizer.train([PROSE], 440, SPECIAL, "qwen", workers=1)
    normalising = Tokenizer(tokenizer.merges, SPECIAL, "qwen", nfc=True)
    for whole in fuzzed(200, seed=2):
        ids = tokenizer.encode(unicodedata.normalize("NFC", whole))
        assert normalising.encode(whole) == ids
        check_stream(normalising, whole, ids)


@pytest.mark.slow
def test_100_000_fuzzed_strings_of_all_of_unicode(peers):
    """20,000 for each of the five patterns; and every one as a stream, cut at every place."""
    for whole in fuzzed(100_000 // len(PATTERNS), seed=100 + list(PATTERNS).index(peers[2].name),
                        any_character=True):
        check(peers, whole)
        check_stream(peers[0], whole, peers[0].encode(whole))


def test_the_fuzzed_strings_are_of_all_kinds():
    everything = "".join(fuzzed(3000, seed=0))
    assert {unicodedata.category(character) for character in everything} >= {
        *"Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co".split()}
    for part in [*SPACES, *EMOJI, *MARKS, *SPECIAL]:
        assert part in everything


def test_named_patterns_cut_as_those_of_tiktoken(monkeypatch):
    """tiktoken's own, which its package holds, by its own engine; Llama 3's and Qwen's are not in it."""
    from tiktoken import Encoding
    from tiktoken_ext import openai_public
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **options: {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *args, **options: {})
    for name, constructor in {"gpt2": "gpt2", "cl100k": "cl100k_base", "o200k": "o200k_base"}.items():
        ours = Tokenizer.train([PROSE], 440, (), name, workers=1)
        pattern = getattr(openai_public, constructor)()["pat_str"]
        theirs = Encoding(name, pat_str=pattern, special_tokens={},
                          mergeable_ranks={token: id for id, token in ours.vocab.items()})
        for whole in fuzzed(1000, seed=3):
            assert ours.encode(whole) == theirs.encode_ordinary(whole), (name, whole)
