"""A language model writes one token per pass, and without a cache every pass repeats all the ones before

Survey: A II.A, II.B · B 2.1, 2.3 · C Background
Papers: attention arXiv:1706.03762 · nucleus sampling arXiv:1904.09751 · inference cost arXiv:2211.05102
Code: nanoserve.GPT.forward, cache.KVCache.bytes_per_block, kernels.sample, kernels.token_probabilities
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
# Keys and values never change: they depend on the token and on what came *before* it, not on what comes after. So keep
# them. That is the KV cache, and it is the reason why serving is a memory problem.
#
# *Invariant:* with the cache, a pass computes only the tokens that are new, and its logits are the same as if it had
# computed all.
# *Cost:* 2 x layers x KV heads x head dimension numbers for every token of every running request.

# %% Before you run it: a prompt of seven tokens, and 128 to write. A *row* is one token going through all layers.
PREDICT = 30  # How many times as many rows are computed if nothing is kept? (Put your own number here.)

# %%
import math

import book
import torch

import kernels
from cache import KVCache
from nanoserve import LLM, SHAPES, Batch, ModelConfig, SamplingParams, parameters

args = book.options(__doc__)
llm = LLM(args.model, device=args.device, dtype="float32", prefix_caching=False)  # in float32 tokens can be compared
model, config = llm.model, llm.model.config
prompt = llm.tokenizer.encode("Once upon a time there was")
WRITE = 128

# %% [markdown]
# ## A forward pass and a loop, with nothing hidden
#
# This is all there is. `Batch` says which tokens are new, at which positions they stand, in which slots of the cache
# their keys and values go, and how far they may look. The cache is cut into blocks; here block 1 has room for all.

# %%
SIZE = 512  # tokens in a block


def empty_cache():
    return KVCache(config.num_layers, 2, SIZE, config.num_kv_heads, config.head_dim, model.dtype, model.device)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=model.device)


def logits_after(tokens, start, cache):
    """One pass over tokens[start:], those before it being in the cache; the scores for what comes next."""
    new = torch.tensor(tokens[start:], device=model.device)
    positions = torch.arange(start, len(tokens), device=model.device)
    slots = 1 * SIZE + positions  # where block 1 begins, and on
    batch = Batch(new, positions, slots, block_tables=ints([[1]]), context_lens=ints([len(tokens)]),
                  query_start=ints([0, len(new)]), rows=torch.tensor([len(new) - 1], device=model.device))
    return model.forward(batch, cache)[0]


def generate(count, use_cache):
    """Greedy. Returns the new tokens, and [(rows computed, pairs of query and key looked at) of each pass]."""
    cache, tokens, passes, start = empty_cache(), list(prompt), [], 0
    for _ in range(count):
        n = len(tokens) - start
        pairs = n * start + n * (n + 1) // 2  # each new token sees all that is cached, and the new ones up to itself
        passes.append((n, pairs))
        tokens.append(int(logits_after(tokens, start, cache).argmax()))
        if use_cache:
            start += n
    return tokens[len(prompt):], passes


with book.Timer() as slow:
    tokens, passes_without = generate(WRITE, use_cache=False)
with book.Timer() as fast:
    same_tokens, passes_with = generate(WRITE, use_cache=True)
(engine,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=WRITE, ignore_eos=True))
assert tokens == same_tokens == engine.token_ids, "the cache may change nothing"
print(f"\nthe loop, the loop with a cache and the engine all wrote:\n  {llm.tokenizer.decode(tokens)!r}")

# %% [markdown]
# ## What it costs, counted
#
# A row takes two FLOPs (one multiplication, one addition) for every weight it meets; only the last row meets those
# behind the last attention. Attention takes four per pair of query and key, per head dimension, head and layer.

# %%
of_all, of_last = book.num_weights(config)
per_pair = 4 * config.num_heads * config.head_dim * config.num_layers


def gflop(passes):
    """GFLOP of each pass."""
    return [(2 * of_all * rows + 2 * of_last + per_pair * pairs) / 1e9 for rows, pairs in passes]


gains = {}
for count in (1, 2, 8, 32, WRITE):
    rows_without = sum(rows for rows, _ in passes_without[:count])
    rows_with = sum(rows for rows, _ in passes_with[:count])
    flop_without, flop_with = sum(gflop(passes_without[:count])), sum(gflop(passes_with[:count]))
    gains[count] = rows_without, rows_with, rows_without / rows_with, flop_without, flop_with, flop_without / flop_with
book.table("tokens written | rows without cache | with | ratio | GFLOP without | with | ratio",
    [(count, *row) for count, row in gains.items()], f"after a prompt of {len(prompt)} tokens")
print(f"~ seconds: {slow.seconds:.2f} without, {fast.seconds:.2f} with the cache")
book.predicted("rows without a cache, relative to with one", PREDICT, rows_without / rows_with,
    f"without: {WRITE} passes over {len(prompt)}, {len(prompt) + 1}, ... tokens, {rows_without:,} rows; with: the "
    f"prompt once, then one row for each of {WRITE - 1}, {rows_with}")

# %% [markdown]
# ## Prefill and decode
#
# The prompt's tokens are all known, so they go through in one pass: *prefill*. The others come one by one, as each
# needs the one before it: *decode*. Same FLOPs per row, but a pass over one row reads every weight for the sake of one
# token. (Chapter 02 makes this a law.)

# %%
known = book.token_ids(256, 0, config.vocab_size)
cache = empty_cache()


def one_by_one():
    for n in range(1, len(known) + 1):
        logits = logits_after(known[:n], n - 1, cache)
    return logits


assert torch.allclose(logits_after(known, 0, cache), one_by_one(), atol=1e-2), "prefill and decode compute the same"
wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
together = book.median_seconds(lambda: logits_after(known, 0, cache), 5, wait)
apart = book.median_seconds(one_by_one, 5, wait)
print("\n256 tokens, the same rows, the same weights: 1 pass or 256 passes\n"
      f"~ at once {1e3 * together:.0f} ms, one by one {1e3 * apart:.0f} ms: {apart / together:.0f} times as long")

# %% [markdown]
# ## From scores to a token
#
# Greedy takes the largest. Sampling divides the scores by a *temperature*, turns them into probabilities, throws the
# unlikely ones away (top-k: all but k; top-p: all beyond the first that reach p together; min-p: all below a share of
# the largest) and draws.

# %%
scores = logits_after(prompt, 0, empty_cache())[None]
table = []
for way in ((1.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.0), (2.0, 0, 1.0, 0.0),
            (2.0, 5, 1.0, 0.0), (2.0, 0, 0.5, 0.0), (2.0, 0, 1.0, 0.2)):
    settings = [torch.tensor([x], device=model.device) for x in way]
    probs = kernels.token_probabilities(scores, *settings)[0]
    likeliest = llm.tokenizer.decode([int(probs.argmax())])
    table.append((*way, int((probs > 0).sum()), f"{likeliest!r} {100 * probs.max():.0f} %"))
book.table("temperature | top-k | top-p | min-p | tokens left | likeliest", table, "what may come next")

# %% [markdown]
# ## Why, and where it does not help
#
# Without a cache, token i costs a pass over all i tokens, so writing n tokens costs about n²/2 rows; with it, n. The
# longer the text, the larger the gain. (FLOPs gain less: every written token pays for its own scores either way.)
# Which also says when there is none: for an answer of *one* token (a classification, a rerank) nothing is repeated, and
# the memory buys nothing. And the memory is real: it is what everything else in this tutorial fights about.

# %%
memory = {}
for name in ("this model", "qwen3-0.6b", "llama-3.1-8b"):
    c = ModelConfig.from_dict(SHAPES[name]) if name in SHAPES else config
    per_token = KVCache.bytes_per_block(c.num_layers, 1, c.num_kv_heads, c.head_dim, 2)  # one token in 16 bits
    weights = sum(2 * math.prod(p.shape) for p in parameters(c))
    memory[name] = per_token, weights // per_token
book.table("model, 16 bits | KV bytes per token | tokens that take as much as the weights",
    [(name, *row) for name, row in memory.items()])

# %%
with book.figure(args, "ch01_generate", columns=2) as axes:
    if axes is not None:
        left, right = axes
        left.plot(torch.tensor(gflop(passes_without)).cumsum(0), "--", color=book.RED, label="no cache")
        left.plot(torch.tensor(gflop(passes_with)).cumsum(0), "-", color=book.BLUE, label="KV cache")
        left.set(title="FLOPs for 128 tokens", xlabel="tokens written", ylabel="GFLOP so far", yscale="log")
        left.legend()
        bars = right.barh(list(memory), [per_token / 1024 for per_token, _ in memory.values()], color=book.BLUE)
        right.bar_label(bars, fmt=" %.0f KiB")
        right.set(title="and its price: cache per token", xlabel="KiB in 16 bits", xlim=(0, 160))
        right.grid(axis="y", visible=False)

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
# 2. `start += n - 1` in `generate`: the tokens stay right. What is computed twice, and which assertion notices?
# 3. Add temperature 5 with min-p 0.2 to the table: four times as many are left as at 2. Why?
#
# **Exercise 01** (`python tutorial/check.py 01`): write `token_probabilities`, and let the engine draw from it.

# %% The claim, on counters.
assert rows_without == sum(len(prompt) + i for i in range(WRITE)) and rows_with == len(prompt) + WRITE - 1
assert rows_without > 30 * rows_with and gains[1][2] == 1, "for one token a cache gains nothing"
assert llm.stats()["computed_tokens"] == rows_with, "the engine counts the same"
