"""The default conversations: about the functions of Python's own standard library, offline.

    python -c "from stdlib_chat import write_conversations; write_conversations('runs/chat')"

Each function with a docstring makes two pairs:

    describe   its code, without the docstring   ->  the first sentence of the docstring
    write      its signature and docstring       ->  its body

so that a program can check what a model answers: against the sentence that the author wrote, and with
compiles(assemble(code, answer)). The modules are those of data.py, in its two splits: nothing of a held-out
one is in `train`, neither here nor in what the base model has read. (Not in chat.py, which reads anybody's
conversations: this is one source of them.)
"""
import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data

DESCRIBE = ("What does this function do?\n\n{code}", "Describe this function in one sentence.\n\n{code}",
            "Write the first line of this function's docstring.\n\n{code}", "Summarise this code:\n\n{code}",
            "{code}\n\nWhat does the function above do?", "{code}\n\nSay in one sentence what this is for.")
WRITE = ("Write the body of this function.\n\n{code}", "Complete this function.\n\n{code}",
         "Implement this function:\n\n{code}", "Write the code that this docstring describes.\n\n{code}",
         "Here is how a function begins. How does it go on?\n\n{code}")
MAX_CHARS = 400  # of question and answer together: longer bodies the main job's model begins, and never ends
MAX_REPEATS = 5  # of an answer: dozens of functions are described by no more than "Internal function."


# ---- 1. Pairs of question and answer -----------------------------------------------------------------------


def stdlib_conversations(max_chars: int = MAX_CHARS, seed: int = 0,
                         val_fraction: float = data.Settings.val_fraction) -> dict[str, list[dict]]:
    """{"train", "val"}: the pairs of the modules that data.py, with this val_fraction, puts into that split.

    A pair whose code or signature also occurs in `train` is not in `val`. Arguments: see pairs.
    """
    modules = {split: [] for split in data.SPLITS}
    library = data.accepted(data.read_files(data.standard_library()), "skip", {})
    for module in data.kept_documents(library):
        held_out = data.content_hash(module["text"]) < int(val_fraction * 2**128)
        modules["val" if held_out else "train"].append(module)
    seen = set()
    return {split: list(pairs(modules[split], max_chars, seed, seen)) for split in data.SPLITS}


def pairs(modules: Iterable[dict], max_chars: int, seed: int, seen: set[int]) -> Iterator[dict]:
    """Yield {"messages", "task": "describe" or "write", "code", "source"} for the functions of modules.

    code: what the question is about, as it stands in it. max_chars: of question and answer together. seed:
    of the phrasing, a function of (seed, code). seen: hashes of code that has been asked about; it grows.
    """
    answers = Counter()
    for module in modules:
        for function in functions(module["text"], max_chars):
            for task, phrasings, code, answer in (
                    ("describe", DESCRIBE, f"{function.signature}\n{function.body}", function.summary),
                    ("write", WRITE, f"{function.signature}\n{function.docstring}", function.body)):
                digest = data.content_hash(code)
                which = np.random.default_rng([seed, digest]).integers(len(phrasings))
                question = phrasings[which].replace("{code}", code)
                fits = answer and len(question) + len(answer) <= max_chars
                if fits and digest not in seen and answers[answer] < MAX_REPEATS:
                    seen.add(digest)
                    answers[answer] += 1
                    yield {"messages": [{"role": "user", "content": question},
                                        {"role": "assistant", "content": answer}],
                           "task": task, "code": code, "source": module["source"]}


def assemble(code: str, answer: str) -> str:
    """The whole function that the code of a "write" pair and an answer to it make.

    The answer's first line gets its indentation back, if a template has stripped it.
    """
    docstring = ast.parse(code).body[0].body[0]
    indentation = code.split("\n")[docstring.lineno - 1][:docstring.col_offset]
    return f"{code}\n{answer if answer[:1].isspace() else indentation + answer}"


def asks_for_body(conversation: dict) -> bool:
    """Whether a conversation is a "write" pair: anybody's file may have other things at these keys."""
    code = conversation.get("code")
    if conversation.get("task") != "write" or not isinstance(code, str):
        return False
    tree = compiled(code, ast.PyCF_ONLY_AST)
    return bool(tree and tree.body) and isinstance(tree.body[0], (ast.FunctionDef, ast.AsyncFunctionDef))


