"""objectives.py: what a prefix sees, what a rearranged window says, and what is measured of a hidden middle.

(The loss and its fast form are tested in test_train.py.)
"""
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe
import data
import objectives
from attention import Mask
from bpe import Tokenizer
from checkpoint import save_model
from data import IGNORE, Batches
from model import ModelConfig, Transformer
from objectives import (FIM_TOKENS, FillInTheMiddle, PrefixLM, arrange, hidden_middles, measure_infilling,
                        next_token_loss, with_fim_tokens)

ROOT = Path(objectives.__file__).parent
TEXT = "the cat sat on the mat; 天地玄黄，宇宙洪荒 天地 " * 3
PLAIN = Tokenizer.train([TEXT], 256 + 30 + 1, ["<|endoftext|>"], workers=1)
FIM = with_fim_tokens(PLAIN)
END = FIM.special_tokens["<|endoftext|>"]
PRE, MID, SUF = (FIM.special_tokens[text] for text in FIM_TOKENS)


def write_shards(folder, texts, split="train"):
    """Token shards of these texts, as data.py would write them."""
    folder.mkdir(parents=True, exist_ok=True)
    data.write_documents(folder / f"{split}.jsonl", [{"text": text} for text in texts])
    entry = data.write_shard(folder, split, PLAIN, workers=1)
    meta = {"dtype": PLAIN.dtype.name, "vocab_size": PLAIN.vocab_size, "end_of_text": END, split: entry,
            "tokenizer": PLAIN.fingerprint}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """120 texts, most of them a few windows long, in words and signs of one to four bytes."""
    generator = np.random.default_rng(0)
    words = ["the cat", " sat", " on", "\n", "天地", "玄黄。", " é", "😀", " 12", "(x)", "<|fim_middle|>"]
    texts = ["".join(generator.choice(words, generator.integers(1, 80))) + "." for _ in range(120)]
    return write_shards(tmp_path_factory.mktemp("shards"), texts)


def small_model(seed=0, vocab_size=FIM.vocab_size, **changes):
    """A model with random weights throughout: at the start, blocks and head would be zero."""
    torch.manual_seed(seed)
    config = ModelConfig(vocab_size, **{"dim": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64} | changes)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def differ(a, b):
    return (a != b).flatten(1).any(dim=1)


def within(count, n, p, sigmas=4.5):
    """Whether `count` of n is likely at probability p: beyond 4.5 sigma lie 7 of a million seeds."""
    return abs(count - n * p) <= sigmas * math.sqrt(n * p * (1 - p))


# ---- Prefix LM ---------------------------------------------------------------------------------------------


def test_a_query_sees_what_is_before_it_and_all_of_the_prefix(shards):
    plain, prefix = Batches(shards, "train", 8, 12), PrefixLM(Batches(shards, "train", 8, 12), seed=0)
    for step in range(5):
        (inputs, targets), (same, kept, mask) = plain.at(step), prefix.at(step)
        assert torch.equal(inputs, same)
        seen = mask.dense(torch.arange(12), torch.arange(12))[:, 0]  # (B, T, T)
        for row, length in enumerate(mask.prefix.tolist()):
            for q in range(12):
                assert seen[row, q].tolist() == [k <= q or k < length for k in range(12)]
                expected = IGNORE if q + 1 < length else targets[row, q]
                assert kept[row, q] == expected, f"target {q} of a prefix of {length}: is it shifted by one?"


def test_every_length_that_leaves_a_suffix_is_as_likely(shards):
    prefix = PrefixLM(Batches(shards, "train", 50, 4), seed=1)
    counts = Counter(length for step in range(40) for length in prefix.at(step)[2].prefix.tolist())
    assert sorted(counts) == [1, 2, 3, 4], "of 5 tokens, at least one is prefix and one suffix"
    assert all(within(count, 2000, 1 / 4) for count in counts.values()), counts


def test_a_later_prefix_token_reaches_earlier_ones_and_a_suffix_token_none():
    model = small_model()
    inputs, length, T = torch.arange(10)[None] * 7 % 250, 6, 10
    mask = torch.ones(T, T, dtype=torch.bool).tril() | (torch.arange(T) < length)
    for changed in range(T):
        other = inputs.clone()
        other[0, changed] = 251
        moved = differ(model.model(inputs, mask=mask[None])[0], model.model(other, mask=mask[None])[0])
        first = 0 if changed < length else changed
        assert moved.tolist() == [t >= first for t in range(T)], f"token {changed} of a prefix of {length}"


