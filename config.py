"""Settings: a dataclass becomes a command line.

A setting is one line of a dataclass. Its name is the flag, its type checks the value, its trailing comment is
the --help:

    @dataclass
    class Settings:
        lr: float = 3e-4  # peak learning rate
        betas: tuple[float, float] = (0.9, 0.95)  # decay of AdamW's two running means
        compile: bool = True  # compile the model where that pays

    settings = parse(Settings)      # python train.py --lr 1e-3 --betas 0.9 0.99 --no-compile

Unlike with argparse nothing is said twice, and each mistake ends in one line that names the flag, the value
and the remedy. Below, what every script needs: `run`, the frame around its main(), `open_whole`, a file that
is whole or absent, and `file_checksum`.
"""
import contextlib
import dataclasses
import difflib
import errno
import hashlib
import inspect
import io
import json
import math
import os
import sys
import textwrap
import tokenize
import types
import typing
from pathlib import Path


class UserError(ValueError):
    """A user's mistake, told in one line: what, the value, the bound, the remedy."""


def parse(Settings, argv=None):
    """A Settings from the command line: defaults, then the file of --config, then the flags; the last wins.

    argv: list of words, default sys.argv[1:]. `--name value`, `--name=value`, `--flag`, `--no-flag`; dashes
    in names equal underscores; a tuple takes several words, or numbers joined by commas; `none` is None where
    the type allows None. On a mistake (a UserError of Settings.__post_init__ too) prints `error: …` to stderr
    and exits with code 2.
    """
    print_any_character()
    try:
        known = settings_of(Settings)
        given = command_line(sys.argv[1:] if argv is None else argv, known)
        if "help" in given:
            print(help_text(Settings, known))
            raise SystemExit(0)
        values = config_file(given.pop("config")[-1], known) if "config" in given else {}
        for name, words in given.items():
            values[name] = checked(from_words, words, known[name], f"--{name}: {' '.join(words)!r}")
        for name, setting in known.items():
            if name not in values and setting.default is dataclasses.MISSING:
                raise UserError(f"--{name} is missing; it is {setting.words}")
        return Settings(**values)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def require(settings, **bounds):
    """Raise UserError where a setting is out of its bounds: for __post_init__.

    bounds: name=(low, high), both inclusive, None where open; or name={"a", "b"}, the values allowed.
    A setting that is None passes; a tuple's values are checked one by one.
    """
    for name, bound in bounds.items():
        value = getattr(settings, name)
        for item in value if isinstance(value, tuple) else (value,):
            if item is None:
                continue
            if not isinstance(bound, tuple):
                if item not in bound:
                    raise UserError(f"--{name} {item} is not one of {', '.join(map(str, sorted(bound)))}")
                continue
            low, high = bound
            inside = (low is None or item >= low) and (high is None or item <= high)
            if not inside:  # nan too
                allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else \
                    f"{low} to {high}"
                raise UserError(f"--{name} {item} is out of range; it must be {allowed}")


def refuse(settings, why, *names):
    """Raise UserError, "--name value <why>; leave it out", where one of these settings is not its default.

    A setting that is on or off stands there as it is typed: --name or --no-name.

    For __post_init__, where other settings make these void: what would do nothing is not what was meant.
    """
    known = settings_of(type(settings))
    for name in names:
        value = getattr(settings, name)
        if value != known[name].default:
            flag = f"--{name} {as_text(value)}"
            if isinstance(value, bool):
                flag = f"--{name}" if value else f"--no-{name}"
            raise UserError(f"{flag} {why}; leave it out")


def show(settings):
    """Print the settings in effect; a star marks those that differ from their defaults."""
    items = []
    for name, setting in settings_of(type(settings)).items():
        value = getattr(settings, name)
        items.append(f"{'' if value == setting.default else '*'}{name}={as_text(value)}".replace(" ", "\0"))
    lines = textwrap.fill("  ".join(items), 110, initial_indent="settings: ", subsequent_indent="  ",
                          break_long_words=False, break_on_hyphens=False)
    print(lines.replace("\0", " "))  # \0: so that a value with a space in it stays on one line


def to_json(settings) -> str:
    """The settings as JSON, one a line: what --config reads back."""
    values = {name: getattr(settings, name) for name in settings_of(type(settings))}
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------------------------------------------------
# The command line, and the file of --config


USAGE = "settings are given as --name value, and --help lists them"


class Setting(typing.NamedTuple):
    kind: object  # int, float, str, bool, Literal[...] or tuple[...] of these
    optional: bool  # may it be None
    words: str  # the type in words, as they follow "it is": for --help and for errors
    default: object  # dataclasses.MISSING where there is none


