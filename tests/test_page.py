"""The page: what it is sent, through real sockets, and what it makes of it, in a real browser where there is one.

The engine is test_server's. Where a test is about a moment, the engine is paused there, as the page's own buttons do it.
"""

import base64
import contextlib
import hashlib
import http.client
import json
import re
import socket
import threading
import time

import browser
import pytest
from test_server import PATIENCE, PROMPT, call, complete, events_of, is_idle, make, port_of, post, raw, settle, until

import nanoserve
from nanoserve import serve

HTML = nanoserve.PAGE.read_text(encoding="utf-8")


@pytest.fixture
def serving():
    """Start servers that are closed at the end of the test, whatever happens."""
    with contextlib.ExitStack() as stack:
        yield lambda llm=None, **options: stack.enter_context(serve(llm or make(), **options))


def pause(server, is_paused=True):
    assert call(server, "/engine", {"is_paused": is_paused})[0] == 200


def take(server, steps: int):
    """So many steps of a paused engine."""
    for _ in range(steps):
        assert call(server, "/engine", {"step": True})[0] == 200


class Watcher(contextlib.AbstractContextManager):
    """Whoever reads /events."""

    def __init__(self, server, **headers):
        self.connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=PATIENCE)
        self.connection.request("GET", "/events", headers=headers)
        self.response = self.connection.getresponse()
        assert self.response.status == 200 and self.response.headers["Content-Type"].startswith("text/event-stream")
        self.hello = self.read()

    def read(self) -> dict | None:
        """The next event; None at the end."""
        while not (line := self.response.readline()).startswith(b"data: "):
            if not line:
                return None
        self.is_whole = line == b"data: [DONE]\n"
        return None if self.is_whole else json.loads(line[6:])

    def until(self, condition) -> dict:
        """The first state that is as wanted."""
        deadline = time.monotonic() + PATIENCE
        while not condition(state := self.read()):
            assert time.monotonic() < deadline, f"it did not happen: {state}"
        return state

    def __exit__(self, *_):
        self.response.close()
        self.connection.close()


def owners(state) -> list[int]:
    """The owner of every block."""
    runs = zip(state["blocks"][::2], state["blocks"][1::2])
    return [owner for owner, length in runs for _ in range(length)]


def asking(server, **fields) -> tuple[threading.Thread, list]:
    """A completion under way, and where its answer goes."""
    answers = []
    body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, **fields}
    thread = threading.Thread(target=lambda: answers.append(call(server, "/v1/completions", body)))
    thread.start()
    return thread, answers


# ---- what is sent ----


