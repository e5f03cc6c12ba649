"""Python runs this first in the hosts of host_tools.py: it notes what they write, and where."""

import os
import sys

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")

if "HOST_AUDIT" in os.environ:
    _log = os.open(f"{os.environ['HOST_AUDIT']}/{os.getpid()}.writes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def _note(event, args):
        opened = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if opened or event in _CHANGES:
            os.write(_log, f"{event} {args[0]}\n".encode())

    sys.addaudithook(_note)
