"""Worker processes: a function of a batch in several of them, results in order, memory bounded.

They end with their parent, however it ends, and a worker that is killed is one line for the user. Unlike
work.py, where processes that some launcher began share a folder, these live as long as one call.
"""
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

from config import UserError


def in_processes(function, context, batches, workers) -> Iterator:
    """Yield function(context, batch) for each batch, in order, made in `workers` processes; None: one a core.

    A single batch is done here, as starting processes takes longer. Batches are read as they are needed, two
    a process ahead, so that memory does not grow with the input.
    """
    workers = cores() if workers is None else workers
    if workers < 1:
        raise UserError(f"workers {workers} is out of range; it must be at least 1")
    first = list(islice(batches, 2))
    batches = chain(first, batches)
    if len(first) < 2 or workers == 1:
        yield from (function(context, batch) for batch in batches)
        return
    workers = min(workers, 61) if sys.platform == "win32" else workers  # Windows waits for no more at once
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(function, context)) as pool:
        waiting = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(run_in_worker, batch))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            if sys.version_info < (3, 11):  # where it waits for ever to have a batch read (cpython#94777)
                pool._call_queue._reader.close()
            raise UserError(f"one of {workers} workers was killed; if memory ran out, use fewer") from None


def start_worker(function, context):
    """In a new process: keep what every batch needs. It is sent once, and its cache lives on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the parent
    threading.Thread(target=end_with_parent, daemon=True).start()
    run_in_worker.job = functools.partial(function, context)


def run_in_worker(batch):
    return run_in_worker.job(batch)


def end_with_parent():
    """A parent that is killed outright cannot end its processes, and they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def cores() -> int:
    """The cores that this process may use; in a container or a cluster's job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
