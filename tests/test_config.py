"""config.py: a dataclass becomes a command line, and every mistake ends in one line."""
from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest

import config
from config import UserError, open_whole, parse, refuse, require, run, show, to_json

ROOT = Path(config.__file__).parent


@dataclass
class Base:
    seed: int = 0  # where randomness starts
    name: str = "a # no comment"  # text with a # inside its default


@dataclass
class Settings(Base):
    lr: float = 3e-4  # peak learning rate; the cosine
                      # decays from here
    # and so on to zero

    # a heading after an empty line belongs to nobody
    betas: tuple[float, float] = (0.9, 0.95)  # decay of AdamW's means
    input: tuple[str, ...] = ()  # files or folders
    sizes: tuple[int, ...] = field(default_factory=lambda: (1, 2))
    seq_len: int | None = None  # window
    out: Optional[str] = None
    kind: Literal["forward", "reverse"] = "forward"  # which KL
    compile: bool = True  # compile the model
    overwrite: bool = False
    bf16: bool | None = None  # none: where it pays
    limit: float = math.inf

    def __post_init__(self):
        require(self, seed=(0, None), lr=(0, 10), betas=(0, 1), seq_len=(2, None))
        lr = self.lr  # a local name, not a field
        assert lr is not None


def refused(capsys, *words, settings=Settings) -> str:
    """The one line on stderr with which these words are refused."""
    with pytest.raises(SystemExit) as stop:
        parse(settings, list(words))
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    return output.err[len("error: "):-1]


@pytest.mark.parametrize("words, name, value", [
    ("--lr 1e-3", "lr", 1e-3), ("--lr=1e-3", "lr", 1e-3), ("--lr -0", "lr", 0.0), ("--lr 1", "lr", 1.0),
    ("--seed 1_000", "seed", 1000), ("--seed 1e6", "seed", 1_000_000),
    (f"--seed {10**30 + 1}", "seed", 10**30 + 1),
    ("--name=--dashes=and=equals", "name", "--dashes=and=equals"), ("--name=", "name", ""),
    ("--name none", "name", "none"),
    ("--betas 0.5,0.6", "betas", (0.5, 0.6)), ("--betas 0.5 0.6", "betas", (0.5, 0.6)),
    ("--betas=0.5,0.6", "betas", (0.5, 0.6)),
    ("--input a b c", "input", ("a", "b", "c")), ("--input a,b", "input", ("a,b",)),
    ("--input=", "input", ()),
    ("--sizes 4,5,6", "sizes", (4, 5, 6)), ("--sizes 7", "sizes", (7,)),
    ("--seq-len 8", "seq_len", 8), ("--seq_len none", "seq_len", None), ("--out None", "out", "None"),
    ("--out none", "out", None), ("--out x", "out", "x"), ("--kind reverse", "kind", "reverse"),
    ("--no-compile", "compile", False), ("--no_compile", "compile", False),
    ("--overwrite", "overwrite", True),
    ("--compile=false", "compile", False), ("--bf16", "bf16", True), ("--no-bf16", "bf16", False),
    ("--bf16 none", "bf16", None),
    ("--lr 1 --lr 2", "lr", 2.0), ("--compile --no-compile", "compile", False),
    ("--limit inf", "limit", math.inf),
])
def test_words_become_values(words, name, value):
    result = getattr(parse(Settings, words.split(" ")), name)
    assert result == value and type(result) is type(value)


def test_without_words_the_defaults_stand():
    assert parse(Settings, []) == Settings()


def test_words_come_from_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "5"])
    assert parse(Settings).seed == 5


