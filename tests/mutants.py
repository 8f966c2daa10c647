"""Change the code in one place at a time and see whether a test fails (make mutants).

mutmut does the work: it writes each function's mutants beside the function, forks a
process per mutant that has torch and the tests loaded already, and runs the tests that
pass through the function, the fastest first, until one fails. Here are what it lacks:
two kinds of mutants, and functions with a decorator. All happens in a copy of the
project, in results/mutants.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import libcst

ROOT = Path(__file__).parent.parent
WORK = ROOT / "results" / "mutants"
REPORT = ROOT / "results" / "mutants.md"

# The method's files and functions.
METHOD = [
    "jigsaw",
    "rotation",
    "memory_bank",
    "augmentations",
    "models",
    "evaluation",
    "losses",
    "linear_probe.batch_totals",
    "pirl_stl_train_test.PretrainingTrainer.__init__",
    "pirl_stl_train_test.PretrainingTrainer.epoch_batches",
    "pirl_stl_train_test.PretrainingTrainer.epoch_uniforms",
    "pirl_stl_train_test.PretrainingTrainer.train_step",
    "pirl_stl_train_test.PretrainingTrainer.load_batch",
    "pirl_stl_train_test.PretrainingTrainer.update",
    "pirl_stl_train_test.PretrainingTrainer.forward_batch",
    "pirl_stl_train_test.PretrainingTrainer.make_views",
    "pirl_stl_train_test.PretrainingTrainer.exported_trunk",
    "pirl_stl_train_test.learning_rate",
    "pirl_stl_train_test.validate",
]
# Tests that pass through several modules.
TESTS_OF_SEVERAL = [
    "tests/test_contracts.py",
    "tests/test_errors.py",
    "tests/test_devices.py",
]
KILLED = ("killed", "timeout", "segfault")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--all",
        action="store_true",
        help="by all tests, and of all files unless names are given: hours",
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="mutants that are tried at a time"
    )
    parser.add_argument(
        "names",
        nargs="*",
        help="module, module.function, module.Class or module.Class.method, such as "
        "runtime.loop.Signals: these, by the tests of that module and some that pass "
        "through several",
    )
    parser.add_argument("--run-mutmut", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.names or METHOD
    if args.all and not args.names:
        names = sorted(path.stem for path in ROOT.glob("*.py"))
        names += sorted(f"runtime.{path.stem}" for path in ROOT.glob("runtime/*.py"))

    if args.run_mutmut:
        run_mutmut(names, args.processes)
        return
    tests = ["tests"] if args.all else own_tests(names)
    copy_project(names, tests)
    environment = os.environ | {
        # Forked processes must not share threads, or a card.
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, __file__, "--run-mutmut"]
    command += ["--processes", str(args.processes), *names]
    subprocess.run(command, cwd=WORK, env=environment, check=True)
    write_report(names)


def split(name):
    """("runtime.loop", ["Signals", "note"]) of runtime.loop.Signals.note."""
    parts = name.split(".")
    length = 2 if parts[0] == "runtime" else 1
    return ".".join(parts[:length]), parts[length:]


def modules_of(names):
    return {split(name)[0] for name in names}


def own_tests(names):
    """The test files of the modules that are named, and TESTS_OF_SEVERAL."""
    own = {f"tests/test_{module.split('.')[-1]}.py" for module in modules_of(names)}
    return sorted(
        file for file in own.union(TESTS_OF_SEVERAL) if (ROOT / file).exists()
    )


# ---- The copy ------------------------------------------------------------------------
def copy_project(names, tests):
    """The project in WORK, with the configuration of this run."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, WORK)
    others = [
        path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".txt")
    ]
    for path in (*others, ROOT / "Makefile"):
        shutil.copy(path, WORK)
    for folder in ("runtime", "tests", "benchmarks", "docs"):
        shutil.copytree(
            ROOT / folder, WORK / folder, ignore=shutil.ignore_patterns("__pycache__")
        )

    mutated = sorted(f"{name.replace('.', '/')}.py" for name in modules_of(names))
    for name in mutated:
        source = without_decorators((ROOT / name).read_text("utf-8"))
        (WORK / name).write_text(source, "utf-8")

    # The rest of mutmut's configuration is in pyproject.toml, under [tool.mutmut].
    lines = [
        f"source_paths = {mutated}",
        f"also_copy = {sorted(path.name for path in WORK.iterdir())}",
        f"pytest_add_cli_args_test_selection = {tests}",
    ]
    path = WORK / "pyproject.toml"
    before, header, after = path.read_text("utf-8").partition("[tool.mutmut]\n")
    path.write_text(before + header + "\n".join(lines) + "\n" + after, "utf-8")
    tomllib.loads(path.read_text("utf-8"))


