"""Two processes with torchrun's variables on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def in_two(code: str, out: Path) -> None:
    """Runs `code`, with `sys` and `Path` at hand and `out` as sys.argv[2], in each of two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", start + code, str(Path(__file__).parent), str(out)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=180) for process in ranks] == [0, 0]
