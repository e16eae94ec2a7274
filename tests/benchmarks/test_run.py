"""What a run's benchmark measures alone exists for every kind of preset."""

import pytest

from pipelines.experiment import presets
from tests.benchmarks.benchmark_run import unavoidable


@pytest.mark.parametrize('priority_exponent', [0.0, 0.6])
def test_the_unavoidable_costs_of_uniform_and_prioritized_replay_are_measured(priority_exponent):
    experiment = presets.experiment('laptop', {'priority_exponent': priority_exponent})
    costs = unavoidable(experiment, repeats=1)
    assert len(costs) == 4
    assert min(costs.values()) > 0