def test_the_loss_is_that_of_the_suffix_given_the_prefix(shards):
    """Eq. 15.2, term by term: the sum over the suffix of -log p, each term from a pass of its own."""
    batch = PrefixLM(Batches(shards, "train", 4, 10), seed=2).at(0)
    (inputs, targets, mask), model = batch, small_model()
    loss_sum, count = next_token_loss(model, batch)
    lengths = mask.prefix.tolist()
    assert count == sum(10 - length + 1 for length in lengths) and len(set(lengths)) > 1
    expected = 0.0
    for row, length in enumerate(lengths):
        for t in range(length - 1, 10):  # token t + 1 from tokens 0 … t: the rest is not there at all
            known = max(t + 1, length)
            logits = model(inputs[row:row + 1, :known], mask=Mask(prefix=mask.prefix[row:row + 1]))
            expected += F.cross_entropy(logits[0, t], targets[row, t])
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)  # float32, other orders of summation


def test_what_the_prefix_would_predict_has_no_gradient(shards):
    batch, model, kept = PrefixLM(Batches(shards, "train", 4, 10), seed=2).at(0), small_model(), []
    model.model.norm.register_forward_hook(lambda module, given, out: kept.append(out) or out.retain_grad())
    next_token_loss(model, batch)[0].backward()
    has_gradient = (kept[0].grad != 0).any(dim=-1)  # (B, T)
    assert torch.equal(has_gradient, batch[1] != IGNORE)


def test_a_window_that_is_filled_up_keeps_a_target(tmp_path):
    batches = Batches(write_shards(tmp_path, ["abcdef"]), "train", 2, 4)  # 7 tokens: the last window has 2
    for seed in range(20):
        _, targets, mask = PrefixLM(batches, seed).at(0)
        assert (targets != IGNORE).any(dim=1).all()
        assert mask.prefix.tolist() != [4, 4]


WRAPPERS = [PrefixLM, lambda batches, seed: FillInTheMiddle(batches, FIM, seed)]


def tensors(batch):
    return [x.prefix if isinstance(x, Mask) else x for x in batch]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_what_is_drawn_follows_from_the_seed_and_the_windows_number_alone(shards, wrap):
    alone = wrap(Batches(shards, "train", 8, 16, seed=3), 3)
    ranks = [wrap(Batches(shards, "train", 2, 16, 3, rank, 2), 3) for rank in range(2)]
    in_sequence = [alone.at(step) for step in range(6)]
    for step in (5, 0, 3, 3):
        parts = [ranks[rank].at(2 * step + half) for half in range(2) for rank in range(2)]
        for whole, *pieces in zip(*map(tensors, (in_sequence[step], *parts))):
            assert torch.equal(whole, torch.cat(pieces)), "2 ranks x 2 micro-batches x 2 differ from 8"
    other = wrap(Batches(shards, "train", 8, 16, seed=3), 4).at(0)
    assert not torch.equal(other[1], in_sequence[0][1]), "another seed changes nothing"


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_what_the_loop_reads_of_batches_is_still_there(shards, wrap):
    plain = Batches(shards, "train", 4, 16)
    wrapped = wrap(plain, 0)
    for name in ("tokens", "text_bytes", "windows", "meta", "data", "seq_len", "batch_size"):
        assert getattr(wrapped, name) is getattr(plain, name)
    assert not hasattr(wrapped, "no_such_thing")


def test_objectives_stand_around_each_other_and_around_replay(shards):
    mixed = data.Replay(Batches(shards, "train", 4, 16), Batches(shards, "train", 4, 16, seed=9), 0.5)
    inputs, targets, mask = PrefixLM(FillInTheMiddle(mixed, FIM, 0, rate=0.0), 0).at(2)
    assert torch.equal(inputs, mixed.at(2)[0]) and mask.prefix.shape == (4,)


# ---- Fill in the middle ------------------------------------------------------------------------------------


