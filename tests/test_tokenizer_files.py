"""tokenizer_files.py: the field's tokenizer files, in and out, with the ids of `tokenizers` and tiktoken."""
import base64
import json
import random
import unicodedata

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe

import bpe
from bpe import GPT2_PATTERN, PATTERN, PATTERNS, Tokenizer
from config import UserError
from metaspace import load_tokenizer
from test_bpe import AWKWARD, END, PROSE
from tokenizer_files import FLAGS, Unsupported, leaves_nothing, read_alike

byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def same(ours, theirs):
    assert ours.fingerprint == theirs.fingerprint and ours.special_tokens == theirs.special_tokens


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# --- GPT-2's two files --------------------------------------------------------------------------------------


def test_gpt2s_files_are_written_as_tokenizers_reads_them_and_read_back(tmp_path):
    ours = Tokenizer.train([PROSE], 380, [END], "gpt2")
    places = tmp_path / "vocab.json", tmp_path / "merges.txt"
    ours.to_gpt2(*places)
    same(Tokenizer.from_gpt2(*places), ours)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, places)))
    theirs.pre_tokenizer = byte_level
    for whole in [*AWKWARD, PROSE]:
        assert ours.encode(whole) == theirs.encode(whole).ids
    assert json.loads(places[0].read_text(encoding="utf-8"))[END] == 379


def test_a_merge_that_looks_like_the_first_line_is_none(tmp_path):
    ours = Tokenizer([(b"#", b"v")], [END], "gpt2")
    places = tmp_path / "vocab.json", tmp_path / "merges.txt"
    ours.to_gpt2(*places)
    lines = places[1].read_text(encoding="utf-8").replace("# v", "#version x")
    places[1].write_text(lines, encoding="utf-8")
    with pytest.raises(UserError, match="needs the token b'#version'"):  # and is not passed over
        Tokenizer.from_gpt2(*places)


@pytest.mark.parametrize("tokenizer", [
    Tokenizer([]), Tokenizer([], (), "gpt2", nfc=True), Tokenizer([], (), "gpt2", ignore_merges=True),
    Tokenizer([], ["<a>"], "gpt2", flags={"<a>": ("lstrip",)})])
def test_what_gpt2s_files_cannot_hold_is_not_written(tokenizer, tmp_path):
    with pytest.raises(UserError, match="save this one as tokenizer.json"):
        tokenizer.to_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("merges, message", [
    ("#version: 0.2\na b c\n", "merge 1, 'a b c', is not two tokens"), ("a\n", "merge 1, 'a'"),
    ("a b\n字 b\n", "the merge '字 b' is not in the alphabet"), ("zz z\n", "needs the token b'zz'")])
def test_broken_merges_are_refused_in_one_line(merges, message, tmp_path):
    Tokenizer([(b"a", b"b")], (), "gpt2").to_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        Tokenizer.from_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")


# --- .tiktoken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tiktoken_reads_what_is_written_and_it_is_read_back(pattern, tmp_path):
    ours = Tokenizer.train([PROSE], 400, [END], pattern)
    ours.to_tiktoken(tmp_path / "ours.tiktoken")
    theirs = tiktoken.Encoding("ours", pat_str=ours.pattern, special_tokens=ours.special_tokens,
                               mergeable_ranks=load_tiktoken_bpe(str(tmp_path / "ours.tiktoken")))
    for whole in [*AWKWARD, PROSE]:
        assert ours.encode(whole) == theirs.encode_ordinary(whole)
    same(Tokenizer.from_tiktoken(tmp_path / "ours.tiktoken", [END], pattern), ours)
    same(Tokenizer.from_tiktoken(tmp_path / "ours.tiktoken", {END: 399}, ours.pattern), ours)


@given(st.randoms(use_true_random=False), st.text(st.sampled_from("abc "), max_size=40))
@settings(max_examples=200, deadline=None)
def test_ranks_whose_tokens_are_not_made_of_two_give_the_ids_of_tiktoken(rng, whole):
    """Any set of tokens, so that no merge of earlier ones leads to some: tiktoken looks these up whole."""
    more = {"".join(rng.choices("abc", k=rng.randint(2, 5))).encode() for _ in range(8)}
    tokens = [*bpe.BYTES, *rng.sample(sorted(more), len(more))]
    merges, missing_some = bpe.merges_of_ranks(dict(enumerate(tokens)))
    ours = Tokenizer(merges, (), "gpt2", dict(enumerate(tokens)), ignore_merges=missing_some)
    theirs = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, special_tokens={},
                               mergeable_ranks={token: id for id, token in enumerate(tokens)})
    assert ours.encode(whole) == theirs.encode_ordinary(whole), tokens[256:]


