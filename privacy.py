"""Personal data in a text becomes a placeholder; a document that holds much of it is to be dropped.

    >>> redact_pii("Ask ann@mail.org or call +44 20 7946 0958 (version 1.2.3.4).")
    ('Ask [EMAIL_ADDRESS] or call [PHONE_NUMBER] (version 1.2.3.4).', {'EMAIL_ADDRESS': 1, 'PHONE_NUMBER': 1})

    python privacy.py                    # precision and recall by kind, on the labelled lines of tests/
    python privacy.py --input my_texts/  # what there is in a corpus, by kind

Addresses of e-mail, IPv4 and IPv6 (those that Python's `ipaddress` accepts), telephone numbers
(international, North American, Chinese; others behind a word such as "tel."), Chinese identity numbers by
their checksum, and keys to services. Up to five in a document are replaced, six or more drop it: a list of
people is no text to learn from (Dolma's rule: Soldaini et al. 2024, https://arxiv.org/abs/2402.00159, section
3). About 25 MB/s on one core. Not found: names, street addresses, "ann at mail dot org".

What shapes alone cannot tell, the surroundings do: 1.2.3.4 is a version behind the word, x[::2] a slice. Each
detector below is a pattern that is cheap to search, and a test of what it found.
"""
import datetime
import ipaddress
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import config
from documents import corpus

MOST = 5  # finds in a document that is kept


def redact_pii(text: str, reserved: bool = True) -> tuple[str, dict[str, int]]:
    """(the text with a placeholder for each find, {kind: how many}); the dict is empty where nothing was
    found.

    reserved: replace also what belongs to nobody: private and loopback networks, example.com, 555-01xx. False
    spares them, as in source code, which is full of them. Doing it twice equals doing it once: a placeholder
    can bare what stood beside a find, so the search goes on until it finds nothing.
    """
    counts = Counter()
    while found := find_pii(text, reserved):
        parts, end = [], 0
        for start, stop, kind in found:
            parts += [text[end:start], f"[{kind}]"]
            end = stop
            counts[kind] += 1
        text = "".join(parts) + text[end:]
    return text, dict(counts)


def pii_problem(counts: Mapping[str, int], most: int = MOST) -> str | None:
    """The reason to drop a document with these counts of redact_pii, None where it stays."""
    total = sum(counts.values())
    return f"pii: {total:,} found, at most {most:,}" if total > most else None


def find_pii(text: str, reserved: bool = True) -> list[tuple[int, int, str]]:
    """The finds as (start, end, kind), in order. Of two that overlap one counts: the earlier, or the
    longer."""
    found = sorted((start, -end, kind) for detect in (keys, emails, numbers, ipv6)
                   for start, end, kind in detect(text, reserved))
    kept, reached = [], 0
    for start, end, kind in found:
        if start >= reached:
            kept.append((start, -end, kind))
            reached = -end
    return kept


def before(text: str, position: int, width: int = 40) -> str:
    """Up to `width` characters of the same line before a position."""
    return text[max(0, position - width):position].rpartition("\n")[2]


# ---- 1. E-mail ---------------------------------------------------------------------------------------------
# Found from the @ outwards: a pattern that began with the name would be tried at each word of the text.

LOCAL_PART = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._%+\-]*\Z")
DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}([A-Za-z]{2,24})"
                    r"(?![A-Za-z0-9_])")
# Beside those of countries, which have two letters. A list, as x@self.weight and icon@2x.png are no addresses
TOP_LEVEL = set("com org net edu gov mil int info biz name pro mobi tel asia cat jobs aero museum coop "
                "travel app dev xyz online site tech store blog cloud shop club top wang vip work group "
                "email company agency digital media news studio design world today live life space website "
                "solutions systems services software science health care law bank berlin london tokyo "
                "example test invalid localhost local".split())
