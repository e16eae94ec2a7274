"""The verbs: what runs, and on which engine.

Importing it quietens the libraries below, whose notices are not about this project: TensorFlow's
about accelerators it did not find, Google's about Python versions to come, Beam's about a package
for checksums on Google's storage.
"""

import logging
import os
import warnings

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
warnings.filterwarnings('ignore', category=FutureWarning, module='google')
logging.getLogger().addFilter(lambda record: 'crcmod' not in record.getMessage())