def test_the_new_tokens_come_last_and_change_no_other_id():
    assert (PRE, MID, SUF) == (PLAIN.vocab_size, PLAIN.vocab_size + 1, PLAIN.vocab_size + 2)
    assert {id: FIM.vocab[id] for id in PLAIN.vocab} == PLAIN.vocab and FIM.vocab_size == PLAIN.vocab_size + 3
    text = "the cat 天地 <|endoftext|> <|fim_prefix|>"
    assert FIM.encode(text) == PLAIN.encode(text), "the text spells a special token, and must stay text"
    assert with_fim_tokens(FIM) is FIM
    one_of_three = with_fim_tokens(Tokenizer([], {"<|fim_suffix|>": 300, "</s>": 301}, bpe.GPT2_PATTERN))
    assert one_of_three.pattern == bpe.GPT2_PATTERN and one_of_three.special_tokens == {
        "<|fim_suffix|>": 300, "</s>": 301, "<|fim_prefix|>": 302, "<|fim_middle|>": 303}


def test_the_tokenizer_survives_saving(tmp_path):
    FIM.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").fingerprint == FIM.fingerprint != PLAIN.fingerprint


def test_both_arrangements_by_hand():
    assert arrange([1, 2], [3], [4, 5], False, FIM) == [PRE, 1, 2, SUF, 4, 5, MID, 3]
    assert arrange([1, 2], [3], [4, 5], True, FIM) == [PRE, SUF, 4, 5, MID, 1, 2, 3]


def fill_in(ids_of_rows, T, seed=0, **options):
    """FillInTheMiddle around rows of at most T + 1 ids each, all in step 0."""
    inputs = torch.full((len(ids_of_rows), T), END)
    targets = torch.full((len(ids_of_rows), T), IGNORE)
    for row, ids in enumerate(ids_of_rows):
        inputs[row, :len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, :len(ids) - 1] = torch.tensor(ids[1:])
    batches = SimpleNamespace(at=lambda step: (inputs, targets), numbers=lambda step: range(len(ids_of_rows)),
                              meta={"end_of_text": END})
    return FillInTheMiddle(batches, FIM, seed, **options)


def ids_of(inputs, targets):
    """The rows of a batch, as one list of ids each, without what fills them up."""
    real = (targets != IGNORE).sum(dim=1).tolist()
    return [[*inputs[row, :1].tolist(), *targets[row, :n].tolist()] for row, n in enumerate(real)]


def undo(ids, spm_rate=0.5):
    """[(kind, prefix, middle, suffix)] of a row's pieces: ids; plain ones have a prefix only.

    <PRE> <SUF> is SPM, or at spm_rate 0 PSM with an empty prefix. Nothing says where an SPM's middle begins.
    """
    found = []
    while ids:
        stop = ids.index(END) + 1 if END in ids else len(ids)
        piece, ids = ids[:stop], ids[stop:]
        if piece[0] != PRE:
            found.append(("plain", piece, [], []))
            continue
        assert piece[-1] == END and Counter(piece)[PRE] == Counter(piece)[SUF] == Counter(piece)[MID] == 1
        suf, mid = piece.index(SUF), piece.index(MID)
        if suf == 1 and spm_rate > 0:
            found.append(("SPM", piece[mid + 1:-1], [], piece[suf + 1:mid]))
        else:
            found.append(("PSM", piece[1:suf], piece[mid + 1:-1], piece[suf + 1:mid]))
    return found


def text_of(prefix, middle, suffix):
    return FIM.decode_bytes([id for id in prefix + middle + suffix if id != END])


texts = st.lists(st.text(st.sampled_from("the cat\n天地玄😀é<|fim_midle>"), max_size=40), min_size=1, max_size=5)


@pytest.mark.parametrize("cut", ["characters", "tokens"])
@settings(deadline=None, max_examples=300)
@given(texts=texts, start=st.integers(0, 10), T=st.integers(4, 60), size=st.integers(2, 200),
       rate=st.sampled_from([0.5, 1.0]), seed=st.integers(0, 2 ** 63 - 1))
