"""Checkpoints as they come: sound ones load whatever their layout, others are one clear line that names the thing."""

import json
import logging
import math
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import kernels
import nanoserve
from nanoserve import DTYPES, GPT, LLM, ModelConfig, SamplingParams

torch.set_num_threads(1)
DATA = Path(__file__).parent / "data"
TOKENIZER = DATA / "tokenizers" / "byte_level"  # 400 tokens
CPU = torch.device("cpu")


@pytest.fixture
def copy(tmp_path):
    """copy("qwen3") is the folder of a fresh copy of that checkpoint; keywords replace keys of its config.json."""

    def make(family: str = "qwen3", name: str = "model", **over) -> Path:
        shutil.copytree(DATA / family, folder := tmp_path / name)
        edit_json(folder / "config.json", **over)
        return folder

    return make


def edit_json(path: Path, **over) -> None:
    """Replace keys of a JSON file; `...` removes one."""
    content = {**json.loads(path.read_text()), **over}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(folder: Path, change, file: str = "model.safetensors") -> None:
    """Rewrite a safetensors file after `change` has edited its dictionary of tensors."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)


def one_line(action) -> str:
    """The message of the ValueError that `action` must raise, and which must be one line."""
    with pytest.raises(ValueError) as caught:
        action()
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600
    return message


def logits(model: GPT, tokens: list[int]) -> torch.Tensor:
    """All logits of one sequence, [len, V]."""
    llm = LLM(model, max_batch_requests=1)
    llm.add_request(tokens, SamplingParams(max_tokens=1))
    batch, *_ = llm.pack(llm.scheduler.schedule())
    batch.rows = torch.arange(len(tokens))
    return model.forward(batch, llm.cache)


def distance(model: GPT, family: str) -> float:
    """How far the model's logits are from the family's stored ones."""
    reference = load_file(DATA / family / "reference.safetensors")
    return (logits(model, reference["tokens_1"].tolist()) - reference["logits_1"]).abs().max().item()


def load(folder: Path, dtype=torch.float32) -> GPT:
    return nanoserve.load(folder, CPU, dtype)


# ---- what does load ----


def test_shards_can_be_joined_and_a_single_file_split(copy):
    """Tensors of one fused weight may lie in different files."""
    folder = copy("llama3")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = {name.rsplit(".", 2)[1]: file for name, file in index.items() if "layers.0.self_attn" in name}
    assert len({names["q_proj"], names["k_proj"], names["v_proj"]}) == 2  # or the test shows less than it says
    assert distance(load(folder), "llama3") < 1e-4
    tensors = {name: tensor for file in set(index.values()) for name, tensor in load_file(folder / file).items()}
    save_file(tensors, folder / "model.safetensors")
    for file in set(index.values()):
        (folder / file).unlink()
    (folder / "model.safetensors.index.json").unlink()
    assert distance(load(folder), "llama3") < 1e-4

    folder = copy("mixtral", "split")
    tensors = load_file(folder / "model.safetensors")
    shards = {f"model-{i}.safetensors": dict(sorted(tensors.items())[i::3]) for i in range(3)}
    for file, part in shards.items():
        save_file(part, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").write_bytes(b"the index says what counts")
    assert distance(load(folder), "mixtral") < 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3", "mixtral"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weights_are_quantized_while_loading(family, quantize, monkeypatch):
    """The logits are those of the values that the codes stand for; embeddings, norms and routers are as stored."""
    rounding = kernels.quantize
    if quantize == "int4" and family in ("qwen3", "mixtral"):  # MLPs of 48 and 40, which 32 does not divide
        with pytest.raises(ValueError, match="4 bits in groups of 32 do not fit"):
            nanoserve.load(DATA / family, CPU, torch.float32, quantize=quantize)
        return
    low = nanoserve.load(DATA / family, CPU, torch.float32, quantize=quantize)
    assert low.head.bits == nanoserve.LOW_BITS[quantize] and low.embed.dtype == torch.float32
    assert not any(getattr(layer.router, "bits", 32) < 32 for layer in low.layers)
    monkeypatch.setattr(kernels, "quantize", lambda weight, bits: rounding(weight, bits).dequantize(weight.dtype))
    rounded = nanoserve.load(DATA / family, CPU, torch.float32, quantize=quantize)
    tokens = load_file(DATA / family / "reference.safetensors")["tokens_1"].tolist()
    expected = logits(rounded, tokens)
    torch.testing.assert_close(logits(low, tokens), expected, rtol=0, atol=5e-3)  # C++ rounds what is multiplied too
    monkeypatch.setattr(kernels, "use_cpp", False)
    torch.testing.assert_close(logits(low, tokens), expected, rtol=1e-4, atol=1e-4)
    assert 1e-4 < distance(low, family) < 10  # not exact, or nothing would have been rounded


def test_quantize_is_one_of_two_words():
    with pytest.raises(ValueError, match="quantize: must be int8 or int4, got 'fp8'"):
        LLM(DATA / "gpt2", quantize="fp8")
    with pytest.raises(ValueError, match="a GPT has its own"):
        LLM(load(DATA / "gpt2"), quantize="int8")


def test_other_files_are_left_alone(copy):
    """Mistral ships its weights twice; the copy has other names, and here one that is the same with other values."""
    folder = copy("mistral_window")
    assert (folder / "consolidated.safetensors").exists()
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    assert distance(load(folder), "mistral_window") < 1e-4


def test_tied_and_untied_heads(copy):
    tied, untied = load(copy("qwen2")), load(copy("qwen2_window", "untied"))
    assert torch.equal(plain(tied.head, tied), plain(tied.embed, tied))
    assert not torch.equal(plain(untied.head, untied), plain(untied.embed, untied))
    # Some checkpoints store the tied head all the same. It is the embedding that counts.
    folder = copy("qwen2", "both")
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": torch.randn_like(t["model.embed_tokens.weight"])}))
    assert distance(load(folder), "qwen2") < 1e-4
    # And some are tied though the config's default for the family is not.
    folder = copy("qwen2", "says nothing", tie_word_embeddings=...)
    assert "lm_head.weight is missing" in one_line(lambda: load(folder))


def plain(weight: torch.Tensor, model: GPT) -> torch.Tensor:
    """A weight as it was before packing: what it does to the identity."""
    if isinstance(weight, torch.Tensor) and not weight.is_mkldnn:
        return weight
    return kernels.linear(torch.eye(model.config.hidden_size), weight).T.contiguous()


def test_gpt2_with_and_without_prefix_and_buffers(copy):
    """Published GPT-2s come with and without "transformer." in front, and with causal masks that are no weights."""
    assert any(name.endswith("attn.masked_bias") for name in load_file(DATA / "gpt2" / "model.safetensors"))
    folder = copy("gpt2")

    def add_prefix(tensors):
        for name in list(tensors):
            tensors["transformer." + name] = tensors.pop(name)

    edit_tensors(folder, add_prefix)
    assert distance(load(folder), "gpt2") < 1e-4
    folder = copy("llama2", "llama")
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert distance(load(folder), "llama2") < 1e-4


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("asked", ["auto", "float32", "float16", "bfloat16", "float64"])
def test_dtypes(copy, stored, asked):
    """Any stored dtype loads as any other; "auto" is bfloat16 on a CPU that computes in it, else float32."""
    folder = copy("qwen3")

    def convert(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(DTYPES[stored])

    edit_tensors(folder, convert)
    edit_json(folder / "config.json", torch_dtype=stored)
    llm = LLM(folder, device="cpu", dtype=asked, kv_memory=1 << 20)
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    expected = (torch.bfloat16 if fast else torch.float32) if asked == "auto" else DTYPES[asked]
    assert llm.model.dtype == llm.cache.data.dtype == llm.model.embed.dtype == expected
    limit = {torch.float16: 0.1, torch.bfloat16: 1.0}.get(expected, 1e-4)
    assert distance(llm.model, "qwen3") < limit  # the stored values are exact in bfloat16
    out = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0))[0]
    assert len(out.token_ids) <= 4 and out.text == ""  # there is no tokenizer


def test_auto_dtype_is_the_stored_one_elsewhere():
    cuda = torch.device("cuda")
    assert nanoserve.pick_dtype("auto", cuda, "bfloat16") == torch.bfloat16
    assert nanoserve.pick_dtype("auto", cuda, "float16") == torch.float16


def test_eos_ids_come_from_the_generation_config_first(copy):
    assert LLM(copy("llama3"), kv_memory=1 << 20).eos_ids == {91, 92, 93}
    folder = copy("qwen2", "other")
    edit_json(folder / "generation_config.json", eos_token_id=[7, 8])
    assert LLM(folder, kv_memory=1 << 20).eos_ids == {7, 8}
    edit_json(folder / "generation_config.json", eos_token_id=...)
    assert LLM(folder, kv_memory=1 << 20).eos_ids == {95}


def test_every_parameter_is_filled_and_counted():
    """After loading nothing is left unset, and num_parameters counts what the file holds (less masks)."""
    for family in sorted(path.parent.name for path in DATA.glob("*/reference.safetensors")):
        model = load(DATA / family)
        stored = {}
        for file in DATA.glob(f"{family}/model*.safetensors"):
            stored |= load_file(file)
        count = sum(t.numel() for name, t in stored.items() if not re.search(r"\.attn\.(masked_)?bias$", name))
        assert model.num_parameters == count, family
        c = model.config
        for i, layer in enumerate(model.layers):
            assert layer.qkv is not None and layer.o is not None and layer.attn_norm is not None
            assert (layer.router is not None) == (i in c.moe_layers)
            for weights in (layer.gate_up, layer.down):
                if i in c.moe_layers:
                    assert len(weights) == c.num_experts and not any(w is None for w in weights)
                else:
                    assert isinstance(weights, (torch.Tensor, kernels.PanelWeight))


MEMORY = """
import re, sys, torch
from pathlib import Path
import nanoserve
torch.set_num_threads(1)
def peak():  # ru_maxrss would begin with what the parent process had when it forked
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
nanoserve.load(Path(sys.argv[1]), torch.device("cpu"), torch.float32)  # oneDNN and the loader warm up
before = peak()
model = nanoserve.load(Path(sys.argv[2]), torch.device("cpu"), torch.float32)
print(peak() - before, model.num_parameters)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_streams_tensor_by_tensor(tmp_path):
    """Peak memory is the model plus its largest tensor, not the model twice."""
    hidden, mlp = 1024, 4096
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
              "intermediate_size": mlp, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 64,
              "num_key_value_heads": 2, "max_position_embeddings": 64, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, place in nanoserve.layout(ModelConfig.from_dict(config)).items():
        shape = [place.num_rows, *place.shape[1:]]
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)  # zeros that take no place on the disk
    out = subprocess.run([sys.executable, "-c", MEMORY, str(DATA / "llama2"), str(tmp_path)], check=True, text=True,
                         capture_output=True, cwd=Path(nanoserve.__file__).parent).stdout
    grown, parameters = map(int, out.split())
    weights, largest = 4 * parameters, 4 * 2 * mlp * hidden
    assert weights > 480e6
    # The file is read through a mapping whose pages count until it is mapped anew: 256 MiB of them at most.
    assert 0.9 * weights < grown < weights + largest + 300e6


