"""The Celery application without its tasks: what sends messages needs no more."""

from functools import partial
from urllib.parse import urlsplit

from celery import Celery
from kombu import Queue

from workers.contract import CONTROL, QUEUES
from workers.schedule import Beat, beat_schedule
from workers.settings import WorkerSettings


def build(settings: WorkerSettings) -> Celery:
    """Acknowledge early, prefetch nothing, keep no results: the database knows how every job stands."""
    app = Celery("hscr", broker=verified(settings.redis_url))
    app.Beat = partial(Beat, app=app)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        result_backend=None,
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        task_queues=[Queue(name) for name in QUEUES],
        task_default_queue=CONTROL,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        # Between being received and being acknowledged a message is in nobody's hands for milliseconds.
        broker_transport_options={
            "visibility_timeout": 3600,
            "socket_connect_timeout": 2,
            "socket_timeout": 10,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=False,
        beat_schedule=beat_schedule(settings),
        beat_scheduler="workers.schedule:SteadyScheduler",
        beat_schedule_filename=str(settings.home / "beat-schedule"),
        enable_utc=True,
    )
    return app


def verified(url: str) -> str:
    """The URL of a queue, which with TLS is one whose certificate is checked unless it says otherwise.

    Celery would check nothing for a `rediss://` without any of these parameters.
    """
    if url.startswith("rediss://") and "ssl_" not in urlsplit(url).query:
        return f"{url}{'&' if urlsplit(url).query else '?'}ssl_cert_reqs=required"
    return url


def held(app: Celery, queue: str) -> int:
    """How many messages wait in a queue. Raises the transport's errors when it is away."""
    with app.connection_or_acquire() as connection:
        return int(connection.default_channel.queue_declare(queue).message_count)
