"""Everything there is to run: `nox --list` shows it, `nox` runs what CI runs.

Each backend is installed alone, beside the built wheel, to prove that the package needs
no other and that the wheel is whole.
"""

import os
import pathlib
import re
import shutil
import zipfile

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"  # uv takes a third of the time.

PROJECT = nox.project.load_toml()
OLDEST_KERAS = "3.12.0"
# TensorFlow in the build without GPU support, PyTorch in a release known to pass.
BACKENDS = {"jax": "jax", "tensorflow": "tensorflow-cpu", "torch": "torch==2.13.0"}
# What the tests run on: the source tree, or the wheel that a release would publish.
PACKAGE = os.environ.get("PACKAGE", ".")
# Libraries for one backend, to compare with in its tests.
PEERS = {"jax": ["optax"], "torch": ["pytorch_optimizer"]}
# It runs the tests marked `once`. Only the nightly job runs these on the others, too.
QUICKEST = "torch"


def install(session, backend, *packages):
    # Most modules are never imported. Those that are, Python compiles then. It has to
    # write what it compiled, or each of many processes would do it again.
    session.env["PYTHONDONTWRITEBYTECODE"] = ""
    # First and by itself, or a dependency might choose another build of it.
    if backend == "torch":
        # By pip, which may be configured to find a build without CUDA. uv would not.
        session.install("pip")
        command = ["python", "-m", "pip", "install", "--quiet", "--no-compile"]
        session.run_install(*command, BACKENDS[backend])
    else:
        session.install("--no-compile", BACKENDS[backend])
    session.install("--no-compile", *packages)
    session.env.update(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="2")


def test_packages(backend):
    group = nox.project.dependency_groups(PROJECT, "test")
    return [*group, *PEERS.get(backend, ())]


def run_tests(session, markers=""):
    """Runs the tests that `markers` select. Arguments after `--` replace these."""
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
    if markers:
        defaults += ["-m", markers]
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
    ours = f"{PACKAGE}[experiments]"
    install(session, backend, package, ours, *test_packages(backend))
    if keras:  # Arguments were searched for exceptions with the newest one.
        session.env["HYPOTHESIS_PROFILE"] = "quick"
        run_tests(session, "not once and not newest_keras")
    else:
        run_tests(session, "" if backend == QUICKEST else "not once")


@nox.session(default=False, reuse_venv=True)
@nox.parametrize("backend", list(BACKENDS), ids=list(BACKENDS))
def dev(session, backend):
    """Run the tests of what was changed since the last time, on one backend.

    The first time these are all; from then on, with `nox -R`, it takes seconds.
    """
    # Editable, or an environment that stays would test what was installed once.
    ours = ["--editable", ".[experiments]", "pytest-testmon"]
    install(session, backend, "keras", *ours, *test_packages(backend))
    found = session.cache_dir.absolute() / f"testmon-{backend}"
    session.env.update(TESTMON_DATAFILE=str(found), OMP_NUM_THREADS="1")
    session.run("pytest", "-x", "--testmon", *session.posargs, success_codes=[0, 5])


@nox.session(default=False)
@nox.parametrize("backend", list(BACKENDS), ids=list(BACKENDS))
def mutants(session, backend):
    """Change the core in 100 places, one at a time, and see if tests notice: hours."""
    packages = ["keras", ".[experiments]", "cosmic-ray", *test_packages(backend)]
    install(session, backend, *packages)
    session.env.update(OMP_NUM_THREADS="1", HYPOTHESIS_PROFILE="quick")
    session.run("python", "tests/mutants.py", session.create_tmp(), *session.posargs)


@nox.session(default=False)
@nox.parametrize("backend", list(BACKENDS), ids=list(BACKENDS))
def prerelease(session, backend):
    """Run the tests on one backend with the nightly build of Keras."""
    install(session, backend, ".[experiments]", *test_packages(backend))
    session.install("pip")
    session.run("python", "-m", "pip", "uninstall", "--yes", "keras", silent=True)
    session.install("--pre", "keras-nightly")
    run_tests(session)


@nox.session(default=False)
def trackers(session):
    """Run what the guide shows of W&B and MLflow, which are large to install."""
    group = nox.project.dependency_groups(PROJECT, "test")
    install(session, QUICKEST, ".[experiments]", *group, "wandb", "mlflow")
    # Their own warnings are no errors.
    command = ["pytest", "-W", "default", "-k", "logging"]
    session.run(*command, "tests/package/test_guide.py")


