"""parallel.py: every layout of processes gives the losses of one, and each holds its share."""
import itertools
import math
import os
import queue as queues
import time
import traceback

import pytest
import torch
import torch.distributed as dist

import parallel
import train
from config import UserError
from model import ModelConfig, Transformer
from objectives import next_token_loss
from parallel import Compute, Env, mesh_sizes, parallelize
from support import free_port, warm_processes

CPU = Env(torch.device("cpu"))
STEPS = 20

# (processes, flags): the layouts of the issue
LAYOUTS = {
    "ddp2": (2, dict(data_parallel="ddp")),
    "ddp4": (4, dict(data_parallel="ddp")),
    "fsdp2": (2, dict(data_parallel="fsdp")),
    "fsdp4": (4, dict(data_parallel="fsdp")),
    "fsdp4 zero2": (4, dict(data_parallel="fsdp", reshard=False)),
    "hsdp2x2": (4, dict(data_parallel="hsdp", shard_size=2)),
    "tp2": (2, dict(tensor_parallel=2)),
    "fsdp2 tp2": (4, dict(data_parallel="fsdp", tensor_parallel=2)),
    "ddp2 tp2": (4, dict(data_parallel="ddp", tensor_parallel=2)),
}
VARIANTS = {  # each beside what it is compared with in one process
    "plain": dict(),
    "checkpointed": dict(activation_checkpointing="full"),
    "every second": dict(activation_checkpointing="full", checkpoint_every=2),
    "selective": dict(activation_checkpointing="selective"),
    "accumulated": dict(micro_batch_size=1),
    "tied": dict(tie_embeddings=True),
    "all logits": dict(chunked_loss=False),
    "tied, accumulated, checkpointed": dict(tie_embeddings=True, micro_batch_size=1,
                                            activation_checkpointing="full"),
}
OPTIMIZERS = ("muon", "adamw", "adafactor")


def settings_for(**changes):
    return train.Settings(**{"preset": "tiny", "dim": 32, "n_heads": 4, "n_kv_heads": 2, "seq_len": 16,
                             "batch_size": 8, "steps": STEPS, "device": "cpu", "precision": "fp32",
                             "lr": 0.01, "adam_lr": 3e-3, "timeout_minutes": 2.0, **changes})


def model_for(settings, seed=0):
    torch.manual_seed(seed)
    # 51: ragged shards
    model = Transformer(ModelConfig(vocab_size=51, dim=settings.dim, n_layers=2, n_heads=4, n_kv_heads=2,
                                    qk_norm=True, tie_embeddings=settings.tie_embeddings))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    if not settings.tie_embeddings:
        torch.nn.init.normal_(model.lm_head.weight, std=0.1)  # a zero head would pass on no gradient
    return model


class Windows:
    """Made-up batches: as of data.Batches, and with unequal numbers of targets."""

    def __init__(self, size, rank=0, world_size=1):
        self.size, self.rank, self.world_size = size, rank, world_size

    def at(self, i):
        first = (i * self.world_size + self.rank) * self.size
        rows = [self.window(number) for number in range(first, first + self.size)]
        return tuple(torch.stack(column) for column in zip(*rows))

    def window(self, number):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(51, (17,), generator=generator)
        targets = ids[1:].clone()
        targets[torch.rand(16, generator=generator) < number % 8 / 8] = -100  # some have all, some few
        if number % 8 == 7:
            targets[:] = -100
        return ids[:-1], targets


def curve(settings, env, steps=STEPS):
    """[(loss, gradient norm)] of the first steps, in this process's layout; and the trained model."""
    model = parallelize(model_for(settings, seed=env.rank), env)  # process 0's weights must win
    optimizer = train.make_optimizer(model, settings)
    size = train.micro_batch(settings, env)
    batches, count = Windows(size, env.data_rank, env.data_world_size), 8 // size // env.data_world_size
    loss_fn = lambda model, batch: next_token_loss(model, batch, settings.chunked_loss)  # noqa: E731
    figures = []
    for step in range(steps):
        micro_batches = [batches.at(step * count + i) for i in range(count)]
        report = train.update(model, optimizer, micro_batches, loss_fn, settings, env,
                              train.learning_rate(step, settings))
        figures.append((report["loss"], report["grad_norm"]))
    return figures, model, optimizer


