"""Load and faults: a real server process, hundreds of clients that come, go and misbehave, and a count of what went wrong.

    python tests/load.py                                     # the whole programme, on the model that comes along
    python tests/load.py --requests 300 --clients 50 --fuzz 500

Prints one line for each promise, and exits with 1 if one is broken. What is measured rather than counted (throughput,
time to first token, memory) is judged only without --no-measure: on a busy machine it says more about the machine.
tests/test_server.py runs a short version.
"""

import argparse
import asyncio
import json
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nanoserve import LLM, SamplingParams  # noqa: E402

WORDS = "Once upon a time there was a fox who lived in the old mill by the river and had a red hat".split()
PATIENCE = 120  # seconds after which an answer counts as a hang


class Process:
    """`nanoserve serve` in a process of its own."""

    def __init__(self, *options: str):
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "nanoserve.py"), "serve", "--port", "0", "--dtype", "float32", *options],
            stderr=subprocess.PIPE, text=True, cwd=ROOT)
        self.log, listening = [], queue.SimpleQueue()

        def read():  # to the end, or a full pipe would stop the server
            for line in self.process.stderr:
                self.log.append(line)
                if match := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                    listening.put(int(match[1]))
            listening.put(None)

        self.reader = threading.Thread(target=read, daemon=True)
        self.reader.start()
        self.port = listening.get()
        if self.port is None:
            raise RuntimeError("the server did not start: " + "".join(self.log))
        self.seconds_to_start = time.perf_counter() - self.started

    def usage(self) -> dict[str, int]:
        """Resident KiB and threads, as Linux counts them; empty elsewhere."""
        status = Path(f"/proc/{self.process.pid}/status")
        text = status.read_text() if status.exists() else ""
        return {name: int(value) for name, value in re.findall(r"^(VmRSS|Threads):\s+(\d+)", text, re.MULTILINE)}

    def end(self, number: int) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        self.reader.join()
        self.process.stderr.close()
        return code


def http(method: str, path: str, body: bytes = b"", headers: str = "", connection: str = "close") -> bytes:
    """A request's bytes."""
    return (f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"Connection: {connection}\r\n{headers}\r\n").encode() + body


async def exchange(port: int, data: bytes, leave_after: int | None = None) -> tuple[int, bytes, float | None]:
    """Send bytes and read what comes: (status or 0, all bytes, seconds to the first event). The connection is reset once
    `leave_after` bytes were read.
    """
    start, received, first = time.perf_counter(), b"", None
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        while leave_after is None or len(received) < leave_after:
            piece = await asyncio.wait_for(reader.read(65536), PATIENCE)
            if not piece:
                break
            received += piece
            if first is None and re.search(rb'"text":"[^"]', received):
                first = time.perf_counter() - start
    except ConnectionError:
        pass  # the server had its reasons; what was received tells
    finally:
        writer.transport.abort()
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", received)
    return int(status[1]) if status else 0, received, first


async def fetch(port: int, path: str) -> dict:
    """The JSON of a GET."""
    return json.loads((await exchange(port, http("GET", path)))[1].partition(b"\r\n\r\n")[2])


def events(received: bytes) -> tuple[str, str | None, bool]:
    """(text, finish reason, whether the stream came to its end) of a streamed completion."""
    lines = [line[6:] for line in received.decode().split("\n") if line.startswith("data: ")]
    chunks = [json.loads(line)["choices"][0] for line in lines if line != "[DONE]"]
    return ("".join(chunk["text"] for chunk in chunks), chunks[-1]["finish_reason"] if chunks else None,
            bool(lines) and lines[-1] == "[DONE]")


def workload(count: int, rng: random.Random) -> list[dict]:
    """Completions of mixed lengths; not all different, so that prefixes hit."""
    return [{"prompt": " ".join(rng.choices(WORDS, k=rng.choice((2, 10, 60)))), "max_tokens": rng.choice((4, 16, 48)),
             "temperature": 0, "stream": True} for _ in range(count)]


