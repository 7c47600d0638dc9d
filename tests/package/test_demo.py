"""Tests the command `python -m keras_normopt.demo`."""

import keras
import pytest

from keras_normopt import demo

pytestmark = pytest.mark.once


def test_the_demo_trains_every_optimizer_and_draws_curves(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(demo, "LAYERS", 4)  # The nox session `demo` trains 30 layers.
    picture = tmp_path / "curves.png"
    demo.main(["--epochs", "1", "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"backend {keras.backend.backend()}" in printed
    for name in demo.OPTIMIZERS:
        assert f"\n{name} " in printed


def test_the_demo_refuses_zero_epochs(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--epochs", "0"])
    assert "--epochs must be at least 1, not 0" in capsys.readouterr().err
