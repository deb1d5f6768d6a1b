"""nanoserve: the smallest code that serves a language model the way the big servers do.

    from nanoserve import LLM, SamplingParams
    llm = LLM()                                   # the small model in tutorial/, or LLM("folder or hub name")
    llm.generate(["Once upon a time"], SamplingParams(max_tokens=64, seed=1))[0].text

This file is the engine, in reading order: what a model is (`ModelConfig`, `GPT`), where its weights come from (`load`),
text in and out (`Tokenizer`, `Detokenizer`), what may be asked (`SamplingParams`), and the step that everything else is
there for (`LLM.step`):

    text ──Tokenizer──► Request ──► Scheduler.schedule() ──► [(request, n), ...]
                                        ▲                        │ pack: one flat, ragged batch
     text ◄─Detokenizer─ commit(tokens)─┤                        ▼
                              ▲         │                     Batch(tokens, positions, slots,
                              └── sample(logits) ◄── GPT ◄──        block_tables, context_lens, query_start, rows)

After it come the HTTP server (`serve`), measuring (`bench`) and the command line. The maths is in kernels.py, the memory in
cache.py, the queue in scheduler.py.

Survey A II, IV.A · B 2.1, 2.3, 3.2 · C Background.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import base64
import bisect
import codecs
import concurrent.futures
import contextlib
import copy
import ctypes
import difflib
import functools
import gc
import hashlib
import hmac
import inspect
import json
import logging
import math
import os
import platform
import queue
import random
import re
import secrets
import signal
import statistics
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from email.utils import formatdate
from http import HTTPStatus
from itertools import accumulate, chain, islice, product, zip_longest
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import torch

import kernels
from cache import SCRATCH, BlockPool, KVCache
from scheduler import FINISHED, POLICIES, RUNNING, Policy, Request, Scheduler, is_number

try:
    import resource
except ImportError:  # on Windows
    resource = None

# On a CPU, oneDNN and torch's layer over it compile a matrix product for every number of rows they meet, and each keeps the
# last 1,024 of them: hundreds of MB, by which a server grows for hours. Steps are as fast with 64.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
os.environ.setdefault("LRU_CACHE_CAPACITY", "64")

log = logging.getLogger("nanoserve")
DEFAULT_MODEL = Path(__file__).parent / "tutorial" / "model"
DEFAULT_DRAFT = Path(__file__).parent / "tutorial" / "draft"
LOW_BITS = {"int8": 8, "int4": 4}  # for weights; int8 has one scale per output row, int4 one per 32 weights of it
KV_DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "int8": torch.int8}  # None: the model's dtype
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class ModelConfig:
    """What a decoder-only transformer of the supported families can differ in. Read from a Hugging Face config.json."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_len: int  # tokens of context
    norm_eps: float
    rope: dict | None  # None: learned positions
    windows: list[int]  # per layer, tokens that attention looks back on; 0: all
    tie_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""  # "head": q and k normalised per head; "full": over all heads at once
    clip_qkv: float | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    norm_topk_prob: bool = False
    moe_layers: frozenset = frozenset()
    dtype: str = "float32"  # as stored
    eos_ids: tuple = ()

    # Not fields: the `model_type`s that are supported, and of which kind the values in config.json must be, see `_check`.
    FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmoe")
    COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
              "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "num_experts", "num_local_experts",
              "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
    COUNTS_OR_NULL = ("num_key_value_heads", "head_dim", "n_inner", "sliding_window")
    NUMBERS = ("rms_norm_eps", "layer_norm_epsilon", "max_window_layers")
    NUMBERS_OR_NULL = ("clip_qkv", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                       "attention_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings")
    LISTS, OBJECTS = ("layer_types", "mlp_only_layers"), ("rope_scaling", "rope_parameters")

    @classmethod
    def from_dict(cls, c: dict) -> ModelConfig:
        """From the dictionary in config.json. ValueError names whatever is missing, unknown or not supported."""
        family, architecture = c.get("model_type"), (c.get("architectures") or [""])[0]
        if family not in cls.FAMILIES or (architecture and not architecture.endswith(("ForCausalLM", "LMHeadModel"))):
            raise ValueError(f"model: {architecture or family or 'config.json without model_type'} is not supported; "
                             f"causal language models of these types are: {', '.join(cls.FAMILIES)}")
        if c.get("quantization_config"):
            raise ValueError("model: checkpoints with a quantization_config are not supported")
        cls._check(c)
        try:
            config = cls._gpt2(c) if family == "gpt2" else cls._llama_like(c)
        except KeyError as error:
            raise ValueError(f"config.json: {error.args[0]} is missing") from None
        config.dtype = str(c.get("dtype") or c.get("torch_dtype") or "float32").removeprefix("torch.")
        config.eos_ids = as_ids(c.get("eos_token_id"))
        if config.num_heads % config.num_kv_heads:
            raise ValueError(f"config.json: {config.num_heads} query heads cannot share {config.num_kv_heads} key heads")
        return config

    @classmethod
    def _check(cls, c):
        """ValueError for a value of the wrong kind, here or in an object within."""
        for name, value in c.items():
            for what, names, or_null, fits in (
                    ("a positive integer", cls.COUNTS, cls.COUNTS_OR_NULL, is_number(value, 1, kind=int)),
                    ("a number from 0 on", cls.NUMBERS, cls.NUMBERS_OR_NULL, is_number(value, 0)),
                    ("a list", (), cls.LISTS, isinstance(value, list)),
                    ("an object", (), cls.OBJECTS, isinstance(value, dict))):
                if not fits and (name in names or name in or_null and value is not None):
                    raise ValueError(f"config.json: {name} must be {what}, got {value!r}")
            if name in cls.OBJECTS:
                cls._check(value or {})

    @classmethod
    def _gpt2(cls, c):
        require(c, "activation_function", "gelu_new", "gelu_pytorch_tanh")
        require(c, "scale_attn_weights", True)
        require(c, "scale_attn_by_inverse_layer_idx", False)
        width, layers, heads = c["n_embd"], c["n_layer"], c["n_head"]
        return cls("gpt2", c["vocab_size"], width, layers, heads, heads, width // heads, c.get("n_inner") or 4 * width,
                   c["n_positions"], c.get("layer_norm_epsilon", 1e-5), None, [0] * layers,
                   c.get("tie_word_embeddings", True), qkv_bias=True, o_bias=True, mlp_bias=True)

    @classmethod
    def _llama_like(cls, c):
        family, layers, heads = c["model_type"], c["num_hidden_layers"], c["num_attention_heads"]
        require(c, "hidden_act", "silu")
        attention_bias = bool(c.get("attention_bias", False))
        config = cls(
            family, c["vocab_size"], c["hidden_size"], layers, heads, c.get("num_key_value_heads") or heads,
            c.get("head_dim") or c["hidden_size"] // heads, c["intermediate_size"], c["max_position_embeddings"],
            c.get("rms_norm_eps", 1e-6), cls._rope(c), cls._windows(c), c.get("tie_word_embeddings", False),
            qkv_bias=attention_bias or family == "qwen2", o_bias=attention_bias and family != "qwen2",
            mlp_bias=family == "llama" and bool(c.get("mlp_bias", False)),
            qk_norm={"qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}.get(family, ""),
            clip_qkv=c.get("clip_qkv") if family == "olmoe" else None)
        if family in ("mixtral", "qwen3_moe", "olmoe"):
            config.num_experts = c["num_local_experts"] if family == "mixtral" else c["num_experts"]
            config.experts_per_token = c["num_experts_per_tok"]
            config.expert_size = c["moe_intermediate_size"] if family == "qwen3_moe" else c["intermediate_size"]
            config.norm_topk_prob = family == "mixtral" or bool(c.get("norm_topk_prob", False))
            dense, every = c.get("mlp_only_layers") or [], c.get("decoder_sparse_step", 1)
            config.moe_layers = frozenset(i for i in range(layers) if i not in dense and (i + 1) % every == 0)
        return config

    @staticmethod
    def _rope(c) -> dict:
        """Old configs say rope_theta and rope_scaling, new ones rope_parameters; one dictionary for both."""
        rope = dict(c.get("rope_scaling") or c.get("rope_parameters") or {})
        if rope and "rope_type" not in rope and "type" not in rope and set(rope) != {"rope_theta"}:
            raise ValueError(f"config.json: rope_scaling names no rope_type: {rope}")
        kind = rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        rope.setdefault("rope_theta", c.get("rope_theta") or (1e6 if c["model_type"] == "mixtral" else 10000.0))
        if rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
        needed = {"default": (), "linear": ("factor",), "yarn": (),
                  "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        if kind not in needed:
            raise ValueError(f"rope_type: {kind!r} is not supported ({', '.join(needed)} are)")
        for name in needed[kind]:
            if rope.get(name) is None:
                raise ValueError(f"config.json: rope_type {kind} needs {name}")
        if kind in ("llama3", "yarn"):
            longest = c["max_position_embeddings"]
            original = c.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or longest
            rope["original_max_position_embeddings"] = original
            rope["factor"] = rope.get("factor") or longest / original
        return rope

    @staticmethod
    def _windows(c) -> list[int]:
        """Per layer the sliding window, 0 where a layer sees everything."""
        family, layers = c["model_type"], c["num_hidden_layers"]
        slides = family in ("mistral", "mixtral") or family.startswith("qwen") and c.get("use_sliding_window", False)
        default = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096}.get(family)
        window = (c.get("sliding_window", default) or 0) if slides else 0
        if family in ("qwen2", "qwen3"):
            first = c.get("max_window_layers", 28)
            kinds = c.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
            if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
                raise ValueError(f"config.json: layer_types: {', '.join(sorted(map(str, unknown)))} is not supported")
            if len(kinds) != layers:
                raise ValueError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers")
            return [window if kind == "sliding_attention" else 0 for kind in kinds]
        return [window] * layers


def require(config: dict, name: str, *allowed) -> None:
    """ValueError unless config.json has one of the allowed values, or none: the first of them is the default."""
    if (value := config.get(name, allowed[0])) not in allowed:
        raise ValueError(f"config.json: {name}={value!r} is not supported ({', '.join(map(repr, allowed))} is)")


def as_ids(value) -> tuple:
    """Token ids as a tuple, from the None, one id or list of a config file's eos_token_id."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(token) is int for token in ids):
        raise ValueError(f"eos_token_id: must be a token id or a list of them, got {value!r}")
    return ids


@dataclass
class Batch:
    """One step's work: the new tokens of all requests end to end, and where their context lies. See kernels.py."""

    tokens: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, each token's place in its request
    slots: torch.Tensor  # [T] int64, where its K and V go: block * block_size + offset
    block_tables: torch.Tensor  # [B, M] int32, padded with the scratch block
    context_lens: torch.Tensor  # [B] int32
    query_start: torch.Tensor  # [B+1] int32
    rows: torch.Tensor  # [S] int64, the rows of the batch whose logits are wanted
    wants_all: bool = False  # `rows` are all T, in order
    repeated_keys: int = 0  # how many more are read where each token reads its own, and not a request's tokens together
    settings: torch.Tensor | None = None  # [5, those of the rows that are sampled]: what `kernels.sample` takes of each


@dataclass
class Layer:
    """The weights of one transformer block; biases and norms that a family lacks are None. [out, in], fused."""

    attn_norm: torch.Tensor | None = None
    attn_norm_bias: torch.Tensor | None = None
    qkv: torch.Tensor | None = None  # [(Hq + 2 Hkv) * D, hidden]
    qkv_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    o: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    mlp_norm: torch.Tensor | None = None
    mlp_norm_bias: torch.Tensor | None = None
    gate_up: object = None  # [2 * mlp, hidden], GPT-2: [mlp, hidden]; with experts a stack or list of E
    gate_up_bias: torch.Tensor | None = None
    down: object = None
    down_bias: torch.Tensor | None = None
    router: torch.Tensor | None = None  # [E, hidden]


class GPT:
    """A decoder-only transformer over the paged cache. Weights are plain attributes, filled by `load` or `randomize`.

    Survey A II.A · B 2.1, 3.1.2 · C Background. (arXiv:1706.03762)
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, max_len: int | None = None,
                 quantize: str | None = None):
        if quantize not in (None, *LOW_BITS):
            raise ValueError(f"quantize: must be {' or '.join(LOW_BITS)}, got {quantize!r}")
        self.config, self.dtype, self.quantize = config, dtype, quantize
        # With its number: "cuda" alone is whichever device is current in a thread, and does not compare equal to "cuda:0".
        self.device = torch.empty(0, device=device).device
        self.max_len = max_len or config.max_len
        self.layers = [Layer() for _ in range(config.num_layers)]
        self.embed = self.position_embed = self.final_norm = self.final_norm_bias = self.head = None
        self.rope = kernels.rope_table(config.rope, config.head_dim, self.max_len, device) if config.rope else None

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Write the batch's keys and values into the cache; return the logits of `batch.rows`, [S, V]."""
        c, scale = self.config, self.config.head_dim**-0.5
        x, delta = self.embed[batch.tokens], None  # delta: the output of the last sublayer, yet to be added to x
        if self.position_embed is not None:
            x = x + self.position_embed[batch.positions]
        for layer, window, (k_cache, v_cache, scales) in zip(self.layers, c.windows, cache.layers):
            h, x = kernels.add_norm(x, delta, layer.attn_norm, layer.attn_norm_bias, c.norm_eps)
            qkv = kernels.linear(h, layer.qkv, layer.qkv_bias)
            q_norm, k_norm = layer.q_norm, layer.k_norm
            if c.qk_norm == "full":
                qkv, q_norm, k_norm = self._normalize_and_clip(qkv, q_norm, k_norm), None, None
            # Write K and V, then attend: a token sees itself through the cache like any other.
            q = kernels.rope_and_write_kv(qkv, c.num_heads, batch.positions, batch.slots, self.rope, q_norm, k_norm,
                                          c.norm_eps, k_cache, v_cache, scales)
            if layer is self.layers[-1] and not len(batch.rows):  # the middle of a prompt: its keys and values are all
                return x.new_empty(0, c.vocab_size)
            attended = kernels.paged_attention(q, k_cache, v_cache, batch.block_tables, batch.context_lens,
                                               batch.query_start, scale, window, scales).flatten(1)
            if layer is self.layers[-1]:  # from here on only the rows whose logits are wanted
                attended, x = attended[batch.rows], x[batch.rows]
            delta = kernels.linear(attended, layer.o, layer.o_bias)
            h, x = kernels.add_norm(x, delta, layer.mlp_norm, layer.mlp_norm_bias, c.norm_eps)
            delta = self._mlp(h, layer)
        h, _ = kernels.add_norm(x, delta, self.final_norm, self.final_norm_bias, c.norm_eps)
        return kernels.linear(h, self.head)[:, : c.vocab_size]

    def _mlp(self, h, layer):
        c = self.config
        if layer.router is not None:
            probs = kernels.linear(h, layer.router).float().softmax(-1)
            weights, experts = probs.topk(c.experts_per_token, dim=-1)
            if c.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return kernels.mixture_of_experts(h, experts, weights, layer.gate_up, layer.down)
        if c.family == "gpt2":
            h = kernels.linear(h, layer.gate_up, layer.gate_up_bias, gelu=True)
        else:
            h = kernels.silu_mul(kernels.linear(h, layer.gate_up, layer.gate_up_bias))
        return kernels.linear(h, layer.down, layer.down_bias)

    def _normalize_and_clip(self, qkv, q_norm, k_norm):
        """OLMoE normalises q and k over all heads at once, then clips all three."""
        q, k, v = qkv.split([len(q_norm), len(k_norm), len(k_norm)], dim=-1)
        eps, clip = self.config.norm_eps, self.config.clip_qkv
        qkv = torch.cat([kernels.rms_norm(q, q_norm, eps), kernels.rms_norm(k, k_norm, eps), v], dim=-1)
        return qkv if clip is None else qkv.clamp_(-clip, clip)

    def set(self, place: Place, weight: torch.Tensor) -> None:
        """Install one weight; those of matrix products are quantized or reordered first, as the kernels want them."""
        if place.name in ("qkv", "o", "gate_up", "down", "router", "head"):
            weight = self._prepare(weight, place.name)
        owner = self if place.layer is None else self.layers[place.layer]
        if place.expert is None:
            setattr(owner, place.name, weight)
        else:
            if getattr(owner, place.name) is None:
                x = torch.empty(0, dtype=self.dtype, device=self.device)
                setattr(owner, place.name, kernels.stack_experts(weight, self.config.num_experts, x))
            getattr(owner, place.name)[place.expert] = weight
        if place.name == "embed" and self.config.tie_embeddings:
            self.head = self._prepare(weight, "head")

    def _prepare(self, weight, name):
        if self.quantize and name != "router":  # a router is small, and small differences decide which experts it picks
            weight = kernels.quantize(weight, LOW_BITS[self.quantize])
        return kernels.pack_weight(weight, self.dtype)

    def randomize(self, seed: int = 0, std: float = 0.02) -> GPT:
        """Normal weights, norms of one: for measuring a shape's speed, where values do not matter. Returns itself."""
        generator = torch.Generator(self.device).manual_seed(seed)
        for place in parameters(self.config):
            weight = torch.empty(place.shape, dtype=self.dtype, device=self.device)
            is_norm = place.name.endswith("norm")
            self.set(place, weight.fill_(1) if is_norm else weight.normal_(0, std, generator=generator))
        return self

    @property
    def bytes_per_weight(self) -> float:
        """In matrix products; 4-bit weights with their scales."""
        return {None: self.dtype.itemsize, "int8": 1, "int4": 0.5 + 2 / 32}[self.quantize]

    @property
    def num_parameters(self) -> int:
        """Weights, counting a tied embedding once."""
        return sum(math.prod(place.shape) for place in parameters(self.config))


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where a tensor of a checkpoint goes: rows `row ..` of parameter `name`, whose whole shape is `shape`."""

    layer: int | None
    name: str
    shape: tuple[int, ...]
    row: int
    num_rows: int
    transposed: bool = False  # GPT-2 stores [in, out]
    expert: int | None = None


def layout(c: ModelConfig) -> dict[str, Place]:
    """Every tensor that a checkpoint of this configuration must hold, by its name in the file."""
    places: dict[str, Place] = {}

    def add(layer, name, sources, cols=None, bias=False, **options):
        """Parameter `name` is the weights of the modules `sources` = {module: rows} on top of each other; with `bias`,
        their biases are `name`_bias in the same way.
        """
        for kind, suffix, width in (("weight", "", cols), ("bias", "_bias", None))[: 1 + bias]:
            total, row = sum(sources.values()), 0
            for source, rows in sources.items():
                shape = (total,) if width is None else (total, width)
                places[f"{source}.{kind}"] = Place(layer, name + suffix, shape, row, rows, **options)
                row += rows

    q, kv, hidden = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size
    if c.family == "gpt2":
        add(None, "embed", {"wte": c.vocab_size}, hidden)
        add(None, "position_embed", {"wpe": c.max_len}, hidden)
        add(None, "final_norm", {"ln_f": hidden}, bias=True)
        for i in range(c.num_layers):
            at, options = f"h.{i}", {"bias": True, "transposed": True}
            add(i, "attn_norm", {f"{at}.ln_1": hidden}, bias=True)
            add(i, "mlp_norm", {f"{at}.ln_2": hidden}, bias=True)
            add(i, "qkv", {f"{at}.attn.c_attn": 3 * q}, hidden, **options)
            add(i, "o", {f"{at}.attn.c_proj": hidden}, q, **options)
            add(i, "gate_up", {f"{at}.mlp.c_fc": c.mlp_size}, hidden, **options)
            add(i, "down", {f"{at}.mlp.c_proj": hidden}, c.mlp_size, **options)
    else:
        add(None, "embed", {"model.embed_tokens": c.vocab_size}, hidden)
        add(None, "final_norm", {"model.norm": hidden})
        for i in range(c.num_layers):
            attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            add(i, "attn_norm", {f"model.layers.{i}.input_layernorm": hidden})
            add(i, "mlp_norm", {f"model.layers.{i}.post_attention_layernorm": hidden})
            add(i, "qkv", {f"{attn}.q_proj": q, f"{attn}.k_proj": kv, f"{attn}.v_proj": kv}, hidden, c.qkv_bias)
            add(i, "o", {f"{attn}.o_proj": hidden}, q, c.o_bias)
            if c.qk_norm:
                q_norm, k_norm = (q, kv) if c.qk_norm == "full" else (c.head_dim, c.head_dim)
                add(i, "q_norm", {f"{attn}.q_norm": q_norm})
                add(i, "k_norm", {f"{attn}.k_norm": k_norm})
            gate, up, down = "gate_proj", "up_proj", "down_proj"
            if c.family == "mixtral":
                mlp, gate, up, down = f"model.layers.{i}.block_sparse_moe", "w1", "w3", "w2"
            if i not in c.moe_layers:
                add(i, "gate_up", {f"{mlp}.{gate}": c.mlp_size, f"{mlp}.{up}": c.mlp_size}, hidden, c.mlp_bias)
                add(i, "down", {f"{mlp}.{down}": hidden}, c.mlp_size, c.mlp_bias)
                continue
            add(i, "router", {f"{mlp}.gate": c.num_experts}, hidden)
            for e in range(c.num_experts):
                at, size = f"{mlp}.experts.{e}", c.expert_size
                add(i, "gate_up", {f"{at}.{gate}": size, f"{at}.{up}": size}, hidden, expert=e)
                add(i, "down", {f"{at}.{down}": hidden}, size, expert=e)
    if not c.tie_embeddings:
        add(None, "head", {"lm_head": c.vocab_size}, hidden)
    return places


def parameters(c: ModelConfig) -> list[Place]:
    """One place for each weight of the model, however many tensors of a checkpoint it is put together from."""
    return list({(place.layer, place.name, place.expert): place for place in layout(c).values()}.values())


def load(folder: Path, device: torch.device, dtype: torch.dtype, max_len: int | None = None, quantize: str | None = None
         ) -> GPT:
    """Read a Hugging Face folder (config.json and safetensors, sharded or not) into a GPT.

    One weight at a time, quantized as it comes: peak memory is the model plus its largest weight. ValueError names
    any tensor that is missing, left over or of the wrong shape, and any file that is absent or damaged.
    """
    from tqdm import tqdm

    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    model, places, surplus = GPT(config, dtype, device, max_len, quantize), layout(config), []
    # Old checkpoints hold tensors that are computed here: masks, frequencies, a head that is the embedding.
    needless = r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$" + (r"|^lm_head\.weight$" if config.tie_embeddings else "")
    parts: dict[tuple, tuple[torch.Tensor, int]] = {}  # parameters still incomplete, and rows missing
    progress = tqdm(total=len(places), desc="loading", unit=" tensors", leave=False,
                    disable=model.num_parameters < 3e8 or not (sys.stderr and sys.stderr.isatty()))
    for path in weight_files(folder):
        for name, tensor in read_tensors(path):
            short = name.removeprefix("transformer.") if config.family == "gpt2" else name
            place = places.pop(short, None)
            if place is None:
                if not re.search(needless, short):
                    surplus.append(name)
                continue
            tensor = tensor.T if place.transposed and tensor.dim() == 2 else tensor
            expected = (place.num_rows, *place.shape[1:])
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{path.name}: {name} has shape {list(tensor.shape)}, config.json implies {list(expected)}")
            if not tensor.is_floating_point():
                raise ValueError(f"{path.name}: {name} holds {tensor.dtype}, not floating-point numbers")
            key = (place.layer, place.name, place.expert)
            weight, missing = parts.pop(key, (None, place.shape[0]))
            weight = torch.empty(place.shape, dtype=dtype, device=device) if weight is None else weight
            weight[place.row : place.row + place.num_rows] = tensor
            if missing == place.num_rows:
                model.set(place, weight)
            else:
                parts[key] = weight, missing - place.num_rows
            progress.update()
    progress.close()
    for what, names in (("is missing", sorted(places)), ("is not part of this model", sorted(surplus))):
        if names:
            more = f" (and {len(names) - 5} more)" if len(names) > 5 else ""
            raise ValueError(f"{folder}: tensor {', '.join(names[:5])}{more} {what}")
    return model


def weight_files(folder: Path) -> list[Path]:
    """The files that config.json's model is in: those the index names, else the single one. Never whatever lies around."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index.name}: has no weight_map from tensors to files")
        names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"model: {folder} has no {name}")
    return [folder / name for name in names]


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) for everything in a safetensors file; ValueError names it if it is damaged.

    Tensors are views of the mapped file. It is mapped anew now and then, or all of it would end up in memory.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys(), reverse=True)
        while names:
            budget = 1 << 28
            with safe_open(path, framework="pt") as file:
                while names and budget > 0:
                    tensor = file.get_tensor(names[-1])
                    budget -= tensor.nbytes
                    yield names.pop(), tensor
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name}: not a readable safetensors file ({error})") from None


