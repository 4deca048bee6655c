"""Analysis of runs: norms through time, runs side by side, and how sensitive each set of layers is."""
