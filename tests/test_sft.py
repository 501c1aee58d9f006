"""sft.py: conversations in windows, loss on replies alone, what is trained, and what has been learnt."""
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import chat
import data
import sft
import stdlib_chat
import train
from attention import Mask
from bpe import Tokenizer
from chat import CHATML, LLAMA3, render, with_chat_tokens
from checkpoint import load_model, save_model
from config import UserError
from model import generate
from parallel import Env
from sft import Packed, answers, best_fit, examples_of, f1, reply_loss, score
from support import check_a_killed_run, in_process, random_model, run_stage, seeded

ROOT = Path(__file__).resolve().parent.parent
CPU = Env(torch.device("cpu"))
PLAIN = Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"])  # 259 ids
TOKENIZER = with_chat_tokens(PLAIN)  # and two
START, END = (TOKENIZER.special_tokens[token] for token in CHATML.special)


def talk(*contents, system=None):
    """A conversation of user and assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


def some_talks(number, seed=0, longest=12):
    rng = random.Random(seed)
    return [talk(rng.choice("abc") * rng.randint(1, longest), rng.choice("xyz") * rng.randint(1, longest))
            for _ in range(number)]


def examples_from(talks, seq_len=64):
    return examples_of(talks, TOKENIZER, CHATML, seq_len)[1]


def model_for(**changes):
    return random_model(**{"vocab_size": TOKENIZER.vocab_size, "max_seq_len": 128, **changes})


def settings_for(tmp_path, **changes):
    return sft.Settings(**{"out": str(tmp_path / "run"), "seq_len": 64, "batch_size": 4, "steps": 6,
                           "compile": False, "precision": "fp32", "warmup_steps": 2, **changes})


# ---- packing -----------------------------------------------------------------------------------------------


def naive_best_fit(lengths, room):
    """Best-fit decreasing as one would say it: look at all windows, take the fullest that has room."""
    windows = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = [room - sum(lengths[j] for j in window) for window in windows]
        fitting = [(left[w], w) for w in range(len(windows)) if left[w] >= lengths[i]]
        if fitting:
            windows[min(fitting)[1]].append(i)
        else:
            windows.append([i])
    return windows


@pytest.mark.parametrize("lengths, room, windows", [
    ([6, 5, 4, 3, 2], 10, [[0, 2], [1, 3, 4]]),  # 6 + 4, 5 + 3 + 2
    ([10], 10, [[0]]),  # exactly the room
    ([12, 10, 9, 1], 20, [[0], [1, 2, 3]]),  # 1 goes into the fuller one, not into the first
    ([4, 4, 4, 4, 4], 9, [[0, 1], [2, 3], [4]]),
    ([1, 9, 2, 8], 10, [[1, 0], [3, 2]]),
    ([], 10, []),
])
def test_best_fit_by_hand(lengths, room, windows):
    assert best_fit(lengths, room) == windows


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_equals_the_plain_search_and_never_breaks_its_promises(seed):
    rng = random.Random(seed)
    room = rng.choice([7, 50, 64])
    lengths = [rng.randint(1, room) for _ in range(120)]
    windows = best_fit(lengths, room)
    assert windows == naive_best_fit(lengths, room)
    assert sorted(i for window in windows for i in window) == list(range(120)), "lost, or packed twice"
    assert all(sum(lengths[i] for i in window) <= room for window in windows)


def test_best_fit_is_within_two_per_cent_of_what_any_packing_needs():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.5, 0.8, 5000), 8, 512).astype(int).tolist()
    least = math.ceil(sum(lengths) / 512)
    # Ding et al. report 0.01 % for documents cut to the window; whole conversations are fewer and larger
    assert least <= len(best_fit(lengths, 512)) <= 1.02 * least


def test_a_packed_window_by_hand():
    examples = [([1, 2, 3], [False, True, True]), ([4, 5], [False, True]), ([6, 7, 8], [False, False, True])]
    packed = Packed(examples, batch_size=2, seq_len=4)
    inputs, targets, documents = packed.in_order(0)
    assert inputs.tolist() == [[1, 2, 6, 7], [4, 0, 0, 0]]
    assert targets.tolist() == [[2, 3, -100, 8], [5, -100, -100, -100]], "is the mask shifted by one?"
    assert documents.tolist() == [[1, 1, 2, 2], [1, 0, 0, 0]]
    assert Mask(documents=documents).place[0].tolist() == [0, 1, 0, 1], "positions start anew in each text"
    assert packed.tokens == 4 and packed.padding == 3 / 8 and packed.steps == 1
    assert (packed.in_order(1)[1] == -100).all(), "past the end nothing counts"


def test_what_carries_loss_is_each_reply_with_its_end_token_and_nothing_else():
    talks = [talk("yes", "yes", "no<|im_end|>", "no", system="assistant"), talk("1 + 1?", "2")]
    inputs, targets, _ = Packed(examples_from(talks, 256), 1, 256).in_order(0)
    said, header = "", TOKENIZER.encode("assistant\n")
    for place, id in enumerate(targets[0].tolist()):
        if id != -100:
            begins = not place or targets[0, place - 1] == -100
            said += "|" * begins + TOKENIZER.decode([id])
            assert not begins or inputs[0, place - len(header) + 1:place + 1].tolist() == header, \
                "the first token of a reply follows its header"
    assert said == "|yes<|im_end|>|no<|im_end|>|2<|im_end|>"


def sum_of_single(model, examples):
    """Loss and gradients of the conversations one by one, without padding or packing."""
    total, count = 0, 0
    for ids, mask in examples:
        targets = torch.tensor([[id if learnt else -100 for id, learnt in zip(ids[1:], mask[1:])]])
        loss_sum, number = train.next_token_loss(model, (torch.tensor([ids[:-1]]), targets))
        total, count = total + loss_sum, count + number
    return total, count, torch.autograd.grad(total, list(model.parameters()))


@pytest.mark.parametrize("changes", [{}, dict(qk_norm=True, tie_embeddings=True)])
def test_loss_and_gradients_of_a_packed_batch_are_those_of_the_conversations_one_by_one(changes):
    model, examples = model_for(**changes), examples_from(some_talks(9))
    packed = Packed(examples, batch_size=9, seq_len=100)
    assert packed.windows < 9, "nothing is packed"
    expected, number, gradients = sum_of_single(model, examples)
    loss_sum, count = reply_loss(model, packed.in_order(0))
    assert count == number == packed.tokens
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-6), "the issue's bound; float32 sums"
    for ours, right in zip(torch.autograd.grad(loss_sum, list(model.parameters())), gradients):
        # a gradient of float32 is a sum of hundreds of terms in another order
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5 * right.abs().max().item())


def test_a_conversation_does_not_change_what_its_neighbours_get_by_a_single_bit():
    model = model_for()
    inputs, _, documents = Packed(examples_from(some_talks(3)), 1, 128).in_order(0)
    other = inputs.clone()
    changed = documents == 2
    other[changed] = (other[changed] + 1) % 250
    with torch.no_grad():
        before, after = (model(ids, mask=Mask(documents=documents)) for ids in (inputs, other))
    assert set(documents.unique().tolist()) == {0, 1, 2, 3}
    assert torch.equal(before[~changed], after[~changed]), "a conversation sees its neighbour"
    assert not torch.equal(before[changed], after[changed])


def test_two_processes_see_together_what_one_sees_and_each_window_comes_once_an_epoch():
    examples = examples_from(some_talks(40))
    one = Packed(examples, 4, 64, seed=3)
    two = [Packed(examples, 2, 64, seed=3, rank=rank, world_size=2) for rank in range(2)]
    for step in (5, 0, 1):  # in any order: a function of (seed, step)
        for whole, *parts in zip(one.at(step), *(batches.at(step) for batches in two)):
            assert torch.equal(whole, torch.cat(parts))
    seen = Packed(examples, 1, 64, seed=3)
    rows = [tuple(map(tuple, torch.cat(seen.at(i)).tolist())) for i in range(2 * seen.windows)]
    first, second = rows[:seen.windows], rows[seen.windows:]
    assert sorted(first) == sorted(second) and first != second, "each epoch has an order of its own"
    assert not torch.equal(one.at(0)[0], Packed(examples, 4, 64, seed=4).at(0)[0])


def test_the_loss_is_that_of_transformers_with_the_same_labels(tmp_path):
    import transformers
    for changes, kind in (({}, "LlamaForCausalLM"), (dict(qk_norm=True), "Qwen3ForCausalLM")):
        model, examples = model_for(**changes), examples_from(some_talks(5))
        save_model(model, TOKENIZER, tmp_path / kind)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        assert type(theirs).__name__ == kind
        longest = max(len(ids) for ids, _ in examples)
        ids = torch.full((5, longest), END)  # padded, with the end token at that
        labels, real = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (tokens, mask) in enumerate(examples):
            ids[row, :len(tokens)], real[row, :len(tokens)] = torch.tensor(tokens), 1
            labels[row, :len(tokens)] = torch.tensor([id if m else -100 for id, m in zip(tokens, mask)])
        with torch.no_grad():
            expected = theirs(input_ids=ids, attention_mask=real, labels=labels).loss.item()
            loss_sum, count = reply_loss(model, Packed(examples, 5, 100).in_order(0))
        assert (loss_sum / count).item() == pytest.approx(expected, abs=1e-5), "the issue's bound"


# ---- beside it, plain text ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder of shards/, base/ (a model), talks/, talks.jsonl and gsm.jsonl, in a path that is no ASCII."""
    folder = tmp_path_factory.mktemp("有 空格")
    rng = random.Random(0)
    lines = [" ".join(rng.choices(["def", "the", "return", "self", "数据"], k=8)) for _ in range(400)]
    (folder / "text").mkdir()
    for number in range(20):
        (folder / "text" / f"{number}.txt").write_text("\n".join(lines[number::20]), "utf-8")
    PLAIN.save(folder / "tokenizer.json")
    data.prepare(data.Settings(input=(str(folder / "text"),), out=str(folder / "shards"), val_fraction=0.2,
                               tokenizer=str(folder / "tokenizer.json"), workers=1))
    save_model(model_for(vocab_size=PLAIN.vocab_size, max_seq_len=64), PLAIN, folder / "base")
    (folder / "talks").mkdir()
    data.write_documents(folder / "talks" / "train.jsonl", some_talks(60))
    data.write_documents(folder / "talks" / "val.jsonl", [*some_talks(8, seed=1), talk("a" * 200, "b")])
    data.write_documents(folder / "talks.jsonl", some_talks(60))
    data.write_documents(folder / "gsm.jsonl", [
        {"question": f"{a} and {b}?", "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
        for a in range(6) for b in range(6)])
    return folder


def plain_text(base, split="train", size=4, seq_len=64, **place):
    return sft.PlainText(base / "shards", split, size, seq_len, **place)


def test_a_stated_share_of_the_windows_is_plain_text_and_it_learns_the_next_token_of_all(base):
    new, old = Packed(examples_from(some_talks(60)), 4, 64), plain_text(base)
    new.meta = old.meta
    mixed = sft.Replay(new, old, 0.25)
    rows = [row for step in range(20) for row in zip(*mixed.at(step))]
    is_plain = [bool((documents == 0).all()) for _, _, documents in rows]
    assert sum(is_plain) == 20 * 4 / 4
    for (inputs, targets, _), plain in zip(rows, is_plain):
        if plain:
            known = targets != -100
            assert known.sum() >= 1 and torch.equal(inputs[1:][known[:-1]], targets[:-1][known[:-1]])
    assert all(batch.shape == (4, 64) and batch.dtype == torch.int64 for batch in mixed.at(0))


def test_the_loss_of_plain_text_is_pretrainings(base):
    model, text = model_for(), plain_text(base)
    with torch.no_grad():
        ours = reply_loss(model, text.in_order(0))
        theirs = train.next_token_loss(model, text.in_order(0)[:2])
    assert ours[1] == theirs[1]
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-6), "float32 sums"


