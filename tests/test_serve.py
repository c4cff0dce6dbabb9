"""Programs that speak OpenAI's interface are answered, or refused in its words."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from rwkvpipe import serve
from rwkvpipe.base.config import RwkvConfig, SamplingConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.infer.engine import Engine
from rwkvpipe.model.family import build
from rwkvpipe.tokenizer.byte import ByteTokenizer
from rwkvpipe.tokenizer.load import save_tokenizer
from rwkvpipe.weights import store

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

LONG = 60
ASK = [{"role": "user", "content": "hello"}]


def model():
    network = build(RwkvConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=257))
    network.initialise(0)
    return network.eval()


@pytest.fixture(scope="module")
def home():
    """A server of a tiny model in this process: its port and its desk."""
    from rwkvpipe.web.app import application
    from rwkvpipe.web.asked import House
    from rwkvpipe.web.desk import Desk

    engine = Engine(model(), ByteTokenizer(1), 4)
    desk = Desk(engine, 20)
    app = application(House(engine, "tiny", SamplingConfig(max_tokens=300)), desk, "127.0.0.1")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    threads = [threading.Thread(target=desk.run), threading.Thread(target=server.run, args=([listener],))]
    for thread in threads:
        thread.start()
    yield listener.getsockname()[1], desk
    server.should_exit = True
    desk.close()
    for thread in threads:
        thread.join(LONG)


@pytest.fixture(scope="module")
def client(home):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{home[0]}/v1", api_key="none", max_retries=0, timeout=LONG) as found:
        yield found


def post(home, body, path="/v1/chat/completions", method="POST", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", home[0], timeout=LONG)
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def test_the_model_has_a_name(client):
    assert [found.id for found in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "rwkvpipe"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_talk_is_answered_as_the_engine_answers(client):
    settings = {"seed": 5, "max_tokens": 12, "temperature": 0.7, "top_p": 0.9}
    found = client.chat.completions.create(model="tiny", messages=ASK, **settings)
    sampling = SamplingConfig(**settings)
    (wanted,) = Engine(model(), ByteTokenizer(1), 1).generate(["User: hello\n\nAssistant:"], sampling)
    assert found.choices[0].message.content == wanted.text.removeprefix(" ")
    assert found.choices[0].finish_reason == wanted.finish
    assert found.usage.completion_tokens == len(wanted.ids)
    assert found.usage.prompt_tokens == len("User: hello\n\nAssistant:")


def test_a_stream_is_the_answer_in_pieces(client):
    asked = {"model": "tiny", "messages": ASK, "seed": 8, "max_tokens": 40, "n": 2}
    whole = client.chat.completions.create(**asked)
    texts, ends, usage = {0: "", 1: ""}, {}, None
    for piece in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = piece.usage or usage
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage


def test_no_piece_breaks_a_character(client):
    text = "日本語, é and 🙂"
    asked = {"model": "tiny", "messages": ASK, "extra_body": {"guided_choice": [text]}, "stream": True}
    pieces = [piece.choices[0].delta.content or "" for piece in client.chat.completions.create(**asked)]
    assert "".join(pieces) == text
    assert sum(map(bool, pieces)) == len(text)


def test_prompts_are_written_on_with_log_probabilities(client):
    asked = {"model": "tiny", "prompt": ["once", "upon"], "max_tokens": 6, "seed": 1, "logprobs": 2, "n": 2}
    found = client.completions.create(**asked)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    for choice in found.choices:
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == len(told.top_logprobs)
        assert told.text_offset[0] == 0
        for word, value, likely in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
            assert likely[word] <= max(likely.values())
            assert value <= 0
    texts = {0: [], 1: [], 2: [], 3: []}
    for piece in client.completions.create(**asked, stream=True):
        texts[piece.choices[0].index].append(piece.choices[0].text)
    assert ["".join(pieces) for pieces in texts.values()] == [choice.text for choice in found.choices]


def test_log_probabilities_of_a_talk_are_the_models(client):
    found = client.chat.completions.create(
        model="tiny", messages=ASK, seed=2, max_tokens=5, logprobs=True, top_logprobs=3, temperature=0.5, stop=[]
    ).choices[0]
    entries = found.logprobs.content
    text = bytes(byte for entry in entries for byte in entry.bytes)
    engine = Engine(model(), ByteTokenizer(1), 1)
    ids = engine.begin("User: hello\n\nAssistant:")
    for entry in entries:
        logits, _ = engine.reader.read([ids])
        assert entry.logprob == pytest.approx(float(logits[0].log_softmax(-1)[entry.bytes[0] + 1]), abs=1e-4)
        assert len(entry.top_logprobs) == 3
        ids = [*ids, entry.bytes[0] + 1]
    assert text.decode("utf-8", "replace").removeprefix(" ").startswith(found.message.content)


def test_stop_texts_end_an_answer_wherever_tokens_meet(client):
    asked = {"model": "tiny", "prompt": "q", "extra_body": {"guided_choice": ["one two three"]}}
    assert client.completions.create(**asked, stop="o th").choices[0].text == "one tw"
    pieces = client.completions.create(**asked, stop=["o th", "zz"], stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "one tw"


def test_many_clients_at_once_get_what_each_gets_alone(home, client):
    def ask(seed: int) -> str:
        return client.completions.create(model="tiny", prompt="q", max_tokens=10, seed=seed).choices[0].text

    alone, found = [ask(seed) for seed in range(12)], {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: ask(n)})) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert [found[n] for n in range(12)] == alone


def test_a_client_that_leaves_frees_its_slot(home, client):
    desk = home[1]
    for stream in (True, False):
        body = {"model": "tiny", "prompt": "q", "max_tokens": 300, "n": 20, "logit_bias": {"0": -100}, "stream": stream}
        data = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", home[0])) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
            end = time.monotonic() + LONG
            while not desk.slots.busy and time.monotonic() < end:
                time.sleep(0.01)
        while desk.orders and time.monotonic() < end:
            time.sleep(0.01)
        assert not desk.orders
        more = client.completions.create(model="tiny", prompt="q", max_tokens=2, logit_bias={"0": -100})
        assert more.usage.completion_tokens == 2  # unless it may draw the end


def test_a_full_queue_is_told(home, client):
    desk, gate = home[1], threading.Event()
    plain = desk.slots.step
    desk.slots.step = lambda: (gate.wait(LONG), plain())[1]
    try:
        asked = {"model": "tiny", "prompt": "q", "n": 24, "max_tokens": 3, "logit_bias": {"0": -100}}  # none ends early
        held = threading.Thread(target=client.completions.create, kwargs=asked)
        held.start()
        end = time.monotonic() + LONG
        while not desk.orders and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="try again later") as caught:
            client.completions.create(model="tiny", prompt="q")
        assert caught.value.response.headers["Retry-After"] == "1"
        assert caught.value.code == "queue_full"
    finally:
        gate.set()
        held.join(LONG)
        desk.slots.step = plain


REFUSED = [
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"top_p": -1}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 301}, 400, "max_tokens"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": "\ud800"}, 400, "stop"),
    ({"logit_bias": {"900": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"9": 1e308}}, 400, "logit_bias.9"),
    ({"repetition_penalty": 1e300}, 400, "repetition_penalty"),
    ({"tools": []}, 400, "tools"),
    ({"guided_choice": ["x" * 9000]}, 400, "guided_choice"),
    ({"guided_regex": "("}, 400, None),
    ({"guided_json": {"maximum": 10**400}}, 400, None),
    ({"guided_json": {"const": float("inf")}}, 400, None),
    ({"guided_regex": "a", "guided_json": {}}, 400, "guided_regex"),
    ({"response_format": {"type": "xml"}}, 400, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, 400, "response_format"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"stream_options": {}}, 400, "stream_options"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "king", "content": "a"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "a\udc00"}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content"),
    ({"model": "other\ud800"}, 400, "model"),
    ({"model": "other"}, 404, "model"),
    ({"n": 25}, 400, None),
]


@pytest.mark.parametrize(("asked", "status", "param"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_honoured_is_refused_by_name(home, asked, status, param):
    found, data, _ = post(home, json.dumps({"model": "tiny", "messages": ASK, "max_tokens": 2} | asked))
    error = json.loads(data)["error"]
    assert (found, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert "\n" not in error["message"]


@pytest.mark.parametrize("asked", [{"prompt": [1, 999]}, {"prompt": [True]}, {"prompt": []}, {"echo": True}])
def test_prompts_that_are_none_are_refused(home, asked):
    assert post(home, json.dumps({"model": "tiny", "prompt": "a"} | asked), "/v1/completions")[0] == 400


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"", 400), (b"[]", 400), (b"[" * 10**5, 400), (b'{"model":"\xff"}', 400), (b"x" * (5 << 20), 413)],
)
def test_what_is_no_request_is_told_so(home, body, status):
    found, data, _ = post(home, body)
    assert found == status
    assert json.loads(data)["error"]["message"]


def test_other_addresses_methods_and_kinds_are_told_so(home):
    assert post(home, b"", "/v2/other")[0] == 404
    assert post(home, None, method="GET")[0] == 405
    assert post(home, b"{}", **{"Content-Type": "text/plain"})[0] == 415  # what a strange page may send unasked
    assert post(home, b"{}", Host="elsewhere.example")[0] == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_leads_nowhere_is_the_request_s_own_fault(home, client, stream):
    pytest.importorskip("llguidance")
    asked = {"model": "tiny", "prompt": "q", "guided_json": {"$ref": "#"}, "stream": stream}
    status, data, _ = post(home, json.dumps(asked), "/v1/completions")
    assert status == (200 if stream else 400)  # a stream has begun by then
    assert "went too far" in json.loads(data.removeprefix(b"data: "))["error"]["message"]
    assert (
        client.completions.create(
            model="tiny", prompt="q", max_tokens=2, logit_bias={"0": -100}
        ).usage.completion_tokens
        == 2
    )


def listener(port: int, body: dict, room: int | None) -> socket.socket:
    """A client that has read the beginning of a streamed answer, with so much room for what it does not read."""
    client = socket.socket()
    if room is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    client.settimeout(LONG)
    client.connect(("127.0.0.1", port))
    text = json.dumps(body)
    head = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{text}".encode())
    assert client.recv(20).startswith(b"HTTP/1.1 200")
    return client


@pytest.mark.parametrize("reads", [True, False], ids=["to one that reads", "to one that does not"])
def test_a_server_is_stopped_by_a_signal_while_it_writes(tmp_path, reads):
    network = model()
    store.write(tmp_path / "m.safetensors", network.config, network.state_dict())
    save_tokenizer(tmp_path / "tokenizer", ByteTokenizer(1))
    command = [sys.executable, "-m", "rwkvpipe.serve", "--model", "m.safetensors", "--tokenizer", "tokenizer"]
    command += ["--port", "0", "--sampling", '{"max_tokens": 1048576}']
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "RWKVPIPE_DEVICE": "cpu"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stderr if "serving" in line)
        port = int(re.search(r"serving m at http://127\.0\.0\.1:(\d+)/v1", line)[1])
        body = {"model": "m", "prompt": "q", "stream": True, "max_tokens": 2**20, "logit_bias": {"0": -100}}
        body |= {} if reads else {"logprobs": 5, "n": 8}  # so much that soon nothing more can be written
        with listener(port, body, None if reads else 4096) as client:
            if reads:
                threading.Thread(target=lambda: all(iter(lambda: client.recv(65536), b"")), daemon=True).start()
            else:
                time.sleep(4)
            process.send_signal(signal.SIGTERM)
            rest = process.communicate(timeout=LONG)[1]
        assert process.returncode == 0
        assert "Traceback" not in rest and "rror" not in rest, rest
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("said", "sampling"),
    [("sampling.ban: there is no id 999", {"ban": [999]}), ("sampling.stop: an empty text", {"stop": [""]})],
)
def test_sampling_that_no_request_can_be_answered_by_is_refused_at_the_start(tmp_path, said, sampling, monkeypatch):
    monkeypatch.setattr("rwkvpipe.web.app.serve", lambda *given: pytest.fail("it serves"))
    network = model()
    store.write(tmp_path / "m.safetensors", network.config, network.state_dict())
    with pytest.raises(ConfigError, match=said):
        words = ["--model", str(tmp_path / "m.safetensors"), "--tokenizer", "bytes"]
        serve.main([*words, "--sampling", json.dumps(sampling)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "0"], "--rows is 1 at least"),
        (["--port", "70000"], "--port: 70000 is no port"),
        (["--sampling", "{"], "--sampling"),
        (["--mode", "loud"], "--mode"),
    ],
)
def test_bad_words_are_refused_in_one_line(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        serve.main(["--model", "m", "--tokenizer", "bytes", *words])
    assert "\n" not in str(caught.value)


def test_without_the_web_library_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "rwkvpipe.web.app", raising=False)
    with pytest.raises(ConfigError, match=r"pip install '\.\[serve\]'"):
        serve.main(["--model", "m", "--tokenizer", "bytes"])


def test_a_model_is_called_by_its_file_or_its_folder():
    assert serve.called("/a/results/demo/chat/model.safetensors") == "chat"
    assert serve.called("rwkv7-g1.pth") == "rwkv7-g1"
