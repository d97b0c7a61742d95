"""What a judge is asked about two answers, and what its reply says: review prompts, and the verdict in a reply."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from qlora_lightning.data.files import read_rows
from qlora_lightning.errors import UserError

Mode = Literal["pairwise", "relative"]
"""``pairwise``: which answer is better, 1, 2, or 3 for neither. ``relative``: a score from 1 to 10 for each."""
UNPARSED = -1
"""Score of a reply without a verdict that can be read. It is kept as such: counted as a tie it would pull ratings together."""
Score = int | list[float]

_BLANKS = ("question", "answer_1", "answer_2")
_FALLBACKS = ("general", "generic")  # categories whose prompt serves every question without one of its own


@dataclass(frozen=True)
class ReviewPrompt:
    """How a judge is asked, with blanks for the question and the two answers."""

    system_prompt: str
    template: str
    """Text with {question}, {answer_1}, {answer_2} and the names in ``defaults``, as of str.format."""
    defaults: Mapping[str, str]
    category: str

    def messages(self, question: str, answer_1: str, answer_2: str) -> list[dict[str, str]]:
        """The chat that asks for a verdict. Braces in questions and answers stay what they are."""
        text = self.template.format(question=question, answer_1=answer_1, answer_2=answer_2, **self.defaults)
        return [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": text}]


class ReviewPrompts:
    """The prompts of a judge, one for each category of question that is to be judged in its own way."""

    def __init__(self, prompts: list[ReviewPrompt]) -> None:
        self._by_category = {prompt.category: prompt for prompt in prompts}
        self._fallback = next((self._by_category[name] for name in _FALLBACKS if name in self._by_category), None)

    def choose(self, category: str) -> ReviewPrompt:
        """The prompt of a category, else the one for general questions.

        Raises:
            UserError: there is neither.
        """
        prompt = self._by_category.get(category, self._fallback)
        if prompt is None:
            known = ", ".join(self._by_category)
            raise UserError(f"no review prompt for questions of category {category!r}, only for {known}; add one of category 'general'")
        return prompt

    @property
    def digest(self) -> str:
        """Hash of all wordings: verdicts on other prompts are no part of the same tournament."""
        return digest([asdict(prompt) for prompt in self._by_category.values()])


_SYSTEM = "You compare the answers of two assistants, fairly and exactly. You never favour an answer for its place or its length."
_TEMPLATE = """\
<question>
{question}
</question>

<answer_of_assistant_1>
{answer_1}
</answer_of_assistant_1>

<answer_of_assistant_2>
{answer_2}
</answer_of_assistant_2>

{task}"""
_CRITERIA = """\
Judge how well each answer serves the person who asked: is it correct, does it address what was asked, is it complete without padding, \
is it clear? Work out questions of mathematics, logic or programming yourself before you look at the answers. An answer that breaks off, \
goes on with a conversation of its own or is in another language than the question calls for is worse for it."""
_TASKS: dict[Mode, str] = {
    "pairwise": f"""{_CRITERIA}

First explain your comparison in a few sentences. Then end with a line that holds one digit and nothing else: 1 if the answer of \
assistant 1 is better, 2 if that of assistant 2 is better, 3 if they are equally good.""",
    "relative": f"""{_CRITERIA}

