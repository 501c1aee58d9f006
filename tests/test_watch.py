"""watch.py: the plan before a run, errors of memory, the log, and where the time of a step goes."""
import json
import math
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import watch
from config import UserError
from model import ModelConfig, Transformer, estimate_flops, estimate_memory
from objectives import next_token_loss
from parallel import Env
from watch import (Log, Profile, describe, dry_run, free_memory, log_line, out_of_memory, read_log,
                   time_table)

GIB = 2 ** 30
TINY = ModelConfig(vocab_size=64, dim=32, n_layers=2, n_heads=2, max_seq_len=32)
SEVEN_B = ModelConfig(vocab_size=32000, dim=4096, n_layers=32, n_heads=32, ffn_dim=11008, max_seq_len=2048)
LAYOUT = dict(batch_size=2048, micro_batch_size=1, batch_start=None, seq_len=2048, steps=1000,
              optimizer="adamw", activation_checkpointing="none", checkpoint_every=1, chunked_loss=True,
              data_parallel="ddp", shard_size=None, tensor_parallel=1, reshard=True, objective="next_token")
GPU = torch.device("cuda", 0)


def settings(**changes):
    return SimpleNamespace(**LAYOUT | changes)


def env(**changes):
    return Env(**{"device": torch.device("cpu"), **changes})


def with_memory(monkeypatch, gib):
    monkeypatch.setattr(watch, "free_memory", lambda device: None if gib is None else int(gib * GIB))


def figure(text, name):
    """The second column of the row that begins with `name`."""
    row = next(line for line in text.splitlines() if line.strip().startswith(name))
    return re.split(r"\s{2,}", row.strip())[1]


# Before a run


def test_the_plan_states_parameters_flops_and_memory_by_part(monkeypatch):
    with_memory(monkeypatch, 1000)
    text = dry_run(SEVEN_B, settings(), env())
    memory = estimate_memory(SEVEN_B, 1, 2048)
    assert figure(text, "parameters") == "6,738,415,616"
    flops, tokens = estimate_flops(SEVEN_B, 2048), 1000 * 2048 * 2048
    assert float(figure(text, "FLOP a token")) == pytest.approx(flops, rel=0.005)  # three digits
    assert float(figure(text, "FLOP in all")) == pytest.approx(flops * tokens, rel=0.005)
    assert f"{tokens:,} tokens" in text and "5,000 tokens" in dry_run(SEVEN_B, settings(), env(), tokens=5000)
    for part in ("weights", "gradients", "moments", "activations", "logits", "total"):
        assert float(figure(text, part)) == pytest.approx(memory[part] / GIB, abs=0.05), part
    assert figure(text, "there are") == "1,000.0"
    assert text.splitlines()[-1] == f"fits: {memory['total'] / GIB:.1f} of 1,000.0 GiB"


def test_figures_of_the_plan_stand_in_one_column(monkeypatch):
    with_memory(monkeypatch, 80)
    rows = [line for line in dry_run(SEVEN_B, settings(), env()).splitlines()
            if re.match(r"parameters|FLOP|  (weights|total|there)", line)]
    assert len(rows) == 6 and len({re.match(r"\s*\S.*?\s{2,}\S+", row).end() for row in rows}) == 1


def test_planning_a_large_model_allocates_nothing():
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            assert all(x.is_meta for x in tree_leaves(result) if isinstance(x, torch.Tensor)), function
            return result
    with Refuse():
        assert "parameters" in dry_run(SEVEN_B, settings(), env(world_size=8))


