"""The zarr stores (docs/formats.md): ``images`` and ``labels``, over the shared ``chunks``.

The only package that imports zarr and numcodecs.
"""
