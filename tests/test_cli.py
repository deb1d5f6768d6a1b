"""The command line: `main([...])` in this process on a tiny random model with a real tokenizer, and once for real."""

import argparse
import builtins
import contextlib
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import nanoserve
from nanoserve import LLM, ModelConfig, SamplingParams, Tokenizer, layout, main, parse_memory, parse_range

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
TOKENIZER = Path(__file__).parent / "data" / "tokenizers" / "byte_level"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 400, "hidden_size": 32,
          "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 256, "tie_word_embeddings": False}


def save_model(folder: Path, config: dict) -> Path:
    """A random checkpoint that says printable ASCII, with a tokenizer and a chat template."""
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(place.num_rows, *place.shape[1:], generator=generator) * 0.5
               for name, place in layout(ModelConfig.from_dict(config)).items()}
    for path in TOKENIZER.iterdir():
        shutil.copy(path, folder)
    texts = [Tokenizer(folder).decode([i]) for i in range(config["vocab_size"])]
    mute = [i for i, text in enumerate(texts) if not (text and text.isascii() and text.isprintable())]
    weights["lm_head.weight"][mute] = 0
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.fixture(scope="module")
def options(folder):
    return ["--model", str(folder), "--dtype", "float32", "--kv-memory", "8MB"]


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, dtype="float32", kv_memory=8_000_000)


P = SamplingParams(temperature=0, max_tokens=12)
PLAIN = ["--temperature", "0", "--max-tokens", "12"]


@pytest.fixture
def say(monkeypatch):
    """Lines that `input` returns; an exception among them is raised; then the input ends."""
    def script(*lines):
        lines = iter(lines)

        def read(prompt=""):
            line = next(lines, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)

    return script


# ---- complete ----


def test_complete_prints_prompt_and_text(options, llm, capsys):
    assert main(["Once upon", *options, *PLAIN]) == 0
    out, err = capsys.readouterr()
    assert out == "Once upon" + llm.generate("Once upon", P)[0].text + "\n"
    assert "Traceback" not in err


def test_options_reach_the_sampler(options, llm, capsys):
    """Each one, against the API with the same parameters."""
    p = SamplingParams(temperature=1.7, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=5, max_tokens=20,
                       stop=["e", "zz"], ignore_eos=True)
    flags = ["--temperature=1.7", "--top-k=30", "--top-p=0.9", "--min-p=0.01", "--repetition-penalty=1.2", "--seed=5",
             "--max-tokens=20", "--stop=e", "--stop=zz", "--ignore-eos"]
    assert nanoserve.sampling_from(nanoserve.parser_for("complete").parse_args(["x", *flags])) == p
    for flagged, params in ((flags, p), (flags[:-3], replace(p, stop=(), ignore_eos=False))):
        main(["Once upon", *options, *flagged])
        assert capsys.readouterr().out == "Once upon" + llm.generate("Once upon", params)[0].text + "\n"


def test_the_cache_can_be_int8(options):
    args = nanoserve.parser_for("serve").parse_args([*options, "--kv-dtype", "int8"])
    assert nanoserve.make_llm(args).cache.data.dtype is torch.int8


def test_ctrl_c_ends_cleanly(options, monkeypatch, capsys):
    def stream(self, prompt, params):
        yield " a"
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", stream)
    assert main(["Once", *options]) == 130
    assert capsys.readouterr().out == "Once a"