def settings_of(Settings) -> dict[str, Setting]:
    """{name: Setting} of a dataclass, in its order; what it inherits comes last."""
    known, inherited = {}, [field.name for base in Settings.__mro__[1:] for field in
                            getattr(base, "__dataclass_fields__", {}).values()]
    hints = typing.get_type_hints(Settings)  # types, even if `from __future__ import annotations` left text
    for field in sorted(dataclasses.fields(Settings), key=lambda field: field.name in inherited):
        kind, args = hints[field.name], typing.get_args(hints[field.name])
        union = typing.get_origin(kind) in (typing.Union, types.UnionType)
        optional = union and type(None) in args and len(args) == 2
        kind = next(arg for arg in args if arg is not type(None)) if optional else kind
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.init:
            known[field.name] = Setting(kind, optional, describe(kind) + " or none" * optional, default)
    return known


def command_line(argv, known) -> dict[str, list[str]]:
    """{name: the words after its flag}. A flag that is given twice counts once, the last time."""
    given, name, switches_off = {}, None, negatives(known)
    for word in argv:
        if word == "-h" or word.startswith("--"):
            flag, equals, value = word.partition("=")
            name, words = "help" if word == "-h" else flag[2:].replace("-", "_"), [value] if equals else []
            if name in switches_off and name not in known:
                name, words = name[3:], ["false", *words]
            elif name not in known and name not in ("config", "help"):
                raise UserError(f"unknown flag {flag}; {nearest(name, known)}")
            given[name] = words
        elif name is None:
            raise UserError(f"unexpected word {word!r}; {USAGE}")
        else:
            given[name].append(word)
    for name, words in given.items():
        setting = known.get(name, Setting(str, False, "a file", None))  # --config and --help
        if not words and setting.kind is bool:
            words.append("true")
        elif not words and name != "help":
            raise UserError(f"--{name} needs a value: {setting.words}")
        elif len(words) > 1 and not is_tuple(setting.kind):
            raise UserError(f"unexpected word {words[1]!r} after --{name} {words[0]}; {USAGE}")
    return given


def negatives(known) -> list[str]:
    return [f"no_{name}" for name, setting in known.items() if setting.kind is bool]


def nearest(name, known) -> str:
    close = difflib.get_close_matches(name, ["config", "help", *known, *negatives(known)], n=1)
    return f"did you mean --{close[0]}?" if close else "--help lists those there are"


def config_file(path, known) -> dict:
    """The values in a JSON file, checked as those of the command line are."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # -sig: Windows puts a mark in front
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f'--config {path} must hold one object, {{"name": value, …}}')
    for name in content:
        if name not in known:
            raise UserError(f"--config {path}: unknown setting {name!r}; {nearest(name, known)}")
    return {name: checked(from_json, value, known[name], f"--config {path}: {name}: {value!r}")
            for name, value in content.items()}


# ------------------------------------------------------------------------------------------------------------
# Types: what was typed, or stood in the file, becomes a value


def checked(convert, given, setting, where):
    """The value of a setting; UserError, which begins with `where`, if it is not of the setting's type."""
    if setting.optional and (given is None or given == ["none"]):
        return None
    try:
        value = convert(given, setting.kind)
    except (ValueError, LookupError, OverflowError):
        raise UserError(f"{where} is not {setting.words}") from None
    if not is_finite(value) and is_finite(setting.default):  # nan would pass any later `if lr < 0`
        raise UserError(f"{where} is not a finite number")
    return value


def from_words(words: list[str], kind):
    """The value that words of the command line stand for; ValueError or LookupError if not of this kind."""
    args = typing.get_args(kind)
    if is_tuple(kind):
        if len(words) == 1 and args[0] is not str:  # text is not split: the name of a file may hold a comma
            words = words[0].split(",")
        words = [] if words == [""] else words
        pairs = zip(words, item_kinds(args, len(words)), strict=True)
        return tuple(from_words([word], item_kind) for word, item_kind in pairs)
    word = words[0]
    if typing.get_origin(kind) is typing.Literal:
        return {str(choice): choice for choice in args}[word]
    if kind is bool:
        return {"true": True, "false": False}[word.lower()]
    if kind is int and "e" in word.lower():  # 1e6
        return whole(float(word))
    return kind(word)


def from_json(value, kind):
    """The value from JSON, whose lists become tuples; ValueError where it is not of this kind."""
    args = typing.get_args(kind)
    if is_tuple(kind) and isinstance(value, list):
        pairs = zip(value, item_kinds(args, len(value)), strict=True)
        return tuple(from_json(item, item_kind) for item, item_kind in pairs)
    if typing.get_origin(kind) is typing.Literal:
        return args[args.index(value)]
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float:
        return whole(value)
    if type(value) is not kind:  # type(), as a bool is an int to isinstance()
        raise ValueError
    return value


