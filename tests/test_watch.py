"""When a scout is late, and when its death is held against a job or against the tokenizer, without any process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from common.errors import InternalError, ModelNotLoaded
from worker.diary import Diary
from worker.watch import LATE_S, MOST_CULPRITS, TRYING, Watch, entry

SIGABRT = -6


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def diary() -> Iterator[Diary]:
    diary = Diary()
    yield diary
    diary.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(diary: Diary, clock: Clock) -> Watch:
    return Watch(diary, "my-model", clock)


def died(watch: Watch, diary: Diary, job_id: str, num_prepared: int = 0) -> tuple[int, str]:
    diary.write(entry(num_prepared, 2, job_id))
    return watch.culprit(SIGABRT)


def test_the_job_that_was_being_prepared_is_the_culprit_and_the_next_diary_is_empty(watch: Watch, diary: Diary) -> None:
    assert died(watch, diary, "an id \udcff with spaces") == (2, "an id \udcff with spaces")
    assert diary.read() == ""


def test_different_jobs_in_a_row_with_none_prepared_between_are_held_against_the_tokenizer(
    watch: Watch, diary: Diary
) -> None:
    names = [f"job{number}" for number in range(MOST_CULPRITS)]
    for name in names[:-1]:
        assert died(watch, diary, name) == died(watch, diary, name) == (2, name)  # the second time it is given up
    with pytest.raises(ModelNotLoaded, match="my-model ended .* different jobs in a row") as caught:
        died(watch, diary, names[-1])
    assert all(name in str(caught.value) for name in names)


def test_a_job_that_could_be_prepared_between_clears_the_tokenizer(watch: Watch, diary: Diary) -> None:
    for number in range(3 * MOST_CULPRITS):
        assert died(watch, diary, f"job{number}", num_prepared=number % 2)[1] == f"job{number}"


def test_a_tokenizer_that_dies_before_any_job_is_at_fault_and_a_scout_that_was_at_nothing_is_a_defect(
    watch: Watch, diary: Diary
) -> None:
    diary.write(TRYING)
    with pytest.raises(ModelNotLoaded, match=r"my-model ended .* over a single word, exit status -6"):
        watch.culprit(SIGABRT)
    with pytest.raises(InternalError, match="exit status -9"):
        watch.culprit(-9)


def test_only_a_scout_that_is_at_one_thing_for_long_is_late(watch: Watch, diary: Diary, clock: Clock) -> None:
    for line in (TRYING, entry(0, 0, "a"), entry(1, 0, "b"), entry(2, 0, "a"), ""):
        diary.write(line)
        assert not watch.late()
        clock.now += LATE_S
        assert not watch.late()
    clock.now += 10 * LATE_S
    assert not watch.late()
    diary.write(entry(2, 0, "c"))
    assert not watch.late()
    clock.now += LATE_S + 1
    assert watch.late()
    assert not watch.late()  # it was told; should it live on, it is told again
    clock.now += LATE_S + 1
    assert watch.late()
