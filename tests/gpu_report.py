"""One command for a machine with a GPU: runs the GPU tests, then measures all that the README's GPU table wants to know.

    python tests/gpu_report.py                   # prints as it goes; some twenty minutes
    python tests/gpu_report.py tests kernels     # or only these parts of it: tests, kernels, engine, start, peer
    python tests/gpu_report.py --tiny            # small sizes on whatever device there is: shows only that the script runs

"start" writes a checkpoint of the 8B shape into the folder for temporary files, 16 GB, and reads it once before it counts.
"peer" is the same work through transformers. Each part has a process of its own: a kernel that goes wrong takes the whole
process's GPU with it. What ran on no GPU yet comes last in its part.

Kernels are timed by the device's own clock, after a warm-up, as the median of several runs, over buffers too large for the
L2 cache. Shares are of the bandwidth of a large copy, or of the rate of a large product, measured here on the same device.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402
import nanoserve  # noqa: E402


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
    """Seconds of one layer's attention for `batch` whole prompts of `length` tokens in bfloat16: by the kernel for few
    queries, by the tiled one, also over an int8 cache, and by torch's FlashAttention, which is given keys and values in one
    piece (the blocks that it could gather from are of 256 tokens).
    """
    blocks = batch * -(-length // block_size)
    tables = (torch.randperm(blocks, device=device).int() + 1).view(batch, -1)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
    start = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    q, taken = torch.randn(batch * length, heads, D, device=device).bfloat16(), {}
    for name, tiles, int8 in (("few queries", False, False), ("tiled", True, False), ("tiled, int8", True, True)):
        kernels.use_tiles = tiles
        caches, scales = random_cache((blocks + 1, block_size, kv_heads, D), device, int8)
        work = partial(kernels.paged_attention, q, *caches, tables, lengths, start, D**-0.5, scales=scales)
        taken[name] = seconds(work, repeat=5, runs=3)
    try:
        from torch.nn.attention.varlen import varlen_attn

        # Keys and values for every head: not all versions know groups, and it is the arithmetic that takes the time.
        k, v = torch.randn(2, batch * length, heads, D, device=device).bfloat16()
        taken["torch"] = seconds(lambda: varlen_attn(q, k, v, start, start, length, length, window_size=(-1, 0)), repeat=5,
                                 runs=3, captured=False)
    except (ImportError, TypeError, RuntimeError) as error:
        print(f"torch's FlashAttention does not run here: {str(error)[:80]}")
    return taken


def matrix_rate(device, size: int) -> float:
    """FLOPs per second of a square product in bfloat16."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, captured=False)