def without_decorators(source):
    """The same code with `f = decorator(f)` behind a function instead of `@decorator`.

    mutmut leaves functions with a decorator alone, and the bank's update is one.
    """
    lines = source.splitlines()
    tree = ast.parse(source)
    functions = []
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        functions += [n for n in members if isinstance(n, ast.FunctionDef)]

    for function in reversed(functions):
        calls = []
        for decorator in reversed(function.decorator_list):
            text = ast.unparse(decorator)
            call = f"{function.name} = {text}({function.name})"
            calls.append(" " * function.col_offset + call)
        if calls:
            first = function.decorator_list[0].lineno - 1
            lines[function.end_lineno : function.end_lineno] = calls
            del lines[first : function.lineno - 1]
    return "\n".join(lines) + "\n"


# ---- mutmut --------------------------------------------------------------------------
def run_mutmut(names, processes):
    """Make the mutants and try them, in the folder WORK, which is the current one."""
    sys.path.remove(str(ROOT / "tests"))  # of this script; the tests are in the copy
    # On import, it reads the configuration of the current folder.
    from mutmut.__main__ import cli
    from mutmut.mutation.mutators import mutation_operators

    mutation_operators.append((libcst.Expr, drop_statement))
    mutation_operators.append((libcst.If, force_branch))
    patterns = []
    for name in names:
        patterns += patterns_of(name)
    cli(["run", "--max-children", str(processes), *patterns], standalone_mode=False)


def drop_statement(node):
    """A statement that is but a call, such as an update of the memory bank."""
    if isinstance(node.value, libcst.Call):
        yield libcst.Pass()


def force_branch(node):
    """An `if` whose condition is always true, and one whose is never."""
    for name in ("True", "False"):
        if not (isinstance(node.test, libcst.Name) and node.test.value == name):
            yield node.with_changes(test=libcst.Name(name))


def patterns_of(name):
    """mutmut's names for the mutants of a module, a function or a class."""
    module, members = split(name)
    if not members:
        return [f"{module}.*"]
    if len(members) == 2:
        return [f"{module}.xǁ{'ǁ'.join(members)}__mutmut_*"]
    return [f"{module}.x_{members[0]}__mutmut_*", f"{module}.xǁ{members[0]}ǁ*"]


# ---- The report ----------------------------------------------------------------------
def write_report(names):
    """Figures by file, and the survivors as diffs."""
    patterns = []
    for name in names:
        patterns += patterns_of(name)
    verdicts = {}
    for line in mutmut("results", "--all", "true").splitlines():
        mutant, _, verdict = line.strip().rpartition(": ")
        if any(fnmatch(mutant, pattern) for pattern in patterns):
            verdicts[mutant] = verdict

    text = "File | Mutants | Found\n--- | --- | ---\n"
    counts = Counter(split(mutant)[0] for mutant in verdicts)
    found = [mutant for mutant, verdict in verdicts.items() if verdict in KILLED]
    found_counts = Counter(split(mutant)[0] for mutant in found)
    for module, count in counts.items():
        text += f"{module}.py | {count} | {found_counts[module] / count:.1%}\n"
    text += f"all | {len(verdicts)} | {len(found) / len(verdicts):.1%}\n\n"
    print(text)

    for mutant, verdict in verdicts.items():
        if verdict not in KILLED:
            diff = mutmut("show", mutant)
            text += f"{mutant} ({verdict}):\n\n```diff\n{short(diff)}\n```\n\n"
    REPORT.write_text(text, "utf-8")
    print(f"wrote {REPORT.relative_to(ROOT)}, with the changes that no test notices")


def short(diff):
    """The changed lines of a diff."""
    changed = []
    for line in diff.splitlines():
        if line.startswith(("-", "+")) and not line.startswith(("---", "+++")):
            changed.append(line)
    return "\n".join(changed)


def mutmut(*arguments):
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(
        command, cwd=WORK, capture_output=True, text=True, check=True
    ).stdout


if __name__ == "__main__":
    main()
