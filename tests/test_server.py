"""The server, through real sockets: what OpenAI's clients expect, what hostile ones try, and what happens when things fail.

The engine is the toy of test_engine.py in float64, so that an answer over HTTP can be compared with the offline one token by
token. Where a test is about *when* something happens, `Gate` lets the engine take its steps one by one.
"""

import asyncio
import contextlib
import http.client
import json
import math
import operator
import re
import socket
import threading
import time
from types import SimpleNamespace
from urllib.parse import quote

import load
import pytest
import torch
from test_engine import engine as toy_engine

import nanoserve
from nanoserve import LLM, Job, SamplingParams, main, serve

PATIENCE = 20  # seconds that a test waits for what must happen, before it fails
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
PROMPT = "Once upon a time"


def make(**options) -> LLM:
    llm = toy_engine(tokenizer="byte_level", **{"policy": "priority", **options})
    llm.tokenizer.chat_template = TEMPLATE
    return llm


@pytest.fixture(scope="module")
def server():
    with serve(make()) as server:
        yield server


@pytest.fixture(scope="module")
def offline():
    """The same engine without a server."""
    return make()


@pytest.fixture
def serving():
    """Start servers that are closed at the end of the test, whatever happens."""
    with contextlib.ExitStack() as stack:
        yield lambda llm=None, **options: stack.enter_context(serve(llm or make(), **options))


class Gate:
    """The engine's steps, one for each `open()`."""

    def __init__(self, llm: LLM):
        self.step, self.permits, llm.step = llm.step, threading.Semaphore(0), self._step
        self.entered = 0

    def _step(self):
        self.entered += 1
        self.permits.acquire()
        return self.step()

    def open(self, steps: int = 1):
        self.permits.release(steps)


def until(condition):
    """Wait for something that another thread is about to do."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)
    return value


def settle(server):
    """Wait until the loop has done what it was told to do so far."""
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), server.loop).result(PATIENCE)


def port_of(server) -> int:
    return int(server.url.rpartition(":")[2])


def call(server, path, body=None, **headers):
    """(status, headers, JSON or text) of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=PATIENCE)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request("GET" if body is None else "POST", path, data, headers)
    response = connection.getresponse()
    try:
        text = response.read()
    except http.client.IncompleteRead as cut:  # a stream that ends with an error has no end
        text = cut.partial
    connection.close()
    text, kind = text.decode(), response.headers["Content-Type"]
    return response.status, response.headers, json.loads(text) if kind == "application/json" else text


def complete(server, prompt=PROMPT, **fields) -> dict:
    """The answer of /v1/completions."""
    status, _, answer = call(server, "/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
    assert status == 200, answer
    return answer


def events_of(text: str) -> list:
    """The events of a stream, which must be whole."""
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]


def stream(server, path="/v1/completions", **body) -> list:
    """The events of a streamed answer."""
    status, headers, text = call(server, path, {"stream": True, "temperature": 0, **body})
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream"), text
    return events_of(text)


def raw(server, data: bytes, half_close=False) -> bytes:
    """Send bytes and read until the server hangs up."""
    with socket.create_connection(("127.0.0.1", port_of(server)), PATIENCE) as client:
        client.sendall(data)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(65536):
                received += piece
        return received


@contextlib.contextmanager
def narrow(server):
    """A client and its connection, the server's only one. Their sockets hold next to nothing, so that answers pile up."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", port_of(server)))
        (connection,) = until(lambda: list(server.connections.values()))
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield client, connection


def post(body, path="/v1/completions", headers="") -> bytes:
    """A request's bytes."""
    return load.http("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)


def status_of(received: bytes) -> int:
    return int(re.match(rb"HTTP/1\.1 (\d{3}) [\w ]+\r\n", received)[1])


def is_idle(llm) -> bool:
    """Nothing waits, runs or holds a block. Only the engine thread touches these, so ask when it has nothing to do."""
    return not llm.has_work() and llm.pool.num_free == llm.pool.num_usable


# ---- answers ----


def test_a_completion_is_what_the_engine_says(server, offline):
    output = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))[0]
    answer = complete(server, max_tokens=12)
    assert answer["choices"] == [{"index": 0, "text": output.text, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": len(output.prompt_token_ids), "completion_tokens": 12,
                               "total_tokens": len(output.prompt_token_ids) + 12}
    assert answer["object"] == "text_completion" and answer["model"] == "nanoserve" and answer["id"].startswith("cmpl-")
    assert complete(server)["usage"]["completion_tokens"] == 16  # OpenAI's default


def test_an_engine_whose_steps_overlap(serving, offline):
    """It answers the same, and somebody who leaves takes along what is in flight."""
    llm = make(overlap=True)
    server = serving(llm)
    text = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))[0].text
    assert complete(server, max_tokens=12)["choices"][0]["text"] == text
    events = stream(server, prompt=PROMPT, max_tokens=12)
    assert "".join(event["choices"][0]["text"] for event in events) == text
    gate = Gate(llm)
    with socket.create_connection(("127.0.0.1", port_of(server)), PATIENCE) as client:
        client.sendall(post({"prompt": PROMPT, "max_tokens": 90, "stream": True, "ignore_eos": True}))
        gate.open(4)
        until(lambda: gate.entered == 5)
    until(lambda: not server.engine.commands.empty())  # it is to be forgotten
    gate.open(100)
    until(lambda: is_idle(llm))
    assert llm.stats()["aborted"] == 1 and complete(server, max_tokens=12)["choices"][0]["text"] == text


@pytest.mark.parametrize("prompt", [[PROMPT, "One day"], [[5, 6, 7], [8, 9]], [5, 6, 7]], ids=str)
@pytest.mark.parametrize("streamed", [False, True])
def test_all_forms_of_prompts_with_n_samples(server, offline, prompt, streamed):
    """Choices are numbered prompt by prompt; usage counts each prompt once."""
    params = SamplingParams(temperature=0.9, seed=3, n=3, max_tokens=6)
    prompts = [prompt] if type(prompt[0]) is int else prompt
    outputs = offline.generate(prompts, params)
    fields = {"prompt": prompt, "n": 3, "temperature": 0.9, "seed": 3, "max_tokens": 6}
    texts = [""] * len(outputs)
    if streamed:
        *chunks, last = stream(server, **fields, stream_options={"include_usage": True})
        for chunk in chunks:
            assert chunk["usage"] is None
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert last["choices"] == []
    else:
        last = complete(server, **fields)
        texts = [choice["text"] for choice in last["choices"]]
        assert [choice["index"] for choice in last["choices"]] == list(range(len(outputs)))
    assert texts == [output.text for output in outputs] and len(set(texts)) > 1
    assert last["usage"]["completion_tokens"] == sum(len(output.token_ids) for output in outputs)
    assert last["usage"]["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in outputs[::3])


@pytest.mark.parametrize("streamed", [False, True])
def test_chat(server, offline, streamed):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    ids = offline.tokenizer.apply_chat_template([messages[0], {"role": "user", "content": "Hi"}])
    output = offline.generate([ids], SamplingParams(temperature=0, max_tokens=9))[0]
    body = {"messages": messages, "max_completion_tokens": 9, "temperature": 0, "user": "me", "metadata": {"a": "b"}}
    if streamed:
        chunks = stream(server, "/v1/chat/completions", **body)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""} and all("role" not in delta for delta in deltas[1:])
        assert "".join(delta.get("content", "") for delta in deltas) == output.text
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and not any("usage" in c for c in chunks)
    else:
        _, _, answer = call(server, "/v1/chat/completions", body)
        assert answer["choices"] == [{"index": 0, "message": {"role": "assistant", "content": output.text, "refusal": None},
                                      "logprobs": None, "finish_reason": "length"}]
        assert answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] == len(ids)


def test_a_chat_without_a_limit_gets_what_fits(server, offline):
    messages = [{"role": "user", "content": "Hi"}]
    room = offline.longest_request - len(offline.tokenizer.apply_chat_template(messages))
    _, _, answer = call(server, "/v1/chat/completions", {"messages": messages, "temperature": 0, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == room and answer["choices"][0]["finish_reason"] == "length"


def test_stop_strings_end_the_text_and_never_leak(server, offline):
    """Not in the text, not in the tokens of the log-probabilities, streamed or not."""
    text = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24))[0].text
    stop = text[9:12]
    before = text[: text.index(stop)]
    whole = complete(server, max_tokens=24, stop=[stop, "never said"], logprobs=0)["choices"][0]
    assert whole["text"] == before and whole["finish_reason"] == "stop"
    assert "".join(whole["logprobs"]["tokens"]).startswith(before) and stop not in "".join(whole["logprobs"]["tokens"])
    choices = [event["choices"][0] for event in stream(server, prompt=PROMPT, max_tokens=24, stop=stop, logprobs=0)]
    assert "".join(choice["text"] for choice in choices) == before and choices[-1]["finish_reason"] == "stop"
    shown = ""
    for choice in choices:
        shown += choice["text"]
        told = [(o, t) for o, t in zip(*((choice["logprobs"] or {}).get(k, []) for k in ("text_offset", "tokens")))]
        assert all(offset < len(shown) for offset, _ in told)


