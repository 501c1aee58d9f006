"""ppo.py and rollouts.py: the formulas by hand, what is scored is what was drawn, known optima, runs."""
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

import ppo
import rewards
from bpe import Tokenizer
from chat import CHATML, render, with_chat_tokens
from checkpoint import load_model, save_model
from config import UserError
from parallel import Env
from ppo import (gae, group_advantages, kl_estimate, next_coefficient, policy_loss, reward_model_loss, summed,
                 token_rewards, value_loss, whiten)
from reward_model import RewardModel, save_reward_model
from rewards import Reward
from rollouts import lay_out, read_replies, reply_values, roll_out
from support import check_a_killed_run, in_process, randn, random_model, run_stage, seeded

CPU = Env(torch.device("cpu"))
TOKENIZER = with_chat_tokens(Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"]))  # 261 ids
END = TOKENIZER.special_tokens[CHATML.end]


def model_for(scale=0.5, **changes):
    """A random model that is not sure of anything."""
    model = random_model(**{"vocab_size": TOKENIZER.vocab_size, "max_seq_len": 96, **changes})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def mask_of(*lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# ---- the KL divergence, estimated --------------------------------------------------------------------------


def test_kl_estimates_by_hand():
    logps, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl_estimate(logps, reference, "k1").item() == pytest.approx(math.log(2))
    assert kl_estimate(logps, reference, "k2").item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_estimate(logps, reference, "k3").item() == pytest.approx(1 / 2 - 1 + math.log(2))
    with pytest.raises(UserError, match="k4"):
        kl_estimate(logps, reference, "k4")


def test_k1_and_k3_are_the_divergence_on_average_and_k3_is_never_negative():
    p, q = randn(7, seed=1).double().log_softmax(0), randn(7, seed=2).double().log_softmax(0)
    divergence = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        assert (p.exp() * kl_estimate(p, q, kind)).sum().item() == pytest.approx(divergence.item(), rel=1e-12)
    assert (kl_estimate(p, q, "k3") >= 0).all() and (kl_estimate(p, q, "k1") < 0).any()
    assert (p.exp() * kl_estimate(p, p, "k2")).sum() == 0


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_as_losses_their_gradients_are_of_nothing_of_the_divergence_and_of_its_reverse(kind):
    theta, q = randn(7, seed=1).double().requires_grad_(), randn(7, seed=2).log_softmax(0).double()
    p = theta.log_softmax(0)
    estimate = (p.detach().exp() * kl_estimate(p, q, kind)).sum()
    [found] = torch.autograd.grad(estimate, theta, retain_graph=True)
    of = {"k1": 0 * p.sum(), "k2": (p.exp() * (p - q)).sum(), "k3": (q.exp() * (q - p)).sum()}[kind]
    [expected] = torch.autograd.grad(of, theta)
    assert found == pytest.approx(expected, abs=1e-12)  # float64


# ---- whitening ---------------------------------------------------------------------------------------------


def test_whitened_tokens_have_mean_0_and_variance_1_and_nothing_else_has_a_part_in_it():
    values, mask = randn(3, 5) * 7 + 2, mask_of(5, 2, 3)
    white = whiten(values, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].var().item() == pytest.approx(1, rel=1e-5)  # unbiased, as TRL's and verl's
    assert (white[~mask] == 0).all()
    kept = whiten(values, mask, shift_mean=False)
    assert kept[mask].mean().item() == pytest.approx(values[mask].mean().item(), rel=1e-5)
    spoiled = torch.where(mask, values, torch.tensor(math.nan))
    assert torch.equal(whiten(spoiled, mask), white), "what stands outside the mask has leaked in"


def test_whitened_by_hand():
    found = whiten(torch.tensor([[1.0, 3.0]]), mask_of(2))  # mean 2, unbiased variance 2
    assert found.tolist()[0] == pytest.approx([-(2 ** -0.5), 2 ** -0.5])


def test_whitening_in_two_processes_is_whitening_all():
    values, mask = randn(4, 6, seed=3), mask_of(6, 1, 4, 2)
    seen = []

    def over_all(sums):  # first what the other half holds is noted, then added
        seen.append(sums)
        return sums
    whiten(values[2:], mask[2:], over_all=over_all)
    other = [seen[0], torch.where(mask[2:], values[2:] - values[mask].mean(), 0.0).square().sum()]
    found = whiten(values[:2], mask[:2], over_all=lambda sums: sums + other.pop(0))
    assert torch.allclose(found, whiten(values, mask)[:2], atol=1e-6)  # sums in another order


def test_equal_values_stay_finite():
    assert whiten(torch.ones(1, 3), mask_of(3)).tolist() == [[0, 0, 0]]
    assert whiten(torch.ones(1, 1), mask_of(1)).isfinite().all()


# ---- advantages --------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    advantages, returns = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), mask_of(2), gamma=0.5,
                              lam=0.5)
    # delta_1 = 1 - 0.25 = 0.75; delta_0 = 0.5 * 0.25 - 0.5 = -0.375; A_0 = -0.375 + 0.25 * 0.75
    assert advantages.tolist()[0] == pytest.approx([-0.1875, 0.75])
    assert returns.tolist()[0] == pytest.approx([0.3125, 1.0])


def brute_force(rewards, values, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t+l} (Schulman et al. 2016, Eq. 16), of one reply without padding."""
    n, later = len(rewards), [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * later[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (i - t) * deltas[i] for i in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.97, 1.0)])
def test_advantages_are_the_sum_of_the_paper_for_replies_of_any_length(gamma, lam):
    lengths, rewards, values = (6, 1, 4), randn(3, 6, seed=1), randn(3, 6, seed=2)
    advantages, returns = gae(rewards, values, mask_of(*lengths), gamma, lam)
    for row, n in enumerate(lengths):
        expected = brute_force(rewards[row, :n].tolist(), values[row, :n].tolist(), gamma, lam)
        assert advantages[row, :n].tolist() == pytest.approx(expected, abs=1e-5)  # float32
        assert (advantages[row, n:] == 0).all() and (returns[row, n:] == 0).all()
    assert torch.equal(returns[0], advantages[0] + values[0])


def test_with_lam_and_gamma_1_the_advantage_is_return_minus_value():
    rewards, values = randn(2, 5, seed=1), randn(2, 5, seed=2)
    advantages, returns = gae(rewards, values, mask_of(5, 5), 1.0, 1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(advantages, to_come - values, atol=1e-5)
    assert torch.allclose(returns, to_come, atol=1e-5)


def test_nothing_leaks_from_padding_into_advantages():
    mask, rewards, values = mask_of(4, 2), randn(2, 4, seed=1), randn(2, 4, seed=2)
    spoiled = [torch.where(mask, x, torch.tensor(math.nan)) for x in (rewards, values)]
    for a, b in zip(gae(rewards, values, mask), gae(*spoiled, mask)):
        assert torch.equal(a, b), "a value behind the end counts as the next one of the last token"


def test_groups_by_hand():
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0])
    assert group_advantages(rewards, 2, divide_by_std=False).tolist() == [-1, 1, 0, 0]
    std = math.sqrt(2)  # of 1 and 3, unbiased
    assert group_advantages(rewards, 2).tolist() == pytest.approx([-1 / (std + 1e-4), 1 / (std + 1e-4), 0, 0])
    assert group_advantages(rewards, 2, "rloo").tolist() == [-2, 2, 0, 0]


def test_leaving_one_out_compares_with_the_mean_of_the_others():
    rewards = randn(12)
    groups = rewards.view(3, 4)
    expected = [[r - (sum(group) - r) / 3 for r in group] for group in groups.tolist()]
    assert group_advantages(rewards, 4, "rloo").view(3, 4).tolist() == \
        [pytest.approx(row, abs=1e-6) for row in expected]


def test_a_group_of_one_is_refused():
    with pytest.raises(UserError, match="--samples 8"):
        group_advantages(torch.ones(3), 1)


def test_the_score_stands_at_the_last_token_and_every_token_pays_for_its_distance():
    k1, mask = torch.tensor([[0.5, -0.25, 9.0], [1.0, 2.0, 4.0]]), mask_of(2, 3)
    found = token_rewards(torch.tensor([10.0, 20.0]), k1, mask, 0.1)
    assert found.tolist() == [pytest.approx([-0.05, 10.025, 0.0]), pytest.approx([-0.1, -0.2, 19.6])]


@pytest.mark.parametrize("baseline", ["critic", "group", "rloo", "batch"])
def test_returns_are_made_before_advantages_are_whitened(baseline):
    settings = ppo.Settings(algorithm="grpo", baseline=baseline, samples=2, whiten=True)
    rewards, values, mask = randn(4, 3, seed=1), randn(4, 3, seed=2), mask_of(3, 1, 2, 3)
    rewards = torch.where(mask, rewards, 0.0)
    advantages, returns = ppo.advantages_of(rewards, values, mask, settings, CPU)
    assert advantages[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages[mask].var().item() == pytest.approx(1, rel=1e-4)
    expected = gae(rewards, values, mask, settings.gamma, settings.lam)[1]
    if baseline != "critic":
        expected = torch.where(mask, rewards.sum(dim=1, keepdim=True), 0.0)
    assert torch.equal(returns, expected) and (advantages[~mask] == 0).all()


def test_without_a_critic_all_tokens_of_a_reply_share_its_advantage():
    settings = ppo.Settings(algorithm="reinforce", whiten=False)
    rewards, mask = torch.tensor([[0.0, 3.0], [1.0, 0.0]]), mask_of(2, 1)
    advantages, _ = ppo.advantages_of(rewards, torch.zeros(2, 2), mask, settings, CPU)
    assert advantages.tolist() == [[1, 1], [-1, 0]]  # 3 and 1, less their mean


# ---- losses ------------------------------------------------------------------------------------------------


def test_the_policy_loss_by_hand():
    old, new = torch.zeros(1, 3), torch.tensor([[0.5, 1.5, 1.1]]).log()
    advantages = torch.tensor([[1.0, 2.0, -1.0]])
    # ratios 0.5, 1.5, 1.1: -0.5, -(1.2 * 2), 1.1
    assert policy_loss(new, old, advantages, mask_of(3)).item() == pytest.approx((-0.5 - 2.4 + 1.1) / 3)
    assert policy_loss(new, old, advantages, mask_of(3), clip_high=0.4).item() == \
        pytest.approx((-0.5 - 2.8 + 1.1) / 3), "clip_high is the room above, for what has become likelier"
    half, worse = torch.tensor([[0.5]]).log(), torch.tensor([[-1.0]])
    assert policy_loss(half, torch.zeros(1, 1), worse, mask_of(1), clip_high=0.4).item() == \
        pytest.approx(0.8), "below, the room is still that of clip"


@pytest.mark.parametrize("ratio, advantage, moves", [(1.0, 1, True), (1.3, 1, False), (1.3, -1, True),
                                                     (0.7, -1, False), (0.7, 1, True), (1.1, 1, True)])
def test_only_what_would_gain_by_going_further_stands_still(ratio, advantage, moves):
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    policy_loss(logps, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), mask_of(1)).backward()
    assert logps.grad.item() == pytest.approx(-ratio * advantage if moves else 0.0), \
        "what went too far the wrong way must still be pulled back: is it the minimum of both sides?"


def test_the_value_loss_by_hand():
    old = torch.zeros(1, 3)
    values, returns = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[1.0, 2.0, 1.0]])
    # held within 0.2 of the old: 0.2, 0 and -0.2, whose errors are 0.8, 2 and 1.2; their own are 0, 2 and 2
    assert value_loss(values, old, returns, mask_of(3)).item() == pytest.approx((0.64 + 4 + 4) / 2 / 3), \
        "the worse of both errors: a value that went the wrong way is not excused by being held"
    assert value_loss(values, old, returns, mask_of(3), None).item() == pytest.approx((0 + 4 + 4) / 2 / 3)


def test_padding_has_no_part_in_a_loss_or_its_gradient():
    mask = mask_of(3, 1)
    for loss in (policy_loss, value_loss):
        inputs = [torch.where(mask, randn(2, 3, seed=i), 0.0).requires_grad_() for i in range(3)]
        wild = [torch.where(mask, x, torch.tensor(77.0)).detach().requires_grad_() for x in inputs]
        a, b = loss(*inputs, mask), loss(*wild, mask)
        a.backward(), b.backward()
        assert a.item() == b.item() and torch.equal(inputs[0].grad, wild[0].grad)
        assert (wild[0].grad[~mask] == 0).all()


def test_means_over_tokens_over_replies_and_over_a_constant():
    terms, mask = torch.tensor([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0]]), mask_of(3, 1)
    means = {over: (lambda total, count: (total / count).item())(*summed(terms, mask, over, 5))
             for over in ("token", "sequence", "constant")}
    assert means == {"token": pytest.approx(16 / 4), "sequence": pytest.approx((2 + 10) / 2),
                     "constant": pytest.approx(16 / (2 * 5))}


def test_the_price_of_a_nat_follows_its_target_by_at_most_a_fifth():
    assert next_coefficient(0.1, 6.0, 6.0, 1000, 100) == 0.1
    assert next_coefficient(0.1, 60.0, 6.0, 1000, 100) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert next_coefficient(0.1, 0.0, 6.0, 1000, 100) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert next_coefficient(0.1, 6.6, 6.0, 1000, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))


def test_the_reward_models_loss_is_a_name_of_this_file():
    [loss] = reward_model_loss(torch.tensor([1.0]), torch.tensor([1.0])).tolist()
    assert loss == pytest.approx(math.log(2))


def test_the_policy_gradient_is_the_analytic_one_on_average():
    """Of E[R] over a softmax of 5 actions, from 20,000 groups of 4, for each comparison of rewards."""
    theta, worth, generator = randn(5, seed=4), randn(5, seed=5), seeded(0)
    probs = theta.softmax(0)
    analytic = probs * (worth - probs @ worth)  # d E[R] / d theta
    actions = torch.multinomial(probs.expand(20_000, 5), 4, replacement=True, generator=generator)
    for kind, scale in (("rloo", 1.0), ("mean", 3 / 4)):  # with one's own in the mean: (G - 1) / G of it
        better = group_advantages(worth[actions].flatten(), 4, kind, divide_by_std=False).view(-1, 4)
        one_hot = torch.nn.functional.one_hot(actions, 5).float()
        samples = ((one_hot - probs) * better[:, :, None]).mean(dim=1)  # of a group: its gradient of -loss
        logits = theta.clone().requires_grad_()
        logps = logits.log_softmax(0)[actions]
        policy_loss(logps, logps.detach(), better, torch.ones_like(actions, dtype=torch.bool)).backward()
        assert -logits.grad == pytest.approx(samples.mean(dim=0), abs=1e-5)  # float32
        error = samples.std(dim=0) / len(samples) ** 0.5
        assert ((-logits.grad - scale * analytic).abs() < 4 * error).all(), kind  # four standard errors


# ---- rollouts ----------------------------------------------------------------------------------------------


def prompts_of(*texts):
    return [render([{"role": "user", "content": text}], TOKENIZER, True)[0] for text in texts]


def rollout_of(model, samples=3, new=12, temperature=1.0, seed=0):
    return roll_out(model, prompts_of("the", "a", "hat hat hat"), TOKENIZER, END, samples, new, temperature,
                    seeded(seed), at_once=2)


def test_replies_to_a_prompt_stand_side_by_side_in_the_order_of_the_prompts():
    rollout = rollout_of(model_for())
    assert rollout.prompts == [prompt for prompt in prompts_of("the", "a", "hat hat hat") for _ in range(3)]
    assert rollout.lengths.tolist() == rollout.mask.sum(dim=1).tolist() == [len(r) for r in rollout.replies]
    for reply, text, ended in zip(rollout.replies, rollout.texts, rollout.ended):
        assert ended == (reply[-1] == END) and len(reply) <= 12
        assert text == TOKENIZER.decode(reply[:len(reply) - int(ended)])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_log_probabilities_when_drawn_are_those_when_scored(temperature):
    model, found = model_for(), []
    original = roll_out.__globals__["sample_replies"]

    def noted(*args):
        replies = original(*args)
        found.extend((reply["ids"], reply["logp"]) for group in replies for reply in group)
        return replies
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(roll_out.__globals__, "sample_replies", noted)
        rollout = rollout_of(model, temperature=temperature)
    with torch.no_grad():
        logps, _, _ = read_replies(model, *lay_out(rollout, range(len(rollout)), 96), temperature)
    drawn = {tuple(ids): logp for ids, logp in found}
    for reply, scored in zip(rollout.replies, logps.sum(dim=1).tolist()):
        # the bound is 1e-5 a token; these are sums of up to 12
        assert scored == pytest.approx(drawn[tuple(reply)], abs=1e-4), \
            "sampling and scoring differ: do they share one temperature?"


def by_hand(model, prompt, reply, temperature=1.0):
    """Log-probabilities of a reply's tokens, from a pass over it alone."""
    logits = model(torch.tensor([prompt + reply]))[0] / temperature
    return [logits[len(prompt) - 1 + t].log_softmax(0)[token].item() for t, token in enumerate(reply)]


@torch.no_grad()
def test_a_token_is_scored_where_all_before_it_has_been_read_and_it_has_not():
    model = model_for()
    rollout = rollout_of(model)
    rows = [4, 0, 8]
    logps, entropies, _ = read_replies(model, *lay_out(rollout, rows, 96), 0.8, True)
    for row, found, entropy in zip(rows, logps, entropies):
        prompt, reply = rollout.prompts[row], rollout.replies[row]
        assert found[:len(reply)].tolist() == pytest.approx(by_hand(model, prompt, reply, 0.8), abs=1e-5)
        assert (found[len(reply):] == 0).all()
        probs = (model(torch.tensor([prompt + reply]))[0, len(prompt) - 1] / 0.8).log_softmax(0)
        assert entropy[0].item() == pytest.approx(-(probs.exp() * probs).sum().item(), rel=1e-5)


@torch.no_grad()
def test_batch_mates_and_what_stands_in_padding_change_nothing():
    model, critic = model_for(), RewardModel.of(model_for())
    rollout = rollout_of(model)
    packed = lay_out(rollout, range(len(rollout)), 60)
    inputs, targets, documents, place, mask = packed
    assert (documents == 0).any(), "nothing to test: no padding"
    spoiled = torch.where(documents == 0, 7, inputs), targets, documents, place, mask
    for read in (lambda *p: read_replies(model, *p)[0], lambda *p: reply_values(critic, *p)):
        together = read(*packed)
        assert torch.equal(together, read(*spoiled)), "ids in padding have leaked into figures of replies"
        for row in range(len(rollout)):
            alone = read(*lay_out(rollout, [row], 60))[0]
            n = len(rollout.replies[row])
            assert alone[:n].tolist() == pytest.approx(together[row, :n].tolist(), abs=1e-5)


@torch.no_grad()
def test_a_value_is_what_the_critic_says_before_a_token():
    model, critic = model_for(), RewardModel.of(model_for())
    rollout = rollout_of(model)
    values = reply_values(critic, *lay_out(rollout, [1, 7], 96))
    for row, found in zip((1, 7), values):
        prompt, reply = rollout.prompts[row], rollout.replies[row]
        expected = critic(torch.tensor([prompt + reply]))[0, len(prompt) - 1:-1]
        assert found[:len(reply)].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_bonus_for_entropy_moves_the_weights_as_plain_logits_would():
    model = model_for()
    rollout = rollout_of(model)
    packed = lay_out(rollout, range(4), 96)
    entropies = read_replies(model, *packed, 1.0, True)[1]
    entropies.sum().backward()
    found, total = model.lm_head.weight.grad.clone(), 0.0
    model.zero_grad()
    for row in range(4):
        prompt, reply = rollout.prompts[row], rollout.replies[row]
        logps = model(torch.tensor([prompt + reply]))[0, len(prompt) - 1:-1].log_softmax(-1)
        total = total - (logps.exp() * logps).sum()
    total.backward()
    assert torch.allclose(found, model.lm_head.weight.grad, atol=1e-4)  # float32 sums in another order


# ---- the loop ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a policy, a reward model and prompts."""
    folder = tmp_path_factory.mktemp("ppo")
    model = model_for()
    save_model(model, TOKENIZER, folder / "sft")
    save_reward_model(RewardModel.of(model, seeded(3)), TOKENIZER, folder / "reward")
    (folder / "chat").mkdir()
    for split, number in (("train", 30), ("val", 8)):
        lines = [json.dumps({"messages": [{"role": "user", "content": "the " + "taeh"[i % 4] * (i // 4)},
                                          {"role": "assistant", "content": "hat"}]}) for i in range(number)]
        (folder / "chat" / f"{split}.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def letters(question, reply):
    """The share of a reply's characters that are ASCII."""
    return sum(map(str.isascii, reply.text)) / max(1, len(reply.text))


@pytest.fixture(autouse=True)
def a_reward_of_our_own(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "letters", Reward(letters, 0.0, "share of ASCII"))


def arguments(place, out, **changes):
    words = {"init_from": place / "sft", "prompts_data": place / "chat", "out": out, "rewards": "letters",
             "seq_len": 96, "batch_size": 16, "minibatch_size": 8, "steps": 4, "max_new_tokens": 6,
             "lr": 0.01, "adam_lr": 3e-3, "device": "cpu", "precision": "fp32", "compile": "false",
             "questions": 4, "save_every": 2, "reward_model": place / "reward", **changes}
    return [word for name, value in words.items() if value is not None
            for word in (f"--{name}", *str(value).split("|"))]


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda words: in_process(monkeypatch, capsys, ppo.main, *words)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]


EACH = [dict(algorithm=name) for name in ppo.ALGORITHMS] + [
    dict(critic="shared"), dict(rewards="model|letters=0.5|f1=0"), dict(entropy_coef=0.01),
    dict(kl_in="loss"), dict(lora_rank=2, lora_alpha=4, lora_lr=0.01, lr=None), dict(micro_batch_size=2),
    dict(kl_target=1.0)]


@pytest.mark.parametrize("changes", EACH, ids=str)
def test_every_kind_of_run_moves_the_policy_and_leaves_a_model(place, tmp_path, command, changes):
    code, out, err = command(arguments(place, tmp_path / "run", **changes))
    assert code == 0, err
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["first_ratio"] == 1.0 for line in lines), \
        "the first minibatch's ratios are not exactly 1: is it scored as it is learnt from, without dropout?"
    assert lines[0]["kl_nats_per_reply"] == 0.0 and lines[-1]["kl_k3_nats_per_reply"] > 0
    assert all(line["replies"] == 16 and math.isfinite(line["reward"]) for line in lines)
    model, _ = load_model(tmp_path / "run")
    start, _ = load_model(place / "sft")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))
    for words in ("held out", "sampled: reward", "KL from the start"):
        assert words in out, out


