"""generation.py: the distribution against transformers' and by hand; unequal prompts, stops, seeds; guesses
that change nothing; packed weights that change nothing; what is refused.
"""
import gc
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
                          TopKLogitsWarper, TopPLogitsWarper)

import generation
from config import UserError
from generation import Packed, draw, generate, generate_stream, guess_again, next_token_logps, verify
from support import CLOSE, VARIANTS, random_ids, random_model, randn, seeded

# The distribution


@pytest.mark.parametrize("temperature, top_k, top_p, min_p", [
    (1.0, None, None, None), (0.7, 5, None, None), (1.3, None, 0.8, None), (0.9, 12, 0.6, None),
    (1.0, 1, 0.1, None), (1.0, None, None, 0.1), (2.0, 30, 0.9, 0.05), (1.0, None, None, 1.0)])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("vocab_size", [50, 2000])
def test_what_is_sampled_from_equals_transformers_warpers(temperature, top_k, top_p, min_p, penalty,
                                                          vocab_size):
    """In the order in which its generate() applies them. Of 2,000 nearly equal tokens top-p
    must look at more than it does at first."""
    logits, ids = 3 * randn(20, vocab_size), random_ids(20, 30, vocab_size=vocab_size)
    logits[0] /= 100
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    theirs = TemperatureLogitsWarper(temperature)(None, theirs)
    theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
    theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p else theirs
    theirs = MinPLogitsWarper(min_p)(None, theirs) if min_p else theirs
    seen = torch.zeros(20, vocab_size, dtype=torch.bool).scatter(1, ids, True)
    ours = next_token_logps(logits, temperature, top_k, top_p, min_p, penalty, seen)
    assert_close(ours, theirs.log_softmax(dim=-1), rtol=1e-5, atol=1e-5)  # float32 logits of size 10


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


@pytest.mark.parametrize("min_p, expected", [
    (0.0, PROBS), (0.25, [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9]), (0.4, [0, 2 / 3, 0, 1 / 3]),
    (1.0, [0.0, 1, 0, 0])])
def test_min_p_keeps_what_has_its_share_of_the_likeliest(min_p, expected):
    logps = next_token_logps(torch.tensor([PROBS]).log() + 7, min_p=min_p)
    assert_close(logps.exp(), torch.tensor([expected]))


def test_the_penalty_makes_a_seen_token_less_likely_whatever_the_sign_of_its_logit_and_comes_before_greed():
    logits, seen = torch.tensor([[3.0, 2.0, -1.0, -1.0]]), torch.tensor([[True, False, True, False]])
    logps = next_token_logps(logits, repetition_penalty=2.0, seen=seen)
    assert_close(logps, torch.tensor([[1.5, 2.0, -2.0, -1.0]]).log_softmax(dim=-1))
    assert next_token_logps(logits, 0, repetition_penalty=2.0, seen=seen).argmax() == 1


def test_a_token_without_probability_is_never_drawn_and_the_last_one_can_be():
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(2000, 5)
    counts = draw(probs, seeded(0)).bincount(minlength=5)
    assert counts[[0, 2, 4]].sum() == 0
    assert abs(counts[1] - 600) < 5 * math.sqrt(2000 * 0.3 * 0.7), "binomial, five standard deviations"
    for u, token in ((0.0, 3), (1 - 2 ** -53, 1)):  # the ends of what torch.rand gives
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, u, dtype=torch.float64))
            assert draw(probs[:1], None).item() == token
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *shape, dtype, **_: torch.zeros(shape, dtype=dtype))
        assert draw(torch.tensor([[1.0, 1e-9]]), None).item() == 1, "1 + 1e-9 is 1 in float32"


def test_of_equal_logits_top_k_keeps_k():
    assert (next_token_logps(torch.zeros(1, 10), 1.0, 3, None) > -math.inf).sum() == 3