@pytest.mark.parametrize("changes, world, expected", [
    (dict(micro_batch_size=None, batch_size=64), 4, dict(batch_size=16)),
    (dict(micro_batch_size=None, batch_size=64, tensor_parallel=2), 4,
     dict(batch_size=32, tensor_parallel=2)),
    (dict(micro_batch_size=None, batch_size=64, batch_start=8), 4, dict(batch_size=2)),
    (dict(micro_batch_size=None, batch_size=64, data_parallel="fsdp"), 8,
     dict(batch_size=8, data_parallel="fsdp", shards=8)),
    (dict(data_parallel="fsdp", tensor_parallel=2), 8,
     dict(data_parallel="fsdp", shards=4, tensor_parallel=2)),
    (dict(data_parallel="hsdp", shard_size=2), 8, dict(data_parallel="hsdp", shards=2)),
    (dict(data_parallel="fsdp", reshard=False), 8, dict(data_parallel="fsdp", shards=8, reshard=False)),
    (dict(activation_checkpointing="full", checkpoint_every=2), 1,
     dict(activation_checkpointing="full", checkpoint_every=2)),
    (dict(optimizer="muon", chunked_loss=False), 1, dict(optimizer="muon", chunked_loss=False)),
    (dict(objective="prefix"), 1, dict(masked=True))], ids=str)
def test_the_memory_is_that_of_one_process_of_the_layout(monkeypatch, changes, world, expected):
    with_memory(monkeypatch, 1000)
    text = dry_run(SEVEN_B, settings(**changes), env(world_size=world, precision="bf16"))
    memory = estimate_memory(SEVEN_B, **{"batch_size": 1, "seq_len": 2048, "precision": "bf16", **expected})
    for part in ("weights", "moments", "activations", "logits", "total"):
        assert float(figure(text, part).replace(",", "")) == pytest.approx(memory[part] / GIB, abs=0.05), part


def test_a_gpus_chunks_of_logits_are_larger(monkeypatch):
    with_memory(monkeypatch, 1000)
    text = dry_run(SEVEN_B, settings(micro_batch_size=8), env(device=GPU))
    logits = estimate_memory(SEVEN_B, 8, 2048, chunk=2 ** 27)["logits"]
    assert float(figure(text, "logits")) == pytest.approx(logits / GIB, abs=0.05)


def test_only_in_half_precision_the_weights_have_copies():
    assert "copies" in dry_run(TINY, settings(), env(precision="bf16"))
    assert "copies" not in dry_run(TINY, settings(), env(precision="tf32"))


def test_a_model_that_does_not_fit_is_told_what_each_of_three_flags_would_bring(monkeypatch):
    with_memory(monkeypatch, 40)
    wanted = settings(micro_batch_size=4, activation_checkpointing="full", checkpoint_every=4)
    head, *rows = dry_run(SEVEN_B, wanted, env()).splitlines()[-5:]
    assert head.startswith("does not fit: ") and " of 40.00 GiB" in head
    changes = [dict(batch_size=1), dict(checkpoint_every=1), dict(data_parallel="fsdp", shards=8),
               dict(batch_size=1, checkpoint_every=1, data_parallel="fsdp", shards=8)]
    flags = ["--micro_batch_size 1 ", "--activation_checkpointing full ",
             "--data_parallel fsdp, 8 processes ", "all three "]
    for row, change, flag in zip(rows, changes, flags, strict=True):
        assert row.strip().startswith(flag)
        total = estimate_memory(SEVEN_B, **{"batch_size": 4, "seq_len": 2048, "checkpoint_every": 4,
                                            "activation_checkpointing": "full", **change})["total"]
        assert float(row.split()[-2].replace(",", "")) == pytest.approx(total / GIB, abs=0.05), flag
    text = dry_run(SEVEN_B, settings(data_parallel="fsdp", micro_batch_size=64), env(world_size=16))
    assert "--data_parallel fsdp, 32 processes" in text


def test_a_tenth_of_the_memory_is_to_stay_free(monkeypatch):
    total = estimate_memory(SEVEN_B, 1, 2048)["total"] / GIB
    with_memory(monkeypatch, total / 0.9 + 0.01)
    assert "\nfits: " in dry_run(SEVEN_B, settings(), env())
    with_memory(monkeypatch, total / 0.9 - 0.01)
    assert "\ndoes not fit: " in dry_run(SEVEN_B, settings(), env())


