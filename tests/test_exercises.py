"""The exercises: every stub is the engine's own source, every solution passes, every mutant fails at both tiers."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import check
import pytest

import kernels

ROOT = Path(__file__).parents[1]
EXERCISES = check.exercises()
each = pytest.mark.parametrize("number", EXERCISES)


def answer(number):
    return check.broken_request(number) if EXERCISES[number].PLANTED else None


def grade(number, *edits, tiers=("unit", "engine")):
    """Grade the engine's own functions, edited."""
    return check.grade(number, check.solution(EXERCISES[number], *edits, answer=answer(number)), tiers=tiers)


@each
def test_the_committed_stub_is_the_engines_function(number):
    ex = EXERCISES[number]
    committed = check.stub_path(ex).read_text(encoding="utf-8")
    assert committed == check.stub(ex), "run: python tutorial/check.py --regenerate"
    compile(committed, number, "exec")


@each
def test_stub_gives_2_and_solution_0_quickly(number):
    start = time.process_time()
    assert check.grade(number, check.stub(EXERCISES[number])) == (check.NOT_WRITTEN, "not written yet")
    code, report = grade(number)
    assert code == check.PASSED, report
    assert time.process_time() - start < 8
    for name in EXERCISES[number].NAMES:
        assert f"{name} called" in report


@pytest.mark.parametrize("number, mutant", [(n, name) for n, ex in EXERCISES.items() for name in ex.MUTANTS])
@pytest.mark.parametrize("tier", ("unit", "engine"))
def test_mutant_is_wrong(number, mutant, tier):
    code, message = grade(number, *EXERCISES[number].MUTANTS[mutant], tiers=(tier,))
    assert code == check.WRONG and message


@each
@pytest.mark.parametrize("tier", ("unit", "engine"))
def test_the_canary_is_reached(number, tier):
    """Each function, in each tier: a body that raises is noticed, and so the submission's code is what runs."""
    for text, docstring_ends in check.definitions(EXERCISES[number]):
        head = "\n".join(text.splitlines()[:docstring_ends])
        code, message = grade(number, (head, head + '\n    raise LookupError("canary")'), tiers=(tier,))
        assert code == check.WRONG and "LookupError" in message and "canary" in message


@each
def test_an_exercise_is_complete(number):
    ex = EXERCISES[number]
    spec, cases, (tokens, _, counters) = check.reference(number)
    assert ex.KIND in ("fill in", "bug hunt", "policy") and bool(ex.PLANTED) == (ex.KIND == "bug hunt")
    assert len(ex.MUTANTS) >= 4 and len(ex.HINTS) >= 3 and len(cases) >= 6 and len(tokens) >= 4
    assert 5 <= ex.MINUTES <= 90 and 1 <= ex.DIFFICULTY <= 5 and 1 <= ex.IMPORTANCE <= 5 and len(ex.text) > 200
    assert len({min(r[0] for r in spec.REQUESTS), *(r[0] for r in spec.REQUESTS)}) > 1, "requests must interleave"


def test_all_kinds_are_there():
    assert {ex.KIND for ex in EXERCISES.values()} == {"fill in", "bug hunt", "policy"}
    assert list(EXERCISES) == [f"{i + 1:02d}" for i in range(len(EXERCISES))]
    stubs = {path.stem for path in (ROOT / "tutorial/exercises/stubs").glob("*.py")}
    assert stubs == {f"ex{number}" for number in EXERCISES}


def test_nothing_stays_swapped():
    before = kernels.paged_attention, kernels.paged_attention.__code__
    assert grade("02")[0] == check.PASSED
    assert (kernels.paged_attention, kernels.paged_attention.__code__) == before


