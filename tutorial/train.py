"""Trains the tutorial's two models from nothing, on text that world.py makes up.

    python tutorial/train.py tokenizer             # tutorial/model/tokenizer.json
    python tutorial/train.py main                  # tutorial/model/model.safetensors, 3.1 M parameters
    python tutorial/train.py draft                 # tutorial/draft/, a tenth of it, distilled from the main model
    python tutorial/train.py eval                  # perplexity, answers, agreement

Each process computes its share of a step's rows: `torchrun --nproc-per-node 2 tutorial/train.py main` is the faster way
on a few cores, because single-threaded processes meet once per step instead of at every operation. `--compile` saves
another fifth where there is a C++ compiler. About two hours on two cores for both models.
Checkpoints go to work/ (--resume continues from there, --steps and --lr then may differ). The files written are an
ordinary Hugging Face Llama checkpoint: any engine that reads Llama reads them.

Three things make a model this small learn to look facts up, rather than only to sound like a story. The loss is that
of the next token everywhere *plus* three times the mean loss over the answers alone, which are few tokens and would
drown otherwise. Rows start short, so that question and fact lie close together while the model finds out that copying
pays. And at first a third of the rows ask it to repeat random words, which cannot be guessed, only copied.
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import world
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm

HERE = Path(__file__).parent
WORK = HERE.parent / "work"
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]  # token ids 0 to 5
PAD, BOS, END = 0, 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 2048
SHAPES = {
    "model": dict(hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=64),
    "draft": dict(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3,
                  num_key_value_heads=1, head_dim=32),
}  # fmt: skip


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def train_tokenizer(vocab_size=1536):
    """Byte-level BPE: any text round-trips, the world's words are single tokens, digits stay single."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    lines = (m["content"] for seed in range(6000) for m in world.dialogue(seed, 300, 12))
    tok.train_from_iterator(lines, trainer)
    tok.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    for name in SHAPES:
        (HERE / name).mkdir(exist_ok=True)
        tok.save(str(HERE / name / "tokenizer.json"))
        write_json(HERE / name / "tokenizer_config.json", dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>",
            model_max_length=CONTEXT, clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE))  # fmt: skip
    return tok


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


# ---- model -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, d = c, c["head_dim"]
        self.q_proj = nn.Linear(c["hidden_size"], c["num_attention_heads"] * d, bias=False)
        self.k_proj = nn.Linear(c["hidden_size"], c["num_key_value_heads"] * d, bias=False)
        self.v_proj = nn.Linear(c["hidden_size"], c["num_key_value_heads"] * d, bias=False)
        self.o_proj = nn.Linear(c["num_attention_heads"] * d, c["hidden_size"], bias=False)

    def forward(self, x, cos, sin):  # x [B, T, hidden], cos and sin [T, head_dim]
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.c["head_dim"]).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1))


def rotate(x, cos, sin):
    """Rotary positions, the Llama way: dimension i turns together with dimension i + head_dim / 2."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], eps=1e-5)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], eps=1e-5)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Llama for training: no cache, whole rows. Attribute names are those of the checkpoint (without "model.")."""

    def __init__(self, c, vocab_size):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(vocab_size, c["hidden_size"])
        self.layers = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.RMSNorm(c["hidden_size"], eps=1e-5)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # the two projections that write to the residual stream start smaller
                scale = (2 * len(self.layers)) ** -0.5 if "o_proj" in name or "down_proj" in name else 1.0
                nn.init.normal_(p, std=0.02 if "embed" in name else scale * p.shape[1] ** -0.5)
        angle = torch.arange(CONTEXT)[:, None] / 10000 ** (torch.arange(0, c["head_dim"], 2) / c["head_dim"])
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)

    def forward(self, tokens):  # [B, T] -> logits [B, T, vocab]
        x, T = self.embed_tokens(tokens), tokens.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])
        return F.linear(self.norm(x), self.embed_tokens.weight)


def save(model, name):
    """Writes `model` as a Hugging Face Llama checkpoint in bf16 to tutorial/`name`."""
    path, vocab = HERE / name, model.embed_tokens.num_embeddings
    tensors = {f"model.{k}": v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items()}
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
    write_json(path / "config.json", dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=vocab, **model.c, hidden_act="silu",
        max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
        attention_bias=False, attention_dropout=0.0, mlp_bias=False, initializer_range=0.02, pretraining_tp=1,
        tie_word_embeddings=True, use_cache=True, torch_dtype="bfloat16",
        bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD))  # fmt: skip
    write_json(path / "generation_config.json", dict(bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD))


