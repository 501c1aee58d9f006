"""attention.py: the reference and the fused path; masks and caches."""
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

import attention as attention_file
import model as model_file
from attention import KVCache, Mask, RollingCache, attend, attention, make_cache, prepare
from config import UserError
from positions import rope_angles, rotate
from support import CLOSE, TINY, random_ids, random_model, randn, seeded, two_documents


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


# Masks: what they mean


N = 12
DOCUMENTS = torch.tensor([[3] * 5 + [1] * 4 + [3] * 3, [0] + [7] * 11])  # the third run is another document
LEFT, RIGHT = torch.arange(N) >= torch.tensor([[0], [5]]), torch.arange(N) < torch.tensor([[12], [7]])
PREFIX = torch.tensor([6, 1])
RULES = {
    "causal": {}, "window": dict(window=4), "itself": dict(window=1), "lambda": dict(window=3, sinks=2),
    "documents": dict(documents=DOCUMENTS), "prefix": dict(prefix=PREFIX), "left": dict(real=LEFT),
    "right": dict(real=RIGHT), "allowed": dict(allowed=randn(2, N, N, seed=5) > 0),
    "documents, window": dict(documents=DOCUMENTS, window=3),
    "documents, prefix, right": dict(documents=DOCUMENTS, prefix=torch.tensor([2, 3]), real=RIGHT),
    "prefix, window": dict(prefix=PREFIX, window=3), "prefix, left": dict(prefix=PREFIX, real=LEFT),
    "prefix, lambda": dict(prefix=PREFIX, window=2, sinks=1),
    "left, window": dict(real=LEFT, window=3),
    "all": dict(documents=DOCUMENTS, prefix=PREFIX, window=4, real=LEFT)}


def visible(b, q, k, documents=None, prefix=None, window=None, sinks=0, real=None, allowed=None):
    """The rules once more, for one pair, in words."""
    if allowed is not None:
        return bool(allowed[b, q, k])
    start = k if documents is not None else 0  # of k's document
    while start > 0 and documents[b, start - 1] == documents[b, k]:
        start -= 1
    before = k - start if real is None else int(real[b, start:k].sum())
    together = documents is None or len(set(documents[b, min(q, k):max(q, k) + 1].tolist())) == 1
    ahead = k > q and not (prefix is not None and before < prefix[b])
    far = window is not None and abs(q - k) >= window and k >= sinks
    return together and not ahead and not far and (real is None or bool(real[b, k]))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_mask_means_what_its_rules_say_pair_by_pair(rules):
    seen = Mask(**rules).dense(torch.arange(N), torch.arange(N)).expand(2, 1, N, N)
    for b, q, k in itertools.product(range(2), range(N), range(N)):
        assert seen[b, 0, q, k] == visible(b, q, k, **rules), (b, q, k)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_no_query_sees_beyond_its_reach(rules):
    mask = Mask(**rules)
    seen = mask.dense(torch.arange(N), torch.arange(N)).any(0)[0]
    for first, last in itertools.combinations(range(N + 1), 2):
        low, high = mask.reach(first, last)
        outside = [k for k in range(N) if not low <= k < high and k >= mask.sinks]
        assert not seen[first:last, outside].any(), (first, last)