# ---- what is learnt, and by which weights ------------------------------------------------------------------


def test_conversations_longer_than_the_window_are_dropped_and_counted(capsys):
    talks = [talk("a", "b"), talk("a", "b" * 100), talk("c", "d")]
    length = len(render(talks[0]["messages"], TOKENIZER)[0])
    kept, examples = examples_of(talks, TOKENIZER, CHATML, length - 1)  # its last token is a target alone
    assert kept == [talks[0], talks[2]] and [len(ids) for ids, _ in examples] == [length] * 2
    assert "dropped: 1 of 3 conversations" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"none of the 3 conversations fits into --seq_len {length - 2} "):
        examples_of(talks, TOKENIZER, CHATML, length - 2)


def test_with_loss_on_prompts_all_that_is_said_is_learnt():
    _, [(ids, mask)] = examples_of([talk("a", "b")], TOKENIZER, CHATML, 64, loss_on_prompts=True)
    assert all(mask) and len(mask) == len(ids)


def test_what_is_learnt_is_shown_in_green_or_between_marks(capsys, monkeypatch):
    examples = examples_from([talk("1?", "2", "3?", "4")])
    sft.show_masks(examples, TOKENIZER)
    assert "assistant\n»2<|im_end|>«\n<|im_start|>user\n3?" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    sft.show_masks(examples, TOKENIZER)
    assert "assistant\n\033[32m4<|im_end|>\033[0m\n" in capsys.readouterr().out


