"""Measure speculation: how many passes of the target a token takes, how often drafts come true, how much time is saved.

    python tests/speculation_report.py passes              the default model on its own kind of text; counts, so repeatable
    python tests/speculation_report.py acceptance          ways to draw a draft, against the bound; likewise
    python tests/speculation_report.py time --shape gpt2   wall time at a given acceptance; in turn with plain decoding

For `time` the weights are random, so no draft would ever come true. The draft model, a tenth of the target, does all its
work; then what it proposed is replaced, with the given probability for each draft, by the token that the target is known
to generate, else by another. So the drafts cost what they cost, and come true as often as asked.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tutorial")]

import world  # noqa: E402

import nanoserve  # noqa: E402
from nanoserve import GPT, LLM, SHAPES, Batch, DraftModel, KVCache, ModelConfig, SamplingParams  # noqa: E402

DRAFT_SHAPES = {  # about a tenth of the parameters, and the same vocabulary
    "gpt2": SHAPES["gpt2"] | {"n_embd": 192, "n_layer": 4, "n_head": 3},
    "qwen3-small": SHAPES["qwen3-small"] | {"hidden_size": 160, "num_hidden_layers": 3, "intermediate_size": 480,
                                            "num_attention_heads": 2, "num_key_value_heads": 1},
    "llama-3.1-8b": SHAPES["llama-3.1-8b"] | {"hidden_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 12,
                                              "num_key_value_heads": 4, "intermediate_size": 5376,
                                              "tie_word_embeddings": True},
}


def beginnings(llm: LLM, stories: int) -> list[list[int]]:
    """The first sentences of stories that no training has seen."""
    seeds = range(world.HELD_OUT_SEEDS.start, world.HELD_OUT_SEEDS.start + stories)
    return [llm.tokenizer.encode(world.story(seed).text)[:24] for seed in seeds]


def passes(args: argparse.Namespace) -> None:
    """Passes of the target for each token, one request at a time."""
    print(f"{'drafts':8} {'temperature':>11} {'target passes/token':>20} {'drafted':>8} {'accepted':>14} "
          f"{'draft passes':>13}  same")
    plain = {}
    for draft in (None, "ngram", "default"):
        llm = LLM(draft=draft, dtype="float32", kv_memory=1 << 26)
        if draft == "default":
            llm.draft_cost = 0.4  # about what a CPU measures, but the same everywhere
        for temperature in (0, 0.8, 1.0):
            before, outputs = llm.stats(), []
            for i, prompt in enumerate(beginnings(llm, args.stories)):
                p = SamplingParams(temperature=temperature, seed=i, max_tokens=args.tokens)
                outputs += llm.generate([prompt], p)
            new = {name: count - before[name] for name, count in llm.stats().items()}
            same = plain.setdefault(temperature, outputs) == outputs
            share = f"{new['accepted']} ({new['accepted'] / max(1, new['drafted']):.0%})"
            print(f"{draft or 'none':8} {temperature:11} {new['forward_passes'] / new['output_tokens']:20.3f} "
                  f"{new['drafted']:8} {share:>14} {new['draft_passes']:13}  {'yes' if same else 'NO'}")


def probabilities(model: GPT, tokens: list[int], temperature: float) -> torch.Tensor:
    """What the model would draw each next token from, [len(tokens), V] float64."""
    c, n = model.config, len(tokens)
    cache, at = KVCache(c.num_layers, 2, n, c.num_kv_heads, c.head_dim, model.dtype, "cpu"), torch.arange(n)
    one = [torch.tensor(x, dtype=torch.int32) for x in ([[1]], [n], [0, n])]
    return (model.forward(Batch(torch.tensor(tokens), at, n + at, *one, at), cache).double() / temperature).softmax(-1)


def acceptance(args: argparse.Namespace) -> None:
    """The probability that a draft of the draft model is accepted, by how it is drawn, over text of the target."""
    llm = LLM(draft="default", dtype="float32", kv_memory=1 << 26)
    prompts = beginnings(llm, args.stories)
    for temperature in (0.5, 0.8, 1.0, 1.3):
        sums, count = torch.zeros(3, dtype=torch.float64), 0
        for output in llm.generate(prompts, SamplingParams(temperature=temperature, seed=1, max_tokens=args.tokens)):
            tokens, start = output.prompt_token_ids + output.token_ids, len(output.prompt_token_ids) - 1
            p, q = (probabilities(m, tokens, temperature)[start:-1] for m in (llm.model, llm.drafter.model))
            high_p, high_q = p.cumsum(-1), q.cumsum(-1)
            # At the same noise both take token i where their intervals for it overlap.
            overlap = (torch.minimum(high_p, high_q) - torch.maximum(high_p - p, high_q - q)).clamp(min=0)
            sums += torch.stack([p.gather(1, q.argmax(-1)[:, None]).sum(), overlap.sum(), torch.minimum(p, q).sum()])
            count += len(p)
        best, same, bound = (sums / count).tolist()
        print(f"temperature {temperature}: its likeliest token {best:.3f}, drawn with the target's noise {same:.3f}, "
              f"bound of speculative sampling {bound:.3f}")


class Synthetic(DraftModel):
    """A draft model that does its work, and is right as often as told."""

    def __init__(self, inner: DraftModel, truth: list[int], rate: float, seed: int):
        super().__init__(inner.model, inner.cache, inner.graphs)
        self.truth, self.rate, self.rng = truth, rate, random.Random(seed)

    def propose(self, llm, plan):
        super().propose(llm, plan)
        for request, _ in plan:
            ahead = self.truth[request.num_output :][: len(request.drafts)]
            vocab = self.model.config.vocab_size
            request.drafts = [t if self.rng.random() < self.rate else (t + 1) % vocab for t in ahead]


def measure_time(args: argparse.Namespace) -> None:
    """Seconds for one greedy request, plain and with drafts in turn; the ratio of the medians."""
    device = nanoserve.pick_device(args.device)
    dtype = nanoserve.pick_dtype(args.dtype, device, "bfloat16")
    target, draft = (GPT(ModelConfig.from_dict(shape), dtype, device, 1024).randomize(seed)
                     for seed, shape in enumerate((SHAPES[args.shape], DRAFT_SHAPES[args.shape])))
    print(f"{args.shape}: {target.num_parameters / 1e6:.0f}M parameters, draft {draft.num_parameters / 1e6:.1f}M, {dtype}")
    options = {"kv_memory": 1 << 28, "max_batch_requests": 1, "max_batch_tokens": 256}
    plain, fast = LLM(target, **options), LLM(target, draft=draft, num_drafts=args.num_drafts, **options)
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    prompt = [random.Random(0).randrange(target.config.vocab_size) for _ in range(32)]
    [output] = plain.generate([prompt], params)
    seconds = {plain: [], fast: []}
    for run in range(args.runs + 1):  # the first warms up
        fast.drafter = Synthetic(fast.drafter, output.token_ids, args.acceptance, run)
        for llm, times in seconds.items():
            llm.pool.forget()
            start, before = time.perf_counter(), llm.stats()
            [again] = llm.generate([prompt], params)
            times.append(time.perf_counter() - start)
            # Two batch shapes round differently, and with random weights two logits can be that close.
            if again.token_ids != output.token_ids and run == 0:
                print("(rounding made the two differ)")
        new = {name: count - before[name] for name, count in llm.stats().items() if name != "draft_passes"}
        print(f"  plain {seconds[plain][-1]:.2f} s, with drafts {seconds[fast][-1]:.2f} s; {new['accepted']} of "
              f"{new['drafted']} accepted, {new['forward_passes'] / new['output_tokens']:.3f} passes a token", flush=True)
    a, b = (statistics.median(times[1:]) for times in seconds.values())
    print(f"{args.tokens / a:.1f} tokens/s plain, {args.tokens / b:.1f} with drafts: {b / a:.2f} of the time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["passes", "acceptance", "time"])
    parser.add_argument("--stories", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--shape", default="gpt2", choices=DRAFT_SHAPES)
    parser.add_argument("--acceptance", type=float, default=0.7)
    parser.add_argument("--num-drafts", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    {"passes": passes, "acceptance": acceptance, "time": measure_time}[args.what](args)