def test_on_the_first_minibatch_nothing_is_clipped_and_every_ratio_is_exactly_1(place, tmp_path, command,
                                                                                  monkeypatch):
    ratios, original = [], ppo.policy_terms
    monkeypatch.setattr(ppo, "policy_terms", lambda new, old, *rest: (
        ratios.append((new - old).exp().detach()), original(new, old, *rest))[1])
    assert command(arguments(place, tmp_path / "run", steps=1, update_epochs=2))[0] == 0
    assert len(ratios) == 4 and (ratios[0] == 1).all(), "fp32, and the same batch: bit for bit"
    assert (ratios[2] != 1).any(), "the second pass sees the weights that the first has moved"


def test_micro_batches_change_nothing(place, tmp_path, command):
    for size in (8, 2):
        assert command(arguments(place, tmp_path / str(size), micro_batch_size=size, steps=2))[0] == 0
    for a, b in zip(log_of(tmp_path / "8"), log_of(tmp_path / "2"), strict=True):
        for name in ("loss", "grad_norm", "value_loss", "reward", "kl_nats_per_reply"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name  # sums in another order


def test_the_same_command_goes_on_and_ends_in_the_same_bytes(place, tmp_path, command, monkeypatch):
    words = arguments(place, tmp_path / "whole", kl_target=1.0, steps=6)
    assert command(words)[0] == 0
    original, calls = ppo.reinforce, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)
    words = arguments(place, tmp_path / "cut", kl_target=1.0, steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "reinforce", stops)
        assert command(words)[0] != 0
    assert command(words)[0] == 0
    for name in ("model", "optimizer", "critic_model", "critic_optimizer"):
        whole, cut = (tmp_path / run / f"state/step_00000006/{name}.safetensors" for run in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), name
    for a, b in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "cut"), strict=True):
        assert a["reward"] == b["reward"] and a["loss"] == b["loss"] and a["kl_coef"] == b["kl_coef"]
    assert len({line["kl_coef"] for line in log_of(tmp_path / "whole")}) > 1, "the price has not moved"