def products(device, inputs: int, outputs: int, rows: int) -> dict[str, float]:
    """Seconds of a product in bfloat16 and with 8 and 4-bit weights; as many weights in turn as the L2 cache cannot hold."""
    copies = copies_beyond_l2(device, inputs * outputs // 2)
    weights = [torch.randn(outputs, inputs, device=device) for _ in range(copies)]
    x, taken = torch.randn(rows, inputs, device=device).bfloat16(), {}
    for name, ready in (("bf16", lambda w: w.bfloat16()), ("int8", lambda w: kernels.quantize(w, 8)),
                        ("int4", lambda w: kernels.quantize(w, 4))):
        several = [ready(w) for w in weights]
        taken[name] = seconds(lambda several=several: [kernels.linear(x, w) for w in several]) / copies
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


def idle_share(device, shape: str, requests: int, overlap: bool, steps: int = 50) -> tuple[float, float]:
    """(share of a decode step in which the device waits for the host, seconds of a step), for so many running requests.

    The device's own time is that of the step's launches alone, forward pass and sampling, one after the other.
    """
    model = nanoserve.GPT(nanoserve.ModelConfig.from_dict(nanoserve.SHAPES[shape]), torch.bfloat16, device, 1024).randomize()
    llm = nanoserve.LLM(model, max_batch_requests=requests, kv_memory=requests * 320 * 2 * model.config.num_layers
                        * 2 * model.config.num_kv_heads * model.config.head_dim, overlap=overlap)
    params = nanoserve.SamplingParams(max_tokens=128 + 2 * steps, temperature=0.8, top_k=50, ignore_eos=True)
    for i in range(requests):
        llm.add_request([i] * 100, params)
    while not all(request.num_output > 8 for request in llm.scheduler.running) or llm.scheduler.num_waiting:
        llm.step()
    last, pack = [], llm.pack
    llm.pack = lambda plan: last.append(pack(plan)) or last[-1]
    wait = torch.cuda.synchronize if device.type == "cuda" else int
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        llm.step()
    wait()
    taken = (time.perf_counter() - start) / steps
    del llm.pack  # or the engine would hold itself, and its memory
    batch, samplers, _ = last[-1]
    forward = llm.graphs.forward if llm.graphs else lambda batch: model.forward(batch, llm.cache)
    busy = seconds(lambda: llm.draw(samplers, forward(batch)), captured=False, repeat=steps)
    return 1 - busy / taken, taken


def copy_bandwidth(device, size: int) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds(lambda: target.copy_(source), captured=False)


def command(*words: str, most: int | None = 240) -> None:
    """Run one of the project's commands, for so many seconds at most, and show what it prints when it does."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    try:
        subprocess.run([sys.executable, "-u", *words], cwd=ROOT, check=False, timeout=most)
    except subprocess.TimeoutExpired:
        print(f"not done after {most} seconds")


def save_random(folder: Path, shape: dict, device) -> None:
    """A checkpoint of this shape with random weights in bfloat16, as `nanoserve.load` reads it."""
    (folder / "config.json").write_text(json.dumps({**shape, "dtype": "bfloat16"}))
    tensors = {}
    for name, place in nanoserve.layout(nanoserve.ModelConfig.from_dict(shape)).items():
        weight = torch.empty(place.num_rows, *place.shape[1:], dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        tensors[name] = weight.cpu()
    save_file(tensors, folder / "model.safetensors")


FIRST_TOKEN = """
import sys
from nanoserve import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=1024)
request = llm.add_request([1] * 32, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
while not request.num_output:
    llm.step()
"""


def start_to_first_token(folder: Path, runs: int) -> list[float]:
    """Seconds of new processes that load the checkpoint and generate a token; the first, which warms up, is left out."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", FIRST_TOKEN, folder], cwd=ROOT, check=True)
        times.append(time.perf_counter() - start)
    return times[1:]


def measure_kernels(device, tiny: bool) -> None:
    """Each kernel against the device's own bandwidth or rate."""
    bandwidth = copy_bandwidth(device, 1 << (16 if tiny else 31))
    print(f"large copy: {bandwidth / 1e9:,.0f} GB/s read and written")
    rate = matrix_rate(device, 64 if tiny else 8192)
    print(f"large product: {rate / 1e12:,.0f} TFLOP/s in bfloat16")
    for batch, length in ((2, 40), (1, 300)) if tiny else ((64, 2048), (1, 32768), (256, 1024), (8, 8192)):
        taken, moved = attention(batch, length, device)
        share = moved / taken / bandwidth
        print(f"decode attention, {batch} x {length:,}: {taken * 1e6:,.1f} us, {100 * share:.0f} % of the copy's bandwidth")
        low, moved = attention(batch, length, device, int8=True)
        share = moved / low / bandwidth
        print(f"  int8 cache: {low * 1e6:,.1f} us, {100 * share:.0f} % of the bandwidth, {taken / low:.2f} times as fast")
    for rows in (1, 8):
        for inputs, outputs in ((128, 48),) if tiny else ((4096, 6144), (4096, 28672), (14336, 4096)):
            taken = products(device, inputs, outputs, rows)
            print(f"product {rows} x {inputs:,} x {outputs:,}: bf16 {taken['bf16'] * 1e6:,.1f} us, " + ", ".join(
                f"{low} {taken['bf16'] / taken[low]:.2f} times as fast" for low in ("int8", "int4")))
    for what, taken in sampling(device, *(4, 100) if tiny else (256, 152_000)).items():
        print(f"sample, {what}: {taken * 1e6:,.0f} us")
    for batch, length in ((2, 40),) if tiny else ((8, 4096), (1, 32768), (64, 512)):
        flops = 4 * 32 * 128 * batch * length * (length + 1) / 2
        print(f"prompt attention, {batch} x {length:,}: " + ", ".join(
            f"{name} {flops / taken / 1e12:,.0f} TFLOP/s ({100 * flops / taken / rate:.0f} % of the product's)"
            for name, taken in prompts(batch, length, device).items()))


