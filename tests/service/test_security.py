"""Keys, roles, consent, and who needs none."""

import subprocess
import sys

import pytest

from hscr.errors import Unauthenticated
from hscr.records import Role
from service.__main__ import check_bind
from service.settings import GatewaySettings
from tests.service.conftest import IMAGE, QUESTION, VERSIONS, b64, chat_body

A, _B = VERSIONS

ROUTES = [
    (Role.CLIENT, "POST", "/v1/vqa"),
    (Role.CLIENT, "POST", "/v1/captions"),
    (Role.CLIENT, "POST", "/v1/chat/completions"),
    (Role.CLIENT, "POST", "/v1/feedback"),
    (Role.CLIENT, "GET", "/v1/models"),
    (Role.CLIENT, "GET", "/v1/answers"),
    (Role.CLIENT, "GET", "/v1/answers/x"),
    (Role.CLIENT, "GET", "/v1/answers/x/lineage"),
    (Role.CLIENT, "POST", "/v1/answers/x/visual-dependence"),
    (Role.CLIENT, "GET", "/v1/answers/x/visual-dependence"),
    (Role.REVIEWER, "GET", "/v1/preferences"),
    (Role.REVIEWER, "POST", "/v1/preference-jobs"),
    (Role.REVIEWER, "GET", "/v1/jobs"),
    (Role.REVIEWER, "GET", "/v1/jobs/x"),
    (Role.REVIEWER, "GET", "/v1/jobs/x/events"),
    (Role.REVIEWER, "DELETE", "/v1/jobs/x"),
    (Role.REVIEWER, "POST", "/v1/jobs/x/retry"),
    (Role.REVIEWER, "GET", "/v1/adapters"),
    (Role.REVIEWER, "GET", "/v1/evaluations"),
    (Role.REVIEWER, "GET", "/v1/evaluations/x"),
    (Role.REVIEWER, "GET", "/v1/evaluations/x/outcomes"),
    (Role.OPERATOR, "POST", "/v1/finetune-jobs"),
    (Role.OPERATOR, "POST", "/v1/evaluations"),
    (Role.OPERATOR, "POST", "/v1/adapters/x/promote"),
    (Role.OPERATOR, "POST", "/v1/adapters/x/canary"),
    (Role.OPERATOR, "POST", "/v1/adapters/end-canary"),
    (Role.OPERATOR, "POST", "/v1/adapters/rollback"),
    (Role.OPERATOR, "DELETE", "/v1/studies/x"),
    (Role.OPERATOR, "GET", "/v1/studies/x"),
]
OPEN = {"/livez", "/readyz", "/metrics", "/problems/{slug}"}
RANK = [Role.CLIENT, Role.REVIEWER, Role.OPERATOR]


@pytest.fixture
def keys(gateway):
    return {role: gateway.key(role) for role in RANK}


def test_every_route_has_its_role(gateway, keys):
    for needed, method, path in ROUTES:
        assert gateway.request(method, path, json={}).status_code == 401, path
        for role in RANK:
            status = gateway.request(method, path, json={}, headers=keys[role]).status_code
            assert (status == 403) == (RANK.index(role) < RANK.index(needed)), (role, method, path, status)
            assert status != 401


def test_no_route_was_forgotten(gateway):
    paths = gateway.get("/openapi.json").json()["paths"]
    assert len({(m, p) for p, methods in paths.items() for m in methods if p not in OPEN}) == len(ROUTES)
    assert all(gateway.get(path.format(slug="gone")).status_code == 200 for path in OPEN)


def test_a_secret_is_not_kept(gateway, store, settings):
    secret = gateway.key(Role.CLIENT)["Authorization"].removeprefix("Bearer ")
    files = [path.read_bytes() for path in settings.home.rglob("*") if path.is_file()]
    assert files
    assert not any(secret.encode() in content for content in files)


@pytest.mark.parametrize("header", ["Bearer hscr_sk_wrong", "Basic dTpw", "Bearer", "hscr_sk_x"])
def test_a_wrong_key_is_no_key_even_where_none_is_needed(gateway, header):
    reply = gateway.ask(headers={"Authorization": header})
    assert (reply.status_code, reply.json()["type"]) == (401, "/problems/unauthenticated")
    assert reply.headers["www-authenticate"] == "Bearer"
    assert "hscr keys create" in reply.json()["remedy"]
    gateway.key(Role.CLIENT)
    assert gateway.ask(headers={"Authorization": header}).status_code == 401


def test_a_revoked_key_is_refused(gateway, store):
    key, secret = store.keys.create("k", Role.CLIENT)
    store.keys.create("another", Role.CLIENT)
    headers = {"Authorization": f"Bearer {secret}"}
    assert gateway.get("/v1/models", headers=headers).status_code == 200
    store.keys.revoke(key.id)
    assert gateway.get("/v1/models", headers=headers).status_code == 401


