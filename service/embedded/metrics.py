"""Prometheus metrics under vLLM's names, so that one dashboard and one autoscaler read either engine.

vllm:num_requests_running, vllm:num_requests_waiting      gauges
vllm:time_to_first_token_seconds                          from arrival to the first step's result
vllm:e2e_request_latency_seconds                          from arrival to the last token, if it came
vllm:prompt_tokens_total, vllm:generation_tokens_total    visual tokens and end-of-sequence included
vllm:request_success_total{finished_reason}               stop, length, abort (client gone) or error
vllm:lora_requests_info                                   adapters with running and waiting requests
"""

from collections.abc import Iterator
from collections.abc import Sequence as Several
from time import monotonic, time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.embedded.adapters import AdapterRegistry, adapter_name
from service.embedded.batching import Batcher
from service.embedded.sequences import Piece, Sequence

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_LABELS = ("model_name",)


class Metrics:
    """Counts what the batcher reports of one base model; requests of adapters count for their base."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._first = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.")
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.")
        self._prompt = self._counter("vllm:prompt_tokens", "Prompt tokens read.")
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._ended = Counter(
            "vllm:request_success",
            "Requests ended.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )

    def observe(self, sequence: Sequence, piece: Piece) -> None:
        """Take note of one piece of an answer."""
        if sequence.produced == 1 and not piece.broken_off:
            self._first.observe(monotonic() - sequence.arrived)
            self._prompt.inc(sequence.prompt.length)
        if piece.last:
            reason = piece.finish_reason or "error"
            self._ended.labels(self._model_name, reason).inc()
            self._generated.inc(sequence.produced)
            if not piece.broken_off:
                self._whole.observe(monotonic() - sequence.arrived)

    def watch(self, batcher: Batcher, adapters: AdapterRegistry) -> None:
        """Read the gauges from these whenever the metrics are scraped."""
        self.registry.register(_Gauges(self._model_name, batcher, adapters))

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        whole = Histogram(name, text, _LABELS, buckets=_SECONDS, registry=self.registry)
        return whole.labels(self._model_name)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABELS, registry=self.registry).labels(self._model_name)


class _Gauges(Collector):
    def __init__(self, model_name: str, batcher: Batcher, adapters: AdapterRegistry) -> None:
        self._model_name = model_name
        self._batcher = batcher
        self._adapters = adapters

    def collect(self) -> Iterator[Metric]:
        running, waiting = self._batcher.running, self._batcher.waiting
        yield self._gauge("vllm:num_requests_running", "Requests being decoded.", len(running))
        yield self._gauge("vllm:num_requests_waiting", "Requests not yet admitted.", len(waiting))
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with requests; the value is the time of the scrape, UNIX seconds.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        names = [_names(running), _names(waiting)]
        info.add_metric([str(self._adapters.max_loras), *names], time())
        yield info

    def _gauge(self, name: str, text: str, value: int) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=_LABELS)
        gauge.add_metric([self._model_name], value)
        return gauge


def _names(sequences: Several[Sequence]) -> str:
    return ",".join(sorted({adapter_name(s.adapter) for s in sequences if s.adapter is not None}))