def measure_engine(device, tiny: bool) -> None:
    """What bench and the report on speculation say, and whole steps."""
    if tiny:
        command("nanoserve.py", "bench", "--shape", "qwen3-small", "--requests", "1", "--input-len", "4",
                "--output-len", "2", "--runs", "1")
    else:
        command("nanoserve.py", "bench", "--shape", "qwen3-0.6b", "--nano-vllm")
        for low in ([], ["--quantize", "int8"], ["--quantize", "int4"]):
            command("nanoserve.py", "bench", "--shape", "llama-3.1-8b", "--requests", "1", "--input-len", "128",
                    "--output-len", "256", "--max-model-len", "8192", *low)
        command("nanoserve.py", "bench", "--shape", "llama-3.1-8b", "--requests", "8", "--input-len", "4096",
                "--output-len", "1", "--max-model-len", "8192")
        command("nanoserve.py", "bench", "--shape", "qwen3-0.6b", "--nano-vllm", "--kv-dtype", "int8")
        command("tests/speculation_report.py", "time", "--shape", "llama-3.1-8b", "--runs", "3")
    for overlap in (True, False):
        shape, requests, steps = ("qwen3-small", 2, 2) if tiny else ("qwen3-0.6b", 256, 50)
        idle, taken = idle_share(device, shape, requests, overlap, steps)
        print(f"decode, {shape} x {requests}, {'' if overlap else 'no '}overlap of steps: {taken * 1e3:.2f} ms a step, "
              f"idle {100 * idle:.1f} % of it")


def measure_start(device, tiny: bool) -> None:
    """From a process's start to its first token."""
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder), nanoserve.SHAPES["qwen3-small" if tiny else "llama-3.1-8b"], device)
        times = start_to_first_token(Path(folder), 1 if tiny else 3)
    print(f"from start to first token: {statistics.median(times):.1f} s ({', '.join(f'{t:.1f}' for t in times)})")


def run_tests(device, tiny: bool) -> None:
    """Those that need a GPU."""
    if not tiny:
        command("-m", "pytest", "-m", "gpu", most=540)


def compare(device, tiny: bool) -> None:
    """Beside transformers, which takes minutes."""
    if not tiny:
        command("nanoserve.py", "bench", "--shape", "qwen3-0.6b", "--nano-vllm", "--compare", "transformers", "--runs", "1",
                most=540)


PARTS = {"tests": run_tests, "kernels": measure_kernels, "engine": measure_engine, "start": measure_start, "peer": compare}


def main(tiny: bool, parts: list[str]) -> None:
    """Print everything."""
    if len(parts) > 1 and not tiny:
        for part in parts:
            command("tests/gpu_report.py", part, most=None)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    except OSError:
        commit = ""
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, commit {commit.strip() or 'unknown'}"
          + (", TINY: these figures mean nothing" if tiny else ""))
    for part in parts:
        PARTS[part](device, tiny)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="of these: " + " ".join(PARTS))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    sys.stdout.reconfigure(line_buffering=True)  # whoever is stopped in the middle has shown what there was
    main(args.tiny, args.parts or list(PARTS))
