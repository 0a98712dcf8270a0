"""What lies in ``cache/`` (docs/formats.md): image and label stores, the teacher's card,
and plain data as files.

The only room that imports zarr.
"""