def test_a_token_that_no_two_before_it_make_is_read_and_looked_up_whole(tmp_path):
    tokens = [*bpe.BYTES, b"abc"]
    (tmp_path / "t.tiktoken").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % id
                                                   for id, token in enumerate(tokens)))
    ours = Tokenizer.from_tiktoken(tmp_path / "t.tiktoken", (), r"\w+|\W+")
    assert ours.ignore_merges and ours.encode("abc abcd") == [256, 32, 97, 98, 99, 100]


@pytest.mark.parametrize("tokenizer", [
    Tokenizer([], (), nfc=True),
    Tokenizer([(b"a", b"b"), (b"c", b"d")], (), PATTERN,
              {**dict(enumerate(bpe.BYTES)), 300: b"ab", 256: b"cd"}),
    Tokenizer([(b"a", b"b")], (), PATTERN, {**dict(enumerate(bpe.BYTES)), 256: b"ab", 257: b"cd"},
              ignore_merges=True)], ids=["NFC", "order", "a token without its merge"])
def test_what_a_tiktoken_file_cannot_hold_is_not_written(tokenizer, tmp_path):
    with pytest.raises(UserError, match="cannot hold this tokenizer: it.* save it as tokenizer.json"):
        tokenizer.to_tiktoken(tmp_path / "t.tiktoken")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lines, message", [
    (b"YQ== 0\nYg== 0\n", "the rank 0 stands twice"), (b"YQ== 0\nYQ== 1\n", "the token b'a' stands twice"),
    (b"YQ== 0\n", "lacks 255 of the 256 bytes"), (b"YQ==\n", "not a .tiktoken file"),
    (b"??? 0\n", "not a .tiktoken file"), (b"YQ== one\n", "not a .tiktoken file"), (b"", "lacks 256")])
def test_broken_ranks_are_refused_in_one_line(lines, message, tmp_path):
    (tmp_path / "t.tiktoken").write_bytes(lines)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.from_tiktoken(tmp_path / "t.tiktoken", (), PATTERN)
    assert "\n" not in str(error.value) and "t.tiktoken" in str(error.value)


# --- tokenizer.json -----------------------------------------------------------------------------------------


FLAGGED = ["<mask>", "<tail>", "<both>", "word", "é!", "ﬁn"]


def with_added(flags: dict) -> tokenizers.Tokenizer:
    """A byte-level tokenizer of `tokenizers` with NFC and added tokens that have flags."""
    theirs = tokenizers.Tokenizer.from_str(tokenizers.Tokenizer(tokenizers.models.BPE(
        {character: id for id, character in enumerate(sorted(byte_level.alphabet()))}, [])).to_str())
    theirs.normalizer, theirs.pre_tokenizer = tokenizers.normalizers.NFC(), byte_level
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.add_tokens([tokenizers.AddedToken(text, **flags.get(text, {"normalized": False}))
                       for text in FLAGGED])
    return theirs


@pytest.fixture(scope="module")
def flagged(tmp_path_factory):
    """(ours, theirs, ours saved and in `tokenizers` again) of a file whose added tokens have all flags."""
    theirs = with_added({"<mask>": dict(lstrip=True, normalized=False),
                         "<tail>": dict(rstrip=True, normalized=False),
                         "<both>": dict(lstrip=True, rstrip=True, single_word=True, normalized=False),
                         "word": dict(single_word=True, normalized=False), "é!": dict(normalized=True),
                         "ﬁn": dict(normalized=True, lstrip=True)})
    folder = tmp_path_factory.mktemp("flags")
    theirs.save(str(folder / "tokenizer.json"))
    ours = Tokenizer.load(folder / "tokenizer.json")
    ours.save(folder / "again.json")
    same(Tokenizer.load(folder / "again.json"), ours)
    return ours, theirs, tokenizers.Tokenizer.from_file(str(folder / "again.json"))


def check_flagged(flagged, whole):
    ours, theirs, again = flagged
    ids = ours.encode(whole, allow_special=True)
    assert ids == theirs.encode(whole).ids, f"tokenizers gives other ids for {whole!r}"
    assert ids == again.encode(whole).ids, f"what was saved gives other ids for {whole!r}"
    assert ours.decode(ours.encode(whole)) == unicodedata.normalize("NFC", whole), "without special tokens"


@pytest.mark.parametrize("whole", [
    "a  <mask>  b", "<mask>", " \n\t<mask><mask> ", "<tail>  \n x", "<tail>",
    "a <tail> <mask> b", "a <both> b", "a<both>b", "é<both>", "_<both> 1", "word", "words word sword", "word<mask>word", "e\u0301! é!",
    "<\u0338mask>", "<mask>\u0338", "  ﬁn", "fin", "  e\u0301!", "-word-", "word\u0301",
    "\u00a0<mask>\u3000<tail>\u2003a"])