def naive_generate(model, prompt, number, temperature, top_k, top_p, generator):
    """One sequence, computed anew from its beginning for each token."""
    ids, logps = list(prompt), []
    for _ in range(number):
        logp = next_token_logps(model(torch.tensor([ids]))[:, -1], temperature, top_k, top_p)
        token = draw(logp.exp(), generator).item()
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


@pytest.mark.parametrize("changes", [{}, dict(sliding_window=6)])
def test_a_prompt_that_is_asked_several_times_is_read_once_and_drawn_from_as_often(changes, monkeypatch):
    model, one, other = random_model(**changes), [1, 2, 3, 4, 5], [7, 8]
    asked = [one, other, one, one, other]
    shapes, forward = [], generation.Forward.__call__

    def watched(self, ids, *args, **options):
        shapes.append(tuple(ids.shape))
        return forward(self, ids, *args, **options)
    monkeypatch.setattr(generation.Forward, "__call__", watched)
    greedy = generate(model, asked, 9, temperature=0, repetition_penalty=1.2)
    assert shapes[:2] == [(2, 5), (5, 1)]
    for row, prompt in enumerate(asked):
        alone = generate(model, [prompt], 9, temperature=0, repetition_penalty=1.2)
        assert torch.equal(greedy.ids[row], alone.ids[0]), f"prompt {row}"
    drawn = generate(model, asked, 9, generator=seeded(0))
    assert len({tuple(ids) for ids in drawn.ids[[0, 2, 3]].tolist()}) == 3, "samples of one prompt are independent"


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
    """Pearson's chi-square: its mean is its degrees of freedom, its variance twice that; 5 sigma are far."""
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


@torch.no_grad()
def test_the_penalty_follows_what_each_row_has_said():
    """Against the processor of transformers, token by token, on the text without its padding."""
    model, prompts = random_model(vocab_size=12), [[1, 2, 3], [4]]
    together = generate(model, prompts, 8, temperature=0, repetition_penalty=1.5)
    for row, text in enumerate(prompts):
        text = list(text)
        for token in together.ids[row].tolist():
            logits = model(torch.tensor([text]))[:, -1]
            expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([text]), logits).argmax()
            assert token == expected
            text.append(token)
    free = generate(model, prompts, 8, temperature=0).ids
    assert not torch.equal(together.ids, free), "this test needs a model that the penalty moves"


def test_generation_takes_no_gradients_and_leaves_the_model_as_it_was():
    model = random_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sample = generate(model, [[1, 2]], 3)
    assert not sample.logps.requires_grad and torch.is_grad_enabled() and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_can_be_filled_to_its_last_position():
    assert generate(random_model(), [[1] * 60], 4, temperature=0).ids.shape == (1, 4)


# Guesses change nothing


def loop_model():
    """A model that soon repeats itself, so that guesses hold; and one beside it, a little different."""
    model, draft = random_model(vocab_size=12, max_seq_len=256), random_model(vocab_size=12, max_seq_len=256)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=seeded(5)))
    return model, draft


@pytest.mark.parametrize("settings", [{}, dict(repetition_penalty=1.2)], ids=str)
@pytest.mark.parametrize("speculate", [1, 3, 8])
@pytest.mark.parametrize("kind", ["n-grams", "draft", "itself"])
def test_greedy_ids_with_guesses_equal_those_without(kind, speculate, settings):
    model, draft = loop_model()
    draft = {"n-grams": None, "draft": draft, "itself": model}[kind]
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    for prompt in ([3], [1, 2, 3, 4, 5, 1, 2, 3]):
        plain = generate(model, [prompt], 60, temperature=0, **settings)
        before = len(passes)
        guessed = generate(model, [prompt], 60, temperature=0, speculate=speculate, draft=draft, **settings)
        assert torch.equal(guessed.ids, plain.ids) and torch.equal(guessed.logps, plain.logps)
        if draft is not model and not settings:
            assert len(passes) - before < 55, "hardly a guess has held"


