"""Is exactly what the assistant says trained on? The supervised tokens are decoded and compared with the conversations in the files.

The labels came from character spans. Nothing of those is used here but the style's words round an answer, which a conversation made up
for it shows.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qlora_lightning.data.audit import SPOILED, in_both
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.dataset import TRUNCATED
from qlora_lightning.data.excerpts import supervised_texts
from qlora_lightning.data.rendering import PaperRenderer
from qlora_lightning.data.rows import Conversation, Message
from qlora_lightning.verify.outcome import NONE, Findings, Measurement

_ANSWER = "quinquaginta"  # a word that no style writes of its own
_BEFORE = "quot\n"


class _Frame(NamedTuple):
    """What a style writes round an answer that belongs to it: a blank, say, and the end token."""

    lead: str
    tail: str


def labels(data: InstructionDataModule, examples: Sequence[int]) -> Findings:
    """Count the examples whose supervised tokens are not their answers, and what ``data inspect --strict`` counts in all examples.

    Args:
        data: set up for a fit.
        examples: those to decode, by index.
    """
    audit = _Decoded(data)
    wrong = [place for place, right in audit.compared(examples) if not right]
    counts = _problems(data)
    return Findings(
        [
            Measurement(f"of {len(examples)} examples, trained on other than their answers", len(wrong), NONE),
            Measurement(f"problems in all {len(data.train_set):,} examples", sum(counts.values()), NONE),
        ],
        "; ".join([*wrong[:3], *(f"{name}: {count:,}" for name, count in counts.items() if count)]),
    )


def _problems(data: InstructionDataModule) -> dict[str, int]:
    """As ``audit.Audit.problems``, of the training part."""
    report = data.train_report
    assert report is not None
    return {name: report.skipped.get(reason, 0) for reason, name in SPOILED.items()} | {
        "examples with an answer that lost its end token": report.lost_ends,
        "examples that open with two BOS": report.doubled_bos,
        "boundary tokens": report.straddling_tokens,
        "examples in both the training and the validation part": in_both(data.train_set, data.val_set) if data.val_set else 0,
    }


class _Decoded:
    def __init__(self, data: InstructionDataModule) -> None:
        self.data, self.dataset = data, data.train_set
        renderer = PaperRenderer(data.tokenizer) if data.spec.compat == "paper" else data.renderer
        rendering = renderer.render([Message("user", "quot"), Message("assistant", _ANSWER)])
        assert rendering is not None
        start, end = rendering.supervised[0]
        lead, _, tail = rendering.text[start:end].partition(_ANSWER)
        self.frame = _Frame(lead, tail)

    def compared(self, examples: Sequence[int]) -> Iterator[tuple[str, bool]]:
        """The place of each example, and whether it is trained on the answers of a conversation in its row."""
        borders = np.cumsum([number for number, _ in self.dataset.parts])
        members: dict[int, list[int]] = defaultdict(list)
        for index in dict.fromkeys(examples):
            members[int(np.searchsorted(borders, index, side="right"))].append(index)
        for number, mine in members.items():
            one = self.data.sets[number]
            rows = {index: int(self.dataset.columns["row"][index]) for index in mine}
            found = one.training_conversations(set(rows.values()))
            for index, row in rows.items():
                yield f"{one.spec.name}, row {row + 1:,}", any(self._equal(index, conversation) for conversation in found[row])

    def _equal(self, index: int, conversation: Conversation) -> bool:
        spoken = supervised_texts(self.dataset[index], self._decode)
        if self.data.spec.train_on_source:
            return len(spoken) == 1 and _in_order(spoken[0], [message.content.strip() for message in conversation])
        answers = [message.content for message in conversation if message.role == "assistant"]
        if self.dataset.columns["flags"][index] & TRUNCATED:
            return all(any(self._part_of(text, answer) for answer in answers) for text in spoken)
        return len(spoken) == len(answers) and all(self._same(*pair) for pair in zip(spoken, answers, strict=True))

    def _same(self, text: str, answer: str) -> bool:
        """To the character, but for blanks round an answer, which some styles strip, and for what the tokenizer does not keep."""
        leads = {self.frame.lead, ""} if self.frame.lead.strip() else {self.frame.lead}  # words, not a blank: of a last answer alone
        whole = [lead + body + self.frame.tail for lead in leads for body in (answer, answer.strip())]
        return text in whole or text in map(self._through, whole)

    def _part_of(self, text: str, answer: str) -> bool:
        """Of an answer that a limit has cut at one end; half a letter may be left there."""
        body = text.removesuffix(self.frame.tail).removeprefix(self.frame.lead).strip(" \n\ufffd")
        return any(one.startswith(body) or one.endswith(body) for one in (answer.strip(), self._through(answer).strip()))

    def _through(self, text: str) -> str:
        """What is left of a text behind a line's end when it has been tokens."""
        before, whole = (self._decode(self.data.tokenizer.encode(one, add_special_tokens=False)) for one in (_BEFORE, _BEFORE + text))
        return whole.removeprefix(before)

    def _decode(self, ids: list[int]) -> str:
        return str(self.data.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _in_order(text: str, parts: Sequence[str]) -> bool:
    place = 0
    for part in parts:
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True