def test_undone_every_piece_gives_its_text_back_byte_for_byte(cut, texts, start, T, size, rate, seed):
    """Windows begin and end anywhere, inside characters too. Only what the window has no room for is lost, at
    the end of the last piece in it; and if there is room, nothing is.
    """
    ids = [id for text in texts for id in (*FIM.encode(text), END)][start:start + size + 1] or [END]
    T = max(T, len(ids) - 1)
    result = ids_of(*fill_in([ids, ids], T, seed, rate=rate, cut=cut).at(0))[0] if len(ids) > 1 else ids
    before = [text_of(piece, [], []) for piece in objectives.pieces(ids, END)]
    after = [text_of(*parts) for _, *parts in undo(result)]
    assert len(result) <= T + 1
    assert after[:-1] == before[:len(after) - 1]
    if len(result) < T + 1:
        assert after == before
    else:
        assert before[len(after) - 1].startswith(after[-1]) and len(after) <= len(before)


@pytest.mark.parametrize("cut", ["characters", "tokens"])
def test_at_rate_0_nothing_changes(shards, cut):
    plain = Batches(shards, "train", 8, 16)
    for step in range(plain.steps):  # the last window is filled up
        for before, after in zip(plain.at(step), FillInTheMiddle(plain, FIM, 0, rate=0.0, cut=cut).at(step)):
            assert torch.equal(before, after)


def test_a_row_has_its_size_its_targets_shifted_and_its_end_of_text(shards):
    filled = FillInTheMiddle(Batches(shards, "train", 8, 32), FIM, 0, rate=1.0)
    for step in range(10):
        inputs, targets = filled.at(step)
        assert inputs.shape == targets.shape == (8, 32) and inputs.dtype == targets.dtype == torch.int64
        real = targets != IGNORE
        assert torch.equal(inputs[:, 1:][real[:, 1:]], targets[:, :-1][real[:, 1:]])
        for ids in ids_of(inputs, targets):
            kinds = [kind for kind, *_ in undo(ids)]  # undo asserts that every arranged piece is whole
            assert kinds[0] != "plain" or ids[0] == END, "rate 1, and there was room"
            if len(kinds) == 1:
                assert ids[-1] == END, "the middle's end was cut off: nothing teaches the model to stop"


def test_what_does_not_fit_is_lost_at_the_end_of_the_text():
    """A window that is all one piece of 30 tokens: 26 are left beside the sentinels and end-of-text."""
    ids = FIM.encode("zyxwvutsrqponmlkjihgfedcba0123")
    assert len(ids) > 26
    room = len(ids) - 4
    for row in ids_of(*fill_in([ids] * 50, len(ids) - 1, rate=1.0, cut="tokens").at(0)):
        (kind, *parts), = undo(row)
        assert kind != "plain" and sum(parts, []) == ids[:room] and row[-1] == END


def test_a_window_without_room_for_a_piece_keeps_it_as_it_is():
    for size in range(2, 8):
        ids = FIM.encode("zyxwvuts")[:size]
        for row in ids_of(*fill_in([ids] * 20, size - 1, rate=1.0).at(0)):
            assert (row == ids) if size <= 4 else (row[0] == PRE and row[-1] == END and len(row) == size)


def test_a_window_that_becomes_too_short_is_filled_up_without_targets(tmp_path):
    ids = [*FIM.encode("the cat"), END]
    inputs, targets = fill_in([ids], 40, rate=1.0, cut="tokens").at(0)
    length = len(ids) + 3
    assert (targets[0, length - 1:] == IGNORE).all() and (inputs[0, length:] == END).all()
    assert (targets[0, :length - 1] != IGNORE).all(), "the loss is on all of it: prefix, suffix, middle"


def test_cuts_are_at_any_character_and_no_merge_crosses_one():
    text = "the cat sat on the mat; 天地玄黄"
    rows = [[*FIM.encode(text), END]] * 400
    lengths = Counter()
    for row in ids_of(*fill_in(rows, 80, rate=1.0, spm_rate=0.0).at(0)):
        (_, *parts), = undo(row, spm_rate=0.0)
        decoded = [FIM.decode_bytes(ids).decode() for ids in parts]  # strict: no character is cut
        assert [FIM.encode(part) for part in decoded] == parts, "a part is not tokenised anew"
        lengths.update([len(decoded[0]), len(decoded[0]) + len(decoded[1])])
    ends, at = set(), 0
    for id in FIM.encode(text):
        at += len(FIM.vocab[id].decode(errors="ignore"))
        ends.add(at)
    assert set(lengths) == set(range(len(text) + 1)) and not ends >= set(lengths), "no cut inside a token"
    assert all(within(count, 800, 1 / (len(text) + 1)) for count in lengths.values()), lengths