def test_a_stop_token_ends_it_and_counts_but_does_not_show(server, offline):
    ids = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8))[0].token_ids
    at = ids.index(ids[4])
    answer = complete(server, max_tokens=8, stop_token_ids=[ids[4]], logprobs=1)
    assert answer["usage"]["completion_tokens"] == at + 1 and answer["choices"][0]["finish_reason"] == "stop"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == at


def test_no_half_characters_are_streamed(serving, monkeypatch):
    """The engine is made to say a text whose characters are several tokens each."""
    llm, said = make(), "née 🦊 žluť"
    script = llm.tokenizer.encode(said, add_special_tokens=False)

    def sample(batch, samplers, logits):
        tokens = [script[request.num_output] for request, *_ in samplers]
        return tokens, [{token: -1.5} for token in tokens]

    def alone():  # or several tokens could come in one piece
        settle(server)
        return step()

    step, server = llm.step, serving(llm)
    monkeypatch.setattr(llm, "sample", sample)
    monkeypatch.setattr(llm, "step", alone)
    monkeypatch.setattr(nanoserve, "STREAM_GAP", 0)
    chunks = stream(server, "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], max_tokens=len(script),
                    logprobs=True, ignore_eos=True)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces).lstrip() == said and len(script) > len([piece for piece in pieces if piece]) > 3
    assert "�" not in "".join(pieces)
    content = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode().lstrip() == said
    assert len(content) == len(script)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs_of_completions(server, offline, echo, streamed):
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=2)
    output = offline.generate(PROMPT, params)[0]
    fields = {"max_tokens": 6, "logprobs": 2, "echo": echo}
    if streamed:
        choices = [event["choices"][0] for event in stream(server, prompt=PROMPT, **fields)]
        text, got = "".join(choice["text"] for choice in choices), {}
        for choice in choices:
            for key, values in (choice["logprobs"] or {}).items():
                got.setdefault(key, []).extend(values)
    else:
        choice = complete(server, **fields)["choices"][0]
        text, got = choice["text"], choice["logprobs"]
    ids = (output.prompt_token_ids if echo else []) + output.token_ids
    expected = (output.prompt_logprobs if echo else []) + output.logprobs
    assert text == (PROMPT if echo else "") + output.text
    assert got["token_logprobs"] == [top and pytest.approx(top[token]) for token, top in zip(ids, expected)]
    assert [top and len(top) for top in got["top_logprobs"]] == [top and len(top) for top in expected]
    ends = [*got["text_offset"][1:], len(text)]
    shown = [text[start:end] for start, end in zip(got["text_offset"], ends)]
    assert shown == ([""] if echo else []) + got["tokens"][echo:] and "".join(shown) == text and len(shown) == len(ids)
    assert not echo or got["tokens"][0] == "<|begin_of_text|>"


def test_offsets_of_special_tokens_that_the_prompt_writes_out(server, offline):
    """As in a chat that the client has rendered itself; a token that the tokenizer adds is not in the text."""
    words = ["<|begin_of_text|>", "one", "<|end_of_text|>", "<|end_of_text|>", "two"]
    assert {words[0], words[2]} <= {offline.tokenizer.backend.id_to_token(i) for i in offline.tokenizer.special_ids}
    for prompt in ("".join(words), "".join(words[1:]), offline.tokenizer.encode("one")):
        choice = complete(server, prompt, echo=True, logprobs=0, max_tokens=2, n=2, seed=1)["choices"][1]
        got = choice["logprobs"]
        ends = [*got["text_offset"][1:], len(choice["text"])]
        shown = [choice["text"][start:end] for start, end in zip(got["text_offset"], ends)]
        assert [text for text in shown if text] == [token for token, text in zip(got["tokens"], shown) if text]
        assert "".join(shown) == choice["text"] and shown.count("") == 1


def test_offsets_of_a_prompt_that_ends_inside_a_character(server, offline):
    ids = offline.tokenizer.encode("one 🦊", add_special_tokens=False)
    assert offline.tokenizer.decode(ids[:-1]) == "one \ufffd"
    logprobs = complete(server, ids[:-1], echo=True, logprobs=0, max_tokens=1)["choices"][0]["logprobs"]
    told = list(zip(logprobs["tokens"], logprobs["text_offset"]))
    assert told[0][1] == 0 and all("one "[at:].startswith(token) for token, at in told if "\ufffd" not in token and at < 4)


def test_logprobs_of_a_chat(server, offline):
    messages = [{"role": "user", "content": "Hi"}]
    ids = offline.tokenizer.apply_chat_template(messages)
    output = offline.generate([ids], SamplingParams(temperature=0, max_tokens=5, logprobs=3))[0]
    _, _, answer = call(server, "/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 5,
                                                         "logprobs": True, "top_logprobs": 3})
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [pytest.approx(top[token]) for token, top in
                                                       zip(output.token_ids, output.logprobs)]
    assert [[top["logprob"] for top in entry["top_logprobs"]] for entry in content] == [
        pytest.approx(list(top.values())[:3]) for top in output.logprobs]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == output.text
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in content)


@pytest.mark.parametrize("folder", ["byte_level", "metaspace", "prepend"])
def test_the_bytes_of_tokens_make_up_their_text(folder):
    tokenizer = nanoserve.Tokenizer(load.ROOT / "tests" / "data" / "tokenizers" / folder)
    for text in ("Once upon a time", "née 🦊\n žluť", "<|x|> 12"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().strip() == text
    assert tokenizer.token_bytes(10**6) == b""


def test_every_sampling_field_arrives():
    body = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "n": 2, "stop": ["a", "b"], "seed": 4,
            "max_tokens": 9, "presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "logprobs": 3,
            "logit_bias": {"5": -100, "6": 1.5}, "ignore_eos": True, "min_tokens": 2, "stop_token_ids": [3],
            "ttft_target": 0.5, "itl_target": 0.1, "deadline": 60}
    assert set(body) == nanoserve.SAMPLING_FIELDS
    params = SamplingParams(**{**body, "logit_bias": {5: -100, 6: 1.5}})
    assert Job({"prompt": "x", **body}, is_chat=False).params == params
    nothing = Job({"prompt": "x", "suffix": None, **dict.fromkeys(body)}, is_chat=False)
    assert nothing.params == SamplingParams(max_tokens=16)


def test_a_template_that_refuses_is_the_messages_fault(serving):
    llm = make()
    server = serving(llm)
    llm.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    for path in ("/v1/chat/completions", "/tokenize"):
        status, _, answer = call(server, path, {"messages": [{"role": "user", "content": "x"}]})
        assert (status, answer["error"]["param"]) == (400, "messages") and "alternate" in answer["error"]["message"]


def test_seeds_and_biases_and_penalties_act(server, offline):
    fields = {"temperature": 1.3, "seed": 11, "top_k": 20, "repetition_penalty": 1.3, "max_tokens": 12}
    output = offline.generate(PROMPT, SamplingParams(logit_bias={200: 3.0}, **fields))[0]
    assert complete(server, logit_bias={"200": 3.0}, **fields)["choices"][0]["text"] == output.text


# ---- what is refused ----


