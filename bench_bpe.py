"""How fast bpe.py is beside tokenizers and tiktoken: the measures of `python bench.py bpe`.

    python bench_bpe.py training ours 2 -                            # one run on so many cores, as JSON
    python bench_bpe.py encoding tiktoken 1 runs/bench_bpe.json      # with the vocabulary in that file

Each run is a process of its own, as a library decides once a process how many threads it takes. Texts: the
source of Python's standard library, 30 MB. Training: 32,768 tokens. Encoding: all texts with the vocabulary
that ours learned, first with nothing kept from before (cold), then again (warm); tiktoken keeps nothing.
Seconds go from texts in memory to a tokenizer, or to ids.
"""
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

import bpe
import workers

VOCABULARY = 32768
PEERS = {"training": "tokenizers", "encoding": "tiktoken"}


def report(rounds: int, path: str = "runs/bench_bpe.json") -> list[dict]:
    """Print medians and spread of alternating runs on one core and on all; return them, a dict each.

    path: where the vocabulary is put that both sides encode with.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    bpe.Tokenizer.train(library_texts(), VOCABULARY).save(path)
    runs = []
    for kind, peer in PEERS.items():
        for cores in sorted({1, workers.cores()}):
            for _ in tqdm(range(rounds), desc=f"{kind}, {cores} cores", leave=False):
                for side in ("ours", peer):  # in turns, so that a busy moment strikes both alike
                    runs += one_run(kind, side, cores, path)
    rows = [summary(list(some)) for _, some in groupby(sorted(runs, key=what), key=what)]
    print(f"source of the standard library, {rows[0]['megabytes']:.1f} MB, {VOCABULARY:,} tokens; medians of "
          f"{rounds} rounds (least to most); MiB: the peak, beside the texts")
    for row in rows:
        ours = next(other for other in rows if (other["kind"], other["cores"], other["side"]) == (
            row["kind"], row["cores"], "ours"))
        print(f"  {row['kind']:<14}cores: {row['cores']:<3}{row['side']:<11}{row['seconds']:>7.2f} s "
              f"({row['least']:.2f} to {row['most']:.2f}), of processors {row['processors']:.2f} s"
              f"{row['megabytes'] / row['seconds']:>7.1f} MB/s{row['mib']:>7,.0f} MiB; ours takes "
              f"{ours['seconds'] / row['seconds']:.2f} x the time, "
              f"{ours['processors'] / row['processors']:.2f} x of processors")
    return rows


def what(run) -> tuple:
    return run["kind"], run["cores"], run["side"] != "ours", run["side"]


def summary(runs: list[dict]) -> dict:
    """One row for the runs of a side: medians, and the least and most seconds."""
    seconds = [run["seconds"] for run in runs]
    medians = {name: statistics.median(run[name] for run in runs)
               for name in ("seconds", "processors", "mib")}
    return {**runs[0], **medians, "least": min(seconds), "most": max(seconds), "runs": seconds}


def one_run(kind: str, side: str, cores: int, path: str) -> list[dict]:
    """What a process of its own measures; nothing if the peer is not installed."""
    done = subprocess.run([sys.executable, __file__, kind, side, str(cores), path], capture_output=True,
                          text=True, encoding="utf-8", env={**os.environ, "RAYON_NUM_THREADS": str(cores)})
    if done.returncode == 3:
        tqdm.write(f"skipped: {done.stderr.strip()}")
        return []
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---- in that process ---------------------------------------------------------------------------------------


def library_texts() -> list[str]:
    return [path.read_text(encoding="utf-8", errors="replace") for path in bpe.library_files()]


def run(kind: str, side: str, cores: int, path: str):
    texts = library_texts()
    if kind == "training":
        train = train_ours if side == "ours" else train_peer
        print_measured(kind, side, cores, texts, lambda: train(texts, cores))
        return
    tokenizer = bpe.Tokenizer.load(path)
    encode = encode_ours(tokenizer, cores) if side == "ours" else encode_peer(tokenizer, cores)
    print_measured("encoding cold", side, cores, texts, lambda: encode(texts))
    if cores == 1:  # with more, ours are new processes each time
        print_measured("encoding warm", side, cores, texts, lambda: encode(texts))


def print_measured(kind, side, cores, texts, function):
    before, began, processors = resident_peak("VmRSS"), time.perf_counter(), processor_seconds()
    function()
    print(json.dumps({
        "kind": kind, "side": side, "cores": cores, "seconds": time.perf_counter() - began,
        "processors": processor_seconds() - processors, "mib": (resident_peak() - before) / 2 ** 20,
        "megabytes": sum(len(text.encode()) for text in texts) / 1e6}))


def resident_peak(line: str = "VmHWM") -> int:
    """The most bytes that this process has had in memory. (Linux's getrusage includes who started it.)

    line: "VmRSS" for what it has now; macOS does not say that, and gives the peak.
    """
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(int(entry.split()[1]) * 1024 for entry in file if entry.startswith(line))
    if os.name == "nt":  # PROCESS_MEMORY_COUNTERS of a 64-bit system: its size, the peak, what it has now
        counters = (ctypes.c_size_t * 9)(72)
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), ctypes.byref(counters), 72)
        return counters[2 if line == "VmRSS" else 1]
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def train_ours(texts, cores):
    bpe.Tokenizer.train(texts, VOCABULARY, workers=cores)


def train_peer(texts, cores):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    peer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(bpe.PATTERN), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
    peer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))


def encode_ours(tokenizer, cores):
    return lambda texts: tokenizer.encode_batch(texts, workers=cores)


def encode_peer(tokenizer, cores):
    import tiktoken
    peer = tiktoken.Encoding("peer", pat_str=tokenizer.pattern, special_tokens=tokenizer.special_tokens,
                             mergeable_ranks={token: id for id, token in tokenizer.ordinary_vocab().items()})
    if cores == 1:
        return lambda texts: [peer.encode_ordinary(text) for text in texts]
    return lambda texts: peer.encode_ordinary_batch(texts, num_threads=cores)


if __name__ == "__main__":
    try:
        run(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    except ImportError as error:
        if error.name not in PEERS.values():
            raise
        print(f"{error.name} is not installed", file=sys.stderr)
        sys.exit(3)