def test_the_page_is_one_file_that_loads_nothing_and_runs_one_script(serving):
    status, headers, html = call(serving(), "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and html == HTML
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["img-src"] == "data:" and "unsafe" not in str(policy)
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[tag + "-src"] == f"'sha256-{digest}'"
    assert set(re.findall(r"\w+://[^\s'\"]+", html)) == {"http://www.w3.org/2000/svg"}  # a name, in the icon
    for way in (r"\bsrc=", r"url\(", "@import", "innerHTML", "outerHTML", "insertAdjacentHTML", r"document\.write",
                r"\beval\(", r"\son\w+=", r"\sstyle=", "localStorage", "Function"):
        assert not re.search(way, html), way
    assert html.count("href=") == 1 and 'href="data:image/svg' in html


def test_without_the_file_the_page_says_so(serving, monkeypatch, tmp_path):
    monkeypatch.setattr(nanoserve, "PAGE", tmp_path / "page.html")
    status, headers, text = call(serving(), "/")
    assert status == 200 and headers["Content-Type"].startswith("text/plain") and "tutorial/page.html" in text
    assert str(tmp_path) not in text


def test_the_page_is_for_everybody_and_its_content_is_not(serving):
    server = serving(api_key="k", teach=True)
    assert call(server, "/")[0] == 200
    assert raw(server, b"GET /events HTTP/1.0\r\n\r\n", half_close=True).startswith(b"HTTP/1.1 401")
    assert call(server, "/engine", {"is_paused": True})[0] == 401
    with Watcher(server, Authorization="Bearer k") as watcher:
        assert watcher.read()["counts"]["steps"] == 0


def test_events_tell_the_state_in_integers(serving):
    """Every step of two requests, one of four samples: owners, rows and batches are those of the engine."""
    llm = make(blocks=60)
    server, seen = serving(llm, teach=True), []
    pause(server)
    threads = []
    for i, fields in enumerate(({"n": 4, "max_tokens": 6}, {"prompt": [5, 6], "max_tokens": 9})):
        threads.append(asking(server, **fields)[0])
        until(lambda: llm.stats()["waiting"] == i + 1)  # noqa: B023

    def whole(value):
        return type(value) is int or all(map(whole, value.values() if isinstance(value, dict) else value))

    with Watcher(server) as watcher:
        assert watcher.hello["num_blocks"] == llm.pool.num_blocks and watcher.hello["block_size"] == 4
        assert watcher.hello["model"] == "nanoserve" and watcher.hello["teach"] is True
        for step in range(10):
            state = watcher.until(lambda state: state["counts"]["steps"] == step)  # noqa: B023
            pool, running, who = llm.pool, llm.scheduler.running, owners(state)
            assert whole(state) and len(who) == pool.num_blocks and who[0] == -3
            assert state["running"] == [
                [r.arrival, r.sample_index, r.width, r.num_prompt, r.num_computed, len(r.tokens),
                 r.num_prompt + r.max_tokens, 0, r.block_table[(r.num_computed - 1) // 4]] for r in running]
            for block in range(1, pool.num_blocks):
                holders = [i + 1 for i, r in enumerate(running) if block in r.block_table]
                cached = block in pool.index.values() and block in pool.free
                assert who[block] == (-2 if len(holders) > 1 else holders[0] if holders else -1 if cached else 0)
            assert all(llm.stats()[name] == count for name, count in state["counts"].items() if name != "failed")
            seen.append(who.count(-2))
            take(server, 1)
    for thread in threads:
        thread.join(PATIENCE)
    rows = len(llm.tokenizer.encode(PROMPT)) + 2
    assert state["steps"] == [[rows, 0, 0], *[[0, 5, 0]] * 5, *[[0, 1, 0]] * 3]
    assert max(seen) > 1 and not state["running"] and who.count(-1) == llm.stats()["blocks_cached"] > 0


def test_of_a_long_queue_the_first_are_sent_and_all_are_counted(serving):
    llm = make()
    server = serving(llm, teach=True)
    pause(server)
    thread, answers = asking(server, prompt=[[5, i % 300] for i in range(516)], max_tokens=2)
    until(lambda: llm.stats()["waiting"] == 516)
    with Watcher(server) as watcher:
        take(server, 1)
        state = watcher.until(lambda state: state["num_waiting"] == 500)
        assert [row[0] for row in state["waiting"]] == list(range(16, 48)) and len(state["running"]) == 16
        pause(server, False)
        watcher.until(lambda state: state["counts"]["finished"] == 516 and not state["num_waiting"])
    thread.join(PATIENCE)
    assert len(answers[0][2]["choices"]) == 516


def test_drafts_are_told_from_what_is_certain(serving):
    """Of the tokens that a step computes, whatever an engine that speculates counts as drafted."""
    llm = make()
    server, step = serving(llm), llm.step

    def speculate():
        llm.counts["drafted"] += 3
        llm.counts["computed_tokens"] += 3
        return step()

    llm.step = speculate
    complete(server, [5, 6], max_tokens=2)
    with Watcher(server) as watcher:
        assert watcher.read()["steps"] == [[2, 0, 3], [0, 1, 3]]


def test_preempted_requests_are_told(serving):
    llm = make(blocks=12, max_batch_requests=4)
    server = serving(llm)
    with Watcher(server) as watcher:
        thread, _ = asking(server, prompt=[[5, 6], [7, 8], [9, 10]], max_tokens=20)
        state = watcher.until(lambda state: state["counts"]["finished"] == 3)
        assert state["counts"]["preemptions"] == llm.stats()["preemptions"] > 0
    thread.join(PATIENCE)


def test_all_watchers_share_a_look_and_nobody_looks_without_one(serving, monkeypatch):
    server = serving()
    look, looks, permits = server.engine.look, [], threading.Semaphore(0)

    def numbered():
        permits.acquire()
        looks.append(look()[0])
        return {**looks[-1], "number": len(looks)}, 0.0

    monkeypatch.setattr(server.engine, "look", numbered)
    complete(server, max_tokens=3)
    with Watcher(server) as one, Watcher(server) as two:
        settle(server)  # both wait for the first
        for number in range(1, 7):
            permits.release()
            assert one.read()["number"] == two.read()["number"] == number
    permits.release()  # of whoever has left
    until(lambda: not server.connections and server._looking.done())
    assert len(looks) == 7
    complete(server, max_tokens=20)
    assert len(looks) == 7


def test_looks_that_take_long_become_rare(serving, monkeypatch):
    """Never more than LOOKS_SHARE of the time, however large the pool."""
    server = serving()
    look = server.engine.look
    monkeypatch.setattr(server.engine, "look", lambda: (look()[0], 5.0))
    with Watcher(server) as watcher:
        watcher.read()
        assert server._next_look > server.loop.time() + 5 / nanoserve.LOOKS_SHARE - PATIENCE


def test_a_look_that_fails_costs_the_watcher_only(serving, monkeypatch):
    server = serving()
    monkeypatch.setattr(server.engine, "look", lambda: 1 // 0)
    with Watcher(server) as watcher:
        assert watcher.read()["error"]["type"] == "server_error"
    assert complete(server, max_tokens=2) and call(server, "/health")[0] == 200


def test_a_watcher_that_does_not_read_holds_up_nobody_and_fills_nothing(serving, monkeypatch):
    monkeypatch.setattr(nanoserve, "LOOKS_A_SECOND", 1e6)
    monkeypatch.setattr(nanoserve, "LOOKS_SHARE", 1e6)
    server = serving()
    look, number = server.engine.look, iter(range(10**9))
    monkeypatch.setattr(server.engine, "look", lambda: ({**look()[0], "more": [next(number)] * 20_000}, 0.0))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", port_of(server)))
        client.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: server.connections)
        transport = next(iter(server.connections.values())).transport
        until(lambda: transport.get_write_buffer_size() > 1 << 16)
        with Watcher(server) as other:
            for _ in range(10):
                assert other.read()["more"]
        assert transport.get_write_buffer_size() < 1 << 19  # the socket's share and one event
        assert complete(server, max_tokens=2)


def test_who_asks_is_told_the_number_of_the_request(serving):
    server = serving()
    numbers = [complete(server, max_tokens=1)["id"].split("-")[-1] for _ in range(2)]
    assert numbers == ["0", "1"]


# ---- pausing ----


def test_without_the_flag_nobody_can_pause(serving):
    server = serving()
    assert call(server, "/engine", {"is_paused": True})[0] == 404
    assert complete(server, max_tokens=2)


def test_pause_step_and_go_on(serving):
    llm = make()
    server = serving(llm, teach=True)
    assert call(server, "/engine", {"is_paused": True})[::2] == (200, {"is_paused": True})
    thread, answers = asking(server, max_tokens=4)
    with Watcher(server) as watcher:
        state = watcher.until(lambda state: state["num_waiting"])
        assert state["is_paused"] == 1 and state["counts"]["steps"] == 0 and watcher.hello["teach"] is True
        for step in (1, 2):
            call(server, "/engine", {"step": True})
            state = watcher.until(lambda state: state["counts"]["steps"] == step)  # noqa: B023
            assert state["running"][0][4] == state["running"][0][3] + step - 1
        assert call(server, "/stats")[2]["steps"] == 2 and not answers
        call(server, "/engine", {"is_paused": False})
        thread.join(PATIENCE)
        assert answers[0][2]["usage"]["completion_tokens"] == 4
        assert call(server, "/engine", {"step": True})[0] == 200 and call(server, "/stats")[2]["steps"] == 4  # nothing to do


def test_slow_motion_waits_between_steps(serving):
    """An hour between two steps: the first is taken, the second only when the pace changes."""
    llm = make()
    server = serving(llm, teach=True)
    call(server, "/engine", {"delay": 60})
    thread, answers = asking(server, max_tokens=5)
    until(lambda: llm.stats()["steps"] == 1)
    assert call(server, "/stats")[2]["steps"] == 1 and server.engine._seconds_to_step() > 30
    call(server, "/engine", {"delay": 0})
    thread.join(PATIENCE)
    assert answers[0][2]["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("body, param", [
    ({"is_paused": 1}, "is_paused"), ({"step": "yes"}, "step"), ({"delay": -1}, "delay"), ({"delay": 61}, "delay"),
    ({"delay": True}, "delay"), ({"stop": True}, "stop")], ids=str)
def test_a_pace_that_is_none(serving, body, param):
    status, _, answer = call(serving(teach=True), "/engine", body)
    assert (status, answer["error"]["param"]) == (400, param)


def test_other_sites_can_not_pause(serving):
    """A page from elsewhere can send a POST of plain text unasked, but no JSON: browsers ask first, and get no leave."""
    server = serving(teach=True)
    body = post({"is_paused": True}, "/engine").replace(b"application/json", b"text/plain")
    assert raw(server, body).startswith(b"HTTP/1.1 415") and not server.engine.is_paused
    preflight = raw(server, b"OPTIONS /engine HTTP/1.1\r\nHost: x\r\nOrigin: http://evil\r\nConnection: close\r\n\r\n")
    assert preflight.startswith(b"HTTP/1.1 405") and b"Access-Control" not in preflight


@pytest.mark.parametrize("pace", [{"is_paused": True}, {"delay": 60}], ids=str)
@pytest.mark.parametrize("drain", [PATIENCE, 0.05])
def test_stopping_while_paused(serving, pace, drain):
    """What waits is finished at full speed, or told; who watches sees the end of it."""
    llm = make()
    server = serving(llm, teach=True)
    call(server, "/engine", pace)
    if drain < 1:
        llm.step = lambda: time.sleep(0.01) or []  # which never ends
    thread, answers = asking(server, max_tokens=5, stream=True)
    until(lambda: llm.has_work())
    with Watcher(server) as watcher:
        watcher.read()
        server.close(drain)
        thread.join(PATIENCE)
        if drain > 1:
            assert events_of(answers[0][2])[-1]["choices"][0]["finish_reason"] == "length"
        else:
            assert answers[0][0] == 503 and "is stopping" in answers[0][2]["error"]["message"]
        while watcher.read():
            pass
        assert watcher.is_whole and is_idle(llm) and not server.engine.is_alive()


def test_who_leaves_while_paused_is_aborted(serving):
    llm = make()
    server = serving(llm, teach=True)
    call(server, "/engine", {"is_paused": True})
    with socket.create_connection(("127.0.0.1", port_of(server)), PATIENCE) as client:
        client.sendall(post({"prompt": PROMPT, "max_tokens": 90}))
        until(lambda: llm.has_work())
        call(server, "/engine", {"step": True})
        until(lambda: llm.scheduler.running)
    until(lambda: is_idle(llm))
    assert llm.stats()["aborted"] == 1 and llm.stats()["steps"] == 1


# ---- in a browser ----

needs_browser = pytest.mark.skipif(not browser.find(), reason="no Chromium here")
PAUSED = "document.readyState === 'complete' && $('status').textContent === 'paused'"
LIVE = "document.readyState === 'complete' && $('status').textContent === 'live'"


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser(patience=3 * PATIENCE) as chromium:
        yield chromium


@pytest.fixture
def page(chromium, serving):
    """Open a server's page, look at it with a desktop's eyes, and in the end have no error on the console."""
    def open_page(server, ready=LIVE):
        chromium.look(1440, 900)
        chromium.call("Page.navigate", url=server.url + "/")
        chromium.until(f"typeof $ !== 'undefined' && {ready}")
        chromium.errors.clear()
        return chromium

    yield open_page
    errors = chromium.errors.copy()
    chromium.call("Page.navigate", url="about:blank")
    assert errors == []


def send(page, **fields):
    """Fill the form in and send it."""
    fields = {"temperature": "0", "max_tokens": "8", **fields}
    page.run("(fields => { const form = $('form').elements; for (const [name, value] of Object.entries(fields)) "
             "form[name].value = value; form.ignore_eos.checked = true; $('form').requestSubmit(); })"
             f"({json.dumps(fields)})")


def shown(page, name) -> int:
    return int(page.run(f"$('{name}').textContent").split()[0].replace(",", ""))


ANSWER = "document.querySelector('.answer .choice p')?.textContent"
STATE = "document.querySelector('.answer .state')?.textContent"


@needs_browser
def test_a_prompt_fills_blocks_and_frees_them(page, serving):
    llm = make(blocks=60)
    server = serving(llm, teach=True)
    pause(server)
    page = page(server, ready=PAUSED)
    assert page.run("document.title") == "nanoserve · nanoserve"
    assert shown(page, "blocks-free") == 60 and shown(page, "blocks-scratch") == 1
    send(page, prompt=PROMPT, n="2")
    until(lambda: llm.has_work())
    take(server, 3)
    page.until("$('count').textContent === '3'")
    assert shown(page, "blocks-owned") >= 2 and shown(page, "blocks-shared") > 0 and shown(page, "running") == 2
    assert page.run("[...document.querySelectorAll('#rows-running .chip')].map(chip => chip.textContent)") == ["0", "0.1"]
    pause(server, False)
    page.until(f"{STATE}?.startsWith('16 tokens')")
    page.until("$('blocks-owned').textContent === '0' && $('blocks-shared').textContent === '0'")
    assert shown(page, "blocks-cached") == llm.stats()["blocks_cached"] > 0 and shown(page, "running") == 0
    expected = make().generate(PROMPT, nanoserve.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].text
    assert page.run(ANSWER) == expected.lstrip()
    assert page.run("document.querySelectorAll('.answer .choice').length") == 2


@needs_browser
def test_several_at_once_and_one_is_cancelled(page, serving):
    llm = make()
    server = serving(llm, teach=True)
    pause(server)
    page = page(server, ready=PAUSED)
    for text in ("first", "second", "third", "fourth", "fifth", "sixth"):
        send(page, prompt=text, max_tokens="30")
    until(lambda: server.num_samples == 4)  # a browser opens six connections; the page leaves two for what matters more
    assert page.run(STATE) == "waits for a free connection"
    until(lambda: llm.stats()["waiting"] == 4)
    take(server, 3)
    page.until("document.querySelectorAll('.answer .choice').length === 4")
    page.run("[...document.querySelectorAll('.answer')].at(-1).querySelector('button').click()")
    page.run("document.querySelector('.answer button').click()")  # the sixth, which was not sent
    until(lambda: llm.stats()["waiting"] == 1)  # the fifth takes its place
    pause(server, False)
    page.until("[...document.querySelectorAll('.state')].filter(node => /^30 tokens/.test(node.textContent)).length === 4")
    states = page.run("[...document.querySelectorAll('.state')].map(node => node.textContent)")
    assert states[0] == states[5] == "cancelled" and llm.stats()["aborted"] == 1 and llm.stats()["finished"] == 4
    page.run("document.querySelectorAll('.answer button').forEach(button => button.click())")
    assert page.run("document.querySelectorAll('.answer').length") == 0


@needs_browser
def test_chat_and_copies_and_refusals(page, serving):
    server = serving()
    page = page(server)
    send(page, kind="chat", prompt="Hi")
    page.until(f"{STATE}?.startsWith('8 tokens')")
    _, _, answer = call(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0,
                                                         "max_tokens": 8, "ignore_eos": True})
    assert page.run(ANSWER) == answer["choices"][0]["message"]["content"].lstrip()
    send(page, kind="completion", prompt="x", copies="20")
    page.until(f"{STATE}?.startsWith('160 tokens')")
    assert page.run("document.querySelector('.answer').querySelectorAll('.choice').length") == 8
    assert page.run("document.querySelector('.rest').textContent") == "and 12 more"
    send(page, prompt="x", copies="1", max_tokens="5000")
    page.until("document.querySelector('.answer .state.bad') !== null")
    assert "max_model_len=128" in page.run(STATE) and page.errors.pop().startswith("Failed to load resource")  # the 400


@needs_browser
def test_all_that_is_shown_is_text(page, serving, monkeypatch):
    llm, said = make(), "<b>x</b>"
    script = llm.tokenizer.encode(said, add_special_tokens=False)
    monkeypatch.setattr(llm, "sample", lambda batch, samplers, logits: (
        [script[request.num_output] for request, *_ in samplers], [None] * len(samplers)))
    page = page(serving(llm, model_name="<i>m</i>"))
    assert page.run("$('teach') === null")  # not without the flag
    send(page, prompt="<img src=x onerror=alert(1)>", max_tokens=str(len(script)))
    page.until(f"{STATE}?.includes('tokens in')")
    assert page.run(ANSWER) == said
    assert page.run("document.querySelector('.asked').textContent") == "<img src=x onerror=alert(1)>"
    assert page.run("document.querySelectorAll('main b:not(.legend b), main img, main i:not(.bar i)').length") == 0
    assert page.run("document.title").startswith("<i>m</i>")


@needs_browser
def test_the_buttons_pause_and_step(page, serving):
    llm = make()
    server = serving(llm, teach=True)
    page = page(server)
    page.run("$('pause').click()")
    page.until("$('status').textContent === 'paused' && $('pause').getAttribute('aria-pressed') === 'true'")
    send(page, prompt="x", max_tokens="40")
    page.until("$('waiting').textContent === '1'")
    for step in (1, 2, 3):
        page.run("$('step').click()")
        page.until(f"$('count').textContent === '{step}'")
    assert page.run("document.querySelector('#rows-running .num').textContent") == "4 / 5"
    page.run("$('pace').value = '3000', $('pace').dispatchEvent(new Event('change'))")
    page.until("$('status').textContent === 'live'")
    until(lambda: server.engine.delay == 3)
    page.run("$('pace').value = '0', $('pace').dispatchEvent(new Event('change'))")
    page.until(f"{STATE}?.startsWith('40 tokens')")


@needs_browser
def test_a_long_queue_is_counted_and_its_beginning_shown(page, serving):
    llm = make()
    server = serving(llm, teach=True)
    pause(server)
    page = page(server, ready=PAUSED)
    send(page, prompt="x", copies="516", max_tokens="2")
    until(lambda: llm.has_work())
    take(server, 1)
    page.until("$('waiting').textContent === '500'")
    assert page.run("$('rows-waiting').children.length") == 32
    assert page.run("$('rows-waiting').previousElementSibling.textContent") == "Waiting 500, first 32"
    pause(server, False)
    page.until(f"{STATE}?.startsWith('1,032 tokens') && $('waiting').textContent === '0'")


@needs_browser
def test_by_keyboard_alone(page, serving):
    llm = make()
    server = serving(llm, teach=True)
    pause(server)
    page = page(server, ready=PAUSED)
    names = []
    for _ in range(30):
        page.press("Tab", 9)
        name = page.run("(node => node === document.body ? '' : node.id || node.name || node.tagName)"
                        "(document.activeElement)")
        if not name or name in names:
            break
        names.append(name)
        assert page.run("(node => getComputedStyle(node.closest('.kinds') ? node.parentNode : node).outlineStyle)"
                        "(document.activeElement)") == "solid", name
    assert names[:6] == ["pause", "step", "pace", "requests", "kind", "prompt"] and {"SUMMARY", "BUTTON"} <= set(names)
    page.run("$('form').elements.max_tokens.value = 30, $('prompt').focus()")
    page.press("Enter", 13, modifiers=2)
    until(lambda: llm.has_work())
    take(server, 2)
    page.until("$('rows-running').children.length === 1")
    page.run("$('requests').focus()")
    page.press("ArrowDown", 40)
    page.until("$('rows-running').firstChild.hasAttribute('data-chosen')")
    page.press("Escape", 27)
    page.until("!$('rows-running').firstChild.hasAttribute('data-chosen')")
    pause(server, False)
    page.until(f"{STATE}?.includes('tokens in')")
    unnamed = page.run("[...document.querySelectorAll('button, input, select, textarea, canvas')].filter(node => "
                       "!(node.labels?.length || node.textContent.trim() || node.ariaLabel || node.ariaHidden || "
                       "node.closest('.legend, dialog'))).length")
    assert unnamed == 0


@needs_browser
@pytest.mark.parametrize("width, height", [(1920, 1080), (1440, 900), (1024, 768), (390, 844), (320, 568)])
def test_it_fits(page, serving, width, height):
    """Nothing sticks out to the right, at any width, in light and dark, with an answer and a large pool on it."""
    server = serving(make(blocks=8000, max_batch_requests=256, max_batch_tokens=256), teach=True)
    page = page(server)
    send(page, prompt="x" * 90, n="3")
    page.until(f"{STATE}?.includes('tokens in')")
    seen = []
    for dark in (False, True):
        page.look(width, height, dark=dark, phone=width < 500, still=dark)
        page.until(f"document.documentElement.clientWidth === {width}")
        page.until("[...document.querySelectorAll('main *')].every(node => node.closest('.unseen') || "  # canvases follow
                   f"node.getBoundingClientRect().right <= {width} + 1)")
        assert page.run("document.documentElement.scrollWidth") <= width
        seen.append(page.run("getComputedStyle(document.body).backgroundColor"))
        assert page.screenshot().startswith(b"\x89PNG")
    assert seen[0] != seen[1]
    assert "a square is" in page.run("$('pool-size').textContent")


@needs_browser
def test_it_comes_back_with_the_server_and_says_so(page, serving):
    first = serving()
    page = page(first)
    complete(first, max_tokens=3)
    page.until("$('count').textContent === '3'")
    first.close()
    page.until("$('status').dataset.state === 'lost' && $('status').textContent.includes('trying again')")
    assert page.run("$('engine').hasAttribute('data-stale')")
    serving(port=port_of(first))
    page.until("$('status').textContent === 'live' && $('count').textContent === '0'")
    assert all("ERR_CONNECTION" in error or "ERR_INCOMPLETE" in error for error in page.errors)
    page.errors.clear()


@needs_browser
def test_it_asks_for_the_key(page, serving):
    server = serving(api_key="sésame")
    page = page(server, ready="$('key-dialog').open")
    for key, wanted in (("wrong", "$('key-dialog').open && !$('key-wrong').hidden"), ("sésame", LIVE)):
        page.run(f"$('key').value = '{key}', $('key-form').querySelector('button').click()")
        page.until(wanted)
    send(page, prompt="x")
    page.until(f"{STATE}?.startsWith('8 tokens')")
    assert all("401" in error for error in page.errors)
    page.errors.clear()
    page.run("sessionStorage.clear()")
