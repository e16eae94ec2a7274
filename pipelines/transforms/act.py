"""Act: an actor's number in, transitions to the replay and segments out (environment -> replay)."""

from pipelines.transforms.workers import Work
from pipelines.workers import boxes


class Act(Work):
    """Runs one actor until the global budget is reached."""

    kind = 'actor'
    learns = False

    def open(self, spec):
        """Opens the actor."""
        return boxes.open_actor(self._config, self.addresses, spec)
