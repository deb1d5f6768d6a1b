"""Checks the exercises, with the engine as the grader: your function is put into the real engine, which must then
generate the same tokens.

    python tutorial/check.py               the list: number, status, kind, minutes, difficulty, importance
    python tutorial/check.py 03            the first time puts work/ex03.py there for you to write in; then checks it
    python tutorial/check.py 03 --hint     one more hint each time;  --watch: check again whenever the file changes
    python tutorial/check.py 03 --diff     after a pass: yours beside the engine's;  --reset: start again

Exit codes: 0 passed, 1 wrong, 2 not written yet, 3 something is the matter with the installation or the command.

An exercise is a file in tutorial/exercises/. Its stub, its solution and its mutants all come from the engine's own
source, so none of them can fall behind it. A submission runs in a process of its own, with a time limit and one
thread. There the engine first serves the exercise's requests itself; then its own function is made unusable wherever
somebody holds it, the submission is loaded, and put in its place in every module and class that has it.
"""

import argparse
import ast
import contextlib
import copy
import difflib
import functools
import hashlib
import importlib
import json
import os
import secrets
import subprocess
import sys
import textwrap
import time
import traceback
from pathlib import Path
from types import ModuleType, SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
PASSED, WRONG, NOT_WRITTEN, BROKEN = 0, 1, 2, 3
TIME_LIMIT = 60  # seconds; a check takes three


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


def same_code(source: str, other: str) -> bool:
    """Whether two files define the same functions, whatever else is in them."""
    def functions(text):
        return [ast.dump(node) for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return functions(source) == functions(other)


def grade(number: str, source: str, filename: str = "submission", tiers=("unit", "engine")) -> tuple[int, str]:
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
            if ex.PLANTED and (getattr(submission, "BROKEN", None), bool(getattr(submission, "WHY", ""))) != (broken, True):
                raise Wrong("the bug is gone; now say in BROKEN which request it broke, by its number from 0, and in WHY why"
                            + (f" (BROKEN = {submission.BROKEN} is not it)" if submission.BROKEN is not None else ""))
    except NotImplementedError:
        return NOT_WRITTEN, "not written yet"
    except Wrong as error:
        return WRONG, str(error)
    except (Exception, SystemExit) as error:
        lines = [f"line {f.lineno}" for f in traceback.extract_tb(error.__traceback__) if f.filename == filename]
        place = f" ({lines[-1]} of your file)" if lines else ""
        return WRONG, f"your code raised {type(error).__name__}{place}: {error}"
    return PASSED, report


def check(ex, path: Path) -> int:
    """Grade a file in a process of its own, print the verdict, and return the exit code."""
    nonce = secrets.token_hex(8)  # printing a verdict, or exiting early, proves nothing without it
    try:
        run = subprocess.run([sys.executable, __file__, ex.id, "--inside", str(path)], input=nonce, text=True,
                             capture_output=True, timeout=TIME_LIMIT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    except subprocess.TimeoutExpired:
        print(f"exercise {ex.id}: wrong\n  no answer after {TIME_LIMIT} s: an endless loop?")
        return WRONG
    printed, found, verdict = run.stdout.rpartition(nonce)
    print(printed if found else run.stdout, end="")  # what the submission itself printed
    if not found:
        print(f"exercise {ex.id}: the check itself did not come to its end\n{run.stderr}")
        return WRONG if run.returncode == 0 else BROKEN
    code, message = json.loads(verdict)
    print(f"exercise {ex.id}: {('passed', 'wrong', 'not written yet')[code]}")
    print(f"  {message}" if code != NOT_WRITTEN else f"  write in {path}; --hint gives a first hint")
    return code


# ---- the command --------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exercise", nargs="?", help="its number, such as 03")
    for name in ("hint", "watch", "diff", "reset"):
        parser.add_argument("--" + name, action="store_true")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--regenerate", action="store_true", help="write all stubs anew from the engine's source")
    args = parser.parse_args(argv)
    work = Path(os.environ.get("NANOSERVE_WORK", ROOT / "work"))
    notes = work / "notes.json"  # {number: [hints shown, hash of the file that passed]}
    noted = json.loads(notes.read_text()) if notes.exists() else {}
    if args.regenerate:
        for ex in exercises().values():
            stub_path(ex).write_text(stub(ex), encoding="utf-8")
        return PASSED
    if args.exercise is None:
        for ex in exercises().values():
            path = work / f"ex{ex.id}.py"
            mine = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
            status = "passed" if mine and noted.get(ex.id, [0, ""])[1] == mine else "begun" if mine else ""
            print(f"{ex.id}  {status:8s}{ex.KIND:10s}{ex.MINUTES:3d} min  difficulty {'*' * ex.DIFFICULTY:5s}  "
                  f"importance {'*' * ex.IMPORTANCE:5s}  chapter {ex.CHAPTER}  {ex.TITLE}")
        return PASSED
    if args.exercise not in exercises():
        print(f"exercise: {args.exercise!r} is not one of {', '.join(exercises())}", file=sys.stderr)
        return BROKEN
    ex = exercises()[args.exercise]
    if args.inside:
        nonce, source = sys.stdin.read(), Path(args.inside).read_text(encoding="utf-8")
        import torch
        torch.set_num_threads(1)
        print(nonce + json.dumps(grade(ex.id, source, args.inside)))
        return PASSED
    path = work / f"ex{ex.id}.py"
    work.mkdir(parents=True, exist_ok=True)
    if args.reset or not path.exists():
        path.write_bytes(stub_path(ex).read_bytes())
        print(f"exercise {ex.id}, {ex.TITLE}\n  write in {path}\n  read tutorial/{ex.CHAPTER}, about {ex.MINUTES} minutes")
        return NOT_WRITTEN
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
        code, seen = check(ex, path), path.stat().st_mtime
        while args.watch and code != PASSED:
            time.sleep(0.5)
            if path.stat().st_mtime != seen:
                seen, code = path.stat().st_mtime, check(ex, path)
        if code == PASSED:
            passed = hashlib.sha256(path.read_bytes()).hexdigest()
    notes.write_text(json.dumps({**noted, ex.id: [hints, passed]}))
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ImportError as error:
        print(f"{error}: run `pip install -e .` first", file=sys.stderr)
        sys.exit(BROKEN)
    except KeyboardInterrupt:
        sys.exit(NOT_WRITTEN)
