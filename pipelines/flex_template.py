"""What the launcher of the Flex Template runs: the template's parameters in, one job submitted.

The launcher appends Beam's own flags, `--template_location` among them, upon which Beam writes the
job for the service to start, and waits for nothing.
"""

import pathlib
import sys

if __name__ == '__main__':  # this checkout's packages, whatever PYTHONPATH and the environment hold
    sys.path[: not sys.flags.safe_path] = [str(pathlib.Path(__file__).resolve().parents[1])]

from infra.output import protect_output
from pipelines import job

DEFAULTS = ('--runner=DataflowRunner', '--replay_addresses=')
"""Flags in front of the template's: of one given twice the last counts."""

if __name__ == '__main__':
    protect_output()
    job.main([*DEFAULTS, *sys.argv[1:]])