def test_where_the_system_does_not_say_what_it_has_the_plan_says_so(monkeypatch):
    with_memory(monkeypatch, None)
    text = dry_run(SEVEN_B, settings(), env())
    assert "is not known" in text and "there are" not in text


def test_the_time_is_that_at_forty_percent_of_the_measured_peak(monkeypatch):
    with_memory(monkeypatch, 1000)
    flops = estimate_flops(SEVEN_B, 2048) * 2048 * 2048 * 1000
    for days, words in ((10, "10.0 days at 40 % of peak"), (0.5, "12 hours at 40 % of peak")):
        peak = flops / (days * 24 * 3600) / 0.4 / 8  # of each of 8 processes
        assert words in dry_run(SEVEN_B, settings(), env(world_size=8, peak_flops=peak))
    assert "of peak" not in dry_run(SEVEN_B, settings(), env())


def test_free_memory_of_a_cpu_is_shared_by_the_processes_of_the_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(watch, "machine_memory", lambda: 8 * GIB)
    assert free_memory(torch.device("cpu")) == 8 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(torch.device("cpu")) == 2 * GIB


def test_free_memory_of_a_gpu_is_what_its_driver_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 80 * GIB))
    assert free_memory(GPU) == 3 * GIB


def test_free_memory_on_linux_windows_and_elsewhere(monkeypatch):
    if hasattr(os, "sysconf"):
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert installed / 500 < watch.machine_memory() <= installed, "is it counted in kilobytes?"
        with monkeypatch.context() as patch:  # a Mac
            patch.setattr(Path, "exists", lambda path: False)
            assert watch.machine_memory() == installed

    def answer(status):  # GlobalMemoryStatusEx, as its documentation describes it
        numbers = status._obj
        assert numbers[0] == 64, "dwLength must be the structure's size, dwMemoryLoad is the answer's"
        numbers[0], numbers[1], numbers[2] = 64 + (70 << 32), 16 * GIB, 5 * GIB
    kernel = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=answer))
    with monkeypatch.context() as patch:
        patch.setattr(watch.ctypes, "windll", kernel, raising=False)
        patch.setattr(os, "name", "nt")
        found = watch.machine_memory()
    assert found == 5 * GIB

    def silent():
        raise ValueError("unrecognized configuration name")
    monkeypatch.setattr(watch, "machine_memory", silent)
    assert free_memory(torch.device("cpu")) is None


# Out of memory


def caught(action):
    with pytest.raises((RuntimeError, MemoryError)) as error:
        action()
    return error.value


def test_an_impossible_allocation_names_what_was_asked_for_where_and_three_flags():
    message = str(out_of_memory(caught(lambda: torch.empty(2 ** 60, dtype=torch.uint8)), settings()))
    assert message.startswith("out of memory on the CPU, which was asked for 1,073,741,824.0 GiB more; ")
    assert all(flag in message for flag in ("--micro_batch_size (now 1)", "--activation_checkpointing full",
                                            "--data_parallel fsdp", "--dry_run"))
    assert "\n" not in message


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 3 has a total capacity of "
                            "79.11 GiB of which 1.20 GiB is free.\nSee documentation"),
     "on GPU 3, which was asked for 2.50 GiB more"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB). Tried to allocate 256.00 MB on private "
                  "pool."), "on MPS, which was asked for 256.00 MB more"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "on CUDA; "),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you "
                  "tried to allocate 4294967296 bytes."), "on the CPU, which was asked for 4.00 GiB more"),
    (MemoryError(), "on the CPU; ")], ids=lambda x: type(x).__name__)
def test_each_devices_words_for_it_are_understood(error, words):
    message = str(out_of_memory(error, settings(micro_batch_size=None)))
    assert words in message and "now all windows of a process" in message and "\n" not in message


def test_numpys_error_is_understood():
    message = str(out_of_memory(caught(lambda: np.empty(2 ** 60, dtype=np.uint8)), settings()))
    assert "on the CPU, which was asked for 1.00 EiB more" in message


