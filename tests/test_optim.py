"""optim.py: the orthogonal direction against the decomposition it avoids, Muon and Adafactor against their
formulas and against torch's and transformers', each in pieces against itself whole; groups; schedules.
"""
import copy
import math
import queue
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.testing import assert_close

import optim
from model import ModelConfig, Transformer
from optim import (NEWTON_SCHULZ, SCHEDULES, Adafactor, Muon, describe_groups, learning_rate, make_optimizer,
                   orthogonalize, parameter_groups, picture)
from support import warm_processes

LOW, HIGH = 0.68, 1.14  # where optim.py says that singular values from 0.01 on end


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_singular_values(values, rows, columns, seed=0):
    """A float64 matrix U S V^T with these singular values, and its U and V^T."""
    u, _, vt = torch.linalg.svd(randn(rows, columns, seed=seed, dtype=torch.float64), full_matrices=False)
    return u * torch.tensor(values, dtype=torch.float64) @ vt, u, vt


# ---- the orthogonal direction ------------------------------------------------------------------------------


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


def test_in_bfloat16_the_singular_values_are_hardly_rougher():
    values = torch.linalg.svdvals(orthogonalize(randn(2, 24, 40), dtype=torch.bfloat16))
    # bfloat16's 2^-9 in each product, magnified where p(s) is steep: a tenth of the values' own spread or so
    assert LOW - 0.1 < values.min() and values.max() < HIGH + 0.1


def test_zeros_give_zeros_and_do_not_harm_their_neighbours():
    batch = torch.stack([torch.zeros(4, 6), randn(4, 6)])
    result = orthogonalize(batch)
    assert torch.equal(result[0], torch.zeros(4, 6))
    assert torch.isfinite(result).all() and result[1].abs().max() > 0.1


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_the_direction_equals_torchs(monkeypatch, shape):
    """As it is, each of its fifteen products rounds at 2^-9, a little magnified: within 0.15, of values near
    1. 1e-4 (rounding, 480-fold) where torch's computes in float32 as ours, because .bfloat16() does nothing.
    """
    matrix = randn(*shape)

    def distance():
        theirs = _zeropower_via_newtonschulz(matrix, NEWTON_SCHULZ, 5, 1e-7).float()
        return torch.linalg.matrix_norm(orthogonalize(matrix[None])[0] - theirs, ord=2)
    assert distance() < 0.15
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    assert distance() < 1e-4


# ---- Muon --------------------------------------------------------------------------------------------------


def parameters(seed=0):
    """Two square matrices, a wide and a tall one for Muon; a table and a vector for AdamW."""
    shapes = [(8, 8), (8, 8), (6, 10), (12, 4), (20, 5), (7,)]
    return [torch.nn.Parameter(randn(*shape, seed=seed + i)) for i, shape in enumerate(shapes)]


