"""Public and clinical data as people have them become the input layout."""