def exact_distribution(model, prompt, number, settings):
    """{tokens: probability} of every continuation."""
    texts = {(): 1.0}
    for _ in range(number):
        longer = {}
        for text, mass in texts.items():
            ids = [*prompt, *text]
            seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
            seen[0, ids] = True
            probs = next_token_logps(model(torch.tensor([ids]))[:, -1], **settings, seen=seen).exp()[0]
            longer |= {(*text, token): mass * p for token, p in enumerate(probs.tolist()) if p > 0}
        texts = longer
    return texts


@pytest.mark.parametrize("settings", [
    dict(temperature=1.0), dict(temperature=1.4, top_k=2, repetition_penalty=1.3)], ids=str)
@pytest.mark.parametrize("kind", ["n-grams", "draft"])
@torch.no_grad()
def test_with_guesses_texts_come_as_often_as_without(kind, settings):
    """Pearson's chi-square over all texts of three tokens; its mean is its degrees of freedom, its variance
    twice that. 4.5 sigma; a verify that draws from p, not from what p has more than q, is off by 30."""
    model, draft = random_model(vocab_size=3, n_layers=1), random_model(vocab_size=3, n_layers=1, n_heads=2)
    prompt, draws, generator = [1, 2, 1], 600, seeded(0)
    expected = exact_distribution(model, prompt, 3, settings)
    counts = dict.fromkeys(expected, 0)
    for _ in range(draws):
        sample = generate(model, [prompt], 3, speculate=2, draft=draft if kind == "draft" else None,
                          generator=generator, **settings)
        text = tuple(sample.ids[0].tolist())
        counts[text] += 1  # KeyError: a text that has no probability
        assert abs(sample.logps.sum() - math.log(expected[text])) < 1e-4, "logps are not of the target"
    likely = [text for text, mass in expected.items() if draws * mass >= 5]
    rest = sum(mass for text, mass in expected.items() if text not in likely)
    cells = [(counts[text], draws * expected[text]) for text in likely]
    if rest > 0:
        cells.append((draws - sum(count for count, _ in cells), draws * rest))
    chi_square = sum((count - mean) ** 2 / mean for count, mean in cells)
    assert chi_square < len(cells) - 1 + 4.5 * math.sqrt(2 * (len(cells) - 1))


def test_verify_draws_from_p_whatever_q_is():
    """One guess from q, checked, 4,000 times: the first token that comes out is distributed as p."""
    p, generator = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25] * 4]), seeded(0)
    for q in ([0.1, 0.2, 0.3, 0.4], [0.0, 1.0, 0.0, 0.0], [0.5, 0.3, 0.2, 0.0]):
        q = torch.tensor([q])
        tokens = torch.stack([verify(p, q, draw(q, generator), generator)[0] for _ in range(4000)])
        counts = tokens.bincount(minlength=4)
        assert counts[3] == 0
        chi_square = ((counts - 4000 * p[0]).square() / (4000 * p[0]))[:3].sum()
        assert chi_square < 2 + 5 * math.sqrt(2 * 2), f"q = {q.tolist()}"


def test_a_guess_is_what_followed_the_longest_n_gram_where_it_stood_last():
    def guess(text, count=3, known=None):
        guesses, q = guess_again(10, {} if known is None else known, torch.tensor(text), count, None)
        assert torch.equal(q.argmax(dim=-1), guesses) and (q.sum(dim=-1) == 1).all() and q.shape[1] == 10
        return guesses.tolist()
    assert guess([1, 2, 3, 4, 9, 3, 5, 9, 1, 2, 3]) == [4, 9, 3], "three tokens count more than one"
    assert guess([3, 4, 0, 3, 5, 0, 3]) == [5, 0, 3], "the last time counts"
    assert guess([1, 2, 1, 2], count=5) == [1, 2, 1, 2, 1], "a loop goes on"
    assert guess([1, 2, 3]) == [] and guess([7]) == [] and guess([1, 1], count=0) == []
    known = {}
    for text in ([1, 2], [1, 2, 1], [1, 2, 1, 2, 1]):
        assert guess(text, known=known) == guess(text), "what is kept from call to call changes the guess"


