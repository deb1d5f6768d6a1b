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

An exercise is a file in tutorial/exercises/. Its stub and its answer come from the engine's own source, so neither can
fall behind it. A submission runs in a process and a folder of its own, with a time limit and one thread. There the engine
first serves the exercise's requests itself; then its own function is made unusable wherever somebody holds it, the
submission is loaded, and put in its place in every module and class that has it.
"""

import argparse
import ast
import contextlib
import copy
import csv
import difflib
import faulthandler
import functools
import importlib
import inspect
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STUBS = HERE / "exercises" / "stubs"
sys.path[:0] = [str(ROOT), str(HERE)]
PASSED, WRONG, NOT_WRITTEN, BROKEN = 0, 1, 2, 3
EXIT_CODES = {"passed": PASSED, "copied": PASSED, "not written": NOT_WRITTEN}  # everything else is wrong
TIME_LIMIT = 60  # seconds; a check takes three
LARGEST_FILE = 1 << 20  # bytes, of what a submission prints or writes


# ---- what an exercise is ------------------------------------------------------------------------------------------------


@functools.cache
def exercises() -> dict[str, SimpleNamespace]:
    """{number: what its file says}, in order: the docstring as `text`, and what it assigns, as far as that takes no import.

    So the list is there at once, whoever hands in a file waits for torch only once, and no torch is no traceback.
    """
    found = {}
    for path in sorted((HERE / "exercises").glob("ex[0-9][0-9]_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ex = SimpleNamespace(id=path.name[2:4], module=f"exercises.{path.stem}", text=ast.get_docstring(tree), PLANTED=None)
        for node in (node for node in tree.body if isinstance(node, ast.Assign)):
            with contextlib.suppress(NameError):
                exec(compile(ast.Module([node], []), path, "exec"), vars(ex))
        found[ex.id] = ex
    return found


def engines_own(ex) -> dict[str, object]:
    """The engine's functions that the exercise is about, by their names."""
    return {name: functools.reduce(getattr, name.split("."), importlib.import_module(ex.MODULE)) for name in ex.NAMES}


def answer(ex) -> str:
    """Their source, dedented; not while they are swapped."""
    return "\n\n\n".join(textwrap.dedent(inspect.getsource(function)).rstrip() for function in engines_own(ex).values())