def read_json(path: Path) -> dict:
    """A JSON file's contents; ValueError names the file if it is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model: {path.parent} has no {path.name}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path.name}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: must be a JSON object, got {type(content).__name__}")
    return content


def find_model(model: str | os.PathLike | None, given_as: str = "model") -> Path:
    """The folder of a model: `model` itself, or fetched from the Hugging Face hub if it is a name like org/name. ValueError
    if there is neither; it names the option that the model was `given_as`.
    """
    folder = Path(model) if model is not None else DEFAULT_MODEL
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ValueError(f"{given_as}: {folder} has no config.json")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) or str(model).startswith("."):
        raise ValueError(f"{given_as}: there is no folder {folder}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.json", "model*.safetensors", "*.jinja"]))
    except Exception as error:  # whatever the network or the hub raises: the user sees one line
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{given_as}: {model} is no folder here, and could not be fetched from the hub: {first}") from None


def look_up(model: str | os.PathLike | GPT | None, given_as: str = "model") -> tuple[Path | None, ModelConfig, int]:
    """Where a model is (None: it is a GPT already), its configuration, and the tokens of context that it has room for."""
    if isinstance(model, GPT):
        return None, model.config, model.max_len
    folder = find_model(model, given_as)
    config = ModelConfig.from_dict(read_json(folder / "config.json"))
    return folder, config, config.max_len


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Text to token ids and back, and a conversation to a prompt, from the tokenizer files of a checkpoint."""

    def __init__(self, folder: Path):
        import tokenizers

        try:
            self.backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"tokenizer.json: not a readable tokenizer ({error})") from None
        self.backend.no_truncation()  # left over from training in some files
        self.backend.no_padding()
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.exists() else {}
        self.special = {name: token.get("content") if isinstance(token := config.get(name), dict) else token
                        for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        template = folder / "chat_template.jinja"
        self.chat_template = template.read_text(encoding="utf-8") if template.exists() else config.get("chat_template")
        if isinstance(self.chat_template, list):  # several named ones
            named = [entry for entry in self.chat_template if isinstance(entry, dict) and entry.get("name") == "default"]
            self.chat_template = named[-1].get("template") if named else None
        self.vocab_size = 1 + max(self.backend.get_vocab(with_added_tokens=True).values())
        self.special_ids = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        is_byte_level = '"type":"ByteLevel"' in self.backend.to_str()
        self._byte_of = byte_alphabet() if is_byte_level else {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with whatever the tokenizer puts around one (often a BOS)."""
        try:  # a batch of one, because only for batches does the library let other threads run meanwhile
            return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError:  # bytes of a command line that are no UTF-8, for instance
            raise ValueError("prompt: is not valid Unicode, it has half a surrogate pair") from None

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of some token ids."""
        return self.backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for, which may be less than a character; empty if the tokenizer does not know it."""
        piece = self.backend.id_to_token(token) or ""
        if self._byte_of:
            return bytes(self._byte_of[c] for c in piece) if self._byte_of.keys() >= set(piece) else piece.encode()
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes.fromhex(piece[3:5])
        return piece.replace("\u2581", " ").encode()  # the mark that stands for a space

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The prompt text of [{"role": ..., "content": ...}, ...]. ValueError if the template refuses them.

        Templates come with checkpoints, so they run in a sandbox.
        """
        if not self.chat_template:
            raise ValueError("chat: this model's tokenizer has no chat template")
        try:
            return compile_template(self.chat_template).render(
                **{"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None,
                   **{name: token for name, token in self.special.items() if token}, **variables})
        except Exception as error:  # a template is a program, and can fail like one
            reason = " ".join(str(error).split())
            raise ValueError(f"chat: the model's template refuses these messages: {reason}") from None

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> list[int]:
        """The prompt's token ids. The template has written BOS already, so none is added."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **variables), add_special_tokens=False)


@functools.lru_cache(8)
def compile_template(source: str):
    """A chat template, ready to render in a sandbox. Compiling takes longer than rendering, so once is enough."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    env.globals.update(raise_exception=raise_exception, strftime_now=lambda format: time.strftime(format))
    return env.from_string(source)


def byte_alphabet() -> dict[str, int]:
    """The characters that GPT-2's vocabulary writes bytes as: printable ones as themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


class Detokenizer:
    """A request's text, token by token: never half a character, never a stop string.

    `text` only grows, so that it can be shown while it does. As many characters as could still turn out to begin a stop
    string are held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.text, self.stopped, self.num_tokens = "", False, 0
        self._held, self._most_held = "", max(map(len, stop), default=1) - 1
        self._pending: list[int] = []  # tokens that have shown nothing yet: part of a character, or special
        # Decoding starts with a few tokens of the prompt, or the output's leading space would be lost. They must not begin
        # or end within a character (at most four tokens), as all its bytes would decode to replacement characters.
        n = len(prompt)
        for end, length in product(range(n, max(n - 4, -1), -1), range(8, 12)):
            tail = tokenizer.decode(prompt[max(0, end - length) : end])
            if not tail.startswith("\ufffd") and not tail.endswith("\ufffd"):
                break
        else:
            end, length = n, 0
        self._start(prompt[max(0, end - length) : end])
        try:
            for token in prompt[end:]:
                self._stream.step(tokenizer.backend, token)
        except Exception:  # the prompt ends with bytes that are no text at all
            self._start([])

    def push(self, token: int, may_stop: bool = True) -> None:
        """Add a token. A stop string that is complete sets `stopped`, and the text ends before it."""
        self.num_tokens += 1
        self._pending.append(token)
        try:
            piece = self._stream.step(self.tokenizer.backend, token)
        except Exception:  # "invalid prefix": bytes that are no character changed what was decoded before them
            piece = self.tokenizer.decode(self._pending)
            self._start(self._pending)
        if piece:
            self._pending = []
            self._show(piece, may_stop)

    def finish(self) -> None:
        """No more tokens will come: show what is held back, half a character as the replacement character."""
        if self._pending:
            self._show(self.tokenizer.decode(self._pending), True)
        self.text, self._held, self._pending = self.text + self._held, "", []

    def _start(self, ids):
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(ids=list(ids), skip_special_tokens=True)

    def _show(self, piece, may_stop):
        if not self.stop:
            self.text += piece
            return
        if self.stopped:
            return
        old, self._held = len(self._held), self._held + piece
        # Only what this piece completes: what was complete before was not to stop then (min_tokens).
        found = [self._held.find(stop, max(0, old - len(stop) + 1)) for stop in self.stop] if may_stop else []
        found = [at for at in found if at >= 0]
        self.stopped = bool(found)
        cut = min(found) if found else max(0, len(self._held) - self._most_held)
        self.text, self._held = self.text + self._held[:cut], "" if found else self._held[cut:]


# ---------------------------------------------------------------------------------------------------------------------
# What may be asked for, and what comes back
# ---------------------------------------------------------------------------------------------------------------------


def option(default, low, high, kind=(int, float)):
    """A sampling option that is a number from low to high."""
    what = "an integer" if kind is int else "a number"
    return field(default=default, metadata={"range": (low, high, kind), "rule": f"be {what} from {low:g} to {high:g}"})


@dataclass
class SamplingParams:
    """How to turn logits into tokens, and when to stop. An unknown or impossible value raises ValueError naming it.

    Applied in this order: logit_bias, penalties, bans (min_tokens), logits_processor, temperature, top_k, top_p, min_p. The
    same seed gives the same sample whatever else is in the batch. Survey B v1 3.2.5 (Sampling optimization).
    """

    temperature: float = option(1.0, 0, 1e6)  # 0: the most likely token
    top_k: int = option(0, 0, 2**31, int)  # keep the k most likely tokens; 0: all
    top_p: float = option(1.0, 0, 1)  # keep the most likely tokens that together reach this probability
    min_p: float = option(0.0, 0, 1)  # keep tokens with at least this share of the largest probability
    repetition_penalty: float = option(1.0, 1e-3, 1e3)  # over prompt and output; 1: none
    presence_penalty: float = option(0.0, -100, 100)  # subtracted once from what occurs in the output
    frequency_penalty: float = option(0.0, -100, 100)  # subtracted for each occurrence in the output
    seed: int | None = option(None, -(2**63), 2**64 - 1, int)  # None: drawn from the LLM's own
    n: int = option(1, 1, 4096, int)  # samples of the prompt
    beam_search: bool = False  # instead of sampling: the n likeliest outputs that a search n wide finds, the best first
    length_penalty: float = option(1.0, -10, 10)  # its outputs are compared by log-probability / length ** this
    max_tokens: int | None = option(None, 1, 2**31, int)  # None: 256, or fewer if that is what fits
    min_tokens: int = option(0, 0, 2**31, int)  # until then nothing stops the output
    stop: str | list[str] | tuple = ()  # texts that end the output and are not part of it
    stop_token_ids: list[int] | tuple = ()  # tokens that do the same, besides the model's own
    ignore_eos: bool = False  # the model's own end tokens do not end the output
    logprobs: int | None = option(None, 0, 1000, int)  # report the chosen token's log-probability, and of the k likeliest
    prompt_logprobs: int | None = option(None, 0, 1000, int)  # the same for every token of the prompt
    logit_bias: dict[int, float] | None = None  # added to these tokens' logits
    # (prompt and output so far, float32 logits [V]) -> the logits to sample from; may be asked about drafts that never come
    logits_processor: Callable[[list[int], torch.Tensor], torch.Tensor] | None = None
    ttft_target: float | None = option(None, 0, 1e9)  # seconds to the first token; missing it only shows in `stats`
    itl_target: float | None = option(None, 0, 1e9)  # seconds between two tokens; the same
    deadline: float | None = option(None, 0, 1e9)  # seconds after arrival: whatever is not finished by then is aborted

    def __new__(cls, *args, **options):
        for name in options:
            if name not in cls.__dataclass_fields__:
                close = difflib.get_close_matches(name, cls.__dataclass_fields__, 1)
                raise ValueError(f"{name}: there is no such sampling option" + (f"; {close[0]} is one" if close else ""))
        return super().__new__(cls)

    @property
    def can_overlap(self) -> bool:
        """Whether a token can be sampled before the one before it has been read, and nothing but the token is asked for."""
        return not (self.n > 1 or self.beam_search or self.logits_processor or Edits.wanted(self)
                    or (self.logprobs, self.prompt_logprobs) != (None, None))

    def __post_init__(self):
        def check(name, rule, holds):
            if not holds:
                raise ValueError(f"{name}: must {rule}, got {getattr(self, name)!r}")

        def is_list(values, fits):
            return isinstance(values, (list, tuple)) and all(map(fits, values))

        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata and not (value is None and f.default is None):
                check(f.name, f.metadata["rule"], is_number(value, *f.metadata["range"]))
        check("top_p", "be greater than 0", self.top_p > 0)
        self.stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        self.stop_token_ids = () if self.stop_token_ids is None else self.stop_token_ids
        check("stop", "be non-empty texts", is_list(self.stop, lambda text: type(text) is str and text))
        check("stop_token_ids", "be token ids", is_list(self.stop_token_ids, lambda i: type(i) is int and i >= 0))
        self.stop, self.stop_token_ids = tuple(self.stop), tuple(self.stop_token_ids)
        for name in ("ignore_eos", "beam_search"):
            check(name, "be True or False", isinstance(getattr(self, name), bool))
        is_bias = self.logit_bias is None or isinstance(self.logit_bias, dict) and all(
            type(token) is int and type(bias) in (int, float) and (-1e38 <= bias <= 1e38 or bias == -math.inf)
            for token, bias in self.logit_bias.items())
        check("logit_bias", "map token ids to numbers from -1e38 to 1e38", is_bias)
        check("logits_processor", "be a function", self.logits_processor is None or callable(self.logits_processor))
        if not self.beam_search and self.length_penalty != 1:
            raise ValueError("length_penalty: is for beam_search")
        if self.beam_search:
            for name in ("stop", "logprobs", "top_k", "top_p", "min_p", "temperature"):
                allowed = (0, 1) if name == "temperature" else (getattr(type(self), name),)
                if getattr(self, name) not in allowed:
                    raise ValueError(f"{name}: cannot be combined with beam_search, which compares token sequences by "
                                     f"their log-probability")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens: {self.min_tokens} is more than max_tokens={self.max_tokens}")


class Edits:
    """The built-in logits processors of one request: bias, penalties and bans, as changes to single entries of its logits.

    Each call only looks at the tokens that were appended since the last one, so that a step costs the same however long the
    request is.
    """

    # Once a step, what all requests have here comes from main memory: so it is little, and lies together.
    __slots__ = ("repetition", "presence", "frequency", "num_prompt", "num_banned", "num_seen", "rows", "row_of",
                 "biases", "banned")

    def __init__(self, p: SamplingParams, num_prompt: int, stop_ids: frozenset):
        self.repetition, self.presence, self.frequency = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
        self.num_prompt, self.num_banned = num_prompt, num_prompt + p.min_tokens  # tokens up to where stop_ids are banned
        self.num_seen = 0
        self.rows = array.array("d")  # token, bias, divide, subtract; token, bias, ... as `kernels.edit_logits` takes them
        self.row_of: dict[int, int] = {}  # token -> where its row begins; -1 - that once it is in the output
        self.biases, self.banned = p.logit_bias or {}, stop_ids if p.min_tokens else ()
        for token, bias in (self.biases | dict.fromkeys(self.banned, -math.inf)).items():
            self.row_of[token] = len(self.rows)
            self.rows.extend((token, bias, 1, 0))

    @staticmethod
    def wanted(p: SamplingParams) -> bool:
        """Whether a request with these parameters needs any."""
        return bool(p.logit_bias or p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1 or p.min_tokens)

    def after(self, token_ids: list[int], drafts: list[int] = ()) -> array.array:
        """The rows after these tokens, and drafts that may turn out wrong; until the next call."""
        self._take(token_ids[self.num_seen:])
        if not drafts:
            return self.rows
        edits = self.copy()
        edits._take(drafts)
        return edits.rows

    def _take(self, token_ids):
        rows, row_of = self.rows, self.row_of
        for token in token_ids:
            self.num_seen += 1
            if self.num_seen == self.num_banned:
                for banned in self.banned:
                    row = row_of[banned]
                    rows[max(row, -1 - row) + 1] = self.biases.get(banned, 0)
            is_output = self.num_seen > self.num_prompt
            if self.repetition == 1 and not (is_output and (self.presence or self.frequency)):
                continue
            row = row_of.get(token)
            if row is None:
                row = row_of[token] = len(rows)
                rows.extend((token, 0, 1, 0))
            if row < 0:
                rows[-1 - row + 3] += self.frequency
                continue
            rows[row + 2] = self.repetition
            if is_output:
                row_of[token] = -1 - row
                rows[row + 3] = self.presence + self.frequency

    def copy(self) -> Edits:
        """For another request that continues the same tokens."""
        other = copy.copy(self)
        other.row_of, other.rows = self.row_of.copy(), self.rows[:]
        return other


@dataclass
class Output:
    """One finished sample. `token_ids` ends with the token that stopped it, if one did; `text` does not show it.

    logprobs[i] is {token id: log-probability} of the i-th output token and its likeliest rivals under the model as it is,
    before penalties and temperature; prompt_logprobs[i] the same for the prompt, None for its first token.
    """

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" | "length" | "abort"
    prompt_token_ids: list[int]
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None
    cumulative_logprob: float | None = None  # of all output tokens; only beam search adds it up


class BeamSearch:
    """The state of a beam search: its hypotheses are the samples of one request, each with blocks of its own or shared.

    In every round each of them says what its next token could be, and the likeliest n of all these continuations go on;
    a hypothesis that is ready before the others waits for them, without blocks. One that ends makes room for another, and
    the search is over when none that goes on can still become one of the n best. Survey B v1 3.2.5.
    """

    def __init__(self, request: Request):
        self.request = request
        self.scores = {request: 0.0}  # those that go on: the sum of their log-probabilities
        # Those that are ready: {next token: its log-probability}, empty at a dead end, None if their logits make no sense.
        self.options: dict[Request, dict[int, float] | None] = {}
        self.ended: list[tuple[float, float, list[int], str]] = []  # best first: (rank, score, tokens, finish reason)

    def choose(self) -> list[tuple[Request, int, float]]:
        """End the round: (parent, next token, score) of those that go on. Empty when the search is over."""
        n, power, stop_ids = self.request.params.n, self.request.params.length_penalty, self.request.stop_ids
        length, most = next(iter(self.options)).num_output + 1, self.request.max_tokens
        options = sorted(((self.scores[parent] + logprob, parent, token) for parent, nexts in self.options.items()
                          for token, logprob in nexts.items() if logprob > -math.inf), key=lambda entry: -entry[0])
        chosen: list[tuple[Request, int, float]] = []
        for score, parent, token in options[:n] if length == most else options:  # no more than n of one length can be kept
            if len(chosen) == n:
                break
            why = "stop" if token in stop_ids else "length" if length == most else None
            if why:
                self.ended.append((score / length**power, score, parent.tokens + [token], why))
            else:
                chosen.append((parent, token, score))
        self.ended = sorted(self.ended, key=lambda entry: -entry[0])[:n]
        # A score only falls, so this is the most that a hypothesis can still come to.
        if chosen and len(self.ended) == n and self.ended[-1][0] >= chosen[0][2] / max(length**power, most**power):
            chosen = []
        self.options = {}
        return chosen


# ---------------------------------------------------------------------------------------------------------------------
# The engine
# ---------------------------------------------------------------------------------------------------------------------


Span = tuple[Request, int, int]  # (request, start, end): compute its tokens start .. end-1
Sampler = tuple[Request, int, int]  # (request, which of its samples, how many of its drafts stand before the token)


class DecodeGraphs:
    """The forward pass of a step of few tokens, captured for a number of sizes: a replay is one launch, not hundreds.

    Every token has a row of its own, as if it were a request that decodes; so has each draft, and each token of a short
    prompt: it sees its request's blocks up to its own position. A graph reads its inputs from where they lay when it was
    captured, so a batch is copied there; one of fewer tokens than the graph has rows is padded with rows that write into
    the scratch block and see only themselves. As no two graphs run at once, all share one pool of memory, the largest
    captured first. Survey A VI.C · B 3.2.5.
    """

    def __init__(self, model: GPT, cache: KVCache, max_rows: int, max_blocks: int):
        sizes = {1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, max_rows, 128), max_rows}
        self.sizes = sorted(size for size in sizes if size <= max_rows)

        def ints(*shape, dtype=torch.int64):
            return torch.full(shape, SCRATCH, dtype=dtype, device=model.device)

        n = max_rows
        self.batch = Batch(ints(n), ints(n), ints(n), ints(n, max_blocks, dtype=torch.int32),
                           torch.ones(n, dtype=torch.int32, device=model.device),
                           torch.arange(n + 1, dtype=torch.int32, device=model.device),
                           torch.arange(n, device=model.device))
        self.model, self.cache, self.pool, self.graphs = model, cache, None, {}
        self.key_bytes = cache.nbytes // math.prod(cache.data.shape[2:4])  # a token's keys and values
        # By default torch would capture on the current device, which may be another. One stream, as a pool belongs to one.
        self.stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        for size in reversed(self.sizes):
            b = self.batch
            rows = Batch(b.tokens[:size], b.positions[:size], b.slots[:size], b.block_tables[:size], b.context_lens[:size],
                         b.query_start[: size + 1], b.rows[:size])
            model.forward(rows, cache)  # what is compiled or allocated at first use must not be captured
            if not kernels.use_cuda:  # one could not be compiled, and what runs instead waits for the device
                raise kernels.CompileError("decode graphs need all CUDA kernels")
            self.graphs[size] = self._capture(rows)

    def _capture(self, rows):
        """A function that replays the forward pass of these rows, and the tensor in which it leaves their logits."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.model.device)
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            logits = self.model.forward(rows, self.cache)
        self.pool = graph.pool()
        return graph.replay, logits

    def can_replay(self, batch: Batch) -> bool:
        """Whether to replay a batch. What tokens of one request read again and again takes about a millisecond at most;
        to launch all kernels of a forward pass one by one takes several.
        """
        return len(batch.tokens) <= self.sizes[-1] and batch.repeated_keys * self.key_bytes <= 4 << 30

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """As GPT.forward, for a batch that `can_replay` allows. The logits may be overwritten by the next call."""
        n, (requests, width), static = len(batch.tokens), batch.block_tables.shape, self.batch
        size = next(size for size in self.sizes if size >= n)
        for name, padding in (("tokens", 0), ("positions", 0), ("slots", SCRATCH)):
            getattr(static, name)[:n] = getattr(batch, name)
            getattr(static, name)[n:size] = padding
        torch.add(static.positions[:size], 1, out=static.context_lens[:size])
        tables = batch.block_tables
        if requests < n:
            tables = tables.repeat_interleave(batch.query_start.diff(), 0, output_size=n)
        static.block_tables[:n, :width] = tables
        static.block_tables[n:size, 0] = SCRATCH  # all that a context of one token looks at
        replay, logits = self.graphs[size]
        replay()
        return logits[:n] if batch.wants_all else logits[batch.rows]


# Speculative decoding. A decode step waits for the weights to come from memory, and would hardly take longer for a few
# tokens more. So guess the next ones, compute them all in one step, and sample after each as if it were true:
#
#     tokens    Once upon a          the step computes  [a] [time there lived]
#     drafts    time there lived     and samples         time there was . ...     which gives  time there was
#
# What is sampled after the last token is the next one, whatever was guessed. If the guess was the same, the sample after it
# counts as well, and so on up to the first that differs: k drafts give 1 to k + 1 tokens for one step.
#
# Speculative sampling (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318) accepts a draft x, drawn from q,
# with probability min(1, p(x) / q(x)), and else draws from max(0, p - q). Where a drafter just names a token, q(x) is 1:
# accept with probability p(x), else draw from p without x. To draw from p, and to call the draft accepted if that is what
# came, is the same with fewer words. And as a sample here depends on nothing but (seed, position), what is drawn is what
# would have been drawn without drafts: not only the same distribution but the same output, greedy or not, under whatever
# penalties and filters (but for the rounding of logits, which can depend on how many rows a batch has).
#
# A model that drafts has a q, and with dice of its own its drafts would be accepted in sum(min(p, q)) of all cases. It gets
# the target's dice instead: two similar distributions mostly give the same token at the same noise. So it just names a
# token as well. For the models that come along that is within a few percent of the bound, and far above its likeliest token
# (tests/speculation_report.py acceptance); for large vocabularies and flat distributions it is not: probability that moves
# among the first tokens moves the places of all that come after them.
#
# Survey B 3.1.1 · C Speculative Decoding.


class PromptLookup:
    """Drafts from the request's own text: what followed when its last tokens stood there before. Called (request, k).

    Longer matches go first, later ones before earlier. A step only adds the new tokens to the request's index of n-grams, so
    it costs the same however long the text is. Prompt lookup decoding (Saxena 2023).
    """

    SIZES = (4, 3, 2)
    source = "the text"

    def __init__(self):
        self.indices = weakref.WeakKeyDictionary()  # request -> ({n-gram: where it ended last}, tokens seen)

    def __call__(self, request: Request, k: int) -> list[int]:
        tokens = request.tokens
        index, done = self.indices.get(request, ({}, 1))
        # An n-gram at the very end would find itself, so it enters only once something has followed it.
        for end in range(done, len(tokens)):
            for size in self.SIZES:
                index[tuple(tokens[max(0, end - size) : end])] = end
        self.indices[request] = index, len(tokens)
        at = next((index[gram] for size in self.SIZES if (gram := tuple(tokens[-size:])) in index), None)
        drafts: list[int] = []
        if at is not None:
            for i in range(at, at + k):  # past the end it goes on with itself: text that repeats goes on repeating
                drafts.append(tokens[i] if i < len(tokens) else drafts[i - len(tokens)])
        return drafts


class UserFunction:
    """Drafts from a function of the tokens so far, which may return a list of any length. Called (request, k)."""

    source = "a function"

    def __init__(self, function: Callable[[list[int]], list[int]], vocab_size: int):
        self.function, self.vocab_size = function, vocab_size

    def __call__(self, request: Request, k: int) -> list[int]:
        proposed = self.function(request.tokens.copy())
        if not isinstance(proposed, (list, tuple, type(None))):
            raise ValueError(f"the function returned {type(proposed).__name__}, not a list of token ids")
        drafts = list(proposed or ())[:k]
        for token in drafts:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(f"the function proposed {token!r}, not a token id from 0 to {self.vocab_size - 1}")
        return drafts


class DraftModel:
    """Drafts from a small model that follows the large one, through the same blocks.

    Its keys and values lie in a cache of its own shape under the same block numbers: so prefix hits, forks, copies and frees
    hold for both, and the pool knows nothing of it. It computes only what drafts need: a request that gets none costs it
    nothing, falls behind, and catches up before its next ones. Invariant: of what the target has computed in a block, it has
    all if the block is not in `stale`, else at least the first stale[block] tokens. So a request's drafts begin where the
    first stale block of its table lacks something, and what that fills is there for all who share the block. (Wrong keys and
    values here would not change an output, only spoil drafts.)
    """

    def __init__(self, model: GPT, cache: KVCache, graphs: DecodeGraphs | None = None):
        self.model, self.cache, self.graphs, self.num_passes = model, cache, graphs, 0
        self.stale: dict[int, int] = {}  # block, or ~slot for a host slot -> how many of its tokens are there
        self.source = f"{model.num_parameters / 1e6:,.1f}M parameters"

    def propose(self, llm: LLM, plan: list[tuple[Request, int]]) -> None:
        """Fill `request.drafts` as far as the plan has room, each pass adding one draft to all requests that want more; and
        note in `stale` what this leaves out.
        """
        spans, room = self._begin(llm, plan)
        if spans:
            self._draft(llm, spans, room)
        size, blocks_for = llm.pool.block_size, llm.pool.blocks_for
        for request, start, end in spans:
            for block in request.block_table[start // size : blocks_for(end + max(0, len(request.drafts) - 1))]:
                self.stale.pop(block, None)
        for request, n in plan:  # what the target is about to compute, and nobody has here: of drafts, only the last
            end = min(request.num_computed + n, len(request.tokens) + len(request.drafts))
            start = end - 1 if request.drafts else request.num_computed
            for i in range(start // size, blocks_for(end)):
                block, there = request.block_table[i], max(0, start - i * size)
                if there < self.stale.get(block, size):
                    self.stale[block] = there

    def _draft(self, llm, spans, room):
        """Compute the spans, then in each pass the last draft of all that want more. What the device has to know of all the
        passes is laid out at once, as if the drafts were known.
        """
        takers, n = [request for request, *_ in spans if request in room], len(spans)
        sizes = [sum(room[request] > j for request in takers) for j in range(max(room.values(), default=1))]
        samplers = [(request, request.sample_index, j) for j, size in enumerate(sizes) for request in takers[:size]]
        later = [(request, len(request.tokens) + j - 1, len(request.tokens) + j) for request, _, j in samplers if j]
        stops = list(accumulate(end - start for _, start, end in spans + later))  # the row after each span
        for request in takers:
            request.drafts = [0] * room[request]
        batch = llm.lay_out(spans + later, [stop - 1 for stop in stops[: len(takers)] + stops[n:]], samplers)
        for request in takers:
            request.drafts = []
        # What the later passes have in common is that everybody has one row: query_start 0, 1, 2, ...
        one_each, drawn = batch.query_start[n:] - stops[n - 1], batch.tokens
        parts = [part.split([stops[n - 1], *sizes[1:]]) for part in (batch.tokens, batch.positions, batch.slots)]
        parts += [part.split([n, *sizes[1:]]) for part in (batch.block_tables, batch.context_lens)]
        for j, (size, settings, tokens, *where) in enumerate(zip(sizes, batch.settings.split(sizes, 1), *parts)):
            if j == 0:
                part = Batch(tokens, *where, batch.query_start[: n + 1], batch.rows[:size], wants_all=len(tokens) == size,
                             repeated_keys=batch.repeated_keys, settings=settings)
            else:
                part = Batch(drawn[:size].clamp(min=0), *where, one_each[: size + 1], one_each[:size].long(),
                             wants_all=True, settings=settings)
            replay = self.graphs is not None and self.graphs.can_replay(part)
            logits = self.graphs.forward(part) if replay else self.model.forward(part, self.cache)
            self.num_passes += 1
            whose, samplers = samplers[:size], samplers[size:]
            drawn = llm.draw(part, llm.edit(whose, logits))
            for (request, *_), token in zip(whose, drawn.tolist()):
                if token >= 0 and len(request.drafts) == j:  # else its logits make no sense, and it gets no more drafts
                    request.drafts.append(token)

    def _begin(self, llm, plan) -> tuple[list[Span], dict[Request, int]]:
        """What the first pass computes, and how many drafts are wanted by each request that will have caught up by then.
        Catching up takes what the plan leaves of the token budget (or a block), and more steps if that is not enough.
        """
        pool, spans, room = llm.pool, [], {}
        # What moves before the next pass is as stale where it goes as where it came from.
        for to, source in chain(((~slot, block) for slot, block in pool.swaps_out.items()), pool.copies.items(),
                                ((block, ~slot) for block, slot in pool.swaps_in.items())):
            self.stale.pop(to, None)
            if source in self.stale:
                self.stale[to] = self.stale[source]
        spare = max(pool.block_size, llm.scheduler.max_batch_tokens - sum(n for _, n in plan))
        for request, n in plan:
            if n > request.num_behind:
                table, start = request.block_table, request.num_computed
                first = next(filter(self.stale.__contains__, table), None)
                if first is not None:
                    start = min(start, table.index(first) * pool.block_size + self.stale[first])
                missing, end = len(request.tokens) - start, len(request.tokens)
                if missing <= n + spare:
                    room[request] = n - request.num_behind
                else:  # whole blocks, if any
                    end = (start + spare) // pool.block_size * pool.block_size
                spare -= min(max(0, missing - n), spare)
                if end > start:
                    spans.append((request, start, end))
        spans.sort(key=lambda span: -room.get(span[0], 0))  # then those left for a pass come first in the one before
        return spans, room


@functools.lru_cache(4096)
def draft_length(acceptance: float, cost: float, most: int) -> int:
    """How many drafts, at most `most`, give the most tokens per time, if each is accepted with this probability.

    k drafts give 1 + a + ... + a^k tokens for the time of 1 + k * cost steps (arXiv:2211.17192, theorem 3.8).
    """
    tokens = list(accumulate(acceptance**i for i in range(most + 1)))
    return max(range(most + 1), key=lambda k: tokens[k] / (1 + k * cost))


class Stopwatch:
    """Seconds by part of something that happens again and again."""

    def __init__(self, *parts: str):
        self.seconds = dict.fromkeys(parts, 0.0)
        self.last = 0.0

    def start(self) -> None:
        """The first part begins now."""
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """`part` ends now, and the next one begins."""
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now


class InFlight:
    """The tokens [S] that a step has sampled for these requests, on their way from the device to the host.

    Meanwhile the host plans the next step, in which each request is one token longer. It need not know which token, as that
    step takes its input from where the device has put it. A request that turns out to have ended was computed once too
    often. What that wrote does no harm: its blocks are free, and whoever has them next fills them later, as the device does
    one thing after the other. Survey A IV.A · B 3.2.4 · C Request Scheduling: Intra-Request Scheduling.
    """

    def __init__(self, requests: list[Request], tokens: torch.Tensor):
        self.row = {request: i for i, request in enumerate(requests)}
        self.tokens = tokens
        self._host = tokens.to("cpu", non_blocking=tokens.is_cuda)  # elsewhere there is no event to wait for
        self._copied = torch.cuda.current_stream(tokens.device).record_event() if tokens.is_cuda else None

    def fill(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [T] with what was sampled for row i in the place of each -1 - i."""
        rows = (-1 - tokens).clamp(min=0)
        return torch.where(tokens < 0, self.tokens[rows].clamp(min=0), tokens)  # -1: see `LLM.draw`

    def read(self) -> list[int]:
        """The tokens, once they are there."""
        if self._copied:
            self._copied.synchronize()
        return self._host.tolist()


class LLM:
    """A model, its cache and its queue, for one thread at a time. `generate` and `stream` are loops around `step`.

    model: a folder in Hugging Face format, a name on its hub, a GPT, or None for the small model in tutorial/
    device: "auto" (CUDA where there is one, else the CPU), "cuda", "cpu", "mps"; dtype: "auto" or a name in DTYPES
    quantize: None, "int8" or "int4": round weights to so many bits while loading (not embeddings, norms and routers)
    kv_dtype: "auto" (as the model computes), "bfloat16" or "int8": keys and values rounded to fewer bits, so that more fit
    kv_memory: bytes for the KV cache, or a fraction below 1 of the free memory (on a GPU, of what the largest possible
        step leaves); None: 0.85 on a GPU, 1 GiB elsewhere
    block_size: tokens of a KV block; prefix_caching: blocks are found again by later requests that begin with their tokens
    max_batch_tokens: the token budget of a step; max_batch_requests: how many requests run at once (256, or the budget)
    max_model_len: tokens of a prompt and its output, at most the model's; seed: for requests that bring none
    policy: "fcfs", "priority", "shortest", "mlfq", "fair", a scheduler.Policy, or a function of a Request whose smallest
        value goes first
    graphs: on a GPU, capture the forward pass of small steps, for a number of sizes, and replay it
    overlap: plan and launch a step before the tokens of the one before have been read, so that a GPU never waits for the
        host; None: on a GPU, unless there is a draft
    swap_memory: bytes of main memory for the blocks of preempted requests, where copying is faster than computing again
    draft: None, or what guesses tokens ahead of the model, see above: "ngram" for the request's own text, a smaller model
        with the same vocabulary (a folder, a name, a GPT, "default" for the one in tutorial/), or a function from a list
        of tokens to a list of guesses; num_drafts: at most so many for a request in a step (8)
    """

    def __init__(self, model: str | os.PathLike | GPT | None = None, *, device: str = "auto", dtype: str = "auto",
                 quantize: str | None = None, kv_dtype: str = "auto", kv_memory: float | int | None = None,
                 block_size: int = 16, max_batch_tokens: int | None = None, max_batch_requests: int | None = None,
                 max_model_len: int | None = None, policy: str | Policy | Callable[[Request], object] = "fcfs",
                 prefix_caching: bool = True, graphs: bool = True, overlap: bool | None = None,
                 swap_memory: float | int = 0, seed: int = 0,
                 draft: str | os.PathLike | GPT | Callable[[list[int]], list[int]] | None = None,
                 num_drafts: int | None = None):
        for name, value in (("block_size", block_size), ("max_batch_tokens", max_batch_tokens), ("num_drafts", num_drafts),
                            ("max_batch_requests", max_batch_requests), ("max_model_len", max_model_len)):
            if value is not None and not is_number(value, 1, kind=int):
                raise ValueError(f"{name}: must be an integer of at least 1, got {value!r}")
        for name, value in (("prefix_caching", prefix_caching), ("graphs", graphs), ("overlap", overlap)):
            if not isinstance(value, bool) and (name, value) != ("overlap", None):
                raise ValueError(f"{name}: must be True or False, got {value!r}")
        if type(seed) is not int:
            raise ValueError(f"seed: must be an integer, got {seed!r}")
        if kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype: must be one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
        folder, config, longest = look_up(model)
        self.max_model_len = longest if max_model_len is None else max_model_len
        if not 1 < self.max_model_len <= longest:
            raise ValueError(f"max_model_len: must be from 2 to the model's {longest}, got {max_model_len}")
        if folder:
            self._load(folder, config, pick_device(device), dtype, quantize)
        elif (device, dtype, quantize) != ("auto", "auto", None):
            raise ValueError("device, dtype, quantize: a GPT has its own already")
        else:
            self.model, self.tokenizer = model, None
        # Some checkpoints name end tokens that lie outside their vocabulary.
        self.eos_ids = frozenset(token for token in config.eos_ids if 0 <= token < config.vocab_size)
        self.device, is_cuda = self.model.device, self.model.device.type == "cuda"
        self._real = torch.float32 if self.device.type == "mps" else torch.float64  # the widest that the device has
        if self.device.type == "cpu":
            keep_freed_memory()
        max_batch_requests = max_batch_requests or min(256, max_batch_tokens or 256)
        max_batch_tokens = max_batch_tokens or max(max_batch_requests, 8192 if is_cuda else 1024)
        if (num_drafts or 0) > max_batch_tokens:
            raise ValueError(f"num_drafts: must be at most max_batch_tokens ({max_batch_tokens}), got {num_drafts}")
        self.overlap = is_cuda and draft is None if overlap is None else overlap
        self.num_drafts, self.drafter = num_drafts or 8, self._pick_drafter(draft, num_drafts, folder)
        self._allocate(kv_dtype, kv_memory, swap_memory, block_size, max_batch_tokens, max_batch_requests, prefix_caching)
        ridge = 0 if draft is None else 128 if is_cuda else 16  # see `Scheduler`; 0: no drafts
        self.scheduler = Scheduler(self.pool, max_batch_tokens=max_batch_tokens, max_batch_requests=max_batch_requests,
                                   max_model_len=self.max_model_len, policy=policy, ridge=ridge)
        rows = max(max_batch_requests, min(max_batch_requests * (1 + self.num_drafts), ridge, max_batch_tokens))
        self.graphs = self._capture(self.model, self.cache, rows) if graphs else None
        self.draft_cost = 1 / max(1, ridge)  # of a draft, in steps: a row more. For a draft model it is measured, below
        if isinstance(small := self.drafter, GPT):
            rows = min(2 * max_batch_requests, max_batch_tokens)
            self.drafter = DraftModel(small, self.caches[1], self._capture(small, self.caches[1], rows) if graphs else None)
        self._random = random.Random(seed)
        self._plan: list[tuple[Request, int]] = []  # of the step under way, or the last one
        self._in_flight: InFlight | None = None  # the step whose tokens have not been read
        self.watch = Stopwatch("schedule", "pack", "launch", "wait", "commit")
        self.counts = dict.fromkeys(("steps", "forward_passes", "computed_tokens", "prompt_tokens", "output_tokens",
                                      "finished", "aborted", "drafted", "accepted", "saved_steps"), 0)
        self._measure()
        log.info(self.describe())

    def _load(self, folder, config, device, dtype, quantize):
        self.tokenizer = Tokenizer(folder) if (folder / "tokenizer.json").exists() else None
        if self.tokenizer and self.tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"tokenizer.json: has ids up to {self.tokenizer.vocab_size - 1}, the model's vocabulary ends "
                             f"at {config.vocab_size - 1}")
        generation = folder / "generation_config.json"
        if generation.exists():
            config.eos_ids = as_ids(read_json(generation).get("eos_token_id")) or config.eos_ids
        self.model = load(folder, device, pick_dtype(dtype, device, config.dtype), self.max_model_len, quantize)

    def _pick_drafter(self, draft, num_drafts, folder):
        """What drafts: a function of (request, k), or the GPT of a DraftModel to be. ValueError if it cannot work."""
        vocab_size = self.model.config.vocab_size
        if draft is None:
            if num_drafts is not None:
                raise ValueError(f"num_drafts: {num_drafts} was given without a draft")
            return None
        if self.overlap:
            raise ValueError("overlap: a draft follows the last token, so that has to be read first; use one of the two")
        if draft == "ngram":
            return PromptLookup()
        if callable(draft):
            return UserFunction(draft, vocab_size)
        if not isinstance(draft, (str, os.PathLike, GPT)):
            raise ValueError(f'draft: must be "ngram", a model or a function, got {type(draft).__name__}')
        path, config, longest = look_up(DEFAULT_DRAFT if draft == "default" else draft, "draft")
        if config.vocab_size != vocab_size:
            raise ValueError(f"draft: has a vocabulary of {config.vocab_size}, the model one of {vocab_size}; they must be "
                             f"the same")
        if longest < self.max_model_len:
            raise ValueError(f"draft: has room for {longest} tokens, the model for max_model_len={self.max_model_len}")
        if path is None:
            if draft.device != self.device:
                raise ValueError(f"draft: is on {draft.device}, the model on {self.device}")
            return draft
        if self.tokenizer and (path / "tokenizer.json").exists():
            if Tokenizer(path).backend.get_vocab() != self.tokenizer.backend.get_vocab():
                raise ValueError(f"draft: {path} has other tokens than {folder}, so it cannot guess the model's")
        return load(path, self.device, self.model.dtype, self.max_model_len)

    def _allocate(self, kv_dtype, kv_memory, swap_memory, block_size, max_batch_tokens, max_batch_requests, prefix_caching):
        """The pool and each model's cache, of all the blocks that fit into kv_memory, with host slots for swap_memory."""
        models = [self.model, self.drafter] if isinstance(self.drafter, GPT) else [self.model]
        is_cuda = self.device.type == "cuda"
        wider = [m.dtype for m in models if m.dtype is not torch.bfloat16]
        if kv_dtype == "bfloat16" and is_cuda and wider:
            raise ValueError(f"kv_dtype: on a GPU bfloat16 needs models in bfloat16, not {wider[0]}")
        formats = [(m.config, KV_DTYPES[kv_dtype] or m.dtype) for m in models]
        block_bytes = sum(KVCache.bytes_per_block(c.num_layers, block_size, c.num_kv_heads, c.head_dim, dtype.itemsize)
                          for c, dtype in formats)
        if kv_memory is None:
            kv_memory = 0.85 if is_cuda else 1 << 30
        if not is_number(kv_memory, 0) or kv_memory == 0:
            raise ValueError(f"kv_memory: must be bytes, or a fraction of the free memory below 1; got {kv_memory!r}")
        if is_cuda:  # before the free memory is measured, so that what this takes is not given to the cache
            self._compute_the_largest_step(formats[0][1], block_size, max_batch_tokens, max_batch_requests)
        if kv_memory < 1:
            kv_memory *= torch.cuda.mem_get_info(self.device)[0] if is_cuda else free_memory()
        # More than every running request at full length can never be used.
        most = max_batch_requests * -(-self.max_model_len // block_size) + 1
        num_blocks = min(int(kv_memory // block_bytes), most)
        if num_blocks < 2:
            raise ValueError(f"kv_memory: {kv_memory:.0f} bytes are less than two blocks of {block_bytes} bytes; raise "
                             f"kv_memory or lower block_size")
        if not is_number(swap_memory, 0, 1 << 62) or 0 < swap_memory < block_bytes:
            raise ValueError(f"swap_memory: must be 0 or from the {block_bytes} bytes of a block to 2^62, got "
                             f"{swap_memory!r}")
        num_slots = int(swap_memory // block_bytes)
        try:
            self.caches = [KVCache(c.num_layers, num_blocks, block_size, c.num_kv_heads, c.head_dim, dtype, self.device,
                                   num_slots) for c, dtype in formats]
            self.pool = BlockPool(num_blocks, block_size, prefix_caching, num_slots)
        except (RuntimeError, MemoryError):
            raise ValueError(f"kv_memory: there is no room for {num_blocks:,} blocks" + (
                f", or swap_memory for {num_slots:,}; lower one" if num_slots else "; lower kv_memory")) from None
        self.cache = self.caches[0]

    @torch.inference_mode()
    def _compute_the_largest_step(self, kv_dtype, block_size, max_batch_tokens, max_batch_requests):
        """Compute as many tokens of as many requests as a step can have, before there is a cache: all in one scratch block.
        The memory this takes stays reserved for the steps to come; and kernels are compiled.
        """
        torch.cuda.empty_cache()  # or what earlier engines of this process have freed would count as taken
        c, num_requests = self.model.config, min(max_batch_requests, max_batch_tokens)
        each = min(self.max_model_len, max_batch_tokens // num_requests)

        def ints(values, dtype=torch.int64):
            return torch.as_tensor(values, dtype=dtype, device=self.device)

        query_start = ints(range(0, num_requests * each + 1, each), torch.int32)
        positions = ints(range(each)).repeat(num_requests)
        tables = ints([[SCRATCH] * -(-each // block_size)] * num_requests, torch.int32)
        batch = Batch(torch.zeros_like(positions), positions, positions % block_size, tables,
                      ints([each] * num_requests, torch.int32), query_start, query_start[1:].long() - 1)
        zeros = torch.zeros(num_requests, device=self.device)
        try:
            cache = KVCache(c.num_layers, 1, block_size, c.num_kv_heads, c.head_dim, kv_dtype, self.device)
            logits = self.model.forward(batch, cache)
            for rows in logits, logits.float():  # the latter is what edits leave
                kernels.sample(rows, temperature=zeros + 1, top_k=zeros.long(), top_p=zeros + 0.5, min_p=zeros,
                               noise=zeros.double())
        except torch.OutOfMemoryError:
            raise ValueError(f"max_batch_tokens: there is no memory for a step of {num_requests * each:,} tokens of "
                             f"{num_requests} requests; lower it, or max_batch_requests") from None

    def _capture(self, model, cache, max_rows) -> DecodeGraphs | None:
        """Decode graphs; None where the forward pass waits for the device, as PyTorch's attention or expert loop does."""
        c, mixtures = model.config, [layer for layer in model.layers if layer.router is not None]
        most = [kernels.most_pairs(layer.gate_up, layer.down) // c.experts_per_token for layer in mixtures]
        has_kernels = kernels.compiled(model.embed)[1] and kernels.has_cuda_attention(c.head_dim)
        if self.device.type != "cuda" or not has_kernels or not (max_rows := min([max_rows, *most])):
            return None
        try:
            return DecodeGraphs(model, cache, max_rows, self.pool.blocks_for(self.max_model_len))
        except kernels.CompileError:
            return None
        except torch.OutOfMemoryError:
            raise ValueError("kv_memory: leaves no memory to the decode graphs; lower it, or max_batch_requests, or have no "
                             "graphs") from None

    def _measure(self):
        """What swapping and drafting cost here, if they are wanted."""
        if self.pool.num_host_slots:
            per_token, per_block = self._measure_swap()
            self.scheduler.prefers_swap = lambda tokens, blocks: blocks * per_block < tokens * per_token
        if isinstance(self.drafter, DraftModel):
            self.draft_cost = self._measure_draft()

    def _measure_swap(self) -> tuple[float, float]:
        """Seconds to compute a token of a long prompt, and to copy a block to the host and back. Both only estimate what a
        preempted request will cost: how much of it the prefix cache will still have, and whether it will be computed beside
        others in a step that waits for the weights anyway, is not known when it has to go.
        """
        n = min(512, self.max_model_len - 1, self.scheduler.max_batch_tokens, self.pool.num_usable * self.pool.block_size)
        request = Request([0] * n, params=SamplingParams())
        self.pool.extend(request.block_table, 0, n)
        batch, _, _ = self.pack([(request, n)])
        out = dict(enumerate(request.block_table[: self.pool.num_host_slots]))
        back = {block: slot for slot, block in out.items()}

        def seconds(work):
            for _ in range(2):  # the first run also compiles and allocates
                start = time.perf_counter()
                work()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            return time.perf_counter() - start

        models = [self.model, *([self.drafter.model] if isinstance(self.drafter, DraftModel) else [])]
        computing = seconds(lambda: [model.forward(batch, cache) for model, cache in zip(models, self.caches)])
        copying = seconds(lambda: [cache.move(out, {}, back) for cache in self.caches])
        self.pool.release(request.block_table)
        return computing / n, copying / len(out)

    def _measure_draft(self) -> float:
        """How much longer each draft of the draft model makes a step, in steps of one token. Measured with real steps: much
        of a tiny model's goes on around the forward pass, and takes as long for a model that is a tenth of it.
        """
        most, scheduler = self.scheduler.max_batch_tokens, self.scheduler
        k = min(self.num_drafts, most - 1, self.longest_request - 2)
        if k < 1:
            return self.draft_cost  # no request will ever have room for one
        self.scheduler = Scheduler(self.pool, max_batch_tokens=most, max_batch_requests=1, max_model_len=self.max_model_len,
                                   ridge=1 + k)
        params = SamplingParams(temperature=0, max_tokens=k + 1, ignore_eos=True, seed=0)

        def seconds(num_drafts):
            request = self.add_request([0], params)
            request.max_drafts = num_drafts
            start = time.perf_counter()
            self.step()
            taken = time.perf_counter() - start
            self.abort(request)
            self.pool.forget()
            return taken

        # The first steps also compile and allocate, and any may be interrupted.
        plain, drafting = map(min, zip(*[(seconds(0), seconds(k)) for _ in range(4)]))
        self.scheduler, self.drafter.num_passes = scheduler, 0
        self.counts, self.watch = dict.fromkeys(self.counts, 0), Stopwatch(*self.watch.seconds)
        return max(0.0, drafting / plain - 1) / k

    def describe(self) -> str:
        """One line on what runs where, so that a slow run explains itself."""
        c, gib = self.model.config, sum(cache.nbytes for cache in self.caches) / 2**30
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        cpp, cuda = kernels.compiled(self.model.embed)
        body = "C++" if cpp else "CUDA C++" if cuda else "PyTorch"
        attention = "PyTorch" if cuda and not kernels.has_cuda_attention(c.head_dim) else body
        threads = f"{torch.get_num_threads()} threads, " if self.device.type == "cpu" else ""
        graphs = ", decode graphs" if self.graphs else ""
        drafts = f", drafts from {self.drafter.source}" if self.drafter else ""
        overlap = ", overlapping steps" if self.overlap else ""
        paths = f"{body} kernels and attention" if attention == body else f"{body} kernels, {attention} attention"
        device += f" ({threads}{paths}{graphs}{overlap})"
        quantized = f"{self.model.quantize} weights, " if self.model.quantize else ""
        dtype = quantized + str(self.model.dtype).removeprefix("torch.")
        host = f" and {self.pool.num_host_slots:,} on the host" if self.pool.num_host_slots else ""
        kv = "" if self.cache.data.dtype == self.model.dtype else f"{self.cache.data.dtype} ".removeprefix("torch.")
        return (f"{c.family}, {self.model.num_parameters / 1e6:,.1f}M parameters, {dtype} on {device}, "
                f"{self.pool.num_usable:,} {kv}KV blocks of {self.pool.block_size} tokens ({gib:.2f} GiB){host}, at most "
                f"{self.scheduler.max_batch_requests} requests and {self.scheduler.max_batch_tokens} tokens a step{drafts}")

    # ---- asking ----

    def generate(self, prompts: str | list[str | list[int]], params: SamplingParams | list[SamplingParams] | None = None,
                 progress: bool = False) -> list[Output]:
        """Complete all prompts and return their outputs in order, the n samples of a prompt next to each other.

        A prompt is a text or a list of token ids. ValueError if one cannot be served, and then none is; or, once all have
        ended, if one failed on the way. One that ran into its deadline is no failure: its output is what it got until then.
        """
        from tqdm import tqdm

        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        params = params if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"params: {len(params)} were given for {len(prompts)} prompts")
        requests: list[Request] = []
        try:
            for prompt, options in zip(prompts, params):
                requests.append(self.add_request(prompt, options))
            with tqdm(total=len(requests), disable=not progress, unit=" requests") as bar:
                unfinished = set(requests)
                while unfinished and self.has_work():
                    for request in self.step():
                        first = request.samples[0]
                        if first in unfinished and first.is_over:
                            unfinished.remove(first)
                            bar.update()
        except BaseException:
            for request in requests:
                self.abort(request)
            raise
        # A width above 1: it ended before it was forked, and stands for all of its samples.
        samples = list(chain(*(request.samples * request.width for request in requests)))
        for request in samples:
            if request.error and not request.expired:
                raise ValueError(request.error)
        return [self.output(request) for request in samples]

    def stream(self, prompt: str | list[int], params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one completion, piece by piece as it comes, until its deadline if it has one. Leaving the loop early
        aborts the request. ValueError if it cannot be served, or fails on the way.
        """
        request, shown = self.add_request(prompt, params), 0
        try:
            if request.search:
                raise ValueError("beam_search: cannot be streamed, as what is likeliest changes until the end")
            if request.width > 1:
                raise ValueError(f"n: a stream is one sample, got n={request.width}")
            while True:  # others may step, and finish this request, while we wait at the yield
                text = self.text(request)
                if len(text) > shown:
                    yield text[shown:]
                    shown = len(text)
                elif request.status == FINISHED:
                    break
                else:
                    self.step()
            if request.error and not request.expired:
                raise ValueError(request.error)
        finally:
            self.abort(request)

    def add_request(self, prompt: str | list[int], params: SamplingParams | None = None, priority: int = 0,
                    cache_salt: str | None = None, tenant: str | None = None) -> Request:
        """Queue one prompt for the steps to come. ValueError if it can never be served, naming the limit.

        With n > 1, `request.samples` lists the samples once the prompt is computed. Requests with unequal `cache_salt`
        never share cached prefixes. Where the policy looks at them: a smaller `priority` is more urgent, `tenant` is whom
        the service is charged to.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params: must be SamplingParams, got {type(params).__name__}")
        if not is_number(priority):
            raise ValueError(f"priority: must be a number, got {priority!r}")
        for name, value in (("cache_salt", cache_salt), ("tenant", tenant)):
            if not isinstance(value, (str, type(None))):
                raise ValueError(f"{name}: must be a text or None, got {value!r}")
        tokens = self._encode(prompt)
        room = self.longest_request - len(tokens)
        vocab = self.model.config.vocab_size
        for name, ids in (("prompt", tokens), ("logit_bias", params.logit_bias or ()),
                          ("stop_token_ids", params.stop_token_ids)):
            if ids and not 0 <= min(ids) <= max(ids) < vocab:
                raise ValueError(f"{name}: token id {min(ids) if min(ids) < 0 else max(ids)} is outside the vocabulary "
                                 f"(0 to {vocab - 1})")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop: this model has no tokenizer, so it has no text to look for stop strings in")
        max_tokens = params.max_tokens or max(1, params.min_tokens, min(256, room))
        request = Request(tokens, max_tokens, priority=priority, width=params.n, root=cache_salt,
                          reuse_prefix=params.prompt_logprobs is None, params=params, tenant=tenant,
                          ttft_target=params.ttft_target, itl_target=params.itl_target, deadline=params.deadline)
        request.seed = self._random.getrandbits(64) if params.seed is None else params.seed % 2**64
        request.may_overlap = self.overlap and params.can_overlap
        request.stop_ids = frozenset(params.stop_token_ids).union(() if params.ignore_eos else self.eos_ids)
        if Edits.wanted(params):
            request.edits = Edits(params, len(tokens), request.stop_ids)
        if params.beam_search:
            request.search = BeamSearch(request)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(tokens)
        if self.drafter:
            self._adapt(request, 0, 0)  # sets max_drafts
        return self.scheduler.add(request)

    @property
    def longest_request(self) -> int:
        """Tokens of prompt and output together that model and cache have room for."""
        return min(self.max_model_len, self.pool.num_usable * self.pool.block_size + 1)

    def _encode(self, prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("prompt: this model has no tokenizer, so prompts must be lists of token ids")
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, (list, tuple)):
            raise ValueError(f"prompt: must be a text or a list of token ids, got {type(prompt).__name__}")
        for token in prompt:
            if type(token) is not int:
                raise ValueError(f"prompt: token ids must be int, got {token!r}, which is {type(token).__name__}")
        return list(prompt)

    def abort(self, request: Request) -> None:
        """End a request, and all its samples if it is the one `add_request` returned; its blocks are free at once."""
        for sample in request.samples if request is request.samples[0] or request.search else [request]:
            self._finish(sample, "abort")

    def _finish(self, request, reason):
        if request.status != FINISHED:
            self.scheduler.finish(request, reason)
            self.counts["aborted" if reason == "abort" else "finished"] += request.width

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work()

    def stats(self) -> dict[str, int | float]:
        """Exact counters since the start, where the time went, and the state of queue and pool now.

        steps, forward_passes · computed_tokens: rows that went through the model; prompt_tokens: those of them that
        belong to prompts; output_tokens: generated; hit_tokens: found in the prefix cache instead of computed ·
        drafted, accepted: drafts computed, and those that came true; saved_steps: tokens beyond the first that a request got
        in a step, each of which would have taken it another; draft_passes: forward passes of a draft model ·
        preemptions, finished, aborted · with_targets: samples that had targets or a deadline and ended, goodput: those of
        them that finished and missed none · blocks_swapped_out, blocks_swapped_in, blocks_swap_freed: those whose copies on
        the host were not needed · waiting, running · blocks_used, blocks_cached (free, but matching a prefix), blocks_free ·
        schedule_seconds, pack_seconds, launch_seconds, wait_seconds, commit_seconds: of the parts of a step, one after the
        other, a drafter's work in the first. A CPU computes the model in "launch"; for a GPU, which only then begins, the
        host is idle in "wait".
        """
        s = self.scheduler
        return {**self.counts, "draft_passes": getattr(self.drafter, "num_passes", 0), "hit_tokens": s.num_hit_tokens,
                "preemptions": s.num_preemptions, "with_targets": s.num_with_targets, "goodput": s.num_in_time,
                "blocks_swapped_out": s.num_swapped_out, "blocks_swapped_in": s.num_swapped_in,
                "blocks_swap_freed": s.num_swap_freed, "waiting": s.num_waiting, "running": len(s.running),
                **self.pool.stats(), **{f"{part}_seconds": total for part, total in self.watch.seconds.items()}}

    # ---- the step ----

    def step(self) -> list[Request]:
        """Bring every scheduled request forward, and return those that got a token or ended.

        Survey A II.B, IV.A · B 2.3, 3.2.4 · C Request Scheduling: Intra-Request Scheduling.
        """
        self._plan, watch = [], self.watch  # if scheduling fails, there is none
        watch.start()
        self._plan = plan = self.scheduler.schedule()
        overlaps = all(request.may_overlap for request, _ in plan)
        if not plan or self._in_flight and not overlaps:  # somebody has to see the tokens in flight: plan again after that
            return self._read_tokens() + self._take_expired()
        if self.drafter:
            plan = self.propose(plan)
        watch.lap("schedule")
        batch, samplers, prompt_rows = self.pack(plan)
        watch.lap("pack")
        replay = self.graphs is not None and self.graphs.can_replay(batch)
        logits = self.graphs.forward(batch) if replay else self.model.forward(batch, self.cache)
        watch.lap("launch")
        self.counts["steps"] += 1
        self.counts["forward_passes"] += 1
        self.counts["computed_tokens"] += len(batch.tokens)
        self.counts["prompt_tokens"] += sum(min(n, max(0, request.num_prompt - request.num_computed)) for request, n in plan)
        for (request, position), row in zip(prompt_rows, logits[len(samplers):]):
            following, k = request.tokens[position + 1], request.params.prompt_logprobs
            request.prompt_logprobs[position + 1] = top_logprobs(row.float().log_softmax(-1), following, k)
        # Until here no token was appended and nothing counts as computed: a step that failed above can be repeated.
        if overlaps:
            in_flight = InFlight([request for request, *_ in samplers], self.draw(batch, logits))
            watch.lap("launch")
            changed = self._read_tokens()
            self._in_flight = in_flight
            for request, n in plan:
                if request.status != FINISHED:
                    self.scheduler.advance(request, n, is_read=False)
        else:
            tokens, logprobs = self.sample(batch, samplers, logits[: len(samplers)])
            watch.lap("wait")
            changed = self.commit(plan, tokens, logprobs)
        watch.lap("commit")
        return changed + self._take_expired()

    def _read_tokens(self) -> list[Request]:
        """Append the tokens that are in flight, except those of requests that were aborted meanwhile."""
        if self._in_flight is None:
            return []
        changed, tokens = [], self._in_flight.read()
        self.watch.lap("wait")
        for request, token in zip(self._in_flight.row, tokens):
            if request.status != FINISHED:
                self.scheduler.sampled(request)
                self._append(request, token, None)
                changed.append(request)
        self._in_flight = None
        return changed

    def _take_expired(self):
        expired = self.scheduler.take_expired()
        self.counts["aborted"] += sum(request.width for request in expired)
        return expired

    def drop_step(self, reason: str) -> list[Request]:
        """After an exception out of `step`: end with an error what it was working on, so that the others can go on.

        Returns all samples concerned, including any that had ended before. What the step wrote is not to be trusted, so
        their blocks leave the prefix index. If it failed before there was a plan, nobody is spared.
        """
        planned = [request for request, _ in self._plan] or [*self.scheduler.running, *self.scheduler.waiting]
        planned += self._in_flight.row if self._in_flight else ()
        self._in_flight = None
        concerned = list(dict.fromkeys(chain(*(request.samples for request in planned))))
        for request in concerned:
            if request.status != FINISHED:
                request.error = reason
                self.pool.withdraw(request.block_table)
                self._finish(request, "abort")
        return concerned + self._take_expired()

    def propose(self, plan: list[tuple[Request, int]]) -> list[tuple[Request, int]]:
        """Have the drafter fill the room that the plan has for drafts. Where it offers fewer, the plan becomes shorter."""
        for request, _ in plan:
            request.drafts = []  # a step that failed may have left some
            if not request.max_drafts:
                self._adapt(request, 0, 0)
        if isinstance(self.drafter, DraftModel):
            self.drafter.propose(self, plan)
        else:
            for request, n in plan:
                if n > request.num_behind:
                    try:
                        request.drafts = self.drafter(request, n - request.num_behind)
                    except Exception as error:  # the user's; the request ends with it when it has sampled
                        request.error = f"draft: {error!r}"
        fitted = []
        for request, n in plan:
            most = request.num_behind + len(request.drafts)
            if n > most:
                self.pool.trim(request.block_table, len(request.tokens) + len(request.drafts))
            fitted.append((request, min(n, most)))
        return fitted

    def _adapt(self, request, accepted, tried):
        """Set `max_drafts` by how many of the drafts tried came true. While none are tried, acceptance slowly recovers."""
        request.acceptance += (accepted - tried * request.acceptance) / 8 if tried else (1 - request.acceptance) / 512
        if not request.search:
            request.max_drafts = draft_length(round(request.acceptance, 2), self.draft_cost, self.num_drafts)

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
        positions = np.arange(len(tokens)) - (query_start[:-1] - starts)[owner]
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

    def _settings(self, samplers: list[Sampler]) -> torch.Tensor:
        """Temperature, top_k, top_p, min_p and noise of each, [5, S], still on the host."""
        params = [request.params for request, _, _ in samplers]
        noise = kernels.uniform_noise(
            np.array([request.seed for request, _, _ in samplers], dtype=np.uint64),
            np.array([request.num_output + request.num_pending + j + (i << 32) for request, i, j in samplers]))
        columns = np.array([[p.temperature for p in params], [p.top_k for p in params], [p.top_p for p in params],
                            [p.min_p for p in params], noise])
        return torch.from_numpy(columns).to(self._real)

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device; copied from pinned memory, so that the host does not wait for it."""
        if self.device.type == "cpu":
            return tensor
        tensor = tensor.to(self._real) if tensor.is_floating_point() else tensor
        return (tensor.pin_memory() if self.device.type == "cuda" else tensor).to(self.device, non_blocking=True)

    def sample(self, batch: Batch, samplers: list[Sampler], logits: torch.Tensor) -> tuple[list[int], list[dict | None]]:
        """For row i of logits [S, V], which belongs to samplers[i]: the next token, and the log-probabilities asked for. In
        a beam search these are the hypothesis's options, after all edits, and the token means nothing.
        """
        logprobs: list[dict | None] = [None] * len(samplers)
        asked = [i for i, (request, _, _) in enumerate(samplers) if request.params.logprobs is not None]
        raw = logits[asked].float().log_softmax(-1) if asked else ()
        logits = self.edit(samplers, logits)
        tokens = self.draw(batch, logits).tolist()
        for i, row in zip(asked, raw):
            logprobs[i] = top_logprobs(row, tokens[i], samplers[i][0].params.logprobs)
        for i, (request, _, _) in enumerate(samplers):
            if request.search and tokens[i] >= 0:
                row = logits[i].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                # No more options than these can matter: n go on, unless they end with one of the stop tokens.
                logprobs[i] = top_logprobs(row, tokens[i], request.params.n + len(request.stop_ids))
            elif request.search and (logits[i] == -math.inf).all():
                logprobs[i] = {}  # every token is banned: nothing can follow this hypothesis
        return tokens, logprobs

    def draw(self, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [S] int64, one for each row of edited logits [S, V]; -1 where they make no sense (NaN, or nothing left to
        choose). With the compiled kernels the host does not wait for the device.

        Whether the drafts before a row are true or not, its token is what would be sampled if they were.
        """
        if not batch.settings.shape[1]:
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        temperature, top_k, top_p, min_p, noise = batch.settings
        return kernels.sample(logits, temperature.float(), top_k.long(), top_p.float(), min_p.float(), noise)

    def edit(self, samplers: list[Sampler], logits: torch.Tensor) -> torch.Tensor:
        """Logits [S, V] after all logits processors: the built-in ones in one operation, then users' own row by row."""
        parts = [request.edits.after(request.tokens, request.drafts[:num_drafts]) if request.edits else b""
                 for request, _, num_drafts in samplers]
        users = [i for i, (request, _, _) in enumerate(samplers) if request.params.logits_processor]
        if edits := bytearray().join(parts):
            starts = array.array("q", [0, *accumulate(len(part) // 4 for part in parts)])
            starts, edits = torch.frombuffer(starts, dtype=torch.int64), torch.frombuffer(edits, dtype=torch.float64)
            logits = kernels.edit_logits(logits, self._send(starts), self._send(edits).view(-1, 4))
        elif users:  # they may write into what they are given
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        for i in users:
            request, _, num_drafts = samplers[i]
            try:
                row = request.params.logits_processor(request.tokens + request.drafts[:num_drafts], logits[i])
                if not isinstance(row, torch.Tensor) or row.shape != logits[i].shape:
                    raise ValueError(f"returned {getattr(row, 'shape', row)!r} instead of logits {tuple(logits[i].shape)}")
                logits[i] = row
                request.failures.pop(len(request.tokens) + num_drafts, None)  # that was after another draft
            except Exception as error:  # the user's, and no concern of the others in the batch
                request.failures[len(request.tokens) + num_drafts] = f"logits_processor: {error!r}"
                logits[i] = math.nan
        return logits

    def commit(self, plan: list[tuple[Request, int]], tokens: list[int], logprobs: list[dict | None]) -> list[Request]:
        """Record what the step computed, append the sampled tokens, and end those requests that are done.

        Returns those that got a token or ended. The lists are in the order of `pack`'s samplers.
        """
        sampled, results = [], zip(tokens, logprobs)
        for request, n in plan:
            drafts = request.drafts
            if self.scheduler.advance(request, n - len(drafts)):
                for sample in self.scheduler.fork(request):
                    token, more = next(results)
                    if sample.search is None:
                        self._append(sample, token, more)
                        sampled.append(sample)
                    elif sample in sample.search.scores:  # in the first round only one of them is
                        sample.search.options[sample] = more
                if drafts:
                    self._verify(request, drafts.copy(), list(islice(results, len(drafts))))
        for search in dict.fromkeys(request.search for request, _ in plan if request.search):
            sampled += self._go_on(search)
        return sampled

    def _go_on(self, search: BeamSearch) -> list[Request]:
        """End a round of a beam search if all its hypotheses are ready. Returns the samples if that changed them."""
        samples = search.request.samples
        failed = [sample for sample, options in search.options.items() if options is None]
        if len(search.options) == len(search.scores) and not (search.ended or any(search.options.values())):
            failed += search.options  # not one of them has anywhere to go
        if failed:
            self._append(failed[0], -1, None)  # sets its error
            for sample in samples:
                sample.error = failed[0].error
            self.abort(search.request)
        elif len(search.options) < len(search.scores):
            for sample in search.options:
                self.scheduler.park(sample)
            return []
        elif chosen := search.choose():
            self._next_round(search, chosen)
        else:
            self._end_search(search)
        for sample in samples:
            sample.detokenizer = None  # what it has read may be another hypothesis's text
        return samples

    def _next_round(self, search, chosen):
        samples = sorted(search.request.samples, key=lambda sample: sample.status != RUNNING)  # who has a place keeps it
        parents, tokens, scores = zip(*chosen)
        self.scheduler.branch(samples, parents, tokens)
        self.counts["output_tokens"] += len(chosen)
        search.scores = dict(zip(samples, scores))
        for sample in samples[len(chosen):]:
            self.scheduler.park(sample)

    def _end_search(self, search):
        """Give the samples what the search has found, the best one first. It may have found fewer than n."""
        for sample, found in zip_longest(search.request.samples, search.ended):
            if found:
                _, sample.cumulative_logprob, sample.tokens, reason = found
                self.counts["output_tokens"] += 1  # its last one; those before were counted as they came
            else:
                sample.cumulative_logprob, sample.tokens, reason = -math.inf, sample.tokens[: sample.num_prompt], "abort"
            self._finish(sample, reason)

    def _verify(self, request, drafts, results):
        """Append what was sampled after each draft, as long as the drafts are what was sampled before them."""
        saved = 0
        while self.scheduler.accept(request):
            self._append(request, *results[saved])
            saved += 1
        # The token that ended a request may have been a draft too: a true one, but nothing was sampled after it.
        accepted = saved + (not request.error and request.tokens[-1:] == drafts[saved : saved + 1])
        self.counts["drafted"] += len(drafts)
        self.counts["accepted"] += accepted
        self.counts["saved_steps"] += saved
        self._adapt(request, accepted, min(accepted + 1, len(drafts)))

    def _append(self, request, token, logprobs):
        if token < 0 or request.error:
            request.error = request.error or request.failures.get(len(request.tokens)) or (
                f"request {request.samples[0].arrival}: the model's logits at position {len(request.tokens) - 1} are not "
                f"finite numbers, or every token is banned")
            # Its keys and values may be at fault, so no other request must find them. It has no table if it was preempted
            # before its token was read: then what matches all its tokens (and one more, which `match` leaves over).
            self.pool.withdraw(request.block_table or self.pool.match([*request.tokens, token], request.root))
            self._finish(request, "abort")
            return
        request.tokens.append(token)
        self.counts["output_tokens"] += 1
        if logprobs is not None:
            request.logprobs.append(logprobs)
        if token in request.stop_ids or request.params.stop and self._read(request).stopped:
            self._finish(request, "stop")
        elif request.num_output >= request.max_tokens:
            self._finish(request, "length")

    # ---- text ----

    def _read(self, request: Request) -> Detokenizer:
        """The request's detokenizer, brought up to date with its tokens: only those whose text is asked for pay for it."""
        if request.detokenizer is None:
            request.detokenizer = Detokenizer(self.tokenizer, request.tokens[: request.num_prompt], request.params.stop)
        reader, end = request.detokenizer, len(request.tokens) - request.ended_by_token
        for token in request.tokens[request.num_prompt + reader.num_tokens : end]:
            reader.push(token, may_stop=reader.num_tokens + 1 >= request.params.min_tokens)
        return reader

    def text(self, request: Request) -> str:
        """The text generated so far, as far as it can be shown; all of it once the request is finished."""
        if self.tokenizer is None:
            return ""
        reader = self._read(request)
        if request.status == FINISHED:
            reader.finish()
        return reader.text

    def output(self, request: Request) -> Output:
        """What `generate` returns for a finished request."""
        return Output(self.text(request), request.tokens[request.num_prompt:], request.finish_reason,
                      request.tokens[: request.num_prompt],
                      request.logprobs if request.params.logprobs is not None else None, request.prompt_logprobs,
                      request.cumulative_logprob)


def top_logprobs(row: torch.Tensor, chosen: int, k: int) -> dict[int, float]:
    """{token: log-probability} of the k likeliest tokens of a row [V], likeliest first, and of the chosen one."""
    values, tokens = row.topk(min(k, len(row)))
    return {**dict(zip(tokens.tolist(), values.tolist())), chosen: row[chosen].item()}


def pick_device(device: str) -> torch.device:
    """The device by name; "auto" is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device: {device} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(dtype: str, device: torch.device, stored: str) -> torch.dtype:
    """The dtype by name. "auto" is as stored on a GPU; on a CPU bfloat16 where it computes in that, else float32."""
    if dtype == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
        dtype = stored
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def keep_freed_memory() -> None:
    """Have the C library keep large buffers that are freed. Its default is to hand them back to the operating system at
    once, and every step would pay for having them zeroed and mapped again. Only glibc has the knob.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):
        pass


def release_threads() -> None:
    """Have OpenMP end the worker threads of the calling thread, before another thread, with workers of its own, begins to
    compute. Once there are more of them than cores, they all stop spinning while they wait, and each operation has to wake
    them up: on two cores that took more than a quarter of a small model's throughput.
    """
    try:
        ctypes.CDLL(None).omp_pause_resource_all(1)  # omp_pause_soft: they come back when needed
    except (OSError, AttributeError, TypeError):
        pass


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself, rather than through float32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def free_memory() -> int:
    """Bytes of main memory that are available now."""
    try:
        return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return 4 << 30  # no such file outside Linux; a modest guess


# ---------------------------------------------------------------------------------------------------------------------
# The HTTP server
# ---------------------------------------------------------------------------------------------------------------------
#
# Two threads. The engine thread owns the LLM and is the only one that touches it; the loop thread runs asyncio and does
# all reading, checking and writing. A thread per client would have two hundred of them fight the step for Python's lock.
#
#     client ◄──HTTP──► Connection ──Job──► commands ──► EngineThread: obey, LLM.step(), report
#                            ▲                                  │
#                            └──────── Job's mailbox ◄──────────┘ one batch of updates a step
#
# A client that reads slowly holds up only its own task, and what waits for it is at most its own max_tokens.
# Writing an event costs as much as computing a few tokens of a small model, and takes that lock from the step. So first
# tokens and ends are sent at once, and what lies between as often as STREAM_SHARE of the loop thread's time allows: token
# by token for a few clients, several tokens an event for hundreds.

MAX_HEAD = 32 << 10  # bytes of request line and headers
MAX_ENTRIES = {"stop": 16, "stop_token_ids": 1024, "logit_bias": 1024}  # all are looked through for every token
MAX_LOGPROBS = 20  # of a token; hundreds for each fill the memory, and writing them keeps the loop from all others
SHORT_BODY, LONG_BODY = 2000, 64 << 10  # bytes; shorter ones are parsed by the loop thread, others by one of two threads
SPARE_FILES = 64  # beside the connections: the log, the model, surplus clients while they are refused
PAGE = Path(__file__).parent / "tutorial" / "page.html"
STREAM_SHARE, STREAM_GAP = 0.025, 0.1  # the loop thread's share of the time, but events at most so many seconds apart
LOOKS_A_SECOND, LOOKS_SHARE = 20, 0.015  # states for the page: at most so many, in at most this share of the time
SHOWN_STEPS, SHOWN_WAITING = 120, 32  # steps and waiting requests in each state
CACHED_BLOCK, SHARED_BLOCK, SCRATCH_BLOCK = -1, -2, -3  # owners of blocks; 0: free, i: the i-th running request
STEP_FAILED = "the step that computed this request failed; the server's log says why"

SAMPLING_FIELDS = {f.name for f in fields(SamplingParams)} - {"prompt_logprobs", "logits_processor", "beam_search",
                                                              "length_penalty"}
COMMON_FIELDS = SAMPLING_FIELDS | {"stream", "stream_options", "priority", "cache_salt", "user"}
COMPLETION_FIELDS = COMMON_FIELDS | {"prompt", "echo"}
CHAT_FIELDS = COMMON_FIELDS | {"messages", "top_logprobs", "max_completion_tokens"}
HARMLESS_FIELDS = {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
                   "prompt_cache_retention"}  # OpenAI's, ignored: they do not change the answer
NEUTRAL_VALUES = {"best_of": 1, "suffix": "", "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
                  "modalities": ["text"]}  # of fields that are not built, what some clients send where nothing is wanted


class HTTPError(Exception):
    """An answer that is an error. Its body has OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message[:1000], param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @classmethod
    def refusal(cls, error: ValueError) -> HTTPError:
        """400 for a ValueError, whose message begins with the field's name wherever there is one."""
        named = re.match(r"(\w{1,100}): ", str(error))
        return cls(400, str(error), named and named[1])

    @classmethod
    def failure(cls, error: Exception, message: str) -> HTTPError:
        """500 for an exception whose text is for the log, not for the client. An HTTPError stays what it is."""
        if isinstance(error, cls):
            return error
        log.error("a request failed", exc_info=error)
        return cls(500, message)

    def body(self) -> dict:
        """The JSON object that OpenAI's clients expect."""
        kind = "server_error" if self.status >= 500 else {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def parse_json(body: bytes) -> dict:
    """A request's JSON object. ValueError for what lenient parsers let through: NaN, a key twice, half a surrogate pair."""
    def unique(items):
        if len(result := dict(items)) != len(items):
            raise ValueError("a key occurs twice in an object")
        return result

    def refuse_constant(name):
        raise ValueError(f"{name} is not a number in JSON")

    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
        if re.search(rb"\\u[dD]", body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise ValueError(f"body: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"body: must be a JSON object, got {type(value).__name__}")
    return value


def check_fields(body: dict, known: set[str]) -> None:
    """ValueError that names the first field which is unknown. One that is null is as good as absent."""
    for name, value in body.items():
        if value is not None and name not in known and name not in HARMLESS_FIELDS and value != NEUTRAL_VALUES.get(name):
            close = difflib.get_close_matches(name[:100], known, 1)
            raise ValueError(f"{name[:100]}: this server has no such field" + (f"; {close[0]} is one" if close else ""))


def flag(body: dict, name: str) -> bool:
    """A field that is true or false; absent and null are false."""
    value = body.get(name)
    if not isinstance(value, (bool, type(None))):
        raise ValueError(f"{name}: must be true or false, got {value!r}")
    return bool(value)


def parse_sampling(body: dict, is_chat: bool) -> SamplingParams:
    """SamplingParams from OpenAI's fields. Errors name the client's field where ours is called otherwise."""
    options = {name: body[name] for name in SAMPLING_FIELDS if body.get(name) is not None}
    client_names = {}
    for name, most in MAX_ENTRIES.items():
        if isinstance(options.get(name), (list, dict)) and len(options[name]) > most:
            raise ValueError(f"{name}: at most {most} entries are allowed, got {len(options[name])}")
    if isinstance(bias := options.get("logit_bias"), dict):  # JSON's keys are strings
        if not all(re.fullmatch("[0-9]{1,18}", token) for token in bias):
            raise ValueError("logit_bias: its keys must be token ids")
        options["logit_bias"] = {int(token): value for token, value in bias.items()}
    if is_chat:
        if (limit := body.get("max_completion_tokens")) is not None:
            if options.setdefault("max_tokens", limit) != limit:
                raise ValueError("max_completion_tokens: differs from max_tokens, which is its old name")
            client_names["max_tokens"] = "max_completion_tokens"
        wanted, top = flag(body, "logprobs"), body.get("top_logprobs")
        if top is not None and not wanted:
            raise ValueError("top_logprobs: needs logprobs to be true")
        options["logprobs"], client_names["logprobs"] = (0 if top is None else top) if wanted else None, "top_logprobs"
    else:
        options.setdefault("max_tokens", 16)  # OpenAI's default
        if flag(body, "echo"):
            options["prompt_logprobs"] = options.get("logprobs")
    try:
        if isinstance(options.get("logprobs"), int) and options["logprobs"] > MAX_LOGPROBS:
            raise ValueError(f"logprobs: must be at most {MAX_LOGPROBS}, got {options['logprobs']}")
        return SamplingParams(**options)
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise ValueError(f"{client_names.get(name, name)}:{rest}") from None


def parse_prompts(prompt) -> list[str | list[int]]:
    """The prompts of a completion: a text, a list of texts, a list of token ids, or a list of such lists."""
    def is_ids(value):
        return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)

    if isinstance(prompt, str) or is_ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt and (all(isinstance(p, str) for p in prompt) or all(map(is_ids, prompt))):
        return prompt
    raise ValueError("prompt: must be a text, a list of texts, a list of token ids, or a list of such lists")


def parse_messages(messages) -> list[dict]:
    """A chat's messages, each content made one text. What the model cannot be shown is refused, not dropped."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: must be a list of at least one message")
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages: number {i} must be an object with a role")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.keys() == {"type", "text"} and
                                             part["type"] == "text" and isinstance(part["text"], str) for part in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ValueError(f"messages: the content of number {i} must be a text, or a list of parts of type text")
        surplus = [name for name, value in message.items() if name not in ("role", "content", "name") and value]
        if surplus:
            raise ValueError(f"messages: {surplus[0][:100]} in number {i} is not supported")
        plain.append({name: value for name, value in {**message, "content": content}.items() if value is not None})
    return plain


def encode(tokenizer: Tokenizer, source: str | list) -> list[int]:
    """Token ids of a text or of a chat's messages; token ids as they are."""
    if isinstance(source, str):
        return tokenizer.encode(source)
    if isinstance(source[0], int):
        return source
    try:
        return tokenizer.apply_chat_template(source)
    except ValueError as error:  # what the template refuses is the fault of the field `messages`
        raise ValueError(str(error).replace("chat: ", "messages: ", 1)) from None


class Update(NamedTuple):
    """What one or more steps added to a sample: news for its client."""

    index: int  # which choice of the answer
    text: str
    num_tokens: int
    logprobs: list[tuple[int, dict[int, float] | None]]  # (token, log-probabilities at its place), of all in the text
    finish_reason: str | None
    is_cut: bool  # a stop string ended it: the last tokens reach beyond the text


@dataclass
class Progress:
    """How far a sample is: when it last got a token, how many it had then, and how much of them its client was sent."""

    job: Job
    index: int  # which choice of the answer
    last_token_time: float
    num_output: int = 0
    num_sent: int = 0
    num_chars: int = 0  # in what was sent
    is_over: bool = False


class Job:
    """One POST: what it asks of the engine, and the mailbox for what comes back."""

    def __init__(self, body: dict, is_chat: bool):
        self.is_chat, self.arrival_time = is_chat, time.perf_counter()
        self.params = parse_sampling(body, is_chat)
        self.source = [parse_messages(body.get("messages"))] if is_chat else parse_prompts(body.get("prompt"))
        self.stream, self.echo = flag(body, "stream"), not is_chat and flag(body, "echo")
        options = body.get("stream_options")
        if options is not None and not (self.stream and isinstance(options, dict) and options.keys() <= {"include_usage"}):
            raise ValueError("stream_options: may hold include_usage, and needs stream to be true")
        self.include_usage = flag(options or {}, "include_usage")
        self.priority = 0 if body.get("priority") is None else body["priority"]
        self.cache_salt, self.tenant = body.get("cache_salt"), body.get("user")
        if not isinstance(self.tenant, (str, type(None))):
            raise ValueError(f"user: must be a text, got {self.tenant!r}")
        self.num_samples = len(self.source) * self.params.n
        self.prompts: list[list[int]] = []  # token ids, once `tokenize` has run
        self.requests: list[Request] = []  # the engine thread's
        # The mailbox, the loop thread's: what has come and was not taken yet, and whether there is anything.
        self.updates, self.error, self.has_news = [], None, asyncio.Event()

    def tokenize(self, llm: LLM) -> None:
        """Texts to token ids, in any thread. A chat that does not say max_tokens gets all the room that is left."""
        self.prompts = [encode(llm.tokenizer, source) for source in self.source]
        if self.is_chat and self.params.max_tokens is None:
            self.params.max_tokens = max(1, self.params.min_tokens, llm.longest_request - len(self.prompts[0]))

    def deliver(self, item: Update | HTTPError) -> None:
        """Put something into the mailbox. Nothing comes after an error."""
        if isinstance(item, HTTPError):
            self.error = item
        else:
            self.updates.append(item)
        self.has_news.set()

    async def take(self) -> list[Update]:
        """Everything that came since the last call, as soon as there is something. Raises the error once that is taken."""
        await self.has_news.wait()
        updates, self.updates = self.updates, []
        if self.error is None:
            self.has_news.clear()
        elif not updates:
            raise self.error
        return updates


class Histogram:
    """Seconds, counted in buckets. Bounds are upper and inclusive, as Prometheus has them."""

    BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

    def __init__(self):
        self.counts, self.sum = [0] * (len(self.BOUNDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self.sum += seconds

    def render(self, name: str) -> list[str]:
        """Lines of Prometheus' text format: buckets are cumulative, the last one holds all."""
        total = list(accumulate(self.counts))
        return [*(f'{name}_bucket{{le="{bound}"}} {n}' for bound, n in zip((*self.BOUNDS, "+Inf"), total)),
                f"{name}_sum {self.sum:.6f}", f"{name}_count {total[-1]}"]


class EngineThread(threading.Thread):
    """The only one to touch the LLM. Commands come in through a queue, and are obeyed between two steps."""

    def __init__(self, llm: LLM, loop: asyncio.AbstractEventLoop, on_fatal: Callable[[], None]):
        super().__init__(name="nanoserve engine", daemon=True)
        self.llm, self.loop, self.on_fatal = llm, loop, on_fatal
        self.commands: queue.SimpleQueue[Callable | None] = queue.SimpleQueue()  # None ends the thread
        self.progress: dict[Request, list[Progress]] = {}  # of the samples of each request that has a client
        self.end_reason: str | None = None  # why nothing is computed any more
        self.ttft, self.itl, self.e2e = Histogram(), Histogram(), Histogram()
        self.num_prompt_tokens = self.num_failed = 0
        self.is_paused, self.delay, self.next_step = False, 0.0, 0.0  # delay: seconds from one step's start to the next's
        self.history: deque[list[int]] = deque(maxlen=SHOWN_STEPS)  # [prefill, decode, drafts] of each of the last steps
        self.unsent: dict[Request, Progress] = {}  # samples with news that their clients were not sent yet
        self.next_due = 0.0  # when all of it is to be sent; infinity while that is under way
        self.loop_seconds = 0.0  # the loop thread's CPU time when that was last done

    def run(self) -> None:
        """Obey and step in turn, until the command None."""
        while True:
            try:
                try:
                    command = self.commands.get(timeout=self._seconds_to_step())
                except queue.Empty:
                    command = self._advance
                if not command:
                    return
                command()
            except Exception as error:
                log.error("the engine failed", exc_info=error)
                self.on_fatal()
                self.unsent.clear()
                self.end("the engine failed; the server's log says how")

    def _seconds_to_step(self) -> float | None:
        """Seconds until the next step is due. None: only a command can change anything, even after the end: whoever asks
        must get an answer.
        """
        if self.end_reason or self.is_paused or not self.llm.has_work():
            return None
        return max(0.0, self.next_step - time.perf_counter()) if self.delay else 0.0

    def _advance(self):
        counts, before = self.llm.counts, self.llm.counts.copy()
        self.next_step = time.perf_counter() + self.delay
        self._report(self._step())
        prefill, drafts, rows = (counts[name] - before[name] for name in ("prompt_tokens", "drafted", "computed_tokens"))
        self.history.append([prefill, rows - prefill - drafts, drafts])

    def _step(self) -> list[Request]:
        """A step. If it fails, its requests get an error and the others go on, unless the device is gone."""
        try:
            return self.llm.step()
        except Exception as error:
            is_cuda = isinstance(error, RuntimeError) and "CUDA" in str(error)
            if isinstance(error, torch.AcceleratorError) or (is_cuda and not isinstance(error, torch.OutOfMemoryError)):
                raise
            log.error("a step failed", exc_info=error)
            return self.llm.drop_step(STEP_FAILED)

    # ---- commands: the loop thread puts them ----

    def add(self, job: Job) -> None:
        """Queue a job's prompts, all or none."""
        try:
            if self.end_reason:
                raise HTTPError(503, self.end_reason)
            n = job.params.n
            for i, prompt in enumerate(job.prompts):
                request = self.llm.add_request(prompt, job.params, job.priority, job.cache_salt, job.tenant)
                job.requests.append(request)
                self.progress[request] = [Progress(job, i * n + k, job.arrival_time) for k in range(n)]
            self.num_prompt_tokens += sum(map(len, job.prompts))
        except Exception as error:
            self.forget(job)
            told = HTTPError.refusal(error) if isinstance(error, ValueError) else HTTPError.failure(error, STEP_FAILED)
            self._post([(job, told)])

    def forget(self, job: Job) -> None:
        """The job has its answer, or an error, or its client has left: abort whatever is left of it."""
        for request in job.requests:
            self.llm.abort(request)
            self.progress.pop(request, None)
            for sample in request.samples:
                self.unsent.pop(sample, None)

    def snapshot(self) -> dict[str, int]:
        """Counters and state, taken between two steps."""
        return {**self.llm.stats(), "failed": self.num_failed, "admitted_prompt_tokens": self.num_prompt_tokens}

    def look(self) -> tuple[dict, float]:
        """What the page shows, in integers, and the seconds that gathering it took. tutorial/page.html names each field."""
        started, llm, pool, scheduler = time.thread_time(), self.llm, self.llm.pool, self.llm.scheduler
        running, size = scheduler.running, pool.block_size
        lengths = [len(request.block_table) for request in running]
        held = np.fromiter(chain.from_iterable(request.block_table for request in running), np.int32, sum(lengths))
        owner = np.zeros(pool.num_blocks, dtype=np.int32)
        owner[np.fromiter(pool.index.values(), np.int32, len(pool.index))] = CACHED_BLOCK
        owner[held] = np.repeat(np.arange(1, len(running) + 1), lengths)
        owner[np.bincount(held, minlength=pool.num_blocks) > 1] = SHARED_BLOCK
        owner[SCRATCH] = SCRATCH_BLOCK
        ends = np.append(np.flatnonzero(owner[1:] != owner[:-1]), pool.num_blocks - 1)
        runs = np.stack([owner[ends], np.diff(ends, prepend=-1)], 1)  # far fewer than blocks

        def row(request, last_block=0):
            return [request.arrival, request.sample_index, request.width, request.num_prompt, request.num_computed,
                    len(request.tokens), request.num_prompt + request.max_tokens, request.num_preemptions, last_block]

        state = {
            "blocks": runs.ravel().tolist(),
            "running": [row(request, request.num_computed and request.block_table[(request.num_computed - 1) // size])
                        for request in running],
            "waiting": [row(request) for request in scheduler.first_waiting(SHOWN_WAITING)],
            "num_waiting": scheduler.num_waiting,
            "steps": list(self.history),
            "counts": {**llm.counts, "hit_tokens": scheduler.num_hit_tokens, "preemptions": scheduler.num_preemptions,
                       "failed": self.num_failed},
            "is_paused": int(self.is_paused), "delay_ms": round(self.delay * 1000)}
        return state, time.thread_time() - started

    def control(self, is_paused: bool | None = None, delay: float | None = None, step: bool = False) -> None:
        """Pause or go on, take each step so many seconds after the one before, or take one now."""
        self.is_paused = self.is_paused if is_paused is None else is_paused
        self.delay = self.delay if delay is None else delay
        self._report(())
        if step and self.llm.has_work() and not self.end_reason:
            self._advance()

    def end(self, reason: str) -> None:
        """Compute nothing any more. Jobs under way get the reason as their error, later ones are refused."""
        self.end_reason = reason
        news = self._news(list(self.unsent))
        jobs = {first.job for first, *_ in self.progress.values()}
        self._post(news + [(job, HTTPError(503, reason)) for job in jobs])
        self.progress.clear()

    # ---- what steps bring, on its way to the clients ----

    def _report(self, changed):
        """Send what is due of the changed requests and of `unsent`: in one batch, so that a step wakes the loop once."""
        now, urgent = time.perf_counter(), []
        sends_all = self.is_paused or self.delay > 0 or now >= self.next_due  # who looks step by step sees every step
        for request in changed:
            samples = self.progress.get(request.samples[0])
            if not samples or (progress := samples[request.sample_index]).is_over:  # its client has left, or has all of it
                continue
            if request.num_output > progress.num_output:
                (self.itl if progress.num_output else self.ttft).observe(now - progress.last_token_time)
                progress.last_token_time, progress.num_output = now, request.num_output
            self.unsent[request] = progress
            if request.status == FINISHED or not progress.num_sent:
                urgent.append(request)
                sends_all |= request.error is not None  # it ends its job: whatever was kept back has to go first
        self._post(self._news(list(self.unsent) if sends_all else urgent), sets_pace=sends_all)

    def _news(self, requests):
        """[(job, an Update or its error), ...] of these requests. Errors come last, and end their jobs."""
        news, errors = [], {}
        for request in requests:
            if (progress := self.unsent.pop(request, None)) is None:
                continue
            job, progress.is_over = progress.job, request.status == FINISHED
            is_whole = progress.is_over and not request.error
            try:
                if is_whole or (job.stream and request.num_output > progress.num_sent):
                    news.append((job, self._update(progress, request)))
                if is_whole:
                    self.e2e.observe(progress.last_token_time - job.arrival_time)
                elif request.error:
                    raise HTTPError(504 if request.expired else 500, request.error)
            except Exception as error:
                errors[job] = HTTPError.failure(error, STEP_FAILED)
                self.num_failed += not request.expired
        for job in errors:
            self.forget(job)
        return [*news, *errors.items()]

    def _update(self, progress, request) -> Update:
        text, logprobs, sent = self.llm.text(request), [], progress.num_sent
        if request.params.logprobs is not None:
            if sent == 0 and request.params.prompt_logprobs is not None:
                logprobs += zip(request.tokens, request.prompt_logprobs)
            end = len(request.tokens) - request.ended_by_token
            logprobs += zip(request.tokens[request.num_prompt + sent : end], request.logprobs[sent:])
        update = Update(progress.index, text[progress.num_chars:], request.num_output - sent, logprobs,
                        None if request.error else request.finish_reason, request.detokenizer.stopped)
        progress.num_sent, progress.num_chars = request.num_output, len(text)
        return update

    def _post(self, news, sets_pace=False):
        def deliver():
            for job, item in news:
                job.deliver(item)
            if sets_pace:  # the more time the loop has spent since the last one, on whatever, the later the next one
                before, self.loop_seconds = self.loop_seconds, time.thread_time()
                self.next_due = time.perf_counter() + min(STREAM_GAP, (self.loop_seconds - before) / STREAM_SHARE)

        if news:
            if sets_pace:
                self.next_due = math.inf
            self.loop.call_soon_threadsafe(deliver)


class Choice:
    """One sample as its client sees it: the text so far, and the log-probabilities of the tokens that it shows."""

    def __init__(self, tokenizer: Tokenizer, echo: str, start: int, is_written: list[bool]):  # see `echo_of`
        self.tokenizer, self.num_tokens, self.finish_reason = tokenizer, 0, None
        self._echo, self._num_chars = echo, 0  # what its text begins with; how much of it was taken
        self._start, self._decoder = start, codecs.getincrementaldecoder("utf-8")("replace")
        self._is_written = iter(is_written)
        self._held: list[tuple[int, dict | None, int]] = []  # (token, log-probabilities, where in the text it starts)

    def take(self, updates: list[Update]) -> tuple[str, list[tuple]]:
        """The text that these add, and its tokens. A token waits for its text: if that is held back, because a stop string
        could be starting, the token must not give it away.
        """
        text, self._echo = self._echo + "".join(update.text for update in updates), ""
        self._num_chars += len(text)
        for token, logprobs in chain(*(update.logprobs for update in updates)):
            self._held.append((token, logprobs, max(0, self._start)))
            # A character in several tokens is the last one's.
            if token not in self.tokenizer.special_ids or next(self._is_written, False):
                self._start += len(self._decoder.decode(self.tokenizer.token_bytes(token)))
        self.num_tokens += sum(update.num_tokens for update in updates)
        self.finish_reason = updates[-1].finish_reason
        end = self._num_chars if self.finish_reason is None or updates[-1].is_cut else math.inf
        n = bisect.bisect_left(self._held, end, key=lambda entry: entry[2])
        entries, self._held = self._held[:n], self._held[n:]
        return text, entries


def echo_of(tokenizer: Tokenizer, source: str | list[int], prompt: list[int]) -> tuple[str, int, list[bool]]:
    """A prompt as an answer echoes it: its text; where in it the first of its tokens starts, which is below 0 if the text
    lacks the space that they begin with; and for each of its special tokens whether the text has it, as a chat that the
    client has rendered does.
    """
    echo, shown, is_written, at = source if isinstance(source, str) else tokenizer.decode(source), bytearray(), [], 0
    for token in prompt:
        piece = tokenizer.token_bytes(token)
        if token in tokenizer.special_ids:
            text = piece.decode("utf-8", "replace")
            found = echo.find(text, at) if isinstance(source, str) else -1
            is_written.append(found >= 0)
            if found < 0:
                continue
            at = found + len(text)
        shown += piece
    return echo, len(echo) - len(shown.decode("utf-8", "replace")), is_written


class Answer:
    """A job's answer in OpenAI's format: whole, or as the events of a stream."""

    def __init__(self, job: Job, model: str, tokenizer: Tokenizer):
        self.job, self.tokenizer = job, tokenizer
        kind = ("chat.completion" + ".chunk" * job.stream) if job.is_chat else "text_completion"
        # The end of the id says which request of the engine this is, the first of them: the page shows them by number.
        name = f"{'chatcmpl' if job.is_chat else 'cmpl'}-{secrets.token_hex(12)}-{job.requests[0].arrival}"
        self.frame = {"id": name, "object": kind, "created": int(time.time()), "model": model}
        self.choices: list[Choice] = []
        for source, prompt in zip(job.source, job.prompts):
            echo = echo_of(tokenizer, source, prompt) if job.echo else ("", 0, [])
            self.choices += [Choice(tokenizer, *echo) for _ in range(job.params.n)]

    @property
    def is_finished(self) -> bool:
        """Whether every choice has come to its end."""
        return all(choice.finish_reason for choice in self.choices)

    def opening(self) -> list[dict]:
        """What the stream of a chat begins with."""
        role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._chunk({"index": i, **role}) for i in range(len(self.choices))] if self.job.is_chat else []

    def chunks(self, updates: list[Update]) -> list[dict]:
        """A chunk for each choice that has something new, the usage after the last. Whatever a slow reader has not taken
        comes in one.
        """
        by_choice: dict[int, list[Update]] = {}
        for update in updates:
            by_choice.setdefault(update.index, []).append(update)
        choices = [self._choice(i, group) for i, group in by_choice.items()]
        chunks = [self._chunk(choice) for choice in choices if choice]
        if self.job.include_usage and self.is_finished:
            chunks.append({**self.frame, "choices": [], "usage": self.usage()})
        return chunks

    def whole(self, updates: list[Update]) -> dict:
        """The answer that is not streamed, from one update for each choice."""
        choices = [self._choice(update.index, [update]) for update in sorted(updates)]
        return {**self.frame, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Exact: every prompt once, however many samples it has; the token that ended a sample counts."""
        prompt, output = sum(map(len, self.job.prompts)), sum(choice.num_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def _chunk(self, choice):
        return {**self.frame, "choices": [choice], **({"usage": None} if self.job.include_usage else {})}

    def _choice(self, index, updates) -> dict | None:
        """What these updates add to a choice; None if that is nothing to be shown."""
        text, entries = self.choices[index].take(updates)
        reason = self.choices[index].finish_reason
        if not (text or entries or reason):
            return None
        shown = {"text": text}
        if self.job.is_chat and self.job.stream:
            shown = {"delta": {"content": text} if text else {}}
        elif self.job.is_chat:
            shown = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **shown, "logprobs": self._logprobs(entries), "finish_reason": reason}

    def _logprobs(self, entries):
        k = self.job.params.logprobs
        if k is None or not entries:
            return None

        def text(token):
            return self.tokenizer.token_bytes(token).decode("utf-8", "replace")

        def value(logprob):  # JSON has no infinity; this is what OpenAI says instead
            return max(-9999.0, logprob)

        if self.job.is_chat:
            def describe(token, logprob):
                return {"token": text(token), "logprob": value(logprob), "bytes": list(self.tokenizer.token_bytes(token))}

            return {"content": [{**describe(token, top[token]),
                                 "top_logprobs": [describe(*pair) for pair in list(top.items())[:k]]}
                                for token, top, _ in entries], "refusal": None}
        # Several tokens can have the same text, being parts of characters: the likeliest, which comes first, stands.
        tops = [top and {text(token): value(p) for token, p in reversed(top.items())} for _, top, _ in entries]
        return {"tokens": [text(token) for token, _, _ in entries],
                "token_logprobs": [top and value(top[token]) for token, top, _ in entries],
                "top_logprobs": tops if k else None, "text_offset": [start for _, _, start in entries]}


class Connection(asyncio.Protocol):
    """One client's connection: HTTP/1.1, strictly, one request after the other.

    The event loop calls the first methods when something happens; a task, `run`, reads and answers. It waits for its
    client in one place, `_until`; while it waits for the engine or a thread instead, the client is watched.
    """

    REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/1\.([01])")
    HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")
    ONCE = ("content-length", "transfer-encoding", "host", "authorization", "content-type")
    GONE = (OSError, asyncio.TimeoutError)

    def __init__(self, server: Server):
        self.server, self.received = server, bytearray()
        self.has_left = self.is_lost = False  # it sends no more; it cannot be written to either
        self.is_full = self.is_late = False  # it has much to read before more is written; `_until` has waited long enough
        self.is_watched = self.is_unread = False  # see `watch`; it has sent, or will, what is not going to be read
        self.keep_alive = self.is_idle = True  # another request may come; none is being read or answered
        self.is_head = self.is_http10 = self.is_streaming = False  # the request's method and version; its answer's state
        self.body_time, self.length = 0.0, 0  # of its request's body: when it was there, and its bytes
        self._change = server.loop.create_future()  # what the task waits for

    # ---- what the loop calls ----

    def connection_made(self, transport: asyncio.Transport) -> None:
        is_surplus = len(self.server.connections) >= self.server.max_connections
        self.transport, self.task = transport, self.server.loop.create_task(self.run(is_surplus))
        if not is_surplus:
            self.server.connections[self.task] = self

    def data_received(self, data: bytes) -> None:
        if self.is_watched:
            self.keep_alive, self.is_unread = False, True
            return
        self.received += data
        if len(self.received) > MAX_HEAD + self.server.max_body:  # more than any request
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self.has_left = True
        if self.is_watched:
            self.task.cancel()
        self._wake()
        return True  # True: leave it open, it may still read

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost, self.is_full = True, False
        self.eof_received()

    def pause_writing(self) -> None:
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False
        self._wake()

    def _wake(self, is_late=False):
        self.is_late |= is_late
        if not self._change.done():
            self._change.set_result(None)

    # ---- the task ----

    async def run(self, is_surplus: bool) -> None:
        """Answer requests until either side has had enough."""
        try:
            if is_surplus:
                self.is_unread = True
                await self._send_error(HTTPError(503, "there are too many connections", Retry_After="1"))
            while self.keep_alive:
                self.is_idle = True
                self.transport.resume_reading()
                if self.received:
                    await asyncio.sleep(0)  # one that sends ahead takes turns with the others
                await self._until(lambda: self.received or self.has_left)
                if not self.received:
                    break
                self.is_idle = False
                try:
                    await self._answer()
                except EOFError:  # the client has left, but the answer to an earlier request may still be on its way
                    break
                except asyncio.CancelledError:
                    if not self.has_left or self.server.is_stopping:
                        raise
                    break  # the same, while it was watched
                except self.GONE:
                    raise
                except Exception as error:
                    await self._send_error(HTTPError.failure(error, "the server failed; its log says how"))
            if self.is_unread:
                await self._linger()
            self.transport.close()
            await self._until(lambda: self.is_lost)
        except (*self.GONE, asyncio.CancelledError):
            pass  # the client has left or sleeps, or the server stops
        finally:
            self.server.connections.pop(self.task, None)
            if not self.is_lost:  # asyncio cannot abort what has closed after its last byte was sent
                self.transport.abort()

    async def _until(self, condition, seconds=math.inf):
        """Wait until the event loop's calls make the condition true. asyncio.TimeoutError if that takes too long."""
        if condition():
            return
        self.is_late = False
        timer = self.server.loop.call_later(min(seconds, self.server.timeout), self._wake, True)
        try:
            while not condition():
                if self.is_late:
                    raise asyncio.TimeoutError
                self._change = self.server.loop.create_future()
                await self._change
        finally:
            timer.cancel()

    async def send(self, data: bytes) -> None:
        """Write, and wait while the client has much to read. asyncio.TimeoutError after `timeout` seconds."""
        if self.is_lost:
            raise ConnectionResetError
        self.transport.write(data)
        await self._until(lambda: not self.is_full)

    async def respond(self, content: dict | str, status: int = 200, **headers: str) -> None:
        """A whole answer: an object as JSON, a text as it is."""
        self.is_watched = False
        kind = "text/plain; version=0.0.4; charset=utf-8" if isinstance(content, str) else "application/json"
        body = content.encode() if isinstance(content, str) else to_json(content)
        head = self._head(status, {"Content-Type": kind, "Content-Length": str(len(body)), **headers})
        await self.send(head + (b"" if self.is_head else body))

    async def send_events(self, events: Iterable[dict | bytes], are_last: bool = False) -> None:
        """Server-sent events, objects or their JSON. The first call begins the stream; the last adds the mark that it is
        whole.
        """
        data = b"".join(b"data: %s\n\n" % (event if isinstance(event, bytes) else to_json(event)) for event in events)
        if are_last:
            data += b"data: [DONE]\n\n"
        if data and not self.is_http10:
            data = b"%x\r\n%s\r\n%s" % (len(data), data, b"0\r\n\r\n" if are_last else b"")
        if not self.is_streaming:
            headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
            data = self._head(200, headers if self.is_http10 else {**headers, "Transfer-Encoding": "chunked"}) + data
        self.is_streaming = not are_last
        self.is_watched = self.is_watched and not are_last
        if data:
            await self.send(data)

    def watch(self) -> None:
        """From now until its answer is written, or the end of its stream, the client's leaving cancels the task. What it
        sends before that is dropped, and the connection closes after the answer.
        """
        if self.has_left:
            raise EOFError
        early, self.received, self.is_watched = self.received, bytearray(), True
        if early:
            self.data_received(early)
            self.transport.resume_reading()

    async def read(self, function: Callable, *args):
        """function(*args) in a thread, with the client watched, unless the body is short: the loop is for all clients.

        Whatever a client can get wrong is found out in here. A ValueError anywhere else is the server's own.
        """
        try:
            if self.length < SHORT_BODY:
                return function(*args)
            self.watch()
            thread = self.server.text_threads[self.length >= LONG_BODY]  # no prompt waits for megabytes of others
            return await self.server.loop.run_in_executor(thread, function, *args)
        except ValueError as error:
            raise HTTPError.refusal(error) from None
        except RecursionError:  # in parsing it, or in quoting it in a message
            raise HTTPError(400, "body: is nested too deeply") from None

    async def _answer(self):
        """Read one request and have it answered. What is wrong with its head is said before its body is read."""
        self.is_unread, self.is_head = True, False
        method, path, headers = self._parse_head(await self._read_head())
        length = headers.get("content-length", "" if method == "POST" else "0")
        self.is_unread = length != "0" or "transfer-encoding" in headers
        parse, handler = self.server.route(method, path, headers)
        if "transfer-encoding" in headers or not length:
            raise HTTPError(411, "Content-Length: is needed; bodies in chunks are not supported")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise HTTPError(400, "Content-Length: must be one number")
        if int(length) > self.server.max_body:
            raise HTTPError(413, f"body: {length} bytes are more than max_body={self.server.max_body}")
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPError(415, "Content-Type: must be application/json")
        if headers.get("expect", "").lower() == "100-continue" and not self.is_http10:
            await self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await self._arrives("body", lambda: len(self.received) >= int(length))
        body, self.is_unread = self._take(int(length)), False
        self.body_time, self.length = time.perf_counter(), len(body)
        if parse:
            await handler(self, await self.read(lambda: parse(parse_json(body))))
        else:
            await handler(self)

    async def _read_head(self) -> str:
        await self._arrives("headers", lambda: b"\r\n\r\n" in self.received or len(self.received) > MAX_HEAD)
        if not 4 <= (length := self.received.find(b"\r\n\r\n") + 4) <= MAX_HEAD:
            raise HTTPError(431, f"headers: are longer than {MAX_HEAD} bytes")
        return self._take(length)[:-4].decode("latin-1")

    async def _arrives(self, what, condition):
        try:
            await self._until(lambda: condition() or self.has_left)
        except asyncio.TimeoutError:
            raise HTTPError(408, f"{what}: did not arrive within {self.server.timeout:g} seconds") from None
        if not condition():
            raise EOFError

    def _take(self, length) -> bytes:
        data = bytes(self.received[:length])
        del self.received[:length]
        return data

    def _parse_head(self, head) -> tuple[str, str, dict[str, str]]:
        """Method, path and headers, with names in lower case. What two parsers might read differently is refused."""
        self.keep_alive, self.is_head = False, head.startswith("HEAD ")  # until the head is known to be sound
        request_line, *lines = head.split("\r\n")
        if not (match := self.REQUEST_LINE.fullmatch(request_line)):
            raise HTTPError(400, "the request line must be a method, a path and HTTP/1.0 or HTTP/1.1")
        method, path, minor = match.groups()
        headers: dict[str, str] = {}
        for line in lines:
            if not (match := self.HEADER.fullmatch(line)):
                raise HTTPError(400, "headers: one is malformed")
            name, value = match[1].lower(), match[2].strip(" \t")
            if name in headers and name in self.ONCE:
                raise HTTPError(400, f"{match[1]}: occurs twice")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        self.is_http10 = minor == "0"
        if not self.is_http10 and "host" not in headers:
            raise HTTPError(400, "Host: is missing")
        self.keep_alive = not self.is_http10 and "close" not in headers.get("connection", "").lower()
        return method, unquote(path.partition("?")[0]), headers

    async def _send_error(self, error):
        """An error as an answer; after the headers of a stream, as its last event, and the stream ends without its mark."""
        self.is_watched = False
        self.server.num_responses[error.status] += self.is_streaming
        if self.is_unread or self.is_streaming:
            self.keep_alive = False
        if self.is_streaming:
            await self.send_events([error.body()])
        else:
            await self.respond(error.body(), error.status, **error.headers)

    async def _linger(self):
        """Read on for a second: closing on unread bytes resets the connection, and takes the answer along."""
        def discard():
            self.received.clear()
            self.transport.resume_reading()
            return self.has_left

        self.transport.write_eof()
        with contextlib.suppress(asyncio.TimeoutError):
            await self._until(discard, 1.0)

    def _head(self, status, headers) -> bytes:
        self.keep_alive = self.keep_alive and not self.server.is_stopping
        self.server.num_responses[status] += 1
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Date: {formatdate(usegmt=True)}",
                 f"Connection: {'keep-alive' if self.keep_alive else 'close'}", "X-Content-Type-Options: nosniff",
                 *(f"{name}: {value}" for name, value in headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


_JSON = json.JSONEncoder(separators=(",", ":"))


def to_json(value) -> bytes:
    """Compact JSON in ASCII."""
    return _JSON.encode(value).encode()


def max_open_files() -> float:
    """How many files and sockets this process may have open."""
    if resource is None:
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


class Server(contextlib.AbstractContextManager):
    """The handle that `serve` returns. `url` is where it listens; `close()` stops it, and the LLM is free again."""

    def __init__(self, llm: LLM, host: str, port: int, *, model_name: str = "nanoserve", api_key: str | None = None,
                 max_queue: int = 1024, max_body: int = 4 << 20, max_connections: int = 1024, timeout: float = 30.0,
                 teach: bool = False):
        if llm.tokenizer is None:
            raise ValueError("serve: this model has no tokenizer, and the API speaks text")
        if api_key == "":
            raise ValueError("api_key: is empty, which would let everybody in")
        if api_key and re.search(r"^ |[\x00-\x1f\x7f]| $", api_key):
            raise ValueError("api_key: has a control character, or a space at an end, and so cannot be sent in a header")
        for name, least, value in (("max_queue", 0, max_queue), ("max_body", 1, max_body),
                                   ("max_connections", 1, max_connections)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: must be a whole number from {least} on, got {value!r}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout: must be a number of seconds above 0, got {timeout!r}")
        if max_connections > (room := max_open_files() - SPARE_FILES):
            max_connections = max(1, room)
            log.info(f"this process may open {max_open_files()} files (ulimit -n): at most {max_connections} connections")
        self.llm, self.model_name, self.api_key = llm, model_name, api_key
        self.max_samples, self.max_body = llm.scheduler.max_batch_requests + max_queue, max_body
        self.max_connections, self.timeout = max_connections, timeout
        self.created, self.num_responses, self.num_samples = int(time.time()), Counter(), 0
        self.connections: dict[asyncio.Task, Connection] = {}
        self.is_stopping = False
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()  # "fatal", and what a signal handler puts there
        # path: (what parses a POST's object, and may raise ValueError; what answers with the result)
        self.routes: dict[str, tuple[Callable | None, Callable]] = {
            "/v1/completions": (functools.partial(self._read_job, is_chat=False), self._complete),
            "/v1/chat/completions": (functools.partial(self._read_job, is_chat=True), self._complete),
            "/tokenize": (self._tokenize, Connection.respond), "/detokenize": (self._detokenize, Connection.respond),
            "/v1/models": (None, self._models), "/health": (None, self._health), "/metrics": (None, self._metrics),
            "/stats": (None, self._stats), "/": (None, self._page), "/events": (None, self._events),
            f"/v1/models/{model_name}": (None, self._model)}
        if teach:
            self.routes["/engine"] = (self._control, Connection.respond)
        self._looking: asyncio.Task | None = None  # the `_look` that all pages wait for
        self._event, self._shown, self._next_look, self._next_beat = b"", None, 0.0, 0.0
        started: concurrent.futures.Future = concurrent.futures.Future()
        release_threads()  # this thread's; from now on the engine thread computes
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(host, port, started)),
                                        name="nanoserve loop", daemon=True)
        self._thread.start()
        self.url = started.result()

    def close(self, drain_seconds: float = 0.0) -> None:
        """Refuse what is new, let what runs finish within so many seconds, abort the rest, and stop. Of several calls the
        first one decides how.
        """
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self.loop.call_soon_threadsafe(lambda: self._closing.done() or self._closing.set_result(drain_seconds))
        self._thread.join()

    def __exit__(self, *_) -> None:
        self.close()

    # ---- from start to stop ----

    async def _main(self, host, port, started):
        self.loop, self._idle = asyncio.get_running_loop(), asyncio.Event()
        self._closing: asyncio.Future[float] = self.loop.create_future()  # drain_seconds
        self._idle.set()
        try:
            listener = await self.loop.create_server(lambda: Connection(self), host, port, backlog=1024)
        except Exception as error:  # of many kinds, and `started` must be told
            started.set_exception(ValueError(f"serve: cannot listen at {host}:{port}: {error}"))
            return
        self.engine = EngineThread(self.llm, self.loop, lambda: self.events.put("fatal"))
        self.text_threads = [concurrent.futures.ThreadPoolExecutor(1, "nanoserve text") for _ in range(2)]
        self.engine.start()
        address, number = listener.sockets[0].getsockname()[:2]
        started.set_result(f"http://{f'[{address}]' if ':' in address else address}:{number}")
        drain_seconds = await self._closing
        self.is_stopping = True
        if "/engine" in self.routes:
            self.engine.commands.put(lambda: self.engine.control(is_paused=False, delay=0.0))  # or nothing would finish
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), drain_seconds)
        listener.close()
        await self._ask(lambda: self.engine.end("the server is stopping"))
        await self._hang_up()
        self.engine.commands.put(None)
        await self.loop.run_in_executor(None, self.engine.join)
        for thread in self.text_threads:
            thread.shutdown(wait=False)

    async def _hang_up(self):
        """Close all connections, those with an answer on its way a moment later."""
        for connection in self.connections.values():
            if connection.is_idle:
                connection.transport.close()  # once its last answer is written
        if self.connections:
            await asyncio.wait(self.connections, timeout=min(1.0, self.timeout))
        for task in self.connections:
            task.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)

    def route(self, method: str, path: str, headers: dict[str, str]) -> tuple[Callable | None, Callable]:
        """What parses and what answers a request, if it is allowed. Only /health and the page itself need no key."""
        if self.api_key and path not in ("/health", "/"):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            own = self.api_key.encode("utf-8", "surrogateescape")  # as the bytes of a command line that are no UTF-8 come
            if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip(" \t").encode("latin-1"), own):
                raise HTTPError(401, "Authorization: must be Bearer and this server's API key", code="invalid_api_key",
                                WWW_Authenticate="Bearer")
        if path not in self.routes:
            raise HTTPError(404, f"there is no {path[:100]}")
        allowed = ["POST"] if self.routes[path][0] else ["GET"] if path == "/events" else ["GET", "HEAD"]
        if method not in allowed:
            raise HTTPError(405, f"{path} takes {' or '.join(allowed)} only", Allow=", ".join(allowed))
        return self.routes[path]

    # ---- what is served ----

    def _read_job(self, body, is_chat) -> Job:
        self._check(body, CHAT_FIELDS if is_chat else COMPLETION_FIELDS)
        job = Job(body, is_chat)
        if job.priority and not self.llm.scheduler.policy.uses_priority:
            raise ValueError("priority: this server's policy does not look at it")
        if job.num_samples > self.max_samples:
            raise ValueError(f"n: {len(job.source)} prompts of {job.params.n} samples are more than the {self.max_samples} "
                             f"that this server takes at once")
        return job

    async def _complete(self, connection, job):
        with self._admitted(job):
            connection.watch()
            job.arrival_time = connection.body_time  # since then its body may have waited for a thread
            await connection.read(job.tokenize, self.llm)
            self.engine.commands.put(lambda: self.engine.add(job))
            updates = await job.take()  # up to here an error has a status of its own
            answer = Answer(job, self.model_name, self.llm.tokenizer)
            if job.stream:
                events = answer.opening() + answer.chunks(updates)
                while not answer.is_finished:
                    await connection.send_events(events)
                    events = answer.chunks(await job.take())
                await connection.send_events(events, are_last=True)
            else:
                while len(updates) < job.num_samples:
                    updates += await job.take()
                await connection.respond(answer.whole(updates))

    @contextlib.contextmanager
    def _admitted(self, job):
        """Room for the job's samples while it is served, or HTTPError 429 or 503. Whatever happens, it is given back."""
        if self.is_stopping:
            raise HTTPError(503, "the server is stopping")
        if self.num_samples + job.num_samples > self.max_samples:
            raise HTTPError(429, "the queue is full", code="queue_full", Retry_After="1")
        self.num_samples += job.num_samples
        self._idle.clear()
        try:
            yield
        finally:
            self.engine.commands.put(lambda: self.engine.forget(job))
            self.num_samples -= job.num_samples
            if not self.num_samples:
                self._idle.set()

    def _check(self, body, known):
        check_fields(body, known | {"model"})
        if (name := body.get("model")) not in (None, self.model_name):
            raise HTTPError(404, f"model: {name!r} is not served here; {self.model_name} is", "model", "model_not_found")

    def _about(self):
        return {"id": self.model_name, "object": "model", "created": self.created, "owned_by": "nanoserve",
                "max_model_len": self.llm.max_model_len}

    async def _model(self, connection):
        await connection.respond(self._about())

    async def _models(self, connection):
        await connection.respond({"object": "list", "data": [self._about()]})

    def _tokenize(self, body) -> dict:
        self._check(body, {"prompt", "messages"})
        prompt, messages = body.get("prompt"), body.get("messages")
        if not isinstance(prompt, (str, type(None))) or (prompt is None) == (messages is None):
            raise ValueError("prompt: must be a text, or absent where there are messages")
        tokens = encode(self.llm.tokenizer, parse_messages(messages) if prompt is None else prompt)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self.llm.max_model_len}

    def _detokenize(self, body) -> dict:
        self._check(body, {"tokens"})
        tokens, vocab = body.get("tokens"), self.llm.model.config.vocab_size
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < vocab for token in tokens):
            raise ValueError(f"tokens: must be a list of token ids from 0 to {vocab - 1}")
        return {"prompt": self.llm.tokenizer.decode(tokens, False)}

    async def _health(self, connection):
        state = "stopping" if self.is_stopping else "failed" if self.engine.end_reason else "ok"
        await connection.respond({"status": state}, 200 if state == "ok" else 503)

    async def _stats(self, connection):
        await connection.respond(await self._snapshot())

    async def _metrics(self, connection):
        await connection.respond(render_metrics(await self._snapshot(), self.engine, self.num_responses))

    async def _snapshot(self):
        return {**await self._ask(self.engine.snapshot), "connections": len(self.connections),
                "admitted_samples": self.num_samples, "max_samples": self.max_samples}

    async def _ask(self, command):
        """What a command to the engine returns."""
        future: concurrent.futures.Future = concurrent.futures.Future()

        def obey():
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(command())
                except Exception as error:
                    future.set_exception(error)

        self.engine.commands.put(obey)
        return await asyncio.wrap_future(future)

    # ---- the page, tutorial/page.html ----

    async def _page(self, connection):
        """The page. It is for everybody and holds no secret; what it shows it has to ask for, with the key."""
        try:
            html = PAGE.read_text(encoding="utf-8")  # each time, so that a change to it shows
        except OSError:
            return await connection.respond("This is nanoserve, and it works. Its page is tutorial/page.html of the "
                                            "repository, which was not installed along.\n")
        # Nothing runs but the one script, nothing is loaded from elsewhere, and nobody may frame it.
        script, style = (base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1].encode())
                                          .digest()).decode() for tag in ("script", "style"))
        policy = (f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src data:; "
                  "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        await connection.respond(html, **{"Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-cache",
                                          "Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    async def _events(self, connection):
        """What the engine does, for as long as the client stays: never a text of anybody's, always the latest state."""
        seen, llm = b"", self.llm
        connection.watch()
        await connection.send_events([{
            "model": self.model_name, "about": llm.describe(), "num_blocks": llm.pool.num_blocks,
            "block_size": llm.pool.block_size, "max_batch_requests": llm.scheduler.max_batch_requests,
            "has_chat": bool(llm.tokenizer.chat_template), "teach": "/engine" in self.routes}])
        while not self.engine.end_reason or not seen:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look())
            event = await asyncio.shield(self._looking)  # the others wait for it too
            if event is not seen:
                await connection.send_events([event])
                seen = event
        await connection.send_events((), are_last=True)

    async def _look(self) -> bytes:
        """Make the next event, soon enough for LOOKS_A_SECOND and late enough to take LOOKS_SHARE of the time at most."""
        await asyncio.sleep(self._next_look - self.loop.time())
        state, seconds = await self._ask(self.engine.look)
        started, now = time.thread_time(), self.loop.time()
        if state != self._shown or now >= self._next_beat:  # when nothing happens, once a second says that we are there
            self._event, self._shown, self._next_beat = to_json({"ms": int(now * 1000), **state}), state, now + 1
        seconds += time.thread_time() - started
        self._next_look = now + max(1 / LOOKS_A_SECOND, seconds / LOOKS_SHARE)
        return self._event

    def _control(self, body) -> dict:
        check_fields(body, {"is_paused", "delay", "step"})
        wanted = {name: flag(body, name) for name in ("is_paused", "step") if body.get(name) is not None}
        if (delay := body.get("delay")) is not None:
            if type(delay) not in (int, float) or not 0 <= delay <= 60:
                raise ValueError(f"delay: must be from 0 to 60 seconds, got {delay!r}")
            wanted["delay"] = delay
        if self.is_stopping:
            raise HTTPError(503, "the server is stopping")
        self.engine.commands.put(lambda: self.engine.control(**wanted))
        return wanted


def render_metrics(stats: dict[str, int], engine: EngineThread, responses: Counter) -> str:
    """Prometheus' text format, version 0.0.4."""
    lines: list[str] = []

    def metric(name, kind, about, *samples):
        lines.extend([f"# HELP nanoserve_{name} {about}", f"# TYPE nanoserve_{name} {kind}", *samples])

    for key, name, kind, about in (
            ("waiting", "requests_waiting", "gauge", "Requests in the queue."),
            ("running", "requests_running", "gauge", "Requests that are running."),
            ("connections", "connections", "gauge", "Open connections."),
            ("admitted_prompt_tokens", "prompt_tokens_total", "counter", "Tokens of the prompts that were accepted."),
            ("output_tokens", "output_tokens_total", "counter", "Tokens generated."),
            ("hit_tokens", "prefix_hit_tokens_total", "counter", "Tokens found in the prefix cache."),
            ("steps", "steps_total", "counter", "Steps of the engine."),
            ("preemptions", "preemptions_total", "counter", "Requests that lost their blocks and were queued again."),
            ("finished", "requests_finished_total", "counter", "Samples that came to their own end."),
            ("aborted", "requests_aborted_total", "counter", "Samples that were aborted."),
            ("failed", "requests_failed_total", "counter", "Samples that an error ended.")):
        metric(name, kind, about, f"nanoserve_{name} {stats[key]}")
    metric("kv_blocks", "gauge", "Blocks of the KV cache by state; cached ones are free, but match a prefix.",
           *(f'nanoserve_kv_blocks{{state="{state}"}} {stats[f"blocks_{state}"]}' for state in ("used", "cached", "free")))
    metric("http_responses_total", "counter", "Answers by status code.",
           *(f'nanoserve_http_responses_total{{code="{code}"}} {n}' for code, n in sorted(responses.items())))
    for name, histogram, about in (("time_to_first_token_seconds", engine.ttft, "From the body's arrival to a first token."),
                                   ("inter_token_latency_seconds", engine.itl, "Between two tokens of a sample."),
                                   ("request_seconds", engine.e2e, "From the body's arrival to a sample's last token.")):
        metric(name, "histogram", about, *histogram.render(f"nanoserve_{name}"))
    return "\n".join(lines) + "\n"


def serve(llm: LLM, host: str = "127.0.0.1", port: int = 0, **options) -> Server:
    """Serve an LLM over HTTP, in two threads of this process, until the handle's `close()`. Port 0 is any free one.

    The options are `Server`'s. max_queue: samples that may wait beyond those that can run; more get 429 · max_body: bytes
    of a request's body · timeout: seconds for a client to send its headers, its body, or the next request, and to read
    what is written · teach: whoever sees the page may pause the engine for all, and slow it down.
    Meanwhile nobody else may use the LLM. ValueError if the address cannot be had. Survey A IV.A · B 3.2.4.
    """
    server = Server(llm, host, port, **options)
    who = "only this machine" if server.url.startswith(("http://127.", "http://[::1]")) else "other machines"
    log.info(f"{server.model_name} is served at {server.url}, which {who} can reach, "
             f"{'with' if server.api_key else 'without'} a key")
    return server


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------

_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
          "tie_word_embeddings": True, "rope_theta": 1e6}
# config.json of models that are measured with random weights. Facts from the published configurations.
SHAPES = {
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12,
             "n_head": 12, "n_positions": 1024, "activation_function": "gelu_new"},
    "qwen3-small": _QWEN3 | {"vocab_size": 16384, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
                             "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1536,
                             "max_position_embeddings": 4096},
    "qwen3-0.6b": _QWEN3 | {"vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
                            "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
                            "max_position_embeddings": 40960},
    "llama-3.1-8b": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
                     "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                     "intermediate_size": 14336, "max_position_embeddings": 131072, "hidden_act": "silu",
                     "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
                     "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
}


class Arrival(NamedTuple):
    """A request of a workload: when it comes (seconds), and how many tokens go in and out.

    Of two requests with the same `text` the shorter prompt is the beginning of the longer one.
    """

    at: float
    prompt: int
    output: int
    text: int = 0


# Medians of prompt and output tokens, and how far lengths spread: the sigma of a lognormal, ln(P90 / P50) / 1.28 where
# the source has a P90, 1.0 where not.
WORKLOADS = {
    "chat": ((1020, 1.0), (129, 1.0)),  # Azure's conversation trace, Splitwise arXiv:2311.18677 (medians)
    "code": ((1500, 1.0), (13, 1.0)),  # Azure's coding trace, the same
    "summarization": ((7059, 0.48), (208, 0.45)),  # arxiv_summarization as in Sarathi-Serve arXiv:2403.02310
    "assistant": ((1730, 0.93), (415, 0.55)),  # ShareGPT conversations as in Sarathi-Serve
    # What a turn adds to the prompt, and what it generates. Mooncake's trace of tools and agents (FAST'25, arXiv:2407.00079)
    # has 8,596 tokens in and 182 out on average; so have these turns, 8 of them. Why 8, and how they spread, is our choice.
    "agents": ((1070, 1.0), (110, 1.0)),
}
AGENT_TURNS = 8


def workload(name: str, count: int, seed: int = 0, *, scale: float = 1, rate: float = math.inf, burst: float = 1.0,
             longest: int = sys.maxsize, uniform: tuple[tuple[int, int], tuple[int, int]] | None = None) -> list[Arrival]:
    """Requests with the lengths of a named workload, arriving at `rate` per second; all at once if that is infinite.

    Gaps between arrivals have the coefficient of variation `burst`: 1 is Poisson, more is burstier (a gamma distribution,
    as BurstGPT arXiv:2401.17644 fits to its traces). Lengths are divided by `scale`; prompt and output together are at most
    `longest`. With `uniform`, ((least, most) of the prompts, the same of the outputs), they lie between these bounds.
    "agents" ask AGENT_TURNS times each: a prompt is the agent's last one, its answer, and a tool's result. (All turns are
    known beforehand, so random tokens stand for the answers, and only prompts are prefixes.) Survey A VI.C.
    """
    for option, value, low, high in (("scale", scale, 1e-3, 1e6), ("rate", rate, 1e-6, math.inf),
                                     ("burst", burst, 1e-3, 1e3)):
        if not low <= value <= high:
            raise ValueError(f"{option}: must be a number from {low:g} to {high:g}, got {value}")
    rng, at, arrivals = random.Random(seed if uniform else f"{name} {seed}"), 0.0, []
    agents = -(-count // AGENT_TURNS) if name == "agents" else count  # that many texts
    for i in range(count):
        at += rng.gammavariate(1 / burst**2, burst**2 / rate) if rate < math.inf else 0.0
        prompt, output = (rng.randint(*bounds) for bounds in uniform) if uniform else (
            max(1, round(rng.lognormvariate(math.log(median / scale), sigma))) for median, sigma in WORKLOADS[name])
        if i >= agents:
            prompt += arrivals[i - agents].prompt + arrivals[i - agents].output
        output = min(output, longest // 2)
        arrivals.append(Arrival(at, min(prompt, longest - output), output, i % agents))
    return arrivals


def token_ids(count: int, seed, vocab: int) -> list[int]:
    """Random tokens, without the first few, which are often special."""
    rng = random.Random(f"tokens {seed}")
    return [rng.randrange(min(16, vocab // 2), vocab) for _ in range(count)]


def nano_vllm_workload(vocab: int, seed: int) -> list[tuple[float, list[int], int]]:
    """The 256 requests that nano-vLLM publishes figures for: 100 to 1,024 tokens in and out, 133,966 out with seed 0."""
    rng = random.Random(seed)
    prompts = [[rng.randint(0, 10000) % vocab for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    return [(0.0, prompt, rng.randint(100, 1024)) for prompt in prompts]


def measure_roofline(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """This machine's (bytes/s of a large copy, counting reads and writes; FLOP/s of a large square product). Medians."""
    # On a GPU several at a time, and larger: launching one and waiting for it can take as long as the work itself.
    repeat, n = (20, 4096) if device.type == "cuda" else (1, 2048)

    def seconds(work):
        times = []
        for _ in range(9):
            start = time.perf_counter()
            for _ in range(repeat):
                work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - start) / repeat)
        return statistics.median(times[2:])

    a = torch.randn(n, n, device=device).to(dtype)
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    packed = kernels.pack_weight(a)
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    # The better of our product and torch's: the machine's rate must not fall because ours is made for few rows.
    product = min(seconds(lambda: kernels.linear(a, packed)), seconds(lambda: torch.nn.functional.linear(a, a)))
    return bandwidth, 2 * n**3 / product


def num_weights(c: ModelConfig) -> tuple[int, int]:
    """How many weights are multiplied: (with every token, only with tokens after which one is sampled).

    The latter are the output layer, and what follows attention in the last layer: `GPT.forward` drops the other rows
    there. Of the experts, as many count as a token uses.
    """
    used = [p for p in parameters(c) if len(p.shape) > 1 and p.name not in ("embed", "position_embed", "head")
            and (p.expert is None or p.expert < c.experts_per_token)]
    late = [math.prod(p.shape) for p in used if p.layer == c.num_layers - 1 and p.name != "qkv"]
    return sum(math.prod(p.shape) for p in used) - sum(late), c.vocab_size * c.hidden_size + sum(late)


class Roofline:
    """Adds up, step by step, the least time that the work could take: the larger of bytes / bandwidth and FLOPs / rate.

    What a draft model does is not the work, but a way to it. Survey B 2.3.
    """

    def __init__(self, llm: LLM, bandwidth: float, flops: float):
        c, self.bandwidth, self.flops, self.seconds, self.llm = llm.model.config, bandwidth, flops, 0.0, llm
        self.weight_bytes = llm.model.bytes_per_weight
        self.body, self.head = num_weights(c)
        self.kv_bytes = KVCache.bytes_per_block(c.num_layers, 1, c.num_kv_heads, c.head_dim, llm.cache.data.itemsize)
        self.per_pair = 4 * c.num_heads * c.head_dim * c.num_layers
        self.pack, llm.pack = llm.pack, self._watch  # each step's plan goes through it

    def cost(self, plan: list[tuple[Request, int]]) -> tuple[float, float]:
        """(bytes, FLOPs) of a step that brings each request of the plan n tokens forward.

        Bytes: all weights once, of `weight_bytes` each; and `kv_bytes` for each token of each request's context, with those
        of this step. FLOPs: two per weight and token, through `body` weights all tokens, through `head` (the output layer,
        and what comes after attention in the last layer) only those that are sampled; and `per_pair` for each query and
        each key that it sees.
        """
        tokens, sampled = sum(n for _, n in plan), sum(max(0, n - request.num_behind + 1) for request, n in plan)
        pairs = sum(n * request.num_computed + n * (n + 1) // 2 for request, n in plan)
        context = sum(request.num_computed + n for request, n in plan)
        return ((self.body + self.head) * self.weight_bytes + context * self.kv_bytes,
                2 * (self.body * tokens + self.head * sampled) + self.per_pair * pairs)

    def _watch(self, plan):
        moved, flops = self.cost(plan)
        self.seconds += max(moved / self.bandwidth, flops / self.flops)
        return self.pack(plan)

    def close(self) -> float:
        """Stop watching; returns the seconds."""
        self.llm.pack = self.pack
        return self.seconds


def run_workload(llm: LLM, work: list[tuple[float, list[int], int]], temperature: float = 0.0) -> dict:
    """Run [(seconds from now, prompt, output tokens), ...]. Returns the seconds it took, those of them without any request
    ("idle"), and every TTFT (counted from when the request was due) and ITL.
    """
    start, due, last = time.perf_counter(), {}, {}  # of each request, when it was due and when it got its last token
    first_token, gaps, idle = [], [], 0.0
    while len(due) < len(work) or llm.has_work():
        while len(due) < len(work) and (at := start + work[len(due)][0]) <= time.perf_counter():
            _, prompt, tokens = work[len(due)]
            params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True)
            due[llm.add_request(prompt, params)] = at
        if not llm.has_work():
            rest = max(0.0, at - time.perf_counter())  # until the next request is due
            time.sleep(rest)
            idle += rest
            continue
        changed = llm.step()
        now = time.perf_counter()
        for request in changed:
            if request in last:
                gaps.append(now - last[request])
            else:
                first_token.append(now - due[request])
            last[request] = now
    if any(len(request.tokens) - request.num_prompt != tokens for request, (*_, tokens) in zip(due, work)):
        raise RuntimeError("a request did not generate as many tokens as it was asked for")
    return {"seconds": time.perf_counter() - start, "idle": idle, "ttft": first_token, "itl": gaps}


class TransformersPeer:
    """The same requests through transformers' continuous batching, for --compare.

    On a GPU with its own defaults, as its `generate_batch` has them: FlashAttention where that is installed, graphs captured
    beforehand, all memory that is left. On a CPU they would take most of the main memory: there its cache holds all requests
    at once, and no more.
    """

    def __init__(self, shape: dict, dtype: torch.dtype, device: torch.device, work):
        try:
            import transformers
        except ImportError:
            raise ValueError("--compare: transformers is not installed") from None
        transformers.logging.set_verbosity_error()
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        config = transformers.AutoConfig.for_model(**shape)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.model, self.work = model.to(device).eval(), work
        self.generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        self.name = f"transformers {transformers.__version__}"
        if device.type == "cuda":
            from transformers.generation.continuous_batching.utils import WorkloadHints

            longest = max(len(prompt) for _, prompt, _ in work), max(tokens for *_, tokens in work)
            self.options = {"continuous_batching_config": transformers.ContinuousBatchingConfig(),
                            "workload_hints": WorkloadHints(*longest, len(work))}
            return
        blocks = sum(-(-(len(prompt) + tokens) // 32) for _, prompt, tokens in work) + len(work) + 2
        # Tokens in a block by their place: that field's name has changed (5.17 and before: block_size; since: page_size).
        self.options = {"continuous_batching_config": transformers.ContinuousBatchingConfig(
            32, num_blocks=blocks, max_batch_tokens=512, max_requests_per_batch=len(work), allow_block_sharing=False)}

    def run(self, count: int | None = None) -> float:
        """Seconds for all of it, or the first `count`. Its thread ends with it: even idle it would slow down the other
        engine, when that is measured.
        """
        manager = self.model.init_continuous_batching(self.generation, **self.options)
        if self.model.device.type == "cuda":
            with torch.no_grad():
                manager.warmup()
        manager.start()
        self._finish(manager, [(0.0, self.work[0][1], 1)])  # whatever it sets up for the first request
        chosen = manager.continuous_batching_config
        self.setup = ", ".join([self.model.config._attn_implementation, *(
            f"{name} {getattr(chosen, name, None)}" for name in ("page_size", "num_blocks", "max_batch_tokens",
                                                                 "use_cuda_graph", "use_async_batching"))])
        start = time.perf_counter()
        self._finish(manager, self.work[:count])
        seconds = time.perf_counter() - start
        manager.stop(block=True)
        return seconds

    def _finish(self, manager, work):
        for _, prompt, tokens in work:
            manager.add_request(prompt, max_new_tokens=tokens, eos_token_id=-1)
        finished = 0
        while finished < len(work):
            if (result := manager.get_result(timeout=1)) and result.is_finished():
                finished += 1
            elif not manager.is_running():
                raise RuntimeError("transformers' generation thread ended early")


def workload_from(args: argparse.Namespace, longest: int, vocab: int) -> list[tuple[float, list[int], int]]:
    """What bench's options ask for, as `run_workload` takes it; requests of at most `longest` tokens."""
    more = {"uniform": (args.input_len, args.output_len)} if args.workload == "uniform" else {"longest": longest}
    jobs = workload(args.workload, args.requests, args.seed, scale=args.scale, rate=args.rate, burst=args.burst, **more)
    return [(job.at, token_ids(job.prompt, f"{args.seed} {job.text}", vocab), job.output) for job in jobs]


def print_latencies(runs: list[dict]) -> None:
    """Percentiles of TTFT and ITL in what `run_workload` returned, as far as there are any."""
    for name in ("ttft", "itl"):
        samples = np.array(list(chain(*(run[name] for run in runs)))) * 1e3
        if len(samples):
            print(f"{name.upper():11s} p50 {np.percentile(samples, 50):,.1f}   p90 {np.percentile(samples, 90):,.1f}   "
                  f"p99 {np.percentile(samples, 99):,.1f} ms")


def peak_memory(device: torch.device) -> float:
    """GiB, of the GPU or of this process; NaN where nobody says it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def check_bench_options(args: argparse.Namespace) -> None:
    """ValueError for options that cannot go together, or a file that could not be written, before anything is measured."""
    if (args.compare or args.nano_vllm) and args.rate < math.inf:
        other = "--compare" if args.compare else "--nano-vllm"
        raise ValueError(f"--rate: {args.rate} cannot go with {other}, which submits all requests at once")
    if args.compare and args.temperature:
        raise ValueError(f"--temperature: {args.temperature} cannot go with --compare, which is greedy")
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json: there is no folder {args.json.parent}")


def bench(args: argparse.Namespace) -> None:
    """Measure throughput and latency on a synthetic workload, and say what share of this machine's roofline that is."""
    check_bench_options(args)
    device, folder = pick_device(args.device), find_model(args.model) if args.model else None
    shape = read_json(folder / "config.json") if folder else SHAPES[args.shape]
    config = ModelConfig.from_dict(shape)
    dtype = pick_dtype(args.dtype, device, config.dtype if folder else "bfloat16")
    bandwidth, flops = measure_roofline(dtype, device)  # first, so that its buffers do not count as the engine's
    model = None if folder else GPT(config, dtype, device, args.max_model_len, args.quantize).randomize(args.seed)
    if args.compare and device.type == "cuda" and args.kv_memory is None:
        args.kv_memory = 0.35  # the peer's cache, of all requests at once, has to fit in beside ours
    llm = make_llm(args, model)
    vocab = llm.model.config.vocab_size
    work = nano_vllm_workload(vocab, args.seed) if args.nano_vllm else workload_from(args, llm.longest_request, vocab)
    num_in, num_out = sum(len(prompt) for _, prompt, _ in work), sum(tokens for *_, tokens in work)
    when = f"over {work[-1][0]:.1f} s" if work[-1][0] else "all submitted at once"
    how = f"temperature {args.temperature:g}" if args.temperature else "greedy"
    print(f"{llm.describe()}\n{len(work)} requests, {num_in:,} tokens in, {num_out:,} out, {how}, {when}")
    peer = None
    if args.compare:
        peer = TransformersPeer(shape, dtype, device, work)
        peer.run(max(2, len(work) // 4))  # warm up
    print(f"this machine, now: {bandwidth / 1e9:.1f} GB/s copying, {flops / 1e9:,.0f} GFLOP/s multiplying")
    run_workload(llm, work[: max(2, len(work) // 4)], args.temperature)  # warm up: allocations, first use of kernels
    runs, peer_seconds, floor, before = [], [], 0.0, llm.stats()
    for _ in range(args.runs):
        llm.pool.forget()  # the same prompts again would all be prefix hits
        roofline = Roofline(llm, bandwidth, flops)
        runs.append(run_workload(llm, work, args.temperature))
        floor = roofline.close()
        if peer:
            peer_seconds.append(peer.run())
    seconds = statistics.median(run["seconds"] for run in runs)
    busy = statistics.median(run["seconds"] - run["idle"] for run in runs)
    each = ", ".join(f"{num_out / run['seconds']:,.0f}" for run in runs)
    print(f"output      {num_out / seconds:,.0f} tok/s   ({each})")
    print_latencies(runs)
    new = {name: count - before[name] for name, count in llm.stats().items()}
    parts = {part: new[f"{part}_seconds"] for part in llm.watch.seconds}
    print("step        " + "   ".join(f"{part} {share / sum(parts.values()):.1%}" for part, share in parts.items()))
    if llm.drafter:
        print(f"drafts      {new['accepted']:,} of {new['drafted']:,} accepted; a request takes "
              f"{1 - new['saved_steps'] / new['output_tokens']:.2f} steps a token")
    if new["hit_tokens"]:
        print(f"prefix hits {new['hit_tokens'] / (args.runs * num_in):.1%} of the prompts")
    print(f"roofline    {100 * floor / busy:.0f} % (the work's floor on this machine is {num_out / floor:,.0f} tok/s)")
    print(f"peak memory {peak_memory(device):.2f} GiB" + (" (with the peer's)" if peer and device.type != "cuda" else ""))
    if peer:
        other = statistics.median(peer_seconds)
        print(f"{peer.name} {num_out / other:,.0f} tok/s: {other / seconds:.2f} times as long\n  ({peer.setup})")
    if args.json:
        moved = (roofline.body + roofline.head) * roofline.weight_bytes
        args.json.write_text(json.dumps({
            "tokens_per_second": num_out / seconds, "floor_tokens_per_second": num_out / floor, "roofline": floor / busy,
            "copy_bytes_per_second": bandwidth, "flops_per_second": flops, "weight_bytes": moved,
            "peer": peer and f"{peer.name} ({peer.setup})", "peer_tokens_per_second": peer and num_out / other}))


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

USAGE = """nanoserve: a language model server you can read

  nanoserve "Once upon a time"                          complete a prompt
  nanoserve chat                                        talk to the model
  nanoserve generate --file prompts.txt --jsonl out     complete a file of prompts, one a line; resumes where it stopped
  nanoserve serve --port 8000                           answer over HTTP, as OpenAI's API does
  nanoserve bench --shape gpt2 --compare transformers   measure

Each takes --model FOLDER or hub name (default: the small model that comes along), and --help tells the rest.
"""


def options_of(kind: type, args: argparse.Namespace) -> dict:
    """The command line's options that are also arguments of this class, as keyword arguments."""
    return {name: getattr(args, name) for name in inspect.signature(kind.__init__).parameters if hasattr(args, name)}


def make_llm(args: argparse.Namespace, model: GPT | None = None) -> LLM:
    """An LLM from the command line's options; a `model` that is given has its own device, dtype and low-bit weights."""
    options = options_of(LLM, args)
    if model:
        options |= {"model": model, "device": "auto", "dtype": "auto", "quantize": None}
    if args.seed is None:
        options["seed"] = random.getrandbits(63)
    return LLM(**options)


def sampling_from(args: argparse.Namespace) -> SamplingParams:
    """SamplingParams from the command line's options."""
    return SamplingParams(**options_of(SamplingParams, args))


def parse_memory(text: str) -> float | int:
    """A fraction like 0.8, or bytes like 500000000, 512MiB, 2GB."""
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    try:
        number = float(match[1])
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction nor an amount like 512MiB or 2GB") from None
    unit = (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")
    return number if unit == 1 and number < 1 else int(number * unit)


def at_least(least: int | float) -> Callable[[str], int | float]:
    """A parser of numbers from `least` on, of its type."""
    def read(text):
        with contextlib.suppress(ValueError):
            if least <= (number := type(least)(text)) < math.inf:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} on")

    return read


def parse_range(text: str) -> tuple[int, int]:
    """Lengths like 128 or 16..256."""
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    if not match or int(match[1]) < 1 or int(match[2] or match[1]) < int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a length like 128 or a range like 16..256")
    return int(match[1]), int(match[2] or match[1])


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--shape", default="gpt2", choices=SHAPES, help="without --model: random weights (gpt2)")
    parser.add_argument("--requests", type=at_least(1), default=32, help="how many (32)")
    parser.add_argument("--workload", default="uniform", choices=["uniform", *WORKLOADS], help="their lengths (uniform)")
    parser.add_argument("--input-len", type=parse_range, default="16..256", help="uniform: in prompts (16..256)")
    parser.add_argument("--output-len", type=parse_range, default="16..256", help="uniform: in answers (16..256)")
    parser.add_argument("--scale", type=float, default=1.0, help="divide the others' lengths, for a small model (1)")
    parser.add_argument("--rate", type=float, default=math.inf, help="requests a second (all at once)")
    parser.add_argument("--burst", type=float, default=1.0, help="deviation over mean of their gaps (1, Poisson)")
    parser.add_argument("--nano-vllm", action="store_true", help="nano-vLLM's 256 requests instead")
    parser.add_argument("--runs", type=at_least(1), default=3, help="the median of these is printed (3)")
    parser.add_argument("--temperature", type=at_least(0.0), default=0.0, help="of the sampling (0, greedy)")
    parser.add_argument("--compare", choices=["transformers"], help="run the same through this, in turn")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")


def parser_for(command: str) -> argparse.ArgumentParser:
    """The options of one command."""
    about = {"complete": "Complete a prompt and print the text as it comes.", "chat": "Talk to the model.",
             "generate": "Complete every line of a file.", "serve": "Answer over HTTP, as OpenAI's API does.",
             "bench": "Measure speed on a synthetic workload."}[command]
    parser = argparse.ArgumentParser(prog="nanoserve" + (f" {command}" if command != "complete" else ""), description=about)
    if command == "complete":
        parser.add_argument("prompt", help="text to continue")
    if command == "generate":
        parser.add_argument("--file", required=True, help="prompts, one a line")
        parser.add_argument("--jsonl", required=True, help="where results go, one JSON object a line; what is there is kept")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--model", help="a folder in Hugging Face format or a name on its hub")
    engine.add_argument("--device", default="auto", help="cpu, cuda or mps; otherwise the best there is")
    engine.add_argument("--dtype", default="auto", help=f"{', '.join(DTYPES)}; otherwise what suits model and device")
    engine.add_argument("--quantize", choices=LOW_BITS, help="round the weights to 8 or 4 bits while loading")
    engine.add_argument("--kv-dtype", default="auto", choices=KV_DTYPES, help="fewer bits for keys and values: more fit")
    engine.add_argument("--kv-memory", type=parse_memory, help="of the KV cache: 512MiB, 2GB, or a fraction of what is free")
    engine.add_argument("--swap-memory", type=parse_memory, default=0, help="main memory for preempted requests' blocks (0)")
    engine.add_argument("--max-batch-tokens", type=int, help="token budget of a step")
    engine.add_argument("--max-batch-requests", type=int, help="requests that run at once (256)")
    engine.add_argument("--max-model-len", type=int, help="longest prompt and output together")
    engine.add_argument("--draft", help='guess tokens ahead: "ngram" from the text itself, "default" with the small draft '
                        "model that comes along, or a folder or hub name of a model with the same vocabulary")
    engine.add_argument("--num-drafts", type=int, help="at most so many for a request in a step (8)")
    engine.add_argument("--no-graphs", dest="graphs", action="store_false", help="on a GPU: launch each kernel, to debug")
    engine.add_argument("--no-overlap", dest="overlap", action="store_const", const=False,
                        help="on a GPU: read a step's tokens before planning the next")
    engine.add_argument("--seed", type=int, default=0 if command == "bench" else None, help="same seed, same text")
    if command == "bench":
        add_bench_options(parser)
        return parser
    if command == "serve":
        parser.add_argument("--policy", choices=POLICIES, default="priority", help="who goes first (priority)")
        parser.add_argument("--host", default="127.0.0.1", help="127.0.0.1; 0.0.0.0 lets other machines in")
        parser.add_argument("--port", type=int, default=8000, help="0 is any free one (8000)")
        parser.add_argument("--api-key", default=os.environ.get("NANOSERVE_API_KEY"), help="or $NANOSERVE_API_KEY")
        parser.add_argument("--max-queue", type=at_least(0), default=1024, help="samples that may wait; more get 429 (1024)")
        parser.add_argument("--max-body", type=parse_memory, default=4 << 20, help="of a request's body (4MiB)")
        parser.add_argument("--max-connections", type=at_least(1), default=1024, help="at once (1024)")
        parser.add_argument("--timeout", type=at_least(0.0), default=30.0, help="seconds for a client to send or read (30)")
        parser.add_argument("--drain-seconds", type=at_least(0.0), default=30.0, help="to finish what runs at the end (30)")
        parser.add_argument("--teach", action="store_true", help="let the page pause, step and slow the engine")
        return parser
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, help="tokens to generate (256, or what fits)")
    for name, default, what in (
            ("temperature", 0.8, "0 takes the likeliest token (0.8)"), ("top_k", 0, "keep the k likeliest tokens (all)"),
            ("top_p", 1.0, "keep the likeliest tokens up to this probability (1)"),
            ("min_p", 0.0, "keep tokens with this share of the largest probability (0)"),
            ("repetition_penalty", 1.0, "above 1 makes what was said less likely (1)")):
        sampling.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=what)
    sampling.add_argument("--stop", action="append", default=[], help="text that ends the output; may be repeated")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the model's own end")
    return parser


def complete(args: argparse.Namespace) -> None:
    """Stream the continuation of one prompt to standard output."""
    llm = make_llm(args)
    print(args.prompt, end="", flush=True)
    for piece in llm.stream(args.prompt, sampling_from(args)):
        print(piece, end="", flush=True)
    print()


def chat(args: argparse.Namespace) -> None:
    """A conversation on standard input and output. The prefix cache keeps it from being recomputed every turn."""
    llm, params = make_llm(args), sampling_from(args)
    if llm.tokenizer is None or not llm.tokenizer.chat_template:
        raise ValueError("chat: this model has no chat template")
    if sys.stdin.isatty():
        print("Ask away. /new starts over, Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    messages: list[dict] = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return print()
        if line == "/new":
            messages.clear()
        if line in ("", "/new"):
            continue
        messages.append({"role": "user", "content": line})
        longest = llm.max_model_len - (params.max_tokens or 64)
        while len(prompt := llm.tokenizer.apply_chat_template(messages)) > longest and len(messages) > 1:
            del messages[:2]  # the oldest exchange makes room
        answer = ""
        try:
            for piece in llm.stream(prompt, params):
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        except ValueError as error:  # this message does not fit; the next may
            print(f"nanoserve: {error}", file=sys.stderr)
            messages.pop()
            continue
        print()
        messages.append({"role": "assistant", "content": answer})


def finished_results(out: Path, prompts: list[str]) -> set[int]:
    """The indices of the prompts that a results file has already. A last line that was cut short is taken off it.

    ValueError if the file holds anything else: it is somebody's, and not ours to append to.
    """
    text = out.read_text(encoding="utf-8", errors="replace")  # it may have been cut inside a character
    lines, done, beginning = text.split("\n"), set(), '{"index": '  # splitlines() would split texts at U+2028
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            is_cut = line.startswith(beginning) or beginning.startswith(line)  # or empty: the file ends with a newline
            if number == len(lines) and is_cut:
                del lines[-1]
                break
            record = None
        index = record.get("index") if isinstance(record, dict) else None
        if type(index) is not int or not 0 <= index < len(prompts) or record.get("prompt") != prompts[index]:
            raise ValueError(f"--jsonl: line {number} of {out} is not a result for these prompts")
        done.add(index)
    if (whole := "".join(line + "\n" for line in lines)) != text:
        scratch = out.with_name(out.name + ".tmp")
        scratch.write_text(whole, encoding="utf-8")
        scratch.replace(out)  # in one move: an interruption loses nothing
    return done


def generate_file(args: argparse.Namespace) -> None:
    """Complete the lines of a file into JSON lines, as they finish; lines that are there already are not done again."""
    from tqdm import tqdm

    try:
        # Some editors begin a file with a byte order mark, which is no part of its first line.
        prompts = [line for line in Path(args.file).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--file: {args.file}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}") from None
    out = Path(args.jsonl)
    done = finished_results(out, prompts) if out.is_file() else set()  # a pipe, /dev/stdout say, has nothing to read
    llm, params = make_llm(args), sampling_from(args)
    waiting = {}
    with out.open("a", encoding="utf-8") as file, tqdm(
            total=len(prompts), initial=len(done), unit=" prompts", disable=sys.stderr is None) as bar:
        def write(index, **result):
            file.write(json.dumps({"index": index, "prompt": prompts[index], **result}, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()

        for index in range(len(prompts)):
            if index in done:
                continue
            try:
                waiting[llm.add_request(prompts[index], params)] = index
            except ValueError as error:
                write(index, error=str(error))
        while llm.has_work():
            for request in llm.step():
                if request.status == FINISHED:
                    result = llm.output(request)
                    write(waiting[request], text=result.text, finish_reason=result.finish_reason,
                          num_tokens=len(result.token_ids), **({"error": request.error} if request.error else {}))


def serve_until_signal(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, then finish what runs. Returns 0, or 1 if the engine failed."""
    llm = make_llm(args)
    # Of a folder the name only: where it lies is nobody's business.
    name = args.model or "nanoserve"
    name = Path(name).resolve().name if Path(name).is_dir() else name
    gc.freeze()  # what is here stays: collecting garbage need not look at it again
    server = serve(llm, model_name=name, **options_of(Server, args))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: server.events.put(signal.Signals(number).name))
    event = server.events.get()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # the second one does not wait
    log.info(f"{event}: stopping within {args.drain_seconds:g} seconds")
    server.close(args.drain_seconds)
    return int(event == "fatal")


def main(argv: list[str] | None = None) -> int:
    """The command `nanoserve`. Returns the exit code: 0, 1 if a server's engine failed, 2 if the input was wrong, 130
    after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        parser_for("complete").print_help()
        return 0
    commands = {"chat": chat, "generate": generate_file, "serve": serve_until_signal, "bench": bench}
    name = argv[0] if argv[0] in commands else "complete"
    parser = parser_for(name)
    args = parser.parse_args(argv[1:] if name in commands else argv)
    if name == "complete" and args.prompt in commands:
        parser.error(f"a command comes first: nanoserve {args.prompt} ...")
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    log.disabled = name == "bench"  # it prints the same line itself
    try:
        return {**commands, "complete": complete}[name](args) or 0
    except ValueError as error:
        print(f"nanoserve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, `nanoserve ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"nanoserve: {error.filename or name}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
