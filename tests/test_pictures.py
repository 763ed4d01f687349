"""Pictures in Redis: there as long as a job needs them and no longer, whatever becomes of the job; read with care."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.utils import as_text

from common import keys, pictures
from common.errors import GenerationFailed, ImageTooLarge, ImageUnreadable, InternalError, InvalidRequest
from common.serializer import JobSerializer
from producer import Ticket, get, submit, submit_many
from producer.album import Picture, store
from tests import documented
from tests.desk import PROMPT_TTL_S, Desk
from tests.models import save_tiny
from tests.processes import Processes
from worker.pictures import SLICE_BYTES, decode, fetch, sizes

ROOT = Path(__file__).resolve().parent.parent
MANY = 10**8
PREFIX = as_text(Job.key_for(""))


def picture(colour: str = "red", width: int = 6, height: int = 4) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def digest(image: Image.Image) -> str:
    return pictures.digest(*image.size, image.tobytes())


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


RED = digest(picture())


def ask(redis: Redis, image: Image.Image | None = None, **options: Any) -> Ticket:
    return submit("What?", images=[image or picture()], redis=redis, **options)


def needed_by(redis: Redis, of: str = RED) -> set[str]:
    ids: Any = redis.zrange(keys.image_jobs(of), 0, -1)
    return {job_id.decode() for job_id in ids}


def expires(redis: Redis, of: str = RED) -> bool:
    """Whether the picture, which is there, has been given a time to live."""
    left = redis.ttl(keys.image(of))
    assert left == -1 or PROMPT_TTL_S - 60 < left <= PROMPT_TTL_S
    return left != -1


def sweep_as_if_later(redis: Redis, *, by_s: int = pictures.GRACE_S + pictures.SWEEP_S) -> int:
    """Sweep as if everything had been written so much earlier."""
    listed: Any = redis.keys("radixq:image:*:jobs")
    for key in (keys.IMAGES, *listed):
        members: Any = redis.zrange(key, 0, -1)
        for member in members:
            redis.zincrby(key, -by_s, member)
    return pictures.sweep(redis, PREFIX, PROMPT_TTL_S)


def empty(redis: Redis) -> None:
    """Do what `rq empty` does."""
    Queue("radixq", connection=redis).empty()  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def _short_lived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADIXQ_PROMPT_TTL_S", str(PROMPT_TTL_S))


@pytest.fixture
def desk(redis_url: str) -> Iterator[Desk]:
    desk = Desk(redis_url)
    yield desk
    desk.close()


def run(desk: Desk, ticket: Ticket) -> Any:
    return desk.take(Job.fetch(ticket.id, connection=desk.redis, serializer=JobSerializer))


# --- how long ---------------------------------------------------------------------------------------------------------


def test_nothing_expires_while_a_job_waits_or_runs(desk: Desk) -> None:
    run(desk, ask(desk.redis))
    ask(desk.redis)
    assert {desk.redis.ttl(key) for key in desk.redis.keys("radixq:image*")} == {-1}
    assert sweep_as_if_later(desk.redis, by_s=10**7) == 0
    assert {desk.redis.ttl(key) for key in desk.redis.keys("radixq:image*")} == {-1}


def test_a_picture_expires_with_the_prompt_of_the_last_job_that_needed_it(desk: Desk) -> None:
    first, second = ask(desk.redis), ask(desk.redis)
    desk.finish(run(desk, first))
    assert needed_by(desk.redis) == {second.id}
    assert not expires(desk.redis)
    desk.fail(run(desk, second), InvalidRequest("wrong"))
    assert expires(desk.redis)
    assert desk.redis.keys("radixq:image*") == [keys.image(RED).encode()]


def test_a_picture_that_is_about_to_expire_stays_for_the_next_job(desk: Desk) -> None:
    desk.finish(run(desk, ask(desk.redis)))
    assert expires(desk.redis)
    ask(desk.redis)
    assert not expires(desk.redis)


def test_a_job_that_will_run_again_still_needs_its_picture(desk: Desk) -> None:
    ticket = ask(desk.redis)
    desk.fail(run(desk, ticket), InternalError("try again"))
    assert ticket.status() == "queued"
    assert needed_by(desk.redis) == {ticket.id}


def test_a_job_that_is_cancelled_needs_no_picture_whether_it_waits_or_runs(desk: Desk) -> None:
    waiting, running = ask(desk.redis), ask(desk.redis)
    flight = run(desk, running)
    assert waiting.cancel()
    assert needed_by(desk.redis) == {running.id}
    assert running.cancel()
    assert expires(desk.redis)
    desk.finish(flight)
    assert expires(desk.redis)


def test_a_job_whose_worker_died_for_the_last_time_needs_no_picture(desk: Desk) -> None:
    flight = run(desk, ask(desk.redis))
    flight.job.retries_left = 0
    desk.outbox.abandon(flight.job)
    assert expires(desk.redis)


@pytest.mark.parametrize("how", ["empty", "delete", "rq cancel", "expire"])
def test_the_picture_of_a_job_that_vanished_is_swept(how: str, desk: Desk) -> None:
    ticket = ask(desk.redis)
    job = Job.fetch(ticket.id, connection=desk.redis, serializer=JobSerializer)
    if how == "empty":
        empty(desk.redis)
    elif how == "delete":
        job.delete()
    elif how == "rq cancel":
        job.cancel()
    else:
        desk.redis.delete(job.key)
    assert not expires(desk.redis)
    assert sweep_as_if_later(desk.redis) == 1
    assert expires(desk.redis)
    assert desk.redis.keys("radixq:image*") == [keys.image(RED).encode()]


def test_the_worker_sweeps_with_rqs_own_maintenance(desk: Desk) -> None:
    Job.fetch(ask(desk.redis).id, connection=desk.redis, serializer=JobSerializer).delete()
    for key in (keys.IMAGES, keys.image_jobs(RED)):
        members: Any = desk.redis.zrange(key, 0, -1)
        for member in members:
            desk.redis.zincrby(key, -(10**7), member)
    desk.worker.run_maintenance_tasks()
    assert expires(desk.redis)


def test_a_picture_whose_job_is_only_about_to_be_queued_is_left_alone(redis: Redis) -> None:
    ask(redis)
    empty(redis)
    assert pictures.SWEEP_S < pictures.GRACE_S // 2  # it is looked at, and left
    assert sweep_as_if_later(redis, by_s=pictures.GRACE_S // 2) == 0
    assert not expires(redis)


def test_one_job_that_waits_keeps_a_picture_through_every_sweep(redis: Redis) -> None:
    tickets = [ask(redis) for _ in range(5)]
    for ticket in tickets[:2] + tickets[3:]:
        Job.fetch(ticket.id, connection=redis, serializer=JobSerializer).delete()
    assert sweep_as_if_later(redis) == 0
    assert tickets[2].id in needed_by(redis)
    assert not expires(redis)
    tickets[2].cancel()
    assert sweep_as_if_later(redis) == 1


def test_many_pictures_are_swept_in_turns(redis: Redis) -> None:
    images = [picture(f"#{n:06x}") for n in range(450)]
    submit_many(({"text": "What?", "images": [image]} for image in images), redis=redis)
    empty(redis)
    freed = [sweep_as_if_later(redis), *(pictures.sweep(redis, PREFIX, PROMPT_TTL_S) for _ in range(3))]
    assert (sum(freed), freed[-1]) == (450, 0)
    assert max(freed) < 450


def test_a_submit_that_is_refused_leaves_nothing_for_ever(redis: Redis) -> None:
    submit("first", job_id="taken", redis=redis)
    with pytest.raises(InvalidRequest, match="is taken"):
        ask(redis, job_id="taken")
    get("taken", redis=redis).cancel()
    sweep_as_if_later(redis)
    assert not redis.exists(keys.image(RED)) or expires(redis)


def test_a_failed_job_that_is_queued_again_by_hand_still_has_its_picture(desk: Desk) -> None:
    ticket = ask(desk.redis)
    desk.fail(run(desk, ticket), InvalidRequest("wrong"))
    FailedJobRegistry("radixq", connection=desk.redis, serializer=JobSerializer).requeue(ticket.id)
    assert desk.redis.ttl(keys.image(RED)) >= desk.redis.ttl(f"rq:job:{ticket.id}")


def test_what_was_stored_twice_at_once_is_there_once_and_whole(redis: Redis) -> None:
    data = png(Image.frombytes("RGB", (900, 700), os.urandom(900 * 700 * 3)))
    for job_id in ("a", "b"):
        store(redis, {job_id: (Picture("1" * 64, data),)}, time.time())
    assert redis.get(keys.image("1" * 64)) == data
    assert needed_by(redis, "1" * 64) == {"a", "b"}


# --- without our package ---------------------------------------------------------------------------------------------


def test_the_documented_way_to_store_a_picture_makes_one_of_our_jobs(
    desk: Desk, redis_url: str, tmp_path: Path
) -> None:
    script = re.findall(r"```python\n(.*?)```", (ROOT / "ops/WIRE.md").read_text(), re.DOTALL)[1]
    ticket = get(documented.run(script, redis_url, tmp_path), redis=redis_url)
    image = picture(width=640, height=480)
    found = fetch(desk.redis, [digest(image)], max_pixels=MANY)
    assert decode(digest(image), found[digest(image)], max_pixels=MANY).tobytes() == image.tobytes()
    sweep_as_if_later(desk.redis)
    assert not expires(desk.redis, digest(image))
    desk.finish(run(desk, ticket))
    assert expires(desk.redis, digest(image))


def test_a_worker_that_reads_only_text_refuses_the_job_and_frees_the_picture(
    redis_url: str, redis: Redis, processes: Processes, tmp_path: Path
) -> None:
    with_picture, without = ask(redis), submit("Hello", max_tokens=2, redis=redis)
    worker = processes.rq_worker(redis_url, "--burst", model=save_tiny(tmp_path / "tiny"))
    assert worker.wait() == 0
    with pytest.raises(GenerationFailed, match="reads text only") as refused:
        with_picture.result(timeout_s=1)
    assert refused.value.code == "unsupported"
    assert without.result(timeout_s=1).status == "finished"
    assert expires(redis)


# --- what the worker reads -------------------------------------------------------------------------------------------


def test_the_worker_gets_what_was_stored_and_its_size_without_it(redis: Redis) -> None:
    images = [picture(colour, 10 + n, 7) for n, colour in enumerate(("red", "blue", "green"))]
    submit("What?", images=images, redis=redis)
    names = [digest(image) for image in images]
    assert sizes(redis, [*names, "0" * 64, names[0]]) == {name: i.size for name, i in zip(names, images, strict=True)}
    found = fetch(redis, [*names, "0" * 64, names[0]], max_pixels=MANY)
    assert list(found) == names
    for name, image in zip(names, images, strict=True):
        assert decode(name, found[name], max_pixels=MANY).tobytes() == image.tobytes()


def test_a_picture_longer_than_any_allowed_is_not_even_fetched(redis: Redis) -> None:
    redis.set(keys.image(RED), bytes(10_000))
    before = redis.info("stats")["total_net_output_bytes"]
    assert fetch(redis, [RED], max_pixels=100) == {}
    assert redis.info("stats")["total_net_output_bytes"] - before < 10_000


def test_the_worst_picture_within_the_bound_is_fetched(redis: Redis) -> None:
    for width, height in ((1, 3000), (3000, 1), (54, 55)):
        image = Image.frombytes("RGB", (width, height), os.urandom(width * height * 3))
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=0)
        redis.set(keys.image(RED), file.getvalue())
        assert fetch(redis, [RED], max_pixels=width * height) == {RED: file.getvalue()}


def test_many_large_pictures_come_in_slices(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{n:064x}" for n in range(5)]
    for name in names:
        redis.set(keys.image(name), bytes(SLICE_BYTES // 2))
    calls = redis.info("commandstats")["cmdstat_get"]["calls"] if "cmdstat_get" in redis.info("commandstats") else 0
    assert list(fetch(redis, names, max_pixels=MANY)) == names
    assert redis.info("commandstats")["cmdstat_get"]["calls"] - calls == 5


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        png(picture())[:50],
        png(picture("blue")),
        png(picture().convert("L")),
        png(picture(width=4, height=6)),
    ],
)
def test_what_is_not_the_picture_of_its_digest_is_unreadable(data: bytes) -> None:
    with pytest.raises(ImageUnreadable, match=f"picture {RED[:12]} in Redis"):
        decode(RED, data, max_pixels=MANY)


def test_a_stored_picture_over_the_bound_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ImageTooLarge, match="6 x 4 pixels, more than the 23"):
        decode(RED, png(picture()), max_pixels=23)


def test_a_damaged_job_names_what_pictures_can_be_found() -> None:
    good = {"image_url": {"url": f"sha256:{RED}"}}
    other = {"image_url": {"url": f"sha256:{RED}:jobs"}}
    damaged: list[Any] = [None, [], 5, "x", {"image_url": 5}, other, {"image_url": {}}]
    for wrong in damaged:
        body = {"messages": [wrong, {"content": wrong}, {"content": [wrong, good, good]}]}
        assert pictures.named(body) == (RED,)
        assert pictures.named(wrong) == pictures.named({"messages": wrong}) == ()
