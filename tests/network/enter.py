"""Run a program in the namespaces of a world.py: `python enter.py PID PROGRAM...`."""

from __future__ import annotations

import os
import sys

from rock.runtime.namespace.launcher import kernel

pid = sys.argv[1]
net = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
if os.geteuid():
    kernel.setns(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC), kernel.CLONE_NEWUSER)
kernel.setns(net, kernel.CLONE_NEWNET)
os.execv(sys.argv[2], sys.argv[2:])
