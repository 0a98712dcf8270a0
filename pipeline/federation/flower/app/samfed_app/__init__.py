"""The two apps of the samfed that is installed; this bundle holds nothing else."""

from pipeline.federation.flower.apps import client_app, server_app

__all__ = ["client_app", "server_app"]
