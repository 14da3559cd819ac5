"""Checks: programs that decide whether a completion follows an instruction.

A check is a pure function of the text of a completion and its arguments. It uses no tokenizer, network or model. In a
prompt file a check is `{"name": "max_words", "n": 12}`; CHECKS maps each name to its function. `score` is the gold
score of a completion. With `--reward module:function`, a reward function of the user replaces it.

Before a check reads a completion, white space at both ends is dropped and curly quotes become straight quotes.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "‟": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "\u00a0": " "})
ALNUM = r"[^\W_]"
WORD = re.compile(rf"\d+(?:[.,]\d+)+|{ALNUM}+(?:['-]{ALNUM}+)*")
MARKER = re.compile(r"[-*+•‣◦▪–—](?![-*])|\(?\d+[.)](?!\d)")  # a line that begins so looks like a list item
CLOSERS = "\"')]}*_ \n\t"  # may stand between the last mark of a completion and its end
# A run of end marks ends a sentence where white space, the end, or a capital letter follows ("end.Start").
SENTENCE_END = re.compile(r"(?:[.!?…]+[\"')\]*_]*)(?=\s|$|(?<=[a-z][.!?])[A-Z])")
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


CHECKS = {
    function.__name__: function
    for function in (
        max_words, short_words, sentences, one_sentence, lowercase, capitals, no_commas, starts_with, ends_with,
        includes, excludes, repeats, bullets, numbered, question, exclamation, quoted, parentheses, no_letter, number,
    )
}  # fmt: skip


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


def call_check(text: str, check: dict) -> bool:
    """Whether one completion passes one check. A completion without a word passes no check."""
    arguments = {key: value for key, value in check.items() if key != "name"}
    return bool(words(text)) and CHECKS[check["name"]](text, **arguments)


def passed(text: str, checks: list[dict]) -> list[bool]:
    """For each check, whether the completion passes it. Loops are not considered here."""
    return [call_check(text, check) for check in checks]


def score(text: str, checks: list[dict]) -> float:
    """The gold score: the share of checks passed, in [0, 1]. 0.0 for a completion that has no word or that loops.

    Raises ValueError if there are no checks.
    """
    if not checks:
        raise ValueError("score needs at least one check, got none")
    return 0.0 if is_degenerate(text) else sum(passed(text, checks)) / len(checks)
