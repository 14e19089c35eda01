"""The kernel of notebooks that run headless: `python -P -m asi_lens.reproduce.kernel -f connection_file`.

The kernel is IPython's, with a faster start and end, which take most of the time of a notebook whose results
are cached.
"""

from __future__ import annotations

import atexit
import gc
import logging
import sys


def main() -> None:
    """Run the kernel until it is shut down."""
    from ipykernel import kernelapp

    # Garbage collections during imports find nothing and take a tenth of the time.
    gc.set_threshold(10_000, 10, 10)
    # The last collection at exit would search all remaining objects for cycles, which takes two seconds.
    atexit.register(gc.freeze)
    # A kernel manager interrupts the kernel before the shutdown; this is not an error, so it is not logged.
    logging.getLogger("IPKernelApp").addFilter(lambda record: "KeyboardInterrupt" not in record.getMessage())
    sys.path.insert(0, "")  # for cells, as in Jupyter; -P left it out for the imports above
    kernelapp.launch_new_instance()


if __name__ == "__main__":
    main()
