"""Commands beside the stages of ``cli.py``: before the first one, and families of them."""
