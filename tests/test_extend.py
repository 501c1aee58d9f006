"""extend.py, and train.py's --rope_scaling: reading further than it was trained."""
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import config
import data
import extend
import train
from bpe import Tokenizer
from checkpoint import load_model, save_model
from positions import extended
from support import TINY, in_process, random_ids, random_model


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards from a small made-up text."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    for number in range(20):
        words = rng.choices(["def", "class", "return", "self", "value", "import", "for", "in", "数据"], k=400)
        (folder / f"text {number}.txt").write_text(" ".join(words), encoding="utf-8")
    data.prepare(data.Settings(input=(str(folder),), out=str(folder / "shards"), vocab_size=280,
                               val_fraction=0.2, workers=1))
    return folder / "shards"


@pytest.fixture(scope="module")
def base(shards, tmp_path_factory):
    """A model folder: random weights, said to be trained at 16."""
    model = random_model(vocab_size=280, max_seq_len=16, qk_norm=True)
    folder = tmp_path_factory.mktemp("base")
    save_model(model, Tokenizer.load(shards / "tokenizer.json"), folder)
    return folder


# ---- the measure -------------------------------------------------------------------------------------------


def test_loss_by_position_is_that_of_the_same_tokens_after_ever_more_context():
    """A loop over single tokens, each predicted from nothing but its context; 70 tokens, a ragged end."""
    model, passages, length, bucket = random_model(), random_ids(2, 70), 16, 4
    got = extend.loss_by_position(model, passages, length, bucket)
    last = (70 - 1 - length) // bucket  # the window that begins last
    with torch.no_grad():
        for place in range(4):
            nats = []
            for passage in passages:
                for t in range(13, 4 * last + 4 + 1):  # targets that stand in every place of some window
                    start = ((t - 1) // 4 - place) * 4
                    nats.append(-model(passage[None, start:t])[0, -1].log_softmax(-1)[passage[t]].item())
            assert got[place].item() == pytest.approx(sum(nats) / len(nats), abs=1e-4), "float32, 50 logits"


def test_a_model_that_sees_no_context_has_the_same_loss_everywhere():
    model = random_model(max_seq_len=64)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    losses = extend.loss_by_position(model, random_ids(3, 150), 64, 8)
    assert_close(losses, losses[:1].expand(8), rtol=1e-6, atol=0)  # the same tokens, summed alike


def test_a_model_never_looks_beyond_the_last_window_of_a_passage():
    """The text after the last whole window is of no consequence, and none of it is missing before."""
    model, ids = random_model(), random_ids(1, 40)
    got, shorter = (extend.loss_by_position(model, passage, 16, 4) for passage in (ids, ids[:, :37]))
    assert torch.equal(got, shorter)


def test_held_out_passages_come_from_all_over_the_validation_split(shards):
    _, tokens = data.open_shard(shards, "val", verify=True)
    passages = extend.held_out(str(shards), 3, 50)
    assert passages[0].tolist() == tokens[:50].tolist() and passages[-1].tolist() == tokens[-50:].tolist()


def test_the_variants_read_equally_far_and_the_window_is_the_trained_length():
    variants = extend.variants(TINY, 4.0)
    assert list(variants) == ["plain", "linear", "ntk", "dynamic", "yarn", "llama3", "window"]
    assert {c.max_seq_len for c in variants.values()} == {256}
    assert variants["window"].sliding_window == 64 and variants["plain"] == replace(TINY, max_seq_len=256)
    model = random_model()
    for config_ in variants.values():
        other = extend.with_config(model, config_)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
        ids = random_ids(1, 256)
        with torch.no_grad():
            assert other(ids).isfinite().all()


def test_a_row_shows_the_mean_the_bars_and_the_spread_of_the_seeds():
    losses = torch.tensor([[2.0, 3.0, 4.0], [2.0, 3.5, 4.5]], dtype=torch.float64)
    assert extend.row("yarn", losses, 1, at_home=2.0) == \
        "yarn     2.000 |  3.250  4.250  ▁|██  3.750 ± 0.250"
    assert extend.row("yarn", losses[:1], 2, at_home=2.75) == "yarn     2.000  3.000 |  4.000  ▁▃|█  4.000"
    with pytest.raises(config.UserError, match="of yarn is not finite"):
        extend.row("yarn", losses * math.nan, 1, at_home=2.0)


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_a_rule_without_and_with_training(monkeypatch, capsys, base, shards):
    before = (base / "model.safetensors").read_bytes()
    code, out, errors = in_process(
        monkeypatch, capsys, extend.main, "--model", base, "--data", shards, "--passages", 2, "--steps", 2,
        "--seeds", 2, "--batch_size", 2, "--device", "cpu")
    assert code == 0, errors
    lines = out.splitlines()
    names = ["plain", "linear", "ntk", "dynamic", "yarn", "llama3", "window"]
    assert [line.split()[0] for line in lines if "|" in line] == ["up", *names, *names]
    assert "in a text of 64; trained at 16" in out and "after 2 steps of 2 x 64 tokens" in out
    rows = [line for line in lines if line.startswith(tuple(names))]
    assert all("±" not in line for line in rows[:7]) and all(" ± " in line for line in rows[7:])
    within = [row.split("|")[0].split()[1:] for row in (rows[0], rows[6])]
    assert within[0] == within[1], "within the window plain and window are the same model"
    assert (base / "model.safetensors").read_bytes() == before and not (base / "state").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--model", "nowhere"], "there is no model folder nowhere"),
    (["--data", "nowhere"], "nowhere holds no token shards"),
    (["--bucket", "7"], "columns of 7 tokens do not divide the 16 that"),
    (["--bucket", "32"], "columns of 32 tokens do not divide"),
    (["--factor", "1"], "reads no further than the 16 tokens"),
    (["--factor", "0.5"], "--factor 0.5 is out of range"),
    (["--factor", "nan"], "--factor"),
    (["--factor", "10000"], "pass a smaller --passages or --factor"),
    (["--passages", "100000"], "pass a smaller --passages or --factor"),
    (["--seeds", "0"], "--seeds 0 is out of range"),
])
def test_a_mistake_ends_in_one_line(monkeypatch, capsys, base, shards, arguments, words):
    code, _, errors = in_process(monkeypatch, capsys, extend.main, "--model", base, "--data", shards,
                                 "--device", "cpu", *arguments)
    assert code == 2 and words in errors and errors.count("\n") == 1, errors


