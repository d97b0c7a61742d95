"""Who is dead and who is waited for, from what ranks show: by a clock of the test's."""

from qlora_lightning.heartbeats import Beat, Heartbeats


def test_a_rank_that_shows_itself_no_longer() -> None:
    heard = Heartbeats()
    for second in range(10):
        heard.see(0, Beat("a", count=second), second)
        heard.see(1, Beat("b", count=min(second, 3), step=7), second)
        heard.see(2, Beat("b", count=1, left=True), second)  # that one has ended, in order
        heard.see(3, None, second)  # and that one is not there yet
    assert heard.silent(9.0, limit=6.0) is None
    finding = heard.silent(9.0, limit=5.0)
    assert finding is not None
    assert (finding.rank, finding.line.partition(":")[0]) == (1, "no sign of life for 6 s, last seen in step 7")


def waiting(*beats: Beat, limit: float | None = 5.0, seconds: int = 8) -> tuple[int, str] | None:
    """What is found of ranks that show the same for so long."""
    heard, found = Heartbeats(), None
    for second in range(seconds):
        for rank, beat in enumerate(beats):
            heard.see(rank, beat, second)
        found = heard.missing(second, limit)
    return found


def test_a_rank_that_others_wait_for() -> None:
    arrived = Beat("a", step=4, arrived=True)
    finding = waiting(arrived, Beat("b", step=4, at="module.py, line 9, training_step"), arrived)
    assert finding == (
        1,
        "is not at the end of step 4, where others have waited for 5 s: it hangs or is far slower (at module.py, line 9, training_step)",
    )
    assert waiting(Beat("a", step=3, arrived=True), arrived) is not None  # a step behind
    assert waiting(arrived, Beat("b", step=4), seconds=6) is None  # not for long enough
    assert waiting(arrived, Beat("b", step=4), limit=None) is None


def test_nobody_is_missing() -> None:
    arrived = Beat("a", step=4, arrived=True)
    assert waiting(arrived, arrived) is None  # all wait: the sum itself takes long
    assert waiting(Beat("a", step=4), Beat("b", step=4)) is None  # nobody waits yet
    assert waiting(arrived, Beat("b")) is None  # it saves, validates or fetches rows


def test_the_wait_begins_anew_with_each_step() -> None:
    heard = Heartbeats()
    for second in range(12):
        step = 1 + second // 4
        heard.see(0, Beat("a", step=step, arrived=True), second)
        heard.see(1, Beat("b", step=step), second)
        assert heard.missing(second, limit=5.0) is None