# ---- processes that work through a list of tasks -----------------------------------------------------------


def process(rank, world_size, port, tasks, queue):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    parallel.measure_peak = lambda env: 0.0  # measuring would take longer than most tasks
    for name, function, arguments in tasks:
        try:
            result = function(*arguments)
        except BaseException:
            result = traceback.format_exc()
        queue.put((rank, name, result))
    queue.close()
    queue.join_thread()  # the last result travels by a thread: it shall have left before torch's own end
    dist.destroy_process_group()


def next_result(queue, processes, timeout):
    """Raises queues.Empty after the timeout, or once there is nobody left who could send one."""
    deadline = time.monotonic() + timeout
    while True:
        ended = not any(one.is_alive() for one in processes)  # asked first: they may have sent it since
        try:
            return queue.get(timeout=0.5)
        except queues.Empty:
            if ended or time.monotonic() > deadline:
                raise


def in_processes(world_size, tasks, timeout=400):
    """{name: [each process's function(*arguments)]} of tasks (name, function, arguments), made one by one."""
    context = warm_processes()
    queue, port = context.Queue(), free_port()
    processes = [context.Process(target=process, args=(rank, world_size, port, tasks, queue), daemon=True)
                 for rank in range(world_size)]
    for one in processes:
        one.start()
    results = {name: [None] * world_size for name, _, _ in tasks}
    try:
        for _ in range(world_size * len(tasks)):
            rank, name, result = next_result(queue, processes, timeout)
            results[name][rank] = result
    except queues.Empty:
        codes = [one.exitcode for one in processes]  # None: it runs still; negative: ended by that signal
        lost = f"no result within {timeout} s; exit codes of the processes: {codes}"
        results = {name: [lost if one is None else one for one in found] for name, found in results.items()}
    for one in processes:
        one.join(timeout=20)
        one.kill()
    return results


def task_curve(changes, steps=STEPS):
    settings = settings_for(**changes)
    return curve(settings, train.setup(settings), steps)[0]


def reference(changes, cache={}):  # noqa: B006: one process's curve, computed once
    key = tuple(sorted(changes.items()))
    if key not in cache:
        cache[key] = curve(settings_for(**changes), CPU)[0]
    return cache[key]


def check_parity(names, variants, optimizers=("muon",)):
    """Losses and gradient norms of 20 steps, in each layout, against those of one process.

    Techniques, on two cores the slowest of all tests, are followed for 3: what is added up wrongly shows in
    the first gradient norm, what is learnt from it in the second loss, what the optimizer keeps in the third.
    """
    cases = list(itertools.product(names, variants, optimizers))
    for world_size in (2, 4):
        tasks = [(case, task_curve, ({**LAYOUTS[case[0]][1], **VARIANTS[case[1]], "optimizer": case[2]},
                                     STEPS if case[1] == "plain" and case[2] == "muon" else 3))
                 for case in cases if LAYOUTS[case[0]][0] == world_size]
        results = in_processes(world_size, tasks) if tasks else {}
        for (layout, variant, optimizer), found in results.items():
            expected = reference({**VARIANTS[variant], "optimizer": optimizer})
            for rank, figures in enumerate(found):
                where = f"{layout}, {variant}, {optimizer}, process {rank}"
                assert isinstance(figures, list), f"{where}: {figures}"
                assert len(figures) >= 3
                for step, (a, b) in enumerate(zip(figures, expected)):
                    # the bound; float32 sums in another order give 1e-7, Adam's division a bit more
                    assert a == pytest.approx(b, rel=1e-4), f"{where}, step {step + 1}: {a}, one process {b}"