def used_arguments(code: str, answer: str) -> float | None:
    """The share of the function's arguments that the answer reads; None if it does not compile.

    1 if there are none. self and cls are arguments like any other. Nothing is run.
    """
    tree = compiled(assemble(code, answer), ast.PyCF_ONLY_AST) if answer.strip() else None
    if tree is None or not compiles(assemble(code, answer)):
        return None
    arguments = {node.arg for node in ast.walk(tree.body[0].args) if isinstance(node, ast.arg)}
    read = {node.id for statement in tree.body[0].body for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return len(arguments & read) / len(arguments) if arguments else 1.0


def write_conversations(folder: str | Path, overwrite: bool = False, max_chars: int = MAX_CHARS,
                        seed: int = 0, val_fraction: float = data.Settings.val_fraction) -> None:
    """Write the default conversations as train.jsonl and val.jsonl, and print how many of them there are.

    Raises UserError if the folder exists, without overwrite; what was there is lost only when all is written.
    """
    with data.whole_folder(Path(folder), overwrite) as fresh:
        for split, conversations in stdlib_conversations(max_chars, seed, val_fraction).items():
            data.write_documents(fresh / f"{split}.jsonl", conversations)
            tasks = Counter(conversation["task"] for conversation in conversations)
            print(f"{folder}/{split}.jsonl: {len(conversations):,} conversations of at most {max_chars:,} "
                  f"characters: {tasks['describe']:,} describe a function, {tasks['write']:,} write its body")


# ---- 2. Functions, read but never run ----------------------------------------------------------------------


@dataclass(frozen=True)
class Function:
    """The source of a function in three parts, moved to the left margin, and its docstring's first words."""
    signature: str  # without decorators
    docstring: str  # with its quotes
    body: str
    summary: str  # the docstring's first sentence, or ""


# A line that ends in a colon, before one that begins with a string: a module without it needs no parsing
BEFORE_DOCSTRING = re.compile(r""":[ \t]*(?:#.*)?\n\s*[rRuU]?["']""")
EMPTY_BODY = re.compile(r"(?:\s*#.*\n)*\s*(?:pass|\.\.\.|raise NotImplementedError.*)\s*")
SENTENCE = re.compile(r".+?(?<!e\.g)(?<!i\.e)[.!?](?=\s+[^a-z\s]|$)")


def functions(source: str, max_chars: int) -> Iterator[Function]:
    """Yield the functions of a module that have a docstring and a body; max_chars: of the body at most.

    None where the source is not this Python's (the library keeps some of Python 2, for tests).
    """
    tree = compiled(source, ast.PyCF_ONLY_AST) if BEFORE_DOCSTRING.search(source) else None
    lines = source.split("\n")
    for node in statements(tree.body if tree else []):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            function = cut(node, lines)
            if function and len(function.body) <= max_chars and not EMPTY_BODY.fullmatch(function.body):
                if compiles(f"{function.signature}\n{function.docstring}\n{function.body}"):
                    yield function


def statements(block: list[ast.AST]) -> Iterator[ast.AST]:
    """Yield all statements of a block and of the blocks in them; expressions are not walked, for speed."""
    for node in block:
        yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            yield from statements(getattr(node, name, ()))


def cut(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function | None:
    """The parts of a function with a docstring; None where they share a line, or cannot be moved left."""
    docstring, first = node.body[0], node.lineno - 1
    own_lines = lines[first:node.end_lineno]
    if any(line[:node.col_offset].strip() for line in own_lines):  # a string of several lines
        return None
    own_lines = [line[node.col_offset:] for line in own_lines]
    start, stop = docstring.lineno - 1 - first, docstring.end_lineno - first
    if len(node.body) == 1 or node.body[1].lineno <= docstring.end_lineno:
        return None
    body = "\n".join(own_lines[stop:]).lstrip("\n")
    return Function("\n".join(own_lines[:start]), "\n".join(own_lines[start:stop]), body,
                    first_sentence(ast.get_docstring(node)))


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, in one line; "" where that is no prose."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = SENTENCE.match(paragraph)
    sentence = sentence.group() if sentence else paragraph
    is_prose = sentence[:1].isalpha() and sentence.count(" ") >= 1 and not re.match(r"[\w.]+\(", sentence)
    return sentence if is_prose and len(sentence) <= 200 else ""


def compiles(source: str) -> bool:
    return compiled(source) is not None


def compiled(source: str, flags: int = 0):
    """What compile() makes of Python source, None where it is not that; with ast.PyCF_ONLY_AST, its tree."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of invalid escapes: the authors' to mend
        warnings.simplefilter("ignore", DeprecationWarning)  # the same, until Python 3.11
        try:
            return compile(source, "<function>", "exec", flags, dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