def load(name, device="cpu"):
    """The saved checkpoint (so with weights rounded to bf16) as a training model in fp32."""
    tensors = {k.removeprefix("model."): v.float() for k, v in load_file(HERE / name / "model.safetensors").items()}
    model = Llama(SHAPES[name], tensors["embed_tokens.weight"].shape[0])
    model.load_state_dict(tensors)
    return model.to(device).eval()


# ---- data ------------------------------------------------------------------------------------------------------------


def encode_chat(tok, messages):
    """Chat messages as (tokens, marks): marks are 1 on the tokens of short answers and the <|end|> after them."""
    tokens, marks = [BOS], [0]
    for m in messages:
        ids = tok.encode(m["content"], add_special_tokens=False).ids + [END]
        is_answer = m["role"] == "assistant" and len(ids) < 32
        tokens += [tok.token_to_id(f"<|{m['role']}|>"), *ids]
        marks += [0] + [int(is_answer)] * len(ids)
    return tokens, marks


def document(tok, seed, room, echoes):
    """Tokens and answer marks of the document of `seed`, about `room` tokens long. `echoes`: share of copying tasks."""
    rng = random.Random(f"document {seed}")
    if rng.random() < echoes:
        return encode_chat(tok, world.echo(seed, room - 8))
    if room <= 512 and rng.random() < 0.2:  # a plain story, of a page at most
        ids = tok.encode(world.story(seed, rng.randint(min(room, 160), min(room, world.PAGE)) - 8).text).ids + [END]
        return ids, [0] * len(ids)
    pair = room >= 512 and rng.random() < (0.9 if room > 1024 else 0.15)
    length = int(room * (rng.uniform(0.25, 0.4) if pair else rng.uniform(0.45, 0.8)))
    return encode_chat(tok, world.dialogue(seed, length, questions=(12 if pair else 60), budget=room - 8,
                                           stories=1 + pair))  # fmt: skip


def row_length(rng, progress):
    """Tokens per row. Short rows first, then longer ones up to the full context, so that every position is trained."""
    if progress < 0.15:
        return 128
    if progress < 0.3:
        return rng.choice((128, 256))
    if progress < 0.45:
        return rng.choice((256, 512))
    return rng.choice((256, 512, 512, 1024, 1024, 1024, 1024, 2048))


