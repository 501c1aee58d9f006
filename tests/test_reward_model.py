"""reward_model.py: the loss beside TRL's, where a reward is read, folders beside transformers, runs."""
import functools
import json
import math
import random
import shutil

import pytest
import torch
import torch.nn.functional as F

import reward_model
import sample
import train
from adapters import open_model
from bpe import Tokenizer
from chat import CHATML, TEMPLATES, with_chat_tokens
from checkpoint import load_model, save_model
from config import UserError
from families import DEFAULTS
from parallel import Env
from preferences import encode_pairs
from reward_model import (Answers, RewardModel, calibration, histogram, judge, load_reward_model, pad_id,
                          pair_rewards, ranking_loss, read_at_end, reward_model_loss, save_reward_model,
                          scores_of)
from support import (CLOSE, VARIANTS, check_a_killed_run, in_process, need_trl, randn, random_ids, random_model,
                     run_stage, seeded)

CPU = Env(torch.device("cpu"))
TOKENIZER = with_chat_tokens(Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"]))  # 261 ids
TOKENIZER.eos_token = CHATML.end


def transformer_for(**changes):
    return random_model(**{"vocab_size": TOKENIZER.vocab_size, "max_seq_len": 96, **changes})


def model_for(**changes) -> RewardModel:
    """One in which every weight matters."""
    return RewardModel.of(transformer_for(**changes), seeded(2)).eval()


def some_pairs(number, seed=0, longest=12, **keys):
    """Made-up preferences, in which the chosen answer is of x and the rejected one of y."""
    rng = random.Random(seed)

    def said(role, letter):
        return [{"role": role, "content": letter * rng.randint(1, longest)}]
    return [{"prompt": said("user", rng.choice("abc")), "chosen": said("assistant", "x"),
             "rejected": said("assistant", "y"), "task": rng.choice(["one", "two"]), **keys}
            for _ in range(number)]


def encoded(number, seed=0, seq_len=63):
    return encode_pairs(some_pairs(number, seed), TOKENIZER, CHATML, seq_len)[1]


def sides_of(pairs):
    return [pair.prompt + side for pair in pairs for side in (pair.chosen, pair.rejected)]


# ---- the loss ----------------------------------------------------------------------------------------------


def test_losses_by_hand():
    chosen, rejected = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([0.0, 1.0, 1.0])
    plain = reward_model_loss(chosen, rejected)
    by_hand = [math.log(2), math.log(1 + math.exp(-1)), math.log(1 + math.exp(2))]
    assert plain.tolist() == pytest.approx(by_hand)
    apart = reward_model_loss(chosen, rejected, margin=torch.tensor([0.0, 1.0, 0.5]))
    assert apart.tolist() == pytest.approx([math.log(2), math.log(2), math.log(1 + math.exp(2.5))])
    centred = reward_model_loss(chosen, rejected, centre=0.1) - plain
    assert centred.tolist() == pytest.approx([0.0, 0.1 * 9, 0.0], abs=1e-7)


def test_only_the_difference_counts_and_centring_alone_knows_where_zero_is():
    chosen, rejected = randn(5), randn(5, seed=1)
    moved = reward_model_loss(chosen + 7, rejected + 7)
    torch.testing.assert_close(moved, reward_model_loss(chosen, rejected), rtol=1e-5, atol=1e-6)
    assert (reward_model_loss(chosen + 7, rejected + 7, centre=0.01) > moved).all()


@pytest.mark.parametrize("apart", [1e4, -1e4])
def test_losses_and_gradients_are_finite_ten_thousand_apart(apart):
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (apart, 0.0))
    loss = reward_model_loss(chosen, rejected)
    loss.sum().backward()
    assert loss.item() == pytest.approx(max(0.0, -apart)) and chosen.grad.isfinite().all()


def test_the_gradient_is_the_probability_of_being_wrong():
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in (0.3, -0.2))
    reward_model_loss(chosen, rejected, margin=0.1).sum().backward()
    wrong = 1 / (1 + math.exp(0.4))
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-wrong, wrong))