def test_two_processes_in_every_layout_give_the_losses_and_norms_of_one():
    check_parity(["ddp2", "fsdp2", "tp2"], ["plain", "tied, accumulated, checkpointed"])


@pytest.mark.slow
@pytest.mark.parametrize("names", [["ddp2", "fsdp2", "tp2"], ["ddp4", "fsdp4", "hsdp2x2"],
                                   ["fsdp4 zero2", "fsdp2 tp2", "ddp2 tp2"]])
def test_every_layout_with_every_technique_gives_the_losses_and_norms_of_one_process(names):
    check_parity(names, VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_every_optimizer_learns_the_same_in_every_layout(optimizer):
    check_parity(["fsdp2", "tp2", "hsdp2x2", "fsdp2 tp2"], ["plain"], [optimizer])


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "plain"])
def test_in_one_process_recomputation_and_chunks_change_nothing(variant):
    tied = {"tie_embeddings": True} if "tied" in variant else {}
    for a, b in zip(reference(VARIANTS[variant]), reference(tied), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


# ---- what each process holds -------------------------------------------------------------------------------


def task_bytes(changes):
    """(bytes of parameters, of moments, of gradients) that this process holds, after two steps."""
    from survive import local_part
    settings = settings_for(optimizer="adamw", **changes)
    _, model, optimizer = curve(settings, train.setup(settings), steps=2)
    moments = [m for state in optimizer.state.values() for m in state.values() if m.dim()]
    return tuple(sum(local_part(t).nbytes for t in tensors) for tensors in
                 (list(model.parameters()), moments, [p.grad for p in model.parameters()]))


def test_under_fsdp_each_process_holds_its_share_of_weights_gradients_and_moments():
    size = {"dim": 64, "n_heads": 4}
    whole = task_bytes(size)
    fsdp = in_processes(2, [("fsdp", task_bytes, ({**size, "data_parallel": "fsdp"},))])["fsdp"]
    for held in fsdp:
        for part, all_of_it in zip(held, whole, strict=True):
            assert part / all_of_it == pytest.approx(1 / 2, rel=0.05), "the issue's bound"


def task_tied(changes):
    settings = settings_for(tie_embeddings=True, **changes)
    _, model, _ = curve(settings, train.setup(settings), steps=1)
    names = [name for name, _ in model.named_parameters()]
    return model.lm_head.weight is model.model.embed_tokens.weight, "lm_head.weight" in names


def test_a_tied_head_stays_tied_in_every_layout():
    tasks = [(name, task_tied, (LAYOUTS[name][1],)) for name in ("ddp2", "fsdp2", "tp2")]
    for name, found in in_processes(2, tasks).items():
        assert found == [(True, False)] * 2, f"{name}: {found}"


def task_messages(changes):
    """How many gradient messages two micro-batches of a step cost."""
    settings = settings_for(**changes)
    env = train.setup(settings)
    model = parallelize(model_for(settings), env)
    sent = []
    original = dist.ProcessGroup.allreduce
    root = model.__dict__["root"]
    root.register_comm_hook(None, lambda state, bucket: (sent.append(1), bucket_done(bucket))[1])
    optimizer = train.make_optimizer(model, settings)
    batches = Windows(2, env.data_rank, env.data_world_size)
    train.update(model, optimizer, [batches.at(0), batches.at(1)], next_token_loss, settings, env, 0.01)
    assert original is dist.ProcessGroup.allreduce
    return len(sent)


def bucket_done(bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_accumulating_sends_gradients_once_a_step_under_ddp():
    found = in_processes(2, [("sent", task_messages, ({},))])["sent"]
    assert found == [1, 1], "a bucket of gradients for each micro-batch, instead of one for the step"


# ---- precision ---------------------------------------------------------------------------------------------


def task_precision(changes):
    settings = settings_for(**changes)
    figures, model, optimizer = curve(settings, train.setup(settings), steps=5)
    moments = [moment for state in optimizer.state.values() for moment in state.values()]
    dtypes = {tensor.dtype for tensor in [*model.parameters(), *moments]}
    return figures, dtypes


@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
def test_in_bf16_weights_and_moments_stay_float32_and_losses_close(reduce_dtype):
    expected = curve(settings_for(), CPU, steps=5)[0]
    half = {"precision": "bf16", "reduce_dtype": reduce_dtype}
    tasks = [(layout, task_precision, ({**LAYOUTS[layout][1], **half},))
             for layout in ("ddp2", "fsdp2", "tp2")]
    for layout, found in in_processes(2, tasks).items():
        for figures, dtypes in found:
            assert dtypes == {torch.float32}, layout
            for (loss, norm), (right_loss, right_norm) in zip(figures, expected, strict=True):
                # bfloat16 keeps 8 bits: 0.4 % of each product, averaged over hundreds of them
                assert loss == pytest.approx(right_loss, rel=0.01), layout
                assert norm == pytest.approx(right_norm, rel=0.05), layout


def task_fp16(changes):
    """A loss scale that overflows at first: what it ends at, how many steps were skipped, and the losses."""
    from survive import LossScale
    settings = settings_for(precision="fp16", **changes)
    env = train.setup(settings)
    model = parallelize(model_for(settings), env)
    optimizer, scaler, reports = train.make_optimizer(model, settings), LossScale(2.0 ** 18), []
    size = train.micro_batch(settings, env)
    batches, count = Windows(size, env.data_rank, env.data_world_size), 8 // size // env.data_world_size
    for step in range(16):
        micro_batches = [batches.at(step * count + i) for i in range(count)]
        reports.append(train.update(model, optimizer, micro_batches, next_token_loss, settings, env, 1e-3,
                                    scaler))
    return scaler.scale, [report["skipped"] for report in reports], [report["loss"] for report in reports]


def test_in_fp16_all_processes_skip_the_same_steps_and_lower_the_scale_alike():
    layouts = {"ddp": {"micro_batch_size": 2}, "fsdp": {"data_parallel": "fsdp"},
               "tp": {"tensor_parallel": 2}}
    tasks = [(name, task_fp16, (changes,)) for name, changes in layouts.items()]
    for name, found in in_processes(2, tasks).items():
        assert isinstance(found[0], tuple), found
        scale, skipped, losses = found[0]
        assert found[1] == found[0], f"{name}: the processes disagree"
        assert skipped[0] and not skipped[-1] and scale == 2.0 ** (18 - sum(skipped)), name
        assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0], name


def test_tf32_is_refused_where_there_is_no_such_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="tf32 is a format of NVIDIA GPUs"):
        train.setup(settings_for(precision="tf32"))


