"""Untrusted files are decoded in a process of their own: no file can hang or crash the import, or
fill its memory.

The process takes one file after another and is replaced when it dies or takes too long. It sends
back JSON and PNG, never a pickle.
"""

import importlib
import json
import logging
import multiprocessing
import os
import signal
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from minidiff.data.dicom import Refused, need_pydicom, reader

START = 120  # seconds until the process has imported what it needs
READY = b"ready"


class Guard:
    """Calls functions in another process with limits of time and, on Linux, of memory."""

    def __init__(self, seconds: float = 60, gigabytes: float = 6):
        self.seconds, self.gigabytes = seconds, gigabytes
        self.process, self.pipe = None, None

    def convert(self, path: str, options: reader.Options) -> tuple[bytes, dict[str, str]]:
        """As `reader.convert`."""
        found, = self.call("minidiff.data.dicom.reader:convert", path, options)
        return found

    def call(self, function: str, *given: Any) -> list[tuple[bytes, dict[str, str]]]:
        """What `module:function` gives for arguments of JSON: bytes and facts, or a list of them.
        A file that takes too much or kills the process is Refused, too."""
        if self.process is None:
            self._start()
        try:
            self.pipe.send_bytes(json.dumps([function, given]).encode())
            if not self.pipe.poll(self.seconds):
                self.stop()
                raise Refused("time", f"{self.seconds:g} s")
            answer = json.loads(self.pipe.recv_bytes())
            found = [(self.pipe.recv_bytes(), facts) for facts in answer.get("found", [])]
        except (EOFError, OSError):
            self.stop()
            raise Refused("crash") from None
        if "refused" in answer:
            raise Refused(*answer["refused"])
        return found

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
            self.process = None

    def _start(self) -> None:
        # forked from a server that has imported everything and has one thread: quick, and safe
        # beside our threads
        ways = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
        if "forkserver" in ways:
            context.set_forkserver_preload([__name__])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.gigabytes), daemon=True)
        self.process.start()
        theirs.close()
        with suppress(EOFError):  # it died
            if self.pipe.poll(START) and self.pipe.recv_bytes() == READY:
                return
        self.stop()
        raise RuntimeError(f"the decoding process did not start, or not within {START} s")


def _serve(pipe: Connection, gigabytes: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    warnings.simplefilter("ignore")               # pydicom quotes values in its warnings
    logging.disable(logging.CRITICAL)
    need_pydicom()
    # not Linux: the limits on size and time stand alone
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the image
    pipe.send_bytes(READY)
    while True:
        try:
            name, given = json.loads(pipe.recv_bytes())
        except EOFError:  # the parent is gone
            return
        module, name = name.split(":")
        try:
            found = getattr(importlib.import_module(module), name)(*given)
            found = found if isinstance(found, list) else [found]
            answer = {"found": [facts for _, facts in found]}
        except Refused as refused:
            found, answer = [], {"refused": [refused.key, refused.detail]}
        pipe.send_bytes(json.dumps(answer).encode())
        for content, _ in found:
            pipe.send_bytes(content)
