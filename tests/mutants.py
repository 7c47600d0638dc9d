"""Changes the core in one place at a time, and checks that a test fails.

Draws mutants of cosmic-ray with a seed, each from another place. Tests every mutant in
a copy of the tree. Prints a diff of each mutant that no test detects.
"""

import argparse
import contextlib
import os
import pathlib
import random
import shutil
import subprocess
import sys

import toml
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "src/keras_normopt"
# The code in these folders handles gradients, except the files in `NOT_CORE`.
CORE = ["_backend", "norms", "_blocks", "_transforms", "_optimizer"]
NOT_CORE = ["docstrings", "arguments", "representation", "track_norms", "types"]
# Here, `|` only joins types, and no code shifts bits.
NOT_NUMERIC = r"core/ReplaceBinaryOperator_.*(Bit|Shift|MatMul)"
# These tests test other modules, or start processes with the installed package.
LEFT_OUT = ["experiments", "backend/test_devices.py"]
LEFT_OUT += [f"package/test_{name}.py" for name in ("demo", "examples", "guide")]
LEFT_OUT += [f"package/test_{name}.py" for name in ("install", "plotting", "search")]


def draw(sessions, number, seed):
    """Keeps `number` mutants to test, each in one of the sessions."""
    with contextlib.ExitStack() as stack:
        databases = [stack.enter_context(use_db(s, WorkDB.Mode.open)) for s in sessions]
        # Draws places, so that a line with many operators is not more likely.
        places = {}
        for item in databases[0].pending_work_items:
            [mutation] = item.mutations
            key = str(mutation.module_path), mutation.start_pos
            places.setdefault(key, []).append(mutation)
        rng = random.Random(seed)
        drawn = rng.sample(sorted(places), number)
        drawn = [_key(rng.choice(sorted(places[p], key=_key))) for p in drawn]
        for part, database in enumerate(databases):
            own = set(drawn[part :: len(databases)])
            left_out = [
                item.job_id
                for item in database.pending_work_items
                if _key(item.mutations[0]) not in own
            ]
            skipped = WorkResult(worker_outcome=WorkerOutcome.SKIPPED)
            database.set_multiple_results(left_out, skipped)


def _key(mutation):
    return str(mutation.module_path), mutation.operator_name, mutation.occurrence


def copy_tree(directory):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name in ("src", "tests", "docs"):
        shutil.copytree(ROOT / name, directory / name)
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, directory)


def prepare(directory, pytest_arguments):
    """Copies the tree and starts a session of cosmic-ray. Returns its database."""
    copy_tree(directory)
    command = f"{sys.executable} -m pytest -x -q -n 0 -p no:cacheprovider "
    config = {
        "module-path": [
            str(path.relative_to(directory))
            for folder in CORE
            for path in sorted((directory / PACKAGE / folder).glob("*.py"))
            if path.stem not in NOT_CORE
        ],
        "timeout": 1800.0,
        "test-command": command + " ".join(pytest_arguments),
        "distributor": {"name": "local"},
        "filters": {"operators-filter": {"exclude-operators": [NOT_NUMERIC]}},
    }
    (directory / "mutants.toml").write_text(toml.dumps({"cosmic-ray": config}))
    for command in (
        ["cosmic-ray", "init", "mutants.toml", "mutants.sqlite"],
        ["cr-filter-operators", "mutants.sqlite", "mutants.toml"],
    ):
        subprocess.run(command, cwd=directory, check=True)
    return directory / "mutants.sqlite"


def report(sessions):
    """Prints each mutant that survived. Returns the numbers of survived and tested."""
    outcomes = []
    for session in sessions:
        with use_db(session, WorkDB.Mode.open) as database:
            for _, result in database.completed_work_items:
                if result.worker_outcome == WorkerOutcome.SKIPPED:
                    continue
                outcomes.append(result.test_outcome)
                if result.test_outcome != TestOutcome.KILLED:
                    print(result.diff or result.output, end="\n\n")
    return sum(o != TestOutcome.KILLED for o in outcomes), len(outcomes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "directory", type=pathlib.Path, help="folder for copies of the tree and results"
    )
    add(
        "--number",
        type=int,
        default=100,
        help="number of mutants; default: %(default)s",
    )
    add("--seed", type=int, default=0)
    add("--processes", type=int, default=2)
    add("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_intermixed_args()
    tests = options.pytest or [f"--ignore=tests/{path}" for path in LEFT_OUT]
    parts = [options.directory.absolute() / str(n) for n in range(options.processes)]
    sessions = [prepare(part, tests) for part in parts]
    draw(sessions, options.number, options.seed)
    running = [
        subprocess.Popen(
            ["cosmic-ray", "exec", "mutants.toml", session],
            cwd=part,
            env=os.environ | {"PYTHONPATH": str(part / "src")},
        )
        for part, session in zip(parts, sessions, strict=True)
    ]
    statuses = [process.wait() for process in running]
    if any(statuses):
        sys.exit("cosmic-ray failed")
    survived, tested = report(sessions)
    print(f"{tested - survived} of {tested} mutants were detected.")


if __name__ == "__main__":
    main()
