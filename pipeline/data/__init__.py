"""A user's folder becomes a partition and image stores; only ``images`` decodes files."""
