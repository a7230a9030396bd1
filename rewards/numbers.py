"""The number that a text gives as its answer, for solutions as people and language models write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

UNSIGNED = r"(?>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = re.compile(
    r"(?<![\w.^])(?<!\^\{)(?<!_\{)(?<![0-9]:)"  # no part of a name, a power, an index or a time of day
    r"(?P<sign>-?\$?-?)"
    r"(?:(?P<whole>[0-9]{1,4})\s(?=[0-9]{1,3}\s?/\s?[0-9]{1,3}(?![0-9.,]\d)))?"
    rf"(?P<digits>{UNSIGNED})(?:\s?/\s?(?P<denominator>{UNSIGNED}))?"
    r"(?:\s?(?:\\times|\\cdot|[x*\u00d7\u00b7])\s?10\s?\^\s?\{?(?P<power>[+-]?[0-9]{1,2})\}?"
    r"|[eE](?P<exponent>[+-]?[0-9]{1,2})(?!\w))?"
    r"(?!:[0-5][0-9])"
)
"""Sign and dollar, whole part of a mixed number, digits with thousands' commas and decimals, the lower half of a
fraction, and a power of ten."""
MAX_DIGITS = 100
"""Longer digit strings are no answer; Python refuses to convert those above 4,300."""

MARKED = re.compile(r"####(?!#)(.*)")
BOXED = re.compile(r"\\f?boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
DECORATION = r"[\s*_$:=`\"'≈~>]{0,20}"
ANSWER = re.compile(
    rf"(?<!/)\banswer\b(?:\s+(?:to|for)\s[^.\n:]{{0,80}}?)?{DECORATION}"
    rf"(?:\b(?:is|was|would be|will be|should be|must be|comes (?:out )?to)\b|[:=>\n]){DECORATION}"
    rf"(?:\b(?:exactly|about|approximately|roughly|around|only|just|therefore|thus|a total of)\b{DECORATION})*",
    re.IGNORECASE,
)
"""The words that announce an answer, up to where it begins."""
SENTENCE_END = re.compile(r"(?<=[.!?])[*_)\"']*\s+|\n+")
BRACKETED = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
BOLD = re.compile(r"\*\*([^*]+)\*\*")
LABELLED = re.compile(
    r"\b(?:steps?|parts?|questions?|problems?|equations?|lines?|options?|cases?|methods?|examples?)\s*\(?$",
    re.IGNORECASE,
)
ITEM = re.compile(r"[.)]\s+\S")
ORDINAL = re.compile(r"(?:st|nd|rd|th)\b", re.IGNORECASE)
ADJUNCT = re.compile(
    r"\b(?:for|in|after|over|within|per|every|each|during|than|between|among|out of|[0-9] of|from|at|on"
    r"|(?<!need )(?<!needs )(?<!needed )(?<!have )(?<!has )(?<!had )(?<!able )(?<!going )to [a-z]+)"
    r"(?:\s+(?:the|a|all|next|first|last|these|those|his|her|their|its))*[\s*_]*$",
    re.IGNORECASE,
)
"""What stands before a number that says for how long, of how many, compared with what or to what end."""
NEW_CLAUSE = re.compile(r",\s|;|\b(?:is|are|was|were|so|therefore|thus)\b", re.IGNORECASE)
WINDOW_CHARS = 80
SUBJECT = re.compile(
    r"(?:^|\b(?:the|these|those|all|his|her|their|its|both|other|if|when|since|and|of|[a-z]+ing))[\s*_]*$",
    re.IGNORECASE,
)
"""What stands before a number that belongs to what is spoken of, not to what is said of it."""
MONEY = re.compile(r"\s?(?:dollars?|cents?|bucks|euros?)\b", re.IGNORECASE)

LATEX_FRACTION = re.compile(r"([0-9]?)\s?\\[dt]?frac\s?(?:\{([^{}]*)\}|([0-9]))\s?(?:\{([^{}]*)\}|([0-9]))")
LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathbf|mathrm|mbox|bf)\s*\{([^{}]*)\}")
LATEX_SPACE = re.compile(r"\\[!,;:]|\{,\}")
LATEX_FENCE = re.compile(r"\\[()\[\]]|\\(?:left|right|quad|qquad|displaystyle)\b")
PLAIN = (
    *(("\\$", "$"), ("\\%", "%"), ("\\ ", " "), ("~", " "), ("&", " "), ("\\\\", "\n"), ("$$", "$")),
    *((minus, "-") for minus in "\N{MINUS SIGN}\N{NON-BREAKING HYPHEN}\N{FULLWIDTH HYPHEN-MINUS}"),
    *((sign, "$") for sign in "\N{EURO SIGN}\N{POUND SIGN}\N{YEN SIGN}\N{INDIAN RUPEE SIGN}"),
    *(("\N{FRACTION SLASH}", "/"), ("\N{FULLWIDTH COLON}", ":"), ("\N{FULLWIDTH EQUALS SIGN}", "=")),
)
"""Spellings of the same, replaced one after the other."""
VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
THOUSANDS_SPACE = re.compile(r"(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")
"""White space at which no line is broken; an ordinary space separates two numbers."""


def number_in(text: str) -> Fraction | None:
    """The number that a text gives as its answer, exactly.

    The first of these that is there:

    1. the number after the last "####" that is no heading;
    2. that in the last \\boxed{}, after its last "=";
    3. that which follows "answer is", "Answer:" and the like, the last time, or the last "=" of that sentence;
    4. of the last sentence with a number: the one in bold, else the one after the last "=", else the last one; but not
       one that only says for how long, of how many or in which step ("18 dollars for 7 days", "18 (see step 2)"),
       where another one is left.

    Commas between thousands, signs of currency and percent and a trailing dot are dropped (50% is 50); a/b is a
    fraction and 1 1/2 is 3/2. Words (eighteen, million) and times of day are no numbers.

    Returns: None where there is no number, or an impossible one such as 3/0.
    """
    text = _plain(text)
    marked = _marked(text)
    if marked is not None:
        return _value(_first(marked))
    boxed = BOXED.findall(text)
    if boxed:
        return _value(_after_equals(boxed[-1]))
    return _value(_announced(text) or _last_said(text))


def _marked(text: str) -> str | None:
    """What follows the last "####" that is no heading; "#### 3. Count the eggs" and "#### Step 3" are headings."""
    for found in reversed(list(MARKED.finditer(text))):
        rest = found[1].strip(" *_$:")
        number = NUMBER.match(rest)
        is_last_line = not text[found.end() :].strip()
        if is_last_line or (number and not ITEM.match(rest, number.end())):
            return rest
    return None


def _first(text: str) -> re.Match[str] | None:
    return NUMBER.search(text)


def _after_equals(text: str) -> re.Match[str] | None:
    """First number after the last "=", else the first."""
    for found in reversed(list(re.finditer("[=≈]", text))):
        number = NUMBER.search(text, found.end())
        if number:
            return number
    return NUMBER.search(text)


def _announced(text: str) -> re.Match[str] | None:
    for found in reversed(list(ANSWER.finditer(text))):
        number = NUMBER.match(text, found.end()) or NUMBER.match(text, max(found.end() - 1, 0))
        if number and not ORDINAL.match(text, number.end()) and not _is_item(text, number):
            end = SENTENCE_END.search(text, number.end())
            rest = _without_brackets(text[number.start() : end.start() if end else len(text)])
            return _after_equals(rest) if re.search("[=≈]", rest) else number
    return None


def _is_item(text: str, number: re.Match[str]) -> bool:
    """Does it number a line, as in "1. Count the eggs"?"""
    line = _before(text, number).rpartition("\n")[2]
    return not line.strip("#*_ ") and ITEM.match(text, number.end()) is not None


def _last_said(text: str) -> re.Match[str] | None:
    for sentence in reversed(SENTENCE_END.split(text)):
        plain = _without_brackets(sentence)
        numbers = [each for each in NUMBER.finditer(plain) if not _is_label(plain, each)]
        bold = [found[1] for found in BOLD.finditer(plain) if NUMBER.search(found[1])]
        if len(bold) == 1 and numbers and not bold[0].rstrip().endswith(":"):
            plain = bold[0]
            numbers = [each for each in NUMBER.finditer(plain) if not _is_label(plain, each)] or numbers
        if numbers:
            return _main(plain, numbers)
    return (list(NUMBER.finditer(text)) or [None])[-1]


def _main(sentence: str, numbers: Sequence[re.Match[str]]) -> re.Match[str]:
    """What the sentence says a number of."""
    return _result(sentence, numbers) or _last_but_adjuncts(sentence, numbers)


def _result(sentence: str, numbers: Sequence[re.Match[str]]) -> re.Match[str] | None:
    """The number after the last "=", where nothing new is said after it."""
    sign = max(sentence.rfind("="), sentence.rfind("≈"))
    result = next((number for number in numbers if number.start() > sign), None)
    if sign < 0 or result is None or NEW_CLAUSE.search(sentence, result.end(), numbers[-1].start()):
        return None
    return result


def _last_but_adjuncts(sentence: str, numbers: Sequence[re.Match[str]]) -> re.Match[str]:
    """The last number that is no adjunct, where it is no part of the subject; else the last one."""
    last = numbers[-1]
    for number in reversed(numbers):
        before = _before(sentence, number)
        if not ADJUNCT.search(before):
            is_said = number is last or _is_money(sentence, number) or not SUBJECT.search(before)
            return number if is_said else last
        if number is last and _is_money(sentence, last) and not any(_is_money(sentence, each) for each in numbers[:-1]):
            return last  # "3 lamps for $540"
    return last


def _before(sentence: str, number: re.Match[str]) -> str:
    """The words before a number, as many as matter: a sentence of a million numbers is read in a moment."""
    start = number.start() - WINDOW_CHARS
    return sentence[: number.start()] if start <= 0 else f".{sentence[start : number.start()]}"


def _is_money(sentence: str, number: re.Match[str]) -> bool:
    return "$" in number["sign"] or MONEY.match(sentence, number.end()) is not None


def _is_label(sentence: str, number: re.Match[str]) -> bool:
    """Does it count steps or days instead of saying how much?"""
    is_label = LABELLED.search(_before(sentence, number)) or ORDINAL.match(sentence, number.end())
    return bool(is_label) or _is_item(sentence, number)


def _without_brackets(sentence: str) -> str:
    """Without what stands in brackets, where a number stands outside."""
    outside = BRACKETED.sub(" ", sentence)
    return outside if NUMBER.search(outside) else sentence


def _plain(text: str) -> str:
    text = THOUSANDS_SPACE.sub("", text)
    for sign, fraction in VULGAR.items():
        text = text.replace(sign, f" {fraction}")
    text = LATEX_FRACTION.sub(_plain_fraction, LATEX_TEXT.sub(r" \1 ", text))
    text = LATEX_FENCE.sub(" ", LATEX_SPACE.sub("", text))
    for latex, plain in PLAIN:
        text = text.replace(latex, plain)
    return text


def _plain_fraction(found: re.Match[str]) -> str:
    whole, *halves = found.groups(default="")
    return f"{whole} {halves[0] or halves[1]}/{halves[2] or halves[3]}".lstrip()


def _value(found: re.Match[str] | None) -> Fraction | None:
    if found is None or len(found.group()) > MAX_DIGITS:
        return None
    divisor = _fraction(found["denominator"] or "1")
    if divisor == 0:
        return None
    value = _fraction(found["whole"] or "0") + _fraction(found["digits"]) / divisor
    value *= Fraction(10) ** int(found["power"] or found["exponent"] or "0")
    return -value if "-" in found["sign"] else value


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))