@pytest.mark.parametrize("argv, message", [
    (["hi", "--model", "no/such/folder"], "no/such/folder"), (["hi", "--temperature", "-1"], "temperature: .*-1"),
    (["hi", "--max-tokens", "300"], "max_model_len=256"), (["", "--max-tokens", "0"], "max_tokens: .*0"),
    (["hi", "--device", "abacus"], "abacus"), (["hi", "--dtype", "int3"], "int3"),
    (["bench", "--json", "no/such.json"], "--json: there is no folder no"),
    (["hi", "--kv-memory", "10"], "kv_memory"), (["generate", "--file", "no.txt", "--jsonl", "out"], "no.txt"),
    (["hi", "--max-model-len", "9999"], "max_model_len.*9999")], ids=str)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(options, argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([argv[0], *options, *argv[1:]]) == 2  # the later of two equal options counts
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("nanoserve: ") and re.search(message, last)


def test_an_error_of_the_system_without_a_number_is_told_too(monkeypatch, capsys):
    """Not every OSError has a `strerror`: a time-out, or what a library raises in its own words."""
    def fail(args):
        raise OSError("the tape is full")

    monkeypatch.setattr(nanoserve, "complete", fail)
    assert main(["hi"]) == 2 and capsys.readouterr().err == "nanoserve: complete: the tape is full\n"


def test_a_command_that_does_not_come_first_is_no_prompt(capsys):
    with pytest.raises(SystemExit) as exit:
        nanoserve.main(["--temperature", "0", "chat"])
    assert exit.value.code == 2 and "a command comes first: nanoserve chat" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["hi", "--tempurature", "1"], ["hi", "--top-k", "many"], ["generate"],
                                  ["bench", "--shape", "cube"], ["bench", "--input-len", "9..3"],
                                  ["hi", "--kv-memory", "lots"], ["hi", "--kv-dtype", "int4"]], ids=str)
def test_wrong_options_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2 and "nanoserve" in capsys.readouterr().err


@pytest.mark.parametrize("command, known", [
    ("", ["chat", "generate", "serve", "bench"]), ("chat", ["--temperature", "--max-tokens"]),
    ("generate", ["--file", "--jsonl", "--top-p"]), ("serve", ["--port", "--api-key", "--max-queue", "--drain-seconds"]),
    ("bench", ["--shape", "gpt2", "--compare", "--input-len", "--runs"])])
