"""What a service imports: `submit`, `submit_many`, `get`, `Ticket`. Knows no MLX; jobs travel through Redis."""

try:
    from common.errors import (
        BrokerUnavailable,
        GenerationFailed,
        InvalidRequest,
        QueueFull,
        RadixqError,
        SettingsError,
        Unsupported,
    )
    from common.messages import Result
    from producer.submit import asubmit, asubmit_many, submit, submit_many
    from producer.ticket import Ticket, get
    from producer.waiting import NoWorkerWarning
except ImportError as missing:
    if (missing.name or "").partition(".")[0] != "common":
        raise
    import common as foreign

    place = getattr(foreign, "__file__", None) or list(foreign.__path__)
    raise ImportError(
        f"radixq brings a package named 'common', but Python found another one at {place}: rename that one, or put "
        "the folder radixq is installed in before it on sys.path; a job can also be enqueued with rq alone"
    ) from missing

__all__ = [
    "BrokerUnavailable",
    "GenerationFailed",
    "InvalidRequest",
    "NoWorkerWarning",
    "QueueFull",
    "RadixqError",
    "Result",
    "SettingsError",
    "Ticket",
    "Unsupported",
    "asubmit",
    "asubmit_many",
    "get",
    "submit",
    "submit_many",
]
