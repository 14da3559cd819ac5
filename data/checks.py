"""What an instruction demands, decided by a program.

A check is a pure function of an answer's text and its arguments: no tokenizer, no network, no model. In a
prompt file a check is `{"name": "max_words", "n": 12}`; CHECKS maps each name to its function. `score` is the
gold score of an answer. `--judge module:function` puts a user's own function in its place.

Before a check looks at an answer, white space at both ends is dropped and curly quotes become straight ones.
"""

import difflib
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

from configs.config import UserError

PROMPTS = "data/prompts.json"
SPLITS = ("train", "heldout")

QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "‟": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "\u00a0": " "})
ALNUM = r"[^\W_]"
WORD = re.compile(rf"\d+(?:[.,]\d+)+|{ALNUM}+(?:['-]{ALNUM}+)*")
MARKER = re.compile(r"[-*+•‣◦▪–—](?![-*])|\(?\d+[.)](?!\d)")  # what makes a line look like a list item
CLOSERS = "\"')]}*_ \n\t"  # may stand between the last mark of an answer and its end
# A run of end marks ends a sentence where white space, the end, or a capital letter follows ("end.Start").
SENTENCE_END = re.compile(r"(?:[.!?…]+[\"')\]*_]*)(?=\s|$|(?<=[a-z][.!?])[A-Z])")
NEVER_LAST = {"mr", "mrs", "ms", "dr", "prof", "st", "e.g", "i.e", "vs", "cf", "approx"}
SELDOM_LAST = {"etc", "a.m", "p.m", "u.s", "u.k", "jr", "sr", "inc"}  # last only before a capital or at the end


def clean(text: str) -> str:
    """The text as checks see it: composed Unicode, straight quotes, no white space at the ends."""
    return unicodedata.normalize("NFC", text).translate(QUOTES).strip()


def words(text: str) -> list[str]:
    """Words in lower case. `don't`, `well-known` and `1,000.5` are one word each; `and/or` is two."""
    return [word.casefold() for word in WORD.findall(clean(text))]


def lines(text: str) -> list[str]:
    """Lines that are not blank, without white space at their ends."""
    return [line.strip() for line in clean(text).splitlines() if line.strip()]


def no_sentence_end(before: str, rest: str) -> bool:
    """Whether a stop between these two texts of one line belongs to an abbreviation, an initial or a list number."""
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
    """The marks of the lines with text after one (`-`, `*`, `1.`), and how many lines look like items otherwise."""
    marks, other = [], 0
    for line in lines(text):
        item = re.match(r"([-*]|\d+\.)\s+(?=.*\w)", line)
        if item:
            marks.append(item.group(1))
        elif MARKER.match(line):
            other += 1
    return marks, other


def count_word(text: str, word: str) -> int:
    """How often a word stands in the text, whatever its case; `bee` stands in `bee's`, not in `bees`."""
    pattern = rf"(?<!{ALNUM}){re.escape(clean(word).casefold())}(?!{ALNUM})"
    return len(re.findall(pattern, clean(text).casefold()))


def max_words(text: str, n: int) -> bool:
    """At most n words."""
    return len(words(text)) <= n


def short_words(text: str, n: int) -> bool:
    """No word has more than n letters; each part of a hyphened word counts alone."""
    return all(len(part) <= n for word in words(text) for part in re.split(r"['-]", word))


def sentences(text: str, n: int) -> bool:
    """Exactly n sentences, each ended by `.`, `!`, `?` or an ellipsis. A line break also parts sentences."""
    found = split_sentences(text)
    return len(found) == n and all(sentence.rstrip(CLOSERS).endswith((".", "!", "?", "…")) for sentence in found)


def one_sentence(text: str) -> bool:
    """Exactly one sentence, and it is ended: an answer cut by a length limit fails."""
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
    """The first word is this word, whatever its case and the marks around it."""
    return words(text)[:1] == words(word)


def ends_with(text: str, phrase: str) -> bool:
    """The last words are this phrase, whatever their case; only marks may follow."""
    wanted = words(phrase)
    return words(text)[-len(wanted) :] == wanted


def includes(text: str, word: str) -> bool:
    """The word stands in the answer as a whole word, whatever its case."""
    return count_word(text, word) > 0


def excludes(text: str, word: str) -> bool:
    """The word does not stand in the answer as a whole word, whatever its case. Its other forms may."""
    return count_word(text, word) == 0


