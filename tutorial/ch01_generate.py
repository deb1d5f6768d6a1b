"""A language model writes one token per pass, and without a cache every pass repeats all the ones before

Survey: A II.A, II.B · B 2.1, 2.3 · C Background
Papers: attention arXiv:1706.03762 · nucleus sampling arXiv:1904.09751 · inference cost arXiv:2211.05102
Code: nanoserve.GPT.forward, nanoserve.LLM.step, cache.KVCache.bytes_per_block, kernels.sample, kernels.token_probabilities
Minutes: read 12, run 1, exercise 25
Kind: run
Exercise: 01
Effect: writing 128 tokens takes 134 rows of work instead of 9,024, a 67th
"""

# %% [markdown]
# ## The idea
#
# A language model is a function: tokens in, one score (a *logit*) per vocabulary entry out, for every position. To
# write, call it, turn the last position's scores into one token, append it, and call it again.
#
# Inside, each position makes a query, a key and a value, and looks at the keys and values of the positions before it.
# Those never change: a token's key depends on what came *before* it only. So keep them. That is the KV cache, and it is
# the reason why serving is a memory problem.
#
# *Invariant:* with the cache, a pass computes `tokens[num_computed:]` and its logits are the same as if it had computed
# all tokens.
# *Cost:* 2 x layers x KV heads x head dimension numbers for every token of every running request.

# %% Before you run it: a prompt of seven tokens, and 128 tokens to write.
PREDICT = 30  # How many times more token rows go through the model if nothing is kept? (Put your own number here.)

# %%
import math

import book
import torch

import kernels
from cache import KVCache
from nanoserve import LLM, SHAPES, Batch, ModelConfig, SamplingParams, parameters

args = book.options(__doc__)
torch.set_grad_enabled(False)
llm = LLM(args.model, device=args.device, dtype="float32", prefix_caching=False)  # in float32 tokens can be compared
model, config = llm.model, llm.model.config
prompt = llm.tokenizer.encode("Once upon a time there was")
WRITE = 128

# %% [markdown]
# ## A forward pass and a loop, with nothing hidden
#
# This is all there is. One request, and one block of the cache that is large enough for it. `start` says how many
# tokens are in the cache already; `Batch` says which tokens are new, where they stand, where their keys and values go,
# and how far they may look.

# %%
SIZE = 512


def logits_after(tokens, start, cache):
    """One pass over tokens[start:]; the scores for what comes next."""
    at = torch.arange(start, len(tokens), device=model.device)
    ints = (torch.tensor(x, dtype=torch.int32, device=model.device) for x in ([[1]], [len(tokens)], [0, len(at)]))
    batch = Batch(torch.tensor(tokens[start:], device=model.device), at, 1 * SIZE + at, *ints, rows=at[-1:] - start)
    return model.forward(batch, cache)[0]


