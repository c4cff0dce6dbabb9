"""Free response: the model writes, the answer is found in what it wrote and compared.

Plain answers only: numbers, fractions, words. An expression is not worked out, so writing the question down again
earns nothing.
"""

import re
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from typing import Any

from rwkvpipe.base.config import BenchmarkConfig
from rwkvpipe.base.errors import DataError
from rwkvpipe.tasks.metrics import mean_with_interval

PROMPT = BenchmarkConfig.model_fields["prompt"].default
LONGEST = 400  # digits of a number; longer ones are compared as text

WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
MINUS = dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2212, 0xFE63), "-")
SPACES = dict.fromkeys((0xA0, 0x2002, 0x2003, 0x2007, 0x2009, 0x200A, 0x202F, 0x205F, 0x3000), " ")
SLASHES = {0x2044: "/", 0x2215: "/", 0xD7: "*", 0xF7: "/", 0x22C5: "*"}
VULGAR = {0xBC: " 1/4", 0xBD: " 1/2", 0xBE: " 3/4", 0x2153: " 1/3", 0x2154: " 2/3"}
PLAIN = WIDE | MINUS | SPACES | SLASHES | VULGAR

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
NUMBER = rf"(?:{DIGITS}(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
MIXED = r"(?:[0-9]+ (?=[0-9]+\s?/\s?[0-9]))?"  # the 2 of 2 1/3
VALUE = re.compile(rf"{MIXED}{NUMBER}(?:\s?/\s?{NUMBER})?")
SAID = re.compile(r"\banswer\s{0,9}(?:is|was|:|=)[\s:=*]{0,9}", re.IGNORECASE)
SENTENCE = re.compile(r"[.!?;](?:\s|$)")
FRACTION = re.compile(r"\\[dtc]?frac\s?(?:\{([^{}]*)\}|([0-9]))\s?(?:\{([^{}]*)\}|([0-9]))")
WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|mbox)\s?\{([^{}]*)\}")
EQUALS = re.compile(r"^\s*[A-Za-z]\s*=")
UNIT = re.compile(r"(?<=[0-9])\s?\\(?:text|mathrm)\s?\{[^{}]*\}\s*$")
LEADING = re.compile(r"(?:[\s*\"'`]|\.(?![0-9])|(?<=\.)\.)+")  # a point before digits is the number's
IN_BRACKETS = re.compile(r"\((\w+)\)")
NOISE = re.compile(r"\\(?:left|right|displaystyle|,|;|!|:| |\(|\)|\[|\])|\$")


