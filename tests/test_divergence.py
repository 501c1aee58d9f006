"""divergence.py: the kinds beside TRL, torch and a plain loop; what is masked; the fast form; the picture."""
import functools
import math
import os
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import divergence
import objectives
from config import UserError
from divergence import FLOOR, KINDS, Divergence, Live, TopK, fit, humps, kd_loss, linear_kd_loss
from support import in_process, need_trl, randn, seeded

LN2 = math.log(2)


def case(*shape, V=7, seed=0, scale=2.0, masked=()):
    """student and teacher logits (…, V) in float64, the student's a leaf; targets, -100 where `masked`."""
    student, teacher = (scale * randn(*shape, V, seed=seed + i).double() for i in (1, 2))
    targets = torch.randint(V, shape, generator=seeded(seed + 3))
    for place in masked:
        targets[place] = -100
    return student.requires_grad_(), teacher, targets


def gradient_of(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


# ---- the divergences: by hand, by a plain loop, beside torch -----------------------------------------------


def softmax(logits, temperature):
    """In Python's floats."""
    powers = [math.exp(u / temperature) for u in logits]
    return [power / sum(powers) for power in powers]


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b) if x)


def plain_divergence(p, q, kind, beta=0.5, skew=0.1):
    """As the papers write it, of two lists of probabilities."""
    def mixed(share):
        return [share * x + (1 - share) * y for x, y in zip(p, q)]
    if kind == "jsd" and beta in (0, 1):
        kind = "reverse" if beta else "forward"
    return {"forward": kl(p, q), "reverse": kl(q, p),
            "jsd": beta * kl(p, mixed(beta)) + (1 - beta) * kl(q, mixed(beta)),
            "skew_forward": kl(p, mixed(skew)), "skew_reverse": kl(q, mixed(1 - skew))}[kind]


def between(p, q, kind, beta=0.5, skew=0.1):
    """divergence.divergence of two lists of probabilities, temperature 1."""
    p, q = (torch.tensor([x], dtype=torch.float64).log().clamp(min=FLOOR) for x in (p, q))
    return divergence.divergence(p, q, Divergence(kind, beta, skew).check()).item()


@pytest.mark.parametrize("kind, expected", [
    ("forward", LN2 - math.log(3) / 2), ("reverse", 0.75 * math.log(3) - LN2),
    ("jsd", kl([1 / 2, 1 / 2], [3 / 8, 5 / 8]) / 2 + kl([1 / 4, 3 / 4], [3 / 8, 5 / 8]) / 2),
    ("skew_forward", kl([1 / 2, 1 / 2], [0.275, 0.725])),
    ("skew_reverse", kl([1 / 4, 3 / 4], [0.475, 0.525]))])