@pytest.mark.parametrize("words, message", [
    ("--lr abc", "--lr: 'abc' is not a number"),
    ("--lr nan", "--lr: 'nan' is not a finite number"),
    ("--lr -inf", "--lr: '-inf' is not a finite number"),
    ("--betas 0.9 nan", "--betas: '0.9 nan' is not a finite number"),
    ("--lr", "--lr needs a value: a number"),
    ("--lr --seed 1", "--lr needs a value: a number"),
    ("--lr 1 2", f"unexpected word '2' after --lr 1; {config.USAGE}"),
    ("--seed 1.5", "--seed: '1.5' is not a whole number"),
    ("--seed 15e-1", "--seed: '15e-1' is not a whole number"),
    ("--seed 1e999", "--seed: '1e999' is not a whole number"),
    ("--seed e", "--seed: 'e' is not a whole number"),
    ("--seed none", "--seed: 'none' is not a whole number"),
    ("--seq-len x", "--seq_len: 'x' is not a whole number or none"),
    ("--betas 0.9", "--betas: '0.9' is not 2 values: a number, a number"),
    ("--betas 1 2 3", "--betas: '1 2 3' is not 2 values: a number, a number"),
    ("--sizes 1,b", "--sizes: '1,b' is not any number of values, each a whole number"),
    ("--kind sideways", "--kind: 'sideways' is not one of forward, reverse"),
    ("--overwrite folder", "--overwrite: 'folder' is not true or false"),
    ("--no-compile x", f"unexpected word 'x' after --compile false; {config.USAGE}"),
    ("--learning-rate 1", "unknown flag --learning-rate; --help lists those there are"),
    ("--seq-length 1", "unknown flag --seq-length; did you mean --seq_len?"),
    ("--no-compiel", "unknown flag --no-compiel; did you mean --no_compile?"),
    ("--no-lr", "unknown flag --no-lr; --help lists those there are"),
    ("--inputs a", "unknown flag --inputs; did you mean --input?"),
    ("--se 1", "unknown flag --se; did you mean --seed?"),  # no abbreviations: a new flag would change them
    ("--", "unknown flag --; --help lists those there are"),
    ("text.txt", "unexpected word 'text.txt'; settings are given as --name value, and --help lists them"),
    ("--lr 20", "--lr 20.0 is out of range; it must be 0 to 10"),
    ("--seq_len 1", "--seq_len 1 is out of range; it must be at least 2"),
    ("--betas 0.9 1.5", "--betas 1.5 is out of range; it must be 0 to 1"),
    ("--config", "--config needs a value: a file"),
])
def test_each_mistake_is_one_line(capsys, words, message):
    assert refused(capsys, *words.split(" ")) == message


def test_a_setting_without_default_must_be_given(capsys):
    @dataclass
    class Needs:
        data: str
        steps: int = 3
    assert refused(capsys, settings=Needs) == "--data is missing; it is text"
    assert parse(Needs, ["--data", "x"]) == Needs("x")


def test_require_names_flag_value_and_bound():
    class Given:
        batch_size, share, decay, rate = 0, math.nan, "cosin", None
    with pytest.raises(UserError, match=r"^--batch_size 0 is out of range; it must be at least 1$"):
        require(Given, batch_size=(1, None))
    with pytest.raises(UserError, match=r"^--batch_size 0 is out of range; it must be at most -1$"):
        require(Given, batch_size=(None, -1))
    with pytest.raises(UserError, match="--share nan is out of range"):
        require(Given, share=(0, None))
    with pytest.raises(UserError, match=r"^--decay cosin is not one of cosine, linear$"):
        require(Given, decay={"linear", "cosine"})
    require(Given, rate=(0, 1), batch_size=(0, 0))


# --config


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "my settings 设置.json"
    content = '{"lr": 1, "seed": 2e1, "betas": [0, 0.5], "out": null, "bf16": true, "kind": "reverse"}'
    path.write_text("\ufeff" + content, encoding="utf-8")  # \ufeff: as Windows' Notepad writes it
    settings = parse(Settings, ["--seed", "7", "--config", str(path)])
    assert settings == Settings(lr=1.0, seed=7, betas=(0.0, 0.5), bf16=True, kind="reverse")
    assert type(settings.lr) is float and type(parse(Settings, ["--config", str(path)]).seed) is int


