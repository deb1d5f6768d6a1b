"""Most of what a server is asked it has computed before: keep it, and compute only what is new

Survey: A III.A, III.B · B 3.2.3, 7 · C KV Cache Optimization: Reuse Strategies, Request Scheduling:
  Inter-Request Scheduling, Long Context: KV Cache Management
Papers: RadixAttention arXiv:2312.07104 · Prompt Cache arXiv:2311.04934 · CachedAttention arXiv:2403.19708 ·
  GPTCache (NLP-OSS 2023)
Code: cache.BlockPool.match, cache.BlockPool.publish, cache.BlockPool.adopt, cache.BlockPool.release
Minutes: read 12, run 1, exercises 20, 35
Kind: run
Exercise: 04, 12
Effect: multi-turn chat computes 20 % of its prompt tokens, token for token the same answers
"""

# %% [markdown]
# ## The idea
#
# Keys and values of a token depend on it, and on the tokens before it. So two requests that begin alike have the same
# cache for as long as they are alike. When a block is full and computed, enter it in an index under *exactly*
# what it holds and what came before; when a request arrives, walk the index and adopt what is there. A block that
# nobody holds stays in the index until its memory is needed, least recently freed first (LRU).
#
# *Invariant:* a block is found only by the tokens it was computed from and the ones before them; so reuse cannot
# change an answer.
# *Cost:* one dictionary lookup per block of a new prompt, and memory that would otherwise be idle.

# %% Before you run it: six conversations of a story and six questions; every turn sends the whole conversation again.
PREDICT = 50  # What percentage of their prompt tokens still has to be computed?

# %%
import math

import book
import world
from simulator import Simulator, serve

from cache import BlockPool
from nanoserve import LLM, SamplingParams

args = book.options(__doc__)
plain = LLM(args.model, device=args.device, dtype="float32", prefix_caching=False)
caching = LLM(args.model, device=args.device, dtype="float32", prefix_caching=True)
tokenizer, BLOCK = plain.tokenizer, caching.pool.block_size

# %% [markdown]
# ## Four kinds of prompts
#
# All are about stories of the tiny world that the model was trained on. **Unrelated**: a story each, told halfway.
# **System prompt**: the same long instruction, then a question. **Few-shot**: the same four examples, then a question.
# **Multi-turn chat**: a story and six questions, one after the other; each turn sends all that was said before.

# %%
stories = [world.story(world.HELD_OUT_SEEDS.start + i, 160) for i in range(40)]


def chat(*texts, system=None):
    """The tokens of a conversation: user, assistant, user and so on."""
    messages = [{"role": "system", "content": system}] if system else []
    for i, text in enumerate(texts):
        messages.append({"role": "assistant" if i % 2 else "user", "content": text})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


rules = " ".join(f"{girl} is a friend of {boy}." for girl, boy in zip(world.GIRLS, world.BOYS)) * 2
examples = []
for tale in stories[20:24]:
    examples += [f"Listen to this story.\n{tale.text[:240]}", tale.text[240:300]]


def conversation(tale, turn):
    """A story, and the questions up to this turn with the true answers."""
    said = [f"Listen to this story.\n{tale.text}\n{tale.facts[0].question}"]
    for i in range(turn):
        said += [tale.facts[i].answer, tale.facts[i + 1].question]
    return chat(*said)


some, long_enough = stories[:24], [tale for tale in stories if len(tale.facts) >= 6][:6]
KINDS = {  # rounds of prompts: in a chat first everybody's first question, then everybody's second
    "unrelated": [[tokenizer.encode(tale.text)[:120] for tale in some]],
    "system prompt": [[chat(tale.facts[0].question, system=rules) for tale in some]],
    "few-shot": [[chat(*examples, tale.facts[0].question) for tale in some]],
    "multi-turn chat": [[conversation(tale, turn) for tale in long_enough] for turn in range(6)],
}