MALFORMED = [{"prompt": 5}, {"prompt": "x", "n": 0}, {"prompt": "x", "temprature": 1}, {"prompt": "x", "max_tokens": 1e9},
             {"prompt": "x", "seed": 1.5}, {"prompt": []}, {"prompt": "x", "stream": "yes"}, {"prompt": "x", "tools": [1]},
             {"prompt": "x", "logit_bias": {"a": 1}}, {"prompt": "x", "model": "gpt-5"}, {"prompt": [10**9]}, {}]


async def crowd(port: int, work: list, clients: int, serve_one) -> None:
    """So many clients that work through a list together."""
    left = iter(work)

    async def client():
        for item in left:
            await serve_one(port, item)

    await asyncio.gather(*(client() for _ in range(clients)))


async def come_and_go(server: Process, work: list[dict], answers: list[tuple], clients: int, rng: random.Random) -> dict:
    """A tenth of the requests is malformed, a tenth disconnects at a random moment. Counts what is not as promised."""
    wrong = {"incomplete or incorrect answers": 0, "malformed requests without a 4xx": 0}
    kinds = [rng.choices(("good", "malformed", "leaves"), (8, 1, 1))[0] for _ in work]

    async def one(port, i):
        if kinds[i] == "malformed":
            status, _, _ = await exchange(port, http("POST", "/v1/completions", json.dumps(MALFORMED[i % 12]).encode()))
            wrong["malformed requests without a 4xx"] += not 400 <= status < 500
            return
        data = http("POST", "/v1/completions", json.dumps(work[i]).encode())
        status, received, _ = await exchange(port, data, rng.randrange(3000) if kinds[i] == "leaves" else None)
        if kinds[i] == "good":
            wrong["incomplete or incorrect answers"] += status != 200 or events(received) != (*answers[i], True)

    usage = []
    for start in range(0, len(work), max(1, len(work) // 5)):
        await crowd(server.port, range(len(work))[start : start + max(1, len(work) // 5)], clients, one)
        usage.append(server.usage())
    deadline = time.perf_counter() + PATIENCE
    while (stats := await fetch(server.port, "/stats"))["admitted_samples"] and time.perf_counter() < deadline:
        await asyncio.sleep(0.05)  # the last to leave may not have been missed yet
    wrong["blocks left in use"], wrong["samples left over"] = stats["blocks_used"], stats["running"] + stats["waiting"]
    wrong["threads more than after the first fifth"] = usage[-1].get("Threads", 0) - usage[0].get("Threads", 0)
    wrong["unhealthy"] = (await fetch(server.port, "/health"))["status"] != "ok"
    return {"wrong": wrong, "rss": [u.get("VmRSS", 0) for u in usage]}


def fuzzed(rng: random.Random) -> bytes:
    """A request with something wrong: in a value, in the JSON's bytes, in the headers, or anywhere."""
    values = [None, True, -1, 0, 1, 2**70, 1.5, 1e308, "", "x", "\0", "ü" * 50, [], [[]], [1], ["a", 1], {}, {"a": 1}, [[1]]]
    fields = ["prompt", "messages", "n", "stop", "seed", "logprobs", "top_logprobs", "logit_bias", "max_tokens", "stream",
              "stream_options", "echo", "priority", "cache_salt", "top_p", "min_tokens", "stop_token_ids", "tokens", "oops"]
    body = {"prompt": "a fox", "max_tokens": 2}
    for _ in range(rng.randrange(3)):
        body[rng.choice(fields)] = rng.choice(values)
    text = bytearray(json.dumps(body).encode())
    kind = rng.randrange(4)
    if kind == 1:
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text))] = rng.randrange(256)
    lines = ["", "Content-Length: 7\r\n", "Transfer-Encoding: chunked\r\n", "X: " + "y" * rng.choice((10, 40000)) + "\r\n",
             "Expect: 100-continue\r\n", " folded\r\n", "a b: c\r\n", "X:\0\r\n", "Content-Type: text/plain\r\n", ":\r\n"]
    path = rng.choice(("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/health", "/..", "/%00"))
    data = bytearray(http(rng.choice(("POST", "POST", "POST", "GET", "HEAD", "P\0ST")), path, bytes(text),
                          rng.choice(lines) if kind == 2 else ""))
    if kind == 3:
        data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)):]
    return bytes(data)