CODE_ENDINGS = {"py", "js", "ts", "go", "gz"}  # of files; .py and .gz are no country, the others nearly none
RESERVED_DOMAIN = re.compile(r"(?:.*\.)?(?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost|local)",
                             re.IGNORECASE)


def emails(text: str, reserved: bool) -> Iterator[tuple[int, int, str]]:
    at = text.find("@")
    while at >= 0:
        local = LOCAL_PART.search(text, max(0, at - 64), at)
        domain = DOMAIN.match(text, at + 1) if local else None
        if domain:
            top = domain[1].lower()
            is_known = (len(top) == 2 and top not in CODE_ENDINGS) or top in TOP_LEVEL
            is_login = local[0] == "git" and text[domain.end():domain.end() + 1] in (":", "/")  # to a path
            if is_known and not is_login and (reserved or not RESERVED_DOMAIN.fullmatch(domain[0])):
                yield local.start(), domain.end(), "EMAIL_ADDRESS"
        at = text.find("@", at + 1)


# ---- 2. What is made of digits -----------------------------------------------------------------------------
# Most text has few, so clusters are found first: four digits or more, at most two signs apart.

CLUSTER = re.compile(r"\d(?:[ .()（）/\-]{0,2}\d){3,}")


def numbers(text: str, reserved: bool) -> Iterator[tuple[int, int, str]]:
    for cluster in CLUSTER.finditer(text):
        size, window = len(digits(cluster[0])), (max(0, cluster.start() - 2), cluster.end() + 2)
        if cluster[0].count(".") >= 3:
            yield from (match.span() + ("IP_ADDRESS",) for match in IPV4.finditer(text, *window)
                        if is_address(match[0], reserved) and not is_numbering(before(text, match.start())))
        if size >= 17:
            yield from (match.span() + ("ID_NUMBER",) for match in IDENTITY.finditer(text, *window)
                        if is_identity_number(match[0]))
        if size >= 7:
            yield from (match.span() + ("PHONE_NUMBER",) for match in phones(text, *window)
                        if reserved or not FICTION.fullmatch(digits(match[0])))


def digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


# ---- 3. IP addresses ---------------------------------------------------------------------------------------

IPV4 = re.compile(r"(?<![A-Za-z0-9_.])(?<![=~<>^]=)(?<![A-Za-z][/\-])\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}"
                  r"(?![A-Za-z0-9_]|\.\d|-[A-Za-z])")
NUMBERED = re.compile(r"(?<![A-Za-z])(?:versions?|ver|v|release[ds]?|rev|revision|builds?"
                      r"|firmware|driver|update|upgraded?"
                      r"|sections?|sect?|chapter|clause|article|paragraph|appendix|figure|table|step|oid|rule"
                      r")(?![A-Za-z])|[§版章节節条第]", re.IGNORECASE)
NETWORK = re.compile(r"(?<![A-Za-z])(?:ip|ipv4|address|addr|host|server|dns|gateway|router|subnet|proxy"
                     r"|network|ping"
                     r"|connect(?:ed|s)?|bound|listen(?:ing|s)?|at)(?![A-Za-z])|地址|服务器", re.IGNORECASE)


def is_numbering(context: str) -> bool:
    """Whether what stands before four numbers makes them a version or a section: the nearer word decides."""
    numbered = [match.end() for match in NUMBERED.finditer(context)]
    return bool(numbered) and not NETWORK.search(context, numbered[-1])


def is_address(text: str, reserved: bool) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return reserved or address.is_global


GROUP = re.compile(r":[0-9A-Fa-f]{0,4}:")  # each IPv6 address holds this, and little else does
RUN = re.compile(r"[0-9A-Fa-f:.]+")
ZONE = re.compile(r"%[A-Za-z0-9]{1,15}")
SHORT = re.compile(r"\d{0,2}::\d{0,2}")  # 1::2 is a slice, or nearly always