@pytest.mark.parametrize("fields, status, param", [
    ({"temprature": 1}, 400, "temprature"), ({"temperature": -1}, 400, "temperature"), ({"n": True}, 400, "n"),
    ({"n": 2.0}, 400, "n"), ({"n": 17}, 400, "n"), ({"n": 4096}, 400, "n"), ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"), ({"max_tokens": 2000}, 400, "prompt"), ({"seed": 1.5}, 400, "seed"),
    ({"stop": [""]}, 400, "stop"), ({"stop": ["x"] * 17}, 400, "stop"), ({"stream": 1}, 400, "stream"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"), ({"logit_bias": {"5": "y"}}, 400, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias"), ({"logit_bias": [1]}, 400, "logit_bias"),
    ({"logprobs": True}, 400, "logprobs"), ({"logprobs": 21}, 400, "logprobs"),
    ({"echo": "yes"}, 400, "echo"), ({"best_of": 2}, 400, "best_of"),
    ({"suffix": "z"}, 400, "suffix"), ({"tools": [{}]}, 400, "tools"), ({"messages": []}, 400, "messages"),
    ({"stream": None, "stream_options": {}}, 400, "stream_options"), ({"top_logprobs": 1}, 400, "top_logprobs"),
    ({"stream": True, "stream_options": {"oops": 1}}, 400, "stream_options"), ({"priority": "high"}, 400, "priority"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "include_usage"), ({"cache_salt": 5}, 400, "cache_salt"),
    ({"prompt": None}, 400, "prompt"), ({"prompt": {}}, 400, "prompt"), ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"), ({"prompt": ["x", 1]}, 400, "prompt"), ({"prompt": [1.5]}, 400, "prompt"),
    ({"prompt": [True]}, 400, "prompt"), ({"prompt": [5, 400]}, 400, "prompt"), ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [10**30]}, 400, "prompt"), ({"prompt": ["x"] * 2000}, 400, "n"), ({"min_tokens": 17}, 400, "min_tokens"),
    ({"prompt": ["fine", "x" * 2000]}, 400, "prompt"), ({"model": "gpt-5"}, 404, "model"), ({"model": 5}, 404, "model"),
    ({"user": 5}, 400, "user"), ({"deadline": -1}, 400, "deadline"), ({"ttft_target": "1"}, 400, "ttft_target"),
    ({"priority": 10**400, "max_tokens": -1}, 400, "max_tokens")], ids=str)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_refused_is_named(server, fields, status, param, streamed):
    """Before anything is streamed."""
    got, _, answer = call(server, "/v1/completions", {"prompt": "x", "stream": streamed, **fields})
    assert (got, answer["error"]["param"]) == (status, param)
    assert set(answer["error"]) == {"message", "type", "param", "code"} and answer["error"]["message"]


def test_a_field_that_asks_for_nothing_is_no_error(server):
    """Clients send these where nothing is wanted; where something is, they are refused by name."""
    for name, value in nanoserve.NEUTRAL_VALUES.items():
        assert complete(server, max_tokens=2, **{name: value})["choices"] == complete(server, max_tokens=2)["choices"]
        for other in (f"{value}!", [value], {"type": value}):
            status, _, answer = call(server, "/v1/completions", {"prompt": "x", name: other})
            assert (status, answer["error"]["param"]) == (400, name)


@pytest.mark.parametrize("name", ["a model", "Qwen/Qwen3-0.6B", "größer", "an org/a model (v1)"])
def test_a_model_by_its_name(serving, name):
    server = serving(model_name=name)
    whole = quote(name, safe="")
    for path in {whole, quote(name), quote(name, safe="/()"), whole.replace("%2F", "%2f")}:
        assert call(server, f"/v1/models/{path}")[2] == call(server, "/v1/models")[2]["data"][0]
    assert call(server, "/v1/models/else")[0] == 404


@pytest.mark.parametrize("fields, param", [
    ({"messages": "hi"}, "messages"), ({"messages": [{"content": "x"}]}, "messages"), ({"messages": [5]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages"), ({"prompt": "x"}, "prompt"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"), ({"logprobs": 3}, "logprobs"), ({"echo": True}, "echo"),
    ({"logprobs": True, "top_logprobs": 1.0}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": ""}, "top_logprobs"), ({"logprobs": True, "top_logprobs": False}, "top_logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format")], ids=str)
def test_what_a_chat_refuses(server, fields, param):
    status, _, answer = call(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], **fields})
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"5", b'{"prompt": "x", "prompt": "y"}', b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "\xff"}',
    b'{"prompt": "x", "temperature": -Infinity}', b'{"prompt": "x", "temperature": 1e999}', b'{"prompt": "\\ud800"}',
    b'{"prompt": ' + b"[" * 100_000, b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", b'\xef\xbb\xbf{"prompt": "x"}',
    b'{"prompt": "x", "\\ud800": 1}', b'{"prompt": "x",}'], ids=lambda body: repr(body[:40]))
