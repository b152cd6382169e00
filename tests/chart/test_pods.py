"""What holds for every pod of the chart."""

from typing import Any

import pytest

from tests.chart.charts import BUCKET, SHARED, Objects, merged, render

pytestmark = pytest.mark.chart


def test_every_pod_is_restricted(installation: Objects) -> None:
    for name, pod in installation.pods().items():
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert all("hostPath" not in volume for volume in pod.get("volumes", [])), name
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert all("hostPort" not in port for port in container.get("ports", [])), name


def test_no_pod_gets_a_token_of_the_cluster_s_api(installation: Objects) -> None:
    assert all(pod["automountServiceAccountToken"] is False for pod in installation.pods().values())
    accounts = installation.kind("ServiceAccount").values()
    assert all(account["automountServiceAccountToken"] is False for account in accounts)
    assert not {"Role", "RoleBinding", "ClusterRole"} & {each["kind"] for each in installation.all}


def test_the_chart_makes_no_secret_and_names_none_in_plain_text(installation: Objects) -> None:
    assert not installation.kind("Secret")
    for pod in installation.pods().values():
        for container in pod["containers"]:
            for variable, value in installation.environment(pod, container["name"]).items():
                if any(word in variable for word in ("PASSWORD", "SECRET", "API_KEY", "ACCESS_KEY")):
                    assert "secretKeyRef" in value, variable


def test_every_container_says_what_it_needs(installation: Objects) -> None:
    for name, pod in installation.pods().items():
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert "memory" in container["resources"]["limits"], name


def test_every_selector_finds_its_own_pods_and_no_others(installation: Objects) -> None:
    pods = installation.labels()
    for kind in ("Deployment", "StatefulSet"):
        for each in installation.kind(kind).values():
            wanted = each["spec"]["selector"]["matchLabels"].items()
            found = [name for name, labels in pods.items() if wanted <= labels.items()]
            assert found == [each["metadata"]["labels"]["app.kubernetes.io/component"]]


def test_every_reference_leads_to_an_object_of_the_chart(installation: Objects) -> None:
    maps = installation.kind("ConfigMap")
    for pod in installation.pods().values():
        named = [volume["configMap"]["name"] for volume in pod.get("volumes", []) if "configMap" in volume]
        named += [
            source["configMapRef"]["name"] for each in pod["containers"] for source in each.get("envFrom", [])
        ]
        assert set(named) <= maps.keys()
        mounted = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
        own = {"data"}  # of a StatefulSet's claim
        assert mounted - own <= {volume["name"] for volume in pod.get("volumes", [])}


def test_images_come_from_the_mirror_and_a_digest_counts_more_than_a_tag() -> None:
    digest = f"sha256:{'0' * 64}"
    values = {
        "images": {"registry": "mirror.example", "pullSecrets": ["login"], "gateway": {"digest": digest}}
    }
    rendered = render(values)
    for pod in rendered.pods().values():
        assert pod["imagePullSecrets"] == [{"name": "login"}]
        assert all(each["image"].startswith("mirror.example/") for each in pod["containers"])
    gateway = rendered.one("Deployment", "gateway")["spec"]["template"]["spec"]["containers"][0]
    assert gateway["image"] == f"mirror.example/hscr-gateway@{digest}"


def test_a_component_s_pod_adds_to_what_all_pods_have() -> None:
    rendered = render(
        {
            "pods": {"nodeSelector": {"zone": "clinic"}, "priorityClassName": "low", "env": {"TZ": "UTC"}},
            "gateway": {
                "pod": {"priorityClassName": "high", "annotations": {"a": "b"}, "labels": {"team": "x"}}
            },
        }
    )
    gateway = rendered.one("Deployment", "gateway")["spec"]["template"]
    relay = rendered.one("Deployment", "relay")["spec"]["template"]
    assert gateway["spec"]["nodeSelector"] == relay["spec"]["nodeSelector"] == {"zone": "clinic"}
    assert (gateway["spec"]["priorityClassName"], relay["spec"]["priorityClassName"]) == ("high", "low")
    assert rendered.environment(gateway["spec"], "gateway")["TZ"] == "UTC"
    assert gateway["metadata"]["annotations"]["a"] == "b"
    assert gateway["metadata"]["labels"]["team"] == "x"


def test_pods_start_again_when_their_settings_change(trial: Objects) -> None:
    def checksum(rendered: Objects) -> str:
        template = rendered.one("Deployment", "gateway")["spec"]["template"]
        return template["metadata"]["annotations"]["checksum/settings"]

    assert checksum(render({"settings": {"gateway": {"max_rows": 7}}})) != checksum(trial)
    assert checksum(render({"gateway": {"servicePort": 81}})) == checksum(trial)


def test_a_shared_claim_is_kept() -> None:
    rendered = render(SHARED)
    claim = rendered.one("PersistentVolumeClaim", "state")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    mine = render(merged(SHARED, {"state": {"existingClaim": "mine"}}))
    assert not mine.kind("PersistentVolumeClaim")
    for name, each in (("hscr-state", rendered), ("mine", mine)):
        assert {state["persistentVolumeClaim"]["claimName"] for state in states(each)} == {name}


def test_with_an_object_store_no_disk_is_shared(outside: Objects, trial: Objects) -> None:
    for rendered in (outside, trial):
        assert not rendered.kind("PersistentVolumeClaim")
        assert all(state == {"name": "state", "emptyDir": {}} for state in states(rendered))


def states(rendered: Objects) -> list[dict[str, Any]]:
    """The volume under HSCR_HOME of every pod that has one."""
    found = [
        next(volume for volume in pod["volumes"] if volume["name"] == "state")
        for pod in rendered.pods().values()
        if any(mount["name"] == "state" for each in pod["containers"] for mount in each["volumeMounts"])
    ]
    assert len(found) == 6, "gateway, engine, relay, beat and two groups of workers"
    return found


def test_a_platform_s_identity_stands_on_the_service_account_and_no_key_is_named() -> None:
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/hscr"}
    own = {"serviceAccount": {"annotations": role}, "secrets": {"objectStore": ""}}
    rendered = render(merged(BUCKET, own))
    (account,) = rendered.kind("ServiceAccount").values()
    assert account["metadata"]["annotations"] == role
    assert account["automountServiceAccountToken"] is False
    assert "ACCESS_KEY" not in rendered.text


def test_two_releases_share_no_name_and_no_pod() -> None:
    one, two = render(), render(release="other")
    assert not {(e["kind"], e["metadata"]["name"]) for e in one.all} & {
        (e["kind"], e["metadata"]["name"]) for e in two.all
    }
    assert one.labels()["gateway"].items() - two.labels()["gateway"].items()
