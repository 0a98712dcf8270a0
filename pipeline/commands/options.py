"""Options that several commands share."""

from typer import Option

SCHEDULER = Option(metavar="ADDRESS", help="Label on the workers of this dask scheduler (or file).")
WORKERS = Option(min=1, help="Label in so many processes here: one per GPU, or sharing the cores.")
SUPERLINK = Option(metavar="HOST:PORT", help="Flower's SuperLink.")
ROOT_CERTIFICATES = Option(
    metavar="FILE", help="Authority that signed the SuperLink's certificate."
)
KEY = Option(metavar="FILE", help="This site's private key, whose public one is registered.")
INSECURE = Option("--insecure", help="Without TLS: whoever is between reads and changes all.")