async def fuzz(server: Process, count: int, clients: int, rng: random.Random) -> dict[str, int]:
    """Fuzzed requests: each is answered or hung up on in time, never with a 5xx, never with a traceback."""
    wrong = dict.fromkeys(("fuzzed requests answered with a 5xx", "hangs", "tracebacks or paths on the wire"), 0)

    async def one(port, data):
        try:
            status, received, _ = await exchange(port, data)
        except asyncio.TimeoutError:
            wrong["hangs"] += 1
            return
        wrong["fuzzed requests answered with a 5xx"] += status >= 500
        wrong["tracebacks or paths on the wire"] += b"Traceback" in received or str(ROOT).encode() in received

    await crowd(server.port, (fuzzed(rng) for _ in range(count)), clients, one)
    return wrong


async def throughput(server: Process, llm: LLM, outputs: tuple[int, int], rng: random.Random) -> tuple[float, float]:
    """Tokens a second of the same requests, (64 clients over HTTP, the engine alone in this process); medians of three.

    Each client keeps its connection, as OpenAI's do, and reads every event. The engine alone is not even asked for texts
    while it is timed. outputs: the shortest and the longest answer, in tokens.
    """
    work = [{**body, "max_tokens": rng.randint(*outputs), "ignore_eos": True} for body in workload(256, rng)]
    params = [SamplingParams(temperature=0, max_tokens=body["max_tokens"], ignore_eos=True) for body in work]
    tokens, over_http, alone, texts = sum(body["max_tokens"] for body in work), [], [], {}

    async def client(left):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20)
        for i, body in left:
            writer.write(http("POST", "/v1/completions", json.dumps(body).encode(), connection="keep-alive"))
            received = await reader.readuntil(b"\r\n0\r\n\r\n")
            texts[i], _, is_whole = events(received)
            assert received.startswith(b"HTTP/1.1 200 ") and is_whole
        writer.close()

    for _ in range(3):
        start, left = time.perf_counter(), enumerate(work)
        await asyncio.wait_for(asyncio.gather(*(client(left) for _ in range(64))), PATIENCE)
        over_http.append(tokens / (time.perf_counter() - start))
        start, requests = time.perf_counter(), []
        while len(requests) < len(work) or llm.has_work():  # 64 at once here as well
            while len(requests) < len(work) and llm.scheduler.num_waiting + len(llm.scheduler.running) < 64:
                requests.append(llm.add_request(work[len(requests)]["prompt"], params[len(requests)]))
            llm.step()
        alone.append(tokens / (time.perf_counter() - start))
        assert all(texts[i] == llm.text(request) for i, request in enumerate(requests))
    return float(np.median(over_http)), float(np.median(alone))


async def steady(server: Process, rate: float, count: int, rng: random.Random) -> tuple[float, float]:
    """(p50, p99) of the seconds to a first token, with arrivals at random at so many requests a second."""
    times = []

    async def one(body):
        times.append((await exchange(server.port, http("POST", "/v1/completions", json.dumps(body).encode())))[2])

    tasks = []
    for body in workload(count, rng):
        tasks.append(asyncio.create_task(one({**body, "max_tokens": 48, "ignore_eos": True})))
        await asyncio.sleep(rng.expovariate(rate))
    await asyncio.gather(*tasks)
    return tuple(np.percentile([seconds for seconds in times if seconds is not None], (50, 99)))


