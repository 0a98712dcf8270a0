"""The teacher: Segment Anything, built, adapted, and run without prompts."""

# Before any module of this package imports segment_anything or timm, and so torchvision.
from pipeline import runtime as runtime