def test_json_that_is_none(server, body):
    received = raw(server, post(body))
    assert status_of(received) == 400 and b"Traceback" not in received and b".py" not in received


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("data, status", [
    (HEAD + b"\r\n", 411), (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", 411),
    (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400), (HEAD + b"Content-Length: 2, 2\r\n\r\n{}", 400),
    (HEAD + b"Content-Length: +2\r\n\r\n{}", 400), (HEAD + b"Content-Length: -2\r\n\r\n{}", 400),
    (HEAD + b"Content-Length: 0x2\r\n\r\n{}", 400), (HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n{}", 400),
    (HEAD + b"Content-Length: 5000000\r\n\r\n", 413), (HEAD + b"X : y\r\n\r\n", 400), (HEAD + b" folded\r\n\r\n", 400),
    (HEAD + b"X: a\rb\r\n\r\n", 400), (HEAD + b"X: a\nb\r\n\r\n", 400), (HEAD + b"X: \0\r\n\r\n", 400),
    (HEAD + b"nothing\r\n\r\n", 400), (HEAD + b"Host: y\r\n\r\n", 400), (HEAD + b"X: " + b"y" * 40_000 + b"\r\n\r\n", 431),
    (HEAD + b"Content-Type: a/b\r\n\r\n", 400),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 415),
    (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 400), (b"GET /health HTTP/2.0\r\n\r\n", 400),
    (b"GET  /health HTTP/1.1\r\nHost: x\r\n\r\n", 400), (b"G\0T /health HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET /health\r\n\r\n", 400), (b"\r\n\r\n\r\n\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    (b"GET /health HTTP/1.0\r\n\r\n", 200), (b"GET /health?x=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
    (b"HEAD /tokenize HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    (b"HEAD /events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    (b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", 405),
    (b"GET /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    (b"BREW /tokenize HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404)], ids=lambda x: repr(x)[:60])
def test_strict_http(server, data, status):
    received = raw(server, data)
    assert status_of(received) == status and b"Traceback" not in received
    if status == 405:
        assert re.search(rb"\r\nAllow: (GET|GET, HEAD|POST)\r\n", received)


@pytest.mark.parametrize("path, field, long", [("/v1/completions", "prompt", ["x"] * 20_000),
                                               ("/v1/chat/completions", "messages", [{}] * 20_000),
                                               ("/tokenize", "prompt", ["x"] * 20_000),
                                               ("/detokenize", "tokens", [400] * 20_000)], ids=str)
def test_long_bodies_are_read_beside_the_loop(serving, monkeypatch, path, field, long):
    """Both their JSON and what it says; what is wrong with them is told all the same."""
    server, readers, real = serving(), [], nanoserve.check_fields

    def check_fields(*args):
        readers.append(threading.current_thread().name.rsplit("_")[0])
        return real(*args)

    monkeypatch.setattr(nanoserve, "check_fields", check_fields)
    for value in (long[:2], long):
        status, _, answer = call(server, path, {field: value, "temprature": 1})
        assert (status, answer["error"]["param"]) == (400, "temprature")
    assert readers == ["nanoserve loop", "nanoserve text"]


def test_a_body_arrives_before_it_is_read(serving, monkeypatch):
    """The time to a first token is that which the client waits, for one of the threads too."""
    server, read, began, arrived = serving(), nanoserve.parse_json, [], []
    monkeypatch.setattr(nanoserve, "parse_json", lambda body: (began.append(time.perf_counter()), read(body))[1])
    add = server.engine.add
    monkeypatch.setattr(server.engine, "add", lambda job: (arrived.append(job.arrival_time), add(job)))
    for metadata in ("short", "long" * nanoserve.SHORT_BODY):
        complete(server, max_tokens=1, metadata={"text": metadata})
    assert all(map(operator.le, arrived, began)) and len(arrived) == len(began) == 2


@pytest.mark.parametrize("max_body", [1, 4 << 20])
def test_a_body_that_is_too_long_is_refused_though_it_is_still_being_sent(serving, max_body):
    """The answer must not be lost to a reset because bytes were left unread."""
    received = raw(serving(max_body=max_body), post(b" " * (5 << 20)))
    assert status_of(received) == 413 and b"max_body=%d" % max_body in received


@pytest.mark.parametrize("option", [{"max_queue": -1}, {"max_body": 0}, {"max_body": 0.5}, {"max_connections": 0},
                                    {"timeout": 0}, {"timeout": -1.0}, {"timeout": float("nan")}], ids=str)
def test_limits_that_are_none(option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))}: "):
        serve(make(), **option)


@pytest.mark.parametrize("option", ["--timeout=-1", "--timeout=nan", "--timeout=0", "--drain-seconds=-1", "--max-queue=-1",
                                    "--max-connections=0", "--max-body=0.5"])
def test_limits_that_are_none_on_the_command_line(option, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(nanoserve, "make_llm", lambda args: loaded.append(args) or make())
    with contextlib.suppress(SystemExit):
        assert main(["serve", "--port", "0", option]) == 2
    assert not loaded or option in ("--timeout=0", "--max-body=0.5"), "a typing error is told before a model is loaded"
    name = option[2:].partition("=")[0]
    assert (error := capsys.readouterr().err) and name.replace("-", "_") in error.replace("-", "_")


def test_no_more_connections_than_files(monkeypatch, caplog):
    """Or accepting would fail, for everybody."""
    monkeypatch.setattr(nanoserve, "max_open_files", lambda: 100)
    caplog.set_level("INFO")
    with serve(make()) as server:
        assert server.max_connections == 36 and "at most 36 connections" in caplog.text
    with serve(make(), max_connections=20) as server:
        assert server.max_connections == 20


def test_an_empty_key_is_not_taken_for_none():
    with pytest.raises(ValueError, match="^api_key: "):
        serve(make(), api_key="")


def test_expect_100_continue(server):
    received = raw(server, post({"prompt": "x"}, headers="Expect: 100-continue\r\n"))
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_http_1_0_knows_no_100_continue(server):
    received = raw(server, post({"prompt": "x"}, headers="Expect: 100-continue\r\n").replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert status_of(received) == 200


@pytest.mark.parametrize("surplus", [0, 1])
def test_the_longest_head_there_may_be(serving, surplus):
    """Blank line and all: what may come before the loop reads no more has room for it and the longest body."""
    head, _, body = post({"prompt": "x", "max_tokens": 1}).partition(b"\r\n\r\n")
    padding = nanoserve.MAX_HEAD - len(head) - len(b"\r\nX: \r\n\r\n") + surplus
    received = raw(serving(max_body=len(body)), head + b"\r\nX: " + b"x" * padding + b"\r\n\r\n" + body)
    assert status_of(received) == (431 if surplus else 200)


@pytest.mark.parametrize("path, status", [("/health", 200), ("/v1/models", 200), ("/", 200), ("/tokenize", 405)])
def test_an_answer_to_head_has_no_body(server, path, status):
    """Else it is the one to GET, length and all."""
    received = raw(server, b"HEAD %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode() + load.http("GET", path))
    head, _, rest = received.partition(b"\r\n\r\n")
    assert status_of(head) == status_of(rest) == status
    length, other = (int(re.search(rb"Content-Length: ([0-9]+)", part)[1]) for part in (head, rest))
    assert length == other > 0 or status != 200


@pytest.mark.parametrize("data, status", [(b"POST /v1/comp", 408), (HEAD + b"Content-Length: 9\r\n\r\n{", 408), (b"", None)])
def test_a_client_that_sends_too_slowly_is_let_go(serving, data, status):
    server = serving(timeout=PATIENCE if data else 0.2)
    with socket.create_connection(("127.0.0.1", port_of(server)), PATIENCE) as client:
        until(lambda: server.connections or not data)
        settle(server)  # it waits for a first byte, and is patient
        server.timeout = 0.2
        client.sendall(data)
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert status_of(received) == status if status else received == b""


def test_the_key(serving):
    server = serving(api_key="sésame")
    body = {"prompt": "x", "max_tokens": 1}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "Basic sésame"}):
        for path in ("/v1/completions", "/metrics", "/nowhere"):
            status, got, answer = call(server, path, None if path == "/metrics" else body,
                                       **{k: v.encode() for k, v in headers.items()})
            assert (status, answer["error"]["code"], got["WWW-Authenticate"]) == (401, "invalid_api_key", "Bearer")
    assert call(server, "/v1/completions", body, Authorization="Bearer sésame".encode())[0] == 200
    assert call(server, "/health")[0] == 200


# Their last bytes in UTF-8 are spaces in Latin-1, which headers are read as. The last has a byte that is no UTF-8.
@pytest.mark.parametrize("key", ["voilà", "Å", "a\xa0", "two words", "caf\udce9"])
def test_keys_of_all_sorts(serving, key):
    server, sent = serving(api_key=key), key.encode("utf-8", "surrogateescape")
    assert call(server, "/stats", Authorization=b"Bearer " + sent)[0] == 200
    assert call(server, "/stats", Authorization=b"Bearer \t" + sent + b" \t")[0] == 200
    assert call(server, "/stats", Authorization=b"Bearer " + sent[:-1])[0] == 401


@pytest.mark.parametrize("key", [" x", "x ", "x\n", "x\ty", "\0"])
def test_a_key_that_nobody_could_send_is_refused(key):
    with pytest.raises(ValueError, match="^api_key: ") as error:
        serve(make(), api_key=key)
    assert key not in str(error.value)


# ---- connections ----


def test_connections_are_kept_and_reused(server):
    client = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=PATIENCE)
    ports = set()
    for fields in ({"max_tokens": 2}, {"n": 0}, {"max_tokens": 2, "stream": True}):
        body = {"prompt": "x", **fields}
        client.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        ports.add(client.sock.getsockname())
        response = client.getresponse()
        assert response.read() and response.headers["Connection"] == "keep-alive" and "Access-Control" not in str(
            response.headers)
    client.request("GET", "/nowhere")
    assert client.getresponse().read() and client.sock.getsockname() in ports and len(ports) == 1
    client.close()


@pytest.mark.parametrize("at_once", [False, True])
def test_a_client_that_sends_ahead_gets_one_answer_and_is_hung_up_on(serving, at_once):
    llm = make()
    gate, server = Gate(llm), serving(llm)
    with socket.create_connection(("127.0.0.1", port_of(server)), PATIENCE) as client:
        request = post({"prompt": "x", "max_tokens": 1}).replace(b"Connection: close\r\n", b"")
        client.sendall(request * (1 + at_once))
        until(lambda: llm.has_work())
        client.sendall(request * (not at_once))
        until(lambda: not next(iter(server.connections.values())).keep_alive)
        gate.open(1)
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert received.count(b"HTTP/1.1") == 1 and b"\r\nConnection: close\r\n" in received and b'"usage"' in received


def test_one_that_sends_many_requests_ahead_takes_turns_with_others(serving, monkeypatch):
    server, seen, go = serving(), [], threading.Event()
    route = server.route
    monkeypatch.setattr(server, "route", lambda method, path, headers: (seen.append(path), route(method, path, headers))[1])
    with contextlib.ExitStack() as stack:
        greedy, other = (stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server)), PATIENCE))
                         for _ in range(2))
        until(lambda: len(server.connections) == 2)
        settle(server)
        server.loop.call_soon_threadsafe(go.wait, PATIENCE)  # until then the loop sees nothing
        greedy.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        other.sendall(load.http("GET", "/v1/models"))
        go.set()
        assert other.recv(65536)
        assert seen.index("/v1/models") < 50
        until(lambda: len(seen) == 101)


@pytest.mark.parametrize("how", ["close", "half-close", "half-close, having sent ahead", "half-close, having sent more",
                                 "half-close, having asked again", "the server stops"])
def test_who_still_reads_gets_the_end_of_the_answer(serving, how):
    """All of it is written, but not sent yet, when the server is to hang up or to stop, or the client asks for no more."""
    llm = make()
    server, gate = serving(llm), Gate(llm)
    with narrow(server) as (client, connection):
        request = post({"tokens": [70] * 60_000}, "/detokenize")
        client.sendall((request if how == "close" else request.replace(b"Connection: close\r\n", b"")) +
                       b"\r\n" * ("ahead" in how))
        until(connection.transport.get_write_buffer_size)
        settle(server)
        assert not connection.is_full  # its task goes on
        if how == "the server stops":
            closing = threading.Thread(target=server.close)
            closing.start()
            until(connection.transport.is_closing)
        elif how != "close":
            client.sendall(post({"prompt": "x"}) if "again" in how else b"\r\n" * ("more" in how))
            until(lambda: gate.entered or "again" not in how)
            client.shutdown(socket.SHUT_WR)
            gate.open(100)
            until(lambda: connection.has_left)
            settle(server)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            received = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert len(body) == int(re.search(rb"Content-Length: (\d+)", head)[1]) > 60_000
    until(lambda: not server.connections)


