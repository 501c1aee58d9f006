"""survive.py: states move between layouts bit for bit; bad steps are gone round; hangs end in words."""
import hashlib
import json
import math
import time
from pathlib import Path

import pytest
import torch

import train
from checkpoint import load_model, load_state
from config import UserError
from parallel import Env, parallelize
from survive import BadStep, LossScale, Run, lost_process, named_tensors, spike_limit
from test_parallel import LAYOUTS, Windows, in_processes, model_for, settings_for
from watch import Log

CPU = Env(torch.device("cpu"))


# ---- what counts as a spike, and the loss scale ------------------------------------------------------------


def test_a_spike_is_a_loss_many_deviations_above_the_median():
    losses = [2.9 + 0.2 * i / 40 for i in range(41)]  # the median is 3, the median distance from it 0.05
    assert spike_limit(losses, 5) == pytest.approx(3.0 + 5 * 1.4826 * 0.05)
    assert spike_limit([*losses, 1e9], 5) == pytest.approx(spike_limit(losses, 5), rel=0.02), \
        "one wild loss moved the limit by more than a place among 41: is it a mean?"


def test_equal_losses_do_not_make_the_next_one_a_spike():
    assert spike_limit([2.0] * 50, 10) == pytest.approx(2.0 + 10 * 0.02)


@pytest.mark.parametrize("losses, deviations", [([1.0] * 19, 5), ([1.0] * 50, 0)])
def test_few_losses_or_zero_deviations_set_no_limit(losses, deviations):
    assert spike_limit(losses, deviations) == math.inf


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_patience():
    scale = LossScale(1024.0, patience=3)
    scale.update(overflow=True)
    assert scale.scale == 512
    for _ in range(2):
        scale.update(overflow=False)
    assert scale.scale == 512
    copy = LossScale(patience=3)
    copy.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    copy.update(overflow=False)
    assert copy.scale == 1024, "are the good steps forgotten in the state?"
    copy.update(overflow=False)
    assert copy.scale == 1024, "each doubling needs its own patience"


# ---- going back --------------------------------------------------------------------------------------------


class Marked(Windows):
    """Windows that note which are asked for; `bad` ones make the loss what `as_loss` says."""

    def __init__(self, size=8, bad=()):
        super().__init__(size)
        self.bad, self.asked = set(bad), []

    def at(self, i):
        self.asked.append(i)
        inputs, targets = super().at(i)
        return inputs, targets, torch.tensor(float(i in self.bad))


def loss_with(value):
    """next_token_loss, but on bad batches its sum times `value`."""
    def loss_fn(model, batch):
        loss_sum, count = train.next_token_loss(model, batch[:2])
        return loss_sum * (value if batch[2] else 1.0), count
    return loss_fn


def run_with(tmp_path, bad, value, name="run", **changes):
    settings = settings_for(out=str(tmp_path / name), save_every=10, steps=40, **changes)
    batches = Marked(bad=bad)
    last = train.train(model_for(settings), batches, loss_with(value), settings, CPU)
    return batches.asked, last, tmp_path / name


@pytest.mark.parametrize("value", [math.nan, math.inf, 50.0])
def test_a_bad_batch_rolls_back_to_the_last_state_and_is_passed_over(tmp_path, capsys, value):
    asked, last, out = run_with(tmp_path, {25}, value)
    # batches 20 … 25, all since the state of step 20, are passed over: step 20 takes batch 26
    assert asked == [*range(26), *range(26, 46)], "which batches were passed over?"
    assert last["step"] == 40 and last["rollbacks"] == 1
    said = capsys.readouterr().out
    assert "step 26:" in said and "Back to step 20; the 48 windows since then are passed over" in said
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41)), "the log has a gap or a repeat"
    assert all(math.isfinite(line["loss_nats_per_token"]) for line in lines)


def test_a_run_that_went_back_equals_one_that_never_met_the_bad_batches(tmp_path):
    _, _, out = run_with(tmp_path, {25}, math.nan)

    class Without(Marked):
        def at(self, i):
            return super().at(i if i < 20 else i + 6)

    settings = settings_for(out=str(tmp_path / "clean"), save_every=10, steps=40)
    train.train(model_for(settings), Without(), loss_with(1.0), settings, CPU)
    assert digest(out) == digest(tmp_path / "clean")


