"""Look at everything a worker needs and say what is wrong, one line per check, each failure with its fix.

Reads only: starts no server, fetches no model, changes nothing in Redis. A model that is here is loaded, for seconds
and into memory, since how its prefixes can be reused is found by trying. Knows no job.
"""

from __future__ import annotations

import platform as python_platform
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any, Final

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry
from rq.worker_registration import REDIS_WORKER_KEYS

from common import keys
from common.errors import RadixqError
from common.settings import Settings, hide_password
from worker import link, platform, server
from worker.flight import Clock

_OURS: Final = ("common", "producer", "worker")
_OLDEST_SERVER: Final = (6, 2)  # LMOVE
_PHOTO: Final = (2000, 1500)  # pixels of a picture whose cost is shown
_WEIGHTS: Final = ("*.safetensors", "*.gguf")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `fix` says what to do, and is empty when it is ok."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def examine(settings: Settings) -> Iterator[Check]:
    """Yield the outcome of every check, in order; later ones still run when an earlier one failed."""
    for room in (_broker(settings), _versions(), _packages(), _device(settings), _model(settings)):
        for check in room:
            yield replace(check, fix="") if check.ok else check


# -- Redis -----------------------------------------------------------------------------------------------------------


def _broker(settings: Settings) -> Iterator[Check]:
    embedded = None if settings.redis_url else server.find(settings.home)
    url = embedded.url if embedded else settings.url
    shown = hide_password(url) + (" (embedded)" if embedded else "")
    try:
        with Redis.from_url(url, decode_responses=True, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as redis:
            facts: dict[str, Any] = redis.info()
            clock = Clock()
            clock.sync(redis)
            foreign = list(_foreign_workers(redis))
    except (RedisError, OSError, ValueError) as error:
        if settings.redis_url is None and type(error) is RedisConnectionError:  # its subclasses are a server's answers
            yield Check("redis", True, "none yet: `radixq-worker run` starts one")
            return
        reason = " ".join(str(error).split())
        yield Check("redis", False, f"{shown}: {reason}", "start it, set RADIXQ_REDIS_URL, or use `radixq-worker run`")
        return
    yield _server_version(shown, facts)
    yield Check("clock", abs(clock.ahead_s) <= link.SKEW_S, link.skew(clock), link.BY_NTP)
    yield Check(
        "persistence",
        bool(facts.get("aof_enabled")),
        "append-only file on" if facts.get("aof_enabled") else "append-only file off: a restart loses waiting jobs",
        "redis-cli CONFIG SET appendonly yes, and the same in redis.conf",
    )
    policy = facts.get("maxmemory_policy", "unknown")
    yield Check(
        "eviction policy",
        policy == "noeviction",
        f"maxmemory-policy {policy}" + ("" if policy == "noeviction" else ": a full Redis drops jobs silently"),
        "redis-cli CONFIG SET maxmemory-policy noeviction, and the same in redis.conf",
    )
    yield Check(
        "foreign workers",
        not foreign,
        f"not ours, but listening to our queues: {', '.join(foreign)}" if foreign else "none listens to our queues",
        "stop them, or start them with --worker-class worker.BatchWorker",
    )


def _server_version(shown: str, facts: dict[str, Any]) -> Check:
    version = str(facts.get("valkey_version") or facts["redis_version"])
    kind = "Valkey" if "valkey_version" in facts else "Redis"
    numbers = tuple(int(part) for part in re.findall(r"\d+", str(facts["redis_version"]))[:2])
    return Check("redis", numbers >= _OLDEST_SERVER, f"{shown} answers, {kind} {version}", "use Redis 6.2 or newer")


def _foreign_workers(redis: Redis) -> Iterator[str]:
    """Yield the names of RQ workers on our queues that never signed in as one of ours."""
    labels = [str(label) for label in redis.zrange(keys.WORKERS, 0, -1)]
    ours = tuple(re.sub(r"[^A-Za-z0-9_.-]+", "-", label) + "." for label in labels)  # label.host.pid.random
    for key in sorted(redis.smembers(REDIS_WORKER_KEYS)):
        queues = str(redis.hget(key, "queues") or "").split(",")
        name = str(key).rpartition(":")[2]
        listens = any(queue == keys.DEFAULT_QUEUE or queue.startswith(f"{keys.DEFAULT_QUEUE}.") for queue in queues)
        if listens and name not in labels and not name.startswith(ours):
            yield name


# -- this installation -----------------------------------------------------------------------------------------------


def _versions() -> Iterator[Check]:
    fix = "pip install 'radixq[worker]'"
    try:
        wanted = metadata.requires("radixq") or []
    except metadata.PackageNotFoundError:
        yield Check("versions", False, "radixq is not installed, only found on the path", fix)
        return
    from packaging.requirements import Requirement  # comes with mlx-lm

    wrong, found = [], [f"python {python_platform.python_version()}"]
    for requirement in map(Requirement, wanted):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", "worker")):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "missing"
        if version == "missing" or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, wanted {requirement.specifier}")
        found.append(f"{requirement.name} {version}")
    yield Check("versions", not wrong, "; ".join(wrong) or ", ".join(dict.fromkeys(found)), fix)


def _packages() -> Iterator[Check]:
    """Tell whether `common`, `producer` and `worker` are the ones that belong together."""
    home = Path(__file__).resolve().parent.parent
    strangers = []
    for name in _OURS:
        spec = util.find_spec(name)
        place = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if place != home / name:
            strangers.append(f"{name} is at {place}")
    owners = metadata.packages_distributions()
    for name in _OURS:
        others = sorted({owner for owner in owners.get(name, ()) if owner != "radixq"})
        strangers += [f"{name} also belongs to the package {', '.join(others)}"] if others else []
    yield Check(
        "package names",
        not strangers,
        "; ".join(strangers) or f"{', '.join(_OURS)} are ours, in {home}",
        "start the worker in an empty folder and an environment of its own",
    )


# -- device and model ------------------------------------------------------------------------------------------------


def _device(settings: Settings) -> Iterator[Check]:
    blas = platform.prepare(fast_blas=settings.fast_blas)
    try:
        device = platform.device()
    except ImportError as error:
        yield Check("device", False, f"MLX cannot be imported: {error}", "pip install 'radixq[worker]'")
        return
    name = f"{device.kind}, {device.name}, mlx {device.mlx_version}"
    if blas.name == "accelerate":
        yield Check("device", device.kind == "metal", name, "use a Mac with Apple silicon, outside a virtual machine")
    else:
        slow = blas.name == "stock" and settings.fast_blas
        yield Check("device", not slow, f"{name}, BLAS {blas.name}", blas.note)
    stored = _stored_bytes(settings.model_path)
    yield Check(
        "memory",
        stored < device.working_set_bytes,
        f"{device.total_memory_bytes / 1e9:.1f} GB, {device.working_set_bytes / 1e9:.1f} GB usable by the device"
        + (f", {stored / 1e9:.1f} GB of weights" if stored else ""),
        "take a smaller or more strongly quantised model",
    )


def _stored_bytes(model_path: str | None) -> int:
    path = Path(model_path or "").expanduser()
    if model_path and path.is_dir():
        return sum(file.stat().st_size for pattern in _WEIGHTS for file in path.glob(pattern))
    return path.stat().st_size if model_path and path.is_file() else 0


def _model(settings: Settings) -> Iterator[Check]:
    if settings.model_path is None:
        yield Check("model", False, "MLX_MODEL_PATH is not set", "set it to a directory, a hub id or a .gguf file")
        return
    if not Path(settings.model_path).expanduser().exists() and not _is_cached(settings.model_path):
        yield Check("model", True, f"{settings.model_path} is not on this machine yet; the worker will fetch it")
        return
    from worker import model

    try:
        about, _ = model.skeleton(settings.model_path)
    except RadixqError as error:
        yield Check("model", False, " ".join(str(error).split()), "put another path or hub id into MLX_MODEL_PATH")
        return
    yield Check("model", True, f"{about.name}, context {about.context_length} tokens")
    yield from _loaded(settings, settings.model_path)


def _loaded(settings: Settings, path: str) -> Iterator[Check]:
    """Load the model as a worker does: what it allows, reuse and pictures, is found by trying."""
    from mlx_lm.models.cache import make_prompt_cache

    from worker import crossover, model, probe
    from worker.cache import WAYS
    from worker.processor import Bounds

    name, device = "prefixes", platform.device()
    if _stored_bytes(path) >= device.working_set_bytes:
        yield Check(name, False, "not tried: the weights do not fit", "take a smaller or more strongly quantised model")
        return
    try:
        loaded = model.load(path, dtype=settings.dtype, device=device, pictures=Bounds.of(settings))
    except RadixqError as error:
        yield Check(name, False, " ".join(str(error).split()), "put another path or hub id into MLX_MODEL_PATH")
        return
    way = probe.reuse(loaded.model, loaded.context_length)
    caches = sorted({type(layer).__name__ for layer in make_prompt_cache(loaded.model)})
    fix = "take another model if prompts share much; this one runs, and computes each prompt anew"
    yield Check(name, way != "none", f"{way}: {WAYS[way]} ({', '.join(caches)})", fix)
    detail = f"none: {loaded.blind}"
    if loaded.processor is not None and way == "shared":
        width, height = _PHOTO
        detail = f"taken; {width:,} x {height:,} pixels are {loaded.processor.count(width, height):,} tokens"
    yield Check("pictures", True, detail)
    if way == "shared":
        key = crossover.device_key(device, platform.prepare(fast_blas=settings.fast_blas))
        measured = crossover.at_load(loaded.model, settings.home, key).words
        yield Check("attention", True, "packed (RADIXQ_EXACT=1)" if settings.exact else f"{measured} (rows x tokens)")


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)
    except HFValidationError:  # neither a path nor a hub id; loading says so in full
        return True