def test_the_reach_of_a_window_is_no_wider_than_it():
    assert Mask(window=4).reach(100, 110) == (97, 110)
    assert Mask(documents=torch.arange(20)[None] // 6).reach(13, 15) == (12, 15)
    assert Mask(prefix=PREFIX).reach(0, 2) == (0, 6) and Mask(prefix=PREFIX).reach(8, 10) == (0, 10)


def test_a_prefix_is_seen_from_before_it_and_the_rest_is_causal():
    place = torch.arange(N)
    old = (place <= place[:, None]) | (place < PREFIX[:, None, None])  # as PrefixLM wrote it
    assert torch.equal(Mask(prefix=PREFIX).dense(place, place)[:, 0], old)


@pytest.mark.parametrize("make, message", [
    (lambda: Mask(window=0), "window of 0 keys is out of range"),
    (lambda: Mask(sinks=2), "sinks 2 are out of range"),
    (lambda: Mask(sinks=-1, window=2), "sinks -1 are out"),
    (lambda: Mask(window=2, sinks=1, real=LEFT), "sinks with padding or packed documents are not supported"),
    (lambda: Mask(allowed=LEFT[:, None], window=3), "taken as it is"),
    (lambda: Mask.of(torch.ones(1, 3)), "float32 and shape .1, 3. has no meaning"),
    (lambda: Mask.of(torch.ones(3, dtype=torch.bool)), "pass bool, .B, S."),
    (lambda: random_model()(random_ids(2, 5), mask=LEFT), "real of the mask has the shape .2, 12., not"),
    (lambda: random_model()(random_ids(3, 12), mask=LEFT), "shape .2, 12., not .3, 12."),
    (lambda: random_model()(random_ids(2, 12), mask=Mask(prefix=PREFIX, real=LEFT[:1])), "shape .1, 12."),
    (lambda: random_model()(random_ids(2, 5), mask=Mask(prefix=torch.ones(2, 1))), "prefix of the mask"),
])
def test_a_mask_without_meaning_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# Masks: the fast forms


def heads(T, S, kv_heads=2, D=16):
    return [randn(2, 4, T, D, seed=0).requires_grad_(), randn(2, kv_heads, S, D, seed=1).requires_grad_(),
            randn(2, kv_heads, S, D, seed=2).requires_grad_()]


def and_gradients(function, *args):
    """What a function returns, and the gradients of a sum of it, weighted so that none is alike."""
    out = function(*args)
    return [out, *torch.autograd.grad((out * randn(*out.shape, seed=3)).sum(), args)]


def form(rules, T, head_dim=16):
    """A mask prepared for the last T of the N columns, and densely the same."""
    mask = Mask(**{name: value[:, -T:] if name == "allowed" else value for name, value in rules.items()})
    config, past = replace(TINY, head_dim=head_dim), SimpleNamespace(length=N - T)
    return mask, prepare(mask, 2, T, past, config, "cpu"), mask.dense(torch.arange(N - T, N), torch.arange(N))


WITHOUT_SINKS = {name: rules for name, rules in RULES.items() if "sinks" not in rules}


@pytest.mark.parametrize("rules", WITHOUT_SINKS.values(), ids=WITHOUT_SINKS)
@pytest.mark.parametrize("T", [N, 5, 1])
@pytest.mark.parametrize("block", [1, 3, 4, 128])
def test_each_form_equals_the_reference_forward_and_backward(monkeypatch, rules, T, block):
    monkeypatch.setattr(attention_file, "BLOCK", block)
    mask, prepared, dense = form(rules, T)
    for kv_heads in (1, 2, 4):
        args = heads(T, N, kv_heads)
        assert_close(and_gradients(lambda q, k, v: attend(q, k, v, prepared), *args),
                     and_gradients(lambda q, k, v: attention(q, k, v, dense), *args), **CLOSE)


@pytest.mark.parametrize("rules", WITHOUT_SINKS.values(), ids=WITHOUT_SINKS)
@pytest.mark.parametrize("T", [N, 5])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_given_the_same_mask(monkeypatch, rules, T):
    """In eager mode on the CPU, where FlexAttention computes all scores: this is not its compiled kernel."""
    monkeypatch.setattr(attention_file, "has_flex", lambda device: True)
    monkeypatch.setattr(attention_file, "compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True,
                        raising=False)
    _, prepared, dense = form(rules, T)
    if T == N and not rules:
        assert prepared is None, "plain causal has a faster kernel"
        return
    assert prepared.flex is not None
    q, k, v = (x.detach() for x in heads(T, N))  # it has no backward pass on a CPU
    assert_close(attend(q, k, v, prepared), attention(q, k, v, dense), **CLOSE)


def test_flex_attention_is_left_alone_where_it_cannot_serve(monkeypatch):
    assert not attention_file.has_flex("cpu")
    monkeypatch.setattr(attention_file, "has_flex", lambda device: True)
    assert form(RULES["window"], N, head_dim=8)[1].flex is None, "its kernel wants heads of 16 at least"
    assert form(RULES["window"], 1)[1].flex is None, "one query needs no blocks"
    assert form(RULES["lambda"], N)[1].flex is None, "it has one kind of scores"


def test_the_kernels_own_forms_are_used_where_they_are_right():
    assert form({}, N)[1] is None and form({}, 1)[1] is None  # causal, T == S; one that sees all
    assert Mask(window=9, sinks=3).within(TINY, 12).window is None, "a window that all fits into is none"
    assert Mask(window=9, sinks=2).within(TINY, 12).window == 9
    (queries, keys, seen), = form(dict(window=4), 1)[1].blocks
    assert keys == slice(N - 4, N) and seen is None, "a single query needs a range, and no mask"


@pytest.mark.parametrize("block", [2, 128])
def test_what_sees_nothing_gets_zeros_and_finite_gradients(monkeypatch, block):
    monkeypatch.setattr(attention_file, "BLOCK", block)
    for T in (N, 1):
        nobody = dict(real=torch.zeros(2, N, dtype=torch.bool))
        for rules in (dict(real=LEFT), dict(real=LEFT, window=2), nobody):
            _, prepared, dense = form(rules, T)
            out, *gradients = and_gradients(lambda q, k, v: attend(q, k, v, prepared), *heads(T, N))
            blind = (~dense.any(-1)).expand(2, 4, T)
            assert (out[blind] == 0).all() and all(torch.isfinite(x).all() for x in gradients)
    assert blind.any()


def pairs(prepared):
    return sum(seen.size(2) * seen.size(3) for _, _, seen in prepared.blocks)


def test_time_grows_with_the_window_and_not_with_the_text():
    config = replace(TINY, max_seq_len=4096)
    cost = [pairs(prepare(Mask(window=100), 1, T, None, config, "cpu")) for T in (1024, 2048, 4096)]
    assert cost[2] < 4096 * (100 + attention_file.BLOCK) and cost[2] < 2.1 * cost[1] < 4.4 * cost[0]
    documents = torch.arange(4096)[None] // 64
    assert pairs(prepare(Mask(documents=documents), 1, 4096, None, config, "cpu")) < 4096 * 200


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""
    numel = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("sinks", [0, 4])
def test_memory_of_a_long_windowed_prefill_stays_far_below_all_pairs(sinks):
    T = 4096
    model = random_model(sliding_window=32, attention_sinks=sinks, n_heads=1, n_kv_heads=1, head_dim=16)
    cache = make_cache(model.config, 1, T)
    with torch.no_grad(), Largest() as largest:
        model.model(random_ids(1, T), cache=cache)
    assert largest.numel < T * T / 64, "T x 64 is the MLP's share; a mask or scores of T x S were made"


# Masks in the model


@pytest.mark.parametrize("rules", [dict(window=5), dict(window=5, sinks=2), dict(real=torch.ones(2, 40) > 0)],
                         ids=["window", "lambda", "padding"])
@pytest.mark.parametrize("block", [7, 128])
def test_changing_a_token_leaves_what_comes_before_bitwise_equal(monkeypatch, rules, block):
    monkeypatch.setattr(attention_file, "BLOCK", block)
    model, ids, mask = random_model(), random_ids(2, 40), Mask(**rules)
    before = model(ids, mask=mask)
    for t in (1, 20, 39):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % 50
        after = model(changed, mask=mask)
        assert torch.equal(before[:, :t], after[:, :t]) and not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("block", [3, 8, 128])
def test_changing_one_packed_document_leaves_the_others_bitwise_equal(monkeypatch, block, window):
    monkeypatch.setattr(attention_file, "BLOCK", block)
    model, ids = random_model(), random_ids(2, 40)
    documents = torch.stack((torch.arange(40) // 11, torch.arange(40) // 29))
    mask = Mask(documents=documents, window=window)
    changed = torch.where(documents == 1, (ids + 1) % 50, ids)
    before, after = model(ids, mask=mask), model(changed, mask=mask)
    assert torch.equal(before[documents != 1], after[documents != 1]), "a document saw another"
    assert not torch.equal(before[documents == 1], after[documents == 1])


def test_packed_documents_equal_each_alone_without_positions_given():
    model, ids = random_model(), random_ids(1, 10)
    logits = model(ids, mask=Mask(documents=torch.tensor([[5] * 4 + [2] * 6])))
    assert_close(logits, torch.cat((model(ids[:, :4]), model(ids[:, 4:])), dim=1), **CLOSE)


def test_a_window_reaches_back_by_its_width_in_each_layer():
    model, ids = random_model(n_layers=2, sliding_window=4), random_ids(1, 12)
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 1) % 50
    moved = (model(ids) != model(changed)).any(-1)[0].tolist()
    assert moved == [False] * 2 + [True] * 7 + [False] * 3, "each of 2 layers carries 3 further: 2 to 8"


@pytest.mark.parametrize("window", [1, 5, 19, 20, 40])
@torch.no_grad()
def test_a_sliding_window_equals_mistrals_of_transformers(window):
    model, ids = random_model(sliding_window=window), random_ids(2, 20)
    c = model.config
    twin = MistralForCausalLM(MistralConfig(
        vocab_size=50, hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, intermediate_size=c.ffn_dim,
        rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_seq_len, sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, attn_implementation="eager",
        bos_token_id=None, eos_token_id=None))
    twin.load_state_dict(model.state_dict())
    theirs = twin.eval()(ids).logits
    assert_close(model(ids), theirs, **CLOSE)
    for sizes in ([1] * 20, [8, 1, 1, 10], [17, 1, 1, 1]):
        cache = make_cache(c, 2, 20)
        assert isinstance(cache, RollingCache) == (window < 20)
        parts = [model(part, cache=cache) for part in ids.split(sizes, dim=1)]
        assert_close(torch.cat(parts, dim=1), theirs, **CLOSE)
    mask = torch.arange(20) >= torch.tensor([[0], [6]])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    theirs = twin(ids, attention_mask=mask.long(), position_ids=positions).logits
    assert_close(model(ids, mask=mask)[mask], theirs[mask], **CLOSE)


# The Lambda shape


def lambda_by_loops(q, k, v, window, sinks):
    """For q, k not yet rotated, (H, T, D): each pair is turned to its distance, and sinks are never farther
    away than in a cache that holds them and the window."""
    H, T, D = q.shape
    out = torch.zeros(H, T, D)
    for h, t in itertools.product(range(H), range(T)):
        scores, seen = [], [j for j in range(t + 1) if t - j < window or j < sinks]
        for j in seen:
            distance = min(t, sinks + window - 1) - j if j < sinks else t - j
            cos, sin = rope_angles(torch.tensor([distance]), D, 10000.0)
            scores.append((rotate(q[h, t].view(1, 1, 1, D), cos, sin).flatten() @ k[h, j]) / math.sqrt(D))
        out[h, t] = torch.stack(scores).softmax(0) @ v[h, seen]
    return out


@pytest.mark.parametrize("window, sinks", [(4, 2), (1, 1), (3, 5), (5, 1), (11, 1)])
@pytest.mark.parametrize("block", [3, 128])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5,
                                            "original_max_position_embeddings": 16}], ids=["plain", "yarn"])
