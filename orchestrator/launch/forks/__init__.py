"""Ray worker processes by forking from one that has imported what they need, instead of importing it in each.

`server.py` is that process and `become.py` what Ray starts in a worker's place; both run as scripts, and neither
imports this package.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
FORK_SAFE = {
    # Libraries that make threads when imported make none. Ray tells its workers the same; training sets its own.
    "OMP_NUM_THREADS": "1",
    # torch looks for GPUs without opening one: CUDA does not live on in a fork.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


@contextmanager
def fork_server(folder: Path, **variables: str) -> Iterator[str]:
    """Serve forks inside the block; gives the command that takes the place of `python` in starting a worker.

    The server's socket lies in `folder`. `variables` are for libraries that read their environment when a
    process starts. The server ends with the block, and with this process, whatever ends it. A worker that
    cannot reach it starts the usual way.
    """
    address = folder / "forks"
    environment = {**variables, **os.environ, **FORK_SAFE}
    server = subprocess.Popen(
        [sys.executable, str(HERE / "server.py"), str(address)],
        stdin=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # the terminal's Ctrl-C is the driver's to handle
    )
    try:
        yield shlex.join([sys.executable, "-I", "-S", str(HERE / "become.py"), str(address)])
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()
        address.unlink(missing_ok=True)