def repeats(text: str, word: str, n: int) -> bool:
    """The word stands in the answer at least n times as a whole word, whatever its case."""
    return count_word(text, word) >= n


def bullets(text: str, n: int) -> bool:
    """Exactly n lines are `- ` or `* ` and text, and no other line looks like a list item; plain lines may stand."""
    marks, other = list_items(text)
    return len(marks) == n and other == 0 and all(mark in "-*" for mark in marks)


def numbered(text: str, n: int) -> bool:
    """Exactly n lines are `1. `, `2. `, ... and text, in order, and no other line looks like a list item."""
    marks, other = list_items(text)
    return other == 0 and marks == [f"{i}." for i in range(1, n + 1)]


def question(text: str) -> bool:
    """The answer ends with a question mark; closing quotes and brackets may follow it."""
    return clean(text).rstrip(CLOSERS).endswith(("?", "？"))


def exclamation(text: str) -> bool:
    """The answer ends with an exclamation mark; closing quotes and brackets may follow it."""
    return clean(text).rstrip(CLOSERS).endswith(("!", "！"))


def quoted(text: str) -> bool:
    """The first and the last character are double quotes, words stand between them, and no third quote does."""
    return re.fullmatch(r'"[^"]*\w[^"]*"', clean(text)) is not None


def parentheses(text: str) -> bool:
    """Round brackets, opened and closed, stand around at least one word."""
    return re.search(rf"\([^()]*{ALNUM}[^()]*\)", text) is not None


def no_letter(text: str, letter: str) -> bool:
    """The letter stands nowhere, small, capital or with an accent."""
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

ARGUMENTS = {  # argument: (whether a value is allowed, what is allowed)
    "n": (lambda v: type(v) is int and v >= 1, "a whole number of at least 1"),
    "word": (lambda v: isinstance(v, str) and len(words(v)) == 1, "one word"),
    "phrase": (lambda v: isinstance(v, str) and len(words(v)) >= 1, "a text of at least one word"),
    "letter": (lambda v: isinstance(v, str) and len(v) == 1 and v.isalpha(), "one letter"),
}


def is_degenerate(text: str) -> bool:
    """Whether an answer loops. True in four cases, each about most of the answer:

    - some block of words stands three times or more back to back, and these repeats are at least 6 words and at
      least half of all words (`the bee is the bee is the bee is`);
    - of at least 8 words, more than half are the same word;
    - of at least 20 words, fewer than 30 % are different ones;
    - a string of at most 12 characters stands 8 times or more in a row without a space, and these repeats are at
      least half of the text (`hahahahahahahaha`, `!!!!!!!!`).
    """
    found = words(text)
    total = len(found)
    for period in range(1, total // 3 + 1):
        run = 0  # words in a row that equal the one a period earlier
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
    """One check on one answer. An answer without a word passes nothing."""
    arguments = {key: value for key, value in check.items() if key != "name"}
    return bool(words(text)) and CHECKS[check["name"]](text, **arguments)


def passed(text: str, checks: list[dict]) -> list[bool]:
    """For each check whether the answer passes it, degenerate or not."""
    return [call_check(text, check) for check in checks]


def score(text: str, checks: list[dict]) -> float:
    """The share of checks passed, in [0, 1]; 0.0 for an answer without a word and for a degenerate one."""
    if not checks:
        raise ValueError("score needs at least one check, got none")
    return 0.0 if is_degenerate(text) else sum(passed(text, checks)) / len(checks)


def validate_checks(checks: list[dict], where: str) -> None:
    """Raise UserError, which names `where` (a prompt's id) and what is allowed, unless every check can be called."""
    if not isinstance(checks, list) or not checks:
        raise UserError(f'{where}: checks must be a list of at least one {{"name": ..., arguments}}, got {checks!r}')
    for check in checks:
        if not isinstance(check, dict) or not isinstance(check.get("name"), str):
            raise UserError(f'{where}: a check must be an object with a "name", got {check!r}')
        name = check["name"]
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"{where}: unknown check {name!r}{hint}; known checks: {', '.join(sorted(CHECKS))}")
        allowed = list(inspect.signature(CHECKS[name]).parameters)[1:]
        takes = f"{name} takes " + (", ".join(f"{a} ({ARGUMENTS[a][1]})" for a in allowed) or "no arguments")
        given = [key for key in check if key != "name"]
        for key in given:
            if key not in allowed:
                raise UserError(f"{where}: check {name!r} has an unknown argument {key!r}; {takes}")
        for key in allowed:
            if key not in given:
                raise UserError(f"{where}: check {name!r} lacks the argument {key!r}; {takes}")
            if not ARGUMENTS[key][0](check[key]):
                raise UserError(f"{where}: check {name!r} got {key}={check[key]!r}; {takes}")


