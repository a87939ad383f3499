"""Means over seeds."""

import numpy as np
import pytest

from dgc_fastai.utils.means import mean_text, standard_error


def test_the_error_is_that_of_the_mean():
    values = [3.0, 1.0, 4.0, 1.5]
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / 2)
    assert standard_error(values[:1]) is standard_error([]) is None


def test_as_text():
    assert mean_text([1.0, 2.0], 1) == "1.5 ± 0.5" and mean_text([1.0], 2) == "1.00" and mean_text([], 2) == ""
