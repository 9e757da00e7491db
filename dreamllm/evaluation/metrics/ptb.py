"""Penn Treebank tokens of captions, as the COCO caption evaluation makes them.

The published evaluation runs Stanford's PTBTokenizer (CoreNLP 3.4.1, a Java program) with `-preserveLines -lowerCase`
and drops punctuation tokens. This is a tokenizer of our own with the same rules for the text that captions hold:

- clitics are split (`dog's` -> `dog 's`, `isn't` -> `is n't`, `cannot` -> `can not`, `gonna` -> `gon na`);
- words keep inner hyphens, full stops, slashes between two short words, and the final full stop of an abbreviation;
- numbers keep their signs, separators and fractions; currency signs and `%` stand alone, `£` is `#`, `€` is `$`;
- quotes become ``` `` ```, `''`, `` ` `` and `'`, brackets `-lrb-`, `-rsb-`, ..., dashes `--`, an ellipsis `...`;
- characters outside the Basic Multilingual Plane (most emoji) vanish;
- the tokens of `PUNCTUATION` are dropped. It names brackets in capitals, but the text is lower-cased before, so
  `-lrb-` and its kin stay: so do they in the published scores.

The tests hold it against the Java program where that is installed. One difference is left by intention: whether a
lower-case letter keeps a full stop at the end of a caption ("... an x.") depends there on the first letter of the next
caption in the file. Here it never does, as there before a capital.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CHARACTERS = str.maketrans(
    {
        "\u2018": "`",
        "\u2019": "'",
        "\u201b": "'",
        "\u201c": "``",
        "\u201d": "''",
        "\u00a0": " ",
        "\u200b": " ",
        "\u2013": "--",
        "\u2014": "--",
        "\u2026": "...",
        "\u00bc": "1/4",
        "\u00bd": "1/2",
        "\u00be": "3/4",
        "\u00ad": "",
    }
)
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&nbsp;": " ", "&quot;": '"'}
_CURRENCY = {"\u00a3": "#", "\u20ac": "$", "\u00a2": "cents"}

_TITLES = (
    "mr mrs ms dr drs messrs prof profs gen gov hon lt col cpl sgt capt cmdr maj sen rep reps rev st pres insp supt"
)
_DATES = "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri"
_OTHERS = "inc corp co ltd bros jr sr esq est dept assn ave blvd rd ft mt ph etc vs al cf prop tel sq ext ph.d e.g i.e"
_ABBREVIATIONS = "|".join(map(re.escape, sorted(f"{_TITLES} {_DATES} {_OTHERS}".split(), key=len, reverse=True)))

_LETTER = r"[^\W\d_]"
_UNIT = r"[^\W_]+(?:-[^\W_]+)*"
# The first pattern that fits at a place makes the token; case matters nowhere but in AT&T.
_PATTERNS = {
    "tag": r"</?[a-z!](?:[^<>\s\"']|\"[^\"]*\"|'[^']*')*/?>",
    "url": r"https?://[^\s\"<>|()]+[^\s\"<>|.!?(){},'-]"
    r"|(?:www\.)?(?:[a-z0-9-]+\.)+(?:com|net|org|edu)\b(?:/[^\s\"<>|()]*[^\s\"<>|.!?(){},'-])?",
    "mail": r"[a-z0-9][\w.+-]*@[a-z0-9][\w-]*(?:\.[a-z0-9-]+)*",
    "handle": r"[@#][a-z]\w*",
    "emoticon": r"[:;=]-?[()](?!\w)|:[dp](?!\w)|\^_\^",
    "contraction": r"can(?=not(?!\w))|(?:gon|wan)(?=na(?!\w))|got(?=ta(?!\w))|(?:gim|lem)(?=me(?!\w))"
    r"|'t(?=(?:is|was)(?!\w))|more(?='n(?!\w))|y'(?=all(?!\w))|d'ye(?!\w)",
    "apostrophe": r"'n'?(?!\w)|'[2-9]0s(?!\w)"
    r"|(?:ol'|'em|c'mon|'cause|'till?|nor'easter|e'er|s'mores|li'l|o'clock|ma'am)(?!\w)"
    rf"|o'{_LETTER}{{2,}}|{_LETTER}+[aeiou]'[aeiou]{_LETTER}*",
    "negated": rf"{_LETTER}+?(?=n't(?!\w))",
    "clitic": r"n't(?!\w)|'(?:[msd]|re|ve|ll)(?!\w)",
    "fraction": r"(?<![\w.])(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}(?![\w/])",
    "date": r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}(?!\w)",
    "money": r"(?:us|hk|a|c|nz|au)\$|[$\u00a3\u20ac\u00a2]",
    "company": r"(?-i:[A-Z]+(?:&[A-Z]+)+)(?!\w)|c\+\+|[cf]#(?!\w)",
    "initials": rf"(?:{_LETTER}\.){{2,}}(?!\w)"
    r"|(?<![\w.])(?-i:[A-HJ-Z]\.(?=\s+\S|\s*$)|[a-z]\.(?=\s+[^A-Z\s]|[.!?]))",
    "abbreviation": rf"(?<!\w)(?:{_ABBREVIATIONS})\.(?!\w)|no\.(?=\s*\d)",
    "slashed": rf"{_UNIT}(?:/{_UNIT}){{1,2}}",
    "hyphened": r"[^\W_]+(?:[.,][^\W_]+)*(?:-[^\W_]+(?:[.,][^\W_]+)*)+",
    "number": r"(?:(?<!\w)[-+])?(?:\d*(?:[.:,]\d+)+|\d+(?!\w|[-/]\w))",
    "word": r"[^\W_]+(?:_+[^\W_]+)*(?:[.!?][^\W\d_][^\W_]*)*",
    "dots": r"\.{3,}|\. \. \.",
    "marks": r"[!?]{2,}|#{2,}|\*{2,}|_+",
    "dashes": r"-{2,}",
    "quotes": r"''|``",
    "other": r"\S",
}
_TOKEN = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS.items()), re.IGNORECASE)


def ptb_tokens(text: str) -> str:
    """The tokens of one caption, lower-cased, joined by single spaces, without punctuation tokens; may be empty."""
    return " ".join(token for token in _tokens(text) if token not in PUNCTUATION)


def _tokens(text: str) -> Iterator[str]:
    text = "".join(c for c in text if ord(c) < 0x10000 and not "\ud800" <= c <= "\udfff")
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    text = text.translate(_CHARACTERS)
    inside_quotes = False
    for match in _TOKEN.finditer(text):
        token, kind = match[0].lower(), match.lastgroup
        if token == '"':
            inside_quotes = not inside_quotes
            yield "``" if inside_quotes else "''"
        elif token == "'":
            yield "`" if _opens(text, match.start()) else "'"
        elif kind == "dots":
            yield "..."
        elif kind == "dashes":
            yield "--" if len(token) < 5 else token
        elif kind == "fraction":
            yield token.replace(" ", "\u00a0")
        elif kind == "emoticon":
            yield "".join(_BRACKETS.get(character, character) for character in token)
        else:
            yield _CURRENCY.get(token) or _BRACKETS.get(token) or token


def _opens(text: str, at: int) -> bool:
    """Whether the apostrophe at `at` opens a quotation: it stands at the beginning of a word."""
    before = text[at - 1] if at else " "
    return (before.isspace() or before in '([{`"-') and at + 1 < len(text) and not text[at + 1].isspace()
