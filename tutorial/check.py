"""Checks the exercises, with the engine as the grader: your function is put into the real engine, which must then
generate the same tokens.

    python tutorial/check.py               the list: number, status, kind, minutes, difficulty, importance
    python tutorial/check.py 03            the first time puts work/ex03.py there for you to write in; then checks it
    python tutorial/check.py 03 --hint     one more hint each time;  --watch: check again whenever the file changes
    python tutorial/check.py 03 --diff     after a pass: yours beside the engine's;  --reset: start again

For teachers (tutorial/INSTRUCTOR.md):

    python tutorial/check.py --grade FOLDER > grades.csv     FOLDER/STUDENT/ex03.py and so on; with a number that one only
    python tutorial/check.py --seed NAME --key               written questions with numbers of NAME's own; and the answers

Exit codes: 0 passed, 1 wrong, 2 not written yet, 3 something is the matter with the installation or the command.

An exercise is a file in tutorial/exercises/. Its stub, its solution and its mutants all come from the engine's own
source, so none of them can fall behind it. A submission runs in a process and a folder of its own, with a time limit and
one thread. There the engine first serves the exercise's requests itself; then its own function is made unusable wherever
somebody holds it, the submission is loaded, and put in its place in every module and class that has it.
"""

import argparse
import ast
import contextlib
import copy
import csv
import difflib
import faulthandler
import functools
import hashlib
import importlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
PASSED, WRONG, NOT_WRITTEN, BROKEN = 0, 1, 2, 3
TIME_LIMIT = 60  # seconds; a check takes three
LARGEST_FILE = 1 << 20  # bytes, of what a submission prints or writes


# ---- what an exercise is, read without importing anything --------------------------------------------------------------


