"""What Prometheus reads. Labels are routes, statuses and versions: never anything about a patient."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """One registry per app, so that two apps in one process do not share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "hscr_requests", "Requests ended", ["method", "route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "hscr_request_seconds",
            "From the first byte in to the last byte out",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_text = Histogram(
            "hscr_time_to_first_text_seconds",
            "From the engine call to its first text",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("hscr_in_flight", "Requests being served", registry=self.registry)
        self.answers = Counter("hscr_answers", "Answers kept", ["kind", "version"], registry=self.registry)
        self.tokens = Counter("hscr_tokens", "Tokens", ["direction"], registry=self.registry)
        self.rejected = Counter(
            "hscr_rejected", "Requests refused, by problem", ["slug"], registry=self.registry
        )
        self.aborted = Counter(
            "hscr_aborted", "Answers stopped because the client left", registry=self.registry
        )
        self.retried = Counter("hscr_retried", "Second attempts on another replica", registry=self.registry)
        self.replicas = Gauge("hscr_replicas", "Replicas that are live and ready", registry=self.registry)
        self.circuits = Gauge(
            "hscr_replica_circuit", "0 closed, 1 half open, 2 open", ["replica"], registry=self.registry
        )
        self.drift = Gauge(
            "hscr_replicas_drifted",
            "Live replicas that lack a desired version (missing) or have another one (surplus)",
            ["kind"],
            registry=self.registry,
        )

    def watch_pointer(self, epoch: Callable[[], float], age: Callable[[], float]) -> None:
        """Read both at each scrape: the epoch last seen, and the seconds since."""
        Gauge("hscr_pointer_epoch", "Epoch last seen", registry=self.registry).set_function(epoch)
        Gauge("hscr_pointer_age_seconds", "Since it was seen", registry=self.registry).set_function(age)

    def watch_store(self, writable: Callable[[], float], lost: Mapping[str, Callable[[], float]]) -> None:
        """Read at each scrape: whether answers can be kept, and what the last store check missed, by kind."""
        writable_now = Gauge(
            "hscr_store_writable", "0 while the disk is full or read-only", registry=self.registry
        )
        writable_now.set_function(writable)
        missed = Gauge(
            "hscr_store_lost_files", "Rows whose files were gone", ["kind"], registry=self.registry
        )
        for kind, count in lost.items():
            missed.labels(kind).set_function(count)

    def text(self) -> bytes:
        return generate_latest(self.registry)