@pytest.mark.parametrize("content, message", [
    ('{"lr": "abc"}', "lr: 'abc' is not a number"),
    ('{"lr": "1"}', "lr: '1' is not a number"),
    ('{"lr": true}', "lr: True is not a number"),
    ('{"lr": NaN}', "lr: nan is not a finite number"),
    ('{"lr": %s}' % 10**400, " is not a number"),
    ('{"seed": 1.5}', "seed: 1.5 is not a whole number"),
    ('{"seed": null}', "seed: None is not a whole number"),
    ('{"seed": true}', "seed: True is not a whole number"),
    ('{"compile": 1}', "compile: 1 is not true or false"),
    ('{"betas": 0.9}', "betas: 0.9 is not 2 values: a number, a number"),
    ('{"betas": [0.9]}', "betas: [0.9] is not 2 values: a number, a number"),
    ('{"input": [1]}', "input: [1] is not any number of values, each text"),
    ('{"kind": []}', "kind: [] is not one of forward, reverse"),
    ('{"sed": 1}', "unknown setting 'sed'; did you mean --seed?"),
    ('{"lr": 30}', "--lr 30.0 is out of range; it must be 0 to 10"),
    ('[1]', 'must hold one object, {"name": value, …}'),
    ('{"lr": 1', "is not JSON: Expecting ',' delimiter: line 1 column 9 (char 8)"),
    ("[" * 100_000, "is not JSON: "),
])
def test_a_bad_config_file_is_one_line(capsys, tmp_path, content, message):
    path = tmp_path / "c.json"
    path.write_text(content, encoding="utf-8")
    line = refused(capsys, "--config", str(path))
    assert message in line
    assert "out of range" in line or line.startswith(f"--config {path}"), "which file is wrong?"


def test_a_config_file_that_is_not_there_or_not_text_is_one_line(capsys, tmp_path):
    line = refused(capsys, "--config", str(tmp_path / "none.json"))
    assert line == f"--config {tmp_path / 'none.json'}: No such file or directory"
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    assert "is not JSON: " in refused(capsys, "--config", str(tmp_path / "b.json"))


def test_settings_written_as_json_are_read_back_equal(tmp_path):
    settings = Settings(lr=1 / 3, out="文件 夹", betas=(0.1, 0.2), input=("a b", "c,d"), sizes=())
    (tmp_path / "s.json").write_text(to_json(settings), encoding="utf-8")
    assert parse(Settings, ["--config", str(tmp_path / "s.json")]) == settings
    names = list(json.loads(to_json(settings)))
    assert names[:2] == ["lr", "betas"] and names[-2:] == ["seed", "name"], "what is inherited comes last"


def test_the_defaults_as_help_shows_them_can_be_typed():
    for setting in config.settings_of(Settings).values():
        if setting.default is not None and not isinstance(setting.default, str):
            words = config.as_text(setting.default).replace("''", "").split(" ")
            assert config.from_words(words, setting.kind) == setting.default


# --help and show


def test_help_lists_each_setting_with_type_default_and_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Settings, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.startswith("config.py: a dataclass becomes a command line"), "the script's own docstring"
    lines = text.splitlines()

    def below(line):
        return lines[lines.index(line) + 1].strip()
    assert below("  --seed: a whole number (default 0)") == "where randomness starts", "an inherited comment"
    assert below("  --name: text (default 'a # no comment')") == "text with a # inside its default"
    assert below("  --lr: a number (default 0.0003)") == \
        "peak learning rate; the cosine decays from here and so on to zero"
    assert below("  --betas: 2 values: a number, a number (default 0.9 0.95)") == "decay of AdamW's means"
    assert below("  --seq_len: a whole number or none (default none)") == "window"
    assert below("  --compile / --no-compile: true or false (default true)") == "compile the model"
    assert "belongs to nobody" not in text and "a local name" not in text


def test_help_wins_over_other_mistakes_after_it_and_h_is_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Settings, ["--lr", "-h"])
    assert stop.value.code == 2, "--lr has no value"
    with pytest.raises(SystemExit) as stop:
        parse(Settings, ["-h"])
    assert stop.value.code == 0


def test_comments_of_a_class_inside_a_function_are_found():
    def make():
        @dataclass
        class Inner:
            """Has a docstring
with a line at the margin, and a word: # not a comment."""
            a: tuple[int, ...] = (  # one
                1,  # two
            )
            b: str = """
            c: int = 0  # not a field
            """  # three
        return Inner
    assert config.comments(make()) == {"a": "one two", "b": "three"}


SCRIPT = """'''A script.'''
from dataclasses import dataclass
import config
@dataclass
class Settings:
    text: str = 'ok'  # größer → 大
config.run(lambda: config.show(config.parse(Settings)))
"""


def python(*words, **env):
    return subprocess.run([sys.executable, *words], capture_output=True, cwd=ROOT, env={**os.environ, **env})