# ---- the model ---------------------------------------------------------------------------------------------


def test_a_head_begins_small_by_its_generator_and_the_decoder_is_a_copy():
    base = random_model(dim=256, n_heads=4)
    one, same, other = (RewardModel.of(base, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(one.score.weight, same.score.weight) and not torch.equal(one.score.weight,
                                                                                other.score.weight)
    # 256 draws: their std is that of the normal within three standard errors, 3 / sqrt(2 * 256)
    assert one.score.weight.std().item() == pytest.approx(257 ** -0.5, rel=0.13)
    assert one.score.bias is None and torch.equal(one.model.norm.weight, base.model.norm.weight)
    before = base.model.embed_tokens.weight.clone()
    with torch.no_grad():
        for p in one.parameters():
            p.zero_()
    assert torch.equal(base.model.embed_tokens.weight, before), "the language model's own memory was written"


def test_scores_are_the_head_on_the_hidden_states_in_float32():
    base, ids = transformer_for(), random_ids(2, 9)
    model = RewardModel.of(base)
    expected = base.model(ids) @ model.score.weight[0]
    torch.testing.assert_close(model(ids), expected, **CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(ids)
    assert scores.shape == (2, 9) and scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float()), "rounded to 8 bits: rewards become equal"


def test_a_reward_is_read_at_the_last_real_token_by_hand():
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    assert read_at_end(scores, torch.tensor([3, 1, 2])).tolist() == [3.0, 4.0, 8.0]
    right = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    assert read_at_end(scores, right).tolist() == [3.0, 4.0, 8.0]
    left = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1]]).bool()
    assert read_at_end(scores, left).tolist() == [3.0, 6.0, 9.0]


@pytest.mark.parametrize("fill", [0, 257, 258])  # a letter, and the end token itself
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_any_ids_at_either_side_changes_no_reward(fill, side):
    model, texts = model_for(), sides_of(encoded(3))
    width = max(map(len, texts)) + 3
    ids, real = torch.full((len(texts), width), fill), torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        start = width - len(text) if side == "left" else 0
        ids[row, start:start + len(text)], real[row, start:start + len(text)] = torch.tensor(text), True
    padded = read_at_end(model(ids, mask=real), real)
    alone = torch.stack([model(torch.tensor([text]))[0, -1] for text in texts])
    torch.testing.assert_close(padded, alone, **CLOSE)  # the sums of a batch come in another order
    torch.testing.assert_close(scores_of(model, texts, batch_size=2), alone, **CLOSE)


# ---- batches -----------------------------------------------------------------------------------------------


def test_a_packed_batch_has_the_rewards_of_its_answers_one_by_one_end_tokens_included():
    model, pairs = model_for(), encoded(7)
    *packed, margins = Answers(pairs, range(7), 7, 64).in_order(0)
    inputs, targets, *_ = packed
    assert (inputs[targets != -100] == TOKENIZER.special_tokens["<|im_end|>"]).all()
    assert margins.tolist() == list(range(7))
    alone = scores_of(model, sides_of(pairs)).view(-1, 2)
    torch.testing.assert_close(pair_rewards(model, *packed), alone, **CLOSE)


def test_a_side_that_fills_its_window_is_read_at_its_last_token():
    pairs = encoded(4)
    longest = max(map(len, sides_of(pairs)))
    model, batches = model_for(), Answers(pairs, [0.0] * 4, 4, longest)
    *packed, _ = batches.in_order(0)
    assert packed[0].size(1) == longest
    alone = scores_of(model, sides_of(pairs)).view(-1, 2)
    torch.testing.assert_close(pair_rewards(model, *packed), alone, **CLOSE)