Score each answer from 1 (useless) to 10 (could not be better). Write the two scores on the first line, that of assistant 1 first, \
separated by a blank and with nothing else on that line. Then explain them in a few sentences.""",
}


def own_prompts(mode: Mode) -> ReviewPrompts:
    """The prompts that come with the tool: one wording for every category."""
    return ReviewPrompts([ReviewPrompt(_SYSTEM, _TEMPLATE, {"task": _TASKS[mode]}, "general")])


def read_review_prompts(path: str | Path) -> ReviewPrompts:
    """Prompts from a file of rows ``{system_prompt, prompt_template, defaults, category}``, as the QLoRA authors publish them.

    Raises:
        UserError: a row lacks a field, its template a blank, or a blank has no value.
    """
    return ReviewPrompts([_prompt(row, where) for where, row in read_rows(path)])


def _prompt(row: Mapping[str, Any], where: str) -> ReviewPrompt:
    for name, kind in (("system_prompt", str), ("prompt_template", str), ("defaults", dict), ("category", str)):
        if not isinstance(row.get(name), kind):
            found = ", ".join(row) or "nothing"
            raise UserError(f"{where}: a review prompt needs {name} ({kind.__name__}), found {found}; give a file of review prompts")
    template, defaults = row["prompt_template"], row["defaults"]
    try:
        blanks = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise UserError(f"{where}: prompt_template has a stray brace ({error}); write {{{{ or }}}} for a brace that stays") from error
    for missing in set(_BLANKS) - blanks:
        raise UserError(f"{where}: prompt_template must hold {{{missing}}}, found {', '.join(sorted(blanks)) or 'no blanks'}; add it")
    for unknown in blanks - {*_BLANKS, *defaults}:
        raise UserError(f"{where}: prompt_template holds {{{unknown}}}, which is not in defaults; add a value for it there")
    return ReviewPrompt(row["system_prompt"], template, defaults, row["category"])


_MARKS = " \t*_`#\"'[]"  # what Markdown and models put round a verdict
_END = ".!。 "
# A verdict's label, such as "Best answer:", ends in a colon (\uff1a is the one of Chinese and Japanese) and holds no digit.
_CHOICE = re.compile(r"(?:[^\d:\uff1a]{1,40}[:\uff1a][\s*_`]*)?([123])")
_NUMBER = r"(\d{1,2}(?:\.\d+)?)"
_SCORES = re.compile(rf"\(?\s*{_NUMBER}(\s*[,/]\s*|\s+){_NUMBER}\s*\)?")
_TUPLE = re.compile(rf"(?:[^\d:\uff1a()]{{1,40}}[:\uff1a]\s*)?\(\s*{_NUMBER}(\s*,\s*){_NUMBER}\s*\)")


def parse_score(mode: Mode, reply: str, cut: bool = False) -> Score:
    """The verdict in a judge's reply, ``UNPARSED`` where none can be read without guessing.

    Pairwise: 1, 2 or 3 alone on the last line that is not blank; Markdown, a full stop and a label that ends in a colon ("Best answer: 2")
    may stand by it. A sentence with a digit in it ("the best answer is that of Assistant 2, as Assistant 1 …") is not read.

    Relative: two numbers from 0 to 10 alone on the first line, separated by blanks, a comma or a slash; or, where the first line holds no
    scores, a tuple alone on the last one, which the authors' prompt for mathematics asks for. Tuples elsewhere are not read: they may
    be points of the problem. 0 is off the scale that the prompts name, but judges give it, and the published percentages count it.
    "8/10" is not read: it may be one score out of ten.

    Args:
        mode: What the judge was asked for.
        reply: All that it wrote.
        cut: The reply broke off at its longest length, so that its last line is no conclusion.
    """
    lines = [stripped for line in reply.splitlines() if (stripped := line.strip(_MARKS).rstrip(_END).strip(_MARKS))]
    first, last = (lines[0], "" if cut else lines[-1]) if lines else ("", "")
    if mode == "pairwise":
        choice = _CHOICE.fullmatch(last)
        return int(choice[1]) if choice else UNPARSED
    scores = _SCORES.fullmatch(first) or _TUPLE.fullmatch(last)
    return UNPARSED if scores is None else _within_scale(float(scores[1]), scores[2].strip(), float(scores[3]))


def _within_scale(first: float, separator: str, second: float) -> Score:
    if max(first, second) > 10 or (separator == "/" and second == 10):
        return UNPARSED
    return [first, second]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value: what verdicts depend on, in short."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
