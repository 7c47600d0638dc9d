"""Everything there is to run: `nox --list` shows it, `nox` runs what CI runs.

Each backend is installed alone, beside the built wheel, to prove that the package needs
no other and that the wheel is whole.
"""

import os

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"

PROJECT = nox.project.load_toml()
OLDEST_KERAS = "3.12.0"
# TensorFlow in the build without GPU support, PyTorch in a release known to pass.
BACKENDS = {"jax": "jax", "tensorflow": "tensorflow-cpu", "torch": "torch==2.13.0"}
# Libraries for one backend, to compare with in its tests.
PEERS = {"jax": ["optax"]}


def install(session, backend, *packages):
    # First and by itself, or a dependency might choose another build of it.
    session.install(BACKENDS[backend])
    session.install(*packages)
    session.env.update(KERAS_BACKEND=backend, TF_CPP_MIN_LOG_LEVEL="2")


def test_packages(backend):
    group = nox.project.dependency_groups(PROJECT, "test")
    return [*group, *PEERS.get(backend, ())]


@nox.session
@nox.parametrize(
    ("backend", "keras"),
    [nox.param(backend, None, id=backend) for backend in BACKENDS]
    + [nox.param(name, OLDEST_KERAS, id=f"{name}-oldest-keras") for name in BACKENDS],
)
def tests(session, backend, keras):
    """Run the tests on one backend, with the newest or the oldest supported Keras."""
    if keras:  # Norms were searched for exceptions with the newest one.
        session.env["HYPOTHESIS_PROFILE"] = "quick"
    keras = f"keras=={keras}" if keras else "keras"
    install(session, backend, keras, ".[demo]", *test_packages(backend))
    session.run("pytest", *(session.posargs or ["-n", "auto"]))


@nox.session(default=False)
@nox.parametrize("backend", list(BACKENDS), ids=list(BACKENDS))
def prerelease(session, backend):
    """Run the tests on one backend with the nightly build of Keras."""
    install(session, backend, ".[demo]", *test_packages(backend))
    session.run("pip", "uninstall", "--yes", "keras", silent=True)
    session.install("--pre", "keras-nightly")
    session.run("pytest", *(session.posargs or ["-n", "auto"]))


@nox.session
def lint(session):
    """Check style, formatting, types, and that the stubs are those of the classes."""
    lint = nox.project.dependency_groups(PROJECT, "lint")
    install(session, "jax", ".", *lint)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "tests/typing/make_stubs.py", "--check")
    session.run("mypy")


@nox.session(default=False)
def demo(session):
    """Train a 30-layer network with and without normalization; draw the curves."""
    install(session, os.environ.get("KERAS_BACKEND", "jax"), ".[demo]")
    session.run("python", "-m", "keras_normopt.demo", *session.posargs)