def test_a_margin_goes_where_its_pair_goes_and_belongs_to_what_a_run_is():
    pairs = encoded(10)
    batches, other = Answers(pairs, range(10), 5, 64), Answers(pairs, [0.0] * 10, 5, 64)
    shown = [int(margin) for step in (0, 1) for margin in batches.at(step)[-1]]
    assert shown == [int(i) for i in batches.order(0)] and sorted(shown) == list(range(10))
    assert batches.fingerprint != other.fingerprint


def test_figures_and_loss_of_a_batch_by_hand():
    class Told(torch.nn.Module):
        def forward(self, ids, mask):
            return ids.float()  # a reward is its last token's id

    pairs = [pair._replace(chosen=[a], rejected=[b]) for pair, a, b in zip(encoded(2), (3, 1), (1, 2))]
    loss, count, figures = ranking_loss(Told(), Answers(pairs, [0.5, 0.0], 2, 64).in_order(0), centre=0.01)
    by_hand = math.log(1 + math.exp(-1.5)) + 0.01 * 16 + math.log(1 + math.exp(1)) + 0.01 * 9
    assert count == 2 and loss.item() == pytest.approx(by_hand)
    means = {name: (total / number).item() for name, (total, number) in figures.items()}
    assert means == {"chosen_reward": 2, "rejected_reward": 1.5, "margin": 0.5, "accuracy": 0.5}


# ---- TRL as an oracle --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # TRL and transformers about each other
@pytest.mark.parametrize("centre, margin", [(0.0, False), (0.01, False), (0.1, True)])
def test_through_a_whole_model_a_packed_batch_has_trls_loss_and_gradients(tmp_path, centre, margin):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    need_trl()
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference
    from datasets import Dataset
    ours, pairs = model_for(), encoded(7)
    margins = (torch.rand(7, generator=seeded(5)) if margin else torch.zeros(7)).tolist()
    save_reward_model(ours, TOKENIZER, tmp_path / "model")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    config = RewardConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[],
                          disable_tqdm=True, gradient_checkpointing=False, center_rewards_coefficient=centre,
                          max_length=None)
    told = {"margin": 0.0} if margin else {}
    trainer = RewardTrainer(theirs, args=config, processing_class=AutoTokenizer.from_pretrained(
        tmp_path / "model"), train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c",
                                                               **told}]))
    examples = [{"chosen_ids": pair.prompt + pair.chosen, "rejected_ids": pair.prompt + pair.rejected,
                 **({"margin": m} if margin else {})} for pair, m in zip(pairs, margins)]
    inputs = DataCollatorForPreference(pad_token_id=theirs.config.pad_token_id)(examples)
    expected = trainer.compute_loss(trainer.model, inputs)
    expected.backward()
    loss, count, _ = ranking_loss(ours, Answers(pairs, margins, 7, 64).in_order(0), centre)
    (loss / count).backward()
    assert loss.item() / 7 == pytest.approx(expected.item(), rel=1e-5)
    gradients = dict(trainer.model.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name].grad, rtol=1e-4, atol=1e-5)  # other sums


# ---- what has been learnt ----------------------------------------------------------------------------------


def test_calibration_by_hand():
    rows, error = calibration(torch.tensor([0.8, 0.8, 0.6]), torch.tensor([True, False, False]))
    assert [(row["from"], row["pairs"]) for row in rows] == [(0.6, 1), (0.8, 2)]
    assert (rows[1]["predicted"], rows[1]["came_true"]) == pytest.approx((0.8, 0.5))
    assert error == pytest.approx(2 / 3 * 0.3 + 1 / 3 * 0.6)
    assert calibration(torch.tensor([1.0]), torch.tensor([True]))[1] == 0.0, "1 belongs into the last bin"


def test_probabilities_that_are_right_are_calibrated_and_squared_odds_are_not():
    p = torch.rand(20_000, generator=seeded(0)) / 2 + 0.5
    came_true = torch.rand(20_000, generator=seeded(1)) < p
    # each of 5 bins has 4,000 draws, a standard error of at most 0.008; their mean absolute error is less
    assert calibration(p, came_true)[1] < 0.01
    sure = p ** 2 / (p ** 2 + (1 - p) ** 2)
    assert calibration(sure, came_true)[1] > 0.05