def load_prompts(path: str | Path = PROMPTS, split: str | None = None, need_checks: bool = True) -> list[dict]:
    """Read and validate a prompt file; return its prompts, or those of one split.

    The default file is the repository's, from wherever a script runs; any other relative path starts at the
    working directory. With `need_checks=False` (a judge scores the answers) "checks" may be absent or empty.
    Raises UserError, naming the file and the prompt's id, for whatever is wrong.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    file = Path(__file__).resolve().parent.parent / PROMPTS if str(path) == PROMPTS else Path(path)
    if not file.is_file():
        raise UserError(f"no prompt file at {file.absolute()}")
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: must be a list of at least one prompt, not {str(rows)[:40]}")

    seen: dict[str, str] = {}  # prompt text without case and spacing -> its split
    ids = set()
    for i, row in enumerate(rows):
        where = f"{file}: prompt {row['id']!r}" if isinstance(row, dict) and "id" in row else f"{file}: entry {i + 1}"
        needed = ("id", "prompt", "split", "checks") if need_checks else ("id", "prompt", "split")
        missing = [key for key in needed if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(f"{where}: lacks {', '.join(missing)}; every prompt is an object with {', '.join(needed)}")
        for key in ("id", "prompt"):
            if not isinstance(row[key], str) or not row[key].strip():
                raise UserError(f"{where}: {key} must be a text that is not empty, got {row[key]!r}")
        if row["id"] in ids:
            raise UserError(f"{where}: this id stands twice")
        ids.add(row["id"])
        if row["split"] not in SPLITS:
            raise UserError(f"{where}: split must be one of {', '.join(SPLITS)}, got {row['split']!r}")
        if need_checks or row.get("checks"):
            validate_checks(row["checks"], where)
        text = " ".join(row["prompt"].casefold().split())
        if text in seen and seen[text] != row["split"]:
            raise UserError(f"{where}: the same prompt stands in both splits")
        if text in seen and row["split"] == "heldout":
            raise UserError(f"{where}: the same prompt is held out twice, and would count twice; take one out")
        seen[text] = row["split"]

    rows = [row for row in rows if split in (None, row["split"])]
    if not rows:
        raise UserError(f"{file}: no prompt has split {split!r}")
    return rows


def load_judge(spec: str):
    """`module:function` -> a callable judge(prompt, completion) -> float.

    The module is looked for in the working directory first, then among what Python can import. Raises UserError.
    """
    module_name, _, function_name = spec.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise UserError(f"judge must be module:function, such as my_judge:judge, got {spec!r}")
    stem = Path.cwd().joinpath(*module_name.split("."))
    own = [file for file in (stem.with_name(stem.name + ".py"), stem / "__init__.py") if file.is_file()]
    try:
        if own:
            module_spec = importlib.util.spec_from_file_location(module_name, own[0])
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[module_name] = module  # dataclasses and pickle look it up by name
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        reason = (
            f"{own[0]} imports it; for modules beside it set PYTHONPATH=." if own else f"{stem}.py is no file either"
        )
        raise UserError(f"judge {spec!r}: Python finds no module {error.name!r}, and {reason}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"judge {spec!r}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    if function_name not in vars(module):
        raise UserError(f"judge {spec!r}: {module.__file__} has no {function_name!r}")
    judge = vars(module)[function_name]
    if not callable(judge):
        raise UserError(f"judge {spec!r}: {function_name} is a {type(judge).__name__}, not a function")
    return judge


def call_judge(judge, prompt: str, completion: str) -> float:
    """The judge's score as a finite float; UserError, naming judge, prompt and answer, for anything else it does."""
    name = getattr(judge, "__qualname__", repr(judge))
    where = f"judge {name} on prompt {prompt!r} and completion {completion!r}"
    try:
        value = judge(prompt, completion)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} raised {type(error).__name__}: {error}") from error
    try:
        result = math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception as error:
        raise UserError(f"{where} returned {value!r}, which is not a number") from error
    if not math.isfinite(result):
        raise UserError(f"{where} returned {value!r}, which is not a finite number")
    return result