def ascii_code(question, reply):
    """A bandit: a reply of one token is worth its ASCII code. The best of 261 arms is worth 1."""
    return ord(reply.text) / 127 if len(reply.text) == 1 and reply.text.isascii() else 0.0


def chain(question, reply):
    """A chain: an upper-case letter, then a lower-case one, then a digit; a third for each."""
    return sum(is_right(letter) for is_right, letter in zip((str.isupper, str.islower, str.isdigit),
                                                            reply.text)) / 3


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo"])
@pytest.mark.parametrize("task, new, steps", [(ascii_code, 1, 25), (chain, 3, 40)])
def test_a_known_optimum_is_reached(place, tmp_path, command, monkeypatch, algorithm, task, new, steps):
    monkeypatch.setitem(rewards.REWARDS, "task", Reward(task, 0.0, ""))
    steps *= 2 if algorithm == "ppo" else 1  # the critic has to learn first
    words = arguments(place, tmp_path / "run", algorithm=algorithm, rewards="task", max_new_tokens=new,
                      steps=steps, batch_size=128, minibatch_size=32, kl_coef=0.0, lr=0.05, adam_lr=0.02,
                      questions=0, update_epochs=4,
                      # advantages of variance 1 push on where all is noise: two letters may do for ever
                      entropy_coef=0.03 if task is chain and algorithm != "rloo" else 0,
                      **({"critic_lr": 0.03, "critic_adam_lr": 0.01} if algorithm == "ppo" else {}))
    code, _, err = command(words)
    assert code == 0, err
    lines = log_of(tmp_path / "run")
    assert lines[0]["reward"] < 0.5 and lines[-1]["reward"] > 0.9, [round(l["reward"], 2) for l in lines]