def test_cuts_in_token_space_keep_the_tokens():
    ids, cuts = FIM.encode("the cat sat on the mat"), Counter()
    for row in ids_of(*fill_in([[*ids, END]] * 400, 60, rate=1.0, spm_rate=0.0, cut="tokens").at(0)):
        (_, prefix, middle, suffix), = undo(row, spm_rate=0.0)
        assert prefix + middle + suffix == ids
        cuts.update([len(prefix), len(prefix + middle)])
    assert set(cuts) == set(range(len(ids) + 1))
    assert all(within(count, 800, 1 / len(cuts)) for count in cuts.values()), cuts


def test_whether_a_piece_is_rearranged_is_drawn_for_each_piece():
    rows = [[*FIM.encode("the cat"), END] * 6] * 40
    filled = ids_of(*fill_in(rows, 120, rate=0.5, cut="tokens").at(0))
    kinds = [{kind == "plain" for kind, *_ in undo(row)} for row in filled]
    assert sum(len(both) == 2 for both in kinds) > 30, "of 40 windows of 6 pieces 1 in 32 is all of one kind"


def test_where_there_is_no_text_there_is_nothing_to_fill_in():
    row, = ids_of(*fill_in([[END, END, *FIM.encode("the cat"), END]], 40, rate=1.0).at(0))
    assert row[:2] == [END, END] and row[2] == PRE


def test_half_a_character_at_a_windows_edge_is_neither_lost_nor_cut():
    """Without merges a token is a byte: the window begins with the last byte of 天, ends with two of 黄's.

    What lies between may be cut, and the rest stays with the outer parts.
    """
    tokenizer = with_fim_tokens(Tokenizer([], ["<|endoftext|>"]))
    ids = tokenizer.encode("天地é黄")[2:-1]
    fim = fill_in([ids], 60)
    fim.tokenizer = tokenizer
    seen = set()
    for number in range(300):
        prefix, middle, suffix = fim.parts(ids, objectives.row_generator(0, number))
        assert prefix + middle + suffix == ids
        assert bytes(middle).decode() in ("", "地", "é", "地é"), "a character is cut, or half of one moved"
        assert prefix[:1] == ids[:1] and suffix[-2:] == ids[-2:]
        seen.add(len(middle))
    assert seen == {0, 3, 2, 5}
    leftover = ids[:1]  # nothing but a stray byte
    assert sum(fim.parts(leftover, objectives.row_generator(0, 0)), []) == leftover


def test_text_that_spells_a_sentinel_stays_text():
    text = "a<|fim_prefix|>b<|fim_suffix|>c<|fim_middle|>d<|endoftext|>"
    for cut in ("characters", "tokens"):
        for row in ids_of(*fill_in([[*FIM.encode(text), END]] * 100, 200, rate=1.0, cut=cut).at(0)):
            assert [row.count(id) for id in (PRE, MID, SUF, END)] == [1, 1, 1, 1]
            assert text_of(*undo(row)[0][1:]).decode() == text


@pytest.mark.parametrize("rate, spm_rate", [(0.5, 0.5), (0.9, 0.2), (1.0, 1.0), (0.25, 0.0)])
def test_the_shares_are_those_asked_for(rate, spm_rate):
    """Of both together, PSM with an empty prefix looks like SPM: when one of two cuts is at 0 of 0 … 11."""
    rows = [[*FIM.encode("the cat sat"), END, *FIM.encode("on the mat."), END]] * 1500
    kinds = Counter(kind for row in ids_of(*fill_in(rows, 80, rate=rate, spm_rate=spm_rate).at(0))
                    for kind, *_ in undo(row, spm_rate))
    arranged = kinds["PSM"] + kinds["SPM"]
    look_like_spm = spm_rate + (1 - spm_rate) * (1 - (11 / 12) ** 2) if spm_rate else 0.0
    assert kinds.total() == 3000
    assert within(arranged, 3000, rate) and within(kinds["SPM"], arranged, look_like_spm)