def ipv6(text: str, reserved: bool) -> Iterator[tuple[int, int, str]]:
    reached = 0
    for group in GROUP.finditer(text):
        if group.start() < reached:
            continue
        start = group.start()
        while start > reached and text[start - 1] in "0123456789abcdefABCDEF":
            start -= 1
        run = RUN.match(text, start)
        reached = run.end()
        found = run[0].rstrip(".")
        if found.endswith(":") and not found.endswith("::"):
            found = found[:-1]
        end = start + len(found)
        outside = text[max(0, start - 2):start], text[end:end + 1]
        is_slice = outside[0].endswith("[") and re.match(r"[\w)\]]", outside[0])
        is_part = re.match(r"[A-Za-z0-9_]", outside[1]) or re.search(r"[A-Za-z0-9_.]$", outside[0])
        is_plain = any(map(str.isdigit, found)) and (found == "::1" or not SHORT.fullmatch(found))
        if is_plain and not is_part and not is_slice and is_address(found, reserved):
            zone = ZONE.match(text, end)
            yield start, zone.end() if zone else end, "IP_ADDRESS"


# ---- 4. Telephone numbers ----------------------------------------------------------------------------------

EDGE, END = r"(?<![A-Za-z0-9_.+\-/])", r"(?![A-Za-z0-9_]|[.\-]\d)"
COUNTRY = (r"(?:1(?=[ .()/\-]{0,2}[2-9])|7|2(?:0|7|1[1-8]|[2-6]\d|9[0179])|3(?:[0-469]|[578]\d)"
           r"|4(?:[013-9]|2[013])|5(?:[1-8]|[09]\d)|6(?:[0-6]|[789]\d)|8(?:[1246]|[05789]\d)"
           r"|9(?:[0-58]|[679]\d))")  # of ITU-T E.164
INTERNATIONAL = re.compile(rf"(?<![A-Za-z0-9_.)\]])\+{COUNTRY}(?:[ .()/\-]{{0,2}}\d){{6,12}}{END}")
NORTH_AMERICAN = re.compile(
    rf"{EDGE}(?:1[ \-.])?(?:\([1-9]\d\d\)[ \-]?\d{{3}}[ \-.]\d{{4}}|[1-9]\d\d-\d{{3}}-\d{{4}}"
    rf"|[2-9]\d\d\.[2-9]\d\d\.\d{{4}}){END}")
CHINESE_MOBILE = re.compile(rf"{EDGE}(?:86[ \-]?)?1[3-9]\d(?:\d{{8}}|([ \-])\d{{4}}\1\d{{4}}){END}")
CHINESE_LANDLINE = re.compile(rf"{EDGE}(?:\(0\d{{2,3}}\) ?|（0\d{{2,3}}）|0\d{{2,3}}-)[1-9]\d{{6,7}}"
                              rf"(?:-\d{{1,4}})?{END}")
BEHIND_WORD = re.compile(rf"{EDGE}\(?\d(?:[ .()/\-]{{0,2}}\d){{5,13}}{END}")
PHONE_WORD = re.compile(r"(?:(?<![A-Za-z])(?:tele?|phone|telephone|mobile|cell|fax|hotline|whatsapp|call|dial"
                        r"|ring|sms|text)(?: (?:me|us|him|her|number|no|is|at|on|now|today)){0,3}"
                        r"|电话|電話|手机|手機|传真|热线|联系方式"
                        r"|致电|拨打)(?:号码?)?[\s.:：=(（]{0,3}(?:是|为)?$", re.IGNORECASE)
NOT_PHONE = re.compile(r"(?<![A-Za-z])(?:isbn|issn|doi|order|invoice|id|serial|sku|part|model)"
                       r"[\w\- ]{0,8}[\s:#.]{0,3}$"
                       r"|[\d,]\s?[-*/^=]\s?$", re.IGNORECASE)
FICTION = re.compile(r"(?:1?\d{3})?55501\d\d")  # the North American numbers kept for films


