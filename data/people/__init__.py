"""People, streets and cameras drawn by code: the synthetic data set shows nobody who exists."""
