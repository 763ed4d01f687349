"""The metrics hash: exactly the documented fields, plain values, rates of the time that was worked."""

from __future__ import annotations

import re
from typing import Any

import pytest
from redis import Redis

from common import keys
from worker.flight import Clock
from worker.metrics import Jobs, Metrics
from worker.sequence import EngineStats

FIELDS = {
    "state", "model", "updated_at", "last_token_at", "jobs_finished", "jobs_failed", "jobs_running", "queue_depth",
    "prompt_tokens", "cached_tokens", "prefill_tokens", "completion_tokens", "computed_tokens", "cache_hit_ratio",
    "cache_nodes", "cache_bytes", "cache_bytes_limit", "pinned_bytes", "evicted_nodes", "evicted_bytes",
    "poisoned_nodes", "herd_waits", "prefix_bytes_saved", "batch_rows", "batch_rows_max", "cohorts", "decode_steps",
    "prefill_tokens_per_s", "decode_tokens_per_s", "attention_form", "active_bytes", "peak_bytes",
    "vision_runs", "vision_bytes",
}  # fmt: skip
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
DECIMAL = re.compile(r"\d+(\.\d+)?")


def read(redis: Redis, label: str = "mac") -> dict[str, str]:
    fields: Any = redis.hgetall(keys.metrics(label))
    return {name.decode(): value.decode() for name, value in fields.items()}


@pytest.fixture
def metrics(redis: Redis) -> Metrics:
    return Metrics(redis, "mac", Clock())


def publish(metrics: Metrics, stats: EngineStats, *queues: str) -> None:
    metrics.publish("busy", "tiny", Jobs(3, 1, 2), stats, queues)


def test_the_hash_has_exactly_the_documented_fields_with_plain_values(metrics: Metrics, redis: Redis) -> None:
    publish(metrics, EngineStats(prompt_tokens=8, cached_tokens=6, attention_form="packed", last_token_at=1.5e9))
    fields = read(redis)
    assert set(fields) == FIELDS
    assert TIME.fullmatch(fields["updated_at"])
    assert fields["last_token_at"] == "2017-07-14T02:40:00.000Z"
    words = {"state": "busy", "model": "tiny", "attention_form": "packed"}
    assert words.items() <= fields.items()
    assert all(DECIMAL.fullmatch(fields[name]) for name in FIELDS - words.keys() - {"updated_at", "last_token_at"})
    assert fields["cache_hit_ratio"] == "0.75"
    assert (fields["jobs_finished"], fields["jobs_failed"], fields["jobs_running"]) == ("3", "1", "2")


def test_a_worker_that_has_done_nothing_yet_has_no_ratio_to_divide_by(metrics: Metrics, redis: Redis) -> None:
    publish(metrics, EngineStats())
    fields = read(redis)
    assert set(fields) == FIELDS
    assert fields["cache_hit_ratio"] == fields["decode_tokens_per_s"] == "0"
    assert fields["last_token_at"] == ""


def test_rates_are_of_the_last_interval_in_which_there_was_work(metrics: Metrics, redis: Redis) -> None:
    publish(metrics, EngineStats(computed_tokens=100, prefill_s=1.0, decoded_tokens=50, decode_s=2.0))
    assert read(redis)["prefill_tokens_per_s"] == "100"
    publish(metrics, later := EngineStats(computed_tokens=100, prefill_s=1.0, decoded_tokens=90, decode_s=4.5))
    fields = read(redis)
    assert (fields["prefill_tokens_per_s"], fields["decode_tokens_per_s"]) == ("100", "16")
    publish(metrics, later)  # idle
    assert read(redis)["decode_tokens_per_s"] == "16"


def test_the_depth_counts_the_jobs_of_all_its_queues(metrics: Metrics, redis: Redis) -> None:
    redis.rpush("rq:queue:a", "1", "2")
    redis.rpush("rq:queue:b", "3")
    publish(metrics, EngineStats(), "rq:queue:a", "rq:queue:b", "rq:queue:empty")
    assert read(redis)["queue_depth"] == "3"


def test_metrics_outlive_the_worker_by_a_week_and_workers_are_listed_by_sign_of_life(
    metrics: Metrics, redis: Redis
) -> None:
    publish(metrics, EngineStats())
    assert keys.METRICS_TTL_S - 60 < redis.ttl(keys.metrics("mac")) <= keys.METRICS_TTL_S
    seconds, _ = redis.time()
    assert redis.zscore(keys.WORKERS, "mac") == pytest.approx(seconds, abs=60)


def test_times_are_those_of_the_server(redis: Redis) -> None:
    class SkewedServer(Redis):
        """A server that is an hour ahead of us."""

        def time(self, **options: object) -> tuple[int, int]:
            seconds, microseconds = redis.time()
            return seconds + 3600, microseconds

    clock = Clock()
    clock.sync(SkewedServer())
    assert clock.at(1000.0) == pytest.approx(4600, abs=30)