def phones(text: str, start: int, end: int) -> Iterator[re.Match]:
    """Yield the telephone numbers between two positions of the text."""
    yield from (match for match in INTERNATIONAL.finditer(text, start, end) if is_international(match[0]))
    for pattern in (NORTH_AMERICAN, CHINESE_MOBILE, CHINESE_LANDLINE):
        for match in pattern.finditer(text, start, end):
            is_round = match[0].endswith("00000000")  # thirteen billion
            if not is_round and not NOT_PHONE.search(before(text, match.start(), 24)):
                yield match
    for match in BEHIND_WORD.finditer(text, start, end):
        if 7 <= len(digits(match[0])) <= 13 and PHONE_WORD.search(before(text, match.start(), 32)):
            yield match


def is_international(text: str) -> bool:
    """Whether + and digits are as long as numbers of that country; unparted ones need ten: x = +12345678."""
    number = digits(text)
    if number[0] == "1":
        return len(number) == 11
    if number.startswith("86"):
        return len(number) in (12, 13) and (len(number) == 12 or number[2] == "1")
    return len(number) >= (10 if text[1:].isdigit() else 8)


# ---- 5. Chinese identity numbers ---------------------------------------------------------------------------

IDENTITY = re.compile(r"(?<![A-Za-z0-9])[1-8]\d{5}(?:19|20)\d\d[01]\d[0-3]\d{4}[\dXx](?![A-Za-z0-9])")
PROVINCES = {*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55), *range(61, 66),
             71, 81, 82, 83}
WEIGHTS = [pow(2, 17 - i, 11) for i in range(17)]


def is_identity_number(text: str) -> bool:
    """Whether 18 characters are one: a province, a day of birth, and the check by ISO 7064, MOD 11-2.

    GB 11643-1999: the digits times 2^17 … 2^1 and the last character (X is ten) sum to 1 modulo 11.
    """
    try:
        datetime.date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    check = 10 if text[17] in "Xx" else int(text[17])
    total = sum(weight * int(digit) for weight, digit in zip(WEIGHTS, text))
    return int(text[:2]) in PROVINCES and (total + check) % 11 == 1


# ---- 6. Keys and tokens of services ------------------------------------------------------------------------

# (what the text must hold for the pattern to be tried: searching for it costs next to nothing; the pattern)
KEYS = [(hint, re.compile(pattern)) for hint, pattern in (
    ("PRIVATE KEY-----", r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY-----[^-]{64,10000}-----END [A-Z0-9 ]+"
                         r"-----"),
    ("AKIA", r"AKIA[0-9A-Z]{16}(?![A-Za-z0-9])"),
    ("ASIA", r"ASIA[0-9A-Z]{16}(?![A-Za-z0-9])"),
    ("gh", r"gh[pousr]_[A-Za-z0-9]{36,255}(?![A-Za-z0-9])"),
    ("github_pat_", r"github_pat_[A-Za-z0-9_]{22,255}"),
    ("xox", r"xox[abeoprs]-[A-Za-z0-9\-]{20,250}"),
    ("AIza", r"AIza[0-9A-Za-z_\-]{35}(?![0-9A-Za-z_\-])"),
    ("sk-", r"sk-(?=[A-Za-z_\-]{0,40}\d)[A-Za-z0-9_\-]{32,200}"),
    ("_live_", r"[srp]k_live_[0-9A-Za-z]{16,100}"),
    ("hf_", r"hf_[A-Za-z0-9]{34}(?![A-Za-z0-9])"),
    ("eyJ", r"eyJ[A-Za-z0-9_\-]{10,2000}\.eyJ[A-Za-z0-9_\-]{10,4000}\.[A-Za-z0-9_\-]{10,2000}"),
)]


def keys(text: str, reserved: bool) -> Iterator[tuple[int, int, str]]:
    for hint, pattern in KEYS:
        for match in pattern.finditer(text) if hint in text else ():
            if not text[max(0, match.start() - 1):match.start()].isalnum():
                yield *match.span(), "SECRET_KEY"


