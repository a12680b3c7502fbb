"""The process that runs a reward which may hang: `python -m porcelet.train.rewards.child FD`.

First comes {"name", "options", "seconds", "memory"}, answered when the reward is ready; then a problem and an answer a
frame, answered by {"value"} or {"error"}. What the reward prints goes nowhere. A timer of the kernel's ends the process
in the middle of anything, should the parent not be there to do so.
"""

from __future__ import annotations

import resource
import signal
import socket
import sys
from typing import Any

from porcelet.train.rewards.answer import Answer, Reward, finite, told
from porcelet.train.rewards.frames import receive, send
from porcelet.train.rewards.outside import make
from porcelet.train.tasks.problem import Problem

MAX_REASON = 500  # characters


def main(fd: int) -> None:
    """Answer until the other side hangs up."""
    connection = socket.socket(fileno=fd)
    wanted = receive(connection)
    resource.setrlimit(resource.RLIMIT_AS, (wanted["memory"], wanted["memory"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        reward = make(wanted["name"], wanted["options"])
    except (Exception, SystemExit) as problem:  # told to the parent, which refuses the run
        send(connection, {"error": told(problem)[:MAX_REASON]})
        return
    send(connection, {"value": 0.0})
    while True:
        try:
            message = receive(connection)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, 2.0 * wanted["seconds"])
        reply = _reply(reward, message)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        send(connection, reply)


def _reply(reward: Reward, message: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"value": finite(reward(Problem(**message["problem"]), Answer(**message["answer"])))}
    except (Exception, SystemExit) as problem:  # a reward may be the user's code, and the text is the model's
        return {"error": told(problem)[:MAX_REASON]}


if __name__ == "__main__":
    main(int(sys.argv[1]))