def test_help(command, known, capsys):
    """Names every option; `nanoserve` alone, and `-h`, print the overview."""
    with contextlib.suppress(SystemExit):
        assert main([command, "--help"] if command else ["--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in known)
    if not command:
        assert main([]) == 0 and main(["-h"]) == 0 and capsys.readouterr().out == out * 2
        with pytest.raises(SystemExit) as exit:
            main(["some prompt", "--help"])
        assert exit.value.code == 0 and "--temperature" in capsys.readouterr().out


@pytest.mark.parametrize("text, value", [
    ("0.8", 0.8), ("500000000", 500_000_000), ("512MiB", 512 << 20), ("2GB", 2_000_000_000), ("2g", 2_000_000_000),
    ("1.5KiB", 1536), ("1T", 10**12), ("0.5GiB", 1 << 29), ("10B", 10)])
def test_parse_memory(text, value):
    assert parse_memory(text) == value and type(parse_memory(text)) is type(value)


@pytest.mark.parametrize("text", ["", "lots", "5 apples", "-1", "1.2.3", "GB", "1EB"])
def test_parse_memory_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="512MiB"):
        parse_memory(text)


def test_parse_range():
    assert parse_range("128") == (128, 128) and parse_range("16..256") == (16, 256) and parse_range("1..1") == (1, 1)
    for text in ("", "0", "5..4", "3-4", "..4", "3..", "x", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="16..256"):
            parse_range(text)


# ---- chat ----


def test_chat_keeps_the_conversation_until_new(options, llm, say, capsys):
    say("hello", "  ", "and you?", "/new", "hello")
    assert main(["chat", *options, *PLAIN]) == 0

    def answer(*messages):
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": message} for i, message in enumerate(messages)]
        return llm.generate([llm.tokenizer.apply_chat_template(turns)], P)[0].text

    first = answer("hello")
    assert capsys.readouterr().out.split("\n") == [first, answer("hello", first, "and you?"), first, "", ""]


def test_chat_ends_with_ctrl_c_at_the_prompt(options, say):
    say(KeyboardInterrupt())
    assert main(["chat", *options]) == 130


def test_ctrl_c_stops_an_answer_but_not_the_chat(options, say, capsys, monkeypatch):
    seen, original = [], LLM.stream

    def stream(self, prompt, params):
        seen.append(self.tokenizer.decode(prompt))
        for i, piece in enumerate(original(self, prompt, params)):
            if i == 3 and len(seen) == 1:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(LLM, "stream", stream)
    say("hello", "again")
    assert main(["chat", *options, *PLAIN]) == 0
    cut, full = capsys.readouterr().out.splitlines()[:2]
    assert cut and cut.strip() in seen[1] and "again" in seen[1] and full  # what was said is part of what follows


def test_chat_survives_a_message_that_does_not_fit(options, say, capsys):
    say("x" * 400, "hello")
    assert main(["chat", *options, *PLAIN]) == 0
    out, err = capsys.readouterr()
    assert "max_model_len=256" in err and len([line for line in out.splitlines() if line]) == 1


def test_a_long_chat_forgets_its_beginning(options, say, capsys):
    """Whatever --max-tokens asks for, the oldest exchanges make room for it: no message is refused."""
    say(*["hello"] * 12)
    assert main(["chat", *options, "--temperature", "0", "--max-tokens", "200", "--stop", "a"]) == 0
    out, err = capsys.readouterr()
    assert "max_model_len" not in err and len(out.split("\n")) == 12 + 2


def test_chat_needs_a_template(folder, tmp_path, say, capsys):
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    assert main(["chat", "--model", str(bare)]) == 2
    assert "chat template" in capsys.readouterr().err


# ---- generate ----


def rows(path: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert len({row["index"] for row in lines}) == len(lines)
    return {row["index"]: row for row in lines}


@pytest.fixture
def files(tmp_path):
    prompts = ["Once upon", "The fox", "x" * 300, "Grüße, 世界", "a"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts) + "\n", encoding="utf-8")
    return prompts, tmp_path / "out.jsonl", ["generate", "--file", str(tmp_path / "prompts.txt"),
                                             "--jsonl", str(tmp_path / "out.jsonl"), *PLAIN]


def test_generate_writes_a_line_for_each_prompt(options, files, llm):
    prompts, out, argv = files
    assert main([*argv, *options]) == 0
    result = rows(out)
    assert sorted(result) == list(range(5))
    for index, prompt in enumerate(prompts):
        assert result[index]["prompt"] == prompt
        if index == 2:
            assert "max_model_len=256" in result[index]["error"] and "text" not in result[index]
            continue
        expected = llm.generate(prompt, P)[0]
        assert result[index] == {"index": index, "prompt": prompt, "text": expected.text, "finish_reason": "length",
                                 "num_tokens": 12}


def test_generate_into_a_pipe(options, files, monkeypatch):
    """As in `--jsonl /dev/stdout | jq`: what is there is nothing, and reading it would wait for ever for ourselves."""
    prompts, out, argv = files
    os.mkfifo(out)
    pipe = os.open(out, os.O_RDWR)
    monkeypatch.setattr(nanoserve, "finished_results", lambda *args: pytest.fail("it reads from the pipe"))
    assert main([*argv, *options]) == 0
    lines = os.read(pipe, 1 << 16).decode().splitlines()
    os.close(pipe)
    assert sorted(json.loads(line)["prompt"] for line in lines) == sorted(prompts)


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(options, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("Grüße\r\nThe fox".encode("utf-8-sig"))
    argv = ["generate", "--file", str(tmp_path / "prompts.txt"), "--jsonl", str(tmp_path / "out"), *PLAIN]
    assert main([*argv, *options]) == 0
    assert [rows(tmp_path / "out")[i]["prompt"] for i in (0, 1)] == ["Grüße", "The fox"]


def test_generate_without_standard_error(options, files, monkeypatch):
    """What Python starts with `2>&-` or as a Windows service has none."""
    _, out, argv = files
    monkeypatch.setattr(sys, "stderr", None)
    assert main([*argv, *options]) == 0 and len(rows(out)) == 5


def test_generate_resumes_where_it_was_cut_off(options, files, monkeypatch):
    """Complete lines stay as they are, a line cut short and missing ones are done; then nothing is left to do."""
    _, out, argv = files
    main([*argv, *options])
    lines, before = out.read_text(encoding="utf-8").splitlines(keepends=True), rows(out)
    kept = json.loads(lines[1])  # the first one is the refusal
    kept["text"] = marked = "kept, with\u2028separators\x85 inside"
    begun = [lines[0], json.dumps(kept, ensure_ascii=False) + "\n", lines[2], lines[3][:20]]
    out.write_bytes("".join(begun).encode() + "\u4e16".encode()[:1])
    asked, original = [], LLM.add_request
    monkeypatch.setattr(LLM, "add_request", lambda self, prompt, *a: asked.append(prompt) or original(self, prompt, *a))
    assert main([*argv, *options]) == 0
    after = rows(out)
    assert after[kept["index"]]["text"] == marked and len(asked) == 2
    assert {**after, kept["index"]: before[kept["index"]]} == before
    content = out.read_text(encoding="utf-8")
    assert main([*argv, *options]) == 0
    assert len(asked) == 2 and out.read_text(encoding="utf-8") == content


def test_generate_survives_ctrl_c(options, files, monkeypatch):
    _, out, argv = files
    original, steps = LLM.step, iter(range(100))

    def step(self):
        if next(steps) == 5:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(LLM, "step", step)
    assert main([*argv, *options]) == 130
    assert rows(out).keys() == {2}  # the refused one; the rest was under way
    monkeypatch.setattr(LLM, "step", original)
    assert main([*argv, *options]) == 0 and rows(out).keys() == set(range(5))


def test_generate_into_a_folder_that_is_not_there(options, files, capsys, tmp_path):
    argv = files[2]
    argv[argv.index("--jsonl") + 1] = str(tmp_path / "nowhere" / "out.jsonl")
    assert main([*argv, *options]) == 2
    assert "nowhere" in capsys.readouterr().err


# ---- bench ----


@pytest.mark.parametrize("windows", [False, True])
def test_bench_prints_its_figures(windows, options, capsys, monkeypatch):
    # Measuring the machine takes half a GB and seconds: not here.
    monkeypatch.setattr(nanoserve, "measure_roofline", lambda dtype, device: (1e9, 1e9))
    if windows:  # which has no such module
        monkeypatch.setattr(nanoserve, "resource", None)
        assert nanoserve.max_open_files() == math.inf
    tiny = ["--requests", "2", "--input-len", "3..5", "--output-len", "2..4", "--runs", "1"]
    assert main(["bench", *options, *tiny]) == 0
    out = capsys.readouterr().out
    assert ("peak memory nan" in out) == windows
    work = nanoserve.workload("uniform", 2, uniform=((3, 5), (2, 4)))
    num_in, num_out = sum(job.prompt for job in work), sum(job.output for job in work)
    assert f"2 requests, {num_in} tokens in, {num_out} out, greedy, all submitted at once" in out
    assert "prefix hits" not in out
    for figure in ("output ", "TTFT ", "ITL ", "p99", "roofline ", "peak memory "):
        assert figure in out


def test_bench_writes_its_figures_to_a_file(options, capsys, monkeypatch, tmp_path):
    """The same as it prints; `weight_bytes` are those that a step reads. All requests have the temperature asked for."""
    monkeypatch.setattr(nanoserve, "measure_roofline", lambda dtype, device: (1e9, 2e9))
    temperatures, add_request = [], LLM.add_request
    monkeypatch.setattr(LLM, "add_request", lambda self, prompt, params: (
        temperatures.append(params.temperature), add_request(self, prompt, params))[1])
    tiny = ["bench", *options, "--requests", "2", "--input-len", "3", "--output-len", "4", "--runs", "3"]
    assert main([*tiny, "--json", str(tmp_path / "figures.json"), "--temperature", "0.5"]) == 0
    out, figures = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    assert "8 out, temperature 0.5, all" in out and set(temperatures) == {0.5}
    assert f"output      {figures['tokens_per_second']:,.0f} tok/s" in out
    assert f"roofline    {100 * figures['roofline']:.0f} %" in out
    assert f"floor on this machine is {figures['floor_tokens_per_second']:,.0f} tok/s" in out
    assert (figures["copy_bytes_per_second"], figures["flops_per_second"]) == (1e9, 2e9)
    config = nanoserve.look_up(options[1])[1]
    assert figures["weight_bytes"] == 4 * sum(nanoserve.num_weights(config)) and figures["peer"] is None
    assert main([*tiny, "--compare", "transformers", "--temperature", "0.5"]) == 2
    assert "--temperature: 0.5 cannot go with --compare" in capsys.readouterr().err


def test_bench_refuses_what_the_model_can_not_hold(options, capsys, monkeypatch):
    monkeypatch.setattr(nanoserve, "measure_roofline", lambda dtype, device: (1e9, 1e9))
    assert main(["bench", *options, "--requests", "2", "--input-len", "250", "--output-len", "20"]) == 2
    assert "max_model_len=256" in capsys.readouterr().err


def test_bench_runs_agents_as_they_arrive(options, capsys, monkeypatch):
    """Each agent's later prompts begin with its earlier ones."""
    monkeypatch.setattr(nanoserve, "measure_roofline", lambda dtype, device: (1e9, 1e9))
    agents = ["--workload", "agents", "--requests", "16", "--scale", "60", "--runs", "1", "--rate", "400", "--burst", "2"]
    assert main(["bench", *options, *agents]) == 0
    out = capsys.readouterr().out
    jobs = nanoserve.workload("agents", 16, scale=60, rate=400, burst=2, longest=256)
    assert f"16 requests, {sum(job.prompt for job in jobs):,} tokens in, {sum(job.output for job in jobs):,} out" in out
    assert f"over {jobs[-1].at:.1f} s" in out
    assert float(re.search(r"prefix hits ([\d.]+)% of the prompts", out)[1]) > 30
    for option, value in (("rate", "0"), ("rate", "1e-320"), ("burst", "-1"), ("burst", "1e200"), ("burst", "1e-200"),
                          ("scale", "nan"), ("scale", "inf"), ("scale", "1e-320")):
        assert main(["bench", *options, *agents, "--" + option, value]) == 2
        error = capsys.readouterr().err
        assert f"{option}: must be a number from " in error and f"got {float(value)}" in error
    for other in (["--compare", "transformers"], ["--nano-vllm"]):
        assert main(["bench", *options, *agents, *other]) == 2
        assert f"--rate: 400.0 cannot go with {other[0]}" in capsys.readouterr().err
    assert main(["bench", *options, *agents, "--kv-memory", "20kB"]) == 0  # lengths that the cache has room for


def test_time_to_first_token_counts_from_when_a_request_was_due(monkeypatch):
    """On a clock on which a step takes a second: the second request is due in the middle of the first one's."""
    llm = nanoserve.LLM(dtype="float32", device="cpu")
    clock, step = SimpleNamespace(now=100.0), llm.step
    monkeypatch.setattr(nanoserve, "time", SimpleNamespace(
        perf_counter=lambda: clock.now, sleep=lambda seconds: vars(clock).update(now=clock.now + seconds)))
    monkeypatch.setattr(llm, "step", lambda: (vars(clock).update(now=clock.now + 1), step())[1])
    run = nanoserve.run_workload(llm, [(0.0, [5, 6, 7], 3), (1.5, [8, 9], 2), (9.0, [7], 1)])
    assert run == {"seconds": 10.0, "idle": 5.0, "ttft": [1.0, 1.5, 1.0], "itl": [1.0] * 3}


def test_workloads_are_what_they_say():
    bounds = (16, 256), (16, 256)
    work, again, other = (nanoserve.workload("uniform", 32, seed, uniform=bounds) for seed in (0, 0, 1))
    assert work == again != other
    assert (len(work), sum(job.prompt for job in work), sum(job.output for job in work)) == (32, 5310, 4259)
    assert all(16 <= job.prompt <= 256 and 16 <= job.output <= 256 and job.at == 0 for job in work)
    nano = nanoserve.nano_vllm_workload(1000, 0)
    assert (len(nano), sum(tokens for *_, tokens in nano)) == (256, 133_966)
    for name, ((prompt, _), (output, _)) in nanoserve.WORKLOADS.items():
        jobs = nanoserve.workload(name, 2000, scale=4)
        if name != "agents":
            assert statistics.median(job.prompt for job in jobs) == pytest.approx(prompt / 4, rel=0.1), name
        assert statistics.median(job.output for job in jobs) == pytest.approx(output / 4, rel=0.1), name
        cut = nanoserve.workload(name, 200, longest=100)
        assert max(job.prompt + job.output for job in cut) <= 100 and min(min(job[1:3]) for job in cut) >= 1


def test_agents_share_a_growing_prefix():
    jobs = nanoserve.workload("agents", 8000, seed=3)
    assert statistics.mean(job.prompt for job in jobs) == pytest.approx(8596, rel=0.05)  # Mooncake's means
    assert statistics.mean(job.output for job in jobs) == pytest.approx(182, rel=0.05)
    turns = [[job for job in jobs if job.text == text] for text in range(3)]
    for mine in turns:
        assert len(mine) == 8
        assert all(b.prompt > a.prompt + a.output for a, b in zip(mine, mine[1:]))
    ids = [nanoserve.token_ids(count, "0 5", 500) for count in (9, 4, 9)]
    assert ids[0][:4] == ids[1] and ids[0] == ids[2] != nanoserve.token_ids(9, "0 6", 500) and min(ids[0]) >= 16


@pytest.mark.parametrize("burst", [0.5, 1.0, 4.0])
def test_arrivals_have_their_rate_and_burst(burst):
    times = [job.at for job in nanoserve.workload("chat", 20_000, rate=5.0, burst=burst)]
    gaps = [b - a for a, b in zip([0.0, *times], times)]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.1)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(burst, rel=0.1)


# ---- for real ----


def test_the_command_itself(options, llm):
    """Text, and nothing else, on standard output; the log on standard error."""
    done = subprocess.run([sys.executable, str(ROOT / "nanoserve.py"), "Once", *options, *PLAIN], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Once" + llm.generate("Once", P)[0].text + "\n"
    assert "KV blocks" in done.stderr and "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_error(options):
    """As in `nanoserve ... | head -c 4`."""
    process = subprocess.Popen([sys.executable, str(ROOT / "nanoserve.py"), "Once", *options, "--max-tokens", "200",
                                "--ignore-eos"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(4) == b"Once"
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert "Traceback" not in errors and "Exception" not in errors


def test_standard_input_that_ends(options, monkeypatch, capsys):
    """The real `input`, at the end of a file that is no terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(["chat", *options, *PLAIN]) == 0
    assert "Ask away" not in capsys.readouterr().err


def test_generate_leaves_a_file_alone_that_is_not_its_own(tmp_path, capsys):
    """Neither other people's lines nor results of other prompts are overwritten; and bad numbers are named."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("one\ntwo\n")
    for text in ('{"user": "precious"}\n', '{"index": 0, "prompt": "another", "text": "x"}\n', 'not json\n{"index": 0}\n',
                 "[1]\n", "null\n", '{"index": true, "prompt": "two"}\n', "precious", '{"index": 0, "prompt": "another"}'):
        out.write_text(text)
        assert nanoserve.main(["generate", "--file", str(prompts), "--jsonl", str(out)]) == 2
        assert "is not a result for these prompts" in capsys.readouterr().err and out.read_text() == text
    with pytest.raises(SystemExit) as exit:
        nanoserve.main(["bench", "--requests", "0"])
    assert exit.value.code == 2 and "'0' is not a number from 1 on" in capsys.readouterr().err