# %%
def answer(llm, rounds):
    """Answer one round of prompts after the other: (tokens of the answers, prompt tokens computed, seconds)."""
    before, answers = llm.stats()["prompt_tokens"], []
    with book.Timer() as timer:
        for prompts in rounds:
            outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))
            answers += [output.token_ids for output in outputs]
    return answers, llm.stats()["prompt_tokens"] - before, timer.seconds


weights, _ = book.num_weights(plain.model.config)  # two FLOPs per token each; attention is left out
rows, share, seconds = [], {}, {}
for name, rounds in KINDS.items():
    caching.pool.forget()
    expected, total, slow = answer(plain, rounds)
    answers, computed, fast = answer(caching, rounds)
    assert answers == expected, "reuse may change nothing"
    share[name], seconds[name] = 100 * computed / total, (slow, fast)
    rows.append((name, len(answers), total, computed, share[name], 2 * weights * (total - computed) / 1e9))
book.table("prompts | requests | prompt tokens | computed | computed % | GFLOP saved", rows,
    "with the prefix cache; the answers are the same, token for token")
for name, (slow, fast) in seconds.items():
    print(f"~ {name}: {slow:.2f} s without the cache, {fast:.2f} s with it")

sizes = [len(prompts[0]) for prompts in KINDS["multi-turn chat"]]  # of the first of the six
new = (sizes[-1] - sizes[0]) // 5
estimate = (sizes[0] + 5 * (new + BLOCK // 2)) / sum(sizes)
book.predicted("multi-turn chat, percentage of prompt tokens that is computed", PREDICT, share["multi-turn chat"],
    f"turns of {sizes} tokens: all of the first, and then what is new, about {new}, and the half block before it that "
    f"was not full: ({sizes[0]} + 5 x ({new} + {BLOCK // 2})) / {sum(sizes):,} = {100 * estimate:.0f} %")
book.bars(share, "% computed", "prompt tokens that still have to be computed")

# %% [markdown]
# ## Under pressure: least recently used, and the cliff
#
# Twelve conversations of 40 blocks come back four times each, and the pool has room for fewer. No model is needed to
# count hits: chapter 03's simulator, with one client. In a *round robin* LRU always throws out exactly what will be
# needed next; *in bursts*, each conversation has its four turns before the next one comes.

# %%
def hit_rate(num_blocks, order):
    """% of the prompt tokens found when conversations come in this order, one at a time."""
    jobs = [book.Arrival(0.0, 640, 1, text=who) for who in order]  # the same text begins alike
    server = Simulator((1, 0, 0, 0), BlockPool(num_blocks + 1, 16), max_batch_tokens=1024, max_batch_requests=1,
                       max_model_len=1024)
    serve(server, jobs, clients=1)
    return 100 * server.scheduler.num_hit_tokens / sum(job.prompt for job in jobs)


SIZES = (41, 120, 240, 360, 440, 470, 480, 560)
order = list(range(12)) * 4
pressure = {"round robin": [hit_rate(size, order) for size in SIZES],
            "in bursts": [hit_rate(size, sorted(order)) for size in SIZES]}
rows = [(size, 100 * size / 480, *rates) for size, *rates in zip(SIZES, *pressure.values())]
book.table("blocks in the pool | % of all 480 | round robin: hits % | in bursts: hits %", rows, "twelve conversations")

# %% [markdown]
# With room for 92 % of it, round robin finds nothing: that is the cliff. So real systems let requests go first whose
# prefix is cached (BatchLLM, RadixAttention), or keep evicted blocks on slower memory (CachedAttention, Pensieve).
#
# ## Where it goes wrong: semantic caching
#
# A *semantic* cache (GPTCache, SCALM) keeps whole answers, and returns one when a new question is *similar* to an old
# one. It saves the entire request, but similar is not the same. Each of 30 stories is asked all its questions, then the
# same in other words ("Please tell me: ..."). Similarity is here the cosine between sets of words, elsewhere between
# embeddings. No threshold below is both useful and safe.

# %%
def similarity(a, b):
    a, b = set(a.lower().split()), set(b.lower().split())
    return len(a & b) / math.sqrt(len(a) * len(b))


def semantic(threshold):
    """(% answered from the cache, % of these wrong, [(question, the similar one, its answer), ...] of the wrong ones)"""
    computed, right, wrong = 0, 0, []
    for tale in stories[:30]:
        kept = {}  # question: answer
        for question, truth in [(how + f.question, f.answer) for how in ("", "Please tell me: ") for f in tale.facts]:
            nearest = max(kept, key=lambda old: similarity(old, question), default=None)
            if nearest is None or similarity(nearest, question) < threshold:
                kept[question] = truth
                computed += 1
            elif kept[nearest] == truth:
                right += 1
            else:
                wrong.append((question, nearest, kept[nearest]))
    hits = right + len(wrong)
    return 100 * hits / (hits + computed), 100 * len(wrong) / max(1, hits), wrong


found = {threshold: semantic(threshold) for threshold in (0.55, 0.65, 0.75, 0.85, 0.95)}
rows = [(threshold, hits, wrong) for threshold, (hits, wrong, _) in found.items()]
book.table("similarity at least | from the cache % | of these wrong %", rows, "a semantic cache")
print("  for example: {!r} was answered like {!r}: {!r}".format(*found[0.75][2][0]))

# %%
with book.figure(args, "ch06_prefix_reuse", columns=3, size=(9.5, 3.4)) as axes:
    if axes is not None:
        left, middle, right = axes
        left.barh(list(share), list(share.values()), color=book.BLUE)
        left.set(title="Still to compute", xlabel="% of prompt tokens", ylim=(3.6, -0.6))
        left.grid(axis="y", visible=False)
        for (name, hits), style, colour in zip(pressure.items(), ("o-", "s--"), (book.RED, book.BLUE)):
            middle.plot([100 * size / 480 for size in SIZES], hits, style, color=colour, label=name)
        middle.set(title="LRU under pressure", xlabel="pool, % of all prefixes", ylabel="% of tokens found")
        middle.legend(loc="center left", fontsize=9)
        thresholds, hits, wrong = zip(*rows)
        right.plot(thresholds, hits, "o-", color=book.BLUE, label="answered from it")
        right.plot(thresholds, wrong, "s--", color=book.RED, label="of these wrong")
        right.set(title="A semantic cache", xlabel="similarity asked for", ylabel="%", ylim=(-5, 105))
        right.legend(fontsize=9)

# %% [markdown]
# ## Why
#
# An exact prefix is a proof: same tokens before, same keys and values. So a hit costs no quality, and the key must hold
# whatever else changes keys and values, such as an adapter or a tenant's salt (`root`), or one user would get another's
# cache. A hash would do until two prompts collide; the index compares the tokens. A similar question proves nothing.
# Note the trap: a prompt that is in the cache *completely* still needs one token computed, or there are no logits.
#
# ## At scale
#
# SGLang's paper reports hit rates of 50 to 99 % on its workloads with a radix tree over the same idea, and up to 6.4
# times the throughput. CachedAttention keeps conversations on disk, and reports up to 87 % less time to the first token
# of later turns. Where a model has recurrent layers, a prefix is a *state* and cannot be cut at a block (Marconi).
#
# ## Try this
#
# 1. Move the question in front of the instruction in "system prompt". What is left of the hits?
# 2. `block_size=4` in `caching`, and 64: which row of the first table changes most?
# 3. `BlockPool.release` frees the last block first. Let it begin with the first, `table.pop(0)`. Where are hits lost?
#
# **Exercise 04** (`python tutorial/check.py 04`): write `match`, and mind the trap. **12**: a bug hunt in the index.

# %% The claim, on counters.
assert share["multi-turn chat"] < 35 and share["unrelated"] > 85 and share["few-shot"] < share["unrelated"]
assert pressure["round robin"][SIZES.index(440)] < 10 and pressure["round robin"][-1] > 70
assert pressure["in bursts"][0] > 60, "an order that LRU likes needs no room"
assert found[0.55][1] > 20 and found[0.75][1] > 0 and found[0.95][0] < 1, "similar is not the same, and the same is rare"
