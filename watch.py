"""What is seen of a run: its log, its progress line."""
import contextlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

from config import UserError, open_whole, to_json
from model import estimate_flops


class Log:
    """log.jsonl: one line a step, without gap or repeat. Process 0 opens it; the others only remember."""

    def __init__(self):
        self.file, self.last = None, None

    def open(self, folder: Path, steps_done: int, settings):
        """Go on after `steps_done`: the lines of later steps, which no state knows of, are taken back."""
        path, kept = folder / "log.jsonl", []
        if path.exists():
            for text in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a kill may have cut the last line short
                    if json.loads(text)["step"] <= steps_done:
                        kept.append(text)
        if [json.loads(text)["step"] for text in kept] != list(range(1, steps_done + 1)):
            raise UserError(f"{path} lacks some of the {steps_done} steps that are done; put it back, "
                            f"or pass --overwrite")
        self.last = json.loads(kept[-1]) if kept else None
        folder.mkdir(parents=True, exist_ok=True)
        with open_whole(folder / "settings.json", "w") as file:
            file.write(to_json(replace(settings, overwrite=False)))
        with open_whole(path, "w") as file:
            file.writelines(text + "\n" for text in kept)
        self.file = open(path, "a", encoding="utf-8", newline="\n")

    def write(self, line: dict):
        self.last = line
        if self.file:
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
            self.file.flush()

    def sync(self):
        """Wait until all lines are on the disk."""
        os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.file.close()


def log_line(step, lr, report, batches, seconds, model, settings, env) -> dict:
    tokens = settings.batch_size * settings.seq_len
    figures = (report["loss"], report["grad_norm"])
    loss, norm = (x if math.isfinite(x) else None for x in figures)  # JSON has no infinity
    line = {"step": step + 1, "loss_nats_per_token": loss, "lr": lr, "grad_norm": norm,
            "targets": report["targets"], "tokens_per_second": round(tokens / seconds),
            "seconds": round(seconds, 4)}
    if report["skipped"]:
        line["skipped"] = True
    if hasattr(batches, "text_bytes") and loss is not None:
        line["bits_per_byte"] = loss / math.log(2) * batches.tokens / batches.text_bytes
    if env.peak_flops and hasattr(model, "config"):
        flops = estimate_flops(model.config, settings.seq_len) * tokens / seconds
        line["share_of_peak"] = round(flops / (env.peak_flops * env.world_size), 4)
    return line


def describe(line: dict) -> str:
    if line.get("skipped"):
        return "skipped: overflow, the loss scale is halved"
    words = [f"loss {line['loss_nats_per_token']:.3f}"]
    if "bits_per_byte" in line:
        words.append(f"{line['bits_per_byte']:.3f} bits/byte")
    words += [f"lr {line['lr']:.1e}", f"norm {line['grad_norm']:.2f}", f"{line['tokens_per_second']:,} tok/s"]
    if "share_of_peak" in line:
        words.append(f"{line['share_of_peak']:.0%} of peak")
    return ", ".join(words)
