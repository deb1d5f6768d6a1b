"""One command for a machine with a GPU: runs the GPU tests, then measures all that the README's GPU table wants to know.

    python tests/gpu_report.py                   # prints as it goes, and the table at the end; some half an hour
    python tests/gpu_report.py tests kernels     # or only these parts: tests, kernels, engine, idle, start, peer
    python tests/gpu_report.py peer --nano-vllm-path ~/nano-vllm
    python tests/gpu_report.py --tiny            # small sizes on whatever device there is: shows only that the script runs

"start" writes a checkpoint of the 8B shape into the folder for temporary files, 16 GB, and reads it once before it counts.
"peer" is the same work through transformers, and through nano-vLLM where a clone of it is given. That needs transformers,
Triton and the flash-attn package; whoever has not the last can put a package flash_attn on PYTHONPATH that calls the
FlashAttention of torch, and should say so beside the figure. Each part has a process of its own: a kernel that goes wrong
takes the whole process's GPU with it. The exit code is 1 if a test or any of the commands failed.

Kernels are timed by the device's own clock, after a warm-up, as the median of several runs, over buffers too large for the
L2 cache. Shares are of the bandwidth of a large copy, or of the rate of a large product, measured here on the same device.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402
import nanoserve  # noqa: E402

TABLE: list[tuple[str, str, str]] = []  # what was measured, the figure, the goal
FAILURES: list[str] = []  # whatever should make the whole report fail
nanoserve.SHAPES["tiny"] = nanoserve.SHAPES["qwen3-small"] | {
    "vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256}


def seconds(work, repeat: int = 20, runs: int = 5, captured: bool = True) -> float:
    """Of one call of `work`: the median over `runs` of the mean over `repeat`. On a GPU a captured graph of it is replayed,
    as the engine does when decoding: launching from Python takes longer than many of the kernels.
    """
    times = []
    if captured and torch.cuda.is_available():
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay
    for run in range(runs + 1):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeat):
                work()
            end.record()
            end.synchronize()
            taken = start.elapsed_time(end) / 1e3
        else:
            begin = time.perf_counter()
            for _ in range(repeat):
                work()
            taken = time.perf_counter() - begin
        if run:  # the first one compiles and warms up
            times.append(taken / repeat)
    return statistics.median(times)


def random_cache(shape, device, int8=False) -> tuple[list[torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]:
    """Keys and values [blocks, block_size, Hkv, D] in bfloat16, or as int8 with scales."""
    caches = [torch.randn(shape, device=device).bfloat16() for _ in "kv"]
    if not int8:
        return caches, None
    scales = tuple(torch.rand(shape[0], shape[2], shape[1], device=device).bfloat16() / 30 for _ in "kv")
    return [(cache * 30).to(torch.int8) for cache in caches], scales


def copies_beyond_l2(device, size: int) -> int:
    """How many buffers of `size` bytes, used in turn, it takes for none to be in the L2 cache when its turn comes again."""
    return 1 + (3 * torch.cuda.get_device_properties(device).L2_cache_size // size if device.type == "cuda" else 0)


def attention(batch: int, length: int, device, int8=False, heads=32, kv_heads=8, D=128, block_size=16) -> tuple[float, int]:
    """Decoding: (seconds, bytes of keys and values) of one layer's attention for `batch` requests of `length` tokens."""
    blocks, moved = batch * -(-length // block_size), 2 * batch * length * kv_heads * (D + 2 if int8 else 2 * D)
    layers = [random_cache((blocks + 1, block_size, kv_heads, D), device, int8)
              for _ in range(copies_beyond_l2(device, moved))]
    tables = (torch.randperm(blocks, device=device).int() + 1).view(batch, -1)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    start = torch.arange(batch + 1, dtype=torch.int32, device=device)
    q = torch.randn(batch, heads, D, device=device).bfloat16()
    taken = seconds(lambda: [kernels.paged_attention(q, *caches, tables, lengths, start, D**-0.5, scales=scales)
                             for caches, scales in layers])
    return taken / len(layers), moved


def prompts(batch: int, length: int, device, heads=32, kv_heads=8, D=128, block_size=16) -> dict[str, float]:
    """Seconds of one layer's attention for `batch` whole prompts of `length` tokens in bfloat16: by torch's FlashAttention,
    for which keys and values are gathered, by the kernel for few queries, and by the tiled one, also over an int8 cache.
    """
    blocks = batch * -(-length // block_size)
    tables = (torch.randperm(blocks, device=device).int() + 1).view(batch, -1)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    start = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    q, taken = torch.randn(batch * length, heads, D, device=device).bfloat16(), {}
    for name, flash, tiles, int8 in (("torch's FlashAttention", True, True, False), ("few queries", False, False, False),
                                     ("tiled", False, True, False), ("tiled, int8", False, True, True)):
        caches, scales = random_cache((blocks + 1, block_size, kv_heads, D), device, int8)
        work = partial(kernels.paged_attention, q, *caches, tables, lengths, start, D**-0.5, scales=scales)
        with patch.multiple(kernels, use_flash=flash, use_tiles=tiles):
            taken[name] = seconds(work, repeat=5, runs=3, captured=not flash)
            if flash and not kernels.use_flash:
                taken[name] = math.nan  # it failed, with a warning, and another kernel ran
    return taken


def matrix_rate(device, size: int) -> float:
    """FLOPs per second of a square product in bfloat16."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, captured=False)


def products(device, inputs: int, outputs: int, rows: int) -> dict[str, float]:
    """Seconds of a product in bfloat16 and with 8 and 4-bit weights, by our kernels and torch's own (NaN where it has none);
    as many weights in turn as the L2 cache cannot hold. torch's int4 takes (scale, zero) for 32 inputs of an output.
    """
    torchs, copies = torch.ops.aten, copies_beyond_l2(device, inputs * outputs // 2)
    x, taken = torch.randn(rows, inputs, device=device).bfloat16(), {}

    def torch_int4(w):
        pairs = (20 * w[:, ::2]).to(torch.int8).view(torch.uint8)  # two codes to a byte
        scales = w[:, ::16].reshape(inputs // 32, outputs, 2).bfloat16()
        return partial(torchs._weight_int4pack_mm, x, torchs._convert_weight_to_int4pack(pairs, 8), 32, scales)

    for name, prepare in (
            ("bf16", lambda w: partial(kernels.linear, x, w.bfloat16())),
            ("int8", lambda w: partial(kernels.linear, x, kernels.quantize(w, 8))),
            ("int4", lambda w: partial(kernels.linear, x, kernels.quantize(w, 4))),
            ("torch's int8", lambda w: partial(torchs._weight_int8pack_mm, x, (20 * w).to(torch.int8), w[:, 0].bfloat16())),
            ("torch's int4", torch_int4)):
        try:
            several = [prepare(torch.randn(outputs, inputs, device=device)) for _ in range(copies)]
            taken[name] = seconds(lambda several=several: [product() for product in several]) / copies
        except (AttributeError, RuntimeError) as error:
            if "torch" not in name:
                raise
            taken[name] = math.nan
            print(f"{name}: torch has none ({str(error).splitlines()[0][:80]})")
    return taken


def sampling(device, rows: int, vocab: int) -> dict[str, float]:
    """Seconds to draw from `rows` rows of logits, by filter."""
    logits, noise = torch.randn(rows, vocab, device=device) * 3, torch.rand(rows, device=device, dtype=torch.float64)

    def column(value, dtype=torch.float32):
        return torch.full((rows,), value, dtype=dtype, device=device)

    taken = {}
    for name, k, p, least in (("temperature", 0, 1.0, 0.0), ("top-k 50", 50, 1.0, 0.0), ("top-p 0.9", 0, 0.9, 0.0),
                              ("min-p 0.1", 0, 1.0, 0.1), ("all three", 50, 0.9, 0.1)):
        columns = column(0.8), column(k, torch.int64), column(p), column(least)
        taken[name] = seconds(lambda columns=columns: kernels.sample(logits, *columns, noise))
    return taken


def idle_share(device, shape: str, requests: int, overlap: bool, steps: int) -> tuple[float, float]:
    """(share of a decode step in which the device waits for the host, seconds of a step), for so many running requests.

    The device's own time is that of what the middle one of an odd number of steps launches, whose contexts are of the mean
    length: forward pass and sampling alone, again and again, so that the host is ahead of the device. Copying the inputs to
    it, some tens of microseconds, counts as waiting.
    """
    model = nanoserve.GPT(nanoserve.ModelConfig.from_dict(nanoserve.SHAPES[shape]), torch.bfloat16, device, 1024).randomize()
    llm = nanoserve.LLM(model, max_batch_requests=requests, kv_memory=requests * 320 * 2 * model.config.num_layers
                        * 2 * model.config.num_kv_heads * model.config.head_dim, overlap=overlap)
    params = nanoserve.SamplingParams(max_tokens=128 + 2 * steps, temperature=0.8, top_k=50, ignore_eos=True)
    for i in range(requests):
        llm.add_request([i] * 100, params)
    while not all(request.num_output > 8 for request in llm.scheduler.running) or llm.scheduler.num_waiting:
        llm.step()
    before, middle, pack = llm.stats(), [], llm.pack
    # No waiting for the device before and after: `step` ends when its tokens have been read, with overlap those of the one
    # before. So from one end to another it is as many steps of the device, with overlap each one earlier.
    start = time.perf_counter()
    for i in range(steps):
        if i == steps // 2 - overlap:
            llm.pack = lambda plan: middle.append(pack(plan)) or middle[0]
        llm.step()
        vars(llm).pop("pack", None)  # or the engine would hold itself, and its memory
    taken = (time.perf_counter() - start) / steps
    new = {name: count - before[name] for name, count in llm.stats().items()}
    if (new["steps"], new["output_tokens"], new["finished"]) != (steps, steps * requests, 0):
        raise RuntimeError(f"not {steps} steps of {requests} requests that all decode: {new}")
    batch, _, _ = middle[0]
    forward = llm.graphs.forward if llm.graphs else lambda batch: model.forward(batch, llm.cache)
    busy = seconds(lambda: llm.draw(batch, forward(batch)), captured=False, repeat=steps)
    return 1 - busy / taken, taken


def copy_bandwidth(device, size: int) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source), captured=False)


def command(*words: str, most: int | None = 240, **environment: str) -> bool:
    """Run one of the project's commands, for so many seconds at most, and show what it prints when it does. If it fails, the
    answer is False, and FAILURES has one more.
    """
    print(f"\n$ python {' '.join(words)}", flush=True)
    try:
        done = subprocess.run([sys.executable, "-u", *words], cwd=ROOT, timeout=most, env=os.environ | environment)
        failure = done.returncode and f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        failure = f"not done after {most} seconds"
    if failure:
        FAILURES.append(f"{' '.join(words)}: {failure}")
        print(FAILURES[-1])
    return not failure


def bench(tiny: bool, *words: str, most: int = 240) -> dict:
    """The figures of `nanoserve bench`, in a process of its own, which leaves nothing on the GPU; NaN if it failed. Tiny: in
    this process, and without measuring the machine, as both take seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["bench", *words, "--json", f"{folder}/figures.json"]
        if tiny:
            words = [word for word in words if word != "--nano-vllm"]
            words += "--shape tiny --requests 2 --input-len 4 --output-len 2 --runs 1 --max-model-len 64".split()
            with patch.object(nanoserve, "measure_roofline", lambda *_: (1e9, 1e9)):
                assert nanoserve.main(words) == 0
        elif not command("nanoserve.py", *words, most=most):
            return defaultdict(lambda: math.nan)
        return json.loads(Path(folder, "figures.json").read_text())


def line(what: str, goal: str, form: str, *figures: float) -> None:
    """Print a line of the table, and keep it for the end. Figures that are not there are NaN."""
    figure = "not measured" if any(math.isnan(x) for x in figures) else form.format(*figures)
    print(f"{what}: {figure}" + (f" (goal: {goal})" if goal else ""))
    TABLE.append((what, figure, goal))


def save_random(folder: Path, shape: dict, device) -> None:
    """A checkpoint of this shape with random weights in bfloat16, as `nanoserve.load` reads it."""
    (folder / "config.json").write_text(json.dumps({**shape, "dtype": "bfloat16"}))
    tensors = {}
    for name, place in nanoserve.layout(nanoserve.ModelConfig.from_dict(shape)).items():
        weight = torch.empty(place.num_rows, *place.shape[1:], dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        tensors[name] = weight.cpu()
    save_file(tensors, folder / "model.safetensors")


NANO_VLLM = """
import json, sys, time
from nanovllm import LLM, SamplingParams
folder, file = sys.argv[1:]
jobs, times = json.load(open(file)), []
llm = LLM(folder, enforce_eager=False, max_model_len=4096)
params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=tokens) for *_, tokens in jobs]
for run in range(4):  # other tokens each time: the same ones again would be prefix hits
    prompts = [[(token + run) % 10000 for token in prompt] for _, prompt, _ in jobs]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    times.append(time.perf_counter() - start)
    assert [len(output["token_ids"]) for output in outputs] == [tokens for *_, tokens in jobs]
json.dump(times[1:], open(file, "w"))  # the first one warms up
"""


def nano_vllm_rate(path: Path, shape: dict, work: list, device) -> float:
    """Output tokens per second of the nano-vLLM in folder `path`, in a process of its own: the median of three runs."""
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder), shape, device)
        for file in nanoserve.DEFAULT_MODEL.glob("tokenizer*.json"):  # it wants one, and decodes what it generates
            shutil.copy(file, folder)
        (script := Path(folder, "run_nano_vllm.py")).write_text(NANO_VLLM)
        (times := Path(folder, "times")).write_text(json.dumps(work))
        search = os.pathsep.join(filter(None, (str(path.resolve()), os.environ.get("PYTHONPATH"))))
        if not command(str(script), folder, str(times), most=300, PYTHONPATH=search):
            return math.nan
        return sum(tokens for *_, tokens in work) / statistics.median(json.loads(times.read_text()))


FIRST_TOKEN = """
import sys
from nanoserve import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=1024)
request = llm.add_request([1] * 32, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
while not request.num_output:
    llm.step()
"""


def measure_kernels(device, args) -> None:
    """Each kernel against the device's own bandwidth or rate."""
    bandwidth = copy_bandwidth(device, 1 << (16 if args.tiny else 31))
    print(f"large copy: {bandwidth / 1e9:,.0f} GB/s read and written")
    rate = matrix_rate(device, 64 if args.tiny else 8192)
    print(f"large product: {rate / 1e12:,.0f} TFLOP/s in bfloat16")
    for batch, length in ((2, 40), (1, 300)) if args.tiny else ((64, 2048), (1, 32768), (256, 1024), (8, 8192)):
        goals = ("85 %", "1.7 times") if (batch, length) in ((64, 2048), (1, 32768)) else ("", "")
        what = f"decode attention, {batch} x {length:,} tokens, 32/8 heads x 128"
        wide, moved = attention(batch, length, device)
        share = moved / wide / bandwidth
        line(f"{what}, bf16", goals[0], "{:.0f} % of the copy's bandwidth ({:,.1f} us)", 100 * share, wide * 1e6)
        low, moved = attention(batch, length, device, int8=True)
        share = moved / low / bandwidth
        line(f"{what}, int8 cache", goals[1], "{:.2f} times bf16, {:.0f} % of the bandwidth", wide / low, 100 * share)
    for rows in (1, 8, 16, 32, 64, 128):
        for inputs, outputs in ((128, 48),) if args.tiny else ((4096, 6144), (4096, 28672), (14336, 4096)):
            taken = products(device, inputs, outputs, rows)
            print(f"product {rows} x {inputs:,} x {outputs:,}: bf16 {taken['bf16'] * 1e6:,.1f} us, " + ", ".join(
                f"{low} {taken['bf16'] / taken[low]:.2f} times as fast" for low in list(taken)[1:]))
    for what, taken in sampling(device, *(4, 100) if args.tiny else (256, 152_000)).items():
        print(f"sample, {what}: {taken * 1e6:,.0f} us")
    for batch, length in ((2, 40),) if args.tiny else ((8, 4096), (1, 32768), (64, 512)):
        flops = 4 * 32 * 128 * batch * length * (length + 1) / 2
        print(f"prompt attention, {batch} x {length:,}: " + ", ".join(
            f"{name} {flops / taken / 1e12:,.0f} TFLOP/s ({100 * flops / taken / rate:.0f} % of the product's)"
            for name, taken in prompts(batch, length, device).items()))


FLOOR = 34_000  # output tokens per second of the 256 requests that 4.8 TB/s, an H200's, allow
QWEN = ("--shape", "qwen3-0.6b", "--nano-vllm")


def measure_engine(device, args) -> None:
    """What bench and the report on speculation say."""
    figures = bench(args.tiny, *QWEN)
    rate = figures["tokens_per_second"]
    line("Qwen3-0.6B shape, nano-vLLM's 256 requests: output tokens/s", "80 % of 34,000",
         "{:,.0f}, {:.0f} % of the floor of 34,000 at 4.8 TB/s", rate, 100 * rate / FLOOR)
    line("the same, of the floor at the bandwidth of a copy here", "", "{:.0f} % of {:,.0f}",
         100 * figures["roofline"], figures["floor_tokens_per_second"])
    line("the same with an int8 cache", "", "{:,.0f} tokens/s",
         bench(args.tiny, *QWEN, "--kv-dtype", "int8")["tokens_per_second"])
    llama = ("--shape", "llama-3.1-8b", "--max-model-len", "8192")
    single = (*llama, "--requests", "1", "--input-len", "128", "--output-len", "256")
    wide = bench(args.tiny, *single)
    rate = wide["tokens_per_second"]
    line("Llama-3.1-8B shape, batch 1, bf16", "85 %", "{:.0f} tokens/s: {:.1f} GB of weights each, {:.0f} % of a copy",
         rate, wide["weight_bytes"] / 1e9, 100 * rate * wide["weight_bytes"] / wide["copy_bytes_per_second"])
    for low, goal in (("int8", "1.7 times"), ("int4", "2.8 times")):
        fast = bench(args.tiny, *single, "--quantize", low)["tokens_per_second"]
        line(f"the same, {low} weights", goal, "{:.0f} tokens/s, {:.2f} times bf16", fast, fast / rate)
    prompts = bench(args.tiny, *llama, "--requests", "8", "--input-len", "4096", "--output-len", "1")
    line("prefill 8 x 4,096 tokens, Llama-3.1-8B shape", "60 %", "{:.0f} % of the rate of a large product",
         100 * prompts["roofline"])
    if not args.tiny:
        command("tests/speculation_report.py", "time", "--shape", "llama-3.1-8b", "--runs", "3")


def measure_idle(device, args) -> None:
    """Whole steps."""
    shape, requests, steps = ("tiny", 2, 3) if args.tiny else ("qwen3-0.6b", 256, 51)
    for overlap in (True, False):
        idle, taken = idle_share(device, shape, requests, overlap, steps)
        line(f"idle share of a decode step, {shape} x {requests}" + ("" if overlap else ", no overlap of steps"),
             "at most 5 %" if overlap else "", "{:.1f} % of {:.2f} ms", 100 * idle, taken * 1e3)


def measure_start(device, args) -> None:
    """From the start of a process, which loads a checkpoint, to its first token; the first of several warms up."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder), nanoserve.SHAPES["tiny" if args.tiny else "llama-3.1-8b"], device)
        for _ in range(1 if args.tiny else 4):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", FIRST_TOKEN, folder], cwd=ROOT, check=True)
            times.append(time.perf_counter() - start)
            print(f"from start to first token: {times[-1]:.1f} s")
    taken = statistics.median(times[1:] or times)
    line("from start to first token, 8B shape, weights in page cache", "at most 15 s", "{:.1f} s", taken)


def run_tests(device, args) -> None:
    """Those that need a GPU."""
    command("-m", "pytest", *["--version"] if args.tiny else ["-m", "gpu"], most=540)


def compare(device, args) -> None:
    """Beside transformers and nano-vLLM, on the same requests."""
    what, figures = "nano-vLLM's 256 requests, against ", defaultdict(lambda: math.nan)
    form = "{:.2f} times its {:,.0f} tokens/s"
    if importlib.util.find_spec("transformers"):
        figures = bench(args.tiny, *QWEN, "--compare", "transformers", most=540)
    else:
        print("transformers is not installed")
        figures["peer"] = "not measured"
    theirs = figures["peer_tokens_per_second"]
    line(f"{what}transformers' continuous batching", "3 times", form, figures["tokens_per_second"] / theirs, theirs)
    print(f"  it was {figures['peer']}")
    ours = theirs = math.nan
    if args.nano_vllm_path:
        shape = nanoserve.SHAPES["tiny" if args.tiny else "qwen3-0.6b"]
        work = nanoserve.nano_vllm_workload(shape["vocab_size"], 0)
        theirs = nano_vllm_rate(args.nano_vllm_path, shape, work, device)
        ours = bench(args.tiny, *QWEN, "--temperature", "0.6")["tokens_per_second"]
    else:
        print("nano-vLLM is measured with --nano-vllm-path FOLDER, a clone of github.com/GeeeekExplorer/nano-vllm")
    line(f"{what}nano-vLLM, both at temperature 0.6", "1.3 times", form, ours / theirs, theirs)


PARTS = {"tests": run_tests, "kernels": measure_kernels, "engine": measure_engine, "idle": measure_idle,
         "start": measure_start, "peer": compare}


def main(args) -> int:
    """Print everything, at the end the table. Returns the exit code, 1 if anything failed."""
    parts = args.parts or list(PARTS)
    if len(parts) > 1 and not args.tiny:
        with tempfile.TemporaryDirectory() as folder:
            for part in parts:
                table, peer = Path(folder, part), args.nano_vllm_path
                command("tests/gpu_report.py", part, "--table", str(table),
                        *(["--nano-vllm-path", str(peer.resolve())] if peer else []), most=None)
                TABLE.extend(json.loads(table.read_text()) if table.exists() else [])
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        try:
            commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        except OSError:
            commit = ""
        print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, commit {commit.strip() or 'unknown'}"
              + (", TINY: these figures mean nothing" if args.tiny else ""))
        for part in parts:
            try:
                PARTS[part](device, args)
            except Exception as error:
                traceback.print_exc()
                FAILURES.append(f"{part}: {error!r}")
    if args.table:
        args.table.write_text(json.dumps(TABLE))
    elif TABLE:
        print("\n| | measured | goal |\n| --- | ---: | ---: |")
        print("\n".join(f"| {' | '.join(row)} |" for row in TABLE))
    print("".join(f"\nFAILED: {failure}" for failure in FAILURES))
    return 1 if FAILURES else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="of these: " + " ".join(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--nano-vllm-path", type=Path, help="the folder with its package, nanovllm")
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)  # where a part of several leaves its lines
    args = parser.parse_args()
    if (path := args.nano_vllm_path) and not (path / "nanovllm").is_dir():
        parser.error(f"--nano-vllm-path: there is no nanovllm in {path}")
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    sys.stdout.reconfigure(line_buffering=True)  # whoever is stopped in the middle has shown what there was
    sys.exit(main(args))
