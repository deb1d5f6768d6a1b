"""The README's promises: its Python runs, its commands parse, its figures about the code are about right."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nanoserve

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ALLOWED = {"README.md", "pyproject.toml", "LICENSE", ".gitignore", ".ci", "tests", "tutorial",
           "kernels.py", "cache.py", "scheduler.py", "nanoserve.py"}


def blocks(language):
    """The README's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_nothing_is_left_to_fill_in():
    assert "_SECTION" not in README


def test_the_python_in_the_readme_runs(capsys):
    code = blocks("python")[0]
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "'output_tokens'" in printed and len(printed) > 200


def test_the_cuda_kernel_in_the_readme_runs(monkeypatch):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler here")
    (code,) = blocks("python")[1:]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    scope = {}
    exec(compile(code + "    launched = kernels.compiled(torch.zeros(1))[1]", "README.md", "exec"), scope)
    assert isinstance(scope["launched"], scope["cuda_on_cpu"].CudaOnCpu)


@pytest.mark.parametrize("line", [line.split(" #")[0] for block in blocks("bash") for line in block.splitlines()
                                  if "nanoserve.py" in line])
def test_the_commands_in_the_readme_parse(line):
    words = shlex.split(line[line.index("nanoserve.py"):])[1:]
    command = words[0] if words[0] in ("chat", "generate", "serve", "bench") else "complete"
    nanoserve.parser_for(command).parse_args(words[command != "complete":])


def test_the_map_of_the_modules_has_their_sizes():
    sizes = {name: int(lines.replace(",", "")) for name, lines in re.findall(r"\]\((\w+\.py)\) \| ([\d,]+) \|", README)}
    assert set(sizes) == {"kernels.py", "cache.py", "scheduler.py", "nanoserve.py"}
    for name, lines in sizes.items():
        assert lines == pytest.approx(len((ROOT / name).read_text().splitlines()), rel=0.05), f"{name}: update the README"


def test_nothing_else_lies_at_the_top():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed.stdout.split()} <= ALLOWED


def test_imports_point_one_way():
    """kernels and cache know nobody, scheduler at most the torch-free cache, nanoserve all."""
    allowed = {"kernels": set(), "cache": set(), "scheduler": {"cache"}, "nanoserve": {"kernels", "cache", "scheduler"}}
    for name, may in allowed.items():
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        imported = {(node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
                    for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        assert imported & set(allowed) <= may, name


def test_cache_and_scheduler_work_without_torch():
    """BlockPool and Scheduler drive simulators and tests on machines that have no torch."""
    code = ("import sys; sys.modules['torch'] = None; import scheduler, cache; "
            "s = scheduler.Scheduler(cache.BlockPool(4, 2), max_batch_tokens=4, max_batch_requests=2, max_model_len=8); "
            "s.add(scheduler.Request([1, 2, 3], 2)); print(s.schedule()[0][1])")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "3\n", run.stderr