def generate(tokens, count, use_cache):
    """Greedy. Returns the new tokens, and for each pass (rows computed, pairs of query and key it looked at)."""
    cache = KVCache(config.num_layers, 2, SIZE, config.num_kv_heads, config.head_dim, model.dtype, model.device)
    tokens, passes = list(tokens), []
    for i in range(count):
        start = len(tokens) - 1 if use_cache and i else 0
        n = len(tokens) - start
        passes.append((n, n * start + n * (n + 1) // 2))
        tokens.append(int(logits_after(tokens, start, cache).argmax()))
    return tokens[-count:], passes


with book.Timer() as without:
    slow, slow_passes = generate(prompt, WRITE, use_cache=False)
with book.Timer() as with_cache:
    fast, fast_passes = generate(prompt, WRITE, use_cache=True)
(engine,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=WRITE, ignore_eos=True))
assert slow == fast == engine.token_ids, "the cache may change nothing"
print(f"\nprompt of {len(prompt)} tokens, {WRITE} written; the loop, the loop with a cache and the engine all wrote:\n  "
      f"{llm.tokenizer.decode(fast)!r}")

# %% [markdown]
# ## What it costs, counted
#
# A row is one token going through all layers: two FLOPs (one multiplication, one addition) for every weight of a
# matrix. Attention adds four FLOPs per pair of query and key, per head dimension, head and layer.

# %%
body = sum(math.prod(p.shape) for p in parameters(config) if len(p.shape) == 2 and p.name not in ("embed", "head"))
head = config.vocab_size * config.hidden_size
per_pair = 4 * config.num_heads * config.head_dim * config.num_layers


def flops(passes):
    return [2 * body * rows + 2 * head + per_pair * pairs for rows, pairs in passes]


rows = {name: sum(n for n, _ in passes) for name, passes in (("without", slow_passes), ("with", fast_passes))}
book.table("cache | passes | rows | query-key pairs | GFLOP | GFLOP in attention",
    [(name, len(p), rows[name], sum(x for _, x in p), sum(flops(p)) / 1e9, per_pair * sum(x for _, x in p) / 1e9)
     for name, p in (("without", slow_passes), ("with", fast_passes))], "the same 128 tokens")
print(f"~ seconds: {without.seconds:.2f} without, {with_cache.seconds:.2f} with the cache")
ratio = rows["without"] / rows["with"]
book.predicted("rows without a cache, relative to with one", PREDICT, ratio,
    f"without: {WRITE} passes over {len(prompt)}, {len(prompt) + 1}, ... tokens, {rows['without']:,} rows; with: the prompt "
    f"once, then one row for each of {WRITE - 1}, {rows['with']}")
print(f"\n  rows shrink {ratio:.0f}-fold, FLOPs only {sum(flops(slow_passes)) / sum(flops(fast_passes)):.0f}-fold: "
      f"every written token pays for its {head:,} output weights either way")

# %% [markdown]
# ## Prefill and decode
#
# The prompt's tokens are all known, so they go through in one pass. The others come one by one, as each needs the one
# before it. Same FLOPs per row, but a pass over one row reads every weight for the sake of one token. (Chapter 02 makes
# this a law.)

# %%
long = book.token_ids(256, 0, config.vocab_size)
cache = KVCache(config.num_layers, 2, SIZE, config.num_kv_heads, config.head_dim, model.dtype, model.device)
at_once, one_by_one = [], []
for _ in range(5):
    with book.Timer() as t:
        together = logits_after(long, 0, cache)
    at_once.append(t.seconds)
    with book.Timer() as t:
        for n in range(1, len(long) + 1):
            single = logits_after(long[:n], n - 1, cache)
    one_by_one.append(t.seconds)
assert torch.allclose(together, single, atol=1e-2), "prefill and decode compute the same"
gain = min(one_by_one) / min(at_once)
print("\n256 tokens, the same rows, the same weights: 1 pass or 256 passes\n"
      f"~ at once {1e3 * min(at_once):.0f} ms, one by one {1e3 * min(one_by_one):.0f} ms: {gain:.0f} times as long")

# %% [markdown]
# ## From scores to a token
#
# Greedy takes the largest. Sampling divides the scores by a *temperature*, turns them into probabilities, throws the
# unlikely ones away (top-k: all but k; top-p: all beyond the first that reach p together; min-p: all below a share of
# the largest) and draws.

# %%
scores = logits_after(prompt, 0, cache)[None]
ways = {
    "as it is": (1.0, 0, 1.0, 0.0),
    "temperature 0.5": (0.5, 0, 1.0, 0.0),
    "temperature 2": (2.0, 0, 1.0, 0.0),
    "temperature 2, top_k 5": (2.0, 5, 1.0, 0.0),
    "temperature 2, top_p 0.5": (2.0, 0, 0.5, 0.0),
    "temperature 2, min_p 0.2": (2.0, 0, 1.0, 0.2),
}
shown = []
for name, (temperature, top_k, top_p, min_p) in ways.items():
    settings = (torch.tensor([x], device=scores.device) for x in (temperature, top_k, top_p, min_p))
    (probs,) = kernels.token_probabilities(scores, *settings)
    likeliest = zip(*(x.tolist() for x in probs.topk(3)))
    likely = "  ".join(f"{llm.tokenizer.decode([token])!r} {100 * p:.0f} %" for p, token in likeliest if p)
    shown.append((name, int((probs > 0).sum()), float(-(probs * probs.clamp(min=1e-30).log2()).sum()), likely))
book.table("way | tokens left | bits of choice | likeliest", shown, "what may come next")
twice = [llm.generate([prompt], SamplingParams(temperature=1.2, seed=7, max_tokens=20))[0].token_ids for _ in range(2)]
assert twice[0] == twice[1], "the noise is a function of (seed, position)"

# %% [markdown]
# ## Why, and where it does not help
#
# Without a cache, token i costs a pass over all i tokens, so writing n tokens costs about n²/2 rows; with it, n. The
# longer the text, the larger the gain. Which also says when there is none: for an answer of *one* token (a
# classification, a score, a rerank) there is nothing to repeat, and the memory buys nothing.
#
# And the memory is real. At scale it is what everything else in this tutorial fights about.

# %%
saved = []
for count in (1, 2, 8, 32, 128):
    n, computed = len(prompt), len(prompt) + count - 1
    saved.append((count, sum(range(n, n + count)), computed, sum(range(n, n + count)) / computed))
book.table("tokens written | rows without | rows with | gain", saved, "an answer of one token gains nothing")

memory = []
for name in ("this model", "qwen3-0.6b", "llama-3.1-8b"):
    c = ModelConfig.from_dict(SHAPES[name]) if name in SHAPES else config
    per_token = KVCache.bytes_per_block(c.num_layers, 1, c.num_kv_heads, c.head_dim, 2)
    weights = 2 * sum(math.prod(p.shape) for p in parameters(c))
    memory.append((name, per_token, weights / 2**20, weights // per_token))
book.table("model, 16 bits | KV bytes per token | weights MiB | tokens that take as much as the weights", memory,
    "what the cache costs")

# %%
with book.figure(args, "ch01_generate", columns=2) as axes:
    if axes is not None:
        left, right = axes
        for passes, style, name in ((slow_passes, "--", "no cache"), (fast_passes, "-", "KV cache")):
            colour = book.BLUE if name == "KV cache" else book.RED
            left.plot(torch.tensor(flops(passes)).cumsum(0) / 1e9, style, color=colour, label=name)
        left.set(title="FLOPs for 128 tokens", xlabel="tokens written", ylabel="GFLOP so far", yscale="log")
        left.legend()
        names = [row[0] for row in memory]
        right.barh(names, [row[1] / 1024 for row in memory], color=book.BLUE)
        for i, row in enumerate(memory):
            right.annotate(f" {row[1] / 1024:.0f} KiB", (row[1] / 1024, i), va="center")
        right.set(title="and its price: cache per token", xlabel="KiB in 16 bits", xlim=(0, 160))
        right.grid(axis="y", visible=False)
book.bars(
    {"no cache": sum(flops(slow_passes)) / 1e9, "KV cache": sum(flops(fast_passes)) / 1e9},
    "GFLOP",
    f"writing {WRITE} tokens",
)

# %% [markdown]
# ## At scale
#
# Pope et al. (arXiv:2211.05102) serve PaLM 540B and find the same two regimes: prefill is bound by FLOPs, decoding by
# what must be read for each token, weights and cache. On our Llama-3.1-8B row a token takes 128 KiB, so 128k tokens of
# context take 16 GiB, more than the weights.
#
# ## Try this
#
# 1. Make the prompt ten times as long. Which ratio changes, and does the one in seconds follow?
# 2. Set `use_cache=True` but keep `start = 0`: the tokens stay right. What exactly did the cache save?
# 3. Draw at temperature 5 with min_p 0.1. Why does the text survive?
#
# **Exercise 01** (`python tutorial/check.py 01`): write `token_probabilities`, and let the engine draw from it.

# %% The claim, on counters.
assert rows["without"] == sum(range(len(prompt), len(prompt) + WRITE)) and rows["with"] == len(prompt) + WRITE - 1
assert ratio > 30 and saved[0][3] == 1.0
assert llm.stats()["computed_tokens"] == rows["with"] + 2 * (len(prompt) - 1) + sum(map(len, twice)), (
    "the engine counts the same"
)