def test_help_works_without_source():
    result = python("-c", SCRIPT, "--help")
    assert result.returncode == 0 and b"--text: text (default ok)" in result.stdout and not result.stderr


def test_any_character_can_be_printed_on_any_console(tmp_path):
    (tmp_path / "s.py").write_text(SCRIPT, encoding="utf-8")
    plain = {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT),
             "LC_ALL": "C.UTF-8"}  # of what it is told; what it prints is ASCII
    result = python(tmp_path / "s.py", "--help", **plain)
    assert result.returncode == 0 and rb"gr\xf6\xdfer \u2192 \u5927" in result.stdout
    result = python(tmp_path / "s.py", "--text", "大 x", **plain)
    assert result.returncode == 0 and b"settings: *text='\\u5927 x'" in result.stdout
    assert python(tmp_path / "s.py", "--大", **plain).stderr.startswith(b"error: unknown flag --")


def test_show_prints_each_setting_once_and_marks_what_was_changed(capsys):
    show(parse(Settings, ["--lr", "0.1", "--out", "a long name " * 12, "--no-compile"]))
    text = capsys.readouterr().out
    assert "*lr=0.1" in text and "*compile=false" in text and " seed=0" in text and "*seed" not in text
    assert "a long name " * 11 in text, "a value was broken over two lines"
    assert all(text.count(f"{name}=") == 1 for name in config.settings_of(Settings))


def test_a_setting_of_an_unsupported_type_is_the_programmers_mistake():
    @dataclass
    class Nested:
        more: dict[str, int] = None
    with pytest.raises(AssertionError, match="a setting cannot be"):
        parse(Nested, [])


# run


@pytest.mark.parametrize("error, code, line", [
    (UserError("--lr is wrong"), 2, "error: --lr is wrong\n"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a b.txt"), 2, "error: a b.txt: No such file\n"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device\n"),
    (OSError("odd"), 2, "error: odd\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_run_ends_in_one_line(capsys, error, code, line):
    def main():
        raise error
    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == code and capsys.readouterr().err == line


def test_run_lets_bugs_show_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    with pytest.raises(ValueError):  # UserError is a ValueError, not the other way round
        run(lambda: int("x"))


def test_a_setting_that_would_do_nothing_is_refused():
    @dataclass
    class Settings:
        model: str | None = None
        overwrite: bool = False
        phases: tuple[str, ...] = ("a b",)

        def __post_init__(self):
            if self.model:
                refuse(self, "is written, not read", "overwrite", "phases")

    for words, shown in ((["--overwrite"], "--overwrite"), (["--phases", "c", "d"], "--phases c d")):
        assert parse(Settings, words).model is None
        with pytest.raises(UserError, match=f"^{shown} is written, not read; leave it out$"):
            Settings(**{**vars(parse(Settings, words)), "model": "m"})
    assert parse(Settings, ["--model", "m", "--phases", "a b"]).model == "m", "the default is no wish"


@pytest.mark.skipif(os.name == "nt", reason="needs a shell with pipes")
def test_a_reader_that_went_away_leaves_one_line():
    script = "import config; config.run(lambda: print('x' * 10_000_000))"
    command = f'"{sys.executable}" -c "{script}" | true'
    result = subprocess.run(command, shell=True, capture_output=True, cwd=ROOT)
    assert result.stderr == b"error: Broken pipe\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a shell that closes a stream")
def test_a_mistake_is_told_although_nobody_opened_an_output():
    script = "import config; config.run(lambda: config.require(config, USAGE=set()))"
    command = f'"{sys.executable}" -c "{script}" >&-'
    result = subprocess.run(command, shell=True, stderr=subprocess.PIPE, cwd=ROOT)
    assert result.returncode == 2 and result.stderr.count(b"\n") == 1, "sys.stdout is None then"


# open_whole


def test_a_file_is_whole_or_what_it_was(tmp_path):
    path = tmp_path / "文 件.txt"
    with open_whole(path, "w") as file:
        file.write("größer\n")
    assert path.read_bytes() == "größer\n".encode()
    with pytest.raises(ZeroDivisionError), open_whole(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == "größer\n".encode() and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, name):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError) as error, open_whole(path) as file:
        file.write(b"new")
    assert error.value.filename == str(path) and error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.bin"]


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), open_whole(tmp_path / "nowhere" / "x"):
        pass
