"""Exercise 06: bug hunt: a position gone wrong

A bug hunt: one request in this trace comes out wrong, and the others are perfect.

The functions below lay the tokens of a step end to end and work out where each one stands, where its keys and values
go and how far it may look. Somebody has made a change that looked harmless. Seven requests were served with at most
16 tokens a step:

    request   0    1    2    3    4    5    6
    prompt   11    5    2   13   28   16    7    tokens
    arrives   0    0    3    6   14   26   27    at step

Prefix caching is off. Find the change and put it right; then say in BROKEN which request it hurt, and in WHY why only
that one.
"""

import numpy as np
import torch

from cache import SCRATCH
from nanoserve import Batch, Request, Sampler, Span

BROKEN = None  # the number, from 0, of the request whose tokens come out wrong
WHY = ""  # in a sentence or two: what happens to it, and why to no other


def pack(self, plan: list[tuple[Request, int]]) -> tuple[Batch, list[Sampler], list[tuple[Request, int]]]:
    """Lay the planned tokens end to end. Returns the batch and whose its `rows` are: first those to be sampled, then
    (request, position) of prompt tokens whose successors' log-probabilities somebody asked for.
    """
    spans: list[Span] = []
    sampled: list[tuple[int, Sampler]] = []  # (row of the batch, whose it is)
    prompted: list[tuple[int, tuple[Request, int]]] = []
    row = 0  # of a request's first token; or where that would be, if the batch had it
    for request, n in plan:
        start, end = request.num_computed, request.num_computed + n
        spans.append((request, start, end))
        row, last = row - start, len(request.tokens) + request.num_pending - 1
        for j in range(end - last):  # after the last token, and after each draft behind it
            for k in range(request.width):
                sampled.append((row + last + j, (request, request.sample_index + k, j)))
        if not request.reuse_prefix and request.num_output == 0:
            prompted += [(row + p, (request, p)) for p in range(start, min(end, request.num_prompt - 1))]
        row += end
    samplers = [whose for _, whose in sampled]
    batch = self.lay_out(spans, [row for row, _ in sampled + prompted], samplers)
    return batch, samplers, [whose for _, whose in prompted]


def lay_out(self, spans: list[Span], rows: list[int], samplers: list[Sampler]) -> Batch:
    """The batch that computes these spans, with logits for `rows` of it, of which the first are to be sampled. All that
    the device needs to know goes there in one copy. Before that, moves the blocks that are due to move.
    """
    moves = self.pool.take_moves()
    for cache in self.caches:
        cache.move(*moves)
    requests, starts, ends = zip(*spans)
    starts, ends = np.array(starts), np.array(ends)
    counts = ends - starts
    query_start = np.concatenate([[0], counts.cumsum()])
    width = max(len(request.block_table) for request in requests)
    tables = np.full((len(spans), width), SCRATCH, dtype=np.int32)
    tokens: list[int] = []
    for i, (request, start, end) in enumerate(spans):
        tokens += request.tokens[start:end]
        if request.num_pending and end > len(request.tokens):
            tokens.append(-1 - self._in_flight.row[request])
        if request.drafts:
            length = len(request.tokens)
            tokens += request.drafts[max(0, start - length) : max(0, end - length)]
        tables[i, : len(request.block_table)] = request.block_table
    owner = np.repeat(np.arange(len(spans)), counts)
    positions = np.arange(len(tokens)) - (query_start[:-1] - starts * [r.num_output > 0 for r, *_ in spans])[owner]
    size = self.pool.block_size
    slots = tables[owner, positions // size].astype(np.int64) * size + positions % size

    settings = self._settings(samplers)  # first, so that they lie at a multiple of their size
    parts = [settings.ravel().view(torch.int32), tokens, positions, slots, rows, ends, query_start, tables.ravel()]
    packed = torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]))
    packed = self._send(packed).split([len(part) for part in parts])
    long = [part.long() for part in packed[1:5]]
    if min(tokens) < 0:
        long[0] = self._in_flight.fill(long[0])
    return Batch(*long[:3], packed[7].view(tables.shape), *packed[5:7], long[3],
                 wants_all=rows == list(range(len(tokens))), repeated_keys=int((counts - 1) @ (2 * ends - counts)) // 2,
                 settings=packed[0].view(self._real).view(settings.shape))
