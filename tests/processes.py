"""Python processes of their own: the package's command, scripts, and several that race."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cupaged

PARENT = Path(cupaged.__file__).resolve().parent.parent
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
_LONGEST = 600  # seconds

_TOGETHER = """
import sys
print("ready", flush=True)
sys.stdin.readline()
"""


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python`, where it finds this `cupaged`."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PARENT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=_LONGEST,
        check=False,
    )


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m cupaged`."""
    return run_python("-m", "cupaged", *arguments, **environment)


def race(imports: str, script: str, count: int, **environment: str) -> list[str]:
    """What each of so many processes prints that have the imports and begin a script together."""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", imports + _TOGETHER + script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PARENT,
            env=os.environ | environment,
        )
        for _ in range(count)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        printed = [racer.communicate(timeout=_LONGEST)[0].strip() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert [racer.returncode for racer in racers] == [0] * count
    return printed
