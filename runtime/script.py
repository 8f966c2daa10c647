"""How a script begins and ends: errors in one line, exit statuses."""

import contextlib
import os
import sys

import torch
from torch import distributed

from runtime.errors import UserError, first_line
from runtime.ranks import RANK, WORLD_SIZE, cleanup_distributed


def run_script(main):
    """Call main(). A problem that the user can solve ends the process with one line.

    A bug keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal's encoding may lack the letters of a file name or of a formula.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)

    try:
        main()
        sys.stdout.flush()
        cleanup_distributed()
    except UserError as error:
        end(str(error))
    except KeyboardInterrupt:
        end(
            "interrupted: run the same command again; a training script continues with "
            "--resume True",
            status=130,
        )
    except BrokenPipeError:
        # `| head` has read enough, or Ctrl-C has ended `| tee` as well.
        end(
            "the program that read the output has ended: a training script continues "
            "from its last checkpoint with --resume True"
        )
    except OSError as error:
        where = error.filename or "the system"
        end(f"{where}: {error.strerror or error}: solve this and run the command again")
    except (MemoryError, RuntimeError) as error:
        reason = first_line(error)
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if out_of_memory or "can't allocate memory" in reason:
            end(
                f"out of memory ({reason}): choose a smaller --batch-size, "
                "--image-size or --model-type; in pretraining on a GPU, try "
                "--images-on host"
            )
        lost_connection = isinstance(error, distributed.DistError)
        if WORLD_SIZE > 1 and (lost_connection or "gloo" in str(error)):
            end(
                f"another rank of this job has ended ({reason}): look for its error, "
                "and continue with --resume True"
            )
        raise


def end(line, status=1):
    """End the process with one line on standard error."""
    try:
        sys.stdout.flush()
    except OSError:
        # Its reader has ended, or its disk is full. Python would complain once more
        # when it flushes standard output at its end.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    with contextlib.suppress(OSError):
        print(error_line(line), file=sys.stderr, flush=True)
    if WORLD_SIZE > 1:
        # The interpreter's own end would wait for ranks that are gone.
        os._exit(status)
    sys.exit(status)


def error_line(text):
    """One line: "error: …", or "error (rank 3): …" where there are several ranks."""
    speaker = f"error (rank {RANK})" if WORLD_SIZE > 1 else "error"
    return f"{speaker}: {' '.join(text.splitlines())}"