def test_a_stop_in_the_middle_of_a_guess_ends_the_text():
    model, _ = loop_model()
    plain = generate(model, [[3]], 60, temperature=0)
    stop = plain.ids[0, 40].item()
    plain, guessed = (generate(model, [[3]], 60, temperature=0, stop_ids=[stop], speculate=n) for n in (0, 8))
    assert torch.equal(guessed.ids, plain.ids) and guessed.lengths.tolist() == plain.lengths.tolist()


def test_guesses_fill_a_model_to_its_last_position_and_no_further():
    model = random_model()
    plain, guessed = (generate(model, [[1] * 60], 4, temperature=0, speculate=n).ids for n in (0, 9))
    assert torch.equal(plain, guessed)


# Packed weights change nothing


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@torch.no_grad()
def test_with_packed_weights_a_model_says_the_same(changes):
    """Sums of 32 to 48 products in another order: the last bits. Without oneDNN nothing is replaced."""
    model, ids = random_model(**changes), random_ids(3, 7)
    plain, packed = model(ids), Packed(model)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(packed.forwards) == (len(linear) if hasattr(torch.ops.mkldnn, "_linear_pointwise") else 0)
    with packed:
        assert all("forward" in vars(layer) for layer in packed.forwards)
        assert_close(model(ids), plain, **CLOSE)
        assert_close(model(ids[:1, :1]), plain[:1, :1], **CLOSE)
    assert torch.equal(model(ids), plain)


def test_a_model_is_as_it_was_between_tokens_and_after_an_error():
    model = random_model()

    def replaced():
        return [name for name, module in model.named_modules() if "forward" in vars(module)]
    stream = generate_stream(model, [[1, 2]], 20)
    next(stream)
    assert replaced() == [], "whoever trains the model between two tokens would get no gradient"
    del stream
    gc.collect()
    with pytest.raises(ZeroDivisionError), torch.no_grad(), Packed(model):
        assert len(replaced()) == 15 or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
        1 / 0
    assert replaced() == []


def test_what_is_no_plain_layer_keeps_its_own_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)
    model = nn.ModuleDict(dict(subclass=Doubled(4, 4), wide=nn.Linear(4, 4).double(), wrapped=nn.Linear(4, 4),
                               parametrized=nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
                               elsewhere=nn.Linear(4, 4, device="meta")))
    model["wrapped"].forward = lambda x: x  # another's replacement
    assert Packed(model).forwards == {}


@torch.no_grad()
def test_packed_layers_of_one_input_are_right_in_any_order_and_for_inputs_of_their_own():
    model = random_model(attention_bias=True)
    part, x, y = model.model.layers[0].self_attn, randn(2, 3, 32), randn(2, 3, 32, seed=1)
    calls = [("k", x), ("q", y), ("v", y), ("k", x), ("q", x), ("k", x), ("v", x)]
    plain = [getattr(part, f"{name}_proj")(value) for name, value in calls]
    with Packed(model):
        for (name, value), expected in zip(calls, plain):
            assert_close(getattr(part, f"{name}_proj")(value), expected, **CLOSE)
        part.q_proj(x)
        x += 1  # the same tensor holds something else now
        q, v = part.q_proj(x), part.v_proj(x)
    assert_close(q, part.q_proj(x), **CLOSE)
    assert_close(v, part.v_proj(x), **CLOSE)


def test_packed_weights_work_under_autocast():
    model = random_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, [[1, 2, 3]], 10, temperature=0).ids.shape == (1, 10)


def test_generate_packs_where_it_pays_and_never_beyond_the_limit(monkeypatch):
    model, seen = random_model(), []
    model.model.register_forward_hook(lambda *_: seen.append("forward" in vars(model.lm_head)))
    for new, T in ((7, 1), (8, 1), (1, 50)):
        generate(model, random_ids(6, T), new, temperature=0)
    here = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert seen == [False] * 7 + [here] * 8 + [here]
    monkeypatch.setattr(Packed, "LIMIT", 1000)
    assert Packed(model).forwards == {}