def test_the_reward_model_is_trained_by_a_word_of_this_command(command):
    code, _, err = command(["--train_reward_model", "--init_from", "nowhere", "--data", "nothing"])
    assert code == 2 and "nowhere" in err
    code, out, _ = command(["--train_reward_model", "--help"])
    assert code == 0 and "--margin_from" in out, "these are the settings of reward_model.py"


def test_what_a_run_writes_can_be_looked_at(place, tmp_path, command):
    code, out, err = command(arguments(place, tmp_path / "run", rewards="model|letters=0", eval_every=2,
                                       samples_every=2))
    assert code == 0, err
    lines = log_of(tmp_path / "run")
    for name in ("reward_model", "reward_letters", "reward_std", "kl_k3_nats_per_reply",
                 "entropy_nats_per_token", "clip_share", "ratio", "value_loss", "explained_variance",
                 "length", "ended", "roll_out_seconds", "updates", "update_kl_nats_per_token",
                 "tokens_per_second", "distinct"):
        assert all(math.isfinite(line[name]) for line in lines), name
    assert [len(line.get("samples", ())) for line in lines] == [5, 0, 5, 0]
    assert ["val_reward" in line for line in lines] == [False, True, False, True]
    results = json.loads((tmp_path / "run" / "results.json").read_text("utf-8"))
    assert len(results["sampled: letters"]["each question"][0]) == 4
    assert len(results["samples"]) == 4 and all(sample["prompt"] in out for sample in results["samples"])
    for name in ("rewards.svg", "kl.svg"):
        assert (tmp_path / "run" / name).read_text("utf-8").startswith("<svg")
    assert "followed" not in out and "model" in out


