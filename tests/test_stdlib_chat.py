"""stdlib_chat.py: pairs from functions, which modules they come from, and what can be checked."""
import ast
import hashlib
import inspect
import json
import os
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import data
import stdlib_chat
from chat import read_conversations
from config import UserError
from stdlib_chat import (DESCRIBE, MAX_REPEATS, WRITE, assemble, compiles, first_sentence, functions, pairs,
                         write_conversations)

SOURCE = '''
class Shelf:
    """No function."""

    @property
    def size(self, unit="cm"):  # of the shelf
        """Return its width. Not its height.

        More of it.
        """

        # in metres
        if unit == "m":
            return self.width / 100
        return self.width

    async def fetch(
            self, book):
        r'Fetch a book, e.g. Emma.'
        return await self.door.open(book)
'''


def made(source, max_chars=1000, seed=0, seen=None):
    seen = set() if seen is None else seen
    return list(pairs([{"text": source, "source": "shelf.py"}], max_chars, seed, seen))


def question(pair):
    return pair["messages"][0]["content"]


def answer(pair):
    return pair["messages"][1]["content"]


# ---- Pairs, by hand ----------------------------------------------------------------------------------------


def test_a_function_makes_two_pairs():
    describe, write, *others = made(SOURCE)
    assert (describe["task"], write["task"], describe["source"]) == ("describe", "write", "shelf.py")
    body = '    # in metres\n    if unit == "m":\n        return self.width / 100\n    return self.width'
    assert describe["code"] == f'def size(self, unit="cm"):  # of the shelf\n{body}'
    assert answer(describe) == "Return its width."
    assert write["code"] == ('def size(self, unit="cm"):  # of the shelf\n'
                             '    """Return its width. Not its height.\n\n    More of it.\n    """')
    assert answer(write) == body
    for pair, phrasings in ((describe, DESCRIBE), (write, WRITE)):
        assert question(pair) in [phrasing.replace("{code}", pair["code"]) for phrasing in phrasings]
    assert [answer(pair) for pair in others] == ["Fetch a book, e.g. Emma.",
                                                 "    return await self.door.open(book)"]


@pytest.mark.parametrize("source", [
    "def f():\n    return 1", "def f():\n    'Only this one.'", "def f(): 'On one line.'; return 1",
    "def f():\n    'Two on a line.'; return 1", "def f():\n    'Does nothing.'\n    pass",
    "def f():\n    'Does nothing.'\n    # to do\n    ...",
    "def f():\n    'Left out.'\n    raise NotImplementedError('x')",
    "class A:\n    def f(self):\n        'A string of lines.'\n        return '''\nfrom the margin on'''",
    "def f():\n    x = 1\n    def g():\n        'Needs its surroundings.'\n        nonlocal x\n        x = 2",
    "def f():\n    b'No docstring here.'\n    return 1", "def f(:\n    'No Python.'\n    return 1", "", "\0",
    "print 'Of Python 2.'\ndef f():\n    'Some function.'\n    return 1"])
def test_what_makes_no_pair(source):
    assert made(source) == []


def test_functions_within_all_kinds_of_blocks_are_found():
    function = "def f{}():\n    'Return the number {}.'\n    return {}\n"
    numbers = iter(range(20))

    def indented(by):
        number = next(numbers)
        return "".join(" " * by + line + "\n" for line in function.format(*[number] * 3).splitlines())

    source = ("try:\n" + indented(4) + "except ImportError:\n" + indented(4) + "else:\n" + indented(4)
              + "finally:\n" + indented(4) + "if x:\n" + indented(4) + "else:\n" + indented(4)
              + "for x in y:\n" + indented(4) + "with x:\n" + indented(4) + "class A:\n" + indented(4)
              + "match x:\n    case 1:\n" + indented(8) + "def g():\n" + indented(4))
    assert [function.summary for function in functions(source, 1000)] == \
        [f"Return the number {number}." for number in range(11)]


@pytest.mark.parametrize("docstring, sentence", [
    ("Return x.", "Return x."), ("Return\n    x.\n\nMore.", "Return x."), ("Return x. Then y.", "Return x."),
    ("Return x, e.g. The one, i.e. That. Then y.", "Return x, e.g. The one, i.e. That."),
    ("Is it x? Yes.", "Is it x?"), ("Return x.y and z", "Return x.y and z"),
    ("Return 1.5 metres.", "Return 1.5 metres."),
    ("Return x", "Return x"), ("f(a, b) -> c\n\nReturn x.", ""), (">>> f(1) is x", ""), ("Deprecated", ""),
    (":param x: a number", ""), ("", ""), ("Return " + 200 * "x", ""), ("Öffne die Tür.", "Öffne die Tür.")])
def test_the_first_sentence_of_a_docstring_where_it_is_prose(docstring, sentence):
    assert first_sentence(inspect.cleandoc(docstring)) == sentence


def test_a_function_without_prose_is_written_but_not_described():
    assert [pair["task"] for pair in made("def f(x):\n    'f(x) -> y'\n    return x + 1")] == ["write"]