@nox.session(default=False)
def hub(session):
    """Run `diagnose` and find axes on models of KerasHub, which is large to install."""
    group = nox.project.dependency_groups(PROJECT, "test")
    install(session, QUICKEST, ".[experiments]", *group, "keras-hub", "keras-rs")
    # Their own warnings are no errors.
    command = ["pytest", "-W", "default", "--nightly"]
    session.run(*command, "-k", "hub", "tests/diagnosis/test_healthy.py")
    session.run(*command, "tests/blocks/test_axes_of_libraries.py")


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
    """Check style, formatting, layers, types, stubs, and that sentences are short."""
    lint = nox.project.dependency_groups(PROJECT, "lint")
    install(session, "jax", ".", *lint)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "tests/typing/make_stubs.py", "--check")
    session.run("lint-imports")
    session.run("mypy")
    docs = pathlib.Path("docs")
    pages = ["README.md", *docs.glob("*.md"), *docs.glob("results/*.md")]
    session.run("python", "tests/plain_english.py", "src", "tests", *pages)


@nox.session
def docs(session):
    """Build the site; `-- -b linkcheck` follows the links out of it instead."""
    group = nox.project.dependency_groups(PROJECT, "docs")
    install(session, "jax", ".[experiments]", *group)
    options = session.posargs or ["-b", "html"]
    # MyST-NB writes what notebooks print beside this folder, and offers no other place.
    target = "docs/_build/site"
    session.run("sphinx-build", "-W", "--keep-going", *options, "docs", target)


@nox.session(default=False)
def demo(session):
    """Train a 30-layer network with and without normalization; draw the curves."""
    install(session, os.environ.get("KERAS_BACKEND", "jax"), ".[demo]")
    session.run("python", "-m", "keras_normopt.demo", *session.posargs)


def check_links(session, wheel):
    """Of the page that an index shows: none is relative, and those to us lead home."""
    with zipfile.ZipFile(wheel) as files:
        [name] = [n for n in files.namelist() if n.endswith(".dist-info/METADATA")]
        page = files.read(name).decode().partition("\n\n")[2]
    targets = re.findall(r"\]\(([^)]+)\)", page)
    if relative := [t for t in targets if not re.match("https?://|#", t)]:
        session.error(f"README has links that no index can follow: {relative}")
    source = PROJECT["project"]["urls"]["Source"]
    if not any(t.startswith(f"{source}/blob/v") for t in targets):
        session.error(f"README's links do not lead to {source}")


def expect_error(session, message, *command):
    """Runs what must fail, and end with one line that has the message in it."""
    printed = session.run(*command, success_codes=[1], silent=True, external=True)
    if message not in printed.splitlines()[-1]:
        session.error(f"the last line should say {message!r}:\n{printed}")


@nox.session(default=False)
def build(session):
    """Make sdist and wheel in `dist`, and check all that can be before a release."""
    dist = pathlib.Path("dist").absolute()
    shutil.rmtree(dist, ignore_errors=True)
    session.install("build", "cffconvert", "check-wheel-contents", "twine")
    session.run("cffconvert", "--validate")
    # The wheel is made from the sdist, which shows that it can be.
    session.run("python", "-m", "build", "--outdir", dist)
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    session.run("twine", "check", "--strict", sdist, wheel)
    session.run("check-wheel-contents", wheel)
    check_links(session, wheel)

    # Not the environment of the session, which may be one that is used again.
    temporary = pathlib.Path(session.create_tmp())
    session.run("python", "-m", "venv", "--clear", temporary / "empty")
    python = temporary / "empty/bin/python"
    pip_install = [python, "-m", "pip", "install", "--quiet"]
    session.run(*pip_install, wheel, external=True)
    # Of whatever backend this machine has set for Keras.
    hint = 'not installed: pip install "keras_normopt['
    expect_error(session, hint, python, "-c", "import keras_normopt")
    session.run(*pip_install, BACKENDS["jax"], external=True)
    session.env["KERAS_BACKEND"] = "jax"
    hint = 'pip install "keras_normopt[demo]"'
    expect_error(session, hint, python, "-m", "keras_normopt.demo", "--help")

    install(session, "jax", f"{wheel}[experiments]", *test_packages("jax"))
    # Once more, or pip leaves another one of the same version where it is.
    session.install("--force-reinstall", "--no-deps", wheel)
    unpacked = temporary / sdist.name.removesuffix(".tar.gz")
    shutil.rmtree(unpacked, ignore_errors=True)
    shutil.unpack_archive(sdist, temporary)
    with session.chdir(unpacked):
        run_tests(session, "sdist")
