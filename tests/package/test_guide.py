"""Runs the programs of the documentation pages.

Two pages depend on the backend. test_examples runs the page on loops, and test_devices
runs the page on devices.
"""

import numpy as np
import pytest
from keras import ops

from helpers.pages import ROOT, evaluate

pytestmark = [pytest.mark.once, pytest.mark.sdist]

TESTED_ELSEWHERE = {"custom_loops.md", "devices.md"}
PAGES = [
    page for page in sorted(ROOT.glob("docs/*.md")) if page.name not in TESTED_ELSEWHERE
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_of_each_page_run(page, tmp_path, monkeypatch, custom_norms):
    monkeypatch.chdir(tmp_path)
    evaluate(page)


def test_the_options_page_has_the_right_losses_of_gradient_correlation(custom_norms):
    names = evaluate(ROOT / "docs/options.md")
    assert names["fixed"] == pytest.approx(4.44, abs=0.01)
    assert names["adaptive"] == pytest.approx(2.22, abs=0.01)


def test_the_migrating_page_keeps_the_meaning_of_a_users_norm(custom_norms):
    names = evaluate(ROOT / "docs/migrating.md")
    gradient = ops.reshape(ops.arange(6, dtype="float32"), (2, 3))
    as_in_2018 = ops.convert_to_numpy(names["root_mean_square"](gradient))
    new = ops.convert_to_numpy(gradient / names["rms"](gradient))
    np.testing.assert_allclose(as_in_2018, new, rtol=1e-6)
