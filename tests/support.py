"""What several of the tests need: models in which every weight matters, and numbers from a seed."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

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


def in_process(monkeypatch, capsys, main, *arguments):
    """(exit code, output, errors) of a command, without the seconds that a new process costs."""
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, arguments)])
    code = 0
    try:
        config.run(main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


# ---- stages as users start them ----------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent


def program(script, words, processes=1):
    """(command, environment) of a script with these words, under torchrun where there are several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / script), *words]
    return command, {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def run_stage(script, words, processes=1):
    """The lines of the log that it leaves in its --out."""
    command, environment = program(script, words, processes)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    log = Path(words[words.index("--out") + 1], "log.jsonl")
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]


def check_a_killed_run(script, words_for, folder):
    """A run of two processes, twelve steps, that is killed goes on and ends in the bytes of one that is not.

    words_for: what its command is, of its --out. Needs /proc.
    """
    run_stage(script, words_for(folder / "whole"), processes=2)
    words = words_for(folder / "killed")
    kill_in_the_middle(script, words, folder / "output")
    assert [line["step"] for line in run_stage(script, words, processes=2)] == list(range(1, 13))
    whole, killed = ((folder / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed, "what was learnt before the kill, or from what it was after it, were others"


def kill_in_the_middle(script, words, output, processes=2):
    """Start it, and kill -9 all its processes once there is a state of a step that ends in 4. Needs /proc."""
    command, environment = program(script, words, processes)
    folder = Path(words[words.index("--out") + 1])
    with open(output, "wb") as file:
        first = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        while not list(folder.glob("state/step_*4")) and first.poll() is None:
            time.sleep(0.01)
        assert first.poll() is None, output.read_text("utf-8", errors="replace")[-3000:]
        workers = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text(encoding="ascii").split()
        for pid in (first.pid, *map(int, workers)):  # torchrun before those that it would tidy up
            os.kill(pid, signal.SIGKILL)
        first.wait()