@pytest.mark.parametrize("error", [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError(), KeyError("out of memory"),
    UserError("out of memory on the CPU")], ids=repr)
def test_other_errors_are_left_alone(error):
    assert out_of_memory(error, settings()) is None


# The log


@dataclass
class LogSettings:
    out: str = "runs/x"
    overwrite: bool = True


def written(folder):
    return [line["step"] for line in read_log(folder)]


def test_a_log_goes_on_after_the_steps_that_are_done_and_takes_back_later_ones(tmp_path):
    log = Log()
    log.open(tmp_path, 0, LogSettings())
    assert log.last is None
    for step in (1, 2, 3):
        log.write({"step": step})
    log.sync()
    assert written(tmp_path) == [1, 2, 3], "a line must be in the file at once"
    before = log.file
    log.open(tmp_path, 2, LogSettings())  # as after going back to a state
    assert before.closed and log.last == {"step": 2} and written(tmp_path) == [1, 2]
    log.write({"step": 3})
    log.close()
    assert written(tmp_path) == [1, 2, 3]
    assert json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))["overwrite"] is False


def test_a_line_that_a_kill_cut_short_is_forgotten_and_a_gap_is_refused(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st', encoding="utf-8")
    log = Log()
    log.open(tmp_path, 2, LogSettings())
    log.close()
    assert written(tmp_path) == [1, 2]
    with pytest.raises(UserError, match="log.jsonl lacks some of the 3 steps that are done"):
        Log().open(tmp_path, 3, LogSettings())
    assert written(tmp_path) == [1, 2]


def test_the_other_processes_remember_the_last_line_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = Log()
    log.write({"step": 1})
    log.close()
    assert log.last == {"step": 1} and not list(tmp_path.iterdir())


REPORT = {"loss": 2.0, "grad_norm": 0.5, "targets": 900, "skipped": False}


def line_of(report=REPORT, batches=None, **more):
    return log_line(6, 0.01, report, batches, 0.5, SimpleNamespace(config=TINY),
                    settings(batch_size=4, seq_len=32), env(world_size=2, peak_flops=1e9), **more)


def test_a_line_of_the_log_by_hand():
    batches = SimpleNamespace(tokens=1000, text_bytes=3000)
    line = line_of(batches=batches, tokens=5000, tokens_step=64, data_wait=0.125)
    assert line["step"] == 7 and line["lr"] == 0.01 and line["grad_norm"] == 0.5 and line["targets"] == 900
    assert line["loss_nats_per_token"] == 2.0
    assert line["bits_per_byte"] == pytest.approx(2.0 / math.log(2) / 3)  # three bytes a token
    assert line["tokens"] == 5000 and line["tokens_per_second"] == 128
    assert line["seconds"] == 0.5 and line["data_wait_seconds"] == 0.125
    assert line["mfu"] == pytest.approx(estimate_flops(TINY, 32) * 128 / 2e9, abs=1e-4)  # 2 processes' 1e9
    assert "skipped" not in line


def test_by_default_every_batch_is_whole():
    line = line_of()
    assert line["tokens"] == 7 * 4 * 32 and line["tokens_per_second"] == 4 * 32 / 0.5
    assert line["data_wait_seconds"] == 0 and "bits_per_byte" not in line


def test_what_is_not_finite_is_null_and_the_line_stays_json():
    line = line_of(REPORT | {"loss": math.nan, "grad_norm": math.inf, "skipped": True},
                   SimpleNamespace(tokens=1, text_bytes=1))
    assert line["loss_nats_per_token"] is None and line["grad_norm"] is None and line["skipped"] is True
    assert "bits_per_byte" not in line
    json.dumps(line, allow_nan=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux has this second source")
def test_memory_on_a_cpu_is_the_most_that_this_process_held():
    """Within a tenth: the kernel counts in batches. And what started this process may have held more."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    highest = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / GIB
    assert 0.9 * highest < line_of()["memory_gib"] < 1.1 * highest + 1


def test_memory_on_a_gpu_is_the_most_that_its_tensors_held(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * GIB)
    line = log_line(0, 0.01, REPORT, None, 1.0, None, settings(), env(device=GPU))
    assert line["memory_gib"] == 3.0


def test_where_the_memory_is_not_known_the_line_leaves_it_out(monkeypatch):
    monkeypatch.setattr(watch, "resource", None)
    assert "memory_gib" not in line_of()


def test_the_progress_line_in_words():
    line = {"step": 1, "loss_nats_per_token": 2.345, "bits_per_byte": 1.2346, "lr": 0.02, "grad_norm": 0.517,
            "tokens_per_second": 12345, "mfu": 0.434, "seconds": 1.0, "data_wait_seconds": 0.05}
    words = "loss 2.345, 1.235 bits/byte, lr 2.0e-02, norm 0.52, 12,345 tok/s, 43% of peak"
    assert describe(line) == words
    assert describe(line | {"data_wait_seconds": 0.25}) == words + ", 25% waiting for data"
    assert describe(line | {"rollbacks": 2}) == words + ", rollbacks 2"
    del line["data_wait_seconds"], line["bits_per_byte"], line["mfu"]
    assert describe(line) == "loss 2.345, lr 2.0e-02, norm 0.52, 12,345 tok/s"
    assert describe({"skipped": True, "grad_norm": None}) == "skipped: overflow, the loss scale is halved"


# Where the time goes


class Said(Env):
    def say(self, *words):
        self.__dict__.setdefault("words", []).append(" ".join(map(str, words)))


def train(profile, steps, model=None):
    model = model or Transformer(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(steps):
        with torch.profiler.record_function("data"):
            time.sleep(0.002)
            ids = torch.randint(64, (4, 32))
        loss, count = next_token_loss(model, (ids, ids))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        profile.step()


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """(what was said, the folder) of six steps with a profile."""
    folder, said = tmp_path_factory.mktemp("profiled") / "run", Said(torch.device("cpu"))
    with Profile(folder, True, said) as profile:
        train(profile, 6)
        assert profile.profiler is None, "after the recorded steps it must cost nothing"
    return said.words, folder


def test_the_trace_holds_three_steps_after_two_of_warm_up(profiled):
    words, folder = profiled
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}
    assert sum(event["name"] == "aten::_fused_adamw_" for event in events) == 3
    assert [path.name for path in folder.iterdir()] == ["trace.json"], "what is left besides the trace?"


def test_the_table_is_printed_once_with_shares_that_make_up_the_step(profiled):
    table, trace = profiled[0]
    assert table.startswith("where the ") and "3 steps" in table and "trace.json" in trace
    shares = {line.split("  ")[1]: int(re.search(r"(\d+)%", line)[1]) for line in table.splitlines()[1:]}
    assert set(shares) == {"data", "optimizer", "attention", "head and loss", "matrix products", "other",
                           "Python, and waiting"}
    assert sum(shares.values()) == pytest.approx(100, abs=4)  # seven roundings of half a percent


def test_the_trace_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(source, target):
        json.loads(Path(source).read_text(encoding="utf-8"))
        raise OSError("no")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError), Profile(tmp_path, True, Said(torch.device("cpu"))) as profile:
        train(profile, 5)
    assert not (tmp_path / "trace.json").exists()


def test_switched_off_or_on_another_process_a_profile_does_nothing(tmp_path):
    for wanted, rank in ((False, 0), (True, 1)):
        said = Said(torch.device("cpu"), rank=rank)
        with Profile(tmp_path / "run", wanted, said) as profile:
            for _ in range(6):
                profile.step()
        assert not hasattr(said, "words") and not (tmp_path / "run").exists()


def test_too_few_steps_for_a_trace_are_told(tmp_path):
    said = Said(torch.device("cpu"))
    with Profile(tmp_path, True, said) as profile:
        train(profile, 4)
    assert said.words == ["--profile: no trace; it takes 5 steps, this run made 4"]
    assert not list(tmp_path.iterdir())


def test_an_error_goes_through_and_the_profiler_is_stopped(tmp_path, capfd):
    said = Said(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        with Profile(tmp_path, True, said) as profile:
            train(profile, 3)
            1 / 0
    assert not hasattr(said, "words") and not list(tmp_path.iterdir())
    assert not torch.autograd._profiler_enabled()
    assert capfd.readouterr().err == "", "the profiler is to keep quiet"


def event(name, own, parent=None, kernels=(), device=DeviceType.CPU, thread=1):
    """As the profiler makes them; own: microseconds without those of the operations it calls."""
    kernels = [SimpleNamespace(name=name, duration=duration) for name, duration in kernels]
    return SimpleNamespace(name=name, self_cpu_time_total=own, cpu_parent=parent, kernels=kernels,
                           thread=thread, device_type=device,
                           time_range=SimpleNamespace(elapsed_us=lambda: own))


def milliseconds(table):
    return {line.split("  ")[1]: float(re.search(r"([\d.]+) ms", line)[1]) for line in table.splitlines()[1:]}


def test_work_is_named_by_what_it_is_part_of():
    """Two steps of 10 ms. A product in the optimizer is the optimizer's, one in the loss the loss's."""
    step = event("Optimizer.step#Muon.step", 1000)
    loss = event("LinearCrossEntropyBackward", 0)
    attention = event("aten::scaled_dot_product_attention", 500)
    events = [event("ProfilerStep#2", 10_000), event("ProfilerStep#3", 10_000), step, loss, attention,
              event("aten::mm", 2000, step), event("aten::mm", 1000, event("autograd", 0, loss)),
              event("aten::addmm", 3000), event("aten::addmm", 1000), event("aten::bmm", 500, attention),
              event("aten::silu", 3000),
              event("data", 600), event("c10d::allreduce_", 400), event("aten::mm", 9999, thread=2),
              event("aten::_foreach_norm", 200), event("aten::mm_like", 100)]
    assert milliseconds(time_table(events, "cpu")) == {
        "optimizer": 1.6, "head and loss": 0.5, "attention": 0.5, "matrix products": 2.0, "other": 1.55,
        "data": 0.3, "communication": 0.2, "Python, and waiting": 3.35}


def test_on_a_gpu_kernels_count_by_the_operation_that_started_them():
    """One step of 10 ms, 7 of them busy. Ranges named by hand are no work; kernels count once."""
    step = event("Optimizer.step#AdamW.step", 50)
    events = [event("ProfilerStep#2", 10_000), step,
              event("ProfilerStep#2", 9_999, device=DeviceType.CUDA),
              event("aten::mm", 70, kernels=[("nvjet_hsh_128x256", 3000)]),
              event("aten::mm", 70, step, kernels=[("nvjet_hsh_128x256", 500)]),
              event("sm90_xmma_gemm_bf16", 0, device=DeviceType.CUDA, kernels=[("x", 1000)]),
              event("CompiledFunction", 70, kernels=[("triton_poi_fused_silu", 1000), ("flash_fwd", 1500)]),
              event("data", 100, kernels=[("data", 700)]),
              event("cudaMemcpyAsync", 5, kernels=[("Memcpy HtoD (Pinned -> Device)", 400)]),
              event("nccl:all_reduce", 5, kernels=[("ncclDevKernel_AllReduce", 600)])]
    assert milliseconds(time_table(events, "cuda")) == {
        "matrix products": 3.0, "optimizer": 0.5, "other": 1.0, "attention": 1.5, "data": 0.4,
        "communication": 0.6, "idle: the GPU waits": 3.0}


def test_the_costliest_operations_of_a_kind_stand_beside_it():
    names = Counter({"aten::silu": 3000, "aten::mul": 2000, "aten::add": 1000, "aten::cat": 900})
    events = [event("ProfilerStep#2", 10_000)] + [event(name, own) for name, own in names.items()]
    assert time_table(events, "cpu").splitlines()[1].endswith("silu 30%, mul 20%, add 10%")