def batch(tok, step, progress, tokens, seed, device, rank=0, ranks=1):
    """Training batch number `step`: tokens, targets and answer marks, each [rows, row length], one document per row.

    `tokens` are those of the whole step; this process (`rank` of `ranks`) gets every `ranks`-th row. One document per
    row needs no attention mask between documents; conversations have as many questions as fill their row.
    """
    length = row_length(random.Random(f"{seed} length {step}"), progress)
    rows, echoes = range(rank, tokens // length, ranks), max(0.03, 0.3 - progress)
    x = torch.full((len(rows), length + 1), PAD)
    marks = torch.zeros(len(rows), length + 1)
    for i, row in enumerate(rows):
        # Each row has its own seed: a step never takes more than 256 of them, a run fewer than a million steps.
        ids, m = document(tok, (seed * 1_000_000 + step) * 256 % len(world.TRAIN_SEEDS) + row, length, echoes)
        ids, m = ids[: length + 1], m[: length + 1]
        x[i, : len(ids)] = torch.tensor(ids)
        marks[i, : len(m)] = torch.tensor(m)
    return x[:, :-1].to(device), x[:, 1:].contiguous().to(device), marks[:, 1:].contiguous().to(device)


# ---- optimizer -------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix-shaped step is made orthogonal: all directions move equally far (Jordan et al., 2024)."""

    def __init__(self, params, lr=0.02, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for (rows, cols), params in shapes.items():  # same shapes together: fewer, larger products
                for p in params:
                    buf = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buf.lerp_(p.grad, 1 - group["momentum"])
                g = torch.stack([p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params])
                scale = group["lr"] * max(1, rows / cols) ** 0.5
                for p, update in zip(params, orthogonal(g), strict=True):
                    p.sub_(update.to(p.dtype), alpha=scale)


def orthogonal(g, steps=5):
    """The orthogonal matrix nearest to each of g [n, rows, cols], roughly, by a quintic Newton-Schulz iteration."""
    x = g.bfloat16()
    x = x.mT if g.shape[1] > g.shape[2] else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if g.shape[1] > g.shape[2] else x


# ---- training --------------------------------------------------------------------------------------------------------


def losses(logits, targets, marks):
    """(next-token loss over all tokens, loss over answer tokens alone, share of right answer tokens)."""
    ce = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
    real = (targets != PAD).float()
    answers = marks.sum().clamp(min=1)
    right = (logits[marks > 0].argmax(-1) == targets[marks > 0]).sum() / answers
    return (ce * real).sum() / real.sum(), (ce * marks).sum() / answers, right


def average_gradients(parameters):
    """Over all processes, so that each makes the same step."""
    grads = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, mean in zip(grads, (flat / dist.get_world_size()).split([g.numel() for g in grads]), strict=True):
        g.copy_(mean.view_as(g))


def train(name, args):
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    tok = Tokenizer.from_file(str(HERE / name / "tokenizer.json"))
    model = Llama(SHAPES[name], tok.get_vocab_size()).to(args.device)
    teacher = load("model", args.device) if name == "draft" else None
    matrices = [p for n, p in model.layers.named_parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    if args.compile:  # a block at a time: the four share their compiled code
        for layer in model.layers:
            layer.compile(dynamic=False)
    optimizers = [Muon(matrices, lr=args.lr),
                  torch.optim.AdamW(others, lr=args.lr / 5, betas=(0.9, 0.95), weight_decay=0.0)]  # fmt: skip
    start, checkpoint = 0, WORK / f"{name}.pt"
    WORK.mkdir(exist_ok=True)
    if args.resume:
        if not checkpoint.exists():
            raise SystemExit(f"--resume: there is no {checkpoint}")
        state = torch.load(checkpoint, map_location=args.device)
        start = state["step"]
        model.load_state_dict(state["model"])
        for opt, s in zip(optimizers, state["optimizers"], strict=True):
            opt.load_state_dict(s)

    params = sum(p.numel() for p in model.parameters())
    total = args.steps * args.tokens
    attention = 12 * model.c["num_hidden_layers"] * model.c["num_attention_heads"] * model.c["head_dim"] * 400
    if rank == 0:
        print(f"{name}: {params:,} parameters, {args.steps:,} steps of {args.tokens:,} tokens = {total / 1e6:.0f} M "
              f"tokens, about {total * (6 * params + attention) / 1e15:.1f} PFLOP", flush=True)  # fmt: skip
    began, smooth = time.time(), None
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, mininterval=5, disable=rank > 0)
    for step in bar:
        progress = step / args.steps
        rate = min(1, (step + 1) / 100) * min(1, (1 - progress) / 0.6)  # warm up, hold, then fall linearly to zero
        x, y, marks = batch(tok, step, progress, args.tokens, args.seed, args.device, rank, ranks)
        with torch.autocast(args.device, torch.bfloat16):
            logits = model(x)
            lm, answer, right = losses(logits, y, marks)
            loss = lm + 3 * answer
            if teacher is not None:  # the draft learns to guess what the main model would say
                with torch.no_grad():
                    target = teacher(x).float().softmax(-1)
                kl = -(target * logits.float().log_softmax(-1)).sum(-1)[y != PAD].mean()
                loss = 0.2 * lm + kl
        loss.backward()
        if ranks > 1:
            average_gradients(list(model.parameters()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, lr in zip(optimizers, (args.lr, args.lr / 5), strict=True):
            for group in opt.param_groups:
                group["lr"] = lr * rate
                if isinstance(opt, Muon):
                    group["momentum"] = min(0.95, 0.85 + 0.1 * step / 300)
            opt.step()
            opt.zero_grad(set_to_none=True)
        now = (lm.item(), answer.item(), right.item())
        smooth = now if smooth is None else [0.95 * s + 0.05 * n for s, n in zip(smooth, now, strict=True)]
        bar.set_postfix_str(f"loss {smooth[0]:.3f} answers {smooth[1]:.3f} right {smooth[2]:.3f}", refresh=False)
        if step == start + 10:
            clock = time.time()
        if step == start + 40 and rank == 0:
            speed = 30 * args.tokens / (time.time() - clock)
            tqdm.write(f"{speed:,.0f} tokens/s: {(args.steps - step) * args.tokens / speed / 60:.0f} minutes to go")
        if rank == 0 and ((step + 1) % args.every == 0 or step + 1 == args.steps):
            state = dict(step=step + 1, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers])
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)  # in one move: an interruption loses nothing
            if step + 1 == args.steps:  # only a finished run replaces the model that others use
                save(model, name)
            near, far = (accuracy(model, tok, 12, d)["all"][0] for d in (world.NEAR, world.FAR))
            tqdm.write(f"step {step + 1}: {(time.time() - began) / 60:.1f} min, loss {smooth[0]:.3f} answers "
                       f"{smooth[1]:.3f} right {smooth[2]:.3f}, held out: perplexity {perplexity(model, tok):.3f}, "
                       f"near {near:.3f}, far {far:.3f}")  # fmt: skip


# ---- evaluation, without an engine -----------------------------------------------------------------------------------


@torch.no_grad()
def predict(model, ids):
    """Logits [T, vocab] of one sequence."""
    device = model.cos.device
    with torch.autocast(device.type, torch.bfloat16):
        return model(torch.tensor([ids], device=device))[0].float().cpu()


def perplexity(model, tok, stories=20):
    """Per token, of held-out stories."""
    total = count = 0
    for i in range(stories):
        ids = tok.encode(world.story(world.HELD_OUT_SEEDS.start + 500_000 + i).text).ids
        total += F.cross_entropy(predict(model, ids)[:-1], torch.tensor(ids[1:]), reduction="sum").item()
        count += len(ids) - 1
    return math.exp(total / count)


def accuracy(model, tok, stories, distance):
    """{kind: (share right, count)}. An answer is right iff each of its tokens is the likeliest (greedy decoding)."""
    results = {}
    for messages, answer, kind in world.exam(stories, 5, distance):
        ids, _ = encode_chat(tok, [*messages, {"role": "assistant", "content": answer}])
        n = len(tok.encode(answer, add_special_tokens=False).ids) + 1
        right = predict(model, ids)[-n - 1 : -1].argmax(-1).tolist() == ids[-n:]
        for key in ("all", kind):
            results.setdefault(key, []).append(right)
    return {k: (sum(v) / len(v), len(v)) for k, v in sorted(results.items())}


def greedy(model, ids, limit=250):
    """`ids` continued by the most likely tokens. Without a cache, so every token costs a pass over all before it."""
    start = len(ids)
    while len(ids) < start + limit and ids[-1] != END:
        ids = [*ids, predict(model, ids)[-1].argmax().item()]
    return ids


def agreement(main, draft, tok, stories=12):
    """Share of the main model's own greedy tokens that the draft would have guessed: (in stories, in answers)."""
    same, count = [0, 0], [0, 0]
    exam = world.exam(stories, 5, world.NEAR, world.HELD_OUT_SEEDS.start + 700_000)
    for i, messages in enumerate([m[:1] for m, _, _ in exam[::5]] + [m for m, _, _ in exam]):
        prompt = encode_chat(tok, messages)[0] + [tok.token_to_id("<|assistant|>")]
        ids, kind = greedy(main, prompt), int(i >= len(exam[::5]))
        guesses = predict(draft, ids)[len(prompt) - 1 : -1].argmax(-1).tolist()
        same[kind] += sum(a == b for a, b in zip(guesses, ids[len(prompt) :], strict=True))
        count[kind] += len(guesses)
    return same[0] / count[0], same[1] / count[1]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["tokenizer", "main", "draft", "eval"])
    p.add_argument("--steps", type=int, default=6000)
    p.add_argument("--tokens", type=int, default=8192, help="per step")
    p.add_argument("--lr", type=float, default=0.007, help="of Muon; AdamW for embeddings and norms takes a fifth")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    p.add_argument("--device", default="cpu")
    p.add_argument("--compile", action="store_true", help="with torch.compile: a fifth faster, needs a C++ compiler")
    p.add_argument("--resume", action="store_true")
    args = p.parse_args()
    if args.what == "tokenizer":
        print(f"{train_tokenizer().get_vocab_size()} tokens")
    elif args.what == "eval":
        tok = Tokenizer.from_file(str(HERE / "model/tokenizer.json"))
        both = {name: load(name, args.device) for name in SHAPES if (HERE / name / "model.safetensors").exists()}
        for name, model in both.items():
            print(name, "perplexity", round(perplexity(model, tok, 50), 3))
            for label, distance in (("near", world.NEAR), ("far", world.FAR)):
                print(f"  {label}:", {k: (round(a, 3), n) for k, (a, n) in accuracy(model, tok, 60, distance).items()})
        if len(both) == 2:
            print("draft agrees on {:.3f} of story and {:.3f} of answer tokens".format(*agreement(*both.values(), tok)))
    else:
        train("model" if args.what == "main" else "draft", args)


if __name__ == "__main__":
    main()