def test_a_stop_after_a_rollback_changes_nothing_also_while_the_batch_grows(tmp_path):
    ramp = {"batch_size": 16, "batch_start": 8, "ramp_tokens": 16 * 200}
    _, _, whole = run_with(tmp_path, {25}, math.nan, name="whole", **ramp)

    class Stopped(Marked):
        def at(self, i):
            if i == 40 and not (tmp_path / "stopped").exists():
                (tmp_path / "stopped").touch()
                raise KeyboardInterrupt
            return super().at(i)

    settings = settings_for(out=str(tmp_path / "parts"), save_every=10, steps=40, **ramp)
    with pytest.raises(KeyboardInterrupt):
        train.train(model_for(settings), Stopped(bad={25}), loss_with(math.nan), settings, CPU)
    train.train(model_for(settings), Stopped(bad={25}), loss_with(math.nan), settings, CPU)
    assert digest(tmp_path / "parts") == digest(whole)


def test_before_the_first_state_it_goes_back_to_the_beginning(tmp_path):
    asked, last, _ = run_with(tmp_path, {3}, math.nan)
    assert asked == [*range(4), *range(4, 44)] and last["rollbacks"] == 1


def test_it_gives_up_after_a_bound_and_the_last_state_stays(tmp_path):
    with pytest.raises(UserError, match="loss is not finite.*given up after 2 rollbacks"):
        run_with(tmp_path, range(5, 1000), math.nan, max_rollbacks=2)
    assert load_state(tmp_path / "run" / "state")[0] == 0


def test_a_spike_of_the_loss_is_refused_before_a_weight_is_touched():
    settings = settings_for()
    model = model_for(settings)
    optimizer = train.make_optimizer(model, settings)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(BadStep, match="is a spike, above 1.000"):
        train.update(model, optimizer, [Windows(4).at(0)], train.next_token_loss, settings, CPU, 0.01,
                     limit=1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and not optimizer.state


# ---- states ------------------------------------------------------------------------------------------------


def digest(out):
    return hashlib.sha256((Path(out) / "model.safetensors").read_bytes()).hexdigest()


def test_the_last_two_states_and_the_best_are_kept(tmp_path, monkeypatch):
    results = iter([{"loss": loss, "bits_per_byte": loss} for loss in (3.0, 2.0, 2.5, 2.6, 2.7, 2.8)])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(results))
    settings = settings_for(out=str(tmp_path / "run"), steps=30, eval_every=5, save_every=5)
    train.train(model_for(settings), Windows(8), train.next_token_loss, settings, CPU, validation=object())
    states = sorted(path.name for path in (tmp_path / "run" / "state").iterdir())
    assert states == ["step_00000010", "step_00000025", "step_00000030"], "the best was step 10's"


def test_a_state_is_a_model_folder(tmp_path):
    settings = settings_for(out=str(tmp_path / "run"), steps=4, save_every=2)
    model = model_for(settings)
    train.train(model, Windows(8), train.next_token_loss, settings, CPU)
    loaded, _ = load_model(tmp_path / "run" / "state" / "step_00000004")
    for (name, p), q in zip(model.named_parameters(), loaded.parameters()):
        assert torch.equal(p, q), name


def test_training_goes_on_while_a_state_is_written_and_the_state_is_of_its_own_step(tmp_path, monkeypatch):
    import survive
    writing, written = survive.save_state, []

    def slow(folder, step, *args, **options):
        time.sleep(0.5)  # by then many steps have been made
        writing(folder, step, *args, **options)
        written.append(step)

    monkeypatch.setattr(survive, "save_state", slow)
    settings = settings_for(out=str(tmp_path / "run"), steps=12, save_every=10)
    stop = run_with_stop(settings, 10)
    monkeypatch.setattr(survive, "save_state", writing)
    settings = settings_for(out=str(tmp_path / "short"), steps=12, save_every=10)
    expected = run_with_stop(settings, 10)
    for name, tensor in expected.items():
        assert torch.equal(stop[name], tensor), f"{name} changed while it was written"


