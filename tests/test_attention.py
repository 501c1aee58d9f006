"""attention.py: the reference and the fused path; masks and caches."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import model as model_file
from model import (KVCache, attention)
from support import CLOSE, random_ids, random_model, randn, two_documents


# Attention: the reference


def test_attention_by_hand():
    """Scores 0 and ln 3 (times sqrt D, which is divided out): weights 1/4 and 3/4."""
    q = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    k = torch.tensor([[0.0, 0, 0, 0], [2 * math.log(3), 0, 0, 0]]).view(1, 1, 2, 4)
    v = torch.tensor([[0.0, 0, 0, 4], [4.0, 0, 0, 0]]).view(1, 1, 2, 4)
    assert_close(attention(q, k, v, None).flatten(), torch.tensor([3.0, 0, 0, 1]))


def test_attention_equals_loops():
    B, H, K, T, S, D = 2, 4, 2, 3, 5, 6
    q, k, v = randn(B, H, T, D, seed=0), randn(B, K, S, D, seed=1), randn(B, K, S, D, seed=2)
    mask = randn(B, H, T, S, seed=3) > 0
    mask[..., 0] = True
    out = attention(q, k, v, mask)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        key, value = k[b, h // 2].tolist(), v[b, h // 2].tolist()
        weights = [0.0] * S
        for s in range(S):
            if mask[b, h, t, s]:
                weights[s] = math.exp(sum(x * y for x, y in zip(q[b, h, t].tolist(), key[s])) / math.sqrt(D))
        expected = [sum(weights[s] * value[s][d] for s in range(S)) / sum(weights) for d in range(D)]
        assert_close(out[b, h, t], torch.tensor(expected), **CLOSE)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_torchs(kv_heads, masked):
    q, k, v = randn(2, 6, 7, 8, seed=0), randn(2, kv_heads, 9, 8, seed=1), randn(2, kv_heads, 9, 8, seed=2)
    mask = (randn(2, 1, 7, 9, seed=3) > 0).index_fill(-1, torch.tensor([4]), True) if masked else None
    torchs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert_close(attention(q, k, v, mask), torchs, **CLOSE)


def test_query_heads_read_their_group_of_key_value_heads():
    v = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 5, 2)  # head k holds the value k
    out = attention(randn(1, 6, 4, 2), randn(1, 3, 5, 2), v, None)
    assert out[0, :, 0, 0].round().tolist() == [0, 0, 1, 1, 2, 2], "head h reads head h // (H / K), not h % K"


@pytest.mark.parametrize("kernel", [attention, F.scaled_dot_product_attention])
def test_a_query_that_may_look_at_nothing_gets_zeros_and_no_nan_in_gradients(kernel):
    q, k, v = (randn(1, 2, 3, 4, seed=seed).requires_grad_() for seed in range(3))
    mask = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])
    out = kernel(q, k, v, mask)
    assert torch.equal(out[:, :, 0], torch.zeros(1, 2, 4))
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


# Attention: the fused path


@pytest.mark.parametrize("changes", [{}, dict(n_kv_heads=4), dict(n_kv_heads=1), dict(qk_norm=True),
                                     dict(attention_bias=True), dict(head_dim=6)], ids=str)
@pytest.mark.parametrize("kind", ["causal", "padded", "documents", "cached", "one token"])
def test_the_fused_path_equals_the_reference(monkeypatch, changes, kind):
    model, ids = random_model(**changes), random_ids(2, 10)
    padded = torch.arange(10) >= torch.tensor([[0], [4]])
    mask = {"padded": padded, "documents": two_documents()[2].expand(2, 10, 10)}.get(kind)

    def run():
        cache = KVCache(model.config, 2, 10) if kind in ("cached", "one token") else None
        parts = {"cached": [6, 4], "one token": [9, 1]}.get(kind, [10])
        return torch.cat([model(part, mask=mask, cache=cache) for part in ids.split(parts, dim=1)], dim=1)
    fused = run()
    calls = []

    def reference(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        calls.append(attn_mask)
        assert not (is_causal and attn_mask is not None) and enable_gqa == (q.size(1) != k.size(1))
        assert not is_causal or q.size(2) == k.size(2), "the kernel's causal form is wrong where T is not S"
        causal = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2))
        return attention(q, k, v, causal if is_causal else attn_mask)
    monkeypatch.setattr(model_file.F, "scaled_dot_product_attention", reference)
    assert_close(fused, run(), **CLOSE)
    assert len(calls) >= model.config.n_layers
