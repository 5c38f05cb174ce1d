"""`skips.py JUNIT.xml PATTERN...`: fail where a test was skipped for another reason than these."""

from __future__ import annotations

import re
import sys
from xml.etree import ElementTree


def main(path: str, *allowed: str) -> int:
    """Print the skips that match no pattern; 1 if there is one."""
    wrong = [
        f"{case.get('classname')}::{case.get('name')} was skipped: {skip.get('message')}"
        for case in ElementTree.parse(path).iter("testcase")
        for skip in case.iter("skipped")
        if not any(re.match(pattern, skip.get("message", "")) for pattern in allowed)
    ]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
