"""`python -m server --bundle DIR`: serve decodes until told to stop."""

import os
import sys


def run() -> None:
    # PyTorch's thread pool reads this when it is loaded. Threads that spin for their next piece of work take the cores
    # from encoders and neighbours: a decode on a busy CPU becomes several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from server.main import main

    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread that hangs in a device's driver would hold up an ordinary exit


if __name__ == "__main__":
    run()
