"""Checks: programs that decide whether a completion follows an instruction.

A check is a pure function of the text of a completion and its arguments. It uses no tokenizer, network or model. In a
prompt file a check is `{"name": "max_words", "n": 12}`; CHECKS maps each name to its function. A gate is a check that
the instruction takes for granted: without it the score is 0. GATES maps their names; they read the prompt, too. A
verifier, of data/procedural.py, gives the whole score of its prompt. `score` is the gold score of a completion. With
`--reward module:function`, a reward function of the user replaces it.

Before a check reads a completion, white space at both ends is dropped and curly quotes become straight quotes.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter
from fractions import Fraction

from configs.config import ROOT
from data.procedural import verified
from data.rows import text_of

QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "‟": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "\u00a0": " "})
ALNUM = r"[^\W_]"
WORD = re.compile(rf"\d+(?:[.,]\d+)+|{ALNUM}+(?:['-]{ALNUM}+)*")
MARKER = re.compile(r"[-*+•‣◦▪–—](?![-*])|\(?\d+[.)](?!\d)")  # a line that begins so looks like a list item
CLOSERS = "\"')]}*_ \n\t"  # may stand between the last mark of a completion and its end
# A run of end marks ends a sentence where white space, the end, or a capital letter follows ("end.Start").
SENTENCE_END = re.compile(r"(?:[.!?…]+[\"')\]*_]*)(?=\s|$|(?<=[a-z][.!?])[A-Z])")
# Digits with commas between thousands, or plain, with decimals; or a fraction of two such numbers without a space.
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?!,\d{3})|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+"
LONGEST = 400  # characters of a number
NUMERAL = re.compile(rf"(?<![\w.])(?:{DIGITS})(?:/(?:{DIGITS}))?", re.ASCII)
SIGN = re.compile(r"(?:[-−–]|=\s*[-−–]\s*|\b(?:minus|negative)\s+)$", re.IGNORECASE)  # ends so: the number is below 0
SUBTRACTION = re.compile(r"(?:\w|[\d)]\s*)(?:[-−–]|\bminus)\s*$", re.IGNORECASE)  # so: it is subtracted
NEVER_LAST = {"mr", "mrs", "ms", "dr", "prof", "st", "e.g", "i.e", "vs", "cf", "approx"}
SELDOM_LAST = {"etc", "a.m", "p.m", "u.s", "u.k", "jr", "sr", "inc"}  # last only before a capital or at the end


def clean(text: str) -> str:
    """The text that checks read: composed Unicode (NFC), straight quotes, no white space at the ends."""
    return unicodedata.normalize("NFC", text).translate(QUOTES).strip()


def words(text: str) -> list[str]:
    """Words in lower case. `don't`, `well-known` and `1,000.5` are one word each; `and/or` is two."""
    return [word.casefold() for word in WORD.findall(clean(text))]


def lines(text: str) -> list[str]:
    """Lines that are not blank, without white space at their ends."""
    return [line.strip() for line in clean(text).splitlines() if line.strip()]


def no_sentence_end(before: str, rest: str) -> bool:
    """Whether the full stop between `before` and `rest` belongs to an abbreviation, an initial or a list number."""
    last = before.split()[-1].lstrip("\"'([*_") if before else ""
    abbreviation = last.lower() in NEVER_LAST or (last.lower() in SELDOM_LAST and not rest[0].isupper())
    initial = len(last) == 1 and last.isupper() and last != "I"
    return abbreviation or initial or (last.isdigit() and before == last)


def split_sentences(text: str) -> list[str]:
    """Sentences, in order; the last of a line may lack its end mark.

    A sentence ends at `.`, `!`, `?` or an ellipsis, with the quotes and brackets that close after it, and at a
    line break. No end: a decimal point, a list number (`1.`), an abbreviation such as `Mr.` or `e.g.`, one
    capital letter with a stop (`J. K.`), and an ellipsis or a quoted end mark before a small letter
    (`"Stop!" she said`).
    """
    sentences = []
    for line in lines(text):
        start = 0
        for end in SENTENCE_END.finditer(line):
            before, mark, rest = line[start : end.start()].strip(), end.group(), line[end.end() :].lstrip()
            if mark.startswith(".") and rest and no_sentence_end(before, rest):
                continue
            if rest[:1].islower() and (mark[-1] in "\"')" or mark.startswith(("..", "…"))):
                continue
            sentences.append(line[start : end.end()].strip())
            start = end.end()
        if line[start:].strip():
            sentences.append(line[start:].strip())
    return [sentence for sentence in sentences if words(sentence)]


def list_items(text: str) -> tuple[list[str], int]:
    """(list marks `-`, `*`, `1.` of the lines that are items with text, number of other lines that look like items)."""
    marks, other = [], 0
    for line in lines(text):
        item = re.match(r"([-*]|\d+\.)\s+(?=.*\w)", line)
        if item:
            marks.append(item.group(1))
        elif MARKER.match(line):
            other += 1
    return marks, other


def count_word(text: str, word: str) -> int:
    """How often a word occurs in the text, in upper or lower case. `bee` occurs in `bee's`, not in `bees`."""
    pattern = rf"(?<!{ALNUM}){re.escape(clean(word).casefold())}(?!{ALNUM})"
    return len(re.findall(pattern, clean(text).casefold()))


def numbers(text: str) -> list[Fraction | None]:
    """The numbers that are written in digits, in order: `1,234.5`, `-7`, `- 7` after `=`, `minus 7`, `1/2`, `.5`.

    A hyphen or `minus` after a number is a subtraction or a range (`20-7`, `20 minus 7`), and a hyphen before a space
    is a list mark: no signs. Digits after a letter or `_` are part of a name (`x2`). 27.0 is 27; `27.` ends a sentence.
    None for a number of more than LONGEST characters, or with an exponent of four digits: nobody asks for it, and it
    would take seconds, or all memory.
    """
    text = clean(text)
    found: list[Fraction | None] = []
    for match in NUMERAL.finditer(text):
        if len(match.group()) > LONGEST or re.search(r"[eE][+-]?\d{4}", match.group()):
            found.append(None)
            continue
        before = text[: match.start()].rstrip("$€£*_")
        sign = -1 if SIGN.search(before) and not SUBTRACTION.search(before) else 1
        above, _, below = match.group().replace(",", "").partition("/")
        if not below or Fraction(below):
            found.append(sign * Fraction(above) / Fraction(below or 1))
    return found


def max_words(text: str, n: int) -> bool:
    """At most n words."""
    return len(words(text)) <= n


def short_words(text: str, n: int) -> bool:
    """No word has more than n letters; each part of a hyphened word counts alone."""
    return all(len(part) <= n for word in words(text) for part in re.split(r"['-]", word))


def sentences(text: str, n: int) -> bool:
    """Exactly n sentences, each ended by `.`, `!`, `?` or an ellipsis. A line break also separates sentences."""
    found = split_sentences(text)
    return len(found) == n and all(sentence.rstrip(CLOSERS).endswith((".", "!", "?", "…")) for sentence in found)


def one_sentence(text: str) -> bool:
    """Exactly one sentence, and it is ended: a completion cut by a length limit fails."""
    return sentences(text, 1)


def lowercase(text: str) -> bool:
    """At least one small letter, no capital. Digits, marks and letters without case do not matter."""
    return any(c.islower() for c in text) and not any(c.isupper() or c.istitle() for c in text)


def capitals(text: str) -> bool:
    """At least one capital letter, no small one. Digits, marks and letters without case do not matter."""
    return any(c.isupper() for c in text) and not any(c.islower() or c.istitle() and not c.isupper() for c in text)


def no_commas(text: str) -> bool:
    """No comma anywhere, not in `1,000` either."""
    return not re.search("[,،，、]", text)


def starts_with(text: str, word: str) -> bool:
    """The first word is this word, in upper or lower case, with any punctuation around it."""
    return words(text)[:1] == words(word)


def ends_with(text: str, phrase: str) -> bool:
    """The last words are this phrase, in upper or lower case. Only punctuation may follow."""
    wanted = words(phrase)
    return words(text)[-len(wanted) :] == wanted


def includes(text: str, word: str) -> bool:
    """The completion contains the word as a whole word, in upper or lower case."""
    return count_word(text, word) > 0


def excludes(text: str, word: str) -> bool:
    """The completion does not contain the word as a whole word, in upper or lower case. Its other forms are allowed."""
    return count_word(text, word) == 0


def repeats(text: str, word: str, n: int) -> bool:
    """The completion contains the word at least n times as a whole word, in upper or lower case."""
    return count_word(text, word) >= n


def bullets(text: str, n: int) -> bool:
    """Exactly n lines are `- ` or `* ` and text, and no other line looks like a list item. Plain lines are allowed."""
    marks, other = list_items(text)
    return len(marks) == n and other == 0 and all(mark in "-*" for mark in marks)


def numbered(text: str, n: int) -> bool:
    """Exactly n lines are `1. `, `2. `, ... and text, in order, and no other line looks like a list item."""
    marks, other = list_items(text)
    return other == 0 and marks == [f"{i}." for i in range(1, n + 1)]


def question(text: str) -> bool:
    """The completion ends with a question mark; closing quotes and brackets may follow it."""
    return clean(text).rstrip(CLOSERS).endswith(("?", "？"))


def exclamation(text: str) -> bool:
    """The completion ends with an exclamation mark; closing quotes and brackets may follow it."""
    return clean(text).rstrip(CLOSERS).endswith(("!", "！"))


def quoted(text: str) -> bool:
    """The first and last characters are double quotes, with at least one word and no other quote between them."""
    return re.fullmatch(r'"[^"]*\w[^"]*"', clean(text)) is not None


def parentheses(text: str) -> bool:
    """At least one word is inside round brackets that are opened and closed."""
    return re.search(rf"\([^()]*{ALNUM}[^()]*\)", text) is not None


def no_letter(text: str, letter: str) -> bool:
    """The letter does not occur: not small, not capital, not with an accent."""
    return letter.casefold() not in unicodedata.normalize("NFD", text).casefold()


def number(text: str) -> bool:
    """At least one digit; the number of a list item (`1.` at the start of a line) does not count."""
    return any(re.search(r"\d", re.sub(r"^\(?\d+[.)](?!\d)", "", line)) for line in lines(text))


def last_number(text: str, value: float) -> bool:
    """The last number of the completion is this number; see `numbers`."""
    return numbers(text)[-1:] == [Fraction(str(value))]


CHECKS = {
    function.__name__: function
    for function in (
        max_words, short_words, sentences, one_sentence, lowercase, capitals, no_commas, starts_with, ends_with,
        includes, excludes, repeats, bullets, numbered, question, exclamation, quoted, parentheses, no_letter, number,
        last_number,
    )
}  # fmt: skip


# Words that carry no topic: they hold a sentence together, or announce an answer.
COMMON = frozenset(
    words("""
    a about after all also always am an and any are as at be because been before being best better big both but by
    came can come could day did do does don't down each enough even ever every few find first for from get gets give
    gives go goes going good great had has have having he help helps her here him his how i if in into is isn't it
    it's its just keep keeps know last less let lets like little long look lot made make makes many may me mean
    means might more most much must my need needs never new next no not nothing now of off often old on once one
    only or other our out over own part people place put really right same say see she should small so some
    something still such take takes than that that's the their them then there these they thing things think this
    those through time to too try two under until up us use used uses very want was way we well were what when where
    which while who why will with without work would yes you you'll you're your
    """)
)
FILLER = frozenset(
    words("""
    above act allowed answer answered answering apologize below can't cannot capital comma commas contain contains
    course description end ends exactly exclamation example following forbidden happy here's i'll i'm it'll letter
    letters line lines lowercase mark mention ok okay please prompt question quote quotes request reply respond
    response sentence sentences short sorry sure task text thank thanks topic unable understand uppercase word words
    write writing written
    """)
)
ARTICLES = {"a", "an", "the"}
NEVER_AFTER_ARTICLE = {  # a word salad puts them there
    "a", "an", "and", "are", "at", "be", "but", "by", "for", "from", "he", "if", "in", "into", "is", "it", "of", "on",
    "or", "she", "that", "the", "them", "they", "this", "to", "was", "we", "were", "with", "you",
}  # fmt: skip
ENDINGS = (("ies", "y"), ("es", ""), ("s", ""), ("ied", "y"), ("ed", ""), ("ed", "e"), ("ing", ""), ("ing", "e"),
           ("er", ""), ("er", "e"), ("est", ""), ("est", "e"), ("ly", ""), ("y", ""))  # fmt: skip
LISTS = re.compile(r"\s*(?:list|name)\b", re.IGNORECASE)  # prompts that ask for items, not for sentences


@functools.cache
def vocabulary() -> frozenset[str]:
    """English words without their endings: data/words.txt."""
    return frozenset((ROOT / "data" / "words.txt").read_text(encoding="utf-8").split())


def is_english(word: str) -> bool:
    """Whether a word, or what is left of it without an ending (`bees`, `baked`), is in the vocabulary."""
    stems = [word.removesuffix(end) + rest for end, rest in ENDINGS if word.endswith(end) and len(word) > len(end) + 1]
    doubled = [stem[:-1] for stem in stems if len(stem) > 3 and stem[-1] == stem[-2]]  # running
    return word.isdigit() or any(stem in vocabulary() for stem in (word, *stems, *doubled))


def on_topic(text: str, stems: list[str]) -> bool:
    """A word begins with one of the stems, in upper or lower case."""
    return any(word.startswith(stem) for word in parts(text) for stem in stems)


def own_words(text: str, prompt: str) -> bool:
    """Of the words beyond COMMON and FILLER, two different ones and a third of all are not words of the prompt."""
    mine = [word for word in words(text) if word not in COMMON and word not in FILLER]
    asked = {*words(prompt), *parts(prompt)}
    new = [word for word in mine if word not in asked]
    return len(set(new)) >= 2 and len(new) >= len(mine) / 3


def in_sentences(text: str, listing: bool) -> bool:
    """The words are held together: a sixth are COMMON, and no article stands before `of`, `is` or the like.

    listing: items are enough, of at most five words each on average, between commas or on lines of their own.
    """
    found = words(text)
    salad = any(a in ARTICLES and b in NEVER_AFTER_ARTICLE for a, b in itertools.pairwise(found))
    items = [item for item in re.split(r"[,;:\n•]|\.\s| - ", clean(text)) if words(item)]
    enough = sum(word in COMMON for word in found) >= len(found) / 6
    return not salad and (enough or listing and len(items) >= 2 and len(found) <= 5 * len(items))


def parts(text: str) -> list[str]:
    """Words in lower case; the parts of a hyphened word apart, and without what follows an apostrophe (`bee's`)."""
    return [part.partition("'")[0] for word in words(text) for part in word.split("-")]


def real_answer(text: str, prompt: str, stems: list[str], n: int) -> bool:
    """A completion that says something about what it was asked. All of these hold:

    - it has at least n words, and three quarters of them are English (`is_english`) or begin with one of the stems;
    - it is on topic: one of its words begins with one of the stems (`on_topic`);
    - it is no echo of the prompt (`own_words`), and no row of key words (`in_sentences`).

    It reads no meaning: whether the answer is true, or sensible, it cannot tell.
    """
    found = parts(text)
    known = sum(is_english(word) or any(map(word.startswith, stems)) for word in found)
    listing = bool(LISTS.match(prompt)) or len(list_items(text)[0]) >= 2
    return (
        len(words(text)) >= n
        and known >= 0.75 * len(found)
        and on_topic(text, stems)
        and own_words(text, prompt)
        and in_sentences(text, listing)
    )


GATES = {function.__name__: function for function in (real_answer,)}


VERIFIERS = {function.__name__: function for function in (verified,)}  # each gives the whole score of its prompt


def asked_checks(checks: list[dict]) -> list[dict]:
    """The checks that the instruction asks for: those that are no gates."""
    return [check for check in checks if check["name"] not in GATES]


def is_degenerate(text: str) -> bool:
    """Whether a completion loops. True in four cases:

    - a block of words is repeated three times or more in a row, and these repeats are at least 6 words and at
      least half of all words (`the bee is the bee is the bee is`);
    - there are at least 8 words, and more than half of them are the same word;
    - there are at least 20 words, and fewer than 30 % of them are different words;
    - a string of at most 12 characters is repeated 8 times or more in a row without a space, and these repeats are
      at least half of the text (`hahahahahahahaha`, `!!!!!!!!`).
    """
    found = words(text)
    total = len(found)
    for period in range(1, total // 3 + 1):
        run = 0  # words in a row that equal the word one period earlier
        for i in range(period, total):
            run = run + 1 if found[i] == found[i - period] else 0
            looped = run + period
            if looped >= max(3 * period, 6, total / 2):
                return True
    if total >= 8 and Counter(found).most_common(1)[0][1] > total / 2:
        return True
    if total >= 20 and len(set(found)) < 0.3 * total:
        return True
    return any(len(loop.group()) >= len(clean(text)) / 2 for loop in re.finditer(r"(\S{1,12}?)\1{7,}", clean(text)))


def arguments_of(check: dict) -> dict:
    return {key: value for key, value in check.items() if key != "name"}


def call_check(text: str, check: dict, prompt: str | list[dict] = "") -> bool:
    """Whether one completion of a prompt passes one check. A completion without a word passes no check."""
    arguments = arguments_of(check)
    if check["name"] in VERIFIERS:
        return VERIFIERS[check["name"]](text, **arguments) == 1.0
    if check["name"] in GATES:
        return bool(words(text)) and GATES[check["name"]](text, text_of(prompt), **arguments)
    return bool(words(text)) and CHECKS[check["name"]](text, **arguments)


def passed(text: str, checks: list[dict], prompt: str | list[dict] = "") -> list[bool]:
    """For each check, whether the completion of the prompt passes it. Loops are not considered here."""
    return [call_check(text, check, prompt) for check in checks]


def score(text: str, checks: list[dict], prompt: str | list[dict] = "") -> float:
    """The gold score: the share of checks passed, in [0, 1], of those that are no gates; or what a verifier gives.

    Without a verifier, 0.0 for a completion that has no word, that loops, or that does not pass a gate. The prompt (a
    text, or a list of messages) is read by gates only.
    Raises ValueError if there are no checks.
    """
    if not checks:
        raise ValueError("score needs at least one check, got none")
    for check in checks:
        if check["name"] in VERIFIERS:
            return VERIFIERS[check["name"]](text, **arguments_of(check))
    gates = [check for check in checks if check["name"] in GATES]
    if is_degenerate(text) or not all(passed(text, gates, prompt)):
        return 0.0
    asked = asked_checks(checks)
    return sum(passed(text, asked)) / len(asked) if asked else 1.0
