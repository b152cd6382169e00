"""A gateway whose images lie in the bucket of an object store."""

import pytest

from hscr.store.settings import StoreSettings
from hscr.store.store import Store
from tests.service.conftest import equip
from tests.stored import images_in


@pytest.fixture
def bucket(s3):
    return s3.bucket()


@pytest.fixture
def settings(settings: StoreSettings, bucket) -> StoreSettings:
    return settings.model_copy(update=bucket)


def test_an_answers_image_is_in_the_bucket_alone(serve, store: Store, engine, bucket, settings):
    equip(store, engine)
    gateway = serve(**bucket)
    answer = gateway.answered()
    assert images_in(store) == {answer.image.digest}
    assert gateway.get(f"/v1/answers/{answer.id}/lineage").json()["image_stored"] is True
    assert not list(settings.home.rglob(answer.image.digest))


def test_without_its_object_store_a_gateway_keeps_nothing_and_says_so(serve, store: Store, engine, bucket):
    equip(store, engine)
    gateway = serve(**{**bucket, "s3_endpoint": "http://127.0.0.1:9"})
    refused = gateway.ask()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert refused.json()["type"] == "/problems/object-store-unavailable"
    assert "hscr doctor" in refused.json()["remedy"]
    assert store.answers.page() == []
    assert gateway.metric("hscr_store_lost_files") == 0, "scrapes go on"
