"""A worker whose engine does nothing: every prompt it is given has its answer at once. For `bench_queue.py`.

`rq worker --worker-class bench_noop.NoopWorker`: everything but the engine is the product's own, the scout included.
"""

from __future__ import annotations

from common.messages import Usage
from worker import app
from worker.runner import Runner
from worker.sequence import Finished, Prompt, Ready


class NoopRunner(Runner):
    """Answers in the thread that asks; MLX is never imported."""

    def start(self) -> None:
        """Be ready."""
        self._report([Ready("noop", ())])

    def submit(self, job_id: str, prompt: Prompt) -> None:
        """Answer with one token."""
        usage = Usage(
            prompt_tokens=len(prompt.tokens), cached_tokens=0, prefill_tokens=len(prompt.tokens), completion_tokens=1
        )
        self._running.add(job_id)
        self._report([Finished(job_id, "t1", "length", usage, prefill_ms=0.0, decode_ms=0.0)])

    def abort(self, job_id: str) -> None:
        """Forget it."""
        self._running.discard(job_id)

    def stop(self) -> bool:
        """Nothing runs."""
        return True


class NoopWorker(app.BatchWorker):
    """The product's worker with that engine."""


app.Runner = NoopRunner  # type: ignore[misc]  # this module is imported by the worker's process alone
