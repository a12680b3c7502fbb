"""The first program inside the sandbox: give up root, set the limits, become the program that was asked for.

    python launch.py UID NAME=VALUE,NAME=VALUE PROGRAM ARGUMENTS...

The limits are set here rather than outside, where they would bind bubblewrap and count the caller's other processes.
UID is empty where a user namespace has changed the user already. The standard library only: nothing else is there.
"""

from __future__ import annotations

import os
import resource
import sys


def main(uid: str, limits: str, *command: str) -> None:
    if uid:
        os.setgroups([])
        os.setresgid(int(uid), int(uid), int(uid))
        os.setresuid(int(uid), int(uid), int(uid))
    for limit in limits.split(","):
        name, _, value = limit.partition("=")
        resource.setrlimit(vars(resource)[f"RLIMIT_{name}"], (int(value), int(value)))
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
