"""What lies in ``cache/`` (docs/formats.md): image and label stores, and the teacher's card.

The only room that imports zarr.
"""