def test_the_local_operator_ends_with_the_first_key(gateway):
    assert gateway.post("/v1/finetune-jobs", {}).status_code == 202
    gateway.key(Role.CLIENT)
    assert gateway.post("/v1/finetune-jobs", {}).status_code == 401


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}])
def test_a_foreign_page_is_no_local_operator(gateway, headers):
    assert gateway.get("/v1/models", headers=headers).status_code == 401
    assert gateway.get("/v1/models", headers={"Origin": "http://localhost:3000"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_others_cannot_connect_without_keys(settings, store, host):
    bound = GatewaySettings(home=settings.home, host=host)
    with pytest.raises(Unauthenticated, match="hscr keys create"):
        check_bind(bound)
    store.keys.create("k", Role.CLIENT)
    check_bind(bound)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_needs_no_key(settings, store, host):
    check_bind(GatewaySettings(home=settings.home, host=host))


def test_the_process_refuses_in_words(settings):
    done = subprocess.run(
        [sys.executable, "-m", "service", "--host", "0.0.0.0", "--port", "0"],
        env={"HSCR_HOME": str(settings.home), "PATH": "/usr/bin"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "hscr keys create" in done.stderr
    assert "Traceback" not in done.stderr


def test_off_loopback_nobody_is_the_local_operator(serve):
    """The same database without keys, bound elsewhere: the address decides, not the caller."""
    assert serve(host="0.0.0.0").get("/v1/models").status_code == 401


def test_answers_of_another_project_do_not_exist(gateway, store):
    ours, theirs = gateway.key(Role.REVIEWER, project="ours"), gateway.key(Role.REVIEWER, project="theirs")
    answer = gateway.ask(headers=ours).json()["id"]
    for path in (f"/v1/answers/{answer}", f"/v1/answers/{answer}/lineage"):
        assert gateway.get(path, headers=ours).status_code == 200
        assert gateway.get(path, headers=theirs).status_code == 404
    score = f"/v1/answers/{answer}/visual-dependence"
    assert gateway.post(score, headers=theirs).status_code == 404
    assert gateway.post(score, headers=ours).status_code == 202
    assert gateway.get("/v1/answers", headers=theirs).json()["data"] == []
    given = {"answer_id": answer, "verdict": "accept"}
    assert gateway.post("/v1/feedback", given, headers=theirs).status_code == 404
    assert len(gateway.get("/v1/answers", headers=gateway.key(Role.OPERATOR)).json()["data"]) == 1


@pytest.mark.parametrize("role", RANK)
@pytest.mark.parametrize("consent", [True, False])
def test_only_reviewers_feedback_on_consented_answers_trains(gateway, store, role, consent):
    answer = gateway.ask(headers=gateway.key(Role.CLIENT, train_consent=consent)).json()["id"]
    given = {"answer_id": answer, "verdict": "correct", "correction": "a stone."}
    told = gateway.post("/v1/feedback", given, headers=gateway.key(role)).json()
    trains = role is Role.REVIEWER and consent
    assert told["trainable"] is trains
    assert [source.chosen for source in store.preferences.pending("any")] == ["a stone."] * trains


def test_conversations_and_rejections_do_not_train(gateway, store):
    client, reviewer = gateway.key(Role.CLIENT, train_consent=True), gateway.key(Role.REVIEWER)
    chat = gateway.post("/v1/chat/completions", chat_body(), headers=client).json()["id"]
    vqa = gateway.ask(headers=client).json()["id"]
    for answer, verdict in ((chat, "accept"), (vqa, "reject")):
        given = {"answer_id": answer, "verdict": verdict}
        assert gateway.post("/v1/feedback", given, headers=reviewer).status_code == 201
    assert store.preferences.pending("any") == []


@pytest.mark.parametrize(
    ("given", "slug"),
    [
        ({"verdict": "correct"}, "invalid-input"),
        ({"verdict": "accept", "correction": "x"}, "invalid-input"),
        ({"verdict": "correct", "correction": " "}, "invalid-question"),
        ({"verdict": "correct", "correction": "</s>"}, "invalid-question"),
        ({"verdict": "maybe"}, "invalid-input"),
    ],
)
def test_feedback_that_says_nothing(gateway, store, given, slug):
    answer = gateway.answered()
    reply = gateway.post("/v1/feedback", {"answer_id": answer.id} | given)
    assert (reply.status_code, reply.json()["type"]) == (422, f"/problems/{slug}")
    assert store.answers.feedback(answer.id) == []


def test_consent_decides_how_long_an_image_is_held(gateway, store):
    """Without consent the reference ends after a day; with it, it has no end."""
    from hscr.store.tables import images

    for consent in (True, False):
        headers = gateway.key(Role.CLIENT, train_consent=consent)
        body = {"image": b64(IMAGE), "question": QUESTION, "study": f"s-{consent}"}
        assert gateway.post("/v1/vqa", body, headers=headers).status_code == 200
    with store.database.read() as connection:
        ends = {row.study: row.expires_at for row in connection.execute(images.select())}
    assert ends["s-True"] is None
    assert ends["s-False"] is not None


def test_only_operators_let_a_fine_tune_follow(gateway):
    body = {"then": {}}
    assert gateway.post("/v1/preference-jobs", body, headers=gateway.key(Role.REVIEWER)).status_code == 403
    assert gateway.post("/v1/preference-jobs", body, headers=gateway.key(Role.OPERATOR)).status_code == 202