def test_each_kind_by_hand(kind, expected):
    assert between([1 / 2, 1 / 2], [1 / 4, 3 / 4], kind) == pytest.approx(expected, rel=1e-12)
    in_the_docstring = {"forward": 0.1438, "reverse": 0.1308}
    assert round(expected, 4) == in_the_docstring.get(kind, round(expected, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta, skew", [(0.5, 0.1), (0.2, 0.7), (0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_every_kind_is_the_plain_loop_times_the_square_of_the_temperature(kind, beta, skew, temperature):
    student, teacher, targets = case(2, 3, V=5, masked=[(0, 1), (1, 2)])
    loss, count = kd_loss(student, teacher, targets, temperature, kind, beta, skew=skew)
    expected = 0.0
    for place in (targets != -100).nonzero().tolist():
        p, q = (softmax(logits[tuple(place)].tolist(), temperature) for logits in (teacher, student))
        expected += plain_divergence(p, q, kind, beta, skew)
    assert loss.item() == pytest.approx(temperature ** 2 * expected, rel=1e-10, abs=1e-12)
    assert count == 4


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_and_reverse_are_torchs_kl_div_with_the_arguments_in_this_order(temperature):
    student, teacher, targets = case(4, 5)
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="sum")  # (input, target): KL(target | input)
    reverse = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    for kind, expected in (("forward", forward), ("reverse", reverse)):
        loss, _ = kd_loss(student, teacher, targets, temperature, kind)
        torch.testing.assert_close(loss, temperature ** 2 * expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient_of(loss, student),
                                   temperature ** 2 * gradient_of(expected, student), rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def peer():
    """TRL's generalized_jsd_loss."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    need_trl()
    from trl.experimental.gkd import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


@pytest.mark.filterwarnings("ignore")  # TRL and transformers about each other
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_jsd_has_trls_values_and_gradients_but_for_the_square_of_the_temperature(peer, beta, temperature):
    student, teacher, targets = case(3, 6, V=11, masked=[(0, 0), (1, slice(2, 6)), (2, 5)])
    theirs = peer(student, teacher, targets, beta, temperature, reduction="sum")
    loss, count = kd_loss(student, teacher, targets, temperature, "jsd", beta)
    ours = loss / temperature ** 2
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # their beta is rounded to float32's log
    torch.testing.assert_close(gradient_of(ours, student), gradient_of(theirs, student), rtol=1e-6, atol=1e-9)
    mean = peer(student, teacher, targets, beta, temperature)  # their "batchmean" with labels
    assert (ours / count).item() == pytest.approx(mean.item(), rel=1e-6)
    if beta in (0, 1):
        named, _ = kd_loss(student, teacher, targets, temperature, "reverse" if beta else "forward")
        assert named.item() == loss.item(), "beta 0 is forward, 1 reverse, as in TRL and GKD's own code"


# ---- what holds for the divergences ------------------------------------------------------------------------


def test_forward_and_reverse_are_not_swapped():
    sure, wide = [1 - 1e-9, 1e-9], [0.5, 0.5]
    small, large = LN2, math.log(0.5 / 1e-9) / 2 - LN2 / 2  # KL(sure | open), KL(open | sure)
    for kind, teacher, student, expected in [("forward", wide, sure, large), ("reverse", wide, sure, small),
                                             ("forward", sure, wide, small), ("reverse", sure, wide, large)]:
        assert between(teacher, student, kind) == pytest.approx(expected, rel=1e-6), \
            f"{kind}: forward is dear where the student leaves out what the teacher has, reverse otherwise"


def random_pair(seed, V=6):
    return [(3 * randn(V, seed=2 * seed + i).double()).softmax(-1).tolist() for i in (0, 1)]


@pytest.mark.parametrize("seed", range(10))
def test_jsd_is_symmetric_at_a_half_and_at_most_ln_2(seed):
    p, q = random_pair(seed)
    assert between(p, q, "jsd") == pytest.approx(between(q, p, "jsd"), rel=1e-12)
    assert 0 < between(p, q, "jsd") <= LN2
    assert between(p, q, "jsd", beta=0.2) == pytest.approx(between(q, p, "jsd", beta=0.8), rel=1e-10)


def test_jsd_of_distributions_with_nothing_in_common_is_ln_2():
    assert between([1, 0], [0, 1], "jsd") == pytest.approx(LN2, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_distribution_is_at_no_distance_from_itself_and_from_others_at_more(kind):
    p, q = random_pair(0)
    assert between(p, p, kind) == pytest.approx(0, abs=1e-15) and between(p, q, kind) > 0.01


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_skew_is_nothing_at_0_all_at_1_and_bounds_the_loss_between(kind):
    p, q = random_pair(1)
    assert between(p, q, f"skew_{kind}", skew=0.0) == between(p, q, kind)
    assert between(p, q, f"skew_{kind}", skew=1.0) == pytest.approx(0, abs=1e-15)
    # no ratio is above 1 / skew, however the two differ
    assert between([1, 0], [0, 1], f"skew_{kind}", skew=0.1) == pytest.approx(-math.log(0.1), rel=1e-9)


def test_jsd_over_beta_goes_to_forward_and_to_reverse_at_the_other_end():
    p, q = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
    for kind, near in (("forward", lambda beta: between(p, q, "jsd", beta) / beta),
                       ("reverse", lambda beta: between(p, q, "jsd", 1 - beta) / beta)):
        errors = [abs(near(beta) - between(p, q, kind)) for beta in (1e-2, 1e-3, 1e-4)]
        assert errors[2] < 1e-3 * between(p, q, kind)
        assert errors[1] / errors[2] == pytest.approx(10, rel=0.1), "the error falls with beta"


# ---- weight, temperature, sum ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_weight_0_is_cross_entropy_and_1_distillation_and_what_lies_between_their_mixture(temperature):
    student, teacher, targets = case(3, 4, masked=[(0, 2)])
    ce = F.cross_entropy(student.flatten(0, 1), targets.flatten(), reduction="sum")
    losses = {weight: kd_loss(student, teacher, targets, temperature, kd_weight=weight)[0]
              for weight in (0, 0.3, 1)}
    log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    kd = temperature ** 2 * F.kl_div(log_q, p, reduction="none")[targets != -100].sum()
    for weight, expected in ((0, ce), (1, kd), (0.3, 0.3 * kd + 0.7 * ce)):
        torch.testing.assert_close(losses[weight], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient_of(losses[weight], student), gradient_of(expected, student),
                                   rtol=1e-10, atol=1e-12)
    nothing = torch.full_like(teacher, math.nan)
    assert kd_loss(student, nothing, targets, kd_weight=0)[0].item() == pytest.approx(ce.item())


def test_at_high_temperatures_the_gradient_is_that_of_matching_centred_logits():
    """Hinton et al. 2015, Eq. 4, times T^2: (z - v) / V, with z and v centred; the next term is 1/T as large.
    """
    student, teacher, targets = case(5, V=9)
    z, v = (logits - logits.mean(-1, keepdim=True) for logits in (student.detach(), teacher))
    for kind in ("forward", "reverse"):
        errors = []
        for temperature in (100.0, 1000.0):
            loss, _ = kd_loss(student, teacher, targets, temperature, kind)
            errors.append((gradient_of(loss, student) - (z - v) / 9).abs().max().item())
        assert errors[0] < 0.05 * ((z - v) / 9).abs().max() and errors[1] < errors[0] / 9, errors


def test_the_square_of_the_temperature_keeps_the_gradients_size():
    student, teacher, targets = case(50, V=9, scale=1.0)
    sizes = [gradient_of(kd_loss(student, teacher, targets, temperature)[0], student).norm().item()
             for temperature in (1.0, 2.0, 8.0)]
    assert max(sizes) < 2 * min(sizes), f"{sizes}: without T^2 the last would be 64 times smaller"


def test_it_is_a_sum_over_the_tokens_that_count_and_not_over_rows_or_places():
    student, teacher, targets = case(3, 4, masked=[(0, 0), (2, slice(1, 4))])
    loss, count = kd_loss(student, teacher, targets)
    assert count == 8 and not count.is_floating_point()
    alone = [kd_loss(student[i, j], teacher[i, j], targets[i, j])
             for i, j in (targets != -100).nonzero().tolist()]
    assert loss.item() == pytest.approx(sum(one.item() for one, _ in alone), rel=1e-12)
    assert all(one == 1 for _, one in alone)
    twice, number = kd_loss(*(torch.cat([x, x]) for x in (student, teacher, targets)))
    assert twice.item() == pytest.approx(2 * loss.item(), rel=1e-12) and number == 16
    longer = [F.pad(student, (0, 0, 0, 5)), F.pad(teacher, (0, 0, 0, 5)), F.pad(targets, (0, 5), value=-100)]
    assert kd_loss(*longer)[0].item() == pytest.approx(loss.item(), rel=1e-12), "padding is no token"


def test_logits_in_half_precision_are_compared_in_float32():
    student, teacher, targets = case(4)
    halves = [x.detach().bfloat16() for x in (student, teacher)]
    loss, _ = kd_loss(*halves, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(kd_loss(*(x.double() for x in halves), targets)[0].item(), rel=1e-5)


# ---- what is masked, impossible or shifted -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kd_weight", [1.0, 0.5])
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
def test_what_stands_at_masked_tokens_changes_nothing_be_it_nan(kind, kd_weight, rubbish):
    student, teacher, targets = case(2, 3, masked=[(0, 1), (1, 0)])
    expected, _ = kd_loss(student, teacher, targets, 2.0, kind, kd_weight=kd_weight)
    bad, bad_teacher = student.detach().clone(), teacher.clone()
    for place in [(0, 1), (1, 0)]:
        bad[place] = bad_teacher[place] = rubbish
    bad.requires_grad_()
    loss, count = kd_loss(bad, bad_teacher, targets, 2.0, kind, kd_weight=kd_weight)
    assert loss.item() == expected.item() and count == 4
    gradient = gradient_of(loss, bad)
    assert torch.equal(gradient, gradient_of(expected, student)), "mask before the arithmetic, not after it"
    assert not gradient[targets == -100].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kd_weight", [1.0, 0.5])
@pytest.mark.parametrize("whose", [("student",), ("teacher",), ("student", "teacher")], ids=str)
def test_impossible_tokens_cost_finitely_and_have_finite_gradients(kind, kd_weight, whose):
    student, teacher, targets = case(3, V=6)
    student = student.detach()
    targets[0] = 2  # impossible to the student, too
    if "student" in whose:
        student[:, 2] = student[1, 4] = -math.inf
    if "teacher" in whose:
        teacher[:, 3] = teacher[1, 4] = -math.inf
    student.requires_grad_()
    loss, _ = kd_loss(student, teacher, targets, 1.5, kind, kd_weight=kd_weight)
    gradient = gradient_of(loss, student)
    assert loss.isfinite() and loss > 0 and gradient.isfinite().all()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3).double(), rtol=0, atol=1e-9)  # of softmax


def test_a_token_that_the_student_has_ruled_out_costs_100_nats_and_is_still_pulled_at():
    student = torch.tensor([[0.0, -300.0]], dtype=torch.float64, requires_grad=True)
    loss, _ = kd_loss(student, torch.zeros(1, 2).double(), torch.tensor([0]))
    assert loss.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - FLOOR), rel=1e-12)
    assert gradient_of(loss, student).tolist()[0] == pytest.approx([0.5, -0.5]), "q - p, or it stays out"


@pytest.mark.parametrize("kd_weight", [0.0, 0.5, 1.0])
def test_a_batch_without_targets_has_loss_0_count_0_and_gradients_0(kd_weight):
    student, teacher, targets = case(2, 3, masked=[slice(None)])
    loss, count = kd_loss(student, teacher, targets, kd_weight=kd_weight)
    assert loss.item() == 0 and count == 0 and not gradient_of(loss, student).any()
    hidden, weight = randn(0, 4).requires_grad_(), randn(7, 4).requires_grad_()
    loss, kd, ce = linear_kd_loss(hidden, weight, Live(randn(0, 4), randn(7, 4)), targets[targets != -100],
                                  kd_weight=kd_weight)
    assert loss.item() == kd.item() == ce.item() == 0
    assert not gradient_of(loss, weight).any() and gradient_of(loss, hidden).shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_teacher(kind):
    student, teacher, targets = case(4)
    teacher.requires_grad_()
    kd_loss(student, teacher, targets, kind=kind)[0].backward()
    assert teacher.grad is None and student.grad.any()
    hidden, head = randn(4, 3).requires_grad_(), randn(7, 3).requires_grad_()
    linear_kd_loss(randn(4, 3, seed=1).requires_grad_(), randn(7, 3, seed=2), Live(hidden, head), targets,
                   Divergence(kind))[0].backward()
    assert hidden.grad is None and head.grad is None


def test_the_logits_at_a_place_go_with_the_target_at_that_place():
    targets = torch.tensor([[3, 1, 4, -100, 5]])
    sure = 50.0 * F.one_hot(targets.clamp(min=0), 7).double()
    at_its_place = kd_loss(sure, sure, targets, kd_weight=0)[0]
    shifted = kd_loss(sure[:, :-1], sure[:, :-1], targets[:, 1:], kd_weight=0)[0]
    assert at_its_place.item() < 1e-15 and shifted.item() == pytest.approx(3 * 50), \
        "targets are the inputs shifted by one already: shifting once more compares with the wrong token"
    student, teacher, _ = case(1, 5)
    for place in range(5):
        other = teacher.clone()
        other[0, place] += torch.arange(7.0)
        changed = kd_loss(student, other, targets)[0] != kd_loss(student, teacher, targets)[0]
        assert changed == (place != 3), f"place {place}: is the mask shifted by one?"


@pytest.mark.parametrize("changes, words", [
    (dict(temperature=0.0), "--temperature 0.0 is out of range; it must be above 0"),
    (dict(temperature=-1.0), "--temperature -1.0 is out of range"),
    (dict(temperature=math.nan), "--temperature nan is out of range"),
    (dict(temperature=math.inf), "--temperature inf is out of range"),
    (dict(kind="jsd", beta=1.5), "--beta 1.5 is out of range; it must be 0 to 1"),
    (dict(kind="jsd", beta=math.nan), "--beta nan is out of range"),
    (dict(kind="skew_forward", skew=-0.1), "--skew -0.1 is out of range"),
    (dict(kind="forwards"), "--kind forwards is not one of forward, reverse, jsd, skew_forward, skew_"),
    (dict(kd_weight=1.5), "--kd_weight 1.5 is out of range; it must be 0 to 1"),
    (dict(kd_weight=math.nan), "--kd_weight nan is out of range")], ids=str)
def test_a_loss_without_meaning_is_refused_in_one_line(changes, words):
    with pytest.raises(UserError) as error:
        kd_loss(*case(2), **changes)
    assert words in str(error.value) and "\n" not in str(error.value)
    if "kd_weight" not in changes:
        with pytest.raises(UserError):
            Divergence(**changes).check()


def test_other_vocabularies_are_refused_with_what_to_do_instead():
    student, _, targets = case(2)
    with pytest.raises(UserError, match="student gives 7 logits and the teacher 9: .*answers.py") as error:
        kd_loss(student, torch.zeros(2, 9), targets)
    assert "\n" not in str(error.value)


# ---- without the logits of all tokens ----------------------------------------------------------------------


def linear_case(N=13, C=5, V=11, seed=0, scale=1.0, dtype=torch.float64):
    """The student's hidden states and head, both leaves; the teacher's, of another width; targets."""
    shapes = ((N, C), (V, C), (N, C + 3), (V, C + 3))
    hidden, weight, *of_teacher = (scale * randn(*shape, seed=seed + i).to(dtype)
                                   for i, shape in enumerate(shapes))
    targets = torch.randint(V, (N,), generator=seeded(seed + 9))
    return hidden.requires_grad_(), weight.requires_grad_(), Live(*of_teacher), targets


def both_forms(case, of, kd_weight, k=None):
    """[(loss, gradients)] of the fast form and of the plain one; k: the teacher's tokens that are known."""
    hidden, weight, live, targets = case
    teacher = live
    if k is not None:
        teacher = TopK.of(divergence.log_probabilities(live.hidden @ live.weight.T, of.temperature), k)
    fast, kd, ce = linear_kd_loss(hidden, weight, teacher, targets, of, kd_weight)
    logits = hidden @ weight.T
    plain, _ = kd_loss(logits, live.hidden @ live.weight.T, targets, of.temperature, of.kind, of.beta,
                       kd_weight=kd_weight, skew=of.skew)
    again = kd_weight * of.temperature ** 2 * kd + (1 - kd_weight) * ce
    torch.testing.assert_close(fast.detach(), again, rtol=1e-5, atol=1e-6)
    assert not kd.requires_grad and not ce.requires_grad
    return [(loss, torch.autograd.grad(loss, (hidden, weight))) for loss in (fast, plain)]


OF = [Divergence(kind, beta, skew, temperature) for kind, beta, skew in
      [("forward", 0.5, 0.1), ("reverse", 0.5, 0.1), ("jsd", 0.5, 0.1), ("jsd", 0.1, 0.1), ("jsd", 0.0, 0.1),
       ("jsd", 1.0, 0.1), ("skew_forward", 0.5, 0.1), ("skew_reverse", 0.5, 0.3), ("skew_forward", 0.5, 0.0),
       ("skew_reverse", 0.5, 1.0)]
      for temperature in (1.0, 2.5)]


@pytest.mark.parametrize("of", OF, ids=str)
@pytest.mark.parametrize("kd_weight", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("known", ["all", "all but one"])
def test_the_fast_form_has_the_values_and_gradients_of_the_plain_one(of, kd_weight, known):
    k = None if known == "all" else 10  # of 11: the bucket of others holds one token
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):  # 2e-5: 13 sums of 11 roundings
        fast, plain = both_forms(linear_case(dtype=dtype), of, kd_weight, k)
        torch.testing.assert_close(fast[0], plain[0], rtol=tolerance, atol=tolerance)
        for ours, expected in zip(fast[1], plain[1]):
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_forms_agree_where_logits_lie_hundreds_of_nats_apart(kind):
    for known in (None, 10):
        fast, plain = both_forms(linear_case(scale=9.0), Divergence(kind), 0.5, known)
        for ours, expected in zip((fast[0], *fast[1]), (plain[0], *plain[1])):
            assert ours.isfinite().all()
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)  # values in the hundreds


def test_weight_0_needs_no_teacher():
    hidden, weight, _, targets = linear_case()
    loss, kd, ce = linear_kd_loss(hidden, weight, None, targets, kd_weight=0.0)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert loss.item() == ce.item() == pytest.approx(expected.item(), rel=1e-12) and kd == 0
    torch.testing.assert_close(gradient_of(loss, hidden), gradient_of(expected, hidden), rtol=1e-12,
                               atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 13])
