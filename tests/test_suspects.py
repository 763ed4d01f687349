"""The rules by which suspects of a crash run again, without any process."""

from __future__ import annotations

import pytest

from worker.suspects import LONE_SILENT, LONE_SPOKE, Suspicion, judge, may_join


@pytest.mark.parametrize("num_jobs", [2, 3, 7, 32, 40])
@pytest.mark.parametrize("place", ["first", "last"])
def test_one_culprit_among_many_is_found_in_about_log2_crashes_and_all_others_finish(num_jobs: int, place: str) -> None:
    culprit = 0 if place == "first" else num_jobs - 1
    suspicions = {job: judge(None, together=num_jobs, tokens=0, spoke=True) for job in range(num_jobs)}
    crashes, finished = 1, set()
    while suspicions:
        running: list[int] = []
        for job in sorted(suspicions, key=lambda job: -limit(suspicions[job])):
            if may_join(limit(suspicions[job]), [limit(suspicions[other]) for other in running]):
                running.append(job)
        if culprit not in running:
            finished |= set(running)
            for job in running:
                del suspicions[job]
            continue
        crashes += 1
        for job in running:
            verdict = judge(suspicions[job], together=len(running), tokens=3, spoke=True)
            if verdict is None:
                del suspicions[job]
                assert job == culprit
            else:
                suspicions[job] = verdict
    assert finished == set(range(num_jobs)) - {culprit}
    assert crashes <= (num_jobs - 1).bit_length() + LONE_SPOKE


def limit(suspicion: Suspicion | None) -> int:
    assert suspicion is not None
    return suspicion.limit


@pytest.mark.parametrize(("spoke", "times"), [(True, LONE_SPOKE), (False, LONE_SILENT)])
def test_a_job_alone_is_given_up_when_it_crashes_in_the_same_place_again_and_again(spoke: bool, times: int) -> None:
    suspicion: Suspicion | None = None
    for _ in range(times - 1):
        suspicion = judge(suspicion, together=1, tokens=500, spoke=spoke)
        assert suspicion is not None
    assert judge(suspicion, together=1, tokens=510, spoke=spoke) is None


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 400), (100, 400), (4000, 5000)])
def test_crashes_in_different_places_do_not_add_up(first: int, second: int) -> None:
    suspicion: Suspicion | None = None
    for tokens in (first, second) * 10:
        suspicion = judge(suspicion, together=1, tokens=tokens, spoke=True)
        assert suspicion == Suspicion(1, 1, tokens)


def test_a_job_above_suspicion_never_runs_with_a_suspect() -> None:
    assert may_join(0, [0, 0])
    assert not may_join(0, [2])
    assert not may_join(2, [0])
    assert may_join(2, [2])
    assert not may_join(2, [2, 2])
    assert not may_join(4, [1])
    assert may_join(1, [])


@pytest.mark.parametrize("text", [None, b"", b"one two", b"1 2 3 4"])
def test_what_is_no_suspicion_is_none(text: bytes | None) -> None:
    assert Suspicion.parse(text) is None
    assert Suspicion.parse(str(Suspicion(3, 1, 70)).encode()) == Suspicion(3, 1, 70)
