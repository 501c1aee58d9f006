"""Does cleaning help? Plant junk in good text, to train on it raw and cleaned, and test on the same text.

    python data.py                              # runs/data: the good text, and what is held out of it
    python tests/plant.py                       # runs/planted.jsonl: its train documents, and 30 % junk
    python tests/plant.py --commands | sh       # all that is to be run, these two and the training included

The junk: copies of documents with some words changed (near-duplicates), pages of one boilerplate with a few
lines of text, and gibberish; a third of its bytes each. Steps, tokens a step and the held-out text are equal,
so what differs is what the tokens are spent on.
"""
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import config  # noqa: E402: the path comes first
from config import UserError  # noqa: E402
from documents import stored_documents, write_documents  # noqa: E402

KINDS = ("duplicate", "boilerplate", "gibberish")


@dataclass
class Settings:
    data: str = "runs/data"  # a folder that data.py wrote: its train documents are the good text
    out: str = "runs/planted.jsonl"  # the file to write; each document says what it is: "planted"
    share: float = 0.3  # of all bytes that are junk
    seed: int = 0
    overwrite: bool = False  # replace the file
    left: str | None = None  # only count by kind what is left in this folder of data.py's
    commands: bool = False  # only print the commands of the experiment
    steps: int = 300  # of training, in the commands
    seeds: int = 3  # runs of each kind, in the commands

    def __post_init__(self):
        config.require(self, share=(0, 0.95), steps=(1, None), seeds=(1, 100))


def near_copy(text: str, rng: random.Random) -> str:
    """The text with one word in a hundred changed, and a line of its own at the top."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), len(words) // 100):
        words[place] = f"copy{rng.randrange(1000)}"
    return f"# Mirror number {rng.randrange(10**6)} of a file found elsewhere\n" + " ".join(words)


FOOTER = "".join(f"# {sentence}\n" for sentence in (
    "Sign up for our newsletter to hear of new files before everybody else does, twice a week, for free",
    "By reading this page you accept that it is read, and that reading may be counted and shared with others",
    "Related files that other readers looked at after this one: first steps, more steps, and the next steps",
    "Copyright by those who hold it; all rights that can be reserved are reserved, here and elsewhere",
    "Back to the top of the page, or to the page before, or to the list of all pages that there are to read"))


def boilerplate(text: str, rng: random.Random) -> str:
    """The same notices around three lines of a text."""
    lines = text.split("\n")
    at = rng.randrange(max(1, len(lines) - 3))
    return FOOTER + "\n".join(lines[at:at + 3]) + "\n" + FOOTER


def gibberish(rng: random.Random) -> str:
    """Lines of random characters, as of a binary file that was taken for text."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789+/=#@~^|<>{}[]%$&*;:"
    return "".join("".join(rng.choices(letters, k=rng.randint(20, 200))) + "\n"
                   for _ in range(rng.randint(5, 60)))


def planted(documents: list[dict], share: float, seed: int) -> list[dict]:
    """The documents and junk among them, so much that it is `share` of all bytes, in random order."""
    rng, result = random.Random(seed), [document | {"planted": "good"} for document in documents]
    good = sum(len(document["text"].encode("utf-8")) for document in documents)
    wanted = share / (1 - share) * good / len(KINDS)
    for kind in KINDS:
        size = 0
        while size < wanted:
            text = rng.choice(documents)["text"]
            text = (near_copy(text, rng) if kind == "duplicate" else
                    boilerplate(text, rng) if kind == "boilerplate" else gibberish(rng))
            size += len(text.encode("utf-8"))
            result.append({"text": text, "source": f"{kind}/{len(result)}.py", "planted": kind})
    rng.shuffle(result)
    return result


def commands(settings: Settings) -> str:
    """The experiment. The held-out text is that of `data`: a source of the mixture that gives no windows."""
    cleaning = " --near 0.8 --lines 60 --quality code --perplexity runs/perplexity"
    text = [f"python data.py --out {settings.data}",
            f"python tests/plant.py --data {settings.data} --out {settings.out} --share {settings.share}",
            f"python perplexity.py --train {settings.data}/train.jsonl --low 0 --high 100 "
            f"--out runs/perplexity"]
    for kind, steps in (("raw", ""), ("cleaned", cleaning)):
        text += [f"python data.py --input {settings.out} --tokenizer {settings.data} --out runs/{kind}"
                 + steps,
                 f"python tests/plant.py --left runs/{kind}",
                 f"python mixture.py --sources held_out={settings.data} text=runs/{kind} "
                 f'--phases "100% text" --out runs/{kind}.json']
        text += [f"python train.py --data runs/{kind}.json --steps {settings.steps} --seed {seed} --out "
                 f"runs/{kind}-{seed}" for seed in range(settings.seeds)]
    return "\n".join(text)


def what_is_left(folder: str) -> dict[str, int]:
    """Bytes by kind of what data.py has kept: what the cleaning found, and what it took by mistake."""
    left = dict.fromkeys(("good", *KINDS), 0)
    for document in stored_documents(*(Path(folder, f"{split}.jsonl") for split in ("train", "val"))):
        left[document["planted"]] += len(document["text"].encode("utf-8"))
    return left


def main():
    settings = config.parse(Settings)
    if settings.commands:
        print(commands(settings))
        return
    if settings.left:
        print(f"{settings.left}: bytes left {json.dumps(what_is_left(settings.left))}")
        return
    out = Path(settings.out)
    if out.exists() and not settings.overwrite:
        raise UserError(f"--out {out} exists; pass --overwrite to replace it")
    good = list(stored_documents(Path(settings.data, "train.jsonl")))
    documents = planted(good, settings.share, settings.seed)
    write_documents(out, documents)
    sizes = dict.fromkeys(("good", *KINDS), 0)
    for document in documents:
        sizes[document["planted"]] += len(document["text"].encode("utf-8"))
    print(f"{out}: {len(documents):,} documents; bytes {json.dumps(sizes)}")


if __name__ == "__main__":
    config.run(main)