def whole(number: float) -> int:
    if not number.is_integer():
        raise ValueError
    return int(number)


def item_kinds(args, count: int):
    """The kinds of `count` values of a tuple[*args]."""
    return args[:1] * count if args[-1] is ... else args


def is_tuple(kind) -> bool:
    return typing.get_origin(kind) is tuple


def is_finite(value) -> bool:
    items = value if isinstance(value, tuple) else (value,)
    return all(math.isfinite(item) for item in items if isinstance(item, float))


def describe(kind) -> str:
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, args))}"
    if is_tuple(kind) and args[-1] is ...:
        return f"any number of values, each {describe(args[0])}"
    if is_tuple(kind):
        return f"{len(args)} values: {', '.join(map(describe, args))}"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    assert kind in words, f"a setting cannot be {kind}; use int, float, str, bool, Literal, tuple, x | None"
    return words[kind]


# ------------------------------------------------------------------------------------------------------------
# Help: the comments are read from the source


def help_text(Settings, known) -> str:
    about = (inspect.getdoc(inspect.getmodule(Settings)) or "").partition("\n\n")[0].replace("\n", " ")
    lines = [about, "", "--name value sets one, --config file.json reads a file of them, --help prints this"]
    texts = comments(Settings)
    for name, setting in known.items():
        flag = f"--{name}" + f" / --no-{name}" * (setting.kind is bool)
        required = setting.default is dataclasses.MISSING
        default = "required" if required else f"default {as_text(setting.default)}"
        lines += ["", f"  {flag}: {setting.words} ({default})"]
        lines += textwrap.wrap(texts.get(name, ""), 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines).strip()


def as_text(value) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return " ".join(map(as_text, value)) or "''"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return repr(text) if not text or " " in text else text


def comments(Settings) -> dict[str, str]:
    """{field: its trailing comment, with the comment lines directly below it}, inherited fields included.

    Tokens are read, not lines: a # inside a string is no comment. Where there is no source (python -c): {}.
    """
    found = {}
    for owner in reversed(Settings.__mro__):
        try:
            source = inspect.getsource(owner)
            tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        except (OSError, TypeError, SyntaxError, tokenize.TokenError):
            continue
        body = 1 + source[0].isspace()  # depth of the fields; a class in a function is indented as a whole
        depth, statement, field = 0, [], None
        for token in tokens:
            if token.type in (tokenize.INDENT, tokenize.DEDENT):
                depth += 1 if token.type == tokenize.INDENT else -1
            elif token.type == tokenize.COMMENT and field is not None:
                found[field].append(token.string.lstrip("#").strip())
            elif token.type == tokenize.NEWLINE:
                statement = []
            elif token.type == tokenize.NL and not token.line.strip():
                field = None  # an empty line: comments from here on are not about this field
            elif token.type not in (tokenize.COMMENT, tokenize.NL):
                statement.append(token.string)
                if len(statement) == 1:
                    field = None
                elif len(statement) == 2 and statement[1] == ":" and depth == body:
                    field = statement[0]
                    found[field] = []
    return {name: " ".join(lines) for name, lines in found.items()}


# ------------------------------------------------------------------------------------------------------------
# What every script needs


def run(main):
    """Call main(); a mistake, a missing file, a full disk end in one line and code 2, Ctrl-C in 130."""
    print_any_character()
    try:
        main()
        flush_output()
        return
    except UserError as error:
        message, code = f"error: {error}", 2
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        message, code = f"error: {where}{error.strerror or error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print(message, file=sys.stderr)
    try:
        flush_output()
    except OSError:  # nobody reads our output any more (`| head`): keep Python from saying so once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(code)


def flush_output():
    if sys.stdout is not None:  # closed by whoever started us
        sys.stdout.flush()


def print_any_character():
    """Let a console that lacks a character (Windows' code pages, LANG=C) print its escape, not fail."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def open_whole(path, mode="wb"):
    """A file to write that appears at `path` whole or not at all, in place of what was there.

    Written beside it as <path>.tmp, flushed to the disk, renamed: a rename is atomic, a write is not.
    mode: "wb" or "w" (UTF-8, "\\n" on every system). On any error what stood at `path` is untouched.
    Raises OSError; a full disk's names the file.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno:  # write() does not say
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def file_checksum(path) -> str:
    """The SHA-256 of a file, in hexadecimal; it is read a piece at a time."""
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            checksum.update(block)
    return checksum.hexdigest()


def sync_folder(folder):
    """Make renames in this folder survive a power cut, where the system can; Windows cannot open a folder."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not know it
            raise
    finally:
        os.close(handle)
