"""Lines of metrics are means over the steps that told a number."""

import pytest

from rwkvpipe.train.record import Progress


def test_a_number_that_some_steps_lack_is_the_mean_of_the_others():
    progress = Progress()
    for more in ({}, {"mean_reward": 1.0}, {"mean_reward": 4.0}):
        values = {"loss": 3.0, "grad_norm": 1.0} | more
        progress.add(values, {"tokens": 8, "targets": 8}, 0.1)
    row = progress.row(0.1)
    assert row["mean_reward"] == pytest.approx(2.5) and row["loss"] == pytest.approx(3.0)
    progress.add({"loss": 1.0, "grad_norm": 1.0}, {"tokens": 8, "targets": 8}, 0.1)
    assert "mean_reward" not in progress.row(0.1)
    assert Progress(**vars(progress)) == progress