@pytest.mark.parametrize("k", [None, 4])
def test_how_many_rows_are_done_at_a_time_changes_nothing(monkeypatch, rows, k):
    of = Divergence("jsd", 0.3, temperature=2.0)
    expected = both_forms(linear_case(), of, 0.7, k)[0]
    monkeypatch.setattr(objectives, "rows_at_once", lambda *_: rows)
    found = both_forms(linear_case(), of, 0.7, k)[0]
    for ours, other in zip((found[0], *found[1]), (expected[0], *expected[1])):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of", OF, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_gradients_of_buckets_are_the_slopes_of_the_loss(of, k):
    hidden, weight, live, targets = linear_case(N=4, C=3, V=7)
    top = TopK.of(divergence.log_probabilities(live.hidden @ live.weight.T, of.temperature), k)
    assert torch.autograd.gradcheck(lambda *x: linear_kd_loss(*x, top, targets, of, 0.6)[0], (hidden, weight))


def test_buckets_by_hand():
    log_p = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    top = TopK.of(log_p, 2)
    assert top.ids.tolist() == [[0, 1]] and top.logps.exp().tolist() == [pytest.approx([0.5, 0.3, 0.2])]
    q = torch.tensor([[0.4, 0.1, 0.2, 0.3]], dtype=torch.float64)
    loss, kd, _ = linear_kd_loss(q.log(), torch.eye(4).double(), top, torch.tensor([0]))
    assert kd.item() == pytest.approx(kl([0.5, 0.3, 0.2], [0.4, 0.1, 0.5]), rel=1e-12)
    assert top.to("cpu").logps is not None and loss.item() == kd.item()


