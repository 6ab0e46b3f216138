"""Command line: ``qgnn train``, ``quantize``, ``pack``, ``evaluate``, ``bench``, ``inspect``, ``report``, ``suggest``.

Exit codes: 0 done; 1 something was not as expected (data, model or file: the message says what); 2 wrong usage;
3 done, but the result misses what was asked for (``--min_accuracy``, a budget, agreement); 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]

FAILED, MISSED, INTERRUPTED = 1, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status.

    Raises:
        SystemExit: With 0 after ``--help`` and the like, with 2 for wrong usage.
    """
    try:
        from .parser import COMMANDS, parse  # takes a second: Ctrl-C may come meanwhile

        command, options = parse(argv)
        return MISSED if COMMANDS[command].run(options) is False else 0
    except KeyboardInterrupt:
        print("qgnn: interrupted; files are whole or not there", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # such as `qgnn inspect FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"qgnn: {error}", file=sys.stderr)
        return FAILED
