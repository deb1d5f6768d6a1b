"""Written questions whose numbers hang on a seed, with answers that the engine's own functions give.

    python tutorial/check.py --seed NAME            the sheet for NAME, a name or a number
    python tutorial/check.py --seed NAME --key      with the answers, and the arithmetic that would have given them

Each asks for a number and for a reason. A question is a function of a random.Random; its docstring is the text, and it
returns the numbers to put there, the answer by the engine, and the arithmetic by which one has it without. Sample answers
are in tutorial/INSTRUCTOR.md.
"""

import random
from types import SimpleNamespace
from typing import NamedTuple

import torch

import kernels
from cache import BlockPool, KVCache
from nanoserve import Roofline
from scheduler import Request, Scheduler


class Question(NamedTuple):
    chapter: str
    text: str
    answer: int | float
    arithmetic: str


def drive(requests, *, budget=512, places=30, policy="fcfs", until=lambda: False) -> list[list[tuple[Request, int, int]]]:
    """The engine's scheduler without a model: for each step (request, num_computed before it, n), until all have ended."""
    s, steps = Scheduler(BlockPool(9999, 16), max_batch_tokens=budget, max_batch_requests=places, max_model_len=9999,
                         policy=policy), []
    for request in requests:
        s.add(request)
    while s.has_work() and not until():
        plan = s.schedule()
        steps.append([(request, request.num_computed, n) for request, n in plan])
        for request, n in plan:
            if s.advance(request, n):
                request.tokens.append(0)
                if request.num_output == request.max_tokens:
                    s.finish(request, "length")
    return steps


def rows(rng):
    """A prompt of {prompt} tokens, and {output} tokens are generated. A program without a KV cache computes the whole text
    anew for each token. How many rows go through the model in all? What does the cache change: the number of rows, what a
    row costs, or both?"""
    prompt, output = rng.randint(40, 300), rng.randint(20, 120)
    steps = drive([Request([0] * prompt, output)])
    return {"prompt": prompt, "output": output}, sum(before + n for ((_, before, n),) in steps), (
        f"{output} * {prompt} + {output} * ({output} - 1) // 2")


def ridge(rng):
    """A device reads {bandwidth:,} GB/s and does {rate:,} GFLOP/s; the weights have {bits} bits. From how many decoding
    requests on does the arithmetic of a step take at least as long as reading the weights, if caches are left out? Why does
    the number not depend on the size of the model?"""
    bandwidth, rate, bits = rng.choice((900, 1555, 2039, 3350, 4800)), 1000 * rng.randint(100, 990), rng.choice((8, 16, 32))
    model = SimpleNamespace(body=10**9, head=0, weight_bytes=bits // 8, kv_bytes=0, per_pair=0)
    batch, moved, flops = 0, 1, 0
    while flops * bandwidth < moved * rate:
        batch += 1
        moved, flops = Roofline.cost(model, [(Request([0]), 1)] * batch)
    return {"bandwidth": bandwidth, "rate": rate, "bits": bits}, batch, f"ceil({rate} * {bits // 8} / (2 * {bandwidth}))"


def softmax(rng):
    """One query has the scores {scores[0]} and {scores[1]} with the values {values[0]} and {values[1]} in its first split,
    {scores[2]} and {scores[3]} with {values[2]} and {values[3]} in its second. Each split hands on its maximum, its sum of
    exponentials and its weighted sum. What is the attention's output, to three digits? Why is the maximum handed on?"""
    scores, values = [rng.randint(0, 3) for _ in range(4)], [rng.randint(1, 9) for _ in range(4)]
    k, v = (torch.tensor(numbers, dtype=torch.float64).view(1, 4, 1, 1) for numbers in (scores, values))
    tables, lengths, starts = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([[0]], [4], [0, 1]))
    out = kernels.paged_attention(torch.ones(1, 1, 1, dtype=torch.float64), k, v, tables, lengths, starts, 1.0)
    weights = [f"exp({score} - {max(scores)})" for score in scores]
    products = [f"{weight} * {value}" for weight, value in zip(weights, values)]
    return {"scores": scores, "values": values}, round(out.item(), 3), (
        f"round(({' + '.join(products)}) / ({' + '.join(weights)}), 3)")


def capacity(rng):
    """{layers} layers, {heads} KV heads of {dim}, {bits}; blocks of 16 tokens in {memory} GiB. How many requests of
    {context:,} tokens fit at once, if they share nothing? Which of these numbers would you change first to fit twice as
    many, and what does that cost?"""
    layers, heads, dim = rng.choice((24, 28, 32, 40)), rng.choice((2, 4, 8)), rng.choice((64, 128))
    memory, context, itemsize = rng.choice((4, 8, 24, 48)), rng.randint(500, 6000), rng.choice((1, 2))
    bits = "16 bits" if itemsize == 2 else "8 bits, and a scale of 16 for each token's key, and its value, in each head"
    blocks = memory * 2**30 // KVCache.bytes_per_block(layers, 16, heads, dim, itemsize)
    return {"layers": layers, "heads": heads, "dim": dim, "bits": bits, "memory": memory, "context": context}, (
        blocks // BlockPool(2, 16).blocks_for(context)), (
        f"{memory} * 2**30 // ({layers} * 2 * 16 * {heads} * ({dim} * {itemsize} + {2 * (itemsize == 1)})) // "
        f"ceil({context} / 16)")


