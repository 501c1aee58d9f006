"""generation.py: sampling, stops, batches of unequal prompts."""
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from config import UserError
from model import (generate, next_token_logps)
from support import CLOSE, random_ids, random_model, randn, seeded


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, None, None), (0.7, 5, None), (1.3, None, 0.8), (0.9, 12, 0.6), (1.0, 1, 0.1)])
def test_what_is_sampled_from_equals_transformers_warpers(temperature, top_k, top_p):
    logits = 3 * randn(20, 50)
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
    theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p else theirs
    assert_close(next_token_logps(logits, temperature, top_k, top_p), theirs.log_softmax(dim=-1))



# Generation


PROBS = [0.15, 0.5, 0.1, 0.25]


@pytest.mark.parametrize("temperature, top_k, top_p, expected", [
    (1.0, None, None, PROBS),
    (1.0, 2, None, [0, 2 / 3, 0, 1 / 3]),
    (1.0, 1, None, [0, 1, 0, 0]),
    (1.0, 9, 1.0, PROBS),                            # more than there are: all
    (1.0, None, 0.7, [0, 2 / 3, 0, 1 / 3]),          # 0.5 is not enough, 0.5 + 0.25 is
    (1.0, None, 0.8, [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9]),
    (1.0, None, 1e-9, [0, 1, 0, 0]),                 # the likeliest always stays
    (1.0, 2, 0.6, [0, 1, 0, 0]),                     # k goes first: of the two it leaves, one holds 2/3
    (0.5, None, None, [p ** 2 / 0.345 for p in PROBS]),  # p^(1/temperature): 0.345 is the sum of the squares
    (0, None, None, [0, 1, 0, 0]),
    (1e-42, None, None, [0, 1, 0, 0]),               # logits divided by it would be infinite
    (1e300, None, None, [0.25] * 4),
])
def test_temperature_top_k_and_top_p_by_hand(temperature, top_k, top_p, expected):
    logits = torch.tensor([PROBS]).log() + 7  # + 7: logits have no zero of their own
    logps = next_token_logps(logits, temperature, top_k, top_p)
    assert_close(logps.exp(), torch.tensor([expected], dtype=torch.float32))


def test_of_equal_logits_top_k_keeps_k():
    assert (next_token_logps(torch.zeros(1, 10), 1.0, 3, None) > -math.inf).sum() == 3


def naive_generate(model, prompt, number, temperature, top_k, top_p, generator):
    """One sequence, computed anew from its beginning for each token."""
    ids, logps = list(prompt), []
    for _ in range(number):
        logp = next_token_logps(model(torch.tensor([ids]))[:, -1], temperature, top_k, top_p)
        token = torch.multinomial(logp.exp(), 1, generator=generator).item()
        ids.append(token)
        logps.append(logp[0, token].item())
    return ids[len(prompt):], logps


@pytest.mark.parametrize("temperature, top_k, top_p", [(0, None, None), (1.0, None, None), (0.8, 10, 0.9)])
@torch.no_grad()
def test_generation_with_the_cache_equals_computing_everything_anew(temperature, top_k, top_p):
    model, prompt = random_model(), [3, 1, 4, 1, 5]
    ids, logps = naive_generate(model, prompt, 30, temperature, top_k, top_p, seeded(0))
    sample = generate(model, [prompt], 30, temperature, top_k, top_p, generator=seeded(0))
    assert sample.ids[0].tolist() == ids
    assert_close(sample.logps[0], torch.tensor(logps), **CLOSE)