def test_sinks_stay_directly_before_the_window(monkeypatch, window, sinks, block, scaling):
    monkeypatch.setattr(attention_file, "BLOCK", block)
    q, k, v = (randn(1, 3, N, 8, seed=seed) for seed in range(3))
    config = replace(TINY, n_kv_heads=4, rope_scaling=scaling)
    prepared = prepare(Mask(window=window, sinks=sinks), 1, N, None, config, "cpu")
    cos, sin = rope_angles(torch.arange(N), 8, 10000.0, config.rope_scaling)
    out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, prepared)
    if scaling is None:
        assert_close(out[0], lambda_by_loops(q[0], k[0], v[0], window, sinks), **CLOSE)
    else:  # its temperature must count once, not twice, where a query is turned back
        bounded = rope_angles(torch.arange(N).clamp(max=window + sinks - 1), 8, 10000.0, config.rope_scaling)
        dense = Mask(window=window, sinks=sinks).dense(torch.arange(N), torch.arange(N))
        assert_close(out, attention(rotate(q, cos, sin), rotate(k, cos, sin), v, dense, rotate(q, *bounded),
                                    sinks), **CLOSE)


@torch.no_grad()
def test_one_layer_sees_sinks_and_window_as_a_text_of_their_own():
    """StreamingLLM's cache: what is kept counts its positions anew. (Deeper layers' keys remember more.)"""
    model, ids = random_model(n_layers=1, sliding_window=6, attention_sinks=2), random_ids(1, 40)
    plain = random_model(n_layers=1)
    logits = model(ids)
    for t in (3, 7, 8, 20, 39):
        kept = [j for j in range(t + 1) if j < 2 or j > t - 6]
        assert_close(logits[:, t], plain(ids[:, kept])[:, -1], **CLOSE)


