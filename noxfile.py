"""Everything there is to run: `nox --list` shows it, `nox` runs what CI runs.

Each backend is installed alone, beside the built wheel, to prove that the package needs
no other and that the wheel is whole.
"""

import os
import pathlib

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"

PROJECT = nox.project.load_toml()
OLDEST_KERAS = "3.12.0"
# TensorFlow in the build without GPU support, PyTorch in a release known to pass.
BACKENDS = {"jax": "jax", "tensorflow": "tensorflow-cpu", "torch": "torch==2.13.0"}
# Libraries for one backend, to compare with in its tests.
PEERS = {"jax": ["optax"], "torch": ["pytorch_optimizer"]}
# With the newest Keras only. They ask about numbers, and whether libraries that are
# built on Keras work beside it: what an older Keras does differently shows in the rest.
NEWEST_ONLY = ["check_norm", "experiments_data", "experiments_tasks"]
NEWEST_ONLY += ["properties", "search"]


def install(session, backend, *packages):
    # First and by itself, or a dependency might choose another build of it.
    session.install(BACKENDS[backend])
    session.install(*packages)
    session.env.update(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="2")


def test_packages(backend):
    group = nox.project.dependency_groups(PROJECT, "test")
    return [*group, *PEERS.get(backend, ())]


def run_tests(session, left_out=()):
    # JAX compiles most of what the tests compute many times over. These keep all of it,
    # for the other processes and for the session with the other Keras.
    session.env.update(
        JAX_COMPILATION_CACHE_DIR=str(session.cache_dir.absolute() / "jax"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )
    # Or PyTorch's threads, in two test workers, wait for each other.
    session.env["OMP_NUM_THREADS"] = "1"
    # Neighbours in a file stay together, and share fixtures and compiled functions.
    defaults = ["-n", "auto", "--dist", "worksteal"]
    defaults += [f"--ignore=tests/test_{name}.py" for name in left_out]
    session.run("pytest", *(session.posargs or defaults))


@nox.session
@nox.parametrize(
    ("backend", "keras"),
    [nox.param(backend, None, id=backend) for backend in BACKENDS]
    + [nox.param(name, OLDEST_KERAS, id=f"{name}-oldest-keras") for name in BACKENDS],
)
def tests(session, backend, keras):
    """Run the tests on one backend, with the newest or the oldest supported Keras."""
    package = f"keras=={keras}" if keras else "keras"
    install(session, backend, package, ".[experiments]", *test_packages(backend))
    if keras:  # Arguments were searched for exceptions with the newest one.
        session.env["HYPOTHESIS_PROFILE"] = "quick"
    run_tests(session, left_out=NEWEST_ONLY if keras else ())


@nox.session(default=False)
@nox.parametrize("backend", list(BACKENDS), ids=list(BACKENDS))
def prerelease(session, backend):
    """Run the tests on one backend with the nightly build of Keras."""
    install(session, backend, ".[experiments]", *test_packages(backend))
    session.run("pip", "uninstall", "--yes", "keras", silent=True)
    session.install("--pre", "keras-nightly")
    run_tests(session)


@nox.session(default=False)
@nox.parametrize("backend", list(BACKENDS), ids=list(BACKENDS))
def bench(session, backend):
    """Time a step beside stock Keras and hand-written peers; `-- --quick` is short."""
    install(session, backend, ".", "matplotlib", *PEERS.get(backend, ()))
    found = pathlib.Path(session.cache_dir, "bench")
    found.mkdir(parents=True, exist_ok=True)
    path = found / f"{backend}.json"
    session.run("python", "tests/benchmarks/bench.py", path, *session.posargs)
    figure = found / "benchmark.png"
    # Of all backends so far.
    every = sorted(found.glob("*.json"))
    session.run("python", "tests/benchmarks/report.py", *every, "--figure", figure)
    session.log(f"results are in {found}")


@nox.session
def lint(session):
    """Check style, formatting, types, and that the stubs are those of the classes."""
    lint = nox.project.dependency_groups(PROJECT, "lint")
    install(session, "jax", ".", *lint)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "tests/typing/make_stubs.py", "--check")
    session.run("mypy")


@nox.session
def docs(session):
    """Build the site; `-- -b linkcheck` follows the links out of it instead."""
    group = nox.project.dependency_groups(PROJECT, "docs")
    install(session, "jax", ".[experiments]", *group)
    options = session.posargs or ["-b", "html"]
    session.run("sphinx-build", "-W", "--keep-going", *options, "docs", "docs/_build")


@nox.session(default=False)
def demo(session):
    """Train a 30-layer network with and without normalization; draw the curves."""
    install(session, os.environ.get("KERAS_BACKEND", "jax"), ".[demo]")
    session.run("python", "-m", "keras_normopt.demo", *session.posargs)