def test_the_score_is_the_reward_models_with_mean_0_and_variance_1(place):
    judge, _ = ppo.load_reward_model(place / "reward")
    judge.mean, judge.std = 0.5, 2.0
    prompts, replies = prompts_of("the", "a"), [[5, 6, END], [7]]
    found = ppo.normalised_scores(judge, prompts, replies, CPU)
    with torch.no_grad():
        expected = [(judge(torch.tensor([p + r]))[0, -1].item() - 0.5) / 2 for p, r in zip(prompts, replies)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5), "is it read at the last real token?"


def test_a_reply_that_is_cut_off_gets_the_reward_of_those_and_no_other(place, tmp_path, command):
    assert command(arguments(place, tmp_path / "run", unended_reward=-1, steps=1, questions=0))[0] == 0
    [line] = log_of(tmp_path / "run")
    ended = line["ended"]
    assert ended < 1 and line["reward"] <= ended - (1 - ended), "those that ended are worth at most 1"


def test_once_the_policy_has_moved_too_far_a_step_is_over(place, tmp_path, command):
    words = arguments(place, tmp_path / "run", steps=2, update_epochs=3, stop_kl=1e-9, questions=0)
    assert command(words)[0] == 0
    # the first minibatch is the policy itself; the second is seen from where the first has led
    assert [line["updates"] for line in log_of(tmp_path / "run")] == [2, 2]