def test_what_rewards_are_worth_by_hand():
    rewards = torch.tensor([[2.0, 0.0], [1.0, 1.5], [0.0, -1.0], [3.0, 1.5]])
    found = judge(rewards, ["a", "b", "a", "b"])
    assert found["accuracy"] == 0.75 and found["accuracy_by_task"] == {"a": 1.0, "b": 0.5}
    losses = [math.log(1 + math.exp(-apart)) for apart in (2, -0.5, 1, 1.5)]
    assert found["loss_nats_per_pair"] == pytest.approx(sum(losses) / 4)
    assert found["rewards"]["all"] == pytest.approx({"mean": 1.0, "std": math.sqrt(11.5 / 8)})
    assert found["rewards"]["chosen"]["mean"] == 1.5 and found["rewards"]["rejected"]["mean"] == 0.5
    assert sum(row["pairs"] for row in found["calibration"]) == 4
    words = reward_model.in_words(found)
    assert "in 75.0% +- 21.7%" in words and "by task: a 100.0%, b 50.0%" in words
    assert reward_model.picture(found["histogram"]).startswith("<svg")


def test_a_histogram_counts_each_reward_once_even_where_all_are_equal():
    bars = histogram(torch.tensor([[0.0, 1.0], [0.5, 0.4], [1.0, 0.0]]), bins=2)
    assert bars["edges"] == [0.0, 0.5, 1.0] and bars["chosen"] == [1, 2] and bars["rejected"] == [2, 1]
    same = histogram(torch.ones(3, 2), bins=4)
    assert sum(same["chosen"]) == sum(same["rejected"]) == 3


# ---- folders, here and in transformers ---------------------------------------------------------------------


def theirs_and_batch(folder, texts, tokenizer=TOKENIZER):
    from transformers import AutoModelForSequenceClassification
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), theirs.config.pad_token_id)
    for row, text in enumerate(texts):
        ids[row, :len(text)] = torch.tensor(text)
    mask = torch.arange(width) < torch.tensor([[len(text)] for text in texts])
    return theirs.eval(), ids, mask


SWITCHES = [*VARIANTS, dict(attention_bias=True, output_bias=False), dict(sliding_window=20)]