def groups(params):
    adam = dict(betas=(0.9, 0.95), eps=1e-8)
    return [dict(params=params[:4], optimizer="muon", lr=0.02, weight_decay=0.1),
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
        Muon([dict(params=[p], optimizer="muon", lr=0.1, weight_decay=0.5),
              dict(params=[other], lr=0.1)]).step()
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


def test_it_solves_a_badly_scaled_problem_that_gradient_descent_hardly_begins():
    """Least squares whose directions differ a hundredfold: Muon moves all of them equally fast."""
    scales, target = torch.logspace(0, -2, 8), randn(8, 8)
    p, other = torch.nn.Parameter(torch.zeros(8, 8)), torch.nn.Parameter(torch.zeros(1))
    optimizer = Muon([dict(params=[p], optimizer="muon", lr=0.0), dict(params=[other], lr=0.0)])
    plain = torch.zeros(8, 8)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        p.grad = 2 * (p.detach() - target) * scales.square()
        optimizer.step()
        plain -= 0.5 * 2 * (plain - target) * scales.square()  # twice 0.5 would no longer converge
    assert (p - target).abs().max() < 0.2 * (plain - target).abs().max()


# ---- Adafactor ---------------------------------------------------------------------------------------------


def steps_of(make, params, gradients):
    """The parameters after a step with each list of gradients, by the optimizer that make(params) gives."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = make(params)
    for grads in gradients:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    return [p.detach() for p in params]


def some_gradients(params, steps, sizes=(1.0, 0.1, 30.0, 1.0)):
    """Their sizes differ from step to step, so that clipping has something to do."""
    return [[sizes[step % len(sizes)] * randn(*p.shape, seed=100 * step + i, dtype=p.dtype)
             for i, p in enumerate(params)] for step in range(steps)]


def adafactor_of_the_paper(params, gradients, rho, relative, eps1=1e-30, eps2=1e-3, d=1.0):
    """Shazeer & Stern 2018, Algorithms 4, 5 and 6, with sums, and V written out."""
    params = [p.clone() for p in params]
    rows, columns, full = [0.0] * len(params), [0.0] * len(params), [0.0] * len(params)
    for t, grads in enumerate(gradients, start=1):
        beta2 = 1 - t ** -0.8
        for i, (x, g) in enumerate(zip(params, grads)):
            alpha = rho * max(eps2, x.square().mean().sqrt().item()) if relative else rho
            squares = g.square() + eps1
            if x.dim() == 2:
                rows[i] = beta2 * rows[i] + (1 - beta2) * squares.sum(dim=1)
                columns[i] = beta2 * columns[i] + (1 - beta2) * squares.sum(dim=0)
                full[i] = torch.outer(rows[i], columns[i]) / rows[i].sum()
            else:
                full[i] = beta2 * full[i] + (1 - beta2) * squares
            u = g / full[i].sqrt()
            x -= alpha * u / max(1.0, u.square().mean().sqrt().item() / d)
    return params


def test_the_first_adafactor_step_by_hand():
    """Rows of G^2 have means 2.5 and 12.5, columns 5 and 10, all 7.5: V = [[5/3, 10/3], [25/3, 50/3]]."""
    p = torch.nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    optimizer = Adafactor([p], lr=0.1)
    optimizer.step()
    u = p.grad / torch.tensor([[5 / 3, 10 / 3], [25 / 3, 50 / 3]]).sqrt()
    clipped = u / max(1.0, u.square().mean().sqrt().item())
    assert_close(p.detach(), -0.1 * clipped, rtol=1e-6, atol=0)
    assert_close(optimizer.state[p]["rows"], torch.tensor([2.5, 12.5]))
    assert_close(optimizer.state[p]["columns"], torch.tensor([5.0, 10.0]))


@pytest.mark.parametrize("relative", [False, True])
def test_adafactor_is_the_papers_algorithm(relative):
    """In float64, 1e-12: the order of sums. One gradient has a row of zeros, one is all zeros."""
    shapes = [(5, 3), (2, 7), (4,), (1, 1)]
    params = [randn(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes)]
    params.append(torch.zeros(3, 2, dtype=torch.float64))  # eps2 decides
    gradients = some_gradients(params, 6)
    gradients[2][0][1] = 0.0
    gradients[3][1][:] = 0.0
    ours = steps_of(lambda p: Adafactor(p, lr=0.02, scale_parameter=relative), params, gradients)
    for mine, right in zip(ours, adafactor_of_the_paper(params, gradients, 0.02, relative), strict=True):
        assert_close(mine, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options, theirs", [
    (dict(weight_decay=0.1), dict(weight_decay=0.1)),
    (dict(momentum=0.9, weight_decay=0.1), dict(beta1=0.9, weight_decay=0.1)),
    (dict(scale_parameter=True), dict(scale_parameter=True)),  # (they would scale the decay too)
    (dict(d=0.5), dict(clip_threshold=0.5)),
])
def test_adafactor_moves_as_transformers_does(options, theirs):
    """1e-6: float32 sums in another order. Their momentum is of lr times the update: equal where lr stays."""
    from transformers.optimization import Adafactor as Reference
    params = [randn(*shape, seed=i) for i, shape in enumerate([(8, 6), (3, 20), (7,)])]
    gradients = some_gradients(params, 8)
    theirs = dict(lr=0.01, relative_step=False, scale_parameter=False) | theirs
    ours = steps_of(lambda p: Adafactor(p, lr=0.01, **options), params, gradients)
    for mine, other in zip(ours, steps_of(lambda p: Reference(p, **theirs), params, gradients), strict=True):
        assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_with_relative_steps_adafactor_moves_as_torchs():
    """Torch's has only these, and bounds lr by 1 / sqrt(t), here above it. Its eps1 bounds V instead of being
    added to it: no difference for gradients of this size.
    """
    params = [randn(*shape, seed=i) for i, shape in enumerate([(8, 6), (3, 20), (7,)])]
    gradients = some_gradients(params, 8)
    both = dict(lr=0.01, weight_decay=0.1)
    ours = steps_of(lambda p: Adafactor(p, scale_parameter=True, **both), params, gradients)
    theirs = steps_of(lambda p: torch.optim.Adafactor(p, **both), params, gradients)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, rtol=1e-6, atol=1e-6)  # float32 sums in another order


def test_for_an_n_by_m_matrix_it_holds_n_plus_m_floats():
    matrix, vector = torch.nn.Parameter(randn(40, 30)), torch.nn.Parameter(randn(9))
    optimizer = Adafactor([matrix, vector])
    matrix.grad, vector.grad = randn(40, 30), randn(9)
    optimizer.step()
    assert {name: tuple(value.shape) for name, value in optimizer.state[matrix].items()} == \
        {"step": (), "rows": (40,), "columns": (30,)}
    assert {name: tuple(value.shape) for name, value in optimizer.state[vector].items()} == \
        {"step": (), "squares": (9,)}


def test_squares_of_rank_one_are_known_exactly_so_that_a_step_is_the_sign_of_the_gradient():
    p, sizes = torch.nn.Parameter(torch.zeros(6, 4)), torch.outer(randn(6), randn(4, seed=1)).abs()
    p.grad = sizes * randn(6, 4, seed=2).sign()
    Adafactor([p], lr=0.1).step()
    assert_close(p.detach(), -0.1 * p.grad.sign(), rtol=1e-5, atol=0)


def test_a_sudden_gradient_is_clipped_to_a_step_of_root_mean_square_lr():
    p = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = Adafactor([p], lr=0.1)
    for size in (1.0, 1.0, 1000.0):
        before, p.grad = p.detach().clone(), size * randn(6, 4)
        optimizer.step()
    # beta2 is 0.58 at step 3, where V has followed by 0.42 only, so that U is near 1 / sqrt(0.42)
    assert (p.detach() - before).square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_the_size_of_all_gradients_does_not_matter(size):
    """1e-8 squared is still far above eps1. 1e-5: float32."""
    params = [randn(8, 6), randn(7)]
    plain = some_gradients(params, 4)
    scaled = [[size * grad for grad in grads] for grads in plain]
    expected = steps_of(lambda p: Adafactor(p, lr=0.01), params, plain)
    for mine, right in zip(steps_of(lambda p: Adafactor(p, lr=0.01), params, scaled), expected, strict=True):
        assert_close(mine, right, rtol=1e-5, atol=1e-5)


def test_adafactor_without_a_gradient_only_decays_and_without_grad_rests():
    params = [torch.nn.Parameter(randn(4, 3)), torch.nn.Parameter(randn(5)), torch.nn.Parameter(randn(2, 2))]
    before = bits(params)
    for p in params[:2]:
        p.grad = torch.zeros_like(p)
    Adafactor(params, lr=0.1, weight_decay=0.5).step()
    for p, old in zip(params[:2], before):
        assert_close(p.detach(), old * (1 - 0.1 * 0.5))
    assert torch.equal(params[2], before[2])


def test_relative_steps_would_hold_a_matrix_at_zero():
    """Why scale_parameter is off: ten steps of eps2 lr each, where without it each is of lr."""
    for relative, bound in ((True, 1.01e-3), (False, 1.01)):
        moved = steps_of(lambda p: Adafactor(p, lr=0.1, scale_parameter=relative), [torch.zeros(4, 4)],
                         [[torch.ones(4, 4)]] * 10)[0]
        assert moved.abs().max().item() == pytest.approx(bound, rel=0.02)


def test_a_new_rate_of_adafactor_holds_at_once():
    p = torch.nn.Parameter(randn(4, 3))
    optimizer = Adafactor([p], lr=0.1, momentum=0.9, weight_decay=0.1)
    p.grad = randn(4, 3, seed=1)
    optimizer.step()
    before, optimizer.param_groups[0]["lr"] = p.detach().clone(), 0.0
    optimizer.step()
    assert torch.equal(p, before), "is the rate in the momentum?"


def test_adafactor_restored_from_its_state_goes_on_bit_for_bit():
    params = [randn(8, 6), randn(7)]
    gradients = some_gradients(params, 6)
    whole = steps_of(lambda p: Adafactor(p, lr=0.01, momentum=0.9), params, gradients)
    half = [torch.nn.Parameter(p.clone()) for p in params]
    first, second = Adafactor(half, lr=0.01, momentum=0.9), Adafactor(half, lr=0.01, momentum=0.9)
    for optimizer, some in ((first, gradients[:3]), (second, gradients[3:])):
        for p in half:  # as train.py restores it, from its own files
            for key, value in first.state[p].items():
                second.state[p][key] = value.clone()
        for grads in some:
            for p, grad in zip(half, grads):
                p.grad = grad
            optimizer.step()
    assert equal([p.detach() for p in half], whole)


# ---- weights in pieces -------------------------------------------------------------------------------------

# Neither ten rows nor six divide by 4, nor do five of one shape; of one or two rows some processes hold none.
# The last two, a table and a vector, are AdamW's beside Muon.
SHAPES = [(10, 6)] * 5 + [(6, 10)] * 2 + [(2, 6), (1, 6), (12, 4), (20, 5), (7,)]
MATRICES = len(SHAPES) - 2
OPTIMIZERS = ["muon", "adamw", "adafactor"]
LAYOUTS = {2: ["fsdp", "tp"], 4: ["fsdp", "hsdp", "tp", "fsdp x tp"]}


class Weights(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for i, shape in enumerate(SHAPES):
            self.register_parameter(f"w{i}", torch.nn.Parameter(randn(*shape, seed=i)))


def optimizer_for(name, params):
    if name == "muon":
        adam = dict(lr=3e-3, betas=(0.9, 0.95))
        return Muon([dict(params=params[:-2], optimizer="muon", lr=0.02, weight_decay=0.1),
                     dict(params=params[-2:], **adam)])
    if name == "adamw":
        return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1, fused=True)
    return Adafactor(params, lr=3e-3, weight_decay=0.1, momentum=0.9, scale_parameter=True)


def after_three_steps(name, params, grad_of=lambda p, grad: grad):
    """{name: whole value} of the parameters and of all that the optimizer keeps."""
    optimizer = optimizer_for(name, params)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = grad_of(p, randn(*p.shape, seed=1000 * step + i + 1))
        optimizer.step()
    for p in params:  # so is a state saved and loaded: what has p's shape is cut as p is, all else is whole
        for value in optimizer.state[p].values():
            cut_as = value.placements if isinstance(value, DTensor) else None
            assert cut_as == (getattr(p, "placements", None) if value.shape == p.shape else None)
    found = {f"w{i}": p for i, p in enumerate(params)}
    found |= {f"w{i}.{key}": value for i, p in enumerate(params) for key, value in optimizer.state[p].items()}
    found = {key: x.full_tensor() if isinstance(x, DTensor) else x for key, x in found.items()}
    return {key: x.detach().numpy() for key, x in found.items()}


def cut(whole, mesh, placements):
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        placements=placements)


def in_pieces(layout, processes):
    """(weights, function that cuts a gradient as its parameter is) for this layout."""
    model = Weights()
    line = init_device_mesh("cpu", (processes,))
    square = init_device_mesh("cpu", (processes // 2, 2), mesh_dim_names=("dp", "tp"))
    if "tp" in layout:
        tp = square["tp"] if "fsdp" in layout else line
        for i, (name, p) in enumerate(list(model.named_parameters())):  # by rows, by columns, in turn
            placements = [Replicate()] if p.dim() == 1 else [Shard(i % 2)]
            model.register_parameter(name, torch.nn.Parameter(cut(p.detach(), tp, placements)))
    if "fsdp" in layout or layout == "hsdp":
        fully_shard(model, mesh={"fsdp": line, "hsdp": square, "fsdp x tp": square["dp"]}[layout])

    def grad_of(p, grad):
        if layout != "tp" or p.dim() > 1:
            return cut(grad, p.device_mesh, p.placements)
        # a vector's gradient under sequence parallelism: a sum that is still to be taken
        mine = grad * (2.0 if line.get_rank() == 0 else -1.0 / (processes - 1))
        return DTensor.from_local(mine, line, [Partial()], run_check=False)

    return list(model.parameters()), grad_of


def a_process(rank, processes, store, results):
    """All layouts and optimizers; sends {(layout, optimizer): (values, batches made orthogonal)}."""
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(store, processes), rank=rank,
                                world_size=processes)
        found, batches, plain = {}, [], optim.orthogonalize
        optim.orthogonalize = lambda matrices, **dtype: (batches.append(tuple(matrices.shape))
                                                         or plain(matrices, **dtype))
        optim.WHOLE_AT_ONCE = 60  # so five matrices of 10 x 6 are taken in two or three parts
        for layout in LAYOUTS[processes]:
            for name in OPTIMIZERS:
                params, grad_of = in_pieces(layout, processes)
                batches.clear()
                found[layout, name] = after_three_steps(name, params, grad_of), list(batches)
                kinds = {type(placement).__name__ for p in params if isinstance(p, DTensor)
                         for placement in p.placements}
                found[layout, "kinds"] = sorted(kinds)
        dist.barrier()  # none leaves while another still talks to it
        dist.destroy_process_group()
        results.put((rank, found))
    except BaseException:
        results.put((rank, traceback.format_exc()))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """What each of 2 and of 4 processes found: pieces[processes][rank][layout, optimizer]."""
    context, found = warm_processes(), {}
    for count in LAYOUTS:
        results, store = context.Queue(), str(tmp_path_factory.mktemp("store") / "file")
        processes = [context.Process(target=a_process, args=(rank, count, store, results))
                     for rank in range(count)]
        for process in processes:
            process.start()
        try:
            found[count] = {}
            for _ in processes:
                rank, found[count][rank] = results.get(timeout=200)
                if isinstance(found[count][rank], str):  # the others now wait for it
                    pytest.fail(f"process {rank} of {count}: {found[count][rank]}")
        except queue.Empty:
            pytest.fail(f"the {count} processes wait for one another")
        finally:
            for process in processes:
                process.join(timeout=10 if len(found[count]) == count else 0)
                process.kill()
    return found


CASES = [(processes, layout, name) for processes, layouts in LAYOUTS.items() for layout in layouts
         for name in OPTIMIZERS]


@pytest.mark.parametrize("processes, layout, name", CASES)
def test_in_pieces_weights_move_and_states_are_as_whole_ones(pieces, processes, layout, name):
    """Muon: float32 rounding, 480-fold, times 0.02 a step; the others: float32 sums in another order."""
    expected = after_three_steps(name, list(Weights().parameters()))
    for rank in range(processes):
        found = pieces[processes][rank][layout, name][0]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].shape == value.shape, f"{key} would not load under another layout"
            tolerance = 1e-5 if name == "muon" and "." not in key else 1e-6
            assert_close(torch.from_numpy(found[key]), torch.from_numpy(value), rtol=1e-6, atol=tolerance,
                         msg=lambda message: f"{key} on process {rank}: {message}")


@pytest.mark.parametrize("processes, layout, name", CASES)
def test_all_processes_hold_the_same_bits(pieces, processes, layout, name):
    first, *others = (pieces[processes][rank][layout, name][0] for rank in range(processes))
    for other in others:
        assert all((other[key] == value).all() for key, value in first.items()), \
            "a whole tensor differs between processes: they drift apart"


def test_the_layouts_are_what_they_are_called(pieces):
    assert {layout: pieces[4][0][layout, "kinds"] for layout in LAYOUTS[4]} == {
        "fsdp": ["Shard"], "hsdp": ["Replicate", "Shard"], "tp": ["Replicate", "Shard"],
        "fsdp x tp": ["Replicate", "Shard", "_StridedShard"]}


@pytest.mark.parametrize("processes, layout", [(n, layout) for n in LAYOUTS for layout in LAYOUTS[n]])
def test_each_matrix_is_made_orthogonal_by_one_process_and_few_are_whole_at_a_time(pieces, processes, layout):
    """Three steps; no more numbers of whole matrices at once on a process than allowed above."""
    batches = [pieces[processes][rank][layout, "muon"][1] for rank in range(processes)]
    matrices = [sum(number for number, _, _ in some) for some in batches]
    assert sum(matrices) == 3 * MATRICES, "is the same work done twice?"
    assert max(math.prod(shape) for some in batches for shape in some) <= 60, "whole matrices pile up"
    assert max(matrices) < 3 * MATRICES, "one process does all the work"


# ---- groups ------------------------------------------------------------------------------------------------


def small_model(**changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 2, "qk_norm": True}
    return Transformer(ModelConfig(**{**shape, **changes}))


def settings(**changes):
    return SimpleNamespace(**{
        "optimizer": "muon", "lr": 0.02, "adam_lr": 8e-3, "weight_decay": 0.1, "betas": (0.9, 0.95),
        "eps": 1e-8, "steps": 100, "warmup_steps": 9, "schedule": "linear", "final_lr": 0.0,
        "decay_share": 0.5, **changes})


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adafactor"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_group_and_no_vector_decays(optimizer, tied):
    model = small_model(tie_embeddings=tied, attention_bias=True)
    groups = make_optimizer(model, settings(optimizer=optimizer)).param_groups
    placed = [p for group in groups for p in group["params"]]
    assert len(placed) == len(set(placed)) == len(list(model.parameters()))
    for group in groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_matrices_inside_blocks_are_for_the_optimizer_asked_for_and_have_the_rate_lr():
    model = small_model()
    inside = {id(p) for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name}
    for optimizer, rest in (("muon", "adamw"), ("adamw", "adamw"), ("adafactor", "adafactor")):
        groups = parameter_groups(model, settings(optimizer=optimizer))
        assert [group["optimizer"] for group in groups] == [optimizer, rest, rest]
        assert [group["lr"] for group in groups] == [0.02, 8e-3, 8e-3]
        assert {id(p) for p in groups[0]["params"]} == inside
        for group in groups:
            assert group["lr_scale"] * 0.02 == pytest.approx(group["lr"])


def test_frozen_parameters_are_in_no_group_and_empty_groups_are_left_out():
    model = small_model()
    for name, p in model.named_parameters():
        p.requires_grad_(name == "lm_head.weight")
    (group,) = parameter_groups(model, settings())
    assert group["params"] == [model.lm_head.weight]


@pytest.mark.parametrize("optimizer, kind", [("muon", Muon), ("adamw", torch.optim.AdamW),
                                             ("adafactor", Adafactor)])
def test_make_optimizer_gives_what_was_asked_for_and_its_first_step_is_as_large_as_its_rate(optimizer, kind):
    model = small_model()
    made = make_optimizer(model, settings(optimizer=optimizer, weight_decay=0.0))
    assert type(made) is kind
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i, p in enumerate(model.parameters()):
        p.grad = randn(*p.shape, seed=i)
    made.step()
    for name, p in model.named_parameters():
        inside = p.dim() == 2 and ".layers." in name
        moved = (p.detach() - before[name]).square().mean().sqrt().item() / (0.02 if inside else 8e-3)
        if inside and optimizer == "muon":  # sqrt(max(1, n / m)) times an orthogonal n x m matrix
            moved *= p.shape[1] ** 0.5
        # Muon's singular values are near 0.9; Adafactor's first step is G / sqrt(V), with V only near G^2
        assert 0.6 < moved < 1.2, name


def test_the_groups_are_told_in_one_line_and_only_to_who_asks(capsys):
    model, told = small_model(), []
    make_optimizer(model, settings())
    make_optimizer(model, settings(), say=told.append)
    assert capsys.readouterr().out == "" and told == [describe_groups(parameter_groups(model, settings()))]
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * model.config.ffn_dim)
    assert told[0] == (
        f"weights: matrices in blocks (14 tensors, {matrices:,} parameters): muon, peak lr 0.02, "
        f"weight decay 0.1; embedding and head (2 tensors, 3,200 parameters): adamw, peak lr 0.008, "
        f"weight decay 0.1; vectors (9 tensors, 224 parameters): adamw, peak lr 0.008, weight decay 0")


# ---- schedules ---------------------------------------------------------------------------------------------

EVERY = pytest.mark.parametrize("schedule", SCHEDULES)


def rates(**changes):
    """From step 0 to `steps`, the first that is not made, as shares of the peak."""
    given = settings(lr=1.0, **changes)
    return [learning_rate(step, given) for step in range(given.steps + 1)]


@EVERY
def test_the_rate_rises_linearly_to_the_peak_and_then_never_again(schedule):
    found = rates(schedule=schedule, final_lr=0.1)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(found) == found[9] == 1.0
    assert all(later <= earlier for earlier, later in zip(found[9:], found[10:]))


@EVERY
@pytest.mark.parametrize("final_lr", [0.0, 0.1, 1.0])
def test_the_step_after_the_last_would_have_the_final_rate_and_no_step_has_none(schedule, final_lr):
    found = rates(schedule=schedule, final_lr=final_lr)
    assert found[-1] == pytest.approx(final_lr, abs=1e-12)
    assert min(found[:-1]) > 0 and found[-2] >= final_lr - 1e-12
    steps = settings(lr=1.0, schedule=schedule, steps=1_000_000)
    assert learning_rate(999_999, steps) > 0, "the last step of a long run would be made for nothing"


def test_linear_is_a_line():
    assert rates(schedule="linear", final_lr=0.2)[9:] == pytest.approx([1 - 0.8 * i / 91 for i in range(92)])


def test_cosine_is_half_a_wave():
    """Loshchilov & Hutter 2017, Eq. 5: min + (max - min) / 2 (1 + cos(pi t / T))."""
    found = rates(schedule="cosine", final_lr=0.2, warmup_steps=20)[20:]
    assert found == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * t / 80)) for t in range(81)])
    assert found[40] == pytest.approx(0.6)


def test_inverse_sqrt_is_vaswanis_where_it_need_not_be_stretched():
    """Eq. 3: min(n^-0.5, n w^-1.5) counted from n = 1, over its peak w^-0.5."""
    w, n = 10, range(1, 102)
    vaswani = [min(i ** -0.5, i * w ** -1.5) * w ** 0.5 for i in n]
    assert rates(schedule="inverse_sqrt", final_lr=(10 / 101) ** 0.5) == pytest.approx(vaswani)
    stretched = rates(schedule="inverse_sqrt", final_lr=0.05)
    slope = [(b - 0.05) / (a - vaswani[-1]) for a, b in zip(vaswani[9:-1], stretched[9:-1])]
    assert slope == pytest.approx([slope[0]] * len(slope)), "stretched, but not bent"


def test_wsd_stays_level_and_falls_in_a_line_over_the_last_share():
    found = rates(schedule="wsd", decay_share=0.5)
    assert found[9:51] == pytest.approx([1.0] * 42)
    assert found[50:] == pytest.approx([1 - i / 50 for i in range(51)])
    assert rates(schedule="wsd", decay_share=0.0)[9:] == [1.0] * 92
    assert rates(schedule="wsd", decay_share=1.0) == pytest.approx(rates(schedule="linear")), \
        "where the warm-up ends the fall begins"


@EVERY
@pytest.mark.parametrize("changes", [{}, {"decay_share": 1.0}, {"warmup_steps": 1}, {"final_lr": 0.9}])
def test_there_is_no_jump(schedule, changes):
    """With all times a thousandfold, a step changes the rate by next to nothing, also where parts join."""
    scale = 1000
    changes = {"warmup_steps": 9, **changes}
    changes["warmup_steps"] *= scale
    found = rates(schedule=schedule, steps=20 * scale, **changes)
    steepest = max(1 / changes["warmup_steps"], 4 / scale)  # the last: a fall within the last 250 steps
    assert max(abs(b - a) for a, b in zip(found, found[1:])) <= steepest


@EVERY
@pytest.mark.parametrize("steps, warmup_steps", [(1, 0), (1, 1), (1, 10), (5, 5), (5, 4), (5, 50), (2, 0)])
def test_short_runs_and_long_warm_ups(schedule, steps, warmup_steps):
    found = rates(schedule=schedule, steps=steps, warmup_steps=warmup_steps)[:-1]
    rising = min(steps, warmup_steps + 1)
    assert found[:rising] == pytest.approx([(i + 1) / (warmup_steps + 1) for i in range(rising)])
    assert all(0 < rate <= 1 for rate in found)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'sine' is none of linear, cosine"):
        learning_rate(50, settings(schedule="sine"))


def test_a_picture_is_as_high_as_the_rate():
    """Five rows of eighths: each column's blocks, added up, are the rate to the nearest fortieth."""
    given = settings(lr=0.3, steps=600, warmup_steps=60, final_lr=0.1, schedule="cosine")
    lines = [line.ljust(60) for line in picture(given).split("\n")]
    assert len(lines) == 5
    for i in range(60):
        eighths = sum(" ▁▂▃▄▅▆▇█".index(line[i]) for line in lines)
        assert eighths / 40 == pytest.approx(learning_rate(10 * i, given) / 0.3, abs=0.5 / 40 + 1e-9)


def test_the_command_draws_every_schedule():
    command = [sys.executable, "-X", "utf8", str(Path(optim.__file__))]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=100, check=True)
    assert all(f"\n{schedule}\n" in done.stdout for schedule in SCHEDULES) and "█" in done.stdout
