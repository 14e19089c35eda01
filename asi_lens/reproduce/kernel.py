"""The kernel of notebooks that run headless: `python -P -m asi_lens.reproduce.kernel -f connection_file`.

IPython's own, for notebooks that read their caches: there, starting and ending are most of the time.
"""

from __future__ import annotations

import atexit
import gc
import logging
import sys


def main() -> None:
    """Run the kernel until it is shut down."""
    from ipykernel import kernelapp

    # Collections while modules are imported find nothing and take a tenth of the time.
    gc.set_threshold(10_000, 10, 10)
    # What is still there at the end goes with the process: to look for cycles in it takes two seconds.
    atexit.register(gc.freeze)
    # A manager interrupts the kernel before it shuts it down: no error, and nothing that a reader can act on.
    logging.getLogger("IPKernelApp").addFilter(lambda record: "KeyboardInterrupt" not in record.getMessage())
    sys.path.insert(0, "")  # for cells, as in Jupyter: -P kept it from what is imported here
    kernelapp.launch_new_instance()


if __name__ == "__main__":
    main()