def test_the_same_code_is_asked_about_once_and_the_same_answer_given_a_few_times():
    one = "def f(x):\n    'Internal function.'\n    return x + {}\n"
    assert len(made(one.format(1) * 2)) == 2
    seen = set()
    assert len(made(one.format(1), seen=seen)) == 2 and made(one.format(1), seen=seen) == []
    counts = Counter(pair["task"] for pair in made("".join(map(one.format, range(20)))))
    assert counts == {"describe": MAX_REPEATS, "write": 1}, "signature and docstring are the same each time"


def test_question_and_answer_are_no_longer_than_the_bound():
    lengths = [len(question(pair)) + len(answer(pair)) for pair in made(SOURCE)]
    assert len(lengths) == 4
    for bound in (*lengths, *(length - 1 for length in lengths)):
        kept = [len(question(pair)) + len(answer(pair)) for pair in made(SOURCE, max_chars=bound)]
        assert kept == [length for length in lengths if length <= bound]


def test_the_phrasing_is_drawn_from_seed_and_code_alone():
    sources = [SOURCE.replace("width", f"width{number}") for number in range(60)]
    together, alone = made("\n".join(sources)), [pair for source in sources[::-1] for pair in made(source)]
    by_code = {pair["code"]: question(pair) for pair in alone}
    assert all(by_code[pair["code"]] == question(pair) for pair in together)
    others = {pair["code"]: question(pair) for source in sources for pair in made(source, seed=1)}
    assert by_code.keys() == others.keys() and 0 < sum(by_code[code] != others[code] for code in by_code)
    found = Counter(question(pair).replace(pair["code"], "{code}") for pair in together)
    assert found.keys() >= {phrasing for phrasing in DESCRIBE}, "of 60 draws from 6, each is there"


def test_code_and_answer_make_a_function_again_also_where_a_template_has_stripped_the_answer():
    for pair in made(SOURCE):
        if pair["task"] == "write":
            whole = assemble(pair["code"], answer(pair))
            compile(whole, "<answer>", "exec")
            assert compiles(whole) and not compiles(whole + " (") and not compiles(whole + "\0")
            assert assemble(pair["code"], answer(pair).strip()) == whole


# ---- The library -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """What write_conversations writes: {"train", "val"}, read back as any file of conversations."""
    folder = tmp_path_factory.mktemp("default") / "chat"
    write_conversations(folder)
    return {split: list(read_conversations(folder / f"{split}.jsonl")) for split in data.SPLITS}, folder


def test_thousands_of_pairs_and_held_out_ones_from_held_out_modules(library):
    conversations, _ = library
    sources = {}
    for document in data.accepted(data.read_files(data.standard_library()), "skip", {}):
        held_out = data.content_hash(data.clean(document["text"])) < int(data.Settings.val_fraction * 2**128)
        sources[document["source"]] = "val" if held_out else "train"
    for split, found in conversations.items():
        assert {sources[conversation["source"]] for conversation in found} == {split}
        tasks = Counter(conversation["task"] for conversation in found)
        assert min(tasks["describe"], tasks["write"]) > {"train": 2500, "val": 40}[split]
        assert max(sum(len(message["content"]) for message in conversation["messages"])
                   for conversation in found) <= stdlib_chat.MAX_CHARS
    codes = Counter(conversation["code"] for found in conversations.values() for conversation in found)
    assert max(codes.values()) == 1, "the same code is asked about twice, perhaps in both splits"


def test_what_the_pairs_say_is_true_of_the_source(library):
    """Each held-out pair against the library's own file, by another way: ast.unparse and getdoc."""
    conversations, _ = library
    root = Path(sysconfig.get_path("stdlib"))
    by_source = defaultdict(list)
    for conversation in conversations["val"]:
        by_source[conversation["source"]].append(conversation)
    for source, found in by_source.items():
        tree = ast.parse((root / source).read_bytes())
        bodies, summaries = set(), set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
                bodies.add("\n".join(map(ast.unparse, node.body[1:])))
                summaries.add(" ".join(ast.get_docstring(node).split()))
        for conversation in found:
            if conversation["task"] == "describe":
                assert any(summary.startswith(answer(conversation)) for summary in summaries)
                assert answer(conversation) not in conversation["code"]
            else:
                function, = ast.parse(assemble(conversation["code"], answer(conversation))).body
                assert "\n".join(map(ast.unparse, function.body[1:])) in bodies
                assert answer(conversation) not in question(conversation)


def test_every_run_writes_the_same_bytes(library, tmp_path):
    _, folder = library
    command = f"import stdlib_chat; stdlib_chat.write_conversations({str(tmp_path / 'again')!r})"
    folder_of_code = Path(stdlib_chat.__file__).parent
    result = subprocess.run([sys.executable, "-c", command], cwd=folder_of_code, check=True,
                            env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    for split in data.SPLITS:
        first, second = (hashlib.sha256((path / f"{split}.jsonl").read_bytes()).hexdigest()
                         for path in (folder, tmp_path / "again"))
        assert first == second
        lines = len((folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines())
        assert f"{split}.jsonl: {lines:,} conversations of at most {stdlib_chat.MAX_CHARS} characters" \
            in result.stdout


def test_a_folder_that_exists_is_kept(library):
    _, folder = library
    with pytest.raises(UserError, match="exists; pass --overwrite"):
        write_conversations(folder)
    assert json.loads((folder / "val.jsonl").read_text(encoding="utf-8").splitlines()[0])["messages"]
