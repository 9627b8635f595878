"""`python limits.py MEMORY_BYTES CPU_SECONDS COMMAND ...`: become COMMAND, under limits that it cannot raise again.

A process of its own and not a function between fork and exec, where a thread of the caller may hold a lock. Run as a
file, so it imports nothing of qcore. Standard library only. Exit code 127 if there is no such command.
"""

import os
import resource
import sys

NO_COMMAND = 127


def main(argv: list[str]) -> int:
    """Set the limits, then be the command; it returns only if there is none."""
    memory, cpu, command = int(argv[0]), int(argv[1]), argv[2:]
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu),  # SIGXCPU, which ends a process that does not expect it
        (resource.RLIMIT_CORE, 0),  # what a crash leaves would fill the disk
    ):
        hard = resource.getrlimit(what)[1]
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (bound, bound))
    try:
        os.execvp(command[0], command)  # noqa: S606 - a list, without a shell
    except OSError as e:
        sys.stderr.write(f"command {command[0]!r} cannot be started: {e.strerror}\n")
    return NO_COMMAND


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