# ---- 7. How well it finds: precision and recall by kind ----------------------------------------------------


def measured(cases: list[tuple[str, list[tuple[int, int, str]]]]) -> dict[str, tuple[int, int, int]]:
    """{kind: (right, found, labelled)} over (text, spans) cases; right is the very span with the very
    kind."""
    right, found, labelled = Counter(), Counter(), Counter()
    for text, spans in cases:
        finds = find_pii(text)
        found.update(kind for *_, kind in finds)
        labelled.update(kind for *_, kind in spans)
        right.update(kind for *_, kind in set(finds) & set(spans))
    return {kind: (right[kind], found[kind], labelled[kind]) for kind in LETTERS.values()}


LABEL = re.compile(r"\{([EIPNK]):([^{}]*)\}")
LETTERS = {"E": "EMAIL_ADDRESS", "I": "IP_ADDRESS", "P": "PHONE_NUMBER", "N": "ID_NUMBER", "K": "SECRET_KEY"}


def labelled_cases(path: Path) -> list[tuple[str, list[tuple[int, int, str]]]]:
    """(text, spans) of each line: {E:ann@mail.org} labels an e-mail, {I:…} {P:…} {N:…} {K:…} the others.

    A ~ is taken out: it keeps tools that look for keys from taking those in the file for real ones.
    """
    cases = []
    for line in path.read_text(encoding="utf-8").splitlines():
        parts, spans, end = [], [], 0
        line = line.replace("~", "")
        for match in LABEL.finditer(line) if line.strip() and not line.startswith("#") else ():
            parts += [line[end:match.start()], match[2]]
            start = sum(map(len, parts[:-1]))
            spans.append((start, start + len(match[2]), LETTERS[match[1]]))
            end = match.end()
        if line.strip() and not line.startswith("#"):
            cases.append(("".join(parts) + line[end:], spans))
    return cases


@dataclass
class Settings:
    input: tuple[str, ...] = ()  # files, folders to search; none: the labelled lines, to be measured
    cases: str = str(Path(__file__).with_name("tests") / "pii_cases.txt")  # the labelled lines
    reserved: bool = True  # find also what belongs to nobody: private networks, example.com
    most: int = MOST  # finds in a document that would be kept
    examples: int = 3  # shown of each kind

    def __post_init__(self):
        config.require(self, most=(0, None), examples=(0, None))
        if self.input:
            config.refuse(self, "is measured without --input", "cases")
        else:
            config.refuse(self, "is for --input, and there is none", "reserved", "most", "examples")


def main():
    settings = config.parse(Settings)
    config.show(settings)
    if settings.input:
        search(settings)
        return
    cases = labelled_cases(Path(settings.cases))
    without = sum(not spans for _, spans in cases)
    print(f"{len(cases)} labelled lines, {without} of them without personal data")
    print(f"{'kind':15} {'labelled':>8} {'found':>6} {'precision':>9} {'recall':>7}")
    for kind, (right, found, labelled) in measured(cases).items():
        precision, recall = right / max(found, 1), right / max(labelled, 1)
        print(f"{kind:15} {labelled:8} {found:6} {precision:9.3f} {recall:7.3f}")


def search(settings: Settings):
    """Print the finds in a corpus by kind, with examples, and how many documents would be dropped."""
    counts, examples, dropped, documents = Counter(), {}, 0, 0
    for document in corpus(settings.input):
        found = find_pii(document["text"], settings.reserved)
        documents, dropped = documents + 1, dropped + (len(found) > settings.most)
        for start, end, kind in found:
            counts[kind] += 1
            examples.setdefault(kind, {})[document["text"][start:end][:60].replace("\n", " ")] = None
    for kind, count in counts.most_common():
        print(f"{kind:15} {count:8,}   {'; '.join(list(examples[kind])[:settings.examples])}")
    print(f"documents with more than {settings.most}: {dropped:,} of {documents:,}")


if __name__ == "__main__":
    config.run(main)
