"""mixture.py: which window of which source comes when, how often each is seen, and what a file may say."""
import hashlib
import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

import mixture
import train
from batches import Batches
from config import UserError
from mixture import open_mixture, parse_phase, shares, turns
from support import in_process, random_model

SIZES = {"general": 900, "code": 300, "old": 100}  # tokens, of windows of 10: 90, 30 and 10 of them


def write_shards(folder, tokens, first=0, tokenizer="same"):
    """Shards of the tokens first, first + 1, …: a token says where it comes from."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"dtype": "uint16", "vocab_size": 10_000, "end_of_text": 9999, "tokenizer": tokenizer}
    for split in ("train", "val"):
        content = (first + np.arange(tokens + 1)).astype("<u2").tobytes()
        (folder / f"{split}.bin").write_bytes(content)
        meta[split] = {"tokens": tokens + 1, "bytes": len(content), "text_bytes": 3 * tokens, "documents": 1,
                       "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def write_sources(folder):
    """Three sources whose tokens begin at 0, 2000 and 4000."""
    return {name: str(write_shards(folder / name, size, 2000 * i))
            for i, (name, size) in enumerate(SIZES.items())}


def write_mix(folder, phases, **more):
    content = {"sources": write_sources(folder), "phases": phases} | more
    (folder / "mix.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "mix.json"


def opened(path, windows=400, batch_size=4, **place):
    return open_mixture(path, batch_size, 10, windows, **place)


def row(batches, windows):
    """(source, window) of the first `windows` places of the row, from the tokens that are served."""
    starts = torch.cat([batches.at(step)[0][:, 0] for step in range(windows // batches.batch_size)])
    return [(start // 2000, start % 2000 // 10) for start in starts.tolist()]


# ---- taking turns ------------------------------------------------------------------------------------------


def test_whose_turn_it_is_by_hand():
    half, fifth = Fraction(1, 2), Fraction(1, 5)
    weights = (1 - half - fifth, half, fifth)
    # The last: floor(n / 5). Of what it leaves the middle one has 1/2 of 4/5, 5/8: floor(5/8 (n - that)).
    assert [turns(n, weights) for n in range(7)] == [
        [0, 0, 0], [1, 0, 0], [1, 1, 0], [2, 1, 0], [2, 2, 0], [2, 2, 1], [2, 3, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_each_window_is_one_sources_and_every_share_is_kept_at_every_moment(seed):
    rng = random.Random(seed)
    parts = [rng.choice([0, 1, 2, 50]) for _ in range(rng.randint(1, 6))] + [1]
    weights = [Fraction(part, sum(parts)) for part in parts]
    before = [0] * len(parts)
    for n in range(1, 500):
        now = turns(n, weights)
        assert sorted(b - a for a, b in zip(before, now)) == [0] * (len(parts) - 1) + [1]
        assert all(abs(count - n * weight) < len(parts) for count, weight in zip(now, weights))
        before = now
    assert all(count == 0 for count, weight in zip(before, weights) if not weight)


PHASES = [{"share": 0.6, "weights": {"general": 1}}, {"share": 0.3, "weights": {"code": 0.95, "old": 0.05}},
          {"share": 0.1, "weights": {"old": 0.05}, "temperature": 2}]


def test_phases_come_in_order_with_their_shares(tmp_path):
    seen = [source for source, _ in row(opened(write_mix(tmp_path, PHASES)), 400)]
    assert seen[:240] == [0] * 240
    assert (seen[240:360].count(1), seen[240:360].count(2)) == (114, 6), "5 % of 120"
    # sqrt(901) : sqrt(301) is 1.7301 : 1, of the 95 % of 40 windows that old text leaves
    assert seen[360:].count(2) == 2 and seen[360:].count(0) == math.ceil(38 * 1.7301 / 2.7301)


def test_no_window_comes_twice_in_an_epoch_of_its_source_and_none_is_left_out(tmp_path):
    seen = row(opened(write_mix(tmp_path, PHASES), 1200), 1200)
    for source, size in enumerate(SIZES.values()):
        windows, epoch = [window for s, window in seen if s == source], size // 10
        assert len(windows) > epoch, "the test should see the end of an epoch"
        for start in range(0, len(windows) - epoch, epoch):
            assert sorted(windows[start:start + epoch]) == list(range(epoch))
        assert windows[:epoch] != windows[epoch:2 * epoch], "each epoch has an order of its own"


def test_a_batch_is_a_function_of_seed_and_step_whatever_came_before(tmp_path):
    path = write_mix(tmp_path, PHASES)
    in_sequence = [opened(path).at(step)[0] for step in range(100)]
    resumed = opened(path)
    for step in random.Random(0).sample(range(100), 100):
        assert torch.equal(resumed.at(step)[0], in_sequence[step])
    assert not torch.equal(opened(path, seed=1).at(0)[0], in_sequence[0])


def test_ranks_together_see_what_one_alone_sees(tmp_path):
    path = write_mix(tmp_path, PHASES)
    alone = opened(path, batch_size=8)
    ranks = [opened(path, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    for step in range(60):                                   # past the end of the last phase, too
        for part in range(2):
            assert torch.equal(alone.at(step)[part], torch.cat([rank.at(step)[part] for rank in ranks]))


def test_phases_by_tokens_end_where_they_say_and_the_last_goes_on(tmp_path):
    phases = [{"tokens": 1000, "weights": {"general": 1}}, {"tokens": 95, "weights": {"old": 1}}]
    mixed = opened(write_mix(tmp_path, phases))
    assert [source for source, _ in row(mixed, 400)] == [0] * 100 + [2] * 300
    assert "phases end after 1,100 tokens" in mixture.warnings(mixed, 400)[-1]
    assert [mixed.seen(n) for n in (0, 100, 103)] == [[0, 0, 0], [100, 0, 0], [100, 0, 3]]


def test_a_bigram_start_counts_the_source_that_is_seen_most_not_one_that_is_only_held_out(tmp_path):
    mixed = opened(write_mix(tmp_path, [{"weights": {"general": 0, "code": 0.6, "old": 0.4}}]))
    assert mixed.data is mixed.sources[1].data and mixed.meta is mixed.sources[0].meta
    assert mixed.seen(400)[0] == 0 and mixed.tokens == sum(SIZES.values()) + 3


# ---- shares ------------------------------------------------------------------------------------------------


def test_a_temperature_of_1_goes_by_size_and_a_large_one_gives_each_as_much():
    assert shares({"temperature": 1}, {"a": 900, "b": 100}) == (Fraction(9, 10), Fraction(1, 10))
    assert shares({"temperature": 2}, {"a": 900, "b": 100}) == (Fraction(3, 4), Fraction(1, 4)), "30 : 10"
    assert shares({"temperature": 1e6}, {"a": 900, "b": 100})[1] == pytest.approx(0.5, abs=1e-5)
    assert shares({"temperature": 0.01}, {"a": 900, "b": 100})[1] == pytest.approx(0, abs=1e-5), "no overflow"
    assert shares({}, {"a": 900, "b": 100}) == shares({"temperature": 1}, {"a": 900, "b": 100})


def test_weights_go_first_and_the_temperature_has_the_rest():
    phase = {"weights": {"c": 0.05, "d": 0}, "temperature": 2}
    assert shares(phase, {"a": 900, "b": 100, "c": 5, "d": 70}) == (
        Fraction(95, 100) * 3 / 4, Fraction(95, 100) / 4, Fraction(5, 100), 0)


@pytest.mark.parametrize("phase, complaint", [
    ({"weights": {"a": 0.7, "b": 0.2}}, r"sum to 0\.9, not 1; in these proportions: a 0\.7778, b 0\.2222"),
    ({"weights": {"a": 0.7, "b": 0.4}}, r"sum to 1\.1, not 1"),
    ({"weights": {"a": 0, "b": 0}}, "sum to 0, not 1"),
    ({"weights": {"a": 0.7, "maths": 0.3}}, "'maths' is none of the sources a, b"),
    ({"weights": {"a": 1.5, "b": -0.5}}, "weight 1.5 of a is out of range"),
    ({"weights": {"a": "all"}}, "weight 'all' of a"), ({"temperature": 0}, "temperature 0 is out of range"),
    ({"temperature": 1e-320}, "temperature 1e-320 is out of range"),
    ({"weights": {"a": 0.6, "b": 0.2}, "temperature": 1}, "sum to 0.8, not 1")])
def test_shares_that_make_no_sense_are_refused(phase, complaint):
    with pytest.raises(UserError, match=complaint):
        shares(phase, {"a": 900, "b": 100})


@pytest.mark.parametrize("content, complaint", [
    ("{", "not JSON"), ("[]", "one object"), ('{"sources": {}, "phases": [{}]}', "names no source"),
    ('{"sources": {"a": "x"}}', "has no phase"),
    ('{"sources": {"a": "x"}, "phases": [{"wieght": 1}]}', "unknown key 'wieght'"),
    ('{"sources": {"a": "x"}, "phases": [{"share": "half"}]}', "'half' is not a number"),
    ('{"sources": {"a": "x"}, "phases": [{"order": "sorted"}]}', "one of random, easy_first"),
    ('{"sources": {"a": "x"}, "phases": [{"share": Infinity}]}', "share inf is not a number"),
    ('{"sources": {"a": "x"}, "phases": [{}], "difficulty": []}', "not what --score writes"),
    ('{"sources": {"a": "x"}, "phases": [{}], "difficulty": {"files": {"a": {}}}}', "not what --score"),
    ('{"sources": {"a": "x"}, "phases": [{}], "more": 1}', "one object"),
    ('{"sources": {"a": "nowhere"}, "phases": [{}]}', "nowhere holds no token shards")])
def test_a_file_that_makes_no_sense_is_one_line(tmp_path, content, complaint):
    (tmp_path / "mix.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=complaint) as error:
        opened(tmp_path / "mix.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("phases, complaint", [
    ([{"share": 0.5}, {"share": 0.4}], r"0\.5, 0\.4 sum to 0\.9"), ([{"share": 0.5}, {}], "needs a length"),
    ([{"share": 0.5}, {"tokens": 9}], "needs a length"), ([{"share": 0, "tokens": 1}], "needs a length"),
    ([{"share": 1.2}, {"share": -0.2}], "share -0.2 is out of range"),
    ([{"tokens": 0}], "tokens 0 is out of range")])
def test_phases_without_a_sound_length_are_refused(tmp_path, phases, complaint):
    with pytest.raises(UserError, match=complaint):
        opened(write_mix(tmp_path, phases))


def test_sources_of_different_tokenizers_are_refused(tmp_path):
    path = write_mix(tmp_path, PHASES)
    write_shards(tmp_path / "code", 300, 2000, tokenizer="another")
    with pytest.raises(UserError, match=r"code and .*old were .* python data\.py --tokenizer .*old$"):
        opened(path)


# ---- the picture, and epochs -------------------------------------------------------------------------------


def test_epochs_are_counted_and_over_four_are_warned_of(tmp_path):
    path = write_mix(tmp_path, [{"weights": {"general": 0.86, "code": 0.04, "old": 0.1}}])
    mixed = opened(path)
    assert mixed.seen(400) == [344, 16, 40], "40 of 10 windows: four times"
    assert mixture.warnings(mixed, 400) == []
    (line,) = mixture.warnings(opened(path, 410), 410)
    assert line.startswith("warning: old is seen 4.1 times; over 4")


def test_the_picture_has_a_line_a_source(tmp_path):
    phases = [{"name": "stable"} | PHASES[0],
              {"name": "anneal", "share": 0.4, "weights": {"old": 0.25, "code": 0.75}}]
    lines = mixture.picture(opened(write_mix(tmp_path, phases)), 400, columns=20).split("\n")
    assert lines[0].startswith("        |stable     |anneal")
    assert lines[1] == "general " + "█" * 12 + " " * 8 + f"{2400:>15,}{240 / 90:>9.2f}"
    assert lines[2].startswith("code    " + " " * 12 + "▇" * 8) and lines[3][8:28] == " " * 12 + "▃" * 8


# ---- difficulty --------------------------------------------------------------------------------------------


def scored(tmp_path, order, values=None):
    path = write_mix(tmp_path, [{"share": 0.5, "weights": {"old": 1}},
                                {"share": 0.25, "weights": {"code": 1}, "order": order},
                                {"share": 0.25, "weights": {"old": 1}}])
    values = np.random.default_rng(0).permutation(30).astype("<f4") if values is None else values
    (tmp_path / "code.f32").write_bytes(values.tobytes())
    content = json.loads(path.read_text(encoding="utf-8"))
    shard = json.loads((tmp_path / "code" / "meta.json").read_text(encoding="utf-8"))["train"]["sha256"]
    content["difficulty"] = {"model": "runs/base", "seq_len": 10, "files": {"code": {
        "file": "code.f32", "sha256": hashlib.sha256(values.tobytes()).hexdigest(), "shard": shard}}}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path, values


@pytest.mark.parametrize("order, sign", [("easy_first", 1), ("hard_first", -1)])
def test_a_phase_in_order_has_the_same_windows_sorted_within_each_epoch(tmp_path, order, sign):
    path, values = scored(tmp_path, order)
    ordered = row(opened(path, 200), 200)
    path, _ = scored(tmp_path, "random")
    plain = row(opened(path, 200), 200)
    assert ordered[:100] == plain[:100] and ordered[150:] == plain[150:]
    windows, as_drawn = ([window for _, window in found[100:150]] for found in (ordered, plain))
    for part in (slice(0, 30), slice(30, 50)):               # one epoch of 30 windows, and 20 of the next
        assert sorted(windows[part]) == sorted(as_drawn[part])
        difficulty = sign * values[windows[part]]
        assert (np.diff(difficulty) > 0).all()


def test_scores_that_are_missing_or_of_other_text_are_refused(tmp_path):
    phases = [{"share": 1, "order": "easy_first"}]
    with pytest.raises(UserError, match="score them: python mixture.py --mix .* --seq_len 10"):
        opened(write_mix(tmp_path, phases))
    path, values = scored(tmp_path, "easy_first")
    (tmp_path / "code.f32").write_bytes(values[:-1].tobytes())
    with pytest.raises(UserError, match=r"code\.f32 is not the loss of code's windows as they are now"):
        opened(path)
    path, _ = scored(tmp_path, "easy_first", values[:29])
    with pytest.raises(UserError, match=r"code\.f32 is not the loss"):
        opened(path)


def test_scores_are_the_mean_loss_of_each_window(tmp_path):
    source = write_shards(tmp_path / "a", 104)
    model = random_model(vocab_size=10_000)
    batches = Batches(source, "train", 4, 10)
    values = mixture.losses(model, batches, "a")
    assert values.shape == (11,)
    for window in (0, 10):                                   # the last has 4 tokens of 10
        inputs, targets = (part[window % 4:window % 4 + 1] for part in batches.in_order(window // 4))
        with torch.no_grad():
            loss, count = train.next_token_loss(model, (inputs, targets))
        # float32, sums in another order
        assert values[window] == pytest.approx(loss.item() / count.item(), rel=1e-5)


# ---- as a command, and in train.py -------------------------------------------------------------------------


def test_phases_in_words():
    assert parse_phase("80% general") == {"name": "80% general", "share": 0.8, "weights": {"general": 1.0}}
    assert parse_phase("2e6 code old:0.05 hard_first") == {
        "name": "2e6 code old:0.05 hard_first", "tokens": 2_000_000, "weights": {"old": 0.05, "code": 0.95},
        "order": "hard_first"}
    assert parse_phase("33.5% temperature:2 old:0.1")["temperature"] == 2
    for text in ("general", "80% a b", "80% a:x", "80% a temperature:1", "1e999 a"):
        with pytest.raises(UserError, match="--phases"):
            parse_phase(text)


def test_the_command_writes_and_draws_a_mixture_or_says_in_a_line_why_not(tmp_path, monkeypatch, capsys):
    sources = [f"{name}={folder}" for name, folder in write_sources(tmp_path).items()]
    out = tmp_path / "mix.json"
    command = ["--sources", *sources, "--out", out, "--seq_len", 10, "--tokens", 4000, "--phases"]
    phases = ["80% general", "20% old general:0.5"]
    code, text, _ = in_process(monkeypatch, capsys, mixture.main, *command, *phases)
    assert code == 0 and "warning" not in text and "general ███" in text
    assert [source for source, _ in row(opened(out), 400)][318:324] == [0, 0, 0, 2, 0, 2]
    assert in_process(monkeypatch, capsys, mixture.main, "--mix", out, "--seq_len", 10)[0] == 0
    code, _, errors = in_process(monkeypatch, capsys, mixture.main, "--mix", out, "--phases", "100% old")
    assert code == 2 and "--phases '100% old' is of a mixture that is written" in errors
    for bad, complaint in ((["100% poems"], "'poems' is none of"), (["50% old"], "sum to 0.5"),
                           (["100% old:0.5"], "sum to 0.5, not 1"), (["100% old", "--out", out], "exists")):
        target = ["--out", tmp_path / "other.json"] if complaint != "exists" else []
        code, _, errors = in_process(monkeypatch, capsys, mixture.main, *command, *bad, *target)
        assert code == 2 and complaint in errors and errors.count("\n") == 1
    assert not (tmp_path / "other.json").exists(), "a mixture that makes no sense is not written"


def small_run(tmp_path, **settings):
    return train.Settings(**dict(
        data=str(tmp_path / "mix.json"), out=str(tmp_path / "run"), preset="tiny", seq_len=10, dim=16,
        n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=16, batch_size=4, steps=12, bigram_steps=0, save_every=5,
        device="cpu", precision="fp32") | settings)


def train_on(settings):
    env = train.setup(settings)
    batches, validation = train.open_data(settings, env)
    torch.manual_seed(0)
    model = train.Transformer(train.planned_config(settings))
    loss = train.next_token_loss
    return train.train(model, batches, loss, settings, env, None, validation, batches.identity)


def test_training_takes_a_mixture_and_refuses_to_go_on_with_another(tmp_path, capsys):
    write_mix(tmp_path, PHASES)
    last = train_on(small_run(tmp_path))
    assert {"val_bits_per_byte", "code_val_bits_per_byte", "old_val_bits_per_byte"} <= last.keys()
    assert "epochs" in capsys.readouterr().out, "the mixture is drawn at the start"
    write_mix(tmp_path, [{"weights": {"general": 0.5, "old": 0.5}}])
    with pytest.raises(UserError, match="holds a run with mixture"):
        train_on(small_run(tmp_path))


def test_a_mixture_and_a_replay_do_not_go_together():
    with pytest.raises(UserError, match="a mixture names its old text itself"):
        train.Settings(data="mix.json", replay="runs/data", init_from="runs/base")
