"""`porcelet doctor`: what this machine gives porcelet, and what it keeps from it.

A finding says what is so, and where that costs something, what to do. "ok" is as it should be; a "note" works, slower
or with less than it could; a "problem" will fail, or be slow beyond use, until somebody does something. Codes stay the
same from version to version; docs/doctor.md has them all.

Nothing is changed, no model is loaded and no network is asked, unless `network` is. What computes is imported last: a
library that is missing and a native library that does not load are findings too. What the machine says of itself is
read below a root, so that tests can lay out another machine in a folder.

examine.py asks in order; hardware, accelerators, libraries, computing, limits, models, store, disk, database,
environment, authorities, proxy and network look; bundle.py packs what was found for whoever helps, redaction.py takes
out what is nobody else's business.
"""

from __future__ import annotations

from porcelet.doctor.examine import examine
from porcelet.doctor.finding import Finding, State, told

__all__ = ["Finding", "State", "examine", "told"]
