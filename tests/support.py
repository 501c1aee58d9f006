"""What several of the tests need: models in which every weight matters, and numbers from a seed."""
import functools
import json
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

import config
import data
from model import ModelConfig, Transformer

CLOSE = dict(rtol=1e-5, atol=1e-5)
TINY = ModelConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def random_ids(*shape, vocab_size=50, seed=0):
    return torch.randint(vocab_size, shape, generator=seeded(seed))


def random_model(**changes) -> Transformer:
    """A TINY model in which every weight matters: those that start at zero or one are random too."""
    model, generator = Transformer(replace(TINY, **changes)), seeded(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.dim() == 1 else 0.0, std=0.2, generator=generator)
    return model.eval()


VARIANTS = [{}, dict(n_kv_heads=4), dict(n_kv_heads=1), dict(tie_embeddings=True), dict(qk_norm=True),
            dict(attention_bias=True), dict(head_dim=12),
            dict(head_dim=6, qk_norm=True, attention_bias=True, tie_embeddings=True, n_kv_heads=1)]


def two_documents():
    """ids (1, 10): documents of 4 and 6 tokens; positions that begin anew; mask (1, 10, 10)."""
    document = torch.tensor([0] * 4 + [1] * 6)
    mask = torch.ones(10, 10, dtype=torch.bool).tril() & (document == document[:, None])
    return random_ids(1, 10), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]), mask[None]


def write_shards(folder, texts, tokenizer):
    """Token shards as data.py writes them, of {split: texts}."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"dtype": tokenizer.dtype.name, "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.fingerprint, "end_of_text": tokenizer.special_tokens["<|endoftext|>"]}
    for split, some in texts.items():
        data.write_documents(folder / f"{split}.jsonl", [{"text": text} for text in some])
        meta[split] = data.write_shard(folder, split, tokenizer, workers=1)
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def need_trl():
    """Skip, and say so, where there can be no TRL to compare with."""
    if sys.version_info < (3, 11):
        pytest.skip("TRL 1.16 is for Python 3.11 and later")


def in_process(monkeypatch, capsys, main, *arguments):
    """(exit code, output, errors) of a command, without the seconds that a new process costs."""
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, arguments)])
    code = 0
    try:
        config.run(main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def interrupted_once(monkeypatch, module, name, after) -> list:
    """Have module.name raise KeyboardInterrupt in place of its call number `after`, counted from 0, and then
    work again; returns a list that grows by the last argument of each call that was made."""
    made, real, stopped = [], getattr(module, name), []

    def once(*arguments):
        if len(made) == after and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        made.append(arguments[-1])
        return real(*arguments)
    monkeypatch.setattr(module, name, once)
    return made


# ---- stages as programs ------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def warm_processes():
    """A multiprocessing context whose processes are forked from one that has imported torch already.

    Importing is most of what a short process costs. They are processes of their own all the same; only the
    seed of str's hash is one for all: what hangs on it shows in the runs that are started as users do.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "pytest"])
    path = os.environ.get("PYTHONPATH")  # Python hands sys.path over only after the preloading
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [path])])
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
    return context


def program(script, words, processes=1):
    """(command, environment) of a script as users start it: under torchrun, if in several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / script), *map(str, words)]
    return command, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def as_program(script, words, environment, output):
    """What a process does that shall be `python script words`, but has imported torch already."""
    with open(output, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
            stream.reconfigure(encoding="utf-8")
    os.environ |= environment
    torch.set_num_threads(1)
    sys.argv = [script, *map(str, words)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def free_port() -> int:
    """A port that nobody listens to now; by lot, as other tests may look for one at the same time."""
    while True:
        port = random.randint(20000, 32000)  # below those that systems give to clients
        with socket.socket() as place:
            if place.connect_ex(("127.0.0.1", port)):
                return port


def start(script, words, output, processes=1):
    """Start a script in so many warm processes, without torchrun; returns them. They print into `output`."""
    context, port, started = warm_processes(), free_port(), []
    for rank in range(processes):
        environment = {} if processes == 1 else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        started.append(context.Process(target=as_program, args=(script, words, environment, output)))
        started[-1].start()
    return started


def finish(started, output):
    """Wait for them; all must have ended well."""
    for process in started:
        process.join(timeout=300)
    codes = [process.exitcode for process in started]
    assert codes == [0] * len(started), f"exit codes {codes}: {said_in(output)[-3000:]}"


def said_in(output):
    return Path(output).read_text("utf-8", errors="replace")


def run_stage(script, words, processes=1, torchrun=False):
    """The lines of the log that it leaves in its --out. torchrun: as users start it, seconds slower."""
    out = Path(words[words.index("--out") + 1])
    if torchrun:
        command, environment = program(script, words, processes)
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace",
                              env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        output = out.with_name(f"{out.name} said")
        finish(start(script, words, output, processes), output)
    return [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]


def check_a_killed_run(script, words_for, folder):
    """A run of two processes, twelve steps, that is killed goes on and ends in the bytes of one that is not.

    words_for: what its command is, of its --out. It goes on under torchrun, so that neither the launcher nor
    the seed of str's hash, which each new Python draws, may matter.
    """
    run_stage(script, words_for(folder / "whole"), processes=2)
    words = words_for(folder / "killed")
    kill_in_the_middle(script, words, folder / "output")
    assert [line["step"] for line in run_stage(script, words, 2, torchrun=True)] == list(range(1, 13))
    whole, killed = ((folder / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed, "what was learnt before the kill, or from what it was after it, were others"


def kill_in_the_middle(script, words, output):
    """Start it in two processes, and kill -9 both once there is a state of a step that ends in 4."""
    folder, started = Path(words[words.index("--out") + 1]), start(script, words, output, processes=2)
    while not list(folder.glob("state/step_*4")) and all(process.is_alive() for process in started):
        time.sleep(0.01)
    assert all(process.is_alive() for process in started), said_in(output)[-3000:]
    for process in started:
        process.kill()
    for process in started:
        process.join()


def wait_until(condition) -> bool:
    """Whether it holds within 30 seconds: what was killed may live for a moment on a busy machine."""
    for _ in range(300):
        if condition():
            return True
        time.sleep(0.1)
    return False


def is_alive(process) -> bool:
    """Of its number; False where there is no /proc."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
