"""positions.py: rotary positions, against formulas and transformers."""
import math

import torch
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from model import (rope_angles, rotate)
from support import random_ids, random_model, randn


def test_rope_turns_a_pair_by_its_position_in_radians():
    """(1, 0) turned by p becomes (cos p, sin p). Halves are paired, 0 with 2 and 1 with 3."""
    cos, sin = rope_angles(torch.tensor([5]), head_dim=4, theta=100.0)
    turned = rotate(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), cos, sin)  # first frequency: theta^0 = 1
    assert_close(turned, torch.tensor([[math.cos(5), 0, math.sin(5), 0]]))
    turned = rotate(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), cos, sin)  # second: 100^(-2/4) = 1/10
    assert_close(turned, torch.tensor([[0, math.cos(0.5), 0, math.sin(0.5)]]))


def test_rope_scores_depend_on_the_distance_only():
    q, k = randn(1, 1, 1, 32, seed=0), randn(1, 1, 1, 32, seed=1)

    def score(i, j):
        (cos_i, sin_i), (cos_j, sin_j) = (rope_angles(torch.tensor([[p]]), 32, 10000.0) for p in (i, j))
        return (rotate(q, cos_i, sin_i) * rotate(k, cos_j, sin_j)).sum()
    for i, j in ((3, 0), (9, 2), (0, 11)):  # angles about 100: rounded at 100 x 6e-8, times |q||k|, about 30
        assert_close(score(i, j), score(i + 100, j + 100), rtol=0, atol=1e-4)
    assert abs(score(3, 0) - score(0, 3)) > 0.1, "the direction of time must matter"


def test_rope_keeps_lengths_and_types():
    cos, sin = rope_angles(torch.arange(40)[None], 16, 10000.0)
    x = randn(2, 3, 40, 16)
    assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_rope_angles_are_float32_even_far_out_and_in_a_bfloat16_model():
    positions = torch.tensor([[0, 257, 4095, 131071]])
    cos, sin = rope_angles(positions, 64, 500000.0)
    assert cos.dtype == sin.dtype == torch.float32
    exact = positions[..., None].double() * 500000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    error = (cos - exact.cos()).abs().amax(dim=-1)  # rounded thrice: the exponent, the frequency, the angle
    assert (error <= (positions + 1) * 3 * 2 ** -23).all(), "angles were rounded to less than float32"
    model, seen = random_model().bfloat16(), []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.extend(args[1]))
    model(random_ids(1, 4))
    assert [tensor.dtype for tensor in seen] == [torch.float32, torch.float32]


def test_rope_equals_transformers_bit_for_bit_at_any_position():
    """So nothing is permuted on the way in or out. The last bit of a frequency is 0.003 at position 30,000."""
    positions = torch.tensor([[0, 1, 77, 30000]])
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=rope))
    their_cos, their_sin = theirs(randn(1), positions)
    cos, sin = rope_angles(positions, 32, 10000.0)
    assert torch.equal(torch.cat((cos, cos), dim=-1), their_cos)
    assert torch.equal(torch.cat((sin, sin), dim=-1), their_sin)
    q, k = randn(1, 2, 4, 32, seed=0), randn(1, 2, 4, 32, seed=1)
    their_q, their_k = apply_rotary_pos_emb(q, k, their_cos, their_sin)
    assert torch.equal(rotate(q, cos[:, None], sin[:, None]), their_q)
    assert torch.equal(rotate(k, cos[:, None], sin[:, None]), their_k)