# ---- fetching by name ----


def test_a_hub_name_is_fetched(copy, monkeypatch, tmp_path):
    folder, asked = copy("qwen3"), []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    llm = LLM("some-org/Some.Model-1b", kv_memory=1 << 20)
    assert llm.model.config.family == "qwen3" and [name for name, _ in asked] == ["some-org/Some.Model-1b"]
    # Everything that is read, and not the weights in other formats or layouts.
    from fnmatch import fnmatch

    patterns = asked[0][1]["allow_patterns"]
    wanted = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors",
              "model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
    for file in wanted:
        assert any(fnmatch(file, pattern) for pattern in patterns), file
    for file in ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", "tf_model.h5"):
        assert not any(fnmatch(file, pattern) for pattern in patterns), file
    (tmp_path / "here").mkdir()
    shutil.copytree(folder, tmp_path / "here" / "local")
    LLM("here/local", kv_memory=1 << 20)  # a folder wins over the hub
    assert len(asked) == 1


def test_a_hub_name_that_can_not_be_fetched_is_one_line(monkeypatch, tmp_path):
    def snapshot_download(name, **options):
        raise OSError("401 Client Error\n\nRepository Not Found\nPlease make sure")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    message = one_line(lambda: LLM("some-org/typo"))
    assert "some-org/typo" in message and "401 Client Error" in message and "Repository Not" not in message


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/folder", "./no-such", "a/b/c", "../up", "../up/there"])
def test_a_path_is_never_sent_to_the_hub(name, monkeypatch, tmp_path):
    def snapshot_download(name, **options):
        raise AssertionError("went to the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert str(Path(name)) in one_line(lambda: LLM(name))


# ---- what does not load ----


def test_folders(copy, tmp_path):
    assert "no folder" in one_line(lambda: LLM(DATA / "rope.json"))  # a file
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in one_line(lambda: LLM(tmp_path / "empty"))
    folder = copy()
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in one_line(lambda: LLM(folder))


BROKEN_JSON = {"cut off": b'{"model_type": "llama",\n', "binary": b"\xff\xfe\x00", "empty": b"", "a list": b"[]",
               "null": b"null"}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json",
                                  "model.safetensors.index.json"])
