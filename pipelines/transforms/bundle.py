"""Act and learn: a bundle's number in, gradients to the parameter server and segments out.

A bundle is an actor, its own replay and a learner in one worker (paper, section 4).
"""

from pipelines.transforms.workers import Work
from pipelines.workers import bundle


class ActAndLearn(Work):
    """Runs one bundle until the global budget is reached.

    One DoFn, not a chain of two: an engine may hold back the first one's output until it ends (Dask
    does), so that the second would not start before.
    """

    kind = 'bundle'

    def open(self, spec):
        """Opens the bundle."""
        return bundle.open_bundle(self._config, self.addresses, spec)
