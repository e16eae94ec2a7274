"""Learn: a learner's number in, gradients to the parameter server and segments out."""

from pipelines.transforms.workers import Work
from pipelines.workers import boxes


class Learn(Work):
    """Runs one learner until the global budget is reached."""

    kind = 'learner'

    def open(self, spec):
        """Opens the learner."""
        return boxes.open_learner(self._config, self.addresses, spec)