def test_what_is_left_for_others_is_summed_over_them_and_not_taken_from_one():
    logits = torch.tensor([[0.0, -40.0, -41.0]])
    top = TopK.of(divergence.log_probabilities(logits), 1)
    exact = math.log(math.exp(-40) + math.exp(-41))
    assert top.logps[0, 1].item() == pytest.approx(exact, rel=1e-6), "1 - 1 in float32 is nothing"


def test_where_nothing_is_left_for_others_that_counts_as_the_floor_and_what_was_given_stays():
    logps = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()
    given, ids = logps.clone(), torch.tensor([[0, 1], [2, 0]])
    assert divergence.log_rest(logps, ids).tolist() == [[FLOOR], [pytest.approx(math.log(0.3))]]
    assert torch.equal(logps, given), "the distribution was written over"


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_known_tokens_show_less_and_never_more_than_there_is(kind):
    """The data-processing inequality: putting tokens together cannot take distributions further apart."""
    (hidden, weight, live, targets), of = linear_case(N=40, V=11, seed=5), Divergence(kind)
    log_p = divergence.log_probabilities(live.hidden @ live.weight.T)
    for row in range(40):
        one = slice(row, row + 1)
        teachers = [TopK.of(log_p[one], k) for k in range(1, 11)] + [Live(live.hidden[one], live.weight)]
        *losses, whole = [linear_kd_loss(hidden[one], weight, teacher, targets[one], of)[0].item()
                          for teacher in teachers]
        assert all(a <= b + 1e-12 for a, b in zip(losses, [*losses[1:], whole])), (row, losses, whole)
        assert losses[-1] == pytest.approx(whole, rel=1e-9), "all but one: the last is alone in its bucket"
    assert losses[0] < 0.999 * whole