def test_prompts_are_all_asked_before_one_is_asked_again(place):
    settings = ppo.Settings(prompts_data=str(place / "chat"), batch_size=12, minibatch_size=12, samples=2,
                            algorithm="grpo", max_new_tokens=4, seq_len=96)
    model, tokenizer = load_model(place / "sft")
    prompts = ppo.Prompts(settings, "train", model, tokenizer, CPU)
    seen = [i for step in range(10) for i in prompts.at(step)]
    for epoch in (seen[:30], seen[30:]):
        assert sorted(epoch) == list(range(30))
    assert seen[:30] != seen[30:]
    halves = [ppo.Prompts(settings, "train", model, tokenizer,
                          replace(CPU, rank=rank, world_size=2)).at(3) for rank in (0, 1)]
    assert halves[0] + halves[1] == prompts.at(3)


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_a_critic_begins_by_expecting_nothing(place, tmp_path, command, monkeypatch, critic):
    seen, original = [], ppo.read_all
    monkeypatch.setattr(ppo, "read_all", lambda *args: (seen.append(original(*args)), seen[-1])[1])
    assert command(arguments(place, tmp_path / "run", critic=critic, steps=2, questions=0))[0] == 0
    (_, _, first), (_, _, second) = seen
    assert (first == 0).all() and (second != 0).any()


# ---- when something is wrong -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strangers(place):
    """Models with another tokenizer."""
    other = with_chat_tokens(Tokenizer([(b"a", b"b")], ["<|endoftext|>"]))
    model = model_for(vocab_size=other.vocab_size)
    save_model(model, other, place / "other")
    save_reward_model(RewardModel.of(model), other, place / "other_reward")
    return place


