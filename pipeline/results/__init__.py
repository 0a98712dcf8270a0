"""Reading what finished runs left: scores, comparisons, reports, the demo."""
