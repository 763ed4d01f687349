"""`BatchWorker`: RQ's lifecycle around one engine that runs many jobs at once.

RQ is in the main thread, MLX in the runner's, reading and planning the waiting jobs in the scout's process; `pump.Pump`
goes round between them. Knows neither tokens nor caches.
"""

from __future__ import annotations

import logging
import math
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis.exceptions
from rq.command import parse_payload
from rq.defaults import DEFAULT_LOGGING_DATE_FORMAT, DEFAULT_LOGGING_FORMAT
from rq.executions import Execution
from rq.job import Job
from rq.queue import Queue
from rq.registry import StartedJobRegistry
from rq.utils import as_text, now
from rq.worker import BaseWorker, DequeueStrategy, WorkerStatus

from common import keys, log, pictures
from common.errors import BrokerUnavailable, InternalError, RadixqError, SettingsError
from common.serializer import JobSerializer
from common.settings import Settings
from worker import label, leases, leave, link, platform
from worker.flight import Clock
from worker.job import QueuedJob, bounded_in_registries
from worker.life import Life
from worker.outage import explain
from worker.pump import Pump
from worker.runner import Runner
from worker.scout import Scout

if TYPE_CHECKING:
    from types import FrameType

    from redis import Redis
    from redis.client import Pipeline

MAINTENANCE_S = 30
_RELISTEN_S = 1.0
_ONE_OUTAGE_S = 10.0  # failures of the command channel with less between them are one line of the log
AGAIN_S = 0.3  # a second signal this soon is the same one, delivered twice

_DEFECT = "the worker's loop ended by a defect; the lines above say where"
_log = log.logger("worker.app")