def samples(rng):
    """{n} samples of one prompt of {prompt} tokens, with {output} tokens generated for each, of which the last is not in the
    cache yet; blocks of {size}. How many blocks do they hold together? Which block of the prompt cannot stay shared, and
    when is it copied?"""
    size, prompt, output, n = rng.choice((8, 16, 32)), rng.randint(50, 300), rng.randint(20, 90), rng.randint(2, 6)
    prompt += prompt % size == 0
    pool, table = BlockPool(9999, size), []
    pool.extend(table, 0, prompt)
    for sample in [table, *(pool.adopt(table) for _ in range(n - 1))]:
        pool.extend(sample, prompt, prompt + output - 1)
    return {"n": n, "prompt": prompt, "output": output, "size": size}, pool.num_usable - pool.num_free, (
        f"{prompt} // {size} + {n} * (ceil(({prompt} + {output} - 1) / {size}) - {prompt} // {size})")


def hits(rng):
    """A prompt of {first} tokens has been computed, in blocks of {size}. The next one {asked}. How many of its tokens are
    hits? Why are these not all that the two have in common?"""
    size, first, shared, more = rng.choice((8, 16, 32)), rng.randint(100, 200), rng.randint(40, 99), rng.randint(1, 60)
    shared += shared % size == 0
    asked = f"begins with the same {shared} tokens and goes on otherwise for {more}"
    if rng.random() < 0.5:  # all of it is in the cache
        shared, more = 96, 0
        asked = f"is exactly the first {shared} tokens of it"
    pool, table, tokens = BlockPool(999, size), [], [0] * shared + [1] * (first - shared)
    pool.extend(table, 0, first)
    for i in range(first // size):
        pool.publish(table, i, tokens)
    return {"first": first, "size": size, "asked": asked}, size * len(pool.match([0] * shared + [2] * more)), (
        f"min({shared}, {shared} + {more} - 1) // {size} * {size}")


def chunks(rng):
    """{decoding} requests decode when a prompt of {prompt:,} tokens arrives. A step computes at most {budget} tokens, and
    nobody who decodes misses one. In which step, counted from 1, does the newcomer get its first token? What would a budget
    twice as large do to it, and to the others?"""
    budget, decoding, prompt = rng.choice((32, 64, 128)), rng.randint(4, 24), rng.randint(300, 2000)
    new = Request([0] * prompt, 1)
    steps = drive([*(Request([0], 2000) for _ in range(decoding)), new], budget=budget, until=lambda: new.num_output)
    return {"budget": budget, "decoding": decoding, "prompt": prompt}, len(steps), (
        f"ceil({prompt} / ({budget} - {decoding}))")


def turns(rng):
    """Virtual token counters: a prompt token counts 1, a generated one 2. One request runs at a time. Tenant a's requests
    have {a[0]} tokens in and {a[1]} out, b's {b[0]} and {b[1]}; both have plenty waiting, and a came first. How many of b's
    are served between a's first and a's second? Why does a tenant that was away for an hour not begin again where its
    counter stood?"""
    a, b = (rng.randint(20, 200), rng.randint(30, 100)), (rng.randint(5, 40), rng.randint(2, 25))
    requests = [Request([0] * a[0], a[1], tenant="a") for _ in range(2)]
    requests += [Request([0] * b[0], b[1], tenant="b") for _ in range(50)]
    steps = drive(requests, places=1, policy="fair", until=lambda: requests[1].num_computed)
    return {"a": a, "b": b}, len({request for step in steps for request, *_ in step}) - 2, (
        f"ceil(({a[0]} + 2 * {a[1]}) / ({b[0]} + 2 * {b[1]}))")


QUESTIONS = {rows: "01", ridge: "02", softmax: "04", capacity: "05", samples: "05", hits: "06", chunks: "07", turns: "08"}


def questions(seed: str) -> list[Question]:
    """The questions, with the numbers of this seed."""
    result = []
    for function, chapter in QUESTIONS.items():
        numbers, answer, arithmetic = function(random.Random(f"{function.__name__} {seed}"))
        result.append(Question(chapter, " ".join(function.__doc__.format(**numbers).split()), answer, arithmetic))
    return result


def sheet(seed: str, key: bool = False) -> str:
    """The questions as a text, with `key` also their answers."""
    return "\n\n".join(f"{i + 1}. (chapter {q.chapter}) {q.text}" + key * f"\n   {q.answer:,} = {q.arithmetic}"
                       for i, q in enumerate(questions(seed)))
