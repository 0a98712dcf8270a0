"""Using a finished model: predicted masks for new images, and files that leave the house.

What runs an exported ONNX model imports no torch.
"""