def test_flags_of_added_tokens_mean_what_they_do_in_tokenizers(flagged, whole):
    check_flagged(flagged, whole)


@given(st.lists(st.sampled_from([*FLAGGED, " ", "  ", "\n", "a", "e\u0301", "!", "\u0338", "_", "<",
                                 "\u00a0"]), max_size=8).map("".join))
@settings(max_examples=400, deadline=None)
def test_flags_of_added_tokens_mean_what_they_do_in_tokenizers_in_any_text(flagged, whole):
    check_flagged(flagged, whole)


def test_a_long_run_of_spaces_before_no_token_is_looked_at_once():
    ours = Tokenizer([], ["<mask>"], flags={"<mask>": ("lstrip",)})
    found = ours._added[0][0]
    assert not list(found.finditer(" " * 300_000 + "x"))  # 10 ms; a search from each space takes an hour


def test_flags_survive_files_processes_and_further_tokens_and_change_the_fingerprint(flagged):
    import pickle
    ours = flagged[0]
    assert ours.flags["<both>"] == ("single_word", "lstrip", "rstrip") and set(ours.flags["é!"]) <= set(FLAGS)
    assert pickle.loads(pickle.dumps(ours)).flags == ours.with_special_tokens(["<new>"]).flags == ours.flags
    bare = Tokenizer(ours.merges, ours.special_tokens, ours.pattern, ours.ordinary_vocab(), nfc=True,
                     shown=ours.shown)
    assert bare.fingerprint != ours.fingerprint


def split_file(pattern, behavior, invert) -> dict:
    tokenizer = Tokenizer([])
    content = json.loads(json.dumps(bpe.files.to_hugging_face(tokenizer)))
    cut = content["pre_tokenizer"]["pretokenizers"][0]
    cut.update(pattern={"Regex": pattern}, behavior=behavior, invert=invert)
    return content


def test_a_split_that_removes_what_the_pattern_leaves_out_is_read_where_it_leaves_out_nothing(tmp_path):
    """As files that were made from tiktoken's have it."""
    for pattern in PATTERNS.values():
        assert leaves_nothing(pattern)
        content = split_file(pattern, "Removed", True)
        ours = Tokenizer.load(write(tmp_path / "t.json", content))
        theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
        for whole in [*AWKWARD, PROSE]:
            assert ours.encode(whole) == theirs.encode(whole).ids
    with pytest.raises(Unsupported, match="not supported in this form"):
        Tokenizer.load(write(tmp_path / "t.json", split_file(r"\p{L}+", "Removed", True)))


def test_a_pattern_that_engines_read_otherwise_is_neither_read_nor_written(tmp_path):
    r"""\p{N}{1,3}+ takes three digits in tiktoken and `regex`, and all in `tokenizers`."""
    pattern = r"\p{N}{1,3}+|\P{N}+"
    cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    assert [piece for piece, _ in cut.pre_tokenize_str("12345")] == ["12345"]
    assert bpe.compile_pattern(pattern).findall("12345") == ["123", "45"]
    with pytest.raises(Unsupported, match=r"\{1,3\}\+"):
        Tokenizer([], (), pattern).save(tmp_path / "t.json")
    assert not list(tmp_path.iterdir())
    with pytest.raises(Unsupported, match=r"\{1,3\}\+"):
        Tokenizer.load(write(tmp_path / "t.json", split_file(pattern, "Isolated", False)))
    assert all(read_alike(pattern) == pattern for pattern in PATTERNS.values())


@pytest.mark.parametrize("content, kind", [
    ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"),
    ({"model": {"max_input_chars_per_word": 100, "vocab": {"a": 0}}}, "WordPiece"),
    ({"model": {"type": "Unigram", "byte_fallback": True, "vocab": []}}, "Unigram"),
    ({"model": {"unk_id": 0, "vocab": [["a", 0.0]]}}, "Unigram"),
    ({"model": {"type": "WordLevel", "vocab": {}}}, "WordLevel"),
    ({"!": 0, '"': 1}, "GPT-2's vocab.json"),
    (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "SentencePiece"),
    (b"[PAD]\n[UNK]\n[CLS]\nthe\n", "WordPiece"), (b"IQ== 0\nIg== 1\n", ".tiktoken")])
