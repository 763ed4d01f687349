"""A job names its pictures by digest; each is read once in a call, stored once, and shown by the command."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile, ImageSequence
from redis import ConnectionPool, Redis
from redis import exceptions as redis_errors
from redis.connection import Connection

from common import keys, pictures
from common.errors import ImageUnreadable, InvalidRequest
from common.messages import GenerateJob
from producer import images, submit, submit_many
from producer.images import open_file
from producer.submit import CHUNK_JOBS
from tests.image_files import MANY, ROOT, argument, data_url, file, held, question, scene
from worker import pictures as stored


def test_a_job_names_its_pictures_by_digest_and_its_description_counts_them(redis: Redis) -> None:
    other = Image.new("RGB", (5, 5), "red")
    ticket = submit("Which?", system="Be brief.", images=[scene(), other, scene()], redis=redis)
    first, second = (f"sha256:{pictures.digest(*image.size, image.tobytes())}" for image in (scene(), other))
    job = argument(redis, ticket.id)
    assert job["v"] == 1
    assert [part.get("image_url", part.get("text")) for part in job["messages"][1]["content"]] == [
        {"url": first}, {"url": second}, {"url": first}, "Which?",
    ]  # fmt: skip
    assert redis.hget(f"rq:job:{ticket.id}", "description") == b"chat, 15 characters, 3 images"
    assert GenerateJob.model_validate(job).digests == tuple(url.partition(":")[2] for url in (first, second, first))
    assert pictures.named(job) == tuple(url.partition(":")[2] for url in (first, second))


def test_messages_keep_their_order_and_detail_and_need_no_text(redis: Redis) -> None:
    ticket = submit(messages=question(scene(), detail="low"), redis=redis)
    text, image = argument(redis, ticket.id)["messages"][0]["content"]
    assert (text["text"], image["image_url"]["detail"]) == ("What?", "low")
    alone = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(file(scene()))}}]}]
    submit(messages=alone, redis=redis)
    with pytest.raises(InvalidRequest, match="neither text nor pictures"):
        submit(messages=[{"role": "user", "content": []}], redis=redis)


def test_a_thousand_questions_on_one_picture_send_it_once(redis: Redis) -> None:
    picture = file(Image.effect_noise((300, 300), 90))
    url = data_url(picture)
    before = _received(redis)
    submit_many(({"text": f"Question {n}?", "images": [url]} for n in range(CHUNK_JOBS)), redis=redis)
    (digest,) = held(redis)
    size = redis.strlen(keys.image(digest))
    jobs = sum(len(redis.dump(key) or b"") for key in redis.keys("rq:job:*"))
    assert size > 60_000
    assert _received(redis) - before < 2 * size + 4 * jobs
    submit("One more?", images=[picture], redis=redis)  # in a call of its own
    sent = _received(redis)
    submit("And one more?", images=[picture], redis=redis)
    assert _received(redis) - sent < size / 2
    assert redis.zcard(keys.image_jobs(digest)) == CHUNK_JOBS + 2


def test_one_file_is_decoded_once_in_a_call_however_it_is_given(
    redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path, opened = file(scene()), tmp_path / "a.png", []
    path.write_bytes(data)

    def counting(given: bytes) -> ImageFile.ImageFile:
        opened.append(given)
        return open_file(given)

    monkeypatch.setattr(images, "open_file", counting)
    sources: list[Any] = [data_url(data), bytearray(data), path, data_url(data, "image/jpeg")]
    submit_many([{"text": "What?", "images": [source]} for source in sources * 20], redis=redis)
    assert opened == [data]


def _received(redis: Redis) -> int:
    return int(redis.info("stats")["total_net_input_bytes"])


def test_the_frames_of_an_animation_that_are_one_object_are_not_taken_for_one_picture(redis: Redis) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "red")]
    moving = Image.open(io.BytesIO(file(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)))
    submit_many(({"text": "What?", "images": [frame]} for frame in ImageSequence.Iterator(moving)), redis=redis)
    assert len(held(redis)) == 3


def test_a_file_that_changes_between_two_jobs_is_read_again(redis: Redis, tmp_path: Path) -> None:
    path = tmp_path / "frame.png"

    def jobs() -> Any:
        for colour in ("red", "blue"):
            path.write_bytes(file(Image.new("RGB", (8, 8), colour), compress_level=0))
            yield {"text": "What?", "images": [path]}

    submit_many(jobs(), redis=redis)
    assert len(held(redis)) == 2


def test_one_bad_picture_among_many_jobs_is_named_and_nothing_is_written(redis: Redis) -> None:
    jobs = [{"text": "a", "images": [scene()]}, {"text": "b", "images": [scene(), b"no"]}]
    with pytest.raises(ImageUnreadable, match=r"^jobs\[1\]: images\[1\]: not a picture"):
        submit_many(jobs, redis=redis)
    assert redis.dbsize() == 0


def test_a_picture_of_many_megabytes_arrives_whole(redis: Redis) -> None:
    picture = Image.frombytes("RGB", (1200, 1000), os.urandom(1200 * 1000 * 3))
    submit("What?", images=[picture], redis=redis)
    (digest,) = held(redis)
    png = stored.fetch(redis, [digest], max_pixels=10**7)[digest]
    assert len(png) > 3 * 1024**2
    assert stored.decode(digest, png, max_pixels=10**7).tobytes() == picture.tobytes()


class Breaking(Connection):
    """A connection that breaks once, when a transaction has been sent and not yet answered."""

    left = 0

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        super().send_packed_command(command, check_health=check_health)  # type: ignore[no-untyped-call]
        if b"EXEC" in b"".join(command):
            type(self).left -= 1
            if type(self).left == 0:
                self.disconnect()  # type: ignore[no-untyped-call]
                raise redis_errors.ConnectionError("the network is gone")


@pytest.mark.parametrize("number", [1, 2])
def test_a_connection_lost_while_a_picture_is_stored_leaves_job_and_picture(
    number: int, redis_url: str, redis: Redis
) -> None:
    client = Redis(connection_pool=ConnectionPool.from_url(redis_url, connection_class=Breaking))
    submit("connect", redis=client)
    Breaking.left = number
    ticket = submit("What?", images=[scene()], redis=client)
    assert Breaking.left < 1
    (digest,) = held(redis)
    png = stored.fetch(redis, [digest], max_pixels=MANY)[digest]
    assert stored.decode(digest, png, max_pixels=MANY).size == (12, 8)
    assert redis.zrange(keys.image_jobs(digest), 0, -1) == [ticket.id.encode()]


def test_a_service_that_sends_text_never_loads_pillow(redis_url: str) -> None:
    script = (
        "import sys\nfrom producer import submit\nsubmit('a', redis=sys.argv[1])\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'PIL']"
    )
    done = subprocess.run([sys.executable, "-c", script, redis_url], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_sends_files_and_shows_a_picture_by_its_size(
    redis_url: str, redis: Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from producer.cli import main

    first, second = tmp_path / "a.png", tmp_path / "b.jpg"
    first.write_bytes(file(scene()))
    second.write_bytes(file(scene(20, 20), "JPEG"))
    assert main(["submit", "What?", "--image", str(first), "--image", str(second), "--redis", redis_url]) == 0
    job_id = capsys.readouterr().out.strip()
    assert len(pictures.named(argument(redis, job_id))) == 2
    digest = pictures.digest(12, 8, scene().tobytes())
    size = redis.strlen(keys.image(digest))
    assert main(["inspect", keys.image(digest), "--redis", redis_url]) == 0
    assert capsys.readouterr().out == f'"<PNG, {size:,} bytes>"\n'
    assert main(["inspect", "radixq:image*", "--redis", redis_url]) == 0
    assert len(capsys.readouterr().out) < 2_000
    assert main(["submit", "What?", "--image", str(tmp_path / "no.png"), "--redis", redis_url]) == 2
    assert "images[0]" in capsys.readouterr().err
