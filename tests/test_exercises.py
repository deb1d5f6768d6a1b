"""The exercises: every stub is the engine's own source, every solution passes, every mutant fails at both tiers."""

import ast
import csv
import importlib
import io
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import check
import exercises
import index
import pytest
import questions
from torch.utils.flop_counter import FlopCounterMode

import kernels
import nanoserve

ROOT = Path(__file__).parents[1]
EXERCISES = check.exercises()
each = pytest.mark.parametrize("number", EXERCISES)


def graded(*args, **options):
    """What `check.grade` says, with the exit code in the place of the result."""
    result, message = check.grade(*args, **options)
    return check.EXIT_CODES.get(result, check.WRONG), message


def broken(number):
    return check.reference(number).broken


def solution(number, *edits):
    """The engine's own functions as a submission; with edits, (what occurs once, what to put there), a mutant."""
    ex, text = EXERCISES[number], check.answer(EXERCISES[number])
    module = importlib.import_module(ex.MODULE)  # whatever else the functions use there
    own = {name.split(".")[-1] for name in ex.NAMES}
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    imports = "".join(f"from {ex.MODULE} import {name}\n" for name in sorted(used & vars(module).keys() - own))
    said = f"BROKEN = {broken(number)}\nWHY = 'because'\n" if ex.PLANTED else ""
    return f"{ex.HEADER}\n{imports}\n{said}\n{text}\n"


def grade(number, *edits, tiers=("unit", "engine")):
    """Grade the engine's own functions, edited."""
    return graded(number, solution(number, *edits), tiers=tiers)


@each
def test_the_committed_stub_is_the_engines_function(number):
    ex = EXERCISES[number]
    committed = (check.STUBS / f"ex{number}.py").read_text(encoding="utf-8")
    assert committed == check.stub(ex), "run: python tutorial/check.py --regenerate"
    compile(committed, number, "exec")


@each
def test_stub_gives_2_and_solution_0_quickly(number):
    start = time.process_time()
    code, report = graded(number, check.stub(EXERCISES[number]))
    assert code == check.NOT_WRITTEN and ("still there" if EXERCISES[number].PLANTED else "not written yet") in report
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


UNIT_ONLY = {  # mistakes that change no token of a serving run: the contract is for others than this engine too
    "writes into its argument": ("01", "logits = logits.float()", "logits = logits.float().sub_(1)"),
    "takes the running as they stand": ("05", "sorted(self.running, key=lambda request: request.num_behind)",
                                        "list(self.running)"),
    "matches for who wants every token computed": ("05", " if request.reuse_prefix else []", ""),
    "takes a target of 0 for none": ("09", "target is None or ", "not target or "),
    "leaves the floor behind": ("10", "self.floor += cost", "pass"),
    "lowers the floor": ("10", "self.floor += cost", "self.floor = 0"),
}


@pytest.mark.parametrize("mutant", UNIT_ONLY)
def test_what_only_a_unit_case_shows(mutant):
    number, *edit = UNIT_ONLY[mutant]
    code, message = grade(number, tuple(edit), tiers=("unit",))
    assert code == check.WRONG and "likely cause" in message, message


@each
@pytest.mark.parametrize("tier", ("unit", "engine"))
def test_the_canary_is_reached(number, tier):
    """Each function, in each tier: a body that raises is noticed, and so the submission's code is what runs."""
    for head in check.heads(check.answer(EXERCISES[number])):
        code, message = grade(number, (head, head + '\n    raise LookupError("canary")'), tiers=(tier,))
        assert code == check.WRONG and "LookupError" in message and "canary" in message


@each
def test_an_exercise_is_complete(number):
    ex = EXERCISES[number]
    want = check.reference(number)
    assert ex.KIND in ("fill in", "bug hunt", "policy") and bool(ex.PLANTED) == (ex.KIND == "bug hunt")
    assert len(ex.MUTANTS) >= 4 and len(ex.HINTS) >= 3 and len(want.cases) >= 6 and len(want.run.tokens) >= 4
    assert 5 <= ex.MINUTES <= 90 and 1 <= ex.DIFFICULTY <= 5 and 1 <= ex.IMPORTANCE <= 5 and len(ex.text) > 200
    assert len({request[0] for request in want.spec.REQUESTS}) > 1, "requests must interleave"