@pytest.mark.parametrize("content", BROKEN_JSON.values(), ids=BROKEN_JSON)
def test_broken_json(copy, file, content):
    folder = copy("llama3", vocab_size=400)
    shutil.copy(TOKENIZER / "tokenizer.json", folder)
    (folder / file).write_bytes(content)
    assert file in one_line(lambda: LLM(folder))


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"lm_head.weight": 1}}',
                                   '{"weight_map": {"lm_head.weight": null, "model.norm.weight": "model.safetensors"}}'])
def test_an_index_without_a_weight_map(copy, index):
    folder = copy("llama3")
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in one_line(lambda: LLM(folder))


def test_weights_that_are_integers(copy):
    """Quantized by somebody who left no word of it in config.json: taken as they are, they would make a model of noise."""
    folder, name = copy("qwen3"), "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: (127 * tensors[name]).to(torch.int8)}))
    assert f"{name} holds torch.int8" in one_line(lambda: LLM(folder))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def overwrite_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"x" * 40 + data[48:])


def overlap(path: Path) -> None:
    """Offsets that claim more bytes than the tensor's shape."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + size].replace(b'"shape":[32]', b'"shape":[31]')
    path.write_bytes(data[:8] + header + data[8 + size:])


@pytest.mark.parametrize("damage", [
    lambda path: cut(path, path.stat().st_size - 100), lambda path: cut(path, 200), lambda path: cut(path, 5),
    lambda path: cut(path, 0), overwrite_header, overlap, lambda path: path.write_bytes(b"\xff" * 500),
    lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234567\n"),
], ids=["tail missing", "header cut", "five bytes", "empty", "header overwritten", "shape and bytes differ", "noise",
        "git lfs pointer"])
def test_damaged_safetensors(copy, damage):
    folder = copy()
    damage(folder / "model.safetensors")
    message = one_line(lambda: LLM(folder))
    assert message.startswith("model.safetensors: not a readable safetensors file")


def test_a_damaged_or_missing_shard_is_named(copy):
    folder = copy("llama3")
    cut(folder / "model-00002-of-00002.safetensors", 300)
    assert one_line(lambda: LLM(folder)).startswith("model-00002-of-00002.safetensors: not a readable")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "has no model-00002-of-00002.safetensors" in one_line(lambda: LLM(folder))


@pytest.mark.parametrize("family, name", [
    ("qwen3", "model.layers.1.self_attn.k_norm.weight"), ("qwen3", "model.layers.0.self_attn.v_proj.weight"),
    ("qwen3", "lm_head.weight"), ("gpt2", "h.1.attn.c_attn.bias"), ("gpt2", "wpe.weight"),
    ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"), ("qwen3_moe", "model.layers.0.mlp.gate.weight"),
    ("llama_bias", "model.layers.0.mlp.up_proj.bias"), ("qwen2", "model.layers.0.self_attn.q_proj.bias"),
])
def test_a_missing_tensor_is_named(copy, family, name):
    folder = copy(family)
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    assert f"tensor {name} is missing" in one_line(lambda: LLM(folder))


@pytest.mark.parametrize("family, name", [
    ("llama2", "model.layers.0.self_attn.q_proj.bias"), ("llama2", "model.layers.2.input_layernorm.weight"),
    ("qwen2", "model.layers.0.self_attn.o_proj.bias"), ("llama2", "model.layers.0.self_attn.q_norm.weight"),
    ("qwen3_moe", "model.layers.0.mlp.experts.8.up_proj.weight"), ("gpt2", "h.0.attn.extra"), ("gpt2", "lm_head.bias"),
    ("gpt2", "h.2.attn.c_attn.bias"),
    ("qwen3", "model.layers.0.mlp.up_proj.weight_scale_inv"), ("llama2", "transformer.model.norm.weight"),
])
def test_a_surplus_tensor_is_named(copy, family, name):
    folder = copy(family)
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    message = one_line(lambda: LLM(folder))
    assert name in message and "not part of this model" in message


def test_many_missing_tensors_are_one_short_line(copy):
    folder = copy("qwen3_moe", num_hidden_layers=40)
    message = one_line(lambda: LLM(folder))
    assert "more) is missing" in message and message.count("model.layers") == 5


@pytest.mark.parametrize("family, name, cols", [
    ("qwen3", "model.layers.0.self_attn.k_proj.weight", 31), ("qwen3", "model.layers.1.mlp.down_proj.weight", 47),
    ("gpt2", "h.0.attn.c_proj.weight", 31), ("olmoe", "model.layers.0.mlp.experts.2.gate_proj.weight", 31),
    ("qwen3", "lm_head.weight", 30),
])
def test_a_wrong_shape_is_named(copy, family, name, cols):
    folder = copy(family)
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:, :cols]}))
    message = one_line(lambda: LLM(folder))
    assert name in message and "has shape" in message and str(cols) in message and "config.json implies" in message


def test_a_weight_stored_the_wrong_way_round(copy):
    """A square one would fit, so the others must show it: GPT-2's are [in, out], everybody else's [out, in]."""
    folder = copy("gpt2")
    name = "h.0.mlp.c_fc.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].T}))
    assert name in one_line(lambda: LLM(folder))


@pytest.mark.parametrize("over, named", [
    ({"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3"}, "Gemma3ForCausalLM"),
    ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification"),
    ({"model_type": ...}, "not supported"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "'longrope'"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config"),
    ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ({"num_hidden_layers": ...}, "num_hidden_layers is missing"),
    ({"vocab_size": "96"}, "vocab_size"),
    ({"sliding_window": -1}, "sliding_window"),
    ({"hidden_size": None}, "hidden_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": [1, 2]}, "layer_types"),
    ({"layer_types": 2}, "layer_types must be a list, got 2"),
    ({"rms_norm_eps": None}, "rms_norm_eps must be a number from 0 on, got None"),
    ({"rope_theta": "1e6"}, "rope_theta must be a number from 0 on, got '1e6'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be a number from 0 on, got '2'"),
    ({"eos_token_id": "2"}, "eos_token_id: must be a token id or a list of them, got '2'"),
    ({"eos_token_id": [2, 1.5]}, "eos_token_id: must be a token id or a list of them, got [2, 1.5]"),
], ids=lambda value: "" if isinstance(value, str) else "+".join(value))
def test_configurations(copy, over, named):
    folder = copy("qwen3", **over)
    assert named in one_line(lambda: LLM(folder))


def test_a_tokenizer_that_does_not_fit(copy):
    folder = copy("qwen3")
    shutil.copy(TOKENIZER / "tokenizer.json", folder)
    message = one_line(lambda: LLM(folder))
    assert "tokenizer.json" in message and "399" in message and "95" in message
    edit_json(folder / "config.json", vocab_size=400)  # that fits, and then it is the tensors that do not
    assert "[400, 32]" in one_line(lambda: LLM(folder))
    folder = copy("qwen3", "larger", vocab_size=420)  # the model's vocabulary may be larger, it often is padded

    def pad(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, 420 - 96))

    edit_tensors(folder, pad)
    shutil.copy(TOKENIZER / "tokenizer.json", folder)
    llm = LLM(folder, kv_memory=1 << 20)
    assert llm.generate(["hi"], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids


@pytest.mark.parametrize("content", [b'{"a":', b"", b'{"version": "1.0"}', b"\xff\xff", b"[]"])
def test_a_broken_tokenizer(copy, content):
    folder = copy("qwen3")
    (folder / "tokenizer.json").write_bytes(content)
    assert one_line(lambda: LLM(folder)).startswith("tokenizer.json: not a readable tokenizer")


OPTIONS = [
    ("device", "tpu"), ("device", ""), ("device", "cpu:x"), ("device", "meta"), ("device", None), ("dtype", "fp16"),
    ("dtype", "int8"), ("dtype", torch.float32), ("dtype", None), ("kv_memory", 0), ("kv_memory", -1), ("kv_memory", -0.5),
    ("kv_memory", 100), ("kv_memory", 1e-12), ("kv_memory", True), ("kv_memory", math.nan), ("kv_memory", math.inf),
    ("kv_memory", "1GB"), ("block_size", 0), ("block_size", -16), ("max_batch_tokens", 0), ("max_batch_tokens", -1),
    ("max_batch_requests", 0), ("max_batch_requests", -1), ("max_model_len", 0), ("max_model_len", -1),
    ("max_model_len", 1), ("max_model_len", 129), ("policy", "random"), ("policy", 3),
]


@pytest.mark.parametrize("name, value", OPTIONS, ids=lambda value: str(value))
def test_options_out_of_range_are_named(name, value):
    assert name in one_line(lambda: LLM(DATA / "qwen3", **{name: value}))


def test_cuda_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "device: cuda cannot be used here" in one_line(lambda: LLM(DATA / "qwen3", device="cuda"))


def test_too_little_kv_memory_names_the_knobs():
    message = one_line(lambda: LLM(DATA / "qwen3", kv_memory=1000))
    assert all(knob in message for knob in ("1000 bytes", "kv_memory", "block_size"))


# ---- the command line says the same ----


@pytest.mark.parametrize("command", [["hello"], ["chat"], ["bench"], ["generate"]], ids=lambda command: command[0])
def test_the_command_line_says_it_in_one_line(command, copy, capsys, tmp_path):
    """Exit code 2, one line on standard error that begins with the program's name, no traceback."""
    (tmp_path / "prompts.txt").write_text("one\n")
    if command == ["generate"]:
        command = [*command, "--file", str(tmp_path / "prompts.txt"), "--jsonl", str(tmp_path / "out.jsonl")]
    no_tensor, no_shard = copy("qwen3"), copy("llama3", "shards")
    edit_tensors(no_tensor, lambda tensors: tensors.pop("lm_head.weight"))
    (no_shard / "model-00001-of-00002.safetensors").unlink()
    truncated, no_config = copy("qwen3", "truncated"), copy("qwen3", "no_config")
    cut(truncated / "model.safetensors", 3000)
    (no_config / "config.json").unlink()
    cases = [(["--model", str(tmp_path / "nowhere")], "nowhere"), (["--model", str(no_tensor)], "lm_head.weight"),
             (["--model", str(no_shard)], "model-00001"), (["--model", str(truncated)], "model.safetensors"),
             (["--model", str(no_config)], "config.json"),
             (["--model", str(copy("qwen3", "odd", model_type="odd", architectures=...))], "odd"),
             (["--model", str(DATA / "qwen3"), "--dtype", "float7"], "float7"),
             (["--model", str(DATA / "qwen3"), "--device", "tpu"], "tpu"),
             (["--model", str(DATA / "qwen3"), "--kv-memory", "100"], "kv_memory")]
    for options, named in cases:
        assert nanoserve.main([*command, *options]) == 2, options
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("nanoserve: ") and named in lines[0], (options, captured.err)
        assert "Traceback" not in captured.out
    logging.getLogger("nanoserve").disabled = False  # which `bench` sets


def test_the_command_line_refuses_options_it_does_not_have(capsys):
    for options in (["--temprature", "1"], ["--kv-memory", "lots"], ["--max-tokens", "many"]):
        with pytest.raises(SystemExit) as caught:
            nanoserve.main(["hello", *options])
        assert caught.value.code == 2 and options[0] in capsys.readouterr().err


def test_in_a_process_of_its_own(tmp_path):
    """The same from a shell: what Python itself might print on the way out is seen here too."""
    done = subprocess.run([sys.executable, nanoserve.__file__, "hello", "--model", str(tmp_path)], text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"nanoserve: model: {tmp_path} has no config.json\n"
