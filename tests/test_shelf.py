"""Pictures of running jobs are in memory once each, as long as somebody has them, and within bounds."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from redis import Redis

from common import keys
from common.messages import Sampling
from tests.desk import Desk
from tests.vision_models import digest, picture, png
from worker.scout import Candidate
from worker.sequence import Picture, Prompt
from worker.shelf import Shelf

IMAGES = [picture(30, 20, seed) for seed in range(4)]
BYTES = len(png(IMAGES[0]))
ROOM = 2 * BYTES + BYTES // 2


def prompt(*shown: int) -> Prompt:
    """Make a prompt as the scout hands it over."""
    none = np.zeros(0, np.int32)
    seen = tuple(Picture(i, i + 4, digest(IMAGES[i]), none, nbytes=len(png(IMAGES[i]))) for i in shown)
    return Prompt(none, Sampling(), pictures=seen)


@pytest.fixture
def stored(redis: Redis) -> Redis:
    for image in IMAGES:
        redis.set(keys.image(digest(image)), png(image))
    return redis


def start(shelf: Shelf, redis: Redis, *shown: int) -> Prompt:
    """Do what a worker does with a job that goes."""
    wanted = prompt(*shown)
    return wanted.showing(shelf.fetch(redis, wanted.pictures))


def test_jobs_of_one_picture_share_it(stored: Redis) -> None:
    shelf = Shelf(10**6, lately_bytes=1)
    first, second = start(shelf, stored, 0), start(shelf, stored, 0, 1)
    third = start(shelf, stored, 0)
    assert first.pictures[0].data is second.pictures[0].data is third.pictures[0].data
    assert first.pictures[0].data == png(IMAGES[0])


def test_a_picture_goes_with_the_last_job_that_has_it_but_for_those_used_lately(stored: Redis) -> None:
    shelf = Shelf(10**6, lately_bytes=BYTES + 1)
    running = [start(shelf, stored, i) for i in range(4)]
    assert len(shelf.held) == 4
    running.clear()
    gc.collect()
    assert list(shelf.held) == [digest(IMAGES[3])]


def test_jobs_whose_pictures_do_not_fit_wait_until_others_have_ended(stored: Redis) -> None:
    shelf = Shelf(10**6, most_bytes=ROOM)
    running = [start(shelf, stored, 0), start(shelf, stored, 1)]
    assert not shelf.make_room([prompt(2)])
    assert shelf.make_room([prompt(0, 1)]), "what is there already takes no room"
    assert shelf.make_room([prompt()])
    assert shelf.make_room([prompt(2), prompt()]), "a text does not wait behind it"
    running.clear()
    assert shelf.make_room([prompt(2), prompt(3)])
    assert not shelf.make_room([prompt(2), prompt(3), prompt(1)])


def test_a_job_with_more_pictures_than_fit_runs_alone(stored: Redis) -> None:
    shelf = Shelf(10**6, most_bytes=BYTES // 2)
    assert shelf.make_room([prompt(0, 1, 2)])
    assert not shelf.make_room([prompt(0), prompt(1)])
    running = start(shelf, stored, 0)
    assert not shelf.make_room([prompt(1)])
    assert shelf.make_room([prompt(0)])
    assert running.pictures[0].data is not None


def test_a_job_with_many_pictures_is_not_passed_for_ever_by_those_with_few(desk: Desk, stored: Redis) -> None:
    desk.pump._ready = True
    desk.pump._shelf = shelf = Shelf(10**6, most_bytes=ROOM)
    waiting = [Candidate(f"j{n}", "radixq", prompt(*shown)) for n, shown in enumerate([(0, 1), (2,), (3,), ()])]
    desk.pump._offers = waiting
    running = [start(shelf, stored, 2), start(shelf, stored, 3)]
    assert desk.pump._due(None) == waiting[3:], "a text"
    running.pop()
    assert desk.pump._due(None) == waiting[3:], "one with picture 2 would fit, and then the first never"
    running.clear()
    assert waiting[0] in desk.pump._due(None)


def test_a_picture_that_is_gone_is_left_out(stored: Redis) -> None:
    stored.delete(keys.image(digest(IMAGES[1])))
    found = Shelf(10**6).fetch(stored, prompt(0, 1).pictures)
    assert list(found) == [digest(IMAGES[0])]