async def watching(pairs: int) -> tuple[float, float]:
    """(what share of the throughput an open page takes, how many states a second it gets), while 64 requests run and 500
    wait. A second with a page and one without take turns: the median of so many pairs.
    """
    server = Process("--kv-memory", "64MiB", "--max-batch-requests", "64")
    rng, shares, states = random.Random(0), [], 0

    async def client():  # is never without a request
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        while True:
            body = {"prompt": [5, 6], "max_tokens": rng.randint(32, 96), "temperature": 0, "ignore_eos": True}
            writer.write(http("POST", "/v1/completions", json.dumps(body).encode(), connection="keep-alive"))
            await reader.readuntil(b"}}")  # usage, the last field

    async def second(is_watched: bool) -> float:
        nonlocal states
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20)
        if is_watched:
            writer.write(http("GET", "/events"))
            await reader.readuntil(b'"num_waiting"')
        start, before = time.perf_counter(), (await fetch(server.port, "/stats"))["output_tokens"]
        await asyncio.sleep(1)
        after, seconds = (await fetch(server.port, "/stats"))["output_tokens"], time.perf_counter() - start
        writer.write_eof()
        states += (await reader.read()).count(b'"num_waiting"')
        writer.close()
        return (after - before) / seconds

    clients = [asyncio.create_task(client()) for _ in range(564)]
    try:
        while (await fetch(server.port, "/stats"))["waiting"] < 500:
            await asyncio.sleep(0.1)
        for pair in range(pairs):
            rates = {is_watched: await second(is_watched) for is_watched in (pair % 2 == 0, pair % 2 == 1)}
            shares.append(1 - rates[True] / rates[False])
    finally:
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        server.end(signal.SIGKILL)
    return float(np.median(shares)), states / pairs


async def programme(args: argparse.Namespace) -> int:
    """All of it. Returns how many promises were broken."""
    rng, llm = random.Random(args.seed), LLM(dtype="float32", kv_memory=64 << 20)
    work, broken = workload(args.requests, rng), 0

    def promise(what, kept, seen):
        nonlocal broken
        broken += not kept
        print(f"{'ok    ' if kept else 'BROKEN'} {what}: {seen}", flush=True)

    outputs = llm.generate([body["prompt"] for body in work],
                           [SamplingParams(temperature=0, max_tokens=body["max_tokens"]) for body in work])
    server = Process("--kv-memory", "64MiB", "--timeout", "3")
    try:
        result = await come_and_go(server, work, [(o.text, o.finish_reason) for o in outputs], args.clients, rng)
        for what, count in {**result["wrong"], **await fuzz(server, args.fuzz, args.clients, rng)}.items():
            promise(what, count <= 0, int(count))
        if args.measure:
            first, last = result["rss"][0], result["rss"][-1]
            promise("resident memory grew by at most 5 %", last <= 1.05 * first, f"{first:,} to {last:,} KiB")
            for outputs in ((48, 48), (16, 256)):
                over_http, alone = await throughput(server, llm, outputs, rng)
                promise("64 clients get at least 85 % of the engine's throughput, answers of {} to {}".format(*outputs),
                        over_http >= 0.85 * alone, f"{over_http:,.0f} and {alone:,.0f} tokens/s")
            p50, p99 = await steady(server, over_http / 48 / 2, 300, rng)
            promise("at half the load, p99 of the TTFT is at most 4 times p50", p99 <= 4 * p50,
                    f"{p50 * 1e3:.1f} and {p99 * 1e3:.1f} ms")
            share, rate = await watching(15)
            promise("with 500 waiting, a page takes less than 2 % of the throughput", share < 0.02,
                    f"{share:.1%}, with {rate:.1f} states a second")
        surprises = sum("Traceback" in line for line in server.log)
        promise("failures inside the server", surprises == 0, surprises)
        server.end(signal.SIGKILL)
        before, server = server, Process("--kv-memory", "64MiB")
        status, received, _ = await exchange(server.port, http("POST", "/v1/completions", b'{"prompt": "Once upon a time"}'))
        promise("killed and started again, it serves", status == 200,
                f"after {server.seconds_to_start:.1f} s, {before.seconds_to_start:.1f} s the first time")
        promise("SIGTERM ends it with", (code := server.end(signal.SIGTERM)) == 0, code)
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)
    return broken


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--fuzz", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-measure", dest="measure", action="store_false", help="count only")
    return min(1, asyncio.run(programme(parser.parse_args(argv))))


if __name__ == "__main__":
    sys.exit(main())
