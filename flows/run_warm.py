"""Runs a module in the warm engine as if it had been started here: `run_warm.py SOCKET [MODULE]`.

What the Prefect worker starts for a flow run (the module is then Prefect's engine); lives as long as the run does.
Started with `python -I -S`, so it must import only the standard library. Without an engine it becomes Prefect's own,
cold: slower, but right. Not to be imported.
"""

import json
import os
import signal
import socket
import sys


def main() -> None:
    """Hand over, relay signals, end as the run ended."""
    module = sys.argv[2] if len(sys.argv) > 2 else "prefect.engine"
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(sys.argv[1])
    except OSError:
        os.execv(sys.executable, [sys.executable, "-m", module])
    order = json.dumps({"module": module, "environment": dict(os.environ), "folder": os.getcwd()}).encode() + b"\n"
    sent = socket.send_fds(client, [order[:60_000]], [0, 1, 2])
    client.sendall(order[sent:])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: client.sendall(json.dumps({"signal": got}).encode() + b"\n"))
    for line in client.makefile("rb"):
        message = json.loads(line)
        if "exit" in message:
            end(message["exit"])
    # The engine is gone, and the run with it.
    os._exit(70)


def end(code: int) -> None:
    """Exit with the code, or by the signal that ended the run."""
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