def test_tokenizer_files_of_other_kinds_are_named(content, kind, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    for load in (Tokenizer.load, load_tokenizer):
        with pytest.raises(Unsupported, match=kind) as error:
            load(path)
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("old, new, message", [
    ('"!": 0,', '"!": 0, "!": 300,', "'!' stands twice"), ('"!": 0,', '"!": 1,', "id 1 stands twice"),
    ('"content": "<a>"', '"content": ""', "added tokens is empty"),
    ('"content": "<b>"', '"content": "<a>"', "added token '<a>' stands twice"),
    ('"merges": [', '"merges": ["zz z", ', "needs the token b'zz'")])
def test_what_stands_twice_or_nowhere_is_refused_by_name(old, new, message, tmp_path):
    path = tmp_path / "t.json"
    vocab = {(value - ord("!")) % 256: bytes([value]) for value in range(256)}  # "!" is 0, as in GPT-2's
    Tokenizer([(b"a", b"b")], {"<a>": 257, "<b>": 258}, "gpt2", vocab | {256: b"ab"}).save(path)
    text = json.dumps(json.loads(path.read_text(encoding="utf-8")))
    assert text.count(old) == 1, text[:300]
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        Tokenizer.load(path)


# --- SentencePiece's kind -----------------------------------------------------------------------------------


def test_flags_work_in_sentencepieces_kind_too(tmp_path):
    """As in Phi-3's file, whose <|assistant|> takes the spaces behind it."""
    from test_metaspace import file_of
    content = file_of("Prepend")
    content["added_tokens"] += [
        {"id": len(content["model"]["vocab"]) + i, "content": text, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True, **flags}
        for i, (text, flags) in enumerate({"<|r|>": {"rstrip": True}, "<|l|>": {"lstrip": True}}.items())]
    ours = load_tokenizer(write(tmp_path / "tokenizer.json", content))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    for whole in ("the <|r|>  lower", "the  <|l|>lower", "<|r|>\nthe", "a<|l|> <|r|> ", "<|r|>"):
        assert ours.encode(whole, allow_special=True) == theirs.encode(whole, add_special_tokens=False).ids
    for refused in (lambda: ours.extend(["the"], 1), lambda: ours.to_tiktoken(tmp_path / "a"),
                    lambda: ours.to_gpt2(tmp_path / "a", tmp_path / "b")):
        with pytest.raises(Unsupported, match="SentencePiece's BPE cannot be"):
            refused()


# --- Patterns -----------------------------------------------------------------------------------------------


def test_a_pattern_may_be_named():
    assert Tokenizer([], (), "qwen").pattern == PATTERNS["qwen"] == PATTERN.replace("{1,3}", "")
    assert Tokenizer([]).pattern == PATTERN == PATTERNS["llama3"]
    assert Tokenizer.train(["a1234 " * 9], 257, (), "qwen").pattern == PATTERNS["qwen"]
    cut = {name: bpe.compile_pattern(pattern).findall("We'll HTTPServe 1234  \n ")
           for name, pattern in PATTERNS.items()}
    assert cut["llama3"] == ["We", "'ll", " HTTPServe", " ", "123", "4", "  \n", " "]
    assert cut["cl100k"] == ["We", "'ll", " HTTPServe", " ", "123", "4", "  \n "]
    assert cut["qwen"] == ["We", "'ll", " HTTPServe", " ", "1", "2", "3", "4", "  \n", " "]
    assert cut["gpt2"] == ["We", "'ll", " HTTPServe", " 1234", "  \n "]
    assert cut["o200k"] == ["We'll", " HTTPServe", " ", "123", "4", "  \n", " "]


@pytest.mark.parametrize("pattern, message", [
    (r"(?r)\w+|\W+", "loses text"), (r"\w\K\w|\W", "loses text"), (r"\w*|\W+", "matches the empty text"),
    (r"(?=x)|\w+|\W+", "matches the empty text"), (r"\b", "matches the empty text"),
    (r"[", "does not compile"), ("cl1000k", None)])
def test_patterns_that_lose_text_are_refused_before_any_is_cut(pattern, message):
    if message is None:  # a name that is none is an expression, and loses nothing
        assert "".join(bpe.compile_pattern(pattern).findall(PROSE)) == PROSE
        return
    with pytest.raises(UserError, match=message):
        Tokenizer([], (), pattern)


def test_rows_of_ids_are_decoded_one_at_a_time():
    with pytest.raises(UserError, match="one text at a time"):
        Tokenizer([]).decode([[97, 98]])


def test_fuzzing_the_alphabet_keeps_every_byte():
    rng = random.Random(0)
    for _ in range(100):
        token = rng.randbytes(8)
        assert bpe.files.from_alphabet(bpe.files.to_alphabet(token)) == token
