"""The commands, and all that knows Beam.

Importing it silences notices that do not concern this project: TensorFlow's on missing
accelerators, Google's on future Python versions, Beam's on a checksum package for Cloud Storage.
"""

import logging
import os
import warnings

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
warnings.filterwarnings('ignore', category=FutureWarning, module='google')
logging.getLogger().addFilter(lambda record: 'crcmod' not in record.getMessage())
