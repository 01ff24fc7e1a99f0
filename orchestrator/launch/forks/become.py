"""Ask the fork server for a process that runs a Python script; where it does not answer, run the script here.

Ray runs `python -I -S become.py SOCKET SCRIPT ARGUMENTS…` in a worker's environment and folder. It is started once per
worker, so it imports little.
"""

import json
import os
import socket
import sys

ANSWER_S = 60.0
"""How long a server may import before workers start without it."""


def main(address: str, command: list[str]) -> None:
    """Leave when the fork is there; else become the usual process."""
    try:
        ask(address, command)
    except OSError:
        os.execv(sys.executable, [sys.executable, *command])


def ask(address: str, command: list[str]) -> None:
    """Raises OSError where no fork came of it."""
    request = {"command": command, "environment": dict(os.environ), "folder": os.getcwd()}
    text = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ANSWER_S)
        connection.connect(address)
        socket.send_fds(connection, [text[:1]], [0, 1, 2])
        connection.sendall(text[1:])
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(16) != b"forked":
            raise OSError("the fork server left")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
