"""Whatever the pages of the documentation show, runs.

Of the two that differ from backend to backend, the loops are for test_examples, and the
programs for several devices for test_devices.
"""

import numpy as np
import pytest
from keras import ops

from helpers.pages import ROOT, evaluate

pytestmark = [pytest.mark.once, pytest.mark.sdist]

ELSEWHERE = {"custom_loops.md", "devices.md"}
PAGES = [page for page in sorted(ROOT.glob("docs/*.md")) if page.name not in ELSEWHERE]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_of_each_page_run(page, tmp_path, monkeypatch, custom_norms):
    monkeypatch.chdir(tmp_path)
    evaluate(page)


def test_what_options_say_of_gradient_correlation(custom_norms):
    shown = evaluate(ROOT / "docs/options.md")
    assert shown["fixed"] == pytest.approx(4.44, abs=0.01)
    assert shown["adaptive"] == pytest.approx(2.22, abs=0.01)


def test_what_migrating_says_of_a_norm_of_ones_own(custom_norms):
    shown = evaluate(ROOT / "docs/migrating.md")
    gradient = ops.reshape(ops.arange(6, dtype="float32"), (2, 3))
    as_in_2018 = ops.convert_to_numpy(shown["root_mean_square"](gradient))
    new = ops.convert_to_numpy(gradient / shown["rms"](gradient))
    np.testing.assert_allclose(as_in_2018, new, rtol=1e-6)
