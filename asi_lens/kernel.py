"""The kernel of notebooks that run headless: `python -m asi_lens.kernel -f connection_file`.

IPython's own, for notebooks that read their caches: there, starting and ending are most of the time.
"""

from __future__ import annotations

import atexit
import gc
import sys

from asi_lens import drawing


def main() -> None:
    """Run the kernel until it is shut down."""
    from ipykernel import kernelapp

    # `-m` put the working folder in front; ipykernel's own launcher takes it away, too.
    sys.path.pop(0)
    # Collections while modules are imported find nothing and take a tenth of the time.
    gc.set_threshold(10_000, 10, 10)
    # What is still there at the end goes with the process: to look for cycles in it takes two seconds.
    atexit.register(gc.freeze)
    drawing.prepare()
    kernelapp.launch_new_instance()


if __name__ == "__main__":
    main()