def test_gradients_through_the_lambda_shape_equal_the_references(monkeypatch):
    mask, config, args = Mask(window=3, sinks=2), replace(TINY, head_dim=16), heads(N, N)
    cos, sin = attention_file.turn_back(mask, 0, N, config, "cpu")
    dense = mask.dense(torch.arange(N), torch.arange(N))
    whole = and_gradients(lambda q, k, v: attention(q, k, v, dense, rotate(q, cos, sin), 2), *args)
    monkeypatch.setattr(attention_file, "BLOCK", 4)
    prepared = prepare(mask, 2, N, None, config, "cpu")
    assert_close(and_gradients(lambda q, k, v: attend(q, k, v, prepared), *args), whole, **CLOSE)


# Caches


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("window", [1, 4, 5, 11])
@pytest.mark.parametrize("sizes", [[1] * 24, [5, 7, 12], [1, 2, 21], [2, 1, 1, 9, 1, 1, 1, 8], [23, 1], [24]],
                         ids=str)
@torch.no_grad()
def test_a_rolling_cache_equals_one_pass_however_the_text_comes(window, sinks, sizes):
    model, ids = random_model(sliding_window=window, attention_sinks=sinks), random_ids(2, 24)
    whole = model(ids)
    for cache in (make_cache(model.config, 2, 24), KVCache(model.config, 2, 24)):
        parts = [model(part, cache=cache) for part in ids.split(sizes, dim=1)]
        assert_close(torch.cat(parts, dim=1), whole, **CLOSE)
        assert cache.length == 24
    assert sum(layer.k.size(2) for layer in make_cache(model.config, 2, 24).layers) == 2 * (window + sinks)


