"""The agent's half of each box: environment, networks, losses, actor and learner.

Importing it silences Gym's three-line end-of-life notice. TF-Agents imports Gym in every process;
this project plays no game with it.
"""

import contextlib

with contextlib.suppress(ImportError):
    from gym_notices.notices import notices

    notices.clear()
