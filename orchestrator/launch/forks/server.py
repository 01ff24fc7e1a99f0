"""A process that imports what Ray's workers need once, and becomes each of them by forking.

Run as `python server.py SOCKET`; it leaves when its standard input ends, which is when its parent does. What it imports
must live on in a fork: nothing may start a thread that is missed there or open a GPU. Ray is not among it: its library
reads the environment once, when it is loaded, and each worker has one of its own.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import traceback
from typing import Any

IMPORTS = (
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pydantic",
    "jsonschema",
    "requests",
    "fsspec",
    "google.protobuf.descriptor_pb2",
)
"""What takes the time of a worker's start; of all roles, since one server serves them all."""


def main(address: str) -> None:
    """Listen first: whoever comes during the imports waits less than importing would take."""
    me = os.getpid()
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(128)
            for name in IMPORTS:
                importlib.import_module(name)
            gc.collect()
            gc.freeze()  # a collection in a child would copy all that is shared
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are not waited for
            serve(listener)
    finally:
        if os.getpid() == me:
            with contextlib.suppress(
                OSError
            ):  # its parent, which may have been killed, does the same
                os.unlink(address)


def serve(listener: socket.socket) -> None:
    """One fork per request, until standard input ends."""
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        with connection:
            try:
                request, files = receive(connection)
            except (OSError, ValueError):
                continue  # it gave up, and starts by itself
            if os.fork() == 0:
                listener.close()
                connection.close()
                become(request, files)
            for file in files:
                os.close(file)
            connection.sendall(b"forked")


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request, JSON up to the end of what is sent, and the three standard files with its first byte."""
    first, files, _, _ = socket.recv_fds(connection, 1, 3)
    text = bytearray(first)
    while chunk := connection.recv(1 << 16):
        text += chunk
    return json.loads(text), files


def become(request: dict[str, Any], files: list[int]) -> None:
    """Run the requested script as if this process had just been started for it. Does not return."""
    code = 1
    try:
        os.setpgid(0, 0)  # Ray kills a worker's process group with it
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for target, file in enumerate(files):
            os.dup2(file, target)
            os.close(file)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        see_paths(os.environ.get("PYTHONPATH", ""))
        script, *arguments = request["command"]
        sys.argv = [script, *arguments]
        sys.path[0] = os.path.dirname(script)
        random.seed()  # as it is, all forks would draw the same
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed()
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # noqa: BLE001, the process ends here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def see_paths(paths: str) -> None:
    """Put what PYTHONPATH says, and this process has not been told, in front of the module path."""
    new = [path for path in paths.split(os.pathsep) if path and path not in sys.path]
    sys.path[1:1] = new


if __name__ == "__main__":
    main(sys.argv[1])
