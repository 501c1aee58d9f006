"""metaspace.py: SentencePiece's BPE read from tokenizer.json, with the ids and texts of `tokenizers`."""
import json
import pickle

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from bpe import Tokenizer, Unsupported
from checkpoint import load_model, save_model
from config import UserError
from metaspace import PREPEND, REPLACE, SPACE, MetaspaceTokenizer, load_tokenizer
from support import random_model

PROSE = "the low lower lowest of the lower words goes on, in the end  it  is 12 words; das größere Wort " * 3
SPECIAL = ["<unk>", "<s>", "</s>"]
FORMS = {  # of normalizer and pre_tokenizer: Llama 2's, that of newer files, and rarer ones
    "Prepend": ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None),
    "first": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
    "always": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}),
    "split": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}),
    "never": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False})}
AWKWARD = ["", " ", "  ", "the", " the", "  the  lower ", "a\nb\n\n the", "größer 大 👩‍👩‍👧 \x00\x7f",
           "▁the ▁▁", "<s>", "<0x41>A", "lower" * 100, "\t the\r\n", PROSE, "é e\u0301", "a" * 300]


def file_of(form, crossing=False) -> dict:
    """A tokenizer.json like Llama 2's, small. crossing: with tokens that go on over the end of a word."""
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=not crossing)
    theirs.train_from_iterator([PROSE], tokenizers.trainers.BpeTrainer(vocab_size=120, show_progress=False))
    content = json.loads(theirs.to_str())
    order = [*SPECIAL, *(f"<0x{value:02X}>" for value in range(256)), *content["model"]["vocab"]]
    content["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>",
                         "vocab": {text: id for id, text in enumerate(order)}}
    content["normalizer"], content["pre_tokenizer"] = FORMS[form]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": id, "content": text, **flags} for id, text in enumerate(SPECIAL)]
    strip = [] if form == "never" else [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    content["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, *strip]}
    return content


@pytest.fixture(scope="module", ids=str,
                params=[(form, crossing) for form in FORMS for crossing in (False, True)])
def pair(request):
    """(ours, theirs)"""
    content = file_of(*request.param)
    assert any(SPACE in text[1:].lstrip(SPACE) for text in content["model"]["vocab"]) == request.param[1]
    return MetaspaceTokenizer(content), tokenizers.Tokenizer.from_str(json.dumps(content))


def check_pair(pair, whole):
    ours, theirs = pair
    ids = ours.encode(whole, allow_special=True)
    assert ids == theirs.encode(whole, add_special_tokens=False).ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    plain = ours.encode(whole)
    assert not set(plain) & {0, 1, 2}, "text from users became a special token"
    if ours._scheme != "never" and (ours._scheme == "each" or not whole.startswith((" ", SPACE))):
        assert ours.decode(plain) == whole.replace(SPACE, " ")
    assert list(ours.encode_stream([whole])) == list(ours.encode_stream(whole)) == plain, "in a stream"
    assert "".join(ours.decode_stream(plain)).encode() == ours.decode_bytes(plain)


@pytest.mark.parametrize("whole", [*AWKWARD, "a<s> the</s>lower<s>", "<s>the", " <s>"])
def test_ids_and_texts_are_those_of_tokenizers(pair, whole):
    check_pair(pair, whole)


@given(st.text(st.sampled_from("  ▁theloweröß大\n1") | st.characters(exclude_categories=["Cs"]), max_size=25))
@settings(max_examples=60, deadline=None)
def test_ids_and_texts_are_those_of_tokenizers_for_any_text(pair, whole):
    check_pair(pair, whole)


def test_a_space_is_a_letter_and_stands_before_the_first_word_too():
    ours = MetaspaceTokenizer(file_of("Prepend"))
    assert ours.encode("lower lower") == ours.encode("lower") * 2
    ids = ours.encode("lower")
    assert ours.decode_bytes(ids) == b" lower" and ours.decode(ids) == "lower"
    assert ours.encode("大") == [ours._ids_of[SPACE], 3 + 0xE5, 3 + 0xA4, 3 + 0xA7]


def test_saved_sent_to_a_process_or_with_more_tokens_it_is_the_same(tmp_path):
    ours = load_tokenizer(write(tmp_path / "a.json", file_of("Prepend")))
    ours.save(tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == file_of("Prepend")
    for other in (load_tokenizer(tmp_path / "b.json"), pickle.loads(pickle.dumps(ours))):
        assert other.fingerprint == ours.fingerprint and other.encode(PROSE) == ours.encode(PROSE)
    more = ours.with_special_tokens(["<new>", "<s>"])
    assert more.special_tokens == {**ours.special_tokens, "<new>": ours.vocab_size}
    assert more.vocab_size == ours.vocab_size + 1 and more.fingerprint != ours.fingerprint
    assert [array.tolist() for array in ours.encode_batch([PROSE])] == [ours.encode(PROSE)]
    prints = {MetaspaceTokenizer(file_of(form)).fingerprint for form in FORMS}
    assert len(prints) == len(FORMS), "what changes the ids must change the fingerprint"


def test_a_folder_with_such_a_tokenizer_loads_and_is_saved_with_it(tmp_path):
    from transformers import AutoTokenizer
    ours = MetaspaceTokenizer(file_of("Prepend"))
    save_model(random_model(vocab_size=400), ours, tmp_path, eos_token="</s>")
    _, tokenizer = load_model(tmp_path)
    assert isinstance(tokenizer, MetaspaceTokenizer) and tokenizer.fingerprint == ours.fingerprint
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened("the lower 大")["input_ids"] == ours.encode("the lower 大") and opened.eos_token_id == 2


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("change, message, kind", [
    (lambda file: file["model"].update(dropout=0.1), "dropout 0.1", Unsupported),
    (lambda file: file["model"].update(ignore_merges=True), "ignore_merges", Unsupported),
    (lambda file: file["model"]["vocab"].pop("<0x41>"), "lacks 1 of the 256 bytes, <0x41>", Unsupported),
    (lambda file: file.update(normalizer={"type": "NFKC"}), "its normalizer and pre_tokenizer", Unsupported),
    (lambda file: file.update(pre_tokenizer={"type": "Whitespace"}), "are not SentencePiece's", Unsupported),
    (lambda file: file["added_tokens"].append(file["added_tokens"][0]), "'<unk>' stands twice", UserError),
    (lambda file: file["added_tokens"][0].update(content=""), "is empty", UserError),
    (lambda file: file["model"]["vocab"].update({"the": 5}), "an id of its .* stands twice", UserError),
    (lambda file: file["model"]["merges"].append(["zz", "z"]), "not a tokenizer.json", UserError),
    (lambda file: file["model"].update(vocab=None), "not a tokenizer.json", UserError)])
def test_what_is_not_quite_of_this_kind_is_refused_by_name(tmp_path, change, message, kind):
    content = file_of("Prepend")
    change(content)
    with pytest.raises(kind, match=message) as error:
        load_tokenizer(write(tmp_path / "tokenizer.json", content))
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_byte_level_files_are_read_as_ever_through_the_same_door(tmp_path):
    ours = Tokenizer([(b"a", b"b")], ["<end>"])
    ours.save(tmp_path / "t.json")
    assert load_tokenizer(tmp_path / "t.json").fingerprint == ours.fingerprint
    for rubbish in ("", "[]", "{", "3", '{"model": 3}'):
        (tmp_path / "t.json").write_text(rubbish)
        with pytest.raises(UserError, match="t.json is not a tokenizer.json"):
            load_tokenizer(tmp_path / "t.json")
