"""The tutorial: every chapter runs and its claim holds; index, headers, docstring links and surveys agree."""

import ast
import importlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path

import check
import index
import pytest
import simulator

from nanoserve import LLM, workload

ROOT = Path(__file__).parents[1]
WRITTEN = {number: fields for number, fields in index.chapters().items() if fields}
SOURCES = {number: (ROOT / "tutorial" / fields["file"]).read_text(encoding="utf-8") for number, fields in WRITTEN.items()}
each = pytest.mark.parametrize("number", WRITTEN)


def counted(text: str) -> list[str | float]:
    """The words and numbers of what a chapter printed, but for what depends on the machine: its seconds."""
    text = "\n".join(line for line in text.splitlines() if not line.startswith("~"))
    words = re.findall(r"[\d,.]*\d|[^\W\d]+|#+|-+|\S", text)
    return [float(word.replace(",", "")) if word[-1].isdigit() else word.strip("#-") for word in words]


@pytest.fixture(scope="module")
def runs(request):
    """Of every chapter asked for: in processes of their own, one for each core at a time, with one thread and no network."""
    pool, nowhere = ThreadPoolExecutor(os.cpu_count()), "http://127.0.0.1:9"
    asked = (item.callspec.params["number"] for item in request.session.items if "runs" in item.fixturenames)
    yield {number: pool.submit(index.run, WRITTEN[number]["file"], http_proxy=nowhere, https_proxy=nowhere)
           for number in asked}
    pool.shutdown(cancel_futures=True)


@each
def test_the_chapter_runs(number, runs):
    """It ends in assertions on what it claims, and what it counts is what the repository says that it printed; but for the
    last digit, which may be another machine's.
    """
    file, run = WRITTEN[number]["file"], runs[number].result()
    assert run.returncode == 0, run.stderr
    assert WRITTEN[number]["title"] in run.stdout and "you said" in run.stdout and "because" in run.stdout
    expected = counted(index.printed(file).read_text(encoding="utf-8"))
    for i, (now, then) in enumerate(zip(counted(run.stdout), expected, strict=True)):
        is_close = isinstance(now, float) and isinstance(then, float) and abs(now - then) <= 0.02 * abs(then)
        assert now == then or is_close, f"after {expected[max(0, i - 20) : i]}"


def test_the_engine_beside_the_simulator_plans_alike_where_steps_would_overlap():
    """As they do on a GPU unless told otherwise; the chapters hold its plans against the simulator's."""
    plans = []
    for overlap in (False, True):
        llm = LLM(kv_memory=1 << 24, max_batch_tokens=16, max_batch_requests=2, overlap=overlap)
        simulator.serve(server := simulator.Engine(llm), workload("chat", 4, scale=60))
        plans.append(server.plans)
    assert plans[0] == plans[1] and len(plans[0]) > 4


@each
def test_a_chapter_is_built_like_the_others(number):
    fields, source = WRITTEN[number], SOURCES[number]
    assert tuple(fields)[2:] == index.FIELDS, "the header's fields, in order"
    assert index.links(fields["Survey"]) == index.links(index.PLAN[number][2]), "the header's sections are the plan's"
    assert re.search(r"arXiv:\d{4}\.\d{5}", fields["Papers"])
    for heading in ("## The idea", "*Invariant:*", "*Cost:*", "## Why", "## At scale", "## Try this"):
        assert source.count(heading) == 1, heading
    assert "does not help" in source or "goes wrong" in source, "the case in which it loses"
    assert re.search(r"^PREDICT = ", source, re.MULTILINE)
    last = source.rstrip().rsplit("# %%", 1)[1].splitlines()
    assert "The claim" in last[0] and any(line.startswith("assert") for line in last)
    assert 80 <= len(source.splitlines()) <= 245
    figure = ROOT / "tutorial" / "figures" / f"{Path(fields['file']).stem}.png"
    assert figure.stat().st_size < 100_000


@each
def test_the_code_a_chapter_names_exists(number):
    for name in WRITTEN[number]["Code"].split(", "):
        module, *attributes = name.split(".")
        assert reduce(getattr, attributes, importlib.import_module(module))


def test_chapters_and_exercises_name_each_other():
    for number, fields in WRITTEN.items():
        named = re.findall(r"\d\d", fields["Exercise"])
        assert named == [n for n, ex in check.exercises().items() if ex.CHAPTER == fields["file"]]
        assert all(f"**{n}**" in SOURCES[number] or f"**Exercise {n}**" in SOURCES[number] for n in named)
    planned = {f"ch{number:02d}_{slug}.py" for number, (slug, *_) in index.PLAN.items()}
    assert {ex.CHAPTER for ex in check.exercises().values()} <= planned
    assert {path.name for path in (ROOT / "tutorial").glob("ch[0-9]*.py")} <= planned


def test_the_index_is_generated_from_the_headers():
    readme = (ROOT / "tutorial" / "README.md").read_text(encoding="utf-8")
    assert readme == index.fill_in(readme), "run: python tutorial/index.py"
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / "tutorial" / target).exists(), target


def test_every_section_of_the_surveys_has_its_place():
    everything = {(survey, section) for survey, sections in index.SECTIONS.items() for section in sections}
    planned = set().union(*(index.links(sections) for *_, sections in index.PLAN.values()))
    assert planned == everything, everything ^ planned


@pytest.mark.parametrize("module", ("kernels", "cache", "scheduler", "nanoserve"))
def test_docstring_links_lead_somewhere(module):
    """Every "Survey A ... · B ..." in the four modules names sections that exist, and that a chapter is about."""
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    documented, found = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef), 0
    for node in (node for node in ast.walk(tree) if isinstance(node, documented)):
        text = " ".join((ast.get_docstring(node) or "").split())
        for line in re.findall(r"Survey ([ABC] .*?)(?=\.(?: |$)|\. ?\(| \(arXiv|$)", text):
            index.links(line)
            found += 1
    assert found >= 2


def test_links_refuse_what_no_survey_has():
    assert index.links("C KV Cache Optimization: Memory Management, Reuse Strategies") == {
        ("C", "KV Cache Optimization: Memory Management"), ("C", "KV Cache Optimization: Reuse Strategies")}
    assert index.links("B v1 3.2.5 (Sampling optimization)") == {("B", "3.2.5")} and len(index.links("B 3.2")) == 5
    for wrong in ("A III.D", "B 3.3", "C KV Cache Optimization: Compression Strategies", "C Cache"):
        with pytest.raises(ValueError):
            index.links(wrong)
