"""lora.py, adapters.py, quantize.py: files equal peft's, NF4 bitsandbytes'; the base never moves."""
import contextlib
import copy
import json
import math
import re
import shutil

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
import transformers
from torch import nn

import adapters
import lora
import sft
import train
from adapters import load_adapter, save_adapter
from bpe import Tokenizer
from chat import with_chat_tokens
from checkpoint import load_model, load_state, save_model
from config import UserError
from costs import estimate_memory
from lora import adapter_off, add_lora, merge_lora, switch_adapter, unmerge_lora
from model import extend_embedding
from objectives import next_token_loss
from parallel import Compute, Env, parallelize
from quantize import (QUANTIZE, NF4, QuantizedLinear, dequantize, dequantize_int8, dequantize_nf4, load_base,
                      quantize_int8, quantize_model, quantize_nf4, stored_parts)
from support import in_process, randn, random_ids, random_model, seeded
from tensor_files import read_tensors, write_tensors
from test_parallel import Windows, in_processes

CPU = Env(torch.device("cpu"))
IDS = random_ids(2, 12)
PLAIN = Tokenizer([(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"])  # 259 ids
KINDS = {"lora": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True)}


def moved(model, seed=3):
    """The model, its adapters moved away from where they begin, where they change nothing."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=seeded(seed + p.numel()))
    return model


def adapted_model(rank=4, seed=3, model=None, **options):
    model = random_model() if model is None else model
    return moved(add_lora(model, rank, 8, generator=seeded(0), **options), seed)


def base_bytes(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".adapters." not in name}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- LoRA by hand ------------------------------------------------------------------------------------------


def test_a_matrix_of_1024_x_512_at_rank_8_trains_12288_numbers_instead_of_524288():
    linear = add_lora(nn.Sequential(nn.Linear(512, 1024, bias=False)), rank=8, alpha=16)
    trained = sum(p.numel() for p in linear.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in linear.parameters() if not p.requires_grad)
    assert (trained, frozen) == (12_288, 524_288)


def test_the_output_by_hand():
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model = add_lora(nn.Sequential(linear), rank=1, alpha=3)
    linear.adapters["default"].lora_A.data = torch.tensor([[1.0, 2.0]])
    linear.adapters["default"].lora_B.data = torch.tensor([[1.0], [-1.0]])
    x = torch.tensor([[1.0, 1.0]])  # A x = 3, B A x = (3, -3), and 3 times that
    assert model(x).tolist() == [[10.0, -8.0]]
    assert merge_lora(model)(x).tolist() == [[10.0, -8.0]], "is the scale the same in forward and merge?"


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_the_model_is_what_it_was_bit_for_bit(kind):
    model = random_model(attention_bias=True)
    before = model(IDS)
    assert torch.equal(add_lora(model, 4, 8, **KINDS[kind])(IDS), before)
    with torch.autocast("cpu", torch.bfloat16):
        with adapter_off(model):
            before = model(IDS)
        assert torch.equal(model(IDS), before), "in bf16 too"


def test_a_begins_within_one_over_root_in_and_b_at_zero_so_that_b_alone_learns_at_first():
    linear = nn.Linear(64, 32, bias=False)
    one, same, other = (lora.LoRA(linear, 8, 2.0, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(one.lora_A, same.lora_A) and not torch.equal(one.lora_A, other.lora_A)
    assert one.lora_A.shape == (8, 64) and one.lora_B.shape == (32, 8) and not one.lora_B.any()
    # 512 draws, uniform within 1/8: their greatest lies beyond 0.97 of that but for a chance of e^-15, and
    # their standard deviation, 1/8 / sqrt(3), is met within 3 standard errors of 2 % each
    assert 0.97 / 8 < one.lora_A.abs().max() <= 1 / 8
    assert one.lora_A.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.07)
    assert one.scale == 2.0 and one.lora_magnitude is None
    x = randn(5, 64)
    one(x, linear(x), linear).square().sum().backward()
    assert one.lora_B.grad.any(), "B learns through A: were both zero, neither would ever move"
    assert not one.lora_A.grad.any(), "A learns through B, which is zero still"


def test_dropout_is_of_what_the_adapter_reads_and_of_training_alone():
    model = adapted_model(dropout=0.5)
    still = model(IDS)
    assert torch.equal(model(IDS), still), "is a new adapter in training though the model is not?"
    assert not torch.equal(model.train()(IDS), still)
    torch.manual_seed(0)
    linear = model.model.layers[0].mlp.up_proj
    x, adapter = randn(3, 32), linear.adapters["default"]
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(1)
    expected = x @ linear.weight.T + adapter.scale * dropped @ adapter.lora_A.T @ adapter.lora_B.T
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("targets, number", [("all", 14), ("q_proj", 2), (("q_proj", "v_proj"), 4),
                                             ("layers.1.mlp.up_proj", 1), ("lm_head", 1)])
def test_targets_are_all_layers_but_the_head_or_those_that_are_named(targets, number):
    model = add_lora(random_model(), 2, 4, targets)
    assert len([path for path, module in lora.adapted(model)]) == number


# ---- peft as the oracle ------------------------------------------------------------------------------------


def as_llama(model):
    config = model.config
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie_embeddings,
        attention_bias=config.attention_bias))
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


def peft_names(model):
    """{the name in a file: parameter}"""
    return {name.replace(".default", "").replace("vector.weight", "vector"): p
            for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_outputs_and_gradients_equal_pefts(kind, tied):
    tokens = [48, 49]
    ours = random_model(tie_embeddings=tied)
    tables = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    theirs = peft.get_peft_model(as_llama(ours), peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", trainable_token_indices={t: tokens for t in tables},
        **KINDS[kind])).double()
    adapted_model(model=ours.double(), token_ids=tokens, **KINDS[kind])
    names = peft_names(theirs)
    assert names.keys() == lora.trained_tensors(ours).keys()
    with torch.no_grad():
        for name, p in lora.trained_tensors(ours).items():
            names[name].copy_(p)
    ids = torch.cat([IDS, torch.tensor([[48, 3] * 6])])
    mine, other = ours(ids), theirs(ids).logits
    # rotary angles and norms are float32 in both: 1e-6 of what each logit is
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    (mine.sin() ** 2).sum().backward()
    (other.sin() ** 2).sum().backward()
    for name, p in lora.trained_tensors(ours).items():
        error = (p.grad - names[name].grad).norm() / names[name].grad.norm()
        assert names[name].grad.norm() > 0 and error < 1e-6, f"{name}: {error}"


# ---- merging, and taking it out again ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token_ids, tied", [((), False), ((7, 9), False), ((7, 9), True)])
def test_merged_equals_adapted_and_unmerged_the_base_within_two_roundings(kind, token_ids, tied):
    model = random_model(attention_bias=True, tie_embeddings=tied)
    adapted_model(model=model, token_ids=token_ids, **KINDS[kind])
    before, adapted = base_bytes(model), model(IDS)
    merge_lora(model)
    merged = base_bytes(model)
    assert (model(IDS) - adapted).norm() <= 1e-6 * adapted.norm(), "the issue's bound"
    unmerge_lora(model)
    for name, weight in base_bytes(model).items():
        bound = 2.0 ** -24 * (merged[name].abs() + weight.abs())
        if kind == "dora":
            bound = 8 * bound + 1e-7  # two divisions and a product more, before the difference
        assert bool(((weight - before[name]).abs() <= bound).all()), name
        if "embed" in name or "lm_head" in name:
            assert torch.equal(weight, before[name])
    torch.testing.assert_close(model(IDS), adapted, rtol=1e-5, atol=1e-5)


def test_a_merged_weight_in_bf16_is_the_exact_sum_rounded_once():
    model = random_model().bfloat16()
    adapted_model(model=model)
    layer = model.model.layers[0].mlp.down_proj
    adapter, before = layer.adapters["default"], layer.weight.detach().clone()
    exact = before.double() + adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
    merge_lora(model)
    # bfloat16 keeps 8 bits, so it is off by 2^-8 of a number at most; and a little for the sum in float32
    assert bool(((layer.weight.double() - exact).abs() <= 2.0 ** -7.99 * exact.abs()).all())


def test_merging_twice_and_unmerging_nothing_are_refused():
    model = merge_lora(adapted_model())
    for act in (merge_lora, lambda model: adapter_off(model).__enter__(), lambda m: switch_adapter(m, None)):
        with pytest.raises(UserError, match="merged into the weights; unmerge_lora takes it out"):
            act(model)
    with pytest.raises(UserError, match="no adapter is merged"):
        unmerge_lora(unmerge_lora(model))


def test_a_model_without_adapters_again_is_a_plain_one(tmp_path):
    model = adapted_model(token_ids=[5])
    adapted = merge_lora(model)(IDS)
    save_model(lora.remove_lora(model), None, tmp_path)
    assert torch.equal(load_model(tmp_path)[0](IDS), adapted)
    assert not any(module._forward_hooks for module in model.modules())


# ---- one model, several adapters, and none -----------------------------------------------------------------


def test_with_the_adapter_off_the_model_is_its_base_bit_for_bit():
    base = random_model()(IDS)
    model = adapted_model(token_ids=[3, 4])
    adapted = model(IDS)
    with adapter_off(model):
        assert torch.equal(model(IDS), base)
        with adapter_off(model):
            pass
        assert torch.equal(model(IDS), base), "an inner context put the adapter back to work"
    with contextlib.suppress(KeyError), adapter_off(model):
        raise KeyError
    assert torch.equal(model(IDS), adapted) and not torch.equal(adapted, base)


def test_adapters_are_switched_by_name_and_only_the_one_at_work_is_trained():
    base, alone = random_model()(IDS), adapted_model(seed=9, targets="q_proj")(IDS)
    model = adapted_model()
    first = model(IDS)
    adapted_model(seed=9, targets="q_proj", model=model, name="other")
    assert torch.equal(model(IDS), alone)
    assert all(".other." in name for name, p in model.named_parameters() if p.requires_grad)
    switch_adapter(model, "default")
    assert torch.equal(model(IDS), first)
    switch_adapter(model, None)
    assert torch.equal(model(IDS), base) and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="no adapter 'third'; this model has default, other"):
        switch_adapter(model, "third")


# ---- training ----------------------------------------------------------------------------------------------


def settings_for(**changes):
    return sft.Settings(**{"lora_rank": 2, "lora_lr": 0.05, "seq_len": 16, "batch_size": 8, "steps": 8,
                           "device": "cpu", "precision": "fp32", "timeout_minutes": 2.0, "warmup_steps": 2,
                           "save_every": 3, "replay": None, **changes})


def prepared(settings, model=None):
    """A TINY model (V = 51, as the made-up batches have) with the adapter that the settings describe."""
    model = random_model(vocab_size=51) if model is None else model
    if settings.quantize:
        quantize_model(model, settings.quantize)
    return add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_targets,
                    settings.lora_dropout, use_dora=settings.use_dora, token_ids=[1, 2],
                    generator=seeded(settings.seed))


def losses(settings, env=CPU, steps=8):
    model = parallelize(prepared(settings).train(), env)
    optimizer = train.make_optimizer(model, settings)
    size = train.micro_batch(settings, env)
    batches = Windows(size, env.data_rank, env.data_world_size)
    figures = []
    for step in range(steps):
        report = train.update(model, optimizer, [batches.at(step)], next_token_loss, settings, env,
                              settings.lr)
        figures.append((report["loss"], report["grad_norm"]))
    return figures, model, optimizer


@pytest.mark.parametrize("changes", [{}, dict(quantize="nf4"), dict(use_dora=True)])
def test_training_moves_no_bit_of_the_base_and_keeps_moments_of_adapters_alone(changes):
    settings = settings_for(**changes)
    before = base_bytes(prepared(settings))
    figures, model, optimizer = losses(settings, steps=20)
    assert figures[-1][0] < figures[0][0] - 0.2
    assert same(base_bytes(model), before)
    trained = {p for p in model.parameters() if p.requires_grad}
    assert {p for group in optimizer.param_groups for p in group["params"]} == trained == set(optimizer.state)
    moments = sum(m.nbytes for state in optimizer.state.values() for m in state.values() if m.dim())
    assert moments == 2 * sum(p.nbytes for p in trained)


def test_every_adapter_has_a_gradient_and_recomputation_and_chunks_change_none():
    def gradients(kind, chunked, **changes):
        model = moved(prepared(settings_for(**changes)))
        parallelize(model.train(), Env(torch.device("cpu"), compute=Compute(activation_checkpointing=kind)))
        next_token_loss(model, Windows(8).at(0), chunked)[0].backward()
        return {name: p.grad for name, p in lora.trained_tensors(model).items()}
    for changes in ({}, dict(quantize="nf4"), dict(lora_targets=("q_proj", "lm_head"))):
        plain = gradients("none", False, **changes)
        assert all(g is not None and g.norm() > 0 for g in plain.values())
        for kind, chunked in (("full", True), ("selective", False), ("none", True)):
            for name, g in gradients(kind, chunked, **changes).items():
                # float32 sums in another order
                assert (g - plain[name]).norm() <= 1e-5 * plain[name].norm(), f"{name}, {kind}"


def test_b_learns_faster_by_the_ratio_of_lora_plus_and_rows_at_the_rate_of_embeddings():
    settings = settings_for(lora_plus=16.0, adam_lr=3e-3)
    optimizer = train.make_optimizer(prepared(settings), settings)
    groups = {group["rule"]: group for group in optimizer.param_groups}
    assert groups.keys() == {"adapters", "adapters' B", "rows of new tokens"}
    assert groups["adapters"]["lr"] == 0.05 and groups["adapters' B"]["lr"] == pytest.approx(0.8)
    assert groups["rows of new tokens"]["lr"] == 3e-3
    assert {group["optimizer"] for group in groups.values()} == {"adamw"}
    assert {group["weight_decay"] for group in groups.values()} == {0.0}, "it would pull back to the base"


def task_losses(changes):
    settings = settings_for(**changes)
    return losses(settings, train.setup(settings), steps=4)[0]


# What FSDP holds of a base in NF4 is cut, too
CASES = {"ddp": {}, "ddp nf4": dict(quantize="nf4"), "fsdp": dict(data_parallel="fsdp"),
         "fsdp, recomputed, rank 1": dict(data_parallel="fsdp", activation_checkpointing="full", lora_rank=1),
         "fsdp nf4": dict(data_parallel="fsdp", quantize="nf4"),
         "fsdp dora": dict(data_parallel="fsdp", use_dora=True)}


@pytest.mark.slow
def test_two_processes_learn_what_one_does_in_every_layout():
    results = in_processes(2, [(name, task_losses, (changes,)) for name, changes in CASES.items()])
    for name, changes in CASES.items():
        alone = {k: v for k, v in changes.items() if k not in ("data_parallel", "activation_checkpointing")}
        expected = losses(settings_for(**alone), steps=4)[0]
        for figures in results[name]:
            assert isinstance(figures, list), f"{name}: {figures}"
            for a, b in zip(figures, expected, strict=True):
                assert a == pytest.approx(b, rel=1e-4), name  # float32 sums in another order


def task_run(out, changes):
    settings = settings_for(out=out, steps=4, **changes)
    env = train.setup(settings)
    batches = Windows(train.micro_batch(settings, env), env.data_rank, env.data_world_size)
    train.train(prepared(settings), batches, next_token_loss, settings, env)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, dict(quantize="nf4", use_dora=True)])
def test_what_two_processes_saved_in_parts_one_goes_on_from(tmp_path, changes):
    sharded = {**changes, "data_parallel": "fsdp"}
    results = in_processes(2, [("run", task_run, (str(tmp_path / "two"), sharded))])["run"]
    assert results == [True, True], results
    task_run(str(tmp_path / "one"), changes)
    one, two = (read_tensors(tmp_path / name / "adapter" / adapters.WEIGHTS) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)  # Adam divides tiny gradients
    before = (tmp_path / "two" / "adapter" / adapters.WEIGHTS).read_bytes()
    task_run(str(tmp_path / "two"), changes)  # from its end, in one process
    assert (tmp_path / "two" / "adapter" / adapters.WEIGHTS).read_bytes() == before


class StopAt(Windows):
    stop = None

    def at(self, i):
        if i == self.stop:
            raise KeyboardInterrupt
        return super().at(i)


@pytest.mark.parametrize("changes", [{}, dict(quantize="nf4", activation_checkpointing="full",
                                              lora_dropout=0.1)])
def test_stopping_and_going_on_equals_never_stopping_and_a_state_holds_adapters_alone(tmp_path, changes):
    def one(name, stop=None, base="a"):
        settings, batches = settings_for(out=str(tmp_path / name), **changes), StopAt(8)
        batches.stop = stop
        train.train(prepared(settings), batches, next_token_loss, settings, CPU, corpus={"base": base})

    one("whole")
    with pytest.raises(KeyboardInterrupt):
        one("parts", stop=5)
    with pytest.raises(UserError, match="holds a run with base a, not b"):
        one("parts", base="b")
    one("parts")
    whole, parts = (tmp_path / name / "adapter" / adapters.WEIGHTS for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    _, tensors, _ = load_state(tmp_path / "whole" / "state")
    assert tensors.keys() == {"adapter_model", "optimizer"}
    assert tensors["adapter_model"].keys() == lora.trained_tensors(prepared(settings_for(**changes))).keys()
    assert {name.rpartition(".")[0] for name in tensors["optimizer"]} == tensors["adapter_model"].keys()
    load_adapter(random_model(vocab_size=51), max((tmp_path / "whole" / "state").glob("step_*")))


# ---- NF4 ---------------------------------------------------------------------------------------------------


def test_the_levels_are_quantiles_of_the_normal_distribution():
    most = (2 - 1 / 32 - 1 / 30) / 2  # of probability: half-way between what 16 and 15 levels would leave out
    up, down = (torch.special.ndtri(torch.linspace(most, 0.5, n, dtype=torch.float64))[:-1] for n in (9, 8))
    levels = torch.cat([-down, torch.zeros(1), up.flip(0)]) / up[0]
    # the paper's table was computed in float32
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), levels, rtol=0, atol=2e-7)
    assert NF4[0] == -1 and NF4[7] == 0 and NF4[15] == 1


def nearest_levels(weight, block_size):
    """By brute force: each number's nearest level, block by block."""
    levels, result = torch.tensor(NF4), []
    for block in weight.flatten().split(block_size):
        scale = block.abs().max()
        nearest = ((block / scale if scale > 0 else block)[:, None] - levels).abs().argmin(dim=1)
        result.append(levels[nearest] * scale)
    return torch.cat(result).view(weight.shape)


def test_each_number_becomes_the_nearest_level_times_the_largest_of_its_block():
    weight = randn(128, 344)
    weight[3, 5:7] = torch.tensor([9.0, -9.0])
    restored = dequantize_nf4(quantize_nf4(weight))
    assert torch.equal(restored, nearest_levels(weight, 64))
    assert restored[3, 5:7].tolist() == [9.0, -9.0], "the ends are exact"


@pytest.mark.parametrize("shape", [(7, 9), (1, 1), (33, 70), (3, 5, 7)])
def test_ragged_tails_come_back_and_an_odd_number_of_codes_fills_a_byte_by_half(shape):
    weight = randn(*shape)
    q = quantize_nf4(weight)
    assert torch.equal(dequantize_nf4(q), nearest_levels(weight, 64))
    assert q.codes.numel() == math.ceil(weight.numel() / 2) and q.codes.dtype == torch.uint8


@pytest.mark.parametrize("double", [False, True])
def test_a_block_of_zeros_stays_zeros(double):
    weight = randn(8, 64)
    weight[2], weight[3] = 0, 10 * weight[3]  # so that in 8 bits the scale 0 is not exact, as the ends are
    restored = dequantize_nf4(quantize_nf4(weight, double=double))
    assert restored.isfinite().all() and not restored[2].any(), \
        "0 / 0 is nan, which becomes the level 1: times a scale that is no longer 0"


@pytest.mark.parametrize("shape", [(8, 64), (7, 9), (33, 70), (256, 344)])
def test_codes_scales_and_values_equal_those_of_bitsandbytes(shape):
    weight = 0.02 * randn(*shape)
    codes, state = bnb.quantize_4bit(weight.clone(), quant_type="nf4", blocksize=64)
    q = quantize_nf4(weight)
    assert torch.equal(q.codes, codes.flatten()) and torch.equal(q.scales, state.absmax)
    assert torch.equal(dequantize_nf4(q), bnb.dequantize_4bit(codes, state))


def test_bits_a_weight_and_errors_of_the_ladder():
    weight = randn(1024, 1024)

    def bits(kind):
        q = QUANTIZE[kind](weight)
        return sum(p.nbytes for p in stored_parts(q).values()) * 8 / weight.numel()
    assert bits("nf4") == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert bits("nf4") == pytest.approx(4.127, abs=1e-3), "the paper's figure"
    assert bits("int8") == pytest.approx(8 + 32 / 256, abs=1e-4)
    once, twice = (quantize_nf4(weight, double=double).scales for double in (False, True))
    assert twice.mean.item() == pytest.approx(once.mean().item()), "scales do not scatter around 0"

    def error(restored):
        return float((restored - weight).square().mean().sqrt())
    once, twice = (error(dequantize_nf4(quantize_nf4(weight, double=double))) for double in (False, True))
    assert twice == pytest.approx(once, rel=0.001), "scales in 8 bits cost next to nothing"
    codes, state = bnb.quantize_4bit(weight.clone(), quant_type="nf4", blocksize=64, compress_statistics=True)
    assert twice <= 1.001 * error(bnb.dequantize_4bit(codes, state))
    assert error(dequantize_int8(quantize_int8(weight))) < 0.1 * once
    step = weight.abs().max() / 127 / 2
    assert (dequantize_int8(quantize_int8(weight)) - weight).abs().max() <= step * 1.0001


def test_large_tensors_are_quantised_in_parts_that_change_nothing(monkeypatch):
    weight = randn(100, 70)
    whole = quantize_nf4(weight, double=True), quantize_int8(weight)
    monkeypatch.setattr("quantize.AT_ONCE", 600)
    for a, b in zip(whole, (quantize_nf4(weight, double=True), quantize_int8(weight))):
        assert torch.equal(dequantize(a), dequantize(b)) and torch.equal(a.codes, b.codes)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_model_is_the_dequantised_one_in_outputs_and_gradients(kind):
    model = quantize_model(random_model(attention_bias=True), kind)
    plain = merge_lora(copy.deepcopy(model), dequantize=True)
    assert not any(isinstance(m, QuantizedLinear) for m in plain.modules())
    assert type(model.lm_head) is nn.Linear and not isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert torch.equal(model(IDS), plain(IDS))
    grads = []
    for each in (model, plain):
        each.requires_grad_(False)
        each.model.embed_tokens.weight.requires_grad_(True)
        each(IDS).square().sum().backward()
        grads.append(each.model.embed_tokens.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_the_backward_pass_keeps_no_dequantised_weight():
    layer = QuantizedLinear.of(nn.Linear(512, 512, bias=False), "nf4")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(randn(2, 512).requires_grad_()).sum().backward()
    assert max(kept, default=0) < 512 * 512 // 2


def test_casting_a_quantised_model_does_not_round_its_scales():
    model = quantize_model(random_model())
    before = model.model.layers[0].mlp.up_proj.quantized()
    after = model.bfloat16().model.layers[0].mlp.up_proj.quantized()
    assert torch.equal(dequantize_nf4(before), dequantize_nf4(after))


def test_loading_quantises_one_matrix_after_the_other(tmp_path, monkeypatch):
    model = random_model(attention_bias=True)
    save_model(model, None, tmp_path)
    held, of = [], QuantizedLinear.of.__func__
    monkeypatch.setattr(QuantizedLinear, "of", classmethod(
        lambda cls, linear, kind: (held.append(linear.weight.shape), of(cls, linear, kind))[1]))
    loaded, _ = load_base(tmp_path, "nf4")
    assert len(held) == 14, "each as it is read"
    assert torch.equal(loaded(IDS), quantize_model(model)(IDS))
    assert torch.equal(load_base(tmp_path)[0](IDS), random_model(attention_bias=True)(IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_on_a_quantised_base_and_merge_into_the_dequantised_one(kind):
    model = adapted_model(model=quantize_model(random_model()), **KINDS[kind])
    adapted = model(IDS)
    with pytest.raises(UserError, match="the base is quantised, and a merged matrix is not; say dequantize"):
        merge_lora(model)
    torch.testing.assert_close(merge_lora(model, dequantize=True)(IDS), adapted, rtol=1e-5, atol=1e-5)


# ---- peft's files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_written_here_opens_in_peft_with_equal_logits(kind, tied, tmp_path):
    base = random_model(tie_embeddings=tied)
    save_model(base, None, tmp_path / "base")
    extend_embedding(base, 52)  # two new tokens, whose rows are learnt
    model = adapted_model(model=base, token_ids=[50, 51], **KINDS[kind])
    save_adapter(model, tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs.resize_token_embeddings(52)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ids = random_ids(2, 12, vocab_size=52)
    with torch.no_grad():
        # float32, two programs
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    again = load_adapter(load_model(tmp_path / "base")[0], tmp_path / "adapter")
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trained_in_peft_opens_here_with_equal_logits(kind, tmp_path):
    base = random_model()
    theirs = peft.get_peft_model(as_llama(base), peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], trainable_token_indices=[4, 7],
        **KINDS[kind]))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=seeded(p.numel()))
    theirs.eval().save_pretrained(tmp_path)
    ours = load_adapter(base, tmp_path)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)  # float32, two programs


def base_and_adapter(folder, quantize=None, **options):
    """Folders base and adapter of a model whose adapter knows two more tokens; and the adapted model."""
    base = random_model(vocab_size=259, **options)
    save_model(base, PLAIN, folder / "base")
    tokenizer = with_chat_tokens(PLAIN)
    base, _ = load_base(folder / "base", quantize)
    extend_embedding(base, tokenizer.vocab_size)
    adapted_model(model=base, token_ids=[259, 260])
    lora.base_of(base).update(folder=str(folder / "base"), sha256=adapters.fingerprint(folder / "base"),
                              quantize=quantize)
    save_adapter(base, folder / "adapter", tokenizer)
    return base.eval()


@pytest.mark.parametrize("quantize, tied", [(None, False), (None, True), ("nf4", False), ("int8", True)])
def test_a_merged_folder_is_a_plain_model_that_says_what_the_adapted_one_did(tmp_path, quantize, tied,
                                                                             monkeypatch, capsys):
    model = base_and_adapter(tmp_path, quantize, tie_embeddings=tied)
    words = ["--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged"]
    if quantize:
        code, _, err = in_process(monkeypatch, capsys, lora.main, "merge", *words)
        assert code == 2 and f"was trained on a base quantised to {quantize}; pass --dequantized" in err
        words.append("--dequantized")
    code, out, err = in_process(monkeypatch, capsys, lora.main, "merge", *words)
    assert code == 0 and "note:" not in out, err
    ids = random_ids(2, 12, vocab_size=261)
    for folder in ("merged", "adapter"):  # an adapter's folder opens too, its base being where it says
        opened, tokenizer = adapters.open_model(tmp_path / folder)
        torch.testing.assert_close(opened(ids), model(ids), rtol=1e-5, atol=1e-5)  # sums in another order
        assert tokenizer.vocab_size == 261 and "<|im_end|>" in tokenizer.special_tokens
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-4, atol=1e-4)
    code, _, err = in_process(monkeypatch, capsys, lora.main, "merge", *words)
    assert code == 2 and "merged exists; choose another --out, or pass --overwrite" in err


def test_merging_into_other_weights_and_merging_twice_are_refused_unless_asked_for(tmp_path, monkeypatch,
                                                                                   capsys):
    base_and_adapter(tmp_path)
    other = random_model(vocab_size=259)
    other.lm_head.weight.data += 1
    save_model(other, PLAIN, tmp_path / "other")
    words = ["--base", tmp_path / "other", "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged"]
    code, _, err = in_process(monkeypatch, capsys, lora.main, "merge", *words)
    assert code == 2 and "was trained on other weights than those of" in err
    assert in_process(monkeypatch, capsys, lora.main, "merge", *words, "--other_base")[0] == 0
    again = ["--base", tmp_path / "merged", *words[2:4], "--out", tmp_path / "twice"]
    code, _, err = in_process(monkeypatch, capsys, lora.main, "merge", *again)
    assert code == 2 and "or is it merged already?" in err and not (tmp_path / "twice").exists()


def test_an_adapter_opens_only_on_the_weights_that_it_was_trained_on(tmp_path):
    base_and_adapter(tmp_path)
    adapters.open_model(tmp_path / "adapter")
    other = random_model(vocab_size=259)
    other.lm_head.weight.data += 1
    shutil.rmtree(tmp_path / "base")
    save_model(other, PLAIN, tmp_path / "base")
    with pytest.raises(UserError, match="was trained on other weights than those that lie in"):
        adapters.open_model(tmp_path / "adapter")


@pytest.mark.parametrize("given, words", [
    (dict(lr=0.03), "--lr 0.03 is the rate of weights, which adapters leave as they are; pass --lora_lr"),
    (dict(lora_dropout=0.1, lora_targets=("q_proj", "lm_head")), "--lora_dropout 0.1 cannot reach lm_head")])
def test_settings_that_would_do_nothing_are_refused(given, words):
    with pytest.raises(UserError, match=re.escape(words)):
        sft.Settings(lora_rank=4, **given)


# ---- memory ------------------------------------------------------------------------------------------------


def test_the_estimate_counts_what_lora_and_qlora_hold():
    settings = settings_for(quantize="nf4")
    for quantize in (None, "nf4", "int8"):
        model = random_model(dim=128, n_heads=4, ffn_dim=256)
        if quantize:
            quantize_model(model, quantize)
        add_lora(model, settings.lora_rank)
        held = estimate_memory(model.config, 1, 16, lora_rank=settings.lora_rank, quantize=quantize)
        assert held["weights"] == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=0.01)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        assert held["gradients"] == trained and held["moments"] == 2 * trained


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A folder with a base model, conversations, and a finished run of sft.py with adapters."""
    folder = tmp_path_factory.mktemp("lora")
    save_model(random_model(vocab_size=259, max_seq_len=64), PLAIN, folder / "base")
    talks = [{"messages": [{"role": "user", "content": "a" * (i % 7 + 1)},
                           {"role": "assistant", "content": "b" * (i % 5 + 1)}]} for i in range(40)]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)), encoding="utf-8")
    return folder


def sft_words(stage, out, **changes):
    given = {"data": stage / "talks.jsonl", "init_from": stage / "base", "replay": "none", "out": out,
             "steps": 4, "seq_len": 64, "batch_size": 4, "questions": 2, "precision": "fp32", "device": "cpu",
             "lora_rank": 2, "save_every": 2, **changes}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("changes", [
    {}, pytest.param(dict(quantize="nf4", seq_len=96), marks=pytest.mark.slow),
    pytest.param(dict(lora_merge="false"), marks=pytest.mark.slow)])
def test_sft_trains_adapters_and_leaves_a_plain_model_and_an_adapter(stage, tmp_path, monkeypatch, capsys,
                                                                     changes):
    words = sft_words(stage, tmp_path / "run", **changes)
    code, out, err = in_process(monkeypatch, capsys, sft.main, *words)
    assert code == 0, err[-2000:]
    assert "adapters of rank 2 on 14 layers" in out and "2 new tokens' rows in embedding and head" in out
    assert "adapters' B" in out and "embedding and head (" not in out
    model, tokenizer = adapters.open_model(tmp_path / "run")
    assert tokenizer.vocab_size == 261 and model.config.max_seq_len == changes.get("seq_len", 64)
    assert (tmp_path / "run" / "model.safetensors").exists() == ("lora_merge" not in changes)
    opened = adapters.open_model(tmp_path / "run" / "adapter")[0]
    torch.testing.assert_close(opened(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    state = max((tmp_path / "run" / "state").glob("step_*"))
    names = {file.name for file in state.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    assert torch.equal(adapters.open_model(state)[0](IDS), opened(IDS))
    before = (tmp_path / "run" / "adapter" / adapters.WEIGHTS).read_bytes()
    code, out, err = in_process(monkeypatch, capsys, sft.main, *words)  # goes on from its end
    assert code == 0 and before == (tmp_path / "run" / "adapter" / adapters.WEIGHTS).read_bytes(), err


def test_a_run_does_not_go_on_with_another_base_in_the_same_folder(stage, tmp_path, monkeypatch, capsys):
    shutil.copytree(stage / "base", tmp_path / "base")
    words = sft_words(stage, tmp_path / "run", init_from=tmp_path / "base", steps=2, questions=0)
    assert in_process(monkeypatch, capsys, sft.main, *words)[0] == 0
    other = random_model(vocab_size=259, max_seq_len=64)
    other.lm_head.weight.data += 1
    save_model(other, PLAIN, tmp_path / "base")
    code, _, err = in_process(monkeypatch, capsys, sft.main, *words)
    assert code == 2 and "holds a run with base " in err
    assert err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("changes, words", [
    (dict(lora_targets="q_prj"), "--lora_targets q_prj matches no linear layer of this model; there are all, "
                                 "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"),
    (dict(lora_rank=33), "--lora_rank 33 is out of range; model.layers.0.self_attn.q_proj is of 32 x 32"),
    (dict(lora_rank=-1), "--lora_rank -1 is out of range"),
    (dict(lora_dropout=1), "--lora_dropout 1.0 is out of range"),
    (dict(lora_alpha=0), "--lora_alpha 0.0 is out of range"),
    (dict(lora_rank=0, quantize="nf4"), "--quantize nf4 is for adapters, and there are none; pass --lora_r"),
    (dict(train_layers="norms"), "--train_layers norms and --lora_rank 2"),
    (dict(tensor_parallel=2), "--tensor_parallel 2 does not know adapters"),
    (dict(quantize="nf3"), "is not one of nf4, int8"),
])
def test_mistakes_end_in_one_line_and_code_2_before_a_run_is_begun(stage, tmp_path, monkeypatch, capsys,
                                                                   changes, words):
    code, _, err = in_process(monkeypatch, capsys, sft.main, *sft_words(stage, tmp_path / "run", **changes))
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and words in last, err[-2000:]
    assert not (tmp_path / "run").exists()


def test_a_tied_head_is_no_target():
    with pytest.raises(UserError, match="this model's head is tied to its embedding"):
        add_lora(random_model(tie_embeddings=True), 2, 4, ("q_proj", "lm_head"))


def test_a_name_is_given_once():
    with pytest.raises(UserError, match="cannot be called 'default'"):
        add_lora(add_lora(random_model(), 2, 4), 2, 4)


@pytest.mark.parametrize("changes, words", [
    (dict(dim=48), "adapter for another base: lora_A of model.layers.0.self_attn.q_proj is"),
    (dict(n_layers=1), "this model has no linear layer model.layers.1.self_attn.q_proj"),
    (dict(ffn_dim=64), "lora_B of model.layers.0.mlp.gate_proj is"),
])
def test_an_adapter_for_another_base_is_refused(tmp_path, changes, words):
    save_adapter(adapted_model(), tmp_path)
    with pytest.raises(UserError, match=words):
        load_adapter(random_model(**changes), tmp_path)


@pytest.mark.parametrize("option, value", [
    ("modules_to_save", ["lm_head"]), ("bias", "all"), ("rank_pattern", {"q_proj": 4}),
    ("alpha_pattern", {"q": 1}), ("fan_in_fan_out", True), ("lora_bias", True),
    ("layer_replication", [[0, 2]]), ("init_lora_weights", "pissa"), ("peft_type", "IA3"),
    ("an_option_of_the_future", 7), ("use_qalora", True)])
def test_options_of_peft_that_are_not_known_are_refused_by_name(tmp_path, option, value):
    save_adapter(adapted_model(), tmp_path)
    config = json.loads((tmp_path / adapters.CONFIG).read_text("utf-8"))
    (tmp_path / adapters.CONFIG).write_text(json.dumps({**config, option: value}), "utf-8")
    with pytest.raises(UserError, match=f"{option} .*is not supported here"):
        load_adapter(random_model(), tmp_path)


def test_an_adapter_whose_base_is_not_there_says_so(tmp_path):
    save_adapter(adapted_model(), tmp_path)
    with pytest.raises(UserError, match="is an adapter for None, and there is no such folder here; merge it"):
        adapters.open_model(tmp_path)


@pytest.mark.parametrize("option, value", [
    ("r", "4"), ("r", None), ("lora_alpha", "8"), ("lora_alpha", float("nan")), ("lora_dropout", "much"),
    ("use_rslora", "false"), ("use_dora", 1), ("base_model_name_or_path", 5), ("trainable_token_indices", 5),
    ("trainable_token_indices", [-1, 3]), ("trainable_token_indices", ["a", "b"]),
    ("trainable_token_indices", [3, 3]), ("trainable_token_indices", [3, 10 ** 12]),
    ("trainable_token_indices", [3]), ("trainable_token_indices", None)])
def test_a_damaged_adapter_config_is_one_line(tmp_path, option, value):
    save_adapter(adapted_model(token_ids=[3, 4]), tmp_path)
    config = json.loads((tmp_path / adapters.CONFIG).read_text("utf-8"))
    (tmp_path / adapters.CONFIG).write_text(json.dumps({**config, option: value}), "utf-8")
    with pytest.raises(UserError, match="damaged|another base|out of range"):
        load_adapter(random_model(), tmp_path)


@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.q_proj", "model.norm", "model", "lm_head"])
def test_rows_of_tokens_are_of_the_embedding_or_the_head_and_of_their_shape(tmp_path, layer):
    save_adapter(adapted_model(token_ids=[3, 4]), tmp_path)
    tensors = read_tensors(tmp_path / adapters.WEIGHTS)
    tensors[f"base_model.model.{layer}.token_adapter.trainable_tokens_delta"] = torch.zeros(1, 32)
    write_tensors(tmp_path / adapters.WEIGHTS, tensors)
    with pytest.raises(UserError, match="is an adapter for another base: token_rows of "):
        load_adapter(random_model(), tmp_path)


def test_a_damaged_base_json_is_one_line(tmp_path, monkeypatch, capsys):
    base_and_adapter(tmp_path)
    for damage in ({"quantize": "nf3"}, {"sha256": None}, {"folder": 5}):
        base = json.loads((tmp_path / "adapter" / "base.json").read_text("utf-8"))
        (tmp_path / "adapter" / "base.json").write_text(json.dumps({**base, **damage}), "utf-8")
        code, _, err = in_process(monkeypatch, capsys, lora.main, "merge", "--base", tmp_path / "base",
                                  "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged")
        assert code == 2 and "base.json is damaged" in err


def test_a_merged_folder_opens_without_its_base_and_an_adapter_is_no_base(tmp_path):
    model = base_and_adapter(tmp_path)
    (tmp_path / "run").mkdir()
    adapters.merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "run")
    shutil.move(tmp_path / "adapter", tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "base")
    opened, _ = adapters.open_model(tmp_path / "run")
    torch.testing.assert_close(opened(IDS), model(IDS), rtol=1e-5, atol=1e-5)  # sums in another order
    with pytest.raises(UserError, match="is an adapter, no whole model; merge it with its base"):
        load_base(tmp_path / "run" / "adapter")


def test_a_folder_that_holds_an_adapter_alone_is_called_that(tmp_path):
    """Of peft, or of a run with --no-lora_merge: neither has a config.json, which is not what is missing."""
    base_and_adapter(tmp_path)
    (tmp_path / "adapter" / "config.json").unlink()
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "adapter", tmp_path / "run" / "adapter")
    for folder, adapter in (("adapter", "adapter"), ("run", "run/adapter")):
        with pytest.raises(UserError, match=f"is an adapter, no whole model; .*--adapter .*/{adapter} --out F"):
            load_base(tmp_path / folder)
        with pytest.raises(UserError, match="is an adapter, no whole model"):
            adapters.merge_folders(tmp_path / folder, tmp_path / "adapter", tmp_path / "merged")


def test_lora_py_without_a_word_says_what_it_does(monkeypatch, capsys):
    code, _, err = in_process(monkeypatch, capsys, lora.main)
    assert code == 2 and "python lora.py merge --base F --adapter F --out F" in err
