"""dpo.py: the losses beside TRL's, log-probabilities of answers, the reference in three ways, runs."""
import functools
import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dpo
import rejection
import train
from bpe import Tokenizer
from chat import CHATML, with_chat_tokens
from checkpoint import load_model, save_model
from config import UserError
from dpo import KINDS, Pairs, dpo_loss, preference_loss, sequence_logps
from lora import add_lora
from objectives import token_logps
from parallel import Env
from preferences import Pair, encode_pairs
from support import (check_a_killed_run, in_process, need_trl, randn, random_ids, random_model, run_stage,
                     seeded)

CPU = Env(torch.device("cpu"))
TOKENIZER = with_chat_tokens(Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"]))  # 261 ids


def model_for(**changes):
    return random_model(**{"vocab_size": TOKENIZER.vocab_size, "max_seq_len": 96, **changes})


def some_pairs(number, seed=0, longest=12):
    """Made-up preferences, in which the chosen answer is of x and the rejected one of y."""
    rng = random.Random(seed)

    def said(role, letter):
        return [{"role": role, "content": letter * rng.randint(1, longest)}]
    return [{"prompt": said("user", rng.choice("abc")), "chosen": said("assistant", "x"),
             "rejected": said("assistant", "y")} for _ in range(number)]


def encoded(number, seed=0, seq_len=64):
    return encode_pairs(some_pairs(number, seed), TOKENIZER, CHATML, seq_len)[1]


def settings_for(tmp_path, **changes):
    return dpo.Settings(**{"out": str(tmp_path / "run"), "seq_len": 64, "batch_size": 4, "steps": 6,
                           "compile": False, "precision": "fp32", "warmup_steps": 2, "questions": 0,
                           **changes})


# ---- the losses: by hand, and what holds for all -----------------------------------------------------------

LENGTHS = dict(chosen_lengths=torch.tensor([2.0]), rejected_lengths=torch.tensor([4.0]))


def sigma(x):
    return 1 / (1 + math.exp(-x))


# the chosen answer: -3 nats, and -5 under the reference; the rejected: -8 and -4; so log-ratios 2 and -4
BY_HAND = {
    ("sigmoid", 0.5, 0.0): -math.log(sigma(0.5 * 6)),
    ("sigmoid", 0.5, 0.1): -0.9 * math.log(sigma(3)) - 0.1 * math.log(sigma(-3)),
    ("robust", 0.5, 0.1): (-0.9 * math.log(sigma(3)) + 0.1 * math.log(sigma(-3))) / 0.8,
    ("hinge", 0.1, 0.0): 1 - 0.1 * 6,
    ("hinge", 0.5, 0.0): 0.0,
    ("ipo", 0.5, 0.0): (6 - 1) ** 2,
    ("ipo_norm", 0.5, 0.0): (2 / 2 + 4 / 4 - 1) ** 2,
    ("sigmoid_norm", 0.5, 0.0): -math.log(sigma(0.5 * (2 / 2 + 4 / 4))),
    ("dpop", 0.5, 0.0): -math.log(sigma(3)),  # the chosen one is likelier than under the reference
    ("simpo", 2.0, 0.0): -math.log(sigma(2 * (-3 / 2 + 8 / 4) - 0.5)),
    ("apo_zero", 0.5, 0.0): 1 - sigma(1) + sigma(-2),
    ("apo_down", 0.5, 0.0): sigma(1) + 1 - sigma(3),
    ("sppo_hard", 0.5, 0.0): (2 - 1) ** 2 + (-4 + 1) ** 2,
    ("bco_pair", 0.5, 0.0): -math.log(sigma(1)) - math.log(sigma(2)),
    ("nca_pair", 0.5, 0.0): -math.log(sigma(1)) - 0.5 * math.log(sigma(-1)) - 0.5 * math.log(sigma(2)),
    ("exo_pair", 0.5, 0.1): sigma(3) * math.log(sigma(3) / 0.9) + sigma(-3) * math.log(sigma(-3) / 0.1),
    ("orpo", 0.5, 0.0): 3 / 2 - 0.5 * math.log(sigma(math.log(math.exp(-1.5) / (1 - math.exp(-1.5)))
                                                     - math.log(math.exp(-2) / (1 - math.exp(-2))))),
}


def test_each_kind_has_a_value_worked_by_hand():
    assert {kind for kind, _, _ in BY_HAND} == set(KINDS)


@pytest.mark.parametrize("kind, beta, smoothing", BY_HAND)
def test_losses_by_hand(kind, beta, smoothing):
    numbers = (torch.tensor([x]) for x in (-3.0, -8.0, -5.0, -4.0))
    losses, chosen, rejected = dpo_loss(*numbers, beta, smoothing, kind, **LENGTHS)
    assert losses.tolist() == pytest.approx([BY_HAND[kind, beta, smoothing]], rel=1e-5)
    ratios = {"ipo_norm": (1, -1), "sigmoid_norm": (1, -1), "simpo": (-1.5, -2), "orpo": (-1.5, -2)}
    c, r = ratios.get(kind, (2, -4))
    assert (chosen.item(), rejected.item()) == pytest.approx((beta * c, beta * r))


def test_rewards_are_beta_times_the_log_ratios_without_gradient_and_the_loss_is_of_their_difference():
    numbers = [torch.tensor([x], requires_grad=True) for x in (-3.0, -8.0, -5.0, -4.0)]
    losses, chosen, rejected = dpo_loss(*numbers, beta=0.5)
    assert (chosen.item(), rejected.item()) == (0.5 * 2, 0.5 * -4)
    assert not chosen.requires_grad and not rejected.requires_grad and losses.requires_grad
    assert losses.item() == pytest.approx(-math.log(sigma(chosen.item() - rejected.item())), rel=1e-5)


def at_difference(h, **changes):
    """The loss of a pair whose log-ratios differ by h, and its gradient by the chosen answer's."""
    policy = torch.tensor([-4.0 + h], requires_grad=True)
    losses, *_ = dpo_loss(policy, torch.tensor([-5.0]), torch.tensor([-3.0]), torch.tensor([-4.0]), **changes)
    losses.sum().backward()
    return losses.item(), policy.grad.item()


def test_a_pair_far_the_wrong_way_round_costs_its_distance_and_is_pulled_with_all_of_beta():
    assert at_difference(-20_000.0, beta=0.1) == pytest.approx((2000, -0.1)), "log(sigmoid(x)) is log(0)"
    assert at_difference(20_000.0, beta=0.1) == (0, 0)


def test_the_hinge_is_a_straight_line_up_to_a_margin_of_1_and_nothing_beyond():
    found = [at_difference(h, beta=0.5, kind="hinge") for h in (-4.0, 0.0, 1.0, 3.0)]
    assert found == [(3, -0.5), (1, -0.5), (0.5, -0.5), (0, 0)]


def test_ipo_wants_a_difference_of_1_over_2_beta_and_charges_the_square_of_what_lies_between():
    found = [at_difference(h, beta=0.25, kind="ipo") for h in (-1.0, 0.0, 2.0, 5.0)]
    assert found == [(9, -6), (4, -4), (0, 0), (9, 6)], "of h itself: beta only sets where it shall be"


def test_positive_dpo_charges_a_chosen_answer_that_fell_below_the_reference():
    fallen = [torch.tensor([x]) for x in (-6.0, -12.0, -5.0, -4.0)]  # log-ratios -1 and -8
    losses, *_ = dpo_loss(*fallen, 0.1, kind="dpop", gamma=5.0)
    assert losses.item() == pytest.approx(-math.log(sigma(0.1 * (7 - 5 * 1))))
    assert losses > dpo_loss(*fallen, 0.1)[0]


def random_logps(number=6, seed=0):
    """policy_chosen, policy_rejected, reference_chosen, reference_rejected: leaves, all different."""
    return [(-20 * torch.rand(number, generator=seeded(seed + i))).requires_grad_() for i in range(4)]


def lengths_for(number):
    return dict(chosen_lengths=torch.arange(1.0, number + 1),
                rejected_lengths=torch.arange(number + 1.0, 1.0, -1))


def test_at_the_start_the_loss_is_ln_2_and_its_gradient_is_not_zero():
    logps = torch.tensor([-7.0, -0.5], requires_grad=True)
    same = logps.detach()
    losses, chosen, rejected = dpo_loss(logps, same - 1, same, same - 1, beta=0.3)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert not chosen.any() and not rejected.any()
    losses.sum().backward()
    assert logps.grad.tolist() == pytest.approx([-0.3 / 2] * 2), "beta / 2 towards the chosen answer (Eq. 7)"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_losses_and_gradients_are_finite_at_log_ratios_of_ten_thousand(kind, size):
    far = [torch.tensor([x], requires_grad=True) for x in (-2e4 + size, -2e4 - size)]
    reference = [torch.tensor([-2e4])] * 2
    losses, *_ = dpo_loss(*far, *reference, 0.1, kind=kind, **LENGTHS)
    losses.sum().backward()
    assert losses.isfinite().all() and all(x.grad.isfinite().all() for x in far)


def test_conservative_dpo_is_the_mean_over_labels():
    numbers, eps = random_logps(), 0.2
    right = dpo_loss(*numbers)[0]
    swapped = dpo_loss(numbers[1], numbers[0], numbers[3], numbers[2])[0]
    smooth = dpo_loss(*numbers, label_smoothing=eps)[0]
    torch.testing.assert_close(smooth, (1 - eps) * right + eps * swapped)


def test_robust_dpo_is_unbiased():
    numbers, eps = random_logps(), 0.2
    right = dpo_loss(*numbers)[0]
    robust = dpo_loss(*numbers, label_smoothing=eps, kind="robust")[0]
    flipped = dpo_loss(numbers[1], numbers[0], numbers[3], numbers[2], label_smoothing=eps, kind="robust")[0]
    expected = (1 - eps) * robust + eps * flipped  # over labels that are wrong with chance eps
    torch.testing.assert_close(expected, right, rtol=1e-5, atol=1e-5)  # float32: a difference over 0.6


@pytest.mark.parametrize("changes, words", [(dict(kind="dp"), "is not one of sigmoid, hinge"),
                                            (dict(beta=0.0), "--beta 0.0 is out of range"),
                                            (dict(beta=-1.0), "--beta -1.0 is out of range")])
def test_a_loss_without_meaning_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        dpo_loss(*random_logps(), **changes)


# ---- TRL as an oracle --------------------------------------------------------------------------------------

IN_TRL = {kind: kind for kind in ("sigmoid", "hinge", "robust", "sigmoid_norm", "exo_pair", "nca_pair",
                                  "bco_pair", "sppo_hard", "apo_zero", "apo_down")} | {"ipo_norm": "ipo"}


@pytest.fixture(scope="session")
def peer(tmp_path_factory):
    """A DPOTrainer of TRL on a model of ours in transformers; tests set its losses and reference."""
    need_trl()
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    folder = tmp_path_factory.mktemp("peer")
    save_model(model_for(), TOKENIZER, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = DPOConfig(output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to=[],
                       max_length=None, disable_tqdm=True, label_smoothing=0.1, gradient_checkpointing=False)
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")
    return DPOTrainer(model, AutoModelForCausalLM.from_pretrained(folder), args=config, train_dataset=data,
                      processing_class=tokenizer)


def peer_loss(peer, model, inputs, kind, beta, reference=None):
    peer.loss_types, peer.loss_weights, peer.beta = [IN_TRL[kind]], [1.0], beta
    peer.precompute_ref_logps = reference is not None
    if reference is not None:
        inputs = inputs | {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    return peer._compute_loss(model, inputs, return_outputs=False)


@pytest.mark.filterwarnings("ignore")  # TRL and transformers about each other
@pytest.mark.parametrize("kind", IN_TRL)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_each_kind_has_trls_values_and_gradients_on_random_numbers(peer, kind, beta):
    numbers, number = random_logps(6), 6
    completion = torch.zeros(2 * number, 8, dtype=torch.long)
    for row, length in enumerate(torch.cat(list(lengths_for(number).values())).long()):
        completion[row, 1:1 + length] = 1
    per_token = torch.zeros(2 * number, 7)  # the whole sum stands on the first token

    def fake(**_):
        logps = per_token.index_put((torch.arange(2 * number), torch.zeros(2 * number, dtype=torch.long)),
                                    torch.cat(numbers[:2]))
        return SimpleNamespace(log_probs=logps, entropy=per_token, mean_logits=per_token,
                               is_top1=per_token > 0)
    inputs = {"input_ids": completion, "attention_mask": completion, "completion_mask": completion}
    theirs = peer_loss(peer, fake, inputs, kind, beta, [x.detach() for x in numbers[2:]])
    smoothing = 0.1 if kind in ("robust", "exo_pair") else 0.0  # their "sigmoid" has none any more
    ours = dpo_loss(*numbers[:2], *(x.detach() for x in numbers[2:]), beta, smoothing, kind,
                    **lengths_for(number))[0].mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for mine, other in zip(torch.autograd.grad(ours, numbers[:2]), torch.autograd.grad(theirs, numbers[:2])):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def padded(pairs):
    """The rows of TRL's collator: all chosen sides, then all rejected ones, padded on the right."""
    rows = [(pair.prompt + pair.chosen, len(pair.prompt)) for pair in pairs]
    rows += [(pair.prompt + pair.rejected, len(pair.prompt)) for pair in pairs]
    width = max(len(ids) for ids, _ in rows)
    inputs = {name: torch.zeros(len(rows), width, dtype=torch.long)
              for name in ("input_ids", "attention_mask", "completion_mask")}
    for row, (ids, prompt) in enumerate(rows):
        inputs["input_ids"][row, :len(ids)] = torch.tensor(ids)
        inputs["attention_mask"][row, :len(ids)] = 1
        inputs["completion_mask"][row, prompt:len(ids)] = 1
    return inputs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sigmoid", "ipo_norm", "nca_pair", "sigmoid_norm"])
def test_through_a_whole_model_a_packed_batch_has_trls_loss_and_gradients(peer, tmp_path, kind):
    pairs = encoded(7)
    reference = [-30 * torch.rand(7, generator=seeded(i)) for i in (1, 2)]
    peer.model.zero_grad()
    theirs = peer_loss(peer, peer.model, padded(pairs), kind, 0.1, reference)
    theirs.backward()
    model, batches = model_for(), Pairs(pairs, 7, 64)
    batches.reference = torch.stack(reference, dim=1)
    settings = settings_for(tmp_path, kind=kind)
    loss, count, _ = preference_loss(model, batches.in_order(0), settings)
    (loss / count).backward()
    assert count == 7 and loss.item() / 7 == pytest.approx(theirs.item(), rel=1e-5)
    expected = dict(peer.model.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-4, atol=1e-5)  # sums in another order


@pytest.mark.filterwarnings("ignore")
def test_simpo_and_orpo_have_trls_values_and_gradients():
    need_trl()
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    numbers, beta = random_logps()[:2], 2.0
    lengths = lengths_for(6)
    means = [x / length for x, length in zip(numbers, lengths.values())]
    place = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), alpha=0.0, loss_type="simpo",
                            simpo_gamma=0.5, beta=beta, label_smoothing=0.0)
    odds_ratio = ORPOTrainer.odds_ratio_loss(place, *means)[0]
    theirs = {"simpo": CPOTrainer.cpo_loss(place, *means)[0],
              "orpo": -odds_ratio - means[0]}  # and the likelihood (their Eq. 6)
    for kind, expected in theirs.items():
        ours = dpo_loss(*numbers, beta=beta, kind=kind, **lengths)[0]
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        for mine, other in zip(torch.autograd.grad(ours.sum(), numbers, retain_graph=True),
                               torch.autograd.grad(expected.sum(), numbers, retain_graph=True)):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


# ---- log-probabilities of answers --------------------------------------------------------------------------


def plain_logps(model, ids, mask):
    """By hand: log-softmax in float32, the answer's tokens picked and summed."""
    logps = model(ids).float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return (logps * mask[:, 1:]).sum(1)


def rows_with_answers():
    """ids (3, 20), mask: answers of 1, 5 and 9 tokens, padding behind them."""
    ids, mask = random_ids(3, 20), torch.zeros(3, 20, dtype=torch.bool)
    for row, (start, end) in enumerate([(3, 4), (7, 12), (2, 11)]):
        mask[row, start:end] = True
    return ids, mask


def test_an_answers_log_probability_is_the_sum_over_its_tokens_alone():
    model, (ids, mask) = random_model(), rows_with_answers()
    logps = sequence_logps(model, ids, mask)
    torch.testing.assert_close(logps, plain_logps(model, ids, mask))
    loss = F.cross_entropy(model(ids[:1, :3])[0, -1:], ids[0, 3:4])  # an answer of one token
    assert logps[0].item() == pytest.approx(-loss.item(), rel=1e-5)


def test_its_gradients_are_those_of_the_plain_form():
    gradients = []
    for function in (sequence_logps, plain_logps):
        model, (ids, mask) = random_model(tie_embeddings=True), rows_with_answers()
        (function(model, ids, mask) * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, plain in zip(*gradients):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows, vocab_size", [(1, 7), (300, 33), (600, 4096)])  # 600: parts, the last ragged
def test_log_probabilities_without_all_logits_equal_log_softmax_in_float64(rows, vocab_size):
    from objectives import LinearLogps
    hidden = randn(rows, 16, seed=1).double().requires_grad_()
    weight = randn(vocab_size, 16, seed=2).double().requires_grad_()
    targets, scales = torch.randint(vocab_size, (rows,), generator=seeded(3)), randn(rows, seed=4).double()
    plain = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ours = LinearLogps.apply(hidden, weight, None, 0, targets)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad((plain * scales).sum(), (hidden, weight))
    for gradient, right in zip(torch.autograd.grad((ours * scales).sum(), (hidden, weight)), expected):
        torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-12)


def test_log_probabilities_come_in_the_order_of_the_targets():
    model, ids = random_model(), random_ids(2, 9)
    targets = torch.full((2, 8), -100)
    targets[0, 5], targets[1, 2] = ids[0, 6], ids[1, 3]
    one, other = token_logps(model, ids[:, :-1], targets).tolist()
    logps = model(ids).log_softmax(-1)
    assert one == pytest.approx(logps[0, 5, ids[0, 6]].item(), rel=1e-5)
    assert other == pytest.approx(logps[1, 2, ids[1, 3]].item(), rel=1e-5)


def test_padding_and_batch_mates_change_nothing():
    model, (ids, mask) = random_model(), rows_with_answers()
    before = sequence_logps(model, ids, mask)
    ids[0, 4:], ids[2, 11:] = 0, 7  # behind the answers
    ids[1] = ids[1].flip(0)
    assert torch.equal(sequence_logps(model, ids, mask)[[0, 2]], before[[0, 2]])
    alone = sequence_logps(model, ids[:1, :4], mask[:1, :4])
    torch.testing.assert_close(alone, before[:1])  # float32 kernels by shape


# ---- batches -----------------------------------------------------------------------------------------------


def test_packed_pairs_have_the_log_probabilities_of_their_sides_one_by_one():
    pairs, model = encoded(9), model_for(qk_norm=True)
    batches = Pairs(pairs, 4, 64)
    found = torch.cat([dpo.pair_logps(model, *batches.in_order(step)[:4])[0]
                       for step in range(batches.steps)])
    assert found.shape == (9, 2)
    for i, pair in enumerate(pairs):
        for side, ids in enumerate((pair.chosen, pair.rejected)):
            row = torch.tensor([pair.prompt + ids])
            mask = torch.arange(row.size(1))[None] >= len(pair.prompt)
            alone = sequence_logps(model, row, mask)
            torch.testing.assert_close(found[i, side], alone[0], rtol=1e-5, atol=1e-5)  # other shapes


def test_a_batch_holds_each_side_once_behind_its_prompt_and_no_window_is_too_full():
    pairs = encoded(12)
    batches = Pairs(pairs, 12, 64)
    inputs, targets, documents, sides, reference = batches.in_order(0)
    assert inputs.shape[1] == 64 and sorted(sides.tolist()) == list(range(24)) and reference.shape == (12, 2)
    total = sum(len(pair.prompt + side) - 1 for pair in pairs for side in (pair.chosen, pair.rejected))
    assert (documents > 0).sum() == total
    for number, side in enumerate(sides.tolist(), start=1):
        pair = pairs[side // 2]
        ids = pair.prompt + (pair.rejected if side % 2 else pair.chosen)
        assert inputs[documents == number].tolist() == ids[:-1]
        learnt = targets[documents == number]
        assert learnt[learnt != -100].tolist() == ids[len(pair.prompt):], "the answer, its end, nothing else"


def test_an_epoch_takes_each_pair_once_whatever_the_processes():
    pairs = [Pair([i + 1] * 8, [i + 1], [i + 1, 0], [True], [True] * 2) for i in range(8)]
    one = Pairs(pairs, 4, 32, seed=3)
    two = [Pairs(pairs, 2, 32, seed=3, rank=rank, world_size=2) for rank in range(2)]

    def seen(batch):
        return sorted(set(batch[0][batch[2] > 0].tolist()))
    for step in range(4):
        assert seen(one.at(step)) == sorted(sum((seen(half.at(step)) for half in two), []))
    assert seen(one.at(0)) + seen(one.at(1)) != list(range(1, 9)) and \
        sorted(seen(one.at(0)) + seen(one.at(1))) == list(range(1, 9))


def test_the_reference_of_a_pair_goes_where_the_pair_goes():
    batches = Pairs(encoded(10), 5, 64, seed=1)
    batches.reference = torch.arange(20.0).view(10, 2)
    order = batches.order(0)
    assert torch.equal(batches.at(1)[4], batches.reference[order[5:].tolist()])


def test_past_the_end_of_an_evaluation_there_are_no_pairs(tmp_path):
    batches = Pairs(encoded(3), 2, 64, rank=1, world_size=2)
    loss, count, figures = preference_loss(model_for(), batches.in_order(1), settings_for(tmp_path))
    assert count == 0 and loss == 0 and all(total == 0 for total, _ in figures.values())


# ---- what is watched ---------------------------------------------------------------------------------------


def test_figures_by_hand():
    policy, reference = torch.tensor([[-4.0, -8.0], [-9.0, -2.0]]), torch.tensor([[-5.0, -5.0], [-6.0, -1.0]])
    lengths, beta = torch.tensor([[2, 4], [3, 1]]), 0.5
    _, chosen, rejected = dpo_loss(*policy.unbind(1), *reference.unbind(1), beta)
    means = {name: (total / count).item() for name, (total, count) in
             dpo.figures(policy, reference, lengths, chosen, rejected).items()}
    # log-ratios: 1 and -3; -3 and -1
    assert means == pytest.approx({
        "chosen_reward": 0.5 * (1 - 3) / 2, "rejected_reward": 0.5 * (-3 - 1) / 2,
        "margin": 0.5 * ((1 + 3) + (-3 + 1)) / 2, "accuracy": 0.5,
        "log_gradient_ratio": ((-3 - 1) + (-1 + 3)) / 2, "chosen_below_reference": 0.5,
        "chosen_logp_nats_per_token": -13 / 5, "rejected_logp_nats_per_token": -10 / 5})


def test_the_logged_ratio_is_that_of_the_losss_gradients():
    """Feng et al.: with x = pi / pi_ref, (dL/dx_chosen) / (dL/dx_rejected) = -x_rejected / x_chosen."""
    x = torch.tensor([[0.7, 0.2]], dtype=torch.float64, requires_grad=True)
    losses, *_ = dpo_loss(*x.log().unbind(1), torch.zeros(1), torch.zeros(1), beta=0.3)
    losses.sum().backward()
    ratios = x.detach().log()
    found = dpo.figures(ratios, torch.zeros(1, 2), torch.ones(1, 2), ratios[:, 0], ratios[:, 1])
    total, _ = found["log_gradient_ratio"]
    assert (-x.grad[0, 0] / x.grad[0, 1]).log().item() == pytest.approx(total.item())


def test_kinds_without_a_reference_log_nothing_about_one(tmp_path):
    settings = settings_for(tmp_path, kind="simpo", beta=2.0)
    assert settings.reference is None
    _, _, figures = preference_loss(model_for(), Pairs(encoded(3), 3, 64).in_order(0), settings)
    assert "accuracy" in figures and "log_gradient_ratio" not in figures


def test_the_likelihood_of_the_chosen_answer_can_be_kept_up(tmp_path):
    pairs, model = encoded(4), model_for()
    batch = Pairs(pairs, 4, 64).in_order(0)
    plain, weighted = (preference_loss(model, batch, settings_for(tmp_path, nll_weight=weight))[0]
                       for weight in (0.0, 0.2))
    logps, lengths = dpo.pair_logps(model, *batch[:4])
    by_hand = -0.2 * (logps[:, 0] / lengths[:, 0]).sum().item()
    assert (weighted - plain).item() == pytest.approx(by_hand, rel=1e-4)  # float32: of a difference


def test_the_divergence_from_itself_is_zero_and_from_another_what_the_log_probabilities_say():
    model, other, prompts = model_for(), model_for(), [[5, 6, 7], [8, 9]]
    with torch.no_grad():
        other.lm_head.weight.add_(0.1 * randn(*other.lm_head.weight.shape, seed=9))
    drawn = rejection.sample_replies(model, prompts, TOKENIZER, 259, 4, 10, generator=seeded(0))
    for prompt, replies in zip(prompts, drawn):
        for reply in replies:
            reply["prompt"] = prompt
    assert dpo.divergence(drawn, model, "cpu")[0] == pytest.approx(0, abs=1e-4)
    by_hand = []
    for reply in (reply for replies in drawn for reply in replies):
        ids = torch.tensor([reply["prompt"] + reply["ids"]])
        mask = torch.arange(ids.size(1))[None] >= len(reply["prompt"])
        by_hand.append((sequence_logps(model, ids, mask) - sequence_logps(other, ids, mask)).item())
    mean, error = dpo.divergence(drawn, other, "cpu")
    assert mean == pytest.approx(sum(by_hand) / 8, abs=1e-3) and error > 0


# ---- the reference, three ways -----------------------------------------------------------------------------


def reference_of(kind, pairs, tmp_path, folder):
    """The rewards that a trained policy has where the reference comes from there."""
    torch.manual_seed(0)
    model = load_model(folder)[0]
    add_lora(model, 4, generator=seeded(0))
    batches = Pairs(pairs, 5, 64)
    settings = settings_for(tmp_path, reference=kind, lora_rank=4)
    reference = load_model(folder)[0] if kind == "model" else None
    if kind == "stored":
        dpo.stored_reference(model.eval, {"train": batches}, tmp_path / "r.safetensors", {"model": "m"}, CPU)
    generator = seeded(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=generator)
    return preference_loss(model, batches.in_order(0), settings, reference)


def test_a_second_model_stored_values_and_the_adapter_switched_off_are_one_reference(tmp_path):
    save_model(model_for(), TOKENIZER, tmp_path / "base")
    pairs = encoded(5)
    found = {kind: reference_of(kind, pairs, tmp_path, tmp_path / "base")
             for kind in ("model", "stored", "adapter")}
    losses = {kind: loss.item() / 5 for kind, (loss, _, _) in found.items()}
    assert losses["model"] != pytest.approx(math.log(2), abs=1e-2), "the policy has moved"
    for kind in ("stored", "adapter"):
        assert losses[kind] == pytest.approx(losses["model"], rel=1e-6)
        margin, expected = (found[name][2]["margin"][0].item() for name in (kind, "model"))
        assert margin == pytest.approx(expected, rel=1e-5)  # a difference of sums


def test_no_gradient_goes_through_the_reference(tmp_path):
    reference, model = model_for(), model_for()
    loss, *_ = preference_loss(model, Pairs(encoded(3), 3, 64).in_order(0),
                               settings_for(tmp_path, reference="model"), reference)
    loss.backward()
    assert all(p.grad is None for p in reference.parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.parameters())
    assert loss.item() / 3 == pytest.approx(math.log(2), rel=1e-6)


def test_stored_values_are_read_again_and_those_of_other_pairs_or_weights_refused(tmp_path):
    path, known = tmp_path / "reference-x.safetensors", {"model": "m", "pairs": "p"}
    first, asked = Pairs(encoded(5), 2, 64), []
    dpo.stored_reference(lambda: asked.append(1) or model_for(), {"train": first}, path, known, CPU)
    again = Pairs(encoded(5), 2, 64)
    dpo.stored_reference(lambda: asked.append(1) or model_for(), {"train": again}, path, known, CPU)
    assert asked == [1] and torch.equal(first.reference, again.reference) and first.reference.any()
    for what in known:
        with pytest.raises(UserError, match=f"with other {what} than these; delete it, and the same command"):
            dpo.stored_reference(model_for, {"train": again}, path, known | {what: "other"}, CPU)


def loss_with(settings):
    return functools.partial(preference_loss, settings=settings)


# ---- learning ----------------------------------------------------------------------------------------------


def test_pairs_are_learnt_by_heart(tmp_path):
    model, batches = model_for(), Pairs(encoded(4), 4, 64)
    settings = settings_for(tmp_path, steps=12, lr=0.02, adam_lr=3e-3)
    dpo.stored_reference(model.eval, {"train": batches}, tmp_path / "r.safetensors", {}, CPU)
    last = train.train(model, batches, loss_with(settings), settings, CPU, TOKENIZER)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text("utf-8").splitlines()]
    assert log[0]["loss_nats_per_pair"] == pytest.approx(math.log(2), rel=1e-5)
    assert last["accuracy"] == 1.0 and last["loss_nats_per_pair"] < 0.4 and last["margin"] > 0.5
    assert last["targets"] == 4, "pairs are counted, not tokens"
    tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in batches.pairs)
    assert last["tokens"] == 12 * tokens