class Made(TorchDispatchMode):
    """Notes the shapes of all tensors that are made meanwhile, and how many numbers the largest has."""

    def __init__(self):
        super().__init__()
        self.numbers, self.shapes = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
                self.shapes.add(tuple(x.shape))
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 5])
def test_never_are_more_than_a_few_rows_logits_there(monkeypatch, kind, k):
    N, V, rows = 500, 300, 8
    hidden, weight, teacher, targets = linear_case(N=N, C=2, V=V, dtype=torch.float32)
    if k:
        teacher = TopK(torch.stack([torch.randperm(V, generator=seeded(i))[:k] for i in range(N)]),
                       randn(N, k + 1).log_softmax(-1))
    monkeypatch.setattr(objectives, "rows_at_once", lambda *_: rows)
    with Made() as made:
        linear_kd_loss(hidden, weight, teacher, targets, Divergence(kind), 0.5)[0].backward()
    bound = max(rows * V, N * (2 + 3), V * 2, N * (k or 0) + N)
    assert rows * V <= made.numbers <= bound, f"{made.numbers:,} numbers at once; all logits are {N * V:,}"


def test_in_bf16_the_products_are_rough_and_the_gradients_whole():
    hidden, weight, live, targets = linear_case(N=64, C=16, V=40, dtype=torch.float32)
    exact = linear_kd_loss(hidden, weight, live, targets, kd_weight=0.5)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = linear_kd_loss(hidden, weight, live, targets, kd_weight=0.5)[0]
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.02) and rough.item() != exact.item()
    for x in (hidden, weight):
        ours, expected = gradient_of(rough, x), gradient_of(exact, x)
        assert ours.dtype == torch.float32
        assert (ours - expected).norm() < 0.02 * expected.norm()  # bf16 has 8 bits: 0.4 % a product