def test_http_1_0_gets_a_stream_without_chunks(server):
    received = raw(server, post({"prompt": "x", "stream": True, "max_tokens": 2}).replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"chunked" not in head and events_of(body.decode())[-1]["choices"][0]["finish_reason"] == "length"


def test_too_many_connections(serving):
    server = serving(max_connections=2)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server))))
        until(lambda: len(server.connections) == 2)
        received = raw(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", half_close=True)
        assert status_of(received) == 503 and b"\r\nRetry-After: 1\r\n" in received
    until(lambda: not server.connections)
    assert call(server, "/health")[0] == 200


def test_a_full_queue_is_429_and_says_when_to_come_back(serving):
    llm = make(max_batch_requests=2)
    gate, server = Gate(llm), serving(llm, max_queue=1)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(complete(server, max_tokens=2))) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: server.num_samples == 3)
    status, headers, answer = call(server, "/v1/completions", {"prompt": "x"})
    assert (status, headers["Retry-After"], answer["error"]["code"]) == (429, "1", "queue_full")
    assert call(server, "/v1/completions", {"prompt": "x", "n": 4})[0] == 400  # would never fit
    gate.open(100)
    for thread in threads:
        thread.join(PATIENCE)
    assert len(answers) == 3 and complete(server, max_tokens=2)


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("streamed", [False, True])
def test_who_leaves_is_aborted_within_one_step(serving, streamed, how):
    llm = make()
    gate, server = Gate(llm), serving(llm)
    client = socket.create_connection(("127.0.0.1", port_of(server)), PATIENCE)
    client.sendall(post({"prompt": PROMPT, "max_tokens": 90, "n": 2, "stream": streamed}))
    gate.open(3)
    until(lambda: gate.entered == 4)
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    if how == "half-close":
        client.shutdown(socket.SHUT_WR)
    else:
        client.close()
    until(lambda: not server.engine.commands.empty())
    gate.open(1)  # the step that was under way
    until(lambda: is_idle(llm))
    assert llm.stats()["steps"] == 4 and llm.stats()["aborted"] == 2
    client.close()
    gate.open(100)
    assert complete(server, max_tokens=2)["choices"][0]["finish_reason"] == "length"


def test_who_leaves_while_the_server_waits_for_it_to_read_is_aborted(serving):
    """Room to write and the end of the connection come at once: before Python 3.12, wait_for loses a cancellation then."""
    llm, go = make(), threading.Event()
    gate, server = Gate(llm), serving(llm)
    with socket.create_connection(("127.0.0.1", port_of(server)), PATIENCE) as client:
        client.sendall(post({"prompt": [5, 6], "max_tokens": 100, "n": 16, "logprobs": 20, "stream": True,
                             "ignore_eos": True}))
        gate.open(1)
        until(lambda: gate.entered == 2)
        transport = next(iter(server.connections.values())).transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        while transport.get_write_buffer_size() < 1 << 16:
            gate.open(1)
            until(lambda entered=gate.entered: gate.entered > entered or transport.get_write_buffer_size() > 1 << 16)
            time.sleep(0.02)
        server.loop.call_soon_threadsafe(go.wait, PATIENCE)  # until then the loop sees nothing
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        client.settimeout(0.1)
        with contextlib.suppress(socket.timeout):
            while client.recv(1 << 20):
                pass
    go.set()
    until(lambda: not server.engine.commands.empty())  # it is to be forgotten
    gate.open(200)
    until(lambda: is_idle(llm))
    assert llm.stats()["finished"] == 0 and llm.stats()["aborted"] == 16


def test_who_reads_slowly_holds_up_nobody_and_gets_everything(serving, monkeypatch):
    """Megabytes wait for a client that does not read; others are answered, and it gets all of it in fewer events."""
    monkeypatch.setattr(nanoserve, "MAX_LOGPROBS", 400)
    monkeypatch.setattr(nanoserve, "STREAM_GAP", 0)  # every step's tokens are sent at once
    llm = make()
    gate = Gate(llm)
    server = serving(llm)
    body = {"prompt": PROMPT, "max_tokens": 100, "n": 8, "stream": True, "logprobs": 400, "temperature": 0,
            "ignore_eos": True}

    with narrow(server) as (client, connection):
        buffered = connection.transport.get_write_buffer_size
        client.sendall(post(body))
        until(lambda: gate.entered)
        while buffered() <= 1 << 16 and gate.entered < 50:  # asyncio's mark: above it the server waits for the reader
            gate.open()
            until(lambda: gate.permits._value == 0)
        before = buffered()
        gate.open(1000)
        until(lambda: llm.stats()["finished"] == 8)
        text = complete(server, max_tokens=100, ignore_eos=True)["choices"][0]["text"]
        assert 0 < buffered() < 2 * before < 1 << 20  # neither was all sent, nor was it all handed to the socket
        received = b"".join(iter(lambda: client.recv(1 << 20), b""))
    body = re.sub(rb"(?:^|\r\n)[0-9a-f]+\r\n", b"", received.partition(b"\r\n\r\n")[2]).decode().removesuffix("\r\n")
    events, texts = events_of(body), [""] * 8
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [text] * 8 and len(events) < 8 * 100
    assert sum(len(event["choices"][0]["logprobs"]["tokens"]) for event in events if event["choices"][0]["logprobs"]) == 800


def test_who_reads_nothing_at_all_is_given_up(serving, monkeypatch):
    monkeypatch.setattr(nanoserve, "MAX_LOGPROBS", 400)
    llm = make()
    server = serving(llm)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port_of(server)))
        client.sendall(post({"prompt": PROMPT, "max_tokens": 100, "n": 16, "logprobs": 400, "temperature": 0}))
        until(lambda: server.num_samples == 16)
        server.timeout = 0.2
        until(lambda: llm.stats()["finished"] == 16)
        until(lambda: not server.connections)
    assert server.num_samples == 0


def test_who_leaves_with_much_to_read_is_let_go(serving):
    server = serving()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port_of(server)))
        (connection,) = until(lambda: list(server.connections.values()))
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.sendall(post({"tokens": [300] * 200_000}, "/detokenize"))
        until(lambda: connection.is_full)
    until(lambda: not server.connections)


def test_who_sends_while_the_server_answers_fills_no_memory(serving):
    llm = make()
    gate, server = Gate(llm), serving(llm, max_body=1000)
    with contextlib.ExitStack() as stack:
        stack.callback(gate.open, 100)
        asking, flooding = (stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server)), PATIENCE))
                            for _ in range(2))
        asking.sendall(post({"prompt": "x", "max_tokens": 1}))
        until(lambda: gate.entered)  # from here on the engine tells nobody its state
        flooding.sendall(b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n")
        connection = until(lambda: [c for c in server.connections.values() if not c.is_idle][1:])[0]
        flooding.setblocking(False)

        def is_full():
            with contextlib.suppress(BlockingIOError):
                flooding.send(b"x" * 65536)
            return not connection.transport.is_reading()

        until(is_full)
        assert len(connection.received) < 1 << 19  # what is read at once, and a little


def test_a_long_text_being_tokenized_stalls_nobody(serving, monkeypatch):
    llm, long = make(), "long" * nanoserve.LONG_BODY
    server, encode, go = serving(llm), llm.tokenizer.encode, threading.Event()

    def slow(text):
        assert text != long or go.wait(PATIENCE)
        return encode(text[:20])

    monkeypatch.setattr(llm.tokenizer, "encode", slow)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(complete(server, long, max_tokens=2))) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: server.num_samples and sum(connection.is_watched for connection in server.connections.values()) == 2)
    for length in (1, nanoserve.SHORT_BODY):
        assert complete(server, max_tokens=2, metadata={"text": "x" * length}) and not answers
    go.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(answers) == 2


@pytest.mark.parametrize("path, body", [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})])
def test_who_leaves_before_a_text_is_read_leaves_no_work(serving, monkeypatch, path, body):
    monkeypatch.setattr(nanoserve, "SHORT_BODY", 0)
    llm, go, began = make(), threading.Event(), []
    server = serving(llm)

    def slow(*args):
        began.append(args)
        return go.wait(PATIENCE) and []

    monkeypatch.setattr(llm.tokenizer, "encode", slow)
    monkeypatch.setattr(llm.tokenizer, "decode", slow)
    clients = [socket.create_connection(("127.0.0.1", port_of(server)), PATIENCE) for _ in range(6)]
    for client in clients:
        client.sendall(post(body, path))
    until(lambda: len(began) == 1 and server.text_threads[0]._work_queue.qsize() == 5)
    for client in clients:
        client.close()
    until(lambda: not server.connections)
    go.set()
    assert call(server, path, body)[0] == 200 and len(began) == 2


def test_the_tokenizer_lets_others_run(serving, monkeypatch):
    """The library keeps Python's lock in `encode`: a megabyte would hold up all clients and the engine."""
    llm, at_work, answered = make(), threading.Event(), []
    server, encode = serving(llm), llm.tokenizer.encode

    def noting(text):
        at_work.set()
        ids = encode(text)
        at_work.clear()
        return ids

    monkeypatch.setattr(llm.tokenizer, "encode", noting)

    def many():  # a dozen get through before and after the library's part; a busy machine may need more than one text
        client = threading.Thread(target=call, args=(server, "/tokenize", {"prompt": " " * 1_000_000}))
        client.start()
        answered.clear()
        while client.is_alive():
            assert call(server, "/health")[0] == 200
            answered.append(at_work.is_set())
        return sum(answered) >= 50

    until(many)