def test_another_tokenizer_and_a_second_extension_are_refused(monkeypatch, capsys, base, shards, tmp_path):
    tokenizer = Tokenizer.load(shards / "tokenizer.json")
    model, _ = load_model(base)
    save_model(model, None, tmp_path / "other")
    save_model(extend.with_config(model, extended(model.config, "yarn", 2.0)), tokenizer, tmp_path / "long")
    for folder, words in (("other", "are not of the tokenizer"), ("long", "extended already, by yarn")):
        code, _, errors = in_process(monkeypatch, capsys, extend.main, "--model", tmp_path / folder,
                                     "--data", shards)
        assert code == 2 and words in errors and errors.count("\n") == 1, errors


# ---- train.py --rope_scaling -------------------------------------------------------------------------------


RUN = ["--batch_size", 2, "--steps", 2, "--precision", "fp32", "--device", "cpu", "--sample_prompts", "d"]


@pytest.mark.parametrize("rule", ["linear", "ntk", "dynamic", "yarn", "llama3"])
def test_a_trained_model_goes_on_at_a_longer_length(monkeypatch, capsys, base, shards, tmp_path, rule):
    code, _, errors = in_process(
        monkeypatch, capsys, train.main, "--data", shards, "--out", tmp_path, "--init_from", base,
        "--rope_scaling", rule, "--rope_factor", 4, "--seq_len", 64, *RUN, "--lr", "1e-12", "--adam_lr", 0)
    assert code == 0, errors
    (old, _), (new, _) = load_model(base), load_model(tmp_path)
    expected = extended(old.config, rule, 4.0)
    if rule == "linear":  # a folder has no place for the length it was trained at, which that rule ignores
        expected.rope_scaling["original_max_position_embeddings"] = 64
    assert new.config == expected, "the folder should say how it is to be read"
    for (name, p), q in zip(old.named_parameters(), new.parameters()):
        assert_close(p, q, rtol=0, atol=1e-9, msg=name)  # two steps of 1e-12
    settings = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    assert settings["rope_scaling"] == rule and settings["rope_factor"] == 4.0


def test_a_model_from_nothing_may_have_the_angles_of_an_extended_one():
    settings = train.Settings(preset="tiny", seq_len=64, max_seq_len=128, rope_scaling="yarn", rope_factor=4)
    planned = train.planned_config(settings, 280)
    assert planned.max_seq_len == 128, "the limit remains what --max_seq_len says"
    assert planned.rope_scaling == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    plain = train.planned_config(train.Settings(preset="tiny", seq_len=64, max_seq_len=32 * 4), 280)
    assert replace(planned, rope_scaling=None) == plain


@pytest.mark.parametrize("arguments, words", [
    (["--rope_factor", 4], "--rope_factor 4.0 needs --rope_scaling"),
    (["--rope_scaling", "yarn"], "--rope_scaling yarn needs --rope_factor"),
    (["--rope_scaling", "yarn", "--rope_factor", 0.5], "--rope_factor 0.5 is out of range"),
    (["--rope_scaling", "yarn", "--rope_factor", "inf"], "--rope_factor"),
    (["--rope_scaling", "longrope", "--rope_factor", 4], "--rope_scaling: 'longrope'"),
    (["--rope_scaling", "yarn", "--rope_factor", 2, "--seq_len", 64],
     "seq_len 64 exceeds max_seq_len 32 of {base}; pass a shorter --seq_len, or a larger --rope_factor"),
    (["--seq_len", 64], "seq_len 64 exceeds max_seq_len 16 of {base}; pass a shorter --seq_len, or --rope_"),
])
def test_flags_that_make_no_extension_end_in_one_line(monkeypatch, capsys, base, shards, tmp_path, arguments,
                                                      words):
    code, _, errors = in_process(monkeypatch, capsys, train.main, "--data", shards, "--out", tmp_path / "run",
                                 "--init_from", base, "--seq_len", 16, *RUN, *arguments)
    assert code == 2 and words.format(base=base) in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "run").exists()


def test_from_nothing_the_factor_must_divide_the_length():
    with pytest.raises(config.UserError, match="--rope_factor 3 does not divide max_seq_len 64"):
        train.Settings(preset="tiny", seq_len=64, rope_scaling="ntk", rope_factor=3)


def test_a_dry_run_counts_with_the_extended_model(base):
    settings = train.Settings(init_from=str(base), seq_len=64, rope_scaling="ntk", rope_factor=4)
    assert train.planned_config(settings).max_seq_len == 64