def heads(text: str) -> list[str]:
    """Signature and docstring of each function."""
    lines = text.splitlines()
    return ["\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]) for node in ast.parse(text).body]


def stub(ex) -> str:
    """What the student starts from: signatures and docstrings, or for a bug hunt the functions with the bug in them."""
    parts = [f'"""Exercise {ex.id}: {ex.TITLE}\n\n{ex.text}\n"""', ex.HEADER.strip()]
    if ex.PLANTED:
        parts += ["BROKEN = None  # the number, from 0, of the request whose tokens come out wrong\n"
                  'WHY = ""  # in a sentence or two: what happens to it, and why to no other']
        code = answer(ex).replace(*ex.PLANTED)
    else:
        code = "\n\n\n".join(f"{head}\n    raise NotImplementedError" for head in heads(answer(ex)))
    return "\n\n".join([*filter(None, parts), f"\n{code}\n"])


def same_code(source: str | bytes, other: str) -> bool:
    """Whether two files define the same functions, whatever else is in them, and whatever docstrings say."""
    def functions(text):
        nodes = [node for node in ast.parse(text, "your file").body if isinstance(node, ast.FunctionDef)]
        return [[ast.dump(part) for part in [node.args, *node.body[ast.get_docstring(node) is not None:]]] for node in nodes]
    return functions(source) == functions(other)


# ---- grading ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def swapped(ex, source: str | bytes, filename: str):
    """Put a submission in the place of the engine's functions. Yields (its module, {name: calls so far})."""
    def poison(*args, **kwargs):
        raise RuntimeError("this is the engine's own function, and the exercise is to write it")

    originals, submission, calls = engines_own(ex), ModuleType("submission"), Counter()
    with contextlib.ExitStack() as undo:
        def replace(holder, key, value):
            undo.callback(setattr, holder, key, getattr(holder, key))
            setattr(holder, key, value)

        for original in originals.values():
            # Whoever still holds it, under whatever name or decorated, now notices.
            replace(inspect.unwrap(original), "__code__", poison.__code__)
        exec(compile(source, filename, "exec"), vars(submission))
        holders = [m for m in list(sys.modules.values()) if isinstance(m, ModuleType)]
        holders += {c for m in holders for c in vars(m).values() if issubclass(type(c), type)}
        for name, original in originals.items():
            function = getattr(submission, name.split(".")[-1], None)
            if not callable(function):
                raise NotImplementedError(f"there is no function {name.split('.')[-1]} in it")

            def counted(*args, _function=function, _name=name, **kwargs):
                calls[_name] += 1
                return _function(*args, **kwargs)

            for holder in holders:
                for key in [key for key, value in vars(holder).items() if value is original]:
                    replace(holder, key, counted)
        yield submission, calls


def compare_cases(want: list, got) -> None:
    """Hold the submission's unit cases against the engine's, item by item. Raises Wrong at the first difference."""
    import torch
    from exercises import Wrong

    for i, (call, expected, cause) in enumerate(want):
        case = f"unit case {i + 1} of {len(want)}: {call}"
        try:
            _, value, _ = next(got)
        except Exception as error:
            error.case = f"\n  in {case}\n  which is about: {cause}"
            raise
        where = ""
        if type(value) is not type(expected):
            cause = f"{type(expected).__name__} expected, not {type(value).__name__}{': no return?' * (value is None)}"
        elif torch.is_tensor(expected) and expected.shape != value.shape:
            expected, value = (f"of shape {list(x.shape)}" for x in (expected, value))
        elif torch.is_tensor(expected):
            bad = ~torch.isclose(expected, value.to(expected.dtype), rtol=1e-5, atol=1e-7, equal_nan=True)
            if not bad.any():
                continue
            at = tuple(bad.nonzero()[0].tolist())
            where = f"\n  first difference at {list(at)}: {expected[at].item():.6g}, yours {value[at].item():.6g}"
            expected, value = expected[at[:-1]], value[at[:-1]]  # that row: the whole would fill the screen
        elif value == expected:
            continue
        elif isinstance(expected, (list, tuple)):
            found = ((k, pair) for k, pair in enumerate(zip(expected, value)) if pair[0] != pair[1])
            where = "".join(f"\n  first difference at [{k}]: {a}, yours {b}" for k, (a, b) in [*found][:1])
        raise Wrong(f"{case}\n  expected  {expected}\n  yours     {value}{where}\n  likely cause: {cause}")


def compare_runs(ex, want, got, calls) -> None:
    """Hold two serving runs against each other: tokens, that the submission ran, counters. Raises Wrong."""
    from exercises import Wrong

    for i, (engine, yours) in enumerate(zip(want.tokens, got.tokens)):
        if engine != yours:
            at = len(os.path.commonprefix([engine, yours]))
            said = [[*run.shown[i], "nothing"][at] for run in (want, got)]
            raise Wrong(f"request {i} diverges at token {at}: engine {said[0]}, yours {said[1]}")
    if idle := [name for name in ex.NAMES if not calls[name]]:
        raise Wrong(f"the engine never called your {', '.join(idle)}")
    for name in ex.COUNTERS:
        if want.counters[name] != got.counters[name]:
            raise Wrong(f"the tokens are right, but {name} is {got.counters[name]}, the engine's {want.counters[name]}")


@functools.cache
def reference(number: str) -> SimpleNamespace:
    """The exercise's module `spec`; the engine's unit cases and serving run; and of a bug hunt the request that is hurt."""
    from exercises import serve

    ex = exercises()[number]
    spec = importlib.import_module(ex.module)
    want = SimpleNamespace(spec=spec, cases=[copy.deepcopy(case) for case in spec.cases()], run=serve(spec), broken=None)
    if ex.PLANTED:
        with swapped(ex, stub(ex), "stub"):
            hurt = [i for i, (engine, theirs) in enumerate(zip(want.run.tokens, serve(spec).tokens)) if engine != theirs]
        (want.broken,) = hurt
    return want


def grade(number: str, source: str | bytes, filename: str = "submission", tiers=("unit", "engine")) -> tuple[str, str]:
    """Check a submission in this process: (passed, copied, wrong or not written, what to tell), and put everything back.

    Copied is passed, but word for word the engine's own. In a bug hunt that is what everybody should end up with.
    """
    import torch
    from exercises import Wrong, serve

    ex, want = exercises()[number], reference(number)
    try:
        if same_code(source, stub(ex)):
            raise NotImplementedError("the bug is still there: no function has changed" if ex.PLANTED else "not written yet")
        with swapped(ex, source, filename) as (submission, calls), torch.inference_mode():
            if "unit" in tiers:
                compare_cases(want.cases, want.spec.cases())
            report = f"{len(want.cases)} unit cases"
            if "engine" in tiers:
                calls.clear()
                got = serve(want.spec)
                compare_runs(ex, want.run, got, calls)
                if message := getattr(want.spec, "goal", lambda counters: "")(got.counters):
                    raise Wrong(message)
                report += f", {len(got.tokens)} interleaved requests with identical tokens, no block leaked"
                rows = {f"{name} called": calls[name] for name in ex.NAMES}
                rows |= {name.replace("_", " "): got.counters[name] for name in ex.EFFECT}
                report += "".join(f"\n  {name:34s}{value!s:>12s}" for name, value in rows.items())
            if ex.PLANTED:
                said, why = getattr(submission, "BROKEN", None), " ".join(str(getattr(submission, "WHY", "")).split())
                if said != want.broken or not why:
                    raise Wrong("the bug is gone; now say in BROKEN which request it broke, by its number from 0, and in WHY"
                                " why" + f" (BROKEN = {said!r} is not it)" * (said not in (None, want.broken)))
                report = f"WHY: {why}\n  {report}"
    except NotImplementedError as error:
        return "not written", str(error) or "not written yet"
    except Wrong as error:
        return "wrong", str(error)
    except (Exception, SystemExit) as error:
        lines = [f"line {f.lineno}" for f in traceback.extract_tb(error.__traceback__) if f.filename == filename]
        place = f" ({lines[-1]} of your file)" if lines else ""
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # an assert without words: its condition
        if isinstance(error, RecursionError):
            said += "; to ask the engine's function is to ask yours, which is in its place"
        return "wrong", f"your code raised {type(error).__name__}{place}: {said}{getattr(error, 'case', '')}"
    if not ex.PLANTED and same_code(source, answer(ex)):
        return "copied", f"word for word the engine's own\n  {report}"
    return "passed", report


def inside(ex, path: Path, limit: float) -> None:
    """Be the process in which a submission is graded.

    The parent's secret goes before the verdict, so that nothing that a submission prints can pass for one; and it is said
    once before, when the engine has done its part: what goes wrong from then on is the submission's doing.
    """
    import torch

    secret, answers = sys.stdin.read(), os.fdopen(os.dup(1), "w")
    torch.set_num_threads(1)
    reference(ex.id)
    print(secret, file=answers, flush=True)
    os.ftruncate(2, os.lseek(2, 0, os.SEEK_SET))  # whatever warnings there were
    os.dup2(2, 1)
    with contextlib.suppress(ImportError):  # Windows has none
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    faulthandler.dump_traceback_later(limit, exit=True)  # says where an endless loop is
    print(secret + json.dumps(grade(ex.id, path.read_bytes(), str(path))), file=answers, flush=True)
    os._exit(0)  # with whatever a submission has left running, or to be done at exit


def judge(ex, source: bytes | None, limit: float = TIME_LIMIT) -> tuple[str, str, str]:
    """Grade a submission in a process of its own: (result, what to tell, what it printed).

    The result is one of `grade`, or timeout, or crashed, or missing where source is None. If the engine cannot even do its
    own part everything ends, with exit code 3.
    """
    if source is None:
        return "missing", "", ""
    secret, said = secrets.token_hex(8), []  # what the engine said before its part was done, what came then, the verdict
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as printed:
        path = Path(folder, f"ex{ex.id}.py")
        path.write_bytes(source)
        command = [sys.executable, "-u", __file__, ex.id, "--inside", str(path), "--limit", str(limit)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, cwd=folder,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True) as child:
            try:
                out, _ = child.communicate(secret.encode(), limit + TIME_LIMIT)  # the latter for the engine's part
                said = out.decode(errors="replace").split(secret)
            except subprocess.TimeoutExpired:
                pass
            finally:
                with contextlib.suppress(OSError, AttributeError):  # Windows has no groups
                    os.killpg(child.pid, signal.SIGKILL)  # and whatever it has started
                child.kill()
        printed.seek(0)
        shown = printed.read().decode(errors="replace")
    if len(said) == 1:
        print(shown, file=sys.stderr)
        sys.exit(BROKEN)
    if len(said) == 3:
        result, message = json.loads(said[2].splitlines()[0])
    elif not said or "Timeout (" in shown:
        result, message = "timeout", f"no answer after {limit:g} s: an endless loop?"
    else:
        result, message = "crashed", f"your code ended the check (exit code {child.returncode})"
    return result, message.encode(errors="replace").decode(), shown


def check(ex, path: Path, limit: float = TIME_LIMIT) -> int:
    """Grade a file, print the verdict, and return the exit code."""
    result, message, printed = judge(ex, path.read_bytes(), limit)
    print(f"{printed}exercise {ex.id}: {result}")
    print(f"  {message}" + f"\n  write in {path}; --hint gives a first hint" * (result == "not written"))
    return EXIT_CODES.get(result, WRONG)


def grade_folder(folder: Path, wanted: list, limit: float = TIME_LIMIT) -> None:
    """Grade FOLDER/STUDENT/ex03.py and so on, and print a CSV: a line for each student and exercise, and one for the sum."""
    students = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    files = [(ex, student / f"ex{ex.id}.py") for student in students for ex in wanted]
    # All are read before the first one runs: no submission can change another.
    work = [(ex, path.read_bytes() if path.is_file() else None, limit) for ex, path in files]
    there = {student: "there are: " + ", ".join(sorted(path.name for path in student.iterdir())) for student in students}
    table, passed = csv.writer(sys.stdout), 0
    table.writerow(("student", "exercise", "result", "message"))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (ex, path), (result, message, _) in zip(files, pool.map(lambda task: judge(*task), work)):
            student, message = path.parent.name, there[path.parent] if result == "missing" else message
            table.writerow((student, ex.id, result, message.partition("\n")[0][:500]))
            print(f"{student} {ex.id}: {result}", file=sys.stderr)
            passed += result == "passed"
            if ex is wanted[-1]:
                table.writerow((student, "total", passed, f"of {len(wanted)} passed"))
                passed = 0


# ---- the command --------------------------------------------------------------------------------------------------------


def read_notes(work: Path) -> dict[str, int | str]:
    """{"03 hints": how many were shown, "03 passed": the text that passed}"""
    try:
        return json.loads((work / "notes.json").read_text())
    except (OSError, ValueError):  # none yet, or cut short when somebody pressed Ctrl-C
        return {}


def status(ex, work: Path) -> str:
    """Whether the student's file, as it stands, has passed; else whether there is one."""
    if not (path := work / f"ex{ex.id}.py").exists():
        return ""
    return "passed" if read_notes(work).get(f"{ex.id} passed") == path.read_text(errors="replace") else "begun"


def attempt(ex, work: Path, args: argparse.Namespace) -> int:
    """What a student does with one exercise. Returns the exit code."""
    path, news, code = work / f"ex{ex.id}.py", {}, PASSED
    if args.reset or not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(path.with_suffix(".old.py"))
            print(f"what was there is now {path.with_suffix('.old.py')}")
        path.write_bytes((STUBS / path.name).read_bytes())
        print(f"exercise {ex.id}, {ex.TITLE}\n  write in {path}\n  read tutorial/{ex.CHAPTER}, about {ex.MINUTES} minutes")
        code = PASSED if args.hint else NOT_WRITTEN
    if args.hint:
        shown = news[f"{ex.id} hints"] = min(read_notes(work).get(f"{ex.id} hints", 0) + 1, len(ex.HINTS))
        print("\n".join(f"hint {i + 1} of {len(ex.HINTS)}: {hint}" for i, hint in enumerate(ex.HINTS[:shown])))
    elif args.diff:
        if status(ex, work) != "passed":
            print("--diff: shows the engine's own answer, once this file has passed")
            return WRONG
        sides = path.read_text(encoding="utf-8").splitlines(), answer(ex).splitlines()
        print("\n".join(difflib.unified_diff(*sides, "yours", "the engine's", n=99)))
    elif code == PASSED:
        code = seen = None
        while code is None or args.watch and code != PASSED:
            with contextlib.suppress(FileNotFoundError):  # an editor may be just about to put the new one there
                if seen != (seen := path.stat().st_mtime):
                    code = check(ex, path, args.limit)
            time.sleep(0.5 * args.watch)
        if code == PASSED:
            news[f"{ex.id} passed"] = path.read_text(errors="replace")
    # Read anew: a --watch may have taken an hour, and another exercise may have passed meanwhile.
    (work / "notes.json").write_text(json.dumps(read_notes(work) | news))
    return code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(BROKEN, f"{message}\n")
    parser.add_argument("exercise", nargs="?", type=lambda number: number.zfill(2), choices=exercises(), metavar="exercise",
                        help="its number, such as 03")
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
    wanted = [exercises()[args.exercise]] if args.exercise else list(exercises().values())
    if not args.exercise and (args.hint or args.watch or args.diff or args.reset):
        parser.error("--hint, --watch, --diff and --reset: need an exercise's number, such as 03")
    if args.key and args.seed is None:
        parser.error("--key: needs a --seed, as there is a key for each")
    if args.grade and not args.grade.is_dir():
        parser.error(f"--grade: {args.grade} is not a folder")
    if args.seed is not None:
        import questions
        print(questions.sheet(args.seed, args.key))
    elif args.grade:
        grade_folder(args.grade, wanted, args.limit)
    elif args.regenerate:
        for ex in wanted:
            (STUBS / f"ex{ex.id}.py").write_text(stub(ex), encoding="utf-8")
    elif args.inside:
        inside(wanted[0], args.inside, args.limit)
    elif args.exercise:
        return attempt(wanted[0], work, args)
    else:
        for ex in wanted:
            print(f"{ex.id}  {status(ex, work):8s}{ex.KIND:10s}{ex.MINUTES:3d} min  difficulty {'*' * ex.DIFFICULTY:5s}  "
                  f"importance {'*' * ex.IMPORTANCE:5s}  chapter {ex.CHAPTER}  {ex.TITLE}")
    return PASSED


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ImportError as error:
        print(f"{error}: run `pip install -e .` first", file=sys.stderr)
        sys.exit(BROKEN)
    except BrokenPipeError:  # `| head` has seen enough
        os._exit(PASSED)
    except KeyboardInterrupt:
        sys.exit(NOT_WRITTEN)
