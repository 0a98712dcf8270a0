"""What any segmentation project has: networks, augmentation, losses, metrics."""
