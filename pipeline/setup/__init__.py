"""Before the first command: does everything fit, and what would suit a folder of images."""
