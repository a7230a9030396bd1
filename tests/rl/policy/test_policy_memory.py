import subprocess
import sys

import pytest

GROWS_AND_FREES = """
import sys
from pathlib import Path
from rl.policy.memory import keep_freed_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident_mib()
blocks = [bytearray(b"x" * 2**20) for _ in range(256)]
del blocks
print(resident_mib() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_stays_with_the_process_only_when_asked():
    def left_mib(how: str) -> float:
        done = subprocess.run([sys.executable, "-c", GROWS_AND_FREES, how], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert left_mib("keep") > 200
    assert left_mib("leave") < 100
