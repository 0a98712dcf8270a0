"""Stage two: federated rounds on the cached labels; never loads SAM."""