TRAINED = {
    "all": lambda name: True,
    "norms": lambda name: "norm" in name,
    "embeddings": lambda name: "embed_tokens" in name or "lm_head" in name,
    "last1": lambda name: "layers.1." in name or name in ("model.norm.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("which", TRAINED)
def test_training_touches_what_is_named_and_not_a_bit_of_the_rest(tmp_path, which):
    model = model_for(qk_norm=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    said = sft.choose_trained(model, which)
    trained = sum(p.numel() for name, p in before.items() if TRAINED[which](name))
    assert f"{trained:,} of {sum(p.numel() for p in before.values()):,}" in said
    packed = Packed(examples_from(some_talks(20)), 4, 64)
    train.train(model, packed, reply_loss, settings_for(tmp_path, steps=3), CPU, TOKENIZER)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != TRAINED[which](name), name


@pytest.mark.parametrize("which", ["last0", "last3", "last", "last01", "head", "", "all,norms"])
def test_other_names_of_weights_are_refused(which):
    with pytest.raises(UserError, match="is not all, norms, embeddings, or last1 to last2"):
        sft.choose_trained(model_for(), which)


def test_noise_on_embeddings_has_its_bound_and_stays_out_of_evaluation():
    model, ids = model_for(), torch.arange(40).view(2, 20)
    clean = model.model.embed_tokens(ids)
    sft.add_noise(model, alpha=5.0)
    assert torch.equal(model.model.embed_tokens(ids), clean), "evaluation has no noise"
    noise = model.train().model.embed_tokens(ids) - clean
    bound = 5 / math.sqrt(20 * 32)
    assert 0.98 * bound < noise.abs().max() <= bound * (1 + 1e-4), "1,280 draws come near; float32 sums"
    assert abs(noise.mean()) < 4 * bound / math.sqrt(3 * 1280), "four standard errors of a mean of zero"
    assert noise.unique().numel() > 1000, "each number has a draw of its own"


def test_new_tokens_get_rows_and_all_that_the_model_knew_stays():
    model = model_for(vocab_size=PLAIN.vocab_size)
    old = model.model.embed_tokens.weight.clone()
    grown, tokenizer = sft.with_template(model, PLAIN, LLAMA3, CPU)
    assert grown.config.vocab_size == tokenizer.vocab_size == PLAIN.vocab_size + 4
    assert torch.equal(grown.model.embed_tokens.weight[:len(old)], old)
    assert tokenizer.eos_token == "<|eot_id|>" and tokenizer.chat_template == chat.jinja(LLAMA3)
    again, same = sft.with_template(grown, tokenizer, LLAMA3, CPU)
    assert same is tokenizer and again.config.vocab_size == tokenizer.vocab_size, "a model that knows them"


def test_a_model_reads_further_by_a_rule_and_for_a_while_as_it_did():
    model, settings = model_for(), sft.Settings(seq_len=512)
    was = model.config
    model.config = model.model.config = sft.reading_further(was, settings, CPU)
    assert model.config.max_seq_len == 512 and model.config.rope_scaling["rope_type"] == "yarn"
    by_ntk = sft.reading_further(was, sft.Settings(seq_len=512, rope_scaling="ntk"), CPU)
    assert by_ntk.max_seq_len == 512 and by_ntk.rope_theta > was.rope_theta
    with sft.configured(model, was):
        assert model.config is was and model.model.config is was
    assert model.config.max_seq_len == model.model.config.max_seq_len == 512
    assert sft.reading_further(was, sft.Settings(seq_len=128), CPU) is was


# ---- what has been learnt ----------------------------------------------------------------------------------


def reference_f1(answer, truth):
    """By precision and recall, the common words struck off one by one."""
    a, left, common = sft.words(answer), sft.words(truth), 0
    n = len(left)
    for word in a:
        if word in left:
            left.remove(word)
            common += 1
    return 2 / (len(a) / common + n / common) if common else 0.0


def test_f1_by_hand_and_by_precision_and_recall():
    assert f1("a b b", "b c") == pytest.approx(2 / 5)
    assert f1("Return it.", "return IT") == 1 and f1("x", "y") == 0 and f1("", "y") == 0
    assert f1("+", "+") == 1 and f1("+", "-") == 0, "texts without words are compared as they are"
    rng = random.Random(0)
    for _ in range(200):
        a, b = (" ".join(rng.choices("abcde", k=rng.randint(1, 8))) for _ in range(2))
        assert f1(a, b) == pytest.approx(reference_f1(a, b)) == pytest.approx(f1(b, a))


def test_scores_by_hand():
    code = 'def half(x):\n    """Half of x."""'
    write = {**talk("?", "    return x / 2"), "task": "write", "code": code}
    tell = {**talk("?", "Half of x."), "task": "describe", "code": "def half(x):\n    return x / 2"}
    replies = ["    return x", "    return (", " ", "half of X", "Half it"]
    scores = score([write, write, write, tell, tell], list(zip(replies, (True, True, True, True, False))))
    assert scores == {"f1": pytest.approx((1 + 2 / 5) / 2), "exact_match": 0.5,
                      "compiles": pytest.approx(1 / 3), "stops": 0.8}
    assert score([talk("?", "4")], [("4", True)]) == {"f1": 1, "exact_match": 1, "stops": 1}, "anybody's data"
    assert score([], []) == {}


def test_answers_are_those_to_each_prompt_alone_and_end_before_the_end_token():
    model = model_for(max_seq_len=32)
    prompts = [[5], list(range(20)), [7, 8, 9], list(range(30)), list(range(31)), [1] * 20]
    for prompt in prompts:  # the last ones leave less room than the others
        room = min(10, 32 - len(prompt))
        ids = generate(model, [prompt], room, temperature=0).ids[0].tolist()
        for stop in {ids[0], ids[-1], 999}:
            at = ids.index(stop) if stop in ids else len(ids)
            replies = answers(model, prompts, TOKENIZER, [stop], 10, batch_size=3)
            assert replies[prompts.index(prompt)] == (TOKENIZER.decode(ids[:at]), stop in ids)
    assert answers(model, [], TOKENIZER, [0]) == []


def test_answers_can_be_kept_from_repeating_themselves_as_generate_can():
    model, prompt = model_for(max_seq_len=32), [5]
    plain, varied = (generate(model, [prompt], 12, temperature=0, repetition_penalty=penalty).ids[0].tolist()
                     for penalty in (1.0, 1e3))
    assert plain != varied and len(set(varied)) == 12, "with such a penalty nothing comes twice"
    assert answers(model, [prompt], TOKENIZER, [], 12, 1e3) == [(TOKENIZER.decode(varied), False)]


def test_the_best_few_shot_prompt_is_found_and_told(monkeypatch):
    model, seen = model_for(), []

    def knows(model, prompts, tokenizer, stop_ids, max_new_tokens, repetition_penalty):
        assert repetition_penalty == 1.5, "the base answers as the trained model does"
        seen.append([tokenizer.decode(prompt) for prompt in prompts])
        right = "Description:" in seen[-1][0] and seen[-1][0].count("Code:") == 2
        return [("it halves\nand more" if right else "no", False)] * len(prompts)

    monkeypatch.setattr(sft, "answers", knows)
    asked = [{**talk("question", "It halves."), "code": "def f"},
             {**talk("?", "x"), "task": "write", "code": "g"}]
    was, known = replace(model.config, max_seq_len=64), [talk("k", "shown")] * 99
    said = sft.best_few_shot(model, was, TOKENIZER, asked, known, 1.5)
    assert "1.0000" in said and "Description" in said and "1 answered before it" in said
    assert all(len(prompts) == 1 for prompts in seen), "bodies of functions are not asked for"
    assert len(seen) == 2 * 4 * 3, "as the model was, and as it is; four forms; three numbers of shots"
    assert max(len(TOKENIZER.encode(prompts[0])) for prompts in seen) <= model.config.max_seq_len - 40


def test_questions_are_spread_over_all():
    assert sft.spread(range(10), 4) == [0, 3, 6, 9] and sft.spread(range(3), 9) == [0, 1, 2]
    assert sft.spread(range(3), 0) == [] and sft.spread([], 5) == []


# ---- the loop ----------------------------------------------------------------------------------------------


class StopAt(Packed):
    stop = None

    def at(self, step):
        if step == self.stop:
            raise KeyboardInterrupt
        return super().at(step)


def test_stopping_and_going_on_equals_never_stopping_bit_for_bit(tmp_path):
    def one(folder, stop=None, seed=1):
        model = model_for()
        torch.nn.init.normal_(model.lm_head.weight, generator=seeded(1))
        sft.add_noise(model, 5.0)  # its randomness belongs to the step
        batches = StopAt(examples_from(some_talks(30)), 4, 64)
        batches.stop = stop
        settings = settings_for(tmp_path, out=str(tmp_path / folder), steps=8, save_every=3)
        train.train(model, batches, reply_loss, settings, CPU, TOKENIZER)

    one("whole")
    with pytest.raises(KeyboardInterrupt):
        one("parts", stop=5)
    one("parts")
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_epochs_become_steps():
    settings = sft.Settings(epochs=3.0, batch_size=8, replay=None)
    assert train.steps_of(settings, 100, CPU) == math.ceil(300 / 8)
    replaying = replace(settings, replay="runs/data", replay_share=0.2)
    assert train.steps_of(replaying, 100, CPU) == math.ceil(375 / 8), "a fifth of the windows is of another text"


def test_epochs_beside_steps_are_told_to_do_nothing(capsys):
    """Not refused: settings.json has both, and --config reads it."""
    assert train.steps_of(sft.Settings(epochs=3.0, steps=7), 100, CPU) == 7
    assert "--epochs 3 does nothing beside --steps 7" in capsys.readouterr().out
    train.steps_of(sft.Settings(steps=7), 100, CPU)
    assert not capsys.readouterr().out


# ---- the program -------------------------------------------------------------------------------------------


def arguments(base, out, **changes):
    given = {"data": base / "talks", "init_from": base / "base", "replay": base / "shards", "out": out,
             "steps": 3, "seq_len": 96, "batch_size": 4, "questions": 4, "precision": "fp32", "device": "cpu",
             **changes}
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture
def command(monkeypatch, capsys):
    """sft.py with these words, in this process: (exit code, output, error output)."""
    def call(words):
        return in_process(monkeypatch, capsys, sft.main, *words)
    return call


def test_a_tiny_model_learns_a_conversation_by_heart_answers_it_and_stops(base, tmp_path, command):
    learnt = talk("capital of France?", "Paris it is", "and of Spain?", "Madrid")
    (tmp_path / "one").mkdir()
    for split in data.SPLITS:
        data.write_documents(tmp_path / "one" / f"{split}.jsonl", [learnt])
    code, out, err = command(arguments(
        base, tmp_path / "run", data=tmp_path / "one", steps=60, lr=0.02, adam_lr=0.01, replay="none",
        seq_len=128, batch_size=1))
    assert code == 0, err
    table = {line[:40].strip(): line[40:].split() for line in out.splitlines() if len(line.split()) > 3}
    assert table["replies that end by themselves"] == ["0.0000", "1.0000"]
    assert table["replies, exact matches of words"] == ["0.0000", "1.0000"]
    model, tokenizer = load_model(tmp_path / "run")
    asked = [learnt, {"messages": learnt["messages"][:2]}]
    replies = sft.reply_to(asked, model, tokenizer, sft.Settings())
    assert replies == [("Madrid", True), ("Paris it is", True)], \
        "every reply of a conversation is learnt"


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory):
    """(output, folder) of a run of the command with plain text in between."""
    out = tmp_path_factory.mktemp("run") / "聊 sft"
    command = [sys.executable, str(ROOT / "sft.py"), *arguments(base, out, few_shot="true", show_mask=1)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, out


def test_the_output_tells_what_was_chosen_and_both_sides_of_the_training(finished):
    out = finished[0]
    for words in ("conversations in the form of messages", "new tokens: <|im_start|> <|im_end|>", "% padding",
                  "reads 96 tokens instead of 64, by the rule yarn", "trained: all", "<|im_end|>«",
                  "few-shot", "dropped: 1 of 9", "plain text, bits per byte", ">>> before:", ">>> author:"):
        assert words in out, words
    assert out.strip().endswith(f"model: {finished[1]}")


def test_before_means_as_the_base_model_was(finished, base):
    model, _ = load_model(base / "base")
    text = data.Batches(base / "shards", "val", 4, 64)
    expected = train.evaluate(model, text, train.next_token_loss, CPU)["bits_per_byte"]
    told = next(line for line in finished[0].splitlines() if line.startswith("plain text, bits per byte"))
    # two rows more share in the softmax (under 1 %); printed with four digits
    assert float(told.split()[-2]) == pytest.approx(expected, rel=1e-3), "with angles for longer windows?"


def test_what_is_printed_stands_in_results_json_and_five_answers_beside_it(finished):
    results = json.loads((finished[1] / "results.json").read_text("utf-8"))
    told = next(line for line in finished[0].splitlines() if line.startswith("loss on replies"))
    row = results["loss on replies, nats a token"]
    assert told.split()[-2:] == [f"{row['before']:.4f}", f"{row['after']:.4f}"]
    samples = results["samples"]
    assert 0 < len(samples) <= 5 and all(sample.keys() == {"prompt", "before", "after", "author"}
                                         for sample in samples)
    assert all(sample["prompt"] in finished[0] for sample in samples)


def test_the_folder_is_a_chat_model_for_transformers(finished):
    import transformers
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished[1])
    messages = talk("1?", "2")["messages"]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert list(ids) == render(messages, TOKENIZER)[0] and tokenizer.eos_token == "<|im_end|>"
    written = json.loads((finished[1] / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    assert written == [END, TOKENIZER.special_tokens["<|endoftext|>"]], "what ends a document ends a text"


def test_a_model_that_has_the_template_goes_without_new_tokens(finished, base, tmp_path, command):
    code, out, err = command(arguments(base, tmp_path / "more", init_from=finished[1], questions=0))
    assert code == 0, err
    assert "new tokens" not in out and "instead of" not in out
    assert load_model(tmp_path / "more")[0].config == load_model(finished[1])[0].config


def test_no_chunked_loss_holds_all_logits_at_once(base, tmp_path, command, monkeypatch):
    """The flag once did nothing here: what it leaves out must not be called."""
    words = arguments(base, tmp_path / "run", questions=0, steps=1, chunked_loss="false")
    monkeypatch.setattr("objectives.linear_cross_entropy", None)
    code, _, err = command(words)
    assert code == 0, err


def test_a_file_in_gsm8ks_form_trains_and_a_share_of_it_is_held_out(base, tmp_path, command):
    code, out, err = command(arguments(
        base, tmp_path / "run", data=base / "gsm.jsonl", val_share=0.25, replay="none", questions=0, steps=20,
        lr=0.02, adam_lr=0.01))
    assert code == 0, err
    assert "form of question and answer" in out and "36 answers cleared of calculator marks" in out
    assert "train: 27 conversations" in out and "val: 9 conversations" in out
    row = next(line for line in out.splitlines() if line.startswith("loss on replies"))
    before, after = map(float, row.split()[-2:])
    assert after < 0.7 * before


def test_the_default_conversations_are_held_out_where_the_base_models_text_is(base, tmp_path, command,
                                                                              monkeypatch):
    asked = []
    monkeypatch.setattr(stdlib_chat, "write_conversations",
                        lambda *args, **options: asked.append((args, options)))
    for replay, share in ((base / "shards", 0.2), (tmp_path / "none", data.Settings.val_fraction)):
        assert command(["--make_data", "--data", "x", "--replay", str(replay)])[0] == 0
        assert asked.pop() == (("x", False), {"val_fraction": share})


def test_by_default_conversations_are_made_once_and_missing_plain_text_is_told(base, tmp_path, command,
                                                                               monkeypatch):
    made = []

    def write(folder, overwrite, val_fraction):
        made.append(folder)
        shutil.copytree(base / "talks", folder)

    monkeypatch.setattr(stdlib_chat, "write_conversations", write)
    monkeypatch.chdir(tmp_path)
    for out in ("one", "two"):
        code, said, err = command(arguments(base, out, data=None, replay=None, questions=0, steps=1))
        assert code == 0, err
        assert "there is no runs/data" in said.replace("\\", "/") and "plain text, bits" not in said
    assert made == ["runs/chat"]


def test_the_options_reach_the_training(base, tmp_path, command):
    common = dict(questions=0, replay="none", steps=2, show_mask=1, loss_on_prompts="true")
    logs = []
    for name, changes in (("plain", {}), ("noise", dict(neftune=5, train_layers="norms"))):
        code, out, err = command(arguments(base, tmp_path / name, **common, **changes))
        assert code == 0, err
        assert "»<|im_start|>user" in out, "what the user says is learnt, too"
        logs.append(json.loads((tmp_path / name / "log.jsonl").read_text("utf-8").splitlines()[0]))
    assert "trained: norms" in out
    assert logs[0]["loss_nats_per_token"] != logs[1]["loss_nats_per_token"], "there was no noise"
    folders = base / "base", tmp_path / "noise"
    begun, ended = (load_model(folder)[0].model.embed_tokens.weight for folder in folders)
    assert torch.equal(ended[:len(begun)], begun)


@pytest.mark.parametrize("name", ["llama3", "qwen", "qwen3"])
def test_the_other_templates_train_too_and_their_end_ends_generation(base, tmp_path, command, name):
    wanted = dict(template=name, seq_len=200, steps=1, questions=2)
    code, out, err = command(arguments(base, tmp_path / "run", **wanted))
    assert code == 0, err
    written = json.loads((tmp_path / "run" / "generation_config.json").read_text("utf-8"))
    _, tokenizer = load_model(tmp_path / "run")
    assert written["eos_token_id"][0] == tokenizer.special_tokens[chat.TEMPLATES[name].end]
    assert tokenizer.chat_template == chat.jinja(chat.TEMPLATES[name])


def test_bits_per_byte_of_replies_are_of_their_text_alone():
    examples = examples_from([talk("?", "数据"), talk("?", "ab")])
    assert sft.learnt_bytes(examples, TOKENIZER) == 8


@pytest.mark.parametrize("changes, goes_on", [(dict(questions=0, eval_every=2), True), (dict(steps=5), False),
                                              (dict(seq_len=95), False), (dict(data="talks.jsonl"), False),
                                              (dict(replay="none"), False), (dict(replay_share=0.5), False)])
def test_a_run_goes_on_only_with_what_it_began_with(finished, base, tmp_path, command, changes, goes_on):
    shutil.copytree(finished[1], tmp_path / "run")
    changes = {name: base / value if name == "data" else value for name, value in changes.items()}
    code, out, err = command(arguments(base, tmp_path / "run", **changes))
    assert (code == 0) == goes_on, err[-2000:]
    if goes_on:
        same, model = (folder / "model.safetensors" for folder in (tmp_path / "run", finished[1]))
        assert same.read_bytes() == model.read_bytes()
    else:
        assert "--overwrite" in err and err.strip().splitlines()[-1].startswith("error: ")


def test_render_is_sfts():
    assert sft.render is render


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"data_parallel": "fsdp"}, {"tensor_parallel": 2}])
def test_two_processes_learn_what_one_does(base, tmp_path, layout):
    common = dict(steps=6, questions=2)
    one = run_stage("sft.py", arguments(base, tmp_path / "one", **common))
    two = run_stage("sft.py", arguments(base, tmp_path / "two", **common, **layout), processes=2)
    for a, b in zip(one, two, strict=True):
        assert a["targets"] == b["targets"]
        for name in ("loss_nats_per_token", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), "float32 sums in another order"
    for name in ("val_loss_nats_per_token", "plain_val_bits_per_byte"):
        assert one[-1][name] == pytest.approx(two[-1][name], rel=1e-3)


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_killed_goes_on_and_ends_in_the_same_bytes(base, tmp_path):
    common = dict(steps=12, save_every=2, questions=2, data_parallel="fsdp")
    check_a_killed_run("sft.py", lambda out: arguments(base, out, **common), tmp_path)


# ---- when something is wrong -------------------------------------------------------------------------------

GOOD = json.dumps(talk("a", "b"))


@pytest.mark.parametrize("line, words", [
    (json.dumps({"messages": [{"role": "user", "content": "a"}]}), "file.jsonl:2: no message is of the ass"),
    (json.dumps(talk("a", " ")), "file.jsonl:2: message 2, a reply, is empty"),
    (json.dumps({"messages": [{"role": "robot", "content": "a"}]}), "has the role 'robot', not one of"),
    (json.dumps({"messages": talk("a", "b")["messages"][::-1]}), "is of the assistant, not of the user"),
    (json.dumps({"messages": [{"role": "user", "content": 7}]}), "the content of message 1 is of type int"),
    ("{", "file.jsonl:2: not JSON"),
])
def test_a_line_that_is_no_conversation_is_named_or_skipped(base, tmp_path, command, line, words):
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join([GOOD, line, *[GOOD] * 20]), "utf-8")
    wrong = arguments(base, tmp_path / "run", data=path, questions=0, steps=1)
    code, _, err = command(wrong)
    assert code == 2 and words in err and "--on_bad_line skip" in err
    assert err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert not (tmp_path / "run").exists()
    if line == "{":  # once is enough: chat.py has tests of its own
        code, out, err = command([*wrong, "--on_bad_line", "skip"])
        assert code == 0 and "bad lines or files skipped: 1" in out, err


