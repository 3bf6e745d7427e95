"""The tester's side: the regression tests run on the releases' trees, judged, and kept as evidence."""
