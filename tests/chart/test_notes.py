"""What `helm install` prints leads to the first answer."""

import base64
import re
from typing import Any

import pytest

from tests.chart.charts import NAMESPACE, Objects, render

pytestmark = pytest.mark.chart

NOTES = '{{ include (print .Template.BasePath "/NOTES.txt") . | b64enc }}'
"""helm shows them only after an installation; this puts them into an object of the rendering."""


def noted(values: dict[str, Any] | None = None) -> tuple[str, Objects]:
    kept = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "notes"}, "data": {"text": NOTES}}
    rendered = render({**(values or {}), "extraObjects": [kept]})
    return base64.b64decode(rendered.kind("ConfigMap")["notes"]["data"]["text"]).decode(), rendered


def test_a_key_is_made_where_the_command_is_and_the_database_reached() -> None:
    text, rendered = noted()
    found = re.search(
        rf"kubectl -n {NAMESPACE} exec deploy/(\S+) -- hscr keys create --name me --role operator", text
    )
    assert found
    deployment = rendered.kind("Deployment")[found[1]]["spec"]["template"]["spec"]
    (container,) = deployment["containers"]
    assert container["image"].startswith("hscr-gateway:")
    assert "HSCR_DATABASE_URL" in rendered.environment(deployment, container["name"])


def test_with_a_first_key_of_its_own_it_is_read_from_its_secret() -> None:
    text, rendered = noted({"secrets": {"firstKey": "mine"}})
    assert re.search(rf"key=\$\(kubectl -n {NAMESPACE} get secret mine -o jsonpath='{{.data.api-key}}'", text)
    assert "Make a first key" not in text
    deployment = re.search(r"exec deploy/(\S+) -- hscr keys create --name ward-3 --role client", text)
    assert deployment
    assert deployment[1] in rendered.kind("Deployment")


def test_the_first_question_goes_to_the_gateway() -> None:
    text, rendered = noted({"gateway": {"servicePort": 8081}})
    forward = re.search(r"port-forward svc/(\S+) 8080:(\d+)", text)
    assert forward
    ports = rendered.kind("Service")[forward[1]]["spec"]["ports"]
    assert [port["port"] for port in ports] == [int(forward[2])]
    assert 'curl -s $url/v1/vqa -H "Authorization: Bearer $key" -F image=@xray.png' in text


def test_with_an_ingress_it_goes_there() -> None:
    plain, _ = noted({"gateway": {"ingress": {"enabled": True, "host": "vqa.example"}}})
    closed, _ = noted({"gateway": {"ingress": {"enabled": True, "host": "vqa.example", "tlsSecret": "tls"}}})
    assert "url=http://vqa.example" in plain
    assert "url=https://vqa.example" in closed
    assert "port-forward" not in plain + closed


def test_it_says_what_is_for_trials_or_open() -> None:
    text, _ = noted({"networkPolicy": {"enabled": False}})
    assert "Research use only" in text
    assert "without a backup" in text
    assert "can load adapters into it" in text
    assert "can load adapters into it" not in noted()[0]