def test_all_kinds_are_there():
    assert {ex.KIND for ex in EXERCISES.values()} == {"fill in", "bug hunt", "policy"}
    assert list(EXERCISES) == [f"{i + 1:02d}" for i in range(len(EXERCISES))]
    stubs = {path.stem for path in check.STUBS.glob("*.py")}
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
    "the wrong shape": "def token_probabilities(logits, *args):\n    return logits[0]",
    "an assert without words": "def token_probabilities(*args):\n    assert 1 > 2",
}
CAUSES = {  # what the message has to say, beside what is wrong
    "asks the engine while it runs": "to ask the engine's function is to ask yours",
    "another name": "there is no function token_probabilities in it",
    "the wrong number of arguments": "in unit case 1 of",
    "the wrong type": "Tensor expected, not NoneType: no return?",
    "the wrong shape": "expected  of shape [1, 4]\n  yours     of shape [4]",
    "a syntax error": "your file, line 1",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_what_is_no_solution_does_not_pass(cheat):
    code, message = graded("01", CHEATS[cheat])
    assert code == (check.NOT_WRITTEN if cheat == "another name" else check.WRONG), message
    assert CAUSES.get(cheat, "") in message


@pytest.mark.parametrize("number", [number for number, ex in EXERCISES.items() if ex.PLANTED])
@pytest.mark.parametrize("tier", ("unit", "engine"))
def test_the_planted_bug_is_noticed(number, tier):
    """With the number of the request guessed right, and something else changed."""
    source = check.stub(EXERCISES[number]).replace("BROKEN = None", f"BROKEN = {broken(number)}; WHY = 'a guess'")
    code, message = graded(number, source.replace('WHY = ""', "") + "\n\ndef other():\n    pass\n", tiers=(tier,))
    assert code == check.WRONG and "BROKEN" not in message, message


def test_bug_hunts_want_the_request_and_the_reason():
    for number, ex in EXERCISES.items():
        if ex.PLANTED:
            told = f"BROKEN = {broken(number)}"
            wrong = graded(number, solution(number).replace(told, told + " + 1"))
            silent = graded(number, solution(number).replace("WHY = 'because'", ""))
            assert wrong[0] == silent[0] == check.WRONG and "BROKEN" in wrong[1] and "WHY" in silent[1]
            assert grade(number)[1].startswith("WHY: because\n"), "for the teacher, in the first line"


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
    (tmp_path / "ex03.py").write_text(solution("03", *mutant))
    code, printed = run("03")
    assert code == check.WRONG and "likely cause" in printed, name
    (tmp_path / "ex03.py").write_text("print('hello')\n" + solution("03"))
    code, printed = run("03")
    assert code == check.PASSED and "hello" in printed and "identical tokens" in printed
    assert "passed" in run()[1] and run("03", "--diff")[0] == check.PASSED
    assert run("03", "--reset")[0] == check.NOT_WRITTEN and "passed" not in run()[1]
    assert "hello" in (tmp_path / "ex03.old.py").read_text(), "nobody's work is thrown away"
    (tmp_path / "notes.json").write_text('{"03": [1')  # Ctrl-C at the wrong moment
    code, printed = run("4", "--hint")
    assert code == check.PASSED and "hint 1 of" in printed and (tmp_path / "ex04.py").exists()
    assert run("99")[0] == check.BROKEN


def test_an_endless_loop_is_shown_where_it_is(tmp_path, capsys):
    path = tmp_path / "ex01.py"
    path.write_text("x = 0\nwhile True:\n    x += 1")
    assert check.check(EXERCISES["01"], path, limit=2) == check.WRONG
    printed = capsys.readouterr().out
    assert "timeout" in printed and "endless loop" in printed and re.search(r'ex01.py", line [23] in <module>', printed)


def test_a_broken_installation_is_3(tmp_path, run):
    """If the engine beside it cannot be imported the check says so, and does not blame the student."""
    shutil.copytree(ROOT / "tutorial", tmp_path / "tutorial", ignore=shutil.ignore_patterns("model", "draft", "figures"))
    shutil.copy(ROOT / "kernels.py", tmp_path)
    (tmp_path / "nanoserve.py").write_text("raise ImportError('no torch here')\n")
    shutil.copy(check.STUBS / "ex01.py", tmp_path)
    command = [sys.executable, tmp_path / "tutorial/check.py", "01"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == check.BROKEN, done.stdout + done.stderr


# ---- the teacher's side ---------------------------------------------------------------------------------------------


IN_OTHER_WORDS = """
def match(self, tokens, root=None):
    found = []
    name = ("root", root)
    size = self.block_size
    for i in range((len(tokens) - 1) // size * self.prefix_caching):
        key = (name, tuple(tokens[i * size : i * size + size]))
        if key not in self.index:
            return found
        found.append(self.index[key])
        name = self.content[found[-1]]
    return found
"""
SECRETS = """
import json, os, pathlib
for number in range(3, 9):  # the channel to the grader is one of these
    try:
        os.write(number, b"0123456789abcdef" + json.dumps(["passed", "ha"]).encode())
    except OSError:
        pass
pathlib.Path("verdict.json").write_text(json.dumps(["passed", "ha"]))
print(json.dumps(["passed", "ha"]), flush=True)
os._exit(0)
"""
SUBMISSIONS = {  # student: what is in ex04.py, the result, and what the message says
    "anna": (IN_OTHER_WORDS, "passed", "12 unit cases, 8 interleaved requests with identical tokens"),
    "ben": (IN_OTHER_WORDS.replace("(len(tokens) - 1)", "len(tokens)"), "wrong", "unit case 2 of 12: 1..9 itself"),
    "cleo": (IN_OTHER_WORDS.replace("found = []", "while True: print('still here ' * 99)"), "wrong", "OSError"),
    "dan": ("import time\n" + IN_OTHER_WORDS.replace("found = []", "time.sleep(999)"), "timeout", "endless loop"),
    "emil": (SECRETS, "crashed", "exit code 0"),
    "fay": ("import ctypes\nctypes.string_at(0)", "crashed", "exit code -"),
    "gus": ("from cache import BlockPool\nmatch = BlockPool.match", "wrong", "the exercise is to write it"),
    "hana": (check.stub(EXERCISES["04"]), "not written", "not written yet"),
    "ida": ("def match(self, tokens root):", "wrong", "SyntaxError"),
    "jo": (solution("04"), "copied", "word for word the engine's own"),
    "kim": ("for path in (FOLDER + '/lou/ex04.py', 'ex04.py', '../lou/ex04.py'):\n    open(path, 'w').write('')\n",
            "wrong", "FileNotFoundError"),
    "lou": (b"\xff\x00 no text", "wrong", "Error"),
    "mo": (None, "missing", ""),
}


@pytest.mark.parametrize("loops", [False, True])
def test_a_folder_of_submissions_becomes_a_csv(loops, tmp_path, capfd):
    """Who does not come to an end takes all the time there is, so he is graded for himself, with less of it."""
    students = {student: it for student, it in SUBMISSIONS.items() if (it[1] == "timeout") == loops}
    for student, (source, *_) in students.items():
        (tmp_path / student).mkdir()
        if source is not None:
            source = source.encode() if isinstance(source, str) else source
            (tmp_path / student / "ex04.py").write_bytes(source.replace(b"FOLDER", repr(str(tmp_path)).encode()))
    (tmp_path / ".hidden").mkdir()
    assert check.main(["04", "--grade", str(tmp_path), "--limit", "2" if loops else "60"]) == check.PASSED
    lines = list(csv.DictReader(io.StringIO(capfd.readouterr().out)))
    assert [line["student"] for line in lines] == [student for student in students for _ in range(2)]
    for line, total, (_, result, message) in zip(lines[::2], lines[1::2], students.values()):
        assert (line["exercise"], line["result"]) == ("04", result) and message in line["message"], line
        assert (total["exercise"], total["result"]) == ("total", str(int(result == "passed"))), total


def test_whoever_grades_with_a_broken_engine_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(check.__dict__, "__file__", str(tmp_path / "no.py"))
    with pytest.raises(SystemExit) as exit:
        check.judge(EXERCISES["04"], b"")
    assert exit.value.code == check.BROKEN and "no.py" in capsys.readouterr().err


def test_the_key_is_what_arithmetic_gives():
    """Two ways to every answer: the engine's functions, and the formula that the key shows beside it."""
    sheets = [questions.questions(seed) for seed in ("sample", *map(str, range(12)))]
    for sheet in sheets:
        for question in sheet:
            assert question.answer == eval(question.arithmetic, {"ceil": math.ceil, "exp": math.exp}), question
            assert question.text.endswith("?") and question.answer > 0
    for column in zip(*sheets):
        assert len({question.text for question in column}) > 10, "a seed gives numbers of its own"
    assert questions.questions("sample") == sheets[0]


def test_the_instructors_guide_fits():
    """Its sample answers are to what the sheet asks, with the key's numbers; its minutes are those of the headers."""
    guide = (ROOT / "tutorial/INSTRUCTOR.md").read_text(encoding="utf-8")
    flat = " ".join(guide.replace("\n> ", " ").split())
    for question in questions.questions("demo"):
        asked, _, answers = flat.partition(question.text)
        assert answers and f"{question.answer:,}" in answers.partition("**3 of 3.**")[2][:500], question
    assert set(re.findall(r"\bexercises? (\d\d)", guide)) <= set(EXERCISES)
    assert set(re.findall(r"check\.py [^`]*?(--[a-z]+)", guide)) <= set(re.findall(r"--[a-z]+", check.__doc__))
    rows = re.findall(r"^\|[^|]*\| (\d\d) \| (\d+) \| ([\d, ]+) \| (\d+) \|", guide, re.MULTILINE)
    for chapter, reading, numbers, minutes in rows:
        said = index.chapters()[int(chapter)]["Minutes"]
        assert int(reading) == sum(map(int, re.findall(r"(?:read|run) (\d+)", said))), chapter
        assert int(minutes) == sum(EXERCISES[number].MINUTES for number in numbers.split(", ")), numbers
    assert len(rows) >= 18


def test_what_the_fair_exercise_says_of_others_is_so():
    """The figures in its text: first come, first served, counters without a floor, and the engine's own."""
    ex, counters = EXERCISES["10"], check.reference("10").run.counters
    fcfs, saving, own = (int(line) for line in re.findall(r": +(\d+)$", ex.text, re.MULTILINE))
    assert counters["service differs by"] == own and f"2 U = {counters['at most']}" in ex.text
    for mutant, figure in (("first come, first served", fcfs), ("lets tenants save up", saving)):
        assert f"served {figure} apart" in grade("10", *ex.MUTANTS[mutant], tiers=("engine",))[1]


def test_the_roofline_counts_what_torch_counts():
    """Exercise 11's answer is the engine's own; here it is held against torch's counter, for three prompts and their
    decoding. Torch counts what the definition computes, which is masked afterwards; the roofline what queries see.
    """
    llm, counted = exercises.engine(), []
    roofline, pack, costs = nanoserve.Roofline(llm, 1.0, 1.0), llm.pack, []
    llm.pack = lambda plan: (costs.append(roofline.cost(plan)), pack(plan))[1]
    lengths = (5, 9, 14)
    for length in lengths:
        llm.add_request(exercises.prompt(length, length), nanoserve.SamplingParams(temperature=0, max_tokens=9))
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            llm.step()
        counted.append(counter.get_total_flops())
    per_pair = 2 * 2 * 2 * 4 * 8  # multiply and add, scores and values, layers, heads, dimensions
    assert costs[0][1] == counted[0] - per_pair * sum(n * (n - 1) // 2 for n in lengths)
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 64  # layers of q and o, k and v, MLP; output layer
    assert costs[1] == (8 * weights + (6 + 10 + 15) * 2 * 2 * 2 * 8 * 8, counted[1])


def test_a_wrong_command_is_3(run):
    for wrong in (["--key"], ["--no-such-option"], ["--grade", "nowhere"], ["--hint"], ["0"], ["003"]):
        assert run(*wrong)[0] == check.BROKEN, wrong
    code, printed = run("--seed", "anna", "--key")
    assert code == check.PASSED and printed.count(" = ") == len(questions.QUESTIONS)
