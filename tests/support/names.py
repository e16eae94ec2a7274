"""Names that a directory of the user's may have."""

ODD_NAME = """-a [bc] [!d] *?\\ é日 %41 #'"$HOME `x` ,=;:&|<>{}~"""
"""All that shells, URLs, patterns and formats give a meaning to."""

UNFIT_NAMES = {
    'two\nlines': 'control character',
    'a\x1b[2J': 'control character',
    'a\udc80': 'UTF-8',
}
"""Names that are refused, and why."""