@pytest.mark.parametrize("sizes", [[9] + [1] * 15, [3, 1, 6, 14], [12, 12], [1] * 24], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_rolling_cache_works_with_padding(sizes, side):
    model, ids = random_model(sliding_window=6), random_ids(3, 24)
    column, length = torch.arange(24), torch.tensor([[24], [20], [16]])
    mask = column >= 24 - length if side == "left" else column < length
    cache, start, parts = make_cache(model.config, 3, 24), 0, []
    for part in ids.split(sizes, dim=1):
        start += part.size(1)
        parts.append(model(part, mask=mask[:, :start], cache=cache))
    logits = torch.cat(parts, dim=1)
    for row in range(3):
        assert_close(logits[row, mask[row]], model(ids[row, mask[row]][None])[0], **CLOSE)


@torch.no_grad()
def test_a_rolling_cache_works_with_packed_documents():
    model, ids = random_model(sliding_window=6), random_ids(2, 24)
    documents = (torch.arange(24) // 10).expand(2, 24)  # one begins in both rows within a window
    cache = make_cache(model.config, 2, 24)
    parts = [model(part, mask=Mask(documents=documents[:, :t + 1]), cache=cache)
             for t, part in enumerate(ids.split(1, dim=1))]
    assert_close(torch.cat(parts, dim=1), model(ids, mask=Mask(documents=documents)), **CLOSE)


def test_a_cache_forgets_what_came_after():
    model, ids = random_model(), random_ids(1, 10)
    for cache in (KVCache(model.config, 1, 10), RollingCache(replace(TINY, sliding_window=10), 1)):
        model(random_ids(1, 10, seed=3).index_copy(1, torch.arange(4), ids[:, :4]), cache=cache)
        cache.truncate(4)
        assert cache.length == 4
        assert_close(model(ids[:, 4:], cache=cache), model(ids)[:, 4:], **CLOSE)


def test_a_cache_that_has_rolled_refuses_to_forget():
    model = random_model(sliding_window=5)
    cache = make_cache(model.config, 1, 20)
    model(random_ids(1, 8), cache=cache)
    with pytest.raises(UserError, match="rolling cache of 5 tokens cannot go back from 8 to 7"):
        cache.truncate(7)
    cache.truncate(8)


@pytest.mark.parametrize("sinks, mask, message", [
    (0, torch.ones(1, 4, 4) > 0, "use a KVCache"), (2, torch.ones(1, 4) > 0, "sinks with padding")])
def test_a_rolling_cache_refuses_a_mask_that_looks_elsewhere_from_the_start(sinks, mask, message):
    model = random_model(sliding_window=5, attention_sinks=sinks)
    with pytest.raises(UserError, match=message):  # 4 tokens: all of them still fit into the window
        model(random_ids(1, 4), mask=mask, cache=make_cache(model.config, 1, 20))


@pytest.mark.parametrize("sinks, mask", [(0, Mask(window=7)), (0, Mask(window=12)), (2, Mask(window=9))])
@pytest.mark.parametrize("sizes", [[1] * 9, [5, 4], [9]], ids=str)
def test_a_rolling_cache_refuses_a_mask_that_looks_at_what_it_has_dropped(sinks, mask, sizes):
    model = random_model(sliding_window=5, attention_sinks=sinks)
    cache, read = make_cache(model.config, 1, 20), 0
    with pytest.raises(UserError, match=f"keeps {sinks} sinks and a window of 5"):
        for part in random_ids(1, 9).split(sizes, dim=1):
            model(part, mask=mask, cache=cache)
            read += part.size(1)
    assert read <= 5 + sinks, "what was dropped was not seen, and nobody was told"


def test_the_window_and_not_the_text_must_fit_into_max_seq_len():
    model = random_model(max_seq_len=8, sliding_window=6, attention_sinks=2)
    assert torch.isfinite(model(random_ids(1, 30))).all()
    with pytest.raises(UserError, match="9 tokens exceed max_seq_len 8"):
        random_model(max_seq_len=8, sliding_window=6, attention_sinks=3)(random_ids(1, 30))
    with pytest.raises(UserError, match="30 tokens exceed max_seq_len 8"):
        random_model(max_seq_len=8)(random_ids(1, 30))


@pytest.mark.slow
@torch.no_grad()
def test_a_rolling_cache_generates_20_000_tokens_in_constant_memory():
    """And its last logits are those of one pass over the whole text."""
    model = random_model(n_layers=2, max_seq_len=64, sliding_window=28, attention_sinks=4)
    cache, ids, text = make_cache(model.config, 1, 20_000), random_ids(1, 1), []
    size = [(layer.k.data_ptr(), layer.k.nbytes) for layer in cache.layers]
    generator = seeded(0)
    for _ in range(20_000):
        logits = model(ids, cache=cache)[:, -1]
        text.append(ids)
        ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    assert [(layer.k.data_ptr(), layer.k.nbytes) for layer in cache.layers] == size and cache.length == 20_000
    whole = model(torch.cat(text, dim=1))[:, -1]
    assert_close(logits, whole, rtol=0, atol=1e-3)  # angles at 20,000 are rounded at 20,000 x 6e-8


@torch.no_grad()
def test_a_prefix_looks_ahead_no_further_than_the_window_also_where_sinks_would_reach():
    model, mask = random_model(n_layers=1), Mask(prefix=torch.tensor([5]), window=3, sinks=2)
    ids = random_ids(1, 5)
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % 50
    assert not mask.sees(torch.tensor(0), torch.tensor(0), torch.tensor(4))
    assert torch.equal(model(ids, mask=mask)[0, 0], model(changed, mask=mask)[0, 0])