# ---- what fails ----


def test_a_failed_step_fails_its_own_requests_only(serving, monkeypatch, caplog):
    """One waits while two run; the step of the two fails. They get 500, their blocks are free and forgotten."""
    llm = make(max_batch_requests=2)
    gate, server = Gate(llm), serving(llm)
    results = {}

    def ask(name, **fields):
        results[name] = call(server, "/v1/completions", {"prompt": f"{name} {PROMPT}", "max_tokens": 4, "temperature": 0,
                                                         **fields})

    threads = [threading.Thread(target=ask, args=("plain",)), threading.Thread(target=ask, args=("streamed",),
                                                                               kwargs={"stream": True})]
    for thread in threads:
        thread.start()
    until(lambda: gate.entered == 1 and llm.stats()["waiting"] + server.engine.commands.qsize() == 2)
    gate.open(2)
    until(lambda: gate.entered == 3 and llm.stats()["running"] == 2)
    threads.append(threading.Thread(target=ask, args=("waiting",)))
    threads[-1].start()
    until(lambda: server.num_samples == 3)
    forward = llm.model.forward

    def broken(*args):
        monkeypatch.setattr(llm.model, "forward", forward)
        raise RuntimeError("no such thing in /home/somebody/nanoserve.py")

    monkeypatch.setattr(llm.model, "forward", broken)
    gate.open(100)
    for thread in threads:
        thread.join(PATIENCE)
    status, _, answer = results["plain"]
    assert status == 500 and answer["error"]["type"] == "server_error" and "/home" not in answer["error"]["message"]
    status, _, text = results["streamed"]
    last = json.loads(text.split("\n\n")[-2].removeprefix("data: "))
    assert status == 200 and "[DONE]" not in text and last["error"]["type"] == "server_error" and "/home" not in text
    status, _, answer = results["waiting"]
    assert status == 200 and answer["usage"]["completion_tokens"] == 4
    assert "no such thing" in caplog.text  # for the operator
    until(lambda: is_idle(llm))
    llm.scheduler.check()
    assert llm.pool.match(llm.tokenizer.encode(f"plain {PROMPT}")) == []
    assert llm.pool.match(llm.tokenizer.encode(f"waiting {PROMPT}")) != []
    assert call(server, "/health")[0] == 200 and call(server, "/stats")[2]["failed"] == 2


def test_a_failure_in_one_requests_text_is_its_own(serving, monkeypatch):
    llm = make()
    server, real = serving(llm), llm.text

    def text(request):
        if request.num_prompt == 1:
            raise ValueError("n: looks like a refusal, and is none")
        return real(request)

    monkeypatch.setattr(llm, "text", text)
    status, _, answer = call(server, "/v1/completions", {"prompt": [7]})
    assert status == 500 and "looks" not in answer["error"]["message"]
    assert call(server, "/v1/completions", {"prompt": [7, 8]})[0] == 200
    until(lambda: is_idle(llm))


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_can_not_be_written_is_the_servers_fault(serving, monkeypatch, streamed):
    def take(*args):
        raise ValueError("n: looks like a refusal, and is none")

    server = serving()
    monkeypatch.setattr(nanoserve.Choice, "take", take)
    status, _, answer = call(server, "/v1/completions", {"prompt": "x", "stream": streamed})
    assert status == 500 and answer["error"]["type"] == "server_error"
    assert "looks" not in str(answer)
    until(lambda: is_idle(server.llm))


def test_logits_that_are_no_numbers_are_a_500(serving, monkeypatch):
    llm = make()
    server, forward = serving(llm), llm.model.forward

    def once(*args):
        monkeypatch.setattr(llm.model, "forward", forward)
        return forward(*args) * float("nan")

    monkeypatch.setattr(llm.model, "forward", once)
    status, _, answer = call(server, "/v1/completions", {"prompt": "x"})
    assert status == 500 and "not finite numbers" in answer["error"]["message"]
    assert complete(server, max_tokens=2)["choices"][0]["finish_reason"] == "length"


def test_who_finished_in_the_very_step_that_failed_gets_the_answer(serving, monkeypatch):
    """The exception comes out of `commit`, when one of two requests has had its last token appended."""
    llm = make()
    gate, server, real, results = Gate(llm), serving(llm), llm._append, {}

    def append(request, *more):
        if request.params.max_tokens == 9 and request.num_output == 1:
            raise RuntimeError("half-way through")
        real(request, *more)

    monkeypatch.setattr(llm, "_append", append)
    threads = []
    for tokens, n in ((3, 2), (9, 1)):
        def ask(tokens=tokens, n=n):
            results[tokens] = call(server, "/v1/completions", {"prompt": [5, 6], "max_tokens": tokens, "n": n})

        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        until(lambda: llm.stats()["waiting"] + server.engine.commands.qsize() == len(threads) and gate.entered == 1)
    gate.open(100)
    for thread in threads:
        thread.join(PATIENCE)
    assert results[3][0] == 200 and [c["finish_reason"] for c in results[3][2]["choices"]] == ["length"] * 2
    assert results[9][0] == 500
    until(lambda: is_idle(llm))


def streaming(llm, **body):
    """An engine thread that was never started, a streamed job of its, and the list of what is posted to that."""
    class Loop:
        call_soon_threadsafe = staticmethod(lambda deliver: deliver())

    engine = nanoserve.EngineThread(llm, Loop(), on_fatal=None)
    job, posted = Job({"prompt": [5, 6], "stream": True, **body}, is_chat=False), []
    job.tokenize(llm)
    job.deliver = posted.append
    engine.add(job)
    return engine, job, posted


def test_a_sample_that_is_reported_twice_ends_once():
    """A failed step reports all samples of its requests, those too that had come to their end before."""
    llm = make()
    engine, job, posted = streaming(llm, n=2, max_tokens=4)
    while llm.has_work():
        changed = llm.step()
        changed[0].samples[0].max_tokens = 2
        engine._report(changed)
        engine._report(job.requests[0].samples)
    assert [update.index for update in posted if update and update.finish_reason] == [0, 1]
    assert sum(engine.e2e.counts) == 2 and engine.progress
    engine.forget(job)
    assert not engine.progress and not engine.unsent and llm.stats()["aborted"] == 0


def test_who_leaves_has_nothing_sent_any_more():
    llm = make()
    engine, job, posted = streaming(llm, max_tokens=9, ignore_eos=True)
    for _ in range(2):
        engine._report(llm.step())
        engine.next_due = math.inf
    assert list(engine.unsent) == job.requests and len(posted) == 1
    engine.forget(job)
    assert not engine.unsent and not engine.progress and is_idle(llm)


def test_a_busy_loop_gets_first_tokens_and_ends_at_once_and_the_rest_when_it_has_rested():
    """Nothing is lost, nothing is said twice, and the time between two tokens is the engine's, whenever they are sent."""
    llm = make()
    engine, job, posted = streaming(llm, max_tokens=8, temperature=0, ignore_eos=True, logprobs=1)
    for step in range(8):
        engine.next_due = 0.0 if step in (4, 5) else math.inf
        engine._report(llm.step())
    updates = [update for update in posted if update]
    assert [update.num_tokens for update in updates] == [1, 4, 1, 2]
    request = job.requests[0]
    assert "".join(update.text for update in updates) == llm.text(request)
    assert [token for update in updates for token, _ in update.logprobs] == request.tokens[request.num_prompt:]
    assert (sum(engine.ttft.counts), sum(engine.itl.counts), sum(engine.e2e.counts)) == (1, 7, 1)
    assert not engine.unsent


@pytest.mark.parametrize("end, expected", [("step", [(0, 3), (1, 3)]), ("logits", [(0, 3), (1, 4)]),
                                           ("stop", [(0, 3), (1, 3)])])
def test_what_was_computed_before_an_error_is_sent_before_it(monkeypatch, end, expected):
    """Of all samples of the job, whichever of them failed."""
    llm = make()
    engine, job, posted = streaming(llm, n=2, max_tokens=50, ignore_eos=True)
    for _ in range(4):
        engine._report(llm.step())
        engine.next_due = math.inf
    forward = llm.model.forward

    def broken(*args):
        logits = forward(*args).clone()
        logits[0] = math.nan
        return logits if end == "logits" else 1 // 0

    monkeypatch.setattr(llm.model, "forward", broken)
    if end == "stop":
        engine.end("the server is stopping")
    else:
        engine._report(engine._step())
    *updates, error = posted
    assert [(update.index, update.num_tokens) for update in updates] == [(0, 1), (1, 1), *expected]
    assert not any(update.finish_reason for update in updates) and error.status == (503 if end == "stop" else 500)
    assert not engine.progress and not engine.unsent