MISTAKES = [
    (dict(init_from="{place}/none"), "there is no model folder"),
    (dict(rewards="model", reward_model="{place}/none"), "none"),
    (dict(rewards="model", reward_model="{place}/other_reward"), "another tokenizer"),
    (dict(rewards="model", reward_model="{place}/sft"), "sft"),
    (dict(critic_from="{place}/other"), "another tokenizer"),
    (dict(rewards="letter"), "letter"),
    (dict(rewards="letters=much"), "letters=much"),
    (dict(algorithm="grpo", samples=1), "no group"),
    (dict(algorithm="grpo", samples=3), "does not divide"),
    (dict(minibatch_size=5), "does not divide"),
    (dict(minibatch_size=8, micro_batch_size=3), "does not divide"),
    (dict(max_new_tokens=90), "no prompt of"),
    (dict(prompts_data="{place}/nowhere"), "there is no "),
    (dict(algorithm="grpo", lam=0.9), "--lam 0.9 is for a critic"),
    (dict(algorithm="grpo", critic="shared"), "--critic shared is for a critic"),
    (dict(critic="shared", critic_lr=0.1), "--critic_lr 0.1 is for --critic own"),
    (dict(critic="shared", lora_rank=2, lr=None), "--critic own"),
    (dict(lora_rank=2, lora_dropout=0.1, lr=None), "--lora_dropout"),
    (dict(spike=3), "--spike"),
    (dict(ramp_tokens=10, batch_start=8), "--batch_start"),
    (dict(kl_target=1, kl_coef=0), "--kl_target"),
    (dict(kl_target=1, kl_horizon=8), "--kl_horizon 8"),
    (dict(kl_in="loss", kl_kind="k1"), "no gradient on average"),
    (dict(temperature=0), "temperature"),
    (dict(gamma=1.5), "gamma"),
    (dict(clip_policy=1), "clip_policy"),
    (dict(out="{place}/chat"), "chat"),
]


@pytest.mark.parametrize("changes, message", MISTAKES, ids=str)
def test_mistakes_end_in_one_line(strangers, tmp_path, command, changes, message):
    filled = {name: value.format(place=strangers) if isinstance(value, str) else value
              for name, value in changes.items()}
    code, _, err = command(arguments(strangers, filled.pop("out", tmp_path / "run"), **filled))
    assert code == 2 and message in err, err
    assert err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_rewards_that_are_no_numbers_count_as_the_least_are_shown_and_end_the_run_when_too_many(
        place, tmp_path, command, monkeypatch):
    def broken(question, reply):
        return 1 / 0 if "e" in reply.text else math.nan
    monkeypatch.setitem(rewards.REWARDS, "broken", Reward(broken, -3.0, ""))
    code, out, err = command(arguments(place, tmp_path / "run", rewards="broken", steps=1, questions=0))
    assert code == 0, err
    assert log_of(tmp_path / "run")[0]["reward"] == -3.0 and "nan" in out
    code, out, err = command(arguments(place, tmp_path / "more", rewards="broken", steps=3, questions=0))
    assert code == 2 and "broken" in err


@pytest.mark.parametrize("what", ["reward", "loss"])
def test_a_figure_that_is_not_finite_rolls_the_run_back(place, tmp_path, command, monkeypatch, what):
    calls = []
    if what == "reward":
        original = ppo.rewarded

        def spoiled(*args):
            scores, parts = original(*args)
            calls.append(1)
            return (scores * math.inf if len(calls) == 3 else scores), parts
        monkeypatch.setattr(ppo, "rewarded", spoiled)
    else:
        original = ppo.policy_terms

        def spoiled(*args):
            calls.append(1)
            return original(*args) * (math.nan if len(calls) == 5 else 1)
        monkeypatch.setattr(ppo, "policy_terms", spoiled)
    code, out, err = command(arguments(place, tmp_path / "run", algorithm="rloo", questions=0,
                                       update_epochs=1))
    assert code == 0, err
    assert "Back to step 2" in out
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["rollbacks"] == 1


def test_a_collapse_is_said(place, tmp_path, command, monkeypatch):
    model, tokenizer = load_model(place / "sft")
    with torch.no_grad():
        model.lm_head.weight[7] += 50 * model.model.norm.weight  # all but certain, whatever stands before
        model.model.layers[-1].mlp.down_proj.weight.zero_()
    save_model(model, tokenizer, tmp_path / "sure")
    words = arguments(place, tmp_path / "run", init_from=tmp_path / "sure", steps=1, questions=0)
    monkeypatch.setattr(ppo, "outcome", lambda *args, original=ppo.outcome: original(*args) | {
        "entropy_nats_per_token": 0.001})
    code, out, err = command(words)
    assert code == 0 and "the policy has collapsed: the entropy is 0.0010 nats a token" in out, err
    assert "collapsed" in log_of(tmp_path / "run")[0]


@pytest.mark.parametrize("changes", [dict(kl_coef=0.2), dict(algorithm="rloo"), dict(lam=0.5)], ids=str)
def test_a_run_goes_on_only_with_what_it_began_with(place, tmp_path, command, changes):
    assert command(arguments(place, tmp_path / "run", questions=0, steps=2))[0] == 0
    code, _, err = command(arguments(place, tmp_path / "run", questions=0, steps=2, **changes))
    assert code == 2 and "--overwrite" in err, err


def test_a_model_that_cannot_read_so_far_is_refused_before_anything_is_written(place, tmp_path, command):
    short, reader = model_for(max_seq_len=60), model_for(max_seq_len=48)
    save_model(short, TOKENIZER, tmp_path / "short")
    save_reward_model(RewardModel.of(reader), TOKENIZER, tmp_path / "reader")
    for changes, words in [(dict(init_from=tmp_path / "short"), "max_seq_len 60"),
                           (dict(critic_from=tmp_path / "short"), "the critic"),
                           (dict(rewards="model", reward_model=tmp_path / "reader", seq_len=48),
                            "the reward")]:
        code, _, err = command(arguments(place, tmp_path / "run", **changes))
        assert code == 2 and "exceeds max_seq_len" in err and words in err, err
        assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("replies, processes", [(12, 1), (96, 1), (16, 2), (24, 2)])