CHEATS = {
    "imports the engine's": "from kernels import token_probabilities",
    "imports it under another name": "import kernels\n_theirs = kernels.token_probabilities\n"
                                     "def token_probabilities(*args):\n    return _theirs(*args)",
    "asks the engine while it runs": "import kernels\ndef token_probabilities(*args):\n"
                                     "    return kernels.token_probabilities(*args)",
    "copies the code object": "import kernels, types\ntoken_probabilities = types.FunctionType("
                              "kernels.token_probabilities.__code__, vars(kernels))",
    "exits": "import sys\nsys.exit(0)",
    "a syntax error": "def token_probabilities(:",
    "another name": "def probabilities(logits): pass",
    "the wrong number of arguments": "def token_probabilities(logits):\n    return logits",
    "the wrong type": "def token_probabilities(*args):\n    return None",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_what_is_no_solution_does_not_pass(cheat):
    code, message = check.grade("01", CHEATS[cheat])
    assert code == (check.NOT_WRITTEN if cheat == "another name" else check.WRONG), message


def test_bug_hunts_want_the_request_and_the_reason():
    for number, ex in EXERCISES.items():
        if ex.PLANTED:
            wrong = check.grade(number, check.solution(ex, answer=answer(number) + 1))
            silent = check.grade(number, check.solution(ex, answer=answer(number)).replace("WHY = 'because'", ""))
            assert wrong[0] == silent[0] == check.WRONG and "BROKEN" in wrong[1] and "WHY" in silent[1]


def test_an_alias_by_name_is_replaced_too(monkeypatch):
    """A module that did `from kernels import token_probabilities` runs the submission as well."""
    monkeypatch.setattr(check, "an_alias", kernels.token_probabilities, raising=False)
    with check.swapped(EXERCISES["01"], "def token_probabilities(x):\n    return x + 1", "submission") as (_, calls):
        assert check.an_alias(1) == 2 and calls == {"token_probabilities": 1}
    assert check.an_alias is kernels.token_probabilities


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOSERVE_WORK", str(tmp_path))

    def run(*args):
        command = [sys.executable, ROOT / "tutorial/check.py", *args]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr
    return run


def test_a_students_way(run, tmp_path):
    assert run()[1].count("\n") == len(EXERCISES)
    code, printed = run("03")
    assert code == check.NOT_WRITTEN and (tmp_path / "ex03.py").exists() and "ch05_paging.py" in printed
    assert run("03")[0] == check.NOT_WRITTEN
    assert run("03", "--hint")[1].count("hint") == 1 and run("03", "--hint")[1].count("hint") >= 2
    assert run("03", "--diff")[0] == check.WRONG
    name, mutant = next(iter(EXERCISES["03"].MUTANTS.items()))
    (tmp_path / "ex03.py").write_text(check.solution(EXERCISES["03"], *mutant))
    code, printed = run("03")
    assert code == check.WRONG and "likely cause" in printed, name
    (tmp_path / "ex03.py").write_text("print('hello')\n" + check.solution(EXERCISES["03"]))
    code, printed = run("03")
    assert code == check.PASSED and "hello" in printed and "identical tokens" in printed
    assert "passed" in run()[1] and run("03", "--diff")[0] == check.PASSED
    assert run("03", "--reset")[0] == check.NOT_WRITTEN and "passed" not in run()[1]
    assert run("99")[0] == check.BROKEN


def test_endless_loops_and_early_exits_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "TIME_LIMIT", 12)
    path = tmp_path / "ex01.py"
    path.write_text("import os\nprint('exercise 01: passed', flush=True)\nos._exit(0)")
    assert check.check(EXERCISES["01"], path) == check.WRONG
    path.write_text("while True:\n    pass")
    assert check.check(EXERCISES["01"], path) == check.WRONG and "endless loop" in capsys.readouterr().out


def test_a_broken_installation_is_3(tmp_path, run):
    """If the engine beside it can not be imported the check says so, and does not blame the student."""
    shutil.copytree(ROOT / "tutorial", tmp_path / "tutorial", ignore=shutil.ignore_patterns("model", "draft", "figures"))
    shutil.copy(ROOT / "kernels.py", tmp_path)
    (tmp_path / "nanoserve.py").write_text("raise ImportError('no torch here')\n")
    shutil.copy(check.stub_path(EXERCISES["01"]), tmp_path / "ex01.py")
    command = [sys.executable, tmp_path / "tutorial/check.py", "01"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == check.BROKEN, done.stdout + done.stderr