# ---- layouts that cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, world_size, words", [
    ({"tensor_parallel": 3}, 4, "tensor_parallel 3 does not divide the 4 process"),
    ({"data_parallel": "hsdp", "shard_size": 3}, 4, "shard_size 3 does not divide the 4 data-parallel"),
])
def test_processes_that_do_not_divide_are_refused(changes, world_size, words):
    with pytest.raises(UserError, match=words):
        mesh_sizes(Compute(**changes), world_size)


@pytest.mark.parametrize("changes, sizes", [
    ({}, (8, 1, 1)), ({"data_parallel": "fsdp"}, (1, 8, 1)),
    ({"data_parallel": "fsdp", "tensor_parallel": 2}, (1, 4, 2)),
    ({"data_parallel": "hsdp", "shard_size": 4}, (2, 4, 1)), ({"tensor_parallel": 4}, (2, 1, 4)),
])
def test_the_mesh_has_replicas_shards_and_tensor_parallel_processes(changes, sizes):
    assert mesh_sizes(Compute(**changes), 8) == sizes


def task_refused(changes, model_changes):
    settings = settings_for(**changes)
    torch.manual_seed(0)
    shape = {"vocab_size": 51, "dim": 32, "n_layers": 1, "n_heads": 4, **model_changes}
    model = Transformer(ModelConfig(**shape))
    try:
        parallelize(model, train.setup(settings))
    except UserError as error:
        return str(error)