def test_equal_replies_are_a_collapse_however_many_there_are_and_wherever(replies, processes):
    share = torch.full((1,), processes / replies).double().item()  # as outcome has it, in float32
    line = {"entropy_nats_per_token": 2.0, "distinct": share, "replies": replies}
    assert "equal" in ppo.collapsed(line, processes)
    assert ppo.collapsed(line | {"distinct": 2 * share}, processes) is None
    assert ppo.collapsed(line | {"distinct": 1.0, "replies": processes}, processes) is None, "one alone"


def test_a_wrong_critic_is_told_before_overwrite_deletes(strangers, tmp_path, command):
    words = arguments(strangers, tmp_path / "run", steps=1, questions=0)
    assert command(words)[0] == 0
    code, _, err = command([*words, "--overwrite", "--critic_from", str(strangers / "other")])
    assert code == 2 and "another tokenizer" in err
    assert (tmp_path / "run" / "model.safetensors").exists(), "the old run is gone, and there is no new one"


def test_a_finished_run_can_be_asked_questions_afterwards(place, tmp_path, command):
    assert command(arguments(place, tmp_path / "run", steps=1, questions=0))[0] == 0
    code, out, err = command(arguments(place, tmp_path / "run", steps=1))
    assert code == 0 and "KL from the start" in out, err


@pytest.mark.parametrize("stop_kl", [0.0, 0.1])
def test_a_ratio_beyond_all_numbers_is_no_end_of_the_run(place, tmp_path, command, monkeypatch, stop_kl):
    original = ppo.ppo_loss

    def spoiled(*args, **kwargs):
        *found, figures = original(*args, **kwargs)
        endless = torch.tensor(math.inf), torch.tensor(1)
        return *found, figures | {"update_kl_nats_per_token": endless, "ratio": endless}
    monkeypatch.setattr(ppo, "ppo_loss", spoiled)
    code, _, err = command(arguments(place, tmp_path / "run", steps=1, questions=0, stop_kl=stop_kl))
    assert code == 0, err
    [line] = log_of(tmp_path / "run")
    assert line["update_kl_nats_per_token"] is None and line["updates"] == (1 if stop_kl else 4)


def test_with_a_shared_critic_a_state_is_a_language_model_and_the_run_goes_on_from_it(place, tmp_path,
                                                                                      command, monkeypatch):
    words = dict(critic="shared", questions=0, steps=3, save_every=1)
    assert command(arguments(place, tmp_path / "whole", **words))[0] == 0
    load_model(tmp_path / "whole" / "state" / "step_00000003")
    original = ppo.reinforce

    def stops(run, *args):
        if run.step == 2:
            raise KeyboardInterrupt
        return original(run, *args)
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "reinforce", stops)
        assert command(arguments(place, tmp_path / "cut", **words))[0] != 0
    assert command(arguments(place, tmp_path / "cut", **words))[0] == 0
    for name in ("model", "critic_head", "optimizer"):
        whole, cut = (tmp_path / run / f"state/step_00000003/{name}.safetensors" for run in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), name


@pytest.mark.parametrize("what", ["sft", "reward", "chat"])
def test_a_run_does_not_go_on_with_another_reference_reward_model_or_answers(place, tmp_path, command, what):
    shutil.copytree(place, tmp_path / "place")
    words = arguments(tmp_path / "place", tmp_path / "run", rewards="model", questions=0, steps=1)
    assert command(words)[0] == 0
    if what == "chat":
        path = tmp_path / "place" / "chat" / "train.jsonl"
        path.write_text(path.read_text("utf-8").replace('"hat"', '"cat"'), "utf-8")
    elif what == "sft":
        save_model(model_for(0.4), TOKENIZER, tmp_path / "place" / "sft")
    else:
        save_reward_model(RewardModel.of(model_for(0.4)), TOKENIZER, tmp_path / "place" / "reward")
    code, _, err = command(words)
    assert code == 2 and "--overwrite" in err, "the rewards or the distance are now another's"


# ---- several processes -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"data_parallel": "fsdp"},
                                    {"data_parallel": "fsdp", "lora_rank": 2, "lora_alpha": 4, "lr": None,
                                     "lora_lr": 0.01}], ids=str)
def test_two_processes_learn_from_their_own_replies_and_stay_one_policy(place, tmp_path, layout):
    words = dict(rewards="model", steps=3, eval_every=1)
    two = run_stage("ppo.py", arguments(place, tmp_path / "two", **words, **layout), processes=2)
    assert all(line["first_ratio"] == pytest.approx(1, abs=1e-6) for line in two)
    assert two[0]["kl_nats_per_reply"] == pytest.approx(0, abs=1e-5)
    assert two[-1]["val_kl_k3_nats_per_reply"] > 0 and two[-1]["replies"] == 16
    load_model(tmp_path / "two")


@pytest.mark.slow
def test_fsdp_gathers_the_weights_that_ddp_holds(place, tmp_path):
    """The same seeds draw the same replies, so that all figures are equal but for sums in another order."""
    logs = [run_stage("ppo.py", arguments(place, tmp_path / layout, data_parallel=layout, rewards="model",
                                          steps=3), processes=2) for layout in ("ddp", "fsdp")]
    for a, b in zip(*logs, strict=True):
        for name in ("reward", "loss", "grad_norm", "value_loss", "kl_k3_nats_per_reply", "length"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_killed_goes_on_and_ends_in_the_same_bytes(place, tmp_path):
    common = dict(steps=12, save_every=2, questions=0, data_parallel="fsdp", rewards="model")
    check_a_killed_run("ppo.py", lambda out: arguments(place, out, **common), tmp_path)