def test_rows_differ_although_their_text_is_equal():
    rows = ids_of(*fill_in([[*FIM.encode("the cat sat on the mat " * 3), END]] * 20, 120, rate=1.0).at(0))
    assert len(set(map(tuple, rows))) == 20


# ---- Measuring ---------------------------------------------------------------------------------------------


LINES = [f"{word} the cat sat on 天地 {word}(12)" for word in "alpha beta gamma delta epsilon zeta".split()]


@pytest.mark.parametrize("cut", ["words", "characters"])
@pytest.mark.parametrize("span", [3, 16])
def test_a_hidden_middle_is_a_run_within_a_line_with_its_text_around_it(tmp_path, cut, span):
    documents = ["\n".join(LINES[:4]), "\n\n   \n" + "\n".join(LINES[4:]) + "\n"]
    write_shards(tmp_path, documents, "val")
    lengths = set()
    for seed in range(30):
        found = hidden_middles(tmp_path, 100, span, cut, FIM.pattern, 10, seed)
        assert len(found) <= 6, "more than one for a line, or one where there is nothing to guess"
        for before, middle, after in found:
            assert any(before + middle + after in document for document in documents)
            assert 1 <= len(middle.encode()) <= span and "\n" not in middle and middle.strip()
            assert 1 <= len(before) <= 10 and len(after) <= 10
            if cut == "words":
                parts = [FIM.encode(part) for part in (before, middle, after)]
                assert FIM.encode(before + middle + after) == sum(parts, []), "a cut inside a token"
            lengths.add(len(middle.encode()))
    assert lengths >= ({2, 3} if span == 3 else {3, 4, 7, 8, 12, 16})


def test_every_line_is_as_likely_to_be_chosen(tmp_path):
    write_shards(tmp_path, ["\n".join(LINES[:2]), "\n".join(LINES[2:])], "val")
    counts = Counter()
    for seed in range(600):
        chosen = hidden_middles(tmp_path, 2, 99, "characters", FIM.pattern, 999, seed)
        assert len(chosen) == 2
        for before, middle, after in chosen:
            counts[before.count("\n"), before[0]] += 1
    assert len(counts) == 6 and all(within(count, 600, 2 / 6) for count in counts.values()), counts


def test_the_choice_follows_from_the_seed(tmp_path):
    write_shards(tmp_path, ["\n".join(LINES)], "val")
    one, same, other = (hidden_middles(tmp_path, 4, 9, "words", FIM.pattern, 50, seed) for seed in (5, 5, 6))
    assert one == same != other


def prompts_of(monkeypatch, folder, tokenizer=FIM, **options):
    """{order: prompts} that measure_infilling makes, and the middles."""
    monkeypatch.setattr(objectives, "scores", lambda model, tokenizer, prompts, middles, *rest:
                        (prompts, middles))
    model = small_model(vocab_size=tokenizer.vocab_size)
    results = measure_infilling(model, tokenizer, folder, **options)
    return {order: prompts for order, (prompts, _) in results.items()}, results["left to right"][1]


def test_every_order_has_the_same_middles_and_as_much_context(tmp_path, monkeypatch):
    write_shards(tmp_path, ["\n".join(LINES * 8)], "val")
    prompts, middles = prompts_of(monkeypatch, tmp_path, n=40, span=10)
    context, text, full, short = 64 - 3 - 11, "\n".join(LINES * 8), 0, 0
    for left, psm, spm, middle in zip(prompts["left to right"], prompts["PSM"], prompts["SPM"], middles):
        prefix, suffix = psm[1:psm.index(SUF)], psm[psm.index(SUF) + 1:-1]
        assert psm == arrange(prefix, [], suffix, False, FIM)
        assert spm == arrange(prefix, [], suffix, True, FIM)
        assert left[-len(prefix):] == prefix, "the text before the middle differs"
        assert FIM.decode(prefix) + middle + FIM.decode(suffix) in text
        assert len(left) <= context and len(suffix) <= context // 2
        if len(left) == context:
            assert len(prefix) + len(suffix) == context, "less context than there is"
            short += len(suffix) < context // 2
            full += len(suffix) == context // 2
    assert full > 10 and short > 0, "long texts, and some that end soon behind the middle"


