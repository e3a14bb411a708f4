"""A run is its list of choices."""

from __future__ import annotations

from pathlib import Path

import pytest

from ublk_trio.kernel_sim import (
    Choice,
    Choices,
    FirstChoice,
    RecordedChoices,
    ReplayDivergedError,
    SeededChoices,
    hypothesis_choices,
)


def test_first_choice_is_always_zero() -> None:
    """Calm means option 0 to every question, and no trace that would grow without bound."""
    choices = FirstChoice()
    assert choices.calm
    assert [choices.choose("what", options) for options in (1, 2, 100)] == [0, 0, 0]
    assert choices.trace == []
    recording = FirstChoice(record=True)
    assert not recording.calm
    assert recording.choose("what", 2) == 0
    assert recording.trace == [Choice("what", 2, 0)]


def test_same_seed_same_answers() -> None:
    """A seed decides every answer, and every answer is one of the options."""

    def answers(choices: Choices) -> list[int]:
        return [choices.choose("what", options) for options in range(1, 50)]

    assert answers(SeededChoices(7)) == answers(SeededChoices(7))
    assert answers(SeededChoices(7)) != answers(SeededChoices(8))
    assert all(answer < options for options, answer in enumerate(answers(SeededChoices(7)), 1))
    assert set(answers(SeededChoices(7, calm_percent=100))) == {0}


def test_one_option_is_no_question() -> None:
    """What leaves no choice is neither asked nor recorded, so traces stay short."""
    choices = hypothesis_choices(lambda what, options: pytest.fail("asked"))
    assert choices.choose("what", 1) == 0
    assert choices.trace == []


def test_recorded_answers_replay(tmp_path: Path) -> None:
    """A saved trace gives the same answers to the same questions, and says so when it is used up."""
    original = SeededChoices(3)
    answers = [original.choose("what", 10) for _ in range(20)]
    original.save_trace(tmp_path / "trace")
    replayed = RecordedChoices.load(tmp_path / "trace")
    assert [replayed.choose("what", 10) for _ in range(20)] == answers
    assert replayed.remaining == 0
    with pytest.raises(ReplayDivergedError, match="ends after 20 decisions"):
        replayed.choose("what", 10)


@pytest.mark.parametrize(("what", "options"), [("other", 4), ("what", 5)])
def test_replay_notices_another_question(what: str, options: int) -> None:
    """A replay never answers a question that the recording did not hear."""
    choices = RecordedChoices([Choice("what", 4, 3)])
    with pytest.raises(ReplayDivergedError, match=f"decision 0: recorded what of 4, but the run asks for {what} of"):
        choices.choose(what, options)
    assert choices.choose("what", 4) == 3


def test_replay_may_go_on() -> None:
    """A prefix of a run may be fixed and its rest be chosen freely."""
    choices = RecordedChoices([Choice("what", 4, 3)], then=FirstChoice())
    assert [choices.choose("what", 4), choices.choose("more", 9)] == [3, 0]
