"""What counts as equal, and when a check has failed."""

import json
import math

import pytest
import torch

from qlora_lightning.errors import UserError
from qlora_lightning.verify.outcome import BITS, Bound, Findings, Measurement, Outcome, carry_out, relative


def test_differences_are_relative_and_zero_only_for_equal_values() -> None:
    one = torch.tensor([3.0, 4.0])
    assert relative(one, one.clone()) == 0
    assert relative(torch.tensor([3.0, 4.5]), one) == pytest.approx(0.1)
    assert relative(torch.nextafter(one, one + 1), one) > 0
    assert relative(one, torch.zeros(2)) == 1 and relative(torch.zeros(2), torch.zeros(2)) == 0
    assert math.isnan(relative(torch.tensor([math.nan, 4.0]), one))


@pytest.mark.parametrize(("difference", "verdict"), [(0.0, "passed"), (1e-30, "failed"), (math.nan, "failed"), (math.inf, "failed")])
def test_bit_for_bit_is_no_difference_at_all(difference: float, verdict: str) -> None:
    outcome = Outcome("resume", 1.0, [Measurement("adapter", 0.0, BITS), Measurement("loss", difference, BITS)])
    assert outcome.verdict == verdict
    json.loads(json.dumps(outcome.document(), allow_nan=False))


def test_a_check_that_measured_nothing_has_neither_passed_nor_failed() -> None:
    assert carry_out("fused", lambda: Findings(note="no GPU")).verdict == "not here"
    assert carry_out("loss", lambda: Findings([Measurement("loss", 0.9, Bound(1.0, "a guess"))])).verdict == "passed"


def test_a_users_error_fails_its_check_alone() -> None:
    def refuse() -> Findings:
        raise UserError("the checkpoint holds another run")

    outcome = carry_out("resume", refuse)
    assert (outcome.verdict, outcome.document()["note"]) == ("failed", "the checkpoint holds another run")
