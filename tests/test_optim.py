"""optim.py: the orthogonal direction against the decomposition it avoids, Muon against torch's."""
import copy

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.testing import assert_close

from optim import NEWTON_SCHULZ, Muon, orthogonalize

LOW, HIGH = 0.68, 1.14  # where optim.py says that singular values from 0.01 on end


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_singular_values(values, rows, columns, seed=0):
    """A float64 matrix U S V^T with these singular values, and its U and V^T."""
    u, _, vt = torch.linalg.svd(randn(rows, columns, seed=seed, dtype=torch.float64), full_matrices=False)
    return u * torch.tensor(values, dtype=torch.float64) @ vt, u, vt


# The orthogonal direction


def test_five_steps_bring_every_singular_value_from_a_hundredth_on_near_one():
    """As numbers: p(s) = a s + b s^3 + c s^5, five times."""
    s, (a, b, c) = torch.linspace(0.01, 1, 100_001, dtype=torch.float64), NEWTON_SCHULZ
    for _ in range(5):
        s = a * s + b * s ** 3 + c * s ** 5
    assert LOW < s.min() < LOW + 0.01 and HIGH - 0.01 < s.max() < HIGH


@pytest.mark.parametrize("rows, columns", [(6, 6), (6, 10), (10, 6), (1, 5), (5, 1), (1, 1)])
def test_singular_values_go_through_the_polynomial_and_singular_vectors_stay(rows, columns):
    """U p(p(…p(S)…)) V^T, where S is divided by its norm first. In float64, 1e-9 is magnified rounding."""
    values = [2.0 ** -i for i in range(min(rows, columns))]
    matrix, u, vt = with_singular_values(values, rows, columns)
    s, (a, b, c) = torch.tensor(values, dtype=torch.float64), NEWTON_SCHULZ
    s = s / (s.norm() + 1e-7)
    for _ in range(5):
        s = a * s + b * s ** 3 + c * s ** 5
    assert_close(orthogonalize(matrix[None])[0], u * s @ vt, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows, columns", [(16, 16), (16, 64), (64, 16)])
def test_the_result_is_near_u_vt_of_the_decomposition(rows, columns):
    matrix, u, vt = with_singular_values([1 - i * 0.06 for i in range(16)], rows, columns)  # 1 to 0.1
    result = orthogonalize(matrix.float()[None])[0]
    values = torch.linalg.svdvals(result)
    assert LOW < values.min() and values.max() < HIGH
    off = torch.linalg.matrix_norm(result - (u @ vt).float(), ord=2)
    assert off < max(1 - LOW, HIGH - 1), "the singular vectors have been turned: is a product transposed?"


def test_the_size_of_the_gradient_does_not_matter():
    matrix = randn(1, 8, 12)
    for scale, tolerance in ((1e4, 1e-4), (1e-3, 1e-3)):  # rounding, 480-fold; and 1e-7 beside a norm of 0.01
        assert_close(orthogonalize(matrix * scale), orthogonalize(matrix), rtol=0, atol=tolerance)


def test_a_tall_matrix_is_the_transpose_of_a_wide_one():
    tall = randn(2, 12, 5)
    assert torch.equal(orthogonalize(tall), orthogonalize(tall.mT).mT)


def test_a_batch_equals_its_matrices_one_at_a_time():
    batch = randn(3, 8, 20)
    for i in range(3):  # 1e-4: another order of summation, 6e-8, magnified 3.4^5 = 480-fold
        assert_close(orthogonalize(batch)[i], orthogonalize(batch[i:i + 1])[0], rtol=0, atol=1e-4)


def test_directions_without_any_gradient_stay_so():
    matrix = randn(1, 12, 3) @ randn(1, 3, 12, seed=1)  # rank 3
    values = torch.linalg.svdvals(orthogonalize(matrix)[0])
    assert LOW < values[2] and values[0] < HIGH
    assert values[3] < 1e-3, "rounding, 1e-7, is magnified 480-fold, and no more"


def test_zeros_give_zeros_and_do_not_harm_their_neighbours():
    batch = torch.stack([torch.zeros(4, 6), randn(4, 6)])
    result = orthogonalize(batch)
    assert torch.equal(result[0], torch.zeros(4, 6))
    assert torch.isfinite(result).all() and result[1].abs().max() > 0.1


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_the_direction_equals_torchs(monkeypatch, shape):
    """As it is, each of its fifteen products rounds at 2^-9, a little magnified: within 0.15, of values near 1.
    1e-4 (rounding, 480-fold) where torch's computes in float32 as ours, because .bfloat16() does nothing.
    """
    matrix = randn(*shape)

    def distance():
        theirs = _zeropower_via_newtonschulz(matrix, NEWTON_SCHULZ, 5, 1e-7).float()
        return torch.linalg.matrix_norm(orthogonalize(matrix[None])[0] - theirs, ord=2)
    assert distance() < 0.15
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    assert distance() < 1e-4


# Muon


def parameters(seed=0):
    """Two square matrices, a wide and a tall one for Muon; a table and a vector for AdamW."""
    shapes = [(8, 8), (8, 8), (6, 10), (12, 4), (20, 5), (7,)]
    return [torch.nn.Parameter(randn(*shape, seed=seed + i)) for i, shape in enumerate(shapes)]


def groups(params):
    adam = dict(betas=(0.9, 0.95), eps=1e-8)
    return [dict(params=params[:4], muon=True, lr=0.02, weight_decay=0.1),
            dict(params=params[4:5], lr=3e-3, weight_decay=0.1, **adam),
            dict(params=params[5:], lr=3e-3, weight_decay=0.0, **adam)]


def give_gradients(params, step):
    for i, p in enumerate(params):
        p.grad = randn(*p.shape, seed=1000 * step + i + 1)


def run(optimizer, params, steps):
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def bits(params):
    return [p.detach().clone() for p in params]


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_the_first_step_by_hand():
    """Momentum starts at zero, so the first direction is the gradient's. The decay is not in it.

    A tall matrix, 12 x 3, moves by lr sqrt(12 / 3); a wide one by lr.
    """
    for rows, columns, factor in ((12, 3, 2.0), (3, 12, 1.0)):
        p, grad = torch.nn.Parameter(randn(rows, columns)), randn(rows, columns, seed=1)
        before, p.grad = p.detach().clone(), grad
        other = torch.nn.Parameter(torch.zeros(1))  # AdamW wants one too
        Muon([dict(params=[p], muon=True, lr=0.1, weight_decay=0.5), dict(params=[other], lr=0.1)]).step()
        expected = before * (1 - 0.1 * 0.5) - 0.1 * factor * orthogonalize(grad[None])[0]
        assert_close(p.detach(), expected, rtol=0, atol=1e-5)


def test_momentum_is_a_running_mean_and_nesterov_looks_one_step_ahead():
    params = parameters()
    optimizer = Muon(groups(params), momentum=0.9)
    p, mean = params[2], torch.zeros(6, 10)
    for step in range(3):
        give_gradients(params, step)
        mean = 0.9 * mean + 0.1 * p.grad
        expected = p.detach() * (1 - 0.02 * 0.1) - 0.02 * orthogonalize((0.1 * p.grad + 0.9 * mean)[None])[0]
        optimizer.step()
        assert_close(p.detach(), expected, rtol=0, atol=1e-5)


def test_without_a_gradient_a_weight_only_decays_and_without_grad_it_rests():
    params = parameters()
    before, optimizer = bits(params), Muon(groups(params))
    for p in params:
        p.grad = torch.zeros_like(p)
    params[1].grad = None
    optimizer.step()
    assert_close(params[0].detach(), before[0] * (1 - 0.02 * 0.1))
    assert torch.equal(params[1], before[1])
    assert torch.equal(params[5], before[5]), "one-dimensional weights are in a group without decay"


def test_matrices_move_as_with_torchs_muon(monkeypatch):
    """Torch's, made to compute in float32 as above. 1e-4: rounding, 480-fold."""
    ours, theirs = parameters(), parameters()
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    reference = torch.optim.Muon(theirs[:4], lr=0.02, weight_decay=0.1, momentum=0.95)
    run(Muon(groups(ours)), ours, range(5))
    run(reference, theirs, range(5))
    for mine, other in zip(ours[:4], theirs[:4]):
        assert_close(mine, other, rtol=0, atol=1e-4)


def test_the_other_groups_are_torchs_adamw_bit_for_bit():
    ours, theirs = parameters(), parameters()
    reference = torch.optim.AdamW(groups(theirs)[1:], fused=True)
    run(Muon(groups(ours)), ours, range(5))
    run(reference, theirs, range(5))
    assert equal(ours[4:], theirs[4:])


def test_matrices_of_one_shape_move_as_each_alone():
    together, alone = parameters(), parameters()
    run(Muon(groups(together)), together, range(3))
    for i in (0, 1):
        optimizer = Muon([{**groups(alone)[0], "params": [alone[i]]}, *groups(alone)[1:]])
        run(optimizer, alone, range(3))
        assert_close(together[i], alone[i], rtol=0, atol=1e-5)  # lr 0.02 times the batch's 1e-4, thrice


def test_a_new_learning_rate_is_seen_by_muon_and_adamw():
    params = parameters()
    optimizer = Muon(groups(params))
    run(optimizer, params, range(2))
    before = bits(params)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(optimizer, params, [2])
    assert equal(params, before), "with a rate of zero nothing may move, by decay neither"
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    run(optimizer, params, [3])
    assert not any(torch.equal(p, old) for p, old in zip(params, before))


@pytest.mark.parametrize("way", ["state by state", "load_state_dict", "deepcopy"])
def test_a_restored_optimizer_goes_on_bit_for_bit_with_rates_that_change(way):
    def schedule(optimizer, params, steps):
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (step + 1)
            run(optimizer, params, [step])

    whole, params = parameters(), parameters()
    schedule(Muon(groups(whole)), whole, range(6))
    first = Muon(groups(params))
    schedule(first, params, range(3))
    if way == "deepcopy":
        params, second = copy.deepcopy((params, first))
    else:
        saved = {p: dict(first.state[p]) for p in params}
        later = [torch.nn.Parameter(p.detach().clone()) for p in params]
        second = Muon(groups(later))
        if way == "load_state_dict":
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        else:  # as train.py does, from its own files
            for p, new in zip(params, later):
                for key, value in saved[p].items():
                    second.state[new][key] = value.clone()
        params = later
    schedule(second, params, range(3, 6))
    assert equal(params, whole), "AdamW and Muon must share groups and state after restoring as before"


def test_it_holds_one_moment_for_a_matrix_and_two_for_the_rest():
    params = parameters()
    optimizer = Muon(groups(params))
    run(optimizer, params, range(1))
    names = [sorted(optimizer.state[p]) for p in params]
    assert names == [["momentum"]] * 4 + [["exp_avg", "exp_avg_sq", "step"]] * 2


# Learning


def test_it_solves_a_badly_scaled_problem_that_gradient_descent_hardly_begins():
    """Least squares whose directions differ a hundredfold: Muon moves all of them equally fast."""
    scales, target = torch.logspace(0, -2, 8), randn(8, 8)
    p, other = torch.nn.Parameter(torch.zeros(8, 8)), torch.nn.Parameter(torch.zeros(1))
    optimizer = Muon([dict(params=[p], muon=True, lr=0.0), dict(params=[other], lr=0.0)])
    plain = torch.zeros(8, 8)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        p.grad = 2 * (p.detach() - target) * scales.square()
        optimizer.step()
        plain -= 0.5 * 2 * (plain - target) * scales.square()  # twice 0.5 would no longer converge
    assert (p - target).abs().max() < 0.2 * (plain - target).abs().max()
