"""Stage two over Flower: the server loop in a ServerApp, each client at its own site.

``engine`` (server) and ``site`` (client) exchange the messages of ``letters``. ``node`` is a site's
process, ``apps`` what Flower's own SuperNode and SuperLink call, ``launch`` starts a run.
"""

import os

#: Nothing is reported to Flower's makers, and nothing is installed while a run goes on.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
os.environ.update(QUIET)  # before Flower is imported, which reads some of them then
