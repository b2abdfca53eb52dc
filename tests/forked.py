"""What the fork server of test_hard_knocks.py imports once: a script then starts in milliseconds instead of seconds.

The text corpora are read once, too. Importing this module reads them; tests do not.
"""

import functools

import test_hard_knocks  # noqa: F401

from data import text

text.load_domain = functools.cache(text.load_domain)
text.load_provenance = functools.cache(text.load_provenance)
for domain in test_hard_knocks.DOMAINS:
    text.load_domain(domain)
for domain in text.PROVENANCE:
    text.load_provenance(domain)