def run_with_stop(settings, step):
    train.train(model_for(settings), Windows(8), train.next_token_loss, settings, CPU)
    _, tensors, _ = load_state(Path(settings.out) / "state", only=step)
    return {name: t.clone() for group in tensors.values() for name, t in group.items()}


def test_a_full_disk_ends_the_run_with_the_error_and_not_silently(tmp_path, monkeypatch):
    import survive

    def full(folder, step, *args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(survive, "save_state", full)
    with pytest.raises(OSError, match="No space left"):
        settings = settings_for(out=str(tmp_path / "run"), steps=4)
        train.train(model_for(settings), Windows(8), train.next_token_loss, settings, CPU)
    assert not (tmp_path / "run" / "model.safetensors").exists()


# ---- resharding --------------------------------------------------------------------------------------------


def run_of(settings, env):
    model = parallelize(model_for(settings, seed=env.rank + 5), env)
    optimizer = train.make_optimizer(model, settings)
    return Run(Path(settings.out), model, None, optimizer, env, {})


def whole_digests(run):
    """{name: digest of the whole tensor}, wherever its parts lie."""
    digests = {}
    for group, named in named_tensors(run.model, run.optimizer).items():
        for name, tensor in named.items():
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digests[f"{group} {name}"] = hashlib.sha256(content).hexdigest()
    return digests


def some_steps(run, settings, env, count):
    """Losses of the next steps, with the windows that belong to them."""
    size = train.micro_batch(settings, env)
    batches = Windows(size, env.data_rank, env.data_world_size)
    return [train.one_step(run, batches, train.next_token_loss, settings, env)["loss_nats_per_token"]
            for _ in range(count)]


def task_save(changes, out):
    settings = settings_for(out=out, **changes)
    env = train.setup(settings)
    run, log = run_of(settings, env), Log()
    env.first(lambda: log.open(Path(out), 0, settings))
    some_steps(run, settings, env, 3)
    run.save(log)
    digests = whole_digests(run)  # while it is written
    losses = some_steps(run, settings, env, 3)
    run.wait()
    log.close()
    return digests, losses


def task_load(changes, out, steps):
    settings = settings_for(out=out, **changes)
    env = train.setup(settings)
    run = run_of(settings, env)
    run.load()
    return whole_digests(run), some_steps(run, settings, env, steps)


def layouts(names):
    return {"one": (1, {}), **{name: LAYOUTS[name] for name in names}}


def in_worlds(function, chosen, arguments):
    """{layout's name: result of process 0} of function(changes, …), each in its own number of processes."""
    results = {}
    for world_size in {size for size, _ in chosen.values()}:
        tasks = [((name, *more), function, (changes, *values)) for name, (size, changes) in chosen.items()
                 if size == world_size for more, values in arguments(name)]
        if world_size == 1:
            results |= {name: function(*values) for name, function, values in tasks}
        else:
            for name, result in in_processes(world_size, tasks).items():
                assert all(isinstance(one, tuple) for one in result), result
                assert all(one == result[0] for one in result), f"{name}: the processes disagree"
                results[name] = result[0]
    return results


def check_pairs(tmp_path, names, optimizer):
    """Each layout loads what each saved; and goes on with what it saved itself, and what the next one did."""
    chosen = {name: (size, {**changes, "optimizer": optimizer})
              for name, (size, changes) in layouts(names).items()}
    saved = in_worlds(task_save, chosen, lambda name: [((), (str(tmp_path / name),))])
    circle = list(chosen)
    steps = {(name, other): 3 for i, name in enumerate(circle) for other in (name, circle[i - 1])}
    loaded = in_worlds(task_load, chosen, lambda name: [((other,), (str(tmp_path / other),
                                                                    steps.get((name, other), 0)))
                                                        for other in circle])
    for writer in chosen:
        digests, losses = saved[(writer,)]
        for reader in chosen:
            found, continued = loaded[(reader, writer)]
            wrong = [name for name in digests.keys() | found.keys() if digests.get(name) != found.get(name)]
            assert not wrong, f"saved as {writer}, loaded as {reader}: {wrong} differ"
            # float32 sums in another order, over three steps
            expected = losses[:steps.get((reader, writer), 0)]
            assert continued == pytest.approx(expected, rel=1e-4), f"saved as {writer}, loaded as {reader}"


def test_a_state_moves_between_one_process_ddp_fsdp_and_tensor_parallelism_bit_for_bit(tmp_path):
    check_pairs(tmp_path, ["ddp2", "fsdp2", "tp2"], "muon")  # 16 pairs


@pytest.mark.slow
def test_a_state_moves_between_all_layouts_of_1_2_and_4_processes_bit_for_bit(tmp_path):
    check_pairs(tmp_path, [name for name in LAYOUTS if name != "fsdp4 zero2"], "muon")  # 81 pairs


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_moments_of_every_optimizer_move_between_layouts_bit_for_bit(tmp_path, optimizer):
    check_pairs(tmp_path, ["fsdp2", "fsdp2 tp2"], optimizer)  # 9 pairs


def task_slow_disk(out):
    """A state takes longer to write than another process may keep the others waiting: that is no hang."""
    import checkpoint
    plain = checkpoint.file_checksum
    checkpoint.file_checksum = lambda path: (time.sleep(1), plain(path))[1]  # a state is five files
    settings = settings_for(out=out, timeout_minutes=0.04, steps=2, save_every=1)
    env = train.setup(settings)
    batches = Windows(4, env.data_rank, env.data_world_size)
    return train.train(model_for(settings), batches, train.next_token_loss, settings, env)["step"]


def test_a_slow_disk_is_not_mistaken_for_a_process_that_hangs(tmp_path):
    tasks = [("slow", task_slow_disk, (str(tmp_path / "run"),))]
    assert in_processes(2, tasks, timeout=100)["slow"] == [2, 2]
    assert load_state(tmp_path / "run" / "state")[0] == 2


# ---- processes that hang or are lost -----------------------------------------------------------------------


def task_hang():
    env = train.setup(settings_for(timeout_minutes=0.05))
    if env.rank == 1:
        time.sleep(8)
        return "slept"
    began = time.time()
    try:
        env.any(False)
    except RuntimeError as error:
        return str(lost_process(error, 0.05)), time.time() - began


def task_hang_in_part():
    """A process hangs, and the only one that waits for it is the other of its line of the mesh."""
    env = train.setup(settings_for(timeout_minutes=0.05, data_parallel="hsdp", shard_size=2))
    if env.rank != 1:
        time.sleep(8)
        return "slept"
    began = time.time()
    try:
        torch.distributed.all_reduce(torch.zeros(1), group=env.mesh["shard"].get_group())
    except RuntimeError as error:
        return str(lost_process(error, 0.05)), time.time() - began


@pytest.mark.slow
def test_a_process_that_hangs_ends_those_that_share_its_part_of_the_mesh():
    result = in_processes(4, [("task", task_hang_in_part, ())], timeout=60)["task"]
    assert isinstance(result[1], tuple) and "it hangs" in result[1][0], result
    assert result[1][1] < 8, "the limit was three seconds"


def task_leave():
    import os
    env = train.setup(settings_for())
    if env.rank == 1:
        os._exit(1)
    try:
        env.any(False)
        env.any(False)
    except RuntimeError as error:
        return str(lost_process(error, 1)), 0.0


@pytest.mark.parametrize("task, words", [(task_hang, "it hangs"), (task_leave, "it ended")])
def test_a_process_that_hangs_or_is_gone_ends_the_others_with_a_message(task, words):
    result = in_processes(2, [("task", task, ())], timeout=20)["task"]
    assert isinstance(result[0], tuple) and words in result[0][0] and "process 0 of 2" in result[0][0], result


def test_an_error_that_has_nothing_to_do_with_processes_is_left_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for text in ("mat1 and mat2 shapes cannot be multiplied", "NCCL error: invalid usage"):
        assert lost_process(RuntimeError(text), 1) is None
