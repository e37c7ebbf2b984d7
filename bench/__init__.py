"""Side-by-side benchmarks: the substrate and its peers, measured in turn on the same guests."""
