"""The worker: groups jobs by shared prefix and runs them on MLX. `rq worker --worker-class worker.BatchWorker`."""


def __getattr__(name: str) -> object:
    # Lazy: rq drops an ImportError raised here at import time and would report only "Invalid attribute name".
    if name == "BatchWorker":
        from worker.app import BatchWorker

        return BatchWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