@pytest.mark.parametrize("changes, words", [
    (dict(data="{tmp}/other.jsonl"), "that is no form of conversations; known are messages"),
    (dict(data="{tmp}/none.jsonl"), "there is no "),
    (dict(data="{tmp}"), "train.jsonl; --data is a file of conversations, or a folder"),
    (dict(data="{tmp}/single.jsonl"), "has 1 to learn from, too few to hold out a share"),
    (dict(seq_len=12), "none of the 60 conversations fits into --seq_len 12 tokens"),
    (dict(rope_scaling="none"), "seq_len 96 exceeds max_seq_len 64"),
    (dict(init_from="{tmp}/none"), "there is no model folder"),
    (dict(init_from="{tmp}/bare"), "has no tokenizer.json"),
    (dict(replay="{tmp}/none"), "holds no token shards"),
    (dict(init_from="{tmp}/foreign"), "was made with another tokenizer"),
    (dict(train_layers="last9"), "is not all, norms, embeddings, or last1 to last2"),
    (dict(template="chat"), "is not one of chatml, llama3, qwen, qwen3"),
    (dict(replay_share=1), "--replay_share 1.0 is out of range"),
    (dict(epochs=0), "--epochs 0.0 is out of range"),
    (dict(batch_size=4, micro_batch_size=3), "does not divide"),
    (dict(val_share=0.3), "--val_share 0.3 is for a single file, and --data "),
])
def test_mistakes_end_in_one_line_and_code_2_before_a_run_is_begun(base, tmp_path, command, changes, words):
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n', "utf-8")
    (tmp_path / "single.jsonl").write_text(GOOD, "utf-8")
    save_model(model_for(), None, tmp_path / "bare")
    other = Tokenizer([(b"a", b"b")], ["<|endoftext|>"])
    save_model(model_for(vocab_size=other.vocab_size, max_seq_len=64), other, tmp_path / "foreign")
    changes = {name: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
               for name, value in changes.items()}
    code, _, err = command(arguments(base, tmp_path / "run", **changes))
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and words in last, err[-2000:]
    assert not (tmp_path / "run").exists()