def _boxed(text: str) -> str | None:
    r"""What is in the last \boxed{...}; None if there is none or it is not closed."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, first = 0, start + len(r"\boxed")
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first + 1 : place]
    return None


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
    """The last match of a pattern."""
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _fractions(text: str) -> str:
    r"""A text with a/b for \frac{a}{b}, apart from a whole number before it."""

    def plain(found: re.Match) -> str:
        apart = " " * found.string[max(0, found.start() - 1) : found.start()].isdigit()
        return f"{apart}{found[1] or found[2]}/{found[3] or found[4]}"

    return FRACTION.sub(plain, text)


def _joined(text: str, start: int, end: int) -> bool:
    """Whether an operator joins the number at start..end to something beside it: then it is part of an expression."""
    before, after = text[max(0, start - 8) : start].rstrip(), text[end : end + 8].lstrip()
    following = after[1:].lstrip()[:1]
    if after[:1] in ("+", "*", "/", "^") and (following.isalnum() or following == "("):
        return True
    if after[:1] == "-" and following.isdigit():
        return True
    if before[-1:] != "-":
        return before[-1:] in ("+", "*", "/", "^")
    # a minus is a sign unless it stands between two things
    close, far = before[:-1][-1:], before[:-1].rstrip()[-1:]
    return far.isdigit() or far == ")" or close.isalpha()


def _signed(text: str, start: int, end: int) -> str:
    """The number at start..end with its sign."""
    before = text[max(0, start - 8) : start].rstrip()
    minus = before[-1:] == "-" and (text[start - 1] == "-" or before[:-1].rstrip()[-1:] in ("", "="))
    return ("-" if minus else "") + text[start:end]


def _said(text: str) -> str | None:
    """What follows the last `answer is` or `answer:`, to the end of the sentence; what it equals, if that is said."""
    found = _last(SAID, text)
    if found is None:
        return None
    phrase = SENTENCE.split(text[found.end() :].partition("\n")[0], maxsplit=1)[0]
    phrase = phrase.rpartition("=")[2].strip(" *\"'`")
    value = VALUE.search(phrase)
    if value and not phrase[: value.start()].strip(" -$(") and not _joined(phrase, value.start(), value.end()):
        return _signed(phrase, value.start(), value.end())
    return phrase or None


def extract(text: str) -> str:
    r"""The answer in a text: what is boxed, or follows `####` or `answer is`; else its last number; else all of it.

    A number that an operator joins to another (`376+1410`) is no answer: the expression comes back as it stands.
    """
    text = str(text).translate(PLAIN).strip()
    if (boxed := _boxed(text)) is not None:
        return boxed.strip()
    text = _fractions(text)
    if "####" in text:
        text = text.rpartition("####")[2].strip().partition("\n")[0]
    elif said := _said(text):
        return said
    last = _last(VALUE, text)
    if last is None:
        return text
    if _joined(text, last.start(), last.end()):
        return re.split(r"[=\n:]", text[: last.end()])[-1].strip()
    return _signed(text, last.start(), last.end())


def _tidy(text: str) -> str:
    """A text without what does not matter: wrappers, dollar signs, units of percent and degree, spaces, case."""
    text = WRAPPER.sub(r"\1", NOISE.sub("", text.translate(PLAIN).replace(r"\$", "").replace("{,}", ",")))
    text = re.sub(r"\^\s?\{?\\(?:circ|degree)\}?|\\?%|\u00b0", "", text)
    text = re.sub(r"\s+", " ", _fractions(text)).rstrip(" .*\"'`").casefold()
    text = text[found.end() :] if (found := LEADING.match(text)) else text
    return found[1] if (found := IN_BRACKETS.fullmatch(text)) else text


def number(text: str) -> Fraction | None:
    """The value of a plain number or simple fraction (`-1,786`, `0.5`, `3/4`, `2 1/3`); None for anything else."""
    text = _tidy(text)
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-").strip() if text[:1] in ("+", "-") else text
    text = re.sub(r"\s?/\s?", "/", text)
    parts = re.fullmatch(rf"(?:([0-9]+) )?(-?{NUMBER})(?:/({NUMBER}))?\.?", text) if len(text) <= LONGEST else None
    if parts is None or (parts[1] and not parts[3]):
        return None
    whole, above = Fraction(parts[1] or 0), Fraction(parts[2].replace(",", ""))
    below = Fraction((parts[3] or "1").replace(",", ""))
    return sign * (whole + above / below) if below else None


def _bare(text: str) -> str:
    """A tidied text without spaces around signs, braces around one letter, and leading zeros of overlong numbers."""
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\{(\w)\}", r"\1", _tidy(text)))
    long = text.replace(",", "")
    return (long.lstrip("0") or "0") if long.isascii() and long.isdigit() else text


def _value(text: str, other: str) -> str:
    r"""A text without `x =` before it if the other has none, and without `\text{unit}` if the other is a number."""
    if not EQUALS.search(other):
        text = EQUALS.sub("", text)
    return UNIT.sub("", text) if number(other) is not None else text


def same(gold: str, answer: str) -> bool:
    """Whether two answers are equal: as numbers (1,786 = 1786.0, 0.5 = 1/2), else as texts but for their dress."""
    gold, answer = str(gold), str(answer)
    gold, answer = _value(gold, answer), _value(answer, gold)
    first, second = number(gold), number(answer)
    if first is not None and second is not None:
        return first == second
    return first is None and second is None and _bare(gold) == _bare(answer) != ""


class Answer:
    """Ask by `prompt`, which holds {question}; the row of a question has `question` and `answer`."""

    better = "higher"

    def __init__(self, prompt: str = PROMPT):
        self.template = prompt

    def prompt(self, question: dict) -> str:
        """What the model reads."""
        return self.template.replace("{question}", question["question"])

    def check(self, question: dict) -> None:
        """Raise DataError, naming the column, for a row that cannot be asked and graded."""
        if not isinstance(question.get("question"), str):
            raise DataError("no text under `question`")
        if isinstance(question.get("answer"), bool | dict | list | None):
            raise DataError("no text or number under `answer`, which the model's is compared with")

    def grade(self, question: dict, text: str) -> float:
        """1 if the answer in the text is the right one, else 0. Raises DataError for a row without `answer`."""
        return float(self._right(self.gold(question), extract(text), text))

    def gold(self, question: dict) -> str:
        """The right answer: what `answer` holds, of a worked solution (GSM8K's) what follows `####`."""
        gold = question.get("answer")
        if gold is None:
            raise DataError("a question has no `answer` to compare the model's with")
        return extract(gold) if "####" in str(gold) else str(gold)

    def _right(self, gold: str, found: str, text: str) -> bool:
        value = number(gold)
        if value is None:
            return same(gold, found) or same(gold, text)
        # 10/5 is the question put again where 2 is wanted
        return same(gold, found) and not ("/" in _tidy(found) and value.denominator == 1)

    def ask(
        self, engine: Any, questions: Sequence[dict], spec: BenchmarkConfig, done: Collection[int] = ()
    ) -> Iterator[tuple[int, dict]]:
        """Let the engine answer all questions but those done: (number, what is to be kept of the answer)."""
        left = [n for n in range(len(questions)) if n not in done]
        prompts = [self.prompt(questions[n]) for n in left]
        for found in engine.generate(prompts, spec.sampling, numbers=left):
            yield found.prompt, {"text": found.text, "tokens": len(found.ids), "finish": found.finish}

    def mark(self, question: dict, answer: dict) -> dict:
        """An answer beside its question, graded. Raises DataError for what is no answer."""
        text = answer.get("text")
        if not isinstance(text, str):
            raise DataError("no `text` that a model wrote; no answer to a question of task answer: run bench again")
        found = {"question": question["question"], "gold": self.gold(question), "answer": text}
        found |= {"extracted": extract(text), "correct": self.grade(question, text)}
        return found | {"finish": answer.get("finish")}

    def summary(self, marked: Sequence[dict]) -> dict:
        """Share of right answers with its interval, and the share of answers that came to an end."""
        score, low, high = mean_with_interval([row["correct"] for row in marked])
        ended = sum(row["finish"] == "stop" for row in marked) / len(marked)
        return {"score": score, "low": low, "high": high, "finished": ended}