@functools.cache
def exercises() -> dict[str, SimpleNamespace]:
    """{number: what its file says}, in order. The upper-case literals of the file, and its docstring as `text`."""
    found = {}
    for path in sorted((HERE / "exercises").glob("ex[0-9][0-9]_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        facts = {"path": path, "id": path.name[2:4], "text": ast.get_docstring(tree), "PLANTED": None, "HEADER": ""}
        for node in tree.body:
            if isinstance(node, ast.Assign):
                with contextlib.suppress(ValueError):  # not a literal: nothing that is needed here
                    value = ast.literal_eval(node.value)
                    if isinstance(names := node.targets[0], ast.Tuple):
                        facts.update(zip([name.id for name in names.elts], value))
                    else:
                        facts[names.id] = value
        found[facts["id"]] = SimpleNamespace(**facts)
    return found


def definitions(ex) -> list[tuple[str, int]]:
    """Source of each function that the exercise is about, dedented, and in which of its lines the docstring ends."""
    path = Path(*ex.MODULE.split(".")).with_suffix(".py")
    text = (ROOT / path if (ROOT / path).exists() else HERE / path).read_text(encoding="utf-8")
    result = []
    for name in ex.NAMES:
        node = ast.parse(text)
        for part in name.split("."):
            node = next(child for child in node.body if getattr(child, "name", None) == part)
        lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
        result.append((textwrap.dedent("\n".join(lines)), node.body[0].end_lineno - node.lineno + 1))
    return result


def edit(text: str, *edits: tuple[str, str]) -> str:
    """Text with each `old` replaced by its `new`; every `old` must occur exactly once."""
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{text.count(old)} places, not one, to edit: {old!r}")
        text = text.replace(old, new)
    return text


def stub_path(ex) -> Path:
    """Where the stub is committed."""
    return HERE / "exercises" / "stubs" / f"ex{ex.id}.py"


def stub(ex) -> str:
    """What the student starts from: signatures and docstrings, or for a bug hunt the functions with the bug in them."""
    parts = [f'"""Exercise {ex.id}: {ex.TITLE}\n\n{ex.text}\n"""', ex.HEADER.strip()]
    if ex.PLANTED:
        parts += ["BROKEN = None  # the number, from 0, of the request whose tokens come out wrong\n"
                  'WHY = ""  # in a sentence or two: what happens to it, and why to no other']
        parts += ["\n" + text for text in edit("\0".join(text for text, _ in definitions(ex)), ex.PLANTED).split("\0")]
    else:
        parts += ["\n" + "\n".join([*text.splitlines()[:end], "    raise NotImplementedError"])
                  for text, end in definitions(ex)]
    return "\n\n".join(filter(None, parts)) + "\n"


def solution(ex, *edits: tuple[str, str], answer: int | None = None) -> str:
    """The engine's own functions as a submission; with `edits` a mutant."""
    functions = "\n\n\n".join(text for text, _ in definitions(ex))
    used = {node.id for node in ast.walk(ast.parse(functions)) if isinstance(node, ast.Name)}
    module = importlib.import_module(ex.MODULE)  # whatever else the functions use there
    own = {name.split(".")[-1] for name in ex.NAMES}
    imports = "".join(f"from {ex.MODULE} import {name}\n" for name in sorted(used & vars(module).keys() - own))
    said = f"BROKEN = {answer}\nWHY = 'because'\n" if ex.PLANTED else ""
    return f"{ex.HEADER}\n{imports}\n{said}\n{edit(functions, *edits)}\n"


# ---- grading ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def swapped(ex, source: str, filename: str):
    """Put a submission in the place of the engine's functions. Yields (its module, {name: calls so far})."""
    def poison(*args, **kwargs):
        raise RuntimeError("this is the engine's own function, and the exercise is to write it")

    originals, undo, calls = {}, [], dict.fromkeys(ex.NAMES, 0)
    for name in ex.NAMES:
        originals[name] = original = functools.reduce(getattr, name.split("."), importlib.import_module(ex.MODULE))
        undo.append((original, "__code__", original.__code__))
        original.__code__ = poison.__code__  # whoever still holds the original, under whatever name, now notices
    try:
        submission = ModuleType("submission")
        exec(compile(source, filename, "exec"), submission.__dict__)
        holders = [m for m in list(sys.modules.values()) if isinstance(m, ModuleType)]
        holders += {c for m in holders for c in vars(m).values() if issubclass(type(c), type)}
        for name, original in originals.items():
            function = getattr(submission, name.split(".")[-1], None)
            if not callable(function):
                raise NotImplementedError

            def counted(*args, _function=function, _name=name, **kwargs):
                calls[_name] += 1
                return _function(*args, **kwargs)

            for holder in holders:
                for key in [key for key, value in vars(holder).items() if value is original]:
                    undo.append((holder, key, original))
                    setattr(holder, key, counted)
        yield submission, calls
    finally:
        for holder, key, value in reversed(undo):
            setattr(holder, key, value)


def compare_cases(want: list, got) -> None:
    """Hold the submission's unit cases against the engine's, item by item. Raises Wrong at the first difference."""
    import torch
    from exercises import Wrong

    for i, (call, expected, cause) in enumerate(want):
        where, value = "", next(got)[1]
        if torch.is_tensor(expected) and torch.is_tensor(value) and expected.shape == value.shape:
            bad = ~torch.isclose(expected, value.to(expected.dtype), rtol=1e-5, atol=1e-7, equal_nan=True)
            if not bad.any():
                continue
            at = tuple(bad.nonzero()[0].tolist())
            where = f"\n  first difference at {list(at)}: {expected[at].item():.6g}, yours {value[at].item():.6g}"
        elif not torch.is_tensor(value) and type(value) is type(expected) and value == expected:
            continue
        raise Wrong(f"unit case {i + 1} of {len(want)}: {call}\n  expected  {expected}\n  yours     {value}{where}\n"
                    f"  likely cause: {cause}")


def compare_runs(ex, want, got, calls) -> None:
    """Hold two serving runs against each other: tokens, that the submission ran, counters."""
    from exercises import Wrong

    for i, (engine, yours) in enumerate(zip(want[0], got[0])):
        for at in (at for at in range(max(len(engine), len(yours))) if engine[at : at + 1] != yours[at : at + 1]):
            shown = [f"{run[0][i][at]} (log-probability {run[1][i][at]:.2f})" if at < len(run[0][i]) else "nothing"
                     for run in (want, got)]
            raise Wrong(f"request {i} diverges at token {at}: engine {shown[0]}, yours {shown[1]}")
    if idle := [name for name, count in calls.items() if not count]:
        raise Wrong(f"the engine never called your {', '.join(idle)}")
    for name in ex.COUNTERS:
        if want[2][name] != got[2][name]:
            raise Wrong(f"the tokens are right, but {name} is {got[2][name]}, the engine's {want[2][name]}")


@functools.cache
def reference(number: str):
    """The exercise's module, its unit cases and its serving run, by the engine itself."""
    from exercises import serve

    spec = importlib.import_module("exercises." + exercises()[number].path.stem)
    return spec, [copy.deepcopy(case) for case in spec.cases()], serve(spec)


@functools.cache
def broken_request(number: str) -> int:
    """In a bug hunt: the one request whose tokens the planted bug changes."""
    ex, (spec, _, want) = exercises()[number], reference(number)
    from exercises import serve

    with swapped(ex, stub(ex), "stub"):
        got = serve(spec)
    (broken,) = [i for i, (engine, theirs) in enumerate(zip(want[0], got[0])) if engine != theirs]
    return broken


def same_code(source: str | bytes, other: str) -> bool:
    """Whether two files define the same functions, whatever else is in them, and whatever docstrings say."""
    def functions(text):
        nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        return [[ast.dump(part) for part in [node.args, *node.body[ast.get_docstring(node) is not None:]]] for node in nodes]
    return functions(source) == functions(other)


def grade(number: str, source: str | bytes, filename: str = "submission", tiers=("unit", "engine")) -> tuple[int, str]:
    """Check a submission in this process: (exit code, what to tell). Whatever was swapped is put back."""
    import torch
    from exercises import Wrong, serve

    ex, (spec, cases, run) = exercises()[number], reference(number)
    broken = broken_request(number) if ex.PLANTED else None
    try:
        if same_code(source, stub(ex)):
            raise NotImplementedError
        with swapped(ex, source, filename) as (submission, calls), torch.inference_mode():
            if "unit" in tiers:
                compare_cases(cases, spec.cases())
            report = f"{len(cases)} unit cases"
            if "engine" in tiers:
                calls.update(dict.fromkeys(calls, 0))
                got = serve(spec)
                compare_runs(ex, run, got, calls)
                if message := getattr(spec, "goal", lambda counters: "")(got[2]):
                    raise Wrong(message)
                report += f", {len(got[0])} interleaved requests with identical tokens, no block leaked"
                rows = [*calls.items(), *((name, got[2][name]) for name in ex.EFFECT)]
                report += "".join(f"\n  {name + ' called' if name in calls else name.replace('_', ' '):34s}{value!s:>12s}"
                                  for name, value in rows)
            if ex.PLANTED:
                said, why = getattr(submission, "BROKEN", None), " ".join(str(getattr(submission, "WHY", "")).split())
                if said != broken or not why:
                    raise Wrong("the bug is gone; now say in BROKEN which request it broke, by its number from 0, and in WHY"
                                " why" + (f" (BROKEN = {said} is not it)" if said not in (None, broken) else ""))
                report = f"WHY: {why}\n  {report}"
    except NotImplementedError:
        return NOT_WRITTEN, "not written yet"
    except Wrong as error:
        return WRONG, str(error)
    except (Exception, SystemExit) as error:
        lines = [f"line {f.lineno}" for f in traceback.extract_tb(error.__traceback__) if f.filename == filename]
        place = f" ({lines[-1]} of your file)" if lines else ""
        return WRONG, f"your code raised {type(error).__name__}{place}: {error}"
    return PASSED, report


def inside(ex, path: Path, limit: float) -> None:
    """Be the process in which a submission is graded.

    The parent's secret goes before the verdict, so that nothing that a submission prints can pass for one; and it is said
    once before, when the engine has done its part: what goes wrong from then on is the submission's doing.
    """
    secret = sys.stdin.read()
    import torch
    torch.set_num_threads(1)
    reference(ex.id)
    if ex.PLANTED:
        broken_request(ex.id)
    answers = os.fdopen(os.dup(1), "w")
    print(secret, file=answers, flush=True)
    os.ftruncate(2, os.lseek(2, 0, os.SEEK_SET))  # whatever warnings there were
    os.dup2(2, 1)
    with contextlib.suppress(ImportError):  # Windows has none
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    faulthandler.dump_traceback_later(limit, exit=True)  # says where an endless loop is
    source = path.read_bytes()
    code, message = grade(ex.id, source, str(path))
    result = ("passed", "wrong", "not written")[code]
    if code == PASSED and not ex.PLANTED and same_code(source, solution(ex)):
        result, message = "copied", "word for word the engine's own\n  " + message
    print(secret + json.dumps([result, message]), file=answers, flush=True)
    os._exit(0)  # with whatever a submission has left running, or to be done at exit


def judge(ex, source: bytes, limit: float = TIME_LIMIT) -> tuple[str, str, str]:
    """Grade a submission in a process of its own: (result, what to tell, what it printed).

    The result is passed, copied (passed, but word for word the engine's own), wrong, timeout, crashed or not written. If
    the engine can not even do its own part, that is nobody's fault here, and everything ends with exit code 3.
    """
    secret, answers, code = secrets.token_hex(8), [], None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as printed:
        path = Path(folder, f"ex{ex.id}.py")
        path.write_bytes(source)
        command = [sys.executable, "-u", __file__, ex.id, "--inside", str(path), "--limit", str(limit)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, cwd=folder,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True) as child:
            try:
                out, _ = child.communicate(secret.encode(), limit + TIME_LIMIT)  # the latter for the engine's part
                answers, code = out.decode(errors="replace").split(secret), child.returncode
            except subprocess.TimeoutExpired:
                pass
            finally:
                with contextlib.suppress(OSError, AttributeError):  # Windows has no groups
                    os.killpg(child.pid, signal.SIGKILL)  # and whatever it has started
                child.kill()
        printed.seek(0)
        shown = printed.read().decode(errors="replace")
    if len(answers) == 1:
        print(shown, file=sys.stderr)
        sys.exit(BROKEN)
    if len(answers) == 3:
        result, message = json.loads(answers[2].splitlines()[0])
    elif code is None or "Timeout (" in shown:
        result, message = "timeout", f"no answer after {limit:g} s: an endless loop?"
    else:
        result, message = "crashed", f"your code ended the check (exit code {code})"
    return result, message.encode(errors="replace").decode(), shown


def check(ex, path: Path, limit: float = TIME_LIMIT) -> int:
    """Grade a file, print the verdict, and return the exit code."""
    result, message, printed = judge(ex, path.read_bytes(), limit)
    print(f"{printed}exercise {ex.id}: {result}")
    print(f"  {message}" if result != "not written" else f"  write in {path}; --hint gives a first hint")
    return {"passed": PASSED, "copied": PASSED, "not written": NOT_WRITTEN}.get(result, WRONG)


def grade_folder(folder: Path, wanted: list, limit: float = TIME_LIMIT) -> None:
    """Grade FOLDER/STUDENT/ex03.py and so on, and print a CSV: a line for each student and exercise, and one for the sum."""
    students = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    files = [(student, ex, student / f"ex{ex.id}.py") for student in students for ex in wanted]
    # All are read before the first one runs: no submission can change another.
    work = [(ex, path.read_bytes() if path.is_file() else None) for _, ex, path in files]
    table, passed = csv.writer(sys.stdout), 0
    table.writerow(("student", "exercise", "result", "message"))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        verdicts = pool.map(lambda task: judge(*task, limit) if task[1] is not None else ("missing", "", ""), work)
        for (student, ex, _), (result, message, _) in zip(files, verdicts):
            table.writerow((student.name, ex.id, result, message.partition("\n")[0][:500]))
            print(f"{student.name} {ex.id}: {result}", file=sys.stderr)
            passed += result == "passed"
            if ex is wanted[-1]:
                table.writerow((student.name, "total", passed, f"of {len(wanted)} passed"))
                passed = 0


# ---- the command --------------------------------------------------------------------------------------------------------


def read_notes(work: Path) -> dict[str, list]:
    """{number: [hints shown, hash of the file that passed]}"""
    return json.loads(path.read_text()) if (path := work / "notes.json").exists() else {}


def show_list(work: Path) -> None:
    """A line for each exercise."""
    noted = read_notes(work)
    for ex in exercises().values():
        path = work / f"ex{ex.id}.py"
        mine = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
        status = "passed" if mine and noted.get(ex.id, [0, ""])[1] == mine else "begun" if mine else ""
        print(f"{ex.id}  {status:8s}{ex.KIND:10s}{ex.MINUTES:3d} min  difficulty {'*' * ex.DIFFICULTY:5s}  "
              f"importance {'*' * ex.IMPORTANCE:5s}  chapter {ex.CHAPTER}  {ex.TITLE}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(BROKEN, f"{message}\n")
    parser.add_argument("exercise", nargs="?", help="its number, such as 03")
    for name in ("hint", "watch", "diff", "reset"):
        parser.add_argument("--" + name, action="store_true")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--regenerate", action="store_true", help="write all stubs anew from the engine's source")
    parser.add_argument("--grade", type=Path, metavar="FOLDER", help="grade FOLDER/STUDENT/ex03.py and so on, as CSV")
    parser.add_argument("--seed", metavar="NAME", help="print the written questions with NAME's own numbers")
    parser.add_argument("--key", action="store_true", help="with --seed: their answers as well")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, metavar="SECONDS", help="that a submission may take")
    args = parser.parse_args(argv)
    work = Path(os.environ.get("NANOSERVE_WORK", ROOT / "work"))
    if args.exercise not in (None, *exercises()):
        parser.error(f"exercise: {args.exercise!r} is not one of {', '.join(exercises())}")
    if args.key and args.seed is None:
        parser.error("--key: needs a --seed, as there is a key for each")
    wanted = [exercises()[args.exercise]] if args.exercise else list(exercises().values())
    if args.regenerate:
        for ex in wanted:
            stub_path(ex).write_text(stub(ex), encoding="utf-8")
    elif args.seed is not None:
        import questions
        print(questions.sheet(args.seed, args.key))
    elif args.grade:
        if not args.grade.is_dir():
            parser.error(f"--grade: {args.grade} is not a folder")
        grade_folder(args.grade, wanted, args.limit)
    elif args.exercise is None:
        show_list(work)
    elif args.inside:
        inside(wanted[0], args.inside, args.limit)
    else:
        return attempt(wanted[0], work, args)
    return PASSED


def attempt(ex, work: Path, args: argparse.Namespace) -> int:
    """What a student does with one exercise. Returns the exit code."""
    path = work / f"ex{ex.id}.py"
    work.mkdir(parents=True, exist_ok=True)
    if args.reset or not path.exists():
        path.write_bytes(stub_path(ex).read_bytes())
        print(f"exercise {ex.id}, {ex.TITLE}\n  write in {path}\n  read tutorial/{ex.CHAPTER}, about {ex.MINUTES} minutes")
        return NOT_WRITTEN
    noted = read_notes(work)
    hints, passed = noted.get(ex.id, [0, ""])
    if args.hint:
        hints = min(hints + 1, len(ex.HINTS))
        print("\n".join(f"hint {i + 1} of {len(ex.HINTS)}: {hint}" for i, hint in enumerate(ex.HINTS[:hints])))
        code = PASSED
    elif args.diff:
        if passed != hashlib.sha256(path.read_bytes()).hexdigest():
            print("--diff: shows the engine's own answer, once this file has passed")
            return WRONG
        theirs = "\n\n\n".join(text for text, _ in definitions(ex))
        sides = path.read_text(encoding="utf-8").splitlines(), theirs.splitlines()
        print("\n".join(difflib.unified_diff(*sides, "yours", "the engine's", n=99)))
        return PASSED
    else:
        code = seen = None
        while code is None or args.watch and code != PASSED:
            if seen != (seen := path.stat().st_mtime):
                code = check(ex, path, args.limit)
            time.sleep(0.5 * args.watch)
        if code == PASSED:
            passed = hashlib.sha256(path.read_bytes()).hexdigest()
    (work / "notes.json").write_text(json.dumps({**noted, ex.id: [hints, passed]}))
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ImportError as error:
        print(f"{error}: run `pip install -e .` first", file=sys.stderr)
        sys.exit(BROKEN)
    except KeyboardInterrupt:
        sys.exit(NOT_WRITTEN)
