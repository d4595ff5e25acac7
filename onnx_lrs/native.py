"""What native libraries print past Python: held back or led away from stdout, where --json has to stay alone."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator

STDOUT, STDERR = 1, 2


@contextlib.contextmanager
def redirected(descriptor: int, target: int | None) -> Iterator[None]:
    """Send what is written to a file descriptor of this process to another one; None drops it.

    Python exceptions are not affected. The descriptor belongs to the whole process, so keep this short.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    try:
        saved = os.dup(descriptor)
    except OSError:  # closed, as in a service without a console: nothing can be printed there
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY) if target is None else os.dup(target)
    os.dup2(sink, descriptor)
    os.close(sink)
    try:
        yield
    finally:
        os.dup2(saved, descriptor)
        os.close(saved)


@contextlib.contextmanager
def overheard() -> Iterator[io.StringIO]:
    """Hold back what Python prints and what native code writes to stderr; afterwards the buffer holds the text."""
    text = io.StringIO()
    with tempfile.TemporaryFile() as native:
        try:
            with redirected(STDERR, native.fileno()), contextlib.redirect_stdout(text):
                yield text
        finally:
            native.seek(0)
            text.write(native.read().decode(errors="replace"))