def test_an_error_is_raised_when_what_came_before_it_was_taken():
    job = Job({"prompt": "x"}, is_chat=False)
    job.deliver("update")
    job.deliver(nanoserve.HTTPError(500, "it failed"))

    async def take():
        return await job.take()

    assert asyncio.run(take()) == ["update"]
    for _ in range(2):
        with pytest.raises(nanoserve.HTTPError, match="it failed"):
            asyncio.run(take())


def test_the_loop_rests_in_proportion_to_what_it_spent(monkeypatch):
    seconds = iter((0.002, 0.012, 100.0))
    monkeypatch.setattr(nanoserve.time, "thread_time", lambda: next(seconds))
    monkeypatch.setattr(nanoserve.time, "perf_counter", lambda: 1000.0)
    engine, rests = streaming(make(), max_tokens=5)[0], []
    for _ in range(3):
        engine._post([], True)
        assert engine.next_due == (rests[-1] if rests else 0.0)  # nothing to send: nothing changes
        engine._post([(SimpleNamespace(deliver=lambda item: None), None)], True)
        rests.append(engine.next_due)
    assert rests == [pytest.approx(1000 + rest) for rest in (0.002 / nanoserve.STREAM_SHARE, nanoserve.STREAM_GAP,
                                                             nanoserve.STREAM_GAP)]


def test_what_was_kept_back_is_sent_when_the_engine_is_paused():
    """Nobody would send it later, and who looks step by step wants to see every step."""
    llm = make()
    engine, _, posted = streaming(llm, max_tokens=9, temperature=0, ignore_eos=True)
    for _ in range(3):
        engine._report(llm.step())
        engine.next_due = math.inf
    assert [update.num_tokens for update in posted if update] == [1]
    engine.control(is_paused=True)
    engine.next_due = math.inf
    engine.control(step=True)
    assert [update.num_tokens for update in posted if update] == [1, 2, 1]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access was encountered"),
                                   torch.AcceleratorError("device-side assert")], ids=str)
def test_a_dead_device_is_told_and_ends_the_command(serving, monkeypatch, error):
    llm = make()
    server = serving(llm)

    def forward(*args):
        raise error

    monkeypatch.setattr(llm.model, "forward", forward)
    assert call(server, "/v1/completions", {"prompt": "x"})[0] == 503
    assert server.events.get() == "fatal"
    assert call(server, "/health")[::2] == (503, {"status": "failed"})
    assert call(server, "/v1/completions", {"prompt": "x"})[0] == 503
    assert call(server, "/stats")[0] == 200
    monkeypatch.setattr(nanoserve, "make_llm", lambda args, **more: llm)
    monkeypatch.setattr(nanoserve.signal, "signal", lambda *args: None)

    def start_and_fail(*args, **options):
        server = serve(llm)
        server.events.put("fatal")
        return server

    monkeypatch.setattr(nanoserve, "serve", start_and_fail)
    assert main(["serve", "--port", "0"]) == 1


def test_out_of_memory_is_not_a_dead_device(serving, monkeypatch):
    llm = make()
    server, forward = serving(llm), llm.model.forward

    def once(*args):
        monkeypatch.setattr(llm.model, "forward", forward)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(llm.model, "forward", once)
    assert call(server, "/v1/completions", {"prompt": "x"})[0] == 500
    assert call(server, "/v1/completions", {"prompt": "x"})[0] == 200


# ---- stopping ----


@pytest.mark.parametrize("drain, streamed", [(PATIENCE, True), (0.05, True), (0.05, False)])
def test_stopping(serving, drain, streamed):
    """What runs may finish; what does not in time gets an error, never a finish reason. New requests are refused."""
    llm = make()
    gate, server = Gate(llm), serving(llm)
    result, body = [], {"prompt": "x", "max_tokens": 5, "temperature": 0, "stream": streamed}
    client = threading.Thread(target=lambda: result.append(call(server, "/v1/completions", body)))
    client.start()
    gate.open(2)
    until(lambda: gate.entered == 3)
    closing = threading.Thread(target=server.close, args=(drain,))
    closing.start()
    until(lambda: server.is_stopping)
    if drain == PATIENCE:
        assert call(server, "/health")[::2] == (503, {"status": "stopping"})
        assert call(server, "/v1/completions", body)[0] == 503
    else:
        until(lambda: not server.engine.commands.empty())  # the engine is told to stop
    gate.open(100)
    client.join(PATIENCE)
    closing.join(PATIENCE)
    status, headers, answer = result[0]
    if drain == PATIENCE:
        assert events_of(answer)[-1]["choices"][0]["finish_reason"] == "length"
    elif streamed:
        assert "[DONE]" not in answer and '"finish_reason":"' not in answer and "is stopping" in answer
    else:
        assert (status, headers["Connection"]) == (503, "close")
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port_of(server)), 1)
    assert is_idle(llm) and not server.engine.is_alive() and server.close() is None
    assert llm.generate("x", SamplingParams(max_tokens=2))  # the LLM is free again


def test_stopping_waits_for_nobody_who_asked_and_does_not_read(serving):
    server = serving(timeout=100 * PATIENCE)
    with narrow(server) as (client, connection):
        client.sendall(post({"tokens": [300] * 200_000}, "/detokenize"))
        until(lambda: connection.is_full)
        client.shutdown(socket.SHUT_WR)
        until(lambda: connection.has_left)
        closing = threading.Thread(target=server.close)
        closing.start()
        closing.join(PATIENCE)
        assert not closing.is_alive()


def test_two_threads_that_stop_it_at_once(serving, monkeypatch):
    """The other one is through when this one tells the loop."""
    server = serving()
    tell = server.loop.call_soon_threadsafe

    def late(*args):
        monkeypatch.setattr(server.loop, "call_soon_threadsafe", tell)
        server.close()
        tell(*args)

    monkeypatch.setattr(server.loop, "call_soon_threadsafe", late)
    server.close(PATIENCE)
    assert not server.engine.is_alive() and server.loop.is_closed()


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_stopping_before_a_text_is_tokenized(serving, monkeypatch, path):
    """It was not queued yet when the engine was told to end, and gets an answer all the same."""
    monkeypatch.setattr(nanoserve, "SHORT_BODY", 0)
    llm, entered, go = make(), threading.Event(), threading.Event()
    server, encode, received = serving(llm), llm.tokenizer.encode, []

    def slow(text):
        entered.set()
        return go.wait(PATIENCE) and encode(text)

    monkeypatch.setattr(llm.tokenizer, "encode", slow)
    client = threading.Thread(target=lambda: received.append(raw(server, post({"prompt": "x"}, path))))
    client.start()
    assert entered.wait(PATIENCE)
    closing = threading.Thread(target=server.close, args=(0.01,))
    closing.start()
    until(lambda: server.engine.end_reason)
    go.set()
    client.join(PATIENCE)
    closing.join(PATIENCE)
    assert status_of(received[0]) == (200 if path == "/tokenize" else 503) and is_idle(llm)


def test_an_engine_whose_books_are_wrong_says_so(serving, monkeypatch):
    """Not even aborting works. Whoever asks is told, and so is the command."""
    llm = make()
    server = serving(llm)

    def broken(*args):
        raise AssertionError("a block is held by nobody")

    monkeypatch.setattr(llm, "abort", broken)
    monkeypatch.setattr(llm, "drop_step", broken)
    monkeypatch.setattr(llm.model, "forward", broken)
    for _ in range(2):
        assert call(server, "/v1/completions", {"prompt": "x"})[0] == 503
    assert server.events.get() == "fatal" and call(server, "/health")[2] == {"status": "failed"}


@pytest.mark.parametrize("host", ["x" * 64, "a\0b", "1.2.3.4.5"], ids=repr)
def test_a_host_that_is_none(host):
    with pytest.raises(ValueError, match="serve: cannot listen"):
        serve(make(), host)


def test_an_address_that_is_taken(server, monkeypatch, capsys):
    with pytest.raises(ValueError, match="serve: cannot listen"):
        serve(make(), port=port_of(server))
    monkeypatch.setattr(nanoserve, "make_llm", lambda args, **more: make(**more))
    assert main(["serve", "--port", str(port_of(server))]) == 2 and "cannot listen" in capsys.readouterr().err


# ---- what else is served ----