class BatchWorker(BaseWorker):
    """An RQ worker that runs many jobs of one model as one batch.

    `rq worker --worker-class worker.BatchWorker -u URL radixq`
    """

    def __init__(
        self,
        queues: str | Queue | Sequence[str | Queue],
        name: str | None = None,
        *,
        settings: Settings | None = None,
        connection: Redis | None = None,
        prepare_for_work: bool = True,
        **options: Any,
    ) -> None:
        """Take what RQ's command line gives; serializer and job class are always ours.

        Settings come from the environment unless given. With `prepare_for_work=False`, by which RQ reads about another
        worker, there are none.
        """
        given = [queues] if isinstance(queues, str | Queue) else list(queues)
        names = [queue.name if isinstance(queue, Queue) else queue for queue in given]
        connection = connection or next(queue.connection for queue in given if isinstance(queue, Queue))
        options |= {"job_class": QueuedJob, "serializer": JobSerializer, "log_job_description": False}
        if prepare_for_work:
            with leave.for_settings():
                self._settings = settings or Settings.from_env()
                wanted = self._settings.worker_name or name or socket.gethostname()
                self._label = label.claim(wanted, self._settings.home)
            names = list(dict.fromkeys([*names, *_model_queues(self._settings)]))
            name = name or label.unique(self._label)
            self._life = Life(self._settings.home, name)
            QueuedJob.callbacks = frozenset(self._settings.callbacks)
            QueuedJob.max_bytes, QueuedJob.keep_s = int(self._settings.max_job_bytes), self._settings.prompt_ttl_s
            bounded_in_registries()
        super().__init__(names, name, connection=connection, prepare_for_work=prepare_for_work, **options)
        self.push_exc_handler(self._abandoned)  # type: ignore[no-untyped-call]
        self.maintenance_interval = min(self.maintenance_interval, MAINTENANCE_S)
        self._pump: Pump | None = None
        self._burst = self._orderly = self._entered = False
        self._max_jobs: int | None = None
        self._stopped_at = 0.0
        self._deaf_at = -math.inf

    def work(  # noqa: PLR0913  # RQ's signature
        self,
        burst: bool = False,
        logging_level: str | None = None,
        date_format: str = DEFAULT_LOGGING_DATE_FORMAT,
        log_format: str = DEFAULT_LOGGING_FORMAT,
        max_jobs: int | None = None,
        max_idle_time: int | None = None,
        with_scheduler: bool = True,
        dequeue_strategy: DequeueStrategy = DequeueStrategy.DEFAULT,
    ) -> bool:
        """Run until asked to stop; with `burst` until nothing waits, with `max_jobs` until so many were run.

        Return whether any job was run. Scheduling goes on in this process.

        Raises:
            SystemExit: the worker could not start or go on; one line on stderr says why.
        """
        log.configure(self._settings.log)
        self.log.addFilter(_is_news)
        self._burst, self._max_jobs = burst, max_jobs
        platform.prepare(fast_blas=self._settings.fast_blas)  # before anything imports MLX
        runner = Runner(self._settings)
        with leave.for_settings():
            url = link.url(self.connection)
        scout = Scout(self._settings, self.queue_names(), redis_url=url, label=self._label)
        self._pump = Pump(self, self._settings, self._label, runner, scout)
        self._install_signal_handlers()  # type: ignore[no-untyped-call]
        try:
            self._find_server(self._pump.clock)
            scout.start()
            runner.start()
            self._say_doubts(self._pump.clock)  # may wait for another server: meanwhile the model is loaded
            super().work(burst, logging_level, date_format, log_format, None, max_idle_time, True, dequeue_strategy)
        except redis.exceptions.RedisError as error:
            self._pump.error = BrokerUnavailable(f"Redis failed while the worker started: {error}")
        except RadixqError as error:
            self._pump.error = error
        finally:
            scout.close()
            ended = runner.stop()
        if self._stop_requested and not self._entered:
            self._orderly = self._pump.error is None
        reason = None if self._orderly else self._pump.error or InternalError(_DEFECT)
        if not ended:
            leave.leave_at_once(reason)
        if reason is not None:
            leave.leave(reason)
        return self._pump.started > 0

    def _find_server(self, clock: Clock) -> None:
        """Make sure that Redis answers, and keep leases by its clock.

        Raises:
            BrokerUnavailable: it gave no sign of life.
        """
        link.check(self.connection)
        clock.sync(self.connection)
        leases.keep_by(clock)

    def _say_doubts(self, clock: Clock) -> None:
        for doubt in link.doubts(self.connection, self._settings.redis_url, clock):
            _log.warning(doubt)

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> None:
        """Run jobs until there is a reason to end; the pump starts them, so none is returned to RQ's loop."""
        assert self._pump is not None
        self._entered = True
        self._pump.run(burst=self._burst, max_jobs=self._max_jobs, max_idle_s=max_idle_time)
        self._orderly = self._pump.error is None

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Do nothing: the pump has started it already."""

    def check_for_suspension(self, burst: bool) -> None:
        """Do nothing: the pump looks, and goes on with what runs."""

    def cleanup_execution(self, job: Job, pipeline: Pipeline, execution: Execution | None = None) -> None:
        """Add our result, and the worker's state, to the transaction in which RQ ends an execution."""
        super().cleanup_execution(job, pipeline, execution)
        flight = self._pump.flights.get(execution.id) if self._pump and execution else None
        if self._pump and flight:
            self._pump.outbox.write(flight, pipeline)
            self._pump.ledger.remove(flight, pipeline)
            if len(self._pump.flights) == 1:
                self.set_state(WorkerStatus.IDLE, pipeline)

    def handle_job_failure(
        self,
        job: Job,
        queue: Queue,
        started_job_registry: StartedJobRegistry | None = None,
        exc_string: str = "",
        execution: Execution | None = None,
    ) -> None:
        """Fail a job that ran. Without an execution it was claimed by a worker of RQ's that died before it began."""
        if execution is not None:
            super().handle_job_failure(job, queue, started_job_registry, exc_string, execution)
        elif self.connection.lrem(queue.intermediate_queue_key, 1, job.id):
            queue.push_job_id(job.id, at_front=True)

    def run_maintenance_tasks(self) -> None:
        """Let RQ clean its registries, after our own leases are renewed, and dead workers' jobs handed back.

        It would take us for late, and their crash for a failed attempt of each job.
        """
        try:
            if self._pump is not None:
                self._pump.renew()
                self._pump.recover()
            super().run_maintenance_tasks()  # type: ignore[no-untyped-call]
            if self._pump is not None:
                self._pump.outbox.maintained()
                self._pump.sweep()
            self._life.beat()
            pictures.sweep(self.connection, as_text(Job.key_for("")), self._settings.prompt_ttl_s)
        except redis.exceptions.RedisError as error:
            reason = explain(error)
            if reason is None:
                raise
            _log.error("maintenance has to wait", extra={"reason": reason})
        except ValueError as error:  # an id in RQ's lists that RQ refuses
            self.last_cleaned_at = now()  # type: ignore[assignment]
            _log.error("maintenance was not completed", extra={"error": error})

    def bootstrap(self, *args: Any, **options: Any) -> None:
        """Take over from dead predecessors, then register."""
        assert self._pump is not None
        self._pump.recover()
        self._life.begin()
        try:
            super().bootstrap(*args, **options)
        except BaseException:
            self._life.end()
            raise

    def register_birth(self) -> None:
        """Register under our name, which must be free."""
        try:
            super().register_birth()  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise SettingsError(f"{error}; start without --name and every worker gets a name of its own") from None
        if self._pump is not None:
            self._pump.ledger.open(self.connection)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Finish what runs, start nothing more; the second time hand back at once. Only sets flags."""
        again = self._stop_requested and time.monotonic() - self._stopped_at > AGAIN_S
        if not self._stop_requested:
            self._stop_requested, self._stopped_at = True, time.monotonic()
        if self._pump is not None:
            self._pump.stop(now=again)

    request_force_stop = request_stop

    def handle_payload(self, message: dict[str, Any]) -> None:
        """Stop every execution of the job in question (RQ knows one). Runs in RQ's own thread."""
        payload = parse_payload(message)
        if payload.get("command") == "stop-job":
            self.request_stop_execution(str(payload.get("job_id")))
        else:
            super().handle_payload(message)  # type: ignore[no-untyped-call]

    def request_stop_execution(self, execution_id: str) -> None:
        """Stop one execution, or all of one job. Runs in RQ's own thread."""
        if self._pump is not None:
            self._pump.stop_job(execution_id)

    def _pubsub_exception_handler(self, exc: Exception, *_: object) -> None:
        """Keep listening for commands, whatever comes: RQ's thread would end on a timeout, or on a broken message."""
        time.sleep(_RELISTEN_S)  # until the pump knows of an outage, and says so itself
        if time.monotonic() - self._deaf_at > _ONE_OUTAGE_S and not (self._pump and self._pump.away):
            _log.warning("command channel failed, listening again", extra={"error": exc})
        self._deaf_at = time.monotonic()

    def unsubscribe(self) -> None:
        """Leave the worker's channel; unless its thread is told first, RQ waits a second for it."""
        if self.pubsub_thread is not None:
            self.pubsub_thread.stop()
        super().unsubscribe()  # type: ignore[no-untyped-call]

    def teardown(self) -> None:
        """Hand back what runs, then leave RQ's books."""
        assert self._pump is not None
        try:
            self._pump.close()
        finally:
            self._unregister()

    def _unregister(self) -> None:
        try:
            super().teardown()  # type: ignore[no-untyped-call]
            assert self._pump is not None
            if not self._pump.ledger.entries():  # else whoever comes next takes over
                self._pump.ledger.close()
                self._life.end()
        except redis.exceptions.RedisError as error:
            _log.error("could not unregister", extra={"error": error})

    def _abandoned(self, job: QueuedJob, *exc_info: object) -> None:
        """RQ's maintenance found a job whose worker is gone (the only place from where RQ calls our handler)."""
        if self._pump is not None:
            self._pump.outbox.abandon(job)

    def _start_scheduler(self, *args: Any, **options: Any) -> None:
        """Do nothing: RQ would fork, which MLX does not survive. The pump calls `worker.schedule`."""

    def _set_connection(self, connection: Redis) -> Redis:
        return link.tame(connection)

    def _set_ip_address(self, connection: Redis) -> None:
        try:
            super()._set_ip_address(connection)
        except redis.exceptions.RedisError:
            self.ip_address = "unknown"  # work() says properly what is wrong


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of RQ's is worth a place in the log: it names every queue it cleans, and we clean every 30 s."""
    return ": cleaning " not in str(record.msg)


def _model_queues(settings: Settings) -> list[str]:
    """Return the queues of jobs that ask for this worker's model by one of its names."""
    names = list(settings.model_aliases)
    if settings.model_path is not None:
        path = Path(settings.model_path).expanduser()
        names.insert(0, path.absolute().name.removesuffix(".gguf") if path.exists() else settings.model_path)
    return [keys.model_queue(name) for name in names]


def _start_though_suspended() -> None:
    """Let `rq worker` start us while RQ is suspended or its server is away: it would leave before we are asked."""
    command = sys.modules.get("rq.cli.workers")
    if command is not None:
        command.is_suspended = lambda connection: False  # type: ignore[attr-defined]


_start_though_suspended()
