"""What the launcher of the Flex Template runs: the template's parameters in, one job submitted.

The launcher appends Beam's own flags, `--template_location` among them, upon which Beam writes the
job for the service to start, and waits for nothing.
"""

import sys

from pipelines import job

DEFAULTS = ('--runner=DataflowRunner', '--replay_addresses=')
"""Flags in front of the template's: of one given twice the last counts."""

if __name__ == '__main__':
    job.main([*DEFAULTS, *sys.argv[1:]])