@pytest.mark.parametrize("changes", [*SWITCHES, dict(rope_scaling={
    "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 48})], ids=str)
def test_transformers_opens_the_folder_and_gives_unequal_rows_equal_scores(tmp_path, changes):
    ours, texts = model_for(**changes), sides_of(encoded(4))
    ours.mean, ours.std = 0.25, 2.0
    save_reward_model(ours, TOKENIZER, tmp_path)
    theirs, ids, mask = theirs_and_batch(tmp_path, texts)
    assert type(theirs).__name__.endswith("ForSequenceClassification") and theirs.config.num_labels == 1
    with torch.no_grad():
        scores = theirs(ids, attention_mask=mask.long()).logits[:, 0]
        left = torch.stack([row.roll(int((~real).sum())) for row, real in zip(ids, mask)])
        shifted = theirs(left, attention_mask=mask.flip(1).long()).logits[:, 0]
    torch.testing.assert_close(scores, scores_of(ours, texts), **CLOSE)
    torch.testing.assert_close(shifted, scores, **CLOSE)
    again, tokenizer = load_reward_model(tmp_path)
    assert again.config == ours.config and (again.mean, again.std) == (0.25, 2.0)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    torch.testing.assert_close(scores_of(again, texts), scores_of(ours, texts), rtol=0, atol=0)


@pytest.mark.parametrize("name", [family.removesuffix("ForCausalLM") for family in DEFAULTS])
def test_a_folder_that_transformers_has_made_opens_here_with_equal_scores(tmp_path, name):
    import transformers
    config = getattr(transformers, f"{name}Config")(
        vocab_size=261, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=96, num_labels=1, pad_token_id=256, head_dim=8,
        tie_word_embeddings=name == "Llama")
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForSequenceClassification")(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    theirs.save_pretrained(tmp_path)
    ours, texts = load_reward_model(tmp_path)[0], sides_of(encoded(4))
    theirs, ids, mask = theirs_and_batch(tmp_path, texts)
    with torch.no_grad():
        scores = theirs(ids, attention_mask=mask.long()).logits[:, 0]
    torch.testing.assert_close(scores_of(ours, texts), scores, **CLOSE)
    assert (ours.mean, ours.std) == (0.0, 1.0)


def test_the_tokenizer_in_the_folder_pads_so_that_transformers_reads_the_end_token(tmp_path):
    from transformers import AutoTokenizer
    ours = model_for()
    save_reward_model(ours, TOKENIZER, tmp_path)
    texts = ["the<|im_end|>", "the the other<|im_end|>", "a<|im_end|>"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    theirs, *_ = theirs_and_batch(tmp_path, [[1]])
    assert tokenizer.pad_token_id == theirs.config.pad_token_id != theirs.config.eos_token_id
    with torch.no_grad():
        scores = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert all(row[-1] == TOKENIZER.special_tokens["<|im_end|>"] for row in ids)
    torch.testing.assert_close(scores, scores_of(ours, ids), **CLOSE)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda template: template.name)
@pytest.mark.parametrize("stops", [(), ("<|endoftext|>",)])
def test_rows_are_filled_up_with_a_token_that_ends_no_reply(template, stops):
    tokenizer = with_chat_tokens(Tokenizer([], ["<|endoftext|>"]), template)
    tokenizer.stop_ids = tuple(tokenizer.special_tokens[token] for token in stops)
    found = {id: token for token, id in tokenizer.special_tokens.items()}[pad_id(tokenizer)]
    assert found not in (template.end, *stops)
    assert stops or found == "<|endoftext|>", "the usual choice, where it ends no reply"


def test_a_token_for_padding_goes_first_and_where_none_will_do_nothing_is_said():
    padded = Tokenizer([], ["<|endoftext|>", "<|pad|>"])
    assert pad_id(padded) == padded.special_tokens["<|pad|>"]
    assert pad_id(Tokenizer([], ["<|im_end|>"])) is None and pad_id(None) is None


def test_each_kind_of_folder_is_opened_by_its_own_command_and_the_other_says_so(tmp_path):
    save_reward_model(model_for(), TOKENIZER, tmp_path / "reward")
    save_model(transformer_for(), TOKENIZER, tmp_path / "writer")
    for opens in (load_model, open_model):
        with pytest.raises(UserError, match="LlamaForSequenceClassification is a reward model: it scores"):
            opens(tmp_path / "reward")
    with pytest.raises(UserError, match="LlamaForCausalLM is a language model, no reward model; make one"):
        load_reward_model(tmp_path / "writer")
    with pytest.raises(UserError, match="there is no model folder"):
        load_reward_model(tmp_path / "none")


def test_sample_refuses_a_reward_model_in_one_line(tmp_path, monkeypatch, capsys):
    save_reward_model(model_for(), TOKENIZER, tmp_path)
    code, _, err = in_process(monkeypatch, capsys, sample.main, "--model", tmp_path, "--prompt", "a")
    assert code == 2 and "is a reward model" in err.splitlines()[-1], err


@pytest.mark.parametrize("changes, words", [
    ({"id2label": {"0": "a", "1": "b"}}, "sorts texts into 2 labels"),
    ({"id2label": None, "num_labels": 3}, "sorts texts into 3 labels"),
    ({"reward_std": 0}, "config.json is damaged: reward_mean 0.0, reward_std 0"),
    ({"reward_mean": "x"}, "config.json is damaged: reward_mean 'x'"),
    ({"hidden_size": 64}, "config.json implies"),
    ({"architectures": ["BertForSequenceClassification"]}, "BertForSequenceClassification' is not supported"),
    ({"architectures": ["LlamaForTokenClassification"]}, "is not supported"),
])
def test_a_folder_that_is_no_reward_model_of_ours_is_refused_by_name(tmp_path, changes, words):
    save_reward_model(model_for(), TOKENIZER, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(content | changes), "utf-8")
    with pytest.raises(UserError) as error:
        load_reward_model(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- the command -------------------------------------------------------------------------------------------


def settings_for(out, **changes):
    return reward_model.Settings(**{"out": str(out), "seq_len": 64, "batch_size": 4, "steps": 6,
                                    "compile": False, "precision": "fp32", "warmup_steps": 2, **changes})


def loss_with(centre=0.0):
    return functools.partial(ranking_loss, centre=centre)


def test_pairs_are_learnt_by_heart_from_ln_2_on(tmp_path):
    model, batches = model_for(), Answers(encoded(4), [0.0] * 4, 4, 64)
    with torch.no_grad():
        model.score.weight.zero_()
    settings = settings_for(tmp_path / "run", steps=12, lr=0.02, adam_lr=3e-3)
    last = train.train(model, batches, loss_with(), settings, CPU, TOKENIZER)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    assert log[0]["loss_nats_per_pair"] == pytest.approx(math.log(2), rel=1e-5)
    assert last["accuracy"] == 1.0 and last["loss_nats_per_pair"] < 0.3 and last["targets"] == 4


def test_micro_batches_change_nothing(tmp_path):
    logs = []
    for size in (4, 1):
        settings = settings_for(tmp_path / str(size), micro_batch_size=size, steps=3)
        batches = Answers(encoded(10), range(10), size, 64)
        logs.append(train.train(model_for(), batches, loss_with(0.01), settings, CPU, TOKENIZER))
    for name in ("loss_nats_per_pair", "grad_norm", "margin", "chosen_reward"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4, abs=1e-6), name


def test_centring_keeps_rewards_around_zero(tmp_path):
    sums = {}
    for centre in (0.0, 1.0):
        settings = settings_for(tmp_path / str(centre), steps=8, lr=0.01)
        batches = Answers(encoded(8), [0.0] * 8, 4, 64)
        last = train.train(model_for(), batches, loss_with(centre), settings, CPU, TOKENIZER)
        sums[centre] = abs(last["chosen_reward"] + last["rejected_reward"])
    assert sums[1.0] < sums[0.0] / 2, sums


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a model that knows conversations, and one with pairs."""
    folder = tmp_path_factory.mktemp("reward")
    save_model(transformer_for(), TOKENIZER, folder / "sft")
    (folder / "pairs").mkdir()
    for split, number, seed in (("train", 40, 0), ("val", 12, 1)):
        lines = [json.dumps(pair | {"scores": [1.0, i / 100], "margin": i / 50})
                 for i, pair in enumerate(some_pairs(number, seed))]
        (folder / "pairs" / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def arguments(place, out, **changes):
    words = {"init_from": place / "sft", "data": place / "pairs", "out": out, "seq_len": 64, "batch_size": 4,
             "steps": 4, "device": "cpu", "precision": "fp32", "compile": "false", "warmup_steps": 1,
             "save_every": 2, **changes}
    return [word for name, value in words.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda words: in_process(monkeypatch, capsys, reward_model.main, *words)


def test_a_run_leaves_a_reward_model_figures_and_a_picture(place, tmp_path, command):
    code, out, err = command(arguments(place, tmp_path / "run", steps=8, lr=0.01))
    assert code == 0, err
    for words in ("train: 40 pairs", "held out: 12 pairs", "by task: one ", "calibration error", "####"):
        assert words in out, out
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    assert results["accuracy"] == pytest.approx(log[-1]["val_accuracy"])
    assert results["loss_nats_per_pair"] == pytest.approx(log[-1]["val_loss_nats_per_pair"], rel=1e-4)
    assert (tmp_path / "run" / "rewards.svg").read_text("utf-8").startswith("<svg")
    model, tokenizer = load_reward_model(tmp_path / "run")
    held_out = scores_of(model, sides_of(encoded(12, seed=1)))
    scaled = (held_out - model.mean) / model.std  # the very answers that mean and std are of
    assert scaled.mean().item() == pytest.approx(0, abs=1e-5)
    assert scaled.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    [state, *_] = (tmp_path / "run" / "state").glob("step_*8")
    shutil.copy(state / "model.safetensors", state / "weights.tmp")  # a state is a folder of the same kind
    assert torch.equal(load_reward_model(state)[0].score.weight, model.score.weight)


@pytest.mark.parametrize("key", ["scores", "margin"])
def test_margins_are_read_from_the_pairs(place, tmp_path, command, key):
    logs = []
    for name, more in {"plain": {}, "margins": {"margin_from": key, "margin": 2}}.items():
        assert command(arguments(place, tmp_path / name, steps=1, batch_size=40, **more))[0] == 0
        logs.append(json.loads((tmp_path / name / "log.jsonl").read_text("utf-8")))
    margins = [2 * (1 - i / 100) if key == "scores" else 2 * i / 50 for i in range(40)]
    base = RewardModel.of(load_model(place / "sft")[0], seeded(0))
    rewards = scores_of(base, sides_of(encoded(40))).view(-1, 2)
    for log, by_hand in zip(logs, (0.0, torch.tensor(margins))):
        expected = -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - by_hand).mean()
        assert log["loss_nats_per_pair"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # peft about the head that it finds
def test_adapters_and_head_are_learnt_on_a_frozen_base_and_peft_opens_them(place, tmp_path, command):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification
    code, out, err = command(arguments(place, tmp_path / "run", lora_rank=2, lora_alpha=4, lora_lr=0.05))
    assert code == 0 and "and the head" in out, err
    whole, _ = load_reward_model(tmp_path / "run")
    base, _ = load_model(place / "sft")
    assert torch.equal(whole.model.embed_tokens.weight, base.model.embed_tokens.weight), "frozen"
    assert not torch.equal(whole.score.weight, RewardModel.of(base, seeded(0)).score.weight)
    q = "layers.0.self_attn.q_proj"
    assert not torch.equal(whole.model.get_submodule(q).weight, base.model.get_submodule(q).weight)
    theirs = AutoModelForSequenceClassification.from_pretrained(place / "sft", num_labels=1)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "run" / "adapter").eval()
    for text in sides_of(encoded(2)):
        with torch.no_grad():
            score = theirs(torch.tensor([text])).logits[0]
        torch.testing.assert_close(scores_of(whole, [text]), score, **CLOSE)


@pytest.mark.parametrize("more", [{}, dict(lora_rank=2, lora_alpha=4)], ids=str)
def test_stopping_and_going_on_equals_never_stopping_bit_for_bit(place, tmp_path, command, monkeypatch, more):
    assert command(arguments(place, tmp_path / "whole", steps=6, **more))[0] == 0
    at = Answers.at

    def stops(batches, step):
        if step == 3:
            raise KeyboardInterrupt
        return at(batches, step)
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "at", stops)
        assert command(arguments(place, tmp_path / "cut", steps=6, **more))[0] == 130
    assert command(arguments(place, tmp_path / "cut", steps=6, **more))[0] == 0
    for name in ("model.safetensors", "results.json", "config.json"):
        whole, cut = ((tmp_path / run / name).read_bytes() for run in ("whole", "cut"))
        assert whole == cut, name


@pytest.mark.parametrize("changes", [dict(margin=1), dict(centre=0.1), dict(steps=5)], ids=str)
def test_a_run_goes_on_only_with_what_it_began_with(place, tmp_path, command, changes):
    assert command(arguments(place, tmp_path / "run"))[0] == 0
    code, _, err = command(arguments(place, tmp_path / "run", **changes))
    assert code == 2 and "--overwrite" in err, err


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """What one process learns, asked for once."""
    @functools.cache
    def log(**settings):
        out = tmp_path_factory.mktemp("alone") / "run"
        return run_stage("reward_model.py", arguments(place, out, **settings)), load_reward_model(out)[0]
    return log


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"data_parallel": "fsdp"},
                                    {"data_parallel": "fsdp", "lora_rank": 2, "lora_alpha": 4}], ids=str)
def test_two_processes_learn_what_one_does(alone, place, tmp_path, layout):
    (one, model) = alone(**{name: value for name, value in layout.items() if name.startswith("lora")})
    two = run_stage("reward_model.py", arguments(place, tmp_path / "two", **layout), processes=2)
    for a, b in zip(one, two, strict=True):
        for name in ("loss_nats_per_pair", "grad_norm", "margin", "chosen_reward"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), "float32 sums in another order"
    other, _ = load_reward_model(tmp_path / "two")
    assert (model.mean, model.std) == pytest.approx((other.mean, other.std), rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_killed_goes_on_and_ends_in_the_same_bytes(place, tmp_path):
    common = dict(steps=12, save_every=2, data_parallel="fsdp")
    check_a_killed_run("reward_model.py", lambda out: arguments(place, out, **common), tmp_path)


# ---- when something is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    (dict(margin=-1), "--margin -1.0 is out of range"),
    (dict(centre="nan"), "is not a finite number"),
    (dict(margin_from="scores"), "--margin_from scores is weighted by --margin, which is 0; pass --margin 1"),
    (dict(margin_from="scores", margin=1, data="{tmp}/good.jsonl", val_share=0.3),
     'good.jsonl:1: "scores" is None, and --margin_from scores needs two numbers'),
    (dict(tensor_parallel=2), "--tensor_parallel 2 does not know a reward model's head"),
    (dict(lora_rank=2, quantize="nf4"), "--quantize nf4 is not for reward models"),
    (dict(lora_alpha=4), "--lora_alpha 4.0 is for adapters"),
    (dict(val_share=0.3), "--val_share 0.3 is for a single file, and --data "),
    (dict(chunked_loss="false"), "--no-chunked_loss is about logits, and a reward model has none"),
    (dict(seq_len=200), "seq_len 200 exceeds max_seq_len 96"),
    (dict(seq_len=16), "train.jsonl:1: its prompt has 26 tokens, and the window --seq_len 15"),
    (dict(init_from="{tmp}/none"), "there is no model folder"),
    (dict(init_from="{tmp}/reward"), "is a reward model: it scores texts and writes none"),
    (dict(init_from="{tmp}/plain"), "does not know <|im_start|> <|im_end|> of the template chatml; first: p"),
    (dict(init_from="{tmp}/bare"), "has no tokenizer.json"),
    (dict(data="{tmp}/none.jsonl"), "there is no "),
    (dict(data="{tmp}"), "train.jsonl; --data is a file of preferences, or a folder"),
    (dict(data="{tmp}/key.jsonl"), "key.jsonl:2: prompt, chosen: that is no preference; expected are"),
    (dict(micro_batch_size=3), "does not divide"),
])
def test_mistakes_end_in_one_line_and_code_2_before_a_run_is_begun(place, tmp_path, command, changes, words):
    good = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})
    (tmp_path / "good.jsonl").write_text("\n".join([good] * 9), "utf-8")
    (tmp_path / "key.jsonl").write_text("\n".join([good, '{"prompt": "q", "chosen": "a"}']), "utf-8")
    save_reward_model(model_for(), TOKENIZER, tmp_path / "reward")
    save_model(transformer_for(), None, tmp_path / "bare")
    plain = Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"])
    save_model(transformer_for(vocab_size=259), plain, tmp_path / "plain")
    changes = {name: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
               for name, value in changes.items()}
    code, _, err = command(arguments(place, tmp_path / "run", **changes))
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and words in last, err[-2000:]
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_default_model_that_is_missing_is_named_with_its_command(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command([])
    assert code == 2 and "there is no runs/sft, the model to begin with; make it with: python sft.py" in err