def test_a_model_that_cannot_be_cut_so_is_refused_with_the_reason():
    cases = {"n_kv_heads 1": ({"tensor_parallel": 2}, {"n_kv_heads": 1}),
             "ffn_dim 33": ({"tensor_parallel": 2}, {"ffn_dim": 33}),
             "more than model.embed_tokens.weight has rows (1)":
                 ({"data_parallel": "fsdp"}, {"vocab_size": 1})}
    found = in_processes(2, [(words, task_refused, arguments) for words, arguments in cases.items()])
    for words, results in found.items():
        assert all(result and words in result for result in results), (words, results)


def test_a_sequence_that_tensor_parallelism_cannot_cut_is_refused():
    with pytest.raises(UserError, match="tensor_parallel 2 does not divide seq_len 33"):
        settings_for(seq_len=33, tensor_parallel=2)


def test_fsdp_in_a_single_process_without_torchrun_gives_the_same_losses():
    done = in_processes(1, [("fsdp", task_curve, ({"data_parallel": "fsdp"},))])["fsdp"][0]
    assert done == [pytest.approx(figures, rel=1e-5) for figures in reference({})]


@pytest.mark.parametrize("kind, every, wrapped", [("full", 1, 4), ("full", 2, 2), ("selective", 3, 1),
                                                  ("none", 1, 0)])
def test_recomputation_wraps_every_kth_block_and_renames_nothing(kind, every, wrapped):
    model = Transformer(ModelConfig(vocab_size=20, dim=16, n_layers=4, n_heads=2))
    names = [name for name, _ in model.named_parameters()]
    env = Env(torch.device("cpu"), compute=Compute(activation_checkpointing=kind, checkpoint_every=every))
    parallelize(model, env)
    assert sum("forward" in layer.__dict__ for layer in model.model.layers) == wrapped
    assert [name for name, _ in model.named_parameters()] == names


def saved_bytes(kind):
    """Bytes that autograd keeps for the backward pass, weights left out."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=20, dim=64, n_layers=4, n_heads=2))
    parallelize(model, Env(torch.device("cpu"), compute=Compute(activation_checkpointing=kind)))
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        next_token_loss(model, (torch.zeros(2, 64, dtype=torch.long), torch.zeros(2, 64, dtype=torch.long)))
    return sum(kept.values())


def test_full_recomputation_keeps_least():
    none, full = saved_bytes("none"), saved_bytes("full")
    assert full < none / 5, "a block's input instead of all that is computed in it"


def gradients_with_dropout(kind):
    torch.manual_seed(0)
    model = model_for(settings_for())
    for layer in model.model.layers:  # added from outside, as lora.py will
        layer.mlp.down_proj = torch.nn.Sequential(torch.nn.Dropout(0.5), layer.mlp.down_proj)
        torch.nn.init.normal_(layer.mlp.down_proj[1].weight, std=0.1)
    parallelize(model.train(), Env(torch.device("cpu"), compute=Compute(activation_checkpointing=kind)))
    torch.manual_seed(7)
    loss_sum, _ = next_token_loss(model, Windows(4).at(0))
    loss_sum.backward()
    return loss_sum.item(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_drops_the_same_activations_again(kind):
    loss, gradients = gradients_with_dropout(kind)
    expected_loss, expected = gradients_with_dropout("none")
    assert loss == expected_loss
    for gradient, right in zip(gradients, expected):
        assert torch.equal(gradient, right), "is the random state put back before the block runs again?"