# What is refused


def broken(**changes):
    model = random_model(**changes)
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    return model


@pytest.mark.parametrize("settings", [dict(temperature=0), {}, dict(top_k=2), dict(speculate=2)], ids=str)
def test_a_model_whose_logits_are_not_finite_is_refused(settings):
    with pytest.raises(UserError, match="the model's logits are not finite numbers; its weights are damaged"):
        generate(broken(), [[1]], 3, **settings)


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
    ([[1]], dict(min_p=-0.1), "min_p -0.1 is out of range; it must be 0"),
    ([[1]], dict(min_p=1.5), "min_p 1.5 is out of range"),
    ([[1]], dict(repetition_penalty=0.0), "repetition_penalty 0.0 is out of range; it must be 0.001 to 1000"),
    ([[1]], dict(repetition_penalty=math.nan), "repetition_penalty nan is out of range"),
    ([[1], [2, 50]], {}, "prompt 1 holds id 50, but this model's ids are 0 to 49"),
    ([[-1, 50]], {}, "prompt 0 holds id -1, but this model's ids are 0 to 49"),
    ([[1.5]], {}, "prompt 0 is no list of ids"),
    ([[[1]]], {}, "prompt 0 is no list of ids"),
    (torch.tensor([1, 2]), {}, "prompt 0 is no list of ids"),
    ([[1]], dict(speculate=-1), "speculate -1 is out of range"),
    ([[1], [2]], dict(speculate=3), "speculate works on one prompt at a time, and there are 2"),
    ([[1]], dict(draft=random_model()), "speculate 0 is out of range; with a draft model it must be at"),
    ([[1]], dict(speculate=2, draft=random_model(vocab_size=40)), "the draft model has 40 ids and the mod"),
    ([[1] * 40], dict(speculate=2, draft=random_model(max_seq_len=42)), "exceed max_seq_len 42 of this"),
])
def test_what_cannot_be_generated_is_refused_with_a_reason(prompt, settings, message):
    with pytest.raises(UserError, match=message):
        generate(random_model(), prompt, **{"max_new_tokens": 3, **settings})


def test_guesses_that_could_not_be_taken_back_are_refused_before_the_first_token():
    for changes, message in ((dict(sliding_window=10), "taken back from a window of 10 tokens"),
                             (dict(max_seq_len=99, rope_scaling={
                                 "rope_type": "dynamic", "factor": 4.0,
                                 "original_max_position_embeddings": 10}), "other angles where several")):
        model = random_model(**changes)
        with pytest.raises(UserError, match=message):
            next(generate_stream(model, [[1] * 4], 10, speculate=2))
        assert generate(model, [[1] * 4], 6, temperature=0, speculate=2).ids.shape == (1, 6)


def test_ids_as_encode_batch_and_shards_have_them_are_prompts_too():
    model = random_model()
    expected = generate(model, [[1, 2], [3]], 3, temperature=0).ids
    for dtype in (np.uint16, np.uint32):
        prompts = [np.array([1, 2], dtype), np.array([3], dtype)]
        assert torch.equal(generate(model, prompts, 3, temperature=0).ids, expected)


def test_inside_packed_layers_keep_their_gradients():
    model, ids = random_model(), random_ids(2, 8)
    model(ids).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with Packed(model):
        model(ids).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected))


@torch.no_grad()
def test_a_packed_layer_sees_what_was_done_to_its_input_in_place():
    attention = random_model().model.layers[0].self_attn
    x = randn(1, 2, 32)
    with Packed(attention):
        attention.k_proj(x)
        x += 1
        assert_close(attention.k_proj(x), torch.nn.functional.linear(x, attention.k_proj.weight))