def test_unequal_prompts_in_a_batch_equal_the_single_ones():
    model, prompts = random_model(), [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    together = generate(model, prompts, 12, temperature=0)
    for row, prompt in enumerate(prompts):
        for single in ([prompt], torch.tensor([prompt])):
            alone = generate(model, single, 12, temperature=0)
            assert torch.equal(together.ids[row], alone.ids[0]), f"prompt {row}"


@torch.no_grad()
def test_logps_are_the_models_own_at_temperature_one():
    """Those of response token t stand at position prompt_len - 1 + t."""
    model, ids = random_model(), random_ids(3, 6)
    sample = generate(model, ids, 10, generator=seeded(0))
    logps = model(torch.cat((ids, sample.ids), dim=1)).log_softmax(dim=-1)[:, 5:-1]
    assert_close(sample.logps, logps.gather(-1, sample.ids[..., None])[..., 0], **CLOSE)
    assert (generate(model, ids, 3, temperature=0).logps == 0).all(), "greedy draws from a certainty: ln 1"


def test_a_row_ends_at_its_stop_token_which_counts():
    model, ids = random_model(vocab_size=8), random_ids(16, 3, vocab_size=8)
    free = generate(model, ids, 20, generator=seeded(0))
    sample = generate(model, ids, 20, stop_ids=[2, 5], generator=seeded(0))
    for row in range(16):
        tokens = free.ids[row].tolist()
        length = next((t + 1 for t, token in enumerate(tokens) if token in (2, 5)), 20)
        width = sample.ids.size(1)
        assert sample.lengths[row] == length
        assert sample.ids[row].tolist() == (tokens[:length] + [tokens[length - 1]] * 20)[:width]
        assert torch.equal(sample.logps[row, :length], free.logps[row, :length])
        assert (sample.logps[row, length:] == 0).all(), "what follows the end was not drawn"
    assert sample.lengths.min() < sample.lengths.max(), "the rows of this test should end at different times"
    assert (free.lengths == 20).all()


def test_generation_ends_when_all_rows_have():
    model = random_model()
    sample = generate(model, [[1], [2]], 20, stop_ids=range(50))
    assert sample.ids.shape == sample.logps.shape == (2, 1) and sample.lengths.tolist() == [1, 1]


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    """Pearson's chi-square: its mean is its degrees of freedom, its variance twice that; 5 sigma is far off."""
    draws, model = 20_000, random_model(vocab_size=12)
    sample = generate(model, torch.full((draws, 1), 3), 1, temperature=1.5, top_k=9, generator=seeded(0))
    expected = draws * next_token_logps(model(torch.tensor([[3]]))[:, -1], 1.5, 9, None).exp()[0]
    counts = sample.ids[:, 0].bincount(minlength=12)
    kept = expected > 0
    assert kept.sum() == 9 and (counts[~kept] == 0).all(), "a token outside of top-k was drawn"
    chi_square = ((counts - expected).square() / expected)[kept].sum()
    assert chi_square < 8 + 5 * math.sqrt(2 * 8)


def test_the_same_seed_gives_the_same_sample_whatever_the_global_one():
    model = random_model()

    def sample(seed, global_seed):
        torch.manual_seed(global_seed)
        return generate(model, [[1, 2], [3]], 15, generator=seeded(seed)).ids.tolist()
    assert sample(7, 0) == sample(7, 1) != sample(8, 0)


def test_generation_takes_no_gradients_and_leaves_the_model_as_it_was():
    model = random_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample = generate(model, [[1, 2]], 3)
    assert not sample.logps.requires_grad and torch.is_grad_enabled() and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_can_be_filled_to_its_last_position():
    assert generate(random_model(), [[1] * 60], 4, temperature=0).ids.shape == (1, 4)


@pytest.mark.parametrize("prompt, settings, message", [
    ([[1] * 60], dict(max_new_tokens=5), "60 prompt tokens and 5 new ones exceed max_seq_len 64"),
    ([[1], []], {}, "an empty prompt gives nothing to continue"),
    ([], {}, "an empty prompt gives nothing to continue"),
    (torch.zeros(1, 0, dtype=torch.long), {}, "an empty prompt gives nothing to continue"),
    ([[1]], dict(max_new_tokens=0), "max_new_tokens 0 is out of range; it must be at least 1"),
    ([[1]], dict(temperature=-1.0), r"temperature -1.0 is out of range; 0 is greedy"),
    ([[1]], dict(temperature=math.nan), "temperature nan is out of range"),
    ([[1]], dict(temperature=math.inf), "temperature inf is out of range"),
    ([[1]], dict(top_k=0), "top_k 0 is out of range; it must be at least 1"),
    ([[1]], dict(top_p=0.0), "top_p 0.0 is out of range; it must be above 0 and at most 1"),
    ([[1]], dict(top_p=1.5), "top_p 1.5 is out of range"),
    ([[1]], dict(top_p=math.nan), "top_p nan is out of range"),
])
def test_what_cannot_be_generated_is_refused_with_a_reason(prompt, settings, message):
    with pytest.raises(UserError, match=message):
        generate(random_model(), prompt, **{"max_new_tokens": 3, **settings})
