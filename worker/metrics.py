"""Publish what one worker has done and what its cache holds: `radixq:metrics:WORKER`, about once a second.

Knows the names of the fields and how rates are made from counters; knows nothing of jobs or of MLX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from redis import Redis

from common import keys
from worker.flight import Clock, iso
from worker.sequence import EngineStats

_INTERNAL = ("prefill_s", "decode_s", "decoded_tokens", "last_token_at")


@dataclass(frozen=True, slots=True)
class Jobs:
    """What the worker itself counts: finished and failed since its start, running now."""

    jobs_finished: int = 0
    jobs_failed: int = 0
    jobs_running: int = 0


class Metrics:
    """One worker's metrics hash."""

    def __init__(self, connection: Redis, label: str, clock: Clock) -> None:
        self._connection = connection
        self._label = label
        self._clock = clock
        self._last = EngineStats()
        self._prefill_rate = 0.0
        self._decode_rate = 0.0

    def publish(self, state: str, model: str, jobs: Jobs, stats: EngineStats, queue_keys: Sequence[str]) -> None:
        """Write the hash, with the number of jobs that wait in the queues, and a sign of life."""
        with self._connection.pipeline(transaction=False) as pipe:
            for key in queue_keys:
                pipe.llen(key)
            depth = sum(pipe.execute())
        key, now = keys.metrics(self._label), self._clock.now()
        fields = self._fields(stats) | asdict(jobs)
        fields |= {"state": state, "model": model, "updated_at": iso(now), "queue_depth": depth}
        with self._connection.pipeline() as pipe:
            pipe.hset(key, mapping={name: _plain(value) for name, value in fields.items()})
            pipe.expire(key, keys.METRICS_TTL_S)
            pipe.zadd(keys.WORKERS, {self._label: now})
            pipe.execute()

    def _fields(self, stats: EngineStats) -> dict[str, object]:
        last, self._last = self._last, stats
        prefilled, decoded = stats.computed_tokens - last.computed_tokens, stats.decoded_tokens - last.decoded_tokens
        self._prefill_rate = _rate(prefilled, stats.prefill_s - last.prefill_s, self._prefill_rate)
        self._decode_rate = _rate(decoded, stats.decode_s - last.decode_s, self._decode_rate)
        fields: dict[str, object] = {name: value for name, value in asdict(stats).items() if name not in _INTERNAL}
        return fields | {
            "cache_hit_ratio": stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0,
            "prefill_tokens_per_s": self._prefill_rate,
            "decode_tokens_per_s": self._decode_rate,
            "last_token_at": "" if stats.last_token_at is None else iso(self._clock.at(stats.last_token_at)),
        }


def _rate(tokens: int, seconds: float, before: float) -> float:
    """Tokens per second of work; while nothing is worked on, what it was before."""
    return tokens / seconds if tokens > 0 and seconds > 0 else before


def _plain(value: object) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