def test_without_the_sentinels_only_left_to_right_is_measured(tmp_path, monkeypatch):
    write_shards(tmp_path, ["\n".join(LINES)], "val")
    assert list(prompts_of(monkeypatch, tmp_path, PLAIN)[0]) == ["left to right"]


@torch.no_grad()
def test_the_scores_are_those_of_one_middle_after_the_other():
    """Bits from the logits of each prompt alone, with nothing beside it; greedy by hand, token by token."""
    model, prompts = small_model(), [FIM.encode(line)[:n] for n, line in enumerate(LINES, 3)]
    middles, nats, begins = [], 0.0, 0
    for number, prompt in enumerate(prompts):
        ids = list(prompt)
        while len(ids) < len(prompt) + 9 and ids[-1] != END:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        answer = FIM.decode_bytes(ids[len(prompt):])
        middle = FIM.decode(ids[len(prompt):len(prompt) + 2]) if number % 2 else "the cat"
        target = FIM.encode(middle)
        logps = model(torch.tensor([prompt + target])).log_softmax(dim=-1)[0, len(prompt) - 1:-1]
        nats -= float(logps.gather(1, torch.tensor(target)[:, None]).sum())
        begins += answer.startswith(middle.encode())
        middles.append(middle)
    result = objectives.scores(model, FIM, prompts, middles, 8, batch_size=4)
    num_bytes = sum(len(middle.encode()) for middle in middles)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)  # float32
    assert result["begins"] == begins / 6 and 0 < begins < 6


class Parrot:
    """Stands for `generate`: says what it was given, then end-of-text or not."""

    def __init__(self, answers):
        self.answers = answers

    def __call__(self, model, prompts, max_new_tokens, temperature, stop_ids):
        assert temperature == 0 and stop_ids == [END]
        rows, self.answers = self.answers[:len(prompts)], self.answers[len(prompts):]
        width = max(map(len, rows))
        return SimpleNamespace(ids=torch.tensor([row + [END] * (width - len(row)) for row in rows]),
                               lengths=torch.tensor([len(row) for row in rows]))


def test_what_begins_with_the_middle_and_what_ends_there(monkeypatch):
    answers = [("cat", True), ("cats", True), ("cat", False), ("ca", True), ("dog", True), ("", True)]
    parrot = Parrot([FIM.encode(text) + [END] * ends for text, ends in answers])
    monkeypatch.setattr(objectives, "generate", parrot)
    result = objectives.scores(small_model(), FIM, [[1]] * 6, ["cat"] * 6, 8, batch_size=4)
    assert result["begins"] == 3 / 6 and result["exact"] == 1 / 6


def test_continuations_by_hand():
    inputs, targets = objectives.continuations([[1, 2, 3], [4]], [[5, 6], [7]], fill=0)
    assert inputs.tolist() == [[1, 2, 3, 5], [4, 0, 0, 0]]
    assert targets.tolist() == [[IGNORE, IGNORE, 5, 6], [7, IGNORE, IGNORE, IGNORE]]


