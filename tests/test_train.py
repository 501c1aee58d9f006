"""train.py, parallel.py: the loop is exact (accumulation, processes), survives kills bit for bit, and says
what is wrong.
"""
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import config
import data
import objectives
import support
import survive
import train
from config import UserError
from model import ModelConfig, Transformer
from parallel import Env
from survive import LossScale

ROOT = Path(__file__).resolve().parent.parent
CPU = Env(torch.device("cpu"))
SMALL = ["--preset", "tiny", "--dim", "32", "--seq_len", "32", "--batch_size", "4", "--steps", "12",
         "--sample_prompts", "def ", "--precision", "fp32"]


def settings_for(tmp_path, **changes):
    given = {"preset": "tiny", "dim": 32, "seq_len": 32, "batch_size": 4, "steps": 12,
             "out": str(tmp_path / "run"), "compile": False, **changes}
    return train.Settings(**given)


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2,
                                       "qk_norm": True, **changes}))
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)  # a zero head would pass no gradient to the blocks
    return model


def random_batch(rows, seed=0, seq_len=16, vocab_size=50, share_without_target=0.3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (rows, seq_len + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < share_without_target] = -100
    return ids[:, :-1].contiguous(), targets


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder of shards from a small made-up text, in a path with a space and Chinese characters."""
    folder = tmp_path_factory.mktemp("有 空格")
    rng = random.Random(0)
    words = ["def", "class", "return", "self", "value", "import", "数据", "for", "in", "range", "print",
             "if", "else"]
    for number in range(40):
        lines = [" ".join(rng.choices(words, k=8)) for _ in range(40)]
        (folder / f"text {number}.txt").write_text("\n".join(lines), encoding="utf-8")
    out = folder / "shards"
    data.prepare(data.Settings(input=(str(folder),), out=str(out), vocab_size=290, val_fraction=0.1,
                               workers=1))
    return out


def flags(shards, out, arguments):
    return ["--data", str(shards), "--out", str(out), *arguments]


def run_train(shards, out, *arguments, processes=1, check=True, **options):
    """train.py as a user runs it; the finished process, with its output."""
    command, environment = support.program("train.py", flags(shards, out, arguments), processes)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment,
                          timeout=300, **options)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def run_warm(shards, out, *arguments, processes=1):
    """train.py in processes that need not import torch; its log."""
    return support.run_stage("train.py", flags(shards, out, arguments), processes)


def in_process(monkeypatch, capsys, shards, out, *arguments):
    """Exit code and error output of train.py, without the seconds that a new process costs."""
    code, _, errors = support.in_process(monkeypatch, capsys, train.main, *flags(shards, out, arguments))
    return code, errors


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def digest(out):
    return hashlib.sha256((Path(out) / "model.safetensors").read_bytes()).hexdigest()


# ---- the loss ----------------------------------------------------------------------------------------------


def test_the_loss_is_a_sum_over_the_targets_that_count_and_their_number():
    model, (inputs, targets) = small_model(), random_batch(3)
    loss_sum, count = train.next_token_loss(model, (inputs, targets))
    logps = model(inputs).log_softmax(dim=-1)
    by_hand = sum(-logps[b, t, targets[b, t]] for b in range(3) for t in range(16) if targets[b, t] != -100)
    assert count == (targets != -100).sum()
    assert loss_sum.item() == pytest.approx(by_hand.item(), rel=1e-5), "float32 sums in another order"


# 700 rows are taken in several parts, the last one ragged
@pytest.mark.parametrize("rows, vocab_size", [(1, 7), (50, 33), (700, 4096)])
def test_the_loss_that_holds_no_logits_equals_the_plain_one_and_so_do_its_gradients(rows, vocab_size):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab_size, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    targets[rows // 3:rows // 2] = -100
    plain = F.cross_entropy((hidden @ weight.T), targets, ignore_index=-100, reduction="sum")
    ours = objectives.linear_cross_entropy(hidden, weight, targets)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-12)
    expected = torch.autograd.grad(plain * 3, (hidden, weight))
    for gradient, right in zip(torch.autograd.grad(ours * 3, (hidden, weight)), expected):
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-12)  # float64


def test_large_logits_give_no_infinity():
    hidden, weight = torch.tensor([[100.0], [100.0]]), torch.tensor([[3.0], [1.0], [-1.0]])  # logits 300, …
    loss = objectives.linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(0 + 200), "exp(300) is infinite in float32"


@pytest.mark.parametrize("chunked", [True, False])
def test_passing_over_tokens_without_loss_changes_neither_the_loss_nor_a_gradient(chunked):
    inputs, targets = random_batch(3)
    targets[0, :9] = targets[2] = -100
    results = []
    for sparse in (False, True):
        model = small_model()
        loss_sum, count = train.next_token_loss(model, (inputs, targets), chunked, sparse)
        loss_sum.backward()
        results.append((loss_sum, count, *(p.grad for p in model.parameters())))
    for dense, passed_over in zip(*results, strict=True):
        torch.testing.assert_close(dense, passed_over, rtol=1e-5, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("sparse", [False, True])
def test_a_micro_batch_without_any_target_adds_exactly_nothing(sparse):
    model, (inputs, targets) = small_model(), random_batch(2)
    loss_sum, count = train.next_token_loss(model, (inputs, torch.full_like(targets, -100)), sparse=sparse)
    loss_sum.backward()
    assert loss_sum.item() == 0.0 and count == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


# ---- one update --------------------------------------------------------------------------------------------


def weights_after_update(micro_batches, settings, optimizer="adamw"):
    model = small_model()
    report = train.update(model, train.make_optimizer(model, settings), micro_batches, train.next_token_loss,
                          settings, CPU, 0.01)
    return model, report


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulating_micro_batches_equals_one_batch_although_their_targets_differ_in_number(tmp_path, parts):
    inputs, targets = random_batch(8)
    targets[0] = -100  # with 8 parts, one micro-batch without any target
    targets[3, :14] = -100
    settings = settings_for(tmp_path, optimizer="adamw", clip=0.0)
    model, whole = weights_after_update([(inputs, targets)], settings)
    other, summed = weights_after_update(list(zip(inputs.chunk(parts), targets.chunk(parts))), settings)
    assert summed["targets"] == whole["targets"]
    assert summed["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert summed["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5), \
        "is the mean taken of each micro-batch instead of over all?"


def test_the_gradient_norm_is_global_and_clipped_once_after_accumulation(tmp_path, monkeypatch):
    inputs, targets = random_batch(4)
    settings = settings_for(tmp_path, clip=0.01)
    model = small_model()
    loss_sum, count = train.next_token_loss(model, (inputs, targets))
    (loss_sum / count).backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    model = small_model()
    optimizer = train.make_optimizer(model, settings)
    seen = {}
    monkeypatch.setattr(optimizer, "step", lambda: seen.update(
        norm=math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))))
    report = train.update(model, optimizer, list(zip(inputs.chunk(2), targets.chunk(2))),
                          train.next_token_loss, settings, CPU, 0.01)
    assert report["grad_norm"] == pytest.approx(norm, rel=1e-5)
    # clip_grad_norm_ adds 1e-6 to the norm it divides by
    assert seen["norm"] == pytest.approx(0.01, rel=1e-4), "clipped twice, or before all was added up?"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_any_weight_is_touched(tmp_path, bad):
    model, settings = small_model(), settings_for(tmp_path)
    optimizer = train.make_optimizer(model, settings)
    before = {name: p.clone() for name, p in model.named_parameters()}

    def broken(model, batch):
        loss_sum, count = train.next_token_loss(model, batch)
        return loss_sum * bad, count

    with pytest.raises(UserError, match="not finite.*no weight was touched"):
        train.update(model, optimizer, [random_batch(2), random_batch(2, seed=1)], broken, settings, CPU,
                     0.01)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not optimizer.state, "the moments were touched"


def test_with_a_loss_scale_an_overflow_skips_the_step_and_lowers_the_scale(tmp_path):
    model, settings = small_model(), settings_for(tmp_path)
    optimizer = train.make_optimizer(model, settings)
    scaler = LossScale(2.0 ** 16)
    before = {name: p.clone() for name, p in model.named_parameters()}

    def overflow(model, batch):
        return train.next_token_loss(model, batch)[0] * 1e34, torch.tensor(32)  # finite, but not its gradient

    report = train.update(model, optimizer, [random_batch(2)], overflow, settings, CPU, 0.01, scaler)
    assert report["skipped"] and scaler.scale == 2.0 ** 15
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_loss_scale_changes_neither_norm_nor_update(tmp_path):
    settings = settings_for(tmp_path)
    plain, scaled = small_model(), small_model()
    reports = []
    for model, scaler in ((plain, None), (scaled, LossScale(1024.0))):
        optimizer = train.make_optimizer(model, settings)
        reports.append(train.update(model, optimizer, [random_batch(2), random_batch(2, 1)],
                                    train.next_token_loss, settings, CPU, 0.01, scaler))
    assert reports[0]["grad_norm"] == pytest.approx(reports[1]["grad_norm"], rel=1e-6), \
        "clipped before unscaling?"
    for p, q in zip(plain.parameters(), scaled.parameters()):  # a scale of 2^10 changes no float32 mantissa
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


# ---- evaluation --------------------------------------------------------------------------------------------


def test_evaluation_counts_every_target_once_and_leaves_random_state_and_mode_alone(shards):
    vocab_size = json.loads((shards / "meta.json").read_text(encoding="utf-8"))["vocab_size"]
    model = small_model(vocab_size=vocab_size).train()
    batches = data.Batches(shards, "val", 3, 32)
    random_state = torch.get_rng_state()
    result = train.evaluate(model, batches, train.next_token_loss, CPU)
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    ids = torch.from_numpy(batches.data.astype("int64"))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = ids[start:start + 33]
            total += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    assert result["tokens"] == len(ids) - 1
    assert result["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / batches.text_bytes, rel=1e-5)


# ---- initialisation ----------------------------------------------------------------------------------------


def test_the_bigram_start_finds_the_entropy_of_the_next_token_given_the_current_one():
    vocab_size, generator = 24, torch.Generator().manual_seed(0)
    table = torch.randn(vocab_size, vocab_size, generator=generator).mul(2).softmax(dim=1)
    ids = [0]
    for _ in range(20000):
        ids.append(int(torch.multinomial(table[ids[-1]], 1, generator=generator)))
    counts = torch.zeros(vocab_size, vocab_size)
    for a, b in zip(ids, ids[1:]):
        counts[a, b] += 1
    p = counts / counts.sum(dim=1, keepdim=True)
    entropy = -(counts * p.clamp(min=1e-9).log()).sum().item() / 20000
    model = Transformer(ModelConfig(vocab_size=vocab_size, dim=64, n_layers=1, n_heads=2))
    untouched = {name: p.clone() for name, p in model.named_parameters()
                 if "layers" in name or "norm" in name}
    train.bigram_start(model, torch.tensor(ids).numpy(), steps=100)
    with torch.no_grad():
        loss = F.cross_entropy(model(torch.tensor([ids[:1000]]))[0], torch.tensor(ids[1:1001])).item()
        whole = sum(F.cross_entropy(model(torch.tensor([ids[i:i + 1001][:-1]]))[0],
                                    torch.tensor(ids[i + 1:i + 1001])).item()
                    for i in range(0, 20000, 1000)) / 20
    assert math.isfinite(loss)
    assert entropy <= whole < 1.02 * entropy, \
        "2 %: a hundred steps of Adam come that close to the optimum of this size"
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in untouched.items())


# ---- the loop, by any stage --------------------------------------------------------------------------------


@dataclass
class FixedBatches:
    """What another stage would pass: any object with .at(step)."""
    count: int = 3

    def at(self, step):
        return random_batch(4, seed=step % self.count)


def test_the_loop_overfits_three_batches(tmp_path):
    settings = settings_for(tmp_path, steps=60, lr=0.02, adam_lr=1e-2)
    train.train(small_model(), FixedBatches(), train.next_token_loss, settings, CPU)
    losses = [line["loss_nats_per_token"] for line in log_of(settings.out)]
    assert losses[0] > 3.5 and losses[-1] < 0.5 * losses[0], \
        "48 random windows of 16 tokens can be learnt by heart"


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_stopping_and_going_on_equals_never_stopping_bit_for_bit(tmp_path, optimizer):
    class StopAt(FixedBatches):
        def at(self, step):
            if step == 7 and not (tmp_path / "stopped").exists():
                (tmp_path / "stopped").touch()
                raise KeyboardInterrupt
            return super().at(step)

    whole = settings_for(tmp_path, out=str(tmp_path / "whole"), save_every=5, optimizer=optimizer)
    expected = small_model()
    train.train(expected, FixedBatches(), train.next_token_loss, whole, CPU)
    parts = settings_for(tmp_path, out=str(tmp_path / "parts"), save_every=5, optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        train.train(small_model(), StopAt(), train.next_token_loss, parts, CPU)
    assert len(log_of(parts.out)) == 7, "the log is ahead of the state here: lines 6 and 7 must be taken back"
    resumed = small_model(seed=5)  # its own weights must not matter
    train.train(resumed, StopAt(), train.next_token_loss, parts, CPU)
    assert digest(parts.out) == digest(whole.out)
    kept = ("step", "loss_nats_per_token", "lr", "grad_norm")
    assert [[line[key] for key in kept] for line in log_of(parts.out)] == \
        [[line[key] for key in kept] for line in log_of(whole.out)]
    states = sorted(path.name for path in Path(parts.out, "state").iterdir())
    assert len(states) == 2, "the last two states are kept"
    for group in ("model.safetensors", "optimizer.safetensors"):
        assert Path(parts.out, "state", states[-1], group).read_bytes() == \
            Path(whole.out, "state", states[-1], group).read_bytes()


def test_a_run_that_ends_in_an_error_leaves_no_thread_behind_that_writes(tmp_path, monkeypatch):
    class Broken(FixedBatches):
        def at(self, step):
            if step == 5:
                raise KeyboardInterrupt
            return super().at(step)

    def slowly(*args, whole=survive.save_state, **options):
        time.sleep(0.3)  # far longer than the steps that follow the save
        whole(*args, **options)

    monkeypatch.setattr(survive, "save_state", slowly)
    settings = settings_for(tmp_path, save_every=5)
    with pytest.raises(KeyboardInterrupt):
        train.train(small_model(), Broken(), train.next_token_loss, settings, CPU)
    before = sorted(Path(settings.out, "state").rglob("*"))
    assert Path(settings.out, "state", "step_00000005") in before, "the save that had begun was not finished"
    time.sleep(0.5)
    assert sorted(Path(settings.out, "state").rglob("*")) == before


def test_a_tied_model_is_still_tied_after_going_on(tmp_path):
    settings = settings_for(tmp_path, tie_embeddings=True)
    train.train(small_model(tie_embeddings=True), FixedBatches(), train.next_token_loss, settings, CPU)
    model = small_model(seed=1, tie_embeddings=True)
    train.train(model, FixedBatches(), train.next_token_loss, settings, CPU)  # only loads the last state
    assert model.lm_head.weight is model.model.embed_tokens.weight
    header = (Path(settings.out) / "model.safetensors").read_bytes()[:4096]
    assert b"embed_tokens" in header and b"lm_head" not in header


def test_a_damaged_last_state_is_told_and_the_one_before_it_used(tmp_path, capsys):
    settings = settings_for(tmp_path, save_every=5)
    train.train(small_model(), FixedBatches(), train.next_token_loss, settings, CPU)
    expected = digest(settings.out)
    newest = sorted(Path(settings.out, "state").iterdir())[-1] / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    train.train(small_model(), FixedBatches(), train.next_token_loss, settings, CPU)
    assert "optimizer.safetensors" in capsys.readouterr().out
    assert digest(settings.out) == expected
    assert [line["step"] for line in log_of(settings.out)] == list(range(1, 13))


def test_other_settings_do_not_go_on_with_a_run(tmp_path):
    settings = settings_for(tmp_path)
    train.train(small_model(), FixedBatches(), train.next_token_loss, settings, CPU)
    other = settings_for(tmp_path, lr=0.5)
    with pytest.raises(UserError, match=r"run with lr 0\.02, not 0\.5.*--overwrite"):
        train.train(small_model(), FixedBatches(), train.next_token_loss, other, CPU)


# ---- the program -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(shards, tmp_path_factory):
    """A whole run of train.py: (its output, its folder)."""
    out = tmp_path_factory.mktemp("run") / "基 base"
    return run_train(shards, out, *SMALL, "--save_every", "4").stdout, out


def test_the_last_lines_say_where_the_model_is_and_its_bits_per_byte(finished):
    lines = finished[0].strip().splitlines()
    assert lines[-1].split(maxsplit=1)[1].startswith("bits per byte on")
    assert 0 < float(lines[-1].split()[0]) < 8
    assert "xz -9e" in lines[-2] and lines[-3] == f"model: {finished[1]}"
    logged = log_of(finished[1])[-1]["val_bits_per_byte"]
    assert float(lines[-1].split()[0]) == pytest.approx(logged, abs=1e-4), "printed with four digits"


def test_the_log_has_one_line_a_step_with_units_in_its_names(finished):
    lines = log_of(finished[1])
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {"loss_nats_per_token", "bits_per_byte", "lr", "grad_norm", "tokens_per_second",
            "seconds"} <= lines[0].keys()


def test_transformers_opens_the_folder_with_equal_logits_and_ids(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from checkpoint import load_model
    theirs, their_tokenizer = (kind.from_pretrained(finished[1])
                               for kind in (AutoModelForCausalLM, AutoTokenizer))
    ours, tokenizer = load_model(finished[1])
    text = "def value in 数据:\n    return self"
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        # the bound, in float32
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-5)


def test_a_finished_run_says_so_again_and_changes_nothing(monkeypatch, capsys, finished, shards):
    before, log = digest(finished[1]), log_of(finished[1])
    again = flags(shards, finished[1], [*SMALL, "--save_every", "4"])
    code, again, errors = support.in_process(monkeypatch, capsys, train.main, *again)
    assert code == 0, errors
    assert again.strip().splitlines()[-1] == finished[0].strip().splitlines()[-1]
    assert digest(finished[1]) == before and log_of(finished[1]) == log


def test_the_same_command_gives_the_same_bytes(finished, shards, tmp_path):
    run_train(shards, tmp_path / "twin", *SMALL, "--save_every", "4")
    assert digest(tmp_path / "twin") == digest(finished[1])


def stopped_and_started_again(shards, out, moments, how, arguments):
    """Run train.py, end it by signal `how` once each of `moments` steps is logged; then let it finish."""
    output = out.with_name("output")
    for moment in moments:
        output.unlink(missing_ok=True)
        [process] = support.start("train.py", flags(shards, out, arguments), output)
        log, deadline = out / "log.jsonl", time.time() + 120
        while process.is_alive() and time.time() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= moment:
                break
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(process.pid, how)
        process.join(timeout=120)
        said = support.said_in(output)
        assert process.exitcode in (0, -how, 128 + how), said[-2000:]
        if how != signal.SIGKILL and process.exitcode:
            assert "the same command goes on from there" in said and "Traceback" not in said
    run_warm(shards, out, *arguments)


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_stopped_run_ends_with_the_bytes_of_an_uninterrupted_one(finished, shards, tmp_path, how):
    if os.name == "nt":
        pytest.skip("Windows cannot send these signals to a process")
    how = getattr(signal, how)
    stopped_and_started_again(shards, tmp_path / "run", [3, 9], how, [*SMALL, "--save_every", "4"])
    assert digest(tmp_path / "run") == digest(finished[1])
    log = log_of(tmp_path / "run")
    assert [line["step"] for line in log] == list(range(1, 13)), "the log has a gap or a repeat"
    assert log[-1]["val_bits_per_byte"] == log_of(finished[1])[-1]["val_bits_per_byte"]


def test_a_run_on_a_mixture_that_is_killed_in_its_second_phase_ends_in_the_same_bytes(shards, tmp_path):
    mix = tmp_path / "mix.json"
    phases = [{"share": 0.5, "weights": {"one": 1}}, {"share": 0.5, "weights": {"one": 0.4, "two": 0.6}}]
    mix.write_text(json.dumps({"sources": {"one": str(shards), "two": str(shards)}, "phases": phases}),
                   encoding="utf-8")
    run_warm(mix, tmp_path / "whole", *SMALL, "--save_every", "4")
    stopped_and_started_again(mix, tmp_path / "run", [9], signal.SIGKILL, [*SMALL, "--save_every", "4"])
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.slow
def test_a_dozen_kills_inside_steps_and_saves_change_nothing(finished, shards, tmp_path):
    rng = random.Random(0)
    # most of the time goes into saving: most kills fall into it
    arguments = [*SMALL, "--steps", "60", "--save_every", "1"]
    run_train(shards, tmp_path / "whole", *arguments)
    moments = sorted(rng.randrange(1, 60) for _ in range(12))
    stopped_and_started_again(shards, tmp_path / "run", moments, signal.SIGKILL, arguments)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, 61))
    assert not list((tmp_path / "run" / "state").glob("*.tmp"))


def test_two_processes_give_the_losses_of_one(shards, tmp_path):
    # two epochs: each has a partial window
    arguments = [*SMALL, "--steps", "20", "--micro_batch_size", "2", "--seq_len", "500"]
    one = run_warm(shards, tmp_path / "one", *arguments)
    run_train(shards, tmp_path / "two", *arguments, processes=2)
    two = log_of(tmp_path / "two")
    assert len({line["targets"] for line in one}) > 1, "the shard's last, partial window should be among them"
    for a, b in zip(one, two, strict=True):
        assert a["targets"] == b["targets"]
        # the bound
        assert a["loss_nats_per_token"] == pytest.approx(b["loss_nats_per_token"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert one[-1]["val_bits_per_byte"] == pytest.approx(two[-1]["val_bits_per_byte"], rel=1e-4)


@pytest.mark.parametrize("layout", [["--data_parallel", "fsdp", "--no-reshard"], ["--tensor_parallel", "2"]])
def test_a_model_that_lies_in_parts_ends_in_the_same_model_folder(finished, shards, tmp_path, layout):
    import transformers
    # weights are gathered to evaluate, and then to be saved
    evaluating = ["--eval_every", "4", "--save_every", "4"]
    done = run_train(shards, tmp_path / "run", *SMALL, *evaluating, *layout, processes=2)
    assert "Warning" not in done.stderr and "W1" not in done.stderr, "torch's warnings reach the user"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    expected = transformers.AutoModelForCausalLM.from_pretrained(finished[1], dtype=torch.float32)
    for (name, p), q in zip(theirs.named_parameters(), expected.parameters()):
        # twelve steps, in which Adam divides small gradients by their own size
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=lambda text: f"{name}: {text}")


@pytest.mark.slow
def test_a_process_killed_under_torchrun_is_started_again_and_the_run_ends_the_same(shards, tmp_path):
    if not Path("/proc").exists():
        pytest.skip("the processes of torchrun are found in /proc")
    arguments = [*SMALL, "--steps", "60", "--save_every", "2"]
    run_warm(shards, tmp_path / "whole", *arguments, processes=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "3", str(ROOT / "train.py"), "--data", str(shards), "--out",
               str(tmp_path / "run"), "--overwrite", *arguments]  # which must not delete the run at a restart
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    for step in (10, 30):
        while not list((tmp_path / "run").glob(f"state/step_*{step}")) and process.poll() is None:
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
        os.kill(int(children.split()[-1]), signal.SIGKILL)
    output = process.communicate(timeout=300)[0].decode("utf-8", "replace")
    assert process.returncode == 0, output[-3000:]
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, 61))


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_sigusr1_asks_for_an_evaluation(shards, tmp_path):
    out, asked = tmp_path / "run", False
    arguments = flags(shards, out, [*SMALL, "--steps", "60"])
    [process] = support.start("train.py", arguments, tmp_path / "output")
    while process.is_alive():
        if not asked and (out / "log.jsonl").exists() and log_of(out):
            os.kill(process.pid, signal.SIGUSR1)
            asked = True
        time.sleep(0.002)
    evaluated = [line["step"] for line in log_of(out) if "val_bits_per_byte" in line]
    assert process.exitcode == 0 and asked and len(evaluated) == 2 and evaluated[0] < 60, evaluated


def test_the_batch_grows_with_the_tokens_seen_and_no_window_is_left_out_or_repeated(tmp_path):
    settings = settings_for(tmp_path, batch_size=16, batch_start=4, ramp_tokens=64 * 32, micro_batch_size=2,
                            steps=30)
    sizes = [train.batch_windows(step, settings) for step in range(30)]
    assert sizes[0] == 4 and sizes[-1] == 16 and sizes == sorted(sizes) and set(sizes) == {4, 8, 12, 16}
    seen = 0
    for step, size in enumerate(sizes):  # GPT-3's rule, rounded down: linear in the tokens seen
        assert size == min(16, int(4 + 12 * seen / 64) // 4 * 4)
        assert train.windows_before(step, settings) == seen
        seen += size
    asked = []

    class Noting(FixedBatches):
        def at(self, i):
            asked.append(i)
            return super().at(i)

    train.train(small_model(), Noting(), train.next_token_loss, settings, CPU)
    assert asked == list(range(seen // 2)), "micro-batches of 2 windows, each once, in order"


@pytest.mark.slow
def test_a_run_begun_with_one_process_goes_on_with_two(shards, tmp_path):
    arguments = [*SMALL, "--save_every", "6"]
    whole = run_warm(shards, tmp_path / "whole", *arguments)
    [process] = support.start("train.py", flags(shards, tmp_path / "run", arguments), tmp_path / "output")
    while not list((tmp_path / "run").glob("state/step_*6")) and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    for a, b in zip(whole, run_warm(shards, tmp_path / "run", *arguments, processes=2), strict=True):
        assert a["loss_nats_per_token"] == pytest.approx(b["loss_nats_per_token"], rel=1e-4)


def one_process_of_two(rank, port, folder, queue):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    settings = settings_for(Path(folder), device="cpu")
    env = train.setup(settings)
    model = train.parallelize(small_model(seed=rank), env)  # other weights on each: process 0's must win
    optimizer = train.make_optimizer(model, settings)
    before = {name: p.clone() for name, p in model.named_parameters()}

    def broken_on_one(model, batch):
        loss_sum, count = train.next_token_loss(model, batch)
        return (loss_sum * math.nan if rank == 1 else loss_sum), count

    try:
        train.update(model, optimizer, [random_batch(2, seed=rank)], broken_on_one, settings, env, 0.01)
        error = ""
    except UserError as problem:
        error = str(problem)
    untouched = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    queue.put((rank, error, untouched, sum(p.double().sum().item() for p in model.parameters())))
    torch.distributed.destroy_process_group()


def test_nan_on_one_process_stops_both_before_a_weight_is_touched(tmp_path):
    context = support.warm_processes()
    queue, port = context.Queue(), random.randint(20000, 32000)
    processes = [context.Process(target=one_process_of_two, args=(rank, port, str(tmp_path), queue))
                 for rank in range(2)]
    for process in processes:
        process.start()
    results = sorted(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    for rank, error, untouched, total in results:
        assert "not finite" in error and untouched, \
            f"process {rank} went on: the other one would now wait for ever"
    assert results[0][3] == results[1][3], "the processes began with different weights"


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_and_keeps_its_names(shards, tmp_path):
    run_warm(shards, tmp_path / "plain", *SMALL, "--no-compile", "--save_every", "4")
    run_train(shards, tmp_path / "compiled", *SMALL, "--compile")
    for a, b in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "compiled"), strict=True):
        # float32 in another order
        assert a["loss_nats_per_token"] == pytest.approx(b["loss_nats_per_token"], rel=1e-4)
    shutil.rmtree(tmp_path / "plain" / "state" / "step_00000012")  # a state moves between the two
    run_train(shards, tmp_path / "plain", *SMALL, "--compile", "--save_every", "4")
    header = (tmp_path / "compiled" / "model.safetensors").read_bytes()[:8192]
    assert b"_orig_mod" not in header and b"module." not in header


# ---- when something is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["--dim", "30", "--n_heads", "4"], "dim 30 is not divisible by n_heads 4"),
    (["--n_heads", "4", "--n_kv_heads", "3"], "n_heads 4 is not divisible by n_kv_heads 3"),
    (["--seq_len", "64", "--max_seq_len", "32"], "seq_len 64 exceeds max_seq_len 32"),
    (["--batch_size", "4", "--micro_batch_size", "3"], "micro_batch_size 3 does not divide"),
    (["--steps", "0"], "--steps 0 is out of range"),
    (["--seq_len", "1000000", "--max_seq_len", "1000000"], "--seq_len 1000000 needs 1,000,001"),
    (["--lr", "fast"], "--lr: 'fast' is not a number"),
    (["--learning_rate", "1"], "unknown flag --learning_rate"),
])
def test_a_wrong_setting_ends_in_one_line(monkeypatch, capsys, shards, tmp_path, arguments, words):
    code, errors = in_process(monkeypatch, capsys, shards, tmp_path / "run", *SMALL, *arguments)
    assert code == 2 and words in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--tensor_parallel", "0"], "--tensor_parallel 0 is out of range"),
    (["--tensor_parallel", "2"], "tensor_parallel 2 does not divide the 1 process"),
    (["--shard_size", "2"], "--shard_size 2 is for --data_parallel hsdp"),
    (["--checkpoint_every", "2"], "--checkpoint_every 2 needs --activation_checkpointing"),
    (["--batch_start", "3"], "batch_start 3 does not divide batch_size 4"),
    (["--batch_start", "2"], "batch_start 2 needs --ramp_tokens"),
    (["--ramp_tokens", "1000"], "ramp_tokens 1000 needs --batch_start"),
    (["--replay", "x"], "--replay is of use with --init_from"),
    (["--dim", "1000000"], "the weights of this model take"),
    (["--device", "cuda"], "--device cuda: there is none here"),
])
def test_a_layout_or_ramp_that_cannot_be_ends_in_one_line(monkeypatch, capsys, shards, tmp_path, arguments,
                                                          words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, errors = in_process(monkeypatch, capsys, shards, tmp_path / "run", *SMALL, *arguments)
    assert code == 2 and words in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "run").exists()


def test_out_is_never_the_folder_that_is_read(monkeypatch, capsys, finished, shards):
    before = digest(finished[1])
    for arguments in (["--overwrite"], []):
        code, errors = in_process(monkeypatch, capsys, shards, finished[1], "--init_from", str(finished[1]),
                                  "--seq_len", "32", "--batch_size", "4", "--steps", "2", *arguments)
        assert code == 2 and "choose another --out" in errors and digest(finished[1]) == before


def test_two_commands_at_once_do_not_train_in_one_folder(monkeypatch, capsys, finished, shards, tmp_path):
    import survive
    out = copy_of(finished[1], tmp_path)
    with survive.alone(out):
        code, errors = in_process(monkeypatch, capsys, shards, out, *SMALL, "--save_every", "4",
                                  "--overwrite")
    assert code == 2 and "another process is at work in" in errors and digest(out) == digest(finished[1])
    code, errors = in_process(monkeypatch, capsys, shards, out, *SMALL, "--save_every", "4")
    assert code == 0, f"the folder is free again: {errors}"


# ---- going on from a model ---------------------------------------------------------------------------------


BASE = ["--seq_len", "32", "--batch_size", "4", "--steps", "6", "--precision", "fp32",
        "--sample_prompts", "def "]


def test_init_from_begins_with_that_model_and_watches_old_and_new_text(monkeypatch, capsys, finished, shards,
                                                                       tmp_path):
    out = tmp_path / "run"
    arguments = [*BASE, "--init_from", str(finished[1]), "--replay", str(shards), "--replay_share", "0.5",
                 "--eval_every", "3", "--lr", "1e-12", "--adam_lr", "0"]
    code, errors = in_process(monkeypatch, capsys, shards, out, *arguments)
    assert code == 0, errors
    from checkpoint import load_model
    before, after = load_model(finished[1])[0], load_model(out)[0]
    assert before.config == after.config
    for (name, p), q in zip(before.named_parameters(), after.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9, msg=name)  # six steps of 1e-12
    line = log_of(out)[2]
    assert line["old_val_bits_per_byte"] == pytest.approx(line["val_bits_per_byte"]), "the same text here"


@pytest.mark.parametrize("arguments, words", [
    (["--dim", "32"], "the sizes are that model's; leave --dim out"),
    (["--tie_embeddings"], "leave --tie_embeddings out"),
    (["--bigram_steps", "5"], "would write over the embedding"),
    (["--seq_len", "64"], "seq_len 64 exceeds max_seq_len 32"),
    (["--objective", "fim"], "knows no tokens for infilling"),
])
def test_what_does_not_go_with_init_from_ends_in_one_line(monkeypatch, capsys, finished, shards, tmp_path,
                                                          arguments, words):
    code, errors = in_process(monkeypatch, capsys, shards, tmp_path / "run", *BASE, "--init_from",
                              str(finished[1]), *arguments)
    assert code == 2 and words in errors and errors.count("\n") == 1, errors


def test_init_from_with_shards_of_another_tokenizer_says_how_to_make_them(
        monkeypatch, capsys, finished, shards, tmp_path):
    other = tmp_path / "other"
    data.prepare(data.Settings(input=(str(shards.parent / "text 1.txt"),), out=str(other), vocab_size=270,
                               workers=1))
    code, errors = in_process(monkeypatch, capsys, other, tmp_path / "run", *BASE, "--init_from",
                              str(finished[1]))
    assert code == 2 and f"python data.py --tokenizer {finished[1]}" in errors


@pytest.mark.parametrize("objective", ["prefix", "fim"])
def test_the_other_objectives_train_and_end_in_a_model_folder(
        monkeypatch, capsys, shards, tmp_path, objective):
    out = tmp_path / "run"
    code, errors = in_process(monkeypatch, capsys, shards, out, *SMALL, "--objective", objective)
    assert code == 0, errors
    from checkpoint import load_model
    model, tokenizer = load_model(out)
    assert ("<|fim_middle|>" in tokenizer.special_tokens) == (objective == "fim")
    assert model.config.vocab_size == tokenizer.vocab_size


def test_a_dry_run_writes_nothing(monkeypatch, capsys, shards, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(shards), "--out", str(tmp_path / "run"),
                                      "--preset", "7b", "--dry_run"])
    config.run(train.main)
    said = capsys.readouterr().out
    assert "moments" in said and "GiB" in said and not (tmp_path / "run").exists()


def test_a_missing_data_folder_names_the_remedy(monkeypatch, capsys, tmp_path):
    code, errors = in_process(monkeypatch, capsys, tmp_path / "nowhere", tmp_path / "run", *SMALL)
    assert code == 2 and "python data.py --out" in errors and not (tmp_path / "run").exists()


def copy_of(shards, tmp_path):
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def test_a_shard_with_a_flipped_bit_or_cut_short_is_refused(monkeypatch, capsys, shards, tmp_path):
    copy = copy_of(shards, tmp_path)
    content = bytearray((copy / "train.bin").read_bytes())
    content[100] ^= 4
    (copy / "train.bin").write_bytes(content)
    code, errors = in_process(monkeypatch, capsys, copy, tmp_path / "run", *SMALL)
    assert code == 2 and "train.bin is damaged" in errors
    (copy / "train.bin").write_bytes(content[:-6])
    code, errors = in_process(monkeypatch, capsys, copy, tmp_path / "run", *SMALL)
    assert code == 2 and "train.bin has" in errors and errors.count("\n") == 1


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(monkeypatch, capsys, shards, tmp_path):
    from bpe import Tokenizer
    copy = copy_of(shards, tmp_path)
    Tokenizer.train(["quite another text " * 9], 270, ["<|endoftext|>"]).save(copy / "tokenizer.json")
    code, errors = in_process(monkeypatch, capsys, copy, tmp_path / "run", *SMALL)
    assert code == 2 and "is not the tokenizer that made the shards" in errors


def test_a_folder_that_is_not_a_run_is_never_touched_even_with_overwrite(monkeypatch, capsys, shards,
                                                                         tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    for extra in ([], ["--overwrite"]):
        code, errors = in_process(monkeypatch, capsys, shards, tmp_path, *SMALL, *extra)
        assert code == 2 and "is not a run folder" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt"]


def test_a_run_of_other_settings_is_refused_and_overwritten_only_when_asked(monkeypatch, capsys, finished,
                                                                            shards, tmp_path):
    out = copy_of(finished[1], tmp_path)
    before = digest(out)
    code, errors = in_process(monkeypatch, capsys, shards, out, *SMALL, "--seed", "1", "--save_every", "4")
    assert code == 2 and "seed 0, not 1" in errors and digest(out) == before
    kept = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    assert kept["seed"] == 0, "settings.json must stay that run's"
    code, errors = in_process(monkeypatch, capsys, shards, out, *SMALL, "--seed", "1", "--overwrite")
    assert code == 0 and digest(out) != before


def test_a_full_disk_ends_in_one_line_and_loses_no_state(finished, shards, tmp_path):
    resource = pytest.importorskip("resource", reason="file size limits are POSIX")
    out = tmp_path / "run"
    arguments = [*SMALL, "--save_every", "4"]

    def almost_full():  # no file beyond 200 kB: the log and settings fit, a state does not
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = run_train(shards, out, *arguments, check=False, preexec_fn=almost_full)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and "Traceback" not in done.stderr, \
        done.stderr[-2000:]
    run_warm(shards, out, *arguments)
    assert digest(out) == digest(finished[1])


def test_overwrite_deletes_nothing_before_the_new_settings_are_known_to_be_good(
        monkeypatch, capsys, finished, shards, tmp_path):
    out = copy_of(finished[1], tmp_path)
    before = digest(out)
    wrong = ["--overwrite", "--dim", "30", "--n_heads", "4"]
    code, errors = in_process(monkeypatch, capsys, shards, out, *SMALL, *wrong)
    assert code == 2 and "dim 30" in errors and digest(out) == before


def test_overwrite_deletes_only_what_a_run_writes(monkeypatch, capsys, finished, shards, tmp_path):
    out = copy_of(finished[1], tmp_path)
    (out / "notes.md").write_text("keep me", encoding="utf-8")
    code, errors = in_process(monkeypatch, capsys, shards, out, *SMALL, "--seed", "3", "--overwrite")
    assert code == 0 and (out / "notes.md").read_text(encoding="utf-8") == "keep me"
    assert json.loads((out / "settings.json").read_text(encoding="utf-8"))["overwrite"] is False, \
        "--config with this file would delete the run"
    editor = tmp_path / "editor"  # another program's settings.json makes no run
    editor.mkdir()
    (editor / "settings.json").write_text("{}", encoding="utf-8")
    (editor / "model.safetensors").write_text("not ours", encoding="utf-8")
    code, errors = in_process(monkeypatch, capsys, shards, editor, *SMALL, "--overwrite")
    assert code == 2 and (editor / "model.safetensors").read_text(encoding="utf-8") == "not ours"


def test_a_kill_inside_the_first_save_or_before_it_is_a_start_from_nothing(
        monkeypatch, capsys, shards, tmp_path):
    for name in ("whole", "killed"):
        if name == "killed":
            (tmp_path / name / "state" / "step_00000003.tmp").mkdir(parents=True)
            whole = (tmp_path / "whole" / "settings.json").read_bytes()
            (tmp_path / name / "settings.json").write_bytes(whole)
        code, errors = in_process(monkeypatch, capsys, shards, tmp_path / name, *SMALL, "--bigram_steps", "5")
        assert code == 0, errors
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole"), "was the bigram start left out?"


def test_the_largest_seed_that_is_allowed_works(monkeypatch, capsys, shards, tmp_path):
    largest = ["--seed", str(2 ** 63 - 1), "--steps", "2"]
    code, errors = in_process(monkeypatch, capsys, shards, tmp_path / "run", *SMALL, *largest)
    assert code == 0, errors


def test_a_log_that_lost_lines_is_not_continued(monkeypatch, capsys, finished, shards, tmp_path):
    out = copy_of(finished[1], tmp_path)
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:5] + lines[6:]), encoding="utf-8")
    code, errors = in_process(monkeypatch, capsys, shards, out, *SMALL, "--save_every", "4")
    assert code == 2 and "lacks some of the 12 steps" in errors
