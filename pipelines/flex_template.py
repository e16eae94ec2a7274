"""Entry point of the Flex Template's launcher: the template's parameters in, one job out.

The launcher appends Beam's own flags. One of them, `--template_location`, makes Beam write the job
for the service to start, without waiting for it.
"""

import pathlib
import sys

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.output import protect_output
from pipelines import job

DEFAULTS = ('--runner=DataflowRunner', '--replay_addresses=')
"""Precede the template's flags: the last value of a flag counts."""

if __name__ == '__main__':
    protect_output()
    job.main([*DEFAULTS, *sys.argv[1:]])