def test_models_and_tokens(server, offline):
    assert [model["id"] for model in call(server, "/v1/models")[2]["data"]] == ["nanoserve"]
    ids = offline.tokenizer.encode(PROMPT)
    assert call(server, "/tokenize", {"prompt": PROMPT})[2] == {"tokens": ids, "count": len(ids), "max_model_len": 128}
    messages = [{"role": "user", "content": "Hi"}]
    assert call(server, "/tokenize", {"messages": messages})[2]["tokens"] == offline.tokenizer.apply_chat_template(messages)
    assert call(server, "/detokenize", {"tokens": ids})[2] == {"prompt": "<|begin_of_text|>" + PROMPT}
    assert call(server, "/tokenize", {"prompt": PROMPT, "messages": None})[2]["count"] == len(ids)
    for path, body, param in (("/tokenize", {"prompt": 5}, "prompt"), ("/tokenize", {"text": "x"}, "text"),
                              ("/tokenize", {"prompt": []}, "prompt"), ("/tokenize", {"prompt": ["x"]}, "prompt"),
                              ("/tokenize", {"prompt": [5, "x"]}, "prompt"), ("/tokenize", {"messages": []}, "messages"),
                              ("/tokenize", {"prompt": "x", "messages": messages}, "prompt"), ("/tokenize", {}, "prompt"),
                              ("/detokenize", {"tokens": [400]}, "tokens"), ("/detokenize", {"tokens": [True]}, "tokens"),
                              ("/detokenize", {"tokens": "x"}, "tokens"), ("/detokenize", {}, "tokens")):
        status, _, answer = call(server, path, body)
        assert (status, answer["error"]["param"]) == (400, param)


def test_metrics_add_up(serving):
    """Every family has its HELP and TYPE, every sample parses, buckets are cumulative, and counts are exact."""
    server = serving()
    complete(server, max_tokens=5, n=2)
    call(server, "/v1/completions", {"prompt": "x", "n": 0})
    status, headers, text = call(server, "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4") and text.endswith("\n")
    kinds, samples = {}, {}
    for line in text.splitlines():
        if line.startswith("#"):
            assert (match := re.fullmatch(r"# (HELP|TYPE) (nanoserve_\w+) (.+)", line)), line
            kinds.setdefault(match[2], []).append(match[3] if match[1] == "TYPE" else "")
        else:
            match = re.fullmatch(r'(nanoserve_\w+)(?:\{(\w+)="([^"]+)"\})? (\d+(?:\.\d+)?)', line)
            assert match and any(match[1].startswith(name) for name in kinds), line
            samples[match[1], match[3]] = float(match[4])
    assert {len(kind) for kind in kinds.values()} == {2}
    for name in (name for name, (_, kind) in kinds.items() if kind == "histogram"):
        buckets = [(bound, n) for (sample, bound), n in samples.items() if sample == name + "_bucket"]
        assert [n for _, n in buckets] == sorted(n for _, n in buckets) and buckets[-1][0] == "+Inf"
        assert [float(bound) for bound, _ in buckets] == sorted(float(bound) for bound, _ in buckets)
        assert buckets[-1][1] == samples[name + "_count", None] and samples[name + "_sum", None] > 0
    counts = {name: n for (name, label), n in samples.items() if label is None}
    prompt = len(server.llm.tokenizer.encode(PROMPT))
    assert counts["nanoserve_prompt_tokens_total"] == prompt and counts["nanoserve_output_tokens_total"] == 10
    assert counts["nanoserve_requests_finished_total"] == counts["nanoserve_time_to_first_token_seconds_count"] == 2
    assert counts["nanoserve_inter_token_latency_seconds_count"] == 8 and counts["nanoserve_request_seconds_count"] == 2
    assert samples["nanoserve_http_responses_total", "400"] == samples["nanoserve_http_responses_total", "200"] == 1
    assert samples["nanoserve_kv_blocks", "used"] == 0


def test_salts_do_not_share_a_cache(serving):
    """Neither hits nor the work that a hit saves, which is all that time could tell, show what another tenant asked."""
    llm = make()
    server, seen = serving(llm), []
    for salt in ("a", "b", None, "a"):
        before = llm.stats()
        complete(server, cache_salt=salt, max_tokens=2)
        until(lambda: is_idle(llm))
        seen.append(tuple(llm.stats()[key] - before[key] for key in ("hit_tokens", "computed_tokens")))
    n = len(llm.tokenizer.encode(PROMPT))
    hit = (n - 1) // 4 * 4
    assert seen == [(0, n + 1)] * 3 + [(hit, n - hit + 1)] and hit > 0


def test_priority_goes_first_where_the_policy_looks_at_it(serving, monkeypatch):
    llm = make(max_batch_requests=1)
    gate, server, order, fork = Gate(llm), serving(llm), [], llm.scheduler.fork
    def note(request):
        order.append(request.priority)
        return fork(request)

    monkeypatch.setattr(llm.scheduler, "fork", note)  # called for each token
    threads = []
    for i, priority in enumerate((0, 5, -5)):
        def ask(priority=priority):
            complete(server, priority=priority, max_tokens=2)

        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        until(lambda i=i: server.num_samples == i + 1 and (i or llm.has_work()))
    until(lambda: gate.entered == 1 and server.engine.commands.qsize() == 2)
    gate.open(100)
    for thread in threads:
        thread.join(PATIENCE)
    assert order == [0, 0, -5, -5, 5, 5]
    status, _, answer = call(serving(make(policy="fcfs")), "/v1/completions", {"prompt": "x", "priority": 1})
    assert (status, answer["error"]["param"]) == (400, "priority")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_deadline_is_a_504(server, streamed):
    """Whoever still waits for it is told; nothing was computed for one that came too late. A stream has not begun yet."""
    before = server.engine.llm.stats()
    status, _, answer = call(server, "/v1/completions", {"prompt": "x", "deadline": 0, "stream": streamed})
    assert status == 504 and "deadline" in answer["error"]["message"]
    stats = server.engine.llm.stats()
    assert stats["computed_tokens"] == before["computed_tokens"] and stats["aborted"] == before["aborted"] + 1


def test_users_are_tenants(serving):
    llm = make(policy="fair")
    server, n = serving(llm), len(llm.tokenizer.encode(PROMPT))
    complete(server, user="ann", max_tokens=2)
    complete(server, user="bob", max_tokens=3)
    assert llm.scheduler.policy.counters == {"ann": n + 4, "bob": 2 * n + 6}  # the queue was empty: bob starts at n


# ---- others' clients ----


def test_openais_client(server, offline):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    output = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8))[0]
    asked = {"model": "nanoserve", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    answer = client.completions.create(**asked, extra_body={"top_k": 5, "cache_salt": "s"}, logprobs=1, user="me")
    assert answer.choices[0].text == output.text and answer.usage.completion_tokens == 8
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)) == output.text
    chat = {"model": "nanoserve", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    whole = client.chat.completions.create(**chat, max_completion_tokens=5, logprobs=True, top_logprobs=2)
    chunks = list(client.chat.completions.create(**chat, max_tokens=5, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and whole.choices[0].logprobs.content[0].top_logprobs
    assert [model.id for model in client.models.list()] == ["nanoserve"] == [client.models.retrieve("nanoserve").id]
    for error, fields in ((openai.BadRequestError, {"temperature": -1}), (openai.NotFoundError, {"model": "x"}),
                          (openai.BadRequestError, {"max_tokens": 10**6, "stream": True})):
        with pytest.raises(error) as refused:
            client.completions.create(**{**asked, **fields})
        assert refused.value.param in ("temperature", "model", "prompt") and refused.value.body["message"]


def test_openais_asynchronous_client(server, offline):
    openai = pytest.importorskip("openai")

    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            async def one(prompt):
                stream = await client.completions.create(model="nanoserve", prompt=prompt, temperature=0, max_tokens=6,
                                                         stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, prompts))

    prompts = [f"{PROMPT} {i}" for i in range(12)]
    assert asyncio.run(ask()) == [o.text for o in offline.generate(prompts, SamplingParams(temperature=0, max_tokens=6))]


def test_openais_client_meets_errors(serving):
    openai = pytest.importorskip("openai")
    server = serving(api_key="k", max_queue=0, llm=make(max_batch_requests=1))
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0).models.list()
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="k", max_retries=0)
    with client.completions.create(model="nanoserve", prompt=PROMPT, max_tokens=100, stream=True):
        server.num_samples += 1  # as if it were still running, however fast it is
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="nanoserve", prompt="x")
        server.num_samples -= 1


def test_httpx_and_keep_alive(server):
    httpx = pytest.importorskip("httpx")
    with httpx.Client(base_url=server.url) as client:
        for _ in range(3):
            answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).json()
            assert answer["usage"]["completion_tokens"] == 2
        with client.stream("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 90, "stream": True}) as response:
            next(response.iter_lines())
    until(lambda: server.num_samples == 0)


# ---- all at once ----


def test_load_and_faults(capsys):
    """A short version of load.py, on the model that comes along, in a process of its own that is killed and stopped."""
    code = load.main(["--requests", "120", "--clients", "24", "--fuzz", "150", "--no-measure"])
    assert code == 0, capsys.readouterr().out