def test_micro_batches_change_nothing(tmp_path):
    logs = []
    for size in (4, 1):
        model, settings = model_for(), settings_for(tmp_path / str(size), micro_batch_size=size, steps=3)
        batches = Pairs(encoded(10), size, 64)
        dpo.stored_reference(model.eval, {"train": batches}, tmp_path / f"r{size}.safetensors", {}, CPU)
        logs.append(train.train(model, batches, loss_with(settings), settings, CPU))
    for name in ("loss_nats_per_pair", "grad_norm", "margin", "chosen_logp_nats_per_token"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4, abs=1e-6), name


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a model that knows conversations, and one with pairs."""
    folder = tmp_path_factory.mktemp("dpo")
    model = model_for()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)  # a random model that is less sure
    save_model(model, TOKENIZER, folder / "sft")
    (folder / "pairs").mkdir()
    for split, number, seed in (("train", 40, 0), ("val", 12, 1)):
        lines = [json.dumps(pair) for pair in some_pairs(number, seed)]
        (folder / "pairs" / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    asked = [{"messages": [*pair["prompt"], *pair["chosen"]]} for pair in some_pairs(4, 2)]
    (folder / "pairs" / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)), "utf-8")
    return folder


def arguments(place, out, **changes):
    words = {"init_from": place / "sft", "data": place / "pairs", "out": out, "seq_len": 64, "batch_size": 4,
             "steps": 4, "device": "cpu", "precision": "fp32", "compile": "false", "warmup_steps": 1,
             "questions": 4, "max_new_tokens": 8, "samples_of_questions": 2, "save_every": 2, **changes}
    return [word for name, value in words.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda words: in_process(monkeypatch, capsys, dpo.main, *words)


def test_a_run_tells_before_and_after_and_leaves_a_model_figures_and_a_picture(place, tmp_path, command):
    code, out, err = command(arguments(place, tmp_path / "run"))
    assert code == 0, err
    for words in ("train: 40 pairs", "loss, nats a pair", "pairs whose chosen reward is higher",
                  "log of the gradients' ratio", "KL from the start", "better, ", "greedy: replies, F1"):
        assert words in out, out
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    assert results["loss, nats a pair"]["before"] == pytest.approx(math.log(2), rel=1e-5)
    assert len(results["each question"]["sampled: quality of answer"]["after"]) == 4
    assert len(results["samples"]) == 4 and all(sample["prompt"] in out for sample in results["samples"])
    assert (tmp_path / "run" / "rewards.svg").read_text("utf-8").startswith("<svg")
    load_model(tmp_path / "run")
    [stored] = (place / "pairs").glob("reference-*.safetensors")
    code, out, err = command(arguments(place, tmp_path / "again"))
    assert code == 0 and "reference's log-probabilities" not in out, "it was there"
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert same[0] == same[1]


@pytest.mark.parametrize("changes", [dict(kind="simpo", beta=2), dict(reference="model"), dict(kind="ipo"),
                                     dict(lora_rank=2, lora_alpha=4),
                                     dict(lora_rank=2, lora_alpha=4, quantize="nf4"),
                                     dict(lora_rank=2, lora_alpha=4, reference="stored")], ids=str)
def test_other_ways_train_too(place, tmp_path, command, changes):
    code, out, err = command(arguments(place, tmp_path / "run", questions=0, **changes))
    assert code == 0, err
    assert load_model(tmp_path / "run")[0] is not None
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    if changes.get("kind") is None:
        assert results["loss, nats a pair"]["before"] == pytest.approx(math.log(2), rel=1e-5)


def test_a_file_of_pairs_is_split_by_lot_and_its_reference_lies_beside_it(place, tmp_path, command):
    path = tmp_path / "mine.jsonl"
    shutil.copy(place / "pairs" / "train.jsonl", path)
    code, out, err = command(arguments(place, tmp_path / "run", data=path, val_share=0.25, questions=0))
    assert code == 0 and "train: 30 pairs" in out and "val: 10 pairs" in out, err
    assert list(tmp_path.glob("mine.jsonl.reference-*.safetensors"))


def test_stopping_and_going_on_equals_never_stopping_bit_for_bit(place, tmp_path):
    class Stops:
        def __init__(self, batches, at):
            self.batches, self.stop = batches, at

        def __getattr__(self, name):
            return getattr(self.batches, name)

        def at(self, step):
            if step == self.stop:
                raise KeyboardInterrupt
            return self.batches.at(step)

    def one(folder, stop=None):
        model, settings = load_model(place / "sft")[0], settings_for(folder, steps=6, save_every=2)
        batches = Pairs(encoded(10), 4, 64)
        dpo.stored_reference(model.eval, {"train": batches}, tmp_path / "r.safetensors", {}, CPU)
        train.train(model, Stops(batches, stop), loss_with(settings), settings, CPU)
        return (folder / "run" / "model.safetensors").read_bytes()
    whole = one(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        one(tmp_path / "cut", stop=3)
    assert one(tmp_path / "cut") == whole


@pytest.fixture(scope="session")
def chats(place):
    """Prompts for the rounds: some to describe, some to write."""
    (place / "chat").mkdir(exist_ok=True)
    for split, number in (("train", 12), ("val", 6)):
        lines = [json.dumps({"messages": [{"role": "user", "content": "the a " + "taeh"[i % 4] * (i // 4)},
                                          {"role": "assistant", "content": "the e t " * (i % 3 + 1)}]})
                 for i in range(number)]
        (place / "chat" / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    return place / "chat"


def test_rounds_start_where_the_last_one_ended_and_what_is_done_is_passed_over(place, chats, tmp_path,
                                                                              command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = arguments(place, tmp_path / "run", data=None, prompts_data=chats, rounds=2, steps=2, samples=8,
                      margin=1e-6, max_new_tokens=30, seq_len=96, questions=2)
    code, out, err = command(words)
    assert code == 0, err
    first, second = (line for line in out.splitlines() if line.startswith("round "))
    assert str(tmp_path / "run" / "round_1" / "dpo") in second, "the second begins where the first has ended"
    models = {path.relative_to(tmp_path).as_posix(): path.read_bytes()
              for path in (tmp_path / "run").glob("round_*/*/model.safetensors")}
    assert len(models) == 4 and len(set(models.values())) == 4
    shutil.rmtree(tmp_path / "run" / "round_2" / "dpo")
    monkeypatch.setattr(rejection, "draw", None)  # nothing is sampled again
    assert command(words)[0] == 0
    assert models == {path.relative_to(tmp_path).as_posix(): path.read_bytes()
                      for path in (tmp_path / "run").glob("round_*/*/model.safetensors")}


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
    """What one process learns with these settings, each asked for once."""
    @functools.cache
    def log(**settings):
        out = tmp_path_factory.mktemp("alone") / "run"
        return run_stage("dpo.py", arguments(place, out, questions=2, **settings))
    return log


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"data_parallel": "fsdp", "reference": "model"},
                                    {"data_parallel": "fsdp", "lora_rank": 2, "lora_alpha": 4},
                                    {"tensor_parallel": 2}], ids=str)
def test_two_processes_learn_what_one_does(alone, place, tmp_path, layout):
    lora = {name: value for name, value in layout.items() if name.startswith("lora")}
    one = alone(**lora)
    two = run_stage("dpo.py", arguments(place, tmp_path / "two", questions=2, **layout), processes=2)
    for a, b in zip(one, two, strict=True):
        assert a["targets"] == b["targets"] == 4
        for name in ("loss_nats_per_pair", "grad_norm", "margin", "chosen_logp_nats_per_token"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), "float32 sums in another order"
    one, two = one[-1], two[-1]
    assert one["val_accuracy"] == pytest.approx(two["val_accuracy"], abs=1 / 12 + 1e-6)  # a near tie may flip
    assert one["val_loss_nats_per_pair"] == pytest.approx(two["val_loss_nats_per_pair"], rel=1e-3)


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_killed_goes_on_and_ends_in_the_same_bytes(place, tmp_path):
    common = dict(steps=12, save_every=2, questions=0, data_parallel="fsdp")
    check_a_killed_run("dpo.py", lambda out: arguments(place, out, **common), tmp_path)


# ---- when something is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, words", [
    (dict(beta=0), "--beta 0.0 is out of range"),
    (dict(label_smoothing=0.5), "--label_smoothing 0.5 is out of range"),
    (dict(kind="dp0"), "is not one of sigmoid, hinge"),
    (dict(reference="adapter"), "is the model without its adapter, and there is none"),
    (dict(kind="simpo", reference="stored"), "--kind simpo has no reference"),
    (dict(reference_model="{tmp}/foreign"), "has another tokenizer than"),
    (dict(seq_len=200), "seq_len 200 exceeds max_seq_len 96"),
    (dict(seq_len=16), "train.jsonl:1: its prompt has 26 tokens, and the window --seq_len 16"),
    (dict(init_from="{tmp}/none"), "there is no model folder"),
    (dict(init_from="{tmp}/plain"), "does not know <|im_start|> <|im_end|> of the template chatml; first: p"),
    (dict(init_from="{tmp}/bare"), "has no tokenizer.json"),
    (dict(data="{tmp}/none.jsonl"), "there is no "),
    (dict(data="{tmp}"), "train.jsonl; --data is a file of preferences, or a folder"),
    (dict(data="{tmp}/equal.jsonl"), "equal.jsonl holds no pair to learn from: 3 with equal answers"),
    (dict(data="{tmp}/key.jsonl"), "key.jsonl:2: prompt, chosen: that is no preference; expected are"),
    (dict(batch_size=4, micro_batch_size=3), "does not divide"),
    (dict(lora_alpha=4), "--lora_alpha 4.0 is for adapters"),
    (dict(val_share=0.3), "--val_share 0.3 is for a single file, and --data "),
    (dict(chunked_loss="false"), "--no-chunked_loss is not possible here"),
])
def test_mistakes_end_in_one_line_and_code_2_before_a_run_is_begun(place, tmp_path, command, changes, words):
    good = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})
    (tmp_path / "equal.jsonl").write_text("\n".join([good.replace('"b"', '"a"')] * 3), "utf-8")
    (tmp_path / "key.jsonl").write_text("\n".join([good, '{"prompt": "q", "chosen": "a"}']), "utf-8")
    save_model(model_for(), None, tmp_path / "bare")
    plain = Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"])
    save_model(model_for(vocab_size=259), plain, tmp_path / "plain")
    other = with_chat_tokens(Tokenizer([(b"a", b"b"), (b"ab", b"e")], ["<|endoftext|>"]))
    save_model(model_for(), other, tmp_path / "foreign")
    changes = {name: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
               for name, value in changes.items()}
    code, _, err = command(arguments(place, tmp_path / "run", **changes))
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and words in last, err[-2000:]
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("changes", [dict(beta=0.2), dict(kind="ipo"), dict(seq_len=48), dict(steps=5)],
                         ids=str)
def test_a_run_goes_on_only_with_what_it_began_with(place, tmp_path, command, changes):
    assert command(arguments(place, tmp_path / "run", questions=0))[0] == 0
    code, _, err = command(arguments(place, tmp_path / "run", questions=0, **changes))
    assert code == 2 and ("--overwrite" in err or "delete it" in err), err


def test_the_default_model_that_is_missing_is_named_with_its_command(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = command([])
    assert code == 2 and "there is no runs/sft, the model to begin with; make it with: python sft.py" in err