def test_a_frozen_head_gets_no_gradient_and_an_evaluation_computes_none():
    hidden, weight, live, targets = linear_case()
    weight.requires_grad_(False)
    with Made() as made:
        linear_kd_loss(hidden, weight, live, targets)[0].backward()
    assert weight.grad is None and hidden.grad.any()
    assert tuple(weight.shape) not in made.shapes, "nobody asks for the gradient of a frozen head"
    with torch.no_grad():
        loss = linear_kd_loss(hidden, weight, live, targets)[0]
    assert not loss.requires_grad and loss.item() == pytest.approx(
        linear_kd_loss(hidden, weight, live, targets)[0].item(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_no_token_has_may_be_more_on_either_side(kind):
    """The teacher's head has 11 rows, the student's 9 or 13, both tokenizers 9 tokens."""
    hidden, weight, live, targets = linear_case()
    targets, of = targets.clamp(max=8), Divergence(kind)
    ours = linear_kd_loss(hidden, weight[:9], live, targets, of)[0]
    expected = kd_loss(hidden @ weight[:9].T, live.hidden @ live.weight[:9].T, targets, kind=kind)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    wide = torch.cat([weight, randn(2, 5, seed=8).double()])
    ours = linear_kd_loss(hidden, wide, live, targets, of)[0]
    teacher = F.pad(live.hidden @ live.weight.T, (0, 2), value=-math.inf)
    expected = kd_loss(hidden @ wide.T, teacher, targets, kind=kind)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert ours.isfinite() and gradient_of(ours, hidden).isfinite().all()


def test_a_student_learns_its_teachers_distribution():
    """With a free logit for each token every kind ends at the teacher itself."""
    _, teacher, targets = case(3, V=6)
    for kind in KINDS:
        student = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([student])
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 300)
            optimizer.zero_grad()
            loss, _ = kd_loss(student, teacher, targets, kind=kind)
            loss.backward()
            optimizer.step()
        assert loss.item() < 1e-3, kind
        assert (student.softmax(-1) - teacher.softmax(-1)).abs().max() < 0.01, kind


# ---- the picture -------------------------------------------------------------------------------------------

X = torch.linspace(-10, 10, 401)


def moments(log_q):
    q = log_q.exp()
    mean = float(q @ X)
    return mean, float(q @ (X - mean) ** 2)


@pytest.mark.parametrize("distance, share", [(6.0, 0.6), (4.0, 0.5)])
def test_forward_covers_both_humps_with_their_mean_and_variance(distance, share):
    """The nearest of an exponential family in KL(p | q) has p's moments."""
    log_q, value = fit(humps(X, distance, share), X, Divergence("forward"), starts=3)
    mean, variance = moments(log_q)
    assert mean == pytest.approx((1 - 2 * share) * distance / 2, abs=0.02)  # what 200 steps of Adam leave
    assert variance == pytest.approx(1 + share * (1 - share) * distance ** 2, rel=0.02)


def test_reverse_sits_on_the_larger_hump():
    log_q, value = fit(humps(X, 8.0, 0.6), X, Divergence("reverse"), starts=2)
    mean, variance = moments(log_q)
    assert mean == pytest.approx(-4, abs=0.05) and variance == pytest.approx(1, rel=0.05)
    assert value == pytest.approx(-math.log(0.6), abs=0.01), "the price of leaving out the other"


def test_jsds_distance_is_at_most_ln_2_and_at_most_that_of_either_neighbour_asked_in_jsd():
    log_p, of = humps(X, 6.0, 0.6), Divergence("jsd")
    _, value = fit(log_p, X, of, starts=3)
    assert 0 < value <= LN2
    for kind in ("forward", "reverse"):
        log_q, _ = fit(log_p, X, Divergence(kind), starts=2)
        there = divergence.divergence(log_p[None], log_q[None], of).item()
        assert value <= there + 1e-3, f"the nearest in {kind} is nearer in jsd, too"


@pytest.fixture
def command(monkeypatch, capsys):
    monkeypatch.setattr(divergence, "fit", functools.partial(fit, starts=2, steps=60))  # a second
    return lambda *words: in_process(monkeypatch, capsys, divergence.main, *words)


def test_the_command_draws_four_lines_and_writes_over_nothing_unasked(tmp_path, command):
    path = tmp_path / "humps.svg"
    code, out, err = command("--out", path)
    assert code == 0, err
    lines = [line.split()[0] for line in out.splitlines() if " nats; " in line]
    assert lines == ["forward", "reverse", "jsd"]
    svg = path.read_text(encoding="utf-8")
    assert svg.count("<polyline") == 4 and ElementTree.fromstring(svg) is not None
    path.write_text("mine", encoding="utf-8")
    code, _, err = command("--out", path)
    assert code == 2 and "exists; pass --overwrite" in err and err.count("\n") == 1
    assert path.read_text(encoding="utf-8") == "mine"
    assert command("--out", path, "--overwrite")[0] == 0 and path.read_text(encoding="utf-8") == svg
    assert [file.name for file in tmp_path.iterdir()] == ["humps.svg"]


@pytest.mark.parametrize("words, message", [(["--distance", "30"], "--distance 30.0 is out of range"),
                                            (["--share", "1.1"], "--share 1.1 is out of range"),
                                            (["--distance", "nan"], "is not a finite number")])
def test_mistakes_end_in_one_line(tmp_path, command, words, message):
    code, _, err = command("--out", tmp_path / "humps.svg", *words)
    assert code == 2 and message in err and err.count("\n") == 1
