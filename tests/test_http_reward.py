"""A server as a reward: what it is sent, and what becomes of every way in which it can fail."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prefopt import InputError, Message
from prefopt.http_reward import HttpReward
from prefopt.rewards import check_columns, load_reward, load_rewards, score

PROMPTS = [[Message("system", "S"), Message("user", f"q{i}")] for i in range(5)]
RESPONSES = ["a", "bb", "ccc", "dddd", "ü\n"]


class Server:
    """Answers by ``answer(request) -> (status, body)``, and remembers the requests."""

    def __init__(self):
        self.requests, self.kinds = [], []
        self.answer = lambda asked: (200, {"scores": [float(len(t)) for t in asked["responses"]]})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(asked)
                outer.kinds.append(self.headers["Content-Type"])
                status, body = outer.answer(asked)
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                if status == 0:  # hangs up
                    self.close_connection = True
                    return
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def reward(self, **options):
        reward = HttpReward(self.url, **{"timeout": 5.0, **options})
        reward.wait = 0.01
        return reward


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_what_is_asked_and_answered(server):
    reward = load_reward(server.url)
    assert isinstance(reward, HttpReward) and reward.path == server.url
    columns = {"answer": [1, 2, 3, 4, None], "level": ["x"] * 5}
    assert score(reward, "r", PROMPTS, RESPONSES, columns) == [1, 2, 3, 4, 2]
    (asked,) = server.requests
    assert server.kinds == ["application/json"]
    assert asked["prompts"][1] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q1"},
    ]
    assert asked["responses"] == RESPONSES and asked["answer"] == [1, 2, 3, 4, None]
    assert asked.keys() == {"prompts", "responses", "answer", "level"}
    (named,) = load_rewards({"far": server.url}).items()
    check_columns(dict([named]), [])
    assert isinstance(load_reward("https://example.org/x"), HttpReward)  # asked only when called


def test_batches_in_order(server):
    reward = server.reward(batch_size=2)
    assert score(reward, "r", PROMPTS, RESPONSES, {"n": [*range(5)]}) == [1, 2, 3, 4, 2]
    assert [asked["responses"] for asked in server.requests] == [
        ["a", "bb"],
        ["ccc", "dddd"],
        ["ü\n"],
    ]
    assert [asked["n"] for asked in server.requests] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 0])
def test_what_passes_is_tried_again(server, status):
    fine = server.answer
    server.answer = lambda asked: (status, b"busy") if len(server.requests) < 3 else fine(asked)
    assert score(server.reward(), "r", PROMPTS, RESPONSES) == [1, 2, 3, 4, 2]
    assert len(server.requests) == 3


def test_waits_grow(server, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.answer = lambda _: (503, b"")
    with pytest.raises(InputError, match="status 503"):
        server.reward(tries=4)(PROMPTS, RESPONSES)
    assert waits == pytest.approx([0.01, 0.02, 0.04]) and len(server.requests) == 4


def test_a_server_that_stays_down(server):
    server.answer = lambda _: (503, b"  \nno workers left\nmore")
    with pytest.raises(InputError) as caught:
        score(server.reward(tries=2), "far", PROMPTS, RESPONSES)
    want = f"reward 'far' failed: {server.url} answered with status 503: 'no workers left'"
    assert str(caught.value) == want
    assert len(server.requests) == 2  # and not once more for every sample


def test_a_server_that_is_not_there(server):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(InputError, match=r"did not answer in 2 tries: .*refused.*check the URL"):
        score(server.reward(tries=2), "far", PROMPTS, RESPONSES)


def test_a_slow_server(server):
    def slow(asked):
        time.sleep(0.4)
        return 200, {"scores": [0.0] * 5}

    server.answer = slow
    began = time.monotonic()
    with pytest.raises(InputError, match=r"did not answer in 2 tries: .*timed out"):
        score(server.reward(timeout=0.1, tries=2), "far", PROMPTS, RESPONSES)
    assert time.monotonic() - began < 5 and len(server.requests) == 2
    assert score(server.reward(), "far", PROMPTS, RESPONSES) == [0.0] * 5


@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_sample_that_the_server_cannot_stand_is_named(server, status):
    fine = server.answer
    server.answer = lambda asked: (status, b"bad") if "ccc" in asked["responses"] else fine(asked)
    message = rf"for the response 'ccc' to the prompt 'q2': .* status {status}: 'bad'"
    with pytest.raises(InputError, match=message):
        score(server.reward(tries=2), "far", PROMPTS, RESPONSES)


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusal_of_everything_names_no_sample_and_is_not_repeated(server, status):
    server.answer = lambda _: (status, b"no")
    with pytest.raises(InputError, match=f"failed: http.*status {status}: 'no'$"):
        score(server.reward(), "far", PROMPTS, RESPONSES)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>\nhello", r"answered '<html>' where \{\"scores\": \[...\]\} was expected"),
        (b"", "answered '' where"),
        (b"\xff\xfe", "where"),
        ([1, 2, 3, 4, 5], r"answered '\[1, 2, 3, 4, 5\]' where"),
        ({"score": [1] * 5}, "where"),
        ({"scores": "12345"}, "where"),
        (b"[" * 100_000, r"\[\.\.\.' where"),
        ({"scores": [1.0] * 4}, "answered 4 scores for 5 responses"),
    ],
)
def test_answers_that_are_none(server, body, message):
    server.answer = lambda _: (200, body)
    with pytest.raises(InputError, match=message):
        server.reward()(PROMPTS, RESPONSES)
    assert len(server.requests) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "2", [1.0]])
def test_a_score_that_is_no_number_names_its_sample(server, bad):
    server.answer = lambda _: (200, {"scores": [1.0, 2.0, bad, 3.0, 4.0]})
    with pytest.raises(
        InputError, match="no finite number, for the response 'ccc' to the prompt 'q2'"
    ):
        score(server.reward(), "far", PROMPTS, RESPONSES)
