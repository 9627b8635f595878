"""The container image of the components, decided when a pipeline is compiled.

Nobody else can own the default name, so a cluster without our image refuses instead of running a stranger's. Set
`QCORE_IMAGE` to your registry's copy, best by digest (`registry/qcore@sha256:...`): a tag that moves returns old cached
results.
"""

import os

from qcore import __version__

IMAGE = os.environ.get("QCORE_IMAGE", f"localhost/kfp-qcore/qcore:{__version__}")