def test_a_model_learns_to_fill_in_what_only_the_suffix_tells():
    """"-a+A", "-b+B" …: from the left the letter is one of 8; who reads what is behind it knows it."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(FIM.vocab_size, dim=32, n_layers=2, n_heads=2, max_seq_len=32))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    rows = [[*FIM.encode(f"-{letter}+{letter.upper()}"), END] for letter in "abcdefgh"]
    fim = fill_in(rows * 2, 8, rate=0.8)
    fim.parts = lambda ids, generator: [ids[:1], ids[1:2], ids[2:]]
    for fim.seed in range(120):
        loss_sum, count = next_token_loss(model, fim.at(0))
        optimizer.zero_grad()
        (loss_sum / count).backward()
        optimizer.step()
    prefix, suffixes = FIM.encode("-"), [FIM.encode("+" + letter) for letter in "ABCDEFGH"]
    prompts = {"left to right": [prefix] * 8,
               "PSM": [arrange(prefix, [], suffix, False, FIM) for suffix in suffixes],
               "SPM": [arrange(prefix, [], suffix, True, FIM) for suffix in suffixes]}
    result = {order: objectives.scores(model, FIM, given, list("abcdefgh"), 4, 8)
              for order, given in prompts.items()}
    for order in ("PSM", "SPM"):
        assert result[order]["exact"] == 1 and result[order]["bits_per_byte"] < 1
    assert result["left to right"]["begins"] <= 1 / 8 and result["left to right"]["bits_per_byte"] > 2.9


@pytest.mark.slow
def test_random_cuts_teach_where_to_go_on_and_where_to_stop():
    """Texts are pieces of the alphabet, over and over: the prefix says what comes, the suffix how much."""
    torch.manual_seed(0)
    letters, generator = "abcdefghijklmnopqrstuvwxyz" * 3, np.random.default_rng(0)
    model = Transformer(ModelConfig(FIM.vocab_size, dim=64, n_layers=2, n_heads=2, max_seq_len=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0)
    for step in range(1300):
        starts, lengths = generator.integers(26, size=16), generator.integers(8, 30, size=16)
        rows = [[*FIM.encode(letters[i:i + n]), END] for i, n in zip(starts, lengths)]
        loss_sum, count = next_token_loss(model, fill_in(rows, 40, seed=step, rate=0.9).at(0))
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 20) * (1 - step / 1300)
        optimizer.zero_grad()
        (loss_sum / count).backward()
        optimizer.step()
    texts = [(letters[i:i + a], letters[i + a:i + a + b], letters[i + a + b:i + a + b + 8])
             for i, a, b in generator.integers((0, 1, 1), (26, 8, 6), size=(200, 3))]
    for spm in (False, True):
        prompts = [arrange(FIM.encode(before), [], FIM.encode(after), spm, FIM)
                   for before, _, after in texts]
        result = objectives.scores(model, FIM, prompts, [middle for _, middle, _ in texts], 8, 100)
        assert result["exact"] > 0.8, f"SPM {spm}: {result}"


# ---- As a command ------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_says_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path / "data", ["\n".join(LINES * 3)], "val")
    save_model(small_model(), FIM, tmp_path / "fim")
    save_model(small_model(vocab_size=PLAIN.vocab_size), PLAIN, tmp_path / "plain")
    arguments = ["--data", str(tmp_path / "data"), "--n", "10", "--cut", "characters", "--device", "cpu"]
    run = subprocess.run([sys.executable, ROOT / "objectives.py", "--model", tmp_path / "fim", *arguments],
                         capture_output=True, encoding="utf-8", timeout=300)
    assert run.returncode == 0, run.stderr
    table = run.stdout.splitlines()[-4:]
    assert [line[:15].strip() for line in table] == ["", "left to right", "PSM", "SPM"]
    assert [line.count("%") for line in table] == [0, 1, 2, 2], "left to right never says where a middle ends"
    monkeypatch.setattr(sys, "argv", ["objectives.py", "--model", str(tmp_path / "plain"), *arguments])
    objectives.main()
    said = capsys.readouterr().out
    assert "only left to right is measured" in said and "PSM" not in said and "left to right  " in said


def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path / "data", ["\n".join(LINES)], "val")
    write_shards(tmp_path / "blank", ["  \n \n"], "val")
    save_model(small_model(), FIM, tmp_path / "fim")
    save_model(small_model(), None, tmp_path / "mute")
    for model, folder, changes, message in [
            ("fim", "none", [], "python data.py --out"),
            ("fim", "blank", [], "has no line in which to hide"),
            ("fim", "data", ["--span", "60"], "pass a smaller --span"),
            ("mute", "data", [], "has no tokenizer.json"),
            ("none", "data", [], "there is no model folder"),
            ("fim", "data", ["--n", "0"], "--n 0 is out of range"),
            ("fim", "data", ["--cut", "lines"], "one of words, characters")]:
        monkeypatch.setattr(sys, "argv", ["objectives.py", "--model", str(tmp_path / model), "--data",
                                          str(tmp_path / folder), "--device", "cpu", *changes])
        with pytest.raises(SystemExit) as ended:
            objectives.run(objectives.main)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and message in error and error.count("\n") == 1, error
